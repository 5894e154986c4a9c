"""Every key of a config: which values it takes, its default, and what it means."""

from big_vit.config.fields import (
    UNITS,
    Field,
    boolean,
    check_text,
    choice,
    durations,
    integer,
    number,
    size,
)
from big_vit.config.schema_data import DATASET
from big_vit.config.schema_evals import EVALUATION
from big_vit.config.schema_model import MODEL
from big_vit.config.schema_optim import OPTIMIZATION
from big_vit.config.schema_task import TASK

SCHEMA: dict[str, Field] = {
    'seed': Field(integer(0), 0, 'Decides parameters, data order, augmentation and dropout.'),
    **durations('total', 'Length of training', UNITS[:3]),
    'batch_size': Field(integer(1), None, 'Examples a step, over all devices.'),
    'accumulation': Field(integer(1), 1, 'Microbatches that a step is computed in.'),
    'image_size': Field(size, None, 'Pixels: a side, or (height, width).'),
    'lr': Field(number(0), None, 'Peak learning rate.'),
    'init': Field(check_text, None, 'Workdir or checkpoint whose parameters to start from.'),
    'init_tower': Field(
        check_text,
        None,
        'The stream of a contrastive `init` to go on with, as a model of one input.',
    ),
    'init_channels': Field(
        choice('mean', 'sum', 'repeat'),
        None,
        'How to make patches of `init` for images of other channels; without it that is refused.',
    ),
    'init_video': Field(
        choice('central', 'inflate'), 'central', 'How to make tubelets of the patches of `init`.'
    ),
    'init_resize': Field(
        choice('aligned', 'bilinear', 'bicubic', 'bicubic_antialias'),
        'aligned',
        "How to resize the learned positions of `init`: big_vision's way, between centres, "
        "Hugging Face's or timm's.",
    ),
    'switch': Field(
        check_text,
        None,
        'Workdir or checkpoint to go on from with another optimizer: step, parameters, moments.',
    ),
    'ema': Field(number(0, 1), 0.0, 'Decay of the moving average of parameters; 0 is off.'),
    'skip_sigmas': Field(
        number(0),
        6.0,
        'Skip updates whose loss or gradient norm is so many standard deviations above the '
        'last 128; 0 is off.',
    ),
    **TASK,
    'mixup': Field(
        number(0), 0.0, 'Blend pairs of examples, with shares of Beta(mixup, mixup); 0 is off.'
    ),
    'cutmix': Field(
        number(0),
        0.0,
        'Paste a box of one example into another, with areas of Beta(cutmix, cutmix); 0 is off.',
    ),
    'mix_switch': Field(number(0, 1), 0.5, 'Share of cutmix among mixtures, where both are on.'),
    'mix_prob': Field(number(0, 1), 1.0, 'Share of examples that are mixed at all.'),
    **MODEL,
    **{f'data.{name}': field for name, field in DATASET.items()},
    'data.shuffle': Field(boolean, True, 'Reshuffle each epoch, or keep the order of the source.'),
    'data.repeats': Field(
        integer(1), 1, 'Views of each example in a batch (repeated augmentation).'
    ),
    'data.workers': Field(
        integer(0), 0, 'Processes that load and transform; 0 uses threads of this one.'
    ),
    'data.max_error_rate': Field(
        number(0, 1), 0.01, "Share of damaged examples at which on_error='skip' ends the run."
    ),
    # What a part of a mixture or an evaluation does not say, it takes from `data`.
    **{
        f'mixture.*.{name}': field._replace(default=None)
        for name, field in DATASET.items()
        if name != 'transform'
    },
    'mixture.*.weight': Field(
        number(0), 1.0, 'How often examples of this part come, relative to the others.'
    ),
    **{f'evals.*.{name}': field._replace(default=None) for name, field in DATASET.items()},
    **{f'evals.*.{name}': field for name, field in EVALUATION.items()},
    **durations('evals.*.every', 'Evaluate this often, and at the end'),
    **OPTIMIZATION,
    'mesh.replica': Field(integer(-1), 1, 'Devices that hold copies; -1 takes the rest.'),
    'mesh.fsdp': Field(integer(-1), -1, 'Devices that parameters are sharded over.'),
    'mesh.tensor': Field(integer(-1), 1, 'Devices that heads and MLPs are split over.'),
    'mesh.sequence': Field(
        boolean, False, 'Split tokens over tensor between blocks: less memory, more time.'
    ),
    'mesh.min_shard_size': Field(
        integer(0), 2**20, 'Arrays of fewer scalars stay replicated on every device.'
    ),
    'mesh.max_replicated': Field(
        number(0, 1), 0.1, 'Largest share of the state in arrays that fsdp fails to divide.'
    ),
    **durations('checkpoint.every', 'Save this often, and at the end'),
    'checkpoint.keep_last': Field(integer(1), 2, 'How many of the newest checkpoints stay.'),
    **durations('checkpoint.keep_every', 'Never delete the checkpoints at multiples of this'),
    'profile': Field(
        integer(0), 0, 'Trace so many steps into WORKDIR/trace, from the tenth of this start on.'
    ),
    **durations('log.every', 'Write training metrics this often'),
    'log.tensorboard': Field(boolean, False, 'Also write TensorBoard event files.'),
    'log.wandb': Field(check_text, None, 'Also log to this Weights & Biases project.'),
    'transfer.train': Field(
        choice('all', 'head', 'attention', 'norm', 'bias', 'lora'),
        'all',
        'What is trained beside the head; the rest is frozen. docs/transfer.md has them.',
    ),
    'transfer.control': Field(boolean, True, 'Also train the same recipe from random parameters.'),
    'transfer.random_features': Field(
        boolean, True, 'Also train a head alone on random, frozen features.'
    ),
    'transfer.validation': Field(check_text, 'val', 'Evaluation by which a sweep chooses.'),
    'transfer.test': Field(check_text, 'test', 'Evaluation that a sweep scores once, at its end.'),
    'transfer.published': Field(
        check_text, None, 'What others report for this recipe, printed beside the result.'
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
