"""One who runs many experiments: a sweep, the best checkpoint, runs side by side."""

import json
import re
import signal
import time

import pytest
from commands import error_line, run, start

from big_vit import checkpoint, metrics

pytestmark = pytest.mark.slow

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({
        'total_epochs': 6, 'batch_size': 50, 'image_size': 8, 'lr': 1e-2,
        'model': {'variant': 'mu/4', 'dtype': 'float32'},
        'data': {'name': 'digits', 'split': 'train[:500]'},
        'evals': {'val': {'split': 'train[500:700]', 'every_steps': 10}},
        'checkpoint': {'every_steps': 20}, 'log': {'every_steps': 5},
    })
"""


def ok(command, *args):
    result = run(command, *args)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp('many')
    (folder / 'digits.py').write_text(CONFIG)
    return folder


@pytest.fixture(scope='module')
def trained(home):
    """Three runs, of which the last stops early."""
    common = ['--config', home / 'digits.py', '--config.checkpoint.best=val/top1']
    for name, lr in (('a', '0.001'), ('b', '0.01')):
        ok('train', *common, '--workdir', home / 'runs' / name, f'--config.lr={lr}')
    early = [*common, '--config.lr=0.3', '--config.early_stopping.patience=2']
    early += ['--config.schedule.name=constant', '--config.total_epochs=400']
    early += ['--workdir', home / 'runs' / 'early']
    return early, ok('train', *early)


def test_a_sweep_is_killed_goes_on_and_tests_what_validation_chose(home):
    flags = ['--config', home / 'digits.py', '--workdir', home / 'sweep']
    flags += ['--config.evals.test.split=test', '--sweep', 'lr=0.0001,0.01', '--seeds', '2']
    flags += ['--at-once', '1']
    process = start('train', *flags)
    deadline = time.time() + 200
    while not (home / 'sweep' / 'trials.jsonl').exists() and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    first = (home / 'sweep' / 'trials.jsonl').read_text()
    shown = ok('train', *flags)
    assert (home / 'sweep' / 'trials.jsonl').read_text().startswith(first)
    assert re.search(r'lr=0\.01 +\* ', shown) and 'test top-1' in shown
    tested = json.loads((home / 'sweep' / 'test.json').read_text())
    assert tested['train']['setting'] == {'lr': 0.01} and len(tested['train']['tests']) == 2
    assert (home / 'sweep' / 'sweep.png').stat().st_size > 5_000
    assert 'step  ' not in ok('train', *flags) and (home / 'sweep' / 'test.json').exists()
    ok('report', home / 'sweep')
    assert 'Test, scored once' in (home / 'sweep' / 'report.html').read_text()


def test_early_stopping_says_so_and_says_it_again(home, trained):
    flags, shown = trained
    assert re.search(r'early   ends at step \d+ of 4000: for 2 evaluation', shown)
    again = ok('train', *flags)
    assert 'early   ends at step' in again and 'done    step' in again and 'compile' not in again


def test_the_best_checkpoint_is_evaluated_by_its_name(home, trained):
    rows = metrics.read(home / 'runs' / 'early')
    scores = {row['step']: row['val/top1'] for row in rows if 'val/top1' in row}
    step = max(scores, key=lambda step: (scores[step], -step))
    assert step in checkpoint.steps(home / 'runs' / 'early')
    best = f'{home}/runs/early@best'
    found = json.loads(ok('evaluate', best, '--json'))
    assert found['checkpoint'].endswith(f'checkpoints/{step}')
    assert found['val']['top1'] == pytest.approx(scores[step])
    assert ok('evaluate', '--checkpoint', best, '--json') == ok('evaluate', best, '--json')
    line = error_line(run('evaluate', best, '--checkpoint', best))
    assert 'name one of them' in line
    more = ['--config', home / 'digits.py', f'--config.init={best}', '--workdir', home / 'on']
    assert 'done    step 1' in ok('train', *more, '--config.total_steps=1')


def test_three_runs_are_on_one_page_and_in_one_table(home, trained):
    paths = [home / 'runs' / name for name in ('a', 'b', 'early')]
    ok('report', *paths)
    page = (home / 'runs' / 'report.html').read_text()
    assert all(f'{name}</th>' in page for name in ('a', 'b', 'early'))
    for key in ('lr', 'schedule.name', 'early_stopping.patience'):
        assert f'>{key}</th>' in page
    assert '>batch_size</th>' not in page and 'Transfer' not in page
    shown = ok('explore', *paths)
    assert 'val/top1' in shown and 'schedule.name' in shown and 'embedding/kernel' not in shown
    ok('explore', *paths, '--png', home / 'png')
    assert (home / 'png' / 'curves.png').stat().st_size > 10_000


def test_another_batch_size_says_what_it_does(home, trained):
    flags = ['--config', home / 'digits.py', '--config.checkpoint.best=val/top1']
    flags += ['--config.lr=0.01', '--workdir', home / 'runs' / 'b', '--config.batch_size=25']
    assert 'batch_size: 50 -> 25' in error_line(run('train', *flags))
    shown = ok('train', *flags, '--config.total_epochs=8', '--force')
    assert 'none is repeated or skipped' in shown and 'rate    ' in shown
    assert checkpoint.steps(home / 'runs' / 'b')[-1] == 60 + 2 * 500 // 25
