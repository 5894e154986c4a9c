"""Colour operations on the devices: those of the host, on whole batches of RGB bytes.

Bytes come in and go out, rounded after each operation as on the host, so that a transform may say
`to_device` before or after them. Their random numbers are others than the host's, by the same laws.
"""

import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from big_vit.augment import Operation, number
from big_vit.data.transforms.colour import KINDS, factor_bounds, kernel_size
from big_vit.tasks.batch import Batch

# Whole numbers 0..255 as floats.
Levels = Float[Array, 'batch height width 3']

_ORDERS = np.array(list(itertools.permutations(range(len(KINDS)))))
# Of red, green and blue; Pillow's, in units of 2**-16.
_LUMA = np.array([19595, 38470, 7471], np.float32) / 65536


def _sometimes(name: str, p: object, function: Callable[[Levels, Array], Levels]) -> Operation:
    """Apply a function of (images, key) to each example with probability p."""
    share = number('p', p, 0, 1)

    def apply(batch: Batch, rng: Array) -> Batch:
        image: UInt8[Array, 'batch height width 3'] = batch['image']
        if image.dtype != jnp.uint8 or image.shape[-1] != 3:
            raise ValueError(
                f'{name}: takes RGB bytes, not {image.shape[-1]} channel(s) of {image.dtype}: put '
                'it before what makes floats of bytes, and decode(3) or rgb before it'
            )
        chosen = jax.random.bernoulli(jax.random.fold_in(rng, 0), share, image.shape[:1])
        changed = function(image.astype(jnp.float32), jax.random.fold_in(rng, 1))
        changed = jnp.clip(changed, 0, 255).astype(jnp.uint8)
        return {**batch, 'image': jnp.where(chosen.reshape(-1, 1, 1, 1), changed, image)}

    return Operation(apply)


def _luma(image: Levels) -> Float[Array, 'batch height width 1']:
    # Exact, since a float32 has 24 bits and these are products of 8 and 16.
    return jnp.floor((image * _LUMA.reshape(1, 1, 1, 3)).sum(-1, keepdims=True) + 0.5)


def _turned(image: Levels, shift: Float[Array, 'batch 1 1 1']) -> Levels:
    """Turn the hue by `shift` of a full circle, in floats."""
    value = image.max(-1, keepdims=True)
    chroma = value - image.min(-1, keepdims=True)
    red, green, blue = (image[..., i : i + 1] for i in range(3))
    unit = jnp.where(chroma > 0, chroma, 1)
    sector = jnp.where(
        value == red,
        (green - blue) / unit % 6,
        jnp.where(value == green, (blue - red) / unit + 2, (red - green) / unit + 4),
    )
    # The inverse in one line for all sectors: a channel falls from its own by the distance on the
    # circle of six.
    place = (jnp.array([5.0, 3.0, 1.0]).reshape(1, 1, 1, 3) + sector + 6 * shift) % 6
    fallen = jnp.clip(jnp.minimum(place, 4 - place), 0, 1)
    return jnp.round(value - chroma * fallen)


def color_jitter(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, p=1.0) -> Operation:
    """Jitter colours by factors uniform in [max(0, 1 - x), 1 + x] and a hue in [-x, x].

    The four changes come in a random order. Two numbers instead of x are the bounds themselves.
    """
    values = (brightness, contrast, saturation, hue)
    bounds = np.array([factor_bounds(kind, v) for kind, v in zip(KINDS, values, strict=True)])
    turns = bool(bounds[KINDS.index('hue')].any())

    def jitter(image: Levels, rng: Array) -> Levels:
        examples = image.shape[0]
        order_key, key = jax.random.split(rng)
        order = jnp.asarray(_ORDERS)[jax.random.randint(order_key, (examples,), 0, len(_ORDERS))]
        low, high = (jnp.asarray(side, jnp.float32).reshape(1, -1) for side in bounds.T)
        drawn = low + (high - low) * jax.random.uniform(key, (examples, len(KINDS)))
        for slot in range(len(KINDS)):
            part = order[:, slot]
            factor = jnp.take_along_axis(drawn, part[:, None], axis=1).reshape(-1, 1, 1, 1)
            part = part.reshape(-1, 1, 1, 1)
            grey = _luma(image)
            mean = jnp.floor(grey.mean((1, 2, 3), keepdims=True) + 0.5)
            plain = jnp.where(part == 0, 0.0, jnp.where(part == 1, mean, grey))
            # Truncated as on the host; a factor of 1 gives the same whole numbers.
            changed = jnp.clip(jnp.floor(plain + factor * (image - plain) + 1e-4), 0, 255)
            image = jnp.where(part == 3, _turned(image, factor) if turns else image, changed)
        return image

    return _sometimes('color_jitter', p, jitter)


def random_grayscale(p=0.1) -> Operation:
    """Replace all three channels by luma with probability p."""
    return _sometimes(
        'random_grayscale', p, lambda image, _: jnp.broadcast_to(_luma(image), image.shape)
    )


def solarize(threshold=128, p=1.0) -> Operation:
    """Invert the values from `threshold` on with probability p."""
    if type(threshold) is not int or not 0 <= threshold <= 256:
        raise ValueError(f'takes a whole number from 0 to 256 for threshold, not {threshold!r}')
    return _sometimes(
        'solarize', p, lambda image, _: jnp.where(image >= threshold, 255 - image, image)
    )


def gaussian_blur(low=0.1, high=2.0, p=1.0, kernel=None) -> Operation:
    """Blur by a Gaussian with a deviation uniform from low to high pixels, with probability p.

    `kernel` is its length in pixels, an odd number (torchvision's; 9 in DINOv2); by default four
    deviations to each side.
    """
    low, high = number('low', low, 0.01, 100), number('high', high, 0.01, 100)
    if low > high:
        raise ValueError(f'takes a low up to high, not {low:g} and {high:g}')
    radius = (kernel_size(kernel) or 2 * math.ceil(4 * high) + 1) // 2

    def blur(image: Levels, rng: Array) -> Levels:
        sigma = jax.random.uniform(rng, image.shape[:1], minval=low, maxval=high)
        taps = jnp.arange(-radius, radius + 1, dtype=jnp.float32)[None]
        weights = jnp.exp(-jnp.square(taps / sigma[:, None]) / 2)
        weights = weights / weights.sum(1, keepdims=True)
        for axis in (1, 2):
            pad = [(0, 0)] * 4
            pad[axis] = (radius, radius)
            wide = jnp.pad(image, pad, mode='reflect')
            image = sum(
                (
                    weights[:, k].reshape(-1, 1, 1, 1)
                    * jax.lax.slice_in_dim(wide, k, k + image.shape[axis], axis=axis)
                    for k in range(2 * radius + 1)
                ),
                jnp.zeros_like(image),
            )
        return jnp.round(image)

    return _sometimes('gaussian_blur', p, blur)


OPERATIONS: dict[str, Callable[..., Operation]] = {
    function.__name__: function
    for function in (color_jitter, random_grayscale, solarize, gaussian_blur)
}
