"""Rows of Parquet files, read a group at a time, and written."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from big_vit.data import files
from big_vit.errors import UserError

_BATCH_ROWS = 64
# Rows of a group: what a reader at random must decode at least.
_GROUP_ROWS = 100


@contextlib.contextmanager
def _readable(file: files.Place) -> Iterator[None]:
    """Name the file in errors of Arrow."""
    import pyarrow as pa

    try:
        yield
    except pa.ArrowException as error:
        reason = ' '.join(str(error).split())[:200]
        raise UserError(f'{file}: cannot be read ({reason}): copy it again') from error


def rows(file: files.Place, wanted: Callable[[int], bool]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number, values by column) of the rows that are wanted, in order.

    Raises:
      UserError: the file is damaged.
    """
    import pyarrow.parquet as pq

    with _readable(file), file.system.open(file.path, 'rb') as handle:
        parquet = pq.ParquetFile(handle)
        first = 0
        for group in range(parquet.metadata.num_row_groups):
            count = parquet.metadata.row_group(group).num_rows
            if any(map(wanted, range(first, first + count))):
                yield from _rows_of(parquet, group, first, wanted)
            first += count


def _rows_of(
    parquet: Any, group: int, first: int, wanted: Callable[[int], bool]
) -> Iterator[tuple[int, dict[str, Any]]]:
    for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=[group]):
        for row, number in enumerate(range(first, first + batch.num_rows)):
            if wanted(number):
                yield number, batch.slice(row, 1).to_pylist()[0]
        first += batch.num_rows


def schema_of(file: files.Place) -> Any:
    """Return the schema of a Parquet file, as Arrow has it."""
    import pyarrow.parquet as pq

    with _readable(file), file.system.open(file.path, 'rb') as handle:
        return pq.read_schema(handle)


def check_fits(file: files.Place, first: files.Place, image: str) -> None:
    """Check that what a Parquet file holds has room in the columns of the first, which are written.

    Args:
      image: the column of pictures, which are written as the first has them.

    Raises:
      UserError: a column would be lost, or its values changed.
    """
    import pyarrow as pa

    room = {field.name: field.type for field in schema_of(first)}
    for field in schema_of(file):
        if field.name == image or pa.types.is_null(field.type):
            continue
        if field.type != room.get(field.name):
            there = f'{room[field.name]} in' if field.name in room else 'not in'
            raise UserError(
                f'{file}: column {field.name!r} is {field.type}, and {there} {first}: '
                'write --format tar, or give all files the same columns'
            )


def schema_of_fields(fields: Sequence[str]) -> Any:
    """Return a schema of a name, an image and texts; of a field that is no text, bytes."""
    import pyarrow as pa

    kinds = [('name', pa.string()), ('image', pa.binary())]
    texts = ('text', 'label', 'json')
    kinds += [(field, pa.string() if field in texts else pa.binary()) for field in fields]
    return pa.schema(kinds)


class Writer:
    """Writes rows to a Parquet file, a group at a time."""

    def __init__(self, path: Path, schema: Any):
        import pyarrow.parquet as pq

        self._schema, self._rows = schema, list[dict[str, Any]]()
        self._file = pq.ParquetWriter(path, schema, compression='zstd')

    def write(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) >= _GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            self._file.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows = []

    def close(self) -> None:
        self._flush()
        self._file.close()
