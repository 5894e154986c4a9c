"""Pictures with the class of each pixel, in an image of numbers of the same name."""

import numpy as np
from jaxtyping import Integer

from big_vit.data import decode, files
from big_vit.data.moves import IGNORED
from big_vit.data.sources.annotated import listed_stems, need_no_labels, with_ending
from big_vit.data.sources.base import Columns, Request, Source
from big_vit.data.sources.classes import Classes, named_classes
from big_vit.data.sources.folder import list_folder
from big_vit.data.sources.media import kind_of
from big_vit.data.sources.splits import cut
from big_vit.data.transforms.operations import BadExampleError
from big_vit.errors import UserError

# Folders of pictures and of their classes: ADE20K's, VOC's, and what others are called.
_PICTURES = ('images', 'JPEGImages', 'image')
_CLASSES = ('annotations', 'SegmentationClass', 'labels', 'masks')
# Lists of the names of classes, the first of ADE20K.
_ADE, _NAMES = 'objectInfo150.txt', 'classes.txt'
_LISTS = 'ImageSets/Segmentation'
_VOC = (
    *('background', 'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair'),
    *('cow', 'diningtable', 'dog', 'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa'),
    *('train', 'tvmonitor'),
)


def segmentation(request: Request, *, path: str, zero_label: str | None = None) -> Source:
    """Open a folder of pictures beside one of images of classes, as ADE20K and VOC have them.

    images/SPLIT/a.jpg has its classes in annotations/SPLIT/a.png (or in labels or masks), an image
    of one number a pixel; 255 is no class. VOC's JPEGImages and SegmentationClass have their splits
    in ImageSets/Segmentation. Names of classes are those of objectInfo150.txt or classes.txt (a
    line each) in PATH, VOC's own, or none, and then `num_classes` must be set.

    Args:
      request: the examples to open.
      path: the folder, local or any URL that fsspec reads.
      zero_label: 'ignored' where 0 is no class and the first class is 1, as in ADE20K, else
        'class'; by default as in ADE20K where objectInfo150.txt is there.

    Raises:
      UserError: a file is missing or has another form.
    """
    need_no_labels(request, 'segmentation')
    key = request.key
    root = files.place(path, f'{key}.path')
    if not files.is_folder(root):
        raise UserError(f'{key}.path: {root} is not a folder: name the one that holds images')
    below = {name for name, _ in list_folder(root, key)}
    pictures, values = (
        next((name for name in names if name in below), None) for names in (_PICTURES, _CLASSES)
    )
    if pictures is None or values is None:
        raise UserError(
            f'{key}.path: {root} has no folders of pictures and of their classes, as images and '
            f'annotations (it has {", ".join(sorted(below)[:6]) or "nothing"})'
        )
    classes = _classes(root, below, request)
    shift = (zero_label or ('ignored' if _ADE in below else 'class')) == 'ignored'
    if classes.num_classes > IGNORED - shift:  # The last would be written as 255.
        raise UserError(f'{key}.num_classes: pixels have at most {IGNORED - shift} classes')
    lists = _lists(root, key)
    splits = lists or _split_folders(root / pictures, key)
    title = f'segmentation:{root.name}'

    def open_split(name: str) -> Source:
        inner = f'/{name}' if not lists and files.is_folder(root / pictures / name) else ''
        folder, marks = (files.Place(root.system, f'{root.path}/{part}{inner}')
                         for part in (pictures, values))  # fmt: skip
        stems = splits[name] if lists else _stems(folder, key)
        pairs = _pairs(folder, marks, stems, key)
        return _opened(title, name, pairs, classes, shift)

    return cut(title, splits, open_split, request)


