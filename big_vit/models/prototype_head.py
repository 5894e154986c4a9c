"""The head of self-distillation: an MLP onto the unit sphere, and prototypes there.

From DINO (arXiv 2104.14294): three layers to a narrow bottleneck, whose rows are normalised, and
one logit for each of many prototypes. Between the two lies the only thing worth keeping of a
teacher's output: rows of a few hundred numbers instead of logits of a hundred thousand.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from big_vit.models.encoder import identity
from big_vit.models.layers import ACTIVATIONS, PLAIN, Dense, Dtype, Style

NORMS = ('learned', 'fixed', 'none')


def unit(x: Float[Array, '*rows width'], epsilon: float = 1e-12) -> Float[Array, '*rows width']:
    """Return rows of length 1, in float32 or wider."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squared = jnp.square(x).sum(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, epsilon**2))


def similarity(
    rows: Float[Array, '*rows width'], vectors: Float[Array, 'width prototypes']
) -> Float[Array, '*rows prototypes']:
    """Return the product of each row with each vector, summed in float32 or wider."""
    wide = jnp.promote_types(vectors.dtype, jnp.float32)
    axes = (((rows.ndim - 1,), (0,)), ((), ()))
    rows = rows.astype(vectors.dtype)
    return jax.lax.dot_general(rows, vectors, axes, preferred_element_type=wide)


class Prototypes(nn.Module):
    """Vectors that rows are compared with.

    Attributes:
      shape: (width of a row, number of vectors).
      norm: 'fixed' makes the vectors as long as 1, 'learned' gives each a length of its own
        (weight normalisation, arXiv 1602.07868), 'none' leaves them as they are.
      dtype: type of the products with rows.
      collect: what a mesh does to the vectors before a product.
    """

    shape: tuple[int, int]
    norm: str = 'learned'
    dtype: Dtype = jnp.float32
    collect: Callable[[Array], Array] = identity

    @nn.compact
    def __call__(self) -> Float[Array, 'width prototypes']:
        # With a norm only directions matter at first, but decay and Adam see the lengths too:
        # those of torch's linear layers, with which the published weights were trained.
        bound = self.shape[0] ** -0.5
        start = (
            nn.initializers.truncated_normal(0.02)
            if self.norm == 'none'
            else lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        )
        kernel = jnp.asarray(self.param('kernel', start, self.shape))
        if self.norm != 'none':
            kernel = kernel * jax.lax.rsqrt(jnp.square(kernel).sum(0, keepdims=True))
        if self.norm == 'learned':
            scale = jnp.asarray(self.param('scale', nn.initializers.ones, self.shape[1:]))
            kernel = kernel * scale[None]
        return self.collect(kernel.astype(self.dtype))


class PrototypeHead(nn.Module):
    """Features as rows of length 1 (`project`), and the logits of these.

    Attributes:
      count: number of prototypes.
      bottleneck: width of the rows.
      hidden: width of the two hidden layers.
      norm, collect: see `Prototypes`.
    """

    count: int
    bottleneck: int = 256
    hidden: int = 2048
    norm: str = 'learned'
    style: Style = PLAIN
    collect: Callable[[Array], Array] = identity

    def setup(self) -> None:
        dense = partial(
            Dense,
            kernel_init=nn.initializers.truncated_normal(0.02),
            dtype=self.style.dtype,
            gather=self.style.gather,
        )
        self.mlp = [dense((n,)) for n in (self.hidden, self.hidden, self.bottleneck)]
        shape = self.bottleneck, self.count
        self.prototypes = Prototypes(shape, self.norm, self.style.dtype, self.collect)

    def project(self, x: Float[Array, '*rows features']) -> Float[Array, '*rows bottleneck']:
        """Rows of length 1, in float32."""
        gelu = ACTIVATIONS['gelu']
        first, second, last = self.mlp
        return unit(last(gelu(second(gelu(first(x))))))

    def vectors(self) -> Float[Array, 'bottleneck prototypes']:
        """The prototypes; `similarity` makes logits of them and rows."""
        return self.prototypes()

    def __call__(self, x: Float[Array, '*rows features']) -> Float[Array, '*rows prototypes']:
        return similarity(self.project(x), self.vectors())
