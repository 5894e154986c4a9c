"""Pictures with boxes or polygons as YOLO has them: data.yaml, and labels/ beside images/."""

import functools
import posixpath
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from big_vit.data import files
from big_vit.data.sources.annotated import (
    Pictures,
    Rles,
    box_fault,
    need_no_labels,
    open_pictures,
    path_fault,
    size_of,
)
from big_vit.data.sources.base import Annotation, Request, Source
from big_vit.data.sources.classes import label_name
from big_vit.data.sources.folder import list_folder
from big_vit.data.sources.media import kind_of, say_once
from big_vit.data.sources.splits import cut
from big_vit.errors import UserError

_YAML = ('data.yaml', 'data.yml', 'dataset.yaml', 'dataset.yml')
_SPLITS = ('train', 'val', 'test')
_MOST_YAML = 1 << 20
# How YAML says that there is none.
_NOTHING = (None, '', '~', 'null', 'Null', 'NULL')
# How far a coordinate may be beyond the picture: exports round.
_SLACK = 0.01


class _Labels(NamedTuple):
    """The rows of a text file, in shares of the picture.

    Attributes:
      classes: numbers by the file, int64 [n].
      boxes: (x0, y0, x1, y1), float64 [n, 4].
      polygons: of each object [corners, 2], or None where the file has boxes.
    """

    classes: np.ndarray
    boxes: np.ndarray
    polygons: list[np.ndarray] | None


_EMPTY = _Labels(np.zeros(0, np.int64), np.zeros((0, 4)), None)


def yolo(request: Request, *, path: str) -> Source:
    """Open what a data.yaml says: `names` of classes, and `train`, `val`, `test` of pictures.

    Each of these is a folder, a text file of paths, or a list of such, relative to the key `path`
    of the file or else to its folder. The objects of images/a.jpg are in labels/a.txt: a row
    `class cx cy w h`, or `class x1 y1 x2 y2 ...` where any row of the file has more numbers, as
    shares of the picture as viewers show it. A picture without such a file is an empty one.

    Args:
      request: the examples to open.
      path: the file, or the folder that has it; local or any URL that fsspec reads.

    Raises:
      UserError: a file is missing or has another form, unless that is skipped.
    """
    need_no_labels(request, 'yolo')
    key = request.key
    file = _yaml_file(files.place(path, f'{key}.path'), key)
    about = _read_yaml(file)
    numbers = _classes(about.get('names'), file)
    class_names = tuple(label_name(name) for name, _ in numbers.values())
    of_number = {number: place for number, (_, place) in numbers.items()}
    base = _base(file, about)
    splits = {name: about[name] for name in _SPLITS if about.get(name) not in _NOTHING}
    if not splits:
        raise UserError(f'{file}: has none of {", ".join(_SPLITS)}: add the folders of pictures')
    title = f'yolo:{file.path.rstrip("/").rpartition("/")[0].rpartition("/")[2] or file.name}'

    def open_split(name: str) -> Source:
        places = list(_pictures(base, splits[name], f'{file}, {name}', key))
        texts = _Texts(places, key)
        labels: list[_Labels] = []
        faults: dict[int, str] = {}
        for row in range(len(places)):
            label, fault = texts.read(row, of_number)
            labels.append(label)
            if fault is not None:
                faults[row] = fault
        counted = [label for label in labels if len(label.classes)]
        if not counted and not faults:
            raise UserError(
                f'{file}: none of the {len(places):,} pictures of {name} has objects: their text '
                f'files belong into a folder labels beside images ({texts.place(0)})'
            )
        with_polygons = sum(label.polygons is not None for label in counted)
        if 0 < with_polygons < len(counted):
            say_once(f'{file}: {name} has polygons in some pictures only: masks are left out')
        size = functools.cache(lambda row: size_of(places[row]))

        def annotation(row: int) -> Annotation:
            return _annotation(labels[row], of_number, size(row), places[row], row, has_masks)

        has_masks = bool(counted) and with_polygons == len(counted)
        pictures = Pictures(
            place=lambda row: places[row],
            annotation=annotation,
            length=len(places),
            faults=faults,
            has_masks=has_masks,
            is_upright=True,
        )
        return open_pictures(pictures, title, name, class_names, request)

    return cut(title, splits, open_split, request)


