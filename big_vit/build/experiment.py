"""A whole config as an experiment: everything that training needs, nothing computed."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from big_vit import sharding, state, trees
from big_vit.build.data import (
    Data,
    eval_data,
    host_batches,
    reference_data,
    train_data,
)
from big_vit.build.model import build_model
from big_vit.build.optimizer import Length, build_optimizer, in_steps, rate_schedule, run_length
from big_vit.build.task import build_task
from big_vit.build.teacher import Teacher, build_teacher
from big_vit.config import Config
from big_vit.config.fields import INT_MAX
from big_vit.data import pipeline, shard_ledger, sources, to_device
from big_vit.data.sources.known import Known
from big_vit.errors import UserError
from big_vit.models import flops
from big_vit.models.placement import placed, unplaced
from big_vit.optim import factory, per_layer, schedules
from big_vit.tasks.task import Run, Task


class Experiment(NamedTuple):
    """All that training needs, before anything is computed.

    `forward_flops` are those of the loss of one example, `flops_per_example` those of a training
    step. `references` are the splits that evaluations learn from or search, by the evaluation's
    name.
    By parameter path: decay (what multiplies `decay_schedule`, if there is one), factor on the
    rate, first step of those that are held until then, and `groups`, the optimizer's name; by that
    name `settings`, what it is made with.
    """

    mesh: Mesh
    data: Data
    evals: dict[str, Data]
    references: dict[str, Data]
    task: Task
    model: Any
    optimizer: optax.GradientTransformationExtraArgs
    schedule: schedules.Schedule
    abstract_state: state.State
    total_steps: int
    forward_flops: float
    flops_per_example: int
    decay_factors: dict[str, float]
    lr_factors: dict[str, per_layer.Factor]
    groups: dict[str, str]
    settings: dict[str, dict[str, Any]]
    decay_schedule: schedules.Schedule | None
    first_steps: dict[str, int | float]
    batch_size: int
    intervals: 'Intervals'
    teacher: Teacher | None = None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes that the head tells apart, in order; None if it has no names.

        Of boxes and of pixels there always are, if only numbers: nothing else in a checkpoint says
        how many classes there are.
        """
        source = self.data.source
        if self.task.provides & {'boxes', 'pixels'}:
            return source.class_names or tuple(map(str, range(source.num_classes)))
        return source.class_names if 'logits' in self.task.provides else None


class Seen(NamedTuple):
    """How far a run is.

    Attributes:
      step: number of its steps.
      position: of the next example in the order of the data.
      ledgers: of the shards of its data, by their section of the config.
    """

    step: int
    position: int
    ledgers: Mapping[str, shard_ledger.Ledger] = MappingProxyType({})


class Intervals(NamedTuple):
    """Every how many steps what is due; 0 is never. `keep_last` is a number of checkpoints."""

    log: int
    save: int
    keep: int
    keep_last: int
    evals: dict[str, int]


def is_due(every: int, step: int, total: int) -> bool:
    """At multiples of `every` and at the end."""
    return bool(every) and (step % every == 0 or step == total)


def build_experiment(
    config: Config,
    devices: list[jax.Device] | None = None,
    known: Known | None = None,
    to_train: bool = True,
    seen: 'Seen | None' = None,
) -> Experiment:
    """Everything that the config describes; reads every key that it uses, computes nothing.

    Args:
      devices: of a machine that is not there, to plan for: then datasets need not be here
        either, and evaluations are left out. By default the devices of this run.
      known: classes of the parameters that this is for, if there are some already.
      to_train: whether these are trained on, and not only scored.
      seen: where in the order of the data the run is that this goes on with.

    Raises:
      UserError: parts that do not exist or do not fit together.
    """
    m, planning = config.mesh, devices is not None
    mesh = sharding.make_mesh(m.replica, m.fsdp, m.tensor, devices)
    sharding.check_batch(config.batch_size, mesh, 'batch_size', config.accumulation)
    train = train_data(
        config,
        absent=planning,
        known=known,
        to_train=to_train,
        ledgers=None if seen is None else seen.ledgers,
    )
    classes = train.source.num_classes
    held_out, references = ({}, {}) if planning else _evaluated(config, train)
    task = build_task(config.task)
    _check_accumulation(config, task)
    learnt = {part: train.shapes[part] for part in task.reads}
    model = build_model(config, classes, {**train.input_shapes, **learnt}, mesh)
    _check_classes(task, train.source)
    order = train.order
    assert order is not None
    shift = 0 if seen is None else seen.position - seen.step * order.positions
    train, ahead = train._replace(order=replace(order, shift=shift)), shift / order.positions
    total = _total_steps(config, train.source, ahead)
    schedule = rate_schedule(config, train.source, total, ahead=ahead)
    shapes = _abstract_params(config, model, train)
    gather = sharding.gather_weights(mesh, shapes, m.min_shard_size)
    model = placed(
        model,
        gather=gather,
        collect=sharding.collect_kernel(mesh),
        by_device=sharding.by_device(mesh),
    )
    made = build_optimizer(config, shapes, schedule, mesh, Length(train.source, total, ahead))
    schedule_free = 'schedule_free_adamw' in made.settings
    _check_teacher(config, task, schedule_free)
    averaged = bool(config.ema) or schedule_free or task.teacher_rate is not None
    abstract_state = state.abstract(
        model, train.inputs, made.transform, averaged, mesh, m.min_shard_size, shapes, task.state
    )
    teacher = build_teacher(config, task, train.input_shapes, mesh) if to_train else None
    if teacher is not None:
        abstract_state['teacher'] = teacher.params
    sharding.check_spread(
        abstract_state, state.shardings(abstract_state), mesh, m.min_shard_size, m.max_replicated
    )
    parts = train.example_spec.parts
    forward, targets = loss_flops(task, model, shapes, parts, config.batch_size, teacher)
    return Experiment(
        mesh=mesh,
        data=train,
        evals=held_out,
        references=references,
        task=task,
        model=model,
        optimizer=made.transform,
        schedule=schedule,
        abstract_state=abstract_state,
        total_steps=total,
        forward_flops=forward + targets,
        flops_per_example=training_flops(task, forward, shapes, made.rate) + round(targets),
        decay_factors=made.decay,
        lr_factors=made.rate,
        groups=made.group,
        settings=made.settings,
        decay_schedule=made.decay_schedule,
        first_steps=made.start,
        batch_size=config.batch_size,
        intervals=_intervals(config, train.source, total),
        teacher=teacher,
    )


