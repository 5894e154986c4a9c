"""The researcher who launches pods: the lines of docs/pods.md, from nothing to the results.

`stand_ins/` has commands that take the place of gcloud, kubectl, docker and SLURM: they record how
they are called, and do on this machine what the real ones do on others. Hosts have a home, a PATH
and packages of their own, which the scripts install; buckets are those of an emulator.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, free_port
from PIL import Image
from test_storage import SERVE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (
            importlib.util.find_spec('gcp_storage_emulator') and importlib.util.find_spec('gcsfs')
        ),
        reason='needs gcp-storage-emulator and gcsfs',
    ),
]

STAND_INS = Path(__file__).parent / 'stand_ins'
TOTAL = 200
CONFIG = f"""
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({{
        'total_steps': {TOTAL}, 'batch_size': 16, 'image_size': 8, 'lr': 1e-2,
        'model': {{'variant': 'mu/4', 'dtype': 'float32', 'dropout': 0.05}},
        'data': {{'name': 'tar', 'split': 'train', 'transform': 'random_crop(size, 1)'}},
        'evals': {{'val': {{'split': 'val', 'transform': 'resize(size)', 'every_steps': 40}}}},
        'checkpoint': {{'every_steps': 10}}, 'log': {{'every_steps': 1}},
    }})
"""
# It compiles a ViT-B for 256 chips; tests/test_plan.py has smaller ones.
NOT_WALKED = ('python -m big_vit.plan',)


def documented(path: Path) -> dict[str, list[str]]:
    """Lines of the blocks of commands, by the heading above them."""
    lines: dict[str, list[str]] = {}
    heading, inside = '', None
    for line in path.read_text().splitlines():
        if line.startswith('```'):
            inside = None if inside is not None else line[3:]
        elif inside == '':
            lines.setdefault(heading, []).append(line)
        elif inside is None and line.startswith('#'):
            heading = line.strip('# ')
    return lines


LINES = documented(ROOT / 'docs' / 'pods.md')


def write_shards(folder: Path) -> None:
    """Pictures of two shades, in shards for training and validation."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for name, count in (('train-000', 48), ('train-001', 48), ('val-000', 24)):
        with tarfile.open(folder / f'{name}.tar', 'w') as tar:
            for i in range(count):
                shade = rng.integers(0, 236, (10, 10, 3)) + 20 * (i % 2)
                png = io.BytesIO()
                Image.fromarray(shade.astype(np.uint8)).save(png, 'PNG')
                for ending, data in (('png', png.getvalue()), ('cls', str(i % 2).encode())):
                    member = tarfile.TarInfo(f'{i:03}.{ending}')
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


