"""Whether examples of two streams find each other: recall at k from pictures to words and back.

Every example of the split searches among all of the other stream. Where one stream is words,
examples with the same words match each other, as several captions of one picture would.
"""

import numpy as np
from jax.sharding import Mesh

from big_vit.evaluators import retrieval
from big_vit.evaluators.features import Features


def scores(pairs: Features, mesh: Mesh, ranks: tuple[int, ...]) -> dict[str, float]:
    """{'recall@1', ..., 'map', 'count'} from the first stream to the second; 'back/' is back.

    Args:
      pairs: vectors of both streams, one after the other, and what says which examples match:
        rows [examples, numbers] that are equal where they do.
    """
    same = np.unique(pairs.labels, axis=0, return_inverse=True)[1].reshape(-1)
    first, second = (Features(half, same) for half in np.split(pairs.values, 2, axis=1))
    return retrieval.scores(second, first, mesh=mesh, ranks=ranks)