def _classes(root: files.Place, below: set[str], request: Request) -> Classes:
    key = request.key
    listed = next((name for name in (_ADE, _NAMES) if name in below), None)
    if listed is not None:
        with files.reading(root / listed, f'{key}.path'):
            lines = files.read(root / listed).decode('utf-8-sig', 'replace').splitlines()
        rows = [line for line in lines if line.strip()]
        # Idx, Ratio, Train, Val, Stuff, Name
        if listed == _ADE:  # Of names that mean the same the first.
            rows = [line.split('\t')[-1].partition(', ')[0] for line in rows[1:]]
        return named_classes(map(str.strip, rows))
    if 'SegmentationClass' in below:
        return named_classes(_VOC)
    if not request.num_classes:
        raise UserError(
            f'{key}.num_classes: {root} does not say how many classes its pixels have: set it, or '
            f'write their names into {root / _NAMES}, a line each'
        )
    return Classes(request.num_classes, None)


def _lists(root: files.Place, key: str) -> dict[str, list[str]]:
    """Return the names that VOC lists for each split; none without lists."""
    place = files.Place(root.system, f'{root.path}/{_LISTS}')
    if not files.is_folder(place):
        return {}
    names = [name for name, _ in list_folder(place, key) if name.endswith('.txt')]
    return {name.removesuffix('.txt'): listed_stems(place / name, key) for name in names}


def _split_folders(pictures: files.Place, key: str) -> dict[str, list[str]]:
    folders = [name for name, is_folder in list_folder(pictures, key) if is_folder]
    return {name: [] for name in folders or ['train']}


def _stems(folder: files.Place, key: str) -> list[str]:
    """Return the paths of pictures below a folder, without their endings."""
    with files.reading(folder, f'{key}.path'):
        names = [entry.name for entry in files.walk(folder)]
    return [name.rpartition('.')[0] for name in names if kind_of(name) == 'image']


def _pairs(
    folder: files.Place, marks: files.Place, stems: list[str], key: str
) -> list[tuple[files.Place, files.Place]]:
    """Return the files of each picture: itself, and its classes."""
    listed = []
    for place in (folder, marks):
        if not files.is_folder(place):
            raise UserError(f'{key}.path: there is no folder {place}')
        with files.reading(place, f'{key}.path'):
            listed.append(frozenset(entry.name for entry in files.walk(place)))
    pairs = []
    for stem in stems:
        picture, mark = with_ending(stem, listed[0]), f'{stem}.png'
        if picture is None or mark not in listed[1]:
            gone = marks / mark if picture else folder / f'{stem}.jpg'
            raise UserError(f'{key}.path: there is no file {gone}')
        pairs.append((folder / picture, marks / mark))
    if not pairs:
        raise UserError(f'{key}.path: no pictures in {folder}')
    return pairs


def _opened(
    title: str,
    split: str,
    pairs: list[tuple[files.Place, files.Place]],
    classes: Classes,
    shift: bool,
) -> Source:
    def label_maps(indices: np.ndarray) -> list[np.ndarray]:
        marks = [pairs[index][1] for index in np.asarray(indices).tolist()]
        return [_read(row, mark, classes.num_classes, shift) for row, mark in enumerate(marks)]

    def load(indices: np.ndarray) -> Columns:
        rows, values = np.asarray(indices).tolist(), label_maps(indices)
        images = [files.read(pairs[row][0]) for row in rows]
        return {'image': images, 'segmentation': values, 'label': np.zeros(len(rows), np.int32)}

    return Source(
        name=title,
        split=split,
        length=len(pairs),
        num_classes=classes.num_classes,
        image_shape=None,
        load=load,
        in_memory=False,
        class_names=classes.names,
        where=lambda index: str(pairs[index][0]),
        label_maps=label_maps,
    )


def _read(
    row: int, file: files.Place, count: int, shift: bool
) -> Integer[np.ndarray, 'height width']:
    """Read the classes of pixels; BadExampleError for one that there is not."""
    try:
        values = decode.stored_values(files.read(file))
    except decode.DecodeError as error:
        raise BadExampleError(row, f'{file}: {error}') from error
    first, is_ignored = int(shift), values == IGNORED
    if shift:
        is_ignored |= values == 0
    wrong = values[~is_ignored & ((values < first) | (values >= count + first))]
    if wrong.size:
        raise BadExampleError(
            row, f'{file}: class {int(wrong[0])} of a pixel is not one of {count}'
        )
    return np.where(is_ignored, IGNORED, values - first).astype(values.dtype) if shift else values
