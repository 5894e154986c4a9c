"""Read the weights of other codebases: recognise the format, derive settings, map the arrays."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from big_vit import trees
from big_vit.errors import UserError
from big_vit.interop import (
    class_names,
    detectors,
    files,
    fit,
    formats,
    google,
    huggingface,
    ijepa_predictor,
    layout,
    locations,
    mae_decoder,
    openclip,
    parts,
    pictures,
    timm_vit,
)
from big_vit.interop.formats import READ
from big_vit.interop.layout import Arrays, Shapes
from big_vit.interop.weights import META, Weights

# Settings and metadata that are tuples here but lists in JSON.
_TUPLES = (
    *('patch_size', 'resnet', 'stride', 'image_size', 'mean', 'std', 'dropped'),
    *('class_names', 'class_descriptions'),
)


class _SourceFile(NamedTuple):
    """A weight file as stored: its arrays, its embedded metadata and the configs beside it.

    `where` names it in messages, `origin` where it was fetched from.
    """

    path: Path
    part: str
    where: str
    sections: files.Sections
    about: dict[str, str]
    config: dict[str, Any]
    images: dict[str, Any]
    origin: str | None
    labels: Path | None


class _Encoder(NamedTuple):
    """The arrays of one encoder, as stored, and where they were; and those of a predictor."""

    format: str
    arrays: Arrays
    part: str | None
    dropped: tuple[str, ...]
    google_layout: dict[str, Any]
    predictor: Arrays | None = None


def read(
    spec: str | Path,
    format: str | None = None,
    drop: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    architecture: str | None = None,
) -> Weights:
    """Read the weights of a file or folder.

    Args:
      spec: a .npz, .safetensors or .pth file, or a folder with a config; `FILE:PART` selects one of
        several models in it, by keys and prefixes of names (`model_ema`, `student.backbone`). An
        average of the parameters is read before what it is the average of.
      format: one of READ; recognised from the file by default.
      drop: regexes that match full array names in the file; matching arrays are left out.
      settings: model settings or `image_size` that the file omits or gets wrong.
      architecture: timm's name of the model, where no config names it.

    Raises:
      UserError: the file is unreadable, its format is unknown, or its arrays are not those of the
        format, or not finite; the message names them.
    """
    given = dict(settings or {})
    source = _open_source(str(spec))
    where = source.where
    if format is not None and format not in READ:
        raise UserError(f'{where}: format {format!r} is not one of {", ".join(READ)}')
    named = architecture if architecture and not source.config else None
    if named:
        source = source._replace(config={'architecture': named})
    encoder = _encoder(source, format, drop, where)
    format, arrays, dropped = encoder.format, encoder.arrays, encoder.dropped
    recorded = _recorded_by_us(source.about, format, where)
    # Placeholder arrays that `write` added because the peer insists on them. If one is no longer
    # zero, the file was edited after we wrote it, so it is checked like any other array.
    filled = [n for n in recorded.get('filled', ()) if n in arrays]
    if not any(arrays[n].any() for n in filled):
        arrays = {n: array for n, array in arrays.items() if n not in filled}
    arrays, finding = detectors.split(format, arrays, where)
    arrays, beside = mae_decoder.split(format, arrays)
    beside = beside or encoder.predictor or {}
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    if named and format == 'timm' and not given:  # Else it is one with other sizes.
        timm_vit.check_architecture(named, shapes, where)
    if recorded and not dropped:
        fields, meta, file_layout = recorded['settings'], recorded['meta'], recorded['layout']
        if format in google.FORMATS:
            file_layout = encoder.google_layout
    else:
        fields, meta, file_layout = _settings_of(
            format, shapes, source, encoder.google_layout, given, where
        )
    if 'image_size' in given:
        meta['image_size'] = given.pop('image_size')
    fields = fit.complete({**fields, **given})
    if fields['pool'] in fit.OF_CLASS_TOKEN:
        fields['class_token'] = False  # These pooling modes imply the token.
    meta = {**dict.fromkeys(META), **meta, 'format': format}
    told = {**meta, **source.images}
    if pictures.scaled(told) == pictures.scaled(meta):  # What we recorded is not rounded.
        told['crop_pct'] = meta['crop_pct'] or told['crop_pct']
    meta = told
    meta |= {'dropped': dropped, 'part': encoder.part}
    if source.origin:
        meta['source'] = source.origin
    _check_sizes(fields, len(arrays), where)
    rules = formats.rules_of(format, fields, layout.shapes_of(fields, meta), file_layout)
    layout.check(rules, arrays, where)
    learnt = None
    if finding:
        finding = {n: files.as_float(a, f'{where}: {n}') for n, a in finding.items()}
        learnt = detectors.read(format, finding, fields, source.config, where)
    if beside:
        beside = {n: files.as_float(a, f'{where}: {n}') for n, a in beside.items()}
        learnt = (
            ijepa_predictor.read(beside, fields, meta, where)
            if format == 'ijepa'
            else mae_decoder.read(format, beside, fields, meta, source.config, where)
        )
    classes = fields['num_classes'] or detectors.classes_of(learnt)
    names = class_names.of_config(source.config, source.labels, classes)
    meta |= names if classes else dict.fromkeys(('class_names', 'class_descriptions'))
    arrays = {n: files.as_float(a, f'{where}: {n}') for n, a in arrays.items()}
    return Weights(trees.unflatten(layout.to_ours(rules, arrays)), fields, meta, learnt)


def _encoder(source: _SourceFile, format: str | None, drop: Sequence[str], where: str) -> _Encoder:
    """Find the encoder in a file, read its arrays, and leave out what is to be dropped."""
    listed = {section: list(table) for section, table in source.sections.items()}
    format = format or _format_of_config(source)
    if format is None and '' in listed:
        format = google.recognises(listed[''])
    if format in google.FORMATS:
        raw = {name: get() for name, get in source.sections.get('', {}).items()}
        arrays, google_layout = google.unwrapped(raw, source.part, where)
        arrays, dropped = layout.drop(arrays, drop, where)
        return _Encoder(format, arrays, source.part or None, dropped, google_layout)
    found = parts.of(listed)
    fitting = [part for part in found if format is None or format in part.formats]
    if not fitting and not source.part and format is not None and len(listed) == 1:
        fitting = [parts.Part(next(iter(listed)), '', (format,))]  # `check` says what is missing.
    if not fitting and not found:
        shown = layout.shown([name for names in listed.values() for name in names][:6])
        raise UserError(
            f'{where}: none of the known formats ({", ".join(READ)}): it has {shown}, ...'
        )
    part, others = parts.choose(fitting or found, source.part, where)
    table = source.sections[part.section]
    inside, beside = parts.inside(part, table, source.part, drop, where)
    if format is None:
        format = (
            openclip.recognises(inside)
            or timm_vit.recognises(inside, source.path.name, part.place)
            or huggingface.recognises(inside)
        )
    if format is None:
        raise UserError(f'{where}: none of the known formats ({", ".join(READ)})')
    patterns = [regex for regex in drop if not any(layout.matches(regex, n) for n in beside)]
    kept, dropped = layout.drop(inside, patterns, where)
    arrays = {name: table[stored]() for name, stored in kept.items()}
    renamed = huggingface.newer_names(format, arrays)
    arrays = {renamed.get(name, name): array for name, array in arrays.items()}
    dropped = (*sorted(beside), *dropped)
    predictor: Arrays | None = None
    if format == 'ijepa':
        predictor = ijepa_predictor.beside(source.sections, part.section, part.prefix)
    return _Encoder(format, arrays, parts.about(part, others), dropped, {}, predictor)


def _open_source(spec: str) -> _SourceFile:
    path, part, origin = locations.locate(spec)
    if not path.exists():
        raise UserError(f'{path}: there is no such file or folder')
    named_by_folder = path.is_dir()
    folder = path if named_by_folder else path.parent
    if named_by_folder:
        names = [name for name in locations.IN_FOLDER if (folder / name).is_file()]
        if not names:
            raise UserError(
                f'{path}: there are no weights in this folder; it needs one of '
                f'{", ".join(locations.IN_FOLDER[:3])}'
            )
        path = folder / names[0]
    sections, about = files.read(path)
    configs = [
        files.read_json(folder / name) if (folder / name).is_file() else {}
        for name in locations.configs_of(path.name)
    ] or [{}, {}]
    images = huggingface.about_images(configs[1])
    # What lies beside a file that stands for itself may be of another.
    labels, where = folder if named_by_folder or configs[0] else None, origin or str(path)
    return _SourceFile(path, part, where, sections, about, configs[0], images, origin, labels)


def _format_of_config(source: _SourceFile) -> str | None:
    """The format that the config says or the file's name; None if neither does."""
    config = source.config
    if source.path.name == openclip.WEIGHTS or 'model_cfg' in config:
        return 'open_clip'
    if 'architecture' in config or 'pretrained_cfg' in config:
        return 'timm'
    kind = config.get('model_type')
    if kind is None:
        return None
    types = {**huggingface.TYPES, **detectors.TYPES}
    if not isinstance(kind, str) or kind not in types:
        known = ', '.join(types)
        raise UserError(f'{source.path}: model_type {kind!r} is not one of {known}')
    return types[kind]


