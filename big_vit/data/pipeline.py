"""Loading of batches from a source, in threads or processes; the only file that imports Grain."""

import collections
import concurrent.futures
import contextlib
import ctypes
import functools
import math
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int64

from big_vit.data import network, order, windows
from big_vit.data.sources.base import Source, stand_ins
from big_vit.data.sources.media import say_once
from big_vit.data.transforms import Transform, finished
from big_vit.data.transforms.operations import BadExampleError
from big_vit.data.transforms.transform import TRIED
from big_vit.errors import PERMANENT_ERRORS, Unavailable, UserError, failure_at

# A few adjacent rows are loaded together: their random numbers are drawn at once, and the
# bookkeeping for one row holds the interpreter lock as long as for sixteen.
_ROWS_PER_TASK = 16
# Rows after those that are loaded, which a source begins to read one by one: enough for the
# latency of a store, and where all examples come so also for requests that are repeated.
_SOON_IN_WINDOWS, _SOON = 128, 512
# Options of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

Rows = slice | Int64[np.ndarray, ' rows']
_Indices = Callable[[int], tuple[np.ndarray, np.ndarray]]
Columns = dict[str, Any]
# What stands for an example that cannot be read, of (its index, the error): arrays [1, ...].
Instead = Callable[[int, Exception], Columns]


