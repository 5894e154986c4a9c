"""What evaluators compute, against scikit-learn and against their laws written out here."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gate import mostly_slow
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from scipy import ndimage
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from big_vit import sharding
from big_vit.config import registries, schema_evals
from big_vit.errors import UserError
from big_vit.evaluators import (
    classification,
    fewshot,
    held_out_split,
    knn,
    linear_grid,
    linear_probe,
    retrieval,
    robustness,
    zero_shot,
)
from big_vit.evaluators.features import Features, gather

MANY = sharding.make_mesh(1, -1, 1)
ONE = sharding.make_mesh(1, 1, 1, jax.devices()[:1])


def clouds(examples, classes=5, width=12, seed=0, spread=1.5):
    """Features around a centre for each class, that overlap."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((classes, width))
    labels = rng.integers(0, classes, examples)
    values = centres[labels] + spread * rng.standard_normal((examples, width))
    return Features(values.astype(np.float32), labels)


TRAIN, TEST = clouds(700), clouds(301, seed=1)


def scores(module, reference, split, **settings):
    """`module.scores`, with the default of every config key that `settings` leaves out."""
    name = module.__name__.rpartition('.')[2]
    keys = inspect.signature(module.scores).parameters.keys() - settings.keys()
    defaults = {k: v for k, v in registries.EVALUATORS.keys(name).items() if k in keys}
    return module.scores(reference, split, **defaults, **settings)


# kNN.


@pytest.mark.parametrize('metric', ['cosine', 'euclidean'])
def test_neighbours_and_uniform_votes_are_those_of_scikit_learn(metric):
    distance, at = knn.neighbours(TEST.values, TRAIN.values, 7, MANY, metric)
    theirs = NearestNeighbors(n_neighbors=7, metric=metric, algorithm='brute')
    theirs.fit(TRAIN.values.astype(np.float64))
    want, want_at = theirs.kneighbors(TEST.values.astype(np.float64))
    np.testing.assert_array_equal(at, want_at)
    np.testing.assert_allclose(distance, want, atol=1e-5)
    for k in (1, 7):
        judge = KNeighborsClassifier(k, metric=metric, algorithm='brute')
        score = judge.fit(TRAIN.values, TRAIN.labels).score(TEST.values, TEST.labels)
        got = scores(knn, TRAIN, TEST, mesh=MANY, k=(k,), metric=metric, vote='uniform')
        assert got == {f'{k}nn': pytest.approx(score, abs=1e-12), 'count': 301}
        assert 0.3 < score < 0.9


