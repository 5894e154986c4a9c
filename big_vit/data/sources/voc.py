"""Pictures with boxes as Pascal VOC has them: a folder of XML files beside one of pictures."""

import functools
import re
import xml.etree.ElementTree as ET
from typing import NamedTuple

import numpy as np

from big_vit.data import files
from big_vit.data.sources.annotated import (
    Pictures,
    box_fault,
    listed_stems,
    need_no_labels,
    open_pictures,
    size_of,
    with_ending,
)
from big_vit.data.sources.base import Annotation, Request, Source
from big_vit.data.sources.classes import Classes, label_name, sorted_classes
from big_vit.data.sources.folder import list_folder
from big_vit.data.sources.splits import cut, training_split
from big_vit.errors import UserError

# What (xmin, ymin) is less by in continuous coordinates from 0, whose ends are exclusive.
CORNERS = {'inclusive': 1.0, 'exclusive': 0.0}
_MOST_BYTES = 16 << 20  # Of an XML file; the largest has some kilobytes.
# Declarations can make a short file endless, or name other files; VOC's have none.
_DECLARATION = re.compile(rb'<!\s*(DOCTYPE|ENTITY)', re.IGNORECASE)
# ImageSets/Main has lists of one class too, as cat_train.txt.
_LIST = re.compile(r'(train|val|trainval|test|dev|extra|minival)[\w.-]*', re.IGNORECASE)


class _Object(NamedTuple):
    name: str
    box: tuple[float, float, float, float]
    is_difficult: bool


class _Listed(NamedTuple):
    """What an XML file says; the size is 0 where it says none.

    Attributes:
      picture: name of the picture's file, or '' where it is not there.
      fault: what is wrong with the file, or None.
    """

    picture: str
    height: int
    width: int
    objects: tuple[_Object, ...]
    fault: str | None


def voc(request: Request, *, path: str, corners: str = 'inclusive') -> Source:
    """Open a folder with Annotations/*.xml, JPEGImages/ and ImageSets/Main/SPLIT.txt.

    Without lists of splits all XML files are `train`; pictures may also lie in `images`, or beside
    the XML files. Classes are the sorted names in the split `train` (or the first that begins so).
    Objects that are difficult are neither learned nor scored, as crowds are. Of `part`s within an
    object nothing is read.

    Args:
      request: the examples to open.
      path: of the folder (VOCdevkit/VOC2012), local or any URL that fsspec reads.
      corners: 'inclusive' as VOC counts them: pixels from 1, of which the last is of the box;
        'exclusive' as many tools write them: from 0, the end of the box last.

    Raises:
      UserError: a file is missing or has another form, unless that is skipped.
    """
    need_no_labels(request, 'voc')
    key = request.key
    root = files.place(path, f'{key}.path')
    if corners not in CORNERS:
        raise UserError(f'{key}.corners: takes {" or ".join(map(repr, CORNERS))}, not {corners!r}')
    less = CORNERS[corners]
    tree = _Tree(root, key)
    splits = tree.splits()
    title = f'voc:{root.name}'
    first = training_split(splits) or min(splits)

    @functools.cache
    def listed(name: str) -> list[_Listed]:
        return [tree.read(stem) for stem in splits[name]]

    @functools.cache
    def classes() -> Classes:
        names = {own.name for picture in listed(first) for own in picture.objects}
        if not names:
            raise UserError(f'{key}.path: the XML files of {first} in {root} have no object')
        return sorted_classes(names)

    def open_split(name: str) -> Source:
        read, numbers = listed(name), classes()
        assert numbers.names is not None
        of_name = {known: number for number, known in enumerate(numbers.names)}
        names = [own.name for picture in read for own in picture.objects]
        numbers.numbers(names, root, name, first, key)  # Refuses classes that are not known.

        def annotation(row: int) -> Annotation:
            picture = read[row]
            place = tree.pictures / picture.picture
            height, width = (picture.height, picture.width) if picture.height else size_of(place)
            boxes = np.array([own.box for own in picture.objects], np.float64).reshape(-1, 4)
            boxes -= [less, less, 0, 0]
            return Annotation(
                height,
                width,
                boxes,
                np.array([of_name[label_name(own.name)] for own in picture.objects], np.int32),
                np.array([own.is_difficult for own in picture.objects], bool),
                np.prod(boxes[:, 2:] - boxes[:, :2], axis=1),
                None,
                picture.picture,
                row,
            )

        faults: dict[int, str] = {}
        for row, (stem, picture) in enumerate(zip(splits[name], read, strict=True)):
            fault = picture.fault or _box_fault(picture, less)
            if fault is not None:
                faults[row] = f'{tree.xml(stem)}: {fault}'
        pictures = Pictures(
            place=lambda row: tree.pictures / read[row].picture,
            annotation=annotation,
            length=len(read),
            faults=faults,
        )
        return open_pictures(pictures, title, name, numbers.names, request)

    return cut(title, splits, open_split, request)


