"""Colours and sets of augmentations: pixels against Pillow and SciPy, laws as published."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage, stats

from big_vit.data import autoaugment, colour, order, transforms
from big_vit.errors import UserError


def photo(seed=0, size=(40, 56)):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]][..., None] / 8
    wave = np.sin(x + rng.uniform(0, 6, 3)) * np.cos(y / 2 + rng.uniform(0, 6, 3))
    return np.clip(120 + 90 * wave + rng.normal(0, 12, (*size, 3)), 0, 255).astype(np.uint8)


IMAGES = [photo(), photo(1), np.full((9, 7, 3), 77, np.uint8), photo(2, (8, 8))]


def keys_of(batch):
    return order.example_keys(0, 0, np.arange(batch))


def apply(text, images, keys=None):
    keys = keys_of(len(images)) if keys is None else keys
    return transforms.parse(text, size=(8, 8))({'image': images}, keys)['image']


@pytest.mark.parametrize('factor', [0.0, 0.3, 0.7, 1.0, 1.4, 3.0])
@pytest.mark.parametrize('kind', ['brightness', 'contrast', 'saturation', 'sharpness'])
def test_enhancements_are_those_of_pillow(kind, factor):
    enhance = {
        'brightness': ImageEnhance.Brightness,
        'contrast': ImageEnhance.Contrast,
        'saturation': ImageEnhance.Color,
        'sharpness': ImageEnhance.Sharpness,
    }[kind]
    for image in IMAGES:
        wanted = np.asarray(enhance(Image.fromarray(image)).enhance(factor)).astype(int)
        found = colour.enhanced(image, kind, factor).astype(int)
        # Luma is rounded by OpenCV and cut by Pillow, smoothing the other way round; both blend.
        assert np.abs(found - wanted).max() <= (0 if kind == 'brightness' else 2)
        assert (found != wanted).mean() < 0.35


@pytest.mark.parametrize('shift', [-0.5, -0.1, 0.0, 0.2, 0.45])
def test_hue_is_turned_as_pillows_hsv(shift):
    for image in IMAGES:
        hsv = np.array(Image.fromarray(image).convert('HSV'))
        hsv[..., 0] += np.uint8(round(shift * 256) % 256)
        wanted = np.asarray(Image.fromarray(hsv, 'HSV').convert('RGB')).astype(int)
        away = np.abs(colour.shifted_hue(image, shift).astype(int) - wanted)
        # Hue and saturation are rounded to bytes on the way, by either in its own manner.
        assert away.mean() < 2
        assert away.max() < 12


@pytest.mark.parametrize(
    ('text', 'pillow'),
    [
        ('solarize(100)', lambda image: ImageOps.solarize(image, 100)),
        ('posterize(3)', lambda image: ImageOps.posterize(image, 3)),
        ('equalize', ImageOps.equalize),
        ('autocontrast', ImageOps.autocontrast),
    ],
)
def test_operations_on_values_are_those_of_pillow(text, pillow):
    for image in IMAGES:
        wanted = np.asarray(pillow(Image.fromarray(image)))
        np.testing.assert_array_equal(apply(text, [image])[0], wanted)


@pytest.mark.parametrize('sigma', [0.1, 0.8, 2.0, 5.0])
def test_blur_is_a_gaussian(sigma):
    image = photo(size=(60, 70))
    wanted = ndimage.gaussian_filter(
        image.astype(np.float64), (sigma, sigma, 0), mode='mirror', truncate=6
    )
    assert np.abs(colour.blurred(image, sigma) - wanted).max() < 1.6


def test_gamma_and_jpeg():
    image = photo()
    np.testing.assert_array_equal(apply('gamma(1, 1)', [image])[0], image)
    wanted = np.rint(255 * (image / 255.0) ** 2)
    np.testing.assert_array_equal(apply('gamma(2, 2)', [image])[0], wanted)
    close, far = (
        np.abs(apply(f'jpeg_quality({q}, {q})', [image])[0].astype(int) - image).mean()
        for q in (95, 10)
    )
    assert close < 6 < far


@pytest.mark.parametrize('p', [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    'text', ['solarize(0, p={})', 'random_grayscale({})', 'color_jitter(0.5, p={})']
)
def test_probabilities(text, p):
    count = 1000
    images = np.repeat(photo(size=(4, 5))[None], count, axis=0)
    changed = (apply(text.format(p), images) != images).any((1, 2, 3)).sum()
    if p in (0.0, 1.0):
        assert changed >= 0.98 * count * p
        assert changed <= count * p
    else:
        assert stats.binomtest(int(changed), count, p).pvalue > 1e-3


def test_color_jitter_draws_torchvisions_law(monkeypatch):
    seen = []

    def record(image, kind, value):
        seen.append((kind, value))
        return image

    monkeypatch.setattr(colour, 'enhanced', record)
    monkeypatch.setattr(colour, 'shifted_hue', lambda image, value: record(image, 'hue', value))
    count = 3000
    apply('color_jitter(0.4, (0.5, 2.0), 0.2, 0.1)', np.zeros((count, 2, 2, 3), np.uint8))
    ranges = {'brightness': (0.6, 1.4), 'contrast': (0.5, 2.0), 'saturation': (0.8, 1.2)}
    for kind, (low, high) in {**ranges, 'hue': (-0.1, 0.1)}.items():
        values = [value for name, value in seen if name == kind]
        assert len(values) == count
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-3
    orders = [tuple(name for name, _ in seen[4 * i : 4 * i + 4]) for i in range(count)]
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3


# --- Sets ------------------------------------------------------------------------------


@pytest.mark.parametrize('method', ['nearest', 'bilinear', 'bicubic'])
def test_warps_are_those_of_pillow_away_from_the_border(method):
    image = photo(3, (60, 80))
    resampling = Image.Resampling[method.upper()]
    for matrix in (
        [[1, 0.2, 0], [0, 1, 0]],
        [[1, 0, 3.3], [0, 1, -2.2]],
        [[0.9, -0.3, 9], [0.3, 0.9, 2]],
    ):
        flat = np.array(matrix, float).ravel()
        wanted = Image.fromarray(image).transform(
            (80, 60), Image.Transform.AFFINE, flat, resampling, fillcolor=(1, 2, 3)
        )
        found = autoaugment.warped(image, np.array(matrix), method, (1, 2, 3))
        inside = ~(np.asarray(wanted) == (1, 2, 3)).all(-1)
        inside = ndimage.binary_erosion(inside, iterations=3)
        assert inside.mean() > 0.4
        away = np.abs(found.astype(int) - np.asarray(wanted).astype(int))[inside]
        # Nearest pixels may tie; the bicubic kernels are those of -0.75 and -0.5.
        assert away.mean() < {'nearest': 2.0, 'bilinear': 1.0, 'bicubic': 3.5}[method]


def test_rotation_is_that_of_pillow():
    image = photo(4, (60, 60))
    wanted = np.asarray(Image.fromarray(image).rotate(25, Image.Resampling.BILINEAR))
    found = autoaugment.warped(image, autoaugment.rotation(25, image), 'bilinear', (0, 0, 0))
    away = np.abs(found.astype(int) - wanted.astype(int))[12:-12, 12:-12]
    assert away.mean() < 1


def test_timm_levels():
    image = photo()
    pil = Image.fromarray(image)
    for name, level, wanted in (
        ('posterize', 9.0, ImageOps.posterize(pil, 1)),
        ('posterize', 2.6, ImageOps.posterize(pil, 3)),
        ('solarize', 9.0, ImageOps.solarize(pil, 26)),
        ('brightness', 5.0, ImageEnhance.Brightness(pil).enhance(1.45)),
    ):
        found = autoaugment.TIMM[name](image, level, 1, 'bilinear')
        np.testing.assert_array_equal(found, np.asarray(wanted), err_msg=name)
    darker = autoaugment.TIMM['brightness'](image, 10.0, -1, 'bilinear')
    np.testing.assert_array_equal(darker, np.asarray(ImageEnhance.Brightness(pil).enhance(0.1)))
    moved = autoaugment.TIMM['translate_x'](image, 10.0, 1, 'bilinear')
    shift = 0.45 * image.shape[1]
    assert (moved[:, -int(shift) + 1 :] == (124, 116, 104)).all()
    # At level 10 timm keeps no bit at all.
    assert autoaugment.TIMM['posterize'](image, 10.0, 1, '').max() > 0


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


def test_timm_randaug_follows_its_law(monkeypatch):
    seen, kinds = spied(monkeypatch, 'TIMM')
    count = 4000
    apply('timm_randaug(2, 9, 0.5, 0.5)', np.zeros((count, 2, 2, 3), np.uint8))
    assert kinds == 15
    assert stats.binomtest(len(seen), 2 * count, 0.5).pvalue > 1e-3
    choice, level, sign, method = (np.array(column) for column in zip(*seen, strict=True))
    assert stats.chisquare(np.bincount(choice, minlength=15)).pvalue > 1e-3
    below = level < 10
    normal = stats.truncnorm(-18, 2, 9, 0.5)
    assert stats.kstest(level[below], normal.cdf).pvalue > 1e-3
    assert (~below).mean() == pytest.approx(stats.norm.sf(2), abs=0.01)
    assert stats.binomtest(int((sign > 0).sum()), len(sign)).pvalue > 1e-3
    assert stats.binomtest(int((method == 'bicubic').sum()), len(method)).pvalue > 1e-3


def test_trivial_augment_follows_its_law(monkeypatch):
    seen, kinds = spied(monkeypatch, 'TRIVIAL')
    count = 6000
    apply('trivial_augment', np.zeros((count, 2, 2, 3), np.uint8))
    choice, level, _ = (np.array(column) for column in zip(*seen, strict=True))
    assert (len(seen), kinds) == (count, 14)
    assert stats.chisquare(np.bincount(choice)).pvalue > 1e-3
    assert stats.chisquare(np.bincount(np.rint(level * 30).astype(int))).pvalue > 1e-3


@pytest.mark.parametrize(
    ('bin_', 'bits', 'threshold'), [(0, 8, 255), (10, 6, 170), (15, 5, 128), (30, 2, 0)]
)
def test_trivial_augment_has_the_levels_of_torchvision(bin_, bits, threshold):
    # Of torchvision 0.28: 8 - round(bin / 5) bits, thresholds from 255 down to 0 (170 at a third).
    image = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (2, 1, 3))
    found = autoaugment.TRIVIAL['posterize'](image, bin_ / 30, 1)
    np.testing.assert_array_equal(found, colour.posterized(image, bits))
    found = autoaugment.TRIVIAL['solarize'](image, bin_ / 30, 1)
    np.testing.assert_array_equal(found, np.where(image >= threshold, 255 - image, image))


def test_three_augment_is_one_of_three(monkeypatch):
    image = photo(size=(12, 12))
    count = 900
    found = apply('three_augment(0)', np.repeat(image[None], count, axis=0))
    grey = (found[..., 0] == found[..., 1]).all((1, 2))
    solar = (found == colour.solarized(image, 128)).all((1, 2, 3))
    counts = [grey.sum(), solar.sum(), count - grey.sum() - solar.sum()]
    assert stats.chisquare(counts).pvalue > 1e-3
    jittered = apply('three_augment(0.3)', np.repeat(image[None], 50, axis=0))
    assert len({x.tobytes() for x in jittered}) > 45


def test_augmix_blends_chains_with_the_image(monkeypatch):
    images = np.repeat(photo(size=(10, 10))[None], 400, axis=0)
    found = apply('augmix', images)
    assert len({x.tobytes() for x in found}) > 390
    # With operations that turn all white the share of the image is what is left of black.
    white = {name: lambda image, *_: np.full_like(image, 255) for name in autoaugment.AUGMIX}
    monkeypatch.setattr(autoaugment, 'AUGMIX', white)
    shares = apply('augmix', np.zeros((2000, 2, 2, 3), np.uint8))[:, 0, 0, 0] / 255
    assert stats.kstest(shares, 'uniform').statistic < 0.04
    shares = apply('augmix(alpha=4.0)', np.zeros((2000, 2, 2, 3), np.uint8))[:, 0, 0, 0] / 255
    assert stats.kstest(shares, stats.beta(4, 4).cdf).statistic < 0.04


EVERY = [
    'color_jitter(0.4, 0.4, 0.4, 0.1)',
    'random_grayscale(0.5)',
    'solarize(128, 0.5)',
    'posterize(4)',
    'equalize',
    'autocontrast',
    'sharpness(1.5)',
    'gaussian_blur',
    'gamma',
    'jpeg_quality',
    'timm_randaug',
    'trivial_augment',
    'three_augment',
    'augmix',
]


def test_every_operation_is_here():
    names = {text.partition('(')[0] for text in EVERY}
    assert names == set(colour.OPERATIONS) | set(autoaugment.OPERATIONS)


@pytest.mark.parametrize('text', EVERY)
def test_an_example_looks_the_same_in_any_batch_and_is_not_changed(text):
    images = np.stack([photo(i, (16, 20)) for i in range(8)])
    before, keys = images.copy(), keys_of(8)
    together = apply(text, images, keys)
    np.testing.assert_array_equal(images, before)
    assert together.shape == images.shape
    assert together.dtype == np.uint8
    for i in (0, 5):
        np.testing.assert_array_equal(
            apply(text, images[i : i + 1], keys[i : i + 1])[0], together[i]
        )
    mixed = [photo(0, (1, 1)), photo(1, (2, 9)), images[5]]
    assert [x.shape for x in apply(text, mixed)] == [x.shape for x in mixed]


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('color_jitter(-1)', 'color_jitter takes a number from 0 to 1000 for brightness, not -1'),
        ('color_jitter(0, 0, 0, 0.6)', 'takes a number from 0 to 0.5 for hue, not 0.6'),
        ('posterize(0)', 'posterize takes a whole number from 1 to 8 for bits, not 0'),
        ('gaussian_blur(2, 1)', 'gaussian_blur takes 0.01 <= low <= high <= 100'),
        ('jpeg_quality(90, 10)', 'jpeg_quality takes low <= high'),
        ('timm_randaug(2, 11)', 'timm_randaug takes a number from 0 to 10 for magnitude, not 11'),
        ('augmix(depth=0)', 'augmix takes -1 or 1 to 3 for depth'),
        ('augmix(width=9)', 'augmix takes a whole number from 1 to 5 for width'),
    ],
)
def test_wrong_arguments(text, message):
    with pytest.raises(UserError, match=message):
        transforms.parse(text, size=(8, 8))


@pytest.mark.parametrize('text', EVERY)
def test_images_that_are_not_rgb_bytes_are_refused(text):
    for images in (np.zeros((1, 8, 8, 1), np.uint8), np.zeros((1, 8, 8, 3), np.float32)):
        with pytest.raises(UserError, match='takes images of'):
            apply(text, images)
