"""What a classifier takes for what: figures of each class, confused pairs, and the worst errors."""

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from big_vit.errors import UserError
from big_vit.evaluators.classification import class_names, competing
from big_vit.evaluators.evaluation import Evaluation
from big_vit.tasks.batch import Batch, model_inputs, targets
from big_vit.tasks.classification import cross_entropy

Judge = Callable[[Any, Iterable[Batch]], 'Judged']


class Judged(NamedTuple):
    """What was answered for the examples of a split that have one class.

    Attributes:
      rows: places of the examples among those that were given.
      labels, predicted: numbers of classes.
      losses: cross-entropies.
      likely: probabilities of the predicted classes.
      names: of all classes.
      seen: number of examples that were given; fewer than there are if time was short.
    """

    rows: Int[np.ndarray, ' examples']
    labels: Int[np.ndarray, ' examples']
    predicted: Int[np.ndarray, ' examples']
    losses: Float[np.ndarray, ' examples']
    likely: Float[np.ndarray, ' examples']
    names: tuple[str, ...]
    seen: int

    @property
    def accuracy(self) -> float:
        return float((self.labels == self.predicted).mean()) if len(self.labels) else np.nan


class ClassFigures(NamedTuple):
    """How well one class is told, as scikit-learn defines it; 0 where nothing is divided by.

    Attributes:
      support: number of its examples.
      taken_for: the class that most of its missed examples were taken for; '' if none was missed.
      times: how many were.
    """

    name: str
    precision: float
    recall: float
    f1: float
    support: int
    taken_for: str
    times: int


class Confused(NamedTuple):
    """How many examples of a class were taken for another."""

    true: str
    predicted: str
    times: int
    share: float


def make_judge(
    evaluation: Evaluation,
    *,
    subset: Any = None,
    skip_unlabelled: bool = False,
    seconds: float | None = None,
    **_: Any,
) -> Judge:
    """Make a function of (params, batches) that says what the head answers for each example.

    Args: as for `classification`, whose other options change no answer.
      seconds: stop after the batch in which so many have passed.

    Raises:
      UserError: as `classification`; when it runs, an example has several classes.
    """
    chosen: tuple[int, ...] = ()
    if subset is not None:
        source, training = evaluation.split.source, evaluation.training
        chosen = competing(subset, source, training, evaluation.key)
    prepare, apply = evaluation.split.prepare, evaluation.model.apply
    kind = evaluation.loss

    def answers(params: Any, batch: Batch) -> dict[str, Array]:
        logits, _ = apply({'params': params}, model_inputs(prepare(batch)))
        wanted = targets(batch['label'], logits.shape[-1], 0.0)
        labels = (wanted > 0).sum(-1)
        of = jnp.asarray(chosen or range(logits.shape[-1]))
        some = logits[:, of].astype(jnp.float32)
        squash = jax.nn.softmax if kind == 'softmax' else jax.nn.sigmoid
        return {
            'label': wanted.argmax(-1),
            'labels': labels,
            'predicted': of[some.argmax(-1)],
            'loss': cross_entropy(some, wanted[:, of], kind),
            'likely': squash(some).max(-1),
            'mask': batch['mask'],
        }

    step = evaluation.compile_sums(('answers', evaluation.split.device, chosen), answers)

    def judge(params: Any, batches: Iterable[Batch]) -> Judged:
        began, waiting, parts = time.monotonic(), list[Any](), list[dict[str, np.ndarray]]()
        for batch in batches:
            waiting.append(step(params, batch))
            if len(waiting) > 2:
                parts.append(jax.device_get(waiting.pop(0)))
            if seconds is not None and time.monotonic() - began > seconds:
                break
        parts += jax.device_get(waiting)
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        real = columns.pop('mask') > 0
        if (columns['labels'][real] > 1).any():
            raise UserError(
                f'config: {evaluation.key}: examples have several classes, and figures by class '
                'are of one each'
            )
        rows = np.flatnonzero(real & (columns.pop('labels') > 0))
        label, predicted, loss, likely = (
            columns[name][rows] for name in ('label', 'predicted', 'loss', 'likely')
        )
        names = class_names(evaluation.training)
        return Judged(rows, label, predicted, loss, likely, names, int(real.sum()))

    return judge


def matrix(judged: Judged) -> Int[np.ndarray, 'classes classes']:
    """Count examples by true class (row) and predicted class (column)."""
    count = len(judged.names)
    pairs = judged.labels.astype(np.int64) * count + judged.predicted
    return np.bincount(pairs, minlength=count**2).reshape(count, count)


def figures(judged: Judged) -> list[ClassFigures]:
    """Compute the figures of all classes that occur or are predicted, the worst F1 first."""
    counts = matrix(judged)
    hits, support, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    precision = hits / np.maximum(predicted, 1)
    recall = hits / np.maximum(support, 1)
    f1 = 2 * hits / np.maximum(predicted + support, 1)
    missed = counts - np.diag(hits)
    worst, times = missed.argmax(1), missed.max(1)
    names = judged.names
    rows = [
        ClassFigures(
            names[k],
            float(precision[k]),
            float(recall[k]),
            float(f1[k]),
            int(support[k]),
            names[worst[k]] if times[k] else '',
            int(times[k]),
        )
        for k in np.flatnonzero(support + predicted).tolist()
    ]
    return sorted(rows, key=lambda row: (row.f1, -row.support))


def confused(judged: Judged) -> list[Confused]:
    """List all pairs of a class and what it was taken for, the most frequent first."""
    counts = matrix(judged)
    support = counts.sum(1)
    missed = counts - np.diag(np.diag(counts))
    pairs = np.argwhere(missed).tolist()
    rows = [
        Confused(
            judged.names[i], judged.names[j], int(missed[i, j]), float(missed[i, j] / support[i])
        )
        for i, j in pairs
    ]
    return sorted(rows, key=lambda row: (-row.times, -row.share))


def worst(judged: Judged, most: int) -> list[int]:
    """Return the places in `judged` of the misclassified examples of the highest loss."""
    wrong = np.flatnonzero(judged.labels != judged.predicted)
    order = np.argsort(-judged.losses[wrong], kind='stable')
    return wrong[order][:most].tolist()
