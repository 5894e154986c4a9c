"""The head of self-distillation against DINOv2's and DINOv3's in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gate import mostly_slow
from self_distillation_oracle import numbers

from big_vit.models.layers import Style
from big_vit.models.prototype_head import PrototypeHead, unit


def given(norm):
    rng, widths = np.random.RandomState(1), (5, 7, 7, 4)
    params = {
        f'mlp_{i}': {'kernel': rng.standard_normal(pair), 'bias': rng.standard_normal(pair[1])}
        for i, pair in enumerate(itertools.pairwise(widths))
    }
    params['prototypes'] = {'kernel': rng.standard_normal((4, 11))}
    scale = 1 + 0.1 * rng.standard_normal(11)
    if norm == 'learned':
        params['prototypes']['scale'] = scale
    x, weight = rng.standard_normal((6, 5)), rng.standard_normal((6, 11))
    return jax.tree.map(jnp.asarray, (params, x, weight))


@pytest.mark.parametrize('norm', mostly_slow(['learned', 'none'], 'learned'))
def test_logits_and_gradients_are_those_of_the_reference(norm):
    wanted = numbers()
    with jax.enable_x64(True):
        params, x, weight = given(norm)
        head = PrototypeHead(11, 4, 7, norm, Style(dtype=jnp.float64))

        def total(params):
            logits = head.apply({'params': params}, x)
            return (logits * weight).sum(), logits

        gradient, logits = jax.grad(total, has_aux=True)(params)
    np.testing.assert_allclose(logits, wanted[f'head_{norm}'], atol=1e-10)
    pairs = {
        'first': gradient['mlp_0']['kernel'],
        'last': gradient['prototypes']['kernel'],
        'scale': gradient['prototypes'].get('scale'),
    }
    for name, found in pairs.items():
        if found is not None:
            np.testing.assert_allclose(found, wanted[f'head_{norm}_{name}_grad'], atol=1e-10)


def test_fixed_prototypes_are_learned_ones_of_length_one():
    params, x, _ = given('fixed')
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    fixed = PrototypeHead(11, 4, 7, 'fixed').apply({'params': params}, x)
    params['prototypes']['scale'] = jnp.ones(11)
    np.testing.assert_array_equal(
        fixed, PrototypeHead(11, 4, 7, 'learned').apply({'params': params}, x)
    )


@pytest.mark.slow
def test_rows_are_of_length_one_and_float32_in_any_type():
    head = PrototypeHead(11, 4, 7, style=Style(dtype=jnp.bfloat16))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 5)), jnp.bfloat16)
    params = head.init(jax.random.key(0), x)
    rows = head.apply(params, x, method='project')
    assert rows.dtype == head.apply(params, x).dtype == jnp.float32
    np.testing.assert_allclose(jnp.linalg.norm(rows, axis=-1), 1, atol=1e-6)
    np.testing.assert_array_equal(unit(jnp.zeros((1, 3))), 0)
