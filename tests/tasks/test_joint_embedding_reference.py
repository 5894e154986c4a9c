"""I-JEPA against numbers of facebookresearch/ijepa: predictions, gradients and twenty steps."""

import functools
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gate import mostly_slow

from big_vit import config, sharding, state, steps, trees
from big_vit.build import optimizer as build
from big_vit.build.task import build_task
from big_vit.models.vit import make_vit
from big_vit.tasks import joint_embedding
from big_vit.tasks.block_targets import Blocks
from big_vit.tasks.task import ExampleShape

ORACLE = Path(__file__).parents[1] / 'oracles/ijepa.npz'
STEPS, BATCH, HEADS, DEPTH = 20, 4, 2, 2
SETTINGS = {
    'batch_size': BATCH,
    'total_steps': STEPS,
    'image_size': 32,
    'data.name': 'digits',
    'model.variant': 'mu/4',
    'task.name': 'joint_embedding',
    'task.predictor_width': 16,
    'task.predictor_depth': 2,
    'lr': 1e-3,
    'optim.clip': 0.0,
    'optim.weight_decay': 0.04,
    'optim.weight_decay_end': 0.4,
    'optim.weight_decay_rules': (('.*/(bias|scale)', 0.0), ('.*', 1.0)),
    'schedule.name': 'cosine_ijepa',
    'schedule.warmup_steps': 5,
    'schedule.start': 0.2,
    'schedule.end': 1e-3,
}


@functools.cache
def oracle():
    with np.load(ORACLE) as file:
        return {name: file[name] for name in file.files}


def start(seed, name, shape):
    """Initial values, as the recording made them of a name of theirs."""
    values = 0.1 * np.random.default_rng([seed, *name.encode()]).standard_normal(shape)
    return (values + ('norm' in name and name.endswith('weight'))).astype(np.float32)


def images(step):
    rng = np.random.default_rng([7, step])
    return rng.standard_normal((BATCH, 32, 32, 3)).astype(np.float32)


def encoder(arrays, front, blocks, norm):
    """Arrays of one of their transformers, of `arrays(name)`, under our names."""
    found = {}
    for i in range(DEPTH):
        theirs, ours = f'{blocks}.{i}', f'{front}Transformer/encoderblock_{i}'
        for number in (1, 2):
            found[f'{ours}/LayerNorm_{number - 1}/scale'] = arrays(f'{theirs}.norm{number}.weight')
            found[f'{ours}/LayerNorm_{number - 1}/bias'] = arrays(f'{theirs}.norm{number}.bias')
            dense = f'{ours}/MlpBlock_0/Dense_{number - 1}'
            found[f'{dense}/kernel'] = arrays(f'{theirs}.mlp.fc{number}.weight').T
            found[f'{dense}/bias'] = arrays(f'{theirs}.mlp.fc{number}.bias')
        attention = f'{ours}/MultiHeadDotProductAttention_0'
        weight, bias = arrays(f'{theirs}.attn.qkv.weight'), arrays(f'{theirs}.attn.qkv.bias')
        width = weight.shape[1]
        for number, name in enumerate(('query', 'key', 'value')):
            part = slice(number * width, (number + 1) * width)
            found[f'{attention}/{name}/kernel'] = weight[part].T.reshape(width, HEADS, -1)
            found[f'{attention}/{name}/bias'] = bias[part].reshape(HEADS, -1)
        out = arrays(f'{theirs}.attn.proj.weight').T
        found[f'{attention}/out/kernel'] = out.reshape(HEADS, -1, width)
        found[f'{attention}/out/bias'] = arrays(f'{theirs}.attn.proj.bias')
    found[f'{front}Transformer/encoder_norm/scale'] = arrays(f'{norm}.weight')
    found[f'{front}Transformer/encoder_norm/bias'] = arrays(f'{norm}.bias')
    return found


def trunk_of(arrays):
    return {
        'embedding/kernel': arrays('patch_embed.proj.weight').transpose(2, 3, 1, 0),
        'embedding/bias': arrays('patch_embed.proj.bias'),
        **encoder(arrays, '', 'blocks', 'norm'),
    }


def predictor_of(arrays):
    return {
        'predictor/embedding/kernel': arrays('predictor_embed.weight').T,
        'predictor/embedding/bias': arrays('predictor_embed.bias'),
        'predictor/mask_token': arrays('mask_token'),
        **encoder(arrays, 'predictor/', 'predictor_blocks', 'predictor_norm'),
        'predictor/prediction/kernel': arrays('predictor_proj.weight').T,
        'predictor/prediction/bias': arrays('predictor_proj.bias'),
    }


