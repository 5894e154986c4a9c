"""Evaluations of a config: in training, alone, on other meshes and hosts, and what is refused."""

import json

import jax
import numpy as np
import pytest
from commands import run, run_many
from tiny import MODEL, RUN, flags, overrides

from big_vit import build, config, evaluate, metrics, scoring, train
from big_vit.errors import UserError

SPLITS = {'train_split': 'train[:150]', 'split': 'test[:60]'}
EVALS = {
    'head': {'split': 'test[:60]', 'calibration': 'true', 'per_class': 'mean'},
    'few': {'type': 'fewshot', 'shots': '(1, 5)', **SPLITS},
    'near': {'type': 'knn', 'k': '(3, 10)', **SPLITS},
    'probe': {'type': 'linear_probe', 'l2': '(1e-3, 1e-1)', 'iterations': '50', **SPLITS},
    'grid': {'type': 'linear_grid', 'rates': '(1e-2, 1e-1)', 'last_blocks': '(1,)',
             'updates': '20', 'probe_batch': '64', **SPLITS},
    'found': {'type': 'retrieval', 'gallery_split': 'train[:150]', 'split': 'test[:60]'},
    'hard': {'type': 'robustness', 'corruptions': "('contrast', 'box_blur')",
             'severities': '(1, 5)', 'split': 'test[:60]'},
}  # fmt: skip
ALL = {f'evals.{name}.{key}': value for name, keys in EVALS.items() for key, value in keys.items()}
DIGITS = {
    'data.name': 'digits',
    'data.split': 'train[:150]',
    'data.num_classes': 'none',
    'data.transform': 'resize(size)',
}
# The smallest that every type has something to say about.
SMALL = {**MODEL, **RUN, **DIGITS, 'model.dtype': 'float32', 'model.scan': 'false'}


def load(*more):
    return config.load(
        'configs/transfer_digits.py',
        overrides(SMALL, {'model.variant': 'mu/8', 'evals.test.split': 'test[:60]'}, *more),
    )


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('scored') / 'w'
    train.run(load(ALL), workdir)
    return workdir


def test_every_type_is_scored_in_training_and_the_same_alone(trained):
    rows = metrics.read(trained)
    last = metrics.latest(rows)
    expected = {
        'head': ('top1', 'ece', 'brier', 'nll', 'mean_per_class'),
        'few': ('1shot', '5shot'),
        'near': ('3nn', '10nn'),
        'probe': ('top1', 'l2'),
        'grid': ('top1', 'rate'),
        'found': ('recall@1', 'map', 'back/map'),
        'hard': ('mean', 'contrast', 'box_blur', 'severity_1', 'severity_5'),
    }
    for name, keys in expected.items():
        assert {f'{name}/{key}' for key in (*keys, 'count')} <= last.keys()
        assert last[f'{name}/count'] == 60
    again = evaluate.run(trained, 3)
    flat = {f'{name}/{key}': value for name, found in again.items() for key, value in found.items()}
    for key, value in flat.items():
        assert last[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    # Learning from half of the digits on random features is better than chance.
    assert max(v for k, v in again['near'].items() if k != 'count') > 0.3


def scores(workdir, devices):
    result = run('evaluate', '--checkpoint', workdir, '--json', devices=devices)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_one_device_eight_and_two_hosts_give_the_same_numbers(trained):
    one, eight = scores(trained, 1), scores(trained, 8)
    first, _ = run_many('evaluate', '--checkpoint', trained, '--json')
    two = json.loads(first.stdout.splitlines()[-1])
    for name in EVALS:
        for key, value in one[name].items():
            # What counts examples is the same to the bit; sums of losses round.
            near = (
                0 if key.startswith(('top', 'count')) or name in ('few', 'near', 'found') else 1e-4
            )
            for other in (eight, two):
                np.testing.assert_allclose(
                    other[name][key], value, near, 0, err_msg=f'{name}/{key}'
                )


def test_more_evaluations_come_from_the_command_line(trained):
    more = {
        'evals.more.type': 'knn',
        'evals.more.k': '3',
        **{f'evals.more.{k}': v for k, v in SPLITS.items()},
    }
    result = run('evaluate', '--checkpoint', trained, *flags(more))
    assert result.returncode == 0, result.stderr
    shown = [line for line in result.stdout.splitlines() if line.startswith(('more', 'near'))]
    assert len(shown) == 2


WRONG = [
    ({'type': 'knnn'}, "type must be one of .*knn"),
    ({'type': 'knn', 'k': '500'}, 'evals.x.k'),
    ({'type': 'fewshot', 'shots': '90'}, 'evals.x.shots'),
    ({'type': 'knn', 'shots': '5'}, "evals.x.shots is read by type 'fewshot'"),
    ({'type': 'knn', 'split': 'test[5:5]'}, 'holds no example'),
    ({'type': 'linear_probe', 'train_split': 'train[:1]'}, 'evals.x.train_split'),
    ({'type': 'knn', 'blocks': '9'}, 'evals.x.blocks'),
    ({'type': 'knn', 'pool': 'cls'}, 'evals.x.pool is of evals.x.blocks'),
    ({'type': 'linear_grid', 'last_blocks': '7'}, 'last_blocks=7, but the model has 1 blocks'),
    ({'type': 'robustness', 'corruptions': 'fog'}, 'evals.x.corruptions'),
]  # fmt: skip


@pytest.mark.parametrize('keys, message', WRONG, ids=[str(keys) for keys, _ in WRONG])
def test_what_does_not_fit_is_refused_before_anything_is_computed(keys, message, monkeypatch):
    def never(*_, **__):
        raise AssertionError('something was computed')

    with pytest.raises(UserError, match=message):
        whole = (
            {**SPLITS, **keys}
            if keys.get('type') != 'robustness'
            else {'split': 'test[:60]', **keys}
        )
        settings = load({f'evals.x.{key}': value for key, value in whole.items()})
        parts = build.experiment(settings)
        monkeypatch.setattr(jax, 'device_get', never)
        scoring.evaluators(settings, parts)
