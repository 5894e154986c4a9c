"""Mixing: against NumPy with the same shares, and only the shares are random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gate import mostly_slow
from scipy import stats

from big_vit import augment
from big_vit.tasks.batch import normalise

CLASSES = 5


def batch_of(size, kind=np.uint8):
    rng = np.random.default_rng(size)
    image = rng.integers(0, 256, (size, 4, 6, 3)).astype(kind)
    return {'image': image, 'label': rng.integers(0, CLASSES, size).astype(np.int32)}


def mixed(batch, seed=0, alpha=0.2):
    return jax.device_get(
        augment.mix(
            jax.tree.map(jnp.asarray, batch), jax.random.key(seed), mixup=alpha, num_classes=CLASSES
        )
    )


def shares_of(size, seed=0, alpha=0.2):
    """Read off the labels, where every example is of another class than the one before it."""
    label = (np.arange(size) % CLASSES).astype(np.int32)
    label[-1] = 1 if size % CLASSES == 1 else label[-1]
    batch = {'image': np.zeros((size, 1, 1, 3), np.uint8), 'label': label}
    return mixed(batch, seed, alpha)['label'][np.arange(size), label]


@pytest.mark.parametrize('size', mostly_slow([1, 2, 7, 16], 1, 7))
def test_images_and_labels_are_those_of_numpy(size):
    batch = batch_of(size)
    share = np.asarray(jax.random.beta(jax.random.key(3), 0.4, 0.4, (size,)), np.float64)
    share = np.maximum(share, 1 - share)
    image = batch['image'] / 127.5 - 1
    label = np.eye(CLASSES)[batch['label']]
    found = mixed(batch, 3, 0.4)
    assert found['image'].dtype == found['label'].dtype == np.float32
    for i in range(size):
        wanted = share[i] * image[i] + (1 - share[i]) * image[i - 1]
        np.testing.assert_allclose(found['image'][i], wanted, atol=1e-6)
        wanted = share[i] * label[i] + (1 - share[i]) * label[i - 1]
        np.testing.assert_allclose(found['label'][i], wanted, atol=1e-6)


def test_floats_and_probabilities_are_mixed_as_they_are():
    batch = batch_of(8)
    done = {
        'image': normalise(jnp.asarray(batch['image'])),
        'label': jax.nn.one_hot(batch['label'], CLASSES),
    }
    for name, leaf in mixed(done).items():
        np.testing.assert_array_equal(leaf, mixed(batch)[name])


@pytest.mark.parametrize('alpha', mostly_slow([0.2, 1.0], 1.0))
def test_shares_are_those_of_the_beta_distribution_and_differ(alpha):
    shares = shares_of(4000, alpha=alpha)
    assert len(np.unique(shares)) > (3000 if alpha == 1 else 1000)
    # The larger of l and 1 - l.
    beta = stats.beta(alpha, alpha)

    def cdf(x):
        return np.where(x < 0.5, 0.0, beta.cdf(x) - beta.cdf(1 - x))

    # Float32 ends near 1, where much of a small alpha lies.
    assert stats.kstest(shares[shares < 1 - 1e-4], lambda x: cdf(x) / cdf(1 - 1e-4)).pvalue > 1e-3
    assert (shares >= 1 - 1e-4).mean() == pytest.approx(1 - cdf(1 - 1e-4), abs=0.03)


def test_every_example_leads_one_mixture():
    batch = batch_of(64)
    assert (mixed(batch)['label'].argmax(-1) == batch['label']).all()
    np.testing.assert_allclose(mixed(batch)['label'].sum(-1), 1, atol=1e-6)


def test_the_key_alone_decides():
    assert (shares_of(16, 0) == shares_of(16, 0)).all()
    assert (shares_of(16, 0) != shares_of(16, 1)).any()


def test_what_is_not_mixed_stays():
    extra = np.arange(3, dtype=np.float32)
    np.testing.assert_array_equal(mixed({**batch_of(3), 'extra': extra})['extra'], extra)


# CutMix.


def pasted(batch, seed=0, **more):
    return jax.device_get(
        augment.mix(
            jax.tree.map(jnp.asarray, batch),
            jax.random.key(seed),
            **{'cutmix': 1.0, 'num_classes': CLASSES, **more},
        )
    )


def coordinates(count, shape=(24, 30)):
    """Images whose pixels say whose they are; neighbours are of different classes."""
    image = np.broadcast_to(np.arange(count)[:, None, None, None] / count, (count, *shape, 1))
    label = np.arange(count) % CLASSES
    label[-1] = (label[-2] + 2) % CLASSES
    if label[-1] == label[0]:
        label[-1] = (label[-1] + 1) % CLASSES
    return {'image': image.astype(np.float32), 'label': label.astype(np.int32)}


def test_a_box_of_the_one_before_is_pasted_and_labels_go_by_its_area():
    count = 500
    batch = coordinates(count)
    found = pasted(batch)
    own, other = batch['image'][:, 0, 0, 0], np.roll(batch['image'][:, 0, 0, 0], 1)
    of_other = found['image'][..., 0] == other[:, None, None]
    of_own = found['image'][..., 0] == own[:, None, None]
    assert (of_own ^ of_other).all()
    left = of_own.mean((1, 2))
    rows, columns = of_other.any(2).sum(1), of_other.any(1).sum(1)
    np.testing.assert_array_equal(of_other.sum((1, 2)), rows * columns)
    shares = found['label'][np.arange(count), batch['label']]
    np.testing.assert_allclose(shares, left, atol=1e-6)
    np.testing.assert_allclose(found['label'].sum(-1), 1, atol=1e-6)


def np_box(share, centre, shape):
    """(top, left, height, width), in float64 and whole numbers."""
    ends = []
    for side, at in zip(shape, centre, strict=True):
        half, middle = int(side * np.sqrt(1 - np.float64(share))) // 2, int(side * np.float64(at))
        ends.append((max(middle - half, 0), min(middle + half, side)))
    (top, bottom), (left, right) = ends
    return top, left, bottom - top, right - left


@pytest.mark.parametrize('shape', [(32, 32), (24, 37)])
def test_boxes_are_those_of_numpy(shape):
    rng = np.random.default_rng(0)
    share = np.concatenate([[0, 0, 1], rng.random(1000)]).astype(np.float32)
    centre = rng.random((len(share), 2)).astype(np.float32)
    found = np.stack(augment.cutmix_boxes(jnp.asarray(share), jnp.asarray(centre), shape), axis=1)
    wanted = np.array([np_box(*each, shape) for each in zip(share, centre, strict=True)])
    np.testing.assert_array_equal(found[:, :4], wanted)
    left = 1 - wanted[:, 2] * wanted[:, 3] / (shape[0] * shape[1])
    np.testing.assert_allclose(found[:, 4], left, atol=1e-7)
    assert found[2, 4] == 1 and found[:2, 4].max() < 0.9


@pytest.mark.parametrize('alpha', mostly_slow([1.0, 0.3], 0.3))
@pytest.mark.slow
def test_areas_and_places_are_those_of_the_papers_law(alpha):
    count, (height, width) = 4000, (32, 40)
    found = pasted(coordinates(count, (height, width)), cutmix=alpha)
    batch = coordinates(count, (height, width))
    shares = found['label'][np.arange(count), batch['label']]
    rng, wanted, covered = np.random.default_rng(0), [], np.zeros((height, width))
    for _ in range(20_000):
        share, centre = rng.beta(alpha, alpha), rng.random(2)
        top, left, tall, wide = np_box(share, centre, (height, width))
        covered[top : top + tall, left : left + wide] += 1 / 20_000
        wanted.append(tall * wide)
    # As whole pixels: many boxes have the same area, which float32 would make another.
    areas = np.rint((1 - shares.astype(np.float64)) * height * width)
    assert stats.ks_2samp(areas, wanted).pvalue > 1e-3
    # How often each pixel is the other's: boxes are cut off at the borders, so less there.
    of_other = (found['image'] != batch['image'])[..., 0].mean(0)
    np.testing.assert_allclose(of_other, covered, atol=0.05)
    assert abs((of_other - covered).mean()) < 0.02
    assert np.ptp(covered) > 0.1


@pytest.mark.slow
def test_both_share_the_examples_and_some_are_left_alone():
    count = 2000
    batch = coordinates(count, (6, 7))
    found = pasted(batch, mixup=0.5, switch=0.25, prob=0.8)
    own = batch['image'][:, 0, 0, 0][:, None, None]
    other = np.roll(own, 1, axis=0)
    image = found['image'][..., 0]
    whole = (image == own).all((1, 2))
    cut = ((image == own) | (image == other)).all((1, 2)) & ~whole
    blended = ~whole & ~cut
    share = found['label'][np.arange(count), batch['label']]
    np.testing.assert_allclose(share[whole], 1, atol=1e-3)
    # What is left alone has no box, and what is pasted has the label of its pixels.
    np.testing.assert_allclose(share[cut], (image == own).mean((1, 2))[cut], atol=1e-6)
    assert blended.mean() == pytest.approx(0.8 * 0.75, abs=0.06)
    # A box may be empty, and its example whole.
    assert cut.mean() == pytest.approx(0.8 * 0.25, abs=0.06)
    # The partner's share of the pixels is that of the label.
    np.testing.assert_allclose(
        image[blended][:, 0, 0],
        (share[:, None] * own[:, 0] + (1 - share[:, None]) * other[:, 0])[blended, 0],
        atol=1e-5,
    )


def test_mixup_draws_the_same_beside_cutmix():
    batch = batch_of(16)
    alone, beside = mixed(batch), pasted(batch, mixup=0.2, switch=0.0)
    np.testing.assert_array_equal(alone['image'], beside['image'])


@pytest.mark.slow
def test_several_labels_are_mixed_too():
    batch = batch_of(6)
    labels = np.eye(CLASSES, dtype=np.float32)[batch['label']]
    labels[:, 0] = 1
    found = mixed({**batch, 'label': labels})['label']
    assert (found[:, 0] == 1).all()
    assert found.max() <= 1 + 1e-6
    assert ((found > 0) <= ((labels > 0) | (np.roll(labels, 1, 0) > 0))).all()
