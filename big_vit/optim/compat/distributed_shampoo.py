"""`distributed_shampoo` with the arguments and numbers of `optax_shampoo` and `precondition`.

Users of either package switch by changing an import. The order of operations differs from
shampoo.py: the raw gradient is preconditioned and grafted, then momentum averages the result, and
averages are not corrected for their start at 0. Prefer shampoo.py for new work.

Statistics, roots and their application live in stacks of blocks sharded over all devices of a mesh
(blocks.py); momenta, grafts and norms have the shapes of the parameters.
"""

import enum
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from big_vit import trees
from big_vit.optim import blocks, roots


class GraftingType(enum.IntEnum):
    """Source of an update's norm, and of its direction before preconditioning starts."""

    NONE = 0
    SGD = 1
    ADAGRAD = 2
    RMSPROP = 3
    RMSPROP_NORMALIZED = 4
    SQRT_N = 5
    ADAGRAD_NORMALIZED = 6


class PreconditionerType(enum.IntEnum):
    """Which sides of an inputs-by-outputs matrix are preconditioned."""

    ALL = 1
    INPUT = 2
    OUTPUT = 3


_SIDES = {
    PreconditionerType.ALL: ('left', 'right'),
    PreconditionerType.INPUT: ('left',),
    PreconditionerType.OUTPUT: ('right',),
}
_OUTER = {'left': 'nij,nkj->nik', 'right': 'nji,njk->nik'}

_NORMALIZED = (GraftingType.RMSPROP_NORMALIZED, GraftingType.ADAGRAD_NORMALIZED)
_SUMS = (GraftingType.ADAGRAD, GraftingType.ADAGRAD_NORMALIZED)
_AVERAGES = (GraftingType.RMSPROP, GraftingType.RMSPROP_NORMALIZED)

# Lower bounds on norms, and on the largest eigenvalue that a ridge is relative to.
_LEAST_NORM = 1e-16
_LEAST_EIGENVALUE = 1e-6


class StackState(NamedTuple):
    """State of all blocks of one size, by preconditioned side.

    Attributes:
      statistics: averages of G G' ('left') and G' G ('right').
      roots: their latest inverse roots.
      error: errors of these roots.
    """

    statistics: dict[str, Float[Array, 'blocks d d']]
    roots: dict[str, Float[Array, 'blocks d d']]
    error: dict[str, Float[Array, ' blocks']]


class State(NamedTuple):
    """State of `distributed_shampoo`.

    Attributes:
      step: number of updates so far.
      momentum, graft_momentum: averages of updates and of their grafts, shaped like the
        parameters.
      square: averages or sums of squares, shaped like the parameters; empty for grafts that need
        none.
      stacks: block state by stack name.
      health: event counts since the start; empty without generate_training_metrics.
    """

    step: Int[Array, '']
    momentum: Any
    graft_momentum: Any
    square: Any
    stacks: dict[str, StackState]
    health: blocks.HealthStats


class _Options(NamedTuple):
    """Validated arguments of `distributed_shampoo`; `root` is a method of roots.py."""

    learning_rate: float | Callable[[Array], Any]
    block_size: int
    beta1: float
    beta2: float
    diagonal_epsilon: float
    matrix_epsilon: float
    weight_decay: float
    start_preconditioning_step: int
    preconditioning_compute_steps: int
    statistics_compute_steps: int
    best_effort_shape_interpretation: bool
    graft_type: GraftingType
    nesterov: bool
    exponent_override: int
    inverse_failure_threshold: float
    moving_average_for_momentum: bool
    skip_preconditioning_dim_size_gt: int
    clip_by_scaled_gradient_norm: float | None
    tensordot_precision: Any
    relative_matrix_epsilon: bool
    merge_small_dims_block_size: int
    precondtioner_type: PreconditionerType
    skip_preconditioning_rank_lt: int
    decoupled_learning_rate: bool
    decoupled_weight_decay: bool
    generate_training_metrics: bool
    root: str
    mesh: Mesh | None
    matrix: blocks.MatrixOf | None


