"""Folders of media files, one sub-folder per class."""

import functools
import os
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from big_vit.data import files
from big_vit.data.sources.base import Columns, Source, cut
from big_vit.errors import UserError

KINDS = {
    'image': ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff', '.gif', '.ppm'),
    'video': ('.mp4', '.avi', '.mov', '.mkv', '.webm'),
    'audio': ('.wav', '.flac', '.ogg', '.mp3'),
    'text': ('.txt',),
}
_KIND_OF = {extension: kind for kind, extensions in KINDS.items() for extension in extensions}
_SPLIT = re.compile(r'(train|training|val|valid|validation|dev|test|testing|eval)\w*', re.I)


def kind_of(name: str) -> str | None:
    """'image', 'video', 'audio' or 'text' by the extension of a file's name; None for others."""
    return _KIND_OF.get(os.path.splitext(name)[1].lower())  # noqa: PTH122  Half a Path's time.


class Names:
    """Many texts in one piece of memory; as Python objects a million would take 100 MB more."""

    def __init__(self, names: Iterator[str]):
        data, ends = bytearray(), [0]
        for name in names:
            data += name.encode('utf-8', 'surrogateescape')
            ends.append(len(data))
        self._data, self._ends = bytes(data), np.array(ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        piece = self._data[self._ends[index] : self._ends[index + 1]]
        return piece.decode('utf-8', 'surrogateescape')


class _Split(NamedTuple):
    names: Names
    labels: np.ndarray
    kind: str


def _walk(folder: files.Place) -> Iterator[str]:
    """Paths of all files below, in order; without asking the disk for sizes."""
    if not folder.is_local:
        yield from (entry.name for entry in files.walk(folder))
        return
    pending = ['']
    seen: set[tuple[int, int]] = set()
    while pending:
        below = pending.pop()
        here = os.path.join(folder.path, below)  # noqa: PTH118
        info = os.stat(here)  # noqa: PTH116
        if (info.st_dev, info.st_ino) in seen:  # A link to a folder that it lies in.
            continue
        seen.add((info.st_dev, info.st_ino))
        with os.scandir(here) as found:
            every = sorted((e for e in found if e.name[0] != '.'), key=lambda e: e.name)
        for entry in every:
            if not entry.is_dir():
                yield below + entry.name
        pending += [f'{below}{e.name}/' for e in reversed(every) if e.is_dir()]


def _scan(folder: files.Place, classes: list[str], key: str) -> _Split:
    """All media files of a split."""
    labels: list[int] = []
    kinds: dict[str, str] = {}
    others: set[str] = set()

    def names() -> Iterator[str]:
        for label, name in enumerate(classes):
            for file in _walk(folder / name):
                kind = kind_of(file)
                if kind is None:
                    others.add('.' + file.rpartition('.')[2] if '.' in file else 'no extension')
                    continue
                kinds.setdefault(kind, f'{name}/{file}')
                labels.append(label)
                yield f'{name}/{file}'

    try:
        found = Names(names())
    except OSError as error:
        raise UserError(f'{key}.path: cannot read {folder}: {error.strerror or error}') from error
    if len(kinds) > 1:
        (one, a), (other, b) = list(kinds.items())[:2]
        raise UserError(
            f'{key}.path: {folder} holds {one} and {other} files ({a}, {b}): '
            'keep those of one kind in it'
        )
    if not kinds:
        seen = f' (only files with {", ".join(sorted(others)[:6])})' if others else ''
        known = ', '.join(KINDS['image'])
        raise UserError(
            f'{key}.path: no image, video, sound or text in {folder}{seen}: images end in {known}'
        )
    return _Split(found, np.array(labels, np.int32), next(iter(kinds)))


def loader(kind: str, read: Callable[[int], bytes]) -> Callable[[list[int]], list]:
    """What reads examples of a kind: files as they are, texts as str."""
    if kind != 'text':
        return lambda indices: [read(i) for i in indices]
    return lambda indices: [read(i).decode('utf-8', 'replace') for i in indices]


def folder(split: str, path: str, num_classes: int | None = None, key: str = 'data') -> Source:
    """Media files in PATH/SPLIT/CLASS/..., or in PATH/CLASS/... with one split named `train`.

    Classes are the names of the folders in order, those of the split `train` where there is one.
    Files are known by their extensions (KINDS); others, and hidden ones, are left out. Files may
    lie deeper than their class, and come in the order of their paths.

    Args:
      split: see `base.parse_split`; parts are parts of a fixed random order.
      path: local, or anything that fsspec knows.
      num_classes: None for the number of folders.
      key: prefix of the config keys in messages.

    Raises:
      UserError: no such folder, nothing in it, or splits whose classes differ.
    """
    root = files.place(path, f'{key}.path')
    try:
        if not files.is_folder(root):
            raise UserError(f'{key}.path: {root} is not a folder: it must hold one per class')
        below = [entry.name for entry in files.entries(root) if entry.is_folder]
    except OSError as error:
        raise UserError(f'{key}.path: cannot read {root}: {error.strerror or error}') from error
    if not below:
        raise UserError(
            f'{key}.path: {root} has no folders: put the files of each class into one of its own, '
            "or use name='table' with a file of labels"
        )
    splits = below if all(_SPLIT.fullmatch(name) for name in below) else []
    places = {name: root / name for name in splits} or {'train': root}
    first = 'train' if 'train' in places else next(iter(places))

    @functools.cache
    def classes_of(name: str) -> list[str]:
        found = [entry.name for entry in files.entries(places[name]) if entry.is_folder]
        if not found:
            raise UserError(f'{key}.path: {places[name]} has no folders, one per class')
        return found

    @functools.cache
    def scanned(name: str) -> _Split:
        own, known = classes_of(name), classes_of(first)
        strange = sorted(set(own) - set(known))
        if strange:
            raise UserError(
                f'{key}.path: {places[name]} has classes that {first} has not '
                f'({", ".join(strange[:5])}): a model cannot be scored on what it never saw'
            )
        return _scan(places[name], own, key)

    def whole(name: str) -> Source:
        names, labels, kind = scanned(name)
        known = classes_of(first)
        table = np.array([known.index(c) for c in classes_of(name)], np.int32)
        labels = table[labels]
        count = num_classes or len(known)
        if count < len(known):
            raise UserError(
                f'{key}.num_classes is {count} but {root} has {len(known)} classes: '
                'set at least that'
            )
        place = places[name]
        read = loader(kind, lambda index: files.read(place / names[index]))

        def load(indices: np.ndarray) -> Columns:
            return {kind: read(indices.tolist()), 'label': labels[indices]}

        return Source(
            name=f'folder:{root.name}',
            split=name,
            length=len(labels),
            num_classes=count,
            image_shape=None,
            load=load,
            in_memory=False,
            class_names=tuple(known) if count == len(known) else None,
            labels=lambda: labels,
            where=lambda index: str(place / names[index]),
        )

    return cut(f'folder:{root.name}', places, whole, split, key, by_class=True)
