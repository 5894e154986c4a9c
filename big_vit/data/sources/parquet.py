"""Parquet and Arrow files with image bytes, as Hugging Face's `datasets` writes them."""

import contextlib
import fnmatch
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
# What is decoded at a time, far below the 2 GiB that an Arrow array of bytes can hold.
_BATCH_BYTES = 64 << 20
_BATCH_ROWS = 1000
_ENDINGS = ('.parquet', '.arrow')
_NUMBERED = re.compile(r'(?:(.+?)[-_.])?\d+(?:-of-(?P<total>\d+))?(?:-[0-9a-f]{16})?')
_PART = re.compile(r'part[-_.]\d+.*')  # Of Spark and Dask, which know no splits.
_GLOB = re.compile(r'[*?[]')


def _split_of(file: files.Place, folder: str) -> str:
    """The split that a file belongs to, by its name or that of its folder."""
    stem = file.name.rpartition('.')[0]
    match = _NUMBERED.fullmatch(stem)
    word = (match[1] or '') if match else stem
    if _PART.fullmatch(stem):
        word = ''
    named = [name for name in (word, folder) if name not in ('', 'data', 'dataset')]
    return named[0] if named else 'train'


def _splits(root: files.Place, key: str) -> dict[str, list[files.Place]]:
    """The files of each split, in order."""
    try:
        if _GLOB.search(root.name) and not files.exists(root):
            above = root._replace(path=root.path.rpartition('/')[0])
            names = [entry.name for entry in files.entries(above)]
            found = _by_name(above, fnmatch.filter(names, root.name), key)
        elif root.name.endswith(_ENDINGS) and not files.is_folder(root):
            if not files.exists(root):
                raise UserError(f'{key}.path: there is no file {root}')
            found = {_split_of(root, 'train'): [root]}
        elif not files.is_folder(root):
            raise UserError(f'{key}.path: {root} is neither a folder nor a .parquet or .arrow file')
        elif files.exists(root / 'dataset_dict.json'):
            found = {name: _saved(root / name)[1] for name in _saved_splits(root)}
        elif files.exists(root / 'state.json'):
            found = dict([_saved(root)])
        else:
            found = _by_name(root, [entry.name for entry in files.walk(root)], key)
            for shards in found.values():
                _need_all(shards)
    except OSError as error:
        raise UserError(f'{key}.path: cannot read {root}: {error}') from error
    if not any(found.values()):
        raise UserError(f'{key}.path: no .parquet or .arrow file in {root}')
    return found


def _by_name(root: files.Place, names: list[str], key: str) -> dict[str, list[files.Place]]:
    """The files of each split, by what they and their folders are called."""
    found: dict[str, list[files.Place]] = {}
    folders: dict[str, str] = {}
    for path in names:
        folder, _, name = path.rpartition('/')
        if not name.endswith(_ENDINGS) or name.startswith('cache-'):
            continue
        split = _split_of(root / path, folder.rpartition('/')[2] or 'train')
        found.setdefault(split, []).append(root / path)
        if folders.setdefault(split, folder) != folder:
            raise UserError(
                f'{key}.path: files of {split} are in {root / folders[split]} and in '
                f'{root / folder}, which may be other data: set it to one of the two'
            )
    for split, shards in found.items():
        if len({_is_parquet(shard) for shard in shards}) > 1:
            raise UserError(
                f'{key}.path: {root} has both .parquet and .arrow files of {split}: keep one kind'
            )
    return found


def _is_parquet(file: files.Place) -> bool:
    return file.name.endswith('.parquet')


def _need_all(shards: list[files.Place]) -> None:
    """UserError where the names of files say that there is another number of them."""
    totals = []
    for shard in shards:
        match = _NUMBERED.fullmatch(shard.name.rpartition('.')[0])
        if match and match['total']:
            totals.append(int(match['total']))
    for total in set(totals):
        if totals.count(total) != total:
            raise UserError(
                f'{shards[0]}: is one of {total} by its name, but there are '
                f'{totals.count(total)}: copy what is missing, or remove what is older'
            )


