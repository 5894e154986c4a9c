"""From encoded tokens to one vector, and from that to logits."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from big_vit.models.layers import Attention, Dtype, Gather, LayerNorm, Mlp, ungathered


class MapPool(nn.Module):
    """Multi-head attention pooling: one learned probe attends to all tokens (arXiv 2106.04560)."""

    num_heads: int
    mlp_dim: int
    dtype: Dtype = jnp.float32
    gather: Gather = ungathered

    @nn.compact
    def __call__(self, x: Float[Array, 'batch tokens width']) -> Float[Array, 'batch width']:
        batch, _, width = x.shape
        probe = self.param('probe', nn.initializers.xavier_uniform(), (1, 1, width))
        probe = jnp.broadcast_to(probe.astype(self.dtype), (batch, 1, width))
        name = 'MultiHeadDotProductAttention_0'
        y = Attention(self.num_heads, self.dtype, self.gather, name=name)(probe, x)
        z = LayerNorm(dtype=self.dtype, name='LayerNorm_0')(y)
        mlp = Mlp(self.mlp_dim, dtype=self.dtype, gather=self.gather, name='MlpBlock_0')
        y = y + mlp(z)
        return y[:, 0]


class Classifier(nn.Module):
    """Linear logits in float32. Zero at the start: the first loss is log(num_classes) exactly."""

    num_classes: int
    gather: Gather = ungathered

    @nn.compact
    def __call__(self, x: Float[Array, 'batch width']) -> Float[Array, 'batch classes']:
        kernel = self.param('kernel', nn.initializers.zeros, (x.shape[-1], self.num_classes))
        bias = self.param('bias', nn.initializers.zeros, (self.num_classes,))
        y = self.gather('head/kernel', jnp.matmul, x.astype(jnp.float32), kernel)
        return y + bias[None]
