"""Examples made of several others: functions of (batch, rng), on the device."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from big_vit import objectives
from big_vit.objectives import Batch

Mix = Callable[[Batch, Array], Batch]


def _as_it_is(x: Array) -> Array:
    return x


def mixup(
    batch: Batch,
    rng: Array,
    *,
    alpha: float,
    num_classes: int,
    replicate: Callable[[Array], Array] = _as_it_is,
) -> Batch:
    """MixUp (arXiv 1710.09412): each example with the one before it in the batch.

    The share of an example is max(l, 1 - l) with l of Beta(alpha, alpha), one for each: so
    every example has the larger part in one mixture, and is the class that accuracy asks for.

    Args:
      batch: {'image': uint8 or float [batch, h, w, c], 'label': int [batch], or
        probabilities [batch, classes]}; the whole batch of all devices.
      rng: a key.
      replicate: `sharding.constrain_replicated` of a mesh. The shares are drawn in loops until
        all are accepted; split over devices, these would agree on each turn with one another
        (which takes time, and XLA's fake CPU devices wait for one another for ever).

    Returns:
      {'image': float [batch, h, w, c], 'label': float [batch, classes]}, normalised.
    """
    image = batch['image']
    label = objectives.targets(batch['label'], num_classes, 0.0)
    share = jax.random.beta(rng, alpha, alpha, image.shape[:1])
    share = replicate(jnp.maximum(share, 1 - share))

    def mix(own: Array, other: Array) -> Array:
        part = share.reshape(-1, *[1] * (own.ndim - 1))
        return part * own + (1 - part) * other

    # Rolled as bytes: the one row that each device hands to the next is then small.
    other = objectives.normalise(jnp.roll(image, 1, axis=0))
    return {
        **batch,
        'image': mix(objectives.normalise(image), other),
        'label': mix(label, jnp.roll(label, 1, axis=0)),
    }
