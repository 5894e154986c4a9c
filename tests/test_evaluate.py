"""Evaluations of a run, end to end: from config keys to numbers, on any number of devices."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run_many
from sklearn.neighbors import KNeighborsClassifier

from big_vit import checkpoint, config, evaluate, export, metrics, train, transfer
from big_vit.build import evaluations
from big_vit.build.evaluations import build_evaluators
from big_vit.build.experiment import all_batches, build_experiment, eval_batches
from big_vit.errors import UserError
from big_vit.evaluators import features, linear_grid, registry
from big_vit.explore import history_table
from big_vit.inspection import plots

TINY = {
    'total_steps': 6,
    'batch_size': 16,
    'image_size': 8,
    'lr': 1e-2,
    'model.variant': 'mu/4',
    'model.dtype': 'float32',
    'model.pool': 'cls',
    'model.depth': 2,
    'data.name': 'digits',
    'data.split': 'train[:400]',
    'data.transform': 'random_crop(size, 1)',
    'checkpoint.every_steps': 6,
    'log.every_steps': 3,
}
EVALS = {
    'test.split': 'test[:70]',
    'test.calibration': 'true',
    'test.per_class': 'all',
    'near.type': 'knn',
    'near.split': 'test[:70]',
    'near.k': '(1, 9)',
    'block.type': 'knn',
    'block.split': 'test[:70]',
    'block.blocks': '(-1, 0)',
    'block.pool': 'cls_gap',
    'block.k': '5',
    'few.type': 'fewshot',
    'few.split': 'test[:70]',
    'few.shots': '(1, 5)',
    'probe.type': 'linear_probe',
    'probe.split': 'test[:70]',
    'probe.l2': '0.01',
    'grid.type': 'linear_grid',
    'grid.split': 'test[:70]',
    'grid.rates': '(0.01, 0.3)',
    'grid.probe_updates': '20',
    'grid.probe_batch': '64',
    'find.type': 'retrieval',
    'find.split': 'test[:70]',
    'find.gallery_split': 'test[70:150]',
    'seen.type': 'representation',
    'seen.split': 'test[:90]',
    'seen.examples': '70',
    'seen.views': 'inception_crop(size) | flip_lr',
    'seen.lidar': '(21, 3)',
    'hard.type': 'robustness',
    'hard.split': 'test[:30]',
    'hard.corruptions': "('gaussian_noise', 'pixelate')",
    'hard.severities': '(1, 5)',
}
AT_THE_END = {f'{key.split(".")[0]}.every_steps': '6' for key in EVALS}
OVERRIDES = [(f'evals.{key}', value) for key, value in (EVALS | AT_THE_END).items()]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run that evaluates at its end, by all types."""
    workdir = tmp_path_factory.mktemp('trained') / 'w'
    train.run(config.override(config.resolve(TINY), OVERRIDES), workdir)
    return workdir


@pytest.fixture(scope='module')
def scored(trained):
    """The same by `evaluate`, on eight devices."""
    return evaluate.run(*checkpoint.locate(trained))


SPECTRA = ('rankme', 'lidar', 'std', 'cosine', 'alpha', 'alpha_r2')


def assert_alike(got, want):
    """Counts and answers to the bit, what is summed as floats to rounding."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        metric = name.rpartition('/')[2]
        near = metric in ('loss', 'nll', 'brier', 'ece', 'map', 'iterations', *SPECTRA)
        rel = {'iterations': 1, **dict.fromkeys(SPECTRA, 1e-4)}.get(metric, 1e-5)
        wanted = pytest.approx(value, rel=rel, abs=1e-6) if near else value
        assert got[name] == wanted, name


def test_training_logs_what_evaluate_finds_of_its_checkpoint(trained, scored):
    logged = metrics.latest(metrics.read(trained))
    assert list(scored) == ['test', 'near', 'block', 'few', 'probe', 'grid', 'find', 'seen', 'hard']
    found = {f'{name}/{k}': x for name, values in scored.items() for k, x in values.items()}
    assert_alike({n: x for n, x in logged.items() if not n.startswith('train/')}, found)
    assert found['near/count'] == found['few/count'] == found['probe/count'] == 70
    settings = config.override(config.resolve(TINY), OVERRIDES)
    for name in scored:  # What can be chosen by is what is measured.
        kind = settings.evals[name].peek('type') or 'classification'
        keys = evaluations._settings(settings, name, kind)
        scores = registry.requirements(kind).scores(**keys)
        assert scores and {f'{name}/{score}' for score in scores} <= found.keys()
    assert found['seen/count'] == 70 and 1 < found['seen/lidar'] < 20.01
    assert found['hard/count'] == 30 and found['find/back/count'] == 80
    assert {'test/ece', 'test/mean_per_class', 'test/top1/7', 'few/5shot_std'} <= set(found)
    assert found['near/9nn'] > 0.5 and found['few/5shot'] > 0.4 and found['probe/top1'] > 0.6


def alone(trained, overrides):
    """The evaluators of a config, its experiment, and the run's parameters on their devices."""
    settings = config.override(config.resolve(TINY), overrides)
    parts = build_experiment(settings)
    made = build_evaluators(settings, parts)
    params, _ = checkpoint.load_params(*checkpoint.locate(trained), 'params')
    return made, parts, params


