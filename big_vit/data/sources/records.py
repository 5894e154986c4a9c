"""Our own files of decoded images, which `cache='resized'` makes: raw pixels in ArrayRecord.

A folder holds SPLIT.json (what it is), SPLIT-NNNNN.array_record and SPLIT-labels.npy. A record
is a header of little-endian numbers (magic 'BVR1', code of the type, height, width, channels) and
then the pixels, row by row.
"""

import collections
import concurrent.futures
import json
import os
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from big_vit.data import files
from big_vit.data.decode import DecodeError, Encoded
from big_vit.data.geometry import resized
from big_vit.data.sources.base import Columns, Source, cut
from big_vit.errors import UserError

_HEADER = struct.Struct('<4sBIIH')
_MAGIC = b'BVR1'
_TYPES = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.float32))
_FILE_BYTES = 256 << 20
_TOGETHER = 16


def _pack(image: np.ndarray) -> bytes:
    code = _TYPES.index(image.dtype)
    return _HEADER.pack(_MAGIC, code, *image.shape) + np.ascontiguousarray(image).tobytes()


def _unpack(record: bytes) -> np.ndarray:
    """OSError where the record is damaged."""
    if len(record) < _HEADER.size or record[:4] != _MAGIC:
        raise OSError('damaged record: it does not begin as one of ours')
    _, code, *shape = _HEADER.unpack_from(record)
    dtype = _TYPES[code] if code < len(_TYPES) else None
    if dtype is None or len(record) != _HEADER.size + int(np.prod(shape)) * dtype.itemsize:
        raise OSError(f'damaged record: {len(record)} bytes for an image of {shape}')
    return np.frombuffer(record, dtype, offset=_HEADER.size).reshape(shape)


def _small(image: Any, channels: int, side: int) -> np.ndarray:
    """Decoded, the shorter side at most `side`; DecodeError."""
    if isinstance(image, bytes):
        image = Encoded(image, channels)
    height, width = image.shape[:2]
    scale = side / min(height, width)
    if scale >= 1:
        return image.pixels() if isinstance(image, Encoded) else image
    size = max(side, round(height * scale)), max(side, round(width * scale))
    if isinstance(image, Encoded):
        image = image.window(0, 0, height, width, size)
    return resized(image, size, 'area')


