"""TFRecord files, read by an index that is built once; without TensorFlow.

A record is its length (uint64, little-endian), the masked CRC-32C of the length, the data, and
the masked CRC-32C of the data.
"""

import concurrent.futures
import functools
import re
import struct
from typing import Any

import numpy as np

from big_vit.data import blocks, files, network
from big_vit.data.recent import Recent
from big_vit.data.sources import sidecars
from big_vit.data.sources.base import locate
from big_vit.errors import UserError, failure_at

_HEAD, _FOOT = 12, 4
# Indices of files that are kept in memory.
_PARTS_BYTES = 256 << 20
_NAME = re.compile(r'.*\.tfrecords?(-\d+-of-\d+)?')


def is_shard(name: str) -> bool:
    """Whether a file is a TFRecord file by its name."""
    return _NAME.fullmatch(name) is not None


@functools.cache
def _table() -> list[int]:
    """Build the table of CRC-32C (Castagnoli) by byte."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


def masked_crc(data: bytes) -> int:
    """Return the checksum in TFRecord files: CRC-32C, rotated by 15 bits, plus a constant."""
    crc, table = 0xFFFFFFFF, _table()
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    return _masked(crc ^ 0xFFFFFFFF)


def _masked(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _records(file: files.Place) -> tuple[np.ndarray, np.ndarray]:
    """Return (offsets, sizes) of the data of all records; UserError if the file is damaged."""
    end = files.size_of(file)
    take = files.forward(file)
    offsets, sizes, at = [], [], 0
    while at < end:
        head = take(at, _HEAD)
        if len(head) < _HEAD:
            raise UserError(f'{file}: truncated at byte {end:,}, in the head of a record')
        length, crc = struct.unpack('<QI', head)
        if masked_crc(head[:8]) != crc:
            raise UserError(f'{file}: damaged at byte {at:,}: no record begins there')
        if at + _HEAD + length + _FOOT > end:
            raise UserError(f'{file}: truncated: the record at byte {at:,} needs {length:,} bytes')
        if length >= 1 << 32:
            raise UserError(
                f'{file}: the record at byte {at:,} has {length:,} bytes, 4 GiB or more'
            )
        offsets.append(at + _HEAD)
        sizes.append(length)
        at += _HEAD + length + _FOOT
    return np.array(offsets, np.uint64), np.array(sizes, np.uint32)


def indexed(shards: list[files.Stored]) -> dict[str, np.ndarray]:
    """Index the records of some files; the index is built once and memory-mapped from then on.

    Returns:
      {'shard': uint32, 'offset': uint64, 'size': uint32}, arrays [records].

    Raises:
      UserError: a file is damaged; names the byte.
    """

    def build() -> dict[str, np.ndarray]:
        sidecars.tell_walk(shards)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            found = pool.map(lambda shard: _records(shard.place), shards)
            offsets, sizes = zip(*found, strict=True)
        numbers = np.arange(len(shards), dtype=np.uint32)
        return {
            'shard': np.repeat(numbers, [len(part) for part in offsets]),
            'offset': np.concatenate(offsets),
            'size': np.concatenate(sizes),
        }

    return files.kept_arrays('tfrecord', files.fingerprint_of(shards), build)


class Records:
    """The records of files whose numbers of records are known; each file is indexed when needed.

    Local files without an index are indexed at once, which is soon done and finds what is damaged.

    Args:
      shards: the files.
      lengths: records of each.

    Raises:
      UserError: a file has another number of records, is damaged, or changed since its index.
    """

    def __init__(self, shards: list[files.Place], lengths: list[int]):
        self._shards, self._lengths = files.stored(shards), lengths
        self._ends = np.cumsum(lengths)
        folder = shards[0]._replace(path=shards[0].path.rpartition('/')[0])
        self._manifest = sidecars.read_manifest(folder / sidecars.MANIFEST, folder)
        if self._manifest is not None:
            rows = sidecars.check(self._manifest, self._shards, str(folder))
            self._compare(self._manifest.arrays['counts'][rows, 0])
        self._every = None
        if self._manifest is None and shards[0].is_local:
            index = indexed(self._shards)
            self._compare(np.bincount(index['shard'], minlength=len(shards)))
            self._every = index['offset'], index['size']
        self._part = Recent(self._opened, _PARTS_BYTES)

    def _compare(self, counts: np.ndarray, first: int = 0) -> None:
        for number, count in enumerate(counts.tolist(), first):
            if count != self._lengths[number]:
                raise UserError(
                    f'{self._shards[number].place}: {count} records, but dataset_info.json says '
                    f'{self._lengths[number]}: copy the dataset again'
                )

    def _opened(self, shard: int) -> tuple[tuple[np.ndarray, np.ndarray], int]:
        stored = self._shards[shard]
        if self._every is not None:
            which = slice(int(self._ends[shard]) - self._lengths[shard], int(self._ends[shard]))
            return (self._every[0][which], self._every[1][which]), 1
        if self._manifest is not None:
            index = sidecars.read_index(self._manifest, stored)
        else:
            index = indexed([stored])
            self._compare(np.array([len(index['size'])]), shard)
        return (index['offset'], index['size']), index['offset'].nbytes + index['size'].nbytes

    def read(self, index: int) -> bytes:
        """Read a record; of a remote one its length and checksum are compared.

        Raises:
          OSError: it cannot be read, or is damaged.
        """
        shard, row = locate(index, self._ends)
        offset, size = (int(column[row]) for column in self._part(shard))
        stored = self._shards[shard]
        if stored.place.is_local:
            return files.read_range(stored.place, offset, size)
        for _ in range(2):  # It may be the copy on the local disk that is damaged.
            whole = blocks.read_range(stored, offset - _HEAD, _HEAD + size + _FOOT)
            (length,) = struct.unpack('<Q', whole[:8])
            data = whole[_HEAD:-_FOOT]
            (wanted,) = struct.unpack('<I', whole[-_FOOT:])
            if length == size and _fast_crc(data) in (wanted, None):
                return data
            blocks.forget(stored)
        text = f'{stored.place}: the record at byte {offset:,} has another checksum'
        raise network.BrokenAnswerError(text)

    def expect(self, indices: np.ndarray, soon: bool = False) -> None:
        """Begin to read some records with their blocks, or `soon` alone, if they are remote."""
        if self._shards[0].place.is_local:
            return
        which = np.searchsorted(self._ends, indices, side='right')
        starts = self._ends - self._lengths
        for shard in np.unique(which).tolist():
            blocks.later(self._fetch, shard, indices[which == shard] - starts[shard], soon)

    def _fetch(self, shard: int, rows: np.ndarray, soon: bool) -> None:
        offset, size = self._part(shard)
        places = zip(offset[rows].tolist(), size[rows].tolist(), strict=True)
        told = blocks.expect_soon if soon else blocks.expect
        told(self._shards[shard], [(at - _HEAD, _HEAD + count + _FOOT) for at, count in places])


def _fast_crc(data: bytes) -> int | None:
    """Return the masked checksum, if the package is there that computes it in no time."""
    try:
        import google_crc32c  # Comes with gcsfs.
    except ImportError:
        return None
    return _masked(google_crc32c.value(data))


def sidecar(shard: files.Place, _: str = '') -> tuple[dict[str, Any], sidecars.Arrays]:
    """Index a file; returns (facts, arrays) as `sidecars` keeps them.

    Raises:
      UserError: it is damaged; names the byte.
    """
    try:
        offset, size = _records(shard)
    except OSError as error:
        kind = failure_at(shard, error)
        raise kind(f'{shard}: cannot be read: {error.strerror or error}') from error
    counts = {'counts': [len(size)], 'unlabelled': [0]}
    return {'values': [], 'left': {}, 'endings': {}, **counts}, {'offset': offset, 'size': size}
