"""Transforms: against references one image at a time, and the same in any batch.

tests/oracles/crops.npz holds quantiles of 20,000 boxes each that torchvision 0.28
(`RandomResizedCrop.get_params`, scale 0.08 to 1) and TensorFlow 2.21
(`sample_distorted_bounding_box`, area 0.05 to 1, nothing else set) drew for four shapes of
images, as rows area, width / height, top / height, left / width; and a picture as
`tf.image.resize` (bilinear, no antialias) resized it.
"""

import dataclasses
import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from big_vit.data import decode, order, transforms
from big_vit.data.sources import digits
from big_vit.data.sources.base import Request, Source
from big_vit.data.transforms import geometry
from big_vit.data.transforms.operations import BadExampleError
from big_vit.errors import UserError

CROPS = np.load(Path(__file__).parents[1] / 'oracles' / 'crops.npz', allow_pickle=False)

EVERY_OPERATION = (
    'rgb | randaug(2, 10) | resize((20, 24)) | rrc(19) | inception_crop((18, 17)) | pad(1) '
    '| random_crop(16, pad=2) | flip_lr '
    '| resize_small(15) | central_crop((12, 14)) | grayscale | invert | resize(size)'
)


def images_of(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def smooth_images(batch, height, width, channels):
    """Low-frequency pictures, on which resampling filters agree."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    phase = np.arange(batch * channels).reshape(batch, 1, 1, channels)
    wave = np.sin(4 * y[..., None] / height + phase) * np.cos(3 * x[..., None] / width + 2 * phase)
    return np.rint(127.5 * (1 + wave)).astype(np.uint8)


def keys_of(batch, seed=0):
    return order.example_keys(seed, 0, np.arange(batch))


def run(transform, images, keys):
    return transform({'image': images}, keys)['image']


def apply(text, images, size=(8, 8), seed=0):
    return run(transforms.parse(text, size=size), images, keys_of(len(images), seed))


def test_empty_changes_nothing():
    images = images_of(3, 8, 9, 1)
    transform = transforms.parse('  ', size=(8, 8))
    np.testing.assert_array_equal(run(transform, images, keys_of(3)), images)
    assert not transform.is_random


@pytest.mark.parametrize('text', ['', 'flip_lr', 'inception_crop(size)', EVERY_OPERATION])
@pytest.mark.parametrize('channels', [1, 3])
def test_an_example_looks_the_same_in_any_batch(text, channels):
    images, keys = images_of(12, 23, 19, channels), keys_of(12)
    transform = transforms.parse(text, size=(8, 8))
    together = run(transform, images, keys)
    assert together.dtype == np.uint8
    for i in range(12):
        alone = run(transform, images[i : i + 1], keys[i : i + 1])
        np.testing.assert_array_equal(alone[0], together[i])
    backwards = run(transform, images[::-1], keys[::-1])
    np.testing.assert_array_equal(backwards[::-1], together)


@pytest.mark.parametrize(
    'text', ['flip_lr', 'random_crop(6)', 'inception_crop(6)', 'rrc(6)', 'randaug(2, 10)']
)
def test_randomness_is_by_key_and_by_place(text):
    images = np.repeat(images_of(1, 16, 16, 3), 32, axis=0)
    once = apply(text, images)
    assert len({image.tobytes() for image in once}) > 1
    assert not np.array_equal(once, apply(text, images, seed=1))
    np.testing.assert_array_equal(once, apply(text, images))
    # The same operation further down the line draws other numbers.
    assert not np.array_equal(once, apply(f'pad(0) | {text}', images))


def test_inputs_are_left_alone():
    images = images_of(6, 16, 16, 3)
    before = images.copy()
    apply(EVERY_OPERATION, images)
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('target', [(14, 14), (7, 21), (60, 50), (60, 13), (28, 30)])
def test_resize_against_pillow(channels, target):
    images = smooth_images(3, 28, 30, channels)
    result = apply('resize(size)', images, size=target)
    assert result.shape == (3, *target, channels)
    for image, out in zip(images, result, strict=True):
        for c in range(channels):
            reference = Image.fromarray(image[..., c]).resize(
                target[::-1], Image.Resampling.BILINEAR
            )
            difference = out[..., c].astype(int) - np.asarray(reference).astype(int)
            assert np.abs(difference).mean() < 3
            assert np.abs(difference).max() < 16


def test_resize_does_not_alias():
    # A fine chequerboard is grey from afar.
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[None, ..., None]
    for target in ((16, 16), (16, 128)):
        assert np.abs(apply('resize(size)', board, size=target).astype(int) - 127).max() <= 1


def test_resize_of_the_right_size_is_free():
    images = images_of(2, 8, 8, 1)
    assert apply('resize(size)', images) is images


def test_resize_small_keeps_proportions():
    assert apply('resize_small(10)', images_of(1, 20, 31, 3)).shape == (1, 10, 16, 3)
    assert apply('resize_small(10)', images_of(1, 50, 5, 3)).shape == (1, 100, 10, 3)


@pytest.mark.parametrize('n', [8, 4])
def test_central_crop(n):
    images = images_of(2, 13, 8, 3)
    top, left = (13 - n) // 2, (8 - n) // 2
    reference = images[:, top : top + n, left : left + n]
    np.testing.assert_array_equal(apply(f'central_crop({n})', images), reference)


def test_pad():
    images = images_of(2, 5, 6, 3)
    reference = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    np.testing.assert_array_equal(apply('pad(2)', images), reference)


def test_random_crop_takes_every_window_equally_often():
    batch, pad = 6000, 1
    image = np.arange(1, 31, dtype=np.uint8).reshape(1, 5, 6, 1)
    result = apply('random_crop((5, 5), pad=1)', np.repeat(image, batch, axis=0))
    padded = np.pad(image[0, ..., 0], pad)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5)).reshape(-1, 25)
    number = {window.tobytes(): i for i, window in enumerate(windows)}
    assert len(number) == 3 * 4
    counts = np.bincount([number[crop.tobytes()] for crop in result], minlength=len(number))
    assert stats.chisquare(counts).pvalue > 1e-3


def test_flip_mirrors_half():
    images = images_of(2000, 4, 5, 3)
    result = apply('flip_lr', images)
    kept = (result == images).all((1, 2, 3))
    mirrored = (result == images[:, :, ::-1]).all((1, 2, 3))
    assert (kept ^ mirrored).all()
    assert stats.binomtest(int(mirrored.sum()), 2000).pvalue > 1e-3


SHAPES = [(375, 500), (500, 375), (64, 48), (100, 400)]


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('law', ['rrc', 'inception'])
def test_crops_are_distributed_as_those_of_torchvision_and_tensorflow(law, shape):
    count = 20_000
    heights, widths = (np.full(count, side) for side in shape)
    keys = keys_of(count)

    def draw(k):
        return order.uniform(keys, k)

    if law == 'rrc':
        boxes = geometry.rrc_boxes(heights, widths, draw, (0.08, 1.0), (3 / 4, 4 / 3))
    else:
        boxes = geometry.inception_boxes(heights, widths, draw, 0.05, 1.0)
    top, left, height, width = boxes
    assert (top >= 0).all()
    assert (top + height <= shape[0]).all()
    assert (left + width <= shape[1]).all()
    found = [
        height * width / (shape[0] * shape[1]),
        width / height,
        top / shape[0],
        left / shape[1],
    ]
    levels = np.linspace(0, 1, 101)
    for name, ours, theirs in zip(
        ('area', 'aspect', 'top', 'left'), found, CROPS[f'{law}_{shape[0]}x{shape[1]}'], strict=True
    ):
        # Their distribution function at our quantiles; both have a standard error of 0.0035, and
        # whole pixels make steps, of which the middle is compared.
        below, upto = (
            np.interp(np.quantile(ours, levels) + shift, theirs, levels, left=0, right=1)
            for shift in (-1e-6, 1e-6)
        )
        away = np.maximum(np.maximum(below - levels, levels - upto), 0)
        assert away[1:-1].max() < 0.02, name


def test_the_two_laws_differ():
    areas = [CROPS[f'{law}_375x500'][0, 50] for law in ('rrc', 'inception')]
    assert areas[0] - areas[1] > 0.1


def test_crops_of_extreme_proportions():
    for text in ('inception_crop(size)', 'rrc(size)', 'resmall_crop(size)'):
        for shape in ((1, 4, 400, 3), (1, 400, 4, 3), (1, 1, 1, 3)):
            images = np.repeat(images_of(*shape), 50, axis=0)
            assert apply(text, images).shape == (50, 8, 8, 3)


def test_the_window_that_is_drawn_is_the_one_that_is_resized():
    images, keys = images_of(5, 30, 40, 3), keys_of(5)
    boxes = geometry.rrc_boxes(
        *np.array([[30] * 5, [40] * 5]), lambda k: order.uniform(keys, k), (0.08, 1), (0.75, 4 / 3)
    )
    result = apply('rrc(size, method="bilinear")', images, size=(16, 16))
    for image, out, top, left, height, width in zip(images, result, *boxes, strict=True):
        window = np.ascontiguousarray(image[top : top + height, left : left + width])
        wanted = cv2.resize(window, (16, 16), interpolation=cv2.INTER_LINEAR)
        np.testing.assert_array_equal(out, wanted)


@pytest.mark.parametrize('name', ['down', 'up', 'mixed'])
def test_bilinear_is_that_of_tensorflow(name):
    wanted = CROPS[f'tf_bilinear_{name}'].astype(np.float64)
    text = f'resize({wanted.shape[:2]}, method="bilinear")'
    found = apply(text, CROPS['image'][None])[0].astype(np.float64)
    # OpenCV rounds its weights to 1/2048, and the record is float16.
    assert np.abs(found - wanted).max() <= 1.2


def test_resmall_crop_is_a_resize_and_a_crop_but_for_parts_of_a_pixel():
    count, images = 64, smooth_images(64, 60, 80, 3)
    keys = keys_of(count)
    together = apply('resmall_crop(28, small=32)', images)
    small = apply('resize_small(32)', images)
    assert small.shape == (count, 32, 43, 3)
    tall = round(28 * 60 / 32)
    tops = np.floor(order.uniform(keys, 0) * (60 - tall + 1)) * 32 / 60
    lefts = np.floor(order.uniform(keys, 1) * (80 - tall + 1)) * 32 / 60
    for image, out, top, left in zip(small, together, tops, lefts, strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(image, (28, 28, 3))[:, :, 0]
        away = np.abs(windows.astype(int) - out).mean((-3, -2, -1))
        nearest = np.unravel_index(away.argmin(), away.shape)
        assert abs(nearest[0] - top) <= 1
        assert abs(nearest[1] - left) <= 1
        assert away.min() < 4


@pytest.mark.parametrize('kind', [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize('channels', [1, 2, 3, 4, 13])
def test_images_of_any_kind(kind, channels):
    images = images_of(3, 20, 24, channels).astype(kind)
    text = 'resize(18) | rrc(16) | pad(1) | flip_lr | flip_ud | random_crop(15) | central_crop(8)'
    result = apply(text, images)
    assert result.dtype == kind
    assert result.shape == (3, 8, 8, channels)
    # Channels do not mix: the first alone gives the same.
    alone = apply(text, images[..., :1])
    away = np.abs(result[..., :1].astype(float) - alone.astype(float)).max()
    assert away <= (1 if kind != np.float32 else 1e-3)


def test_channels_are_chosen():
    images = images_of(2, 4, 5, 13)
    np.testing.assert_array_equal(apply('channels(3, 2, 1)', images), images[..., [3, 2, 1]])
    with pytest.raises(UserError, match='channels takes channels below 13, not 13'):
        apply('channels(13)', images)


# --- Encoded images --------------------------------------------------------------------


def photographs(count, quality=90, **settings):
    files, arrays = [], []
    for i in range(count):
        image = smooth_images(1, 150 + 10 * (i % 3), 200 - 7 * (i % 2), 3)[0]
        image = np.clip(image + np.random.default_rng(i).normal(0, 6, image.shape), 0, 255)
        file = io.BytesIO()
        Image.fromarray(image.astype(np.uint8)).save(file, quality=quality, **settings)
        files.append(file.getvalue())
        with Image.open(io.BytesIO(files[-1])) as opened:
            arrays.append(np.asarray(opened.convert('RGB')))
    return files, arrays


CROPPING = ['inception_crop(64)', 'rrc(64)', 'resmall_crop(64)', 'random_crop(64)']


@pytest.mark.parametrize('text', [*CROPPING, 'central_crop(64)', 'resize_small(100)', 'flip_lr'])
def test_a_png_gives_the_same_encoded_and_decoded(text):
    files, arrays = photographs(6, format='PNG')
    encoded = apply(f'decode | {text}', [decode.Encoded(file) for file in files])
    plain = apply(text, arrays)
    for a, b in zip(encoded, plain, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('text', CROPPING)
@pytest.mark.parametrize('settings', [{}, {'progressive': True}, {'subsampling': 0}])
def test_a_jpeg_is_cropped_as_if_decoded_whole(text, settings):
    # Not scaled down by 2, or the transform of the file would do the averaging.
    text = text.replace('64', '100')
    files, arrays = photographs(6, format='JPEG', **settings)
    encoded = apply(text, [decode.Encoded(file) for file in files])
    for a, b in zip(encoded, apply(text, arrays), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_jpeg_that_shrinks_is_averaged_in_its_transform():
    files, arrays = photographs(4, format='JPEG')
    small = apply('resize(20)', [decode.Encoded(file) for file in files])
    for a, b in zip(small, apply('resize(20)', arrays), strict=True):
        assert np.abs(a.astype(int) - b.astype(int)).mean() < 2.5


def test_decode_says_how_many_channels():
    files, _ = photographs(2, format='PNG')
    encoded = [decode.Encoded(file) for file in files]
    for channels, shown in ((1, 1), (3, 3), (4, 4), (0, 3)):
        assert apply(f'decode({channels}) | resize(size)', encoded).shape == (2, 8, 8, shown)
    with pytest.raises(UserError, match='decode takes 0, 1, 3 or 4 for channels, not 2'):
        transforms.parse('decode(2)', size=(8, 8))
    with pytest.raises(UserError, match='decode comes first'):
        transforms.parse('resize(size) | decode', size=(8, 8))


# --- Labels and other parts ------------------------------------------------------------


def test_labels_become_vectors():
    columns = {'image': images_of(3, 8, 8, 1), 'label': np.array([2, 0, 1], np.int32)}
    found = transforms.parse('onehot(4)', size=(8, 8))(columns, keys_of(3))
    np.testing.assert_array_equal(found['label'], np.eye(4, dtype=np.float32)[[2, 0, 1]])
    several = {
        'image': columns['image'],
        'label': [np.array([0, 3]), np.array([], int), np.array([1])],
    }
    found = transforms.parse('multihot(4)', size=(8, 8))(several, keys_of(3))
    assert found['label'].tolist() == [[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]]


def test_parts_are_kept_and_renamed():
    columns = {'image': images_of(2, 8, 8, 1), 'fine': np.zeros(2), 'name': ['a', 'b']}
    transform = transforms.parse("keep('image', 'fine') | rename(fine='label')", size=(8, 8))
    assert set(transform(columns, keys_of(2))) == {'image', 'label'}
    with pytest.raises(UserError, match=r"keep needs 'label', but these examples have fine, image"):
        transforms.parse("keep('label')", size=(8, 8))(columns, keys_of(2))


# --- What is left for the devices ------------------------------------------------------

DEVICE = transforms.DeviceOperations(
    {'value_range': lambda low, high: ('range', low, high), 'flip_lr': lambda p=0.5: ('flip', p)},
    frozenset({'flip_lr'}),
)


def test_the_devices_part_begins_where_only_they_can_go_on():
    def parse(text):
        return transforms.parse(text, size=(8, 8), device=DEVICE)

    found = parse('resize(size) | flip_lr | value_range(-1, 1)')
    assert found.names == ('resize', 'flip_lr')
    assert found.device == (('value_range', ('range', -1, 1)),)
    assert found.random_operations == ('flip_lr',)
    found = parse('resize(size) | to_device | flip_lr(0.3) | value_range(0, 1)')
    assert found.names == ('resize',)
    assert [name for name, _ in found.device] == ['flip_lr', 'value_range']
    assert found.host_text == 'resize(size)'
    assert found.is_random
    for text, message in (
        ('value_range(0, 1) | resize(size)', 'resize is done on the host: put it before value_r'),
        ('to_device | resize(size)', 'resize is done on the host: put it before to_device'),
        ('to_device | to_device', 'to_device comes once'),
    ):
        with pytest.raises(UserError, match=message):
            parse(text)


def test_a_transform_is_split_before_its_first_draw():
    images = images_of(4, 20, 20, 3)
    transform = transforms.parse('resize(16) | pad(1) | random_crop(8) | flip_lr', size=(8, 8))
    before, after = transform.split()
    assert before.names == ('resize', 'pad')
    assert not before.is_random
    middle = run(before, images, keys_of(4))
    assert middle.shape == (4, 18, 18, 3)
    whole = run(transform, images, keys_of(4))
    np.testing.assert_array_equal(run(after, middle, keys_of(4)), whole)


def test_transparent_pixels_over_a_colour():
    """Within a level of Pillow's; what is not transparent stays as it is."""
    drawing = images_of(1, 6, 7, 4)
    for background, text in (((255, 255, 255), 'over'), ((10, 20, 30), 'over((10, 20, 30))')):
        pillow = Image.new('RGBA', (7, 6), background)
        pillow.alpha_composite(Image.fromarray(drawing[0]))
        wanted = np.asarray(pillow.convert('RGB')).astype(int)
        assert np.abs(apply(text, drawing)[0].astype(int) - wanted).max() <= 1
    opaque = np.concatenate([drawing[..., :3], np.full((1, 6, 7, 1), 255, np.uint8)], axis=3)
    np.testing.assert_array_equal(apply('over(0)', opaque), drawing[..., :3])
    with pytest.raises(UserError, match='over takes images of 4 channels, not 3'):
        apply('over', drawing[..., :3])
    with pytest.raises(UserError, match='takes one value or three for background'):
        apply('over((1, 2))', drawing)


def test_colours_against_opencv():
    colour = images_of(4, 6, 7, 3)
    grey = apply('grayscale', colour)
    for image, out in zip(colour, grey, strict=True):
        reference = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        assert np.abs(out[..., 0].astype(int) - reference.astype(int)).max() <= 1
    np.testing.assert_array_equal(apply('grayscale', grey), grey)
    np.testing.assert_array_equal(apply('rgb', grey), np.concatenate([grey] * 3, axis=3))
    np.testing.assert_array_equal(apply('rgb', colour), colour)
    np.testing.assert_array_equal(apply('invert', colour), ~colour)
    with pytest.raises(UserError, match=r'data\.transform: rgb takes images of 1 channels, not 2'):
        apply('rgb', images_of(1, 8, 8, 2))


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('resiz(size)', "there is no operation 'resiz': did you mean resize"),
        ('xyzzy', "there is no operation 'xyzzy': there are "),
        ('resize(size) |', 'cannot read'),
        ('resize(size) + flip_lr', "cannot read 'resize"),
        ('[flip_lr]', 'cannot read'),
        ('os.system("true")', 'cannot read'),
        ('resize(__import__("os"))', 'is neither a number, a text in quotes nor `size`'),
        ('resize(siz)', 'is neither a number, a text in quotes nor `size`'),
        ('resize(**{})', 'cannot read'),
        (
            'resize',
            r"missing a required argument: 'size'.*write it as resize\(size, method='area'\)",
        ),
        ('flip_lr(3)', 'flip_lr takes a number from 0 to 1 for p, not 3'),
        ('flip_lr(0.5, 3)', 'too many positional arguments'),
        ('random_crop(size, border=2)', r"unexpected keyword argument 'border'.*pad=0\)"),
        ('resize("big")', "resize takes a size such as .*not 'big'"),
        ('resize(0)', 'resize takes a size'),
        ('resize((1, 2, 3))', 'resize takes a size'),
        ('resize(True)', 'resize takes a size'),
        ('resize_small(1.5)', 'resize_small takes a whole number from 1 to 16384 for n, not 1.5'),
        ('random_crop(size, -1)', 'random_crop takes a whole number from 0 to 16384 for pad'),
        ('inception_crop(size, 0)', r'takes a fraction in \(0, 1\] for min_area, not 0'),
        ('(' * 500, 'cannot read'),
    ],
)
def test_parse_refuses(text, message):
    with pytest.raises(UserError, match=message) as error:
        transforms.parse(text, size=(8, 8), key='evals.val')
    assert str(error.value).startswith('evals.val.transform: ')
    assert '\n' not in str(error.value)


