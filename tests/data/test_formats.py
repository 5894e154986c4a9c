"""Folders, tables, arrays, tar shards, Parquet: what others wrote is read, mistakes are named.

In tests/oracles: webdataset-train-000000.tar was written by webdataset 1.0.2 (TarWriter), hf and
hf_disk by datasets 5.2 (to_parquet and save_to_disk), each with PNG pictures of the numbers of
`picture`.
"""

import dataclasses
import hashlib
import inspect
import io
import json
import os
import re
import shutil
import tarfile
import zipfile
from pathlib import Path

import cv2
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from memory import peak_of
from PIL import Image
from tiny import write_folder

from big_vit.data import dataset, decode, files, order, transforms
from big_vit.data.sources import arrays, arrow, folder, parquet, records, table, tar
from big_vit.data.sources.base import Request
from big_vit.data.sources.known import Known
from big_vit.data.sources.registry import SOURCES
from big_vit.errors import UserError

ORACLES = Path(__file__).parents[1] / 'oracles'


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('BIG_VIT_CACHE', str(tmp_path / 'cache'))


def picture(i):
    return np.random.default_rng(i).integers(0, 256, (9 + i % 2, 11, 3), np.uint8)


def png(i):
    file = io.BytesIO()
    Image.fromarray(picture(i)).save(file, 'PNG')
    return file.getvalue()


def assert_pictures(images, numbers):
    for image, i in zip(images, numbers, strict=True):
        np.testing.assert_array_equal(decode.Encoded(image).pixels(), picture(i))


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def refused(call, message):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert '\n' not in str(error.value)


# --- Folders ---------------------------------------------------------------------------


def test_a_folder_of_classes(tmp_path):
    for i, name in enumerate(['zebra/b.png', 'ant/x y.PNG', 'ant/ä/ü.png', 'zebra/a.png']):
        write(tmp_path / 'set' / name, png(i))
    write(tmp_path / 'set' / 'ant' / 'notes.md', b'no image')
    write(tmp_path / 'set' / 'ant' / '.hidden.png', b'')
    source = folder.folder(Request('train'), path=str(tmp_path / 'set'))
    assert (source.class_names, source.num_classes, source.length) == (('ant', 'zebra'), 2, 4)
    loaded = source.load(np.arange(4))
    assert loaded['label'].tolist() == [0, 0, 1, 1]
    assert_pictures(loaded['image'], [1, 2, 3, 0])
    assert source.place(1).endswith('set/ant/ä/ü.png')
    np.testing.assert_array_equal(source.labels(), [0, 0, 1, 1])


def test_folders_of_splits(tmp_path):
    root = write_folder(tmp_path / 'set', 12, 3, splits=('train', 'val'))
    assert folder.folder(Request('train+val'), path=str(root)).length == 24
    (root / 'val' / 'class1').rename(root / 'val' / 'other')
    refused(
        lambda: folder.folder(Request('val'), path=str(root)),
        r"val has classes that train has not \('other'; it has class0, class1, class2\)",
    )
    refused(
        lambda: folder.folder(Request('test'), path=str(root)), r"no split 'test', only train, val"
    )
    # A class that an evaluation lacks is no mistake; its numbers stay those of training.
    for file in (root / 'val' / 'other').iterdir():
        file.unlink()
    (root / 'val' / 'other').rmdir()
    assert set(folder.folder(Request('val'), path=str(root)).labels()) == {0, 2}


def test_a_folder_in_memory_of_fsspec(tmp_path):
    system = fsspec.filesystem('memory')
    for i in range(4):
        system.pipe(f'/set/train/{"ab"[i % 2]}/{i}.png', png(i))
    source = folder.folder(Request('train'), path='memory://set')
    assert_pictures(source.load(np.array([1, 2]))['image'], [2, 1])
    assert source.place(0) == 'memory:///set/train/a/0.png'


def test_other_media_are_known_by_their_extensions(tmp_path):
    write(tmp_path / 'words' / 'a' / '1.txt', 'grün'.encode())
    write(tmp_path / 'sounds' / 'a' / '1.wav', b'RIFF')
    assert folder.folder(Request('train'), path=str(tmp_path / 'words')).load(np.array([0]))[
        'text'
    ] == ['grün']
    assert folder.folder(Request('train'), path=str(tmp_path / 'sounds')).load(np.array([0]))[
        'audio'
    ] == [b'RIFF']


def test_links_are_followed_but_not_for_ever(tmp_path):
    write(tmp_path / 'elsewhere' / '0.png', png(0))
    (tmp_path / 'set' / 'a').mkdir(parents=True)
    (tmp_path / 'set' / 'a' / 'loop').symlink_to(tmp_path / 'set' / 'a')
    (tmp_path / 'set' / 'a' / 'link.png').symlink_to(tmp_path / 'elsewhere' / '0.png')
    assert folder.folder(Request('train'), path=str(tmp_path / 'set')).length == 1


