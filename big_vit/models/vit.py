"""The Vision Transformer encoder (arXiv 2010.11929), as a pure function of its parameters.

Names of parameters are those of google-research's checkpoints; with `scan`
the blocks' parameters are stacked along a leading axis of length `depth`
under `Transformer/encoderblock`, without it they are
`Transformer/encoderblock_0` and so on. `stack_blocks` and `unstack_blocks`
convert between the two.
"""

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from big_vit.models import heads, positions, tokenizers
from big_vit.models.layers import (
    NOWHERE,
    PLAIN,
    Attention,
    Dense,
    Dtype,
    Gather,
    Mlp,
    Places,
    Style,
    norm,
    ungathered,
)
from big_vit.models.tokenizers import Stream, Tokens

POLICIES = {
    'names': jax.checkpoint_policies.save_only_these_names('qkv', 'attention_out'),
    'full': None,
    'offload': jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=['qkv', 'attention_out'],
        offload_src='device',
        offload_dst='pinned_host',
    ),
}
# Those whose vector is made of a class token.
OF_CLASS_TOKEN = ('cls', 'cls_gap', 'cls_dist')
CAPTURES = ('blocks', 'attention')


def identity(x: Array) -> Array:
    return x


class DropPath(nn.Module):
    """Leaves out the whole branch of some examples (stochastic depth, arXiv 1603.09382)."""

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch tokens width'], rate: Array | float
    ) -> Float[Array, 'batch tokens width']:
        kept = jax.random.bernoulli(self.make_rng('dropout'), 1 - rate, (x.shape[0], 1, 1))
        scale = (1 / (1 - jnp.asarray(rate, jnp.float32))).astype(x.dtype)
        return jnp.where(kept, x * scale, jnp.zeros((), x.dtype))


class Block(nn.Module):
    """A pre-norm encoder block. Returns (x, what was captured), the form that `nn.scan` asks for.

    Attributes:
      parallel: attention and MLP read the same norm and are added together (ViT-22B, arXiv
        2302.05442).
      layer_scale: what a learned factor on each branch's features begins with (CaiT, arXiv
        2103.17239); 0 has none.
      relative: rows of the table of relative biases.
      cross: attend to `places.context` between the two branches, as a decoder does.
      capture: which of `CAPTURES` to return.
    """

    mlp_dim: int
    num_heads: int
    style: Style = PLAIN
    parallel: bool = False
    layer_scale: float = 0.0
    relative: int = 0
    cross: bool = False
    capture: tuple[str, ...] = ()
    constrain: Callable[[Array], Array] = identity

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'batch tokens width'],
        deterministic: bool,
        drop_path: Float[Array, ''] | None = None,
        places: Places = NOWHERE,
    ) -> tuple[Float[Array, 'batch tokens width'], dict[str, Array]]:
        style, branches = self.style, iter(range(3))

        def branch(y: Array) -> Array:
            number = next(branches)
            if self.layer_scale:
                scale = LayerScale(self.layer_scale, name=f'LayerScale_{number}')
                y = scale(y)
            y = nn.Dropout(style.dropout)(y, deterministic)
            if drop_path is not None and not deterministic:
                y = DropPath(name=f'DropPath_{number}')(y, drop_path)
            return y

        y = norm(style, 'LayerNorm_0')(x)
        attention = Attention(
            self.num_heads,
            style,
            self.relative,
            'attention' in self.capture,
            name='MultiHeadDotProductAttention_0',
        )
        mlp = Mlp(self.mlp_dim, style, name='MlpBlock_0')
        z, weights = attention(y, None, places)
        x = x + checkpoint_name(branch(z), 'attention_out')
        if self.cross:
            z = norm(style, 'LayerNorm_2')(x)
            there = Places(mask=places.context_mask)
            z, _ = Attention(self.num_heads, style, name='CrossAttention_0')(
                z, places.context, there
            )
            x = x + checkpoint_name(branch(z), 'attention_out')
        y = y if self.parallel else norm(style, 'LayerNorm_1')(x)
        x = self.constrain(x + branch(mlp(y, deterministic)))
        seen: dict[str, Array] = {}
        if 'blocks' in self.capture:
            seen['blocks'] = x
        if weights is not None:
            seen['attention'] = weights
        return x, seen


class LayerScale(nn.Module):
    """A learned factor for each feature."""

    start: float

    @nn.compact
    def __call__(self, x: Float[Array, 'batch tokens width']) -> Float[Array, 'batch tokens width']:
        scale = jnp.asarray(
            self.param('scale', nn.initializers.constant(self.start), (x.shape[-1],))
        )
        return x * scale.astype(x.dtype).reshape(1, 1, -1)


