"""The optimizer side of DINO and DINOv2 against their own code, run in float64 by torch."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gate import mostly_slow

from big_vit import config, sharding, trees
from big_vit.build import optimizer as build
from big_vit.models import encoder
from big_vit.optim import per_layer

ORACLE = Path(__file__).parents[1] / 'oracles/self_supervised.npz'
WIDTH, HEADS, STEPS = 16, 2, 20
SOURCE = SimpleNamespace(length=40)
BASE = {
    'batch_size': 8,
    'total_epochs': 4,
    'image_size': 8,
    'lr': 3e-3,
    'model.variant': 'mu/4',
    'data.name': 'digits',
    'schedule.name': 'cosine_dino',
    'schedule.end': 1e-6 / 3e-3,
    'optim.weight_decay': 0.04,
    'optim.weight_decay_end': 0.4,
    'optim.clip': 3.0,
    'optim.weight_decay_rules': (
        ('.*/prototypes/.*', 1.0),
        ('.*/(bias|scale)', 0.0),
        ('.*', 1.0),
    ),
}
RECIPES = {
    'dino': BASE
    | {
        'schedule.warmup_epochs': 2,
        'optim.clip_by': 'tensor',
        'optim.freeze_epochs': (('dino_head/prototypes/.*', 1), ('.*', 0)),
        'optim.freeze_by': 'gradient',
    },
    'dinov2': BASE
    | {
        'schedule.warmup_steps': 6,
        'optim.clip_by': 'module',
        'optim.freeze_steps': (('.*/prototypes/.*', 4), ('.*', 0)),
        'optim.layer_decay': 0.7,
        'optim.lr_rules': (('embedding/.*', 0.2), ('.*', 1.0)),
    },
}
ADDITIONS = ('dino_head', 'ibot_head', 'mask_token')


@functools.cache
def oracle():
    with np.load(ORACLE) as file:
        return json.loads(str(file['header'])), {n: file[n] for n in file.files if n != 'header'}


def renamed(tensors):
    """Tensors of torch under our paths, unrolled; kernels have their inputs first."""
    found = {}
    for name, x in tensors.items():
        module, _, rest = name.partition('.')
        module = {'backbone': '', 'head': 'dino_head/'}.get(module, f'{module}/')
        x = x.T if x.ndim == 2 and not rest.endswith(('weight_g', 'mask_token')) else x
        kind = 'kernel' if x.ndim > 1 else 'scale'
        if rest.startswith('blocks.'):
            _, number, part, *last = rest.split('.')
            inner = {'norm1': 'LayerNorm_0', 'norm2': 'LayerNorm_1'}.get(part)
            inner = inner or {'ls1': 'LayerScale_0', 'ls2': 'LayerScale_1'}.get(part)
            inner = inner or {'fc1': 'MlpBlock_0/Dense_0', 'fc2': 'MlpBlock_0/Dense_1'}.get(last[0])
            kind = 'bias' if last[-1] == 'bias' else kind
            at = f'Transformer/encoderblock_{number}'
            if last[0] == 'qkv':
                for i, projection in enumerate(('query', 'key', 'value')):
                    y = x.reshape(*x.shape[:-1], 3, HEADS, -1)[..., i, :, :]
                    found[f'{at}/MultiHeadDotProductAttention_0/{projection}/{kind}'] = y
            elif last[0] == 'proj':
                y = x.reshape(HEADS, -1, WIDTH) if kind == 'kernel' else x
                found[f'{at}/MultiHeadDotProductAttention_0/out/{kind}'] = y
            else:
                found[f'{at}/{inner}/{kind}'] = x
        else:
            path = {
                'cls_token': 'cls',
                'pos_embed': 'pos_embedding',
                'register_tokens': 'registers',
                'mask_token': 'mask_token',
                'patch_embed.proj.weight': 'embedding/kernel',
                'patch_embed.proj.bias': 'embedding/bias',
                'norm.weight': 'Transformer/encoder_norm/scale',
                'norm.bias': 'Transformer/encoder_norm/bias',
                'mlp.0.weight': 'mlp/kernel',
                'mlp.0.bias': 'mlp/bias',
                'last_layer.weight_g': 'prototypes/scale',
                'last_layer.weight_v': 'prototypes/kernel',
            }[rest]
            found[module + path] = x.transpose(2, 3, 1, 0) if x.ndim == 4 else x
    return found


def given(shapes):
    return {
        n: np.random.default_rng([1, i]).standard_normal(s) * 0.5
        for i, (n, s) in enumerate(shapes.items())
    }


def gradient(shapes, step):
    scale = (1.0, 0.1)[step // 2 % 2]
    return {
        n: np.random.default_rng([2, i, step]).standard_normal(s)
        * ((0.02, 0.5)[(step + i) % 2] * scale)
        for i, (n, s) in enumerate(shapes.items())
    }


def form(tensors, scanned, dtype):
    tree = trees.unflatten(renamed(tensors))
    tree = encoder.stack_blocks(tree) if scanned else tree
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


@pytest.fixture(autouse=True)
def heads(monkeypatch):
    monkeypatch.setattr(build, 'build_task', lambda section: SimpleNamespace(additions=ADDITIONS))


def made(recipe, shapes, **keys):
    settings = config.resolve(RECIPES[recipe] | keys)
    schedule = build.rate_schedule(settings, SOURCE, STEPS)
    length = build.Length(SOURCE, STEPS)
    return build.build_optimizer(settings, shapes, schedule, sharding.make_mesh(), length)


def trained(recipe, scanned=True, dtype='float32', **keys):
    """Our parameters, unrolled, by the steps that the oracle has, and where they started."""
    header, arrays = oracle()
    shapes = header[recipe]['shapes']
    start = params = form(given(shapes), scanned, dtype)
    optimizer = made(recipe, jax.eval_shape(lambda: params), **keys).transform
    state = optimizer.init(params)

    @jax.jit
    def update(params, state, gradients, step):
        updates, state = optimizer.update(gradients, state, params, step=step)
        return jax.tree.map(jnp.add, params, updates), state

    found = {}
    steps = {int(name.split('/')[1]) for name in arrays if name.startswith(f'{recipe}/')}
    for step in range(STEPS):
        gradients = form(gradient(shapes, step), scanned, dtype)
        params, state = update(params, state, gradients, jnp.int32(step))
        if step + 1 in steps:
            found[step + 1] = unrolled(params, scanned)
    return found, unrolled(start, scanned)


def unrolled(params, scanned):
    return trees.flatten(encoder.unstack_blocks(params) if scanned else params)


def errors(recipe, found, start, of_size=False):
    """Largest error of each parameter over the steps, relative to how far it has come.

    Or relative to its size: rounding to float32 is.
    """
    _, arrays = oracle()
    worst = {}
    for step, params in found.items():
        prefix = f'{recipe}/{step}/'
        wanted = renamed({n.removeprefix(prefix): x for n, x in arrays.items() if prefix in n})
        assert wanted.keys() == params.keys()
        for n, x in wanted.items():
            scale = np.abs(x if of_size else x - start[n]).max() or 1.0
            error = np.abs(np.asarray(params[n], np.float64) - x).max() / scale
            worst[n] = max(worst.get(n, 0.0), error)
    return worst


@pytest.mark.parametrize('recipe', RECIPES)
@pytest.mark.parametrize(
    'scanned, dtype, limit',
    mostly_slow(
        [(True, 'float32', 1e-6), (False, 'float32', 1e-6), (True, 'float64', 1e-6)],
        (True, 'float32', 1e-6),
    ),
)
def test_twenty_steps_are_those_of_the_reference(recipe, scanned, dtype, limit):
    with jax.enable_x64(dtype == 'float64'):
        worst = errors(recipe, *trained(recipe, scanned, dtype), of_size=dtype == 'float32')
    assert max(worst.values()) < limit, worst


WRONG = {
    'dino': [
        {'schedule.name': 'cosine'},
        {'schedule.name': 'cosine_ijepa'},
        {'optim.weight_decay_end': None},
        {'optim.clip_by': 'global'},
        {'optim.clip_by': 'module'},
        {'optim.clip': 0.0, 'optim.clip_by': None},
        {'optim.freeze_by': 'rate'},
        {'optim.freeze_epochs': None, 'optim.freeze_by': None},
        {'optim.freeze_epochs': (('dino_head/.*', 1), ('.*', 0))},
        {'optim.weight_decay_rules': (('.*/kernel', 1.0), ('.*', 0.0))},
    ],
    'dinov2': [
        {'optim.clip_by': 'tensor'},
        {'optim.clip_by': 'global'},
        {'optim.freeze_by': 'gradient'},
        {'optim.freeze_steps': (('.*/prototypes/.*', 5), ('.*', 0))},
        {'optim.weight_decay_end': 0.2},
        {'optim.lr_rules': (('.*', 1.0),)},
        {'optim.layer_decay': 0.75},
        {'optim.weight_decay_rules': (('.*/(bias|scale)', 0.0), ('.*', 1.0))},
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize('recipe, wrong', [(r, w) for r, all_ in WRONG.items() for w in all_])
def test_each_law_shows(recipe, wrong):
    worst = errors(recipe, *trained(recipe, **wrong))
    assert max(worst.values()) > 1e-3, wrong


def test_groups_are_those_of_the_references():
    header, _ = oracle()
    shapes = header['dinov2']['shapes']
    tree = form(given(shapes), False, 'float32')
    found = made('dinov2', tree)
    multipliers = header['dinov2']['multipliers']
    wanted = renamed({n: np.full(s, multipliers[n][0]) for n, s in shapes.items()})
    for name, factor in found.rate.items():
        assert factor == pytest.approx(wanted[name].flat[0], rel=1e-12), name
    wanted = renamed({n: np.full(s, multipliers[n][1]) for n, s in shapes.items()})
    assert found.decay == {name: wanted[name].flat[0] for name in found.decay}
    wanted = renamed({n: np.full(s, multipliers[n][2]) for n, s in shapes.items()})
    assert found.start == {name: 4 for name in found.rate if wanted[name].flat[0]}
    shapes = header['dino']['shapes']
    undecayed = renamed({n: np.zeros(shapes[n]) for n in header['dino']['undecayed']})
    found = made('dino', form(given(shapes), False, 'float32'))
    assert {name for name, factor in found.decay.items() if not factor} == set(undecayed)


def test_what_a_task_adds_is_after_the_last_layer_whatever_is_in_it():
    names = ['decoder/Transformer/encoderblock/x', 'mask_token', 'Transformer/encoderblock/x']
    names += ['decoder/embedding/kernel', 'pos_embedding', 'audio/Transformer/encoderblock/x']
    tree = trees.unflatten({n: jnp.zeros((3, 2)) for n in names})
    found = per_layer.decay_factors(0.5, tree, ('decoder', 'mask_token'))
    assert found['decoder/Transformer/encoderblock/x'] == found['decoder/embedding/kernel'] == 1
    assert found['mask_token'] == found['pos_embedding'] == 0.5**4
    assert found['Transformer/encoderblock/x'] == (0.125, 0.25, 0.5)
    assert found['audio/Transformer/encoderblock/x'] == (0.5**4,) * 3
