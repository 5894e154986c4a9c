"""Sources: real files are read exactly, and damaged ones are refused with a line that helps."""

import gzip
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from big_vit import prepare as prepare_command
from big_vit.data import dataset, decode, order, pipeline, sources
from big_vit.data.sources import base, digits, idx
from big_vit.data.sources.base import Request
from big_vit.data.sources.classes import relabel, subset
from big_vit.data.sources.prepared import tfds
from big_vit.errors import UserError

FASHION = Path('/usr/share/datasets/fashion-mnist')
SIZES = {'train': 1000, 'test': 33}


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('train', [('train', 0, 1000)]),
        (' test ', [('test', 0, 33)]),
        ('train[:]', [('train', 0, 1000)]),
        ('train[:90%]', [('train', 0, 900)]),
        ('train[90%:]', [('train', 900, 1000)]),
        ('train[10%:20%]', [('train', 100, 200)]),
        ('train[:1000]', [('train', 0, 1000)]),
        ('train[5:7]', [('train', 5, 7)]),
        ('train[-10%:]', [('train', 900, 1000)]),
        ('train[:-1]', [('train', 0, 999)]),
        ('test[:50%]', [('test', 0, 16)]),
        ('test[50%:]', [('test', 16, 33)]),
        ('train+test', [('train', 0, 1000), ('test', 0, 33)]),
        ('train[:10%] + train[90%:]', [('train', 0, 100), ('train', 900, 1000)]),
        ('test[fold=0/2]', [('test', 0, 16)]),
        ('train[fold=3/7]', [('train', 428, 571)]),
        ('train[fold!=3/7]', [('train', 0, 428), ('train', 571, 1000)]),
        ('train[fold!=0/7]', [('train', 142, 1000)]),
    ],
)
def test_parse_split(text, expected):
    assert sources.parse_split(text, SIZES, 'data') == expected


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('val', "data.split: there is no split 'val', only test, train"),
        ('train+', "data.split: cannot read 'train\\+'.*splits here: test, train"),
        ('train+val', "data.split: there is no split 'val', only test, train"),
        ('train[:10]+train[9:]', 'data.split: .* holds examples of train twice'),
        ('train[fold=5/5]', 'data.split: .* folds of train go from 0/k'),
        ('test[fold=0/34]', 'data.split: .* with k from 1 to its 33 examples'),
        ('train[fold=1]', 'data.split: cannot read'),
        ('train[5]', 'data.split: cannot read'),
        ('', 'data.split: cannot read'),
        ('train[:101%]', 'data.split: 101% .* beyond the 1000 examples'),
        ('train[:1001]', 'data.split: 1001 .* beyond the 1000 examples'),
        ('train[7:7]', 'data.split: .* holds no example'),
        ('test[:1%]', 'data.split: .* holds no example'),
    ],
)
def test_parse_split_refuses(text, message):
    with pytest.raises(UserError, match=message):
        sources.parse_split(text, SIZES, 'data')


def test_percent_ranges_partition_any_size():
    for size in (1, 7, 99, 1797):
        seen = []
        for percent in range(0, 100, 10):
            try:
                ((_, start, stop),) = sources.parse_split(
                    f'train[{percent}%:{percent + 10}%]', {'train': size}, 'data'
                )
            except UserError:
                continue
            seen.extend(range(start, stop))
        assert seen == list(range(size))


def test_digits():
    train, test = digits.digits(Request('train')), digits.digits(Request('test'))
    assert (train.length, test.length) == (1438, 359)
    assert train.image_shape == (8, 8, 1)
    images = train.load(np.arange(train.length))
    assert images['image'].dtype == np.uint8
    assert images['label'].dtype == np.int32
    assert images['image'].shape == (1438, 8, 8, 1)
    assert images['image'].max() == 255
    assert len(np.unique(images['image'])) == 17
    # The first image of the file, from the UCI archive: a zero.
    assert images['label'][:3].tolist() == [0, 1, 2]
    first_row = np.rint(np.array([0, 0, 5, 13, 9, 1, 0, 0]) * 255 / 16)
    np.testing.assert_array_equal(images['image'][0, 0, :, 0], first_row)
    part = digits.digits(Request('test[10:20]')).load(np.arange(10))
    np.testing.assert_array_equal(part['image'], test.load(np.arange(10, 20))['image'])


