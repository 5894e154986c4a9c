"""Images of any shape packed into rows of patches (NaViT, arXiv 2307.06304; NaFlex)."""

import math

import numpy as np
from jaxtyping import Shaped

from big_vit.data import decode
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

# The fields of a row of patches: 'patches' [B, tokens, pixels] itself, the number of the image
# that a patch belongs to (from 1; 0 is padding), its (row, column), and the (rows, columns) of the
# image.
PARTS = ('patches', 'segment', 'place', 'grid')


def grid_for(height: int, width: int, patch: tuple[int, int], tokens: int) -> tuple[int, int]:
    """Find the (rows, columns) of the largest grid that keeps the proportions of an image.

    The grid has at most `tokens` patches of (height, width) `patch`, and at least one each way, for
    which a very long image is squeezed. Images are enlarged as well as shrunk.
    """
    high, wide = height / patch[0], width / patch[1]
    scale = math.sqrt(tokens / (high * wide))
    rows = min(max(round(high * scale), 1), tokens)
    columns = min(max(round(wide * scale), 1), tokens)
    while rows * columns > tokens:
        # Shorten the side that changes the proportions less.
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
    """Cut an image into its patches, row by row, flattened as [row, column, channel]."""
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
    """Pack several images at their own sizes into rows of `tokens` patches.

    Images go into the first row that has room, the longest first.

    Args:
      images: [height, width, channels], with sides that are multiples of the patch's.
      patch: (height, width) in pixels.
      tokens: patches in a row.
      most: the largest number of images in a row.

    Returns:
      The fields `PARTS`, and 'images' [rows, n], whose shape says how many vectors a row is pooled
      to; and int64 [images, 2], the (row, place in the row) of every image.

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
    fields = _empty(len(rows), tokens, cut[0].shape[1], cut[0].dtype)
    where = np.zeros((len(images), 2), np.int64)
    for row, inside in enumerate(rows):
        start = 0
        for number, i in enumerate(inside):
            end = start + len(cut[i])
            _put(fields, row, start, cut[i], grids[i], number + 1)
            where[i], start = (row, number), end
    longest = max(len(inside) for inside in rows)
    return {**fields, 'images': np.zeros((len(rows), longest), np.int32)}, where


def _empty(rows: int, tokens: int, size: int, dtype: np.dtype) -> dict[str, np.ndarray]:
    return {
        'patches': np.zeros((rows, tokens, size), dtype),
        'segment': np.zeros((rows, tokens), np.int32),
        'place': np.zeros((rows, tokens, 2), np.int32),
        'grid': np.zeros((rows, tokens, 2), np.int32),
    }


def _put(
    fields: dict[str, np.ndarray],
    row: int,
    start: int,
    cut: np.ndarray,
    grid: tuple[int, int],
    segment: int,
) -> None:
    where = row, slice(start, start + len(cut))
    fields['patches'][where] = cut
    fields['segment'][where] = segment
    fields['place'][where] = np.indices(grid).reshape(2, -1).T
    fields['grid'][where] = grid


def ragged_patches(patch, tokens, method='area') -> Operation:
    """Cut the image into at most `tokens` patches in its own proportions, padded with zeros.

    It is resized, and enlarged where it is small, to the largest grid of patches that fits.
    """
    patch = pair(patch)
    tokens = whole_number('tokens', tokens, 1, decode.MAX_PIXELS // (patch[0] * patch[1]))
    choice('method', method, *geometry.METHODS)

    def apply(columns: Columns, draw: Draw) -> Columns:
        if 'image' not in columns:
            raise UnfitError(f'needs images, but these examples have {", ".join(sorted(columns))}')
        images = columns['image']
        fields: dict[str, np.ndarray] = {}
        for i in range(len(images)):
            image = decoded_row(images, i)
            height, width = image.shape[:2]
            grid = grid_for(height, width, patch, tokens)
            size = grid[0] * patch[0], grid[1] * patch[1]
            cut = cut_up(geometry.resized(image, size, method), patch)
            if not fields:
                fields = _empty(len(images), tokens, cut.shape[1], cut.dtype)
            if cut.shape[1] != fields['patches'].shape[2]:
                raise UnfitError('needs images of the same channels: put rgb or grayscale before')
            _put(fields, i, 0, cut, grid, 1)
        rest = {name: column for name, column in columns.items() if name != 'image'}
        return {**rest, **fields}

    return Operation(apply)


OPERATIONS = {'ragged_patches': ragged_patches}
