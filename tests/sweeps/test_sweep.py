"""Sweeps: trials in one program are those that run alone; validation chooses, the test is once."""

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT, environment, error_line, run
from commands import start as start_process
from test_data_commands import damaged
from test_data_commands import load as load_photos
from tiny import MODEL, RUN, flags, overrides

from big_vit import checkpoint, config, journal, metrics, report, runtime, train, transfer, trees
from big_vit.build.experiment import build_experiment, example_indices
from big_vit.errors import UserError
from big_vit.sweeps import study, sweep, vmapped_trials
from big_vit.sweeps.trial_journal import Trial
from big_vit.tasks import classification, registry
from big_vit.tasks.batch import model_inputs
from big_vit.tasks.task import Aux, Targets

SPLITS = {
    'data.split': 'train[:40%]',
    'evals.val.split': 'train[40%:60%]',
    'evals.test.split': 'test[:100]',
}
FAST = {'model.scan': 'false', 'total_steps': '4', 'checkpoint.every_steps': '4'}
ADAMW = {
    'optim.name': 'adamw',
    'optim.weight_decay': '0.1',
    'optim.layer_decay': '0.7',
    'optim.eps': '1e-3',  # Or the step of a parameter without gradient is that of rounding.
    'mixup': '0.5',
    'accumulation': '2',
}
NO_CONTROLS = {'transfer.control': 'false', 'transfer.random_features': 'false'}


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('pretrained') / 'w'
    more = {'data.num_classes': '8', 'total_steps': '2'}
    train.run(
        config.load('configs/pretrain_fdsl.py', overrides(MODEL, RUN, more, evals=('test',))),
        workdir,
    )
    return workdir


def load(init, *more):
    return transfer.load_config(
        'configs/transfer_digits.py', overrides(RUN, FAST, SPLITS, *more, {'init': str(init)})
    )


def last(folder):
    return checkpoint.load_params(folder, checkpoint.steps(folder)[-1])[0]


@pytest.mark.parametrize(
    'more',
    [
        {'transfer.train': 'head'},
        {'ema': '0.5', 'model.dropout': '0.2'},
        ADAMW,
        {'transfer.train': 'lora'},
    ],
    ids=['head', 'all', 'adamw', 'lora'],
)
@pytest.mark.slow
def test_trials_at_once_are_those_that_run_alone(more, pretrained, tmp_path):
    """Also of a random start, whose frozen parts differ from seed to seed."""
    settings = load(pretrained, more, {'transfer.random_features': 'false'})
    for start, own in sweep.starts(settings, 'evals.test.').items():

        def folder(trial, start=start):
            return tmp_path / start / f'{trial.lr}-{trial.seed}'

        found = vmapped_trials.run(own, [3, 4], [0.02, 0.1], folder, start=sweep.make_params)
        assert len(found) == 4
        for trial in (Trial(0.1, 3), Trial(0.02, 4)):
            alone = tmp_path / start / f'alone-{trial.lr}-{trial.seed}'
            one = own.replacing({'lr': trial.lr, 'seed': trial.seed})
            ended = train.run(one, alone, params=sweep.make_params(one))
            for name in ('val/loss', 'val/top1', 'train/loss', 'train/lr'):
                np.testing.assert_allclose(found[trial][name], ended.metrics[name], rtol=3e-5)
            mine, theirs = (trees.flatten(last(f)) for f in (folder(trial), alone))
            assert mine.keys() == theirs.keys()
            for name, leaf in theirs.items():
                np.testing.assert_allclose(mine[name], leaf, rtol=2e-4, atol=2e-6, err_msg=name)
            # A whole workdir: its config is the trial's, and the same command ends at once.
            assert train.run(one, folder(trial), params=sweep.make_params(one)).step == 4
        weights = [trees.flatten(last(folder(t)))['head/kernel'] for t in found]
        assert all(np.abs(a - weights[0]).max() > 1e-5 for a in weights[1:])


