"""RandAugment: each operation against Pillow, whose laws they are; the choice and its strength."""

import math

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats

from big_vit.data import order, transforms
from big_vit.data.transforms import randaug
from big_vit.errors import UserError

GREY = (128, 128, 128)
SIZE = (40, 56)


def noise(seed=0, size=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def photo(seed=0, size=SIZE):
    """Smooth, of few and middling values, different in each channel."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]][..., None] / 8
    wave = np.sin(x + rng.uniform(0, 6, 3)) * np.cos(y / 2 + rng.uniform(0, 6, 3))
    return np.uint8(110 + 60 * wave + rng.normal(0, 4, (*size, 3)))


def flat(value=77):
    return np.full((*SIZE, 3), value, np.uint8)


IMAGES = [noise(), photo(), photo(1), flat(), flat(0), flat(255)]


def warped(image, matrix):
    """Pillow's nearest pixel, whose centres are at halves: ours are at whole numbers."""
    a, b, c, d, e, f = matrix
    shifted = (a, b, c + 0.5 - (a + b) / 2, d, e, f + 0.5 - (d + e) / 2)
    return image.transform(
        image.size, Image.Transform.AFFINE, shifted, Image.Resampling.NEAREST, fillcolor=GREY
    )


def pillow(name, image, level, sign):
    """What the operation is, in Pillow's words; the level is magnitude / 10."""
    factor = 0.1 + 1.8 * level
    width, height = image.size
    return {
        'autocontrast': lambda: ImageOps.autocontrast(image),
        'equalize': lambda: ImageOps.equalize(image),
        'invert': lambda: ImageOps.invert(image),
        'rotate': lambda: image.rotate(sign * 30 * level, fillcolor=GREY),
        'posterize': lambda: ImageOps.posterize(image, 8 - int(4 * level)),
        'solarize': lambda: ImageOps.solarize(image, 256 - int(256 * level)),
        'solarize_add': lambda: image.point([min(v + int(110 * level), 255) if v < 128 else v
                                             for v in range(256)] * 3),
        'color': lambda: ImageEnhance.Color(image).enhance(factor),
        'contrast': lambda: ImageEnhance.Contrast(image).enhance(factor),
        'brightness': lambda: ImageEnhance.Brightness(image).enhance(factor),
        'sharpness': lambda: ImageEnhance.Sharpness(image).enhance(factor),
        'shear_x': lambda: warped(image, (1, sign * 0.3 * level, 0, 0, 1, 0)),
        'shear_y': lambda: warped(image, (1, 0, 0, sign * 0.3 * level, 1, 0)),
        'translate_x': lambda: warped(
            image, (1, 0, sign * round(level * width * 100 / 224), 0, 1, 0)),
        'translate_y': lambda: warped(
            image, (1, 0, 0, 0, 1, sign * round(level * height * 100 / 224))),
    }[name]()  # fmt: skip


# Largest difference of a value, and the share of pixels that may be any other pixel: those
# halfway between two, where the nearest is a matter of rounding.
TOLERANCE = {
    'color': (1, 0), 'contrast': (1, 0), 'brightness': (1, 0), 'sharpness': (1, 0),
    'rotate': (0, 0.01), 'shear_x': (0, 0.05), 'shear_y': (0, 0.05),
}  # fmt: skip


@pytest.mark.parametrize('magnitude', [0, 3, 5, 7.5, 10, 15])
@pytest.mark.parametrize('name', [name for name in randaug.SIXTEEN if name != 'cutout'])
def test_operations_against_pillow(name, magnitude):
    apply, (off, elsewhere) = randaug.SIXTEEN[name], TOLERANCE.get(name, (0, 0))
    # A grey value that is rounded the other way is taken `factor - 1` times.
    off = math.ceil(off * max(1, 0.18 * magnitude - 0.9))
    for image in IMAGES:
        for sign in (1, -1):
            before = image.copy()
            found = apply(image, magnitude / 10, sign, np.zeros(2))
            assert found.dtype == np.uint8 and found.shape == image.shape
            np.testing.assert_array_equal(image, before)
            wanted = np.asarray(pillow(name, Image.fromarray(image), magnitude / 10, sign))
            far = np.abs(found.astype(int) - wanted).max(-1) > off
            assert far.mean() <= elsewhere, (name, magnitude, sign)


@pytest.mark.parametrize('magnitude', [0, 5, 10])
def test_cutout_greys_a_window_that_may_reach_over_the_border(magnitude):
    image, (height, width) = np.zeros((224, 112, 3), np.uint8), (224, 112)
    rows, columns = 4 * magnitude, 2 * magnitude
    for at in ((0, 0), (0.5, 0.5), (0.999, 0.3)):
        found = randaug.SIXTEEN['cutout'](image, magnitude / 10, 1, np.array(at))
        y, x = np.mgrid[:height, :width]
        row, column = int(at[0] * height), int(at[1] * width)
        inside = (y >= row - rows) & (y < row + rows) & (x >= column - columns)
        inside &= x < column + columns
        np.testing.assert_array_equal(found, np.where(inside[..., None], np.uint8(128), image))
    assert not image.any()


def test_contrast_turns_about_the_mean():
    """The public code takes 196 for it, whatever a 224-pixel image holds."""
    image = np.repeat(np.array([60, 100], np.uint8), 224 * 112).reshape(224, 224, 1)
    found = randaug.SIXTEEN['contrast'](np.repeat(image, 3, axis=2), 1.0, 1, np.zeros(2))
    assert set(np.unique(found)) == {80 - math.ceil(1.9 * 20), 80 + int(1.9 * 20)}


def test_what_grows_with_the_magnitude_does_nothing_at_0():
    image = photo()
    for name in ('rotate', 'posterize', 'solarize', 'solarize_add', 'shear_x', 'translate_y'):
        np.testing.assert_array_equal(randaug.SIXTEEN[name](image, 0.0, 1, np.zeros(2)), image)
    for name in ('color', 'contrast', 'brightness', 'sharpness'):
        np.testing.assert_array_equal(randaug.SIXTEEN[name](image, 0.5, 1, np.zeros(2)), image)


@pytest.mark.parametrize('name', list(randaug.SIXTEEN))
def test_operations_take_any_size_and_magnitude(name):
    for size in ((1, 1), (2, 9), (9, 1)):
        for magnitude in (0, 10, 30):
            image = noise(size=size)
            found = randaug.SIXTEEN[name](image, magnitude / 10, 1, np.full(2, 0.99))
            assert found.shape == image.shape and found.dtype == np.uint8


def test_each_operation_is_drawn_equally_often_and_half_of_the_signs_are_negative(monkeypatch):
    seen = []

    def spy(number):
        def record(image, strength, sign, at):
            seen.append((number, strength, sign, *at))
            return image

        return record

    monkeypatch.setattr(randaug, 'SIXTEEN', {i: spy(i) for i in range(16)})
    batch = 4000
    keys = order.example_keys(0, 0, np.arange(batch))
    transform = transforms.parse('randaug(2, 10)', size=(2, 2))
    transform({'image': np.zeros((batch, 2, 2, 3), np.uint8)}, keys)
    rows = np.array(seen).reshape(batch, 2, 5)
    assert (rows[..., 1] == 1).all()
    table = np.zeros((16, 16))
    np.add.at(table, (rows[:, 0, 0].astype(int), rows[:, 1, 0].astype(int)), 1)
    # Of both layers together, so that one does not depend on the other.
    assert stats.chisquare(table.ravel()).pvalue > 1e-3
    for layer in range(2):
        assert stats.binomtest(int((rows[:, layer, 2] > 0).sum()), batch).pvalue > 1e-3
        for place in (3, 4):
            assert stats.kstest(rows[:, layer, place], 'uniform').pvalue > 1e-3
    assert np.abs(np.corrcoef(rows.reshape(batch, -1)[:, [0, 2, 3, 4, 5, 7, 8, 9]].T)
                  - np.eye(8)).max() < 0.08  # fmt: skip


def test_layers_are_applied_one_after_the_other():
    images = np.stack([photo(i) for i in range(32)])
    keys = order.example_keys(0, 0, np.arange(32))
    found = transforms.parse('randaug(2, 10)', size=SIZE)({'image': images}, keys)['image']
    for i in range(32):
        draws = [order.uniform(keys[i : i + 1], k)[0] for k in range(8)]
        wanted = randaug.apply(images[i], 10.0, np.array(draws[:4]))
        wanted = randaug.apply(wanted, 10.0, np.array(draws[4:]))
        np.testing.assert_array_equal(found[i], wanted)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('randaug(2)', r"missing a required argument: 'magnitude'.*randaug\(layers, magnitude\)"),
        ('randaug(0, 10)', 'randaug takes a whole number from 1 to 16 for layers, not 0'),
        ('randaug(17, 10)', 'randaug takes a whole number from 1 to 16 for layers, not 17'),
        ('randaug(2, "much")', "randaug takes a number from 0 to 30 for magnitude, not 'much'"),
        ('randaug(2, True)', 'randaug takes a number from 0 to 30 for magnitude, not True'),
        ('randaug(2, 31)', 'randaug takes a number from 0 to 30 for magnitude, not 31'),
    ],
)
def test_parse_refuses(text, message):
    with pytest.raises(UserError, match=message):
        transforms.parse(text, size=SIZE)


def test_grey_images_are_refused():
    keys = order.example_keys(0, 0, np.arange(2))
    images = np.zeros((2, *SIZE, 1), np.uint8)
    with pytest.raises(UserError, match=r'data\.transform: randaug takes images of 3 channels'):
        transforms.parse('randaug(2, 10)', size=SIZE)({'image': images}, keys)
