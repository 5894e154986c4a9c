"""The order of the data, and its randomness, as pure functions of (seed, step).

Owned here rather than borrowed from a data library: which examples batch k holds must
not change when a dependency does, or a resumed run is another run. Counters are hashed
with the finaliser of SplitMix64 (Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195);
there is no generator state anywhere, so nothing needs saving.
"""

import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Float64, Int64, UInt64

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_ROUNDS = 8
# A Feistel network over fewer bits than this is visibly non-uniform, so tiny datasets walk
# inside a larger domain.
_MIN_BITS = 6
# Keeps the keys of the shuffle, the augmentation and the parts of a mixture apart.
_SHUFFLE, _EXAMPLE, _PART = 1, 2, 3
# Positions in which the parts of a mixture come exactly in their shares.
_LEAST_CYCLE, _MOST_CYCLE = 1_000, 10_000


def _mix(x: np.ndarray) -> np.ndarray:
    """Hashes uint64 [...] to uint64 [...], a bijection of 64-bit words; x is left alone."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def _keys(*words: int | np.ndarray) -> np.ndarray:
    """Hashes integers, each a scalar or [N], to uint64 [N] (or [1] if all are scalars)."""
    key = np.zeros(1, np.uint64)
    for word in words:
        if not isinstance(word, np.ndarray):
            word = np.array([int(word) & _MASK], np.uint64)
        key = _mix((key ^ word.astype(np.uint64)) + np.uint64(_GOLDEN))
    return key


def shuffled(
    positions: Int64[np.ndarray, ' n'],
    *,
    length: int,
    seed: int,
    epoch: Int64[np.ndarray, ' n'] | int,
) -> Int64[np.ndarray, ' n']:
    """The permutation of range(length) that belongs to (seed, epoch), at some positions.

    A Feistel network with a keyed hash as its round function permutes the smallest power
    of two that holds `length`; values that fall outside are permuted again until they fall
    inside (cycle walking; Black and Rogaway 2002, doi:10.1007/3-540-45760-7_9). Needs no
    memory beyond the positions asked for.

    Args:
      positions: int64 [N], each in [0, length).
      length: how many examples there are, at least 1.
      seed: any integer.
      epoch: int64 [N], or one integer for all positions.

    Returns:
      int64 [N], each in [0, length); different positions of one epoch give different values.

    Raises:
      ValueError: a position lies outside [0, length).
    """
    if positions.size and not (positions.min() >= 0 and positions.max() < length):
        raise ValueError(f'positions must lie in [0, {length})')
    if length == 1:
        return np.zeros_like(positions)
    bits = max(_MIN_BITS, int(length - 1).bit_length())
    low_bits = bits // 2
    widths = (low_bits, bits - low_bits)
    key = np.broadcast_to(_keys(_SHUFFLE, seed, epoch), positions.shape)

    def permute(x: np.ndarray, key: np.ndarray) -> np.ndarray:
        low = x & np.uint64((1 << widths[0]) - 1)
        high = x >> np.uint64(widths[0])
        for round_ in range(_ROUNDS):
            # Each round replaces one half by itself xor a hash of the other, so it can be
            # undone whatever the hash is: that is what makes the whole a bijection.
            word = (high if round_ % 2 == 0 else low) | np.uint64(round_ << 40)
            word = _mix(word * np.uint64(_GOLDEN) + key)
            width = widths[round_ % 2]
            word >>= np.uint64(64 - width)
            if round_ % 2 == 0:
                low = low ^ word
            else:
                high = high ^ word
        return (high << np.uint64(widths[0])) | low

    result = permute(positions.astype(np.uint64), key)
    outside = np.flatnonzero(result >= length)
    while outside.size:
        walked = permute(result[outside], key[outside])
        result[outside] = walked
        outside = outside[walked >= length]
    return result.astype(np.int64)


def shares(weights: Sequence[float | int]) -> tuple[int, ...]:
    """How often each part of a mixture comes in one cycle, from weights above 0.

    Exact where the weights are in the ratio of small numbers, else to a ten-thousandth.
    """
    total = sum(map(Fraction, weights))
    exact = [(Fraction(weight) / total).limit_denominator(_LEAST_CYCLE) for weight in weights]
    cycle = math.lcm(*(share.denominator for share in exact))
    if sum(exact) == 1 and cycle <= _MOST_CYCLE:
        cycle *= -(-_LEAST_CYCLE // cycle)
        return tuple(int(share * cycle) for share in exact)
    return tuple(max(1, round(Fraction(w) / total * _MOST_CYCLE)) for w in weights)


@functools.lru_cache(maxsize=16)
def _pattern(cycle: int, counts: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(part, how many of that part came before it) of each position of a cycle of a mixture."""
    total = sum(counts)
    place = shuffled(np.arange(total), length=total, seed=seed, epoch=cycle)
    part = np.searchsorted(np.cumsum(counts), place, side='right')
    rank = np.empty(total, np.int64)
    for number, count in enumerate(counts):
        rank[part == number] = np.arange(count)
    return part, rank


