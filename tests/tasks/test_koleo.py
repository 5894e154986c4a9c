"""KoLeo against DINOv2's in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from self_distillation_oracle import inputs, numbers

from big_vit.tasks.koleo import koleo_loss


def test_value_and_gradient_are_those_of_dinov2():
    with jax.enable_x64(True):
        x = jnp.asarray(inputs().koleo)
        value, gradient = jax.value_and_grad(koleo_loss)(x, 12)
    assert float(value) == pytest.approx(float(numbers()['koleo']), abs=1e-10)
    np.testing.assert_allclose(gradient, numbers()['koleo_grad'], atol=1e-10)


@pytest.mark.slow
def test_groups_are_rows_of_equal_remainder():
    x = jnp.asarray(inputs().koleo, jnp.float32)
    apart = [koleo_loss(x[i::3], 4) for i in range(3)]
    assert float(koleo_loss(x, 4)) == pytest.approx(float(np.mean(apart)), rel=1e-5)
    # So every second row as a microbatch has groups of the whole batch.
    halves = [koleo_loss(x[i::2], 2) for i in range(2)]
    assert float(koleo_loss(x, 2)) == pytest.approx(float(np.mean(halves)), rel=1e-5)


@pytest.mark.slow
def test_a_picture_that_is_there_twice_moves_nothing():
    x = jnp.asarray(inputs().koleo, jnp.float32)[:4]
    gradient = jax.grad(koleo_loss)(jnp.concatenate([x[:1], x[:1], 3 * x[:1]]), 3)
    np.testing.assert_array_equal(gradient, 0)
    assert np.isfinite(jax.grad(koleo_loss)(jnp.zeros((4, 3)), 4)).all()
