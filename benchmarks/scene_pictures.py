"""Scenes with known objects: drawings with transparency on photographs, and the files of datasets.

Things are pictures of Debian's openclipart-png and tuxpaint-stamps-default, photographs those that
scikit-image bundles. A scene is the same whichever form it is written in.
"""

import json
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Int, UInt8

from benchmarks import picture_sets
from big_vit.data.decode import DecodeError, Encoded
from big_vit.errors import UserError

# Folders of openclipart (c) and Tux Paint (t) whose pictures show one kind of thing.
CLASSES: dict[str, tuple[str, ...]] = {
    'animals': ('c/animals', 't/animals'),
    'buildings': ('c/buildings', 't/town/houses', 't/town/monuments'),
    'cards': ('c/recreation/games/cards',),
    'flags': ('c/signs_and_symbols/flags', 't/town/flags'),
    'food': ('c/food', 't/food'),
    'plants': ('c/plants', 't/plants'),
    'road signs': ('c/transportation/roadsigns', 't/town/roadsigns'),
    'vehicles': ('c/transportation/vehicles', 'c/transportation/boating', 't/vehicles'),
}
# Longest side of a thing as it is kept, and what of it is more than air.
SIDE, OPAQUE = 96, 128
# What fraction of a thing must be seen, and of its box's sides, for it to be in a scene.
SEEN, LEAST = 0.4, 6
# How often another thing is drawn where one does not fit.
TRIES = 50


class Things(NamedTuple):
    """Pictures of things, each in the upper left corner of a transparent square.

    Attributes:
      sizes: height and width of each.
      labels: number of the class.
      families: what pictures that are variants of one thing share.
    """

    images: UInt8[np.ndarray, 'things side side 4']
    sizes: Int[np.ndarray, 'things 2']
    labels: Int[np.ndarray, ' things']
    families: tuple[str, ...]


