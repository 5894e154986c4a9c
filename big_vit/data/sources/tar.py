"""Tar shards in the webdataset layout, indexed once and read by offset."""

import concurrent.futures
import functools
from typing import Any

import numpy as np

from big_vit.data import blocks, files
from big_vit.data.recent import Recent
from big_vit.data.sources import sidecars, tar_shards, tar_split
from big_vit.data.sources.base import Columns, Request, Shard, Source
from big_vit.data.sources.classes import Classes, infer_classes
from big_vit.data.sources.media import loader
from big_vit.data.sources.splits import cut
from big_vit.data.sources.tar_format import BLOCK, kind_and_size, place_of
from big_vit.data.sources.tar_split import Part, Samples, Settings
from big_vit.errors import UserError

# Indices of shards that are kept in memory; those of others are read again.
_PARTS_BYTES = 256 << 20


def tar(
    request: Request,
    *,
    path: str,
    label_column: str = 'cls',
    text_column: str | None = None,
    index: str | None = None,
) -> Source:
    """Open webdataset shards: an image (or video, sound, text) and a label with one name.

    Splits are the words train, val, validation, test in the names of the shards, if all have
    one; else all shards are `train`. NAME ends at the first dot of a file's name, as webdataset has
    it. Labels are the member NAME.cls (a number or the name of a class), or what a member NAME.json
    has as `label_column`, which may be a path such as annotation.class. With `text_column` the text
    of each image is the member NAME with that extension, as img2dataset writes it, and a sample
    without a label is of class 0; so are all samples without one if no labels are needed.

    Args:
      request: the examples to open; classes are those that occur in the split `train` (or in each
        split if there is none).
      path: a shard, a folder of shards, a glob, or a range such as train-{0000..0146}.tar.
      label_column: extension of the labels, or their key in JSON.
      text_column: extension of the texts, such as 'txt'.
      index: folder of the indices, if they are not beside the shards; see `sidecars`.

    Raises:
      UserError: no shards, a damaged one, samples without a label or text, two of one name, or
        many without a file that can be read.
    """
    key = request.key
    splits = tar_shards.find_splits(path, key)
    title = f'tar:{files.place(path, key).name}'
    settings = Settings(path, title, label_column, text_column, index, request)

    @functools.cache
    def samples_of(name: str) -> Samples:
        return tar_split.samples_of(splits[name], name, settings)

    def open_split(name: str) -> Source:
        samples = samples_of(name)
        known = samples_of('train' if 'train' in splits else name)
        classes = _classes(known.values, request, title)
        if samples.values is not None:  # Before a shard is read that has a wrong label.
            key = settings.request.key
            classes.numbers(samples.values, f'{key}.path: {title}', name, 'train', key)
        return _source(samples, name, classes, settings)

    return cut(title, splits, open_split, request)


def _classes(values: list[Any] | None, request: Request, title: str) -> Classes:
    if values is not None:
        return infer_classes(values, request, title)
    return Classes(request.num_classes or max(1, request.least_classes), None)


def _source(samples: Samples, name: str, classes: Classes, settings: Settings) -> Source:
    """Return the source of a split; samples are found in the indices of their shards."""
    shards, kind, key = samples.shards, samples.kind, settings.request.key
    ends = np.cumsum(samples.lengths)
    starts = ends - samples.lengths

    def numbered(shard: int) -> tuple[tuple[Part, np.ndarray], int]:
        part = samples.part(shard)
        if settings.needs_labels and (part.codes < 0).any():
            raise UserError(
                f'{shards[shard].place}: a sample has no .{settings.label_column}: set '
                f'{key}.label_column to the one that is meant'
            )
        numbers = classes.numbers(part.values, shards[shard].place, name, 'train', key)
        # Where no labels are needed, those without one are of class 0.
        labels = np.append(numbers, np.int32(0))[part.codes]
        return (part, labels), part.bytes + labels.nbytes

    part_of = Recent(numbered, _PARTS_BYTES)

    def find(indices: np.ndarray) -> list[tuple[int, Part, int, int]]:
        """Return (shard, its samples, row there, label) of some samples."""
        which = np.searchsorted(ends, indices, side='right')
        rows = (indices - starts[which]).tolist()
        parts = [(shard, *part_of(shard)) for shard in which.tolist()]
        return [
            (shard, part, row, int(labels[row]))
            for (shard, part, labels), row in zip(parts, rows, strict=True)
        ]

    def load(indices: np.ndarray) -> Columns:
        found = find(np.asarray(indices, np.int64))

        def read(i: int) -> bytes:
            shard, part, row, _ = found[i]
            return _read_member(shards[shard], int(part.offset[row]), int(part.size[row]))

        def read_text(i: int) -> bytes:
            shard, part, row, _ = found[i]
            assert part.words is not None
            return _read_member(shards[shard], *(int(n) for n in part.words[row]))

        numbers = list(range(len(found)))
        columns = {
            kind: loader(kind, read)(numbers),
            'label': np.array([label for *_, label in found], np.int32),
        }
        if settings.text_column is not None:
            columns['text'] = loader('text', read_text)(numbers)
        return columns

    def expect(indices: np.ndarray, soon: bool = False) -> None:
        which = np.searchsorted(ends, indices, side='right')
        for shard in np.unique(which).tolist():
            blocks.later(fetch, shard, indices[which == shard] - starts[shard], soon)

    def fetch(shard: int, rows: np.ndarray, soon: bool) -> None:
        part, _ = part_of(shard)
        places = list(zip(part.offset[rows].tolist(), part.size[rows].tolist(), strict=True))
        if part.words is not None:
            places += map(tuple, part.words[rows].tolist())
        told = blocks.expect_soon if soon else blocks.expect
        told(shards[shard], [(offset - BLOCK, BLOCK + size) for offset, size in places])

    def where(index: int) -> str:
        shard, part, row, _ = find(np.array([index]))[0]
        return place_of(shards[shard].place, int(part.offset[row]), int(part.size[row]))

    @functools.cache
    def labels() -> np.ndarray:
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            return np.concatenate([*pool.map(lambda s: part_of(s)[1], range(len(shards)))])

    return Source(
        name=settings.title,
        split=name,
        length=int(ends[-1]),
        num_classes=classes.num_classes,
        image_shape=None,
        load=load,
        in_memory=False,
        class_names=classes.names,
        labels=labels,
        where=where,
        shard_lengths=samples.lengths,
        shards=lambda: [Shard(s.place.name, s.size, s.stamp) for s in shards],
        expect=None if shards[0].place.is_local else expect,
    )


def _read_member(shard: files.Stored, offset: int, size: int) -> bytes:
    """Read the data of a member; of a remote shard its header is looked at as well.

    Raises:
      OSError: it cannot be read.
      UserError: the shard is not the one that was indexed.
    """
    if shard.place.is_local:
        return files.read_range(shard.place, offset, size)
    data = blocks.read_range(shard, offset - BLOCK, BLOCK + size)
    try:
        # The size in a pax header may stand for it.
        is_it = kind_and_size(data[:BLOCK], {})[1] in (size, 0)
    except ValueError:
        is_it = False
    if not is_it:
        blocks.forget(shard)
        folder = shard.place.path.rpartition('/')[0]
        raise UserError(
            f'{shard.place}: no file of {size:,} bytes is at byte {offset:,}: the shard is another '
            f'than the one that was indexed: {sidecars.command(shard.place._replace(path=folder))}'
        )
    return data[BLOCK:]