def recorded(front):
    return lambda name: oracle()[f'{front}/{name}']


def drawn(seed, front):
    return lambda name: start(seed, name, oracle()[f'{front}/{name}'].shape)


def experiment(total=STEPS):
    """The task, its model and its initial parameters."""
    task = build_task(config.resolve({**SETTINGS, 'total_steps': total}).task)
    trunk = make_vit(
        0, (4, 4), 24, DEPTH, 48, HEADS,
        posemb='sincos2d_mae', activation='gelu', dtype=jnp.float32, scan=False,
    )  # fmt: skip
    model = task.model(trunk, ExampleShape({'image': (32, 32, 3)}, 0))
    flat = {**trunk_of(drawn(0, 'encoder')), **predictor_of(drawn(1, 'predictor'))}
    params = jax.tree.map(jnp.asarray, trees.unflatten(flat))
    shapes = state.abstract_params(model, (32, 32, 3))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    return task, model, params


def blocks_of(model, step, place):
    """Their masks, in place of ours."""
    table = {name: jnp.asarray(oracle()[name].astype(np.int32)) for name in ('context', 'target')}
    real = jnp.arange(table['target'].shape[-1]) < jnp.asarray(oracle()['tokens'])[step]
    return Blocks(table['context'][step], table['target'][step], real)


def train_step(task, model, loss, mesh, params):
    settings = config.resolve(SETTINGS)
    length = build.Length(SimpleNamespace(length=64), STEPS, 0)
    schedule = build.rate_schedule(settings, length.source, STEPS)
    shapes = jax.eval_shape(lambda: params)
    made = build.build_optimizer(settings, shapes, schedule, mesh, length)
    update = steps.update(
        loss,
        made.transform,
        schedule,
        mesh,
        teacher_rate=lambda step: task.teacher_rate(step, STEPS),
        targets=joint_embedding.ijepa_targets(model),
    )
    return state.from_params(params, made.transform, True), jax.jit(update)


def run(count=STEPS):
    task, model, params = experiment()
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    loss = joint_embedding.ijepa_loss(model, blocks_of)
    found, step = train_step(task, model, loss, mesh, params)
    rows = []
    for i in range(count):
        found, metrics = step(found, {'image': jnp.asarray(images(i))})
        rows.append(jax.device_get(metrics))
    return found, rows


def apart(ours, theirs):
    """Norm of the difference of two flat trees by the norm of the second."""
    assert ours.keys() == theirs.keys()
    difference = sum(np.square(ours[n] - theirs[n]).sum(dtype=np.float64) for n in ours)
    return float(
        (difference / sum(np.square(x).sum(dtype=np.float64) for x in theirs.values())) ** 0.5
    )


def first_loss(loss=None, model=None, params=None, teacher=None):
    targets = joint_embedding.ijepa_targets(model)
    given = {'teacher': params if teacher is None else teacher}
    batch = {'image': jnp.asarray(images(0))}
    batch['targets'] = targets.rows(given, batch, jax.random.key(0), 0)
    return loss(params, given, batch, None, 0)[0]


def test_prediction_loss_and_gradients_are_theirs():
    _, model, params = experiment()
    loss = joint_embedding.ijepa_loss(model, blocks_of)
    blocks = blocks_of(model, 0, None)
    predicted = model.apply({'params': params}, jnp.asarray(images(0)), blocks)
    count = int(oracle()['tokens'][0])
    theirs = oracle()['prediction']
    np.testing.assert_allclose(predicted[:, :, :count], theirs, atol=1e-5 * np.abs(theirs).max())
    value, gradient = jax.jit(jax.value_and_grad(lambda p: first_loss(loss, model, p, params)))(
        params
    )
    assert float(value) == pytest.approx(oracle()['losses'][0], rel=1e-5)
    wanted = {
        **trunk_of(recorded('grad/encoder')),
        **predictor_of(recorded('grad/predictor')),
    }
    assert apart(trees.flatten(jax.device_get(gradient)), wanted) < 1e-5


