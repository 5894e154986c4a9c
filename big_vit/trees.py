"""Parameter trees as flat dictionaries keyed by readable paths, and rules over those paths."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from big_vit.errors import UserError


def path_name(path: Sequence[Any]) -> str:
    """Formats a key path, e.g. `('Transformer', 'encoder_norm', 'scale')`, with slashes."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator='/')


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by path, in the order of the tree."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """Inverts `flatten`, for trees made of dictionaries."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split('/')
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def map_with_name(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Like `jax.tree.map`, but passes the leaf's path as the first argument."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_name(path), *leaves), tree, *rest
    )


def count(tree: Any) -> int:
    """Number of scalars in all leaves (arrays or ShapeDtypeStructs)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Bytes of all leaves; each counts once, however it is sharded."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def match_rules(rules: Sequence[tuple[str, Any]], names: Iterable[str], key: str) -> dict[str, Any]:
    """Finds, for each name, the value of the first rule whose regex matches it completely.

    Args:
      rules: pairs of (regex, value).
      names: names to match.
      key: config key that error messages name.

    Raises:
      UserError: a regex does not compile, a rule is not the first match of any name, or a name
        matches no rule.
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
