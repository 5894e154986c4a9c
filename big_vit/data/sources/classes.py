"""Numbers and names of classes: from the labels of a dataset, by a map, or a chosen few.

A label is a number or a name. Numbers may be written as text ('2', '2.0'), and names are compared
in Unicode's normal form C, without spaces and marks that nobody sees at their ends.
"""

import difflib
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from big_vit.data import moves
from big_vit.data.sources.base import Annotation, Columns, Request, Source, select
from big_vit.errors import UserError

# Labels are int32.
MAX_CLASSES = 1 << 31
# Numbers that leave more classes than these empty, nine of ten, are dates or keys, not classes.
_MOST_EMPTY = 1000
# Names of digits may be longer; Python refuses to read thousands of them.
# Spaces, marks of direction, byte order marks and the like.
_UNSEEN = r'[\s\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]+'
_ENDS = re.compile(rf'\A{_UNSEEN}|{_UNSEEN}\Z')
# How programs write that there is no label.
_MISSING = frozenset(('nan', 'na', 'n/a', '<na>', 'null', 'none', 'nat'))
_NUMBER = re.compile(r'[+-]?[0-9]{1,18}(\.[0-9]{0,30})?([eE][+-]?[0-9]{1,3})?')


class Classes(NamedTuple):
    """The classes of a dataset.

    Attributes:
      num_classes: their number.
      names: in order; None if labels are numbers.
    """

    num_classes: int
    names: tuple[str, ...] | None

    def numbers(
        self, values: Iterable[Any], place: object, split: str, train: str, key: str
    ) -> np.ndarray:
        """Return the class number of each label value of a split, int32.

        Args:
          place: the dataset or file, for messages.
          split: the split that holds the values.
          train: the split that the classes are of.
          key: section of the config.

        Raises:
          UserError: a value is of no class.
        """
        values = list(values)
        if self.names is None:
            numbers = [whole_number(value) for value in values]
            for value, number in zip(values, numbers, strict=True):
                if number is None or not 0 <= number < self.num_classes:
                    least = 0 if number is None else number + 1
                    advice = f'set {key}.num_classes={least}, or ' if least > 0 else ''
                    raise UserError(
                        f'{place}: label {value!r} of {split} is not one of the '
                        f'{self.num_classes} classes of {train}: {advice}see whether the splits '
                        'belong together'
                    )
            return np.array(numbers, np.int32)
        order = {name: number for number, name in reversed(list(enumerate(self.names)))}
        names = [label_name(value) for value in values]
        unknown = [name for name in names if name not in order]
        if unknown:
            raise UserError(
                f'{place}: {split} has classes that {train} has not '
                f'({unknown_text(unknown, self.names)}): a model cannot be scored on what it '
                'never saw'
            )
        return np.array([order[name] for name in names], np.int32)


# --- Labels as numbers and as names ----------------------------------------------------


def whole_number(value: Any) -> int | None:
    """Return the number that a label is, or that its text says, such as '2' or '2.0'; else None."""
    if isinstance(value, str):
        value = _seen(value)
        if not _NUMBER.fullmatch(value):
            return None
        # Not by way of a float, which has 53 bits.
        value = int(value) if value.lstrip('+-').isdigit() else float(value)
    if isinstance(value, float | np.floating):
        return int(value) if float(value).is_integer() else None
    return int(value) if isinstance(value, int | np.integer | np.bool_) else None


def label_name(value: Any) -> str:
    """Return a label as the name of a class: in normal form C, whichever the file system uses."""
    if not isinstance(value, str):
        number = whole_number(value)
        value = str(value if number is None else number)
    return unicodedata.normalize('NFC', _seen(value))


def _seen(text: str) -> str:
    """Return a text without what nobody sees at its ends; one of nothing else stays."""
    return text if text.isascii() and text.isalnum() else _ENDS.sub('', text) or text


def names_as_numbers(names: Sequence[str]) -> list[int | None] | None:
    """Return the numbers that names say, None for classes without one.

    Returns:
      None if a name says none, or two say the same.
    """
    numbers = [whole_number(name) if name else None for name in names]
    said = [number for number in numbers if number is not None]
    complete = len(said) == sum(map(bool, names)) == len(set(said)) > 0
    return numbers if complete else None


