"""Trust ratios: steps as long as a layer's weights are, for large batches."""

import re

import jax
import jax.numpy as jnp
import optax

from big_vit import trees
from big_vit.optim import per_layer

# Weights of a smaller root mean square count as this: a head that starts at 0 would else take
# steps that are as small as it is, and not leave it.
SMALLEST = 0.01


def is_adapted(name: str) -> bool:
    """Whether a parameter has a trust ratio: biases and the scales of norms have none."""
    return not re.search(r'(^|/)(bias|scale)$', name)


def _norms(update: jax.Array, param: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Those of one layer's update, above 0, and of its weights, at least those of SMALLEST."""
    update, param = update.reshape(-1), param.reshape(-1)
    least = SMALLEST * param.size**0.5
    return jnp.maximum(jnp.linalg.norm(update), 1e-30), jnp.maximum(jnp.linalg.norm(param), least)


def scale_by_lamb_ratio() -> optax.GradientTransformation:
    """Makes each layer's update as long as its weights.

    arXiv 1904.00962, whose function phi of the weights' norm has here a lower bound only.
    """

    def change(name: str, update: jax.Array, param: jax.Array) -> jax.Array:
        def one(u: jax.Array, w: jax.Array) -> jax.Array:
            length, size = _norms(u, w)
            return u * (size / length)

        return per_layer.per_layer(name, one)(update, param) if is_adapted(name) else update

    return optax.stateless(lambda updates, params: trees.map_with_name(change, updates, params))


def scale_by_lars_ratio(
    decay: dict[str, float], coefficient: float = 0.001
) -> optax.GradientTransformation:
    """Adds the L2 decay and multiplies by the local rate (arXiv 1708.03888, equation 6).

    The rate is `coefficient * |w| / (|g| + decay * |w|)`. optax has the norm of the sum in
    the denominator, which is not the paper's.

    Args:
      decay: weight decay by parameter path.
    """

    def change(name: str, gradient: jax.Array, param: jax.Array) -> jax.Array:
        def one(g: jax.Array, w: jax.Array) -> jax.Array:
            decayed = g + decay[name] * w
            if not is_adapted(name):
                return decayed
            slope, size = _norms(g, w)
            return decayed * (coefficient * size / (slope + decay[name] * size))

        return per_layer.per_layer(name, one)(gradient, param)

    return optax.stateless(lambda updates, params: trees.map_with_name(change, updates, params))
