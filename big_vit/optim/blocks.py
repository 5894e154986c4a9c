"""Parameters cut into blocks of few sizes, stacked: what Shampoo and SOAP compute on.

Each matrix is cut into equal blocks of at most `block` rows and columns, each block is
turned so that it has no more rows than columns and padded to one of few sizes. All blocks
of a size make one stack [blocks, rows, columns], whose first axis lies over all devices of
a mesh. Padding is zeros, and exact: rows of zeros stay zero, and add nothing to statistics.

The order of the blocks depends on neither the mesh nor on whether layers are scanned. A
stack is only longer, by blocks of zeros at its end, where more devices share it.
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

MatrixOf = Callable[[str, int], matrices.Matrix | None]
Size = tuple[int, int]
Stacks = dict[str, Any]
HealthStats = dict[str, Array]


class Cut(NamedTuple):
    """How one parameter is cut.

    Attributes:
      layers, rows, columns: it is so many matrices of this size.
      down, across: each in so many blocks.
      flipped: its blocks are transposed in the stack.
      stack: the name of the stack.
      first: index of its first block there.
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
        return self.layers * self.down * self.across


class BlockStack(NamedTuple):
    """The size of the blocks of a stack, and how many there are."""

    rows: int
    columns: int
    blocks: int


class Plan(NamedTuple):
    """A function of names and shapes alone; parameters in no cut are not matrices."""

    cuts: dict[str, Cut]
    stacks: dict[str, BlockStack]


