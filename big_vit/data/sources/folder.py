"""Folders of media files, one sub-folder per class."""

import errno
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
# With what may follow, as in train2017 or test_clean; a devkit or a valley is no split.
_SPLIT = re.compile(
    r'(train(ing|val)?|val(id|idation)?|dev|test(ing)?|eval(uation)?|extra)([\d_.-][\w.-]*)?', re.I
)


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


def listed(place: files.Place, key: str) -> list[tuple[str, bool]]:
    """(name, whether a folder) of what a folder holds, as `files.entries` without the sizes.

    Raises:
      UserError: it cannot be read.
    """
    try:
        if not place.is_local:
            return [(entry.name, entry.is_folder) for entry in files.entries(place)]
        with os.scandir(place.path) as found:
            return sorted((e.name, e.is_dir()) for e in found if e.name[0] != '.')
    except OSError as error:
        raise _unreadable(place, error, key) from error


def _folders(place: files.Place, key: str) -> list[str]:
    return [name for name, is_folder in listed(place, key) if is_folder]


def _unreadable(place: files.Place, error: OSError, key: str) -> UserError:
    at = error.filename or place
    return UserError(f'{key}.path: cannot read {at}: {error.strerror or error}')


def _walk(folder: files.Place) -> Iterator[str]:
    """Paths of all files below, in the order of `files.walk`; without asking for sizes.

    Raises:
      OSError: a folder cannot be read, or a link to a media file leads nowhere.
    """
    if not folder.is_local:
        yield from (entry.name for entry in files.walk(folder))
        return
    seen: set[tuple[int, int]] = set()

    def below(path: str, prefix: str) -> Iterator[str]:
        info = os.stat(path)  # noqa: PTH116
        if (info.st_dev, info.st_ino) in seen:  # A link to a folder that it lies in.
            return
        seen.add((info.st_dev, info.st_ino))
        with os.scandir(path) as found:
            every = sorted((e for e in found if e.name[0] != '.'), key=lambda e: e.name)
        for entry in every:
            if entry.is_dir():
                yield from below(entry.path, f'{prefix}{entry.name}/')
            elif entry.is_file():
                yield prefix + entry.name
            elif entry.is_symlink() and kind_of(entry.name):
                raise FileNotFoundError(errno.ENOENT, 'it is a link to nothing', entry.path)

    yield from below(folder.path, '')


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
                    others.add(os.path.splitext(file)[1] or 'no extension')  # noqa: PTH122
                    continue
                kinds.setdefault(kind, f'{name}/{file}')
                labels.append(label)
                yield f'{name}/{file}'

    try:
        found = Names(names())
    except OSError as error:
        raise _unreadable(folder, error, key) from error
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


def split_folders(root: files.Place, key: str = 'data') -> list[str]:
    """The folders of splits in a dataset's folder; none where its folders are classes.

    Raises:
      UserError: no such folder, nothing in it, or splits beside other folders.
    """
    if not files.is_folder(root):
        raise UserError(f'{key}.path: {root} is not a folder: it must hold one per class')
    below = _folders(root, key)
    if not below:
        raise UserError(
            f'{key}.path: {root} has no folders: put the files of each class into one of its own, '
            "or use name='table' with a file of labels"
        )
    splits = [name for name in below if _SPLIT.fullmatch(name)]
    if len(splits) < len(below):
        # A class may be called train, but then it has pictures and not folders of classes.
        odd = next((name for name in splits if _folders(root / name, key)), None)
        if odd is not None:
            other = next(name for name in below if name not in splits)
            raise UserError(
                f'{key}.path: {root} has folders of splits ({odd}) and others ({other}): '
                'move the others away, or rename a class that is called so'
            )
        return []
    return splits


def folder(split: str, path: str, num_classes: int | None = None, key: str = 'data') -> Source:
    """Media files in PATH/SPLIT/CLASS/..., or in PATH/CLASS/... with one split named `train`.

    Classes are the names of the folders in order, those of the split `train` where there is one
    (else of the first that begins so, else of the first). The folders of PATH are splits if all
    are named as such are: train, val, test, dev, extra, train2017, test_clean.
    Files are known by their extensions (KINDS); others, and hidden ones, are left out. Files may
    lie deeper than their class, and come in the order of their paths.

    Args:
      split: see `base.parse_split`; parts are parts of a fixed random order.
      path: local, or anything that fsspec knows.
      num_classes: None for the number of folders.
      key: prefix of the config keys in messages.

    Raises:
      UserError: no such folder, nothing in it, files of several kinds, splits beside other
        folders, a class without files, or one that the split `train` has not.
    """
    root = files.place(path, f'{key}.path')
    splits = split_folders(root, key)
    places = {name: root / name for name in splits} or {'train': root}
    first = min(places, key=lambda n: (n != 'train', not n.lower().startswith('train'), n))

    @functools.cache
    def classes_of(name: str) -> dict[str, int]:
        found = _folders(places[name], key)
        if not found:
            raise UserError(f'{key}.path: {places[name]} has no folders, one per class')
        return {word: number for number, word in enumerate(found)}

    @functools.cache
    def scanned(name: str) -> _Split:
        own, known = classes_of(name), classes_of(first)
        strange = [word for word in own if word not in known]
        if strange:
            raise UserError(
                f'{key}.path: {places[name]} has classes that {first} has not '
                f'({", ".join(strange[:5])}): a model cannot be scored on what it never saw'
            )
        found = _scan(places[name], list(own), key)
        counts = np.bincount(found.labels, minlength=len(own))
        empty = [word for word, number in own.items() if not counts[number]]
        if empty and name == first:
            raise UserError(
                f'{key}.path: {places[name]} has folders without {found.kind} files '
                f'({", ".join(empty[:5])}), which would be classes: remove them'
            )
        return found

    def whole(name: str) -> Source:
        names, labels, kind = scanned(name)
        known = classes_of(first)
        table = np.array([known[word] for word in classes_of(name)], np.int32)
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
