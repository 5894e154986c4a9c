"""Weights in and out: `read` those of any other codebase, `write` ours for it.

Formats are recognised from the file. Arrays change names and layout only, so what goes in and out
again is the same bits; what a file does not hold or holds in excess is an error. What arrays do not
show (epsilon, activation, pooling, normalisation of images, licence, source) travels as settings
and metadata.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from big_vit import trees
from big_vit.errors import UserError
from big_vit.interop import files, fit, google, huggingface, layout, openclip, timm_vit
from big_vit.interop.fit import Model
from big_vit.interop.layout import Arrays, Rule, Shapes

READ = (*google.FORMATS, *timm_vit.FORMATS, *huggingface.FORMATS, *openclip.FORMATS)
WRITE = (*google.FORMATS, 'timm', *huggingface.FORMATS, *openclip.FORMATS)
META = (
    'format', 'architecture', 'image_size', 'channels', 'mean', 'std', 'crop_pct', 'interpolation',
    'licence', 'source', 'dropped',
)  # fmt: skip
# Where weights may lie in a folder, the likeliest first.
_IN_FOLDER = (
    'model.safetensors',
    'model.safetensors.index.json',
    openclip.WEIGHTS,
    'open_clip_pytorch_model.bin',
    'pytorch_model.bin',
)
_TUPLES = ('patch_size', 'resnet', 'stride', 'image_size', 'mean', 'std', 'dropped')


class Weights(NamedTuple):
    """A model from elsewhere, or for elsewhere.

    Attributes:
      params: nested, with our names and one subtree for each block; float32 or bfloat16.
      settings: fields of `ViT`, which are the keys of `config.model`.
      meta: format, architecture, image_size (height, width), channels, mean, std, crop_pct,
        interpolation, licence, source, dropped (names left out); None where it is not known.
    """

    params: dict[str, Any]
    settings: dict[str, Any]
    meta: dict[str, Any]


class _Found(NamedTuple):
    """A file as it is: arrays, what it says of itself, the configs beside it."""

    path: Path
    tower: str
    arrays: Arrays
    about: dict[str, str]
    config: dict[str, Any]
    images: dict[str, Any]


def read(
    spec: str | Path,
    format: str | None = None,
    drop: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> Weights:
    """The weights of a file or folder.

    Args:
      spec: a .npz, .safetensors or .pth file, or a folder with a config; `FILE.npz:img` is one
        of several models in an archive.
      format: one of READ; recognised by default.
      drop: regexes of whole names in the file that are not wanted.
      settings: settings or `image_size` that the file does not tell, or tells wrong.

    Raises:
      UserError: cannot be read, unknown, or other arrays than the format has; names them.
    """
    given = dict(settings or {})
    found = _open(str(spec))
    where = str(found.path)
    if format is not None and format not in READ:
        raise UserError(f'{where}: format {format!r} is not one of {", ".join(READ)}')
    format = format or _recognised(found)
    arrays = found.arrays
    google_layout: dict[str, Any] = {}
    if format in google.FORMATS:
        arrays, google_layout = google.unwrapped(arrays, found.tower, where)
    elif found.tower:
        raise UserError(f'{spec}: only a .npz file has parts that are named after a colon')
    own = _own(found.about, format, where)
    # Constants that we wrote for the peer's sake.
    filled = tuple(re.escape(n) for n in own.get('filled', ()) if n in arrays)
    if any(arrays[n].any() for n in own.get('filled', ()) if n in arrays):
        filled = ()
    arrays, _ = layout.drop(arrays, filled, where)
    arrays, dropped = layout.drop(arrays, drop, where)
    renamed = huggingface.newer_names(format, arrays)
    arrays = {renamed.get(name, name): array for name, array in arrays.items()}
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    if own and not dropped:
        fields, meta, kept = own['settings'], own['meta'], own['layout']
        if format in google.FORMATS:
            kept = google_layout
    else:
        fields, meta, kept = _told(format, shapes, found, google_layout, given, where)
    if 'image_size' in given:
        meta['image_size'] = given.pop('image_size')
    fields = fit.complete({**fields, **given})
    if fields['pool'] in fit.OF_CLASS_TOKEN:
        fields['class_token'] = False  # It is said by the pooling.
    meta = {**dict.fromkeys(META), **meta, **found.images, 'format': format, 'dropped': dropped}
    _bound(fields, len(arrays), where)
    rules = _rules(format, fields, layout.shapes_of(fields, meta), kept)
    layout.check(rules, arrays, where)
    return Weights(trees.unflatten(layout.to_ours(rules, arrays)), fields, meta)


def _open(spec: str) -> _Found:
    path, tower = Path(spec).expanduser(), ''
    if not path.exists() and ':' in spec:
        before, _, tower = spec.rpartition(':')
        path = Path(before).expanduser()
    if not path.exists():
        raise UserError(f'{path}: there is no such file or folder')
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        names = [name for name in _IN_FOLDER if (folder / name).is_file()]
        if not names:
            raise UserError(
                f'{path}: there are no weights in this folder; it needs one of '
                f'{", ".join(_IN_FOLDER[:3])}'
            )
        path = folder / names[0]
    config = openclip.CONFIG if path.name.startswith('open_clip') else 'config.json'
    arrays, about = files.read(path)
    said = [
        files.read_json(folder / name) if (folder / name).is_file() else {}
        for name in (config, 'preprocessor_config.json')
    ]
    if path.suffix == '.npz' or path.suffix in files.PICKLES[1:]:
        said = [{}, {}]  # What else lies in that folder is not about this file.
    return _Found(path, tower, arrays, about, said[0], huggingface.about_images(said[1]))


def _recognised(found: _Found) -> str:
    config, names = found.config, list(found.arrays)
    if found.path.name == openclip.WEIGHTS or 'model_cfg' in config:
        return 'open_clip'
    if 'architecture' in config or 'pretrained_cfg' in config:
        return 'timm'
    kind = config.get('model_type')
    if kind is not None:
        if kind not in huggingface.TYPES:
            known = ', '.join(huggingface.TYPES)
            raise UserError(f'{found.path}: model_type {kind!r} is not one of {known}')
        return huggingface.TYPES[kind]
    tests: tuple[Callable[[Iterable[str]], str | None], ...] = (
        google.recognises,
        openclip.recognises,
        timm_vit.recognises,
        huggingface.recognises,
    )
    for test in tests:
        if format := test(names):
            return format
    shown = ', '.join(names[:6])
    raise UserError(
        f'{found.path}: none of the known formats ({", ".join(READ)}): it has {shown}, ...'
    )


def _told(
    format: str,
    shapes: Shapes,
    found: _Found,
    google_layout: dict[str, Any],
    given: Mapping[str, Any],
    where: str,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(Settings, metadata, layout), from a peer's config and the shapes."""
    try:
        if format in google.FORMATS:
            settings, meta = google.settings_of(format, shapes, google_layout, given, where)
            return settings, meta, google_layout
        if format in timm_vit.FORMATS:
            config = found.config if format == 'timm' else {}
            asked = {'num_heads', 'activation', 'norm_eps'}
            if format == 'timm' and not config and not asked <= given.keys():
                raise UserError(
                    f'{where}: config.json must be beside it, as timm writes it: it names the '
                    'architecture; or say --set num_heads=N, --set activation=gelu and '
                    '--set norm_eps=1e-6'
                )
            return timm_vit.settings_of(format, shapes, config, given, where)
        if format in openclip.FORMATS:
            return openclip.settings_of(shapes, found.config, given, where)
        return huggingface.settings_of(format, shapes, found.config, given, where)
    except (TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        raise UserError(
            f'{where}: its config or its arrays are not as {format} has them ({error!r})'
        ) from error


def _own(about: Mapping[str, str], format: str, where: str) -> dict[str, Any]:
    """What we said of a file that we wrote in this format; {} of any other."""
    if files.KEY not in about:
        return {}
    try:
        own = json.loads(about[files.KEY])
        if own['format'] != format:
            return {}
        for part in ('settings', 'meta'):
            own[part] = {
                key: tuple(value) if key in _TUPLES and value is not None else value
                for key, value in own[part].items()
            }
        dict(own['layout'])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f'{where}: its metadata of big_vit is damaged ({error!r})') from None
    return own


