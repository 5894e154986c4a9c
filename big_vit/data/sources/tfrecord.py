"""TFRecord files, found by an index that is made once; without TensorFlow.

A record is its length (uint64, little-endian), a masked CRC-32C of that, the data, and a
masked CRC-32C of these.
"""

import concurrent.futures
import functools
import struct

import numpy as np

from big_vit.data import files
from big_vit.errors import UserError

_HEAD, _FOOT = 12, 4


@functools.cache
def _table() -> list[int]:
    """Of CRC-32C (Castagnoli), by byte."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


def masked_crc(data: bytes) -> int:
    """The checksum as TFRecord files have it: CRC-32C, rotated by 15 bits, plus a constant."""
    crc, table = 0xFFFFFFFF, _table()
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _records(file: files.Place) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, sizes) of the data of all records; UserError where it is damaged."""
    end = int(file.system.info(file.path)['size'])
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
    """Where each record of some files lies, made once and mapped into memory after that.

    Returns:
      {'shard': uint32, 'offset': uint64, 'size': uint32}, arrays [records].

    Raises:
      UserError: a file is damaged; says at which byte.
    """

    def make() -> dict[str, np.ndarray]:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            every = list(pool.map(_records, shards))
        return {
            'shard': np.repeat(np.arange(len(every), dtype=np.uint32), [len(o) for o, _ in every]),
            'offset': np.concatenate([offsets for offsets, _ in every]),
            'size': np.concatenate([sizes for _, sizes in every]),
        }

    return files.kept_arrays('tfrecord', files.fingerprint(shards), make)
