"""Augmentation policies on RGB bytes: timm's RandAugment, TrivialAugment, 3-Augment, AugMix.

A policy is a table of names, pixel operations and the laws of their magnitudes. RandAugment in the
TensorFlow variant is in `randaug`; `pixels` says how exactly its operations match Pillow's.
"""

import functools
import itertools
from collections.abc import Callable

import numpy as np

from big_vit.data.transforms import pixels
from big_vit.data.transforms.colour import contiguous_rgb
from big_vit.data.transforms.operations import (
    STREAMS,
    Operation,
    UnfitError,
    number,
    per_image,
    whole_number,
)
from big_vit.data.transforms.pixels import BLACK, Image
from big_vit.data.transforms.policy import PolicyOperation

Law = Callable[[float, int, Image], float]
# timm fills what a warp leaves empty with the mean of ImageNet.
_IMAGENET_MEAN: pixels.Colour = (124, 116, 104)


def _warp_on_black(operation: Callable[..., Image], method: str, law: Law) -> PolicyOperation:
    return PolicyOperation(functools.partial(operation, method=method, fill=BLACK), law)


# --- RandAugment as timm has it: levels in [0, 10] ---------------------------------------


def _timm_enhance(kind: str) -> PolicyOperation:
    return PolicyOperation(
        pixels.ENHANCEMENTS[kind], lambda level, sign, image: max(0.1, 1 + sign * level / 10 * 0.9)
    )


def _timm_enhance_plain(kind: str) -> PolicyOperation:
    return PolicyOperation(
        pixels.ENHANCEMENTS[kind], lambda level, sign, image: 0.1 + 1.8 * level / 10
    )


def _timm_warp(operation: Callable[..., Image], law: Law) -> PolicyOperation:
    """A warp by an interpolation that is drawn."""

    def warp(image: Image, magnitude: float, method: pixels.Method) -> Image:
        return operation(image, magnitude, method, _IMAGENET_MEAN)

    return PolicyOperation(warp, law, takes_drawn=True)


TIMM: dict[str, PolicyOperation] = {
    'autocontrast': PolicyOperation(pixels.autocontrast),
    'equalize': PolicyOperation(pixels.equalize),
    'invert': PolicyOperation(pixels.invert),
    'rotate': _timm_warp(pixels.rotate, lambda level, sign, image: 30 * (sign * level / 10)),
    'posterize': PolicyOperation(
        pixels.posterize, lambda level, sign, image: max(1, 4 - int(level / 10 * 4))
    ),
    'solarize': PolicyOperation(
        pixels.solarize, lambda level, sign, image: 256 - int(level / 10 * 256)
    ),
    'solarize_add': PolicyOperation(
        pixels.solarize_add, lambda level, sign, image: int(110 * (level / 10))
    ),
    'color': _timm_enhance('saturation'),
    'contrast': _timm_enhance('contrast'),
    'brightness': _timm_enhance('brightness'),
    'sharpness': _timm_enhance('sharpness'),
    'shear_x': _timm_warp(pixels.shear_x, lambda level, sign, image: 0.3 * (sign * level / 10)),
    'shear_y': _timm_warp(pixels.shear_y, lambda level, sign, image: 0.3 * (sign * level / 10)),
    'translate_x': _timm_warp(
        pixels.translate_x,
        lambda level, sign, image: 0.45 * (sign * level / 10) * image.shape[1],
    ),
    'translate_y': _timm_warp(
        pixels.translate_y,
        lambda level, sign, image: 0.45 * (sign * level / 10) * image.shape[0],
    ),
}
# Without `inc1`: strongest at level 0 for posterize and solarize, at either end for the others.
TIMM_PLAIN: dict[str, PolicyOperation] = {
    **TIMM,
    'posterize': PolicyOperation(
        pixels.posterize, lambda level, sign, image: max(1, int(level / 10 * 4))
    ),
    'solarize': PolicyOperation(pixels.solarize, lambda level, sign, image: int(level / 10 * 256)),
    'color': _timm_enhance_plain('saturation'),
    'contrast': _timm_enhance_plain('contrast'),
    'brightness': _timm_enhance_plain('brightness'),
    'sharpness': _timm_enhance_plain('sharpness'),
}
_TIMM_DRAWS = 5


