"""The ledger of the shards that a run reads: kept in its checkpoints, compared when it goes on.

The order of examples depends on which shards there are and how long each is. So a shard that has
vanished keeps its place, and its examples count as damaged until it is back.
"""

import errno
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from big_vit.data.sources.base import Columns, Shard, Source
from big_vit.data.windows import Shards

_MOST_NAMED = 3


class Ledger(NamedTuple):
    """The shards of a source, in order.

    Attributes:
      shards: their names, sizes and stamps.
      lengths: examples of each.
      window: how many are open at once; None if all examples are shuffled together.
      lost: names of those that were not there when it was written.
    """

    shards: tuple[Shard, ...]
    lengths: tuple[int, ...]
    window: int | None
    lost: tuple[str, ...] = ()

    def by_name(self) -> dict[str, tuple[Shard, int]]:
        """Return the shards, and how many examples each has, by their names."""
        pairs = zip(self.shards, self.lengths, strict=True)
        return {shard.name: (shard, length) for shard, length in pairs}

    def dump(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it, as JSON has it."""
        return {
            'names': [shard.name for shard in self.shards],
            'sizes': [shard.size for shard in self.shards],
            'stamps': [shard.stamp for shard in self.shards],
            'lengths': list(self.lengths),
            'window': self.window,
            'lost': list(self.lost),
        }


def parse(dump: Mapping[str, Any]) -> Ledger:
    """Read what `Ledger.dump` returned."""
    columns = (dump['names'], dump['sizes'], dump['stamps'])
    shards = tuple(Shard(*row) for row in zip(*columns, strict=True))
    return Ledger(shards, tuple(dump['lengths']), dump['window'], tuple(dump['lost']))


def of(source: Source, shards: Shards | int | None) -> Ledger | None:
    """Return the ledger of a source, and how its shards are read; None if it is not of shards."""
    lengths = source.shard_lengths
    if lengths is None:
        return None
    window = shards.lanes if isinstance(shards, Shards) else None
    # Without their names, changes of their lengths are noticed.
    unnamed = [Shard(str(number), 0, '') for number in range(len(lengths))]
    there = unnamed if source.shards is None else source.shards()
    lost = tuple(shard.name for shard in there if shard.is_lost)
    kept = tuple(shard._replace(is_lost=False) for shard in there)
    return Ledger(kept, tuple(lengths.tolist()), window, lost)


def with_lost(source: Source, ledger: Ledger | None) -> Source:
    """Return a source in whose order shards that were there before keep their places.

    Examples of those raise FileNotFoundError. Where other shards are new, or others have another
    length, the source stays as it is.
    """
    if ledger is None or source.shards is None or source.shard_lengths is None:
        return source
    there = {shard.name: row for row, shard in enumerate(source.shards())}
    kept = [there.get(shard.name, -1) for shard in ledger.shards]
    present = [row for row in kept if row >= 0]
    lengths = np.array(ledger.lengths, np.int64)
    places = np.array(kept)
    same = source.shard_lengths[present].tolist() == lengths[places >= 0].tolist()
    if present != list(range(len(there))) or len(present) == len(kept) or not same:
        return source
    ends = np.cumsum(lengths)
    # What to add to an index to have that of the shards that are there.
    moves = np.cumsum(np.where(places >= 0, 0, -lengths))

    def shard_of(indices: np.ndarray) -> np.ndarray:
        return np.searchsorted(ends, indices, side='right')

    def load(indices: np.ndarray) -> Columns:
        which = shard_of(indices)
        gone = which[places[which] < 0]
        if gone.size:
            raise FileNotFoundError(errno.ENOENT, 'it has vanished', ledger.shards[gone[0]].name)
        return source.load(indices + moves[which])

    def expect(indices: np.ndarray, *soon: bool) -> None:
        which = shard_of(indices)
        is_there = places[which] >= 0
        assert source.expect is not None
        source.expect(indices[is_there] + moves[which[is_there]], *soon)

    def where(index: int) -> str:
        which = int(shard_of(np.array([index]))[0])
        gone = places[which] < 0
        return ledger.shards[which].name if gone else source.place(index + int(moves[which]))

    now = source.shards()
    shards = [
        ledger.shards[i]._replace(is_lost=True) if row < 0 else now[row]
        for i, row in enumerate(kept)
    ]
    return replace(
        source,
        length=int(ends[-1]),
        load=load,
        labels=None,
        expect=None if source.expect is None else expect,
        where=where,
        shard_lengths=lengths,
        shards=lambda: shards,
    )


def changes(before: Ledger, now: Ledger | None) -> tuple[list[str], bool]:
    """Compare the shards of a run with those it had.

    Returns:
      (what changed, in words; whether examples come in the same order).
    """
    if now is None:
        return ['its shards are not known any more'], False
    old, new = before.by_name(), now.by_name()
    both = [name for name in old if name in new and name not in now.lost]
    grown = [n for n in both if (old[n][0].size, old[n][1]) != (new[n][0].size, new[n][1])]
    stamped = [n for n in both if n not in grown and old[n][0].stamp != new[n][0].stamp]
    gone = [name for name in now.lost if name not in before.lost]
    back = [name for name in both if name in before.lost]
    told = (
        (gone, 'vanished', ': until back, its examples count as damaged'),
        (back, 'came back', ''),
        ([name for name in old if name not in new], 'vanished', ''),
        ([name for name in new if name not in old], 'came anew', ''),
        (grown, 'changed in size or number of examples', ''),
        (stamped, 'changed without another size', ''),
    )
    total = f'of {len(old):,} shards'
    lines = [
        f'{total} {len(names):,} {what} ({listed(names)}){more}'
        for names, what, more in told
        if names
    ]
    is_same = before.lengths == now.lengths and before.window == now.window
    return lines, is_same and list(old) == list(new)


def listed(names: Sequence[str]) -> str:
    """Name a few of several shards."""
    shown = ', '.join(names[:_MOST_NAMED])
    more = len(names) - _MOST_NAMED
    return f'{shown} and {more:,} more' if more > 0 else shown
