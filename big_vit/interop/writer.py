"""Write our weights for other codebases: convert the model, map the arrays, add the configs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from big_vit import trees
from big_vit.errors import UserError
from big_vit.interop import (
    detectors,
    files,
    fit,
    formats,
    google,
    huggingface,
    layout,
    openclip,
    timm_vit,
)
from big_vit.interop.fit import Model
from big_vit.interop.formats import WRITE
from big_vit.interop.layout import Arrays
from big_vit.interop.weights import META, Weights


def _convert(
    weights: Weights, to: str, architecture: str | None = None
) -> tuple[Model, dict[str, Any]]:
    """Convert a model to one that the format can hold and that computes the same function.

    Returns:
      The converted model, and the layout of its arrays in the file.

    Raises:
      UserError: the format cannot hold such a model; the message says why.
    """
    params = {n: np.asarray(leaf) for n, leaf in trees.flatten(weights.params).items()}
    meta = {**dict.fromkeys(META), **weights.meta}
    model = Model(params, fit.complete(weights.settings), meta)
    if to in google.FORMATS:
        return google.convert(to, model)
    if to in timm_vit.FORMATS:
        return timm_vit.convert(to, model)
    if to in openclip.FORMATS:
        return openclip.convert(model, architecture)
    if to in huggingface.FORMATS:
        return huggingface.convert(to, model)
    if to in detectors.FORMATS:
        return detectors.convert(to, model, weights.learnt)
    raise UserError(f'--to {to}: not a format that is written; these are: {", ".join(WRITE)}')


def _peer_arrays(model: Model, to: str, file_layout: Mapping[str, Any]) -> Arrays:
    """Return the arrays of a converted model under the peer's names.

    Raises:
      UserError: the parameters do not match the settings.
    """
    shapes = layout.shapes_of(model.settings, model.meta)
    have = {name: array.shape for name, array in model.params.items()}
    wrong = [n for n in {**shapes, **have} if have.get(n) != shapes.get(n)]
    if wrong:
        raise UserError(
            f'--to {to}: the parameters are not those of the settings: {", ".join(wrong[:8])}'
        )
    arrays = layout.to_theirs(
        formats.rules_of(to, model.settings, shapes, file_layout), model.params
    )
    return google.wrapped(arrays, file_layout) if to in google.FORMATS else arrays


def write(
    path: str | Path,
    to: str,
    weights: Weights,
    drop: Sequence[str] = (),
    architecture: str | None = None,
) -> Path:
    """Write weights in a peer's format and return the path that the peer loads.

    Args:
      path: a folder; for google-research formats, a .npz file.
      to: one of WRITE.
      weights: `settings` may omit fields that have the model's defaults; `meta` needs image_size
        and channels.
      drop: regexes of our parameter names to leave out; only the head and pre_logits can be.
      architecture: for open_clip, the timm model that implements the tower.

    Raises:
      UserError: the format cannot hold such a model, or it cannot be written.
    """
    path = Path(path).expanduser()
    if drop:
        flat = trees.flatten(weights.params)
        left, dropped = layout.drop(flat, drop, 'the checkpoint')
        model = fit.without_dropped(
            Model(left, fit.complete(weights.settings), weights.meta), dropped
        )
        weights = weights._replace(params=trees.unflatten(model.params), settings=model.settings)
    model, file_layout = _convert(weights, to, architecture)
    arrays = _peer_arrays(model, to, file_layout)
    constants = {}
    if to in huggingface.FORMATS:
        constants = huggingface.constants(to, model, file_layout)
    if to in detectors.FORMATS:
        assert weights.learnt is not None
        arrays, constants = detectors.arrays_of(to, arrays, model.settings, weights.learnt)
    about = {
        'format': to,
        'settings': model.settings,
        'meta': {key: value for key, value in model.meta.items() if key in META},
        'layout': file_layout,
        'filled': sorted(constants),
    }
    if to in google.FORMATS:
        if path.suffix != '.npz':
            raise UserError(f'--out {path}: {to} is one file, whose name must end in .npz')
        files.write_npz(path, arrays, about)
        return path
    if path.exists() and not path.is_dir():
        raise UserError(f'--out {path}: {to} is a folder, and this is a file')
    if to == 'timm':
        config_files = timm_vit.config_of(model, file_layout)
    elif to in openclip.FORMATS:
        config_files = openclip.config_of(model, file_layout)
    elif to in detectors.FORMATS:
        assert weights.learnt is not None
        config_files = detectors.config_of(to, model, file_layout, weights.learnt)
    else:
        config_files = huggingface.config_of(to, model, file_layout)
    name = openclip.WEIGHTS if to in openclip.FORMATS else 'model.safetensors'
    files.write_safetensors(path / name, {**arrays, **constants}, about)
    for file, tree in config_files.items():
        files.write_json(path / file, tree)
    return path
