"""Tables of files and labels: CSV, TSV and JSONL."""

import csv
import functools
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from big_vit.data import files
from big_vit.data.sources.base import Columns, Source, cut
from big_vit.data.sources.folder import Names, kind_of, loader
from big_vit.errors import UserError

_ENDINGS = ('.csv', '.tsv', '.jsonl')
_SEVERAL = '|'


def _read(file: files.Place, image_column: str, label_column: str, key: str) -> dict[str, list]:
    """{split: [(line, image, labels), ...]} of a table; the split is '' without such a column."""
    try:
        text = files.read(file).decode('utf-8-sig')
    except OSError as error:
        raise UserError(f'{key}.path: cannot read {file}: {error.strerror or error}') from error
    except UnicodeDecodeError as error:
        raise UserError(f'{file}: not text in UTF-8 ({error.reason}): save it as UTF-8') from error
    rows = _json_rows(text, file) if file.name.endswith('.jsonl') else _csv_rows(text, file)
    found: dict[str, list] = {}
    for line, row in rows:
        for column, name in ((image_column, 'image_column'), (label_column, 'label_column')):
            if row.get(column) is None:
                has = ', '.join(str(name) for name in row)
                raise UserError(
                    f'{file}, line {line}: no column {column!r} (it has {has}): '
                    f'set {key}.{name} to the one that is meant'
                )
        label = row[label_column]
        if isinstance(label, str):
            label = [part.strip() for part in label.split(_SEVERAL)] if label.strip() else []
        several = tuple(label) if isinstance(label, list) else (label,)
        entry = (line, str(row[image_column]), several)
        found.setdefault(str(row.get('split', '')), []).append(entry)
    if not found:
        raise UserError(f'{file}: has no rows')
    return found


def _csv_rows(text: str, file: files.Place) -> Iterator[tuple[int, dict]]:
    rows = csv.DictReader(
        io.StringIO(text), delimiter='\t' if file.name.endswith('.tsv') else ',', strict=True
    )
    try:
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        raise UserError(f'{file}, line {rows.line_num}: {error}') from error


def _json_rows(text: str, file: files.Place) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f'{file}, line {number}: is not JSON ({error})') from error
        if not isinstance(row, dict):
            raise UserError(f'{file}, line {number}: is not a JSON object such as {{"image": ...}}')
        yield number, row


def class_numbers(values: list[Any], num_classes: int | None, what: str, key: str) -> Any:
    """(number of each value, number of classes, names) of labels that are numbers or names.

    Args:
      values: every label that occurs, in any order.
      num_classes: as the user set it.
      what: where they come from, for messages.

    Raises:
      UserError: they are of two kinds, negative, or more than num_classes.
    """
    different = set(values)

    def as_number(value: Any) -> int | None:
        if isinstance(value, bool):
            return int(value)
        if isinstance(value, int | np.integer):
            return int(value)
        text = str(value)
        return int(text) if text.isdecimal() or (text[1:].isdecimal() and text[0] == '-') else None

    numbers = {value: as_number(value) for value in different}
    if all(number is not None for number in numbers.values()):
        largest = max((n for n in numbers.values() if n is not None), default=-1)
        wrong = [value for value, n in numbers.items() if n is not None and n < 0]
        count = num_classes or largest + 1
        if wrong or largest >= count:
            shown = wrong[0] if wrong else largest
            raise UserError(
                f'{what}: label {shown} is not one of {count} classes: '
                + ('label from 0' if wrong else f'set {key}.num_classes={largest + 1} or more')
            )
        return numbers, count, None
    odd = [value for value in different if not isinstance(value, str)]
    if odd:
        raise UserError(f'{what}: labels must be numbers or names, not {odd[0]!r}')
    names = tuple(sorted(different))
    if num_classes is not None and num_classes < len(names):
        raise UserError(
            f'{key}.num_classes is {num_classes} but {what} has {len(names)} classes: '
            'set at least that'
        )
    count = num_classes or len(names)
    return (
        {name: i for i, name in enumerate(names)},
        count,
        names if count == len(names) else None,
    )


