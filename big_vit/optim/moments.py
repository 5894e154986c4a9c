"""First and second moments of one optimizer handed to another: Adam's family and Shampoo."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from big_vit import trees
from big_vit.optim import blocks

Flat = dict[str, Any]


def found(leaves: Flat, params: Flat) -> tuple[Flat, Flat, int] | None:
    """(mu, nu, number of updates) in the arrays of an optimizer's state, by parameter path.

    None where it does not have both moments of every parameter, as Adam and its kin do.
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


def takes(opt: Any) -> bool:
    """Whether `hand_over` would find a place for moments in this state, abstract or real."""
    return any(map(_adam_or_blocks, jax.tree.leaves(opt, is_leaf=_adam_or_blocks)))


def hand_over(
    opt: Any, mu: Flat, nu: Flat, updates: int, block: int = 0, cut: frozenset[str] = frozenset()
) -> Any:
    """An optimizer's first state with these moments.

    Statistics of blocks, roots and whatever else there is start afresh; so do the moments of
    SOAP's matrices, which are in other bases.

    Args:
      block: that of Shampoo.
      cut: the parameters that Shampoo moves.
    """
    step = jnp.asarray(updates, jnp.int32)

    def fill(tree: Any, values: Flat) -> Any:
        return trees.map_with_name(lambda name, x: values[name].astype(x.dtype), tree)

    def give(part: Any) -> Any:
        if not _adam_or_blocks(part):
            return part
        part = part._replace(mu=fill(part.mu, mu), nu=fill(part.nu, nu))
        if isinstance(part, optax.ScaleByAdamState):
            return part._replace(count=step)
        part = part._replace(step=step)
        if not part.stacks or not hasattr(next(iter(part.stacks.values())), 'left_root'):
            return part
        plan = blocks.plan({name: mu[name].shape for name in cut}, block)
        stacks = dict(part.stacks)
        for field, values in (('mu', mu), ('nu', nu)):
            for name, x in blocks.cut(plan, values).items():
                old = getattr(stacks[name], field)
                x = jnp.pad(x, ((0, old.shape[0] - x.shape[0]), (0, 0), (0, 0)))
                stacks[name] = stacks[name]._replace(**{field: x.astype(old.dtype)})
        return part._replace(stacks=stacks)

    return jax.tree.map(give, opt, is_leaf=_adam_or_blocks)
