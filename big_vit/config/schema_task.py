"""Keys of `task`: what is learned. None as a default: each task has its own, in its signature."""

from big_vit.config.fields import Field, below_one, boolean, choice, integer, number
from big_vit.config.registries import TASKS

TASK: dict[str, Field] = {
    'task.name': Field(TASKS.name, 'classification', 'The task; docs/tasks.md has them.'),
    'task.loss': Field(
        choice('softmax', 'sigmoid'),
        None,
        "Cross-entropy over classes, or of each class alone; of pairs CLIP's, or SigLIP's.",
    ),
    'task.label_smoothing': Field(
        number(0, 1), None, 'Share of the target spread over all classes.'
    ),
    'task.embedding_dim': Field(integer(1), None, 'Dimension of the shared embedding.'),
    'task.mask_ratio': Field(below_one, None, 'Share of the patches that are hidden.'),
    'task.decoder_width': Field(integer(4), None, 'Width of the decoder.'),
    'task.decoder_depth': Field(integer(1), None, 'Number of blocks of the decoder.'),
    'task.decoder_heads': Field(integer(1), None, 'Attention heads of the decoder.'),
    'task.normalise_pixels': Field(
        boolean, None, 'Predict each patch less its mean, by its standard deviation.'
    ),
}
