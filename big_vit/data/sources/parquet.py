"""Parquet and Arrow files with image bytes, as Hugging Face's `datasets` writes them."""

import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from big_vit.data import files
from big_vit.data.sources.base import Columns, Source, cut
from big_vit.data.sources.table import class_numbers
from big_vit.errors import UserError

# Parquet cannot be read by row. Below this it is read into memory, still encoded; above, the two
# columns are copied once into an Arrow file, which can.
IN_MEMORY_BYTES = 1 << 30
_ENDINGS = ('.parquet', '.arrow')
_NUMBERED = re.compile(r'(?:(.+?)[-_.])?\d+(?:-of-\d+)?(?:-[0-9a-f]{16})?')


def _split_of(file: files.Place, folder: str) -> str:
    """The split that a file belongs to, by its name or that of its folder."""
    stem = file.name.rpartition('.')[0]
    match = _NUMBERED.fullmatch(stem)
    word = (match[1] or '') if match else stem
    named = [name for name in (word, folder) if name not in ('', 'data', 'dataset')]
    return named[0] if named else 'train'


def _splits(root: files.Place, key: str) -> dict[str, list[files.Place]]:
    """The files of each split, in order."""
    if root.name.endswith(_ENDINGS) and '*' not in root.name:
        if not files.exists(root):
            raise UserError(f'{key}.path: there is no file {root}')
        return {_split_of(root, 'train'): [root]}
    if not files.is_folder(root):
        raise UserError(f'{key}.path: {root} is neither a folder nor a .parquet or .arrow file')
    found: dict[str, list[files.Place]] = {}
    for entry in files.walk(root):
        folder, _, name = entry.name.rpartition('/')
        if name.endswith(_ENDINGS) and not name.startswith('cache-'):
            at = root / entry.name
            found.setdefault(_split_of(at, folder.rpartition('/')[2] or 'train'), []).append(at)
    if not found:
        raise UserError(f'{key}.path: no .parquet or .arrow file in {root}')
    return found


def _open_arrow(file: files.Place) -> Any:
    """A pyarrow Table over an Arrow file or stream, mapped into memory where it is local."""
    import pyarrow as pa

    source = pa.memory_map(file.path) if file.is_local else pa.py_buffer(files.read(file))
    try:
        return pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid:
        if file.is_local:
            source = pa.memory_map(file.path)
        return pa.ipc.open_stream(source).read_all()


def _table(shards: list[files.Place], columns: list[str], key: str) -> Any:
    """The columns of some files as one pyarrow Table that can be read by row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = shards[0]
    try:
        if file.name.endswith('.arrow'):
            parts = []
            for file in shards:
                parts.append(_open_arrow(file))
                _need_columns(parts[-1].schema, columns, file, key)
            return pa.concat_tables([part.select(columns) for part in parts])
        total, schema = 0, None
        for file in shards:
            with file.system.open(file.path, 'rb') as opened:
                found = pq.ParquetFile(opened)
                schema = found.schema_arrow
                _need_columns(schema, columns, file, key)
                total += _bytes_of(found.metadata, columns)
        if total > IN_MEMORY_BYTES:
            return _open_arrow(_converted(shards, columns, total))
        parts = []
        for file in shards:
            with file.system.open(file.path, 'rb') as opened:
                parts.append(pq.ParquetFile(opened).read(columns))
        return pa.concat_tables(parts)
    except (pa.ArrowException, OSError) as error:
        reason = ' '.join(str(error).split())[:200]
        raise UserError(f'{file}: cannot be read ({reason}): copy it again') from error


def _need_columns(schema: Any, columns: list[str], file: files.Place, key: str) -> None:
    for column, name in zip(columns, ('image_column', 'label_column'), strict=True):
        if column not in schema.names:
            raise UserError(
                f'{file}: no column {column!r} (it has {", ".join(schema.names)}): '
                f'set {key}.{name} to the one that is meant'
            )


def _bytes_of(metadata: Any, columns: list[str]) -> int:
    """Uncompressed bytes of some columns of a Parquet file."""
    total = 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for number in range(row_group.num_columns):
            column = row_group.column(number)
            if column.path_in_schema.partition('.')[0] in columns:
                total += column.total_uncompressed_size
    return total


def _converted(shards: list[files.Place], columns: list[str], total: int) -> files.Place:
    """An Arrow file with the columns, made a row group at a time and only once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = files.cache_folder() / 'parquet'
    target = folder / f'{files.fingerprint(shards, columns)}.arrow'
    if not target.exists():
        print(
            f'data    copying {total / 1e9:.1f} GB of Parquet once to {target}, where it can be '
            'read by row',
            file=sys.stderr,
            flush=True,
        )
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False, suffix='.new') as made:
            writer = None
            for batch in _batches(shards, columns, pq):
                if writer is None:
                    writer = pa.ipc.new_file(made, batch.schema)
                writer.write_batch(batch)
            assert writer is not None
            writer.close()
        Path(made.name).replace(target)
    return files.place(str(target), 'cache')


def _batches(shards: list[files.Place], columns: list[str], pq: Any) -> Iterator[Any]:
    for file in shards:
        with file.system.open(file.path, 'rb') as opened:
            yield from pq.ParquetFile(opened).iter_batches(1000, columns=columns)


class _Column:
    """Values of a column of a Table by row, of any number of chunks."""

    def __init__(self, chunks: list[Any]):
        self._chunks = chunks
        self._ends = np.cumsum([len(chunk) for chunk in chunks])

    def __getitem__(self, index: int) -> Any:
        which = int(np.searchsorted(self._ends, index, side='right'))
        before = int(self._ends[which - 1]) if which else 0
        return self._chunks[which][index - before].as_py()


