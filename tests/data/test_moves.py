"""Boxes, masks and classes of pixels move with the pixels of their pictures."""

import cv2
import numpy as np
import pytest
import scenes
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from scenes import Scene, Thing

from big_vit.data import order, pipeline, transforms
from big_vit.data.moves import IGNORED, Masks, Move
from big_vit.data.sources.base import Source
from big_vit.data.transforms import Transform
from big_vit.errors import UserError

SIZE = (24, 20)


def parse(text, size=SIZE):
    return transforms.parse(text, size=size)


def keys(count, seed=0):
    return order.example_keys(seed, 0, np.arange(count))


def columns_of(pictures, as_list=True):
    """Return the columns of some scenes; the classes of pixels number their rows and columns."""
    columns = {'image': [scene.pixels() for scene in pictures]}
    columns['boxes'] = [
        np.array([t.box for t in scene.things], np.float32).reshape(-1, 4) for scene in pictures
    ]
    columns['box_label'] = [np.array([t.label for t in s.things], np.int32) for s in pictures]
    columns['box_crowd'] = [np.array([t.crowd for t in s.things], bool) for s in pictures]
    columns['box_mask'] = [masks_of(scene) for scene in pictures]
    columns['segmentation'] = [
        (np.arange(s.size[0])[:, None] % 16 * 15 + np.arange(s.size[1]) % 15).astype(np.uint8)
        for s in pictures
    ]
    return columns if as_list else {**columns, 'image': np.stack(columns['image'])}


def masks_of(scene):
    rles = [coco_mask.encode(np.asfortranarray(t.mask(scene.size))) for t in scene.things]
    return Masks(rles, scene.size, np.arange(len(rles)))


def things(height, width):
    corner = st.tuples(st.integers(0, width - 1), st.integers(0, height - 1))
    return st.builds(
        lambda label, low, high: Thing(
            label,
            (
                min(low[0], high[0]),
                min(low[1], high[1]),
                max(low[0], high[0]) + 1,
                max(low[1], high[1]) + 1,
            ),
        ),
        st.integers(0, 2),
        corner,
        corner,
    )


@st.composite
def pictures(draw, count=3, same=False):
    """Pictures of rectangles that fill their boxes."""
    size = draw(st.tuples(st.integers(26, 70), st.integers(26, 70)))
    made = []
    for number in range(count):
        if not same:
            size = draw(st.tuples(st.integers(26, 70), st.integers(26, 70)))
        own = draw(st.lists(things(*size), max_size=4))
        own = tuple(thing._replace(label=k) for k, thing in enumerate(own))
        made.append(Scene(str(number), size, own))
    return made


MOVES = (
    "resize(size, method='nearest')",
    "resize_small(33, method='nearest')",
    "resize_long(61, method='nearest')",
    "resize_short((25, 40, 64), most=70, method='nearest')",
    'central_crop(size)',
    'random_crop(size)',
    'random_crop(size, pad=3)',
    "resmall_crop(size, method='nearest')",
    "inception_crop(size, method='nearest')",
    "rrc(size, method='nearest')",
    'scaled_crop((30, 40), low=12, high=36, p=0.8)',
    'flip_lr',
    'flip_ud',
    'pad(5, value=255)',
    "pad(4, mode='edge')",
)
CANVAS = (
    'pad_to(160)',
    'pad_to(multiple=32)',
    "large_scale_jitter((40, 52), scale=(0.3, 2), method='nearest')",
)


@given(
    pictures(),
    st.lists(st.sampled_from(MOVES), min_size=1, max_size=2),
    st.sampled_from((None, *CANVAS)),
    st.integers(0, 99),
)
def test_masks_and_boxes_are_where_their_pixels_are(some, moves, canvas, seed):
    """By the picture itself, whose every pixel says where it was."""
    check_moves(some, moves, canvas, seed)


@pytest.mark.parametrize('text', (*MOVES, *CANVAS))
def test_every_operation_takes_boxes_and_masks_along(text):
    things = (Thing(0, (5, 8, 31, 30)), Thing(1, (0, 20, 12, 41)), Thing(2, (20, 2, 38, 9)))
    some = [Scene('a', (43, 39), things), Scene('b', (51, 67), things)]
    for seed in range(4):
        check_moves(some, [] if text in CANVAS else [text], text if text in CANVAS else None, seed)


