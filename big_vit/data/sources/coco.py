"""Pictures with boxes and masks that a JSON file of COCO's form lists (cocodataset.org)."""

import fnmatch
import functools
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from big_vit.data import files
from big_vit.data.sources.annotated import (
    Pictures,
    Rles,
    absent,
    box_fault,
    mask_fault,
    need_no_labels,
    open_pictures,
    path_fault,
)
from big_vit.data.sources.base import Annotation, Request, Source
from big_vit.data.sources.classes import label_name
from big_vit.data.sources.folder import list_folder
from big_vit.data.sources.media import say_once
from big_vit.data.sources.splits import cut
from big_vit.errors import UserError

_SPLIT = re.compile(r'(?:train|val|test|dev|extra)[\w-]*', re.IGNORECASE)
_VERSION = 1  # Of the arrays that are kept of a file.


class _Split(NamedTuple):
    """A file, and the folder of its pictures."""

    file: files.Place
    folder: files.Place


def coco(request: Request, *, path: str, annotations: str | None = None) -> Source:
    """Open pictures and the JSON file that lists their objects.

    A file is the split that its name says (instances_val2017.json is val2017), else `train`. Where
    both `path` and `annotations` have a *, splits are what it stands for. Without `annotations` the
    files are those in PATH/annotations beside folders PATH/SPLIT (instances_SPLIT.json), or one in
    each folder PATH/SPLIT beside its pictures, or one in PATH. Classes are the categories by
    ascending id.

    Args:
      request: the examples to open.
      path: folder that the names of pictures are relative to, local or any URL that fsspec reads.
      annotations: JSON file, or several as a pattern with one *.

    Raises:
      UserError: a file is missing or has another form, or what it lists is wrong and not skipped.
    """
    need_no_labels(request, 'coco')
    key = request.key
    splits = find_splits(path, annotations, key)
    title = f'coco:{files.place(path, f"{key}.path").name}'

    def open_split(name: str) -> Source:
        split = splits[name]
        table = _Table(_kept(split.file, key))
        missing = absent(split.folder, table.names, f'{key}.path')
        faults = dict(table.faults)
        for row in missing:
            faults.setdefault(
                row, f'{split.file}, picture {table.ids[row]}: there is no file '
                f'{split.folder / table.names[row]}'
            )  # fmt: skip
        if table.stray and not request.skip_bad:
            raise UserError(f"{table.stray}: remove it, or set {key}.on_error='skip'")
        if table.stray:
            say_once(f'{table.stray}: left out, as are all such')
        pictures = Pictures(
            place=lambda row: split.folder / table.names[row],
            annotation=table.annotation,
            length=len(table.names),
            faults=faults,
            has_masks=table.has_masks,
        )
        return open_pictures(pictures, title, name, table.class_names, request)

    return cut(title, splits, open_split, request)


# --- Files -----------------------------------------------------------------------------


def find_splits(path: str, annotations: str | None, key: str) -> dict[str, _Split]:
    """Find the files of a dataset by split; UserError if there is none."""
    if annotations is None:
        root = files.place(path, f'{key}.path')
        if not files.is_folder(root):
            raise UserError(f'{key}.path: {root} is not a folder: name the one of the pictures')
        found = _beside(root, key)
        if not found:
            raise UserError(
                f'{key}.annotations: no JSON file of annotations in {root}, its folder annotations '
                'or its folders of splits: set it to the file'
            )
        return found
    if '*' not in annotations:
        file = files.place(annotations, f'{key}.annotations')
        if not files.exists(file):
            raise UserError(f'{key}.annotations: there is no file {file}')
        root = files.place(path, f'{key}.path')
        if not files.is_folder(root):
            raise UserError(f'{key}.path: {root} is not a folder: name the one of the pictures')
        return {_split_of(file.name): _Split(file, root)}
    pattern = files.place(annotations, f'{key}.annotations')
    parent = pattern._replace(path=pattern.path.rpartition('/')[0])
    if pattern.name.count('*') != 1 or '*' in parent.path:
        raise UserError(f'{key}.annotations: takes one *, in the name of the file: {annotations}')
    before, after = pattern.name.split('*')
    names = [name for name, is_folder in list_folder(parent, key) if not is_folder]
    matched = {
        name[len(before) : len(name) - len(after)]: parent / name
        for name in fnmatch.filter(names, pattern.name)
    }
    if not matched:
        raise UserError(f'{key}.annotations: no file is called {pattern}')
    return {
        split: _Split(file, files.place(path.replace('*', split), f'{key}.path'))
        for split, file in matched.items()
    }


def _split_of(name: str) -> str:
    words = re.split(r'[._]', name.rpartition('.')[0])
    return next((word for word in words if _SPLIT.fullmatch(word)), 'train')


