"""Optimizers as optax chains: clipping, then an update law with per-parameter rates.

A law maps `Rules` to the links of a chain, from the clipped gradient to the update. `LAWS` has
one function per optimizer, whose arguments are the config keys that it reads, with its own
defaults. A new optimizer with decoupled decay is one function that ends in `decoupled(scaler)`
and one line in `LAWS` (docs/development.md, "Add an optimizer").
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from optax import contrib

from big_vit import trees
from big_vit.errors import UserError
from big_vit.optim import (
    blocks,
    clipping,
    factored_rms,
    lars_lamb,
    matrices,
    per_layer,
    schedule_free,
    shampoo,
    soap,
)
from big_vit.optim.per_layer import Factor
from big_vit.optim.schedules import Schedule


class Rules(NamedTuple):
    """What a law has to know beside its own settings.

    Attributes:
      schedule: learning rate by step.
      decay: weight decay by parameter path.
      rate: factor on the rate by parameter path.
      mesh: mesh, if any.
      decay_schedule: multiplies the weight decay, by step; None for a constant decay.
      start: first step at which the parameter of a path moves; those of the others is 0.
    """

    schedule: Schedule
    decay: dict[str, float]
    rate: dict[str, Factor]
    mesh: Mesh | None = None
    decay_schedule: Schedule | None = None
    start: Mapping[str, int | float] = {}

    def decay_at(self, step: jax.Array) -> Mapping[str, float | jax.Array]:
        """Weight decay at a step by parameter path; the float 0 where there is never any."""
        if self.decay_schedule is None:
            return self.decay
        now = self.decay_schedule(step)
        return {name: factor and factor * now for name, factor in self.decay.items()}


Law = Callable[[Rules], list[optax.GradientTransformation]]


def scale_by_factors(factors: dict[str, Factor]) -> optax.GradientTransformation:
    """Multiplies each update by the factor of its path; a tuple has one per scanned layer."""

    def scale(name: str, update: jax.Array) -> jax.Array:
        factor = factors[name]
        if isinstance(factor, tuple):
            by_layer = np.asarray(factor, np.float32)
            return update * by_layer.reshape(-1, *[1] * (update.ndim - 1))
        return update if factor == 1.0 else update * factor

    return optax.stateless(lambda updates, _: trees.map_with_name(scale, updates))


def stateless(
    function: Callable[[Any, Any, jax.Array], Any],
) -> optax.GradientTransformationExtraArgs:
    """A transformation that is a function of (updates, parameters, step of the run)."""

    def update(updates: Any, state: Any, params: Any = None, *, step: jax.Array, **_: Any):
        return function(updates, params, step), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def add_decayed_weights(rules: Rules) -> optax.GradientTransformationExtraArgs:
    """Adds `decay * parameter` to each update.

    After the scaler that is decoupled decay (arXiv 1711.05101), before it L2 regularization.
    """

    def add(updates: Any, params: Any, step: jax.Array) -> Any:
        decay = rules.decay_at(step)

        def add_to(name: str, update: jax.Array, param: jax.Array) -> jax.Array:
            factor = decay[name]
            is_some = isinstance(factor, jax.Array) or factor
            return update + factor * param if is_some else update

        return trees.map_with_name(add_to, updates, params)

    return stateless(add)


def scale_by_rate(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    """Multiplies by `-schedule(step)`, where `step` is an argument of `update`.

    The step is that of the run, so a skipped update does not shift the schedule.
    """

    def scale(updates: Any, _: Any, step: jax.Array) -> Any:
        rate = schedule(step)
        return jax.tree.map(lambda u: -rate * u, updates)

    return stateless(scale)


def _hold(start: Mapping[str, int | float]) -> optax.GradientTransformationExtraArgs:
    """Takes away the updates of parameters before their first step, as a rate of 0 does."""

    def hold(updates: Any, _: Any, step: jax.Array) -> Any:
        return trees.map_with_name(
            lambda name, u: jnp.where(step >= start[name], u, -0.0) if name in start else u, updates
        )

    return stateless(hold)


def _scale_by_rates(rules: Rules) -> list[optax.GradientTransformation]:
    rates = [scale_by_factors(rules.rate), scale_by_rate(rules.schedule)]
    return [*rates, _hold(rules.start)] if rules.start else rates


def decoupled(scaler: optax.GradientTransformation) -> Law:
    """The usual law: a scaler such as `optax.scale_by_adam()`, then decay, then the rate."""
    return lambda rules: [scaler, add_decayed_weights(rules), *_scale_by_rates(rules)]


# One function per optimizer. docs/optimizers.md lists paper, state and keys of each.


def sgd(momentum: float = 0.9, nesterov: bool = False, mu_dtype: str = 'float32') -> Law:
    """SGD, plain or with heavy-ball or Nesterov momentum."""
    if not momentum:
        return decoupled(optax.identity())
    return decoupled(optax.trace(momentum, nesterov, accumulator_dtype=jnp.dtype(mu_dtype)))


def adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, mu_dtype: str = 'float32') -> Law:
    """Adam (arXiv 1412.6980); the decay is L2, added to the gradient before scaling."""
    scaler = optax.scale_by_adam(b1, b2, eps, mu_dtype=jnp.dtype(mu_dtype))
    return lambda rules: [add_decayed_weights(rules), scaler, *_scale_by_rates(rules)]


def adamw(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, mu_dtype: str = 'float32') -> Law:
    """Adam with decoupled decay (arXiv 1711.05101)."""
    return decoupled(optax.scale_by_adam(b1, b2, eps, mu_dtype=jnp.dtype(mu_dtype)))


def nadamw(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, mu_dtype: str = 'float32') -> Law:
    """AdamW with Nesterov momentum (Dozat 2016)."""
    dtype = jnp.dtype(mu_dtype)
    return decoupled(optax.scale_by_adam(b1, b2, eps, mu_dtype=dtype, nesterov=True))


def adafactor() -> Law:
    """Adafactor (arXiv 1804.04235) without momentum, with optax's constants.

    The update of each parameter is clipped to a root mean square of 1, then multiplied by that
    of the parameter: the rate is relative to the size of the weights.
    """
    return decoupled(
        optax.chain(
            factored_rms.scale_by_factored_rms(128),
            per_layer.apply_per_layer(optax.clip_by_block_rms(1.0)),
            per_layer.apply_per_layer(optax.scale_by_param_block_rms()),
        )
    )


def adafactor_vit(b1: float = 0.9, b2: float = 0.999, mu_dtype: str = 'bfloat16') -> Law:
    """The Adafactor of arXiv 2106.04560: momentum, no update clipping, absolute rates.

    The momentum is not corrected for its start at 0, as in big_vision.
    """
    second = factored_rms.scale_by_factored_rms(32, cap=b2)
    first = optax.ema(b1, debias=False, accumulator_dtype=jnp.dtype(mu_dtype))
    return decoupled(optax.chain(second, first))


def scale_by_lars_ratio(rules: Rules) -> optax.GradientTransformationExtraArgs:
    """LARS's ratio with the decay of the step."""

    def scale(updates: Any, params: Any, step: jax.Array) -> Any:
        ratio = lars_lamb.scale_by_lars_ratio(rules.decay_at(step))
        return ratio.update(updates, optax.EmptyState(), params)[0]

    return stateless(scale)


