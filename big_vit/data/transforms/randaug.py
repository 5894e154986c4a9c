"""The sixteen operations of RandAugment (arXiv 1909.13719) as ImageNet ViTs are trained with.

The set and the strengths are those of the TensorFlow variant, the pixels those of Pillow's
ImageOps and ImageEnhance, from which that variant was written. At magnitude 10, which its
results were made with, it differs from the public code in these:

* contrast turns about the mean grey value; the public code takes height * width / 256 for
  the mean, which is 196 at 224 pixels whatever the image (big_vision issue 109);
* solarize inverts from 256 - 25.6 * magnitude on, as AutoAugment's does; the public threshold
  grows with the magnitude and is 0 at 10 only by an overflow of uint8 (issue 110);
* posterize keeps 8 - 0.4 * magnitude bits; the public code keeps 0.4 * magnitude of them,
  the same at 10 but a black image at 0;
* translate and cutout are shares of the image, equal to the public 100 and 40 pixels at 224,
  which would leave nothing of a small image;
* smoothed values (sharpness) are rounded as Pillow's, not cut off.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8

from big_vit.data.transforms.operations import (
    STREAMS,
    Operation,
    each,
    need_bytes,
    need_channels,
    number,
    whole,
)

Image = UInt8[np.ndarray, 'height width 3']
Table = UInt8[np.ndarray, '256'] | UInt8[np.ndarray, '256 3']

DRAWS = 4
# What the public code leaves where nothing of the image is.
_GREY = 128


def apply(image: Image, magnitude: float, draws: Float[np.ndarray, '4']) -> Image:
    """One of the operations, each as likely as the others; none leaves the image alone.

    Args:
      image: is not changed.
      magnitude: 10 is the strength that AutoAugment's search went up to.
      draws: in [0, 1), for the choice, the sign, and the two coordinates of cutout.
    """
    operation = SIXTEEN[int(draws[0] * len(SIXTEEN))]
    return operation(image, magnitude / 10, -1 if draws[1] < 0.5 else 1, draws[2:])


# Operations on one image [H, W, 3]. `strength` is magnitude / 10, `sign` 1 or -1, and `at`
# two numbers in [0, 1); each operation uses what it needs of them.


def autocontrast(image: Image, strength: float, sign: int, at: np.ndarray) -> Image:
    """Each channel stretched to 0..255."""
    histograms = _histograms(image)
    table = np.tile(np.arange(256, dtype=np.uint8)[:, None], 3)
    for c, histogram in enumerate(histograms):
        seen = np.flatnonzero(histogram)
        low, high = int(seen[0]), int(seen[-1])
        if high > low:
            scale = 255.0 / (high - low)
            table[:, c] = np.clip(np.arange(256) * scale - low * scale, 0, 255)
    return _look_up(image, table)


def equalize(image: Image, strength: float, sign: int, at: np.ndarray) -> Image:
    """The histogram of each channel made flat."""
    table = np.tile(np.arange(256, dtype=np.uint8)[:, None], 3)
    for c, histogram in enumerate(_histograms(image)):
        step = (histogram.sum() - histogram[np.flatnonzero(histogram)[-1]]) // 255
        if step:
            below = histogram.cumsum() - histogram
            table[:, c] = np.minimum((below + step // 2) // step, 255)
    return _look_up(image, table)


def invert(image: Image, strength: float, sign: int, at: np.ndarray) -> Image:
    """Black to white and back."""
    return 255 - image


def rotate(image: Image, strength: float, sign: int, at: np.ndarray) -> Image:
    """About the centre, by 30 degrees at magnitude 10."""
    angle = np.deg2rad(sign * strength * 30)
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.array([[cos, -sin, 0], [sin, cos, 0]])
    centre = (np.array(image.shape[1::-1]) - 1) / 2
    matrix[:, 2] = centre - matrix[:, :2] @ centre
    return _warp(image, matrix)


def posterize(image: Image, strength: float, sign: int, at: np.ndarray) -> Image:
    """The highest bits alone, four of them at magnitude 10."""
    bits = max(1, 8 - int(4 * strength))
    return image & np.uint8(256 - (1 << 8 - bits))


def solarize(image: Image, strength: float, sign: int, at: np.ndarray) -> Image:
    """Bright pixels inverted; all of them at magnitude 10."""
    grey = np.arange(256)
    return _look_up(image, np.where(grey < 256 - int(256 * strength), grey, 255 - grey))


def solarize_add(image: Image, strength: float, sign: int, at: np.ndarray) -> Image:
    """Dark pixels made brighter, by 110 at magnitude 10."""
    grey = np.arange(256)
    return _look_up(image, np.where(grey < 128, np.minimum(grey + int(110 * strength), 255), grey))


def color(image: Image, strength: float, sign: int, at: np.ndarray) -> Image:
    """Away from grey; below magnitude 5 towards it, as in the next three."""
    import cv2

    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return _blend(cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB), image, _factor(strength))


def contrast(image: Image, strength: float, sign: int, at: np.ndarray) -> Image:
    """Away from the mean grey value of the image."""
    import cv2

    mean = int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return _look_up(image, _away_from(mean, _factor(strength)))


def brightness(image: Image, strength: float, sign: int, at: np.ndarray) -> Image:
    """Away from black."""
    return _look_up(image, _away_from(0, _factor(strength)))


def sharpness(image: Image, strength: float, sign: int, at: np.ndarray) -> Image:
    """Away from the smoothed image; the border stays."""
    import cv2

    kernel = np.ones((3, 3), np.float32)
    kernel[1, 1] = 5
    smooth = image.copy()
    smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, kernel / 13)[1:-1, 1:-1]
    return _blend(smooth, image, _factor(strength))


def shear_x(image: Image, strength: float, sign: int, at: np.ndarray) -> Image:
    """Rows moved by 0.3 of their distance to the top at magnitude 10."""
    return _warp(image, np.array([[1, sign * strength * 0.3, 0], [0, 1, 0]]))


def shear_y(image: Image, strength: float, sign: int, at: np.ndarray) -> Image:
    """Columns moved by 0.3 of their distance to the left at magnitude 10."""
    return _warp(image, np.array([[1, 0, 0], [sign * strength * 0.3, 1, 0]]))


def translate_x(image: Image, strength: float, sign: int, at: np.ndarray) -> Image:
    """Sideways, by 100 pixels of 224 at magnitude 10."""
    pixels = sign * round(strength * image.shape[1] * 100 / 224)
    return _warp(image, np.array([[1.0, 0, pixels], [0, 1, 0]]))


def translate_y(image: Image, strength: float, sign: int, at: np.ndarray) -> Image:
    """Up or down, by 100 pixels of 224 at magnitude 10."""
    pixels = sign * round(strength * image.shape[0] * 100 / 224)
    return _warp(image, np.array([[1.0, 0, 0], [0, 1, pixels]]))


def cutout(image: Image, strength: float, sign: int, at: np.ndarray) -> Image:
    """A grey window about a pixel anywhere, 80 pixels of 224 wide and high at magnitude 10."""
    spans = []
    for length, where in zip(image.shape[:2], at, strict=True):
        centre, reach = int(where * length), round(strength * length * 40 / 224)
        spans.append(slice(max(0, centre - reach), centre + reach))
    image = image.copy()
    image[*spans] = _GREY
    return image


SIXTEEN: tuple[Callable[[Image, float, int, np.ndarray], Image], ...] = (
    autocontrast,
    equalize,
    invert,
    rotate,
    posterize,
    solarize,
    solarize_add,
    color,
    contrast,
    brightness,
    sharpness,
    shear_x,
    shear_y,
    translate_x,
    translate_y,
    cutout,
)


def _factor(strength: float) -> float:
    """1 is the image itself: 0.1 at magnitude 0, 1.9 at 10."""
    return 0.1 + 1.8 * strength


def _blend(away: Image, image: Image, factor: float) -> Image:
    """away + factor * (image - away), cut off to whole numbers of 0..255."""
    import cv2

    # addWeighted rounds to the nearest; 0.4999 less of it cuts off, 1e-4 is for its rounding.
    return cv2.addWeighted(image, factor, away, 1 - factor, -0.4999)


def _away_from(grey: int, factor: float) -> Table:
    """What `_blend` does to each value, where `away` is of one grey."""
    values = grey + factor * (np.arange(256) - grey)
    return np.clip(np.floor(values + 1e-4), 0, 255).astype(np.uint8)


def _look_up(image: Image, table: np.ndarray) -> Image:
    """table[value] of each pixel, or table[value, channel]."""
    import cv2

    return cv2.LUT(image, table.astype(np.uint8).reshape(1, 256, -1))


def _histograms(image: Image) -> np.ndarray:
    """How often each value comes in each channel, int64 [3, 256]."""
    import cv2

    counts = [cv2.calcHist([image], [c], None, [256], [0, 256]) for c in range(3)]
    return np.array(counts).reshape(3, 256).astype(np.int64)


def _warp(image: Image, matrix: np.ndarray) -> Image:
    """The pixel at matrix @ (x, y, 1) for each (x, y), grey where there is none."""
    import cv2

    size = image.shape[1::-1]
    flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, matrix, size, flags=flags, borderValue=(_GREY,) * 3)


def randaug(layers, magnitude) -> Operation:
    """RandAugment on RGB images: `layers` of the sixteen in a row, in the TensorFlow variant."""
    layers = whole('layers', layers, 1, STREAMS // DRAWS)
    magnitude = number('magnitude', magnitude, 0, 30)

    def augment(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        need_bytes(image)
        need_channels(image, 3)
        image = np.ascontiguousarray(image)
        for layer in draws.reshape(layers, DRAWS):
            image = apply(image, magnitude, layer)
        return image

    return each(augment, layers * DRAWS)


OPERATIONS = {'randaug': randaug}
