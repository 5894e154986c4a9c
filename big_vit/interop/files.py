"""Read and write weight files without executing their contents, and never leave one half-written.

Supported are NumPy archives (.npz), safetensors, PyTorch's files (`torch_files`), and an index of
several files of the last two kinds.
"""

import contextlib
import functools
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import ml_dtypes
import numpy as np

from big_vit.errors import UserError
from big_vit.interop import torch_files
from big_vit.interop.layout import Arrays

# Key of our own settings in the metadata of a safetensors file or the comment of a .npz archive.
KEY = 'big_vit'
# Endings of files of PyTorch that stand for themselves; a .bin has a config beside it.
_SINGLE = ('.pt', '.pth', '.pth.tar', '.ckpt', '.pkl', '.pickle')
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_LFS = b'version https://git-lfs'
_FLOATS = (np.dtype(np.float32), _BFLOAT16)
_ROUNDED = (np.dtype(np.float16), np.dtype(np.float64))  # These become float32.
_SAFETENSORS_TYPES = ('F16', 'BF16', 'F32', 'F64', 'I8', 'I16', 'I32', 'I64', 'U8', 'BOOL')


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
      UserError: the file is unreadable or holds something else.
    """
    tree = read_value(path)
    if not isinstance(tree, dict):
        raise UserError(f'{path}: must hold a JSON object, not {type(tree).__name__}')
    return tree


def read_value(path: Path) -> Any:
    """Read any JSON; raises UserError if it is unreadable."""
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'{path}: cannot be read as JSON: {error}') from None


# Dictionaries of arrays in a file, by the dotted keys that lead to each; most have one, named ''.
# An array is read when it is called for: files hold optimizers and averages, too.
Sections = dict[str, dict[str, Callable[[], np.ndarray]]]


def read(path: Path) -> tuple[Sections, dict[str, str]]:
    """Open a weight file.

    Returns:
      What reads each array, by section and name, and the text metadata embedded in the file.

    Raises:
      UserError: the file is missing, damaged or of another kind.
    """
    if not path.is_file():
        raise UserError(f'{path}: there is no such file')
    with path.open('rb') as file:
        if file.read(len(_LFS)) == _LFS:
            raise UserError(f'{path}: a pointer of Git LFS, not the file itself: run git lfs pull')
    sections: Sections
    metadata: dict[str, str] = {}
    if path.suffix == '.npz':
        arrays, metadata = _read_npz(path)
        sections = {'': {name: functools.partial(lambda x: x, x) for name, x in arrays.items()}}
    elif path.name.endswith('.index.json'):
        sections, metadata = _read_parts(path)
    elif path.suffix == '.safetensors':
        sections, metadata = _read_safetensors(path)
    elif is_single(path) or path.suffix == '.bin':
        sections = torch_files.read(path)
    else:
        raise UserError(
            f'{path}: not a kind of file that holds weights: .npz, .safetensors, .bin, '
            f'{", ".join(_SINGLE)}'
        )
    if not any(sections.values()):
        raise UserError(f'{path}: there are no arrays in it')
    return sections, metadata


def is_weights(name: str) -> bool:
    """Whether a path or URL is, by its ending, a file that `read` reads."""
    return name.endswith(('.npz', '.safetensors', '.bin', '.index.json', *_SINGLE))


def is_single(path: PurePath) -> bool:
    """Whether a file of PyTorch stands for itself, whatever configs lie beside it."""
    return path.name.endswith(_SINGLE)


def as_float(array: np.ndarray, where: str) -> np.ndarray:
    """Return the array as float32, or as bfloat16 if that is how it is stored.

    NumPy does not know bfloat16: an archive stores it as the 2-byte void type V2.

    Raises:
      UserError: the array is not of floating-point numbers, too coarse, or not finite.
    """
    if array.dtype == np.dtype('V2'):
        array = array.view(_BFLOAT16)
    array = array.astype(array.dtype.newbyteorder('='), copy=False)
    if array.dtype not in (*_FLOATS, *_ROUNDED):
        raise UserError(
            f'{where} is of type {array.dtype}: weights are of float16, bfloat16, float32 or '
            'float64; quantised ones need their scales: save the model as it was before that'
        )
    stored = array
    with np.errstate(over='ignore'):  # What becomes infinite is told below.
        array = array if array.dtype in _FLOATS else array.astype(np.float32)
    if not np.isfinite(array).all():
        bad = int(np.size(array) - np.isfinite(array).sum())
        what = 'NaN or infinite' if not np.isfinite(stored).all() else 'beyond float32'
        raise UserError(f'{where}: {bad} of its {array.size} numbers are {what}: a damaged model')
    return array


def _read_npz(path: Path) -> tuple[Arrays, dict[str, str]]:
    if not zipfile.is_zipfile(path):
        raise UserError(f'{path}: cannot be read: it is not a NumPy archive')
    try:
        with zipfile.ZipFile(path) as file:
            torch_files.check_zip(path, file)
            comment = file.comment
        with np.load(path, allow_pickle=False) as archive:
            # Anything else, such as a folder or a note, is given as bytes.
            found = {name: archive[name] for name in archive.files}
            arrays = {name: x for name, x in found.items() if isinstance(x, np.ndarray)}
    except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile) as error:
        if 'pickle' in str(error).lower():
            raise UserError(
                f'{path}: holds Python objects, which reading could run; load it where you trust '
                'it and save its arrays again: np.savez(out, **{name: np.asarray(array)}), each of '
                'floating-point numbers'
            ) from None
        raise UserError(f'{path}: cannot be read: {" ".join(str(error).split())[:200]}') from None
    return arrays, _metadata_of_comment(comment)


def _metadata_of_comment(comment: bytes) -> dict[str, str]:
    with contextlib.suppress(ValueError, RecursionError):
        metadata = json.loads(comment)
        if isinstance(metadata, dict) and KEY in metadata:
            return {KEY: json.dumps(metadata[KEY])}
    return {}


def _read_safetensors(path: Path) -> tuple[Sections, dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    def get(name: str) -> np.ndarray:
        with open_() as file:
            kind = file.get_slice(name).get_dtype()
            if kind not in _SAFETENSORS_TYPES:
                raise UserError(
                    f'{path}: {name} is of type {kind}: weights are of F16, BF16, F32 or F64; '
                    'quantised ones need their scales: save the model as it was before that'
                )
            return file.get_tensor(name)

    @contextlib.contextmanager
    def open_() -> Iterator[Any]:
        try:
            with safe_open(path, framework='numpy') as file:
                yield file
        except (OSError, SafetensorError, TypeError, AttributeError, KeyError) as error:
            shown = ' '.join(str(error).split())[:200]
            raise UserError(f'{path}: cannot be read as safetensors: {shown}') from None

    with open_() as file:
        names, metadata = list(file.keys()), file.metadata() or {}
    return {'': {name: functools.partial(get, name) for name in names}}, metadata


def _read_parts(index: Path) -> tuple[Sections, dict[str, str]]:
    names = read_json(index).get('weight_map')
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise UserError(f'{index}: has no weight_map of array to file')
    arrays: dict[str, Callable[[], np.ndarray]] = {}
    metadata: dict[str, str] = {}
    for name in sorted(set(names.values())):
        # Accept only files beside the index: a crafted index must not reach other paths.
        if name != os.path.basename(name) or not name.endswith(('.safetensors', '.bin')):  # noqa: PTH119
            raise UserError(
                f'{index}: {name!r} is not the name of a .safetensors or .bin file beside it'
            )
        if not (index.parent / name).is_file():
            raise UserError(f'{index}: the part {name} is not there')
        shards, shard_metadata = read(index.parent / name)
        whole = shards.get('', {}).items()
        arrays.update({array: get for array, get in whole if names.get(array, name) == name})
        metadata.update(shard_metadata)
    absent = [name for name in names if name not in arrays]
    if absent:
        raise UserError(
            f'{index}: {len(absent)} arrays are in none of its files, first {absent[0]}'
        )
    return {'': arrays}, metadata


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it on success.

    Raises:
      UserError: the file cannot be written.
    """
    partial = path.with_name(f'.{path.name}.partial')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise UserError(f'{path}: cannot be written: {error.strerror or error}') from None
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, tree: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write a JSON file, indented; raises UserError if it cannot be written."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(tree, indent=2) + '\n', encoding='utf-8')


def write_npz(path: Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Write an uncompressed .npz archive, with our metadata in the zip comment.

    An extra entry would be taken for a parameter by the codebases that read such files.
    """
    with replacing(path) as partial:
        with partial.open('wb') as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        with zipfile.ZipFile(partial, 'a') as archive:
            archive.comment = json.dumps({KEY: about}).encode('ascii')


def write_safetensors(
    path: Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]
) -> None:
    """Write one safetensors file with our settings in its metadata."""
    from safetensors.numpy import save_file

    # Hugging Face refuses files that do not name a framework.
    metadata = {'format': 'pt', KEY: json.dumps(about)}
    with replacing(path) as partial:
        # safetensors creates files with mode 0600; keep the mode that the umask gives, like that of
        # the config beside it.
        partial.touch()
        mode = partial.stat().st_mode
        save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, partial, metadata)
        partial.chmod(mode)
