"""Operations of small programs, counted by hand; test_models.py has those of published models."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from big_vit import state
from big_vit.build.experiment import loss_flops
from big_vit.models import flops, layers, variants
from big_vit.models.vit import make_vit
from big_vit.tasks.classification import classification
from big_vit.tasks.task import ExampleShape


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_products_with_and_without_batch_axes():
    assert flops.count(jnp.matmul, array(3, 5), array(5, 7)) == 2 * 3 * 5 * 7
    found = flops.count(lambda x, y: jnp.einsum('bqhd,bkhd->bhqk', x, y), array(2, 4, 3, 8),
                        array(2, 6, 3, 8))  # fmt: skip
    assert found == 2 * 2 * 3 * 4 * 6 * 8
    assert flops.count(lambda x: jnp.tanh(x) + x.sum(), array(9, 9)) == 0


@pytest.mark.parametrize('groups', [1, 2])
@pytest.mark.parametrize('stride, outputs', [(1, 10 * 12), (2, 5 * 6)])
def test_convolutions(groups, stride, outputs):
    def convolve(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (stride, stride), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
            feature_group_count=groups,
        )  # fmt: skip

    found = flops.count(convolve, array(2, 10, 12, 4), array(3, 3, 4 // groups, 6))
    assert found == 2 * 2 * outputs * 6 * 3 * 3 * (4 // groups)


def test_a_loop_counts_as_often_as_it_runs():
    def loop(x, kernels):
        return lax.scan(lambda x, kernel: (x @ kernel, None), x, kernels)[0]

    assert flops.count(loop, array(3, 5), array(4, 5, 5)) == 4 * 2 * 3 * 5 * 5
    nested = jax.jit(lambda x, kernels: lax.map(lambda _: loop(x, kernels), jnp.arange(6)))
    assert flops.count(nested, array(3, 5), array(4, 5, 5)) == 6 * 4 * 2 * 3 * 5 * 5


def test_of_branches_the_most_expensive_counts():
    def either(x):
        return lax.cond(x.sum() > 0, lambda x: x @ x, lambda x: x @ x @ x, x)

    assert flops.count(either, array(5, 5)) == 2 * 2 * 5**3


def test_functions_with_derivatives_of_their_own_and_remat_count_once():
    def product(x, kernel):
        return layers.multiply(x, kernel, 1)

    wanted = 2 * 2 * 5 * 6 * 3 * 4
    for function in (product, jax.jit(product), jax.checkpoint(product)):
        assert flops.count(function, array(2, 5, 6), array(6, 3, 4)) == wanted


def test_a_gradient_is_two_more_products():
    def loss(x, y):
        return jnp.square(x @ y).sum()

    backward = jax.grad(loss, argnums=(0, 1))
    assert flops.count(backward, array(3, 5), array(5, 7)) == 3 * flops.count(
        loss, array(3, 5), array(5, 7)
    )


@pytest.mark.parametrize('attention', ['fused', 'xla', 'cudnn'])
def test_attention_counts_whichever_kernel_computes_it(attention):
    """A trace shows cuDNN's kernel as one call; its two products are counted all the same."""
    sizes = {**variants.parse('mu/4'), 'num_heads': 1}
    image, task = (16, 16, 3), classification()
    models = {
        kind: task.model(make_vit(0, **sizes, attention=kind), ExampleShape({'image': image}, 5))
        for kind in ('xla', attention)
    }
    params = state.abstract_params(models['xla'], image)
    parts = {'image': (image, jnp.uint8), 'label': ((), jnp.int32)}
    tokens, width = 16, 32
    block = 4 * tokens**2 * width + 2 * tokens * (4 * width**2 + 2 * width * 128)
    products = block + 2 * tokens * 48 * width + 2 * width * 5
    assert loss_flops(task, models[attention], params, parts, 2) == (products, 0)
