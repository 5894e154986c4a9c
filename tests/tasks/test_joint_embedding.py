"""Joint embedding: losses in float64, LeJEPA's recorded steps, meshes, and what is refused."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from commands import run
from gate import mostly_slow
from tiny import flags

from big_vit import checkpoint, config, metrics, state, trees
from big_vit.build.experiment import build_experiment
from big_vit.build.steps import build_train_step
from big_vit.errors import UserError
from big_vit.tasks import joint_embedding, lejepa, sigreg

ORACLE = Path(__file__).parents[1] / 'oracles/lejepa.npz'
SMALL = {
    'task.name': 'joint_embedding',
    'model.variant': 'mu/2',
    'model.dtype': 'float32',
    'image_size': 16,
    'batch_size': 16,
    'total_steps': 6,
    'checkpoint.every_steps': 3,
    'checkpoint.keep_last': 9,
    'log.every_steps': 1,
    'lr': 1e-3,
    'data.name': 'digits',
    'data.split': 'train[:64]',
    'schedule.name': 'constant',
}
IJEPA = {
    **SMALL,
    'task.predictor_width': 16,
    'task.predictor_depth': 1,
    'data.transform': 'resize(size)',
}
VIEWS = 'decode ; global: 2 * rrc(size, scale=(0.3, 1)) | flip_lr ; local: 2 * rrc(8)'
LEJEPA = {
    **SMALL,
    'task.method': 'lejepa',
    'task.projector_width': 16,
    'task.projection_dim': 8,
    'task.sigreg_directions': 32,
    'data.transform': VIEWS,
}


def oracle():
    with np.load(ORACLE) as file:
        return {name: file[name] for name in file.files}


def test_sigreg_and_invariance_in_float64():
    wanted = oracle()
    with jax.enable_x64(True):
        z, lines = jnp.asarray(wanted['embeddings']), jnp.asarray(wanted['directions'])

        def loss(z):
            apart, spread = lejepa.invariance(z, z.shape[1]), sigreg.sigreg(z, lines)
            return 0.98 * apart + 0.02 * spread, (apart, spread)

        (value, parts), gradient = jax.value_and_grad(loss, has_aux=True)(z)
        found = [float(x) for x in (*parts, value)]
    names = ('invariance', 'sigreg', 'loss')
    np.testing.assert_allclose(found, [wanted[name] for name in names], rtol=1e-10)
    np.testing.assert_allclose(gradient, wanted['gradient'], atol=1e-10)


def test_smooth_l1_and_the_norm_of_targets_in_float64():
    """Against their formulas; at 1 the two parts of the first meet."""
    rng = np.random.default_rng(0)
    x = 2 * rng.standard_normal((5, 7))
    with jax.enable_x64(True):
        found = np.asarray(joint_embedding.smooth_l1(jnp.asarray(x)))
        normal = np.asarray(joint_embedding.normalised(jnp.asarray(x)))
    size = np.abs(x)
    np.testing.assert_allclose(found, np.where(size < 1, size**2 / 2, size - 0.5), rtol=1e-12)
    centred = x - x.mean(1, keepdims=True)
    wanted = centred / np.sqrt(centred.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(normal, wanted, rtol=1e-10)


def test_normal_embeddings_have_the_statistic_of_normal_numbers():
    """Its mean is that of its weights times 1 - exp(-t²), whatever the number of examples."""
    t = np.linspace(0, 3, 17)
    expected = np.trapezoid(2 * np.exp(-(t**2) / 2) * (1 - np.exp(-(t**2))), t)
    lines = sigreg.directions(3, 16, 256)
    np.testing.assert_allclose(jnp.linalg.norm(lines, axis=0), 1, rtol=1e-5)
    values = [
        float(sigreg.sigreg(jax.random.normal(jax.random.key(i), (64, 4, 16)), lines))
        for i in range(8)
    ]
    assert np.mean(values) == pytest.approx(expected, rel=0.15)
    together = sigreg.sigreg(jnp.zeros((64, 4, 16)), lines)
    assert float(together) > 10 * expected


@pytest.mark.parametrize('leading', [1, 2])
def test_local_views_are_pulled_to_the_mean_of_the_global_ones(leading):
    z = np.random.default_rng(0).standard_normal((4, 5, 3))
    centre = z[:, :leading].mean(1, keepdims=True)
    found = float(lejepa.invariance(jnp.asarray(z), leading))
    assert found == pytest.approx(float(((z - centre) ** 2).mean()), rel=1e-5)


def test_twenty_steps_of_the_projector_are_theirs():
    """BatchNorm of all views together, and AdamW with decay of everything."""
    wanted = oracle()
    projector = lejepa.Projector(16, 8, jnp.float32, lejepa_gather)
    names = {'Dense_0': 0, 'BatchNorm_0': 1, 'Dense_1': 3, 'BatchNorm_1': 4, 'Dense_2': 6}

    def ours(front):
        tree = {}
        for name, number in names.items():
            weight, bias = (wanted[f'{front}/proj.{number}.{leaf}'] for leaf in ('weight', 'bias'))
            kernel = {'kernel': weight.T} if weight.ndim == 2 else {'scale': weight}
            tree[name] = {**kernel, 'bias': bias}
        return tree

    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), ours('start'))
    lines = jnp.asarray(wanted['directions'], jnp.float32)
    optimizer = optax.adamw(2e-3, weight_decay=5e-2)

    @jax.jit
    def step(params, opt, x):
        def loss(params):
            z = projector.apply({'params': params}, x)
            return 0.98 * lejepa.invariance(z, 3) + 0.02 * sigreg.sigreg(z, lines)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, opt = optimizer.update(gradient, opt, params)
        return optax.apply_updates(params, updates), opt, value

    opt, losses = optimizer.init(params), []
    for i in range(20):
        x = np.random.default_rng([5, i]).standard_normal((24, 3, 12)).astype(np.float32)
        params, opt, value = step(params, opt, jnp.asarray(x))
        losses.append(float(value))
    np.testing.assert_allclose(losses, wanted['losses'], rtol=1e-5)
    found, end = (trees.flatten(tree) for tree in (jax.device_get(params), ours('end')))
    for name, value in end.items():
        # A bias before BatchNorm has no gradient but rounding, which Adam makes large.
        if name not in ('Dense_0/bias', 'Dense_1/bias'):
            error = np.linalg.norm(found[name] - value) / np.linalg.norm(value)
            assert error < 1e-4, name


def lejepa_gather(name, product, x, kernel):
    return product(x, kernel)


def losses_of(settings, changes, count=3):
    """Losses of some steps on the same bytes, and the last parameters."""
    settings = config.resolve({**settings, **changes})
    parts = build_experiment(settings)
    rng = np.random.default_rng(0)
    batches = [
        {
            name: rng.integers(0, 256, (16, *shape), dtype=np.uint8)
            for name, (shape, _) in parts.data.example_spec.parts.items()
            if name != 'label'
        }
        for _ in range(count)
    ]
    found = state.create(
        parts.model, parts.data.inputs, parts.optimizer, settings.seed, parts.abstract_state,
        task_state=parts.task.state,
    )  # fmt: skip
    step, rows = build_train_step(settings, parts), []
    for batch in batches:
        found, row = step(found, batch)
        rows.append(float(jax.block_until_ready(row['loss'])))
    return rows, jax.device_get(found)


@pytest.mark.parametrize(
    'mesh',
    mostly_slow(
        [
            {'mesh.replica': 8},
            {'mesh.fsdp': 8, 'mesh.min_shard_size': 1},
            {'mesh.replica': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2, 'mesh.min_shard_size': 1},
        ],
    ),
)
@pytest.mark.parametrize('settings', [IJEPA, LEJEPA], ids=['ijepa', 'lejepa'])
def test_meshes_compute_the_same(settings, mesh):
    one, alone = losses_of(settings, {})
    many, shared = losses_of(settings, mesh)
    np.testing.assert_allclose(many, one, rtol=2e-5)
    average = 'ema' if 'ema' in alone else 'params'
    ours, theirs = (trees.flatten(found[average]) for found in (shared, alone))
    for name, value in theirs.items():
        # Biases before BatchNorm have no gradient, which Adam makes steps of any sign of.
        if 'projector/Dense' not in name or name.endswith('kernel'):
            np.testing.assert_allclose(ours[name], value, atol=3e-5, err_msg=name)
