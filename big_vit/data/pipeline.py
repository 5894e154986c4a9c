"""From a source to batches on the devices; the only file that knows Grain."""

import collections
import concurrent.futures
import contextlib
import ctypes
import functools
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int64

from big_vit.data import order
from big_vit.data.sources.base import Source
from big_vit.data.transforms import Transform, finished
from big_vit.data.transforms.operations import BadExampleError
from big_vit.errors import UserError

# A few neighbouring rows are loaded together: their random numbers are drawn at once, and the
# bookkeeping for one row would hold the interpreter lock as long as that for sixteen.
_ROWS_PER_TASK = 16
# How many of the examples that follow a damaged one are tried in its place.
_NEIGHBOURS = 16
# Of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

Rows = slice | Int64[np.ndarray, ' rows']
Columns = dict[str, Any]


@dataclass(frozen=True)
class Order:
    """Which examples come when; see `order.example_indices`.

    Attributes:
      batch_size: examples in the global batch, over all hosts.
      seed: of the order and of the transform.
      shuffle: False gives the order of the source.
      repeats: views of each example in a batch.
      lengths: of the parts of a mixture, whose counts in a cycle are `counts`.
    """

    batch_size: int
    seed: int
    shuffle: bool = True
    repeats: int = 1
    lengths: tuple[int, ...] = ()
    counts: tuple[int, ...] | None = None

    def indices(
        self, step: int, length: int, rows: Rows = slice(None)
    ) -> tuple[np.ndarray, np.ndarray]:
        """(index, view) of the rows of batch `step`, from a source of this length."""
        return order.example_indices(
            step,
            length=self.lengths if self.counts else length,
            batch_size=self.batch_size,
            seed=self.seed,
            rows=rows,
            shuffle=self.shuffle,
            counts=self.counts,
            repeats=self.repeats,
        )


@dataclass
class Meter:
    """How fast a loader could be: rows loaded, and the seconds that its threads took for them."""

    threads: int = 1
    rows: int = 0
    seconds: float = 0.0
    last: float | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, rows: int, seconds: float | int) -> None:
        with self._lock:
            self.rows += rows
            self.seconds += seconds

    def rate(self) -> float | None:
        """Examples a second with all threads at work, since the last call if there were any.

        None before any were loaded.
        """
        with self._lock:
            if self.rows and self.seconds:
                self.last = self.rows / self.seconds * self.threads
            self.rows, self.seconds = 0, 0.0
            return self.last


def default_threads() -> int:
    """As many as this process may use processors."""
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 4)


@functools.cache
def _tune_process() -> None:
    """Settings of this process that loading in threads needs; no result depends on them."""
    import cv2

    # OpenCV would start threads for each image, where each thread here has images of its own.
    cv2.setNumThreads(1)
    # The arrays of a batch are large enough for glibc to give them back to the system each time;
    # faulting them in again holds up all threads (a third of the rate from a cache on two).
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            libc.mallopt(option, 1 << 30)


def _columns(source: Source, transform: Transform, index: np.ndarray, keys: np.ndarray) -> Columns:
    """Arrays [B, ...] of some examples, transformed; BadExampleError or OSError."""
    return finished(transform(source.load(index), keys), transform)


def load(
    source: Source,
    transform: Transform,
    index: Int64[np.ndarray, ' b'],
    view: Int64[np.ndarray, ' b'] | int,
    seed: int,
    skip_bad: bool = False,
) -> Columns:
    """Some examples as the model will see them, but for what the devices do.

    Args:
      view: how often each example came before; with seed and index its randomness.
      skip_bad: what cannot be read or decoded is replaced by the next example that can, and
        marked in the column 'replaced' (uint8, 1 where that is so).

    Returns:
      Arrays [B, ...].

    Raises:
      UserError: an example is damaged; says where it lies.
    """
    try:
        found = _columns(source, transform, index, order.example_keys(seed, view, index))
        replaced = np.zeros(len(index), np.uint8)
    except (BadExampleError, OSError):
        views = np.broadcast_to(np.asarray(view, np.int64), index.shape)
        rows = [
            _load_one(source, transform, int(i), int(v), seed, skip_bad)
            for i, v in zip(index, views, strict=True)
        ]
        found = {name: np.concatenate([row[name] for row, _ in rows]) for name in rows[0][0]}
        replaced = np.array([away for _, away in rows], np.uint8)
    return {**found, 'replaced': replaced} if skip_bad else found


