"""ArrayRecord files in stores: each is copied to the local disk in large ranges when it is needed.

The package that reads them opens local files only, and a file cannot be understood without all of
its blocks in order.
"""

import concurrent.futures
from typing import Any

import numpy as np

from big_vit.data import blocks, files
from big_vit.data.recent import Recent
from big_vit.data.sources.base import locate
from big_vit.errors import UserError

# Files that are open; each is on the local disk.
_OPEN = 256
# Of one file so many ranges are read at once.
_AT_ONCE = 16


class Records:
    """The records of remote files whose numbers of records are known.

    Args:
      shards: the files.
      lengths: records of each.
    """

    def __init__(self, shards: list[files.Place], lengths: list[int]):
        self._shards, self._ends = files.stored(shards), np.cumsum(lengths)
        self._reader = Recent(self._opened, _OPEN)

    def _opened(self, shard: int) -> tuple[Any, int]:
        from array_record.python import array_record_module as array_record

        stored = self._shards[shard]
        path = blocks.kept_file(stored, 'whole', '0.array_record', lambda: _whole(stored))
        if path is None:
            raise UserError(
                f'{stored.place}: ArrayRecord files in a store are read by way of the local disk, '
                'which keeps none: make room, or set BIG_VIT_CACHE_GB or BIG_VIT_CACHE'
            )
        options = 'readahead_buffer_size:0'
        reader = array_record.ArrayRecordReader(str(path), options, file_reader_buffer_size=1 << 16)
        return reader, 1

    def read(self, index: int) -> bytes:
        """Read a record; OSError if it is damaged."""
        shard, row = locate(index, self._ends)
        try:
            return self._reader(shard).read([row])[0]
        except (RuntimeError, ValueError, IndexError) as error:
            reason = ' '.join(str(error).split())[:200]
            raise OSError(f'damaged record ({reason})') from error

    def expect(self, indices: np.ndarray, soon: bool = False) -> None:
        """Begin to copy the files of some records; nothing smaller could come `soon`."""
        if not soon:
            for shard in np.unique(np.searchsorted(self._ends, indices, side='right')).tolist():
                blocks.later(self._reader, shard)


def _whole(stored: files.Stored) -> bytes:
    step = blocks.BLOCK_BYTES

    def part(start: int) -> bytes:
        return files.read_range(stored.place, start, min(step, stored.size - start))

    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        return b''.join(pool.map(part, range(0, stored.size, step)))
