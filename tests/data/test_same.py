"""One dataset in every format: the same batches, whichever it is read from."""

import csv
import io
import itertools
import json
import tarfile

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from big_vit.data import dataset, pipeline

COUNT, CLASSES, SIZE = 24, ('ant', 'bee', 'cow'), (20, 20)
# Random crops of photographs, so that sizes, decoding and randomness all count.
TRANSFORM = 'decode | rrc(size) | flip_lr | color_jitter(0.4)'


@pytest.fixture(scope='module')
def pictures():
    """PNG files, pixels of one size and labels, sorted by class as a folder is."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (COUNT, 30, 34, 3), np.uint8)
    labels = np.sort(np.arange(COUNT) % len(CLASSES)).astype(np.int32)
    files = [cv2.imencode('.png', image[..., ::-1])[1].tobytes() for image in images]
    return files, images, labels


def as_folder(folder, pictures):
    files, _, labels = pictures
    for i, (file, label) in enumerate(zip(files, labels, strict=True)):
        path = folder / 'train' / CLASSES[label] / f'{i:03d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file)
    return {'name': 'folder', 'path': str(folder)}


def as_csv(folder, pictures):
    files, _, labels = pictures
    with (folder / 'train.csv').open('w', newline='') as table:
        rows = csv.writer(table)
        rows.writerow(['image', 'label'])
        for i, (file, label) in enumerate(zip(files, labels, strict=True)):
            (folder / f'{i}.png').write_bytes(file)
            rows.writerow([f'{i}.png', CLASSES[label]])
    return {'name': 'table', 'path': str(folder)}


def as_jsonl(folder, pictures):
    files, _, labels = pictures
    lines = []
    for i, (file, label) in enumerate(zip(files, labels, strict=True)):
        (folder / f'{i}.png').write_bytes(file)
        lines.append(json.dumps({'file': f'{i}.png', 'kind': CLASSES[label]}))
    (folder / 'train.jsonl').write_text('\n'.join(lines))
    columns = {'image_column': 'file', 'label_column': 'kind'}
    return {'name': 'table', 'path': str(folder / 'train.jsonl'), **columns}


def as_tar(folder, pictures):
    files, _, labels = pictures
    for shard in range(2):
        with tarfile.open(folder / f'train-{shard:04d}.tar', 'w') as archive:
            for i in range(shard * COUNT // 2, (shard + 1) * COUNT // 2):
                for name, data in (
                    (f'{i:03d}.png', files[i]),
                    (f'{i:03d}.cls', CLASSES[labels[i]].encode()),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return {'name': 'tar', 'path': str(folder)}


def as_parquet(folder, pictures):
    files, _, labels = pictures
    image = pa.array([{'bytes': file, 'path': None} for file in files])
    names = pa.array([CLASSES[label] for label in labels])
    table = pa.table({'image': image, 'label': names})
    pq.write_table(table, folder / 'train-00000-of-00001.parquet', row_group_size=5)
    return {'name': 'parquet', 'path': str(folder)}


def as_npz(folder, pictures):
    _, images, labels = pictures
    np.savez(folder / 'train.npz', image=images, label=labels)
    return {'name': 'arrays', 'path': str(folder)}


def as_tfds(folder, pictures):
    import tensorflow_datasets as tfds

    files, _, labels = pictures

    class Insects(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version('1.0.0')

        def _info(self):
            features = {
                'image': tfds.features.Image(shape=(None, None, 3), encoding_format='png'),
                'label': tfds.features.ClassLabel(names=list(CLASSES)),
            }
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, _):
            return {'train': self._generate_examples()}

        def _generate_examples(self):
            for i, (file, label) in enumerate(zip(files, labels, strict=True)):
                yield i, {'image': io.BytesIO(file), 'label': CLASSES[label]}

    Insects.name = 'insects'
    Insects(data_dir=folder, file_format='array_record').download_and_prepare()
    return {'name': 'tfds', 'tfds_name': 'insects', 'path': str(folder)}


WRITERS = {
    'csv': as_csv, 'jsonl': as_jsonl, 'tar': as_tar, 'parquet': as_parquet, 'npz': as_npz,
    'tfds': as_tfds,
}  # fmt: skip


def batches(where, monkeypatch, tmp_path, cache='none', **changes):
    monkeypatch.setenv('BIG_VIT_CACHE', str(tmp_path / 'cache'))
    values = {'key': 'data', 'split': 'train', 'transform': TRANSFORM, 'image_size': SIZE}
    name, *settings = where.items()
    values |= {'cache': cache, **changes}
    spec = dataset.Spec(**dict([name]), **values, settings=tuple(settings))
    source, rest = dataset.open_examples((spec,))
    assert source.length == COUNT
    assert source.num_classes == len(CLASSES)
    made = pipeline.train_batches(source, rest, pipeline.Order(batch_size=10, seed=4))
    found = list(itertools.islice(made, 7))
    made.close()
    return found


@pytest.fixture(scope='module')
def wanted(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp('folder')
    with pytest.MonkeyPatch.context() as patch:
        return batches(as_folder(folder, pictures), patch, folder)


def assert_same(found, wanted):
    for batch, other in zip(found, wanted, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            assert batch[name].dtype == other[name].dtype
            np.testing.assert_array_equal(batch[name], other[name])


def test_the_folder_has_the_pictures(wanted, pictures):
    files, images, labels = pictures
    del files
    seen = np.concatenate([batch['label'] for batch in wanted])[: 2 * COUNT]
    np.testing.assert_array_equal(np.bincount(seen), 2 * np.bincount(labels))
    assert wanted[0]['image'].shape == (10, *SIZE, 3)
    assert len(np.unique(images[0])) > 100


@pytest.mark.parametrize('kind', WRITERS)
@pytest.mark.parametrize('cache', ['none', 'decoded'])
def test_batches_do_not_depend_on_the_format(kind, cache, pictures, wanted, tmp_path, monkeypatch):
    where = WRITERS[kind](tmp_path, pictures)
    assert_same(batches(where, monkeypatch, tmp_path, cache), wanted)


def test_a_resized_copy_holds_the_same_where_nothing_shrinks(
    pictures, wanted, tmp_path, monkeypatch
):
    where = as_folder(tmp_path / 'folder', pictures)
    found = batches(where, monkeypatch, tmp_path, 'resized', cache_side=30)
    assert_same(found, wanted)
    written = [path for path in (tmp_path / 'cache').rglob('*') if path.is_file()]
    assert written
    times = {path: path.stat().st_mtime_ns for path in written}
    assert_same(batches(where, monkeypatch, tmp_path, 'resized', cache_side=30), wanted)
    assert times == {path: path.stat().st_mtime_ns for path in times}
