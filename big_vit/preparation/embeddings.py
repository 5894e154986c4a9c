"""Feature vectors that `predict --embed` wrote, found again by where each example lies."""

import hashlib
import io
from collections.abc import Iterator

import numpy as np

from big_vit.data import files
from big_vit.errors import UserError

_ROWS = 4096


def place_hash(place: str) -> int:
    """Return 64 bits of where an example lies."""
    digest = hashlib.blake2b(place.encode('utf-8', 'backslashreplace'), digest_size=8).digest()
    return int.from_bytes(digest, 'little')


def row_type(width: int) -> np.dtype:
    """Return the type of rows that have the hash of a place and a vector."""
    return np.dtype([('key', '<u8'), ('vector', '<f4', (width,))])


def parts(path: str) -> list[files.Place]:
    """List the files of vectors at a path.

    Raises:
      UserError: there are none.
    """
    place = files.place(path, '--embeddings')
    try:
        names = [entry.name for entry in files.entries(place)] if files.is_folder(place) else None
        found = [place] if names is None else [place / name for name in names]
        found = [file for file in found if file.name.endswith(('.parquet', '.npz'))]
        if not found or not all(map(files.exists, found)):
            raise UserError(
                f'--embeddings: no .parquet or .npz in {path}: they are what '
                '`python -m big_vit.predict RUN ... --embed OUT` writes'
            )
    except OSError as error:
        raise UserError(f'--embeddings: {path} cannot be read ({error})') from error
    return found


def read(file: files.Place) -> Iterator[np.ndarray]:
    """Yield the rows of a file, some thousand at a time, as `row_type`.

    Raises:
      UserError: it holds no vectors.
    """
    try:
        if file.name.endswith('.npz'):
            with np.load(io.BytesIO(files.read(file)), allow_pickle=False) as arrays:
                yield from _rows(arrays['files'].tolist(), arrays['features'])
            return
        import pyarrow.parquet as pq

        with file.system.open(file.path, 'rb') as handle:
            for batch in pq.ParquetFile(handle).iter_batches(_ROWS, columns=['file', 'embedding']):
                vectors = batch['embedding'].flatten().to_numpy(zero_copy_only=False)
                yield from _rows(batch['file'].to_pylist(), vectors.reshape(batch.num_rows, -1))
    except (OSError, ValueError, KeyError) as error:  # Those of Arrow are ValueErrors.
        reason = ' '.join(str(error).split())[:200]
        raise UserError(f'--embeddings: {file} holds no vectors ({reason})') from error


def _rows(places: list[str], vectors: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(places), _ROWS):
        rows = np.zeros(len(places[start : start + _ROWS]), row_type(vectors.shape[1]))
        rows['key'] = [place_hash(place) for place in places[start : start + _ROWS]]
        rows['vector'] = vectors[start : start + _ROWS]
        yield rows
