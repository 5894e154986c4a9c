"""From a source to batches on the devices; the only file that knows Grain."""

import math
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Int64

from big_vit.data import order
from big_vit.data.sources import Source
from big_vit.data.transforms import Transform
from big_vit.errors import UserError

# Steps of a run without end; times the tasks of a step it must fit in 64 bits.
_ENDLESS = 1 << 40
_ROWS_PER_TASK = 16

Rows = slice | Int64[np.ndarray, ' rows']


def local_rows(sharding: jax.sharding.Sharding, batch_size: int) -> Int64[np.ndarray, ' rows']:
    """Which rows of the global batch this process has to load, ascending.

    They need not be neighbours: on a pod the devices of a host are a small square of
    the chips' network, not a run of the mesh.

    Args:
      sharding: of the batch, over its leading axis.
      batch_size: examples in the global batch.

    Raises:
      UserError: the batch cannot be split evenly.
    """
    try:
        parts = sharding.addressable_devices_indices_map((batch_size,)).values()
    except ValueError as error:
        raise UserError(
            f'batch_size={batch_size} cannot be split over {len(sharding.device_set)} devices: '
            'make it a multiple of the replica and fsdp axes of the mesh'
        ) from error
    every = np.arange(batch_size, dtype=np.int64)
    return np.unique(np.concatenate([every[part[0]] for part in parts if part is not None]))


def _load(source: Source, transform: Transform, index: np.ndarray, keys: np.ndarray) -> dict:
    """{'image': uint8 [B, h, w, c], 'label': int32 [B]} of the examples, transformed."""
    examples = source.load(index)
    images = examples['image']
    if isinstance(images, np.ndarray):
        images = transform(images, keys)
    else:
        images = np.concatenate(
            [transform(image[None], keys[i : i + 1]) for i, image in enumerate(images)]
        )
    return {'image': np.ascontiguousarray(images), 'label': examples['label']}


def train_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rows: Rows = slice(None),
    shuffle: bool = True,
    num_threads: int = 16,
) -> Iterator[dict]:
    """Batches without end; the k-th is a function of (seed, start_step + k) alone.

    Args:
      source: where examples come from.
      transform: applied to each; its randomness follows (seed, epoch, example).
      batch_size: examples in the global batch, over all hosts.
      seed: of the order and of the transform.
      start_step: number of the first batch.
      rows: the rows of the global batch that are wanted, from `local_rows`.
      shuffle: False gives the order of the source.
      num_threads: that decode, where examples are loaded one by one.

    Yields:
      {'image': uint8 [rows, h, w, c], 'label': int32 [rows]}.
    """

    def load(step: int, rows: Rows) -> dict:
        index, epoch = order.example_indices(
            step, length=source.length, batch_size=batch_size, seed=seed, rows=rows, shuffle=shuffle
        )
        return _load(source, transform, index, order.example_keys(seed, epoch, index))

    if source.in_memory:
        step = start_step
        while True:
            yield load(step, rows)
            step += 1

    numbers = np.arange(batch_size)[rows]

    def load_part(step: int, start: int, size: int) -> dict:
        return load(start_step + step, numbers[start : start + size])

    yield from _threaded(load_part, _ENDLESS, len(numbers), num_threads)


def eval_steps(length: int, batch_size: int) -> int:
    """How many batches an evaluation has, the same on every host."""
    return math.ceil(length / batch_size)


def eval_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    rows: Rows = slice(None),
    num_threads: int = 16,
) -> Iterator[dict]:
    """Every example once, in the order of the source; `eval_steps` batches on every host.

    Args:
      source: where examples come from.
      transform: applied to each.
      batch_size: examples in the global batch, over all hosts.
      rows: the rows of the global batch that are wanted, from `local_rows`.
      num_threads: that decode, where examples are loaded one by one.

    Yields:
      {'image': uint8 [rows, h, w, c], 'label': int32 [rows], 'mask': float32 [rows]}, with
      mask 1 for examples and 0 for the zeros that fill the last batch.
    """
    numbers = np.arange(batch_size)[rows]

    def load(position: np.ndarray) -> dict:
        real = position < source.length
        index = np.where(real, position, 0)
        batch = _load(source, transform, index, order.example_keys(0, 0, index))
        # A shape is needed even where a host has no example at all, so padding is loaded as
        # the first example and then blanked.
        images = batch['image'] if real.all() else batch['image'] * real[:, None, None, None]
        labels = np.where(real, batch['label'], 0).astype(np.int32)
        return {'image': images, 'label': labels, 'mask': real.astype(np.float32)}

    steps = eval_steps(source.length, batch_size)
    if source.in_memory:
        for step in range(steps):
            yield load(step * batch_size + numbers)
        return

    def load_part(step: int, start: int, size: int) -> dict:
        return load(step * batch_size + numbers[start : start + size])

    yield from _threaded(load_part, steps, len(numbers), num_threads)


