"""The processes of one run: how they find each other, compare notes and notice losses.

Besides JAX's own service, every process keeps a connection to process 0. It exists before JAX
connects, so it can name processes that are missing or run other code, and it still works when
JAX's client has decided to abort. Enter through `session`. In a run of one process everything
else here does nothing.
"""

import contextlib
import ctypes
import functools
import hashlib
import itertools
import signal
import socket
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import big_vit
from big_vit.distributed import cluster as cluster_lib
from big_vit.distributed.cluster import Cluster
from big_vit.distributed.roll_call import (
    answer_roll,
    bind_address,
    call_roll,
    listed_processes,
    timeout_seconds,
)
from big_vit.distributed.watchdog import Watch
from big_vit.distributed.wire import run_secret
from big_vit.errors import Unavailable, UserError


def code_digest() -> str:
    """Digest of big_vit's source files, equal on hosts that run the same code."""
    total, root = hashlib.sha256(), Path(big_vit.__file__).parent
    for path in sorted(root.rglob('*.py')):
        total.update(path.relative_to(root).as_posix().encode() + b'\0')
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:12]


def versions() -> dict[str, str]:
    """Versions that must agree on all hosts for their compiled programs to be equal."""
    packages = {name: metadata.version(name) for name in ('jax', 'jaxlib', 'flax')}
    python = sys.version.split()[0]
    return {'python': python, **packages, 'big_vit': big_vit.__version__, 'code': code_digest()}


_watch: Watch | None = None


def _hold_aborts() -> None:
    """Delays an abort in C++ by six seconds.

    When process 0 is lost, JAX's client aborts in a thread of its own without asking Python.
    Installing libc's `sleep` as the handler of SIGABRT (signal number 6, hence `sleep(6)`) gives
    the watch, which sees the loss at the same moment, time to print what happened and exit with a
    meaningful status. An abort for any other reason still happens, only later.
    """
    with contextlib.suppress(OSError, AttributeError):
        c = ctypes.CDLL(None)
        c.signal.argtypes, c.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
        c.signal(signal.SIGABRT, ctypes.cast(c.sleep, ctypes.c_void_p))


@contextlib.contextmanager
def session(mode: str, facts: dict[str, str]) -> Iterator[None]:
    """Context of a run: joins this process with the others, if there are any.

    Enter before the first computation. With several processes an error does not propagate:
    every process exits with that error's message, or with status 75 if a process is lost.

    Args:
      mode: 'auto', 'on' or 'off', as for `cluster.detect`.
      facts: values by name that must agree in all processes, besides their versions.

    Raises:
      UserError: a process is missing or differs, or the required cluster was not found.
    """
    global _watch
    cluster = cluster_lib.detect(mode)
    if cluster is None:
        yield
        return
    mine = {'hostname': socket.gethostname(), **versions(), **facts}
    call = call_roll if cluster.process == 0 else answer_roll
    roll = call(cluster, mine, timeout_seconds('BIG_VIT_START_TIMEOUT'), run_secret())
    import jax

    watch = _watch = Watch(cluster, roll)
    _hold_aborts()
    try:
        # Deactivated because `detect` has done it. The timeout is longer than that of the watch,
        # whose message says more.
        jax.distributed.initialize(
            cluster.address,
            cluster.processes,
            cluster.process,
            cluster.local_devices,
            cluster_detection_method='deactivate',
            coordinator_bind_address=bind_address(cluster.address),
            initialization_timeout=int(timeout_seconds('BIG_VIT_START_TIMEOUT')) + 60,
        )
        lines = _host_lines(cluster, roll.names, mine)
        watch.connected = True
        if cluster.process == 0:
            print('\n'.join(lines), flush=True)
        yield
        watch.finish()
        jax.distributed.shutdown()
    except BaseException as error:
        watch.fail(error)
    finally:
        _watch = None


def _host_lines(cluster: Cluster, names: list[str], mine: dict[str, str]) -> list[str]:
    """Lines that show hosts, versions and devices of the run."""
    import jax

    by_name: dict[str, list[int]] = {}
    for process, name in enumerate(names):
        by_name.setdefault(name, []).append(process)
    shown = [f'{name} ({", ".join(map(str, processes))})' for name, processes in by_name.items()]
    more = f' and {len(shown) - 8} more' if len(shown) > 8 else ''
    devices_per_process = Counter((d.process_index, d.device_kind) for d in jax.devices())
    kinds = Counter((count, kind) for (_, kind), count in devices_per_process.items())
    devices = ', '.join(
        f'{count} x {kind} on {n} process(es)' for (count, kind), n in kinds.items()
    )
    same = ', '.join(f'{key} {value}' for key, value in mine.items() if key != 'hostname')
    return [
        f'hosts   {cluster.processes} processes ({cluster.launcher}): {", ".join(shown[:8])}{more}',
        f'        each with {same}',
        f'        {devices}',
    ]


