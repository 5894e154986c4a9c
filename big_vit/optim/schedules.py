"""Learning rates as functions of the step."""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from big_vit.errors import UserError

Schedule = Callable[[Int[Array, ''] | int], Float[Array, '']]


def make(
    name: str, *, peak: float, total_steps: int, warmup_steps: int = 0, end: float = 0.0
) -> Schedule:
    """Linear warmup from 0 to `peak`, then `name`, reaching `end * peak` at `total_steps`.

    Args:
      name: 'cosine', 'linear' or 'constant' (which ignores `end`).

    Raises:
      UserError: the warmup is longer than the training.
    """
    if warmup_steps > total_steps:
        raise UserError(
            f'config: schedule.warmup_* comes to {warmup_steps} steps, '
            f'more than the {total_steps} of the whole training'
        )
    rest = max(total_steps - warmup_steps, 1)
    after = {
        'cosine': lambda: optax.cosine_decay_schedule(peak, rest, alpha=end),
        'linear': lambda: optax.linear_schedule(peak, end * peak, rest),
        'constant': lambda: optax.constant_schedule(peak),
    }[name]()
    warmup = optax.linear_schedule(0.0, peak, max(warmup_steps, 1))
    joined = optax.join_schedules([warmup, after], [warmup_steps])
    return lambda step: jnp.asarray(joined(step), jnp.float32)
