"""Tar shards in the webdataset layout, indexed once and read by offset."""

import concurrent.futures
import contextlib
import fnmatch
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from big_vit.data import blocks, files
from big_vit.data.decode import is_image
from big_vit.data.recent import Recent
from big_vit.data.sources import sidecars
from big_vit.data.sources.base import Columns, Request, Shard, Source
from big_vit.data.sources.classes import Classes, infer_classes
from big_vit.data.sources.media import (
    KINDS,
    LeftOut,
    is_missed,
    kind_of,
    loader,
    main_kind,
)
from big_vit.data.sources.splits import cut
from big_vit.errors import UserError, failure_at

_SPLIT = re.compile(r'(?:^|[^a-z])(train|validation|valid|val|test|dev|eval)(?:[^a-z]|$)', re.I)
_BRACES = re.compile(r'\{(\d+)\.\.(\d+)\}')
_GLOB = re.compile(r'[*?[]')
_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_REGULAR = (b'0', b'\0', b'7')
# Links, devices, folders and pipes.
_WITHOUT_DATA = (b'1', b'2', b'3', b'4', b'5', b'6')
# Magic numbers of gzip, bzip2, xz and Zstandard.
_COMPRESSED = (b'\x1f\x8b', b'BZh', b'\xfd7zXZ', b'\x28\xb5\x2f\xfd')
_MAX_SHARDS = 1_000_000
# Indices of shards that are kept in memory; those of others are read again.
_PARTS_BYTES = 256 << 20
_KINDS = list(KINDS)
# Labels are read while a shard is indexed; longer members are no labels.
_MAX_LABEL_BYTES = 1 << 20
_MAX_NAME = 1000
_DIGITS = re.compile(r'[0-9]{1,18}')

_FIRST_DOT = "a sample's name ends at the first dot of its files: rename them without other dots"

Take = Callable[[int, int], bytes]
Index = dict[str, np.ndarray]


class _Member(NamedTuple):
    """A regular file of a tar: its path, and where its data are."""

    name: str
    offset: int
    size: int


class _Sample(NamedTuple):
    """The media file of a sample, its label if it has one, and (offset, size) of its text."""

    offset: int
    size: int
    kind: str
    label: int | str | None
    text: tuple[int, int] | None


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


class _Samples(NamedTuple):
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
    splits = _find_splits(path, key)
    title = f'tar:{files.place(path, key).name}'
    settings = _Settings(path, title, label_column, text_column, index, request)

    @functools.cache
    def samples_of(name: str) -> _Samples:
        return _samples(splits[name], name, settings)

    def open_split(name: str) -> Source:
        samples = samples_of(name)
        known = samples_of('train' if 'train' in splits else name)
        classes = _classes(known.values, request, title)
        return _source(samples, name, classes, settings)

    return cut(title, splits, open_split, request)


class _Settings(NamedTuple):
    """What `tar` was called with."""

    path: str
    title: str
    label_column: str
    text_column: str | None
    index_folder: str | None
    request: Request

    @property
    def needs_labels(self) -> bool:
        return self.text_column is None and self.request.labelled


def _classes(values: list[Any] | None, request: Request, title: str) -> Classes:
    if values is not None:
        return infer_classes(values, request, title)
    return Classes(request.num_classes or max(1, request.least_classes), None)


