"""Schedule-free learning (arXiv 2405.15682): averages of the weights in place of a schedule."""

from typing import Any

import jax
import optax
from optax import contrib

from big_vit import trees
from big_vit.optim.schedules import Schedule


def wrap(
    base: optax.GradientTransformation, schedule: Schedule, b1: float
) -> optax.GradientTransformationExtraArgs:
    """`base`, with the gradient at y, its steps taken by z, and x the average to evaluate.

    y, between z and x by `b1`, is what the run calls its parameters; z is in the state.
    optax counts updates to know the rate that weighs the average; here it is the rate of
    the run's own step, so that a skipped update does not shift it.
    """

    def update(updates: Any, state: Any, params: Any = None, *, step: jax.Array, **_: Any):
        now = contrib.schedule_free(base, schedule(step), b1)
        return now.update(updates, state, params, step=step)

    init = contrib.schedule_free(base, 0.0, b1).init
    return optax.GradientTransformationExtraArgs(init, update)


def evaluated(opt: Any, params: Any) -> Any:
    """The weights x to evaluate; None where the optimizer is another.

    Args:
      opt: an optimizer's state, `params` the parameters that go with it. Those without a
        z, since they are frozen, are their own average.
    """

    def is_state(node: Any) -> bool:
        return isinstance(node, contrib.ScheduleFreeState)

    found = [node for node in jax.tree.leaves(opt, is_leaf=is_state) if is_state(node)]
    if not found:
        return None
    z, b1 = trees.flatten(found[0].z), found[0].b1

    def x(name: str, y: jax.Array) -> jax.Array:
        return (y - (1.0 - b1) * z[name]) / b1 if name in z else y

    return trees.map_with_name(x, params)
