"""What sources of pictures with boxes share: checks of objects, and the examples made of them.

An object that is wrong makes its picture a wrong example, which is refused when the source is
opened, or skipped as a damaged file is.
"""

import functools
import itertools
import posixpath
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from big_vit.data import decode, files
from big_vit.data.moves import Masks, runs_of
from big_vit.data.sources.base import Annotation, Columns, Request, Source
from big_vit.data.sources.media import KINDS, say_once
from big_vit.data.transforms.operations import BadExampleError, Real
from big_vit.errors import UserError


class Pictures(NamedTuple):
    """The pictures of a split.

    Attributes:
      place: the file of a picture, by its number.
      annotation: the objects of a picture, by its number; ValueError where the file must be asked
        and cannot be read. Not called for those with a fault.
      length: number of pictures.
      faults: what is wrong with a picture, after the place of the entry, by its number.
      has_masks: whether every object has a mask.
      is_upright: whether boxes are of pictures as viewers show them, by their orientation tags, and
        not as they are stored.
    """

    place: Callable[[int], files.Place]
    annotation: Callable[[int], Annotation]
    length: int
    faults: Mapping[int, str]
    has_masks: bool = False
    is_upright: bool = False


def need_no_labels(request: Request, name: str) -> None:
    """Raise UserError where each picture should have a class."""
    if request.labelled:
        raise UserError(
            f'config: {request.key}.name={name!r} has classes of objects, and none of pictures: '
            "choose a task that learns boxes, such as task.name='detection', or a source of labels"
        )


def check_faults(faults: Mapping[int, str], request: Request) -> None:
    """Raise UserError for the first fault, unless faults are skipped."""
    if not faults:
        return
    more = f' ({len(faults):,} pictures have such faults)' if len(faults) > 1 else ''
    if request.skip_bad:
        say_once(f'{faults[min(faults)]}: skipped{more}')
        return
    raise UserError(
        f"{faults[min(faults)]}: mend or remove it, or set {request.key}.on_error='skip' to go on "
        f'without its picture{more}'
    )


def open_pictures(
    pictures: Pictures, title: str, split: str, class_names: tuple[str, ...], request: Request
) -> Source:
    """Return a source of pictures with boxes, whose faults are refused or skipped.

    Raises:
      UserError: there is a fault that is not skipped, or no picture.
    """
    check_faults(pictures.faults, request)
    if not pictures.length:
        raise UserError(f'{request.key}.split: {title} has no picture in {split}')

    def example(row: int, index: int) -> tuple[Any, Annotation]:
        if index in pictures.faults:
            raise BadExampleError(row, pictures.faults[index])
        data = files.read(pictures.place(index))
        try:
            annotation = pictures.annotation(index)
            return _shown(data, annotation, pictures.is_upright), annotation
        except ValueError as error:
            raise BadExampleError(row, str(error)) from error

    def load(indices: np.ndarray) -> Columns:
        pairs = [example(row, index) for row, index in enumerate(np.asarray(indices).tolist())]
        images, annotations = [image for image, _ in pairs], [own for _, own in pairs]
        columns = {'image': images, 'label': np.zeros(len(images), np.int32)}
        return columns | objects(annotations, pictures.has_masks)

    def annotate(indices: np.ndarray) -> list[Annotation]:
        return [
            _nothing(index) if index in pictures.faults else pictures.annotation(index)
            for index in np.asarray(indices).tolist()
        ]

    return Source(
        name=title,
        split=split,
        length=pictures.length,
        num_classes=len(class_names),
        image_shape=None,
        load=load,
        in_memory=False,
        class_names=class_names,
        where=lambda index: str(pictures.place(index)),
        annotations=annotate,
    )


def _nothing(index: int) -> Annotation:
    """Return what stands for the objects of a picture that is skipped."""
    none = np.zeros(0)
    boxes, labels = np.zeros((0, 4)), np.zeros(0, np.int32)
    return Annotation(0, 0, boxes, labels, np.zeros(0, bool), none, None, '', index)


