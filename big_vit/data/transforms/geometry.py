"""Resizing, cropping, flipping and padding of images of any type and number of channels.

Each operation says of what window of an image another is made (`Moves`), by which boxes, masks and
classes of pixels move as well. Sizes are (height, width), or one number for both. Crops of images
that are still encoded decode only the window that they need (`decode.Encoded.window`).
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from big_vit.data import decode
from big_vit.data.moves import Moves, moved
from big_vit.data.preprocessing import CentralCrop, Resize, Step
from big_vit.data.transforms.operations import (
    MOST_SIDE,
    BadExampleError,
    Columns,
    Draw,
    Images,
    Operation,
    Real,
    UnfitError,
    choice,
    decoded,
    decoded_row,
    need_images,
    need_room,
    number,
    on_images,
    pair,
    sizes,
    span,
    stacked,
    whole_number,
)

METHODS = ('area', 'bilinear', 'bicubic', 'nearest')
_INCEPTION_ATTEMPTS = 16
_MOST_CHANNELS = 4  # OpenCV resizes no more at once.
_RRC_ATTEMPTS = 10

Rows = Int64[np.ndarray, ' batch']


def geometric(
    function: Callable[[Images, Draw], tuple[Images, Moves]],
    random: bool = False,
    step: Step | None = None,
) -> Operation:
    """Make an operation from a function that returns images, and how their pixels moved."""

    def apply(columns: Columns, draw: Draw) -> Columns:
        need_images(columns)
        if 'picture_size' in columns:
            raise UnfitError(
                'moves the picture: put it before pad_to, large_scale_jitter and boxes'
            )
        images, moves = function(columns['image'], draw)
        return moved({**columns, 'image': images}, moves)

    return Operation(apply, random, step=step, carries=True)


def resized(
    image: np.ndarray, size: tuple[int, int], method: str, out: np.ndarray | None = None
) -> np.ndarray:
    """Resample an image [H, W, C] to [*size, C], with pixel centres at halves.

    `area` averages areas where the image shrinks, which prevents aliasing, and interpolates
    linearly where it grows. `bilinear` and `bicubic` look at 2x2 and 4x4 pixels whatever the scale,
    as TensorFlow does.

    Args:
      size: (height, width).
      method: one of METHODS.
      out: where to put the result, of its shape and type; it may be put elsewhere nonetheless.
    """
    import cv2

    channels = image.shape[2]
    if image.shape[:2] == size:
        if out is None:
            return image
        out[...] = image
        return out
    if method == 'area':
        shrunk = (min(image.shape[0], size[0]), min(image.shape[1], size[1]))
        steps = [(shrunk, cv2.INTER_AREA), (size, cv2.INTER_LINEAR)]
    else:
        kernel = {'bilinear': cv2.INTER_LINEAR, 'bicubic': cv2.INTER_CUBIC}
        steps = [(size, kernel.get(method, cv2.INTER_NEAREST_EXACT))]
    for target, how in steps:
        if image.shape[:2] == target:
            continue
        if channels <= _MOST_CHANNELS:
            last = out if target == size else None
            image = cv2.resize(image, target[::-1], dst=last, interpolation=how)
        else:
            image = np.concatenate(
                [
                    cv2.resize(
                        np.ascontiguousarray(image[..., c : c + _MOST_CHANNELS]),
                        target[::-1],
                        interpolation=how,
                    ).reshape(*target, -1)
                    for c in range(0, channels, _MOST_CHANNELS)
                ],
                axis=2,
            )
    return image.reshape(*size, channels)


def _cropped(
    images: Images,
    boxes: tuple[Rows, Rows, Rows, Rows],
    size: tuple[int, int],
    method: str,
) -> Images:
    """Cut a window (top, left, height, width) from each image and resize it to `size`."""
    out: np.ndarray | None = None
    crops = []
    windows = zip(*(sides.tolist() for sides in boxes), strict=True)
    for row, (top, left, height, width) in enumerate(windows):
        image = images[row]
        if isinstance(image, decode.Encoded):
            try:
                window = image.window(top, left, height, width, size)
            except decode.DecodeError as error:
                raise BadExampleError(row, str(error)) from error
        else:
            window = image[top : top + height, left : left + width]
        if out is None:
            out = np.empty((len(images), *size, window.shape[2]), window.dtype)
        if window.shape[2] == out.shape[3] and window.dtype == out.dtype:
            crops.append(resized(window, size, method, out[row]))
        else:  # A folder may hold images of several kinds.
            crops.append(resized(window, size, method).copy())
    assert out is not None
    same = all(image.shape == out.shape[1:] and image.dtype == out.dtype for image in crops)
    if not same:
        return crops
    for row, image in enumerate(crops):
        if not np.may_share_memory(image, out):
            out[row] = image
    return out


def _cut(
    images: Images, windows: tuple[Rows, Rows, Rows, Rows], size: tuple[int, int], method: str
) -> tuple[Images, Moves]:
    return _cropped(images, windows, size, method), Moves(*windows, *size)


def _whole_images(images: Images) -> tuple[Rows, Rows, Rows, Rows]:
    heights, widths = sizes(images)
    zeros = np.zeros_like(heights)
    return zeros, zeros, heights, widths


def resize(size, method='area') -> Operation:
    """Resize to exactly this size, whatever that does to the proportions."""
    size = pair(size)
    choice('method', method, *METHODS)

    def apply(images: Images, draw: Draw) -> tuple[Images, Moves]:
        whole = _whole_images(images)
        if isinstance(images, np.ndarray) and images.shape[1:3] == size:
            return images, Moves(*whole, *size)
        return _cut(images, whole, size, method)

    return geometric(apply, step=Resize(size, method))


def cut_to(
    images: Images,
    windows: tuple[Rows, Rows, Rows, Rows],
    targets: list[tuple[int, int]],
    method: str,
) -> tuple[Images, Moves]:
    """Resize a window (top, left, height, width) of every image to its own (height, width)."""
    for row, target in enumerate(targets):
        need_room(row, *target)
    if len(set(targets)) == 1:
        return _cut(images, windows, targets[0], method)
    made = [
        _cut_row(images, row, tuple(side[row : row + 1] for side in windows), target, method)
        for row, target in enumerate(targets)
    ]
    return made, Moves(*windows, *np.array(targets).T)


def _cut_row(images: Images, row: int, window: Any, size: tuple[int, int], method: str) -> Any:
    try:
        return _cropped([images[row]], window, size, method)[0]
    except BadExampleError as error:
        raise BadExampleError(row, str(error)) from error


def _resized_to(
    images: Images, targets: list[tuple[int, int]], method: str
) -> tuple[Images, Moves]:
    """Resize every image to its own target (height, width)."""
    return cut_to(images, _whole_images(images), targets, method)


def _sides(heights: Rows, widths: Rows, scale: np.ndarray, least: int) -> list[tuple[int, int]]:
    h = np.maximum(least, np.rint(heights * scale)).astype(np.int64)
    w = np.maximum(least, np.rint(widths * scale)).astype(np.int64)
    return list(zip(h.tolist(), w.tolist(), strict=True))


def resize_small(n, method='area') -> Operation:
    """Resize the shorter side to n, keeping the proportions."""
    n = whole_number('n', n, 1, MOST_SIDE)
    choice('method', method, *METHODS)

    def apply(images: Images, draw: Draw) -> tuple[Images, Moves]:
        heights, widths = sizes(images)
        scale = n / np.minimum(heights, widths)
        return _resized_to(images, _sides(heights, widths, scale, n), method)

    return geometric(apply, step=Resize(n, method))


def resize_long(n, method='area') -> Operation:
    """Resize the longer side to n, keeping the proportions."""
    n = whole_number('n', n, 1, MOST_SIDE)
    choice('method', method, *METHODS)

    def apply(images: Images, draw: Draw) -> tuple[Images, Moves]:
        heights, widths = sizes(images)
        scale = n / np.maximum(heights, widths)
        return _resized_to(images, _sides(heights, widths, scale, 1), method)

    return geometric(apply)


def resize_short(sides, most=None, method='area') -> Operation:
    """Resize the shorter side to one of `sides`, drawn at random, with a limit for the longer one.

    Proportions are kept; lengths are rounded as DETR does (arXiv 2005.12872).

    Args:
      sides: one length, or several of which one is drawn.
      most: the longest longer side, for which the shorter one becomes shorter.
      method: of resizing.
    """
    lengths = _lengths('sides', sides)
    most = MOST_SIDE if most is None else whole_number('most', most, max(lengths), MOST_SIDE)
    choice('method', method, *METHODS)

    def apply(images: Images, draw: Draw) -> tuple[Images, Moves]:
        heights, widths = sizes(images)
        short, long = np.minimum(heights, widths), np.maximum(heights, widths)
        side = _drawn(lengths, draw, 0, len(heights))
        side = np.where(long / short * side > most, np.rint(most * short / long), side)
        side = np.maximum(1, side).astype(np.int64)
        other = np.maximum(1, side * long // short)
        tall = np.where(heights > widths, other, side)
        wide = np.where(heights > widths, side, other)
        return _resized_to(images, list(zip(tall.tolist(), wide.tolist(), strict=True)), method)

    step = Resize(lengths[0], method) if len(lengths) == 1 and most == MOST_SIDE else None
    return geometric(apply, random=len(lengths) > 1, step=step)


def _lengths(name: str, value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, tuple | list) and value else (value,)
    return tuple(whole_number(name, each, 1, MOST_SIDE) for each in values)


def _drawn(values: tuple[int, ...], draw: Draw, stream: int, count: int) -> np.ndarray:
    """Draw one of some values for each image; nothing is drawn of one."""
    if len(values) == 1:
        return np.full(count, values[0])
    return np.array(values)[(draw(stream) * len(values)).astype(np.int64)]


def scaled_crop(sides=(400, 500, 600), low=384, high=600, p=0.5) -> Operation:
    """With probability p cut out a window of random sides, as DETR does (arXiv 2005.12872).

    Height and width are uniform from `low` to `high` pixels of a copy whose shorter side is one of
    `sides`, and the window lies anywhere. It is cut from the picture as it is, so that a resize
    follows.
    """
    lengths, p = _lengths('sides', sides), number('p', p, 0, 1)
    low = whole_number('low', low, 1, min(lengths))
    high = whole_number('high', high, low, MOST_SIDE)

    def apply(images: Images, draw: Draw) -> tuple[Images, Moves]:
        is_cut = draw(0) < p
        short = np.minimum(*sizes(images))
        side = _drawn(lengths, draw, 1, len(short))
        windows = []
        for axis, old in enumerate(sizes(images)):
            copy = side * old // short
            length = low + (draw(2 + axis) * (np.minimum(copy, high) - low + 1)).astype(np.int64)
            start = (draw(4 + axis) * (copy - length + 1)).astype(np.int64)
            first = np.where(is_cut, np.rint(start * old / copy), 0).astype(np.int64)
            cut = np.clip(np.rint(length * old / copy), 1, old - first).astype(np.int64)
            windows.append((first, np.where(is_cut, cut, old)))
        (tops, tall), (lefts, wide) = windows
        targets = list(zip(tall.tolist(), wide.tolist(), strict=True))
        return cut_to(images, (tops, lefts, tall, wide), targets, 'area')

    return geometric(apply, random=p > 0)


def _slack(images: Images, size: tuple[int, int]) -> tuple[Rows, Rows]:
    """Return how far down and right a window of this size can move in each image, int64 [B] each.

    Raises:
      UnfitError: it does not fit into one of them.
    """
    heights, widths = sizes(images)
    small = np.flatnonzero((heights < size[0]) | (widths < size[1]))
    if small.size:
        raise UnfitError(
            f'cannot cut {size[0]}x{size[1]} from {heights[small[0]]}x{widths[small[0]]} images: '
            'put resize or resize_small before it'
        )
    return heights - size[0], widths - size[1]


def _windows(
    images: Images, tops: Rows, lefts: Rows, size: tuple[int, int]
) -> tuple[Images, Moves]:
    same = np.ones_like(tops)
    return _cut(images, (tops, lefts, same * size[0], same * size[1]), size, 'area')


def central_crop(size) -> Operation:
    """Cut a window from the middle of the image."""
    size = pair(size)

    def apply(images: Images, draw: Draw) -> tuple[Images, Moves]:
        down, right = _slack(images, size)
        if isinstance(images, np.ndarray):
            top, left = int(down[0]) // 2, int(right[0]) // 2
            middle = images[:, top : top + size[0], left : left + size[1]]
            return middle, Moves(top, left, *size, *size)
        return _windows(images, down // 2, right // 2, size)

    return geometric(apply, step=CentralCrop(size))


def _padded(images: Images, n: int, value: int, mode: str) -> Images:
    how = {'constant_values': value} if mode == 'constant' else {}
    border = ((n, n), (n, n), (0, 0))
    for row, (height, width) in enumerate(zip(*(s.tolist() for s in sizes(images)), strict=True)):
        need_room(row, height + 2 * n, width + 2 * n)
    if isinstance(images, np.ndarray):
        return np.pad(images, ((0, 0), *border), mode, **how)  # type: ignore[call-overload]
    return [np.pad(decoded_row(images, i), border, mode, **how) for i in range(len(images))]  # type: ignore[call-overload]


def pad(n, value=0, mode='constant') -> Operation:
    """Add n pixels on each side, of one value or continuing the image by 'reflect' or 'edge'."""
    n = whole_number('n', n, 0, MOST_SIDE)
    choice('mode', mode, 'constant', 'reflect', 'edge')
    whole_number('value', value, 0, 255)

    def apply(images: Images, draw: Draw) -> tuple[Images, Moves]:
        heights, widths = sizes(images)
        size = heights + 2 * n, widths + 2 * n
        return _padded(images, n, value, mode), Moves(-n, -n, *size, *size)

    return geometric(apply)


def random_crop(size, pad=0) -> Operation:
    """Cut a window anywhere from the image, after adding `pad` black pixels on each side."""
    size = pair(size)
    pad = whole_number('pad', pad, 0, MOST_SIDE)

    def apply(images: Images, draw: Draw) -> tuple[Images, Moves]:
        images = _padded(images, pad, 0, 'constant') if pad else images
        down, right = _slack(images, size)
        tops = (draw(0) * (down + 1)).astype(np.int64)
        lefts = (draw(1) * (right + 1)).astype(np.int64)
        images, _ = _windows(images, tops, lefts, size)
        return images, Moves(tops - pad, lefts - pad, *size, *size)

    return geometric(apply, random=True)


def inception_boxes(
    heights: Rows, widths: Rows, draw: Draw, min_area: Real, max_area: Real
) -> tuple[Rows, Rows, Rows, Rows]:
    """Draw windows as TensorFlow's sample_distorted_bounding_box does.

    The proportions width / height are uniform in [0.75, 1.33]; the height is uniform among the
    whole numbers that keep the area within its bounds and the window inside the image, so that
    small windows are rarer than if the area were uniform; the window never touches the last
    row or column unless it fills the side. A draw that rounding puts outside is repeated at most
    15 times (TensorFlow: 99), after which the whole image is taken.

    Args:
      draw: returns uniform numbers by stream, float64 [batch].
      min_area: the smallest area as a fraction of the image.
      max_area: the largest, likewise.

    Returns:
      (top, left, height, width) in pixels, int64 [batch] each.
    """
    least, most = min_area * heights * widths, max_area * heights * widths
    tops, lefts = np.zeros_like(heights), np.zeros_like(widths)
    h, w = heights.copy(), widths.copy()
    pending = np.ones(len(heights), bool)
    for attempt in range(_INCEPTION_ATTEMPTS):
        first = 4 * attempt
        aspect = 0.75 + (1.33 - 0.75) * draw(first)
        low = np.rint(np.sqrt(least / aspect)).astype(np.int64)
        high = np.rint(np.sqrt(most / aspect)).astype(np.int64)
        wide = np.rint(high * aspect) > widths
        fitting = ((widths + 0.5 - 1e-7) / aspect).astype(np.int64)
        fitting -= np.rint(fitting * aspect) > widths
        high = np.minimum(np.where(wide, fitting, high), heights)
        low = np.minimum(low, high)
        tall = low + (draw(first + 1) * (high - low + 1)).astype(np.int64)
        across = np.rint(tall * aspect).astype(np.int64)
        tall += tall * across < least
        across = np.rint(tall * aspect).astype(np.int64)
        tall -= tall * across > most
        across = np.rint(tall * aspect).astype(np.int64)
        area = tall * across
        fits = (area >= least) & (area <= most) & (tall <= heights) & (across <= widths)
        take = pending & fits & (tall > 0) & (across > 0)
        top = (draw(first + 2) * (heights - tall)).astype(np.int64)
        left = (draw(first + 3) * (widths - across)).astype(np.int64)
        for chosen, value in ((h, tall), (w, across), (tops, top), (lefts, left)):
            chosen[take] = value[take]
        pending &= ~take
        if not pending.any():
            break
    return tops, lefts, h, w


def inception_crop(size, min_area=0.05, max_area=1.0, method='bilinear') -> Operation:
    """Resize a window of random area and proportions, as TensorFlow draws it (arXiv 1409.4842)."""
    size = pair(size)
    low, high = _areas(min_area, max_area)
    choice('method', method, *METHODS)

    def apply(images: Images, draw: Draw) -> tuple[Images, Moves]:
        return _cut(images, inception_boxes(*sizes(images), draw, low, high), size, method)

    return geometric(apply, random=True)


def _areas(min_area, max_area) -> tuple[float, float]:
    low, high = span('(min_area, max_area)', (min_area, max_area), 0, 1)
    if low == 0:
        raise UnfitError(f'takes a fraction in (0, 1] for min_area, not {min_area!r}')
    return low, high


def rrc_boxes(
    heights: Rows,
    widths: Rows,
    draw: Draw,
    scale: tuple[Real, Real],
    ratio: tuple[Real, Real],
) -> tuple[Rows, Rows, Rows, Rows]:
    """Draw windows as torchvision's RandomResizedCrop does.

    The area is uniform in `scale` and the logarithm of width / height is uniform between those of
    `ratio`. The first of ten draws that fits is taken, else the largest central window of allowed
    proportions.

    Args:
      draw: returns uniform numbers by stream, float64 [batch].
      scale: (least, most) area as a fraction of the image.
      ratio: (least, most) width / height.

    Returns:
      (top, left, height, width) in pixels, int64 [batch] each.
    """
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    clamped = np.clip(widths / heights, *ratio)
    h = np.where(widths / heights < ratio[0], np.rint(widths / clamped), heights).astype(np.int64)
    w = np.where(widths / heights > ratio[1], np.rint(heights * clamped), widths).astype(np.int64)
    h, w = np.clip(h, 1, heights), np.clip(w, 1, widths)
    tops, lefts = (heights - h) // 2, (widths - w) // 2
    pending = np.ones(len(heights), bool)
    for attempt in range(_RRC_ATTEMPTS):
        first = 4 * attempt
        area = heights * widths * (scale[0] + (scale[1] - scale[0]) * draw(first))
        aspect: Float64[np.ndarray, ' batch'] = np.exp(
            log_low + (log_high - log_low) * draw(first + 1)
        )
        tall = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        across = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        take = pending & (tall > 0) & (across > 0) & (tall <= heights) & (across <= widths)
        top = (draw(first + 2) * (heights - tall + 1)).astype(np.int64)
        left = (draw(first + 3) * (widths - across + 1)).astype(np.int64)
        for chosen, value in ((h, tall), (w, across), (tops, top), (lefts, left)):
            chosen[take] = value[take]
        pending &= ~take
        if not pending.any():
            break
    return tops, lefts, h, w


def rrc(size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), method='area') -> Operation:
    """Resize a window of random area and proportions, as torchvision and timm draw it."""
    size = pair(size)
    low, high = span('scale', scale, 0, 1)
    if low == 0:
        raise UnfitError(f'takes fractions in (0, 1] for scale, not {scale!r}')
    narrow, broad = span('ratio', ratio, 1e-3, 1e3)
    choice('method', method, *METHODS)

    def apply(images: Images, draw: Draw) -> tuple[Images, Moves]:
        windows = rrc_boxes(*sizes(images), draw, (low, high), (narrow, broad))
        return _cut(images, windows, size, method)

    return geometric(apply, random=True)


def resmall_crop(size, small=None, method='area') -> Operation:
    """Resize the shorter side to `small` (8/7 of the size by default) and cut a window anywhere."""
    size = pair(size)
    small = (
        round(max(size) * 8 / 7)
        if small is None
        else whole_number('small', small, max(size), MOST_SIDE)
    )
    choice('method', method, *METHODS)

    def apply(images: Images, draw: Draw) -> tuple[Images, Moves]:
        heights, widths = sizes(images)
        # The window is cut from the original, so that nothing else is decoded and resized.
        scale = np.minimum(heights, widths) / small
        h = np.clip(np.rint(size[0] * scale), 1, heights).astype(np.int64)
        w = np.clip(np.rint(size[1] * scale), 1, widths).astype(np.int64)
        tops = (draw(0) * (heights - h + 1)).astype(np.int64)
        lefts = (draw(1) * (widths - w + 1)).astype(np.int64)
        return _cut(images, (tops, lefts, h, w), size, method)

    return geometric(apply, random=True)


def _flipped(images: Images, which: np.ndarray, axis: int) -> Images:
    import cv2

    images = decoded(images)
    out: Any = np.empty_like(images) if isinstance(images, np.ndarray) else [None] * len(images)
    for row, (image, turn) in enumerate(zip(images, which.tolist(), strict=True)):
        if not turn:
            out[row] = image
        elif image.shape[2] <= _MOST_CHANNELS:
            # NumPy copies reversed views value by value, which takes twenty times as long.
            turned = cv2.flip(image, axis)
            out[row] = turned.reshape(image.shape)
        else:
            out[row] = np.flip(image, axis)
    return out if isinstance(out, np.ndarray) else stacked(out)


def exif_transpose() -> Operation:
    """Turn each image as the orientation tag of its file says, as viewers do; arrays have none."""

    def apply(images: Images, draw: Draw) -> Images:
        if isinstance(images, np.ndarray):
            return images
        return [_upright(images, row) for row in range(len(images))]

    return on_images(apply, step='upright')


def _upright(images: Images, row: int) -> Any:
    image = images[row]
    if not isinstance(image, decode.Encoded) or image.orientation == 1:
        return image
    return decode.upright(decoded_row(images, row), image.orientation)


def flip_lr(p=0.5) -> Operation:
    """Mirror left to right with probability p."""
    return _flip(number('p', p, 0, 1), 1)


def flip_ud(p=0.5) -> Operation:
    """Mirror top to bottom with probability p."""
    return _flip(number('p', p, 0, 1), 0)


def _flip(p: float, axis: int) -> Operation:
    def apply(images: Images, draw: Draw) -> tuple[Images, Moves]:
        which = draw(0) < p
        whole = _whole_images(images)
        turned = (which, False) if axis == 1 else (False, which)
        return _flipped(images, which, axis), Moves(*whole, *whole[2:], *turned)

    return geometric(apply, random=0 < p < 1)


OPERATIONS = {
    operation.__name__: operation
    for operation in (
        exif_transpose,
        resize,
        resize_small,
        resize_long,
        resize_short,
        scaled_crop,
        central_crop,
        random_crop,
        resmall_crop,
        inception_crop,
        rrc,
        flip_lr,
        flip_ud,
        pad,
    )
}
