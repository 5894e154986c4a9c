"""Transformer encoder of pre-norm blocks (arXiv 2010.11929), scanned or unrolled.

With `scan`, parameters of all blocks are stacked along a leading axis of length `depth` under
`encoderblock`; without it they are under `encoderblock_0` and so on. `stack_blocks` and
`unstack_blocks` convert between the two.
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


def identity(x: Array) -> Array:
    return x


class DropPath(nn.Module):
    """Stochastic depth: drops the entire branch for random examples (arXiv 1603.09382)."""

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch tokens width'], rate: Array | float
    ) -> Float[Array, 'batch tokens width']:
        kept = jax.random.bernoulli(self.make_rng('dropout'), 1 - rate, (x.shape[0], 1, 1))
        scale = (1 / (1 - jnp.asarray(rate, jnp.float32))).astype(x.dtype)
        return jnp.where(kept, x * scale, jnp.zeros((), x.dtype))


class Block(nn.Module):
    """Pre-norm encoder block. Returns (x, captured values), the form that `nn.scan` requires.

    Attributes:
      parallel: attention and MLP read the same norm and are added together (ViT-22B, arXiv
        2302.05442).
      layer_scale: initial value of LayerScale (CaiT, arXiv 2103.17239); 0 for none.
      relative: rows of the relative bias table.
      cross: attend to `context.memory` between the two branches, as a decoder does.
      capture: which of `CAPTURES` to return.
      constrain: applied to the output, for instance to fix its sharding.
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
        context: AttentionContext = NO_CONTEXT,
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
        z, weights = attention(y, None, context)
        x = x + checkpoint_name(branch(z), 'attention_out')
        if self.cross:
            z = norm(style, 'LayerNorm_2')(x)
            memory_context = AttentionContext(mask=context.memory_mask)
            z, _ = Attention(self.num_heads, style, name='CrossAttention_0')(
                z, context.memory, memory_context
            )
            x = x + checkpoint_name(branch(z), 'attention_out')
        y = y if self.parallel else norm(style, 'LayerNorm_1')(x)
        x = self.constrain(x + branch(mlp(y, deterministic)))
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
    """Stack of `depth` blocks, optionally followed by a norm. Returns (tokens, captured values).

    Attributes:
      drop_path: rate of the last block; rates increase linearly from 0 at the first block.
      final_norm: normalise the output.

    All other attributes are those of `Block` and `ViT`.
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
        context: AttentionContext = NO_CONTEXT,
    ) -> tuple[Float[Array, 'batch tokens width'], dict[str, Array]]:
        block: Any = Block
        if self.remat != 'none':
            # prevent_cse is costly and unnecessary under scan: the loop boundary already keeps the
            # compiler from merging the recomputation with the forward pass.
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
            x, captured = stack(name='encoderblock', **fields)(x, deterministic, rates, context)
        else:
            captures = []
            for i in range(self.depth):
                rate = None if rates is None else rates[i]
                unrolled_block = block(name=f'encoderblock_{i}', **fields)
                x, block_captured = unrolled_block(x, deterministic, rate, context)
                captures.append(block_captured)
            captured = {
                name: jnp.stack([block_captured[name] for block_captured in captures])
                for name in self.capture
            }
        if self.final_norm:
            x = norm(self.style, 'encoder_norm')(x)
        return x, captured


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
