"""Where tokens are: tables, rotations and biases of position, and tables on another grid.

A grid is the number of tokens along each axis: (rows, columns) of an image, (frames, rows,
columns) of a video, (length,) of words. Tokens lie in that order, the last axis fastest.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Grid = tuple[int, ...]
LAWS = ('sincos2d', 'sincos2d_mae')


def coordinates(grid: Grid) -> Float[np.ndarray, 'tokens axes']:
    """The place of each token along each axis: 0, 1, ..."""
    axes = np.meshgrid(*(np.arange(size, dtype=np.float64) for size in grid), indexing='ij')
    return np.stack([axis.reshape(-1) for axis in axes], -1)


def divides(width: int, axes: int) -> bool:
    """Whether sine-cosine positions of so many axes fit a width; of three the rest stays zero."""
    return width % 2 == 0 and width >= 6 if axes == 3 else width % (2 * axes) == 0


def frequencies(width: int, axes: int, law: str) -> Float[np.ndarray, ' count']:
    """The rates at which the waves of one axis turn, of which each gives a sine and a cosine.

    Raises:
      ValueError: the width does not divide.
    """
    if not divides(width, axes):
        raise ValueError(f'{law} needs a width divisible by {2 * axes}, got {width}')
    count = width // (2 * axes)
    last = max(count - 1, 1) if law == 'sincos2d' else count
    return 10_000.0 ** (-np.arange(count) / last)


def sincos(grid: Grid, width: int, law: str = 'sincos2d') -> Float[np.ndarray, '1 tokens width']:
    """Fixed sine-cosine positions; each axis has its own part of the width, the last axis first.

    Three axes leave what does not divide by six at zero.

    'sincos2d' is the form of MoCo v3 (arXiv 2104.02057), whose slowest wave has a rate of
    1/10,000; 'sincos2d_mae' that of MAE (arXiv 2111.06377), which stops one step before.

    Raises:
      ValueError: the width does not divide by two for each axis.
    """
    omega = frequencies(width, len(grid), law)
    waves = []
    for place in coordinates(grid).T[::-1]:
        angle = place[:, None] * omega
        waves += [np.sin(angle), np.cos(angle)]
    table = np.concatenate(waves, axis=1)
    return np.pad(table, ((0, 0), (0, width - table.shape[1])))[None].astype(np.float32)


def sincos_at(
    context: Float[Array, 'batch tokens axes'], width: int, law: str = 'sincos2d'
) -> Float[Array, 'batch tokens width']:
    """What `sincos` has at these coordinates."""
    omega = jnp.asarray(frequencies(width, context.shape[-1], law), jnp.float32)
    waves = []
    for axis in reversed(range(context.shape[-1])):
        angle = context[..., axis, None] * omega[None, None]
        waves += [jnp.sin(angle), jnp.cos(angle)]
    table = jnp.concatenate(waves, -1)
    return jnp.pad(table, ((0, 0), (0, 0), (0, width - table.shape[-1])))


def rotation(
    context: Float[Array, 'batch tokens axes'], head_dim: int, theta: float
) -> tuple[Float[Array, 'batch tokens 1 features'], Float[Array, 'batch tokens 1 features']]:
    """Sine and cosine of RoPE in the form of DINOv3 (arXiv 2508.10104).

    Args:
      places: of the tokens' centres, from -1 at one border to 1 at the other, so that another
        resolution has the same angles.
      head_dim: features of one head; pairs are (i, i + head_dim / 2).
      theta: ratio of the fastest to the slowest rate; a radian is 1 / (2 pi) of the way there.

    Raises:
      ValueError: head_dim does not divide by two for each axis.
    """
    axes = context.shape[-1]
    if head_dim % (2 * axes):
        raise ValueError(
            f"posemb='rope' needs heads of a width divisible by {2 * axes}, got {head_dim}"
        )
    count = head_dim // (2 * axes)
    omega = jnp.asarray(2 * np.pi * theta ** (-np.arange(count) / count), jnp.float32)
    angle = (context[..., None] * omega[None, None, None]).reshape(*context.shape[:2], -1)
    angle = jnp.concatenate([angle, angle], -1)[:, :, None]
    return jnp.sin(angle), jnp.cos(angle)


def centres(grid: Grid) -> Float[np.ndarray, '1 tokens axes']:
    """The middle of each token on a scale of -1..1 along each axis."""
    sizes = np.array(grid, np.float64)
    return ((coordinates(grid) + 0.5) / sizes * 2 - 1)[None].astype(np.float32)


def relative_rows(grid: Grid, prefix: int) -> int:
    """Rows that the table of relative biases has: one a distance, three of prefix tokens."""
    return math.prod(2 * size - 1 for size in grid) + 3 * (prefix > 0)


def relative_index(grid: Grid, prefix: int) -> Int[np.ndarray, 'tokens tokens']:
    """Which row of the table of biases the pair (query, key) has (as BEiT, arXiv 2106.08254).

    Prefix tokens have three rows together: as the query, as the key, and as both.
    """
    context = coordinates(grid).astype(np.int64)
    distance = context[:, None] - context[None]
    index = np.zeros(distance.shape[:2], np.int64)
    for axis, size in enumerate(grid):
        index = index * (2 * size - 1) + distance[..., axis] + size - 1
    if not prefix:
        return index.astype(np.int32)
    rows = relative_rows(grid, prefix)
    whole = np.full((len(index) + prefix,) * 2, rows - 1, np.int64)
    whole[prefix:, prefix:] = index
    whole[:prefix, prefix:] = rows - 3
    whole[prefix:, :prefix] = rows - 2
    return whole.astype(np.int32)


METHODS = ('aligned', 'bilinear', 'bicubic', 'bicubic_antialias')


def _kernel(x: np.ndarray, cubic: float | None) -> np.ndarray:
    """A tent, or the cubic of Keys with this coefficient."""
    x = np.abs(x)
    if cubic is None:
        return np.maximum(1 - x, 0)
    near = ((cubic + 2) * x - (cubic + 3)) * x * x + 1
    far = ((cubic * x - 5 * cubic) * x + 8 * cubic) * x - 4 * cubic
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def resize_matrix(old: int, new: int, method: str) -> Float[np.ndarray, 'new old']:
    """What a vector of `old` values is multiplied with to have `new` of them.

    Args:
      method: 'aligned': linear, ends stay where they are (as vision_transformer and big_vision,
        scipy.ndimage.zoom); 'bilinear': linear between centres; 'bicubic': the cubic with -0.75,
        as Hugging Face's; 'bicubic_antialias': with -0.5, made wider when shrinking, as timm's
        and PIL's.
    """
    if old == new:
        return np.eye(old)
    if method == 'aligned':
        ends = np.linspace(0, old - 1, new)
        return _kernel(ends[:, None] - np.arange(old)[None], None)
    scale = old / new
    at = (np.arange(new, dtype=np.float64) + 0.5) * scale - 0.5
    if method == 'bicubic_antialias':
        wide = max(scale, 1.0)
        weights = _kernel((at[:, None] - np.arange(old)[None]) / wide, -0.5)
        return weights / weights.sum(1, keepdims=True)
    cubic = -0.75 if method == 'bicubic' else None
    matrix: np.ndarray = np.zeros((new, old))
    low = np.floor(at).astype(int)
    for tap in range(-1, 3) if cubic is not None else range(2):
        # What lies outside has the value of the border.
        column = np.clip(low + tap, 0, old - 1)
        np.add.at(matrix, (np.arange(new), column), _kernel(at - (low + tap), cubic))
    return matrix


def resize_positions(
    table: Float[np.ndarray, '1 old width'], old: Grid, new: Grid, method: str = 'aligned'
) -> Float[np.ndarray, '1 new width']:
    """Learned positions on another grid, by `resize_matrix` along each axis.

    Prefix tokens are not part of the table. A grid of fewer axes, an image for a video, is
    repeated along the leading ones.
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


