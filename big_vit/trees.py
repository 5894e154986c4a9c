"""Parameter trees as flat dictionaries of readable paths, and rules over those paths."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from big_vit.errors import UserError


def path_name(path: Sequence[Any]) -> str:
    """`('Transformer', 'encoder_norm', 'scale')` as `Transformer/encoder_norm/scale`."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator='/')


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by path, in the tree's own order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """The nested dictionary whose `flatten` is `flat` (for trees made of dictionaries)."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split('/')
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def map_with_name(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map`, with the leaf's path as first argument."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_name(path), *leaves), tree, *rest
    )


def count(tree: Any) -> int:
    """Number of scalars in all leaves (arrays or ShapeDtypeStructs)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Bytes of all leaves, each counted once however it is sharded."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def match_rules(rules: Sequence[tuple[str, Any]], names: Iterable[str], key: str) -> dict[str, Any]:
    """The value of the first rule `(regex, value)` that fully matches each name.

    Raises:
      UserError: a regex does not compile, a rule is the first match of no
        name, or a name matches no rule. `key` is the config key that the
        message names.
    """
    try:
        compiled = [(re.compile(pattern), value) for pattern, value in rules]
    except re.error as error:
        raise UserError(f'{key}: {error.pattern!r} is not a regular expression: {error}') from None
    names, values, used = list(names), {}, set()
    for name in names:
        for i, (pattern, value) in enumerate(compiled):
            if pattern.fullmatch(name):
                values[name] = value
                used.add(i)
                break
        else:
            raise UserError(f"{key}: no rule matches {name}; end the rules with ('.*', value)")
    for i, (pattern, _) in enumerate(compiled):
        if i not in used:
            earlier = any(pattern.fullmatch(name) for name in names)
            why = 'earlier rules match all it would' if earlier else 'it matches no parameter'
            raise UserError(f'{key}: rule {pattern.pattern!r} has no effect: {why}')
    return values
