"""Images of any shape as rows of patches (NaViT, arXiv 2307.06304; NaFlex)."""

import math

import numpy as np
from jaxtyping import Shaped

from big_vit.data.transforms import geometry
from big_vit.data.transforms.operations import (
    Columns,
    Draw,
    Operation,
    UnfitError,
    choice,
    decoded_row,
    pair,
    whole_number,
)

# What a row of patches is made of, beside 'patches' [B, tokens, pixels] itself: which image each
# belongs to, from 1 (0 is padding), its row and column, and how many rows and columns there are.
PARTS = ('patches', 'segment', 'place', 'grid')


def grid_for(height: int, width: int, patch: tuple[int, int], tokens: int) -> tuple[int, int]:
    """(rows, columns) of the largest grid of at most `tokens` patches of the image's proportions.

    Images are made larger as well as smaller. At least one patch each way; an image that is too
    long for that is squeezed.
    """
    high, wide = height / patch[0], width / patch[1]
    scale = math.sqrt(tokens / (high * wide))
    rows = min(max(round(high * scale), 1), tokens)
    columns = min(max(round(wide * scale), 1), tokens)
    while rows * columns > tokens:
        # Shorten the side by which the proportions suffer less.
        fewer_rows = abs(math.log((rows - 1) / columns * wide / high)) if rows > 1 else math.inf
        fewer = abs(math.log(rows / (columns - 1) * wide / high)) if columns > 1 else math.inf
        if fewer_rows <= fewer:
            rows -= 1
        else:
            columns -= 1
    return rows, columns


def cut_up(
    image: Shaped[np.ndarray, 'height width channels'], patch: tuple[int, int]
) -> Shaped[np.ndarray, 'tokens pixels']:
    """The patches of an image that divides into them, row by row, each [row, column, channel]."""
    height, width, channels = image.shape
    rows, columns = height // patch[0], width // patch[1]
    x = image.reshape(rows, patch[0], columns, patch[1], channels).swapaxes(1, 2)
    return x.reshape(rows * columns, -1)


def pack(
    images: list[np.ndarray],
    patch: tuple[int, int],
    tokens: int,
    most: int = 64,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Several images in each row of `tokens` patches, each at its own size.

    Each goes into the first row that has room, the longest first.

    Args:
      images: [height, width, channels] each, that divide into patches.
      most: images in one row.

    Returns:
      The parts of `PARTS`, and 'images' [rows, n], whose shape says how many vectors a row is
      pooled to; and int64 [images, 2], for each image its (row, place in the row).

    Raises:
      ValueError: an image has more patches than a row.
    """
    cut = [cut_up(image, patch) for image in images]
    grids = [(image.shape[0] // patch[0], image.shape[1] // patch[1]) for image in images]
    rows: list[list[int]] = []
    left: list[int] = []
    for i in sorted(range(len(cut)), key=lambda i: -len(cut[i])):
        if len(cut[i]) > tokens:
            raise ValueError(f'an image has {len(cut[i])} patches, a row only {tokens}')
        fits = (r for r in range(len(rows)) if left[r] >= len(cut[i]) and len(rows[r]) < most)
        row = next(fits, len(rows))
        if row == len(rows):
            rows.append([])
            left.append(tokens)
        rows[row].append(i)
        left[row] -= len(cut[i])
    found = _empty(len(rows), tokens, cut[0].shape[1], cut[0].dtype)
    where = np.zeros((len(images), 2), np.int64)
    for row, inside in enumerate(rows):
        start = 0
        for number, i in enumerate(inside):
            end = start + len(cut[i])
            _put(found, row, start, cut[i], grids[i], number + 1)
            where[i], start = (row, number), end
    longest = max(len(inside) for inside in rows)
    return {**found, 'images': np.zeros((len(rows), longest), np.int32)}, where


def _empty(rows: int, tokens: int, size: int, dtype: np.dtype) -> dict[str, np.ndarray]:
    return {
        'patches': np.zeros((rows, tokens, size), dtype),
        'segment': np.zeros((rows, tokens), np.int32),
        'place': np.zeros((rows, tokens, 2), np.int32),
        'grid': np.zeros((rows, tokens, 2), np.int32),
    }


def _put(
    found: dict[str, np.ndarray],
    row: int,
    start: int,
    cut: np.ndarray,
    grid: tuple[int, int],
    segment: int,
) -> None:
    where = row, slice(start, start + len(cut))
    found['patches'][where] = cut
    found['segment'][where] = segment
    found['place'][where] = np.indices(grid).reshape(2, -1).T
    found['grid'][where] = grid


def ragged_patches(patch, tokens, method='area') -> Operation:
    """The image as at most `tokens` patches of its own proportions, and zeros behind them.

    It is resized (made larger too) to the largest grid of patches that fits.
    """
    patch = pair(patch)
    tokens = whole_number('tokens', tokens, 1)
    choice('method', method, *geometry.METHODS)

    def apply(columns: Columns, draw: Draw) -> Columns:
        if 'image' not in columns:
            raise UnfitError(f'needs images, but these examples have {", ".join(sorted(columns))}')
        images = columns['image']
        found: dict[str, np.ndarray] = {}
        for i in range(len(images)):
            image = decoded_row(images, i)
            height, width = image.shape[:2]
            grid = grid_for(height, width, patch, tokens)
            size = grid[0] * patch[0], grid[1] * patch[1]
            cut = cut_up(geometry.resized(image, size, method), patch)
            if not found:
                found = _empty(len(images), tokens, cut.shape[1], cut.dtype)
            if cut.shape[1] != found['patches'].shape[2]:
                raise UnfitError('needs images of the same channels: put rgb or grayscale before')
            _put(found, i, 0, cut, grid, 1)
        rest = {name: column for name, column in columns.items() if name != 'image'}
        return {**rest, **found}

    return Operation(apply)


OPERATIONS = {'ragged_patches': ragged_patches}
