"""Affine maps of pixel values, composed into the mean and the standard deviation of a transform.

Fractions keep the composition exact: a transform that ends in normalize(0.485, 0.229) has these
very numbers, whatever range came before it.
"""

import itertools
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

Real = float | int


class Normalisation(NamedTuple):
    """The map (value - mean) / std of pixel values, for all channels or one by one.

    Attributes:
      mean: one number per channel, or one for all; bytes are values from 0 to 255.
      std: likewise; negative where white becomes darker than black.
      applies_to: 'values' of any kind; 'bytes' leaves floats alone; 'nothing' makes a new image, so
        that what was done to values before no longer counts.
    """

    mean: tuple[Fraction, ...]
    std: tuple[Fraction, ...]
    applies_to: Literal['values', 'bytes', 'nothing'] = 'values'


def of_range(low: Real, high: Real, black: Real, white: Real) -> Normalisation:
    """Make the map that takes black to `low` and white to `high`."""
    std = (Fraction(white) - Fraction(black)) / (Fraction(high) - Fraction(low))
    return Normalisation((Fraction(black) - Fraction(low) * std,), (std,))


def of_mean_and_std(
    mean: Sequence[Real], std: Sequence[Real], black: Real = 0, white: Real = 1
) -> Normalisation:
    """Make the map of values, scaled so that black is 0 and white is 1, to (value - mean) / std."""
    first, span = Fraction(black), Fraction(white) - Fraction(black)
    return Normalisation(
        tuple(first + Fraction(m) * span for m in mean), tuple(Fraction(s) * span for s in std)
    )


# Bytes that no operation has made floats of reach the model in -1..1: see `tasks.batch.normalise`.
FROM_BYTES = of_range(-1, 1, 0, 255)._replace(applies_to='bytes')


def mean_and_std(
    steps: Iterable[Normalisation | None], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compose the maps that are applied to images of bytes, one after the other.

    Args:
      steps: one per operation; None for operations that do not normalise, such as flips.
      channels: how often to repeat numbers that are the same for all channels.

    Returns:
      (mean, std) such that a model sees (pixel - mean) / std of pixels in 0..1.
    """
    mean: tuple[Fraction, ...] = (Fraction(0),)
    std: tuple[Fraction, ...] = (Fraction(1, 255),)
    floats = False
    for step in [*steps, FROM_BYTES]:
        if step is None or (step.applies_to == 'bytes' and floats):
            continue
        floats = True
        if step.applies_to == 'nothing':
            mean, std = step.mean, step.std
            continue
        by_channel = _by_channel(mean, std, step.mean, step.std)
        mean = tuple(m + s * step_mean for m, s, step_mean, _ in by_channel)
        std = tuple(s * step_std for _, s, _, step_std in by_channel)
    by_channel = _by_channel(mean, std)
    if len(by_channel) == 1:
        by_channel *= channels
    return tuple(float(m) for m, _ in by_channel), tuple(float(s) for _, s in by_channel)


def _by_channel(*columns: tuple[Fraction, ...]) -> list[tuple[Fraction, ...]]:
    """Zip numbers per channel, repeating those that are the same for all channels."""
    count = max(map(len, columns))
    repeated = [
        itertools.repeat(column[0], count) if len(column) == 1 else column for column in columns
    ]
    return list(zip(*repeated, strict=True))
