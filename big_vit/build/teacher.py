"""A frozen model that a task learns from: that of another run, with what it learnt with."""

from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from big_vit import checkpoint, sharding, state
from big_vit import config as config_lib
from big_vit.build.model import build_trunk
from big_vit.build.task import build_task
from big_vit.config import Config
from big_vit.errors import UserError
from big_vit.models import tokenizers
from big_vit.models.placement import placed
from big_vit.tasks.task import ExampleShape, Task


class Teacher(NamedTuple):
    """A frozen model, without the values of its parameters.

    Attributes:
      workdir, step: the checkpoint that has them.
      config: that of its run.
      channels: of its images.
      model: module of the task.
      params: abstract parameters, sharded as the mesh says.
    """

    workdir: epath.Path
    step: int
    config: Config
    channels: int
    model: Any
    params: Any

    @property
    def where(self) -> str:
        return f'{self.workdir}/checkpoints/{self.step}'


def build_teacher(
    config: Config, task: Task, shapes: dict[str, tuple[int, ...]], mesh: Mesh
) -> Teacher | None:
    """The frozen teacher of a task, as the config of its run describes it; None without one.

    Args:
      shapes: of the student's inputs.

    Raises:
      UserError: there is no such checkpoint, it is of another task, or does not fit the inputs.
    """
    if task.teacher is None:
        return None
    workdir, step = checkpoint.locate(task.teacher, 'config: task.teacher')
    where = f'{workdir}/checkpoints/{step}'
    sidecar = checkpoint.read_sidecar(workdir, step)
    # Of its own settings those of devices and of memory are this run's.
    saved = config_lib.from_json(sidecar['config']).without('model.lora', 'mesh.')
    saved = saved.replacing({'model.attention': config.model.attention, 'model.remat': 'none'})
    learnt = build_task(saved.task)
    if learnt.name != task.name:
        raise UserError(
            f'config: task.teacher: {where} learnt task {learnt.name!r}, so it has no heads to '
            f'learn from: name a run of task.name={task.name!r}'
        )
    # It keeps the size of its training, which learned positions are of: those of views of another
    # size are interpolated.
    channels = shapes['image'][-1]
    views = dict.fromkeys(task.views[:1], (2, *saved.image_size, channels))
    own = {**views, 'image': (*saved.image_size, channels)}
    trunk = build_trunk(saved, own, mesh)
    if trunk.single is not None:
        try:
            tokenizers.grid_of(trunk.single, shapes['image'])
        except ValueError as error:
            raise UserError(
                f'config: image_size: the teacher, {saved.model.variant} of {where}: {error}'
            ) from None
    model = learnt.model(trunk, ExampleShape(own, 0))
    inputs = {name: (shape, np.dtype(np.float32)) for name, shape in views.items()}
    params = state.abstract_params(model, inputs)
    gather = sharding.gather_weights(mesh, params, config.mesh.min_shard_size)
    params = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        params,
        sharding.shardings_for(params, mesh, config.mesh.min_shard_size),
    )
    model = placed(model, gather=gather, collect=sharding.collect_kernel(mesh))
    return Teacher(workdir, step, saved, channels, model, params)