class Researcher:
    """A person in a fresh clone, who types what the docs say."""

    def __init__(self, folder: Path, emulator: str):
        self.folder, self.clone, self.state = folder, folder / 'big_vit', folder / 'state'
        for path in (self.state, folder / 'bin', folder / 'home', folder / 'shared'):
            path.mkdir()
        subprocess.run(['git', 'clone', '-q', ROOT, self.clone], check=True)
        write_shards(self.clone / 'data')
        shutil.copytree(self.clone / 'data', folder / 'shared' / 'data')
        (folder / 'tiny.py').write_text(CONFIG)
        names = {'gcloud': 'gcloud', 'kubectl': 'kubectl', 'docker': 'docker'}
        names |= dict.fromkeys(('sbatch', 'srun', 'scontrol', 'scancel'), 'slurm')
        for name, stand_in in names.items():
            script = f'#!{sys.executable}\n' + (STAND_INS / f'{stand_in}.py').read_text()
            script = script.replace('Path(__file__).resolve().parent', repr(str(STAND_INS)))
            (folder / 'bin' / name).write_text(script)
        (folder / 'bin' / 'ssh-add').write_text('#!/bin/sh\n')
        for path in (folder / 'bin').iterdir():
            path.chmod(0o755)
        python = Path(sys.executable).parent
        self.environment = {
            'PATH': f'{folder / "bin"}:{python}:/usr/bin:/bin',
            'HOME': str(folder / 'home'),
            'LANG': 'C.UTF-8',
            'STAND_INS': str(self.state),
            'SSH_AUTH_SOCK': '/nowhere',
            'JAX_PLATFORMS': 'cpu',
            'XLA_FLAGS': os.environ['XLA_FLAGS'],
            'STORAGE_EMULATOR_HOST': emulator,
            'TENSORSTORE_GCS_HTTP_URL': emulator,
            'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none',
            'GOOGLE_CLOUD_PROJECT': 'none',
            'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
            'POLL': '1',
            'BACKOFF': '1',
        }
        self.walked: set[str] = set()

    def line(self, text: str, **other: str) -> str:
        """The line of the docs that begins like this, with what this machine has in its place."""
        found = [line for lines in LINES.values() for line in lines if line.startswith(text)]
        found.sort(key=lambda line: line != text)
        assert found, f'docs/pods.md has no line {text}'
        self.walked.add(found[0])
        places = {'configs/vit_b16_i1k.py:pod=v5e-256': f'{self.folder}/tiny.py',
                  'configs/vit_b16_i1k.py': f'{self.folder}/tiny.py',
                  '/shared': f'{self.folder}/shared', **other}  # fmt: skip
        line = found[0]
        for old, new in places.items():
            line = line.replace(old, new)
        return line

    def type(self, text: str, *, status: int = 0, timeout: float = 300, **other: str) -> str:
        """Type a line of the docs; return what it says."""
        line = self.line(text, **other)
        if line.startswith('export '):
            printed = self.bash(f'{line}; env -0')
            self.environment |= dict(v.split('=', 1) for v in printed.split('\0') if '=' in v)
            return printed
        return self.bash(line, status=status, timeout=timeout)

    def bash(self, line: str, *, status: int = 0, timeout: float = 300) -> str:
        result = subprocess.run(
            ['bash', '-c', line],
            cwd=self.clone,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        assert result.returncode == status, f'{line}\n{result.stdout}'
        return result.stdout

    @contextlib.contextmanager
    def started(self, line: str):
        """A line that goes on: (process, its file of output)."""
        log = self.folder / 'typed.log'
        with log.open('w') as file:
            process = subprocess.Popen(
                ['bash', '-c', line],
                cwd=self.clone,
                env=self.environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        try:
            yield process, log
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def watch(self, text: str, until: str, **other: str) -> str:
        """Type a line that follows a log, until it shows this; Ctrl-C."""
        with self.started(self.line(text, **other)) as (process, log):
            return wait_for(log, until, process)

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.state / 'calls').read_text().splitlines()]

    def hosts(self) -> list[Path]:
        return sorted((self.state / 'tpus').glob('*/host-*/home'))

    def contents(self, workdir: str):
        """(steps, metrics, content hash) of a run."""
        read = (
            'import json, sys\nfrom big_vit import checkpoint, metrics\n'
            'steps = checkpoint.steps(sys.argv[1])\n'
            'rows = [{k: v for k, v in row.items() if not k.startswith("time/")}'
            ' for row in metrics.read(sys.argv[1])]\n'
            'sidecar = checkpoint.read_sidecar(sys.argv[1], steps[-1])\n'
            'print(json.dumps([steps, rows, sidecar["content_hash"]]))'
        )
        (self.folder / 'read.py').write_text(read)
        place = os.path.expandvars(workdir.replace('$BUCKET', self.environment['BUCKET']))
        line = f'PYTHONPATH=. python {self.folder}/read.py {place}'
        return json.loads(self.bash(line).splitlines()[-1])


def wait_for(log: Path, pattern: str, process=None, seconds: float = 600) -> str:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        text = log.read_text() if log.exists() else ''
        if re.search(pattern, text):
            return text
        if process is not None and process.poll() is not None:
            break
        time.sleep(0.1)
    pytest.fail(f'{log} never said {pattern}:\n{log.read_text() if log.exists() else "nothing"}')