def _json_files(place: files.Place, key: str) -> list[str]:
    if not files.is_folder(place):
        return []
    names = [name for name, is_folder in list_folder(place, key) if not is_folder]
    return [name for name in names if name.lower().endswith('.json')]


def _beside(root: files.Place, key: str) -> dict[str, _Split]:
    """Find files of annotations where COCO itself and exports of labelling tools have them."""
    folders = [name for name, is_folder in list_folder(root, key) if is_folder]
    splits: dict[str, _Split] = {}
    listed = _json_files(root / 'annotations', key)
    # COCO has files of captions and of keypoints for the same pictures.
    for name in [n for n in listed if n.startswith('instances_')] or listed:
        split = _split_of(name)
        if split in splits:
            raise UserError(
                f'{key}.annotations: {splits[split].file} and {name} are both of {split}: set it '
                'to one of them'
            )
        places = [root / split, root / 'images' / split, root / 'images', root]
        folder = next(place for place in places if files.is_folder(place))
        splits[split] = _Split(root / 'annotations' / name, folder)
    if splits:
        return splits
    for name in folders:
        inside = _json_files(root / name, key) if _SPLIT.fullmatch(name) else []
        if len(inside) == 1:
            splits[name] = _Split(root / name / inside[0], root / name)
    if splits:
        return splits
    inside = _json_files(root, key)
    if len(inside) > 1:
        raise UserError(
            f'{key}.annotations: {root} has {len(inside)} JSON files ({", ".join(inside[:3])}): '
            'set it to one of them'
        )
    folder = root / 'images' if 'images' in folders else root
    return {_split_of(name): _Split(root / name, folder) for name in inside}


# --- Tables ----------------------------------------------------------------------------


class _Table:
    """What a file lists, read from arrays that `_kept` gives."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        self._arrays = arrays
        about = json.loads(arrays['about'].tobytes())
        self.names: list[str] = about['names']
        self.ids: list[Any] = about['ids']
        self.class_names = tuple(map(label_name, about['classes']))
        self.faults = {int(row): text for row, text in about['faults'].items()}
        self.stray: str = about['stray']
        self.has_masks: bool = about['has_masks']

    def annotation(self, row: int) -> Annotation:
        arrays = self._arrays
        size = int(arrays['height'][row]), int(arrays['width'][row])
        some = slice(int(arrays['starts'][row]), int(arrays['starts'][row + 1]))
        xywh = np.array(arrays['xywh'][some])
        ends = arrays['mask_ends'][some.start : some.stop + 1].tolist()
        masks = None
        if self.has_masks:
            texts = [arrays['masks'][a:b].tobytes() for a, b in itertools.pairwise(ends)]
            masks = Rles([json.loads(text) for text in texts], size)
        name, number = self.names[row], self.ids[row]
        return Annotation(
            *size,
            np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1),
            np.array(arrays['label'][some]),
            np.array(arrays['crowd'][some]),
            np.array(arrays['area'][some]),
            masks,
            name,
            number if isinstance(number, int) else row,
            xywh,
        )


def _kept(file: files.Place, key: str) -> dict[str, np.ndarray]:
    """Read a file once, into arrays that are mapped from then on: COCO's own has 450 MB of text."""
    with files.reading(file, f'{key}.annotations'):
        mark = files.fingerprint([file], _VERSION)
    return files.kept_arrays('coco', mark, functools.partial(_parsed, file))


def _parsed(file: files.Place) -> dict[str, np.ndarray]:
    try:
        content = json.loads(files.read(file))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise UserError(f'{file}: cannot be read as JSON ({reason})') from error
    return _Reading(file, content).arrays()


