"""Decoded examples kept in memory."""

import math
import threading
from dataclasses import replace
from typing import Any

import numpy as np

from big_vit.data.decode import Encoded
from big_vit.data.operations import decoded as decoded_images
from big_vit.data.sources.base import Columns, Source

_SAMPLE = 64
_LARGE = 16 << 10  # Bytes of an image.


def estimate_bytes(source: Source) -> int:
    """How much memory the decoded images of a source take, from a sample of its headers.

    Examples that cannot be read count as the others do.
    """
    if source.image_shape:
        return int(np.prod(source.image_shape)) * source.length
    count = min(_SAMPLE, source.length)
    sizes = []
    for index in np.linspace(0, source.length - 1, count).astype(np.int64).tolist():
        try:
            image = source.load(np.array([index]))['image'][0]
        except (OSError, ValueError, KeyError):
            continue
        whole = math.prod(image.shape) if isinstance(image, Encoded) else image.nbytes
        sizes.append(whole)
    return int(np.mean(sizes) * source.length) if sizes else 1 << 62


class _Kept:
    """Examples that were loaded before: of each part either one array, or a list."""

    def __init__(self, length: int, limit_bytes: int):
        self.length, self.left = length, limit_bytes
        self.there = np.zeros(length, bool)
        self.columns: dict[str, Any] = {}
        self.lock = threading.Lock()

    def add(self, indices: np.ndarray, columns: Columns) -> None:
        """Keeps what is not there yet, as long as there is room."""
        with self.lock:
            for row, index in enumerate(indices.tolist()):
                values = {name: column[row] for name, column in columns.items()}
                size = sum(np.asarray(value).nbytes for value in values.values())
                if self.there[index] or size > self.left:
                    continue
                for name, value in values.items():
                    self._put(name, index, value, isinstance(columns[name], np.ndarray))
                self.left -= size
                self.there[index] = True

    def _put(self, name: str, index: int, value: Any, fixed: bool) -> None:
        if name not in self.columns:
            whole = np.asarray(value)
            room = whole.nbytes * self.length
            if fixed and room <= self.left:
                # Pages that nothing is written to take no memory.
                self.columns[name] = np.empty((self.length, *whole.shape), whole.dtype)
            else:
                self.columns[name] = [None] * self.length
        kept = self.columns[name]
        if isinstance(kept, np.ndarray) and kept.shape[1:] != np.shape(value):
            kept = self.columns[name] = [
                kept[i].copy() if self.there[i] else None for i in range(self.length)
            ]
        kept[index] = value

    def take(self, indices: np.ndarray) -> Columns:
        taken = {}
        for name, kept in self.columns.items():
            if isinstance(kept, np.ndarray):
                large = kept.nbytes > _LARGE * self.length
                # A copy of a large image is dearer than the crop that follows.
                taken[name] = [kept[i] for i in indices.tolist()] if large else kept[indices]
            else:
                values = [kept[i] for i in indices.tolist()]
                taken[name] = values if name == 'image' else _joined(values)
        return taken


def _joined(values: list[Any]) -> Any:
    """A column as a source gives it: an array where the values have one shape."""
    try:
        return np.stack([np.asarray(value) for value in values])
    except ValueError:
        return values


def decoded(source: Source, limit_bytes: int) -> Source:
    """A source that keeps its decoded examples in memory once they have been loaded.

    Args:
      source: of images, encoded or not.
      limit_bytes: when so much is kept, the examples that are not are decoded each time.
    """
    kept = _Kept(source.length, limit_bytes)

    def fresh(indices: np.ndarray) -> Columns:
        columns = source.load(indices)
        if 'image' in columns:
            columns = {**columns, 'image': decoded_images(columns['image'])}
        kept.add(indices, columns)
        return columns

    def load(indices: np.ndarray) -> Columns:
        indices = np.asarray(indices, np.int64)
        there = kept.there[indices]
        if there.all():
            return kept.take(indices)
        if not there.any():
            return fresh(indices)
        # A few of each: in the order asked for.
        parts = {True: kept.take(indices[there]), False: fresh(indices[~there])}
        rows = {True: np.flatnonzero(there), False: np.flatnonzero(~there)}
        joined: Columns = {}
        for name in parts[False]:
            every: list[Any] = [None] * len(indices)
            for part, columns in parts.items():
                for row, value in zip(rows[part].tolist(), columns[name], strict=True):
                    every[row] = value
            shapes = {(np.shape(value), np.asarray(value).dtype) for value in every}
            joined[name] = np.stack(every) if len(shapes) == 1 else every
        return joined

    return replace(source, load=load)
