"""Sweeps of `train`: the same table, choice and resume as those of `transfer`."""

import json
import shutil

import numpy as np
import pytest

from big_vit import checkpoint, config, evaluate, metrics, report, storage
from big_vit.errors import UserError
from big_vit.sweeps import study, sweep

SMALL = {
    'total_steps': 6,
    'batch_size': 16,
    'image_size': 8,
    'lr': 1e-2,
    'model.variant': 'mu/4',
    'model.dtype': 'float32',
    'data.name': 'digits',
    'data.split': 'train[:50%]',
    'evals.val.split': 'train[50%:70%]',
    'evals.val.every_steps': 3,
    'checkpoint.every_steps': 6,
}
TEST = {'evals.test.split': 'test[:100]'}


def load(*more):
    return config.resolve(SMALL | dict(pair for one in more for pair in one.items()))


def run(workdir, settings, *swept, **more):
    return sweep.run(settings, storage.place(workdir), swept, recipe=sweep.TRAIN, **more)


@pytest.mark.slow
def test_validation_chooses_and_the_test_is_scored_once(tmp_path, capsys):
    settings, workdir = load(TEST), tmp_path / 'w'
    results = run(workdir, settings, 'lr=0.0001,0.03', seeds=2)
    rows = study.read(storage.place(workdir))
    assert [(row['lr'], row['seed']) for row in rows] == [
        (0.0001, 0), (0.03, 0), (0.0001, 1), (0.03, 1),
    ]  # fmt: skip
    for row in rows:  # A trial is an ordinary run of train, which never saw the test.
        history = metrics.read(workdir / row['workdir'])
        assert history[-1]['val/top1'] == row['val/top1']
        assert not any(name.startswith('test/') for one in history for name in one)
    means = {lr: np.mean([r['val/top1'] for r in rows if r['lr'] == lr]) for lr in (0.0001, 0.03)}
    chosen = results['train']
    assert chosen['setting'] == {'lr': max(means, key=means.get)}
    place = workdir / chosen['trials'][1]
    overrides = [('evals.test.split', 'test[:100]')]
    scored = evaluate.run(place, checkpoint.steps(place)[-1], overrides)['test']
    assert chosen['tests'][1] == pytest.approx(scored['top1']) and chosen['count'] == 100
    sweep.show(settings, storage.place(workdir), results)
    shown = capsys.readouterr().out
    assert 'test top-1' in shown and f'{chosen["mean"]:.2%}' in shown and 'sweep.png' in shown
    assert f'{chosen["mean"]:.2%}' in report.document(str(workdir))
    # Again: nothing is trained. With a trial lost: that one is, to the same bits.
    assert run(workdir, settings, 'lr=0.0001,0.03', seeds=2) == results
    lost = rows.pop()
    study.write(storage.place(workdir), rows)
    shutil.rmtree(workdir / lost['workdir'])
    assert run(workdir, settings, 'lr=0.0001,0.03', seeds=2) == results
    again = study.read(storage.place(workdir))[-1]
    assert {**again, 'seconds': 0} == {**lost, 'seconds': 0}


@pytest.mark.slow
def test_by_a_loss_with_the_best_checkpoints_and_without_a_test(tmp_path, capsys):
    more = {'transfer.validation': 'val/loss', 'checkpoint.best': 'val/loss', 'total_steps': 9}
    settings = load(more, {'schedule.name': 'constant'})
    results = run(tmp_path / 'w', settings, 'lr=0.001,0.3')
    assert 'trials  ' not in capsys.readouterr().out  # One by one.
    rows = study.read(storage.place(tmp_path / 'w'))
    least = []
    for row in rows:
        history = metrics.read(tmp_path / 'w' / row['workdir'])
        least.append(min(one['val/loss'] for one in history if 'val/loss' in one))
        assert row['val/loss'] == least[-1]
    assert results['train']['setting'] == {'lr': (0.001, 0.3)[int(np.argmin(least))]}
    assert results['train']['tests'] == []
    sweep.show(settings, storage.place(tmp_path / 'w'), results)
    shown = capsys.readouterr().out
    assert 'nothing was tested' in shown and f'{min(least):.4f}' in shown
    assert 'Sweep' in report.document(str(tmp_path / 'w'))
    # Nothing was tested, so another choice is allowed; then the test is scored once.
    run(tmp_path / 'w', settings, 'lr=0.001,0.01,0.3')
    tested = load(more, {'schedule.name': 'constant'}, TEST)
    results = run(tmp_path / 'w', tested, 'lr=0.001,0.01,0.3')
    assert results['train']['metric'] == 'loss' and results['train']['count'] == 100
    step = checkpoint.locate(f'{tmp_path}/w/{results["train"]["trials"][0]}@best')[1]
    place = tmp_path / 'w' / results['train']['trials'][0]
    scored = evaluate.run(place, step, [('evals.test.split', 'test[:100]')])['test']['loss']
    assert results['train']['tests'] == [pytest.approx(scored)]
    chosen = results['train']['setting']['lr']
    others = ','.join(str(lr) for lr in (0.001, 0.01, 0.3) if lr != chosen)
    with pytest.raises(UserError, match='was scored with another choice for train'):
        run(tmp_path / 'w', tested, f'lr={others}')


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        ({'evals.val.split': None, 'evals.other.split': 'test'}, 'evals.val, which is not there'),
        ({'evals.val.split': 'train[40%:60%]'}, 'examples in common'),
        ({'transfer.validation': 'val/tp1'}, "did you mean 'val/top1'"),
        ({'transfer.test': 'tst'}, "transfer.test='tst' is no evaluation"),
        ({'evals.test.split': 'test', 'checkpoint.best': 'test/top1'}, 'must not choose by evals'),
        ({'evals.val.type': 'knn'}, 'evals.val.type must be classification'),
        ({'switch': 'runs/a'}, 'a sweep starts from init'),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(more, message, tmp_path):
    settings = load(more)
    if 'evals.other.split' in more:
        settings = settings.without('evals.val.')
    with pytest.raises(UserError, match=message):
        run(tmp_path / 'w', settings, 'lr=0.1,1')
    assert not (tmp_path / 'w').exists()


def test_the_metrics_that_choose_and_score():
    knn = {'evals.near.type': 'knn', 'evals.near.split': 'train[50%:70%]', **TEST}
    assert sweep.judges_of(load()) == ('val/top1', None)
    assert sweep.judges_of(load(TEST)) == ('val/top1', 'test/top1')
    assert sweep.judges_of(load(TEST, {'transfer.validation': 'val/loss'})) == (
        'val/loss',
        'test/loss',
    )
    by_neighbours = {'transfer.validation': 'near/20nn', 'transfer.test': 'test/top5'}
    assert sweep.judges_of(load(knn, by_neighbours)) == ('near/20nn', 'test/top5')


def test_a_result_without_a_test_is_read_and_one_of_before_is_of_top1(tmp_path):
    one = {'setting': {}, 'trials': ['a'], 'tests': []}
    (tmp_path / study.TEST).write_text(json.dumps({'train': one | {'metric': ''}}))
    results = study.tested(storage.place(tmp_path))
    assert results['train']['tests'] == [] and study.test_lines(results) == []
    (tmp_path / study.TEST).write_text(json.dumps({'control': one}))
    assert study.test_heads(study.tested(storage.place(tmp_path)))[2] == 'test top-1'
