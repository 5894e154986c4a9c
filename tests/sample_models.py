"""Models of every tokenizer and every pooling, with the shapes of their inputs."""

import jax
import jax.numpy as jnp
import numpy as np

from big_vit import trees
from big_vit.models.tokenizers import Stream
from big_vit.models.vit import make_vit

SMALL = dict(patch_size=(4, 4), width=24, depth=1, mlp_dim=20, num_heads=2, num_classes=5)


def model(**changes):
    return make_vit(**{**SMALL, 'dtype': jnp.float32, 'scan': False, **changes})


def random_like(shapes, seed=1):
    rng = np.random.default_rng(seed)

    def draw(name, leaf):
        value = rng.standard_normal(leaf.shape) * 0.3 + name.endswith(('scale', 'temperature'))
        return value.astype(np.float32)

    return trees.map_with_name(draw, shapes)


F32 = np.dtype(np.float32)
PICTURE = {'image': ((16, 16, 3), F32)}
INPUTS = {
    'patches': ({}, PICTURE),
    'overlapping': ({'stride': (2, 2)}, PICTURE),
    'conv': ({'tokenizer': 'conv'}, PICTURE),
    'resnet': ({'tokenizer': 'resnet', 'resnet': (1, 1), 'patch_size': (8, 8)}, PICTURE),
    'cct': ({'tokenizer': 'cct'}, PICTURE),
    'spt': ({'tokenizer': 'spt', 'lsa': True}, PICTURE),
    'tubelets': ({'tokenizer': 'tubelets'}, {'video': ((4, 16, 16, 3), F32)}),
    'spectrogram': ({'patch_size': (16, 4), 'stride': (16, 2)}, {'image': ((16, 32, 1), F32)}),
    'words': (
        {'tokenizer': 'words', 'vocab': 11},
        {'tokens': ((9,), np.dtype(np.int32)), 'text_mask': ((9,), np.dtype(np.uint8))},
    ),
    'ragged': (
        {'tokenizer': 'ragged'},
        {
            'patches': ((12, 48), F32),
            **{n: ((12, *more), np.dtype(np.int32))
               for n, more in (('segment', ()), ('place', (2,)), ('grid', (2,)))},
        },
    ),
}  # fmt: skip
BOTH = {**PICTURE, **INPUTS['words'][1]}
for fusion in ('concat', 'cross', 'latents'):
    streams = (
        Stream('look', patch_size=(4, 4), depth=1),
        Stream('read', tokenizer='words', vocab=11, posemb='learned'),
    )
    INPUTS[fusion] = ({'streams': streams, 'fusion': fusion, 'latents': 5}, BOTH)
POOLS = ('gap', 'cls', 'map', 'seq', 'cls_gap', 'cls_dist')
EXTRAS = {
    'gap': {'posemb': 'learned', 'mlp': 'swiglu', 'layer_scale': 0.1},
    'cls': {'registers': 2, 'norm': 'rmsnorm', 'qk_norm': True},
    'map': {'parallel': True, 'head_dim': 8, 'lora': 3},
    'seq': {'qkv_bias': False, 'norm_after_pool': True},
    'cls_gap': {'representation': 6, 'norm_after_pool': True},
    'cls_dist': {'registers': 1, 'pre_norm': True, 'head_bias': False},
}


def combined(name, pooling, **more):
    fields, inputs = INPUTS[name]
    extras = dict(EXTRAS[pooling])
    if name == 'ragged' or 'streams' in fields:
        extras.pop('posemb', None)
    return model(**{'depth': 2, **fields, **extras, 'pool': pooling, **more}), inputs


def operations(jaxpr):
    """Of all matrix products and convolutions of a trace, loops multiplied."""
    total = 0
    for equation in jaxpr.eqns:
        kind = equation.primitive.name
        if kind == 'dot_general':
            (contract, _), _ = equation.params['dimension_numbers']
            inner = [equation.invars[0].aval.shape[axis] for axis in contract]
            total += 2 * int(np.prod(inner)) * equation.outvars[0].aval.size
        if kind == 'conv_general_dilated':
            kernel = equation.invars[1].aval.shape
            total += 2 * int(np.prod(kernel[:3])) * equation.outvars[0].aval.size
        for inside in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')
        ):
            if hasattr(inside, 'eqns'):
                times = equation.params['length'] if kind == 'scan' else 1
                total += times * operations(inside)
    return total


def example(inputs, batch=1):
    return {
        name: jax.ShapeDtypeStruct((batch, *shape), dtype)
        for name, (shape, dtype) in inputs.items()
    }
