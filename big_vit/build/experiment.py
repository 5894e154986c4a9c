"""A whole config as an experiment: everything that training needs, nothing computed."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
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
from big_vit.build.optimizer import build_optimizer, in_steps, rate_schedule
from big_vit.config import Config
from big_vit.data import pipeline, sources, to_device
from big_vit.errors import UserError
from big_vit.models import flops
from big_vit.models.vit import ViT
from big_vit.optim import factory, per_layer, schedules


class Experiment(NamedTuple):
    """All that training needs, before anything is computed.

    `references` are the splits that evaluations learn from or search, by the evaluation's name.
    By parameter path: decay and factor on the rate, and `groups`, the optimizer's name;
    by that name `settings`, what it is made with.
    """

    mesh: Mesh
    data: Data
    evals: dict[str, Data]
    references: dict[str, Data]
    model: ViT
    optimizer: optax.GradientTransformationExtraArgs
    schedule: schedules.Schedule
    abstract_state: state.State
    total_steps: int
    flops_per_example: int
    decay_factors: dict[str, float]
    lr_factors: dict[str, per_layer.Factor]
    groups: dict[str, str]
    settings: dict[str, dict[str, Any]]
    batch_size: int
    intervals: 'Intervals'


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


# By the optimizers' names, with their own defaults.


def build_experiment(config: Config, devices: list[jax.Device] | None = None) -> Experiment:
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
    held_out, references = {}, {}
    for name in () if planning else config.evals:
        held_out[name] = eval_data(config, name, train)
        reference = reference_data(config, name, train)
        if reference is not None:
            references[name] = reference
    vit = build_model(config, classes, train.shapes, mesh)
    if classes < 2 and config.loss == 'softmax' and vit.fusion != 'apart':
        named = f' ({train.source.class_names[0]})' if train.source.class_names else ''
        raise UserError(
            f'config: data: {train.source.name} {train.source.split} has one class{named}, so '
            'there is nothing to tell apart: add a second one'
        )
    total = in_steps(config, 'total', config, train.source)
    if not total:
        raise UserError('config: total_steps, total_epochs or total_examples must be above 0')
    schedule = rate_schedule(config, train.source, total)
    shapes = state.abstract_params(vit, train.inputs)
    vit = vit.clone(gather=sharding.gather_weights(mesh, shapes, m.min_shard_size))
    made = build_optimizer(config, shapes, schedule, mesh)
    averaged = bool(config.ema) or 'schedule_free_adamw' in made.settings
    abstract_state = state.abstract(
        vit, train.inputs, made.transform, averaged, mesh, m.min_shard_size, shapes
    )
    sharding.check_spread(
        abstract_state, state.shardings(abstract_state), mesh, m.min_shard_size, m.max_replicated
    )
    return Experiment(
        mesh=mesh,
        data=train,
        evals=held_out,
        references=references,
        model=vit,
        optimizer=made.transform,
        schedule=schedule,
        abstract_state=abstract_state,
        total_steps=total,
        flops_per_example=training_flops(flops.cost(vit, train.shapes).flops, shapes, made.rate),
        decay_factors=made.decay,
        lr_factors=made.rate,
        groups=made.group,
        settings=made.settings,
        batch_size=config.batch_size,
        intervals=_intervals(config, train.source, total),
    )


def training_flops(forward: int, shapes: Any, rates: dict[str, per_layer.Factor]) -> int:
    """Operations of a training step for one example: three times the forward pass, less the frozen.

    Back through the model go the gradients of activations, unless the head alone is trained, and
    those of the parameters that are. Where lower blocks are frozen and upper ones are not, the
    former count as passed, so it is an upper bound there.
    """
    still, flat = factory.frozen(rates), trees.flatten(shapes)
    moving = {name: leaf for name, leaf in flat.items() if name not in still}
    through = any(not name.startswith(('head/', 'head_dist/')) for name in moving)
    share = trees.count(list(moving.values())) / trees.count(shapes)
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
