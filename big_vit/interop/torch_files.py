"""Files that `torch.save` writes: zip archives, what it wrote before version 1.6, and TorchScript.

torch is not needed: `pickles` says which tensors there are, their numbers lie beside the pickle.
"""

import functools
import io
import math
import shlex
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from big_vit.errors import UserError
from big_vit.interop import pickles

# What a file of before 1.6 begins with, as a pickle.
_MAGIC = 0x1950A86A20F9469CFC6C
# Metadata of tensors; the largest models have a few MB.
_LARGEST_PICKLE = 512 * 2**20
_DAMAGE = (
    *(OSError, EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError),
    *(OverflowError, MemoryError, RecursionError, RuntimeError, NotImplementedError),
    *(zipfile.BadZipFile, zipfile.LargeZipFile),
)


def advice(path: Path) -> str:
    """Return the command that converts a file which only torch reads to safetensors."""
    return (
        'where you trust it (this runs what is in it), convert it once: python -c "import sys, '
        'torch, safetensors.torch as s; '
        "d = torch.load(sys.argv[1], map_location='cpu', weights_only=False); "
        "d = d if isinstance(d, dict) else d.state_dict(); d = d.get('state_dict', d.get('model', "
        'd)); s.save_file({k: (v.dequantize() if v.is_quantized else v.to_dense())'
        '.contiguous().clone() for k, v in d.items() if '
        f"torch.is_tensor(v)}}, 'model.safetensors')\" {shlex.quote(str(path))}"
    )


def read(path: Path) -> dict[str, dict[str, Callable[[], np.ndarray]]]:
    """Return what reads each array, by section and name (see `files.read`).

    Raises:
      UserError: the file is damaged, or torch has to read it.
    """
    try:
        with path.open('rb') as file:
            head = file.read(262)
            file.seek(0)
            if head[:4] == b'PK\x03\x04':
                tree, fetch = _open_zip(path)
            elif head[257:] == b'ustar':
                raise UserError(
                    f'{path}: a tar archive, as torch wrote before 0.2: take its file out; or, '
                    f'{advice(path)}'
                )
            else:
                tree, fetch = _open_legacy(path, file)
        sections = pickles.sections(tree)
    except _DAMAGE as error:
        raise _damaged(path, error) from None
    for table in sections.values():
        _check_sizes(path, table)
    if not sections:
        raise UserError(
            f'{path}: there are no tensors of PyTorch by name in it; arrays of NumPy are read as '
            '.npz or .safetensors: save them so where you trust the file'
        )
    return {
        place: {name: functools.partial(_array, path, name, x, fetch) for name, x in table.items()}
        for place, table in sections.items()
    }


def _damaged(path: Path, error: BaseException) -> UserError:
    shown = ' '.join(f'{type(error).__name__} {error}'.split())[:160]
    return UserError(f'{path}: cannot be read as a file of PyTorch: {shown}')


def check_zip(path: Path, archive: zipfile.ZipFile) -> None:
    """Raise UserError for an archive with two files of one name, or one to fill the memory."""
    names = [info.filename.removesuffix('.npy') for info in archive.infolist()]
    if len(set(names)) != len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise UserError(f'{path}: has {twice} twice, and does not tell which is meant')
    size = sum(info.file_size for info in archive.infolist())
    if size > 100 * path.stat().st_size + 2**30:
        raise UserError(f'{path}: {path.stat().st_size} bytes that would become {size}')


def _check_sizes(path: Path, table: dict[str, Any]) -> None:
    """Raise UserError where many tensors share few numbers: together they may fill the memory."""
    tensors = [x for x in table.values() if isinstance(x, pickles.Tensor)]
    stored = sum({x.storage.key: x.storage.nbytes for x in tensors}.values())
    if sum(math.prod(x.shape) for x in tensors) > 16 * stored + 2**20:
        raise UserError(f'{path}: its tensors repeat the same numbers again and again')


def _open_zip(path: Path) -> tuple[Any, Callable[[pickles.Storage], bytes]]:
    with zipfile.ZipFile(path) as archive:
        check_zip(path, archive)
        names = {info.filename: info for info in archive.infolist()}
        pickle = next((name for name in names if name.rpartition('/')[2] == 'data.pkl'), None)
        if pickle is None or names[pickle].file_size > _LARGEST_PICKLE:
            raise ValueError(f'it has no data.pkl, but {", ".join(list(names)[:3])}')
        root = pickle.removesuffix('data.pkl')
        if f'{root}byteorder' in names and archive.read(f'{root}byteorder') != b'little':
            raise ValueError('its numbers are big-endian')
        tree = pickles.load(io.BytesIO(archive.read(pickle)))

    @functools.cache
    def fetch(storage: pickles.Storage) -> bytes:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(f'{root}data/{storage.key}')
            if info.file_size != storage.nbytes:
                raise ValueError(f'storage {storage.key} has {info.file_size} bytes')
            return archive.read(info)

    return tree, fetch


def _open_legacy(path: Path, file: BinaryIO) -> tuple[Any, Callable[[pickles.Storage], bytes]]:
    """Read a file of before 1.6: pickles in a row, then each storage behind its length."""
    storages: dict[str, pickles.Storage] = {}
    tree = pickles.load(file, storages)
    places: dict[str, int] = {}
    if tree == _MAGIC:
        for _ in range(2):  # The version, and sizes of numbers.
            pickles.load(file)
        tree = pickles.load(file, storages)
        for key in pickles.load(file):
            count = int.from_bytes(file.read(8), 'little')
            if count != storages[key].size:
                raise ValueError(f'storage {key} has {count} numbers')
            places[key] = file.tell()
            file.seek(storages[key].nbytes, io.SEEK_CUR)

    @functools.cache
    def fetch(storage: pickles.Storage) -> bytes:
        with path.open('rb') as file:
            if places[storage.key] + storage.nbytes > path.stat().st_size:
                raise ValueError(f'it ends before storage {storage.key}')
            file.seek(places[storage.key])
            return file.read(storage.nbytes)

    return tree, fetch


def _array(
    path: Path, name: str, tensor: Any, fetch: Callable[[pickles.Storage], bytes]
) -> np.ndarray:
    if isinstance(tensor, pickles.Opaque):
        raise UserError(
            f'{path}: {name} is made by {tensor.name} and not a dense tensor; {advice(path)}'
        )
    try:
        return pickles.dense(tensor, fetch(tensor.storage))
    except _DAMAGE as error:
        raise _damaged(path, error) from None