def objects(annotations: Sequence[Annotation], has_masks: bool) -> Columns:
    """Return the columns of some pictures' objects, boxes clipped to the picture."""
    columns: Columns = {
        'boxes': [_clipped(own).astype(np.float32) for own in annotations],
        'box_label': [own.labels for own in annotations],
        'box_crowd': [own.crowd for own in annotations],
    }
    if has_masks:
        columns['box_mask'] = [
            Masks(own.masks or (), (own.height, own.width), np.arange(len(own.labels)))
            for own in annotations
        ]
    return columns


def read_of(row: int, read: Callable[..., Annotation], *of: Any) -> Annotation:
    """Call a function that reads the objects of a picture; BadExampleError where it cannot."""
    try:
        return read(*of)
    except ValueError as error:
        raise BadExampleError(row, str(error)) from error


def checked_objects(annotations: Sequence[Annotation], num_classes: int) -> Columns:
    """Check objects as they are read, and return their columns.

    Raises:
      BadExampleError: a box or a class is wrong.
    """
    for row, own in enumerate(annotations):
        for box, label in zip(own.boxes.tolist(), own.labels.tolist(), strict=True):
            fault = box_fault(box, own.height, own.width)
            if not 0 <= label < num_classes:
                fault = f'class {label} is not one of {num_classes}'
            if fault is not None:
                raise BadExampleError(row, fault)
    return objects(annotations, has_masks=False)


def _clipped(own: Annotation) -> Float64[np.ndarray, 'n 4']:
    return np.clip(own.boxes, 0, [own.width, own.height, own.width, own.height])


def _shown(data: bytes, annotation: Annotation, is_upright: bool) -> Any:
    """Return a picture as its boxes are meant: the file, or pixels that had to be turned.

    Raises:
      ValueError: it is no picture, or has another size than its boxes are of.
    """
    encoded = decode.Encoded(data)
    size, stored = (annotation.height, annotation.width), encoded.shape[:2]
    turns = encoded.orientation if is_upright or size == stored[::-1] != stored else 1
    shown = stored[::-1] if turns > 4 else stored
    if shown != size:
        sizes = [f'{width}x{height}' for height, width in (shown, size)]
        raise ValueError(f'is {sizes[0]} pixels, and its boxes are of a picture of {sizes[1]}')
    return data if turns == 1 else decode.upright(encoded.pixels(), turns)


def size_of(place: files.Place) -> tuple[int, int]:
    """Return (height, width) of a picture as viewers show it.

    Raises:
      ValueError: it cannot be read.
    """
    try:
        encoded = decode.Encoded(files.read(place))
    except OSError as error:
        raise ValueError(f'{place}: cannot be read ({error.strerror or error})') from error
    height, width, _ = encoded.shape
    return (width, height) if encoded.orientation > 4 else (height, width)


class Rles(Sequence):
    """Masks as COCO's files have them, polygons or runs, each made a mask when it is asked for.

    Asking raises ValueError where one is damaged.
    """

    def __init__(self, segmentations: Sequence[Any], size: tuple[int, int]):
        self._segmentations, self._size = segmentations, size

    def __len__(self) -> int:
        return len(self._segmentations)

    def __getitem__(self, number: Any) -> Any:
        from pycocotools import mask

        if isinstance(number, slice):
            return Rles(self._segmentations[number], self._size)
        own = self._segmentations[number]
        if isinstance(own, list):  # Polygons of the parts of one object.
            return mask.merge(mask.frPyObjects(own, *self._size))
        if isinstance(own['counts'], list):
            return mask.frPyObjects(own, *self._size)
        return {'size': list(self._size), 'counts': own['counts'].encode()}