@pytest.mark.slow
def test_a_frozen_trunk_has_no_axis_of_trials(pretrained, tmp_path):
    """What makes the features shared: the trunk's numbers are there once, not once a trial."""
    settings = load(pretrained, {'transfer.train': 'head'}).without('transfer.', 'evals.test.')
    parts = build_experiment(settings)
    first = sweep.make_params(settings)(parts)
    program = vmapped_trials.VmappedTraining(settings, parts, same_start=True)
    now, frozen = program.start([0, 1], 3, first)
    fewer, _ = program.start([0, 1], 1, first)
    assert set(now['params']) == {'head/kernel', 'head/bias'}
    assert now['params']['head/kernel'].shape == (2, 3, 32, 10)
    assert frozen['embedding/kernel'].shape == first['embedding']['kernel'].shape
    one = vmapped_trials.bytes_needed(program.compile_step(fewer, frozen, 2, 1))
    assert vmapped_trials.bytes_needed(program.compile_step(now, frozen, 2, 3)) < 1.5 * one


DIGITS = {
    'total_steps': 24,
    'lr': 0.1,
    'batch_size': 16,
    'image_size': 8,
    'model.variant': 'mu/4',
    'model.dtype': 'float32',
    'data.name': 'digits',
    'optim.clip': 0.0,
    'evals.test.split': 'test[:50]',
    'evals.test.every_steps': 8,
    'log.every_steps': 8,
    'checkpoint.every_steps': 8,
}


def taught():
    """Classification whose student also follows its teacher, with a state of its own."""
    plain = classification.classification()

    def loss(model, run):
        supervised = plain.loss(model, run)

        def total(params, task_state, batch, rng, step):
            value, aux = supervised(params, task_state, batch, rng, step)
            logits, _ = model.apply({'params': params}, model_inputs(batch))
            shift = task_state['targets'] + task_state['centre']
            wanted = batch['targets']['logits'] - shift[None]
            return value + jnp.square(logits - wanted).mean(), Aux(aux.metrics, logits.mean(0))

        return total

    def targets(model, run):
        def rows(task_state, batch, rng, step):
            logits, _ = model.apply({'params': task_state['teacher']}, model_inputs(batch))
            return {'logits': logits + jax.random.normal(rng, logits.shape)}

        return Targets(rows, lambda task_state, rows, step: rows['logits'].mean(0))

    return plain._replace(
        name='taught',
        loss=loss,
        targets=targets,
        state=lambda params: {'centre': params['head']['bias'] * 0},
        after_update=lambda params, task_state, carried, step: {
            'centre': task_state['centre'] + 0.1 * carried
        },
        teacher_rate=lambda step, total: 0.5 / (1.0 + step),
    )


TAUGHT = {
    'task.name': 'taught',
    'total_steps': 6,
    'evals.test.every_steps': 6,
    'checkpoint.every_steps': 3,
    'accumulation': 2,
    'model.scan': True,
    'model.depth': 2,
    'optim.name': 'adamw',
    'optim.sam_rho': 0.1,
    'optim.eps': 1e-3,
    'optim.clip': 0.5,
    'optim.clip_by': 'tensor',
    'optim.weight_decay': 0.04,
    'optim.weight_decay_end': 0.4,
    'optim.freeze_steps': (('head/.*', 2), ('.*', 0)),
    'optim.freeze_by': 'gradient',
    'optim.lr_rules': (('pos_embedding|cls|embedding/.*', 0.0), ('.*', 1.0)),
    'schedule.name': 'cosine_dino',
    'schedule.warmup_steps': 2,
}


