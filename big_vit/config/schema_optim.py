"""Schema of `optim` and `schedule`."""

from typing import Any

from big_vit.config.fields import (
    UNITS,
    Field,
    below_one,
    boolean,
    check_text,
    choice,
    durations,
    durations_by_rule,
    integer,
    number,
    rules,
)
from big_vit.config.registries import OPTIMIZERS


def _group_rules(value: Any) -> tuple[tuple[str, str], ...]:
    """pairs of (regex, optimizer)"""
    try:
        pairs = tuple((check_text(pattern), check_text(name)) for pattern, name in value)
    except (TypeError, ValueError):
        raise ValueError("a tuple of (regex on the parameter's path, optimizer)") from None
    try:
        return tuple((pattern, OPTIMIZERS.name(name)) for pattern, name in pairs)
    except ValueError as error:
        raise ValueError(f'pairs of a regex and {error}') from None


OPTIMIZATION: dict[str, Field] = {
    'optim.name': Field(OPTIMIZERS.name, 'adamw', 'Optimizer; see docs/optimizers.md.'),
    'optim.group_rules': Field(
        _group_rules,
        None,
        'Optimizers by parameter, instead of `name`; the first matching rule wins.',
    ),
    # None as a default: each optimizer has its own, in its signature in `factory.py`.
    'optim.b1': Field(
        below_one,
        None,
        'Decay of the first moment (schedule_free_adamw: share of the average in the point where '
        'the gradient is taken).',
    ),
    'optim.b2': Field(
        below_one,
        None,
        'Decay of the second moment (adafactor_vit: its upper limit; lion: decay of the momentum).',
    ),
    'optim.eps': Field(number(1e-38, 1), None, 'Added to the square root of the second moment.'),
    'optim.mu_dtype': Field(
        choice('float32', 'bfloat16'),
        None,
        'Storage type of the first moment or momentum.',
    ),
    'optim.momentum': Field(below_one, None, 'Decay of the momentum.'),
    'optim.nesterov': Field(boolean, None, 'Use Nesterov momentum.'),
    'optim.rate_in_momentum': Field(
        boolean,
        None,
        'Momentum of lars accumulates updates times their rate; or the rate multiplies their sum.',
    ),
    'optim.block': Field(
        integer(2), None, 'Largest side of the blocks that matrices are cut into.'
    ),
    'optim.every': Field(integer(1), None, 'Steps between updates of the roots or bases.'),
    'optim.start': Field(
        integer(1), None, 'First step with roots; before it, the grafting direction is used.'
    ),
    'optim.groups': Field(
        integer(1),
        None,
        'Number of groups of blocks that update their roots or bases in turn, to even out the time '
        'of steps.',
    ),
    'optim.sliced': Field(
        boolean,
        None,
        'Spread the iterations of all roots over `every` steps.',
    ),
    'optim.root': Field(
        choice('newton', 'eigh'),
        None,
        'How roots are computed: by matrix products, or by eigenvalues, for any exponent.',
    ),
    'optim.ridge': Field(
        number(0, 1, excluded=0),
        None,
        'Regularization added to the statistics, relative to their largest eigenvalue.',
    ),
    'optim.exponent': Field(
        number(-1, 0, excluded=0),
        None,
        'Exponent of the statistics on each side; -0.25 is Shampoo.',
    ),
    'optim.graft': Field(
        choice('adam', 'sgd', 'none'),
        None,
        'Method whose update norm a block takes over.',
    ),
    'optim.stats_dtype': Field(
        choice('float32', 'bfloat16'),
        None,
        'Storage type of the statistics; roots need float32.',
    ),
    'optim.root_dtype': Field(
        choice('float32', 'bfloat16'),
        None,
        'Storage type of the roots or bases.',
    ),
    'optim.gather_dtype': Field(
        choice('float32', 'bfloat16'),
        None,
        'Type in which updates are sent between devices.',
    ),
    'optim.clip': Field(number(0), 1.0, 'Largest norm of the gradient; 0 is off.'),
    'optim.clip_by': Field(
        choice('global', 'module', 'tensor'),
        None,
        'What has a norm of its own that `clip` limits: the whole gradient (`global`, as when '
        'unset), trunk and each module that a task adds (`module`), or each tensor of each layer '
        '(`tensor`).',
    ),
    'optim.agc': Field(
        number(0),
        0.0,
        "Largest norm of a unit's gradient as a share of its weights' norm, applied before `clip` "
        '(adaptive gradient clipping); 0 is off.',
    ),
    'optim.sam_rho': Field(
        number(0),
        0.0,
        'Radius of sharpness-aware minimization (SAM), which takes two gradients per step; 0 is '
        'off.',
    ),
    'optim.sam_adaptive': Field(
        boolean, False, 'Measure the radius of SAM relative to each weight (ASAM).'
    ),
    'optim.weight_decay': Field(
        number(0),
        0.0,
        'Decoupled weight decay, multiplied by the learning rate; L2 for adam and lars.',
    ),
    'optim.weight_decay_end': Field(
        number(0),
        None,
        'Weight decay at the end of training, to which it goes on a cosine; unset for a constant '
        'one.',
    ),
    'optim.weight_decay_rules': Field(
        rules,
        (('.*/kernel', 1.0), ('.*', 0.0)),
        'Factors on the weight decay; the first matching rule wins.',
    ),
    'optim.lr_rules': Field(
        rules,
        (('.*', 1.0),),
        'Factors on the learning rate; the first matching rule wins, and 0 freezes.',
    ),
    'optim.layer_decay': Field(
        number(0, 1),
        1.0,
        'Factor on the learning rate per layer of distance from the head; 1 is off.',
    ),
    **{
        f'optim.freeze_{unit}': Field(
            durations_by_rule,
            None,
            f'How long parameters stay as they are, in {unit}; the first matching rule wins.',
        )
        for unit in UNITS
    },
    'optim.freeze_by': Field(
        choice('rate', 'gradient'),
        None,
        'What parameters miss while `freeze_*` holds them: the rate alone, while moments and '
        'counts run on (as when unset), or the gradient and with it the state.',
    ),
    'schedule.name': Field(
        choice(
            'cosine',
            'linear',
            'constant',
            'rsqrt',
            'step',
            'cosine_dino',
            'cosine_dinov3',
            'cosine_ijepa',
            'constant_dinov3',
        ),
        'cosine',
        'Learning rate schedule after the warmup.',
    ),
    **durations('schedule.warmup', 'Warmup'),
    'schedule.start': Field(
        number(0, 1),
        None,
        'Learning rate at the start of the warmup as a share of the peak; 0 if unset.',
    ),
    'schedule.end': Field(
        number(0, 1), 0.0, 'Final learning rate as a share of the peak (cosines, linear, step).'
    ),
    **durations('schedule.cooldown', 'Linear decay to 0 at the end (constant, rsqrt)'),
    **durations('schedule.drop', 'When the rate falls (step)'),
    **durations(
        'schedule.timescale',
        'Timescale of rsqrt: at t after the warmup the rate is peak x '
        'sqrt(timescale / (timescale + t)); 10,000 steps if unset',
    ),
}
