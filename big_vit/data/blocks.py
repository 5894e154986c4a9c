"""Parts of remote files on the local disk: fetched in large ranges, dropped when room is needed.

A file is cut into blocks of `BLOCK_BYTES`. A block is fetched once for all threads and processes of
a host: when it is expected (`expect`), or once small requests have read a part of it. What is read
next (`expect_soon`) while its block is not there comes by small requests, many at once.
"""

import collections
import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from big_vit.data import files, network, read_ahead
from big_vit.data.sources.media import say_once
from big_vit.errors import UserError

BLOCK_BYTES = 8 << 20
_FETCHING = 16
# Of a block that nothing announced this share is read by small requests before it is fetched:
# little where all of it will be read, and no loss where examples are read at random.
_ENOUGH = 1 / 16
_DEFAULT_GB = 32.0
# What small requests may read of blocks that are on their way: so many blocks when a run starts and
# all have to come first, then this share of what has come, so that a store that is too slow for
# the order does not get more to do.
_SPARE_BLOCKS, _SPARE = 64, 1 / 16
# After so much of the limit was written, what is there is counted again: other processes write too.
_COUNTED_AGAIN = 1 / 16

# Names of blocks and of kept files; what else lies there is of others, or not complete.
_IS_KEPT = re.compile(r'\d+(\.(?!part$)\w+)?')

_Key = tuple[str, int]


def read_range(file: files.Stored, offset: int, size: int) -> bytes:
    """Read `size` bytes of a file from `offset` on, by way of blocks if it is remote.

    Raises:
      OSError: it cannot be read, or is shorter.
    """
    if file.place.is_local:
        return files.read_range(file.place, offset, size)
    cache = _cache()
    data = cache.ahead.take(read_ahead.Range(_mark(file), offset, size))
    if data is not None:
        network.TRAFFIC.add(misses=1)
        return data
    data = cache.read(file, offset, size)
    network.TRAFFIC.add(hits=data is not None, misses=data is None)
    return files.read_range(file.place, offset, size) if data is None else data


def read_small(file: files.Stored) -> bytes:
    """Read a file that is needed again and again, such as an index, and keep it; OSError."""
    if file.place.is_local:
        return files.read(file.place)
    data = _cache().read(file, 0, file.size, at_once=True)
    return files.read_range(file.place, 0, file.size) if data is None else data


def expect(file: files.Stored, ranges: list[tuple[int, int]]) -> None:
    """Begin to fetch the blocks of (offset, size) of a remote file, which will be read soon."""
    _cache().expect(file, ranges)


def expect_soon(file: files.Stored, ranges: list[tuple[int, int]]) -> None:
    """Begin to read (offset, size) of a remote file, which are read next and in these pieces."""
    _cache().expect_soon(file, ranges)


def later(task: Callable[..., None], *args: Any) -> None:
    """Do what finds out which blocks to expect, in another thread; its errors come when it is read.

    Whoever reads comes to the same error, and can say which example it was.
    """

    def attempt() -> None:
        with contextlib.suppress(Exception):
            task(*args)

    _helpers().submit(attempt)


@functools.cache
def _helpers() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(_FETCHING, thread_name_prefix='expected')


def kept_file(
    file: files.Stored, part: object, name: str, make: Callable[[], bytes]
) -> Path | None:
    """Make a file of a part of another once, for all threads and processes of a host, and keep it.

    Args:
      file: the other; where it changes, the part is made anew.
      part: what else the content depends on.
      name: a number and an ending.
      make: returns the content.

    Returns:
      The file, which may be dropped as blocks are once it is open; None if the disk keeps none.
    """
    return _cache().made(file._replace(stamp=f'{file.stamp}\0{part}'), name, make)


def forget(file: files.Stored) -> None:
    """Drop what is kept of a file, because it is not what it should be."""
    if not file.place.is_local:
        shutil.rmtree(files.cache_folder() / 'blocks' / _mark(file), ignore_errors=True)


def limit_bytes(folder: Path) -> int:
    """Return how many bytes of blocks are kept: $BIG_VIT_CACHE_GB, or what the disk affords.

    Raises:
      UserError: the variable is not a number.
    """
    text = os.environ.get('BIG_VIT_CACHE_GB')
    try:
        chosen = None if text is None else int(float(text) * 1e9)
    except (ValueError, OverflowError):
        chosen = -1
    if chosen is not None:
        if chosen < 0:
            raise UserError(f'BIG_VIT_CACHE_GB={text}: is not a number of gigabytes, such as 100')
        return chosen
    try:
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(there).free
    except (OSError, StopIteration):
        return 0
    return int(min(_DEFAULT_GB * 1e9, free / 2))


def _cache() -> '_Blocks':
    return _opened(files.cache_folder() / 'blocks', os.environ.get('BIG_VIT_CACHE_GB'))


