"""Who takes part in a run, read from environments as the launchers leave them."""

import sys
import types

import pytest

from big_vit.distributed import cluster
from big_vit.errors import UserError

EXPLICIT = {
    'JAX_COORDINATOR_ADDRESS': '10.0.0.1:1234',
    'JAX_NUM_PROCESSES': '4',
    'JAX_PROCESS_ID': '3',
}
SLURM = {
    'SLURM_JOB_ID': '4097',
    'SLURM_STEP_NODELIST': 'node[007-010],other3',
    'SLURM_NTASKS': '8',
    'SLURM_PROCID': '5',
    'SLURM_LOCALID': '1',
    'SLURM_STEP_NUM_NODES': '4',
}
MPI = {
    'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://10.96.0.1,10.148.0.1:34911',
    'OMPI_COMM_WORLD_SIZE': '2',
    'OMPI_COMM_WORLD_RANK': '1',
    'OMPI_COMM_WORLD_LOCAL_RANK': '0',
}
GKE = {'TPU_WORKER_HOSTNAMES': 'a.svc,b.svc,c.svc', 'TPU_WORKER_ID': '2'}


@pytest.fixture
def detect(monkeypatch):
    """`cluster.detect` in a process that has these variables."""

    def run(variables, mode='auto'):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return cluster.detect(mode)

    return run


def test_the_jax_variables_that_jax_itself_does_not_read(detect):
    found = detect(EXPLICIT)
    assert found == ('JAX_* variables', '10.0.0.1:1234', 4, 3, None)


def test_slurm_with_two_tasks_on_a_node_gives_each_one_device(detect):
    assert detect(SLURM) == ('SLURM', 'node007:61441', 8, 5, [1])


def test_slurm_with_one_task_on_a_node_gives_it_all_devices(detect):
    assert detect({**SLURM, 'SLURM_STEP_NUM_NODES': '8'}).local_devices is None


def test_a_batch_script_of_slurm_is_no_task(detect):
    batch = {name: value for name, value in SLURM.items() if name != 'SLURM_STEP_NODELIST'}
    assert detect(batch) is None


def test_open_mpi(detect):
    found = detect(MPI)
    assert (found.launcher, found.processes, found.process) == ('Open MPI', 2, 1)
    assert found.address.startswith('10.96.0.1:') and found.local_devices == [0]


def test_open_mpi_of_which_jax_knows_no_address_takes_ours(detect):
    five = {name: value for name, value in MPI.items() if 'orte' not in name}
    found = detect({**five, 'JAX_COORDINATOR_ADDRESS': 'first:7000'})
    assert (found.address, found.processes, found.process) == ('first:7000', 2, 1)


def test_gke_tpu_workers(detect):
    assert detect(GKE) == ('GKE TPU', 'a.svc:8482', 3, 2, None)


