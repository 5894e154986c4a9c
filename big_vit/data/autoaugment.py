"""Augmentations that draw from a set: timm's RandAugment, TrivialAugment, 3-Augment, AugMix.

Images are RGB bytes. Photometric operations have Pillow's pixels; where an image is warped,
OpenCV's: at the border of the image it blends with the fill, where Pillow cuts, and its
bicubic kernel is a little sharper. The TensorFlow variant of RandAugment is in `randaug`.
"""

from collections.abc import Callable

import numpy as np

from big_vit.data import colour, randaug
from big_vit.data.operations import (
    STREAMS,
    Operation,
    Real,
    UnfitError,
    each,
    need_bytes,
    need_channels,
    number,
    whole,
)

Image = np.ndarray
Fill = tuple[int, int, int]
# The mean of ImageNet, with which timm fills what a warp leaves empty.
_MEAN: Fill = (124, 116, 104)
_BLACK: Fill = (0, 0, 0)
_NOTHING = np.zeros(2)


def _checked(image: Image) -> Image:
    need_bytes(image)
    need_channels(image, 3)
    return np.ascontiguousarray(image)


def warped(image: Image, matrix: np.ndarray, method: str, fill: Fill) -> Image:
    """The pixel at matrix @ (x, y, 1) for each (x, y), centres of pixels being at halves.

    Args:
      matrix: [2, 3].
      method: nearest, bilinear or bicubic.
    """
    import cv2

    kernel = {
        'nearest': cv2.INTER_NEAREST,
        'bilinear': cv2.INTER_LINEAR,
        'bicubic': cv2.INTER_CUBIC,
    }[method]
    shifted = np.array(matrix, np.float64)
    shifted[:, 2] += shifted[:, :2].sum(axis=1) / 2 - 0.5
    flags = kernel | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, shifted, image.shape[1::-1], flags=flags, borderValue=fill)


def rotation(degrees: Real, image: Image) -> np.ndarray:
    """The matrix [2, 3] that turns an image about its centre, counter-clockwise."""
    angle = np.deg2rad(degrees)
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.array([[cos, -sin, 0], [sin, cos, 0]])
    centre = np.array(image.shape[1::-1]) / 2
    matrix[:, 2] = centre - matrix[:, :2] @ centre
    return matrix


def _shear(image: Image, x: Real = 0.0, y: Real = 0.0) -> np.ndarray:
    return np.array([[1, x, 0], [y, 1, 0]])


def _move(x: Real = 0.0, y: Real = 0.0) -> np.ndarray:
    return np.array([[1, 0, x], [0, 1, y]])


# --- RandAugment as timm has it ---------------------------------------------------------

# Of (image, level in [0, 10], sign, method) each.
_Timm = Callable[[Image, float, int, str], Image]


def _timm_enhance(kind: str) -> _Timm:
    def apply(image: Image, level: float, sign: int, method: str) -> Image:
        return colour.enhanced(image, kind, max(0.1, 1 + sign * level / 10 * 0.9))

    return apply


def _timm_warp(matrix: Callable[[Image, float], np.ndarray]) -> _Timm:
    def apply(image: Image, level: float, sign: int, method: str) -> Image:
        return warped(image, matrix(image, sign * level / 10), method, _MEAN)

    return apply


TIMM: dict[str, _Timm] = {
    'autocontrast': lambda image, *_: randaug.autocontrast(image, 0.0, 1, _NOTHING),
    'equalize': lambda image, *_: randaug.equalize(image, 0.0, 1, _NOTHING),
    'invert': lambda image, *_: 255 - image,
    'rotate': _timm_warp(lambda image, level: rotation(30 * level, image)),
    'posterize': lambda image, level, *_: colour.posterized(image, max(1, 4 - int(0.4 * level))),
    'solarize': lambda image, level, *_: colour.solarized(image, 256 - min(256, int(25.6 * level))),
    'solarize_add': lambda image, level, *_: randaug.solarize_add(image, level / 10, 1, _NOTHING),
    'color': _timm_enhance('saturation'),
    'contrast': _timm_enhance('contrast'),
    'brightness': _timm_enhance('brightness'),
    'sharpness': _timm_enhance('sharpness'),
    'shear_x': _timm_warp(lambda image, level: _shear(image, x=0.3 * level)),
    'shear_y': _timm_warp(lambda image, level: _shear(image, y=0.3 * level)),
    'translate_x': _timm_warp(lambda image, level: _move(x=0.45 * level * image.shape[1])),
    'translate_y': _timm_warp(lambda image, level: _move(y=0.45 * level * image.shape[0])),
}
_TIMM_DRAWS = 5


