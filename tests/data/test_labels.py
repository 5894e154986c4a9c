"""Labels of the tasks of VTAB, from datasets of the shape that TFDS gives them, by hand."""

import json

import numpy as np
import pytest
from tiny import png, write_features

from big_vit import prepare
from big_vit.data import dataset
from big_vit.data.sources import labels
from big_vit.data.sources.base import Request
from big_vit.data.sources.prepared import tfds
from big_vit.errors import UserError

SIZE = {'train': 6}


def picture(value, channels=3):
    return png(np.full((8, 8, channels), value, np.uint8))


def clevr(distances):
    objects = {
        'color': [0 for _ in distances],
        'size': [0 for _ in distances],
        'pixel_coords': np.array([(0, 0, d) for d in distances], np.float32).reshape(-1, 3),
    }
    return {'objects': objects}


def kitti(*objects):
    return {
        'objects': {
            'type': np.array([kind for kind, _ in objects], np.int64),
            'location': np.array([(0, 0, z) for _, z in objects], np.float32).reshape(-1, 3),
        }
    }


@pytest.mark.parametrize(
    ('distances', 'count', 'bin_'),
    [
        ([9.4, 7.9, 12.0], 0, 0),
        ([8.0, 30.0, 30.0, 30.0], 1, 0),  # An edge is of the bin below.
        ([8.01] * 5, 2, 1),
        ([8.6] * 6, 3, 2),
        ([9.5] * 7, 4, 3),
        ([9.9] * 8, 5, 4),
        ([10.1] * 10, 7, 5),
        ([], labels.NONE, labels.NONE),
    ],
)
def test_clevr(distances, count, bin_):
    assert labels.clevr_count(clevr(distances)) == count
    assert labels.clevr_distance(clevr(distances)) == bin_


@pytest.mark.parametrize(
    ('objects', 'bin_'),
    [
        ([(0, 8.0), (0, 50.0)], 0),
        ([(1, 8.1), (3, 2.0)], 1),  # A pedestrian is no vehicle.
        ([(2, 20.5), (8, -1000.0)], 2),  # Nor is what nobody cares about.
        ([(3, 4.0), (8, -1000.0)], 3),
        ([], 3),
    ],
)
def test_kitti(objects, bin_):
    assert labels.kitti_distance(kitti(*objects)) == bin_


