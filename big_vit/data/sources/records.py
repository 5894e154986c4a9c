"""Our own files of decoded images, which `cache='resized'` makes: raw pixels in ArrayRecord.

A folder holds SPLIT.json (what it is), SPLIT-NNNNN.array_record and, where each example has one
label, SPLIT-labels.npy. A record is a header of little-endian numbers, the labels, and the pixels
row by row:

    bytes    0 to 3   'BVR2'
             4        type of a pixel: 0 uint8, 1 uint16, 2 float32
             5 to 7   zeros
             8 to 15  height and width, uint32 each
            16 to 19  channels and how many labels, uint16 each
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
from big_vit.data.sources.base import Columns, Source, cut
from big_vit.data.transforms.geometry import resized
from big_vit.data.transforms.operations import BadExampleError
from big_vit.errors import UserError

# Its size is a multiple of four, so that pixels of any type lie at an even address.
_HEADER = struct.Struct('<4sB3xIIHH')
_MAGIC = b'BVR2'
_FORMAT = 2
_TYPES = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.float32))
_FILE_BYTES = 256 << 20
_TOGETHER = 16
_TOLD_EVERY = 10.0  # Seconds.


def _pack(image: np.ndarray, labels: np.ndarray) -> bytes:
    code = _TYPES.index(image.dtype)
    header = _HEADER.pack(_MAGIC, code, *image.shape, len(labels))
    return header + labels.astype('<i4').tobytes() + np.ascontiguousarray(image).tobytes()


def _unpack(record: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(image, labels); OSError where the record is damaged."""
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


def _small(image: Any, channels: int, side: int) -> np.ndarray:
    """Decoded, the shorter side at most `side`, by averages of areas; DecodeError."""
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
    return resized(
        image, (max(side, round(height * scale)), max(side, round(width * scale))), 'area'
    )


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
    """A copy of a source with images whose shorter side is at most `shorter_side`.

    Written beside `folder` and renamed when it is complete. Images only ever become smaller.

    Args:
      source: of images.
      folder: must not be there yet; another process may be making the same one.
      split: the name that the copy has.
      on_error: 'skip' leaves out examples that cannot be read or decoded.
      fingerprint: of what it is made from, to be kept with it.
      tell: is given a line on how far it is, every ten seconds.

    Returns:
      How many examples were left out.

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
        if (folder / f'{split}.json').exists():  # Another process was faster; it is the same.
            return json.loads((folder / f'{split}.json').read_text())['left_out']
        reason = ' '.join(str(error).split())[:200]
        raise UserError(f'{folder}: cannot be written ({reason}): make room for it') from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _write(
    source: Source,
    folder: Path,
    split: str,
    side: int,
    skip: bool,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Writes all but the JSON file, and gives what belongs into it."""
    from array_record.python import array_record_module as array_record

    labels: list[int] = []
    shapes, several, left_out = set(), False, 0
    written: list[dict[str, Any]] = []
    writer: Any = None

    def finish() -> None:
        writer.close()
        written[-1]['bytes'] = (folder / written[-1]['name']).stat().st_size

    began = told = time.monotonic()
    held = 0
    for done, found in enumerate(_examples(source, side), 1):
        if time.monotonic() - told > _TOLD_EVERY:
            told = time.monotonic()
            rate = done / (told - began)
            tell(f'resizing once: {done:,} of {source.length:,} images, {rate:,.0f}/s')
        if isinstance(found, Exception):
            if not skip:
                raise UserError(
                    f'{source.place(done - 1)}: {found}; repair or remove it before a resized '
                    'copy is made'
                ) from found
            left_out += 1
            continue
        image, label = found
        if writer is None or held > _FILE_BYTES:
            if writer is not None:
                finish()
            name = f'{split}-{len(written):05d}.array_record'
            writer = array_record.ArrayRecordWriter(str(folder / name), 'group_size:1,uncompressed')
            written.append({'name': name, 'records': 0})
            held = 0
        several = several or np.ndim(label) > 0
        record = _pack(image, np.atleast_1d(np.asarray(label)))
        writer.write(record)
        held += len(record)
        written[-1]['records'] += 1
        shapes.add(image.shape)
        if not several:
            labels.append(int(label))
    if writer is None:
        raise UserError(f'{source.name} {source.split}: none of its images can be decoded')
    finish()
    if not several:
        np.save(folder / f'{split}-labels.npy', np.array(labels, np.int32), allow_pickle=False)
    return {
        'format': _FORMAT,
        'name': source.name,
        'split': source.split,
        'length': sum(file['records'] for file in written),
        'left_out': left_out,
        'num_classes': source.num_classes,
        'class_names': source.class_names,
        'channels': source.channels,
        'image_shape': shapes.pop() if len(shapes) == 1 else None,
        'several_labels': several,
        'shorter_side': side,
        'files': written,
    }