@pytest.mark.slow
def test_a_folder_of_many_files_opens_fast_and_small(tmp_path):
    count = 20_000
    for c in range(20):
        at = tmp_path / 'set' / f'class{c:02d}'
        at.mkdir(parents=True)
        for i in range(count // 20):
            os.close(os.open(at / f'picture-number-{i:06d}.jpg', os.O_CREAT))
    source, peak = peak_of(lambda: folder.folder(Request('train'), path=str(tmp_path / 'set')))
    assert source.length == count
    assert peak < 60e6
    assert source.place(count - 1).endswith('class19/picture-number-000999.jpg')


def test_mistakes_with_folders(tmp_path):
    (tmp_path / 'empty').mkdir()
    refused(
        lambda: folder.folder(Request('train'), path=str(tmp_path / 'none')),
        r'data\.path: .* is not a folder',
    )
    refused(
        lambda: folder.folder(Request('train'), path=str(tmp_path / 'empty')),
        'has no folders: put the files',
    )
    refused(lambda: folder.folder(Request('train'), path=''), r'data\.path must be set')
    write(tmp_path / 'docs' / 'a' / 'x.pdf', b'')
    refused(
        lambda: folder.folder(Request('train'), path=str(tmp_path / 'docs')),
        r'\(1 file left out \(1 \.pdf\)\)',
    )
    write(tmp_path / 'both' / 'a' / 'x.png', b'')
    write(tmp_path / 'both' / 'b' / 'x.mp4', b'')
    refused(
        lambda: folder.folder(Request('train'), path=str(tmp_path / 'both')),
        'image and video files',
    )
    root = str(write_folder(tmp_path / 'set', 12, 3))
    refused(
        lambda: folder.folder(Request('train', num_classes=2), path=root),
        'num_classes is 2 but set has 3|has 3 classes',
    )
    refused(lambda: folder.folder(Request('train[:0]'), path=root), 'holds no example')
    refused(
        lambda: folder.folder(Request('train'), path='nope://x'),
        r"data\.path: cannot read 'nope://x'",
    )


# --- Tables ----------------------------------------------------------------------------


def tabled(tmp_path, text, name='train.csv', count=4):
    for i in range(count):
        write(tmp_path / f'{i}.png', png(i))
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_a_csv_with_names_and_splits(tmp_path):
    path = tabled(
        tmp_path,
        'image,label,split\n0.png,cat,train\n1.png,"a, b",train\n2.png,cat,test\n',
        'x.csv',
    )
    source = table.table(Request('train'), path=path)
    assert (source.class_names, source.length) == (('a, b', 'cat'), 2)
    loaded = source.load(np.array([1, 0]))
    assert loaded['label'].tolist() == [0, 1]
    assert_pictures(loaded['image'], [1, 0])
    assert source.place(1).endswith('1.png (' + path + ', line 3)')
    assert table.table(Request('test'), path=path).labels().tolist() == [1]


def test_a_tsv_and_numbers(tmp_path):
    path = tabled(tmp_path, 'label\timage\n3\t0.png\n1\t1.png\n', 'x.tsv')
    source = table.table(Request('train'), path=path)
    assert (source.num_classes, source.class_names) == (4, None)
    assert source.labels().tolist() == [3, 1]


def test_several_labels(tmp_path):
    lines = [{'image': '0.png', 'label': ['a', 'c']}, {'image': '1.png', 'label': []}]
    path = tabled(tmp_path, '\n'.join(map(json.dumps, lines)), 'x.jsonl')
    found = table.table(Request('train'), path=path).load(np.arange(2))['label']
    assert [label.tolist() for label in found] == [[0, 1], []]
    path = tabled(tmp_path, 'image,label\n0.png,a|c\n1.png,c\n', 'y.csv')
    found = table.table(Request('train'), path=path).load(np.arange(2))['label']
    assert [label.tolist() for label in found] == [[0, 1], [1]]


@pytest.mark.parametrize(
    ('text', 'name', 'message'),
    [
        ('image,kind\n0.png,a\n', 'x.csv', r"line 2: no column 'label' \(it has image, kind\)"),
        ('', 'x.csv', 'has no rows'),
        ('image,label\n', 'x.csv', 'has no rows'),
        ('image,label\nno.png,a\n', 'x.csv', r'line 2: there is no file .*no\.png'),
        ('image,label\n../0.png,a\n', 'x.csv', 'line 2: ../0.png leads out of'),
        ('image,label\n0.png,-1\n', 'x.csv', 'label -1 is not one of 0 classes: label from 0'),
        ('image,label\n0.doc,a\n', 'x.csv', 'line 2: all files must be images'),
        ('{"image": "0.png"', 'x.jsonl', 'line 1: is not JSON'),
        ('[1]', 'x.jsonl', 'line 1: is not a JSON object'),
        ('{"image": "0.png", "label": 1.5}', 'x.jsonl', 'labels must be numbers or names, not 1.5'),
    ],
)
def test_mistakes_with_tables(tmp_path, text, name, message):
    path = tabled(tmp_path, text, name)
    refused(lambda: table.table(Request('train'), path=path), message)


def test_mistakes_with_where_tables_are(tmp_path):
    refused(lambda: table.table(Request('train'), path=str(tmp_path / 'x.csv')), 'there is no file')
    refused(
        lambda: table.table(Request('train'), path=str(tmp_path)),
        r'no \.csv, \.tsv or \.jsonl file in',
    )
    refused(
        lambda: table.table(Request('train'), path=str(tmp_path / 'x')), 'neither a folder nor a'
    )
    (tmp_path / 'x.csv').write_bytes(b'image,label\n\xff\xfe,a')
    refused(
        lambda: table.table(Request('train'), path=str(tmp_path / 'x.csv')), 'not text in UTF-8'
    )


# --- Arrays ----------------------------------------------------------------------------


def test_arrays_in_the_layouts_that_are_usual(tmp_path):
    images, labels = np.arange(48, dtype=np.uint8).reshape(4, 3, 4), np.array([0, 2, 1, 0])
    np.savez(tmp_path / 'keras.npz', x_train=images, y_train=labels, x_test=images, y_test=labels)
    np.savez(tmp_path / 'med.npz', train_images=images, train_labels=labels[:, None])
    np.savez(tmp_path / 'plain.npz', image=images, label=labels)
    (tmp_path / 'npy').mkdir()
    np.save(tmp_path / 'npy' / 'train_images.npy', images)
    np.save(tmp_path / 'npy' / 'train_labels.npy', labels)
    for path in ('keras.npz', 'med.npz', 'plain.npz', 'npy'):
        source = arrays.arrays(Request('train'), path=str(tmp_path / path))
        assert (source.length, source.num_classes, source.image_shape) == (4, 3, (3, 4, 1))
        loaded = source.load(np.array([2, 0]))
        np.testing.assert_array_equal(loaded['image'][..., 0], images[[2, 0]])
        assert loaded['label'].tolist() == [1, 0]
    assert arrays.arrays(Request('test'), path=str(tmp_path / 'keras.npz')).length == 4


@pytest.mark.parametrize('kind', [np.uint8, np.uint16, np.float32, np.float64])
def test_arrays_of_any_depth_and_number_of_channels(tmp_path, kind):
    images = (np.random.default_rng(0).random((3, 5, 6, 13)) * 200).astype(kind)
    np.savez(tmp_path / 'x.npz', image=images, label=np.eye(3, 4, dtype=np.uint8))
    source = arrays.arrays(Request('train'), path=str(tmp_path / 'x.npz'))
    loaded = source.load(np.arange(3))
    assert loaded['image'].dtype == (np.float32 if kind == np.float64 else kind)
    np.testing.assert_allclose(loaded['image'], images, rtol=1e-6)
    assert source.num_classes == 4
    assert [label.tolist() for label in loaded['label']] == [[0], [1], [2]]


def test_mistakes_with_arrays(tmp_path):
    def saved(**parts):
        np.savez(tmp_path / 'x.npz', **parts)
        return str(tmp_path / 'x.npz')

    def opened(**parts):
        path = saved(**parts)
        return lambda: arrays.arrays(Request('train'), path=path)

    good = np.zeros((3, 4, 4), np.uint8)
    refused(opened(image=good), r'no arrays of images and labels .*\(it has image\)')
    refused(opened(image=good, label=np.zeros(2, int)), '3 images of train but 2 labels')
    refused(opened(image=good, label=np.array([0, -1, 2])), 'example 1 of train has label -1')
    refused(opened(image=good, label=np.zeros(3)), 'labels of train are float64')
    refused(
        opened(image=good[0], label=np.zeros(4, int)), r'images of train are uint8 of shape \(4, 4'
    )
    refused(
        opened(image=good.astype(complex), label=np.zeros(3, int)), 'images of train are complex'
    )
    objects = np.array([good, None, 1], object)
    refused(opened(image=objects, label=np.zeros(3, int)), 'Python objects, which is never read')
    path = saved(image=good, label=np.zeros(3, int))
    refused(lambda: arrays.arrays(Request('val'), path=path), "no split 'val', only train")
    Path(path).write_bytes(Path(path).read_bytes()[:100])
    refused(lambda: arrays.arrays(Request('train'), path=path), r'x\.npz: cannot be read')
    refused(
        lambda: arrays.arrays(Request('train'), path=str(tmp_path / 'y.npz')),
        'neither a folder nor an',
    )
    bomb = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        bomb, {'descr': '|u1', 'fortran_order': False, 'shape': (1 << 40,)}
    )
    with zipfile.ZipFile(tmp_path / 'bomb.npz', 'w') as archive:
        archive.writestr('image.npy', bomb.getvalue())
        archive.writestr('label.npy', bomb.getvalue())
    refused(
        lambda: arrays.arrays(Request('train'), path=str(tmp_path / 'bomb.npz')), 'cannot be read'
    )