# --- What can be done with any source ------------------------------------------------------


def numbered(length, classes=4, name='numbers', first=0):
    """Example i is a 1x1 image of the value first + i, of class i mod classes."""
    values = (first + np.arange(length)).astype(np.uint8).reshape(-1, 1, 1, 1)
    labels = (np.arange(length) % classes).astype(np.int32)
    names = tuple('abcdefgh'[:classes])
    return base.from_arrays(name, 'train', values, labels, classes, class_names=names)


def values_of(source, index=None):
    index = np.arange(source.length) if index is None else np.asarray(index)
    return np.ravel(source.load(index)['image']).tolist()


def test_sources_are_joined_one_after_the_other():
    joined = base.concatenate([numbered(5), numbered(3, first=50), numbered(4, first=90)], 'x', 's')
    assert joined.length == 12
    assert values_of(joined) == [*range(5), *range(50, 53), *range(90, 94)]
    assert values_of(joined, [11, 0, 6, 6, 4, 5]) == [93, 0, 51, 51, 4, 50]
    assert joined.labels().tolist() == [0, 1, 2, 3, 0, 0, 1, 2, 0, 1, 2, 3]
    assert joined.place(6) == "example 1 of 'train' of numbers"


def test_ranges_of_splits_are_cut_and_joined():
    whole = {'train': numbered(20), 'test': numbered(10, first=100)}
    sizes = {name: source.length for name, source in whole.items()}

    def cut(split, **more):
        return sources.cut('x', sizes, whole.__getitem__, Request(split), **more)

    assert values_of(cut('train[5:8]+test[-2:]')) == [5, 6, 7, 108, 109]
    assert values_of(cut('train[fold!=1/4]')) == [*range(5), *range(10, 20)]
    folds = [values_of(cut(f'train[fold={k}/3]')) for k in range(3)]
    assert [value for fold in folds for value in fold] == list(range(20))
    assert cut('train[5:8]').place(1) == "example 6 of 'train' of numbers"


def test_a_part_of_what_lies_by_class_has_all_classes():
    labels = np.repeat(np.arange(5, dtype=np.int32), 40)
    whole = base.from_arrays('x', 'train', np.zeros((200, 1, 1, 1), np.uint8), labels, 5)

    def cut(split):
        return sources.cut('x', {'train': 200}, lambda _: whole, Request(split), by_class=True)

    half, rest = cut('train[:50%]').labels(), cut('train[50%:]').labels()
    assert (np.bincount(half, minlength=5) > 8).all()
    assert np.bincount(half).sum() == 100
    np.testing.assert_array_equal(np.bincount(half) + np.bincount(rest), [40] * 5)
    np.testing.assert_array_equal(cut('train').labels(), labels)


@pytest.mark.parametrize('classes', [('c', 'a'), (2, 0), ('2', 'a')])
def test_a_subset_of_classes_is_renumbered(classes):
    chosen = subset(numbered(10), classes, 'data.classes')
    assert (chosen.num_classes, chosen.class_names) == (2, ('c', 'a'))
    assert values_of(chosen) == [0, 2, 4, 6, 8]
    assert chosen.load(np.arange(5))['label'].tolist() == [1, 0, 1, 0, 1]
    assert chosen.labels().tolist() == [1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ('classes', 'message'),
    [
        (('e',), "data.classes: numbers has no class 'e'; it has a, b, c, d"),
        ((4,), 'has no class 4'),
        (('a', 0), 'a class is named twice'),
    ],
)
def test_a_wrong_subset_is_refused(classes, message):
    with pytest.raises(UserError, match=message):
        subset(numbered(10), classes, 'data.classes')


