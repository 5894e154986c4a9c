"""Tar shards in the webdataset layout, indexed once and read by offset."""

import concurrent.futures
import fnmatch
import itertools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from big_vit.data import files
from big_vit.data.sources.base import Columns, Source, cut
from big_vit.data.sources.folder import KINDS, kind_of, loader
from big_vit.data.sources.table import class_numbers
from big_vit.errors import UserError

_SPLIT = re.compile(r'(?:^|[^a-z])(train|validation|valid|val|test|dev|eval)(?:[^a-z]|$)', re.I)
_BRACES = re.compile(r'\{(\d+)\.\.(\d+)\}')
_BLOCK = 512
_ZEROS = bytes(_BLOCK)
# Links, devices, folders and pipes.
_WITHOUT_DATA = (b'1', b'2', b'3', b'4', b'5', b'6')
# How gzip, bzip2, xz and Zstandard files begin.
_COMPRESSED = (b'\x1f\x8b', b'BZh', b'\xfd7zXZ', b'\x28\xb5\x2f\xfd')
_MAX_SHARDS = 1_000_000
_ORDER = list(KINDS)
# Labels are read while a shard is indexed; longer members are no labels.
_MAX_LABEL_BYTES = 1 << 20
_MAX_NAME = 1000
_DIGITS = re.compile(r'[0-9]{1,18}')


def _shards(path: str, key: str) -> dict[str, list[files.Place]]:
    """The shards of each split, in order."""
    at = f'{key}.path'
    expanded = [path]
    while (match := _BRACES.search(expanded[0])) is not None:
        first, last = match.groups()
        if (int(last) - int(first)) * len(expanded) > _MAX_SHARDS:
            raise UserError(f'{at}: {match[0]} are more than {_MAX_SHARDS:,} shards')
        numbers = [f'{n:0{len(first)}d}' for n in range(int(first), int(last) + 1)]
        expanded = [
            name[: match.start()] + number + name[match.end() :]
            for name in expanded
            for number in numbers
        ]
        if not numbers:
            raise UserError(f'{at}: {match[0]} counts backwards')
    found = []
    for name in expanded:
        here = files.place(name, at)
        if any(sign in here.name for sign in '*?['):
            home = here._replace(path=here.path.rpartition('/')[0] or '.')
            names = [e.name for e in files.entries(home)] if files.is_folder(home) else []
            found += [home / n for n in names if fnmatch.fnmatch(n, here.name)]
        elif files.is_folder(here):
            found += [here / e.name for e in files.entries(here) if e.name.endswith('.tar')]
            if not found and any('.tar' in e.name for e in files.entries(here)):
                raise UserError(
                    f'{at}: {here} holds compressed archives, in which nothing can be found '
                    'without reading all: decompress them (gzip -d)'
                )
        elif files.exists(here):
            found.append(here)
        else:
            raise UserError(f'{at}: there is no shard {here}')
    if not found:
        raise UserError(f'{at}: no .tar file in {path}')
    for shard in found:
        if not shard.name.endswith('.tar'):
            raise UserError(
                f'{at}: {shard} is not a plain .tar file: if it is compressed, decompress it'
            )
    splits: dict[str, list[files.Place]] = {}
    words = [_SPLIT.search(shard.name.removesuffix('.tar')) for shard in found]
    for shard, word in zip(found, words, strict=True):
        splits.setdefault(word[1].lower() if word and all(words) else 'train', []).append(shard)
    return splits


def _number(field: bytes) -> int:
    """A number of a header: octal digits, or behind a byte 0x80 as it is; ValueError."""
    if field[:1] == b'\x80':
        return int.from_bytes(field[1:], 'big')
    digits = field.split(b'\0', 1)[0].strip()
    if digits and not digits.isdigit():
        raise ValueError('no number is there')
    return int(digits or b'0', 8)


