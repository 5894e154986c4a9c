"""Collapse of a representation that is learned without labels, noticed in rows of metrics.

Metrics are read by their names, whichever task or evaluation logs them. Of training steps:

  teacher_entropy          mean entropy of an example's target, in nats
  teacher_entropy_of_mean  entropy of the mean target
  kl                       cross-entropy of student and teacher less `teacher_entropy`
  used_prototypes          share of the prototypes that are the largest of some target
  target_std               mean standard deviation of the targets' channels

and of evaluations `rankme`, `std` and `cosine` (`evaluators/representation.py`).

What targets say about the pictures is `teacher_entropy_of_mean` less `teacher_entropy`: their
mutual information. It goes to 0 both where all targets become uniform (both entropies go to the
logarithm of the number of prototypes) and where all pictures get the same prototype (both go to 0).

A fresh network looks collapsed too: its features are nearly parallel and its targets nearly
uniform. So nothing is judged before the learning rate has stopped rising, nor in the first steps
and rows; then a value is as good as 0 if it is so in itself, or beside the largest before.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Steps, and rows that have a metric, before it is judged.
_FIRST_STEPS, _FIRST_ROWS = 100, 10
# Rows in turn that say the same; of a run that has never been beyond the start, which takes long.
_IN_TURN, _AT_START = 3, 20
# Above so many times what counts as 0, a value has recovered, or has been beyond the start.
_RECOVERED, _BEYOND = 2, 5
# Entropies of the mean target of so few nats, or of this share of the largest: one prototype.
_ONE_NATS, _ONE_SHARE = 0.1, 0.05

_UNIFORM = (
    "lower the teacher's temperature, freeze the last layer for longer, or take fewer prototypes "
    'or a larger batch'
)
_ONE = "centre the targets or use Sinkhorn-Knopp, raise the teacher's momentum, or lower lr"
_CONSTANT = "lower lr, warm up for longer, or raise the teacher's momentum"


@dataclass
class _Vanishing:
    """A value that is as good as 0 below `floor`, or below `share` of the largest so far."""

    floor: float
    share: float
    first_rows: int = _FIRST_ROWS
    in_turn: int = _IN_TURN
    at_start: int = _AT_START
    largest: float = 0.0
    rows: int = 0
    low: int = 0
    gone: bool = False

    def add(self, value: float, settled: bool) -> None:
        """Take in the next value, and decide whether it is `gone`."""
        zero = max(self.floor, self.share * self.largest)
        self.rows += 1
        self.low = self.low + 1 if value <= zero else 0
        in_turn = self.in_turn if self.largest > _BEYOND * self.floor else self.at_start
        if settled and self.rows > self.first_rows and self.low >= in_turn:
            self.gone = True
        elif value > _RECOVERED * zero:
            self.gone = False
        self.largest = max(self.largest, value)


class Collapse:
    """Watcher of the rows of a run, which says once per onset what has collapsed.

    A function of the rows alone, so a resumed run that is given those of before goes on.

    Args:
      rows: rows of metrics up to now.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self._values: dict[str, _Vanishing] = {}
        self._peaks: dict[str, float] = {}
        self._rate, self._settled = -math.inf, False
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> str | None:
        """Take in the next row; return what has collapsed and what to try, at its onset."""
        before = any(value.gone for value in self._values.values())
        if 'train/lr' in row:
            self._settled = row['step'] > _FIRST_STEPS and row['train/lr'] <= self._rate
            self._rate = row['train/lr']
        text = self._targets(row) or self._features(row)
        return None if before else text

    def _add(self, name: str, value: float, **limits: Any) -> bool:
        vanishing = self._values.setdefault(name, _Vanishing(**limits))
        vanishing.add(value, self._settled)
        return vanishing.gone

    def _peak(self, name: str, value: float) -> float:
        self._peaks[name] = max(self._peaks.get(name, 0.0), value)
        return self._peaks[name]

    def _targets(self, row: Mapping[str, Any]) -> str | None:
        entropy, of_mean, kl, used, std = (
            row.get(f'train/{name}')
            for name in (
                'teacher_entropy', 'teacher_entropy_of_mean', 'kl', 'used_prototypes', 'target_std',
            )
        )  # fmt: skip
        if std is not None and self._add('std', std, floor=0.01, share=0.05):
            return (
                'collapse: the targets are nearly the same for all pictures (standard deviation '
                f'{std:.2g}); try to {_CONSTANT}'
            )
        if entropy is None:
            return None
        most = self._peak('entropy', entropy)
        if of_mean is not None:
            few = max(_ONE_NATS, _ONE_SHARE * self._peak('of_mean', of_mean))
            if not self._add('information', of_mean - entropy, floor=0.01, share=0.02):
                return None
            what, advice = 'the targets no longer depend on the pictures', _UNIFORM
            if of_mean < few:
                what, advice = 'all pictures get the same prototype', _ONE
            return (
                f'collapse: {what} (entropy of the mean target {of_mean:.2f} nats, of one '
                f'{entropy:.2f}); try to {advice}'
            )
        if kl is not None:
            # Small as well where the student has learned sharp targets by heart.
            largest = self._peak('kl', kl)
            value = kl if entropy >= 0.9 * most else largest
            if self._add('kl', value, floor=0.001, share=0.02):
                return (
                    f'collapse: the targets are uniform (entropy {entropy:.2f} nats, KL {kl:.2g}); '
                    f'try to {_UNIFORM}'
                )
        if used is not None and self._add('used', used, floor=0.0, share=0.05):
            return (
                f'collapse: {used:.2%} of the prototypes are in use, of up to '
                f'{self._values["used"].largest:.2%} before; try to {_ONE}'
            )
        return None

    def _features(self, row: Mapping[str, Any]) -> str | None:
        text, at_once = None, {'first_rows': 0, 'in_turn': 1, 'at_start': 1}
        for key, std in row.items():
            name, _, metric = key.rpartition('/')
            if metric != 'std' or f'{name}/rankme' not in row:
                continue
            rank, cosine = row[f'{name}/rankme'], row.get(f'{name}/cosine', math.nan)
            same = self._add(key, std, floor=0.02, share=0.05, **at_once)
            line = self._add(f'{name}/rankme', rank - 1, floor=0.3, share=0.0, **at_once)
            if same or line:
                text = text or (
                    f'collapse: {name}: the features are nearly the same for all pictures (RankMe '
                    f'{rank:.2f}, standard deviation {std:.2g} of their size, mean cosine '
                    f'{cosine:.4f}); try to {_CONSTANT}'
                )
        return text


def collapses(rows: Iterable[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """List the (step, text) of each onset in the rows of a run."""
    watcher = Collapse()
    said = [(row['step'], watcher.add(row)) for row in rows]
    return [(step, text) for step, text in said if text is not None]
