"""From the sections of a config to the objects that they describe, one function each."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from big_vit import augment, mixing, objectives, sharding, state, steps, trees
from big_vit import config as config_lib
from big_vit.config import Config
from big_vit.data import opening, order, pipeline, sources, transforms
from big_vit.errors import UserError
from big_vit.models import variants
from big_vit.models.vit import ViT
from big_vit.optim import factory, layers, schedules


class Data(NamedTuple):
    """A source with what makes its examples fit the model.

    `transform` is done on the host, and gives what `looks` says. `device` is the rest, as
    (name, function of (batch, rng)). `specs` can be opened by other processes, of which training
    has `workers`. `order` says which examples come when; an evaluation has none.
    """

    source: sources.Source
    transform: transforms.Transform
    looks: transforms.Looks
    device: tuple[tuple[str, Any], ...]
    specs: tuple[opening.Spec, ...]
    skip_bad: bool
    order: pipeline.Order | None = None
    workers: int = 0

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.looks.image_shape


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


_DEVICE_OPERATIONS = transforms.DeviceOperations(augment.OPERATIONS, augment.RANDOM)


def _spec(section: Config, key: str, config: Config, classes: int | None, host: str) -> Any:
    """The section as plain values.

    Args:
      classes: those of the model, where it is known already.
    """
    own = section.num_classes
    if own is None and section.label_map is None and section.classes is None:
        own = classes
    # A key that this source does not read stays unread, so that `Config.audit` refuses it.
    used = {name: section[name] for name in opening.KEYS[section.name]}
    return opening.Spec(
        key=key,
        name=section.name,
        split=section.split,
        transform=host,
        image_size=config.image_size,
        seed=config.seed,
        num_classes=own,
        classes=section.classes,
        label_map=section.label_map,
        cache=section.cache,
        cache_side=section.cache_side if section.cache == 'resized' else 0,
        **used,
    )


def _check_length(section: Config, key: str, source: sources.Source) -> None:
    examples = section.num_examples
    if examples and examples != source.length:
        raise UserError(
            f'config: {key}.num_examples={examples}, but {source.name} {section.split} has '
            f'{source.length}: the dataset is another or not complete'
        )


def _check_fit(found: Data, key: str) -> None:
    """Refuses labels that the loss cannot take, and a part for the devices that fails."""
    classes = found.source.num_classes
    if 'label' not in found.looks.parts:
        has = ', '.join(sorted(found.looks.parts))
        raise UserError(f'config: {key} gives {has} but no label')
    _check_device(found, key)
    shape, dtype = found.looks.parts['label']
    if shape == (classes,) or (shape == () and np.issubdtype(dtype, np.integer)):
        return
    raise UserError(
        f'config: {key}.transform gives labels of shape {shape} for {classes} classes: write '
        f'onehot({classes}) or multihot({classes})'
    )


def _check_device(found: Data, key: str) -> None:
    """UserError where the devices' part cannot be applied to what the host's part gives."""
    if not found.device:
        return
    one = {
        name: jax.ShapeDtypeStruct((1, *shape), jax.dtypes.canonicalize_dtype(dtype))
        for name, (shape, dtype) in found.looks.parts.items()
    }
    try:
        jax.eval_shape(prepare(found), one, jax.random.key(0))
    except ValueError as error:
        raise UserError(f'config: {key}.transform: {error}') from error


def train_data(config: Config, absent: bool = False) -> Data:
    """The training data: `data`, or the parts of `mixture`.

    Args:
      absent: take the number of examples and classes from the config where it has both,
        without opening anything.

    Raises:
      UserError: something is missing or does not fit.
    """
    sections = {f'mixture.{name}': complete(config, 'mixture', name) for name in config.mixture}
    counts, whole = None, config.data
    if sections:
        weights = {key: section.weight for key, section in sections.items()}
        for key, weight in weights.items():
            if not weight:
                raise UserError(f'config: {key}.weight must be above 0; leave the part out instead')
        counts = order.shares(tuple(weights.values()))
    else:
        sections = {'data': whole}
    for key, section in sections.items():
        if section.name is None:
            raise UserError(f'config: {key}.name must be set, or data.name for all parts')
    transform = transforms.parse(
        whole.transform, size=config.image_size, key='data', device=_DEVICE_OPERATIONS
    )
    specs = tuple(
        _spec(section, key, config, None, transform.host_text) for key, section in sections.items()
    )
    known = [(s.num_examples, s.num_classes) for s in sections.values()]
    if absent and all(examples and classes for examples, classes in known):
        name = ' + '.join(section.tfds_name or section.name for section in sections.values())
        source = sources.declared(
            name,
            whole.split if not config.mixture else 'mixture',
            sum(examples for examples, _ in known),
            max(classes for _, classes in known),
            config.image_size,
        )
        lengths: tuple[int, ...] = tuple(examples for examples, _ in known)
        host = transforms.parse(transform.host_text, size=config.image_size, key='data')
    else:
        source, host, lengths = opening.open_mixture(specs)
        if len(specs) == 1:
            _check_length(*next((s, k) for k, s in sections.items()), source)
    looks = transforms.check(host, source, config.image_size)
    if config.batch_size % whole.repeats:
        raise UserError(
            f'config: batch_size={config.batch_size} must be a multiple of '
            f'data.repeats={whole.repeats}'
        )
    kept = pipeline.Order(
        batch_size=config.batch_size,
        seed=config.seed,
        shuffle=whole.shuffle,
        repeats=whole.repeats,
        lengths=lengths,
        counts=counts,
    )
    skip = whole.on_error == 'skip'
    found = Data(source, host, looks, transform.device, specs, skip, kept, whole.workers)
    _check_fit(found, 'data')
    return found


def complete(config: Config, kind: str, name: str) -> Config:
    """An evaluation's section, or a mixture's, with what it leaves open taken from `data`.

    What says where a dataset is goes together: a section that names another source inherits
    none of it.
    """
    own, whole = config[kind][name], config.data
    defaults: dict[str, Any] = {'cache': whole.cache, 'cache_side': whole.peek('cache_side')}
    defaults['on_error'] = whole.on_error
    if kind == 'evals':
        defaults |= {'split': 'test', 'transform': 'resize(size)'}
    else:
        defaults['split'] = whole.split
    # Without data of its own, what `data` says is read by the parts of a mixture alone.
    take = whole.__getitem__ if kind == 'mixture' else whole.peek
    if own.name is None or own.name == whole.peek('name'):
        where = ('name', 'path', 'tfds_name', 'image_column', 'label_column')
        what = ('num_classes', 'label_map', 'classes')
        defaults.update({part: take(part) for part in (*where, *what)})
    return own.completed(defaults)


def eval_data(config: Config, name: str, train: Data) -> Data:
    """The data of an evaluation, checked against that of training.

    Raises:
      UserError: something is missing or does not fit.
    """
    key, section = f'evals.{name}', complete(config, 'evals', name)
    classes, channels = train.source.num_classes, train.image_shape[2]
    if section.name is None:
        raise UserError(f'config: {key}.name must be set')
    transform = transforms.parse(
        section.transform, size=config.image_size, key=key, device=_DEVICE_OPERATIONS
    )
    transforms.require_deterministic(transform)
    spec = _spec(section, key, config, classes, transform.host_text)
    source, host = opening.open_spec(spec)
    _check_length(section, key, source)
    looks = transforms.check(host, source, config.image_size)
    if looks.image_shape[2] != channels:
        raise UserError(
            f'config: {key}.transform gives images of {looks.image_shape[2]} channel(s), the '
            f'model takes {channels}: add rgb or grayscale to it'
        )
    if source.num_classes > classes:
        raise UserError(f'config: {key} has {source.num_classes} classes, the model {classes}')
    ours, theirs = train.source.class_names, source.class_names
    if ours and theirs and ours != theirs:
        strange = next((b for a, b in zip(ours, theirs, strict=False) if a != b), theirs[-1])
        raise UserError(
            f'config: {key} has other classes than the training data ({strange!r} is not class '
            f'{theirs.index(strange)} there): give both the same label_map or classes'
        )
    # What is not said about numbers is as in training, or the model sees another world.
    fixed = tuple(pair for pair in train.device if pair[0] not in augment.RANDOM)
    skip = section.on_error == 'skip'
    found = Data(source, host, looks, transform.device or fixed, (spec,), skip)
    _check_fit(found, key)
    return found


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
    train = train_data(config, absent=planning)
    classes = train.source.num_classes
    held_out = {} if planning else {n: eval_data(config, n, train) for n in config.evals}
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


def host_batches(
    found: Data, start_step: int, rows: Any, meter: pipeline.Meter | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """The training batches from `start_step` on as NumPy arrays, of these rows."""
    assert found.order is not None
    return pipeline.train_batches(
        found.source,
        found.transform,
        found.order,
        start_step=start_step,
        rows=rows,
        skip_bad=found.skip_bad,
        workers=found.workers,
        opener=functools.partial(opening.open_examples, found.specs, found.workers),
        meter=meter,
    )


def train_batches(config: Config, parts: Experiment, start_step: int) -> pipeline.DeviceBatches:
    """The batches from `start_step` on, as global arrays, one ahead of the step."""
    where = sharding.batch_sharding(parts.mesh)
    rows, meter = pipeline.local_rows(where, config.batch_size), pipeline.Meter()
    batches = host_batches(parts.data, start_step, rows, meter)
    return pipeline.to_device(batches, where, batch_size=config.batch_size, meter=meter)


def example_indices(parts: Experiment, step: int) -> list[int]:
    """Which examples the batch of this step holds (of a 0-based step)."""
    assert parts.data.order is not None
    index, _ = parts.data.order.indices(step, parts.data.source.length)
    return index.tolist()


def abstract_batch(parts: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    """What a training batch looks like, without loading one."""
    where = sharding.batch_sharding(parts.mesh)
    looks = dict(parts.data.looks.parts)
    if parts.data.skip_bad:
        looks['replaced'] = (), np.dtype(np.uint8)
    return {
        name: jax.ShapeDtypeStruct(
            (parts.batch_size, *shape), jax.dtypes.canonicalize_dtype(dtype), sharding=where
        )
        for name, (shape, dtype) in looks.items()
    }


def eval_batches(parts: Experiment, name: str) -> Iterator[dict[str, jax.Array]]:
    """Every example of an evaluation once, as global arrays, padded with a mask."""
    where, size, found = sharding.batch_sharding(parts.mesh), parts.batch_size, parts.evals[name]
    batches = pipeline.eval_batches(
        found.source,
        found.transform,
        batch_size=size,
        rows=pipeline.local_rows(where, size),
        skip_bad=found.skip_bad,
    )
    with pipeline.to_device(batches, where, batch_size=size) as on_device:
        yield from on_device


def prepare(found: Data) -> Any:
    """What the devices do to a batch before anything else, (batch, rng) -> batch; or None."""
    return augment.compose([function for _, function in found.device]) if found.device else None


def mix(config: Config, found: Data, mesh: Mesh) -> Any:
    """What mixes the examples of a batch, (batch, rng) -> batch; or None."""
    if not config.mixup and not config.cutmix:
        return None
    more = {'switch': config.mix_switch} if config.mixup and config.cutmix else {}
    return functools.partial(
        mixing.mix,
        mixup=config.mixup,
        cutmix=config.cutmix,
        prob=config.mix_prob,
        num_classes=found.source.num_classes,
        replicate=sharding.constrain_replicated(mesh),
        **more,
    )


def train_step(config: Config, parts: Experiment) -> Any:
    """The one train step, for training, transfer, planning and benchmarks."""
    return steps.make_train_step(
        objectives.classification(parts.model.apply, config.label_smoothing, config.loss),
        parts.optimizer,
        parts.schedule,
        parts.like,
        parts.mesh,
        prepare=prepare(parts.data),
        mix=mix(config, parts.data, parts.mesh),
        seed=config.seed,
        accumulation=config.accumulation,
        ema=config.ema,
        skip_sigmas=config.skip_sigmas,
        frozen=factory.frozen(parts.lr_factors),
        sam_rho=config.optim.sam_rho,
        sam_adaptive=bool(config.optim.sam_rho) and config.optim.sam_adaptive,
    )


def seen(config: Config, found: Data, batch: dict[str, Any], step: int) -> dict[str, Any]:
    """A batch as the model sees it at a step, on one device."""
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    arrays = {name: jnp.asarray(column) for name, column in batch.items()}
    made = functools.partial(
        steps.seen, prepare=prepare(found), mix=mix(config, found, mesh), seed=config.seed
    )
    result = jax.jit(made)(arrays, step=step)
    return {**result, 'image': objectives.normalise(result['image'])}


def eval_steps(config: Config, parts: Experiment) -> dict[str, Any]:
    """The jitted step of each evaluation; those that prepare images alike share one."""
    made: dict[Any, Any] = {}
    for found in parts.evals.values():
        if found.device not in made:
            made[found.device] = _eval_step(config, parts, found)
    return {name: made[found.device] for name, found in parts.evals.items()}


def _eval_step(config: Config, parts: Experiment, found: Data) -> Any:
    apply, key = prepare(found), jax.random.key(0)  # Nothing that an evaluation does draws.
    sums = objectives.classification_sums(
        parts.model.apply, (lambda batch: apply(batch, key)) if apply else lambda b: b, config.loss
    )
    return steps.make_eval_step(sums, parts.like, parts.mesh)


def log_targets(config: Config) -> dict[str, Any]:
    """Where metrics go beside JSONL, as arguments of `metrics.Writer`."""
    return {'tensorboard': config.log.tensorboard, 'wandb': config.log.wandb}
