"""Curves, scores and warnings derived from the metric rows of a run."""

import math
from typing import Any, NamedTuple

from big_vit import metrics

Rows = list[dict[str, Any]]
# Keys of a row that are not scores.
_NOT_SCORES = ('step', 'count')


class Score(NamedTuple):
    """One score of an evaluation.

    Attributes:
      examples: number of examples that it was measured on, if known.
    """

    name: str
    last: float
    last_step: int
    best: float
    best_step: int
    examples: float | None


def series(rows: Rows, name: str) -> list[tuple[int, float]]:
    """Return sorted (step, value) pairs of the rows that have this metric."""
    return sorted({row['step']: row[name] for row in rows if name in row}.items())


def names(rows: Rows) -> list[str]:
    """Return the names of all metrics in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row if name != 'step'))


def scores(rows: Rows) -> dict[str, list[Score]]:
    """Return the scores of each evaluation; training metrics and timings are not included."""
    by_split: dict[str, list[Score]] = {}
    for name in names(rows):
        split, _, key = name.rpartition('/')
        if split == 'train' or name.startswith(metrics.TIMING) or not split or key in _NOT_SCORES:
            continue
        points = series(rows, name)
        best = metrics.Best(key)
        for step, value in points:
            if math.isfinite(value):
                best.add(step, value)
        best_step = points[-1][0] if best.step is None else best.step
        counts = series(rows, f'{split}/count')
        count = counts[-1][1] if counts else None
        score = Score(key, points[-1][1], points[-1][0], best.value, best_step, count)
        by_split.setdefault(split, []).append(score)
    return by_split


def standard_error(score: Score) -> float | None:
    """Return the binomial standard error of a top-k accuracy; None for other scores."""
    if score.examples is None or not score.name.startswith('top') or not 0 <= score.last <= 1:
        return None
    return math.sqrt(score.last * (1 - score.last) / score.examples)


def warnings(rows: Rows) -> list[str]:
    """Return warnings: collapses, skipped updates, resumes, damaged examples, non-finite values."""
    messages = [f'step {step:,}: {text}' for step, text in metrics.collapses(rows)]
    skipped = series(rows, 'train/skipped')
    if skipped and skipped[-1][1]:
        first = next(step for step, value in skipped if value)
        messages.append(
            f'{skipped[-1][1]:.0f} of {skipped[-1][0]:,} updates were skipped: the loss or the '
            f'gradient was not finite, or far above the last ones (first seen at step {first:,})'
        )
    resumed = [row[metrics.RESUMED] for row in rows if metrics.RESUMED in row]
    if resumed:
        where = ', '.join(f'{step:,.0f}' for step in resumed)
        messages.append(f'resumed {len(resumed)} time(s), from step {where}')
    replaced = sum(value for _, value in series(rows, 'train/replaced'))
    if replaced:
        messages.append(
            f'{replaced:,.0f} damaged examples were replaced in the steps that are logged'
        )
    for name in names(rows):
        bad = [step for step, value in series(rows, name) if not math.isfinite(value)]
        if bad:
            messages.append(
                f'{name} is not a finite number at {len(bad)} step(s), first {bad[0]:,}'
            )
    return messages
