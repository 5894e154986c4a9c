"""The device mesh, and the one table that decides how every array is sharded over it."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from big_vit import trees
from big_vit.errors import UserError

AXES = ('replica', 'fsdp', 'tensor')
BATCH = PartitionSpec(('replica', 'fsdp'))

# Block state of optimizers (optim/blocks.py): the first axis is sharded over all devices.
STACKS = re.compile(r'(^|/)stacks/\d+x\d+/')

# Row and column vectors of a factored second moment: other axes than the parameter, and small.
FACTORED = re.compile(r'(^|/)v_(row|col)/')

# Arrays of fewer scalars never count against `mesh.max_replicated`, whatever the config says.
SMALL = 2**16

# (regex that the end of a path must match, mesh axis of each trailing dimension).
# Dimensions before the named ones, such as that of scanned layers, are not sharded.
# Optimizer state and averages follow their parameter, because their paths end like its path.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r'(query|key|value)/kernel', ('fsdp', 'tensor', None)),
    (r'(query|key|value)/bias', ('tensor', None)),
    (r'out/kernel', ('tensor', None, 'fsdp')),
    (r'Dense_(0|gate)/kernel', ('fsdp', 'tensor')),
    (r'Dense_(0|gate)/bias', ('tensor',)),
    (r'Dense_1/kernel', ('tensor', 'fsdp')),
    # Patches, tubelets and convolutions: [..., in, out].
    (r'(embedding|projection|conv\w*)/kernel', (None, None, None, 'fsdp')),
    (r'word_embedding', (None, 'fsdp')),
    (r'pos_embedding', (None, None, 'fsdp')),
    (r'(head|head_dist|pre_logits)/kernel', ('fsdp', 'tensor')),
    # Heads of self-distillation: their logits are split by prototypes over `tensor`.
    (r'mlp_0/kernel', ('fsdp', 'tensor')),
    (r'mlp_0/bias', ('tensor',)),
    (r'mlp_1/kernel', ('tensor', 'fsdp')),
    (r'mlp_2/kernel', ('fsdp', None)),
    (r'prototypes/kernel', ('fsdp', 'tensor')),
    (r'prototypes/scale', ('tensor',)),
    (r'.*', ()),
)
# On a mesh without a `tensor` axis these take precedence. They keep gathered weights and summed
# gradients in the layout in which matrix products consume and produce them; sharding over the
# inputs instead costs a transpose (docs/performance.md).
WITHOUT_TENSOR: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r'(query|key|value)/kernel', (None, 'fsdp', None)),
    (r'out/kernel', ('fsdp', None, None)),
    (r'Dense_1/kernel', ('fsdp', None)),
    (r'mlp_1/kernel', ('fsdp', None)),
    # Their norms are then local.
    (r'prototypes/kernel', (None, 'fsdp')),
)


def make_mesh(
    replica: int = 1, fsdp: int = -1, tensor: int = 1, devices: list[jax.Device] | None = None
) -> Mesh:
    """Builds a (replica, fsdp, tensor) mesh; one size may be -1 for "all remaining devices".

    Neighbours on the mesh are neighbours on the chips' own interconnect. With several TPU
    slices, the copies of `replica` go to different slices before anything else does, so that
    only gradients cross the data-centre network.

    Args:
      replica: number of copies of the parameters.
      fsdp: number of devices that parameters are sharded over.
      tensor: number of devices that heads and MLPs are split over.
      devices: all devices of this run by default; those of a topology when planning.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or an axis other than
        `replica` would have to span slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {'replica': replica, 'fsdp': fsdp, 'tensor': tensor}
    unknown = [name for name, size in sizes.items() if size == -1]
    given = math.prod(size for size in sizes.values() if size != -1)
    shown = ', '.join(f'mesh.{name}={size}' for name, size in sizes.items())
    if len(unknown) > 1 or min(sizes.values()) < -1 or given < 1:
        raise UserError(f'config: {shown}: sizes must be positive, and at most one may be -1')
    if unknown:
        sizes[unknown[0]] = max(len(devices) // given, 1)
    if math.prod(sizes.values()) != len(devices):
        raise UserError(
            f'config: {shown} does not multiply to the {len(devices)} devices of this run'
        )
    shape = tuple(sizes.values())
    slices = len({getattr(device, 'slice_index', None) for device in devices})
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    elif shape[0] % slices:
        raise UserError(
            f'config: mesh.replica={shape[0]} is not a multiple of the {slices} slices of this '
            f'run: only replica may cross slices; try mesh.replica={slices}'
        )
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            (shape[0] // slices, *shape[1:]),
            (slices, 1, 1),
            devices,
            allow_split_physical_axes=True,
        )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def spec_for(
    name: str, shape: tuple[int, ...], mesh: Mesh, min_shard_size: int = 0
) -> PartitionSpec:
    """Partition spec of the array at a path.

    A mesh axis that does not divide its dimension moves to the largest unsharded one that it
    divides, or is dropped. Arrays of fewer than `min_shard_size` scalars are not sharded.

    Args:
      name: path of the array; its end selects the rule.
      shape: shape of the array.
      mesh: mesh with the axes `AXES`.
      min_shard_size: scalars below which an array stays replicated.
    """
    if STACKS.search(name):
        return PartitionSpec(AXES)
    if FACTORED.search(name) or math.prod(shape) < min_shard_size:
        return PartitionSpec()
    rules = RULES if mesh.shape['tensor'] > 1 else WITHOUT_TENSOR + RULES
    trailing = next(axes for pattern, axes in rules if re.search(f'(^|/)({pattern})$', name))
    if len(trailing) > len(shape):
        return PartitionSpec()
    lead = len(shape) - len(trailing)
    axes: list[str | None] = [*(None for _ in range(lead)), *trailing]
    for i, axis in enumerate(axes.copy()):
        if axis is None or shape[i] % mesh.shape[axis] == 0:
            continue
        axes[i] = None
        free = [j for j in range(lead, len(shape)) if axes[j] is None]
        free = [j for j in free if shape[j] % mesh.shape[axis] == 0]
        if free:
            axes[max(free, key=lambda j: shape[j])] = axis
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def shardings_for(tree: Any, mesh: Mesh, min_shard_size: int = 0) -> Any:
    """NamedShardings of all leaves (arrays or ShapeDtypeStructs) of a state."""
    return trees.map_with_name(
        lambda name, leaf: NamedSharding(mesh, spec_for(name, leaf.shape, mesh, min_shard_size)),
        tree,
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch: examples over every axis but `tensor`."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding that keeps a full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def place(array: np.ndarray, placement: jax.sharding.Sharding) -> jax.Array:
    """Makes a global array from one that every process holds in full; sends nothing."""
    return jax.make_array_from_callback(array.shape, placement, lambda index: array[index])


def check_batch(batch_size: int, mesh: Mesh, key: str, accumulation: int = 1) -> None:
    """Raises UserError unless every device gets equally many examples of each microbatch."""
    ways = mesh.shape['replica'] * mesh.shape['fsdp']
    if batch_size % (ways * accumulation):
        unit = ways * accumulation
        nearest = max(round(batch_size / unit), 1) * unit
        parts = f'{ways} devices (mesh.replica x mesh.fsdp)'
        if accumulation > 1:
            parts += f' x accumulation={accumulation}'
        raise UserError(f'config: {key}={batch_size} is not divisible by {parts}; try {nearest}')


def constrain_batch(mesh: Mesh, sequence: bool = False):
    """Returns a function that pins the residual stream, [batch, tokens, width], to the mesh.

    Args:
      mesh: mesh of the run.
      sequence: also shard tokens over `tensor` between blocks, where it divides them, so that
        norms and saved activations are split as well (sequence parallelism, arXiv 2205.05198).
    """
    ways = mesh.shape['tensor'] if sequence else 1

    def constrain(x: jax.Array) -> jax.Array:
        split = ways > 1 and x.shape[1] % ways == 0
        spec = PartitionSpec(*BATCH, 'tensor') if split else BATCH
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return constrain


def gather_weights(mesh: Mesh, params: Any, min_shard_size: int = 0):
    """Returns a function (path, product, x, kernel) -> product(x, full kernel) for models.

    Each device multiplies its examples with the kernel, gathered along `fsdp` just before. Left
    to itself, the partitioner multiplies shard by shard in a loop. Gradients are reduce-scattered
    along `fsdp`, then summed over replicas.

    Args:
      mesh: mesh of the run.
      params: abstract parameters of the model, sharded by `spec_for`.
      min_shard_size: as for `spec_for`.
    """
    batch = ('replica', 'fsdp')
    ways = mesh.shape['replica'] * mesh.shape['fsdp']
    # A kernel inside the scan has the sharding of its stack without the layer axis.
    shapes = {name: leaf.shape for name, leaf in trees.flatten(params).items()}
    specs = {name: spec_for(name, shapes[name], mesh, min_shard_size) for name in shapes}
    on_cpus = mesh.devices.flat[0].platform == 'cpu'

    def gather(name: str, product: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
        spec = specs[name][len(shapes[name]) - kernel.ndim :]
        # Models are initialized with a single example, which no mesh can split.
        if 'fsdp' not in spec or mesh.shape['fsdp'] == 1 or x.shape[0] % ways:
            return product(x, kernel)
        axis, dtype = spec.index('fsdp'), kernel.dtype
        part = PartitionSpec(*(None,) * axis, 'fsdp')
        if on_cpus and dtype == jnp.bfloat16:
            # XLA for CPUs aborts the process where devices sum gradients of this type.
            kernel = kernel.astype(jnp.float32)

        shape = kernel.shape
        as_matrix = _rows_of(x.ndim, axis, shape)

        def local(x: jax.Array, kernel: jax.Array) -> jax.Array:
            kernel = jax.lax.pcast(kernel, ('replica',), to='varying')
            if as_matrix:
                kernel = kernel.reshape(-1, math.prod(kernel.shape[as_matrix:]))
            along = axis if not as_matrix else int(axis > 0)
            kernel = jax.lax.all_gather(kernel, 'fsdp', axis=along, tiled=True)
            return product(x, kernel.reshape(shape).astype(dtype))

        # Axes that are not named here, i.e. `tensor`, are left to the partitioner.
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(BATCH, part),
            out_specs=BATCH,
            axis_names=set(batch),
        )(x, kernel)

    return gather


def _rows_of(x_axes: int, split: int, shape: tuple[int, ...]) -> int:
    """How many leading axes of a kernel are the rows of a matrix to gather it as; 0 is as it is.

    Whole kernels, and their gradients, are laid out as their shards are. Where heads do not divide,
    the 64 features of a head are an axis of their own there, which TPUs pad to 128.

    Args:
      x_axes: axes of what is multiplied with it; three of tokens, four of tokens by heads.
      split: the axis that is sharded.
    """
    last = len(shape) - 1
    if x_axes == 3 and split == 0 and shape[last] % 128:
        return 1
    of_tokens = x_axes == 3 or x_axes == last + 2 == 4
    return split if of_tokens and split == last > 1 and shape[last - 1] % 128 else 0


def collect_kernel(mesh: Mesh):
    """Returns a function that brings the shards of a matrix along `fsdp` together.

    Its columns stay split over `tensor`, where it divides them, and so do products with it.
    """

    def collect(kernel: jax.Array) -> jax.Array:
        axis = None if kernel.shape[1] % mesh.shape['tensor'] else 'tensor'
        where = NamedSharding(mesh, PartitionSpec(None, axis))
        return jax.lax.with_sharding_constraint(kernel, where)

    return collect


def by_device(mesh: Mesh):
    """Returns what makes a function of rows one that each device applies to its own alone.

    A loop whose length depends on the rows then ends on each device by itself.
    """

    def wrap(function):
        return jax.shard_map(function, mesh=mesh, in_specs=BATCH, out_specs=BATCH, check_vma=False)

    return wrap


def constrain_replicated(mesh: Mesh):
    """Returns a function that keeps an array in full on every device."""
    sharding = replicated(mesh)
    return lambda x: jax.lax.with_sharding_constraint(x, sharding)


def device_bytes(tree: Any, shardings: Any) -> int:
    """Bytes of a tree on one device."""
    return sum(
        int(np.prod(sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    )


def check_spread(tree: Any, shardings: Any, mesh: Mesh, min_shard_size: int, limit: float) -> None:
    """Rejects a state that is mostly replicated although there is an `fsdp` axis.

    Arrays below `SMALL` or `min_shard_size` scalars are replicated on purpose and do not count.

    Args:
      tree: the state, abstract or real.
      shardings: shardings of its leaves.
      mesh: mesh of the run.
      min_shard_size: scalars below which an array stays replicated.
      limit: largest allowed share of bytes in replicated arrays.

    Raises:
      UserError: names the largest replicated array and a size of `fsdp` that would shard it.
    """
    if mesh.shape['fsdp'] == 1:
        return
    leaves, placements = trees.flatten(tree), trees.flatten(shardings)
    replicated_bytes = {
        name: math.prod(leaf.shape) * leaf.dtype.itemsize
        for name, leaf in leaves.items()
        if placements[name].is_fully_replicated
        and math.prod(leaf.shape) >= max(min_shard_size, SMALL)
    }
    share = sum(replicated_bytes.values()) / trees.nbytes(tree)
    if share > limit:
        name, fsdp = (
            max(replicated_bytes, key=lambda name: replicated_bytes[name]),
            mesh.shape['fsdp'],
        )
        shape = leaves[name].shape
        fits = (
            n for n in range(fsdp - 1, 1, -1) if fsdp % n == 0 and any(d % n == 0 for d in shape)
        )
        size = next(fits, 1)
        raise UserError(
            f'config: mesh.fsdp={fsdp} leaves {share:.0%} of the state whole on every device, more '
            f'than mesh.max_replicated={limit:g}: it does not split {name} {tuple(shape)}'
            + (f' and {len(replicated_bytes) - 1} more' if len(replicated_bytes) > 1 else '')
            + f'; try mesh.fsdp={size} and mesh.replica={mesh.shape["replica"] * fsdp // size}'
        )
