"""Stores in memory that count what is asked of them, and fail as they are told to."""

import collections
import contextlib
import threading
import time

from fsspec.implementations.memory import MemoryFileSystem

from big_vit.data import blocks
from big_vit.errors import UserError


class Store(MemoryFileSystem):
    """A file system at counted://, of which everything that is asked is known.

    Attributes:
      asked: (operation, path, bytes) of each request, in order.
      faults: called with (operation, path, number of earlier requests) before each request; may
        raise or sleep, or return a number of bytes to cut the answer to.
    """

    protocol = 'counted'
    cachable = False
    store: dict = {}  # noqa: RUF012
    pseudo_dirs: list = ['']  # noqa: RUF012
    asked: list = []  # noqa: RUF012
    faults = None
    _lock = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path):
        path = str(path).removeprefix('counted://').removeprefix('memory://')
        return '/' + path.strip('/')

    @classmethod
    def reset(cls):
        cls.store.clear()
        cls.pseudo_dirs[:] = ['']
        cls.asked.clear()
        cls.faults = None

    @classmethod
    def counts(cls):
        return collections.Counter(operation for operation, _, _ in cls.asked)

    @classmethod
    def bytes_of(cls, ending=''):
        return sum(
            size for name, path, size in cls.asked if name == 'get' and path.endswith(ending)
        )

    def _ask(self, operation, path):
        with self._lock:
            number = len(self.asked)
            self.asked.append((operation, path, 0))
        return number, type(self).faults(operation, path, number) if type(self).faults else None

    def ls(self, path, detail=True, **kwargs):
        self._ask('list', self._strip_protocol(path))
        return super().ls(path, detail=detail, **kwargs)

    def info(self, path, **kwargs):
        self._ask('info', self._strip_protocol(path))
        return super().info(path, **kwargs)

    def exists(self, path, **kwargs):
        self._ask('exists', self._strip_protocol(path))
        return super().exists(path, **kwargs)

    def isdir(self, path):
        self._ask('isdir', self._strip_protocol(path))
        path = self._strip_protocol(path)
        return any(name.startswith(path + '/') for name in self.store)

    def cat_file(self, path, start=None, end=None, **kwargs):
        path = self._strip_protocol(path)
        number, cut = self._ask('get', path)
        if path not in self.store:
            raise FileNotFoundError(path)
        data = self.store[path].getvalue()[start:end]
        data = data if cut is None else data[:cut]
        self.asked[number] = ('get', path, len(data))
        return data

    def pipe_file(self, path, value, mode='overwrite', **kwargs):
        number, _ = self._ask('put', self._strip_protocol(path))
        asked = len(self.asked)
        super().pipe_file(path, value, mode=mode, **kwargs)
        del self.asked[asked:]
        self.asked[number] = ('put', self._strip_protocol(path), len(value))


def end_reading_ahead():
    """Wait for what is announced, or drop it; else its requests would be those of the next test."""
    blocks._helpers().shutdown(cancel_futures=True)  # First, for they announce more.
    blocks._helpers.cache_clear()
    with contextlib.suppress(UserError):  # Of a limit that is none.
        kept = blocks._cache()
        for pool in (kept._pool, kept.ahead._pool):
            pool.shutdown(cancel_futures=True)
    blocks._opened.cache_clear()


def slowly(seconds):
    """A fault that makes requests of these numbers slow: a function of the number of a request."""

    def fault(operation, path, number):
        time.sleep(seconds(number))

    return fault
