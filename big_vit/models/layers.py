"""Dense, norm, attention and MLP by einsum; parameters are a plain nested dictionary.

Parameters stay in float32; `dtype` is the type of the matrix products and of
the residual stream. Statistics of the norm and the softmax are in float32.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

Dtype = Any


class Dense(nn.Module):
    """`x @ kernel + bias` over the last `len(in_axes)` axes of x.

    Attributes:
      shape: sizes of the output axes.
      in_axes: number of input axes that are contracted.
      fan: (fan_in, fan_out) of the initializer when the kernel is not one matrix.
    """

    shape: Sequence[int]
    in_axes: int = 1
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, '...']) -> Float[Array, '...']:
        inputs, outputs = x.shape[x.ndim - self.in_axes :], tuple(self.shape)

        def init(key: Array, shape: Sequence[int]) -> Array:
            # Fans are those of the flattened matrix, as in the papers, not of the last two axes.
            matrix = (_product(inputs), _product(outputs))
            return self.kernel_init(key, matrix, jnp.float32).reshape(shape)

        kernel = self.param('kernel', init, (*inputs, *outputs))
        bias = self.param('bias', self.bias_init, outputs)
        axes = tuple(range(self.in_axes))
        y = jax.lax.dot_general(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            ((tuple(range(x.ndim - self.in_axes, x.ndim)), axes), ((), ())),
        )
        lead = (1,) * (y.ndim - len(outputs))
        return y + bias.astype(self.dtype).reshape(lead + outputs)


def _product(sizes: Sequence[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis (arXiv 1607.06450), statistics in float32."""

    epsilon: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, '*batch width']) -> Float[Array, '*batch width']:
        scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
        bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        mean = wide.mean(-1, keepdims=True)
        variance = jnp.square(wide - mean).mean(-1, keepdims=True)
        lead = (1,) * (x.ndim - 1)
        y = (wide - mean) * jax.lax.rsqrt(variance + self.epsilon)
        return (y * scale.reshape(*lead, -1) + bias.reshape(*lead, -1)).astype(self.dtype)


class Attention(nn.Module):
    """Multi-head attention of `x` over `context` (over itself by default; arXiv 1706.03762)."""

    num_heads: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'batch queries width'],
        context: Float[Array, 'batch keys width'] | None = None,
    ) -> Float[Array, 'batch queries width']:
        context = x if context is None else context
        width = x.shape[-1]
        heads = (self.num_heads, width // self.num_heads)
        query = checkpoint_name(Dense(heads, dtype=self.dtype, name='query')(x), 'qkv')
        key = checkpoint_name(Dense(heads, dtype=self.dtype, name='key')(context), 'qkv')
        value = checkpoint_name(Dense(heads, dtype=self.dtype, name='value')(context), 'qkv')
        mixed = jax.nn.dot_product_attention(query, key, value)
        return Dense((width,), in_axes=2, dtype=self.dtype, name='out')(mixed)


class Mlp(nn.Module):
    """Dense, GELU (tanh form), Dense."""

    hidden: int
    dropout: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch tokens width'], deterministic: bool = True
    ) -> Float[Array, 'batch tokens width']:
        bias_init = nn.initializers.normal(1e-6)
        hidden = Dense((self.hidden,), bias_init=bias_init, dtype=self.dtype, name='Dense_0')(x)
        hidden = nn.Dropout(self.dropout)(nn.gelu(hidden), deterministic)
        width = (x.shape[-1],)
        return Dense(width, bias_init=bias_init, dtype=self.dtype, name='Dense_1')(hidden)
