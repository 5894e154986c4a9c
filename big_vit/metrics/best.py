"""The best score of a run so far, and for how many evaluations there was no better one."""

import math
from collections.abc import Collection
from typing import Any

# Words of metrics of which lower is better; of all others, higher is.
_LOWER_IS_BETTER = ('loss', 'nll', 'ece', 'mce', 'brier', 'error', 'mae', 'mse', 'rmse', 'cosine')
# Metrics of which neither the highest nor the lowest is best: what was chosen, and a slope.
_NEITHER = ('alpha', 'alpha_r2', 'alpha_first', 'alpha_last', 'l2', 'rate', 'iterations')


def lower_is_better(metric: str) -> bool:
    """Whether a score such as val/loss is better the lower it is."""
    return any(word in _LOWER_IS_BETTER for word in metric.rpartition('/')[2].split('_'))


def has_direction(metric: str) -> bool:
    """Whether one of two different values of a score such as val/loss is better."""
    return metric.rpartition('/')[2] not in _NEITHER


class Best:
    """The best of the scores that were added: of equal ones the first, and never NaN.

    A function of these scores alone, so a resumed run that is given the rows of before goes on
    with the same choice and the same count.

    Attributes:
      step: of the best score; None before there is one.
      value: the best score.
      waited: scores added since.
    """

    def __init__(self, metric: str):
        self.metric = metric
        self.step: int | None = None
        self.value, self.waited = math.nan, 0
        self._sign = -1 if lower_is_better(metric) else 1

    def add(self, step: int, value: float) -> bool:
        """Add a score; return whether it is the best."""
        if math.isnan(value) or not (
            self.step is None or self._sign * value > self._sign * self.value
        ):
            self.waited += 1
            return False
        self.step, self.value, self.waited = step, value, 0
        return True

    def add_rows(
        self, rows: list[dict[str, Any]], last: int, saved: Collection[int] | None = None
    ) -> 'Best':
        """Add the scores in rows of metrics up to a step, or of those that are `saved`."""
        for row in rows:
            if (
                self.metric in row
                and row['step'] <= last
                and (saved is None or row['step'] in saved)
            ):
                self.add(row['step'], row[self.metric])
        return self
