"""The study of scenes: what they show, the files they are written to, and controls by hand."""

import numpy as np
import pytest

from benchmarks import scene_pictures, scenes
from benchmarks.scene_pictures import SIDE, Things
from big_vit.data import decode
from big_vit.data.sources import coco, segmentation, voc, yolo
from big_vit.data.sources.base import Request

NAMES = ('disc', 'bar')


def things(count=8):
    """Discs and bars, each of a colour of its own, of which a half of the families are discs."""
    images = np.zeros((count, SIDE, SIDE, 4), np.uint8)
    sizes = np.full((count, 2), SIDE)
    y, x = np.indices((SIDE, SIDE))
    for number in range(count):
        shape = (y - 47.5) ** 2 + (x - 47.5) ** 2 <= 48**2
        if number % 2:
            shape = (y < 40) & (x < SIDE)
            sizes[number, 0] = 40
        images[number][shape] = (6 * number, 250 - 5 * number, 128, 255)
    labels = np.arange(count, dtype=np.int32) % 2
    return Things(images, sizes, labels, tuple(f'f{number}' for number in range(count)))


@pytest.fixture(scope='module')
def made():
    photos = [np.full((200, 300, 3), 7, np.uint8)]
    return scene_pictures.scenes(things(), np.arange(8), photos, 12, 3, size=64)


def test_masks_are_where_the_pixels_of_things_are(made):
    known = things()
    colours = {label: [] for label in range(2)}
    for row, label in enumerate(known.labels):
        colours[label].append(tuple(known.images[row, 20, 40, :3]))
    for one in made:
        assert 1 <= len(one.labels) <= 4
        assert one.masks.sum(0).max() <= 1  # Nearer things hide others.
        inside = np.zeros((64, 64), bool)
        for label, mask, (x0, y0, x1, y1) in zip(one.labels, one.masks, one.boxes(), strict=True):
            assert mask[y0:y1, x0:x1].sum() == mask.sum() > 0
            assert mask[y0].any() and mask[y1 - 1].any()
            assert mask[:, x0].any() and mask[:, x1 - 1].any()
            # Most pixels of a thing have its colour; at its edge the photograph shines through.
            values, counts = np.unique(one.image[mask], axis=0, return_counts=True)
            assert tuple(values[counts.argmax()]) in colours[label]
            inside |= mask
        # Pixels that are less than half of a thing, at its edge, are of the photograph.
        background = (one.image == 7).all(-1)
        assert not (background & inside).any()
        assert (background | inside).mean() > 0.9
        classes = one.classes_of_pixels()
        assert ((classes > 0) == inside).all()


def test_scenes_are_the_same_again(made):
    photos = [np.full((200, 300, 3), 7, np.uint8)]
    again = scene_pictures.scenes(things(), np.arange(8), photos, 2, 3, size=64)
    for one, two in zip(again, made[:2], strict=True):
        assert (one.image == two.image).all() and (one.masks == two.masks).all()
    assert not (again[0].image == again[1].image).all()


@pytest.mark.filterwarnings('ignore:__array__ implementation:DeprecationWarning')  # pycocotools'
@pytest.mark.parametrize('form', ['coco', 'voc', 'yolo'])
def test_scenes_come_back_from_the_files_of_each_form(made, tmp_path, form):
    for split, part in (('train', made[:8]), ('val', made[8:])):
        getattr(scene_pictures, f'write_{form}')(tmp_path, split, part, NAMES)
        opened = {'coco': coco.coco, 'voc': voc.voc, 'yolo': yolo.yolo}[form]
        if form == 'yolo' and split == 'train':
            continue  # Its data.yaml names both.
        source = opened(Request(split, labelled=False), path=str(tmp_path))
        # VOC's classes are sorted by name.
        assert sorted(source.class_names) == sorted(NAMES)
        assert source.length == len(part)
        numbers = [NAMES.index(name) for name in source.class_names]
        images = source.load(np.arange(len(part)))['image']
        for one, image, read in zip(
            part, images, source.annotations(np.arange(len(part))), strict=True
        ):
            np.testing.assert_array_equal(decode.Encoded(image).pixels(), one.image)
            assert (read.height, read.width) == one.image.shape[:2]
            assert [numbers[label] for label in read.labels] == one.labels.tolist()
            np.testing.assert_allclose(read.boxes, one.boxes(), atol=1e-9)
            if form == 'coco':
                from pycocotools import mask

                assert read.area.tolist() == one.masks.sum((1, 2)).tolist()
                for rle, own in zip(read.masks, one.masks, strict=True):
                    assert (mask.decode(dict(rle)) == own).all()


def test_classes_of_pixels_come_back(made, tmp_path):
    scene_pictures.write_label_maps(tmp_path, 'train', made)
    (tmp_path / 'classes.txt').write_text('nothing\ndisc\nbar\n')
    source = segmentation.segmentation(Request('train', labelled=False), path=str(tmp_path))
    assert source.num_classes == 3
    maps = source.label_maps(np.arange(len(made)))
    for one, data in zip(made, maps, strict=True):
        np.testing.assert_array_equal(np.squeeze(data), one.classes_of_pixels())


def test_parts_have_no_family_and_no_picture_in_common():
    known = things(40)
    families = tuple(f'f{number // 2}' for number in range(40))  # Each of both classes.
    one = known._replace(families=families, labels=np.zeros(40, np.int32))
    train, test, val = scene_pictures.divided(one, (0.2, 0.1))
    assert 6 <= len(test) <= 10 and 2 <= len(val) <= 6
    for rows, others in ((train, test), (train, val), (test, val)):
        assert not {families[row] for row in rows} & {families[row] for row in others}
    copied = one._replace(images=np.repeat(one.images[:1], 40, axis=0))
    train, test, val = scene_pictures.divided(copied, (0.2, 0.1))
    assert len(train) and not len(test) and not len(val)


def test_halves_of_photographs_do_not_meet():
    photo = np.arange(300)[None, :, None] * np.ones((4, 1, 3))
    (left,), (right,) = (scene_pictures.halves([photo], side) for side in ('left', 'right'))
    assert left.max() == 199 and right.min() == 200


def test_transparent_pixels_give_no_colour():
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[:, 0] = (200, 100, 0, 255)
    pixels[:, 1] = (0, 0, 255, 0)
    assert scene_pictures.shrunk(pixels, 1, 1).tolist() == [[[200, 100, 0, 128]]]


def test_what_is_said_without_looking_is_right_where_all_scenes_are_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, 'CLASSES', dict.fromkeys(NAMES))
    monkeypatch.setattr(scenes, 'SIZE', 64)
    photos = [np.full((200, 300, 3), 7, np.uint8)]
    (one,) = scene_pictures.scenes(things(), np.arange(8), photos, 1, 3, size=64)
    for split, count in (('train', 5), ('test', 3)):
        scene_pictures.write_coco(tmp_path / 'coco', split, [one] * count, NAMES)
    blind = scenes.without_looking(tmp_path)
    assert blind['AP50'] == pytest.approx(1)
    assert blind['AP'] == pytest.approx(1)
    assert blind['miou'] == pytest.approx((one.classes_of_pixels() == 0).mean() / 3)
