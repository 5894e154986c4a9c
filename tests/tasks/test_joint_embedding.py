"""Joint embedding: losses in float64, LeJEPA's recorded steps, meshes, and what is refused."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from commands import run, run_many
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


def losses_of(settings, changes, count=3, devices=None):
    """Losses of some steps on the same bytes, and the last parameters."""
    settings = config.resolve({**settings, **changes})
    parts = build_experiment(settings, devices)
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
    # What is before BatchNorm has biases without gradient, of whose rounding Adam makes steps.
    plain = {'optim.name': 'sgd', 'lr': 0.1}
    one, alone = losses_of(settings, plain, devices=jax.devices()[:1])
    many, shared = losses_of(settings, {**plain, **mesh})
    np.testing.assert_allclose(many, one, rtol=2e-5)
    assert one[-1] != one[0]
    for part in ('params', 'ema') if 'ema' in alone else ('params',):
        ours, theirs = (trees.flatten(found[part]) for found in (shared, alone))
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, atol=3e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize('settings', [IJEPA, LEJEPA], ids=['ijepa', 'lejepa'])
@pytest.mark.parametrize(
    'changes',
    [
        {'optim.sam_rho': 0.05},
        {'optim.name': 'muon'},
        {'optim.name': 'shampoo'},
        {'model.drop_path': 0.2, 'model.scan': False},
        {'model.remat': 'full'},
    ],
    ids=str,
)
def test_optimizers_and_sam_learn(settings, changes):
    losses, found = losses_of(settings, changes, count=6)
    assert np.isfinite(losses).all() and int(found['skipped']) == 0
    if settings is LEJEPA:  # The same batches for ever would be better; a falling loss will do.
        assert losses[-1] < losses[0]


@pytest.mark.slow
def test_learned_positions_of_small_views_are_those_of_the_global_ones_interpolated():
    """All views of a table with equal rows look alike to the trunk, whatever their grid is."""
    settings = {**LEJEPA, 'model.posemb': 'learned'}
    parts = build_experiment(config.resolve(settings), jax.devices()[:1])
    model = parts.model
    shapes = {name: (1, *shape) for name, (shape, _) in parts.data.inputs.items()}
    views = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    params = model.init(jax.random.key(0), views)['params']
    assert params['pos_embedding'].shape == (1, 64, 32)
    row = jax.random.normal(jax.random.key(1), (1, 1, 32))
    flat = jnp.broadcast_to(row, params['pos_embedding'].shape)
    with_table = {'params': {**params, 'pos_embedding': flat}}
    z = model.apply(with_table, views)
    # BatchNorm of equal rows makes a hundredth of their rounding.
    assert np.abs(z[:, 2:] - z[:, :1]).max() < 0.1
    # A table with other rows is another one for a smaller grid.
    z = model.apply({'params': params}, views)
    assert np.abs(z[:, 2:] - z[:, :1]).max() > 0.3


@pytest.mark.slow
def test_accumulation_is_the_whole_batch():
    first = jax.devices()[:1]
    whole, alone = losses_of(IJEPA, {}, 2, first)
    parts, shared = losses_of(IJEPA, {'accumulation': 4}, 2, first)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    for name, value in trees.flatten(alone['ema']).items():
        np.testing.assert_allclose(trees.flatten(shared['ema'])[name], value, atol=1e-5)


def test_the_teacher_is_what_is_evaluated_and_carries_the_trunk():
    parts = build_experiment(config.resolve(IJEPA))
    assert set(parts.abstract_state) >= {'params', 'ema'}
    assert parts.task.trunk(parts.model) is parts.model.trunk
    names = {name.partition('/')[0] for name in trees.flatten(parts.abstract_state['params'])}
    assert names == {'Transformer', 'embedding', 'predictor'}
    # 0.996 at first and 1 at the end, as 1 less it.
    rates = [float(parts.task.teacher_rate(jnp.asarray(step), 10)) for step in (0, 5, 10)]
    np.testing.assert_allclose(rates, [0.004, 0.002, 0], atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize('settings', [IJEPA, LEJEPA], ids=['ijepa', 'lejepa'])
def test_a_run_resumes_bit_identically_and_its_trunk_goes_on(tmp_path, settings):
    """From a checkpoint in the middle, which is what a killed run has."""
    spec = tmp_path / 'config.py'
    spec.write_text(
        'from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict()\n'
    )
    options = flags({key: str(value) for key, value in settings.items()})
    full, half = tmp_path / 'full', tmp_path / 'half'
    result = run('train', '--config', spec, *options, '--workdir', full)
    assert result.returncode == 0, result.stderr
    (half / 'checkpoints').mkdir(parents=True)
    shutil.copy(full / 'config.json', half)
    shutil.copytree(full / 'checkpoints' / '3', half / 'checkpoints' / '3')
    assert run('train', '--config', spec, *options, '--workdir', half).returncode == 0
    jax.tree.map(
        np.testing.assert_array_equal,
        *(checkpoint.load_params(folder, 6)[0] for folder in (full, half)),
    )
    kept = ('loss', 'cosine', 'target_std') if settings is IJEPA else ('loss', 'sigreg')
    for name in kept:
        first, second = ([r[f'train/{name}'] for r in metrics.read(f)[-3:]] for f in (full, half))
        assert first == second
    moved = run(
        'transfer',
        *('--config', 'configs/transfer_digits.py', f'--config.init={half}'),
        *('--config.total_steps=2', '--config.batch_size=16', '--config.image_size=16'),
        *('--config.transfer.control=false', '--config.transfer.random_features=false'),
        *('--workdir', tmp_path / 'moved'),
    )
    assert moved.returncode == 0, moved.stderr
    left = 'predictor' if settings is IJEPA else 'projector'
    assert f"learnt task 'joint_embedding': its trunk goes on, left is {left}" in moved.stdout


@pytest.mark.slow
@pytest.mark.parametrize('settings', [IJEPA, LEJEPA], ids=['ijepa', 'lejepa'])
def test_two_processes_compute_what_one_does(tmp_path, settings):
    spec = tmp_path / 'config.py'
    spec.write_text(
        'from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict()\n'
    )
    given = {**settings, 'mesh.replica': 4, 'optim.name': 'sgd', 'lr': 0.1}
    options = flags({key: str(value) for key, value in given.items()})
    one, two = tmp_path / 'one', tmp_path / 'two'
    assert run('train', '--config', spec, *options, '--workdir', one, devices=4).returncode == 0
    results = run_many('train', '--config', spec, *options, '--workdir', two)
    assert all(result.returncode == 0 for result in results), results[0].stderr
    first, second = ([r['train/loss'] for r in metrics.read(folder)] for folder in (one, two))
    np.testing.assert_allclose(first, second, rtol=1e-5)


@pytest.mark.parametrize(
    ('settings', 'changes', 'words'),
    [
        (IJEPA, {'model.pool': 'cls'}, "set model.pool='gap'"),
        (IJEPA, {'model.class_token': True}, 'without model.class_token'),
        (IJEPA, {'model.patch_dropout': 0.5}, 'set no model.patch_dropout'),
        (IJEPA, {'model.posemb': 'relative'}, 'needs all tokens of a grid'),
        (IJEPA, {'model.stride': 1}, 'which do not overlap'),
        (IJEPA, {'image_size': 8}, 'set image_size to 16x16 or more'),
        (IJEPA, {'task.context_tokens': 40}, 'take at most 22'),
        (IJEPA, {'task.target_scale': (0.9, 1.0)}, 'may leave no context'),
        (IJEPA, {'task.predictor_width': 18}, 'task.predictor_width=18 must be divisible by 4'),
        (IJEPA, {'task.predictor_heads': 3}, 'by the 3 heads of the predictor'),
        (IJEPA, {'task.target_scale': (0.2, 0.1)}, 'a pair (least, greatest) of numbers'),
        (IJEPA, {'task.sigreg_weight': 0.1}, "is not read by task.method='ijepa'"),
        (IJEPA, {'data.transform': VIEWS}, 'gives views'),
        (IJEPA, {'ema': 0.99}, 'its teacher, which is what is evaluated'),
        (IJEPA, {'evals.test.type': 'classification'}, 'needs logits over classes'),
        (LEJEPA, {'task.target_blocks': 2}, "is not read by task.method='lejepa'"),
        (LEJEPA, {'accumulation': 2}, 'is of all examples of a batch together: set it to 1'),
        (LEJEPA, {'data.transform': 'resize(size)'}, 'learns from views named global'),
        (LEJEPA, {'model.posemb': 'relative'}, 'views have grids of 8x8 and 4x4 patches'),
        (
            LEJEPA,
            {'data.transform': 'decode ; global: rrc(size)'},
            'data.transform makes one: write',
        ),
        (LEJEPA, {'model.patch_dropout': 0.5}, 'set no model.patch_dropout'),
        (LEJEPA, {'data.transform': VIEWS.replace('rrc(8)', 'rrc(7)')}, "views 'local': 7x7"),
    ],
)
def test_bad_input_is_one_line(settings, changes, words):
    with pytest.raises(UserError, match='config: ') as error:
        made = config.resolve({**settings, **changes})
        build_train_step(made, build_experiment(made))
    assert words in str(error.value) and '\n' not in str(error.value)
