"""IDX files, the format of MNIST, Fashion-MNIST and EMNIST."""

import contextlib
import functools
import gzip
import math
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from big_vit.data import files
from big_vit.data.sources.base import Request, Source, from_arrays
from big_vit.data.sources.classes import numbered_classes
from big_vit.data.sources.splits import cut
from big_vit.errors import UserError

# The largest published IDX set (EMNIST byclass, 814,255 images) has 0.6 GiB; a header that
# claims more than this is damaged.
_MAX_BYTES = 4 << 30
_HELP = (
    'it must hold the IDX files of MNIST, Fashion-MNIST or EMNIST '
    '(train-images-idx3-ubyte[.gz], train-labels-idx1-ubyte[.gz], t10k-...). Fashion-MNIST: on '
    'Debian and Ubuntu `apt install dataset-fashion-mnist`; elsewhere `python -m big_vit.prepare '
    'fashion_mnist --format idx --data_dir data`, then path data/fashion_mnist'
)


def idx(request: Request, *, path: str) -> Source:
    """Open MNIST, Fashion-MNIST, EMNIST or any other four IDX files, read into memory.

    Pixels are as in the file: those of EMNIST come transposed. So are labels: EMNIST letters
    count from 1, so that the inferred number of classes is 27 and class 0 stays empty.

    Args:
      request: the examples to open; `num_classes` defaults to the largest label of the train file
        (of the test file, if there is no other) plus one.
      path: local folder of the files.

    Raises:
      UserError: files missing, ambiguous or damaged, or a label out of range.
    """
    key = request.key
    directory = Path(path).expanduser()
    if not path or not directory.is_dir():
        raise UserError(f'{key}.path: {path!r} is not a directory: {_HELP}')
    image_files = {
        name: file
        for name in ('train', 'test')
        if (file := _find(directory, name, 'images-idx3', key)) is not None
    }
    for file in image_files.values():
        _check_header(file)
    if not image_files:
        raise UserError(f'{key}.path: no IDX images in {path}: {_HELP}')

    def read_labels(name: str) -> tuple[Path, np.ndarray]:
        file = _find(directory, name, 'labels-idx1', key)
        if file is None and not request.labelled:
            return image_files[name], np.zeros(len(_read(image_files[name], 3)), np.uint8)
        if file is None:
            raise UserError(f'{key}.path: no {name} labels in {path}: {_HELP}')
        return file, _read(file, 1)

    def open_split(name: str) -> Source:
        images_file = image_files[name]
        images = _read(images_file, 3)[..., None]
        labels_file, labels = read_labels(name)
        if len(labels) != len(images):
            raise UserError(
                f'{labels_file}: {len(labels)} labels for the {len(images)} images of '
                f'{images_file.name}: the two files do not belong together'
            )
        known = read_labels('train')[1] if 'train' in image_files else labels
        count = (
            request.num_classes
            or numbered_classes(
                np.unique(known).tolist(), request, f'{key}.path: {labels_file}'
            ).num_classes
        )
        wrong = np.flatnonzero(labels >= count)
        if wrong.size:
            raise UserError(
                f'{key}.num_classes is {count} but example {wrong[0]} of {labels_file} has label '
                f'{labels[wrong[0]]}: set {key}.num_classes={int(labels.max()) + 1} or more'
            )
        return from_arrays(title, name, images, labels.astype(np.int32), count)

    title = f'idx:{directory.name}'
    return cut(title, image_files, open_split, request)


def _find(directory: Path, split: str, kind: str, key: str) -> Path | None:
    """Find the file of a split, None if missing; kind is 'images-idx3' or 'labels-idx1'."""
    prefix = 'train' if split == 'train' else '(?:t10k|test)'
    pattern = rf'(?:.*[-_.])?{prefix}-{kind.replace("-", "[-.]")}-ubyte(?:\.gz)?'
    matching = sorted(p for p in directory.iterdir() if re.fullmatch(pattern, p.name))
    if len(matching) > 1:
        raise UserError(
            f'{key}.path: {directory} holds several {split} {kind} files '
            f'({", ".join(p.name for p in matching)}): keep the ones of one dataset in a directory'
        )
    return matching[0] if matching else None


@contextlib.contextmanager
def _open(path: Path, ndim: int) -> Iterator[tuple[BinaryIO, tuple[int, ...]]]:
    """Open an IDX file of unsigned bytes, gzipped if its name ends in .gz.

    Yields:
      (the file after its header, the shape that the header claims).

    Raises:
      UserError: not an IDX file of that many dimensions, damaged (also if that shows only
        while the caller reads on), or unreadable.
    """
    header_bytes = 4 + 4 * ndim
    try:
        files.check_regular(path)
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
            if not 0 < math.prod(shape) <= _MAX_BYTES:
                claim = 'x'.join(map(str, shape))
                raise UserError(
                    f'{path}: the header claims {claim} bytes of data: download it again'
                )
            yield cast(BinaryIO, file), tuple(shape)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f'{path}: damaged gzip file ({error}): download it again') from error
    except OSError as error:
        raise UserError(f'{path}: cannot be read: {error.strerror or error}') from error


def _check_header(path: Path) -> None:
    with _open(path, 3):
        pass


def _read(path: Path, ndim: int) -> np.ndarray:
    """Read uint8 of `ndim` dimensions.

    Raises:
      UserError: as `_open`, or the length does not match the header.
    """
    info = path.stat() if path.exists() else None
    return _read_cached(path, ndim, info and (info.st_mtime_ns, info.st_size))


# The files of one dataset: a transfer opens them for each evaluation of each of its runs.
@functools.lru_cache(maxsize=4)
def _read_cached(path: Path, ndim: int, version: tuple[int, int] | None) -> np.ndarray:
    del version  # Part of the cache key, so that a changed file is read again.
    with _open(path, ndim) as (file, shape):
        size = math.prod(shape)
        # One byte more than needed, and never more: it shows trailing data, makes gzip check
        # its checksum, and a gzip bomb stays small.
        data = file.read(size + 1)
    header = 4 + 4 * ndim
    if len(data) != size:
        length = f'{header + len(data)}' if len(data) < size else 'more'
        raise UserError(
            f'{path}: expected {header + size} bytes, found {length}: download it again'
        )
    return np.frombuffer(data, np.uint8).reshape(shape)
