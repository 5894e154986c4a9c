"""`python -m big_vit.predict` and `big_vit.load`: answers are those that the evaluation scored."""

import csv
import dataclasses
import json
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from commands import error_line, run, run_many, start
from PIL import Image
from test_export import weights_of
from tiny import write_folder

import big_vit
from big_vit import config, evaluate, export, interop, predict, train, trees
from big_vit.errors import UserError
from big_vit.inspection import loaded_model

SETTINGS = {
    'total_steps': 8,
    'batch_size': 16,
    'image_size': 16,
    'lr': 1e-2,
    'model.variant': 'mu/4',
    'model.width': 32,
    'model.mlp_dim': 64,
    'model.num_heads': 2,
    'model.depth': 1,
    'model.dtype': 'float32',
    'data.name': 'folder',
    'data.transform': 'rrc(size) | flip_lr | normalize()',
    'evals.test.split': 'train',
    'evals.test.transform': 'resize_small(20) | central_crop(size) | normalize()',
}


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    """A run that has learned a little, and its pictures of three classes."""
    root = tmp_path_factory.mktemp('predict')
    data = write_folder(root / 'data', examples=30)
    train.run(config.resolve({**SETTINGS, 'data.path': str(data)}), root / 'run')
    return root / 'run', data


@pytest.fixture(scope='module')
def model(shapes):
    return big_vit.load(shapes[0], batch_size=16)


def pictures_of(data):
    return sorted(str(path) for path in data.rglob('*.jpg'))


def test_what_is_predicted_is_what_the_evaluation_scores(shapes, model):
    workdir, data = shapes
    paths = pictures_of(data)
    best = [answer[0][0] for answer in model.predict(paths, top=1)]
    right = np.mean(
        [name == Path(path).parent.name for name, path in zip(best, paths, strict=True)]
    )
    assert right == pytest.approx(evaluate.run(workdir, 8)['test']['top1'])
    assert set(best) <= {'class0', 'class1', 'class2'} == set(model.class_names)


def test_probabilities_are_a_softmax_of_the_features_by_the_head(shapes, model):
    paths = pictures_of(shapes[1])[:5]
    head = {name: np.asarray(x, np.float64) for name, x in model.params['head'].items()}
    logits = model.embed(paths).astype(np.float64) @ head['kernel'] + head['bias']
    wanted = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(model(paths), wanted, atol=1e-5)


def test_paths_images_and_arrays_are_answered_alike_in_any_batch(shapes, model):
    paths = pictures_of(shapes[1])[:3]
    images = [Image.open(path).convert('RGB') for path in paths]
    wanted = model(paths)
    np.testing.assert_allclose(model(images), wanted, atol=0.02)  # JPEG in reduced size or whole.
    np.testing.assert_allclose(model([np.asarray(i) for i in images]), model(images), atol=1e-6)
    np.testing.assert_allclose(model(paths[1:2])[0], wanted[1], atol=1e-5)
    assert model([]).shape == (0, 3)


def test_the_terminal_names_the_best_classes_and_what_cannot_be_read(shapes, tmp_path):
    workdir, data = shapes
    shutil.copytree(data / 'class0', tmp_path / 'mine')
    (tmp_path / 'mine' / 'broken.jpg').write_bytes(b'\xff\xd8\xff no picture')
    (tmp_path / 'mine' / 'notes.txt').write_text('hello')
    result = run('predict', workdir, tmp_path / 'mine', '--top', '2')
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 10 and all(line.count('class') >= 2 and '%' in line for line in lines)
    assert 'broken.jpg: ' in result.stderr and '1 of 11 pictures cannot be read' in result.stderr
    assert '1 file left out (1 .txt)' in result.stderr


