"""Read and write weight files without executing their contents, and never leave one half-written.

Supported are NumPy archives (.npz), safetensors (a single file, or shards listed in an index), and
PyTorch zip files, which torch itself reads with `weights_only=True`.
"""

import contextlib
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from big_vit.errors import UserError
from big_vit.interop.layout import Arrays

# Key of our own settings in the metadata of a safetensors file or the comment of a .npz archive.
KEY = 'big_vit'
PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl', '.pickle')
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_FLOATS = (np.dtype(np.float32), _BFLOAT16)


def advice(path: Path) -> str:
    """Return instructions for converting a pickled file to safetensors."""
    return (
        'convert it once where you trust it: python -c "import torch, safetensors.torch as s; '
        f"d = torch.load('{path.name}', map_location='cpu', weights_only=True); "
        "d = d.get('state_dict', d.get('model', d)); "
        "s.save_file({k: v.contiguous().clone() for k, v in d.items()}, 'model.safetensors')\""
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
      UserError: the file is unreadable or holds something else.
    """
    try:
        tree = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'{path}: cannot be read as JSON: {error}') from None
    if not isinstance(tree, dict):
        raise UserError(f'{path}: must hold a JSON object, not {type(tree).__name__}')
    return tree


def read(path: Path) -> tuple[Arrays, dict[str, str]]:
    """Read the arrays and metadata of a weight file.

    Returns:
      Arrays by name in float32 or bfloat16, and the text metadata embedded in the file.

    Raises:
      UserError: the file is missing, damaged or of another kind, or would have to be unpickled.
    """
    if not path.is_file():
        raise UserError(f'{path}: there is no such file')
    if path.suffix == '.npz':
        arrays, metadata = _read_npz(path)
    elif path.name.endswith('.safetensors.index.json'):
        arrays, metadata = _read_parts(path)
    elif path.suffix == '.safetensors':
        arrays, metadata = _read_safetensors(path)
    elif path.suffix in PICKLES:
        arrays, metadata = _read_torch(path), {}
    else:
        raise UserError(
            f'{path}: not a kind of file that holds weights: .npz, .safetensors, or (with torch '
            f'installed) {", ".join(PICKLES[:3])}'
        )
    if not arrays:
        raise UserError(f'{path}: there are no arrays in it')
    return {name: _as_float(array, f'{path}: {name}') for name, array in arrays.items()}, metadata


def _as_float(array: np.ndarray, where: str) -> np.ndarray:
    """Return the array as float32, or as bfloat16 if that is how it is stored.

    NumPy does not know bfloat16: an archive stores it as the 2-byte void type V2.
    """
    if array.dtype == np.dtype('V2'):
        array = array.view(_BFLOAT16)
    if array.dtype in _FLOATS:
        return array
    if (
        array.dtype.kind in 'fiub'
    ):  # Integers are no weights, but stay so that they can be reported or dropped.
        return array.astype(np.float32)
    raise UserError(f'{where} is of type {array.dtype}: weights are floating-point numbers')


def _read_npz(path: Path) -> tuple[Arrays, dict[str, str]]:
    if not zipfile.is_zipfile(path):
        raise UserError(f'{path}: cannot be read: it is not a NumPy archive')
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        with zipfile.ZipFile(path) as file:
            comment = file.comment
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
    with contextlib.suppress(ValueError):
        metadata = json.loads(comment)
        if isinstance(metadata, dict) and KEY in metadata:
            return {KEY: json.dumps(metadata[KEY])}
    return {}


def _read_safetensors(path: Path) -> tuple[Arrays, dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework='numpy') as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError, TypeError, AttributeError, KeyError) as error:
        shown = ' '.join(str(error).split())[:200]
        raise UserError(f'{path}: cannot be read as safetensors: {shown}') from None


def _read_parts(index: Path) -> tuple[Arrays, dict[str, str]]:
    names = read_json(index).get('weight_map')
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise UserError(f'{index}: has no weight_map of array to file')
    arrays: Arrays = {}
    metadata: dict[str, str] = {}
    for name in sorted(set(names.values())):
        # Accept only files beside the index: a crafted index must not reach other paths.
        if name != os.path.basename(name) or not name.endswith('.safetensors'):  # noqa: PTH119
            raise UserError(f'{index}: {name!r} is not the name of a .safetensors file beside it')
        part = index.parent / name
        if not part.is_file():
            raise UserError(f'{index}: the part {name} is not there')
        shard, shard_metadata = _read_safetensors(part)
        arrays.update(shard)
        metadata.update(shard_metadata)
    absent = [name for name in names if name not in arrays]
    if absent:
        raise UserError(
            f'{index}: {len(absent)} arrays are in none of its files, first {absent[0]}'
        )
    return arrays, metadata


def _read_torch(path: Path) -> Arrays:
    try:
        import torch
    except ImportError:
        raise UserError(
            f'{path}: a pickled file is read by torch only, which is not installed (pip install '
            f'torch); or {advice(path)}'
        ) from None
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # The unpickler, zip reader and disk raise many types.
        shown = ' '.join(str(error).split())[:160]
        raise UserError(
            f'{path}: torch does not read this with weights_only=True, and anything else could run '
            f'what is in it ({shown}); {advice(path)}'
        ) from None
    for key in ('state_dict', 'model', 'teacher'):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise UserError(f'{path}: holds a {type(state).__name__}, not arrays by name')
    not_tensors = [str(name) for name, value in state.items() if not torch.is_tensor(value)]
    if not_tensors:
        raise UserError(f'{path}: {not_tensors[0]} is not an array; {advice(path)}')
    return {str(name): _from_torch(value, torch) for name, value in state.items()}


def _from_torch(tensor: Any, torch: Any) -> np.ndarray:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(_BFLOAT16)
    return tensor.numpy()


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


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
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