def _source(samples: _Samples, name: str, classes: Classes, settings: _Settings) -> Source:
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

    def expect(indices: np.ndarray) -> None:
        which = np.searchsorted(ends, indices, side='right')
        for shard in np.unique(which).tolist():
            blocks.later(fetch, shard, indices[which == shard] - starts[shard])

    def fetch(shard: int, rows: np.ndarray) -> None:
        part, _ = part_of(shard)
        offsets, sizes = part.offset[rows].tolist(), part.size[rows].tolist()
        blocks.expect(shards[shard], list(zip(offsets, sizes, strict=True)))

    def where(index: int) -> str:
        shard, part, row, _ = find(np.array([index]))[0]
        return _place(shards[shard].place, int(part.offset[row]), int(part.size[row]))

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
    data = blocks.read_range(shard, offset - _BLOCK, _BLOCK + size)
    try:
        # The size in a pax header may stand for it.
        is_it = _kind_and_size(data[:_BLOCK], {})[1] in (size, 0)
    except ValueError:
        is_it = False
    if not is_it:
        blocks.forget(shard)
        folder = shard.place.path.rpartition('/')[0]
        raise UserError(
            f'{shard.place}: no file of {size:,} bytes is at byte {offset:,}: the shard is another '
            f'than the one that was indexed: {sidecars.command(shard.place._replace(path=folder))}'
        )
    return data[_BLOCK:]


def _place(shard: files.Place, offset: int, size: int) -> str:
    """Return the shard and the name of a member, or its offset where the header has it not whole.

    The header of a member in a remote shard would be a request of its own.
    """
    if shard.is_local:
        header = bytes(512)
        with contextlib.suppress(OSError):  # It may be the very shard that cannot be read.
            header = files.read_range(shard, offset - 512, 512)
        name, prefix = (header[i:j].partition(b'\0')[0] for i, j in ((0, 100), (345, 500)))
        # Longer names and, from some writers, other letters than ASCII are in a block before it.
        is_ustar = header[257:263] == b'ustar\0'
        if name and b'?' not in name and (len(name) < 100 or (is_ustar and prefix)):
            path = b'/'.join(part for part in (prefix if is_ustar else b'', name) if part)
            return f'{shard}: {path.decode("utf-8", "surrogateescape")}'
    return f'{shard} at byte {offset:,} ({size:,} bytes)'


# --- What is known of the samples of a split ---------------------------------------------


def _samples(shards: list[files.Stored], name: str, settings: _Settings) -> _Samples:
    """Find what is known of the samples of a split: in indices, or by walking its shards."""
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
    return _walked(shards, name, settings)


def _walked(shards: list[files.Stored], name: str, settings: _Settings) -> _Samples:
    """Walk shards once, and keep in memory or on the local disk where their samples are."""
    index = indexed(shards, settings.label_column, settings.text_column, settings.request.labelled)
    if not len(index['size']):
        raise _nothing(index['left'], settings)
    kind, rows = _examples(index, f'{settings.title}, {name}', settings.request.key)
    lengths = np.bincount(index['shard'][rows], minlength=len(shards)).astype(np.int64)
    ends = np.cumsum(lengths)
    offset, size, label = (index[n][rows] for n in ('offset', 'size', 'label'))
    words = None if settings.text_column is None else index['words'][rows]
    values = _unpack_values(index['values'])

    def part(shard: int) -> Part:
        which = slice(int(ends[shard] - lengths[shard]), int(ends[shard]))
        texts = None if words is None else words[which]
        return Part(offset[which], size[which], label[which], texts, values)

    return _Samples(shards, lengths, kind, values, part)


def _nothing(left: np.ndarray | dict[str, Any], settings: _Settings) -> UserError:
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
    counts = np.bincount(index['kind'], minlength=len(_KINDS))
    number = _main_kind(counts, json.loads(bytes(index['left'])), where, key)
    is_all = counts[number] == len(index['kind'])
    rows = slice(None) if is_all else np.flatnonzero(index['kind'] == number)
    return _KINDS[number], rows


def _main_kind(counts: np.ndarray, left: dict[str, Any], where: str, key: str) -> int:
    """Choose the kind of the samples, of which there are so many of each, and tell of the rest."""
    present = [_KINDS[number] for number in np.flatnonzero(counts)]
    if len(set(present) - {'text'}) > 1:
        names = ' and '.join(present)
        raise UserError(f'{key}.path: shards of {where} hold {names}: keep those of one kind')
    kind = main_kind(present)
    assert kind is not None
    taken = int(counts[_KINDS.index(kind)])
    left_out = LeftOut()
    left_out.update(left)
    for _ in range(int(counts.sum()) - taken):
        left_out.add('x.txt')
    left_out.tell(where, taken, kind, key)
    return _KINDS.index(kind)


