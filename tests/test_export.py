"""`python -m big_vit.export`: out of a run, into a workdir, and back with the same bits."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from commands import run

from big_vit import checkpoint, export, interop, trees
from big_vit import config as config_lib
from big_vit.build.data import DEVICE_OPERATIONS, Data
from big_vit.build.experiment import Experiment
from big_vit.data import transforms
from big_vit.errors import UserError
from big_vit.interop import Weights, fit, layout
from big_vit.models.encoder import stack_blocks
from big_vit.pretrained import load
from big_vit.pretrained.load import config_of_weights

pytest.importorskip('safetensors')

SETTINGS = dict(
    num_classes=5,
    patch_size=(16, 16),
    width=48,
    depth=2,
    mlp_dim=96,
    num_heads=3,
    posemb='learned',
    posemb_prefix=1,
    pool='cls',
    activation='gelu',
)
META = {
    'image_size': (32, 32),
    'channels': 3,
    'mean': (0.1, 0.2, 0.3),
    'std': (0.4, 0.5, 0.6),
    'crop_pct': 0.875,
    'licence': 'cc-by-nc-4.0',
    'source': 'https://example.org/weights',
}

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def weights_of(**settings):
    settings = fit.complete({**SETTINGS, **settings})
    rng = np.random.default_rng(0)
    flat = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in layout.shapes_of(settings, META).items()
    }
    return Weights(trees.unflatten(flat), settings, dict(META))


def same(a, b):
    a, b = trees.flatten(a), trees.flatten(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize('scan', [True, False])
def test_into_a_workdir_and_out_again(scan, tmp_path):
    mine = weights_of()
    text = str(scan).lower()
    workdir, config = export.to_checkpoint(mine, str(tmp_path / 'run'), [('model.scan', text)])
    params, sidecar = checkpoint.load_params(workdir, 0)
    same(params, stack_blocks(mine.params) if scan else mine.params)
    again = config_lib.from_json(sidecar['config'])
    assert again.model.activation == 'gelu'
    assert again.model.posemb_prefix == 1
    assert again.image_size == (32, 32)
    assert 'normalize((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))' in config.data.transform
    found = export.from_checkpoint(str(workdir))
    same(found.params, mine.params)
    assert found.settings == mine.settings
    assert {key: found.meta[key] for key in META} == META


def test_a_workdir_with_checkpoints_is_left_alone(tmp_path):
    export.to_checkpoint(weights_of(), str(tmp_path / 'run'))
    with pytest.raises(UserError, match='there are checkpoints in it already'):
        export.to_checkpoint(weights_of(), str(tmp_path / 'run'))


@pytest.mark.parametrize(
    ('settings', 'variant'),
    [
        (dict(), 'mu/16'),
        (dict(width=192, depth=12, mlp_dim=768, num_heads=3, patch_size=(16, 8)), 'Ti/16x8'),
        (dict(tokenizer='resnet', resnet=(), patch_size=(8, 8)), 'R+mu/8'),
    ],
)
def test_sizes_have_the_name_of_a_variant_where_they_have_one(settings, variant):
    config = config_of_weights(weights_of(**settings))
    assert config.model.variant == variant


def test_settings_that_differ_are_those_of_the_config():
    wanted = dict(registers=2, layer_scale=0.1, norm_eps=1e-5, pre_norm=True, qk_norm=True)
    config = config_of_weights(weights_of(**wanted))
    assert {name: config.model[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ('transform', 'mean', 'std'),
    [
        ('resize(size)', (0.5,) * 3, (0.5,) * 3),
        ('resize(size) | value_range(0, 1)', (0.0,) * 3, (1.0,) * 3),
        ('resize(size) | normalize((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))', (0.1, 0.2, 0.3), (1, 2, 3)),
        ('resize(size) | normalize()', (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ('rrc(size) | normalize | random_erasing(0.25)', *IMAGENET),
        ('rrc(size) | to_device | flip_lr | normalize | flip_ud', *IMAGENET),
    ],
)
def test_what_images_were_normalised_with_is_read_from_the_transform(
    transform, mean, std, tmp_path
):
    workdir, _ = export.to_checkpoint(
        weights_of(), str(tmp_path / 'run'), [('data.transform', transform)]
    )
    found = export.from_checkpoint(str(workdir)).meta
    assert found['mean'] == pytest.approx(mean)
    assert found['std'] == pytest.approx(std)


@pytest.mark.parametrize(
    ('transform', 'mean', 'std'),
    [
        ('resize(size)', 0.5, 0.5),
        ('resize(size) | normalize(0.25, 0.125) | random_erasing(0.5)', 0.25, 0.125),
        ('resize(size) | value_range(low=0, high=1)', 0.0, 1.0),
        # A tokenizer that is not on this machine says nothing about images.
        ("resize(size) | tokenize('/absent/tokenizer.json', 8) | normalize((0.5,), 0.1)", 0.5, 0.1),
    ],
)
def test_grey_images_have_one_mean(transform, mean, std, tmp_path):
    grey = weights_of()
    meta = {**META, 'channels': 1, 'mean': (0.5,), 'std': (0.5,)}
    flat = trees.flatten(grey.params)
    flat['embedding/kernel'] = flat['embedding/kernel'][:, :, :1]
    grey = Weights(trees.unflatten(flat), grey.settings, meta)
    workdir, _ = export.to_checkpoint(grey, str(tmp_path / 'run'), [('data.transform', transform)])
    found = export.from_checkpoint(str(workdir)).meta
    assert (found['channels'], found['mean'], found['std']) == (1, (mean,), (std,))


NORMALIZE = 'normalize((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))'


@pytest.mark.parametrize(
    ('train', 'evaluation', 'named'),
    [
        (f'resize(size) | {NORMALIZE}', 'resize(size)', None),
        (f'resize(size) | {NORMALIZE} | random_erasing(0.5)', f'resize(size) | {NORMALIZE}', None),
        ('resize(size) | normalize()', 'resize(size)', 'data.transform and that of evals'),
        ('resize(size)', f'resize(size) | {NORMALIZE}', 'data.transform and that of evals'),
        ('normalize((0.1, 0.2, 0.3, 0.4), 0.5)', '', 'data.transform and that of evals'),
        (f'resize(size) | {NORMALIZE}', 'resize(size) | value_range(0, 1)', 'evals.a.transform'),
        (f'resize(size) | {NORMALIZE}', 'standardize(5, 3) | to_device', 'evals.a.transform'),
    ],
)
def test_a_start_from_weights_that_saw_other_images_is_warned_of(train, evaluation, named, capsys):
    def data_of(text, default=()):
        made = transforms.parse(text, size=(32, 32), device=DEVICE_OPERATIONS)
        spec = transforms.ExampleSpec({'image': ((32, 32, 3), np.dtype(np.uint8))})
        host = replace(made, device=())
        return Data(None, host, spec, made.device or default, (), skip_bad=False)

    weights = weights_of()
    pretrained = load.Pretrained(
        weights.params, config_of_weights(weights), 'W', ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    )
    data = data_of(train)
    fixed = tuple(pair for pair in data.device if pair[0] == 'normalize')
    parts = Experiment(**dict.fromkeys(Experiment._fields))
    parts = parts._replace(data=data, evals={'a': data_of(evaluation, fixed)})
    load._tell_normalisation(pretrained.config, parts, pretrained)
    wanted = (
        'WARNING: W was trained on images normalised with mean [0.1, 0.2, 0.3] and deviation '
        f'[0.4, 0.5, 0.6]; end {named}'
    )
    printed = capsys.readouterr().err
    assert printed.startswith(wanted) if named else not printed
    assert not named or printed.endswith(f' with {NORMALIZE}\n')


def test_settings_as_text():
    found = export.settings_from_text(
        ['norm_eps=1e-5', 'activation=gelu', 'image_size=32,48', 'patch_size=16', 'qk_norm=true']
    )
    assert found == {
        'norm_eps': 1e-5,
        'activation': 'gelu',
        'image_size': (32, 48),
        'patch_size': (16, 16),
        'qk_norm': True,
    }
    with pytest.raises(UserError, match='NAME=VALUE'):
        export.settings_from_text(['norm_eps'])
    with pytest.raises(UserError, match='not a setting'):
        export.settings_from_text(['eps=1'])
    with pytest.raises(UserError, match='HEIGHT,WIDTH'):
        export.settings_from_text(['image_size=big'])


def test_the_command_in_both_directions(tmp_path):
    mine = weights_of()
    interop.write(tmp_path / 'timm', 'timm', mine)
    done = run('export', '--from', tmp_path / 'timm', '--out', tmp_path / 'run')
    assert done.returncode == 0, done.stderr
    assert f'--config.init={tmp_path}/run' in done.stdout
    assert 'licence cc-by-nc-4.0' in done.stdout
    done = run(
        'export', '--checkpoint', tmp_path / 'run', '--to', 'augreg', '--out', tmp_path / 'a'
    )
    assert done.returncode == 2
    assert 'must end in .npz' in done.stderr or "no activation='gelu'" in done.stderr
    out = tmp_path / 'again'
    done = run('export', '--checkpoint', tmp_path / 'run', '--to', 'timm', '--out', out)
    assert done.returncode == 0, done.stderr
    again = interop.read(out)
    same(again.params, mine.params)
    assert again.settings == mine.settings
    assert again.meta['licence'] == 'cc-by-nc-4.0'
    one, two = (json.loads((p / 'config.json').read_text()) for p in (tmp_path / 'timm', out))
    assert one == two


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        ((), '--out is missing'),
        (('--out', 'x'), 'give --checkpoint RUN'),
        (('--out', 'x', '--checkpoint', 'nowhere'), '--to is missing'),
        (('--out', 'x', '--checkpoint', 'nowhere', '--to', 'timm'), 'no such folder'),
        (('--out', 'x', '--from', 'nowhere'), 'there is no such file or folder'),
        (('--out', 'x', '--checkpoint', 'y', '--to', 'timm', '--config.lr=1'), 'only goes with'),
    ],
)
def test_what_is_missing_is_named(args, message):
    with pytest.raises(UserError) as error:
        export.main(list(args))
    assert message in str(error.value)


@pytest.mark.slow
def test_a_trained_run_goes_out_and_comes_back_as_init(tmp_path):
    """What training saves is what is exported; what comes back scores the same."""
    data = tiny.write_idx(tmp_path / 'data')
    config = tmp_path / 'c.py'
    config.write_text(
        'import ml_collections\n'
        'def get_config():\n'
        '    return ml_collections.ConfigDict(dict(image_size=28, lr=1e-3, model=dict('
        "variant='mu/7'), data=dict(name='idx', transform='resize(size) | rgb')))\n"
    )
    flags = tiny.flags(tiny.MODEL, tiny.RUN, {'data.path': str(data)})
    done = run('train', '--config', config, '--workdir', tmp_path / 'run', *flags)
    assert done.returncode == 0, done.stderr
    out = tmp_path / 'x.npz'
    done = run('export', '--checkpoint', tmp_path / 'run', '--to', 'big_vision', '--out', out)
    assert done.returncode == 0, done.stderr
    done = run('export', '--from', out, '--out', tmp_path / 'b', '--set', 'image_size=28,28')
    assert done.returncode == 0, done.stderr
    step = checkpoint.steps(tmp_path / 'run')[-1]
    trained, _ = checkpoint.load_params(tmp_path / 'run', step)
    back, _ = checkpoint.load_params(tmp_path / 'b', 0)
    same(trained, back)


def test_averaged_parameters_are_what_is_exported_unless_told(tmp_path):
    mine = weights_of()
    wide = jax.tree.map(jnp.asarray, stack_blocks(mine.params))
    state = {
        'params': wide,
        'ema': jax.tree.map(lambda x: x + 1, wide),
        'step': jnp.zeros((), jnp.int32),
    }
    config = config_of_weights(mine)
    with checkpoint.Manager(tmp_path / 'run', keep_last=1) as manager:
        manager.save(state, config.to_dict(), {})
    same(export.from_checkpoint(str(tmp_path / 'run'), 'params').params, mine.params)
    found = export.from_checkpoint(str(tmp_path / 'run')).params
    np.testing.assert_array_equal(found['cls'], mine.params['cls'] + 1)
