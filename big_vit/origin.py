"""Where a run starts: a checkpoint of ours, or weights of another codebase, and their model."""

import ast
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from big_vit import adapt, build, checkpoint, interop
from big_vit import config as config_lib
from big_vit.config import Config
from big_vit.errors import UserError
from big_vit.interop import Weights, fit
from big_vit.models import encoder, stems, variants, vit
from big_vit.schema import SCHEMA

_SIZES = ('width', 'depth', 'mlp_dim', 'num_heads')
# Settings that change the answers and that no shape tells.
_UNSEEN = (
    'num_heads',
    'norm_eps',
    'activation',
    'rope_theta',
    'parallel',
    'norm_after_pool',
)
# Arguments of the operations that normalise, and what `normalize` has without any.
_NUMBERS = ('mean', 'std', 'low', 'high')
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Origin(NamedTuple):
    """Parameters, the config of their model, and where they are from."""

    params: dict[str, Any]
    config: Config
    where: str
    normalised: tuple[Sequence[float], Sequence[float]] | None = None


def read(init: str) -> Origin:
    """What `config.init` names: a checkpoint of ours, or weights of another codebase.

    Raises:
      UserError: neither is there, or it cannot be read.
    """
    weights = interop.load_init(init)
    if weights is not None:
        mean, std = weights.meta.get('mean'), weights.meta.get('std')
        known = (mean, std) if mean and std else None
        return Origin(weights.params, config_of(weights), init, known)
    source, step = checkpoint.locate(init, 'config: init')
    sidecar = checkpoint.read_sidecar(source, step)
    params, _ = checkpoint.load_params(source, step, checkpoint.scored_part(sidecar))
    saved = config_lib.from_json(sidecar['config']).without('model.lora')
    return Origin(encoder.merge_lora(params), saved, f'{source}/checkpoints/{step}')


def model_keys(init: str) -> dict[str, Any]:
    """The keys of `model` that a config takes from where it starts, if it does not say itself."""
    if interop.load_init(init) is not None:
        config = read(init).config
    else:
        source, step = checkpoint.locate(init, 'config: init')
        config = config_lib.from_json(checkpoint.read_sidecar(source, step)['config'])
    flat = config_lib.flatten(config.to_dict())
    return {
        key: value
        for key, value in flat.items()
        if key.startswith(('model.', 'streams.'))
        and key != 'model.lora'  # Corrections are added to the kernels when they are read.
        and value is not None
        and (key not in SCHEMA or _frozen(value) != SCHEMA[key].default)
    }


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def starting(config: Config, keep_head: bool) -> Callable[[build.Experiment], dict[str, Any]]:
    """What gives the parameters that `config.init` says, once the experiment is known.

    Args:
      keep_head: whether a head of the same shape is kept, or all heads start at zero.
    """
    init, channels = config.init, config.init_channels
    video, resize = config.init_video, config.init_resize

    def load(parts: build.Experiment) -> dict[str, Any]:
        found = read(init)
        _check_unseen(config, parts.model, found)
        _tell_normalisation(config, found)
        return adapt.adapt(
            found.params,
            adapt.saved_grid(found.config),
            parts.model,
            adapt.grid_of(config, parts.data.shapes),
            parts.like['params'],
            found.where,
            channels=channels,
            video=video,
            resize=resize,
            keep_head=keep_head,
        )

    return load


def _check_unseen(config: Config, model: vit.ViT, found: Origin) -> None:
    """Raises UserError where weights would load and answer otherwise, unless it was asked for."""
    saved, wrong = found.config.model, []
    for name in _UNSEEN:
        had = saved.peek(name)
        if name in _SIZES and had is None:
            had = variants.parse(saved.variant)[name]
        if had == getattr(model, name) or config.sets(f'model.{name}'):
            continue
        if name == 'rope_theta' and model.posemb != 'rope':
            continue
        wrong.append(f'model.{name}={had!r} (here {getattr(model, name)!r})')
    if wrong:
        raise UserError(
            f'{found.where} is of a model with {", ".join(wrong)}: set the same, or say on purpose '
            'what it shall be'
        )


