"""Start-up handshake: processes find each other and compare themselves before JAX connects.

Anyone may reach the port of process 0. A process proves that it belongs to the run by a hash of two
random numbers, one from each side, keyed by the secret of the run. Who does not is closed, and can
do nothing else. Without a secret the hash only shows who speaks this protocol.
"""

import contextlib
import hmac
import ipaddress
import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple, NoReturn

from big_vit.distributed.cluster import Cluster
from big_vit.distributed.wire import Wire, proof_of, readable
from big_vit.errors import Unavailable, UserError, printable

# The same command, started again on all hosts, resumes.
LOST = Unavailable.status


# Defaults in seconds, each overridden by the environment variable of that name.
TIMEOUTS = {
    'BIG_VIT_START_TIMEOUT': 300.0,  # Until all processes have appeared.
    'BIG_VIT_PEER_TIMEOUT': 60.0,  # Silence after which a process counts as gone.
    'BIG_VIT_STEP_TIMEOUT': 1800.0,  # Without a finished step; compilation counts.
    'BIG_VIT_HEARTBEAT': 60.0,  # Between two status lines of each process.
}


# Connections that have proven nothing yet: so many, and for so many seconds.
_MAX_STRANGERS = 256
_STRANGER_S = 10.0

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
    return printable(f'the processes of this run are not alike: {"; ".join(differences)}')


