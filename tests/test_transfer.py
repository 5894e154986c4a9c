"""Transfer, evaluation and exploration, from checkpoints that the tests train themselves."""

import json
import re

import jax
import numpy as np
import pytest
from commands import run
from gate import mostly_slow
from tiny import MODEL, RUN, flags, overrides

from big_vit import checkpoint, config, evaluate, explore, export, metrics, train, transfer, trees
from big_vit.build.experiment import build_experiment
from big_vit.errors import UserError
from big_vit.models import flops
from big_vit.models.placement import unplaced
from big_vit.pretrained.load import initial_params, read_pretrained

PRETRAIN = {
    'data.num_classes': '20',
    'model.posemb': 'learned',
    'model.scan': 'true',
    'ema': '0.9',
}


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('pretrained') / 'w'
    settings = config.load(
        'configs/pretrain_fdsl.py', overrides(MODEL, RUN, PRETRAIN, evals=('test',))
    )
    train.run(settings, workdir)
    return workdir


def small_transfer(init, *more):
    return transfer.load_config(
        'configs/transfer_digits.py',
        overrides(RUN, *more, {'init': str(init)}, evals=('test',)),
    )


@pytest.fixture(scope='module')
def transferred(pretrained, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('transferred') / 'w'
    return workdir, transfer.run(small_transfer(pretrained), workdir)


def test_all_starts_are_trained_and_reported(transferred):
    workdir, results = transferred
    assert set(results) == {'pretrained', 'control', 'features'}
    assert json.loads((workdir / 'transfer.json').read_text()) == results
    table = transfer.result_table(results, ['test'])
    assert 'from the checkpoint' in table and 'control: same recipe from random' in table
    assert f'{results["pretrained"]["test/top1"]:.2%}' in table
    for label in results:
        assert checkpoint.steps(workdir / label)[-1] == 3
        assert config.from_json(json.loads((workdir / label / 'config.json').read_text()))


@pytest.mark.parametrize(
    'trained, moved',
    mostly_slow(
        [
            ('head', 'head/'),
            ('bias', '.*bias|head/'),
            ('norm', '.*([Nn]orm).*|head/'),
            ('attention', '.*/MultiHeadDotProductAttention_0/|head/'),
            ('lora', '.*/lora_[ab]|head/'),
        ],
        ('bias', '.*bias|head/'),
    ),
)
def test_only_what_was_asked_for_is_trained(trained, moved, pretrained, tmp_path):
    still = {'transfer.control': 'false', 'transfer.random_features': 'false'}
    settings = small_transfer(pretrained, still, {'transfer.train': trained})
    transfer.run(settings, tmp_path / 'w')
    got = trees.flatten(checkpoint.load_params(tmp_path / 'w' / 'pretrained', 3)[0])
    want = trees.flatten(checkpoint.load_params(pretrained, 3, 'ema')[0])
    frozen = [name for name in got if not re.match(moved, name)]
    assert len(frozen) > 3 or trained == 'bias'
    for name in frozen:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    moving = [name for name in got if name not in frozen]
    new = [name for name in moving if name.startswith('head/') or name not in want]
    changed = [name for name in moving if name in new or np.any(got[name] != want[name])]
    # The keys' bias has no gradient.
    assert len(changed) >= len(got) - len(frozen) - 2
    if trained == 'lora':
        assert all(np.any(got[name]) for name in got if name.endswith('lora_b'))


@pytest.mark.slow
def test_what_lora_learned_goes_on_and_out_as_plain_kernels(pretrained, tmp_path):
    still = {'transfer.control': 'false', 'transfer.random_features': 'false'}
    settings = small_transfer(pretrained, still, {'transfer.train': 'lora'})
    transfer.run(settings, tmp_path / 'w')
    done = tmp_path / 'w' / 'pretrained'
    assert config.from_json(json.loads((done / 'config.json').read_text())).model.lora == 8
    found = read_pretrained(str(done))
    assert not any('lora' in name for name in trees.flatten(found.params))
    again = small_transfer(done, still)
    assert again.model.lora == 0
    weights = export.from_checkpoint(str(done))
    assert not any('lora' in name for name in trees.flatten(weights.params))
    scored = evaluate.run(done, 3)['test']
    resting = again.without('transfer.').replacing({'total_steps': 1, 'lr': 0.0})
    train.run(resting, tmp_path / 'merged', params=initial_params(resting, keep_head=True))
    merged = evaluate.run(tmp_path / 'merged', 1)['test']
    assert merged['loss'] == pytest.approx(scored['loss'], rel=1e-4)


def first_params(pretrained, tmp_path, *more):
    """Parameters after one transfer step with a rate of 0: what the transfer started from."""
    still = {'total_steps': '1', 'lr': '0.0', 'transfer.control': 'false'}
    still |= {'transfer.random_features': 'false'}
    transfer.run(small_transfer(pretrained, still, *more), tmp_path / 'w')
    return checkpoint.load_params(tmp_path / 'w' / 'pretrained', 1)[0]


def test_it_starts_from_the_averaged_parameters_with_a_zero_head(pretrained, tmp_path):
    got = first_params(pretrained, tmp_path)
    want, _ = checkpoint.load_params(pretrained, 3, 'ema')
    assert not np.any(got['head']['kernel']) and got['head']['kernel'].shape == (32, 10)
    for name, leaf in trees.flatten(want).items():
        if not name.startswith('head/'):
            np.testing.assert_array_equal(trees.flatten(got)[name], leaf, err_msg=name)


@pytest.mark.slow
def test_positions_are_resized_to_more_pixels_and_to_another_shape(pretrained, tmp_path):
    got = first_params(pretrained, tmp_path, {'image_size': '(48, 24)'})['pos_embedding']
    want = checkpoint.load_params(pretrained, 3, 'ema')[0]['pos_embedding'].reshape(8, 8, 32)
    assert got.shape == (1, 12 * 6, 32)
    corners = got.reshape(12, 6, 32)[[0, 0, -1, -1], [0, -1, 0, -1]]
    np.testing.assert_array_equal(corners, want[[0, 0, -1, -1], [0, -1, 0, -1]])


def test_scanned_checkpoints_go_into_unrolled_models(pretrained, tmp_path):
    got = first_params(pretrained, tmp_path, {'model.scan': 'false'})
    want, _ = checkpoint.load_params(pretrained, 3, 'ema')
    stacked = want['Transformer']['encoderblock']['MlpBlock_0']['Dense_0']['kernel']
    block = got['Transformer']['encoderblock_0']['MlpBlock_0']['Dense_0']['kernel']
    np.testing.assert_array_equal(block, stacked[0])


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'model.width': '16'}, r'another architecture: .*scale is \(1, 32\).*\(1, 16\)'),
        ({'model.pool': 'cls'}, 'cls is only in the model'),
        ({'model.posemb': 'sincos2d'}, r"has learned positions, and model\.posemb='sincos2d'"),
        (
            {
                'data.transform': 'rgb | resize(size)',
                'evals.test.transform': 'rgb | resize(size)',
            },
            r'1 channel\(s\), these have 3: add grayscale to data\.transform',
        ),
        ({'data.transform': 'rgb | resize(size)'}, r'evals\.test\.transform gives .* add rgb'),
    ],
)
def test_what_does_not_fit_is_named_before_the_workdir_exists(
    pretrained, tmp_path, change, message
):
    with pytest.raises(UserError, match=message):
        transfer.run(small_transfer(pretrained, change), tmp_path / 'w')
    assert not (tmp_path / 'w').exists()


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match=r'config: init: .*nowhere: no such folder'):
        small_transfer(tmp_path / 'nowhere')
    with pytest.raises(UserError, match=r'init must be set to a checkpoint'):
        transfer.load_config('configs/transfer_digits.py', [])


