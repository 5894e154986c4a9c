"""Limits on the gradient."""

import re
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from big_vit import trees
from big_vit.optim import matrices, per_layer

# Of a path: the part that it belongs to, and whether each scanned layer is a part of its own.
Part = Callable[[str], tuple[str, bool]]


def adaptive(limit: float) -> optax.GradientTransformation:
    """Clips each unit's gradient to `limit` times the norm of its weights (AGC, arXiv 2102.06171).

    A unit is one output of a matrix, or all of a bias, norm scale or table. The classifier,
    `head`, is left alone, as in the paper.
    """
    inner = optax.adaptive_grad_clip(limit, axis=0)

    def clip(name: str, gradient: jax.Array, param: jax.Array) -> jax.Array:
        if re.match('head/', name):
            return gradient

        def clip_layer(g: jax.Array, w: jax.Array) -> jax.Array:
            g, w, shape = per_layer.as_matrix(name, g), per_layer.as_matrix(name, w), g.shape
            return inner.update(g, optax.EmptyState(), w)[0].reshape(shape)

        return per_layer.per_layer(name, clip_layer)(gradient, param)

    return optax.stateless(lambda updates, params: trees.map_with_name(clip, updates, params))


def by_global_norm(limit: float) -> optax.GradientTransformation:
    """Rescales the gradient so that its global norm is at most `limit`.

    Multiplies by a factor instead of selecting between two gradients as optax does: with sharded
    gradients, the select makes the partitioner gather both.
    """

    def rescale(gradients: Any, _: Any) -> Any:
        norm = optax.tree.norm(gradients)
        factor = limit / jnp.maximum(norm, limit)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), gradients)

    return optax.stateless(rescale)


def tensor(name: str) -> tuple[str, bool]:
    """A `Part` for each tensor of each layer.

    Queries, keys and values are one tensor, as the fused projection of the code that clips so.
    """
    return re.sub(r'(^|/)(query|key|value)/(?=[^/]+$)', r'\1qkv/', name), True


def module(additions: Collection[str]) -> Part:
    """A `Part` for the trunk and one for each module that a task adds to it.

    Args:
      additions: first names of the paths of what is added. A single array, such as a mask token,
        is no module and belongs to the trunk.
    """

    def part(name: str) -> tuple[str, bool]:
        first, _, rest = name.partition('/')
        return (first if rest and first in additions else ''), False

    return part


def by_part(limit: float, part: Part) -> optax.GradientTransformation:
    """Rescales each part of the gradient so that its norm is at most `limit`."""

    def rescale(gradients: Any, _: Any) -> Any:
        squares: dict[str, jax.Array] = {}
        for name, gradient in trees.flatten(gradients).items():
            key, by_layer = part(name)
            layers = matrices.stacked_axes(name) if by_layer else 0
            total = jnp.square(gradient).sum(tuple(range(layers, gradient.ndim)))
            squares[key] = squares[key] + total if key in squares else total
        factors = {
            key: limit / jnp.maximum(jnp.sqrt(total), limit) for key, total in squares.items()
        }

        def scale(name: str, gradient: jax.Array) -> jax.Array:
            factor = factors[part(name)[0]].astype(gradient.dtype)
            return gradient * factor.reshape(*factor.shape, *[1] * (gradient.ndim - factor.ndim))

        return trees.map_with_name(scale, gradients)

    return optax.stateless(rescale)
