"""Sets of augmentations: pixels as timm and torchvision record them, laws as published.

oracles/augment.npz (see test_data_colour.py) also holds, on its one image,

* `torchvision KIND BIN SIGN`: what TrivialAugmentWide of torchvision.transforms.v2 0.28 makes of
  a Pillow image at level BIN of 31;
* `timm KIND LEVEL SIGN METHOD`: what the operation of timm 1.0.31's `rand-inc1` makes of a Pillow
  image at the argument that its table has for LEVEL, on (124, 116, 104); `timm_plain` are those
  of `rand` that are others.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats

from big_vit.data import order, transforms
from big_vit.data.transforms import autoaugment, pixels
from big_vit.errors import UserError

ORACLE = Path(__file__).parents[1] / 'oracles' / 'augment.npz'
WARPS = ('rotate', 'shear_x', 'shear_y', 'translate_x', 'translate_y')
MEAN = (124, 116, 104)


def photo(seed=0, size=(40, 56)):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]][..., None] / 8
    wave = np.sin(x + rng.uniform(0, 6, 3)) * np.cos(y / 2 + rng.uniform(0, 6, 3))
    return np.clip(120 + 90 * wave + rng.normal(0, 12, (*size, 3)), 0, 255).astype(np.uint8)


def keys_of(batch):
    return order.example_keys(0, 0, np.arange(batch))


def apply(text, images, keys=None):
    keys = keys_of(len(images)) if keys is None else keys
    return transforms.parse(text, size=(8, 8))({'image': images}, keys)['image']


def recorded(prefix):
    with np.load(ORACLE, allow_pickle=False) as data:
        for name, output in zip(data['names'].tolist(), data['outputs'], strict=True):
            if name.startswith(f'{prefix} '):
                yield data['image'], output, *name.split()[1:]


# --- Warps -----------------------------------------------------------------------------

MATRICES = [
    [[1, 0.2, 0], [0, 1, 0]],
    [[1, 0, 0], [-0.3, 1, 0]],
    [[1, 0, 3.3], [0, 1, -2.2]],
    [[0.9, -0.3, 9], [0.3, 0.9, 2]],
]


def pillow_warp(image, matrix, method, fill):
    return np.asarray(
        Image.fromarray(image).transform(
            image.shape[1::-1],
            Image.Transform.AFFINE,
            matrix.ravel().tolist(),
            Image.Resampling[method.upper()],
            fillcolor=fill,
        )
    )


def inner(matrix, height, width, margin):
    """Where the place in the old image is at least `margin` pixels within its border."""
    y, x = np.mgrid[:height, :width] + 0.5
    x, y = matrix @ np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
    x_in = (x >= margin) & (x <= width - margin)
    return (x_in & (y >= margin) & (y <= height - margin)).reshape(height, width)


@pytest.mark.parametrize('matrix', MATRICES)
def test_nearest_and_bilinear_warps_are_those_of_pillow(matrix):
    matrix = np.array(matrix, np.float64)
    for size in ((60, 80), (9, 8)):
        image = photo(3, size)
        wanted = pillow_warp(image, matrix, 'nearest', (1, 2, 3))
        np.testing.assert_array_equal(pixels.warp(image, matrix, 'nearest', (1, 2, 3)), wanted)
        wanted = pillow_warp(image, matrix, 'bilinear', (1, 2, 3)).astype(int)
        found = pixels.warp(image, matrix, 'bilinear', (1, 2, 3))
        where = inner(matrix, *size, 0.5)
        assert where.mean() > 0.4 or size == (9, 8)
        # Rounded here, cut there; older OpenCVs have places in 32nds of a pixel.
        assert np.abs(found - wanted)[where].max() <= 4
        assert np.abs(found - wanted)[where].mean() < 0.8
        # Nothing of the image but a pixel's width about it.
        outside = ~inner(matrix, *size, -1)
        np.testing.assert_array_equal(found[outside], np.tile((1, 2, 3), (outside.sum(), 1)))


def keys_cubic(t, a):
    """Keys's kernel (doi:10.1109/TASSP.1981.1163711)."""
    t = np.abs(t)
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * (t**3 - 5 * t**2 + 8 * t - 4)
    return np.where(t <= 1, near, np.where(t < 2, far, 0))


