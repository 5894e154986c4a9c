"""Trust ratios: steps as long as a layer's weights are, for large batches."""

import re

import jax
import jax.numpy as jnp
import optax

from big_vit import trees
from big_vit.optim import layers


def is_adapted(name: str) -> bool:
    """Whether a parameter has a trust ratio: biases and the scales of norms have none."""
    return not re.search(r'(^|/)(bias|scale)$', name)


def scale_by_lamb_ratio() -> optax.GradientTransformation:
    """Makes each layer's update as long as its weights (arXiv 1904.00962, with phi(z) = z)."""
    return layers.alone(optax.scale_by_trust_ratio(), is_adapted)


def scale_by_lars_ratio(
    decay: dict[str, float], coefficient: float = 0.001
) -> optax.GradientTransformation:
    """Adds the L2 decay and multiplies by the local rate (arXiv 1708.03888, equation 6).

    The rate is `coefficient * |w| / (|g| + decay * |w|)`; where a norm is 0, it is 1. optax
    has the norm of the sum in the denominator, which is not the paper's.

    Args:
      decay: weight decay by parameter path.
    """

    def change(name: str, gradient: jax.Array, param: jax.Array) -> jax.Array:
        def one(g: jax.Array, w: jax.Array) -> jax.Array:
            decayed = g + decay[name] * w
            if not is_adapted(name):
                return decayed
            size, slope = jnp.linalg.norm(w.reshape(-1)), jnp.linalg.norm(g.reshape(-1))
            rate = coefficient * size / (slope + decay[name] * size)
            return decayed * jnp.where((size > 0) & (slope > 0), rate, 1.0)

        return layers.per_layer(name, one)(gradient, param)

    return optax.stateless(lambda updates, params: trees.map_with_name(change, updates, params))
