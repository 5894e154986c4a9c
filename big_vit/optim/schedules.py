"""Learning rates and weight decay as functions of the step."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from big_vit.errors import UserError

# Of the step, or of as much of one as the examples seen come to.
Schedule = Callable[[Int[Array, ''] | Float[Array, ''] | int | float], Float[Array, '']]


class Counting(NamedTuple):
    """How a cosine counts its steps: where public code of one shape differs.

    The share of the warmup at step t is `(t + ahead) / (warmup - inclusive)`, and what is left of
    the cosine `(total - t - early) / (total - warmup - closed)`.

    Attributes:
      ahead: steps by which the warmup is ahead of t.
      inclusive: 1 if the last step of the warmup has the peak already.
      early: steps before `total` at which the end is reached.
      closed: 1 if the cosine has both of its ends.
    """

    ahead: int = 0
    inclusive: int = 0
    early: int = 0
    closed: int = 0


COSINES = {
    # DINO, iBOT, DINOv2: the peak comes twice, the end never.
    'cosine_dino': Counting(inclusive=1),
    # DINOv3: the last step has the end.
    'cosine_dinov3': Counting(early=1, closed=1),
    # I-JEPA: the first step is step 1.
    'cosine_ijepa': Counting(ahead=1, early=1),
}
# DINOv3's last phase: a warmup on a cosine with both ends, then the peak.
RISING = 'constant_dinov3'
NAMES = ('cosine', 'linear', 'constant', 'rsqrt', 'step', *COSINES, RISING)


def make(
    name: str,
    *,
    peak: float,
    total_steps: int | float,
    warmup_steps: int = 0,
    start: float = 0.0,
    end: float = 0.0,
    cooldown_steps: int = 0,
    timescale: int = 10_000,
    drop_steps: int = 0,
) -> Schedule:
    """Builds a linear warmup from `start * peak` to `peak`, followed by the schedule `name`.

    Args:
      name: 'cosine' or 'linear', which reach `end * peak` at `total_steps`; 'constant'; 'step',
        `peak` before step `drop_steps` and `end * peak` from it on; or
        'rsqrt', `peak * sqrt(timescale / (timescale + t))` at t steps after the warmup
        (arXiv 2106.04560). This and 'constant' ignore `end`, and so does `RISING`, whose warmup
        is half a period of a cosine. The others are `COSINES`, as public code counts them.
      peak: rate at the end of the warmup.
      total_steps: steps of the entire training.
      warmup_steps: length of the warmup, part of `total_steps`.
      start: rate at the start of the warmup as a share of `peak`.
      end: final rate as a share of `peak`.
      cooldown_steps: length of a linear decay to 0 that multiplies the rate at the end of
        training; for 'constant' and 'rsqrt'.
      timescale: steps, of 'rsqrt'.
      drop_steps: of 'step'.

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
    if name == 'step' and not (warmup_steps < drop_steps < total_steps and end):
        raise UserError(
            f"config: schedule.name='step' falls at {drop_steps} of {total_steps} steps, to "
            f'{end:g} of the peak: set schedule.drop_* between warmup and end, and schedule.end'
        )
    if timescale < 1:
        raise UserError('config: schedule.timescale_* must be above 0')
    if name in COSINES:
        counting = COSINES[name]
        return _cosine(counting, start * peak, peak, end * peak, total_steps, warmup_steps)
    if name == RISING:
        return _rising(start * peak, peak, warmup_steps)
    # optax rejects decays of 0 steps, which a run of nothing but warmup would ask for.
    remaining = max(total_steps - warmup_steps, 1)
    after = {
        'cosine': lambda: optax.cosine_decay_schedule(peak, remaining, alpha=end),
        'linear': lambda: optax.linear_schedule(peak, end * peak, remaining),
        'constant': lambda: optax.constant_schedule(peak),
        'step': lambda: lambda t: jnp.where(t < drop_steps - warmup_steps, peak, end * peak),
        'rsqrt': lambda: lambda t: peak * jnp.sqrt(timescale / (timescale + t)),
    }[name]()
    warmup = optax.linear_schedule(start * peak, peak, max(warmup_steps, 1))
    joined = optax.join_schedules([warmup, after], [warmup_steps])

    def schedule(step: Int[Array, ''] | Float[Array, ''] | int | float) -> Float[Array, '']:
        rate = jnp.asarray(joined(step), jnp.float32)
        if cooldown_steps:
            rate = rate * jnp.clip((total_steps - step) / cooldown_steps, 0.0, 1.0)
        return rate

    return schedule


def weight_decay(name: str, start: float, end: float, total_steps: int | float) -> Schedule:
    """Weight decay on a cosine from `start` to `end` over the whole training.

    Args:
      name: of the learning rate's schedule: the cosine counts steps as it does. As DINO's where
        that says nothing of it.
    """
    return _cosine(COSINES.get(name, COSINES['cosine_dino']), start, start, end, total_steps, 0)


def _exact(schedule: Callable[[Any], Any]) -> Schedule:
    """Computes a schedule in float64 and rounds its value to float32.

    In float32 a cosine is wrong in the fifth digit where it ends, and steps above 2**24 are not
    even told apart. These are a few operations on scalars.
    """

    def rounded(step: Int[Array, ''] | Float[Array, ''] | int | float) -> Float[Array, '']:
        with jax.enable_x64(True):
            return schedule(jnp.asarray(step).astype(jnp.float64)).astype(jnp.float32)

    return rounded


def _squared_sine(share: Any) -> Any:
    """Half a period of a cosine, from 0 to 1: (1 - cos(pi * share)) / 2 without cancellation."""
    return jnp.square(jnp.sin(math.pi / 2 * jnp.clip(share, 0.0, 1.0)))


def _cosine(
    counting: Counting, start: float, peak: float, end: float, total: int | float, warmup: int
) -> Schedule:
    ahead, inclusive, early, closed = counting

    def schedule(step: Any) -> Any:
        rising = start + (peak - start) * (step + ahead) / max(warmup - inclusive, 1)
        left = (total - step - early) / max(total - warmup - closed, 1)
        return jnp.where(step < warmup, rising, end + (peak - end) * _squared_sine(left))

    return _exact(schedule)


def _rising(start: float, peak: float, warmup: int) -> Schedule:
    def schedule(step: Any) -> Any:
        rising = start + (peak - start) * _squared_sine(step / max(warmup - 1, 1))
        return jnp.where(step < warmup, rising, peak)

    return _exact(schedule)
