"""Transforms: against references one image at a time, and the same in any batch."""

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from big_vit.data import order, sources, transforms
from big_vit.errors import UserError

EVERY_OPERATION = (
    'rgb | randaug(2, 10) | resize((20, 24)) | inception_crop((18, 17)) | pad(1) '
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


def apply(text, images, size=(8, 8), seed=0):
    return transforms.parse(text, size=size)(images, keys_of(len(images), seed))


def test_empty_changes_nothing():
    images = images_of(3, 8, 9, 1)
    transform = transforms.parse('  ', size=(8, 8))
    np.testing.assert_array_equal(transform(images, keys_of(3)), images)
    assert not transform.is_random


@pytest.mark.parametrize('text', ['', 'flip_lr', 'inception_crop(size)', EVERY_OPERATION])
@pytest.mark.parametrize('channels', [1, 3])
def test_an_example_looks_the_same_in_any_batch(text, channels):
    images, keys = images_of(12, 23, 19, channels), keys_of(12)
    transform = transforms.parse(text, size=(8, 8))
    together = transform(images, keys)
    assert together.dtype == np.uint8
    for i in range(12):
        alone = transform(images[i : i + 1], keys[i : i + 1])
        np.testing.assert_array_equal(alone[0], together[i])
    backwards = transform(images[::-1], keys[::-1])
    np.testing.assert_array_equal(backwards[::-1], together)


@pytest.mark.parametrize(
    'text', ['flip_lr', 'random_crop(6)', 'inception_crop(6)', 'randaug(2, 10)']
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


@pytest.mark.parametrize('shape', [(64, 64), (48, 96)])
def test_inception_crop_follows_the_paper(shape):
    # Coordinates as pixel values show which window was taken.
    batch, out = 2000, 32
    y, x = np.mgrid[: shape[0], : shape[1]]
    image = np.stack([y, x], axis=-1).astype(np.uint8)[None]
    result = apply(f'inception_crop({out}, min_area=0.2)', np.repeat(image, batch, axis=0))
    result = result.astype(np.float64)
    height = (result[:, -1, 0, 0] - result[:, 0, 0, 0]) * out / (out - 1)
    width = (result[:, 0, -1, 1] - result[:, 0, 0, 1]) * out / (out - 1)
    area = height * width / (shape[0] * shape[1])
    aspect = width / height
    assert 0.15 < area.min() < 0.3
    assert area.max() > 0.8 if shape[0] == shape[1] else area.max() > 0.55
    assert 0.65 < aspect.min() < 0.85
    assert 1.2 < aspect.max() < 1.5
    assert abs(np.log(aspect).mean()) < 0.05
    tops = result[:, 0, 0, 0]
    assert tops.min() < 2
    assert tops.max() > shape[0] * 0.3


def test_inception_crop_of_extreme_proportions():
    for shape in ((1, 4, 400, 3), (1, 400, 4, 3), (1, 1, 1, 3)):
        images = np.repeat(images_of(*shape), 50, axis=0)
        assert apply('inception_crop(size)', images).shape == (50, 8, 8, 3)


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
        ('xyzzy', "there is no operation 'xyzzy': there are resize, "),
        ('resize(size) |', 'cannot read'),
        ('resize(size) + flip_lr', "cannot read 'resize"),
        ('[flip_lr]', 'cannot read'),
        ('os.system("true")', 'cannot read'),
        ('resize(__import__("os"))', r'is neither a number nor `size`.*resize\(size\)'),
        ('resize(siz)', 'is neither a number nor `size`'),
        ('resize(**{})', 'is neither|missing|cannot|unexpected'),
        ('resize', r"missing a required argument: 'size'.*write it as resize\(size\)"),
        ('flip_lr(3)', 'too many positional arguments'),
        ('random_crop(size, border=2)', r"unexpected keyword argument 'border'.*pad=0\)"),
        ('resize("big")', "resize takes a size such as .*not 'big'"),
        ('resize(0)', 'resize takes a size'),
        ('resize((1, 2, 3))', 'resize takes a size'),
        ('resize(True)', 'resize takes a size'),
        ('resize_small(1.5)', 'resize_small takes a whole number of at least 1 for n, not 1.5'),
        ('random_crop(size, -1)', 'random_crop takes a whole number of at least 0 for pad'),
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
            transform(images, keys_of(3)), apply('flip_lr() | random_crop(8, 1)', images)
        )


def test_check():
    source = sources.digits('train')

    def check(text, size, train=True):
        transform = transforms.parse(text, size=size)
        return transforms.check(transform, source, size, train=train)

    assert check('', (8, 8)) == (8, 8, 1)
    assert check('resize(size) | rgb', (28, 20), train=False) == (28, 20, 3)
    with pytest.raises(
        UserError, match=r'data.transform gives 8x8 images but image_size is 28x28: add resize'
    ):
        check('', (28, 28))
    with pytest.raises(UserError, match=r'data\.transform: random_crop cannot cut 28x28 from 8x8'):
        check('random_crop(size)', (28, 28))
    with pytest.raises(UserError, match=r'data\.transform: flip_lr is random'):
        check('resize(size) | flip_lr', (8, 8), train=False)
