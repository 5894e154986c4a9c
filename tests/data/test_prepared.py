"""What TFDS prepared: features other than labelled images, and damaged files.

tests/oracles/tfrecord was written by TFDS 4.9.10 with TensorFlow 2.21.
"""

import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from big_vit.data import files
from big_vit.data.sources import tfrecord
from big_vit.data.sources.base import Request
from big_vit.data.sources.prepared import tfds
from big_vit.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('BIG_VIT_CACHE', str(tmp_path / 'cache'))


def prepare(folder, image, label, example, supervised=None, file_format='array_record'):
    """Writes a dataset `other` of ten examples, `example(i)` being an image and a label."""
    import tensorflow_datasets

    core, names = tensorflow_datasets.core, supervised or ('image', 'label')

    class Other(core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = core.Version('1.0.0')

        def _info(self):
            features = core.features.FeaturesDict(dict(zip(names, (image, label), strict=True)))
            return core.DatasetInfo(builder=self, features=features, supervised_keys=supervised)

        def _split_generators(self, _):
            return {'train': self._generate_examples()}

        def _generate_examples(self):
            for i in range(10):
                yield i, dict(zip(names, example(i), strict=True))

    Other(data_dir=folder, file_format=file_format).download_and_prepare()
    return str(folder)


def number(i, *shape):
    return np.full(shape, i, np.uint8)


@pytest.mark.parametrize('file_format', ['array_record', 'parquet'])
def test_images_that_are_plain_tensors(tmp_path, file_format):
    from tensorflow_datasets import features

    folder = prepare(
        tmp_path / 'data',
        features.Tensor(shape=(6, 5, 2), dtype=np.uint8),
        features.ClassLabel(names=['even', 'odd']),
        lambda i: (number(i, 6, 5, 2), i % 2),
        supervised=('scan', 'parity'),
        file_format=file_format,
    )
    source = tfds(Request('train'), tfds_name='other', path=folder)
    assert (source.image_shape, source.channels) == ((6, 5, 2), 2)
    assert source.class_names == ('even', 'odd')
    loaded = source.load(np.arange(10))
    assert loaded['image'].shape == (10, 6, 5, 2)
    first = loaded['image'][:, 0, 0, 0]
    assert sorted(first.tolist()) == list(range(10))
    np.testing.assert_array_equal(loaded['label'], first % 2)
    assert source.labels is not None
    np.testing.assert_array_equal(source.labels(), first % 2)


def test_tensors_of_several_sizes_and_several_labels(tmp_path):
    from tensorflow_datasets import features

    folder = prepare(
        tmp_path / 'data',
        features.Tensor(shape=(None, 5, 3), dtype=np.uint8),
        features.Sequence(features.ClassLabel(num_classes=4)),
        lambda i: (number(i, 1 + i, 5, 3), list(range(i % 4))),
    )
    source = tfds(Request('train'), tfds_name='other', path=folder)
    assert (source.length, source.num_classes, source.image_shape) == (10, 4, None)
    assert source.labels is None
    loaded = source.load(np.arange(10))
    values = [int(image[0, 0, 0]) for image in loaded['image']]
    assert sorted(values) == list(range(10))
    assert [len(image) for image in loaded['image']] == [1 + i for i in values]
    assert [label.tolist() for label in loaded['label']] == [list(range(i % 4)) for i in values]


@pytest.mark.parametrize(
    ('shape', 'kind', 'message'),
    [
        (
            (6, 5),
            np.int64,
            r'the images of other have shape \(6, 5\), not height, width and channels',
        ),
        ((6, 5, 3), np.float32, r'labels of other \(label\) are float32, not whole numbers'),
    ],
)
def test_other_datasets_are_refused(tmp_path, shape, kind, message):
    from tensorflow_datasets import features

    folder = prepare(
        tmp_path / 'data',
        features.Tensor(shape=shape, dtype=np.uint8),
        features.Scalar(kind),
        lambda i: (number(i, *shape), i % 2),
    )
    with pytest.raises(UserError, match=rf'data\.tfds_name: {message}'):
        tfds(Request('train', num_classes=2), tfds_name='other', path=folder)


def test_a_truncated_array_record_is_named(tmp_path):
    from tensorflow_datasets import features

    image = features.Tensor(shape=(60, 50, 3), dtype=np.uint8)
    rng = np.random.default_rng(0)
    folder = prepare(
        tmp_path / 'data',
        image,
        features.ClassLabel(num_classes=2),
        lambda i: (rng.integers(0, 256, (60, 50, 3), np.uint8), i % 2),
    )
    file = next(Path(folder).rglob('other-train.array_record*'))
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UserError, match=r'other-train\.array_record-00000-of-00001, record 0'):
        tfds(Request('train'), tfds_name='other', path=folder).load(np.array([0]))


def test_a_tfrecord_file_with_a_record_less_is_refused(tmp_path):
    tiny = Path(__file__).parents[1] / 'oracles' / 'tfrecord'
    folder = shutil.copytree(tiny, tmp_path / 'data')
    file = next(folder.rglob('tiny-train.tfrecord*'))
    data = file.read_bytes()
    (length,) = struct.unpack('<Q', data[:8])
    file.write_bytes(data[8 + 4 + length + 4 :])
    with pytest.raises(UserError, match=r'19 records, but dataset_info\.json says 20'):
        tfds(Request('train'), tfds_name='tiny', path=str(folder))


def test_a_tfrecord_index_does_not_read_the_data(tmp_path, monkeypatch):
    """Records as large as photographs are skipped: an index of ImageNet is not a read of it."""
    path, size, count = tmp_path / 'x.tfrecord', 110_000, 50
    head = struct.pack('<Q', size)
    record = head + struct.pack('<I', tfrecord.masked_crc(head)) + bytes(size + 4)
    path.write_bytes(record * count)
    read, real = [], files.read_range
    monkeypatch.setattr(files, 'read_range', lambda f, a, n: read.append(n) or real(f, a, n))
    index = tfrecord.indexed(files.stored([files.place(str(path), 'data.path')]))
    np.testing.assert_array_equal(index['offset'], np.arange(count) * len(record) + 12)
    assert sum(read) < path.stat().st_size / 5
