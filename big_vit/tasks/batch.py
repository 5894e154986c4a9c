"""Parts of a batch: the model's inputs and the targets of a loss."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, UInt

from big_vit.models.tokenizers import PICTURES

Batch = dict[str, Any]

# Parts of a batch that no model takes: what is learned of an example, and what says which it is.
TARGETS = frozenset(
    (
        *('label', 'mask', 'example', 'boxes', 'box_label', 'box_mask', 'picture_size'),
        'segmentation',
    )
)


def normalise(
    image: UInt[Array, '*shape'] | Float[Array, '*shape'],
) -> Float[Array, '*shape']:
    """Whole numbers 0..255 (or 65535) as floats -1..1; floats are taken as they are."""
    if jnp.issubdtype(image.dtype, jnp.integer):
        return image.astype(jnp.float32) * (2 / jnp.iinfo(image.dtype).max) - 1
    return image


def model_inputs(batch: Batch) -> Any:
    """The image of a batch, or all parts that a model may read, with pixels as floats."""
    given = {
        name: normalise(x) if name in PICTURES else x
        for name, x in batch.items()
        if name not in TARGETS
    }
    return given['image'] if set(given) == {'image'} else given


def targets(
    label: Int[Array, ' batch'] | Float[Array, 'batch classes'], num_classes: int, smoothing: float
) -> Float[Array, 'batch classes']:
    """Label indices, or probabilities, as probabilities, `smoothing` of it spread evenly."""
    probabilities = jax.nn.one_hot(label, num_classes) if label.ndim == 1 else label
    return optax.smooth_labels(probabilities, smoothing) if smoothing else probabilities
