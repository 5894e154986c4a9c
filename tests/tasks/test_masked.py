"""Masked autoencoding: the loss against NumPy, what the encoder sees, and a run from end to end."""

import shutil
import signal
import time

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import error_line, run, run_many, start
from gate import mostly_slow
from tiny import flags

from big_vit import checkpoint, config, metrics, state, train, trees
from big_vit.build.experiment import build_experiment, loss_flops
from big_vit.build.steps import build_train_step
from big_vit.errors import UserError
from big_vit.models import tokenizers
from big_vit.models.vit import make_vit
from big_vit.tasks import masked
from big_vit.tasks.task import ExampleShape

SIZES = dict(patch_size=(4, 4), width=16, depth=2, mlp_dim=24, num_heads=2, dtype=jnp.float32)
OPTIONS = dict(mask_ratio=0.75, decoder_width=8, decoder_depth=1, decoder_heads=2)
IMAGE = (16, 24, 3)
DIGITS = {
    'task.name': 'masked',
    'task.decoder_width': 16,
    'task.decoder_depth': 1,
    'task.decoder_heads': 2,
    'model.variant': 'mu/2',
    'model.dtype': 'float32',
    'image_size': 8,
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


def model_of(**changes):
    trunk = make_vit(0, **{**SIZES, **changes})
    return masked.masked(**OPTIONS).model(trunk, ExampleShape({'image': IMAGE}, 0))


def initialised(model):
    params = model.init(jax.random.key(0), jnp.zeros((1, *IMAGE)))['params']
    rng = np.random.default_rng(0)
    # Biases and scales too, so that nothing is right by being zero.
    return jax.tree.map(lambda x: x + 0.02 * rng.standard_normal(x.shape).astype(x.dtype), params)


def images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *IMAGE), dtype=np.uint8)


def patches_of(image):
    """The pixels of each patch, by loops."""
    rows, columns = IMAGE[0] // 4, IMAGE[1] // 4
    cut = [
        image[:, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4].reshape(len(image), -1)
        for r in range(rows)
        for c in range(columns)
    ]
    return np.stack(cut, axis=1)