@functools.cache
def _opened(folder: Path, _: str | None) -> '_Blocks':
    return _Blocks(folder, limit_bytes(folder))


class _Blocks:
    """Blocks in files FOLDER/HASH/NUMBER, where the hash is of the remote file and its stamp."""

    def __init__(self, folder: Path, limit: int):
        self._folder, self._limit = folder, limit
        self._lock = threading.Lock()
        self._pool = concurrent.futures.ThreadPoolExecutor(_FETCHING, thread_name_prefix='blocks')
        self._coming: dict[_Key, concurrent.futures.Future[bytes]] = {}
        self.ahead = read_ahead.ReadAhead()
        # Blocks on their way of which small requests may read as much as they like: nobody has
        # said that all of them is needed.
        self._guessed: set[_Key] = set()
        self._spare = _SPARE_BLOCKS * BLOCK_BYTES
        # Bytes that small requests read of blocks that are not here, the latest last.
        self._touched: collections.OrderedDict[_Key, int] = collections.OrderedDict()
        self._written = limit  # So that what is there is counted first.
        # Blocks that were dropped, the latest last; fetched so far, and fetched again.
        self._dropped: collections.OrderedDict[_Key, None] = collections.OrderedDict()
        self._fetched = self._again = 0

    def read(
        self, file: files.Stored, offset: int, size: int, at_once: bool = False
    ) -> bytes | None:
        """Return a range of a file; None if it is not worth the fetching of its blocks."""
        if not self._limit or offset + size > file.size:
            return None
        mark, pieces, at = _mark(file), [], offset
        while at < offset + size:
            number, start = divmod(at, BLOCK_BYTES)
            stop = min(BLOCK_BYTES, start + offset + size - at)
            piece = self._piece(file, (mark, number), start, stop, at_once)
            if piece is None:
                return None
            pieces.append(piece)
            at += stop - start
        return b''.join(pieces)

    def expect(self, file: files.Stored, ranges: list[tuple[int, int]]) -> None:
        for key in sorted({key for piece in ranges for key in _keys(file, *piece)}):
            if self._limit and not self._path(*key).exists():
                with self._lock:
                    self._guessed.discard(key)
                    self._send(file, key)

    def expect_soon(self, file: files.Stored, ranges: list[tuple[int, int]]) -> None:
        for offset, size in ranges:
            missing = [
                key
                for key in _keys(file, offset, size)
                if not self._limit or not self._path(*key).exists()
            ]
            if missing and self._may_read(file, missing, size):
                what = read_ahead.Range(_mark(file), offset, size)
                self.ahead.expect(
                    what, functools.partial(files.read_range, file.place, offset, size)
                )

    def _may_read(self, file: files.Stored, missing: list[_Key], size: int) -> bool:
        """Whether a range whose blocks are missing is worth a request of its own."""
        with self._lock:
            if any(key in self._coming and key not in self._guessed for key in missing):
                may = size <= self._spare
                self._spare -= size * may
                return may
            for key in missing:
                if self._limit and key not in self._coming and self._touch(file, key, size):
                    self._guessed.add(key)
                    self._send(file, key)
        return True

    def _touch(self, file: files.Stored, key: _Key, size: int) -> bool:
        """Count what small requests read of a block; whether it should be fetched now."""
        read = self._touched.pop(key, 0) + size
        if read >= _ENOUGH * min(BLOCK_BYTES, file.size):
            return True
        self._touched[key] = read
        while len(self._touched) > self._limit // BLOCK_BYTES:
            self._touched.popitem(last=False)
        return False

    def _send(self, file: files.Stored, key: _Key) -> None:
        if key not in self._coming:
            self._coming[key] = self._pool.submit(self._fetch, file, key)

    def _path(self, mark: str, number: int) -> Path:
        return self._folder / mark / str(number)

    def _piece(
        self, file: files.Stored, key: _Key, start: int, stop: int, at_once: bool
    ) -> bytes | None:
        kept = self._kept(key, start, stop)
        if kept is not None:
            return kept
        with self._lock:
            coming = self._coming.get(key)
            if coming is not None and coming.cancel():  # It waits behind what is less urgent.
                coming, at_once = None, True
            if coming is None:
                kept = self._kept(key, start, stop)  # It may have come meanwhile.
                if kept is not None:
                    return kept
                if not at_once and not self._touch(file, key, stop - start):
                    return None
                ours = self._coming[key] = concurrent.futures.Future()
                ours.set_running_or_notify_cancel()
        if coming is not None:
            return coming.result()[start:stop]
        try:
            block = self._fetch(file, key)
            ours.set_result(block)
        except BaseException as error:
            ours.set_exception(error)
            raise
        return block[start:stop]

    def _kept(self, key: _Key, start: int, stop: int) -> bytes | None:
        try:
            number = os.open(self._path(*key), os.O_RDONLY)
        except OSError:
            return None
        try:
            os.utime(number)  # The latest use, by which blocks are dropped.
            data = os.pread(number, stop - start, start)
        except OSError:
            return None
        finally:
            os.close(number)
        return data if len(data) == stop - start else None

    def _fetch(self, file: files.Stored, key: _Key) -> bytes:
        """Fetch a block unless another process does, and keep it."""
        start = key[1] * BLOCK_BYTES
        size = min(BLOCK_BYTES, file.size - start)
        path = self._path(*key)
        try:
            with self._claimed(path) as copy:
                kept = self._kept(key, 0, size) if copy is not None else None
                if kept is not None:
                    return kept
                data = files.read_range(file.place, start, size)
                if copy is not None:
                    self._keep(copy, path, data)
            self._tell_again(key)
            return data
        finally:
            with self._lock:
                self._coming.pop(key, None)
                self._guessed.discard(key)
                most = _SPARE_BLOCKS * BLOCK_BYTES
                self._spare = min(most, self._spare + int(size * _SPARE))

    def made(self, file: files.Stored, name: str, make: Callable[[], bytes]) -> Path | None:
        path = self._folder / _mark(file) / name
        if not self._limit:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
            return path
        with self._claimed(path) as copy:
            if copy is not None and not path.exists():
                self._keep(copy, path, make())
                self._tell_again((path.parent.name, int(path.stem)))
        return path if path.exists() else None

    @contextlib.contextmanager
    def _claimed(self, path: Path) -> Iterator[BinaryIO | None]:
        """Open the file that becomes `path`, for this process alone; None if the disk refuses."""
        copy = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            while copy is None:
                copy = _part(path).open('ab', buffering=0)
                fcntl.flock(copy, fcntl.LOCK_EX)  # Let go when the process ends, however it does.
                if not _is_at(copy, _part(path)):  # Who had it before kept or removed it.
                    copy.close()
                    copy = None
        except OSError as error:
            self._refuse(error)
        try:
            yield copy
        finally:
            if copy is not None:
                # Before others may have it: what they write would go with its name.
                with contextlib.suppress(OSError):
                    if _is_at(copy, _part(path)):  # Another had made it, or it cannot be made.
                        _part(path).unlink()
                copy.close()

    def _keep(self, copy: BinaryIO, path: Path, data: bytes) -> None:
        try:
            copy.truncate(0)
            left = memoryview(data)
            while left:
                left = left[copy.write(left) :]
            _part(path).replace(path)
            self._make_room(len(data))
        except OSError as error:
            _part(path).unlink(missing_ok=True)
            self._refuse(error)

    def _refuse(self, error: OSError) -> None:
        if isinstance(error, FileNotFoundError):  # `forget` took the folder away meanwhile.
            return
        self._limit = 0
        say_once(
            f'{self._folder}: cannot be written ({error.strerror}): parts of remote shards are not '
            'kept on this disk: make room, or set BIG_VIT_CACHE to another folder'
        )

    def _make_room(self, written: int) -> None:
        """Drop the blocks that were used least lately, once there are more than the limit."""
        with self._lock:
            self._written += written
            if self._written < _COUNTED_AGAIN * self._limit:
                return
            self._written = 0
        found = []
        for path in self._folder.glob('*/*'):
            if not _IS_KEPT.fullmatch(path.name):
                continue
            try:
                info = path.stat()
            except OSError:  # Another process dropped it.
                continue
            found.append((info.st_mtime, info.st_size, path))
        total = sum(size for _, size, _ in found)
        # What comes before the next count must fit too.
        room = self._limit * (1 - _COUNTED_AGAIN)
        for _, size, path in sorted(found):
            if total <= room:
                break
            path.unlink(missing_ok=True)
            total -= size
            with self._lock:
                self._dropped[path.parent.name, int(path.stem.partition('.')[0])] = None
                while len(self._dropped) > self._limit // BLOCK_BYTES:
                    self._dropped.popitem(last=False)

    def _tell_again(self, key: _Key) -> None:
        """Say that there is too little room, once much was dropped before it was read."""
        with self._lock:
            self._fetched += 1
            self._again += self._dropped.pop(key, 0) is None
            is_much = self._again > 64 and self._again > self._fetched / 8
        if is_much:
            say_once(
                f'{self._folder}: {self._limit / 1e9:.1f} GB are too few: parts of shards are '
                f'fetched again: set BIG_VIT_CACHE_GB to {2 * self._limit / 1e9:.0f} or more, or '
                'data.window to less'
            )


def _part(path: Path) -> Path:
    return path.with_name(f'{path.name}.part')


def _is_at(handle: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _keys(file: files.Stored, offset: int, size: int) -> list[_Key]:
    mark = _mark(file)
    return [(mark, n) for n in range(offset // BLOCK_BYTES, (offset + size - 1) // BLOCK_BYTES + 1)]


def _mark(file: files.Stored) -> str:
    text = f'{file.place}\0{file.size}\0{file.stamp}'
    return hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()[:24]