def test_dsprites_has_16_classes_of_32_places_and_of_40_angles():
    places = [labels.dsprites_location({'label_x_position': i}) for i in range(32)]
    assert places == [i // 2 for i in range(32)]
    angles = [labels.dsprites_orientation({'label_orientation': i}) for i in range(40)]
    assert angles[:8] == [0, 0, 0, 1, 1, 2, 2, 2] and angles[-3:] == [14, 15, 15]
    assert set(angles) == set(range(16))
    # As the benchmark computes it, in float32.
    assert angles == (np.arange(40, dtype=np.float32) // np.float32(2.5)).astype(int).tolist()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Small datasets with the features that TFDS gives CLEVR, KITTI, dSprites and SmallNORB."""
    from tensorflow_datasets import features as f

    path = tmp_path_factory.mktemp('data')
    number, vector = f.Tensor(shape=(), dtype=np.float32), f.Tensor(shape=(3,), dtype=np.float32)
    write_features(
        path,
        'clevr',
        {
            'image': f.Image(),
            'file_name': f.Text(),
            'objects': f.Sequence(
                {
                    'color': f.ClassLabel(num_classes=8),
                    'size': f.ClassLabel(names=['small', 'large']),
                    'rotation': number,
                    '3d_coords': vector,
                    'pixel_coords': vector,
                }
            ),
            'question_answer': f.Sequence({'question': f.Text(), 'answer': f.Text()}),
        },
        SIZE,
        lambda i, rng: {
            'image': picture(i),
            'file_name': 'x.png',
            'objects': [
                {
                    'color': 1,
                    'size': 0,
                    'rotation': 0.5,
                    '3d_coords': (0, 0, 0),
                    'pixel_coords': (200, 100, 12 - 0.8 * i + k),
                }
                for k in range(3 + i)
            ],
            'question_answer': [{'question': 'how many?', 'answer': 'some'}] * i,
        },
    )
    write_features(
        path,
        'kitti',
        {
            'image': f.Image(),
            'image/file_name': f.Text(),
            'objects': f.Sequence(
                {
                    'type': f.ClassLabel(num_classes=9),
                    'truncated': number,
                    'bbox': f.BBoxFeature(),
                    'location': vector,
                }
            ),
        },
        SIZE,
        lambda i, rng: {
            'image': picture(i),
            'image/file_name': 'x.png',
            'objects': [
                {
                    'type': kind,
                    'truncated': 0.0,
                    'bbox': f.BBox(0.1, 0.1, 0.2, 0.2),
                    'location': (1.0, 1.0, z),
                }
                for kind, z in [(4, 3.0), (0, 7.0 + 9 * i)][: 1 + (i < 5)]
            ],
        },
    )
    write_features(
        path,
        'dsprites',
        {
            'id': f.Text(),
            'image': f.Image(shape=(8, 8, 1)),
            'label_orientation': f.ClassLabel(num_classes=40),
            'label_x_position': f.ClassLabel(num_classes=32),
            'value_orientation': number,
        },
        SIZE,
        lambda i, rng: {
            'id': str(i),
            'image': png(np.eye(8, dtype=np.uint8)[..., None]),
            'label_orientation': 7 * i,
            'label_x_position': 6 * i,
            'value_orientation': 0.1,
        },
    )
    write_features(
        path,
        'smallnorb',
        {
            'image': f.Image(shape=(8, 8, 1)),
            'image2': f.Image(shape=(8, 8, 1)),
            'label_azimuth': f.ClassLabel(num_classes=18),
            'label_elevation': f.ClassLabel(num_classes=9),
        },
        SIZE,
        lambda i, rng: {
            'image': picture(i, 1),
            'image2': picture(99, 1),
            'label_azimuth': 3 * i,
            'label_elevation': i,
        },
    )
    return path


# Of the example i of those above.
EXPECTED = {
    ('clevr', 'clevr_count'): (8, [0, 1, 2, 3, 4, 5]),
    ('clevr', 'clevr_distance'): (6, [5, 5, 5, 4, 2, 0]),  # 12, 11.2, 10.4, 9.6, 8.8, 8.
    ('kitti', 'kitti_distance'): (4, [0, 1, 2, 2, 2, 3]),
    ('dsprites', 'dsprites_location'): (16, [0, 3, 6, 9, 12, 15]),
    ('dsprites', 'dsprites_orientation'): (16, [0, 2, 5, 8, 11, 14]),
    ('dsprites', 'label_orientation'): (40, [0, 7, 14, 21, 28, 35]),
    ('smallnorb', 'label_azimuth'): (18, [0, 3, 6, 9, 12, 15]),
    ('smallnorb', 'label_elevation'): (9, [0, 1, 2, 3, 4, 5]),
}


def spec_of(folder, name, column, transform='rgb', **more):
    settings = ('path', str(folder)), ('tfds_name', name), ('label_column', column)
    return dataset.Spec('data', 'tfds', 'train', transform, (8, 8), settings=settings, **more)


@pytest.mark.parametrize(('name', 'column'), EXPECTED)
def test_labels_of_a_column_and_made_of_others(name, column, folder):
    classes, expected = EXPECTED[name, column]
    source = tfds(Request('train'), tfds_name=name, path=str(folder), label_column=column)
    assert source.num_classes == classes and source.labels is not None
    loaded = source.load(np.arange(6))
    # TFDS writes in an order of its own.
    assert sorted(loaded['label'].tolist()) == sorted(expected)
    np.testing.assert_array_equal(source.labels(), loaded['label'])
    spec = spec_of(folder, name, column)
    opened, rest = dataset.open_spec(spec)
    columns = rest(opened.load(np.arange(6)), np.zeros(6, np.uint64))
    assert columns['image'].shape == (6, 8, 8, 3) and len(columns['label']) == 6
    if name not in ('dsprites',):  # There every picture is the same.
        values = columns['image'][:, 0, 0, 0]
        np.testing.assert_array_equal(columns['label'], np.array(expected)[values])


def test_a_smaller_copy_has_the_labels_that_were_asked_for(folder, tmp_path, monkeypatch):
    monkeypatch.setenv('BIG_VIT_CACHE', str(tmp_path))
    found = []
    for column in ('label_azimuth', 'label_elevation'):
        spec = spec_of(folder, 'smallnorb', column, cache='resized', cache_side=8)
        found.append(sorted(dataset.open_spec(spec)[0].load(np.arange(6))['label'].tolist()))
    assert found == [[0, 3, 6, 9, 12, 15], [0, 1, 2, 3, 4, 5]]


def test_masks_of_0_and_1_become_black_and_white(folder):
    spec = spec_of(folder, 'dsprites', 'dsprites_location', transform='rgb | autocontrast')
    source, rest = dataset.open_spec(spec)
    image = rest(source.load(np.arange(1)), np.zeros(1, np.uint64))['image'][0]
    np.testing.assert_array_equal(image, np.repeat(np.eye(8)[..., None] * 255, 3, axis=-1))


@pytest.mark.parametrize(
    ('name', 'column', 'message'),
    [
        ('kitti', None, r"has no feature 'label' .*: set data\.label_column to one of kitti_dist"),
        ('kitti', 'clevr_count', "has no label 'clevr_count': set .* one of kitti_distance$"),
        ('smallnorb', 'azimuth', 'one of label_azimuth, label_elevation$'),
        ('smallnorb', 'image2', 'one of label_azimuth, label_elevation$'),
        ('dsprites', 'value_orientation', 'dsprites_location, dsprites_orientation$'),
    ],
)
def test_a_label_that_is_not_there(name, column, message, folder):
    with pytest.raises(UserError, match=message):
        tfds(Request('train'), tfds_name=name, path=str(folder), label_column=column)


def test_prepare_says_how_to_use_what_has_no_plain_label(folder, monkeypatch, capsys):
    import tensorflow_datasets

    (path,) = (folder / 'kitti').glob('*')
    assert json.loads((path / 'dataset_info.json').read_text())['name'] == 'kitti'
    there = tensorflow_datasets.builder_from_directory(path)
    monkeypatch.setattr(prepare, '_builder', lambda *_: there)
    prepare.main(['kitti', '--data_dir', str(folder)])
    shown = capsys.readouterr().out
    assert 'classes 4' in shown and '--config.data.label_column=kitti_distance' in shown
