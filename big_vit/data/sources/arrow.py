"""Columns of Parquet and Arrow files as pyarrow tables that can be read by row."""

import concurrent.futures
import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from big_vit.data import blocks, files
from big_vit.data.recent import Recent
from big_vit.data.sources.base import locate
from big_vit.data.sources.classes import check_lists
from big_vit.errors import UserError

# Parquet has no access by row. Below this size it is read into memory, still encoded; above, each
# group of rows is copied into an Arrow file, which has, when it is first needed.
IN_MEMORY_BYTES = 1 << 30
# Arrow files that are mapped at a time, and row groups where there is no disk for them.
_MAPPED, _GROUP_BYTES = 256, 1 << 30
# Files whose footers or small columns are read at a time.
_THREADS = 16
# Decoded at a time, far below the 2 GiB that an Arrow array of bytes can hold.
_BATCH_BYTES = 64 << 20
_BATCH_ROWS = 1000


def is_parquet(file: files.Place) -> bool:
    return file.name.endswith('.parquet')


def read_table(
    shards: list[files.Place], columns: dict[str, str], key: str
) -> tuple[Any, list[int]]:
    """Open some columns of Parquet or Arrow files.

    Args:
      shards: files of one kind.
      columns: for each column the config key that sets its name.
      key: section of the config, for error messages.

    Returns:
      (a pyarrow Table, its number of rows from each file).

    Raises:
      UserError: a file cannot be read, or its columns do not fit.
    """
    if shards[0].is_local and not is_parquet(shards[0]):
        return _map_tables(shards, columns, key)
    return _read_or_convert(shards, columns, key)


def _map_tables(
    shards: list[files.Place], columns: dict[str, str], key: str
) -> tuple[Any, list[int]]:
    import pyarrow as pa

    parts: list[Any] = []
    for file in shards:
        part = _map_file(file)
        _need_columns(part.schema, columns, file, key)
        schema = parts[0].schema if parts else None
        parts.append(_cast(part.select(list(columns)), schema, file))
    return pa.concat_tables(parts), [len(part) for part in parts]


def _read_or_convert(
    shards: list[files.Place], columns: dict[str, str], key: str
) -> tuple[Any, list[int]]:
    import pyarrow as pa

    names = list(columns)
    found = files.stored(shards)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        inspected = list(pool.map(lambda file: _inspect(file, names), found))
    for file, (schema, _, _) in zip(shards, inspected, strict=True):
        _need_columns(schema, columns, file, key)
    groups = [groups for _, groups, _ in inspected]
    rows, total = [sum(each) for each in groups], sum(size for _, _, size in inspected)
    if not any(rows):
        raise UserError(f'{shards[0]}: has no rows')
    if total <= IN_MEMORY_BYTES:
        return pa.Table.from_batches(list(_batches(shards, names))), rows
    if is_parquet(shards[0]) and not _copy_of(shards, names).exists():
        return GroupedTable(found, groups, inspected[0][0], names), rows
    return _map_file(_convert(shards, names, total), 'delete it, and it is made again'), rows