def table(
    split: str,
    path: str,
    image_column: str = 'image',
    label_column: str = 'label',
    num_classes: int | None = None,
    key: str = 'data',
) -> Source:
    """Files listed with their labels in a CSV, TSV or JSONL file, or in one file a split.

    A file of a folder is the split that its name says (train.csv, test.jsonl); a single file is
    the split `train`, unless it has a column `split`. Paths are relative to the table and must stay
    below its folder, or absolute where it is local. Labels are numbers from 0, or names, whose
    classes are the sorted names of all splits; several are separated by |, or a list in JSONL, and
    make 'label' a list of arrays.

    Args:
      split: see `base.parse_split`.
      path: of the file or folder, local or anything that fsspec knows.
      num_classes: None for those that occur.
      key: prefix of the config keys in messages.

    Raises:
      UserError: a file, column or row is missing or cannot be read.
    """
    root = files.place(path, f'{key}.path')
    if root.name.endswith(_ENDINGS):
        tables, home = {'': root}, root._replace(path=root.path.rpartition('/')[0] or '.')
        title = root.name
        if not files.exists(root):
            raise UserError(f'{key}.path: there is no file {root}')
    elif files.is_folder(root):
        home, title = root, root.name
        tables = {
            entry.name.rpartition('.')[0]: root / entry.name
            for entry in files.entries(root)
            if entry.name.endswith(_ENDINGS)
        }
    else:
        raise UserError(f'{key}.path: {root} is neither a folder nor a .csv, .tsv or .jsonl file')
    if not tables:
        raise UserError(f'{key}.path: no .csv, .tsv or .jsonl file in {root}')
    every: dict[str, list] = {}
    where: dict[str, files.Place] = {}
    for name, file in tables.items():
        for inner, rows in _read(file, image_column, label_column, key).items():
            every.setdefault(name or inner or 'train', []).extend(rows)
            where[name or inner or 'train'] = file
    occurring = [label for rows in every.values() for _, _, labels in rows for label in labels]
    numbers, count, classes = class_numbers(occurring, num_classes, str(root), key)

    def at(name: str) -> files.Place:
        return home._replace(path=name) if name.startswith('/') else home / name

    def check(name: str, line: int, table: files.Place) -> None:
        if name.startswith('/') and not home.is_local:
            raise UserError(
                f'{table}, line {line}: {name} is absolute: write it relative to {home}'
            )
        if not name.startswith('/') and '..' in name.split('/'):
            raise UserError(
                f'{table}, line {line}: {name} leads out of {home}: write an absolute path'
            )

    def whole(name: str) -> Source:
        rows, table = every[name], where[name]
        kinds: dict[str | None, int] = {}
        for line, file, _ in rows:
            check(file, line, table)
            kinds.setdefault(kind_of(file), line)
        if None in kinds or len(kinds) > 1:
            line = kinds.get(None, max(kinds.values()))
            raise UserError(
                f'{table}, line {line}: all files must be images, or all videos, sounds or texts, '
                'known by their extensions'
            )
        for i in sorted({0, len(rows) // 2, len(rows) - 1}):
            if not files.exists(at(rows[i][1])):
                raise UserError(f'{table}, line {rows[i][0]}: there is no file {at(rows[i][1])}')
        kind = str(next(iter(kinds)))
        names, lines = Names(row[1] for row in rows), np.array([row[0] for row in rows], np.int64)
        labels = [np.array([numbers[v] for v in row[2]], np.int32) for row in rows]
        one = all(len(label) == 1 for label in labels)
        flat = np.concatenate(labels) if one else None
        read = loader(kind, lambda index: files.read(at(names[index])))

        def load(indices: np.ndarray) -> Columns:
            label = flat[indices] if flat is not None else [labels[i] for i in indices.tolist()]
            return {kind: read(indices.tolist()), 'label': label}

        listed: Callable[[], np.ndarray] | None = None
        if flat is not None:
            listed = functools.partial(np.asarray, flat)
        return Source(
            name=f'table:{title}',
            split=name,
            length=len(rows),
            num_classes=count,
            image_shape=None,
            load=load,
            in_memory=False,
            class_names=classes,
            labels=listed,
            where=lambda index: f'{at(names[index])} ({table}, line {lines[index]})',
        )

    sizes = {name: len(rows) for name, rows in every.items()}
    return cut(f'table:{title}', sizes, whole, split, key)
