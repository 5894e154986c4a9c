"""The training state: one dictionary of arrays, all that a run needs to continue.

params, opt, ema (if any)    parameters, optimizer, averaged parameters
task (if any)                the task's own state, such as a teacher's average
teacher (if any)             parameters of a frozen model that is learned from; never saved
step                         updates asked for so far
skipped, skipped_in_a_row    of these, updates that were not made
recent                       loss and gradient norm of the last steps, to tell a spike
"""

import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from big_vit import sharding, trees
from big_vit.models.placement import unplaced
from big_vit.models.tokenizers import PICTURES

State = dict[str, Any]
# What a model is given: the shape of an image, or shape and type of each part of a batch; all
# without the batch.
Inputs = tuple[int, ...] | dict[str, tuple[tuple[int, ...], Any]]

# How many steps back a spike is measured against.
WINDOW = 128


def to_save(state: State) -> State:
    """What a checkpoint holds of a state: all but a frozen teacher, which has one of its own."""
    return {name: part for name, part in state.items() if name != 'teacher'}


def from_params(
    params: Any,
    optimizer: optax.GradientTransformation,
    ema: bool,
    task_state: Callable[[Any], Any] | None = None,
) -> State:
    """A state at step 0.

    Args:
      task_state: `Task.state`.
    """
    state = {
        'params': params,
        'opt': optimizer.init(params),
        'step': jnp.zeros((), jnp.int32),
        'skipped': jnp.zeros((), jnp.int32),
        'skipped_in_a_row': jnp.zeros((), jnp.int32),
        'recent': {name: jnp.full(WINDOW, jnp.nan) for name in ('loss', 'grad_norm')},
    }
    if ema:
        state['ema'] = jax.tree.map(jnp.copy, params)
    if task_state is not None:
        state['task'] = task_state(params)
    return state


def _init_params(model: Any, inputs: Inputs, seed: int) -> Any:
    if isinstance(inputs, tuple):
        example: Any = jnp.zeros((1, *inputs), jnp.float32)
    else:
        example = {
            name: jnp.zeros((1, *shape), jnp.float32 if name in PICTURES else dtype)
            for name, (shape, dtype) in inputs.items()
        }
    return model.init(jax.random.key(seed), example)['params']


def abstract_params(model: Any, inputs: Inputs) -> Any:
    """Shapes and types of the parameters, without computing any.

    They are kept: a deep model takes seconds to trace. Where a mesh splits parameters or tokens
    makes no difference to them.
    """
    plain = unplaced(model)
    frozen = inputs if isinstance(inputs, tuple) else tuple(sorted(inputs.items()))
    # A copy, for what is kept must not change.
    return jax.tree.map(lambda leaf: leaf, _abstract_params(plain, frozen))


@functools.lru_cache(maxsize=64)
def _abstract_params(model: Any, inputs: tuple[Any, ...]) -> Any:
    named = bool(inputs) and isinstance(inputs[0], tuple)
    given: Inputs = dict(inputs) if named else inputs
    return jax.eval_shape(lambda: _init_params(model, given, 0))


def initial_leaves(
    model: Any, inputs: Inputs, seed: int, names: Collection[str]
) -> dict[str, np.ndarray]:
    """Some of the random initial parameters, by path, on the host; the others are not computed."""

    def chosen() -> dict[str, Any]:
        flat = trees.flatten(_init_params(unplaced(model), inputs, seed))
        return {name: flat[name] for name in names}

    return jax.device_get(jax.jit(chosen)())


def abstract(
    model: Any,
    inputs: Inputs,
    optimizer: optax.GradientTransformation,
    ema: bool,
    mesh: Mesh,
    min_shard_size: int = 0,
    params: Any = None,
    task_state: Callable[[Any], Any] | None = None,
) -> State:
    """The state as ShapeDtypeStructs that carry their shardings.

    Args:
      params: what `abstract_params` gave, where it is known: a deep model takes seconds to trace.
    """
    params = abstract_params(model, inputs) if params is None else params
    shapes = jax.eval_shape(lambda p: from_params(p, optimizer, ema, task_state), params)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        sharding.shardings_for(shapes, mesh, min_shard_size),
    )


def shardings(state: State) -> State:
    """The shardings of an abstract or a real state."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def create(
    model: Any,
    inputs: Inputs,
    optimizer: optax.GradientTransformation,
    seed: int,
    abstract_state: State,
    params: Any = None,
    task_state: Callable[[Any], Any] | None = None,
) -> State:
    """A fresh state without a frozen teacher, born sharded like the abstract state.

    Args:
      params: NumPy parameters to start from instead of random ones.
    """
    where = shardings(to_save(abstract_state))
    if params is None:
        make = jax.jit(
            lambda: from_params(
                _init_params(model, inputs, seed), optimizer, 'ema' in abstract_state, task_state
            ),
            out_shardings=where,
        )
        return make()
    params = jax.tree.map(sharding.place, params, where['params'])
    make = jax.jit(
        lambda p: from_params(p, optimizer, 'ema' in abstract_state, task_state),
        out_shardings=where,
    )
    return make(params)