class GroupedTable:
    """Columns of Parquet files that are read one group of rows at a time.

    A group becomes an Arrow file on the local disk when it is first needed, and is dropped when
    room is needed; see `blocks`.

    Attributes:
      schema: of all files, with the metadata of the first.
      lengths: rows of each group, int64 [groups].
    """

    def __init__(
        self, shards: list[files.Stored], groups: list[list[int]], schema: Any, columns: list[str]
    ):
        self._shards, self._columns = shards, columns
        self.schema = schema
        self._places = [
            (file, group) for file, rows in enumerate(groups) for group in range(len(rows))
        ]
        self.lengths = np.array([rows for each in groups for rows in each], np.int64)
        self._ends = np.cumsum(self.lengths)
        self._table = Recent(self._opened, _GROUP_BYTES)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def column(self, name: str) -> Any:
        """Read a small column of all rows, such as labels."""
        import pyarrow as pa

        def read(shard: files.Stored) -> Any:
            batches = list(_parquet_batches(shard.place, [name]))
            field = pa.schema([self.schema.field(name)])
            return (
                _cast(pa.Table.from_batches(batches, batches[0].schema), field, shard.place)
                if (batches)
                else field.empty_table()
            )

        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            return pa.concat_tables(pool.map(read, self._shards)).column(name)

    def media(self, column: str, kind: str) -> 'tuple[str, GroupedColumn, GroupedColumn | None]':
        """Return what `media_column` does, of values that are read when they are needed."""
        kind, _, paths = media_column(self.schema.empty_table(), column, kind)

        def opened(group: int) -> tuple[tuple[Any, ...], int]:
            return media_column(self._table(group), column, kind)[1:], 1

        parts = Recent(opened, _MAPPED)
        values = GroupedColumn(lambda group: parts(group)[0], self._ends)
        where = GroupedColumn(lambda group: parts(group)[1], self._ends)
        return kind, values, None if paths is None else where

    def expect(self, indices: np.ndarray, soon: bool = False) -> None:
        """Begin to read the groups of some rows; nothing smaller could come `soon`."""
        if soon:
            return
        for group in np.unique(np.searchsorted(self._ends, indices, side='right')).tolist():
            blocks.later(self._table, group)

    def _opened(self, group: int) -> tuple[Any, int]:
        file, number = self._places[group]
        shard = self._shards[file]

        def read() -> Any:
            import pyarrow.parquet as pq

            with _reading(shard.place), _open(shard) as handle:
                # What a group has of a column is one range, and comes in few requests.
                parquet = pq.ParquetFile(handle, pre_buffer=not shard.place.is_local)
                return _cast(
                    parquet.read_row_group(number, self._columns, use_threads=False),
                    _selected(self.schema, self._columns),
                    shard.place,
                )

        def copied() -> bytes:
            import pyarrow as pa

            sink = pa.BufferOutputStream()
            table = read()
            with pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
            return sink.getvalue().to_pybytes()

        path = blocks.kept_file(shard, self._columns, f'{number}.arrow', copied)
        if path is None:
            table = read()
            return table, table.nbytes
        with contextlib.suppress(UserError):  # It was dropped meanwhile.
            table = _map_file(files.place(str(path), 'cache'), 'delete it')
            return table, _GROUP_BYTES // _MAPPED
        table = read()
        return table, table.nbytes


def _selected(schema: Any, columns: list[str]) -> Any:
    import pyarrow as pa

    return pa.schema([schema.field(name) for name in columns], schema.metadata)


class GroupedColumn:
    """Values by row of a column that is read in groups."""

    def __init__(self, column: 'Callable[[int], Column]', ends: np.ndarray):
        self._column, self._ends = column, ends

    def __getitem__(self, index: int) -> Any:
        group, row = locate(index, self._ends)
        return self._column(group)[row]