def _json(file: files.Place) -> dict[str, Any]:
    try:
        found = json.loads(files.read(file))
    except (ValueError, OSError) as error:
        raise UserError(f'{file}: cannot be read ({error}): copy it again') from error
    if not isinstance(found, dict):
        raise UserError(f'{file}: holds no JSON object: copy it again')
    return found


def _saved_splits(root: files.Place) -> list[str]:
    """The splits of what `DatasetDict.save_to_disk` wrote."""
    names = _json(root / 'dataset_dict.json').get('splits')
    if not isinstance(names, list) or not all(
        isinstance(name, str) and '/' not in name for name in names
    ):
        raise UserError(f'{root}/dataset_dict.json: lists no splits: copy it again')
    for name in names:
        if not files.exists(root / name / 'state.json'):
            raise UserError(f'{root}/dataset_dict.json: there is no {root}/{name}: copy it too')
    return names


def _saved(folder: files.Place) -> tuple[str, list[files.Place]]:
    """(split, files) of what `Dataset.save_to_disk` wrote; other files there may be older."""
    state = _json(folder / 'state.json')
    try:
        names = [str(part['filename']) for part in state['_data_files']]
    except (KeyError, TypeError) as error:
        raise UserError(f'{folder}/state.json: lists no files: copy it again') from error
    for name in names:
        if '/' in name or not files.exists(folder / name):
            raise UserError(f'{folder}/state.json: there is no file {folder}/{name}: copy it too')
    return state.get('_split') or 'train', [folder / name for name in names]