def _threaded(
    load_part: Callable[[int, int, int], dict], steps: int, batch: int, num_threads: int
) -> Iterator[dict]:
    """Batches 0 .. steps-1 in order, of `batch` rows each, loaded in threads.

    A task is load_part(step, start, size): a few neighbouring rows of a batch, because the
    bookkeeping for a single row costs as much as for sixteen and holds the interpreter lock.
    """
    import grain

    size = math.gcd(batch, _ROWS_PER_TASK)
    parts = batch // size

    def task(number: int) -> dict:
        step, part = divmod(int(number), parts)
        return load_part(step, part * size, size)

    def join(loaded: Sequence[dict]) -> dict:
        return {name: np.concatenate([part[name] for part in loaded]) for name in loaded[0]}

    ahead = max(2 * parts, num_threads)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=ahead)
    tasks = grain.MapDataset.range(steps * parts).map(task)
    iterator = iter(tasks.to_iter_dataset(options).batch(parts, batch_fn=join))
    try:
        yield from iterator
    finally:
        iterator.close()


class _Failure:
    """What a worker thread raised."""

    def __init__(self, error: BaseException):
        self.error = error


class DeviceBatches:
    """Iterator over global arrays, filled by a thread; see `to_device`."""

    def __init__(
        self,
        batches: Iterable[dict],
        sharding: jax.sharding.Sharding,
        *,
        batch_size: int,
        prefetch: int,
    ):
        self._queue: queue.Queue = queue.Queue(maxsize=prefetch)
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._fill, args=(batches, sharding, batch_size), name='to_device', daemon=True
        )
        self._thread.start()

    def _fill(self, batches: Iterable[dict], sharding, batch_size: int) -> None:
        def put(item: object) -> bool:
            while not self._closed.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    pass
            return False

        rows = local_rows(sharding, batch_size)

        def move(local: np.ndarray) -> jax.Array:
            def part(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None
                first, last, _ = index[0].indices(batch_size)
                start = np.searchsorted(rows, first)
                return local[start : start + last - first]

            if len(local) != len(rows):
                raise ValueError(f'{len(local)} rows, but this process holds {len(rows)}')
            shape = (batch_size, *local.shape[1:])
            # This transfer is the one that is meant, also under a guard of the whole process.
            with jax.transfer_guard('allow'):
                return jax.make_array_from_callback(shape, sharding, part)

        def move_all() -> None:
            iterator = iter(batches)
            try:
                for batch in iterator:
                    if not put({name: move(local) for name, local in batch.items()}):
                        return
            finally:
                close = getattr(iterator, 'close', None)
                if close:
                    close()

        last: _Failure | None = None
        try:
            move_all()
        except BaseException as error:
            # Whatever it is, the consumer must hear of it, or it waits for ever.
            last = _Failure(error)
        put(last)

    def __iter__(self) -> 'DeviceBatches':
        return self

    def __next__(self) -> dict:
        if self._closed.is_set():
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, dict):
            return item
        self.close()
        if item is None:
            raise StopIteration
        raise item.error

    def close(self) -> None:
        """Ends the thread; what was loaded ahead is dropped. May be called again."""
        self._closed.set()
        while True:
            try:
                self._queue.get_nowait()
            except queue.Empty:
                break
        self._thread.join()

    def __enter__(self) -> 'DeviceBatches':
        return self

    def __exit__(self, *_) -> None:
        self.close()


def to_device(
    batches: Iterable[dict],
    sharding: jax.sharding.Sharding,
    *,
    batch_size: int,
    prefetch: int = 1,
) -> DeviceBatches:
    """Moves batches to the devices in a thread, ahead of the step that needs them.

    Args:
      batches: of arrays [rows, ...] with the rows of this process.
      sharding: of every array, over its leading axis.
      batch_size: examples in the global batch.
      prefetch: how many batches may wait on the devices, at least 1.

    Returns:
      An iterator over dicts of global arrays [batch_size, ...], to be closed after use (it
      is a context manager). An exception in the thread is raised by the `next` that comes
      to it, with its own traceback.
    """
    return DeviceBatches(batches, sharding, batch_size=batch_size, prefetch=prefetch)
