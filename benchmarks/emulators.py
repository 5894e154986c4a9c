"""Emulators of object stores on this machine, behind a proxy that delays, limits and fails.

The stores are moto's S3 server and gcp-storage-emulator, whose bucket is called `bucket`.
"""

import contextlib
import http.client
import http.server
import importlib.util
import itertools
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

PACKAGES = {'s3': ('moto', 's3fs'), 'gs': ('gcp_storage_emulator', 'gcsfs')}
_SERVE_GS = """
import sys
from gcp_storage_emulator.server import create_server
create_server('localhost', int(sys.argv[1]), in_memory=True, default_bucket='bucket').start()
sys.stdin.read()
"""
_CHUNK = 1 << 18
# Headers that the proxy writes itself.
_OWN = ('content-length', 'transfer-encoding', 'connection', 'date')

# 'refused' by status 503, 'lost' without an answer, or late by so many seconds.
Fault = str | float


class Link:
    """What lies between a store and whoever reads it.

    Args:
      fault: what becomes of the n-th GET of data, counted from 0; None is nothing.
      latency_s: seconds before each answer.
      bytes_per_s: of all connections together.
    """

    def __init__(
        self,
        fault: Callable[[int], Fault | None] = lambda number: None,
        latency_s: float = 0.0,
        bytes_per_s: float = float('inf'),
    ):
        self.fault, self.latency_s, self.bytes_per_s = fault, latency_s, bytes_per_s
        self._lock, self._free = threading.Lock(), 0.0
        self._numbers = itertools.count()
        self.done: list[Fault] = []

    def next_fault(self) -> Fault | None:
        fault = self.fault(next(self._numbers))
        if fault is not None:
            self.done.append(fault)
        return fault

    def pass_through(self, size: int) -> None:
        """Wait until so many bytes have gone through."""
        with self._lock:
            self._free = max(self._free, time.monotonic()) + size / self.bytes_per_s
            free = self._free
        time.sleep(max(0.0, free - time.monotonic()))


