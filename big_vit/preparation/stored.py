"""Small files of a preparation: written as a whole or not at all, local or in an object store."""

import contextlib
import io
import json
import re
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from big_vit.data import files

# As `partial` names them.
_PARTIAL = re.compile(r'\..+\.[0-9a-f]{32}')


def write(file: files.Place, data: bytes) -> None:
    """Write a file; others see all of it or none."""
    if not file.is_local:
        file.system.pipe_file(file.path, data)  # Objects appear completely or not at all.
        return
    with partial(file) as path:
        path.write_bytes(data)


@contextlib.contextmanager
def partial(file: files.Place) -> Iterator[Path]:
    """Context with a local path to write to, which becomes the file at its end."""
    folder = Path(file.path).parent if file.is_local else Path(tempfile.gettempdir())
    # Of a worker that was left behind by a run that was killed there may be another.
    path = folder / f'.{file.name}.{uuid.uuid4().hex}'
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield path
        if file.is_local:
            path.replace(file.path)
        else:
            file.system.put_file(str(path), file.path)
    finally:
        path.unlink(missing_ok=True)


def forget_partial(folder: files.Place) -> None:
    """Remove what runs that were killed had begun to write into a local folder."""
    for path in Path(folder.path).glob('.*') if folder.is_local else ():
        if _PARTIAL.fullmatch(path.name):
            path.unlink(missing_ok=True)


def write_json(file: files.Place, value: Any) -> None:
    write(file, (json.dumps(value, indent=1, ensure_ascii=False) + '\n').encode())


def read_json(file: files.Place) -> Any:
    return json.loads(files.read(file))


def lines(file: files.Place) -> Iterator[Any]:
    """Yield the JSON values of a file with one a line."""
    for line in files.read(file).decode().splitlines():
        yield json.loads(line)


def packed(arrays: dict[str, np.ndarray]) -> bytes:
    """Return arrays as an .npz."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def unpacked(file: files.Place) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz."""
    with np.load(io.BytesIO(files.read(file)), allow_pickle=False) as arrays:
        return dict(arrays)
