"""Boxes (centre x, centre y, width, height) in shares of a picture, and how they overlap."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def corners(boxes: Float[Array, '*lead 4']) -> Float[Array, '*lead 4']:
    """The same boxes as (left, top, right, bottom)."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([centre - size / 2, centre + size / 2], axis=-1)


def generalised_iou(
    boxes: Float[Array, '*#lead 4'], others: Float[Array, '*#lead 4']
) -> Float[Array, '*lead']:
    """Generalised intersection over union (arXiv 1902.09630), from -1 to 1, of pairs of boxes.

    Shapes broadcast. Where both boxes, or what encloses them, have no area it is 0 and not NaN.
    """
    a, b = corners(boxes), corners(others)
    inner = jnp.minimum(a[..., 2:], b[..., 2:]) - jnp.maximum(a[..., :2], b[..., :2])
    outer = jnp.maximum(a[..., 2:], b[..., 2:]) - jnp.minimum(a[..., :2], b[..., :2])
    shared = jnp.maximum(inner, 0).prod(-1)
    union = boxes[..., 2:].prod(-1) + others[..., 2:].prod(-1) - shared
    hull = outer.prod(-1)
    return _share(shared, union) - _share(hull - union, hull)


def _share(part: Array, whole: Array) -> Array:
    """part / whole, 0 with a derivative of 0 where there is no whole."""
    positive = whole > 0
    return jnp.where(positive, part / jnp.where(positive, whole, 1), 0)
