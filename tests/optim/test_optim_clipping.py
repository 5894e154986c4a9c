"""Norms of parts of the gradient, against NumPy."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vit import sharding, trees
from big_vit.models import encoder
from big_vit.optim import clipping, factory

BLOCK = 'Transformer/encoderblock_{}/'
ATTENTION = BLOCK + 'MultiHeadDotProductAttention_0/'
SHAPES = {
    'cls': (1, 1, 8),
    'mask_token': (1, 8),
    'embedding/kernel': (2, 2, 3, 8),
    'dino_head/mlp/kernel': (8, 16),
    'dino_head/prototypes/kernel': (16, 32),
    'ibot_head/prototypes/kernel': (16, 32),
}
for number in range(3):
    SHAPES |= {ATTENTION.format(number) + f'{n}/kernel': (8, 2, 4) for n in ('query', 'key')}
    SHAPES |= {ATTENTION.format(number) + f'{n}/bias': (2, 4) for n in ('query', 'key')}
    SHAPES |= {BLOCK.format(number) + 'MlpBlock_0/Dense_0/kernel': (8, 16)}
ADDITIONS = ('dino_head', 'ibot_head', 'mask_token')
PARTS = {'tensor': clipping.tensor, 'module': clipping.module(ADDITIONS)}


def gradients(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        n: np.float32(rng.standard_normal(s) * rng.choice([0.01, 1.0]) * scale)
        for n, s in SHAPES.items()
    }


def part(by, name):
    """Who shares a norm with whom, from the words of the documentation."""
    if by == 'module':
        return name.split('/')[0] if name.split('/')[0] in ('dino_head', 'ibot_head') else 'trunk'
    return re.sub('(query|key|value)/', 'qkv/', name)


def clipped(by, flat, limit):
    norms = {}
    for name, g in flat.items():
        norms.setdefault(part(by, name), []).append(np.square(np.float64(g)).sum())
    norms = {key: math.sqrt(sum(squares)) for key, squares in norms.items()}
    assert any(norm > limit for norm in norms.values())
    return {n: np.float64(g) * min(1.0, limit / norms[part(by, n)]) for n, g in flat.items()}


@pytest.mark.parametrize('by', PARTS)
@pytest.mark.parametrize('scanned', [True, False])
@pytest.mark.parametrize('devices', [1, 8])
def test_each_part_has_a_norm_of_its_own(by, scanned, devices):
    flat = gradients()
    tree = trees.unflatten(flat)
    tree = encoder.stack_blocks(tree) if scanned else tree
    mesh = sharding.make_mesh(1, devices, 1, jax.devices()[:devices])
    tree = jax.device_put(tree, sharding.shardings_for(tree, mesh))
    clip = clipping.by_part(2.0, PARTS[by])
    found, _ = jax.jit(clip.update)(tree, clip.init(tree))
    found = encoder.unstack_blocks(jax.device_get(found)) if scanned else found
    wanted = clipped(by, flat, 2.0)
    for name, value in trees.flatten(found).items():
        np.testing.assert_allclose(value, wanted[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize('by', PARTS)
def test_a_short_gradient_and_none_at_all_stay_as_they_are(by):
    clip = clipping.by_part(2.0, PARTS[by])
    for flat in (gradients(scale=1e-3), {n: np.zeros(s, np.float32) for n, s in SHAPES.items()}):
        tree = encoder.stack_blocks(trees.unflatten(flat))
        found, _ = clip.update(tree, clip.init(tree))
        jax.tree.map(np.testing.assert_array_equal, found, tree)


def test_what_is_frozen_is_in_no_norm():
    flat = gradients()
    tree = trees.unflatten(flat)
    optimizer = factory.make(
        factory.sgd(0.0),
        lambda step: jnp.float32(1.0),
        decay_factors=dict.fromkeys(SHAPES, 0.0),
        lr_factors={n: 0.0 if n.startswith('embedding') else 1.0 for n in SHAPES},
        clip=2.0,
        clip_part=PARTS['module'],
    )
    updates, _ = optimizer.update(tree, optimizer.init(tree), tree, step=0)
    moving = {n: g for n, g in flat.items() if not n.startswith('embedding')}
    wanted = clipped('module', moving, 2.0)
    found = trees.flatten(updates)
    for name in moving:
        np.testing.assert_allclose(found[name], -wanted[name], rtol=1e-6, err_msg=name)
    assert not found['embedding/kernel'].any()
