"""COCO's figures against pycocotools on files, and cases whose figures are known."""

import contextlib
import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from big_vit import sharding
from big_vit.data import transforms
from big_vit.data.sources.base import Annotation, Source
from big_vit.errors import UserError
from big_vit.evaluators import detection
from big_vit.evaluators.evaluation import Evaluation, Split
from big_vit.tasks.task import Detections

MESHES = {
    1: sharding.make_mesh(1, 1, 1, jax.devices()[:1]),
    8: sharding.make_mesh(2, 2, 2),
}
NAMES = ('ant', 'bee', 'cat', 'dog')
CANVAS, BATCH, QUERIES, GRID = (32, 32), 8, 12, (8, 8)


def picture(number, objects, size=(100, 100), masks=None):
    """Annotation of a picture: objects are (label, x0, y0, x1, y1), with area and crowd behind."""
    rows = [(*one, (one[3] - one[1]) * (one[4] - one[2]), False)[:7]
            if len(one) == 5 else one for one in objects]  # fmt: skip
    table = np.array([one[1:5] for one in rows], np.float64).reshape(-1, 4)
    return Annotation(
        *size, table, np.array([one[0] for one in rows], np.int32),
        np.array([one[6] for one in rows], bool), np.array([one[5] for one in rows], np.float64),
        masks, f'{number}.jpg', number,
    )  # fmt: skip


def source(pictures):
    return Source(
        'made', 'test', len(pictures), len(NAMES), None, lambda index: {}, True,
        class_names=NAMES, where=lambda row: f'picture {row}',
    )  # fmt: skip


