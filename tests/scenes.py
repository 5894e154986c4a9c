"""The same scenes, of known boxes and masks, written as the files of COCO, VOC and YOLO."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

NAMES = ('cat', 'dog', 'lamp')


class Thing(NamedTuple):
    """A rectangle or an ellipse that fills its box (x0, y0, x1, y1), in whole pixels."""

    label: int
    box: tuple[int, int, int, int]
    is_round: bool = False
    crowd: bool = False

    def mask(self, size):
        x0, y0, x1, y1 = self.box
        mask = np.zeros(size, np.uint8)
        if not self.is_round:
            mask[y0:y1, x0:x1] = 1
            return mask
        y, x = np.ogrid[: size[0], : size[1]]
        dx = (2 * x + 1 - x0 - x1) / (x1 - x0)
        dy = (2 * y + 1 - y0 - y1) / (y1 - y0)
        mask[dx**2 + dy**2 <= 1] = 1
        return mask


class Scene(NamedTuple):
    """A picture whose every pixel says where it was: channels are its row, column and 0."""

    name: str
    size: tuple[int, int]
    things: tuple[Thing, ...]

    def pixels(self):
        rows, columns = np.indices(self.size)
        return np.stack([rows, columns, np.zeros(self.size)], axis=2).astype(np.uint8)


SCENES = (
    Scene('a.png', (60, 80), (Thing(0, (10, 20, 50, 40)), Thing(2, (60, 5, 80, 25), True))),
    Scene('b.png', (90, 50), ()),
    Scene('c.png', (64, 64), (Thing(1, (0, 0, 64, 64)), Thing(1, (3, 4, 10, 9)),
                              Thing(0, (30, 20, 61, 50), True))),
)  # fmt: skip


def write_pictures(folder: Path, scenes=SCENES):
    folder.mkdir(parents=True, exist_ok=True)
    for scene in scenes:
        Image.fromarray(scene.pixels()).save(folder / scene.name)


def uncompressed(mask):
    """Return the runs of a mask, of its columns one after the other, by NumPy alone."""
    flat = mask.ravel(order='F')
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [0]]))).tolist()
    return np.diff(
        [0, *edges, *([flat.size] if not edges or edges[-1] < flat.size else [])]
    ).tolist()


def coco_json(scenes=SCENES, masks='runs', ids=(3, 17, 90)):
    """Return what COCO's file says; ids of categories have gaps."""
    pictures, objects = [], []
    for number, scene in enumerate(scenes):
        height, width = scene.size
        pictures.append(
            {'id': 100 + number, 'file_name': scene.name, 'height': height, 'width': width}
        )
        for thing in scene.things:
            x0, y0, x1, y1 = thing.box
            mask = thing.mask(scene.size)
            entry = {
                'id': len(objects) + 1, 'image_id': 100 + number, 'category_id': ids[thing.label],
                'bbox': [x0, y0, x1 - x0, y1 - y0], 'iscrowd': int(thing.crowd),
                'area': float(mask.sum()),
            }  # fmt: skip
            if masks == 'runs':
                entry['segmentation'] = {'size': [height, width], 'counts': uncompressed(mask)}
            elif masks == 'polygons':
                entry['segmentation'] = [[x0, y0, x1, y0, x1, y1, x0, y1]]
            objects.append(entry)
    names = [{'id': number, 'name': name} for number, name in zip(ids, NAMES, strict=True)]
    return {'images': pictures, 'annotations': objects, 'categories': names[::-1]}


def write_coco(root: Path, scenes=SCENES, split='train', content=None, masks='runs'):
    """Write COCO's tree: annotations/instances_SPLIT.json beside the folder SPLIT."""
    write_pictures(root / split, scenes)
    (root / 'annotations').mkdir(exist_ok=True)
    content = coco_json(scenes, masks) if content is None else content
    file = root / 'annotations' / f'instances_{split}.json'
    file.write_text(json.dumps(content))
    return file


def write_voc(root: Path, scenes=SCENES, split='train', less=1):
    """Write VOC's tree; corners are pixels from `less`, of which the last is inside for 1."""
    write_pictures(root / 'JPEGImages', scenes)
    for folder in ('Annotations', 'ImageSets/Main'):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for scene in scenes:
        objects = ''.join(
            f'<object><name>{NAMES[t.label]}</name><difficult>{int(t.crowd)}</difficult>'
            f'<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax>'
            f'</bndbox></part><bndbox><ymax>{t.box[3]}</ymax><xmin>{t.box[0] + less}</xmin>'
            f'<ymin>{t.box[1] + less}</ymin><xmax>{t.box[2]}.0</xmax></bndbox></object>'
            for t in scene.things
        )
        size = f'<width>{scene.size[1]}</width><height>{scene.size[0]}</height><depth>3</depth>'
        file = f'<filename>{scene.name}</filename>'
        text = f'<annotation>{file}<size>{size}</size>{objects}</annotation>'
        (root / 'Annotations' / f'{Path(scene.name).stem}.xml').write_text(text)
    stems = '\n'.join(Path(scene.name).stem for scene in scenes)
    (root / 'ImageSets' / 'Main' / f'{split}.txt').write_text(f'{stems}\n')
    (root / 'ImageSets' / 'Main' / f'cat_{split}.txt').write_text('a 1\n')


def write_yolo(root: Path, scenes=SCENES, split='train', polygons=False):
    """Write YOLO's tree, with all digits; an empty picture has no text file."""
    write_pictures(root / 'images' / split, scenes)
    (root / 'labels' / split).mkdir(parents=True, exist_ok=True)
    for scene in scenes:
        rows = []
        for t in scene.things:
            box = np.array(t.box) / (*scene.size[::-1], *scene.size[::-1])
            x0, y0, x1, y1 = box.tolist()
            numbers = [(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]
            numbers = [x0, y0, x1, y0, x1, y1, x0, y1] if polygons else numbers
            rows.append(f'{t.label} {" ".join(map(repr, numbers))}')
        if rows:
            text = '\n'.join(rows) + '\n'
            (root / 'labels' / split / f'{Path(scene.name).stem}.txt').write_text(text)
    names = '\n'.join(f'  {i}: {name}' for i, name in enumerate(NAMES))
    (root / 'data.yaml').write_text(f'path: .\n{split}: images/{split}\nnames:\n{names}\n')
