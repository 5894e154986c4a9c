"""From the sections of a config to the objects that they describe, one function each."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from big_vit import config as config_lib
from big_vit import mixing, objectives, sharding, state, steps, trees
from big_vit.config import Config
from big_vit.data import fdsl, order, pipeline, sources, transforms
from big_vit.errors import UserError
from big_vit.models import variants
from big_vit.models.vit import ViT
from big_vit.optim import factory, layers, schedules


class Data(NamedTuple):
    """A source with the transform that makes its examples fit the model."""

    source: sources.Source
    transform: transforms.Transform
    image_shape: tuple[int, int, int]


class Experiment(NamedTuple):
    """All that training needs, before anything is computed.

    By parameter path: decay and factor on the rate, and `groups`, the optimizer's name;
    by that name `settings`, what it is made with.
    """

    mesh: Mesh
    data: Data
    evals: dict[str, Data]
    model: ViT
    optimizer: optax.GradientTransformationExtraArgs
    schedule: schedules.Schedule
    like: state.State
    total_steps: int
    flops_per_example: int
    decay_factors: dict[str, float]
    lr_factors: dict[str, layers.Factor]
    groups: dict[str, str]
    settings: dict[str, dict[str, Any]]
    batch_size: int
    due: 'Duties'


class Duties(NamedTuple):
    """Every how many steps what is due; 0 is never. `keep_last` is a number of checkpoints."""

    log: int
    save: int
    keep: int
    keep_last: int
    evals: dict[str, int]


def is_due(every: int, step: int, total: int) -> bool:
    """At multiples of `every` and at the end."""
    return bool(every) and (step % every == 0 or step == total)


def _required(section: Config, name: str, key: str) -> Any:
    value = section[name]
    if value is None:
        raise UserError(f'config: {key}.{name} must be set for {key}.name={section.name!r}')
    return value


def data(
    section: Config,
    key: str,
    image_size: tuple[int, int],
    seed: int,
    num_classes: int | None,
    absent: bool = False,
) -> Data:
    """Opens a source and checks that its transform gives what the model takes.

    Args:
      section: the config's `data`, or one of `evals` completed by `complete_eval`.
      key: the section's path, for messages.
      num_classes: the model's, where it is known already.
      absent: take the number of examples and classes from the config where it has both,
        without opening anything.
    """
    name, split = section.name, section.split
    classes, examples = section.num_classes or num_classes, section.num_examples
    if absent and classes and examples:
        source = sources.declared(section.tfds_name or name, split, examples, classes, image_size)
    elif name == 'fdsl':
        if classes is None:
            raise UserError(f"config: {key}.num_classes must be set for {key}.name='fdsl'")
        source = fdsl.fdsl(split, classes, image_size, seed, key=key)
    elif name == 'digits':
        source = sources.digits(split, key=key)
    elif name == 'idx':
        source = sources.idx(split, _required(section, 'path', key), classes, key=key)
    else:
        tfds_name = _required(section, 'tfds_name', key)
        source = sources.tfds(split, tfds_name, section.path or '', classes, key=key)
    if examples and examples != source.length:
        raise UserError(
            f'config: {key}.num_examples={examples}, but {source.name} {split} has '
            f'{source.length}: the dataset is another or not complete'
        )
    transform = transforms.parse(section.transform, size=image_size, key=key)
    shape = transforms.check(transform, source, image_size, train=key == 'data')
    return Data(source, transform, shape)


def complete_eval(config: Config, name: str) -> Config:
    """An evaluation's section with what it leaves open taken from `data`.

    What says where a dataset is goes together: an evaluation that names another
    source inherits none of it.
    """
    own, whole = config.evals[name], config.data
    defaults: dict[str, Any] = {'split': 'test', 'transform': 'resize(size)'}
    if own.name is None or own.name == whole.name:
        inherited = ('name', 'path', 'tfds_name', 'num_classes')
        defaults.update({part: whole.peek(part) for part in inherited})
    return own.completed(defaults)


def evals(config: Config, num_classes: int, image_shape: tuple[int, int, int]) -> dict[str, Data]:
    """The data of each evaluation, checked against the model that it will score."""
    result = {}
    for name in config.evals:
        key, section = f'evals.{name}', complete_eval(config, name)
        found = data(section, key, config.image_size, config.seed, num_classes)
        if found.image_shape != image_shape:
            raise UserError(
                f'config: {key}.transform gives images of {found.image_shape[2]} channel(s), the '
                f'model takes {image_shape[2]}: add rgb or grayscale to it'
            )
        if found.source.num_classes > num_classes:
            raise UserError(
                f'config: {key} has {found.source.num_classes} classes, the model {num_classes}'
            )
        result[name] = found
    return result


def model(config: Config, num_classes: int, image_size: tuple[int, int], mesh: Mesh) -> ViT:
    """The ViT of the config.

    Raises:
      UserError: sizes that do not fit together.
    """
    m = config.model
    fields: dict[str, Any] = variants.parse(m.variant)
    for name in ('width', 'depth', 'mlp_dim', 'num_heads'):
        value = m[name]
        fields[name] = fields[name] if value is None else value
    width, heads, patch = fields['width'], fields['num_heads'], fields['patch_size']
    if width % heads:
        raise UserError(f'config: model.width={width} is not divisible by model.num_heads={heads}')
    if m.posemb == 'sincos2d' and width % 4:
        raise UserError(
            f"config: model.width={width} must be divisible by 4 for model.posemb='sincos2d'"
        )
    if image_size[0] % patch[0] or image_size[1] % patch[1]:
        raise UserError(
            f'config: image_size {image_size[0]}x{image_size[1]} is not divisible by the '
            f'{patch[0]}x{patch[1]} patch of model.variant={m.variant!r}'
        )
    device = mesh.devices.flat[0]
    if m.remat == 'offload' and device in jax.local_devices():
        kinds = {memory.kind for memory in device.addressable_memories()}
        if 'pinned_host' not in kinds:
            raise UserError(
                f"config: model.remat='offload' needs a host memory that {device.device_kind} has "
                f"not ({', '.join(sorted(kinds))}); use 'names' or 'full'"
            )
    return ViT(
        num_classes=num_classes,
        posemb=m.posemb,
        pool=m.pool,
        dropout=m.dropout,
        scan=m.scan,
        remat=m.remat,
        dtype=jnp.dtype(m.dtype),
        constrain=sharding.constrain_batch(mesh, config.mesh.sequence),
        **fields,
    )


def model_cost(vit: ViT, image_shape: tuple[int, int, int]) -> tuple[int, int]:
    """(parameters, forward floating-point operations per image), from the sizes alone."""
    sizes: dict[str, Any] = dict(
        image=image_shape,
        num_classes=vit.num_classes,
        patch_size=vit.patch_size,
        width=vit.width,
        depth=vit.depth,
        mlp_dim=vit.mlp_dim,
        pool=vit.pool,
    )
    return variants.count_params(posemb=vit.posemb, **sizes), variants.forward_flops(**sizes)


class Optimizer(NamedTuple):
    """An optimizer, and by parameter path what it does."""

    transform: optax.GradientTransformationExtraArgs
    decay: dict[str, float]
    rate: dict[str, layers.Factor]
    group: dict[str, str]
    settings: dict[str, dict[str, Any]]  # By the optimizers' names, with their own defaults.


def optimizer(config: Config, shapes: Any, schedule: schedules.Schedule, mesh: Mesh) -> Optimizer:
    """The optimizer of the config, for parameters of these shapes.

    Raises:
      UserError: rules that fit no parameter, or choices that exclude each other.
    """
    o, names = config.optim, list(trees.flatten(shapes))
    if o.group_rules is None:
        group = dict.fromkeys(names, o.name)
    else:
        group = trees.match_rules(o.group_rules, names, 'config: optim.group_rules')
    settings = {}
    for name in dict.fromkeys(group.values()):
        own = factory.defaults(name)
        given = {key: o[key] for key in own}
        settings[name] = {key: own[key] if given[key] is None else given[key] for key in own}
    if 'schedule_free_adamw' in settings:
        _check_schedule_free(config, settings)
    laws = {name: factory.LAWS[name](**keys) for name, keys in settings.items()}
    law = next(iter(laws.values())) if len(laws) == 1 else factory.grouped(laws, group)
    rate: dict[str, Any] = trees.match_rules(o.lr_rules, names, 'config: optim.lr_rules')
    if o.layer_decay != 1:
        for name, factor in layers.decay_factors(o.layer_decay, shapes).items():
            each = tuple(rate[name] * f for f in np.atleast_1d(factor).tolist())
            rate[name] = each if isinstance(factor, tuple) else each[0]
    if o.weight_decay:
        factors = trees.match_rules(o.weight_decay_rules, names, 'config: optim.weight_decay_rules')
        decay = {name: o.weight_decay * factor for name, factor in factors.items()}
    else:
        decay = dict.fromkeys(names, 0.0)
    made = factory.make(
        law,
        schedule,
        decay_factors=decay,
        lr_factors=rate,
        clip=o.clip,
        agc=o.agc,
        mesh=mesh,
    )
    return Optimizer(made, decay, rate, group, settings)


def _check_schedule_free(config: Config, settings: dict[str, Any]) -> None:
    if len(settings) > 1:
        raise UserError(
            'config: optim.group_rules: schedule_free_adamw averages all parameters, so it cannot '
            'be one of several optimizers'
        )
    if settings['schedule_free_adamw']['b1'] == 0:
        raise UserError('config: optim.b1 must be above 0 for schedule_free_adamw')
    if config.ema:
        raise UserError(
            'config: ema must be 0 for schedule_free_adamw: what is evaluated is its own average'
        )
    if config.schedule.name != 'constant':
        raise UserError(
            "config: schedule.name must be 'constant' for schedule_free_adamw (a warmup may be "
            f'set), got {config.schedule.name!r}'
        )


def rate_schedule(config: Config, source: sources.Source, total: int) -> schedules.Schedule:
    """The learning rate by step."""
    section = config.schedule
    more: dict[str, Any] = {}
    if section.name in ('cosine', 'linear'):
        more['end'] = section.end
    else:
        more['cooldown_steps'] = in_steps(section, 'cooldown', config, source, total) or 0
    if section.name == 'rsqrt':
        timescale = in_steps(section, 'timescale', config, source, total)
        more['timescale'] = 10_000 if timescale is None else timescale
    warmup = in_steps(section, 'warmup', config, source, total) or 0
    return schedules.make(
        section.name, peak=config.lr, total_steps=total, warmup_steps=warmup, **more
    )


def experiment(config: Config, devices: list[jax.Device] | None = None) -> Experiment:
    """Everything that the config describes; reads every key that it uses, computes nothing.

    Args:
      devices: of a machine that is not there, to plan for: then datasets need not be here
        either, and evaluations are left out. By default the devices of this run.

    Raises:
      UserError: parts that do not exist or do not fit together.
    """
    m, planning = config.mesh, devices is not None
    mesh = sharding.make_mesh(m.replica, m.fsdp, m.tensor, devices)
    sharding.check_batch(config.batch_size, mesh, 'batch_size', config.accumulation)
    train = data(config.data, 'data', config.image_size, config.seed, None, absent=planning)
    classes = train.source.num_classes
    held_out = {} if planning else evals(config, classes, train.image_shape)
    vit = model(config, classes, config.image_size, mesh)
    total = in_steps(config, 'total', config, train.source)
    if not total:
        raise UserError('config: total_steps, total_epochs or total_examples must be above 0')
    schedule = rate_schedule(config, train.source, total)
    shapes = state.abstract_params(vit, train.image_shape)
    vit = vit.clone(gather=sharding.gather_weights(mesh, shapes, m.min_shard_size))
    made = optimizer(config, shapes, schedule, mesh)
    averaged = bool(config.ema) or 'schedule_free_adamw' in made.settings
    like = state.abstract(vit, train.image_shape, made.transform, averaged, mesh, m.min_shard_size)
    sharding.check_spread(like, state.shardings(like), mesh, m.min_shard_size, m.max_replicated)
    return Experiment(
        mesh=mesh,
        data=train,
        evals=held_out,
        model=vit,
        optimizer=made.transform,
        schedule=schedule,
        like=like,
        total_steps=total,
        flops_per_example=3 * model_cost(vit, train.image_shape)[1],
        decay_factors=made.decay,
        lr_factors=made.rate,
        groups=made.group,
        settings=made.settings,
        batch_size=config.batch_size,
        due=_duties(config, train.source, total),
    )


def in_steps(
    section: Config, name: str, config: Config, source: sources.Source, total: int | None = None
) -> int | None:
    """A duration of the config in steps, None where it is not set."""
    return config_lib.steps(
        section, name, batch_size=config.batch_size, examples=source.length, total=total
    )


def _duties(config: Config, source: sources.Source, total: int) -> Duties:
    """When not set: log at each 1 %, save at each 10 %, evaluate at each 10 % of the run."""

    def every(section: Config, name: str, otherwise: int) -> int:
        steps = in_steps(section, name, config, source, total)
        return otherwise if steps is None else steps

    tenth = max(1, total // 10)
    return Duties(
        log=every(config.log, 'every', max(1, total // 100)),
        save=every(config.checkpoint, 'every', tenth),
        keep=every(config.checkpoint, 'keep_every', 0),
        keep_last=config.checkpoint.keep_last,
        evals={name: every(config.evals[name], 'every', tenth) for name in config.evals},
    )


def train_batches(config: Config, parts: Experiment, start_step: int) -> pipeline.DeviceBatches:
    """The batches from `start_step` on, as global arrays, one ahead of the step."""
    where = sharding.batch_sharding(parts.mesh)
    batches = pipeline.train_batches(
        parts.data.source,
        parts.data.transform,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=start_step,
        rows=pipeline.local_rows(where, config.batch_size),
        shuffle=config.data.shuffle,
    )
    return pipeline.to_device(batches, where, batch_size=config.batch_size)


def example_indices(config: Config, parts: Experiment, step: int) -> list[int]:
    """Which examples the batch of this step holds (of a 0-based step)."""
    index, _ = order.example_indices(
        step,
        length=parts.data.source.length,
        batch_size=parts.batch_size,
        seed=config.seed,
        shuffle=config.data.shuffle,
    )
    return index.tolist()


def abstract_batch(parts: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    """What a training batch looks like, without loading one."""
    where = sharding.batch_sharding(parts.mesh)
    size = parts.batch_size
    return {
        'image': jax.ShapeDtypeStruct((size, *parts.data.image_shape), jnp.uint8, sharding=where),
        'label': jax.ShapeDtypeStruct((size,), jnp.int32, sharding=where),
    }


def eval_batches(parts: Experiment, name: str) -> Iterator[dict[str, jax.Array]]:
    """Every example of an evaluation once, as global arrays, padded with a mask."""
    where, size, found = sharding.batch_sharding(parts.mesh), parts.batch_size, parts.evals[name]
    batches = pipeline.eval_batches(
        found.source,
        found.transform,
        batch_size=size,
        rows=pipeline.local_rows(where, size),
    )
    with pipeline.to_device(batches, where, batch_size=size) as on_device:
        yield from on_device


def train_step(config: Config, parts: Experiment) -> Any:
    """The one train step, for training, transfer, planning and benchmarks."""
    mix = None
    if config.mixup:
        mix = functools.partial(
            mixing.mixup,
            alpha=config.mixup,
            num_classes=parts.model.num_classes,
            replicate=sharding.constrain_replicated(parts.mesh),
        )
    return steps.make_train_step(
        objectives.classification(parts.model.apply, config.label_smoothing),
        parts.optimizer,
        parts.schedule,
        parts.like,
        parts.mesh,
        mix=mix,
        seed=config.seed,
        accumulation=config.accumulation,
        ema=config.ema,
        skip_sigmas=config.skip_sigmas,
        frozen=factory.frozen(parts.lr_factors),
        sam_rho=config.optim.sam_rho,
        sam_adaptive=bool(config.optim.sam_rho) and config.optim.sam_adaptive,
    )


def eval_step(parts: Experiment) -> Any:
    """The jitted evaluation step."""
    sums = objectives.classification_sums(parts.model.apply)
    return steps.make_eval_step(sums, parts.like, parts.mesh)


def log_targets(config: Config) -> dict[str, Any]:
    """Where metrics go beside JSONL, as arguments of `metrics.Writer`."""
    return {'tensorboard': config.log.tensorboard, 'wandb': config.log.wandb}
