"""Object stores, several processes, and filesystems that are slow, fail or lose things."""

import errno
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time

import fsspec
import pytest
from commands import ROOT, environment, run, script, start
from fsspec.implementations.memory import MemoryFileSystem

from big_vit import checkpoint, config, metrics, ownership, storage
from big_vit.errors import UserError
from big_vit.workdir import check_workdir, owned, write_config


class Store(MemoryFileSystem):
    """Objects in memory under gs://, as strict as the real ones: no folders, no appending."""

    protocol = ('gcs', 'gs')
    cachable = False
    store: dict = {}  # noqa: RUF012
    pseudo_dirs: list = ['']  # noqa: RUF012
    writes: list = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return '/' + str(path).partition('://')[2].strip('/') if '://' in str(path) else path

    def makedirs(self, path, exist_ok=False):
        pass

    def mkdir(self, path, create_parents=True, **kwargs):
        pass

    def _open(self, path, mode='rb', **kwargs):
        assert mode in ('rb', 'wb', 'xb'), mode
        if mode == 'wb':
            self.writes.append(path)
        return super()._open(path, mode, **kwargs)


@pytest.fixture
def store(monkeypatch):
    """gs://bucket in memory, for what goes through fsspec: all but the arrays."""
    from etils.epath import backend

    for name in ('gs', 'gcs'):
        fsspec.register_implementation(name, Store, clobber=True)
    monkeypatch.setitem(sys.modules, 'gcsfs', Store)
    monkeypatch.setattr(Store, 'store', {})
    monkeypatch.setattr(Store, 'writes', [])
    backend.fsspec_backend._get_filesystem.cache_clear()
    yield Store
    backend.fsspec_backend._get_filesystem.cache_clear()


@pytest.mark.parametrize(
    ('path', 'message'),
    [
        ('hdfs://a/b', r'hdfs:// is not supported; a local path, or one of gs://'),
        (
            's3://a/b',
            r's3://a/b: s3:// is for data: Orbax writes checkpoints to local disks and gs',
        ),
        ('gs:///', r'names no bucket; write gs://BUCKET/RUN'),
        ('gs://bucket/run', r'gs://bucket/run: gs:// needs `pip install gcsfs`'),
    ],
)
def test_a_place_that_cannot_be_reached_is_one_line(path, message, monkeypatch):
    for name in storage.LIBRARIES.values():
        monkeypatch.setitem(sys.modules, name, None)
    for command in (
        lambda: checkpoint.locate(path),
        lambda: owned(path).__enter__(),
    ):
        with pytest.raises(UserError, match='--workdir: .*' + message) as caught:
            command()
        assert '\n' not in str(caught.value)


TINY = {
    'total_steps': 12,
    'batch_size': 16,
    'image_size': 8,
    'lr': 1e-2,
    'model.variant': 'mu/4',
    'data.name': 'digits',
}


def test_a_write_that_fails_for_a_moment_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, 'PAUSES_S', (0.0, 0.0, 0.0))
    path, real, failures = storage.place(tmp_path / 'config.json'), os.replace, [1, 1]

    def replace(*args):
        if failures:
            failures.pop()
            raise OSError(errno.EIO, 'Input/output error')
        return real(*args)

    monkeypatch.setattr(os, 'replace', replace)
    storage.write_text(path, 'new')
    assert path.read_text() == 'new' and not failures
    failures[:] = [1] * 4
    with pytest.raises(UserError, match=r'config\.json: cannot be written: Input/output error'):
        storage.write_text(path, 'newer')
    assert path.read_text() == 'new'


def test_what_a_store_does_not_answer_may_pass_and_what_it_forbids_does_not(store, monkeypatch):
    """Exit status 75, on which launch/babysit starts again, or 2, on which it never does."""
    monkeypatch.setattr(storage, 'PAUSES_S', (0.0,))
    for error, status in (
        (OSError('502 Bad Gateway'), 75),
        (RuntimeError('Session is closed'), 75),
        (PermissionError('denied'), 2),
        (OSError('Forbidden: bucket'), 2),
        (FileNotFoundError('bucket'), 2),
    ):

        def fail(*args, error=error, **kwargs):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(Store, '_open', fail)
            with pytest.raises(UserError, match=r'run/x: cannot be written') as caught:
                storage.write_text(storage.place('gs://bucket/run/x'), '')
            assert caught.value.status == status
            patch.setattr(Store, 'pipe_file', fail)
            with pytest.raises(UserError, match='cannot write to gs://bucket/run') as caught:
                owned('gs://bucket/run').__enter__()
            assert caught.value.status == status