@pytest.mark.slow
def test_pretraining_helps_on_what_it_was_pretrained_on(tmp_path):
    """Digits onto digits: the strongest form of the claim that parameters really travel."""
    (tmp_path / 'empty.py').write_text(
        'from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict({})\n'
    )
    both = {
        **RUN,
        'image_size': '8',
        'lr': '1e-2',
        'data.name': 'digits',
        'log.every_steps': '100',
        'checkpoint.every_steps': '0',
    }
    model = {'model.variant': 'mu/4', 'model.posemb': 'learned', 'model.dtype': 'float32', **MODEL}
    long = {'total_steps': '300'}
    few = {
        'total_steps': '20',
        'data.split': 'train[:100]',
        'evals.test.split': 'test',
        'init': str(tmp_path / 'pre'),
    }
    command = ('--config', tmp_path / 'empty.py', '--workdir')
    first = run('train', *command, tmp_path / 'pre', *flags(both, model, long))
    assert first.returncode == 0, first.stdout + first.stderr
    second = run('transfer', *command, tmp_path / 'w', *flags(both, few))
    assert second.returncode == 0, second.stdout + second.stderr
    results = json.loads((tmp_path / 'w' / 'transfer.json').read_text())
    assert results['pretrained']['test/top1'] > results['control']['test/top1'] + 0.2


def test_evaluate_agrees_with_training_and_takes_overrides(pretrained):
    workdir, step = checkpoint.locate(pretrained)
    scores = evaluate.run(workdir, step)['test']
    logged = metrics.latest(metrics.read(pretrained))
    assert scores['count'] == 20
    assert scores['loss'] == pytest.approx(logged['test/loss'], abs=1e-6)
    assert scores['top1'] == logged['test/top1']
    more = evaluate.run(workdir, step, [('evals.other.split', 'train[:33]')])
    assert more['other']['count'] == 33 and more['test'] == scores