def lars(
    momentum: float = 0.9,
    nesterov: bool = False,
    mu_dtype: str = 'float32',
    rate_in_momentum: bool = True,
) -> Law:
    """LARS (arXiv 1708.03888).

    Args:
      rate_in_momentum: momentum accumulates updates already multiplied by the rate, as in the
        paper; or the rate of a step multiplies all that was accumulated (MoCo v3, MAE).
    """
    trace = optax.trace(momentum, nesterov, accumulator_dtype=jnp.dtype(mu_dtype))

    def law(rules: Rules) -> list[optax.GradientTransformation]:
        rates = _scale_by_rates(rules)
        last = [*rates, trace] if rate_in_momentum else [trace, *rates]
        return [scale_by_lars_ratio(rules), *last]

    return law


def lamb(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6, mu_dtype: str = 'float32') -> Law:
    """LAMB (arXiv 1904.00962): AdamW with a trust ratio for each layer."""
    scaler = optax.scale_by_adam(b1, b2, eps, mu_dtype=jnp.dtype(mu_dtype))
    return lambda rules: [
        scaler,
        add_decayed_weights(rules),
        lars_lamb.scale_by_lamb_ratio(),
        *_scale_by_rates(rules),
    ]


def lion(b1: float = 0.9, b2: float = 0.99, mu_dtype: str = 'float32') -> Law:
    """Lion (arXiv 2302.06675): the sign of a momentum."""
    return decoupled(optax.scale_by_lion(b1, b2, jnp.dtype(mu_dtype)))


