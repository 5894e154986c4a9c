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

from big_vit.data import files
from big_vit.data.sources import sidecars
from big_vit.errors import UserError, failure_at

_HEAD, _FOOT = 12, 4
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
    crc ^= 0xFFFFFFFF
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


def indexed(shards: list[files.Place]) -> dict[str, np.ndarray]:
    """Index the records of some files; the index is built once and memory-mapped from then on.

    Returns:
      {'shard': uint32, 'offset': uint64, 'size': uint32}, arrays [records].

    Raises:
      UserError: a file is damaged; names the byte.
    """

    def build() -> dict[str, np.ndarray]:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            offsets, sizes = zip(*pool.map(_records, shards), strict=True)
        numbers = np.arange(len(shards), dtype=np.uint32)
        return {
            'shard': np.repeat(numbers, [len(part) for part in offsets]),
            'offset': np.concatenate(offsets),
            'size': np.concatenate(sizes),
        }

    return files.kept_arrays('tfrecord', files.fingerprint(shards), build)


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
