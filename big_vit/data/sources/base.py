"""What a source is, and what can be done with any of them: cut, join, choose classes, relabel."""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int64

from big_vit.data import order
from big_vit.errors import UserError

# What an example is made of, under the names of its parts: arrays [B, ...], or lists of B where
# their shapes differ. Encoded images, videos and sounds are `bytes`.
Columns = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A split of a dataset, readable at random.

    Attributes:
      name: of the dataset, for messages.
      split: as the user wrote it.
      length: how many examples.
      num_classes: labels lie in [0, num_classes).
      image_shape: (height, width, channels), or None when it varies.
      load: int64 [B] indices in [0, length) -> columns. One of them is 'image' (or 'video',
        'audio', 'text'): an array [B, H, W, C], or a list of B arrays [H, W, C] or of B encoded
        files. 'label' is int32 [B], or a list of B int arrays where an example has several.
        Threads may call it at the same time.
      in_memory: `load` costs about as much as a copy (or is one vectorised computation), so
        whole batches are loaded at once instead of a few rows at a time in threads.
      channels: that encoded images are decoded to; 0 is as in the file.
      class_names: of the classes in order, where they have names.
      labels: gives the labels of all examples, int32 [length], without reading an image; None
        where that is not possible.
      where: index -> where that example lies (file, or shard and offset), for messages.
    """

    name: str
    split: str
    length: int
    num_classes: int
    image_shape: tuple[int, int, int] | None
    load: Callable[[np.ndarray], Columns]
    in_memory: bool
    channels: int = 3
    class_names: tuple[str, ...] | None = None
    labels: Callable[[], np.ndarray] | None = None
    where: Callable[[int], str] | None = None

    def place(self, index: int) -> str:
        """Where example `index` lies, for messages."""
        if self.where is not None:
            return self.where(int(index))
        return f'example {index} of {self.split!r} of {self.name}'


Range = tuple[str, int, int]

_RANGE = re.compile(r'\s*([\w.-]+)\s*(?:\[\s*(.*?)\s*\])?\s*')
_BOUNDS = re.compile(r'(-?\d+%?)?\s*:\s*(-?\d+%?)?')
_FOLD = re.compile(r'fold\s*(!?=)\s*(\d+)\s*/\s*(\d+)')


def parse_split(text: str, sizes: dict[str, int], key: str) -> list[Range]:
    """Reads 'train', 'train[:90%]', 'train[1000:2000]+test', as TensorFlow Datasets does.

    Percentages round to the nearest example, negative bounds count from the end. For k-fold
    validation, 'train[fold=2/5]' is the third of five equal parts and 'train[fold!=2/5]' the
    rest.

    Args:
      text: the split as the user wrote it.
      sizes: examples in each split that the dataset has.
      key: prefix of the config key, such as 'data'.

    Returns:
      (name, start, stop) of each range, with 0 <= start < stop <= sizes[name].

    Raises:
      UserError: it cannot be read, no such split, out of range, empty, or an example comes twice.
    """
    ranges = [part for piece in text.split('+') for part in _parse_range(piece, text, sizes, key)]
    for i, (name, start, stop) in enumerate(ranges):
        for other, first, last in ranges[:i]:
            if name == other and start < last and first < stop:
                raise UserError(
                    f'{key}.split: {text!r} holds examples of {name} twice: '
                    'make the ranges disjoint'
                )
    return ranges


def split_name(piece: str) -> str:
    """The split that a range such as 'train[:90%]' is of."""
    return piece.partition('[')[0].strip()


def _parse_range(piece: str, text: str, sizes: dict[str, int], key: str) -> list[Range]:
    key = f'{key}.split'
    valid = ', '.join(sorted(sizes))
    match = _RANGE.fullmatch(piece)
    inside = match and match[2]
    bounds = _BOUNDS.fullmatch(inside) if inside else None
    fold = _FOLD.fullmatch(inside) if inside else None
    if not match or (inside is not None and not bounds and not fold):
        raise UserError(
            f'{key}: cannot read {text!r}: write ranges such as train, train[:90%], '
            f'train[1000:2000] or train[fold=0/5], joined by + (splits here: {valid})'
        )
    name = match[1]
    if name not in sizes:
        raise UserError(f'{key}: there is no split {name!r}, only {valid}')
    size = sizes[name]
    if fold:
        which, count = int(fold[2]), int(fold[3])
        if not 0 <= which < count <= size:
            raise UserError(
                f'{key}: {piece.strip()!r}: folds of {name} go from 0/k to (k-1)/k, with k from 1 '
                f'to its {size} examples'
            )
        start, stop = which * size // count, (which + 1) * size // count
        found = [(start, stop)] if fold[1] == '=' else [(0, start), (stop, size)]
    else:

        def bound(word: str | None, default: int) -> int:
            if word is None:
                return default
            percent = word.endswith('%')
            value = int(word.rstrip('%'))
            if abs(value) > (100 if percent else size):
                raise UserError(
                    f'{key}: {word} in {piece.strip()!r} is beyond the {size} examples of {name}'
                )
            if percent:
                value = round(value * size / 100)
            return value + size if word.startswith('-') else value

        found = [(bound(bounds[1], 0), bound(bounds[2], size)) if bounds else (0, size)]
    found = [(start, stop) for start, stop in found if start < stop]
    if not found:
        raise UserError(
            f'{key}: {piece.strip()!r} holds no example (of the {size} in {name}): '
            'write a wider range'
        )
    return [(name, start, stop) for start, stop in found]


def select(source: Source, length: int, position: Callable[[np.ndarray], np.ndarray]) -> Source:
    """The source whose example i is example `position(i)` of another; indices are int64 [B]."""
    labels = source.labels
    return replace(
        source,
        length=length,
        load=lambda indices: source.load(position(np.asarray(indices, np.int64))),
        labels=None if labels is None else lambda: labels()[position(np.arange(length))],
        where=lambda index: source.place(int(position(np.array([index], np.int64))[0])),
    )


def concatenate(sources: Sequence[Source], name: str, split: str) -> Source:
    """One source after the other; they must agree in what an example is made of."""
    if len(sources) == 1:
        return replace(sources[0], name=name, split=split)
    starts = np.concatenate([[0], np.cumsum([source.length for source in sources])])
    shapes = {source.image_shape for source in sources}

    def load(indices: np.ndarray) -> Columns:
        indices = np.asarray(indices, np.int64)
        which = np.searchsorted(starts, indices, side='right') - 1
        if (which == which[0]).all():
            return sources[which[0]].load(indices - starts[which[0]])
        parts = {k: np.flatnonzero(which == k) for k in np.unique(which).tolist()}
        loaded = {k: sources[k].load(indices[rows] - starts[k]) for k, rows in parts.items()}
        common = set.intersection(*(set(columns) for columns in loaded.values()))
        return {
            column: _interleave([(rows, loaded[k][column]) for k, rows in parts.items()])
            for column in sorted(common)
        }

    def where(index: int) -> str:
        k = int(np.searchsorted(starts, index, side='right')) - 1
        return sources[k].place(index - int(starts[k]))

    every = [source.labels for source in sources]
    names = {source.class_names for source in sources}
    return Source(
        name=name,
        split=split,
        length=int(starts[-1]),
        num_classes=max(source.num_classes for source in sources),
        image_shape=shapes.pop() if len(shapes) == 1 else None,
        load=load,
        in_memory=all(source.in_memory for source in sources),
        channels=sources[0].channels,
        class_names=names.pop() if len(names) == 1 else None,
        labels=None
        if any(labels is None for labels in every)
        else lambda: np.concatenate([labels() for labels in every if labels is not None]),
        where=where,
    )


def _interleave(parts: list[tuple[np.ndarray, Any]]) -> Any:
    """The rows of several columns put to their places in one."""
    total = sum(len(rows) for rows, _ in parts)
    first = parts[0][1]
    shapes = {(v.shape[1:], v.dtype) if isinstance(v, np.ndarray) else None for _, v in parts}
    if len(shapes) == 1 and None not in shapes:
        array = np.empty((total, *first.shape[1:]), first.dtype)
        for rows, values in parts:
            array[rows] = values
        return array
    every: list[Any] = [None] * total
    for rows, values in parts:
        for row, value in zip(rows.tolist(), values, strict=True):
            every[row] = value
    return every


def cut(
    name: str,
    splits: Collection[str],
    open_split: Callable[[str], Source],
    split: str,
    key: str,
    *,
    by_class: bool = False,
) -> Source:
    """The ranges of `split`, from a function that opens whole splits.

    Args:
      name: of the dataset.
      splits: names of those that there are; only what `split` mentions is opened.
      open_split: gives a whole split by its name.
      split: as the user wrote it, see `parse_split`.
      key: prefix of the config keys in messages.
      by_class: the files lie sorted by class. A part of a split is then a part of a fixed
        random order of it, so that `train[:10%]` has examples of all classes.

    Raises:
      UserError: as `parse_split`.
    """
    mentioned = [match[1] for piece in split.split('+') if (match := _RANGE.fullmatch(piece))]
    whole = {part: open_split(part) for part in dict.fromkeys(mentioned) if part in splits}
    sizes = {part: whole[part].length if part in whole else 0 for part in splits}
    parts = []
    for part, start, stop in parse_split(split, sizes, key):
        source, size = whole[part], sizes[part]
        if stop - start == size:
            parts.append(source)
        elif by_class:
            parts.append(select(source, stop - start, _Mixed(start, size)))
        else:
            parts.append(select(source, stop - start, _Shifted(start)))
    return concatenate(parts, name, split)


@dataclass(frozen=True)
class _Shifted:
    start: int

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        return indices + self.start


@dataclass(frozen=True)
class _Mixed:
    start: int
    length: int

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        return order.shuffled(indices + self.start, length=self.length, seed=0, epoch=0)


def _all_labels(source: Source, key: str) -> np.ndarray:
    if source.labels is None:
        raise UserError(f'{key}: the labels of {source.name} cannot be listed')
    return source.labels()


def subset(source: Source, classes: Sequence[str | int], key: str) -> Source:
    """The examples of some classes, which become classes 0, 1, ... in the order given.

    Args:
      classes: names, or numbers.
      key: of the config, for messages, such as 'data.classes'.

    Raises:
      UserError: no such class, one given twice, or no example is left.
    """
    names = source.class_names
    wanted = []
    for choice in classes:
        if isinstance(choice, str) and names is not None and choice in names:
            wanted.append(names.index(choice))
        elif str(choice).isdigit() and int(choice) < source.num_classes:
            wanted.append(int(choice))
        else:
            known = ', '.join(names[:12]) if names else f'0 to {source.num_classes - 1}'
            raise UserError(f'{key}: {source.name} has no class {choice!r}; it has {known}')
    if len(set(wanted)) != len(wanted):
        raise UserError(f'{key}: a class is named twice in {tuple(classes)!r}')
    table = np.full(source.num_classes, -1, np.int32)
    table[wanted] = np.arange(len(wanted))
    kept = tuple(names[i] for i in wanted) if names else None
    return _renumbered(source, table, len(wanted), kept, key)


def relabel(source: Source, mapping: dict[str, Any], key: str) -> Source:
    """Labels replaced by those of `mapping`, whose keys are names (or numbers) of classes.

    Classes that map to None are left out, with their examples.

    Raises:
      UserError: a class of the source is not in the mapping, or maps to no whole number.
    """
    names = source.class_names or tuple(map(str, range(source.num_classes)))
    missing = [n for i, n in enumerate(names) if n not in mapping and str(i) not in mapping]
    if missing:
        raise UserError(
            f'{key}: says nothing of class {missing[0]!r} of {source.name}'
            f' (nor of {len(missing) - 1} others): give each class a number, or null to drop it'
        )
    targets = [mapping.get(n, mapping.get(str(i))) for i, n in enumerate(names)]
    for name, target in zip(names, targets, strict=True):
        valid = target is None or (type(target) is int and 0 <= target < 2**31)
        if not valid:
            raise UserError(
                f'{key}: class {name!r} maps to {target!r}: give a whole number or null'
            )
    table = np.array([-1 if t is None else t for t in targets], np.int32)
    count = int(table.max(initial=-1)) + 1
    kept: list[str] = [''] * count
    for name, target in zip(names, table.tolist(), strict=True):
        if target >= 0:
            kept[target] = f'{kept[target]}, {name}' if kept[target] else name
    return _renumbered(source, table, count, tuple(kept), key)


def _renumbered(
    source: Source, table: np.ndarray, count: int, names: tuple[str, ...] | None, key: str
) -> Source:
    """Labels looked up in `table`; where that says -1, examples are left out."""
    if (table < 0).any():
        found = np.flatnonzero(table[_all_labels(source, key)] >= 0)
        if not found.size:
            raise UserError(f'{key}: no example of {source.name} {source.split} is left')
        source = select(source, len(found), found.astype(np.int64).__getitem__)
    load, labels = source.load, source.labels

    def renumber(columns: Columns) -> Columns:
        label = columns['label']
        if isinstance(label, np.ndarray):
            return {**columns, 'label': table[label]}
        return {**columns, 'label': [table[one] for one in label]}

    return replace(
        source,
        num_classes=count,
        class_names=names,
        load=lambda indices: renumber(load(indices)),
        labels=None if labels is None else lambda: table[labels()],
    )


def declared(
    name: str, split: str, length: int, num_classes: int, image_size: tuple[int, int]
) -> Source:
    """A dataset known by its figures only, with black RGB images: enough to plan a run."""

    def load(indices: Int64[np.ndarray, ' b']) -> Columns:
        shape = (len(indices), *image_size, 3)
        return {'image': np.zeros(shape, np.uint8), 'label': np.zeros(len(indices), np.int32)}

    return Source(name, split, length, num_classes, (*image_size, 3), load, in_memory=True)


def from_arrays(
    name: str, split: str, images: np.ndarray, labels: np.ndarray, num_classes: int, **more: Any
) -> Source:
    """A source over [N, H, W, C] and int32 [N] in memory, or mapped into it from a file."""

    def load(indices: np.ndarray) -> Columns:
        return {'image': images[indices], 'label': labels[indices]}

    height, width, channels = images.shape[1:]
    return Source(
        name=name,
        split=split,
        length=len(images),
        num_classes=num_classes,
        image_shape=(height, width, channels),
        load=load,
        in_memory=True,
        channels=channels,
        labels=lambda: labels,
        **more,
    )
