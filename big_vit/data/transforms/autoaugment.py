"""Augmentations that draw from a set: timm's RandAugment, TrivialAugment, 3-Augment, AugMix.

Images are RGB bytes. Pixels are Pillow's as `colour` has them, and where an image is warped to
the nearest pixel. Bilinear and bicubic warps are OpenCV's, three to five times as fast, and
differ: what lies on the border of the image is blended with the fill; bilinear is off by at most
1, as it rounds where Pillow cuts (before OpenCV 5 by up to 4, as places are 32nds of a pixel);
and the bicubic kernel is a little sharper (Keys's a is -0.75, not -0.5), by 1 level in the mean of
a photograph and by up to 10 at an edge. The TensorFlow variant of RandAugment is in `randaug`.
"""

import itertools
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from big_vit.data.transforms import colour, randaug
from big_vit.data.transforms.operations import (
    STREAMS,
    Operation,
    Real,
    UnfitError,
    each,
    number,
    whole,
)

Image = colour.Image
Fill = tuple[int, int, int]
# The mean of ImageNet, with which timm fills what a warp leaves empty.
_MEAN: Fill = (124, 116, 104)
_BLACK: Fill = (0, 0, 0)


def warped(image: Image, matrix: Float[np.ndarray, '2 3'], method: str, fill: Fill) -> Image:
    """The pixel at matrix @ (x, y, 1) for each (x, y), centres of pixels being at halves.

    Args:
      image: uint8 [H, W, 3].
      matrix: [2, 3], from places in the new image to places in the old.
      method: nearest, bilinear or bicubic.
      fill: where there is nothing of the image.
    """
    if method == 'nearest':
        # Of two pixels equally near, which shears have at every second row, OpenCV takes another.
        from PIL import Image as pillow

        found = pillow.fromarray(image).transform(
            image.shape[1::-1],
            pillow.Transform.AFFINE,
            matrix.ravel().tolist(),
            pillow.Resampling.NEAREST,
            fillcolor=fill,
        )
        return np.array(found)
    import cv2

    kernel = {'bilinear': cv2.INTER_LINEAR, 'bicubic': cv2.INTER_CUBIC}[method]
    shifted = matrix.copy()
    shifted[:, 2] += shifted[:, :2].sum(axis=1) / 2 - 0.5
    flags = kernel | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, shifted, image.shape[1::-1], flags=flags, borderValue=fill)


def rotation(degrees: Real, image: Image) -> Float[np.ndarray, '2 3']:
    """The matrix [2, 3] that turns an image about its centre, counter-clockwise."""
    angle = np.deg2rad(degrees)
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.array([[cos, -sin, 0], [sin, cos, 0]])
    centre = np.array(image.shape[1::-1]) / 2
    matrix[:, 2] = centre - matrix[:, :2] @ centre
    return matrix


def _shear(x: Real = 0.0, y: Real = 0.0) -> np.ndarray:
    """Rows moved by x of their distance to the top, columns by y of that to the left."""
    return np.array([[1.0, x, 0.0], [y, 1.0, 0.0]])


def _move(x: Real = 0.0, y: Real = 0.0) -> np.ndarray:
    """By x pixels to the left and y up."""
    return np.array([[1.0, 0.0, x], [0.0, 1.0, y]])


# --- RandAugment as timm has it ---------------------------------------------------------

# Of (image, level in [0, 10], sign, method) each.
_Timm = Callable[[Image, float, int, str], Image]


def _timm_enhance(kind: str) -> _Timm:
    def apply(image: Image, level: float, sign: int, method: str) -> Image:
        return colour.enhanced(image, kind, max(0.1, 1 + sign * level / 10 * 0.9))

    return apply


def _timm_enhance_plain(kind: str) -> _Timm:
    return lambda image, level, *_: colour.enhanced(image, kind, 0.1 + 1.8 * level / 10)


def _timm_warp(matrix: Callable[[Image, float], np.ndarray]) -> _Timm:
    def apply(image: Image, level: float, sign: int, method: str) -> Image:
        return warped(image, matrix(image, sign * level / 10), method, _MEAN)

    return apply


TIMM: dict[str, _Timm] = {
    'autocontrast': lambda image, *_: colour.autocontrasted(image),
    'equalize': lambda image, *_: colour.equalized(image),
    'invert': lambda image, *_: 255 - image,
    'rotate': _timm_warp(lambda image, level: rotation(30 * level, image)),
    'posterize': lambda image, level, *_: colour.posterized(image, max(1, 4 - int(level / 10 * 4))),
    'solarize': lambda image, level, *_: colour.solarized(image, 256 - int(level / 10 * 256)),
    'solarize_add': lambda image, level, *_: randaug.solarize_add(
        image, level / 10, 1, np.zeros(2)
    ),
    'color': _timm_enhance('saturation'),
    'contrast': _timm_enhance('contrast'),
    'brightness': _timm_enhance('brightness'),
    'sharpness': _timm_enhance('sharpness'),
    'shear_x': _timm_warp(lambda image, level: _shear(x=0.3 * level)),
    'shear_y': _timm_warp(lambda image, level: _shear(y=0.3 * level)),
    'translate_x': _timm_warp(lambda image, level: _move(x=0.45 * level * image.shape[1])),
    'translate_y': _timm_warp(lambda image, level: _move(y=0.45 * level * image.shape[0])),
}
# Without `inc1`: strongest at level 0 for posterize and solarize, at either end for the others.
TIMM_PLAIN: dict[str, _Timm] = {
    **TIMM,
    'posterize': lambda image, level, *_: colour.posterized(image, max(1, int(level / 10 * 4))),
    'solarize': lambda image, level, *_: colour.solarized(image, int(level / 10 * 256)),
    'color': _timm_enhance_plain('saturation'),
    'contrast': _timm_enhance_plain('contrast'),
    'brightness': _timm_enhance_plain('brightness'),
    'sharpness': _timm_enhance_plain('sharpness'),
}
_TIMM_DRAWS = 5