class Encoder(nn.Module):
    """`depth` blocks and, with `final_norm`, a norm. Returns (tokens, what was captured).

    Attributes:
      drop_path: rate of the last block; the first has 0 and those between lie on a line.
      the others: as `Block` and `ViT` have them.
    """

    depth: int
    mlp_dim: int
    num_heads: int
    style: Style = PLAIN
    parallel: bool = False
    layer_scale: float = 0.0
    drop_path: float = 0.0
    relative: int = 0
    cross: bool = False
    final_norm: bool = True
    scan: bool = True
    remat: str = 'none'
    capture: tuple[str, ...] = ()
    constrain: Callable[[Array], Array] = identity

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'batch tokens width'],
        deterministic: bool = True,
        places: Places = NOWHERE,
    ) -> tuple[Float[Array, 'batch tokens width'], dict[str, Array]]:
        block: Any = Block
        if self.remat != 'none':
            # Under scan the loop itself stops the compiler from merging the recomputation back.
            block = nn.remat(
                Block,
                prevent_cse=not self.scan,
                static_argnums=(2,),
                policy=POLICIES[self.remat],
            )
        fields = dict(
            mlp_dim=self.mlp_dim,
            num_heads=self.num_heads,
            style=self.style,
            parallel=self.parallel,
            layer_scale=self.layer_scale,
            relative=self.relative,
            cross=self.cross,
            capture=self.capture,
            constrain=self.constrain,
        )
        rates = None
        if self.drop_path and not deterministic:
            rates = jnp.linspace(0, self.drop_path, self.depth)
        if self.scan:
            stack = nn.scan(
                block,
                variable_axes={'params': 0},
                split_rngs={'params': True, 'dropout': True},
                in_axes=(nn.broadcast, 0, nn.broadcast),
                length=self.depth,
            )
            x, seen = stack(name='encoderblock', **fields)(x, deterministic, rates, places)
        else:
            each = []
            for i in range(self.depth):
                rate = None if rates is None else rates[i]
                one = block(name=f'encoderblock_{i}', **fields)
                x, found = one(x, deterministic, rate, places)
                each.append(found)
            seen = {name: jnp.stack([found[name] for found in each]) for name in self.capture}
        if self.final_norm:
            x = norm(self.style, 'encoder_norm')(x)
        return x, seen


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
            places = Places(found.rotation, mask)
            stack = Encoder(self.stream.depth, name='Transformer', **self.encoder)
            x, _ = stack(x, deterministic, places)
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
        their tokens are one sequence ('concat'), the first attends to the others ('cross'), or
        `latents` learned vectors attend to all ('latents', arXiv 2103.03206).
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
            the parts of a batch by name.
          capture: 'blocks' adds the tokens after each block, [depth, batch, tokens, width];
            'attention' the weights, [depth, batch, heads, tokens, tokens].

        Raises:
          ValueError: the image does not divide into patches.
        """
        style = self.style()
        head_dim = self.head_dim or self.width // self.num_heads
        parts = inputs if isinstance(inputs, dict) else {self.stream().reads: inputs}
        if self.streams:
            found, places = self._fused(style, head_dim, parts, not train)
        else:
            found = tokenizers.tokenize(self, self.stream(), self.width, head_dim, style, parts)
            places = NOWHERE
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
            places = places._replace(relative=index)
        if turns is not None and prefix:
            turns = tokenizers.padded_rotation(turns, prefix, 0, head_dim)
        places = places._replace(rotation=turns, mask=_visible(found.segment, mask, prefix))
        cross = self.fusion == 'cross' and bool(self.streams)
        x, seen = Encoder(
            self.depth,
            **self._encoder(style, capture),
            relative=relative,
            cross=cross,
            final_norm=not self.norm_after_pool,
            name='Transformer',
        )(x, not train, places)
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
    ) -> tuple[Tokens, Places]:
        """The sequence that the encoder gets from several streams, and what it may look at."""
        each = [
            StreamTokens(
                stream, self.width, head_dim, style, self._encoder(style), name=stream.name
            )(parts, deterministic)
            for stream in self.streams
        ]
        if self.fusion == 'cross':
            context = _joined(each[1:], head_dim)
            mask = None if context.mask is None else context.mask[:, None, None]
            return each[0], Places(context=context.x, context_mask=mask)
        whole = _joined(each, head_dim)
        if self.fusion == 'concat':
            return whole, NOWHERE
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
            Places(mask=mask),
        )
        return Tokens(latents + y), NOWHERE

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


def _every_encoder(
    params: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """The parameters with `change` made to the encoder and to those of streams."""
    changed = {
        name: change(part)
        if name == 'Transformer'
        else _every_encoder(part, change)
        if isinstance(part, dict)
        else part
        for name, part in params.items()
    }
    same = all(changed[name] is params[name] for name in params)
    return params if same else changed


def stack_blocks(params: dict[str, Any]) -> dict[str, Any]:
    """The scanned form of unrolled parameters (already scanned ones are returned as they are)."""

    def stack(encoder: dict[str, Any]) -> dict[str, Any]:
        names = sorted(
            (name for name in encoder if re.fullmatch(r'encoderblock_\d+', name)),
            key=lambda name: int(name.rpartition('_')[2]),
        )
        if not names:
            return encoder
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(encoder[n] for n in names))
        rest = {name: value for name, value in encoder.items() if name not in names}
        return {**rest, 'encoderblock': stacked}

    return _every_encoder(params, stack)


def unstack_blocks(params: dict[str, Any]) -> dict[str, Any]:
    """The unrolled form of scanned parameters (already unrolled ones are returned as they are)."""

    def unstack(encoder: dict[str, Any]) -> dict[str, Any]:
        if 'encoderblock' not in encoder:
            return encoder
        rest = dict(encoder)
        stacked = rest.pop('encoderblock')
        depth = jax.tree.leaves(stacked)[0].shape[0]
        for i in range(depth):
            rest[f'encoderblock_{i}'] = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
        return rest

    return _every_encoder(params, unstack)
