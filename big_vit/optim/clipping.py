"""Limits on the gradient."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from big_vit import trees
from big_vit.optim import per_layer


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