class Scene(NamedTuple):
    """A picture and its objects, from the farthest to the nearest.

    Attributes:
      masks: of what is seen of each.
    """

    image: UInt8[np.ndarray, 'height width 3']
    labels: Int[np.ndarray, ' objects']
    masks: Bool[np.ndarray, 'objects height width']

    def boxes(self) -> Int[np.ndarray, 'objects 4']:
        """Return (x0, y0, x1, y1) around what is seen of each, ends exclusive."""
        return np.array([box_of(mask) for mask in self.masks], int).reshape(-1, 4)

    def classes_of_pixels(self) -> UInt8[np.ndarray, 'height width']:
        """Return 0 for the photograph, and else the class and 1."""
        classes = np.zeros(self.image.shape[:2], np.uint8)
        for label, mask in zip(self.labels, self.masks, strict=True):
            classes[mask] = label + 1
        return classes


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return (x0, y0, x1, y1) of what is true, ends exclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def shrunk(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize with transparency, so that what is transparent gives no colour."""
    alpha = pixels[..., 3:].astype(np.float32) / 255
    premultiplied = np.concatenate([pixels[..., :3] * alpha, alpha], axis=2)
    small = cv2.resize(premultiplied, (width, height), interpolation=cv2.INTER_AREA)
    colour = small[..., :3] / np.maximum(small[..., 3:], 1 / 255)
    made = np.concatenate([colour, 255 * small[..., 3:]], axis=2)
    return np.rint(np.clip(made, 0, 255)).astype(np.uint8)


def thing(path: Path) -> tuple[np.ndarray, tuple[int, int]] | None:
    """Read a picture with transparency, cut to what is seen; None without one that is not thin."""
    try:
        pixels = Encoded(path.read_bytes(), channels=4).pixels()
    except DecodeError:
        return None
    seen = pixels[..., 3] >= OPAQUE
    if seen.sum() < 16:
        return None
    x0, y0, x1, y1 = box_of(seen)
    # Some are of a hundred megapixels; every few of them are enough to average.
    stride = max(max(x1 - x0, y1 - y0) // (8 * SIDE), 1)
    image, size = fitted(pixels[y0:y1:stride, x0:x1:stride])
    return None if min(size) < SIDE / 6 else (image, size)


def fitted(pixels: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Resize a picture into the upper left corner of a square; return its height and width too."""
    scale = SIDE / max(pixels.shape[:2])
    height, width = (max(round(side * scale), 1) for side in pixels.shape[:2])
    kept = np.zeros((SIDE, SIDE, 4), np.uint8)
    kept[:height, :width] = shrunk(pixels, height, width)
    return kept, (height, width)


def things(cache: Path) -> Things:
    """Read the things of all classes; those are kept in `cache`, as decoding takes minutes.

    Raises:
      UserError: a package is not installed.
    """
    if cache.exists():
        with np.load(cache, allow_pickle=False) as kept:
            if kept['classes'].tolist() == list(CLASSES):
                families = tuple(kept['families'].tolist())
                return Things(kept['images'], kept['sizes'], kept['labels'], families)
    roots = {'c': picture_sets.CLIPART, 't': picture_sets.STAMPS}
    for root, package in zip(
        roots.values(), ('openclipart-png', 'tuxpaint-stamps-default'), strict=True
    ):
        if not root.is_dir():
            raise UserError(f'{root} is not there: apt-get install {package}')
    listed = [
        (path, number)
        for number, folders in enumerate(CLASSES.values())
        for folder in folders
        for path in sorted((roots[folder[0]] / folder[2:]).rglob('*.png'))
    ]
    read = [thing(path) for path, _ in listed]
    pairs = [(*one, *listed[row]) for row, one in enumerate(read) if one is not None]
    found = Things(
        np.stack([image for image, *_ in pairs]),
        np.array([size for _, size, *_ in pairs], np.int32),
        np.array([label for *_, label in pairs], np.int32),
        tuple(picture_sets.family(path) for *_, path, _ in pairs),
    )
    partial = cache.with_suffix('.partial.npz')
    arrays = {**found._asdict(), 'families': np.array(found.families)}
    np.savez_compressed(partial, classes=np.array(list(CLASSES)), **arrays)
    partial.replace(cache)
    return found


def divided(known: Things, shares: Sequence[float], seed: int = 0) -> list[np.ndarray]:
    """Return rows of parts that have no family, and no equal picture, in common.

    Args:
      shares: of each class, of the parts but the first, which gets the rest.
    """
    rng = np.random.default_rng(seed)
    keys = [image.tobytes() for image in known.images]
    parts: list[list[int]] = [[] for _ in range(len(shares) + 1)]
    taken: list[set[bytes]] = [set() for _ in parts]
    for label in np.unique(known.labels):
        rows = np.flatnonzero(known.labels == label)
        names = sorted({known.families[row] for row in rows})
        of_family = {name: [row for row in rows if known.families[row] == name] for name in names}
        order = [names[i] for i in rng.permutation(len(names))]
        for part, share in enumerate(shares, 1):
            wanted, count = share * len(rows), 0
            while order and count < wanted:
                # Large families, such as the cards of a pack, are learned from.
                name = order.pop()
                if len(of_family[name]) > max(wanted / 2, 1):
                    parts[0] += of_family[name]
                    continue
                parts[part] += of_family[name]
                count += len(of_family[name])
        parts[0] += [row for name in order for row in of_family[name]]
    kept = []
    for part, rows in enumerate(parts):
        before = set().union(*taken[:part])
        kept.append(np.array(sorted(row for row in rows if keys[row] not in before), int))
        taken[part] = {keys[row] for row in rows}
    return kept


def photographs() -> list[np.ndarray]:
    """Return photographs in which there is nothing of what the classes are, as RGB.

    Raises:
      UserError: scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError as error:
        raise UserError('scenes need photographs: pip install scikit-image') from error
    # All are in its wheel. Cats, flowers, houses and flags are left out.
    names = ('brick', 'grass', 'gravel', 'hubble_deep_field', 'immunohistochemistry', 'moon')
    photos = [np.asarray(getattr(data, name)()) for name in (*names, 'retina', 'rocket')]
    return [
        photo[..., :3] if photo.ndim == 3 else np.repeat(photo[..., None], 3, 2) for photo in photos
    ]


def halves(photos: Sequence[np.ndarray], side: str) -> list[np.ndarray]:
    """Return the left two thirds of photographs to learn from, or the right third to test on."""
    cuts = [photo.shape[1] * 2 // 3 for photo in photos]
    return [
        photo[:, :cut] if side == 'left' else photo[:, cut:]
        for photo, cut in zip(photos, cuts, strict=True)
    ]


def scene(
    known: Things,
    rows: np.ndarray,
    photos: Sequence[np.ndarray],
    rng: np.random.Generator,
    size: int = 128,
    most: int = 4,
) -> Scene:
    """Paste one to `most` things onto a window of a photograph.

    Each class is as likely as another. Things are a fifth to three fifths as large as the scene,
    may be mirrored, and may hide parts of each other; one of which too little would be
    seen is not pasted, and another is drawn.

    Args:
      rows: of the things.
    """
    photo = photos[rng.integers(len(photos))]
    length = int(min(photo.shape[:2]) * rng.uniform(0.4, 1))
    top, left = (int(rng.integers(side - length + 1)) for side in photo.shape[:2])
    window = np.ascontiguousarray(photo[top : top + length, left : left + length])
    method = cv2.INTER_AREA if length > size else cv2.INTER_CUBIC
    image = cv2.resize(window, (size, size), interpolation=method).astype(np.float32)
    labels: list[int] = []
    masks: list[np.ndarray] = []
    whole: list[int] = []
    classes = np.unique(known.labels[rows])
    wanted = int(rng.integers(1, most + 1))
    for _ in range(TRIES):
        if len(labels) == wanted:
            break
        label = int(rng.choice(classes))
        row = int(rng.choice(rows[known.labels[rows] == label]))
        height, width = known.sizes[row]
        scale = size * rng.uniform(0.2, 0.6) / SIDE
        tall, wide = max(round(height * scale), 1), max(round(width * scale), 1)
        pixels = shrunk(known.images[row, :height, :width], tall, wide)
        pixels = pixels[:, ::-1] if rng.random() < 0.5 else pixels
        y, x = int(rng.integers(size - tall + 1)), int(rng.integers(size - wide + 1))
        mask = np.zeros((size, size), bool)
        mask[y : y + tall, x : x + wide] = pixels[..., 3] >= OPAQUE
        left_over = [one & ~mask for one in masks]
        new = [*left_over, mask]
        areas = [*whole, int(mask.sum())]
        if not all(is_seen(one, area) for one, area in zip(new, areas, strict=True)):
            continue
        alpha = pixels[..., 3:].astype(np.float32) / 255
        there = image[y : y + tall, x : x + wide]
        image[y : y + tall, x : x + wide] = pixels[..., :3] * alpha + there * (1 - alpha)
        masks, whole, labels = new, areas, [*labels, label]
    image = np.rint(np.clip(image, 0, 255)).astype(np.uint8)
    return Scene(image, np.array(labels, np.int32), np.array(masks, bool).reshape(-1, size, size))


def is_seen(mask: np.ndarray, area: int) -> bool:
    """Return whether enough of a thing of some area is left."""
    if not mask.any() or mask.sum() < SEEN * area:
        return False
    x0, y0, x1, y1 = box_of(mask)
    return min(x1 - x0, y1 - y0) >= LEAST


def scenes(
    known: Things, rows: np.ndarray, photos: Sequence[np.ndarray], count: int, seed: int, **more
) -> list[Scene]:
    """Compose `count` scenes, each of its own seed."""
    return [
        scene(known, rows, photos, np.random.default_rng([seed, number]), **more)
        for number in range(count)
    ]


# --- Files -----------------------------------------------------------------------------


def write_pictures(folder: Path, made: Sequence[Scene], suffix: str = 'png') -> list[str]:
    """Write the pictures as PNG or JPEG files; return their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f'{number:05d}.{suffix}' for number in range(len(made))]
    for name, one in zip(names, made, strict=True):
        flags = [cv2.IMWRITE_JPEG_QUALITY, 92] if suffix == 'jpg' else []
        data = cv2.imencode(f'.{suffix}', one.image[..., ::-1], flags)[1].tobytes()
        (folder / name).write_bytes(data)
    return names