def in_turn(number: int) -> Fault | None:
    """Fail at every fifth request, in turn in one of three ways."""
    return ('refused', 'lost', 1.0)[number // 5 % 3] if number % 5 == 4 else None


def at_random(errors: float, slow: float, slow_s: float) -> Callable[[int], Fault | None]:
    """Return faults of these shares of requests: half of `errors` are refused, half lost."""

    def fault(number: int) -> Fault | None:
        draw = random.Random(number).random()
        if draw < errors:
            return 'refused' if draw < errors / 2 else 'lost'
        return slow_s if draw < errors + slow else None

    return fault


class Proxy(http.server.BaseHTTPRequestHandler):
    """Passes requests on to an emulator by way of a link.

    Attributes:
      upstream: port of the emulator.
      copies: objects that were read, from which ranges are answered, so that an emulator is asked
        for each only once; None asks it each time. Objects must not change then.
    """

    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True
    upstream = 0
    link = Link()
    copies: dict[str, tuple[list[tuple[str, str]], bytes]] | None = None

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        is_data = self.command == 'GET' and (
            'Range' in self.headers or (self.copies is not None and '?' not in self.path)
        )
        fault = self.link.next_fault() if is_data else None
        if fault == 'lost':
            self.close_connection = True
            return
        if fault == 'refused':
            self._send(503, [], b'', 0)
            return
        time.sleep(self.link.latency_s + (fault if isinstance(fault, float) else 0.0))
        if is_data and self.copies is not None:
            self._send_copy()
        else:
            self._send(*self._asked(body, dict(self.headers)))

    def _asked(
        self, body: bytes, headers: dict[str, str]
    ) -> tuple[int, list[tuple[str, str]], bytes, int]:
        """Return what the emulator answers: (status, headers, data, length)."""
        with contextlib.closing(http.client.HTTPConnection('localhost', self.upstream)) as upstream:
            upstream.request(self.command, self.path, body, headers)
            got = upstream.getresponse()
            data = got.read()
        size = got.getheader('Content-Length') if self.command == 'HEAD' else len(data)
        kept = [(name, value) for name, value in got.getheaders() if name.lower() not in _OWN]
        return got.status, kept, data, int(size or 0)

    def _send_copy(self) -> None:
        assert self.copies is not None
        if self.path not in self.copies:
            headers = {name: value for name, value in self.headers.items() if name != 'Range'}
            status, kept, data, size = self._asked(b'', headers)
            if status != 200:
                self._send(status, kept, data, size)
                return
            # Checksums are of the whole.
            kept = [(name, value) for name, value in kept if 'checksum' not in name.lower()]
            self.copies[self.path] = kept, data
        kept, data = self.copies[self.path]
        if 'Range' not in self.headers:
            self._send(200, kept, data, len(data))
            return
        first, last = self.headers['Range'].removeprefix('bytes=').split('-')
        start, stop = int(first), min(int(last or len(data) - 1), len(data) - 1) + 1
        kept = [*kept, ('Content-Range', f'bytes {start}-{stop - 1}/{len(data)}')]
        self._send(206, kept, memoryview(data)[start:stop], stop - start)

    def _send(
        self, status: int, headers: list[tuple[str, str]], data: bytes | memoryview, size: int
    ) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header('Content-Length', str(size))
        self.end_headers()
        for at in range(0, len(data), _CHUNK):
            piece = data[at : at + _CHUNK]
            self.link.pass_through(len(piece))
            try:
                self.wfile.write(piece)
            except OSError:  # Whoever asked has gone: another answer came first.
                self.close_connection = True
                return

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_PATCH = answer


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    # Of a shorter queue the kernel drops connections, which are tried again a second later.
    request_queue_size = 128


def lacking(kind: str) -> tuple[str, ...]:
    """Return the packages that an emulator of a kind, 's3' or 'gs', lacks here."""
    return tuple(name for name in PACKAGES[kind] if not importlib.util.find_spec(name))


def environment(port: int) -> dict[str, str]:
    """Return the variables by which clients find the emulators at a port of this machine."""
    url = f'http://localhost:{port}'
    return {
        'AWS_ENDPOINT_URL': url,
        'AWS_ACCESS_KEY_ID': 'a',
        'AWS_SECRET_ACCESS_KEY': 'b',
        'AWS_DEFAULT_REGION': 'us-east-1',
        'STORAGE_EMULATOR_HOST': url,
        'GOOGLE_CLOUD_PROJECT': 'none',
        'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
    }


@contextlib.contextmanager
def emulator(kind: str) -> Iterator[int]:
    """Run an emulator, with a bucket of the name `bucket`; yields its port.

    Raises:
      TimeoutError: it does not answer.
    """
    port = _free_port()
    command = {'s3': ['-m', 'moto.server', '-p'], 'gs': ['-c', _SERVE_GS]}[kind]
    quiet = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}
    # It ends with its input, if this process cannot end it.
    server = subprocess.Popen([sys.executable, *command, str(port)], stdin=subprocess.PIPE, **quiet)
    try:
        deadline = time.monotonic() + 120
        while not _is_answering(port):
            if time.monotonic() > deadline or server.poll() is not None:
                raise TimeoutError(f'the emulator of {kind}:// does not answer')
            time.sleep(0.1)
        if kind == 's3':
            client = http.client.HTTPConnection('localhost', port)
            client.request('PUT', '/bucket')
            client.getresponse().read()
            client.close()
        yield port
    finally:
        server.kill()
        server.wait()


@contextlib.contextmanager
def proxy(upstream: int, link: Link, keeps: bool = False) -> Iterator[type[Proxy]]:
    """Serve an emulator's port by way of a link; yields the handler's class, with its `port`."""
    settings = {'upstream': upstream, 'link': link, 'copies': {} if keeps else None}
    handler = type('Handler', (Proxy,), settings)
    server = _Server(('localhost', 0), handler)
    handler.port = server.server_port  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield handler
    finally:
        server.shutdown()
        server.server_close()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(('localhost', 0))
        return int(free.getsockname()[1])


def _is_answering(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(('localhost', port)) == 0
