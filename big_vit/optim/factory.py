"""Optimizers as optax chains: clip, then a law of updates with the rates of each parameter.

A law is a function of `Rules` that gives the parts of a chain from the clipped gradient to
the update. `LAWS` has a function for each optimizer: its arguments are the config keys that
it reads, and their defaults its own. A new optimizer whose decay is decoupled is one function
that ends in `decoupled(scaler)`, and its name in `LAWS` and in the schema.
"""

import inspect
from collections.abc import Callable
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
    """The rate, by parameter path the decay and the factor on the rate, and the mesh if any."""

    schedule: Schedule
    decay: dict[str, float]
    rate: dict[str, Factor]
    mesh: Mesh | None = None


Law = Callable[[Rules], list[optax.GradientTransformation]]


def scale_by_factors(factors: dict[str, Factor]) -> optax.GradientTransformation:
    """Multiplies each update by the factor of its path, or by those of its scanned layers."""

    def scale(name: str, update: jax.Array) -> jax.Array:
        factor = factors[name]
        if isinstance(factor, tuple):
            by_layer = np.asarray(factor, np.float32)
            return update * by_layer.reshape(-1, *[1] * (update.ndim - 1))
        return update if factor == 1.0 else update * factor

    return optax.stateless(lambda updates, _: trees.map_with_name(scale, updates))


def add_decayed_weights(factors: dict[str, float]) -> optax.GradientTransformation:
    """Adds `factor * parameter` to each update.

    Behind a scaler that is decoupled decay (arXiv 1711.05101), in front of it L2.
    """

    def add(name: str, update: jax.Array, param: jax.Array) -> jax.Array:
        return update + factors[name] * param if factors[name] else update

    return optax.stateless(lambda updates, params: trees.map_with_name(add, updates, params))


def scale_by_rate(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    """Multiplies by `-schedule(step)`, where the step is an argument of `update`.

    The step is the run's own, so that a skipped update does not shift the schedule.
    """

    def update(updates: Any, state: Any, params: Any = None, *, step: jax.Array, **_: Any):
        rate = schedule(step)
        return jax.tree.map(lambda u: -rate * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def _rated(rules: Rules) -> list[optax.GradientTransformation]:
    return [scale_by_factors(rules.rate), scale_by_rate(rules.schedule)]


def decoupled(scaler: optax.GradientTransformation) -> Law:
    """The usual law: a scaler such as `optax.scale_by_adam()`, then decay, then the rate."""
    return lambda rules: [scaler, add_decayed_weights(rules.decay), *_rated(rules)]


# One function for each optimizer. Paper, state and keys of each are in docs/optimizers.md.


def sgd(momentum: float = 0.9, nesterov: bool = False, mu_dtype: str = 'float32') -> Law:
    """The gradient, or its heavy-ball or Nesterov accumulation."""
    if not momentum:
        return decoupled(optax.identity())
    return decoupled(optax.trace(momentum, nesterov, accumulator_dtype=jnp.dtype(mu_dtype)))


def adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, mu_dtype: str = 'float32') -> Law:
    """Adam (arXiv 1412.6980); its decay is L2, in the gradient that is scaled."""
    scaler = optax.scale_by_adam(b1, b2, eps, mu_dtype=jnp.dtype(mu_dtype))
    return lambda rules: [add_decayed_weights(rules.decay), scaler, *_rated(rules)]


def adamw(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, mu_dtype: str = 'float32') -> Law:
    """Adam with decoupled decay (arXiv 1711.05101)."""
    return decoupled(optax.scale_by_adam(b1, b2, eps, mu_dtype=jnp.dtype(mu_dtype)))


def nadamw(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, mu_dtype: str = 'float32') -> Law:
    """AdamW with Nesterov momentum (Dozat 2016)."""
    dtype = jnp.dtype(mu_dtype)
    return decoupled(optax.scale_by_adam(b1, b2, eps, mu_dtype=dtype, nesterov=True))


def adafactor() -> Law:
    """Adafactor (arXiv 1804.04235) without momentum, with the constants of optax.

    Updates are limited to a root mean square of 1 for each parameter, and multiplied by that
    of the parameter: the rate is relative to the size of the weights.
    """
    return decoupled(
        optax.chain(
            factored_rms.scale_by_factored_rms(128),
            per_layer.alone(optax.clip_by_block_rms(1.0)),
            per_layer.alone(optax.scale_by_param_block_rms()),
        )
    )


def adafactor_vit(b1: float = 0.9, b2: float = 0.999, mu_dtype: str = 'bfloat16') -> Law:
    """The Adafactor of arXiv 2106.04560: momentum, no clipping, rates that are not relative.

    The average of updates is not corrected for its start at 0, as in big_vision.
    """
    second = factored_rms.scale_by_factored_rms(32, cap=b2)
    first = optax.ema(b1, debias=False, accumulator_dtype=jnp.dtype(mu_dtype))
    return decoupled(optax.chain(second, first))


def lars(momentum: float = 0.9, nesterov: bool = False, mu_dtype: str = 'float32') -> Law:
    """LARS (arXiv 1708.03888): momentum accumulates what the rate has multiplied."""
    last = optax.trace(momentum, nesterov, accumulator_dtype=jnp.dtype(mu_dtype))
    return lambda rules: [lars_lamb.scale_by_lars_ratio(rules.decay), *_rated(rules), last]


def lamb(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6, mu_dtype: str = 'float32') -> Law:
    """LAMB (arXiv 1904.00962)."""
    scaler = optax.scale_by_adam(b1, b2, eps, mu_dtype=jnp.dtype(mu_dtype))
    return lambda rules: [
        scaler,
        add_decayed_weights(rules.decay),
        lars_lamb.scale_by_lamb_ratio(),
        *_rated(rules),
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
    """Muon on hidden matrices, AdamW on the rest, both with one rate (arXiv 2502.16982).

    The orthogonalised momentum is multiplied by 0.2 * sqrt(larger side), which makes it as
    large as an update of AdamW.
    """

    def dimensions(params: Any) -> Any:
        def of(name: str, x: jax.Array) -> contrib.MuonDimensionNumbers:
            found = matrices.matrix(name, x.ndim)
            assert found is not None
            middle = found.stack + found.inputs
            return contrib.MuonDimensionNumbers(
                tuple(range(found.stack, middle)), tuple(range(middle, x.ndim))
            )

        return trees.map_with_name(of, params)

    def resize(name: str, update: jax.Array) -> jax.Array:
        found = matrices.matrix(name, update.ndim)
        assert found is not None
        rows = int(np.prod(update.shape[found.stack : found.stack + found.inputs]))
        columns = int(np.prod(update.shape[found.stack + found.inputs :]))
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
    """Schedule-free AdamW (arXiv 2405.15682); b1 is the share of the average in y."""
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
    """Shampoo with the lengths of Adam (arXiv 1802.09568, 2309.06497), Adam on the rest."""
    options = _typed(locals())
    _refuse(shampoo.check(shampoo.Options(**options)))
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
    options = _typed(locals())
    _refuse(blocks.check(block, every, groups, options['stats_dtype']))
    return lambda rules: decoupled(soap.scale_by_soap(rules.mesh, **options))(rules)


def _typed(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: jnp.dtype(v) if k.endswith('dtype') else v for k, v in settings.items()}


def _refuse(wrong: list[tuple[str, str]]) -> None:
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
    """The config keys that an optimizer reads, with its own defaults."""
    parameters = inspect.signature(LAWS[name]).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters}


# What is made of it.


def grouped(laws: dict[str, Law], groups: dict[str, str]) -> Law:
    """A law for each group of parameters.

    Args:
      laws: by name of the group.
      groups: name of the group by parameter path.
    """

    def labels(params: Any) -> Any:
        return trees.map_with_name(lambda name, _: groups[name], params)

    def law(rules: Rules) -> list[optax.GradientTransformation]:
        chains = {name: optax.chain(*one(rules)) for name, one in laws.items()}
        return [optax.partition(chains, labels)]

    return law


def _still(rules: Rules) -> list[optax.GradientTransformation]:
    """The law of what is frozen."""
    # -0.0 is what changes no bit when added; 0.0 makes 0.0 of -0.0.
    return [
        optax.stateless(lambda updates, _: jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates))
    ]