def test_votes_of_a_temperature_are_those_of_dino():
    # Of DINO's own formulation: each neighbour counts exp(cosine / 0.07).
    a, b = (v.astype(np.float64) for v in (TEST.values, TRAIN.values))
    cosine = (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (
        b / np.linalg.norm(b, axis=1, keepdims=True)
    ).T
    right = 0
    for row, label in zip(cosine, TEST.labels, strict=True):
        counts = np.zeros(5)
        for i in np.argsort(-row)[:20]:
            counts[TRAIN.labels[i]] += np.exp(row[i] / 0.07)
        right += counts.argmax() == label
    got = scores(knn, TRAIN, TEST, mesh=MANY, k=(20,))
    assert got['20nn'] == pytest.approx(right / 301, abs=1e-12)
    uniform = scores(knn, TRAIN, TEST, mesh=MANY, k=(20,), vote='uniform')
    assert uniform['20nn'] != got['20nn']
    cold = scores(knn, TRAIN, TEST, mesh=MANY, k=(20,), temperature=1e-3)
    assert cold['20nn'] == scores(knn, TRAIN, TEST, mesh=MANY, k=(1,))['1nn']


@pytest.mark.parametrize('metric', ['cosine', 'euclidean'])
def test_one_device_and_eight_find_the_same_bits_over_several_blocks(metric):
    gallery = clouds(9 * 1024 + 5, seed=3).values
    gallery[5000:5010] = gallery[17]  # Ties, across devices.
    queries = np.concatenate([TEST.values, gallery[17:18]])
    one, many = (knn.neighbours(queries, gallery, 12, mesh, metric) for mesh in (ONE, MANY))
    np.testing.assert_array_equal(one[0], many[0])
    np.testing.assert_array_equal(one[1], many[1])
    assert many[1][-1, :11].tolist() == [17, *range(5000, 5010)]
    want = NearestNeighbors(n_neighbors=1, metric=metric, algorithm='brute').fit(gallery)
    nearest = want.kneighbors(TEST.values)[1][:, 0]
    assert (many[1][:-1, 0] == nearest).mean() > 0.99


def test_of_classes_with_the_same_votes_the_lower_number_wins():
    found = knn.votes(np.zeros((1, 4)), np.array([[3, 1, 1, 3]]), 4, None)
    assert found.tolist() == [[0, 2, 0, 2]] and found.argmax() == 1


def test_a_zero_vector_and_a_label_that_training_lacks_are_no_trouble():
    queries = np.concatenate([TEST.values, np.zeros((1, 12), np.float32)])
    distance, _ = knn.neighbours(queries, TRAIN.values, 3, MANY)
    assert np.isfinite(distance).all() and (distance[-1] == 1).all()
    strange = Features(TEST.values, np.full(301, 77))
    assert scores(knn, TRAIN, strange, mesh=MANY, k=(3,))['3nn'] == 0


# Few-shot.


def big_visions_answers(x, y, test, classes, l2):
    """The law once more, by an eigendecomposition as big_vision has it."""
    x, test = x.astype(np.float64), test.astype(np.float64)
    mean, deviation = x.mean(0), np.sqrt(((x - x.mean(0)) ** 2).mean(0)) + 1e-5
    x, test = (x - mean) / deviation, (test - mean) / deviation
    x = np.hstack([x, np.full((len(x), 1), 100.0)])
    test = np.hstack([test, np.full((len(test), 1), 100.0)])
    targets = -np.ones((len(x), classes))
    for i, label in enumerate(y):
        targets[i, label] = 1
    values, vectors = np.linalg.eigh(x.T @ x)
    weights = vectors @ np.diag(1 / (values + l2)) @ vectors.T @ x.T @ targets
    return test @ weights


@pytest.mark.parametrize('shots', [1, 2, 25])
@pytest.mark.parametrize('l2', [1024.0, 1.0])
def test_few_shot_answers_are_those_of_big_visions_law(shots, l2):
    rows = fewshot.draw(TRAIN.labels, shots, 0)
    x, y = TRAIN.values[rows], TRAIN.labels[rows]
    got = fewshot.scores_of(x, y, TEST.values, 5, l2=l2)
    want = big_visions_answers(x, y, TEST.values, 5, l2)
    np.testing.assert_allclose(got, want, atol=1e-8)
    plain = fewshot.scores_of(x, y, TEST.values, 5, l2=l2, whiten=False)
    assert np.abs(plain - want).max() > 1e-3
    got = scores(fewshot, TRAIN, TEST, shots=(shots,), seeds=1, l2=(l2,))
    assert got[f'{shots}shot'] == (want.argmax(1) == TEST.labels).mean()


@pytest.mark.parametrize('examples', [40, 9])
def test_the_ridge_is_that_of_scikit_learn_on_both_sides_of_square(examples):
    x, y = TRAIN.values[:examples], np.eye(5)[TRAIN.labels[:examples]]
    theirs = Ridge(alpha=0.7, fit_intercept=False, solver='svd').fit(x.astype(np.float64), y)
    np.testing.assert_allclose(fewshot.ridge(x, y, 0.7), theirs.coef_.T, atol=1e-9)


def test_shots_are_drawn_by_class_and_seed_and_averaged():
    chosen = fewshot.draw(TRAIN.labels, 3, 1)
    assert np.bincount(TRAIN.labels[chosen]).tolist() == [3] * 5 and len(set(chosen)) == 15
    assert set(chosen) != set(fewshot.draw(TRAIN.labels, 3, 2))
    assert set(fewshot.draw(TRAIN.labels, 1, 1)) < set(chosen)
    each = []
    for seed in range(4):
        rows = fewshot.draw(TRAIN.labels, 5, seed)
        answers = big_visions_answers(TRAIN.values[rows], TRAIN.labels[rows], TEST.values, 5, 1024)
        each.append((answers.argmax(1) == TEST.labels).mean())
    got = scores(fewshot, TRAIN, TEST, shots=(5, 10), seeds=4)
    assert got['5shot'] == pytest.approx(np.mean(each), abs=1e-12)
    assert got['5shot_std'] == pytest.approx(np.std(each), abs=1e-12)
    assert set(got) == {'5shot', '5shot_std', '10shot', '10shot_std', 'count'}
    several = scores(fewshot, TRAIN, TEST, shots=(5,), seeds=4, l2=(64.0, 1024.0))
    assert several['5shot_l2_1024'] == got['5shot']


# Linear probes.


def centred(decisions):
    """Softmax does not see what all classes have in common."""
    return decisions - decisions.mean(axis=1, keepdims=True)


@pytest.mark.parametrize('l2', mostly_slow([1e-3, 1.0], 1.0))
def test_logistic_regression_is_that_of_scikit_learn(l2):
    x = TRAIN.values.astype(np.float64)
    theirs = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-12, max_iter=500, solver='newton-cg')
    want = theirs.fit(x, TRAIN.labels).decision_function(TEST.values)
    with jax.enable_x64(True):
        kernel, bias, count = linear_probe.fit(x, TRAIN.labels, 5, l2, MANY, tolerance=1e-10)
    assert kernel.dtype == np.float64 and 5 < count < 500
    np.testing.assert_allclose(centred(TEST.values @ kernel + bias), centred(want), atol=1e-6)
    kernel, bias, _ = linear_probe.fit(TRAIN.values, TRAIN.labels, 5, l2, MANY)
    assert kernel.dtype == np.float32
    np.testing.assert_allclose(centred(TEST.values @ kernel + bias), centred(want), atol=5e-3)
    answers = (TEST.values @ kernel + bias).argmax(1)
    assert (answers == want.argmax(1)).mean() > 0.99