def resize_patches(
    kernel: Float[np.ndarray, 'rows columns channels width'], new: tuple[int, int]
) -> Float[np.ndarray, 'new_rows new_columns channels width']:
    """A patch embedding for patches of another size (FlexiViT, arXiv 2212.08013).

    The pseudo-inverse of the resize: a patch that is a resized one of the old size gives the
    same token (exactly where it grows).
    """
    old = kernel.shape[:2]
    if old == tuple(new):
        return kernel
    both = np.kron(*(resize_matrix(a, b, 'bilinear') for a, b in zip(old, new, strict=True)))
    # x . k = (both x) . k' for all x, as nearly as can be.
    inverse = np.linalg.pinv(both.T)
    flat = np.asarray(kernel, np.float64).reshape(old[0] * old[1], -1)
    return (inverse @ flat).reshape(*new, *kernel.shape[2:]).astype(np.float32)


def positions_at(
    table: Float[Array, '1 old width'],
    grid: tuple[int, int],
    share: Float[Array, 'batch tokens 2'],
) -> Float[Array, 'batch tokens width']:
    """Learned positions between those of the table; `share` is 0 at its first and 1 at its last.

    With share = i / (n - 1) it is `resize_positions` to n, 'aligned'.
    """
    image = table.reshape(*grid, -1)
    weights = []
    for axis, size in enumerate(grid):
        at = share[..., axis] * (size - 1)
        distance = jnp.abs(at[..., None] - jnp.arange(size, dtype=jnp.float32)[None, None])
        weights.append(jnp.maximum(1 - distance, 0))
    return jnp.einsum('bnr,bnc,rcd->bnd', *weights, image)