def choose(choice: Any, names: Sequence[str] | None, count: int, holder: str, key: str) -> int:
    """Return the number of the class that a config names, by its name or number.

    Args:
      holder: whose classes they are, for messages.

    Raises:
      UserError: there is no such class.
    """
    if names is not None and label_name(choice) in names:
        return list(names).index(label_name(choice))
    numbers = names_as_numbers(names or ()) or list(range(count))
    number = whole_number(choice)
    if number is None or number not in numbers:
        known = shown(filter(None, names), 12) if names else f'0 to {count - 1}'
        raise UserError(f'{key}: {holder} has no class {choice!r}; it has {known}')
    return numbers.index(number)


def shown(names: Iterable[str], most: int = 6) -> str:
    """List names in one line, those with odd characters in quotes."""
    texts = [
        name if name.isprintable() and name == name.strip() and ',' not in name else repr(name)
        for name in names
    ]
    more = f', and {len(texts) - most} more' if len(texts) > most else ''
    return ', '.join(texts[:most]) + more


def unknown_text(unknown: Sequence[str], known: Collection[str]) -> str:
    """List unknown names, each with the known one that is most like it, if one is."""
    folded = {name.casefold(): name for name in known if name}
    texts = []
    for name in unknown[:5]:
        near = difflib.get_close_matches(name.casefold(), folded, 1)
        texts.append(f'{name!r}, nearest {folded[near[0]]!r}' if near else repr(name))
    more = f', and {len(unknown) - 5} more' if len(unknown) > 5 else ''
    none = '' if any('nearest' in text for text in texts) else f'; it has {shown(folded.values())}'
    return ', '.join(texts) + more + none


# --- The classes of a dataset ----------------------------------------------------------


def named_classes(names: Iterable[str]) -> Classes:
    """Number the classes of a dataset that lists their names."""
    normal = tuple(map(label_name, names))
    return Classes(len(normal), normal)


def sorted_classes(names: Iterable[str]) -> Classes:
    """Number the classes that names occur of, in the order of the names as they are written."""
    return named_classes(dict.fromkeys(label_name(name) for name in sorted(names)))


def infer_classes(values: Iterable[Any], request: Request, title: object) -> Classes:
    """Infer classes from label values, which are numbers or names.

    Args:
      values: all labels that occur, in any order. Numbers beside names are names.
      request: may set `num_classes`.
      title: the dataset, for error messages.

    Raises:
      UserError: the labels are neither, negative, or more than `num_classes`.
    """
    different = dict.fromkeys(values)
    numbers = {value: whole_number(value) for value in different}
    known = [number for number in numbers.values() if number is not None]
    if len(known) == len(different):
        return numbered_classes(known, request, title)
    odd = [
        value
        for value, number in numbers.items()
        if not isinstance(value, str) and (number is None or isinstance(value, bool))
    ]
    if odd:
        raise UserError(f'{title}: labels must be numbers or names, not {odd[0]!r}')
    texts = [value for value, number in numbers.items() if number is None]
    absent = [text for text in texts if not text.strip()]
    if known and all(text.casefold() in _MISSING for text in texts):
        absent += texts
    if absent:
        raise UserError(
            f'{title}: label {absent[0]!r} says that there is none: leave out what has no label'
        )
    fractions = [text for text in texts if _NUMBER.fullmatch(text)]
    if len(fractions) + len(known) == len(different):
        raise UserError(
            f'{title}: label {fractions[0]!r} is a fraction: number the classes from 0, or give '
            'them names that are no numbers'
        )
    return sorted_classes(v if isinstance(v, str) else label_name(v) for v in different)