def timm_randaug(layers=2, magnitude=9, mstd=0.5, prob=0.5) -> Operation:
    """RandAugment as `rand-m9-mstd0.5-inc1` of timm: each layer is skipped with 1 - prob.

    A layer is one of fifteen operations (cutout is random erasing there), at a level that is
    normal about `magnitude` with deviation `mstd`, within 0 to 10; warps are bilinear or bicubic,
    as it falls out, on the mean colour of ImageNet. Other than there, posterize keeps one bit at
    level 10, where timm's image turns black.
    """
    layers = whole('layers', layers, 1, STREAMS // _TIMM_DRAWS)
    magnitude = number('magnitude', magnitude, 0, 10)
    mstd, prob = number('mstd', mstd, 0, 100), number('prob', prob, 0, 1)
    every = list(TIMM.values())

    def augment(image: Image, draws: np.ndarray) -> Image:
        from scipy.special import ndtri

        image = _checked(image)
        for which, skip, noise, side, kernel in draws.reshape(layers, _TIMM_DRAWS):
            if skip >= prob:
                continue
            # The number 0 would be minus infinity.
            level = float(np.clip(magnitude + mstd * ndtri(max(noise, 1e-16)), 0, 10))
            method = 'bilinear' if kernel < 0.5 else 'bicubic'
            image = every[int(which * len(every))](image, level, -1 if side < 0.5 else 1, method)
        return image

    return each(augment, layers * _TIMM_DRAWS)


# --- TrivialAugment ---------------------------------------------------------------------

_BINS = 31


def _trivial_enhance(kind: str) -> Callable[[Image, float, int], Image]:
    return lambda image, level, sign: colour.enhanced(image, kind, 1 + sign * 0.99 * level)


# Of (image, level in [0, 1], sign) each; the ranges are those of the paper's "wide" set.
TRIVIAL: dict[str, Callable[[Image, float, int], Image]] = {
    'identity': lambda image, level, sign: image,
    'shear_x': lambda image, level, sign: warped(
        image, _shear(image, x=sign * 0.99 * level), 'nearest', _BLACK
    ),
    'shear_y': lambda image, level, sign: warped(
        image, _shear(image, y=sign * 0.99 * level), 'nearest', _BLACK
    ),
    'translate_x': lambda image, level, sign: warped(
        image, _move(x=int(sign * 32 * level)), 'nearest', _BLACK
    ),
    'translate_y': lambda image, level, sign: warped(
        image, _move(y=int(sign * 32 * level)), 'nearest', _BLACK
    ),
    'rotate': lambda image, level, sign: warped(
        image, rotation(sign * 135 * level, image), 'nearest', _BLACK
    ),
    'brightness': _trivial_enhance('brightness'),
    'color': _trivial_enhance('saturation'),
    'contrast': _trivial_enhance('contrast'),
    'sharpness': _trivial_enhance('sharpness'),
    'posterize': lambda image, level, sign: colour.posterized(image, 8 - round(6 * level)),
    'solarize': lambda image, level, sign: colour.solarized(
        image, int(np.ceil(round(255 * (1 - level), 6)))
    ),
    'autocontrast': lambda image, level, sign: randaug.autocontrast(image, 0.0, 1, _NOTHING),
    'equalize': lambda image, level, sign: randaug.equalize(image, 0.0, 1, _NOTHING),
}


def trivial_augment() -> Operation:
    """TrivialAugment, the wide set (arXiv 2103.10158): one operation at one of 31 levels."""
    every = list(TRIVIAL.values())

    def augment(image: Image, draws: np.ndarray) -> Image:
        level = int(draws[1] * _BINS) / (_BINS - 1)
        operation = every[int(draws[0] * len(every))]
        return operation(_checked(image), level, -1 if draws[2] < 0.5 else 1)

    return each(augment, 3)


# --- 3-Augment --------------------------------------------------------------------------


def three_augment(color_jitter=0.3) -> Operation:
    """3-Augment of DeiT III (arXiv 2204.07118): grey, solarized or blurred, then jittered.

    One of the three, each as likely: luma, values from 128 on inverted, or a Gaussian blur of
    deviation 0.1 to 2; then brightness, contrast and saturation by factors in 1 ± color_jitter,
    in a random order.
    """
    import cv2

    strength = number('color_jitter', color_jitter, 0, 1)
    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    kinds = ('brightness', 'contrast', 'saturation')

    def augment(image: Image, draws: np.ndarray) -> Image:
        image = _checked(image)
        choice = int(draws[0] * 3)
        if choice == 0:
            image = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        elif choice == 1:
            image = colour.solarized(image, 128)
        else:
            image = colour.blurred(image, 0.1 + 1.9 * draws[1])
        if strength:
            for which in orders[int(draws[2] * 6)]:
                factor = 1 + strength * (2 * draws[3 + which] - 1)
                image = colour.enhanced(image, kinds[which], factor)
        return image

    return each(augment, 6)


# --- AugMix -----------------------------------------------------------------------------

# Of (image, level in [0, 10], sign) each: those of the paper that no corruption test has.
AUGMIX: dict[str, Callable[[Image, float, int], Image]] = {
    'autocontrast': lambda image, level, sign: randaug.autocontrast(image, 0.0, 1, _NOTHING),
    'equalize': lambda image, level, sign: randaug.equalize(image, 0.0, 1, _NOTHING),
    'posterize': lambda image, level, sign: colour.posterized(image, max(1, 4 - int(0.4 * level))),
    'rotate': lambda image, level, sign: warped(
        image, rotation(sign * int(3 * level), image), 'bilinear', _BLACK
    ),
    'solarize': lambda image, level, sign: colour.solarized(image, 256 - int(25.6 * level)),
    'shear_x': lambda image, level, sign: warped(
        image, _shear(image, x=sign * 0.03 * level), 'bilinear', _BLACK
    ),
    'shear_y': lambda image, level, sign: warped(
        image, _shear(image, y=sign * 0.03 * level), 'bilinear', _BLACK
    ),
    'translate_x': lambda image, level, sign: warped(
        image, _move(x=sign * int(level * image.shape[1] / 30)), 'bilinear', _BLACK
    ),
    'translate_y': lambda image, level, sign: warped(
        image, _move(y=sign * int(level * image.shape[0] / 30)), 'bilinear', _BLACK
    ),
}
_MOST_DEPTH = 3


def augmix(width=3, depth=-1, severity=3, alpha=1.0) -> Operation:
    """AugMix (arXiv 1912.02781): chains of operations, blended with each other and the image.

    `width` chains of `depth` operations (-1: one to three), each at a level uniform from 0.1 to
    `severity`, are weighted by a Dirichlet law and blended with the image by a Beta law, both
    of parameter alpha.
    """
    each_chain = 1 + 3 * _MOST_DEPTH
    width = whole('width', width, 1, (STREAMS - 2) // (each_chain + 1))
    depth = whole('depth', depth, -1, _MOST_DEPTH)
    if depth == 0:
        raise UnfitError('takes -1 or 1 to 3 for depth, not 0')
    severity, alpha = number('severity', severity, 0.1, 10), number('alpha', alpha, 0.01, 100)
    every = list(AUGMIX.values())

    def augment(image: Image, draws: np.ndarray) -> Image:
        from scipy.special import betaincinv, gammaincinv

        image = _checked(image)
        share = betaincinv(alpha, alpha, draws[0])
        weights = np.maximum(gammaincinv(alpha, draws[1 : 1 + width]), 1e-30)
        weights /= weights.sum()
        total = (1 - share) * image.astype(np.float32)
        for weight, chain in zip(
            weights, draws[1 + width :].reshape(width, each_chain), strict=True
        ):
            mixed = image
            steps = depth if depth > 0 else 1 + int(chain[0] * _MOST_DEPTH)
            for which, level, side in chain[1 : 1 + 3 * steps].reshape(-1, 3):
                operation = every[int(which * len(every))]
                mixed = operation(mixed, 0.1 + (severity - 0.1) * level, -1 if side < 0.5 else 1)
            total += np.float32(share * weight) * mixed
        return np.clip(np.rint(total), 0, 255).astype(np.uint8)

    return each(augment, 1 + width + width * each_chain)


OPERATIONS = {
    operation.__name__: operation
    for operation in (timm_randaug, trivial_augment, three_augment, augmix)
}
