"""The `optim` and `schedule` sections as an optimizer and its learning rate."""

from typing import Any, NamedTuple

import numpy as np
import optax
from jax.sharding import Mesh

from big_vit import config as config_lib
from big_vit import trees
from big_vit.config import Config
from big_vit.data import sources
from big_vit.errors import UserError
from big_vit.optim import factory, per_layer, schedules


class Optimizer(NamedTuple):
    """An optimizer, and by parameter path what it does."""

    transform: optax.GradientTransformationExtraArgs
    decay: dict[str, float]
    rate: dict[str, per_layer.Factor]
    group: dict[str, str]
    settings: dict[str, dict[str, Any]]


def build_optimizer(
    config: Config, shapes: Any, schedule: schedules.Schedule, mesh: Mesh
) -> Optimizer:
    """The optimizer of the config, for parameters of these shapes.

    Raises:
      UserError: rules that fit no parameter, or choices that exclude each other.
    """
    o, names = config.optim, list(trees.flatten(shapes))
    if o.group_rules is None:
        group = dict.fromkeys(names, o.name)
    else:
        group = trees.match_rules(o.group_rules, names, 'config: optim.group_rules')
    settings = {}
    for name in dict.fromkeys(group.values()):
        own = factory.defaults(name)
        given = {key: o[key] for key in own}
        settings[name] = {key: own[key] if given[key] is None else given[key] for key in own}
    if 'schedule_free_adamw' in settings:
        _check_schedule_free(config, settings)
    laws = {name: factory.LAWS[name](**keys) for name, keys in settings.items()}
    law = next(iter(laws.values())) if len(laws) == 1 else factory.grouped(laws, group)
    rate: dict[str, Any] = trees.match_rules(o.lr_rules, names, 'config: optim.lr_rules')
    if o.layer_decay != 1:
        for name, factor in per_layer.decay_factors(o.layer_decay, shapes).items():
            each = tuple(rate[name] * f for f in np.atleast_1d(factor).tolist())
            rate[name] = each if isinstance(factor, tuple) else each[0]
    if o.weight_decay:
        factors = trees.match_rules(o.weight_decay_rules, names, 'config: optim.weight_decay_rules')
        decay = {name: o.weight_decay * factor for name, factor in factors.items()}
    else:
        decay = dict.fromkeys(names, 0.0)
    made = factory.make(
        law,
        schedule,
        decay_factors=decay,
        lr_factors=rate,
        clip=o.clip,
        agc=o.agc,
        mesh=mesh,
    )
    return Optimizer(made, decay, rate, group, settings)


def _check_schedule_free(config: Config, settings: dict[str, Any]) -> None:
    if len(settings) > 1:
        raise UserError(
            'config: optim.group_rules: schedule_free_adamw averages all parameters, so it cannot '
            'be one of several optimizers'
        )
    if settings['schedule_free_adamw']['b1'] == 0:
        raise UserError('config: optim.b1 must be above 0 for schedule_free_adamw')
    if config.ema:
        raise UserError(
            'config: ema must be 0 for schedule_free_adamw: what is evaluated is its own average'
        )
    if config.schedule.name != 'constant':
        raise UserError(
            "config: schedule.name must be 'constant' for schedule_free_adamw (a warmup may be "
            f'set), got {config.schedule.name!r}'
        )


def rate_schedule(
    config: Config,
    source: sources.Source,
    total: int,
    peak: float | None = None,
    ahead: int | float = 0.0,
) -> schedules.Schedule:
    """The learning rate by step, up to `lr` or another peak.

    Args:
      ahead: as for `run_length`. The rate of a run whose length is in examples is a function of
        the examples seen, so another batch size does not move it.
    """
    if ahead and config.peek('total_steps') is None:
        by_examples = _rate_by_step(config, source, total + ahead, peak)
        return lambda step: by_examples(step + ahead)
    return _rate_by_step(config, source, total, peak)


def _rate_by_step(
    config: Config, source: sources.Source, total: int | float, peak: float | None
) -> schedules.Schedule:
    section = config.schedule
    more: dict[str, Any] = {}
    if section.name in ('cosine', 'linear'):
        more['end'] = section.end
    else:
        more['cooldown_steps'] = in_steps(section, 'cooldown', config, source, total) or 0
    if section.name == 'rsqrt':
        timescale = in_steps(section, 'timescale', config, source, total)
        more['timescale'] = 10_000 if timescale is None else timescale
    warmup = in_steps(section, 'warmup', config, source, total) or 0
    return schedules.make(
        section.name,
        peak=config.lr if peak is None else peak,
        total_steps=total,
        warmup_steps=warmup,
        **more,
    )


def run_length(config: Config, source: sources.Source, ahead: int | float = 0.0) -> int | None:
    """The steps of the whole run, None where its length is not set.

    Args:
      ahead: steps of this batch size that would have seen as many examples as the run has, less
        the steps that it made: not 0 where it began with another batch size.
    """
    return config_lib.steps(
        config, 'total', batch_size=config.batch_size, examples=source.length, ahead=ahead
    )


def in_steps(
    section: Config,
    name: str,
    config: Config,
    source: sources.Source,
    total: int | float | None = None,
) -> int | None:
    """A duration of the config in steps, None where it is not set."""
    return config_lib.steps(
        section, name, batch_size=config.batch_size, examples=source.length, total=total
    )
