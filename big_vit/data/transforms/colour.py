"""Operations on the colours and the sharpness of RGB bytes; pixels are Pillow's.

Exactly: brightness, contrast, solarize, posterize, equalize, autocontrast, luma, JPEG. Saturation
and sharpness are off by at most 1, in less than one of a thousand values: where a blend comes to
a whole number but for the last bits of a float32, Pillow may cut it to the one below. Hues and
blurs say what they are.
"""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import UInt8

from big_vit.data.transforms import randaug
from big_vit.data.transforms.operations import (
    Operation,
    Real,
    UnfitError,
    each,
    need_bytes,
    need_channels,
    number,
    span,
    whole,
)

Image = UInt8[np.ndarray, 'height width 3']

# What the four parts of a jitter are, in the order of its arguments.
KINDS = ('brightness', 'contrast', 'saturation', 'hue')
_ORDERS = tuple(itertools.permutations(range(len(KINDS))))
# Of red, green and blue in luma (ITU-R BT.601), in Pillow's 65536ths, and a half to round.
_LUMA = np.array([[19595, 38470, 7471, 32768]], np.float32) / 65536


def checked(image: np.ndarray) -> Image:
    """The image in one piece, as OpenCV wants it; UnfitError where it is not RGB bytes."""
    need_bytes(image)
    need_channels(image, 3)
    return np.ascontiguousarray(image)


# Pixels. Functions of one image, which they leave as it is.


def luma(image: Image) -> UInt8[np.ndarray, 'height width']:
    """The grey of each pixel, as Pillow's mode L."""
    import cv2

    # Exact, since 24 bits hold 8 bits times 16; OpenCV's own conversion is now and then off by 1.
    return cv2.transform(image.astype(np.float32), _LUMA).astype(np.uint8)


def grey(image: Image) -> Image:
    """Luma in all three channels."""
    import cv2

    return cv2.cvtColor(luma(image), cv2.COLOR_GRAY2RGB)


def enhanced(image: Image, kind: str, factor: Real) -> Image:
    """Pillow's ImageEnhance: 1 is the image itself, 0 what it is blended with.

    Args:
      image: uint8 [H, W, 3].
      kind: brightness, contrast, saturation or sharpness.
      factor: at least 0.
    """
    import cv2

    if kind == 'brightness':
        return _away_from(image, 0, factor)
    if kind == 'contrast':
        return _away_from(image, int(cv2.mean(luma(image))[0] + 0.5), factor)
    if kind == 'saturation':
        return randaug._blend(grey(image), image, factor)
    assert kind == 'sharpness', kind
    kernel = np.ones((3, 3), np.float32)
    kernel[1, 1] = 5
    smooth = image.copy()
    if min(image.shape[:2]) > 2:
        smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, kernel / 13)[1:-1, 1:-1]
    return randaug._blend(smooth, image, factor)


def _away_from(image: Image, value: int, factor: Real) -> Image:
    """The blend with an image of one value, which is a table; in float32, as Pillow has it."""
    away = np.arange(256, dtype=np.float32) - np.float32(value)
    return randaug._look_up(image, np.clip(value + np.float32(factor) * away, 0, 255))


def shifted_hue(image: Image, shift: Real) -> Image:
    """Hue turned by `shift` of a full circle, to one of 256 hues.

    Hue and saturation are bytes on the way, as Pillow's and so torchvision's are, which puts
    colours off by up to 10 levels, 0.2 in the mean of a photograph; Pillow's as much.
    """
    import cv2

    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(shift * 256) % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def solarized(image: Image, threshold: int) -> Image:
    """Values from `threshold` on inverted."""
    values = np.arange(256)
    return randaug._look_up(image, np.where(values < threshold, values, 255 - values))


def posterized(image: Image, bits: int) -> Image:
    """The highest `bits` bits alone."""
    return image & np.uint8(256 - (1 << (8 - bits)))


def equalized(image: Image) -> Image:
    """The histogram of each channel made flat."""
    return randaug.equalize(image, 0.0, 1, np.zeros(2))


def autocontrasted(image: Image) -> Image:
    """Each channel stretched to 0..255."""
    return randaug.autocontrast(image, 0.0, 1, np.zeros(2))


def blurred(image: Image, sigma: Real) -> Image:
    """A true Gaussian blur of deviation `sigma` pixels, the image mirrored at its border.

    Rounded once, unlike `cv2.GaussianBlur` of bytes, whose weights are of 8 bits.
    """
    import cv2

    # What lies more than four deviations out would be a thirtieth of a level.
    kernel = cv2.getGaussianKernel(2 * max(1, int(np.ceil(4 * sigma))) + 1, sigma, cv2.CV_32F)
    return cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)


