"""Colours of RGB bytes: pixels against Pillow and SciPy, laws as torchvision publishes them.

oracles/augment.npz holds what torchvision 0.28 and timm 1.0.31 made of one image, 24 pixels wide
and 20 high; `names` says of each of `outputs` what it is: `jitter_pil KIND FACTOR` and
`jitter_tensor KIND FACTOR` are `adjust_KIND` of torchvision.transforms.v2.functional of a Pillow
image and of a tensor of bytes.
"""

import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colors
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage, stats

from big_vit.data import order, transforms
from big_vit.data.transforms import colour, pixels
from big_vit.errors import UserError

ORACLE = Path(__file__).parents[1] / 'oracles' / 'augment.npz'


def photo(seed=0, size=(40, 56)):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]][..., None] / 8
    wave = np.sin(x + rng.uniform(0, 6, 3)) * np.cos(y / 2 + rng.uniform(0, 6, 3))
    return np.clip(120 + 90 * wave + rng.normal(0, 12, (*size, 3)), 0, 255).astype(np.uint8)


def noise(seed=0, size=(120, 90)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


IMAGES = [
    photo(),
    photo(1),
    noise(),
    np.full((9, 7, 3), 77, np.uint8),
    photo(2, (8, 8)),
    photo(3, (1, 1)),
    photo(4, (2, 5)),
]


def keys_of(batch):
    return order.example_keys(0, 0, np.arange(batch))


def apply(text, images, keys=None):
    keys = keys_of(len(images)) if keys is None else keys
    return transforms.parse(text, size=(8, 8))({'image': images}, keys)['image']


@pytest.mark.parametrize('factor', [0.0, 0.3, 0.7316, 1.0, 1.4, 3.0])
@pytest.mark.parametrize('kind', ['brightness', 'contrast', 'saturation', 'sharpness'])
def test_enhancements_are_those_of_pillow(kind, factor):
    enhance = {
        'brightness': ImageEnhance.Brightness,
        'contrast': ImageEnhance.Contrast,
        'saturation': ImageEnhance.Color,
        'sharpness': ImageEnhance.Sharpness,
    }[kind]
    for image in IMAGES:
        before = image.copy()
        found = pixels.ENHANCEMENTS[kind](image, factor).astype(int)
        np.testing.assert_array_equal(image, before)
        wanted = np.asarray(enhance(Image.fromarray(image)).enhance(factor)).astype(int)
        if kind in ('brightness', 'contrast'):
            np.testing.assert_array_equal(found, wanted)
        else:
            # Blends that come to a whole number but for the last bits of a float32.
            assert np.abs(found - wanted).max() <= 1
            assert (found != wanted).mean() < 1e-3


def test_luma_is_that_of_pillow_for_every_colour():
    """A quarter of a million colours, and all whose luma lies exactly between two values."""
    values = np.arange(256, dtype=np.int32)
    luma = 19595 * values[:, None, None] + 38470 * values[:, None] + 7471 * values
    chosen = np.concatenate([np.flatnonzero(luma & 65535 == 32768), np.arange(0, 256**3, 67)])
    image = np.stack(np.unravel_index(chosen, (256,) * 3), -1).astype(np.uint8)[None]
    wanted = np.asarray(Image.fromarray(image).convert('L'))
    np.testing.assert_array_equal(pixels.luma(image), wanted)
    np.testing.assert_array_equal(pixels.grayscale(image), np.repeat(wanted[..., None], 3, axis=2))


def recorded(prefix):
    with np.load(ORACLE, allow_pickle=False) as data:
        for name, output in zip(data['names'].tolist(), data['outputs'], strict=True):
            if name.startswith(f'{prefix} '):
                yield data['image'], output, *name.split()[1:]


def test_jitter_has_the_pixels_of_torchvision():
    for prefix in ('jitter_pil', 'jitter_tensor'):
        cases = list(recorded(prefix))
        assert len(cases) == 8
        for image, wanted, kind, factor in cases:
            if kind == 'hue':
                found = pixels.shift_hue(image, float(factor))
            else:
                found = pixels.ENHANCEMENTS[kind](image, float(factor))
            away = np.abs(found.astype(int) - wanted)
            # Tensors are blended with a grey that is no whole number. Pillow images turn by
            # int(255 * hue) of 256 hues, ours by the nearest.
            most = {'jitter_pil': 0, 'jitter_tensor': 1}[prefix] if kind != 'hue' else 6
            assert away.max() <= most, (prefix, kind, factor)
            assert away.mean() < 0.5


@pytest.mark.parametrize('shift', [-0.5, -0.1, 0.0, 0.2, 0.45])
def test_hue_is_turned_as_in_float64(shift):
    for image, mean in ((photo(), 0.6), (noise(), 0.6)):
        hsv = colors.rgb_to_hsv(image / 255)
        hsv[..., 0] = (hsv[..., 0] + shift) % 1
        away = np.abs(pixels.shift_hue(image, shift) - 255 * colors.hsv_to_rgb(hsv))
        # Hue and saturation are rounded to bytes on the way.
        assert away.mean() < mean
        assert away.max() < 11
    grey = np.repeat(noise()[..., :1], 3, axis=2)
    np.testing.assert_array_equal(pixels.shift_hue(grey, shift), grey)


@pytest.mark.parametrize(
    ('text', 'pillow'),
    [
        ('solarize', ImageOps.solarize),
        ('solarize(100)', lambda image: ImageOps.solarize(image, 100)),
        ('solarize(256)', lambda image: image),
        ('posterize(3)', lambda image: ImageOps.posterize(image, 3)),
        ('posterize(8)', lambda image: image),
        ('equalize', ImageOps.equalize),
        ('autocontrast', ImageOps.autocontrast),
        ('random_grayscale(1)', lambda image: image.convert('L').convert('RGB')),
    ],
)
def test_operations_on_values_are_those_of_pillow(text, pillow):
    for image in IMAGES:
        wanted = np.asarray(pillow(Image.fromarray(image)))
        np.testing.assert_array_equal(apply(text, [image])[0], wanted)


@pytest.mark.parametrize('sigma', [0.1, 0.3, 0.8, 2.0, 5.0, 20.0])
def test_blur_is_a_gaussian(sigma):
    black_and_white = np.kron(noise(size=(4, 3)) // 128 * 255, np.ones((30, 30, 1), np.uint8))
    for image in (*IMAGES, black_and_white):
        wanted = ndimage.gaussian_filter(
            image.astype(np.float64), (sigma, sigma, 0), mode='mirror', truncate=8
        )
        # Half a level is rounding.
        assert np.abs(pixels.gaussian_blur(image, sigma) - wanted).max() < 0.55


@pytest.mark.parametrize('quality', [1, 30, 75, 95, 100])
def test_jpeg_is_that_of_pillow(quality):
    for image in IMAGES:
        file = io.BytesIO()
        Image.fromarray(image).save(file, 'JPEG', quality=quality)
        with Image.open(file) as opened:
            wanted = np.asarray(opened)
        found = apply(f'jpeg_quality({quality}, {quality})', [image])[0]
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize('power', [0.5, 1, 2])
def test_gamma(power):
    for image in IMAGES:
        wanted = np.rint(255 * (image / 255.0) ** power)
        np.testing.assert_array_equal(apply(f'gamma({power}, {power})', [image])[0], wanted)


@pytest.mark.parametrize('p', [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    'text',
    [
        'color_jitter((0.5, 0.5), p={})',
        'random_grayscale({})',
        'solarize(0, p={})',
        'posterize(1, {})',
        'equalize({})',
        'autocontrast({})',
        'sharpness(0, {})',
        'gaussian_blur(2, 3, {})',
        'gamma(2, 3, {})',
        'jpeg_quality(1, 2, {})',
    ],
)
def test_probabilities(text, p):
    count = 600
    images = np.repeat(photo(size=(20, 20))[None], count, axis=0)
    changed = int((apply(text.format(p), images) != images).any((1, 2, 3)).sum())
    assert changed == count * p if p in (0, 1) else stats.binomtest(changed, count, p).pvalue > 1e-3


@pytest.mark.parametrize(
    ('text', 'random'),
    [
        ('posterize(4)', False),
        ('posterize(4, 0.9)', True),
        ('random_grayscale(1)', False),
        ('gamma(1, 2)', True),
        ('color_jitter(0.4)', True),
    ],
)
def test_what_cannot_fall_out_otherwise_is_not_random(text, random):
    """An evaluation may then use it."""
    assert transforms.parse(text, size=(8, 8)).is_random == random


def spied(monkeypatch, *names):
    """Replaces pixel functions, or enhancements, by ones that record their name and arguments."""
    seen = []

    def spy(name):
        def record(image, *values):
            seen.append((name, *values))
            return image

        return record

    for name in names:
        if name in pixels.ENHANCEMENTS:
            monkeypatch.setitem(pixels.ENHANCEMENTS, name, spy(name))
        else:
            monkeypatch.setattr(pixels, name, spy(name))
    return seen


BLACK = np.zeros((3000, 2, 2, 3), np.uint8)


def test_color_jitter_draws_torchvisions_law(monkeypatch):
    seen = spied(monkeypatch, 'brightness', 'contrast', 'saturation', 'shift_hue')
    apply('color_jitter(1.5, (0.5, 2.0), 0.2, 0.1)', BLACK)
    ranges = {'brightness': (0, 2.5), 'contrast': (0.5, 2.0), 'saturation': (0.8, 1.2)}
    for kind, (low, high) in {**ranges, 'shift_hue': (-0.1, 0.1)}.items():
        values = [value for name, value in seen if name == kind]
        assert len(values) == len(BLACK)
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-3
    names = np.array([name for name, _ in seen]).reshape(-1, 4)
    _, counts = np.unique(names, axis=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3


def test_color_jitter_leaves_out_what_cannot_change_and_nothing_else(monkeypatch):
    seen = spied(monkeypatch, *pixels.ENHANCEMENTS, 'shift_hue')
    apply('color_jitter(0, (1, 1), 0, (0.25, 0.25))', BLACK[:5])
    assert seen == [('shift_hue', 0.25)] * 5
    seen.clear()
    apply('color_jitter(0, (2, 2))', BLACK[:5])
    assert seen == [('contrast', 2.0)] * 5


def test_blur_and_jpeg_draw_uniformly(monkeypatch):
    seen = spied(monkeypatch, 'gaussian_blur', 'jpeg')
    apply('gaussian_blur(0.1, 2, 0.9)', BLACK)
    sigmas = [sigma for _, sigma, _ in seen]
    assert stats.kstest(sigmas, stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3
    seen.clear()
    apply('jpeg_quality(30, 34)', BLACK)
    values, counts = np.unique([quality for _, quality in seen], return_counts=True)
    np.testing.assert_array_equal(values, [30, 31, 32, 33, 34])
    assert stats.chisquare(counts).pvalue > 1e-3


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
]


def test_every_operation_is_here():
    assert {text.partition('(')[0] for text in EVERY} == set(colour.OPERATIONS)


@pytest.mark.parametrize('text', EVERY)
def test_an_example_looks_the_same_in_any_batch_and_is_not_changed(text):
    images = np.stack([photo(i, (16, 20)) for i in range(8)])
    before, keys = images.copy(), keys_of(8)
    together = apply(text, images, keys)
    np.testing.assert_array_equal(images, before)
    assert together.shape == images.shape
    assert together.dtype == np.uint8
    assert (together != images).any()
    for i in (0, 5):
        alone = apply(text, images[i : i + 1], keys[i : i + 1])
        np.testing.assert_array_equal(alone[0], together[i])
    mixed = [photo(0, (1, 1)), photo(1, (2, 9)), images[5][:, ::-1]]
    assert [x.shape for x in apply(text, mixed)] == [x.shape for x in mixed]


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('color_jitter(-1)', 'color_jitter takes a number from 0 to 1000 for brightness, not -1'),
        ('color_jitter(0, (2, 1))', r'takes 0 <= low <= high <= 1000 for contrast, not \(2, 1\)'),
        ('color_jitter(0, 0, 0, 0.6)', 'takes a number from 0 to 0.5 for hue, not 0.6'),
        ('random_grayscale(2)', 'random_grayscale takes a number from 0 to 1 for p, not 2'),
        ('solarize(300)', 'solarize takes a whole number from 0 to 256 for threshold, not 300'),
        ('posterize(0)', 'posterize takes a whole number from 1 to 8 for bits, not 0'),
        ('sharpness("much")', "sharpness takes a number from 0 to 100 for factor, not 'much'"),
        ('gaussian_blur(2, 1)', r'gaussian_blur takes 0.01 <= low <= high <= 100 for \(low, high'),
        ('gamma(0, 1)', r'gamma takes 0.01 <= low <= high <= 100 for \(low, high\), not \(0, 1\)'),
        ('jpeg_quality(90, 10)', 'jpeg_quality takes low <= high, not 90 and 10'),
        ('jpeg_quality(0)', 'jpeg_quality takes a whole number from 1 to 100 for low, not 0'),
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
