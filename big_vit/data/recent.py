"""Values that were used lately, made when they are first needed."""

import collections
import concurrent.futures
import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar('K', bound=Hashable)
V = TypeVar('V')


class Recent(Generic[K, V]):
    """A function whose latest values are kept; each is made once, whatever the number of threads.

    Args:
      make: returns the value of a key, and its bytes.
      limit_bytes: of all values that are kept; the latest is kept in any case.
    """

    def __init__(self, make: Callable[[K], tuple[V, int]], limit_bytes: int):
        self._make, self._limit = make, limit_bytes
        self._lock = threading.Lock()
        self._values: collections.OrderedDict[K, tuple[concurrent.futures.Future[V], int]] = (
            collections.OrderedDict()
        )
        self._bytes = 0

    def __call__(self, key: K) -> V:
        with self._lock:
            kept = self._values.get(key)
            if kept is None:
                future: concurrent.futures.Future[V] = concurrent.futures.Future()
                self._values[key] = future, 0
            else:
                self._values.move_to_end(key)
        if kept is not None:
            return kept[0].result()
        try:
            value, size = self._make(key)
        except BaseException as error:
            future.set_exception(error)
            with self._lock:
                self._values.pop(key, None)  # The next call tries again.
            raise
        future.set_result(value)
        with self._lock:
            if key in self._values:
                self._values[key] = future, size
                self._bytes += size
            while self._bytes > self._limit and len(self._values) > 1:
                _, (_, dropped) = self._values.popitem(last=False)
                self._bytes -= dropped
        return value