@pytest.mark.slow
def test_trials_at_once_have_teachers_and_states_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.TASKS, 'taught', taught)
    settings = config.resolve(DIGITS | TAUGHT)

    def folder(trial):
        return tmp_path / f'{trial.lr:g}-{trial.seed}'

    found = vmapped_trials.run(settings, [3, 4], [0.02, 0.1], folder, start=sweep.make_params)
    assert len(found) == 4
    for trial in (Trial(0.1, 3), Trial(0.02, 4)):
        alone = tmp_path / f'alone-{trial.lr:g}-{trial.seed}'
        one = settings.replacing({'lr': trial.lr, 'seed': trial.seed})
        ended = train.run(one, alone)
        for name in ('test/loss', 'train/loss', 'train/lr', 'train/weight_decay'):
            np.testing.assert_allclose(found[trial][name], ended.metrics[name], rtol=3e-5)
        parts = build_experiment(one)
        mine, theirs = (
            trees.flatten(jax.device_get(checkpoint.restore(f, 6, parts.abstract_state)))
            for f in (folder(trial), alone)
        )
        for name, leaf in theirs.items():
            np.testing.assert_allclose(mine[name], leaf, rtol=2e-4, atol=2e-6, err_msg=name)
        assert np.abs(mine['task/centre']).max() > 1e-4
        assert np.abs(mine['ema/head/kernel'] - mine['params/head/kernel']).max() > 1e-4
    # One that ran with others goes on as it would alone, from the middle.
    shutil.rmtree(folder(trial) / 'checkpoints' / '6')
    again = train.run(one, folder(trial))
    np.testing.assert_allclose(again.metrics['test/loss'], ended.metrics['test/loss'], rtol=3e-5)


def ran_at_once(folder, rates=(0.02, 0.1)):
    return vmapped_trials.run(
        config.resolve(DIGITS), [3], rates, lambda t: folder / f'{t.lr:g}', start=sweep.make_params
    )


@pytest.fixture(scope='module')
def healthy(tmp_path_factory):
    folder = tmp_path_factory.mktemp('healthy')
    return folder, ran_at_once(folder)


@pytest.mark.slow
def test_a_trial_that_diverges_is_said_and_the_others_go_on_to_the_bit(tmp_path, healthy, capsys):
    found = ran_at_once(tmp_path, (0.02, 1e30))
    warnings = [line for line in capsys.readouterr().out.splitlines() if 'WARNING' in line]
    assert len(warnings) == journal.MAX_SKIPPED_IN_A_ROW
    assert all('lr 1e+30 seed 3: ' in line for line in warnings)
    own = config.resolve({**DIGITS, 'seed': 3})
    for line in warnings[:-1]:
        step, examples = re.match(
            r'WARNING step (\d+), .*: update skipped, .* not finite; its examples: (.*), \.\.\.',
            line,
        ).groups()
        expected = example_indices(build_experiment(own), int(step) - 1)[:16]
        assert [int(n) for n in examples.split(', ')] == expected
    assert re.search(r'the last 20 updates up to step 2\d were skipped', warnings[-1])
    folder, others = healthy
    assert all(values['train/skipped'] == 0 for values in others.values())
    assert found[Trial(0.02, 3)] == others[Trial(0.02, 3)]
    for name, leaf in trees.flatten(last(folder / '0.02')).items():
        np.testing.assert_array_equal(trees.flatten(last(tmp_path / '0.02'))[name], leaf)
    rows = metrics.read(tmp_path / '1e+30')
    assert rows[-1]['step'] == 24 and found[Trial(1e30, 3)]['train/skipped'] >= 20
    hidden = {'train/skipped_in_a_row', 'train/loss_spike', 'train/grad_norm_spike'}
    assert not hidden & {name for row in rows for name in row}


def rows_without_timing(folder):
    return [
        {name: x for name, x in row.items() if not name.startswith(metrics.TIMING)}
        for row in metrics.read(folder)
    ]


