"""Classification: cross-entropy over classes, or over each class alone."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from big_vit.tasks.batch import Batch, Loss, model_inputs, targets


def cross_entropy(
    logits: Float[Array, 'batch classes'], wanted: Float[Array, 'batch classes'], kind: str
) -> Float[Array, ' batch']:
    """Of each example: over the classes (softmax), or summed over one for each (sigmoid)."""
    if kind == 'softmax':
        return optax.softmax_cross_entropy(logits, wanted)
    return optax.sigmoid_binary_cross_entropy(logits, wanted).sum(-1)


def classification_loss(
    apply: Callable[..., Any], label_smoothing: float = 0.0, kind: str = 'softmax'
) -> Loss:
    """Cross-entropy, the mean over the batch.

    Args:
      apply: `ViT.apply`.
      label_smoothing: share of the target spread over all classes; with sigmoid each class is
        wanted with its share, as for softmax.
      kind: softmax, or sigmoid, which is for several labels an example.

    Returns:
      A function of (params, {'image', 'label'}, rng) that gives the loss and
      {'accuracy'}: how often the highest logit is that of the (or a) largest label; with
      rng=None dropout is off.
    """

    def loss(params: Any, batch: Batch, rng: Array | None) -> tuple[Array, dict[str, Array]]:
        rngs = {} if rng is None else {'dropout': rng}
        given = model_inputs(batch)
        logits, _ = apply({'params': params}, given, train=rng is not None, rngs=rngs)
        plain = targets(batch['label'], logits.shape[-1], 0.0)
        wanted = targets(batch['label'], logits.shape[-1], label_smoothing)
        best = jnp.take_along_axis(plain, logits.argmax(-1)[:, None], axis=-1)[:, 0]
        hit = (best >= plain.max(-1)) & (best > 0)
        return cross_entropy(logits, wanted, kind).mean(), {'accuracy': hit.mean()}

    return loss
