"""The `optim` and `schedule` sections as an optimizer and its learning rate."""

from typing import Any, NamedTuple

import numpy as np
import optax
from jax.sharding import Mesh

from big_vit import config as config_lib
from big_vit import trees
from big_vit.build.task import build_task
from big_vit.config import Config
from big_vit.config.fields import UNITS
from big_vit.data import sources
from big_vit.errors import UserError
from big_vit.optim import clipping, factory, per_layer, schedules


class Optimizer(NamedTuple):
    """An optimizer, and by parameter path what it does.

    `decay` multiplies `decay_schedule`, if there is one. `start` has the first step of parameters
    that stay as they are at first.
    """

    transform: optax.GradientTransformationExtraArgs
    decay: dict[str, float]
    rate: dict[str, per_layer.Factor]
    group: dict[str, str]
    settings: dict[str, dict[str, Any]]
    decay_schedule: schedules.Schedule | None
    start: dict[str, int | float]


class Length(NamedTuple):
    """What durations are measured against: data, steps of the run, and `ahead` of `run_length`."""

    source: sources.Source
    total: int
    ahead: int | float = 0.0

    def shift(self, config: Config) -> int | float:
        """Steps to add to a step, where a run's length is in examples and its batch size changed.

        What a run of this length does is a function of the examples seen.
        """
        return self.ahead if config.peek('total_steps') is None else 0.0


def build_optimizer(
    config: Config, shapes: Any, schedule: schedules.Schedule, mesh: Mesh, length: Length
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
    start = _first_steps(config, names, length)
    by_gradient = bool(start) and o.freeze_by == 'gradient'
    laws, labels = _later(laws, group, start) if by_gradient else (laws, group)
    law = next(iter(laws.values())) if len(laws) == 1 else factory.grouped(laws, labels)
    rate: dict[str, Any] = trees.match_rules(o.lr_rules, names, 'config: optim.lr_rules')
    if o.layer_decay != 1:
        additions = build_task(config.task).additions
        for name, factor in per_layer.decay_factors(o.layer_decay, shapes, additions).items():
            each = tuple(rate[name] * f for f in np.atleast_1d(factor).tolist())
            rate[name] = each if isinstance(factor, tuple) else each[0]
    decay_schedule = _decay_schedule(config, length)
    decay = dict.fromkeys(names, 0.0)
    if o.weight_decay or decay_schedule:
        factors = trees.match_rules(o.weight_decay_rules, names, 'config: optim.weight_decay_rules')
        largest = 1.0 if decay_schedule else o.weight_decay
        decay = {name: largest * factor for name, factor in factors.items()}
    made = factory.make(
        law,
        schedule,
        decay_factors=decay,
        lr_factors=rate,
        clip=o.clip,
        clip_part=_clip_part(config) if o.clip else None,
        agc=o.agc,
        mesh=mesh,
        decay_schedule=decay_schedule,
        start={} if by_gradient else start,
    )
    return Optimizer(made, decay, rate, group, settings, decay_schedule, start)


def _decay_schedule(config: Config, length: Length) -> schedules.Schedule | None:
    """The weight decay by step; None if it is constant."""
    o = config.optim
    if o.weight_decay_end is None:
        return None
    shift = length.shift(config)
    by_step = schedules.weight_decay(
        config.schedule.name, o.weight_decay, o.weight_decay_end, length.total + shift
    )
    return (lambda step: by_step(step + shift)) if shift else by_step


def _first_steps(config: Config, names: list[str], length: Length) -> dict[str, int | float]:
    """The step at which each parameter that `optim.freeze_*` holds begins to move.

    Raises:
      UserError: that is never.
    """
    shift = length.shift(config)
    start = {}
    for unit in UNITS:
        key = f'freeze_{unit}'
        if config.optim[key] is None:
            continue
        found = trees.match_rules(config.optim[key], names, f'config: optim.{key}')
        for name, duration in found.items():
            count = config_lib.steps(
                {key: duration},
                'freeze',
                batch_size=config.batch_size,
                examples=length.source.length,
                total=length.total + shift,
            )
            if count:
                start[name] = count - shift
            if count and count - shift >= length.total:
                raise UserError(
                    f'config: optim.{key} holds {name} for {count} steps, and the run has '
                    f'{length.total}: shorten it, or freeze it with a factor of 0 in optim.lr_rules'
                )
    return start


def _later(
    laws: dict[str, factory.Law], group: dict[str, str], start: dict[str, int | float]
) -> tuple[dict[str, factory.Law], dict[str, str]]:
    """Laws by label and labels by path, where parameters that start later have laws of their own.

    Labels are part of the state's paths, so they do not depend on the steps themselves.
    """
    places = {step: place for place, step in enumerate(sorted(set(start.values())), 1)}
    labels, more = dict(group), {}
    for name, step in start.items():
        labels[name] = f'{group[name]}_later_{places[step]}'
        more[labels[name]] = factory.from_step(laws[group[name]], step)
    used = set(labels.values())
    return {label: law for label, law in {**laws, **more}.items() if label in used}, labels


def _clip_part(config: Config) -> clipping.Part | None:
    """The parts of the gradient that `optim.clip` limits; None for the whole."""
    by = config.optim.clip_by
    if by == 'module':
        return clipping.module(build_task(config.task).additions)
    return clipping.tensor if by == 'tensor' else None


def _check_schedule_free(config: Config, settings: dict[str, Any]) -> None:
    if len(settings) > 1:
        raise UserError(
            'config: optim.group_rules: schedule_free_adamw averages all parameters, so it cannot '
            'be one of several optimizers'
        )
    if settings['schedule_free_adamw']['b1'] == 0:
        raise UserError('config: optim.b1 must be above 0 for schedule_free_adamw')
    o = config.optim
    for key in ('weight_decay_end', *(f'freeze_{unit}' for unit in UNITS)):
        if o[key] is not None:
            raise UserError(
                f'config: optim.{key} is a schedule, which schedule_free_adamw does without: its '
                'average is of all steps since the first'
            )
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
    if section.name in ('cosine', 'linear', *schedules.COSINES):
        more['end'] = section.end
    elif section.name == 'step':
        more['end'] = section.end
        more['drop_steps'] = in_steps(section, 'drop', config, source, total) or 0
    elif section.name != schedules.RISING:
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
        start=section.start or 0.0,
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