def check_moves(some, moves, canvas, seed):
    text = ' | '.join(filter(None, [*moves, canvas]))
    before = columns_of(some)
    try:
        after = parse(text)(before, keys(len(some), seed))
    except UserError as error:
        assert 'cannot cut' in str(error) or 'room' in str(error)
        return
    for row, scene in enumerate(some):
        image, classes = np.asarray(after['image'][row]), after['segmentation'][row]
        masks, boxes = after['box_mask'][row].pixels(), after['boxes'][row]
        labels = after['box_label'][row].tolist()
        assert image.shape[:2] == classes.shape == masks.shape[1:]
        assert len(labels) == len(boxes) == len(masks) == len(after['box_crowd'][row])
        inside = classes != IGNORED
        at = tuple(image[inside][:, axis].astype(int) for axis in (0, 1))
        # OpenCV takes either of two pixels that are equally near, which a second move enlarges.
        off = 1 if len(moves) + (canvas == CANVAS[2]) < 2 else 5
        square = np.ones((2 * off + 1, 2 * off + 1), np.uint8)
        parts = np.divmod(classes[inside].astype(int), 15)
        for part, place, period in zip(parts, at, (16, 15), strict=True):
            assert ((part - place + off) % period).max() <= 2 * off
        enlarged = _enlarged(*at)
        for number in range(len(scene.things)):
            whole = scene.things[number].mask(scene.size)
            core, grown = cv2.erode(whole, square), cv2.dilate(whole, square)
            if number not in labels:
                assert not core[at].any(), 'an object that is seen is gone'
                continue
            own, box = masks[labels.index(number)], boxes[labels.index(number)]
            assert (core[at] <= own[inside]).all() and (own[inside] <= grown[at]).all()
            assert not own[~inside].any()
            if own.any():
                assert np.abs(box - _tight(own)).max() <= 0.51 + max(len(moves), 1) * enlarged
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes >= 0).all() and (boxes <= [*image.shape[1::-1]] * 2).all()


def _tight(mask):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def _enlarged(rows, columns):
    """Return half of how many pixels are made of an old one, where there are several."""
    pairs = np.unique(rows * 1000 + columns, return_counts=True)[1]
    return 0.5 * np.sqrt(pairs.max()) if pairs.max() > 1 else 0.5


@given(pictures(count=2), st.sampled_from(MOVES), st.integers(0, 99))
def test_the_tight_box_of_a_moved_mask_is_the_moved_box_within_a_pixel(some, text, seed):
    try:
        after = parse(text)(columns_of(some), keys(len(some), seed))
    except UserError as error:
        assert 'cannot cut' in str(error)
        return
    for row in range(len(some)):
        masks = after['box_mask'][row].pixels()
        for box, mask in zip(after['boxes'][row], masks, strict=True):
            if mask.any():
                assert np.abs(box - _tight(mask)).max() <= 1
            else:  # Between two pixels that are taken.
                assert (box[2:] - box[:2]).min() <= 1


@given(
    pictures(same=True, count=2), st.sampled_from(['flip_lr(1)', 'flip_ud(1)', 'pad(2)', *MOVES])
)
def test_arrays_of_pictures_are_moved_as_lists_are(some, text):
    if 'cannot' in (error := _error(lambda: parse(text)(columns_of(some), keys(2)))):
        return
    assert not error
    one, other = (parse(text)(columns_of(some, as_list), keys(2)) for as_list in (True, False))
    for row in range(2):
        np.testing.assert_array_equal(one['boxes'][row], other['boxes'][row])
        np.testing.assert_array_equal(one['image'][row], other['image'][row])
        np.testing.assert_array_equal(one['segmentation'][row], other['segmentation'][row])


def _error(call):
    try:
        call()
    except UserError as error:
        return str(error)
    return ''


