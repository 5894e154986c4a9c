"""The order of the data, and its randomness, as pure functions of (seed, step).

Implemented here rather than taken from a data library: the examples of batch k must
not change when a dependency does, or a resumed run is another run. Counters are hashed
with the finalizer of SplitMix64 (Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195);
there is no generator state, so nothing needs saving.
"""

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64, UInt64

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_ROUNDS = 8
# A Feistel network of fewer bits is visibly non-uniform, so tiny datasets walk in a larger domain.
_MIN_BITS = 6
# Separate the keys of the shuffle, the augmentation, the parts of a mixture, views, and of the
# order with locality its shards, lanes and windows.
_SHUFFLE, _EXAMPLE, _PART, _VIEW, SHARDS, LANES, WINDOWS = range(1, 8)
# Number of positions in which the parts of a mixture come exactly in their shares.
_LEAST_CYCLE, _MOST_CYCLE = 1_000, 10_000


def _mix(x: np.ndarray) -> np.ndarray:
    """Hash uint64 [...] to uint64 [...], a bijection of 64-bit words; does not modify x."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def keys_of(*words: int | np.ndarray) -> np.ndarray:
    """Hash integers, scalars or [N], to uint64 [N] (or [1] if all are scalars)."""
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
    """Evaluate the permutation of range(length) for (seed, epoch) at some positions.

    A Feistel network with a keyed hash as its round function permutes the smallest power
    of two that is at least `length`; values that fall outside are permuted again until they fall
    inside (cycle walking; Black and Rogaway 2002, doi:10.1007/3-540-45760-7_9). Needs no
    memory beyond the given positions.

    Args:
      positions: int64 [N], each in [0, length).
      length: number of examples, at least 1.
      seed: any integer.
      epoch: int64 [N], or one integer for all positions.

    Returns:
      int64 [N], each in [0, length); distinct for distinct positions of one epoch.

    Raises:
      ValueError: a position lies outside [0, length).
    """
    if positions.size and not (positions.min() >= 0 and positions.max() < length):
        raise ValueError(f'positions must lie in [0, {length})')
    if length == 1:
        return np.zeros_like(positions)
    key = np.broadcast_to(keys_of(_SHUFFLE, seed, epoch), positions.shape)
    return permuted(positions, length, key)


def permuted(
    positions: Int64[np.ndarray, ' n'],
    length: int | Int64[np.ndarray, ' n'],
    key: UInt64[np.ndarray, ' n'],
) -> Int64[np.ndarray, ' n']:
    """Evaluate permutations of range(length), one for each key; see `shuffled`.

    Args:
      positions: int64 [N], each in [0, length).
      length: at least 1; of the permutation of each position, or of all.
      key: uint64 [N]; those of one key and length are of one permutation.

    Returns:
      int64 [N], each in [0, length).
    """
    # The exponent of a float is the bit length of the whole number.
    bits = np.maximum(_MIN_BITS, np.frexp(np.asarray(length, np.float64) - 1)[1]).astype(np.uint64)
    low_bits = bits // np.uint64(2)
    result = _feistel(positions.astype(np.uint64), key, low_bits, bits - low_bits).astype(np.int64)
    outside = np.flatnonzero(result >= length)
    if outside.size:
        lengths = length[outside] if isinstance(length, np.ndarray) else length
        result[outside] = permuted(result[outside], lengths, key[outside])
    return result


def _feistel(x: np.ndarray, key: np.ndarray, low_bits: Any, high_bits: Any) -> np.ndarray:
    """Permute uint64 [N] of low_bits + high_bits bits, keyed by uint64 [N]."""
    low = x & ((np.uint64(1) << low_bits) - np.uint64(1))
    high = x >> low_bits
    for round_ in range(_ROUNDS):
        # Each round replaces one half by itself xor a hash of the other, which can be undone
        # whatever the hash is: so the network is a bijection.
        word = (high if round_ % 2 == 0 else low) | np.uint64(round_ << 40)
        word = _mix(word * np.uint64(_GOLDEN) + key)
        word >>= np.uint64(64) - (low_bits if round_ % 2 == 0 else high_bits)
        if round_ % 2 == 0:
            low = low ^ word
        else:
            high = high ^ word
    return (high << low_bits) | low


def shares(weights: Sequence[float | int]) -> tuple[int, ...]:
    """Convert weights above 0 to the number of positions of each part in one cycle of a mixture.

    Exact if the weights are in a ratio of small integers, else to a ten-thousandth.
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
    """Return (part, number of earlier positions of that part) for each position of a cycle."""
    total = sum(counts)
    place = shuffled(np.arange(total), length=total, seed=seed, epoch=cycle)
    part = np.searchsorted(np.cumsum(counts), place, side='right')
    rank = np.empty(total, np.int64)
    for number, count in enumerate(counts):
        rank[part == number] = np.arange(count)
    return part, rank


