"""Examples of any source as a worker reads them: a shard, or a range of rows, from its start on."""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from big_vit.data import files
from big_vit.data.sources import folder, parquet, tar_format, tar_samples, tar_shards
from big_vit.data.sources.base import Request, Source
from big_vit.data.sources.media import kind_of
from big_vit.data.sources.registry import SOURCES
from big_vit.errors import UserError
from big_vit.preparation import columns
from big_vit.preparation.settings import Given

# Sources that are read a shard at a time, by a worker that knows of no other.
SHARDED = ('tar', 'parquet')
# Examples of a unit of another source.
_RANGE = 4096
_KEY = 'data'


class Unit(NamedTuple):
    """What one worker reads at a time.

    Attributes:
      number: its place in the order of all units.
      place: the shard, or the path of the source.
      start, stop: the rows of it; (0, -1) are those of a whole shard.
      mark: what changes when the files do.
    """

    number: int
    place: str
    start: int
    stop: int
    mark: str


class Example(NamedTuple):
    """An example with its picture, which may be missing.

    Attributes:
      row: in its unit.
      name: in its shard, without an ending.
      where: for messages.
      data: the file of the picture, its pixels, or None.
      ending: of the file, as in 'jpg'; '' if only the bytes tell.
      fields: what comes with it: members of a tar by their endings, or columns.
    """

    row: int
    name: str
    where: str
    data: Any
    ending: str
    fields: dict[str, Any]


