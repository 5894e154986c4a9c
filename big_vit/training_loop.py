"""The training loop: evaluate, save, take the next batch, step, write, in this order."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax

from big_vit import metrics, ownership
from big_vit.build.evaluations import SharedFeatures
from big_vit.build.experiment import Intervals, is_due
from big_vit.distributed import hosts
from big_vit.metrics import profiler
from big_vit.steps import Metrics


class Duties(NamedTuple):
    """Duties of the loop after a number of updates: log, evaluate, save."""

    log: bool
    evaluations: tuple[str, ...]
    save: bool


def duties(intervals: Intervals, step: int, total: int) -> Duties:
    """List what is due once `step` of `total` updates are made; the last step is always saved."""
    return Duties(
        log=is_due(intervals.log, step, total),
        evaluations=tuple(n for n, every in intervals.evals.items() if is_due(every, step, total)),
        save=step == total or is_due(intervals.save, step, total),
    )


class Journal(Protocol):
    """The record of a training: rows, console lines and checkpoints."""

    clock: metrics.Clock
    console: metrics.Console

    def check(self, step: int, values: Metrics) -> None:
        """Look for skipped updates and damaged examples in the metrics of any finished step."""

    def write(self, step: int, values: Metrics) -> None:
        """Write the metrics of a finished step that is due for logging."""

    def write_scores(self, step: int, evaluation: str, scores: Any) -> None:
        """Write the scores of one evaluation."""

    def verdict(self, step: int) -> tuple[bool, bool]:
        """Judge the scores of a step: whether they are the best so far, and the last needed."""

    def save(self, state: Any) -> None:
        """Save a checkpoint, which promises that all rows before it are stored."""


class Outcome(NamedTuple):
    """The state that the loop ended with, and whether a signal ended it before the last step."""

    state: Any
    stopped: bool


def say_stopped(step: int, total: int, console: metrics.Console) -> None:
    """Say that a signal ended the loop; on all hosts, since a supervisor of any must know."""
    line = f'stopped by a signal: saved step {step} of {total}; the same command resumes there'
    (console.say if jax.process_index() == 0 else print)(line)


def run(
    state: Any,
    start: int,
    total: int,
    intervals: Intervals,
    journal: Journal,
    *,
    evaluate: Callable[[str, Any, SharedFeatures], Any],
    batches: Iterator[Any],
    train_step: Callable[[Any, Any], tuple[Any, Metrics]],
    stop: Callable[[int], bool] = lambda step: False,
    trace: Callable[[int, Any], None] = lambda step, pending: None,
) -> Outcome:
    """Train from step `start` to `total`.

    The order is fixed, so that a checkpoint never misses a metric of its step, and a stop loses no
    batch that was drawn. One step is always in flight: its metrics are read after the next step is
    dispatched, so the devices never wait for the host.

    Args:
      state: donated to the first step.
      evaluate: gives the scores of a state, from the evaluation's name, the state and the features
        that all evaluations of this state share.
      train_step: (state, batch) -> (state, metrics), compiled.
      stop: whether to save and end at this step; asked once at every step after the first.
      trace: called before each step with the metrics that may still be computed.
    """
    clock = journal.clock
    pending: list[tuple[int, Metrics]] = []

    def write_pending() -> None:
        if pending:
            step, values = pending.pop()
            ownership.check()
            ownership.began()
            journal.check(step, values)
            if duties(intervals, step, total).log:
                journal.write(step, values)

    with jax.transfer_guard('disallow'):
        for step in range(start, total + 1):
            if step > start:
                due, stopped = duties(intervals, step, total), stop(step) and step < total
                if due.evaluations or due.save or stopped:
                    with clock.bucket('step'):
                        jax.block_until_ready(pending)
                    write_pending()
                shared: SharedFeatures = {}
                for name in due.evaluations:
                    with clock.bucket('eval'):
                        scores = evaluate(name, state, shared)
                    journal.write_scores(step, name, scores)
                    hosts.progress(step)
                is_best, is_over = journal.verdict(step) if due.evaluations else (False, False)
                if due.save or stopped or is_best or is_over:
                    with clock.bucket('save'):
                        journal.save(state)
                if stopped or is_over:
                    return Outcome(state, stopped=not is_over)
            if step == total:
                break
            trace(step, [values for _, values in pending])
            with clock.bucket('data'):
                batch = next(batches)
            with clock.bucket('step'), profiler.step(step):
                state, values = train_step(state, batch)
                if pending:
                    jax.block_until_ready(pending[0][1])
                    hosts.progress(step)
            clock.count_step()
            write_pending()
            pending.append((step + 1, values))
            journal.console.step(step + 1)
    return Outcome(state, stopped=False)