def test_spelling_is_free():
    images = images_of(3, 12, 12, 1)
    for text in ('flip_lr()|random_crop(size=(8,8), pad = 1)', 'flip_lr | random_crop(size, 1)'):
        transform = transforms.parse(text, size=(8, 8))
        assert transform.names == ('flip_lr', 'random_crop')
        assert transform.is_random
        np.testing.assert_array_equal(
            run(transform, images, keys_of(3)), apply('flip_lr() | random_crop(8, 1)', images)
        )


def test_check():
    source = digits.digits(Request('train'))

    def check(text, size):
        return transforms.check(transforms.parse(text, size=size), source, size).parts['image'][0]

    assert check('', (8, 8)) == (8, 8, 1)
    assert check('resize(size) | rgb', (28, 20)) == (28, 20, 3)
    with pytest.raises(
        UserError, match=r'data.transform gives 8x8 images but image_size is 28x28: add resize'
    ):
        check('', (28, 28))
    with pytest.raises(UserError, match=r'data\.transform: random_crop cannot cut 28x28 from 8x8'):
        check('random_crop(size)', (28, 28))
    with pytest.raises(UserError, match='gives label but no image'):
        check("keep('label')", (8, 8))
    with pytest.raises(UserError, match=r'data\.transform: flip_lr is random'):
        transforms.require_deterministic(transforms.parse('resize(size) | flip_lr', size=(8, 8)))


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('resize(100000)', 'resize takes a size .* of at most 16,384, not 100000'),
        ('rrc(100000)', 'rrc takes a size'),
        ('central_crop((8, 99999))', 'central_crop takes a size'),
        ('resize_video(20000)', 'resize_video takes a size'),
        ('pad(1000000000)', 'pad takes a whole number from 0 to 16384 for n'),
        ('pad(1, 256)', 'pad takes a whole number from 0 to 255 for value'),
        ('random_crop(8, pad=99999)', 'random_crop takes a whole number from 0 to 16384 for pad'),
        ('resize_long(99999)', 'resize_long takes a whole number from 1 to 16384 for n'),
        ('resmall_crop(8, 99999)', 'resmall_crop takes a whole number from 8 to 16384 for small'),
        ('ragged_patches(16, 99999999)', 'takes a whole number from 1 to 1048576 for tokens'),
        ('onehot(999999999999)', 'onehot takes a whole number from 1 to 16777216'),
        ('byte_tokens(999999999999)', 'byte_tokens takes a whole number from 1 to 1048576'),
        ('log_mel(1000000, 1024, window=10)', 'log_mel takes a shorter window or fewer bins'),
        ('decode(3, white=0)', 'decode takes a white that is not black, not 0'),
        ('decode(3, black=1)', 'decode takes a white that is not black, not None'),
    ],
)
def test_no_size_takes_all_memory(text, message):
    with pytest.raises(UserError, match=message):
        transforms.parse(text, size=(8, 8))


