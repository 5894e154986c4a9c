"""ResNets with frozen norms against SciPy, and what the recipe of DETR holds of one."""

import math
import runpy

import jax
import jax.numpy as jnp
import numpy as np
from scipy import signal

from big_vit import trees
from big_vit.models import variants
from big_vit.models.detector import cleared
from big_vit.models.layers import PLAIN
from big_vit.models.stems import FrozenUnit
from big_vit.models.tokenizers import real_tokens
from big_vit.models.vit import make_vit
from big_vit.tasks.detection import detection
from big_vit.tasks.task import ExampleShape


def np_conv(x, p, stride):
    """Correlation with zeros around, every `stride`, then a factor and an offset."""
    kernel = np.float64(p['conv']['kernel'])
    border = kernel.shape[0] // 2
    x = np.pad(x, ((border, border), (border, border), (0, 0)))
    out = [
        sum(signal.correlate2d(x[..., i], kernel[..., i, o], 'valid') for i in range(x.shape[-1]))
        for o in range(kernel.shape[-1])
    ]
    y = np.stack(out, -1)[::stride, ::stride]
    return y * np.float64(p['scale']) + np.float64(p['bias'])


def test_a_unit_strides_in_its_second_convolution():
    unit = FrozenUnit(2, 2, PLAIN)
    x = np.random.default_rng(0).normal(size=(1, 6, 8, 3)).astype(np.float32)
    shapes = jax.eval_shape(unit.init, jax.random.key(0), x)['params']
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)
    with jax.default_matmul_precision('highest'):
        found = jax.jit(unit.apply)({'params': params}, jnp.asarray(x))[0]

    def relu(y):
        return np.maximum(y, 0)

    y = relu(np_conv(np.float64(x[0]), params['conv1'], 1))
    y = np_conv(relu(np_conv(y, params['conv2'], 2)), params['conv3'], 1)
    wanted = relu(y + np_conv(np.float64(x[0]), params['shortcut'], 2))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_recipe_trains_what_detr_trains():
    """The root, the first stage and all norms of the ResNet are held; the rest of it is slower.

    The original says at its start: number of params: 41302368.
    """
    config = runpy.run_path('configs/detr_r50_coco.py')['get_config']()
    sizes = variants.parse(config.model.variant)
    trunk = make_vit(0, **{**sizes, 'tokenizer': config.model.tokenizer, 'post_norm': True})
    keys = {name: value for name, value in config.task.items() if name != 'name'}
    net = detection(**keys).model(trunk, ExampleShape({'image': (64, 64, 3)}, 91))
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: net.init(jax.random.key(0), x)['params'], image)
    leaves = trees.flatten(shapes)
    factors = trees.match_rules(config.optim.lr_rules, leaves, 'lr_rules')
    assert sum(math.prod(x.shape) for n, x in leaves.items() if factors[n]) == 41_302_368
    convolutions = {n: f for n, f in factors.items() if n.endswith('conv/kernel')}
    assert len(convolutions) == 53  # As many as a ResNet-50 has without its head.
    held = [n for n, factor in convolutions.items() if not factor]
    assert len(held) == 11
    assert all(n.startswith(('stem/conv_root', 'stem/stage1')) for n in held)
    assert {f for n, f in convolutions.items() if n not in held} == {0.1}
    norms = [f for n, f in factors.items() if n.startswith('stem') and n not in convolutions]
    assert len(norms) == 106 and not any(norms)
    assert {f for n, f in factors.items() if not n.startswith('stem')} == {1.0}


def test_tokens_are_of_the_picture_where_their_first_pixel_is():
    size = np.array([[32, 64], [33, 1], [1, 65], [96, 32]])
    found = np.asarray(real_tokens(jnp.asarray(size), (96, 128), (3, 4)))
    for (height, width), real in zip(size, found, strict=True):
        pixels = np.zeros((96, 128), bool)
        pixels[:height, :width] = True
        np.testing.assert_array_equal(real, pixels[::32, ::32])
    image = jnp.ones((4, 96, 128, 3))
    np.testing.assert_array_equal(
        cleared(image, jnp.asarray(size)).sum((1, 2, 3)), size.prod(1) * 3
    )
