"""The train step of an experiment."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from big_vit import augment, sharding, state, steps
from big_vit.build.data import Data, device_operations
from big_vit.build.experiment import Experiment
from big_vit.build.task import build_task
from big_vit.config import Config
from big_vit.errors import UserError
from big_vit.models import tokenizers
from big_vit.optim import factory, schedules
from big_vit.tasks.batch import normalise
from big_vit.tasks.task import Run


def build_mixing(config: Config, found: Data, mesh: Mesh) -> Any:
    """What mixes the examples of a batch, (batch, rng) -> batch; or None."""
    if not config.mixup and not config.cutmix:
        return None
    if not build_task(config.task).mixes_labels:
        raise UserError(
            f'config: mixup and cutmix mix labels, which task.name={config.task.name!r} does not '
            'learn: set both to 0'
        )
    if found.reads != ('image',):
        raise UserError(
            f'config: mixup and cutmix mix images, but the model takes {", ".join(found.reads)}: '
            'set both to 0'
        )
    more = {'switch': config.mix_switch} if config.mixup and config.cutmix else {}
    return functools.partial(
        augment.mix,
        mixup=config.mixup,
        cutmix=config.cutmix,
        prob=config.mix_prob,
        num_classes=found.source.num_classes,
        replicate=sharding.constrain_replicated(mesh),
        **more,
    )


def build_train_step(config: Config, parts: Experiment) -> Any:
    """The one train step, for training, transfer, planning and benchmarks."""
    step = build_update(config, parts, parts.optimizer, parts.schedule, config.seed)
    return steps.make_train_step(step, parts.abstract_state, parts.mesh)


def build_update(
    config: Config,
    parts: Experiment,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: schedules.Schedule,
    seed: int | jax.Array,
) -> Callable[[state.State, Any], tuple[state.State, steps.Metrics]]:
    """The same, not jitted, with another rate or seed than the config's, which may be traced."""
    teacher = None if parts.teacher is None else parts.teacher.model
    task, run = parts.task, Run(parts.total_steps, config.batch_size, teacher)
    rate = task.teacher_rate
    return steps.update(
        task.loss(parts.model, run),
        optimizer,
        schedule,
        parts.mesh,
        prepare=device_operations(parts.data),
        mix=build_mixing(config, parts.data, parts.mesh),
        seed=seed,
        accumulation=config.accumulation,
        ema=config.ema,
        skip_sigmas=config.skip_sigmas,
        frozen=factory.frozen(parts.lr_factors),
        sam_rho=config.optim.sam_rho,
        sam_adaptive=bool(config.optim.sam_rho) and config.optim.sam_adaptive,
        after_update=task.after_update,
        teacher_rate=None if rate is None else lambda step: rate(step, run.total_steps),
        targets=None if task.targets is None else task.targets(parts.model, run),
        draw=None if task.draw is None else task.draw(parts.model),
        weight_decay=parts.decay_schedule,
    )


def batch_seen(config: Config, found: Data, batch: dict[str, Any], step: int) -> dict[str, Any]:
    """A batch as the model sees it at a step, on one device."""
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    arrays = {name: jnp.asarray(column) for name, column in batch.items()}
    made = functools.partial(
        steps.seen,
        prepare=device_operations(found),
        mix=build_mixing(config, found, mesh),
        seed=config.seed,
    )
    result = jax.jit(made)(arrays, step=step)
    pictures = {*tokenizers.PICTURES, *found.transform.groups}
    return {n: normalise(x) if n in pictures else x for n, x in result.items()}