def write_coco(folder: Path, split: str, made: Sequence[Scene], classes: Sequence[str]) -> None:
    """Write FOLDER/SPLIT/*.png and FOLDER/annotations/instances_SPLIT.json, with masks."""
    from pycocotools import mask as coco_mask

    names = write_pictures(folder / split, made)
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for number, (name, one) in enumerate(zip(names, made, strict=True), 1):
        height, width = one.image.shape[:2]
        images.append({'id': number, 'file_name': name, 'height': height, 'width': width})
        for label, mask, (x0, y0, x1, y1) in zip(
            one.labels.tolist(), one.masks, one.boxes().tolist(), strict=True
        ):
            runs = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            objects.append(
                {
                    'id': len(objects) + 1,
                    'image_id': number,
                    'category_id': label + 1,
                    'bbox': [x0, y0, x1 - x0, y1 - y0],
                    'area': int(mask.sum()),
                    'iscrowd': 0,
                    'segmentation': {**runs, 'counts': runs['counts'].decode('ascii')},
                }
            )
    categories = [{'id': number, 'name': name} for number, name in enumerate(classes, 1)]
    text = json.dumps({'images': images, 'annotations': objects, 'categories': categories})
    file = folder / 'annotations' / f'instances_{split}.json'
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)


def write_voc(folder: Path, split: str, made: Sequence[Scene], classes: Sequence[str]) -> None:
    """Write JPEGImages/SPLIT_*.png, Annotations/SPLIT_*.xml and ImageSets/Main/SPLIT.txt."""
    names = write_pictures(folder / 'JPEGImages' / split, made)
    stems = []
    for name, one in zip(names, made, strict=True):
        stem = f'{split}_{name.partition(".")[0]}'
        (folder / 'JPEGImages' / split / name).rename(folder / 'JPEGImages' / f'{stem}.png')
        root = ET.Element('annotation')
        ET.SubElement(root, 'filename').text = f'{stem}.png'
        size = ET.SubElement(root, 'size')
        for side, value in zip(('height', 'width', 'depth'), one.image.shape, strict=True):
            ET.SubElement(size, side).text = str(value)
        for label, (x0, y0, x1, y1) in zip(one.labels, one.boxes().tolist(), strict=True):
            entry = ET.SubElement(root, 'object')
            ET.SubElement(entry, 'name').text = classes[label]
            box = ET.SubElement(entry, 'bndbox')
            # Pixels from 1, of which the last is of the box.
            corners = {'xmin': x0 + 1, 'ymin': y0 + 1, 'xmax': x1, 'ymax': y1}
            for corner, value in corners.items():
                ET.SubElement(box, corner).text = str(value)
        file = folder / 'Annotations' / f'{stem}.xml'
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(ET.tostring(root))
        stems.append(stem)
    (folder / 'JPEGImages' / split).rmdir()
    listed = folder / 'ImageSets' / 'Main' / f'{split}.txt'
    listed.parent.mkdir(parents=True, exist_ok=True)
    listed.write_text(''.join(f'{stem}\n' for stem in stems))


