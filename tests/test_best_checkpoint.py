"""A best checkpoint by a metric is kept and found; early stopping ends a run, once for all."""

import numpy as np
import pytest
from commands import run, run_many
from test_train import CONFIG, TINY, hashes

from big_vit import checkpoint, config, evaluate, metrics, train
from big_vit.build.evaluations import build_evaluators
from big_vit.errors import UserError
from big_vit.pretrained.load import read_pretrained

TINY = {
    **TINY,
    'total_steps': 9,
    'evals.test.every_steps': 1,
    'checkpoint.every_steps': 100,
    'checkpoint.keep_last': 1,
    'checkpoint.best': 'test/top1',
}
SCORES = [0.1, 0.5, 0.4, 0.5, np.nan, 0.6, 0.2, 0.6, 0.5]


class Killed(Exception):
    """What ends a run at once."""


@pytest.fixture
def scripted(monkeypatch):
    """Makes runs whose evaluation at step n is SCORES[n - 1], and which die before some step."""

    def runs(workdir, scores=SCORES, dies_at=None, **more):
        steps = checkpoint.steps(workdir)
        left = iter(list(enumerate(scores, 1))[steps[-1] if steps else 0 :])

        def evaluator(params, shared):
            step, score = next(left)
            if step == dies_at:
                raise Killed
            return {'loss': 1.0, 'top1': score, 'top5': 1.0, 'count': 1.0}

        monkeypatch.setattr(train, 'build_evaluators', lambda *_: {'test': evaluator})
        return train.run(config.resolve({**TINY, **more}), workdir)

    return runs


@pytest.mark.slow
def test_the_best_is_kept_beside_the_last_whenever_the_run_is_killed(scripted, tmp_path, capsys):
    scripted(tmp_path / 'whole')
    assert checkpoint.steps(tmp_path / 'whole') == [6, 9]
    assert 'best    test/top1 60.00% at step 6' in capsys.readouterr().out
    assert checkpoint.locate(f'{tmp_path}/whole@best') == (tmp_path / 'whole', 6)
    for dies_at in (4, 7, 9):
        workdir = tmp_path / f'killed{dies_at}'
        with pytest.raises(Killed):
            scripted(workdir, dies_at=dies_at)
        best_yet = 2 if dies_at == 4 else 6
        assert checkpoint.locate(f'{workdir}:best')[1] == best_yet
        scripted(workdir)
        assert checkpoint.steps(workdir) == [6, 9]
        assert hashes(workdir, 6) == hashes(tmp_path / 'whole', 6)


@pytest.mark.slow
def test_early_stopping_ends_at_the_same_step_and_says_so_again(scripted, tmp_path, capsys):
    patience = {'early_stopping.patience': 3}
    assert scripted(tmp_path / 'whole', **patience).step == 5
    said = capsys.readouterr().out
    line = 'ends at step 5 of 9: for 3 evaluation(s) test/top1 was not better than 0.5000 of step 2'
    assert line in said and 'done    step 5' in said
    assert checkpoint.steps(tmp_path / 'whole') == [2, 5]
    with pytest.raises(Killed):
        scripted(tmp_path / 'killed', dies_at=4, **patience)
    assert scripted(tmp_path / 'killed', **patience).step == 5
    assert hashes(tmp_path / 'killed', 5) == hashes(tmp_path / 'whole', 5)
    rows = metrics.read(tmp_path / 'whole')
    capsys.readouterr()
    assert scripted(tmp_path / 'whole', **patience).step == 5  # It is over, and nothing is trained.
    said = capsys.readouterr().out
    assert line in said and 'compile' not in said and metrics.read(tmp_path / 'whole') == rows
    more = scripted(tmp_path / 'whole', **{'early_stopping.patience': 4})
    assert more.step == 9 and checkpoint.steps(tmp_path / 'whole') == [6, 9]


@pytest.mark.slow
def test_a_loss_is_best_where_it_is_least(tmp_path):
    settings = {'checkpoint.best': 'test/loss', 'lr': 0.1, 'total_steps': 6}
    train.run(config.resolve({**TINY, **settings}), tmp_path / 'w')
    points = [(row['test/loss'], row['step']) for row in metrics.read(tmp_path / 'w')
              if 'test/loss' in row]  # fmt: skip
    workdir, step = checkpoint.locate(f'{tmp_path}/w@best')
    assert step == min(points)[1]
    found = evaluate.run(workdir, step)['test']['loss']
    assert found == pytest.approx(min(points)[0], abs=1e-6)
    assert read_pretrained(f'{tmp_path}/w@best').where.endswith(f'/checkpoints/{step}')


