"""Random-access sources of labelled images: one function each, all returning a `Source`.

A source knows its length and loads any examples by index; order, augmentation and
batching are the business of `order`, `transforms` and `pipeline`.
"""

import contextlib
import gzip
import math
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from big_vit.errors import UserError


@dataclass(frozen=True)
class Source:
    """A split of a dataset.

    Attributes:
      name: of the dataset, for messages.
      split: as the user wrote it.
      length: how many examples.
      num_classes: labels lie in [0, num_classes).
      image_shape: (height, width, channels), or None when it varies.
      load: int64 [B] indices in [0, length) -> {'image': uint8 [B, H, W, C], or a list of B
        uint8 [H, W, C] when the shape varies, 'label': int32 [B]}. Threads may call it at
        the same time.
      in_memory: `load` costs about as much as a copy (or is one vectorised computation),
        so whole batches are loaded at once instead of example by example in threads.
    """

    name: str
    split: str
    length: int
    num_classes: int
    image_shape: tuple[int, int, int] | None
    load: Callable[[np.ndarray], dict]
    in_memory: bool


def parse_split(text: str, sizes: dict[str, int], key: str) -> tuple[str, int, int]:
    """Reads 'train', 'train[:90%]', 'train[1000:2000]', as TensorFlow Datasets does.

    Percentages round to the nearest example, negative bounds count from the end.

    Args:
      text: the split as the user wrote it.
      sizes: examples in each split that the dataset has.
      key: prefix of the config key, such as 'data'.

    Returns:
      (name, start, stop) with 0 <= start < stop <= sizes[name].

    Raises:
      UserError: it cannot be read, no such split, out of range, or empty.
    """
    key = f'{key}.split'
    valid = ', '.join(sorted(sizes))
    match = re.fullmatch(r'\s*([\w.-]+)\s*(?:\[\s*(-?\d+%?)?\s*:\s*(-?\d+%?)?\s*\])?\s*', text)
    if not match:
        raise UserError(
            f'{key}: cannot read {text!r}: write one range such as train, train[:90%] or '
            f'train[1000:2000] (splits here: {valid})'
        )
    name, start_text, stop_text = match.groups()
    if name not in sizes:
        raise UserError(f'{key}: there is no split {name!r}, only {valid}')
    size = sizes[name]

    def bound(text: str | None, default: int) -> int:
        if text is None:
            return default
        percent = text.endswith('%')
        value = int(text.rstrip('%'))
        if abs(value) > (100 if percent else size):
            raise UserError(
                f'{key}: {text} in {match.string.strip()!r} is beyond the {size} examples of {name}'
            )
        if percent:
            value = round(value * size / 100)
        return value + size if text.startswith('-') else value

    start, stop = bound(start_text, 0), bound(stop_text, size)
    if start >= stop:
        raise UserError(f'{key}: {text!r} holds no example (of the {size} in {name})')
    return name, start, stop


def declared(
    name: str, split: str, length: int, num_classes: int, image_size: tuple[int, int]
) -> Source:
    """A dataset known by its figures only, with black RGB images: enough to plan a run."""

    def load(indices: np.ndarray) -> dict:
        shape = (len(indices), *image_size, 3)
        return {'image': np.zeros(shape, np.uint8), 'label': np.zeros(len(indices), np.int32)}

    return Source(name, split, length, num_classes, (*image_size, 3), load, in_memory=True)


def _from_arrays(
    name: str, split: str, images: np.ndarray, labels: np.ndarray, num_classes: int
) -> Source:
    """A source over uint8 [N, H, W, C] and int32 [N] that are already in memory."""

    def load(indices: np.ndarray) -> dict:
        return {'image': images[indices], 'label': labels[indices]}

    height, width, channels = images.shape[1:]
    return Source(
        name=name,
        split=split,
        length=len(images),
        num_classes=num_classes,
        image_shape=(height, width, channels),
        load=load,
        in_memory=True,
    )


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
    sizes = {'train': boundary, 'test': len(images) - boundary}
    name, start, stop = parse_split(split, sizes, key)
    chosen = slice(start, stop) if name == 'train' else slice(boundary + start, boundary + stop)
    return _from_arrays('digits', split, images[chosen], labels[chosen], 10)


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
    name, start, stop = parse_split(split, sizes, key)

    def read_labels(split: str) -> tuple[Path, np.ndarray]:
        at = _find_idx(directory, split, 'labels-idx1', key)
        if at is None:
            raise UserError(f'{key}.path: no {split} labels in {path}: {_IDX_HELP}')
        return at, _read_idx(at, 1)

    images_path = images_at[name]
    assert images_path is not None
    images = _read_idx(images_path, 3)[..., None]
    labels_at, labels = read_labels(name)
    if len(labels) != len(images):
        raise UserError(
            f'{labels_at}: {len(labels)} labels for the {len(images)} images of '
            f'{images_path.name}: the two files do not belong together'
        )
    if num_classes is None:
        num_classes = int((labels if name == 'train' else read_labels('train')[1]).max()) + 1
    wrong = np.flatnonzero(labels >= num_classes)
    if wrong.size:
        raise UserError(
            f'{key}.num_classes is {num_classes} but example {wrong[0]} of {labels_at} has label '
            f'{labels[wrong[0]]}: set {key}.num_classes={int(labels.max()) + 1} or more'
        )
    return _from_arrays(
        f'idx:{directory.name}',
        split,
        images[start:stop],
        labels[start:stop].astype(np.int32),
        num_classes,
    )


