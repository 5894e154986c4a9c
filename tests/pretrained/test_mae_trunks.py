"""How trunks of MAE go on: to more pretraining, to fine-tuning, to a linear probe."""

import jax
import numpy as np
import pytest
from commands import run

from big_vit import checkpoint, config, state, train, transfer, trees
from big_vit.build.experiment import build_experiment, train_batches
from big_vit.errors import UserError
from big_vit.evaluators import features
from big_vit.models import positions
from big_vit.pretrained import adapt
from big_vit.pretrained.standardise import EPSILON, start_params
from big_vit.tasks.batch import model_inputs

DIGITS = {
    'model.variant': 'mu/2',
    'model.dtype': 'float32',
    'image_size': 8,
    'batch_size': 32,
    'total_steps': 2,
    'lr': 0.01,
    'data.name': 'digits',
    'data.split': 'train[:256]',
    'data.transform': 'normalize((0.3,), (0.4,))',
    'schedule.name': 'constant',
    'log.every_steps': 1,
}
MAE = {
    'task.name': 'masked',
    'task.decoder_width': 16,
    'task.decoder_depth': 1,
    'task.decoder_heads': 2,
    'model.class_token': True,
    'model.pool': 'cls',
    'model.posemb': 'sincos2d_mae',
    'model.activation': 'gelu',
    'model.weight_init': 'mae',
}


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    """A run of MAE."""
    folder = tmp_path_factory.mktemp('mae')
    train.run(config.resolve({**DIGITS, **MAE}), folder)
    return folder


def spec(tmp_path, settings):
    path = tmp_path / 'config.py'
    path.write_text(
        'from ml_collections import ConfigDict\n\n\n'
        f'def get_config():\n    return ConfigDict({settings!r})\n'
    )
    return str(path)


def nested(settings):
    tree = {}
    for key, value in settings.items():
        *parents, last = key.split('.')
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = value
    return tree


def start_of(settings):
    """(parts, the parameters that a run of these settings starts from)"""
    resolved = config.resolve(settings)
    parts = build_experiment(resolved)
    return parts, trees.flatten(start_params(resolved, keep_head=False)(parts))


@pytest.mark.parametrize('law', ['sincos2d', 'sincos2d_mae'])
def test_fixed_positions_become_learned_ones_and_back(law):
    from big_vit.models.tokenizers import Stream

    fixed, learned = Stream(posemb=law), Stream(posemb='learned', posemb_prefix=1)
    cls = np.full((1, 1, 16), 2.0, np.float32)
    there = adapt.with_positions({'cls': cls}, fixed, (3, 5), learned, 16, 'it')
    table = there['pos_embedding']
    assert table.shape == (1, 16, 16) and not table[:, 0].any()
    np.testing.assert_array_equal(table[:, 1:], positions.sincos((3, 5), 16, law))
    moved = {**there, 'pos_embedding': table + np.pad(cls, ((0, 0), (0, 15), (0, 0)))}
    back = adapt.with_positions(moved, learned, (3, 5), fixed, 16, 'it')
    assert back.keys() == {'cls'}
    np.testing.assert_array_equal(back['cls'], cls + 2)  # What was added to the token anyway.
    other = 'sincos2d' if law == 'sincos2d_mae' else 'sincos2d_mae'
    with pytest.raises(UserError, match=r"model.posemb='learned' and model.posemb_prefix=1"):
        adapt.with_positions(there, learned, (3, 5), Stream(posemb=other), 16, 'it')


@pytest.mark.slow
def test_fine_tuning_has_trainable_positions_and_a_norm_of_its_own(pretrained, capfd):
    fine = {'model.pool': 'gap', 'model.norm_after_pool': True, 'model.class_token': True}
    learned = {'model.posemb': 'learned', 'model.posemb_prefix': 1, 'model.activation': 'gelu'}
    parts, found = start_of({**DIGITS, **fine, **learned, 'init': str(pretrained)})
    assert parts.model.head.norm_after_pool
    assert 'its last norm is left out' in capfd.readouterr().out
    saved = trees.flatten(checkpoint.load_params(pretrained, 2)[0])
    np.testing.assert_array_equal(
        found['pos_embedding'][:, 1:], positions.sincos((4, 4), 32, 'sincos2d_mae')
    )
    assert (found['encoder_norm/scale'] == 1).all() and not found['encoder_norm/bias'].any()
    same = [n for n in found if n.startswith('Transformer/') or n in ('cls', 'embedding/kernel')]
    assert len(same) > 10
    for name in same:
        np.testing.assert_array_equal(found[name], saved[name], err_msg=name)


@pytest.mark.slow
def test_positions_of_another_law_are_told(pretrained):
    settings = {**DIGITS, 'model.class_token': True, 'model.pool': 'cls', 'init': str(pretrained)}
    with pytest.raises(UserError, match=r"model.posemb='sincos2d_mae' \(here 'sincos2d'\)"):
        start_of({**settings, 'model.activation': 'gelu'})