@pytest.mark.slow
def test_twenty_steps_of_the_recipe_are_theirs():
    """Warmup, cosines of rate and decay, the teacher's average: all that moves parameters."""
    found, rows = run()
    losses = np.array([row['loss'] for row in rows], np.float64)
    np.testing.assert_allclose(losses, oracle()['losses'], rtol=1e-5)
    np.testing.assert_allclose([row['lr'] for row in rows], oracle()['lr'], rtol=1e-5)
    wanted = {**trunk_of(recorded('encoder')), **predictor_of(recorded('predictor'))}
    assert apart(trees.flatten(jax.device_get(found['params'])), wanted) < 1e-4
    teacher = trees.flatten(jax.device_get(found['ema']))
    teacher = {name: x for name, x in teacher.items() if not name.startswith('predictor/')}
    assert apart(teacher, trunk_of(recorded('teacher'))) < 1e-4


def without_norm(monkeypatch):
    monkeypatch.setattr(joint_embedding, 'normalised', lambda x: x)


def squares(monkeypatch):
    monkeypatch.setattr(joint_embedding, 'smooth_l1', lambda x: 0.5 * jnp.square(x))


def late_positions(monkeypatch):
    """Positions of the first places for whatever was selected."""
    select = joint_embedding.select_tokens

    def selected(tokens, index):
        table = jnp.asarray(joint_embedding.positions.sincos((8, 8), 24, 'sincos2d_mae'))
        kept = select(tokens._replace(x=tokens.x - table), index)
        return kept._replace(x=kept.x + table[:, : index.shape[1]])

    monkeypatch.setattr(joint_embedding, 'select_tokens', selected)


def one_position_for_all(monkeypatch):
    """Mask tokens that do not know where they are."""
    real = blocks_of

    def alike(*given):
        found = real(*given)
        return found._replace(target=jnp.zeros_like(found.target))

    monkeypatch.setitem(globals(), 'blocks_of', alike)


@pytest.mark.parametrize(
    'knob', mostly_slow([without_norm, squares, late_positions, one_position_for_all], squares)
)
def test_wrong_losses_are_told_apart(monkeypatch, knob):
    knob(monkeypatch)
    _, model, params = experiment()
    loss = joint_embedding.ijepa_loss(model, blocks_of)
    wrong = float(first_loss(loss, model, params, params))
    assert abs(wrong / oracle()['losses'][0] - 1) > 5e-5  # What is right is closer than 1e-5.


@pytest.mark.slow
def test_targets_are_the_teachers():
    _, model, params = experiment()
    loss = joint_embedding.ijepa_loss(model, blocks_of)
    other = jax.tree.map(lambda x: 1.1 * x, params)
    right = float(first_loss(loss, model, params, params))
    assert abs(float(first_loss(loss, model, params, other)) / right - 1) > 1e-3
    gradient = jax.grad(lambda t: first_loss(loss, model, params, t))
    targets = joint_embedding.ijepa_targets(model)
    assert targets.shared({}, {}, 0) == ()
    assert (
        np.abs(trees.flatten(gradient(params))['embedding/bias']).max() > 0
    )  # Stopped by `steps`.


@pytest.mark.slow
@pytest.mark.parametrize('knob', ['late', 'constant', 'undecayed token'])
def test_wrong_recipes_are_told_apart(monkeypatch, knob):
    """A teacher's rate one step off, one that is constant, and a mask token without decay."""
    settings = dict(SETTINGS)
    if knob == 'undecayed token':
        settings['optim.weight_decay_rules'] = (('.*/kernel', 1.0), ('.*', 0.0))
    monkeypatch.setitem(globals(), 'SETTINGS', settings)
    real = experiment

    def changed(*given):
        task, model, params = real(*given)
        rate = task.teacher_rate
        if knob == 'late':
            task = task._replace(teacher_rate=lambda step, total: rate(step + 1, total))
        if knob == 'constant':
            task = task._replace(teacher_rate=lambda step, total: rate(0, total))
        return task, model, params

    monkeypatch.setitem(globals(), 'experiment', changed)
    found, _ = run()
    teacher = trees.flatten(jax.device_get(found['ema']))
    teacher = {name: x for name, x in teacher.items() if not name.startswith('predictor/')}
    params = trees.flatten(jax.device_get(found['params']))
    wanted = {**trunk_of(recorded('encoder')), **predictor_of(recorded('predictor'))}
    if knob == 'undecayed token':
        name = 'predictor/mask_token'
        assert apart({name: params[name]}, {name: wanted[name]}) > 1e-3
    else:
        moved = trunk_of(recorded('teacher'))
        begun = trunk_of(drawn(0, 'encoder'))
        way = {name: moved[name] - begun[name] for name in moved}
        ours = {name: teacher[name] - begun[name] for name in moved}
        assert apart(ours, way) > 1e-2