def _rounded(size: int) -> int:
    """So that sizes that are nearly the same become the same."""
    unit = 1 if size <= 64 else 32 if size <= 256 else 64
    return -(-size // unit) * unit


def _order(name: str) -> tuple[str, int]:
    """Sorts unrolled layers as they would be if they were scanned."""
    layer = re.search(r'(?<=encoderblock_)\d+', name)
    return re.sub(r'encoderblock_\d+', 'encoderblock', name), int(layer[0]) if layer else 0


def plan(
    shapes: Mapping[str, tuple[int, ...]], block: int, matrix: MatrixOf = matrices.matrix
) -> Plan:
    """Cuts the parameters of these names and shapes.

    Args:
      block: largest number of rows and columns of a block.
      matrix: says of a name and a number of axes how that parameter is a matrix.
    """
    views: dict[str, tuple[int, int, int]] = {}
    for name in sorted(shapes, key=_order):
        shape, found = shapes[name], matrix(name, len(shapes[name]))
        if found is None:
            continue
        middle = found.stack + found.inputs
        layers = math.prod(shape[: found.stack])
        rows, columns = math.prod(shape[found.stack : middle]), math.prod(shape[middle:])
        if layers and min(rows, columns) > 1:  # A single row is a vector.
            views[name] = layers, rows, columns
    parts = _parts(views, block)
    sizes: dict[str, Size] = {}
    counts: dict[Size, int] = {}
    for name, (layers, rows, columns) in views.items():
        down, across = parts[rows], parts[columns]
        small, large = sorted((_rounded(-(-rows // down)), _rounded(-(-columns // across))))
        sizes[name] = small, large
        counts[sizes[name]] = counts.get(sizes[name], 0) + layers * down * across
    total = sum(counts.values())
    usual = [size for size, count in counts.items() if count > 1 and 16 * count > total]
    cuts: dict[str, Cut] = {}
    stacks: dict[str, BlockStack] = {}
    for name, (layers, rows, columns) in views.items():
        down, across = parts[rows], parts[columns]
        made = sizes[name], -(-rows // down) > -(-columns // across), down, across
        if sizes[name] not in usual:
            made = _as_usual(rows, columns, usual, 4 * down * across) or made
        size, flipped, down, across = made
        key = f'{size[0]}x{size[1]}'
        first = stacks[key].blocks if key in stacks else 0
        cuts[name] = Cut(layers, rows, columns, down, across, flipped, key, first)
        stacks[key] = BlockStack(*size, first + cuts[name].blocks)
    return Plan(cuts, stacks)


def _parts(views: Mapping[str, tuple[int, int, int]], block: int) -> dict[int, int]:
    """Into how many parts to cut each side: as few as `block` allows, or a few more.

    What must be cut is cut into parts as long as the side that most matrices have, if twice
    as many can be so long: 3072 beside 768 into four of 768, not three of 1024. Blocks of
    one size take one program to make roots with, and need the least zeros.
    """
    fewest, seen = {}, dict[int, int]()
    for layers, *sides in views.values():
        for side in sides:
            fewest[side] = -(-side // block)
            size = _rounded(-(-side // fewest[side]))
            seen[size] = seen.get(size, 0) + layers
    if not seen:
        return {}
    most = max(seen, key=lambda size: seen[size])
    parts = {}
    for side, least in fewest.items():
        more = range(least, 2 * least + 1) if least > 1 else ()
        alike = [n for n in more if _rounded(-(-side // n)) == most]
        parts[side] = alike[0] if alike else least
    return parts


# Scalars of a block that costs more to compile for than to pad.
_SMALL = 128**2


def _as_usual(
    rows: int, columns: int, usual: list[Size], limit: int
) -> tuple[Size, bool, int, int] | None:
    """(size, flipped, down, across) of a rare matrix in blocks of a size that is there anyway.

    On many devices a stack of a single block would take as much as one of a block for each.
    None where it would take more blocks than the limit, or more than double what the matrix
    takes, if that is not small anyway.
    """
    best, least = None, max(2 * rows * columns, _SMALL)
    for size in usual:
        for flipped in (False, True):
            r, c = (size[1], size[0]) if flipped else size
            down, across = -(-rows // r), -(-columns // c)
            if down * across <= limit and down * across * r * c <= least:
                best, least = (size, flipped, down, across), down * across * r * c
    return best


def cut(plan: Plan, arrays: Mapping[str, Array]) -> dict[str, Float[Array, 'blocks r c']]:
    """The stacks made of arrays by name; those that are in no cut are left out."""
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
    return {name: jnp.concatenate(found) for name, found in parts.items()}


def join(
    plan: Plan,
    stacks: Mapping[str, Float[Array, 'blocks r c']],
    abstract_state: Mapping[str, Array],
) -> dict[str, Array]:
    """The inverse of `cut`, in shapes and types of `like`; blocks behind the last are left out."""
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
    """Averages as Adam takes them (arXiv 1412.6980), with NAdam's look ahead or without.

    mu_dtype and dtype are the types in which the average of the gradient and all else is kept.
    """

    b1: float
    b2: float
    eps: float
    nesterov: bool
    mu_dtype: Any
    dtype: Any


def correction(decay: float, step: Int[Array, ''], dtype: Any) -> Float[Array, '']:
    """1 - decay^step: what the weights of an average that began at 0 sum to."""
    return 1 - jnp.asarray(decay, dtype) ** step


def moments(
    o: Adam, g: Array, mu: Array, nu: Array, step: Int[Array, '']
) -> tuple[Array, Array, Array]:
    """(average of the gradient, corrected for its start at 0; new mu; new nu)."""
    mu = o.b1 * mu.astype(g.dtype) + (1 - o.b1) * g
    nu = o.b2 * nu + (1 - o.b2) * jnp.square(g)
    average = o.b1 * mu + (1 - o.b1) * g if o.nesterov else mu
    average = average / correction(o.b1, step + 1 if o.nesterov else step, g.dtype)
    return average, mu.astype(o.mu_dtype), nu


def adam(o: Adam, average: Array, nu: Array, step: Int[Array, '']) -> Array:
    """The direction of Adam."""
    return average / (jnp.sqrt(nu / correction(o.b2, step, nu.dtype)) + o.eps)


def count(mask: Bool[Array, '*n']) -> Int[Array, '']:
    return mask.sum(dtype=jnp.int32)


def usable(
    g: Float[Array, 'blocks r c'],
) -> tuple[Bool[Array, 'blocks 1 1'], Float[Array, 'blocks r c']]:
    """(which blocks have a gradient that can be used, the gradients with zeros for the rest)."""
    keep = jnp.isfinite(jnp.square(g).sum((1, 2), keepdims=True))
    return keep, jnp.where(keep, g, 0)


def statistics(
    b2: float,
    g: Float[Array, 'blocks r c'],
    keep: Bool[Array, 'blocks 1 1'],
    left: Float[Array, 'blocks r r'],
    right: Float[Array, 'blocks c c'],
) -> tuple[Float[Array, 'blocks r r'], Float[Array, 'blocks c c'], Int[Array, '']]:
    """(averages of G G' and G' G, how many were not finite and have started again)."""
    outer = (jnp.einsum('nij,nkj->nik', g, g), jnp.einsum('nji,njk->nik', g, g))
    made, restarted = [], jnp.zeros((), jnp.int32)
    for old, now in zip((left, right), outer, strict=True):
        new = b2 * old + (1 - b2) * now
        finite = jnp.isfinite(new).all((1, 2), keepdims=True)
        made.append(jnp.where(keep & finite, new, jnp.where(finite, old, (1 - b2) * now)))
        restarted += count(~finite)
    return made[0], made[1], restarted


def take(x: Array, group: Array | None, groups: int) -> Array:
    """Every `groups`-th block from that of number `group` on; all where that is None."""
    if group is None:
        return x
    parts = x.reshape(-1, groups, *x.shape[1:])
    return jax.lax.dynamic_index_in_dim(parts, group, axis=1, keepdims=False)


def put(x: Array, part: Array, group: Array | None, groups: int) -> Array:
    """`x` with these blocks where `take` has them from."""
    if group is None:
        return part
    parts = x.reshape(-1, groups, *x.shape[1:])
    return jax.lax.dynamic_update_index_in_dim(parts, part, group, axis=1).reshape(x.shape)


def check(block: int, every: int, groups: int, stats_dtype: Any) -> list[tuple[str, str]]:
    """(option, what is wrong with it and what to do) for each that cannot be."""
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
    """The state of an optimizer that works on stacks.

    Attributes:
      step: updates so far, by which averages of gradients and squares are corrected.
      age: of them, those that statistics of blocks are made of: fewer where another optimizer
        made the first ones.
      mu, nu: averages of the parameters that are not matrices.
      stacks: whatever the optimizer keeps of its blocks, each array with the blocks as its
        first axis.
      health: what has happened since the start.
    """

    step: Int[Array, '']
    age: Int[Array, '']
    mu: Any
    nu: Any
    stacks: Stacks
    health: HealthStats


def nothing() -> HealthStats:
    """What an optimizer of stacks tells of a step, or in `State.health` of all, at first.

    computed, refused    roots or bases that were made, and of them those not good enough
    restarted            statistics that were of no use and have started again
    ignored              gradients, of a block or a parameter, that were not finite
    error                the largest of the roots or bases; of all steps, that of the last
    """
    counts = ('computed', 'refused', 'restarted', 'ignored')
    zeros = {name: jnp.zeros((), jnp.int32) for name in counts}
    return {**zeros, 'error': jnp.zeros((), jnp.float32)}


def padded_length(stack: BlockStack, unit: int) -> int:
    """Blocks of a stack, with those of zeros that make it divide by `unit`."""
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
    """An optimizer of stacks of blocks, and Adam for what is not a matrix.

    Args:
      empty: the first state of a stack, of so many blocks with those of zeros.
      advance: (gradients of all stacks, their states, step, age) -> (directions, states, what
        has happened, as `nothing` has it). Called on each device with that device's blocks.
      groups: each device has a multiple of so many blocks of a stack.
      mesh: over all of whose axes blocks are spread; None computes on one device.
      gather_dtype: type in which directions travel between devices.
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
            health=nothing(),
        )

    def update(updates: Any, state: State, params: Any = None) -> tuple[Any, State]:
        del params
        flat = trees.flatten(updates)
        cuts = plan({name: x.shape for name, x in flat.items()}, block, matrix)
        step, age = state.step + 1, state.age + 1
        directions, stacks, told = advance_all(
            advance,
            cut_all(cuts, flat, unit, mesh, o.dtype),
            state.stacks,
            (step, age),
            mesh,
            gather_dtype,
        )
        made = join(cuts, directions, flat)
        mu, nu = trees.flatten(state.mu), trees.flatten(state.nu)
        for name in mu:
            g = flat[name].astype(o.dtype)
            usable = jnp.isfinite(jnp.square(g).sum())
            average, new_mu, new_nu = moments(o, g, mu[name], nu[name], step)
            direction = jnp.where(usable, adam(o, average, new_nu, step), 0)
            made[name] = direction.astype(flat[name].dtype)
            mu[name] = jnp.where(usable, new_mu, mu[name])
            nu[name] = jnp.where(usable, new_nu, nu[name])
            told['ignored'] += ~usable
        added = {
            name: told[name] if name == 'error' else old + told[name].astype(old.dtype)
            for name, old in state.health.items()
        }
        new = State(step, age, trees.unflatten(mu), trees.unflatten(nu), stacks, added)
        return trees.map_with_name(lambda name, _: made[name], updates), new

    return optax.GradientTransformation(init, update)


def cut_all(
    cuts: Plan, arrays: Mapping[str, Array], unit: int, mesh: Mesh | None, dtype: Any
) -> dict[str, Float[Array, 'blocks r c']]:
    """`cut`, with blocks of zeros up to a multiple of `unit`."""
    whole = {name: arrays[name].astype(dtype) for name in cuts.cuts}
    if mesh is not None and whole:
        # Whole on each device first, of which it takes its blocks without asking others.
        # Spread at once, each block would travel by itself.
        whole = jax.lax.with_sharding_constraint(whole, NamedSharding(mesh, PartitionSpec()))
    stacks = {
        name: jnp.pad(x, ((0, padded_length(cuts.stacks[name], unit) - x.shape[0]), (0, 0), (0, 0)))
        for name, x in cut(cuts, whole).items()
    }
    if mesh is not None and stacks:
        # Stacks too, or the partitioner pads parts and sends what then lies elsewhere.
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
    """`advance` on each device with its own blocks; directions and what is told of all.

    Args:
      now: further arguments of `advance`, such as the step.
    """
    if not grads:
        return {}, stacks, nothing()
    if mesh is None:
        return advance(grads, stacks, *now)
    axes = mesh.axis_names

    def local(grads: Any, stacks: Any, now: Any) -> Any:
        directions, stacks, told = advance(grads, stacks, *now)
        # Each stack as it is: what is flattened to travel costs more to put back than to send.
        gathered = {
            name: jax.lax.all_gather(x.astype(gather_dtype), axes, tiled=True)
            for name, x in directions.items()
        }
        error = jax.lax.pmax(told.pop('error'), axes)
        return gathered, stacks, {**jax.lax.psum(told, axes), 'error': error}

    split, same = PartitionSpec(axes), PartitionSpec()
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(split, split, same),
        out_specs=(same, split, same),
        check_vma=False,
    )(grads, stacks, now)
