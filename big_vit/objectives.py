"""What is trained: pure functions of (params, batch, rng)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, UInt

from big_vit.models.tokenizers import PICTURES

Batch = dict[str, Any]
Loss = Callable[[Any, Batch, Array], tuple[Float[Array, ''], dict[str, Array]]]


def normalise(
    image: UInt[Array, '*shape'] | Float[Array, '*shape'],
) -> Float[Array, '*shape']:
    """Whole numbers 0..255 (or 65535) as floats -1..1; floats are taken as they are."""
    if jnp.issubdtype(image.dtype, jnp.integer):
        return image.astype(jnp.float32) * (2 / jnp.iinfo(image.dtype).max) - 1
    return image


def inputs(batch: Batch) -> Any:
    """What the model is given of a batch: its image, or all of its parts, numbers as floats."""
    given = {
        name: normalise(x) if name in PICTURES else x
        for name, x in batch.items()
        if name not in ('label', 'mask')
    }
    return given['image'] if set(given) == {'image'} else given


def targets(
    label: Int[Array, ' batch'] | Float[Array, 'batch classes'], num_classes: int, smoothing: float
) -> Float[Array, 'batch classes']:
    """Label indices, or probabilities, as probabilities, `smoothing` of it spread evenly."""
    probabilities = jax.nn.one_hot(label, num_classes) if label.ndim == 1 else label
    return optax.smooth_labels(probabilities, smoothing) if smoothing else probabilities


def _cross_entropy(
    logits: Float[Array, 'batch classes'], wanted: Float[Array, 'batch classes'], kind: str
) -> Float[Array, ' batch']:
    """Of each example: over the classes (softmax), or summed over one for each (sigmoid)."""
    if kind == 'softmax':
        return optax.softmax_cross_entropy(logits, wanted)
    return optax.sigmoid_binary_cross_entropy(logits, wanted).sum(-1)


def classification(
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
        given = inputs(batch)
        logits, _ = apply({'params': params}, given, train=rng is not None, rngs=rngs)
        plain = targets(batch['label'], logits.shape[-1], 0.0)
        wanted = targets(batch['label'], logits.shape[-1], label_smoothing)
        best = jnp.take_along_axis(plain, logits.argmax(-1)[:, None], axis=-1)[:, 0]
        hit = (best >= plain.max(-1)) & (best > 0)
        return _cross_entropy(logits, wanted, kind).mean(), {'accuracy': hit.mean()}

    return loss


def row_hashes(words: Int[Array, 'batch length']) -> UInt[Array, 'batch 2']:
    """Two numbers that rows have in common where they are equal (and by chance of 2**-64)."""
    place = jnp.arange(1, words.shape[1] + 1, dtype=jnp.uint32)[None]
    value = words.astype(jnp.uint32)
    sums = []
    for factor in (0x9E3779B1, 0xC2B2AE3D):
        mixed = (value + place * jnp.uint32(factor)) * jnp.uint32(0x85EBCA77)
        mixed = (mixed ^ (mixed >> jnp.uint32(15))) * jnp.uint32(factor)
        sums.append((mixed ^ (mixed >> jnp.uint32(13))).sum(axis=1, dtype=jnp.uint32))
    return jnp.stack(sums, axis=1)


def contrastive(apply: Callable[..., Any], kind: str, words: str | None = None) -> Loss:
    """Which of a batch belong together, of a model with two streams apart.

    'softmax' is CLIP's loss (arXiv 2103.00020): for each example of one stream a softmax over
    those of the other, the mean of both ways. 'sigmoid' is SigLIP's (arXiv 2303.15343): yes or no
    for each pair, summed over the pairs of an example. Unlike there, an equal text is no negative:
    examples with the same words belong together too, and share what a softmax wants of them.

    Args:
      apply: `ViT.apply`, whose logits are [batch, batch].
      words: the part of a batch that says which examples are the same; None: no two are.

    Returns:
      A function of (params, batch, rng) that gives the loss and {'accuracy'}: how often the
      most alike of the second stream belongs to an example of the first.
    """

    def loss(params: Any, batch: Batch, rng: Array | None) -> tuple[Array, dict[str, Array]]:
        rngs = {} if rng is None else {'dropout': rng}
        logits, _ = apply({'params': params}, inputs(batch), train=rng is not None, rngs=rngs)
        together = jnp.eye(len(logits), dtype=bool)
        if words is not None:
            one = row_hashes(batch[words])
            together |= (one[:, None] == one[None]).all(-1)
        best = jnp.take_along_axis(together, logits.argmax(-1)[:, None], axis=-1)
        aux = {'accuracy': best.mean()}
        if kind == 'sigmoid':
            return optax.sigmoid_binary_cross_entropy(logits, together).sum(-1).mean(), aux
        # `together` is symmetric, so its rows are the shares both ways.
        wanted = together / together.sum(-1, keepdims=True)
        ways = (optax.softmax_cross_entropy(way, wanted).mean() for way in (logits, logits.T))
        return sum(ways, jnp.zeros(())) / 2, aux

    return loss


def classification_sums(
    apply: Callable[..., Any],
    prepare: Callable[[Batch], Batch] = lambda batch: batch,
    kind: str = 'softmax',
    *,
    subset: tuple[int, ...] = (),
    skip_unlabelled: bool = False,
    more: Callable[[Array, Array, Array, Array], dict[str, Array]] | None = None,
) -> Callable[[Any, Batch], dict[str, Array]]:
    """Sums over the real examples of an evaluation batch, to be added up and divided once.

    Args:
      prepare: what the devices do to the images.
      kind: of cross-entropy, as in `classification`.
      subset: the only classes that compete, by their numbers; () are all. An example of none of
        them is a miss.
      skip_unlabelled: whether an example without any label counts as padding.
      more: gives further sums of (logits, labels, mask, whether top-1 is right), labels as
        probabilities [batch, classes].

    Returns:
      A function of (params, {'image', 'label' [batch] or [batch, classes], 'mask' [batch]}) that
      gives the sums {'loss', 'top1', 'top5', 'count'}. An example counts for
      top-5 when fewer than five classes that it is not have a logit above the highest of those
      that it is, and ties are taken against it; logits that are not finite never count.
    """

    def sums(params: Any, batch: Batch) -> dict[str, Array]:
        logits, _ = apply({'params': params}, inputs(prepare(batch)))
        mask, wanted = batch['mask'], targets(batch['label'], logits.shape[-1], 0.0)
        if skip_unlabelled:
            mask = mask * (wanted > 0).any(-1)
        if subset:
            chosen = jnp.asarray(subset)
            logits, wanted = logits[:, chosen], wanted[:, chosen]
        loss = _cross_entropy(logits, wanted, kind)
        own = jnp.where(wanted > 0, logits, -jnp.inf).max(-1, keepdims=True)
        # "not below" rather than "above": a collapsed or NaN model must not score.
        rank = (~(logits < own) & (wanted <= 0)).sum(-1)
        rank = jnp.where(jnp.isfinite(own[:, 0]), rank, logits.shape[-1])
        return {
            # Padding must not count even where the model makes NaN of it.
            'loss': jnp.where(mask > 0, loss, 0.0).sum(),
            'top1': ((rank < 1) * mask).sum(),
            'top5': ((rank < 5) * mask).sum(),
            'count': mask.sum(),
            **(more(logits, wanted, mask, rank < 1) if more else {}),
        }

    return sums
