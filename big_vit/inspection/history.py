"""What the rows of a run's metrics say: curves, best and last scores, what went wrong."""

import math
from typing import Any, NamedTuple

from big_vit import metrics

Rows = list[dict[str, Any]]
# Scores of which less is better; of all others it is more.
_LESS = ('loss', 'nll', 'ece', 'mce', 'brier', 'error', 'mae', 'mse', 'rmse')
# What a row has that is no score.
_NO_SCORE = ('step', 'count')


class Score(NamedTuple):
    """One score of an evaluation; `examples` says of how many it is, where that is known."""

    name: str
    last: float
    last_step: int
    best: float
    best_step: int
    examples: float | None


def series(rows: Rows, name: str) -> list[tuple[int, float]]:
    """(step, value) of each row that has this metric, a step once."""
    return sorted({row['step']: row[name] for row in rows if name in row}.items())


def names(rows: Rows) -> list[str]:
    """All metrics, in the order in which they first appear."""
    return list(dict.fromkeys(name for row in rows for name in row if name != 'step'))


def scores(rows: Rows) -> dict[str, list[Score]]:
    """By evaluation, all that its rows tell; training and timings are none."""
    found: dict[str, list[Score]] = {}
    for name in names(rows):
        split, _, key = name.rpartition('/')
        if split == 'train' or name.startswith(metrics.TIMING) or not split or key in _NO_SCORE:
            continue
        points = series(rows, name)
        finite = [(value, -step) for step, value in points if math.isfinite(value)]
        less = any(word in _LESS for word in key.split('_'))
        value, step = (min if less else max)(finite, default=(math.nan, -points[-1][0]))
        counts = series(rows, f'{split}/count')
        count = counts[-1][1] if counts else None
        score = Score(key, points[-1][1], points[-1][0], value, -step, count)
        found.setdefault(split, []).append(score)
    return found


def standard_error(score: Score) -> float | None:
    """Of a share of so many examples, from their number alone; None of what is no share."""
    if score.examples is None or not score.name.startswith('top') or not 0 <= score.last <= 1:
        return None
    return math.sqrt(score.last * (1 - score.last) / score.examples)


def warnings(rows: Rows) -> list[str]:
    """What a reader should know: updates that were skipped, resumes, numbers that are none."""
    found = []
    skipped = series(rows, 'train/skipped')
    if skipped and skipped[-1][1]:
        first = next(step for step, value in skipped if value)
        found.append(
            f'{skipped[-1][1]:.0f} of {skipped[-1][0]:,} updates were skipped: the loss or the '
            f'gradient was not finite, or far above the last ones (first seen at step {first:,})'
        )
    resumed = [row[metrics.RESUMED] for row in rows if metrics.RESUMED in row]
    if resumed:
        where = ', '.join(f'{step:,.0f}' for step in resumed)
        found.append(f'resumed {len(resumed)} time(s), from step {where}')
    replaced = sum(value for _, value in series(rows, 'train/replaced'))
    if replaced:
        found.append(f'{replaced:,.0f} damaged examples were replaced in the steps that are logged')
    for name in names(rows):
        bad = [step for step, value in series(rows, name) if not math.isfinite(value)]
        if bad:
            found.append(f'{name} is not a finite number at {len(bad)} step(s), first {bad[0]:,}')
    return found
