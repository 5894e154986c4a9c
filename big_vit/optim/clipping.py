"""Limits on the gradient."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from big_vit import trees
from big_vit.optim import per_layer


def adaptive(limit: float) -> optax.GradientTransformation:
    """Adaptive gradient clipping (arXiv 2102.06171): at most `limit` of the weights' norm.

    A unit, whose norms are compared, is an output of a matrix; a bias, a norm's scale or a
    table is one as a whole. The classifier, `head`, is left as it is, as in the paper.
    """
    inner = optax.adaptive_grad_clip(limit, axis=0)

    def change(name: str, gradient: jax.Array, param: jax.Array) -> jax.Array:
        if re.match('head/', name):
            return gradient

        def one(g: jax.Array, w: jax.Array) -> jax.Array:
            g, w, shape = per_layer.as_matrix(name, g), per_layer.as_matrix(name, w), g.shape
            return inner.update(g, optax.EmptyState(), w)[0].reshape(shape)

        return per_layer.per_layer(name, one)(gradient, param)

    return optax.stateless(lambda updates, params: trees.map_with_name(change, updates, params))


def by_global_norm(limit: float) -> optax.GradientTransformation:
    """The gradient of all parameters multiplied so that its norm is at most `limit`.

    optax chooses between two gradients instead; of sharded ones the partitioner then brings
    together both.
    """

    def change(gradients: Any, _: Any) -> Any:
        norm = optax.tree.norm(gradients)
        factor = limit / jnp.maximum(norm, limit)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), gradients)

    return optax.stateless(change)