@pytest.mark.slow
def test_evaluate_on_a_command_line_with_another_number_of_devices(pretrained):
    one = run('evaluate', '--checkpoint', pretrained, '--json', devices=1)
    three = run('evaluate', '--checkpoint', pretrained, '--json', devices=3)
    assert one.returncode == three.returncode == 0, one.stderr + three.stderr
    a, b = json.loads(one.stdout)['test'], json.loads(three.stdout)['test']
    assert a['count'] == b['count'] == 20
    assert a['loss'] == pytest.approx(b['loss'], abs=1e-5)


def test_explore_prints_parameters_config_and_history(pretrained, capsys):
    explore.main([str(pretrained)])
    shown = capsys.readouterr().out
    params, _ = checkpoint.load_params(pretrained, 3)
    kernel = params['embedding']['kernel']
    row = next(line for line in shown.splitlines() if line.startswith('embedding/kernel'))
    assert row.split()[1:4] == ['4x4x1x32', 'float32', f'{kernel.nbytes:,}']
    assert float(row.split()[-1]) == pytest.approx(kernel.astype(np.float64).std(), rel=1e-2)
    assert f'{trees.count(params):,} parameters' in shown
    assert "data.name = 'fdsl'" in shown and 'test/top1' in shown


@pytest.mark.slow
def test_explore_draws_curves_and_images(transferred, tmp_path, capsys):
    workdir, _ = transferred
    explore.main(
        [str(workdir / 'pretrained'), str(workdir / 'control'), '--png', str(tmp_path / 'p')]
    )
    import cv2

    shown = capsys.readouterr().out
    for name in ('curves.png', 'images.png'):
        assert name in shown
        picture = cv2.imread(str(tmp_path / 'p' / name))
        assert picture.shape[1] > 400 and picture.std() > 5, name


@pytest.mark.slow
def test_transfer_from_the_command_line(pretrained, tmp_path):
    result = run(
        'transfer',
        *('--config', 'configs/transfer_digits.py', '--workdir', tmp_path / 'w'),
        *flags(RUN, {'init': str(pretrained), 'evals.test.split': 'test[:20]'}),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert 'control: same recipe from random' in result.stdout


@pytest.mark.slow
def test_explore_draws_what_the_model_looks_at(pretrained, tmp_path):
    from PIL import Image

    explore.main([str(pretrained), '--png', str(tmp_path)])
    for name in ('attention', 'embedding', 'positions', 'images', 'curves'):
        with Image.open(tmp_path / f'{name}.png') as picture:
            assert len(picture.convert('RGB').getcolors(1 << 24)) > 20, name


@pytest.mark.slow
def test_training_starts_from_weights_of_others(pretrained, tmp_path):
    """Out to timm's format and in again: a step at a rate of 0 leaves all as it was."""
    out = run('export', '--checkpoint', pretrained, '--to', 'timm', '--out', tmp_path / 'timm')
    assert out.returncode == 0, out.stderr
    params, sidecar = checkpoint.load_params(pretrained, 3, 'ema')
    settings = config.from_json(sidecar['config']).replacing(
        {'init': str(tmp_path / 'timm'), 'total_steps': 1, 'lr': 0.0}
    )
    train.run(settings, tmp_path / 'w', params=initial_params(settings, keep_head=True))
    found, _ = checkpoint.load_params(tmp_path / 'w', 1)
    flat, wanted = trees.flatten(found), trees.flatten(params)
    assert flat.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(flat[name], wanted[name], err_msg=name)


def test_weights_that_load_but_answer_otherwise_are_refused(pretrained, tmp_path):
    out = run(
        'export', '--checkpoint', pretrained, '--to', 'big_vision',
        '--out', tmp_path / 'a.npz',
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    more = ('--set', 'norm_eps=1e-3', '--out', tmp_path / 'run')
    out = run('export', '--from', tmp_path / 'a.npz', *more)
    assert out.returncode == 0, out.stderr
    _, sidecar = checkpoint.load_params(pretrained, 3)
    settings = config.from_json(sidecar['config']).replacing({'init': str(tmp_path / 'run')})
    with pytest.raises(UserError, match=r'model\.norm_eps=0\.001 \(here 1e-06\): set the same'):
        train.run(settings, tmp_path / 'w', params=initial_params(settings, keep_head=True))
    assert not (tmp_path / 'w').exists()
    # A transfer takes the model of where it starts.
    loaded = transfer.load_config(
        'configs/transfer_digits.py', overrides(RUN, {'init': str(tmp_path / 'run')})
    )
    assert loaded.model.norm_eps == 1e-3 and loaded.model.posemb == 'learned'


def test_what_is_frozen_is_not_counted_as_computed(pretrained):
    """Else a head alone would run at more than the machine's peak."""

    def count(trained):
        settings = small_transfer(pretrained, {'transfer.train': trained})
        parts = build_experiment(settings)
        image = jax.ShapeDtypeStruct((1, *parts.data.shapes['image']), np.float32)
        params = {'params': parts.abstract_state['params']}
        return parts.flops_per_example / flops.count(unplaced(parts.model).apply, params, image)

    assert count('all') == 3
    assert 1 < count('head') < 1.05
    assert 2 < count('norm') < 2.1
    assert count('norm') < count('attention') < 3
