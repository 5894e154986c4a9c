"""Keys of `task`: what is learned. None as a default: each task has its own, in its signature."""

from big_vit.config.fields import (
    DEEPEST,
    WIDEST,
    Field,
    below_one,
    boolean,
    choice,
    integer,
    number,
    span,
)
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
    'task.method': Field(
        choice('ijepa', 'lejepa'),
        None,
        'Predict blocks of an image from the rest, or views of it from each other.',
    ),
    'task.target_blocks': Field(integer(1, 64), None, 'Blocks of an image that are predicted.'),
    'task.target_scale': Field(
        span(0, 1), None, 'Least and greatest share of the image that a block covers.'
    ),
    'task.target_aspect': Field(
        span(0, 100), None, 'Least and greatest height by width of a block.'
    ),
    'task.context_scale': Field(
        span(0, 1),
        None,
        'Least and greatest share that the square covers of which the context is what the blocks '
        'leave.',
    ),
    'task.context_tokens': Field(
        integer(1, WIDEST),
        None,
        "Tokens of each context; by default the mean of I-JEPA's code in batches of 128.",
    ),
    'task.whole_grid': Field(
        boolean, None, "Blocks reach the last row and column, which they do not in I-JEPA's code."
    ),
    'task.predictor_width': Field(integer(4, WIDEST), None, 'Width of the predictor.'),
    'task.predictor_depth': Field(integer(1, DEEPEST), None, 'Number of blocks of the predictor.'),
    'task.predictor_heads': Field(
        integer(1, WIDEST),
        None,
        'Attention heads of the predictor; by default as many as the model has.',
    ),
    'task.momentum': Field(
        span(0, 1), None, "Momentum of the teacher's average at the start and at the end."
    ),
    'task.projector_width': Field(integer(1, WIDEST), None, 'Hidden width of the projector.'),
    'task.projection_dim': Field(
        integer(1, WIDEST), None, 'Dimension in which views are compared.'
    ),
    'task.sigreg_weight': Field(number(0, 1), None, 'Share of the loss that is SIGReg.'),
    'task.sigreg_directions': Field(
        integer(1, WIDEST), None, 'Random directions of SIGReg in each step.'
    ),
}
