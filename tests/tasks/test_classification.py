"""Losses and scores, against float64 NumPy."""

from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vit.evaluators import classification
from big_vit.models.vit import ViT
from big_vit.tasks.classification import classification_loss

COUNT, CLASSES = 12, 7


def apply_of(logits):
    """An `apply` that gives these logits, whatever it is shown."""
    return lambda variables, image, **_: (jnp.asarray(logits, jnp.float32), {})


@pytest.fixture(scope='module')
def made():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (COUNT, CLASSES))
    several = (rng.random((COUNT, CLASSES)) < 0.3).astype(np.float32)
    several[0] = 0  # One without any.
    return logits, rng.integers(0, CLASSES, COUNT).astype(np.int32), several


IMAGE = np.zeros((COUNT, 2, 2, 1), np.uint8)


def loss_of(logits, label, **more):
    loss = classification_loss(Mock(spec=ViT, apply=apply_of(logits)), **more)
    batch = {'image': IMAGE, 'label': label}
    value, aux = jax.jit(lambda batch: loss({}, (), batch, None, 0))(batch)
    assert aux.carried == ()
    return float(value), float(aux.metrics['accuracy'])


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_sigmoid_is_one_question_a_class(made, smoothing):
    logits, _, several = made
    wanted = several * (1 - smoothing) + smoothing / CLASSES
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    each = -(wanted * np.log(p) + (1 - wanted) * np.log(1 - p)).sum(1)
    value, accuracy = loss_of(logits, several, kind='sigmoid', label_smoothing=smoothing)
    assert value == pytest.approx(each.mean(), rel=1e-5)
    hit = several[np.arange(COUNT), logits.argmax(1)] > 0
    assert accuracy == pytest.approx(hit.mean())


def test_softmax_of_indices_and_of_their_vectors_is_one(made):
    logits, label, _ = made
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    wanted = -log_p[np.arange(COUNT), label].mean()
    for given in (label, np.eye(CLASSES, dtype=np.float32)[label]):
        value, accuracy = loss_of(logits, given)
        assert value == pytest.approx(wanted, rel=1e-5)
        assert accuracy == pytest.approx((logits.argmax(1) == label).mean())


@pytest.mark.parametrize('kind', ['softmax', 'sigmoid'])
def test_scores_of_several_labels(made, kind):
    logits, _, several = made
    mask = np.ones(COUNT, np.float32)
    mask[3] = 0
    sums = classification.sums(apply_of(logits), kind=kind)
    found = jax.jit(sums)({}, {'image': IMAGE, 'label': several, 'mask': mask})
    top = {1: 0, 5: 0}
    for i in range(COUNT):
        if not mask[i] or not several[i].any():
            continue
        best = max(logits[i][several[i] > 0])
        above = (logits[i][several[i] == 0] >= best).sum()
        for k in top:
            top[k] += above < k
    assert float(found['top1']) == top[1]
    assert float(found['top5']) == top[5]
    assert float(found['count']) == COUNT - 1


def test_images_are_prepared_before_they_are_scored():
    seen = []

    def apply(variables, image, **_):
        seen.append(image)
        return jnp.zeros((COUNT, CLASSES)), {}

    def prepare(batch):
        return {**batch, 'image': batch['image'].astype(jnp.float32) + 3}

    sums = classification.sums(apply, prepare)
    batch = {'image': IMAGE, 'label': np.zeros(COUNT, np.int32), 'mask': np.ones(COUNT)}
    sums({}, jax.tree.map(jnp.asarray, batch))
    np.testing.assert_array_equal(seen[0], IMAGE + 3.0)