def test_labels_are_mapped_and_classes_left_out():
    mapped = relabel(numbered(8), {'a': 1, 'b': 1, 'c': None, '3': 0}, 'data.label_map')
    assert (mapped.num_classes, mapped.class_names) == (2, ('d', 'a, b'))
    assert values_of(mapped) == [0, 1, 3, 4, 5, 7]
    assert mapped.labels().tolist() == [1, 1, 0, 1, 1, 0]
    with pytest.raises(UserError, match=r"data.label_map: says nothing of class 'b'.*1 others"):
        relabel(numbered(8), {'a': 0, 'c': 1}, 'data.label_map')
    with pytest.raises(UserError, match="class 'a' maps to 'x': give a whole number"):
        relabel(numbered(8), dict.fromkeys('abcd', 'x'), 'data.label_map')


# --- IDX -----------------------------------------------------------------------------


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f'>HBB{array.ndim}I', 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(directory: Path, *, train=20, test=10, classes=5, zipped=False, style='{}-{}-ubyte'):
    """Four files of random images; gives back the arrays of each split."""
    rng = np.random.default_rng(0)
    written = {}
    for split, name, count in (('train', 'train', train), ('test', 't10k', test)):
        images = rng.integers(0, 256, (count, 6, 5), np.uint8)
        labels = (np.arange(count) % classes).astype(np.uint8)
        for kind, array in (('images-idx3', images), ('labels-idx1', labels)):
            data = idx_bytes(array)
            path = directory / (style.format(name, kind) + ('.gz' if zipped else ''))
            path.write_bytes(gzip.compress(data) if zipped else data)
        written[split] = images, labels
    return written


@pytest.mark.parametrize('zipped', [False, True])
def test_idx_reads_what_was_written(tmp_path, zipped):
    written = write_idx(tmp_path, zipped=zipped)
    for split, (images, labels) in written.items():
        source = idx.idx(Request(split), path=str(tmp_path))
        assert (source.length, source.num_classes) == (len(images), 5)
        assert source.image_shape == (6, 5, 1)
        order = np.random.default_rng(1).permutation(len(images))
        loaded = source.load(order)
        np.testing.assert_array_equal(loaded['image'][..., 0], images[order])
        np.testing.assert_array_equal(loaded['label'], labels[order])
        assert loaded['label'].dtype == np.int32
    part = idx.idx(Request('train[50%:]'), path=str(tmp_path)).load(np.array([0]))
    np.testing.assert_array_equal(part['image'][0, ..., 0], written['train'][0][10])


