"""Notices processes of a run that are lost or hang, and ends the others with a message."""

import contextlib
import itertools
import os
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
    readable,
    timeout_seconds,
)
from big_vit.errors import UserError


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
        self._limits = {name: timeout_seconds(name) for name in TIMEOUTS}
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
            for wire in readable(owners, 0.25):
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
        who = listed_processes(self.names, late)
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