def _endpoint(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(':')
    return host.strip('[]'), int(port)


def bind_address(address: str) -> str:
    """Returns the host:port at which process 0 listens, given the address that others use.

    That is JAX_COORDINATOR_BIND_ADDRESS if set, and the address itself where it is a number of this
    machine or `localhost`. Another name may mean another interface on each host, and a number may
    be translated on the way: process 0 then listens on all interfaces, as JAX does.
    """
    if bind := os.environ.get('JAX_COORDINATOR_BIND_ADDRESS'):
        return bind
    host, port = _endpoint(address)
    host = '127.0.0.1' if host == 'localhost' else host
    try:
        six = ipaddress.ip_address(host).version == 6
        with socket.create_server((host, 0), family=socket.AF_INET6 if six else socket.AF_INET):
            return f'[{host}]:{port}' if six else f'{host}:{port}'
    except (ValueError, OSError):
        return f'[::]:{port}'


def _listen(address: str) -> socket.socket:
    host, port = _endpoint(bind_address(address))
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


def _open_server(cluster: Cluster, deadline: float) -> socket.socket:
    """Listens at the address of process 0, once it is free; UserError after the deadline."""
    last_announced = time.monotonic()
    while True:
        try:
            return _listen(cluster.address)
        except OSError as error:
            # A run that has just ended may hold the port for a moment.
            if time.monotonic() > deadline:
                raise UserError(
                    f'process 0 cannot listen at {cluster.address}: {error.strerror}. Does '
                    'another run use that port? JAX_COORDINATOR_PORT is another'
                ) from None
            if time.monotonic() - last_announced >= _ANNOUNCE_EVERY_S:
                last_announced = time.monotonic()
                _announce(cluster, f'cannot listen at {cluster.address} yet: {error.strerror}')
            time.sleep(0.5)


class _Stranger(NamedTuple):
    """A connection that has not proven to belong to the run, open since a monotonic time."""

    wire: Wire
    address: str
    nonce: str
    since: float


class _Hello(NamedTuple):
    """The first message of another process, proven to come from one that knows the secret."""

    process: int
    processes: int
    facts: dict[str, str]
    nonce: str


def _read_hello(stranger: _Stranger, secret: bytes) -> _Hello | None:
    """Reads the first message of a connection, None while it is incomplete.

    Raises:
      ConnectionError: it is no such message, or does not prove that it belongs to the run.
    """
    messages = stranger.wire.receive()
    if not messages:
        return None
    message = messages[0]
    facts, nonce, proof = (message.get(key) for key in ('facts', 'nonce', 'proof'))
    process, processes = (message.get(key) for key in ('process', 'processes'))
    # JSON also has 1e999 and numbers of any length.
    if not isinstance(process, int) or not isinstance(processes, int):
        raise ConnectionError('not big_vit')
    if not (isinstance(facts, dict) and isinstance(nonce, str) and isinstance(proof, str)):
        raise ConnectionError('not big_vit')
    if not all(isinstance(fact, str) for fact in facts.values()) or 'hostname' not in facts:
        raise ConnectionError('not big_vit')
    expected = proof_of(secret, 'joins', (stranger.nonce, nonce))
    if not hmac.compare_digest(expected.encode(), proof.encode()):
        stranger.wire.send(unknown=True)
        raise ConnectionError('does not know the secret of this run')
    return _Hello(process, processes, facts, nonce)


class _Reception:
    """Process 0 at the start: connections that others open, and the processes they turn out to be.

    Attributes:
      known: facts by process.
      wires: connection by process.
    """

    def __init__(self, cluster: Cluster, facts: dict[str, str], secret: bytes):
        self._cluster, self._secret = cluster, secret
        self.known: dict[int, dict[str, str]] = {0: facts}
        self.wires: dict[int, Wire] = {}
        self._strangers: list[_Stranger] = []

    def missing(self) -> list[int]:
        return [p for p in range(1, self._cluster.processes) if p not in self.wires]

    def receive(self, server: socket.socket, timeout: float) -> None:
        """Handles what arrives within `timeout` seconds, and forgets who has left."""
        wires = [*self.wires.values(), *(stranger.wire for stranger in self._strangers)]
        ready = readable([*wires, server], timeout)
        for process, wire in list(self.wires.items()):
            if wire in ready:  # No message is due now, so this is the end of the connection.
                self.wires.pop(process).close()
                self.known.pop(process)
        now = time.monotonic()
        for stranger in list(self._strangers):
            if stranger.wire in ready:
                self._greet(stranger)
            elif now - stranger.since > _STRANGER_S:
                self._close(stranger)
        if server in ready:
            with contextlib.suppress(OSError):
                sock, address = server.accept()
                wire, nonce = Wire(sock), secrets.token_hex(16)
                self._strangers.append(_Stranger(wire, printable(str(address[0])), nonce, now))
                wire.send(big_vit=1, nonce=nonce)
        # The oldest goes: one of ours answers within milliseconds, and tries again.
        for stranger in self._strangers[: -_MAX_STRANGERS - self._cluster.processes]:
            self._close(stranger)

    def _close(self, stranger: _Stranger) -> None:
        self._strangers.remove(stranger)
        stranger.wire.close()

    def _greet(self, stranger: _Stranger) -> None:
        """Admits a process of this run; closes anything else, such as a health check."""
        try:
            hello = _read_hello(stranger, self._secret)
            if hello is None:
                return
            proof = proof_of(self._secret, 'admits', (stranger.nonce, hello.nonce))
            stranger.wire.send(proof=proof)
        except OSError as error:
            if 'secret' in str(error):
                _announce(self._cluster, f'closed a connection from {stranger.address}: it {error}')
            self._close(stranger)
            return
        if problem := self._contradiction(hello):
            if self._secret:
                # One of ours for certain, and it can never fit: nobody needs to wait for it.
                self._strangers.remove(stranger)
                self.wires[-1] = stranger.wire  # Of no process, so that `refuse` reaches it too.
                self.refuse(problem)
            _announce(self._cluster, f'closed a connection from {stranger.address}: {problem}')
            with contextlib.suppress(OSError):
                stranger.wire.send(refused=problem)
            self._close(stranger)
            return
        self._strangers.remove(stranger)
        stranger.wire.trust()
        self.wires[hello.process], self.known[hello.process] = stranger.wire, hello.facts

    def _contradiction(self, hello: _Hello) -> str | None:
        """Describes how a process cannot be one of this run; None if it can."""
        processes, here = self._cluster.processes, hello.process in self.wires
        if hello.processes == processes and 0 < hello.process < processes and not here:
            return None
        return (
            f'a process on {printable(hello.facts["hostname"])[:100]} says it is process '
            f'{hello.process:.10g} of {hello.processes:.10g}, but here there are {processes}'
            + (' and that one is here already' if here else '')
        )

    def tell(self, **message: Any) -> None:
        """Sends a message to all processes that are here."""
        for wire in self.wires.values():
            with contextlib.suppress(OSError):  # The watch will notice if it is gone.
                wire.send(**message)

    def refuse(self, message: str, error: type[UserError] = UserError) -> NoReturn:
        """Ends this process and all that are here with the same message."""
        self.tell(refused=message, status=error.status)
        time.sleep(0.5)  # Closing at once could drop messages that are still in flight.
        for wire in self.wires.values():
            wire.close()
        self.close_strangers()
        raise error(message)

    def close_strangers(self) -> None:
        for stranger in list(self._strangers):
            self._close(stranger)


def call_roll(
    cluster: Cluster, facts: dict[str, str], seconds: float, secret: bytes = b''
) -> 'Roll':
    """Runs in process 0: waits until all others have reported, and compares them.

    Raises:
      Unavailable: a process has not come; all that are connected get the same message.
      UserError: a process differs; as above.
    """
    began = last_announced = time.monotonic()
    address, others = cluster.address, cluster.processes - 1
    _announce(cluster, f'waits for the {others} other(s) at {address}, up to {seconds:g} s')
    with _open_server(cluster, began + seconds) as server:
        reception = _Reception(cluster, facts, secret)
        while missing := reception.missing():
            reception.receive(server, 0.5)
            numbers = ', '.join(map(str, missing[:16])) + (', ...' if len(missing) > 16 else '')
            now = time.monotonic()
            if now - began > seconds and reception.missing():
                reception.refuse(
                    f'after {seconds:g} s process(es) {numbers} of {cluster.processes} have not '
                    f'reached process 0 at {address}. {_hint(cluster)}',
                    Unavailable,
                )
            if now - last_announced >= _ANNOUNCE_EVERY_S:
                last_announced = now
                _announce(cluster, f'still waits for process(es) {numbers}')
                reception.tell(missing=numbers)
        reception.close_strangers()
        ordered = [reception.known[p] for p in range(cluster.processes)]
        if problem := difference(ordered):
            reception.refuse(problem)
    names = [printable(process_facts['hostname']) for process_facts in ordered]
    reception.tell(names=names)
    return Roll(names, reception.wires)


def _join(
    cluster: Cluster, facts: dict[str, str], secret: bytes
) -> tuple[Wire, list[dict[str, Any]]]:
    """Connects to process 0; each proves to the other that it belongs to the run.

    Returns:
      The connection, and the messages that came right behind the proof.

    Raises:
      OSError: nothing listens there, or it is not process 0 of this run.
    """
    wire = Wire(socket.create_connection(_endpoint(cluster.address), timeout=5))
    try:
        nonce, theirs = secrets.token_hex(16), str(wire.await_messages()[0].get('nonce'))
        proof = proof_of(secret, 'joins', (theirs, nonce))
        about = {'process': cluster.process, 'processes': cluster.processes, 'facts': facts}
        wire.send(**about, nonce=nonce, proof=proof)
        answer, *rest = wire.await_messages()
        expected = proof_of(secret, 'admits', (theirs, nonce))
        if not hmac.compare_digest(expected.encode(), str(answer.get('proof')).encode()):
            raise ConnectionError('unknown' if 'unknown' in answer else 'not big_vit')
    except BaseException:
        wire.close()
        raise
    wire.trust()
    return wire, rest


_REASONS = {
    'closed': 'process 0 went away',
    'not big_vit': 'another program listens there',
    'silent': 'process 0 is there but says nothing yet',
    'unknown': 'its secret is another one (BIG_VIT_SECRET, BIG_VIT_SECRET_FILE)',
}


def answer_roll(
    cluster: Cluster, facts: dict[str, str], seconds: float, secret: bytes = b''
) -> 'Roll':
    """Runs in the other processes: reports to process 0 and waits for its verdict.

    Raises:
      Unavailable: process 0 is unreachable, or reports that a process is missing.
      UserError: it reports that a process differs.
    """
    began = last_announced = time.monotonic()
    wire: Wire | None = None
    why = ''
    _announce(cluster, f'waits for the coordinator at {cluster.address}, up to {seconds:g} s')
    try:
        # Five seconds longer than process 0, which gives up first and can say why.
        while time.monotonic() - began < seconds + (5 if wire else 0):
            try:
                messages: list[dict[str, Any]] = []
                if wire is None:
                    wire, messages = _join(cluster, facts, secret)
                    why = _REASONS['silent']
                elif readable([wire], 0.5):
                    messages = wire.receive()
                for message in messages:
                    if 'refused' in message:
                        error = Unavailable if message.get('status') == LOST else UserError
                        raise error(str(message['refused']))
                    if 'names' in message:
                        joined, wire = wire, None
                        return Roll([printable(str(n)) for n in message['names']], {0: joined})
                    if 'missing' in message:
                        why = f'process 0 still waits for process(es) {message["missing"]}'
            except OSError as error:
                # This may also be the coordinator of an earlier run, which is about to end.
                text = error.strerror or str(error)
                why = _REASONS.get(text, f'nothing answers there yet ({text})')
                if wire is not None:
                    wire.close()
                wire = None
                time.sleep(0.2)
            if time.monotonic() - last_announced >= _ANNOUNCE_EVERY_S:
                last_announced = time.monotonic()
                _announce(cluster, f'waits: {why}')
    finally:
        if wire is not None:
            wire.close()
    raise Unavailable(
        f'process {cluster.process} of {cluster.processes} could not join in {seconds:g} s the '
        f'coordinator (process 0) at {cluster.address}: {why}. {_hint(cluster)}'
    )


class Roll:
    """Participants: hostnames of all processes, and the open connections of this one."""

    def __init__(self, names: list[str], wires: dict[int, Wire]):
        self.names, self.wires = names, wires
