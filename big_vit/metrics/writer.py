"""Rows of metrics: a JSONL file in the workdir, and trackers where the config asks for them."""

import json
import math
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from big_vit import storage
from big_vit.errors import UserError
from big_vit.metrics import trackers

FILE = 'metrics.jsonl'
# Rows of two runs with the same config differ only in keys that start with this.
TIMING = 'time/'
# Metrics of evaluations that are not shares: losses, counts and hyperparameters that were chosen.
LOSSES = ('loss', 'nll', 'brier')
_NUMBERS = (
    *('count', 'iterations', 'l2', 'rate', 'last_blocks', 'mean_joined'),
    *('rankme', 'lidar', 'std', 'cosine', 'alpha', 'alpha_r2', 'alpha_first', 'alpha_last'),
)
# Object stores cannot append: the file is written anew, so not at every row.
REWRITE_EVERY_S = 30
# In the first row after a resume: the step that the run resumed from.
RESUMED = TIMING + 'resumed_from'


def read(workdir: str | os.PathLike[str], strict: bool = True) -> list[dict[str, Any]]:
    """Read the rows of a run, oldest first, without a last one that was cut off while written.

    Args:
      strict: False leaves damaged lines out, as a run does that resumes.

    Raises:
      UserError: another line is damaged.
    """
    path = storage.place(workdir) / FILE
    rows, damaged = _parse(path.read_bytes() if path.exists() else b'')
    if damaged and strict:
        raise UserError(
            f'{path}, line {damaged[0]}: is not a row of metrics; delete that line, or resume the '
            'run, which leaves damaged rows out'
        )
    return rows


def _parse(text: bytes) -> tuple[list[dict[str, Any]], list[int]]:
    """Parse the file into (rows, numbers of damaged lines), not counting a last one cut off."""
    rows, damaged = [], []
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = {n: math.nan if v is None else v + 0 for n, v in json.loads(line).items()}
            rows.append({'step': row.pop('step'), **row})
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            if number < len(lines) or text.endswith(b'\n'):
                damaged.append(number)
    return rows, damaged


def _line(row: dict[str, Any]) -> str:
    # JSON has neither NaN nor infinity: both become null, which is read as NaN.
    finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(finite) + '\n'


