"""Runs big_vit's commands as a user does: a fresh process, on one fake device unless told."""

import os
import subprocess
import sys
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
    """`python -m big_vit.COMMAND ARGS` from the repository's root, with what it printed."""
    return subprocess.run(
        arguments(command, *args),
        cwd=ROOT,
        env=environment(devices),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def script(text: str, *args: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Python text in a fresh process, with what it printed."""
    return subprocess.run(
        [sys.executable, '-c', text, *map(str, args)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def start(command: str, *args: object, devices: int = 1) -> subprocess.Popen[str]:
    """The same in the background, with output to a pipe."""
    return subprocess.Popen(
        arguments(command, *args),
        cwd=ROOT,
        env=environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def error_line(result: subprocess.CompletedProcess[str]) -> str:
    """The one line that a user's mistake should end in; fails the test on anything else."""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.returncode == 2, result.stdout + result.stderr
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith('error: '), result.stderr
    return lines[0]
