"""Decoded examples kept in memory."""

import threading
from dataclasses import replace
from typing import Any

import numpy as np

from big_vit.data.decode import DecodeError, Encoded
from big_vit.data.sources.base import Columns, Source
from big_vit.data.transforms.operations import stacked

_SAMPLE = 64
_LARGE = 16 << 10  # Bytes of an image.
# Of an object in a list, beside its values.
_OBJECT_BYTES = 128


def estimate_bytes(source: Source) -> int:
    """How much memory the decoded images of a source take.

    From one example where all have one shape, else from the headers of at most 64, evenly spaced.
    Those that cannot be read count as the others do; where none can, the answer is 2^62.
    """
    count = 1 if source.image_shape else min(_SAMPLE, source.length)
    sizes = []
    for index in np.linspace(0, source.length - 1, count).astype(np.int64).tolist():
        try:
            image = source.load(np.array([index]))['image'][0]
            if isinstance(image, bytes):
                image = Encoded(image, source.channels)
            if isinstance(image, Encoded):
                height, width, channels = image.shape
                # Channels and depth may be for the file to say, and then only its pixels do.
                sizes.append(height * width * channels or image.pixels().nbytes)
            else:
                sizes.append(image.nbytes)
        except (OSError, ValueError, KeyError):
            continue
    return int(np.mean(sizes) * source.length) if sizes else 1 << 62


def decoded(source: Source, limit_bytes: int) -> Source:
    """A source that keeps its decoded examples in memory once they have been loaded.

    `in_memory` stays as it is: it is looked at when a run starts, with nothing kept yet, and
    would have the first epoch decoded in one thread. `load.is_filled` says when all are kept.
    A damaged image comes through as it is and is not kept, so that who decodes it decides.
    Arrays that are kept can be read but not written to.

    Args:
      source: of images, encoded or not.
      limit_bytes: of what is kept, beside 4 bytes an example; the rest is decoded each time.
    """
    return replace(source, load=_Decoded(source, limit_bytes))


class _Decoded:
    """Loads examples, from memory those that were loaded before.

    An example has the same place in each column. A column is one array as long as its values have
    one shape, else a list. Values are written before `_places` says where they are, so that
    reading needs no lock.
    """

    def __init__(self, source: Source, limit_bytes: int):
        self._source, self._left = source, limit_bytes
        self._places = np.full(source.length, -1, np.int32)
        self._count = 0
        self._columns: dict[str, Any] = {}
        # Those that the source gives as lists: of texts, say, or of several labels.
        self._lists: frozenset[str] = frozenset()
        self._lock = threading.Lock()

    @property
    def is_filled(self) -> bool:
        """Whether every example is kept."""
        return self._count == self._source.length

    def __call__(self, indices: np.ndarray) -> Columns:
        indices = np.asarray(indices, np.int64)
        places = self._places[indices]
        if places.min(initial=0) >= 0:
            return {name: self._take(name, places) for name in self._columns}
        there = places >= 0
        if not there.any():
            return self._load(indices)
        result: Columns = {}
        for name, column in self._load(indices[~there]).items():
            values: list[Any] = [None] * len(indices)
            kept = self._take(name, places[there])
            for rows, part in ((~there, column), (there, kept)):
                for row, value in zip(np.flatnonzero(rows).tolist(), part, strict=True):
                    values[row] = value
            result[name] = values if isinstance(column, list) else _joined(values)
        return result

    def _take(self, name: str, places: np.ndarray) -> Any:
        kept = self._columns[name]
        as_list = name in self._lists and name != 'image'
        if isinstance(kept, list):
            values = [kept[place] for place in places.tolist()]
            return values if as_list or name == 'image' else _joined(values)
        if name == 'image' and kept[0].nbytes > _LARGE:
            # A copy of a large image is dearer than the crop that follows.
            view = _read_only(kept.view())
            return [view[place] for place in places.tolist()]
        taken = kept[places]
        return list(taken) if as_list else taken

    def _load(self, indices: np.ndarray) -> Columns:
        columns = self._source.load(indices)
        images = columns.get('image')
        whole = np.ones(len(indices), bool)
        if isinstance(images, list):
            images = list(images)
            for row, image in enumerate(images):
                try:
                    if isinstance(image, bytes):
                        image = Encoded(image, self._source.channels)
                    images[row] = image.pixels() if isinstance(image, Encoded) else image
                except DecodeError:
                    whole[row] = False
            columns = {**columns, 'image': images}
        with self._lock:
            if not self._columns:
                self._lists = frozenset(n for n, c in columns.items() if isinstance(c, list))
            for row in np.flatnonzero(whole).tolist():
                self._keep(int(indices[row]), {name: c[row] for name, c in columns.items()})
        return {**columns, 'image': stacked(images)} if isinstance(images, list) else columns

    def _keep(self, index: int, values: dict[str, Any]) -> None:
        """Keeps an example unless it is there or there is no room; under the lock."""
        size = sum(np.asarray(value).nbytes for value in values.values())
        size += _OBJECT_BYTES * sum(isinstance(c, list) for c in self._columns.values())
        if self._places[index] >= 0 or size > self._left:
            return
        for name, value in values.items():
            self._put(name, value)
        self._left -= size
        self._places[index] = self._count
        self._count += 1

    def _put(self, name: str, value: Any) -> None:
        is_array = isinstance(value, np.ndarray | np.generic)
        if name not in self._columns:
            # Pages that nothing is written to take no memory.
            rows = min(self._source.length, self._left // max(1, value.nbytes)) if is_array else 0
            self._columns[name] = np.empty((rows, *value.shape), value.dtype) if is_array else []
        kept = self._columns[name]
        if isinstance(kept, np.ndarray):
            if is_array and kept.shape[1:] == value.shape and kept.dtype == value.dtype:
                kept[self._count] = value
                return
            kept = list(_read_only(kept[: self._count]))
            self._left -= _OBJECT_BYTES * self._count
            self._columns[name] = kept
        if isinstance(value, np.ndarray):
            # A view would keep all of the batch that it is a row of.
            value = _read_only(value if value.flags.owndata else value.copy())
        kept.append(value)


def _joined(values: list[Any]) -> Any:
    """An array where the values have one shape and type, else the list."""
    return stacked([np.asarray(value) for value in values])


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array
