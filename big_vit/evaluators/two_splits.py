"""Evaluators that embed two splits and compare them: a reference, and the split that is scored."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from big_vit.errors import UserError
from big_vit.evaluators.evaluation import Evaluation, Evaluator, SharedFeatures
from big_vit.evaluators.features import Embedding, Features


def compare_splits(
    evaluation: Evaluation,
    embedding: Embedding,
    scores: Callable[[Features, Features], dict[str, float]],
    check: Callable[[np.ndarray], None] | None = None,
) -> Evaluator:
    """Make an evaluator from a function of (features of the reference, features of the split).

    Args:
      check: raises `UserError` if the labels of the reference, [examples], do not allow the
        evaluation. It runs at once if the source can list its labels, and again before the split
        is embedded, when unreadable examples are left out.
    """
    assert evaluation.reference is not None
    reference, split = evaluation.reference, evaluation.split
    if check is not None and reference.source.labels is not None:
        check(reference.source.labels())

    def evaluate(params: Any, shared: SharedFeatures) -> dict[str, float]:
        with jax.transfer_guard('allow'):
            learned = evaluation.compute_features(reference, embedding, params, shared)
            if check is not None:
                check(learned.labels)
            scored = evaluation.compute_features(split, embedding, params, shared)
            return scores(learned, scored)

    return evaluate


def check_classes(labels: Int[np.ndarray, ' examples'], key: str) -> None:
    """Check that a training split holds more than one class.

    Raises:
      UserError: it does not.
    """
    if len(np.unique(labels)) < 2:
        raise UserError(
            f'config: {key}.train_split has examples of class {labels[0]} alone: there is '
            'nothing to tell apart; set a train_split with two classes'
        )
