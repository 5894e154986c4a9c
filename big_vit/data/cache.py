"""A cache of decoded examples in memory."""

import threading
from dataclasses import replace
from typing import Any

import numpy as np

from big_vit.data.decode import DecodeError, Encoded
from big_vit.data.sources.base import Columns, Source
from big_vit.data.transforms.operations import stacked

_SAMPLE = 64
_LARGE = 16 << 10  # Bytes of an image.
# Overhead of an object in a list.
_OBJECT_BYTES = 128


def estimate_bytes(source: Source) -> int:
    """Estimate the memory that the decoded images of a source take.

    Uses one example if all have one shape, else the headers of at most 64, evenly spaced. Those
    that cannot be read count like the others; if none can, the estimate is 2^62.
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
                # Channels and depth may depend on the file, and then only its pixels tell.
                sizes.append(height * width * channels or image.pixels().nbytes)
            else:
                sizes.append(image.nbytes)
        except (OSError, ValueError, KeyError):
            continue
    return int(np.mean(sizes) * source.length) if sizes else 1 << 62


def decoded(source: Source, limit_bytes: int) -> Source:
    """Return a source that caches its decoded examples in memory once they have been loaded.

    `in_memory` is unchanged: it is read when a run starts, with an empty cache, and
    would make one thread decode the first epoch. `load.is_filled` tells when all are cached.
    A damaged image passes unchanged and is not cached, so that the caller that decodes it decides.
    Cached arrays are read-only.

    Args:
      source: of images, encoded or not.
      limit_bytes: size of the cache, besides 4 bytes an example; the rest is decoded each time.
    """
    return replace(source, load=_Decoded(source, limit_bytes))


class _Decoded:
    """Loads examples, from the cache if they were loaded before.

    An example has the same place in all columns. A column is one array as long as its values have
    one shape, else a list. Values are written before their place in `_places`, so that
    reading needs no lock.
    """

    def __init__(self, source: Source, limit_bytes: int):
        self._source, self._left = source, limit_bytes
        self._places = np.full(source.length, -1, np.int32)
        self._count = 0
        self._columns: dict[str, Any] = {}
        # Columns that the source returns as lists, for example texts or several labels.
        self._lists: frozenset[str] = frozenset()
        self._lock = threading.Lock()

    @property
    def is_filled(self) -> bool:
        """Whether all examples are cached."""
        return self._count == self._source.length

    def __call__(self, indices: np.ndarray) -> Columns:
        indices = np.asarray(indices, np.int64)
        places = self._places[indices]
        if places.min(initial=0) >= 0:
            return {name: self._take(name, places) for name in self._columns}
        is_cached = places >= 0
        if not is_cached.any():
            return self._load(indices)
        result: Columns = {}
        for name, column in self._load(indices[~is_cached]).items():
            values: list[Any] = [None] * len(indices)
            cached = self._take(name, places[is_cached])
            for rows, part in ((~is_cached, column), (is_cached, cached)):
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
            # Copying a large image costs more than the crop that follows.
            view = _read_only(kept.view())
            return [view[place] for place in places.tolist()]
        taken = kept[places]
        return list(taken) if as_list else taken

    def _load(self, indices: np.ndarray) -> Columns:
        columns = self._source.load(indices)
        images = columns.get('image')
        is_intact = np.ones(len(indices), bool)
        if isinstance(images, list):
            images = list(images)
            for row, image in enumerate(images):
                try:
                    if isinstance(image, bytes):
                        image = Encoded(image, self._source.channels)
                    images[row] = image.pixels() if isinstance(image, Encoded) else image
                except DecodeError:
                    is_intact[row] = False
            columns = {**columns, 'image': images}
        with self._lock:
            if not self._columns:
                self._lists = frozenset(n for n, c in columns.items() if isinstance(c, list))
            for row in np.flatnonzero(is_intact).tolist():
                self._keep(int(indices[row]), {name: c[row] for name, c in columns.items()})
        return {**columns, 'image': stacked(images)} if isinstance(images, list) else columns

    def _keep(self, index: int, values: dict[str, Any]) -> None:
        """Cache an example unless it is cached already or there is no room; needs the lock."""
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
            # Untouched pages take no memory.
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
            # A view would keep its complete batch alive.
            value = _read_only(value if value.flags.owndata else value.copy())
        kept.append(value)


def _joined(values: list[Any]) -> Any:
    """Stack values of one shape and type into an array; return others as a list."""
    return stacked([np.asarray(value) for value in values])


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array
