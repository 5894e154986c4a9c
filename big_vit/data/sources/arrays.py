"""Sources in memory: IDX files, scikit-learn's digits, NumPy files."""

import contextlib
import functools
import gzip
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from big_vit.data.sources.base import Columns, Source, cut, from_arrays
from big_vit.errors import UserError


def digits(split: str, key: str = 'data') -> Source:
    """The 1,797 handwritten digits of 8x8 pixels that scikit-learn carries.

    Grey values 0..16 become 0..255. `train` is the first 80 % of the file and `test` the
    rest; the file is ordered by writer, so the writers in `test` are mostly new.

    Raises:
      UserError: scikit-learn is missing, or there is no such split.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            f'{key}.name: digits come with scikit-learn: pip install scikit-learn'
        ) from error
    bunch: Any = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    boundary = round(len(images) * 0.8)
    parts = {'train': slice(0, boundary), 'test': slice(boundary, None)}

    def whole(name: str) -> Source:
        return from_arrays('digits', name, images[parts[name]], labels[parts[name]], 10)

    sizes = {'train': boundary, 'test': len(images) - boundary}
    return cut('digits', sizes, whole, split, key)


# The largest published IDX set (EMNIST byclass, 814,255 images) has 0.6 GiB; a header that
# claims more than this is damage, not data.
_MAX_IDX_BYTES = 4 << 30
_IDX_HELP = (
    'it must hold the IDX files of MNIST, Fashion-MNIST or EMNIST '
    '(train-images-idx3-ubyte[.gz], train-labels-idx1-ubyte[.gz], t10k-...): download the four '
    'files, or apt install dataset-fashion-mnist and use /usr/share/datasets/fashion-mnist'
)


def _find_idx(directory: Path, split: str, kind: str, key: str) -> Path | None:
    """The one file of a split; kind is 'images-idx3' or 'labels-idx1'. None if there is none."""
    prefix = 'train' if split == 'train' else '(?:t10k|test)'
    pattern = rf'(?:.*[-_.])?{prefix}-{kind.replace("-", "[-.]")}-ubyte(?:\.gz)?'
    found = sorted(p for p in directory.iterdir() if re.fullmatch(pattern, p.name))
    if len(found) > 1:
        raise UserError(
            f'{key}.path: {directory} holds several {split} {kind} files '
            f'({", ".join(p.name for p in found)}): keep the ones of one dataset in a directory'
        )
    return found[0] if found else None


@contextlib.contextmanager
def _open_idx(path: Path, ndim: int) -> Iterator[tuple[BinaryIO, tuple[int, ...]]]:
    """Opens an IDX file of unsigned bytes, gzipped if its name ends in .gz.

    Yields:
      (the file behind its header, the shape that the header claims).

    Raises:
      UserError: not an IDX file of that many dimensions, damaged (also when that shows only
        while the caller reads on), or unreadable.
    """
    header_bytes = 4 + 4 * ndim
    try:
        with gzip.open(path) if path.suffix == '.gz' else path.open('rb') as file:
            header = file.read(header_bytes)
            if len(header) < header_bytes:
                raise UserError(
                    f'{path}: expected a header of {header_bytes} bytes, found {len(header)}: '
                    'download it again'
                )
            magic, *shape = struct.unpack(f'>{1 + ndim}I', header)
            if magic != 0x0800 + ndim:
                raise UserError(
                    f'{path}: not an IDX file of {ndim}-dimensional bytes: magic number '
                    f'{magic:#010x}, expected {0x0800 + ndim:#010x}'
                )
            if not 0 < math.prod(shape) <= _MAX_IDX_BYTES:
                claim = 'x'.join(map(str, shape))
                raise UserError(
                    f'{path}: the header claims {claim} bytes of data: download it again'
                )
            yield cast(BinaryIO, file), tuple(shape)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f'{path}: damaged gzip file ({error}): download it again') from error
    except OSError as error:
        raise UserError(f'{path}: cannot be read: {error.strerror or error}') from error


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """uint8 of `ndim` dimensions; UserError as `_open_idx`, or when its length is wrong."""
    about = path.stat() if path.exists() else None
    return _kept_idx(path, ndim, about and (about.st_mtime_ns, about.st_size))


# The files of one dataset: a transfer opens them for each evaluation of each of its runs.
@functools.lru_cache(maxsize=4)
def _kept_idx(path: Path, ndim: int, version: tuple[int, int] | None) -> np.ndarray:
    del version  # A file that was changed is read again.
    with _open_idx(path, ndim) as (file, shape):
        size = math.prod(shape)
        # One byte more than needed, and never more: it shows trailing data, makes gzip check
        # its checksum, and a gzip bomb stays small.
        data = file.read(size + 1)
    header = 4 + 4 * ndim
    if len(data) != size:
        found = f'{header + len(data)}' if len(data) < size else 'more'
        raise UserError(f'{path}: expected {header + size} bytes, found {found}: download it again')
    return np.frombuffer(data, np.uint8).reshape(shape)


def _idx_length(path: Path) -> int:
    """How many images the header of a file claims."""
    with _open_idx(path, 3) as (_, shape):
        return shape[0]


def idx(split: str, path: str, num_classes: int | None = None, key: str = 'data') -> Source:
    """MNIST, Fashion-MNIST, EMNIST or anything else in four IDX files, read into memory.

    Pixels are as in the file: those of EMNIST come transposed. Labels too: EMNIST letters
    count from 1, so that the inferred number of classes is 27 and class 0 stays empty.

    Args:
      split: of `train` and `test`, see `parse_split`.
      path: directory of the files.
      num_classes: None for the largest label of the train file plus one.
      key: prefix of the config keys in messages.

    Raises:
      UserError: files missing, ambiguous or damaged, or a label out of range.
    """
    directory = Path(path).expanduser()
    if not path or not directory.is_dir():
        raise UserError(f'{key}.path: {path!r} is not a directory: {_IDX_HELP}')
    images_at = {name: _find_idx(directory, name, 'images-idx3', key) for name in ('train', 'test')}
    sizes = {name: _idx_length(at) for name, at in images_at.items() if at}
    if not sizes:
        raise UserError(f'{key}.path: no IDX images in {path}: {_IDX_HELP}')
    title = f'idx:{directory.name}'

    def read_labels(name: str) -> tuple[Path, np.ndarray]:
        at = _find_idx(directory, name, 'labels-idx1', key)
        if at is None:
            raise UserError(f'{key}.path: no {name} labels in {path}: {_IDX_HELP}')
        return at, _read_idx(at, 1)

    def whole(name: str) -> Source:
        images_path = images_at[name]
        assert images_path is not None
        images = _read_idx(images_path, 3)[..., None]
        labels_at, labels = read_labels(name)
        if len(labels) != len(images):
            raise UserError(
                f'{labels_at}: {len(labels)} labels for the {len(images)} images of '
                f'{images_path.name}: the two files do not belong together'
            )
        classes = num_classes
        if classes is None:
            classes = int((labels if name == 'train' else read_labels('train')[1]).max()) + 1
        wrong = np.flatnonzero(labels >= classes)
        if wrong.size:
            raise UserError(
                f'{key}.num_classes is {classes} but example {wrong[0]} of {labels_at} has label '
                f'{labels[wrong[0]]}: set {key}.num_classes={int(labels.max()) + 1} or more'
            )
        return from_arrays(title, name, images, labels.astype(np.int32), classes)

    return cut(title, sizes, whole, split, key)


# What the two arrays of a split are called: by Keras, by MedMNIST, and plainly.
_NAMES = (('x_{}', 'y_{}'), ('{}_images', '{}_labels'))
_KINDS = (np.uint8, np.uint16, np.float32, np.float64)
# Labels are int32.
_MOST_CLASSES = 1 << 31
Reader = Callable[[], np.ndarray]


def _unreadable(path: Path, name: str, reason: object) -> UserError:
    return UserError(
        f'{path}: {name} cannot be read ({" ".join(str(reason).split())}): write it again'
    )


def _npz(path: Path) -> dict[str, Reader]:
    """Readers of the arrays of an .npz file, by name."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n.removesuffix('.npy') for n in archive.namelist() if n.endswith('.npy')]
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise UserError(f'{path}: cannot be read ({error}): write it again') from error
    return {name: functools.partial(_read_npz, path, name) for name in names}


