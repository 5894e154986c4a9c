"""Pictures of any shape on canvases of one size, in their upper left corner, for detection.

`picture_size`, int32 (height, width), says how much of the canvas the picture is.
"""

import numpy as np

from big_vit.data.moves import Moves, moved
from big_vit.data.transforms import geometry
from big_vit.data.transforms.operations import (
    MOST_SIDE,
    Columns,
    Draw,
    Images,
    Operation,
    UnfitError,
    choice,
    decoded_row,
    need_images,
    need_room,
    number,
    pair,
    sizes,
    span,
    stacked,
    whole_number,
)


def _colour(value) -> tuple[int, ...]:
    values = value if isinstance(value, tuple | list) else (value,)
    if len(values) not in (1, 3):
        raise UnfitError(f'takes one value or three for value, not {value!r}')
    return tuple(whole_number('value', each, 0, 255) for each in values)


def _laid(
    images: Images, targets: list[tuple[int, int]], colour: tuple[int, ...]
) -> list[np.ndarray]:
    """Lay each image into the upper left corner of a canvas of its own (height, width)."""
    laid = []
    for row, target in enumerate(targets):
        need_room(row, *target)
        image = decoded_row(images, row)
        if image.shape[:2] == target:
            laid.append(image)
            continue
        if len(colour) not in (1, image.shape[2]):
            raise UnfitError(f'takes one value for images of {image.shape[2]} channels')
        canvas = np.empty((*target, image.shape[2]), image.dtype)
        canvas[: image.shape[0], image.shape[1] :] = colour
        canvas[image.shape[0] :] = colour
        canvas[: image.shape[0], : image.shape[1]] = image
        laid.append(canvas)
    return laid


def _with_sizes(columns: Columns, heights: np.ndarray, widths: np.ndarray) -> Columns:
    return {**columns, 'picture_size': np.stack([heights, widths], axis=1).astype(np.int32)}


def pad_to(size=None, multiple=None, value=0) -> Operation:
    """Pad at the bottom and the right to a size, or to sides that are multiples of a number.

    Args:
      size: (height, width), or one number for both.
      multiple: of pixels, instead of a size.
      value: of the pixels that are added, one or three.
    """
    if (size is None) == (multiple is None):
        raise UnfitError('takes a size, or multiple=N, and not both')
    target = None if size is None else pair(size)
    step = 1 if multiple is None else whole_number('multiple', multiple, 1, MOST_SIDE)
    colour = _colour(value)

    def apply(columns: Columns, draw: Draw) -> Columns:
        need_images(columns)
        _need_first(columns)
        images = columns['image']
        heights, widths = sizes(images)
        tall, wide = (-(-sides // step) * step for sides in (heights, widths))
        if target is not None:
            large = np.flatnonzero((heights > target[0]) | (widths > target[1]))
            if large.size:
                shown = f'{heights[large[0]]}x{widths[large[0]]}'
                raise UnfitError(
                    f'has room for {target[0]}x{target[1]}, not for pictures of {shown}: put '
                    'resize_long or resize_short(side, most=SIDE) before it'
                )
            tall, wide = (np.full_like(heights, side) for side in target)
        made = _laid(images, list(zip(tall.tolist(), wide.tolist(), strict=True)), colour)
        laid = {**columns, 'image': stacked(made)}
        return _with_sizes(moved(laid, Moves(0, 0, tall, wide, tall, wide)), heights, widths)

    return Operation(apply, carries=True)


def _need_first(columns: Columns) -> None:
    if 'picture_size' in columns:
        raise UnfitError('comes once, before boxes: the canvas is made already')


def large_scale_jitter(size, scale=(0.1, 2.0), value=0, method='area') -> Operation:
    """Resize by a random factor, then cut out or pad to a canvas (arXiv 2012.07177).

    A factor of 1 makes the picture fit the canvas exactly, in its own proportions. Where it is then
    larger than the canvas a window anywhere is cut out, elsewhere it is padded at the bottom and
    the right.

    Args:
      size: (height, width) of the canvas, or one number for both.
      scale: (least, most) factor, of which one is drawn uniformly.
      value: of the pixels that are added, one or three.
      method: of resizing.
    """
    size = pair(size)
    low, high = span('scale', scale, 0, 100)
    number('scale', low, 1e-3, 100)
    choice('method', method, *geometry.METHODS)
    colour = _colour(value)

    def apply(columns: Columns, draw: Draw) -> Columns:
        need_images(columns)
        _need_first(columns)
        images = columns['image']
        heights, widths = sizes(images)
        factor = low + (high - low) * draw(0)
        factor = factor * np.minimum(size[0] / heights, size[1] / widths)
        windows, shown, spread = [], [], []
        for axis, (sides, most) in enumerate(zip((heights, widths), size, strict=True)):
            grown = np.maximum(1, np.rint(sides * factor)).astype(np.int64)
            visible = np.minimum(grown, most)
            # Cut from the original, so that nothing else is decoded and resized.
            length = np.clip(np.rint(visible * sides / grown), 1, sides).astype(np.int64)
            start = np.rint((sides - length) * draw(1 + axis)).astype(np.int64)
            windows.append((start, length))
            shown.append(visible)
            spread.append(length * most / visible)
        (tops, tall), (lefts, wide) = windows
        targets = list(zip(shown[0].tolist(), shown[1].tolist(), strict=True))
        cut, _ = geometry.cut_to(images, (tops, lefts, tall, wide), targets, method)
        laid = {**columns, 'image': stacked(_laid(cut, [size] * len(targets), colour))}
        moves = Moves(tops, lefts, spread[0], spread[1], *size)
        return _with_sizes(moved(laid, moves), *shown)

    return Operation(apply, random=True, carries=True)


OPERATIONS = {operation.__name__: operation for operation in (pad_to, large_scale_jitter)}
