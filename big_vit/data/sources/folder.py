"""Folders of media files, one subfolder per class."""

import errno
import functools
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from big_vit.data import files
from big_vit.data.sources.base import Columns, Request, Source
from big_vit.data.sources.classes import sorted_classes
from big_vit.data.sources.media import KINDS, Names, kind_of, loader
from big_vit.data.sources.splits import cut, training_split
from big_vit.errors import UserError

# A suffix is allowed, as in train2017 or test_clean; devkit and valley are no splits.
_SPLIT = re.compile(
    r'(train(ing|val)?|val(id|idation)?|dev|test(ing)?|eval(uation)?|extra)([\d_.-][\w.-]*)?', re.I
)


class _Files(NamedTuple):
    """Paths, class numbers (by the split's own folders) and kind of the files of a split."""

    names: Names
    labels: np.ndarray
    kind: str


def folder(request: Request, *, path: str) -> Source:
    """Open media files in PATH/SPLIT/CLASS/..., or in PATH/CLASS/... as the only split, `train`.

    Without labels, files may also lie in PATH or PATH/SPLIT itself, at any depth.

    Classes are the sorted names of the folders of the split `train` (else of the first whose name
    starts with train, else of the first). The folders of PATH are splits if all are named like
    splits: train, val, test, dev, extra, train2017, test_clean. Files are recognized by their
    extensions (`media.KINDS`); others and hidden ones are skipped. Files may lie deeper than
    their class folder and are sorted by path. Parts of a split are parts of a fixed random order.

    Args:
      request: the examples to open.
      path: local, or any URL that fsspec reads.

    Raises:
      UserError: no such folder, an empty one, files of several kinds, splits beside other
        folders, a class without files, or one that the split `train` lacks.
    """
    key = request.key
    root = files.place(path, f'{key}.path')
    if not request.labelled and (loose := _loose_splits(root, key)):
        return _unlabelled(root, loose, request)
    places = {name: root / name for name in split_folders(root, key)} or {'train': root}
    first = training_split(places) or min(places)
    classes_of = functools.cache(lambda name: _class_folders(places[name], key))

    def open_split(name: str) -> Source:
        place, class_names = places[name], classes_of(name)
        classes = sorted_classes(classes_of(first))
        numbers = classes.numbers(class_names, f'{key}.path: {root}', name, first, key)
        names, labels, kind = _scan(place, class_names, key, may_be_empty=name != first)
        labels = numbers[labels]
        read = loader(kind, lambda index: files.read(place / names[index]))

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
            where=lambda index: str(place / names[index]),
        )

    return cut(f'folder:{root.name}', places, open_split, request, by_class=True)


def _loose_splits(root: files.Place, key: str) -> dict[str, files.Place]:
    """Find splits whose files lie beside, not within, folders of classes; none if there is none."""
    if not files.is_folder(root):
        return {}
    entries = list_folder(root, key)
    if any(not is_folder and kind_of(name) for name, is_folder in entries):
        return {'train': root}
    splits = {name: root / name for name, is_folder in entries if is_folder}
    if not splits or not all(_SPLIT.fullmatch(name) for name in splits):
        return {}
    inside = [entry for place in splits.values() for entry in list_folder(place, key)]
    return splits if any(not is_folder and kind_of(name) for name, is_folder in inside) else {}


def _unlabelled(root: files.Place, places: dict[str, files.Place], request: Request) -> Source:
    """Open all media files of some splits as examples of one class without a name."""

    def open_split(name: str) -> Source:
        names, labels, kind = _scan(places[name], [''], request.key, may_be_empty=False)
        read = loader(kind, lambda index: files.read(places[name] / names[index]))
        return Source(
            name=f'folder:{root.name}',
            split=name,
            length=len(labels),
            num_classes=1,
            image_shape=None,
            load=lambda indices: {kind: read(indices.tolist()), 'label': labels[indices]},
            in_memory=False,
            labels=lambda: labels,
            where=lambda index: str(places[name] / names[index]),
        )

    return cut(f'folder:{root.name}', places, open_split, request)