@contextlib.contextmanager
def _named(given: Given) -> Iterator[None]:
    """Name the flag of this command where an error names a key of the config."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for old, new in (
            (f'{_KEY}.path', given.flag),
            (f'{_KEY}.split', '--split'),
            (f'{_KEY}.', '--'),
        ):
            text = text.replace(old, new)
        raise type(error)(text) from error


# --- Units -----------------------------------------------------------------------------


def source_of(path: str, flag: str) -> str:
    """Tell by a path which source reads it.

    Raises:
      UserError: there is nothing.
    """
    place = files.place(path, flag)
    for ending, name in (('.tar', 'tar'), ('.parquet', 'parquet')):
        if path.rstrip('*').endswith(ending):
            return name
    if PurePosixPath(path).suffix in ('.csv', '.tsv', '.jsonl'):
        return 'table'
    if PurePosixPath(path).suffix in ('.npz', '.npy'):
        return 'arrays'
    if not files.is_folder(place):
        raise UserError(
            f'{flag}: {path} is no folder, and its name tells no format: is it there? '
            'Else --source says what reads it'
        )
    names = [entry.name for entry in files.entries(place)]
    if 'dataset_info.json' in names:
        return 'tfds'
    if any(name.endswith('.array_record') for name in names):
        return 'records'
    for ending, name in (('.tar', 'tar'), ('.parquet', 'parquet')):
        if any(entry.endswith(ending) for entry in names):
            return name
    inside = (files.entries(place / e.name) for e in files.entries(place)[:8] if e.is_folder)
    if any(entry.name.endswith('.parquet') for entries in inside for entry in entries):
        return 'parquet'
    return 'folder'


def units(given: Given, first: int) -> list[Unit]:
    """List the units of a set of examples, in order, numbered from `first` on.

    Raises:
      UserError: there is nothing, it cannot be read, or it has several splits and none is named.
    """
    with _named(given):
        if given.source not in SHARDED:
            source = _source(given)
            mark = _mark(source)
            return [
                Unit(first + number, given.path, start, min(start + _RANGE, source.length), mark)
                for number, start in enumerate(range(0, source.length, _RANGE))
            ]
        splits = (
            tar_shards.shards_of_splits(given.path, _KEY)
            if given.source == 'tar'
            else parquet.shards_of_splits(files.place(given.path, given.flag), _KEY)
        )
        shards = splits[_split(given, list(splits))]
        if len(shards) >= 1 << 31:
            raise UserError(f'{given.flag}: more than 2 billion shards')
        for shard in shards:
            if shard.name.endswith('.arrow'):
                raise UserError(f'{given.flag}: {shard} is an Arrow file: write it as Parquet')
        return [
            Unit(first + number, str(shard), 0, -1, files.fingerprint([shard]))
            for number, shard in enumerate(shards)
        ]


def _split(given: Given, splits: list[str]) -> str:
    """Return the split that is meant.

    Raises:
      UserError: there are several, or not this one.
    """
    if given.split is None and len(splits) == 1:
        return splits[0]
    how = (
        f'{given.flag} {given.path}@{splits[0]} names one'
        if given.flag == '--evaluation'
        else f'--split {splits[0]} names one'
    )
    if given.split is None:
        raise UserError(f'{given.flag}: {given.path} holds {", ".join(splits)}: {how}')
    if given.split not in splits:
        raise UserError(
            f'{given.flag}: {given.path} has no split {given.split!r}, only {", ".join(splits)}'
        )
    return given.split


def _mark(source: Source) -> str:
    """Hash where the examples of a source lie, and of local files their size and time."""
    digest = hashlib.sha256()
    for index in range(source.length if source.where is not None else 0):
        place = source.place(index)
        digest.update(place.encode('utf-8', 'surrogateescape'))
        with contextlib.suppress(OSError, ValueError):
            info = os.stat(place)  # noqa: PTH116
            digest.update(f'{info.st_size} {info.st_mtime_ns}'.encode())
    return f'{source.length} {digest.hexdigest()[:24]}'


@functools.lru_cache(maxsize=16)
def _source(given: Given) -> Source:
    """Open a source that has random access."""
    path, more = given.path, {}
    splits: list[str] = []
    if given.source == 'folder':
        with contextlib.suppress(UserError):
            splits = folder.split_folders(files.place(path, given.flag))
    if given.source == 'tfds':
        path, more['tfds_name'], splits = _prepared(given)
    split = _split(given, splits) if splits else given.split or 'train'
    for name in ('image_column', 'label_column', 'text_column'):
        if getattr(given, name) is not None:
            more[name] = getattr(given, name)
    try:
        source = SOURCES[given.source](Request(split, labelled=False), path=path, **more)
        if given.flag == 'INPUT' and (source.annotations is not None or source.is_segmented):
            raise UserError(
                f'--source: what is written has no room for the boxes of {source.name}: filter the '
                'pictures alone (--source folder)'
            )
        return source
    except TypeError as error:
        unknown = ', '.join(f'--{name}' for name in more if name in str(error))
        if not unknown:
            raise
        raise UserError(f'{unknown}: {given.source} reads no such column') from None


def _prepared(given: Given) -> tuple[str, str, list[str]]:
    """Return (data_dir, name of the dataset, splits) of a folder with dataset_info.json."""
    place = files.place(given.path, given.flag)
    try:
        about = json.loads(files.read(place / 'dataset_info.json'))
        name, splits = about['name'], [split['name'] for split in about['splits']]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{given.flag}: {given.path}/dataset_info.json cannot be read ({error}): name the '
            'folder NAME/VERSION that TensorFlow Datasets wrote'
        ) from error
    above = str(place).rstrip('/').split('/')
    if name not in above:
        raise UserError(f'{given.flag}: {given.path} does not lie in a folder {name}')
    at = len(above) - 1 - above[::-1].index(name)
    *parts, version = above[at:]
    return '/'.join(above[:at]) or '/', f'{"/".join(parts)}:{version}', splits


# --- Reading ---------------------------------------------------------------------------


def read(given: Given, unit: Unit, rows: Collection[int] | None = None) -> Iterator[Example]:
    """Yield the examples of a unit in order; with `rows`, which are sorted, those alone.

    Raises:
      UserError: the shard is damaged.
      OSError: it cannot be read.
    """
    last = max(rows, default=-1) if rows is not None else None
    wanted = frozenset(rows).__contains__ if rows is not None else lambda row: True
    readers = {'tar': _read_tar, 'parquet': _read_parquet}
    with _named(given):
        for example in readers.get(given.source, _read_source)(given, unit, wanted):
            yield example
            if last is not None and example.row >= last:
                return


def _read_tar(given: Given, unit: Unit, wanted: Callable[[int], bool]) -> Iterator[Example]:
    shard = files.place(unit.place, given.flag)
    take = files.forward(shard)
    for row, (name, parts) in enumerate(tar_samples.samples(shard, take)):
        if not wanted(row):
            continue
        fields: dict[str, Any] = {ending: take(*at) for ending, at in parts.items()}
        # The picture is a.png rather than a.mask.png, whichever comes first.
        pictures = [('.' in part, part) for part in parts if kind_of(f'x.{part}') == 'image']
        ending = min(pictures, key=lambda picture: picture[0])[1] if pictures else ''
        where = tar_format.place_of(shard, *parts[ending]) if ending else f'{shard}: {name}'
        yield Example(row, name, where, fields.pop(ending, None), ending, fields)


def _read_parquet(given: Given, unit: Unit, wanted: Callable[[int], bool]) -> Iterator[Example]:
    shard = files.place(unit.place, given.flag)
    column = given.image_column or 'image'
    for row, values in columns.rows(shard, wanted):
        if column not in values:
            raise UserError(
                f'{shard}: no column {column!r} (it has {", ".join(values)}): set --image_column'
            )
        data = values.pop(column)
        if isinstance(data, dict):
            data = data.get('bytes')
        if isinstance(data, str):
            raise UserError(f'{shard}: column {column!r} holds text: set --image_column')
        stem = shard.name.partition('.')[0]
        yield Example(row, f'{stem}-{row:08d}', f'{shard}, row {row}', data, '', values)


def _read_source(given: Given, unit: Unit, wanted: Callable[[int], bool]) -> Iterator[Example]:
    source = _source(given)
    root = str(files.place(given.path, given.flag)).rstrip('/') + '/'
    for index in range(unit.start, unit.stop):
        row = index - unit.start
        if not wanted(row):
            continue
        where = source.place(index)
        name, ending = f'{index:09d}', ''
        if given.source == 'folder':
            path = PurePosixPath(where.removeprefix(root))
            name, ending = str(path.with_suffix('')), path.suffix[1:].lower()
        data, fields = None, {}
        with contextlib.suppress(OSError):
            loaded = source.load(np.array([index], np.int64))
            data = loaded.get('image', [None])[0]
            fields = _fields(source, loaded)
        yield Example(row, name, where, data, ending, fields)


def _fields(source: Source, loaded: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if 'text' in loaded:
        fields['text'] = loaded['text'][0]
    label, names = np.asarray(loaded['label'][0]), source.class_names
    if label.ndim == 0 and source.num_classes > 1:
        number = int(label)
        fields['label'] = names[number] if names and names[number] else number
    elif label.ndim:
        fields['label'] = [names[n] if names and names[n] else n for n in label.tolist()]
    return fields


def where(given: Given, unit: Unit, row: int) -> str:
    """Return where an example lies, as far as that is known without reading a shard."""
    if given.source in SHARDED:
        return f'{unit.place}, row {row}'
    return _source(given).place(unit.start + row)


# --- What comes with a picture ---------------------------------------------------------


def text_of(given: Given, example: Example) -> str | None:
    """Return the caption of an example."""
    column = given.text_column or ('txt' if given.source == 'tar' else 'text')
    text = value_of(example, column)
    return text if isinstance(text, str) or text is None else str(text)


def value_of(example: Example, column: str) -> Any:
    """Return the value of a column or member, or of a key in the one called json; else None."""
    if column in example.fields:
        value = example.fields[column]
        return value.decode('utf-8-sig', 'replace').strip() if isinstance(value, bytes) else value
    inside: Any = None
    if isinstance(example.fields.get('json'), bytes | str):
        with contextlib.suppress(ValueError, RecursionError):
            inside = json.loads(example.fields['json'])
    for found in (inside, example.fields):
        for part in column.split('.'):
            found = found.get(part) if isinstance(found, dict) else None
        if found is not None:
            return found
    return None


def columns_of(example: Example) -> list[str]:
    """List what `value_of` finds in an example, for messages."""
    names = [name for name in example.fields if name != 'json']
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
        names += list(json.loads(example.fields['json']).keys())
    return names
