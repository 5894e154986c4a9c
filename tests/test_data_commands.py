"""What people run on data: training on a folder, bench_data, show_data, prepare, damaged files."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from commands import error_line, run
from PIL import Image
from tiny import MODEL, RUN, flags, write_folder

from big_vit import bench_data, config, journal, metrics, show_data, train
from big_vit.build.data import train_data
from big_vit.build.experiment import build_experiment
from big_vit.errors import UserError
from big_vit.inspection import examples

SMALL = {**MODEL, **RUN, 'image_size': '16', 'model.variant': 'Ti/8'}


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp('photos') / 'set', 60, 3)


def load(photos, **changes):
    overrides = {**SMALL, 'data.path': str(photos), **changes}
    return config.load('configs/own_images.py', list(overrides.items()))


def damaged(tmp_path, numbers, examples=60):
    root = write_folder(tmp_path / 'set', examples, 3)
    for file in root.rglob('*.jpg'):
        if int(file.stem) in numbers:
            file.write_bytes(file.read_bytes()[:300])
    return root


@pytest.mark.slow
def test_every_part_of_the_pipeline_in_one_run(photos, tmp_path):
    loaded = load(
        photos,
        **{
            'data.transform': 'decode | rrc(size) | three_augment | to_device | flip_lr '
            '| value_range(-1, 1) | random_erasing(0.5)',
            'data.repeats': '2', 'mixup': '0.5', 'cutmix': '1.0', 'task.label_smoothing': '0.1',
            'evals.test.transform': 'decode | resize(size)', 'data.on_error': 'skip',
        },
    )  # fmt: skip
    result = train.run(loaded, tmp_path / 'w')
    rows = metrics.read(tmp_path / 'w')
    assert result.step == 3
    assert [row['train/replaced'] for row in rows if 'train/loss' in row] == [0, 0, 0]
    assert all(row['time/loader_examples_per_s'] > 0 for row in rows if 'train/loss' in row)
    assert rows[-1]['test/count'] == 6


@pytest.mark.slow
def test_worker_processes_train_the_same_and_the_order_can_be_kept(photos, tmp_path):
    losses = []
    for number, changes in enumerate(({}, {'data.workers': '2'}, {'data.shuffle': 'false'})):
        train.run(load(photos, **changes), tmp_path / str(number))
        rows = metrics.read(tmp_path / str(number))
        losses.append([row['train/loss'] for row in rows if 'train/loss' in row])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_a_key_that_the_source_does_not_read_is_refused(tmp_path):
    for changes in ({'data.path': '/x'}, {'data.label_column': 'kind'}, {'data.cache_side': '64'}):
        overrides = {**SMALL, **changes}
        settings = [('data.transform', 'resize(size)'), *overrides.items()]
        loaded = config.load('configs/transfer_digits.py', settings)
        with pytest.raises(UserError, match=f'{next(iter(changes))} is set, but .* never reads it'):
            train.run(loaded, tmp_path / 'w')


@pytest.mark.slow
def test_several_labels_and_the_sigmoid_loss(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    labels = np.random.default_rng(1).integers(0, 2, (40, 5))
    np.savez(tmp_path / 'x.npz', train_images=images, train_labels=labels)
    overrides = {
        **SMALL, 'data.name': 'arrays', 'data.path': str(tmp_path / 'x.npz'),
        'task.loss': 'sigmoid',
        'data.split': 'train', 'data.transform': 'flip_lr | multihot(5)',
        'evals.test.split': 'train[:10]', 'evals.test.transform': 'multihot(5)',
    }  # fmt: skip
    loaded = config.load('configs/own_images.py', list(overrides.items()))
    assert train.run(loaded, tmp_path / 'w').metrics['test/count'] == 10
    plain = config.override(loaded, [('data.transform', 'flip_lr')])
    with pytest.raises(
        UserError, match=r'gives labels of shape .* for 5 classes: write onehot\(5\) or multihot'
    ):
        train_data(plain)


@pytest.mark.parametrize(
    ('kind', 'most', 'scaled', 'refused'),
    [
        (
            np.uint16,
            4095,
            'in_low=0, in_high=4095',
            'uint16 up to 4095, .*in_high=WHITE., or 65535',
        ),
        (np.float32, 1000, 'in_low=0, in_high=1000', 'float32 up to 1000, .*value_range'),
        (np.uint16, 65535, '', ''),
        (np.float32, 1, '', ''),
        (np.uint8, 3, '', ''),
    ],
)
def test_arrays_whose_white_is_unknown_are_refused(tmp_path, kind, most, scaled, refused):
    images = np.linspace(0, most, 8 * 16 * 16).reshape(8, 16, 16, 1).repeat(3, 3)[::-1].astype(kind)
    np.savez(tmp_path / 'x.npz', train_images=images, train_labels=np.arange(8) % 2)
    plain = {
        **SMALL, 'data.name': 'arrays', 'data.path': str(tmp_path / 'x.npz'),
        'data.split': 'train', 'data.transform': 'flip_lr', 'evals.test.split': 'train[:4]',
    }  # fmt: skip
    loaded = config.load('configs/own_images.py', list(plain.items()))
    if refused:
        with pytest.raises(UserError, match=f'data.transform gives images of {refused}'):
            train_data(loaded)
        transform = f'flip_lr | value_range(-1, 1, {scaled})'
        loaded = config.override(loaded, [('data.transform', transform)])
    assert train_data(loaded).shapes['image'] == (16, 16, 3)


@pytest.mark.slow
def test_a_mixture_is_trained_on(photos, tmp_path):
    overrides = {
        **SMALL, 'mixture.a.weight': '3', 'mixture.b.name': 'folder',
        'mixture.b.path': str(photos), 'mixture.b.split': 'train[:10]',
    }  # fmt: skip
    loaded = config.load('configs/own_images.py:path=' + str(photos), list(overrides.items()))
    found = train_data(loaded)
    assert (found.order.lengths, found.order.counts) == ((54, 10), (750, 250))
    assert train.run(loaded, tmp_path / 'w').step == 3
    zero = config.override(loaded, [('mixture.b.weight', '0')])
    with pytest.raises(UserError, match=r'mixture\.b\.weight must be above 0; leave the part out'):
        train_data(zero)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'data.split': 'train[:200]'}, r'data\.split: 200 .* beyond the 60 examples'),
        ({'evals.test.transform': 'flip_lr'}, r'flip_lr is random, which an evaluation must not'),
        ({'evals.test.transform': 'to_device | flip_lr'}, 'flip_lr is random'),
        ({'data.transform': 'rcc(size)'}, "there is no operation 'rcc': did you mean rrc"),
        ({'data.transform': 'rrc(size) | value_rang(0, 1)'}, 'did you mean value_range'),
        ({'data.transform': 'rrc(size) | value_range(0)'}, r"missing .*'high'.*value_range\(low"),
        ({'data.transform': 'rrc(8)'}, 'gives 8x8 images but image_size is 16x16'),
        ({'data.transform': 'resize_small(16)'}, 'gives 16x.* images but image_size is 16x16'),
        ({'data.transform': 'grayscale | resize(size) | normalize'}, 'normalize: 3 numbers for'),
        ({'data.repeats': '3'}, 'batch_size=16 must be a multiple of data.repeats=3'),
        ({'data.classes': "('class0', 'class9')"}, "has no class 'class9'; it has class0, class1"),
        ({'data.label_map': '/no/file.json'}, r'data\.label_map: cannot read'),
    ],
)
def test_mistakes_are_named_before_anything_starts(photos, changes, message):
    with pytest.raises(UserError, match=message) as error:
        build_experiment(load(photos, **changes))
    assert '\n' not in str(error.value)


def test_an_evaluation_of_other_classes_is_refused(photos, tmp_path):
    other = write_folder(tmp_path / 'other', 12, 3)
    (other / 'class1').rename(other / 'zebra')
    changes = {'evals.test.name': 'folder', 'evals.test.path': str(other)}
    with pytest.raises(UserError, match=r"evals\.test: .* the model has not \('zebra'; it has"):
        build_experiment(load(photos, **changes))
    # Chosen ones meet the model by name.
    chosen = {'evals.test.classes': "('class2', 'class0')", 'evals.test.split': 'train'}
    source = build_experiment(load(photos, **changes, **chosen)).evals['test'].source
    folders = [Path(source.place(i)).parent.name for i in range(source.length)]
    assert folders == [f'class{label}' for label in source.labels()]


def test_an_evaluation_sees_the_numbers_that_training_sees(photos):
    loaded = load(photos, **{'data.transform': 'rrc(size) | to_device | flip_lr | normalize'})
    parts = build_experiment(loaded)
    assert [name for name, _ in parts.data.device] == ['flip_lr', 'normalize']
    assert [name for name, _ in parts.evals['test'].device] == ['normalize']
    own = load(photos, **{'evals.test.transform': 'resize(size) | value_range(0, 1)'})
    assert [name for name, _ in build_experiment(own).evals['test'].device] == ['value_range']


@pytest.mark.slow
def test_a_damaged_file_stops_the_run_and_is_named(tmp_path):
    root = damaged(tmp_path, {7})
    with pytest.raises(UserError, match=r'0007\.jpg: (damaged|truncated) JPEG.*on_error'):
        train.run(load(root, total_steps='20'), tmp_path / 'w')


@pytest.mark.slow
def test_damaged_files_are_replaced_and_counted_up_to_a_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, 'MIN_EXAMPLES_FOR_RATE', 60)
    root = damaged(tmp_path, {7, 8})
    settings = {'data.on_error': 'skip', 'total_steps': '8', 'data.split': 'train'}
    settings['evals.test.split'] = 'train'
    loaded = load(root, **settings, **{'data.max_error_rate': '0.2'})
    result = train.run(loaded, tmp_path / 'w')
    rows = metrics.read(tmp_path / 'w')
    # Two epochs of sixty in eight steps of sixteen, and eight examples of a third.
    assert 4 <= sum(row.get('train/replaced', 0) for row in rows) <= 6
    assert result.metrics['test/count'] == 58
    with pytest.raises(UserError, match=r'of the last \d+ examples .* data\.max_error_rate=0\.01'):
        train.run(load(root, **settings), tmp_path / 'v')


def test_bench_data_names_the_slowest_operation(photos):
    loaded = load(photos, **{'data.transform': 'decode | rrc(size) | augmix'})
    found = train_data(loaded)
    cost = bench_data.by_operation(found)
    assert list(cost) == ['read', '1 decode', '2 rrc', '3 augmix', 'join']
    assert max(cost, key=cost.get) == '3 augmix'
    rates = bench_data.loader_rates(found, 0.3)
    assert rates['examples'] % 16 == 0
    assert rates['examples_per_s'] == pytest.approx(rates['examples'] / rates['seconds'])


@pytest.mark.parametrize('task', ['orbit', 'tones', 'phrases', 'quiz'])
def test_data_without_images_is_measured(task):
    found = train_data(config.load(f'configs/sequences.py:task={task}'))
    rates = bench_data.loader_rates(found, 0.1)
    assert rates['examples'] % 64 == 0 and rates['examples'] > 0
    assert 'join' in bench_data.by_operation(found)


def test_data_without_images_has_no_pictures_to_draw(tmp_path):
    for task, parts in (('orbit', 'video, label'), ('phrases', 'label, tokens')):
        loaded = config.load(f'configs/sequences.py:task={task}')
        with pytest.raises(UserError, match=f'{task} .*no pictures to draw, only {parts}'):
            show_data.draw(loaded, tmp_path / 'x.png', 0, 4)


def test_pictures_without_labels_are_drawn(tmp_path):
    transform = "byte_tokens(40) | keep('image', 'tokens', 'text_mask')"
    loaded = config.load('configs/contrastive.py', [('data.transform', transform)])
    assert 'label' not in train_data(loaded).shapes
    show_data.draw(loaded, tmp_path / 'x.png', 0, 4)
    with Image.open(tmp_path / 'x.png') as image:
        assert image.size[0] > 400


def ran(command, *arguments):
    result = run(command, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_commands(photos, tmp_path):
    more = flags(SMALL)
    spec = f'configs/own_images.py:path={photos}'
    shown = ran('bench_data', '--config', spec, '--seconds', '0.3', *more)
    assert re.search(r'slowest 2 rrc: \d+ of \d+ µs', shown)
    assert re.search(r'loader  [\d,]+ examples/s with \d+ threads', shown)
    as_json = ran('bench_data', '--config', spec, '--seconds', '0.3', '--json', *more)
    assert json.loads(as_json.splitlines()[-1])['examples_per_s'] > 0
    path = tmp_path / 'new' / 'data.png'
    mixing = flags({'mixup': '0.8', 'cutmix': '1.0'})
    ran('show_data', '--config', spec, '--png', path, '--count', '4', *more, *mixing)
    with Image.open(path) as image:
        pixels = np.asarray(image.convert('RGB'))
    assert pixels.shape[1] > 600
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500


def test_pictures_are_shown_with_their_labels(photos):
    found = train_data(load(photos))
    assert examples.title(found, np.int32(1)) == 'class1'
    assert examples.title(found, np.array([0.25, 0.0, 0.75])) == '0.75 class2\n0.25 class0'
    pictures = show_data.originals(found, np.array([0, 5]))
    assert [picture.shape[2] for picture in pictures] == [3, 3]


def test_what_stands_for_a_damaged_picture_is_shown(tmp_path):
    root = damaged(tmp_path, {0}, 12)
    more = {'data.on_error': 'skip', 'data.max_error_rate': '0.5', 'data.split': 'train'}
    found = train_data(load(root, **more))
    place = next(i for i in range(12) if found.source.place(i).endswith('0000.jpg'))
    one, other = show_data.originals(found, np.array([place, (place + 1) % 12]))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ('module', 'arguments', 'message'),
    [
        ('bench_data', [], '--config is missing'),
        ('show_data', ['--config', 'configs/own_images.py'], '--png is missing'),
        ('bench_data', ['--config', 'configs/own_images.py'], r'PHOTOS is not a folder'),
        ('prepare', ['cifar10'], '--data_dir is missing'),
        ('prepare', ['cifarr10', '--data_dir', '/tmp'], 'has no such dataset'),
    ],
)
def test_mistakes_on_the_command_line(module, arguments, message):
    assert re.search(message, error_line(run(module, *arguments)))
