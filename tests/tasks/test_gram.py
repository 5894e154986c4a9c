"""Gram anchoring against DINOv3's in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from self_distillation_oracle import inputs, numbers

from big_vit.tasks.gram import gram_loss


def test_value_and_gradient_are_those_of_dinov3():
    with jax.enable_x64(True):
        student, teacher = map(jnp.asarray, inputs().gram)
        value, gradient = jax.value_and_grad(gram_loss)(student, teacher)
    assert float(value) == pytest.approx(float(numbers()['gram']), abs=1e-10)
    np.testing.assert_allclose(gradient[:2], numbers()['gram_grad'], atol=1e-10)
