"""Examples made of several others: functions of (batch, rng), on the device."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from big_vit import objectives
from big_vit.augment import inside
from big_vit.objectives import Batch

Mix = Callable[[Batch, Array], Batch]


def _as_it_is(x: Array) -> Array:
    return x


def boxes(
    share: Float[Array, ' batch'],
    centre: Float[Array, 'batch 2'],
    shape: tuple[int, int],
) -> tuple[Array, Array, Array, Array, Array]:
    """The box that CutMix pastes (arXiv 1905.04899), and the share of the image that is left.

    Its sides are sqrt(1 - share) of the image's, its centre is anywhere, and what lies outside of
    the image is cut off, so that the share is corrected to what is really left.

    Args:
      share: of the own image, in [0, 1].
      centre: (row, column) as shares of the image, in [0, 1).
      shape: (height, width).

    Returns:
      (top, left, height, width, share left), float [batch] each, of whole pixels.
    """
    found = []
    for side, at in zip(shape, (centre[:, 0], centre[:, 1]), strict=True):
        half = jnp.floor(side * jnp.sqrt(1 - share)) // 2
        middle = jnp.floor(at * side)
        start, stop = jnp.clip(middle - half, 0, side), jnp.clip(middle + half, 0, side)
        found.append((start, stop - start))
    (top, height), (left, width) = found
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
    replicate: Callable[[Array], Array] = _as_it_is,
) -> Batch:
    """MixUp (arXiv 1710.09412) or CutMix (arXiv 1905.04899), each example with the one before it.

    MixUp blends: the share of an example is max(l, 1 - l) with l of Beta(mixup, mixup), one for
    each, so every example has the larger part in one mixture, and is the class that accuracy asks
    for. CutMix pastes a box of the other, of area 1 - l with l of Beta(cutmix, cutmix), as timm
    does. Labels are blended by the shares of pixels.

    Args:
      batch: {'image': uint8 or float [batch, h, w, c], 'label': int [batch], or
        probabilities [batch, classes]}; the whole batch of all devices.
      rng: a key.
      mixup, cutmix: of the Beta laws; 0 is off.
      switch: the share of CutMix among mixtures, where both are on.
      prob: the share of examples that are mixed.
      replicate: `sharding.constrain_replicated` of a mesh. The shares are drawn in loops until
        all are accepted; split over devices, these would agree on each turn with one another
        (which takes time, and XLA's fake CPU devices wait for one another for ever).

    Returns:
      {'image': float [batch, h, w, c], 'label': float [batch, classes]}, normalised.
    """
    image = batch['image']
    label = objectives.targets(batch['label'], num_classes, 0.0)
    count = image.shape[:1]
    if not mixup or not cutmix:
        switch = 1.0 if cutmix else 0.0
    # Folds 0 and 1 of this key are those that `beta` splits it into.
    keys = jax.random.split(jax.random.fold_in(rng, 2), 4)
    share = jnp.ones(count)
    if switch < 1:
        share = jax.random.beta(rng, mixup, mixup, count)
        share = replicate(jnp.maximum(share, 1 - share))
    pasted = None
    if switch > 0:
        # Beta(1, 1), which is usual, is the uniform law.
        left = (
            jax.random.uniform(keys[0], count)
            if cutmix == 1
            else replicate(jax.random.beta(keys[0], cutmix, cutmix, count))
        )
        centre = jax.random.uniform(keys[1], (*count, 2))
        top, start, height, width, left = boxes(left, centre, image.shape[1:3])
        chosen = (
            jnp.ones(count, bool) if switch == 1 else jax.random.bernoulli(keys[2], switch, count)
        )
        pasted = (top, start, height, width, chosen)
        share = jnp.where(chosen, left, share)
    if prob < 1:
        mixed = jax.random.bernoulli(keys[3], prob, count)
        share = jnp.where(mixed, share, 1.0)
    # Rolled as bytes, if so given: the one row that each device hands to the next is then small.
    own, other = objectives.normalise(image), objectives.normalise(jnp.roll(image, 1, axis=0))
    weight = share.reshape(-1, 1, 1, 1)
    if pasted is not None:
        top, start, height, width, chosen = pasted
        box = inside(top, start, height, width, image.shape[1:3]) & (weight < 1)
        weight = jnp.where(chosen.reshape(-1, 1, 1, 1), jnp.where(box, 0.0, 1.0), weight)
    part = share.reshape(-1, 1)
    return {
        **batch,
        'image': weight * own + (1 - weight) * other,
        'label': part * label + (1 - part) * jnp.roll(label, 1, axis=0),
    }
