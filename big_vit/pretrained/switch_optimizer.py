"""Continue another run with another optimizer: take over its parameters, step and moments."""

from typing import Any

import jax
import jax.numpy as jnp

from big_vit import checkpoint, state, trees
from big_vit import config as config_lib
from big_vit.build.experiment import Experiment, fresh_state
from big_vit.build.optimizer import Length, build_optimizer
from big_vit.config import Config
from big_vit.errors import UserError
from big_vit.optim import factory, moments


def state_of(path: str, config: Config, parts: Experiment) -> state.State:
    """Build the initial state from another run's checkpoint.

    Step, parameters, their average and the moments carry over. State that only the new optimizer
    has starts afresh, and so do the statistics that detect loss spikes.

    Args:
      path: a workdir (its newest checkpoint) or a `checkpoints/STEP` folder.

    Raises:
      UserError: the architecture differs, there are no moments to take over, or no steps are left.
    """
    workdir, step = checkpoint.locate(path, 'config: switch')
    where = f'config: switch: {workdir}/checkpoints/{step}'
    if step >= parts.total_steps:
        raise UserError(
            f'{where} is at step {step}, and this run has {parts.total_steps}: set total_steps, '
            'total_epochs or total_examples of the whole run'
        )
    old = _restore(workdir, step, config, parts)
    params = trees.flatten(old['params'])
    old_moments = moments.extract(trees.flatten(old['opt']), params)
    if old_moments is None:
        raise UserError(
            f'{where} has not both moments of every parameter, as those of adam, adamw, nadamw '
            'and lamb have'
        )
    mu, nu, updates = old_moments

    if not moments.can_hand_over(parts.abstract_state['opt']):
        raise UserError(
            f'config: switch: {", ".join(parts.settings)} takes over no moments; adam, adamw, '
            'nadamw, lamb, shampoo and soap do'
        )

    if parts.first_steps and config.optim.freeze_by == 'gradient':
        raise UserError(
            "config: switch: with optim.freeze_by='gradient' held parameters begin with moments of "
            "their own, which none can be handed to: remove optim.freeze_* or take 'rate'"
        )
    frozen = factory.frozen(parts.lr_factors)
    shampoo_params = (name for name, group in parts.groups.items() if group == 'shampoo')
    blocked = frozenset(name for name in shampoo_params if name not in frozen)

    def initial_opt(params: Any, mu: Any, nu: Any) -> Any:
        opt = parts.optimizer.init(params)
        block = parts.settings.get('shampoo', {}).get('block', 0)
        return moments.hand_over(opt, mu, nu, updates, block, blocked)

    initial_opt = jax.jit(initial_opt, out_shardings=state.shardings(parts.abstract_state)['opt'])
    fresh = fresh_state(parts, config.seed)
    new = {**fresh, 'params': old['params'], 'step': old['step']}
    new['opt'] = initial_opt(old['params'], mu, nu)
    if 'task' in new:
        new['task'] = old['task']
    if 'ema' in new:
        new['ema'] = old.get('ema', jax.tree.map(jnp.copy, old['params']))
    return new


def _restore(workdir: Any, step: int, config: Config, parts: Experiment) -> state.State:
    """Restore the full state of the checkpoint onto the mesh of this run."""
    sidecar = checkpoint.read_sidecar(workdir, step)
    saved = config_lib.from_json(sidecar['config'])
    shapes, length = parts.abstract_state['params'], Length(parts.data.source, parts.total_steps)
    optimizer = build_optimizer(saved, shapes, parts.schedule, parts.mesh, length)
    abstract_state = state.abstract(
        parts.model,
        parts.data.inputs,
        optimizer.transform,
        checkpoint.scored_part(sidecar) == 'ema',
        parts.mesh,
        config.mesh.min_shard_size,
        task_state=parts.task.state,
    )
    return checkpoint.restore(workdir, step, abstract_state)
