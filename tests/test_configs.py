"""Every config of configs/ is trained for three steps, evaluated, saved and resumed."""

from pathlib import Path

import pytest
from tiny import MODEL, RUN, overrides, write_idx

from big_vit import checkpoint, config, metrics, train, transfer

CONFIGS = sorted(Path('configs').glob('*.py'))
PRETRAIN = [path for path in CONFIGS if 'transfer' not in path.name]
TRANSFER = [path for path in CONFIGS if 'transfer' in path.name]


@pytest.fixture(scope='module')
def idx_folder(tmp_path_factory):
    return write_idx(tmp_path_factory.mktemp('idx') / 'data')


def smoke_overrides(path, folder):
    loaded = config.load(str(path), [], base={'model.variant': 'mu/4'})
    found = overrides(RUN, evals=tuple(loaded.evals))
    if loaded.data.name == 'idx':
        found.append(('data.path', str(folder)))
    return found


@pytest.mark.parametrize('path', PRETRAIN, ids=lambda path: path.stem)
def test_pretrain(path, idx_folder, tmp_path):
    model = {**MODEL, 'model.num_heads': '4'}
    settings = smoke_overrides(path, idx_folder) + overrides(model)
    first = [*settings, ('total_steps', '2'), ('schedule.name', 'constant')]
    assert train.run(config.load(str(path), first), tmp_path / 'w').step == 2
    whole = config.load(str(path), [*settings, ('schedule.name', 'constant')])
    assert train.run(whole, tmp_path / 'w', force=True).step == 3
    assert checkpoint.steps(tmp_path / 'w')[-1] == 3
    rows = metrics.read(tmp_path / 'w')
    assert [row['step'] for row in rows if 'train/loss' in row] == [1, 2, 3]
    for name in whole.evals:
        assert [row for row in rows if row['step'] == 3 and f'{name}/top1' in row]


@pytest.fixture(scope='module')
def start_point(tmp_path_factory):
    path = tmp_path_factory.mktemp('start') / 'w'
    settings = overrides(MODEL, RUN, {'data.num_classes': '10'}, evals=('test',))
    train.run(config.load('configs/pretrain_fdsl.py', settings), path)
    return path


@pytest.mark.parametrize('path', TRANSFER, ids=lambda path: path.stem)
def test_transfer(path, start_point, idx_folder, tmp_path):
    settings = [*smoke_overrides(path, idx_folder), ('init', str(start_point))]
    results = transfer.run(transfer.load_config(str(path), settings), tmp_path / 'w')
    assert results is not None
    for found in results.values():
        assert 0 <= found['test/top1'] <= 1 and found['test/count'] == 20
