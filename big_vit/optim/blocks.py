"""Block decomposition shared by Shampoo and SOAP: matrices cut into stacks of equal blocks.

Each matrix is cut into equal blocks of at most `block` rows and columns. A block is transposed
where needed so that it has no more rows than columns, and zero-padded to one of a few sizes. All
blocks of one size form a stack [blocks, rows, columns], whose first axis is sharded over every
device of the mesh. Padding with zeros is exact: zero rows stay zero and add nothing to the
statistics.

The order of the blocks depends neither on the mesh nor on whether layers are scanned. More
devices only make a stack longer, by zero blocks at its end.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from big_vit import trees
from big_vit.optim import matrices

# (path, number of axes) -> how that parameter is a matrix, or None.
MatrixOf = Callable[[str, int], matrices.Matrix | None]
# (rows, columns) of a block.
Size = tuple[int, int]
# State of an optimizer by stack name.
Stacks = dict[str, Any]
# Scalars by name, see `zero_health`.
HealthStats = dict[str, Array]


class Cut(NamedTuple):
    """Where the blocks of one parameter lie.

    Attributes:
      layers, rows, columns: the parameter seen as `layers` matrices of [rows, columns].
      down, across: number of blocks along the rows and along the columns of each matrix.
      flipped: True if its blocks are stored transposed.
      stack: name of the stack that holds the blocks.
      first: index of its first block in that stack.
    """

    layers: int
    rows: int
    columns: int
    down: int
    across: int
    flipped: bool
    stack: str
    first: int

    @property
    def blocks(self) -> int:
        """Number of blocks of the parameter."""
        return self.layers * self.down * self.across


class BlockStack(NamedTuple):
    """Size of the blocks of one stack, and how many real (not padding) blocks it has."""

    rows: int
    columns: int
    blocks: int


class Plan(NamedTuple):
    """Layout of all blocks; parameters without an entry in `cuts` are not matrices.

    It follows from names and shapes alone, so `init` and `update` derive the same one.
    """

    cuts: dict[str, Cut]
    stacks: dict[str, BlockStack]


def _round_up(size: int) -> int:
    """Rounds a side up, so that nearly equal sizes share a stack."""
    # Short sides stay exact: padding would weigh too much there.
    unit = 1 if size <= 64 else 32 if size <= 256 else 64
    return -(-size // unit) * unit


def _layer_order(name: str) -> tuple[str, int]:
    """Sort key that puts unrolled layers in the order they would have if scanned."""
    layer = re.search(r'(?<=encoderblock_)\d+', name)
    return re.sub(r'encoderblock_\d+', 'encoderblock', name), int(layer[0]) if layer else 0


def plan(
    shapes: Mapping[str, tuple[int, ...]], block: int, matrix: MatrixOf = matrices.matrix
) -> Plan:
    """Plans how to cut parameters into stacks of blocks.

    Args:
      shapes: parameter shapes by path.
      block: largest number of rows and columns of a block.
      matrix: maps a path and its number of axes to the matrix view, or None for Adam.
    """
    views: dict[str, tuple[int, int, int]] = {}
    for name in sorted(shapes, key=_layer_order):
        shape, axes = shapes[name], matrix(name, len(shapes[name]))
        if axes is None:
            continue
        middle = axes.stack + axes.inputs
        layers = math.prod(shape[: axes.stack])
        rows, columns = math.prod(shape[axes.stack : middle]), math.prod(shape[middle:])
        if layers and min(rows, columns) > 1:  # A single row is a vector.
            views[name] = layers, rows, columns
    parts = _split_counts(views, block)
    sizes: dict[str, Size] = {}
    counts: dict[Size, int] = {}
    for name, (layers, rows, columns) in views.items():
        down, across = parts[rows], parts[columns]
        small, large = sorted((_round_up(-(-rows // down)), _round_up(-(-columns // across))))
        sizes[name] = small, large
        counts[sizes[name]] = counts.get(sizes[name], 0) + layers * down * across
    total = sum(counts.values())
    common = [size for size, count in counts.items() if count > 1 and 16 * count > total]
    cuts: dict[str, Cut] = {}
    stacks: dict[str, BlockStack] = {}
    for name, (layers, rows, columns) in views.items():
        down, across = parts[rows], parts[columns]
        placement = sizes[name], -(-rows // down) > -(-columns // across), down, across
        if sizes[name] not in common:
            placement = _fit_common_size(rows, columns, common, 4 * down * across) or placement
        size, flipped, down, across = placement
        key = f'{size[0]}x{size[1]}'
        first = stacks[key].blocks if key in stacks else 0
        cuts[name] = Cut(layers, rows, columns, down, across, flipped, key, first)
        stacks[key] = BlockStack(*size, first + cuts[name].blocks)
    return Plan(cuts, stacks)


def _split_counts(views: Mapping[str, tuple[int, int, int]], block: int) -> dict[int, int]:
    """Chooses the number of parts for each side length: the fewest `block` allows, or a few more.

    A side that must be cut is cut into parts of the most common length if at most twice as many
    parts achieve that: next to 768, a side of 3072 becomes four parts of 768 rather than three
    of 1024. Equal blocks share one root computation and need the least padding.
    """
    fewest, seen = {}, dict[int, int]()
    for layers, *sides in views.values():
        for side in sides:
            fewest[side] = -(-side // block)
            size = _round_up(-(-side // fewest[side]))
            seen[size] = seen.get(size, 0) + layers
    if not seen:
        return {}
    most = max(seen, key=lambda size: seen[size])
    parts = {}
    for side, least in fewest.items():
        more = range(least, 2 * least + 1) if least > 1 else ()
        alike = [n for n in more if _round_up(-(-side // n)) == most]
        parts[side] = alike[0] if alike else least
    return parts


# Scalars below which padding a block is cheaper than compiling roots for one more size.
_SMALL_BLOCK = 128**2


def _fit_common_size(
    rows: int, columns: int, common: list[Size], limit: int
) -> tuple[Size, bool, int, int] | None:
    """Fits a matrix of a rare size into blocks of a common one.

    A stack with a single block would be padded to one block per device.

    Returns:
      (size, flipped, down, across), or None if that takes more blocks than `limit`, or more than
      twice the scalars of the matrix (unless those are few anyway).
    """
    best, least = None, max(2 * rows * columns, _SMALL_BLOCK)
    for size in common:
        for flipped in (False, True):
            r, c = (size[1], size[0]) if flipped else size
            down, across = -(-rows // r), -(-columns // c)
            if down * across <= limit and down * across * r * c <= least:
                best, least = (size, flipped, down, across), down * across * r * c
    return best


def cut(plan: Plan, arrays: Mapping[str, Array]) -> dict[str, Float[Array, 'blocks r c']]:
    """Cuts arrays, given by path, into their stacks; arrays not in the plan are ignored."""
    parts: dict[str, list[Array]] = {name: [] for name in plan.stacks}
    for name, c in plan.cuts.items():
        rows, columns = -(-c.rows // c.down), -(-c.columns // c.across)
        x = arrays[name].reshape(c.layers, c.rows, c.columns)
        fill = ((0, 0), (0, rows * c.down - c.rows), (0, columns * c.across - c.columns))
        x = jnp.pad(x, fill).reshape(c.layers, c.down, rows, c.across, columns)
        x = x.transpose((0, 1, 3, 4, 2) if c.flipped else (0, 1, 3, 2, 4))
        x = x.reshape(c.blocks, *x.shape[3:])
        size = plan.stacks[c.stack]
        x = jnp.pad(x, ((0, 0), (0, size.rows - x.shape[1]), (0, size.columns - x.shape[2])))
        parts[c.stack].append(x)
    return {name: jnp.concatenate(pieces) for name, pieces in parts.items()}


def join(
    plan: Plan,
    stacks: Mapping[str, Float[Array, 'blocks r c']],
    abstract_state: Mapping[str, Array],
) -> dict[str, Array]:
    """Inverts `cut`, with shapes and dtypes from `abstract_state`; drops padding blocks."""
    arrays = {}
    for name, c in plan.cuts.items():
        rows, columns = -(-c.rows // c.down), -(-c.columns // c.across)
        x = stacks[c.stack][c.first : c.first + c.blocks]
        x = x[:, :columns, :rows] if c.flipped else x[:, :rows, :columns]
        x = x.reshape(c.layers, c.down, c.across, *x.shape[1:])
        x = x.transpose((0, 1, 4, 2, 3) if c.flipped else (0, 1, 3, 2, 4))
        x = x.reshape(c.layers, rows * c.down, columns * c.across)[:, : c.rows, : c.columns]
        arrays[name] = x.reshape(abstract_state[name].shape).astype(abstract_state[name].dtype)
    return arrays


class Adam(NamedTuple):
    """Adam's hyperparameters (arXiv 1412.6980), with NAdam's look-ahead if `nesterov`.

    `mu_dtype` is the dtype of the gradient average, `dtype` that of everything else.
    """

    b1: float
    b2: float
    eps: float
    nesterov: bool
    mu_dtype: Any
    dtype: Any


def correction(decay: float, step: Int[Array, ''], dtype: Any) -> Float[Array, '']:
    """Bias correction 1 - decay^step: the sum of the weights of an average that began at 0."""
    return 1 - jnp.asarray(decay, dtype) ** step


def moments(
    o: Adam, g: Array, mu: Array, nu: Array, step: Int[Array, '']
) -> tuple[Array, Array, Array]:
    """Updates Adam's moments; returns (bias-corrected gradient average, new mu, new nu)."""
    mu = o.b1 * mu.astype(g.dtype) + (1 - o.b1) * g
    nu = o.b2 * nu + (1 - o.b2) * jnp.square(g)
    # NAdam looks ahead to the next step, so its average is corrected for that step.
    average = o.b1 * mu + (1 - o.b1) * g if o.nesterov else mu
    average = average / correction(o.b1, step + 1 if o.nesterov else step, g.dtype)
    return average, mu.astype(o.mu_dtype), nu