def write_records(source: Source, folder: Path, split: str, shorter_side: int) -> None:
    """A copy of a source with images whose shorter side is at most `shorter_side`.

    Written beside `folder` and renamed when it is complete.

    Raises:
      UserError: an example is damaged, has several labels, or the disk is full.
    """
    from array_record.python import array_record_module as array_record

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix='.new-'))
    labels, number, written, writer = [], 0, 0, None
    began = told = time.monotonic()
    try:
        for done, (image, label) in enumerate(_examples(source, shorter_side), 1):
            if np.ndim(label):
                raise UserError("cache='resized' is for examples of one label")
            if writer is None or written > _FILE_BYTES:
                if writer is not None:
                    writer.close()
                path = temporary / f'{split}-{number:05d}.array_record'
                writer = array_record.ArrayRecordWriter(str(path), 'group_size:1,uncompressed')
                number, written = number + 1, 0
            record = _pack(image)
            writer.write(record)
            written += len(record)
            labels.append(int(label))
            if time.monotonic() - told > 10:
                told = time.monotonic()
                rate = done / (told - began)
                print(
                    f'data    resizing once: {done:,} of {source.length:,} images, {rate:,.0f}/s',
                    file=sys.stderr,
                    flush=True,
                )
        assert writer is not None
        writer.close()
        np.save(temporary / f'{split}-labels.npy', np.array(labels, np.int32), allow_pickle=False)
        about = {
            'name': source.name,
            'split': source.split,
            'length': source.length,
            'num_classes': source.num_classes,
            'class_names': source.class_names,
            'channels': source.channels,
            'shorter_side': shorter_side,
            'files': number,
        }
        (temporary / f'{split}.json').write_text(json.dumps(about, indent=2) + '\n')
        temporary.rename(folder)
    except OSError as error:
        if not folder.exists():  # Else another process made the same and was faster.
            raise UserError(f'{temporary}: cannot be written: {error}') from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _examples(source: Source, side: int) -> Iterator[tuple[np.ndarray, Any]]:
    """(image, label) of all examples in order, decoded in threads."""

    def load(start: int) -> list[tuple[np.ndarray, Any]]:
        indices = np.arange(start, min(start + _TOGETHER, source.length))
        columns = source.load(indices)
        found = []
        for index, image, label in zip(indices, columns['image'], columns['label'], strict=True):
            try:
                found.append((_small(image, source.channels, side), label))
            except DecodeError as error:
                raise UserError(
                    f'{source.place(int(index))}: {error}; repair or remove it before a resized '
                    'copy is made'
                ) from error
        return found

    threads = os.cpu_count() or 1
    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        starts = iter(range(0, source.length, _TOGETHER))
        for start in starts:
            waiting.append(pool.submit(load, start))
            if len(waiting) > 2 * threads:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def records(split: str, path: str, key: str = 'data') -> Source:
    """A folder that `write_records` made.

    Args:
      split: see `base.parse_split`.
      path: a local folder.
      key: prefix of the config keys in messages.

    Raises:
      UserError: no such folder, or not all of its files are there.
    """
    from array_record.python import array_record_module as array_record

    folder = Path(files.place(path, f'{key}.path').path)
    abouts = {p.stem: p for p in sorted(folder.glob('*.json'))} if folder.is_dir() else {}
    if not abouts:
        raise UserError(
            f"{key}.path: {folder} holds no records: they are what cache='resized' makes"
        )
    about = {}
    for name, file in abouts.items():
        try:
            about[name] = json.loads(file.read_text())
            sizes = about[name]['length'], about[name]['files']
        except (ValueError, KeyError, OSError) as error:
            raise UserError(f'{file}: cannot be read ({error}): delete {folder}') from error
        if not all(isinstance(n, int) and n > 0 for n in sizes):
            raise UserError(f'{file}: says that there are {sizes}: delete {folder}')

    def whole(name: str) -> Source:
        is_of = about[name]
        paths = [folder / f'{name}-{i:05d}.array_record' for i in range(is_of['files'])]
        try:
            readers = [
                array_record.ArrayRecordReader(
                    str(p), 'readahead_buffer_size:0', file_reader_buffer_size=1 << 16
                )
                for p in paths
            ]
            labels = np.load(folder / f'{name}-labels.npy', mmap_mode='r', allow_pickle=False)
        except (OSError, RuntimeError, ValueError) as error:
            reason = ' '.join(str(error).split())[:200]
            raise UserError(f'{folder}: cannot be read ({reason}): delete it') from error
        ends = np.cumsum([reader.num_records() for reader in readers])
        if ends[-1] != is_of['length'] or len(labels) != is_of['length']:
            raise UserError(
                f'{folder}: holds {ends[-1]} records and {len(labels)} labels of '
                f'{is_of["length"]}: delete it'
            )

        def read(index: int) -> np.ndarray:
            which = int(np.searchsorted(ends, index, side='right'))
            before = int(ends[which - 1]) if which else 0
            try:
                return _unpack(readers[which].read([index - before])[0])
            except (RuntimeError, ValueError, IndexError) as error:
                raise OSError(f'damaged record ({error})') from error

        def load(indices: np.ndarray) -> Columns:
            return {'image': [read(i) for i in indices.tolist()], 'label': labels[indices]}

        names = is_of['class_names']
        return Source(
            name=is_of['name'],
            split=name,
            length=is_of['length'],
            num_classes=is_of['num_classes'],
            image_shape=None,
            load=load,
            in_memory=False,
            channels=is_of['channels'],
            class_names=tuple(names) if names else None,
            labels=lambda: np.asarray(labels),
            where=lambda index: f'record {index} of {name} in {folder}',
        )

    return cut(f'records:{folder.name}', about, whole, split, key)
