"""Rows of Parquet files, read a group at a time, and written."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from big_vit.data import files
from big_vit.errors import UserError

_BATCH_ROWS = 64
# Rows of a group: what a reader at random must decode at least.
_GROUP_ROWS = 100


def rows(file: files.Place, wanted: Callable[[int], bool]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number, values by column) of the rows that are wanted, in order.

    Raises:
      UserError: the file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with file.system.open(file.path, 'rb') as handle:
            parquet = pq.ParquetFile(handle)
            first = 0
            for group in range(parquet.metadata.num_row_groups):
                count = parquet.metadata.row_group(group).num_rows
                if any(map(wanted, range(first, first + count))):
                    yield from _rows_of(parquet, group, first, wanted)
                first += count
    except pa.ArrowException as error:
        reason = ' '.join(str(error).split())[:200]
        raise UserError(f'{file}: cannot be read ({reason}): copy it again') from error


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

    with file.system.open(file.path, 'rb') as handle:
        return pq.read_schema(handle)


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