def step_reached(step: int) -> str:
    return rf'train +({"|".join(map(str, range(step, TOTAL)))})/'


@pytest.fixture(scope='module')
def researcher(tmp_path_factory):
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, '-c', SERVE, str(port)], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout and server.stdout.readline() == 'ready\n'
    person = Researcher(tmp_path_factory.mktemp('pods'), f'http://localhost:{port}')
    with server:
        yield person
        server.kill()
    # Whatever a failed test left running, and nothing else: these homes are ours alone.
    for path in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):
            if str(person.state).encode() in (path / 'environ').read_bytes():
                os.kill(int(path.name), signal.SIGKILL)


@pytest.fixture(scope='module')
def project(researcher):
    for line in LINES['Once for a project']:
        if not line.startswith(NOT_WALKED):
            researcher.type(line)
    return researcher


@pytest.fixture(scope='module')
def undisturbed(project):
    """What a run in the bucket comes to, with two processes that nobody disturbs."""
    project.type('export NAME=pod')
    project.type('launch/tpu.sh create')
    project.type('launch/tpu.sh status')
    assert 'ACTIVE' in project.type('launch/tpu.sh status')
    project.type('launch/tpu.sh install')
    project.type('launch/tpu.sh run -- python')
    said = project.watch('launch/tpu.sh logs', r'done    step')
    assert '2 processes' in said and 'compile' in said
    for home in project.hosts():
        wait_for(home / 'big_vit' / 'run' / 'outcome', 'done 0')
        secret = home / 'big_vit' / 'secret'
        assert secret.stat().st_mode & 0o777 == 0o600 and not (home / 'big_vit.secret').exists()
        assert secret.read_text().strip() not in (project.state / 'calls').read_text()
    return project.contents('$BUCKET/run1')


def test_one_host_trains_into_the_bucket(project):
    short = {'total_steps=200': 'total_steps=40'}
    for line in LINES['One host first']:
        if ' logs ' in line:
            assert 'test: loss' in project.watch(line, 'done    step 40, checkpoint gs://', **short)
        elif ' delete ' not in line:
            project.type(line, **short)
    (home,) = project.hosts()
    (site,) = (home / 'big_vit' / 'venv' / 'lib').glob('python3.*/site-packages')
    installed = (site / 'installed.txt').read_text().split()
    assert {'gcsfs', 'jax', 'libtpu'} <= set(installed)
    assert not {'pytest', 'ruff', 'mypy', 'ipykernel', 'nbclient'} & set(installed)
    # A mistake ends it at once, on the host too.
    outcome = home / 'big_vit' / 'run' / 'outcome'
    wait_for(outcome, 'done 0')
    bad = 'launch/tpu.sh run --name smoke -- python -m big_vit.train --config.lrr=1 '
    project.bash(f'{bad} --config configs/pretrain_fdsl.py --workdir $BUCKET/smoke2')
    wait_for(outcome, 'failed 2')
    log = (home / 'big_vit' / 'log').read_text()
    assert 'babysit: status 2 is a mistake' in log and 'restart 1' not in log
    project.type('launch/tpu.sh delete --name smoke')
    assert project.hosts() == []