def split_folders(root: files.Place, key: str = 'data') -> list[str]:
    """List the folders of splits in a dataset's folder; none if its folders are classes.

    Raises:
      UserError: no such folder, an empty one, or splits beside other folders.
    """
    if not files.is_folder(root):
        raise UserError(f'{key}.path: {root} is not a folder: it must hold one per class')
    below = _subfolders(root, key)
    if not below:
        raise UserError(
            f'{key}.path: {root} has no folders: put the files of each class into one of its own, '
            "or use name='table' with a file of labels"
        )
    splits = [name for name in below if _SPLIT.fullmatch(name)]
    if len(splits) < len(below):
        # A class may be named train, but then it contains pictures and no folders of classes.
        odd = next((name for name in splits if _subfolders(root / name, key)), None)
        if odd is not None:
            other = next(name for name in below if name not in splits)
            raise UserError(
                f'{key}.path: {root} has folders of splits ({odd}) and others ({other}): '
                'move the others away, or rename a class that is called so'
            )
        return []
    return splits


def list_folder(place: files.Place, key: str) -> list[tuple[str, bool]]:
    """List (name, is a folder) of the entries of a folder, without asking for sizes.

    Raises:
      UserError: it cannot be read.
    """
    try:
        if not place.is_local:
            return [(entry.name, entry.is_folder) for entry in files.entries(place)]
        with os.scandir(place.path) as entries:
            return sorted((e.name, e.is_dir()) for e in entries if e.name[0] != '.')
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


def _walk(folder: files.Place) -> Iterator[str]:
    """Yield the paths of all files below, in the order of `files.walk`, without their sizes.

    Raises:
      OSError: a folder cannot be read, or a link to a media file is broken.
    """
    if not folder.is_local:
        yield from (entry.name for entry in files.walk(folder))
        return
    seen: set[tuple[int, int]] = set()

    def below(path: str, prefix: str) -> Iterator[str]:
        info = os.stat(path)  # noqa: PTH116
        if (info.st_dev, info.st_ino) in seen:  # A link to a folder that contains it.
            return
        seen.add((info.st_dev, info.st_ino))
        with os.scandir(path) as scan:
            entries = sorted((e for e in scan if e.name[0] != '.'), key=lambda e: e.name)
        for entry in entries:
            if entry.is_dir():
                yield from below(entry.path, f'{prefix}{entry.name}/')
            elif entry.is_file():
                yield prefix + entry.name
            elif entry.is_symlink() and kind_of(entry.name):
                raise FileNotFoundError(errno.ENOENT, 'it is a link to nothing', entry.path)

    yield from below(folder.path, '')


def _scan(folder: files.Place, classes: list[str], key: str, may_be_empty: bool) -> _Files:
    """Find all media files of a split; a class may lack files only if `may_be_empty`."""
    labels: list[int] = []
    examples: dict[str, str] = {}
    others: set[str] = set()

    def paths() -> Iterator[str]:
        for label, name in enumerate(classes):
            for file in _walk(folder / name if name else folder):
                kind = kind_of(file)
                if kind is None:
                    others.add(os.path.splitext(file)[1] or 'no extension')  # noqa: PTH122
                    continue
                path = f'{name}/{file}' if name else file
                examples.setdefault(kind, path)
                labels.append(label)
                yield path

    try:
        names = Names(paths())
    except OSError as error:
        raise _unreadable(folder, error, key) from error
    kind = _only_kind(folder, examples, others, key)
    counts = np.bincount(labels, minlength=len(classes))
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    if empty and not may_be_empty:
        raise UserError(
            f'{key}.path: {folder} has folders without {kind} files '
            f'({", ".join(empty[:5])}), which would be classes: remove them'
        )
    return _Files(names, np.array(labels, np.int32), kind)


def _only_kind(folder: files.Place, examples: dict[str, str], others: set[str], key: str) -> str:
    """Check that there are media files and all are of one kind.

    Args:
      examples: a file of each kind.
      others: extensions of files that were skipped.
    """
    if len(examples) > 1:
        (one, a), (other, b) = list(examples.items())[:2]
        raise UserError(
            f'{key}.path: {folder} holds {one} and {other} files ({a}, {b}): '
            'keep those of one kind in it'
        )
    if not examples:
        skipped = f' (only files with {", ".join(sorted(others)[:6])})' if others else ''
        known = ', '.join(KINDS['image'])
        raise UserError(
            f'{key}.path: no image, video, sound or text in {folder}{skipped}: images end in '
            f'{known}'
        )
    return next(iter(examples))
