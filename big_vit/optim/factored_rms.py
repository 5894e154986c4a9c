"""Second moments factored into row and column means (Adafactor, arXiv 1804.04235)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from big_vit import trees
from big_vit.optim import matrices, per_layer


def scale_by_factored_rms(smallest: int, cap: float = 1.0) -> optax.GradientTransformation:
    """Divides by the root of a second moment that is factored per matrix and layer.

    optax's own version factors the two largest axes. For attention kernels [width, heads,
    features] these are not the axes of the matrix, and for scanned layers one of them may be
    the layer axis. The decay is optax's: beta2 = 1 - t ** -0.8 at the t-th update, of the squared
    gradient plus 1e-30, without bias correction (beta2 is 0 at first).

    Args:
      smallest: matrices with a shorter side keep their full second moment.
      cap: largest beta2 (arXiv 2106.04560; without it, old gradients are never forgotten).

    Returns:
      A transformation with the state `optax.FactoredState`: `v_row` and `v_col`, [layers..., side],
      for factored parameters, `v` in the parameter's shape for the others; unused ones are
      [..., 1].
    """

    def beta2(step: Any, exponent: Any) -> jax.Array:
        return jnp.minimum(cap, 1.0 - (jnp.asarray(step, jnp.float32) + 1.0) ** -exponent)

    # `choose` decides what to factor, so optax must not apply a limit of its own.
    factored = optax.scale_by_factored_rms(True, min_dim_size_to_factor=1, decay_rate_fn=beta2)
    unfactored = optax.scale_by_factored_rms(False, decay_rate_fn=beta2)

    def choose(name: str, x: jax.Array):
        """Picks (transformation, shape to view the array in) for one layer's array."""
        if matrices.matrix(name, x.ndim + matrices.stacked_axes(name)) is None:
            return unfactored, x.shape
        shape = per_layer.as_matrix(name, x).shape
        return (factored, shape) if min(shape) >= smallest else (unfactored, x.shape)

    def collect(
        count: jax.Array, abstract_state: Any, states: dict[str, Any]
    ) -> optax.FactoredState:
        parts = (
            trees.map_with_name(
                lambda name, _, part=part: getattr(states[name], part), abstract_state
            )
            for part in ('v_row', 'v_col', 'v')
        )
        return optax.FactoredState(count, *parts)

    def init(params: Any) -> optax.FactoredState:
        def init_param(name: str, param: jax.Array) -> optax.FactoredState:
            def init_layer(param: jax.Array) -> optax.FactoredState:
                inner, shape = choose(name, param)
                return inner.init(param.reshape(shape))

            return per_layer.per_layer(name, init_layer)(param)

        states = {name: init_param(name, param) for name, param in trees.flatten(params).items()}
        return collect(jnp.zeros((), jnp.int32), params, states)

    def update(updates: Any, state: optax.FactoredState, params: Any = None):
        new_updates, states = {}, {}

        def update_param(name: str, update: jax.Array, *moments: jax.Array) -> None:
            def update_layer(update: jax.Array, *moments: jax.Array):
                inner, shape = choose(name, update)
                view = update.reshape(shape)
                # The update stands in for the parameters: only shape and dtype are read.
                scaled, new = inner.update(view, optax.FactoredState(state.count, *moments), view)
                return scaled.reshape(update.shape), new

            new_updates[name], states[name] = per_layer.per_layer(name, update_layer)(
                update, *moments
            )

        trees.map_with_name(update_param, updates, state.v_row, state.v_col, state.v)
        scaled = trees.map_with_name(lambda name, _: new_updates[name], updates)
        return scaled, collect(state.count + 1, updates, states)

    return optax.GradientTransformation(init, update)
