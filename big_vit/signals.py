"""What SIGTERM and Ctrl-C do to a command: one line, and the status a shell knows, 143 or 130.

Python runs its handlers between two of its own instructions, so not while a program compiles. A
thread hears of signals at once, and ends the process where that takes too long.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

NUMBERS = (signal.SIGTERM, signal.SIGINT)
# How long a command may take to put things in order before it ends.
GRACE_S = 3.0

# What is done before the process ends at once; none may need the main thread.
last_acts: list[Callable[[], None]] = []
_said = False
_is_command = False


class Interrupted(KeyboardInterrupt):
    """SIGTERM or Ctrl-C, raised in the main thread."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def say(number: int) -> int:
    """Print the one line, once; return the exit status."""
    global _said
    if not _said:
        _said = True
        with contextlib.suppress(OSError, ValueError):
            # A progress bar hides the cursor.
            cursor = '\x1b[?25h' if sys.stderr.isatty() else ''
            word = 'interrupted' if number == signal.SIGINT else 'terminated'
            os.write(2, f'{cursor}error: {word}\n'.encode())
    return 128 + number


def leave_command(number: int, at_once: bool) -> None:
    """End the process if it is a command of ours, not where someone else's program calls us."""
    if _is_command:
        (leave if at_once else leave_soon)(number)


def leave(number: int) -> NoReturn:
    """End the process now, whatever it is doing."""
    # Whoever reads our output may have stopped, and so may a file system.
    for act in (*last_acts, lambda: sys.stdout.flush()):
        thread = threading.Thread(target=act, daemon=True)
        thread.start()
        thread.join(timeout=1)
    with contextlib.suppress(Exception):
        for loader in multiprocessing.active_children():
            loader.kill()
    os._exit(say(number))


def leave_soon(number: int) -> None:
    """End the process after a moment, if it has not ended by itself."""
    timer = threading.Timer(GRACE_S, leave, (number,))
    timer.daemon = True
    timer.start()


def handle(handler: Callable[[int, FrameType | None], object]) -> None:
    """Install a handler of both signals, but not where they are ignored, as by nohup.

    Outside of the main thread, where Python allows no handlers, nothing happens.
    """
    with contextlib.suppress(ValueError):
        for number in NUMBERS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, handler)


@contextlib.contextmanager
def heard(act: Callable[[int], None]) -> Iterator[None]:
    """Context in which a thread calls `act` with the number of a handled signal, at once.

    Raises:
      ValueError: this is not the main thread.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def listen() -> None:
        while numbers := os.read(reader, 64):
            for number in numbers:
                act(number)

    thread = threading.Thread(target=listen, name='signals', daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        thread.join()
        os.close(reader)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Context of a command: both signals raise `Interrupted`, a second one ends it at once.

    Whatever else is raised after a signal, for example by C++ that was interrupted, counts as that.
    """
    global _is_command
    received: list[int] = []

    def act(number: int) -> None:
        if number in NUMBERS:
            received.append(number)
            (leave_soon if len(received) == 1 else leave)(number)

    def on_signal(number: int, _: FrameType | None) -> None:
        raise Interrupted(number)

    def unraisable(lost: Any) -> None:
        # Raised in a destructor it is lost, and the process ends when its time is up.
        if lost.exc_type is not Interrupted:
            sys.__unraisablehook__(lost)

    handle(on_signal)
    sys.unraisablehook = unraisable
    _is_command = True
    try:
        with heard(act):
            yield
    except BaseException:
        if received:
            raise Interrupted(received[0]) from None
        raise
    finally:
        sys.unraisablehook = sys.__unraisablehook__
        handle(lambda number, _: leave(number))


def _forget_in_a_fork() -> None:
    """Keep signals of a loader process from being heard as its parent's."""
    with contextlib.suppress(ValueError):
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_in_a_fork)
if '--multiprocessing-fork' in sys.orig_argv:  # How Python starts a process of its own.
    # A terminal sends Ctrl-C to loader processes too, which end when the run has saved.
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
