"""Classification: cross-entropy over classes, or over each class alone."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from big_vit.models.vit import HEADS, ViT
from big_vit.tasks.batch import Batch, model_inputs, targets
from big_vit.tasks.task import Aux, ExampleShape, Loss, Task, Tree


def classification(*, loss: str = 'softmax', label_smoothing: float = 0.0) -> Task:
    """Learns classes.

    Args:
      loss: 'softmax' over the classes, or 'sigmoid' for several labels an example.
      label_smoothing: share of the target spread over all classes (arXiv 1512.00567).
    """

    def model(trunk: ViT, example: ExampleShape) -> ViT:
        return trunk.clone(head=replace(trunk.head, num_classes=example.num_classes))

    return Task(
        name='classification',
        model=model,
        loss=lambda model, run: classification_loss(model, label_smoothing, loss),
        headline='accuracy',
        provides=frozenset({'logits', 'features'}),
        additions=HEADS,
        needs_labels=True,
        least_classes=2 if loss == 'softmax' else 1,
        mixes_labels=True,
        logits_loss=loss,
    )


def cross_entropy(
    logits: Float[Array, 'batch classes'], wanted: Float[Array, 'batch classes'], kind: str
) -> Float[Array, ' batch']:
    """The loss of each example: over the classes (softmax), or summed over each alone (sigmoid)."""
    if kind == 'softmax':
        return optax.softmax_cross_entropy(logits, wanted)
    return optax.sigmoid_binary_cross_entropy(logits, wanted).sum(-1)


def classification_loss(model: Any, label_smoothing: float = 0.0, kind: str = 'softmax') -> Loss:
    """Mean cross-entropy over a batch {'image', 'label'}.

    Its metric 'accuracy' is how often the highest logit is that of the (or a) largest label. With
    sigmoid and smoothing each class is wanted with its share, as for softmax.
    """

    def loss(
        params: Tree, state: Tree, batch: Batch, rng: Array | None, step: Array | int
    ) -> tuple[Array, Aux]:
        rngs = {} if rng is None else {'dropout': rng}
        inputs = model_inputs(batch)
        logits, _ = model.apply({'params': params}, inputs, train=rng is not None, rngs=rngs)
        plain = targets(batch['label'], logits.shape[-1], 0.0)
        wanted = targets(batch['label'], logits.shape[-1], label_smoothing)
        best = jnp.take_along_axis(plain, logits.argmax(-1)[:, None], axis=-1)[:, 0]
        hit = (best >= plain.max(-1)) & (best > 0)
        return cross_entropy(logits, wanted, kind).mean(), Aux({'accuracy': hit.mean()})

    return loss