@pytest.mark.parametrize('matrix', MATRICES)
def test_bicubic_warps_are_keyss_of_three_quarters(matrix):
    matrix, (height, width) = np.array(matrix, np.float64), (50, 60)
    image = photo(3, (height, width))
    where = inner(matrix, height, width, 2.5)
    y, x = np.nonzero(where)
    x, y = matrix @ np.stack([x + 0.5, y + 0.5, np.ones(x.size)]) - 0.5
    wanted = np.zeros((len(x), 3))
    for i, j in itertools.product(range(-1, 3), repeat=2):
        row, column = np.floor(y).astype(int) + i, np.floor(x).astype(int) + j
        weight = keys_cubic(y - row, -0.75) * keys_cubic(x - column, -0.75)
        wanted += weight[:, None] * image[row, column]
    found = pixels.warp(image, matrix, 'bicubic', MEAN)[where]
    away = np.abs(found - np.clip(wanted, 0, 255))
    # Places are in 32nds of a pixel.
    assert away.max() < 4
    assert away.mean() < 0.6


@pytest.mark.parametrize('degrees', [-120, -25, 0, 25, 90])
def test_rotation_is_that_of_pillow(degrees):
    for size in ((60, 60), (40, 60), (9, 8)):
        image = photo(4, size)
        found = pixels.rotate(image, degrees, 'nearest', (9, 8, 7))
        wanted = Image.fromarray(image).rotate(degrees, fillcolor=(9, 8, 7))
        np.testing.assert_array_equal(found, np.asarray(wanted))


# --- RandAugment as timm has it --------------------------------------------------------


@pytest.mark.parametrize(('prefix', 'table'), [('timm', 'TIMM'), ('timm_plain', 'TIMM_PLAIN')])
def test_timm_randaug_has_the_pixels_of_timm(prefix, table):
    operations, seen, filled = getattr(autoaugment, table), set(), 0
    for image, wanted, kind, level, sign, method in recorded(prefix):
        seen.add(kind)
        found = operations[kind](image, float(level), int(sign), method)
        away = np.abs(found.astype(int) - wanted)
        if kind not in WARPS:
            assert away.max() <= (kind in ('color', 'sharpness')), (kind, level)
            continue
        fill = (wanted == MEAN).all(-1)
        # The bicubic kernel reaches two pixels out of the image.
        outside = ndimage.binary_erosion(fill, np.ones((3, 3)), iterations=2, border_value=1)
        assert (found[outside] == MEAN).all()
        filled += outside.sum()
        # Nowhere near the fill.
        where = ~ndimage.binary_dilation(fill, iterations=3)
        where[[0, -1]] = where[:, [0, -1]] = False
        assert where.mean() > 0.2
        if method == 'bilinear':
            assert away[where].mean() < 0.8
            assert away[where].max() <= 4
        else:
            # The kernels are Keys's of -0.75 and -0.5: the image is small and sharp.
            assert away[where].mean() < 2.5
    assert len(seen) == {'timm': 15, 'timm_plain': 6}[prefix]
    assert prefix == 'timm_plain' or filled > 100
    assert len(operations) == 15


def test_timm_posterize_keeps_a_bit():
    """Its image would be black."""
    image = photo()
    for operation, level in (
        (autoaugment.TIMM['posterize'], 10.0),
        (autoaugment.TIMM_PLAIN['posterize'], 0.0),
    ):
        np.testing.assert_array_equal(operation(image, level, 1, ''), image & 128)


def spied(monkeypatch, name):
    """Replaces the operations of a set by ones that write down their arguments."""
    seen = []

    def spy(number):
        def record(image, *values):
            seen.append((number, *values))
            return image

        return record

    table = getattr(autoaugment, name)
    monkeypatch.setattr(autoaugment, name, {n: spy(i) for i, n in enumerate(table)})
    return seen, len(table)


def black(count):
    return np.zeros((count, 2, 2, 3), np.uint8)


