"""Several streams of tokens as the input of one encoder."""

from dataclasses import replace

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from big_vit.models import tokenizers
from big_vit.models.encoder import Encoder, EncoderConfig
from big_vit.models.layers import NO_CONTEXT, Attention, AttentionContext, norm
from big_vit.models.tokenizers import Stream, Tokens


class StreamTokens(nn.Module):
    """Tokens of one of several streams: its tokenizer, positions and blocks of its own.

    The parameter `kind` is added to all of them, so that an encoder tells them from those of
    other streams.
    """

    stream: Stream
    encoder: EncoderConfig

    @nn.compact
    def __call__(self, inputs: dict[str, Array], deterministic: bool) -> Tokens:
        style, width = self.encoder.style, self.encoder.width
        tokens = tokenizers.tokenize(self, self.stream, self.encoder, inputs)
        kind = jnp.asarray(self.param('kind', nn.initializers.normal(0.02), (1, 1, width)))
        x = tokens.x + kind.astype(style.dtype)
        if self.stream.depth:
            mask = None if tokens.mask is None else tokens.mask[:, None, None]
            blocks = Encoder(replace(self.encoder, depth=self.stream.depth), name='Transformer')
            x, _ = blocks(x, deterministic, AttentionContext(tokens.rotation, mask))
        return tokens._replace(x=x)


class Fusion(nn.Module):
    """The sequence that an encoder gets from several streams, and what it may attend to.

    Attributes:
      kind: 'concat' makes one sequence of all, with 'cross' the first attends to the others, with
        'latents' learned vectors attend to all (arXiv 2103.03206).
      latents: how many there are of them.
    """

    streams: tuple[Stream, ...]
    encoder: EncoderConfig
    kind: str
    latents: int

    @nn.compact
    def __call__(
        self, inputs: dict[str, Array], deterministic: bool
    ) -> tuple[Tokens, AttentionContext]:
        streams = [
            StreamTokens(stream, self.encoder, name=stream.name)(inputs, deterministic)
            for stream in self.streams
        ]
        head_dim = self.encoder.head_dim
        if self.kind == 'cross':
            memory = concatenate(streams[1:], head_dim)
            mask = None if memory.mask is None else memory.mask[:, None, None]
            return streams[0], AttentionContext(memory=memory.x, memory_mask=mask)
        sequence = concatenate(streams, head_dim)
        if self.kind == 'concat':
            return sequence, NO_CONTEXT
        return self._latents(sequence), NO_CONTEXT

    def _latents(self, sequence: Tokens) -> Tokens:
        style, width = self.encoder.style, self.encoder.width
        latents = jnp.asarray(
            self.param('latents', nn.initializers.normal(0.02), (1, self.latents, width))
        )
        latents = jnp.broadcast_to(
            latents.astype(style.dtype), (sequence.x.shape[0], self.latents, width)
        )
        mask = None if sequence.mask is None else sequence.mask[:, None, None]
        attention = Attention(self.encoder.num_heads, style, name='CrossAttention_0')
        y, _ = attention(
            norm(style, 'LayerNorm_0')(latents),
            norm(style, 'LayerNorm_1')(sequence.x),
            AttentionContext(mask=mask),
        )
        return Tokens(latents + y)


def concatenate(streams: list[Tokens], head_dim: int) -> Tokens:
    """Several streams as one sequence."""
    x = jnp.concatenate([tokens.x for tokens in streams], axis=1)
    mask = None
    if any(tokens.mask is not None for tokens in streams):
        mask = jnp.concatenate([tokenizers.real(t.mask, t.x) for t in streams], axis=1)
    rotation = None
    if any(tokens.rotation is not None for tokens in streams):
        tables = [
            tokenizers.padded_rotation(t.rotation, 0, t.x.shape[1], head_dim) for t in streams
        ]
        sin, cos = (jnp.concatenate(parts, axis=1) for parts in zip(*tables, strict=True))
        rotation = sin, cos
    return Tokens(x, None, mask, None, rotation)