def _evaluated(config: Config, train: Data) -> tuple[dict[str, Data], dict[str, Data]]:
    """The splits of all evaluations, and those that some of them learn from or search."""
    held_out, references = {}, {}
    for name in config.evals:
        reference = reference_data(config, name, train)
        held_out[name] = eval_data(config, name, train, reference)
        if reference is not None:
            references[name] = reference
    return held_out, references


def _check_accumulation(config: Config, task: Task) -> None:
    if task.whole_batch and config.accumulation > 1:
        raise UserError(
            f'config: accumulation={config.accumulation}, but the loss of task.name={task.name!r} '
            'as configured is of all examples of a batch together: set it to 1, with a smaller '
            "batch_size, model.remat='full' or more devices"
        )


def _total_steps(config: Config, source: sources.Source, ahead: float) -> int:
    total = run_length(config, source, ahead)
    if not total:
        raise UserError('config: total_steps, total_epochs or total_examples must be above 0')
    if total > INT_MAX:
        raise UserError(f'config: total_* comes to {total} steps; the most are 2**31 - 1')
    return total


def _abstract_params(config: Config, model: Any, train: Data) -> Any:
    """Trace the shapes of the parameters; refuse a stream with the name of another part."""
    try:
        return state.abstract_params(model, train.inputs)
    except flax.errors.NameInUseError as error:
        taken = next((name for name in config.streams if f'"{name}"' in str(error)), None)
        if taken is None:
            raise
        raise UserError(
            f'config: streams.{taken}: another part of the model has this name: rename the stream, '
            f'as in streams.of_{taken}'
        ) from None


def _check_teacher(config: Config, task: Task, schedule_free: bool) -> None:
    """Refuses a second average of the parameters beside a teacher, which is one."""
    if task.teacher_rate is None:
        return
    what = "optim.name='schedule_free_adamw' averages" if schedule_free else ''
    what = f'ema={config.ema:g} averages' if config.ema else what
    if what:
        raise UserError(
            f'config: {what} the parameters, but task.name={task.name!r} has an average of them '
            'already, its teacher, which is what is evaluated and saved: remove it'
        )


def _check_classes(task: Task, source: sources.Source) -> None:
    if source.num_classes < task.least_classes:
        named = f' ({source.class_names[0]})' if source.class_names else ''
        raise UserError(
            f'config: data: {source.name} {source.split} has one class{named}, so '
            'there is nothing to tell apart: add a second one'
        )


def fresh_state(parts: Experiment, seed: int, params: Any = None) -> state.State:
    """The state at step 0, sharded as the experiment says, without a frozen teacher.

    Args:
      params: NumPy parameters to start from instead of random ones.
    """
    return state.create(
        parts.model,
        parts.data.inputs,
        parts.optimizer,
        seed,
        parts.abstract_state,
        params,
        parts.task.state,
    )


