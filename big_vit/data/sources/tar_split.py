"""What is known of the samples of a split of tar shards: from indices, or by walking the shards."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from big_vit.data import files
from big_vit.data.sources import sidecars
from big_vit.data.sources.base import Request
from big_vit.data.sources.media import LeftOut, main_kind
from big_vit.data.sources.tar_index import KINDS, Index, indexed, unpack_values
from big_vit.errors import UserError


class Settings(NamedTuple):
    """What the source `tar` was called with."""

    path: str
    title: str
    label_column: str
    text_column: str | None
    index_folder: str | None
    request: Request

    @property
    def needs_labels(self) -> bool:
        return self.text_column is None and self.request.labelled


class Part(NamedTuple):
    """The samples of a shard: arrays [samples], and the label values that codes are places in.

    Attributes:
      words: (offset, size) of the text of each, [samples, 2]; None without `text_column`.
      codes: -1 is no label.
    """

    offset: np.ndarray
    size: np.ndarray
    codes: np.ndarray
    words: np.ndarray | None
    values: list[Any]

    @property
    def bytes(self) -> int:
        arrays = (self.offset, self.size, self.codes, self.words)
        return sum(array.nbytes for array in arrays if array is not None) + 64 * len(self.values)


class Samples(NamedTuple):
    """The samples of a split, as much as is known without reading them.

    Attributes:
      lengths: samples of each shard, int64 [shards].
      values: label values that occur; None if they are not known.
      part: returns the samples of a shard by its number.
    """

    shards: list[files.Stored]
    lengths: np.ndarray
    kind: str
    values: list[Any] | None
    part: Callable[[int], Part]


def samples_of(shards: list[files.Stored], name: str, settings: Settings) -> Samples:
    """Find what is known of the samples of a split: in indices, or by walking its shards.

    Raises:
      UserError: there are none, they are of several kinds, or an index is of other shards.
    """
    folders = {shard.place.path.rpartition('/')[0] for shard in shards}
    if len(folders) == 1:
        folder = shards[0].place._replace(path=folders.pop())
        beside = settings.index_folder or str(folder)
        place = files.place(beside, f'{settings.request.key}.index')
        manifest = sidecars.read_manifest(place / sidecars.MANIFEST, folder)
        if manifest is not None:
            return _listed(manifest, shards, name, settings, str(folder))
        if settings.index_folder is not None:
            raise UserError(
                f'{settings.request.key}.index: no {sidecars.MANIFEST} in {place}: '
                f'{sidecars.command(f"{settings.path} --to {place}")}'
            )
        counts = sidecars.read_counts(folder) if not shards[0].place.is_local else None
        if counts is not None and (settings.request.num_classes or not settings.needs_labels):
            return _counted(counts, shards, settings, str(folder))
    elif settings.index_folder is not None:
        raise UserError(
            f'{settings.request.key}.index: is of the shards of one folder, and {settings.path} '
            f'names shards in {len(folders)}: make each folder a part of `mixture`'
        )
    return _walked(shards, name, settings)


def _walked(shards: list[files.Stored], name: str, settings: Settings) -> Samples:
    """Walk shards once, and keep in memory or on the local disk where their samples are."""
    index = indexed(shards, settings.label_column, settings.text_column, settings.request.labelled)
    if not len(index['size']):
        raise _nothing(index['left'], settings)
    kind, rows = _examples(index, f'{settings.title}, {name}', settings.request.key)
    lengths = np.bincount(index['shard'][rows], minlength=len(shards)).astype(np.int64)
    ends = np.cumsum(lengths)
    offset, size, label = (index[n][rows] for n in ('offset', 'size', 'label'))
    words = None if settings.text_column is None else index['words'][rows]
    values = unpack_values(index['values'])

    def part(shard: int) -> Part:
        which = slice(int(ends[shard] - lengths[shard]), int(ends[shard]))
        texts = None if words is None else words[which]
        return Part(offset[which], size[which], label[which], texts, values)

    return Samples(shards, lengths, kind, values, part)


def _nothing(left: np.ndarray | dict[str, Any], settings: Settings) -> UserError:
    left_out = LeftOut()
    left_out.update(left if isinstance(left, dict) else json.loads(bytes(left)))
    what = f' ({left_out})' if str(left_out) else ''
    key, path = settings.request.key, settings.path
    return UserError(f'{key}.path: no sample with an image, video, sound or text in {path}{what}')


def _examples(index: Index, where: str, key: str) -> tuple[str, slice | np.ndarray]:
    """Return the kind of a split and its samples; texts beside media are none. Tells of the rest.

    Raises:
      UserError: it has media of several kinds, or much of it cannot be read.
    """
    counts = np.bincount(index['kind'], minlength=len(KINDS))
    number = _main_kind(counts, json.loads(bytes(index['left'])), where, key)
    is_all = counts[number] == len(index['kind'])
    rows = slice(None) if is_all else np.flatnonzero(index['kind'] == number)
    return KINDS[number], rows


def _main_kind(counts: np.ndarray, left: dict[str, Any], where: str, key: str) -> int:
    """Choose the kind of the samples, of which there are so many of each, and tell of the rest."""
    present = [KINDS[number] for number in np.flatnonzero(counts)]
    if len(set(present) - {'text'}) > 1:
        names = ' and '.join(present)
        raise UserError(f'{key}.path: shards of {where} hold {names}: keep those of one kind')
    kind = main_kind(present)
    assert kind is not None
    taken = int(counts[KINDS.index(kind)])
    left_out = LeftOut()
    left_out.update(left)
    for _ in range(int(counts.sum()) - taken):
        left_out.add('x.txt')
    left_out.tell(where, taken, kind, key)
    return KINDS.index(kind)


def _listed(
    manifest: sidecars.Manifest,
    shards: list[files.Stored],
    name: str,
    settings: Settings,
    folder: str,
) -> Samples:
    """Take what the index of a folder of shards says; the samples of each are found when needed."""
    rows = sidecars.check(manifest, shards, folder)
    key, again = settings.request.key, sidecars.command(settings.path)
    column = settings.label_column.lower()
    if settings.needs_labels and column != manifest.label_column.lower():
        raise UserError(
            f'{manifest.file}: has the labels of {manifest.label_column}, and {key}.label_column '
            f'is {settings.label_column}: {again[:-1]} --label_column {settings.label_column}`'
        )
    names = sorted(manifest.groups)
    groups = {names[number] for number in np.unique(manifest.arrays['group'][rows]).tolist()}
    facts = sidecars.joined_facts(manifest.groups[group] for group in sorted(groups))
    counts = manifest.arrays['counts'][rows].astype(np.int64)
    if not counts.sum():
        raise _nothing(facts['left'], settings)
    kind = _main_kind(counts.sum(0), facts['left'], f'{settings.title}, {name}', key)
    bare = manifest.arrays['unlabelled'][rows, kind]
    if settings.needs_labels and bare.any():
        raise UserError(
            f'{shards[np.flatnonzero(bare)[0]].place}: a sample has no .{settings.label_column}, '
            f'as {int(bare.sum()):,} of all: set {key}.label_column to the one that is meant'
        )
    ending = (settings.text_column or '').lower()
    if ending and facts['endings'].get(ending, [0] * len(KINDS))[kind] < counts[:, kind].sum():
        present = ', '.join(f'.{ending}' for ending in sorted(facts['endings']))
        raise UserError(
            f'{key}.path: samples of {settings.path} have no .{ending} (they have {present}): '
            'set text_column to the member with their words'
        )

    def part(shard: int) -> Part:
        arrays = sidecars.read_index(manifest, shards[shard])
        return _part(arrays, kind, ending, int(counts[shard, kind]), shards[shard], again)

    return Samples(shards, counts[:, kind], KINDS[kind], facts['values'], part)


def _part(
    arrays: Index, kind: int, ending: str, count: int, shard: files.Stored, again: str
) -> Part:
    """Take the samples of one kind from the index of a shard."""
    rows = np.flatnonzero(arrays['kind'] == kind)
    if len(rows) != count:
        raise UserError(f'{shard.place}: its index has {len(rows)} samples of {count}: {again}')
    words = arrays[f'in {ending}'][rows] if ending else None
    values = unpack_values(arrays['values'])
    offset, size, codes = (arrays[name][rows] for name in ('offset', 'size', 'label'))
    return Part(offset, size, codes, words, values)


def _counted(
    counts: sidecars.Counts, shards: list[files.Stored], settings: Settings, folder: str
) -> Samples:
    """Take the number of samples of each shard; where they are is found when they are needed."""
    lengths = counts.of(shards, folder)

    def part(shard: int) -> Part:
        place = shards[shard]
        index = indexed(
            [place], settings.label_column, settings.text_column, settings.request.labelled
        )
        if len(index['size']) != lengths[shard]:
            raise UserError(
                f'{place.place}: has {len(index["size"]):,} samples, and {counts.file} says '
                f'{lengths[shard]:,}: {sidecars.command(settings.path)}'
            )
        others = int((index['kind'] != KINDS.index(kind)).sum())
        if others:
            raise UserError(
                f'{place.place}: {others:,} of its {lengths[shard]:,} samples are no {kind}, and '
                f'{counts.file} counts them: {sidecars.command(settings.path)}'
            )
        words = None if settings.text_column is None else index['words']
        codes, values = index['label'], unpack_values(index['values'])
        if settings.request.num_classes is None:  # What other shards hold is not known.
            codes, values = np.full(len(codes), -1), []
        return Part(index['offset'], index['size'], codes, words, values)

    first = next(number for number, length in enumerate(lengths) if length)
    index = indexed(
        [shards[first]], settings.label_column, settings.text_column, settings.request.labelled
    )
    kind, _ = _examples(index, settings.title, settings.request.key)
    return Samples(shards, lengths, kind, None, part)
