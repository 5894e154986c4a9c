"""Sharpness-aware minimisation: the gradient where the loss is worst nearby."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def ascend(params: Any, grads: Any, rho: float, adaptive: bool) -> Any:
    """The parameters at which the second gradient is taken.

    SAM (arXiv 2010.01412): w + rho * g / |g|, with one norm over all parameters.
    ASAM (arXiv 2102.11600): w + rho * T^2 g / |T g|, where T = |w| + 0.01 for each weight;
    biases and norms are no exception (in the authors' code T is 1 for them). What has no
    gradient stays where it is.
    """
    if adaptive:
        scale = jax.tree.map(lambda w: jnp.abs(w) + 0.01, params)
        scaled = jax.tree.map(jnp.multiply, scale, grads)
        direction = jax.tree.map(jnp.multiply, scale, scaled)
    else:
        scaled = direction = grads
    # A gradient of 0 asks for no perturbation.
    length = rho / jnp.maximum(optax.tree.norm(scaled), 1e-12)
    return jax.tree.map(lambda w, d: w + length * d, params, direction)