def _examples(source: Source, side: int) -> Iterator[tuple[np.ndarray, Any] | Exception]:
    """(image, label) of all examples in order, or what is wrong with them; made in threads."""

    def one(index: int) -> tuple[np.ndarray, Any] | Exception:
        try:
            columns = source.load(np.array([index], np.int64))
            return _small(columns['image'][0], source.channels, side), columns['label'][0]
        except (DecodeError, BadExampleError, OSError) as error:
            return error

    def load(start: int) -> list[tuple[np.ndarray, Any] | Exception]:
        indices = np.arange(start, min(start + _TOGETHER, source.length))
        try:
            columns = source.load(indices)
            if 'image' not in columns:
                raise UserError(
                    f'{source.name} holds {", ".join(sorted(columns))} but no images, which is '
                    "what cache='resized' is for"
                )
            pairs = zip(columns['image'], columns['label'], strict=True)
            return [(_small(image, source.channels, side), label) for image, label in pairs]
        except (DecodeError, BadExampleError, OSError):
            return [one(index) for index in indices.tolist()]

    threads = os.cpu_count() or 1
    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        try:
            for start in range(0, source.length, _TOGETHER):
                waiting.append(pool.submit(load, start))
                if len(waiting) > 2 * threads:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for task in waiting:
                task.cancel()


@functools.lru_cache(maxsize=256)
def _reader(path: str) -> Any:
    """Of one file; a copy of ImageNet has more of them than a process may hold open."""
    from array_record.python import array_record_module as array_record

    return array_record.ArrayRecordReader(
        path, 'readahead_buffer_size:0', file_reader_buffer_size=1 << 16
    )


def _about(file: Path) -> dict[str, Any]:
    """What SPLIT.json says, once the files that it lists are there."""
    try:
        about = json.loads(file.read_text())
        if about.get('format') != _FORMAT:
            raise ValueError('another version wrote it')
        counts = [(part['name'], part['records'], part['bytes']) for part in about['files']]
        if not isinstance(about['length'], int) or about['length'] < 1:
            raise ValueError(f'says that there are {about["length"]} examples')
        for name, _, size in counts:
            path = file.parent / Path(name).name
            if not path.exists() or path.stat().st_size != size:
                raise ValueError(f'{path.name} is missing or has not the {size} bytes it had')
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = f'it has no {error}' if isinstance(error, KeyError) else error
        raise UserError(
            f'{file}: cannot be read ({reason}): delete {file.parent}, and it is made again'
        ) from error
    return about


def records(split: str, path: str, key: str = 'data') -> Source:
    """A folder that `write_records` made.

    Args:
      split: see `base.parse_split`.
      path: a local folder.
      key: prefix of the config keys in messages.

    Raises:
      UserError: no such folder, or not all of its files are there.
    """
    root = files.place(path, f'{key}.path')
    if not root.is_local:
        raise UserError(f'{key}.path: {root} is not on this machine: copy it to a local disk')
    folder = Path(root.path)
    abouts = {p.stem: p for p in sorted(folder.glob('*.json'))} if folder.is_dir() else {}
    if not abouts:
        raise UserError(
            f"{key}.path: {folder} holds no records: they are what cache='resized' makes"
        )

    def whole(name: str) -> Source:
        about = _about(abouts[name])
        parts = about['files']
        paths = [str(folder / Path(part['name']).name) for part in parts]
        ends = list(itertools.accumulate(part['records'] for part in parts))
        labels, length = None, about['length']
        if not about['several_labels']:
            try:
                labels = np.load(folder / f'{name}-labels.npy', mmap_mode='r', allow_pickle=False)
            except (OSError, ValueError) as error:
                raise UserError(f'{folder}: cannot be read ({error}): delete it') from error
        listed = ends[-1] if labels is None else labels.size
        if not ends[-1] == listed == length:
            raise UserError(
                f'{folder}: holds {ends[-1]} records and {listed} labels of {length}: delete it'
            )

        def lies(index: int) -> tuple[int, int]:
            which = int(np.searchsorted(ends, index, side='right'))
            return which, index - (ends[which - 1] if which else 0)

        def where(index: int) -> str:
            which, record = lies(index)
            return f'{paths[which]}, record {record}'

        def read(index: int) -> tuple[np.ndarray, np.ndarray]:
            which, record = lies(index)
            try:
                return _unpack(_reader(paths[which]).read([record])[0])
            except (RuntimeError, ValueError, IndexError) as error:
                reason = ' '.join(str(error).split())[:200]
                raise OSError(f'damaged record ({reason})') from error

        names, shape = about['class_names'], about['image_shape']

        def load(indices: np.ndarray) -> Columns:
            found = [read(index) for index in indices.tolist()]
            images: Any = [image for image, _ in found]
            if shape and found:
                images = np.stack(images)
            every: Any = [several for _, several in found]
            if labels is not None:
                every = np.concatenate(every) if found else np.zeros(0, np.int32)
            return {'image': images, 'label': every}

        return Source(
            name=about['name'],
            split=name,
            length=length,
            num_classes=about['num_classes'],
            image_shape=tuple(shape) if shape else None,
            load=load,
            in_memory=False,
            channels=about['channels'],
            class_names=tuple(names) if names else None,
            labels=None if labels is None else lambda: np.asarray(labels),
            where=where,
        )

    return cut(f'records:{folder.name}', abouts, whole, split, key)
