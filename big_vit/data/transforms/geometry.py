"""Resizing, cropping, flipping and padding of images of any type and number of channels.

Sizes are (height, width), or one number for both. Crops of images that are still encoded decode
only the window that they need (`decode.Encoded.window`).
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from big_vit.data import decode
from big_vit.data.preprocessing import CentralCrop, Resize
from big_vit.data.transforms.operations import (
    MOST_SIDE,
    BadExampleError,
    Draw,
    Images,
    Operation,
    Real,
    UnfitError,
    choice,
    decoded,
    decoded_row,
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


def _whole_images(images: Images) -> tuple[Rows, Rows, Rows, Rows]:
    heights, widths = sizes(images)
    zeros = np.zeros_like(heights)
    return zeros, zeros, heights, widths


def resize(size, method='area') -> Operation:
    """Resize to exactly this size, whatever that does to the proportions."""
    size = pair(size)
    choice('method', method, *METHODS)

    def apply(images: Images, draw: Draw) -> Images:
        if isinstance(images, np.ndarray) and images.shape[1:3] == size:
            return images
        return _cropped(images, _whole_images(images), size, method)

    return on_images(apply, step=Resize(size, method))


def _resized_to(images: Images, targets: list[tuple[int, int]], method: str) -> Images:
    """Resize every image to its own target (height, width)."""
    for row, target in enumerate(targets):
        need_room(row, *target)
    if len(set(targets)) == 1:
        return _cropped(images, _whole_images(images), targets[0], method)
    return [_resized_row(images, i, target, method) for i, target in enumerate(targets)]


def _resized_row(images: Images, row: int, size: tuple[int, int], method: str) -> np.ndarray:
    try:
        return _cropped([images[row]], _whole_images([images[row]]), size, method)[0]
    except BadExampleError as error:
        raise BadExampleError(row, str(error)) from error


def _sides(heights: Rows, widths: Rows, scale: np.ndarray, least: int) -> list[tuple[int, int]]:
    h = np.maximum(least, np.rint(heights * scale)).astype(np.int64)
    w = np.maximum(least, np.rint(widths * scale)).astype(np.int64)
    return list(zip(h.tolist(), w.tolist(), strict=True))


def resize_small(n, method='area') -> Operation:
    """Resize the shorter side to n, keeping the proportions."""
    n = whole_number('n', n, 1, MOST_SIDE)
    choice('method', method, *METHODS)

    def apply(images: Images, draw: Draw) -> Images:
        heights, widths = sizes(images)
        scale = n / np.minimum(heights, widths)
        return _resized_to(images, _sides(heights, widths, scale, n), method)

    return on_images(apply, step=Resize(n, method))


def resize_long(n, method='area') -> Operation:
    """Resize the longer side to n, keeping the proportions."""
    n = whole_number('n', n, 1, MOST_SIDE)
    choice('method', method, *METHODS)

    def apply(images: Images, draw: Draw) -> Images:
        heights, widths = sizes(images)
        scale = n / np.maximum(heights, widths)
        return _resized_to(images, _sides(heights, widths, scale, 1), method)

    return on_images(apply)


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


def _windows(images: Images, tops: Rows, lefts: Rows, size: tuple[int, int]) -> Images:
    same = np.ones_like(tops)
    return _cropped(images, (tops, lefts, same * size[0], same * size[1]), size, 'area')


def central_crop(size) -> Operation:
    """Cut a window from the middle of the image."""
    size = pair(size)

    def apply(images: Images, draw: Draw) -> Images:
        down, right = _slack(images, size)
        if isinstance(images, np.ndarray):
            top, left = int(down[0]) // 2, int(right[0]) // 2
            return images[:, top : top + size[0], left : left + size[1]]
        return _windows(images, down // 2, right // 2, size)

    return on_images(apply, step=CentralCrop(size))


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
    return on_images(lambda images, draw: _padded(images, n, value, mode))


def random_crop(size, pad=0) -> Operation:
    """Cut a window anywhere from the image, after adding `pad` black pixels on each side."""
    size = pair(size)
    pad = whole_number('pad', pad, 0, MOST_SIDE)

    def apply(images: Images, draw: Draw) -> Images:
        images = _padded(images, pad, 0, 'constant') if pad else images
        down, right = _slack(images, size)
        tops = (draw(0) * (down + 1)).astype(np.int64)
        lefts = (draw(1) * (right + 1)).astype(np.int64)
        return _windows(images, tops, lefts, size)

    return on_images(apply, random=True)


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

    def apply(images: Images, draw: Draw) -> Images:
        return _cropped(images, inception_boxes(*sizes(images), draw, low, high), size, method)

    return on_images(apply, random=True)


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

    def apply(images: Images, draw: Draw) -> Images:
        boxes = rrc_boxes(*sizes(images), draw, (low, high), (narrow, broad))
        return _cropped(images, boxes, size, method)

    return on_images(apply, random=True)


def resmall_crop(size, small=None, method='area') -> Operation:
    """Resize the shorter side to `small` (8/7 of the size by default) and cut a window anywhere."""
    size = pair(size)
    small = (
        round(max(size) * 8 / 7)
        if small is None
        else whole_number('small', small, max(size), MOST_SIDE)
    )
    choice('method', method, *METHODS)

    def apply(images: Images, draw: Draw) -> Images:
        heights, widths = sizes(images)
        # The window is cut from the original, so that nothing else is decoded and resized.
        scale = np.minimum(heights, widths) / small
        h = np.clip(np.rint(size[0] * scale), 1, heights).astype(np.int64)
        w = np.clip(np.rint(size[1] * scale), 1, widths).astype(np.int64)
        tops = (draw(0) * (heights - h + 1)).astype(np.int64)
        lefts = (draw(1) * (widths - w + 1)).astype(np.int64)
        return _cropped(images, (tops, lefts, h, w), size, method)

    return on_images(apply, random=True)


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


# The eight ways to turn and mirror an image, by the number that EXIF and TIFF have for them.
_TURNS = {
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: image[::-1].swapaxes(0, 1),
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: image[:, ::-1].swapaxes(0, 1),
}


def _upright(images: Images, row: int) -> Any:
    image = images[row]
    if not isinstance(image, decode.Encoded) or image.orientation == 1:
        return image
    return np.ascontiguousarray(_TURNS[image.orientation](decoded_row(images, row)))


def flip_lr(p=0.5) -> Operation:
    """Mirror left to right with probability p."""
    p = number('p', p, 0, 1)
    return on_images(lambda images, draw: _flipped(images, draw(0) < p, 1), random=0 < p < 1)


def flip_ud(p=0.5) -> Operation:
    """Mirror top to bottom with probability p."""
    p = number('p', p, 0, 1)
    return on_images(lambda images, draw: _flipped(images, draw(0) < p, 0), random=0 < p < 1)


OPERATIONS = {
    operation.__name__: operation
    for operation in (
        exif_transpose,
        resize,
        resize_small,
        resize_long,
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
