"""The processes of one run: they find each other, compare themselves, and notice who is gone.

Beside JAX's own service every process keeps a connection to process 0. It is there before
JAX connects, so it can name who is missing and who runs other code; and it still speaks when
JAX's client has decided to abort. `session` is the way in; the rest is nothing in a run of
one process.
"""

import contextlib
import ctypes
import hashlib
import itertools
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import big_vit
from big_vit import cluster as cluster_lib
from big_vit.cluster import Cluster
from big_vit.errors import UserError

# What sysexits.h calls EX_TEMPFAIL: the same command, started again on all hosts, goes on.
LOST = 75
# Seconds, each to be set by the environment variable of that name.
TIMEOUTS = {
    'BIG_VIT_START_TIMEOUT': 300.0,  # For all processes to appear.
    'BIG_VIT_PEER_TIMEOUT': 60.0,  # Without a word, a process counts as gone.
    'BIG_VIT_STEP_TIMEOUT': 1800.0,  # Without a finished step; the compilation counts.
    'BIG_VIT_HEARTBEAT': 60.0,  # Between two lines of each process.
}
_MAX_MESSAGE = 1 << 20
_SAY_EVERY = 10.0


def _seconds(name: str) -> float:
    text = os.environ.get(name, '')
    try:
        seconds = float(text or TIMEOUTS[name])
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e9:
        raise UserError(f'{name}={text} is not a number of seconds above 0')
    return seconds


def code_digest() -> str:
    """Equal on hosts that run the same source files of big_vit."""
    total, root = hashlib.sha256(), Path(big_vit.__file__).parent
    for path in sorted(root.rglob('*.py')):
        total.update(path.relative_to(root).as_posix().encode() + b'\0')
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:12]


def versions() -> dict[str, str]:
    """What must be equal on all hosts for their compiled programs to be equal."""
    packages = {name: metadata.version(name) for name in ('jax', 'jaxlib', 'flax')}
    python = sys.version.split()[0]
    return {'python': python, **packages, 'big_vit': big_vit.__version__, 'code': code_digest()}


class Wire:
    """JSON objects, one a line, over a socket; failures of any kind are OSErrors."""

    def __init__(self, sock: socket.socket):
        sock.settimeout(5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._rest, self._lock = sock, b'', threading.Lock()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, **message: Any) -> None:
        with self._lock:
            self._socket.sendall(json.dumps(message).encode() + b'\n')

    def receive(self) -> list[dict[str, Any]]:
        """What has come since the last call; waits at most 5 seconds for more to come."""
        data = self._socket.recv(1 << 16)
        *lines, self._rest = (self._rest + data).split(b'\n')
        if not data or len(self._rest) > _MAX_MESSAGE:
            raise ConnectionError('closed')
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            raise ConnectionError('not big_vit') from None
        if not all(isinstance(message, dict) for message in messages):
            raise ConnectionError('not big_vit')
        return messages

    def close(self) -> None:
        self._socket.close()


def _readable(wires: Iterable[Any], timeout: float) -> list[Any]:
    """Those with something to read, after at most `timeout` seconds."""
    with selectors.DefaultSelector() as selector:
        for wire in wires:
            selector.register(wire, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(timeout)]


def _listed(names: list[str], processes: Iterable[int]) -> str:
    """'process 3 (hostname), process 5 (hostname)'; of many, the first."""
    all_ = sorted(processes)
    shown = [f'process {p} ({names[p]})' if names[p] else f'process {p}' for p in all_[:8]]
    return ', '.join(shown) + (f' and {len(all_) - 8} more' if len(all_) > 8 else '')


def difference(facts: list[dict[str, str]]) -> str | None:
    """How the processes of a run differ, in one line; None where they do not.

    Args:
      facts: of each process, 'hostname' and what must be equal.
    """
    found, names = [], [one['hostname'] for one in facts]
    for key in dict.fromkeys(key for one in facts for key in one if key != 'hostname'):
        values = [one.get(key, 'missing') for one in facts]
        usual = Counter(values).most_common(1)[0][0]
        for other in dict.fromkeys(value for value in values if value != usual):
            who = _listed(names, (p for p, value in enumerate(values) if value == other))
            found.append(f'{key} is {other} on {who} and {usual} on the others')
    if not found:
        return None
    return f'the processes of this run are not alike: {"; ".join(found)}'


