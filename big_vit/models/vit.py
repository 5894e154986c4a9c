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

from big_vit.models.heads import Classifier, MapPool
from big_vit.models.layers import Attention, Dtype, Gather, LayerNorm, Mlp, ungathered
from big_vit.models.tokenizers import Patches

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


def sincos2d(rows: int, columns: int, width: int) -> Float[np.ndarray, '1 tokens width']:
    """Fixed 2-D sine-cosine positions in the form of MoCo v3 (arXiv 2104.02057).

    Raises:
      ValueError: `width` is not divisible by 4.
    """
    if width % 4:
        raise ValueError(f'sincos2d needs a width divisible by 4, got {width}')
    y, x = np.mgrid[:rows, :columns].reshape(2, -1).astype(np.float64)
    omega = 10_000.0 ** (-np.arange(width // 4) / max(width // 4 - 1, 1))
    x, y = x[:, None] * omega, y[:, None] * omega
    table = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
    return table[None].astype(np.float32)


def resize_positions(
    table: Float[np.ndarray, '1 old width'], old: tuple[int, int], new: tuple[int, int]
) -> Float[np.ndarray, '1 new width']:
    """Learned positions on another grid, linearly interpolated with corners aligned.

    `old` and `new` are (rows, columns). Corners aligned is what the ViT paper's
    code does; the positions of a first and last patch stay what they were.
    """
    if old == new:
        return table
    grid = np.asarray(table, np.float64).reshape(*old, -1)
    for axis in (0, 1):
        at = np.linspace(0, old[axis] - 1, new[axis])
        low = np.minimum(at.astype(int), old[axis] - 1)
        high = np.minimum(low + 1, old[axis] - 1)
        share = (at - low).reshape([-1 if i == axis else 1 for i in range(3)])
        grid = np.take(grid, low, axis) * (1 - share) + np.take(grid, high, axis) * share
    return grid.reshape(1, new[0] * new[1], -1).astype(np.float32)


def identity(x: Array) -> Array:
    return x


class Block(nn.Module):
    """A pre-norm encoder block. Returns (x, None), the form that `nn.scan` asks for."""

    mlp_dim: int
    num_heads: int
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    constrain: Callable[[Array], Array] = identity
    gather: Gather = ungathered

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch tokens width'], deterministic: bool
    ) -> tuple[Float[Array, 'batch tokens width'], None]:
        y = LayerNorm(dtype=self.dtype, name='LayerNorm_0')(x)
        name = 'MultiHeadDotProductAttention_0'
        y = Attention(self.num_heads, self.dtype, self.gather, name=name)(y)
        y = nn.Dropout(self.dropout)(y, deterministic)
        x = x + checkpoint_name(y, 'attention_out')
        y = LayerNorm(dtype=self.dtype, name='LayerNorm_1')(x)
        mlp = Mlp(self.mlp_dim, self.dropout, self.dtype, self.gather, name='MlpBlock_0')
        y = mlp(y, deterministic)
        x = x + nn.Dropout(self.dropout)(y, deterministic)
        return self.constrain(x), None


class Encoder(nn.Module):
    """`depth` blocks and a final norm."""

    depth: int
    mlp_dim: int
    num_heads: int
    dropout: float = 0.0
    scan: bool = True
    remat: str = 'none'
    dtype: Dtype = jnp.float32
    constrain: Callable[[Array], Array] = identity
    gather: Gather = ungathered

    @nn.compact
    def __call__(
        self, x: Float[Array, 'batch tokens width'], deterministic: bool = True
    ) -> Float[Array, 'batch tokens width']:
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
            dropout=self.dropout,
            dtype=self.dtype,
            constrain=self.constrain,
            gather=self.gather,
        )
        if self.scan:
            stack = nn.scan(
                block,
                variable_axes={'params': 0},
                split_rngs={'params': True, 'dropout': True},
                in_axes=nn.broadcast,
                length=self.depth,
            )
            x, _ = stack(name='encoderblock', **fields)(x, deterministic)
        else:
            for i in range(self.depth):
                x, _ = block(name=f'encoderblock_{i}', **fields)(x, deterministic)
        return LayerNorm(dtype=self.dtype, name='encoder_norm')(x)


class ViT(nn.Module):
    """An image classifier; every size is a free choice, `variants.py` names the published ones.

    Attributes:
      patch_size: (height, width) in pixels; images may be any multiple of it,
        with any number of channels.
      posemb: 'sincos2d' or 'learned' (which fixes the number of tokens).
      pool: 'gap' (mean of tokens), 'cls' (a class token) or 'map' (attention).
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

    @nn.compact
    def __call__(
        self, image: Float[Array, 'batch height width channels'], *, train: bool = False
    ) -> tuple[Float[Array, 'batch classes'], dict[str, Array]]:
        """Logits in float32, and {'tokens': [batch, tokens, width], 'pre_logits': [batch, width]}.

        Dropout, where its rate is not 0, needs `rngs={'dropout': key}` when `train`.

        Raises:
          ValueError: the image does not divide into patches.
        """
        x = Patches(self.width, self.patch_size, self.dtype, self.gather, name='embedding')(image)
        batch, rows, columns, width = x.shape
        if self.posemb == 'learned':
            init = nn.initializers.normal(width**-0.5)
            positions = self.param('pos_embedding', init, (1, rows * columns, width))
        else:
            positions = jnp.asarray(sincos2d(rows, columns, width))
        x = x.reshape(batch, rows * columns, width) + positions.astype(self.dtype)
        if self.pool == 'cls':
            cls = self.param('cls', nn.initializers.zeros, (1, 1, width)).astype(self.dtype)
            x = jnp.concatenate([jnp.broadcast_to(cls, (batch, 1, width)), x], axis=1)
        x = self.constrain(nn.Dropout(self.dropout)(x, not train))
        x = Encoder(
            self.depth,
            self.mlp_dim,
            self.num_heads,
            self.dropout,
            self.scan,
            self.remat,
            self.dtype,
            self.constrain,
            self.gather,
            name='Transformer',
        )(x, not train)
        if self.pool == 'gap':
            pooled = x.astype(jnp.float32).mean(axis=1)
        elif self.pool == 'cls':
            pooled = x[:, 0].astype(jnp.float32)
        else:
            pool = MapPool(self.num_heads, self.mlp_dim, self.dtype, self.gather, name='MAPHead_0')
            pooled = pool(x).astype(jnp.float32)
        logits = Classifier(self.num_classes, self.gather, name='head')(pooled)
        return logits, {'tokens': x, 'pre_logits': pooled}


def stack_blocks(params: dict[str, Any]) -> dict[str, Any]:
    """The scanned form of unrolled parameters (already scanned ones are returned as they are)."""
    encoder = params['Transformer']
    names = sorted(
        (name for name in encoder if re.fullmatch(r'encoderblock_\d+', name)),
        key=lambda name: int(name.rpartition('_')[2]),
    )
    if not names:
        return params
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(encoder[name] for name in names))
    rest = {name: value for name, value in encoder.items() if name not in names}
    return {**params, 'Transformer': {**rest, 'encoderblock': stacked}}


def unstack_blocks(params: dict[str, Any]) -> dict[str, Any]:
    """The unrolled form of scanned parameters (already unrolled ones are returned as they are)."""
    encoder = dict(params['Transformer'])
    stacked = encoder.pop('encoderblock', None)
    if stacked is None:
        return params
    depth = jax.tree.leaves(stacked)[0].shape[0]
    for i in range(depth):
        encoder[f'encoderblock_{i}'] = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
    return {**params, 'Transformer': encoder}
