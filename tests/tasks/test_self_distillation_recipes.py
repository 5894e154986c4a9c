"""Twenty steps of DINO, iBOT and DINOv2 beside the references' modules, of equal weights and views.

And of a student of a larger frozen teacher, whose heads have other widths.
"""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vit import config, sharding, state, steps, trees
from big_vit.build.optimizer import Length, build_optimizer, rate_schedule
from big_vit.models.vit import make_vit
from big_vit.tasks import block_masks, prototypes
from big_vit.tasks.self_distillation import self_distillation, teacher_rate
from big_vit.tasks.task import ExampleShape, Run

STEPS, BATCH, LOCALS = 20, 6, 3
# Width, heads and blocks.
STUDENT, TEACHER = (24, 3, 2), (32, 4, 3)
SHAPES = {'global': (2, 16, 16, 3), 'local': (LOCALS, 8, 8, 3), 'image': (16, 16, 3)}
COMMON = dict(
    prototypes=48,
    bottleneck=12,
    head_width=32,
    teacher_temperature=(0.04, 0.07),
    temperature_warmup=0.3,
    momentum=(0.9, 1.0),
)
TASKS = {
    'dino_recipe': dict(patch_head='none', prototype_norm='fixed', koleo_weight=0.0),
    'ibot_recipe': dict(patch_head='shared', koleo_weight=0.0, patch_centre='all'),
    'dinov2_recipe': dict(patch_head='separate', centering='sinkhorn'),
    'dinov2_whole_recipe': dict(patch_head='shared'),
    'distilled_recipe': dict(patch_head='separate', centering='sinkhorn', teacher='there'),
}


def batch_of(step):
    rng = np.random.RandomState(100 + step)
    batch = {
        'global': rng.uniform(-1, 1, (BATCH, *SHAPES['global'])).astype(np.float32),
        'local': rng.uniform(-1, 1, (BATCH, *SHAPES['local'])).astype(np.float32),
    }
    rng = np.random.RandomState(500 + step)
    masks = np.zeros((BATCH * 2, 16), bool)
    for mask in masks:
        if rng.rand() < 0.6:
            mask[rng.permutation(16)[: rng.randint(1, 9)]] = True
    masks = masks.reshape(BATCH, 2, 16)
    masks[0, 0, :3] = True
    batch['drawn'] = {'masks': masks}
    return jax.tree.map(jnp.asarray, batch)


def initial(shapes):
    """Weights by the names of the reference, in the order of these."""
    arrays = {}
    for i, name in enumerate(sorted(shapes)):
        x = np.random.RandomState(i).standard_normal(shapes[name])
        if name.endswith('weight_g'):
            x = np.ones_like(x)
        elif (x.ndim == 1 and name.endswith('weight')) or 'gamma' in name:
            x = 1 + 0.1 * x
        else:
            x = (0.02 if x.ndim == 1 else 0.15) * x
        arrays[name] = x.astype(np.float32)
    return arrays


