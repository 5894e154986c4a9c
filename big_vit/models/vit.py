"""The Vision Transformer (arXiv 2010.11929), as a pure function of its parameters.

Names of parameters are those of google-research's checkpoints; those of the blocks are below
`Transformer`, in one of the two forms that `encoder` has.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from big_vit.models import heads, positions, tokenizers
from big_vit.models.encoder import Encoder, identity
from big_vit.models.layers import (
    NO_CONTEXT,
    Attention,
    AttentionContext,
    Dense,
    Dtype,
    Gather,
    Style,
    norm,
    ungathered,
)
from big_vit.models.tokenizers import Stream, Tokens

# What CLIP lets the scale of its logits be at most.
MOST_SCALE = 100.0

# Those whose vector is made of a class token.
OF_CLASS_TOKEN = ('cls', 'cls_gap', 'cls_dist')


class StreamTokens(nn.Module):
    """The tokens of one of several streams: its tokenizer, positions and own blocks.

    `kind` is added to all of them, so that an encoder knows them from those of other streams.
    """

    stream: Stream
    width: int
    head_dim: int
    style: Style
    encoder: dict[str, Any]

    @nn.compact
    def __call__(self, inputs: dict[str, Array], deterministic: bool) -> Tokens:
        style, width = self.style, self.width
        found = tokenizers.tokenize(self, self.stream, width, self.head_dim, style, inputs)
        start = nn.initializers.normal(0.02)
        kind = jnp.asarray(self.param('kind', start, (1, 1, width)))
        x = found.x + kind.astype(style.dtype)
        if self.stream.depth:
            mask = None if found.mask is None else found.mask[:, None, None]
            context = AttentionContext(found.rotation, mask)
            stack = Encoder(self.stream.depth, name='Transformer', **self.encoder)
            x, _ = stack(x, deterministic, context)
        return found._replace(x=x)


class ViT(nn.Module):
    """A classifier of images, videos, sounds or words; `variants.py` names the published sizes.

    Attributes:
      num_classes: 0 has no head: the pooled vector takes the place of logits.
      patch_size: (height, width) in pixels; images may be any multiple of it, with any number of
        channels.
      tokenizer: a key of `tokenizers.PARTS`, which says which part of a batch it reads; the next
        fields are those of `tokenizers.Stream`.
      streams: several inputs at once, in place of the tokenizer above: `fusion` says whether
        their tokens are one sequence ('concat'), the first attends to the others ('cross'),
        `latents` learned vectors attend to all ('latents', arXiv 2103.03206), or each of two goes
        alone through the one encoder into a space of `shared` numbers ('apart'), as the towers of
        CLIP (arXiv 2103.00020) do; the logits are then how alike each pair of the batch is.
      logit_scale: what it starts as, of 'apart': cosines times it are the logits, plus
        `logit_bias` where that is not None (SigLIP, arXiv 2303.15343); without one it stays below
        `MOST_SCALE`.
      class_token: a learned token in front, which pools of the class token imply.
      registers: learned tokens behind it that nothing is read from (arXiv 2309.16588).
      pre_norm: a norm before the first block (CLIP).
      pool: 'gap' (mean of tokens), 'cls' (the class token), 'map' (attention), 'seq' (weighted
        mean), 'cls_gap' (class token and mean, one after the other), 'cls_dist' (mean of the
        heads of the class token and the first register, DeiT's distilled models).
      norm_after_pool: the last norm is of the pooled vector and not of each token.
      representation: width of a dense layer with tanh before the head; 0 has none.
      patch_dropout: share of the tokens left out in training (arXiv 2208.07220).
      the fields of `layers.Style`, of `Block` and of `Encoder`.
      remat: 'none', 'names' (keep projections, recompute the rest), 'offload' (the same, kept
        in the memory of the host) or 'full'.
      constrain: applied to the [batch, tokens, width] residual stream after the
        embedding and after each block; where a mesh pins its sharding.
      gather: multiplies with the kernels; where a mesh brings the parts of each together.
    """

    num_classes: int
    patch_size: tuple[int, int]
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    posemb: str = 'sincos2d'
    pool: str = 'gap'
    dropout: float = 0.0
    scan: bool = True
    remat: str = 'none'
    dtype: Dtype = jnp.bfloat16
    constrain: Callable[[Array], Array] = identity
    gather: Gather = ungathered
    tokenizer: str = 'patches'
    stride: tuple[int, int] | None = None
    tubelet: int = 2
    vocab: int = 0
    resnet: tuple[int, ...] = ()
    embedding_bias: bool = True
    posemb_prefix: int = 0
    posemb_grid: tuple[int, int] = (16, 16)
    rope_theta: float = 100.0
    streams: tuple[Stream, ...] = ()
    fusion: str = 'concat'
    latents: int = 0
    shared: int = 0
    logit_scale: float = 10.0
    logit_bias: float | None = None
    class_token: bool = False
    registers: int = 0
    patch_dropout: float = 0.0
    pre_norm: bool = False
    norm: str = 'layernorm'
    norm_eps: float = 1e-6
    activation: str = 'gelu_tanh'
    mlp: str = 'mlp'
    head_dim: int | None = None
    qkv_bias: bool = True
    key_bias: bool = True
    qk_norm: bool = False
    lsa: bool = False
    lora: int = 0
    attention: str = 'fused'
    parallel: bool = False
    layer_scale: float = 0.0
    drop_path: float = 0.0
    norm_after_pool: bool = False
    representation: int = 0
    head_bias: bool = True

    def style(self) -> Style:
        return Style(
            norm=self.norm,
            norm_eps=self.norm_eps,
            activation=self.activation,
            gated=self.mlp == 'swiglu',
            head_dim=self.head_dim,
            qkv_bias=self.qkv_bias,
            key_bias=self.key_bias,
            qk_norm=self.qk_norm,
            lsa=self.lsa,
            lora=self.lora,
            attention=self.attention,
            dropout=self.dropout,
            dtype=self.dtype,
            gather=self.gather,
        )

    def stream(self) -> Stream:
        """The one input, where there are no `streams`."""
        return Stream(
            tokenizer=self.tokenizer,
            patch_size=self.patch_size,
            stride=self.stride,
            tubelet=self.tubelet,
            vocab=self.vocab,
            resnet=self.resnet,
            embedding_bias=self.embedding_bias,
            posemb=self.posemb,
            posemb_prefix=self.posemb_prefix,
            posemb_grid=self.posemb_grid,
            rope_theta=self.rope_theta,
        )

    def inputs(self) -> tuple[Stream, ...]:
        return self.streams or (self.stream(),)

    def prefix(self) -> int:
        """How many tokens come before those of the input."""
        return (self.class_token or self.pool in OF_CLASS_TOKEN) + self.registers

    def _encoder(self, style: Style, capture: tuple[str, ...] = ()) -> dict[str, Any]:
        return dict(
            mlp_dim=self.mlp_dim,
            num_heads=self.num_heads,
            style=style,
            parallel=self.parallel,
            layer_scale=self.layer_scale,
            drop_path=self.drop_path,
            scan=self.scan,
            remat=self.remat,
            capture=capture,
            constrain=self.constrain,
        )

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, '...'] | dict[str, Array],
        *,
        train: bool = False,
        capture: tuple[str, ...] = (),
    ) -> tuple[Float[Array, '...'], dict[str, Array]]:
        """Logits in float32, and {'tokens': [batch, tokens, width], 'pre_logits': [batch, width]}.

        Dropout, where its rate is not 0, needs `rngs={'dropout': key}` when `train`.

        Args:
          inputs: an image [batch, height, width, channels] (or what else the tokenizer reads), or
            the parts of a batch by name. Streams apart may be given one alone: then there are its
            vectors [batch, shared] in place of logits, and they are under its name either way.
          capture: 'blocks' adds the tokens after each block, [depth, batch, tokens, width];
            'attention' the weights, [depth, batch, heads, tokens, tokens].

        Raises:
          ValueError: the image does not divide into patches.
        """
        style = self.style()
        head_dim = self.head_dim or self.width // self.num_heads
        parts = inputs if isinstance(inputs, dict) else {self.stream().reads: inputs}
        if self.streams and self.fusion == 'apart':
            return self._apart(style, head_dim, parts, not train)
        if self.streams:
            found, context = self._fused(style, head_dim, parts, not train)
        else:
            found = tokenizers.tokenize(self, self.stream(), self.width, head_dim, style, parts)
            context = NO_CONTEXT
        x, mask, turns = found.x, found.mask, found.rotation
        if train and self.patch_dropout:
            x, mask, turns = self._some(x, mask, turns)
        before = self._before(x.shape[0])
        prefix = 0 if before is None else before.shape[1]
        if before is not None:
            x = jnp.concatenate([before, x], axis=1)
        x = self.constrain(nn.Dropout(self.dropout)(x, not train))
        if self.pre_norm:
            x = norm(style, 'pre_norm')(x)
        relative = 0
        if self.posemb == 'relative' and found.grid is not None:
            relative = positions.relative_rows(found.grid, prefix)
            index = jnp.asarray(positions.relative_index(found.grid, prefix))
            context = context._replace(relative=index)
        if turns is not None and prefix:
            turns = tokenizers.padded_rotation(turns, prefix, 0, head_dim)
        context = context._replace(rotation=turns, mask=_visible(found.segment, mask, prefix))
        cross = self.fusion == 'cross' and bool(self.streams)
        x, seen = Encoder(
            self.depth,
            **self._encoder(style, capture),
            relative=relative,
            cross=cross,
            final_norm=not self.norm_after_pool,
            name='Transformer',
        )(x, not train, context)
        pooled = self._pooled(style, x, prefix, mask, found.segment, parts)
        if self.norm_after_pool:
            pooled = norm(style, 'encoder_norm')(pooled)
        extra = {'tokens': x, 'pre_logits': pooled, **seen}
        return self._logits(style, pooled), extra

    def _before(self, batch: int) -> Float[Array, 'batch prefix width'] | None:
        """The class token and the registers, with what positions they have."""
        found = []
        if self.class_token or self.pool in OF_CLASS_TOKEN:
            found.append(self.param('cls', nn.initializers.zeros, (1, 1, self.width)))
        if self.registers:
            start = nn.initializers.normal(0.02)
            found.append(self.param('registers', start, (1, self.registers, self.width)))
        if not found:
            return None
        x = jnp.concatenate([jnp.asarray(token) for token in found], axis=1)
        if self.posemb == 'learned' and self.posemb_prefix:
            table = jnp.asarray(self.get_variable('params', 'pos_embedding'))
            own = table[:, : self.posemb_prefix]
            x = x + jnp.pad(own, ((0, 0), (0, x.shape[1] - self.posemb_prefix), (0, 0)))
        x = x.astype(self.dtype)
        return jnp.broadcast_to(x, (batch, *x.shape[1:]))

    def _some(self, x: Array, mask: Array | None, turns: tuple[Array, Array] | None):
        """A random part of the tokens of each example, and what belongs to them."""
        batch, tokens = x.shape[:2]
        count = max(1, round(tokens * (1 - self.patch_dropout)))
        noise = jax.random.uniform(self.make_rng('dropout'), (batch, tokens))
        kept = jnp.sort(jnp.argsort(noise, axis=1)[:, :count], axis=1)

        def take(values: Array) -> Array:
            values = jnp.broadcast_to(values, (batch, *values.shape[1:]))
            return jnp.take_along_axis(
                values, kept.reshape(batch, count, *(1,) * (values.ndim - 2)), axis=1
            )

        mask = None if mask is None else take(mask)
        turns = None if turns is None else (take(turns[0]), take(turns[1]))
        return take(x), mask, turns

    def _fused(
        self, style: Style, head_dim: int, parts: dict[str, Array], deterministic: bool
    ) -> tuple[Tokens, AttentionContext]:
        """The sequence that the encoder gets from several streams, and what it may look at."""
        each = [
            StreamTokens(
                stream, self.width, head_dim, style, self._encoder(style), name=stream.name
            )(parts, deterministic)
            for stream in self.streams
        ]
        if self.fusion == 'cross':
            memory = _joined(each[1:], head_dim)
            mask = None if memory.mask is None else memory.mask[:, None, None]
            return each[0], AttentionContext(memory=memory.x, memory_mask=mask)
        whole = _joined(each, head_dim)
        if self.fusion == 'concat':
            return whole, NO_CONTEXT
        start = nn.initializers.normal(0.02)
        latents = jnp.asarray(self.param('latents', start, (1, self.latents, self.width)))
        latents = jnp.broadcast_to(
            latents.astype(style.dtype), (whole.x.shape[0], self.latents, self.width)
        )
        mask = None if whole.mask is None else whole.mask[:, None, None]
        name = 'CrossAttention_0'
        y, _ = Attention(self.num_heads, style, name=name)(
            norm(style, 'LayerNorm_0')(latents),
            norm(style, 'LayerNorm_1')(whole.x),
            AttentionContext(mask=mask),
        )
        return Tokens(latents + y), NO_CONTEXT

    def _apart(
        self, style: Style, head_dim: int, parts: dict[str, Array], deterministic: bool
    ) -> tuple[Float[Array, '...'], dict[str, Array]]:
        """Logits [batch, batch], of the first stream's examples by the second's, and vectors.

        'tokens' and 'pre_logits' are of the first stream that is there.
        """
        encoder = Encoder(self.depth, **self._encoder(style), name='Transformer')
        pool = None
        if self.pool == 'map':
            pool = heads.MapPool(self.num_heads, self.mlp_dim, style, name='MAPHead_0')
        extra: dict[str, Array] = {}
        vectors = []
        for stream in self.streams:
            if stream.reads not in parts:
                continue
            found = StreamTokens(
                stream, self.width, head_dim, style, self._encoder(style), name=stream.name
            )(parts, deterministic)
            mask = None if found.mask is None else found.mask[:, None, None]
            x = self.constrain(nn.Dropout(self.dropout)(found.x, deterministic))
            x, _ = encoder(x, deterministic, AttentionContext(rotation=found.rotation, mask=mask))
            if pool is None:
                pooled = heads.mean_pool(x, found.mask)
            else:
                pooled = pool(x, mask)[:, 0].astype(jnp.float32)
            dense = Dense(
                (self.shared,), dtype=jnp.float32, gather=self.gather, name=f'shared_{stream.name}'
            )
            vector = dense(pooled)
            length = jnp.sqrt(jnp.square(vector).sum(-1, keepdims=True) + 1e-12)
            vectors.append(vector / length)
            extra = {'tokens': x, 'pre_logits': pooled, **extra, stream.name: vectors[-1]}
        start = nn.initializers.constant(math.log(self.logit_scale))
        scale, bias = jnp.asarray(self.param('logit_scale', start, ())), jnp.zeros(())
        if self.logit_bias is None:
            scale = jnp.minimum(scale, math.log(MOST_SCALE))
        else:
            start = nn.initializers.constant(self.logit_bias)
            bias = jnp.asarray(self.param('logit_bias', start, ()))
        if len(vectors) < len(self.streams):
            return vectors[0], extra
        return jnp.exp(scale) * (vectors[0] @ vectors[1].T) + bias, extra

    def _pooled(
        self,
        style: Style,
        x: Array,
        prefix: int,
        mask: Array | None,
        segment: Array | None,
        parts: dict[str, Array],
    ) -> Float[Array, '...']:
        """In float32 [batch, width], or of several images in a row [batch, images, width]."""
        if segment is not None and 'images' in parts:
            images = parts['images'].shape[1]
            if self.pool == 'gap':
                return heads.segment_pool(x, segment, images)
            own = segment[:, None, None] == 1 + jnp.arange(images).reshape(1, 1, -1, 1)
            # A query that sees nothing would be NaN; its example does not count.
            own = own | ~own.any(-1, keepdims=True)
            pool = heads.MapPool(self.num_heads, self.mlp_dim, style, name='MAPHead_0')
            return pool(x, own).astype(jnp.float32)
        tokens = x[:, prefix:]
        if self.pool == 'gap':
            return heads.mean_pool(tokens, mask)
        if self.pool == 'cls':
            return x[:, 0].astype(jnp.float32)
        if self.pool == 'cls_gap':
            mean = heads.mean_pool(tokens, mask)
            return jnp.concatenate([x[:, 0].astype(jnp.float32), mean], axis=-1)
        if self.pool == 'cls_dist':
            return x[:, :2].astype(jnp.float32)
        if self.pool == 'seq':
            return heads.SequencePool(name='pool')(tokens, mask)
        pool = heads.MapPool(self.num_heads, self.mlp_dim, style, name='MAPHead_0')
        seen = None
        if mask is not None:
            front = jnp.ones((x.shape[0], prefix), bool)
            seen = jnp.concatenate([front, mask], axis=1)[:, None, None]
        return pool(x, seen)[:, 0].astype(jnp.float32)

    def _logits(self, style: Style, pooled: Array) -> Float[Array, '...']:
        if self.representation:
            dense = Dense((self.representation,), dtype=jnp.float32, name='pre_logits')
            pooled = jnp.tanh(dense(pooled))
        if not self.num_classes:
            return pooled

        def head(name: str) -> heads.Classifier:
            return heads.Classifier(self.num_classes, self.gather, self.head_bias, name=name)

        if self.pool == 'cls_dist':
            return (head('head')(pooled[:, 0]) + head('head_dist')(pooled[:, 1])) / 2
        return head('head')(pooled)


def _joined(each: list[Tokens], head_dim: int) -> Tokens:
    """Several streams as one sequence."""
    x = jnp.concatenate([tokens.x for tokens in each], axis=1)
    mask = None
    if any(tokens.mask is not None for tokens in each):
        mask = jnp.concatenate([tokenizers.real(t.mask, t.x) for t in each], axis=1)
    turns = None
    if any(tokens.rotation is not None for tokens in each):
        both = [tokenizers.padded_rotation(t.rotation, 0, t.x.shape[1], head_dim) for t in each]
        sin, cos = (jnp.concatenate(tables, axis=1) for tables in zip(*both, strict=True))
        turns = sin, cos
    return Tokens(x, None, mask, None, turns)


def _visible(segment: Array | None, mask: Array | None, prefix: int) -> Array | None:
    """Which keys each query sees: those of its own image, or all real ones."""
    if segment is not None:
        return (segment[:, None, :, None] == segment[:, None, None]).astype(bool)
    if mask is None:
        return None
    return jnp.pad(mask, ((0, 0), (prefix, 0)), constant_values=True)[:, None, None]
