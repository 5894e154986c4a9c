"""Pictures with the class of each pixel, as ADE20K, VOC and plain folders have them."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from big_vit.data import pipeline, transforms
from big_vit.data.sources.base import Request
from big_vit.data.sources.classes import subset
from big_vit.data.sources.known import Known, meet
from big_vit.data.sources.segmentation import segmentation
from big_vit.errors import UserError

REQUEST = Request('train', labelled=False)
ADE = 'Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1\t1\t1\t1\twall, side\n2\t0.1\t1\t1\t1\tsky\n'
VALUES = np.array([[0, 1, 2], [2, 1, 0], [0, 0, 1], [2, 2, 2]], np.uint8)


def write(root, pictures='images/train', classes='annotations/train', palette=False, values=VALUES):
    for folder in (pictures, classes):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number in range(3):
        rng = np.random.default_rng(number)
        picture = rng.integers(0, 255, (*values.shape, 3), np.uint8)
        Image.fromarray(picture).save(root / pictures / f'{number}.png')
        image = Image.fromarray(values)
        if palette:
            image = Image.fromarray(values, 'P')
            image.putpalette(rng.integers(0, 255, 768).tolist())
        image.save(root / classes / f'{number}.png')


def opened(source):
    return replace(source, load=lambda index: transforms.opened(source.load(index), 3))


def refused(call, *words):
    with pytest.raises(UserError) as error:
        call()
    assert all(word in str(error.value) for word in words), str(error.value)


def test_ade20k_has_no_class_0(tmp_path):
    write(tmp_path)
    write(tmp_path, 'images/validation', 'annotations/validation')
    (tmp_path / 'objectInfo150.txt').write_text(ADE)
    source = segmentation(REQUEST._replace(split='validation[1:]'), path=str(tmp_path))
    assert (source.length, source.class_names) == (2, ('wall', 'sky'))
    wanted = np.where(VALUES == 0, 255, VALUES.astype(int) - 1)
    np.testing.assert_array_equal(source.load(np.array([0]))['segmentation'][0], wanted)
    np.testing.assert_array_equal(source.label_maps(np.array([1]))[0], wanted)
    whole = segmentation(REQUEST, path=str(tmp_path), zero_label='class')
    with pytest.raises(ValueError, match='class 2 of a pixel is not one of 2'):
        whole.load(np.array([0]))


def test_255_is_no_class_where_0_is_none_and_256_is_no_255(tmp_path):
    write(tmp_path, values=np.array([[0, 1, 255]], np.uint8))
    write(tmp_path, 'images/wide', 'annotations/wide', values=np.array([[0, 1, 256]], np.uint16))

    def pixels(split, count):
        request = REQUEST._replace(split=split, num_classes=count)
        source = segmentation(request, path=str(tmp_path), zero_label='ignored')
        return source.load(np.array([0]))['segmentation'][0].tolist()

    assert pixels('train', 3) == pixels('train', 254) == [[255, 0, 255]]
    with pytest.raises(ValueError, match='class 256 of a pixel is not one of 3'):
        pixels('wide', 3)
    refused(lambda: pixels('train', 255), 'data.num_classes', 'at most 254')


@pytest.mark.filterwarnings('ignore:.*mode.*:DeprecationWarning')
def test_voc_has_palettes_and_lists(tmp_path):
    write(tmp_path, 'JPEGImages', 'SegmentationClass', palette=True)
    (tmp_path / 'ImageSets/Segmentation').mkdir(parents=True)
    (tmp_path / 'ImageSets/Segmentation/train.txt').write_text('2\n0\n')
    (tmp_path / 'ImageSets/Segmentation/val.txt').write_text('\n')
    (tmp_path / 'ImageSets/Segmentation/.DS_Store').write_bytes(b'\0\1')
    source = segmentation(REQUEST, path=str(tmp_path))
    assert (source.length, source.num_classes, source.class_names[20]) == (2, 21, 'tvmonitor')
    np.testing.assert_array_equal(source.load(np.array([1]))['segmentation'][0], VALUES)
    assert source.place(0).endswith('JPEGImages/2.png')
    empty = REQUEST._replace(split='val')  # And not all pictures that there are.
    refused(lambda: segmentation(empty, path=str(tmp_path)), 'no pictures')


def test_a_batch_has_whole_numbers_and_what_is_padded_is_ignored(tmp_path):
    write(tmp_path, 'images', 'masks')
    source = segmentation(REQUEST._replace(num_classes=3), path=str(tmp_path))
    transform = transforms.parse('flip_ud(1) | pad_to(8)', size=(8, 8))
    batch = pipeline.load(opened(source), transform, np.arange(3), 0, 0)
    wanted = np.full((8, 8), 255)
    wanted[:4, :3] = VALUES[::-1]
    assert batch['segmentation'].dtype == np.int32 and batch['segmentation'].shape == (3, 8, 8)
    np.testing.assert_array_equal(batch['segmentation'][1], wanted)
    refused(
        lambda: transforms.check(
            transforms.parse('randaug(2, 9)', size=(8, 8)), opened(source), (8, 8)
        ),
        'randaug may move pixels and cannot take segmentation',
    )


def test_classes_meet_by_name_and_others_are_ignored(tmp_path):
    write(tmp_path)
    (tmp_path / 'classes.txt').write_text('road, wet\nroad, dry\ntree\n')
    names = segmentation(REQUEST, path=str(tmp_path)).class_names
    assert names == ('road, wet', 'road, dry', 'tree')
    (tmp_path / 'classes.txt').write_text('road\ncar\ntree\n')
    source = segmentation(REQUEST, path=str(tmp_path))
    met, _ = meet(source, Known(4, ('tree', 'sky', 'car', 'road'), 'the model'), 'data')
    np.testing.assert_array_equal(
        met.load(np.array([0]))['segmentation'][0], np.array([3, 2, 0])[VALUES]
    )
    some = subset(source, ('tree', 'road'), 'data.classes')
    np.testing.assert_array_equal(
        some.load(np.array([0]))['segmentation'][0], np.array([1, 255, 0])[VALUES]
    )
    assert some.length == 3


def test_what_is_wrong(tmp_path):
    refused(lambda: segmentation(REQUEST, path=str(tmp_path)), 'no folders of pictures')
    write(tmp_path)
    refused(lambda: segmentation(REQUEST, path=str(tmp_path)), 'data.num_classes', 'classes.txt')
    (tmp_path / 'classes.txt').write_text('road\ncar\n')
    source = segmentation(REQUEST, path=str(tmp_path))
    transform = transforms.parse('resize(8)', size=(8, 8))
    refused(
        lambda: pipeline.load(opened(source), transform, np.arange(3), 0, 0),
        'annotations/train/0.png: class 2 of a pixel is not one of 2', "on_error='skip'",
    )  # fmt: skip
    Image.new('RGB', (3, 4)).save(tmp_path / 'annotations/train/0.png')
    refused(
        lambda: pipeline.load(opened(source), transform, np.arange(1), 0, 0),
        'not one number a pixel',
    )
    Image.fromarray(VALUES[:2] * 0).save(tmp_path / 'annotations/train/0.png')
    refused(
        lambda: pipeline.load(opened(source), transform, np.arange(1), 0, 0),
        'differ in size (2x3 and',
    )
    (tmp_path / 'annotations/train/1.png').unlink()
    refused(lambda: segmentation(REQUEST, path=str(tmp_path)), 'there is no file', '1.png')
    refused(lambda: segmentation(Request('train'), path=str(tmp_path)), 'none of pictures')
