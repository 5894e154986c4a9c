"""A second moment kept as its row and column means (Adafactor, arXiv 1804.04235)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from big_vit import trees
from big_vit.optim import matrices, per_layer


def scale_by_factored_rms(smallest: int, cap: float = 1.0) -> optax.GradientTransformation:
    """Divides by the root of a second moment that is factored for each matrix of each layer.

    optax's own factors the two largest axes, which for the kernels [width, heads, features]
    of attention are not those of the matrix, and for a stack may be the one of the layers.
    Its law is kept: beta2 = 1 - t ** -0.8 at the t-th update, the square of the gradient
    plus 1e-30, and no correction of a bias, since beta2 is 0 at first.

    Args:
      smallest: matrices with a smaller side have their whole second moment.
      cap: the largest beta2 (arXiv 2106.04560: without it, old gradients are never forgotten).

    Returns:
      A transformation with the state `optax.FactoredState`: v_row and v_col, [layers..., side],
      of a factored parameter, v, of the parameter's shape, of another; the rest are [..., 1].
    """

    def beta2(step: Any, exponent: Any) -> jax.Array:
        return jnp.minimum(cap, 1.0 - (jnp.asarray(step, jnp.float32) + 1.0) ** -exponent)

    factored = optax.scale_by_factored_rms(True, min_dim_size_to_factor=1, decay_rate_fn=beta2)
    whole = optax.scale_by_factored_rms(False, decay_rate_fn=beta2)

    def choose(name: str, x: jax.Array):
        """(transformation, the view it takes) for one layer's array."""
        if matrices.matrix(name, x.ndim + matrices.stacked_axes(name)) is None:
            return whole, x.shape
        shape = per_layer.as_matrix(name, x).shape
        return (factored, shape) if min(shape) >= smallest else (whole, x.shape)

    def collect(
        count: jax.Array, abstract_state: Any, found: dict[str, Any]
    ) -> optax.FactoredState:
        parts = (
            trees.map_with_name(
                lambda name, _, part=part: getattr(found[name], part), abstract_state
            )
            for part in ('v_row', 'v_col', 'v')
        )
        return optax.FactoredState(count, *parts)

    def init(params: Any) -> optax.FactoredState:
        def one(name: str, param: jax.Array) -> optax.FactoredState:
            def start(param: jax.Array) -> optax.FactoredState:
                inner, shape = choose(name, param)
                return inner.init(param.reshape(shape))

            return per_layer.per_layer(name, start)(param)

        found = {name: one(name, param) for name, param in trees.flatten(params).items()}
        return collect(jnp.zeros((), jnp.int32), params, found)

    def update(updates: Any, state: optax.FactoredState, params: Any = None):
        changed, found = {}, {}

        def one(name: str, update: jax.Array, *moments: jax.Array) -> None:
            def change(update: jax.Array, *moments: jax.Array):
                inner, shape = choose(name, update)
                view = update.reshape(shape)
                # Of the parameters it asks for shape and type only.
                scaled, new = inner.update(view, optax.FactoredState(state.count, *moments), view)
                return scaled.reshape(update.shape), new

            changed[name], found[name] = per_layer.per_layer(name, change)(update, *moments)

        trees.map_with_name(one, updates, state.v_row, state.v_col, state.v)
        scaled = trees.map_with_name(lambda name, _: changed[name], updates)
        return scaled, collect(state.count + 1, updates, found)

    return optax.GradientTransformation(init, update)
