"""The journal of a run: metric rows, console lines and checkpoints, and when to give a run up."""

import dataclasses
import math
import os
import statistics
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from big_vit import checkpoint, metrics, resumption
from big_vit.build.experiment import Experiment, example_indices
from big_vit.config import Config
from big_vit.data import network, pipeline
from big_vit.data.sources import Source
from big_vit.distributed import hosts
from big_vit.errors import UserError
from big_vit.state import State
from big_vit.steps import Metrics

# A run whose updates are all skipped is lost; this many in a row are no accident.
MAX_SKIPPED_IN_A_ROW = 20
# Nor are half of so many, or losses so many times the first one that stay there.
_SKIPS_SEEN, _LOSSES_SEEN, _MAX_RATIO = 128, 20, 10
# Among fewer examples, a few damaged ones say nothing about the rest.
MIN_EXAMPLES_FOR_RATE = 1000
# Metrics of a step that decide about warnings and have no place in a row.
_NOT_IN_ROWS = ('skipped_in_a_row', 'loss_spike', 'grad_norm_spike')
_MAX_EXAMPLES_NAMED = 16


class Diverged(UserError):
    """A run that learns nothing any more: see `Course`."""


class Damage:
    """Counter of the damaged examples that were replaced since this process started.

    Args:
      max_rate: share of all examples that may be damaged.
    """

    def __init__(self, max_rate: float) -> None:
        self._max_rate, self._replaced, self._seen = max_rate, 0, 0

    def add(self, replaced: int, batch_size: int) -> None:
        """Count the examples of one step.

        Raises:
          UserError: more of the examples than `max_rate` are damaged.
        """
        self._replaced += replaced
        self._seen += batch_size
        enough = self._seen >= MIN_EXAMPLES_FOR_RATE
        if enough and self._replaced > self._max_rate * self._seen:
            raise UserError(
                f'{self._replaced} of the last {self._seen} examples were damaged and replaced, '
                f'more than data.max_error_rate={self._max_rate:g}: repair the data '
                "(data.on_error='stop' names the first of them)"
            )

    def line(
        self, damaged: Collection[int], source: Source, lost: Collection[int] = ()
    ) -> str | None:
        """Say how many examples were replaced, and name one; None if none was.

        Args:
          damaged: the different ones that this process has met.
          lost: shards of which it could read nothing.
        """
        if not self._replaced:
            return None
        line = (
            f'data    {self._replaced:,} of {self._seen:,} examples were damaged, and replaced by '
            'the next ones'
        )
        if not damaged:
            return line
        number = f'{len(damaged):,} different, ' if jax.process_count() == 1 else ''
        shards = f'; shards that cannot be read: {len(lost):,}' if lost else ''
        return f'{line} ({number}such as {source.place(min(damaged))}{shards})'


def max_damage_rate(config: Config, parts: Experiment) -> float:
    """Return the share of damaged examples that a run accepts; 1 where the first one ends it."""
    return config.data.max_error_rate if parts.data.skip_bad else 1.0


def examples_of_update(parts: Experiment, step: int) -> str:
    """List the first examples of the batch that update number `step` (from 1) was made of."""
    return ', '.join(map(str, example_indices(parts, step - 1)[:_MAX_EXAMPLES_NAMED]))


def skipped_text(values: Mapping[str, Any], examples: str, skip_sigmas: float) -> str:
    """Describe a skipped update.

    Args:
      values: metrics of the step, scalars.
      examples: as `examples_of_update` lists them.
      skip_sigmas: deviations above the recent median that make a spike.
    """
    loss, norm = (float(jax.device_get(values[name])) for name in ('loss', 'grad_norm'))
    spikes = [
        f'the {label} lies over {skip_sigmas:g} deviations above the last ones'
        for name, label in (('loss', 'loss'), ('grad_norm', 'gradient norm'))
        if bool(jax.device_get(values[f'{name}_spike']))
    ]
    return (
        f'update skipped, loss {loss:.4g}, gradient norm {norm:.4g}: '
        f'{" and ".join(spikes) or "not finite"}; its examples: {examples}, ...'
    )


