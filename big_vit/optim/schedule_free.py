"""Schedule-free learning (arXiv 2405.15682): weight averaging in place of a schedule."""

from typing import Any

import jax
import optax
from optax import contrib

from big_vit import trees
from big_vit.optim.schedules import Schedule


def wrap(
    base: optax.GradientTransformation, schedule: Schedule, b1: float
) -> optax.GradientTransformationExtraArgs:
    """Wraps `base`: gradients at y, steps on z, and an average x to evaluate.

    y, the interpolation between z and x by `b1`, is what the run calls its parameters; z is in
    the optimizer state. The rate, which also weights the average, is that of the run's own step
    instead of optax's update count, so a skipped update does not shift it.
    """

    def update(updates: Any, state: Any, params: Any = None, *, step: jax.Array, **_: Any):
        # Rebuilt with the current rate: the wrapper takes a number, and has no state of its own.
        inner = contrib.schedule_free(base, schedule(step), b1)
        return inner.update(updates, state, params, step=step)

    init = contrib.schedule_free(base, 0.0, b1).init
    return optax.GradientTransformationExtraArgs(init, update)


def evaluation_weights(opt: Any, params: Any) -> Any:
    """Computes the averaged weights x, to be used for evaluation.

    Args:
      opt: optimizer state.
      params: the parameters y that go with it. Frozen parameters have no z, and are their own
        average.

    Returns:
      The averages, or None if the optimizer is not schedule-free.
    """

    def is_state(node: Any) -> bool:
        return isinstance(node, contrib.ScheduleFreeState)

    states = [node for node in jax.tree.leaves(opt, is_leaf=is_state) if is_state(node)]
    if not states:
        return None
    z, b1 = trees.flatten(states[0].z), states[0].b1

    def x(name: str, y: jax.Array) -> jax.Array:
        return (y - (1.0 - b1) * z[name]) / b1 if name in z else y

    return trees.map_with_name(x, params)
