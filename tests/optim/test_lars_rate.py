"""LARS with the rate inside its momentum, as in its paper, or outside, as in MoCo v3 and MAE."""

import jax.numpy as jnp
import numpy as np
import pytest

from big_vit.optim import factory


@pytest.mark.parametrize('inside', [True, False])
def test_updates_are_those_of_a_loop(inside):
    rng = np.random.default_rng(0)
    weight, bias = rng.standard_normal((6, 4)), rng.standard_normal(4)
    params = {'head': {'kernel': jnp.asarray(weight), 'bias': jnp.asarray(bias)}}
    rates = np.array([0.0, 2.0, 6.4, 3.0, 0.5])
    names = ['head/kernel', 'head/bias']
    made = factory.make(
        factory.LAWS['lars'](momentum=0.9, rate_in_momentum=inside),
        lambda step: jnp.asarray(rates, jnp.float32)[step],
        decay_factors=dict.fromkeys(names, 0.0),
        lr_factors=dict.fromkeys(names, 1.0),
        clip=0.0,
    )
    opt, sums = made.init(params), [np.zeros_like(weight), np.zeros_like(bias)]
    for step, rate in enumerate(rates):
        gradients = rng.standard_normal((6, 4)), rng.standard_normal(4)
        tree = {'head': dict(zip(('kernel', 'bias'), map(jnp.asarray, gradients), strict=True))}
        updates, opt = made.update(tree, opt, params, step=jnp.asarray(step))
        params = {'head': {n: params['head'][n] + updates['head'][n] for n in params['head']}}
        trust = 0.001 * np.linalg.norm(weight) / np.linalg.norm(gradients[0])
        for i, gradient in enumerate((trust * gradients[0], gradients[1])):
            sums[i] = 0.9 * sums[i] + (rate if inside else 1) * gradient
        outer = 1 if inside else rate
        weight, bias = weight - outer * sums[0], bias - outer * sums[1]
        np.testing.assert_allclose(params['head']['kernel'], weight, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(params['head']['bias'], bias, rtol=1e-5, atol=1e-6)