def _read_npz(path: Path, name: str) -> np.ndarray:
    """One array; what its header claims is compared with what there is before memory is taken."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f'{name}.npy') as file:
            size = archive.getinfo(f'{name}.npy').file_size
            version = np.lib.format.read_magic(file)
            if version == (1, 0):
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            else:
                shape, _, dtype = np.lib.format.read_array_header_2_0(file)
            claimed = math.prod(shape) * dtype.itemsize
            if dtype.hasobject:
                raise _pickled(path, name)
            if claimed != size - file.tell():
                found = size - file.tell()
                raise _unreadable(
                    path, name, f'its header claims {claimed:,} bytes, but it has {found:,}'
                )
            if claimed > _memory():
                raise UserError(
                    f'{path}: {name} has {claimed:,} bytes, more than the memory of this machine: '
                    'save it with np.save as an .npy file, which is read in place'
                )
            file.seek(0)
            return np.lib.format.read_array(file, allow_pickle=False)
    except UserError:
        raise
    except Exception as error:  # zipfile and NumPy raise whatever a damaged header makes them.
        raise _unreadable(path, name, error) from error


def _memory() -> int:
    """Of this machine, in bytes."""
    return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')


def _pickled(path: Path, name: str) -> UserError:
    return UserError(
        f'{path}: {name} is an array of Python objects, which is never read: save numbers '
        '(all images of one shape), or use the files of a folder'
    )


def _map_npy(path: Path) -> np.ndarray:
    try:
        return np.lib.format.open_memmap(path, mode='r')
    except Exception as error:  # NumPy raises whatever a damaged header makes it.
        if 'Python objects' in str(error):
            raise _pickled(path, path.stem) from error
        raise _unreadable(path, path.stem, error) from error


def _pairs(readers: dict[str, Reader]) -> dict[str, tuple[Reader, Reader]]:
    """Readers of the images and labels of each split, by the names that are usual."""
    found = {}
    for images, labels in _NAMES:
        start, end = images.split('{}')
        for name, reader in readers.items():
            word = name.removeprefix(start).removesuffix(end)
            if word and name == images.format(word) and labels.format(word) in readers:
                found[word] = (reader, readers[labels.format(word)])
    return found


def _array_splits(
    path: Path, image_column: str, label_column: str, key: str
) -> dict[str, tuple[Reader, Reader]]:
    """Readers of the images and labels of each split."""
    if path.is_dir():
        archives = {p.stem: p for p in sorted(path.glob('*.npz'))}
        readers: dict[str, Reader] = {
            p.stem: functools.partial(_map_npy, p) for p in sorted(path.glob('*.npy'))
        }
    elif path.suffix == '.npz' and path.is_file():
        archives, readers = {'train': path}, {}
    else:
        raise UserError(f'{key}.path: {path} is neither a folder nor an .npz file of this machine')
    splits, has = _pairs(readers), list(readers)
    for stem, archive in archives.items():
        inside = _npz(archive)
        has += inside
        if image_column in inside and label_column in inside:
            found = {stem: (inside[image_column], inside[label_column])}
        else:
            found = _pairs(inside)
        twice = sorted(set(found) & set(splits))
        if twice:
            raise UserError(f'{key}.path: {path} holds the split {twice[0]} more than once')
        splits.update(found)
    if not splits:
        names = ', '.join(sorted(has)) or 'none'
        raise UserError(
            f'{key}.path: no arrays of images and labels in {path} (it has {names}): name them '
            'train_images and train_labels, x_train and y_train, or image and label, or set '
            f'{key}.image_column and {key}.label_column'
        )
    return splits


def arrays(
    split: str,
    path: str,
    image_column: str = 'image',
    label_column: str = 'label',
    num_classes: int | None = None,
    key: str = 'data',
) -> Source:
    """NumPy files: an .npz, or a folder of .npz or .npy files.

    The arrays of a split are SPLIT_images and SPLIT_labels, x_SPLIT and y_SPLIT, or in an .npz of
    its own (train.npz) the columns. Images are [N, H, W] or [N, H, W, C] of uint8, uint16 or floats
    (double ones become single), with any number of channels, or videos [N, T, H, W, C]. Labels are
    whole numbers [N] or [N, 1], or 0 and 1 for each class, [N, C], which make 'label' a list of
    arrays. .npy files are mapped into memory, whatever their size.

    Args:
      split: see `base.parse_split`.
      path: a local file or folder.
      num_classes: None for the largest label of the split `train` plus one, or of each split
        where there is no `train`.
      key: prefix of the config keys in messages.

    Raises:
      UserError: files missing or damaged, arrays of objects, lengths that differ, labels that
        are negative or too large, or an array that does not fit in memory.
    """
    if not path:
        raise UserError(f'{key}.path must be set')
    root = Path(path).expanduser()
    splits = _array_splits(root, image_column, label_column, key)
    read = {name: (functools.cache(a), functools.cache(b)) for name, (a, b) in splits.items()}
    title = f'arrays:{root.stem}'

    def labels_of(name: str) -> np.ndarray:
        found = read[name][1]()
        if found.ndim == 2 and found.shape[1] == 1:
            found = found[:, 0]
        if found.ndim not in (1, 2) or found.dtype.kind not in 'iub':
            raise UserError(
                f'{root}: labels of {name} are {found.dtype} of shape {found.shape}: '
                'they must be whole numbers, one for each image, or 0 and 1 for each class'
            )
        return found

    def whole(name: str) -> Source:
        images, labels = read[name][0](), labels_of(name)
        native = images.dtype.newbyteorder('=')
        if native not in _KINDS or images.ndim not in (3, 4, 5):
            raise UserError(
                f'{root}: images of {name} are {images.dtype} of shape {images.shape}: they must '
                'be uint8, uint16 or floats, [N, height, width] with or without channels'
            )
        if len(images) != len(labels):
            raise UserError(f'{root}: {len(images)} images of {name} but {len(labels)} labels')
        known = labels_of('train') if 'train' in splits else labels
        several = labels.ndim == 2
        if not images.size or not labels.size or not known.size:
            raise UserError(f'{root}: {name} or train holds no image')
        if known.ndim != labels.ndim:
            raise UserError(
                f'{root}: labels of {name} are {labels.shape}, those of train {known.shape}: '
                'give all splits one label an image, or all 0 and 1 for each class'
            )
        if images.ndim == 3:
            images = images[..., None]
        classes = num_classes or (known.shape[1] if several else int(known.max()) + 1)
        if several and labels.shape[1] > classes:
            raise UserError(
                f'{root}: labels of {name} are for {labels.shape[1]} classes, not for {classes}: '
                f'set {key}.num_classes to the number of all'
            )
        top = 2 if several else min(classes, _MOST_CLASSES)
        if int(labels.min()) < 0 or int(labels.max()) >= top:
            wrong = int(np.flatnonzero((labels < 0) | (labels >= top))[0])
            row = wrong // labels.shape[1] if several else wrong
            raise UserError(
                f'{root}: example {row} of {name} has label {labels.ravel()[wrong]}, not one of '
                + (
                    '0 and 1: give one label an image, or 0 and 1 for each class'
                    if several
                    else f'{top} classes: set {key}.num_classes, or label from 0'
                )
            )
        # Those of several classes may be as large as images, and stay where they are.
        kept = labels if several else labels.astype(np.int32)
        column = 'video' if images.ndim == 5 else 'image'
        kind = np.dtype(np.float32) if native == np.float64 else native

        def load(indices: np.ndarray) -> Columns:
            chosen = np.ascontiguousarray(images[indices], kind)
            label = [np.flatnonzero(kept[i]) for i in indices] if several else kept[indices]
            return {column: chosen, 'label': label}

        shape = images.shape[1:] if images.ndim == 4 else None
        return Source(
            name=title,
            split=name,
            length=len(images),
            num_classes=classes,
            image_shape=shape,
            load=load,
            in_memory=True,
            channels=shape[2] if shape else 3,
            labels=None if several else functools.partial(np.asarray, kept),
        )

    return cut(title, splits, whole, split, key)
