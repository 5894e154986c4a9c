"""Recall at k and mean average precision between two sets of embeddings, both ways.

Two embeddings match if their labels are equal. The gallery is ranked by the cosine, the most
similar first; ties keep the order of the split. Queries without any match do not count. Queries are
spread over all devices in blocks of a fixed size, so that every mesh gives the same ranks.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float32, Float64, Int

from big_vit import sharding
from big_vit.errors import UserError
from big_vit.evaluators.evaluation import Evaluation, Evaluator
from big_vit.evaluators.features import PRECISION, Features, choose_embedding
from big_vit.evaluators.knn import unit
from big_vit.evaluators.requirements import requires
from big_vit.evaluators.two_splits import compare_splits

_QUERIES = 32


def names(ranks: tuple[int, ...], **_: Any) -> tuple[str, ...]:
    """Return the names of the scores of one way."""
    return *(f'recall@{k}' for k in ranks), 'map'


@requires('features', reference='gallery_split', scores=names)
def retrieval(
    evaluation: Evaluation,
    *,
    gallery_split: str | None = None,
    blocks: tuple[int, ...] | None = None,
    pool: str | None = None,
    ranks: tuple[int, ...] = (1, 5, 10),
) -> Evaluator:
    """Score how well examples of the split find those of the gallery with the same label.

    Args:
      gallery_split: the split of `evaluation.reference`.
      blocks, pool: the features, as for `choose_embedding`.
      ranks: every k of the recalls at k.

    Raises:
      UserError: `blocks` or `pool` do not fit the model.
    """
    assert evaluation.reference is not None
    embedding = choose_embedding(evaluation.model, blocks, pool, evaluation.key)
    same = evaluation.split.identity == evaluation.reference.identity
    mesh = evaluation.mesh
    return compare_splits(
        evaluation, embedding, functools.partial(scores, mesh=mesh, ranks=ranks, same=same)
    )


@functools.cache
def _rank(mesh: Mesh, blocks: int):
    """Jit the ranking of (queries, their labels, their places in the gallery, gallery, labels)."""
    ways = PartitionSpec(sharding.AXES)

    def local(queries: Array, labels: Array, own: Array, gallery: Array, keys: Array):
        def one(block: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            rows, wanted, places = block
            near = jnp.matmul(rows, gallery.T, precision=PRECISION)
            itself = places[:, None] == jnp.arange(len(gallery))[None]
            order = jnp.argsort(jnp.where(itself, -jnp.inf, near), axis=1, descending=True)
            match = (wanted[:, None] == keys[None]) & ~itself
            hit = jnp.take_along_axis(match, order, axis=1)
            rank = jnp.arange(1, len(gallery) + 1)[None]
            precision = jnp.cumsum(hit, axis=1) / rank
            count = hit.sum(1)
            average = jnp.where(hit, precision, 0).sum(1) / jnp.maximum(count, 1)
            return jnp.argmax(hit, axis=1), average, count

        split = (x.reshape(blocks, -1, *x.shape[1:]) for x in (queries, labels, own))
        return jax.tree.map(lambda x: x.reshape(-1), jax.lax.map(one, tuple(split)))

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(ways, ways, ways, PartitionSpec(), PartitionSpec()),
        out_specs=(ways, ways, ways),
    )
    return jax.jit(mapped, out_shardings=sharding.replicated(mesh))


def ranks(
    queries: Float32[np.ndarray, 'queries width'],
    labels: Int[np.ndarray, ' queries'],
    gallery: Float32[np.ndarray, 'gallery width'],
    keys: Int[np.ndarray, ' gallery'],
    mesh: Mesh,
    *,
    same: bool = False,
) -> tuple[
    Int[np.ndarray, ' queries'], Float64[np.ndarray, ' queries'], Int[np.ndarray, ' queries']
]:
    """Rank the gallery for each query.

    Args:
      keys: the labels of the gallery.
      same: whether both are the same examples, which then do not match themselves.

    Returns:
      For each query the rank of its first match (from 0), its average precision, and its number of
      matches. If that is 0, the first two mean nothing.
    """
    queries, gallery = unit(queries), unit(gallery)
    blocks = max(1, math.ceil(len(queries) / (_QUERIES * mesh.size)))
    padding = blocks * _QUERIES * mesh.size - len(queries)
    own = np.arange(len(queries)) if same else np.full(len(queries), -1)
    split = jax.NamedSharding(mesh, PartitionSpec(sharding.AXES))
    whole = sharding.replicated(mesh)
    columns = (
        np.pad(queries, ((0, padding), (0, 0))),
        np.pad(labels.astype(np.int32), (0, padding)),
        np.pad(own.astype(np.int32), (0, padding)),
    )
    first, average, count = jax.device_get(
        _rank(mesh, blocks)(
            *(sharding.place(column, split) for column in columns),
            sharding.place(gallery, whole),
            sharding.place(keys.astype(np.int32), whole),
        )
    )
    real = slice(0, len(queries))
    return first[real], average[real].astype(np.float64), count[real]


def one_way(
    queries: Features,
    gallery: Features,
    mesh: Mesh,
    wanted: tuple[int, ...],
    *,
    same: bool = False,
) -> dict[str, float]:
    """Compute {'recall@1': share of queries with a match ranked first, ..., 'map', 'count'}.

    Args:
      wanted: every k of the recalls at k.
      same: as for `ranks`.

    Raises:
      UserError: no query has a match.
    """
    first, average, count = ranks(
        queries.values, queries.labels, gallery.values, gallery.labels, mesh, same=same
    )
    matched = count > 0
    if not matched.any():
        raise UserError(
            'retrieval: no example of one split has a label of the other, so nothing matches; set '
            'split and gallery_split to splits that share labels'
        )
    recalls = {f'recall@{k}': float((first[matched] < k).mean()) for k in wanted}
    return {**recalls, 'map': float(average[matched].mean()), 'count': float(matched.sum())}


def scores(
    gallery: Features,
    queries: Features,
    *,
    mesh: Mesh,
    ranks: tuple[int, ...],
    same: bool = False,
) -> dict[str, float]:
    """Compute `one_way`, and with 'back/' the other way, unless both are the same split."""
    there = one_way(queries, gallery, mesh, ranks, same=same)
    if same:
        return there
    back = one_way(gallery, queries, mesh, ranks)
    return {**there, **{f'back/{name}': value for name, value in back.items()}}
