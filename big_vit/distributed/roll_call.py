"""Start-up handshake: processes find each other and compare themselves before JAX connects."""

import contextlib
import json
import os
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, NoReturn

from big_vit.distributed.cluster import Cluster
from big_vit.errors import UserError

# EX_TEMPFAIL of sysexits.h: the same command, started again on all hosts, resumes.
LOST = 75


# Defaults in seconds, each overridden by the environment variable of that name.
TIMEOUTS = {
    'BIG_VIT_START_TIMEOUT': 300.0,  # Until all processes have appeared.
    'BIG_VIT_PEER_TIMEOUT': 60.0,  # Silence after which a process counts as gone.
    'BIG_VIT_STEP_TIMEOUT': 1800.0,  # Without a finished step; compilation counts.
    'BIG_VIT_HEARTBEAT': 60.0,  # Between two status lines of each process.
}


# A longer line than this comes from something that does not speak this protocol.
_MAX_MESSAGE = 1 << 20

# Seconds between two status lines while waiting for other processes.
_ANNOUNCE_EVERY_S = 10.0


def timeout_seconds(name: str) -> float:
    """Reads a timeout from the environment, or its default; UserError if it is not positive."""
    text = os.environ.get(name, '')
    try:
        seconds = float(text or TIMEOUTS[name])
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e9:
        raise UserError(f'{name}={text} is not a number of seconds above 0')
    return seconds


class Wire:
    """A socket that carries JSON objects, one per line; all failures are OSErrors."""

    def __init__(self, sock: socket.socket):
        sock.settimeout(5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._rest, self._lock = sock, b'', threading.Lock()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, **message: Any) -> None:
        """Sends one message; safe to call from several threads."""
        with self._lock:
            self._socket.sendall(json.dumps(message).encode() + b'\n')

    def receive(self) -> list[dict[str, Any]]:
        """Returns complete messages that have arrived; blocks up to 5 seconds for data."""
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


def readable(wires: Iterable[Any], timeout: float) -> list[Any]:
    """Waits up to `timeout` seconds and returns the wires with data to read."""
    with selectors.DefaultSelector() as selector:
        for wire in wires:
            selector.register(wire, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(timeout)]


def listed_processes(names: list[str], processes: Iterable[int]) -> str:
    """Formats processes as 'process 3 (hostname), process 5 (hostname)'; at most eight."""
    ordered = sorted(processes)
    shown = [f'process {p} ({names[p]})' if names[p] else f'process {p}' for p in ordered[:8]]
    return ', '.join(shown) + (f' and {len(ordered) - 8} more' if len(ordered) > 8 else '')


def difference(facts: list[dict[str, str]]) -> str | None:
    """Describes how the processes of a run differ, in one line; None if they do not.

    Args:
      facts: per process, its 'hostname' and the values that must be equal.
    """
    differences, names = [], [process_facts['hostname'] for process_facts in facts]
    for key in dict.fromkeys(
        key for process_facts in facts for key in process_facts if key != 'hostname'
    ):
        values = [process_facts.get(key, 'missing') for process_facts in facts]
        usual = Counter(values).most_common(1)[0][0]
        for other in dict.fromkeys(value for value in values if value != usual):
            who = listed_processes(names, (p for p, value in enumerate(values) if value == other))
            differences.append(f'{key} is {other} on {who} and {usual} on the others')
    if not differences:
        return None
    return f'the processes of this run are not alike: {"; ".join(differences)}'


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


def _announce(cluster: Cluster, text: str) -> None:
    name = socket.gethostname()
    print(f'process {cluster.process} of {cluster.processes} ({name}) {text}', flush=True)


