"""Augmentation on the devices, inside the train step: pure functions of (batch, rng).

Bytes travel to the devices and become floats here. Random numbers are drawn for the whole batch
from one key, so results do not depend on the mesh. Constructors check their arguments and raise a
ValueError whose text continues the operation's name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num

from big_vit.data.normalisation import FROM_BYTES, Normalisation, of_mean_and_std, of_range
from big_vit.tasks.batch import Batch, normalise, targets

Function = Callable[[Batch, Array], Batch]


@dataclass(frozen=True)
class Operation:
    """An operation on batches, called as (batch, rng).

    Attributes:
      apply: the function; it does not change its arguments.
      normalisation: the map of pixel values that it is, or None if it does not rescale them.
      states_levels: whether it was given which values are black and white.
      moves: whether pixels move, and boxes and classes of pixels would stay behind.
    """

    apply: Function
    normalisation: Normalisation | None = None
    states_levels: bool = False
    moves: bool = False

    def __call__(self, batch: Batch, rng: Array) -> Batch:
        return self.apply(batch, rng)


Image = Num[Array, 'batch height width channels']

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Black and white where nothing is said; images of 16 bits are scaled alike.
_BYTES = (0, 255)
_ERASING_ATTEMPTS = 10


def compose(functions: Sequence[Function]) -> Function:
    """Apply functions one after the other, with keys that depend only on their place."""

    def apply(batch: Batch, rng: Array) -> Batch:
        for place, function in enumerate(functions):
            batch = function(batch, jax.random.fold_in(rng, place))
        return batch

    return apply


def on_views(
    views: Sequence[tuple[str, int, Sequence[Function]]], numbers: Sequence[int] | None = None
) -> Operation:
    """Apply operations on images to views [batch, views, height, width, channels].

    Args:
      views: in their order (group, count, operations).
      numbers: of their keys, on which all randomness depends; by default their places.
    """
    groups = dict.fromkeys(group for group, _, _ in views)
    keys = range(len(views)) if numbers is None else numbers

    def apply(batch: Batch, rng: Array) -> Batch:
        made: dict[str, list[Array]] = {group: [] for group in groups}
        for number, (group, count, functions) in zip(keys, views, strict=True):
            start = sum(part.shape[1] for part in made[group])
            part = batch[group][:, start : start + count]
            rows = {'image': part.reshape(-1, *part.shape[2:])}
            image = compose(functions)(rows, jax.random.fold_in(rng, number))['image']
            made[group].append(image.reshape(*part.shape[:2], *image.shape[1:]))
        return {**batch, **{group: jnp.concatenate(made[group], axis=1) for group in groups}}

    return Operation(apply)


def number(name: str, value: object, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ValueError(f'takes a number from {least:g} to {most:g} for {name}, not {value!r}')
    return float(value)


def _numbers(name: str, value: object) -> tuple[float, ...]:
    values = value if isinstance(value, tuple | list) else (value,)
    if not values or any(
        isinstance(v, bool) or not isinstance(v, int | float) or not np.isfinite(v) for v in values
    ):
        raise ValueError(f'takes a number, or one for each channel, for {name}, not {value!r}')
    return tuple(float(v) for v in values)


def _input_range(in_low: object, in_high: object) -> tuple[float, float] | None:
    if in_low is None and in_high is None:
        return None
    if in_low is None or in_high is None:
        raise ValueError('takes both of in_low and in_high, or none')
    first, last = number('in_low', in_low, -1e9, 1e9), number('in_high', in_high, -1e9, 1e9)
    if first >= last:
        raise ValueError(f'takes in_low below in_high, not {in_low!r} and {in_high!r}')
    return first, last


def _black_and_white(
    image: Image, given: tuple[float, float] | None, name: str
) -> tuple[float, float]:
    """Return the values of black and white; they cannot be guessed from floats."""
    if given is not None:
        return given
    if jnp.issubdtype(image.dtype, jnp.integer):
        return 0.0, float(jnp.iinfo(image.dtype).max)
    raise ValueError(
        f'{name}: these images are floats already: say what is black and white in them with '
        f'in_low and in_high, or put {name} before what makes floats of bytes'
    )


def value_range(low, high, in_low=None, in_high=None) -> Operation:
    """Convert to floats from low (black) to high (white).

    Images of whole numbers are black at 0 and white at 255 (or 65535); for floats, `in_low` and
    `in_high` must say what is black and white.
    """
    low, high = number('low', low, -1e6, 1e6), number('high', high, -1e6, 1e6)
    if low == high:
        raise ValueError(f'takes a low that is not high, not twice {low:g}')
    given = _input_range(in_low, in_high)

    def apply(batch: Batch, rng: Array) -> Batch:
        image = batch['image']
        first, last = _black_and_white(image, given, 'value_range')
        scale = (high - low) / (last - first)
        image = image.astype(jnp.float32) * scale + (low - first * scale)
        return {**batch, 'image': image}

    black, white = given or _BYTES
    return Operation(apply, of_range(low, high, black, white), given is not None)


def normalize(mean='imagenet', std='imagenet', in_low=None, in_high=None) -> Operation:
    """Convert to floats in 0..1, subtract `mean` and divide by `std` by channel, as torchvision.

    Black and white become 0 and 1 first; `value_range` says which values these are.
    """
    named = [value for value in (mean, std) if isinstance(value, str)]
    if named and named != ['imagenet', 'imagenet']:
        raise ValueError(f"takes numbers, or 'imagenet' for both, not {mean!r} and {std!r}")
    means, stds = _IMAGENET if named else (_numbers('mean', mean), _numbers('std', std))
    if min(stds) <= 0:
        raise ValueError(f'takes numbers above 0 for std, not {std!r}')
    given = _input_range(in_low, in_high)

    def apply(batch: Batch, rng: Array) -> Batch:
        image = batch['image']
        channels = image.shape[-1]
        if {len(means), len(stds)} - {1, channels}:
            numbers = max(len(means), len(stds))
            raise ValueError(f'normalize: {numbers} numbers for images of {channels} channels')
        first, last = _black_and_white(image, given, 'normalize')
        scale = 1 / ((last - first) * np.asarray(stds, np.float64))
        shift = -(first / (last - first) + np.asarray(means, np.float64)) / np.asarray(stds)
        shape = (1, 1, 1, -1)
        times, plus = (jnp.asarray(x, jnp.float32).reshape(shape) for x in (scale, shift))
        return {**batch, 'image': image.astype(jnp.float32) * times + plus}

    black, white = given or _BYTES
    return Operation(apply, of_mean_and_std(means, stds, black, white), given is not None)


def _flip(p: object, axis: int) -> Operation:
    share = number('p', p, 0, 1)

    def apply(batch: Batch, rng: Array) -> Batch:
        image = batch['image']
        turned = jax.random.bernoulli(rng, share, image.shape[:1])
        turned = turned.reshape(-1, 1, 1, 1)
        return {**batch, 'image': jnp.where(turned, jnp.flip(image, axis), image)}

    return Operation(apply, moves=True)


def flip_lr(p=0.5) -> Operation:
    """Mirror left to right with probability p."""
    return _flip(p, 2)


def flip_ud(p=0.5) -> Operation:
    """Mirror top to bottom with probability p."""
    return _flip(p, 1)


def inside(
    top: Float[Array, ' batch'],
    left: Float[Array, ' batch'],
    height: Float[Array, ' batch'],
    width: Float[Array, ' batch'],
    shape: tuple[int, int],
) -> Bool[Array, 'batch height width 1']:
    """Mask the pixels in the box of each example, by comparisons alone and without a gather."""

    def within(start: Array, length: Array, side: int) -> Array:
        at = jnp.arange(side, dtype=jnp.float32)[None]
        return (at >= start[:, None]) & (at < (start + length)[:, None])

    rows, columns = within(top, height, shape[0]), within(left, width, shape[1])
    return (rows[:, :, None] & columns[:, None, :])[..., None]


def random_erasing(
    p, min_area=0.02, max_area=1 / 3, min_aspect=0.3, mode='pixel', count=1
) -> Operation:
    """Fill random boxes with noise (arXiv 1708.04896), drawn as in timm.

    With probability p an example gets `count` boxes, which may overlap. The area of a box is
    uniform in the bounds, as a fraction of the image, then divided by `count`; the logarithm of its
    height / width is uniform between those of min_aspect and its inverse. The first of ten draws
    that is smaller than the image on both sides counts, else there is no box. `pixel` fills with a
    normal number for each value, `rand` with one for each channel, `const` with 0. Noise fits
    normalised images, so bytes become -1..1 first, and `value_range` and `normalize`, which refuse
    floats, come before.
    """
    share = number('p', p, 0, 1)
    least, most = number('min_area', min_area, 0, 1), number('max_area', max_area, 0, 1)
    if not 0 < least <= most:
        raise ValueError(f'takes 0 < min_area <= max_area, not {min_area!r} and {max_area!r}')
    steep = np.log(number('min_aspect', min_aspect, 1e-3, 1))
    if mode not in ('pixel', 'rand', 'const'):
        raise ValueError(f"takes 'pixel', 'rand' or 'const' for mode, not {mode!r}")
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 16:
        raise ValueError(f'takes a whole number from 1 to 16 for count, not {count!r}')

    def erase(image: Array, keys: Array, chosen: Array) -> Array:
        examples, height, width, channels = image.shape
        tries = (examples, _ERASING_ATTEMPTS)
        area = jax.random.uniform(keys[0], tries, minval=least, maxval=most)
        area = height * width / count * area
        aspect = jnp.exp(jax.random.uniform(keys[1], tries, minval=steep, maxval=-steep))
        tall, wide = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
        fits = (tall < height) & (wide < width)
        first = fits & (jnp.cumsum(fits, axis=1) == 1)
        tall, wide = (jnp.where(first, side, 0).sum(axis=1) for side in (tall, wide))
        top = jnp.floor(jax.random.uniform(keys[2], (examples,)) * (height - tall + 1))
        left = jnp.floor(jax.random.uniform(keys[3], (examples,)) * (width - wide + 1))
        if mode == 'const':
            fill = jnp.zeros((1, 1, 1, 1))
        else:
            shape = image.shape if mode == 'pixel' else (examples, 1, 1, channels)
            fill = jax.random.normal(keys[5], shape)
        erased = inside(top, left, tall, wide, (height, width)) & chosen
        return jnp.where(erased, fill.astype(image.dtype), image)

    def apply(batch: Batch, rng: Array) -> Batch:
        image = normalise(batch['image'])
        keys = jax.random.split(rng, (count, 6))
        chosen = jax.random.bernoulli(keys[0, 4], share, image.shape[:1]).reshape(-1, 1, 1, 1)
        for box in range(count):
            image = erase(image, keys[box], chosen)
        return {**batch, 'image': image}

    return Operation(apply, FROM_BYTES)


OPERATIONS: dict[str, Callable[..., Operation]] = {
    function.__name__: function
    for function in (value_range, normalize, flip_lr, flip_ud, random_erasing)
}
RANDOM = frozenset({'flip_lr', 'flip_ud', 'random_erasing'})


Mix = Callable[[Batch, Array], Batch]


def _unchanged(x: Array) -> Array:
    return x


def cutmix_boxes(
    share: Float[Array, ' batch'],
    centre: Float[Array, 'batch 2'],
    shape: tuple[int, int],
) -> tuple[Array, Array, Array, Array, Array]:
    """Compute the boxes that CutMix pastes (arXiv 1905.04899).

    The sides of a box are sqrt(1 - share) of the image's and its centre is anywhere. The part
    outside of the image is cut off, and the share is corrected for that.

    Args:
      share: fraction of the image to keep, in [0, 1].
      centre: (row, column) as fractions of the image, in [0, 1).
      shape: (height, width) in pixels.

    Returns:
      (top, left, height, width) in whole pixels and the share that is really kept, float [batch]
      each.
    """
    spans = []
    for side, at in zip(shape, (centre[:, 0], centre[:, 1]), strict=True):
        half = jnp.floor(side * jnp.sqrt(1 - share)) // 2
        middle = jnp.floor(at * side)
        start, stop = jnp.clip(middle - half, 0, side), jnp.clip(middle + half, 0, side)
        spans.append((start, stop - start))
    (top, height), (left, width) = spans
    return top, left, height, width, 1 - height * width / (shape[0] * shape[1])


def mix(
    batch: Batch,
    rng: Array,
    *,
    num_classes: int,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    switch: float = 0.5,
    prob: float = 1.0,
    replicate: Callable[[Array], Array] = _unchanged,
) -> Batch:
    """Mix each example with the one before it, by MixUp (arXiv 1710.09412) or CutMix (1905.04899).

    MixUp blends images: the share of an example is max(l, 1 - l), with its own l from
    Beta(mixup, mixup), so that every example has the larger part in one mixture, whose accuracy is
    measured by its label. CutMix pastes a box of the other image, of area 1 - l with l from
    Beta(cutmix, cutmix), as timm does. Labels are blended by the shares of pixels.

    Args:
      batch: {'image': uint8 or float [batch, h, w, c], 'label': int [batch], or
        probabilities [batch, classes]}; the whole batch of all devices.
      rng: a key.
      num_classes: number of classes.
      mixup: parameter of MixUp's Beta distribution; 0 turns it off.
      cutmix: parameter of CutMix's; 0 turns it off.
      switch: fraction of CutMix among mixtures, where both are on.
      prob: fraction of examples that are mixed.
      replicate: `sharding.constrain_replicated` of a mesh. Beta variates are drawn in loops until
        all are accepted; split over devices, these would synchronise in every iteration, which
        takes time and deadlocks XLA's fake CPU devices.

    Returns:
      {'image': float [batch, h, w, c], 'label': float [batch, classes]}, normalised.
    """
    image = batch['image']
    label = targets(batch['label'], num_classes, 0.0)
    count = image.shape[:1]
    if not mixup or not cutmix:
        switch = 1.0 if cutmix else 0.0
    # `beta` splits the key into folds 0 and 1.
    keys = jax.random.split(jax.random.fold_in(rng, 2), 4)
    share = jnp.ones(count)
    if switch < 1:
        share = jax.random.beta(rng, mixup, mixup, count)
        share = replicate(jnp.maximum(share, 1 - share))
    pasted = None
    if switch > 0:
        # The usual Beta(1, 1) is the uniform distribution.
        left = (
            jax.random.uniform(keys[0], count)
            if cutmix == 1
            else replicate(jax.random.beta(keys[0], cutmix, cutmix, count))
        )
        centre = jax.random.uniform(keys[1], (*count, 2))
        top, start, height, width, left = cutmix_boxes(left, centre, image.shape[1:3])
        chosen = (
            jnp.ones(count, bool) if switch == 1 else jax.random.bernoulli(keys[2], switch, count)
        )
        pasted = (top, start, height, width, chosen)
        share = jnp.where(chosen, left, share)
    if prob < 1:
        mixed = jax.random.bernoulli(keys[3], prob, count)
        share = jnp.where(mixed, share, 1.0)
    # Rolled before bytes become floats, so that devices exchange a quarter of the data.
    current, previous = normalise(image), normalise(jnp.roll(image, 1, axis=0))
    weight = share.reshape(-1, 1, 1, 1)
    if pasted is not None:
        top, start, height, width, chosen = pasted
        box = inside(top, start, height, width, image.shape[1:3]) & (weight < 1)
        weight = jnp.where(chosen.reshape(-1, 1, 1, 1), jnp.where(box, 0.0, 1.0), weight)
    part = share.reshape(-1, 1)
    return {
        **batch,
        'image': weight * current + (1 - weight) * previous,
        'label': part * label + (1 - part) * jnp.roll(label, 1, axis=0),
    }
