"""Keys of `task`: what is learned. None as a default: each task has its own, in its signature."""

from big_vit.config.fields import (
    DEEPEST,
    WIDEST,
    Field,
    below_one,
    boolean,
    check_text,
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
    'task.queries': Field(integer(1, WIDEST), None, 'How many objects can be found in a picture.'),
    'task.query_place': Field(
        choice('decoder', 'trunk'),
        None,
        "Queries are in a decoder (DETR), or tokens of the trunk's sequence (YOLOS).",
    ),
    'task.class_layers': Field(integer(1, 16), None, 'Dense layers of the head of classes.'),
    'task.l1_weight': Field(
        number(0, 1000), None, 'Factor of the distance of boxes, in loss and matching.'
    ),
    'task.giou_weight': Field(
        number(0, 1000), None, 'Factor of their overlap, in loss and matching.'
    ),
    'task.no_object_weight': Field(
        number(0, 1, excluded=0),
        None,
        'What a query without object counts in the cross-entropy, beside 1 of one with an object.',
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
    'task.projector_width': Field(integer(1, WIDEST), None, 'Hidden width of the projector.'),
    'task.projection_dim': Field(
        integer(1, WIDEST), None, 'Dimension in which views are compared.'
    ),
    'task.sigreg_weight': Field(number(0, 1), None, 'Share of the loss that is SIGReg.'),
    'task.sigreg_directions': Field(
        integer(1, WIDEST), None, 'Random directions of SIGReg in each step.'
    ),
    'task.head': Field(
        choice('linear', 'mask'),
        None,
        'Classes of pixels by a linear layer on patches, or by queries with a mask each.',
    ),
    'task.query_blocks': Field(integer(1, DEEPEST), None, 'How many last blocks see the queries.'),
    'task.points': Field(
        integer(4, 2**20), None, 'At how many points masks are compared in training.'
    ),
    'task.last_blocks': Field(
        integer(1, DEEPEST), None, 'How many last blocks give the features of pixels, joined.'
    ),
    'task.dropout': Field(
        below_one, None, 'Share of the features of patches that are left out of a whole image.'
    ),
    'task.prototypes': Field(integer(2, 2**20), None, 'Number of prototypes.'),
    'task.bottleneck': Field(
        integer(1, WIDEST), None, 'Width of the rows that are compared with prototypes.'
    ),
    'task.head_width': Field(integer(1, WIDEST), None, 'Width of the hidden layers of heads.'),
    'task.patch_head': Field(
        choice('shared', 'separate', 'none'),
        None,
        'Hidden patches have the head of views, a head of their own, or none are hidden.',
    ),
    'task.prototype_norm': Field(
        choice('learned', 'fixed', 'none'),
        None,
        'Length of the prototypes: one for each, 1, or as it comes.',
    ),
    'task.centering': Field(
        choice('centre', 'sinkhorn'),
        None,
        "What is between a teacher and a single prototype: a running mean, or Sinkhorn's law.",
    ),
    'task.teacher': Field(
        check_text,
        None,
        'Workdir or checkpoint of a run of the same task whose model is the teacher, frozen.',
    ),
    'task.teacher_temperature': Field(
        span(1e-3, 1), None, "The teacher's temperature at the start and after the warm-up."
    ),
    'task.temperature_warmup': Field(
        number(0, 1), None, "Share of the run in which the teacher's temperature rises."
    ),
    'task.student_temperature': Field(number(1e-3, 1), None, "The student's temperature."),
    'task.momentum': Field(
        span(0, 1), None, "Momentum of the teacher's average at the start and at the end."
    ),
    'task.dino_weight': Field(number(0, 1000), None, 'Factor of the loss of views.'),
    'task.ibot_weight': Field(number(0, 1000), None, 'Factor of the loss of hidden patches.'),
    'task.koleo_weight': Field(
        number(0, 1000), None, 'Factor of the loss that keeps features apart; 0 has none.'
    ),
    'task.koleo_group': Field(
        integer(2), None, 'Examples among which the nearest one is kept apart.'
    ),
    'task.gram_weight': Field(
        number(0, 1000),
        None,
        'Factor of the loss that keeps likenesses of patches as they were; 0 has none.',
    ),
    'task.gram_start': Field(
        below_one, None, 'Share of the run after which it begins, against the teacher of then.'
    ),
    'task.gram_every': Field(
        below_one, None, 'Share of the run after which that teacher is taken again; 0 is never.'
    ),
    'task.mask_ratios': Field(
        span(0, 1), None, 'Least and greatest share of the patches that are hidden in a view.'
    ),
    'task.mask_probability': Field(
        number(0, 1), None, 'Share of the views in which patches are hidden.'
    ),
    'task.mask_group': Field(
        integer(1), None, 'Examples over whose views the shares are spread evenly.'
    ),
    'task.mask_law': Field(
        choice('exact', 'ibot'),
        None,
        'Exact numbers of hidden patches in a group, or those that blocks come to in each view.',
    ),
    'task.patch_centre': Field(
        choice('hidden', 'all'), None, 'Patches of the teacher whose mean is their centre.'
    ),
    'task.position_offset': Field(
        number(0, 1),
        None,
        'Added to the grid of small views where learned positions are interpolated.',
    ),
}
