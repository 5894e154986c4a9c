"""NumPy files beyond the plain ones of test_data_formats.py: layouts, damage, odd shapes."""

import io
import zipfile

import numpy as np
import pytest

from big_vit.data.sources import arrays
from big_vit.data.sources.base import Request
from big_vit.errors import UserError

IMAGES = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
LABELS = np.array([0, 2, 1])
ONE_HOT = np.eye(3, dtype=np.uint8)


def refused(call, message):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert '\n' not in str(error.value)


def saved(path, **parts):
    np.savez(path, **parts)
    return str(path)


def test_a_folder_of_archives(tmp_path):
    saved(tmp_path / 'train.npz', image=IMAGES, label=LABELS)
    saved(tmp_path / 'held.npz', image=IMAGES[1:], label=LABELS[1:])
    assert arrays.arrays(Request('train'), path=str(tmp_path)).length == 3
    loaded = arrays.arrays(Request('held'), path=str(tmp_path)).load(np.array([1]))
    np.testing.assert_array_equal(loaded['image'][0, ..., 0], IMAGES[2])
    assert loaded['label'].tolist() == [1]
    np.save(tmp_path / 'held_images.npy', IMAGES)
    np.save(tmp_path / 'held_labels.npy', LABELS)
    refused(
        lambda: arrays.arrays(Request('held'), path=str(tmp_path)), 'the split held more than once'
    )


def test_an_archive_of_several_splits_in_a_folder_keeps_their_names(tmp_path):
    parts = {'x_train': IMAGES, 'y_train': LABELS, 'x_test': IMAGES[:1], 'y_test': LABELS[:1]}
    saved(tmp_path / 'digits.npz', **parts)
    assert arrays.arrays(Request('train'), path=str(tmp_path)).length == 3
    assert arrays.arrays(Request('test'), path=str(tmp_path)).length == 1


def test_columns_by_any_name(tmp_path):
    path = saved(tmp_path / 'x.npz', pixels=IMAGES, kind=LABELS, other=LABELS)
    source = arrays.arrays(Request('train'), path=path, image_column='pixels', label_column='kind')
    assert source.labels().tolist() == LABELS.tolist()
    refused(lambda: arrays.arrays(Request('train'), path=path), r'it has kind, other, pixels\)')


def test_the_number_of_classes_is_that_of_training(tmp_path):
    parts = {'train_images': IMAGES, 'train_labels': LABELS}
    path = saved(tmp_path / 'x.npz', **parts, val_images=IMAGES[:1], val_labels=LABELS[:1])
    assert arrays.arrays(Request('val'), path=path).num_classes == 3
    path = saved(tmp_path / 'y.npz', **parts, val_images=IMAGES[:1], val_labels=LABELS[:1] + 3)
    refused(
        lambda: arrays.arrays(Request('val'), path=path),
        'example 0 of val has label 3, not one of 3',
    )
    assert arrays.arrays(Request('val', num_classes=4), path=path).num_classes == 4


@pytest.mark.parametrize('kind', ['>u2', '>f4', '>f8', '<u2'])
@pytest.mark.parametrize('fortran', [False, True])
def test_either_order_of_bytes_and_axes(tmp_path, kind, fortran):
    images = IMAGES[..., None].repeat(5, -1).astype(kind)
    np.save(tmp_path / 'train_images.npy', np.asfortranarray(images) if fortran else images)
    np.save(tmp_path / 'train_labels.npy', LABELS.astype('>i8'))
    loaded = arrays.arrays(Request('train'), path=str(tmp_path)).load(np.array([2, 0]))
    assert loaded['image'].dtype == (np.float32 if kind == '>f8' else np.dtype(kind[1:]))
    assert loaded['image'].flags.c_contiguous
    np.testing.assert_array_equal(loaded['image'], images[[2, 0]])
    assert loaded['label'].dtype == np.int32


def test_videos(tmp_path):
    videos = np.arange(2 * 3 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 3, 4, 5, 3)
    source = arrays.arrays(
        Request('train'), path=saved(tmp_path / 'x.npz', image=videos, label=LABELS[:2])
    )
    np.testing.assert_array_equal(source.load(np.array([1]))['video'], videos[1:])


def test_files_larger_than_memory_are_mapped(tmp_path):
    # A sparse file: 64 GiB of zeros that take no room on the disk.
    count = 1 << 16
    shape = (count, 1024, 1024)
    np.lib.format.open_memmap(tmp_path / 'train_images.npy', 'w+', np.uint8, shape)[-1, 5, 7] = 9
    np.save(tmp_path / 'train_labels.npy', np.zeros(count, np.uint8))
    source = arrays.arrays(Request('train'), path=str(tmp_path))
    last = source.load(np.array([count - 1]))['image']
    assert (last[0, 5, 7, 0], int(last.sum())) == (9, 9)