# --- Tar -------------------------------------------------------------------------------


def test_a_shard_that_webdataset_wrote():
    shard = str(ORACLES / 'webdataset-train-000000.tar')
    source = tar.tar(Request('train'), path=shard)
    assert (source.length, source.num_classes) == (6, 3)
    loaded = source.load(np.array([5, 0, 3]))
    assert loaded['label'].tolist() == [2, 0, 0]
    assert_pictures(loaded['image'], [5, 0, 3])
    kinds = tar.tar(Request('train'), path=shard, label_column='kind')
    assert kinds.class_names == ('x', 'y')
    assert kinds.labels().tolist() == [0, 1, 0, 1, 0, 1]
    with pytest.raises(
        UserError, match=r"sample folder/sample000 has no .* 'nothing'|has no \.cls"
    ):
        tar.tar(Request('train'), path=shard, label_column='nothing')


def archive_of(path, members, kind=tarfile.USTAR_FORMAT):
    with tarfile.open(path, 'w', format=kind) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type, info.linkname = tarfile.SYMTYPE, '/etc/passwd'
                archive.addfile(info)
            else:
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def test_shards_of_pictures_and_captions(tmp_path):
    pairs = [
        pair
        for i in range(5)
        for pair in (
            (f'{i:05d}.json', b'{"caption": "x"}'),
            (f'{i:05d}.jpg', png(i)),
            (f'{i:05d}.txt', f'picture {i} – Bär\n'.encode()),
        )
    ]
    shard = archive_of(tmp_path / '00000.tar', pairs)
    source = tar.tar(Request('train'), path=str(shard), text_column='TXT')
    assert (source.length, source.num_classes) == (5, 1)
    columns = source.load(np.array([3, 0]))
    assert [text.strip() for text in columns['text']] == ['picture 3 – Bär', 'picture 0 – Bär']
    assert columns['image'] == [png(3), png(0)] and columns['label'].tolist() == [0, 0]
    # Labels that there are stay; without text_column the words are no part of an example.
    whole = [*members([0]), ('0.txt', b'a'), *members([1]), ('1.txt', b'b')]
    named = archive_of(tmp_path / 'named.tar', whole)
    assert 'text' not in tar.tar(Request('train'), path=str(named)).load(np.arange(2))
    source = tar.tar(Request('train'), path=str(named), text_column='txt')
    assert source.labels().tolist() == [0, 1] and source.load(np.array([1]))['text'] == ['b']
    short = archive_of(tmp_path / 'short.tar', whole[:-1])
    with pytest.raises(UserError, match=r'sample 1 has no \.txt'):
        tar.tar(Request('train'), path=str(short), text_column='txt')