def test_what_cannot_be_best_is_named_at_the_start(tmp_path):
    def refusal(**keys):
        with pytest.raises(UserError) as caught:
            train.run(config.resolve({**TINY, **keys}), tmp_path / 'w')
        assert not (tmp_path / 'w').exists()
        return str(caught.value)

    assert "did you mean 'test/top1'? There are test/top1, test/top5, test/loss" in refusal(
        **{'checkpoint.best': 'test/tp1'}
    )
    assert "'val/top1' is measured by no evaluation" in refusal(**{'checkpoint.best': 'val/top1'})
    assert 'say by which metric' in refusal(
        **{'checkpoint.best': None, 'early_stopping.patience': 2}
    )
    assert 'is never measured' in refusal(**{'evals.test.every_steps': 0})


@pytest.mark.slow
def test_a_run_without_a_choice_has_no_best(tmp_path):
    settings = {**TINY, 'checkpoint.best': None, 'total_steps': 1}
    train.run(config.resolve(settings), tmp_path / 'w')
    with pytest.raises(UserError, match=r'keeps no best checkpoint: its config sets no checkpoint'):
        checkpoint.locate(f'{tmp_path}/w@best')
    with pytest.raises(UserError, match='nowhere@best: no such folder'):
        checkpoint.locate(f'{tmp_path}/nowhere@best')


@pytest.mark.slow
def test_what_was_saved_before_it_was_asked_for_is_a_candidate(scripted, tmp_path):
    """Of the steps without a checkpoint there is none to keep."""
    scripted(
        tmp_path / 'w', total_steps=4, **{'checkpoint.best': None, 'checkpoint.every_steps': 4}
    )
    assert checkpoint.steps(tmp_path / 'w') == [4]
    scores = [0.1, 0.5, 0.4, 0.3, 0.2, 0.35, 0.2, 0.1]
    train_on = {'total_steps': 8, 'lr': 1e-2}
    file = tmp_path / 'w' / 'config.json'
    file.write_text(file.read_text().replace('"total_steps": 4', '"total_steps": 8'))
    rows = [row | ({'test/top1': scores[row['step'] - 1]} if 'test/top1' in row else {})
            for row in metrics.read(tmp_path / 'w')]  # fmt: skip
    (tmp_path / 'w' / 'metrics.jsonl').write_text(''.join(map(metrics.writer._line, rows)))
    scripted(tmp_path / 'w', scores, **train_on)
    assert checkpoint.locate(f'{tmp_path}/w@best')[1] == 6


@pytest.mark.slow
def test_evaluators_declare_what_they_measure(tmp_path):
    from test_evaluate import OVERRIDES
    from test_evaluate import TINY as SMALL

    from big_vit.build.evaluations import check_chosen
    from big_vit.build.experiment import build_experiment

    settings = config.override(config.resolve(SMALL), OVERRIDES)
    parts = build_experiment(settings)
    build_evaluators(settings, parts)
    with pytest.raises(UserError, match='There are') as caught:
        check_chosen(settings, parts, 'checkpoint.best', 'x')
    known = set(str(caught.value).rpartition('There are ')[2].split(', '))
    assert {'test/top1', 'test/ece', 'near/9nn', 'few/5shot', 'probe/top1', 'grid/held_out'} < known
    assert {'find/recall@1', 'find/map', 'hard/mean', 'hard/pixelate', 'hard/severity_5'} < known


@pytest.mark.slow
def test_two_processes_keep_and_end_as_one_does(tmp_path):
    (tmp_path / 'tiny.py').write_text(CONFIG)
    flags = ['--config', tmp_path / 'tiny.py', '--config.total_steps=40']
    flags += ['--config.lr=0.3', '--config.evals.test.every_steps=2']
    flags += ['--config.checkpoint.best=test/top1', '--config.early_stopping.patience=2']
    result = run('train', *flags, '--workdir', tmp_path / 'one', devices=2)
    assert result.returncode == 0, result.stderr
    ended = run_many('train', *flags, '--workdir', tmp_path / 'two', processes=2, devices=1)
    assert checkpoint.steps(tmp_path / 'one') == checkpoint.steps(tmp_path / 'two')
    best = [checkpoint.locate(f'{tmp_path}/{name}@best')[1] for name in ('one', 'two')]
    assert best[0] == best[1] and checkpoint.steps(tmp_path / 'one')[-1] < 40
    assert all('done    step' in one.stdout for one in ended)
