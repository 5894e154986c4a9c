"""The head of self-distillation: an MLP onto the unit sphere, and prototypes there.

From DINO (arXiv 2104.14294): three layers to a narrow bottleneck, whose rows are normalised, and
one logit for each of many prototypes. Between the two lies the only thing worth keeping of a
teacher's output: rows of a few hundred numbers instead of logits of a hundred thousand.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from big_vit.models.layers import ACTIVATIONS, PLAIN, Dense, Style

NORMS = ('learned', 'fixed', 'none')


def unit(x: Float[Array, '*rows width'], epsilon: float = 1e-12) -> Float[Array, '*rows width']:
    """Return rows of length 1, in float32 or wider."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squared = jnp.square(x).sum(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, epsilon**2))


class Prototypes(nn.Module):
    """Logits of rows: their products with `count` vectors, in float32.

    Attributes:
      norm: 'fixed' makes the vectors as long as 1, 'learned' gives each a length of its own
        (weight normalisation, arXiv 1602.07868), 'none' leaves them as they are.
    """

    count: int
    norm: str = 'learned'
    style: Style = PLAIN

    @nn.compact
    def __call__(self, rows: Float[Array, '*rows width']) -> Float[Array, '*rows prototypes']:
        width = rows.shape[-1]
        # With a norm only directions matter at first, but decay and Adam see the lengths too:
        # those of torch's linear layers, with which the published weights were trained.
        start = (
            nn.initializers.truncated_normal(0.02)
            if self.norm == 'none'
            else lambda key, shape: (
                jax.random.uniform(key, shape, minval=-1, maxval=1) / shape[0] ** 0.5
            )
        )
        kernel = jnp.asarray(self.param('kernel', start, (width, self.count)))
        if self.norm != 'none':
            kernel = kernel * jax.lax.rsqrt(jnp.square(kernel).sum(0, keepdims=True))
        if self.norm == 'learned':
            scale = jnp.asarray(self.param('scale', nn.initializers.ones, (self.count,)))
            kernel = kernel * scale[None]

        def product(x: Array, kernel: Array) -> Array:
            wide = jnp.promote_types(x.dtype, jnp.float32)
            return jax.lax.dot_general(
                x, kernel, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=wide
            )

        name = '/'.join((*self.path, 'kernel'))
        dtype = self.style.dtype
        return self.style.gather(name, product, rows.astype(dtype), kernel.astype(dtype))


class PrototypeHead(nn.Module):
    """Features as rows of length 1 (`project`), and these as logits of prototypes (`logits`).

    Attributes:
      count: number of prototypes.
      bottleneck: width of the rows.
      hidden: width of the two hidden layers.
      norm: see `Prototypes`.
    """

    count: int
    bottleneck: int = 256
    hidden: int = 2048
    norm: str = 'learned'
    style: Style = PLAIN

    def setup(self) -> None:
        dense = partial(
            Dense,
            kernel_init=nn.initializers.truncated_normal(0.02),
            dtype=self.style.dtype,
            gather=self.style.gather,
        )
        self.mlp = [dense((n,)) for n in (self.hidden, self.hidden, self.bottleneck)]
        self.prototypes = Prototypes(self.count, self.norm, self.style)

    def project(self, x: Float[Array, '*rows features']) -> Float[Array, '*rows bottleneck']:
        """Rows of length 1, in float32."""
        gelu = ACTIVATIONS['gelu']
        first, second, last = self.mlp
        return unit(last(gelu(second(gelu(first(x))))))

    def logits(self, rows: Float[Array, '*rows bottleneck']) -> Float[Array, '*rows prototypes']:
        """The product of each row with each prototype, in float32."""
        return self.prototypes(rows)

    def __call__(self, x: Float[Array, '*rows features']) -> Float[Array, '*rows prototypes']:
        return self.logits(self.project(x))
