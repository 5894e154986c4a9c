"""What is done to each layer alone, though scanned layers share one array."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import optax

from big_vit import trees
from big_vit.optim import matrices

# A number for all of an array, or one for each of its scanned layers.
Factor = float | tuple[float, ...]

# What makes tokens: the first layer. Blocks are those of the encoder; a stream of several has
# its own before it, all of which count as making its tokens.
_FIRST = re.compile(
    r'(stem|embedding|pre_norm)/.*|pos_embedding|word_embedding|cls|registers|latents'
)
_BLOCK = re.compile(r'Transformer/encoderblock_(\d+)/.*')
_STREAM = re.compile(
    r'(?!Transformer/)[^/]+/(Transformer|stem|embedding|pos_embedding|word_embedding|kind)(/.*)?'
)


def per_layer(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of one layer's arrays, for the arrays at this path as they are stacked."""
    for _ in range(matrices.stacked_axes(name)):
        function = jax.vmap(function)
    return function


def as_matrix(name: str, x: jax.Array) -> jax.Array:
    """One layer's array as [inputs, outputs]; what is no matrix as [size]."""
    found = matrices.matrix(name, x.ndim + matrices.stacked_axes(name))
    return x.reshape(-1) if found is None else x.reshape(math.prod(x.shape[: found.inputs]), -1)


def alone(
    inner: optax.GradientTransformation, chosen: Callable[[str], bool] = lambda name: True
) -> optax.GradientTransformation:
    """A transformation without a state, of each chosen parameter of each layer by itself."""

    def change(name: str, update: jax.Array, param: jax.Array) -> jax.Array:
        if not chosen(name):
            return update
        one = per_layer(name, lambda u, p: inner.update(u, optax.EmptyState(), p)[0])
        return one(update, param)

    return optax.stateless(lambda updates, params: trees.map_with_name(change, updates, params))


def decay_factors(decay: float, params: Any) -> dict[str, Factor]:
    """Factors on the rate by path, smaller the earlier the layer (arXiv 2106.08254).

    `decay ** (depth + 1 - layer)`: embeddings are layer 0, blocks 1 to `depth`, and what
    comes after them, the head among it, is layer `depth + 1` with a factor of 1.

    Args:
      params: the parameters, or their shapes.
    """
    flat = trees.flatten(params)
    numbers = {name: int(found[1]) for name in flat if (found := _BLOCK.fullmatch(name))}
    stacks = {name: x.shape[0] for name, x in flat.items() if matrices.stacked_axes(name)}
    own = {name: size for name, size in stacks.items() if not _STREAM.fullmatch(name)}
    depth = max([*own.values(), *(number + 1 for number in numbers.values())], default=0)

    def factor(name: str) -> Factor:
        if name in own:
            return tuple(decay ** (depth - i) for i in range(depth))
        if name in numbers:
            return decay ** (depth - numbers[name])
        if name in stacks:
            return (decay ** (depth + 1),) * stacks[name]
        first = _FIRST.fullmatch(name) or _STREAM.fullmatch(name)
        return decay ** (depth + 1) if first else 1.0

    return {name: factor(name) for name in flat}
