"""Tables of files and labels: CSV, TSV and JSONL."""

import contextlib
import csv
import functools
import io
import itertools
import json
import re
from array import array
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from big_vit.data import files
from big_vit.data.sources.base import Columns, Source, cut
from big_vit.data.sources.folder import KINDS, Names, kind_of, listed, loader
from big_vit.errors import UserError

_ENDINGS = ('.csv', '.tsv', '.jsonl')
_SEVERAL = re.compile('[|;]')
_KINDS = (None, *KINDS)
# Files that are looked for when a split is opened; to ask for a million would take minutes.
_LOOKED_FOR = 9
# Labels are int32.
_MOST_CLASSES = 1 << 31


class _Row(NamedTuple):
    """A line of a table: a path, one label or several, and the split where it says one."""

    line: int
    image: str
    labels: list[Any]
    several: bool
    split: str | None


class _Table(NamedTuple):
    """All rows of some tables, in a few arrays.

    Attributes:
      names: the paths.
      values: the different labels, in the order in which they come.
      codes: of the labels of all rows one after the other, places in `values`.
      ends: where the labels of each row end in `codes`, [rows].
      several: whether examples have any number of labels, or one each.
      kinds: of the files, places in `_KINDS`, [rows].
      lines: [rows].
      splits: the table that each split is in, and which rows it has.
    """

    names: Names
    values: list[Any]
    codes: np.ndarray
    ends: np.ndarray
    several: bool
    kinds: np.ndarray
    lines: np.ndarray
    splits: dict[str, tuple[files.Place, np.ndarray]]


def _read(tables: dict[str, files.Place], parse: Callable[[files.Place], Iterator[_Row]]) -> _Table:
    """Reads tables, by split; a table without a name says the splits itself, or is `train`."""
    numbers: dict[Any, int] = {}
    codes, ends, lines, kinds = array('q'), array('q'), array('q'), array('b')
    splits: dict[str, tuple[files.Place, array]] = {}
    several, bare = False, None

    def names() -> Iterator[str]:
        nonlocal several, bare
        for name, file in tables.items():
            start = len(lines)
            for row in parse(file):
                split = name or ('train' if row.split is None else row.split)
                splits.setdefault(split, (file, array('q')))[1].append(len(lines))
                codes.extend([numbers.setdefault(label, len(numbers)) for label in row.labels])
                ends.append(len(codes))
                lines.append(row.line)
                kinds.append(_KINDS.index(kind_of(row.image)))
                several = several or row.several
                if bare is None and not row.labels:
                    bare = f'{file}, line {row.line}'
                yield row.image
            if len(lines) == start:
                raise UserError(f'{file}: has no rows')

    paths = Names(names())
    if bare is not None and not several:
        raise UserError(f'{bare}: has no label: give it one, or leave it out')
    rows = {name: (file, np.array(found)) for name, (file, found) in splits.items()}
    whole = (np.array(codes), np.array(ends), several, np.array(kinds), np.array(lines))
    return _Table(paths, list(numbers), *whole, rows)


def _rows(
    file: files.Place, home: files.Place, image_column: str, label_column: str, key: str
) -> Iterator[_Row]:
    """The rows of a table one at a time, each checked as far as it says."""
    is_json = file.name.lower().endswith('.jsonl')
    for line, row in _json_rows(file, key) if is_json else _csv_rows(file, key):
        for column, option in ((image_column, 'image_column'), (label_column, 'label_column')):
            if column not in row:
                has = ', '.join(row)
                raise UserError(
                    f'{file}, line {line}: no column {column!r} (it has {has}): '
                    f'set {key}.{option} to the one that is meant'
                )
        image, label = row[image_column], row[label_column]
        if not isinstance(image, str) or not image:
            raise UserError(f'{file}, line {line}: {image!r} is no path of a file')
        if image[0] == '/' or '..' in image or '://' in image:  # Of a million rows, few.
            _check_path(image, file, line, home)
        split = None if 'split' not in row else str(row['split'] or '').strip()
        if split == '':
            raise UserError(f'{file}, line {line}: the column split says none')
        several = isinstance(label, list)
        if isinstance(label, str) and not is_json:
            several = _SEVERAL.search(label) is not None
            label = [part.strip() for part in _SEVERAL.split(label) if part.strip()]
        labels = label if isinstance(label, list) else [] if label in (None, '') else [label]
        for one in labels:
            if not isinstance(one, int | str):
                raise UserError(
                    f'{file}, line {line}: labels must be numbers or names, not {one!r}'
                )
        yield _Row(line, image, labels, several, split)


def _check_path(name: str, table: files.Place, line: int, home: files.Place) -> None:
    reason = None
    if '://' in name:
        reason = f'is a URL: write it relative to {home}'
    elif name.startswith('/') and not home.is_local:
        reason = f'is absolute: write it relative to {home}'
    elif not name.startswith('/') and '..' in name.split('/'):
        reason = f'leads out of {home}: write an absolute path'
    if reason:
        raise UserError(f'{table}, line {line}: {name} {reason}')


@contextlib.contextmanager
def _opened(file: files.Place, newline: str, key: str) -> Iterator[io.TextIOWrapper]:
    """A text file that is read as it is needed; UserError, also when that shows only later."""
    try:
        with (
            file.system.open(file.path, 'rb') as handle,
            io.TextIOWrapper(handle, 'utf-8-sig', newline=newline) as text,
        ):
            yield text
    except OSError as error:
        raise UserError(f'{key}.path: cannot read {file}: {error.strerror or error}') from error
    except UnicodeDecodeError as error:
        raise UserError(f'{file}: not text in UTF-8 ({error.reason}): save it as UTF-8') from error