def test_a_pod_that_loses_a_host_and_is_taken_away_ends_as_one_that_is_left_alone(
    project, undisturbed
):
    line = project.line('launch/tpu.sh babysit', run1='run4')
    with project.started(line) as (process, log):
        first = project.hosts()[0] / 'big_vit' / 'log'
        before = len(first.read_text())
        caches = [len(list((home / '.cache').rglob('*-cache'))) for home in project.hosts()]
        assert caches[0] > 0, 'the programs of run1 are not in the cache'
        wait_for(first, rf'run4(.|\n)*{step_reached(30)}', process)
        project.bash('gcloud --power-off pod 1')
        wait_for(log, 'the run is lost: starting it', process)
        wait_for(first, rf'resume  from step(.|\n)*{step_reached(110)}', process)
        project.bash('gcloud --preempt pod')
        said = wait_for(log, 'the run is done', process)
        assert process.wait(30) == 0
    assert 'the TPU is SUSPENDED: deleting it' in said and 'creating it' in said
    assert 'resume  from step' in first.read_text() and before
    steps, rows, digest = project.contents('$BUCKET/run4')
    assert steps[-1] == TOTAL and digest == undisturbed[2], 'it did not resume bit-exactly'
    assert rows == undisturbed[1]
    for text in LINES['Results and the end']:
        said = project.type(text)
    assert said == '' and project.hosts() == []
    assert (project.clone / 'run1' / 'report.html').exists()
    creates = [call for call in project.calls() if 'create' in call and 'tpus' in call]
    assert all('--spot' in call for call in creates)


def test_pods_of_a_cluster_survive_a_drained_node(project, undisturbed):
    gke = LINES['GKE']
    for line in gke[:4]:
        project.type(line)
    folder = project.state / 'images'
    (about,) = folder.glob('*/image.json')
    image = json.loads(about.read_text())
    assert image['user'] == '1000'
    names = {path.name for path in Path(image['root'], 'big_vit').iterdir()}
    assert names == {'launch', 'configs'}
    context = {path.name for path in about.parent.joinpath('context').iterdir()}
    assert not context & {'.git', 'tests', 'docs', 'data', 'benchmarks', 'notebooks'}
    (installed,) = Path(image['root']).glob('opt/venv/lib/*/site-packages/installed.txt')
    packages = set(installed.read_text().split())
    assert {'gcsfs', 'libtpu'} <= packages and not {'pytest', 'ruff'} & packages
    manifest = project.state / 'jobsets' / 'run2' / 'manifest.json'
    secret, jobset = json.loads(manifest.read_text())
    assert secret['stringData']['secret'] not in json.dumps(jobset)
    assert jobset['metadata'] == {
        'name': 'run2',
        'namespace': 'vit',
        'labels': {'kueue.x-k8s.io/queue-name': 'tpus'},
        'annotations': jobset['metadata']['annotations'],
    }
    project.watch(gke[4], step_reached(40))
    project.bash('kubectl --evict run2 1')
    project.type(gke[5])
    assert (manifest.parent / 'attempt').read_text() == '1'
    assert project.contents('$BUCKET/run2')[1:] == undisturbed[1:]
    project.type(gke[6])

    # A mistake ends the JobSet at the first attempt.
    project.bash(project.line('launch/gke.sh', run2='run5') + ' --config.lrr=1')
    project.bash('kubectl wait --for=condition=Failed jobset/run5')
    assert (manifest.parent.parent / 'run5' / 'attempt').read_text() == '0'
    assert 'lrr' in (manifest.parent.parent / 'run5' / 'log-0').read_text()


def test_a_job_whose_time_is_over_queues_again(project, undisturbed):
    (line,) = LINES['GPUs under SLURM']
    job = project.type(line).split()[-1]
    log = project.state / 'jobs' / job / 'log'
    wait_for(log, rf'0: {step_reached(40)}')
    project.bash(f'sbatch --time-is-over {job}')
    wait_for(log, r'0: done    step')
    wait_for(log.parent / 'status', '0')
    text = log.read_text()
    assert 'stopped by a signal: saved step' in text and '0: resume  from step' in text
    found = project.contents(f'{project.folder}/shared/run3')
    assert found[2] == undisturbed[2] and found[1] == undisturbed[1]


def test_every_line_was_walked(project, request):
    """Last in this file: nothing is documented that nobody typed."""
    here = [item for item in request.session.items if item.path == Path(__file__)]
    if len(here) < sum(name.startswith('test_') for name in globals()):
        pytest.skip('only after all other tests of this file')
    left = {line for lines in LINES.values() for line in lines} - project.walked
    assert all(line.startswith(NOT_WALKED) for line in left), left
