"""Multi-block masks of I-JEPA (arXiv 2301.08243): blocks to predict, and a context without them.

The law is that of the authors' code, with static shapes. One draw gives the size of a step's target
blocks and another that of its context blocks; each example draws where its own lie. A context is
what is left of its block without the example's targets.

Contexts differ in length. The authors' code cuts all of a batch on one device to the shortest, by
their last tokens; here the length is fixed before the run, and an example whose targets leave less
draws them anew. So what is drawn depends neither on the batch nor on the devices.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# Into how many parts the one number that sizes depend on is divided.
_SIZES = 4096
# How often an example draws targets that leave a context. After these, all lie in one place.
_DRAWS = 8
# The authors' length is the least of a batch: of how many examples there, and in how many batches
# its mean is taken here.
_BATCH, _BATCHES = 128, 64

Pair = tuple[float, float]


class Blocks(NamedTuple):
    """Which tokens a batch's contexts and targets are, by rows of the grid.

    Attributes:
      context: tokens of the context, in the order of the grid.
      target: tokens of each target block; behind them, any.
      real: which of `target` are the block's.
    """

    context: Int[Array, 'batch context']
    target: Int[Array, 'batch blocks tokens']
    real: Bool[Array, ' tokens']


@dataclass(frozen=True)
class MultiBlock:
    """The law of the blocks.

    Attributes:
      grid: rows and columns of tokens.
      blocks: number of target blocks of each example.
      target_scale: least and greatest share of the grid that a target block covers.
      target_aspect: least and greatest height by width of a target block; it grows with the share,
        since both are made of one number.
      context_scale: least and greatest share that the square of the context covers.
      whole_grid: whether blocks reach the last row and the last column, which they never do in
        the authors' code.
    """

    grid: tuple[int, int]
    blocks: int = 4
    target_scale: Pair = (0.15, 0.2)
    target_aspect: Pair = (0.75, 1.5)
    context_scale: Pair = (0.85, 1.0)
    whole_grid: bool = False

    @property
    def target_sizes(self) -> Int[np.ndarray, 'draws 2']:
        """Rows and columns of target blocks, all equally likely."""
        return _block_sizes(self, self.target_scale, self.target_aspect)

    @property
    def context_sizes(self) -> Int[np.ndarray, 'draws 2']:
        """Rows and columns of the context's block, all equally likely."""
        return _block_sizes(self, self.context_scale, (1.0, 1.0))

    @property
    def target_tokens(self) -> int:
        """Tokens of the largest target block."""
        return int(self.target_sizes.prod(1).max())

    def least_context(self) -> int:
        """Tokens that a context has at least where all targets lie in one place."""
        return int(self.context_sizes.prod(1).min()) - self.target_tokens


@functools.lru_cache(maxsize=64)
def _block_sizes(law: MultiBlock, scale: Pair, aspect: Pair) -> Int[np.ndarray, 'draws 2']:
    share = (np.arange(_SIZES) + 0.5) / _SIZES
    tokens = np.floor(law.grid[0] * law.grid[1] * (scale[0] + share * (scale[1] - scale[0])))
    ratio = aspect[0] + share * (aspect[1] - aspect[0])
    sides = np.stack([np.sqrt(tokens * ratio), np.sqrt(tokens / ratio)], axis=1)
    most = np.array(law.grid)[None] - (not law.whole_grid)
    return np.clip(np.round(sides), 1, most).astype(np.int32)


def _corners(law: MultiBlock, place: Any, size: Any) -> Any:
    """Numbers from 0 to 1 as first rows and columns [..., 2] of blocks of a size [..., 2]."""
    grid = np.array(law.grid, np.int32).reshape((1,) * (place.ndim - 1) + (2,))
    # The authors' end is exclusive, so that no block reaches the border.
    places = grid - size + law.whole_grid
    return (place * places).astype(np.int32)


def _covered(law: MultiBlock, corner: Any, size: Any) -> Any:
    """Which tokens [..., rows, columns] blocks of a size cover."""
    inside = []
    for axis, count in enumerate(law.grid):
        line = np.arange(count, dtype=np.int32).reshape((1,) * (corner.ndim - 1) + (count,))
        first, last = corner[..., axis, None], (corner + size)[..., axis, None]
        inside.append((line >= first) & (line < last))
    return inside[0][..., :, None] & inside[1][..., None, :]


