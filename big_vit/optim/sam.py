"""Sharpness-aware minimization: the gradient where the loss is worst nearby."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def ascend(params: Any, grads: Any, rho: float, adaptive: bool) -> Any:
    """Moves parameters to the point where the second gradient is taken.

    SAM (arXiv 2010.01412): w + rho * g / |g|, with one norm over all parameters.
    ASAM (arXiv 2102.11600): w + rho * T^2 g / |T g|, where T = |w| + 0.01 for each weight,
    biases and norms included (the authors' code has T = 1 for them). Parameters without a
    gradient stay where they are.

    Args:
      params: parameters.
      grads: gradients at `params`.
      rho: radius of the perturbation.
      adaptive: True for ASAM.
    """
    if adaptive:
        scale = jax.tree.map(lambda w: jnp.abs(w) + 0.01, params)
        scaled = jax.tree.map(jnp.multiply, scale, grads)
        direction = jax.tree.map(jnp.multiply, scale, scaled)
    else:
        scaled = direction = grads
    # A zero gradient asks for no perturbation; without the bound it would divide 0 by 0.
    step_size = rho / jnp.maximum(optax.tree.norm(scaled), 1e-12)
    return jax.tree.map(lambda w, d: w + step_size * d, params, direction)
