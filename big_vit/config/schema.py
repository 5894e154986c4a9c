"""Schema: every key of a config with its valid values, its default and its meaning."""

from big_vit.config.fields import (
    UNITS,
    Field,
    below_one,
    boolean,
    check_text,
    choice,
    durations,
    integer,
    number,
    power_of_two,
    shuffle,
    size,
)
from big_vit.config.schema_data import DATASET
from big_vit.config.schema_evals import EVALUATION
from big_vit.config.schema_model import MODEL
from big_vit.config.schema_optim import OPTIMIZATION
from big_vit.config.schema_task import TASK

SCHEMA: dict[str, Field] = {
    'seed': Field(
        integer(0, 2**32 - 1), 0, 'Random seed of parameters, data order, augmentation and dropout.'
    ),
    **durations('total', 'Length of training', UNITS[:3]),
    'batch_size': Field(integer(1, 2**24), None, 'Examples per step, over all devices.'),
    'accumulation': Field(integer(1, 2**24), 1, 'Number of microbatches per step.'),
    'image_size': Field(size, None, 'Image size in pixels: one side, or (height, width).'),
    'lr': Field(number(0), None, 'Peak learning rate.'),
    'init': Field(
        check_text,
        None,
        'Workdir or checkpoint to initialize the parameters from, or weights: a file, a folder, '
        '`timm/NAME`, `hf://OWNER/NAME[@REVISION]` or a URL.',
    ),
    'init_architecture': Field(
        check_text,
        None,
        "timm's name of the model in `init`, if that is a bare state dict.",
    ),
    'init_tower': Field(
        check_text,
        None,
        'Stream to keep, as a model of one input, of a contrastive `init`.',
    ),
    'init_channels': Field(
        choice('mean', 'sum', 'repeat'),
        None,
        'How to adapt the patch embedding of `init` to another number of image channels; an '
        'error if needed but not set.',
    ),
    'init_video': Field(
        choice('central', 'inflate'),
        'central',
        'How to turn the patch embedding of `init` into tubelets: all of it in the central frame, '
        'or an equal share in every frame.',
    ),
    'init_resize': Field(
        choice('aligned', 'bilinear', 'bicubic', 'bicubic_antialias'),
        'aligned',
        'How to resize the learned position embeddings of `init`: as big_vision does, with '
        'half-pixel centers, as Hugging Face does, or as timm does.',
    ),
    'init_standardise': Field(
        boolean,
        None,
        'Standardise frozen features by their mean and deviation over the first training examples, '
        'as a BatchNorm before the head would.',
    ),
    'switch': Field(
        check_text,
        None,
        'Workdir or checkpoint to continue with another optimizer: keeps step, parameters and '
        'moments.',
    ),
    'ema': Field(below_one, 0.0, 'Decay of the moving average of the parameters; 0 is off.'),
    'skip_sigmas': Field(
        number(0),
        6.0,
        'Skip updates whose loss or gradient norm is this many deviations above the median of the '
        'last 64 steps (docs/optimizers.md); 0 is off.',
    ),
    **TASK,
    'mixup': Field(
        number(0, 1000),
        0.0,
        'Blend pairs of examples with weights from Beta(mixup, mixup); 0 is off.',
    ),
    'cutmix': Field(
        number(0, 1000),
        0.0,
        'Paste a box of one example into another, with its area from Beta(cutmix, cutmix); 0 is '
        'off.',
    ),
    'mix_switch': Field(
        number(0, 1), 0.5, 'Probability of cutmix rather than mixup, if both are on.'
    ),
    'mix_prob': Field(number(0, 1), 1.0, 'Probability that an example is mixed at all.'),
    **MODEL,
    **{f'data.{name}': field for name, field in DATASET.items()},
    'data.shuffle': Field(
        shuffle,
        'auto',
        "Reshuffle every epoch, or keep the order of the source; 'windows' reads few shards at a "
        'time, and auto does so from 10,000,000 examples in 64 shards on.',
    ),
    'data.window': Field(
        power_of_two(2**16),
        None,
        "Shards open at once over all hosts, for shuffle='windows'; by default up to 1024.",
    ),
    'data.repeats': Field(
        integer(1, 2**24), 1, 'Augmented views of each example per batch (repeated augmentation).'
    ),
    'data.workers': Field(
        integer(0, 1024),
        0,
        'Processes that load and transform examples; 0 uses threads of the main process.',
    ),
    'data.max_error_rate': Field(
        number(0, 1), 0.01, "Share of damaged examples that ends a run with on_error='skip'."
    ),
    # Parts of a mixture and evaluations take what they do not set from `data`.
    **{
        f'mixture.*.{name}': field._replace(default=None)
        for name, field in DATASET.items()
        if name != 'transform'
    },
    'mixture.*.weight': Field(
        number(0), 1.0, 'Sampling weight of this part, relative to the others.'
    ),
    **{f'evals.*.{name}': field._replace(default=None) for name, field in DATASET.items()},
    **{f'evals.*.{name}': field for name, field in EVALUATION.items()},
    **durations('evals.*.every', 'Interval between evaluations; also runs at the end'),
    **OPTIMIZATION,
    'mesh.replica': Field(
        integer(-1, 2**20),
        1,
        'Number of copies of the parameters (data parallelism); -1 uses the rest.',
    ),
    'mesh.fsdp': Field(
        integer(-1, 2**20),
        -1,
        'Number of devices that parameters are sharded over; -1 uses the rest.',
    ),
    'mesh.tensor': Field(
        integer(-1, 2**20), 1, 'Number of devices that attention heads and MLPs are split over.'
    ),
    'mesh.sequence': Field(
        boolean, False, 'Shard tokens over `tensor` between blocks: less memory, more time.'
    ),
    'mesh.min_shard_size': Field(
        integer(0, 2**53 - 1), 2**20, 'Arrays with fewer elements are replicated on every device.'
    ),
    'mesh.max_replicated': Field(
        number(0, 1), 0.1, 'Largest share of the state in arrays that fsdp fails to shard.'
    ),
    **durations('checkpoint.every', 'Interval between checkpoints; also saves at the end'),
    'checkpoint.best': Field(
        check_text,
        None,
        'Metric of an evaluation, such as val/top1, whose best checkpoint is kept: RUN@best.',
    ),
    'early_stopping.patience': Field(
        integer(1),
        None,
        'Evaluations of `checkpoint.best` without a better one after which the run ends.',
    ),
    'checkpoint.keep_last': Field(integer(1), 2, 'Number of newest checkpoints to keep.'),
    **durations('checkpoint.keep_every', 'Keep checkpoints at multiples of this forever'),
    'profile': Field(
        integer(0, 10_000),
        0,
        'Number of steps to trace into WORKDIR/trace, from the tenth step after a start; 0 is off.',
    ),
    **durations('log.every', 'Interval between training metrics'),
    'log.tensorboard': Field(boolean, False, 'Also write TensorBoard event files.'),
    'log.wandb': Field(check_text, None, 'Weights & Biases project to log to as well.'),
    'transfer.train': Field(
        choice('all', 'head', 'attention', 'norm', 'bias', 'lora'),
        'all',
        'Parameters trained besides the head; the others are frozen. See docs/transfer.md.',
    ),
    'transfer.control': Field(
        boolean, True, 'Also train the same recipe from random parameters, as a control.'
    ),
    'transfer.random_features': Field(
        boolean, True, 'Also train only a head on random, frozen features.'
    ),
    'transfer.validation': Field(
        check_text, 'val', 'Evaluation by which a sweep selects, or a metric of it as in val/loss.'
    ),
    'transfer.test': Field(check_text, 'test', 'Evaluation that scores a sweep, once, at its end.'),
    'transfer.published': Field(
        check_text, None, 'Published result for this recipe, printed beside the new one.'
    ),
}
REQUIRED = {  # One of each group must be set; the message names the first.
    'total_epochs': ('total_steps', 'total_epochs', 'total_examples'),
    'batch_size': ('batch_size',),
    'image_size': ('image_size',),
    'lr': ('lr',),
    'model.variant': ('model.variant',),
    'data.name': ('data.name',),
}
