"""Optimizers as one optax chain: clip, scale, decay, rules, learning rate."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from big_vit import trees
from big_vit.optim.schedules import Schedule


def scale_by_factors(factors: dict[str, float]) -> optax.GradientTransformation:
    """Multiplies each update by the factor of its path; a factor of 0 freezes."""

    def scale(name: str, update: jax.Array) -> jax.Array:
        factor = factors[name]
        return update if factor == 1.0 else update * factor

    return optax.stateless(lambda updates, _: trees.map_with_name(scale, updates))


def add_decayed_weights(factors: dict[str, float]) -> optax.GradientTransformation:
    """Adds `factor * parameter` to each update (decoupled decay, arXiv 1711.05101)."""

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


def make(
    scaler: optax.GradientTransformation,
    schedule: Schedule,
    *,
    decay_factors: dict[str, float],
    lr_factors: dict[str, float],
    clip: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """The whole optimizer around a `scaler` such as `optax.scale_by_adam()`.

    Args:
      decay_factors: weight decay by parameter path, multiplied by the rate.
      lr_factors: factor on the rate by parameter path.
      clip: largest global norm of the gradient; 0 is off.

    Returns:
      A transformation whose `update` takes the keyword `step`.
    """
    parts = [
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        scaler,
        add_decayed_weights(decay_factors),
        scale_by_factors(lr_factors),
        scale_by_rate(schedule),
    ]
    return optax.with_extra_args_support(optax.chain(*parts))


def adamw_scaler(b1: float, b2: float, eps: float, mu_dtype: str) -> optax.GradientTransformation:
    """Adam's direction; the decay of AdamW is `make`'s."""
    return optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=jnp.dtype(mu_dtype))


def sgd_scaler(momentum: float, nesterov: bool, mu_dtype: str) -> optax.GradientTransformation:
    """Plain gradient, or its heavy-ball or Nesterov accumulation."""
    if not momentum:
        return optax.identity()
    return optax.trace(momentum, nesterov, accumulator_dtype=jnp.dtype(mu_dtype))
