"""Which processes make up this run, told by the environment that a launcher left."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from big_vit.errors import UserError

OVERRIDE = (
    'set JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID'
)


# What JAX uses on TPUs, too.
TPU_PORT = '8482'


class Cluster(NamedTuple):
    """This process among those of its run.

    `address` is the host:port of process 0; `local_devices` those of this machine's
    accelerators that are this process's, None for all.
    """

    launcher: str
    address: str
    processes: int
    process: int
    local_devices: list[int] | None = None


class _Launcher(NamedTuple):
    """Found where all of `needs` are set; `size` and `rank` are variables, '' asks JAX.

    JAX gives each process one accelerator where a launcher numbers the processes of a machine
    (`local`); `machines` tells whether there is only one on each, which then has them all.
    """

    name: str
    needs: tuple[str, ...]
    size: str = ''
    rank: str = ''
    local: str = ''
    machines: str = ''
    jax_class: str = ''


# The first that fits. A pod of Kubernetes is one process of many only in an indexed job.
LAUNCHERS = (
    _Launcher('JAX_* variables', ('JAX_NUM_PROCESSES',), 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'),
    _Launcher(
        'SLURM',
        ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID'),
        'SLURM_NTASKS',
        'SLURM_PROCID',
        'SLURM_LOCALID',
        'SLURM_STEP_NUM_NODES',
        'SlurmCluster',
    ),
    _Launcher(
        'Open MPI',
        ('OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_RANK'),
        'OMPI_COMM_WORLD_SIZE',
        'OMPI_COMM_WORLD_RANK',
        'OMPI_COMM_WORLD_LOCAL_RANK',
        jax_class='OmpiCluster',
    ),
    _Launcher(
        'Kubernetes', ('KUBERNETES_SERVICE_HOST', 'JOB_COMPLETION_INDEX'), jax_class='K8sCluster'
    ),
)


def detect(mode: str, environ: Mapping[str, str] = os.environ) -> Cluster | None:
    """The cluster that this process is one of several of; None for a run of one process.

    Args:
      mode: 'off' never looks; 'auto' looks; 'on' looks, and must find one.

    Raises:
      UserError: variables that contradict each other, a launcher that does not say where
        process 0 is, or no cluster although it is 'on'.
    """
    if mode == 'off':
        return None
    found = _gke_tpu(environ) or _from_environment(environ) or _cloud_tpu()
    if found is not None and found.processes > 1:
        return found
    if mode == 'on':
        names = ', '.join(launcher.name for launcher in LAUNCHERS)
        what = f'only one process ({found.launcher})' if found else 'no cluster'
        raise UserError(
            f'--distributed=on: the environment shows {what}; looked for {names}, GKE TPU '
            f'and a Cloud TPU pod. Start one process on each host, or {OVERRIDE}'
        )
    return None


def _from_environment(environ: Mapping[str, str]) -> Cluster | None:
    launcher = next((x for x in LAUNCHERS if all(name in environ for name in x.needs)), None)
    if launcher is None:
        stray = [x for x in ('JAX_COORDINATOR_ADDRESS', 'JAX_PROCESS_ID') if environ.get(x)]
        if stray:
            raise UserError(
                f'--distributed: {stray[0]} is set, but not what goes with it: {OVERRIDE}'
            )
        return None
    asked = _asked(launcher)
    count = _whole(environ, launcher.size) if launcher.size else asked('get_process_count')
    if count == 1:
        return Cluster(launcher.name, '', 1, 0)
    index = _whole(environ, launcher.rank) if launcher.rank else asked('get_process_id')
    if not 0 <= index < count:
        raise UserError(
            f'--distributed: {launcher.rank or launcher.name} says process {index}, but with '
            f'{count} processes it must be from 0 to {count - 1}'
        )
    address = environ.get('JAX_COORDINATOR_ADDRESS')
    if not address:
        if not launcher.jax_class:
            raise UserError(f'--distributed: JAX_COORDINATOR_ADDRESS is not set: {OVERRIDE}')
        port = environ.get('JAX_COORDINATOR_PORT')
        address = asked('get_coordinator_address', timeout_secs=60, override_coordinator_port=port)
    if not address.rpartition(':')[2].isdigit() or ':' not in address:
        raise UserError(f'--distributed: JAX_COORDINATOR_ADDRESS={address} is not host:port')
    alone = bool(launcher.machines) and environ.get(launcher.machines) == str(count)
    shared = bool(launcher.local) and launcher.local in environ and not alone
    local = [_whole(environ, launcher.local)] if shared else None
    if environ.get('JAX_LOCAL_DEVICE_IDS'):
        local = None  # JAX reads this one itself.
    return Cluster(launcher.name, address, count, index, local)


def _gke_tpu(environ: Mapping[str, str]) -> Cluster | None:
    """A pod with TPUs of Google's Kubernetes, of one slice or of several."""
    if 'JAX_NUM_PROCESSES' in environ:
        return None
    workers = environ.get('TPU_PROCESS_ADDRESSES') or environ.get('TPU_WORKER_HOSTNAMES')
    if file := environ.get('TPU_PROCESS_ADDRESSES_PATH'):
        try:
            workers = Path(file).read_text().strip()
        except OSError as error:
            raise UserError(f'TPU_PROCESS_ADDRESSES_PATH={file}: {error.strerror}') from None
    if not workers or 'TPU_WORKER_ID' not in environ:
        return None
    names = [worker.split(':')[0] for worker in workers.split(',')]
    slices = {**dict.fromkeys(('MEGASCALE_NUM_SLICES', 'MEGASCALE_SLICE_ID'), ''), **environ}
    count = int(slices['MEGASCALE_NUM_SLICES'] or 1)
    index = int(slices['MEGASCALE_SLICE_ID'] or 0) * len(names) + _whole(environ, 'TPU_WORKER_ID')
    first = environ.get('MEGASCALE_COORDINATOR_ADDRESS') or names[0]
    port = environ.get('JAX_COORDINATOR_PORT') or TPU_PORT
    address = environ.get('JAX_COORDINATOR_ADDRESS') or f'{first.split(":")[0]}:{port}'
    return Cluster('GKE TPU', address, count * len(names), index)