def _listed(
    manifest: sidecars.Manifest,
    shards: list[files.Stored],
    name: str,
    settings: _Settings,
    folder: str,
) -> _Samples:
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
    if ending and facts['endings'].get(ending, [0] * len(_KINDS))[kind] < counts[:, kind].sum():
        present = ', '.join(f'.{ending}' for ending in sorted(facts['endings']))
        raise UserError(
            f'{key}.path: samples of {settings.path} have no .{ending} (they have {present}): '
            'set text_column to the member with their words'
        )

    def part(shard: int) -> Part:
        arrays = sidecars.read_index(manifest, shards[shard])
        return _part(arrays, kind, ending, int(counts[shard, kind]), shards[shard], again)

    return _Samples(shards, counts[:, kind], _KINDS[kind], facts['values'], part)


def _part(
    arrays: Index, kind: int, ending: str, count: int, shard: files.Stored, again: str
) -> Part:
    """Take the samples of one kind from the index of a shard."""
    rows = np.flatnonzero(arrays['kind'] == kind)
    if len(rows) != count:
        raise UserError(f'{shard.place}: its index has {len(rows)} samples of {count}: {again}')
    words = arrays[f'in {ending}'][rows] if ending else None
    values = _unpack_values(arrays['values'])
    offset, size, codes = (arrays[name][rows] for name in ('offset', 'size', 'label'))
    return Part(offset, size, codes, words, values)


def _counted(
    counts: sidecars.Counts, shards: list[files.Stored], settings: _Settings, folder: str
) -> _Samples:
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
        words = None if settings.text_column is None else index['words']
        codes, values = index['label'], _unpack_values(index['values'])
        if settings.request.num_classes is None:  # What other shards hold is not known.
            codes, values = np.full(len(codes), -1), []
        return Part(index['offset'], index['size'], codes, words, values)

    first = next(number for number, length in enumerate(lengths) if length)
    index = indexed(
        [shards[first]], settings.label_column, settings.text_column, settings.request.labelled
    )
    kind, _ = _examples(index, settings.title, settings.request.key)
    return _Samples(shards, lengths, kind, None, part)


# --- Shards ----------------------------------------------------------------------------


def _find_splits(path: str, key: str) -> dict[str, list[files.Stored]]:
    """Return the shards of each split, in order."""
    shards = find_shards(path, key)
    splits: dict[str, list[files.Stored]] = {}
    words = [split_word(shard.place.name) for shard in shards]
    words = words if all(words) else ['train'] * len(shards)
    for shard, word in zip(shards, words, strict=True):
        splits.setdefault(word, []).append(shard)
    return splits


def split_word(name: str) -> str:
    """Return the word for a split in the name of a shard; '' if there is none."""
    word = _SPLIT.search(name.removesuffix('.tar'))
    return word[1].lower() if word else ''


def find_shards(path: str, key: str) -> list[files.Stored]:
    """Find the shards of a path: a file, a folder, a glob or a range.

    Raises:
      UserError: there is none, one is not there or compressed, or one is named twice.
    """
    key = f'{key}.path'
    names = _expand_braces(path, key)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f'{key}: {path} names {twice} twice: name each shard once')
    shards: list[files.Stored] = []
    with files.reading(files.place(names[0], key), key):
        if len(names) > 1 and not any(_GLOB.search(n) or not n.endswith('.tar') for n in names):
            shards = _named_shards([files.place(name, key) for name in names], key)
        else:
            for name in names:
                shards += _find_shards(name, key, is_first=not shards)
    if not shards:
        raise UserError(f'{key}: no .tar file in {path}')
    for shard in shards:
        if not shard.place.name.endswith('.tar'):
            raise UserError(
                f'{key}: {shard.place} is not a plain .tar file: if it is compressed, decompress it'
            )
    return shards