@pytest.mark.slow
def test_the_penalty_is_chosen_on_examples_that_were_held_out_and_not_on_the_test():
    penalties = (1e-4, 10.0)
    got = scores(linear_probe, TRAIN, TEST, mesh=MANY, l2=penalties, held_out=0.25, seed=3)
    train, _ = (v.astype(np.float64) for v in linear_probe.standardised(TRAIN, TEST))
    rest, held = held_out_split.split(700, 0.25, 3)
    assert len(held) == 175 and not set(rest) & set(held) and len({*rest, *held}) == 700
    shares = []
    for penalty in penalties:
        judge = LogisticRegression(C=1 / (penalty * len(rest)), tol=1e-8, max_iter=500)
        judge.fit(train[rest], TRAIN.labels[rest])
        shares.append(judge.score(train[held], TRAIN.labels[held]))
    assert got['held_out'] == pytest.approx(max(shares), abs=0.012)
    assert got['l2'] == penalties[int(np.argmax(shares))]
    wrong = TEST._replace(labels=(TEST.labels + 1) % 5)
    other = scores(linear_probe, TRAIN, wrong, mesh=MANY, l2=penalties, held_out=0.25, seed=3)
    assert other['l2'] == got['l2'] and other['top1'] < got['top1']


@pytest.mark.slow
def test_one_device_and_eight_fit_the_same_classifier():
    found = [
        scores(linear_probe, TRAIN, TEST, mesh=mesh, l2=(1e-2,), seed=0) for mesh in (ONE, MANY)
    ]
    assert found[0]['top1'] == found[1]['top1'] and 'held_out' not in found[0]


def one_head(x, labels, classes, rate, steps, batch, seed):
    """SGD of one classifier alone, its gradient by hand."""
    rng = np.random.default_rng(seed)
    kernel = (0.01 * rng.standard_normal((x.shape[1], classes))).astype(np.float32)
    kernel, bias = kernel.astype(np.float64), np.zeros(classes)
    momenta, order = [np.zeros_like(kernel), np.zeros_like(bias)], []
    for step in range(steps):
        while len(order) < batch:
            order = [*order, *rng.permutation(len(labels))]
        rows, order = order[:batch], order[batch:]
        logits = x[rows] @ kernel + bias
        error = np.exp(logits - logits.max(1, keepdims=True))
        error = error / error.sum(1, keepdims=True) - np.eye(classes)[labels[rows]]
        grads = x[rows].T @ error / batch, error.mean(0)
        now = rate * batch / 256 * (1 + np.cos(np.pi * step / steps)) / 2
        momenta = [0.9 * m + g for m, g in zip(momenta, grads, strict=True)]
        kernel, bias = kernel - now * momenta[0], bias - now * momenta[1]
    return kernel, bias


