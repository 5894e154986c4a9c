"""NumPy files: .npz archives and .npy files."""

import functools
import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from big_vit.data import files
from big_vit.data.sources.base import Columns, Request, Source
from big_vit.data.sources.classes import MAX_CLASSES, numbered_classes
from big_vit.data.sources.splits import cut, training_split
from big_vit.errors import UserError

# Usual names for the two arrays of a split: those of Keras, and those of MedMNIST.
_NAMES = (('x_{}', 'y_{}'), ('{}_images', '{}_labels'))
_TYPES = (np.uint8, np.uint16, np.float32, np.float64)
Reader = Callable[[], np.ndarray]


def arrays(
    request: Request, *, path: str, image_column: str = 'image', label_column: str = 'label'
) -> Source:
    """Open NumPy files: an .npz, or a folder of .npz or .npy files.

    The arrays of a split are SPLIT_images and SPLIT_labels, or x_SPLIT and y_SPLIT, or the two
    columns in an .npz that is named after the split (train.npz). Images are [N, H, W] or
    [N, H, W, C] of uint8, uint16 or floats (float64 becomes float32) with any number of channels,
    or videos [N, T, H, W, C]. Labels are integers [N] or [N, 1], or 0 and 1 for each class,
    [N, C], which make 'label' a list of arrays; none are needed where no labels are. .npy files are
    memory-mapped, whatever their size.

    Args:
      request: the examples to open; `num_classes` defaults to the largest label of the split
        `train` plus one, or of each split if there is no `train`.
      path: a local file or folder.
      image_column: name of the images in an .npz of one split.
      label_column: name of its labels.

    Raises:
      UserError: files missing or damaged, arrays of objects, lengths that differ, labels that
        are negative or too large, or an array that does not fit in memory.
    """
    if not path:
        raise UserError(f'{request.key}.path must be set')
    root = Path(path).expanduser()
    splits = {
        name: (functools.cache(images), functools.cache(labels))
        for name, (images, labels) in _find_splits(
            root, image_column, label_column, request
        ).items()
    }

    first = training_split(splits)

    def open_split(name: str) -> Source:
        images, labels = splits[name][0](), _checked_labels(splits[name][1](), name, root)
        _check_images(images, name, root)
        if len(images) != len(labels):
            raise UserError(f'{root}: {len(images)} images of {name} but {len(labels)} labels')
        known = labels
        if first is not None:
            known = _checked_labels(splits[first][1](), first, root)
        if not images.size or not labels.size or not known.size:
            raise UserError(f'{root}: {name} or train holds no image')
        count = _class_count(labels, known, name, root, request)
        return _array_source(f'arrays:{root.stem}', name, images, labels, count)

    return cut(f'arrays:{root.stem}', splits, open_split, request)


def _array_source(
    title: str, split: str, images: np.ndarray, labels: np.ndarray, num_classes: int
) -> Source:
    multilabel = labels.ndim == 2
    # Labels of several classes may be as large as images, so they are not copied.
    labels = labels if multilabel else labels.astype(np.int32)
    if images.ndim == 3:
        images = images[..., None]
    column = 'video' if images.ndim == 5 else 'image'
    native = images.dtype.newbyteorder('=')
    dtype = np.dtype(np.float32) if native == np.float64 else native

    def load(indices: np.ndarray) -> Columns:
        chosen = np.ascontiguousarray(images[indices], dtype)
        label = [np.flatnonzero(labels[i]) for i in indices] if multilabel else labels[indices]
        return {column: chosen, 'label': label}

    shape = images.shape[1:] if images.ndim == 4 else None
    return Source(
        name=title,
        split=split,
        length=len(images),
        num_classes=num_classes,
        image_shape=shape,
        load=load,
        in_memory=True,
        channels=shape[2] if shape else 3,
        labels=None if multilabel else functools.partial(np.asarray, labels),
    )


