"""Accuracy of the model's own head over a whole split, and how well it is calibrated."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from big_vit.data.sources import Source
from big_vit.data.sources.classes import choose
from big_vit.errors import UserError, printable
from big_vit.evaluators.evaluation import (
    BatchMeans,
    Evaluation,
    Evaluator,
    SharedFeatures,
    Sums,
)
from big_vit.evaluators.requirements import requires
from big_vit.tasks.batch import Batch, model_inputs, targets
from big_vit.tasks.classification import cross_entropy

BINS = 15


def _scores(calibration: bool, per_class: str, **_: Any) -> tuple[str, ...]:
    more = ('ece', 'nll', 'brier') * calibration + ('mean_per_class',) * (per_class != 'none')
    return 'top1', 'top5', 'loss', *more


@requires('logits', labels='any', head_top1=True, scores=_scores)
def classification(
    evaluation: Evaluation,
    *,
    calibration: bool = False,
    per_class: str = 'none',
    subset: Any = None,
    skip_unlabelled: bool = False,
) -> Evaluator:
    """Score the head: top-1, top-5 and loss.

    Args:
      calibration: also measure 'ece', 'nll' and 'brier'.
      per_class: 'mean' adds the mean of the accuracies of all classes, 'all' also each of them.
      subset: the only classes that compete: names or numbers, or 'present' for those of the split.
      skip_unlabelled: leave out examples without a label.

    Returns:
      `BatchMeans`, unless an option is set.

    Raises:
      UserError: calibration without probabilities over classes, or a class that does not exist.
    """
    key, options, names = evaluation.key, dict[str, Any](), tuple[str, ...]()
    if calibration:
        if evaluation.loss != 'softmax':
            raise UserError(
                f"config: {key}.calibration is of probabilities over classes: set loss='softmax'"
            )
        options['calibration'] = True
    if per_class != 'none':
        options['per_class'] = True
    if skip_unlabelled:
        options['skip_unlabelled'] = True
    if subset is not None:
        options['subset'] = competing(subset, evaluation.split.source, evaluation.training, key)
    if per_class == 'all':
        names = class_names(evaluation.training)
        names = tuple(names[number] for number in options.get('subset', range(len(names))))
    step = head_step(evaluation, **options)

    def evaluate(params: Any, shared: SharedFeatures) -> dict[str, float]:
        return run(step, params, evaluation.split.batches(), names)

    if options:
        return evaluate
    return BatchMeans(head_sums(evaluation), evaluate)


def head_step(evaluation: Evaluation, **options: Any) -> Sums:
    """Compile `sums` for the split, once for all evaluations that prepare images alike."""
    key = 'head', evaluation.split.device, tuple(options.items())
    return evaluation.compile_sums(key, head_sums(evaluation, **options))


def head_sums(evaluation: Evaluation, **options: Any) -> Sums:
    """Make `sums` of the evaluated model, not jitted."""
    apply, prepare = evaluation.model.apply, evaluation.split.prepare
    return sums(apply, prepare, evaluation.loss, **options)


def class_names(source: Source) -> tuple[str, ...]:
    """Return the names of the classes in one line each, or their numbers as text."""
    return tuple(map(printable, source.class_names or map(str, range(source.num_classes))))


def competing(chosen: Any, source: Source, training: Source, key: str) -> tuple[int, ...]:
    """Return the numbers of the classes that compete, in ascending order.

    Args:
      chosen: 'present' for the classes that occur in `source`, or names or numbers of classes.
      training: the source whose classes the model knows.
      key: of the evaluation in the config, for messages.

    Raises:
      UserError: a class that the model does not have, one given twice, or labels that cannot be
        listed.
    """
    if chosen == 'present':
        if source.labels is None:
            raise UserError(
                f"config: {key}.subset='present': the labels of {source.name} cannot be "
                'listed; name the classes in a tuple'
            )
        return tuple(np.unique(source.labels()).tolist())
    names, classes = training.class_names, training.num_classes
    key = f'config: {key}.subset'
    numbers = [choose(one, names, classes, 'the model', key) for one in chosen]
    if len(set(numbers)) != len(numbers):
        raise UserError(f'{key} names a class twice')
    return tuple(sorted(numbers))


def sums(
    apply: Callable[..., Any],
    prepare: Callable[[Batch], Batch] = lambda batch: batch,
    kind: str = 'softmax',
    *,
    calibration: bool = False,
    per_class: bool = False,
    subset: tuple[int, ...] = (),
    skip_unlabelled: bool = False,
) -> Sums:
    """Make a function that sums metrics over the real examples of a batch.

    Args:
      apply: of the model: ({'params'}, inputs) -> (logits [batch, classes], extra).
      prepare: device operations on the batch.
      kind: of the cross-entropy, 'softmax' or 'sigmoid'.
      calibration: also compute `calibration_sums`.
      per_class: also compute `class_sums`.
      subset: the only classes that compete, by number; () for all. An example of no such class
        is a miss.
      skip_unlabelled: whether an example without any label counts as padding.

    Returns:
      A function of (params, {'image', 'label' [batch] or [batch, classes], 'mask' [batch]}) that
      returns the sums {'loss', 'top1', 'top5', 'count'} and those asked for. An example counts
      for top-5 if fewer than five classes that it does not have get a logit above the highest
      of those that it has. Ties count against it, and logits that are not finite never count.
    """
    extra_sums = [calibration_sums] * calibration + [class_sums] * per_class

    def sum_batch(params: Any, batch: Batch) -> dict[str, Array]:
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
        total = {
            # Padding must not count even where the model makes NaN of it.
            'loss': jnp.where(mask > 0, loss, 0.0).sum(),
            'top1': ((rank < 1) * mask).sum(),
            'top5': ((rank < 5) * mask).sum(),
            'count': mask.sum(),
        }
        for function in extra_sums:
            total |= function(logits, wanted, mask, rank < 1)
        return total

    return sum_batch


def calibration_sums(
    logits: Float[Array, 'batch classes'],
    wanted: Float[Array, 'batch classes'],
    mask: Float[Array, ' batch'],
    hit: Bool[Array, ' batch'],
) -> dict[str, Array]:
    """Sum the negative log-likelihood, the Brier score, and the bins of the calibration error.

    Several right labels of an example share its probability equally. Bin i of `BINS` holds the
    examples whose largest probability is in (i / BINS, (i + 1) / BINS] (arXiv 1706.04599).

    Args:
      wanted: labels as probabilities.
      hit: whether top-1 is right.
    """
    share = wanted / jnp.maximum(wanted.sum(-1, keepdims=True), 1e-9)
    nll = optax.softmax_cross_entropy(logits, share)
    probability = jax.nn.softmax(logits)
    brier = jnp.square(probability - share).sum(-1)
    confidence = probability.max(-1)
    place = jnp.clip(jnp.ceil(confidence * BINS) - 1, 0, BINS - 1)
    real = mask[:, None] * (place[:, None] == jnp.arange(BINS)[None])
    return {
        'nll': jnp.where(mask > 0, nll, 0).sum(),
        'brier': jnp.where(mask > 0, brier, 0).sum(),
        'bin_confidence': jnp.where(real > 0, confidence[:, None], 0).sum(0),
        'bin_hits': (real * hit[:, None]).sum(0),
    }


def class_sums(
    logits: Float[Array, 'batch classes'],
    wanted: Float[Array, 'batch classes'],
    mask: Float[Array, ' batch'],
    hit: Bool[Array, ' batch'],
) -> dict[str, Array]:
    """Count examples and hits by class; an example with several classes counts in each.

    Args: as for `calibration_sums`.
    """
    of_class = (wanted > 0) * mask[:, None]
    return {'class_count': of_class.sum(0), 'class_hits': (of_class * hit[:, None]).sum(0)}


def totals(parts: Iterable[dict[str, jax.Array]]) -> dict[str, Any]:
    """Add up the sums of all batches, of any shapes, in float64."""
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
    """Compute {'loss', 'top1', 'top5', 'count'}: means over the real examples, and their number.

    With `calibration` of `sums` also {'ece', 'nll', 'brier'}; with `per_class`
    {'mean_per_class'}, and 'top1/NAME' for each of `names` that has an example.

    Args:
      eval_step: `sums`, jitted.
      names: of the classes that compete, in order.
    """
    total = totals(eval_step(params, batch) for batch in batches)
    count = float(total.pop('count'))
    more: dict[str, float] = {}
    if 'bin_confidence' in total:
        gap = np.abs(total.pop('bin_confidence') - total.pop('bin_hits')).sum()
        more['ece'] = float(gap) / count if count else np.nan
    if 'class_count' in total:
        examples, hits = total.pop('class_count'), total.pop('class_hits')
        occurs = examples > 0
        accuracy = hits[occurs] / examples[occurs]
        more['mean_per_class'] = float(accuracy.mean()) if occurs.any() else np.nan
        if names:
            kept = [name for name, here in zip(names, occurs, strict=True) if here]
            more |= {f'top1/{name}': float(x) for name, x in zip(kept, accuracy, strict=True)}
    first = ('loss', 'top1', 'top5')
    order = (*first, *(name for name in total if name not in first))
    means = {name: float(total[name]) / count if count else np.nan for name in order}
    return {**means, **more, 'count': count}
