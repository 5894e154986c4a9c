"""What is trained: pure functions of (params, batch, rng)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, UInt8

Batch = dict[str, Any]
Loss = Callable[[Any, Batch, Array], tuple[Float[Array, ''], dict[str, Array]]]


def normalise(
    image: UInt8[Array, '*shape'] | Float[Array, '*shape'],
) -> Float[Array, '*shape']:
    """Bytes 0..255 as floats -1..1; floats are taken as they are."""
    if image.dtype == jnp.uint8:
        return image.astype(jnp.float32) * (2 / 255) - 1
    return image


def targets(
    label: Int[Array, ' batch'] | Float[Array, 'batch classes'], num_classes: int, smoothing: float
) -> Float[Array, 'batch classes']:
    """Label indices, or probabilities, as probabilities, `smoothing` of it spread evenly."""
    probabilities = jax.nn.one_hot(label, num_classes) if label.ndim == 1 else label
    return optax.smooth_labels(probabilities, smoothing) if smoothing else probabilities


def classification(apply: Callable[..., Any], label_smoothing: float = 0.0) -> Loss:
    """Softmax cross-entropy, the mean over the batch.

    Args:
      apply: `ViT.apply`.

    Returns:
      A function of (params, {'image', 'label'}, rng) that gives the loss and
      {'accuracy'}; with rng=None dropout is off.
    """

    def loss(params: Any, batch: Batch, rng: Array | None) -> tuple[Array, dict[str, Array]]:
        rngs = {} if rng is None else {'dropout': rng}
        image = normalise(batch['image'])
        logits, _ = apply({'params': params}, image, train=rng is not None, rngs=rngs)
        wanted = targets(batch['label'], logits.shape[-1], label_smoothing)
        hit = logits.argmax(-1) == wanted.argmax(-1)
        return optax.softmax_cross_entropy(logits, wanted).mean(), {'accuracy': hit.mean()}

    return loss


def classification_sums(apply: Callable[..., Any]) -> Callable[[Any, Batch], dict[str, Array]]:
    """Sums over the real examples of an evaluation batch, to be added up and divided once.

    Returns:
      A function of (params, {'image', 'label' [batch], 'mask' [batch]}) that
      gives the sums {'loss', 'top1', 'top5', 'count'}. An example counts for
      top-5 when fewer than five other classes have a logit above its own, and
      ties are taken against it; logits that are not finite never count.
    """

    def sums(params: Any, batch: Batch) -> dict[str, Array]:
        logits, _ = apply({'params': params}, normalise(batch['image']))
        label, mask = batch['label'], batch['mask']
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        own = jnp.take_along_axis(logits, label[:, None], axis=-1)
        others = jnp.arange(logits.shape[-1])[None] != label[:, None]
        # "not below" rather than "above": a collapsed or NaN model must not score.
        rank = (~(logits < own) & others).sum(-1)
        rank = jnp.where(jnp.isfinite(own[:, 0]), rank, logits.shape[-1])
        return {
            # Padding must not count even where the model makes NaN of it.
            'loss': jnp.where(mask > 0, loss, 0.0).sum(),
            'top1': ((rank < 1) * mask).sum(),
            'top5': ((rank < 5) * mask).sum(),
            'count': mask.sum(),
        }

    return sums