def _csv_rows(file: files.Place, key: str) -> Iterator[tuple[int, dict]]:
    delimiter = '\t' if file.name.lower().endswith('.tsv') else ','
    with _opened(file, '', key) as text:
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            header = [column.strip() for column in next(rows, [])]
            for row in rows:
                if len(row) > len(header):
                    raise UserError(
                        f'{file}, line {rows.line_num}: {len(row)} cells below the '
                        f'{len(header)} of the header: put "..." around a cell with a delimiter'
                    )
                if row:
                    yield rows.line_num, dict(itertools.zip_longest(header, row, fillvalue=''))
        except csv.Error as error:
            raise UserError(f'{file}, line {rows.line_num}: {error}') from error


def _json_rows(file: files.Place, key: str) -> Iterator[tuple[int, dict]]:
    # Lines end in \n only: other ends of lines may stand within the texts of JSON.
    with _opened(file, '\n', key) as text:
        for number, line in enumerate(text, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f'{file}, line {number}: is not JSON ({error})') from error
            if not isinstance(row, dict):
                raise UserError(
                    f'{file}, line {number}: is not a JSON object such as {{"image": ...}}'
                )
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
        if len(text) > 18:  # A name made of digits; Python refuses to read thousands of them.
            return None
        return int(text) if text.isdecimal() or (text[1:].isdecimal() and text[0] == '-') else None

    numbers = {value: as_number(value) for value in different}
    if all(number is not None for number in numbers.values()):
        largest = max((n for n in numbers.values() if n is not None), default=-1)
        wrong = [value for value, n in numbers.items() if n is not None and n < 0]
        count = num_classes or largest + 1
        if largest >= _MOST_CLASSES:
            raise UserError(f'{what}: label {largest} is too large for the number of a class')
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
    classes are the sorted names of all splits. Where any row has several, separated by | or ; (in
    JSONL a list), 'label' is a list of arrays, which may be empty; else each row needs one.

    Args:
      split: see `base.parse_split`.
      path: of the file or folder, local or anything that fsspec knows.
      num_classes: None for those that occur.
      key: prefix of the config keys in messages.

    Raises:
      UserError: a file, column or row is missing or cannot be read.
    """
    root = files.place(path, f'{key}.path')
    title = root.name
    if title.lower().endswith(_ENDINGS):
        tables, home = {'': root}, root._replace(path=root.path.rpartition('/')[0])
        if not files.exists(root):
            raise UserError(f'{key}.path: there is no file {root}')
    elif files.is_folder(root):
        tables, home = {}, root
        for name, is_folder in listed(root, key):
            split_name, dot, ending = name.rpartition('.')
            if is_folder or (dot + ending).lower() not in _ENDINGS:
                continue
            if split_name in tables:
                raise UserError(
                    f'{key}.path: {root} has two tables of {split_name}: '
                    f'{tables[split_name].name} and {name}'
                )
            tables[split_name] = root / name
    else:
        raise UserError(f'{key}.path: {root} is neither a folder nor a .csv, .tsv or .jsonl file')
    if not tables:
        raise UserError(f'{key}.path: no .csv, .tsv or .jsonl file in {root}')
    all_rows = _read(tables, lambda file: _rows(file, home, image_column, label_column, key))
    if not all_rows.values:
        raise UserError(f'{key}.path: no row of {root} has a label')
    numbers, count, classes = class_numbers(all_rows.values, num_classes, str(root), key)
    table_of = np.array([numbers[value] for value in all_rows.values], np.int32)
    names, lines, ends, several = all_rows.names, all_rows.lines, all_rows.ends, all_rows.several
    labels = table_of[all_rows.codes]

    def whole(name: str) -> Source:
        file, rows = all_rows.splits[name]
        kinds = all_rows.kinds[rows]
        odd = np.flatnonzero((kinds != kinds[0]) | (kinds == 0))
        if odd.size:
            raise UserError(
                f'{file}, line {lines[rows[odd[0]]]}: all files must be images, or all videos, '
                'sounds or texts, known by their extensions'
            )
        kind = str(_KINDS[kinds[0]])

        def at(row: int) -> files.Place:
            name = names[row]
            return home._replace(path=name) if name.startswith('/') else home / name

        for row in np.unique(rows[np.linspace(0, len(rows) - 1, _LOOKED_FOR).astype(int)]).tolist():
            if not files.exists(at(row)):
                raise UserError(f'{file}, line {lines[row]}: there is no file {at(row)}')
        read = loader(kind, lambda row: files.read(at(row)))
        flat = None if several else labels[rows]

        def load(indices: np.ndarray) -> Columns:
            chosen = rows[indices].tolist()
            if flat is not None:
                return {kind: read(chosen), 'label': flat[indices]}
            starts = [ends[row - 1] if row else 0 for row in chosen]
            found = [labels[s : ends[row]] for s, row in zip(starts, chosen, strict=True)]
            return {kind: read(chosen), 'label': found}

        return Source(
            name=f'table:{title}',
            split=name,
            length=len(rows),
            num_classes=count,
            image_shape=None,
            load=load,
            in_memory=False,
            class_names=classes,
            labels=None if flat is None else functools.partial(np.asarray, flat),
            where=lambda index: f'{at(int(rows[index]))} ({file}, line {lines[rows[index]]})',
        )

    return cut(f'table:{title}', all_rows.splits, whole, split, key)
