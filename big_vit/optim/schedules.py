"""Learning rates as functions of the step."""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from big_vit.errors import UserError

# Of the step, or of as much of one as the examples seen come to.
Schedule = Callable[[Int[Array, ''] | Float[Array, ''] | int | float], Float[Array, '']]


def make(
    name: str,
    *,
    peak: float,
    total_steps: int | float,
    warmup_steps: int = 0,
    end: float = 0.0,
    cooldown_steps: int = 0,
    timescale: int = 10_000,
) -> Schedule:
    """Builds a linear warmup from 0 to `peak`, followed by the schedule `name`.

    Args:
      name: 'cosine' or 'linear', which reach `end * peak` at `total_steps`; 'constant'; or
        'rsqrt', `peak * sqrt(timescale / (timescale + t))` at t steps after the warmup
        (arXiv 2106.04560). The last two ignore `end`.
      peak: rate at the end of the warmup.
      total_steps: steps of the entire training.
      warmup_steps: length of the warmup, part of `total_steps`.
      end: final rate as a share of `peak`.
      cooldown_steps: length of a linear decay to 0 that multiplies the rate at the end of
        training; for 'constant' and 'rsqrt'.
      timescale: steps, of 'rsqrt'.

    Returns:
      A function from the step to the rate, a float32 scalar.

    Raises:
      UserError: warmup and cooldown are longer than the training, or `timescale` is below 1.
    """
    if warmup_steps + cooldown_steps > total_steps:
        keys, verb = 'schedule.warmup_*', 'comes'
        if cooldown_steps:
            keys, verb = 'schedule.warmup_* and cooldown_*', 'come'
        raise UserError(
            f'config: {keys} {verb} to {warmup_steps + cooldown_steps} steps, '
            f'more than the {total_steps} of the whole training'
        )
    if timescale < 1:
        raise UserError('config: schedule.timescale_* must be above 0')
    # optax rejects decays of 0 steps, which a run of nothing but warmup would ask for.
    remaining = max(total_steps - warmup_steps, 1)
    after = {
        'cosine': lambda: optax.cosine_decay_schedule(peak, remaining, alpha=end),
        'linear': lambda: optax.linear_schedule(peak, end * peak, remaining),
        'constant': lambda: optax.constant_schedule(peak),
        'rsqrt': lambda: lambda t: peak * jnp.sqrt(timescale / (timescale + t)),
    }[name]()
    warmup = optax.linear_schedule(0.0, peak, max(warmup_steps, 1))
    joined = optax.join_schedules([warmup, after], [warmup_steps])

    def schedule(step: Int[Array, ''] | Float[Array, ''] | int | float) -> Float[Array, '']:
        rate = jnp.asarray(joined(step), jnp.float32)
        if cooldown_steps:
            rate = rate * jnp.clip((total_steps - step) / cooldown_steps, 0.0, 1.0)
        return rate

    return schedule