def test_crops_and_mirrors_are_slices():
    scene = Scene('a', (50, 60), (Thing(0, (10, 5, 40, 30)), Thing(1, (55, 45, 60, 50))))
    whole = scene.things[0].mask(scene.size)
    image, box = scene.pixels(), scene.things[0].box
    for seed in range(5):
        made = parse('random_crop((30, 24))')(columns_of([scene]), keys(1, seed))
        top, left = made['image'][0][0, 0, :2].tolist()
        x0, y0, x1, y1 = (np.array(box) - [left, top, left, top]).tolist()
        wanted = [max(x0, 0), max(y0, 0), min(x1, 24), min(y1, 30)]
        assert made['boxes'][0][0].tolist() == wanted
        slices = (slice(top, top + 30), slice(left, left + 24))
        np.testing.assert_array_equal(made['box_mask'][0].pixels()[0], whole[slices])
        np.testing.assert_array_equal(made['image'][0], image[slices])
    mirrored = parse('flip_lr(1) | flip_ud(1)')(columns_of([scene]), keys(1))
    assert mirrored['boxes'][0].tolist() == [[20, 20, 50, 45], [0, 0, 5, 5]]
    np.testing.assert_array_equal(mirrored['box_mask'][0].pixels()[0], whole[::-1, ::-1])
    gone = parse('central_crop(20)')(columns_of([scene]), keys(1))
    assert gone['box_label'][0].tolist() == [0]


@given(
    st.tuples(*[st.floats(-9, 9)] * 2, *[st.floats(1, 90)] * 2),
    st.tuples(st.integers(1, 99), st.integers(1, 99), st.booleans(), st.booleans()),
    st.lists(st.tuples(*[st.floats(0, 50, width=32)] * 4), min_size=1, max_size=5),
)
def test_boxes_move_as_matrices_of_double_precision_say(window, target, corners):
    top, left, height, width = window
    rows, columns, mirrored, upturned = target
    boxes = np.array(corners, np.float32)
    boxes[:, 2:] += boxes[:, :2]
    moved, kept = Move(top, left, height, width, *target).boxes(boxes)
    shift = np.array([[1, 0, -left], [0, 1, -top], [0, 0, 1]], np.float64)
    scale = np.diag([columns / width, rows / height, 1])
    flips = np.array([[-1 if mirrored else 1, 0, columns if mirrored else 0],
                      [0, -1 if upturned else 1, rows if upturned else 0], [0, 0, 1]])  # fmt: skip
    for box, own, is_kept in zip(boxes.astype(np.float64), moved, kept, strict=True):
        points = flips @ scale @ shift @ np.array([[box[0], box[2]], [box[1], box[3]], [1, 1]])
        points = np.clip(np.sort(points[:2], axis=1), 0, [[columns], [rows]])
        np.testing.assert_allclose(own, points.T.ravel(), rtol=1e-6, atol=1e-5)
        area = np.prod(points[:, 1] - points[:, 0])
        assert is_kept == (area > 0) or area < 1e-3


@pytest.mark.parametrize('size', [(7, 31), (49, 65), (90, 12)])
def test_classes_of_pixels_are_resized_as_pillow_does(size):
    scene = Scene('a', (49, 65), ())  # No pixel is in the middle between two.
    made = parse(f'resize({size})')(columns_of([scene]), keys(1))
    stored = Image.fromarray(columns_of([scene])['segmentation'][0])
    wanted = np.asarray(stored.resize(size[::-1], Image.Resampling.NEAREST))
    np.testing.assert_array_equal(made['segmentation'][0], wanted)


def wanted_size(width, height, side, most):
    """The size by the words of the reference: the cap first, then the other side cut off."""
    short, long = sorted((width, height))
    if most is not None and long / short * side > most:
        side = round(most * short / long)
    if width < height:
        return int(side * height / width), side
    return side, int(side * width / height)


@pytest.mark.parametrize('shape', [(480, 640), (427, 640), (640, 427), (300, 1000), (500, 500)])
def test_the_shorter_side_with_a_limit_is_rounded_as_in_detr(shape):
    for most in (1333, None):
        cap = '' if most is None else f', most={most}'
        text = f"resize_short(800{cap}, method='nearest')"
        made = parse(text)({'image': [np.zeros((*shape, 1), np.uint8)]}, keys(1))
        assert made['image'].shape[1:3] == wanted_size(*shape[::-1], 800, most)
    assert wanted_size(640, 480, 800, 1333) == (800, 1066)
    assert wanted_size(1000, 300, 800, 1333) == (400, 1333)


