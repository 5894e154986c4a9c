"""How a transform normalises images: what it says, against what becomes of pixels."""

import jax
import numpy as np
import pytest

from big_vit import augment
from big_vit.data import order, transforms
from big_vit.tasks.batch import normalise

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEVICE = transforms.DeviceOperations(augment.OPERATIONS, augment.RANDOM)


def parse(text):
    return transforms.parse(text, size=(8, 8), device=DEVICE)


CASES = [
    ('', (0.5,) * 3, (0.5,) * 3),
    ('resize(size) | flip_lr', (0.5,) * 3, (0.5,) * 3),
    ('to_device | flip_lr', (0.5,) * 3, (0.5,) * 3),
    ('random_erasing(0)', (0.5,) * 3, (0.5,) * 3),
    ('value_range(-1, 1)', (0.5,) * 3, (0.5,) * 3),
    ('value_range(0, 1)', (0.0,) * 3, (1.0,) * 3),
    ('value_range(high=1, low=0)', (0.0,) * 3, (1.0,) * 3),
    ('value_range(0, 255)', (0.0,) * 3, (1 / 255,) * 3),
    ('value_range(1, -1)', (0.5,) * 3, (-0.5,) * 3),
    # From -1 at black to 3 at white.
    ('value_range(-1, 3)', (0.25,) * 3, (0.25,) * 3),
    # Black at 51 and white at 255, which are 0.2 and 1 of pixels.
    ('value_range(0, 1, 51, 255)', (0.2,) * 3, (0.8,) * 3),
    ('normalize', *IMAGENET),
    ('normalize()', *IMAGENET),
    ("normalize('imagenet', 'imagenet')", *IMAGENET),
    ('rrc(size) | normalize() | random_erasing(0)', *IMAGENET),
    ('rrc(size) | flip_lr | to_device | normalize | flip_ud(0)', *IMAGENET),
    ('normalize(std=(0.1, 0.2, 0.3), mean=0.4)', (0.4,) * 3, (0.1, 0.2, 0.3)),
    ('normalize((0.1, 0.2, 0.3), 0.5)', (0.1, 0.2, 0.3), (0.5,) * 3),
    ('value_range(0, 1) | normalize(in_low=0, in_high=1)', *IMAGENET),
    ('value_range(-1, 1) | normalize(in_low=-1, in_high=1)', *IMAGENET),
    ('random_erasing(0) | normalize(in_low=-1, in_high=1)', *IMAGENET),
    # ((x - 0.5) / 0.25 - 2) / 4 is (x - 1) / 1.
    ('normalize(0.5, 0.25) | normalize(2, 4, 0, 1)', (1.0,) * 3, (1.0,) * 3),
    # 0 to 1 becomes 10 to 20 of what is -2 to 2 of pixels' 0 to 1.
    ('normalize(0.5, 0.25) | value_range(10, 20, -2, 2)', (-1.0,) * 3, (0.1,) * 3),
    # On the host, as floats of bytes.
    ('standardize(127.5, 127.5)', (0.5,) * 3, (0.5,) * 3),
    ('standardize(51, 102) | flip_lr', (0.2,) * 3, (0.4,) * 3),
    # (255 x - 51) / 102 is -0.5 to 2.
    ('standardize(51, 102) | value_range(-1, 1, -0.5, 2)', (0.5,) * 3, (0.5,) * 3),
]


@pytest.mark.parametrize(('text', 'mean', 'std'), CASES)
def test_mean_and_std_are_exact(text, mean, std):
    """Numbers that were written come back to the bit, not only nearly."""
    assert parse(text).normalisation(3) == (mean, std)


@pytest.mark.parametrize('text', [text for text, *_ in CASES])
def test_pixels_are_normalised_as_is_said(text):
    transform = parse(text)
    mean, std = transform.normalisation(3)
    # A mirrored crop of an image of one colour is that image.
    colours = np.random.default_rng(0).integers(0, 256, (4, 1, 1, 3), np.uint8)
    images = np.broadcast_to(colours, (4, 8, 8, 3)).copy()
    columns = transform({'image': images}, order.example_keys(0, 0, np.arange(4)))
    batch = {'image': jax.numpy.asarray(transforms.finished(columns, transform)['image'])}
    batch = augment.compose([f for _, f in transform.device])(batch, jax.random.key(0))
    wanted = (images / 255 - np.array(mean)) / np.array(std)
    tolerance = 1e-5 * max(1, np.abs(wanted).max())
    np.testing.assert_allclose(normalise(batch['image']), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ('text', 'mean', 'std'),
    [
        ('grayscale', 0.5, 0.5),
        ('value_range(0, 1)', 0.0, 1.0),
        ('normalize(0.1307, 0.3081) | random_erasing(0.25)', 0.1307, 0.3081),
        ('normalize((0.1307,), (0.3081,))', 0.1307, 0.3081),
        # Spectrograms are floats of their own scale.
        ('decode_audio(16000, 2) | log_mel(16000) | standardize(-4.25, 9.5)', -4.25, 9.5),
        ('decode_audio(16000, 2) | log_mel(16000) | mask_time(20)', 0.0, 1.0),
    ],
)
def test_images_of_one_channel(text, mean, std):
    transform = transforms.parse(text, size=(8, 8), device=DEVICE, skip=('decode_audio',))
    assert transform.normalisation(1) == ((mean,), (std,))


def test_a_transform_says_the_same_when_its_first_part_has_been_done():
    _, rest = parse('resize(size) | standardize(51, 102) | flip_lr').split()
    assert rest.names[0] == 'resize'
    assert rest.normalisation(3) == ((0.2,) * 3, (0.4,) * 3)


def test_operations_can_be_skipped():
    text = "tokenize('/absent/tokenizer.json', 8) | resize(size) | normalize()"
    transform = transforms.parse(text, size=(8, 8), device=DEVICE, skip=transforms.EXTERNAL)
    assert transform.names == ('resize',)
    assert transform.host_text == 'resize(size)'
    assert transform.normalisation(3) == IMAGENET
