"""Write a model with the JSON file that describes it, and compare its answers with ours."""

import datetime
import functools
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from big_vit import __version__, trees
from big_vit.build.task import build_task
from big_vit.data.transforms import grammar, text
from big_vit.deployment import graph, stablehlo
from big_vit.deployment.functions import Function, functions_of, pair_logits
from big_vit.errors import UserError
from big_vit.inspection.loaded_model import LoadedModel
from big_vit.interop import files

FORMATS = ('onnx', 'stablehlo')
DESCRIPTION, TOKENIZER = 'model.json', 'tokenizer.json'
# Bytes of parameters above which they are a file of their own: protobuf has room for 2 GiB, and XLA
# takes minutes to compile a program that holds hundreds of megabytes.
MOST_INSIDE = {'onnx': (1 << 31) - (1 << 26), 'stablehlo': 1 << 26}
# Bytes; runtimes map files into memory by pages.
_LEAST_BESIDE, _ALIGNED = 1024, 4096
# Rounding of a deep network in float32; a wrong operator is far beyond.
_MOST_DIFFERENCE = 1e-3

Run = Callable[[Mapping[str, np.ndarray]], Mapping[str, Any]]


def write(
    out: str | Path,
    to: str,
    loaded: LoadedModel,
    *,
    transform: str | None = None,
    class_names: Sequence[str] | None = None,
    licence: str | None = None,
    most_inside: int | None = None,
) -> list[str]:
    """Write a model to a folder, and return lines that say what was written.

    Args:
      out: the folder.
      to: one of FORMATS.
      transform: how pictures are prepared, instead of what the evaluation says.
      class_names: instead of those that are known.
      licence: of the weights.
      most_inside: bytes of parameters above which they are a file of their own; by default those
        of MOST_INSIDE.

    Raises:
      UserError: the format cannot hold the model, a library is missing, the folder cannot be
        written, or answers of the file differ.
    """
    folder = Path(out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f'--out {folder}: {to} is a folder, and this is a file')
    about: dict[str, Any] = {
        'format': to,
        **(_onnx_versions() if to == 'onnx' else {'jax': jax.__version__}),
        'big_vit': __version__,
        'date': datetime.datetime.now(datetime.UTC).date().isoformat(),
        **_origin(loaded, licence),
        'files': {},
        **_outputs(loaded, class_names),
    }
    lines: list[str] = []
    most_inside = MOST_INSIDE[to] if most_inside is None else most_inside
    functions = [
        _channels_first(function) if to == 'onnx' else function
        for function in functions_of(loaded, unrolled=to == 'onnx')
    ]
    inputs = {name for function in functions for name in function.inputs}
    about |= _pictures(loaded, transform) if {'image', 'patches'} & inputs else {}
    about |= _text(loaded, folder) if 'tokens' in inputs else {}
    for function in functions:
        path = folder / f'{function.name}.{to}'
        apart = sum(x.nbytes for x in function.params.values()) > most_inside
        lines += _write_one(path, function, about, apart)
    files.write_json(folder / DESCRIPTION, about)
    lines.append(f'         {folder / DESCRIPTION} says how it is used')
    return lines


def _write_one(path: Path, function: Function, about: dict[str, Any], apart: bool) -> list[str]:
    """Write one file and say in `about` what it is; it is gone again if it answers otherwise."""
    described: dict[str, Any] = {
        'inputs': _described(function, about['format']),
        'outputs': _results(function),
    }
    about['files'][path.name] = described
    if about['format'] == 'onnx':
        _write_onnx(path, function, about, apart)
        run = _onnx_session(path)
    else:
        if apart:
            described['weights'] = path.with_suffix('.safetensors').name
        run = stablehlo.write(path, function, apart)
    lines = [f'wrote    {path}: {_signature(described)}']
    if run is None:
        return [*lines, 'checked  nothing: onnxruntime is not installed']
    try:
        return [*lines, f'checked  answers differ by at most {_difference(function, run):.1e}']
    except UserError:
        path.unlink()
        raise


