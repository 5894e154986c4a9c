"""Laws of initial values: bounds and deviations that papers and their code give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vit import trees
from big_vit.models.vit import make_vit

WIDTH, PIXELS = 64, 8 * 8 * 3


def drawn(law, scan=True):
    model = make_vit(
        0, (8, 8), WIDTH, 2, 128, 4, class_token=True, registers=3, scan=scan, weight_init=law
    )
    image = jnp.zeros((1, 16, 16, 3))
    return {
        n: np.asarray(x) for n, x in trees.flatten(model.init(jax.random.key(0), image)).items()
    }


def uniform(values, bound):
    """Whether all are within the bound, and as many near it as there should be."""
    size = np.abs(values)
    return size.max() <= bound and (size > 0.9 * bound).mean() == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize('scan', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_values_of_mae(scan):
    params = drawn('mae', scan)
    block = 'params/Transformer/encoderblock' + ('' if scan else '_1')
    # Queries, keys and values are one matrix of the reference, [3 width, width].
    for name in ('query', 'key', 'value'):
        kernel = params[f'{block}/MultiHeadDotProductAttention_0/{name}/kernel']
        assert uniform(kernel, (6 / (WIDTH + 3 * WIDTH)) ** 0.5), name
    out = params[f'{block}/MultiHeadDotProductAttention_0/out/kernel']
    assert uniform(out, (6 / (2 * WIDTH)) ** 0.5)
    assert uniform(params[f'{block}/MlpBlock_0/Dense_0/kernel'], (6 / (WIDTH + 128)) ** 0.5)
    assert uniform(params['params/embedding/kernel'], (6 / (PIXELS + WIDTH)) ** 0.5)
    # PyTorch's law of a convolution, which MAE leaves as it is.
    bias = params['params/embedding/bias']
    assert np.abs(bias).max() <= PIXELS**-0.5 and bias.std() == pytest.approx(
        PIXELS**-0.5 / 3**0.5, rel=0.2
    )
    for name in ('cls', 'registers'):
        assert params[f'params/{name}'].std() == pytest.approx(0.02, rel=0.3)
    zero = [n for n in params if n.endswith('/bias') and 'embedding' not in n]
    assert all((params[name] == 0).all() for name in zero)


def test_values_of_google_are_the_default():
    params = drawn(None)
    jax.tree.map(np.testing.assert_array_equal, params, drawn('vit'))
    block = 'params/Transformer/encoderblock'
    kernel = params[f'{block}/MultiHeadDotProductAttention_0/query/kernel']
    assert uniform(kernel, (6 / (2 * WIDTH)) ** 0.5)
    assert params['params/embedding/kernel'].std() == pytest.approx(PIXELS**-0.5, rel=0.05)
    assert not params['params/embedding/bias'].any() and not params['params/cls'].any()
    assert params['params/registers'].std() == pytest.approx(0.02, rel=0.3)
    assert params[f'{block}/MlpBlock_0/Dense_0/bias'].std() == pytest.approx(1e-6, rel=0.2)