def reencoded(image: Image, quality: int) -> Image:
    """Through JPEG with colours at half the size, as Pillow saves it and `decode` reads it."""
    import cv2
    import simplejpeg

    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    # Not simplejpeg: its transform is a rougher one below quality 96.
    _, data = cv2.imencode('.jpg', bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return simplejpeg.decode_jpeg(data, fastdct=False, fastupsample=False)


# Operations.


def _sometimes(
    p: Any, function: Callable[[Image, np.ndarray], np.ndarray], draws: int = 0
) -> Operation:
    """A function of (image, numbers [draws]) with probability p; not random if it cannot be."""
    share = number('p', p, 0, 1)

    def apply(image: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        image = checked(image)
        if share == 1:
            return function(image, numbers)
        return function(image, numbers[1:]) if numbers[0] < share else image

    return each(apply, draws if share == 1 else 1 + draws)


def _bounds(name: str, value: Any) -> tuple[float, float]:
    """(low, high) of a factor, or of hue, from one number or two, as torchvision reads it."""
    least, most = (-0.5, 0.5) if name == 'hue' else (0, 1e3)
    if isinstance(value, tuple | list):
        return span(name, value, least, most)
    strength = number(name, value, 0, most)
    if name == 'hue':
        return -strength, strength
    return max(0.0, 1 - strength), 1 + strength


def color_jitter(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, p=1.0) -> Operation:
    """Factors uniform in [max(0, 1 - x), 1 + x], hue in [-x, x], in a random order.

    Two numbers instead of x are the bounds themselves.
    """
    values = (brightness, contrast, saturation, hue)
    bounds = [_bounds(kind, value) for kind, value in zip(KINDS, values, strict=True)]
    nothing = [(1.0, 1.0)] * 3 + [(0.0, 0.0)]

    def jitter(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        for which in _ORDERS[int(draws[4] * len(_ORDERS))]:
            if bounds[which] == nothing[which]:
                continue
            low, high = bounds[which]
            value = low + (high - low) * draws[which]
            if KINDS[which] == 'hue':
                image = shifted_hue(image, value)
            else:
                image = enhanced(image, KINDS[which], value)
        return image

    return _sometimes(p, jitter, draws=5)


def random_grayscale(p=0.1) -> Operation:
    """Luma in all three channels with probability p."""
    return _sometimes(p, lambda image, _: grey(image))


def solarize(threshold=128, p=1.0) -> Operation:
    """Values from `threshold` on inverted, with probability p."""
    threshold = whole('threshold', threshold, 0, 256)
    return _sometimes(p, lambda image, _: solarized(image, threshold))


def posterize(bits, p=1.0) -> Operation:
    """The highest `bits` bits alone, with probability p."""
    bits = whole('bits', bits, 1, 8)
    return _sometimes(p, lambda image, _: posterized(image, bits))


def equalize(p=1.0) -> Operation:
    """The histogram of each channel made flat, with probability p."""
    return _sometimes(p, lambda image, _: equalized(image))


def autocontrast(p=1.0) -> Operation:
    """Each channel stretched to 0..255, with probability p."""
    return _sometimes(p, lambda image, _: autocontrasted(image))


def sharpness(factor, p=1.0) -> Operation:
    """Blended with its smoothed self: 0 is smooth, 1 the image, 2 sharp; with probability p."""
    factor = number('factor', factor, 0, 100)
    return _sometimes(p, lambda image, _: enhanced(image, 'sharpness', factor))


def gaussian_blur(low=0.1, high=2.0, p=1.0) -> Operation:
    """A Gaussian blur whose deviation is uniform from low to high pixels, with probability p."""
    low, high = span('(low, high)', (low, high), 0.01, 100)

    def blur(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        return blurred(image, low + (high - low) * draws[0])

    return _sometimes(p, blur, draws=1)


def gamma(low=0.7, high=1.5, p=1.0) -> Operation:
    """Values to a power that is uniform from low to high, with probability p."""
    low, high = span('(low, high)', (low, high), 0.01, 100)

    def apply(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        power = low + (high - low) * draws[0]
        return randaug._look_up(image, np.rint(255 * (np.arange(256) / 255) ** power))

    return _sometimes(p, apply, draws=1)


def jpeg_quality(low=30, high=95, p=1.0) -> Operation:
    """Through JPEG of a quality uniform from low to high, with probability p."""
    low, high = whole('low', low, 1, 100), whole('high', high, 1, 100)
    if low > high:
        raise UnfitError(f'takes low <= high, not {low} and {high}')

    def apply(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        return reencoded(image, low + int(draws[0] * (high - low + 1)))

    return _sometimes(p, apply, draws=1)


OPERATIONS = {
    operation.__name__: operation
    for operation in (
        color_jitter,
        random_grayscale,
        solarize,
        posterize,
        equalize,
        autocontrast,
        sharpness,
        gaussian_blur,
        gamma,
        jpeg_quality,
    )
}
