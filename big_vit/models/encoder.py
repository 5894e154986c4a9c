"""Transformer encoder (arXiv 2010.11929), scanned or unrolled.

With `scan`, parameters of all blocks are stacked along a leading axis of length `depth` under
`encoderblock`; without it they are under `encoderblock_0` and so on. `stack_blocks` and
`unstack_blocks` convert between the two.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from big_vit.models import positions
from big_vit.models.layers import NO_CONTEXT, PLAIN, Attention, AttentionContext, Mlp, Style, norm

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
CAPTURES = ('blocks', 'attention')
# What changes tokens before a block: (number of the block, tokens, what they attend to, the last
# norm) -> tokens and what they attend to.
Between = Callable[
    [int, Array, AttentionContext, Callable[[Array], Array]], tuple[Array, AttentionContext]
]
# What tiles of TPUs are wide: an array whose last axis is shorter is padded to it.
LANES = 128


def identity(x: Any) -> Any:
    return x


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of an encoder and the make of its blocks.

    Attributes:
      width: dimension of the residual stream.
      depth: number of blocks.
      mlp_dim: hidden dimension of each MLP.
      num_heads: attention heads of each block.
      style: see `layers.Style`.
      parallel: attention and MLP read the same norm and are added together (ViT-22B, arXiv
        2302.05442).
      post_norm: a block normalises what each branch was added to (arXiv 1706.03762), and not what
        the branch reads.
      layer_scale: initial value of a learned factor on each branch's features (CaiT, arXiv
        2103.17239); 0 has none.
      drop_path: rate at which the last block is left out; earlier ones less, on a line from 0.
      scan: stack the blocks' parameters and compile one block.
      remat: 'none', 'names' (keep projections, recompute the rest), 'offload' (the same, kept
        in the memory of the host) or 'full'.
      constrain: applied to the [batch, tokens, width] residual stream after the embedding and
        after each block; a mesh pins its sharding there.
      pack: lay short sequences side by side, as many as `LANES` tokens hold, with the same result;
        how many devices the batch is split over, 0 is off.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    style: Style = PLAIN
    parallel: bool = False
    post_norm: bool = False
    layer_scale: float = 0.0
    drop_path: float = 0.0
    scan: bool = True
    remat: str = 'none'
    constrain: Callable[[Array], Array] = identity
    pack: int = 0

    @property
    def head_dim(self) -> int:
        """Dimension of one attention head."""
        return self.style.head_dim or self.width // self.num_heads


class DropPath(nn.Module):
    """Stochastic depth: drops the entire branch for random examples (arXiv 1603.09382).

    Attributes:
      packed: examples in a row.
    """

    packed: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch tokens width'], rate: Array | float
    ) -> Float[Array, 'batch tokens width']:
        examples = (x.shape[0] * self.packed, 1, 1)
        kept = jax.random.bernoulli(self.make_rng('dropout'), 1 - rate, examples)
        if self.packed > 1:
            kept = kept.reshape(x.shape[0], self.packed, 1)
            kept = jnp.repeat(kept, x.shape[1] // self.packed, axis=1)
        scale = (1 / (1 - jnp.asarray(rate, jnp.float32))).astype(x.dtype)
        return jnp.where(kept, x * scale, jnp.zeros((), x.dtype))


class Block(nn.Module):
    """Encoder block. Returns (x, captured values), the form that `nn.scan` requires.

    Attributes:
      relative: rows of the relative bias table.
      cross: attend to `context.memory` between the two branches, as a decoder does.
      capture: which of `CAPTURES` to return.
      packed: sequences that a row consists of.
      outputs: how many tokens, the first ones, are computed; 0 is all.
      constrain: applied to the output, for instance to fix its sharding.
    """

    config: EncoderConfig
    relative: int = 0
    cross: bool = False
    capture: tuple[str, ...] = ()
    packed: int = 1
    outputs: int = 0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'batch tokens width'],
        deterministic: bool,
        drop_path: Float[Array, ''] | None = None,
        context: AttentionContext = NO_CONTEXT,
    ) -> tuple[Float[Array, 'batch outputs width'], dict[str, Array]]:
        config, style, branches = self.config, self.config.style, iter(range(3))
        if context.variation is not None:
            rotation = positions.varied_rotation(context.variation, self.make_rng('dropout'))
            context = context._replace(rotation=rotation)

        def branch(y: Array) -> Array:
            number = next(branches)
            if config.layer_scale:
                scale = LayerScale(config.layer_scale, name=f'LayerScale_{number}')
                y = scale(y)
            y = nn.Dropout(style.dropout)(y, deterministic)
            if drop_path is not None and not deterministic:
                y = DropPath(self.packed, name=f'DropPath_{number}')(y, drop_path)
            return y

        def before(x: Array, name: str) -> Array:
            return x if config.post_norm else norm(style, name)(x)

        def after(x: Array, name: str) -> Array:
            return norm(style, name)(x) if config.post_norm else x

        y = before(x, 'LayerNorm_0')
        attention = Attention(
            config.num_heads,
            style,
            self.relative,
            'attention' in self.capture,
            self.packed,
            name='MultiHeadDotProductAttention_0',
        )
        mlp, memory = Mlp(config.mlp_dim, style, name='MlpBlock_0'), None
        if self.outputs:
            x, y, memory = x[:, : self.outputs], y[:, : self.outputs], y
        z, weights = attention(y, memory, context)
        x = after(x + checkpoint_name(branch(z), 'attention_out'), 'LayerNorm_0')
        if self.cross:
            z = before(x, 'LayerNorm_2')
            memory_context = AttentionContext(
                mask=context.memory_mask,
                positions=context.positions,
                memory_positions=context.memory_positions,
            )
            z, _ = Attention(config.num_heads, style, name='CrossAttention_0')(
                z, context.memory, memory_context
            )
            x = after(x + checkpoint_name(branch(z), 'attention_out'), 'LayerNorm_2')
        y = y if config.parallel else before(x, 'LayerNorm_1')
        x = config.constrain(after(x + branch(mlp(y, deterministic)), 'LayerNorm_1'))
        captured: dict[str, Array] = {}
        if 'blocks' in self.capture:
            captured['blocks'] = x
        if weights is not None:
            captured['attention'] = weights
        return x, captured


class LayerScale(nn.Module):
    """LayerScale: a learned factor per feature."""

    start: float

    @nn.compact
    def __call__(self, x: Float[Array, 'batch tokens width']) -> Float[Array, 'batch tokens width']:
        scale = jnp.asarray(
            self.param('scale', nn.initializers.constant(self.start), (x.shape[-1],))
        )
        return x * scale.astype(x.dtype).reshape(1, 1, -1)


class Encoder(nn.Module):
    """Stack of `config.depth` blocks, optionally followed by a norm.

    Returns (tokens, captured values).

    Attributes:
      relative, cross, capture: see `Block`.
      final_norm: normalise the output.
      outputs: how many tokens, the first ones, are wanted; 0 is all.
    """

    config: EncoderConfig
    relative: int = 0
    cross: bool = False
    final_norm: bool = True
    capture: tuple[str, ...] = ()
    outputs: int = 0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'batch tokens width'],
        deterministic: bool = True,
        context: AttentionContext = NO_CONTEXT,
        between: Between | None = None,
    ) -> tuple[Float[Array, 'batch outputs width'], dict[str, Array]]:
        """Tokens after the blocks; `between`, of blocks that are not scanned, may change them."""
        config, batch, width = self.config, x.shape[0], x.shape[2]
        last = norm(config.style, 'encoder_norm') if self.final_norm else identity
        packed = 1 if between is not None else self._packed(x, context)
        if packed > 1:
            x = config.constrain(_side_by_side(x, packed))
            if context.rotation is not None:
                sin, cos = context.rotation
                rotation = _side_by_side(sin, packed), _side_by_side(cos, packed)
                context = context._replace(rotation=rotation)
        block: Any = Block
        if config.remat != 'none':
            # prevent_cse is costly and unnecessary under scan: the loop boundary already keeps the
            # compiler from merging the recomputation with the forward pass.
            block = nn.remat(
                Block,
                prevent_cse=not config.scan,
                static_argnums=(2,),
                policy=POLICIES[config.remat],
            )
        fields: dict[str, Any] = dict(
            config=config,
            relative=self.relative,
            cross=self.cross,
            capture=self.capture,
            packed=packed,
        )
        last_outputs = self.outputs if packed == 1 and self._plain(context) else 0
        rates = None
        if config.drop_path and not deterministic:
            rates = jnp.linspace(0, config.drop_path, config.depth)
        if config.scan:
            stack = nn.scan(
                block,
                variable_axes={'params': 0},
                split_rngs={'params': True, 'dropout': True},
                in_axes=(nn.broadcast, 0, nn.broadcast),
                length=config.depth,
            )
            x, captured = stack(name='encoderblock', **fields)(x, deterministic, rates, context)
        else:
            captures = []
            for i in range(config.depth):
                if between is not None:
                    x, context = between(i, x, context, last)
                rate = None if rates is None else rates[i]
                outputs = last_outputs if i == config.depth - 1 else 0
                unrolled_block = block(name=f'encoderblock_{i}', outputs=outputs, **fields)
                x, block_captured = unrolled_block(x, deterministic, rate, context)
                captures.append(block_captured)
            captured = {
                name: jnp.stack([block_captured[name] for block_captured in captures])
                for name in self.capture
            }
        if packed > 1:
            x = x.reshape(batch, -1, width)
        return last(x[:, : self.outputs or None]), captured

    def _plain(self, context: AttentionContext) -> bool:
        """Whether attention is of tokens alone, and nobody looks at its weights."""
        return not (self.capture or self.config.style.lsa) and all(x is None for x in context)

    def _packed(self, x: Array, context: AttentionContext) -> int:
        """How many sequences lie side by side, which are of one device."""
        devices, fused = self.config.pack, self.config.style.attention == 'fused'
        if not devices or not fused or not self._plain(context._replace(rotation=None)):
            return 1
        counts = range(2, LANES // x.shape[1] + 1)
        return max((n for n in counts if x.shape[0] % (n * devices) == 0), default=1)


def _side_by_side(x: Float[Array, '#batch tokens *rest'], packed: int) -> Float[Array, '...']:
    """[batch, tokens, ...] as [batch / packed, packed * tokens, ...]."""
    if len(x) == 1:
        return jnp.tile(x, (1, packed, *(1,) * (x.ndim - 2)))
    return x.reshape(len(x) // packed, packed * x.shape[1], *x.shape[2:])


def _map_encoders(
    params: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """Apply `change` to the encoder and to the encoders of all streams."""
    changed = {
        name: change(part)
        if name == 'Transformer'
        else _map_encoders(part, change)
        if isinstance(part, dict)
        else part
        for name, part in params.items()
    }
    unchanged = all(changed[name] is params[name] for name in params)
    return params if unchanged else changed


def stack_blocks(params: dict[str, Any]) -> dict[str, Any]:
    """Convert unrolled parameters to the scanned form; scanned ones are returned unchanged."""

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

    return _map_encoders(params, stack)


def unstack_blocks(params: dict[str, Any]) -> dict[str, Any]:
    """Convert scanned parameters to the unrolled form; unrolled ones are returned unchanged."""

    def unstack(encoder: dict[str, Any]) -> dict[str, Any]:
        if 'encoderblock' not in encoder:
            return encoder
        rest = dict(encoder)
        stacked = rest.pop('encoderblock')
        depth = jax.tree.leaves(stacked)[0].shape[0]
        for i in range(depth):
            rest[f'encoderblock_{i}'] = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
        return rest

    return _map_encoders(params, unstack)


def merge_lora(params: dict[str, Any]) -> dict[str, Any]:
    """Add each LoRA correction (`layers.Dense.lora`) to its kernel and remove it."""
    merged = {n: merge_lora(x) if isinstance(x, dict) else x for n, x in params.items()}
    if 'lora_a' not in merged:
        return merged
    kernel, down, up = (np.asarray(merged.pop(n)) for n in ('kernel', 'lora_a', 'lora_b'))
    # Scanned blocks add one axis to each of the three arrays.
    scanned = down.ndim + up.ndim - kernel.ndim == 3
    low_rank = (
        np.stack([np.tensordot(a, b, 1) for a, b in zip(down, up, strict=True)])
        if scanned
        else np.tensordot(down, up, 1)
    )
    return {**merged, 'kernel': (kernel + low_rank).astype(kernel.dtype)}
