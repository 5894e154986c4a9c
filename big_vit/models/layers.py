"""Dense, norm, attention and MLP by einsum; parameters are a plain nested dictionary.

Parameters stay in float32; `dtype` is the type of the matrix products and of
the residual stream. Statistics of the norm and the softmax are in float32.

The norm, the softmax and the GELU have their derivatives written out: the
backward pass keeps tensors of `dtype` and a few statistics for them, and makes
the float32 values in between again, where automatic differentiation keeps those.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

Dtype = Any
Product = Callable[[Array, Array], Array]
Gather = Callable[[str, Product, Array, Array], Array]


def ungathered(name: str, product: Product, x: Array, kernel: Array) -> Array:
    return product(x, kernel)


class Dense(nn.Module):
    """`x @ kernel + bias` over the last `len(in_axes)` axes of x.

    Attributes:
      shape: sizes of the output axes.
      in_axes: number of input axes that are contracted.
      gather: called as (the kernel's path, product, x, kernel) to multiply them;
        where a mesh brings the parts of a sharded kernel together.
    """

    shape: Sequence[int]
    in_axes: int = 1
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    dtype: Dtype = jnp.float32
    gather: Gather = ungathered

    @nn.compact
    def __call__(self, x: Float[Array, '...']) -> Float[Array, '...']:
        inputs, outputs = x.shape[x.ndim - self.in_axes :], tuple(self.shape)

        def init(key: Array, shape: Sequence[int]) -> Array:
            # Fans are those of the flattened matrix, as in the papers, not of the last two axes.
            matrix = (_product(inputs), _product(outputs))
            return self.kernel_init(key, matrix, jnp.float32).reshape(shape)

        kernel = self.param('kernel', init, (*inputs, *outputs))
        bias = self.param('bias', self.bias_init, outputs)

        def product(x: Array, kernel: Array) -> Array:
            last = tuple(range(x.ndim - self.in_axes, x.ndim))
            return jax.lax.dot_general(x, kernel, ((last, tuple(range(self.in_axes))), ((), ())))

        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        y = self.gather('/'.join((*self.path, 'kernel')), product, x, kernel)
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
        return layer_norm(x, jnp.asarray(scale), jnp.asarray(bias), self.epsilon, self.dtype)


def _last(x: Float[Array, ' width'], ndim: int) -> Float[Array, '...']:
    return x.reshape((1,) * (ndim - 1) + x.shape)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(
    x: Float[Array, '*batch width'],
    scale: Float[Array, ' width'],
    bias: Float[Array, ' width'],
    epsilon: float,
    dtype: Dtype,
) -> Float[Array, '*batch width']:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, computed in float32."""
    return _layer_norm_forward(x, scale, bias, epsilon, dtype)[0]


def _layer_norm_forward(x: Array, scale: Array, bias: Array, epsilon: float, dtype: Dtype):
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(wide - mean).mean(-1, keepdims=True) + epsilon)
    y = (wide - mean) * inverse * _last(scale, x.ndim) + _last(bias, x.ndim)
    return y.astype(dtype), (x, mean[..., 0], inverse[..., 0], scale)


def _layer_norm_backward(epsilon: float, dtype: Dtype, saved: tuple[Array, ...], g: Array):
    x, mean, inverse, scale = saved
    y = (x.astype(jnp.float32) - mean[..., None]) * inverse[..., None]
    g = g.astype(jnp.float32)
    batch = tuple(range(x.ndim - 1))
    d_scale, d_bias = (g * y).sum(batch), g.sum(batch)
    g = g * _last(scale, x.ndim)
    dx = g - g.mean(-1, keepdims=True) - y * (g * y).mean(-1, keepdims=True)
    return (dx * inverse[..., None]).astype(x.dtype), d_scale, d_bias


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


@jax.custom_vjp
def attend(
    query: Float[Array, 'batch queries heads features'],
    key: Float[Array, 'batch keys heads features'],
    value: Float[Array, 'batch keys heads features'],
) -> Float[Array, 'batch queries heads features']:
    """softmax(query . key / sqrt(features)) . value, with logits and softmax in float32.

    Of the arrays of size queries x keys only two are ever written to memory, in the type
    of the operands: the exponentials here, which are normalised after their product with
    the values, and the gradient of the logits in the backward pass.
    """
    return _attend_forward(query, key, value)[0]


