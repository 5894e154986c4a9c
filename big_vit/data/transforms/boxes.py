"""The objects of a picture as arrays of one shape."""

from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from big_vit.data.moves import OBJECTS, chosen
from big_vit.data.transforms.operations import (
    BadExampleError,
    Columns,
    Draw,
    Operation,
    UnfitError,
    need_images,
    sizes,
    whole_number,
)

# Boxes of a picture that any model looks for; arrays of more would not fit.
MOST_BOXES = 10_000
# Masks are given at a fraction of the picture's sides, as models predict them.
MASK_STRIDE = 4


def boxes(most, masks=False) -> Operation:
    """Make arrays of `most` objects a picture; it is the last operation that sees objects.

    Crowds are left out. `boxes` become (centre x, centre y, width, height) as shares of the picture
    without what was padded, float32 [most, 4]; `box_label` int32 [most], -1 where there is no
    object; with masks `box_mask` is uint8 [most, height / 4, width / 4] of the canvas.

    Args:
      most: objects of a picture; an example with more is refused, or skipped.
      masks: whether masks are wanted.
    """
    most = whole_number('most', most, 1, MOST_BOXES)
    if not isinstance(masks, bool):
        raise UnfitError(f'takes True or False for masks, not {masks!r}')

    def apply(columns: Columns, draw: Draw) -> Columns:
        need_images(columns)
        if not isinstance(columns.get('boxes'), list):
            again = ' once, the last of all' if 'boxes' in columns else ''
            has = f': these examples have {", ".join(sorted(columns))}'
            raise UnfitError(f'takes boxes{again or has}')
        if masks and 'box_mask' not in columns:
            raise UnfitError('needs masks, which these data have not: write masks=False')
        if 'box_crowd' in columns:
            columns = chosen(columns, [~crowd for crowd in columns['box_crowd']])
        heights, widths = sizes(columns['image'])
        if 'picture_size' in columns:
            heights, widths = np.asarray(columns['picture_size']).T
        rest = {name: column for name, column in columns.items() if name not in OBJECTS}
        shares, labels = _fixed(columns, heights, widths, most)
        size = np.stack([heights, widths], axis=1).astype(np.int32)
        made = {**rest, 'boxes': shares, 'box_label': labels, 'picture_size': size}
        return {**made, 'box_mask': _small_masks(columns, most)} if masks else made

    return Operation(apply, step='keeps', carries=True)


def _fixed(
    columns: Columns, heights: np.ndarray, widths: np.ndarray, most: int
) -> tuple[Float32[np.ndarray, 'b most 4'], Int32[np.ndarray, 'b most']]:
    """Return the boxes as shares, and the labels, of `most` objects a picture."""
    count = len(columns['boxes'])
    shares = np.zeros((count, most, 4), np.float32)
    labels = np.full((count, most), -1, np.int32)
    for row, (own, label) in enumerate(zip(columns['boxes'], columns['box_label'], strict=True)):
        if len(own) > most:
            raise BadExampleError(
                row, f'has {len(own):,} objects, more than boxes({most}) takes: write more there'
            )
        corners = own.astype(np.float64).reshape(-1, 2, 2) / (widths[row], heights[row])
        low, high = corners[:, 0], corners[:, 1]
        shares[row, : len(own)] = np.concatenate([(low + high) / 2, high - low], axis=1)
        labels[row, : len(own)] = label
    return shares, labels


def _small_masks(columns: Columns, most: int) -> UInt8[np.ndarray, 'b most height width']:
    """Return masks at a fourth of the sides, 1 where most of a small pixel is of the object."""
    height, width = columns['image'][0].shape[:2]
    if height % MASK_STRIDE or width % MASK_STRIDE:
        raise UnfitError(f'with masks takes sides that are multiples of {MASK_STRIDE}')
    size = height // MASK_STRIDE, width // MASK_STRIDE
    small = np.zeros((len(columns['box_mask']), most, *size), np.uint8)
    for row, masks in enumerate(columns['box_mask']):
        pixels = _pixels(masks, row)
        if pixels.shape[1:] != (height, width):
            raise UnfitError('with masks takes pictures of one size: put pad_to(size) before it')
        blocks = pixels.reshape(-1, size[0], MASK_STRIDE, size[1], MASK_STRIDE)
        small[row, : len(pixels)] = 2 * blocks.sum(axis=(2, 4), dtype=np.int32) >= MASK_STRIDE**2
    return small


def _pixels(masks: Any, row: int) -> np.ndarray:
    try:
        return masks.pixels()
    except (ValueError, TypeError, KeyError) as error:
        raise BadExampleError(row, f'a mask is damaged ({error})') from error


OPERATIONS = {'boxes': boxes}