def _load_one(
    source: Source, transform: Transform, index: int, view: int, seed: int, skip_bad: bool
) -> tuple[Columns, bool]:
    """One example, or one that follows it, and whether it is another."""
    first: Exception | None = None
    for step in range(_NEIGHBOURS + 1 if skip_bad else 1):
        at = np.array([(index + step) % source.length], np.int64)
        try:
            return _columns(source, transform, at, order.example_keys(seed, view, at)), step > 0
        except (BadExampleError, OSError) as error:
            first = first or error
    section = transform.key.rpartition('.')[0]
    hint = (
        f'so are the {_NEIGHBOURS} examples after it'
        if skip_bad
        else f"repair or remove it, or set {section}.on_error='skip' to go on without it"
    )
    raise UserError(f'{source.place(index)}: {first}; {hint}') from first


def train_batches(
    source: Source,
    transform: Transform,
    order: Order,
    *,
    start_step: int = 0,
    rows: Rows = slice(None),
    skip_bad: bool = False,
    num_threads: int | None = None,
    workers: int = 0,
    opener: Callable[[], tuple[Source, Transform]] | None = None,
    meter: Meter | None = None,
) -> Iterator[Columns]:
    """Batches without end; the k-th is a function of (seed, start_step + k) alone.

    Args:
      source: where examples come from.
      transform: applied to each; its randomness follows (seed, view, example).
      order: which come when.
      start_step: number of the first batch.
      rows: the rows of the global batch that are wanted, from `local_rows`.
      skip_bad: see `load`.
      num_threads: that load, by default one a processor.
      workers: processes that load instead, each with a share of the threads.
      opener: gives source and transform anew, for the workers; must be picklable.
      meter: is told how long loading takes.

    Yields:
      Arrays [rows, ...]: 'image', 'label' and what else the transform leaves.
    """
    _tune_process()
    numbers = np.arange(order.batch_size)[rows]
    meter = meter or Meter()

    def load_part(step: int, part: slice) -> Columns:
        index, view = order.indices(start_step + step, source.length, numbers[part])
        return load(source, transform, index, view, order.seed, skip_bad)

    if source.in_memory and not workers:
        yield from _in_turn(load_part, None, len(numbers), meter)
    elif workers:
        assert opener is not None
        task = _WorkerTask(opener, order, start_step, numbers, skip_bad)
        yield from _in_processes(task, len(numbers), workers, meter)
    else:
        yield from _threaded(load_part, None, len(numbers), num_threads, meter)


def eval_steps(length: int, batch_size: int) -> int:
    """How many batches an evaluation has, the same on every host."""
    return math.ceil(length / batch_size)


def eval_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    rows: Rows = slice(None),
    skip_bad: bool = False,
    num_threads: int | None = None,
) -> Iterator[Columns]:
    """Every example once, in the order of the source; `eval_steps` batches on every host.

    Args:
      source: where examples come from.
      transform: applied to each.
      batch_size: examples in the global batch, over all hosts.
      rows: the rows of the global batch that are wanted, from `local_rows`.
      skip_bad: damaged examples count as padding instead of ending the evaluation.
      num_threads: that load, by default one a processor.

    Yields:
      Arrays [rows, ...], among them 'mask', float32 [rows]: 1 for examples and 0 for the zeros
      that fill the last batch.
    """
    _tune_process()
    numbers = np.arange(batch_size)[rows]

    def load_part(step: int, part: slice) -> Columns:
        position = step * batch_size + numbers[part]
        real = position < source.length
        # A shape is needed even where a host has no example at all, so padding is loaded as
        # the first example and then blanked.
        batch = load(source, transform, np.where(real, position, 0), 0, 0, skip_bad)
        if skip_bad:
            real &= batch.pop('replaced') == 0
        for name, column in batch.items():
            if not real.all():
                batch[name] = column * real.reshape(-1, *[1] * (column.ndim - 1)).astype(
                    column.dtype
                )
        return {**batch, 'mask': real.astype(np.float32)}

    steps = eval_steps(source.length, batch_size)
    if source.in_memory:
        yield from _in_turn(load_part, steps, len(numbers), Meter())
    else:
        yield from _threaded(load_part, steps, len(numbers), num_threads, Meter())


LoadPart = Callable[[int, slice], Columns]


def _in_turn(load_part: LoadPart, steps: int | None, batch: int, meter: Meter) -> Iterator[Columns]:
    """Whole batches 0, 1, ... one after the other, `steps` of them or without end."""
    step = 0
    while steps is None or step < steps:
        began = time.perf_counter()
        loaded = load_part(step, slice(None))
        meter.add(batch, time.perf_counter() - began)
        yield loaded
        step += 1


def _parts(batch: int) -> list[slice]:
    return [
        slice(start, min(start + _ROWS_PER_TASK, batch))
        for start in range(0, batch, _ROWS_PER_TASK)
    ]