def members(numbers, prefix=''):
    return [
        pair
        for i in numbers
        for pair in ((f'{prefix}{i}.png', png(i)), (f'{prefix}{i}.cls', str(i % 3).encode()))
    ]


@pytest.mark.parametrize('kind', [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_by_range_glob_and_folder(tmp_path, kind):
    long = 'a/' * 60 if kind != tarfile.USTAR_FORMAT else 'a/'
    for shard in range(3):
        archive_of(
            tmp_path / f'train-{shard:03d}.tar',
            members(range(3 * shard, 3 * shard + 3), long),
            kind,
        )
    archive_of(tmp_path / 'val-000.tar', members([9, 10]), kind)
    for path in ('', 'train-{000..002}.tar', '*-00?.tar'):
        source = tar.tar(Request('train'), path=str(tmp_path / path))
        assert source.length == 9
        assert_pictures(source.load(np.array([8, 1, 4]))['image'], [8, 1, 4])
        assert source.labels().tolist() == [0, 1, 2] * 3
    assert tar.tar(Request('val'), path=str(tmp_path)).labels().tolist() == [0, 1]
    where = ': a/8.png' if kind == tarfile.USTAR_FORMAT else ' at byte '
    assert f'train-002.tar{where}' in source.place(8)


def test_nothing_leaves_an_archive(tmp_path):
    path = archive_of(
        tmp_path / 'x.tar',
        [('../up.png', png(0)), ('../up.cls', b'0'), ('link.png', None), ('link.cls', b'1')],
    )
    before = sorted(tmp_path.parent.rglob('*'))
    source = tar.tar(Request('train'), path=str(path))
    # The link is no image, so its sample has none.
    assert source.length == 1
    assert_pictures(source.load(np.array([0]))['image'], [0])
    cache = tmp_path / 'cache'
    assert [p for p in sorted(tmp_path.parent.rglob('*')) if cache not in [p, *p.parents]] == before


@pytest.mark.parametrize('share', [0.05, 0.5, 0.8])
def test_a_truncated_shard_is_named_with_the_place(tmp_path, share):
    path = archive_of(tmp_path / 'x.tar', members(range(20)))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share) // 100 * 100 + 7])
    refused(
        lambda: tar.tar(Request('train'), path=str(path)), r'x\.tar: (damaged or )?truncated.* byte'
    )


def test_mistakes_with_shards(tmp_path):
    refused(lambda: tar.tar(Request('train'), path=str(tmp_path / 'x.tar')), 'there is no shard')
    refused(lambda: tar.tar(Request('train'), path=str(tmp_path)), r'no \.tar file in')
    refused(
        lambda: tar.tar(Request('train'), path=str(tmp_path / 'x-{0..2}.tar')),
        r'no shard .*x-0\.tar',
    )
    (tmp_path / 'x.tar.gz').write_bytes(b'')
    refused(lambda: tar.tar(Request('train'), path=str(tmp_path)), 'compressed archives.*gzip -d')
    (tmp_path / 'y.tar').write_bytes(b'not a tar file' * 100)
    refused(
        lambda: tar.tar(Request('train'), path=str(tmp_path / 'y.tar')),
        r'y\.tar: damaged or truncated',
    )
    archive_of(tmp_path / 'z.tar', [('a.png', png(0))])
    refused(
        lambda: tar.tar(Request('train'), path=str(tmp_path / 'z.tar')),
        r"sample a has no \.cls and no 'cls'",
    )
    archive_of(tmp_path / 'e.tar', [('a.doc', b'')])
    refused(
        lambda: tar.tar(Request('train'), path=str(tmp_path / 'e.tar')), 'no sample with an image'
    )


def test_ten_million_examples_open_at_once(tmp_path, monkeypatch):
    count = 10_000_000
    shard = archive_of(tmp_path / 'x.tar', members(range(3)))
    mark = files.fingerprint([files.place(str(shard), 'data')], 'cls\0', 4)

    def made():
        return {
            'shard': np.zeros(count, np.uint32),
            'offset': np.full(count, 512, np.uint64),
            'size': np.full(count, len(png(0)), np.uint32),
            'kind': np.zeros(count, np.uint8),
            'label': np.zeros(count, np.int32),
            'words': np.zeros((0, 2), np.uint64),
            'values': np.frombuffer(b'0\n1\n2', np.uint8),
            'left': np.frombuffer(b'{}', np.uint8),
        }

    files.kept_arrays('tar', mark, made)

    def first_batch():
        source = tar.tar(Request('train[:90%]'), path=str(shard))
        index, _ = order.example_indices(123, length=source.length, batch_size=1024, seed=0)
        return source.length, source.load(index)

    (length, loaded), peak = peak_of(first_batch)
    assert length == 9_000_000 and peak < 200e6
    assert_pictures(loaded['image'][:1], [0])


# --- Parquet and Arrow -----------------------------------------------------------------


@pytest.mark.parametrize('path', ['hf', 'hf_disk', 'hf/data/train-00000-of-00001.parquet'])
def test_what_datasets_wrote(path):
    source = parquet.parquet(Request('train'), path=str(ORACLES / path))
    assert (source.length, source.class_names) == (7, ('ant', 'bee', 'cow'))
    loaded = source.load(np.array([6, 2]))
    assert loaded['label'].tolist() == [0, 2]
    assert_pictures(loaded['image'], [6, 2])
    several = parquet.parquet(Request('train'), path=str(ORACLES / path), label_column='tags')
    wanted = [[i % 4] + ([3] if i % 2 and i % 4 != 3 else []) for i in range(7)]
    assert [x.tolist() for x in several.load(np.arange(7))['label']] == wanted
    assert several.num_classes == 4
    if path == 'hf_disk':
        assert parquet.parquet(Request('test'), path=str(ORACLES / path)).labels().tolist() == [
            0,
            1,
        ]


def parquet_of(tmp_path, count=10, **more):
    columns = {
        'image': [png(i) for i in range(count)],
        'label': ['ab'[i % 2] for i in range(count)],
    }
    path = tmp_path / 'x' / 'train.parquet'
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({**columns, **more}), path, row_group_size=3)
    return path


