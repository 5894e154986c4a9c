"""Keys of `task`: what is learned. None as a default: each task has its own, in its signature."""

from big_vit.config.fields import DEEPEST, WIDEST, Field, below_one, boolean, choice, integer
from big_vit.config.registries import TASKS

TASK: dict[str, Field] = {
    'task.name': Field(TASKS.name, 'classification', 'The task; docs/tasks.md has them.'),
    'task.loss': Field(
        choice('softmax', 'sigmoid'),
        None,
        "Cross-entropy over classes, or of each class alone; of pairs CLIP's, or SigLIP's.",
    ),
    'task.label_smoothing': Field(below_one, None, 'Share of the target spread over all classes.'),
    'task.embedding_dim': Field(integer(1, WIDEST), None, 'Dimension of the shared embedding.'),
    'task.mask_ratio': Field(below_one, None, 'Share of the patches that are hidden.'),
    'task.decoder_width': Field(integer(4, WIDEST), None, 'Width of the decoder.'),
    'task.decoder_depth': Field(integer(1, DEEPEST), None, 'Number of blocks of the decoder.'),
    'task.decoder_heads': Field(integer(1, WIDEST), None, 'Attention heads of the decoder.'),
    'task.normalise_pixels': Field(
        boolean, None, 'Predict each patch less its mean, by its standard deviation.'
    ),
}