def check_lists(values: Sequence[Any], codes: np.ndarray, ends: np.ndarray, title: object) -> None:
    """Refuse lists of 0 and 1 for each class, which would be examples of the classes 0 and 1.

    Args:
      values: the different labels that occur.
      codes: indices into them, the labels of all examples concatenated.
      ends: where those of each example end in `codes`, [examples].
      title: the dataset, for error messages.

    Raises:
      UserError: all lists are as long, and only 0 and 1 occur in them.
    """
    lengths = np.unique(np.diff(ends, prepend=0))
    if len(lengths) != 1 or lengths[0] < 2:
        return
    numbers = [whole_number(value) for value in values]
    if any(numbers[code] not in (0, 1) for code in np.unique(codes)):
        return
    said = np.array(numbers, object)[codes].reshape(-1, lengths[0])
    if (said[:, :-1] < said[:, 1:]).all():  # All of both classes.
        return
    raise UserError(
        f'{title}: lists of 0 and 1 for each of {lengths[0]} classes are no labels: list the '
        "numbers or names of an example's classes"
    )


def numbered_classes(numbers: Collection[int], request: Request, title: object) -> Classes:
    """Count the classes of labels that are numbers from 0.

    Args:
      numbers: the different labels that occur.

    Raises:
      UserError: one is negative, not below `num_classes`, or far beyond what there are.
    """
    smallest, largest = min(numbers, default=0), max(numbers, default=-1)
    count = request.num_classes or max(largest + 1, request.least_classes)
    if largest >= MAX_CLASSES:
        raise UserError(f'{title}: label {largest} is too large for the number of a class')
    if smallest < 0 or largest >= count:
        raise UserError(
            f'{title}: label {smallest if smallest < 0 else largest} is not one of {count} '
            'classes: '
            + (
                'label from 0'
                if smallest < 0
                else f'set {request.key}.num_classes={largest + 1} or more'
            )
        )
    if request.num_classes is None and largest >= max(
        request.least_classes, _MOST_EMPTY, 10 * len(numbers)
    ):
        raise UserError(
            f'{title}: labels up to {largest:,} would make {count:,} classes, and only '
            f'{len(numbers):,} of them occur: number them from 0, give them names, or set '
            f'{request.key}.num_classes={count}'
        )
    return Classes(count, None)


def with_count(source: Source, count: int | None, key: str) -> Source:
    """Give a source as many classes as `num_classes` says; those beyond its own have no examples.

    Raises:
      UserError: it is set to less than the source has.
    """
    if count is None or count == source.num_classes:
        return source
    if count < source.num_classes:
        raise UserError(
            f'{key}.num_classes is {count} but {source.name} has {source.num_classes} classes: '
            'set at least that'
        )
    names = source.class_names
    padded = None if names is None else names + ('',) * (count - source.num_classes)
    return replace(source, num_classes=count, class_names=padded)


def subset(source: Source, classes: Sequence[str | int], key: str) -> Source:
    """Keep the examples of some classes, which become classes 0, 1, ... in the given order.

    Args:
      classes: names or numbers.
      key: config key for error messages, such as 'data.classes'.

    Raises:
      UserError: no such class, a class given twice, or no example left.
    """
    names = source.class_names
    chosen = [choose(choice, names, source.num_classes, source.name, key) for choice in classes]
    if len(set(chosen)) != len(chosen):
        raise UserError(f'{key}: a class is named twice in {tuple(classes)!r}')
    targets = np.full(source.num_classes, -1, np.int32)
    targets[chosen] = np.arange(len(chosen))
    # Classes that were numbers are named by them: another subset may be in another order.
    kept = tuple(names[i] if names else str(i) for i in chosen)
    return renumbered(source, targets, len(chosen), kept, key)


