"""The share of a training split that is held out to choose settings on, instead of the test split.

Used by linear_probe.py and linear_grid.py.
"""

import numpy as np
from jaxtyping import Int

from big_vit.errors import UserError


def check(examples: int, share: float, key: str) -> None:
    """Check that both the held-out part and the rest have examples.

    Raises:
      UserError: one of them is empty.
    """
    count = round(examples * share)
    if not 0 < count < examples:
        raise UserError(
            f'config: {key}.held_out={share:g} of {examples} training examples are {count}: there '
            'must be some on both sides'
        )


def split(
    examples: int, share: float, seed: int
) -> tuple[Int[np.ndarray, ' rest'], Int[np.ndarray, ' held']]:
    """Draw (indices to learn from, indices to choose on), which depend on the seed alone."""
    order = np.random.default_rng(seed).permutation(examples)
    count = round(examples * share)
    return np.sort(order[count:]), np.sort(order[:count])
