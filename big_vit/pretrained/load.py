"""Where a run starts: a checkpoint of ours, or weights of another codebase, and their model."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from big_vit import checkpoint, interop, sharding, state, trees
from big_vit import config as config_lib
from big_vit.build.data import DEVICE_OPERATIONS, Data
from big_vit.build.experiment import Experiment
from big_vit.build.model import build_streams, parts_read
from big_vit.build.task import build_task
from big_vit.config import Config
from big_vit.config.schema import SCHEMA
from big_vit.data import transforms
from big_vit.errors import UserError, printable
from big_vit.interop import Weights, fit, pictures
from big_vit.models import encoder, stems, variants, vit
from big_vit.models.positions import Grid
from big_vit.pretrained import adapt
from big_vit.tasks.task import Task

_SIZES = ('width', 'depth', 'mlp_dim', 'num_heads')
# Settings that change the answers and that no shape tells.
_UNSEEN = (
    'num_heads',
    'norm_eps',
    'activation',
    'rope_theta',
    'parallel',
    'norm_after_pool',
    'posemb',
)
# Those of these are in arrays.
_SEEN_POSITIONS = ('learned', 'relative')


class Pretrained(NamedTuple):
    """Parameters, the config of their model, where they are from, and what is known of them."""

    params: dict[str, Any]
    config: Config
    where: str
    normalised: tuple[Sequence[float], Sequence[float]] | None = None
    part: str | None = None
    class_names: tuple[str, ...] | None = None


def read_pretrained(
    init: str, tower: str | None = None, architecture: str | None = None
) -> Pretrained:
    """What `config.init` names: a checkpoint of ours, or weights of another codebase.

    Args:
      tower: of a checkpoint with streams apart, the one that is wanted, as a plain model.
      architecture: timm's name of the model, of a state dict without a config.

    Raises:
      UserError: neither is there, it cannot be read, or it has no such tower.
    """
    weights = interop.load_init(init, architecture)
    if weights is not None:
        if tower is not None:
            raise UserError(f'config: init_tower={tower!r}, but {init} is of one input: remove it')
        mean, std = weights.meta.get('mean'), weights.meta.get('std')
        known = (mean, std) if mean and std else None
        part, names = weights.meta.get('part'), weights.meta.get('class_names')
        params = with_learnt(weights)
        return Pretrained(params, config_of_weights(weights), init, known, part, names)
    if architecture is not None:
        raise UserError(
            f'config: init_architecture={architecture!r} is of weights of timm without a config, '
            f'and {init} is none: remove it'
        )
    source, step = checkpoint.locate(init, 'config: init')
    sidecar = checkpoint.read_sidecar(source, step)
    params, _ = checkpoint.load_params(source, step, checkpoint.scored_part(sidecar))
    saved = config_lib.from_json(sidecar['config']).without('model.lora')
    where, names = f'{source}/checkpoints/{step}', checkpoint.class_names(sidecar)
    found = Pretrained(encoder.merge_lora(params), saved, where, class_names=names)
    check_finite(found.params, f'config: init: {where}')
    return found if tower is None else _tower(found, tower)


def check_finite(params: dict[str, Any], where: str) -> None:
    """Raise UserError for a run that had diverged; `interop.read` checks files itself.

    Args:
      where: the key and the checkpoint, for the message.
    """
    for name, leaf in trees.flatten(params).items():
        if not np.isfinite(np.asarray(leaf)).all():
            raise UserError(
                f'{where} has NaN or infinite numbers in {name}: its run had diverged; name an '
                'earlier checkpoint'
            )


def _has_towers(config: Config) -> bool:
    return 'pairs' in build_task(config.task).provides


def _tower_config(config: Config, name: str, where: str) -> Config:
    """That of a plain model for one of the streams apart.

    Raises:
      UserError: there is none, or it is no plain model.
    """
    if not _has_towers(config):
        raise UserError(
            f"config: init_tower={name!r} is of checkpoints with task.name='contrastive', and "
            f'{where} is none: remove it'
        )
    if name not in list(config.streams):
        raise UserError(
            f'config: init_tower={name!r}: {where} has no such tower: it has '
            f'{", ".join(sorted(config.streams))}'
        )
    stream = next(stream for stream in build_streams(config) if stream.name == name)
    if stream.depth:
        raise UserError(
            f'config: init_tower={name!r}: in {where} it has blocks of its own before those that '
            f'both share (streams.{name}.depth={stream.depth}), which no model of one input has'
        )
    flat = {
        key: value
        for key, value in config_lib.flatten(config.to_dict()).items()
        if not key.startswith(('streams.', 'task.'))
    }
    own = config.streams[name]
    for key in ('tokenizer', 'stride', 'tubelet', 'vocab', 'posemb'):
        value = own.peek(key)
        if value != SCHEMA[f'streams.*.{key}'].default:
            flat[f'model.{key}'] = value
    size = config.model.variant.partition('/')[0]
    flat['model.variant'] = f'{size}/{"x".join(map(str, dict.fromkeys(stream.patch_size)))}'
    return config_lib.resolve({key: value for key, value in flat.items() if value is not None})


def _tower(found: Pretrained, name: str) -> Pretrained:
    """A plain model's parameters; what marked the stream's tokens becomes part of positions."""
    config = _tower_config(found.config, name, found.where)
    own = dict(found.params[name])
    kind = np.asarray(own.pop('kind'))
    if 'pos_embedding' in own:
        own['pos_embedding'] = own['pos_embedding'] + kind
    elif 'word_embedding' in own:
        own['word_embedding'] = own['word_embedding'] + kind[0]
    elif 'bias' in own.get('embedding', {}):
        embedding = own['embedding']
        own['embedding'] = {**embedding, 'bias': embedding['bias'] + kind[0, 0]}
    else:
        raise UserError(
            f'config: init_tower={name!r}: in {found.where} its tokens are marked by a vector that '
            'no other parameter can take up'
        )
    shared: dict[str, Any] = {
        key: found.params[key] for key in ('Transformer', 'MAPHead_0') if key in found.params
    }
    return Pretrained({**own, **shared}, config, f'{found.where} ({name})')


def model_keys_of(
    init: str, tower: str | None = None, architecture: str | None = None
) -> dict[str, Any]:
    """The keys of `model` that a config takes from where it starts, if it does not say itself.

    Raises:
      UserError: as `read_pretrained`; or streams are apart and none was chosen.
    """
    if architecture is not None or interop.load_init(init) is not None:
        config = read_pretrained(init, tower, architecture).config
    else:
        source, step = checkpoint.locate(init, 'config: init')
        config = config_lib.from_json(checkpoint.read_sidecar(source, step)['config'])
        where = f'{source}/checkpoints/{step}'
        if tower is not None:
            config = _tower_config(config, tower, where)
        elif _has_towers(config):
            raise UserError(
                f'config: init_tower must say which tower of {where} goes on: '
                f'{" or ".join(sorted(config.streams))}'
            )
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


def initial_params(
    config: Config, keep_head: bool, by_name: bool = True
) -> Callable[[Experiment], dict[str, Any]]:
    """What gives the parameters that `config.init` says, once the experiment is known.

    Args:
      keep_head: whether a head of the same shape is kept, or all heads start at zero.
      by_name: whether a head that is kept is ordered as the data number the classes.
    """
    init, channels, architecture = config.init, config.init_channels, config.init_architecture
    video, resize, tower = config.init_video, config.init_resize, config.init_tower

    def load(parts: Experiment) -> dict[str, Any]:
        pretrained = read_pretrained(init, tower, architecture)
        trunk, task = parts.task.trunk(parts.model), build_task(pretrained.config.task)
        if origin := interop.locate(init).origin:
            print(f'init    {printable(origin)}')
        if pretrained.part:
            print(f'init    {init}: {printable(pretrained.part)} is read')
        if isinstance(trunk, vit.ViT):
            _check_unseen(config, trunk, pretrained)
        _tell_normalisation(config, parts, pretrained)
        params, left = task_parameters(pretrained.params, task, parts.task)
        if keep_head and by_name and 'logits' in parts.task.provides:
            params = adapt.head_by_name(
                params, pretrained.class_names, parts.class_names, pretrained.where
            )
        streams = build_streams(pretrained.config), build_streams(config)
        if max(map(len, streams)) == 1:
            params = adapt.with_positions(
                params,
                streams[0][0],
                adapt.saved_grid(pretrained.config),
                streams[1][0],
                trunk.encoder.width,
                pretrained.where,
            )
        if task.name != parts.task.name:
            names = sorted({name.partition('/')[0] for name in left})
            print(
                f'init    {pretrained.where} learnt task {task.name!r}: its trunk goes on'
                + (f', left is {", ".join(names)}' if names else '')
            )
        old_grid = adapt.saved_grid(pretrained.config)
        new_grid = adapt.grid_of(config, parts.data.shapes)
        if task.name == parts.task.name and task.teacher_rate is not None:
            _tell_taken(params, old_grid, new_grid, parts, pretrained.where)
        return adapt.adapt(
            params,
            old_grid,
            trunk,
            new_grid,
            parts.abstract_state['params'],
            pretrained.where,
            additions=lambda names: state.initial_leaves(
                parts.model, parts.data.inputs, config.seed, names
            ),
            is_addition=parts.task.is_addition,
            channels=channels,
            video=video,
            resize=resize,
            keep_head=keep_head,
        )

    return load


def _tell_taken(
    params: dict[str, Any], old: Grid | None, new: Grid | None, parts: Experiment, where: str
) -> None:
    """Say what a run takes over from one of the same task whose average it starts from."""
    ours, wanted = trees.flatten(params), trees.flatten(parts.abstract_state['params'])
    added = [name for name in wanted if parts.task.is_addition(name)]
    anew = {n.partition('/')[0] for n in added if n not in ours or ours[n].shape != wanted[n].shape}
    names = dict.fromkeys(name.partition('/')[0] for name in added)
    taken = ', '.join(['trunk', *(name for name in names if name not in anew)])
    new_ones = f'; {", ".join(name for name in names if name in anew)} starts anew' if anew else ''
    resized = ''
    if old and new and old != new and 'pos_embedding' in ours and 'pos_embedding' in wanted:
        grids = ['x'.join(map(str, grid)) for grid in (old, new)]
        resized = f'; positions are resized from {grids[0]} to {grids[1]}'
    print(f'init    {where}: the average of {taken} goes on{resized}{new_ones}')


def continued(config: Config, parts: Experiment, now: state.State) -> state.State:
    """A state at step 0 with what goes on of the task's own state in the run of `config.init`.

    That is nothing where the task, or the size of something that it adds, is another one.
    """
    if not config.init or not parts.task.continues or interop.load_init(config.init) is not None:
        return now
    source, step = checkpoint.locate(config.init, 'config: init')
    sidecar = checkpoint.read_sidecar(source, step)
    if build_task(config_lib.from_json(sidecar['config']).task).name != parts.task.name:
        return now
    saved = {name: tuple(leaf['shape']) for name, leaf in sidecar['leaves'].items()}
    here = {name: leaf.shape for name, leaf in trees.flatten(now).items()}
    added = [n for n in here if n.startswith('params/') and parts.task.is_addition(n[7:])]
    prefixes = tuple(f'task/{name}/' for name in parts.task.continues)
    names = [name for name in here if name.startswith(prefixes)]
    if any(saved.get(name) != here[name] for name in (*added, *names)):
        return now
    theirs, _ = checkpoint.load_params(source, step, 'task')
    places = {name: now['task'][name] for name in parts.task.continues}
    going_on = {
        name: jax.tree.map(lambda x, like: sharding.place(x, like.sharding), theirs[name], place)
        for name, place in places.items()
    }
    print(f'init    {source}/checkpoints/{step}: its {", ".join(going_on)} goes on')
    return {**now, 'task': {**now['task'], **going_on}}


def task_parameters(
    params: dict[str, Any], task: Task, wanted: Task | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The parameters that another task can take, and the paths of those that are left.

    What a task adds to its trunk stays behind, unless the other adds parameters of that name; a
    classifier's heads are part of a ViT everywhere.
    """
    flat = trees.flatten(params)
    left = [
        name
        for name in flat
        if task.is_addition(name)
        and name.partition('/')[0] not in (*vit.HEADS, *(wanted.additions if wanted else ()))
    ]
    return trees.unflatten({n: x for n, x in flat.items() if n not in left}), left