@pytest.mark.parametrize(
    ('text', 'shape'),
    [('resize_small(16384)', (1, 60_000, 3)), ('pad(16384)', (8, 8, 3))],
)
def test_no_example_takes_all_memory(text, shape):
    transform = transforms.parse(text, size=(8, 8))
    images = [np.zeros(shape, np.uint8)]
    with pytest.raises(BadExampleError, match='pixels would be more than the 268,435,456 pixels'):
        transform({'image': images}, np.zeros(1, np.uint64))


def test_damaged_first_examples_are_skipped_where_others_are():
    def load(indices):
        if indices.min() < 3:
            raise OSError('damaged')
        return {'image': np.zeros((len(indices), 8, 8, 1), np.uint8), 'label': indices}

    source = Source('set', 'train', 20, 2, None, load, in_memory=False)
    transform = transforms.parse('', size=(8, 8))
    with pytest.raises(UserError, match="example 0 of 'train' of set: damaged"):
        transforms.check(transform, source, (8, 8))
    assert transforms.check(transform, source, (8, 8), skip_bad=True).parts['image'][0] == (8, 8, 1)
    few = dataclasses.replace(source, length=3)
    with pytest.raises(UserError, match='damaged'):
        transforms.check(transform, few, (8, 8), skip_bad=True)


def test_files_are_turned_before_they_are_decoded():
    transforms.parse('decode | exif_transpose | flip_lr', size=(8, 8))
    with pytest.raises(UserError, match='exif_transpose comes before flip_lr'):
        transforms.parse('flip_lr | exif_transpose', size=(8, 8))