@pytest.mark.parametrize(
    ('parts', 'message'),
    [
        ({'train_images': IMAGES[:0], 'train_labels': LABELS[:0]}, 'holds no image'),
        (
            {'train_images': IMAGES, 'train_labels': np.full((3, 2), 2)},
            'example 0 of train has label 2, not one of 0 and 1',
        ),
        (
            {'train_images': IMAGES, 'train_labels': np.array([0, 1, 1 << 40])},
            'example 2 of train has label 1099511627776, not one of 2 classes',
        ),
        ({'train_images': IMAGES, 'train_labels': np.array(1)}, r'int64 of shape \(\)'),
    ],
)
def test_mistakes_with_labels(tmp_path, parts, message):
    path = saved(tmp_path / 'x.npz', **parts)
    refused(lambda: arrays.arrays(Request('train'), path=path), message)


@pytest.mark.parametrize(
    ('train', 'val', 'message'),
    [
        (LABELS, ONE_HOT, r'labels of val are \(3, 3\), those of train \(3,\)'),
        (ONE_HOT, LABELS, r'labels of val are \(3,\), those of train \(3, 3\)'),
        (ONE_HOT[:, :2], ONE_HOT, 'labels of val are for 3 classes, not for 2'),
    ],
)
def test_splits_have_labels_of_one_kind(tmp_path, train, val, message):
    parts = {'train_images': IMAGES, 'train_labels': train}
    path = saved(tmp_path / 'x.npz', **parts, val_images=IMAGES, val_labels=val)
    assert arrays.arrays(Request('train'), path=path).length == 3
    refused(lambda: arrays.arrays(Request('val'), path=path), message)


def test_a_path_is_needed():
    refused(lambda: arrays.arrays(Request('train'), path=''), r'data\.path must be set')


def header(shape):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {'descr': '|u1', 'fortran_order': False, 'shape': shape}
    )
    return file.getvalue()


@pytest.mark.parametrize(
    ('entry', 'message'),
    [
        (b'junk', 'image cannot be read'),
        (b'\x80\x04N.', 'image cannot be read'),
        (header((1 << 34,)) + b'0' * 1000, r'claims 17,179,869,184 bytes, but it has 1,000\)'),
        (header((10,)) + b'0' * 11, r'claims 10 bytes, but it has 11\)'),
    ],
)
def test_entries_that_are_not_what_they_claim(tmp_path, entry, message):
    with zipfile.ZipFile(tmp_path / 'x.npz', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('image.npy', entry)
        archive.writestr('label.npy', header((1,)) + b'\0')
        archive.writestr('readme.txt', b'')
    refused(lambda: arrays.arrays(Request('train'), path=str(tmp_path / 'x.npz')), message)


def test_a_bomb_is_refused_before_memory_is_taken(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / 'x.npz', image=np.zeros((3, 1000, 1000)), label=LABELS)
    assert (tmp_path / 'x.npz').stat().st_size < 50_000
    monkeypatch.setattr(arrays, '_memory', lambda: 20_000_000)
    refused(
        lambda: arrays.arrays(Request('train'), path=str(tmp_path / 'x.npz')),
        'image has 24,000,000 bytes',
    )


@pytest.mark.filterwarnings('ignore')
def test_damage_anywhere_is_told_in_a_line(tmp_path):
    saved(tmp_path / 'plain.npz', image=IMAGES, label=LABELS)
    np.savez_compressed(tmp_path / 'small.npz', image=IMAGES, label=LABELS)
    np.save(tmp_path / 'mapped.npy', IMAGES)
    (tmp_path / 'npy').mkdir()
    np.save(tmp_path / 'npy' / 'train_labels.npy', LABELS)
    rng, told = np.random.default_rng(0), 0
    for name, end in (('plain.npz', None), ('small.npz', None), ('mapped.npy', 130)):
        data = (tmp_path / name).read_bytes()
        target = tmp_path / ('npy/train_images.npy' if end else 'damaged.npz')
        for _ in range(300):
            damaged = bytearray(data)
            for at in rng.integers(0, end or len(data), 3):
                damaged[at] = rng.integers(0, 256)
            target.write_bytes(damaged)
            try:
                arrays.arrays(Request('train'), path=str(target.parent if end else target)).load(
                    np.arange(1)
                )
            except UserError as error:
                assert '\n' not in str(error)
                told += 1
    assert told > 300
