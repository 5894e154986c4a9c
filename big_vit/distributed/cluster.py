"""Detects which processes make up this run, from the environment that a launcher sets up."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from big_vit.errors import UserError

OVERRIDE = (
    'set JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID'
)


# JAX's own default on TPUs, repeated here because GKE addresses are assembled by hand.
TPU_PORT = '8482'


class Cluster(NamedTuple):
    """This process and the run that it belongs to.

    Attributes:
      launcher: name of the launcher, for messages.
      address: host:port of process 0.
      processes: number of processes of the run.
      process: index of this process.
      local_devices: indices of this machine's accelerators that this process uses; None for all.
    """

    launcher: str
    address: str
    processes: int
    process: int
    local_devices: list[int] | None = None


class _Launcher(NamedTuple):
    """A launcher that is recognized by its environment variables.

    Attributes:
      name: for messages.
      needs: variables that must all be set.
      size, rank: variables with the number of processes and this one's index; '' asks JAX.
      local: variable that numbers the processes on a machine; each then takes one accelerator,
        as in JAX.
      machines: variable with the number of machines. If it equals the number of processes, each
        process is alone on its machine and takes all of its accelerators.
      jax_class: JAX's class for this launcher.
    """

    name: str
    needs: tuple[str, ...]
    size: str = ''
    rank: str = ''
    local: str = ''
    machines: str = ''
    jax_class: str = ''


# The first match wins. A Kubernetes pod is one of several processes only in an indexed job.
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
    """Finds the cluster that this process belongs to.

    Args:
      mode: 'off' never looks, 'auto' looks, 'on' requires one.
      environ: environment variables.

    Returns:
      The cluster, or None for a run of a single process.

    Raises:
      UserError: contradicting variables, a launcher that does not reveal the address of process
        0, or no cluster although `mode` is 'on'.
    """
    if mode == 'off':
        return None
    cluster = _gke_tpu(environ) or _from_environment(environ) or _cloud_tpu()
    if cluster is not None and cluster.processes > 1:
        return cluster
    if mode == 'on':
        names = ', '.join(launcher.name for launcher in LAUNCHERS)
        what = f'only one process ({cluster.launcher})' if cluster else 'no cluster'
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
    query = _cluster_query(launcher)
    count = _integer(environ, launcher.size) if launcher.size else query('get_process_count')
    if count == 1:
        return Cluster(launcher.name, '', 1, 0)
    index = _integer(environ, launcher.rank) if launcher.rank else query('get_process_id')
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
        address = query('get_coordinator_address', timeout_secs=60, override_coordinator_port=port)
    if not address.rpartition(':')[2].isdigit() or ':' not in address:
        raise UserError(f'--distributed: JAX_COORDINATOR_ADDRESS={address} is not host:port')
    one_per_machine = bool(launcher.machines) and environ.get(launcher.machines) == str(count)
    shared = bool(launcher.local) and launcher.local in environ and not one_per_machine
    local = [_integer(environ, launcher.local)] if shared else None
    if environ.get('JAX_LOCAL_DEVICE_IDS'):
        local = None  # jax.distributed.initialize reads this variable itself.
    return Cluster(launcher.name, address, count, index, local)


def _gke_tpu(environ: Mapping[str, str]) -> Cluster | None:
    """Reads the variables of a GKE pod with TPUs, of one slice or of several."""
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
    # GKE leaves these two empty, or out, where there is one slice.
    count, this_slice = (
        _integer(environ, name) if environ.get(name) else one_slice
        for name, one_slice in (('MEGASCALE_NUM_SLICES', 1), ('MEGASCALE_SLICE_ID', 0))
    )
    index = this_slice * len(names) + _integer(environ, 'TPU_WORKER_ID')
    first = environ.get('MEGASCALE_COORDINATOR_ADDRESS') or names[0]
    port = environ.get('JAX_COORDINATOR_PORT') or TPU_PORT
    address = environ.get('JAX_COORDINATOR_ADDRESS') or f'{first.split(":")[0]}:{port}'
    return Cluster('GKE TPU', address, count * len(names), index)


def _integer(environ: Mapping[str, str], name: str) -> int:
    """Reads a variable as an integer, or raises UserError."""
    try:
        return int(environ[name])
    except KeyError:
        raise UserError(f'--distributed: {name} is not set: {OVERRIDE}') from None
    except ValueError:
        raise UserError(f'--distributed: {name}={environ[name]} is not a number') from None


def _cluster_query(launcher: _Launcher) -> Callable[..., Any]:
    """Returns a function that queries JAX's class for this launcher; failures are UserErrors."""

    def query(question: str, **arguments: object):
        from jax._src import clusters

        try:
            cluster_class = getattr(clusters, launcher.jax_class)
            if launcher.jax_class == 'K8sCluster' and not cluster_class.is_env_present():
                raise RuntimeError('the package kubernetes is not installed (jax[k8s])')
            return getattr(cluster_class, question)(**arguments)
        except Exception as error:
            reason = ' '.join(str(error).split())[:200]
            raise UserError(
                f'--distributed: {launcher.name} was found, but asking it for the processes of '
                f'this run failed: {type(error).__name__}: {reason}. By hand: {OVERRIDE}; '
                'for a run of this process alone, --distributed=off'
            ) from error

    return query


def _cloud_tpu() -> Cluster | None:
    """Asks the metadata server of a Cloud TPU VM, which has no variables to read."""
    from jax._src import cloud_tpu_init

    if not cloud_tpu_init.running_in_cloud_tpu_vm or 'TPU_SKIP_MDS_QUERY' in os.environ:
        return None
    query = _cluster_query(_Launcher('Cloud TPU', (), jax_class='GceTpuCluster'))
    count = query('get_process_count')
    if count == 1:
        return Cluster('Cloud TPU', '', 1, 0)
    port = os.environ.get('JAX_COORDINATOR_PORT')
    address = query('get_coordinator_address', timeout_secs=60, override_coordinator_port=port)
    return Cluster('Cloud TPU', address, count, query('get_process_id'))
