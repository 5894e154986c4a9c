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

from big_vit.data import files
from big_vit.data.decode import is_image
from big_vit.data.sources.base import Columns, Request, Shard, Source
from big_vit.data.sources.classes import infer_classes
from big_vit.data.sources.media import KINDS, LeftOut, is_missed, kind_of, loader, main_kind
from big_vit.data.sources.splits import cut
from big_vit.errors import UserError, failure_at

_SPLIT = re.compile(r'(?:^|[^a-z])(train|validation|valid|val|test|dev|eval)(?:[^a-z]|$)', re.I)
_BRACES = re.compile(r'\{(\d+)\.\.(\d+)\}')
_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_REGULAR = (b'0', b'\0', b'7')
# Links, devices, folders and pipes.
_WITHOUT_DATA = (b'1', b'2', b'3', b'4', b'5', b'6')
# Magic numbers of gzip, bzip2, xz and Zstandard.
_COMPRESSED = (b'\x1f\x8b', b'BZh', b'\xfd7zXZ', b'\x28\xb5\x2f\xfd')
_MAX_SHARDS = 1_000_000
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
    """The media file of a sample, its label, and (offset, size) of its text if there is one."""

    offset: int
    size: int
    kind: str
    label: int | str
    text: tuple[int, int] | None


def tar(
    request: Request, *, path: str, label_column: str = 'cls', text_column: str | None = None
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

    Raises:
      UserError: no shards, a damaged one, samples without a label or text, two of one name, or
        many without a file that can be read.
    """
    key = request.key
    splits = _find_splits(path, key)
    title = f'tar:{files.place(path, key).name}'

    @functools.cache
    def index_of(name: str) -> Index:
        index = indexed(splits[name], label_column, text_column, request.labelled)
        if not len(index['size']):
            left_out = LeftOut()
            left_out.update(json.loads(bytes(index['left'])))
            what = f' ({left_out})' if str(left_out) else ''
            raise UserError(
                f'{key}.path: no sample with an image, video, sound or text in {path}{what}'
            )
        return index

    def open_split(name: str) -> Source:
        index, shards = index_of(name), splits[name]
        known = index_of('train' if 'train' in splits else name)
        classes = infer_classes(_unpack_values(known['values']), request, title)
        values = _unpack_values(index['values'])
        labels = classes.numbers(values, f'{key}.path: {title}', name, 'train', key)[index['label']]
        kind, rows = _examples(index, f'{title}, {name}', key)
        shard, offset, size = (index[n][rows] for n in ('shard', 'offset', 'size'))
        texts, labels = (
            index['words'] if text_column is None else index['words'][rows],
            labels[rows],
        )

        def read(i: int) -> bytes:
            return files.read_range(shards[shard[i]], int(offset[i]), int(size[i]))

        def read_text(i: int) -> bytes:
            return files.read_range(shards[shard[i]], *(int(n) for n in texts[i]))

        load_media, load_texts = loader(kind, read), loader('text', read_text)

        def load(indices: np.ndarray) -> Columns:
            columns = {kind: load_media(indices.tolist()), 'label': labels[indices]}
            return (
                columns if text_column is None else columns | {'text': load_texts(indices.tolist())}
            )

        return Source(
            name=title,
            split=name,
            length=len(size),
            num_classes=classes.num_classes,
            image_shape=None,
            load=load,
            in_memory=False,
            class_names=classes.names,
            labels=lambda: labels,
            where=lambda i: _place(shards[shard[i]], int(offset[i]), int(size[i])),
            shard_lengths=np.bincount(shard, minlength=len(shards)),
            shards=lambda: [Shard(file.name, *files.size_and_stamp(file)) for file in shards],
        )

    return cut(title, splits, open_split, request)


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


def _examples(index: Index, where: str, key: str) -> tuple[str, slice | np.ndarray]:
    """Return the kind of a split and its samples; texts beside media are none. Tells of the rest.

    Raises:
      UserError: it has media of several kinds, or much of it cannot be read.
    """
    present = [_KINDS[k] for k in np.unique(index['kind'])]
    if len(set(present) - {'text'}) > 1:
        names = ' and '.join(present)
        raise UserError(f'{key}.path: shards of {where} hold {names}: keep those of one kind')
    kind = main_kind(present)
    assert kind is not None
    rows: slice | np.ndarray = slice(None)
    taken = len(index['kind'])
    if len(present) > 1:
        rows = np.flatnonzero(index['kind'] == _KINDS.index(kind))
        taken = len(rows)
    left_out = LeftOut()
    left_out.update(json.loads(bytes(index['left'])))
    for _ in range(len(index['kind']) - taken):
        left_out.add('x.txt')
    left_out.tell(where, taken, kind, key)
    return kind, rows


# --- Shards ----------------------------------------------------------------------------


def _find_splits(path: str, key: str) -> dict[str, list[files.Place]]:
    """Return the shards of each split, in order."""
    key = f'{key}.path'
    shards: list[files.Place] = []
    for name in _expand_braces(path, key):
        shards += _find_shards(name, key, is_first=not shards)
    if not shards:
        raise UserError(f'{key}: no .tar file in {path}')
    for shard in shards:
        if not shard.name.endswith('.tar'):
            raise UserError(
                f'{key}: {shard} is not a plain .tar file: if it is compressed, decompress it'
            )
    splits: dict[str, list[files.Place]] = {}
    words = [_SPLIT.search(shard.name.removesuffix('.tar')) for shard in shards]
    for shard, word in zip(shards, words, strict=True):
        splits.setdefault(word[1].lower() if word and all(words) else 'train', []).append(shard)
    return splits


def _expand_braces(path: str, key: str) -> list[str]:
    names = [path]
    while (match := _BRACES.search(names[0])) is not None:
        first, last = match.groups()
        if (int(last) - int(first)) * len(names) > _MAX_SHARDS:
            raise UserError(f'{key}: {match[0]} are more than {_MAX_SHARDS:,} shards')
        numbers = [f'{n:0{len(first)}d}' for n in range(int(first), int(last) + 1)]
        if not numbers:
            raise UserError(f'{key}: {match[0]} counts backwards')
        names = [
            name[: match.start()] + number + name[match.end() :]
            for name in names
            for number in numbers
        ]
    return names


def _find_shards(name: str, key: str, is_first: bool) -> list[files.Place]:
    """Find the shards of a path: a file, a folder or a glob; `is_first` if none came before."""
    place = files.place(name, key)
    if any(sign in place.name for sign in '*?['):
        parent = place._replace(path=place.path.rpartition('/')[0] or '.')
        names = [e.name for e in files.entries(parent)] if files.is_folder(parent) else []
        return [parent / n for n in names if fnmatch.fnmatch(n, place.name)]
    if files.is_folder(place):
        names = [entry.name for entry in files.entries(place)]
        shards = [place / name for name in names if name.endswith('.tar')]
        if is_first and not shards and any('.tar' in name for name in names):
            raise UserError(
                f'{key}: {place} holds compressed archives, in which nothing can be found '
                'without reading all: decompress them (gzip -d)'
            )
        return shards
    if files.exists(place):
        return [place]
    raise UserError(f'{key}: there is no shard {place}')


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
    end = int(shard.system.info(shard.path)['size'])
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
    shards: list[files.Place],
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
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            indices = pool.map(
                lambda shard: _index(shard, label_column, text_column, labelled), shards
            )
            return _join(list(indices))

    options = f'{label_column}\0{text_column or ""}' + ('' if labelled else '\0unlabelled')
    mark = files.fingerprint(shards, options, 4)
    return files.kept_arrays('tar', mark, build)


def _index(shard: files.Place, label_column: str, text_column: str | None, labelled: bool) -> Index:
    """Index a shard, whose samples are members with one name up to its first dot."""
    take = files.forward(shard)
    samples: list[_Sample] = []
    left: dict[str, tuple[int, str]] = {}
    unlabelled_text: UserError | None = None
    try:
        groups = itertools.groupby(_sample_members(shard, take), lambda member: member[0])
        for name, group in groups:
            parts = _parts(shard, name, group)
            try:
                sample = _sample(shard, name, parts, take, label_column, text_column, labelled)
            except _UnlabelledText as error:  # A README beside images, unless there are no images.
                unlabelled_text = unlabelled_text or UserError(str(error))
                continue
            if sample is not None:
                samples.append(sample)
                continue
            missed = next((f'.{part}' for part in parts if is_missed(f'x.{part}')), None)
            if missed is not None:
                count, example = left.get(missed, (0, f'{name}{missed}'))
                left[missed] = count + 1, example
    except OSError as error:
        kind = failure_at(shard, error)
        raise kind(f'{shard}: cannot be read: {error.strerror or error}') from error
    if unlabelled_text is not None and not samples:
        raise unlabelled_text
    values: dict[int | str, int] = {}
    texts = [sample.text for sample in samples if sample.text is not None]
    return {
        'offset': np.array([sample.offset for sample in samples], np.uint64),
        'size': np.array([sample.size for sample in samples], np.uint32),
        'kind': np.array([_KINDS.index(sample.kind) for sample in samples], np.uint8),
        'label': np.array([values.setdefault(s.label, len(values)) for s in samples], np.int32),
        'words': np.array(texts, np.uint64).reshape(len(texts), 2),
        'values': _pack_values(list(values)),
        'left': np.frombuffer(json.dumps(left).encode(), np.uint8),
    }


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
    if label is None and (text_name is not None or not labelled):
        label = 0  # Captioned images need no classes.
    if text_name is not None and text_name not in parts:
        raise UserError(
            f'{shard}: sample {name} has no .{text_name} (it has {present}): '
            'set text_column to the member with its words'
        )
    _, _, kind, (offset, size) = min(media, key=lambda candidate: candidate[:2])
    if label is None:
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
