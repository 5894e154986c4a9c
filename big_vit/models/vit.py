"""The Vision Transformer (arXiv 2010.11929), as a pure function of its parameters.

`embed`, `encode`, `pool` and `classify` are its stages, one module each, whose parameters lie
side by side at the root: names are those of google-research's checkpoints, blocks are below
`Transformer`, in one of the two forms that `encoder` has.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from big_vit.models import heads, positions, tokenizers
from big_vit.models.encoder import Between, Encoder, EncoderConfig
from big_vit.models.fusion import Fusion
from big_vit.models.layers import NO_CONTEXT, AttentionContext, Dense, Style, norm
from big_vit.models.tokenizers import (
    NO_EMBEDDING_CONTEXT,
    EmbeddingContext,
    Stream,
    Tokens,
)

# Pools that read the class token.
OF_CLASS_TOKEN = ('cls', 'cls_gap', 'cls_dist')
# Names of a classifier's parameters, at the root.
HEADS = ('head', 'head_dist')


@dataclass(frozen=True)
class Prefix:
    """Learned tokens before those of the input, and what is done to tokens before the blocks.

    Attributes:
      class_token: a learned token in front; pools that read it imply it.
      registers: learned tokens behind it that nothing is read from (arXiv 2309.16588).
      pre_norm: a norm before the first block (CLIP).
      patch_dropout: share of the input's tokens left out in training (arXiv 2208.07220).
    """

    class_token: bool = False
    registers: int = 0
    pre_norm: bool = False
    patch_dropout: float = 0.0


@dataclass(frozen=True)
class Head:
    """From encoded tokens to one vector, and from that to logits.

    Attributes:
      num_classes: 0 has no classifier: the pooled vector takes the place of logits.
      pool: 'gap' (mean of tokens), 'cls' (the class token), 'map' (attention), 'seq' (weighted
        mean), 'cls_gap' (class token and mean, one after the other), 'cls_dist' (mean of the
        heads of the class token and the first register, DeiT's distilled models).
      norm_after_pool: the last norm is of the pooled vector and not of each token.
      representation: width of a dense layer with tanh before the classifier; 0 has none.
      head_bias: whether the classifier has a bias.
    """

    num_classes: int = 0
    pool: str = 'gap'
    norm_after_pool: bool = False
    representation: int = 0
    head_bias: bool = True


class Embedding(nn.Module):
    """Inputs as tokens with positions, and what else the blocks may attend to."""

    streams: tuple[Stream, ...]
    encoder: EncoderConfig
    fusion: str
    latents: int

    @nn.compact
    def __call__(
        self,
        inputs: dict[str, Array],
        deterministic: bool,
        context: EmbeddingContext = NO_EMBEDDING_CONTEXT,
    ) -> tuple[Tokens, AttentionContext]:
        if not self.streams[0].name:
            own = self, self.streams[0], self.encoder
            return tokenizers.tokenize(*own, inputs, context), NO_CONTEXT
        fused = Fusion(self.streams, self.encoder, self.fusion, self.latents)
        nn.share_scope(self, fused)
        return fused(inputs, deterministic)


class Body(nn.Module):
    """Prefix tokens in front, then the blocks and, unless it comes after pooling, the last norm."""

    encoder: EncoderConfig
    prefix: Prefix
    head: Head
    stream: Stream | None  # The one input, where there are not several.
    cross: bool

    @nn.compact
    def __call__(
        self,
        tokens: Tokens,
        context: AttentionContext,
        train: bool,
        capture: tuple[str, ...],
        between: Between | None = None,
    ) -> tuple[Float[Array, 'batch tokens width'], dict[str, Array]]:
        style, stream = self.encoder.style, self.stream
        x, mask, rotation = tokens.x, tokens.mask, tokens.rotation
        before = self._prefix(x)
        length = 0 if before is None else before.shape[1]
        if before is not None:
            x = jnp.concatenate([before, x], axis=1)
        x = self.encoder.constrain(nn.Dropout(style.dropout)(x, not train))
        if self.prefix.pre_norm:
            x = norm(style, 'pre_norm')(x)
        rows = 0
        if stream is not None and stream.posemb == 'relative' and tokens.grid is not None:
            rows = positions.relative_rows(tokens.grid, length)
            index = jnp.asarray(positions.relative_index(tokens.grid, length))
            context = context._replace(relative=index)
        if train and stream is not None and tokens.places is not None:
            context = context._replace(variation=self._variation(stream, tokens.places, length))
        placed = tokens.positions
        if placed is not None and length:
            placed = jnp.pad(placed, ((0, 0), (length, 0), (0, 0)))
        if rotation is not None and length:
            rotation = tokenizers.padded_rotation(rotation, length, 0, self.encoder.head_dim)
        visible = _visible(tokens.segment, mask, length)
        context = context._replace(rotation=rotation, mask=visible, positions=placed)
        return Encoder(
            self.encoder,
            relative=rows,
            cross=self.cross,
            capture=capture,
            # The last block of those that normalise their sums ends with a norm.
            final_norm=not (self.head.norm_after_pool or self.encoder.post_norm),
            name='Transformer',
        )(x, not train, context, between)

    def _variation(
        self, stream: Stream, places: Float[Array, 'batch tokens axes'], prefix: int
    ) -> positions.Variation | None:
        """How the positions of tokens behind a prefix vary in training; None if they do not."""
        shift, *factors = stream.rope_shift, stream.rope_jitter, stream.rope_rescale
        if shift is None and factors == [None, None]:
            return None
        return positions.Variation(
            jnp.pad(places, ((0, 0), (prefix, 0), (0, 0))),
            jnp.arange(prefix + places.shape[1]) >= prefix,
            positions.rotary_frequencies(
                self.encoder.head_dim, places.shape[-1], stream.rope_theta
            ),
            jnp.array([shift or 0.0, *(factor or 1.0 for factor in factors)]),
        )

    def _prefix(
        self, tokens: Float[Array, 'batch tokens width']
    ) -> Float[Array, 'batch prefix width'] | None:
        """The class token and the registers, with what positions they have."""
        width, found = self.encoder.width, []
        deviation = self.encoder.style.laws.token
        if self.prefix.class_token or self.head.pool in OF_CLASS_TOKEN:
            start = nn.initializers.normal(deviation) if deviation else nn.initializers.zeros
            found.append(self.param('cls', start, (1, 1, width)))
        if self.prefix.registers:
            start = nn.initializers.normal(deviation or 0.02)
            found.append(self.param('registers', start, (1, self.prefix.registers, width)))
        if not found:
            return None
        x = jnp.concatenate([jnp.asarray(token) for token in found], axis=1)
        stream = self.stream
        if stream is not None and stream.posemb == 'learned' and stream.posemb_prefix:
            table = jnp.asarray(self.get_variable('params', 'pos_embedding'))
            placed = table[:, : stream.posemb_prefix]
            x = x + jnp.pad(placed, ((0, 0), (0, x.shape[1] - stream.posemb_prefix), (0, 0)))
        x = x.astype(self.encoder.style.dtype)
        return jnp.broadcast_to(x, (tokens.shape[0], *x.shape[1:]))


class Pooling(nn.Module):
    """Encoded tokens as one vector for each example, in float32."""

    encoder: EncoderConfig
    head: Head
    prefix: int

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch tokens width'], tokens: Tokens, images: int
    ) -> Float[Array, '...']:
        pooled = self._pooled(x, tokens, images)
        if self.head.norm_after_pool:
            pooled = norm(self.encoder.style, 'encoder_norm')(pooled)
        return pooled

    def _map(self) -> heads.MapPool:
        encoder = self.encoder
        return heads.MapPool(encoder.num_heads, encoder.mlp_dim, encoder.style, name='MAPHead_0')

    def _pooled(self, x: Array, tokens: Tokens, images: int) -> Float[Array, '...']:
        """[batch, width], or of several images in a row [batch, images, width]."""
        pool, mask, segment = self.head.pool, tokens.mask, tokens.segment
        if segment is not None and images:
            if pool == 'gap':
                return heads.segment_pool(x, segment, images)
            own_image = segment[:, None, None] == 1 + jnp.arange(images).reshape(1, 1, -1, 1)
            # A query that sees nothing would be NaN; its example does not count.
            own_image = own_image | ~own_image.any(-1, keepdims=True)
            return self._map()(x, own_image).astype(jnp.float32)
        of_input = x[:, self.prefix :]
        if pool == 'gap':
            return heads.mean_pool(of_input, mask)
        if pool == 'cls':
            return x[:, 0].astype(jnp.float32)
        if pool == 'cls_gap':
            mean = heads.mean_pool(of_input, mask)
            return jnp.concatenate([x[:, 0].astype(jnp.float32), mean], axis=-1)
        if pool == 'cls_dist':
            return x[:, :2].astype(jnp.float32)
        if pool == 'seq':
            return heads.SequencePool(name='pool')(of_input, mask)
        visible = None
        if mask is not None:
            front = jnp.ones((x.shape[0], self.prefix), bool)
            visible = jnp.concatenate([front, mask], axis=1)[:, None, None]
        return self._map()(x, visible)[:, 0].astype(jnp.float32)


class Classifier(nn.Module):
    """Logits in float32 of pooled vectors; without classes the vectors themselves."""

    encoder: EncoderConfig
    head: Head

    @nn.compact
    def __call__(self, pooled: Float[Array, '...']) -> Float[Array, '...']:
        if self.head.representation:
            dense = Dense((self.head.representation,), dtype=jnp.float32, name='pre_logits')
            pooled = jnp.tanh(dense(pooled))
        if not self.head.num_classes:
            return pooled

        def linear(name: str) -> heads.Classifier:
            gather = self.encoder.style.gather
            return heads.Classifier(self.head.num_classes, gather, self.head.head_bias, name=name)

        if self.head.pool == 'cls_dist':
            return (linear('head')(pooled[:, 0]) + linear('head_dist')(pooled[:, 1])) / 2
        return linear('head')(pooled)


class ViT(nn.Module):
    """An encoder of images, videos, sounds or words; `variants.py` names the published sizes.

    `make_vit` makes one of flat settings. Tasks that need more than logits call its stages:
    `embed`, `encode`, `pool`, `classify`.

    Attributes:
      streams: the inputs: one without a name, or several with names, which `fusion` joins.
      fusion, latents: see `fusion.Fusion`.
    """

    encoder: EncoderConfig
    streams: tuple[Stream, ...]
    prefix: Prefix = Prefix()
    head: Head = Head()
    fusion: str = 'concat'
    latents: int = 0

    @property
    def has_class_token(self) -> bool:
        return self.prefix.class_token or self.head.pool in OF_CLASS_TOKEN

    @property
    def prefix_tokens(self) -> int:
        """How many tokens come before those of the input."""
        return self.has_class_token + self.prefix.registers

    @property
    def single(self) -> Stream | None:
        """The one input; None where there are several."""
        return None if self.streams[0].name else self.streams[0]

    def sequence_length(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Tokens in the encoder, for inputs of these shapes without the batch."""
        streams = self.streams[:1] if self.fusion == 'cross' else self.streams
        lengths = [math.prod(tokenizers.grid_of(s, shapes[s.reads])) for s in streams]
        joined = self.latents if self.fusion == 'latents' and self.single is None else sum(lengths)
        return self.prefix_tokens + joined

    def setup(self) -> None:
        self.embedder = Embedding(self.streams, self.encoder, self.fusion, self.latents)
        cross = self.fusion == 'cross' and self.single is None
        self.body = Body(self.encoder, self.prefix, self.head, self.single, cross)
        self.pooling = Pooling(self.encoder, self.head, self.prefix_tokens)
        self.classifier = Classifier(self.encoder, self.head)
        # Side by side in one scope, as checkpoints have them.
        for stage in (self.embedder, self.body, self.pooling, self.classifier):
            nn.share_scope(self, stage)

    def embed(
        self,
        inputs: Float[Array, '...'] | dict[str, Array],
        *,
        train: bool = False,
        context: EmbeddingContext = NO_EMBEDDING_CONTEXT,
    ) -> tuple[Tokens, AttentionContext]:
        """Tokens of the input with their positions, and what else blocks attend to.

        Args:
          context: patches to hide and another grid of positions, of a model with one input.

        Raises:
          ValueError: the input does not divide into patches.
        """
        parts = inputs if isinstance(inputs, dict) else {self.streams[0].reads: inputs}
        return self.embedder(parts, not train, context)

    def encode(
        self,
        tokens: Tokens,
        context: AttentionContext = NO_CONTEXT,
        *,
        train: bool = False,
        capture: tuple[str, ...] = (),
        between: Between | None = None,
    ) -> tuple[Float[Array, 'batch tokens width'], dict[str, Array]]:
        """Encoded tokens, the `prefix_tokens` in front, and what was captured.

        Args:
          between: may change tokens before each block, where these are not scanned.
        """
        return self.body(tokens, context, train, capture, between)

    def pool(
        self, x: Float[Array, 'batch tokens width'], tokens: Tokens, images: int = 0
    ) -> Float[Array, '...']:
        """One vector for each example; of ragged sequences one for each of `images` in it."""
        return self.pooling(x, tokens, images)

    def classify(self, pooled: Float[Array, '...']) -> Float[Array, '...']:
        """Logits of pooled vectors."""
        return self.classifier(pooled)

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
            the parts of a batch by name.
          capture: 'blocks' adds the tokens after each block, [depth, batch, tokens, width];
            'attention' the weights, [depth, batch, heads, tokens, tokens].

        Raises:
          ValueError: the image does not divide into patches.
        """
        tokens, context = self.embed(inputs, train=train)
        if train and self.prefix.patch_dropout:
            key = self.make_rng('dropout')
            tokens = drop_tokens(tokens, key, self.prefix.patch_dropout)
        x, captured = self.encode(tokens, context, train=train, capture=capture)
        images = 0
        if isinstance(inputs, dict) and 'images' in inputs:
            images = inputs['images'].shape[1]
        pooled = self.pool(x, tokens, images)
        return self.classify(pooled), {'tokens': x, 'pre_logits': pooled, **captured}


def select_tokens(tokens: Tokens, index: Array) -> Tokens:
    """The tokens of an index [batch, kept], with their masks and rotations; the grid is lost."""
    batch, count = index.shape

    def take(values: Array) -> Array:
        values = jnp.broadcast_to(values, (batch, *values.shape[1:]))
        return jnp.take_along_axis(
            values, index.reshape(batch, count, *(1,) * (values.ndim - 2)), axis=1
        )

    def maybe(values: Array | None) -> Array | None:
        return None if values is None else take(values)

    rotation = tokens.rotation
    return Tokens(
        take(tokens.x),
        None,
        maybe(tokens.mask),
        maybe(tokens.segment),
        None if rotation is None else (take(rotation[0]), take(rotation[1])),
        maybe(tokens.places),
        maybe(tokens.positions),
    )


def drop_tokens(tokens: Tokens, key: Array, rate: float) -> Tokens:
    """A random part of the tokens of each example, in their order."""
    batch, length = tokens.x.shape[:2]
    count = max(1, round(length * (1 - rate)))
    noise = jax.random.uniform(key, (batch, length))
    return select_tokens(tokens, jnp.sort(jnp.argsort(noise, axis=1)[:, :count], axis=1))


# Sections of a model and their settings under flat names, as configs and other codebases have
# them. `Stream` has those of a model's one input.
_NOT_SETTINGS = ('style', 'name', 'part')
_SECTIONS: dict[type, tuple[str, ...]] = {
    section: tuple(f.name for f in fields(section) if f.name not in (*_NOT_SETTINGS, *others))
    for section, others in (
        (Style, ()),
        (EncoderConfig, ()),
        (Stream, ('depth',)),  # Only one of several streams has blocks of its own.
        (Prefix, ()),
        (Head, ()),
    )
}
# Names of all settings of a model with one input.
SETTINGS = tuple(name for names in _SECTIONS.values() for name in names)
# Settings that a user chooses for speed or training: weights are the same with any.
RUNTIME_SETTINGS = (
    *('dropout', 'drop_path', 'patch_dropout', 'scan', 'remat', 'attention', 'dtype'),
    *('gather', 'constrain', 'lora', 'weight_init', 'pack'),
    *('rope_shift', 'rope_jitter', 'rope_rescale'),
)


def make_vit(
    num_classes: int,
    patch_size: tuple[int, int],
    width: int,
    depth: int,
    mlp_dim: int,
    num_heads: int,
    *,
    streams: tuple[Stream, ...] = (),
    fusion: str = 'concat',
    latents: int = 0,
    **settings: Any,
) -> ViT:
    """A `ViT` of flat settings: fields of `Style`, `EncoderConfig`, `Stream`, `Prefix`, `Head`.

    Args:
      streams: several inputs, in place of the one that the settings describe.

    Raises:
      TypeError: an unknown setting.
    """
    settings = {'dtype': jnp.bfloat16, **settings, 'num_classes': num_classes}
    settings |= {'width': width, 'depth': depth, 'mlp_dim': mlp_dim, 'num_heads': num_heads}
    if not streams:
        settings['patch_size'] = patch_size
    unknown = [name for name in settings if name not in SETTINGS]
    if unknown:
        raise TypeError(f'{unknown[0]} is not a setting of a ViT; these are {", ".join(SETTINGS)}')

    def section(kind: type, **more: Any) -> Any:
        given = {name: settings[name] for name in _SECTIONS[kind] if name in settings}
        return kind(**given, **more)

    return ViT(
        encoder=section(EncoderConfig, style=section(Style)),
        streams=streams or (section(Stream),),
        prefix=section(Prefix),
        head=section(Head),
        fusion=fusion,
        latents=latents,
    )


def settings_of(model: ViT) -> dict[str, Any]:
    """The flat settings of a model, as `make_vit` takes them; of several inputs without theirs."""
    sections = [model.encoder.style, model.encoder, model.prefix, model.head]
    if model.single is not None:
        sections.append(model.single)
    return {
        name: getattr(section, name) for section in sections for name in _SECTIONS[type(section)]
    }


def _visible(segment: Array | None, mask: Array | None, prefix: int) -> Array | None:
    """Which keys each query sees: those of its own image, or all real ones."""
    if segment is not None:
        return (segment[:, None, :, None] == segment[:, None, None]).astype(bool)
    if mask is None:
        return None
    return jnp.pad(mask, ((0, 0), (prefix, 0)), constant_values=True)[:, None, None]