def _active_watch() -> Watch | None:
    """The watch of this run, or None for a single process."""
    import jax

    if _watch is None and jax.process_count() > 1:
        raise UserError('several processes must be started by hosts.session')
    return _watch


def connect(mesh: Any) -> None:
    """Opens the connections between the devices of a mesh, while all processes wait for it.

    XLA opens them at the first collective of each group of devices, and Gloo gives up if a process
    comes 30 seconds after another: as long as one compiles what the other has in its cache, or
    opens its data. Here nobody is late; a later wait is limited by BIG_VIT_STEP_TIMEOUT alone.
    """
    watch = _active_watch()
    if watch is None:
        return
    import jax

    axes = tuple(name for name, size in mesh.shape.items() if size > 1)
    groups = [
        group for count in range(len(axes)) for group in itertools.combinations(axes, count + 1)
    ]
    spec = jax.sharding.PartitionSpec(*axes)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec)
    def sums(ones: Any) -> Any:
        return sum(jax.lax.psum(ones, group) / len(groups) + 0 * ones for group in groups)

    place = jax.sharding.NamedSharding(mesh, spec)
    shape = tuple(mesh.shape[name] for name in axes)
    ones = jax.make_array_from_callback(
        shape, place, lambda _: np.ones((1,) * len(axes), np.float32)
    )
    compiled = sums.lower(ones).compile()
    watch.gather('compiled')
    jax.block_until_ready(compiled(ones))


def progress(step: int) -> None:
    """Reports to the other processes that this one has finished a step."""
    if _watch is not None:
        _watch.progress(step)


def register_saved_steps(saved: Callable[[], list[int]]) -> None:
    """Registers how to list saved steps, for the message when a process is lost."""
    if _watch is not None:
        _watch.saved = saved


def count() -> int:
    """Returns the number of processes of the run; 1 in a process that only loads data."""
    return 1 if _watch is None else _watch.processes


def gather(value: Any) -> list[Any]:
    """Gathers a JSON value from every process, in process order; all must call it."""
    watch = _active_watch()
    return [value] if watch is None else watch.gather(value)


def lead(work: Callable[[], Any]) -> Any:
    """Runs `work` in process 0 only and returns its result, a JSON value, in all processes.

    Raises:
      UserError: in all processes, if `work` raises it in process 0.
    """
    watch = _active_watch()
    if watch is None:
        return work()
    outcome: dict[str, Any] = {}
    if watch.process == 0:
        try:
            outcome['result'] = work()
        except UserError as error:
            outcome['error'], outcome['status'] = str(error), error.status
    leader_outcome = watch.gather(outcome)[0]
    if 'error' in leader_outcome:
        may_pass = leader_outcome['status'] == Unavailable.status
        raise (Unavailable if may_pass else UserError)(leader_outcome['error'])
    return leader_outcome['result']


def check_shared(workdir: str | Path) -> None:
    """Raises UserError unless all processes see the same folder (a file put there by process 0)."""
    watch = _active_watch()
    if watch is None or '://' in str(workdir):
        return
    folder = Path(workdir)

    def create_probe() -> str:
        name = f'.seen-{uuid.uuid4().hex}'
        (folder / name).touch()
        return name

    name, deadline = (
        lead(create_probe),
        time.monotonic() + min(30, timeout_seconds('BIG_VIT_START_TIMEOUT')),
    )
    seen = False
    while not seen and time.monotonic() < deadline:
        # Listing makes a network file system look again; a lookup by name may be cached.
        seen = folder.is_dir() and folder / name in folder.iterdir()
        if not seen:
            time.sleep(0.5)
    blind = [p for p, sees in enumerate(watch.gather(seen)) if not sees]
    if watch.process == 0:
        (folder / name).unlink()
    if blind:
        raise UserError(
            f'--workdir: {workdir} of {listed_processes(watch.names, [0])} is not the folder that '
            f'{listed_processes(watch.names, blind)} has under this name: with several processes '
            'it must be on storage that all hosts share'
        )