def ours(arrays, norm, sizes=STUDENT):
    """The reference's arrays as our parameters."""
    width, heads, depth = sizes

    def dense(name):
        return {'kernel': arrays[f'{name}.weight'].T, 'bias': arrays[f'{name}.bias']}

    def layer_norm(name):
        return {'scale': arrays[f'{name}.weight'], 'bias': arrays[f'{name}.bias']}

    def attention(name):
        split = (width, heads, width // heads)
        weights = np.split(arrays[f'{name}.qkv.weight'], 3)
        biases = np.split(arrays[f'{name}.qkv.bias'], 3)
        parts = {
            part: {'kernel': w.T.reshape(split), 'bias': b.reshape(split[1:])}
            for part, w, b in zip(('query', 'key', 'value'), weights, biases, strict=True)
        }
        out = dense(f'{name}.proj')
        return parts | {'out': {**out, 'kernel': out['kernel'].reshape(*split[1:], width)}}

    def block(i):
        name = f'backbone.blocks.{i}'
        made = {
            'LayerNorm_0': layer_norm(f'{name}.norm1'),
            'LayerNorm_1': layer_norm(f'{name}.norm2'),
            'MultiHeadDotProductAttention_0': attention(f'{name}.attn'),
            'MlpBlock_0': {
                'Dense_0': dense(f'{name}.mlp.fc1'),
                'Dense_1': dense(f'{name}.mlp.fc2'),
            },
        }
        for j in range(2):
            if f'{name}.ls{j + 1}.gamma' in arrays:
                made[f'LayerScale_{j}'] = {'scale': arrays[f'{name}.ls{j + 1}.gamma']}
        return made

    def head(name):
        last = f'{name}.last_layer.weight_v'
        prototypes = {'kernel': arrays[last].T}
        if norm == 'learned':
            prototypes['scale'] = arrays[f'{name}.last_layer.weight_g'][:, 0]
        layers = {f'mlp_{i}': dense(f'{name}.mlp.{2 * i}') for i in range(3)}
        return layers | {'prototypes': prototypes}

    blocks = [block(i) for i in range(depth)]
    projection = arrays['backbone.patch_embed.proj.weight']
    params = {
        'cls': arrays['backbone.cls_token'],
        'pos_embedding': arrays['backbone.pos_embed'],
        'embedding': {
            'kernel': projection.transpose(2, 3, 1, 0),
            'bias': arrays['backbone.patch_embed.proj.bias'],
        },
        'Transformer': {
            'encoderblock': jax.tree.map(lambda *leaves: np.stack(leaves), *blocks),
            'encoder_norm': layer_norm('backbone.norm'),
        },
    }
    if 'backbone.masked_embed' in arrays:
        params['mask_token'] = arrays['backbone.masked_embed'][None]
    if 'backbone.mask_token' in arrays:
        params['mask_token'] = arrays['backbone.mask_token'][None]
        params['registers'] = arrays['backbone.register_tokens']
    for theirs, name in (('head', 'dino_head'), ('dino_head',) * 2, ('ibot_head',) * 2):
        if f'{theirs}.mlp.0.weight' in arrays:
            params[name] = head(theirs)
    return params


def reference(name, kind):
    path = Path(__file__).parents[1] / 'oracles' / f'{name}.npz'
    with np.load(path) as file:
        numbers = {key: file[key] for key in file if key.startswith(f'{kind}/')}

    def part(which):
        start = f'{kind}/{which}/'
        return {key[len(start) :]: x for key, x in numbers.items() if key.startswith(start)}

    return {
        key.rpartition('/')[2]: numbers[f'{kind}/{key}'] for key in ('losses', 'lr', 'wd')
    }, part


# The length of prototypes decays, that of other scales does not.
LENGTHS = (('.*prototypes/scale', 1.0), ('.*(bias|scale)', 0.0), ('.*', 1.0))
OPTIMIZERS = {
    'dino_recipe': {'optim.weight_decay_rules': LENGTHS[1:]},
    'ibot_recipe': {'optim.weight_decay_rules': LENGTHS},
    'dinov2_recipe': {
        'optim.weight_decay_rules': LENGTHS,
        'optim.layer_decay': 0.9,
        'optim.lr_rules': (('embedding/.*', 0.2), ('.*', 1.0)),
    },
}
LAWS = {
    'dino_recipe': {
        'optim.clip': 0.3,
        'optim.clip_by': 'tensor',
        'optim.freeze_steps': (('dino_head/prototypes/.*', 2), ('.*', 0)),
        'optim.freeze_by': 'gradient',
    },
    'dinov2_whole_recipe': {
        'optim.clip': 0.5,
        'optim.clip_by': 'module',
        'optim.freeze_steps': (('dino_head/prototypes/.*', 2), ('.*', 0)),
    },
}


def settings_of(name, kind):
    """The config of a run, as far as it decides the optimizer."""
    settings = {
        'task.name': 'self_distillation',
        'model.variant': 'mu/2',
        'image_size': 8,
        'batch_size': BATCH,
        'total_steps': STEPS,
        'data.name': 'digits',
        'data.split': 'train',
        'optim.name': 'adamw',
        'optim.weight_decay': 0.04,
        'optim.clip': 0.0,
        'lr': 2e-3,
        'schedule.name': 'cosine_dino',
        'schedule.warmup_steps': 4,
        'schedule.end': 1e-6 / 2e-3,
        **OPTIMIZERS.get(name, OPTIMIZERS['dinov2_recipe']),
    }
    if kind == 'whole':
        settings |= {'optim.weight_decay_end': 0.4, **LAWS[name]}
    return config.resolve(settings)


def trunk(name, sizes):
    width, heads, depth = sizes
    settings = dict(patch_size=(4, 4), width=width, depth=depth, mlp_dim=2 * width)
    settings |= dict(dtype=jnp.float32, activation='gelu', pool='cls', posemb='learned')
    settings |= dict(posemb_prefix=1, num_heads=heads)
    if name not in ('dino_recipe', 'ibot_recipe'):
        settings |= dict(layer_scale=1e-5, registers=2)
    return make_vit(0, **settings)


def frozen(name, shapes):
    """A larger teacher, whose rows are wider, and its parameters."""
    wider = dict(bottleneck=16, head_width=40, patch_head='separate')
    model = self_distillation(**{**COMMON, **wider}).model(
        trunk(name, TEACHER), ExampleShape(SHAPES, 0)
    )
    return model, jax.tree.map(jnp.asarray, ours(initial(shapes), 'learned', TEACHER))


def trained(name, kind, options, change=lambda task: task, count=STEPS):
    numbers, part = reference(name, kind)
    norm = options.get('prototype_norm', 'learned')
    arrays = initial({key: x.shape for key, x in part('student').items()})
    # Any view may have half of its patches masked, so slots suffice.
    masks = dict(mask_ratios=(0.5, 0.5), mask_probability=1.0, mask_group=1)
    task = change(self_distillation(**{**COMMON, **options, **masks}))
    model = task.model(trunk(name, STUDENT), ExampleShape(SHAPES, 0))
    params = jax.tree.map(jnp.asarray, ours(arrays, norm))
    extra, teacher = {}, None
    if name == 'distilled_recipe':
        del params['mask_token']
        teacher, extra['teacher'] = frozen(name, part('shapes'))
    wanted = state.abstract_params(model, {n: (s, np.float32) for n, s in SHAPES.items()})
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), params, wanted)
    run, made = Run(STEPS, BATCH, teacher), settings_of(name, kind)
    source, mesh = SimpleNamespace(length=64), sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    schedule = rate_schedule(made, source, STEPS)
    np.testing.assert_allclose([schedule(i) for i in range(STEPS)], numbers['lr'], rtol=1e-5)
    optimizer = build_optimizer(made, params, schedule, mesh, Length(source, STEPS)).transform
    step = steps.update(
        task.loss(model, run),
        optimizer,
        schedule,
        mesh,
        after_update=task.after_update,
        teacher_rate=lambda step: task.teacher_rate(step, STEPS),
        targets=task.targets(model, run),
    )
    now, losses, step = state.from_params(params, optimizer, True, task.state), [], jax.jit(step)
    now |= extra
    for i in range(count):
        now, metrics = step(now, batch_of(i))
        losses.append(float(metrics['loss']))
    finals = {'params': ours(part('student'), norm), 'ema': ours(part('teacher'), norm)}
    jax.tree.map(np.testing.assert_array_equal, {name: now[name] for name in extra}, extra)
    # There is none in a distilled student, and no average of it in iBOT's teacher.
    for part in {'distilled_recipe': ('params', 'ema'), 'ibot_recipe': ('ema',)}.get(name, ()):
        finals[part].pop('mask_token', None)
    return np.array(losses), numbers['losses'][:count], now, finals