def _annotation(
    own: _Labels,
    of_number: dict[int, int],
    size: tuple[int, int],
    place: files.Place,
    row: int,
    has_masks: bool,
) -> Annotation:
    height, width = size
    boxes = own.boxes * [width, height, width, height]
    area, masks = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), None
    if has_masks:
        from pycocotools import mask

        polygons = [(p * [width, height]).ravel().tolist() for p in own.polygons or ()]
        masks = Rles([[polygon] for polygon in polygons], size)
        area = np.array([mask.area(rle) for rle in masks], np.float64)
    labels = np.array([of_number[n] for n in own.classes.tolist()], np.int32)
    crowd = np.zeros(len(labels), bool)
    return Annotation(height, width, boxes, labels, crowd, area, masks, place.name, row)


# --- data.yaml -------------------------------------------------------------------------


def _yaml_file(place: files.Place, key: str) -> files.Place:
    if not files.is_folder(place):
        if not files.exists(place):
            raise UserError(f'{key}.path: there is no {place}')
        return place
    names = [name for name, is_folder in list_folder(place, key) if not is_folder]
    found = [name for name in _YAML if name in names]
    found = found or [name for name in names if name.endswith(('.yaml', '.yml'))]
    if len(found) != 1:
        what = f'several YAML files ({", ".join(found)})' if found else 'no data.yaml'
        raise UserError(f'{key}.path: {place} has {what}: set it to the file itself')
    return place / found[0]


