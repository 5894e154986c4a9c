"""The syntax of splits: 'train', 'train[:90%]', 'train[1000:2000]+test', 'train[fold=2/5]'."""

import itertools
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import numpy as np

from big_vit.data import order
from big_vit.data.sources.base import Request, Source, concatenate, select
from big_vit.data.sources.classes import with_count
from big_vit.data.sources.known import known_of, meet
from big_vit.errors import UserError

Range = tuple[str, int, int]

_RANGE = re.compile(r'\s*([\w.-]+)\s*(?:\[\s*(.*?)\s*\])?\s*')
_BOUNDS = re.compile(r'(-?\d+%?)?\s*:\s*(-?\d+%?)?')
_FOLD = re.compile(r'fold\s*(!?=)\s*(\d+)\s*/\s*(\d+)')


def parse_split(text: str, sizes: dict[str, int], key: str) -> list[Range]:
    """Parse ranges of splits, in the syntax of TensorFlow Datasets.

    Percentages round to the nearest example, negative bounds count from the end. For k-fold
    validation, 'train[fold=2/5]' is the third of five equal parts and 'train[fold!=2/5]' the
    rest.

    Args:
      text: the split as the user wrote it.
      sizes: number of examples in each split of the dataset.
      key: section of the config, for error messages.

    Returns:
      (name, start, stop) of each range, with 0 <= start < stop <= sizes[name].

    Raises:
      UserError: malformed, no such split, out of range, empty, or overlapping ranges.
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
    """Return the name of the split in a range such as 'train[:90%]'."""
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
    name = _spelled(match[1], sizes)
    if name not in sizes:
        raise UserError(f'{key}: there is no split {name!r}, only {valid}')
    size = sizes[name]
    if fold:
        intervals = _fold_intervals(fold, piece.strip(), name, size, key)
    elif bounds:
        start, stop = (_bound(word, piece.strip(), name, size, key) for word in bounds.groups())
        intervals = [(0 if start is None else start, size if stop is None else stop)]
    else:
        intervals = [(0, size)]
    ranges = [(name, start, stop) for start, stop in intervals if start < stop]
    if not ranges:
        raise UserError(
            f'{key}: {piece.strip()!r} holds no example (of the {size} in {name}): '
            'write a wider range'
        )
    return ranges


def _spelled(name: str, splits: Collection[str]) -> str:
    """Return the split that is called so, in whichever case; `name` if there is none."""
    if name in splits:
        return name
    return next((split for split in splits if split.casefold() == name.casefold()), name)


def _fold_intervals(
    fold: re.Match[str], piece: str, name: str, size: int, key: str
) -> list[tuple[int, int]]:
    which, count = int(fold[2]), int(fold[3])
    if not 0 <= which < count <= size:
        raise UserError(
            f'{key}: {piece!r}: folds of {name} go from 0/k to (k-1)/k, with k from 1 '
            f'to its {size} examples'
        )
    start, stop = which * size // count, (which + 1) * size // count
    return [(start, stop)] if fold[1] == '=' else [(0, start), (stop, size)]


def _bound(word: str | None, piece: str, name: str, size: int, key: str) -> int | None:
    if word is None:
        return None
    percent = word.endswith('%')
    value = int(word.rstrip('%'))
    if abs(value) > (100 if percent else size):
        raise UserError(f'{key}: {word} in {piece!r} is beyond the {size} examples of {name}')
    if percent:
        value = round(value * size / 100)
    return value + size if word.startswith('-') else value


def cut(
    title: str,
    splits: Collection[str],
    open_split: Callable[[str], Source],
    request: Request,
    *,
    by_class: bool = False,
) -> Source:
    """Open the splits that a request mentions and take its ranges from them.

    Args:
      title: name of the dataset.
      splits: names of all splits; only those that the request mentions are opened.
      open_split: opens a complete split by its name.
      request: the ranges, and the section of the config for error messages.
      by_class: whether the examples of a split are sorted by class. A range is then a range of a
        fixed random order, so that `train[:10%]` has examples of all classes.

    Raises:
      UserError: as `parse_split`; two splits whose names differ by case alone; `num_classes` is
        less than there are.
    """
    for one, other in itertools.pairwise(sorted(splits, key=str.casefold)):
        if one.casefold() == other.casefold():
            raise UserError(
                f'{request.key}.split: {title} has splits {one} and {other}, and to read one of '
                'them would leave out the other: give both one name'
            )
    pieces = request.split.split('+')
    matches = [match for piece in pieces if (match := _RANGE.fullmatch(piece))]
    mentioned = [_spelled(match[1], splits) for match in matches]
    opened = {name: open_split(name) for name in dict.fromkeys(mentioned) if name in splits}
    sizes = {name: opened[name].length if name in opened else 0 for name in splits}
    parts = []
    for name, start, stop in parse_split(request.split, sizes, request.key):
        source, size = opened[name], sizes[name]
        if stop - start == size:
            parts.append(source)
        elif by_class:
            parts.append(select(source, stop - start, _Shuffled(start, size)))
        else:
            part = select(source, stop - start, _Shifted(start))
            bounds = source.shard_bounds
            lengths = None if bounds is None else np.diff(np.clip(bounds, start, stop))
            parts.append(replace(part, shard_lengths=lengths, shards=source.shards))
    # Without a split `train`, each may have classes of its own.
    known = known_of(max(parts, key=lambda part: part.num_classes), title)
    parts = [meet(part, known, request.key)[0] for part in parts]
    return with_count(concatenate(parts, title, request.split), request.num_classes, request.key)


def training_split(splits: Collection[str]) -> str | None:
    """Return the split whose classes are those of all: `train`, or the first that begins so."""
    training = [name for name in splits if name.casefold().startswith('train')]
    return min(training, key=lambda name: (name != 'train', name), default=None)


@dataclass(frozen=True)
class _Shifted:
    start: int

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        return indices + self.start


@dataclass(frozen=True)
class _Shuffled:
    start: int
    length: int

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        return order.shuffled(indices + self.start, length=self.length, seed=0, epoch=0)
