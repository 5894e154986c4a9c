"""Small ranges of remote files in memory, read at once with many others before they are needed."""

import collections
import concurrent.futures
import threading
from collections.abc import Callable
from typing import NamedTuple

# With requests of 100 KB that take 50 ms, so many in flight are 128 MB/s.
IN_FLIGHT = 64
_MOST_BYTES = 256 << 20
# Ranges that were announced after one that nobody came for; then it is dropped.
_FORGOTTEN = 8192


class Range(NamedTuple):
    """A range of a file, which is known by its mark."""

    mark: str
    offset: int
    size: int


class _Coming:
    def __init__(self, future: concurrent.futures.Future[bytes], number: int):
        self.future, self.number, self.readers = future, number, 1


class ReadAhead:
    """Reads ranges that are announced; each is kept until it was taken as often as announced."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool = concurrent.futures.ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix='ahead')
        self._coming: collections.OrderedDict[Range, _Coming] = collections.OrderedDict()
        self._bytes = self._number = 0

    def expect(self, what: Range, read: Callable[[], bytes]) -> None:
        """Begin to read a range, unless that would be too many bytes in memory."""
        with self._lock:
            self._number += 1
            there = self._coming.get(what)
            if there is not None:
                there.readers += 1
                return
            self._make_room(what.size)
            if self._bytes + what.size <= _MOST_BYTES:
                self._coming[what] = _Coming(self._pool.submit(read), self._number)
                self._bytes += what.size

    def _make_room(self, size: int) -> None:
        while self._coming and self._bytes + size > _MOST_BYTES:
            first, coming = next(iter(self._coming.items()))
            if self._number - coming.number < _FORGOTTEN:
                return
            coming.future.cancel()
            self._drop(first)

    def _drop(self, what: Range) -> None:
        del self._coming[what]
        self._bytes -= what.size

    def take(self, what: Range) -> bytes | None:
        """Return a range, waiting for it if need be; None if it was not announced.

        Raises:
          Exception: it could not be read.
        """
        with self._lock:
            coming = self._coming.get(what)
            if coming is None:
                return None
            coming.readers -= 1
            if not coming.readers:
                self._drop(what)
        if coming.future.cancel():  # It waits behind what is less urgent.
            return None
        return None if coming.future.cancelled() else coming.future.result()