def call_roll(cluster: Cluster, facts: dict[str, str], seconds: float) -> 'Roll':
    """Runs in process 0: waits until all others have reported, and compares them.

    Raises:
      UserError: a process is missing or differs; all that are connected get the same message.
    """
    began = last_announced = time.monotonic()
    others = range(1, cluster.processes)
    _announce(
        cluster, f'waits for the {len(others)} other(s) at {cluster.address}, up to {seconds:g} s'
    )
    while True:
        try:
            server = _listen(cluster.address)
            break
        except OSError as error:
            # A run that has just ended may hold the port for a moment.
            if time.monotonic() - began > seconds:
                raise UserError(
                    f'process 0 cannot listen at {cluster.address}: {error.strerror}. Does '
                    'another run use that port? JAX_COORDINATOR_PORT is another'
                ) from None
            if time.monotonic() - last_announced >= _ANNOUNCE_EVERY_S:
                last_announced = time.monotonic()
                _announce(cluster, f'cannot listen at {cluster.address} yet: {error.strerror}')
            time.sleep(0.5)
    known: dict[int, dict[str, str]] = {0: facts}
    wires: dict[int, Wire] = {}
    strangers: list[Wire] = []

    def refuse(message: str) -> NoReturn:
        for wire in wires.values():
            with contextlib.suppress(OSError):
                wire.send(refused=message)
        time.sleep(0.5)  # Closing at once could drop messages that are still in flight.
        for wire in [*wires.values(), *strangers]:
            wire.close()
        raise UserError(message)

    with server:
        while len(wires) < len(others):
            ready = readable([*wires.values(), *strangers, server], 0.5)
            for process, wire in list(wires.items()):
                if wire in ready:  # No message is due now, so this is the end of the connection.
                    wires.pop(process).close()
                    known.pop(process)
            for wire in [x for x in strangers if x in ready]:
                strangers.remove(wire)
                try:
                    (hello,) = wire.receive()
                    process, count = int(hello['process']), int(hello['processes'])
                    theirs = {str(k): str(v) for k, v in hello['facts'].items()}
                except (OSError, ValueError, KeyError, TypeError, AttributeError):
                    wire.close()  # A health check, a port scan, or half a message.
                    continue
                if count != cluster.processes or process not in others or process in wires:
                    wires[-1] = wire  # Under a key of no process, so that `refuse` reaches it too.
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
            if missing and now - last_announced >= _ANNOUNCE_EVERY_S:
                last_announced = now
                _announce(cluster, f'still waits for process(es) {numbers}')
                for wire in wires.values():
                    with contextlib.suppress(OSError):
                        wire.send(missing=numbers)
        for stranger in strangers:
            stranger.close()
        ordered = [known[p] for p in range(cluster.processes)]
        if problem := difference(ordered):
            refuse(problem)
    names = [process_facts['hostname'] for process_facts in ordered]
    for wire in wires.values():
        with contextlib.suppress(OSError):  # The watch will notice if it is gone.
            wire.send(names=names)
    return Roll(names, wires)


def answer_roll(cluster: Cluster, facts: dict[str, str], seconds: float) -> 'Roll':
    """Runs in the other processes: reports to process 0 and waits for its verdict.

    Raises:
      UserError: process 0 is unreachable, or reports that a process is missing or differs.
    """
    began = last_announced = time.monotonic()
    wire: Wire | None = None
    why = ''
    _announce(cluster, f'waits for the coordinator at {cluster.address}, up to {seconds:g} s')
    try:
        # Five seconds longer than process 0, which gives up first and can say why.
        while time.monotonic() - began < seconds + (5 if wire else 0):
            if wire is None:
                try:
                    wire = Wire(socket.create_connection(_endpoint(cluster.address), timeout=5))
                    wire.send(process=cluster.process, processes=cluster.processes, facts=facts)
                    why = 'process 0 is there but says nothing yet'
                except OSError as error:
                    wire, why = None, f'nothing answers there yet ({error.strerror or error})'
                    time.sleep(0.2)
            elif readable([wire], 0.5):
                try:
                    messages = wire.receive()
                except OSError as error:
                    # This may also be the coordinator of an earlier run, which is about to end.
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
                        joined, wire = wire, None
                        return Roll([str(name) for name in message['names']], {0: joined})
                    if 'missing' in message:
                        why = f'process 0 still waits for process(es) {message["missing"]}'
            if time.monotonic() - last_announced >= _ANNOUNCE_EVERY_S:
                last_announced = time.monotonic()
                _announce(cluster, f'waits: {why}')
    finally:
        if wire is not None:
            wire.close()
    raise UserError(
        f'process {cluster.process} of {cluster.processes} could not join in {seconds:g} s the '
        f'coordinator (process 0) at {cluster.address}: {why}. {_hint(cluster)}'
    )


class Roll:
    """Participants: hostnames of all processes, and the open connections of this one."""

    def __init__(self, names: list[str], wires: dict[int, Wire]):
        self.names, self.wires = names, wires