@pytest.mark.parametrize(('arguments', 'table'), [('', 'TIMM'), ('increasing=False', 'TIMM_PLAIN')])
def test_timm_randaug_follows_its_law(monkeypatch, arguments, table):
    seen, _ = spied(monkeypatch, table)
    count = 4000
    apply(f'timm_randaug({arguments})', black(count))
    assert stats.binomtest(len(seen), 2 * count, 0.5).pvalue > 1e-3
    choice, level, sign, method = (np.array(column) for column in zip(*seen, strict=True))
    assert stats.chisquare(np.bincount(choice, minlength=15)).pvalue > 1e-3
    below = level < 10
    assert stats.kstest(level[below], stats.truncnorm(-18, 2, 9, 0.5).cdf).pvalue > 1e-3
    assert stats.binomtest(int((~below).sum()), len(level), stats.norm.sf(2)).pvalue > 1e-3
    assert stats.binomtest(int((sign > 0).sum()), len(sign)).pvalue > 1e-3
    assert stats.binomtest(int((method == 'bicubic').sum()), len(method)).pvalue > 1e-3


def test_timm_randaug_takes_its_arguments(monkeypatch):
    seen, _ = spied(monkeypatch, 'TIMM')
    apply('timm_randaug(3, 5, 0, 1)', black(20))
    assert len(seen) == 60
    assert {level for _, level, _, _ in seen} == {5.0}


# --- TrivialAugment --------------------------------------------------------------------


def test_trivial_augment_has_the_pixels_of_torchvision():
    seen = set()
    for image, wanted, kind, level, sign in recorded('torchvision'):
        seen.add(kind)
        found = autoaugment.TRIVIAL[kind](image, int(level) / 30, int(sign))
        if kind == 'solarize':
            # Where the threshold is a whole number but for the last bits of a float32.
            threshold = round(255 * (1 - int(level) / 30))
            np.testing.assert_array_equal(found[image != threshold], wanted[image != threshold])
            continue
        away = np.abs(found.astype(int) - wanted)
        # Factors are in float32 there, which blends that come to a whole number can see.
        assert away.max() <= (kind in ('brightness', 'color', 'contrast', 'sharpness'))
        assert away.mean() < 0.02
    assert seen == set(autoaugment.TRIVIAL)


