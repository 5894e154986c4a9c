"""From encoded tokens to one vector, and from that to logits."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from big_vit.models.layers import (
    PLAIN,
    Attention,
    AttentionContext,
    Gather,
    Mlp,
    Style,
    norm,
    ungathered,
)


class MapPool(nn.Module):
    """Multi-head attention pooling: one learned probe attends to all tokens (arXiv 2106.04560)."""

    num_heads: int
    mlp_dim: int
    style: Style = PLAIN

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'batch tokens width'],
        mask: Bool[Array, 'batch 1 queries tokens'] | None = None,
    ) -> Float[Array, 'batch queries width']:
        """One vector for each query of the mask, which says what tokens it sees; else one."""
        batch, _, width = x.shape
        queries = 1 if mask is None else mask.shape[2]
        probe = self.param('probe', nn.initializers.xavier_uniform(), (1, 1, width))
        probe = jnp.broadcast_to(probe.astype(self.style.dtype), (batch, queries, width))
        name = 'MultiHeadDotProductAttention_0'
        y, _ = Attention(self.num_heads, self.style, name=name)(
            probe, x, AttentionContext(mask=mask)
        )
        z = norm(self.style, 'LayerNorm_0')(y)
        return y + Mlp(self.mlp_dim, self.style, name='MlpBlock_0')(z)


class SequencePool(nn.Module):
    """The mean of tokens, weighted by a softmax of a learned score (CCT, arXiv 2104.05704).

    Without the paper's bias of the score, which the softmax does not see.
    """

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'batch tokens width'],
        mask: Bool[Array, 'batch tokens'] | None = None,
    ) -> Float[Array, 'batch width']:
        x = x.astype(jnp.float32)
        kernel = self.param('kernel', nn.initializers.xavier_uniform(), (x.shape[-1], 1))
        scores = jnp.matmul(x, kernel)[..., 0]
        scores = scores if mask is None else jnp.where(mask, scores, -jnp.inf)
        return jnp.einsum('bn,bnd->bd', jax.nn.softmax(scores, axis=-1), x)


def mean_pool(
    x: Float[Array, 'batch tokens width'], mask: Bool[Array, 'batch tokens'] | None = None
) -> Float[Array, 'batch width']:
    """The mean of tokens (of those that are there) in float32; of none it is zero."""
    x = x.astype(jnp.float32)
    if mask is None:
        return x.mean(axis=1)
    total = jnp.where(mask[..., None], x, 0).sum(1)
    return total / jnp.maximum(mask.sum(1, keepdims=True), 1)


def segment_pool(
    x: Float[Array, 'batch tokens width'],
    segment: Int[Array, 'batch tokens'],
    segments: int,
) -> Float[Array, 'batch segments width']:
    """The mean of the tokens of each of the segments 1, 2, ... in float32; of none it is zero."""
    own = segment[..., None] == 1 + jnp.arange(segments)[None, None]
    share = own / jnp.maximum(own.sum(1, keepdims=True), 1)
    return jnp.einsum('bns,bnd->bsd', share.astype(jnp.float32), x.astype(jnp.float32))


class Classifier(nn.Module):
    """Linear logits in float32. Zero at the start: the first loss is log(num_classes) exactly."""

    num_classes: int
    gather: Gather = ungathered
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, 'batch *segments width']) -> Float[Array, '...']:
        kernel = self.param('kernel', nn.initializers.zeros, (x.shape[-1], self.num_classes))
        name = '/'.join((*self.path, 'kernel'))
        y = self.gather(name, jnp.matmul, x.astype(jnp.float32), jnp.asarray(kernel))
        if not self.use_bias:
            return y
        bias = self.param('bias', nn.initializers.zeros, (self.num_classes,))
        return y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)