def latest(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the newest value of each metric, without timings."""
    merged = {name: value for row in rows for name, value in row.items()}
    return {k: v for k, v in merged.items() if k != 'step' and not k.startswith(TIMING)}


def headlines(rows: list[dict[str, Any]]) -> list[str]:
    """Choose for each evaluation the metric that represents it: top1, or else its first."""
    chosen: dict[str, str] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        evaluation, slash, metric = name.partition('/')
        if not slash or evaluation == 'train' or name.startswith(TIMING):
            continue
        if evaluation not in chosen or metric == 'top1':
            chosen[evaluation] = name
    return list(chosen.values())


def shown(metric: str, value: float) -> str:
    """Format a value of a metric: shares in per cent, losses and other numbers as they are."""
    name = metric.rpartition('/')[2]
    if name in LOSSES:
        return f'{value:.4f}'
    return f'{value:.2%}' if is_share(metric) else f'{value:g}'


def is_share(metric: str) -> bool:
    """Whether values of a metric lie between 0 and 1 and read best in per cent."""
    return metric.rpartition('/')[2] not in (*LOSSES, *_NUMBERS)


def host_memory_mb() -> float | None:
    """Return the megabytes of host memory that this process holds; None except on Linux."""
    try:
        pages = int(Path('/proc/self/statm').read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf('SC_PAGE_SIZE') / 1e6


class Writer:
    """Writer of rows of metrics; rows after the start step, which will be made again, are dropped.

    In a local folder each row is on its way to the disk when `write` returns. In an object store
    rows wait for at most REWRITE_EVERY_S seconds, or until `flush`.

    Args:
      start_step: the step that the run starts or resumes at.
      active: whether this process writes (process 0 does).
      tensorboard: also write event files to WORKDIR/tensorboard.
      wandb: also log to this Weights & Biases project.
      config: dump of the config, for the trackers.

    Attributes:
      latest: the newest value of each metric, without timings.
      rows: those from before the start; only where this process writes.

    Raises:
      UserError: the file cannot be written, even after some tries.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        start_step: int,
        *,
        active: bool = True,
        tensorboard: bool = False,
        wandb: str | None = None,
        config: dict[str, Any] | None = None,
    ):
        self._file = None
        self._trackers: list[trackers.Tracker] = []
        self._active = active
        self.latest: dict[str, float] = {}
        self.rows: list[dict[str, Any]] = []
        if not active:
            return
        folder = storage.place(workdir)
        self._path = folder / FILE
        old_rows, _ = _parse(self._path.read_bytes() if self._path.exists() else b'')
        rows = [row for row in old_rows if row['step'] <= start_step]
        self._mark = {RESUMED: float(start_step)} if old_rows and start_step else {}
        self.rows, self.latest = rows, latest(rows)
        if wandb:
            self._trackers.append(trackers.WeightsAndBiases(folder, wandb, config or {}, rows))
        if tensorboard:
            self._trackers.append(trackers.TensorBoard(folder, start_step, config or {}))
        self._lines = list(map(_line, rows))
        self._rewrite()

    @property
    def tracked(self) -> bool:
        """Whether there are trackers, which can show pictures."""
        return bool(self._trackers)

    def pictures(self, step: int, name: str, pictures: list[np.ndarray]) -> None:
        """Give the trackers pictures of one size, uint8 [height, width, channels], as a grid."""
        for tracker in self._trackers if pictures else []:
            tracker.picture(step, name, montage(pictures))

    def checkpoint(self, path: os.PathLike[str], step: int) -> None:
        """Tell the trackers where the newest checkpoint is; nothing of it is copied."""
        for tracker in self._trackers:
            tracker.checkpoint(path, step, self.latest)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add one row of plain numbers."""
        self.latest.update({k: v for k, v in values.items() if not k.startswith(TIMING)})
        if not self._active:
            return
        row, self._mark = {'step': step, **values, **self._mark}, {}
        self._lines.append(_line(row))
        if self._file is not None:
            try:
                self._file.write(self._lines[-1])
                self._file.flush()
            except OSError:  # Part of the row may be in the file.
                self._rewrite()
        elif time.monotonic() - self._written_at >= REWRITE_EVERY_S:
            self._rewrite()
        for tracker in self._trackers:
            tracker.scalars(step, values)

    def flush(self) -> None:
        """Return when all rows are stored; call it before a checkpoint that promises them."""
        if self._file is not None:
            try:
                os.fsync(self._file.fileno())
            except OSError:
                self._rewrite()
        elif self._active and self._written_lines < len(self._lines):
            self._rewrite()

    def _rewrite(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
        storage.write_text(self._path, ''.join(self._lines))
        self._written_lines, self._written_at = len(self._lines), time.monotonic()
        if storage.is_local(self._path):
            self._file = self._path.open('a')

    def close(self) -> None:
        """Store all rows, and end the trackers."""
        self.flush()
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            tracker.close(self.latest)

    def __enter__(self) -> 'Writer':
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def montage(pictures: list[np.ndarray], columns: int = 8) -> np.ndarray:
    """Arrange pictures of one size in a grid, uint8 [height, width, 3]."""
    shown = [np.repeat(p[..., :1], 3, 2) if p.shape[-1] < 3 else p[..., :3] for p in pictures]
    columns = min(columns, len(shown))
    shown += [np.zeros_like(shown[0])] * (-len(shown) % columns)
    rows = [np.concatenate(shown[i : i + columns], 1) for i in range(0, len(shown), columns)]
    return np.concatenate(rows)
