"""Gram anchoring (DINOv3, arXiv 2508.10104): how alike patches of an image are stays as it was."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from big_vit.models.prototype_head import unit


def gram_loss(
    student: Float[Array, 'images tokens width'], teacher: Float[Array, 'images tokens width']
) -> Float[Array, '']:
    """Mean squared difference of the cosines between all pairs of patches of each image."""

    def cosines(x: Array) -> Array:
        x = unit(x)
        return jnp.einsum('bid,bjd->bij', x, x, precision='highest')

    return jnp.square(cosines(student) - cosines(teacher)).mean()
