"""The whole path: train, stop, kill, resume, and what the workdir then holds."""

import json
import re
import shutil
import signal
import sys
import time

import jax
import numpy as np
import pytest
from commands import error_line, run, start
from tiny import write_idx

from big_vit import checkpoint, config, metrics, storage, train
from big_vit.build.experiment import build_experiment, example_indices
from big_vit.errors import UserError
from big_vit.journal import MAX_SKIPPED_IN_A_ROW
from big_vit.workdir import check_workdir

TINY = {
    'total_steps': 12,
    'batch_size': 16,
    'image_size': 8,
    'lr': 1e-2,
    'model.variant': 'mu/4',
    'model.dtype': 'float32',
    'data.name': 'digits',
    'evals.test.split': 'test[:50]',
    'evals.test.every_steps': 4,
    'checkpoint.every_steps': 3,
    'log.every_steps': 1,
}

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({
        'total_steps': 400, 'batch_size': 16, 'image_size': 8, 'lr': 1e-2, 'ema': 0.9,
        'model': {'variant': 'mu/4', 'dtype': 'float32', 'dropout': 0.05},
        'data': {'name': 'digits', 'transform': 'random_crop(size, 1)'},
        'evals': {'test': {'split': 'test[:50]', 'every_steps': 40}},
        'optim': {'weight_decay': 0.1},
        'schedule': {'warmup_steps': 20},
        'checkpoint': {'every_steps': 30}, 'log': {'every_steps': 7},
    })
