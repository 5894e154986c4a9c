"""Folders of media files, one subfolder per class."""

import errno
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from big_vit.data import files
from big_vit.data.sources.base import Columns, Request, Source
from big_vit.data.sources.classes import sorted_classes
from big_vit.data.sources.media import Names, examples, kind_of, loader, sniffed_kind
from big_vit.data.sources.splits import cut, training_split
from big_vit.errors import UserError

# A suffix is allowed, as in train2017 or test_clean; devkit and valley are no splits.
_SPLIT = re.compile(
    r'(train(ing|val)?|val(id|idation)?|dev|test(ing)?|eval(uation)?|extra)([\d_.-][\w.-]*)?', re.I
)
_PREFIXED = re.compile(rf'(?P<prefix>.+?[_-])(?P<split>{_SPLIT.pattern})', re.I)


class _Files(NamedTuple):
    """The examples of a split.

    Attributes:
      names: paths of all its media files.
      rows: which of them are examples.
      labels: class numbers of these, by the split's own folders.
      kind: of the examples.
    """

    names: Names
    rows: np.ndarray
    labels: np.ndarray
    kind: str


def folder(request: Request, *, path: str) -> Source:
    """Open media files in PATH/SPLIT/CLASS/..., or in PATH/CLASS/... as the only split, `train`.

    Without labels, files may also lie in PATH or PATH/SPLIT itself, at any depth.

    Classes are the sorted names of the folders of the split `train` (else of the first whose name
    starts with train, else of the first). The folders of PATH are splits if all are named like
    splits: train, val, test, dev, extra, train2017, test_clean, all after one prefix or none. Files
    are recognized by their extensions (`media.KINDS`); others are counted and left out, hidden ones
    skipped. Files may lie deeper than their class folder and are sorted by path. Parts of a split
    are parts of a fixed random order.

    Args:
      request: the examples to open.
      path: local, or any URL that fsspec reads.

    Raises:
      UserError: no such folder, an empty one, files of several kinds or many that are of none,
        splits beside other folders, links from one class to another, a class without files, or one
        that the split `train` lacks.
    """
    key = request.key
    root = files.place(path, f'{key}.path')
    if not request.labelled and (loose := _loose_splits(root, key)):
        return _unlabelled(root, loose, request)
    places = split_places(root, key) if request.labelled else _splits_if_any(root, key)
    if not places:
        if request.labelled:
            _check_wrapped(root, key)
        places = {'train': root}
    first = training_split(places) or min(places)
    classes_of = functools.cache(lambda name: _class_folders(places[name], key))

    def open_split(name: str) -> Source:
        place, class_names = places[name], classes_of(name)
        classes = sorted_classes(classes_of(first))
        may_be_empty = name != first or not request.labelled
        names, rows, labels, kind = _scan(root, place, class_names, key, may_be_empty)
        if request.labelled or {*class_names} <= {*classes_of(first)}:
            numbers = classes.numbers(class_names, f'{key}.path: {root}', name, first, key)
            labels = numbers[labels]
        else:  # Folders need not be classes.
            labels = np.zeros_like(labels)
        read = loader(kind, lambda index: files.read(place / names[int(rows[index])]))

        def load(indices: np.ndarray) -> Columns:
            return {kind: read(indices.tolist()), 'label': labels[indices]}

        return Source(
            name=f'folder:{root.name}',
            split=name,
            length=len(labels),
            num_classes=classes.num_classes,
            image_shape=None,
            load=load,
            in_memory=False,
            class_names=classes.names,
            labels=lambda: labels,
            where=lambda index: str(place / names[int(rows[index])]),
        )

    return cut(f'folder:{root.name}', places, open_split, request, by_class=True)


def _loose_splits(root: files.Place, key: str) -> dict[str, files.Place]:
    """Find splits whose files lie beside, not within, folders of classes; none if there is none."""
    if not files.is_folder(root):
        return {}
    entries = list_folder(root, key)
    if any(not is_folder and kind_of(name) for name, is_folder in entries):
        return {'train': root}
    splits = {name: _innermost(root / name, key) for name, is_folder in entries if is_folder}
    if not splits or not all(_SPLIT.fullmatch(name) for name in splits):
        return {}
    inside = [entry for place in splits.values() for entry in list_folder(place, key)]
    return splits if any(not is_folder and kind_of(name) for name, is_folder in inside) else {}


def _splits_if_any(root: files.Place, key: str) -> dict[str, files.Place]:
    """Find the splits of pictures without labels, whose other folders may be called anything."""
    entries = list_folder(root, key) if files.is_folder(root) else []
    names = [name for name, is_folder in entries if is_folder]
    some = [name for name in names if _SPLIT.fullmatch(name)]
    return {} if 0 < len(some) < len(names) else split_places(root, key)


