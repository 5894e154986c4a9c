"""Indices beside shards: what is in each, so that nothing must be read to open them.

`python -m big_vit.prepare index` writes, for each shard, SHARD.index (where its examples are), and
for a folder of shards one big_vit.index (names, sizes and counts of all of them). Both are

    bytes   0 to  7   'BVINDEX' and the number of the format, one digit
            8 to 15   bytes of the description, and CRC-32 of all that follows, uint32 each
           16 on      the description (JSON), then arrays, compressed by zlib

in little-endian numbers.
"""

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from big_vit.data import blocks, files, network
from big_vit.data.sources.media import say_once
from big_vit.distributed import hosts
from big_vit.errors import UserError

MANIFEST = 'big_vit.index'
ENDING = '.index'
FORMAT = 1
_MAGIC = b'BVINDEX'
_HEAD = struct.Struct('<7scII')
_TYPES = ('|u1', '<u4', '<u8', '<i4', '<i8')
# No array is larger; a damaged or forged description may claim it.
_MOST_BYTES = 1 << 36

Arrays = dict[str, np.ndarray]


def command(folder: object) -> str:
    return f'run `python -m big_vit.prepare index {folder}`'


def pack(about: dict[str, Any], arrays: Arrays) -> bytes:
    """Return the bytes of an index."""
    listed = [[n, a.dtype.newbyteorder('<').str, list(a.shape)] for n, a in arrays.items()]
    text = json.dumps({**about, 'arrays': listed}).encode()
    packer = zlib.compressobj(6)
    parts = [packer.compress(np.ascontiguousarray(array).data) for array in arrays.values()]
    body = b''.join((text, *parts, packer.flush()))
    return _HEAD.pack(_MAGIC, str(FORMAT).encode(), len(text), zlib.crc32(body)) + body


def unpack(data: bytes, place: object, folder: object) -> tuple[dict[str, Any], Arrays]:
    """Return (description, arrays) of an index.

    Args:
      place: of the index, for messages.
      folder: of the shards.

    Raises:
      UserError: it is damaged, or of another format.
    """
    again = command(folder)
    if len(data) < _HEAD.size or not data.startswith(_MAGIC):
        raise UserError(f'{place}: is no index of shards: delete it, and {again}')
    _, number, length, crc = _HEAD.unpack_from(data)
    if number != str(FORMAT).encode():
        raise UserError(
            f'{place}: is of format {number.decode("ascii", "replace")}, and this program reads '
            f'format {FORMAT}: {again}'
        )
    body = memoryview(data)[_HEAD.size :]
    try:
        if zlib.crc32(body) != crc:
            raise ValueError('its checksum is another')
        about = json.loads(bytes(body[:length]))
        shapes = [(name, np.dtype(kind), tuple(shape)) for name, kind, shape in about['arrays']]
        if any(dtype.str not in _TYPES for _, dtype, _ in shapes):
            raise ValueError('it has arrays of unknown types')
        total = sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in shapes)
        if total > _MOST_BYTES:
            raise ValueError(f'it claims {total:,} bytes')
        flat = zlib.decompressobj().decompress(body[length:], total + 1)
        if len(flat) != total:
            raise ValueError(f'it has {len(flat):,} bytes of {total:,}')
    except (ValueError, KeyError, TypeError, zlib.error) as error:
        raise UserError(f'{place}: is damaged ({error}): {again}') from error
    arrays, at = {}, 0
    for name, dtype, shape in shapes:
        count = math.prod(shape)
        arrays[name] = np.frombuffer(flat, dtype, count, at).reshape(shape)
        at += count * dtype.itemsize
    return about, arrays


def stamp_number(stamp: str) -> int:
    """Hash what a file system says of a file's last change, so that it fits into an array."""
    return int.from_bytes(hashlib.sha256(stamp.encode()).digest()[:8], 'little')


# --- The shards of a folder ------------------------------------------------------------


class Row(NamedTuple):
    """A shard in the index of its folder.

    Attributes:
      name: relative to the folder of shards.
      size, stamp: of the shard, the latter by `stamp_number`.
      counts, unlabelled: examples of each kind, and those of them without a label.
      index_bytes, index_crc: of SHARD.index; 0 if there is none.
      group: the word of its name that says its split; '' if none does.
    """

    name: str
    size: int
    stamp: int
    counts: tuple[int, ...]
    unlabelled: tuple[int, ...]
    index_bytes: int
    index_crc: int
    group: str


class Manifest(NamedTuple):
    """What is known of the shards of a folder.

    Attributes:
      file: where it is; the indices of its shards are beside it.
      root: folder of the shards when it was made. Elsewhere copies of them may have other stamps.
      kind: of the shards, such as 'tar'.
      label_column: that the labels are of.
      groups: facts by the word for a split, see `joined_facts`.
      names: of the shards, and the place of each in the arrays.
      arrays: 'size', 'stamp', 'counts', 'unlabelled', 'index_bytes', 'index_crc' of each shard.
    """

    file: files.Place
    root: str
    kind: str
    label_column: str
    groups: dict[str, dict[str, Any]]
    names: dict[str, int]
    arrays: Arrays