def timm_randaug(layers=2, magnitude=9, mstd=0.5, prob=0.5, increasing=True) -> Operation:
    """Apply RandAugment as timm's `rand-m9-mstd0.5-inc1`, skipping each layer with 1 - prob.

    A layer is one of fifteen operations (timm has cutout as random erasing) at a level drawn from
    a normal distribution about `magnitude` with deviation `mstd`, clipped to 0..10. Warps are
    bilinear or bicubic at random and filled with the mean colour of ImageNet, as timm's training
    script sets them. `increasing=False` leaves out the `inc1`.

    As in timm but unlike other variants, posterize keeps four bits at level 0 already, and
    autocontrast, equalize and invert know no level. Unlike timm, posterize keeps one bit where timm
    keeps none and the image turns black (at level 10, where one of forty levels ends by default).
    """
    layers = whole_number('layers', layers, 1, STREAMS // _TIMM_DRAWS)
    magnitude = number('magnitude', magnitude, 0, 10)
    mstd, prob = number('mstd', mstd, 0, 100), number('prob', prob, 0, 1)
    if type(increasing) is not bool:
        raise UnfitError(f'takes True or False for increasing, not {increasing!r}')
    operations = list((TIMM if increasing else TIMM_PLAIN).values())

    def augment(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        from scipy.special import ndtri

        image = contiguous_rgb(image)
        for choice, skip, noise, side, kernel in draws.reshape(layers, _TIMM_DRAWS):
            if skip >= prob:
                continue
            # The number 0 would be minus infinity.
            level = float(np.clip(magnitude + mstd * ndtri(max(noise, 1e-16)), 0, 10))
            method = 'bilinear' if kernel < 0.5 else 'bicubic'
            operation = operations[int(choice * len(operations))]
            image = operation(image, level, -1 if side < 0.5 else 1, method)
        return image

    return per_image(augment, layers * _TIMM_DRAWS)


# --- TrivialAugment: levels in [0, 1] ----------------------------------------------------

_BINS = 31


def _trivial_enhance(kind: str) -> PolicyOperation:
    return PolicyOperation(
        pixels.ENHANCEMENTS[kind], lambda level, sign, image: 1 + sign * 0.99 * level
    )


def _trivial_warp(operation: Callable[..., Image], law: Law) -> PolicyOperation:
    return _warp_on_black(operation, 'nearest', law)


# The ranges are those of the paper's "wide" set.
TRIVIAL: dict[str, PolicyOperation] = {
    'identity': PolicyOperation(lambda image: image),
    'shear_x': _trivial_warp(pixels.shear_x, lambda level, sign, image: sign * 0.99 * level),
    'shear_y': _trivial_warp(pixels.shear_y, lambda level, sign, image: sign * 0.99 * level),
    'translate_x': _trivial_warp(
        pixels.translate_x, lambda level, sign, image: -sign * int(32 * level)
    ),
    'translate_y': _trivial_warp(
        pixels.translate_y, lambda level, sign, image: -sign * int(32 * level)
    ),
    'rotate': _trivial_warp(pixels.rotate, lambda level, sign, image: sign * 135 * level),
    'brightness': _trivial_enhance('brightness'),
    'color': _trivial_enhance('saturation'),
    'contrast': _trivial_enhance('contrast'),
    'sharpness': _trivial_enhance('sharpness'),
    'posterize': PolicyOperation(pixels.posterize, lambda level, sign, image: 8 - round(6 * level)),
    'solarize': PolicyOperation(
        pixels.solarize, lambda level, sign, image: int(np.ceil(round(255 * (1 - level), 6)))
    ),
    'autocontrast': PolicyOperation(pixels.autocontrast),
    'equalize': PolicyOperation(pixels.equalize),
}


def trivial_augment() -> Operation:
    """Apply TrivialAugment's wide set (arXiv 2103.10158): one of 14 operations at one of 31 levels.

    Ranges and pixels are torchvision's, except that levels are not rounded to float32, which may
    change a threshold or a factor by the last bit. Images are moved by up to 32 pixels whatever
    their size, so that nothing may be left of one of 32 pixels.
    """
    operations = list(TRIVIAL.values())

    def augment(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        level = int(draws[1] * _BINS) / (_BINS - 1)
        operation = operations[int(draws[0] * len(operations))]
        return operation(contiguous_rgb(image), level, -1 if draws[2] < 0.5 else 1)

    return per_image(augment, 3)


# --- 3-Augment --------------------------------------------------------------------------


def three_augment(color_jitter=0.3) -> Operation:
    """Apply 3-Augment of DeiT III (arXiv 2204.07118): grey, solarized or blurred, then jittered.

    One of three, equally likely: luma, values from 128 on inverted, or a Gaussian blur of deviation
    0.1 to 2; then brightness, contrast and saturation by factors in 1 ± color_jitter, in a random
    order.
    """
    strength = number('color_jitter', color_jitter, 0, 1)
    kinds = ('brightness', 'contrast', 'saturation')
    orders = list(itertools.permutations(range(3)))

    def augment(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        image = contiguous_rgb(image)
        choice = int(draws[0] * 3)
        if choice == 0:
            image = pixels.grayscale(image)
        elif choice == 1:
            image = pixels.solarize(image, 128)
        else:
            image = pixels.gaussian_blur(image, 0.1 + 1.9 * draws[1])
        if strength:
            for kind in orders[int(draws[2] * 6)]:
                factor = 1 + strength * (2 * draws[3 + kind] - 1)
                image = pixels.ENHANCEMENTS[kinds[kind]](image, factor)
        return image

    return per_image(augment, 6, carries=True)


# --- AugMix: levels in [0, 10] ----------------------------------------------------------


def _augmix_warp(operation: Callable[..., Image], law: Law) -> PolicyOperation:
    return _warp_on_black(operation, 'bilinear', law)


# The operations of the paper, which leaves out those that corruption benchmarks contain.
AUGMIX: dict[str, PolicyOperation] = {
    'autocontrast': PolicyOperation(pixels.autocontrast),
    'equalize': PolicyOperation(pixels.equalize),
    'posterize': PolicyOperation(
        pixels.posterize, lambda level, sign, image: max(1, 4 - int(level * 4 / 10))
    ),
    'rotate': _augmix_warp(pixels.rotate, lambda level, sign, image: sign * int(level * 30 / 10)),
    'solarize': PolicyOperation(
        pixels.solarize, lambda level, sign, image: 256 - int(level * 256 / 10)
    ),
    'shear_x': _augmix_warp(pixels.shear_x, lambda level, sign, image: sign * 0.03 * level),
    'shear_y': _augmix_warp(pixels.shear_y, lambda level, sign, image: sign * 0.03 * level),
    'translate_x': _augmix_warp(
        pixels.translate_x, lambda level, sign, image: sign * int(level * image.shape[1] / 30)
    ),
    'translate_y': _augmix_warp(
        pixels.translate_y, lambda level, sign, image: sign * int(level * image.shape[0] / 30)
    ),
}
_MOST_DEPTH = 3


def augmix(width=3, depth=-1, severity=3, alpha=1.0) -> Operation:
    """Apply AugMix (arXiv 1912.02781): blend chains of operations with each other and the image.

    `width` chains of `depth` operations (-1: one to three), each at a level uniform from 0.1 to
    `severity`, are weighted by a Dirichlet distribution and blended with the image by a Beta
    distribution, both with parameter alpha. Warps are bilinear on black.
    """
    chain_draws = 1 + 3 * _MOST_DEPTH
    width = whole_number('width', width, 1, (STREAMS - 2) // (chain_draws + 1))
    depth = whole_number('depth', depth, -1, _MOST_DEPTH)
    if depth == 0:
        raise UnfitError('takes -1 or 1 to 3 for depth, not 0')
    severity, alpha = number('severity', severity, 0.1, 10), number('alpha', alpha, 0.01, 100)
    operations = list(AUGMIX.values())

    def augment(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        from scipy.special import betaincinv, gammaincinv

        image = contiguous_rgb(image)
        share = betaincinv(alpha, alpha, draws[0])
        # A Dirichlet variate is made of gamma variates, which at small alpha are nearly 0.
        weights = np.maximum(gammaincinv(alpha, draws[1 : 1 + width]), 1e-300)
        weights /= weights.sum()
        total = (1 - share) * image.astype(np.float32)
        chains = draws[1 + width :].reshape(width, chain_draws)
        for weight, chain in zip(weights, chains, strict=True):
            mixed = image
            steps = depth if depth > 0 else 1 + int(chain[0] * _MOST_DEPTH)
            for choice, level, side in chain[1 : 1 + 3 * steps].reshape(-1, 3):
                operation = operations[int(choice * len(operations))]
                mixed = operation(mixed, 0.1 + (severity - 0.1) * level, -1 if side < 0.5 else 1)
            total += np.float32(share * weight) * mixed
        return np.clip(np.rint(total), 0, 255).astype(np.uint8)

    return per_image(augment, 1 + width + width * chain_draws)


OPERATIONS = {
    operation.__name__: operation
    for operation in (timm_randaug, trivial_augment, three_augment, augmix)
}