def _unlabelled(root: files.Place, places: dict[str, files.Place], request: Request) -> Source:
    """Open all media files of some splits as examples of one class without a name."""

    def open_split(name: str) -> Source:
        place = places[name]
        names, rows, labels, kind = _scan(root, place, [''], request.key, may_be_empty=False)
        read = loader(kind, lambda index: files.read(place / names[int(rows[index])]))
        return Source(
            name=f'folder:{root.name}',
            split=name,
            length=len(labels),
            num_classes=1,
            image_shape=None,
            load=lambda indices: {kind: read(indices.tolist()), 'label': labels[indices]},
            in_memory=False,
            labels=lambda: labels,
            where=lambda index: str(place / names[int(rows[index])]),
        )

    return cut(f'folder:{root.name}', places, open_split, request)


def split_places(root: files.Place, key: str) -> dict[str, files.Place]:
    """Return the folder of each split of a dataset; none if its folders are classes.

    Archives that unpack to seg_train/seg_train beside seg_test/seg_test have the splits train and
    test.

    Raises:
      UserError: no such folder, an empty one, or splits beside other folders.
    """
    if not files.is_folder(root):
        raise UserError(f'{key}.path: {root} is not a folder: name the one that holds the files')
    below = _subfolders(root, key)
    if not below:
        raise UserError(
            f'{key}.path: {root} has no folders: put the files of each class into one of its own, '
            "or use name='table' with a file of labels"
        )
    splits = {name: name for name in below if _SPLIT.fullmatch(name)} or _prefixed(root, below, key)
    if len(splits) < len(below):
        # A class may be named train, but then it contains pictures and no folders of classes.
        odd = next((name for name in splits.values() if _subfolders(root / name, key)), None)
        if odd is not None:
            other = next(name for name in below if name not in splits.values())
            raise UserError(
                f'{key}.path: {root} has folders of splits ({odd}) and others ({other}): '
                'move the others away, or rename a class that is called so'
            )
        _check_turned(root, below, key)
        return {}
    return {split: _innermost(root / name, key) for split, name in splits.items()}


def _prefixed(root: files.Place, below: list[str], key: str) -> dict[str, str]:
    """Return {'train': 'seg_train', 'test': 'seg_test'} for folders of folders with one prefix."""
    matches = [match for name in below if (match := _PREFIXED.fullmatch(name))]
    for prefix in dict.fromkeys(match['prefix'] for match in matches):
        splits = {match['split']: match[0] for match in matches if match['prefix'] == prefix}
        if len(splits) > 1 and all(_subfolders(root / name, key) for name in splits.values()):
            return splits
    return {}


def _check_turned(root: files.Place, below: list[str], key: str) -> None:
    """Raise UserError for PATH/CLASS/SPLIT, of which all splits would be one."""
    inside = (_subfolders(root / name, key) for name in below)
    if all(len(names) > 1 and all(map(_SPLIT.fullmatch, names)) for names in inside):
        split = _subfolders(root / below[0], key)[0]
        raise UserError(
            f'{key}.path: {root} has splits within folders of classes ({below[0]}/{split}): move '
            f'them, so that splits come first ({split}/{below[0]})'
        )


def _innermost(place: files.Place, key: str) -> files.Place:
    """Return the train/train in a folder `train` that contains nothing else, else the folder."""
    while list_folder(place, key) == [(place.name, True)]:
        place = place / place.name
    return place


def _check_wrapped(root: files.Place, key: str) -> None:
    """Raise UserError if the only folder has folders itself, which would all be one class."""
    entries = list_folder(root, key)
    if len(entries) != 1:
        return
    inside = list_folder(place := root / entries[0][0], key)
    if len(inside) > 1 and all(is_folder for _, is_folder in inside):
        raise UserError(
            f'{key}.path: {root} holds one folder, {place.name}, and what seem to be those of '
            f'classes or splits lie in it ({inside[0][0]}, {inside[1][0]}): set {key}.path={place}'
        )


def split_folders(root: files.Place, key: str = 'data') -> list[str]:
    """List the names of the splits in a dataset's folder; none if its folders are classes.

    Raises:
      UserError: as `split_places`.
    """
    return list(split_places(root, key))


