"""Local files, and those of the file systems of fsspec (gs://, s3://, hf://, memory://)."""

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np

from big_vit.data import network
from big_vit.errors import UserError, failure_at

# Packages of the file systems that fsspec does not ship.
_PACKAGES = {
    'gs': 'gcsfs',
    'gcs': 'gcsfs',
    's3': 's3fs',
    'hf': 'huggingface_hub',
    'http': 'aiohttp',
    'https': 'aiohttp',
}

# Else botocore sends ten requests at a time, whoever asks for more.
fsspec.config.conf.setdefault('s3', {}).setdefault('config_kwargs', {}).setdefault(
    'max_pool_connections', network.IN_FLIGHT
)

# Folders and files that systems put beside those of users, thumbnails among them.
_CLUTTER = frozenset(
    (
        *('__MACOSX', '@eaDir', '@tmp', '#recycle', '$RECYCLE.BIN', 'System Volume Information'),
        *('lost+found', 'Thumbs.db', 'desktop.ini'),
    )
)
# No example is larger; a file that grows without end is none.
_MOST_BYTES = 1 << 32


class Place(NamedTuple):
    """A file or folder: its file system, and its path there."""

    system: fsspec.AbstractFileSystem
    path: str

    @property
    def is_local(self) -> bool:
        return isinstance(self.system, fsspec.implementations.local.LocalFileSystem)

    @property
    def name(self) -> str:
        return self.path.rstrip('/').rpartition('/')[2]

    def __str__(self) -> str:
        return self.path if self.is_local else self.system.unstrip_protocol(self.path)

    def __truediv__(self, name: str) -> 'Place':
        return Place(self.system, f'{self.path.rstrip("/")}/{name}')


class Entry(NamedTuple):
    """An entry of a folder: its name, whether it is a folder, and of a file its bytes.

    The stamp is what a file system says of its content or last change: another one is another file.
    """

    name: str
    is_folder: bool
    size: int
    stamp: str = ''


class Stored(NamedTuple):
    """A file as a listing shows it, which is enough to know it again."""

    place: Place
    size: int
    stamp: str


def place(path: str, key: str) -> Place:
    """Resolve a path of the config; `~` and relative paths are local.

    Args:
      path: a local path or a URL.
      key: config key for error messages, such as 'data.path'.

    Raises:
      UserError: the path is empty, or its protocol is not supported.
    """
    if not path:
        raise UserError(f'{key} must be set')
    protocol = path.partition('://')[0] if '://' in path else ''
    try:
        system, inside = fsspec.core.url_to_fs(path if protocol else str(Path(path).expanduser()))
    except (ImportError, ValueError) as error:
        need = _PACKAGES.get(protocol)
        hint = f'pip install {need}' if need else 'use a local path, gs:// or s3://'
        raise UserError(f'{key}: cannot read {path!r} ({error}): {hint}') from error
    return Place(system, inside)


def is_clutter(name: str) -> bool:
    """Whether a file or folder is hidden, or one of those that systems make."""
    return name.startswith('.') or name in _CLUTTER


def entries(folder: Place) -> list[Entry]:
    """List a folder, sorted by name; hidden files and what systems add are left out.

    Raises:
      OSError: it cannot be read.
    """
    if folder.is_local:
        with os.scandir(folder.path) as scan:
            listed = [
                Entry(e.name, True, 0)
                if e.is_dir()
                else Entry(e.name, False, e.stat().st_size, str(e.stat().st_mtime))
                for e in scan
            ]
    else:
        found = network.answer(lambda: folder.system.ls(folder.path, detail=True))
        listed = [
            Entry(_last(e['name']), e['type'] == 'directory', e['size'] or 0, _stamp(e))
            for e in found
            if e['name'].rstrip('/') != folder.path.rstrip('/')
        ]
    return sorted(entry for entry in listed if not is_clutter(entry.name))


def _last(path: str) -> str:
    return path.rstrip('/').rpartition('/')[2]


def _stamp(info: dict[str, Any]) -> str:
    names = ('mtime', 'etag', 'updated', 'ETag', 'LastModified', 'created')
    return str(next(filter(None, map(info.get, names)), ''))