def loss_flops(
    task: Task,
    model: Any,
    params: Any,
    parts: dict[str, tuple[tuple[int, ...], Any]],
    batch_size: int,
    teacher: Teacher | None = None,
) -> tuple[float, float]:
    """Operations of the forward pass of the loss and of its targets, for one example of a batch.

    Counted in the traced program of the task, so whatever a task adds is there, and what it leaves
    out (hidden patches, dropped ones) is not. Targets have no gradient, and are computed once.

    Args:
      params: abstract parameters.
      parts: shape and type of each part of an example.
    """

    # Of fused kernels a trace shows no products.
    def plain_one(model: Any) -> Any:
        return placed(unplaced(model), attention='xla')

    plain = plain_one(model)
    run = Run(1, batch_size, None if teacher is None else plain_one(teacher.model))
    batch = {
        name: jax.ShapeDtypeStruct((batch_size, *shape), jax.dtypes.canonicalize_dtype(dtype))
        for name, (shape, dtype) in parts.items()
    }
    task_state: Any = jax.eval_shape(task.state, params) if task.state else ()
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = jax.ShapeDtypeStruct((), jnp.int32)
    if task.teacher_rate is not None:
        frozen = params if teacher is None else teacher.params
        task_state = {**(task_state or {}), 'teacher': frozen}
    if task.draw is not None:
        batch = {**batch, 'drawn': jax.eval_shape(task.draw(plain), batch, key)}
    of_targets = 0
    if task.targets is not None:
        rows, shared = task.targets(plain, run)
        given = jax.eval_shape(rows, task_state, batch, key, step)
        of_targets = flops.count(rows, task_state, batch, key, step)
        of_targets += flops.count(shared, task_state, given, step)
        task_state = {
            **(task_state or {}),
            'targets': jax.eval_shape(shared, task_state, given, step),
        }
        batch = {**batch, 'targets': given}
    of_loss = flops.count(task.loss(plain, run), params, task_state, batch, key, step)
    return of_loss / batch_size, of_targets / batch_size


def training_flops(
    task: Task, forward: float, shapes: Any, rates: dict[str, per_layer.Factor]
) -> int:
    """Operations of a training step for one example: three times the forward pass, less the frozen.

    Back through the model go the gradients of activations, unless only what the task adds to its
    trunk is trained, and those of the parameters that are. Where lower blocks are frozen and upper
    ones are not, the former count as passed, so it is an upper bound there.
    """
    frozen, flat = factory.frozen(rates), trees.flatten(shapes)
    trained = {name: leaf for name, leaf in flat.items() if name not in frozen}
    through = any(not task.is_addition(name) for name in trained)
    share = trees.count(list(trained.values())) / trees.count(shapes)
    return round(forward * (1 + through + share))


def _intervals(config: Config, source: sources.Source, total: int) -> Intervals:
    """When not set: log at each 1 %, save at each 10 %, evaluate at each 10 % of the run."""

    def every(section: Config, name: str, otherwise: int) -> int:
        steps = in_steps(section, name, config, source, total)
        return otherwise if steps is None else steps

    tenth = max(1, total // 10)
    return Intervals(
        log=every(config.log, 'every', max(1, total // 100)),
        save=every(config.checkpoint, 'every', tenth),
        keep=every(config.checkpoint, 'keep_every', 0),
        keep_last=config.checkpoint.keep_last,
        evals={name: every(config.evals[name], 'every', tenth) for name in config.evals},
    )


def train_batches(config: Config, parts: Experiment, start_step: int) -> to_device.DeviceBatches:
    """The batches from `start_step` on, as global arrays, one ahead of the step."""
    where = sharding.batch_sharding(parts.mesh)
    rows, meter = to_device.local_rows(where, config.batch_size), pipeline.Meter()
    batches = host_batches(parts.data, start_step, rows, meter)
    return to_device.to_device(batches, where, batch_size=config.batch_size, meter=meter)


def example_indices(parts: Experiment, step: int) -> list[int]:
    """Which examples the batch of this step holds (of a 0-based step)."""
    assert parts.data.order is not None
    index, _ = parts.data.order.indices(step, parts.data.source.length)
    return index.tolist()


def abstract_batch(parts: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    """What a training batch looks like, without loading one."""
    where = sharding.batch_sharding(parts.mesh)
    example_spec = dict(parts.data.example_spec.parts)
    if parts.data.skip_bad:
        example_spec['replaced'] = (), np.dtype(np.uint8)
    return {
        name: jax.ShapeDtypeStruct(
            (parts.batch_size, *shape), jax.dtypes.canonicalize_dtype(dtype), sharding=where
        )
        for name, (shape, dtype) in example_spec.items()
    }


def eval_batches(parts: Experiment, name: str) -> Iterator[dict[str, jax.Array]]:
    """Every example of an evaluation once, as global arrays, padded with a mask."""
    return all_batches(parts, parts.evals[name])


def tracker_options(config: Config) -> dict[str, Any]:
    """Where metrics go beside JSONL, as arguments of `metrics.Writer`."""
    return {'tensorboard': config.log.tensorboard, 'wandb': config.log.wandb}


def all_batches(parts: Experiment, found: Data) -> Iterator[dict[str, jax.Array]]:
    """Every example of a split once, as global arrays, padded with a mask."""
    where, size = sharding.batch_sharding(parts.mesh), parts.batch_size
    batches = pipeline.eval_batches(
        found.source,
        found.transform,
        batch_size=size,
        rows=to_device.local_rows(where, size),
        skip_bad=found.skip_bad,
    )
    with to_device.to_device(batches, where, batch_size=size) as on_device:
        yield from on_device
