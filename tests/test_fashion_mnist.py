"""Real input: Debian's dataset-fashion-mnist, through the real command."""

from pathlib import Path

import pytest
from commands import run
from tiny import flags

from big_vit import checkpoint, metrics

FOLDER = Path('/usr/share/datasets/fashion-mnist')
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason='needs the Debian package dataset-fashion-mnist'
)
CONFIG = ('--config', 'configs/fashion_mnist.py')


@pytest.mark.slow
def test_a_short_run_learns_and_the_next_stage_starts_from_it(tmp_path):
    short = {
        'total_steps': '150',
        'evals.test.split': 'test[:2000]',
        'evals.test.every_steps': '150',
        'log.every_steps': '50',
    }
    result = run('train', *CONFIG, '--workdir', tmp_path / 'w', *flags(short))
    assert result.returncode == 0, result.stdout + result.stderr
    assert '60,000 examples, 10 classes, 28x28x1' in result.stdout
    rows = metrics.read(tmp_path / 'w')
    assert metrics.latest(rows)['test/top1'] > 0.5  # chance is 0.1
    waits = [row['time/data_wait'] for row in rows if 'time/data_wait' in row]
    assert len(waits) == 3
    on_digits = {
        'init': str(tmp_path / 'w'),
        'image_size': '28',
        'total_steps': '5',
        'transfer.control': 'false',
        'transfer.random_features': 'false',
    }
    second = run(
        'transfer',
        *('--config', 'configs/transfer_digits.py', '--workdir', tmp_path / 't'),
        *flags(on_digits),
    )
    assert second.returncode == 0, second.stdout + second.stderr
    assert checkpoint.steps(tmp_path / 't' / 'pretrained')[-1] == 5


@pytest.mark.slow
def test_the_whole_run_reaches_88_percent(tmp_path):
    result = run('train', *CONFIG, '--workdir', tmp_path / 'w', timeout=3000)
    assert result.returncode == 0, result.stdout + result.stderr
    assert metrics.latest(metrics.read(tmp_path / 'w'))['test/top1'] >= 0.88