def test_heads_that_are_trained_at_once_are_those_trained_alone():
    rates = (0.01, 1.0)
    xs = [TRAIN.values.astype(np.float32)]
    (heads,) = linear_grid.fit(xs, TRAIN.labels, 5, rates, mesh=MANY, steps=30, batch=64, seed=4)
    for i, rate in enumerate(rates):
        kernel, bias = one_head(xs[0].astype(np.float64), TRAIN.labels, 5, rate, 30, 64, 4)
        np.testing.assert_allclose(heads['kernel'][i], kernel, atol=2e-5)
        np.testing.assert_allclose(heads['bias'][i], bias, atol=2e-5)


def test_the_grid_joins_last_blocks_and_picks_the_best_on_held_out_examples():
    # Two blocks of a class token and a mean of 3 numbers each: 12 in all.
    inputs = linear_grid.inputs(TRAIN.values, (1, 2), 2, 2)
    values = TRAIN.values
    np.testing.assert_array_equal(inputs[1, False], values[:, 6:9])
    np.testing.assert_array_equal(inputs[2, False], values[:, [0, 1, 2, 6, 7, 8]])
    np.testing.assert_array_equal(inputs[1, True], values[:, 6:12])
    np.testing.assert_array_equal(inputs[2, True], values[:, [0, 1, 2, *range(6, 12)]])
    found = scores(linear_grid,
        TRAIN, TEST, mesh=MANY, rates=(1e-6, 0.3), last_blocks=(1, 2), probe_updates=80,
        probe_batch=128, blocks=2, tokens=2, held_out=0.1, seed=0,
    )  # fmt: skip
    assert found['rate'] == 0.3 and found['last_blocks'] == 2 and found['mean_joined'] == 1
    judge = LogisticRegression(C=100, max_iter=500).fit(inputs[2, True], TRAIN.labels)
    tested = linear_grid.inputs(TEST.values, (2,), 2, 2)[2, True]
    assert found['top1'] == pytest.approx(judge.score(tested, TEST.labels), abs=0.04)
    assert found['held_out'] > 0.4


# Retrieval and zero-shot.


def brute_force(queries, gallery, same):
    recalls, averages = {1: [], 5: [], 10: []}, []
    for i, (query, label) in enumerate(zip(*queries, strict=True)):
        near = [
            (-np.dot(query, other) / np.linalg.norm(query) / np.linalg.norm(other), j)
            for j, other in enumerate(gallery.values.astype(np.float64))
            if not (same and i == j)
        ]
        hits = [gallery.labels[j] == label for _, j in sorted(near)]
        if not any(hits):
            continue
        for k, found in recalls.items():
            found.append(any(hits[:k]))
        averages.append(average_precision_score(hits, [-rank for rank in range(len(hits))]))
    return {f'recall@{k}': np.mean(v) for k, v in recalls.items()} | {'map': np.mean(averages)}


@pytest.mark.parametrize('same', [False, True])
def test_retrieval_is_what_a_loop_over_pairs_finds(same):
    queries, gallery = clouds(70, 9, 6), clouds(90, 9, 6, seed=1)
    queries.labels[:4] = 55  # Nothing there to be found.
    gallery = queries if same else gallery
    if same:
        queries.labels[0] = 56
    wanted = brute_force(queries, gallery, same)
    both = [scores(retrieval, gallery, queries, mesh=m, same=same) for m in (ONE, MANY)]
    assert both[0] == both[1]
    for name, value in wanted.items():
        assert both[1][name] == pytest.approx(value, abs=1e-6), name
    assert both[1]['count'] == (69 if same else 66)
    if not same:
        back = brute_force(gallery, queries, False)
        assert {n: both[1][f'back/{n}'] for n in back} == pytest.approx(back, abs=1e-6)


def test_retrieval_between_splits_that_share_no_label_is_an_error():
    with pytest.raises(UserError, match='no example of one split has a label of the other'):
        scores(retrieval, TRAIN, TEST._replace(labels=TEST.labels + 5), mesh=MANY)