def part_seed(seed: int, part: int) -> int:
    return int(keys_of(_PART, seed, part)[0])


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
    shift: int = 0,
) -> tuple[Int64[np.ndarray, ' rows'], Int64[np.ndarray, ' rows']]:
    """Return the indices of the examples of batch `step`.

    Epochs follow one another without a gap: a batch may contain the end of one and the
    start of the next, and every example comes exactly once per epoch. In a mixture each part
    has separate epochs, and gets its share of every cycle of sum(counts) positions, in an
    order drawn anew.

    Args:
      step: number of the batch, from 0.
      length: number of examples of the source; of each part for a mixture, whose
        examples are numbered one part after the other.
      batch_size: examples in the global batch.
      seed: seed of the order.
      rows: rows of the global batch to return (those of this host).
      shuffle: False keeps the order of the source.
      counts: from `shares`, for a mixture.
      repeats: views of each example in its batch (repeated augmentation, arXiv 1901.09335),
        a divisor of the batch size: rows b and b + batch_size / repeats are views of one example.
      shift: positions added to those that steps of this batch size come to, where earlier ones had
        another.

    Returns:
      (index, view), both int64 [rows]: index in [0, length), or in [0, sum(length)); view counts
      earlier views of the example: the epoch if `repeats` is 1.
    """
    row = np.arange(batch_size, dtype=np.int64)[rows]
    copy, row = np.divmod(row, batch_size // repeats)
    position = shift + step * (batch_size // repeats) + row
    if counts is None:
        assert isinstance(length, int)
        index, epoch = _source_indices(position, length, seed, shuffle)
    else:
        assert not isinstance(length, int)
        part, within = mixture_positions(position, counts, seed)
        starts = np.concatenate([[0], np.cumsum(length)])
        index, epoch = np.empty_like(position), np.empty_like(position)
        for number in np.unique(part).tolist():
            chosen = part == number
            local, epoch[chosen] = _source_indices(
                within[chosen], length[number], part_seed(seed, number), shuffle
            )
            index[chosen] = local + starts[number]
    return index, epoch * repeats + copy


def _source_indices(
    position: np.ndarray, length: int, seed: int, shuffle: bool
) -> tuple[np.ndarray, np.ndarray]:
    epoch, index = np.divmod(position, length)
    if shuffle:
        index = shuffled(index, length=length, seed=seed, epoch=epoch)
    return index, epoch


def mixture_positions(
    position: np.ndarray, counts: tuple[int, ...], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (part, position within the part) of positions of a mixture."""
    cycle, place = np.divmod(position, sum(counts))
    part, within = np.empty_like(position), np.empty_like(position)
    per_cycle = np.asarray(counts, np.int64)
    for number in np.unique(cycle).tolist():
        rows = cycle == number
        parts, ranks = _pattern(number, counts, seed)
        part[rows] = parts[place[rows]]
        within[rows] = number * per_cycle[part[rows]] + ranks[place[rows]]
    return part, within


def example_keys(
    seed: int, epoch: Int64[np.ndarray, ' n'] | int, index: Int64[np.ndarray, ' n']
) -> UInt64[np.ndarray, ' n']:
    """Return a key for each example, uint64 [N], for `uniform`; a function of these three alone."""
    return np.broadcast_to(keys_of(_EXAMPLE, seed, epoch, index), index.shape)


def view_keys(keys: UInt64[np.ndarray, ' n'], number: int) -> UInt64[np.ndarray, ' n']:
    """Return keys for one of several views of examples, a function of their keys and its number."""
    return keys_of(_VIEW, keys, number)


def uniform(
    keys: UInt64[np.ndarray, '...'], stream: int | UInt64[np.ndarray, '...']
) -> Float64[np.ndarray, '...']:
    """Draw random numbers in [0, 1), a function of (key, stream).

    Args:
      keys: uint64 [...], from `example_keys`.
      stream: index of the number of each key, from 0; an array broadcasts against keys.

    Returns:
      float64 [...], multiples of 2^-53.
    """
    stream = np.asarray(stream, np.uint64).reshape(np.shape(stream) or (1,))
    words = _mix(keys + (stream + np.uint64(1)) * np.uint64(_GOLDEN))
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