def _contexts(law: MultiBlock, context: Any, target: Any, context_size: Any, size: Any) -> Any:
    """Which tokens [..., rows, columns] are contexts: of their block, and of no target.

    Args:
      context: first row and column of the context's block [..., 2].
      target: those of the target blocks [..., blocks, 2].
    """
    taken = _covered(law, target, size[..., None, :]).any(-3)
    return _covered(law, context, context_size) & ~taken


@functools.lru_cache(maxsize=64)
def context_lengths(law: MultiBlock) -> Int[np.ndarray, 'batches batch']:
    """Lengths of contexts in batches of 128, drawn in NumPy by a fixed seed."""
    rng = np.random.default_rng(0)
    lengths = []
    for _ in range(_BATCHES):
        size, context_size = (
            table[rng.integers(len(table))][None] for table in (law.target_sizes, law.context_sizes)
        )
        place = rng.random((_BATCH, law.blocks + 1, 2))
        context = _corners(law, place[:, 0], context_size)
        target = _corners(law, place[:, 1:], size[:, None])
        lengths.append(_contexts(law, context, target, context_size, size).sum((-2, -1)))
    return np.stack(lengths)


def usual_context(law: MultiBlock) -> int:
    """Length of a context in the authors' code with batches of 128 for each device, on average."""
    return int(context_lengths(law).min(1).mean())


def places(law: MultiBlock, key: Array, batch: int) -> Float[Array, 'batch draws blocks 2']:
    """Random numbers from 0 to 1: where the context's block and each target lie, for some draws."""
    return jax.random.uniform(key, (batch, _DRAWS + 1, law.blocks + 1, 2))


def blocks_at(
    law: MultiBlock, length: int, step: Array | int, place: Float[Array, 'batch draws blocks 2']
) -> Blocks:
    """The blocks of a batch.

    Args:
      length: tokens of each context, which many contexts must have.
      step: what the sizes depend on, alone: all microbatches and devices have the same.
      place: as `places` draws them; an example has its first draw that leaves enough.
    """
    rows, columns = law.grid
    sizes = []
    for seed, table in enumerate((law.target_sizes, law.context_sizes)):
        of_step = jax.random.fold_in(jax.random.key(seed), step)
        index = jax.random.randint(of_step, (), 0, len(table))
        sizes.append(jnp.asarray(table)[index])
    size, context_size = sizes
    target = _corners(law, place[:, :, 1:], size.reshape(1, 1, 1, 2))
    # The last draw always leaves enough: all targets are in the place of the first.
    together = jnp.broadcast_to(target[:, -1:, :1], target[:, -1:].shape)
    target = jnp.concatenate([target[:, :-1], together], axis=1)
    context = _corners(law, place[:, :, 0], context_size.reshape(1, 1, 2))
    left = _contexts(
        law, context, target, context_size.reshape(1, 1, 2), size.reshape(1, 1, 2)
    ).reshape(len(place), -1, rows * columns)
    chosen = (left.sum(-1) >= length).argmax(1).reshape(-1, 1, 1)
    left = jnp.take_along_axis(left, chosen, axis=1)[:, 0]
    target = jnp.take_along_axis(target, chosen[..., None], axis=1)[:, 0]
    # The first tokens of the context, in their order.
    order = jnp.argsort(~left, axis=1, stable=True)
    number = jnp.arange(law.target_tokens)
    real = number < size[0] * size[1]
    row, column = number // size[1], number % size[1]
    index = (target[..., 0, None] + row.reshape(1, 1, -1)) * columns
    index = index + target[..., 1, None] + column.reshape(1, 1, -1)
    return Blocks(order[:, :length], jnp.where(real.reshape(1, 1, -1), index, 0), real)


def draw(law: MultiBlock, length: int, step: Array | int, key: Array, batch: int) -> Blocks:
    """`blocks_at` places of a key."""
    return blocks_at(law, length, step, places(law, key, batch))
