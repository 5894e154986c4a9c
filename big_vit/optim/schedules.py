"""Learning rates as functions of the step."""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from big_vit.errors import UserError

Schedule = Callable[[Int[Array, ''] | int], Float[Array, '']]


def make(
    name: str,
    *,
    peak: float,
    total_steps: int,
    warmup_steps: int = 0,
    end: float = 0.0,
    cooldown_steps: int = 0,
    timescale: int = 10_000,
) -> Schedule:
    """Linear warmup from 0 to `peak`, then `name`.

    Args:
      name: 'cosine' or 'linear', which reach `end * peak` at `total_steps`; 'constant'; or
        'rsqrt', `peak * sqrt(timescale / (timescale + t))` at t steps after the warmup
        (arXiv 2106.04560). The last two do not read `end`.
      cooldown_steps: so long before `total_steps` the rate begins to fall: it is multiplied
        by what rests of them, down to 0. For 'constant' and 'rsqrt'.

    Raises:
      UserError: warmup and cooldown are longer than the training, or `timescale` is 0.
    """
    if warmup_steps + cooldown_steps > total_steps:
        what, verb = 'schedule.warmup_*', 'comes'
        if cooldown_steps:
            what, verb = 'schedule.warmup_* and cooldown_*', 'come'
        raise UserError(
            f'config: {what} {verb} to {warmup_steps + cooldown_steps} steps, '
            f'more than the {total_steps} of the whole training'
        )
    if timescale < 1:
        raise UserError('config: schedule.timescale_* must be above 0')
    rest = max(total_steps - warmup_steps, 1)
    after = {
        'cosine': lambda: optax.cosine_decay_schedule(peak, rest, alpha=end),
        'linear': lambda: optax.linear_schedule(peak, end * peak, rest),
        'constant': lambda: optax.constant_schedule(peak),
        'rsqrt': lambda: lambda t: peak * jnp.sqrt(timescale / (timescale + t)),
    }[name]()
    warmup = optax.linear_schedule(0.0, peak, max(warmup_steps, 1))
    joined = optax.join_schedules([warmup, after], [warmup_steps])

    def schedule(step: Int[Array, ''] | int) -> Float[Array, '']:
        rate = jnp.asarray(joined(step), jnp.float32)
        if cooldown_steps:
            rate = rate * jnp.clip((total_steps - step) / cooldown_steps, 0.0, 1.0)
        return rate

    return schedule