@pytest.mark.slow
def test_a_decoder_goes_on_whole_or_not_at_all(pretrained, capfd):
    again = {**DIGITS, **MAE, 'init': str(pretrained)}
    saved = trees.flatten(checkpoint.load_params(pretrained, 2)[0])
    _, found = start_of(again)
    jax.tree.map(np.testing.assert_array_equal, found, saved)
    capfd.readouterr()
    parts, found = start_of({**again, 'task.decoder_depth': 2})
    assert 'decoder is of other sizes than here, and starts anew' in capfd.readouterr().out
    random = state.initial_leaves(parts.model, parts.data.inputs, 0, list(found))
    for name, leaf in found.items():
        wanted = random if name.startswith('decoder/') else saved
        np.testing.assert_array_equal(leaf, wanted[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize('pool', ['cls', 'gap'])
def test_standardised_features_are_those_behind_a_batch_norm(pretrained, pool):
    probe = {**DIGITS, **{k: v for k, v in MAE.items() if not k.startswith('task.')}}
    probe |= {'model.pool': pool, 'init': str(pretrained)}
    probe |= {'optim.lr_rules': (('head/.*', 1.0), ('.*', 0.0))}
    plain_parts, plain = start_of(probe)
    _, found = start_of({**probe, 'init_standardise': True})
    changed = {name for name in found if not np.array_equal(found[name], plain[name])}
    assert changed == {'Transformer/encoder_norm/scale', 'Transformer/encoder_norm/bias'}
    embed = jax.jit(features.before_head(plain_parts.model))
    before, after = [], []
    from big_vit.build.steps import batch_seen

    resolved = config.resolve(probe)
    with train_batches(resolved, plain_parts, 0) as batches:
        for number, batch in zip(range(8), batches, strict=False):
            seen = batch_seen(resolved, plain_parts.data, jax.device_get(batch), number)
            image = model_inputs({'image': seen['image']})
            for params, values in ((plain, before), (found, after)):
                values.append(np.asarray(embed(trees.unflatten(params), image), np.float64))
    x, y = np.concatenate(before), np.concatenate(after)
    assert len(x) == 256  # Every example once.
    np.testing.assert_allclose(y, (x - x.mean(0)) / np.sqrt(x.var(0) + EPSILON), atol=2e-3)
    assert np.abs(y.mean(0)).max() < 1e-3 and np.abs(y.std(0) - 1).max() < 2e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'optim.lr_rules': (('.*', 1.0),)}, 'is trained: set transfer.train=head'),
        ({'model.pool': 'cls_gap'}, "a pool of 'cls' or 'gap'"),
        ({'model.norm': 'rmsnorm'}, "a pool of 'cls' or 'gap'"),
    ],
)
def test_what_cannot_be_standardised_is_said_in_one_line(changes, words):
    probe = {**DIGITS, 'optim.lr_rules': (('head/.*', 1.0), ('.*', 0.0)), 'init_standardise': True}
    with pytest.raises(UserError, match=words) as error:
        start_of({**probe, **changes})
    assert '\n' not in str(error.value)


@pytest.mark.slow
def test_the_recipes_train_on_a_stand_in(pretrained, tmp_path):
    data = {
        'data.name': 'digits', 'data.split': 'train[:128]',
        'data.transform': 'normalize((0.3,), (0.4,))',
        'evals.val.split': 'test[:64]', 'evals.val.transform': 'normalize((0.3,), (0.4,))',
        'total_steps': 2, 'batch_size': 32, 'image_size': 8, 'schedule.warmup_steps': 1,
    }  # fmt: skip
    options = [(key, str(value)) for key, value in data.items()]
    for recipe in ('mae_finetune', 'mae_linear'):
        spec_of = f'configs/{recipe}.py:b16'
        resolved = transfer.load_config(spec_of, [*options, ('init', str(pretrained))])
        unset = ('data.num_examples', 'data.num_classes', 'data.tfds_name', 'total_epochs')
        resolved = resolved.without(*unset, 'evals.val.num_examples', 'schedule.warmup_epochs')
        results = transfer.run(resolved, tmp_path / recipe)
        assert list(results) == ['pretrained']
        assert np.isfinite(results['pretrained']['val/loss'])
    probed = trees.flatten(checkpoint.load_params(tmp_path / 'mae_linear' / 'pretrained', 2)[0])
    saved = trees.flatten(checkpoint.load_params(pretrained, 2)[0])
    moved = {n for n in probed if n in saved and not np.array_equal(probed[n], saved[n])}
    assert moved == {'Transformer/encoder_norm/scale', 'Transformer/encoder_norm/bias'}
    # Any codebase can hold the probe: it is a plain model.
    path = tmp_path / 'mae_linear' / 'pretrained'
    out = run('export', '--checkpoint', path, '--to', 'timm', '--out', tmp_path / 'timm')
    assert out.returncode == 0, out.stderr
