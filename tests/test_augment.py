"""What is done on the devices: NumPy's values, published laws, and the same on any mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gate import mostly_slow
from scipy import stats

from big_vit import augment, sharding
from big_vit.tasks.batch import normalise

KEY = jax.random.key(3)
CLASSES = 5


def images_of(count=8, size=(10, 12), kind=np.uint8, channels=3):
    most = 65536 if kind == np.uint16 else 256
    return np.random.default_rng(0).integers(0, most, (count, *size, channels)).astype(kind)


def apply(function, image, key=KEY):
    return jax.device_get(jax.jit(function)({'image': jnp.asarray(image)}, key)['image'])


@pytest.mark.parametrize(('kind', 'white'), [(np.uint8, 255), (np.uint16, 65535)])
@pytest.mark.parametrize('bounds', [(-1, 1), (0, 1), (0, 255)])
def test_value_range(kind, white, bounds):
    image = images_of(kind=kind)
    low, high = bounds
    wanted = low + image.astype(np.float64) / white * (high - low)
    found = apply(augment.value_range(low, high), image)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-6 * max(1, high))


def test_value_range_of_floats_is_asked_for():
    image = images_of(kind=np.float32)
    with pytest.raises(ValueError, match='say what is black and white'):
        apply(augment.value_range(-1, 1), image)
    found = apply(augment.value_range(-1, 1, 0, 10), image)
    np.testing.assert_allclose(found, image / 5 - 1, atol=1e-5)


def test_the_default_is_value_range():
    for kind in (np.uint8, np.uint16):
        image = images_of(kind=kind)
        wanted = apply(augment.value_range(-1, 1), image)
        np.testing.assert_allclose(normalise(jnp.asarray(image)), wanted, atol=1e-6)


def test_normalize_is_torchvisions():
    image = images_of()
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(
        apply(augment.normalize(), image), (image / 255 - mean) / std, atol=2e-6
    )
    found = apply(augment.normalize(0.5, (0.25,)), image)
    np.testing.assert_allclose(found, (image / 255 - 0.5) / 0.25, atol=2e-6)
    for wrong in (augment.normalize(), augment.normalize(0.5, (0.2, 0.2, 0.2))):
        with pytest.raises(ValueError, match='normalize: 3 numbers for images of 1 channels'):
            apply(wrong, images_of(channels=1))
    floats = np.random.default_rng(0).uniform(-5, 5, image.shape).astype(np.float32)
    found = apply(augment.normalize(in_low=-5, in_high=5), floats)
    np.testing.assert_allclose(found, ((floats + 5) / 10 - mean) / std, atol=2e-6)


@pytest.mark.parametrize('second', [augment.value_range(0, 1), augment.normalize()])
@pytest.mark.parametrize(
    'first', [augment.value_range(-1, 1), augment.normalize(), augment.random_erasing(0.5)]
)
def test_numbers_of_images_are_made_once(first, second):
    with pytest.raises(ValueError, match=r'(value_range|normalize): these images are floats'):
        apply(augment.compose([first, second]), images_of())


@pytest.mark.parametrize(('name', 'axis'), [('flip_lr', 2), ('flip_ud', 1)])
def test_flips(name, axis):
    image = images_of(2000, (3, 4))
    found = apply(augment.OPERATIONS[name](0.3), image)
    same = (found == image).all((1, 2, 3))
    turned = (found == np.flip(image, axis)).all((1, 2, 3))
    assert (same | turned).all()
    assert stats.binomtest(int((turned & ~same).sum()), 2000, 0.3).pvalue > 1e-3
    assert found.dtype == np.uint8
    # Neighbours are turned independently.
    turned = turned & ~same
    assert stats.binomtest(int((turned[1:] & turned[:-1]).sum()), 1999, 0.09).pvalue > 1e-3
    np.testing.assert_array_equal(apply(augment.OPERATIONS[name](0), image), image)
    np.testing.assert_array_equal(apply(augment.OPERATIONS[name](1), image), np.flip(image, axis))


@pytest.mark.parametrize('mode', mostly_slow(['pixel', 'rand', 'const'], 'rand'))
def test_random_erasing_follows_timms_law(mode):
    count, (height, width) = 4000, (40, 50)
    marked = np.full((count, height, width, 2), 7, np.float32)
    erased = apply(augment.random_erasing(0.6, mode=mode), marked)
    inside = (erased != 7).any(-1)
    chosen = inside.any((1, 2))
    assert stats.binomtest(int(chosen.sum()), count, 0.6).pvalue > 1e-3
    rows, columns = inside.any(2), inside.any(1)
    tall, wide = rows.sum(1)[chosen], columns.sum(1)[chosen]
    np.testing.assert_array_equal(inside.sum((1, 2))[chosen], tall * wide)  # One box each.
    area = tall * wide / (height * width)
    # A box as high or wide as the image is drawn again, which favours small ones a little.
    steps = np.random.default_rng(0)
    wanted = []
    while len(wanted) < 20_000:
        a = steps.uniform(0.02, 1 / 3) * height * width
        r = np.exp(steps.uniform(np.log(0.3), -np.log(0.3)))
        h, w = round(np.sqrt(a * r)), round(np.sqrt(a / r))
        if h < height and w < width:
            wanted.append((h * w / (height * width), h / w))
    wanted = np.array(wanted)
    assert stats.ks_2samp(area, wanted[:, 0]).pvalue > 1e-3
    assert stats.ks_2samp(tall / wide, wanted[:, 1]).pvalue > 1e-3
    first = rows.argmax(1)[chosen] / np.maximum(height - tall, 1)
    assert stats.kstest(first[tall < height - 10], 'uniform').statistic < 0.05
    values = erased[inside]
    if mode == 'const':
        assert not values.any()
    else:
        assert abs(values.mean()) < 0.1
        assert values.std() == pytest.approx(1, abs=0.1)
    spread = np.array([erased[i][inside[i]].std(0).max() for i in np.flatnonzero(chosen)[:50]])
    assert (spread.min() > 0.3) if mode == 'pixel' else (spread.max() < 1e-4)


def test_several_boxes_share_the_area():
    count, side = 500, 40
    marked = np.full((count, side, side, 1), 7, np.float32)
    one = round(np.sqrt(0.3 / 3) * side) ** 2
    found = apply(augment.random_erasing(0.5, 0.3, 0.3, 1, 'const', count=3), marked)
    erased = (found == 0).sum((1, 2, 3))
    assert stats.binomtest(int((erased > 0).sum()), count, 0.5).pvalue > 1e-3
    assert one <= erased[erased > 0].min() and erased.max() == 3 * one
    assert (erased == 3 * one).mean() > 0.05  # Boxes that do not overlap are frequent.


def test_a_box_that_never_fits_is_left_out():
    image = images_of(kind=np.float32)
    np.testing.assert_array_equal(apply(augment.random_erasing(1, 1, 1), image), image)


def test_erasing_bytes_makes_numbers_of_them_first():
    image = images_of()
    after = augment.compose([augment.value_range(-1, 1), augment.random_erasing(0.0)])
    found = apply(augment.random_erasing(0.0), image)
    np.testing.assert_allclose(found, apply(after, image), atol=1e-6)


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: augment.value_range('a', 1), "takes a number .* for low, not 'a'"),
        (lambda: augment.value_range(1, 1), 'takes a low that is not high, not twice 1'),
        (lambda: augment.value_range(0, 1, 3), 'takes both of in_low and in_high'),
        (lambda: augment.value_range(0, 1, 3, 3), 'takes in_low below in_high'),
        (lambda: augment.normalize('coco'), "takes numbers, or 'imagenet' for both"),
        (lambda: augment.normalize(0.5, float('inf')), 'takes a number, or one for each channel'),
        (lambda: augment.normalize(0.5, 0.5, 0), 'takes both of in_low and in_high'),
        (lambda: augment.normalize(0.5, 0.0), 'takes numbers above 0 for std'),
        (lambda: augment.flip_lr(2), 'takes a number from 0 to 1 for p, not 2'),
        (lambda: augment.random_erasing(0.5, 0.5, 0.1), 'takes 0 < min_area <= max_area'),
        (lambda: augment.random_erasing(0.5, mode='x'), "takes 'pixel', 'rand' or 'const'"),
        (lambda: augment.random_erasing(0.5, count=0), 'takes a whole number from 1 to 16 for c'),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def pipeline():
    return augment.compose(
        [augment.flip_lr(), augment.value_range(-1, 1), augment.random_erasing(0.5)]
    )


def test_an_operation_added_at_the_end_changes_none_before():
    image = images_of()
    short = augment.compose([augment.flip_lr(), augment.value_range(-1, 1)])
    found, wanted = apply(pipeline(), image), apply(short, image)
    same = (found == wanted).mean((1, 2, 3))
    assert (same > 0.6).all()


MESHES = pytest.mark.parametrize(
    'sizes',
    [
        pytest.param((8, 1, 1), marks=pytest.mark.slow),
        pytest.param((1, 8, 1), marks=pytest.mark.slow),
        (2, 2, 2),
    ],
)


@MESHES
def test_bytes_are_the_same_to_the_last_bit_on_any_mesh(sizes):
    function = augment.compose([augment.flip_lr(), augment.flip_ud(0.3)])
    image, results = images_of(16), []
    for devices, axes in ((1, (1, 1, 1)), (8, sizes)):
        mesh = sharding.make_mesh(*axes, jax.devices()[:devices])
        with jax.set_mesh(mesh):
            where = sharding.batch_sharding(mesh)
            results.append(apply(function, jax.device_put(image, where)))
    np.testing.assert_array_equal(*results)
    assert results[0].dtype == np.uint8 and (results[0] != image).any()


@MESHES
@pytest.mark.slow
def test_nothing_depends_on_the_mesh(sizes):
    batch = {
        'image': images_of(16),
        'label': np.random.default_rng(1).integers(0, CLASSES, 16).astype(np.int32),
    }

    def make(batch, key, mesh):
        batch = pipeline()(batch, key)
        return augment.mix(
            batch,
            jax.random.fold_in(key, 9),
            mixup=0.8,
            cutmix=1.0,
            num_classes=CLASSES,
            replicate=sharding.constrain_replicated(mesh),
        )

    results = []
    for devices, axes in ((1, (1, 1, 1)), (8, sizes)):
        mesh = sharding.make_mesh(*axes, jax.devices()[:devices])
        where = sharding.batch_sharding(mesh)
        with jax.set_mesh(mesh):
            on_mesh = jax.device_put(batch, where)
            step = jax.jit(lambda b, mesh=mesh: make(b, KEY, mesh), out_shardings=where)
            results.append(jax.device_get(jax.block_until_ready(step(on_mesh))))
    for name in results[0]:
        np.testing.assert_allclose(results[0][name], results[1][name], atol=1e-6)


@MESHES
def test_images_do_not_travel_but_for_one_row(sizes):
    mesh = sharding.make_mesh(*sizes)
    where = sharding.batch_sharding(mesh)
    shapes = {'image': ((16, 8, 8, 3), jnp.uint8), 'label': ((16,), jnp.int32)}
    batch = {n: jax.ShapeDtypeStruct(s, d, sharding=where) for n, (s, d) in shapes.items()}

    def make(b):
        return augment.mix(
            pipeline()(b, KEY),
            KEY,
            mixup=0.8,
            cutmix=1.0,
            num_classes=CLASSES,
            replicate=sharding.constrain_replicated(mesh),
        )

    text = jax.jit(make, out_shardings=where).lower(batch).compile().as_text()
    kinds = 'all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter'
    found = re.findall(rf'= (\w+\[[\d,]*\])\S* ({kinds})(?:-start)?\(', text)
    assert {kind for _, kind in found} == {'collective-permute'}
    assert all(re.match(r'\w+\[1,', shape) for shape, _ in found), found
    assert '[2,8,8,3]' in text or '[4,8,8,3]' in text
    assert '[16,8,8,3]' not in text, 'no device holds all images, nor draws noise for them'
