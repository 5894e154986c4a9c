"""To go on from another run with another optimizer: its parameters, step and moments."""

from typing import Any

import jax
import jax.numpy as jnp

from big_vit import checkpoint, state, trees
from big_vit import config as config_lib
from big_vit.build.experiment import Experiment
from big_vit.build.optimizer import build_optimizer
from big_vit.config import Config
from big_vit.errors import UserError
from big_vit.optim import factory, moments


def state_of(path: str, config: Config, parts: Experiment) -> state.State:
    """The state to begin with: that of another run's checkpoint, as far as it fits.

    Step, parameters, their average and the optimizer's moments go on; what only the new
    optimizer has starts afresh, and so does what spikes are told by.

    Args:
      path: a workdir, whose newest checkpoint it is, or a `checkpoints/STEP` folder.

    Raises:
      UserError: another architecture, no moments to take over, or nothing left to train.
    """
    workdir, step = checkpoint.locate(path, 'config: switch')
    where = f'config: switch: {workdir}/checkpoints/{step}'
    if step >= parts.total_steps:
        raise UserError(
            f'{where} is at step {step}, and this run has {parts.total_steps}: set total_steps, '
            'total_epochs or total_examples of the whole run'
        )
    old = _restored(workdir, step, config, parts)
    params = trees.flatten(old['params'])
    found = moments.extract(trees.flatten(old['opt']), params)
    if found is None:
        raise UserError(
            f'{where} has not both moments of every parameter, as those of adam, adamw, nadamw '
            'and lamb have'
        )
    mu, nu, updates = found

    if not moments.can_hand_over(parts.abstract_state['opt']):
        raise UserError(
            f'config: switch: {", ".join(parts.settings)} takes over no moments; adam, adamw, '
            'nadamw, lamb, shampoo and soap do'
        )

    still = factory.frozen(parts.lr_factors)
    of_shampoo = (name for name, group in parts.groups.items() if group == 'shampoo')
    cut = frozenset(name for name in of_shampoo if name not in still)

    def begin(params: Any, mu: Any, nu: Any) -> Any:
        opt = parts.optimizer.init(params)
        block = parts.settings.get('shampoo', {}).get('block', 0)
        return moments.hand_over(opt, mu, nu, updates, block, cut)

    begin = jax.jit(begin, out_shardings=state.shardings(parts.abstract_state)['opt'])
    shape = parts.data.inputs
    fresh = state.create(parts.model, shape, parts.optimizer, config.seed, parts.abstract_state)
    new = {**fresh, 'params': old['params'], 'step': old['step']}
    new['opt'] = begin(old['params'], mu, nu)
    if 'ema' in new:
        new['ema'] = old.get('ema', jax.tree.map(jnp.copy, old['params']))
    return new


def _restored(workdir: Any, step: int, config: Config, parts: Experiment) -> state.State:
    """The checkpoint's whole state, on the mesh of this run."""
    sidecar = checkpoint.read_sidecar(workdir, step)
    saved = config_lib.from_json(sidecar['config'])
    made = build_optimizer(saved, parts.abstract_state['params'], parts.schedule, parts.mesh)
    abstract_state = state.abstract(
        parts.model,
        parts.data.inputs,
        made.transform,
        checkpoint.scored_part(sidecar) == 'ema',
        parts.mesh,
        config.mesh.min_shard_size,
    )
    return checkpoint.restore(workdir, step, abstract_state)