def test_zero_shot_by_ensembles_of_prompts():
    rng = np.random.default_rng(0)
    prompts, images = rng.standard_normal((6, 3, 8)), rng.standard_normal((50, 8))
    labels = rng.integers(0, 6, 50)
    right = {1: 0, 5: 0}
    for image, label in zip(images, labels, strict=True):
        near = []
        for own in prompts:
            mean = sum(p / np.sqrt((p**2).sum()) for p in own) / 3
            near.append(mean @ image / np.sqrt((mean**2).sum()))
        for k in right:
            right[k] += label in np.argsort(near)[::-1][:k]
    got = zero_shot.scores(images, labels, zero_shot.ensemble(prompts))
    assert got == {'top1': right[1] / 50, 'top5': right[5] / 50, 'count': 50}
    assert 0 < right[1] < right[5] < 50
    # A long prompt counts no more than a short one.
    longer = prompts * np.array([100, 1, 1]).reshape(1, 3, 1)
    assert zero_shot.scores(images, labels, zero_shot.ensemble(longer)) == got
    collapsed = zero_shot.scores(images, labels, np.ones((6, 8)))
    assert collapsed['top1'] == collapsed['top5'] == 0


# Classification.


def classified(logits, labels, mask=None, **options):
    """`classification.run` of given logits in batches of 7, the last one padded."""
    names = options.pop('names', ())
    step = jax.jit(classification.sums(lambda params, x: (x, {}), **options))
    count = -len(logits) % 7
    columns = {
        'image': np.pad(logits.astype(np.float32), ((0, count), (0, 0))),
        'label': np.pad(labels, [(0, count)] + [(0, 0)] * (labels.ndim - 1)),
        'mask': np.pad(np.ones(len(logits), np.float32), (0, count)),
    }
    batches = [
        {name: jnp.asarray(x[i : i + 7]) for name, x in columns.items()}
        for i in range(0, len(columns['mask']), 7)
    ]
    return classification.run(step, None, batches, names)


@pytest.fixture(scope='module')
def guesses():
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 6, 130).astype(np.int32)
    logits = 2 * rng.standard_normal((130, 6)) + 1.5 * np.eye(6)[labels]
    logits[:20] = 30 * np.eye(6)[labels[:20]]  # Certain: in the last bin, at its edge.
    return logits.astype(np.float32), labels


def test_calibration_is_what_a_loop_over_bins_finds(guesses):
    logits, labels = guesses
    wide = logits.astype(np.float64)
    probability = np.exp(wide) / np.exp(wide).sum(1, keepdims=True)
    sure, answers = probability.max(1), probability.argmax(1)
    ece = 0.0
    for i in range(15):
        inside = [j for j in range(130) if i / 15 < sure[j] <= (i + 1) / 15]
        if inside:
            right = np.mean([answers[j] == labels[j] for j in inside])
            ece += len(inside) / 130 * abs(right - np.mean(sure[inside]))
    brier = np.mean(
        [((p - np.eye(6)[y]) ** 2).sum() for p, y in zip(probability, labels, strict=True)]
    )
    nll = -np.mean([np.log(p[y]) for p, y in zip(probability, labels, strict=True)])
    got = classified(logits, labels, calibration=True)
    assert ece > 0.02
    assert got['ece'] == pytest.approx(ece, abs=1e-6)
    assert got['brier'] == pytest.approx(brier, abs=1e-6)
    assert got['nll'] == pytest.approx(nll, abs=1e-6) == got['loss']
    plain = classified(logits, labels)
    assert plain == {name: got[name] for name in ('loss', 'top1', 'top5', 'count')}
    assert plain['count'] == 130


def test_accuracy_by_class(guesses):
    logits, labels = guesses
    labels = np.where(labels == 2, 1, labels)
    names = [f'c{i}' for i in range(6)]
    got = classified(logits, labels, per_class=True, names=names)
    answers, shares = logits.argmax(1), {}
    for c in (0, 1, 3, 4, 5):
        shares[f'top1/c{c}'] = float(np.mean(answers[labels == c] == c))
    assert {n: x for n, x in got.items() if '/' in n} == pytest.approx(shares)
    assert got['mean_per_class'] == pytest.approx(np.mean(list(shares.values())))
    assert got['mean_per_class'] != pytest.approx(got['top1'])


REAL = [  # (right labels, logits, whether ImageNet-ReaL counts a hit)
    ([0], [3, 1, 2, 0], True),
    ([1, 2], [1, 2, 3, 0], True),
    ([1, 2], [1, 3, 2, 0], True),
    ([1, 2], [4, 3, 2, 0], False),
    ([3], [0, 1, 2, 1], False),
    ([], [5, 1, 2, 0], None),
    ([0, 1, 2, 3], [0, 0, 0, 1], True),
    ([], [0, 1, 2, 9], None),
]


