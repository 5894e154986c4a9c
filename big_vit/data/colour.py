"""Operations on the colours and the sharpness of images of bytes; pixels as Pillow's, mostly.

Brightness, contrast, saturation and sharpness are those of Pillow's ImageEnhance, equalize,
autocontrast, solarize and posterize those of its ImageOps: torchvision's are the same.
"""

import numpy as np

from big_vit.data import randaug
from big_vit.data.operations import (
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

Image = np.ndarray


def _rgb(image: Image) -> Image:
    """Checked, and in one piece as OpenCV wants it."""
    need_bytes(image)
    need_channels(image, 3)
    return np.ascontiguousarray(image)


def enhanced(image: Image, kind: str, factor: Real) -> Image:
    """Pillow's ImageEnhance: 1 is the image itself, 0 what it is blended with.

    Args:
      image: uint8 [H, W, 3].
      kind: brightness, contrast, saturation or sharpness.
    """
    import cv2

    if kind == 'brightness':
        return randaug._look_up(image, randaug._away_from(0, factor))
    if kind == 'contrast':
        mean = int(cv2.mean(_grey(image))[0] + 0.5)
        return randaug._look_up(image, randaug._away_from(mean, factor))
    if kind == 'saturation':
        return randaug._blend(cv2.cvtColor(_grey(image), cv2.COLOR_GRAY2RGB), image, factor)
    kernel = np.ones((3, 3), np.float32)
    kernel[1, 1] = 5
    smooth = image.copy()
    if min(image.shape[:2]) > 2:
        smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, kernel / 13)[1:-1, 1:-1]
    return randaug._blend(smooth, image, factor)


def _grey(image: Image) -> Image:
    """Luma, [H, W]."""
    import cv2

    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def shifted_hue(image: Image, shift: Real) -> Image:
    """Hue turned by `shift` of a full circle, in the HSV of OpenCV with 256 hues."""
    import cv2

    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(shift * 256) % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def _strength(name: str, value: object, most: Real) -> tuple[float, float]:
    """(low, high) of a factor, from one number or two, as torchvision reads it."""
    if isinstance(value, tuple | list):
        return span(name, value, -most if name == 'hue' else 0, most if name == 'hue' else 1e3)
    strength = number(name, value, 0, most)
    if name == 'hue':
        return -strength, strength
    return max(0.0, 1 - strength), 1 + strength


# Of the four things that are changed, in an order drawn anew for each image.
_ORDERS = [
    (a, b, c, d)
    for a in range(4)
    for b in range(4)
    for c in range(4)
    for d in range(4)
    if len({a, b, c, d}) == 4
]


def color_jitter(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, p=1.0) -> Operation:
    """Factors uniform in [1 - x, 1 + x] (or two bounds), hue in [-x, x], in a random order."""
    bounds = [
        _strength('brightness', brightness, 1e3),
        _strength('contrast', contrast, 1e3),
        _strength('saturation', saturation, 1e3),
        _strength('hue', hue, 0.5),
    ]
    p = number('p', p, 0, 1)
    kinds = ('brightness', 'contrast', 'saturation', 'hue')

    def jitter(image: Image, draws: np.ndarray) -> Image:
        image = _rgb(image)
        if draws[5] >= p:
            return image
        for which in _ORDERS[int(draws[4] * len(_ORDERS))]:
            low, high = bounds[which]
            value = low + (high - low) * draws[which]
            if kinds[which] == 'hue':
                image = shifted_hue(image, value) if low != high else image
            elif (low, high) != (1.0, 1.0):
                image = enhanced(image, kinds[which], value)
        return image

    return each(jitter, 6)


def _sometimes(p: object, function) -> Operation:
    """A function of (image, draws [2]) with probability p."""
    share = number('p', p, 0, 1)

    def apply(image: Image, draws: np.ndarray) -> Image:
        image = _rgb(image)
        return function(image, draws[1:]) if draws[0] < share else image

    return each(apply, 3)


def random_grayscale(p=0.1) -> Operation:
    """Luma in all three channels with probability p."""
    import cv2

    return _sometimes(p, lambda image, draws: cv2.cvtColor(_grey(image), cv2.COLOR_GRAY2RGB))


def solarized(image: Image, threshold: int) -> Image:
    """Values from `threshold` on inverted."""
    values = np.arange(256)
    return randaug._look_up(image, np.where(values < threshold, values, 255 - values))


def posterized(image: Image, bits: int) -> Image:
    """The highest `bits` bits alone."""
    return image & np.uint8(256 - (1 << (8 - bits)))


def solarize(threshold=128, p=1.0) -> Operation:
    """Values from `threshold` on inverted, with probability p."""
    threshold = whole('threshold', threshold, 0, 256)
    return _sometimes(p, lambda image, draws: solarized(image, threshold))


def posterize(bits, p=1.0) -> Operation:
    """The highest `bits` bits alone, with probability p."""
    bits = whole('bits', bits, 1, 8)
    return _sometimes(p, lambda image, draws: posterized(image, bits))


def equalize(p=1.0) -> Operation:
    """The histogram of each channel made flat, with probability p."""
    nothing = np.zeros(2)
    return _sometimes(p, lambda image, draws: randaug.equalize(image, 0.0, 1, nothing))


def autocontrast(p=1.0) -> Operation:
    """Each channel stretched to 0..255, with probability p."""
    nothing = np.zeros(2)
    return _sometimes(p, lambda image, draws: randaug.autocontrast(image, 0.0, 1, nothing))


def sharpness(factor, p=1.0) -> Operation:
    """Blended with its smoothed self: 0 is smooth, 1 the image, 2 sharp; with probability p."""
    factor = number('factor', factor, 0, 100)
    return _sometimes(p, lambda image, draws: enhanced(image, 'sharpness', factor))


def blurred(image: Image, sigma: Real) -> Image:
    """A Gaussian blur of standard deviation `sigma` pixels; borders are mirrored."""
    import cv2

    # Three standard deviations: what lies further out is below one level.
    side = 2 * max(1, int(np.ceil(3 * sigma))) + 1
    return cv2.GaussianBlur(image, (side, side), sigma, borderType=cv2.BORDER_REFLECT_101)


def gaussian_blur(low=0.1, high=2.0, p=1.0) -> Operation:
    """A Gaussian blur whose deviation is uniform from low to high pixels, with probability p."""
    low, high = span('(low, high)', (low, high), 0.01, 100)
    return _sometimes(p, lambda image, draws: blurred(image, low + (high - low) * draws[0]))


def gamma(low=0.7, high=1.5, p=1.0) -> Operation:
    """Values to a power that is uniform from low to high, with probability p."""
    low, high = span('(low, high)', (low, high), 0.01, 100)

    def apply(image: Image, draws: np.ndarray) -> Image:
        power = low + (high - low) * draws[0]
        return randaug._look_up(image, np.rint(255 * (np.arange(256) / 255) ** power))

    return _sometimes(p, apply)


def jpeg_quality(low=30, high=95, p=1.0) -> Operation:
    """Through JPEG of a quality uniform from low to high, with probability p."""
    low, high = whole('low', low, 1, 100), whole('high', high, 1, 100)
    if low > high:
        raise UnfitError(f'takes low <= high, not {low} and {high}')

    def apply(image: Image, draws: np.ndarray) -> Image:
        import simplejpeg

        quality = low + int(draws[0] * (high - low + 1))
        data = simplejpeg.encode_jpeg(image, quality=quality, colorspace='RGB')
        return simplejpeg.decode_jpeg(data)

    return _sometimes(p, apply)


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