def _check_unseen(config: Config, model: vit.ViT, found: Pretrained) -> None:
    """Raises UserError where weights would load and answer otherwise, unless it was asked for."""
    saved, wrong = found.config.model, []
    here = vit.settings_of(model)
    for name in _UNSEEN:
        had = saved.peek(name)
        if name in _SIZES and had is None:
            had = variants.parse(saved.variant)[name]
        if name not in here or had == here[name] or config.sets(f'model.{name}'):
            continue
        if name == 'rope_theta' and here['posemb'] != 'rope':
            continue
        if name == 'posemb' and {had, here[name]} & {*_SEEN_POSITIONS}:
            continue
        wrong.append(f'model.{name}={had!r} (here {here[name]!r})')
    if wrong:
        raise UserError(
            f'{found.where} is of a model with {", ".join(wrong)}: set the same, or say on purpose '
            'what it shall be'
        )


def _tell_normalisation(config: Config, parts: Experiment, found: Pretrained) -> None:
    """Print a warning where images are normalised otherwise than those the weights have seen."""
    if found.normalised is None or 'image' not in parts_read(config):
        return
    mean, std = found.normalised

    def differs(data: Data) -> bool:
        # The devices' part of an evaluation may be that of training.
        transform = replace(data.transform, device=data.device)
        here = np.array(transform.normalisation(len(mean)))
        return here.shape != (2, len(mean)) or not np.allclose(here, (mean, std), atol=2e-3)

    evals = [
        f'evals.{name}.transform'
        for name, data in parts.evals.items()
        if 'image' in data.shapes and differs(data)
    ]
    where = 'data.transform and that of evals' if differs(parts.data) else ', '.join(evals)
    if where:
        print(
            f'WARNING: {found.where} was trained on images normalised with mean {mean} and '
            f'deviation {std}; end {where} with normalize({tuple(mean)}, {tuple(std)})',
            file=sys.stderr,
        )