def list_folder(place: files.Place, key: str) -> list[tuple[str, bool]]:
    """List (name, is a folder) of the entries of a folder, without asking for sizes.

    Raises:
      UserError: it cannot be read.
    """
    try:
        if not place.is_local:
            return [(entry.name, entry.is_folder) for entry in files.entries(place)]
        with os.scandir(place.path) as entries:
            return sorted((e.name, e.is_dir()) for e in entries if not files.is_clutter(e.name))
    except OSError as error:
        raise _unreadable(place, error, key) from error


def _subfolders(place: files.Place, key: str) -> list[str]:
    return [name for name, is_folder in list_folder(place, key) if is_folder]


def _class_folders(place: files.Place, key: str) -> list[str]:
    names = _subfolders(place, key)
    if not names:
        raise UserError(f'{key}.path: {place} has no folders, one per class')
    return names


def _unreadable(place: files.Place, error: OSError, key: str) -> UserError:
    path = error.filename or place
    return UserError(f'{key}.path: cannot read {path}: {error.strerror or error}')


class _Tree:
    """A dataset's folder, walked without the sizes of its files, in the order of `files.walk`."""

    def __init__(self, root: files.Place):
        self._root = os.path.realpath(root.path) if root.is_local else ''

    def walk(self, folder: files.Place) -> Iterator[str]:
        """Yield the paths of all files below a folder.

        Raises:
          OSError: a folder cannot be read, or a link to a media file is broken.
          UserError: a link leads to another folder of the dataset.
        """
        if not folder.is_local:
            yield from (entry.name for entry in files.walk(folder))
        else:
            yield from self._below(folder.path, '', set())

    def _below(self, path: str, prefix: str, seen: set[tuple[int, int]]) -> Iterator[str]:
        info = os.stat(path)  # noqa: PTH116
        if (info.st_dev, info.st_ino) in seen:  # A link to a folder that contains it.
            return
        seen.add((info.st_dev, info.st_ino))
        with os.scandir(path) as scan:
            entries = sorted(
                (e for e in scan if not files.is_clutter(e.name)), key=lambda e: e.name
            )
        for entry in entries:
            if entry.is_dir():
                if self.leads_out(entry.path):
                    yield from self._below(entry.path, f'{prefix}{entry.name}/', seen)
            elif entry.is_file():
                yield prefix + entry.name
            elif kind_of(entry.name):
                what = 'a link to nothing' if entry.is_symlink() else 'a pipe or a device'
                what = 'a pipe or a device' if Path(entry.path).exists() else what
                raise FileNotFoundError(errno.ENOENT, f'it is {what}', entry.path)

    def leads_out(self, path: str) -> bool:
        """Whether a folder is none that is walked anyway: false for a link to one around it.

        Raises:
          UserError: it is a link to another folder of the dataset.
        """
        if not os.path.islink(path):  # noqa: PTH114
            return True
        target, parent = os.path.realpath(path), os.path.realpath(os.path.dirname(path))  # noqa: PTH120
        if _is_within(parent, target):
            return False
        if _is_within(target, self._root):
            raise UserError(
                f'{path}: is a link to {target}, whose files would count twice: remove it'
            )
        return True


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip('/') + '/')


def _scan(
    root: files.Place, folder: files.Place, classes: list[str], key: str, may_be_empty: bool
) -> _Files:
    """Find all media files of a split; a class may lack files only if `may_be_empty`."""
    labels: list[int] = []
    kinds: list[str] = []
    others: list[str] = []
    tree = _Tree(root)

    def paths() -> Iterator[str]:
        for label, name in enumerate(classes):
            place = folder / name if name else folder
            if name and place.is_local and not tree.leads_out(place.path):
                continue
            for file in tree.walk(place):
                kind = kind_of(file)
                if kind is None:
                    kind = sniffed_kind(file, functools.partial(_start, place / file))
                path = f'{name}/{file}' if name else file
                if kind is None:
                    others.append(path)
                    continue
                kinds.append(kind)
                labels.append(label)
                yield path

    try:
        names = Names(paths())
    except OSError as error:
        raise _unreadable(folder, error, key) from error
    kind, rows = examples(names, kinds, labels, others, folder, key)
    counts = np.bincount(np.array(labels)[rows], minlength=len(classes))
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    if empty and not may_be_empty:
        raise UserError(
            f'{key}.path: {folder} has folders without {kind} files '
            f'({", ".join(empty[:5])}), which would be classes: remove them'
        )
    return _Files(names, rows, np.array(labels, np.int32)[rows], kind)


def _start(file: files.Place) -> bytes:
    """Read the first bytes of a local file; none of a remote one, where each costs a request."""
    if not file.is_local:
        return b''
    size = min(16, os.stat(file.path).st_size)  # noqa: PTH116
    return files.read_range(file, 0, size)
