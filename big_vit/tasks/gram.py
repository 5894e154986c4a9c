"""Gram anchoring (DINOv3, arXiv 2508.10104): how alike patches of an image are stays as it was."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from big_vit.models.positions import Grid, interpolated
from big_vit.models.prototype_head import unit


def gram_loss(
    student: Float[Array, 'images tokens width'], teacher: Float[Array, 'images tokens width']
) -> Float[Array, '']:
    """Mean squared difference of the cosines between all pairs of patches of each image."""

    def cosines(x: Array) -> Array:
        x = unit(x)
        return jnp.einsum('bid,bjd->bij', x, x, precision='highest')

    return jnp.square(cosines(student) - cosines(teacher)).mean()


def resized(
    patches: Float[Array, 'images tokens width'], old: Grid, new: Grid
) -> Float[Array, 'images new_tokens width']:
    """Features of another grid of patches, bicubic without antialiasing, as DINOv3 resizes them."""
    if old == new:
        return patches
    return jax.vmap(lambda x: interpolated(x[None], old, new)[0])(patches)
