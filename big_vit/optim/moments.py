"""Hands moments from one optimizer to another, for Adam's family and Shampoo."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from big_vit import trees
from big_vit.optim import blocks

Flat = dict[str, Any]


def extract(leaves: Flat, params: Flat) -> tuple[Flat, Flat, int] | None:
    """Extracts Adam's moments from a flattened optimizer state.

    Args:
      leaves: arrays of the optimizer state by path.
      params: parameters by path.

    Returns:
      (mu by parameter path, nu by parameter path, number of updates), or None unless the state
      has both moments of every parameter, as Adam and its kin do.
    """

    def all_of(kind: str) -> Flat:
        ends = {f'/{kind}/{name}': name for name in params}
        by_name = {}
        for path, leaf in leaves.items():
            name = next((n for end, n in ends.items() if f'/{path}'.endswith(end)), None)
            if name is not None and tuple(leaf.shape) == tuple(params[name].shape):
                by_name[name] = leaf
        return by_name

    mu, nu = all_of('mu'), all_of('nu')
    counts = [leaf for path, leaf in leaves.items() if path.endswith('/count')]
    if mu.keys() != params.keys() or nu.keys() != params.keys() or not counts:
        return None
    return mu, nu, max(int(jax.device_get(count)) for count in counts)


def _adam_or_blocks(part: Any) -> bool:
    return isinstance(part, optax.ScaleByAdamState | blocks.State)


def can_hand_over(opt: Any) -> bool:
    """Whether `hand_over` would find a place for moments in this state, abstract or real."""
    return any(map(_adam_or_blocks, jax.tree.leaves(opt, is_leaf=_adam_or_blocks)))


def hand_over(
    opt: Any, mu: Flat, nu: Flat, updates: int, block: int = 0, cut: frozenset[str] = frozenset()
) -> Any:
    """Puts moments into a freshly initialized optimizer state.

    Block statistics, roots and everything else start afresh; so do the moments of SOAP's
    matrices, which live in other bases.

    Args:
      opt: initial state of the new optimizer.
      mu, nu: moments by parameter path.
      updates: number of updates behind these moments.
      block: block size of Shampoo.
      cut: paths of the parameters that Shampoo moves.

    Returns:
      The state with moments and update counts replaced.
    """
    step = jnp.asarray(updates, jnp.int32)

    def fill(tree: Any, values: Flat) -> Any:
        return trees.map_with_name(lambda name, x: values[name].astype(x.dtype), tree)

    def replace(state: Any) -> Any:
        if not _adam_or_blocks(state):
            return state
        state = state._replace(mu=fill(state.mu, mu), nu=fill(state.nu, nu))
        if isinstance(state, optax.ScaleByAdamState):
            return state._replace(count=step)
        state = state._replace(step=step)
        # Only Shampoo's stacks have roots. Those of SOAP keep moments in other bases.
        if not state.stacks or not hasattr(next(iter(state.stacks.values())), 'left_root'):
            return state
        plan = blocks.plan({name: mu[name].shape for name in cut}, block)
        stacks = dict(state.stacks)
        for field, values in (('mu', mu), ('nu', nu)):
            for name, x in blocks.cut(plan, values).items():
                old = getattr(stacks[name], field)
                x = jnp.pad(x, ((0, old.shape[0] - x.shape[0]), (0, 0), (0, 0)))
                stacks[name] = stacks[name]._replace(**{field: x.astype(old.dtype)})
        return state._replace(stacks=stacks)

    return jax.tree.map(replace, opt, is_leaf=_adam_or_blocks)
