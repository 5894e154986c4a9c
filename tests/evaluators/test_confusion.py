"""Figures by class are those of scikit-learn, for the examples that the evaluation scores."""

import csv
import json

import numpy as np
import pytest
from commands import error_line, run
from sklearn import metrics as sklearn_metrics
from tiny import write_folder

import big_vit
from big_vit import config, evaluate, train
from big_vit.errors import UserError
from big_vit.evaluators import confusion
from big_vit.evaluators.confusion import Judged


def judged_of(labels, predicted, classes):
    rng = np.random.default_rng(0)
    names = tuple(f'class{i}' for i in range(classes))
    losses, likely = rng.random((2, len(labels)))
    return Judged(np.arange(len(labels)), labels, predicted, losses, likely, names, len(labels))


@pytest.mark.parametrize('classes', [2, 7, 1000])
def test_figures_are_those_of_scikit_learn(classes):
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, 500)
    predicted = np.where(rng.random(500) < 0.6, labels, rng.integers(0, classes, 500))
    judged = judged_of(labels, predicted, classes)
    everything = np.arange(classes)
    counts = sklearn_metrics.confusion_matrix(labels, predicted, labels=everything)
    np.testing.assert_array_equal(confusion.matrix(judged), counts)
    assert judged.accuracy == pytest.approx(sklearn_metrics.accuracy_score(labels, predicted))
    wanted = sklearn_metrics.precision_recall_fscore_support(
        labels, predicted, labels=everything, zero_division=0
    )
    rows = confusion.figures(judged)
    occurring = {f'class{i}' for i in {*labels.tolist(), *predicted.tolist()}}
    assert {row.name for row in rows} == occurring
    for row in rows:
        number = int(row.name.removeprefix('class'))
        ours = row.precision, row.recall, row.f1, row.support
        np.testing.assert_allclose(ours, [values[number] for values in wanted], atol=1e-12)
        missed = np.delete(counts[number], number)
        assert row.times == missed.max()
        assert (row.taken_for == '') == (row.times == 0)
    assert [row.f1 for row in rows] == sorted(row.f1 for row in rows)
    pairs = confusion.confused(judged)
    assert sum(pair.times for pair in pairs) == (labels != predicted).sum()
    assert [pair.times for pair in pairs] == sorted((p.times for p in pairs), reverse=True)
    places = confusion.worst(judged, 5)
    wrong = labels != predicted
    np.testing.assert_array_equal(judged.losses[places], np.sort(judged.losses[wrong])[::-1][:5])


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    from test_predict import SETTINGS

    root = tmp_path_factory.mktemp('confusion')
    data = write_folder(root / 'data', examples=30)
    train.run(config.resolve({**SETTINGS, 'data.path': str(data)}), root / 'run')
    return root / 'run', data


@pytest.mark.slow
def test_a_judge_says_what_the_model_answers_and_the_evaluation_scores(trained):
    workdir, data = trained
    answered: dict = {}
    scores = evaluate.run(workdir, 8, answered=answered)['test']
    judged, opened = answered['test']
    assert judged.accuracy == pytest.approx(scores['top1'])
    assert judged.losses.mean() == pytest.approx(scores['loss'], rel=1e-4)
    assert judged.seen == scores['count'] == 30
    paths = sorted(map(str, data.rglob('*.jpg')))
    likely = big_vit.load(workdir)(paths)
    np.testing.assert_array_equal(judged.predicted, likely.argmax(1))
    np.testing.assert_allclose(judged.likely, likely.max(1), atol=1e-4)
    assert [opened.source.place(row) for row in judged.rows.tolist()] == paths
    some, shuffled = evaluate.judge(workdir, 8, seconds=0.0)['test']
    assert some.seen == 16  # A batch.
    for row, label, predicted in zip(some.rows, some.labels, some.predicted, strict=True):
        place = paths.index(shuffled.source.place(int(row)))
        assert (judged.labels[place], judged.predicted[place]) == (label, predicted)


@pytest.mark.slow
def test_a_subset_competes_alone(trained):
    workdir, _ = trained
    answered = {}
    overrides = [('evals.test.subset', "('class0', 'class2')")]
    scores = evaluate.run(workdir, 8, overrides, answered)['test']
    judged, _ = answered['test']
    assert {*judged.predicted.tolist()} <= {0, 2}
    assert judged.accuracy == pytest.approx(scores['top1'])


@pytest.mark.slow
def test_evaluate_writes_figures_of_each_class(trained, tmp_path, capsys):
    workdir, _ = trained
    evaluate.main(['--checkpoint', str(workdir), '--per-class', str(tmp_path / 'a.csv')])
    evaluate.main(['--checkpoint', str(workdir), '--per-class', str(tmp_path / 'a.json')])
    assert f'wrote   {tmp_path}/a.json' in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / 'a.csv').read_text().splitlines()))
    tree = json.loads((tmp_path / 'a.json').read_text())['test']
    assert sum(int(row['support']) for row in rows) == tree['examples'] == 30
    for row, figures in zip(rows, tree['classes'], strict=True):
        assert (row['evaluation'], row['class']) == ('test', figures['name'])
        assert float(row['f1']) == pytest.approx(figures['f1'])
    wrong = 30 - round(30 * tree['accuracy'])
    assert sum(pair['times'] for pair in tree['confused']) == wrong


@pytest.mark.slow
def test_what_has_no_figures_says_so(trained, tmp_path):
    workdir, _ = trained
    command = ['evaluate', '--checkpoint', workdir, '--per-class']
    line = error_line(run(*command, tmp_path / 'a.txt'))
    assert 'a.txt: name a .csv or .json file in a folder that is there' in line
    overrides = [('evals.test.transform', 'resize(size) | multihot(3) | normalize()')]
    answered = {}
    evaluate.run(workdir, 8, overrides, answered)  # One class each, as vectors.
    assert answered['test'][0].seen == 30
    with pytest.raises(UserError, match='no evaluation is of the accuracy of the head'):
        evaluate.write_per_class({}, tmp_path / 'a.csv')