def _pax(data: bytes) -> dict[bytes, bytes]:
    """The entries 'LENGTH KEY=VALUE\\n' of an extended header; ValueError."""
    found = {}
    while data:
        digits, _, _ = data.partition(b' ')
        length = int(digits)
        entry = data[len(digits) + 1 : length - 1]
        if length <= len(digits) + 1 or data[length - 1 : length] != b'\n' or b'=' not in entry:
            raise ValueError('a broken extended header')
        name, _, value = entry.partition(b'=')
        found[name] = value
        data = data[length:]
    return found


def _members(
    shard: files.Place, take: Callable[[int, int], bytes]
) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of the regular files of a tar, in order; nothing is extracted.

    The headers are those of POSIX ustar and pax and of GNU tar. The tarfile module is slower, and
    takes a damaged header for the end of the archive.

    Args:
      take: from `files.forward`; may be used between members, to look into the last one.

    Raises:
      UserError: damaged or truncated; says at which byte.
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
            checked = sum(header) - sum(header[148:156]) + 8 * 32
            if _number(header[148:156]) != checked:
                raise ValueError('no header is there')
            kind = header[156:157]
            size = int(extended.get(b'size', -1))
            if size < 0:
                size = _number(header[124:136])
            data, after = at + _BLOCK, at + _BLOCK + -(-size // _BLOCK) * _BLOCK
            if kind in _WITHOUT_DATA:
                after = data
            elif data + size > end:
                name = header[:100].split(b'\0', 1)[0].decode('utf-8', 'surrogateescape')
                raise UserError(
                    f'{shard}: truncated: {name} at byte {at:,} needs {data + size:,} bytes of '
                    f'{end:,}: copy it again'
                )
            if kind in (b'L', b'x') and size > _MAX_LABEL_BYTES:
                raise ValueError(f'a name of {size:,} bytes')
            if kind == b'L':
                long_name = take(data, size).split(b'\0', 1)[0]
            elif kind == b'x':
                extended = _pax(take(data, size))
            elif kind not in (b'K', b'g'):
                sparse = kind == b'S' or any(key.startswith(b'GNU.sparse') for key in extended)
                if sparse:
                    raise UserError(f'{shard}: a sparse file at byte {at:,}: write it without -S')
                if kind in (b'0', b'\0', b'7'):
                    path = extended.get(b'path') or long_name
                    if not path:
                        path = header[:100].split(b'\0', 1)[0]
                        prefix = header[345:500].split(b'\0', 1)[0]
                        if header[257:263] == b'ustar\0' and prefix:
                            path = prefix + b'/' + path
                    yield path.decode('utf-8', 'surrogateescape'), data, size
                long_name, extended = b'', {}
        except ValueError as error:
            raise UserError(
                f'{shard}: damaged or truncated at byte {at:,} ({error}): copy it again'
            ) from error
        at = after
    raise UserError(f'{shard}: truncated at byte {end:,}, where its end is missing')


def _samples(
    shard: files.Place, take: Callable[[int, int], bytes]
) -> Iterator[tuple[str, str, int, int]]:
    """(name of the sample, extension, offset, size) of members; others and hidden ones are not."""
    for member, offset, size in _members(shard, take):
        folder, slash, base = member.rpartition('/')
        stem, _, extension = base.partition('.')
        if stem and extension:
            yield f'{folder}{slash}{stem}', extension.lower(), offset, size


def _index(shard: files.Place, label_column: str, text_column: str | None) -> dict[str, np.ndarray]:
    """The samples of a shard: members that share a name up to the first dot of its last part."""
    offsets, sizes, kinds, labels = [], [], [], []
    words: list[tuple[int, int]] = []
    number: dict[int | str, int] = {}
    take = files.forward(shard)
    column = label_column.lower()
    spoken = None if text_column is None else text_column.lower()
    for name, group in itertools.groupby(_samples(shard, take), lambda member: member[0]):
        parts: dict[str, tuple[int, int]] = {}
        texts: dict[str, str] = {}
        for _, extension, offset, size in group:
            parts[extension] = offset, size
            if extension in (column, 'json'):
                if size > _MAX_LABEL_BYTES:
                    raise UserError(f'{shard}: {name}.{extension} of {size:,} bytes is no label')
                texts[extension] = take(offset, size).decode('utf-8', 'replace').strip()
        # Of a.png and a.mask.png, the first is the image, whichever comes first.
        media = [
            (kind == 'text', '.' in extension, kind, place)
            for extension, place in parts.items()
            if extension not in (column, spoken) and (kind := kind_of(f'x.{extension}')) is not None
        ]
        if not media:
            continue
        label = _label(f'{shard}: {name}', texts, label_column)
        if spoken is not None:
            # Pictures with captions have no classes, unless they say some.
            label = 0 if label is None else label
            if spoken not in parts:
                raise UserError(
                    f'{shard}: sample {name} has no .{spoken} (it has {", ".join(sorted(parts))}): '
                    'set text_column to the member with its words'
                )
            words.append(parts[spoken])
        if label is None:
            has = ', '.join(sorted(parts))
            raise UserError(
                f'{shard}: sample {name} has no .cls and no {label_column!r} in a '
                f'.json (it has {has}): set label_column to the one that is meant'
            )
        _, _, kind, (offset, size) = min(media, key=lambda one: one[:2])
        if size >= 1 << 32:
            raise UserError(f'{shard}: {name} at byte {offset:,} has {size:,} bytes, 4 GiB or more')
        offsets.append(offset)
        sizes.append(size)
        kinds.append(_ORDER.index(kind))
        labels.append(number.setdefault(label, len(number)))
    return {
        'offset': np.array(offsets, np.uint64),
        'size': np.array(sizes, np.uint32),
        'kind': np.array(kinds, np.uint8),
        'label': np.array(labels, np.int32),
        'words': np.array(words, np.uint64).reshape(len(words), 2),
        'values': _packed(list(number)),
    }


def _label(sample: str, texts: dict[str, str], label_column: str) -> int | str | None:
    """What the members of a sample say of its class; None if nothing."""
    value: Any = texts.get(label_column.lower())
    if value is not None and _DIGITS.fullmatch(value):
        value = int(value)
    elif value is None and 'json' in texts:
        try:
            found = json.loads(texts['json'])
        except (ValueError, RecursionError) as error:
            raise UserError(f'{sample}.json is not JSON ({error})') from error
        value = found.get(label_column) if isinstance(found, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    if (isinstance(value, int) and value >= 1 << 31) or len(str(value)) > _MAX_NAME:
        raise UserError(f'{sample}: {str(value)[:40]!r}... is no label: numbers are below 2**31')
    return value


def _packed(values: list[Any]) -> np.ndarray:
    """Values of labels as JSON texts, one a line, for `_unpacked`."""
    return np.frombuffer('\n'.join(map(json.dumps, values)).encode(), np.uint8)


def _unpacked(values: np.ndarray) -> list[Any]:
    return [json.loads(line) for line in bytes(values).decode().splitlines()]


def _joined(indices: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Indices of several shards as one, their labels numbered together."""
    own = [_unpacked(index['values']) for index in indices]
    values = sorted({value for part in own for value in part}, key=json.dumps)
    number = {value: i for i, value in enumerate(values)}
    labels = [
        np.array([number[value] for value in part], np.int32)[index['label']]
        for part, index in zip(own, indices, strict=True)
    ]
    shards = [np.full(len(index['size']), i, np.uint32) for i, index in enumerate(indices)]
    return {
        'shard': np.concatenate(shards),
        **{n: np.concatenate([i[n] for i in indices]) for n in ('offset', 'size', 'kind', 'words')},
        'label': np.concatenate(labels),
        'values': _packed(values),
    }


def indexed(
    shards: list[files.Place], label_column: str, text_column: str | None = None
) -> dict[str, np.ndarray]:
    """Where each sample of some shards lies, made once and mapped into memory after that.

    Returns:
      {'shard', 'offset', 'size', 'kind', 'label'}: arrays [samples]; 'words' where the member
      `text_column` of each lies, [samples, 2], or none; 'values' the JSON texts of the labels,
      one a line.
    """

    def make() -> dict[str, np.ndarray]:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            each = pool.map(lambda shard: _index(shard, label_column, text_column), shards)
            return _joined(list(each))

    told = files.fingerprint(shards, f'{label_column}\0{text_column or ""}', 3)
    return files.kept_arrays('tar', told, make)


def tar(
    split: str,
    path: str,
    label_column: str = 'cls',
    num_classes: int | None = None,
    key: str = 'data',
    text_column: str | None = None,
) -> Source:
    """Webdataset shards: an image (or video, sound, text) and a label under one name.

    Splits are the words train, val, validation, test in the names of the shards, if all have
    one; else all are `train`. Labels are the member NAME.cls (a number or the name of a class), or
    what a member NAME.json has under `label_column`. With `text_column` the words that go with
    each image are the member NAME of that ending, as img2dataset writes them, and a sample without
    a label is of class 0.

    Args:
      split: see `base.parse_split`.
      path: a shard, a folder of shards, a glob, or a range such as train-{0000..0146}.tar.
      num_classes: None for those that occur in the split `train` (or in all).
      key: prefix of the config keys in messages.
      text_column: such as 'txt'.

    Raises:
      UserError: no shards, a damaged one, or samples without a label or words.
    """
    splits = _shards(path, key)
    title = f'tar:{files.place(path, key).name}'
    found: dict[str, dict[str, np.ndarray]] = {}

    def index_of(name: str) -> dict[str, np.ndarray]:
        if name not in found:
            found[name] = indexed(splits[name], label_column, text_column)
            if not len(found[name]['size']):
                raise UserError(
                    f'{key}.path: no sample with an image, video, sound or text in {path}'
                )
        return found[name]

    def whole(name: str) -> Source:
        index, shards = index_of(name), splits[name]
        known = index_of('train' if 'train' in splits else name)
        values = _unpacked(known['values'])
        numbers, count, classes = class_numbers(values, num_classes, title, key)
        own = _unpacked(index['values'])
        strange = [v for v in own if v not in numbers]
        if strange and (classes is not None or not isinstance(strange[0], int)):
            raise UserError(
                f'{key}.path: shards of {name} have the class {strange[0]!r}, those of train not'
            )
        table = np.array([numbers.get(v, v) for v in own], np.int32)
        labels = table[index['label']]
        if labels.size and labels.max() >= count:
            raise UserError(
                f'{key}.num_classes is {count} but shards of {name} have label {labels.max()}: '
                f'set {key}.num_classes={labels.max() + 1} or more'
            )
        kinds = np.unique(index['kind'])
        if len(kinds) > 1:
            names = ' and '.join(_ORDER[k] for k in kinds)
            raise UserError(f'{key}.path: shards of {name} hold {names}: keep those of one kind')
        shard, offset, size = index['shard'], index['offset'], index['size']
        kind = _ORDER[int(kinds[0])]
        read = loader(
            kind, lambda i: files.read_range(shards[shard[i]], int(offset[i]), int(size[i]))
        )

        words = index['words']
        say = loader(
            'text', lambda i: files.read_range(shards[shard[i]], *(int(n) for n in words[i]))
        )

        def load(indices: np.ndarray) -> Columns:
            found = {kind: read(indices.tolist()), 'label': labels[indices]}
            return found if text_column is None else {**found, 'text': say(indices.tolist())}

        return Source(
            name=title,
            split=name,
            length=len(size),
            num_classes=count,
            image_shape=None,
            load=load,
            in_memory=False,
            class_names=classes,
            labels=lambda: labels,
            where=lambda i: f'{shards[shard[i]]} at byte {offset[i]:,} ({size[i]:,} bytes)',
        )

    return cut(title, splits, whole, split, key)