def test_idx_files_that_were_changed_are_read_again(tmp_path):
    write_idx(tmp_path)
    first = idx.idx(Request('train'), path=str(tmp_path)).load(np.array([0]))['image']
    images = tmp_path / 'train-images-idx3-ubyte'
    before = images.stat()
    images.write_bytes(images.read_bytes()[:16] + bytes(before.st_size - 16))
    os.utime(images, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert (
        first.any()
        and not idx.idx(Request('train'), path=str(tmp_path)).load(np.array([0]))['image'].any()
    )


def test_idx_finds_the_names_of_emnist_and_dots(tmp_path):
    for folder, style in (('emnist', 'emnist-letters-{}-{}-ubyte'), ('dots', '{}-{}-ubyte')):
        directory = tmp_path / folder
        directory.mkdir()
        write_idx(directory, style=style)
        for path in list(directory.iterdir()):
            if folder == 'dots':
                path.rename(path.with_name(path.name.replace('-idx', '.idx')))
            else:
                path.rename(path.with_name(path.name.replace('t10k', 'test')))
        assert idx.idx(Request('train'), path=str(directory)).length == 20
        assert idx.idx(Request('test'), path=str(directory)).length == 10


def test_idx_number_of_classes(tmp_path):
    write_idx(tmp_path, test=3)
    assert idx.idx(Request('test'), path=str(tmp_path)).num_classes == 5
    assert idx.idx(Request('train', num_classes=8), path=str(tmp_path)).num_classes == 8
    with pytest.raises(UserError) as error:
        idx.idx(Request('train', num_classes=3, key='evals.test'), path=str(tmp_path))
    message = str(error.value)
    assert 'evals.test.num_classes is 3 but example 3 of' in message
    assert 'has label 3: set evals.test.num_classes=5 or more' in message
    assert '\n' not in message


def damage_truncate(data):
    return data[:-7]


def damage_trail(data):
    return data + b'x'


def damage_magic(data):
    return b'\x00\x00\x0d\x03' + data[4:]


def damage_empty(data):
    return b''


def damage_absurd(data):
    return data[:4] + struct.pack('>3I', 2**31, 2**31, 2**31) + data[16:]


def damage_no_images(data):
    return data[:4] + struct.pack('>3I', 0, 6, 5)


DAMAGES = [
    (damage_truncate, r'expected 616 bytes, found 609'),
    (damage_trail, r'expected 616 bytes, found more'),
    (damage_magic, r'not an IDX file.*0x00000d03, expected 0x00000803'),
    (damage_empty, r'expected a header of 16 bytes, found 0'),
    (damage_absurd, r'the header claims 2147483648x2147483648x2147483648 bytes'),
    (damage_no_images, r'the header claims 0x6x5 bytes'),
]


@pytest.mark.parametrize('zipped', [False, True])
@pytest.mark.parametrize(('damage', 'message'), DAMAGES)
def test_idx_refuses_damaged_files(tmp_path, damage, message, zipped):
    write_idx(tmp_path, zipped=zipped)
    path = tmp_path / ('train-images-idx3-ubyte' + ('.gz' if zipped else ''))
    data = gzip.decompress(path.read_bytes()) if zipped else path.read_bytes()
    damaged = damage(data)
    path.write_bytes(gzip.compress(damaged) if zipped else damaged)
    with pytest.raises(UserError, match=re.escape(str(path)) + ': .*' + message):
        idx.idx(Request('train'), path=str(path.parent))


def test_idx_refuses_corrupt_gzip(tmp_path):
    write_idx(tmp_path, zipped=True)
    path = tmp_path / 'train-images-idx3-ubyte.gz'
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-6] ^= 1
    for data in (b'not gzip at all', whole[:-20], bytes(flipped), whole[:200] + whole[300:]):
        path.write_bytes(data)
        with pytest.raises(UserError, match=re.escape(str(path))):
            idx.idx(Request('train'), path=str(tmp_path))


def test_idx_does_not_unpack_a_bomb(tmp_path):
    write_idx(tmp_path, zipped=True)
    path = tmp_path / 'train-images-idx3-ubyte.gz'
    with gzip.open(path, 'wb') as file:
        file.write(struct.pack('>4I', 0x803, 20, 6, 5))
        for _ in range(64):
            file.write(bytes(1 << 20))
    tracemalloc.start()
    with pytest.raises(UserError, match='found more'):
        idx.idx(Request('train'), path=str(tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_idx_refuses_counts_that_differ(tmp_path):
    write_idx(tmp_path)
    (tmp_path / 'train-labels-idx1-ubyte').write_bytes(idx_bytes(np.zeros(19, np.uint8)))
    with pytest.raises(UserError, match='19 labels for the 20 images of train-images-idx3-ubyte'):
        idx.idx(Request('train'), path=str(tmp_path))


def test_idx_missing_and_ambiguous_files(tmp_path):
    for path in ('', str(tmp_path / 'nowhere'), str(tmp_path)):
        with pytest.raises(UserError, match=r'data\.path: .*dataset-fashion-mnist'):
            idx.idx(Request('train'), path=path)
    write_idx(tmp_path)
    (tmp_path / 't10k-images-idx3-ubyte').unlink()
    with pytest.raises(UserError, match="there is no split 'test', only train"):
        idx.idx(Request('test'), path=str(tmp_path))
    (tmp_path / 'train-labels-idx1-ubyte').unlink()
    with pytest.raises(UserError, match='no train labels'):
        idx.idx(Request('train'), path=str(tmp_path))
    write_idx(tmp_path, style='other-{}-{}-ubyte')
    with pytest.raises(UserError, match=r'several train .*other-train-images-idx3-ubyte, train-im'):
        idx.idx(Request('train'), path=str(tmp_path))


def test_real_fashion_mnist():
    if not FASHION.is_dir():
        pytest.skip(f'{FASHION} is not installed')
    for split, count in (('train', 60_000), ('test', 10_000)):
        source = idx.idx(Request(split), path=str(FASHION))
        assert source.length == count
        labels = source.load(np.arange(count))['label']
        assert (np.bincount(labels) == count // 10).all()
    # The first test image is an ankle boot, the first train image too.
    assert labels[0] == 9


# --- TFDS ----------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError('nothing may go to the network')

    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)


@pytest.mark.parametrize('name', ['imagenet2012', 'imagenet_v2/matched-frequency:3.0.0'])
def test_missing_tfds_fails_at_once(tmp_path, monkeypatch, no_network, name):
    with pytest.raises(UserError) as error:
        tfds(Request('train'), tfds_name=name, path=str(tmp_path))
    message = str(error.value)
    assert re.match(r'data\.path: \S+ is not prepared in ', message)
    config = name.partition(':')[0]
    assert f'python -m big_vit.prepare {config} --data_dir DIR' in message
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'elsewhere'))
    with pytest.raises(UserError, match='elsewhere'):
        tfds(Request('train'), tfds_name=name)