def _features(schema: Any) -> dict[str, Any]:
    """What `datasets` wrote down of the columns; {} where it did not."""
    try:
        found = json.loads((schema.metadata or {}).get(b'huggingface', b'{}'))
        return found.get('info', {}).get('features', {}) or {}
    except (ValueError, AttributeError):
        return {}


def _media(table: Any, column: str, features: dict[str, Any]) -> tuple[str, _Column, Any]:
    """(kind, bytes or texts by row, paths by row or None) of the column of images."""
    import pyarrow as pa

    declared = features.get(column)
    declared = declared.get('_type', '') if isinstance(declared, dict) else ''
    kind = {'Audio': 'audio', 'Video': 'video'}.get(declared, 'image')
    kept = table.column(column).type
    chunks = table.column(column).chunks
    if pa.types.is_struct(kept):
        names = [kept.field(i).name for i in range(kept.num_fields)]
        flat = [chunk.flatten() for chunk in chunks]
        if 'bytes' not in names:
            raise UserError(f'column {column!r} holds {kept}, not the bytes of images')
        data = _Column([parts[names.index('bytes')] for parts in flat])
        paths = None
        if 'path' in names:
            paths = _Column([parts[names.index('path')] for parts in flat])
        return kind, data, paths
    if pa.types.is_string(kept) or pa.types.is_large_string(kept):
        return 'text', _Column(chunks), None
    if pa.types.is_binary(kept) or pa.types.is_large_binary(kept):
        return kind, _Column(chunks), None
    raise UserError(f'column {column!r} holds {kept}, not the bytes of images')


def parquet(
    split: str,
    path: str,
    image_column: str = 'image',
    label_column: str = 'label',
    num_classes: int | None = None,
    key: str = 'data',
) -> Source:
    """Parquet files, or Arrow files as `Dataset.save_to_disk` leaves them.

    Splits are what the names of the files begin with (train-00000-of-00002.parquet), or their
    folders (train/0000.parquet). Images are bytes, alone or beside a path; labels numbers (with
    names, where `datasets` wrote them down), names, or lists of these, which make 'label' a list.

    Args:
      split: see `base.parse_split`.
      path: a file or folder, local or anything that fsspec knows.
      num_classes: None for those that are named, or occur in the split `train`.
      key: prefix of the config keys in messages.

    Raises:
      UserError: no files, a damaged one, or a column that is missing or of another kind.
    """
    root = files.place(path, f'{key}.path')
    splits = _splits(root, key)
    title = f'parquet:{root.name}'
    tables: dict[str, Any] = {}

    def table_of(name: str) -> Any:
        if name not in tables:
            tables[name] = _table(splits[name], [image_column, label_column], key)
            if not len(tables[name]):
                raise UserError(f'{splits[name][0]}: has no rows')
        return tables[name]

    def labels_of(name: str) -> tuple[list[Any], bool]:
        every = table_of(name).column(label_column).to_pylist()
        several = any(isinstance(label, list) for label in every)
        missing = next((i for i, label in enumerate(every) if label is None), None)
        if missing is not None:
            raise UserError(f'{splits[name][0]}: row {missing} of {name} has no {label_column!r}')
        return every, several

    def whole(name: str) -> Source:
        table = table_of(name)
        features = _features(table.schema)
        try:
            kind, data, paths = _media(table, image_column, features)
        except UserError as error:
            raise UserError(f'{splits[name][0]}: {error}: set {key}.image_column') from None
        every, several = labels_of(name)
        declared = features.get(label_column)
        declared = declared.get('feature', declared) if isinstance(declared, dict) else {}
        names = declared.get('names') if isinstance(declared, dict) else None
        known = every if 'train' not in splits else labels_of('train')[0]
        occurring = [v for label in known for v in label] if several else known
        if names and isinstance(next(iter(occurring), 0), int):
            count = num_classes or len(names)
            classes: tuple[str, ...] | None = tuple(names) if count == len(names) else None
            numbers: dict[Any, int] = {i: i for i in range(len(names))}
        else:
            numbers, count, classes = class_numbers(occurring, num_classes, title, key)

        def number(value: Any) -> int:
            found = numbers.get(value, value if isinstance(value, int) else -1)
            if not 0 <= found < count:
                raise UserError(
                    f'{splits[name][0]}: label {value!r} of {name} is not one of {count} classes: '
                    f'set {key}.num_classes, or see whether the splits belong together'
                )
            return found

        if several:
            labels: Any = [np.array([number(v) for v in label], np.int32) for label in every]
        else:
            labels = np.array([number(label) for label in every], np.int32)
        # A row lies in the file in which that many rows have been.
        place = str(splits[name][0]) if len(splits[name]) == 1 else f'{root} ({name})'

        def read(index: int) -> Any:
            value = data[index]
            if value is None:
                at = paths[index] if paths is not None else None
                if not at:
                    raise OSError('has neither bytes nor a path')
                return files.read(files.place(at, place) if '/' in at else root / at)
            return value

        def load(indices: np.ndarray) -> Columns:
            rows = indices.tolist()
            label = [labels[i] for i in rows] if several else labels[indices]
            return {kind: [read(i) for i in rows], 'label': label}

        return Source(
            name=title,
            split=name,
            length=len(table),
            num_classes=count,
            image_shape=None,
            load=load,
            in_memory=False,
            class_names=classes,
            labels=None if several else lambda: labels,
            where=lambda index: f'{place}, row {index}',
        )

    return cut(title, splits, whole, split, key)
