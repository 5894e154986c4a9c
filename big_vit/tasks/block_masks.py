"""Masks made of blocks, as iBOT and DINOv2 hide patches from the student (arXiv 2106.08254).

Rectangles are placed until a view has nearly its number of masked patches, and single patches make
up the rest, as in DINOv3 (arXiv 2508.10104). The numbers of a group of views are fixed, and only
whose is which is random: so arrays of masked patches have a shape. By iBOT's own law (2111.07832)
each view draws its number by itself, and is done with as many patches as its rectangles come to.
Masks are drawn on the devices from a key, for a whole batch.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

_LEAST_AREA, _ASPECT = 4, 0.3
# A view is given up after so many rectangles that did not fit, as in the authors' code, and after
# so many in all, to which none of thousands came: half of 32x32 patches took 41 at most.
_FAILURES, _ATTEMPTS = 10, 64


def masked_counts(
    views: int, patches: int, probability: float, ratios: tuple[float, float]
) -> Int[np.ndarray, ' views']:
    """How many patches are masked in each of a group of views, the most first.

    int(views * probability) views are masked, with ratios evenly spaced from the first of
    `ratios`, which is not taken, to the second; the others are not.
    """
    masked = int(views * probability)
    steps = np.linspace(*ratios, masked + 1)[1:] if masked else np.zeros(0)
    # What is a whole number but for rounding stays one.
    counts = np.floor(patches * steps + 1e-6).astype(np.int64)
    return np.concatenate([counts[::-1], np.zeros(views - masked, np.int64)])


def shuffled_counts(
    key: Array, counts: Sequence[int] | np.ndarray, groups: int
) -> Int[Array, 'groups views']:
    """The numbers of each group, in random order."""
    noise = jax.random.uniform(key, (groups, len(counts)))
    return jnp.asarray(counts, jnp.int32)[jnp.argsort(noise, axis=1)]


def independent_targets(
    key: Array, views: int, patches: int, probability: float, ratios: tuple[float, float]
) -> Float[Array, ' views']:
    """How many patches iBOT masks at most in each view, which is 0 or of a uniform ratio."""
    masked, ratio = jax.random.split(key)
    drawn = jax.random.uniform(ratio, (views,), minval=ratios[0], maxval=ratios[1])
    return jnp.where(jax.random.bernoulli(masked, probability, (views,)), drawn * patches, 0)


def block_masks(
    key: Array,
    counts: Int[Array, ' views'] | Float[Array, ' views'],
    grid: tuple[int, int],
    exact: bool = True,
) -> Bool[Array, 'views patches']:
    """A mask for each view with exactly its number of patches, or with at most these, as in iBOT.

    Then rectangles have at least the area of a square of a third of the grid, and one may cover
    more than half of it.
    """
    (rows, columns), views = grid, counts.shape[0]
    least = _LEAST_AREA if exact else (min(grid) // 3) ** 2
    place, fill = jax.random.split(key)
    row = jnp.arange(rows).reshape(1, rows, 1)
    column = jnp.arange(columns).reshape(1, 1, columns)
    limit = math.log(_ASPECT)

    def attempt(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        mask, failures = carry
        draw: Float[Array, 'four views'] = jax.random.uniform(
            jax.random.fold_in(place, index), (4, views)
        )
        missing = counts - mask.sum((1, 2))
        most = jnp.minimum(missing, rows * columns // 2) if exact else missing
        area = least + (most - least) * draw[0]
        aspect = jnp.exp(limit * (1 - 2 * draw[1]))
        height = jnp.round(jnp.sqrt(jnp.maximum(area, 0) * aspect)).astype(jnp.int32)
        width = jnp.round(jnp.sqrt(jnp.maximum(area, 0) / aspect)).astype(jnp.int32)
        top = jnp.floor(draw[2] * (rows - height + 1)).astype(jnp.int32)
        left = jnp.floor(draw[3] * (columns - width + 1)).astype(jnp.int32)

        def within(place: Array, start: Array, size: Array) -> Array:
            start, end = (x.reshape(-1, 1, 1) for x in (start, start + size))
            return (place >= start) & (place < end)

        block = within(row, top, height) & within(column, left, width)
        new = (block & ~mask).sum((1, 2))
        fits = (height < rows) & (width < columns) & (new > 0) & (new <= most)
        fits &= (missing > 0) & (failures < _FAILURES)
        return mask | (block & fits.reshape(-1, 1, 1)), jnp.where(fits, 0, failures + 1)

    start = jnp.zeros((views, rows, columns), bool), jnp.zeros(views, jnp.int32)
    mask, _ = jax.lax.fori_loop(0, _ATTEMPTS, attempt, start)
    mask = mask.reshape(views, rows * columns)
    if not exact:
        return mask
    # Those of blocks come first, then others at random.
    rank = jnp.where(mask, -1.0, jax.random.uniform(fill, mask.shape))
    last = jnp.take_along_axis(jnp.sort(rank, axis=1), jnp.maximum(counts - 1, 0)[:, None], axis=1)
    return (rank <= last) & (counts > 0)[:, None]


def slots(counts: Sequence[int] | np.ndarray, rows: int, views: int) -> int:
    """Masked patches for which each of `rows` examples has to have room, if they share it.

    Args:
      counts: those of a group, the most first, from which the examples are any.
      views: of each example.
    """
    return math.ceil(int(np.sort(counts)[::-1][: rows * views].sum()) / rows)


def select(
    masks: Bool[Array, 'batch views patches'], rows: int, slots: int
) -> tuple[Int[Array, 'blocks places'], Float[Array, 'batch slots']]:
    """Where the masked patches of blocks of `rows` examples are, and their weights.

    Returns:
      Index of each among the patches of its block, and one over the number of masked patches of
      its view; places beyond the masked patches have weight 0.
    """
    batch = masks.shape[0]
    weight = masks / jnp.maximum(masks.sum(-1, keepdims=True), 1)
    flat = masks.reshape(batch // rows, -1)
    index = jnp.argsort(~flat, axis=1, stable=True)[:, : rows * slots]
    weight = jnp.take_along_axis(weight.reshape(flat.shape), index, axis=1)
    return index, weight.reshape(batch, slots).astype(jnp.float32)


def selected(
    x: Float[Array, 'batch views patches width'], index: Int[Array, 'blocks places']
) -> Float[Array, 'batch slots width']:
    """The features of the patches that `select` found."""
    batch, width = x.shape[0], x.shape[-1]
    x = x.reshape(index.shape[0], -1, width)
    return jnp.take_along_axis(x, index[..., None], axis=1).reshape(batch, -1, width)
