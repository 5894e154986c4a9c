"""Pooling of encoded tokens into one vector, and the classifier on top."""

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
    """Multi-head attention pooling: a learned probe attends to all tokens (arXiv 2106.04560)."""

    num_heads: int
    mlp_dim: int
    style: Style = PLAIN

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'batch tokens width'],
        mask: Bool[Array, 'batch 1 queries tokens'] | None = None,
    ) -> Float[Array, 'batch queries width']:
        """Pool the tokens into one vector, or into one per query of the mask."""
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
    """Mean of the tokens, weighted by the softmax of a learned score (CCT, arXiv 2104.05704).

    The score has no bias, unlike the paper's: a softmax is invariant to it.
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
    """Return the mean of the unmasked tokens in float32; zero if all are masked."""
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
    """Return the mean of each segment 1, 2, ... in float32; zero for empty segments."""
    member = segment[..., None] == 1 + jnp.arange(segments)[None, None]
    weight = member / jnp.maximum(member.sum(1, keepdims=True), 1)
    return jnp.einsum('bns,bnd->bsd', weight.astype(jnp.float32), x.astype(jnp.float32))


class Classifier(nn.Module):
    """Linear classifier in float32.

    It starts at zero, so that the first loss is exactly log(num_classes).
    """

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
