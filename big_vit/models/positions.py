"""Positions of tokens: tables, rotations and relative biases, and resizing of learned tables.

A grid is the number of tokens along each axis: (rows, columns) for images, (frames, rows, columns)
for videos, (length,) for text. Tokens are in row-major order, the last axis fastest.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Grid = tuple[int, ...]
LAWS = ('sincos2d', 'sincos2d_mae')


def coordinates(grid: Grid) -> Float[np.ndarray, 'tokens axes']:
    """Return the index 0, 1, ... of each token along each axis."""
    axes = np.meshgrid(*(np.arange(size, dtype=np.float64) for size in grid), indexing='ij')
    return np.stack([axis.reshape(-1) for axis in axes], -1)


def divides(width: int, axes: int) -> bool:
    """Return whether sine-cosine positions fit a width; for three axes the remainder stays zero."""
    return width % 2 == 0 and width >= 6 if axes == 3 else width % (2 * axes) == 0


def frequencies(width: int, axes: int, kind: str) -> Float[np.ndarray, ' count']:
    """Return the frequencies along one axis, each of which yields a sine and a cosine.

    Raises:
      ValueError: the width is not divisible.
    """
    if not divides(width, axes):
        raise ValueError(f'{kind} needs a width divisible by {2 * axes}, got {width}')
    count = width // (2 * axes)
    last = max(count - 1, 1) if kind == 'sincos2d' else count
    return 10_000.0 ** (-np.arange(count) / last)


def sincos(grid: Grid, width: int, kind: str = 'sincos2d') -> Float[np.ndarray, '1 tokens width']:
    """Return fixed sine-cosine positions, with a part of the width per axis, the last axis first.

    With three axes, features beyond a multiple of six are zero.

    Args:
      kind: 'sincos2d' as in MoCo v3 (arXiv 2104.02057), whose slowest wave has a frequency of
        1/10,000, or 'sincos2d_mae' as in MAE (arXiv 2111.06377), whose slowest wave is one step
        faster.

    Raises:
      ValueError: the width is not divisible by two for each axis.
    """
    omega = frequencies(width, len(grid), kind)
    waves = []
    for coordinate in coordinates(grid).T[::-1]:
        angle = coordinate[:, None] * omega
        waves += [np.sin(angle), np.cos(angle)]
    table = np.concatenate(waves, axis=1)
    return np.pad(table, ((0, 0), (0, width - table.shape[1])))[None].astype(np.float32)


def sincos_of_pictures(
    real: Bool[Array, 'batch rows columns'], width: int
) -> Float[Array, 'batch tokens width']:
    """Return DETR's fixed positions (arXiv 2005.12872), which span the real part of a canvas.

    Along each axis a token's place is its number among the real ones, from 1, as a share of a turn;
    places beyond these are the last one. Sines and cosines alternate, and rows come before columns.

    Args:
      real: which tokens are of the picture, which lies at the top left.

    Raises:
      ValueError: the width is not divisible by four.
    """
    waves = []
    for axis in (1, 2):
        count = real.cumsum(axis, dtype=jnp.float32)
        last = jax.lax.slice_in_dim(count, -1, None, axis=axis)
        omega = jnp.asarray(frequencies(width, 2, 'sincos2d_detr'), jnp.float32)
        angle = (count / (last + 1e-6) * (2 * math.pi))[..., None] * omega.reshape(1, 1, 1, -1)
        pairs = jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1)
        waves.append(pairs.reshape(*real.shape, -1))
    return jnp.concatenate(waves, -1).reshape(real.shape[0], -1, width)


def sincos_at(
    places: Float[Array, 'batch tokens axes'], width: int, kind: str = 'sincos2d'
) -> Float[Array, 'batch tokens width']:
    """Return the positions of `sincos` at arbitrary coordinates."""
    omega = jnp.asarray(frequencies(width, places.shape[-1], kind), jnp.float32)
    waves = []
    for axis in reversed(range(places.shape[-1])):
        angle = places[..., axis, None] * omega[None, None]
        waves += [jnp.sin(angle), jnp.cos(angle)]
    table = jnp.concatenate(waves, -1)
    return jnp.pad(table, ((0, 0), (0, 0), (0, width - table.shape[-1])))


def rotation(
    places: Float[Array, 'batch tokens axes'], head_dim: int, theta: float
) -> tuple[Float[Array, 'batch tokens 1 features'], Float[Array, 'batch tokens 1 features']]:
    """Return sine and cosine of RoPE as in DINOv3 (arXiv 2508.10104).

    Args:
      places: centres of the tokens from -1 at one border to 1 at the other, so that the angles do
        not depend on the resolution.
      head_dim: features of a head; rotated pairs are (i, i + head_dim / 2).
      theta: base of the geometric series of frequencies, the first of which is one turn per unit of
        `places`.

    Raises:
      ValueError: head_dim is not divisible by two for each axis.
    """
    return _waves(places, rotary_frequencies(head_dim, places.shape[-1], theta))


def rotary_frequencies(head_dim: int, axes: int, theta: float) -> Float[Array, ' count']:
    """Return the frequencies of RoPE along each axis, see `rotation`."""
    if head_dim % (2 * axes):
        raise ValueError(
            f"posemb='rope' needs heads of a width divisible by {2 * axes}, got {head_dim}"
        )
    count = head_dim // (2 * axes)
    return jnp.asarray(2 * np.pi * theta ** (-np.arange(count) / count), jnp.float32)


def _waves(
    places: Float[Array, 'batch tokens axes'], omega: Float[Array, ' count']
) -> tuple[Float[Array, 'batch tokens 1 features'], Float[Array, 'batch tokens 1 features']]:
    angle = (places[..., None] * omega[None, None, None]).reshape(*places.shape[:2], -1)
    angle = jnp.concatenate([angle, angle], -1)[:, :, None]
    return jnp.sin(angle), jnp.cos(angle)


class Variation(NamedTuple):
    """How rotary positions vary at random in training, in arrays that blocks are given.

    Attributes:
      places: of the tokens, as for `rotation`; any for those that are not turned.
      turned: which tokens have positions.
      omega: `rotary_frequencies`.
      limits: most that is added to places; greatest factor along each axis, and of all together,
        whose least are their inverses.
    """

    places: Float[Array, 'batch tokens axes']
    turned: Bool[Array, ' tokens']
    omega: Float[Array, ' count']
    limits: Float[Array, ' three']


def varied(variation: Variation, key: Array) -> Float[Array, 'batch tokens axes']:
    """Return places shifted and stretched along each axis, then scaled, at random as in DINOv3.

    One draw is for all tokens of all examples; factors are uniform in their logarithm.
    """
    axes = variation.places.shape[-1]
    draw = jax.random.uniform(key, (2 * axes + 1,), minval=-1, maxval=1)
    shift, jitter, rescale = variation.limits
    stretch = jnp.exp(draw[axes : 2 * axes] * jnp.log(jitter) + draw[-1] * jnp.log(rescale))
    return (variation.places + (draw[:axes] * shift)[None, None]) * stretch[None, None]


def varied_rotation(
    variation: Variation, key: Array
) -> tuple[Float[Array, 'batch tokens 1 features'], Float[Array, 'batch tokens 1 features']]:
    """Return sine and cosine of RoPE at `varied` places; of tokens without positions 0 and 1."""
    sin, cos = _waves(varied(variation, key), variation.omega)
    turned = variation.turned[None, :, None, None]
    return jnp.where(turned, sin, 0), jnp.where(turned, cos, 1)


def centres(grid: Grid) -> Float[np.ndarray, '1 tokens axes']:
    """Return the centre of each token, from -1 to 1 along each axis."""
    sizes = np.array(grid, np.float64)
    return ((coordinates(grid) + 0.5) / sizes * 2 - 1)[None].astype(np.float32)


def relative_rows(grid: Grid, prefix: int) -> int:
    """Return the rows of the relative bias table: one per distance, and three for prefix tokens."""
    return math.prod(2 * size - 1 for size in grid) + 3 * (prefix > 0)


def relative_index(grid: Grid, prefix: int) -> Int[np.ndarray, 'tokens tokens']:
    """Return the table row of each (query, key) pair, as in BEiT (arXiv 2106.08254).

    All prefix tokens share three rows: one as the query, one as the key, and one as both.
    """
    places = coordinates(grid).astype(np.int64)
    distance = places[:, None] - places[None]
    index = np.zeros(distance.shape[:2], np.int64)
    for axis, size in enumerate(grid):
        index = index * (2 * size - 1) + distance[..., axis] + size - 1
    if not prefix:
        return index.astype(np.int32)
    rows = relative_rows(grid, prefix)
    with_prefix = np.full((len(index) + prefix,) * 2, rows - 1, np.int64)
    with_prefix[prefix:, prefix:] = index
    with_prefix[:prefix, prefix:] = rows - 3
    with_prefix[prefix:, :prefix] = rows - 2
    return with_prefix.astype(np.int32)


METHODS = ('aligned', 'bilinear', 'bicubic', 'bicubic_antialias')


def _kernel(x: np.ndarray, cubic: float | None) -> np.ndarray:
    """Evaluate a triangle filter, or Keys' cubic filter with this coefficient."""
    x = np.abs(x)
    if cubic is None:
        return np.maximum(1 - x, 0)
    near = ((cubic + 2) * x - (cubic + 3)) * x * x + 1
    far = ((cubic * x - 5 * cubic) * x + 8 * cubic) * x - 4 * cubic
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def resize_matrix(
    old: int, new: int, method: str, offset: float = 0.0
) -> Float[np.ndarray, 'new old']:
    """Return the matrix that resamples a vector of `old` values to `new` values.

    Args:
      offset: added to `new` where it scales coordinates (not by 'aligned'): DINO and DINOv2 were
        trained with 0.1, a guard against rounding that moves all positions a little.
      method: 'aligned' is linear and keeps the end points (as vision_transformer and big_vision do,
        with scipy.ndimage.zoom); 'bilinear' is linear between centres; 'bicubic' is cubic with
        coefficient -0.75 (Hugging Face); 'bicubic_antialias' is cubic with -0.5 and widens when
        shrinking (timm and PIL).
    """
    if old == new:
        return np.eye(old)
    if method == 'aligned':
        ends = np.linspace(0, old - 1, new)
        return _kernel(ends[:, None] - np.arange(old)[None], None)
    scale = old / (new + offset)
    source_points = (np.arange(new, dtype=np.float64) + 0.5) * scale - 0.5
    if method == 'bicubic_antialias':
        filter_width = max(scale, 1.0)
        weights = _kernel((source_points[:, None] - np.arange(old)[None]) / filter_width, -0.5)
        return weights / weights.sum(1, keepdims=True)
    cubic = -0.75 if method == 'bicubic' else None
    matrix: np.ndarray = np.zeros((new, old))
    low = np.floor(source_points).astype(int)
    for tap in range(-1, 3) if cubic is not None else range(2):
        # Values outside repeat the border.
        column = np.clip(low + tap, 0, old - 1)
        np.add.at(matrix, (np.arange(new), column), _kernel(source_points - (low + tap), cubic))
    return matrix


