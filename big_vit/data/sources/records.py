"""Raw pixels in ArrayRecord files, the copies that `cache='resized'` makes.

A folder contains SPLIT.json (its description), SPLIT-NNNNN.array_record and, if each example has
one label, SPLIT-labels.npy. A record is a little-endian header, the labels, and the pixels
row by row:

    bytes    0 to 3   'BVR2'
             4        type of a pixel: 0 uint8, 1 uint16, 2 float32
             5 to 7   zeros
             8 to 15  height and width, uint32 each
            16 to 19  numbers of channels and of labels, uint16 each
            20 on     labels, int32 each, then pixels
"""

import collections
import concurrent.futures
import functools
import itertools
import json
import os
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from big_vit.data import files
from big_vit.data.decode import DecodeError, Encoded
from big_vit.data.sources.base import Columns, Request, Shard, Source, locate
from big_vit.data.sources.classes import label_name
from big_vit.data.sources.splits import cut
from big_vit.data.transforms.geometry import resized
from big_vit.data.transforms.operations import BadExampleError
from big_vit.errors import UserError

# A multiple of four bytes, so that pixels of any type are aligned.
_HEADER = struct.Struct('<4sB3xIIHH')
_MAGIC = b'BVR2'
_FORMAT = 2
_TYPES = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.float32))
_FILE_BYTES = 256 << 20
_ROWS_PER_TASK = 16
_REPORT_SECONDS = 10.0

Example = tuple[np.ndarray, Any]


def records(request: Request, *, path: str) -> Source:
    """Open a folder that `write_records` made.

    Args:
      request: the examples to open.
      path: a local folder.

    Raises:
      UserError: no such folder, or some of its files are missing.
    """
    key = request.key
    root = files.place(path, f'{key}.path')
    if not root.is_local:
        raise UserError(f'{key}.path: {root} is not on this machine: copy it to a local disk')
    folder = Path(root.path)
    splits = {p.stem: p for p in sorted(folder.glob('*.json'))} if folder.is_dir() else {}
    if not splits:
        raise UserError(
            f"{key}.path: {folder} holds no records: they are what cache='resized' makes"
        )
    return cut(
        f'records:{folder.name}', splits, lambda name: _open_split(name, splits[name]), request
    )


def _open_split(name: str, description: Path) -> Source:
    about, folder = _read_description(description), description.parent
    paths = [str(folder / Path(part['name']).name) for part in about['files']]
    ends = list(itertools.accumulate(part['records'] for part in about['files']))
    labels = None if about['several_labels'] else _read_labels(folder / f'{name}-labels.npy')
    count = ends[-1] if labels is None else labels.size
    if not ends[-1] == count == about['length']:
        raise UserError(
            f'{folder}: holds {ends[-1]} records and {count} labels of {about["length"]}: delete it'
        )
    names, shape = about['class_names'], about['image_shape']

    def where(index: int) -> str:
        file, record = locate(index, ends)
        return f'{paths[file]}, record {record}'

    def read(index: int) -> tuple[np.ndarray, np.ndarray]:
        file, record = locate(index, ends)
        try:
            return _unpack(_reader(paths[file]).read([record])[0])
        except (RuntimeError, ValueError, IndexError) as error:
            reason = ' '.join(str(error).split())[:200]
            raise OSError(f'damaged record ({reason})') from error

    def load(indices: np.ndarray) -> Columns:
        examples = [read(index) for index in indices.tolist()]
        image: Any = [image for image, _ in examples]
        if shape and examples:
            image = np.stack(image)
        label: Any = [label for _, label in examples]
        if labels is not None:
            label = np.concatenate(label) if examples else np.zeros(0, np.int32)
        return {'image': image, 'label': label}

    return Source(
        name=about['name'],
        split=name,
        length=about['length'],
        num_classes=about['num_classes'],
        image_shape=tuple(shape) if shape else None,
        load=load,
        in_memory=False,
        channels=about['channels'],
        class_names=tuple(map(label_name, names)) if names else None,
        labels=None if labels is None else lambda: np.asarray(labels),
        where=where,
        shard_lengths=np.diff([0, *ends]),
        shards=lambda: [Shard(part['name'], part['bytes'], '') for part in about['files']],
    )


