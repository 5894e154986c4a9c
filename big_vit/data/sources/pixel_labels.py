"""Folders of pictures beside folders of label maps, which have the class of each pixel (ADE20K)."""

import functools
from typing import NamedTuple

import numpy as np

from big_vit.data import files, label_maps
from big_vit.data.sources.annotated import need_no_labels
from big_vit.data.sources.base import Columns, Request, Source
from big_vit.data.sources.media import Names, kind_of
from big_vit.data.sources.splits import cut
from big_vit.errors import UserError

# Folders of pictures and of label maps: ADE20K's, mmsegmentation's, and those of many tools.
LAYOUTS = (
    ('images', 'annotations'),
    ('img_dir', 'ann_dir'),
    ('images', 'labels'),
    ('images', 'masks'),
    ('JPEGImages', 'SegmentationClass'),
    ('leftImg8bit', 'gtFine'),
)
# Names of classes: one a line, or ADE20K's table, whose last column has them.
_NAMES, _TABLE = 'classes.txt', 'objectInfo150.txt'
_MOST_CLASSES = 255  # The number after the last one stands for what is ignored.


class _Pairs(NamedTuple):
    """Paths of the pictures of a split and of their label maps, one for one."""

    pictures: Names
    maps: Names


def pixel_labels(request: Request, *, path: str) -> Source:
    """Open PATH/images/SPLIT/*.jpg with PATH/annotations/SPLIT/*.png of the same names.

    Without folders of splits all pictures are `train`. A label map has the number of a class for
    each pixel, grey or of a palette; 255 is ignored. Names of the classes are the lines of
    PATH/classes.txt, or of ADE20K's own table; without them `num_classes` says how many there are.

    Args:
      request: the examples to open.
      path: of the folder, local or any URL that fsspec reads.

    Raises:
      UserError: folders are missing, a picture has no label map, or nothing says the classes.
    """
    need_no_labels(request, 'pixel_labels')
    key = request.key
    root = files.place(path, f'{key}.path')
    pictures, maps = _folders(root, key)
    with files.reading(root, key):
        splits = [entry.name for entry in files.entries(pictures) if entry.is_folder]
        names = _class_names(root)
    count = _count(request, names, root)
    title = f'pixel_labels:{root.name}'

    def open_split(name: str) -> Source:
        below = name if splits else ''
        pairs = _pairs(pictures / below, maps / below, key)

        def place(index: int) -> str:
            return str(pictures / below / pairs.pictures[index])

        def load(indices: np.ndarray) -> Columns:
            rows = np.asarray(indices).tolist()
            return {
                'image': [files.read(pictures / below / pairs.pictures[row]) for row in rows],
                'segmentation': [files.read(maps / below / pairs.maps[row]) for row in rows],
                'label': np.zeros(len(rows), np.int32),
            }

        def stored(indices: np.ndarray) -> list[np.ndarray]:
            rows = np.asarray(indices).tolist()
            return [label_maps.read(files.read(maps / below / pairs.maps[row])) for row in rows]

        return Source(
            name=title,
            split=name,
            length=len(pairs.pictures),
            num_classes=count,
            image_shape=None,
            load=load,
            in_memory=False,
            class_names=names,
            where=place,
            label_maps=stored,
        )

    return cut(title, splits or ['train'], functools.cache(open_split), request)


def _folders(root: files.Place, key: str) -> tuple[files.Place, files.Place]:
    """Return the folders of pictures and of label maps."""
    if not files.is_folder(root):
        raise UserError(f'{key}.path: {root} is not a folder: name the one that holds the files')
    for pictures, maps in LAYOUTS:
        if files.is_folder(root / pictures) and files.is_folder(root / maps):
            return root / pictures, root / maps
    known = ', '.join('/ and '.join(pair) + '/' for pair in LAYOUTS)
    raise UserError(
        f'{key}.path: {root} has no folder of pictures beside one of label maps; they are called '
        f'{known}'
    )


def _class_names(root: files.Place) -> tuple[str, ...] | None:
    """Return the names of the classes in their order; None where no file has them."""
    for name in (_NAMES, _TABLE):
        if not files.exists(root / name):
            continue
        lines = [x for x in files.read(root / name).decode('utf-8-sig').splitlines() if x.strip()]
        if name == _NAMES:
            return tuple(line.strip() for line in lines)
        return tuple(line.split('\t')[-1].split(',')[0].strip() for line in lines[1:])
    return None


def _count(request: Request, names: tuple[str, ...] | None, root: files.Place) -> int:
    """Return the number of classes."""
    count = request.num_classes or len(names or ())
    if not count:
        raise UserError(
            f'{request.key}.num_classes: nothing says the classes of pixels in {root}: set it, or '
            f'write their names into {_NAMES} there, one a line'
        )
    if names and len(names) != count:
        raise UserError(
            f'{request.key}.num_classes={count}, but {root} names {len(names)} classes: leave it '
            'out'
        )
    if count > _MOST_CLASSES:
        raise UserError(
            f'{request.key}.num_classes={count}: label maps hold at most {_MOST_CLASSES} classes, '
            f'for {_MOST_CLASSES} stands for what is ignored'
        )
    return count


def _pairs(pictures: files.Place, maps: files.Place, key: str) -> _Pairs:
    """List the pictures of a split that have label maps.

    Pictures without are those of other tasks where a folder has more of them (VOC); but if less
    than half have one, the names do not fit.

    Raises:
      UserError: there is none, or few of them.
    """
    with files.reading(pictures, key):
        of_stem = {
            _stem(entry.name): entry.name
            for entry in files.walk(maps)
            if kind_of(entry.name) == 'image'
        }
        found = [e.name for e in files.walk(pictures) if kind_of(e.name) == 'image']
    kept = [name for name in found if _stem(name) in of_stem]
    if not found:
        raise UserError(f'{key}.path: {pictures} has no pictures')
    if 2 * len(kept) < len(found):
        lost = next(name for name in found if _stem(name) not in of_stem)
        raise UserError(
            f'{key}.path: {maps} has no label map for {len(found) - len(kept):,} of '
            f'{len(found):,} pictures, such as {lost}: it must have the same name, and end in .png'
        )
    return _Pairs(Names(iter(kept)), Names(of_stem[_stem(name)] for name in kept))


def _stem(name: str) -> str:
    """Return the path of a picture or label map without its ending, by which they belong together.

    Endings of tools are left out, as in berlin_000_gtFine_labelTrainIds.png.
    """
    stem = name.rpartition('.')[0]
    for ending in ('_gtFine_labelTrainIds', '_leftImg8bit'):
        stem = stem.removesuffix(ending)
    return stem
