"""What a run says while it goes on: a progress bar or lines, and where the time goes."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from big_vit.metrics.writer import TIMING, host_memory_mb

BAR_WIDTH = 16
# How many metrics of an evaluation the console shows.
_MOST_SHOWN = 8


class Clock:
    """Where the time goes: seconds by bucket ('data', 'step', 'eval', 'save', 'start')."""

    def __init__(self) -> None:
        self.total: dict[str, float] = {}
        self._window: dict[str, float] = {}
        self._steps = 0

    @contextmanager
    def bucket(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    def add(self, name: str, seconds: float) -> None:
        self.total[name] = self.total.get(name, 0.0) + seconds
        self._window[name] = self._window.get(name, 0.0) + seconds

    def count_step(self) -> None:
        self._steps += 1

    def summary(self) -> str:
        """The total, and each bucket's share of it."""
        whole = sum(self.total.values())
        shares = (f'{name} {seconds / (whole or 1):.0%}' for name, seconds in self.total.items())
        return f'{duration(whole)}: ' + ', '.join(shares)

    def window(
        self,
        *,
        batch_size: int,
        flops_per_example: float,
        peak_flops: float,
        steps_left: int,
        loader_rate: float | None = None,
    ) -> dict[str, float]:
        """Rates since the last call, over the time spent on data and steps; {} after no step.

        With them the memory of the process, so that a leak shows in the history.

        Args:
          flops_per_example: of a training step.
          peak_flops: of all devices together.
          loader_rate: examples a second that the loader of this host could give.
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
    """'45s', '3m20s', '2h05m', '3d04h'."""
    seconds = round(seconds)
    if seconds < 60:
        return f'{seconds}s'
    if seconds < 3600:
        return f'{seconds // 60}m{seconds % 60:02d}s'
    if seconds < 48 * 3600:
        return f'{seconds // 3600}h{seconds % 3600 // 60:02d}m'
    return f'{seconds // 86400}d{seconds % 86400 // 3600:02d}h'


class Console:
    """A progress bar on a terminal, plain lines elsewhere; silent where `active` is false."""

    def __init__(self, total: int, start: int, *, label: str, active: bool = True):
        self._active, self._label, self._bar, self._total = active, label, None, total
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
        if not self._active:
            return
        for line in lines:
            if self._bar is not None:
                self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
            else:
                print(line, flush=True)

    def step(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def training(self, step: int, values: dict[str, float]) -> None:
        """Shows a row of training metrics; a narrow terminal gets those that come first."""
        parts = [f'loss {values["train/loss"]:.4f}']
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
        parts += [f'acc {values["train/accuracy"]:.3f}', f'lr {values["train/lr"]:.2e}']
        if values['train/skipped']:
            parts.insert(1, f'skipped {values["train/skipped"]:.0f}')
        if self._bar is None:
            at = f'{step:>{len(str(self._total))}}/{self._total}'
            self.say(f'{self._label} {at}  ' + '  '.join(parts))
            return
        taken = len(self._label) + BAR_WIDTH + 2 * len(str(self._total)) + 5
        while len(parts) > 1 and taken + len('  '.join(parts)) > self._bar.console.width:
            parts.pop()
        self._bar.update(self._task, completed=step, status='  '.join(parts))

    def evaluation(self, step: int, name: str, values: dict[str, float]) -> None:
        """Shows what an evaluator found."""
        named = [key for key in values if key != 'count' and '/' not in key]
        shown = '  '.join(f'{key} {values[key]:.4f}' for key in named[:_MOST_SHOWN])
        more = len(values) - 1 - len(named[:_MOST_SHOWN])
        shown += f'  (and {more} more)' if more > 0 else ''
        width = len(str(self._total))
        self.say(f'{"eval":<{len(self._label)}} {step:>{width}}/{self._total}  {name}: {shown}')

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> 'Console':
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Rows as text in aligned columns; numbers to the right."""
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