def joined_facts(facts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Join the facts of several shards.

    They are 'values' (different labels), 'left' ({ending: (files that cannot be read, one of
    them)}), and 'endings' ({ending: number of members by kind of the example they belong to}).
    """
    values: dict[str, Any] = {}
    endings: dict[str, list[int]] = {}
    facts = list(facts)
    for fact in facts:
        values |= {json.dumps(value): value for value in fact['values']}
        for ending, counts in fact['endings'].items():
            so_far = endings.get(ending, [0] * len(counts))
            endings[ending] = [a + b for a, b in zip(so_far, counts, strict=True)]
    return {
        'values': [values[text] for text in sorted(values)],
        'left': joined_left(fact['left'] for fact in facts),
        'endings': endings,
    }


def joined_left(parts: Iterable[dict[str, tuple[int, str]]]) -> dict[str, tuple[int, str]]:
    """Join what cannot be read of several shards, {ending: (number, example)}."""
    left: dict[str, tuple[int, str]] = {}
    for part in parts:
        for ending, (count, example) in part.items():
            before, first = left.get(ending, (0, example))
            left[ending] = before + count, first
    return left


def pack_manifest(
    rows: list[Row], facts: dict[str, dict[str, Any]], root: str, kind: str, label_column: str
) -> bytes:
    """Return the bytes of the index of a folder, whose shards are sorted by name."""
    rows = sorted(rows)
    about = {
        'kind': kind,
        'root': root,
        'label_column': label_column,
        'groups': facts,
    }
    names = '\0'.join(row.name for row in rows).encode('utf-8', 'surrogateescape')
    groups = sorted(facts)
    numbers = [groups.index(row.group) for row in rows]
    arrays: Arrays = {
        'names': np.frombuffer(names, np.uint8),
        'size': np.array([row.size for row in rows], np.uint64),
        'stamp': np.array([row.stamp for row in rows], np.uint64),
        'counts': np.array([row.counts for row in rows], np.uint32),
        'unlabelled': np.array([row.unlabelled for row in rows], np.uint32),
        'index_bytes': np.array([row.index_bytes for row in rows], np.uint32),
        'index_crc': np.array([row.index_crc for row in rows], np.uint32),
        'group': np.array(numbers, np.uint32),
    }
    return pack(about, arrays)


def read_manifest(file: files.Place, folder: object) -> Manifest | None:
    """Read the index of a folder of shards in one request; None if there is none.

    Raises:
      UserError: it cannot be read, is damaged, or of another format.
    """
    try:
        data = files.read(file)
    except FileNotFoundError:
        return None
    except Exception as error:
        if not network.is_of_store(error):
            raise
        raise files.unread(file, error) from error
    about, arrays = unpack(data, file, folder)
    try:
        text = bytes(arrays.pop('names')).decode('utf-8', 'surrogateescape')
        names = text.split('\0') if text else []
        if any(len(array) != len(names) for array in arrays.values()):
            raise ValueError('its arrays are of other lengths')
        return Manifest(
            file,
            str(about['root']),
            str(about['kind']),
            str(about['label_column']),
            dict(about['groups']),
            {name: number for number, name in enumerate(names)},
            arrays,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f'{file}: is damaged ({error}): {command(folder)}') from error


def rows_of(manifest: Manifest) -> list[Row]:
    groups = sorted(manifest.groups)
    columns = manifest.arrays
    fields = ('size', 'stamp', 'counts', 'unlabelled', 'index_bytes', 'index_crc', 'group')
    lists = zip(*(columns[field].tolist() for field in fields), strict=True)
    return [
        Row(name, size, stamp, tuple(counts), tuple(bare), bytes_, crc, groups[group])
        for name, (size, stamp, counts, bare, bytes_, crc, group) in zip(
            manifest.names, lists, strict=True
        )
    ]


def check(manifest: Manifest, shards: list[files.Stored], folder: str) -> np.ndarray:
    """Return the rows of some shards of a folder, int64 [shards].

    Raises:
      UserError: a shard is not in the index, or changed since it was made.
    """
    again = command(folder)
    rows = np.array([manifest.names.get(shard.place.name, -1) for shard in shards], np.int64)
    missing = np.flatnonzero(rows < 0)
    if missing.size:
        raise UserError(
            f'{manifest.file}: says nothing of {missing.size:,} of {len(shards):,} shards, such as '
            f'{shards[missing[0]].place.name}: {again}'
        )
    sizes = np.array([shard.size for shard in shards], np.uint64)
    changed = manifest.arrays['size'][rows] != sizes
    # In another place, as in a copy, what a file system says of a change is something else.
    if manifest.root == folder:
        stamps = np.array([stamp_number(shard.stamp) for shard in shards], np.uint64)
        changed |= manifest.arrays['stamp'][rows] != stamps
    which = np.flatnonzero(changed)
    if which.size:
        raise UserError(
            f'{manifest.file}: is older than {which.size:,} of {len(shards):,} shards, such as '
            f'{shards[which[0]].place.name}: {again}'
        )
    return rows


def read_index(manifest: Manifest, shard: files.Stored) -> Arrays:
    """Read the index of a shard.

    Raises:
      UserError: it cannot be read, or is not the one that the index of the folder was made with.
    """
    row = manifest.names[shard.place.name]
    size, crc = (int(manifest.arrays[name][row]) for name in ('index_bytes', 'index_crc'))
    folder = shard.place._replace(path=shard.place.path.rpartition('/')[0])
    place = manifest.file._replace(path=manifest.file.path.rpartition('/')[0])
    file = place / (shard.place.name + ENDING)
    stored = files.Stored(file, size, f'{crc:08x}')
    try:
        data = blocks.read_small(stored)
    except network.ShortAnswerError:
        data = b''
    except FileNotFoundError as error:
        raise UserError(f'{file}: is not there: {command(folder)}') from error
    except OSError as error:
        raise files.unread(file, error) from error
    if len(data) != size or zlib.crc32(data) != crc:
        blocks.forget(stored)
        raise UserError(
            f'{file}: is not of the same time as {manifest.file.name} beside it: {command(folder)}'
        )
    return unpack(data, file, folder)[1]


# --- What others wrote -----------------------------------------------------------------


class Counts(NamedTuple):
    """Numbers of samples of shards, as webdataset keeps them, without where the samples are."""

    file: files.Place
    samples: dict[str, int]

    def of(self, shards: list[files.Stored], folder: str) -> np.ndarray:
        """Return the samples of some shards, int64 [shards].

        Raises:
          UserError: nothing is said of one, or there are no samples.
        """
        missing = [s.place.name for s in shards if s.place.name not in self.samples]
        if missing:
            raise UserError(
                f'{self.file}: says nothing of {len(missing):,} of {len(shards):,} shards, such as '
                f'{missing[0]}: {command(folder)}'
            )
        lengths = np.array([self.samples[shard.place.name] for shard in shards], np.int64)
        if not lengths.any():
            raise UserError(f'{self.file}: says that there are no samples: {command(folder)}')
        return lengths


def read_counts(folder: files.Place) -> Counts | None:
    """Read `sizes.json` of webdataset, or `index.json` of wids; None if there is neither.

    Raises:
      UserError: it cannot be read, or names a shard twice.
    """
    for name in ('sizes.json', 'index.json'):
        file = folder / name
        try:
            content = json.loads(files.read(file))
            listed = _counts(content)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise files.unread(file, error) from error
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f'{file}: cannot be read ({error}): {command(folder)}, which needs it not'
            ) from error
        if listed is None:
            continue
        samples = dict(listed)
        if len(samples) < len(listed):
            names = [name for name, _ in listed]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f'{file}: names shard {twice} twice: {command(folder)}')
        return Counts(file, samples)
    return None


def _counts(content: Any) -> list[tuple[str, int]] | None:
    """Return (name of a shard, samples) of a file that lists them; None for another file."""
    if isinstance(content, dict) and 'shardlist' in content:
        listed = [(shard['url'], shard['nsamples']) for shard in content['shardlist']]
    elif isinstance(content, dict) and any(str(name).endswith('.tar') for name in content):
        listed = list(content.items())
    else:
        return None
    if not all(type(count) is int and 0 <= count < 1 << 31 for _, count in listed):
        raise ValueError('a number of samples is none')
    return [(str(name).rpartition('/')[2], count) for name, count in listed]


# Walking less than this many local bytes is no matter to speak of.
_MUCH = 10 << 30


def tell_walk(shards: list[files.Stored]) -> None:
    """Say that shards are read to index them, and what avoids that.

    Raises:
      UserError: several hosts would each read much from a store.
    """
    total = sum(shard.size for shard in shards)
    folder = shards[0].place._replace(path=shards[0].place.path.rpartition('/')[0])
    if folder.is_local and total <= _MUCH:
        return
    what = f'all {len(shards):,} shards ({total / 1e9:,.1f} GB)'
    if not folder.is_local and total > _MUCH and hosts.count() > 1:
        raise UserError(
            f'{folder}: has no index, and to make one each of {hosts.count()} hosts would read '
            f'{what}: {command(folder)} once'
        )
    if len(shards) > 1:
        say_once(
            f'{folder}: has no index, so {what} are read through once: `python -m big_vit.prepare '
            f'index {folder}` avoids that'
        )