def _checked_labels(labels: np.ndarray, name: str, root: Path) -> np.ndarray:
    """Return integer labels [N] or [N, C]; UserError for others."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim not in (1, 2) or labels.dtype.kind not in 'iub':
        raise UserError(
            f'{root}: labels of {name} are {labels.dtype} of shape {labels.shape}: '
            'they must be whole numbers, one for each image, or 0 and 1 for each class'
        )
    return labels


def _check_images(images: np.ndarray, name: str, root: Path) -> None:
    if images.dtype.newbyteorder('=') not in _TYPES or images.ndim not in (3, 4, 5):
        raise UserError(
            f'{root}: images of {name} are {images.dtype} of shape {images.shape}: they must '
            'be uint8, uint16 or floats, [N, height, width] with or without channels'
        )


def _class_count(
    labels: np.ndarray, train_labels: np.ndarray, name: str, root: Path, request: Request
) -> int:
    """Return the number of classes, after a check that all labels of a split are in range."""
    if train_labels.ndim != labels.ndim:
        raise UserError(
            f'{root}: labels of {name} are {labels.shape}, those of train {train_labels.shape}: '
            'give all splits one label an image, or all 0 and 1 for each class'
        )
    multilabel = labels.ndim == 2
    count = request.num_classes
    if count is None and multilabel:
        count = train_labels.shape[1]
    elif count is None:
        # Others are named with their example below.
        numbers = train_labels[(train_labels >= 0) & (train_labels < MAX_CLASSES)]
        count = numbered_classes(np.unique(numbers).tolist(), request, root).num_classes
    if multilabel and labels.shape[1] > count:
        raise UserError(
            f'{root}: labels of {name} are for {labels.shape[1]} classes, not for {count}: '
            f'set {request.key}.num_classes to the number of all'
        )
    top = 2 if multilabel else min(count, MAX_CLASSES)
    if int(labels.min()) < 0 or int(labels.max()) >= top:
        wrong = int(np.flatnonzero((labels < 0) | (labels >= top))[0])
        row = wrong // labels.shape[1] if multilabel else wrong
        raise UserError(
            f'{root}: example {row} of {name} has label {labels.ravel()[wrong]}, not one of '
            + (
                '0 and 1: give one label an image, or 0 and 1 for each class'
                if multilabel
                else f'{top} classes: set {request.key}.num_classes, or label from 0'
            )
        )
    return count


def _find_splits(
    path: Path, image_column: str, label_column: str, request: Request
) -> dict[str, tuple[Reader, Reader]]:
    """Find the arrays of each split and return readers of its images and labels."""
    key, labelled = request.key, request.labelled
    if path.is_dir():
        archives = {p.stem: p for p in sorted(path.glob('*.npz'))}
        readers: dict[str, Reader] = {
            p.stem: functools.partial(_map_npy, p) for p in sorted(path.glob('*.npy'))
        }
    elif path.suffix == '.npz' and path.is_file():
        archives, readers = {'train': path}, {}
    else:
        raise UserError(f'{key}.path: {path} is neither a folder nor an .npz file of this machine')
    splits, array_names = _pairs(readers, labelled), list(readers)
    for stem, archive in archives.items():
        inside = _npz_readers(archive)
        array_names += inside
        if image_column in inside and (label_column in inside or not labelled):
            images = inside[image_column]
            pairs = {stem: (images, inside.get(label_column) or _all_zero(images))}
        else:
            pairs = _pairs(inside, labelled)
        twice = sorted(set(pairs) & set(splits))
        if twice:
            raise UserError(f'{key}.path: {path} holds the split {twice[0]} more than once')
        splits.update(pairs)
    if not splits:
        names = ', '.join(sorted(array_names)) or 'none'
        raise UserError(
            f'{key}.path: no arrays of images and labels in {path} (it has {names}): name them '
            'train_images and train_labels, x_train and y_train, or image and label, or set '
            f'{key}.image_column and {key}.label_column'
        )
    return splits


def _all_zero(images: Reader) -> Reader:
    """Return a reader of the label 0 for each of some images."""
    return lambda: np.zeros(len(images()), np.int32)


def _pairs(readers: dict[str, Reader], labelled: bool) -> dict[str, tuple[Reader, Reader]]:
    """Pair the readers of the images and labels of each split by their usual names."""
    pairs = {}
    for images, labels in _NAMES:
        start, end = images.split('{}')
        for name, reader in readers.items():
            split = name.removeprefix(start).removesuffix(end)
            if not split or name != images.format(split):
                continue
            found = readers.get(labels.format(split))
            if found is not None or not labelled:
                pairs[split] = (reader, found or _all_zero(reader))
    return pairs


def _npz_readers(path: Path) -> dict[str, Reader]:
    try:
        files.check_regular(path)
        with zipfile.ZipFile(path) as archive:
            names = [n.removesuffix('.npy') for n in archive.namelist() if n.endswith('.npy')]
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise UserError(f'{path}: cannot be read ({error}): write it again') from error
    return {name: functools.partial(_read_npz, path, name) for name in names}


def _read_npz(path: Path, name: str) -> np.ndarray:
    """Read one array, once the claims of its header are checked against the size of the member."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f'{name}.npy') as file:
            size = archive.getinfo(f'{name}.npy').file_size
            version = np.lib.format.read_magic(file)
            if version == (1, 0):
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            else:
                shape, _, dtype = np.lib.format.read_array_header_2_0(file)
            if dtype.hasobject:
                raise _pickled(path, name)
            claimed, actual = math.prod(shape) * dtype.itemsize, size - file.tell()
            if claimed != actual:
                raise _unreadable(
                    path, name, f'its header claims {claimed:,} bytes, but it has {actual:,}'
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
    except Exception as error:  # zipfile and NumPy raise anything for a damaged header.
        raise _unreadable(path, name, error) from error


def _map_npy(path: Path) -> np.ndarray:
    try:
        files.check_regular(path)
        return np.lib.format.open_memmap(path, mode='r')
    except Exception as error:  # NumPy raises anything for a damaged header.
        if 'Python objects' in str(error):
            raise _pickled(path, path.stem) from error
        raise _unreadable(path, path.stem, error) from error


def _memory() -> int:
    """Return the bytes of memory of this machine."""
    return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')


def _pickled(path: Path, name: str) -> UserError:
    return UserError(
        f'{path}: {name} is an array of Python objects, which is never read: save numbers '
        '(all images of one shape), or use the files of a folder'
    )


def _unreadable(path: Path, name: str, reason: object) -> UserError:
    return UserError(
        f'{path}: {name} cannot be read ({" ".join(str(reason).split())}): write it again'
    )