def stored(files: list[Place]) -> list[Stored]:
    """Look up files that exist: of several in a remote folder by one listing of it.

    Raises:
      OSError: a file is not there, or a folder cannot be read.
    """
    folders = {file.path.rpartition('/')[0] for file in files}
    listed: dict[str, dict[str, Any]] = {}
    if len(folders) < len(files) and not files[0].is_local:
        for folder in sorted(folders):
            found = network.answer(functools.partial(files[0].system.ls, folder, detail=True))
            listed |= {entry['name']: entry for entry in found}
    seen = []
    for file in files:
        info = listed.get(file.path) or _info(file)
        seen.append(Stored(file, int(info['size']), _stamp(info)))
    return seen


def _info(file: Place) -> dict[str, Any]:
    ask = functools.partial(file.system.info, file.path)
    return ask() if file.is_local else network.answer(ask)


def size_of(file: Place) -> int:
    """Return the bytes of a file; OSError."""
    return int(_info(file)['size'])


def walk(folder: Place, below: str = '') -> Iterator[Entry]:
    """Yield all files below a folder, in order; their names are paths relative to it."""
    for entry in entries(folder):
        name = below + entry.name
        if entry.is_folder:
            yield from walk(folder / entry.name, name + '/')
        else:
            yield Entry(name, False, entry.size)


