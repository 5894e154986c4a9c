"""The console of a run: a progress bar or plain lines, and a clock of where the time goes."""

import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from big_vit.metrics.writer import TIMING, host_memory_mb

BAR_WIDTH = 16
# Of lines in a file or a pipe, where there is no terminal to ask.
WIDTH = 80
# A step that waits less for its data than this share of its time is not slowed by it.
_WAIT_SHOWN = 0.01


class Clock:
    """Seconds spent by bucket ('data', 'step', 'eval', 'save', 'start')."""

    def __init__(self) -> None:
        self.total: dict[str, float] = {}
        self._window: dict[str, float] = {}
        self._steps = self._total_steps = 0

    @contextmanager
    def bucket(self, name: str) -> Iterator[None]:
        """Add the time spent inside the context to a bucket."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to a bucket."""
        self.total[name] = self.total.get(name, 0.0) + seconds
        self._window[name] = self._window.get(name, 0.0) + seconds

    def count_step(self) -> None:
        """Count a training step, which the rates of `window` are relative to."""
        self._steps += 1
        self._total_steps += 1

    def summary(self) -> str:
        """Format the total time and each bucket's share of it."""
        total = sum(self.total.values())
        shares = (f'{name} {seconds / (total or 1):.0%}' for name, seconds in self.total.items())
        return f'{duration(total)}: ' + ', '.join(shares)

    def window(
        self,
        *,
        batch_size: int,
        flops_per_example: float,
        peak_flops: float | None,
        steps_left: int,
        loader_rate: float | None = None,
    ) -> dict[str, float]:
        """Compute the rates since the last call, over the time spent on data and steps.

        The memory of the process is among them, so that a leak shows in the history. The time that
        is left counts evaluations and saves as often as there were some up to now.

        Args:
          flops_per_example: operations of a training step for one example.
          peak_flops: operations per second of all devices together; None gives no MFU.
          loader_rate: examples per second that the loader of this host can deliver.

        Returns:
          Values by their names in a row of metrics; {} if no step was made.
        """
        data = self._window.get('data', 0.0)
        seconds = data + self._window.get('step', 0.0)
        steps, self._window, self._steps = self._steps, {}, 0
        if not steps or not seconds:
            return {}
        rate = steps * batch_size / seconds
        pauses = (self.total.get('eval', 0.0) + self.total.get('save', 0.0)) / self._total_steps
        memory = host_memory_mb()
        return {
            TIMING + 'examples_per_s': rate,
            **({} if not peak_flops else {TIMING + 'mfu': rate * flops_per_example / peak_flops}),
            TIMING + 'data_wait': data / seconds,
            TIMING + 'eta_s': steps_left * (seconds / steps + pauses),
            **({} if loader_rate is None else {TIMING + 'loader_examples_per_s': loader_rate}),
            **({} if memory is None else {TIMING + 'host_memory_mb': memory}),
        }


def duration(seconds: float) -> str:
    """Format seconds as '45s', '3m20s', '2h05m' or '3d04h'."""
    seconds = round(seconds)
    if seconds < 60:
        return f'{seconds}s'
    if seconds < 3600:
        return f'{seconds // 60}m{seconds % 60:02d}s'
    if seconds < 48 * 3600:
        return f'{seconds // 3600}h{seconds % 3600 // 60:02d}m'
    return f'{seconds // 86400}d{seconds % 86400 // 3600:02d}h'


