"""What a run reports: JSONL always, TensorBoard and W&B when asked, progress on the console."""

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
# Rows of two runs with the same config are equal but for keys that start with this.
TIMING = 'time/'
# Of the metrics of evaluations those that are no shares; the last are settings that were chosen.
LOSSES = ('loss', 'nll', 'brier')
_NUMBERS = ('count', 'iterations', 'l2', 'rate', 'last_blocks', 'mean_joined')
# An object store has no appending: the file is written anew, and not at every row.
REWRITE_EVERY_S = 30
# In the first row after a resume: the step that it started from.
RESUMED = TIMING + 'resumed_from'


def read(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a run, oldest first; a last row that was cut off while written is left out.

    Raises:
      UserError: another line is damaged.
    """
    path = storage.place(workdir) / FILE
    rows, damaged = _parse(path.read_text() if path.exists() else '')
    if damaged:
        raise UserError(
            f'{path}, line {damaged[0]}: is not a row of metrics; delete that line, or resume the '
            'run, which leaves damaged rows out'
        )
    return rows


def _parse(text: str) -> tuple[list[dict[str, Any]], list[int]]:
    """(Rows, numbers of the damaged lines but for a last one that was cut off)."""
    rows, damaged = [], []
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = {n: math.nan if v is None else v + 0 for n, v in json.loads(line).items()}
            rows.append({'step': row.pop('step'), **row})
        except (ValueError, TypeError, AttributeError, KeyError):
            if number < len(lines) or text.endswith('\n'):
                damaged.append(number)
    return rows, damaged


def _line(row: dict[str, Any]) -> str:
    # JSON has no NaN and no infinity; what is not finite is null, and NaN when it is read.
    finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(finite) + '\n'


def latest(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The newest value of each metric, without timings."""
    merged = {name: value for row in rows for name, value in row.items()}
    return {k: v for k, v in merged.items() if k != 'step' and not k.startswith(TIMING)}


def headlines(rows: list[dict[str, Any]]) -> list[str]:
    """Of each evaluation the metric that stands for it: top1, else its first."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        evaluation, slash, metric = name.partition('/')
        if not slash or evaluation == 'train' or name.startswith(TIMING):
            continue
        if evaluation not in found or metric == 'top1':
            found[evaluation] = name
    return list(found.values())


def shown(metric: str, value: float) -> str:
    """A value for people: shares as per cent, counts whole, and what else there is as it is."""
    metric = metric.rpartition('/')[2]
    if metric in LOSSES:
        return f'{value:.4f}'
    return f'{value:g}' if metric in _NUMBERS else f'{value:.2%}'


def host_memory_mb() -> float | None:
    """Megabytes of host memory that this process holds; None where Linux is not there to ask."""
    try:
        pages = int(Path('/proc/self/statm').read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf('SC_PAGE_SIZE') / 1e6


class Writer:
    """Writes rows of metrics; opened at step N it drops rows of later steps, soon made again.

    Locally each row is on its way to the disk when `write` returns. In an object store
    rows wait, for at most REWRITE_EVERY_S or until `flush`.

    Args:
      start_step: the step that the run starts or resumes at.
      active: whether this process writes (process 0 does).
      tensorboard: also write event files to WORKDIR/tensorboard.
      wandb: also log to this Weights & Biases project.
      config: dump of the config, for both.

    Raises:
      UserError: the file cannot be written, also after some tries.
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
        if not active:
            return
        folder = storage.place(workdir)
        self._path = folder / FILE
        there, _ = _parse(self._path.read_text() if self._path.exists() else '')
        rows = [row for row in there if row['step'] <= start_step]
        self._mark = {RESUMED: float(start_step)} if there and start_step else {}
        self.latest = latest(rows)
        if wandb:
            self._trackers.append(trackers.WeightsAndBiases(folder, wandb, config or {}, rows))
        if tensorboard:
            self._trackers.append(trackers.TensorBoard(folder, start_step, config or {}))
        self._lines = list(map(_line, rows))
        self._rewrite()

    @property
    def tracked(self) -> bool:
        """Whether pictures have somewhere to go."""
        return bool(self._trackers)

    def pictures(self, step: int, name: str, pictures: list[np.ndarray]) -> None:
        """Gives trackers pictures of one size, uint8 [height, width, channels], as a grid."""
        for tracker in self._trackers if pictures else []:
            tracker.picture(step, name, montage(pictures))

    def checkpoint(self, path: os.PathLike[str], step: int) -> None:
        """Tells the trackers where the newest checkpoint is; nothing of it is copied."""
        for tracker in self._trackers:
            tracker.checkpoint(path, step, self.latest)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds one row; values are plain numbers."""
        self.latest.update({k: v for k, v in values.items() if not k.startswith(TIMING)})
        if not self._active:
            return
        row, self._mark = {'step': step, **values, **self._mark}, {}
        self._lines.append(_line(row))
        if self._file is not None:
            try:
                self._file.write(self._lines[-1])
                self._file.flush()
            except OSError:  # How much of the row is there, nobody knows.
                self._rewrite()
        elif time.monotonic() - self._written_at >= REWRITE_EVERY_S:
            self._rewrite()
        for tracker in self._trackers:
            tracker.scalars(step, values)

    def flush(self) -> None:
        """Returns when all rows are stored; call it before a checkpoint that promises them."""
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
    """Pictures of one size side by side as one, uint8 [height, width, 3]."""
    shown = [np.repeat(p[..., :1], 3, 2) if p.shape[-1] < 3 else p[..., :3] for p in pictures]
    columns = min(columns, len(shown))
    shown += [np.zeros_like(shown[0])] * (-len(shown) % columns)
    rows = [np.concatenate(shown[i : i + columns], 1) for i in range(0, len(shown), columns)]
    return np.concatenate(rows)
