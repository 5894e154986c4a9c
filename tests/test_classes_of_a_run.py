"""The names of a run's classes: kept with it, and met by whatever it is scored or goes on with."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import run
from PIL import Image

from big_vit import average, checkpoint, config, evaluate, train
from big_vit.build.experiment import build_experiment
from big_vit.errors import UserError
from big_vit.pretrained.adapt import head_by_name
from big_vit.pretrained.load import initial_params
from big_vit.workdir import known_classes

COLOURS = {'ant': (220, 30, 30), 'bee': (30, 220, 30), 'cat': (30, 30, 220)}
SETTINGS = {
    'total_steps': 12,
    'batch_size': 16,
    'image_size': 8,
    'lr': 1e-2,
    'model.variant': 'mu/4',
    'model.width': 32,
    'model.mlp_dim': 64,
    'model.num_heads': 2,
    'model.depth': 1,
    'model.dtype': 'float32',
    'data.name': 'folder',
    'data.split': 'train',
    'data.transform': 'resize(size)',
    'checkpoint.every_steps': 6,
    'checkpoint.keep_last': 2,
    'evals.test.split': 'train',
}


def picture(path, colour, i=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(i).integers(0, 30, (8, 8, 3))
    Image.fromarray((noise + colour).astype(np.uint8)).save(path)


def write(root, names, each=8):
    """Write a folder of pictures; `names` says which colour a class of which name has."""
    for name, colour in names.items():
        for i in range(each):
            picture(root / name / f'{i}.png', COLOURS[colour], i)
    return root


def settings_of(path, **more):
    return config.resolve({**SETTINGS, 'data.path': str(path), **more})


def scored(workdir, path, name='folder', **more):
    """Return top-1 on other data."""
    given = {'evals.test.name': name, 'evals.test.path': path, **more}
    step = checkpoint.steps(workdir)[-1]
    return evaluate.run(workdir, step, [(k, str(v)) for k, v in given.items()])['test']['top1']


def table(file, rows):
    lines = [('image', 'label'), *rows]
    file.write_text(''.join(f'{image},{label}\n' for image, label in lines))
    return file


@pytest.fixture(scope='module')
def insects(tmp_path_factory):
    """A run that tells ant, bee and cat apart, and its data."""
    root = tmp_path_factory.mktemp('insects')
    data = write(root / 'data', {name: name for name in COLOURS})
    result = train.run(settings_of(data), root / 'run')
    assert result.metrics['test/top1'] == 1
    return root / 'run', data


def test_names_are_kept_with_the_checkpoint_and_shown(insects):
    workdir, _ = insects
    sidecar = checkpoint.read_sidecar(workdir, 12)
    assert checkpoint.class_names(sidecar) == ('ant', 'bee', 'cat')
    assert checkpoint.class_names({}) is None
    assert '3 classes: ant, bee, cat' in run('explore', workdir).stdout


def test_other_data_meet_the_model_by_name(insects, tmp_path, capsys):
    workdir, _ = insects
    # By number, bee would be taken for ant and cat for bee.
    assert scored(workdir, write(tmp_path / 'two', {'bee': 'bee', 'cat': 'cat'})) == 1
    said = capsys.readouterr().err
    assert 'classes evals.test: folder:two' in said
    assert 'bee 0 -> 1, cat 1 -> 2' in said
    assert scored(workdir, write(tmp_path / 'one', {'cat': 'cat'})) == 1
    more = {'evals.test.classes': "('cat', 'ant')"}
    assert scored(workdir, write(tmp_path / 'all', dict.fromkeys(COLOURS, 'cat')), **more) == 0.5
    rows = ('cat/0.png', 'cat'), ('bee/1.png', 'ant')
    assert scored(workdir, table(tmp_path / 'all' / 'names.csv', rows), 'table') == 0.5


def test_a_class_that_the_model_has_not_is_refused_with_the_nearest(insects, tmp_path):
    workdir, data = insects
    odd = write(tmp_path / 'odd', {'Ant': 'ant', 'elephant': 'bee'})
    message = (
        r"evals\.test: folder:odd train has classes that the model has not \('Ant', nearest 'ant'"
    )
    with pytest.raises(UserError, match=message) as error:
        scored(workdir, odd)
    assert "'elephant'" in str(error.value)
    assert '\n' not in str(error.value)
    # A class of the training data that was renamed since.
    renamed = tmp_path / 'renamed'
    shutil.copytree(data, renamed)
    (renamed / 'ant').rename(renamed / 'elephant')
    with pytest.raises(UserError, match=r"train has classes that the model has not \('elephant'"):
        scored(workdir, renamed, **{'data.path': renamed})


def test_what_was_trained_on_may_change_where_it_is_not_scored(insects, tmp_path):
    workdir, _ = insects
    other = write(tmp_path / 'other', {'dog': 'cat', 'cow': 'ant'})
    own = write(tmp_path / 'own', {'cat': 'cat'})
    assert scored(workdir, own, **{'data.path': other}) == 1


@pytest.fixture
def changed(insects, tmp_path):
    """A run that stopped half-way, its settings, and its data, of which all ants are gone since."""
    workdir, data = insects
    again, photos = tmp_path / 'run', tmp_path / 'photos'
    shutil.copytree(workdir, again)
    shutil.rmtree(again / 'checkpoints' / '12')
    shutil.copytree(data, photos)
    text = (again / 'config.json').read_text()
    (again / 'config.json').write_text(text.replace(str(data), str(photos)))
    shutil.rmtree(photos / 'ant')
    return again, settings_of(photos), photos


def test_data_of_a_resumed_run_meet_its_classes_by_name(changed, capsys):
    workdir, settings, photos = changed
    known = known_classes(workdir, settings, force=False)
    assert (known.num_classes, known.names) == (3, ('ant', 'bee', 'cat'))
    # Of another config, which is refused, and of a new run nothing is known.
    assert known_classes(workdir, settings.replacing({'lr': 1.0}), force=False) is None
    assert known_classes(workdir / 'new', settings, force=False) is None
    source = build_experiment(settings, known=known).data.source
    assert (source.num_classes, np.unique(source.labels()).tolist()) == (3, [1, 2])
    assert 'classes data: folder:photos' in capsys.readouterr().err
    (photos / 'bee').rename(photos / 'hornet')
    message = r"data: folder:photos .*checkpoints/6 has not \('hornet'"
    with pytest.raises(UserError, match=message):
        train.run(settings, workdir)


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_its_own_numbers(changed):
    workdir, settings, _ = changed
    result = train.run(settings, workdir)
    assert (result.step, result.metrics['test/top1']) == (12, 1)
    names = checkpoint.class_names(checkpoint.read_sidecar(workdir, 12))
    assert names == ('ant', 'bee', 'cat')


def test_numbers_meet_the_names_that_are_numbers(insects, tmp_path):
    # As folders 1, 2 and 10 are sorted.
    names, colours = ('1', '10', '2'), tuple(COLOURS)
    params, sidecar = checkpoint.load_params(insects[0], 12)
    checkpoint.save_params(tmp_path / 'run', params, 12, sidecar['config'], names)
    data = write(tmp_path / 'data', dict(zip(names, colours, strict=True)))
    assert scored(tmp_path / 'run', data) == 1
    for ending in ('', '.0'):
        rows = [(f'{name}/{i}.png', f'{name}{ending}') for name in names for i in range(8)]
        assert scored(tmp_path / 'run', table(data / 'numbers.csv', rows), 'table') == 1
    padded = dict(zip(('01', '02', '10'), (colours[0], colours[2], colours[1]), strict=True))
    assert scored(tmp_path / 'run', write(tmp_path / 'padded', padded)) == 1
    rows.append(('1/0.png', '7'))
    with pytest.raises(UserError, match='has label 7, and the model no class for it'):
        scored(tmp_path / 'run', table(data / 'numbers.csv', rows), 'table')


def test_a_checkpoint_without_names_asks_the_training_data(insects, tmp_path, monkeypatch):
    workdir, _ = insects
    saved = checkpoint.read_sidecar(workdir, 12)
    monkeypatch.setattr(
        checkpoint,
        'read_sidecar',
        lambda *_: {key: value for key, value in saved.items() if key != 'class_names'},
    )
    assert scored(workdir, write(tmp_path / 'two', {'bee': 'bee', 'cat': 'cat'})) == 1


def test_neighbours_are_of_the_same_class_by_name(insects, tmp_path):
    # Files of val and dev, without train: each numbers classes of its own.
    workdir, data = insects
    for split, names in (('dev', ('ant', 'bee', 'cat')), ('val', ('bee', 'cat'))):
        rows = [(data / name / f'{i}.png', name) for name in names for i in range(8)]
        images = [path.read_bytes() for path, _ in rows]
        columns = {'image': images, 'label': [name for _, name in rows]}
        pq.write_table(pa.table(columns), tmp_path / f'{split}.parquet')
    where = {'name': 'parquet', 'path': str(tmp_path)}
    near = {'type': 'knn', 'k': '(1,)', 'split': 'val', 'train_split': 'dev', **where}
    find = {'type': 'retrieval', 'split': 'dev', 'gallery_split': 'val', 'ranks': '(1,)', **where}
    evals = {'test': near, 'find': find}
    given = [(f'evals.{name}.{k}', v) for name, keys in evals.items() for k, v in keys.items()]
    scores = evaluate.run(workdir, 12, given)
    assert scores['test']['1nn'] == 1
    # Ants are searched for in vain.
    assert scores['find']['recall@1'] == 1


def test_a_head_that_goes_on_is_ordered_by_name(insects, tmp_path):
    workdir, data = insects
    other = settings_of(data, init=str(workdir), **{'data.classes': ('cat', 'ant', 'bee')})
    parts = build_experiment(other)
    params = initial_params(other, keep_head=True)(parts)
    names = parts.class_names
    checkpoint.save_params(tmp_path / 'run', params, 1, other.to_dict(), names)
    assert scored(tmp_path / 'run', data) == 1
    # So is that of a mean.
    mean, _ = average.run([str(workdir), str(tmp_path / 'run')], [0.5, 0.5], str(tmp_path / 'mean'))
    assert scored(mean, data) == 1
    assert (
        checkpoint.class_names(checkpoint.read_sidecar(mean, 1)) == names == ('cat', 'ant', 'bee')
    )


def test_a_head_of_other_classes_is_left_out(insects, capsys):
    params = checkpoint.load_params(insects[0], 12)[0]
    names = ('ant', 'bee', 'cat')
    assert 'head' not in head_by_name(params, names, ('ant', 'bee', 'dog'), 'here')
    assert 'of ant, bee, cat, not of ant, bee, dog' in capsys.readouterr().err
    for unknown in (names, None):
        assert head_by_name(params, unknown, names, 'here') is params