def _bound(settings: Mapping[str, Any], arrays: int, where: str) -> None:
    """Refuses sizes that a config may say but that no file of so many arrays can have."""
    for name in ('width', 'depth', 'mlp_dim', 'num_heads'):
        value = settings[name]
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**20:
            raise UserError(f'{where}: {name}={value!r} is not a size of a model')
    if min(settings['patch_size']) < 1:
        raise UserError(f'{where}: a patch of {settings["patch_size"]} pixels')
    if settings['depth'] > arrays:
        raise UserError(f'{where}: {settings["depth"]} blocks, but only {arrays} arrays')


def _rules(
    format: str, settings: Mapping[str, Any], shapes: Shapes, kept: Mapping[str, Any]
) -> list[Rule]:
    if format in google.FORMATS:
        return google.rules_of(shapes, kept)
    if format in timm_vit.FORMATS:
        return timm_vit.rules_of(format, settings, shapes, kept)
    if format in openclip.FORMATS:
        return openclip.rules_of(settings, shapes, kept)
    return huggingface.rules_of(format, settings, shapes, kept)


def fitted(
    weights: Weights, to: str, architecture: str | None = None
) -> tuple[Model, dict[str, Any]]:
    """(What will be written, how it will lie): the model with changes that keep its answers.

    Raises:
      UserError: the format cannot hold such a model; says why.
    """
    params = {n: np.asarray(leaf) for n, leaf in trees.flatten(weights.params).items()}
    meta = {**dict.fromkeys(META), **weights.meta}
    model = Model(params, fit.complete(weights.settings), meta)
    if to in google.FORMATS:
        return google.fitted(to, model)
    if to in timm_vit.FORMATS:
        return timm_vit.fitted(to, model)
    if to in openclip.FORMATS:
        return openclip.fitted(model, architecture)
    if to in huggingface.FORMATS:
        return huggingface.fitted(to, model)
    raise UserError(f'--to {to}: not a format that is written; these are: {", ".join(WRITE)}')


