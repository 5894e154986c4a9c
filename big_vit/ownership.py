"""Ownership of folders: one process at a time writes into a run, and FOLDER/owner.json says which.

On file systems the kernel locks that file for its owner, so it is free again the moment its owner
ends, however that happens. Where locks do not reach (other hosts, object stores), a number in the
file tells: the owner raises it every BEAT_S seconds for as long as it lives.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from etils import epath

from big_vit import signals, storage
from big_vit.errors import UserError, failure_at

FILE = 'owner.json'
BEAT_S = 10.0
# An owner elsewhere whose number stays the same for this long is gone.
SILENCE_S = 60.0  # As long as network file systems show what a file held before.
# Locks of an owner that is gone are free within this time, also on network file systems.
PATIENCE_S = 120.0
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

Record = dict[str, Any]


class _File(Protocol):
    """The file of a folder's owner."""

    def take(self, mine: Record) -> tuple[bool, Record | None]:
        """Try to get the file; return (whether we have it, what is in it if that can be read)."""

    def read(self) -> Record | None: ...

    def write(self, mine: Record) -> None: ...

    def evict(self) -> None:
        """Remove the file of an owner that is gone."""

    def give_up(self) -> None:
        """Leave the file to whom it belongs."""

    def release(self) -> None: ...


def _parsed(text: str | bytes) -> Record | None:
    with contextlib.suppress(ValueError, RecursionError):
        record = json.loads(text)
        if isinstance(record, dict) and {'pid', 'id', 'beat'} <= record.keys():
            return record if isinstance(record['pid'], int) else None
    return None


class _LockedFile:
    """The file on a file system, locked by the kernel while it is open.

    POSIX locks: other than those of `flock`, loader processes that outlive their run do not
    inherit them, and network file systems know them.
    """

    def __init__(self, folder: epath.Path):
        self._path, self._descriptor = Path(folder) / FILE, -1

    def take(self, mine: Record) -> tuple[bool, Record | None]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                return False, self.read()
        try:
            is_there = self._path.stat().st_ino == os.fstat(self._descriptor).st_ino
        except FileNotFoundError:
            is_there = False
        if not is_there:  # Its last owner removed it while we opened it.
            self.give_up()
            return self.take(mine)
        return True, self.read()

    def read(self) -> Record | None:
        return _parsed(os.pread(self._descriptor, 4096, 0))

    def write(self, mine: Record) -> None:
        text = json.dumps(mine).encode()
        os.ftruncate(self._descriptor, os.pwrite(self._descriptor, text, 0))

    def evict(self) -> None:
        pass

    def give_up(self) -> None:
        os.close(self._descriptor)

    def release(self) -> None:
        self._path.unlink(missing_ok=True)  # While locked: whoever waits for it looks again.
        os.close(self._descriptor)


class _StoredFile:
    """The file in an object store, which creates an object for one process alone."""

    def __init__(self, folder: epath.Path):
        self._path = folder / FILE

    def take(self, mine: Record) -> tuple[bool, Record | None]:
        return storage.create_object(self._path, json.dumps(mine)), self.read()

    def read(self) -> Record | None:
        try:
            return _parsed(self._path.read_text())
        except FileNotFoundError:
            return None

    def write(self, mine: Record) -> None:
        self._path.write_text(json.dumps(mine))

    def evict(self) -> None:
        self._path.unlink(missing_ok=True)

    def give_up(self) -> None:
        pass

    def release(self) -> None:
        self._path.unlink(missing_ok=True)


def _machine() -> str:
    """Name what numbers processes: this start of this host, and this container on it."""
    try:
        boot = Path('/proc/sys/kernel/random/boot_id').read_text().strip()
        return f'{boot} {Path("/proc/self/ns/pid").readlink()}'
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """When a process of this machine started, in ticks; None if it has ended."""
    try:
        fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
        return None if fields[0] in 'ZX' else fields[19]
    except FileNotFoundError:
        if Path('/proc/self/stat').exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ''


def _me() -> Record:
    return {
        'host': socket.gethostname(),
        'pid': os.getpid(),
        'since': time.strftime('%Y-%m-%d %H:%M:%S %z'),
        'machine': _machine(),
        'started': _started(os.getpid()),
        'id': uuid.uuid4().hex,
        'beat': 0,
        'ending': False,
    }


def _is_gone(record: Record, file: _File, folder: epath.Path) -> bool:
    """Whether an owner has ended; of one elsewhere, after listening to it for some seconds."""
    if record.get('machine') == _machine():
        started = _started(record['pid'])
        return started is None or started != record.get('started')
    print(
        f'owner   {folder} was written by process {record["pid"]} on {record.get("host")}: '
        f'listening for {SILENCE_S:.0f} s whether it lives',
        flush=True,
    )
    until = time.monotonic() + SILENCE_S
    while time.monotonic() < until:
        time.sleep(min(1.0, BEAT_S))
        now = file.read()
        if now is not None and (now.get('id'), now.get('beat')) != (record['id'], record['beat']):
            return False
    return True


