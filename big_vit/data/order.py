"""The order of the data, and its randomness, as pure functions of (seed, step).

Owned here rather than borrowed from a data library: which examples batch k holds must
not change when a dependency does, or a resumed run is another run. Counters are hashed
with the finaliser of SplitMix64 (Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195);
there is no generator state anywhere, so nothing needs saving.
"""

import numpy as np
from jaxtyping import Float64, Int64, UInt64

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_ROUNDS = 8
# A Feistel network over fewer bits than this is visibly non-uniform, so tiny datasets walk
# inside a larger domain.
_MIN_BITS = 6
# Keeps the keys of the shuffle apart from those of the augmentation.
_SHUFFLE, _EXAMPLE = 1, 2


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


def example_indices(
    step: int,
    *,
    length: int,
    batch_size: int,
    seed: int,
    rows: slice | Int64[np.ndarray, ' rows'] = slice(None),
    shuffle: bool = True,
) -> tuple[Int64[np.ndarray, ' rows'], Int64[np.ndarray, ' rows']]:
    """Which examples batch `step` holds.

    The epochs follow one another without a gap: a batch may hold the end of one and the
    start of the next, and every example comes exactly once per epoch.

    Args:
      step: number of the batch, from 0.
      length: how many examples the source has.
      batch_size: examples in the global batch.
      seed: seed of the order.
      rows: the rows of the global batch that are wanted (those of this host).
      shuffle: False gives the order of the source.

    Returns:
      (index, epoch), both int64 [rows]: index in [0, length), epoch from 0.
    """
    row = np.arange(batch_size, dtype=np.int64)[rows]
    epoch, position = np.divmod(step * batch_size + row, length)
    if shuffle:
        position = shuffled(position, length=length, seed=seed, epoch=epoch)
    return position, epoch


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
