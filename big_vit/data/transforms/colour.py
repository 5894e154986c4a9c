"""Colour operations on RGB bytes, with probabilities and random strengths."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from big_vit.data.transforms import pixels
from big_vit.data.transforms.operations import (
    Operation,
    UnfitError,
    need_bytes,
    need_channels,
    number,
    per_image,
    span,
    whole_number,
)
from big_vit.data.transforms.pixels import Image

# The parts of a jitter, in the order of its arguments.
KINDS = ('brightness', 'contrast', 'saturation', 'hue')
_ORDERS = tuple(itertools.permutations(range(len(KINDS))))


def contiguous_rgb(image: np.ndarray) -> Image:
    """Check that an image is RGB bytes, and copy it where OpenCV needs it in one piece.

    Raises:
      UnfitError: it has other channels or another type.
    """
    need_bytes(image)
    need_channels(image, 3)
    return np.ascontiguousarray(image)


def _sometimes(
    p: Any, function: Callable[[Image, np.ndarray], np.ndarray], draws: int = 0
) -> Operation:
    """Apply a function of (image, random numbers [draws]) with probability p.

    With p = 1 nothing is drawn for the choice, so the operation may not be random at all.
    """
    probability = number('p', p, 0, 1)

    def apply(image: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        image = contiguous_rgb(image)
        if probability == 1:
            return function(image, numbers)
        return function(image, numbers[1:]) if numbers[0] < probability else image

    return per_image(apply, draws if probability == 1 else 1 + draws, carries=True)


def factor_bounds(name: str, value: Any) -> tuple[float, float]:
    """Read the (low, high) of a factor or a hue from one number or two, as torchvision does."""
    least, most = (-0.5, 0.5) if name == 'hue' else (0, 1e3)
    if isinstance(value, tuple | list):
        return span(name, value, least, most)
    strength = number(name, value, 0, most)
    if name == 'hue':
        return -strength, strength
    return max(0.0, 1 - strength), 1 + strength


def color_jitter(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, p=1.0) -> Operation:
    """Jitter colours by factors uniform in [max(0, 1 - x), 1 + x] and a hue in [-x, x].

    The four changes come in a random order. Two numbers instead of x are the bounds themselves.
    """
    values = (brightness, contrast, saturation, hue)
    bounds = [factor_bounds(kind, value) for kind, value in zip(KINDS, values, strict=True)]
    neutral = [(1.0, 1.0)] * 3 + [(0.0, 0.0)]

    def jitter(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        for part in _ORDERS[int(draws[4] * len(_ORDERS))]:
            if bounds[part] == neutral[part]:
                continue
            low, high = bounds[part]
            value = low + (high - low) * draws[part]
            if KINDS[part] == 'hue':
                image = pixels.shift_hue(image, value)
            else:
                image = pixels.ENHANCEMENTS[KINDS[part]](image, value)
        return image

    return _sometimes(p, jitter, draws=5)


def random_grayscale(p=0.1) -> Operation:
    """Replace all three channels by luma with probability p."""
    return _sometimes(p, lambda image, _: pixels.grayscale(image))


def solarize(threshold=128, p=1.0) -> Operation:
    """Invert the values from `threshold` on with probability p."""
    threshold = whole_number('threshold', threshold, 0, 256)
    return _sometimes(p, lambda image, _: pixels.solarize(image, threshold))


def posterize(bits, p=1.0) -> Operation:
    """Keep the highest `bits` bits of every value with probability p."""
    bits = whole_number('bits', bits, 1, 8)
    return _sometimes(p, lambda image, _: pixels.posterize(image, bits))


def equalize(p=1.0) -> Operation:
    """Flatten the histogram of each channel with probability p."""
    return _sometimes(p, lambda image, _: pixels.equalize(image))


def autocontrast(p=1.0) -> Operation:
    """Stretch each channel to 0..255 with probability p."""
    return _sometimes(p, lambda image, _: pixels.autocontrast(image))


def sharpness(factor, p=1.0) -> Operation:
    """Sharpen or smooth with probability p: 0 is smooth, 1 the image itself, 2 sharp."""
    factor = number('factor', factor, 0, 100)
    return _sometimes(p, lambda image, _: pixels.sharpness(image, factor))


def kernel_size(kernel: Any) -> int | None:
    """Check the length in pixels of the kernel of a blur; None is four deviations to each side."""
    if kernel is None:
        return None
    if type(kernel) is not int or not 1 <= kernel <= 1001 or kernel % 2 == 0:
        raise UnfitError(f'takes an odd whole number up to 1001 for kernel, not {kernel!r}')
    return kernel


def gaussian_blur(low=0.1, high=2.0, p=1.0, kernel=None) -> Operation:
    """Blur by a Gaussian with a deviation uniform from low to high pixels, with probability p.

    `kernel` is its length in pixels, an odd number (torchvision's; 9 in DINOv2); by default four
    deviations to each side.
    """
    low, high = span('(low, high)', (low, high), 0.01, 100)
    kernel = kernel_size(kernel)

    def blur(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        return pixels.gaussian_blur(image, low + (high - low) * draws[0], kernel)

    return _sometimes(p, blur, draws=1)


def gamma(low=0.7, high=1.5, p=1.0) -> Operation:
    """Raise values to a power uniform from low to high, with probability p."""
    low, high = span('(low, high)', (low, high), 0.01, 100)

    def correct(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        return pixels.gamma(image, low + (high - low) * draws[0])

    return _sometimes(p, correct, draws=1)


def jpeg_quality(low=30, high=95, p=1.0) -> Operation:
    """Compress to JPEG at a quality uniform from low to high, with probability p."""
    low, high = whole_number('low', low, 1, 100), whole_number('high', high, 1, 100)
    if low > high:
        raise UnfitError(f'takes low <= high, not {low} and {high}')

    def compress(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        return pixels.jpeg(image, low + int(draws[0] * (high - low + 1)))

    return _sometimes(p, compress, draws=1)


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
