"""RandAugment (arXiv 1909.13719) in the TensorFlow variant that ImageNet ViTs are trained with.

The sixteen operations and their strengths are those of the TensorFlow variant; the pixels are
Pillow's ImageOps and ImageEnhance (from which that variant was written) in the conventions
'opencv' and 'nearest_tensorflow' of `pixels`. At magnitude 10, at which its results were
obtained, it differs from the public code as follows:

* contrast turns about the mean grey value; the public code takes height * width / 256 for
  the mean, which is 196 at 224 pixels whatever the image (big_vision issue 109);
* solarize inverts from 256 - 25.6 * magnitude on, as AutoAugment does; the public threshold
  grows with the magnitude and is 0 at 10 only by an overflow of uint8 (issue 110);
* posterize keeps 8 - 0.4 * magnitude bits; the public code keeps 0.4 * magnitude of them,
  the same at 10 but a black image at 0;
* translations and cutout are fractions of the image, equal to the public 100 and 40 pixels at
  224, which would leave nothing of a small image;
* smoothed values (sharpness) are rounded as Pillow does, not truncated.
"""

import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from big_vit.data.transforms import pixels
from big_vit.data.transforms.colour import contiguous_rgb
from big_vit.data.transforms.operations import (
    STREAMS,
    Operation,
    number,
    per_image,
    whole_number,
)
from big_vit.data.transforms.pixels import Image
from big_vit.data.transforms.policy import PolicyOperation

DRAWS = 4
# The public code fills with it what lies outside of the image.
_GREY: pixels.Colour = (128, 128, 128)


def _enhance(operation: Callable[..., Image]) -> PolicyOperation:
    """Blend by factor 0.1 at magnitude 0, by 1 (the image itself) at 5, by 1.9 at 10."""
    return PolicyOperation(operation, lambda strength, sign, image: 0.1 + 1.8 * strength)


def _warp(operation: Callable[..., Image], law: Callable[[float, int, Image], float]):
    warp = functools.partial(operation, method='nearest_tensorflow', fill=_GREY)
    return PolicyOperation(warp, law)


def _reach(strength: float, sign: int, image: Image) -> tuple[int, int]:
    """Half the sides of the cutout."""
    height, width = image.shape[:2]
    return round(strength * height * 40 / 224), round(strength * width * 40 / 224)


# Levels are strengths, magnitude / 10: 1 is the strongest that AutoAugment's search went to.
SIXTEEN: dict[str, PolicyOperation] = {
    'autocontrast': PolicyOperation(pixels.autocontrast),
    'equalize': PolicyOperation(pixels.equalize),
    'invert': PolicyOperation(pixels.invert),
    'rotate': _warp(pixels.rotate, lambda strength, sign, image: sign * strength * 30),
    'posterize': PolicyOperation(
        pixels.posterize, lambda strength, sign, image: max(1, 8 - int(4 * strength))
    ),
    'solarize': PolicyOperation(
        pixels.solarize, lambda strength, sign, image: 256 - int(256 * strength)
    ),
    'solarize_add': PolicyOperation(
        pixels.solarize_add, lambda strength, sign, image: int(110 * strength)
    ),
    'color': _enhance(functools.partial(pixels.saturation, convention='opencv')),
    'contrast': _enhance(functools.partial(pixels.contrast, convention='opencv')),
    'brightness': _enhance(functools.partial(pixels.brightness, convention='opencv')),
    'sharpness': _enhance(pixels.sharpness),
    'shear_x': _warp(pixels.shear_x, lambda strength, sign, image: sign * strength * 0.3),
    'shear_y': _warp(pixels.shear_y, lambda strength, sign, image: sign * strength * 0.3),
    'translate_x': _warp(
        pixels.translate_x,
        lambda strength, sign, image: sign * round(strength * image.shape[1] * 100 / 224),
    ),
    'translate_y': _warp(
        pixels.translate_y,
        lambda strength, sign, image: sign * round(strength * image.shape[0] * 100 / 224),
    ),
    'cutout': PolicyOperation(
        functools.partial(pixels.cutout, fill=_GREY), _reach, takes_drawn=True
    ),
}


def apply(image: Image, magnitude: float, draws: Float[np.ndarray, '4']) -> Image:
    """Apply one of the sixteen operations, each as likely as the others.

    Args:
      image: is not changed.
      magnitude: 10 is the strength that AutoAugment's search went up to.
      draws: in [0, 1), for the choice, the sign, and the row and column of a cutout.
    """
    operation = list(SIXTEEN.values())[int(draws[0] * len(SIXTEEN))]
    return operation(image, magnitude / 10, -1 if draws[1] < 0.5 else 1, draws[2:])


def randaug(layers, magnitude) -> Operation:
    """Apply RandAugment in the TensorFlow variant: `layers` of its sixteen operations in a row."""
    layers = whole_number('layers', layers, 1, STREAMS // DRAWS)
    magnitude = number('magnitude', magnitude, 0, 30)

    def augment(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
        image = contiguous_rgb(image)
        for layer in draws.reshape(layers, DRAWS):
            image = apply(image, magnitude, layer)
        return image

    return per_image(augment, layers * DRAWS)


OPERATIONS = {'randaug': randaug}