def health(state: Any) -> dict[str, jax.Array]:
    """What an optimizer tells of itself, for the metrics of a step; nothing of most."""
    found = {
        name.rpartition('health/')[2]: leaf
        for name, leaf in trees.flatten(state).items()
        if '/health/' in name
    }
    return {f'optim_{name}': leaf for name, leaf in found.items()}


def frozen(lr_factors: dict[str, Factor]) -> frozenset[str]:
    """The paths that never move: their factor is 0, for all layers."""
    return frozenset(name for name, factor in lr_factors.items() if not np.any(factor))


def make(
    law: Law,
    schedule: Schedule,
    *,
    decay_factors: dict[str, float],
    lr_factors: dict[str, Factor],
    clip: float = 0.0,
    agc: float = 0.0,
    mesh: Mesh | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The whole optimizer.

    Args:
      law: one of `LAWS`, called with its settings, or several `grouped`.
      decay_factors: weight decay by parameter path, multiplied by the rate.
      lr_factors: factor on the rate by parameter path. What has 0 is frozen: it has no
        state, and its gradient does not count in the norm that is clipped.
      clip: largest global norm of the gradient; 0 is off.
      agc: largest share of the weights' norm that a unit's gradient may have, before `clip`;
        0 is off.
      mesh: over which Shampoo and SOAP spread their blocks.

    Returns:
      A transformation whose `update` takes the keyword `step`.
    """

    def moving(rules: Rules) -> list[optax.GradientTransformation]:
        limits = [clipping.adaptive(agc)] if agc else []
        limits += [clipping.by_global_norm(clip)] if clip else []
        return [optax.chain(*limits) if limits else optax.identity(), *law(rules)]

    still = frozen(lr_factors)
    whole: Law = moving
    if still:
        groups = {name: 'frozen' if name in still else 'moving' for name in lr_factors}
        whole = grouped({'moving': moving, 'frozen': _still}, groups)
    parts = whole(Rules(schedule, decay_factors, lr_factors, mesh))
    return optax.with_extra_args_support(optax.chain(*parts))