def resize_positions(
    table: Float[np.ndarray, '1 old width'], old: Grid, new: Grid, method: str = 'aligned'
) -> Float[np.ndarray, '1 new width']:
    """Resample learned positions to another grid with `resize_matrix` along each axis.

    The table must not include prefix tokens. If the old grid has fewer axes (image to video), it is
    repeated along the leading new ones.
    """
    if old == new:
        return table
    grid: np.ndarray = np.asarray(table, np.float64).reshape(*old, -1)
    if len(old) < len(new):
        lead = new[: len(new) - len(old)]
        grid = np.broadcast_to(grid, (*lead, *grid.shape))
        old = (*lead, *old)
    for axis, (before, after) in enumerate(zip(old, new, strict=True)):
        matrix = resize_matrix(before, after, method)
        grid = np.moveaxis(np.tensordot(matrix, grid, (1, axis)), 0, axis)
    return grid.reshape(1, math.prod(new), -1).astype(np.float32)


def interpolated(
    table: Float[Array, '1 old width'], old: Grid, new: Grid, offset: float = 0.0
) -> Float[Array, '1 new width']:
    """Return learned positions of another grid, bicubic, as a product that has a derivative."""
    grid = table.reshape(*old, -1)
    for axis, (before, after) in enumerate(zip(old, new, strict=True)):
        matrix = jnp.asarray(resize_matrix(before, after, 'bicubic', offset), table.dtype)
        product = jnp.tensordot(matrix, grid, (1, axis), precision='highest')
        grid = jnp.moveaxis(product, 0, axis)
    return grid.reshape(1, math.prod(new), -1)