def test_sides_and_windows_are_drawn_by_the_law_of_detr():
    count = 400
    images = {'image': [np.zeros((60, 80, 1), np.uint8)] * count}
    made = parse('resize_short((30, 40, 50))')(images, keys(count))
    sides = np.bincount([image.shape[0] for image in made['image']], minlength=51)
    assert sides.sum() == count and (np.abs(sides[[30, 40, 50]] - count / 3) < 45).all()
    cut = parse('scaled_crop((60,), low=30, high=50, p=0.5)')(images, keys(count))
    shapes = np.array([image.shape[:2] for image in cut['image']])
    is_whole = (shapes == (60, 80)).all(1)
    assert abs(is_whole.mean() - 0.5) < 0.1
    inside = shapes[~is_whole]
    assert (inside.min(0) == 30).all() and (inside.max(0) == 50).all()
    assert (np.abs(inside.mean(0) - 40) < 1.5).all()


def test_large_scale_jitter():
    scene = Scene('a', (40, 80), (Thing(0, (0, 0, 80, 40)),))
    text = "large_scale_jitter((64, 64), scale=({0}, {0}), value=(1, 2, 3), method='nearest')"
    fits = parse(text.format(1.0))(columns_of([scene]), keys(1))
    assert fits['picture_size'].tolist() == [[32, 64]]
    assert fits['boxes'][0].tolist() == [[0, 0, 64, 32]]
    assert (fits['image'][0][32:] == (1, 2, 3)).all()
    assert (fits['segmentation'][0][32:] == IGNORED).all()
    small = parse(text.format(0.25))(columns_of([scene]), keys(1))
    assert small['picture_size'].tolist() == [[8, 16]]
    assert (small['image'][0][:8, 16:] == (1, 2, 3)).all()
    large = parse(text.format(4.0))(columns_of([scene] * 9), keys(9))
    assert (large['picture_size'] == 64).all()
    windows = np.array([image[[0, -1], [0, -1], :2] for image in large['image']])
    assert (windows[:, 1] - windows[:, 0] == [19, 19]).all()
    assert len(np.unique(windows[:, 0, 1])) > 4
    counts = parse("large_scale_jitter(64, scale=(0.1, 2), method='nearest')")(
        columns_of([scene] * 300), keys(300)
    )
    assert abs(np.median(counts['picture_size'][:, 1]) - 64) <= 2


def test_boxes_become_shares_of_the_picture_without_padding():
    scene = Scene('a', (40, 60), (
        Thing(2, (6, 10, 36, 30)), Thing(1, (0, 0, 60, 40), crowd=True), Thing(0, (59, 39, 60, 40)),
    ))  # fmt: skip
    transform = parse('pad_to(64) | boxes(4, masks=True)', (64, 64))
    made = transforms.finished(transform(columns_of([scene]), keys(1)), transform)
    assert set(made) == {
        *('image', 'boxes', 'box_label', 'box_mask', 'picture_size', 'segmentation'),
    }  # fmt: skip
    assert made['picture_size'].tolist() == [[40, 60]]
    assert made['box_label'].tolist() == [[2, 0, -1, -1]]
    wanted = [[0.35, 0.5, 0.5, 0.5], [119 / 120, 79 / 80, 1 / 60, 1 / 40], [0] * 4, [0] * 4]
    np.testing.assert_allclose(made['boxes'][0], wanted, rtol=1e-6)
    mask = np.zeros((64, 64))
    mask[10:30, 6:36] = 1
    blocks = mask.reshape(16, 4, 16, 4).mean((1, 3)) >= 0.5
    np.testing.assert_array_equal(made['box_mask'][0, 0], blocks)
    assert made['box_mask'].shape == (1, 4, 16, 16) and not made['box_mask'][0, 2:].any()
    types = {name: column.dtype.name for name, column in made.items()}
    assert types == {
        'image': 'uint8', 'boxes': 'float32', 'box_label': 'int32', 'box_mask': 'uint8',
        'picture_size': 'int32', 'segmentation': 'int32',
    }  # fmt: skip
    plain = parse('boxes(4)')(columns_of([scene]), keys(1))
    assert plain['picture_size'].tolist() == [[40, 60]]


def source_of(pictures):
    def load(index):
        return columns_of([pictures[i] for i in index.tolist()])

    where = lambda index: f'{pictures[index].name}.png'  # noqa: E731
    return Source('test', 'train', len(pictures), 3, None, load, in_memory=False, where=where)