def test_many_broken_pictures_in_a_row_do_not_end_it(shapes, model, tmp_path, capsys):
    workdir, data = shapes
    for i in range(40):
        (tmp_path / f'{i:02d}.jpg').write_bytes(b'nothing')
    good = pictures_of(data)[0]
    shutil.copy(good, tmp_path / '50.jpg')
    predict.main([str(workdir), str(tmp_path), '--out', str(tmp_path / 'out.jsonl')])
    (row,) = (json.loads(line) for line in (tmp_path / 'out.jsonl').read_text().splitlines())
    assert row['file'].endswith('50.jpg')
    np.testing.assert_allclose(row['probabilities'], np.sort(model([good])[0])[::-1], atol=1e-5)
    out = tmp_path / 'parts'  # Of which most have no picture that can be read.
    predict.main([str(workdir), str(tmp_path), '--embed', str(out), '--rows', '10'])
    assert [pq.read_table(part).num_rows for part in sorted(out.glob('p*'))] == [0, 0, 0, 0, 1]
    said = capsys.readouterr().err
    assert said.count('not an image') == 40 and '40 of 41 pictures cannot be read' in said


def test_tables_say_the_same(shapes, model, tmp_path):
    workdir, data = shapes
    paths = pictures_of(data)[:7]
    (tmp_path / 'list').write_text(''.join(f'{path}\n' for path in paths))
    read = {
        'csv': lambda file: list(csv.DictReader(file.read_text().splitlines())),
        'jsonl': lambda file: [json.loads(line) for line in file.read_text().splitlines()],
        'parquet': lambda file: pq.read_table(file).to_pylist(),
    }
    wanted = model.predict(paths, top=2)
    for kind, rows_of in read.items():
        out = tmp_path / f'out.{kind}'
        predict.main([str(workdir), *paths, '--top', '2', '--out', str(out)])
        rows = rows_of(out)
        assert [row['file'] for row in rows] == paths
        for row, answer in zip(rows, wanted, strict=True):
            names = [row['class_1'], row['class_2']] if kind == 'csv' else row['classes']
            assert names == [name for name, _ in answer]
            likely = row['probability_1'] if kind == 'csv' else row['probabilities'][0]
            assert float(likely) == pytest.approx(answer[0][1], abs=1e-5)


def test_features_of_a_folder_go_on_where_they_stopped(shapes, model, tmp_path, capsys):
    workdir, data = shapes
    paths = pictures_of(data)
    wanted = model.embed(paths)
    for name in ('a.npz', 'a.parquet'):
        predict.main([str(workdir), str(data), '--embed', str(tmp_path / name)])
    with np.load(tmp_path / 'a.npz', allow_pickle=False) as saved:
        assert saved['files'].tolist() == paths
        np.testing.assert_allclose(saved['features'], wanted, atol=1e-5)
    rows = pq.read_table(tmp_path / 'a.parquet').to_pydict()
    np.testing.assert_allclose(np.array(rows['embedding']), wanted, atol=1e-5)

    with np.load(tmp_path / 'a.npz', allow_pickle=False) as saved:
        predict.main([str(workdir), str(data), '--embed', str(tmp_path / 'a.npy')])
        np.testing.assert_array_equal(np.load(tmp_path / 'a.npy'), saved['features'])
    listed = list(csv.DictReader((tmp_path / 'a.files.csv').read_text().splitlines()))
    assert [row['file'] for row in listed] == paths

    out = tmp_path / 'parts'
    command = [str(workdir), str(data), '--embed', str(out), '--rows', '12']
    predict.main(command)
    parts = sorted(out.glob('*.parquet'))
    assert [pq.read_table(part).num_rows for part in parts] == [12, 12, 6]
    parts[1].unlink()
    before = parts[0].stat().st_mtime_ns
    capsys.readouterr()
    predict.main(command)
    said = capsys.readouterr().out
    assert '2 of 3 parts are there' in said and said.count('part-') == 1
    assert parts[0].stat().st_mtime_ns == before
    features = np.concatenate([pq.read_table(part)['embedding'].to_pylist() for part in parts])
    np.testing.assert_allclose(features, wanted, atol=1e-5)
    for other, what in (
        ([str(workdir), paths[0], *command[2:]], 'inputs'),
        ([*command[:-1], '13'], 'rows'),
        ([*command, '--transform', 'resize(size)'], 'transform'),
        ([*command, '--which', 'params'], None),
    ):
        if what is not None:
            with pytest.raises(UserError, match=f'holds parts of other {what}: name another'):
                predict.main(other)
        else:  # Without an average they are the same numbers.
            predict.main(other)
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'diary.txt').write_text('dear diary')
    with pytest.raises(UserError, match='mine holds other files: name a new folder'):
        predict.main([str(workdir), str(data), '--embed', str(tmp_path / 'mine')])


