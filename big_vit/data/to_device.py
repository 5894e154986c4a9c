"""Transfer of NumPy batches to global arrays on the devices, ahead of the step."""

import queue
import threading
from collections.abc import Iterable

import jax
import numpy as np
from jaxtyping import Int64

from big_vit.data.pipeline import Meter
from big_vit.errors import UserError


def local_rows(sharding: jax.sharding.Sharding, batch_size: int) -> Int64[np.ndarray, ' rows']:
    """Return the rows of the global batch that this process has to load, ascending.

    They need not be adjacent: on a pod the devices of a host are a small square of
    the network of chips, not a consecutive part of the mesh.

    Args:
      sharding: of the batch over its leading axis.
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
    rows = np.arange(batch_size, dtype=np.int64)
    return np.unique(np.concatenate([rows[part[0]] for part in parts if part is not None]))


class _Failure:
    """An exception raised in a worker thread."""

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
        meter: Meter | None = None,
    ):
        self.meter = meter or Meter()
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
            # This transfer is intended, also if the process guards against transfers.
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
            # The consumer must learn of any exception, or it waits forever.
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
        """Stop the thread and drop the batches loaded ahead; may be called again."""
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
    meter: Meter | None = None,
) -> DeviceBatches:
    """Transfer batches to the devices in a thread, ahead of the step that needs them.

    Args:
      batches: of arrays [rows, ...], the rows of this process.
      sharding: of every array over its leading axis.
      batch_size: examples in the global batch.
      prefetch: number of batches that may wait on the devices, at least 1.
      meter: of the loader of the batches, for the owner of the iterator.

    Returns:
      An iterator over dicts of global arrays [batch_size, ...], to be closed after use (it
      is a context manager). An exception in the thread is raised by the `next` that reaches it,
      with the original traceback.
    """
    return DeviceBatches(batches, sharding, batch_size=batch_size, prefetch=prefetch, meter=meter)