def test_knn_of_the_frozen_model_is_scikit_learns_on_the_same_features(trained):
    overrides = [
        ('evals.near.type', 'knn'),
        ('evals.near.split', 'test[:70]'),
        ('evals.near.vote', 'uniform'),
        ('evals.near.k', '(1, 9)'),
    ]
    made, parts, params = alone(trained, overrides)
    got = made['near'](params, {})
    apply = jax.jit(parts.model.apply)

    def embedded(found):
        columns = found.source.load(np.arange(found.source.length))
        images = columns['image'].astype(np.float32) / 127.5 - 1
        # All at once, whatever the batches of the evaluation are.
        return apply({'params': params}, images)[1]['tokens'][:, 0], columns['label']

    gallery, keys = embedded(parts.references['near'])
    queries, labels = embedded(parts.evals['near'])
    assert len(gallery) == 400 and len(queries) == 70
    for k in (1, 9):
        judge = KNeighborsClassifier(k, metric='cosine', algorithm='brute').fit(gallery, keys)
        assert got[f'{k}nn'] == judge.score(queries, labels)


def test_features_of_a_split_are_computed_once_for_all_evaluations(trained, monkeypatch):
    chosen = [pair for pair in OVERRIDES if pair[0].split('.')[1] in ('near', 'few', 'block')]
    made, _, params = alone(trained, chosen)
    read, whole = [], all_batches

    def counted(parts, found):
        read.append((found.source.split, found.source.length))
        return whole(parts, found)

    monkeypatch.setattr(evaluations, 'all_batches', counted)
    shared: dict = {}
    for evaluator in made.values():
        evaluator(params, shared)
    # `block` has other features, so its own pass over both splits.
    assert sorted(read) == 2 * [('test[:70]', 70)] + 2 * [('train[:400]', 400)]


@pytest.mark.slow
def test_features_of_blocks_are_normed_and_pooled(trained):
    _, parts, params = alone(trained, [('evals.x.split', 'test[:16]')])
    batch = next(eval_batches(parts, 'x'))
    image = jnp.asarray(np.asarray(batch['image'], np.float32) / 127.5 - 1)
    of_last = features.of_blocks(parts.model, (1,), 'cls')(params, image)
    _, extra = parts.model.apply({'params': params}, image, capture=('blocks',))
    np.testing.assert_allclose(of_last, extra['tokens'][:, 0], atol=1e-6)
    both = features.of_blocks(parts.model, (0, 1), 'cls_gap')(params, image)
    assert both.shape == (16, 4 * 32)
    np.testing.assert_allclose(both[:, 96:], extra['tokens'][:, 1:].mean(1), atol=1e-5)
    first = np.asarray(extra['blocks'][0][:, 0], np.float64)
    first = first - first.mean(1, keepdims=True)
    first /= np.sqrt((first**2).mean(1, keepdims=True) + 1e-6)
    scale = params['Transformer']['encoder_norm']
    np.testing.assert_allclose(both[:, :32], first * scale['scale'] + scale['bias'], atol=1e-4)


@pytest.mark.slow
def test_one_device_and_eight_give_the_same(trained, scored, monkeypatch):
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, 'devices', lambda: first)
    found = evaluate.run(*checkpoint.locate(trained))
    for name, want in scored.items():
        assert_alike(found[name], want)