def _read_yaml(file: files.Place) -> dict[str, Any]:
    import yaml

    try:
        data = files.read(file)
        if len(data) > _MOST_YAML:
            raise ValueError(f'it has {len(data):,} bytes')
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(data)):
            raise ValueError('it has aliases, which can make a short file endless')
        # Classes may be called no or 1.0, which are texts here.
        about = yaml.load(data, yaml.BaseLoader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = ' '.join(str(getattr(error, 'strerror', None) or error).split())[:200]
        raise UserError(f'{file}: cannot be read as YAML ({reason})') from error
    if not isinstance(about, dict):
        raise UserError(f'{file}: has no keys such as names, train and val')
    return about


def _classes(names: Any, file: files.Place) -> dict[int, tuple[str, int]]:
    """Return {number in text files: (name, class)}; the numbers of a mapping may have gaps."""
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise UserError(f'{file}: names must list the classes')
    if not all(str(number).isdecimal() and isinstance(name, str) for number, name in names.items()):
        raise UserError(
            f'{file}: names must be texts, by whole numbers from 0 where it is a mapping'
        )
    ordered = sorted(names, key=int)
    return {int(number): (names[number], place) for place, number in enumerate(ordered)}


def _base(file: files.Place, about: dict[str, Any]) -> files.Place:
    """Return the folder that paths are relative to; one that is on another machine is not taken."""
    parent = file._replace(path=file.path.rpartition('/')[0])
    said = about.get('path')
    if not isinstance(said, str) or said in _NOTHING:
        return parent
    place = parent._replace(path=said) if said.startswith('/') else _below(parent, said)
    return place if files.is_folder(place) else parent


# --- Pictures --------------------------------------------------------------------------


def _pictures(base: files.Place, said: Any, where: str, key: str) -> Iterator[files.Place]:
    """Yield the pictures that an entry of data.yaml names, sorted within each folder."""
    for entry in said if isinstance(said, list) else [said]:
        if not isinstance(entry, str) or not entry or '\0' in entry:
            raise UserError(f'{where}: {entry!r:.60} is no path')
        place = _resolved(base, entry)
        if files.is_folder(place):
            with files.reading(place, f'{key}.path'):
                names = [own.name for own in files.walk(place) if kind_of(own.name) == 'image']
            if not names:
                raise UserError(f'{where}: no picture in {place}')
            yield from (place / name for name in names)
        elif files.exists(place) and place.name.endswith('.txt'):
            yield from _listed(place, key)
        else:
            raise UserError(f'{where}: there is no folder or list of pictures {place}')


def _resolved(base: files.Place, entry: str) -> files.Place:
    """Return the place of an entry; exports write ../train/images where train/images is meant."""
    if entry.startswith('/'):
        return base._replace(path=entry)
    place, inner = _below(base, entry), re.sub(r'^(\.\./)+', '', entry)
    return _below(base, inner) if inner != entry and not files.exists(place) else place


def _below(base: files.Place, entry: str) -> files.Place:
    path = posixpath.normpath(f'{base.path}/{entry}')
    return base._replace(path=path)


def _listed(file: files.Place, key: str) -> Iterator[files.Place]:
    parent = file._replace(path=file.path.rpartition('/')[0])
    with files.reading(file, f'{key}.path'):
        lines = files.read(file).decode('utf-8-sig', 'replace').splitlines()
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line:
            continue
        name = line.removeprefix('./')
        is_absolute = name.startswith('/') and file.is_local
        fault = path_fault(name[1:] if is_absolute else name)
        if fault is not None:
            raise UserError(f'{file}, line {number}: {fault}')
        yield file._replace(path=name) if is_absolute else parent / name


# --- Labels ----------------------------------------------------------------------------


class _Texts:
    """The text files of pictures."""

    def __init__(self, pictures: list[files.Place], key: str):
        self._pictures = pictures
        self._key = key
        self._listed = functools.cache(self._names)

    def _names(self, folder: str) -> frozenset[str]:
        place = self._pictures[0]._replace(path=folder)
        if not files.is_folder(place):
            return frozenset()
        return frozenset(name for name, _ in list_folder(place, self._key))

    def place(self, row: int) -> files.Place:
        """Return where the text file of a picture should be."""
        path = self._pictures[row].path
        before, slash, after = path.rpartition('/images/')
        if slash:
            path = f'{before}/labels/{after}'
        folder, slash, name = path.rpartition('/')
        return self._pictures[row]._replace(path=f'{folder}{slash}{name.rpartition(".")[0]}.txt')

    def read(self, row: int, known: dict[int, int]) -> tuple[_Labels, str | None]:
        """Return the objects of a picture, and what is wrong with them."""
        picture, file = self._pictures[row], self.place(row)
        if picture.name not in self._listed(picture.path.rpartition('/')[0]):
            return _EMPTY, f'there is no picture {picture}'
        folder, _, name = file.path.rpartition('/')
        if name not in self._listed(folder):
            return _EMPTY, None
        try:
            text = files.read(file).decode('utf-8-sig')
        except (OSError, UnicodeDecodeError) as error:
            return _EMPTY, f'{file}: cannot be read ({getattr(error, "strerror", None) or error})'
        lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        unique = list({line: (number, line) for number, line in reversed(lines)}.values())[::-1]
        if len(unique) < len(lines):
            say_once(f'{file}: has rows twice, of which one is taken; there may be more such files')
        polygons = any(len(line.split()) > 6 for _, line in unique)
        rows = []
        for number, line in unique:
            values = _values(line, polygons, known)
            if isinstance(values, str):
                return _EMPTY, f'{file}, line {number}: {values}'
            rows.append(values)
        return _labels(rows, polygons), None


def _values(line: str, polygons: bool, known: dict[int, int]) -> np.ndarray | str:
    """Return the numbers of a row, or what is wrong with it."""
    try:
        values = np.array([float(word) for word in line.split()], np.float64)
    except ValueError:
        return f'{line[:40]!r} has what is no number'
    if not polygons and len(values) != 5:
        return f'has {len(values)} numbers, not 5: class, centre x and y, width, height'
    if polygons and (len(values) % 2 == 0 or len(values) < 7):
        return f'has {len(values) - 1} coordinates, and other rows are polygons of pairs'
    if not np.isfinite(values).all():
        return 'has numbers that are none'
    if not values[0].is_integer() or int(values[0]) not in known:
        return f'there is no class {values[0]:g} among {len(known)} names'
    if (values[1:] < -_SLACK).any() or (values[1:] > 1 + _SLACK).any():
        return 'has numbers beyond 0 to 1: they are shares of the picture'
    return box_fault(_corners(values, polygons).tolist(), 1, 1) or values


def _corners(values: np.ndarray, polygons: bool) -> np.ndarray:
    if polygons:
        points = values[1:].reshape(-1, 2)
        return np.concatenate([points.min(0), points.max(0)])
    return np.concatenate([values[1:3] - values[3:5] / 2, values[1:3] + values[3:5] / 2])


def _labels(rows: list[np.ndarray], polygons: bool) -> _Labels:
    if not rows:
        return _EMPTY
    return _Labels(
        np.array([int(row[0]) for row in rows]),
        np.array([_corners(row, polygons) for row in rows]),
        [row[1:].reshape(-1, 2) for row in rows] if polygons else None,
    )
