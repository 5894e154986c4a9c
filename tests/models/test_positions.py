"""Rotary positions that vary in training, beside DINOv3's, and by their laws."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gate import mostly_slow
from scipy import stats

from big_vit.models import positions
from big_vit.models.vit import make_vit

LIMITS = (0.25, 1.5, 2.0)


def variation(limits=LIMITS, grid=(3, 4), prefix=0):
    places = np.pad(positions.centres(grid), ((0, 0), (prefix, 0), (0, 0)))
    turned = np.arange(places.shape[1]) >= prefix
    omega = positions.rotary_frequencies(8, 2, 100.0)
    return positions.Variation(*map(jnp.asarray, (places, turned, omega, jnp.array(limits))))


def test_waves_are_those_of_dinov3_for_equal_draws(monkeypatch):
    """Shares of the range of shifts along both axes, of factors along both, and of one of all."""
    shares = np.array([0.3, 0.9, 0.6, 0.2, 0.7], np.float32)
    monkeypatch.setattr(jax.random, 'uniform', lambda *_, **__: jnp.asarray(2 * shares - 1))
    found = positions.varied_rotation(variation(prefix=2), jax.random.key(0))
    with np.load(Path(__file__).parents[1] / 'oracles' / 'rope_varied.npz') as wanted:
        for ours, name, still in zip(found, ('sin', 'cos'), (0, 1), strict=True):
            np.testing.assert_allclose(ours[0, 2:, 0], wanted[name], atol=2e-6)
            np.testing.assert_array_equal(ours[0, :2], still)


def lines(limits):
    """Factors and shifts along both axes, of many draws, from two tokens at opposite corners."""
    keys = jax.random.split(jax.random.key(1), 4000)
    found = np.asarray(jax.vmap(lambda key: positions.varied(variation(limits), key))(keys))[:, 0]
    places = positions.centres((3, 4))[0]
    factor = (found[:, -1] - found[:, 0]) / (places[-1] - places[0])
    return factor, found[:, 0] / factor - places[0]


@pytest.mark.parametrize(
    ('limits', 'least'), [((0.25, 1.0, 2.0), 1 / 2), ((0.25, 1.5, 1.0), 1 / 1.5)]
)
def test_shifts_are_uniform_and_factors_in_their_logarithm(limits, least):
    factor, shift = lines(limits)
    for axis in range(2):
        uniform = stats.uniform(-limits[0], 2 * limits[0])
        assert stats.kstest(shift[:, axis], uniform.cdf).pvalue > 1e-3
        width = -2 * np.log(least)
        logarithm = stats.uniform(np.log(least), width)
        assert stats.kstest(np.log(factor[:, axis]), logarithm.cdf).pvalue > 1e-3
    together = np.corrcoef(factor.T)[0, 1]
    # One factor of both axes, or one for each.
    assert together > 0.999 if limits[1] == 1 else abs(together) < 0.06
    assert abs(np.corrcoef(shift.T)[0, 1]) < 0.06


def net(scan, **more):
    settings = dict(patch_size=(4, 4), width=16, depth=3, mlp_dim=16, num_heads=2, scan=scan)
    settings |= dict(dtype=jnp.float32, posemb='rope', pool='cls', registers=1)
    return make_vit(0, **settings, **more)


@pytest.mark.parametrize('scan', mostly_slow([False, True], True))
def test_each_block_draws_for_itself_and_only_in_training(scan, monkeypatch):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16, 16, 3)), jnp.float32)
    rngs = {'dropout': jax.random.key(3)}
    plain, still, moved = net(scan), net(scan, rope_rescale=1.0), net(scan, rope_rescale=2.0)
    params = plain.init(jax.random.key(0), x)
    wanted = plain.apply(params, x)[0]
    np.testing.assert_array_equal(moved.apply(params, x)[0], wanted)
    found = still.apply(params, x, train=True, rngs=rngs)[0]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    drawn, law = [], positions.varied

    def watched(*args):
        places = law(*args)
        jax.debug.callback(lambda y: drawn.append(float(y)), places[0, -1, 0])
        return places

    monkeypatch.setattr(positions, 'varied', watched)
    found = jax.block_until_ready(moved.apply(params, x, train=True, rngs=rngs)[0])
    jax.effects_barrier()
    assert len({*drawn}) == 3 and np.abs(found - wanted).max() > 1e-4
