"""k nearest neighbours, searched exactly, with the gallery split over all devices.

Each device goes through its part of the gallery in blocks of a fixed size and keeps its best k;
those of all devices are merged. Blocks have the same shape on any mesh, so that products round
alike and one device and many give the same neighbours. Of two at the same distance the one that
comes first in the gallery is nearer; of two classes with the same votes the lower number wins.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Float32, Float64, Int, Int32

from big_vit import sharding
from big_vit.errors import UserError
from big_vit.evaluators.features import PRECISION, Features

# Rows of the gallery, and queries, that are compared at a time.
_BLOCK, _QUERIES = 1024, 256

Queries = Float32[np.ndarray, 'queries width']
Gallery = Float32[np.ndarray, 'gallery width']


def unit(values: Queries) -> Queries:
    """Vectors of length 1; a zero stays one."""
    wide = values.astype(np.float64)
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    return (wide / np.where(length > 0, length, 1)).astype(np.float32)


@functools.cache
def _search(mesh: Mesh, k: int, blocks: int):
    """The jitted search of (queries, gallery, offsets), each device with `blocks` blocks."""
    ways = PartitionSpec(sharding.AXES)

    def best(nearness: Array, index: Array) -> tuple[Array, Array]:
        # The first of equal ones is taken: in the order of the gallery.
        nearness, at = jax.lax.top_k(nearness, k)
        return nearness, jnp.take_along_axis(index, at, axis=1)

    def local(queries: Array, gallery: Array, offset: Array, index: Array):
        def add(kept: tuple[Array, Array], block: tuple[Array, ...]):
            rows, shift, numbers = block
            near = jnp.matmul(queries, rows.T, precision=PRECISION) + shift[None]
            numbers = jnp.broadcast_to(numbers[None], near.shape)
            joined = (
                jnp.concatenate(pair, axis=1) for pair in zip(kept, (near, numbers), strict=True)
            )
            return best(*joined), None

        none = jnp.full((len(queries), k), -jnp.inf), jnp.full((len(queries), k), -1)
        start = jax.tree.map(lambda x: jax.lax.pcast(x, sharding.AXES, to='varying'), none)
        split = (x.reshape(blocks, -1, *x.shape[1:]) for x in (gallery, offset, index))
        return jax.lax.scan(add, start, tuple(split))[0]

    def search(queries: Array, gallery: Array, offset: Array, index: Array):
        every = PartitionSpec(None, sharding.AXES)
        found = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(PartitionSpec(), ways, ways, ways),
            out_specs=(every, every),
        )(queries, gallery, offset, index)
        return best(*found)

    return jax.jit(search, out_shardings=sharding.replicated(mesh))


def neighbours(
    queries: Queries, gallery: Gallery, k: int, mesh: Mesh, metric: str = 'cosine'
) -> tuple[Float64[np.ndarray, 'queries k'], Int32[np.ndarray, 'queries k']]:
    """(distance, index in the gallery) of the k nearest of each query, the nearest first.

    The distance is 1 - cosine, or the Euclidean one. Both are the same arrays on all hosts.
    """
    if metric == 'cosine':
        queries, gallery = unit(queries), unit(gallery)
        offset = np.zeros(len(gallery), np.float32)
    else:
        # |q - g|^2 = |q|^2 - 2 (q.g - |g|^2 / 2), where q and g may be moved: near their mean
        # the least is lost to rounding.
        mean = gallery.mean(axis=0, dtype=np.float64)
        queries, gallery = ((v - mean).astype(np.float32) for v in (queries, gallery))
        offset = (-0.5 * np.square(gallery.astype(np.float64)).sum(axis=1)).astype(np.float32)
    blocks = max(1, math.ceil(len(gallery) / (_BLOCK * mesh.size)))
    padding = blocks * _BLOCK * mesh.size - len(gallery)
    split = jax.NamedSharding(mesh, PartitionSpec(sharding.AXES))
    index = np.arange(len(gallery) + padding, dtype=np.int32)
    placed = (
        sharding.place(np.pad(gallery, ((0, padding), (0, 0))), split),
        sharding.place(np.pad(offset, (0, padding), constant_values=-np.inf), split),
        sharding.place(index, split),
    )
    search, found = _search(mesh, k, blocks), []
    for start in range(0, len(queries), _QUERIES):
        rows = queries[start : start + _QUERIES]
        padded = np.pad(rows, ((0, _QUERIES - len(rows)), (0, 0)))
        nearness, at = search(sharding.place(padded, sharding.replicated(mesh)), *placed)
        found.append(tuple(x[: len(rows)] for x in jax.device_get((nearness, at))))
    nearness, at = (np.concatenate(parts) for parts in zip(*found, strict=True))
    if metric == 'cosine':
        return 1.0 - nearness.astype(np.float64), at
    squares = np.square(queries.astype(np.float64)).sum(axis=1, keepdims=True) - 2.0 * nearness
    return np.sqrt(np.maximum(squares, 0)), at


def votes(
    distance: Float[np.ndarray, 'queries k'],
    labels: Int[np.ndarray, 'queries k'],
    classes: int,
    temperature: float | None,
) -> Float64[np.ndarray, 'queries classes']:
    """The sum of the weights of the neighbours of each class.

    Args:
      labels: of the neighbours.
      temperature: weights are exp(cosine / temperature), as of DINO (arXiv 2104.14294); with
        None each neighbour has one vote.
    """
    weights = np.ones(distance.shape)
    if temperature is not None:
        # Relative to the nearest: a factor that all share changes no winner, and none vanishes.
        weights = np.exp((distance[:, :1] - distance) / temperature)
    found = np.zeros((len(labels), classes))
    np.add.at(found, (np.arange(len(labels))[:, None], labels), weights)
    return found


def check(
    length: int,
    key: str,
    *,
    k: tuple[int, ...],
    metric: str,
    vote: str | None,
    temperature: float | None,
) -> None:
    """Raises UserError where there are fewer examples than neighbours, or a vote has no law."""
    if max(k) > length:
        raise UserError(
            f'config: {key}.k={max(k)} is more than the {length} examples of the training split: '
            f'set k to at most {length}'
        )
    if metric == 'euclidean' and vote == 'temperature':
        raise UserError(
            f"config: {key}.vote='temperature' is of the cosine: set {key}.vote='uniform' or "
            f"{key}.metric='cosine'"
        )
    if temperature is not None and (metric == 'euclidean' or vote == 'uniform'):
        raise UserError(f"config: {key}.temperature is of vote='temperature' alone: remove it")


def scores(
    train: Features,
    test: Features,
    *,
    mesh: Mesh,
    k: tuple[int, ...] = (10, 20),
    metric: str = 'cosine',
    vote: str | None = None,
    temperature: float | None = None,
) -> dict[str, float]:
    """{'10nn': accuracy, ...}."""
    distance, at = neighbours(test.values, train.values, max(k), mesh, metric)
    vote = vote or ('temperature' if metric == 'cosine' else 'uniform')
    warmth = None if vote == 'uniform' else temperature or 0.07
    classes, found = int(train.labels.max()) + 1, {}
    for count in k:
        right = 0
        for start in range(0, len(at), _QUERIES):
            rows = slice(start, start + _QUERIES)
            near, near_labels = distance[rows, :count], train.labels[at[rows, :count]]
            answers = votes(near, near_labels, classes, warmth).argmax(axis=1)
            right += int((answers == test.labels[rows]).sum())
        found[f'{count}nn'] = right / len(at)
    return {**found, 'count': float(len(at))}
