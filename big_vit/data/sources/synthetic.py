"""Shared parts of generated sources: groups of examples that balance each other, draws and noise.

Each of them (`orbit`, `tones`, `phrases`, `questions`, `captions`) is a task whose answer lies in
time, in the order of words, or in two streams at once. A model that does not look there is at
chance; each function states what exactly is at chance, and why. Everything is a function of
(seed, split, index).
"""

import itertools
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8, UInt64

from big_vit.data import order
from big_vit.data.sources.base import Columns, Request, Source
from big_vit.data.sources.splits import cut
from big_vit.errors import UserError

TRAIN, TEST = 1_000_000, 2_000
SPLITS = {'train': 0, 'test': 1, 'unseen': 2}
# Pixels of one chunk, so that what is computed on them stays in the caches.
CHUNK_BYTES = 1 << 18
# The streams of the noise follow all others of the same key.
_NOISE_STREAM = 64


def noise(keys: UInt64[np.ndarray, ' b'], count: int) -> UInt8[np.ndarray, 'b {count}']:
    """Draw `count` random bytes for each key."""
    words = -(-count // 6)
    stream = np.arange(_NOISE_STREAM, _NOISE_STREAM + words, dtype=np.uint64)
    # Six bytes of each number: a hash for every byte would be most of the work.
    drawn = (order.uniform(keys[:, None], stream) * 2.0**48).astype('<i8').view(np.uint8)
    drawn = drawn.reshape(len(keys), words, 8)[:, :, :6]
    return drawn.reshape(len(keys), words * 6)[:, :count]


def draws(keys: UInt64[np.ndarray, ' b'], first: int, count: int) -> np.ndarray:
    """Draw from streams `first`, `first` + 1, ...: float64 [B, count] in [0, 1)."""
    return order.uniform(keys[:, None], np.arange(first, first + count, dtype=np.uint64))


def check_size(request: Request, least: tuple[int, int]) -> tuple[int, int]:
    """Return the image size; UserError if it is less than `least`."""
    height, width = request.image_size
    if height < least[0] or width < least[1]:
        raise UserError(
            f'{request.key}.image_size is {height}x{width}: set {least[0]}x{least[1]} or more'
        )
    return height, width


def synthetic_source(
    name: str,
    request: Request,
    *,
    group: int,
    class_names: tuple[str, ...],
    image_shape: tuple[int, int, int] | None,
    chunk: int,
    load: Callable[[int, np.ndarray], Columns],
    shown: dict[str, tuple[int, int]] | None = None,
) -> Source:
    """Open a source made of groups of examples that balance each other.

    Args:
      name: of the source.
      request: the examples to generate.
      group: number of examples in a group; example i belongs to group i // group.
      class_names: in order; example i is of class i % len(class_names).
      image_shape: (height, width, channels) of the images that the model sees, or None.
      chunk: number of examples computed at once.
      load: maps (number of the split, indices int64 [B]) to columns without the label.
      shown: splits with examples of only some classes, as (the first class, their number).
    """
    shown = shown or {}
    sizes = {'train': TRAIN // group * group, 'test': TEST // group * group}
    sizes |= {split: sizes['test'] for split in shown if split != 'train'}

    def open_split(split: str) -> Source:
        first, classes = shown.get(split, (0, len(class_names)))

        def load_chunks(indices: np.ndarray) -> Columns:
            indices = np.asarray(indices, np.int64)
            parts = [
                load(SPLITS[split], indices[start : start + chunk])
                for start in range(0, max(1, len(indices)), chunk)
            ]
            columns = {column: _join([part[column] for part in parts]) for column in parts[0]}
            return {**columns, 'label': (first + indices % classes).astype(np.int32)}

        return Source(
            name=name,
            split=split,
            length=sizes[split],
            num_classes=len(class_names),
            image_shape=image_shape,
            load=load_chunks,
            in_memory=True,
            channels=image_shape[2] if image_shape else 3,
            class_names=class_names,
            labels=lambda: (first + np.arange(sizes[split]) % classes).astype(np.int32),
        )

    return cut(name, sizes, open_split, request)


def _join(parts: list) -> np.ndarray | list:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    return list(itertools.chain.from_iterable(parts))