def timm_randaug(layers=2, magnitude=9, mstd=0.5, prob=0.5, increasing=True) -> Operation:
    """RandAugment as `rand-m9-mstd0.5-inc1` of timm: each layer is skipped with 1 - prob.

    A layer is one of fifteen operations (cutout is random erasing there), at a level that is
    normal about `magnitude` with deviation `mstd`, cut to 0 to 10. Warps are bilinear or bicubic,
    as it falls out, on the mean colour of ImageNet, as timm's training script sets them.
    `increasing=False` leaves out the `inc1`.

    Like timm's, and unlike others: posterize has four bits at level 0 already, and autocontrast,
    equalize and invert know no level. Unlike timm's: posterize keeps one bit where it keeps none
    and the image turns black (at level 10, where one of forty levels ends by default).
    """
    layers = whole('layers', layers, 1, STREAMS // _TIMM_DRAWS)
    magnitude = number('magnitude', magnitude, 0, 10)
    mstd, prob = number('mstd', mstd, 0, 100), number('prob', prob, 0, 1)
    if type(increasing) is not bool:
        raise UnfitError(f'takes True or False for increasing, not {increasing!r}')
    every = list((TIMM if increasing else TIMM_PLAIN).values())

    def augment(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        from scipy.special import ndtri

        image = colour.checked(image)
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
        image, _shear(x=sign * 0.99 * level), 'nearest', _BLACK
    ),
    'shear_y': lambda image, level, sign: warped(
        image, _shear(y=sign * 0.99 * level), 'nearest', _BLACK
    ),
    'translate_x': lambda image, level, sign: warped(
        image, _move(x=-sign * int(32 * level)), 'nearest', _BLACK
    ),
    'translate_y': lambda image, level, sign: warped(
        image, _move(y=-sign * int(32 * level)), 'nearest', _BLACK
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
    'autocontrast': lambda image, level, sign: colour.autocontrasted(image),
    'equalize': lambda image, level, sign: colour.equalized(image),
}


def trivial_augment() -> Operation:
    """TrivialAugment, the wide set (arXiv 2103.10158): one of 14 operations at one of 31 levels.

    The ranges are torchvision's, whose pixels these are; levels are not rounded to float32 as
    there, which may move a threshold or a factor by the last bit. Images are moved by up to 32
    pixels whatever their size, so that of one of 32 pixels nothing may be left.
    """
    every = list(TRIVIAL.values())

    def augment(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        level = int(draws[1] * _BINS) / (_BINS - 1)
        operation = every[int(draws[0] * len(every))]
        return operation(colour.checked(image), level, -1 if draws[2] < 0.5 else 1)

    return each(augment, 3)


# --- 3-Augment --------------------------------------------------------------------------


def three_augment(color_jitter=0.3) -> Operation:
    """3-Augment of DeiT III (arXiv 2204.07118): grey, solarized or blurred, then jittered.

    One of the three, each as likely: luma, values from 128 on inverted, or a Gaussian blur of
    deviation 0.1 to 2; then brightness, contrast and saturation by factors in 1 ± color_jitter,
    in a random order.
    """
    strength = number('color_jitter', color_jitter, 0, 1)
    kinds = ('brightness', 'contrast', 'saturation')
    orders = list(itertools.permutations(range(3)))

    def augment(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        image = colour.checked(image)
        choice = int(draws[0] * 3)
        if choice == 0:
            image = colour.grey(image)
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
    'autocontrast': lambda image, level, sign: colour.autocontrasted(image),
    'equalize': lambda image, level, sign: colour.equalized(image),
    'posterize': lambda image, level, sign: colour.posterized(
        image, max(1, 4 - int(level * 4 / 10))
    ),
    'rotate': lambda image, level, sign: warped(
        image, rotation(sign * int(level * 30 / 10), image), 'bilinear', _BLACK
    ),
    'solarize': lambda image, level, sign: colour.solarized(image, 256 - int(level * 256 / 10)),
    'shear_x': lambda image, level, sign: warped(
        image, _shear(x=sign * 0.03 * level), 'bilinear', _BLACK
    ),
    'shear_y': lambda image, level, sign: warped(
        image, _shear(y=sign * 0.03 * level), 'bilinear', _BLACK
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
    of parameter alpha. Warps are bilinear on black.
    """
    each_chain = 1 + 3 * _MOST_DEPTH
    width = whole('width', width, 1, (STREAMS - 2) // (each_chain + 1))
    depth = whole('depth', depth, -1, _MOST_DEPTH)
    if depth == 0:
        raise UnfitError('takes -1 or 1 to 3 for depth, not 0')
    severity, alpha = number('severity', severity, 0.1, 10), number('alpha', alpha, 0.01, 100)
    every = list(AUGMIX.values())

    def augment(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        from scipy.special import betaincinv, gammaincinv

        image = colour.checked(image)
        share = betaincinv(alpha, alpha, draws[0])
        # A Dirichlet variate is made of gamma variates, which at small alpha are nearly 0.
        weights = np.maximum(gammaincinv(alpha, draws[1 : 1 + width]), 1e-300)
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