def muon(
    momentum: float = 0.95,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    mu_dtype: str = 'float32',
) -> Law:
    """Muon for hidden matrices, AdamW for the rest, with one rate for both (arXiv 2502.16982).

    The factor 0.2 * sqrt(larger side) gives the orthogonalized momentum the size of a typical
    AdamW update, so that AdamW's rate and decay carry over.
    """

    def dimensions(params: Any) -> Any:
        def dimensions_of(name: str, x: jax.Array) -> contrib.MuonDimensionNumbers:
            axes = matrices.matrix(name, x.ndim)
            assert axes is not None
            middle = axes.stack + axes.inputs
            return contrib.MuonDimensionNumbers(
                tuple(range(axes.stack, middle)), tuple(range(middle, x.ndim))
            )

        return trees.map_with_name(dimensions_of, params)

    def resize(name: str, update: jax.Array) -> jax.Array:
        axes = matrices.matrix(name, update.ndim)
        assert axes is not None
        rows = int(np.prod(update.shape[axes.stack : axes.stack + axes.inputs]))
        columns = int(np.prod(update.shape[axes.stack + axes.inputs :]))
        return update * (0.2 * max(rows, columns) ** 0.5)

    dtype = jnp.dtype(mu_dtype)
    hidden = optax.chain(
        contrib.scale_by_muon(beta=momentum, mu_dtype=dtype, weight_dimension_numbers=dimensions),
        optax.stateless(lambda updates, _: trees.map_with_name(resize, updates)),
    )
    rest = optax.scale_by_adam(b1, b2, eps, mu_dtype=dtype)

    def labels(params: Any) -> Any:
        return trees.map_with_name(
            lambda name, x: 'muon' if matrices.is_hidden(name, x.ndim) else 'adamw', params
        )

    return decoupled(optax.partition({'muon': hidden, 'adamw': rest}, labels))


def schedule_free_adamw(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Law:
    """Schedule-free AdamW (arXiv 2405.15682); b1 is the share of the average x in y."""
    scaler = optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True)
    step = decoupled(scaler)
    return lambda rules: [schedule_free.wrap(optax.chain(*step(rules)), rules.schedule, b1)]


def shampoo_law(
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    nesterov: bool = False,
    mu_dtype: str = 'float32',
    block: int = 1024,
    every: int = 20,
    start: int = 100,
    groups: int = 1,
    sliced: bool = False,
    root: str = 'newton',
    ridge: float = 1e-6,
    exponent: float = -0.25,
    graft: str = 'adam',
    stats_dtype: str = 'float32',
    root_dtype: str = 'float32',
    gather_dtype: str = 'float32',
) -> Law:
    """Shampoo grafted to Adam's update length (arXiv 1802.09568, 2309.06497), Adam on the rest."""
    options = _parse_dtypes(locals())
    _raise_first(shampoo.check(shampoo.Options(**options)))
    return lambda rules: decoupled(shampoo.scale_by_shampoo(rules.mesh, **options))(rules)


def soap_law(
    b1: float = 0.95,
    b2: float = 0.95,
    eps: float = 1e-8,
    mu_dtype: str = 'float32',
    block: int = 1024,
    every: int = 10,
    groups: int = 1,
    stats_dtype: str = 'float32',
    root_dtype: str = 'float32',
    gather_dtype: str = 'float32',
) -> Law:
    """SOAP on matrices, Adam on the rest (arXiv 2409.11321)."""
    options = _parse_dtypes(locals())
    _raise_first(blocks.check(block, every, groups, options['stats_dtype']))
    return lambda rules: decoupled(soap.scale_by_soap(rules.mesh, **options))(rules)


def _parse_dtypes(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: jnp.dtype(v) if k.endswith('dtype') else v for k, v in settings.items()}


def _raise_first(wrong: list[tuple[str, str]]) -> None:
    for key, why in wrong:
        raise UserError(f'config: optim.{key}: {why}')


LAWS: dict[str, Callable[..., Law]] = {
    'sgd': sgd,
    'adam': adam,
    'adamw': adamw,
    'nadamw': nadamw,
    'adafactor': adafactor,
    'adafactor_vit': adafactor_vit,
    'lars': lars,
    'lamb': lamb,
    'lion': lion,
    'muon': muon,
    'schedule_free_adamw': schedule_free_adamw,
    'shampoo': shampoo_law,
    'soap': soap_law,
}


def defaults(name: str) -> dict[str, Any]:
    """Config keys that an optimizer reads, with its own defaults."""
    parameters = inspect.signature(LAWS[name]).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters}


# Assembly: laws of parameter groups, frozen parameters, clipping.