@pytest.mark.parametrize(
    ('bin_', 'bits', 'threshold'), [(0, 8, 255), (10, 6, 170), (15, 5, 128), (30, 2, 0)]
)
def test_trivial_augment_has_the_levels_of_torchvision(bin_, bits, threshold):
    # Of torchvision 0.28: 8 - round(bin / 5) bits, thresholds from 255 down to 0 (170 at a third).
    image = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (2, 1, 3))
    found = autoaugment.TRIVIAL['posterize'](image, bin_ / 30, 1)
    np.testing.assert_array_equal(found, image // 2 ** (8 - bits) * 2 ** (8 - bits))
    found = autoaugment.TRIVIAL['solarize'](image, bin_ / 30, 1)
    np.testing.assert_array_equal(found, np.where(image >= threshold, 255 - image, image))


def test_trivial_augment_follows_its_law(monkeypatch):
    seen, kinds = spied(monkeypatch, 'TRIVIAL')
    count = 6000
    apply('trivial_augment', black(count))
    choice, level, sign = (np.array(column) for column in zip(*seen, strict=True))
    assert (len(seen), kinds) == (count, 14)
    assert stats.chisquare(np.bincount(choice, minlength=14)).pvalue > 1e-3
    bins = np.rint(level * 30).astype(int)
    np.testing.assert_allclose(level, bins / 30)
    assert stats.chisquare(np.bincount(bins, minlength=31)).pvalue > 1e-3
    assert stats.binomtest(int((sign > 0).sum()), count).pvalue > 1e-3


# --- 3-Augment -------------------------------------------------------------------------


def test_three_augment_is_one_of_three():
    image, count = photo(size=(12, 12)), 900
    found = apply('three_augment(0)', np.repeat(image[None], count, axis=0))
    wanted = np.asarray(Image.fromarray(image).convert('L').convert('RGB'))
    grey = (found == wanted).all((1, 2, 3))
    solar = (found == np.where(image < 128, image, 255 - image)).all((1, 2, 3))
    assert stats.chisquare([grey.sum(), solar.sum(), (~grey & ~solar).sum()]).pvalue > 1e-3


def test_three_augment_follows_its_law(monkeypatch):
    sigmas, factors = [], []
    monkeypatch.setattr(pixels, 'gaussian_blur', lambda image, s: sigmas.append(s) or image)
    for kind in pixels.ENHANCEMENTS:
        monkeypatch.setitem(
            pixels.ENHANCEMENTS,
            kind,
            lambda image, f, kind=kind: factors.append((kind, f)) or image,
        )
    count = 3000
    apply('three_augment(0.3)', black(count))
    assert stats.binomtest(len(sigmas), count, 1 / 3).pvalue > 1e-3
    assert stats.kstest(sigmas, stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3
    assert 0.1 <= min(sigmas) < 0.11 and 1.99 < max(sigmas) < 2
    for kind in ('brightness', 'contrast', 'saturation'):
        values = [factor for name, factor in factors if name == kind]
        assert len(values) == count
        assert stats.kstest(values, stats.uniform(0.7, 0.6).cdf).pvalue > 1e-3
    names = np.array([name for name, _ in factors]).reshape(count, 3)
    _, counts = np.unique(names, axis=0, return_counts=True)
    assert len(counts) == 6
    assert stats.chisquare(counts).pvalue > 1e-3


# --- AugMix ----------------------------------------------------------------------------


def test_augmix_blends_chains_with_the_image(monkeypatch):
    images = np.repeat(photo(size=(10, 10))[None], 200, axis=0)
    assert len({x.tobytes() for x in apply('augmix', images)}) > 190
    # With operations that turn all white, the share of the image is what is left of black.
    white = {name: lambda image, *_: np.full_like(image, 255) for name in autoaugment.AUGMIX}
    monkeypatch.setattr(autoaugment, 'AUGMIX', white)
    for alpha in (0.3, 1.0, 4.0):
        shares = apply(f'augmix(alpha={alpha})', black(1500))[:, 0, 0, 0]
        # Rounded to a level: as probable as the interval about it.
        expected = np.diff(stats.beta(alpha, alpha).cdf((np.arange(0, 257, 32) - 0.5) / 255))
        expected[0] += stats.beta(alpha, alpha).cdf(-0.5 / 255)
        counts = np.bincount(shares // 32, minlength=8)
        assert stats.chisquare(counts, expected / expected.sum() * 1500).pvalue > 1e-3


@pytest.mark.parametrize('alpha', [0.01, 0.3, 1.0, 4.0])
def test_augmix_weighs_chains_by_a_dirichlet_law(monkeypatch, alpha):
    """The share of one of three is of Beta(alpha, 2 alpha)."""
    monkeypatch.setattr('scipy.special.betaincinv', lambda a, b, x: np.float64(1))
    numbers = iter(itertools.cycle([255, 0, 0]))
    marked = {name: lambda image, *_: np.full_like(image, next(numbers)) for name in 'ab'}
    monkeypatch.setattr(autoaugment, 'AUGMIX', marked)
    shares = apply(f'augmix(depth=1, alpha={alpha})', black(1500))[:, 0, 0, 0]
    law = stats.beta(alpha, 2 * alpha)
    expected = np.diff(law.cdf((np.arange(0, 257, 64) - 0.5) / 255))
    expected[0] += law.cdf(-0.5 / 255)
    expected[-1] += law.sf(255.5 / 255)
    counts = np.bincount(shares // 64, minlength=4)
    assert stats.chisquare(counts, expected / expected.sum() * 1500).pvalue > 1e-3


def test_augmix_follows_its_law(monkeypatch):
    seen, kinds = spied(monkeypatch, 'AUGMIX')
    count = 1500
    apply('augmix(1, 2, 4)', black(count))
    choice, level, sign = (np.array(column) for column in zip(*seen, strict=True))
    assert (len(seen), kinds) == (2 * count, 9)
    assert stats.chisquare(np.bincount(choice, minlength=9)).pvalue > 1e-3
    assert stats.kstest(level, stats.uniform(0.1, 3.9).cdf).pvalue > 1e-3
    assert stats.binomtest(int((sign > 0).sum()), len(sign)).pvalue > 1e-3
    transform, depths = transforms.parse('augmix(1)', size=(8, 8)), []
    for key in keys_of(600):
        seen.clear()
        transform({'image': black(1)}, key[None])
        depths.append(len(seen))
    np.testing.assert_array_equal(np.unique(depths), [1, 2, 3])
    assert stats.chisquare(np.bincount(depths)[1:]).pvalue > 1e-3


def test_augmix_has_the_levels_of_its_paper():
    """int(level * most / 10) of 4 bits, 30 degrees, 256 values, a third of the image."""
    image = photo(size=(30, 60))
    of = {name: operation(image, 3.7, 1) for name, operation in autoaugment.AUGMIX.items()}
    np.testing.assert_array_equal(of['posterize'], image & 0b11100000)
    np.testing.assert_array_equal(of['solarize'], np.where(image < 162, image, 255 - image))
    np.testing.assert_array_equal(of['translate_x'][:, :-7], image[:, 7:])
    np.testing.assert_array_equal(of['translate_y'][:-3], image[3:])
    for name, matrix in (
        ('rotate', pixels.rotation(11, (30.0, 15.0))),
        ('shear_x', np.array([[1, 0.111, 0], [0, 1, 0]])),
        ('shear_y', np.array([[1, 0, 0], [0.111, 1, 0]])),
    ):
        wanted = pillow_warp(image, matrix, 'bilinear', (0, 0, 0)).astype(int)
        where = inner(matrix, 30, 60, 0.5)
        assert np.abs(of[name] - wanted)[where].max() <= 4


# --- All -------------------------------------------------------------------------------

EVERY = ['timm_randaug', 'timm_randaug(increasing=False)', 'trivial_augment', 'three_augment',
         'augmix']  # fmt: skip


def test_every_operation_is_here():
    assert {text.partition('(')[0] for text in EVERY} == set(autoaugment.OPERATIONS)


@pytest.mark.parametrize('text', EVERY)
def test_an_example_looks_the_same_in_any_batch_and_is_not_changed(text):
    images = np.stack([photo(i, (16, 20)) for i in range(32)])
    before, keys = images.copy(), keys_of(32)
    together = apply(text, images, keys)
    np.testing.assert_array_equal(images, before)
    assert together.shape == images.shape
    assert together.dtype == np.uint8
    assert (together != images).any((1, 2, 3)).mean() > 0.5
    for i in (0, 5):
        alone = apply(text, images[i : i + 1], keys[i : i + 1])
        np.testing.assert_array_equal(alone[0], together[i])


@pytest.mark.parametrize('size', [(1, 1), (2, 9), (8, 8), (9, 1)])
@pytest.mark.parametrize('name', ['TIMM', 'TIMM_PLAIN', 'TRIVIAL', 'AUGMIX'])
def test_operations_take_any_size_and_level(name, size):
    most = 1 if name == 'TRIVIAL' else 10
    for operation in getattr(autoaugment, name).values():
        for level, sign, method in ((0.0, 1, 'bicubic'), (most, -1, 'bilinear'), (most, 1, '')):
            image = photo(size=size)
            before = image.copy()
            more = (method or 'bicubic',) if name.startswith('TIMM') else ()
            found = operation(image, float(level), sign, *more)
            assert (found.shape, found.dtype) == (image.shape, image.dtype)
            np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('timm_randaug(0)', 'timm_randaug takes a whole number from 1 to 12 for layers, not 0'),
        ('timm_randaug(2, 11)', 'timm_randaug takes a number from 0 to 10 for magnitude, not 11'),
        ('timm_randaug(prob=2)', 'timm_randaug takes a number from 0 to 1 for prob, not 2'),
        ('timm_randaug(increasing=1)', 'timm_randaug takes True or False for increasing, not 1'),
        ('three_augment(2)', 'three_augment takes a number from 0 to 1 for color_jitter, not 2'),
        ('augmix(depth=0)', 'augmix takes -1 or 1 to 3 for depth, not 0'),
        ('augmix(width=9)', 'augmix takes a whole number from 1 to 5 for width, not 9'),
        ('augmix(alpha=0)', 'augmix takes a number from 0.01 to 100 for alpha, not 0'),
        ('trivial_augment(3)', 'trivial_augment'),
    ],
)
def test_wrong_arguments(text, message):
    with pytest.raises(UserError, match=message):
        transforms.parse(text, size=(8, 8))


@pytest.mark.parametrize('text', EVERY)
def test_images_that_are_not_rgb_bytes_are_refused(text):
    name = text.partition('(')[0]
    for images, message in (
        (np.zeros((1, 8, 8, 1), np.uint8), 'of 3 channels, not 1'),
        (np.zeros((1, 8, 8, 3), np.float32), r'of bytes \(uint8\), not float32'),
    ):
        with pytest.raises(UserError, match=f'{name} takes images {message}'):
            apply(text, images)
