"""CSV, TSV and JSONL tables of files and labels."""

import contextlib
import csv
import functools
import html.entities
import io
import itertools
import json
import re
from array import array
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from big_vit.data import files
from big_vit.data.sources.base import Columns, Request, Source
from big_vit.data.sources.classes import check_lists, infer_classes, whole_number
from big_vit.data.sources.folder import list_folder
from big_vit.data.sources.media import KINDS, Names, ending_of, kind_of, loader
from big_vit.data.sources.splits import cut, training_split
from big_vit.errors import UserError

_ENDINGS = ('.csv', '.tsv', '.jsonl')
_SEPARATORS = re.compile('[|;]')
# As pandas writes cells that are lists.
_LIST = re.compile(r"""\[\s*(['"0-9].*)?\]""", re.DOTALL)
_NUMERIC = re.compile('#([0-9]+|[xX][0-9a-fA-F]+);')
_KINDS = (None, *KINDS)
_SPLIT_COLUMNS = ('split', 'Split', 'SPLIT')
# What the file systems of Linux allow; halves of characters, which JSON can hold.
_MOST_NAME = 255
_SURROGATE = re.compile('[\ud800-\udfff]')
# Number of files that are looked for when a split is opened; a million would take minutes.
_PROBES = 9


class _Row(NamedTuple):
    """A line of a table: a path, its labels, and its split, `train` without a column for it."""

    line: int
    image: str
    labels: list[Any]
    multilabel: bool
    split: str


class _Rows(NamedTuple):
    """All rows of some tables, in a few arrays.

    Attributes:
      names: paths of the files.
      values: the different labels, in order of appearance.
      codes: indices into `values`, the labels of all rows concatenated.
      ends: where the labels of each row end in `codes`, [rows].
      multilabel: whether examples have any number of labels, or one each.
      kinds: indices into `_KINDS`, [rows].
      lines: line numbers, [rows].
      splits: for each split its table and its rows.
    """

    names: Names
    values: list[Any]
    codes: np.ndarray
    ends: np.ndarray
    multilabel: bool
    kinds: np.ndarray
    lines: np.ndarray
    splits: dict[str, tuple[files.Place, np.ndarray]]

    def used(self, split: str | None) -> list[int]:
        """List the labels that occur in a split (None: in any), as indices into `values`."""
        chosen = np.ones(len(self.ends), bool)
        if split is not None:
            chosen[:] = False
            chosen[self.splits[split][1]] = True
        labels = np.diff(self.ends, prepend=0)
        return np.unique(self.codes[np.repeat(chosen, labels)]).tolist()


def table(
    request: Request, *, path: str, image_column: str = 'image', label_column: str = 'label'
) -> Source:
    """Open files that a CSV, TSV or JSONL file lists with their labels, or one such file a split.

    A table in a folder is the split that it is named after (train.csv, test.jsonl); a single
    table is the split `train`, unless it has a column `split`. Paths are relative to the table and
    must stay below its folder, or absolute if the table is local. Labels are numbers from 0, or
    names, whose classes are the sorted names of the split `train` (of all, if there is none). A
    column `split` may be written in capitals. If any row has several labels,
    separated by | or ; (in JSONL a list), 'label' is a list of arrays, which may be empty; else
    each row needs one, unless no labels are needed.

    Args:
      request: the examples to open.
      path: the table or folder, local or any URL that fsspec reads.
      image_column: column of the paths.
      label_column: column of the labels.

    Raises:
      UserError: a file, column or row is missing or cannot be read.
    """
    key = request.key
    root = files.place(path, f'{key}.path')
    tables, home = _find_tables(root, key)
    needed = {image_column: 'image_column'}
    if request.labelled:
        needed[label_column] = 'label_column'

    def parse(file: files.Place) -> Iterator[_Row]:
        return _parse(file, home, image_column, label_column, needed, key)

    rows = _read(tables, parse, request.labelled)
    first = training_split(rows.splits)
    learned = [rows.values[code] for code in rows.used(first)]
    if not learned:
        raise UserError(f'{key}.path: no row of {root} has a label')
    classes = infer_classes(learned, request, root)

    def place(row: int) -> files.Place:
        name = rows.names[row]
        return home._replace(path=name) if name.startswith('/') else home / name

    def open_split(name: str) -> Source:
        file, chosen = rows.splits[name]
        used = rows.used(name)
        numbers = np.zeros(len(rows.values), np.int32)
        values = [rows.values[code] for code in used]
        numbers[used] = classes.numbers(values, file, name, first or name, key)
        labels = numbers[rows.codes]
        kind = _check_files(file, chosen, rows, place)
        read = loader(kind, lambda row: files.read(place(row)))
        flat = None if rows.multilabel else labels[chosen]

        def load(indices: np.ndarray) -> Columns:
            numbers = chosen[indices].tolist()
            if flat is not None:
                return {kind: read(numbers), 'label': flat[indices]}
            starts = [rows.ends[row - 1] if row else 0 for row in numbers]
            lists = [labels[s : rows.ends[row]] for s, row in zip(starts, numbers, strict=True)]
            return {kind: read(numbers), 'label': lists}

        return Source(
            name=f'table:{root.name}',
            split=name,
            length=len(chosen),
            num_classes=classes.num_classes,
            image_shape=None,
            load=load,
            in_memory=False,
            class_names=classes.names,
            labels=None if flat is None else functools.partial(np.asarray, flat),
            where=lambda i: f'{place(int(chosen[i]))} ({file}, line {rows.lines[chosen[i]]})',
        )

    return cut(f'table:{root.name}', rows.splits, open_split, request)