@dataclass(frozen=True)
class Order:
    """The order of examples; see `order.example_indices`.

    Attributes:
      batch_size: examples in the global batch, over all hosts.
      seed: of the order and of the transform.
      shuffle: False keeps the order of the source.
      repeats: views of each example in a batch.
      lengths: of the parts of a mixture.
      counts: positions of each part in a cycle, from `order.shares`; None without a mixture.
      shift: positions ahead of what steps of this batch size come to; see `order.example_indices`.
      shards: of an order with locality, those of the source or of each part of a mixture, see
        `windows.example_indices`; none for the order of `order.example_indices`.
    """

    batch_size: int
    seed: int
    shuffle: bool = True
    repeats: int = 1
    lengths: tuple[int, ...] = ()
    counts: tuple[int, ...] | None = None
    shift: int = 0
    shards: tuple[windows.Shards | int, ...] = ()

    @property
    def positions(self) -> int:
        """The positions of the order that a step takes."""
        return self.batch_size // self.repeats

    def indices(
        self, step: int, length: int, rows: Rows = slice(None)
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (index, view) of the rows of batch `step` of a source of this length."""
        if self.shards:
            return windows.example_indices(
                step,
                parts=self.shards,
                batch_size=self.batch_size,
                seed=self.seed,
                rows=rows,
                counts=self.counts,
                repeats=self.repeats,
                shift=self.shift,
            )
        return order.example_indices(
            step,
            length=self.lengths if self.counts else length,
            batch_size=self.batch_size,
            seed=self.seed,
            rows=rows,
            shuffle=self.shuffle,
            counts=self.counts,
            repeats=self.repeats,
            shift=self.shift,
        )


@dataclass
class Meter:
    """Measures the capacity of a loader: rows loaded, and the thread seconds that took.

    Attributes:
      damaged: indices of the examples in whose place others were loaded.
      lost: numbers of the shards of those near which nothing could be read.
    """

    threads: int = 1
    rows: int = 0
    seconds: float = 0.0
    last: float | None = None
    damaged: set[int] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, rows: int, seconds: float | int) -> None:
        with self._lock:
            self.rows += rows
            self.seconds += seconds

    def rate(self) -> float | None:
        """Return examples a second with all threads at work, since the last call that had any.

        None before any were loaded.
        """
        with self._lock:
            if self.rows and self.seconds:
                self.last = self.rows / self.seconds * self.threads
            self.rows, self.seconds = 0, 0.0
            return self.last


def default_threads() -> int:
    """Return the number of processors that this process may use."""
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 4)


@functools.cache
def _tune_process() -> None:
    """Tune this process for loading in threads; no result depends on it."""
    import cv2

    # OpenCV would start threads for each image, but images are parallel already.
    cv2.setNumThreads(1)
    # The arrays of a batch are so large that glibc returns them to the system each time; page
    # faults of new ones stall all threads (a third of the rate from a cache with two threads).
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            libc.mallopt(option, 1 << 30)


def _columns(source: Source, transform: Transform, index: np.ndarray, keys: np.ndarray) -> Columns:
    """Load and transform examples, to arrays [B, ...]; BadExampleError or OSError."""
    return finished(transform(source.load(index), keys), transform)


def load(
    source: Source,
    transform: Transform,
    index: Int64[np.ndarray, ' b'],
    view: Int64[np.ndarray, ' b'] | int,
    seed: int,
    skip_bad: bool = False,
    instead: Instead | None = None,
) -> Columns:
    """Load examples and apply the host part of their transform.

    Args:
      source: of the examples.
      transform: applied to each.
      index: of the examples, int64 [B].
      view: number of earlier views of each; with seed and index it determines the randomness.
      seed: of the transform.
      skip_bad: replace examples that cannot be read or decoded by the next that can, and mark
        them in the column 'replaced' (uint8: 1 by one that follows, 2 if nothing near it in its
        shard can be read, by one of another shard; else 0).
      instead: of `skip_bad`, gives what replaces an example, rather than the next that can be read.

    Returns:
      Arrays [B, ...].

    Raises:
      UserError: an example is damaged; names its location.
      Unavailable: the store in the network that holds it does not answer.
    """
    try:
        columns = _columns(source, transform, index, order.example_keys(seed, view, index))
        replaced = np.zeros(len(index), np.uint8)
    except (BadExampleError, OSError):
        views = np.broadcast_to(np.asarray(view, np.int64), index.shape)
        rows = [
            _load_one(source, transform, int(i), int(v), seed, skip_bad, instead)
            for i, v in zip(index, views, strict=True)
        ]
        columns = {name: np.concatenate([row[name] for row, _ in rows]) for name in rows[0][0]}
        replaced = np.array([kind for _, kind in rows], np.uint8)
    return {**columns, 'replaced': replaced} if skip_bad else columns


def _is_outage(place: str, error: Exception) -> bool:
    """Whether a store does not answer, of which nothing is damaged."""
    return (
        isinstance(error, OSError)
        and not isinstance(error, network.BrokenAnswerError)
        and failure_at(place, error) is Unavailable
    )


def _load_one(
    source: Source,
    transform: Transform,
    index: int,
    view: int,
    seed: int,
    skip_bad: bool,
    instead: Instead | None,
) -> tuple[Columns, int]:
    """Load an example or another; return (columns, 1 if it is another, 2 if of another shard)."""

    def load_at(place: int) -> Columns:
        at = np.array([place], np.int64)
        return _columns(source, transform, at, order.example_keys(seed, view, at))

    try:
        return load_at(index), 0
    except (BadExampleError, OSError) as error:
        if instead is not None:
            return instead(index, error), 1
        first = error
    if skip_bad and not _is_outage(source.place(index), first):
        following, of_others = stand_ins(source, index, TRIED)
        # A shard that is not there has no other example either.
        is_lost = bool(of_others) and isinstance(first, PERMANENT_ERRORS)
        for number, other in enumerate(of_others if is_lost else following + of_others):
            with contextlib.suppress(BadExampleError, OSError):
                return load_at(other), 2 if is_lost or number >= len(following) else 1
    section = transform.key.rpartition('.')[0]
    hint = (
        f'so are the {TRIED - 1} examples after it'
        if skip_bad
        else f"repair or remove it, or set {section}.on_error='skip' to go on without it"
    )
    place = source.place(index)
    kind = Unavailable if _is_outage(place, first) else UserError
    raise kind(f'{place}: {first}; {hint}') from first


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
    """Yield batches forever; the k-th is a function of (seed, start_step + k) alone.

    Args:
      source: of the examples.
      transform: applied to each; its randomness is a function of (seed, view, example).
      order: of the examples.
      start_step: number of the first batch.
      rows: rows of the global batch to load, from `local_rows`.
      skip_bad: see `load`.
      num_threads: number of loader threads, by default one a processor.
      workers: number of processes to load in instead, each with a share of the threads.
      opener: opens source and transform in a worker; must be picklable.
      meter: measures the loading time.

    Yields:
      Arrays [rows, ...]: 'image', 'label' and other columns that the transform leaves.
    """
    _tune_process()
    numbers = np.arange(order.batch_size)[rows]
    meter = meter or Meter()
    indices = _kept_indices(order, source.length, numbers)
    parts = _parts(len(numbers))

    def load_part(step: int, part: slice) -> Columns:
        index, view = indices(start_step + step)
        if source.expect is not None:
            threads = num_threads or default_threads()
            number = step * len(parts) + part.start // _ROWS_PER_TASK
            _expect(source.expect, order, indices, start_step, parts, number, threads)
        return load(source, transform, index[part], view[part], order.seed, skip_bad)

    if source.in_memory and not workers:
        batches = _in_turn(load_part, None, len(numbers), meter)
    elif workers:
        assert opener is not None
        task = _WorkerTask(opener, order, start_step, numbers, skip_bad, workers)
        batches = _in_processes(task, len(numbers), workers, meter)
    else:
        batches = _threaded(load_part, None, len(numbers), num_threads, meter)
    with contextlib.closing(batches):
        for step, columns in enumerate(batches, start_step):
            if skip_bad and columns['replaced'].any():
                index, kind = indices(step)[0], columns['replaced']
                meter.damaged.update(index[kind > 0].tolist())
                if (kind > 1).any():
                    _tell_lost(source, index[kind > 1], meter)
                columns['replaced'] = np.minimum(kind, 1)
            yield columns


def _kept_indices(order: Order, length: int, numbers: np.ndarray) -> _Indices:
    """Return `order.indices` of these rows by the step; all at once take a tenth of the time."""
    return functools.lru_cache(maxsize=2 * windows.MOST_AHEAD)(
        lambda step: order.indices(step, length, numbers)
    )


def _expect(
    told: Callable[..., None],
    order: Order,
    indices: _Indices,
    start: int,
    parts: list[slice],
    number: int,
    threads: int,
    stride: int = 1,
) -> None:
    """Tell a source which examples come after a part of a batch.

    Args:
      told: `Source.expect`.
      start: the first step of the run.
      parts: of a batch.
      number: of the part, counted from the start of the run.
      threads: that load parts at once.
      stride: from one part to the next of this process.
    """
    step, place = divmod(number, len(parts))
    soon = _SOON_IN_WINDOWS if order.shards else _SOON
    soon = threads + math.ceil(soon / (_ROWS_PER_TASK * stride))
    for later in range(0 if number < stride else soon, soon + 1):
        after, other = divmod(number + later * stride, len(parts))
        told(indices(start + after)[0][parts[other]], True)
    if order.shards:
        ahead = windows.steps_ahead(order.shards, order.batch_size)
        for later in range(1 if step == 0 else ahead, ahead + 1):
            told(indices(start + step + later)[0][parts[place]])


def _tell_lost(source: Source, index: np.ndarray, meter: Meter) -> None:
    """Count the shards of examples near which nothing can be read, and name each once."""
    for shard, example in zip(source.shard_of(index).tolist(), index.tolist(), strict=True):
        if shard not in meter.lost:
            meter.lost.add(shard)
            say_once(
                f'WARNING {source.place(example)}: nothing near it can be read: the examples of '
                'its shard are replaced by those of the next ones'
            )


def eval_steps(length: int, batch_size: int) -> int:
    """Return the number of batches of an evaluation, the same on every host."""
    return math.ceil(length / batch_size)


def eval_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    rows: Rows = slice(None),
    skip_bad: bool = False,
    instead: Instead | None = None,
    num_threads: int | None = None,
) -> Iterator[Columns]:
    """Yield every example once, in the order of the source; `eval_steps` batches on every host.

    Args:
      source: of the examples.
      transform: applied to each.
      batch_size: examples in the global batch, over all hosts.
      rows: rows of the global batch to load, from `local_rows`.
      skip_bad: damaged examples count as padding instead of ending the evaluation.
      instead: see `load`.
      num_threads: number of loader threads, by default one a processor.

    Yields:
      Arrays [rows, ...], among them 'mask', float32 [rows]: 1 for examples and 0 for the zeros
      that fill the last batch. Of sources with `annotations` also 'example', int32 [rows], the
      numbers of the examples.
    """
    _tune_process()
    numbers = np.arange(batch_size)[rows]

    def load_part(step: int, part: slice) -> Columns:
        position = step * batch_size + numbers[part]
        real = position < source.length
        # Shapes are needed even if a host has no example at all, so padding is loaded as
        # the first example and then zeroed.
        batch = load(source, transform, np.where(real, position, 0), 0, 0, skip_bad, instead)
        if skip_bad:
            real &= batch.pop('replaced') == 0
        for name, column in batch.items():
            if not real.all():
                batch[name] = column * real.reshape(-1, *[1] * (column.ndim - 1)).astype(
                    column.dtype
                )
        if source.annotations is not None:  # What is said of an example is looked up by its number.
            batch['example'] = np.where(real, position, 0).astype(np.int32)
        return {**batch, 'mask': real.astype(np.float32)}

    steps = eval_steps(source.length, batch_size)
    if source.in_memory:
        yield from _in_turn(load_part, steps, len(numbers), Meter())
    else:
        yield from _threaded(load_part, steps, len(numbers), num_threads, Meter())


LoadPart = Callable[[int, slice], Columns]


def _in_turn(
    load_part: LoadPart, steps: int | None, batch: int, meter: Meter
) -> Generator[Columns, None, None]:
    """Load complete batches one after the other, `steps` of them or forever."""
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
    """A batch that several threads fill, each with different rows."""

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
            target = self.columns[name]
            if column.shape[1:] != target.shape[1:]:
                raise UserError(
                    f'data: examples of one batch have {name} of {target.shape[1:]} and '
                    f'{column.shape[1:]}: add resize(size), a crop, rgb or grayscale to its '
                    'transform'
                )
            target[part] = column


def _threaded(
    load_part: LoadPart, steps: int | None, batch: int, num_threads: int | None, meter: Meter
) -> Generator[Columns, None, None]:
    """Load batches of `batch` rows in threads, and yield them in order."""
    threads = num_threads or default_threads()
    meter.threads = threads
    parts = _parts(batch)
    # Enough tasks to keep all threads busy while the oldest batch is awaited.
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


def _worker_threads(workers: int) -> int:
    return max(1, default_threads() // workers)


class _WorkerTask:
    """Loads parts of batches in a worker process, which opens the source itself."""

    def __init__(
        self,
        opener: Callable[[], tuple[Source, Transform]],
        order: Order,
        start_step: int,
        numbers: np.ndarray,
        skip_bad: bool,
        workers: int,
    ):
        self._workers, self._threads = workers, _worker_threads(workers)
        self._opener, self._order, self._start = opener, order, start_step
        self._numbers, self._skip_bad = numbers, skip_bad
        self._parts = _parts(len(numbers))
        self._opened: tuple[Source, Transform, Callable[[int], Any]] | None = None
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
                source, transform = self._opener()
                indices = _kept_indices(self._order, source.length, self._numbers)
                self._opened = source, transform, indices
        source, transform, indices = self._opened
        step, part = divmod(int(number), len(self._parts))
        began = time.perf_counter()
        index, view = (rows[self._parts[part]] for rows in indices(self._start + step))
        if source.expect is not None:
            _expect(
                source.expect,
                self._order,
                indices,
                self._start,
                self._parts,
                int(number),
                self._threads,
                self._workers,
            )
        try:
            loaded = load(source, transform, index, view, self._order.seed, self._skip_bad)
        except UserError as error:  # Only the text of an error crosses processes.
            return {'error': np.frombuffer(str(error).encode(), np.uint8)}
        seconds = np.array([time.perf_counter() - began])
        traffic = np.array(list(network.TRAFFIC.take().values()), np.int64)
        return {**loaded, 'seconds': seconds, 'traffic': traffic}


# Steps of an endless run; times the parts of a step it must fit in 64 bits.
_ENDLESS = 1 << 40


def _in_processes(
    task: _WorkerTask, batch: int, workers: int, meter: Meter
) -> Generator[Columns, None, None]:
    """Load parts of batches in workers in turn, and yield the batches in order."""
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # Grain reads absl flags, which nothing here parses.
        flags.FLAGS.mark_as_parsed()
    threads = _worker_threads(workers)
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
                names = network.TRAFFIC.counts()  # Or nothing was asked in the process.
                network.TRAFFIC.add(
                    **dict(zip(names, loaded.pop('traffic').tolist(), strict=False))
                )
                assembly.put(part, loaded)
            assert assembly.columns is not None
            yield assembly.columns
    finally:
        iterator.close()
