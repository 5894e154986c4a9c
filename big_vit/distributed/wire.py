"""Connections between the processes of a run: JSON lines, and the proof that both belong to it."""

import contextlib
import hmac
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from big_vit.errors import UserError

# A longer line than this comes from something that does not speak this protocol.
_MAX_MESSAGE = 1 << 20
_MAX_GREETING = 1 << 16  # Before the other side has proven that it belongs to the run.


def run_secret() -> bytes:
    """Reads the secret of this run: BIG_VIT_SECRET, or the file that BIG_VIT_SECRET_FILE names.

    Returns:
      The secret; empty if neither variable is set.

    Raises:
      UserError: the file cannot be read, or the secret is short enough to be guessed.
    """
    variable, text = 'BIG_VIT_SECRET', os.environ.get('BIG_VIT_SECRET', '')
    path = os.environ.get('BIG_VIT_SECRET_FILE', '')
    if path and not text:
        variable = f'BIG_VIT_SECRET_FILE={path}'
        try:
            with Path(path).open('rb') as file:
                text = file.read(4096).decode()
        except (OSError, ValueError) as error:
            reason = getattr(error, 'strerror', None) or 'not text'
            raise UserError(f'{variable}: {reason}; `openssl rand -hex 32` makes one') from None
        text = text.strip() or ' '
    if text and len(text.strip()) < 16:
        raise UserError(
            f'{variable}: a secret has at least 16 characters; `openssl rand -hex 32` makes one'
        )
    return os.fsencode(text)


def proof_of(secret: bytes, role: str, nonces: tuple[str, str]) -> str:
    """Hash that shows that its sender knows the secret, of use in this role and exchange only."""
    return hmac.new(secret, '/'.join(['big_vit', role, *nonces]).encode(), 'sha256').hexdigest()


class Wire:
    """A socket that carries JSON objects, one per line; all failures are OSErrors."""

    def __init__(self, sock: socket.socket):
        sock.settimeout(5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._rest, self._lock = sock, b'', threading.Lock()
        self._limit = _MAX_GREETING

    def trust(self) -> None:
        """Accept longer messages from now on: the other side belongs to the run."""
        self._limit = _MAX_MESSAGE

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
        if not data:
            raise ConnectionError('closed')
        if max(map(len, [*lines, self._rest])) > self._limit:
            raise ConnectionError('not big_vit')
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            raise ConnectionError('not big_vit') from None
        if not all(isinstance(message, dict) for message in messages):
            raise ConnectionError('not big_vit')
        return messages

    def await_messages(self) -> list[dict[str, Any]]:
        """Returns the messages that arrive next, at least one; ConnectionError after 5 seconds."""
        deadline = time.monotonic() + 5
        with contextlib.suppress(TimeoutError):
            while time.monotonic() < deadline:
                if messages := self.receive():
                    return messages
        raise ConnectionError('silent')

    def close(self) -> None:
        self._socket.close()


def readable(wires: Iterable[Any], timeout: float) -> list[Any]:
    """Waits up to `timeout` seconds and returns the wires with data to read."""
    with selectors.DefaultSelector() as selector:
        for wire in wires:
            selector.register(wire, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(timeout)]
