"""Means of checkpoints: the numbers, the head, and what cannot be mixed."""

import re

import numpy as np
import pytest
from commands import run
from tiny import MODEL, RUN, overrides

from big_vit import average, checkpoint, config, evaluate, train, trees
from big_vit.errors import UserError
from big_vit.pretrained.load import encoder


def trained(workdir, *more):
    parts = (MODEL, RUN, {'data.num_classes': '5', 'checkpoint.every_steps': '1'}, *more)
    settings = config.load('configs/pretrain_fdsl.py', overrides(*parts, evals=('test',)))
    train.run(settings, workdir)
    return workdir


@pytest.fixture(scope='module')
def run_(tmp_path_factory):
    keep = {'checkpoint.keep_last': '3'}
    return trained(tmp_path_factory.mktemp('average') / 'scanned', keep, {'model.scan': 'true'})


@pytest.fixture(scope='module')
def other(tmp_path_factory):
    """The same architecture, unrolled, with a head of its own."""
    more = {'data.num_classes': '7', 'seed': '1', 'model.scan': 'false'}
    return trained(tmp_path_factory.mktemp('average') / 'unrolled', more)


def weights(workdir, step=3):
    return trees.flatten(encoder.unstack_blocks(checkpoint.load_params(workdir, step)[0]))


def test_the_last_checkpoints_of_a_run(run_, tmp_path):
    result = run('average', run_, '--last', '3', '--out', tmp_path / 'mean')
    assert result.returncode == 0, result.stderr
    assert result.stdout.count('0.333') == 3
    found = weights(tmp_path / 'mean')
    each = [weights(run_, step) for step in (1, 2, 3)]
    assert found.keys() == each[0].keys()
    for name, leaf in found.items():
        wanted = np.mean([one[name].astype(np.float64) for one in each], 0)
        np.testing.assert_allclose(leaf, wanted, rtol=1e-6, atol=1e-9, err_msg=name)
    scores = evaluate.run(tmp_path / 'mean', 3)['test']
    assert scores['count'] == 20 and np.isfinite(scores['loss'])


@pytest.mark.slow
def test_between_two_runs_the_head_is_the_last_ones(run_, other, tmp_path):
    """WiSE-FT from a checkpoint with another head: its ends are the two, but for that head."""
    for share in (0.0, 0.25, 1.0):
        out = tmp_path / f'mean{share}'
        average.run([str(run_), str(other)], [1 - share, share], str(out))
        found, first, last = weights(out), weights(run_), weights(other)
        assert found['head/kernel'].shape == (32, 7)
        for name, leaf in found.items():
            if name.startswith('head/'):
                np.testing.assert_array_equal(leaf, last[name])
            else:
                wanted = (1 - share) * first[name] + share * last[name]
                np.testing.assert_allclose(leaf, wanted, rtol=1e-6, atol=1e-8, err_msg=name)
    whole = evaluate.run(other, 3)['test']
    np.testing.assert_allclose(evaluate.run(out, 3)['test']['loss'], whole['loss'], rtol=1e-5)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['RUN', '--out', 'OUT'], 'give two checkpoints or more, or one run with --last N'),
        (['RUN', 'RUN'], '--out'),
        (['RUN', 'RUN', '--out', 'OUT', '--weights', '1'], '2 checkpoints need as many numbers'),
        (['RUN', 'RUN', '--out', 'OUT', '--weights', '1,1'], 'their sum is 2, not 1'),
        (['RUN', 'RUN', '--out', 'OUT', '--weights', 'a,b'], 'write numbers'),
        (['RUN', '--out', 'OUT', '--last', '9'], 'has 3 checkpoint(s)'),
        (['RUN', 'RUN', '--out', 'OUT', '--last', '2'], '--last N is of one run'),
        (['RUN', 'nowhere', '--out', 'OUT'], 'nowhere: no such folder'),
        (['RUN', 'RUN', '--out', 'RUN'], 'name another folder'),
    ],
)
def test_mistakes_are_one_line(arguments, message, run_, tmp_path):
    places = {'RUN': str(run_), 'OUT': str(tmp_path / 'out')}
    with pytest.raises(UserError, match=re.escape(message)):
        average.main([places.get(word, word) for word in arguments])
    assert not (tmp_path / 'out').exists()


def test_other_architectures_are_named(run_, tmp_path):
    params = encoder.unstack_blocks(checkpoint.load_params(run_, 3)[0])
    flat = trees.flatten(params)
    for name, leaf in (('embedding/bias', np.zeros(5)), ('embedding/scale', np.ones(3))):
        changed = trees.unflatten({**flat, name: leaf})
        with pytest.raises(UserError, match=rf'a and b are of different architectures: .*{name}'):
            average.average([changed, params], [0.5, 0.5], ['a', 'b'])