def mask_fault(segmentation: Any, height: int, width: int) -> str | None:
    """Say what is wrong with a mask as COCO's files have it; None for nothing."""
    if isinstance(segmentation, list):
        for polygon in segmentation:
            if not isinstance(polygon, list) or len(polygon) % 2 or len(polygon) < 6:
                return 'mask has a polygon that is no list of three or more pairs of numbers'
            if not all(type(x) in (int, float) and abs(x) < _FAR for x in polygon):
                return 'mask has a polygon with what are no numbers'
        return None
    if not isinstance(segmentation, dict) or not isinstance(segmentation.get('counts'), list | str):
        return 'mask is neither polygons nor runs'
    counts, size = segmentation['counts'], segmentation.get('size')
    if size != [height, width]:
        shown = 'x'.join(map(str, size[::-1])) if isinstance(size, list) else size
        return f'mask is of {shown} pixels, its picture of {width}x{height}'
    if isinstance(counts, list) and not all(type(run) is int and run >= 0 for run in counts):
        return 'mask has runs that are no whole numbers'
    try:
        runs = counts if isinstance(counts, list) else runs_of(counts.encode()).tolist()
    except ValueError as error:
        return f'mask is damaged: {error}'
    if sum(runs) != height * width or min(runs, default=0) < 0:
        return f'mask has runs of {sum(runs):,} pixels in all, of {height * width:,}'
    return None


# Corners further away than any side of a picture is long.
_FAR = 1 << 20


# --- Checks ----------------------------------------------------------------------------


def box_fault(box: Sequence[Real], height: Real, width: Real) -> str | None:
    """Say what is wrong with a box (x0, y0, x1, y1) in a picture; None for nothing.

    Public sets have many boxes that reach over the edge a little, which is no fault.
    """
    x0, y0, x1, y1 = box
    shown = f'box ({", ".join(f"{value:g}" for value in box)})'
    if not np.isfinite(box).all():
        return f'{shown} has numbers that are none'
    if x1 < x0 or y1 < y0:
        return f'{shown} has its corners in the wrong order'
    if x1 == x0 or y1 == y0:
        return f'{shown} has no area'
    if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
        return f'{shown} is outside of its picture of {width:g}x{height:g} pixels'
    return None


def path_fault(name: Any) -> str | None:
    """Say why a text is no path of a file below a folder; None if it is one."""
    if not isinstance(name, str) or not name or '\0' in name:
        return f'{name!r:.60} is no name of a file'
    if name.startswith('/') or '://' in name or '..' in name.split('/'):
        return f'{name} leads out of the folder of the pictures'
    return None


def listed_stems(file: files.Place, key: str) -> list[str]:
    """Return the names of pictures in a list of VOC's, a line each, without their endings.

    Raises:
      UserError: it cannot be read, or a name is no path below a folder.
    """
    with files.reading(file, f'{key}.path'):
        lines = files.read(file).decode('utf-8-sig', 'replace').splitlines()
    stems = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            # Lists of one class have a second column, whether the class is there.
            stems.append(line.split()[0])
            if fault := path_fault(stems[-1]):
                raise UserError(f'{file}, line {number}: {fault}')
    return stems


def with_ending(stem: str, listed: Collection[str]) -> str | None:
    """Return the name of the picture that is called so, whatever its ending; None for none."""
    endings = itertools.chain(KINDS['image'], map(str.upper, KINDS['image']))
    return next((stem + ending for ending in endings if stem + ending in listed), None)


def absent(folder: files.Place, names: Sequence[str], key: str) -> list[int]:
    """Return the numbers of the files that are not below a folder, by a listing of its folders.

    Raises:
      UserError: none is there.
    """

    @functools.cache
    def listed(below: str) -> frozenset[str]:
        place = folder / below if below else folder
        try:
            if not files.is_folder(place):
                return frozenset()
            return frozenset(entry.name for entry in files.entries(place) if not entry.is_folder)
        except OSError:
            return frozenset()

    missing = [
        number
        for number, name in enumerate(names)
        if posixpath.basename(name) not in listed(posixpath.dirname(name))
    ]
    if names and len(missing) == len(names):
        raise UserError(
            f'{key}: none of the {len(names):,} pictures is in {folder} ({names[0]} is the first): '
            'set it to the folder that they are in'
        )
    return missing