def image_normalisation(
    config: Config, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute the mean and deviation that a run normalised images with, of pixels in 0..1.

    Raises:
      UserError: `data.transform` cannot be read.
    """
    transform = transforms.parse(
        config.data.transform,
        size=config.image_size,
        device=DEVICE_OPERATIONS,
        # A checkpoint may be looked at where the tokenizer of its run is not.
        skip=transforms.EXTERNAL,
    )
    return transform.normalisation(channels)


def with_learnt(weights: Weights) -> dict[str, Any]:
    """The parameters of a model, and what it learnt with beside them."""
    beside = weights.learnt.params if weights.learnt is not None else {}
    return trees.unflatten({**trees.flatten(weights.params), **beside})


def config_of_weights(weights: Weights, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """A config whose model is that of the weights; data and recipe are only a beginning.

    Raises:
      UserError: the config has no word for a setting, or an override is wrong.
    """
    settings, meta = weights.settings, weights.meta
    sizes = tuple(settings[name] for name in _SIZES)
    size = next((name for name, known in variants.SIZES.items() if known == sizes), 'mu')
    patch = 'x'.join(map(str, dict.fromkeys(settings['patch_size'])))
    hybrid = ''
    if settings['tokenizer'] in ('resnet', 'frozen_resnet'):
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
        'data.transform': pictures.transform_of(meta),
    }
    if weights.learnt is not None:
        flat |= {f'task.{name}': value for name, value in weights.learnt.task.items()}
    if size == 'mu':
        flat |= {f'model.{name}': settings[name] for name in _SIZES}
    for name in fit.FIELDS:
        key = f'model.{name}'
        if name in (*_SIZES, 'patch_size', 'resnet', 'num_classes'):
            continue
        if name == 'tokenizer' and settings[name] == 'resnet':  # As the variant has it.
            continue
        if key not in SCHEMA:
            if settings[name] != fit.complete({})[name]:
                raise UserError(f'config: there is no key {key}, which must be {settings[name]!r}')
        elif settings[name] != SCHEMA[key].default:
            flat[key] = settings[name]
    return config_lib.override(config_lib.resolve(flat), overrides)
