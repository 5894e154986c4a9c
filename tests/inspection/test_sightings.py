"""What models see in pictures: mistakes against known cases, and what is written and drawn."""

import io

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from big_vit.data import decode
from big_vit.data.sources.base import Annotation
from big_vit.inspection import objects, sightings

NAMES = ('ant', 'bee', 'cat')


def found(*rows):
    """Objects of (score, label, x0, y0, x1, y1)."""
    table = np.array(rows, np.float64).reshape(-1, 6)
    return sightings.Objects(table[:, 0], table[:, 1].astype(int), table[:, 2:])


def truth(*rows):
    """Annotation of (label, x0, y0, x1, y1, crowd)."""
    table = np.array(rows, np.float64).reshape(-1, 6)
    boxes = table[:, 1:5]
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return Annotation(
        60, 80, boxes, table[:, 0].astype(np.int32), table[:, 5] > 0, area, None, 'a.jpg', 1
    )


def test_overlaps_are_those_of_pycocotools():
    rng = np.random.default_rng(0)
    low, size = rng.uniform(0, 50, (2, 9, 2)), rng.uniform(0, 40, (2, 9, 2))
    one, other = (np.concatenate([a, a + b], axis=1) for a, b in zip(low, size, strict=True))
    given = [np.concatenate([a, b], axis=1) for a, b in zip(low, size, strict=True)]
    want = coco_mask.iou(*given, [0] * 9)
    np.testing.assert_allclose(sightings.overlap(one, other), want, atol=1e-12)


def test_the_surest_of_two_finds_an_object_and_the_other_is_wrong():
    there = truth((0, 10, 10, 30, 30, 0), (1, 40, 10, 60, 30, 0))
    seen = found((0.6, 0, 10, 10, 30, 30), (0.9, 0, 11, 10, 30, 30), (0.8, 0, 40, 10, 60, 30))
    wrong, missed = sightings.mistaken(seen, there)
    assert wrong.tolist() == [True, False, True], 'the last has another class'
    assert missed.tolist() == [False, True]


def test_what_lies_in_a_crowd_is_no_mistake_and_a_crowd_need_not_be_found():
    there = truth((2, 0, 0, 50, 50, 1))
    seen = found((0.6, 2, 5, 5, 15, 15), (0.7, 2, 20, 20, 40, 40), (0.7, 2, 45, 45, 80, 60))
    wrong, missed = sightings.mistaken(seen, there)
    assert wrong.tolist() == [False, False, True] and not missed.any()


def test_likely_objects_are_named_the_surest_first():
    seen = found((0.51, 1, 1, 2, 3.4, 4), (0.2, 0, 0, 0, 1, 1), (0.9, 2, 5, 5, 9, 9))
    assert seen.likely(0.5).words(NAMES) == 'cat 90% 5,5-9,9  bee 51% 1,2-3,4'
    assert seen.likely(0.95).words(NAMES) == 'nothing'


def test_label_maps_are_written_as_numbers_and_shares_are_told():
    labels = np.array([[0, 1, 1, 1], [2, 1, 1, 1]])
    png = sightings.label_png(labels, 3)
    np.testing.assert_array_equal(decode.stored_values(png), labels)
    shown = np.asarray(Image.open(io.BytesIO(png)).convert('RGB'))
    assert tuple(shown[1, 0]) == objects.colour_of(2)
    assert sightings.shares(labels, NAMES, 2) == 'bee 75.0%  ant 12.5%'


def test_the_worst_pictures_come_first_and_right_ones_are_left_out():
    picture = np.full((60, 80, 3), 90, np.uint8)
    there = truth((0, 10, 10, 30, 30, 0))
    cases = {
        'right': found((0.9, 0, 10, 10, 30, 30)),
        'missed': found(),
        'worse': found((0.9, 1, 10, 10, 30, 30)),
    }
    judged = [sightings.judge_objects(picture, x, there, NAMES, n) for n, x in cases.items()]
    page = sightings.section(judged, 3, 9)
    assert page.index('worse: 1 missed, 1 wrong of 1') < page.index('missed: 1 missed, 0 wrong')
    assert 'right' not in page and 'the first 3 of 9' in page and page.count('<img') == 4
    assert 'Nothing is mistaken in all 3 pictures' in sightings.section(judged[:1], 3, 3)


def test_pixels_that_are_ignored_are_no_mistakes():
    picture = np.full((4, 5, 3), 90, np.uint8)
    true, said = np.zeros((4, 5), int), np.zeros((4, 5), int)
    true[0], said[1, :2] = 255, 1
    judged = sightings.judge_labels(picture, said, true, 'p')
    assert judged.badness == pytest.approx(2 / 15)
    assert [title for title, _ in judged.shown] == ['picture', 'true', 'said', 'mistaken pixels']
    wrong = judged.shown[-1][1]
    assert (wrong[1, 0] != 90).any() and (wrong[1, 2:] == 90).all() and (wrong[0] == 90).all()
    assert sightings.judge_labels(picture, said, np.full((4, 5), 255), 'p') is None
