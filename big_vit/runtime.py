"""The setting around JAX: start-up, compile cache, stop signals, peak speed of the devices."""

import contextlib
import functools
import glob
import itertools
import json
import os
import re
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from big_vit import signals
from big_vit.errors import UserError

# Peak bfloat16 operations per second of one device (a multiply-add is two), from data sheets.
PEAK_FLOPS = {
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,
    'TPU v5e': 197e12,
    'TPU v5': 459e12,
    'TPU v5p': 459e12,
    'TPU v6 lite': 918e12,
    'TPU v6e': 918e12,
    'TPU7x': 2307e12 / 2,  # A chip is two devices.
    'NVIDIA A100': 312e12,
    'NVIDIA H100': 989e12,
    'NVIDIA H200': 989e12,
}


# Device files of TPUs, of NVIDIA and AMD GPUs, and of GPUs under WSL.
_ACCELERATORS = ('/dev/accel*', '/dev/vfio/*', '/dev/nvidia*', '/dev/kfd', '/dev/dxg')


def start() -> None:
    """Applies the settings that all commands share. Call before the first computation."""
    chosen = os.environ.get('JAX_PLATFORMS') or entry_points(group='jax_plugins')
    if sys.platform == 'linux' and not chosen and not any(map(glob.glob, _ACCELERATORS)):
        # libtpu, installed for planning, would otherwise print five lines about missing TPUs.
        jax.config.update('jax_platforms', 'cpu')
    if not os.environ.get('JAX_COMPILATION_CACHE_DIR'):
        cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'big_vit' / 'xla'
        with contextlib.suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            jax.config.update('jax_compilation_cache_dir', str(cache))