def relabel(source: Source, mapping: dict[str, Any], key: str) -> Source:
    """Replace labels by those of `mapping`, whose keys are names (or numbers) of classes.

    Examples of classes that map to None are left out.

    Raises:
      UserError: the mapping lacks a class of the source, or maps one to no whole number.
    """
    names = source.class_names or tuple(map(str, range(source.num_classes)))
    given = {label_name(name): target for name, target in mapping.items()}
    if names_as_numbers(names) is None:  # A number is of a class, unless one is called so.
        given |= {
            name: given[str(number)]
            for number, name in enumerate(names)
            if name not in given and str(number) in given and str(number) not in names
        }
    missing = [name for name in names if name and name not in given]
    if missing:
        raise UserError(
            f'{key}: says nothing of class {missing[0]!r} of {source.name}'
            f' (nor of {len(missing) - 1} others): give each class a number, or null to drop it'
        )
    targets = [given.get(name) for name in names]
    for name, target in zip(names, targets, strict=True):
        valid = target is None or (type(target) is int and 0 <= target < MAX_CLASSES)
        if not valid:
            raise UserError(
                f'{key}: class {name!r} maps to {target!r}: give a whole number or null'
            )
    table = np.array([-1 if t is None else t for t in targets], np.int32)
    count = int(table.max(initial=-1)) + 1
    merged: list[str] = [''] * count
    for name, target in zip(names, table.tolist(), strict=True):
        if target >= 0:
            merged[target] = f'{merged[target]}, {name}' if merged[target] else name
    return renumbered(source, table, count, tuple(merged), key)


def renumbered(
    source: Source, targets: np.ndarray, count: int, names: tuple[str, ...] | None, key: str
) -> Source:
    """Map labels by `targets`; leave out examples, or of pictures the objects, mapped to -1."""
    if source.annotations is not None:
        return _renumbered_objects(source, targets, count, names)
    if source.is_segmented:
        return _renumbered_pixels(source, targets, count, names)
    if (targets < 0).any():
        if source.labels is None:
            raise UserError(f'{key}: the labels of {source.name} cannot be listed')
        kept = np.flatnonzero(targets[source.labels()] >= 0)
        if not kept.size:
            raise UserError(f'{key}: no example of {source.name} {source.split} is left')
        bounds = source.shard_bounds
        lengths = None if bounds is None else np.diff(np.searchsorted(kept, bounds))
        chosen = select(source, len(kept), kept.astype(np.int64).__getitem__)
        source = replace(chosen, shard_lengths=lengths, shards=source.shards)
    load, labels = source.load, source.labels

    def renumber(columns: Columns) -> Columns:
        label = columns['label']
        if isinstance(label, np.ndarray):
            return {**columns, 'label': targets[label]}
        return {**columns, 'label': [targets[numbers] for numbers in label]}

    return replace(
        source,
        num_classes=count,
        class_names=names,
        load=lambda indices: renumber(load(indices)),
        labels=None if labels is None else lambda: targets[labels()],
    )


def _renumbered_objects(
    source: Source, targets: np.ndarray, count: int, names: tuple[str, ...] | None
) -> Source:
    """Map the classes of objects; pictures whose objects are all left out are empty ones."""
    load, annotations = source.load, source.annotations
    assert annotations is not None

    def renumber(columns: Columns) -> Columns:
        labels = [targets[label] for label in columns['box_label']]
        kept = [label >= 0 for label in labels]
        return moves.chosen({**columns, 'box_label': labels}, kept)

    def annotate(indices: np.ndarray) -> list[Annotation]:
        mapped = [own._replace(labels=targets[own.labels]) for own in annotations(indices)]
        return [own.of(own.labels >= 0) for own in mapped]

    return replace(
        source,
        num_classes=count,
        class_names=names,
        load=lambda indices: renumber(load(indices)),
        annotations=annotate,
    )


def _renumbered_pixels(
    source: Source, targets: np.ndarray, count: int, names: tuple[str, ...] | None
) -> Source:
    """Map the classes of pixels; those that are left out are ignored."""
    load, stored = source.load, source.label_maps
    assert stored is not None

    def mapped(values: np.ndarray) -> np.ndarray:
        is_known = values != moves.IGNORED
        found = targets[np.where(is_known, values, 0)]
        return np.where(is_known & (found >= 0), found, moves.IGNORED)

    def renumber(columns: Columns) -> Columns:
        return {**columns, 'segmentation': [mapped(own) for own in columns['segmentation']]}

    return replace(
        source,
        num_classes=count,
        class_names=names,
        load=lambda indices: renumber(load(indices)),
        label_maps=lambda indices: [mapped(own) for own in stored(indices)],
    )