def test_real_counts_a_hit_in_the_set_and_leaves_out_what_has_no_label():
    logits = np.array([logits for _, logits, _ in REAL], np.float32)
    labels = np.array([[c in right for c in range(4)] for right, _, _ in REAL], np.float32)
    hits = [hit for _, _, hit in REAL if hit is not None]
    got = classified(logits, labels, skip_unlabelled=True)
    assert got['count'] == len(hits) == 6 and got['top1'] == pytest.approx(sum(hits) / 6)
    all_of_them = classified(logits, labels)
    assert all_of_them['count'] == 8 and all_of_them['top1'] == pytest.approx(sum(hits) / 8)


def test_in_a_subset_other_classes_do_not_compete(guesses):
    logits, labels = guesses
    chosen = [1, 4, 5]
    inside = np.isin(labels, chosen)
    answers = np.array(chosen)[logits[:, chosen].argmax(1)]
    got = classified(logits, labels, subset=(1, 4, 5))
    assert got['top1'] == pytest.approx((answers == labels).mean())
    got = classified(logits[inside], labels[inside], subset=(1, 4, 5))
    assert got['top1'] == pytest.approx((answers == labels)[inside].mean())
    assert got['top1'] > classified(logits[inside], labels[inside])['top1']
    narrow = logits[inside][:, chosen].astype(np.float64)
    own = np.searchsorted(chosen, labels[inside])
    want = np.log(np.exp(narrow).sum(1)) - narrow[np.arange(len(own)), own]
    assert got['loss'] == pytest.approx(want.mean(), abs=1e-5)
    skipping = classified(logits, labels, subset=(1, 4, 5), per_class=True)
    assert skipping['count'] == 130 and skipping['mean_per_class'] > got['top1'] - 0.2


# Features.


def test_features_come_once_in_order_without_padding():
    order = np.arange(10, dtype=np.float32)[:, None] * np.ones((1, 3), np.float32)

    def batches():
        for start in range(0, 12, 4):
            rows = slice(start, start + 4)
            real = (np.arange(12)[rows] < 10) & (np.arange(12)[rows] != 6)
            values = np.pad(order, ((0, 2), (0, 0)))[rows]
            labels = np.arange(12, dtype=np.int32)[rows]
            yield {'values': values, 'label': labels, 'mask': real.astype(np.float32)}

    def as_it_is(params, batch):
        return {name: jnp.asarray(x) for name, x in batch.items()}

    found = gather(as_it_is, None, batches(), 'evals.x')
    want = [i for i in range(10) if i != 6]
    assert found.labels.tolist() == want and found.values[:, 1].tolist() == want
    with pytest.raises(UserError, match=r'evals\.x: the split has no example'):
        gather(as_it_is, None, [], 'evals.x')
    wild = [{**batch, 'values': batch['values'] * np.nan} for batch in batches()]
    with pytest.raises(UserError, match='not finite'):
        gather(as_it_is, None, wild, 'evals.x')


# Corruptions.


@pytest.fixture(scope='module')
def pictures():
    """Coarse coloured blots with fine grain, uint8 [3, 32, 48, 3]."""
    rng = np.random.default_rng(2)
    coarse = jnp.asarray(rng.uniform(0.1, 0.9, (3, 4, 6, 3)))
    smooth = np.asarray(jax.image.resize(coarse, (3, 32, 48, 3), 'cubic'))
    grained = smooth + 0.08 * rng.standard_normal(smooth.shape)
    return (255 * np.clip(grained, 0, 1)).astype(np.uint8)


@pytest.fixture(scope='module')
def corrupt():
    return robustness.make_corrupt(ONE, 0)


def test_the_schema_names_all_corruptions():
    assert tuple(robustness.FORMULAS) == schema_evals.CORRUPTIONS