def command(main: Callable[[list[str]], None]) -> None:
    """Runs a command's `main`; a UserError becomes one line on stderr and exit status 2.

    So do Ctrl-C and SIGTERM, with 130 and 143.
    """
    try:
        with signals.raised():
            main(sys.argv[1:])
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(error.status)
    except signals.Interrupted as error:
        sys.exit(signals.say(error.number))
    except (RuntimeError, AssertionError) as error:
        line = _about_devices(error)
        if line is None:
            raise
        print(f'error: {line}', file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # The reader, `head` or a pager, has closed the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _about_devices(error: Exception) -> str | None:
    """What a user can do about an error of JAX's, None where it is none about devices."""
    text, asked = str(error), os.environ.get('JAX_PLATFORMS')
    held = re.search(r'TPU is already in use by process with pid (\d+)|libtpu[ \w-]*lockfile', text)
    # libtpu, asked for where there is no TPU, complains of its lock file.
    absent = 'tpu' in (asked or '') and not any(map(glob.glob, _ACCELERATORS))
    if held and not absent:
        who = f'process {held[1]}' if held[1] else 'another process, or one that was killed'
        return (
            f'the TPUs of this host are held by {who}: end it, and if there is none any more '
            'remove /tmp/libtpu_lockfile'
        )
    if 'RESOURCE_EXHAUSTED' in text:
        return (
            f'out of memory ({text.splitlines()[0][:200]}): lower batch_size, raise accumulation, '
            "or set model.remat='full'; python -m big_vit.plan tells what fits"
        )
    # Of CUDA, where it is not installed, JAX says nothing but that an assertion failed.
    frames = traceback.extract_tb(error.__traceback__)
    if asked and ('initialize backend' in text or frames[-1].filename.endswith('xla_bridge.py')):
        jax.config.update('jax_platforms', '')
        os.environ['JAX_PLATFORMS'] = ''
        start()
        there = ', '.join(sorted({device.platform for device in jax.devices()}))
        return (
            f'JAX_PLATFORMS={asked}: JAX finds no such device here, only {there}: unset it, or '
            'install what JAX needs for it, as in pip install "jax[cuda13]"'
        )
    return None


def check_json(target: str | None) -> None:
    """Raises UserError if a command's `--json` names a file in a folder that does not exist."""
    if target not in (None, '-') and not Path(target).parent.is_dir():
        raise UserError(f'--json: there is no folder {Path(target).parent}')


def write_json(target: str | None, figures: dict[str, Any]) -> None:
    """Writes a command's figures to the target of its `--json`; '-' prints them."""
    text = json.dumps(figures, indent=2)
    if target == '-':
        print(text)
    elif target:
        Path(target).write_text(text + '\n')


def preflight() -> str:
    """One line about the devices, hosts and versions of this run."""
    import flax

    devices = jax.devices()
    return (
        f'{len(devices)} x {devices[0].device_kind} on {jax.process_count()} host(s), '
        f'jax {jax.__version__}, flax {flax.__version__}, python {sys.version.split()[0]}'
    )


@functools.cache
def device_peak_flops() -> tuple[float, str]:
    """Peak speed of one device, as the reference for MFU.

    A device without a data sheet here, such as a CPU, is measured with a few large float32
    matrix products, so that MFU still means "share of what a matrix product reaches on this
    machine".

    Returns:
      (floating-point operations per second, source of the figure).
    """
    kind = jax.devices()[0].device_kind
    for name in sorted(PEAK_FLOPS, key=len, reverse=True):
        if kind.startswith(name):
            return PEAK_FLOPS[name], f'{name} data sheet'
    side, times = 1024, []
    product = jax.jit(lambda a: a @ a)
    a = jax.block_until_ready(jnp.full((side, side), 1e-3))
    for _ in range(6):
        began = time.perf_counter()
        jax.block_until_ready(product(a))
        times.append(time.perf_counter() - began)
    # Fake CPU devices share the machine that the measured product had for itself.
    share = jax.local_device_count() if kind == 'cpu' else 1
    return 2 * side**3 / statistics.median(times[1:]) / share, 'measured matrix product'


# Per process, not per run: JAX's sync points need numbers that never repeat, and a transfer
# consists of two runs.
_sync_points = itertools.count(1)


@contextlib.contextmanager
def stop_signals(on_stop: Callable[[], None] = lambda: None) -> Iterator[Callable[[int], bool]]:
    """Context in which SIGTERM and the first Ctrl-C request a stop instead of killing.

    A second Ctrl-C ends the process at once, also while a program compiles.

    Args:
      on_stop: called in a thread when the first signal arrives.

    Yields:
      A function of the step that returns whether to save and stop at that step. Call it at
      every step: on several hosts it becomes true on all of them at the same step, whichever
      host got the signal.
    """
    received: list[int] = []
    presses: list[int] = []
    multiprocess = jax.process_count() > 1

    def on_signal(number: int, _: object) -> None:
        received.append(number)
        if received.count(signal.SIGINT) > 1:
            raise signals.Interrupted(number)
        if multiprocess:  # JAX broadcasts SIGTERM to all hosts, but not SIGINT.
            os.kill(os.getpid(), signal.SIGTERM)

    def act(number: int) -> None:
        on_stop()
        presses.extend([number] if number == signal.SIGINT else [])
        if len(presses) > 1:  # With several processes the others must hear of it.
            signals.leave_command(number, at_once=not multiprocess)

    def stop(_: int) -> bool:
        if not multiprocess:
            return bool(received)
        reached = multihost_utils.reached_preemption_sync_point(next(_sync_points))
        if reached:  # JAX's handler does not call ours.
            on_stop()
        return reached

    # With several processes JAX's own handler of SIGTERM tells the other hosts.
    handled = (signal.SIGINT,) if multiprocess else (signal.SIGTERM, signal.SIGINT)
    try:
        previous = {n: signal.signal(n, on_signal) for n in handled}
    except ValueError:  # Not in the main thread, as in a notebook's worker: no handlers there.
        yield stop
        return
    try:
        with signals.heard(act):
            yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