def test_an_owner_in_a_store_asks_for_nothing_above_its_folder(store, monkeypatch):
    """Who may write objects may not list buckets: roles/storage.objectAdmin cannot."""
    asked, info = [], Store.info

    def noted(self, path, **kwargs):
        asked.append(path.strip('/'))
        return info(self, path, **kwargs)

    monkeypatch.setattr(Store, 'info', noted)
    with owned('gs://bucket/deep/run'):
        pass
    assert asked and all('bucket/deep/run' in path for path in asked), asked


def test_files_of_one_stem_are_written_beside_each_other(tmp_path, monkeypatch):
    first, second = storage.place(tmp_path / 'run.json'), storage.place(tmp_path / 'run.html')
    real = os.replace

    def replace(*args):
        # While one file is about to be replaced, another process writes its neighbour.
        monkeypatch.setattr(os, 'replace', real)
        storage.write_text(second, 'page')
        return real(*args)

    monkeypatch.setattr(os, 'replace', replace)
    storage.write_text(first, 'figures')
    assert (first.read_text(), second.read_text()) == ('figures', 'page')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['run.html', 'run.json']


def test_what_stays_wrong_is_not_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(time, 'sleep', lambda seconds: pytest.fail('tried again'))
    with pytest.raises(UserError, match='No such file'):
        storage.write_text(storage.place(tmp_path / 'nowhere' / 'x'), '')


def test_metrics_in_a_store_are_rewritten_at_a_bounded_rate_and_when_asked(store, monkeypatch):
    def stored():
        return [row['step'] for row in metrics.read('gs://bucket/run')]

    with metrics.Writer('gs://bucket/run', 0) as writer:
        opened = len(store.writes)
        for step in range(1, 100):
            writer.write(step, {'train/loss': 1.0})
        assert len(store.writes) == opened and stored() == []
        writer.flush()
        assert stored() == list(range(1, 100)) and len(store.writes) == opened + 1
        writer.flush()
        assert len(store.writes) == opened + 1, 'nothing was new'
        monkeypatch.setattr(metrics.writer, 'REWRITE_EVERY_S', 0)
        writer.write(100, {'train/loss': 1.0})
        assert stored()[-1] == 100
        monkeypatch.setattr(metrics.writer, 'REWRITE_EVERY_S', 1000)
        writer.write(101, {'train/loss': 1.0})
    assert stored()[-1] == 101, 'closed without the last row'
    with metrics.Writer('gs://bucket/run', 50) as writer:
        assert stored() == list(range(1, 51))


def test_a_row_that_the_disk_refuses_once_is_written_again(tmp_path, monkeypatch):
    with metrics.Writer(tmp_path, 0) as writer:
        writer.write(1, {'train/loss': 1.0})
        writer._file.close()
        writer._file = open('/dev/full', 'a')  # noqa: PTH123, SIM115
        writer.write(2, {'train/loss': 2.0})
        writer.write(3, {'train/loss': 3.0})
    assert [row['train/loss'] for row in metrics.read(tmp_path)] == [1.0, 2.0, 3.0]


