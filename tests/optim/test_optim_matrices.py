"""Which parameters are matrices, on the trees of real models."""

import math

import jax
import jax.numpy as jnp
import pytest

from big_vit import trees
from big_vit.models.vit import make_vit
from big_vit.optim import factory, matrices


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


@pytest.mark.parametrize('count, bottleneck', [(65_536, 256), (131_072, 384)])
@pytest.mark.parametrize('name', ['muon', 'shampoo', 'soap', 'adafactor_vit'])
def test_no_optimizer_has_a_square_of_all_prototypes(name, count, bottleneck):
    """Shampoo and SOAP cut them, and Muon leaves them to AdamW as it does a classifier."""
    head = {'kernel': (bottleneck, count), 'scale': (count,)}
    params = {'dino_head': {'prototypes': {n: jnp.zeros((), jnp.float32) for n in head}}}
    params = trees.map_with_name(
        lambda path, x: jax.ShapeDtypeStruct(head[path.rpartition('/')[2]], x.dtype), params
    )
    factors = dict.fromkeys(trees.flatten(params), 1.0)
    optimizer = factory.make(
        factory.LAWS[name](),
        lambda step: jnp.float32(1.0),
        decay_factors=factors,
        lr_factors=factors,
    )
    state = jax.eval_shape(optimizer.init, params)
    times = trees.nbytes(state) / trees.nbytes(params)
    assert times < {'muon': 2.01, 'shampoo': 10.6, 'soap': 10.6, 'adafactor_vit': 0.51}[name]
    if name == 'muon':
        assert all('/adamw/' in n for n in trees.flatten(state) if 'prototypes' in n)