def test_a_large_file_is_read_by_groups_of_rows_that_are_kept(tmp_path, monkeypatch):
    path = parquet_of(tmp_path)
    wanted = parquet.parquet(Request('train'), path=str(path)).load(np.arange(10))
    monkeypatch.setattr(arrow, 'IN_MEMORY_BYTES', 100)
    kept = tmp_path / 'cache' / 'blocks'
    source = parquet.parquet(Request('train'), path=str(path))
    assert source.shard_lengths.tolist() == [3, 3, 3, 1]
    assert not kept.exists()
    source.load(np.array([4, 5]))
    assert [file.name for file in kept.glob('*/*')] == ['1.arrow']
    for _ in range(2):
        found = parquet.parquet(Request('train'), path=str(path)).load(np.arange(10))
        assert list(found['image']) == list(wanted['image'])
        np.testing.assert_array_equal(found['label'], wanted['label'])
        assert sorted(file.name for file in kept.glob('*/*')) == [f'{n}.arrow' for n in range(4)]
    assert not (tmp_path / 'cache' / 'parquet').exists()


def test_a_copy_that_earlier_versions_made_is_read(tmp_path, monkeypatch):
    path = parquet_of(tmp_path)
    wanted = parquet.parquet(Request('train'), path=str(path)).load(np.arange(10))
    monkeypatch.setattr(arrow, 'IN_MEMORY_BYTES', 100)
    arrow._convert([files.place(str(path), 'x')], ['image', 'label'], 1000)
    found = parquet.parquet(Request('train'), path=str(path)).load(np.arange(10))
    assert list(found['image']) == list(wanted['image'])
    assert not (tmp_path / 'cache' / 'blocks').exists()