def peer_arrays(model: Model, to: str, kept: Mapping[str, Any]) -> Arrays:
    """The arrays of a fitted model under the peer's names.

    Raises:
      UserError: parameters that are not those of the settings.
    """
    shapes = layout.shapes_of(model.settings, model.meta)
    have = {name: array.shape for name, array in model.params.items()}
    wrong = [n for n in {**shapes, **have} if have.get(n) != shapes.get(n)]
    if wrong:
        raise UserError(
            f'--to {to}: the parameters are not those of the settings: {", ".join(wrong[:8])}'
        )
    arrays = layout.to_theirs(_rules(to, model.settings, shapes, kept), model.params)
    return google.wrapped(arrays, kept) if to in google.FORMATS else arrays


def write(
    path: str | Path,
    to: str,
    weights: Weights,
    drop: Sequence[str] = (),
    architecture: str | None = None,
) -> Path:
    """Writes what a peer reads, and gives its path.

    Args:
      path: a folder; for google-research's formats a .npz file.
      to: one of WRITE.
      weights: `settings` may lack fields that have the model's defaults, `meta` needs image_size
        and channels.
      drop: regexes of names of ours to leave out: of the head and pre_logits.
      architecture: of open_clip, the timm model behind the tower.

    Raises:
      UserError: the format cannot hold such a model, or it cannot be written.
    """
    path = Path(path).expanduser()
    if drop:
        flat = trees.flatten(weights.params)
        left, dropped = layout.drop(flat, drop, 'the checkpoint')
        model = fit.without(Model(left, fit.complete(weights.settings), weights.meta), dropped)
        weights = Weights(trees.unflatten(model.params), model.settings, weights.meta)
    model, kept = fitted(weights, to, architecture)
    arrays = peer_arrays(model, to, kept)
    constants = {}
    if to in huggingface.FORMATS:
        constants = huggingface.constants(to, model, kept)
    about = {
        'format': to,
        'settings': model.settings,
        'meta': {key: value for key, value in model.meta.items() if key in META},
        'layout': kept,
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
        beside = timm_vit.config_of(model, kept)
    elif to in openclip.FORMATS:
        beside = openclip.config_of(model, kept)
    else:
        beside = huggingface.config_of(to, model, kept)
    name = openclip.WEIGHTS if to in openclip.FORMATS else 'model.safetensors'
    files.write_safetensors(path / name, {**arrays, **constants}, about)
    for file, tree in beside.items():
        files.write_json(path / file, tree)
    return path


def load_init(spec: str) -> Weights | None:
    """The weights that `config.init` names, if they are from elsewhere; None if a workdir of ours.

    Parameters are float32. `spec` is as of `read`.

    Raises:
      UserError: they are from elsewhere and cannot be read.
    """
    if '://' in spec:
        return None
    path = Path(spec).expanduser()
    foreign = path.is_dir() and any((path / name).is_file() for name in _IN_FOLDER)
    before, colon, _ = spec.rpartition(':')
    archive = bool(colon) and Path(before).expanduser().is_file()
    if not (foreign or archive or path.is_file()):
        return None
    try:
        weights = read(spec)
    except UserError as error:
        raise UserError(
            f'{error}. What is left out or corrected is said once, to make a workdir of it: '
            f'python -m big_vit.export --from {spec} --out RUN'
        ) from None
    params = {
        name: np.asarray(leaf, np.float32) for name, leaf in trees.flatten(weights.params).items()
    }
    return weights._replace(params=trees.unflatten(params))


def describe(weights: Weights) -> str:
    """What a model is, in a few lines for people."""
    settings, meta = weights.settings, weights.meta
    count = trees.count(weights.params)
    kinds = (
        f'width {settings["width"]}, {settings["depth"]} blocks, {settings["num_heads"]} heads, '
        f'patch {"x".join(map(str, settings["patch_size"]))}'
    )
    rest = ', '.join(
        f'{name}={settings[name]}'
        for name in ('posemb', 'pool', 'activation', 'norm_eps', 'registers', 'num_classes')
    )
    height, width = meta['image_size']
    images = f'{height}x{width}, mean {meta.get("mean")}, std {meta.get("std")}'
    return '\n'.join(
        [
            f'model    {count:,} parameters: {kinds}',
            f'         {rest}',
            f'images   {images}',
            f'from     {meta.get("source") or "unknown source"}, '
            f'licence {meta.get("licence") or "unknown"}',
        ]
    )