def shown(hidden):
    """Which pixels are visible, [batch, height, width, 1]."""
    grid = np.asarray(hidden).reshape(-1, IMAGE[0] // 4, IMAGE[1] // 4)
    return grid.repeat(4, 1).repeat(4, 2)[..., None] == 0


@pytest.mark.parametrize('normalise', mostly_slow([True, False], True))
def test_the_loss_is_that_of_numpy_on_hidden_patches(normalise):
    model = model_of()
    params = initialised(model)
    batch = {'image': jnp.asarray(images(5)), 'label': jnp.zeros(5, jnp.int32)}
    key = jax.random.key(3)
    value, aux = jax.jit(masked.masked_loss(model, normalise))(params, (), batch, key, 0)
    dropout, mask = jax.random.split(key)
    pixels = np.asarray(batch['image'], np.float64) * (2 / 255) - 1
    predicted, hidden = model.apply(
        {'params': params},
        jnp.asarray(pixels, jnp.float32),
        train=True,
        rngs={'dropout': dropout, 'mask': mask},
    )
    assert np.asarray(hidden).sum(1).tolist() == [18] * 5  # Three quarters of 24.
    wanted = patches_of(pixels)
    if normalise:
        mean = wanted.mean(-1, keepdims=True)
        wanted = (wanted - mean) / np.sqrt(wanted.var(-1, ddof=1, keepdims=True) + 1e-6)
    errors = ((np.asarray(predicted, np.float64) - wanted) ** 2).mean(-1)
    hidden = np.asarray(hidden, np.float64)
    assert float(value) == pytest.approx((errors * hidden).sum() / hidden.sum(), rel=1e-5)
    assert float(aux.metrics['hidden']) == pytest.approx(0.75)


def test_patches_are_cut_by_rows():
    image = np.arange(2 * np.prod(IMAGE)).reshape(2, *IMAGE).astype(np.float32)
    np.testing.assert_array_equal(
        tokenizers.patchify(jnp.asarray(image), (4, 4)), patches_of(image)
    )


@pytest.mark.parametrize(
    'prefix',
    mostly_slow(
        [{}, {'class_token': True, 'registers': 2}, {'posemb': 'rope', 'registers': 1}],
        {'class_token': True, 'registers': 2},
    ),
)
def test_predictions_see_visible_patches_alone(prefix):
    model = model_of(**prefix)
    params = initialised(model)
    image = images(3).astype(np.float32) / 127.5 - 1
    apply = jax.jit(lambda x: model.apply({'params': params}, x, rngs={'mask': jax.random.key(5)}))
    before, hidden = apply(jnp.asarray(image))
    noise = np.random.default_rng(1).standard_normal(image.shape).astype(np.float32)
    after, _ = apply(jnp.asarray(np.where(shown(hidden), image, noise)))
    np.testing.assert_array_equal(before, after)
    changed, _ = apply(jnp.asarray(np.where(shown(hidden), noise, image)))
    assert np.abs(changed - before).max() > 1e-3


def test_tokens_come_back_in_the_order_of_the_image():
    """With blocks that add nothing, what is predicted of a visible patch depends on it alone."""
    model = model_of()
    params = trees.map_with_name(
        lambda name, x: jnp.zeros_like(x) if '/out/' in name or 'Dense_1' in name else x,
        initialised(model),
    )
    image = images(1).astype(np.float32) / 127.5 - 1
    rngs = {'mask': jax.random.key(2)}
    before, hidden = model.apply({'params': params}, jnp.asarray(image), rngs=rngs)
    for patch in np.flatnonzero(np.asarray(hidden)[0] == 0):
        row, column = divmod(int(patch), 6)
        other = image.copy()
        other[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] *= -1
        after, _ = model.apply({'params': params}, jnp.asarray(other), rngs=rngs)
        moved = np.abs(np.asarray(after) - np.asarray(before))[0].max(-1) > 1e-6
        assert np.flatnonzero(moved).tolist() == [patch]


@pytest.mark.slow
@pytest.mark.parametrize('normalise', mostly_slow([True, False], True))
def test_pictures_have_predictions_where_patches_are_hidden(normalise):
    model = model_of()
    params = initialised(model)
    seen = images(3).astype(np.float32) / 127.5 - 1
    key = jax.random.key(4)
    made = jax.jit(masked.reconstructions(model, normalise))(params, jnp.asarray(seen), key)
    predicted, hidden = model.apply({'params': params}, jnp.asarray(seen), rngs={'mask': key})
    is_shown = np.broadcast_to(shown(hidden), seen.shape)
    blind, whole = (np.asarray(made[name]) for name in ('what it sees', 'reconstruction'))
    np.testing.assert_array_equal(np.isnan(blind), ~is_shown)
    np.testing.assert_array_equal(blind[is_shown], seen[is_shown])
    np.testing.assert_array_equal(whole[is_shown], seen[is_shown])
    for i, patch in np.argwhere(np.asarray(hidden) == 1):
        row, column = divmod(int(patch), 6)
        place = i, slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4)
        wanted, pixels = np.asarray(predicted, np.float64)[i, patch], seen[place]
        if normalise:
            wanted = wanted * np.sqrt(pixels.var(ddof=1, dtype=np.float64) + 1e-6) + pixels.mean()
        np.testing.assert_allclose(whole[place], wanted.reshape(4, 4, 3), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_batch_hides_the_same_however_it_is_cut():
    """Noise is drawn for all examples at once; by itself a loss would hide the same of them."""
    model = model_of()
    params, key = initialised(model), jax.random.key(3)
    batch = {'image': jnp.asarray(images(6))}
    drawn = masked.draw_masks(model)(batch, key)
    loss = jax.jit(masked.masked_loss(model))
    whole, _ = loss(params, (), batch, key, 0)
    assert float(whole) == float(loss(params, (), {**batch, 'drawn': drawn}, key, 0)[0])
    parts = [
        float(loss(params, (), jax.tree.map(lambda x, i=i: x[i::3], {**batch, 'drawn': drawn}),
                   jax.random.key(i), 0)[0])
        for i in range(3)
    ]  # fmt: skip
    assert np.mean(parts) == pytest.approx(float(whole), rel=1e-6)


def losses_of(changes, tmp_path):
    settings = config.resolve({**DIGITS, 'skip_sigmas': 0.0, **changes})
    train.run(settings, tmp_path)
    return [row['train/loss'] for row in metrics.read(tmp_path) if 'train/loss' in row]


@pytest.mark.slow
def test_meshes_and_accumulation_give_the_same_losses(tmp_path):
    sharded = {'mesh.min_shard_size': 0}
    wanted = losses_of({'mesh.fsdp': 1, 'mesh.replica': 8}, tmp_path / 'data')
    for name, changes in {
        'fsdp': {**sharded, 'mesh.fsdp': 8},
        '2d': {**sharded, 'mesh.fsdp': 4, 'mesh.tensor': 2, 'accumulation': 2},
        'accumulated': {'mesh.fsdp': 2, 'mesh.tensor': 4, 'accumulation': 8},
        'packed': {**sharded, 'mesh.fsdp': 4, 'mesh.replica': 2, 'model.pack': True},
    }.items():
        np.testing.assert_allclose(losses_of(changes, tmp_path / name), wanted, rtol=2e-5)
    alone = write_config(tmp_path)
    result = run(*alone, '--workdir', tmp_path / 'one', devices=1)
    assert result.returncode == 0, result.stderr
    first, second = run_many(*alone, '--workdir', tmp_path / 'two')
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    for name in ('one', 'two'):
        rows = metrics.read(tmp_path / name)
        found = [row['train/loss'] for row in rows if 'train/loss' in row]
        np.testing.assert_allclose(found, wanted, rtol=2e-5)


def write_config(folder):
    """The command that trains `DIGITS`."""
    spec = folder / 'config.py'
    spec.write_text(
        'from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict()\n'
    )
    options = flags({key: str(value) for key, value in {**DIGITS, 'skip_sigmas': 0}.items()})
    return ('train', '--config', spec, *options)


@pytest.mark.slow
@pytest.mark.parametrize(
    'changes',
    [
        {'ema': 0.9},
        {'optim.sam_rho': 0.05},
        {'optim.name': 'muon', 'accumulation': 2},
        {'optim.name': 'shampoo', 'optim.start': 2, 'optim.every': 2},
    ],
    ids=['ema', 'sam', 'muon', 'shampoo'],
)
def test_it_learns_with_each_of_these(changes, tmp_path):
    losses = losses_of({**changes, 'total_steps': 20}, tmp_path)
    assert np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


@pytest.mark.slow
def test_kill_9_and_restart_ends_bit_identical(tmp_path):
    short = ('--config.total_steps=120', '--config.checkpoint.every_steps=15')
    command = (*write_config(tmp_path), *short)
    whole = run(*command, '--workdir', tmp_path / 'whole')
    assert whole.returncode == 0, whole.stderr
    process = start(*command, '--workdir', tmp_path / 'killed')
    until, workdir = time.monotonic() + 240, tmp_path / 'killed'
    while time.monotonic() < until and process.poll() is None and not checkpoint.steps(workdir):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert metrics.read(workdir)[-1]['step'] < 120, 'killed too late to show anything'
    result = run(*command, '--workdir', workdir)
    assert result.returncode == 0 and 'resume' in result.stdout, result.stdout + result.stderr
    jax.tree.map(
        np.testing.assert_array_equal,
        *(checkpoint.load_params(tmp_path / name, 120)[0] for name in ('whole', 'killed')),
    )


def test_the_trunk_is_a_plain_one_and_flops_are_of_what_is_seen():
    model = model_of()
    inputs = {'image': (IMAGE, np.dtype(np.uint8))}
    params = state.abstract_params(model, inputs)
    plain = state.abstract_params(make_vit(0, **SIZES), inputs)
    trunk = {name: leaf for name, leaf in params.items() if name != 'decoder'}
    assert trees.flatten(trunk) == trees.flatten(plain)
    counted, _ = loss_flops(masked.masked(**OPTIONS), model, params, inputs, 2)
    # By hand: 6 patches of 48 numbers are projected and encoded, 24 decoded, 18 predicted.
    block = 2 * 6 * (4 * 16**2 + 2 * 16 * 24) + 4 * 6**2 * 16
    decoder = 2 * 24 * (4 * 8**2 + 2 * 8 * 32) + 4 * 24**2 * 8
    assert counted == (2 * 6 * 48 * 16 + 2 * block + 2 * 6 * 16 * 8 + decoder + 2 * 18 * 8 * 48)


@pytest.mark.slow
def test_a_run_resumes_bit_identically_and_its_trunk_goes_on(tmp_path):
    spec = tmp_path / 'config.py'
    spec.write_text(
        'from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict()\n'
    )
    options = flags({key: str(value) for key, value in DIGITS.items()})
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
    rows = metrics.read(full)
    assert rows[-1]['train/loss'] < rows[0]['train/loss']
    # To another task, and out.
    moved = run(
        'transfer',
        *('--config', 'configs/transfer_digits.py', f'--config.init={half}'),
        *('--config.total_steps=2', '--config.batch_size=16', '--config.image_size=8'),
        *('--config.transfer.control=false', '--config.transfer.random_features=false'),
        *('--workdir', tmp_path / 'moved'),
    )
    assert moved.returncode == 0, moved.stderr
    assert "learnt task 'masked': its trunk goes on, left is decoder" in moved.stdout
    drawn = run('explore', half, '--png', tmp_path / 'png')
    assert 'predictions.png' in drawn.stdout, drawn.stderr
    reported = run('report', half, '--out', tmp_path / 'report.html')
    assert reported.returncode == 0, reported.stderr
    page = (tmp_path / 'report.html').read_text()
    assert page.count('Training image 1: reconstruction') == 1
    explored = run('explore', half)
    assert explored.returncode == 0, explored.stderr
    assert 'train/loss' in explored.stdout and 'accuracy' not in explored.stdout
    out = run('export', '--checkpoint', half, '--to', 'timm', '--out', tmp_path / 'timm')
    assert out.returncode == 0, out.stderr


def test_pictures_need_no_labels_where_none_are_learnt(tmp_path):
    for i in range(12):
        path = tmp_path / 'loose' / ('' if i % 2 else 'deeper') / f'{i:02d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), images(1, i)[0])
    data = {'data.name': 'folder', 'data.path': str(tmp_path / 'loose'), 'data.split': 'train'}
    settings = {**DIGITS, **data, 'data.transform': 'resize(size)', 'batch_size': 8}
    parts = build_experiment(config.resolve(settings))
    assert parts.data.source.length == 12
    # The same with folders of classes, of which there may be one.
    labelled = {**settings, 'data.path': str(tmp_path)}
    assert build_experiment(config.resolve(labelled)).data.source.num_classes == 1


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'task.name': 'maskd'}, "did you mean 'masked'"),
        (
            {'task.name': 'classification'},
            "task.decoder_width is read by task 'detection' or 'masked'",
        ),
        ({'task.loss': 'sigmoid'}, "task.loss is read by task 'classification' or 'contrastive'"),
        ({'evals.test.type': 'classification'}, 'needs logits over classes'),
        ({'mixup': 0.2}, 'set both to 0'),
        ({'model.pool': 'map'}, 'trains no pooling'),
        ({'model.patch_dropout': 0.5}, 'set task.mask_ratio'),
        (
            {'task.mask_ratio': 0.97},
            'leaves none visible: take one from 0.0625 to 0.937',
        ),
        (
            {'task.mask_ratio': 0.0},
            'leaves none hidden: take one from 0.0625 to 0.937',
        ),
        ({'task.mask_ratio': 1.0}, 'task.mask_ratio'),
        ({'model.variant': 'mu/8'}, 'of 1 patches leaves none visible: take smaller patches'),
        ({'image_size': 9}, 'image_size 9x9 is not divisible by the 2x2 patch'),
        ({'task.decoder_width': 18}, 'task.decoder_width=18 must be divisible by 4'),
        ({'model.posemb': 'relative'}, 'needs all tokens of a grid'),
    ],
)
def test_bad_input_is_one_line(changes, words):
    with pytest.raises(UserError, match='config: ') as error:
        settings = config.resolve({**DIGITS, **changes})
        build_train_step(settings, build_experiment(settings))
    assert words in str(error.value) and '\n' not in str(error.value)


def test_labels_are_needed_for_classes(tmp_path):
    path = tmp_path / 'loose' / 'a.png'
    path.parent.mkdir()
    cv2.imwrite(str(path), images(1)[0])
    config_file = f'configs/own_images.py:path={path.parent}'
    result = run('train', '--config', config_file, '--workdir', tmp_path / 'w')
    assert 'has no folders' in error_line(result)