@pytest.mark.slow
def test_trials_that_a_signal_stops_go_on_to_the_bit(tmp_path, healthy, capsys, monkeypatch):
    """Also where a kill has left the newest save with some of them alone."""

    @contextlib.contextmanager
    def stop_signals(_):
        yield lambda step: step == 10

    with monkeypatch.context() as patch, pytest.raises(vmapped_trials.Stopped):
        patch.setattr(runtime, 'stop_signals', stop_signals)
        ran_at_once(tmp_path)
    said = capsys.readouterr().out
    assert 'stopped by a signal: saved step 10 of 24' in said and 'resume  ' not in said
    assert checkpoint.steps(tmp_path / '0.02') == checkpoint.steps(tmp_path / '0.1') == [8, 10]
    shutil.rmtree(tmp_path / '0.1' / 'checkpoints' / '10')
    folder, whole = healthy
    assert ran_at_once(tmp_path) == whole
    assert re.search(r'resume  from step 8 of .*/0\.02', capsys.readouterr().out)
    for rate in ('0.02', '0.1'):
        rows = rows_without_timing(tmp_path / rate)
        assert rows == rows_without_timing(folder / rate) and rows[-1]['step'] == 24
        content = [
            checkpoint.read_sidecar(each / rate, 24)['content_hash'] for each in (folder, tmp_path)
        ]
        assert content[0] == content[1]
        assert not (tmp_path / rate / 'owner.json').exists()


@pytest.mark.slow
def test_damaged_examples_of_trials_are_counted_and_too_many_end_them(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, 'MIN_EXAMPLES_FOR_RATE', 60)
    settings = load_photos(
        damaged(tmp_path, {7, 8}),
        **{'data.on_error': 'skip', 'data.split': 'train', 'total_steps': '8'},
        **{'evals.test.split': 'train'},
    )
    seeds, rates = [0, 1], [0.01, 0.1]

    def ran(name, one):
        vmapped_trials.run(
            one, seeds, rates, lambda t: tmp_path / name / str(t), start=sweep.make_params
        )

    with pytest.raises(UserError, match=r'of the last 64 examples .* data\.max_error_rate=0\.01'):
        ran('a', settings)
    ran('b', settings.replacing({'data.max_error_rate': 0.2}))
    for seed in seeds:
        replaced = [
            [row['train/replaced'] for row in metrics.read(tmp_path / 'b' / str(Trial(rate, seed)))
             if 'train/replaced' in row]
            for rate in rates
        ]  # fmt: skip
        # Two epochs of sixty in eight steps of sixteen, and eight examples of a third.
        assert 4 <= sum(replaced[0]) <= 6 and replaced[0] == replaced[1]


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / study.ROWS).read_text().splitlines()]


@pytest.fixture(scope='module')
def swept(pretrained, tmp_path_factory):
    """The command itself, with a control."""
    workdir = tmp_path_factory.mktemp('swept') / 'w'
    args = ['--config', 'configs/transfer_digits.py', '--workdir', workdir]
    args += flags(RUN, FAST, SPLITS, {'init': pretrained, 'transfer.train': 'head'})
    args += ['--sweep', 'lr=0.01,0.3', '--seeds', '2']
    result = run('transfer', *args)
    assert result.returncode == 0, result.stdout + result.stderr
    return workdir, args, result


def test_validation_chooses_and_the_test_is_scored_once(swept):
    workdir, args, result = swept
    rows = rows_of(workdir)
    assert len(rows) == 2 * 2 * 2
    assert {row['start'] for row in rows} == {'pretrained', 'control'}
    written = json.loads((workdir / study.TEST).read_text())
    for start, found in written.items():
        means = {
            rate: np.mean([r['val/top1'] for r in rows if (r['start'], r['lr']) == (start, rate)])
            for rate in (0.01, 0.3)
        }
        assert means[found['setting']['lr']] == max(means.values())
        assert len(found['tests']) == 2 and found['count'] == 100
        assert found['mean'] == pytest.approx(np.mean(found['tests']))
        assert found['error'] == pytest.approx(np.std(found['tests'], ddof=1) / 2**0.5)
    for row in rows:
        history = metrics.read(workdir / row['workdir'])
        assert history[-1]['val/top1'] == row['val/top1']
        assert not any(name.startswith('test/') for one in history for name in one)
    assert (workdir / 'sweep.png').stat().st_size > 5_000
    assert 'test top-1' in result.stdout and 'control: same recipe from random' in result.stdout
    before = (workdir / study.ROWS).read_bytes(), (workdir / study.TEST).read_bytes()
    again = run('transfer', *args)
    assert again.returncode == 0 and 'trials  ' not in again.stdout
    assert before == ((workdir / study.ROWS).read_bytes(), (workdir / study.TEST).read_bytes())
    assert again.stdout[-600:] == result.stdout[-600:]


