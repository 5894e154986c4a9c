"""Few-shot accuracy by ridge regression in closed form, in float64 on the host.

The method is that of big_vision's few-shot evaluator. With x [n, d] the features of `shots`
examples of each of the classes:

    x <- (x - mean(x)) / (std(x) + 1e-5), by feature, over the shots
    x <- [x, 100]                         a constant that the penalty hardly touches
    y <- 1 for the class, -1 for the others                               [n, classes]
    W <- (x'x + l2 I)^-1 x'y, with l2 = 2^10; or x'(xx' + l2 I)^-1 y, the same, if n < d
    the class is argmax([(x_test - mean) / (std + 1e-5), 100] W)

Shots are the first of a permutation of the examples of each class, drawn class after class from
numpy.random.default_rng(seed), seed = 0, 1, 2; the accuracies of the seeds are averaged.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int

from big_vit.errors import UserError
from big_vit.evaluators.evaluation import Evaluation, Evaluator
from big_vit.evaluators.features import Features, choose_embedding
from big_vit.evaluators.requirements import requires
from big_vit.evaluators.two_splits import check_classes, compare_splits


def _names(shots: tuple[int, ...], l2: tuple[float, ...], **_: Any) -> tuple[str, ...]:
    return tuple(
        f'{count}shot' + (f'_l2_{penalty:g}' if len(l2) > 1 else '')
        for count in shots
        for penalty in l2
    )


@requires('features', reference='train_split', scores=_names)
def fewshot(
    evaluation: Evaluation,
    *,
    train_split: str | None = None,
    blocks: tuple[int, ...] | None = None,
    pool: str | None = None,
    shots: tuple[int, ...] = (1, 5, 10, 25),
    seeds: int = 3,
    l2: tuple[float, ...] = (1024.0,),
    whiten: bool = True,
    bias: float = 100.0,
) -> Evaluator:
    """Score classifiers of a few examples per class.

    Args:
      train_split: the split of `evaluation.reference`.
      blocks, pool: the features, as for `choose_embedding`.
      shots: numbers of examples per class.
      seeds: how many draws of the shots are averaged.
      l2: penalties, each with metrics of its own.
      whiten: whether to standardise features by the shots.
      bias: a constant feature to add; 0 for none.

    Raises:
      UserError: `blocks` or `pool` do not fit the model, or a class has too few examples.
    """
    assert evaluation.reference is not None
    key, names = evaluation.key, evaluation.reference.source.class_names
    embedding = choose_embedding(evaluation.model, blocks, pool, key)

    def check(labels: np.ndarray) -> None:
        check_classes(labels, key)
        check_shots(labels, shots, names, key)

    score = functools.partial(scores, shots=shots, seeds=seeds, l2=l2, whiten=whiten, bias=bias)
    return compare_splits(evaluation, embedding, score, check)


def ridge(
    x: Float[np.ndarray, 'examples width'], y: Float[np.ndarray, 'examples outputs'], l2: float
) -> Float64[np.ndarray, 'width outputs']:
    """Minimise |x W - y|^2 + l2 |W|^2 over W, by the smaller of the two normal equations."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    examples, width = x.shape
    if examples >= width:
        gram, right = x.T @ x, x.T @ y
    else:
        gram, right = x @ x.T, y
    gram[np.diag_indices_from(gram)] += l2
    try:
        solved = np.linalg.solve(gram, right)
    except np.linalg.LinAlgError:  # Only without a penalty: then the shortest solution.
        solved = np.linalg.lstsq(gram, right, rcond=None)[0]
    return solved if examples >= width else x.T @ solved


def scores_of(
    x: Float[np.ndarray, 'shots width'],
    labels: Int[np.ndarray, ' shots'],
    test: Float[np.ndarray, 'examples width'],
    classes: int,
    *,
    l2: float,
    whiten: bool = True,
    bias: float = 100.0,
) -> Float64[np.ndarray, 'examples classes']:
    """Score each test example and class; the class with the largest score is the answer."""
    x, test = x.astype(np.float64), test.astype(np.float64)
    if whiten:
        mean, std = x.mean(axis=0), x.std(axis=0) + 1e-5
        x, test = (x - mean) / std, (test - mean) / std
    if bias:
        x, test = (np.pad(v, ((0, 0), (0, 1)), constant_values=bias) for v in (x, test))
    return test @ ridge(x, 2.0 * np.eye(classes)[labels] - 1.0, l2)


def draw(labels: Int[np.ndarray, ' examples'], shots: int, seed: int) -> Int[np.ndarray, ' chosen']:
    """Draw the indices of `shots` examples of each class that occurs."""
    rng = np.random.default_rng(seed)
    by_class = [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    return np.concatenate([rows[:shots] for rows in by_class])


def check_shots(
    labels: Int[np.ndarray, ' examples'],
    shots: tuple[int, ...],
    names: Sequence[str] | None,
    key: str,
) -> None:
    """Check that every class that occurs has enough examples.

    Raises:
      UserError: a class has fewer examples than the most shots.
    """
    classes, counts = np.unique(labels, return_counts=True)
    rare = int(counts.argmin())
    if counts[rare] < max(shots):
        number = int(classes[rare])
        name = f'{number} ({names[number]!r})' if names else f'{number}'
        raise UserError(
            f'config: {key}.shots={max(shots)}, but class {name} has {counts[rare]} example(s) in '
            f'the training split: set shots to at most {counts[rare]}, or a larger train_split'
        )


def scores(
    train: Features,
    test: Features,
    *,
    shots: tuple[int, ...],
    seeds: int,
    l2: tuple[float, ...],
    whiten: bool,
    bias: float,
) -> dict[str, float]:
    """Compute {'1shot': mean accuracy over seeds, ...}, and '1shot_std' if there are several seeds.

    Several l2 have metrics of their own, such as '1shot_l2_64': the test split must not choose.
    """
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    metrics: dict[str, float] = {}
    for count in shots:
        chosen = [draw(train.labels, count, seed) for seed in range(seeds)]
        for penalty in l2:
            accuracies = []
            for rows in chosen:
                answers = scores_of(
                    train.values[rows],
                    train.labels[rows],
                    test.values,
                    classes,
                    l2=penalty,
                    whiten=whiten,
                    bias=bias,
                ).argmax(axis=1)
                accuracies.append(float((answers == test.labels).mean()))
            name = f'{count}shot' + (f'_l2_{penalty:g}' if len(l2) > 1 else '')
            metrics[name] = float(np.mean(accuracies))
            if seeds > 1:
                metrics[f'{name}_std'] = float(np.std(accuracies))
    return {**metrics, 'count': float(len(test.labels))}
