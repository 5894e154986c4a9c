"""`masked` beside facebookresearch/mae: numbers that it gave are in tests/oracles/mae.npz."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from big_vit import config, interop, sharding, trees
from big_vit.build.experiment import build_experiment, fresh_state
from big_vit.build.steps import build_train_step
from big_vit.models.tokenizers import patchify
from big_vit.models.vit import make_vit
from big_vit.pretrained.load import with_learnt
from big_vit.tasks import masked
from big_vit.tasks.task import ExampleShape

ORACLE = Path(__file__).parent.parent / 'oracles' / 'mae.npz'
# Recipes share these; they are MAE's letter where the model's defaults are not.
RECIPE = config.load('configs/mae_b16_i1k.py', [])
# Their gradient is 0, whatever the rest is: what is there is rounding, which Adam enlarges.
WITHOUT_GRADIENT = ('/key/bias',)


@functools.cache
def oracle():
    with np.load(ORACLE) as file:
        arrays = dict(file)
    return json.loads(str(arrays.pop('header'))), arrays


def start():
    """(parameters by the reference's names, images, noise), as its run had them."""
    about, arrays = oracle()
    rng, params = np.random.default_rng(about['seed']), {}
    for name in sorted(n.removeprefix('after/') for n in arrays if n.startswith('after/')):
        x = rng.standard_normal(arrays[f'after/{name}'].shape)
        is_scale = 'norm' in name and name.endswith('weight')
        params[name] = np.float32(1 + 0.2 * x if is_scale else 0.5 * x)
    rng = np.random.default_rng(about['seed'] + 1)
    steps, batch, side = about['steps'], about['batch'], about['image']
    images = rng.standard_normal((steps, batch, side, side, 3)).astype(np.float32)
    return params, images, rng.random((steps, batch, (side // about['patch']) ** 2), np.float64)


def ours(params, folder):
    """The reference's arrays as ours, by the way that its files take."""
    from big_vit.models import positions

    about, _ = oracle()
    grid = (about['image'] // about['patch'],) * 2
    table = {
        name: np.pad(positions.sincos(grid, width, 'sincos2d_mae'), ((0, 0), (1, 0), (0, 0)))
        for name, width in (('pos_embed', 16), ('decoder_pos_embed', about['decoder']['width']))
    }
    save_file({**params, **table}, folder / 'mae.safetensors')
    read = interop.read(folder / 'mae.safetensors', settings={'num_heads': about['heads']})
    assert read.learnt.task == {
        'name': 'masked', 'decoder_width': 32, 'decoder_depth': 1, 'decoder_heads': 16,
    }  # fmt: skip
    flat = trees.flatten(with_learnt(read))
    del flat['pos_embedding']  # Fixed here.
    return trees.unflatten({name: jnp.asarray(leaf) for name, leaf in flat.items()})


def model_of(**changes):
    section = RECIPE.model
    settings = {
        name: section[name] for name in ('posemb', 'class_token', 'pool', 'activation', 'norm_eps')
    }
    trunk = make_vit(
        0, (4, 4), 16, 2, 64, 2, scan=False, dtype=jnp.float32, **{**settings, **changes}
    )
    task = masked.masked(decoder_width=32, decoder_depth=1, decoder_heads=16)
    return task.model(trunk, ExampleShape({'image': (16, 16, 3)}, 0))


@pytest.fixture
def noise(monkeypatch):
    """Sets the noise that decides what is hidden."""
    current = {}

    def drawn(key, batch, tokens):
        shape = jax.ShapeDtypeStruct((batch, tokens), jnp.float32)
        return jax.pure_callback(lambda: current['noise'], shape)

    monkeypatch.setattr(masked, 'mask_noise', drawn)
    return lambda values: current.update(noise=np.float32(values))


def value_and_gradient(model, params, image, normalise=True):
    loss = masked.masked_loss(model, normalise)
    with jax.default_matmul_precision('highest'):
        batch, key = {'image': jnp.asarray(image)}, jax.random.key(0)
        step = jax.jit(jax.value_and_grad(lambda p: loss(p, (), batch, key, 0)[0]))
        value, gradient = step(params)
    return float(value), trees.flatten(gradient)


def distance(a, b):
    return np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b)


def farthest(found, wanted):
    """The largest relative distance of arrays, and where."""
    names = [name for name in wanted if not name.endswith(WITHOUT_GRADIENT)]
    assert found.keys() == wanted.keys()
    return max((distance(found[name], wanted[name]), name) for name in names)


@pytest.mark.slow
def test_loss_prediction_and_gradients_are_the_references(tmp_path, noise):
    about, arrays = oracle()
    params, images, drawn = start()
    noise(drawn[0])
    (tmp_path / 'g').mkdir()
    mine = ours(params, tmp_path)
    gradients = {n.removeprefix('grad/'): x for n, x in arrays.items() if n.startswith('grad/')}
    wanted = trees.flatten(ours(gradients, tmp_path / 'g'))
    model = model_of()
    value, gradient = value_and_gradient(model, mine, images[0])
    assert value == pytest.approx(float(arrays['loss_f64']), rel=1e-5)
    assert farthest(gradient, wanted)[0] < 1e-5
    for knob, wrong in about['wrong'].items():
        least = 2e-6 if knob == 'tanh GELU' else 1e-4  # That one is told by the gradients.
        assert abs(wrong / value - 1) > least, knob
    with jax.default_matmul_precision('highest'):
        rngs = {'mask': jax.random.key(0)}
        predicted, hidden = model.apply({'params': mine}, jnp.asarray(images[0]), rngs=rngs)
    np.testing.assert_array_equal(hidden, arrays['mask'])
    np.testing.assert_allclose(predicted, arrays['pred'], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    'wrong', [dict(activation='gelu_tanh'), dict(norm_eps=1e-5), dict(posemb='sincos2d')]
)
def test_a_knob_of_the_model_is_told_by_the_gradients(wrong, tmp_path, noise):
    _, arrays = oracle()
    params, images, drawn = start()
    noise(drawn[0])
    (tmp_path / 'g').mkdir()
    gradients = {n.removeprefix('grad/'): x for n, x in arrays.items() if n.startswith('grad/')}
    wanted = trees.flatten(ours(gradients, tmp_path / 'g'))
    _, gradient = value_and_gradient(model_of(**wrong), ours(params, tmp_path), images[0])
    assert farthest(gradient, wanted)[0] > 1e-5


def test_the_loss_alone_is_the_references_in_float64():
    _, arrays = oracle()
    _, images, _ = start()
    with jax.enable_x64():
        image, predicted = jnp.asarray(images[0], jnp.float64), jnp.asarray(arrays['pred'])
        hidden = np.asarray(arrays['mask']) > 0
        for normalise, wanted in ((True, 'loss_f64'), (False, 'pixels_f64')):
            targets = masked.pixel_targets(patchify(image, (4, 4)), normalise)[hidden]
            value = float(jnp.square(predicted[hidden] - targets).mean())
            assert value == pytest.approx(float(arrays[wanted]), rel=1e-10)


def recipe(**changes):
    """The recipe's optimizer, schedule and task, at the size of the reference's run."""
    about, _ = oracle()
    kept = {
        key: value
        for key, value in config.flatten(RECIPE.to_dict()).items()
        if RECIPE.sets(key) and key.startswith(('optim.', 'task.', 'model.', 'schedule.'))
    }
    del kept['schedule.warmup_epochs']
    sizes = dict(width=16, depth=2, mlp_dim=64, num_heads=2, dtype='float32', scan=False)
    decoder = {f'task.decoder_{key}': value for key, value in about['decoder'].items()}
    return config.resolve(
        {
            **kept,
            **{f'model.{key}': value for key, value in sizes.items()},
            'model.variant': 'mu/4',
            **decoder,
            'total_steps': about['steps'],
            'schedule.warmup_steps': about['warmup'],
            'batch_size': about['batch'],
            'image_size': about['image'],
            'lr': about['lr'],
            'data.name': 'digits',
            'data.transform': 'rgb | resize(size)',
            **changes,
        }
    )


def trained(settings, tmp_path, noise):
    """(losses, parameters after all steps) of the run that the reference made."""
    about, _ = oracle()
    params, images, drawn = start()
    parts = build_experiment(settings)
    step = build_train_step(settings, parts)
    state, losses = fresh_state(parts, 0, jax.tree.map(np.asarray, ours(params, tmp_path))), []
    with jax.default_matmul_precision('highest'):
        for t in range(about['steps']):
            noise(drawn[t])
            image = jax.device_put(images[t], sharding.batch_sharding(parts.mesh))
            state, metrics = step(state, {'image': image})
            losses.append(float(metrics['loss']))
    return np.array(losses), trees.flatten(jax.device_get(state['params']))


@pytest.mark.slow
def test_twenty_steps_of_the_recipe_are_the_references(tmp_path, noise):
    about, arrays = oracle()
    losses, params = trained(recipe(), tmp_path, noise)
    np.testing.assert_allclose(losses, arrays['losses_f64'], rtol=1e-5)
    after = {n.removeprefix('after/'): x for n, x in arrays.items() if n.startswith('after/')}
    (tmp_path / 'after').mkdir()
    apart, name = farthest(params, trees.flatten(ours(after, tmp_path / 'after')))
    assert apart < 1e-4, name
    # Tokens are decayed, as the reference does.
    assert distance(params['cls'], arrays['after_without/cls_token']) > 1e-3
    for knob, wrong in about['wrong_losses'].items():
        apart = np.abs(np.array(wrong) / losses - 1).max()
        assert apart > 3e-5, f'{knob} would not be told: {apart}'
