"""Which parameters are matrices, on the trees of real models."""

import math

import jax
import jax.numpy as jnp
import pytest

from big_vit import trees
from big_vit.models.vit import make_vit
from big_vit.optim import matrices


def shapes(scan, pool='map'):
    vit = make_vit(10, (4, 4), 24, 2, 48, 3, posemb='learned', pool=pool, scan=scan)
    image = jnp.zeros((1, 8, 8, 3))
    return trees.flatten(jax.eval_shape(vit.init, jax.random.key(0), image)['params'])


def view(name, shape):
    found = matrices.matrix(name, len(shape))
    if found is None:
        return None
    stack, rows = shape[: found.stack], shape[found.stack : found.stack + found.inputs]
    assert len(shape) == sum(found)
    return stack, math.prod(rows), math.prod(shape[found.stack + found.inputs :])


@pytest.mark.parametrize('scan', [False, True])
def test_kernels_are_inputs_by_outputs_and_nothing_else_is_a_matrix(scan):
    found = {name: view(name, leaf.shape) for name, leaf in shapes(scan).items()}
    block = 'Transformer/encoderblock' + ('' if scan else '_1')
    stack = (2,) if scan else ()
    attention = f'{block}/MultiHeadDotProductAttention_0'
    for part in ('query', 'key', 'value', 'out'):
        assert found[f'{attention}/{part}/kernel'] == (stack, 24, 24)
    assert found[f'{block}/MlpBlock_0/Dense_0/kernel'] == (stack, 24, 48)
    assert found[f'{block}/MlpBlock_0/Dense_1/kernel'] == (stack, 48, 24)
    assert found['embedding/kernel'] == ((), 48, 24)
    assert found['head/kernel'] == ((), 24, 10)
    assert found['MAPHead_0/MlpBlock_0/Dense_0/kernel'] == ((), 24, 48)
    rest = {name for name, matrix in found.items() if matrix is None}
    assert rest == {name for name in found if not name.endswith('/kernel')}


def test_hidden_matrices_are_neither_the_embedding_nor_the_head():
    found = shapes(scan=False)
    hidden = {name for name, leaf in found.items() if matrices.is_hidden(name, leaf.ndim)}
    kernels = {name for name in found if name.endswith('kernel')}
    assert kernels - hidden == {'embedding/kernel', 'head/kernel'}


def test_only_scanned_blocks_are_stacked():
    for name in shapes(scan=True):
        assert matrices.stacked_axes(name) == ('encoderblock' in name)
    assert not any(map(matrices.stacked_axes, shapes(scan=False)))
