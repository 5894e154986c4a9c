"""Run big_vit's commands as a user does: in a process of their own, by default with one device."""

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def environment(devices: int = 1) -> dict[str, str]:
    return {
        **os.environ,
        'JAX_PLATFORMS': 'cpu',
        'JAX_NUM_CPU_DEVICES': str(devices),
        'PYTHONPATH': str(ROOT),
        'COLUMNS': '120',
    }


def arguments(command: str, *args: object) -> list[str]:
    return [sys.executable, '-m', f'big_vit.{command}', *map(str, args)]


def run(
    command: str, *args: object, devices: int = 1, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run `python -m big_vit.COMMAND ARGS` in the repository's root and capture its output."""
    return run_module(f'big_vit.{command}', *args, devices=devices, timeout=timeout)


def run_module(
    module: str, *args: object, devices: int = 1, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ARGS` in the repository's root and capture its output.

    The process is a fork of one that has imported big_vit, which takes more than a second.
    """
    server = _fork_server(_what_imports_read(environment()))
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ('stdout', 'stderr')]
        for path in paths:
            path.touch()
        asked = {
            'module': module,
            'arguments': [*map(str, args)],
            'environment': environment(devices),
            'stdout': str(paths[0]),
            'stderr': str(paths[1]),
        }
        server.stdin.write(json.dumps(asked).encode() + b'\n')
        child = int(server.stdout.readline())
        late = not select.select([server.stdout], [], [], timeout)[0]
        if late:
            os.kill(child, signal.SIGKILL)
        status = int(server.stdout.readline())
        output = [path.read_text() for path in paths]
    if late:
        raise subprocess.TimeoutExpired(module, timeout, *output)
    return subprocess.CompletedProcess(asked['arguments'], status, *output)


def _what_imports_read(variables: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """All of an environment but what each test changes and a fork is told anew."""
    anew = 'PYTEST_CURRENT_TEST', 'JAX_NUM_CPU_DEVICES'
    return tuple(sorted((k, v) for k, v in variables.items() if k not in anew))


@functools.cache
def _fork_server(variables: tuple[tuple[str, str], ...]) -> subprocess.Popen[bytes]:
    """Start the server of an environment; it ends with the tests."""
    server = subprocess.Popen(
        [sys.executable, str(ROOT / 'tests' / 'fork_server.py')],
        cwd=ROOT,
        env=dict(variables),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        server.stdin.close()
    server.wait()
    server.stdout.close()


def script(text: str, *args: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run Python code in a fresh process and capture its output."""
    return subprocess.run(
        [sys.executable, '-c', text, *map(str, args)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def start(command: str, *args: object, devices: int = 1) -> subprocess.Popen[str]:
    """Start a command in the background with its output in a pipe."""
    return subprocess.Popen(
        arguments(command, *args),
        cwd=ROOT,
        env=environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def error_line(result: subprocess.CompletedProcess[str]) -> str:
    """Return the only line of a user error; fails the test on anything else."""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.returncode == 2, result.stdout + result.stderr
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith('error: '), result.stderr
    return lines[0]


def free_port() -> int:
    with socket.create_server(('', 0)) as server:
        return server.getsockname()[1]


class Processes:
    """A distributed run of several processes that meet on a free port of this machine.

    Args:
      each: additional environment variables by process number.
      cwd: working directory of each process; the repository's root by default.
    """

    def __init__(self, command, *args, processes=2, devices=2, each=None, cwd=None, **variables):
        port = free_port()
        self.all, self._logs = [], []
        for process in range(processes):
            cluster = {
                'JAX_COORDINATOR_ADDRESS': f'localhost:{port}',
                'JAX_NUM_PROCESSES': str(processes),
                'JAX_PROCESS_ID': str(process),
            }
            own = (each or {}).get(process, {})
            logs = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
            self._logs.append(logs)
            self.all.append(
                subprocess.Popen(
                    arguments(command, *args) if isinstance(command, str) else command,
                    cwd=cwd[process] if cwd else ROOT,
                    env={**environment(devices), **cluster, **variables, **own},
                    stdout=logs[0],
                    stderr=logs[1],
                )
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.all:
            process.kill()
            process.wait()
        for logs in self._logs:
            for log in logs:
                log.close()

    def wait(self, timeout=120, but=()):
        """Return the results of all processes; kills all of them when the time is up.

        Args:
          but: numbers of processes to kill at the end without waiting for them.
        """
        until = time.monotonic() + timeout
        late = []
        for number, process in enumerate(self.all):
            if number in but:
                continue
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                late.append(number)
        for process in self.all:
            process.kill()
            process.wait()
        results = [
            subprocess.CompletedProcess(process.args, process.returncode, *map(_text, logs))
            for process, logs in zip(self.all, self._logs, strict=True)
        ]
        shown = '\n'.join(f'--- {r.returncode}\n{r.stdout}{r.stderr}' for r in results)
        assert not late, f'after {timeout} s processes {late} have not ended\n{shown}'
        return results


def _text(log):
    log.seek(0)
    return log.read().decode()


def run_many(command, *args, timeout=180, **more):
    """Run several processes, require that all succeed, and return their results."""
    with Processes(command, *args, **more) as processes:
        results = processes.wait(timeout)
    for result in results:
        assert result.returncode == 0, '\n'.join(r.stdout + r.stderr for r in results)
    return results
