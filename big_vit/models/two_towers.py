"""Two streams that go alone through one encoder into a space where they are compared."""

import math
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from big_vit.models import heads
from big_vit.models.encoder import Encoder, EncoderConfig
from big_vit.models.fusion import StreamTokens
from big_vit.models.layers import AttentionContext, Dense
from big_vit.models.tokenizers import Stream, grid_of

# CLIP's upper bound on the scale of its logits.
MOST_SCALE = 100.0


class TwoTowers(nn.Module):
    """Embeddings of two streams, and how alike each pair of a batch is.

    Both towers share one encoder, behind blocks that a stream may have of its own.

    Attributes:
      streams: the two inputs; features are those of the first.
      pool: 'gap' (mean of tokens) or 'map' (attention).
      embedding_dim: dimension of the shared embedding.
      logit_scale: initial factor on cosines; without `logit_bias` it stays below `MOST_SCALE`
        (CLIP, arXiv 2103.00020).
      logit_bias: initial value of what is added to them (SigLIP, arXiv 2303.15343); None has none.
    """

    streams: tuple[Stream, Stream]
    encoder: EncoderConfig
    embedding_dim: int
    pool: str = 'gap'
    logit_scale: float = 10.0
    logit_bias: float | None = None

    def sequence_length(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Tokens in the encoder of both towers, for inputs of these shapes without the batch."""
        return sum(math.prod(grid_of(s, shapes[s.reads])) for s in self.streams)

    @nn.compact
    def __call__(
        self, inputs: Float[Array, '...'] | dict[str, Array], *, train: bool = False
    ) -> tuple[Float[Array, '...'], dict[str, Array]]:
        """Logits [batch, batch], of the first stream's examples by the second's, and embeddings.

        Each embedding [batch, embedding_dim] is under its stream's name; 'tokens' and
        'pre_logits' are of the first stream that is given. With one stream alone, its embedding
        takes the place of the logits.
        """
        parts = inputs if isinstance(inputs, dict) else {self.streams[0].reads: inputs}
        encoder = Encoder(self.encoder, name='Transformer')
        pool = None
        if self.pool == 'map':
            pool = heads.MapPool(
                self.encoder.num_heads, self.encoder.mlp_dim, self.encoder.style, name='MAPHead_0'
            )
        extra: dict[str, Array] = {}
        embeddings = []
        for stream in self.streams:
            if stream.reads not in parts:
                continue
            tokens, pooled = self._pooled(stream, encoder, pool, parts, not train)
            dense = Dense(
                (self.embedding_dim,),
                dtype=jnp.float32,
                gather=self.encoder.style.gather,
                name=f'shared_{stream.name}',
            )
            embedding = dense(pooled)
            length = jnp.sqrt(jnp.square(embedding).sum(-1, keepdims=True) + 1e-12)
            embeddings.append(embedding / length)
            extra = {'tokens': tokens, 'pre_logits': pooled, **extra, stream.name: embeddings[-1]}
        return self._logits(embeddings), extra

    def _pooled(
        self,
        stream: Stream,
        encoder: Encoder,
        pool: heads.MapPool | None,
        parts: dict[str, Array],
        deterministic: bool,
    ) -> tuple[Float[Array, 'batch tokens width'], Float[Array, 'batch width']]:
        tokens = StreamTokens(stream, self.encoder, name=stream.name)(parts, deterministic)
        mask = None if tokens.mask is None else tokens.mask[:, None, None]
        dropout = nn.Dropout(self.encoder.style.dropout)
        x = self.encoder.constrain(dropout(tokens.x, deterministic))
        x, _ = encoder(x, deterministic, AttentionContext(rotation=tokens.rotation, mask=mask))
        if pool is None:
            return x, heads.mean_pool(x, tokens.mask)
        return x, pool(x, mask)[:, 0].astype(jnp.float32)

    def _logits(self, embeddings: Sequence[Array]) -> Float[Array, '...']:
        start = nn.initializers.constant(math.log(self.logit_scale))
        scale, bias = jnp.asarray(self.param('logit_scale', start, ())), jnp.zeros(())
        if self.logit_bias is None:
            scale = jnp.minimum(scale, math.log(MOST_SCALE))
        else:
            start = nn.initializers.constant(self.logit_bias)
            bias = jnp.asarray(self.param('logit_bias', start, ()))
        if len(embeddings) < 2:
            return embeddings[0]
        return jnp.exp(scale) * (embeddings[0] @ embeddings[1].T) + bias