def test_a_home_is_meant_where_the_shell_has_left_its_sign(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert storage.place('~/run') == storage.place(tmp_path / 'run')
    assert storage.place('a~b/~') == storage.place('a~b') / '~'


def test_the_workdir_and_the_checkpoints_of_a_store(store):
    with owned('gs://bucket/run') as workdir:
        write_config(workdir, config.resolve(TINY))
        assert json.loads((workdir / 'config.json').read_text())['lr'] == 1e-2
        other = config.resolve({**TINY, 'lr': 1.0})
        check_workdir(workdir, other, {}, False)  # Nothing was made yet.
        (workdir / metrics.FILE).write_text('{"step": 1}\n')
        check_workdir(workdir, config.resolve(TINY), {}, False)
        with pytest.raises(UserError, match=r'gs://bucket/run holds a run of another config \(lr'):
            check_workdir(workdir, other, {}, False)
        ownership.began()
    for step in (3, 6, 9):
        folder = workdir / 'checkpoints' / str(step)
        (folder / 'sidecar' / 'metadata').write_text('{}')
        if step != 9:
            (folder / checkpoint.COMMITTED).write_text('')
    assert checkpoint.steps(workdir) == [3, 6], '9 is not finished'
    assert checkpoint.locate('gs://bucket/run/checkpoints/3') == (workdir, 3)
    checkpoint.set_aside(workdir, 6)
    assert checkpoint.steps(workdir) == [3]
    assert (workdir / 'damaged' / '6-0' / 'sidecar' / 'metadata').read_text() == '{}'
    checkpoint._remove_leftovers(workdir / 'checkpoints')
    assert not (workdir / 'checkpoints' / '9').exists()
    checkpoint._remove(workdir / 'checkpoints' / '3')
    assert checkpoint.steps(workdir) == [] and not (workdir / 'checkpoints' / '3').exists()


def test_what_killed_saves_leave_is_removed_and_nothing_else(tmp_path):
    folder = storage.place(tmp_path / 'checkpoints')
    for name in ('3', '6.orbax-checkpoint-tmp', '1.deleted', '3.tar', 'notes'):
        (folder / name).mkdir(parents=True)
    checkpoint._remove_leftovers(folder)
    assert sorted(path.name for path in folder.iterdir()) == ['3', '3.tar', 'notes']


# Filesystems that misbehave, each in a process of its own.

SAVES = """
import errno, os, sys, time
import numpy as np, jax, jax.numpy as jnp
from big_vit import checkpoint, runtime

fault, workdir = sys.argv[1], sys.argv[2]
broken = False
rename, mkdir = os.rename, os.mkdir

def bad_rename(source, target, *args, **kwargs):
    if broken and '/checkpoints/' in os.fspath(target):
        if fault == 'slow':
            time.sleep(0.7)
        elif fault == 'hang':
            time.sleep(3600)
        elif fault == 'eio':
            raise OSError(errno.EIO, 'Input/output error')
    return rename(source, target, *args, **kwargs)

def bad_mkdir(path, *args, **kwargs):
    if broken and fault == 'readonly' and '/checkpoints/' in os.fspath(path):
        raise OSError(errno.EROFS, 'Read-only file system')
    return mkdir(path, *args, **kwargs)

os.rename, os.mkdir = bad_rename, bad_mkdir
if fault == 'hang':
    checkpoint.TIMEOUT_S = 2

def state(step):
    return {'step': jnp.int32(step), 'params': {'w': jnp.full((300, 300), step, jnp.float32)}}

def main(argv):
    global broken
    with checkpoint.Manager(workdir, keep_last=1) as manager:
        manager.save(state(1), {}, {})
        manager.wait()
        broken = True
        began = time.monotonic()
        manager.save(state(2), {}, {})
        print('blocked', time.monotonic() - began, flush=True)
        while manager._saving is not None:  # As training does, at every step.
            manager.check()
        print('timings', manager.timings(), manager.timings(), flush=True)
        manager.save(state(3), {}, {})

runtime.command(main)
"""


def saves(fault, workdir):
    began = time.monotonic()
    result = script(SAVES, fault, workdir, timeout=90)
    return result, time.monotonic() - began


def intact(workdir, step):
    params, _ = checkpoint.load_params(workdir, step)
    return bool((params['w'] == step).all())


@pytest.mark.parametrize(
    ('fault', 'message'),
    [
        ('eio', 'Input/output error'),
        pytest.param('readonly', 'Read-only file system', marks=pytest.mark.slow),
        pytest.param(
            *('hang', 'it is still being written after 0.0333 minutes'), marks=pytest.mark.slow
        ),
    ],
)
def test_a_failed_or_hanging_save_ends_the_run_and_keeps_the_last_good_one(
    tmp_path, fault, message
):
    """keep_last is 1: the failed save must not have pushed the good one out."""
    result, seconds = saves(fault, tmp_path / 'w')
    assert result.returncode == 2, result.stdout + result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith('error: ')
    assert f'saving the checkpoint of step 2 failed: {message}' in line
    assert 'the last good one is step 1' in line
    assert seconds < 60
    assert checkpoint.steps(tmp_path / 'w') == [1]
    assert intact(tmp_path / 'w', 1)


@pytest.mark.slow
def test_a_slow_filesystem_holds_up_nothing_but_the_save(tmp_path):
    result, _ = saves('slow', tmp_path / 'w')
    assert result.returncode == 0, result.stdout + result.stderr
    lines = dict(line.split(' ', 1) for line in result.stdout.splitlines())
    first, _, second = lines['timings'].partition('} ')
    seconds = json.loads((first + '}').replace("'", '"'))
    assert float(lines['blocked']) < 0.7 < seconds['time/save_s']
    assert seconds['time/save_blocked_s'] == pytest.approx(float(lines['blocked']), abs=0.2)
    assert second == '{}', 'a save is to be reported once'
    assert checkpoint.steps(tmp_path / 'w') == [3] and intact(tmp_path / 'w', 3)


def test_a_step_that_is_there_is_not_overwritten(tmp_path):
    import jax.numpy as jnp

    full = {'step': jnp.int32(4), 'params': {'w': jnp.full(3, 4.0)}}
    with checkpoint.Manager(tmp_path, keep_last=1) as manager:
        manager.save(full, {}, {})
    with (
        pytest.raises(UserError, match=r'step 4 failed: it is there already: is another run'),
        checkpoint.Manager(tmp_path, keep_last=1) as manager,
    ):
        manager.save(full, {}, {})
    assert intact(tmp_path, 4)


DAMAGES = """
import contextlib, io, shutil, sys
from pathlib import Path
import numpy as np, jax, jax.numpy as jnp
from big_vit import checkpoint, storage, train

def state(step):
    values = np.random.default_rng(step).normal(size=(100, 100)).astype(np.float32)
    return {'step': jnp.int32(step), 'params': {'w': jnp.asarray(values)}}

def largest(folder):
    return max((p for p in folder.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)

def truncate(folder):
    path = largest(folder / 'state')
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])

def flip(folder):
    path = largest(folder / 'state')
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

damages = {
    'no sidecar': lambda folder: shutil.rmtree(folder / 'sidecar'),
    'no arrays': lambda folder: shutil.rmtree(folder / 'state'),
    'no data file': lambda folder: largest(folder / 'state').unlink(),
    'empty': lambda folder: [shutil.rmtree(p) for p in folder.iterdir() if p.is_dir()],
    'truncated': truncate,
    'bit': flip,
}
like = jax.eval_shape(lambda: state(2))
one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), like)
root = Path(sys.argv[1])
with checkpoint.Manager(root / 'whole', keep_last=2) as manager:
    for step in (1, 2):
        manager.save(state(step), {}, {})
for name, damage in damages.items():
    workdir = root / name
    shutil.copytree(root / 'whole', workdir)
    damage(workdir / 'checkpoints' / '2')
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        found = train.restore_newest(storage.place(workdir), like)
    same = np.array_equal(found['params']['w'], state(1)['params']['w'])
    loud = 'WARNING' in said.getvalue() and 'falling back' in said.getvalue()
    aside = (workdir / 'damaged' / '2-0').is_dir()
    print(name, int(found['step']), same, loud, aside, checkpoint.steps(workdir), sep='|')
"""


def test_each_kind_of_damage_is_told_and_the_checkpoint_before_is_used(tmp_path):
    result = script(DAMAGES, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line.split('|') for line in result.stdout.splitlines() if '|' in line]
    assert len(rows) == 6
    for name, *found in rows:
        assert found == ['1', 'True', 'True', 'True', '[1]'], name


# Several processes.

PROCESSES = """
import sys
sys.path.insert(0, 'tests')
import jax
port, count, index, what, workdir = sys.argv[1:]
if int(count) > 1:
    jax.distributed.initialize(f'localhost:{port}', int(count), int(index))
import jax.numpy as jnp
import numpy as np
from big_vit import checkpoint, runtime, sharding, trees
from test_checkpoint import abstract

mesh = sharding.make_mesh(1, len(jax.devices()), 1)
like = abstract(mesh)

def fill(path, leaf):
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        values = np.asarray(7, leaf.dtype)
    else:
        seed = sum(map(ord, str(path)))
        values = np.random.default_rng(seed).normal(size=leaf.shape).astype(leaf.dtype)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: values[index])

full = jax.tree_util.tree_map_with_path(fill, like)

def main(argv):
    with jax.set_mesh(mesh), jax.transfer_guard('disallow'):
        if what == 'save':
            with checkpoint.Manager(workdir, keep_last=2) as manager:
                manager.save(full, {'lr': 0.5}, {'test/top1': 0.25})
            return
        if what == 'no room':
            checkpoint.storage.free_bytes = lambda path: 1000 if index == '0' else 1e12
            with checkpoint.Manager(workdir, keep_last=2) as manager:
                manager.save(full, {}, {})
        found = checkpoint.restore(workdir, 7, like)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(full), strict=True):
        for a, b in zip(one.addressable_shards, other.addressable_shards, strict=True):
            np.testing.assert_array_equal(jax.device_get(a.data), jax.device_get(b.data))
    print('the same')

runtime.command(main)
"""


def processes(what, workdir, count, devices):
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, '-c', PROCESSES, str(port), str(count), str(i), what, str(workdir)],
            cwd=ROOT,
            env=environment(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    try:
        return [(*process.communicate(timeout=120), process.returncode) for process in started]
    finally:
        for process in started:
            process.kill()


@pytest.fixture(scope='module')
def saved_by_two(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('two') / 'w'
    for _, error, status in processes('save', workdir, 2, 2):
        assert status == 0, error
    return workdir


@pytest.mark.slow
def test_two_processes_save_and_one_or_two_restore(saved_by_two, tmp_path):
    sidecar = checkpoint.read_sidecar(saved_by_two, 7)
    assert sidecar['metrics'] == {'test/top1': 0.25}
    for count, devices in ((1, 1), (2, 2)):
        for output, error, status in processes('restore', saved_by_two, count, devices):
            assert status == 0 and 'the same' in output, error
    for _, error, status in processes('save', tmp_path / 'one', 1, 1):
        assert status == 0, error
    one = checkpoint.read_sidecar(tmp_path / 'one', 7)
    assert one['content_hash'] == sidecar['content_hash'], 'hashes depend on who saves'
    for output, error, status in processes('restore', tmp_path / 'one', 2, 2):
        assert status == 0 and 'the same' in output, error


@pytest.mark.slow
def test_what_one_process_cannot_do_ends_them_all(saved_by_two, tmp_path):
    import shutil

    for _, error, status in processes('no room', tmp_path / 'w', 2, 1):
        assert status == 2 and '0.0 MB are free' in error, error
    shutil.copytree(saved_by_two, tmp_path / 'damaged')
    state = tmp_path / 'damaged' / 'checkpoints' / '7' / 'state'
    data = max((state / 'ocdbt.process_1' / 'd').iterdir(), key=lambda path: path.stat().st_size)
    data.unlink()
    for _, error, status in processes('restore', tmp_path / 'damaged', 2, 2):
        assert status == 2 and 'checkpoints/7: ' in error, error


# An emulator of Google Cloud Storage, where one is installed.

EMULATOR = importlib.util.find_spec('gcp_storage_emulator') and importlib.util.find_spec('gcsfs')

# It does not send the generation of an object, which TensorStore compares.
SERVE = """
import sys, time
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

download = objects.download

def with_generation(request, response, storage, *args, **kwargs):
    where = request.params['bucket_name'], request.params['object_id']
    try:
        response['x-goog-generation'] = storage.get_file_obj(*where)['generation']
    except NotFound:
        pass
    return download(request, response, storage, *args, **kwargs)

objects.download = with_generation
from gcp_storage_emulator.server import create_server

create_server('localhost', int(sys.argv[1]), in_memory=True, default_bucket='bucket').start()
print('ready', flush=True)
time.sleep(3600)
"""

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({
        'total_steps': 200, 'batch_size': 16, 'image_size': 8, 'lr': 1e-2,
        'model': {'variant': 'mu/4', 'dtype': 'float32'}, 'data': {'name': 'digits'},
        'evals': {'test': {'split': 'test[:50]', 'every_steps': 20}},
        'checkpoint': {'every_steps': 10}, 'log': {'every_steps': 1},
    })
"""


@pytest.fixture
def bucket(monkeypatch):
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, '-c', SERVE, str(port)], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout.readline() == 'ready\n'
    for name, value in {
        'STORAGE_EMULATOR_HOST': f'http://localhost:{port}',
        'TENSORSTORE_GCS_HTTP_URL': f'http://localhost:{port}',
        'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none',
        'GOOGLE_CLOUD_PROJECT': 'none',
        'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
    }.items():
        monkeypatch.setenv(name, value)
    with server:
        yield 'gs://bucket'
        server.kill()


READ = """
import json, sys
from big_vit import checkpoint, metrics
steps = checkpoint.steps(sys.argv[1])
rows = [
    {k: v for k, v in row.items() if not k.startswith('time/')} for row in metrics.read(sys.argv[1])
]
sidecar = checkpoint.read_sidecar(sys.argv[1], steps[-1])
print(json.dumps([steps, rows, sidecar['content_hash']]))
"""


def contents(workdir):
    result = script(READ, workdir)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not EMULATOR, reason='needs gcp-storage-emulator and gcsfs')
def test_a_run_in_a_bucket_is_killed_damaged_resumed_and_ends_as_a_local_one(tmp_path, bucket):
    (tmp_path / 'c.py').write_text(CONFIG)
    local, remote = tmp_path / 'local', f'{bucket}/run'
    assert run('train', '--config', tmp_path / 'c.py', '--workdir', local).returncode == 0
    command = ('--config', tmp_path / 'c.py', '--workdir', remote)
    process = start('train', *command)
    output = []
    for line in process.stdout:
        output.append(line)
        if ' 35/200 ' in line:
            break
    else:
        pytest.fail(''.join(output))
    process.kill()
    process.communicate()
    steps, _, _ = contents(remote)
    assert 20 <= steps[-1] < 200
    result = run('train', *command)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f'resume  from step {steps[-1]} of {remote}' in result.stdout
    assert contents(remote)[0] == contents(local)[0] == [190, 200]
    assert contents(remote) == contents(local)

    damage = f"""
from big_vit import storage
path = storage.place('{remote}/checkpoints/200/state/manifest.ocdbt')
path.write_bytes(path.read_bytes()[:-3])
"""
    assert script(damage).returncode == 0
    result = run('train', *command)
    assert result.returncode == 0, result.stdout + result.stderr
    assert 'falling back' in result.stderr and 'resume  from step 190' in result.stdout
    assert contents(remote)[2] == contents(local)[2]
    for name, args in (('explore', [remote]), ('evaluate', ['--checkpoint', remote])):
        result = run(name, *args)
        assert result.returncode == 0 and 'checkpoints/200' in result.stdout, result.stderr


ODD = [b'[]', b'null', b'"x"', b'3', b'', b'{', b'[' * 100_000, b'{"a":' * 100_000, b'\xff\xfe']


@pytest.mark.parametrize('content', ODD, ids=lambda content: str(content[:12]))
def test_what_is_no_json_object_is_named_with_what_to_do(content):
    with pytest.raises(UserError, match=r'^FILE: is not .*; use another$') as caught:
        storage.parse_object(content, 'FILE', 'use another')
    assert len(str(caught.value)) < 400
    assert storage.parse_object('{"a": [1, null]}', 'FILE', '') == {'a': [1, None]}


@pytest.mark.parametrize('line', ODD, ids=lambda line: str(line[:12]))
def test_a_row_of_metrics_that_is_none_is_named(tmp_path, line):
    (tmp_path / metrics.FILE).write_bytes(b'{"step": 1, "a": 2}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(UserError, match='line 2: is not a row of metrics'):
        metrics.read(tmp_path)