def _part_seed(seed: int, part: int) -> int:
    return int(_keys(_PART, seed, part)[0])


def example_indices(
    step: int,
    *,
    length: int | Sequence[int],
    batch_size: int,
    seed: int,
    rows: slice | Int64[np.ndarray, ' rows'] = slice(None),
    shuffle: bool = True,
    counts: tuple[int, ...] | None = None,
    repeats: int = 1,
) -> tuple[Int64[np.ndarray, ' rows'], Int64[np.ndarray, ' rows']]:
    """Which examples batch `step` holds.

    The epochs follow one another without a gap: a batch may hold the end of one and the
    start of the next, and every example comes exactly once per epoch. In a mixture each part
    has epochs of its own, and comes in every cycle of sum(counts) positions in its share, in an
    order drawn anew.

    Args:
      step: number of the batch, from 0.
      length: how many examples the source has; of a mixture those of each part, whose
        examples are numbered one part after the other.
      batch_size: examples in the global batch.
      seed: seed of the order.
      rows: the rows of the global batch that are wanted (those of this host).
      shuffle: False gives the order of the source.
      counts: from `shares`, for a mixture.
      repeats: how often each example comes in its batch (repeated augmentation, arXiv
        1901.09335), which this must divide: rows b and b + batch_size / repeats are views of
        the same one.

    Returns:
      (index, view), both int64 [rows]: index in [0, length), or in [0, sum(length)); view counts
      how often the example came before: the epoch where `repeats` is 1.
    """
    row = np.arange(batch_size, dtype=np.int64)[rows]
    copy, row = np.divmod(row, batch_size // repeats)
    position = step * (batch_size // repeats) + row
    if counts is None:
        assert isinstance(length, int)
        index, epoch = _of_one(position, length, seed, shuffle)
    else:
        assert not isinstance(length, int)
        part, within = _of_mixture(position, counts, seed)
        starts = np.concatenate([[0], np.cumsum(length)])
        index, epoch = np.empty_like(position), np.empty_like(position)
        for number in np.unique(part).tolist():
            own = part == number
            found = _of_one(within[own], length[number], _part_seed(seed, number), shuffle)
            index[own], epoch[own] = found[0] + starts[number], found[1]
    return index, epoch * repeats + copy


def _of_one(
    position: np.ndarray, length: int, seed: int, shuffle: bool
) -> tuple[np.ndarray, np.ndarray]:
    epoch, index = np.divmod(position, length)
    if shuffle:
        index = shuffled(index, length=length, seed=seed, epoch=epoch)
    return index, epoch


def _of_mixture(
    position: np.ndarray, counts: tuple[int, ...], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(part, position within the part) of positions of a mixture."""
    cycle, place = np.divmod(position, sum(counts))
    part, within = np.empty_like(position), np.empty_like(position)
    every = np.asarray(counts, np.int64)
    for number in np.unique(cycle).tolist():
        rows = cycle == number
        parts, ranks = _pattern(number, counts, seed)
        part[rows] = parts[place[rows]]
        within[rows] = number * every[part[rows]] + ranks[place[rows]]
    return part, within


def example_keys(
    seed: int, epoch: Int64[np.ndarray, ' n'] | int, index: Int64[np.ndarray, ' n']
) -> UInt64[np.ndarray, ' n']:
    """One key per example, uint64 [N], for `uniform`; a function of these three alone."""
    return np.broadcast_to(_keys(_EXAMPLE, seed, epoch, index), index.shape)


def uniform(
    keys: UInt64[np.ndarray, '...'], stream: int | UInt64[np.ndarray, '...']
) -> Float64[np.ndarray, '...']:
    """Random numbers in [0, 1), a function of (key, stream).

    Args:
      keys: uint64 [...], from `example_keys`.
      stream: which of the numbers of each key, from 0; an array broadcasts against keys.

    Returns:
      float64 [...], of the 53 bits that a float64 holds.
    """
    stream = np.asarray(stream, np.uint64).reshape(np.shape(stream) or (1,))
    words = _mix(keys + (stream + np.uint64(1)) * np.uint64(_GOLDEN))
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
