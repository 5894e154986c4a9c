"""Keys of `optim` and `schedule`."""

from typing import Any

from big_vit.config.fields import (
    Field,
    below_one,
    boolean,
    check_text,
    choice,
    durations,
    integer,
    negative_power,
    number,
    positive_share,
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
    'optim.name': Field(OPTIMIZERS.name, 'adamw', 'The optimizer; see docs/optimizers.md.'),
    'optim.group_rules': Field(
        _group_rules, None, 'Optimizers by parameter, in place of `name`; the first match wins.'
    ),
    # None as a default: each optimizer has its own, in its signature in `factory.py`.
    'optim.b1': Field(
        below_one,
        None,
        'Decay of the first moment; for schedule_free_adamw, share of the average where '
        'the gradient is taken.',
    ),
    'optim.b2': Field(
        below_one,
        None,
        'Decay of the second moment (adafactor_vit: its limit; lion: of the momentum).',
    ),
    'optim.eps': Field(number(0), None, 'Added to the root of the second moment.'),
    'optim.mu_dtype': Field(
        choice('float32', 'bfloat16'),
        None,
        'Type the first moment or momentum is kept in.',
    ),
    'optim.momentum': Field(below_one, None, 'Momentum.'),
    'optim.nesterov': Field(boolean, None, 'Nesterov momentum.'),
    'optim.block': Field(integer(2), None, 'Largest side of a block.'),
    'optim.every': Field(integer(1), None, 'Steps between two roots or bases.'),
    'optim.start': Field(integer(1), None, 'First step with roots, before it Adam.'),
    'optim.groups': Field(
        integer(1),
        None,
        'Parts whose roots or bases take turns, so that no step has all of them.',
    ),
    'optim.sliced': Field(
        boolean,
        None,
        'Spread the iterations of all roots over `every` steps.',
    ),
    'optim.root': Field(
        choice('newton', 'eigh'),
        None,
        'How roots are made; eigh takes any exponent.',
    ),
    'optim.ridge': Field(
        positive_share,
        None,
        'Added to statistics, relative to their largest eigenvalue.',
    ),
    'optim.exponent': Field(negative_power, None, 'Power of the statistics on each side.'),
    'optim.graft': Field(
        choice('adam', 'sgd', 'none'),
        None,
        'Whose length the update of a block has.',
    ),
    'optim.stats_dtype': Field(
        choice('float32', 'bfloat16'),
        None,
        'Type of the statistics; roots need float32.',
    ),
    'optim.root_dtype': Field(
        choice('float32', 'bfloat16'),
        None,
        'Type the roots or bases are kept in.',
    ),
    'optim.gather_dtype': Field(
        choice('float32', 'bfloat16'),
        None,
        'Type in which updates travel between devices.',
    ),
    'optim.clip': Field(number(0), 1.0, 'Largest global norm of the gradient; 0 is off.'),
    'optim.agc': Field(
        number(0),
        0.0,
        "Largest norm of a unit's gradient as a share of its weights', before `clip`; 0 is off.",
    ),
    'optim.sam_rho': Field(
        number(0), 0.0, 'Take the gradient so far uphill (SAM): two a step; 0 is off.'
    ),
    'optim.sam_adaptive': Field(
        boolean, False, 'Measure the distance of SAM relative to each weight (ASAM).'
    ),
    'optim.weight_decay': Field(
        number(0), 0.0, 'Decoupled decay, multiplied by the rate; L2 for adam and lars.'
    ),
    'optim.weight_decay_rules': Field(
        rules, (('.*/kernel', 1.0), ('.*', 0.0)), 'Factors on the decay; the first match wins.'
    ),
    'optim.lr_rules': Field(
        rules, (('.*', 1.0),), 'Factors on the rate; the first match wins, 0 freezes.'
    ),
    'optim.layer_decay': Field(
        number(0, 1), 1.0, 'Factor on the rate for each layer further from the head; 1 is off.'
    ),
    'schedule.name': Field(
        choice('cosine', 'linear', 'constant', 'rsqrt'),
        'cosine',
        'How the rate moves after the warmup.',
    ),
    **durations('schedule.warmup', 'Linear warmup from 0'),
    'schedule.end': Field(
        number(0, 1), 0.0, 'The last rate, as a share of the peak (cosine, linear).'
    ),
    **durations('schedule.cooldown', 'Linear fall to 0 at the end (constant, rsqrt)'),
    **durations(
        'schedule.timescale',
        'The rate is peak x sqrt(timescale / (timescale + t)) at t after the warmup, by default '
        'with 10,000 steps (rsqrt)',
    ),
}