def write_yolo(
    folder: Path, split: str, made: Sequence[Scene], classes: Sequence[str], suffix: str = 'png'
) -> None:
    """Write images/SPLIT, labels/SPLIT, and data.yaml of the splits train and val."""
    names = write_pictures(folder / 'images' / split, made, suffix)
    labels = folder / 'labels' / split
    labels.mkdir(parents=True, exist_ok=True)
    for name, one in zip(names, made, strict=True):
        height, width = one.image.shape[:2]
        rows = [
            f'{label} {(x0 + x1) / 2 / width} {(y0 + y1) / 2 / height}'
            f' {(x1 - x0) / width} {(y1 - y0) / height}\n'
            for label, (x0, y0, x1, y1) in zip(one.labels, one.boxes().tolist(), strict=True)
        ]
        (labels / f'{name.partition(".")[0]}.txt').write_text(''.join(rows))
    listed = ''.join(f'  {number}: {name}\n' for number, name in enumerate(classes))
    text = f'train: images/train\nval: images/val\nnames:\n{listed}'
    (folder / 'data.yaml').write_text(text)


def write_label_maps(folder: Path, split: str, made: Sequence[Scene]) -> None:
    """Write images/SPLIT and annotations/SPLIT, PNG files of the classes of pixels."""
    names = write_pictures(folder / 'images' / split, made)
    maps = folder / 'annotations' / split
    maps.mkdir(parents=True, exist_ok=True)
    for name, one in zip(names, made, strict=True):
        data = cv2.imencode('.png', one.classes_of_pixels())[1].tobytes()
        (maps / name).write_bytes(data)
