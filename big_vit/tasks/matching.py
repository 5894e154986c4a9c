"""Which prediction answers for which object: the assignment of least cost, on the devices.

Bipartite matching as in DETR (arXiv 2005.12872), without gradient. `optax.assignment` solves it in
O(objects² predictions), so objects are the rows of the costs and predictions the columns.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from optax import assignment

from big_vit.models.encoder import identity
from big_vit.tasks.boxes import generalised_iou

# What a cost counts that is not finite. Of 100 objects all others cost less together (classes,
# distances and overlaps of boxes at most 25 each), and float32 still tells those apart.
UNUSABLE = 1e4


def costs(
    logits: Float[Array, 'batch queries logits'],
    boxes: Float[Array, 'batch queries 4'],
    label: Int[Array, 'batch objects'],
    objects: Float[Array, 'batch objects 4'],
    l1_weight: float,
    giou_weight: float,
) -> Float[Array, 'batch objects queries']:
    """What each prediction costs as the answer for each object.

    Less the probability of the object's class, plus the weighted L1 distance of the boxes, less
    their weighted generalised IoU. Labels below 0 are of no object: their rows mean nothing.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    index = jnp.broadcast_to(
        jnp.maximum(label, 0)[:, None], (label.shape[0], logits.shape[1], label.shape[1])
    )
    of_class = jnp.take_along_axis(probabilities, index, axis=-1).swapaxes(1, 2)
    predicted, wanted = boxes[:, None], objects[:, :, None]
    distance = jnp.abs(predicted - wanted).sum(-1)
    return l1_weight * distance - of_class - giou_weight * generalised_iou(predicted, wanted)


def assign(
    cost: Float[Array, 'batch objects queries'],
    real: Bool[Array, 'batch objects'],
    by_device: Callable[..., Any] = identity,
) -> tuple[Int[Array, 'batch objects'], Int[Array, '']]:
    """The query of each object in the assignment of least total cost.

    Args:
      cost: any numbers; those that are not finite are only taken where nothing else is left.
      real: which rows are objects. The others get queries too, which mean nothing.
      by_device: see `sharding.by_device`; without it each iteration of the solver asks all
        devices whether one of them goes on.

    Returns:
      Distinct queries of each row, and how many costs of objects were not finite.

    Raises:
      ValueError: there are more objects than queries.
    """
    objects, queries = cost.shape[1:]
    if objects > queries:
        raise ValueError(f'{objects} objects cannot be assigned to {queries} queries')
    cost = jax.lax.stop_gradient(cost.astype(jnp.float32))
    unusable = ~jnp.isfinite(cost) & real[..., None]
    cost = jnp.where(unusable, UNUSABLE, cost)
    # A constant row leaves the best assignment of the others as it is. Rows of objects come first:
    # each of the others then ends at once.
    cost = jnp.where(real[..., None], cost, 0)
    order = jnp.argsort(~real, axis=1, stable=True)

    def one(cost: Array, order: Array) -> Array:
        rows, columns = assignment.hungarian_algorithm(cost[order])
        return jnp.zeros(objects, jnp.int32).at[order[rows]].set(columns.astype(jnp.int32))

    return by_device(jax.vmap(one))(cost, order), unusable.sum()
