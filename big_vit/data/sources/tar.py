"""Tar shards in the webdataset layout, indexed once and read by offset."""

import concurrent.futures
import fnmatch
import itertools
import json
import re
import tarfile
from collections.abc import Iterator
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
_ORDER = list(KINDS)
# Labels are read while a shard is indexed; longer members are no labels.
_MAX_LABEL_BYTES = 1 << 20
# No split has labels that are numbers as high as this.
_UNLABELLED = -1


def _shards(path: str, key: str) -> dict[str, list[files.Place]]:
    """The shards of each split, in order."""
    at = f'{key}.path'
    expanded = [path]
    while (match := _BRACES.search(expanded[0])) is not None:
        first, last = match.groups()
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


def _members(shard: files.Place) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of the regular files of a tar, in order; nothing is extracted.

    Raises:
      UserError: damaged or truncated; says at which byte.
    """
    size = int(shard.system.info(shard.path)['size'])
    with shard.system.open(shard.path, 'rb') as file:
        at = 0
        try:
            archive = tarfile.open(fileobj=file, mode='r:')  # noqa: SIM115
            # A member is asked for at a time: tarfile would keep all of them.
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]
                if member.isreg():
                    at = member.offset
                    if member.offset_data + member.size > size:
                        raise UserError(
                            f'{shard}: truncated: {member.name} at byte {member.offset} needs '
                            f'{member.offset_data + member.size:,} bytes of {size:,}: copy it again'
                        )
                    yield member.name, member.offset_data, member.size
                at = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
        except (tarfile.TarError, EOFError, OSError) as error:
            raise UserError(
                f'{shard}: damaged or truncated at byte {at:,} ({error}): copy it again'
            ) from error
        if size and at + _BLOCK > size:
            raise UserError(f'{shard}: truncated at byte {size:,}, where its end is missing')


def _index(shard: files.Place, label_column: str) -> dict[str, np.ndarray]:
    """The samples of a shard: members that share a name up to the first dot of its last part."""
    offsets, sizes, kinds, labels = [], [], [], []

    def key_of(member: tuple[str, int, int]) -> str:
        folder, _, base = member[0].rpartition('/')
        return f'{folder}/{base.partition(".")[0]}'

    for name, group in itertools.groupby(_members(shard), key_of):
        parts = {member[0].rpartition('/')[2].partition('.')[2].lower(): member for member in group}
        media = [
            (kind, member)
            for extension, member in parts.items()
            if (kind := kind_of(f'x.{extension}')) is not None and kind != 'text'
        ] or [('text', member) for e, member in parts.items() if kind_of(f'x.{e}') == 'text']
        if not media:
            continue
        label = _label(shard, parts, label_column)
        if label is None:
            has = ', '.join(sorted(parts))
            raise UserError(
                f'{shard}: sample {name.lstrip("/")} has no .cls and no {label_column!r} in a '
                f'.json (it has {has}): set label_column to the one that is meant'
            )
        kind, (_, offset, size) = media[0]
        offsets.append(offset)
        sizes.append(size)
        kinds.append(_ORDER.index(kind))
        labels.append(json.dumps(label))
    values = sorted(set(labels))
    number = {value: i for i, value in enumerate(values)}
    text = '\n'.join(values).encode()
    return {
        'offset': np.array(offsets, np.uint64),
        'size': np.array(sizes, np.uint32),
        'kind': np.array(kinds, np.uint8),
        'label': np.array([number[label] for label in labels], np.int32),
        'values': np.frombuffer(text, np.uint8),
    }


def _label(shard: files.Place, parts: dict[str, Any], label_column: str) -> Any:
    """What a sample says of its class; None if nothing."""

    def text(extension: str) -> str:
        _, offset, size = parts[extension]
        if size > _MAX_LABEL_BYTES:
            raise UserError(f'{shard}: {parts[extension][0]} of {size:,} bytes is no label')
        return files.read_range(shard, offset, size).decode('utf-8', 'replace').strip()

    if label_column in parts:
        word = text(label_column)
        return int(word) if word.isdecimal() else word
    if 'json' in parts:
        try:
            found = json.loads(text('json'))
        except ValueError as error:
            raise UserError(f'{shard}: {parts["json"][0]} is not JSON ({error})') from error
        value = found.get(label_column) if isinstance(found, dict) else None
        if isinstance(value, int | str) and not isinstance(value, bool):
            return value
    return None


def _joined(indices: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Indices of several shards as one, their labels numbered together."""
    values = sorted({v for index in indices for v in bytes(index['values']).decode().split('\n')})
    number = {value: i for i, value in enumerate(values)}
    labels = []
    for index in indices:
        own = bytes(index['values']).decode().split('\n')
        labels.append(np.array([number[v] for v in own], np.int32)[index['label']])
    shards = [np.full(len(index['size']), i, np.uint32) for i, index in enumerate(indices)]
    return {
        'shard': np.concatenate(shards),
        **{n: np.concatenate([i[n] for i in indices]) for n in ('offset', 'size', 'kind')},
        'label': np.concatenate(labels),
        'values': np.frombuffer('\n'.join(values).encode(), np.uint8),
    }


def indexed(shards: list[files.Place], label_column: str) -> dict[str, np.ndarray]:
    """Where each sample of some shards lies, made once and mapped into memory after that.

    Returns:
      {'shard', 'offset', 'size', 'kind', 'label'}: arrays [samples]; 'values' the JSON texts
      of the labels, one a line.
    """

    def make() -> dict[str, np.ndarray]:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            return _joined(list(pool.map(lambda shard: _index(shard, label_column), shards)))

    return files.kept_arrays('tar', files.fingerprint(shards, label_column, 1), make)


def tar(
    split: str,
    path: str,
    label_column: str = 'cls',
    num_classes: int | None = None,
    key: str = 'data',
) -> Source:
    """Webdataset shards: an image (or video, sound, text) and a label under one name.

    Splits are the words train, val, validation, test in the names of the shards, if all have
    one; else all are `train`. Labels are the member NAME.cls (a number or the name of a class), or
    what a member NAME.json has under `label_column`.

    Args:
      split: see `base.parse_split`.
      path: a shard, a folder of shards, a glob, or a range such as train-{0000..0146}.tar.
      num_classes: None for those that occur in the split `train` (or in all).
      key: prefix of the config keys in messages.

    Raises:
      UserError: no shards, a damaged one, or samples without a label.
    """
    splits = _shards(path, key)
    title = f'tar:{files.place(path, key).name}'
    found: dict[str, dict[str, np.ndarray]] = {}

    def index_of(name: str) -> dict[str, np.ndarray]:
        if name not in found:
            found[name] = indexed(splits[name], label_column)
            if not len(found[name]['size']):
                raise UserError(
                    f'{key}.path: no sample with an image, video, sound or text in {path}'
                )
        return found[name]

    def whole(name: str) -> Source:
        index, shards = index_of(name), splits[name]
        known = index_of('train' if 'train' in splits else name)
        values = [json.loads(v) for v in bytes(known['values']).decode().split('\n')]
        numbers, count, classes = class_numbers(values, num_classes, title, key)
        own = [json.loads(v) for v in bytes(index['values']).decode().split('\n')]
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

        def load(indices: np.ndarray) -> Columns:
            return {kind: read(indices.tolist()), 'label': labels[indices]}

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