"""


def rows_without_timing(workdir):
    return [
        {name: value for name, value in row.items() if not name.startswith(metrics.TIMING)}
        for row in metrics.read(workdir)
    ]


def hashes(workdir, step):
    leaves = checkpoint.read_sidecar(workdir, step)['leaves']
    return {name: leaf['hash'] for name, leaf in leaves.items()}


@pytest.fixture(scope='module')
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp('config') / 'tiny.py'
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory, config_file):
    workdir = tmp_path_factory.mktemp('uninterrupted') / 'w'
    result = run('train', '--config', config_file, '--workdir', workdir)
    assert result.returncode == 0, result.stdout + result.stderr
    return workdir, result


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('finished') / 'w'
    result = train.run(config.resolve(TINY), workdir)
    return workdir, result


def test_a_run_learns_and_leaves_config_metrics_and_checkpoints(uninterrupted):
    workdir, result = uninterrupted
    assert json.loads((workdir / 'config.json').read_text())['optim']['weight_decay'] == 0.1
    rows = metrics.read(workdir)
    train_rows = [row for row in rows if 'train/loss' in row]
    assert [row['step'] for row in train_rows] == [*range(7, 400, 7), 400]
    assert [row['step'] for row in rows if 'test/top1' in row] == [*range(40, 401, 40)]
    assert train_rows[0]['train/loss'] > 2.2
    assert rows[-1]['step'] == 400 and metrics.latest(rows)['test/top1'] > 0.3  # chance is 0.1
    assert {'time/examples_per_s', 'time/data_wait'} <= train_rows[-2].keys()
    # A CPU has no peak that a step could be measured by.
    assert 'time/mfu' not in train_rows[-2] and 'MFU' not in result.stdout
    assert checkpoint.steps(workdir) == [390, 400]
    assert 'compile' in result.stdout and 'done    step 400' in result.stdout


def test_the_resume_of_a_finished_run_changes_nothing(finished):
    workdir, first = finished
    before = hashes(workdir, 12), rows_without_timing(workdir)
    again = train.run(config.resolve(TINY), workdir)
    assert again.step == first.step == 12
    assert (hashes(workdir, 12), rows_without_timing(workdir)) == before
    assert again.metrics['test/top1'] == first.metrics['test/top1']


@pytest.mark.parametrize('kill_after', [45, pytest.param(170, marks=pytest.mark.slow)])
def test_kill_9_and_restart_ends_bit_identical(tmp_path, config_file, uninterrupted, kill_after):
    workdir = tmp_path / 'w'
    command = ('--config', config_file, '--workdir', workdir)
    process = start('train', *command)
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        rows = metrics.read(workdir)
        if rows and rows[-1]['step'] >= kill_after:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert metrics.read(workdir)[-1]['step'] < 400, 'killed too late to show anything'
    result = run('train', *command)
    assert result.returncode == 0, result.stdout + result.stderr
    assert hashes(workdir, 400) == hashes(uninterrupted[0], 400)
    assert rows_without_timing(workdir) == rows_without_timing(uninterrupted[0])


@pytest.mark.slow
def test_sigterm_saves_exits_0_and_the_restart_ends_bit_identical(
    tmp_path, config_file, uninterrupted
):
    workdir = tmp_path / 'w'
    command = ('--config', config_file, '--workdir', workdir)
    process = start('train', *command)
    while process.poll() is None and not metrics.read(workdir):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    saved = checkpoint.steps(workdir)[-1]
    assert 0 < saved < 400
    assert f'stopped by a signal: saved step {saved} of 400' in output
    result = run('train', *command)
    assert f'resume  from step {saved}' in result.stdout
    assert hashes(workdir, 400) == hashes(uninterrupted[0], 400)
    assert rows_without_timing(workdir) == rows_without_timing(uninterrupted[0])


@pytest.mark.slow
def test_a_damaged_last_checkpoint_costs_steps_but_not_the_run(
    tmp_path, config_file, uninterrupted
):
    workdir = tmp_path / 'w'
    shutil.copytree(uninterrupted[0], workdir)
    data = workdir / 'checkpoints' / '400' / 'state' / 'manifest.ocdbt'
    data.write_bytes(data.read_bytes()[:-3])
    result = run('train', '--config', config_file, '--workdir', workdir)
    assert result.returncode == 0, result.stdout + result.stderr
    assert 'WARNING' in result.stderr and 'falling back' in result.stderr
    assert 'resume  from step 390' in result.stdout
    assert hashes(workdir, 400) == hashes(uninterrupted[0], 400)
    assert rows_without_timing(workdir) == rows_without_timing(uninterrupted[0])
    assert (workdir / 'damaged' / '400-0' / 'state').is_dir()


def test_a_changed_config_is_refused_and_shown_unless_forced(finished):
    workdir, _ = finished
    before = (workdir / 'config.json').read_bytes()
    other = config.resolve({**TINY, 'lr': 2e-2})
    with pytest.raises(UserError, match=r'lr: 0\.01 -> 0\.02.*--force'):
        train.run(other, workdir)
    assert (workdir / 'config.json').read_bytes() == before


@pytest.mark.slow
def test_what_no_result_depends_on_may_change_and_is_said(tmp_path, finished, capsys):
    workdir = shutil.copytree(finished[0], tmp_path / 'w')
    shutil.rmtree(workdir / 'checkpoints' / '12')
    other = {'mesh.fsdp': 2, 'mesh.tensor': 4, 'accumulation': 4, 'model.remat': 'names'}
    capsys.readouterr()
    train.run(config.resolve({**TINY, **other, 'checkpoint.keep_last': 5}), workdir)
    shown = capsys.readouterr().out
    assert 'resume  from step 9' in shown
    said = (
        'config  changed since the last start: accumulation: 1 -> 4; checkpoint.keep_last: 2 -> 5'
    )
    assert (
        f"{said}; mesh.fsdp: -1 -> 2; mesh.tensor: 1 -> 4; model.remat: 'none' -> 'names'" in shown
    )
    got, want = (
        [row['train/loss'] for row in metrics.read(path) if 'train/loss' in row]
        for path in (workdir, finished[0])
    )
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_force_does_not_accept_another_architecture(finished):
    workdir, _ = finished
    before = (workdir / 'config.json').read_bytes()
    other = config.resolve({**TINY, 'model.mlp_dim': 64})
    with pytest.raises(UserError, match=r'MlpBlock_0/Dense_0/kernel is .*128.*64'):
        train.run(other, workdir, force=True)
    assert (workdir / 'config.json').read_bytes() == before


@pytest.mark.parametrize(
    'content, says',
    [(b'[]', r'config\.json: is not a JSON object'), (b'{"lr": []}', 'holds a run of another')],
)
def test_a_config_of_the_workdir_that_is_none_is_named(finished, tmp_path, content, says):
    workdir = shutil.copytree(finished[0], tmp_path / 'w')
    (workdir / 'config.json').write_bytes(content)
    with pytest.raises(UserError, match=f'{says}.*use another --workdir'):
        train.run(config.resolve(TINY), workdir)


def test_without_its_config_a_workdir_is_known_by_its_checkpoints(finished, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / 'w')
    (workdir / 'config.json').unlink()
    with pytest.raises(UserError, match=r'another config \(lr: 0\.01 -> 0\.02'):
        train.run(config.resolve({**TINY, 'lr': 2e-2}), workdir)


@pytest.mark.parametrize('name, kind', [('metrics.jsonl', 'file'), ('checkpoints', 'folder')])
def test_a_folder_for_a_file_in_a_workdir_and_the_reverse(name, kind, tmp_path):
    if kind == 'file':
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text('')
    with pytest.raises(UserError, match=f'--workdir: .*{name} is no {kind}'):
        check_workdir(storage.place(tmp_path), config.resolve(TINY), {}, False)


def test_more_steps_than_a_step_can_count_are_refused_before_the_workdir_exists(tmp_path):
    for key in ('total_steps', 'total_epochs', 'total_examples'):
        given = {k: v for k, v in TINY.items() if k != 'total_steps'}
        with pytest.raises(UserError, match=r'total_\* comes to .*the most are 2\*\*31 - 1'):
            train.run(config.resolve({**given, key: 1e30}), tmp_path / 'w')
    assert not (tmp_path / 'w').exists()


def test_a_key_that_nothing_reads_is_an_error_before_the_workdir_exists(tmp_path):
    with pytest.raises(UserError, match=r'optim\.momentum is set, but this run never reads it'):
        train.run(config.resolve({**TINY, 'optim.momentum': 0.5}), tmp_path / 'w')
    assert not (tmp_path / 'w').exists()


def test_a_run_of_nans_ends_with_the_examples(tmp_path, capsys):
    broken = config.resolve({**TINY, 'total_steps': 60, 'lr': 1e30, 'optim.clip': 0.0})
    with pytest.raises(UserError, match=r'were skipped.*lower lr.*examples \d+, '):
        train.run(broken, tmp_path / 'w')
    told = re.findall(
        r'WARNING step (\d+): .*not finite; its examples: (.*), ', capsys.readouterr().out
    )
    assert len(told) == MAX_SKIPPED_IN_A_ROW - 1
    parts = build_experiment(broken)
    for step, examples in told:
        expected = example_indices(parts, int(step) - 1)[:16]
        assert [int(n) for n in examples.split(', ')] == expected


@pytest.mark.slow
def test_keep_last_and_keep_every(tmp_path):
    keep = {'checkpoint.keep_last': 1, 'checkpoint.keep_every_steps': 6}
    train.run(config.resolve({**TINY, **keep, 'total_steps': 10}), tmp_path / 'w')
    assert checkpoint.steps(tmp_path / 'w') == [6, 10]


@pytest.mark.slow
def test_tensorboard_files_hold_what_the_jsonl_holds(tmp_path):
    train.run(config.resolve({**TINY, 'log.tensorboard': True}), tmp_path / 'w')
    (events,) = (tmp_path / 'w' / 'tensorboard').glob('events.*')
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import RecordWriter  # noqa: F401

    data, found, at = events.read_bytes(), {}, 0
    while at < len(data):  # A record: length, its checksum, the event, its checksum.
        length = int.from_bytes(data[at : at + 8], 'little')
        event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
        for value in event.summary.value:
            found[event.step, value.tag] = value.simple_value
        at += 16 + length
    for row in metrics.read(tmp_path / 'w'):
        for name, value in row.items():
            if name != 'step':
                assert found[row['step'], name] == pytest.approx(value, rel=1e-6), name


def test_unwritable_workdir(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=r'--workdir: cannot write to .*Not a directory'):
        train.run(config.resolve(TINY), tmp_path / 'file' / 'w')


def without_wandb(monkeypatch, settings):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    return settings.replacing({'log.wandb': 'project'}), 'log.wandb needs'


def without_a_compiler(monkeypatch, settings):
    def compile_step(*_):
        raise UserError('out of memory')

    monkeypatch.setattr(train, 'compile_step', compile_step)
    return settings, 'out of memory'


@pytest.mark.parametrize('fault', [without_wandb, without_a_compiler])
def test_a_start_that_fails_before_its_first_step_leaves_nothing(tmp_path, monkeypatch, fault):
    settings, message = fault(monkeypatch, config.resolve(TINY))
    with pytest.raises(UserError, match=message):
        train.run(settings, tmp_path / 'runs' / 'w')
    assert list(tmp_path.iterdir()) == []


def test_a_forced_start_that_fails_leaves_the_config_of_the_run(tmp_path, finished, monkeypatch):
    shutil.copytree(finished[0], tmp_path / 'w')
    before = contents(tmp_path / 'w')
    settings, message = without_a_compiler(
        monkeypatch, config.resolve({**TINY, 'lr': 0.5, 'total_steps': 14})
    )
    with pytest.raises(UserError, match=message):
        train.run(settings, tmp_path / 'w', force=True)
    assert contents(tmp_path / 'w') == before


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


@pytest.mark.slow
def test_what_was_killed_before_its_first_row_refuses_no_other_config(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(config.resolve(TINY).to_dict()))
    (tmp_path / 'metrics.jsonl').write_text('')
    settings = config.resolve({**TINY, 'total_steps': 2})
    assert train.run(settings, tmp_path).step == 2
    assert json.loads((tmp_path / 'config.json').read_text())['total_steps'] == 2


@pytest.mark.slow
def test_of_two_starts_at_once_one_trains_and_all_its_rows_are_there(
    tmp_path, config_file, uninterrupted
):
    for attempt in range(5):
        workdir = tmp_path / str(attempt)
        command = ('--config', config_file, '--workdir', workdir)
        both = [start('train', *command) for _ in range(2)]
        said = [process.communicate(timeout=240)[0] for process in both]
        by_status = {process.returncode: text for process, text in zip(both, said, strict=True)}
        assert sorted(by_status) == [0, 2], said
        winner = both[0 if both[0].returncode == 0 else 1].pid
        assert by_status[2].startswith(f'error: --workdir: {workdir} belongs to process {winner} ')
        assert by_status[2].count('\n') == 1
        assert rows_without_timing(workdir) == rows_without_timing(uninterrupted[0])
        assert hashes(workdir, 400) == hashes(uninterrupted[0], 400)


@pytest.mark.slow
def test_force_does_not_take_over_a_run_that_lives(tmp_path, config_file, uninterrupted):
    workdir = tmp_path / 'w'
    command = ('--config', config_file, '--workdir', workdir)
    process = start('train', *command)
    while process.poll() is None and not metrics.read(workdir):
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    before = contents(workdir)
    result = run('train', *command, '--force', '--config.lr=0.5')
    assert f'belongs to process {process.pid} on ' in error_line(result)
    assert contents(workdir) == before
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert rows_without_timing(workdir) == rows_without_timing(uninterrupted[0])


def test_an_evaluation_must_not_have_the_name_of_other_metrics(tmp_path):
    for name in ('train', 'time'):
        settings = config.resolve({**TINY, f'evals.{name}.split': 'test[:50]'})
        with pytest.raises(UserError, match=f"evals.{name}: '{name}' is the name of "):
            train.run(settings, tmp_path / 'w')
    assert not (tmp_path / 'w').exists()


def test_batch_must_divide_by_devices(tmp_path):
    with pytest.raises(UserError, match=r'batch_size=20 is not divisible by 8 devices.*try 16'):
        train.run(config.resolve({**TINY, 'batch_size': 20}), tmp_path / 'w')


@pytest.mark.slow
def test_meshes_and_accumulation_give_the_same_losses(tmp_path, finished):
    """End to end, data included: the per-step equivalences are in test_steps.py."""
    want = [row['train/loss'] for row in metrics.read(finished[0]) if 'train/loss' in row]
    other = {'mesh.fsdp': 4, 'mesh.tensor': 2, 'mesh.min_shard_size': 0, 'accumulation': 4}
    train.run(config.resolve({**TINY, **other}), tmp_path / 'w')
    got = [row['train/loss'] for row in metrics.read(tmp_path / 'w') if 'train/loss' in row]
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.slow
def test_resume_on_another_mesh_continues_the_same_losses(tmp_path, finished):
    want = [row['train/loss'] for row in metrics.read(finished[0]) if 'train/loss' in row]
    workdir = tmp_path / 'w'
    half = {**TINY, 'mesh.replica': 8, 'mesh.fsdp': 1, 'checkpoint.every_steps': 5}
    stopped = train.run(
        config.resolve({**half, 'total_steps': 5, 'schedule.name': 'constant'}), workdir
    )
    assert stopped.step == 5
    # The schedule of the first part must be that of the whole for the losses to agree.
    rest = {**TINY, 'mesh.fsdp': 2, 'mesh.tensor': 4, 'mesh.min_shard_size': 0}
    train.run(config.resolve({**rest, 'schedule.name': 'constant'}), workdir, force=True)
    whole = tmp_path / 'whole'
    train.run(config.resolve({**TINY, 'schedule.name': 'constant'}), whole)
    losses = [
        [row['train/loss'] for row in metrics.read(path) if 'train/loss' in row]
        for path in (workdir, whole)
    ]
    assert len(want) == len(losses[0]) == 12
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-5)


def test_help_and_one_line_errors_of_the_real_command(tmp_path):
    shown = run('train', '--help')
    assert shown.returncode == 0 and '--workdir' in shown.stdout
    line = error_line(
        run(
            'train',
            '--config',
            'configs/fashion_mnist.py',
            '--config.modle.depth=2',
            '--workdir',
            tmp_path / 'w',
        )
    )
    assert 'unknown key modle.depth; did you mean model.depth?' in line
    assert not (tmp_path / 'w').exists()


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (
            ['--config.modle.variant=S/16'],
            r'unknown key modle\.variant; did you mean model\.variant',
        ),
        (['--config.lr=fast'], r"lr must be a number of at least 0, got 'fast'"),
        (['--config.batch_size=20'], r'batch_size=20 is not divisible by 8 devices .*; try 16'),
        (['--config.mesh.fsdp=3'], r'mesh\.fsdp=3.* does not multiply to the 8 devices'),
        (['--config.image_size=30'], r'image_size 30x30 is not divisible by the 7x7 patch'),
        (
            ['--config.data.path=/nowhere'],
            r"data\.path: '/nowhere' is not a directory.*apt install",
        ),
        (['--config.data.num_classes=3'], r'data\.num_classes is 3 but example \d+ of .*has label'),
        (['--config.optim.lr_rules=(("nothing", 0.0), (".*", 1.0))'], r'matches no parameter'),
        (['--config.schedule.warmup_steps=99999'], r'schedule\.warmup_\* comes to 99999 steps'),
        (['--config.evals.test.transform=flip_lr'], r'evals\.test\.transform: flip_lr is random'),
        (['--config.model.num_heads=5'], r'model\.width=96 is not divisible by model\.num_heads=5'),
        (
            ['--config.data.name=tfds', '--config.data.tfds_name=cifar10'],
            r'data\.path: cifar10 is not prepared in .*big_vit\.prepare cifar10',
        ),
    ],
)
def test_mistakes_are_named_within_seconds_and_before_the_workdir_exists(tmp_path, flags, message):
    data = write_idx(tmp_path / 'idx')
    argv = ['--config', 'configs/fashion_mnist.py', '--workdir', str(tmp_path / 'w')]
    argv += [f'--config.data.path={data}', '--config.batch_size=16', *flags]
    began = time.monotonic()
    with pytest.raises(UserError, match=message) as caught:
        train.main(argv)
    assert '\n' not in str(caught.value)
    assert time.monotonic() - began < 15
    assert not (tmp_path / 'w').exists()


def test_explain_touches_nothing(tmp_path, config_file):
    result = run('train', '--config', config_file, '--explain')
    assert result.returncode == 0, result.stderr
    for text in ('learning rate', 'weight decay', 'every 40 steps (10 times)', 'replicated'):
        assert text in result.stdout
    assert [path.name for path in config_file.parent.iterdir()] == ['tiny.py']


def test_jax_sees_no_transfer_that_was_not_asked_for(tmp_path):
    with jax.transfer_guard_device_to_host('disallow'):
        train.run(config.resolve({**TINY, 'total_steps': 4}), tmp_path / 'w')