def _named_shards(places: list[files.Place], key: str) -> list[files.Stored]:
    """Look up shards of a range of names, by one listing of a remote folder."""
    try:
        return files.stored(places)
    except FileNotFoundError as error:
        missing = next((place for place in places if not files.exists(place)), places[0])
        raise UserError(f'{key}: there is no shard {missing}') from error


def _expand_braces(path: str, key: str) -> list[str]:
    match = _BRACES.search(path)
    if match is None:
        return [path]
    first, last = match.groups()
    rest = _expand_braces(path[match.end() :], key)
    if (int(last) - int(first)) * len(rest) > _MAX_SHARDS:
        raise UserError(f'{key}: {match[0]} are more than {_MAX_SHARDS:,} shards')
    numbers = [f'{n:0{len(first)}d}' for n in range(int(first), int(last) + 1)]
    if not numbers:
        raise UserError(f'{key}: {match[0]} counts backwards')
    return [path[: match.start()] + number + end for number in numbers for end in rest]


def _find_shards(name: str, key: str, is_first: bool) -> list[files.Stored]:
    """Find the shards of a path: a file, a folder or a glob; `is_first` if none came before."""
    place = files.place(name, key)
    if _GLOB.search(place.name):
        parent = place._replace(path=place.path.rpartition('/')[0] or '.')
        names = files.entries(parent) if files.is_folder(parent) else []
        return [_stored(parent, e) for e in names if fnmatch.fnmatch(e.name, place.name)]
    if files.is_folder(place):
        entries = files.entries(place)
        shards = [_stored(place, e) for e in entries if e.name.endswith('.tar')]
        if is_first and not shards and any('.tar' in e.name for e in entries):
            raise UserError(
                f'{key}: {place} holds compressed archives, in which nothing can be found '
                'without reading all: decompress them (gzip -d)'
            )
        return shards
    if files.exists(place):
        return files.stored([place])
    raise UserError(f'{key}: there is no shard {place}')


def _stored(folder: files.Place, entry: files.Entry) -> files.Stored:
    return files.Stored(folder / entry.name, entry.size, entry.stamp)


# --- The tar format --------------------------------------------------------------------