def distributed_shampoo(
    learning_rate: float | Callable[[Array], Any],
    block_size: int,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    diagonal_epsilon: float = 1e-10,
    matrix_epsilon: float = 1e-6,
    weight_decay: float = 0.0,
    start_preconditioning_step: int = 5,
    preconditioning_compute_steps: int = 1,
    statistics_compute_steps: int = 1,
    best_effort_shape_interpretation: bool = True,
    graft_type: int = GraftingType.SGD,
    nesterov: bool = True,
    exponent_override: int = 0,
    inverse_failure_threshold: float = 0.1,
    moving_average_for_momentum: bool = False,
    skip_preconditioning_dim_size_gt: int = 4096,
    clip_by_scaled_gradient_norm: float | None = None,
    precision: Any = jax.lax.Precision.HIGHEST,
    tensordot_precision: Any = None,
    relative_matrix_epsilon: bool = True,
    merge_small_dims_block_size: int = 4096,
    precondtioner_type: int = PreconditionerType.ALL,
    skip_preconditioning_rank_lt: int = 1,
    decoupled_learning_rate: bool = True,
    decoupled_weight_decay: bool = False,
    generate_training_metrics: bool = True,
    eigh: bool = False,
    reuse_preconditioner: bool = False,
    batch_axis_name: str | None = None,
    statistics_partition_spec: Any = None,
    preconditioner_partition_spec: Any = None,
    num_devices_for_pjit: int | None = None,
    shard_optimizer_states: bool = False,
    best_effort_memory_usage_reduction: bool = False,
    lobpcg_topk_precondition: int = 0,
    lobpcg_max_iter: int = 0,
    decay_preconditioning_compute_steps: bool = False,
    end_preconditioning_compute_steps: int | None = None,
    compression_rank: int = 0,
    frequent_directions: bool = False,
    average_grad: bool = False,
    reset_preconditioner: bool = False,
    generate_fd_metrics: bool = False,
    mesh: Mesh | None = None,
    matrix: blocks.MatrixOf | None = None,
) -> optax.GradientTransformation:
    """Shampoo with the arguments, defaults and trajectories of the public JAX packages.

    Arguments mean what they mean there, and steps count from 0. The differences:

    - A gradient that is not finite counts as zeros, for its whole parameter.
    - The error of a root is that of the root itself, |X^p A - 1|, not of the iteration.
    - Decoupled decay is multiplied by the learning rate once (as in the newer package), not
      twice (as in the older).
    - Unsupported arguments are rejected before any step.

    Args:
      learning_rate: a number, or a function of the step.
      block_size: largest side of a block. Dimensions are cut into blocks of exactly this size plus
        a remainder.
      matrix_epsilon: the ridge, relative to the largest eigenvalue (taken as at least 1e-6);
        absolute with relative_matrix_epsilon=False.
      start_preconditioning_step: first step whose update is preconditioned. Statistics and roots
        start at step 0 regardless.
      best_effort_shape_interpretation: merge neighbouring dimensions, from the first on, while
        their product is at most merge_small_dims_block_size.
      exponent_override: p for roots A^(-1/p); 0 means twice the number of sides.
      clip_by_scaled_gradient_norm: largest root mean square of RMSPROP's updates.
      tensordot_precision: precision of the gradient products in the statistics.
      precondtioner_type: spelled as in the packages.
      generate_training_metrics: count in `State.health` roots `computed` and `refused` and
        gradients `ignored`, and keep the largest `error` of the roots in use.
      eigh: compute roots by eigendecomposition.
      reuse_preconditioner: has no effect; roots are exact wherever their iteration starts.
      mesh: mesh whose devices share the blocks; None computes on one device.
      matrix: maps a path and its number of axes to a stack of matrices, each with norms of its
        own, or to None for a parameter that is only grafted: `matrices.matrix` for models with
        scanned layers. By default shapes alone decide, as in the packages.

    Raises:
      ValueError: an argument that is not supported; in `init` and `update`, a parameter with more
        than two dimensions after merging; in `update`, decay without parameters.
    """
    spread = 'under jit a mesh spreads the blocks with their states: leave it out and pass mesh='
    exact_only = 'roots are computed whole: leave it out'
    refused = {
        'precision': (
            precision != jax.lax.Precision.HIGHEST,
            'roots need the full precision of jax.lax.Precision.HIGHEST: leave it out',
        ),
        'exponent_override': (
            exponent_override < 0,
            'give a whole p for roots A^(-1/p), or 0 for twice the number of sides',
        ),
        'batch_axis_name': (batch_axis_name is not None, spread),
        'statistics_partition_spec': (statistics_partition_spec is not None, spread),
        'preconditioner_partition_spec': (preconditioner_partition_spec is not None, spread),
        'num_devices_for_pjit': (num_devices_for_pjit is not None, spread),
        'shard_optimizer_states': (shard_optimizer_states, spread),
        'best_effort_memory_usage_reduction': (
            best_effort_memory_usage_reduction,
            'integers instead of floats would change the result: leave it out; mesh= saves memory',
        ),
        'lobpcg_topk_precondition': (lobpcg_topk_precondition, exact_only),
        'lobpcg_max_iter': (lobpcg_max_iter, exact_only),
        'compression_rank': (compression_rank, exact_only),
        'frequent_directions': (
            frequent_directions,
            'statistics are kept whole: leave it out; mesh= saves memory',
        ),
        'generate_fd_metrics': (
            generate_fd_metrics,
            'it tells of frequent_directions, which is not here: leave it out',
        ),
        'average_grad': (
            average_grad,
            'statistics are of each gradient: leave it out; optax.MultiSteps averages gradients',
        ),
        'reset_preconditioner': (
            reset_preconditioner,
            'statistics are never thrown away: leave it out, or lower beta2 to forget sooner',
        ),
        'decay_preconditioning_compute_steps': (
            decay_preconditioning_compute_steps,
            'the interval is a constant: leave it out and set preconditioning_compute_steps',
        ),
        'end_preconditioning_compute_steps': (
            end_preconditioning_compute_steps is not None,
            'the interval is a constant: leave it out and set preconditioning_compute_steps',
        ),
    }
    counts = {
        'block_size': block_size,
        'preconditioning_compute_steps': preconditioning_compute_steps,
        'statistics_compute_steps': statistics_compute_steps,
    }
    refused |= {name: (value < 1, 'must be at least 1') for name, value in counts.items()}
    for name, (wrong, why) in refused.items():
        if wrong:
            raise ValueError(f'{name}: {why}')
    o = _Options(
        learning_rate=learning_rate,
        block_size=block_size,
        beta1=beta1,
        beta2=beta2,
        diagonal_epsilon=diagonal_epsilon,
        matrix_epsilon=matrix_epsilon,
        weight_decay=weight_decay,
        start_preconditioning_step=start_preconditioning_step,
        preconditioning_compute_steps=preconditioning_compute_steps,
        statistics_compute_steps=statistics_compute_steps,
        best_effort_shape_interpretation=best_effort_shape_interpretation,
        graft_type=GraftingType(graft_type),
        nesterov=nesterov,
        exponent_override=exponent_override,
        inverse_failure_threshold=inverse_failure_threshold,
        moving_average_for_momentum=moving_average_for_momentum,
        skip_preconditioning_dim_size_gt=skip_preconditioning_dim_size_gt,
        clip_by_scaled_gradient_norm=clip_by_scaled_gradient_norm,
        tensordot_precision=tensordot_precision,
        relative_matrix_epsilon=relative_matrix_epsilon,
        merge_small_dims_block_size=merge_small_dims_block_size,
        precondtioner_type=PreconditionerType(precondtioner_type),
        skip_preconditioning_rank_lt=skip_preconditioning_rank_lt,
        decoupled_learning_rate=decoupled_learning_rate,
        decoupled_weight_decay=decoupled_weight_decay,
        generate_training_metrics=generate_training_metrics,
        root='eigh' if eigh else 'newton',
        mesh=mesh,
        matrix=matrix,
    )
    return optax.GradientTransformation(
        lambda params: _init(o, params),
        lambda updates, state, params=None: _update(o, updates, state, params),
    )


