"""KoLeo: features of a batch keep their distance (arXiv 1806.03198), as in DINOv2 (2304.07193)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from big_vit.models.prototype_head import unit

_EPSILON = 1e-8
# Nearer neighbours are the same picture twice, or rounding: there the gradient, one over the
# distance, would be all that the batch learns from. They push nobody.
_NEAREST = 1e-4


def koleo_loss(x: Float[Array, 'batch width'], group: int) -> Float[Array, '']:
    """Minus the mean logarithm of the distance of each row, made as long as 1, to the nearest one.

    Neighbours are sought in groups of `group` rows, those that are equal modulo batch / group: so
    the groups are the same over any mesh, and with accumulation, whose microbatches have every
    n-th row.
    """
    batch = x.shape[0]
    x = unit(x, _EPSILON).reshape(group, batch // group, -1).swapaxes(0, 1)
    fixed = jax.lax.stop_gradient(x)
    alike = jnp.einsum('nid,njd->nij', fixed, fixed, precision='highest')
    alike = jnp.where(jnp.eye(group, dtype=bool)[None], -1, alike)
    nearest = jnp.take_along_axis(x, alike.argmax(-1)[..., None], axis=1)
    squared = jnp.square(x - nearest + _EPSILON).sum(-1)
    # The maximum is inside, for the root of 0 has no derivative.
    distance = jnp.sqrt(jnp.maximum(squared, _NEAREST**2))
    return -jnp.log(distance + _EPSILON).mean()