def _onnx_versions() -> dict[str, Any]:
    try:
        import onnx
    except ImportError:
        raise UserError("--to onnx needs onnx: pip install 'big_vit[onnx]'") from None
    return {'opset': graph.OPSET, 'onnx': onnx.__version__}


def _origin(loaded: LoadedModel, licence: str | None) -> dict[str, Any]:
    known = loaded.foreign_weights.meta if loaded.foreign_weights else {}
    pairs = {
        'source': loaded.path,
        'part': loaded.part,
        'licence': licence or known.get('licence'),
        'parameters': trees.count(loaded.params),
    }
    return {name: value for name, value in pairs.items() if value is not None}


def _pictures(loaded: LoadedModel, transform: str | None) -> dict[str, Any]:
    """Say how a picture becomes the input: in words, or as the text of the operations alone."""
    try:
        prepared = loaded.preparation(transform)
    except UserError as error:
        if transform is not None:
            raise
        print(f'WARNING: {error}', file=sys.stderr)
        return {}
    operations = {'operations': prepared.text}
    try:
        found = prepared.preprocessing(loaded.image_size, loaded.channels)
    except UserError as error:
        print(
            f'WARNING: {error}: {DESCRIPTION} gives the operations as text alone', file=sys.stderr
        )
        return {'preprocessing': operations}
    target = found.resize.size
    shorter = isinstance(target, int)
    print(f'pictures {found}')
    words = {
        'colour': 'RGB' if len(found.mean) == 3 else 'grey',
        'turned_upright': found.is_turned,
        'resize': {'shorter_side': target} if shorter else {'height_width': list(target)},  # type: ignore[arg-type]
        'interpolation': found.resize.method,
        'crop': list(found.size),
        'range': [0, 1],
        'mean': list(found.mean),
        'std': list(found.std),
    }
    return {'preprocessing': words | operations}


def _text(loaded: LoadedModel, folder: Path) -> dict[str, Any]:
    """Say how a text becomes tokens; a tokenizer's file is put beside the model."""
    assert loaded.config is not None
    operations = loaded.config.data.transform
    calls = grammar.parse(operations, size=loaded.image_size, key='config: data.transform')
    found: dict[str, Any] = {'operations': operations}
    for call in calls:
        if call.name == 'lower':
            found['lower'] = True
        if call.name == 'byte_tokens':
            found |= {'tokenizer': 'bytes', 'first_byte': text.FIRST_BYTE, 'end': text.END}
            found |= {'padding': text.PADDING}
        if call.name == 'tokenize':
            file = Path((*call.args, call.kwargs.get('path'))[0]).expanduser()
            found['tokenizer'] = TOKENIZER
            if not file.is_file():
                print(f'WARNING: {file} is not here: put it beside the model', file=sys.stderr)
                continue
            with files.replacing(folder / TOKENIZER) as partial:
                shutil.copyfile(file, partial)
    return {'text': found}


def _outputs(loaded: LoadedModel, class_names: Sequence[str] | None) -> dict[str, Any]:
    """Say what logits mean: of which classes, or of pairs."""
    if pairs := pair_logits(loaded):
        return dict(pairs)
    head = trees.flatten(loaded.params).get('head/kernel')
    if head is None:
        return {}
    sigmoid = bool(loaded.foreign_weights and loaded.foreign_weights.meta.get('multi_label'))
    if loaded.config is not None:
        sigmoid = build_task(loaded.config.task).logits_loss == 'sigmoid'
    names = class_names or loaded.class_names or ()
    count = head.shape[-1]
    shown = [names[i] if i < len(names) and names[i] else str(i) for i in range(count)]
    return {'activation': 'sigmoid' if sigmoid else 'softmax', 'classes': shown}


