"""The processes of one run: they find each other, compare themselves, and notice who is gone.

Beside JAX's own service every process keeps a connection to process 0. It is there before
JAX connects, so it can name who is missing and who runs other code; and it still speaks when
JAX's client has decided to abort. `session` is the way in; the rest is nothing in a run of
one process.
"""

import contextlib
import ctypes
import hashlib
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

import big_vit
from big_vit.distributed import cluster as cluster_lib
from big_vit.distributed.cluster import Cluster
from big_vit.distributed.roll_call import answer_roll, call_roll, listed_processes, timeout_seconds
from big_vit.distributed.watchdog import Watch
from big_vit.errors import UserError


def code_digest() -> str:
    """Equal on hosts that run the same source files of big_vit."""
    total, root = hashlib.sha256(), Path(big_vit.__file__).parent
    for path in sorted(root.rglob('*.py')):
        total.update(path.relative_to(root).as_posix().encode() + b'\0')
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:12]


def versions() -> dict[str, str]:
    """What must be equal on all hosts for their compiled programs to be equal."""
    packages = {name: metadata.version(name) for name in ('jax', 'jaxlib', 'flax')}
    python = sys.version.split()[0]
    return {'python': python, **packages, 'big_vit': big_vit.__version__, 'code': code_digest()}


_watch: Watch | None = None


def _hold_aborts() -> None:
    """Makes an abort in C++ wait six seconds before it ends the process.

    JAX's client aborts when process 0 is lost, in a thread of its own and without asking
    Python. `sleep` as the handler of SIGABRT (which is 6) gives the watch, which sees the
    loss at the same moment, the time to say what happened and to end with a status that
    says so; an abort for another reason comes all the same.
    """
    with contextlib.suppress(OSError, AttributeError):
        c = ctypes.CDLL(None)
        c.signal.argtypes, c.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
        c.signal(signal.SIGABRT, ctypes.cast(c.sleep, ctypes.c_void_p))


@contextlib.contextmanager
def session(mode: str, facts: dict[str, str]) -> Iterator[None]:
    """Around a run: makes this process one of many where there are many.

    Call before the first computation. With several processes it does not return after an
    error: all of them end, with the error of one, and with status 75 if one is lost.

    Args:
      mode: 'auto', 'on' or 'off', as `cluster.detect` takes it.
      facts: name to value of what must be equal in all processes, beside their versions.

    Raises:
      UserError: somebody is missing or different, or there is no cluster to be found.
    """
    global _watch
    cluster = cluster_lib.detect(mode)
    if cluster is None:
        yield
        return
    mine = {'hostname': socket.gethostname(), **versions(), **facts}
    call = call_roll if cluster.process == 0 else answer_roll
    roll = call(cluster, mine, timeout_seconds('BIG_VIT_START_TIMEOUT'))
    import jax

    watch = _watch = Watch(cluster, roll)
    _hold_aborts()
    try:
        jax.distributed.initialize(
            cluster.address,
            cluster.processes,
            cluster.process,
            cluster.local_devices,
            cluster_detection_method='deactivate',
            initialization_timeout=int(timeout_seconds('BIG_VIT_START_TIMEOUT')) + 60,
        )
        lines = _table(cluster, roll.names, mine)
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


def _table(cluster: Cluster, names: list[str], mine: dict[str, str]) -> list[str]:
    import jax

    by_name: dict[str, list[int]] = {}
    for process, name in enumerate(names):
        by_name.setdefault(name, []).append(process)
    shown = [f'{name} ({", ".join(map(str, found))})' for name, found in by_name.items()]
    more = f' and {len(shown) - 8} more' if len(shown) > 8 else ''
    owned = Counter((d.process_index, d.device_kind) for d in jax.devices())
    kinds = Counter((count, kind) for (_, kind), count in owned.items())
    devices = ', '.join(
        f'{count} x {kind} on {n} process(es)' for (count, kind), n in kinds.items()
    )
    same = ', '.join(f'{key} {value}' for key, value in mine.items() if key != 'hostname')
    return [
        f'hosts   {cluster.processes} processes ({cluster.launcher}): {", ".join(shown[:8])}{more}',
        f'        each with {same}',
        f'        {devices}',
    ]


def _needed() -> Watch | None:
    import jax

    if _watch is None and jax.process_count() > 1:
        raise UserError('several processes must be started by hosts.session')
    return _watch


def progress(step: int) -> None:
    """Tells the other processes that this one has finished a step."""
    if _watch is not None:
        _watch.progress(step)


def saves_in(saved: Callable[[], list[int]]) -> None:
    """Says how to find the steps that are saved, for the message at a loss."""
    if _watch is not None:
        _watch.saved = saved


def gather(value: Any) -> list[Any]:
    """[value of process 0, of process 1, ...], of values that JSON can hold."""
    watch = _needed()
    return [value] if watch is None else watch.gather(value)


def lead(work: Callable[[], Any]) -> Any:
    """What `work` gives in process 0, which alone does it; a JSON value, in all processes.

    Raises:
      UserError: in all processes, if it does in process 0.
    """
    watch = _needed()
    if watch is None:
        return work()
    outcome: dict[str, Any] = {}
    if watch.process == 0:
        try:
            outcome['result'] = work()
        except UserError as error:
            outcome['error'] = str(error)
    told = watch.gather(outcome)[0]
    if 'error' in told:
        raise UserError(told['error'])
    return told['result']


def check_shared(workdir: str | Path) -> None:
    """Raises UserError unless all processes see the same folder."""
    watch = _needed()
    if watch is None or '://' in str(workdir):
        return
    folder = Path(workdir)

    def put() -> str:
        name = f'.seen-{uuid.uuid4().hex}'
        (folder / name).touch()
        return name

    name, until = lead(put), time.monotonic() + min(30, timeout_seconds('BIG_VIT_START_TIMEOUT'))
    seen = False
    while not seen and time.monotonic() < until:
        # Listing makes a network file system look again; asking for one name need not.
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