def _logits(query: Array, key: Array) -> Float[Array, 'batch heads keys queries']:
    # Queries come last: TPUs then reduce over the keys without crossing lanes, and the
    # compiler makes maximum, exponential and sum as part of this product.
    return jnp.einsum('bqhd,bkhd->bhkq', query, key, preferred_element_type=jnp.float32)


def _per_query(x: Float[Array, 'batch heads queries']) -> Float[Array, 'batch queries heads 1']:
    return jnp.swapaxes(x, 1, 2)[..., None]


def _attend_forward(query: Array, key: Array, value: Array):
    query = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    logits = _logits(query, key)
    weights = jnp.exp(logits - logits.max(2, keepdims=True))
    total = weights.sum(2)
    weights = weights.astype(value.dtype)
    mixed = jnp.einsum('bhkq,bkhd->bqhd', weights, value, preferred_element_type=jnp.float32)
    mixed = (mixed / _per_query(total)).astype(value.dtype)
    return mixed, (query, key, value, weights, total, mixed)


def _attend_backward(saved: tuple[Array, ...], g: Array):
    query, key, value, weights, total, mixed = saved
    g = (g / _per_query(total)).astype(g.dtype)
    d_value = jnp.einsum('bhkq,bqhd->bkhd', weights, g)
    # The mean of the gradient under the weights, by way of the output (arXiv 2205.14135).
    mean = (g.astype(jnp.float32) * mixed.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    d_logits = weights.astype(jnp.float32) * (_logits(g, value) - mean[:, :, None])
    d_logits = d_logits.astype(query.dtype)
    d_query = jnp.einsum('bhkq,bkhd->bqhd', d_logits, key)
    d_query = d_query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    return d_query, jnp.einsum('bhkq,bqhd->bkhd', d_logits, query), d_value


attend.defvjp(_attend_forward, _attend_backward)


@jax.custom_vjp
def gelu(x: Float[Array, '...']) -> Float[Array, '...']:
    """The tanh form (arXiv 1606.08415)."""
    return nn.gelu(x)


def _gelu_backward(x: Array, g: Array):
    root, cubic, wide = (2 / jnp.pi) ** 0.5, 0.044715, x.astype(jnp.float32)
    tanh = jnp.tanh(root * (wide + cubic * wide**3))
    slope = 0.5 * wide * (1 - tanh**2) * root * (1 + 3 * cubic * wide**2)
    return ((g * (0.5 * (1 + tanh) + slope)).astype(x.dtype),)


gelu.defvjp(lambda x: (nn.gelu(x), x), _gelu_backward)


class Attention(nn.Module):
    """Multi-head attention of `x` over `context` (over itself by default; arXiv 1706.03762)."""

    num_heads: int
    dtype: Dtype = jnp.float32
    gather: Gather = ungathered

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'batch queries width'],
        context: Float[Array, 'batch keys width'] | None = None,
    ) -> Float[Array, 'batch queries width']:
        context = x if context is None else context
        width = x.shape[-1]
        heads = (self.num_heads, width // self.num_heads)
        dense = partial(Dense, dtype=self.dtype, gather=self.gather)
        query = checkpoint_name(dense(heads, name='query')(x), 'qkv')
        key = checkpoint_name(dense(heads, name='key')(context), 'qkv')
        value = checkpoint_name(dense(heads, name='value')(context), 'qkv')
        mixed = checkpoint_name(attend(query, key, value), 'mixed')
        return dense((width,), in_axes=2, name='out')(mixed)


class Mlp(nn.Module):
    """Dense, GELU (tanh form), Dense."""

    hidden: int
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    gather: Gather = ungathered

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch tokens width'], deterministic: bool = True
    ) -> Float[Array, 'batch tokens width']:
        dense = partial(
            Dense, bias_init=nn.initializers.normal(1e-6), dtype=self.dtype, gather=self.gather
        )
        hidden = checkpoint_name(dense((self.hidden,), name='Dense_0')(x), 'hidden')
        hidden = nn.Dropout(self.dropout)(gelu(hidden), deterministic)
        return dense((x.shape[-1],), name='Dense_1')(hidden)