def adam(o: Adam, average: Array, nu: Array, step: Int[Array, '']) -> Array:
    """Returns Adam's update direction."""
    return average / (jnp.sqrt(nu / correction(o.b2, step, nu.dtype)) + o.eps)


def count(mask: Bool[Array, '*n']) -> Int[Array, '']:
    """Number of True entries, as int32."""
    return mask.sum(dtype=jnp.int32)


def usable(
    g: Float[Array, 'blocks r c'],
) -> tuple[Bool[Array, 'blocks 1 1'], Float[Array, 'blocks r c']]:
    """Masks blocks whose squared norm is not finite: (mask of good blocks, gradients or 0)."""
    # The norm's square also catches finite gradients whose square overflows.
    keep = jnp.isfinite(jnp.square(g).sum((1, 2), keepdims=True))
    return keep, jnp.where(keep, g, 0)


def statistics(
    b2: float,
    g: Float[Array, 'blocks r c'],
    keep: Bool[Array, 'blocks 1 1'],
    left: Float[Array, 'blocks r r'],
    right: Float[Array, 'blocks c c'],
) -> tuple[Float[Array, 'blocks r r'], Float[Array, 'blocks c c'], Int[Array, '']]:
    """Updates the Kronecker factors.

    A bad gradient (`keep` False) leaves them unchanged. Factors that are not finite restart from
    the current gradient alone, so that one overflow cannot poison them forever.

    Returns:
      (averages of G Gᵀ, averages of Gᵀ G, number of factors that restarted).
    """
    outer = (jnp.einsum('nij,nkj->nik', g, g), jnp.einsum('nji,njk->nik', g, g))
    averages, restarted = [], jnp.zeros((), jnp.int32)
    for old, fresh in zip((left, right), outer, strict=True):
        new = b2 * old + (1 - b2) * fresh
        finite = jnp.isfinite(new).all((1, 2), keepdims=True)
        averages.append(jnp.where(keep & finite, new, jnp.where(finite, old, (1 - b2) * fresh)))
        restarted += count(~finite)
    return averages[0], averages[1], restarted