class _Assembly:
    """A batch that several threads fill, each its own rows."""

    def __init__(self, rows: int):
        self._rows, self._lock = rows, threading.Lock()
        self.columns: Columns | None = None

    def put(self, part: slice, columns: Columns) -> None:
        with self._lock:
            if self.columns is None:
                self.columns = {
                    name: np.empty((self._rows, *column.shape[1:]), column.dtype)
                    for name, column in columns.items()
                }
        for name, column in columns.items():
            whole = self.columns[name]
            if column.shape[1:] != whole.shape[1:]:
                raise UserError(
                    f'data: examples of one batch have {name} of {whole.shape[1:]} and '
                    f'{column.shape[1:]}: add resize(size), a crop, rgb or grayscale to its '
                    'transform'
                )
            whole[part] = column


def _threaded(
    load_part: LoadPart, steps: int | None, batch: int, num_threads: int | None, meter: Meter
) -> Iterator[Columns]:
    """Batches 0, 1, ... in order, of `batch` rows each, loaded in threads."""
    threads = num_threads or default_threads()
    meter.threads = threads
    parts = _parts(batch)
    # Enough tasks to keep all threads at work while the oldest batch is waited for.
    ahead = 1 + max(1, math.ceil(2 * threads / len(parts)))

    def run(assembly: _Assembly, step: int, part: slice) -> None:
        began = time.perf_counter()
        assembly.put(part, load_part(step, part))
        meter.add(part.stop - part.start, time.perf_counter() - began)

    waiting: collections.deque[tuple[_Assembly, list[concurrent.futures.Future]]] = (
        collections.deque()
    )
    pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix='loader')
    step = 0
    try:
        while True:
            while len(waiting) < ahead and (steps is None or step < steps):
                assembly = _Assembly(batch)
                tasks = [pool.submit(run, assembly, step, part) for part in parts]
                waiting.append((assembly, tasks))
                step += 1
            if not waiting:
                return
            assembly, tasks = waiting.popleft()
            for done in tasks:
                done.result()
            assert assembly.columns is not None
            yield assembly.columns
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _WorkerTask:
    """Loads parts of batches in another process, which opens the source for itself."""

    def __init__(
        self,
        opener: Callable[[], tuple[Source, Transform]],
        order: Order,
        start_step: int,
        numbers: np.ndarray,
        skip_bad: bool,
    ):
        self._opener, self._order, self._start = opener, order, start_step
        self._numbers, self._skip_bad = numbers, skip_bad
        self._parts = _parts(len(numbers))
        self._opened: tuple[Source, Transform] | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_opened': None, '_lock': None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __call__(self, number: int) -> Columns:
        with self._lock:
            if self._opened is None:
                _tune_process()
                self._opened = self._opener()
        source, transform = self._opened
        step, part = divmod(int(number), len(self._parts))
        began = time.perf_counter()
        rows = self._numbers[self._parts[part]]
        index, view = self._order.indices(self._start + step, source.length, rows)
        try:
            loaded = load(source, transform, index, view, self._order.seed, self._skip_bad)
        except UserError as error:  # Across processes only the text of an error survives.
            return {'error': np.frombuffer(str(error).encode(), np.uint8)}
        return {**loaded, 'seconds': np.array([time.perf_counter() - began])}


# Steps of a run without end; times the parts of a step it must fit in 64 bits.
_ENDLESS = 1 << 40


def _in_processes(task: _WorkerTask, batch: int, workers: int, meter: Meter) -> Iterator[Columns]:
    """Batches 0, 1, ... in order, whose parts the workers load in turn."""
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # Grain asks for flags, of which this program has none.
        flags.FLAGS.mark_as_parsed()
    threads = max(1, default_threads() // workers)
    meter.threads = workers * threads
    parts = _parts(batch)
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    buffered = max(2, math.ceil(2 * len(parts) / workers))
    processes = grain.MultiprocessingOptions(
        num_workers=workers, per_worker_buffer_size=min(buffered, 64)
    )
    numbers = grain.MapDataset.range(_ENDLESS * len(parts)).map(task)
    iterator = iter(numbers.to_iter_dataset(read).mp_prefetch(processes))
    try:
        while True:
            assembly = _Assembly(batch)
            for part in parts:
                loaded = next(iterator)
                if 'error' in loaded:
                    raise UserError(bytes(loaded['error']).decode())
                meter.add(part.stop - part.start, float(loaded.pop('seconds')[0]))
                assembly.put(part, loaded)
            assert assembly.columns is not None
            yield assembly.columns
    finally:
        iterator.close()