@pytest.mark.slow
@pytest.mark.parametrize('out', ['parts', 'a.npz', 'a.parquet', 'a.npy'])
def test_killed_in_the_middle_the_same_command_ends_with_the_same_bytes(shapes, tmp_path, out):
    workdir, data = shapes
    for copy in range(20):
        shutil.copytree(data, tmp_path / 'data' / str(copy))
    (tmp_path / 'data' / '3' / 'broken.jpg').write_bytes(b'nothing')
    given = [workdir, tmp_path / 'data', '--rows', '16', '--batch_size', '16', '--embed']
    for folder in ('uncut', 'cut'):
        (tmp_path / folder).mkdir()
    uncut = tmp_path / 'uncut'
    assert run('predict', *given, uncut / out).returncode == 0
    target = tmp_path / 'cut' / out
    parts = target if out == 'parts' else target.with_name(f'.{out}.parts')
    process = start('predict', *given, target)
    while len(list(parts.glob('part-*'))) < 5 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    process.stdout.close()
    made = len(list(parts.glob('part-*')))
    assert 5 <= made < 38
    result = run('predict', *given, target)
    assert result.returncode == 0, result.stderr
    assert f'{made} of 38 parts are there' in result.stdout
    assert '1 of 601 pictures cannot be read' in result.stderr

    def contents(folder):
        files = sorted(path for path in folder.rglob('*') if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    left, right = contents(tmp_path / 'cut'), contents(uncut)
    assert left.keys() == right.keys()
    if out == 'a.npz':  # A zip archive says when it was made.
        with np.load(target) as one, np.load(uncut / out) as other:
            for name in ('files', 'features'):
                assert one[name].tobytes() == other[name].tobytes()
    else:
        assert left == right


@pytest.mark.slow
def test_two_processes_write_the_parts_of_one(shapes, tmp_path):
    workdir, data = shapes
    given = [workdir, data, '--rows', '8', '--embed']
    for suffix in ('parquet', 'npz'):
        assert run('predict', *given, tmp_path / f'one.{suffix}').returncode == 0
        run_many('predict', *given, tmp_path / f'two.{suffix}', devices=1)
    one, two = (pq.read_table(tmp_path / f'{name}.parquet').to_pydict() for name in ('one', 'two'))
    assert one['file'] == two['file'] == pictures_of(data)
    np.testing.assert_array_equal(one['embedding'], two['embedding'])


def test_data_of_any_source_is_asked_about_as_files_are(shapes, model, tmp_path, capsys):
    workdir, data = shapes
    paths = pictures_of(data)
    with tarfile.open(tmp_path / 'train-0.tar', 'w') as archive:
        for path in paths[::2]:
            archive.add(path, Path(path).name)
    flags = ['--config.data.name=tar', f'--config.data.path={tmp_path}']
    predict.main([str(workdir), *flags, '--out', str(tmp_path / 'a.jsonl'), '--top', '1'])
    rows = [json.loads(line) for line in (tmp_path / 'a.jsonl').read_text().splitlines()]
    for path, answer, row in zip(paths[::2], model.predict(paths[::2], 1), rows, strict=True):
        assert row['file'] == f'{tmp_path}/train-0.tar: {Path(path).name}'
        assert row['classes'] == [answer[0][0]]
        assert row['probabilities'][0] == pytest.approx(answer[0][1], abs=1e-5)
    with pytest.raises(UserError, match='name files or data, not both'):
        predict.main([str(workdir), paths[0], *flags])
    with pytest.raises(UserError, match='nothing is asked about: name files'):
        predict.main([str(workdir)])


def test_bad_files_in_any_number_are_named_and_the_rest_answered(shapes, model, tmp_path, capsys):
    """Files with an intact header too, in a row longer than an evaluation would look past."""
    _, data = shapes
    good = pictures_of(data)[:2]
    for i in range(40):
        (tmp_path / f'{i:02d}.jpg').write_bytes(Path(good[0]).read_bytes()[:400])
    shutil.copy(good[0], tmp_path / 'a.jpg')
    shutil.copy(good[1], tmp_path / '30b.jpg')
    unread = {}
    listed = [*map(str, sorted(tmp_path.glob('*.jpg'))), str(tmp_path / 'nowhere.jpg')]
    answers = list(model.answers(listed, unread))
    rows = np.concatenate([some.rows for some in answers]).tolist()
    assert rows == [listed.index(str(tmp_path / name)) for name in ('30b.jpg', 'a.jpg')]
    features = np.concatenate([some.features for some in answers])
    np.testing.assert_allclose(features, model.embed(good[::-1]), atol=1e-5)
    assert sorted([*unread, *rows]) == list(range(len(listed)))
    assert unread[len(listed) - 1] == 'No such file or directory'
    with pytest.raises(UserError, match=r'nowhere\.jpg: No such file or directory$'):
        model.embed([good[0], str(tmp_path / 'nowhere.jpg')])


@pytest.mark.slow
def test_a_peers_weights_answer_as_ours(tmp_path):
    weights = weights_of()
    export.to_checkpoint(weights, str(tmp_path / 'run'), [('model.dtype', 'float32')])
    interop.write(tmp_path / 'timm', 'timm', weights)
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    theirs = big_vit.load(tmp_path / 'timm')
    ours = big_vit.load(tmp_path / 'run', transform=theirs.transform)
    np.testing.assert_allclose(theirs.embed([image]), ours.embed([image]), atol=1e-5)


def test_a_peers_names_are_met_by_name(shapes, model, tmp_path, capfd):
    workdir, data = shapes
    peer = tmp_path / 'timm'
    export.main(['--checkpoint', str(workdir), '--to', 'timm', '--out', str(peer)])
    theirs = big_vit.load(peer, batch_size=16)
    assert theirs.class_names == model.class_names == ('class0', 'class1', 'class2')
    paths = pictures_of(data)
    np.testing.assert_allclose(theirs(paths), model(paths), atol=1e-5)
    # Of two classes of three, the second and third, numbers would be others.
    for number in (1, 2):
        shutil.copytree(data / f'class{number}', tmp_path / 'two' / f'class{number}')
        shutil.copytree(data / f'class{number}', tmp_path / 'three' / f'kind{number}')
    shutil.copytree(data / 'class0', tmp_path / 'three' / 'kind0')

    def scored(folder):
        words = {'data.name': 'folder', 'data.path': str(folder), 'evals.test.split': 'train',
                 'model.dtype': 'float32'}  # fmt: skip
        return evaluate.run_weights(str(peer), list(words.items()))['test']

    some = [path for path in paths if '/class0/' not in path]
    best = [answer[0][0] for answer in model.predict(some, top=1)]
    right = np.mean([f'/{name}/' in path for name, path in zip(best, some, strict=True)])
    assert scored(tmp_path / 'two')['top1'] == pytest.approx(right)
    capfd.readouterr()
    everything = evaluate.run(workdir, 8)['test']['top1']
    assert scored(tmp_path / 'three')['top1'] == pytest.approx(everything)
    assert 'meet by number: kind0 is class0, kind1 is class1' in capfd.readouterr().err


def test_labels_name_the_classes(shapes, model, tmp_path):
    workdir, data = shapes
    labels = tmp_path / 'labels.txt'
    labels.write_text('red\ngreen\nblue\n')
    named = big_vit.load(workdir, batch_size=16, labels=labels)
    path = pictures_of(data)[0]
    translated = dict(zip(model.class_names, named.class_names, strict=True))
    assert translated == {'class0': 'red', 'class1': 'green', 'class2': 'blue'}
    assert [n for n, _ in named.predict([path])[0]] == [
        translated[name] for name, _ in model.predict([path])[0]
    ]
    labels.write_text('red\ngreen\n')
    message = f'--labels {labels}: names 2 classes (red, green), and the head has 3'
    assert message in error_line(run('predict', workdir, path, '--labels', labels))


def test_pictures_are_opened_in_colour_if_the_transform_takes_colours(tmp_path):
    grey = weights_of()
    flat = trees.flatten(grey.params)
    flat['embedding/kernel'] = flat['embedding/kernel'][:, :, :1]
    meta = {**grey.meta, 'channels': 1, 'mean': (0.5,), 'std': (0.5,)}
    workdir, _ = export.to_checkpoint(
        grey._replace(params=trees.unflatten(flat), meta=meta), str(tmp_path / 'run')
    )
    Image.new('RGB', (40, 40), (10, 200, 90)).save(tmp_path / 'green.png')
    Image.new('L', (40, 40), 200).save(tmp_path / 'grey.png')
    second = big_vit.load(workdir, transform='channels(1) | resize(size)')
    plain = big_vit.load(workdir, transform='resize(size)')
    wanted = plain.embed([tmp_path / 'grey.png'])
    np.testing.assert_allclose(second.embed([tmp_path / 'green.png']), wanted, atol=1e-5)
    assert np.abs(plain.embed([tmp_path / 'green.png']) - wanted).max() > 1e-3


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['nowhere.jpg'], 'nowhere.jpg: there is no such file or folder'),
        (['EMPTY'], 'has no pictures'),
        (['BROKEN'], 'broken.png: not an image'),
        (['DATA', '--out', 'x.txt'], '--out x.txt: the name ends in .csv, .jsonl, .parquet'),
        (['DATA', '--embed', 'none/x.npz'], 'there is no folder none'),
        (['DATA', '--transform', 'resize_(3)'], 'resize'),
        (
            ['DATA', '--config.lr=1'],
            'predict reads the config of the run, and of what is given only data',
        ),
    ],
)
def test_mistakes_are_one_line(shapes, tmp_path, words, message):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'broken.png').write_bytes(b'nothing')
    places = {'EMPTY': tmp_path / 'empty', 'BROKEN': tmp_path / 'broken.png', 'DATA': shapes[1]}
    given = [places.get(word, word) for word in words]
    assert message in error_line(run('predict', shapes[0], *given))


def test_a_model_without_a_head_is_asked_for_features(tmp_path):
    weights = weights_of(num_classes=0)
    interop.write(tmp_path / 'timm', 'timm', weights)
    headless = big_vit.load(tmp_path / 'timm')
    with pytest.raises(UserError, match='no head that tells classes; ask for its features'):
        headless.predict([np.zeros((20, 20, 3), np.uint8)])
    assert headless.embed([np.zeros((20, 20, 3), np.uint8)]).shape == (1, 48)


def test_without_an_evaluation_pictures_are_prepared_as_one_does_by_default(shapes, capsys):
    """As in trials of a sweep, which leave the test to the sweep."""
    loaded = loaded_model.load(str(shapes[0]), None)
    scored = loaded.preparation('resize(size) | normalize()')
    bare = {**loaded.sidecar['config'], 'evals': {}}
    loaded = dataclasses.replace(loaded, sidecar={**loaded.sidecar, 'config': bare})
    prepared = loaded.preparation()
    assert 'has no evaluation' in capsys.readouterr().err
    size, channels = loaded.image_size, loaded.channels
    assert prepared.preprocessing(size, channels) == scored.preprocessing(size, channels)
