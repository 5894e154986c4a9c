"""Numbers and names of classes: from the labels of a dataset, by a map, or a chosen few."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from big_vit.data.sources.base import Columns, Request, Source, select
from big_vit.errors import UserError

# Labels are int32.
MAX_CLASSES = 1 << 31


class Classes(NamedTuple):
    """The classes of a dataset.

    Attributes:
      numbers: class number of each label value.
      num_classes: number of classes.
      names: in order; None if classes have no names, or not all of them.
    """

    numbers: dict[Any, int]
    num_classes: int
    names: tuple[str, ...] | None


def named_classes(names: Sequence[str], request: Request, title: object) -> Classes:
    """Number the classes of a dataset that lists their names.

    Raises:
      UserError: `num_classes` is set to fewer than there are.
    """
    count = class_count(len(names), request, title)
    numbers = {name: number for number, name in enumerate(names)}
    return Classes(numbers, count, tuple(names) if count == len(names) else None)


def class_count(known: int, request: Request, title: object) -> int:
    """Return `num_classes` if it is set, else the number of classes known of the dataset.

    Raises:
      UserError: it is set to less than that.
    """
    count = request.num_classes or known
    if count < known:
        raise UserError(
            f'{request.key}.num_classes is {count} but {title} has {known} classes: '
            'set at least that'
        )
    return count


def infer_classes(values: Sequence[Any], request: Request, title: object) -> Classes:
    """Infer classes from label values, which are numbers or names.

    Args:
      values: all labels that occur, in any order.
      request: may set `num_classes`.
      title: the dataset, for error messages.

    Raises:
      UserError: the labels are of both kinds, negative, or more than `num_classes`.
    """
    different = set(values)
    numbers = {value: number for value in different if (number := _as_number(value)) is not None}
    if len(numbers) == len(different):
        return _numbered_classes(numbers, request, title)
    odd = [value for value in different if not isinstance(value, str)]
    if odd:
        raise UserError(f'{title}: labels must be numbers or names, not {odd[0]!r}')
    return named_classes(sorted(different), request, title)


def _as_number(value: Any) -> int | None:
    if isinstance(value, bool | int | np.integer):
        return int(value)
    text = str(value)
    if len(text) > 18:  # A name made of digits; Python refuses to read thousands of them.
        return None
    return int(text) if text.isdecimal() or (text[1:].isdecimal() and text[0] == '-') else None


def _numbered_classes(numbers: dict[Any, int], request: Request, title: object) -> Classes:
    largest = max(numbers.values(), default=-1)
    negative = [value for value, number in numbers.items() if number < 0]
    count = request.num_classes or largest + 1
    if largest >= MAX_CLASSES:
        raise UserError(f'{title}: label {largest} is too large for the number of a class')
    if negative or largest >= count:
        raise UserError(
            f'{title}: label {negative[0] if negative else largest} is not one of {count} classes: '
            + (
                'label from 0'
                if negative
                else f'set {request.key}.num_classes={largest + 1} or more'
            )
        )
    return Classes(numbers, count, None)


def subset(source: Source, classes: Sequence[str | int], key: str) -> Source:
    """Keep the examples of some classes, which become classes 0, 1, ... in the given order.

    Args:
      classes: names or numbers.
      key: config key for error messages, such as 'data.classes'.

    Raises:
      UserError: no such class, a class given twice, or no example left.
    """
    names = source.class_names
    chosen = []
    for choice in classes:
        if isinstance(choice, str) and names is not None and choice in names:
            chosen.append(names.index(choice))
        elif str(choice).isdigit() and int(choice) < source.num_classes:
            chosen.append(int(choice))
        else:
            known = ', '.join(names[:12]) if names else f'0 to {source.num_classes - 1}'
            raise UserError(f'{key}: {source.name} has no class {choice!r}; it has {known}')
    if len(set(chosen)) != len(chosen):
        raise UserError(f'{key}: a class is named twice in {tuple(classes)!r}')
    targets = np.full(source.num_classes, -1, np.int32)
    targets[chosen] = np.arange(len(chosen))
    kept = tuple(names[i] for i in chosen) if names else None
    return _renumbered(source, targets, len(chosen), kept, key)


def relabel(source: Source, mapping: dict[str, Any], key: str) -> Source:
    """Replace labels by those of `mapping`, whose keys are names (or numbers) of classes.

    Examples of classes that map to None are left out.

    Raises:
      UserError: the mapping lacks a class of the source, or maps one to no whole number.
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
    return _renumbered(source, table, count, tuple(merged), key)


def _renumbered(
    source: Source, targets: np.ndarray, count: int, names: tuple[str, ...] | None, key: str
) -> Source:
    """Map labels by `targets` and leave out examples that it maps to -1."""
    if (targets < 0).any():
        if source.labels is None:
            raise UserError(f'{key}: the labels of {source.name} cannot be listed')
        kept = np.flatnonzero(targets[source.labels()] >= 0)
        if not kept.size:
            raise UserError(f'{key}: no example of {source.name} {source.split} is left')
        source = select(source, len(kept), kept.astype(np.int64).__getitem__)
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