@pytest.mark.parametrize(
    'name',
    mostly_slow(
        robustness.FORMULAS,
        *('gaussian_blur', 'brightness', 'translation'),
    ),
)
def test_corruptions_grow_with_severity_and_do_not_depend_on_the_batch(name, pictures, corrupt):
    if 'blur' in name:  # Of few pixels, a blur that is scaled leaves nearly all as it is.
        pictures = np.tile(pictures, (1, 4, 3, 1))
    index = np.array([4, 0, 11])
    every = [np.asarray(corrupt(pictures, index, np.int32(s), name=name)) for s in (1, 2, 3, 4, 5)]
    away = [np.abs(x.astype(float) - pictures).mean() for x in every]
    # Saturation is taken away at first, and added from the third on.
    sides = (away[:2], away[2:]) if name == 'saturate' else (away,)
    for side in sides:
        assert all(b > a for a, b in itertools.pairwise(side)), away
    assert every[0].dtype == np.uint8 and away[0] > 0.5
    other = corrupt(pictures[::-1], index[::-1], np.int32(3), name=name)
    np.testing.assert_array_equal(np.asarray(other)[::-1], every[2])
    alone = robustness.make_corrupt(MANY, 0)
    eight = np.concatenate([pictures, pictures[:1], pictures, pictures[:1]])
    wide = np.asarray(alone(eight, np.array([4, 0, 11, 5, 6, 7, 8, 9]), np.int32(3), name=name))
    np.testing.assert_array_equal(wide[:3], every[2])
    random = name.endswith('noise') or name in ('haze', 'occlusion', 'translation')
    assert (wide[3] != wide[0]).any() == random  # The same picture at another place.
    assert (wide[0] != np.asarray(robustness.make_corrupt(ONE, 1)(
        pictures, index, np.int32(3), name=name))[0]).any() == random  # fmt: skip


def float_of(function, image, severity, key=0):
    return np.asarray(function(jnp.asarray(image), jax.random.key(key), jnp.asarray(severity - 1)))


@pytest.mark.slow
def test_noises_have_the_moments_of_their_formulas():
    grey = np.full((64, 64, 3), 0.5, np.float32)
    r = robustness
    assert float_of(r.gaussian_noise, grey, 3).std() == pytest.approx(0.18, rel=0.03)
    assert float_of(r.speckle_noise, grey, 5).std() == pytest.approx(0.3, rel=0.03)
    shot = float_of(r.shot_noise, grey, 4)
    assert shot.std() == pytest.approx(np.sqrt(0.5 / 5), rel=0.03)
    np.testing.assert_allclose(shot * 5, np.round(shot * 5), atol=1e-5)
    impulse = float_of(r.impulse_noise, grey, 5)
    assert (impulse == 0).mean() == pytest.approx(0.135, abs=0.01)
    assert (impulse == 1).mean() == pytest.approx(0.135, abs=0.01)


def test_colours_change_as_in_hsv(pictures):
    image = pictures[0].astype(np.float32) / 255
    image[:2] = 0.25  # Grey, whose hue counts as red.
    image[2] = 0  # Black.
    hue, saturation, value = np.moveaxis(rgb_to_hsv(image), -1, 0)
    for severity, (c, times, plus) in enumerate(
        zip((0.1, 0.2, 0.3, 0.4, 0.5), (0.3, 0.1, 2, 5, 20), (0, 0, 0, 0.1, 0.2), strict=True), 1
    ):
        brighter = hsv_to_rgb(np.stack([hue, saturation, np.clip(value + c, 0, 1)], -1))
        got = float_of(robustness.brightness, image, severity)
        np.testing.assert_allclose(got, brighter, atol=1e-5)
        fuller = np.clip(saturation * times + plus, 0, 1)
        want = hsv_to_rgb(np.stack([hue, fuller, value], -1))
        got = float_of(robustness.saturate, image, severity)
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_blurs_are_those_of_scipy_scaled_to_the_side(pictures):
    image = np.concatenate([pictures[0]] * 2).astype(np.float32) / 255
    image = np.concatenate([image, image, image], axis=1)[:, :112]
    assert image.shape == (64, 112, 3)
    for severity, sigma in ((1, 1), (5, 6)):
        scaled = sigma * 64 / 224
        want = ndimage.gaussian_filter(image, (scaled, scaled, 0), mode='nearest', truncate=4)
        got = float_of(robustness.gaussian_blur, image, severity)
        np.testing.assert_allclose(got, want, atol=1e-5)
    # Three pixels on each side of the middle.
    image = np.concatenate([image, image, image, image[:32]])
    image = np.concatenate([image, image], axis=1)
    assert image.shape == (224, 224, 3)
    want = ndimage.uniform_filter(image, (7, 7, 1), mode='nearest')
    np.testing.assert_allclose(float_of(robustness.box_blur, image, 1), want, atol=1e-5)