def _tell_normalisation(config: Config, found: Origin) -> None:
    """A line where images are normalised otherwise than the weights have seen them."""
    if found.normalised is None or 'image' not in build.reads(config):
        return
    wanted = found.normalised
    here = normalisation(config, len(wanted[0]))
    if not np.allclose(np.array(here), np.array(wanted), atol=2e-3):
        print(
            f'WARNING: {found.where} was trained on images normalised with mean {wanted[0]} and '
            f'deviation {wanted[1]}; end data.transform and that of evals with '
            f'normalize({tuple(wanted[0])}, {tuple(wanted[1])})',
            file=sys.stderr,
        )


def normalisation(config: Config, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation that images have been normalised with, of values from 0 to 1."""
    last = config.data.transform.split('|')[-1].strip()
    for name in ('normalize', 'value_range'):
        if not last.startswith(name + '('):
            continue
        call = ast.parse(last, mode='eval').body
        assert isinstance(call, ast.Call)
        args = [ast.literal_eval(arg) for arg in call.args]
        args += [ast.literal_eval(k.value) for k in call.keywords if k.arg in _NUMBERS]
        if name == 'normalize':
            mean, std = args if len(args) == 2 else (_MEAN, _STD)
            return tuple(mean), tuple(std)
        low, high = args[:2] if len(args) > 1 else (-1, 1)
        return (-low / (high - low),) * channels, (1 / (high - low),) * channels
    return (0.5,) * channels, (0.5,) * channels


def config_of(weights: Weights, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """A config whose model is that of the weights; data and recipe are only a beginning.

    Raises:
      UserError: the config has no word for a setting, or an override is wrong.
    """
    settings, meta = weights.settings, weights.meta
    sizes = tuple(settings[name] for name in _SIZES)
    size = next((name for name, known in variants.SIZES.items() if known == sizes), 'mu')
    patch = 'x'.join(map(str, dict.fromkeys(settings['patch_size'])))
    hybrid = ''
    if settings['tokenizer'] == 'resnet':
        names = [name for name, all_ in stems.RESNETS.items() if settings['resnet'] in all_]
        if not names:
            raise UserError(f'model.variant: no hybrid has stages of {settings["resnet"]} units')
        hybrid = f'{names[0]}+'
    flat: dict[str, Any] = {
        'model.variant': f'{hybrid}{size}/{patch}',
        'image_size': tuple(meta['image_size']),
        'total_steps': 1,
        'batch_size': 64,
        'lr': 0.0,
        'data.name': 'folder',
        'data.transform': transform_of(weights),
    }
    if size == 'mu':
        flat |= {f'model.{name}': settings[name] for name in _SIZES}
    for name in fit.FIELDS:
        key = f'model.{name}'
        if name in (*_SIZES, 'patch_size', 'resnet', 'num_classes'):
            continue
        if name == 'tokenizer' and hybrid:
            continue
        if key not in SCHEMA:
            if settings[name] != fit.complete({})[name]:
                raise UserError(f'config: there is no key {key}, which must be {settings[name]!r}')
        elif settings[name] != SCHEMA[key].default:
            flat[key] = settings[name]
    return config_lib.override(config_lib.resolve(flat), overrides)


def transform_of(weights: Weights) -> str:
    """The operations that an evaluation begins with, with the images' normalisation."""
    meta = weights.meta
    height, width = meta['image_size']
    parts = [f'resize({height}, {width})' if height != width else 'resize(size)']
    crop = meta.get('crop_pct') or 1.0
    if height == width and crop < 1:
        parts = [f'resize_small({round(height / crop)})', 'central_crop(size)']
    mean, std = meta.get('mean'), meta.get('std')
    if mean and std and {*mean, *std} != {0.5}:
        parts.append(f'normalize({tuple(mean)}, {tuple(std)})')
    return ' | '.join(['decode', *parts])