@pytest.mark.slow
def test_two_processes_give_the_same(trained, scored):
    first, second = run_many('evaluate', '--checkpoint', trained, '--json')
    found = json.loads(first.stdout.splitlines()[-1])
    for name, want in scored.items():
        assert_alike(found[name], want)
    assert 'top1' not in second.stdout


def test_the_tables_fit_whatever_was_measured(scored):
    text = evaluate.tables(scored)
    header = next(line for line in text.splitlines() if '1nn' in line)
    assert header.split() == ['evaluation', '1nn', '9nn', 'examples']
    assert f'{scored["near"]["9nn"]:.2%}' in text
    assert f'nll              {scored["test"]["nll"]:.4f}' in text  # Many metrics: a line each.
    counts = [line.split() for line in text.splitlines() if line.startswith('count')]
    assert counts[0] == ['count', '70']
    alike = {name: {'top1': 0.5, 'top5': 1.0, 'loss': 0.1, 'count': 3.0} for name in 'ab'}
    table = evaluate.tables(alike).splitlines()
    assert table[0].split() == ['evaluation', 'top-1', 'top-5', 'loss', 'examples']
    assert table[2].split() == ['a', '50.00%', '100.00%', '0.1000', '3'] and len(table) == 4


def test_reports_cope_with_evaluations_without_top1(trained, tmp_path, capsys):
    rows = metrics.read(trained)
    assert metrics.headlines(rows) == [
        'test/top1', 'near/1nn', 'block/5nn', 'few/1shot', 'probe/top1', 'grid/top1',
        'find/recall@1', 'seen/rankme', 'hard/mean',
    ]  # fmt: skip
    table = history_table(rows).splitlines()
    assert {'few/1shot', 'test/loss', 'train/lr'} <= set(table[0].split())
    only = [row for row in rows if not any(n.startswith('test/') for n in row)]
    assert len(history_table(only).splitlines()) == 3  # The last step, the one with evaluations.
    plots.curves({'': only}).save(tmp_path / 'curves.png')
    assert (tmp_path / 'curves.png').stat().st_size > 10_000
    last = metrics.latest(rows)
    shown = transfer.result_table({'pretrained': last, 'control': last}, ['test', 'near'])
    (line,) = (x for x in shown.splitlines() if x.startswith('from the checkpoint'))
    assert line.split()[3:5] == ['test', f'{last["test/top1"]:.2%}']
    (line,) = (x for x in shown.splitlines() if x.startswith('near') and ' 9nn ' in x)
    assert line.split() == ['near', '9nn', *2 * [f'{last["near/9nn"]:.2%}']]
    assert 'top-1' not in transfer.result_table({'pretrained': last}, ['near'])
    console = metrics.Console(6, 0, label='train')
    console.evaluation(6, 'test', {n[5:]: x for n, x in last.items() if n.startswith('test/')})
    out = capsys.readouterr().out
    assert 'top1 0.' in out and 'top1/' not in out and len(out.strip()) <= 80
    assert re.search(r'\(and 1\d more\)', out)  # Ten classes, and what did not fit.