def _read_description(file: Path) -> dict[str, Any]:
    """Read SPLIT.json and check that the files that it lists exist; UserError."""
    try:
        about = json.loads(files.read(files.place(str(file), 'path')))
        if about.get('format') != _FORMAT:
            raise ValueError('another version wrote it')
        parts = [(part['name'], part['records'], part['bytes']) for part in about['files']]
        if not isinstance(about['length'], int) or about['length'] < 1:
            raise ValueError(f'says that there are {about["length"]} examples')
        for name, _, size in parts:
            path = file.parent / Path(name).name
            if not path.is_file() or path.stat().st_size != size:
                raise ValueError(f'{path.name} is missing or has not the {size} bytes it had')
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = f'it has no {error}' if isinstance(error, KeyError) else error
        raise UserError(
            f'{file}: cannot be read ({reason}): delete {file.parent}, and it is made again'
        ) from error
    return about


def _read_labels(file: Path) -> np.ndarray:
    try:
        files.check_regular(file)
        return np.load(file, mmap_mode='r', allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f'{file.parent}: cannot be read ({error}): delete it') from error


# A copy of ImageNet has more files than a process may hold open.
@functools.lru_cache(maxsize=256)
def _reader(path: str) -> Any:
    from array_record.python import array_record_module as array_record

    return array_record.ArrayRecordReader(
        path, 'readahead_buffer_size:0', file_reader_buffer_size=1 << 16
    )


def _pack(image: np.ndarray, labels: np.ndarray) -> bytes:
    code = _TYPES.index(image.dtype)
    header = _HEADER.pack(_MAGIC, code, *image.shape, len(labels))
    return header + labels.astype('<i4').tobytes() + np.ascontiguousarray(image).tobytes()