def _init(o: _Options, params: Any) -> State:
    flat = trees.flatten(params)
    _, _, cuts = _plan(o, {name: x.shape for name, x in flat.items()})
    dtype = jnp.result_type(jnp.float32, *flat.values())
    unit = o.mesh.size if o.mesh is not None else 1
    stacks = {
        name: _init_stack(o, stack, blocks.padded_length(stack, unit), name, dtype)
        for name, stack in cuts.stacks.items()
    }
    if o.mesh is not None and stacks:
        everywhere = NamedSharding(o.mesh, PartitionSpec(o.mesh.axis_names))
        stacks = jax.lax.with_sharding_constraint(stacks, everywhere)

    def zeros() -> Any:
        kept = jnp.float32
        return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, kept)), params)

    return State(
        step=jnp.zeros((), jnp.int32),
        momentum=zeros(),
        graft_momentum=zeros(),
        square=zeros() if o.graft_type in (*_SUMS, *_AVERAGES) else (),
        stacks=stacks,
        health={name: x for name, x in _zero_health().items() if o.generate_training_metrics},
    )


class _View(NamedTuple):
    """How a parameter is preconditioned.

    Attributes:
      stack: number of leading axes that index layers.
      shape: [rows, columns] of one layer, [length] of a vector, or () if it is only grafted.
    """

    stack: int
    shape: tuple[int, ...]