WRONG = [
    ({'x.type': 'knnn'}, r"evals\.x\.type must be one of .* \(did you mean 'knn'\?\)"),
    ({'x.type': 'knn', 'x.shots': '3'}, r"evals\.x\.shots is read by type 'fewshot', but .* 'knn'"),
    ({'x.k': '3'}, r"evals\.x\.k is read by type 'knn', but evals\.x\.type is 'classification'"),
    ({'x.type': 'robustness', 'x.train_split': 'train'}, r'train_split is read by type'),
    (
        {'x.type': 'knn', 'x.k': '401'},
        r'evals\.x\.k=401 is more than the 400 examples .* at most 400',
    ),
    (
        {'x.type': 'knn', 'x.metric': 'euclidean', 'x.temperature': '0.1'},
        r"temperature is of vote='temperature' alone",
    ),
    (
        {'x.type': 'knn', 'x.metric': 'euclidean', 'x.vote': 'temperature'},
        r"vote='temperature' is of the cosine: set evals\.x\.vote='uniform'",
    ),
    (
        {'x.type': 'fewshot', 'x.train_split': 'train[:60]'},
        r'evals\.x\.shots=25, but class \d has \d example\(s\) .* set shots to at most',
    ),
    (
        {'x.type': 'fewshot', 'x.train_split': 'nope'},
        r"x\.train_split: there is no split 'nope'",
    ),
    (
        {'x.type': 'linear_probe', 'x.classes': '(3,)'},
        r'evals\.x\.train_split has examples of class 0 alone',
    ),
    (
        {'x.type': 'linear_probe', 'x.held_out': '0.0001'},
        r'evals\.x\.held_out=0\.0001 of 400 training examples are 0',
    ),
    ({'x.type': 'linear_grid', 'x.last_blocks': '3'}, r'last_blocks=3, but the model has 2 blocks'),
    ({'x.type': 'knn', 'x.blocks': '2'}, r'evals\.x\.blocks: there is no block 2: the 2 blocks'),
    (
        {'x.type': 'knn', 'x.pool': 'gap'},
        r'evals\.x\.pool is of evals\.x\.blocks, which is not set',
    ),
    ({'x.type': 'robustness', 'x.corruptions': 'saturate'}, r'saturate is of three channels'),
    ({'x.type': 'knn', 'x.transform': 'onehot(10)'}, r'leave out onehot or multihot'),
    ({'x.subset': "('x', 4)"}, r"evals\.x\.subset: the model has no class 'x'; it has 0 to 9"),
    ({'x.split': 'test[5:5]'}, r'holds no example'),
]


@pytest.mark.parametrize('changes, message', WRONG, ids=lambda x: str(x)[:60])
def test_what_a_user_can_put_wrong_is_said_before_anything_is_computed(changes, message):
    overrides = [(f'evals.{key}', value) for key, value in changes.items()]
    with pytest.raises(UserError, match=message):
        settings = config.override(config.resolve(TINY), overrides)
        build_evaluators(settings, build_experiment(settings))


def test_the_grid_takes_what_blocks_there_are():
    assert linear_grid.depths(None, 12, 'x') == (1, 4)
    assert linear_grid.depths(None, 2, 'x') == (1, 2) and linear_grid.depths(None, 1, 'x') == (1,)


def test_subsets_are_of_the_models_classes(trained):
    overrides = [
        ('evals.few.subset', '(0, 1, 8)'),
        ('evals.few.classes', '(0, 1)'),
        ('evals.there.subset', 'present'),
        ('evals.there.classes', '(0, 1)'),
    ]
    made, _, params = alone(trained, overrides)
    three, two = made['few'](params, {}), made['there'](params, {})
    assert three['count'] == two['count'] > 60
    assert two['top1'] >= three['top1'] and two['loss'] < three['loss']


def test_another_dataset_has_its_own_classes_and_training_split(trained):
    overrides = [
        ('evals.other.type', 'knn'),
        ('evals.other.name', 'fdsl'),
        ('evals.other.num_classes', '30'),
        ('evals.other.split', 'test[:40]'),
        ('evals.other.train_split', 'train[:90]'),
        ('evals.other.k', '1'),
    ]
    made, parts, params = alone(trained, overrides)
    assert parts.references['other'].source.num_classes == 30 > parts.data.source.num_classes
    found = made['other'](params, {})
    assert found['count'] == 40 and 0 < found['1nn'] < 1


def test_weights_of_another_codebase_are_evaluated(trained, tmp_path, scored, capsys):
    path = str(tmp_path / 'timm')
    export.main(['--checkpoint', str(trained), '--to', 'timm', '--out', path])
    near = [pair for pair in OVERRIDES if pair[0].split('.')[1] == 'near']
    data = [('data.name', 'digits'), ('data.split', 'train[:400]'), ('model.dtype', 'float32')]
    found = evaluate.run_weights(path, [*data, *near, ('evals.test.split', 'test[:70]')])
    assert_alike(found['near'], scored['near'])
    for name in ('top1', 'top5', 'count'):
        assert found['test'][name] == scored['test'][name]
    other = [('data.name', 'fdsl'), ('data.num_classes', '11'), ('evals.test.split', 'test[:9]')]
    with pytest.raises(UserError, match=r'test is of the head, .* 10 classes, but data has 11'):
        evaluate.run_weights(path, other)
    capsys.readouterr()
    with pytest.raises(UserError, match='has no evals; add one'):
        evaluate.run_weights(path, data)