def _endpoint(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(':')
    return host.strip('[]'), int(port)


def _listen(address: str) -> socket.socket:
    bind = os.environ.get('JAX_COORDINATOR_BIND_ADDRESS')
    host, port = _endpoint(bind or f'[::]:{_endpoint(address)[1]}')
    if host in ('', '::') and socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # IPv6 may be off.
            return socket.create_server(
                ('::', port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
    if ':' in host and host != '::':
        return socket.create_server((host, port), family=socket.AF_INET6, backlog=1024)
    return socket.create_server(('' if host == '::' else host, port), backlog=1024)


def _hint(cluster: Cluster) -> str:
    return (
        'Was the command started on every host, with the same number of processes? Is port '
        f'{_endpoint(cluster.address)[1]} of the first host open to the others? Another one is '
        'JAX_COORDINATOR_PORT (or in JAX_COORDINATOR_ADDRESS, where that is set); more time is '
        'BIG_VIT_START_TIMEOUT'
    )


def _say(cluster: Cluster, text: str) -> None:
    name = socket.gethostname()
    print(f'process {cluster.process} of {cluster.processes} ({name}) {text}', flush=True)


def call_roll(cluster: Cluster, facts: dict[str, str], seconds: float) -> 'Roll':
    """Process 0: waits until all others are here and compares them.

    Raises:
      UserError: somebody is missing, or different; all who are here get the same message.
    """
    began = said = time.monotonic()
    others = range(1, cluster.processes)
    _say(cluster, f'waits for the {len(others)} other(s) at {cluster.address}, up to {seconds:g} s')
    while True:
        try:
            server = _listen(cluster.address)
            break
        except OSError as error:
            # A run that just ended may hold the port for a moment.
            if time.monotonic() - began > seconds:
                raise UserError(
                    f'process 0 cannot listen at {cluster.address}: {error.strerror}. Does '
                    'another run use that port? JAX_COORDINATOR_PORT is another'
                ) from None
            if time.monotonic() - said >= _SAY_EVERY:
                said = time.monotonic()
                _say(cluster, f'cannot listen at {cluster.address} yet: {error.strerror}')
            time.sleep(0.5)
    known: dict[int, dict[str, str]] = {0: facts}
    wires: dict[int, Wire] = {}
    strangers: list[Wire] = []

    def refuse(message: str) -> NoReturn:
        for wire in wires.values():
            with contextlib.suppress(OSError):
                wire.send(refused=message)
        time.sleep(0.5)  # What is on its way is lost if this end closes first.
        for wire in [*wires.values(), *strangers]:
            wire.close()
        raise UserError(message)

    with server:
        while len(wires) < len(others):
            ready = _readable([*wires.values(), *strangers, server], 0.5)
            for process, wire in list(wires.items()):
                if wire in ready:  # Nothing is expected now but its end.
                    wires.pop(process).close()
                    known.pop(process)
            for wire in [x for x in strangers if x in ready]:
                strangers.remove(wire)
                try:
                    (hello,) = wire.receive()
                    process, count = int(hello['process']), int(hello['processes'])
                    theirs = {str(k): str(v) for k, v in hello['facts'].items()}
                except (OSError, ValueError, KeyError, TypeError, AttributeError):
                    wire.close()  # A health check, a port scan, half a message.
                    continue
                if count != cluster.processes or process not in others or process in wires:
                    wires[-1] = wire
                    refuse(
                        f'a process on {theirs.get("hostname")} says it is process {process} of '
                        f'{count}, but here there are {cluster.processes}'
                        + (' and that one is here already' if process in wires else '')
                    )
                wires[process], known[process] = wire, theirs
            if server in ready:
                with contextlib.suppress(OSError):
                    strangers.append(Wire(server.accept()[0]))
            missing = [p for p in others if p not in wires]
            numbers = ', '.join(map(str, missing[:16])) + (', ...' if len(missing) > 16 else '')
            now = time.monotonic()
            if missing and now - began > seconds:
                refuse(
                    f'after {seconds:g} s process(es) {numbers} of {cluster.processes} have not '
                    f'reached process 0 at {cluster.address}. {_hint(cluster)}'
                )
            if missing and now - said >= _SAY_EVERY:
                said = now
                _say(cluster, f'still waits for process(es) {numbers}')
                for wire in wires.values():
                    with contextlib.suppress(OSError):
                        wire.send(missing=numbers)
        for stranger in strangers:
            stranger.close()
        ordered = [known[p] for p in range(cluster.processes)]
        if wrong := difference(ordered):
            refuse(wrong)
    names = [one['hostname'] for one in ordered]
    for wire in wires.values():
        with contextlib.suppress(OSError):  # The watch will see that it is gone.
            wire.send(names=names)
    return Roll(names, wires)


def answer_roll(cluster: Cluster, facts: dict[str, str], seconds: float) -> 'Roll':
    """Process 1 and above: reports to process 0 and waits for its word.

    Raises:
      UserError: process 0 cannot be reached, or says that somebody is missing or different.
    """
    began = said = time.monotonic()
    wire: Wire | None = None
    why = ''
    _say(cluster, f'waits for the coordinator at {cluster.address}, up to {seconds:g} s')
    try:
        # Process 0 gives up first and can say why.
        while time.monotonic() - began < seconds + (5 if wire else 0):
            if wire is None:
                try:
                    wire = Wire(socket.create_connection(_endpoint(cluster.address), timeout=5))
                    wire.send(process=cluster.process, processes=cluster.processes, facts=facts)
                    why = 'process 0 is there but says nothing yet'
                except OSError as error:
                    wire, why = None, f'nothing answers there yet ({error.strerror or error})'
                    time.sleep(0.2)
            elif _readable([wire], 0.5):
                try:
                    messages = wire.receive()
                except OSError as error:
                    # Also the coordinator of an earlier run, which is about to end.
                    closed = str(error) != 'not big_vit'
                    why = 'process 0 went away' if closed else 'another program listens there'
                    wire.close()
                    wire = None
                    time.sleep(0.5)
                    continue
                for message in messages:
                    if 'refused' in message:
                        raise UserError(str(message['refused']))
                    if 'names' in message:
                        done, wire = wire, None
                        return Roll([str(name) for name in message['names']], {0: done})
                    if 'missing' in message:
                        why = f'process 0 still waits for process(es) {message["missing"]}'
            if time.monotonic() - said >= _SAY_EVERY:
                said = time.monotonic()
                _say(cluster, f'waits: {why}')
    finally:
        if wire is not None:
            wire.close()
    raise UserError(
        f'process {cluster.process} of {cluster.processes} could not join in {seconds:g} s the '
        f'coordinator (process 0) at {cluster.address}: {why}. {_hint(cluster)}'
    )


class Roll:
    """Who is here: the hostname of each process, and the open connections of this one."""

    def __init__(self, names: list[str], wires: dict[int, Wire]):
        self.names, self.wires = names, wires


class Watch:
    """Keeps an eye on the other processes, in a thread, until `finish` or the end of one.

    Whatever ends one process ends all, each with one line; the thread does it itself, for
    the main thread may wait in a collective operation that will never end.
    """

    def __init__(self, cluster: Cluster, roll: Roll):
        self.process, self.processes = cluster.process, cluster.processes
        self.names, self._wires = roll.names, roll.wires
        self.connected = False
        self.saved: Callable[[], list[int]] = list
        now = time.monotonic()
        self._began = self._moved = now
        self._heard = dict.fromkeys(self._wires, now)
        self._steps = [0] * self.processes
        self._numbers = itertools.count()
        self._parts: dict[int, dict[int, Any]] = {}
        self._whole: dict[int, list[Any]] = {}
        self._news = threading.Condition()
        self._closed, self._ending = False, threading.Lock()
        self._limits = {name: _seconds(name) for name in TIMEOUTS}
        self._thread = threading.Thread(target=self._run, name='hosts', daemon=True)
        self._thread.start()

    def progress(self, step: int) -> None:
        """This process has finished a step, or something else that takes long."""
        self._steps[self.process], self._moved = step, time.monotonic()

    def gather(self, value: Any) -> list[Any]:
        """The (JSON) values of all processes, in their order; all must call it alike."""
        number = next(self._numbers)
        if self.process == 0:
            self._add(0, number, value)
        else:
            with contextlib.suppress(OSError):  # The thread finds process 0 gone.
                self._wires[0].send(part=[number, value])
        with self._news:
            self._news.wait_for(lambda: number in self._whole)
            return self._whole.pop(number)

    def _add(self, process: int, number: int, value: Any) -> None:
        with self._news:
            parts = self._parts.setdefault(number, {})
            parts[process] = value
            if len(parts) < self.processes:
                return
            del self._parts[number]
            whole = self._whole[number] = [parts[p] for p in range(self.processes)]
            self._news.notify_all()
        self._tell(whole=[number, whole])

    def _tell(self, **message: Any) -> None:
        for wire in self._wires.values():
            with contextlib.suppress(OSError):
                wire.send(**message)

    def _run(self) -> None:
        try:
            self._loop()
        except Exception:
            traceback.print_exc()
            self.end(1, 'the thread that watches the other processes failed', own=True)

    def _loop(self) -> None:
        beat = said = shared = last = time.monotonic()
        owners = {wire: process for process, wire in self._wires.items()}
        while not self._closed:
            for wire in _readable(owners, 0.25):
                process = owners[wire]
                try:
                    for message in wire.receive():
                        self._handle(process, message)
                except OSError:
                    if self._closed:
                        return
                    self.end(LOST, f'{self._who(process)} is gone: its connection broke')
                self._heard[process] = time.monotonic()
            now = time.monotonic()
            if now - last > 5:
                # This very process stood still, so the silence of others means nothing.
                self._heard = dict.fromkeys(self._heard, now)
            last = now
            if now - beat >= 1:
                beat = now
                self._tell(at=self._steps[self.process])
            if self.process == 0 and now - shared >= 5:
                shared = now
                self._tell(steps=self._steps)
            quiet, limit = now - self._moved, self._limits
            for process, heard in self._heard.items():
                if now - heard > limit['BIG_VIT_PEER_TIMEOUT']:
                    self.end(
                        LOST,
                        f'{self._who(process)} is gone or frozen: not a word for '
                        f'{now - heard:.0f} s (BIG_VIT_PEER_TIMEOUT)',
                    )
            if not self.connected and now - self._began > limit['BIG_VIT_START_TIMEOUT'] + 5:
                self.end(
                    LOST,
                    "all processes are there, but JAX's own connections between them do not come "
                    'about (BIG_VIT_START_TIMEOUT); variables like https_proxy can be why',
                )
            if quiet > limit['BIG_VIT_STEP_TIMEOUT']:
                self.end(
                    LOST,
                    f'no step finished in {quiet:.0f} s (BIG_VIT_STEP_TIMEOUT){self._behind()}',
                )
            if now - said >= limit['BIG_VIT_HEARTBEAT']:
                said = now
                late = self._behind() if quiet > min(limit['BIG_VIT_HEARTBEAT'], 30) / 2 else ''
                me = f'process {self.process} of {self.processes} ({self.names[self.process]})'
                step = self._steps[self.process]
                print(f'{me}: step {step}, {quiet:.0f}s since the last step{late}', flush=True)

    def _handle(self, process: int, message: dict[str, Any]) -> None:
        if 'at' in message:
            self._steps[process] = int(message['at'])
        elif 'part' in message:
            self._add(process, *message['part'])
        elif 'whole' in message:
            with self._news:
                number, whole = message['whole']
                self._whole[number] = whole
                self._news.notify_all()
        elif 'steps' in message:
            mine = self._steps[self.process]
            self._steps[:] = message['steps']
            self._steps[self.process] = mine
        elif 'end' in message:
            self.end(*message['end'])

    def _who(self, process: int) -> str:
        return f'process {process} ({self.names[process]})'

    def _behind(self) -> str:
        most = max(self._steps)
        late = [p for p, step in enumerate(self._steps) if step < most]
        if not late:
            return f'; all processes are at step {most}'
        who = _listed(self.names, late)
        return f'; the furthest is at step {most}, behind it from step {min(self._steps)} on: {who}'

    def _resume(self) -> str:
        found: list[int] = []
        # Storage that hangs must not keep this process from ending.
        asker = threading.Thread(target=lambda: found.extend(self.saved() or []), daemon=True)
        asker.start()
        asker.join(timeout=5)
        start = f'from step {found[-1]}' if found else 'from the start: nothing is saved yet'
        return f'. The same command on all hosts resumes {start}'

    def end(self, status: int, why: str, own: bool = False) -> NoReturn:
        """Ends all processes with this status, each with one line.

        Args:
          own: the reason lies in this process, which the others are then told.
        """
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()
        self._tell(end=[status, f'{self._who(self.process)}: {why}' if own else why])
        if sys.stdout.isatty():
            print('\x1b[?25h', end='')  # A progress bar hides the cursor.
        sys.stdout.flush()
        line = f'error: {why}{self._resume() if status == LOST else ""}\n'
        sys.stderr.flush()
        real = os.dup(2)
        if status == LOST:
            # JAX's client writes a stack trace about the same; this should be the last line.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            time.sleep(0.3)
        os.write(real, line.encode())
        # Closing at once could make the system drop what the others have not read yet.
        time.sleep(1)
        # Handlers at exit would wait for processes that are gone.
        os._exit(status)

    def fail(self, error: BaseException) -> NoReturn:
        """Ends all processes because of an exception in this one."""
        import jax

        causes = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
            causes.append(cause)
        if any(isinstance(one, jax.errors.JaxRuntimeError) for one in causes):
            # Probably only what a lost process looks like from here; the thread will know.
            time.sleep(10)
        if isinstance(error, KeyboardInterrupt):
            self.end(130, 'interrupted', own=True)
        if isinstance(error, UserError):
            self.end(2, str(error), own=True)
        traceback.print_exception(error)
        reason = ' '.join(str(error).split())[:300]
        self.end(1, f'{type(error).__name__}: {reason}', own=True)

    def finish(self) -> None:
        """Waits for all processes to come here, and takes leave of them."""
        self.gather('finished')
        self._closed = True
        self._thread.join()


_watch: Watch | None = None


def _hold_aborts() -> None:
    """Makes an abort in C++ wait six seconds before it ends the process.

    JAX's client aborts when process 0 is lost, in a thread of its own and without asking
    Python. `sleep` as the handler of SIGABRT (which is 6) gives the watch, which sees the
    loss at the same moment, the time to say what happened and to end with a status that
    says so; an abort for another reason comes all the same.
    """
    with contextlib.suppress(OSError, AttributeError):
        c = ctypes.CDLL(None)
        c.signal.argtypes, c.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
        c.signal(signal.SIGABRT, ctypes.cast(c.sleep, ctypes.c_void_p))


@contextlib.contextmanager
def session(mode: str, facts: dict[str, str]) -> Iterator[None]:
    """Around a run: makes this process one of many where there are many.

    Call before the first computation. With several processes it does not return after an
    error: all of them end, with the error of one, and with status 75 if one is lost.

    Args:
      mode: 'auto', 'on' or 'off', as `cluster.detect` takes it.
      facts: name to value of what must be equal in all processes, beside their versions.

    Raises:
      UserError: somebody is missing or different, or there is no cluster to be found.
    """
    global _watch
    cluster = cluster_lib.detect(mode)
    if cluster is None:
        yield
        return
    mine = {'hostname': socket.gethostname(), **versions(), **facts}
    call = call_roll if cluster.process == 0 else answer_roll
    roll = call(cluster, mine, _seconds('BIG_VIT_START_TIMEOUT'))
    import jax

    watch = _watch = Watch(cluster, roll)
    _hold_aborts()
    try:
        jax.distributed.initialize(
            cluster.address,
            cluster.processes,
            cluster.process,
            cluster.local_devices,
            cluster_detection_method='deactivate',
            initialization_timeout=int(_seconds('BIG_VIT_START_TIMEOUT')) + 60,
        )
        lines = _table(cluster, roll.names, mine)
        watch.connected = True
        if cluster.process == 0:
            print('\n'.join(lines), flush=True)
        yield
        watch.finish()
        jax.distributed.shutdown()
    except BaseException as error:
        watch.fail(error)
    finally:
        _watch = None


def _table(cluster: Cluster, names: list[str], mine: dict[str, str]) -> list[str]:
    import jax

    by_name: dict[str, list[int]] = {}
    for process, name in enumerate(names):
        by_name.setdefault(name, []).append(process)
    shown = [f'{name} ({", ".join(map(str, found))})' for name, found in by_name.items()]
    more = f' and {len(shown) - 8} more' if len(shown) > 8 else ''
    owned = Counter((d.process_index, d.device_kind) for d in jax.devices())
    kinds = Counter((count, kind) for (_, kind), count in owned.items())
    devices = ', '.join(
        f'{count} x {kind} on {n} process(es)' for (count, kind), n in kinds.items()
    )
    same = ', '.join(f'{key} {value}' for key, value in mine.items() if key != 'hostname')
    return [
        f'hosts   {cluster.processes} processes ({cluster.launcher}): {", ".join(shown[:8])}{more}',
        f'        each with {same}',
        f'        {devices}',
    ]


def _needed() -> Watch | None:
    import jax

    if _watch is None and jax.process_count() > 1:
        raise UserError('several processes must be started by hosts.session')
    return _watch


def progress(step: int) -> None:
    """Tells the other processes that this one has finished a step."""
    if _watch is not None:
        _watch.progress(step)


def saves_in(saved: Callable[[], list[int]]) -> None:
    """Says how to find the steps that are saved, for the message at a loss."""
    if _watch is not None:
        _watch.saved = saved


def gather(value: Any) -> list[Any]:
    """[value of process 0, of process 1, ...], of values that JSON can hold."""
    watch = _needed()
    return [value] if watch is None else watch.gather(value)


def lead(work: Callable[[], Any]) -> Any:
    """What `work` gives in process 0, which alone does it; a JSON value, in all processes.

    Raises:
      UserError: in all processes, if it does in process 0.
    """
    watch = _needed()
    if watch is None:
        return work()
    outcome: dict[str, Any] = {}
    if watch.process == 0:
        try:
            outcome['result'] = work()
        except UserError as error:
            outcome['error'] = str(error)
    told = watch.gather(outcome)[0]
    if 'error' in told:
        raise UserError(told['error'])
    return told['result']


def check_shared(workdir: str | Path) -> None:
    """Raises UserError unless all processes see the same folder."""
    watch = _needed()
    if watch is None or '://' in str(workdir):
        return
    folder = Path(workdir)

    def put() -> str:
        name = f'.seen-{uuid.uuid4().hex}'
        (folder / name).touch()
        return name

    name, until = lead(put), time.monotonic() + min(30, _seconds('BIG_VIT_START_TIMEOUT'))
    seen = False
    while not seen and time.monotonic() < until:
        # Listing makes a network file system look again; asking for one name need not.
        seen = folder.is_dir() and folder / name in folder.iterdir()
        if not seen:
            time.sleep(0.5)
    blind = [p for p, sees in enumerate(watch.gather(seen)) if not sees]
    if watch.process == 0:
        (folder / name).unlink()
    if blind:
        raise UserError(
            f'--workdir: {workdir} of {_listed(watch.names, [0])} is not the folder that '
            f'{_listed(watch.names, blind)} has under this name: with several processes it must '
            'be on storage that all hosts share'
        )
