"""k nearest neighbours, searched exactly, with the gallery split over all devices.

Each device goes through its part of the gallery in blocks of a fixed size and keeps its best k;
then those of all devices are merged. Blocks have the same shape on every mesh, so that products
round alike and one device finds the same neighbours as many. Among equal distances, the first in
the gallery is nearer; among equal votes, the lower class number wins.
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
from big_vit.evaluators.evaluation import Evaluation, Evaluator
from big_vit.evaluators.features import PRECISION, Features, choose_embedding
from big_vit.evaluators.requirements import requires
from big_vit.evaluators.two_splits import check_classes, compare_splits

# Rows of the gallery, and queries, that are compared at a time.
_BLOCK, _QUERIES = 1024, 256

Queries = Float32[np.ndarray, 'queries width']
Gallery = Float32[np.ndarray, 'gallery width']


@requires(
    'features', reference='train_split', scores=lambda k, **_: tuple(f'{count}nn' for count in k)
)
def knn(
    evaluation: Evaluation,
    *,
    train_split: str | None = None,
    blocks: tuple[int, ...] | None = None,
    pool: str | None = None,
    k: tuple[int, ...] = (10, 20),
    metric: str = 'cosine',
    vote: str | None = None,
    temperature: float | None = None,
) -> Evaluator:
    """Score the votes of the nearest examples of a training split.

    Args:
      train_split: the split of `evaluation.reference`.
      blocks, pool: the features, as for `choose_embedding`.
      k: numbers of neighbours.
      metric: 'cosine' or 'euclidean'.
      vote: 'temperature' or 'uniform'; by default the former for cosines, else the latter.
      temperature: of the votes; 0.07 by default.

    Raises:
      UserError: fewer examples than neighbours, or options that exclude each other.
    """
    key = evaluation.key
    embedding = choose_embedding(evaluation.model, blocks, pool, key)

    def check(labels: np.ndarray) -> None:
        check_options(len(labels), key, k=k, metric=metric, vote=vote, temperature=temperature)
        check_classes(labels, key)

    score = functools.partial(
        scores, mesh=evaluation.mesh, k=k, metric=metric, vote=vote, temperature=temperature
    )
    return compare_splits(evaluation, embedding, score, check)


def unit(values: Queries) -> Queries:
    """Scale vectors to length 1; zeros stay zeros."""
    wide = values.astype(np.float64)
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    return (wide / np.where(length > 0, length, 1)).astype(np.float32)


@functools.cache
def _search(mesh: Mesh, k: int, blocks: int):
    """Jit the search of (queries, gallery, offsets, indices), `blocks` blocks on each device."""
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
        nearness, at = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(PartitionSpec(), ways, ways, ways),
            out_specs=(every, every),
        )(queries, gallery, offset, index)
        return best(nearness, at)

    return jax.jit(search, out_shardings=sharding.replicated(mesh))


def neighbours(
    queries: Queries, gallery: Gallery, k: int, mesh: Mesh, metric: str = 'cosine'
) -> tuple[Float64[np.ndarray, 'queries k'], Int32[np.ndarray, 'queries k']]:
    """Find the k nearest of each query: (distances, indices in the gallery), the nearest first.

    Distances are 1 - cosine, or Euclidean. Results are the same on all hosts.
    """
    if metric == 'cosine':
        queries, gallery = unit(queries), unit(gallery)
        offset = np.zeros(len(gallery), np.float32)
    else:
        # |q - g|^2 = |q|^2 - 2 (q.g - |g|^2 / 2), from any origin; the mean is the most accurate.
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
    search, parts = _search(mesh, k, blocks), []
    for start in range(0, len(queries), _QUERIES):
        rows = queries[start : start + _QUERIES]
        padded = np.pad(rows, ((0, _QUERIES - len(rows)), (0, 0)))
        nearness, at = search(sharding.place(padded, sharding.replicated(mesh)), *placed)
        parts.append(tuple(x[: len(rows)] for x in jax.device_get((nearness, at))))
    nearness, at = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
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
    """Sum the weights of each query's neighbours by class.

    Args:
      labels: of the neighbours.
      temperature: weights are exp(cosine / temperature), as in DINO (arXiv 2104.14294); None
        gives every neighbour one vote.
    """
    weights = np.ones(distance.shape)
    if temperature is not None:
        # Relative to the nearest: a common factor changes no winner, and no weight underflows.
        weights = np.exp((distance[:, :1] - distance) / temperature)
    total = np.zeros((len(labels), classes))
    np.add.at(total, (np.arange(len(labels))[:, None], labels), weights)
    return total


def check_options(
    length: int,
    key: str,
    *,
    k: tuple[int, ...],
    metric: str,
    vote: str | None,
    temperature: float | None,
) -> None:
    """Check the options against each other and the number of examples to search.

    Raises:
      UserError: fewer examples than neighbours, or a vote that the metric does not allow.
    """
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
    k: tuple[int, ...],
    metric: str,
    vote: str | None,
    temperature: float | None,
) -> dict[str, float]:
    """Compute {'10nn': accuracy, ..., 'count'}; options are those of `knn`."""
    distance, at = neighbours(test.values, train.values, max(k), mesh, metric)
    vote = vote or ('temperature' if metric == 'cosine' else 'uniform')
    chosen = None if vote == 'uniform' else temperature or 0.07
    classes, accuracies = int(train.labels.max()) + 1, {}
    for count in k:
        right = 0
        for start in range(0, len(at), _QUERIES):
            rows = slice(start, start + _QUERIES)
            near, near_labels = distance[rows, :count], train.labels[at[rows, :count]]
            answers = votes(near, near_labels, classes, chosen).argmax(axis=1)
            right += int((answers == test.labels[rows]).sum())
        accuracies[f'{count}nn'] = right / len(at)
    return {**accuracies, 'count': float(len(at))}