def _unpack(record: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return (image, labels) of a record; OSError if it is damaged."""
    if len(record) < _HEADER.size or record[:4] != _MAGIC:
        raise OSError('damaged record: it does not begin as one of ours')
    _, code, height, width, channels, count = _HEADER.unpack_from(record)
    if code >= len(_TYPES):
        raise OSError(f'damaged record: there is no type {code} of pixels')
    start = _HEADER.size + 4 * count
    if len(record) != start + height * width * channels * _TYPES[code].itemsize:
        raise OSError(
            f'damaged record: {len(record)} bytes for {count} labels and {height}x{width}x'
            f'{channels} pixels of {_TYPES[code]}'
        )
    labels = np.frombuffer(record, '<i4', count, _HEADER.size)
    image = np.frombuffer(record, _TYPES[code], offset=start)
    return image.reshape(height, width, channels), labels


# --- Writing ---------------------------------------------------------------------------


def _print(line: str) -> None:
    print(f'data    {line}', file=sys.stderr, flush=True)


def write_records(
    source: Source,
    folder: Path,
    split: str,
    shorter_side: int,
    *,
    on_error: str = 'stop',
    fingerprint: str = '',
    tell: Callable[[str], None] = _print,
) -> int:
    """Write a copy of a source whose images have a shorter side of at most `shorter_side`.

    It is written beside `folder` and renamed once it is complete. Images are never enlarged.

    Args:
      source: of images.
      folder: must not exist yet; another process may be writing the same copy.
      split: name of the copy's split.
      shorter_side: in pixels.
      on_error: 'skip' leaves out examples that cannot be read or decoded.
      fingerprint: of the data that are copied, stored with the copy.
      tell: receives a line of progress every ten seconds.

    Returns:
      The number of examples that were left out.

    Raises:
      UserError: an example is damaged, none is left, or the disk cannot be written to.
    """
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix='.new-'))
        about = _write(source, temporary, split, shorter_side, on_error == 'skip', tell)
        about['fingerprint'] = fingerprint
        (temporary / f'{split}.json').write_text(json.dumps(about, indent=2) + '\n')
        temporary.rename(folder)
        return about['left_out']
    except (OSError, RuntimeError) as error:
        if (folder / f'{split}.json').exists():  # Another process wrote the same copy first.
            return json.loads((folder / f'{split}.json').read_text())['left_out']
        reason = ' '.join(str(error).split())[:200]
        raise UserError(f'{folder}: cannot be written ({reason}): make room for it') from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


class _Writer:
    """Writes records to files of about 256 MiB, and describes them in `files`."""

    def __init__(self, folder: Path, split: str):
        self._folder, self._split = folder, split
        self._writer: Any = None
        self._bytes = 0
        self.files: list[dict[str, Any]] = []

    def write(self, record: bytes) -> None:
        if self._writer is None or self._bytes > _FILE_BYTES:
            self.close()
            self._open()
        self._writer.write(record)
        self._bytes += len(record)
        self.files[-1]['records'] += 1

    def _open(self) -> None:
        from array_record.python import array_record_module as array_record

        name = f'{self._split}-{len(self.files):05d}.array_record'
        path = str(self._folder / name)
        self._writer = array_record.ArrayRecordWriter(path, 'group_size:1,uncompressed')
        self._bytes = 0
        self.files.append({'name': name, 'records': 0})

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self.files[-1]['bytes'] = (self._folder / self.files[-1]['name']).stat().st_size


def _write(
    source: Source,
    folder: Path,
    split: str,
    side: int,
    skip: bool,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Write all files but the description, and return that."""
    labels: list[int] = []
    shapes, several_labels, left_out = set(), False, 0
    writer = _Writer(folder, split)
    for index, example in enumerate(_report_progress(_small_examples(source, side), source, tell)):
        if isinstance(example, Exception):
            if not skip:
                raise UserError(
                    f'{source.place(index)}: {example}; repair or remove it before a resized '
                    'copy is made'
                ) from example
            left_out += 1
            continue
        image, label = example
        several_labels = several_labels or np.ndim(label) > 0
        writer.write(_pack(image, np.atleast_1d(np.asarray(label))))
        shapes.add(image.shape)
        if not several_labels:
            labels.append(int(label))
    if not writer.files:
        raise UserError(f'{source.name} {source.split}: none of its images can be decoded')
    writer.close()
    if not several_labels:
        np.save(folder / f'{split}-labels.npy', np.array(labels, np.int32), allow_pickle=False)
    return {
        'format': _FORMAT,
        'name': source.name,
        'split': source.split,
        'length': sum(file['records'] for file in writer.files),
        'left_out': left_out,
        'num_classes': source.num_classes,
        'class_names': source.class_names,
        'channels': source.channels,
        'image_shape': shapes.pop() if len(shapes) == 1 else None,
        'several_labels': several_labels,
        'shorter_side': side,
        'files': writer.files,
    }


def _report_progress(
    examples: Iterator[Example | Exception], source: Source, tell: Callable[[str], None]
) -> Iterator[Example | Exception]:
    began = told = time.monotonic()
    for done, example in enumerate(examples, 1):
        if time.monotonic() - told > _REPORT_SECONDS:
            told = time.monotonic()
            rate = done / (told - began)
            tell(f'resizing once: {done:,} of {source.length:,} images, {rate:,.0f}/s')
        yield example


def _small_examples(source: Source, side: int) -> Iterator[Example | Exception]:
    """Yield (image, label) or the error of each example in order; loaded in threads."""

    def load_one(index: int) -> Example | Exception:
        try:
            columns = source.load(np.array([index], np.int64))
            return _shrink(columns['image'][0], source.channels, side), columns['label'][0]
        except (DecodeError, BadExampleError, OSError) as error:
            return error

    def load(start: int) -> list[Example | Exception]:
        indices = np.arange(start, min(start + _ROWS_PER_TASK, source.length))
        try:
            columns = source.load(indices)
            if 'image' not in columns:
                raise UserError(
                    f'{source.name} holds {", ".join(sorted(columns))} but no images, which is '
                    "what cache='resized' is for"
                )
            pairs = zip(columns['image'], columns['label'], strict=True)
            return [(_shrink(image, source.channels, side), label) for image, label in pairs]
        except (DecodeError, BadExampleError, OSError):
            return [load_one(index) for index in indices.tolist()]

    threads = os.cpu_count() or 1
    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        try:
            for start in range(0, source.length, _ROWS_PER_TASK):
                waiting.append(pool.submit(load, start))
                if len(waiting) > 2 * threads:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for task in waiting:
                task.cancel()


def _shrink(image: Any, channels: int, side: int) -> np.ndarray:
    """Decode an image and average it down to a shorter side of at most `side`; DecodeError."""
    if isinstance(image, bytes):
        image = Encoded(image, channels)
    if isinstance(image, Encoded):
        image = image.pixels()
    if image.dtype not in _TYPES:
        raise DecodeError(f'pixels are {image.dtype}, but copies hold uint8, uint16 or float32')
    height, width = image.shape[:2]
    scale = side / min(height, width)
    if scale >= 1:
        return image
    size = max(side, round(height * scale)), max(side, round(width * scale))
    return resized(image, size, 'area')