def _channels_first(function: Function) -> Function:
    """Take images as [channels, height, width], as runtimes of ONNX are given them."""
    if 'image' not in function.inputs:
        return function
    (height, width, channels), dtype = function.inputs['image']

    def apply(params: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
        image = jax.numpy.transpose(inputs['image'], (0, 2, 3, 1))
        return function.apply(params, {**inputs, 'image': image})

    inputs = {**function.inputs, 'image': ((channels, height, width), dtype)}
    return function._replace(apply=apply, inputs=inputs)


def _described(function: Function, to: str) -> dict[str, Any]:
    described: dict[str, Any] = {
        name: {'shape': [graph.BATCH, *shape], 'dtype': dtype.name}
        for name, (shape, dtype) in function.inputs.items()
    }
    if 'image' in described:
        described['image']['layout'] = 'NCHW' if to == 'onnx' else 'NHWC'
    return described


def _results(function: Function) -> dict[str, Any]:
    inputs = {n: jax.ShapeDtypeStruct((1, *s), d) for n, (s, d) in function.inputs.items()}
    results = jax.eval_shape(function.apply, function.params, inputs)
    return {
        name: {'shape': [graph.BATCH, *results[name].shape[1:]], 'dtype': results[name].dtype.name}
        for name in function.outputs
    }


def _signature(described: Mapping[str, Any]) -> str:
    def listed(arrays: Mapping[str, Any]) -> str:
        return ', '.join(f'{n} [{", ".join(map(str, a["shape"]))}]' for n, a in arrays.items())

    return f'{listed(described["inputs"])} -> {listed(described["outputs"])}'


def _write_onnx(path: Path, function: Function, about: Mapping[str, Any], apart: bool) -> None:
    import onnx

    def make(tensor: Callable[[np.ndarray, str], Any] | None = None) -> Any:
        texts = {'big_vit': json.dumps(about)}
        return graph.make_model(*function[1:], texts, tensor)

    if apart:
        # Array by array, for no message of protobuf may ever hold them all.
        data = path.with_name(f'{path.name}.data')
        with files.replacing(data) as partial, partial.open('wb') as file:
            model = make(functools.partial(_beside, file, data.name))
    else:
        model = make()
    with files.replacing(path) as partial:
        onnx.save_model(model, partial)
        onnx.checker.check_model(str(partial), full_check=True)


def _beside(file: BinaryIO, location: str, value: np.ndarray, name: str) -> Any:
    """Write an initialiser to a file of many, and return the entry that says where it is."""
    from onnx import TensorProto, helper, numpy_helper

    if value.nbytes < _LEAST_BESIDE:
        return numpy_helper.from_array(value, name)
    file.seek(-(-file.tell() // _ALIGNED) * _ALIGNED)
    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
    entry = TensorProto(name=name, data_type=kind, dims=value.shape)
    entry.data_location = TensorProto.EXTERNAL
    where = {'location': location, 'offset': file.tell(), 'length': value.nbytes}
    for key, number in where.items():
        entry.external_data.add(key=key, value=str(number))
    file.write(np.ascontiguousarray(value, value.dtype.newbyteorder('<')).data)
    return entry


def _onnx_session(path: Path) -> Run | None:
    """Open a file by onnxruntime; None where that is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, dict(inputs)), strict=True))


def _difference(function: Function, run: Run) -> float:
    """Return by how much answers to random inputs differ at most from ours.

    Raises:
      UserError: by more than rounding.
    """
    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        if dtype.kind == 'f':
            return rng.standard_normal((2, *shape)).astype(dtype)
        whole = rng.integers(0, 2, (2, *shape)).astype(dtype)
        whole[:, :1] = 1  # One word is there at least.
        return whole

    inputs = {name: draw(*spec) for name, spec in function.inputs.items()}
    ours, theirs = jax.jit(function.apply)(function.params, inputs), run(inputs)
    worst = 0.0
    for name, value in ours.items():
        wanted, found = np.asarray(value), np.asarray(theirs[name])
        difference = float(np.abs(wanted - found).max())
        if not difference <= _MOST_DIFFERENCE * max(1.0, float(np.abs(wanted).max())):
            raise UserError(
                f'{function.name}: {name} differs by {difference:.1e} from what the model answers: '
                'it is not written; please report this'
            )
        worst = max(worst, difference)
    return worst
