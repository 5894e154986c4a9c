"""Operations on each layer separately, although scanned layers share one array."""

import math
import re
from collections.abc import Callable, Collection
from typing import Any

import jax
import optax

from big_vit import trees
from big_vit.optim import matrices

# One number for a whole array, or one for each of its scanned layers.
Factor = float | tuple[float, ...]

# Everything that turns inputs into tokens is layer 0. "Blocks" are those of the shared encoder:
# a stream's own blocks, which come before it, count as part of making its tokens.
_FIRST = re.compile(
    r'(stem|embedding|pre_norm)/.*|pos_embedding|word_embedding|cls|registers|latents|mask_token'
)
_BLOCK = re.compile(r'Transformer/encoderblock_(\d+)/.*')
_STREAM = re.compile(
    r'(?!Transformer/)[^/]+/(Transformer|stem|embedding|pos_embedding|word_embedding|kind)(/.*)?'
)


def per_layer(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Lifts a function of one layer's arrays to the arrays at this path, stacked or not."""
    for _ in range(matrices.stacked_axes(name)):
        function = jax.vmap(function)
    return function


def as_matrix(name: str, x: jax.Array) -> jax.Array:
    """Reshapes one layer's array to [inputs, outputs], or [size] if it is not a matrix."""
    axes = matrices.matrix(name, x.ndim + matrices.stacked_axes(name))
    return x.reshape(-1) if axes is None else x.reshape(math.prod(x.shape[: axes.inputs]), -1)


def apply_per_layer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies a stateless transformation to each parameter of each layer separately."""

    def apply(name: str, update: jax.Array, param: jax.Array) -> jax.Array:
        apply_to_layer = per_layer(name, lambda u, p: inner.update(u, optax.EmptyState(), p)[0])
        return apply_to_layer(update, param)

    return optax.stateless(lambda updates, params: trees.map_with_name(apply, updates, params))


def decay_factors(decay: float, params: Any, additions: Collection[str] = ()) -> dict[str, Factor]:
    """Layer-wise rate decay: factors on the rate by path (arXiv 2106.08254).

    The factor is `decay ** (depth + 1 - layer)`. Embeddings are layer 0, blocks layers 1 to
    `depth`; everything after them, including the head, is layer `depth + 1` with factor 1.

    Args:
      decay: factor from one layer to the one before it.
      params: the parameters, or their shapes.
      additions: first names of modules that come after the encoder, whatever is in them. (A single
        array, such as a mask token, comes before it.)
    """
    flat = trees.flatten(params)
    after = {name for name in flat if '/' in name and name.partition('/')[0] in additions}
    numbers = {name: int(match[1]) for name in flat if (match := _BLOCK.fullmatch(name))}
    stacks = {
        name: x.shape[0]
        for name, x in flat.items()
        if matrices.stacked_axes(name) and name not in after
    }
    encoder_stacks = {name: size for name, size in stacks.items() if not _STREAM.fullmatch(name)}
    depth = max([*encoder_stacks.values(), *(number + 1 for number in numbers.values())], default=0)

    def factor(name: str) -> Factor:
        if name in after:
            return 1.0
        if name in encoder_stacks:
            return tuple(decay ** (depth - i) for i in range(depth))
        if name in numbers:
            return decay ** (depth - numbers[name])
        if name in stacks:
            return (decay ** (depth + 1),) * stacks[name]
        is_first = _FIRST.fullmatch(name) or _STREAM.fullmatch(name)
        return decay ** (depth + 1) if is_first else 1.0

    return {name: factor(name) for name in flat}
