"""Trust ratios for large batches: scale each layer's step by the norm of its weights."""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from big_vit import trees
from big_vit.optim import per_layer

# Lower bound on the root mean square of the weights in a trust ratio. Without it a head that
# starts at 0 takes steps proportional to its own size, and never leaves 0.
SMALLEST = 0.01


def is_adapted(name: str) -> bool:
    """Whether a parameter has a trust ratio; biases and norm scales have none."""
    return not re.search(r'(^|/)(bias|scale)$', name)


def _norms(update: jax.Array, param: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Norms of one layer's update (kept above 0) and of its weights (SMALLEST as lower bound)."""
    update, param = update.reshape(-1), param.reshape(-1)
    least = SMALLEST * param.size**0.5
    return jnp.maximum(jnp.linalg.norm(update), 1e-30), jnp.maximum(jnp.linalg.norm(param), least)


def scale_by_lamb_ratio() -> optax.GradientTransformation:
    """Rescales each layer's update to the norm of its weights.

    The function phi of arXiv 1904.00962 is the identity with a lower bound, and no upper one.
    """

    def scale(name: str, update: jax.Array, param: jax.Array) -> jax.Array:
        def scale_layer(u: jax.Array, w: jax.Array) -> jax.Array:
            update_norm, weight_norm = _norms(u, w)
            return u * (weight_norm / update_norm)

        return per_layer.per_layer(name, scale_layer)(update, param) if is_adapted(name) else update

    return optax.stateless(lambda updates, params: trees.map_with_name(scale, updates, params))


def scale_by_lars_ratio(
    decay: Mapping[str, float | jax.Array], coefficient: float = 0.001
) -> optax.GradientTransformation:
    """Adds L2 decay and multiplies by the local rate (arXiv 1708.03888, equation 6).

    The rate is `coefficient * |w| / (|g| + decay * |w|)`. optax divides by the norm of the sum
    g + decay * w instead, which is not what the paper has.

    Args:
      decay: weight decay by parameter path.
      coefficient: the paper's trust coefficient.
    """

    def scale(name: str, gradient: jax.Array, param: jax.Array) -> jax.Array:
        def scale_layer(g: jax.Array, w: jax.Array) -> jax.Array:
            decayed = g + decay[name] * w
            if not is_adapted(name):
                return decayed
            gradient_norm, weight_norm = _norms(g, w)
            return decayed * (
                coefficient * weight_norm / (gradient_norm + decay[name] * weight_norm)
            )

        return per_layer.per_layer(name, scale_layer)(gradient, param)

    return optax.stateless(lambda updates, params: trees.map_with_name(scale, updates, params))