def _members(shard: files.Place, take: Take) -> Iterator[_Member]:
    """Yield the regular files of a tar in order; nothing is extracted.

    Reads the headers of POSIX ustar and pax and of GNU tar. The tarfile module is slower, and
    takes a damaged header for the end of the archive.

    Args:
      take: from `files.forward`; the caller may use it between members, on the last one.

    Raises:
      UserError: damaged or truncated; names the byte.
    """
    end = files.size_of(shard)
    if any(take(0, 6).startswith(magic) for magic in _COMPRESSED):
        raise UserError(f'{shard}: compressed, whatever its name says: decompress it (gzip -d)')
    at, long_name = 0, b''
    extended: dict[bytes, bytes] = {}
    while len(header := take(at, _BLOCK)) == _BLOCK:
        try:
            if header == _ZEROS:
                return
            kind, size = _kind_and_size(header, extended)
            data = at + _BLOCK
            after = data if kind in _WITHOUT_DATA else data + -(-size // _BLOCK) * _BLOCK
            if kind not in _WITHOUT_DATA and data + size > end:
                name = _terminated(header[:100]).decode('utf-8', 'surrogateescape')
                raise UserError(
                    f'{shard}: truncated: {name} at byte {at:,} needs {data + size:,} bytes of '
                    f'{end:,}: copy it again'
                )
            if kind in (b'L', b'x') and size > _MAX_LABEL_BYTES:
                raise ValueError(f'a name of {size:,} bytes')
            if kind == b'L':
                long_name = _terminated(take(data, size))
            elif kind == b'x':
                extended = _parse_pax(take(data, size))
            elif kind not in (b'K', b'g'):
                if kind == b'S' or any(name.startswith(b'GNU.sparse') for name in extended):
                    raise UserError(f'{shard}: a sparse file at byte {at:,}: write it without -S')
                if kind in _REGULAR:
                    path = extended.get(b'path') or long_name or _header_path(header)
                    yield _Member(path.decode('utf-8', 'surrogateescape'), data, size)
                long_name, extended = b'', {}
        except ValueError as error:
            raise UserError(
                f'{shard}: damaged or truncated at byte {at:,} ({error}): copy it again'
            ) from error
        at = after
    raise UserError(f'{shard}: truncated at byte {end:,}, where its end is missing')


def _kind_and_size(header: bytes, extended: dict[bytes, bytes]) -> tuple[bytes, int]:
    """Check a header and return the kind and size of its member; ValueError."""
    checksum = sum(header) - sum(header[148:156]) + 8 * 32
    if _parse_number(header[148:156]) != checksum:
        raise ValueError('no header is there')
    size = int(extended.get(b'size', -1))
    return header[156:157], size if size >= 0 else _parse_number(header[124:136])


def _header_path(header: bytes) -> bytes:
    path, prefix = _terminated(header[:100]), _terminated(header[345:500])
    return prefix + b'/' + path if header[257:263] == b'ustar\0' and prefix else path


def _terminated(field: bytes) -> bytes:
    return field.split(b'\0', 1)[0]


def _parse_number(field: bytes) -> int:
    """Parse a number of a header: octal digits, or big-endian after a byte 0x80; ValueError."""
    if field[:1] == b'\x80':
        return int.from_bytes(field[1:], 'big')
    digits = _terminated(field).strip()
    if digits and not digits.isdigit():
        raise ValueError('no number is there')
    return int(digits or b'0', 8)


def _parse_pax(data: bytes) -> dict[bytes, bytes]:
    """Parse the entries 'LENGTH KEY=VALUE\\n' of an extended header; ValueError."""
    entries = {}
    while data:
        digits, _, _ = data.partition(b' ')
        length = int(digits)
        entry = data[len(digits) + 1 : length - 1]
        if length <= len(digits) + 1 or data[length - 1 : length] != b'\n' or b'=' not in entry:
            raise ValueError('a broken extended header')
        name, _, value = entry.partition(b'=')
        entries[name] = value
        data = data[length:]
    return entries


# --- The index of samples --------------------------------------------------------------


def indexed(
    shards: list[files.Stored],
    label_column: str,
    text_column: str | None = None,
    labelled: bool = True,
) -> Index:
    """Index the samples of some shards; the index is built once and memory-mapped from then on.

    Returns:
      {'shard', 'offset', 'size', 'kind', 'label'}: arrays [samples]; 'words': (offset, size) of
      the member `text_column` of each, [samples, 2], or [0, 2]; 'values': the label values as
      JSON, one a line; 'left': {ending: (number, example)} of what cannot be read, as JSON.

    Raises:
      UserError: a shard is damaged or cannot be read, or a sample is not as it should be.
    """

    def build() -> Index:
        sidecars.tell_walk(shards)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            indices = pool.map(
                lambda shard: _index(shard.place, label_column, text_column, labelled), shards
            )
            return _join(list(indices))

    options = f'{label_column}\0{text_column or ""}' + ('' if labelled else '\0unlabelled')
    mark = files.fingerprint_of(shards, options, 4)
    return files.kept_arrays('tar', mark, build)


def sidecar(shard: files.Place, label_column: str) -> tuple[dict[str, Any], sidecars.Arrays]:
    """Index a shard for all that may be asked of it.

    Returns:
      (facts, see `sidecars.joined_facts`, with 'counts' and 'unlabelled' by kind; arrays as of
      `indexed`, with 'in ENDING', int64 [samples, 2], for the members of each ending, and the
      label -1 where there is none).

    Raises:
      UserError: the shard is damaged or cannot be read, or a sample is not as it should be.
    """
    found, left, _ = _walk(shard, label_column, None, labelled=False)
    samples = [sample for sample, _ in found]
    kinds = np.array([_KINDS.index(sample.kind) for sample in samples], np.uint8)
    values: dict[int | str, int] = {}
    labels = [-1 if s.label is None else values.setdefault(s.label, len(values)) for s in samples]
    arrays: sidecars.Arrays = {
        'offset': np.array([sample.offset for sample in samples], np.uint64),
        'size': np.array([sample.size for sample in samples], np.uint32),
        'kind': kinds,
        'label': np.array(labels, np.int32),
        'values': _pack_values(list(values)),
    }
    endings: dict[str, list[int]] = {}
    for ending in sorted({ending for _, parts in found for ending in parts}):
        where = [parts.get(ending, (-1, 0)) for _, parts in found]
        arrays[f'in {ending}'] = np.array(where, np.int64).reshape(-1, 2)
        there = kinds[arrays[f'in {ending}'][:, 0] >= 0]
        endings[ending] = np.bincount(there, minlength=len(_KINDS)).tolist()
    bare = kinds[arrays['label'] < 0]
    facts = {
        'values': list(values),
        'left': left,
        'endings': endings,
        'counts': np.bincount(kinds, minlength=len(_KINDS)).tolist(),
        'unlabelled': np.bincount(bare, minlength=len(_KINDS)).tolist(),
    }
    return facts, arrays


def _index(shard: files.Place, label_column: str, text_column: str | None, labelled: bool) -> Index:
    """Index a shard, whose samples are members with one name up to its first dot."""
    found, left, unlabelled_text = _walk(shard, label_column, text_column, labelled)
    if unlabelled_text is not None and not found:
        raise unlabelled_text
    samples = [sample for sample, _ in found]
    values: dict[int | str, int] = {}
    labels = [0 if sample.label is None else sample.label for sample in samples]
    texts = [sample.text for sample in samples if sample.text is not None]
    return {
        'offset': np.array([sample.offset for sample in samples], np.uint64),
        'size': np.array([sample.size for sample in samples], np.uint32),
        'kind': np.array([_KINDS.index(sample.kind) for sample in samples], np.uint8),
        'label': np.array([values.setdefault(x, len(values)) for x in labels], np.int32),
        'words': np.array(texts, np.uint64).reshape(len(texts), 2),
        'values': _pack_values(list(values)),
        'left': np.frombuffer(json.dumps(left).encode(), np.uint8),
    }


def _walk(
    shard: files.Place, label_column: str, text_column: str | None, labelled: bool
) -> tuple[
    list[tuple[_Sample, dict[str, tuple[int, int]]]],
    dict[str, tuple[int, str]],
    UserError | None,
]:
    """Find the samples of a shard.

    Returns:
      (samples with (offset, size) of their members by ending, {ending: (number, example)} of what
      cannot be read, the error of a text without a label that was left out).
    """
    samples: list[tuple[_Sample, dict[str, tuple[int, int]]]] = []
    left: dict[str, tuple[int, str]] = {}
    unlabelled_text: UserError | None = None
    try:
        take = files.forward(shard)
        groups = itertools.groupby(_sample_members(shard, take), lambda member: member[0])
        for name, group in groups:
            parts = _parts(shard, name, group)
            try:
                sample = _sample(shard, name, parts, take, label_column, text_column, labelled)
            except _UnlabelledText as error:  # A README beside images, unless there are no images.
                unlabelled_text = unlabelled_text or UserError(str(error))
                continue
            if sample is not None:
                samples.append((sample, parts))
                continue
            missed = next((f'.{part}' for part in parts if is_missed(f'x.{part}')), None)
            if missed is not None:
                count, example = left.get(missed, (0, f'{name}{missed}'))
                left[missed] = count + 1, example
    except OSError as error:
        kind = failure_at(shard, error)
        raise kind(f'{shard}: cannot be read: {error.strerror or error}') from error
    return samples, left, unlabelled_text


class _UnlabelledText(UserError):
    """A text without a label, which is no sample of a dataset of media."""


def _sample_members(shard: files.Place, take: Take) -> Iterator[tuple[str, str, int, int]]:
    """Yield (name of the sample, extension, offset, size) of members; hidden ones are skipped."""
    for member in _members(shard, take):
        folder, slash, base = member.name.rpartition('/')
        stem, dot, extension = base.partition('.')
        if slash and _is_hidden(folder):
            continue
        if not dot and is_image(take(member.offset, min(16, member.size))):
            extension = 'jpg'  # A picture without an ending; its bytes say which kind.
        if stem and extension:
            yield f'{folder}{slash}{stem}', extension.lower(), member.offset, member.size


@functools.lru_cache(maxsize=1024)
def _is_hidden(folder: str) -> bool:
    return any(files.is_clutter(part) for part in folder.split('/') if part not in ('.', '..'))


def _parts(
    shard: files.Place, name: str, members: Iterable[tuple[str, str, int, int]]
) -> dict[str, tuple[int, int]]:
    """Return (offset, size) of the members of a sample by their extensions.

    Raises:
      UserError: two members have one name, or pictures that differ behind the first dot.
    """
    parts: dict[str, tuple[int, int]] = {}
    for _, extension, offset, size in members:
        if extension in parts:
            raise UserError(
                f'{shard}: {name}.{extension} is there twice, at byte {parts[extension][0]:,} and '
                f'at {offset:,}: give each sample a name of its own'
            )
        parts[extension] = offset, size
    dotted = [part for part in parts if '.' in part and kind_of(f'x.{part}') not in (None, 'text')]
    endings = [part.rpartition('.')[2] for part in dotted]
    if len(set(endings)) < len(endings) and not any(part in endings for part in parts):
        raise UserError(
            f'{shard}: {name}.{dotted[0]} and {name}.{dotted[1]} would be one sample, {name}: '
            f'{_FIRST_DOT}'
        )
    return parts


def _sample(
    shard: files.Place,
    name: str,
    parts: dict[str, tuple[int, int]],
    take: Take,
    label_column: str,
    text_column: str | None,
    labelled: bool,
) -> _Sample | None:
    """Read a sample from its members; None if it has no media file."""
    label_name = label_column.lower()
    text_name = None if text_column is None else text_column.lower()
    labels: dict[str, str] = {}
    for extension, (offset, size) in parts.items():
        if extension in (label_name, 'json'):
            if size > _MAX_LABEL_BYTES:
                raise UserError(f'{shard}: {name}.{extension} of {size:,} bytes is no label')
            labels[extension] = take(offset, size).decode('utf-8-sig', 'replace').strip()
    # The image is a.png rather than a.mask.png, whichever comes first.
    media = [
        (kind == 'text', '.' in extension, kind, place)
        for extension, place in parts.items()
        if extension not in (label_name, text_name)
        and (kind := kind_of(f'x.{extension}')) is not None
    ]
    if not media:
        return None
    label, why = _parse_label(f'{shard}: {name}', labels, label_column)
    present = ', '.join(f'.{part}' for part in sorted(parts))
    if text_name is not None and text_name not in parts:
        raise UserError(
            f'{shard}: sample {name} has no .{text_name} (it has {present}): '
            'set text_column to the member with its words'
        )
    _, _, kind, (offset, size) = min(media, key=lambda candidate: candidate[:2])
    if label is None and text_name is None and labelled:  # Captioned images need no classes.
        dotted = [part for part in parts if '.' in part]
        if why:
            advice = f'but {why}: labels are whole numbers or names'
        elif dotted:
            advice = f'(it has {present}): {_FIRST_DOT}'
        else:
            advice = f'(it has {present}): set label_column to the one that is meant'
        raise (_UnlabelledText if kind == 'text' else UserError)(
            f'{shard}: sample {name} has no .{label_column} and no {label_column!r} in a .json '
            f'{advice}'
        )
    if size >= 1 << 32:
        raise UserError(f'{shard}: {name} at byte {offset:,} has {size:,} bytes, 4 GiB or more')
    return _Sample(offset, size, kind, label, parts[text_name] if text_name is not None else None)


def _parse_label(
    sample: str, labels: dict[str, str], label_column: str
) -> tuple[int | str | None, str]:
    """Read the label of a sample from the texts of its members.

    Returns:
      (the label or None, if it is there but no label what it is).
    """
    value: Any = labels.get(label_column.lower())
    if value is not None and _DIGITS.fullmatch(value):
        value = int(value)
    elif value is None and 'json' in labels:
        try:
            fields = json.loads(labels['json'])
        except (ValueError, RecursionError) as error:
            raise UserError(f'{sample}.json is not JSON ({error})') from error
        value = _field(fields, label_column)
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # As programs write whole numbers that come from a table.
    if isinstance(value, bool) or not isinstance(value, int | str) or value == '':
        return None, '' if value is None else f'{label_column!r} there is {json.dumps(value):.60}'
    if (isinstance(value, int) and value >= 1 << 31) or len(str(value)) > _MAX_NAME:
        raise UserError(f'{sample}: {str(value)[:40]!r}... is no label: numbers are below 2**31')
    if isinstance(value, str) and ('\ufffd' in value or '\0' in value):
        raise UserError(f'{sample}: label {value[:40]!r} is not text in UTF-8: write it so')
    return value, ''


def _field(fields: Any, name: str) -> Any:
    """Return a field of a JSON object, or with dots in its name one within others."""
    if isinstance(fields, dict) and name in fields:
        return fields[name]
    for part in name.split('.'):
        fields = fields.get(part) if isinstance(fields, dict) else None
    return fields


def _pack_values(values: list[Any]) -> np.ndarray:
    return np.frombuffer('\n'.join(map(json.dumps, values)).encode(), np.uint8)


def _unpack_values(values: np.ndarray) -> list[Any]:
    return [json.loads(line) for line in bytes(values).decode().splitlines()]


def _join(indices: list[Index]) -> Index:
    """Concatenate the indices of several shards, with one numbering of their labels."""
    values_of = [_unpack_values(index['values']) for index in indices]
    values = sorted({value for values in values_of for value in values}, key=json.dumps)
    number = {value: i for i, value in enumerate(values)}
    labels = [
        np.array([number[value] for value in values], np.int32)[index['label']]
        for values, index in zip(values_of, indices, strict=True)
    ]
    shards = [np.full(len(index['size']), i, np.uint32) for i, index in enumerate(indices)]
    return {
        'shard': np.concatenate(shards),
        **{n: np.concatenate([i[n] for i in indices]) for n in ('offset', 'size', 'kind', 'words')},
        'label': np.concatenate(labels),
        'values': _pack_values(values),
        'left': np.frombuffer(json.dumps(_joined_counts(indices)).encode(), np.uint8),
    }


def _joined_counts(indices: list[Index]) -> dict[str, tuple[int, str]]:
    left: dict[str, tuple[int, str]] = {}
    for index in indices:
        for ending, (count, example) in json.loads(bytes(index['left'])).items():
            before, first = left.get(ending, (0, example))
            left[ending] = before + count, first
    return left


# --- Shards as they come ---------------------------------------------------------------


def shards_of_splits(path: str, key: str) -> dict[str, list[files.Place]]:
    """Return the shards of each split of a path, in order.

    Raises:
      UserError: there is none.
    """
    splits = _find_splits(path, key)
    return {name: [shard.place for shard in shards] for name, shards in splits.items()}


def samples(shard: files.Place, take: Take) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Yield the samples of a shard in order: (name, (offset, size) of its members by ending).

    Args:
      take: from `files.forward`; the caller may use it between samples, on the last one.

    Raises:
      UserError: the shard is damaged, or has two members of one name.
    """
    for name, members in itertools.groupby(_sample_members(shard, take), lambda member: member[0]):
        yield name, _parts(shard, name, members)


def place_of(shard: files.Place, offset: int, size: int) -> str:
    """Return where a member lies, as `Source.place` says it."""
    return _place(shard, offset, size)