def test_unreadable_tfds_name(tmp_path):
    with pytest.raises(UserError, match=r'evals\.x\.tfds_name: cannot read'):
        tfds(Request('train', key='evals.x'), tfds_name='../etc', path=str(tmp_path))


def png(image: np.ndarray) -> io.BytesIO:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, 'PNG')
    file.seek(0)
    return file


def tiny_image(i: int, varying: bool) -> np.ndarray:
    height = 8 + i % 3 if varying else 8
    return np.random.default_rng(i).integers(0, 256, (height, 10, 3), np.uint8)


def prepare(
    directory: Path, *, varying: bool, unlabelled: bool = False, file_format: str = 'array_record'
) -> None:
    """Prepares a dataset as `tfds build` does, which needs no TensorFlow for PNG bytes."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version('1.0.0')

        def _info(self):
            shape = (None, None, 3) if varying else (8, 10, 3)
            features = {
                'image': tfds.features.Image(shape=shape, encoding_format='png'),
                'label': tfds.features.ClassLabel(num_classes=3),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _):
            return {'train': self._generate_examples(20), 'test': self._generate_examples(5)}

        def _generate_examples(self, count):
            for i in range(count):
                label = -1 if unlabelled else i % 3
                yield i, {'image': png(tiny_image(i, varying)), 'label': label}

    builder = Tiny(data_dir=directory, file_format=file_format)
    builder.download_and_prepare()


@pytest.mark.parametrize('varying', [False, True])
def test_tfds_reads_what_was_prepared(tmp_path, no_network, varying):
    prepare(tmp_path, varying=varying)
    source = tfds(Request('train'), tfds_name='tiny', path=str(tmp_path))
    assert (source.length, source.num_classes) == (20, 3)
    assert source.image_shape == (None if varying else (8, 10, 3))
    assert not source.in_memory
    loaded = source.load(np.arange(20))
    # Files as they are: what decodes them may need a part only.
    assert all(isinstance(image, bytes) for image in loaded['image'])
    assert loaded['label'].dtype == np.int32
    # The files hold the examples in an order of their own; compare as sets.
    pixels = [decode.Encoded(image).pixels() for image in loaded['image']]
    found = sorted((int(y), x.tobytes()) for x, y in zip(pixels, loaded['label'], strict=True))
    expected = sorted((i % 3, tiny_image(i, varying).tobytes()) for i in range(20))
    assert found == expected
    half = tfds(Request('train[50%:]'), tfds_name='tiny:1.*.*', path=str(tmp_path))
    np.testing.assert_array_equal(half.load(np.arange(10))['label'], loaded['label'][10:])
    for image, same in zip(half.load(np.array([9, 0]))['image'], (19, 10), strict=True):
        assert image == loaded['image'][same]
    np.testing.assert_array_equal(source.labels(), loaded['label'])
    np.testing.assert_array_equal(half.labels(), loaded['label'][10:])
    assert re.search(r'tiny-train\.array_record-00000-of-00001, record 12', half.place(2))


def test_tfds_reads_parquet(tmp_path, no_network):
    prepare(tmp_path / 'a', varying=True)
    prepare(tmp_path / 'b', varying=True, file_format='parquet')
    wanted = tfds(Request('train[3:]'), tfds_name='tiny', path=str(tmp_path / 'a'))
    found = tfds(Request('train[3:]'), tfds_name='tiny', path=str(tmp_path / 'b'))
    assert found.length == wanted.length == 17
    index = np.array([5, 0, 16, 5])
    assert list(found.load(index)['image']) == wanted.load(index)['image']
    np.testing.assert_array_equal(found.labels(), wanted.labels())


@pytest.fixture
def tfrecords(tmp_path, monkeypatch):
    """What TFDS 4.9.10 wrote with TensorFlow 2.21: the dataset of `prepare`, as TFRecord files."""
    monkeypatch.setenv('BIG_VIT_CACHE', str(tmp_path / 'cache'))
    return shutil.copytree(Path(__file__).parents[1] / 'oracles' / 'tfrecord', tmp_path / 'data')


def test_tfds_reads_tfrecord_without_tensorflow(tfrecords, no_network):
    source = tfds(Request('train'), tfds_name='tiny', path=str(tfrecords))
    assert source.class_names == ('ant', 'bee', 'cow')
    loaded = source.load(np.arange(20))
    pixels = [decode.Encoded(image).pixels() for image in loaded['image']]
    found = sorted((int(y), x.tobytes()) for x, y in zip(pixels, loaded['label'], strict=True))
    assert found == sorted((i % 3, tiny_image(i, True).tobytes()) for i in range(20))
    again = tfds(Request('train'), tfds_name='tiny', path=str(tfrecords)).load(np.array([19, 3]))
    assert list(again['image']) == [loaded['image'][19], loaded['image'][3]]
    assert 'tensorflow' not in sys.modules


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda data: data[:-7], 'truncated: the record at byte'),
        (lambda data: data + b'abc', 'truncated at byte .*, in the head of a record'),
        (lambda data: data[:3] + b'\x01' + data[4:], 'damaged at byte 0: no record begins there'),
    ],
)
def test_a_damaged_tfrecord_is_named(tfrecords, no_network, damage, message):
    file = next(tfrecords.rglob('tiny-train.tfrecord*'))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=rf'tiny-train\.tfrecord.*{message}'):
        tfds(Request('train'), tfds_name='tiny', path=str(tfrecords))


def test_tfds_in_threads(tmp_path, no_network):
    prepare(tmp_path, varying=True)
    spec = dataset.Spec(
        key='data', name='tfds', split='train', transform='central_crop(size)', image_size=(8, 8),
        settings=(('path', str(tmp_path)), ('tfds_name', 'tiny'),), cache='none',
    )  # fmt: skip
    source, crop = dataset.open_examples((spec,))
    plain = tfds(Request('train'), tfds_name='tiny', path=str(tmp_path))
    kept = pipeline.Order(batch_size=8, seed=0)
    batches = pipeline.train_batches(source, crop, kept, num_threads=4)
    for step, batch in enumerate(itertools.islice(batches, 6)):
        index, _ = order.example_indices(step, length=20, batch_size=8, seed=0)
        expected = plain.load(index)
        np.testing.assert_array_equal(batch['label'], expected['label'])
        for image, data in zip(batch['image'], expected['image'], strict=True):
            whole = decode.Encoded(data).pixels()
            top = (whole.shape[0] - 8) // 2
            np.testing.assert_array_equal(image, whole[top : top + 8, 1:9])
    batches.close()


def test_tfds_refuses(tmp_path, no_network):
    prepare(tmp_path, varying=False)
    with pytest.raises(UserError, match=r'there is no split .val., only test, train'):
        tfds(Request('val'), tfds_name='tiny', path=str(tmp_path))
    with pytest.raises(UserError, match=r'data.num_classes is 2 but tfds:tiny has 3 classes'):
        tfds(Request('train', num_classes=2), tfds_name='tiny', path=str(tmp_path))
    with pytest.raises(UserError, match=r'tiny:2\.0\.0 is not prepared .*there is 1\.0\.0'):
        tfds(Request('train'), tfds_name='tiny:2.0.0', path=str(tmp_path))
    directory = tmp_path / 'tiny/1.0.0'
    info_file = directory / 'dataset_info.json'
    info = json.loads(info_file.read_text())
    info_file.write_text(json.dumps(info | {'fileFormat': 'riegeli'}))
    with pytest.raises(UserError, match='riegeli files, which cannot be read at random'):
        tfds(Request('train'), tfds_name='tiny', path=str(tmp_path))
    info_file.write_text('{"name": ')
    with pytest.raises(UserError, match=r'dataset_info\.json .*cannot be read'):
        tfds(Request('train'), tfds_name='tiny', path=str(tmp_path))
    info_file.write_text(json.dumps(info))
    features_file = directory / 'features.json'
    features = features_file.read_text()
    for damaged in ('{"', '{"type": "no.such.Feature"}', None):
        features_file.unlink() if damaged is None else features_file.write_text(damaged)
        with pytest.raises(UserError, match=r'features\.json: cannot be read'):
            tfds(Request('train'), tfds_name='tiny', path=str(tmp_path))
    features_file.write_text(features)
    next(directory.glob('*train*')).unlink()
    with pytest.raises(UserError, match='array_record-00000-of-00001: missing'):
        tfds(Request('train'), tfds_name='tiny', path=str(tmp_path))


def test_tfds_refuses_a_split_without_labels(tmp_path, no_network):
    prepare(tmp_path, varying=False, unlabelled=True)
    source = tfds(Request('test'), tfds_name='tiny', path=str(tmp_path))
    with pytest.raises(UserError, match=r'data\.split: example 2 of .test. of tiny has label -1'):
        source.load(np.array([2]))


@pytest.mark.slow
@pytest.mark.skipif(
    not FASHION.is_dir() or importlib.util.find_spec('tensorflow') is None,
    reason='needs dataset-fashion-mnist and the prepare extra',
)
@pytest.mark.parametrize('file_format', ['array_record', 'tfrecord'])
def test_the_real_builder_of_fashion_mnist(tmp_path, monkeypatch, file_format):
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import resource

    monkeypatch.setenv('BIG_VIT_CACHE', str(tmp_path / 'cache'))
    downloads = tmp_path / 'downloads'
    downloads.mkdir()
    # Debian's files are compressed anew, so they are put where TFDS looks with what it expects.
    for url, info in tfds.builder_cls('fashion_mnist').url_infos.items():
        name = url.rpartition('/')[2]
        path = downloads / resource.get_dl_fname(url, info.checksum)
        shutil.copy(FASHION / name, path)
        resource.write_info_file(url, path, 'fashion_mnist', name, info)
    folder = prepare_command.prepare('fashion_mnist', str(tmp_path), file_format, str(downloads))
    assert folder.is_dir()
    found = tfds(Request('train'), tfds_name='fashion_mnist', path=str(tmp_path))
    wanted = idx.idx(Request('train'), path=str(FASHION)).load(np.arange(60_000))
    loaded = found.load(np.arange(60_000))
    pixels = (decode.Encoded(image, 1).pixels().tobytes() for image in loaded['image'])
    ours = sorted(zip(loaded['label'].tolist(), pixels, strict=True))
    theirs = (image.tobytes() for image in wanted['image'])
    assert ours == sorted(zip(wanted['label'].tolist(), theirs, strict=True))


def test_importing_the_package_is_light():
    program = (
        'import sys, big_vit.data.sources.registry, big_vit.data.transforms; '
        'heavy = {"jax", "sklearn", "grain", "tensorflow_datasets", "cv2", "PIL", "tensorflow"}; '
        'print(sorted(heavy & set(sys.modules)))'
    )
    run = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert run.stdout.strip() == '[]', run.stderr
