"""Assignments of rows to prototypes: targets of a teacher, and the cross-entropy to them.

A target is softmax(logits / temperature + offset) with one number per prototype: minus the centre
over the temperature (DINO, arXiv 2104.14294), or what Sinkhorn's iterations end with (SwAV, arXiv
2006.09882). So a teacher is known by its bottleneck rows and one vector, and no matrix of all rows
by all prototypes is kept. Everything is in float32, or in float64 where the input is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Bottleneck rows [batch, slots, width] to logits [batch, slots, prototypes].
Logits = Callable[[Array], Array]
# Logits made at once: 1 GiB over all devices.
_LOGITS = 2**28
# Below any logarithm that occurs, and no infinity, whose difference would be NaN.
_LEAST = -1e30


def _chunks(
    rows: Float[Array, 'batch slots width'],
    weight: Float[Array, 'batch slots'],
    prototypes: int,
) -> tuple[Array, Array]:
    """Slots in chunks [chunks, batch, slots of a chunk, ...], with slots of weight 0 at the end."""
    batch, slots, _ = rows.shape
    size = max(1, min(slots, _LOGITS // (batch * prototypes)))
    missing = -slots % size

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, missing), *((0, 0) for _ in x.shape[2:])))
        return jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), 1, 0)

    return cut(rows), cut(weight)


def sinkhorn(
    logits: Logits,
    rows: Float[Array, 'batch slots width'],
    weight: Float[Array, 'batch slots'],
    prototypes: int,
    temperature: Array | float,
    iterations: int = 3,
) -> Float[Array, ' prototypes']:
    """The offsets after which each prototype has an equal part of the rows.

    They are those of `iterations` of Sinkhorn-Knopp on exp(logits / temperature), prototypes
    first, as in DINOv2 (arXiv 2304.07193), without its overflow.

    Args:
      weight: 1 for rows that count, 0 for padding.
    """
    chunks = _chunks(rows, weight, prototypes)
    dtype = jnp.promote_types(rows.dtype, jnp.float32)

    def pass_over(offset: Array | None) -> Array:
        """One iteration: minus the logarithm of what each prototype has of all rows."""

        def add(carry: tuple[Array, Array], chunk: tuple[Array, Array]) -> tuple[Any, None]:
            most, total = carry
            x = logits(chunk[0]) / temperature
            if offset is not None:
                x = x - jax.nn.logsumexp(x + offset[None, None], axis=-1, keepdims=True)
            x = jnp.where(chunk[1][..., None] > 0, x, _LEAST)
            now = jnp.maximum(most, x.max((0, 1)))
            share = jnp.exp(x - now[None, None]) * chunk[1][..., None]
            return (now, total * jnp.exp(most - now) + share.sum((0, 1))), None

        start = jnp.full(prototypes, _LEAST, dtype), jnp.zeros(prototypes, dtype)
        (most, total), _ = jax.lax.scan(add, start, chunks)
        return -(most + jnp.log(total))

    offset = None
    for _ in range(iterations):
        offset = pass_over(offset)
    assert offset is not None
    return offset


class Statistics(NamedTuple):
    """What tells a collapse of a teacher.

    Attributes:
      entropy: mean entropy of the targets, in nats: log(prototypes) where they are uniform.
      entropy_of_mean: entropy of their mean: 0 where all rows want the same prototype.
      used: share of the prototypes that are the first choice of a row.
    """

    entropy: Float[Array, '']
    entropy_of_mean: Float[Array, '']
    used: Float[Array, '']


def statistics(
    logits: Logits,
    rows: Float[Array, 'batch slots width'],
    prototypes: int,
    temperature: Array | float,
    offset: Float[Array, ' prototypes'],
) -> Statistics:
    """Statistics of the targets of all rows."""
    batch, slots, _ = rows.shape
    chunks = _chunks(rows, jnp.ones((batch, slots), rows.dtype), prototypes)
    dtype = jnp.promote_types(rows.dtype, jnp.float32)

    def add(carry: tuple[Array, Array, Array], chunk: tuple[Array, Array]) -> tuple[Any, None]:
        entropy, mean, first = carry
        x = logits(chunk[0]) / temperature + offset[None, None]
        target, weight = jax.nn.softmax(x, axis=-1), chunk[1][..., None]
        each = jax.nn.logsumexp(x, axis=-1) - (target * x).sum(-1)
        is_first = (x == x.max(-1, keepdims=True)) & (weight > 0)
        return (
            entropy + (each * chunk[1]).sum(),
            mean + (target * weight).sum((0, 1)),
            first | is_first.any((0, 1)),
        ), None

    start = jnp.zeros((), dtype), jnp.zeros(prototypes, dtype), jnp.zeros(prototypes, bool)
    (entropy, mean, first), _ = jax.lax.scan(add, start, chunks)
    mean = mean / (batch * slots)
    of_mean = -(mean * jnp.log(jnp.maximum(mean, jnp.finfo(dtype).tiny))).sum()
    return Statistics(entropy / (batch * slots), of_mean, first.mean(dtype=dtype))


def cross_entropy(
    target: Float[Array, '*rows prototypes'], logits: Float[Array, '*rows prototypes']
) -> Float[Array, '*rows']:
    """-sum(target * log softmax(logits)), for targets of any sum; log softmax is not made."""
    mass = target.sum(-1)
    return mass * jax.nn.logsumexp(logits, axis=-1) - (target * logits).sum(-1)


def views_loss(
    targets: Float[Array, 'batch globals prototypes'],
    student: Float[Array, 'batch views prototypes'],
) -> Float[Array, '']:
    """Mean cross-entropy over pairs of a teacher's view and another view of the student.

    The student's first views are the teacher's, which do not learn from themselves.

    Args:
      student: logits over the student's temperature.
    """
    batch, shared, _ = targets.shape
    views = student.shape[1]
    pairs = shared * (shared - 1) + shared * (views - shared)
    of_all = targets.sum(1)
    wanted = [
        sum((targets[:, i] for i in range(shared) if i != view), jnp.zeros_like(of_all))
        if view < shared
        else of_all
        for view in range(views)
    ]
    return cross_entropy(jnp.stack(wanted, 1), student).sum() / (batch * pairs)


def patches_loss(
    targets: Float[Array, 'batch slots prototypes'],
    student: Float[Array, 'batch slots prototypes'],
    weight: Float[Array, 'batch slots'],
    views: int,
) -> Float[Array, '']:
    """iBOT's loss (arXiv 2111.07832): the mean over all views, masked or not, of the mean over
    the masked patches of each.

    Args:
      student: logits over the student's temperature.
      weight: one over the number of masked patches of the view; 0 for padding.
      views: of each example.
    """
    return (cross_entropy(targets, student) * weight).sum() / (len(targets) * views)