def _box_fault(picture: _Listed, less: float) -> str | None:
    for number, own in enumerate(picture.objects, 1):
        height, width = (picture.height, picture.width) if picture.height else (np.inf, np.inf)
        x0, y0, x1, y1 = own.box
        fault = box_fault((x0 - less, y0 - less, x1, y1), height, width)
        if fault is not None:
            return f'object {number} ({own.name}): {fault}'
    return None


class _Tree:
    """The folder of a dataset."""

    def __init__(self, root: files.Place, key: str):
        self._key = key
        if not files.is_folder(root):
            raise UserError(f'{key}.path: {root} is not a folder: name the one with Annotations')
        below = {name for name, is_folder in list_folder(root, key) if is_folder}
        inside = [name for name in below if files.is_folder(root / name / 'Annotations')]
        if 'Annotations' not in below and inside:
            raise UserError(f'{key}.path: set it to {root / min(inside)}, which has Annotations')
        if 'Annotations' not in below:
            raise UserError(f'{key}.path: {root} has no folder Annotations, as VOC has')
        self._root, self._folder = root, root / 'Annotations'
        named = next((n for n in ('JPEGImages', 'images', 'Images') if n in below), None)
        self.pictures = root / named if named else self._folder
        self._pictures = frozenset(name for name, _ in list_folder(self.pictures, key))

    def xml(self, stem: str) -> files.Place:
        return self._folder / f'{stem}.xml'

    def splits(self) -> dict[str, list[str]]:
        """Return the names of the XML files of each split, without their ending."""
        lists = self._root / 'ImageSets' / 'Main'
        named = list_folder(lists, self._key) if files.is_folder(lists) else []
        splits = {
            name.removesuffix('.txt'): listed_stems(lists / name, self._key)
            for name, _ in named
            if name.endswith('.txt') and _LIST.fullmatch(name.removesuffix('.txt'))
        }
        if splits:
            return splits
        stems = [name[:-4] for name, _ in list_folder(self._folder, self._key)
                 if name.lower().endswith('.xml')]  # fmt: skip
        if not stems:
            raise UserError(f'{self._key}.path: no XML file in {self._folder}')
        return {'train': stems}

    def read(self, stem: str) -> _Listed:
        nothing = _Listed('', 0, 0, (), None)
        try:
            data = files.read(self.xml(stem))
            if len(data) > _MOST_BYTES or _DECLARATION.search(_plain(data)):
                return nothing._replace(fault='declares entities, or is too long: it is not read')
            parsed = _parsed(ET.fromstring(data))
        except (OSError, ET.ParseError, ValueError, LookupError) as error:
            reason = getattr(error, 'strerror', None) or error
            return nothing._replace(fault=f'cannot be read ({reason})')
        said = parsed.picture
        picture = said if said in self._pictures else with_ending(stem, self._pictures)
        if picture is None:
            shown = said or f'{stem}.jpg'
            return parsed._replace(fault=f'there is no picture {self.pictures / shown}')
        return parsed._replace(picture=picture)


def _plain(data: bytes) -> bytes:
    """Return the characters of a file that are ASCII: in UTF-16 each has a zero byte beside it."""
    return data.replace(b'\0', b'')


def _parsed(root: ET.Element) -> _Listed:
    """Read the elements of an XML file; ValueError."""
    if root.tag != 'annotation':
        raise ValueError(f'its root is {root.tag!r:.40}, not annotation')
    size = root.find('size')
    height, width = (0 if size is None else round(_number(size, side, '0'))
                     for side in ('height', 'width'))  # fmt: skip
    objects = []
    for number, element in enumerate(root.findall('object'), 1):
        name = (element.findtext('name') or '').strip()
        box = element.find('bndbox')
        if not name or box is None:
            raise ValueError(f'object {number} has no {"bndbox" if name else "name"}')
        corners = tuple(_number(box, corner) for corner in ('xmin', 'ymin', 'xmax', 'ymax'))
        difficult = (element.findtext('difficult') or '0').strip()
        objects.append(_Object(name, corners, difficult not in ('0', 'false', 'False', '')))  # type: ignore[arg-type]
    picture = (root.findtext('filename') or '').strip()
    size_known = height > 0 and width > 0
    return _Listed(
        picture, height if size_known else 0, width if size_known else 0, tuple(objects), None
    )


def _number(element: ET.Element, name: str, default: str | None = None) -> float:
    text = element.findtext(name) or default
    try:
        return float(text or '')
    except ValueError as error:
        raise ValueError(f'{element.tag} has {name} {text!r:.40}, which is no number') from error