@contextlib.contextmanager
def reading(file: Place, key: str) -> Iterator[None]:
    """Turn errors of files and stores into one line that names the key and what to do.

    Raises:
      UserError: a file or folder cannot be read; `Unavailable` where that may pass.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not network.is_of_store(error):
            raise
        raise unread(file, error, f'{key}: ') from error


def unread(file: Place, error: Exception, key: str = '') -> UserError:
    """Return what is told of a file or folder that cannot be read."""
    reason = getattr(error, 'strerror', None) or str(error) or type(error).__name__
    kind = failure_at(file, error) if network.passes(error) else UserError
    reason = ' '.join(str(reason).split())[:200]
    advice = '' if file.is_local else network.advice(error)
    return kind(f'{key}cannot read {file} ({reason}){advice}')


def exists(file: Place) -> bool:
    # Unlike Path, os.path says no to what can be no name.
    if file.is_local:
        return os.path.exists(file.path)  # noqa: PTH110
    return bool(network.answer(lambda: file.system.exists(file.path)))


def is_folder(file: Place) -> bool:
    if file.is_local:
        return os.path.isdir(file.path)  # noqa: PTH112
    return bool(network.answer(lambda: file.system.isdir(file.path)))


def open_regular(path: str, flags: int = os.O_RDONLY) -> int:
    """Open a local file by `os.open`, but no pipe or device, which never ends; OSError."""
    number = os.open(path, flags | os.O_NONBLOCK)  # A pipe would wait for its writer.
    try:
        _check_regular(os.fstat(number), path)
    except OSError:
        os.close(number)
        raise
    return number


def check_regular(path: str | Path) -> None:
    """Raise OSError unless a local path leads to a regular file, for libraries that open it."""
    _check_regular(os.stat(path), str(path))  # noqa: PTH116


def _check_regular(info: os.stat_result, path: str) -> None:
    if not stat.S_ISREG(info.st_mode):
        what = 'a folder' if stat.S_ISDIR(info.st_mode) else 'a pipe or a device'
        raise OSError(errno.EINVAL, f'it is {what}, not a file', path)


def read(file: Place) -> bytes:
    """Read a file; OSError."""
    if not file.is_local:
        return network.answer(lambda: file.system.cat_file(file.path))
    # Hot: Path costs more.
    with open(file.path, 'rb', buffering=0, opener=open_regular) as handle:
        if os.fstat(handle.fileno()).st_size >= _MOST_BYTES:
            raise OSError(errno.EFBIG, 'it has 4 GiB or more', file.path)
        return handle.read()


# Threads share descriptors, because pread has no position; the cache bounds and closes them.
class _Descriptor:
    number = -1  # Until it is open.

    def __init__(self, path: str):
        self.number = open_regular(path)

    def __del__(self):
        if self.number >= 0:
            os.close(self.number)


_descriptor = functools.lru_cache(maxsize=512)(_Descriptor)


def read_range(file: Place, offset: int, size: int) -> bytes:
    """Read `size` bytes of a file from `offset` on.

    Raises:
      OSError: it cannot be read, or is shorter.
    """
    if not file.is_local:
        return network.answer(lambda: _ranged(file, offset, size), size)
    handle = _descriptor(file.path)
    data = os.pread(handle.number, size, offset)
    while 0 < len(data) < size:  # A read returns at most 2 GiB.
        more = os.pread(handle.number, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return _complete(file, offset, size, data)


def _ranged(file: Place, offset: int, size: int) -> bytes:
    data = file.system.cat_file(file.path, start=offset, end=offset + size)
    return _complete(file, offset, size, data)


def _complete(file: Place, offset: int, size: int, data: bytes) -> bytes:
    if len(data) != size:
        text = f'{file} ends at byte {offset + len(data)}, {offset + size} were expected'
        raise network.ShortAnswerError(text)
    return data


def write(file: Place, data: bytes) -> None:
    """Write a file, which others see complete or not at all; OSError."""
    if not file.is_local:
        network.answer(lambda: file.system.pipe_file(file.path, data), len(data))
        return
    target = Path(file.path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix='.', delete=False) as copy:
        try:
            copy.write(data)
            copy.close()
            Path(copy.name).chmod(0o644)
            Path(copy.name).replace(target)
        except OSError:
            Path(copy.name).unlink(missing_ok=True)
            raise


class Ranges(io.RawIOBase):
    """A remote file as libraries read it, whose every read is one request."""

    def __init__(self, file: Stored):
        super().__init__()
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._file.size - self._at)
        wanted = left if size is None or size < 0 else min(size, left)
        data = read_range(self._file.place, self._at, wanted) if wanted else b''
        self._at += len(data)
        return data

    def readall(self) -> bytes:
        return self.read()


def forward(file: Place) -> Callable[[int, int], bytes]:
    """Return a function of (offset, size) that reads a file from its start to its end.

    It reads ahead: little in a local file, where another read is cheap, and much in a remote one,
    where each request is slow. At the end of the file it returns fewer bytes.
    """
    end = size_of(file)
    ahead = 1 << 14 if file.is_local else 1 << 22
    chunk, first = b'', 0

    def take(offset: int, size: int) -> bytes:
        nonlocal chunk, first
        if not first <= offset <= offset + size <= first + len(chunk):
            wanted = min(max(size, ahead), max(0, end - offset))
            chunk, first = read_range(file, offset, wanted) if wanted else b'', offset
        return chunk[offset - first : offset - first + size]

    return take


def cache_folder() -> Path:
    """Return the folder of indices and converted copies: $BIG_VIT_CACHE, or one below ~/.cache."""
    home = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
    return Path(os.environ.get('BIG_VIT_CACHE') or f'{home}/big_vit').expanduser()


def fingerprint(files: list[Place], *more: Any) -> str:
    """Hash the names, sizes and modification times of files, and `more`."""
    return fingerprint_of(stored(files), *more)


def fingerprint_of(files: list[Stored], *more: Any) -> str:
    """Hash what a listing says of files, and `more`."""
    seen = [*more, *([str(file), size, stamp] for file, size, stamp in files)]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:24]


def kept_arrays(
    kind: str, mark: str, make: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Make arrays once, store them in the cache folder, and memory-map them from then on.

    Args:
      kind: name of their folder, such as 'tar'.
      mark: from `fingerprint`; the arrays are made again when it changes.
      make: returns the arrays by name.

    Returns:
      Arrays that take no memory until they are read.
    """
    folder = cache_folder() / kind / mark
    if not folder.exists():
        arrays = make()
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix='.new-'))
            for name, array in arrays.items():
                np.save(temporary / f'{name}.npy', array, allow_pickle=False)
            try:
                temporary.rename(folder)
            except OSError:  # Another process stored the same arrays first.
                shutil.rmtree(temporary)
        except OSError:
            return arrays  # A read-only disk only costs time.
    return {
        file.stem: np.load(file, mmap_mode='r', allow_pickle=False)
        for file in sorted(folder.glob('*.npy'))
    }


def remove(file: Place) -> None:
    """Remove a file, if it is there; OSError."""
    if file.is_local:
        Path(file.path).unlink(missing_ok=True)
        return
    with contextlib.suppress(FileNotFoundError):
        network.answer(lambda: file.system.rm_file(file.path))
