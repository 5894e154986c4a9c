"""Parameters of a frozen teacher, which no checkpoint of its student holds."""

import json
import sys
from typing import Any

import jax
import numpy as np
from etils import epath

from big_vit import checkpoint, sharding, state, storage, trees
from big_vit.build.teacher import Teacher
from big_vit.checkpoint_hashes import hash_array
from big_vit.config import Config
from big_vit.distributed import hosts
from big_vit.errors import UserError
from big_vit.models import encoder
from big_vit.pretrained.load import check_finite, image_normalisation

# In the workdir of the student: which teacher its checkpoints learnt from.
FILE = 'teacher.json'


def load_teacher(config: Config, teacher: Teacher, workdir: epath.Path) -> Any:
    """Load a teacher's parameters, sharded over the mesh: its average, where its run keeps one.

    Args:
      config: that of the student.
      workdir: that of the student. A run that goes on there must have the same teacher.

    Raises:
      UserError: it cannot be read, or is another one than that of the run so far.
    """
    where = f'config: task.teacher: {teacher.where}'
    part = checkpoint.scored_part(checkpoint.read_sidecar(teacher.workdir, teacher.step))
    loaded, _ = checkpoint.load_params(teacher.workdir, teacher.step, part)
    params = encoder.merge_lora(loaded)
    checkpoint.check_params(params, teacher.params, where)
    check_finite(params, where)
    _tell_normalisation(config, teacher)
    hashes = {name: hash_array(leaf) for name, leaf in trees.flatten(params).items()}
    hosts.lead(lambda: _check_same(teacher, hashes, workdir))
    return jax.tree.map(sharding.place, params, state.shardings(teacher.params))


def _tell_normalisation(config: Config, teacher: Teacher) -> None:
    """Print a warning where the teacher has seen images that were normalised otherwise."""
    configs = teacher.config, config
    seen, sees = (np.array(image_normalisation(c, teacher.channels)) for c in configs)
    if not np.allclose(seen, sees, atol=2e-3):
        mean, std = (tuple(float(x) for x in row) for row in seen)
        print(
            f'WARNING: the teacher of {teacher.where} has seen images normalised with mean {mean} '
            f'and deviation {std}: end the views of data.transform with normalize({mean}, {std})',
            file=sys.stderr,
        )


def _check_same(teacher: Teacher, hashes: dict[str, str], workdir: epath.Path) -> None:
    """Write down what a new run learns from, and refuse another teacher in one that goes on."""
    file, now = workdir / FILE, {'checkpoint': teacher.where, 'hashes': hashes}
    if checkpoint.steps(workdir) and file.exists():
        before = storage.parse_object(file.read_bytes(), str(file), 'use another --workdir')
        if before.get('hashes') != hashes:
            raise UserError(
                f'config: task.teacher: {teacher.where} has other parameters than the teacher that '
                f'{workdir} has learnt from until now, {before.get("checkpoint")}: name that, or '
                'use another --workdir'
            )
        return
    storage.write_text(file, json.dumps(now, indent=2) + '\n')
