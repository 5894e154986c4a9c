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
from jaxtyping import Array, Float, Int

from big_vit import trees
from big_vit.optim import matrices

MatrixOf = Callable[[str, int], matrices.Matrix | None]
Stacks = dict[str, Any]
Told = dict[str, Array]


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


class Stack(NamedTuple):
    """The size of the blocks of a stack, and how many there are."""

    rows: int
    columns: int
    blocks: int


class Plan(NamedTuple):
    """A function of names and shapes alone; parameters in no cut are not matrices."""

    cuts: dict[str, Cut]
    stacks: dict[str, Stack]


def _rounded(size: int) -> int:
    """So that sizes that are nearly the same become the same."""
    return size if size <= 64 else -(-size // 64) * 64


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
    sizes: dict[str, tuple[int, int]] = {}
    views: dict[str, tuple[int, int, int]] = {}
    for name in sorted(shapes, key=_order):
        shape, found = shapes[name], matrix(name, len(shapes[name]))
        if found is None:
            continue
        middle = found.stack + found.inputs
        layers = math.prod(shape[: found.stack])
        rows, columns = math.prod(shape[found.stack : middle]), math.prod(shape[middle:])
        if layers and min(rows, columns) > 1:  # A single row is a vector.
            parts = (-(-side // -(-side // block)) for side in (rows, columns))
            small, large = sorted(map(_rounded, parts))
            views[name], sizes[name] = (layers, rows, columns), (small, large)
    counts: dict[tuple[int, int], int] = {}
    for name, (layers, rows, columns) in views.items():
        blocks = layers * -(-rows // block) * -(-columns // block)
        counts[sizes[name]] = counts.get(sizes[name], 0) + blocks
    joined = _join_rare(counts)
    cuts: dict[str, Cut] = {}
    stacks: dict[str, Stack] = {}
    for name, (layers, rows, columns) in views.items():
        size = joined[sizes[name]]
        key = f'{size[0]}x{size[1]}'
        first = stacks[key].blocks if key in stacks else 0
        down, across = -(-rows // block), -(-columns // block)
        flipped = -(-rows // down) > -(-columns // across)
        cuts[name] = Cut(layers, rows, columns, down, across, flipped, key, first)
        stacks[key] = Stack(*size, first + cuts[name].blocks)
    return Plan(cuts, stacks)


def _join_rare(counts: dict[tuple[int, int], int]) -> dict[tuple[int, int], tuple[int, int]]:
    """A size of which there are few becomes a larger one that there is anyway.

    On many devices a stack of one block would take as long as one of a block for each.
    """
    total, joined = sum(counts.values()), {}
    for size, count in counts.items():
        larger = [
            other
            for other in counts
            if other != size
            and other[0] >= size[0]
            and other[1] >= size[1]
            and counts[other] > count
            and math.prod(other) <= 2 * math.prod(size)
        ]
        rare = 16 * count <= total
        joined[size] = min(larger, key=math.prod) if rare and larger else size
    # What a rare size became may be rare itself; each time there are more of it.
    while any(joined[size] != joined[joined[size]] for size in joined):
        joined = {size: joined[joined[size]] for size in joined}
    return joined


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
    plan: Plan, stacks: Mapping[str, Float[Array, 'blocks r c']], like: Mapping[str, Array]
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
        arrays[name] = x.reshape(like[name].shape).astype(like[name].dtype)
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


class State(NamedTuple):
    """The state of an optimizer that works on stacks.

    Attributes:
      step: updates so far.
      mu, nu: averages of the parameters that are not matrices.
      stacks: whatever the optimizer keeps of its blocks, each array with the blocks as its
        first axis.
      health: what has happened since the start.
    """

    step: Int[Array, '']
    mu: Any
    nu: Any
    stacks: Stacks
    health: Told


def padded_length(stack: Stack, unit: int) -> int:
    """Blocks of a stack, with those of zeros that make it divide by `unit`."""
    return -(-stack.blocks // unit) * unit


def transformation(
    o: Adam,
    empty: Callable[[Stack, int], Any],
    advance: Callable[[dict[str, Array], Stacks, Array], tuple[dict[str, Array], Stacks, Told]],
    health: Told,
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
      advance: (gradients of all stacks, their states, step) -> (directions, states, what has
        happened). Called on each device with that device's blocks.
      health: zeros of what `advance` tells; added up, but for `error`, of which the largest
        counts. Besides, `ignored` counts gradients that were not finite.
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
            mu=trees.unflatten({n: jnp.zeros(x.shape, o.mu_dtype) for n, x in rest.items()}),
            nu=trees.unflatten({n: jnp.zeros(x.shape, o.dtype) for n, x in rest.items()}),
            stacks=stacks,
            health=jax.tree.map(jnp.copy, health),
        )

    def update(updates: Any, state: State, params: Any = None) -> tuple[Any, State]:
        del params
        flat = trees.flatten(updates)
        cuts = plan({name: x.shape for name, x in flat.items()}, block, matrix)
        step = state.step + 1
        directions, stacks, told = _advance_all(
            advance,
            cut_all(cuts, flat, unit, mesh, o.dtype),
            state.stacks,
            step,
            mesh,
            gather_dtype,
            health,
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
        new = State(step, trees.unflatten(mu), trees.unflatten(nu), stacks, added)
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


def _advance_all(
    advance: Any,
    grads: dict[str, Array],
    stacks: Stacks,
    step: Int[Array, ''],
    mesh: Mesh | None,
    gather_dtype: Any,
    nothing: Told,
) -> tuple[dict[str, Array], Stacks, Told]:
    """`advance` on each device with its own blocks; directions and what is told of all."""
    if not grads:
        return {}, stacks, dict(nothing)
    if mesh is None:
        return advance(grads, stacks, step)
    axes = mesh.axis_names

    def local(grads: Any, stacks: Any, step: Any) -> Any:
        directions, stacks, told = advance(grads, stacks, step)
        # In one array, so that all travel at once.
        flat = [x.reshape(-1).astype(gather_dtype) for x in directions.values()]
        sent = jax.lax.all_gather(jnp.concatenate(flat), axes)
        start, parts = 0, {}
        for name, x in directions.items():
            part = sent[:, start : start + x.size].astype(x.dtype)
            parts[name] = part.reshape(-1, *x.shape[1:])
            start += x.size
        names = sorted(told)
        numbers = jnp.stack([told[name].astype(jnp.float32) for name in names])
        columns = zip(names, jax.lax.all_gather(numbers, axes).T, strict=True)
        told = {name: x.max() if name == 'error' else x.sum() for name, x in columns}
        return parts, stacks, told

    split, same = PartitionSpec(axes), PartitionSpec()
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(split, split, same),
        out_specs=(same, split, same),
        check_vma=False,
    )(grads, stacks, step)