def _merge_dims(shape: tuple[int, ...], most: int) -> tuple[int, ...]:
    """Merges neighbouring dimensions, from the first on, while their product is at most `most`."""
    dims = [1]
    for size in shape:
        if dims[-1] * size <= most:
            dims[-1] *= size
        elif dims[-1] == 1:
            dims[-1] = size
        else:
            dims.append(size)
    return tuple(dims[:-1] if dims[-1] == 1 and len(dims) > 1 else dims)


def _view(o: _Options, name: str, shape: tuple[int, ...]) -> _View:
    graft_only = _View(0, ())
    large = any(size > o.skip_preconditioning_dim_size_gt for size in shape)
    if large or len(shape) < o.skip_preconditioning_rank_lt or 0 in shape or not shape:
        return graft_only
    if o.matrix is not None:
        axes = o.matrix(name, len(shape))
        if axes is None:
            return graft_only
        middle = axes.stack + axes.inputs
        sides = math.prod(shape[axes.stack : middle]), math.prod(shape[middle:])
        return _View(axes.stack, sides)
    dims = shape
    if o.best_effort_shape_interpretation:
        dims = _merge_dims(shape, o.merge_small_dims_block_size)
    if len(dims) > 2:
        raise ValueError(
            f'{name} has dimensions {dims}, of which at most two can be preconditioned: raise '
            f'merge_small_dims_block_size (now {o.merge_small_dims_block_size}) with '
            'best_effort_shape_interpretation=True, or pass matrix= if the first axis holds layers'
        )
    return _View(0, dims)