def test_mistakes_with_parquet(tmp_path):
    path = parquet_of(tmp_path)
    refused(
        lambda: parquet.parquet(Request('train'), path=str(path), label_column='kind'),
        r"no column 'kind' \(it has image, label\): set data\.label_column",
    )
    refused(
        lambda: parquet.parquet(
            Request('train'), path=str(path), image_column='label', label_column='image'
        ),
        'labels must be numbers or names',
    )
    refused(
        lambda: parquet.parquet(Request('train', num_classes=1), path=str(path)),
        'num_classes is 1 but',
    )
    refused(
        lambda: parquet.parquet(Request('train'), path=str(tmp_path / 'y.parquet')),
        'there is no file',
    )
    refused(
        lambda: parquet.parquet(Request('train'), path=str(tmp_path / 'cache')),
        'neither a folder nor a',
    )
    (tmp_path / 'none').mkdir()
    refused(
        lambda: parquet.parquet(Request('train'), path=str(tmp_path / 'none')),
        r'no \.parquet or \.arrow file',
    )
    data = path.read_bytes()
    for damaged in (data[: len(data) // 2], b'', b'PAR1' + data[4:-40]):
        path.write_bytes(damaged)
        refused(
            lambda: parquet.parquet(Request('train'), path=str(path)),
            r'train\.parquet: cannot be read',
        )
    parquet_of(tmp_path, label=[None] * 10)
    refused(
        lambda: parquet.parquet(Request('train'), path=str(path)), "row 0 of train has no 'label'"
    )


# --- Records ---------------------------------------------------------------------------


def resized_copy(tmp_path, side=40):
    root = write_folder(tmp_path / 'set', 12, 3)
    source = folder.folder(Request('train'), path=str(root))
    records.write_records(source, tmp_path / 'copy', 'train', side)
    return source, tmp_path / 'copy'


def test_a_resized_copy_has_smaller_pictures(tmp_path):
    source, copy = resized_copy(tmp_path)
    found = records.records(Request('train'), path=str(copy))
    assert (found.length, found.class_names) == (12, source.class_names)
    np.testing.assert_array_equal(found.labels(), source.labels())
    loaded, originals = found.load(np.arange(12)), source.load(np.arange(12))
    np.testing.assert_array_equal(loaded['label'], originals['label'])
    for image, data in zip(loaded['image'], originals['image'], strict=True):
        whole = decode.Encoded(data).pixels()
        assert min(image.shape[:2]) == 40
        wanted = Image.fromarray(whole).resize(image.shape[1::-1], Image.Resampling.BOX)
        assert np.abs(image.astype(int) - np.asarray(wanted).astype(int)).mean() < 3
    assert [path for path in tmp_path.iterdir() if path.name.startswith('.new')] == []


def test_a_copy_is_made_of_what_the_first_operations_make(tmp_path):
    """What only the file tells is lost in a copy: its orientation, and what is white in it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6)).save(file, 'PNG', exif=exif)
    write(tmp_path / 'set' / 'a' / '0.png', file.getvalue())
    shades = np.arange(24, dtype=np.float32).reshape(4, 6) / 24
    write(tmp_path / 'deep' / 'a' / '0.tif', cv2.imencode('.tif', shades)[1].tobytes())

    def loaded(name, transform):
        spec = dataset.Spec(
            'data', 'folder', 'train', transform, (4, 6), cache='resized',
            settings=(('path', str(tmp_path / name)),),
        )  # fmt: skip
        source, rest = dataset.open_spec(spec)
        columns = rest(source.load(np.arange(1)), np.zeros(1, np.uint64))
        return transforms.finished(columns, rest)['image'][0, ..., 0]

    plain = np.arange(24).reshape(4, 6)
    np.testing.assert_array_equal(loaded('set', ''), plain)
    np.testing.assert_array_equal(loaded('set', 'exif_transpose'), np.rot90(plain, -1))
    np.testing.assert_array_equal(loaded('set', 'decode'), plain)
    found = loaded('deep', 'decode(3, white=1) | flip_ud(1)')[::-1]
    assert np.abs(found - shades * 255).max() <= 0.51
    refused(lambda: loaded('deep', ''), r'0\.tif: its pixels are float32 .*decode\(3, black=0')


@pytest.mark.parametrize(
    ('name', 'file', 'settings'),
    [
        ('idx', 'train-images-idx3-ubyte', {}),
        ('arrays', 'train.npz', {}),
        ('arrays', 'x_train.npy', {}),
        ('parquet', 'train.parquet', {}),
        ('parquet', 'train.arrow', {}),
        ('table', 'train.csv', {}),
        ('tar', 'train.tar', {}),
        ('records', 'train.json', {}),
    ],
)
def test_no_source_waits_for_a_pipe(tmp_path, name, file, settings):
    os.mkfifo(tmp_path / file)
    if file.endswith('.npy'):
        os.mkfifo(tmp_path / 'y_train.npy')
    read = SOURCES[name]
    refused(lambda: read(Request('train'), path=str(tmp_path)), r'pipe or a device|truncated')


def test_mistakes_with_records(tmp_path):
    refused(lambda: records.records(Request('train'), path=str(tmp_path)), 'holds no records')
    source, copy = resized_copy(tmp_path)
    refused(lambda: records.records(Request('test'), path=str(copy)), "no split 'test', only train")
    about = json.loads((copy / 'train.json').read_text())
    (copy / 'train.json').write_text(json.dumps({**about, 'length': 13}))
    refused(
        lambda: records.records(Request('train'), path=str(copy)), '12 records and 12 labels of 13'
    )
    (copy / 'train.json').write_text('{')
    refused(lambda: records.records(Request('train'), path=str(copy)), 'cannot be read.*delete')
    first = next((tmp_path / 'set' / 'class0').iterdir())
    first.write_bytes(first.read_bytes()[:200])
    refused(
        lambda: records.write_records(source, tmp_path / 'other', 'train', 8),
        rf'{first.name}: (truncated|damaged) JPEG.*repair or remove it',
    )
    assert not (tmp_path / 'other').exists()


# --- What a config says ----------------------------------------------------------------


def spec_of(path, **changes):
    values = {'key': 'data', 'name': 'folder', 'split': 'train', 'transform': 'rrc(size)'}
    settings = (('path', str(path)),)
    return dataset.Spec(**{**values, 'image_size': (8, 8), 'settings': settings, **changes})


@pytest.mark.parametrize('name', SOURCES)
def test_a_source_needs_its_keys_without_a_default(name):
    parameters = inspect.signature(SOURCES[name]).parameters.values()
    required = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    spec = dataset.Spec('evals.x', name, 'nothing', '', (64, 64), num_classes=5)
    message = 'evals.x.split: there is no split'
    if required:
        message = f"config: evals.x.{required[0]} must be set for evals.x.name='{name}'"
    with pytest.raises(UserError, match=re.escape(message)):
        dataset.open_spec(spec)
    assert set(required) <= {'path', 'tfds_name'}


def test_resized_copies_are_found_again_by_what_they_are_made_of(tmp_path, monkeypatch):
    """The order of the hashed values is part of the format: copies on disk are named by them."""
    monkeypatch.setenv('BIG_VIT_CACHE', str(tmp_path / 'cache'))
    root = write_folder(tmp_path / 'set', 12, 3)
    dataset.open_spec(spec_of(root, cache='resized', cache_side=8))
    made_of = ['folder', str(root), None, 'train', None, None, None, None, 'folder:set', 12, 3, 8]
    mark = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:24]
    assert [p.name for p in (tmp_path / 'cache' / 'records').iterdir()] == [mark]


@pytest.mark.parametrize('first', ['folder', 'digits'])
def test_all_parts_of_a_mixture_are_transformed_whichever_comes_first(tmp_path, first):
    line = 'resize(size) | rgb | flip_lr'
    parts = [
        spec_of(
            write_folder(tmp_path / 'set', 12, 3), transform=line, cache='none', num_classes=10
        ),
        dataset.Spec('mixture.b', 'digits', 'test', line, (8, 8)),
    ]
    parts.sort(key=lambda spec: spec.name != first)
    source, rest, _ = dataset.open_mixture(tuple(parts))
    index = np.array([0, source.length - 1])
    assert rest(source.load(index), np.zeros(2, np.uint64))['image'].shape == (2, 8, 8, 3)


def test_splits_overlap_in_one_dataset_only_whatever_columns_are_read(tmp_path):
    root = write_folder(tmp_path / 'set', 12, 3)
    one = spec_of(root, split='train[:8]')
    assert dataset.in_both(one, spec_of(root, split='train[6:]')) == 2
    assert dataset.in_both(one, spec_of(write_folder(tmp_path / 'other', 12, 3))) == 0
    (tmp_path / 'set' / 'all.csv').write_text('image,label,kind\n' + 'class0/0000.jpg,a,b\n' * 4)
    table_ = {'name': 'table', 'split': 'train'}
    path = ('path', str(tmp_path / 'set' / 'all.csv'))
    specs = [
        spec_of(root, **table_, settings=(path, ('label_column', column)))
        for column in (None, 'kind')
    ]
    assert specs[0] != specs[1]
    assert dataset.in_both(*specs) == 4


def test_label_maps_and_subsets_come_from_the_config(tmp_path):
    root = write_folder(tmp_path / 'set', 12, 3)
    mapping = tmp_path / 'map.json'
    mapping.write_text(json.dumps({'class0': 1, 'class1': None, 'class2': 0}))
    source, _ = dataset.open_spec(spec_of(root, label_map=str(mapping)))
    assert (source.length, source.class_names) == (8, ('class2', 'class0'))
    source, _ = dataset.open_spec(spec_of(root, classes=('class2',)))
    assert (source.length, source.num_classes) == (4, 1)
    for text, message in (('[1]', 'must hold one JSON object'), ('{', 'cannot read')):
        mapping.write_text(text)
        refused(
            lambda: dataset.open_spec(spec_of(root, label_map=str(mapping))),
            rf'data\.label_map: .*{message}',
        )


def test_chosen_classes_of_a_label_map_meet_by_name(tmp_path):
    root = write_folder(tmp_path / 'set', 12, 3)
    mapping = tmp_path / 'map.json'
    mapping.write_text(json.dumps({'class0': 2, 'class1': 1, 'class2': 0}))
    known = Known(3, ('class2', 'class1', 'class0'), 'the model')
    # Alone class0 is 0 of one, and 2 of the model.
    more = {'label_map': str(mapping), 'known': known}
    source, _ = dataset.open_spec(spec_of(root, classes=('class0',), **more))
    assert set(source.labels().tolist()) == {2}
    mapping.write_text(json.dumps({'class0': 0, 'class1': 1, 'class2': 2}))
    source, _ = dataset.open_spec(spec_of(root, **more))  # Its numbers are meant as they are.
    assert sorted(set(source.labels().tolist())) == [0, 1, 2]
    assert source.labels().tolist() == dataset.open_spec(spec_of(root))[0].labels().tolist()


@pytest.mark.parametrize('cache', ['none', 'decoded', 'auto'])
def test_what_is_cached_looks_the_same(tmp_path, cache):
    root = write_folder(tmp_path / 'set', 20, 2)
    text = 'decode | resize_small(30) | random_crop(24) | flip_lr'
    source, rest = dataset.open_spec(
        spec_of(root, transform=text, cache=cache, image_size=(24, 24))
    )
    plain, after = dataset.open_spec(
        spec_of(root, transform=text, cache='none', image_size=(24, 24))
    )
    for _ in range(2):
        for index in (np.arange(20), np.array([3, 3, 19, 0]), np.array([7])):
            keys = order.example_keys(0, 0, index)
            found, wanted = (
                transforms.finished(t(s.load(index), keys), t)
                for s, t in ((source, rest), (plain, after))
            )
            for name in wanted:
                np.testing.assert_array_equal(found[name], wanted[name])


def test_the_cache_keeps_no_more_than_it_may(tmp_path, monkeypatch):
    root = write_folder(tmp_path / 'set', 20, 2)
    monkeypatch.setattr(dataset, 'MOST_CACHE_BYTES', 5 * 24 * 24 * 3 + 100)
    spec = spec_of(root, transform='resize(24)', cache='decoded', image_size=(24, 24))
    source, _ = dataset.open_spec(spec)
    first = source.load(np.arange(20))
    for file in root.rglob('*.jpg'):
        file.unlink()
    kept = [i for i in range(20) if not raises(lambda i=i: source.load(np.array([i])), OSError)]
    assert kept == [0, 1, 2, 3, 4]
    again = source.load(np.array(kept))
    np.testing.assert_array_equal(again['image'], first['image'][:5])


def raises(call, kind):
    try:
        call()
    except kind:
        return True
    return False


def test_parts_of_a_mixture_meet_by_the_names_of_their_classes(tmp_path):
    a, b = write_folder(tmp_path / 'a', 12, 3), write_folder(tmp_path / 'b', 12, 3)
    shutil.rmtree(next(b.rglob('class0')))
    # Without class0, class1 is the first there, also where the number of classes is known.
    for count in (None, 3, 4):
        specs = tuple(
            spec_of(path, key=f'mixture.{path.name}', num_classes=count, cache='none')
            for path in (a, b)
        )
        said = []
        source, _, of_both = dataset.open_mixture(specs, say=said.append)
        folders = [Path(source.place(i)).parent.name for i in range(source.length)]
        assert [part.length for part in of_both] == [12, 8]
        assert [source.class_names[label] for label in source.labels()] == folders
        loaded = source.load(np.arange(20))['label']
        np.testing.assert_array_equal(loaded, source.labels())
        assert len(said) == 1
        assert 'class1 0 -> 1, class2 1 -> 2' in said[0]
        again, _ = dataset.open_examples(specs)  # As worker processes do.
        np.testing.assert_array_equal(again.labels(), source.labels())


def test_a_class_that_no_other_part_of_a_mixture_has_is_refused(tmp_path):
    a, b = write_folder(tmp_path / 'a', 12, 3), write_folder(tmp_path / 'b', 12, 2)
    class1 = next(b.rglob('class1'))
    class1.rename(class1.with_name('Class1'))
    specs = (spec_of(a, key='mixture.a'), spec_of(b, key='mixture.b'))
    refused(
        lambda: dataset.open_mixture(specs),
        r"mixture\.b: .* has classes that mixture\.a has not \('Class1', nearest 'class1'\)",
    )
    # Without labels there is nothing to meet.
    free, _, _ = dataset.open_mixture(tuple(dataclasses.replace(s, labelled=False) for s in specs))
    assert (free.num_classes, free.length) == (3, 24)
    # A label map says the numbers itself.
    numbers = {'class0': 2, 'Class1': 1}
    mapping = tmp_path / 'map.json'
    mapping.write_text(json.dumps(numbers))
    specs = (specs[0], spec_of(b, key='mixture.b', label_map=str(mapping)))
    source, _, _ = dataset.open_mixture(specs)
    assert source.class_names == ('class0', 'class1', 'class2')
    folders = [Path(source.place(i)).parent.name for i in range(12, 24)]
    assert source.labels()[12:].tolist() == [numbers[name] for name in folders]