def resize_patches(
    kernel: Float[np.ndarray, 'rows columns channels width'], new: tuple[int, int]
) -> Float[np.ndarray, 'new_rows new_columns channels width']:
    """Resize a patch embedding by the pseudo-inverse method of FlexiViT (arXiv 2212.08013).

    A resized patch of the old size gets the same token as before: exactly if patches grow, and as
    nearly as possible if they shrink.
    """
    old = kernel.shape[:2]
    if old == tuple(new):
        return kernel
    resize = np.kron(*(resize_matrix(a, b, 'bilinear') for a, b in zip(old, new, strict=True)))
    # Least-squares solution of x · k = (resize x) · k' for all patches x.
    inverse = np.linalg.pinv(resize.T)
    flat = np.asarray(kernel, np.float64).reshape(old[0] * old[1], -1)
    return (inverse @ flat).reshape(*new, *kernel.shape[2:]).astype(np.float32)


def positions_at(
    table: Float[Array, '1 old width'],
    grid: tuple[int, int],
    share: Float[Array, 'batch tokens 2'],
) -> Float[Array, 'batch tokens width']:
    """Interpolate learned positions between those of the table.

    For share = i / (n - 1), this equals `resize_positions` to n with 'aligned'.

    Args:
      share: 0 at the first and 1 at the last position along each axis.
    """
    image = table.reshape(*grid, -1)
    weights = []
    for axis, size in enumerate(grid):
        coordinate = share[..., axis] * (size - 1)
        distance = jnp.abs(coordinate[..., None] - jnp.arange(size, dtype=jnp.float32)[None, None])
        weights.append(jnp.maximum(1 - distance, 0))
    return jnp.einsum('bnr,bnc,rcd->bnd', *weights, image)