def distance(found, wanted):
    found, wanted = (trees.flatten(jax.device_get(tree)) for tree in (found, wanted))
    return {
        name: np.linalg.norm(found[name] - wanted[name]) / np.linalg.norm(wanted[name])
        for name in wanted
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'kind'),
    [
        ('dino_recipe', 'plain'),
        ('dino_recipe', 'whole'),
        ('ibot_recipe', 'plain'),
        ('dinov2_recipe', 'plain'),
        ('dinov2_whole_recipe', 'whole'),
        ('distilled_recipe', 'plain'),
    ],
)
def test_losses_and_parameters_are_those_of_the_reference(name, kind):
    """'whole' has a decay schedule, clipping and a frozen last layer in addition."""
    losses, wanted, now, finals = trained(name, kind, TASKS[name])
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    for part, tree in finals.items():
        # A softmax does not know the bias of keys: its gradient is rounding, which Adam enlarges.
        far = distance(now[part], tree)
        assert {k: x for k, x in far.items() if x > 1e-4 and 'key/bias' not in k} == {}


def own_views_too(targets, student):
    """DINO's loss with pairs of a view with itself."""
    wanted = jnp.broadcast_to(targets.sum(1, keepdims=True), student.shape)
    pairs = targets.shape[1] * student.shape[1]
    return prototypes.cross_entropy(wanted, student).sum() / (len(targets) * pairs)


def masked_views_only(targets, student, weight, views):
    """iBOT's loss over the views that have masked patches."""
    return (prototypes.cross_entropy(targets, student) * weight).sum() / weight.sum()


def swapped(x, index):
    return select(x[:, ::-1], index)


select = block_masks.selected
LAW = 'big_vit.tasks.self_distillation'
KNOBS = {
    'a momentum one step late': {'change': lambda task: task._replace(
        teacher_rate=lambda step, total: teacher_rate(step + 1, total, (0.9, 1.0)))},
    'no offset of positions': {'options': {'position_offset': 0.0}},
    'two iterations of Sinkhorn': {'patch': (f'{LAW}.prototypes.sinkhorn', partial(
        prototypes.sinkhorn, iterations=2))},
    'pairs of a view with itself': {'patch': (f'{LAW}.prototypes.views_loss', own_views_too)},
    'masked views only': {'patch': (f'{LAW}.prototypes.patches_loss', masked_views_only)},
    'patches of the other view': {'patch': (f'{LAW}.block_masks.selected', swapped)},
    'neighbours in threes': {'options': {'koleo_group': 3}},
    'a rising temperature without end': {'options': {'temperature_warmup': 0.35}},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('knob', KNOBS)
def test_a_wrong_knob_is_seen(knob, monkeypatch):
    wrong = KNOBS[knob]
    if 'patch' in wrong:
        monkeypatch.setattr(*wrong['patch'])
    options = TASKS['dinov2_recipe'] | wrong.get('options', {})
    change = wrong.get('change', lambda task: task)
    # The first steps hardly move, so a momentum needs some to be seen.
    losses, wanted, _, _ = trained('dinov2_recipe', 'plain', options, change, count=12)
    assert np.abs(losses / wanted - 1).max() > 1e-4