def grouped(laws: dict[str, Law], groups: dict[str, str]) -> Law:
    """Combines laws into one that applies to each parameter the law of its group.

    Args:
      laws: law by group name.
      groups: group name by parameter path.
    """

    def labels(params: Any) -> Any:
        return trees.map_with_name(lambda name, _: groups[name], params)

    def law(rules: Rules) -> list[optax.GradientTransformation]:
        chains = {name: optax.chain(*law_of_group(rules)) for name, law_of_group in laws.items()}
        return [optax.partition(chains, labels)]

    return law


def from_step(law: Law, start: int | float) -> Law:
    """The law for parameters that have no gradient before a step: no update, no moments, no count.

    A skipped gradient, as DINO has it, differs from a rate of 0 (`Rules.start`), where moments and
    counts run on.
    """

    def later(rules: Rules) -> list[optax.GradientTransformation]:
        inner = optax.with_extra_args_support(optax.chain(*law(rules)))

        def update(updates: Any, state: Any, params: Any = None, *, step: jax.Array, **_: Any):
            updates, new = inner.update(updates, state, params, step=step)
            begun = step >= start
            updates = jax.tree.map(lambda u: jnp.where(begun, u, -0.0), updates)
            return updates, jax.tree.map(lambda n, o: jnp.where(begun, n, o), new, state)

        return [optax.GradientTransformationExtraArgs(inner.init, update)]

    return later


def _freeze(rules: Rules) -> list[optax.GradientTransformation]:
    """Law of frozen parameters: an update that leaves every bit as it is."""
    # Adding -0.0 changes no bit, while 0.0 turns a weight of -0.0 into 0.0.
    return [
        optax.stateless(lambda updates, _: jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates))
    ]


def health(state: Any) -> dict[str, jax.Array]:
    """Health statistics in an optimizer's state, as step metrics; most optimizers have none."""
    stats: dict[str, jax.Array] = {}
    for path, leaf in trees.flatten(state).items():
        if '/health/' in path:
            name = f'optim_{path.rpartition("health/")[2]}'
            # Parameters that start later have a state of their own.
            combine = jnp.maximum if name == 'optim_error' else jnp.add
            stats[name] = combine(stats[name], leaf) if name in stats else leaf
    return stats


def frozen(lr_factors: dict[str, Factor]) -> frozenset[str]:
    """Paths of parameters that never move: their rate factor is 0 in every layer."""
    return frozenset(name for name, factor in lr_factors.items() if not np.any(factor))


def make(
    law: Law,
    schedule: Schedule,
    *,
    decay_factors: dict[str, float],
    lr_factors: dict[str, Factor],
    clip: float = 0.0,
    clip_part: clipping.Part | None = None,
    agc: float = 0.0,
    mesh: Mesh | None = None,
    decay_schedule: Schedule | None = None,
    start: Mapping[str, int | float] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds the complete optimizer.

    Args:
      law: an entry of `LAWS` called with its settings, or several combined by `grouped`.
      schedule: learning rate by step.
      decay_factors: weight decay by parameter path; the rate multiplies it.
      lr_factors: factor on the rate by parameter path. A factor of 0 freezes the parameter: it
        gets no optimizer state and its gradient does not count in the norm that is clipped.
      clip: largest norm of the gradient; 0 is off.
      clip_part: the part of the gradient, by path, that has a norm of its own; None for one norm.
      agc: largest norm of a unit's gradient as a share of its weights' norm, applied before
        `clip`; 0 is off.
      mesh: mesh over which Shampoo and SOAP spread their blocks.
      decay_schedule: multiplies `decay_factors`, by step.
      start: first step with a rate above 0 by parameter path, of parameters that wait.

    Returns:
      A transformation whose `update` takes the keyword argument `step`.
    """

    def moving(rules: Rules) -> list[optax.GradientTransformation]:
        limits = [clipping.adaptive(agc)] if agc else []
        if clip:
            limits.append(
                clipping.by_part(clip, clip_part) if clip_part else clipping.by_global_norm(clip)
            )
        return [optax.chain(*limits) if limits else optax.identity(), *law(rules)]

    frozen_names = frozen(lr_factors)
    complete: Law = moving
    if frozen_names:
        groups = {name: 'frozen' if name in frozen_names else 'moving' for name in lr_factors}
        complete = grouped({'moving': moving, 'frozen': _freeze}, groups)
    rules = Rules(schedule, decay_factors, lr_factors, mesh, decay_schedule, start or {})
    parts = complete(rules)
    return optax.with_extra_args_support(optax.chain(*parts))
