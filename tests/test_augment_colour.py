"""Colour operations on the devices: those of the host, and of SciPy and the standard library."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, stats

from big_vit import augment, augment_colour
from big_vit.data.transforms import pixels

KEY = jax.random.key(5)


def images_of(count=4, size=(13, 16), kind=np.uint8, channels=3):
    return np.random.default_rng(1).integers(0, 256, (count, *size, channels)).astype(kind)


def apply(operation, image, key=KEY):
    return jax.device_get(jax.jit(operation)({'image': jnp.asarray(image)}, key)['image'])


@pytest.mark.parametrize(
    ('operation', 'on_host'),
    [
        (augment_colour.solarize(100), lambda x: pixels.solarize(x, 100)),
        (augment_colour.random_grayscale(1.0), pixels.grayscale),
        (augment_colour.color_jitter((0.7, 0.7)), lambda x: pixels.brightness(x, 0.7)),
        (augment_colour.color_jitter(0, (1.4, 1.4)), lambda x: pixels.contrast(x, 1.4)),
        (augment_colour.color_jitter(0, 0, (0.3, 0.3)), lambda x: pixels.saturation(x, 0.3)),
    ],
)
def test_bytes_are_those_of_the_host(operation, on_host):
    image = images_of()
    wanted = np.stack([on_host(picture) for picture in image])
    np.testing.assert_array_equal(apply(operation, image), wanted)


@pytest.mark.parametrize('shift', [0.1, -0.37, 0.5])
def test_hue_is_that_of_the_standard_library(shift):
    image = images_of(1, (6, 7))
    wanted = np.empty(image.shape)
    for place in np.ndindex(image.shape[:3]):
        hue, saturation, value = colorsys.rgb_to_hsv(*(image[place] / 255))
        wanted[place] = colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)
    found = apply(augment_colour.color_jitter(0, 0, 0, (shift, shift)), image)
    np.testing.assert_allclose(found, wanted * 255, atol=0.51)


@pytest.mark.parametrize(('sigma', 'kernel'), [(0.4, None), (2.0, None), (2.0, 9)])
def test_blur_is_scipys(sigma, kernel):
    image = images_of(2, (24, 31))
    radius = 4 if kernel else int(np.ceil(4 * sigma))
    wanted = ndimage.gaussian_filter(
        image.astype(np.float64), (0, sigma, sigma, 0), mode='mirror', radius=(0, radius, radius, 0)
    )
    found = apply(augment_colour.gaussian_blur(sigma, sigma, kernel=kernel), image)
    np.testing.assert_allclose(found, wanted, atol=0.51)
    on_host = np.stack([pixels.gaussian_blur(picture, sigma, kernel) for picture in image])
    assert np.abs(found.astype(int) - on_host).max() <= 1


def test_factors_and_orders_follow_their_laws():
    """Of a grey image brightness alone changes the value, so its factors can be read."""
    image = np.full((4000, 1, 1, 3), 100, np.uint8)
    found = apply(augment_colour.color_jitter(0.4), image)[:, 0, 0, 0]
    assert stats.kstest((found + 0.5) / 100, stats.uniform(0.6, 0.8).cdf).pvalue > 1e-3
    # Contrast about the mean, then brightness, differs from the other order; each is half of all.
    image = np.tile(np.array([0, 200], np.uint8).reshape(1, 1, 2, 1), (2000, 1, 1, 3))
    found = apply(augment_colour.color_jitter((2.0, 2.0), (0.5, 0.5)), image)[:, 0]
    first = np.stack([pixels.contrast(pixels.brightness(image[0], 2.0), 0.5)] * 2000)[:, 0]
    share = (found == first).all((1, 2)).mean()
    assert 0.46 < share < 0.54


@pytest.mark.parametrize('p', [0.0, 0.2, 1.0])
@pytest.mark.parametrize('name', sorted(augment_colour.OPERATIONS))
def test_probabilities(name, p):
    image = images_of(2000, (3, 3))
    more = {'color_jitter': {'brightness': (0.5, 0.5)}, 'gaussian_blur': {'low': 2, 'high': 2}}
    operation = augment_colour.OPERATIONS[name](**more.get(name, {}), p=p)
    changed = (apply(operation, image) != image).any((1, 2, 3)).mean()
    assert abs(changed - p) < 0.04


def test_only_rgb_bytes_are_taken():
    for image in (images_of(channels=1), images_of(kind=np.float32)):
        with pytest.raises(ValueError, match='solarize: takes RGB bytes'):
            apply(augment_colour.solarize(), image)
    for wrong in ({'kernel': 8}, {'low': 3, 'high': 2}):
        with pytest.raises(ValueError, match='takes'):
            augment_colour.gaussian_blur(**wrong)


def test_views_have_keys_of_their_place():
    """A view added at the end moves no other; equal views draw each for itself."""
    views = {'global': jnp.asarray(images_of(64).reshape(32, 2, 13, 16, 3))}
    jitter = augment_colour.solarize(p=0.5)
    two = [('global', 1, [jitter]), ('global', 1, [jitter])]
    found = augment.on_views(two)(views, KEY)['global']
    alone = augment.on_views([('global', 1, [jitter])])({'global': views['global'][:, :1]}, KEY)
    np.testing.assert_array_equal(found[:, :1], alone['global'])
    same = {'global': jnp.repeat(views['global'][:, :1], 2, axis=1)}
    first, second = np.moveaxis(np.asarray(augment.on_views(two)(same, KEY)['global']), 1, 0)
    assert (first != second).any()
    first, second = np.moveaxis(
        np.asarray(augment.on_views([('global', 2, [jitter])])(same, KEY)['global']), 1, 0
    )
    assert (first != second).any()
