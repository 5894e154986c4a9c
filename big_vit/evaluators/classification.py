"""Accuracy of the head over a whole split, each example counted once, and how calibrated it is."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from big_vit.evaluators import classification
from big_vit.tasks.batch import Batch, model_inputs, targets
from big_vit.tasks.classification import cross_entropy

BINS = 15


def sums(
    apply: Callable[..., Any],
    prepare: Callable[[Batch], Batch] = lambda batch: batch,
    kind: str = 'softmax',
    *,
    calibration: bool = False,
    per_class: bool = False,
    subset: tuple[int, ...] = (),
    skip_unlabelled: bool = False,
) -> Callable[[Any, Batch], dict[str, Array]]:
    """`objectives.classification_sums`, with what else is asked for.

    Args:
      calibration: also `calibration_sums`.
      per_class: also `class_sums`.
    """
    asked = [calibration_sums] * calibration + [class_sums] * per_class

    def more(logits: Array, wanted: Array, mask: Array, hit: Array) -> dict[str, Array]:
        found: dict[str, Array] = {}
        for function in asked:
            found |= function(logits, wanted, mask, hit)
        return found

    return classification.classification_sums(
        apply,
        prepare,
        kind,
        subset=subset,
        skip_unlabelled=skip_unlabelled,
        more=more if asked else None,
    )


def calibration_sums(
    logits: Float[Array, 'batch classes'],
    wanted: Float[Array, 'batch classes'],
    mask: Float[Array, ' batch'],
    hit: Bool[Array, ' batch'],
) -> dict[str, Array]:
    """Negative log-likelihood, Brier score, and what the calibration error is made of.

    Of several right labels each is wanted with the same share. Bin i of `BINS` holds the
    examples whose largest probability is in (i / BINS, (i + 1) / BINS] (arXiv 1706.04599).
    """
    share = wanted / jnp.maximum(wanted.sum(-1, keepdims=True), 1e-9)
    nll = optax.softmax_cross_entropy(logits, share)
    probability = jax.nn.softmax(logits)
    brier = jnp.square(probability - share).sum(-1)
    sure = probability.max(-1)
    place = jnp.clip(jnp.ceil(sure * BINS) - 1, 0, BINS - 1)
    real = mask[:, None] * (place[:, None] == jnp.arange(BINS)[None])
    return {
        'nll': jnp.where(mask > 0, nll, 0).sum(),
        'brier': jnp.where(mask > 0, brier, 0).sum(),
        'bin_sure': jnp.where(real > 0, sure[:, None], 0).sum(0),
        'bin_right': (real * hit[:, None]).sum(0),
    }


def class_sums(
    logits: Float[Array, 'batch classes'],
    wanted: Float[Array, 'batch classes'],
    mask: Float[Array, ' batch'],
    hit: Bool[Array, ' batch'],
) -> dict[str, Array]:
    """Examples of each class, and hits; one of several classes counts in each."""
    of_class = (wanted > 0) * mask[:, None]
    return {'class_count': of_class.sum(0), 'class_right': (of_class * hit[:, None]).sum(0)}


def totals(parts: Iterable[dict[str, jax.Array]]) -> dict[str, Any]:
    """The sums of all batches added up, in float64, of any shapes."""
    every: list[dict[str, jax.Array]] = []
    for part in parts:
        every.append(part)
        if len(every) > 2:  # Waiting two behind bounds the batches that wait on the devices.
            jax.block_until_ready(every[-3])
    fetched = jax.device_get(every)
    return {name: sum(part[name].astype(np.float64) for part in fetched) for name in fetched[0]}


def run(
    eval_step: Callable[[Any, Any], dict[str, jax.Array]],
    params: Any,
    batches: Iterable[Any],
    names: Sequence[str] = (),
) -> dict[str, float]:
    """{'loss', 'top1', 'top5', 'count'}: means over the real examples, and how many they are.

    With `calibration` of `sums` also {'ece', 'nll', 'brier'}; with `per_class`
    {'mean_per_class'}, and 'top1/NAME' for each of `names` that has an example.

    Args:
      names: of the classes that compete, in order.
    """
    total = totals(eval_step(params, batch) for batch in batches)
    count = float(total.pop('count'))
    found: dict[str, float] = {}
    if 'bin_sure' in total:
        gap = np.abs(total.pop('bin_sure') - total.pop('bin_right')).sum()
        found['ece'] = float(gap) / count if count else np.nan
    if 'class_count' in total:
        many, right = total.pop('class_count'), total.pop('class_right')
        there = many > 0
        share = right[there] / many[there]
        found['mean_per_class'] = float(share.mean()) if there.any() else np.nan
        if names:
            own = [name for name, occurs in zip(names, there, strict=True) if occurs]
            found |= {f'top1/{name}': float(x) for name, x in zip(own, share, strict=True)}
    first = ('loss', 'top1', 'top5')
    names_ = (*first, *(name for name in total if name not in first))
    means = {name: float(total[name]) / count if count else np.nan for name in names_}
    return {**means, **found, 'count': count}


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
        logits, _ = apply({'params': params}, model_inputs(prepare(batch)))
        mask, wanted = batch['mask'], targets(batch['label'], logits.shape[-1], 0.0)
        if skip_unlabelled:
            mask = mask * (wanted > 0).any(-1)
        if subset:
            chosen = jnp.asarray(subset)
            logits, wanted = logits[:, chosen], wanted[:, chosen]
        loss = cross_entropy(logits, wanted, kind)
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