def _settings_of(
    format: str,
    shapes: Shapes,
    source: _SourceFile,
    google_layout: dict[str, Any],
    given: Mapping[str, Any],
    where: str,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Derive (settings, metadata, layout) from the peer's config and the array shapes."""
    try:
        if format in google.FORMATS:
            settings, meta = google.settings_of(format, shapes, google_layout, given, where)
            return settings, meta, google_layout
        if format in timm_vit.FORMATS:
            config = source.config if format == 'timm' else {}
            return timm_vit.settings_of(format, shapes, config, given, where)
        if format in openclip.FORMATS:
            return openclip.settings_of(shapes, source.config, given, where)
        if format in detectors.FORMATS:
            return detectors.settings_of(format, shapes, source.config, given, where)
        return huggingface.settings_of(format, shapes, source.config, given, where)
    except UserError as error:
        raise UserError(str(error) if where in str(error) else f'{where}: {error}') from None
    except (TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        raise UserError(
            f'{where}: its config or its arrays are not as {format} has them ({error!r})'
        ) from error


def _recorded_by_us(about: Mapping[str, str], format: str, where: str) -> dict[str, Any]:
    """Return what `write` recorded in a file of this format, or {} for any other file."""
    if files.KEY not in about:
        return {}
    try:
        recorded = json.loads(about[files.KEY])
        if recorded['format'] != format:
            return {}
        for part in ('settings', 'meta'):
            recorded[part] = {
                key: tuple(value) if key in _TUPLES and value is not None else value
                for key, value in recorded[part].items()
            }
        dict(recorded['layout'])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f'{where}: its metadata of big_vit is damaged ({error!r})') from None
    return recorded


def _check_sizes(settings: Mapping[str, Any], arrays: int, where: str) -> None:
    """Reject sizes from a config that no file with this many arrays can have.

    Absurd sizes would otherwise be expanded into shapes and rules for every block before
    `layout.check` could report the mismatch.
    """
    for name in ('width', 'depth', 'mlp_dim', 'num_heads'):
        value = settings[name]
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**20:
            raise UserError(f'{where}: {name}={value!r} is not a size of a model')
    if min(settings['patch_size']) < 1:
        raise UserError(f'{where}: a patch of {settings["patch_size"]} pixels')
    if settings['depth'] > arrays:
        raise UserError(f'{where}: {settings["depth"]} blocks, but only {arrays} arrays')


def load_init(spec: str, architecture: str | None = None) -> Weights | None:
    """Return the foreign weights that `config.init` names, or None for a workdir of ours.

    Args:
      spec: as for `read`.
      architecture: timm's name of the model, of a state dict without a config.

    Returns:
      Weights with float32 parameters.

    Raises:
      UserError: `spec` names foreign weights that cannot be read, or are of another architecture.
    """
    if architecture and architecture.partition('.')[0] not in timm_vit.architectures():
        raise timm_vit.unknown_architecture(architecture, 'config: init_architecture')
    path = locations.locate(spec).path
    foreign = path.is_dir() and any((path / name).is_file() for name in locations.IN_FOLDER)
    if not (foreign or path.is_file()):
        return None
    try:
        weights = read(spec, architecture=architecture)
    except UserError as error:
        raise UserError(
            f'{error}. What is left out or corrected is said once, to make a workdir of it: '
            f'python -m big_vit.export --from {spec} --out RUN'
        ) from None
    known = weights.meta.get('architecture') or weights.meta['format']
    if architecture and known != architecture.partition('.')[0]:
        raise UserError(
            f'config: init_architecture={architecture!r}, but {spec} is {known} by itself: '
            'remove it'
        )
    params = {
        name: np.asarray(leaf, np.float32) for name, leaf in trees.flatten(weights.params).items()
    }
    learnt = weights.learnt
    if learnt is not None:
        beside = {name: np.asarray(leaf, np.float32) for name, leaf in learnt.params.items()}
        learnt = learnt._replace(params=beside)
    return weights._replace(params=trees.unflatten(params), learnt=learnt)