def test_pixelate_takes_means_of_areas(pictures):
    image = pictures[0].astype(np.float32) / 255
    want = image.reshape(16, 2, 24, 2, 3).mean((1, 3)).repeat(2, 0).repeat(2, 1)
    np.testing.assert_allclose(float_of(robustness.pixelate, image, 2), want, atol=1e-5)
    # To 19 rows of 32 pixels: each has the pixels that it covers, by how much.
    few, rows = int(32 * 0.6), image[:, :1, :1]
    fine = rows.repeat(few, axis=0).reshape(few, 32, 1, 1).mean(1)
    tall = np.repeat(rows, 32, axis=1)
    got = float_of(robustness.pixelate, tall, 1)[:, 0, 0]
    at = ((np.arange(32) + 0.5) * few / 32).astype(int)
    np.testing.assert_allclose(got, fine[at, 0, 0], atol=1e-5)


@pytest.mark.slow
def test_contrast_haze_occlusion_and_translation_by_hand(pictures):
    image = pictures[0].astype(np.float32) / 255
    mean = image.mean((0, 1))
    got = float_of(robustness.contrast, image, 2)
    np.testing.assert_allclose(got, (image - mean) * 0.3 + mean, atol=1e-6)
    most, dark = image.max(), float_of(robustness.haze, image, 1)
    field = (dark * (most + 1.5) / most - image) / 1.5
    assert field.min() == pytest.approx(0, abs=1e-4) and field.max() == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(field[..., 0], field[..., 2], atol=1e-5)
    box = (float_of(robustness.occlusion, image, 5) != image).all(-1)
    assert box.mean() == pytest.approx(0.5, abs=0.04)
    rows, columns = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
    assert len(rows) == np.ptp(rows) + 1 == 23 and len(columns) == np.ptp(columns) + 1 == 34
    moved = [float_of(robustness.translation, image + 1, 4, key) for key in range(6)]
    for x in moved:
        real = x[..., 0] > 0
        rows, columns = (32 - real.any(1).sum()), (48 - real.any(0).sum())
        assert np.hypot(rows, columns) == pytest.approx(0.2 * 32, abs=0.8)
    assert len({x.tobytes() for x in moved}) == 6


@pytest.mark.slow
def test_grey_images_have_all_corruptions_but_that_of_colour(pictures, corrupt):
    names = robustness.choose_corruptions(None, 1, 'evals.x')
    assert set(robustness.FORMULAS) - set(names) == {'saturate'}
    with pytest.raises(UserError, match=r'evals\.x\.corruptions: saturate is of three channels'):
        robustness.choose_corruptions(('contrast', 'saturate'), 1, 'evals.x')
    grey = pictures[..., :1]
    for name in ('brightness', 'haze'):
        made = corrupt(grey, np.arange(3), np.int32(2), name=name)
        assert made.shape == grey.shape and (np.asarray(made) != grey).any()


def test_robustness_averages_top1_over_corruptions_and_severities():
    split = sharding.batch_sharding(ONE)
    labels = np.arange(6) % 2

    def batches():
        for start in (0, 4):
            real = np.arange(start, start + 4) < 6
            image = np.where(real, 10 * np.arange(start, start + 4), 0).astype(np.uint8)
            batch = {
                'image': image[:, None, None, None],
                'label': np.pad(labels, (0, 2))[start : start + 4],
                'mask': real.astype(np.float32),
            }
            yield {name: jax.device_put(x, split) for name, x in batch.items()}

    def corrupt(images, index, severity, *, name):
        # Severity 2 spoils the example at places below 3, another corruption none.
        np.testing.assert_array_equal(
            images[:, 0, 0, 0] // 10, np.where(images[:, 0, 0, 0], index, 0)
        )
        spoilt = (severity == 2) & (index < 3) & (name == 'haze')
        return jnp.where(spoilt.reshape(-1, 1, 1, 1), 255, images)

    def step(params, batch):
        right = (batch['image'][:, 0, 0, 0] != 255) * batch['mask']
        return {'top1': right.sum(), 'count': batch['mask'].sum()}

    got = robustness.scores(
        step, None, batches(), corrupt, corruptions=('haze', 'contrast'), severities=(1, 2)
    )
    want = {
        'mean': 0.875, 'haze': 0.75, 'contrast': 1, 'severity_1': 1, 'severity_2': 0.75, 'count': 6,
    }  # fmt: skip
    assert got == want