def _check_files(
    file: files.Place, chosen: np.ndarray, rows: _Rows, place: Callable[[int], files.Place]
) -> str:
    """Check that the files of a split are of one kind, and that a few of them exist.

    Returns:
      The kind.
    """
    kinds = rows.kinds[chosen]
    odd = np.flatnonzero((kinds != kinds[0]) | (kinds == 0))
    if odd.size:
        raise UserError(
            f'{file}, line {rows.lines[chosen[odd[0]]]}: all files must be images, or all videos, '
            'sounds or texts, known by their extensions'
        )
    probes = np.unique(chosen[np.linspace(0, len(chosen) - 1, _PROBES).astype(int)])
    for row in probes.tolist():
        if not files.exists(place(row)):
            raise UserError(f'{file}, line {rows.lines[row]}: there is no file {place(row)}')
    return str(_KINDS[kinds[0]])


def _find_tables(root: files.Place, key: str) -> tuple[dict[str, files.Place], files.Place]:
    """Return ({split: table}, the folder that paths are relative to); a lone table is split ''."""
    if root.name.lower().endswith(_ENDINGS):
        if not files.exists(root):
            raise UserError(f'{key}.path: there is no file {root}')
        return {'': root}, root._replace(path=root.path.rpartition('/')[0])
    if not files.is_folder(root):
        raise UserError(f'{key}.path: {root} is neither a folder nor a .csv, .tsv or .jsonl file')
    tables: dict[str, files.Place] = {}
    for name, is_folder in list_folder(root, key):
        split, dot, ending = name.rpartition('.')
        if is_folder or (dot + ending).lower() not in _ENDINGS:
            continue
        if split in tables:
            raise UserError(
                f'{key}.path: {root} has two tables of {split}: {tables[split].name} and {name}'
            )
        tables[split] = root / name
    if not tables:
        raise UserError(f'{key}.path: no .csv, .tsv or .jsonl file in {root}')
    return tables, root


def _read(
    tables: dict[str, files.Place],
    parse: Callable[[files.Place], Iterator[_Row]],
    labelled: bool,
) -> _Rows:
    """Read tables by split; one without a name has a column `split`, or is `train`.

    Args:
      labelled: whether each row needs a label; if not, and one has none, all are of class 0.
    """
    numbers: dict[Any, int] = {}
    codes, ends, lines, kinds = array('q'), array('q'), array('q'), array('b')
    splits: dict[str, tuple[files.Place, array]] = {}
    spellings: dict[str, str] = {}  # Of a split in some rows Train, in others TRAIN.
    multilabel, unlabelled = False, None

    def names() -> Iterator[str]:
        nonlocal multilabel, unlabelled
        for name, file in tables.items():
            start, inside = len(lines), ''
            for row in parse(file):
                inside = inside or row.split
                if name and row.split.casefold() != inside.casefold():
                    raise UserError(
                        f'{file}, line {row.line}: its column split says {inside} and {row.split}, '
                        f'and its name {name}: drop the column, or open {file.name} by itself'
                    )
                split = name or spellings.setdefault(row.split.casefold(), row.split)
                splits.setdefault(split, (file, array('q')))[1].append(len(lines))
                codes.extend([numbers.setdefault(label, len(numbers)) for label in row.labels])
                ends.append(len(codes))
                lines.append(row.line)
                # Of a file without an ending, the bytes decide when it is decoded.
                kind = kind_of(row.image) or ('image' if ending_of(row.image) == '.' else None)
                kinds.append(_KINDS.index(kind))
                multilabel = multilabel or row.multilabel
                if unlabelled is None and not row.labels:
                    unlabelled = f'{file}, line {row.line}'
                yield row.image
            if len(lines) == start:
                raise UserError(f'{file}: has no rows')

    paths = Names(names())
    if unlabelled is not None and not multilabel:
        if labelled:
            raise UserError(f'{unlabelled}: has no label: give it one, or leave it out')
        numbers, codes = {0: 0}, array('q', [0]) * len(lines)
        ends = array('q', range(1, len(lines) + 1))
    check_lists(list(numbers), np.array(codes), np.array(ends), next(iter(tables.values())))
    return _Rows(
        names=paths,
        values=list(numbers),
        codes=np.array(codes),
        ends=np.array(ends),
        multilabel=multilabel,
        kinds=np.array(kinds),
        lines=np.array(lines),
        splits={name: (file, np.array(rows)) for name, (file, rows) in splits.items()},
    )