def test_the_report_has_the_sweep_and_what_it_chose(swept):
    workdir, _, _ = swept
    page = report.document(str(workdir))
    written = json.loads((workdir / study.TEST).read_text())
    for found in written.values():
        assert f'{found["mean"]:.2%}' in page and f'{found["error"]:.2%}' in page
    assert page.count('lr=0.01') >= 2 and 'control: same recipe from random' in page
    assert 'transfer.json' not in page and '<h3>pretrained</h3>' in page


def test_the_folder_of_a_sweep_is_the_first_of_what_it_chose(swept, capsys, tmp_path):
    """Whatever takes a run takes it; one that has not chosen, or chose elsewhere, is told."""
    workdir, _, _ = swept
    written = json.loads((workdir / study.TEST).read_text())
    trial, step = checkpoint.locate(str(workdir))
    assert str(trial) == str(workdir / written['pretrained']['trials'][0]) and step == 4
    said = capsys.readouterr().err
    assert 'the first of 2 seeds; the other starts, control, are in its test.json' in said
    (tmp_path / 'trials/train/one/checkpoints').mkdir(parents=True)
    with pytest.raises(UserError, match=r'is a sweep that has not chosen yet.*trials/train/one'):
        checkpoint.locate(str(tmp_path))
    for trials in ([], ['../elsewhere'], ['/tmp/elsewhere'], 'trials/train/one'):
        (tmp_path / study.TEST).write_text(json.dumps({'train': {'trials': trials}}))
        with pytest.raises(UserError, match='is not what a sweep chose'):
            checkpoint.locate(str(tmp_path))


