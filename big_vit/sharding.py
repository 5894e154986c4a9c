"""The mesh, and the one table that says how every array lies on it."""

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from big_vit import trees
from big_vit.errors import UserError

AXES = ('replica', 'fsdp', 'tensor')
BATCH = PartitionSpec(('replica', 'fsdp'))

# (regex that the end of a path must match, mesh axis of each trailing dimension).
# Dimensions in front of those named, such as that of scanned layers, are not split.
# Optimizer state and averages follow their parameter: their paths end like its path.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r'(query|key|value)/kernel', ('fsdp', 'tensor', None)),
    (r'(query|key|value)/bias', ('tensor', None)),
    (r'out/kernel', ('tensor', None, 'fsdp')),
    (r'Dense_0/kernel', ('fsdp', 'tensor')),
    (r'Dense_0/bias', ('tensor',)),
    (r'Dense_1/kernel', ('tensor', 'fsdp')),
    (r'embedding/kernel', (None, None, None, 'fsdp')),
    (r'head/kernel', ('fsdp', 'tensor')),
    (r'.*', ()),
)


def make_mesh(
    replica: int = 1, fsdp: int = -1, tensor: int = 1, devices: list[jax.Device] | None = None
) -> Mesh:
    """A (replica, fsdp, tensor) mesh over all devices; one size may be -1, "the rest".

    Raises:
      UserError: the sizes do not multiply to the number of devices.
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
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
    )


def spec_for(
    name: str, shape: tuple[int, ...], mesh: Mesh, min_shard_size: int = 0
) -> PartitionSpec:
    """Where the array at this path lies.

    A mesh axis that does not divide its dimension moves to the largest free
    dimension that it divides, else it is dropped; an array of fewer than
    `min_shard_size` scalars is not split at all.
    """
    if math.prod(shape) < min_shard_size:
        return PartitionSpec()
    trailing = next(axes for pattern, axes in RULES if re.search(f'(^|/)({pattern})$', name))
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
    """A NamedSharding for each leaf (an array or ShapeDtypeStruct) of a state."""
    return trees.map_with_name(
        lambda name, leaf: NamedSharding(mesh, spec_for(name, leaf.shape, mesh, min_shard_size)),
        tree,
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples over every axis but `tensor`."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def check_batch(batch_size: int, mesh: Mesh, key: str, accumulation: int = 1) -> None:
    """Raises UserError unless every device gets the same number of examples of a microbatch."""
    ways = mesh.shape['replica'] * mesh.shape['fsdp']
    if batch_size % (ways * accumulation):
        unit = ways * accumulation
        near = max(round(batch_size / unit), 1) * unit
        parts = f'{ways} devices (mesh.replica x mesh.fsdp)'
        if accumulation > 1:
            parts += f' x accumulation={accumulation}'
        raise UserError(f'config: {key}={batch_size} is not divisible by {parts}; try {near}')


def constrain_batch(mesh: Mesh):
    """A function that pins the first axis of an activation to the batch axes of the mesh."""
    sharding = batch_sharding(mesh)
    return lambda x: jax.lax.with_sharding_constraint(x, sharding)


def gather_weights(mesh: Mesh, min_shard_size: int = 0):
    """A function (name, product, x, kernel) -> product(x, whole kernel) for models.

    Each device multiplies its examples with the kernel, brought together along `fsdp`
    just before. Left to itself the partitioner multiplies part by part in a loop. The
    gradient is summed by a reduce-scatter along `fsdp`; what is left of it, over replicas.
    """
    batch = ('replica', 'fsdp')
    ways = mesh.shape['replica'] * mesh.shape['fsdp']

    def gather(name: str, product: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
        spec = spec_for(name, kernel.shape, mesh, min_shard_size)
        # A model is initialised with a single example, which no mesh can split.
        if 'fsdp' not in spec or mesh.shape['fsdp'] == 1 or x.shape[0] % ways:
            return product(x, kernel)
        axis = spec.index('fsdp')
        part = PartitionSpec(*(None,) * axis, 'fsdp')

        def local(x: jax.Array, kernel: jax.Array) -> jax.Array:
            kernel = jax.lax.pcast(kernel, ('replica',), to='varying')
            return product(x, jax.lax.all_gather(kernel, 'fsdp', axis=axis, tiled=True))

        # The axes that are not named, `tensor`, stay with the partitioner.
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(BATCH, part),
            out_specs=BATCH,
            axis_names=set(batch),
        )(x, kernel)

    return gather


def device_bytes(tree: Any, shardings: Any) -> int:
    """Bytes that the tree takes on one device."""
    return sum(
        int(np.prod(sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    )