def take(x: Array, group: Array | None, groups: int) -> Array:
    """Takes every `groups`-th block, starting at index `group`; all blocks if that is None."""
    if group is None:
        return x
    parts = x.reshape(-1, groups, *x.shape[1:])
    return jax.lax.dynamic_index_in_dim(parts, group, axis=1, keepdims=False)


def put(x: Array, part: Array, group: Array | None, groups: int) -> Array:
    """Returns `x` with the blocks that `take` selects replaced by `part`."""
    if group is None:
        return part
    parts = x.reshape(-1, groups, *x.shape[1:])
    return jax.lax.dynamic_update_index_in_dim(parts, part, group, axis=1).reshape(x.shape)


def check(block: int, every: int, groups: int, stats_dtype: Any) -> list[tuple[str, str]]:
    """Lists invalid options as (option, what is wrong and how to fix it)."""
    numbers = (('block', block, 2), ('every', every, 1), ('groups', groups, 1))
    wrong = [(name, f'{n} is below {least}') for name, n, least in numbers if n < least]
    if wrong:
        return wrong
    if jnp.finfo(stats_dtype).bits < 32:
        why = 'statistics rounded to 16 bits have negative eigenvalues, so no roots'
        wrong.append(('stats_dtype', f'{why}; take float32, and root_dtype=bfloat16 saves memory'))
    if every % groups:
        near = -(-every // groups) * groups
        wrong.append(('groups', f'{groups} does not divide every={every}; try every={near}'))
    return wrong


class State(NamedTuple):
    """State of an optimizer that works on stacks.

    Attributes:
      step: number of updates, for bias correction of Adam's moments.
      age: number of updates that went into the block statistics; below `step` if the first
        updates were made by another optimizer.
      mu, nu: Adam's moments of the parameters that are not matrices.
      stacks: per-stack state of the optimizer; the first axis of every array is the block.
      health: event counts since the start, see `zero_health`.
    """

    step: Int[Array, '']
    age: Int[Array, '']
    mu: Any
    nu: Any
    stacks: Stacks
    health: HealthStats


def zero_health() -> HealthStats:
    """Zero health statistics, for one step or, in `State.health`, for the whole run.

    computed, refused    roots or bases computed, and how many of these were too inaccurate
    restarted            statistics that were unusable and have started again
    ignored              non-finite gradients, of a block or a whole parameter
    error                largest error of the roots or bases (of the latest step, not a sum)
    """
    counts = ('computed', 'refused', 'restarted', 'ignored')
    zeros = {name: jnp.zeros((), jnp.int32) for name in counts}
    return {**zeros, 'error': jnp.zeros((), jnp.float32)}


def padded_length(stack: BlockStack, unit: int) -> int:
    """Number of blocks of a stack once padded to a multiple of `unit`."""
    return -(-stack.blocks // unit) * unit


def transformation(
    o: Adam,
    empty: Callable[[BlockStack, int], Any],
    advance: Callable[..., tuple[dict[str, Array], Stacks, HealthStats]],
    *,
    block: int,
    groups: int = 1,
    mesh: Mesh | None = None,
    matrix: MatrixOf = matrices.matrix,
    gather_dtype: Any = jnp.float32,
) -> optax.GradientTransformation:
    """Builds an optimizer that applies `advance` to matrices and Adam to everything else.

    Args:
      o: hyperparameters of Adam.
      empty: (stack, padded number of blocks) -> initial state of that stack.
      advance: (gradients of all stacks, their states, step, age) -> (directions, new states,
        health of this step). Called on each device with the blocks of that device.
      block: largest side of a block.
      groups: the number of blocks per device is padded to a multiple of this.
      mesh: mesh whose devices share the blocks; None computes on one device.
      matrix: maps a path and its number of axes to the matrix view, or None for Adam.
      gather_dtype: dtype in which directions travel between devices.
    """
    unit = groups * (mesh.size if mesh is not None else 1)

    def init(params: Any) -> State:
        flat = trees.flatten(params)
        cuts = plan({name: x.shape for name, x in flat.items()}, block, matrix)
        rest = {name: x for name, x in flat.items() if name not in cuts.cuts}
        stacks = {
            name: empty(stack, padded_length(stack, unit)) for name, stack in cuts.stacks.items()
        }
        if mesh is not None and stacks:
            everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            stacks = jax.lax.with_sharding_constraint(stacks, everywhere)
        return State(
            step=jnp.zeros((), jnp.int32),
            age=jnp.zeros((), jnp.int32),
            mu=trees.unflatten({n: jnp.zeros(x.shape, o.mu_dtype) for n, x in rest.items()}),
            nu=trees.unflatten({n: jnp.zeros(x.shape, o.dtype) for n, x in rest.items()}),
            stacks=stacks,
            health=zero_health(),
        )

    def update(updates: Any, state: State, params: Any = None) -> tuple[Any, State]:
        del params
        flat = trees.flatten(updates)
        cuts = plan({name: x.shape for name, x in flat.items()}, block, matrix)
        step, age = state.step + 1, state.age + 1
        directions, stacks, health = advance_all(
            advance,
            cut_all(cuts, flat, unit, mesh, o.dtype),
            state.stacks,
            (step, age),
            mesh,
            gather_dtype,
        )
        new_updates = join(cuts, directions, flat)
        mu, nu = trees.flatten(state.mu), trees.flatten(state.nu)
        for name in mu:
            g = flat[name].astype(o.dtype)
            usable = jnp.isfinite(jnp.square(g).sum())
            average, new_mu, new_nu = moments(o, g, mu[name], nu[name], step)
            direction = jnp.where(usable, adam(o, average, new_nu, step), 0)
            new_updates[name] = direction.astype(flat[name].dtype)
            mu[name] = jnp.where(usable, new_mu, mu[name])
            nu[name] = jnp.where(usable, new_nu, nu[name])
            health['ignored'] += ~usable
        totals = {
            name: health[name] if name == 'error' else old + health[name].astype(old.dtype)
            for name, old in state.health.items()
        }
        new = State(step, age, trees.unflatten(mu), trees.unflatten(nu), stacks, totals)
        return trees.map_with_name(lambda name, _: new_updates[name], updates), new

    return optax.GradientTransformation(init, update)


def cut_all(
    cuts: Plan, arrays: Mapping[str, Array], unit: int, mesh: Mesh | None, dtype: Any
) -> dict[str, Float[Array, 'blocks r c']]:
    """Cuts arrays into stacks, each padded with zero blocks to a multiple of `unit`."""
    replicated = {name: arrays[name].astype(dtype) for name in cuts.cuts}
    if mesh is not None and replicated:
        # Replicate first: each device then slices its own blocks without communication. Sharded
        # at once, every block would travel in a transfer of its own.
        replicated = jax.lax.with_sharding_constraint(
            replicated, NamedSharding(mesh, PartitionSpec())
        )
    stacks = {
        name: jnp.pad(x, ((0, padded_length(cuts.stacks[name], unit) - x.shape[0]), (0, 0), (0, 0)))
        for name, x in cut(cuts, replicated).items()
    }
    if mesh is not None and stacks:
        # The stacks too: else the partitioner pads each shard and then sends what is misplaced.
        stacks = jax.lax.with_sharding_constraint(stacks, NamedSharding(mesh, PartitionSpec()))
    return stacks


def advance_all(
    advance: Any,
    grads: dict[str, Array],
    stacks: Stacks,
    now: tuple[Array, ...],
    mesh: Mesh | None,
    gather_dtype: Any,
) -> tuple[dict[str, Array], Stacks, HealthStats]:
    """Runs `advance` on each device's own blocks; gathers directions and sums up health.

    Args:
      now: further arguments of `advance`, such as the step.
    """
    if not grads:
        return {}, stacks, zero_health()
    if mesh is None:
        return advance(grads, stacks, *now)
    axes = mesh.axis_names

    def local(grads: Any, stacks: Any, now: Any) -> Any:
        directions, stacks, health = advance(grads, stacks, *now)
        # One gather per stack: flattening them into one costs more to undo than it saves.
        gathered = {
            name: jax.lax.all_gather(x.astype(gather_dtype), axes, tiled=True)
            for name, x in directions.items()
        }
        error = jax.lax.pmax(health.pop('error'), axes)
        return gathered, stacks, {**jax.lax.psum(health, axes), 'error': error}

    split, same = PartitionSpec(axes), PartitionSpec()
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(split, split, same),
        out_specs=(same, split, same),
        check_vma=False,
    )(grads, stacks, now)
