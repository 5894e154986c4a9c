"""An order of examples with locality: few shards are open at once, each is read once an epoch.

The shards follow one another in an order that is drawn anew each epoch. Their sequence is cut into
lanes of equal length, which positions take in turns: position p belongs to lane p mod `lanes`, its
bits reversed, so that any few positions in a row spread evenly over the lanes. A lane begins at a
random place, goes around once, and permutes a few hundred neighbouring examples at a time. All of
it is computed for the positions that are asked for, from the seed, the epoch and the lengths of the
shards; only a table of the shards of an epoch is kept.

The rows of a batch are in the order of their lanes. So a host, which loads the same rows in every
step, reads the same lanes in all of them, and those are neighbours in the sequence of shards; yet
no batch depends on how many hosts there are.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int64

from big_vit.data import order
from big_vit.errors import UserError

# Examples of a lane that are permuted at a time: of pictures some 10 to 30 MB, a good request.
WINDOW = 256
# Lanes by default; that of a source with fewer shards is a power of two as well.
MOST_LANES = 1024
# From this many examples on in this many shards the order has locality unless the config says no.
AUTO_EXAMPLES, AUTO_SHARDS = 10_000_000, 64
# Places of rows in a batch are numbers of so many bits, the first of which are those of the lane.
_PLACE_BITS = 20
# Windows may begin at sixteenths where a lane does, so that lanes do not all need new ones at once.
_PHASES = 16
# Steps by which windows are begun before they are needed, at least and at most.
_LEAST_AHEAD, MOST_AHEAD = 8, 64
# Rows of one example are so many apart, if a batch has several views of it.
_APART = 8
# Most shards that may be open at once.
_MOST_SET = 1 << 16
# Examples that show how many classes come at a time, at each of so many places of an epoch.
_SAMPLE, _PLACES = 4096, 4
# A run that sees fewer than this share of the classes at a time is warned, and advised to see more.
_FEW, _ENOUGH = 0.8, 0.9


@dataclass(frozen=True, eq=False)
class Shards:
    """The shards of a source, and how many of them are open at once.

    Attributes:
      lengths: examples of each shard, int64 [shards].
      lanes: a power of two, at most the number of examples.
    """

    lengths: Int64[np.ndarray, ' shards']
    lanes: int

    def __post_init__(self) -> None:
        if self.lanes & (self.lanes - 1) or not 1 <= self.lanes <= self.length:
            raise ValueError(f'{self.lanes} lanes of {self.length} examples')

    @functools.cached_property
    def ends(self) -> Int64[np.ndarray, ' shards']:
        """Where each shard ends in the source."""
        return np.cumsum(self.lengths)

    @functools.cached_property
    def length(self) -> int:
        """Number of examples."""
        return int(self.ends[-1])


def is_large(lengths: Int64[np.ndarray, ' shards'] | None) -> bool:
    """Whether the order of so many examples in shards has locality where nothing is said."""
    if lengths is None:
        return False
    return len(lengths) >= AUTO_SHARDS and int(lengths.sum()) >= AUTO_EXAMPLES


def opened(lengths: Int64[np.ndarray, ' shards'], lanes: int | None = None) -> Shards:
    """Return the shards of a source, so many of them open at once, by default `MOST_LANES`.

    Raises:
      UserError: there are fewer examples.
    """
    if lanes is None:
        lanes = 1 << (min(MOST_LANES, len(lengths), int(lengths.sum())).bit_length() - 1)
    if lanes > lengths.sum():
        raise UserError(
            f'config: data.window={lanes} is more than the {lengths.sum():,} examples of the data'
        )
    return Shards(lengths, lanes)


def line(parts: Sequence[Shards | int]) -> str:
    """Say how an order with locality is read."""

    def told(part: Shards | int) -> str:
        if isinstance(part, int):
            return f'all {part:,} examples of a part shuffled'
        shards = f'{len(part.lengths):,} shards'
        how = f'{part.lanes:,} of {shards} open at once, {WINDOW} neighbours of each'
        if part.lanes > len(part.lengths):  # Several lanes begin in one shard.
            how = f'{shards} read at {part.lanes:,} places at once, {WINDOW} neighbours at each'
        return f'{how} in random order'

    return '; '.join(map(told, parts))


def steps_ahead(parts: Sequence[Shards | int], batch_size: int) -> int:
    """Return how many steps ahead a window is begun to be read.

    A sixteenth of the lanes come to new ones at a time. If these are begun when the sixteenth
    before has come to its own, as many bytes are asked for at any time.
    """
    lanes = sum(part.lanes for part in parts if not isinstance(part, int))
    steps = -(-lanes * WINDOW // (_PHASES * batch_size))
    return min(max(_LEAST_AHEAD, steps), MOST_AHEAD)


@functools.cache
def _reversed(count: int) -> Int64[np.ndarray, ' count']:
    """Reverse the bits of the numbers below a power of two."""
    numbers = np.arange(count)
    result = np.zeros(count, np.int64)
    for _ in range(count.bit_length() - 1):
        result = result << 1 | numbers & 1
        numbers = numbers >> 1
    return result


class _Epoch(NamedTuple):
    """The shards of an epoch in their order, and its lanes.

    Attributes:
      ends: where each shard ends in their sequence, int64 [shards].
      moves: what to add to a place in the sequence to have an index of the source, int64 [shards].
      starts: where each lane starts in the sequence, int64 [lanes].
      sizes: examples of each lane, int64 [lanes].
      phases: where in it a lane begins, int64 [lanes].
    """

    ends: np.ndarray
    moves: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    phases: np.ndarray


@functools.lru_cache(maxsize=32)
def _epoch(shards: Shards, seed: int, epoch: int) -> _Epoch:
    lengths, lanes, total = shards.lengths, shards.lanes, shards.length
    keys = order.keys_of(order.SHARDS, seed, epoch, np.arange(len(lengths)))
    # Sorted by 32 bits, sixteen at a time, which NumPy does without comparing any two.
    chosen = np.argsort((keys >> np.uint64(16)).astype(np.uint16), kind='stable')
    digits = (keys >> np.uint64(32)).astype(np.uint16)[chosen]
    chosen = chosen[np.argsort(digits, kind='stable')]
    ends = np.cumsum(lengths[chosen])
    moves = shards.ends[chosen] - ends
    # An epoch may begin in the middle of a turn of the lanes.
    turn = (_reversed(lanes) - epoch * total % lanes) % lanes
    sizes = total // lanes + (turn < total % lanes)
    draw = order.keys_of(order.LANES, seed, epoch, np.arange(lanes))
    first, last = _window((draw % sizes.astype(np.uint64)).astype(np.int64), sizes)
    sixteenth = (draw >> np.uint64(60)).astype(np.int64)
    phases = first + (last - first) * sixteenth // _PHASES
    return _Epoch(ends, moves, np.cumsum(sizes) - sizes, sizes, phases)


def _window(place: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (start, stop) of the windows of some places in lanes, all of about one length."""
    count = -(-size // WINDOW)
    least, longer = np.divmod(size, count)
    border = longer * (least + 1)
    start = np.where(
        place < border,
        place // (least + 1) * (least + 1),
        border + (place - border) // least * least,
    )
    return start, start + least + (place < border)


def lanes_of(position: Int64[np.ndarray, ' n'], shards: Shards) -> Int64[np.ndarray, ' n']:
    """Return the lanes of some positions of a source, int64 [N]."""
    return _reversed(shards.lanes)[position % shards.lanes]


def indices(
    position: Int64[np.ndarray, ' n'], shards: Shards, seed: int
) -> tuple[Int64[np.ndarray, ' n'], Int64[np.ndarray, ' n']]:
    """Return (index in the source, epoch) of some positions, both int64 [N]."""
    index, epoch = np.empty_like(position), position // shards.length
    for number in np.unique(epoch).tolist():
        chosen = np.flatnonzero(epoch == number)
        index[chosen] = _indices(position[chosen], shards, seed, number)
    return index, epoch


def _indices(position: np.ndarray, shards: Shards, seed: int, epoch: int) -> np.ndarray:
    now, lane = _epoch(shards, seed, epoch), lanes_of(position, shards)
    place, size, phase = position % shards.length // shards.lanes, now.sizes[lane], now.phases[lane]
    place = (place + phase) % size
    start, stop = _window(place, size)
    # The window in which the lane begins is one until its end, and one up to there.
    is_cut, is_after = (start < phase) & (phase < stop), place >= phase
    start = np.where(is_cut & is_after, phase, start)
    stop = np.where(is_cut & ~is_after, phase, stop)
    keys = order.keys_of(order.WINDOWS, seed, epoch, lane, start)
    place = now.starts[lane] + start + order.permuted(place - start, stop - start, keys)
    return place + now.moves[np.searchsorted(now.ends, place, side='right')]


def example_indices(
    step: int,
    *,
    parts: Sequence[Shards | int],
    batch_size: int,
    seed: int,
    rows: slice | Int64[np.ndarray, ' rows'] = slice(None),
    counts: tuple[int, ...] | None = None,
    repeats: int = 1,
    shift: int = 0,
) -> tuple[Int64[np.ndarray, ' rows'], Int64[np.ndarray, ' rows']]:
    """Return the indices of the examples of batch `step`; see `order.example_indices`.

    Epochs follow one another without a gap, and the same examples are in the same batches however
    large those before were. If there are `repeats`, views of an example are eight rows apart, or
    fewer in the last group.

    Args:
      parts: the shards of the source, or of each part of a mixture; a number of examples stands
        for a part that is shuffled as a whole.
    """
    part, within, copy = (
        column[rows]
        for column in _rows(step, tuple(parts), batch_size, seed, counts, repeats, shift)
    )
    lengths = [shards if isinstance(shards, int) else shards.length for shards in parts]
    starts = np.cumsum(lengths) - lengths
    index, epoch = np.empty_like(within), np.empty_like(within)
    for number in np.unique(part).tolist():
        chosen, shards = np.flatnonzero(part == number), parts[number]
        its_seed = seed if counts is None else order.part_seed(seed, number)
        if isinstance(shards, int):
            epoch[chosen], place = np.divmod(within[chosen], shards)
            local = order.shuffled(place, length=shards, seed=its_seed, epoch=epoch[chosen])
        else:
            local, epoch[chosen] = indices(within[chosen], shards, its_seed)
        index[chosen] = local + starts[number]
    return index, epoch * repeats + copy


# Rows of one batch are asked for a few at a time, by many threads.
@functools.lru_cache(maxsize=2 * MOST_AHEAD)
def _rows(
    step: int,
    parts: tuple[Shards | int, ...],
    batch_size: int,
    seed: int,
    counts: tuple[int, ...] | None,
    repeats: int,
    shift: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (part, position within it, number of the view) of each row of a batch."""
    taken = batch_size // repeats
    position = shift + step * taken + np.arange(taken)
    part, within = np.zeros_like(position), position
    if counts is not None:
        part, within = order.mixture_positions(position, counts, seed)
    places = np.empty(taken, np.int64)
    for number in np.unique(part).tolist():
        chosen, shards = part == number, parts[number]
        lanes = MOST_LANES if isinstance(shards, int) else shards.lanes
        places[chosen] = (
            _reversed(lanes)[within[chosen] % lanes] << _PLACE_BITS - lanes.bit_length()
        )
    by_place = np.argsort(places, kind='stable')
    row = np.arange(batch_size)
    group, inside = np.divmod(row, _APART * repeats)
    width = np.minimum(_APART, taken - group * _APART)
    copy, member = np.divmod(inside, width)
    chosen = by_place[group * _APART + member]
    return part[chosen], within[chosen], copy


# --- Quality ---------------------------------------------------------------------------


def effective_number(values: Int[np.ndarray, ' n']) -> float:
    """Return the exponential of the entropy of some values: how many equally frequent ones."""
    counts = np.unique(values, return_counts=True)[1] / len(values)
    return float(np.exp(-(counts * np.log(counts)).sum()))


def classes_at_a_time(
    shards: Shards, label_of: Callable[[np.ndarray], np.ndarray], seed: int
) -> tuple[float, float]:
    """Return the effective number of classes while windows stay open, and that of all examples.

    Args:
      label_of: maps indices, int64 [N], to labels, int [N].
    """
    total = shards.length
    held = min(total, shards.lanes * WINDOW)
    sample = np.arange(min(held, _SAMPLE))
    here = order.shuffled(sample, length=held, seed=seed, epoch=0)
    anywhere = order.shuffled(sample, length=total, seed=seed, epoch=0)
    starts = (np.arange(_PLACES) * (total - held) // _PLACES).tolist()
    seen = [effective_number(label_of(indices(start + here, shards, seed)[0])) for start in starts]
    return float(np.mean(seen)), effective_number(label_of(anywhere))


def warning(shards: Shards, label_of: Callable[[np.ndarray], np.ndarray], seed: int) -> str | None:
    """Say that shards are sorted by class, and how many would have to be open; None if not."""
    seen, there = classes_at_a_time(shards, label_of, seed)
    if seen >= _FEW * there:
        return None
    lanes, share = shards.lanes, seen / there
    while share < _ENOUGH and lanes < min(_MOST_SET, shards.length // 2):
        lanes *= 2
        # A larger sample holds more classes, so that both are taken anew.
        more, of_all = classes_at_a_time(Shards(shards.lengths, lanes), label_of, seed)
        share = more / of_all
    window = f'data.window={lanes}, ' if share >= _ENOUGH else ''
    return (
        f'shards are sorted by class: with {shards.lanes:,} of {len(shards.lengths):,} open, what '
        f'comes at a time is as diverse as {seen:.3g} classes, and all examples as {there:.3g}: '
        f'set {window}data.shuffle=true, or write the shards anew in a random order'
    )