def _refusal(folder: epath.Path, record: Record | None, key: str) -> UserError:
    if record is None:
        return UserError(
            f'{key}: {folder} belongs to another process, which {folder / FILE} does not tell: '
            'remove that file if there is none'
        )
    elsewhere = record.get('machine') != _machine()
    hint = f'; if it is certainly gone, remove {folder / FILE}' if elsewhere else ''
    return UserError(
        f'{key}: {folder} belongs to process {record["pid"]} on {record.get("host")} since '
        f'{record.get("since")}, which is still running: end it, or use another folder{hint}'
    )


def _claim(file: _File, mine: Record, folder: epath.Path, key: str) -> None:
    """Make this process the owner, once a former one that is ending has ended.

    Raises:
      UserError: the folder belongs to another process.
    """
    until, said = time.monotonic() + PATIENCE_S, False
    while True:
        have, record = file.take(mine)
        if have and (record is None or record['id'] == mine['id']):
            break
        gone = record is not None and _is_gone(record, file, folder)
        if have and gone:
            break
        file.give_up()
        ending = record is not None and not gone and record.get('ending')
        if gone:
            file.evict()
        elif (record is not None and not ending) or (time.monotonic() > until and not ending):
            raise _refusal(folder, record, key)
        if ending and not said and record is not None:
            print(f'owner   waits for process {record["pid"]}, which is ending', flush=True)
            said = True
        time.sleep(0.1)
    file.write(mine)


class _Owned:
    """A folder of this process: its file, and the thread that keeps the file fresh."""

    def __init__(
        self,
        folder: epath.Path,
        file: _File,
        mine: Record,
        created: list[epath.Path],
        was_empty: bool,
    ):
        self.folder, self.began, self.taken_over = folder, False, ''
        self._created, self._was_empty = created, was_empty
        self._file, self._mine = file, mine
        self._wake, self._over = threading.Event(), False
        self._thread = threading.Thread(target=self._beat, name='owner', daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while True:
            self._wake.wait(BEAT_S)
            if self._over:
                return
            self._wake.clear()
            with contextlib.suppress(Exception):  # What fails now is tried again soon.
                record = self._file.read()
                if record is not None and record['id'] != self._mine['id']:
                    self.taken_over = f'process {record["pid"]} on {record.get("host")}'
                    return
                self._mine['beat'] += 1
                self._file.write(self._mine)

    def say_ending(self) -> None:
        self._mine['ending'] = True
        self._wake.set()

    def end(self, failed: bool) -> None:
        """Leave the folder; if it failed before it began, as it was before."""
        remove = failed and self._was_empty and not self.began and not self.taken_over
        with contextlib.suppress(Exception):
            for path in self.folder.iterdir() if remove else ():
                if path.name != FILE:
                    path.rmtree() if path.is_dir() else path.unlink()
        with contextlib.suppress(Exception):
            self._release()
        for path in self._created if remove else ():
            with contextlib.suppress(OSError):  # Not empty: it is another's by now.
                path.rmdir()

    def _release(self) -> None:
        self._over = True
        self._wake.set()
        self._thread.join()
        if self.taken_over:
            self._file.give_up()
        else:
            self._file.release()


_owned: dict[str, _Owned] = {}


@contextlib.contextmanager
def own(place: epath.Path, key: str = '--workdir') -> Iterator[None]:
    """Context in which this process alone writes into a folder.

    Of a start that fails before `began` was called nothing stays in a folder that was not there
    before, or was empty.

    Args:
      key: flag that error messages name.

    Raises:
      UserError: another process, which lives, is the owner, or the folder cannot be written.
    """
    folder = storage.absolute(place)
    if (inner := _owned.get(os.fspath(folder))) is not None:
        raise _refusal(folder, inner._mine, key)
    try:
        # A store has no folders, and may refuse to say which buckets there are.
        above = (folder, *folder.parents) if storage.is_local(folder) else ()
        created = [path for path in above if not path.exists()]
        was_empty = not folder.exists() or not any(p.name != FILE for p in folder.iterdir())
        file = _LockedFile(folder) if storage.is_local(folder) else _StoredFile(folder)
        mine = _me()
        _claim(file, mine, folder, key)
    except UserError:
        raise
    except Exception as error:  # Errors of object stores share no base class.
        if storage.is_local(folder) and not isinstance(error, OSError):
            raise
        why = storage.reason(error)
        raise failure_at(place, error)(f'{key}: cannot write to {place}: {why}') from error
    owned = _Owned(folder, file, mine, created, was_empty)
    _owned[os.fspath(folder)] = owned
    failed = True
    try:
        yield
        failed = False
    finally:
        if _owned.pop(os.fspath(folder), None) is not None:
            owned.end(failed)


def _abandon() -> None:
    """Leave all folders of a process that ends at once, inner ones first."""
    while _owned:
        _, owned = _owned.popitem()
        owned.end(failed=True)


signals.last_acts.append(_abandon)


def began() -> None:
    """Say that this process has made something: what is in its folders stays."""
    for owned in _owned.values():
        owned.began = True


def ending() -> None:
    """Say that this process will end soon: a successor waits for it instead of giving up."""
    for owned in _owned.values():
        owned.say_ending()


def check() -> None:
    """Raise UserError if another process has taken over a folder of this one."""
    for owned in _owned.values():
        if owned.taken_over:
            raise UserError(
                f'{owned.folder} belongs to {owned.taken_over} by now: this process was not heard '
                f'of for {SILENCE_S:.0f} s, and ends without saving'
            )
