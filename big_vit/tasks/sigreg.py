"""SIGReg of LeJEPA (arXiv 2511.08544): how far embeddings are from a standard normal distribution.

On random lines through the origin the embeddings of a batch are compared with the standard normal
by the Epps-Pulley statistic: the squared distance of the characteristic functions, weighted by a
normal and integrated.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# The integral is twice that from 0 to the last of so many knots, by trapezoids.
_KNOTS, _END = 17, 3.0


def directions(step: Array | int, width: int, count: int) -> Float[Array, 'width directions']:
    """Random unit vectors of a step, the same on all devices."""
    key = jax.random.fold_in(jax.random.key(0), step)
    drawn = jax.random.normal(key, (width, count))
    return drawn / jnp.linalg.norm(drawn, axis=0, keepdims=True)


def sigreg(
    embeddings: Float[Array, 'batch views width'], lines: Float[Array, 'width directions']
) -> Float[Array, '']:
    """The Epps-Pulley statistic of each view over the whole batch; mean of views and lines.

    It grows with the batch where embeddings are not normal, as a statistic of a test does.
    """
    t = np.linspace(0, _END, _KNOTS)
    window = np.exp(-(t**2) / 2)
    weight = np.full(_KNOTS, 2 * _END / (_KNOTS - 1))
    weight[[0, -1]] /= 2
    x = jnp.einsum('bvd,dl->bvl', embeddings, lines, precision='highest')

    def add(total: Array, knot: Array) -> tuple[Array, None]:
        t, window, weight = knot
        real = jnp.cos(t * x).mean(0) - window
        imaginary = jnp.sin(t * x).mean(0)
        return total + weight * (jnp.square(real) + jnp.square(imaginary)).mean(), None

    # One knot after the other, or all cosines of a large batch would be in memory at once.
    knots = jnp.asarray(np.stack([t, window, weight * window], axis=1), x.dtype)
    total, _ = jax.lax.scan(jax.checkpoint(add), jnp.zeros((), x.dtype), knots)
    return total * len(embeddings)