def evaluated(pictures, found, devices=1, masks=None, bad=(), **settings):
    """Run the evaluator on given detections: (scores, labels, boxes) of each picture."""
    mesh, count = MESHES[devices], len(pictures)
    where = sharding.batch_sharding(mesh)
    arrays = [np.stack([row[k] for row in found]) for k in range(3)]

    def batches():
        for start in range(0, -(-count // BATCH) * BATCH, BATCH):
            rows = np.arange(start, start + BATCH)
            real = (rows < count) & ~np.isin(rows, bad)
            # What stands for no example has detections too, as of an empty picture.
            row = np.where(rows < count, rows, 0)
            size = np.array([(32, 20) if r % 2 else (32, 32) for r in row], np.int32)
            batch = {
                'image': np.zeros((BATCH, *CANVAS, 3), np.uint8),
                'row': row.astype(np.int32),
                'picture_size': size,
                'mask': real.astype(np.float32),
            }
            yield {name: jax.device_put(x, where) for name, x in batch.items()}

    def detect(params, batch):
        scores, labels, boxes = (jnp.asarray(array)[batch['row']] for array in arrays)
        given = None if masks is None else jnp.asarray(masks)[batch['row']]
        return Detections(scores, labels, boxes, given)

    made = source(pictures)
    made = dataclasses.replace(made, annotations=lambda index: [pictures[i] for i in index])
    spec = transforms.ExampleSpec({'image': ((*CANVAS, 3), np.dtype(np.uint8))}, 255)
    split = Split(
        made, transforms.parse('', size=CANVAS), spec, ('image',), 0, (), lambda x: x, batches
    )

    def compile_rows(key, rows):
        return jax.jit(rows, out_shardings=(sharding.replicated(mesh), where))

    fields = dict.fromkeys(Evaluation._fields)
    fields |= dict(key='evals.x', split=split, training=made, image_size=CANVAS, detect=detect)
    evaluation = Evaluation(**{**fields, 'compile_rows': compile_rows})
    return detection.detection(evaluation, **settings)(None, {})


def detections(rows, size=(100, 100), queries=4):
    """Arrays of (score, label, x0, y0, x1, y1), filled with what scores 0 far away."""
    scores, labels = np.zeros(queries, np.float32), np.zeros(queries, np.int32)
    boxes = np.full((queries, 4), 1e-3, np.float32)
    for k, (score, label, x0, y0, x1, y1) in enumerate(rows):
        scores[k], labels[k] = score, label
        middle = (x0 + x1) / 2 / size[1], (y0 + y1) / 2 / size[0]
        boxes[k] = *middle, (x1 - x0) / size[1], (y1 - y0) / size[0]
    return scores, labels, boxes


# Cases whose figures are known.


def test_perfect_detections_score_one_and_none_score_zero():
    objects = [(0, 10, 10, 20, 20), (1, 30, 30, 80, 90), (1, 50, 5, 60, 15)]
    pictures = [picture(5, objects), picture(3, [])]
    right = detections([(0.9, *objects[0]), (0.8, *objects[1]), (0.7, *objects[2])])
    empty = detections([])
    # A filling query is a false positive of class 0 with the lowest score.
    got = evaluated(pictures, [right, empty])
    assert got['AP'] == got['AP50'] == got['AP75'] == pytest.approx(1)
    assert got['AR_100'] == 1 and got['count'] == 2 and next(iter(got)) == 'AP'
    assert got['AR_1'] == pytest.approx((1 + 0.5) / 2)
    assert got['AP_large'] == -1, 'no object is of this size'
    got = evaluated(pictures, [empty, empty])
    assert got['AP'] == got['AR_100'] == 0
    got = evaluated([picture(1, []), picture(2, [])], [empty, empty])
    assert all(got[name] == -1 for name in detection.FIGURES)


def test_an_object_of_exactly_1024_pixels_is_small_and_medium():
    box = (2, 10, 10, 42, 42)
    got = evaluated([picture(1, [box])], [detections([(0.5, *box)])], per_class='all')
    assert got['AP_small'] == got['AP_medium'] == pytest.approx(1) and got['AP_large'] == -1
    assert got['AP/cat'] == pytest.approx(1) and 'AP/ant' not in got


def test_a_crowd_takes_many_detections_and_counts_as_no_object():
    crowd = (0, 0.0, 0.0, 60.0, 60.0, 3600.0, True)
    single = (0, 80.0, 80.0, 90.0, 90.0, 100.0, False)
    inside = [(0.9, 0, 0, 0, 20, 20), (0.8, 0, 30, 30, 50, 50), (0.5, 0, 80, 80, 90, 90)]
    got = evaluated([picture(1, [crowd, single])], [detections(inside, queries=3)])
    assert got['AP'] == pytest.approx(1), 'those in the crowd are no mistakes'
    plain = (0, 0.0, 0.0, 60.0, 60.0, 3600.0, False)
    got = evaluated([picture(1, [plain, single])], [detections(inside, queries=3)])
    # Of three detections the last one is right, and one object of two is found: 1/3 up to 0.5.
    assert got['AP'] == pytest.approx(51 / 101 / 3)


def test_of_equal_scores_the_first_in_the_order_of_the_examples_counts_first():
    box = (0, 10, 10, 20, 20)
    right, wrong = (
        detections([(0.5, *box)], queries=1),
        detections([(0.5, 0, 60, 60, 70, 70)], queries=1),
    )
    pictures = [picture(number, [box]) for number in (1, 2)]
    first = evaluated(pictures, [right, wrong])
    assert first['AP'] == pytest.approx(51 / 101)
    assert evaluated(pictures, [wrong, right])['AP'] == pytest.approx(51 / 101 / 2)
    # Pictures are in the order of their numbers, as in pycocotools, and not of the file.
    turned = [picture(number, [box]) for number in (2, 1)]
    assert evaluated(turned, [wrong, right])['AP'] == pytest.approx(51 / 101)


# Against files.


def scene(seed=0, count=19):
    """Pictures with objects, masks, crowds and ties, and what was found in them."""
    rng = np.random.default_rng(seed)
    pictures, found, logits = [], [], []
    numbers = rng.permutation(1000)[:count] + 7
    for number in numbers.tolist():
        size = tuple(rng.integers(60, 400, 2).tolist())
        objects, masks = [], []
        for _ in range(int(rng.integers(0, 8))):
            x, y = rng.uniform(0, 0.6, 2) * size[::-1]
            w, h = rng.uniform(0.05, 0.4, 2) * size[::-1]
            pixels = np.zeros(size, np.uint8, 'F')
            pixels[int(y) : int(y + h) + 1, int(x) : int(x + w) + 1] = 1
            pixels[int(y + h / 2) :, int(x + w / 2) :] = 0
            masks.append(coco_mask.encode(pixels))
            area = float(coco_mask.area(masks[-1]))
            objects.append(
                (int(rng.integers(0, 3)), x, y, x + w, y + h, area, bool(rng.uniform() < 0.1))
            )
        pictures.append(picture(number, objects, size, tuple(masks)))
        rows, shapes = [], rng.normal(-2, 1, (QUERIES, *GRID))
        for label, x0, y0, x1, y1, *_ in objects:
            for _ in range(int(rng.integers(1, 4))):
                moved = np.array([x0, y0, x1, y1]) * rng.normal(1, 0.08, 4)
                seen = int(rng.integers(0, 3)) if rng.uniform() < 0.2 else label
                rows.append((round(rng.uniform(), 1), seen, *moved))
        rows = rows[:QUERIES]
        for k, (_, _, x0, y0, x1, y1) in enumerate(rows):
            scale = np.array([GRID[1] / size[1], GRID[0] / size[0]] * 2)
            a, b, c, d = np.round(np.array([x0, y0, x1, y1]) * scale).astype(int)
            shapes[k, b:d, a:c] += 5
        found.append(detections(rows, size, QUERIES))
        logits.append(shapes)
    return pictures, found, np.array(logits, np.float32)


def by_files(folder, pictures, entries, kind):
    """The twelve figures of files that pycocotools itself reads."""
    objects = [
        {
            'id': 1 + sum(len(other.labels) for other in pictures[:at]) + k,
            'image_id': one.image_id,
            'category_id': int(one.labels[k]) + 1,
            'bbox': [*one.boxes[k, :2], *(one.boxes[k, 2:] - one.boxes[k, :2])],
            'area': one.area[k],
            'iscrowd': int(one.crowd[k]),
            'segmentation': {
                'size': list(one.masks[k]['size']), 'counts': one.masks[k]['counts'].decode()
            },
        }
        for at, one in enumerate(pictures)
        for k in range(len(one.labels))
    ]  # fmt: skip
    images = [{'id': one.image_id, 'height': one.height, 'width': one.width} for one in pictures]
    categories = [{'id': k + 1, 'name': name} for k, name in enumerate(NAMES)]
    truth = {'images': images, 'annotations': objects, 'categories': categories}
    (folder / 'truth.json').write_text(json.dumps(truth))
    (folder / 'found.json').write_text(json.dumps(entries))
    with contextlib.redirect_stdout(io.StringIO()):
        loaded = COCO(str(folder / 'truth.json'))
        judge = COCOeval(loaded, loaded.loadRes(str(folder / 'found.json')), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge


def boxes_by_hand(pictures, found):
    entries = []
    for one, (scores, labels, boxes) in zip(pictures, found, strict=True):
        for score, label, box in zip(scores, labels, boxes.astype(np.float64), strict=True):
            x, y = box[:2] - box[2:] / 2
            entries.append(
                {
                    'image_id': one.image_id,
                    'category_id': int(label) + 1,
                    'bbox': [
                        x * one.width,
                        y * one.height,
                        box[2] * one.width,
                        box[3] * one.height,
                    ],
                    'score': float(score),
                }
            )
    return entries


@pytest.mark.parametrize('devices', [1, 8])
def test_all_figures_are_to_the_last_digit_those_of_pycocotools_on_files(devices, tmp_path):
    pictures, found, _ = scene()
    got = evaluated(pictures, found, devices, per_class='all')
    judge = by_files(tmp_path, pictures, boxes_by_hand(pictures, found), 'bbox')
    assert [got[name] for name in detection.FIGURES] == judge.stats.tolist()
    assert 0.1 < got['AP'] < 0.9
    precision = judge.eval['precision'][:, :, :, 0, 2]
    for k, name in enumerate(NAMES[:3]):
        assert got[f'AP/{name}'] == precision[:, :, k].mean()
    assert 'AP/dog' not in got


@pytest.mark.parametrize('devices', [1, 8])
def test_figures_of_masks_are_those_of_files_without_boxes(devices, tmp_path):
    import cv2

    pictures, found, logits = scene(1)
    got = evaluated(pictures, found, devices, masks=logits)
    entries, boxes = [], boxes_by_hand(pictures, found)
    for at, one in enumerate(pictures):
        width = 20 if at % 2 else 32
        for k in range(QUERIES):
            whole = cv2.resize(logits[at, k], CANVAS[::-1])[:, :width]
            shape = cv2.resize(np.ascontiguousarray(whole), (one.width, one.height)) > 0
            run = coco_mask.encode(np.asfortranarray(shape.astype(np.uint8)))
            entry = dict(boxes[at * QUERIES + k])
            entry.pop('bbox')
            entry['segmentation'] = {'size': run['size'], 'counts': run['counts'].decode()}
            entries.append(entry)
    judge = by_files(tmp_path, pictures, entries, 'segm')
    assert [got[f'mask/{name}'] for name in detection.FIGURES] == judge.stats.tolist()
    assert got['mask/AP'] > 0
    judge = by_files(tmp_path, pictures, boxes, 'bbox')
    assert [got[name] for name in detection.FIGURES] == judge.stats.tolist()


def test_a_picture_that_cannot_be_read_is_left_out(tmp_path):
    pictures, found, _ = scene(2)
    got = evaluated(pictures, found, bad=(3, 4))
    kept = [i for i in range(len(pictures)) if i not in (3, 4)]
    pictures, found = [pictures[i] for i in kept], [found[i] for i in kept]
    judge = by_files(tmp_path, pictures, boxes_by_hand(pictures, found), 'bbox')
    assert [got[name] for name in detection.FIGURES] == judge.stats.tolist()
    assert got['count'] == len(kept)


def test_pictures_of_several_files_with_the_same_numbers_stay_apart():
    box = (0, 10, 10, 20, 20)
    pictures = [picture(1, [box]), picture(1, [box])]
    got = evaluated(pictures, [detections([(0.5, *box)])] * 2)
    assert got['AP'] == pytest.approx(1) and got['AR_100'] == 1


def test_numbers_of_a_file_are_kept_as_they_are():
    x, width = 0.1, 0.7000000000000001
    one = picture(1, [(0, x, 0, x + width, 1)])._replace(xywh=np.array([[x, 0, width, 1.0]]))
    made = source([one])
    made = dataclasses.replace(made, annotations=lambda index: [one for _ in index])
    (entry,) = detection.ground_truth(made, [0], NAMES).dataset['annotations']
    assert entry['bbox'] == [x, 0, width, 1] and entry['id'] == 1


def test_what_is_no_number_and_data_without_boxes_are_refused(monkeypatch):
    scores, labels, boxes = detections([(0.5, 0, 1, 1, 2, 2)])
    with pytest.raises(UserError, match='boxes that are not finite'):
        evaluated([picture(1, [])], [(scores, labels, boxes * np.nan)])
    made = source([])
    with pytest.raises(UserError, match='made test has no boxes'):
        detection.annotations_of(made, 'evals.x')