class Console:
    """A progress bar on a terminal, plain lines elsewhere.

    Args:
      total: number of steps of the run.
      start: the step it starts or resumes at.
      label: name of the run on its lines.
      headline: the metric of training steps that is shown beside the loss.
      active: whether this process prints (process 0 does).
    """

    def __init__(
        self,
        total: int,
        start: int,
        *,
        label: str,
        headline: str = 'accuracy',
        active: bool = True,
    ):
        self._active, self._label, self._bar, self._total = active, label, None, total
        self._headline = headline
        self._sums: dict[str, list[float]] = {}
        if active and sys.stdout.isatty():
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn('{task.description}'),
                progress.BarColumn(bar_width=BAR_WIDTH),
                progress.MofNCompleteColumn(),
                progress.TextColumn('{task.fields[status]}'),
                refresh_per_second=4,
            )
            self._bar.start()
            self._task = self._bar.add_task(label, total=total, completed=start, status='')

    def say(self, *lines: str) -> None:
        """Print lines, above the progress bar if there is one."""
        if not self._active:
            return
        for line in lines:
            if self._bar is not None:
                self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
            else:
                print(line, flush=True)

    def step(self, step: int) -> None:
        """Advance the progress bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def observe(self, **values: float) -> None:
        """Take in what a step gave; `training` shows means, and of counts the sum, since the last.

        Args:
          **values: loss, the headline; the counts 'skipped' and 'replaced'.
        """
        for name, value in values.items():
            self._sums.setdefault(name, []).append(float(value))

    def training(self, step: int, values: dict[str, float]) -> None:
        """Show a row of training metrics, the first that fit on a line.

        What the steps since the last line gave to `observe` is shown instead of the row's values,
        which are of one step.
        """
        parts = self._training_parts(values)
        self._sums = {}
        if self._bar is None:
            at = f'{self._label} {step:>{len(str(self._total))}}/{self._total}  '
            self.say(at + _fitting(parts, WIDTH - len(at)))
            return
        taken = len(self._label) + BAR_WIDTH + 2 * len(str(self._total)) + 4
        status = _fitting(parts, self._bar.console.width - taken)
        self._bar.update(self._task, completed=step, status=status)

    def _mean(self, name: str, values: dict[str, float]) -> float | None:
        """Mean of a metric over the observed steps where it was finite, or the row's value."""
        seen = self._sums.get(name, [])
        finite = [value for value in seen if math.isfinite(value)]
        return sum(finite) / len(finite) if finite else values.get(f'train/{name}')

    def _training_parts(self, values: dict[str, float]) -> list[str]:
        """Format those metrics of a row that it has, the most important first."""
        parts = []
        loss, headline = self._mean('loss', values), self._mean(self._headline, values)
        if loss is not None:
            parts.append(f'loss {loss:.4f}')
        if headline is not None and self._headline != 'loss':
            accuracy = self._headline == 'accuracy'
            parts.append(f'acc {headline:.3f}' if accuracy else f'{self._headline} {headline:.4g}')
        for name in ('skipped', 'replaced'):
            if count := sum(self._sums.get(name, [])):
                parts.append(f'{name} {count:.0f}')
        times = {k.removeprefix(TIMING): v for k, v in values.items() if k.startswith(TIMING)}
        if 'examples_per_s' in times:
            parts.append(f'{times["examples_per_s"]:,.0f} ex/s')
            parts.append(f'ETA {duration(times["eta_s"])}')
        if 'mfu' in times:
            parts.append(f'MFU {times["mfu"]:.0%}')
        if times.get('data_wait', 0) >= _WAIT_SHOWN:
            parts.append(f'data-wait {times["data_wait"]:.0%}')
            if 'loader_examples_per_s' in times:
                parts.append(f'loader {times["loader_examples_per_s"]:,.0f} ex/s')
        if 'train/lr' in values:
            parts.append(f'lr {values["train/lr"]:.3g}')
        return parts

    def evaluation(self, step: int, name: str, values: dict[str, float]) -> None:
        """Show the scores of an evaluation, the first that fit on a line."""
        width = len(str(self._total))
        at = f'{"eval":<{len(self._label)}} {step:>{width}}/{self._total}  {name}: '
        scores = [f'{k} {v:.4f}' for k, v in values.items() if k != 'count' and '/' not in k]
        hidden = len(values) - ('count' in values) - len(scores)
        self.say(at + _fitting(scores, WIDTH - len(at), hidden))

    def close(self) -> None:
        """Take the progress bar away."""
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> 'Console':
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _fitting(parts: Sequence[str], width: int, hidden: int | None = None) -> str:
    """Join the first parts that fit, at least one.

    Args:
      hidden: how many there are beside these; the text then says how many it leaves out.
    """
    for count in range(len(parts), 0, -1):
        more = 0 if hidden is None else hidden + len(parts) - count
        text = '  '.join(parts[:count]) + (f'  (and {more} more)' if more else '')
        if count == 1 or len(text) <= width:
            return text
    return ''


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Format rows as text in aligned columns, with numbers to the right."""
    cells = [[str(cell) for cell in header]] + [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    right = [
        len(cells) > 1
        and all(row[i][:1].isdigit() or row[i][:1] in ('-', '+', '') for row in cells[1:])
        for i in range(len(widths))
    ]

    def line(row: list[str]) -> str:
        return '  '.join(
            cell.rjust(w) if r else cell.ljust(w)
            for cell, w, r in zip(row, widths, right, strict=True)
        ).rstrip()

    return '\n'.join([line(cells[0]), '  '.join('-' * w for w in widths), *map(line, cells[1:])])