def test_a_gke_tpu_pod_needs_nothing_from_kubernetes_and_yields_to_the_jax_variables(detect):
    pod = {**GKE, 'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'JOB_COMPLETION_INDEX': '2'}
    assert detect(pod).launcher == 'GKE TPU'
    assert detect(EXPLICIT).launcher == 'JAX_* variables'


def test_gke_addresses_in_a_file(detect, tmp_path):
    (tmp_path / 'addresses').write_text('a:8471,b:8471\n')
    file = {'TPU_PROCESS_ADDRESSES_PATH': str(tmp_path / 'addresses'), 'TPU_WORKER_ID': '1'}
    assert detect(file) == ('GKE TPU', 'a:8482', 2, 1, None)


def test_gke_multislice(detect):
    slices = {
        'MEGASCALE_COORDINATOR_ADDRESS': 'first.svc:8081',
        'MEGASCALE_NUM_SLICES': '2',
        'MEGASCALE_SLICE_ID': '1',
        'JAX_COORDINATOR_PORT': '8476',
    }
    assert detect({**GKE, **slices}) == ('GKE TPU', 'first.svc:8476', 6, 5, None)


def test_gke_variables_of_slices_that_are_empty_mean_one_slice(detect):
    empty = {'MEGASCALE_NUM_SLICES': '', 'MEGASCALE_SLICE_ID': ''}
    assert detect({**GKE, **empty}) == ('GKE TPU', 'a.svc:8482', 3, 2, None)


def test_one_tpu_worker_is_no_cluster(detect):
    assert detect({'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0'}) is None


class Metadata:
    """The metadata server of a Cloud TPU VM with some workers."""

    def __init__(self, workers):
        self.values = {
            'worker-network-endpoints': ','.join(f'x:{i}:10.0.0.{i + 1}' for i in range(workers)),
            'agent-worker-number': str(workers - 1),
            'tpu-env': "ACCELERATOR_TYPE: 'v5p'\n",
        }

    def __call__(self, key):
        return self.values[key], 200


@pytest.mark.parametrize(('workers', 'expected'), [(1, None), (4, '10.0.0.1:8482')])
def test_cloud_tpu_vm(detect, monkeypatch, workers, expected):
    from jax._src import cloud_tpu_init
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.delenv('TPU_SKIP_MDS_QUERY', raising=False)
    monkeypatch.setattr(cloud_tpu_init, 'running_in_cloud_tpu_vm', True)
    monkeypatch.setattr(cloud_tpu_cluster, 'get_metadata', Metadata(workers))
    monkeypatch.setattr('socket.gethostbyname', lambda name: name)
    found = detect({})
    assert (found and found.address) == expected
    assert found is None or (found.processes, found.process) == (4, 3)


def test_a_metadata_server_that_does_not_answer_is_not_taken_for_one_process(detect, monkeypatch):
    from jax._src import cloud_tpu_init
    from jax._src.clusters import cloud_tpu_cluster

    def fail(key):
        raise ConnectionError('no route')

    monkeypatch.delenv('TPU_SKIP_MDS_QUERY', raising=False)
    monkeypatch.setattr(cloud_tpu_init, 'running_in_cloud_tpu_vm', True)
    monkeypatch.setattr(cloud_tpu_cluster, 'get_metadata', fail)
    with pytest.raises(UserError, match=r'Cloud TPU was found.*no route.*--distributed=off'):
        detect({})


def test_a_pod_of_an_indexed_job_without_the_package_says_what_to_install(detect, monkeypatch):
    monkeypatch.setitem(sys.modules, 'kubernetes', None)
    pod = {'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'JOB_COMPLETION_INDEX': '1'}
    with (
        pytest.warns(UserWarning, match='kubernetes'),
        pytest.raises(UserError, match=r'Kubernetes was found.*jax\[k8s\].*--distributed=off'),
    ):
        detect(pod)


def test_a_pod_of_an_indexed_job_asks_kubernetes(detect, monkeypatch):
    from jax._src.clusters import K8sCluster

    job = types.SimpleNamespace(
        count=classmethod(lambda cls: 3),
        index=classmethod(lambda cls: 1),
        address=classmethod(lambda cls, **_: 'job-0.svc:55527'),
        present=classmethod(lambda cls: True),
    )
    monkeypatch.setattr(K8sCluster, 'is_env_present', job.present)
    monkeypatch.setattr(K8sCluster, 'get_process_count', job.count)
    monkeypatch.setattr(K8sCluster, 'get_process_id', job.index)
    monkeypatch.setattr(K8sCluster, 'get_coordinator_address', job.address)
    found = detect({'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'JOB_COMPLETION_INDEX': '1'})
    assert found == ('Kubernetes', 'job-0.svc:55527', 3, 1, None)


def test_a_pod_that_is_of_no_indexed_job_runs_alone(detect):
    assert detect({'KUBERNETES_SERVICE_HOST': '10.0.0.1'}) is None


@pytest.mark.parametrize(
    ('variables', 'message'),
    [
        ({**EXPLICIT, 'JAX_PROCESS_ID': '4'}, 'must be from 0 to 3'),
        ({**EXPLICIT, 'JAX_PROCESS_ID': 'x'}, 'JAX_PROCESS_ID=x is not a number'),
        ({**EXPLICIT, 'JAX_COORDINATOR_ADDRESS': 'host'}, 'is not host:port'),
        ({**EXPLICIT, 'JAX_COORDINATOR_ADDRESS': ''}, 'JAX_COORDINATOR_ADDRESS is not set'),
        ({'JAX_COORDINATOR_ADDRESS': 'a:1'}, 'JAX_COORDINATOR_ADDRESS is set, but not what goes'),
        ({'JAX_NUM_PROCESSES': '2'}, 'JAX_PROCESS_ID is not set'),
        ({**SLURM, 'SLURM_STEP_NODELIST': '', 'SLURM_JOB_ID': 'x'}, 'SLURM was found, but asking'),
        ({**GKE, 'MEGASCALE_NUM_SLICES': 'two'}, 'MEGASCALE_NUM_SLICES=two is not a number'),
        ({**GKE, 'MEGASCALE_SLICE_ID': 'x'}, 'MEGASCALE_SLICE_ID=x is not a number'),
    ],
)
def test_what_contradicts_itself_is_an_error_and_not_one_process(detect, variables, message):
    with pytest.raises(UserError, match=message):
        detect(variables)


def test_off_looks_at_nothing_and_on_must_find_several(detect):
    assert detect({}) is None
    with pytest.raises(UserError, match=r'shows no cluster; looked for JAX_\* .*SLURM.*Kubernetes'):
        detect({}, 'on')
    assert detect({**EXPLICIT, 'JAX_PROCESS_ID': 'x'}, 'off') is None
    with pytest.raises(UserError, match='only one process'):
        detect({**EXPLICIT, 'JAX_NUM_PROCESSES': '1', 'JAX_PROCESS_ID': '0'}, 'on')