def _whole(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except KeyError:
        raise UserError(f'--distributed: {name} is not set: {OVERRIDE}') from None
    except ValueError:
        raise UserError(f'--distributed: {name}={environ[name]} is not a number') from None


def _asked(launcher: _Launcher) -> Callable[..., Any]:
    """What JAX's own class for this launcher finds out; its failures are the user's to see."""

    def ask(question: str, **arguments: object):
        from jax._src import clusters

        try:
            place = getattr(clusters, launcher.jax_class)
            if launcher.jax_class == 'K8sCluster' and not place.is_env_present():
                raise RuntimeError('the package kubernetes is not installed (jax[k8s])')
            return getattr(place, question)(**arguments)
        except Exception as error:
            reason = ' '.join(str(error).split())[:200]
            raise UserError(
                f'--distributed: {launcher.name} was found, but asking it for the processes of '
                f'this run failed: {type(error).__name__}: {reason}. By hand: {OVERRIDE}; '
                'for a run of this process alone, --distributed=off'
            ) from error

    return ask


def _cloud_tpu() -> Cluster | None:
    """A Cloud TPU VM, where no variable tells: its metadata server does."""
    from jax._src import cloud_tpu_init

    if not cloud_tpu_init.running_in_cloud_tpu_vm or 'TPU_SKIP_MDS_QUERY' in os.environ:
        return None
    asked = _asked(_Launcher('Cloud TPU', (), jax_class='GceTpuCluster'))
    count = asked('get_process_count')
    if count == 1:
        return Cluster('Cloud TPU', '', 1, 0)
    port = os.environ.get('JAX_COORDINATOR_PORT')
    address = asked('get_coordinator_address', timeout_secs=60, override_coordinator_port=port)
    return Cluster('Cloud TPU', address, count, asked('get_process_id'))