class _Reading:
    """Checks what a file lists, and makes arrays of it."""

    def __init__(self, file: files.Place, content: Any):
        self._file = file
        self._faults: dict[int, str] = {}
        self._stray = ''
        self._pictures = self._listed(content, 'images', 'file_name')
        self._objects = self._listed(content, 'annotations', 'bbox')
        categories = self._categories(content)
        self._classes = {number: place for place, number in enumerate(sorted(categories))}
        self._names = [categories[number] for number in self._classes]
        self._rows: dict[Any, int] = {}
        for row, picture in enumerate(self._pictures):
            number = picture.get('id')
            if not isinstance(number, int | str) or number in self._rows:
                what = 'two pictures have' if number in self._rows else 'a picture has'
                raise UserError(f'{file}: {what} the id {number!r}: give each one of its own')
            self._rows[number] = row
            if (fault := self._picture_fault(picture)) is not None:
                self._faults[row] = f'{file}, picture {number}: {fault}'

    def _listed(self, content: Any, part: str, example: str) -> list[dict[str, Any]]:
        values = content.get(part) if isinstance(content, dict) else None
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise UserError(
                f'{self._file}: has no list {part!r} of objects with {example!r}: it must have the '
                'form of COCO'
            )
        if not values:
            raise UserError(f'{self._file}: its list {part!r} is empty: take another file')
        return values

    def _categories(self, content: Any) -> dict[int, str]:
        names: dict[int, str] = {}
        for category in self._listed(content, 'categories', 'name'):
            number, name = category.get('id'), category.get('name')
            if type(number) is not int or not isinstance(name, str | int) or number in names:
                what = 'two categories have' if number in names else 'a category has'
                raise UserError(f'{self._file}: {what} the id {number!r} (name {name!r})')
            names[number] = str(name)
        return names

    @staticmethod
    def _picture_fault(picture: dict[str, Any]) -> str | None:
        size = picture.get('height'), picture.get('width')
        if not all(type(side) is int and side > 0 for side in size):
            return f'its height and width are {size[0]!r} and {size[1]!r}'
        return path_fault(picture.get('file_name'))

    def _objects_by_picture(self) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """Yield (row of the picture, the entry for messages, the entry), in the order of files."""
        taken: set[Any] = set()
        for number, entry in enumerate(self._objects):
            name = entry.get('id', f'number {number}')
            what = f'{self._file}, annotation {name}'
            picture = entry.get('image_id')
            row = self._rows.get(picture) if isinstance(picture, int | str) else None
            if row is None:
                self._stray = self._stray or f'{what}: there is no picture {picture!r}'
                continue
            if 'id' in entry and (not isinstance(name, int | str) or name in taken):
                self._faults.setdefault(row, f'{what}: another annotation has this id')
                continue
            taken.add(name)
            yield row, what, entry

    def _object_fault(self, entry: dict[str, Any], picture: dict[str, Any]) -> str | None:
        box, category = entry.get('bbox'), entry.get('category_id')
        if type(category) is not int or category not in self._classes:
            return f'there is no category {category!r}'
        numbers = box if isinstance(box, list) else []
        if len(numbers) != 4 or not all(type(x) in (int, float) for x in numbers):
            return f'bbox {box!r:.60} is no list of four numbers'
        if entry.get('iscrowd', 0) not in (0, 1):
            return f'iscrowd is {entry["iscrowd"]!r}, and neither 0 nor 1'
        if type(entry.get('area', 0.0)) not in (int, float):
            return f'area is {entry["area"]!r:.60}'
        height, width = picture['height'], picture['width']
        x, y, across, tall = numbers
        corners = (x, y, x + across, y + tall)
        fault = box_fault(corners, height, width)
        if fault is None and entry.get('segmentation'):
            fault = mask_fault(entry['segmentation'], height, width)
        return fault

    def arrays(self) -> dict[str, np.ndarray]:
        by_picture: list[list[dict[str, Any]]] = [[] for _ in self._pictures]
        masked = 0
        for row, what, entry in self._objects_by_picture():
            if row in self._faults:
                continue
            fault = self._object_fault(entry, self._pictures[row])
            if fault is not None:
                self._faults[row] = f'{what}: {fault}'
                continue
            by_picture[row].append(entry)
            masked += bool(entry.get('segmentation'))
        entries = list(itertools.chain.from_iterable(by_picture))
        if 0 < masked < len(entries):
            say_once(
                f'{self._file}: {len(entries) - masked:,} of {len(entries):,} objects have no '
                'mask: masks are left out'
            )
        has_masks = 0 < masked == len(entries)
        texts = [
            json.dumps(entry['segmentation'], separators=(',', ':')).encode() if has_masks else b''
            for entry in entries
        ]
        about = {
            'names': [str(picture.get('file_name', '')) for picture in self._pictures],
            'ids': list(self._rows),
            'classes': self._names,
            'faults': self._faults,
            'stray': self._stray,
            'has_masks': has_masks,
        }
        is_bad = [row in self._faults for row in range(len(self._pictures))]
        sides = {
            side: np.array(
                [0 if bad else own[side] for own, bad in zip(self._pictures, is_bad, strict=True)],
                np.int64,
            )
            for side in ('height', 'width')
        }
        boxes = np.array([entry['bbox'] for entry in entries], np.float64).reshape(-1, 4)
        areas = [entry.get('area', w * h) for entry, (w, h) in zip(entries, boxes[:, 2:].tolist(),
                                                                     strict=True)]  # fmt: skip
        return {
            **sides,
            'about': np.frombuffer(json.dumps(about).encode(), np.uint8),
            'starts': np.cumsum([0, *map(len, by_picture)]),
            'xywh': boxes,
            'label': np.array([self._classes[e['category_id']] for e in entries], np.int32),
            'crowd': np.array([e.get('iscrowd', 0) for e in entries], bool),
            'area': np.array(areas, np.float64),
            'masks': np.frombuffer(b''.join(texts), np.uint8),
            'mask_ends': np.cumsum([0, *map(len, texts)]),
        }