def _parse(
    file: files.Place,
    home: files.Place,
    image_column: str,
    label_column: str,
    needed: dict[str, str],
    key: str,
) -> Iterator[_Row]:
    """Yield the rows of a table, each checked on its own.

    Args:
      needed: columns that must be there, and the keys that name them.
    """
    is_json = file.name.lower().endswith('.jsonl')
    used = (image_column, label_column, *_SPLIT_COLUMNS)
    for line, row in _json_rows(file, key) if is_json else _csv_rows(file, used, key):
        for column, option in needed.items():
            if column not in row:
                raise UserError(
                    f'{file}, line {line}: no column {column!r} (it has {", ".join(row)}): '
                    f'set {key}.{option} to the one that is meant'
                )
        image = row[image_column]
        if not isinstance(image, str) or not image:
            raise UserError(f'{file}, line {line}: {image!r} is no path of a file')
        if image[0] == '/' or '..' in image or '://' in image:  # Few of a million rows.
            _check_path(image, file, line, home)
        if len(image) > _MOST_NAME or not image.isascii() or '\0' in image:
            _check_name(image, file, line, home)
        where = next((name for name in _SPLIT_COLUMNS if name in row), None)
        said = 'train' if where is None else row[where]
        split = '' if said is None else str(said).strip()
        if split == '':
            raise UserError(f'{file}, line {line}: the column split says none')
        cell = row.get(label_column)
        multilabel = isinstance(cell, list)
        if isinstance(cell, str) and not is_json:
            if _LIST.fullmatch(cell.strip()):
                raise UserError(
                    f'{file}, line {line}: {cell[:40]!r} is a list as text: separate labels by |'
                )
            parts = _split_labels(cell)
            multilabel, cell = len(parts) > 1, [part.strip() for part in parts if part.strip()]
        labels = cell if isinstance(cell, list) else [] if cell in (None, '') else [cell]
        for label in labels:
            if not isinstance(label, str) and whole_number(label) is None:
                raise UserError(
                    f'{file}, line {line}: labels must be numbers or names, not {label!r}'
                )
        yield _Row(line, image, labels, multilabel, split)


def _split_labels(cell: str) -> list[str]:
    """Split a cell at its separators, of which the end of an entity such as &amp; is none."""
    parts = _SEPARATORS.split(cell)
    if '&' not in cell:
        return parts
    ends = itertools.accumulate(len(part) + 1 for part in parts)
    joined = ['']
    for part, end in zip(parts, ends, strict=True):
        joined[-1] += part
        entity = part.rpartition('&')[2] + cell[end - 1 : end]
        if '&' in part and (entity in html.entities.html5 or _NUMERIC.fullmatch(entity)):
            joined[-1] += ';'
        else:
            joined.append('')
    return joined[:-1] if joined[-1] == '' else joined


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


def _check_name(name: str, table: files.Place, line: int, home: files.Place) -> None:
    reason = None
    if '\0' in name or _SURROGATE.search(name):
        reason = 'has characters that no name of a file has'
    elif home.is_local and any(len(part.encode()) > _MOST_NAME for part in name.split('/')):
        reason = f'has {len(name):,} characters: names of files have at most {_MOST_NAME} bytes'
    if reason:
        raise UserError(f'{table}, line {line}: {name[:40]!a}... {reason}: give the path of a file')


@contextlib.contextmanager
def _open_text(file: files.Place, newline: str, key: str) -> Iterator[io.TextIOWrapper]:
    """Open a text file to be read as a stream; what fails while it is read is a UserError too."""
    try:
        if file.is_local:
            files.check_regular(file.path)
        with (
            file.system.open(file.path, 'rb') as handle,
            io.TextIOWrapper(handle, 'utf-8-sig', newline=newline) as text,
        ):
            yield text
    except OSError as error:
        raise UserError(f'{key}.path: cannot read {file}: {error.strerror or error}') from error
    except UnicodeDecodeError as error:
        raise UserError(f'{file}: not text in UTF-8 ({error.reason}): save it as UTF-8') from error


def _csv_rows(file: files.Place, used: tuple[str, ...], key: str) -> Iterator[tuple[int, dict]]:
    """Yield (line number, cells by column); the columns `used` must not be there twice."""
    with _open_text(file, '', key) as text:
        first = text.readline()
        # Spreadsheets write semicolons where the comma is in numbers.
        delimiter = ',' if ',' in first else max(';\t', key=first.count)
        delimiter = '\t' if file.name.lower().endswith('.tsv') else delimiter
        rows = csv.reader(itertools.chain([first], text), delimiter=delimiter, strict=True)
        try:
            header = [column.strip() for column in next(rows, [])]
            twice = [column for column in used if header.count(column) > 1]
            if twice:
                raise UserError(
                    f'{file}: has several columns {twice[0]!r}: rename all but one of them'
                )
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
    # Lines end in \n only: other line ends may occur within the strings of JSON.
    with _open_text(file, '\n', key) as text:
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
