"""Gram anchoring against DINOv3's in float64."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from self_distillation_oracle import inputs, numbers

from big_vit.tasks.gram import gram_loss, resized


def test_value_and_gradient_are_those_of_dinov3():
    with jax.enable_x64(True):
        student, teacher = map(jnp.asarray, inputs().gram)
        value, gradient = jax.value_and_grad(gram_loss)(student, teacher)
    assert float(value) == pytest.approx(float(numbers()['gram']), abs=1e-10)
    np.testing.assert_allclose(gradient[:2], numbers()['gram_grad'], atol=1e-10)


def test_a_finer_grid_of_the_teacher_is_resized_as_in_dinov3():
    with np.load(Path(__file__).parents[1] / 'oracles' / 'gram_resized.npz') as file:
        wanted = dict(file)
    rng = np.random.RandomState(7)
    with jax.enable_x64(True):
        student, teacher = (jnp.asarray(rng.standard_normal((4, n, 5))) for n in (12, 48))
        fitting = resized(teacher, (6, 8), (3, 4))
        value, gradient = jax.value_and_grad(gram_loss)(student, fitting)
        np.testing.assert_array_equal(resized(teacher, (6, 8), (6, 8)), teacher)
    np.testing.assert_allclose(fitting, wanted['resized'], atol=1e-12)
    assert float(value) == pytest.approx(float(wanted['loss']), abs=1e-10)
    np.testing.assert_allclose(gradient, wanted['gradient'], atol=1e-10)