def test_choosing_again_after_the_test_is_refused(swept, monkeypatch, tmp_path):
    workdir, args, _ = swept
    written = json.loads((workdir / study.TEST).read_text())
    chosen = written['pretrained']['setting']['lr']
    other = [str(a).replace('lr=0.01,0.3', f'lr={0.3 if chosen == 0.01 else 0.01}') for a in args]
    message = error_line(run('transfer', *other))
    assert 'was scored with another choice for pretrained' in message and '--force' in message


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_with_what_is_missing(pretrained, tmp_path):
    words = [sys.executable, '-m', 'big_vit.transfer', '--config', 'configs/transfer_digits.py']
    words += ['--workdir', str(tmp_path / 'w'), '--sweep', 'lr=0.01,0.1', '--seeds', '2']
    words += ['--at-once', '1', *flags(RUN, FAST, SPLITS, NO_CONTROLS, {'init': pretrained})]
    words = [str(word) for word in words]
    file, lines = tmp_path / 'w' / study.ROWS, 0
    first = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not file.exists() and time.monotonic() < until and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    lines = file.read_text().splitlines() if file.exists() else []
    result = subprocess.run(
        words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert file.read_text().splitlines()[: len(lines)] == lines
    assert len(rows_of(tmp_path / 'w')) == 4


@pytest.mark.slow
@pytest.mark.parametrize('at_once', [(), ('--at-once', '1')], ids=['at once', 'one by one'])
def test_a_sweep_that_is_stopped_ends_as_one_that_was_not(pretrained, tmp_path, at_once):
    more = {'total_steps': '300', 'checkpoint.every_steps': '50', 'log.every_steps': '10'}
    words = ['--config', 'configs/transfer_digits.py', '--sweep', 'lr=0.01,0.1', *at_once]
    words += flags(RUN, FAST, SPLITS, NO_CONTROLS, more, {'init': pretrained})
    assert run('transfer', *words, '--workdir', tmp_path / 'whole').returncode == 0
    process = start_process('transfer', *words, '--workdir', tmp_path / 'parts')
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        files = list((tmp_path / 'parts').glob('trials/*/*/metrics.jsonl'))
        if files and files[0].stat().st_size:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and 'stopped by a signal: saved step' in output, output
    again = run('transfer', *words, '--workdir', tmp_path / 'parts')
    assert again.returncode == 0 and 'resume  from step' in again.stdout, again.stderr
    whole, parts = (rows_of(tmp_path / name) for name in ('whole', 'parts'))
    for row in (*whole, *parts):
        del row['seconds']
    assert parts == whole
    for row in whole:
        hashes = [
            checkpoint.read_sidecar(tmp_path / name / row['workdir'], 300)['content_hash']
            for name in ('whole', 'parts')
        ]
        assert hashes[0] == hashes[1]
    tests = [json.loads((tmp_path / name / study.TEST).read_text()) for name in ('whole', 'parts')]
    assert tests[0] == tests[1]


@pytest.mark.slow
def test_more_rates_are_added_to_what_is_there(pretrained, tmp_path):
    settings = load(pretrained, NO_CONTROLS, {'transfer.train': 'head'})
    sweep.run(settings, tmp_path, ['lr=0.01,0.1'])
    before = rows_of(tmp_path)
    (tmp_path / study.TEST).unlink()  # As if it was killed before.
    sweep.run(settings, tmp_path, ['lr=0.01,0.1,0.2', 'optim.momentum=0.9,0.5'], 1)
    rows = rows_of(tmp_path)
    assert rows[:2] == before
    assert len({(row['setting']['lr'], row['setting'].get('optim.momentum')) for row in rows}) == 8


@pytest.mark.parametrize(
    'text, key, found',
    [
        ('lr=1e-3,3e-3', 'lr', ['1e-3', '3e-3']),
        ('image_size=(32,32),48', 'image_size', ['(32,32)', '48']),
        ("data.transform='a(1,2)|b','c'", 'data.transform', ["'a(1,2)|b'", "'c'"]),
        ('optim.lr_rules=((".*",1.0),)', 'optim.lr_rules', ['((".*",1.0),)']),
    ],
)
def test_values_of_a_sweep(text, key, found):
    assert sweep.values(text) == (key, found)


@pytest.mark.parametrize(
    'swept, more, message',
    [
        ('lr', {}, 'write --sweep KEY=VALUE'),
        ('lr=', {}, 'write --sweep KEY=VALUE'),
        ('lr=0.1,0.1', {}, 'a value comes twice'),
        ('lrr=0.1,1', {}, 'unknown key lrr; did you mean lr'),
        ('lr=0.1,often', {}, 'lr must be a number'),
        ('seed=1,2', {}, '--seeds N'),
        ('evals.val.split=train,test', {}, 'could not be compared'),
        ('lr=0.1,1', {'transfer.validation': 'vall'}, 'evals.vall, which is not there: hold out'),
        ('lr=0.1,1', {'transfer.test': 'tst'}, "transfer.test='tst' is no evaluation"),
        ('lr=0.1,1', {'transfer.validation': 'test'}, 'must not be the same'),
        ('lr=0.1,1', {'evals.val.split': 'train[30%:50%]'}, r'have 144 examples in common'),
        ('lr=0.1,1', {'evals.val.split': 'test[50:]'}, r'evals.test.split=.* have 50 examples'),
        ('lr=0.1,1', {'evals.val.split': 'train[99%:99%]'}, 'holds no example'),
        ('lr=0.1,1', {'evals.val.type': 'knn'}, 'evals.val.type must be classification'),
        ('lr=0.1,1', {'switch': 'runs/a'}, 'switch goes on with a run of train'),
        ('lr=0.1,1', {'transfer.train': 'head', 'optim.lr_rules': '((".*", 1.0),)'}, 'set one'),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_anything_is_trained(swept, more, message, pretrained, tmp_path):
    with pytest.raises(UserError, match=message):
        sweep.run(load(pretrained, NO_CONTROLS, more), tmp_path / 'w', [swept])
    assert not (tmp_path / 'w').exists()


@pytest.mark.parametrize('more', [{}, {'data.on_error': 'skip'}], ids=['', 'skip'])
def test_what_does_not_fit_is_parted(more, pretrained, tmp_path, monkeypatch):
    seen, tried = [], []

    def small(own, seeds, rates, folder, **_):
        tried.append(len(seeds) * len(rates))
        if len(seeds) * len(rates) > 2:
            raise vmapped_trials.DoNotFit
        seen.append((tuple(seeds), tuple(rates)))
        return {Trial(rate, seed): {} for seed in seeds for rate in rates}

    monkeypatch.setattr(vmapped_trials, 'run', small)
    monkeypatch.setattr(sweep, '_train_alone', lambda own, trial, *_: seen.append(trial) or {})
    settings = load(pretrained, more)
    found = sweep.train_all(settings, [0, 1], [0.1, 0.2, 0.3], lambda t: tmp_path, '', None)
    assert set(found) == {Trial(rate, seed) for seed in (0, 1) for rate in (0.1, 0.2, 0.3)}
    assert all(isinstance(one, Trial) or len(one[0]) * len(one[1]) == 2 for one in seen)
    assert tried[0] == 6


@pytest.mark.slow
def test_a_trial_that_diverges_does_not_end_the_others(pretrained, tmp_path, capsys):
    more = {'total_steps': '25', 'optim.clip': '0', 'skip_sigmas': '0'}
    settings = load(pretrained, NO_CONTROLS, more)
    found = sweep.run(settings, tmp_path, ['lr=0.01,1e30'], at_once=1)
    assert found['pretrained']['setting'] == {'lr': 0.01}
    assert 'WARNING pretrained lr 1e+30 seed 0: the last 20 updates' in capsys.readouterr().err
    assert [row['val/top1'] is None for row in rows_of(tmp_path)] == [False, True]


def test_a_key_without_effect_is_refused_at_once_as_it_is_alone(pretrained, tmp_path):
    settings = load(pretrained, NO_CONTROLS, {'optim.b2': '0.9'})
    for at_once in (None, 1):
        with pytest.raises(UserError, match=r'optim\.b2 is set, but this run never reads it'):
            sweep.run(settings, tmp_path / str(at_once), ['lr=0.1,1'], at_once=at_once)


@pytest.mark.slow
def test_trials_at_once_have_event_files_and_evaluations_of_all_types(pretrained, tmp_path):
    more = {
        'log.tensorboard': 'true',
        'transfer.train': 'head',
        'evals.near.type': 'knn',
        'evals.near.k': '3',
        'evals.near.split': 'train[40%:60%]',
        'evals.near.train_split': 'train[:20%]',
    }
    sweep.run(load(pretrained, NO_CONTROLS, more), tmp_path, ['lr=0.1,1'])
    for row in rows_of(tmp_path):
        folder = tmp_path / row['workdir']
        assert list((folder / 'tensorboard').iterdir())
        # Frozen features: the same neighbours whatever the head learned.
        assert metrics.latest(metrics.read(folder))['near/3nn'] > 0.2


def test_a_duration_is_swept_in_another_unit_than_the_configs(pretrained, tmp_path):
    settings = load(pretrained, NO_CONTROLS, {'transfer.train': 'head'})
    each = sweep.settings(settings, ['total_epochs=0.1,0.2'])
    own = [config.with_values(settings, one) for one in each]
    assert [(one.total_epochs, one.total_steps) for one in own] == [(0.1, None), (0.2, None)]


def test_a_mean_of_one_has_no_error_and_nan_loses():
    assert np.isnan(study.mean_and_error([0.5])[1])
    mean, error = study.mean_and_error([0.1, 0.2, 0.6])
    assert mean == pytest.approx(0.3) and error == pytest.approx(
        np.std([0.1, 0.2, 0.6], ddof=1) / 3**0.5
    )
    rows = [
        {'start': 's', 'setting': {'lr': rate}, 'seed': seed, 'val/top1': value}
        for rate, values in ((0.1, (0.5, 0.5)), (1.0, (float('nan'), 0.9)), (0.2, (0.4, 0.7)))
        for seed, value in enumerate(values)
    ]
    assert [row['setting']['lr'] for row in study.choose(rows, 's', 'val/top1')] == [0.2, 0.2]