def test_more_objects_than_there_is_room_for_name_the_example():
    few, many = (Scene(n, (24, 20), (Thing(0, (0, 0, 5, 5)),) * k) for n, k in (('a', 2), ('b', 4)))
    source, transform = (
        source_of([few, many]),
        parse("keep('image', 'boxes', 'box_label') | boxes(3)"),
    )
    with pytest.raises(UserError, match=r'b\.png: has 4 objects, more than boxes\(3\) takes'):
        pipeline.load(source, transform, np.arange(2), 0, 0)
    skipped = pipeline.load(source, transform, np.arange(2), 0, 0, skip_bad=True)
    assert skipped['replaced'].tolist() == [0, 1]
    np.testing.assert_array_equal(skipped['boxes'][0], skipped['boxes'][1])


REFUSED = {
    'randaug(2, 10) | boxes(5)': 'randaug may move pixels and cannot take',
    'timm_randaug | boxes(5)': 'timm_randaug may move',
    'trivial_augment | boxes(5)': 'trivial_augment may move',
    'augmix | boxes(5)': 'augmix may move',
    'exif_transpose | boxes(5)': 'exif_transpose may move',
    'ragged_patches(4, 9)': 'ragged_patches may move',
    'boxes(5) ; global: 2 * rrc(size)': 'views cannot take',
    'pad_to(64) | flip_lr | boxes(5)': 'flip_lr moves the picture: put it before pad_to',
    'boxes(5) | resize(size)': 'resize moves the picture: put it before',
    'pad_to(64) | pad_to(96)': 'pad_to comes once',
    'boxes(5) | boxes(5)': 'boxes takes boxes once',
    'pad_to(8)': 'has room for 8x8, not for pictures of 24x20',
    'resize(10) | boxes(5, masks=True)': 'multiples of 4',
    "keep('image') | boxes(5)": 'these examples have image',
    "keep('image', 'boxes', 'box_label') | boxes(5, masks=True)": 'needs masks',
}  # fmt: skip


@pytest.mark.parametrize('text', REFUSED)
def test_what_cannot_take_boxes_along_is_refused_by_the_first_example(text):
    source = source_of([Scene('a', SIZE, (Thing(0, (0, 0, 5, 5)),))])
    with pytest.raises(UserError, match=r'data\.transform') as error:
        transforms.check(parse(text), source, SIZE)
    assert REFUSED[text] in str(error.value)


WRONG = {
    'pad_to': 'a size, or multiple=N',
    'pad_to(8, multiple=8)': 'a size, or multiple=N',
    'pad_to(8, value=(1, 2))': 'one value or three',
    'boxes(0)': 'from 1 to 10000 for most',
    'boxes(5, masks=1)': 'True or False',
    'resize_short((8, 9), most=4)': 'from 9',
    'resize_short(())': 'takes a whole number',
    'scaled_crop((8, 9), low=10)': 'from 1 to 8 for low',
    'large_scale_jitter(8, scale=0.1)': 'two numbers',
    'large_scale_jitter(8, scale=(0, 1))': 'from 0.001',
}  # fmt: skip


@pytest.mark.parametrize('text', WRONG)
def test_arguments_that_cannot_be(text):
    with pytest.raises(UserError) as error:
        parse(text)
    assert WRONG[text] in str(error.value)


def test_pictures_are_scored_whole():
    for text in (
        'resize(64)',
        'resize_short(400, most=512) | pad_to(512)',
        'decode(3) | resize_long(100) | pad_to(multiple=32) | rgb | boxes(1)',
    ):
        transforms.need_whole(parse(text))
    for text in (
        'central_crop(500)',
        'resize_small(64) | central_crop(64)',
        'flip_lr(1)',
        'pad(3)',
    ):
        with pytest.raises(UserError, match='crops or mirrors it'):
            transforms.need_whole(parse(text))
    with pytest.raises(UserError, match='exif_transpose may move'):
        transforms.need_whole(parse('exif_transpose | resize(64)'))


def test_colours_leave_boxes_where_they_are():
    text = (
        'color_jitter(0.4) | random_grayscale(0.5) | three_augment | gaussian_blur | invert | rgb'
    )
    scene = Scene('a', (24, 20), (Thing(1, (2, 3, 9, 8)),))
    transform = parse(f'{text} | boxes(2)')
    assert isinstance(transform, Transform)
    made = transform(columns_of([scene]), keys(1))
    np.testing.assert_allclose(made['boxes'][0, 0], [5.5 / 20, 5.5 / 24, 7 / 20, 5 / 24], rtol=1e-6)


def test_scenes_are_what_their_file_says():
    assert scenes.uncompressed(np.array([[0, 1], [1, 1]], np.uint8)) == [1, 3]
