"""Notices processes that are lost or hang, and ends all the others with a message."""

import contextlib
import itertools
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from big_vit.distributed.cluster import Cluster
from big_vit.distributed.roll_call import (
    LOST,
    TIMEOUTS,
    Roll,
    listed_processes,
    timeout_seconds,
)
from big_vit.distributed.wire import readable
from big_vit.errors import UserError, printable

# How XLA and its libraries say that a peer, or JAX's service in process 0, cannot be reached.
_UNREACHABLE = re.compile(
    r'UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|gloo|nccl', re.IGNORECASE
)
_OF_THIS_PROCESS = re.compile(r'RESOURCE_EXHAUSTED|INVALID_ARGUMENT|out of memory', re.IGNORECASE)


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error of JAX is how the loss of another process looks from this one."""
    import jax

    text = str(error)
    return (
        isinstance(error, jax.errors.JaxRuntimeError)
        and bool(_UNREACHABLE.search(text))
        and not _OF_THIS_PROCESS.search(text)
    )


class Watch:
    """Watches the other processes in a thread, until `finish` or until one of them ends.

    Whatever ends one process ends all of them, each with one line. The thread itself exits the
    process, because the main thread may be stuck in a collective that will never complete.
    """

    def __init__(self, cluster: Cluster, roll: Roll):
        self.process, self.processes = cluster.process, cluster.processes
        self.names, self._wires = roll.names, roll.wires
        self.connected = False
        self.saved: Callable[[], list[int]] = list
        now = time.monotonic()
        self._began = self._last_progress = now
        self._heard = dict.fromkeys(self._wires, now)
        self._steps = [0] * self.processes
        self._next_number = itertools.count()
        self._parts: dict[int, dict[int, Any]] = {}
        self._complete: dict[int, list[Any]] = {}
        self._arrived = threading.Condition()
        self._closed, self._ending = False, threading.Lock()
        self._limits = {name: timeout_seconds(name) for name in TIMEOUTS}
        self._thread = threading.Thread(target=self._run, name='hosts', daemon=True)
        self._thread.start()

    def progress(self, step: int) -> None:
        """Records that this process has finished a step, or something else that takes long."""
        self._steps[self.process], self._last_progress = step, time.monotonic()

    def gather(self, value: Any) -> list[Any]:
        """Gathers a JSON value from every process, in process order; all must call it alike."""
        number = next(self._next_number)
        if self.process == 0:
            self._add(0, number, value)
        else:
            with contextlib.suppress(OSError):  # The thread notices if process 0 is gone.
                self._wires[0].send(part=[number, value])
        with self._arrived:
            self._arrived.wait_for(lambda: number in self._complete)
            return self._complete.pop(number)

    def _add(self, process: int, number: int, value: Any) -> None:
        with self._arrived:
            parts = self._parts.setdefault(number, {})
            parts[process] = value
            if len(parts) < self.processes:
                return
            del self._parts[number]
            values = self._complete[number] = [parts[p] for p in range(self.processes)]
            self._arrived.notify_all()
        self._broadcast(whole=[number, values])

    def _broadcast(self, **message: Any) -> None:
        for wire in self._wires.values():
            with contextlib.suppress(OSError):
                wire.send(**message)

    def _run(self) -> None:
        try:
            self._loop()
        except Exception:
            traceback.print_exc()
            self.end(1, 'the thread that watches the other processes failed', local=True)

    def _loop(self) -> None:
        last_beat = last_status = last_shared = last_round = time.monotonic()
        owners = {wire: process for process, wire in self._wires.items()}
        while not self._closed:
            for wire in readable(owners, 0.25):
                process = owners[wire]
                try:
                    for message in wire.receive():
                        self._handle(process, message)
                except OSError:
                    if self._closed:
                        return
                    self.end(LOST, f'{self._label(process)} is gone: its connection broke')
                except (ValueError, TypeError, KeyError, IndexError, OverflowError):
                    self.end(LOST, f'{self._label(process)} sent what no big_vit sends')
                self._heard[process] = time.monotonic()
            now = time.monotonic()
            if now - last_round > 5:
                # This process itself was suspended, so the silence of others means nothing.
                self._heard = dict.fromkeys(self._heard, now)
            last_round = now
            # Heartbeats keep PEER_TIMEOUT from expiring; process 0 passes on everyone's steps.
            if now - last_beat >= 1:
                last_beat = now
                self._broadcast(at=self._steps[self.process])
            if self.process == 0 and now - last_shared >= 5:
                last_shared = now
                self._broadcast(steps=self._steps)
            quiet, limit = now - self._last_progress, self._limits
            for process, heard in self._heard.items():
                if now - heard > limit['BIG_VIT_PEER_TIMEOUT']:
                    self.end(
                        LOST,
                        f'{self._label(process)} is gone or frozen: not a word for '
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
                    f'no step finished in {quiet:.0f} s (BIG_VIT_STEP_TIMEOUT){self._stragglers()}',
                )
            if now - last_status >= limit['BIG_VIT_HEARTBEAT']:
                last_status = now
                late = self._stragglers() if quiet > min(limit['BIG_VIT_HEARTBEAT'], 30) / 2 else ''
                me = f'process {self.process} of {self.processes} ({self.names[self.process]})'
                step = self._steps[self.process]
                print(f'{me}: step {step}, {quiet:.0f}s since the last step{late}', flush=True)

    def _handle(self, process: int, message: dict[str, Any]) -> None:
        if 'at' in message:
            self._steps[process] = int(message['at'])
        elif 'part' in message:
            self._add(process, *message['part'])
        elif 'whole' in message:
            with self._arrived:
                number, values = message['whole']
                self._complete[number] = values
                self._arrived.notify_all()
        elif 'steps' in message:
            mine = self._steps[self.process]
            self._steps[:] = message['steps']
            self._steps[self.process] = mine
        elif 'end' in message:
            self.end(*message['end'])

    def _label(self, process: int) -> str:
        return f'process {process} ({self.names[process]})'

    def _stragglers(self) -> str:
        most = max(self._steps)
        late = [p for p, step in enumerate(self._steps) if step < most]
        if not late:
            return f'; all processes are at step {most}'
        who = listed_processes(self.names, late)
        return f'; the furthest is at step {most}, behind it from step {min(self._steps)} on: {who}'

    def _resume_hint(self) -> str:
        """Sentence for the message that says from which step the run would resume."""
        steps: list[int] = []
        # Hanging storage must not keep this process from ending.
        lister = threading.Thread(target=lambda: steps.extend(self.saved() or []), daemon=True)
        lister.start()
        lister.join(timeout=5)
        start = f'from step {steps[-1]}' if steps else 'from the start: nothing is saved yet'
        return f'. The same command on all hosts resumes {start}'

    def end(self, status: int, why: str, local: bool = False) -> NoReturn:
        """Ends all processes with this status, each printing one line.

        Args:
          status: exit status.
          why: reason, for the message.
          local: True if the reason lies in this process, which the others then name.
        """
        if not self._ending.acquire(blocking=False):
            # Another thread is already ending this process: only wait for that.
            threading.Event().wait()
        self._broadcast(end=[status, f'{self._label(self.process)}: {why}' if local else why])
        if sys.stdout.isatty():
            print('\x1b[?25h', end='')  # A progress bar hides the cursor.
        sys.stdout.flush()
        line = f'error: {printable(why)}{self._resume_hint() if status == LOST else ""}\n'
        sys.stderr.flush()
        real = os.dup(2)
        if status == LOST:
            # JAX's client prints a stack trace about the same loss; ours must be the last line.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            time.sleep(0.3)
        os.write(real, line.encode())
        # Closing at once could make the system drop data that the others have not read yet.
        time.sleep(1)
        # `sys.exit` would run exit handlers that wait for processes that are gone.
        os._exit(status)

    def fail(self, error: BaseException) -> NoReturn:
        """Ends all processes because of an exception in this one; does not return."""
        import jax

        causes = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
            causes.append(cause)
        if any(isinstance(link, jax.errors.JaxRuntimeError) for link in causes):
            # Most likely how a lost process looks from here. The thread knows better and will
            # end this process itself within that time.
            time.sleep(10)
        if isinstance(error, KeyboardInterrupt):
            self.end(130, 'interrupted', local=True)
        if isinstance(error, UserError):
            self.end(error.status, str(error), local=True)
        if lost := next((link for link in causes if is_lost_peer(link)), None):
            reason = ' '.join(str(lost).split())[:300]
            self.end(LOST, f'the processes lost each other: {reason}', local=True)
        traceback.print_exception(error)
        reason = ' '.join(str(error).split())[:300]
        self.end(1, f'{type(error).__name__}: {reason}', local=True)

    def finish(self) -> None:
        """Waits until all processes get here, then stops watching."""
        self.gather('finished')
        self._closed = True
        self._thread.join()
