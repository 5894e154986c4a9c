"""The part of a training split that settings are chosen on, so that no test example chooses."""

import numpy as np
from jaxtyping import Int

from big_vit.errors import UserError


def check(examples: int, share: float, key: str) -> None:
    """Raises UserError where the held-out part, or what is left, has no example."""
    count = round(examples * share)
    if not 0 < count < examples:
        raise UserError(
            f'config: {key}.held_out={share:g} of {examples} training examples are {count}: there '
            'must be some on both sides'
        )


def split(
    examples: int, share: float, seed: int
) -> tuple[Int[np.ndarray, ' rest'], Int[np.ndarray, ' held']]:
    """(indices to learn from, indices to choose on), drawn by the seed alone."""
    order = np.random.default_rng(seed).permutation(examples)
    count = round(examples * share)
    return np.sort(order[count:]), np.sort(order[:count])
