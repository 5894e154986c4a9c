"""Bit hashes of arrays, independent of sharding, that reveal damaged checkpoints."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from big_vit import trees

# States of at most this many bytes are hashed on the host: faster than compiling a program.
SMALL_STATE = 8 << 20


def _hash_bits(bits: Any, index: Any, xp: Any) -> Any:
    """Two 32-bit sums over mixed (bits, position); changing any one value changes both.

    The multipliers are those of common integer hashes; `| 1` makes each weight odd, thus
    invertible modulo 2^32, so no change of a value can cancel. Zero bits add nothing.
    """
    totals = []
    for a, b in ((0x9E3779B1, 0x85EBCA77), (0xC2B2AE3D, 0x27D4EB2F)):
        weight = (index + xp.uint32(b)) * xp.uint32(a)
        weight = (weight ^ (weight >> xp.uint32(15))) * xp.uint32(0x2C1B3C6D)
        weight = (weight ^ (weight >> xp.uint32(13))) | xp.uint32(1)
        totals.append((bits * weight).sum(dtype=xp.uint32))
    return xp.stack(totals)


def _hash_device(leaf: jax.Array) -> jax.Array:
    """Hashes a leaf where it lies; integer sums do not depend on their order."""
    width = leaf.dtype.itemsize * 8
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f'uint{width}')).astype(jnp.uint32)
    index, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    for axis in reversed(range(leaf.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        index += along * jnp.uint32(stride % 2**32)
        stride *= leaf.shape[axis]
    return _hash_bits(bits, index, jnp)


def hash_array(array: np.ndarray) -> str:
    """Hashes one leaf on the host; equal to the hash computed on devices when saving."""
    bits = np.ascontiguousarray(array).view(f'uint{array.dtype.itemsize * 8}')
    bits = bits.reshape(-1).astype(np.uint32)
    index = np.arange(bits.size, dtype=np.uint64).astype(np.uint32)
    with np.errstate(over='ignore'):
        return np.asarray(_hash_bits(bits, index, np)).tobytes().hex()


@functools.cache
def _hash_leaves(mesh: Any) -> Any:
    """Compiled hash of a list of leaves, one per mesh; every process gets the full result."""
    replicated = mesh and jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(
        lambda leaves: jnp.stack([_hash_device(leaf) for leaf in leaves]),
        out_shardings=replicated,
    )


def hashes_of(state: Any) -> dict[str, str]:
    """Hashes of all leaves, as hexadecimal text by path."""
    # Sorted, because Orbax sorts keys: a restored state then needs no second compilation.
    flat = dict(sorted(trees.flatten(state).items()))
    addressable = all(getattr(leaf, 'is_fully_addressable', True) for leaf in flat.values())
    if addressable and sum(leaf.nbytes for leaf in flat.values()) <= SMALL_STATE:
        return {name: hash_array(leaf) for name, leaf in jax.device_get(flat).items()}
    shardings = {getattr(leaf, 'sharding', None) for leaf in flat.values()}
    meshes = {s.mesh for s in shardings if isinstance(s, jax.sharding.NamedSharding)}
    values = jax.device_get(_hash_leaves(meshes.pop() if meshes else None)(list(flat.values())))
    return {name: value.tobytes().hex() for name, value in zip(flat, values, strict=True)}
