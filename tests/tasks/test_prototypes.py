"""Targets and cross-entropies of self-distillation against the references' in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gate import mostly_slow
from self_distillation_oracle import GLOBALS, PATCHES, PROTOTYPES, inputs, numbers

from big_vit.tasks import prototypes


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def views_loss(targets, student):
    return float(prototypes.views_loss(targets, jnp.asarray(student) / 0.1))


def own(x):
    """Logits as they are, where a head would make them of rows."""
    return x


def all_slots(x):
    return jnp.ones(x.shape[:2])


def patch_slots(given, step):
    """Patches of all views in slots, those that are not masked with weight 0."""
    count = given.masks.sum(-1, keepdims=True)
    weight = np.where(given.masks, 1 / np.maximum(count, 1), 0).reshape(len(given.masks), -1)
    shape = (len(weight), GLOBALS * PATCHES, PROTOTYPES)
    rows, student = (x[step].reshape(shape) for x in (given.patches, given.student_patches))
    return jnp.asarray(rows), jnp.asarray(student), jnp.asarray(weight)


def test_losses_with_a_centre_are_those_of_dino_ibot_and_dinov2():
    given, wanted = inputs(), numbers()
    for reference, temperature in (('dino', (0.04, 0.055)), ('v2_loss_centre', (0.05, 0.05))):
        centre = np.zeros(PROTOTYPES)
        for step in range(2):
            teacher = given.cls[step]
            offset = -centre / temperature[step]
            targets = jax.nn.softmax(teacher / temperature[step] + offset[None, None])
            loss = views_loss(targets, given.student[step])
            expected = np.reshape(wanted[reference][step], -1)[0]
            assert loss == pytest.approx(expected, abs=1e-10)
            centre = 0.9 * centre + 0.1 * teacher.mean((0, 1))
        np.testing.assert_allclose(centre, wanted['dino_centre'], atol=1e-12)
    # iBOT: all views count, also those without a mask.
    for name, temperature in (('v2_loss_centre', (0.05, 0.05)), ('ibot_patch', (0.03, 0.045))):
        centre = np.zeros(PROTOTYPES)
        for step in range(2):
            teacher, student, weight = patch_slots(given, step)
            targets = jax.nn.softmax((teacher - centre[None, None]) / temperature[step])
            loss = prototypes.patches_loss(targets, student / 0.1, weight, GLOBALS)
            expected = np.reshape(wanted[name][step], -1)[-1]
            assert float(loss) == pytest.approx(expected, abs=1e-10)
            # Of iBOT all patches move the centre, of DINOv2 the masked.
            moved = (
                teacher[weight > 0] if name == 'v2_loss_centre' else teacher.reshape(-1, PROTOTYPES)
            )
            centre = 0.9 * centre + 0.1 * moved.mean(0)


@pytest.mark.parametrize('size', mostly_slow([2**28, 7 * PROTOTYPES, 1], 7 * PROTOTYPES))
def test_sinkhorn_is_that_of_dinov2_in_chunks_of_any_size(monkeypatch, size):
    monkeypatch.setattr(prototypes, '_LOGITS', size)
    given, wanted = inputs(), numbers()
    for step in range(2):
        teacher = jnp.asarray(given.cls[step])
        offset = prototypes.sinkhorn(own, teacher, all_slots(teacher), PROTOTYPES, 0.5)
        targets = jax.nn.softmax(teacher / 0.5 + offset[None, None])
        # The reference has views first, and swapped.
        swapped = np.concatenate([targets[:, 1], targets[:, 0]])
        np.testing.assert_allclose(swapped[:4], wanted[f'sinkhorn_cls_{step}'], atol=1e-12)
        loss = views_loss(targets, given.student[step])
        assert loss == pytest.approx(wanted['v2_loss_sinkhorn'][step][0], abs=1e-10)
        rows, student, weight = patch_slots(given, step)
        # Rows that do not count may be anything.
        rows = jnp.where(weight[..., None] > 0, rows, 1e3)
        real = (weight > 0).astype(jnp.float64)
        offset = prototypes.sinkhorn(own, rows, real, PROTOTYPES, 0.5)
        targets = jax.nn.softmax(rows / 0.5 + offset[None, None])
        loss = prototypes.patches_loss(targets, student / 0.1, weight, GLOBALS)
        assert float(loss) == pytest.approx(wanted['v2_loss_sinkhorn'][step][1], abs=1e-10)


def test_sinkhorn_does_not_overflow():
    rows = jnp.asarray(inputs().cls[0]) * 400
    offset = prototypes.sinkhorn(own, rows, all_slots(rows), PROTOTYPES, 0.04)
    assert np.isfinite(offset).all()


@pytest.mark.parametrize('size', mostly_slow([2**28, 7 * PROTOTYPES], 7 * PROTOTYPES))
def test_statistics_are_those_of_numpy(monkeypatch, size):
    monkeypatch.setattr(prototypes, '_LOGITS', size)
    rows = inputs().cls[0]
    offset = np.linspace(-1, 1, PROTOTYPES)
    found = prototypes.statistics(own, jnp.asarray(rows), PROTOTYPES, 0.3, jnp.asarray(offset))
    x = (rows / 0.3 + offset).reshape(-1, PROTOTYPES)
    target = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    assert float(found.entropy) == pytest.approx(-(target * np.log(target)).sum(1).mean())
    mean = target.mean(0)
    assert float(found.entropy_of_mean) == pytest.approx(-(mean * np.log(mean)).sum())
    assert float(found.used) == len(set(target.argmax(1).tolist())) / PROTOTYPES


def test_one_prototype_and_none_are_told_by_the_statistics():
    rows = jnp.zeros((4, 2, PROTOTYPES))
    uniform = prototypes.statistics(own, rows, PROTOTYPES, 0.1, jnp.zeros(PROTOTYPES))
    assert float(uniform.entropy) == pytest.approx(np.log(PROTOTYPES))
    one = prototypes.statistics(
        own, rows.at[..., 3].set(100.0), PROTOTYPES, 0.1, jnp.zeros(PROTOTYPES)
    )
    assert float(one.entropy_of_mean) == pytest.approx(0, abs=1e-6)
    assert float(one.used) == 1 / PROTOTYPES