def diverged_text(step: int, examples: str) -> str:
    """Describe a training whose last updates, up to `step`, were all skipped."""
    return (
        f'the last {MAX_SKIPPED_IN_A_ROW} updates up to step {step} were skipped: the loss '
        f'or the gradient is not finite; lower lr, or look at the examples {examples}, ...'
    )


class Course:
    """How the last updates of a training went, since this process started.

    It has diverged if more than half of its last 128 updates were skipped, or if the median of its
    last 20 losses is over 10 times the least of its first five (over 10, where that is below 1):
    by the second step a rate that is far too high has left where it began.

    Args:
      total: steps of the whole training. The last one decides about fewer updates too.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._first: list[float] = []
        self._losses: deque[float] = deque(maxlen=_LOSSES_SEEN)
        self._skips: deque[bool] = deque(maxlen=_SKIPS_SEEN)

    def add(self, step: int, loss: float, skipped: bool) -> str | None:
        """Count update number `step`; say why it is one too many, or return None."""
        self._skips.append(skipped)
        if not skipped and math.isfinite(loss):  # A skipped one changed nothing: see below.
            self._losses.append(loss)
            self._first = [*self._first, loss][:5]
        skips, last = sum(self._skips), step == self._total
        if 2 * skips > len(self._skips) and (skips >= MAX_SKIPPED_IN_A_ROW or last):
            return (
                f'{skips} of the last {len(self._skips)} updates up to step {step} were skipped: '
                'the training has diverged; lower lr, or set skip_sigmas=0 if only spikes were '
                'skipped'
            )
        if len(self._losses) < (6 if last else _LOSSES_SEEN):
            return None
        began, now = min(self._first), statistics.median(self._losses)
        if now > _MAX_RATIO * max(1, began):
            return (
                f'the loss of the last {len(self._losses)} updates up to step {step} is {now:.4g}, '
                f'and was {began:.4g} at first: the training has diverged; lower lr'
            )
        return None


class Choice:
    """The choice of a checkpoint by a metric, and whether to wait for a better one.

    Attributes:
      scored: all scores of the run, which patience counts.
      saved: those whose checkpoint is there; its best is kept.

    Args:
      config: of the run, with `checkpoint.best`.
      rows: of the run until now.
      start: the step that it starts or resumes at.
      steps: those of its checkpoints.
    """

    def __init__(
        self, config: Config, rows: list[dict[str, Any]], start: int, steps: Collection[int]
    ):
        self._metric, self._patience = config.checkpoint.best, config.early_stopping.patience
        self.scored = metrics.Best(self._metric).add_rows(rows, start)
        self.saved = metrics.Best(self._metric).add_rows(rows, start, steps)

    def add(self, step: int, evaluation: str, scores: Mapping[str, float]) -> None:
        """Add the scores of an evaluation, if the metric is one of them."""
        name = self._metric.removeprefix(f'{evaluation}/')
        if name != self._metric:
            self.scored.add(step, scores[name])
            self.saved.add(step, scores[name])

    def is_over(self) -> bool:
        """Whether as many evaluations as patience allows were no better than the best."""
        return self._patience is not None and self.scored.waited >= self._patience

    def lines(self, step: int, total: int, workdir: os.PathLike[str]) -> list[str]:
        """Say why a run ended before its last step, if so, and where its best checkpoint is."""
        scored, saved, lines = self.scored, self.saved, list[str]()
        if step < total and self.is_over():
            had = 'a number' if scored.step is None else f'{scored.value:.4f} of step {scored.step}'
            lines.append(
                f'early   ends at step {step} of {total}: for {scored.waited} evaluation(s) '
                f'{self._metric} was not better than {had} '
                f'(early_stopping.patience={self._patience})'
            )
        if saved.step is not None:
            shown = metrics.shown(saved.metric, saved.value)
            lines.append(f'best    {saved.metric} {shown} at step {saved.step}: {workdir}@best')
        return lines


def train_row(values: Metrics) -> dict[str, np.ndarray]:
    """Fetch the metrics of a step under their names in a row of metrics, such as train/loss."""
    return {
        f'train/{name}': np.asarray(value)
        for name, value in jax.device_get(values).items()
        if name not in _NOT_IN_ROWS
    }


@dataclasses.dataclass
class RunJournal:
    """The journal of one run; see `training_loop.Journal`.

    Args:
      peak_flops: operations per second of all devices together; None shows no MFU.
      meter: measures the loader of the batches.
      choice: the scores so far by `checkpoint.best`, if it is set.
      collapse: watches for a collapse of what is learned.
    """

    config: Config
    parts: Experiment
    peak_flops: float | None
    damage: Damage
    clock: metrics.Clock
    writer: metrics.Writer
    console: metrics.Console
    manager: checkpoint.Manager
    meter: pipeline.Meter
    choice: Choice | None = None
    collapse: metrics.Collapse = dataclasses.field(default_factory=metrics.Collapse)

    def __post_init__(self) -> None:
        self._course = Course(self.parts.total_steps)
        self._observed = ('skipped_in_a_row', 'loss', self.parts.task.headline, 'replaced')

    def check(self, step: int, values: Metrics) -> None:
        """Warn of a skipped update, and end a run that cannot go on.

        Raises:
          UserError: too many examples are damaged, or a save in the background failed.
          Diverged: the training has, see `Course`, or the last updates were all skipped.
        """
        self.manager.check()
        fetched = jax.device_get({n: values[n] for n in self._observed if n in values})
        self.damage.add(int(fetched.get('replaced', 0)), self.parts.batch_size)
        skipped_in_a_row, loss = fetched.pop('skipped_in_a_row'), fetched['loss']
        self.console.observe(skipped=bool(skipped_in_a_row), **fetched)
        if skipped_in_a_row:
            examples = examples_of_update(self.parts, step)
            if skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise Diverged(diverged_text(step, examples))
            text = skipped_text(values, examples, self.config.skip_sigmas)
            self.console.say(f'WARNING step {step}: {text}')
        lost = self._course.add(step, float(loss), bool(skipped_in_a_row))
        if lost:
            raise Diverged(lost)

    def write(self, step: int, values: Metrics) -> None:
        """Write the metrics of a step with its rates and timings, and show them."""
        row = {name: float(value) for name, value in train_row(values).items()}
        row |= self.clock.window(
            batch_size=self.parts.batch_size,
            flops_per_example=self.parts.flops_per_example,
            peak_flops=self.peak_flops,
            steps_left=self.parts.total_steps - step,
            loader_rate=self.meter.rate(),
        )
        row |= {f'time/store_{name}': float(n) for name, n in network.TRAFFIC.take().items()}
        row |= self.manager.timings()
        self.writer.write(step, row)
        self.console.training(step, row)
        self._warn_of_collapse(step, row)

    def write_scores(self, step: int, evaluation: str, scores: dict[str, float]) -> None:
        """Write and show the scores of one evaluation."""
        row = {f'{evaluation}/{name}': x for name, x in scores.items()}
        self.writer.write(step, row)
        self.console.evaluation(step, evaluation, scores)
        self._warn_of_collapse(step, row)
        if self.choice is not None:
            self.choice.add(step, evaluation, scores)

    def _warn_of_collapse(self, step: int, row: Mapping[str, float]) -> None:
        text = self.collapse.add({'step': step, **row})
        if text is not None:
            self.console.say(f'WARNING step {step}: {text}')

    def verdict(self, step: int) -> tuple[bool, bool]:
        """Judge the scores of a step by `checkpoint.best`; what process 0 decides holds for all."""
        choice = self.choice
        if choice is None:
            return False, False
        is_best, is_over = hosts.lead(lambda: [choice.saved.step == step, choice.is_over()])
        return is_best, is_over

    def save(self, state: State) -> None:
        """Start to save a checkpoint, once the rows that it promises are stored."""
        self.writer.flush()
        best = None if self.choice is None else self.choice.saved.step
        position = resumption.position(self.parts, int(jax.device_get(state['step'])))
        self.manager.save(state, self.config.to_dict(), self.writer.latest, best, position)
