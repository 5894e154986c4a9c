"""Recall from each example of one stream to its partner in the other stream, and back.

Every example of the split searches all of the other stream. If one stream is words, examples with
the same words match each other, like several captions of one picture.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from big_vit.evaluators import retrieval
from big_vit.evaluators.evaluation import Evaluation, Evaluator, SharedFeatures
from big_vit.evaluators.features import Features, stream_vectors
from big_vit.evaluators.requirements import requires
from big_vit.tasks.contrastive import row_hashes


def _names(ranks: tuple[int, ...]) -> tuple[str, ...]:
    there = retrieval.names(ranks)
    return *there, *(f'back/{name}' for name in there)


@requires('pairs', labels='none', all_streams=True, scores=_names)
def matching(evaluation: Evaluation, *, ranks: tuple[int, ...] = (1, 5, 10)) -> Evaluator:
    """Score how well two streams find each other.

    Args:
      ranks: every k of the recalls at k.
    """
    streams = evaluation.model.streams
    words = next((stream.reads for stream in streams if stream.tokenizer == 'words'), None)

    def label(batch: dict[str, jax.Array]) -> jax.Array:
        return batch['mask'] if words is None else row_hashes(batch[words])

    embedding = stream_vectors(evaluation.model, tuple(s.name for s in streams), label)

    def evaluate(params: Any, shared: SharedFeatures) -> dict[str, float]:
        with jax.transfer_guard('allow'):
            pairs = evaluation.compute_features(evaluation.split, embedding, params, shared)
            if words is None:  # Every example matches itself alone.
                pairs = pairs._replace(labels=np.arange(len(pairs.labels))[:, None])
            return scores(pairs, evaluation.mesh, ranks)

    return evaluate


def scores(pairs: Features, mesh: Mesh, ranks: tuple[int, ...]) -> dict[str, float]:
    """Compute {'recall@1', ..., 'map', 'count'} from the first stream to the second, and 'back/'.

    Args:
      pairs: the vectors of both streams, concatenated. Labels are rows [examples, numbers], equal
        for examples that match.
    """
    same = np.unique(pairs.labels, axis=0, return_inverse=True)[1].reshape(-1)
    first, second = (Features(half, same) for half in np.split(pairs.values, 2, axis=1))
    return retrieval.scores(second, first, mesh=mesh, ranks=ranks)