def _find_tfds(tfds_name: str, path: str, key: str):
    """The directory of a prepared TFDS dataset, as an etils path; UserError if there is none."""
    from etils import epath

    match = re.fullmatch(r'(\w+)(?:/([\w.-]+))?(?::([\d.*]+))?', tfds_name)
    if not match:
        raise UserError(
            f'{key}.tfds_name: cannot read {tfds_name!r}: write name, name/config or '
            'name/config:1.0.0'
        )
    name, config, version = match.groups()
    root = epath.Path(path or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets')
    root = root.expanduser()
    directory = root / name / config if config else root / name
    wanted = re.compile(
        r'\d+\.\d+\.\d+' if version is None else re.escape(version).replace(r'\*', r'\d+')
    )
    try:
        below = list(directory.iterdir()) if directory.is_dir() else []
    except ImportError as error:
        raise UserError(f'{key}.path: {root} needs `pip install gcsfs` ({error})') from error
    versions = [p for p in below if wanted.fullmatch(p.name) and (p / 'dataset_info.json').exists()]
    if versions:
        return max(versions, key=lambda p: [int(n) for n in p.name.split('.')])
    prepare = (
        'on a machine with network run once `pip install tensorflow tensorflow-datasets` and '
        f'`tfds build {name}{f"/{config}" if config else ""} --file_format=array_record '
        f'--data_dir DIR`, then set {key}.path=DIR'
    )
    others = sorted(p.name for p in below if not p.name.startswith('.'))
    there = f' (there is {", ".join(others[:8])})' if others else ''
    raise UserError(f'{key}.path: {tfds_name} is not prepared in {root}{there}: {prepare}')


def tfds(
    split: str,
    tfds_name: str,
    path: str = '',
    num_classes: int | None = None,
    key: str = 'data',
) -> Source:
    """A classification dataset prepared by TensorFlow Datasets in ArrayRecord files.

    Nothing is downloaded and TensorFlow is not needed; examples are decoded one by one.

    Args:
      split: one of the splits of the dataset, see `parse_split`.
      tfds_name: name[/config][:version]; the newest version on disk when none is given.
      path: the data directory, local or gs://; empty for $TFDS_DATA_DIR or
        ~/tensorflow_datasets.
      num_classes: None for the number in the dataset.
      key: prefix of the config keys in messages.

    Raises:
      UserError: not found, not readable at random, or not a set of labelled images.
    """
    directory = _find_tfds(tfds_name, path, key)
    try:
        import tensorflow_datasets
        from google.protobuf.json_format import ParseError
    except ImportError as error:
        raise UserError(
            f'{key}.name: tfds needs `pip install tensorflow-datasets importlib_resources '
            f'array_record` ({error})'
        ) from error
    try:
        builder: Any = tensorflow_datasets.builder_from_directory(directory)
    except (ParseError, FileNotFoundError, KeyError, ValueError) as error:
        reason = ' '.join(str(error).split())
        raise UserError(
            f'{directory}/dataset_info.json or features.json: cannot be read ({reason}): prepare '
            'the dataset again'
        ) from error
    info = builder.info
    file_format = info.file_format.value if info.file_format else 'unnamed'
    if file_format != 'array_record':
        raise UserError(
            f'{key}.path: {directory} holds {file_format} files, which cannot be read '
            'at random: run `tfds build` again with --file_format=array_record'
        )
    features = info.features
    for name in ('image', 'label'):
        if name not in features:
            raise UserError(
                f'{key}.tfds_name: {tfds_name} has no feature {name!r} (only '
                f'{", ".join(sorted(features))}): choose a dataset of labelled images'
            )
    if features['image'].np_dtype != np.uint8:
        raise UserError(
            f'{key}.tfds_name: the images of {tfds_name} are {features["image"].np_dtype}, not '
            'uint8: choose another dataset'
        )
    found_classes = getattr(features['label'], 'num_classes', None)
    classes = num_classes if num_classes is not None else found_classes
    if classes is None:
        raise UserError(
            f'{key}.num_classes: {tfds_name} does not say how many classes it has: set it'
        )
    if found_classes and classes < found_classes:
        raise UserError(
            f'{key}.num_classes is {classes} but {tfds_name} has {found_classes} classes: '
            'set at least that'
        )
    sizes = {name: info.splits[name].num_examples for name in info.splits}
    name, start, stop = parse_split(split, sizes, key)
    present = {p.name for p in directory.iterdir()}
    needed = [p.name for p in info.splits[name].filepaths]
    missing = [file for file in needed if file not in present]
    if missing:
        raise UserError(
            f'{directory / missing[0]}: missing, as are {len(missing)} of the {len(needed)} files '
            f'of {name} in all: copy the dataset again'
        )
    records = builder.as_data_source(name)

    def load(indices: np.ndarray) -> dict:
        examples = records.__getitems__([start + int(i) for i in indices])
        images = [example['image'] for example in examples]
        labels = np.array([example['label'] for example in examples], np.int32)
        wrong = np.flatnonzero((labels < 0) | (labels >= classes))
        if wrong.size:
            # Some datasets publish a split without labels, and write -1.
            raise UserError(
                f'{key}.split: example {indices[wrong[0]]} of {split!r} of {tfds_name} has label '
                f'{labels[wrong[0]]}, not one of {classes} classes: choose another split'
            )
        return {'image': np.stack(images) if shape else images, 'label': labels}

    shape = features['image'].shape
    shape = None if None in shape else shape
    return Source(
        name=f'tfds:{tfds_name}',
        split=split,
        length=stop - start,
        num_classes=classes,
        image_shape=shape,
        load=load,
        in_memory=False,
    )