@contextlib.contextmanager
def _reading(file: files.Place, advice: str = 'copy it again') -> Iterator[None]:
    """Turn exceptions of Arrow into a UserError that names the file."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = ' '.join(str(error).split())[:200]
        raise UserError(f'{file}: cannot be read ({reason}): {advice}') from error


def _open(file: files.Place | files.Stored) -> Any:
    import pyarrow as pa

    place = file.place if isinstance(file, files.Stored) else file
    if place.is_local:
        files.check_regular(place.path)
        return pa.OSFile(place.path)
    stored = file if isinstance(file, files.Stored) else files.stored([file])[0]
    return pa.PythonFile(files.Ranges(stored), mode='r')


def _map_file(file: files.Place, advice: str = 'copy it again') -> Any:
    """Return a pyarrow Table over a local Arrow file or stream, memory-mapped."""
    import pyarrow as pa

    with _reading(file, advice):
        files.check_regular(file.path)
        try:
            table = pa.ipc.open_file(pa.memory_map(file.path)).read_all()
        except pa.ArrowInvalid:
            table = pa.ipc.open_stream(pa.memory_map(file.path)).read_all()
        # Offsets of a damaged file would be followed wherever they point.
        table.validate(full=True)
    return table


def _need_columns(schema: Any, columns: dict[str, str], file: files.Place, key: str) -> None:
    for column, name in columns.items():
        if schema.names.count(column) > 1:
            raise UserError(f'{file}: has several columns {column!r}: rename all but one of them')
        if column not in schema.names:
            raise UserError(
                f'{file}: no column {column!r} (it has {", ".join(schema.names)}): '
                f'set {key}.{name} to the one that is meant'
            )


def _cast(table: Any, schema: Any, file: files.Place) -> Any:
    """Cast a table to the column types of the first file; None is a schema not known yet."""
    import pyarrow as pa

    if schema is None or table.schema.equals(schema):
        return table
    try:
        return table.cast(schema)
    except (pa.ArrowException, ValueError) as error:
        theirs, ours = (
            ', '.join(f'{field.name}: {field.type}' for field in fields)
            for fields in (schema, table.schema)
        )
        raise UserError(
            f'{file}: its columns ({ours}) do not fit those of the first file ({theirs}): see '
            'whether they belong together'
        ) from error


def _inspect(stored: files.Stored, columns: list[str]) -> tuple[Any, list[int], int]:
    """Return (schema, rows by group, bytes of the columns in memory) of a file not mapped."""
    import pyarrow.parquet as pq

    file = stored.place
    with _reading(file):
        if is_parquet(file):
            with _open(stored) as handle:
                parquet = pq.ParquetFile(handle)
                metadata = parquet.metadata
                rows = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
                return parquet.schema_arrow, rows, _column_bytes(metadata, columns)
        with _open(stored) as handle:
            schema = _arrow_reader(handle).schema

        def count() -> dict[str, np.ndarray]:
            return {'rows': np.array([sum(map(len, _arrow_batches(file, [])))])}

        # The number of rows of a stream is known at its end only, and a remote one is slow to read.
        mark = files.fingerprint_of([stored])
        rows = files.kept_arrays('arrow_rows', mark, count)['rows'][0]
        return schema, [int(rows)], stored.size


def _column_bytes(metadata: Any, columns: list[str]) -> int:
    """Return the uncompressed bytes of some columns of a Parquet file."""
    total = 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for number in range(row_group.num_columns):
            column = row_group.column(number)
            # Each field of a column of structs is a column here.
            if any(f'{column.path_in_schema}.'.startswith(f'{name}.') for name in columns):
                total += column.total_uncompressed_size
    return total


def _convert(shards: list[files.Place], columns: list[str], total: int) -> files.Place:
    """Copy columns to an Arrow file, a few rows at a time, unless an earlier copy exists."""
    target = _copy_of(shards, columns)
    folder = target.parent
    if target.exists():
        return files.place(str(target), 'cache')
    kind = 'Parquet' if is_parquet(shards[0]) else 'Arrow'
    print(
        f'data    copying {total / 1e9:.1f} GB of {kind} once to {target}, where it can be read '
        'by row',
        file=sys.stderr,
        flush=True,
    )
    temporary: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False, suffix='.new') as copy:
            temporary = Path(copy.name)
            _write_batches(_batches(shards, columns), copy)
        temporary.replace(target)
    except OSError as error:
        raise UserError(
            f'{folder}: cannot be written ({error}): make room for {total / 1e9:.1f} GB, or set '
            'BIG_VIT_CACHE to another folder'
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return files.place(str(target), 'cache')


def _copy_of(shards: list[files.Place], columns: list[str]) -> Path:
    return files.cache_folder() / 'parquet' / f'{files.fingerprint(shards, columns)}.arrow'


def _write_batches(batches: Iterator[Any], file: Any) -> None:
    import pyarrow as pa

    first = next(batches)
    with pa.ipc.new_file(file, first.schema) as writer:
        writer.write_batch(first)
        for batch in batches:
            writer.write_batch(batch)


def _batches(shards: list[files.Place], columns: list[str]) -> Iterator[Any]:
    """Yield all rows of some files, a few at a time, with the types of the first file."""
    import pyarrow as pa

    schema = None
    for file in shards:
        read = _parquet_batches if is_parquet(file) else _arrow_batches
        for batch in read(file, columns):
            table = _cast(pa.Table.from_batches([batch]), schema, file)
            schema = table.schema if schema is None else schema
            yield from table.to_batches()


def _parquet_batches(file: files.Place, columns: list[str]) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with _reading(file), _open(file) as handle:
        # With a buffer, a column is read as it is decoded and not a group of rows at once.
        parquet = pq.ParquetFile(handle, buffer_size=1 << 20)
        metadata = parquet.metadata
        row_bytes = max(1, _column_bytes(metadata, columns) // max(1, metadata.num_rows))
        rows = min(_BATCH_ROWS, max(1, _BATCH_BYTES // row_bytes))
        yield from parquet.iter_batches(rows, columns=columns)


def _arrow_reader(handle: Any) -> Any:
    import pyarrow as pa

    is_file = handle.read(6) == b'ARROW1'
    handle.seek(0)
    return pa.ipc.open_file(handle) if is_file else pa.ipc.open_stream(handle)


def _arrow_batches(file: files.Place, columns: list[str]) -> Iterator[Any]:
    with _reading(file), _open(file) as handle:
        reader = _arrow_reader(handle)
        count = getattr(reader, 'num_record_batches', None)
        for batch in reader if count is None else map(reader.get_batch, range(count)):
            batch.validate(full=True)
            yield batch.select(columns) if columns else batch


class Labels:
    """A column of labels.

    Attributes:
      values: the different label values.
      codes: indices into `values`, the labels of all rows concatenated, int32.
      ends: where the labels of each row end in `codes`, int64; None if each row has one.
    """

    def __init__(self, table: Any, column: str, place: str, split: str):
        """Read a column; UserError if a row has no label, or labels are nested."""
        import pyarrow as pa
        import pyarrow.compute as pc

        labels = table.column(column)
        if labels.null_count:
            missing = [chunk.is_null().to_numpy(zero_copy_only=False) for chunk in labels.chunks]
            row = int(np.flatnonzero(np.concatenate(missing))[0])
            raise UserError(f'{place}: row {row} of {split} has no {column!r}')
        dtype, types = labels.type, pa.types
        self.ends: np.ndarray | None = None
        if types.is_list(dtype) or types.is_large_list(dtype) or types.is_fixed_size_list(dtype):
            self.ends = np.cumsum(pc.list_value_length(labels).to_numpy(), dtype=np.int64)
            labels = pc.list_flatten(labels)
        if types.is_dictionary(labels.type):
            labels = labels.cast(labels.type.value_type)
        if types.is_nested(labels.type):
            raise UserError(
                f'{place}: column {column!r} holds {dtype}: labels are numbers or names'
            )
        chunks = labels.dictionary_encode('encode').unify_dictionaries().chunks
        self.values: list[Any] = chunks[-1].dictionary.to_pylist() if chunks else []
        codes = [chunk.indices.to_numpy(zero_copy_only=False) for chunk in chunks]
        self.codes = np.concatenate([np.zeros(0, np.int32), *codes]).astype(np.int32)
        if self.ends is not None:
            check_lists(self.values, self.codes, self.ends, f'{place}: column {column!r}')

    @classmethod
    def none(cls, rows: int) -> 'Labels':
        """Return the label 0 for each of some rows without one."""
        labels = cls.__new__(cls)
        labels.values, labels.codes, labels.ends = [0], np.zeros(rows, np.int32), None
        return labels

    def numbered(self, indices: np.ndarray, numbers: np.ndarray) -> Any:
        """Return int32 [B], or a list of B such arrays; `numbers` has the class of each value."""
        if self.ends is None:
            return numbers[self.codes[indices]]
        starts = np.where(indices > 0, self.ends[indices - 1], 0)
        rows = zip(starts.tolist(), self.ends[indices].tolist(), strict=True)
        return [numbers[self.codes[start:end]] for start, end in rows]


class Objects:
    """A column of the objects in pictures: a struct of lists, or a list of structs.

    Attributes:
      ends: where the objects of each row end, int64 [rows].
      boxes: four numbers each, float64 [n, 4].
      labels: their classes.
      crowd: whether each is a crowd, bool [n].
      area: of each, float64 [n], or None.
    """

    def __init__(self, table: Any, column: str, place: str, split: str):
        """Read a column; UserError if it has no boxes with classes."""
        import pyarrow as pa
        import pyarrow.compute as pc

        stored = table.column(column)
        is_listed = pa.types.is_list(stored.type) or pa.types.is_large_list(stored.type)
        kind = stored.type.value_type if is_listed else stored.type
        fields = {field.name for field in kind} if pa.types.is_struct(kind) else set()
        names = {part: fields & names for part, names in _FIELDS.items()}
        what = f'{place}: column {column!r}'
        if not names['boxes'] or not names['labels']:
            raise UserError(f'{what} has no bbox with category (it has {kind})')

        def values(part: str) -> Any:
            name = min(names[part])
            if is_listed:
                return pc.struct_field(pc.list_flatten(stored), name)
            return pc.list_flatten(pc.struct_field(stored, name))

        lists = stored if is_listed else pc.struct_field(stored, min(names['boxes']))
        lengths = pc.list_value_length(lists).fill_null(0).to_numpy()
        self.ends = np.cumsum(lengths, dtype=np.int64)
        boxes, count = values('boxes'), int(lengths.sum())
        sides = np.unique(pc.list_value_length(boxes).fill_null(0).to_numpy())
        if sides.tolist() not in ([], [4]):
            raise UserError(f'{what} has boxes that are not of four numbers')
        self.boxes = pc.list_flatten(boxes).to_numpy().astype(np.float64).reshape(-1, 4)
        # Read as a column of labels is.
        self.labels = Labels(pa.table({'category': values('labels')}), 'category', what, split)
        crowd = (
            values('crowd').cast(pa.int64()).fill_null(0).to_numpy()
            if names['crowd']
            else np.zeros(count)
        )
        self.crowd = crowd.astype(bool)
        self.area = values('area').to_numpy().astype(np.float64) if names['area'] else None
        if not len(self.boxes) == len(self.labels.codes) == len(self.crowd) == count:
            raise UserError(f'{what} has lists of different lengths in a row')


# What published sets call the parts of an object.
_FIELDS = {
    'boxes': {'bbox', 'bboxes', 'boxes'},
    'labels': {'category', 'categories', 'category_id', 'label', 'labels'},
    'crowd': {'iscrowd', 'is_crowd'},
    'area': {'area'},
}


class Column:
    """Values of a chunked column by row."""

    def __init__(self, chunks: list[Any]):
        self._chunks = chunks
        self._ends = np.cumsum([len(chunk) for chunk in chunks])

    def __getitem__(self, index: int) -> Any:
        chunk, row = locate(index, self._ends)
        return self._chunks[chunk][row].as_py()


def media_column(
    table: Any, column: str, kind: str
) -> tuple[str, Column | GroupedColumn, Column | GroupedColumn | None]:
    """Return (kind, bytes or texts by row, paths by row or None) of a column.

    Args:
      kind: of the values if they are bytes.

    Raises:
      UserError: it contains neither bytes nor texts; without the file and the key.
    """
    import pyarrow as pa

    if isinstance(table, GroupedTable):
        return table.media(column, kind)
    dtype, types = table.column(column).type, pa.types
    chunks = table.column(column).chunks
    if types.is_struct(dtype):
        names = [dtype.field(i).name for i in range(dtype.num_fields)]
        if 'bytes' in names:
            parts = [dict(zip(names, chunk.flatten(), strict=True)) for chunk in chunks]
            paths = Column([part['path'] for part in parts]) if 'path' in names else None
            return kind, Column([part['bytes'] for part in parts]), paths
    if types.is_string(dtype) or types.is_large_string(dtype) or types.is_string_view(dtype):
        return 'text', Column(chunks), None
    if types.is_binary(dtype) or types.is_large_binary(dtype) or types.is_binary_view(dtype):
        return kind, Column(chunks), None
    raise UserError(f'column {column!r} holds {dtype}, not the bytes of images')