def _plan(
    o: _Options, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, _View], dict[str, dict[str, tuple[slice, slice]]], blocks.Plan]:
    """Plans views, pieces and blocks of all parameters.

    `blocks` only cuts into equal blocks, so each matrix is first cut into pieces that do: the
    part that `block_size` divides, and the remainder. Vectors are matrices of one row, in stacks
    of their own.

    Returns:
      (views by parameter, pieces with their slices by parameter, block plan of the pieces).
    """
    views = {name: _view(o, name, shape) for name, shape in shapes.items()}
    pieces: dict[str, dict[str, tuple[slice, slice]]] = {}
    cuts: dict[str, blocks.Cut] = {}
    stacks: dict[str, blocks.BlockStack] = {}
    for name, view in views.items():
        if not view.shape:
            continue
        rows, columns = (1, *view.shape)[-2:]
        layers = math.prod(shapes[name][: view.stack])
        pieces[name] = {}
        for i in _spans(rows, o.block_size):
            for j in _spans(columns, o.block_size):
                piece = f'{name}:{i.start},{j.start}'
                pieces[name][piece] = i, j
                tall, wide = i.stop - i.start, j.stop - j.start
                down, across = -(-tall // o.block_size), -(-wide // o.block_size)
                size = tall // down, wide // across
                flipped = size[0] > size[1] and o.precondtioner_type == PreconditionerType.ALL
                small, large = reversed(size) if flipped else size
                key = f'{large}' if len(view.shape) == 1 else f'{small}x{large}'
                first = stacks[key].blocks if key in stacks else 0
                cuts[piece] = blocks.Cut(layers, tall, wide, down, across, flipped, key, first)
                stacks[key] = blocks.BlockStack(small, large, first + cuts[piece].blocks)
    return views, pieces, blocks.Plan(cuts, stacks)


def _spans(size: int, block: int) -> list[slice]:
    """Slices for the largest multiple of `block` and for the remainder, where not empty."""
    divisible = size - size % block
    return [slice(a, b) for a, b in ((0, divisible), (divisible, size)) if a < b]


def _init_stack(
    o: _Options, stack: blocks.BlockStack, length: int, name: str, dtype: Any
) -> StackState:
    is_real = (jnp.arange(length) < stack.blocks)[:, None, None]
    sizes = {'left': stack.rows, 'right': stack.columns}
    sides = _SIDES[o.precondtioner_type] if 'x' in name else ('right',)
    eyes = {side: jnp.where(is_real, jnp.eye(sizes[side], dtype=dtype)[None], 0) for side in sides}
    return StackState(
        statistics={side: o.matrix_epsilon * eye for side, eye in eyes.items()},
        roots=eyes,
        error={side: jnp.zeros(length, jnp.float32) for side in sides},
    )


def _update(o: _Options, updates: Any, state: State, params: Any) -> tuple[Any, State]:
    if params is None and o.weight_decay:
        raise ValueError('weight_decay: needs the parameters: call update(grads, state, params)')
    flat = trees.flatten(updates)
    views, pieces, cuts = _plan(o, {name: x.shape for name, x in flat.items()})
    momentum, graft_momentum = trees.flatten(state.momentum), trees.flatten(state.graft_momentum)
    squares, weights = trees.flatten(state.square), trees.flatten(params)
    rate = o.learning_rate(state.step) if callable(o.learning_rate) else o.learning_rate
    grads, ignored = {}, jnp.zeros((), jnp.int32)
    for name, g in flat.items():
        g = g.astype(momentum[name].dtype)
        usable = jnp.isfinite(jnp.square(g).sum())
        grads[name] = jnp.where(usable, g, 0)
        ignored += ~usable
    preconditioned, stacks, health_now = _precondition(o, grads, state, (views, pieces, cuts))
    health_now['ignored'] = ignored
    new = {}
    for name, g in grads.items():
        axes = tuple(range(views[name].stack, g.ndim))
        graft, square = _graft(o, g, squares.get(name), axes)
        if square is not None:
            squares[name] = square
        rate_now = jnp.asarray(rate, g.dtype)
        graft = graft if o.decoupled_learning_rate else rate_now * graft
        update = preconditioned.get(name, graft)
        if o.graft_type != GraftingType.NONE and name in preconditioned:
            update = update * (_norm(graft, axes) / (_norm(update, axes) + _LEAST_NORM))
        decay = o.weight_decay * weights[name].astype(g.dtype) if o.weight_decay else None
        if decay is not None and not o.decoupled_weight_decay:
            update, graft = update + decay, graft + decay
        weight = 1 - o.beta1 if o.moving_average_for_momentum else 1
        momentum[name] = o.beta1 * momentum[name] + weight * update
        graft_momentum[name] = o.beta1 * graft_momentum[name] + weight * graft
        started = state.step >= o.start_preconditioning_step
        result = jnp.where(started, momentum[name], graft_momentum[name])
        if o.nesterov:
            result = weight * jnp.where(started, update, graft) + o.beta1 * result
        result = rate_now * result if o.decoupled_learning_rate else result
        if decay is not None and o.decoupled_weight_decay:
            result = result + rate_now * decay
        new[name] = -result.astype(flat[name].dtype)

    def tree(arrays: dict[str, Array]) -> Any:
        return trees.map_with_name(lambda name, _: arrays[name], updates)

    health = {
        name: health_now[name] if name == 'error' else old + health_now[name].astype(old.dtype)
        for name, old in state.health.items()
    }
    return tree(new), State(
        step=state.step + 1,
        momentum=tree(momentum),
        graft_momentum=tree(graft_momentum),
        square=tree(squares) if squares else (),
        stacks=stacks,
        health=health,
    )


def _norm(x: Array, axes: tuple[int, ...]) -> Array:
    return jnp.sqrt(jnp.square(x).sum(axes, keepdims=True))


def _graft(
    o: _Options, g: Array, square: Array | None, axes: tuple[int, ...]
) -> tuple[Array, Array | None]:
    """Computes (graft update, new squares or None); norms are taken over `axes`."""
    if o.graft_type == GraftingType.SQRT_N:
        return jnp.sign(g), None
    if square is None:
        return g, None
    if o.graft_type in _NORMALIZED:
        g = g / (_norm(g, axes) + _LEAST_NORM)
    b2, new = (1.0, 1.0) if o.graft_type in _SUMS else _weights(o)
    square = b2 * square + new * jnp.square(g)
    graft = g / (jnp.sqrt(square) + o.diagonal_epsilon)
    if o.clip_by_scaled_gradient_norm and o.graft_type in _AVERAGES:
        mean = jnp.sqrt(jnp.square(graft).mean(axes, keepdims=True))
        graft = graft / jnp.maximum(1, mean / o.clip_by_scaled_gradient_norm)
    return graft, square


def _weights(o: _Options) -> tuple[float, float]:
    """Weights of old and new in a running average; with beta2=1 it is a sum, as in the packages."""
    return o.beta2, 1 - o.beta2 if o.beta2 != 1 else 1.0


def _precondition(
    o: _Options,
    grads: dict[str, Array],
    state: State,
    plan: tuple[dict[str, _View], dict[str, dict[str, tuple[slice, slice]]], blocks.Plan],
) -> tuple[dict[str, Array], dict[str, StackState], blocks.HealthStats]:
    """Preconditions gradients; returns (results by parameter, new stacks, health of this step)."""
    views, pieces, cuts = plan
    if not pieces:
        return {}, state.stacks, _zero_health()
    layered: dict[str, Array] = {}
    parts: dict[str, Array] = {}
    for name, slices in pieces.items():
        rows, columns = (1, *views[name].shape)[-2:]
        layered[name] = grads[name].reshape(-1, rows, columns)
        parts |= {piece: layered[name][:, i, j] for piece, (i, j) in slices.items()}
    dtype = jax.tree.leaves(state.stacks[next(iter(state.stacks))].statistics)[0].dtype
    unit = o.mesh.size if o.mesh is not None else 1
    directions, stacks, health = blocks.advance_all(
        partial(_advance, o),
        blocks.cut_all(cuts, parts, unit, o.mesh, dtype),
        state.stacks,
        (state.step,),
        o.mesh,
        dtype,
    )
    joined, results = blocks.join(cuts, directions, parts), {}
    for name, slices in pieces.items():
        x = jnp.zeros_like(layered[name])
        for piece, (i, j) in slices.items():
            x = x.at[:, i, j].set(joined[piece])
        results[name] = x.reshape(grads[name].shape)
    return results, stacks, health


def _zero_health() -> blocks.HealthStats:
    zero = jnp.zeros((), jnp.int32)
    return {'computed': zero, 'refused': zero, 'ignored': zero, 'error': jnp.zeros((), jnp.float32)}


def _advance(
    o: _Options, grads: dict[str, Array], stacks: dict[str, StackState], step: Int[Array, '']
) -> tuple[dict[str, Array], dict[str, StackState], blocks.HealthStats]:
    """One step on the blocks of one device: statistics and roots that are due, directions."""
    b2, new = _weights(o)

    def update_statistics(stacks: dict[str, StackState]) -> dict[str, StackState]:
        new_stacks = {}
        for name, stack in stacks.items():
            g, statistics = grads[name], {}
            for side, old in stack.statistics.items():
                outer = jnp.einsum(_OUTER[side], g, g, precision=o.tensordot_precision)
                statistics[side] = b2 * old + new * outer
            new_stacks[name] = stack._replace(statistics=statistics)
        return new_stacks

    due = step % o.statistics_compute_steps == 0
    stacks = jax.lax.cond(due, update_statistics, lambda s: s, stacks)
    due = step % o.preconditioning_compute_steps == 0
    stacks, health = jax.lax.cond(due, partial(_refresh, o), lambda s: (s, _zero_health()), stacks)
    directions = {}
    for name, x in grads.items():
        high, root = jax.lax.Precision.HIGH, stacks[name].roots
        if 'left' in root:
            x = jnp.einsum('nij,njk->nik', root['left'], x, precision=high)
        if 'right' in root:
            x = jnp.einsum('nij,njk->nik', x, root['right'], precision=high)
        directions[name] = x
    errors = [jnp.max(x, initial=0.0) for s in stacks.values() for x in s.error.values()]
    return directions, stacks, {**health, 'error': jnp.stack(errors).max()}


def _refresh(
    o: _Options, stacks: dict[str, StackState]
) -> tuple[dict[str, StackState], blocks.HealthStats]:
    """Recomputes all roots and installs those that are accurate enough."""
    # Matrices of one size are computed in one batch, whatever their stack and side.
    batches: dict[tuple[int, int], list[tuple[str, str]]] = {}
    for name, stack in stacks.items():
        for side, a in stack.statistics.items():
            p = o.exponent_override or 2 * len(stack.statistics)
            batches.setdefault((a.shape[-1], p), []).append((name, side))
    new_stacks = {
        name: StackState(s.statistics, dict(s.roots), dict(s.error)) for name, s in stacks.items()
    }
    health = _zero_health()
    for (_, p), keys in batches.items():
        root, error = _inverse_root(
            o, jnp.concatenate([stacks[name].statistics[side] for name, side in keys]), p
        )
        start = 0
        for name, side in keys:
            old = stacks[name].roots[side]
            part = slice(start, start + len(old))
            start = part.stop
            # Padding at a stack's end has roots of zeros, which must stay zeros.
            is_real = jnp.trace(old, axis1=1, axis2=2) != 0
            good = error[part] < o.inverse_failure_threshold
            good &= is_real & jnp.isfinite(root[part]).all((1, 2))
            new_stacks[name].roots[side] = jnp.where(good[:, None, None], root[part], old)
            old_error = stacks[name].error[side]
            new_stacks[name].error[side] = jnp.where(
                good, error[part].astype(old_error.dtype), old_error
            )
            health['computed'] += is_real.sum(dtype=jnp.int32)
            health['refused'] += (is_real & ~good).sum(dtype=jnp.int32)
    return new_stacks, health


def _inverse_root(
    o: _Options, a: Float[Array, 'n d d'], p: int
) -> tuple[Float[Array, 'n d d'], Float[Array, ' n']]:
    """Computes (a + ridge)^(-1/p) and its error."""
    zeros = jnp.zeros(len(a), a.dtype)
    ridge = zeros + o.matrix_epsilon
    if o.relative_matrix_epsilon:
        ridge *= jnp.maximum(roots.normalised(a, zeros)[1], _LEAST_EIGENVALUE)
    a = a + ridge[:, None, None] * jnp.eye(a.shape[-1], dtype=a.dtype)[None]
    least = float(jnp.finfo(a.dtype).eps)
    if o.relative_matrix_epsilon:
        least = max(least, o.matrix_epsilon)
    return roots.inverse_root(a, -1 / p, zeros, o.root, least)