@contextlib.contextmanager
def _reading(file: files.Place, advice: str = 'copy it again') -> Iterator[None]:
    """What Arrow raises becomes a UserError that names the file."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = ' '.join(str(error).split())[:200]
        raise UserError(f'{file}: cannot be read ({reason}): {advice}') from error


def _opened(file: files.Place) -> Any:
    import pyarrow as pa

    return pa.OSFile(file.path) if file.is_local else file.system.open(file.path, 'rb')


def _mapped(file: files.Place, advice: str = 'copy it again') -> Any:
    """A pyarrow Table over a local Arrow file or stream, mapped into memory."""
    import pyarrow as pa

    with _reading(file, advice):
        try:
            table = pa.ipc.open_file(pa.memory_map(file.path)).read_all()
        except pa.ArrowInvalid:
            table = pa.ipc.open_stream(pa.memory_map(file.path)).read_all()
        # Offsets of a damaged file would be followed wherever they point.
        table.validate(full=True)
    return table


def _table(shards: list[files.Place], columns: dict[str, str], key: str) -> tuple[Any, list[int]]:
    """Some columns, to be read by row.

    Args:
      columns: their names, and for each the config key that says it.

    Returns:
      A pyarrow Table, and how many rows of it each file has.
    """
    import pyarrow as pa

    names = list(columns)
    if shards[0].is_local and not _is_parquet(shards[0]):
        parts: list[Any] = []
        for file in shards:
            part = _mapped(file)
            _need_columns(part.schema, columns, file, key)
            parts.append(_alike(part.select(names), parts[0].schema if parts else None, file))
        return pa.concat_tables(parts), [len(part) for part in parts]
    total, rows = 0, []
    for file in shards:
        schema, count, size = _looked_at(file, names)
        _need_columns(schema, columns, file, key)
        total += size
        rows.append(count)
    if not any(rows):
        raise UserError(f'{shards[0]}: has no rows')
    if total <= IN_MEMORY_BYTES:
        return pa.Table.from_batches(list(_batches(shards, names))), rows
    made = _mapped(_converted(shards, names, total), 'delete it, and it is made again')
    return made, rows


def _need_columns(schema: Any, columns: dict[str, str], file: files.Place, key: str) -> None:
    for column, name in columns.items():
        if column not in schema.names:
            raise UserError(
                f'{file}: no column {column!r} (it has {", ".join(schema.names)}): '
                f'set {key}.{name} to the one that is meant'
            )


def _alike(table: Any, schema: Any, file: files.Place) -> Any:
    """A table whose columns have the types that those of the first file have."""
    import pyarrow as pa

    if schema is None or table.schema.equals(schema):
        return table
    try:
        return table.cast(schema)
    except (pa.ArrowException, ValueError) as error:
        theirs, ours = (
            ', '.join(f'{field.name}: {field.type}' for field in one)
            for one in (schema, table.schema)
        )
        raise UserError(
            f'{file}: its columns ({ours}) do not fit those of the first file ({theirs}): see '
            'whether they belong together'
        ) from error


def _looked_at(file: files.Place, columns: list[str]) -> tuple[Any, int, int]:
    """(schema, rows, bytes that the columns take in memory) of a file that is not mapped."""
    import pyarrow.parquet as pq

    with _reading(file):
        if _is_parquet(file):
            with _opened(file) as opened:
                found = pq.ParquetFile(opened)
                metadata = found.metadata
                return found.schema_arrow, metadata.num_rows, _bytes_of(metadata, columns)
        with _opened(file) as opened:
            schema = _arrow_reader(opened).schema

        def count() -> dict[str, np.ndarray]:
            return {'rows': np.array([sum(map(len, _arrow_batches(file, [])))])}

        # The rows of a stream are known at its end only, which is far away.
        rows = files.kept_arrays('arrow_rows', files.fingerprint([file]), count)['rows'][0]
        return schema, int(rows), int(file.system.info(file.path)['size'])


def _bytes_of(metadata: Any, columns: list[str]) -> int:
    """Uncompressed bytes of some columns of a Parquet file."""
    total = 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for number in range(row_group.num_columns):
            column = row_group.column(number)
            # Of a column of structs, each part is a column by itself.
            if any(f'{column.path_in_schema}.'.startswith(f'{name}.') for name in columns):
                total += column.total_uncompressed_size
    return total


def _converted(shards: list[files.Place], columns: list[str], total: int) -> files.Place:
    """An Arrow file with the columns, made a few rows at a time and only once."""
    import pyarrow as pa

    folder = files.cache_folder() / 'parquet'
    target = folder / f'{files.fingerprint(shards, columns)}.arrow'
    if target.exists():
        return files.place(str(target), 'cache')
    kind = 'Parquet' if _is_parquet(shards[0]) else 'Arrow'
    print(
        f'data    copying {total / 1e9:.1f} GB of {kind} once to {target}, where it can be read '
        'by row',
        file=sys.stderr,
        flush=True,
    )
    temporary: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False, suffix='.new') as made:
            temporary = Path(made.name)
            writer = None
            for batch in _batches(shards, columns):
                writer = writer or pa.ipc.new_file(made, batch.schema)
                writer.write_batch(batch)
            assert writer is not None
            writer.close()
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


def _batches(shards: list[files.Place], columns: list[str]) -> Iterator[Any]:
    """All rows of some files, a few at a time, with the types of the first file."""
    import pyarrow as pa

    schema = None
    for file in shards:
        read = _parquet_batches if _is_parquet(file) else _arrow_batches
        for batch in read(file, columns):
            table = _alike(pa.Table.from_batches([batch]), schema, file)
            schema = table.schema if schema is None else schema
            yield from table.to_batches()


def _parquet_batches(file: files.Place, columns: list[str]) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with _reading(file), _opened(file) as opened:
        # With a buffer, a column is read as it is decoded and not a group of rows at once.
        found = pq.ParquetFile(opened, buffer_size=1 << 20)
        each = max(1, _bytes_of(found.metadata, columns) // max(1, found.metadata.num_rows))
        rows = min(_BATCH_ROWS, max(1, _BATCH_BYTES // each))
        yield from found.iter_batches(rows, columns=columns)


def _arrow_reader(opened: Any) -> Any:
    import pyarrow as pa

    is_file = opened.read(6) == b'ARROW1'
    opened.seek(0)
    return pa.ipc.open_file(opened) if is_file else pa.ipc.open_stream(opened)


def _arrow_batches(file: files.Place, columns: list[str]) -> Iterator[Any]:
    with _reading(file), _opened(file) as opened:
        reader = _arrow_reader(opened)
        count = getattr(reader, 'num_record_batches', None)
        for batch in reader if count is None else map(reader.get_batch, range(count)):
            batch.validate(full=True)
            yield batch.select(columns) if columns else batch


class _Labels:
    """A column of labels: which values there are, and which of them each row has.

    Attributes:
      values: all different ones.
      codes: for each label of each row the number of its value, int32.
      ends: where the labels of each row end, int64; None where each row has one.
    """

    def __init__(self, table: Any, column: str, place: str, split: str):
        """UserError where a row has no label."""
        import pyarrow as pa
        import pyarrow.compute as pc

        found = table.column(column)
        if found.null_count:
            missing = [chunk.is_null().to_numpy(zero_copy_only=False) for chunk in found.chunks]
            row = int(np.flatnonzero(np.concatenate(missing))[0])
            raise UserError(f'{place}: row {row} of {split} has no {column!r}')
        kept, types = found.type, pa.types
        self.ends: np.ndarray | None = None
        if types.is_list(kept) or types.is_large_list(kept) or types.is_fixed_size_list(kept):
            self.ends = np.cumsum(pc.list_value_length(found).to_numpy(), dtype=np.int64)
            found = pc.list_flatten(found)
        if types.is_dictionary(found.type):
            found = found.cast(found.type.value_type)
        if types.is_nested(found.type):
            raise UserError(f'{place}: column {column!r} holds {kept}: labels are numbers or names')
        chunks = found.dictionary_encode('encode').unify_dictionaries().chunks
        self.values: list[Any] = chunks[-1].dictionary.to_pylist() if chunks else []
        every = [chunk.indices.to_numpy(zero_copy_only=False) for chunk in chunks]
        self.codes = np.concatenate([np.zeros(0, np.int32), *every]).astype(np.int32)

    def of(self, indices: np.ndarray, numbers: np.ndarray) -> Any:
        """int32 [B], or a list of B such arrays, where `numbers` is the class of each value."""
        if self.ends is None:
            return numbers[self.codes[indices]]
        starts = np.where(indices > 0, self.ends[indices - 1], 0)
        rows = zip(starts.tolist(), self.ends[indices].tolist(), strict=True)
        return [numbers[self.codes[start:end]] for start, end in rows]


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


def _class_names(feature: Any) -> list[str] | None:
    """The names of the classes of a column, or of a column of lists of them."""
    if isinstance(feature, list):  # How older versions write a list.
        return _class_names(feature[0]) if feature else None
    if not isinstance(feature, dict):
        return None
    names = feature.get('names')
    return names if isinstance(names, list) else _class_names(feature.get('feature'))


def _media(table: Any, column: str, feature: Any) -> tuple[str, _Column, Any]:
    """(kind, bytes or texts by row, paths by row or None) of the column of images."""
    import pyarrow as pa

    declared = feature.get('_type', '') if isinstance(feature, dict) else ''
    kind = {'Audio': 'audio', 'Video': 'video'}.get(declared, 'image')
    kept, types = table.column(column).type, pa.types
    chunks = table.column(column).chunks
    if types.is_struct(kept):
        names = [kept.field(i).name for i in range(kept.num_fields)]
        if 'bytes' in names:
            parts = [dict(zip(names, chunk.flatten(), strict=True)) for chunk in chunks]
            paths = _Column([part['path'] for part in parts]) if 'path' in names else None
            return kind, _Column([part['bytes'] for part in parts]), paths
    if types.is_string(kept) or types.is_large_string(kept) or types.is_string_view(kept):
        return 'text', _Column(chunks), None
    if types.is_binary(kept) or types.is_large_binary(kept) or types.is_binary_view(kept):
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
    folders (train/0000.parquet), or what save_to_disk wrote down. Images are bytes, alone or beside
    a path that stands for them where they are missing: one below the folder of the file, or an
    absolute one on this machine. Labels are numbers (with names, where `datasets` wrote them down),
    names, or lists of these, which make 'label' a list. Local Arrow files are mapped into memory.

    Args:
      split: see `base.parse_split`.
      path: a file, a folder, or files by a name with a *; local or anything that fsspec knows.
      num_classes: None for those that are named, or occur in the split `train`.
      key: prefix of the config keys in messages.

    Raises:
      UserError: no files or not all, a damaged one, or a column that is missing or of another kind.
    """
    root = files.place(path, f'{key}.path')
    splits = _splits(root, key)
    title = f'parquet:{root.name}'
    of_labels = {label_column: 'label_column'}
    of_both = {image_column: 'image_column', **of_labels}

    def whole(name: str) -> Source:
        shards = splits[name]
        table, rows = _table(shards, of_both, key)
        if not len(table):
            raise UserError(f'{shards[0]}: has no rows')
        features = _features(table.schema)
        try:
            kind, data, paths = _media(table, image_column, features.get(image_column))
        except UserError as error:
            raise UserError(f'{shards[0]}: {error}: set {key}.image_column') from None
        labels = _Labels(table, label_column, str(shards[0]), name)
        names = _class_names(features.get(label_column))
        known: dict[Any, int] = {}
        classes: tuple[str, ...] | None
        if names and all(type(value) is int for value in labels.values):
            if num_classes is not None and num_classes < len(names):
                raise UserError(
                    f'{key}.num_classes is {num_classes} but {title} has {len(names)} classes: '
                    'set at least that'
                )
            count = num_classes or len(names)
            classes = tuple(names) if count == len(names) else None
        else:
            first = labels
            if name != 'train' and 'train' in splits:
                # Only its classes are asked for, so none of its images is read.
                training = _table(splits['train'], of_labels, key)[0]
                first = _Labels(training, label_column, str(splits['train'][0]), 'train')
            known, count, classes = class_numbers(first.values, num_classes, title, key)

        def number(value: Any) -> int:
            found = known.get(value, value if isinstance(value, int) else -1)
            if not 0 <= found < count:
                raise UserError(
                    f'{shards[0]}: label {value!r} of {name} is not one of {count} classes: '
                    f'set {key}.num_classes, or see whether the splits belong together'
                )
            return found

        numbers = np.array([number(value) for value in labels.values], np.int32)
        ends = np.cumsum(rows)

        def lies(index: int) -> tuple[files.Place, int]:
            which = int(np.searchsorted(ends, index, side='right'))
            return shards[which], index - (int(ends[which - 1]) if which else 0)

        def where(index: int) -> str:
            shard, row = lies(index)
            return f'{shard}, row {row}'

        def read(index: int) -> Any:
            value = data[index]
            if value is not None:
                return value
            at = paths[index] if paths is not None else None
            if not at:
                raise OSError('has neither bytes nor a path')
            shard, _ = lies(index)
            if at.startswith('/') and shard.is_local:
                return files.read(shard._replace(path=at))
            if at.startswith('/') or '..' in at.split('/'):
                raise OSError(f'has no bytes, and its path {at} leads out of the folder')
            return files.read(shard._replace(path=shard.path.rpartition('/')[0]) / at)

        def load(indices: np.ndarray) -> Columns:
            indices = np.asarray(indices, np.int64)
            values = [read(index) for index in indices.tolist()]
            return {kind: values, 'label': labels.of(indices, numbers)}

        return Source(
            name=title,
            split=name,
            length=len(table),
            num_classes=count,
            image_shape=None,
            load=load,
            in_memory=False,
            class_names=classes,
            labels=None if labels.ends is not None else lambda: numbers[labels.codes],
            where=where,
        )

    return cut(title, splits, whole, split, key)
