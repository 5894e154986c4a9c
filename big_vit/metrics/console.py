"""The console of a run: a progress bar or plain lines, and a clock of where the time goes."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from big_vit.metrics.writer import TIMING, host_memory_mb

BAR_WIDTH = 16
# Metrics of an evaluation that fit on a line.
_MAX_SCORES_SHOWN = 8


class Clock:
    """Seconds spent by bucket ('data', 'step', 'eval', 'save', 'start')."""

    def __init__(self) -> None:
        self.total: dict[str, float] = {}
        self._window: dict[str, float] = {}
        self._steps = 0

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
        peak_flops: float,
        steps_left: int,
        loader_rate: float | None = None,
    ) -> dict[str, float]:
        """Compute the rates since the last call, over the time spent on data and steps.

        The memory of the process is among them, so that a leak shows in the history.

        Args:
          flops_per_example: operations of a training step for one example.
          peak_flops: operations per second of all devices together.
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
        memory = host_memory_mb()
        return {
            TIMING + 'examples_per_s': rate,
            TIMING + 'mfu': rate * flops_per_example / peak_flops,
            TIMING + 'data_wait': data / seconds,
            TIMING + 'eta_s': steps_left * seconds / steps,
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

    def training(self, step: int, values: dict[str, float]) -> None:
        """Show a row of training metrics; on a narrow terminal, the first that fit."""
        parts = self._training_parts(values)
        if self._bar is None:
            at = f'{step:>{len(str(self._total))}}/{self._total}'
            self.say(f'{self._label} {at}  ' + '  '.join(parts))
            return
        taken = len(self._label) + BAR_WIDTH + 2 * len(str(self._total)) + 5
        while len(parts) > 1 and taken + len('  '.join(parts)) > self._bar.console.width:
            parts.pop()
        self._bar.update(self._task, completed=step, status='  '.join(parts))

    def _training_parts(self, values: dict[str, float]) -> list[str]:
        """Format those metrics of a row that it has, the most important first."""
        parts = []
        if 'train/loss' in values:
            parts.append(f'loss {values["train/loss"]:.4f}')
        if values.get('train/skipped'):
            parts.append(f'skipped {values["train/skipped"]:.0f}')
        if TIMING + 'examples_per_s' in values:
            parts += [
                f'{values[TIMING + "examples_per_s"]:,.0f} ex/s',
                f'ETA {duration(values[TIMING + "eta_s"])}',
                *([f'MFU {values[TIMING + "mfu"]:.0%}'] if TIMING + 'mfu' in values else []),
                f'data-wait {values[TIMING + "data_wait"]:.1%}',
            ]
        if TIMING + 'loader_examples_per_s' in values:
            parts.append(f'loader {values[TIMING + "loader_examples_per_s"]:,.0f} ex/s')
        if values.get('train/replaced'):
            parts.append(f'replaced {values["train/replaced"]:.0f}')
        headline = f'train/{self._headline}'
        if headline in values and self._headline != 'loss':
            value = values[headline]
            accuracy = self._headline == 'accuracy'
            parts.append(f'acc {value:.3f}' if accuracy else f'{self._headline} {value:.4g}')
        if 'train/lr' in values:
            parts.append(f'lr {values["train/lr"]:.2e}')
        return parts

    def evaluation(self, step: int, name: str, values: dict[str, float]) -> None:
        """Show the scores of an evaluation."""
        named = [key for key in values if key != 'count' and '/' not in key]
        shown = '  '.join(f'{key} {values[key]:.4f}' for key in named[:_MAX_SCORES_SHOWN])
        more = len(values) - 1 - len(named[:_MAX_SCORES_SHOWN])
        shown += f'  (and {more} more)' if more > 0 else ''
        width = len(str(self._total))
        self.say(f'{"eval":<{len(self._label)}} {step:>{width}}/{self._total}  {name}: {shown}')

    def close(self) -> None:
        """Take the progress bar away."""
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> 'Console':
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


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
