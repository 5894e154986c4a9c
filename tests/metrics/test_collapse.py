"""Collapse is noticed from logits that really collapse, once, and never at the start."""

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from big_vit.evaluators.representation import deviation, mean_cosine, rankme
from big_vit.inspection import history
from big_vit.metrics.collapse import Collapse, collapses

K, BATCH, TOTAL, EVERY = 128, 64, 3000, 30
RNG = np.random.default_rng(0)
OWN, COMMON = RNG.standard_normal((BATCH, K)), RNG.standard_normal(K)


def rate(step):
    """Warm-up to a tenth of the run, then a cosine."""
    warm = TOTAL // 10
    return step / warm if step < warm else 0.5 * (1 + np.cos(np.pi * (step - warm) / TOTAL))


def told(step, own, common=0.0, student=0.3):
    """What a task logs whose teacher's logits are these, at a temperature of 0.04."""
    logits = own * OWN + common * COMMON
    target = softmax(logits / 0.04, axis=1)
    guess = log_softmax((logits + student * own * RNG.standard_normal((BATCH, K))) / 0.1, axis=1)
    entropy = -(target * np.log(target + 1e-30)).sum(1).mean()
    mean = target.mean(0)
    return {
        'step': step,
        'train/lr': rate(step),
        'train/loss': -(target * guess).sum(1).mean(),
        'train/teacher_entropy': entropy,
        'train/teacher_entropy_of_mean': -(mean * np.log(mean + 1e-30)).sum(),
        'train/kl': -(target * guess).sum(1).mean() - entropy,
        'train/used_prototypes': len(set(target.argmax(1))) / K,
    }


def course(own, common=lambda step: 0.0):
    return [told(step, own(step), common(step)) for step in range(EVERY, TOTAL + 1, EVERY)]


def learns(step):
    """Scales of the logits: fresh for a while, then they spread."""
    return 0.003 + 0.1 * min(max(step - 200, 0) / 1000, 1)


def test_the_logits_are_what_they_are_said_to_be():
    fresh, late = told(1, learns(1)), told(1, learns(TOTAL))
    assert fresh['train/teacher_entropy'] > 0.999 * np.log(K)
    assert fresh['train/kl'] < 0.02 * late['train/kl']
    assert late['train/teacher_entropy_of_mean'] - late['train/teacher_entropy'] > 1


def test_a_run_that_learns_is_left_alone_though_it_starts_as_if_collapsed():
    assert collapses(course(learns)) == []
    # Also where it starts with all pictures near one prototype, and without warm-up.
    assert collapses(course(learns, lambda step: 0.2 * max(0, 1 - step / 250))) == []
    constant = [row | {'train/lr': 1.0} for row in course(learns)]
    assert collapses(constant) == []


def test_targets_that_become_uniform_are_told_once_soon():
    rows = course(lambda step: learns(step) * (1 if step < 1800 else 0.002))
    assert rows[-1]['train/teacher_entropy'] == pytest.approx(np.log(K), abs=1e-3)
    ((step, text),) = collapses(rows)
    assert 1800 <= step <= 1800 + 3 * EVERY
    assert text.startswith('collapse: the targets no longer depend on the pictures')
    assert "lower the teacher's temperature" in text and '\n' not in text


def test_a_run_that_never_leaves_the_start_is_told_after_the_warm_up():
    ((step, text),) = collapses(course(lambda step: 0.002))
    assert TOTAL // 10 < step <= 20 * EVERY
    assert 'no longer depend on the pictures' in text


def test_one_prototype_for_all_is_told():
    rows = course(lambda s: learns(s) if s < 1500 else 0.01, lambda s: 0.0 if s < 1500 else 0.5)
    assert rows[-1]['train/teacher_entropy_of_mean'] < 0.05 * np.log(K)
    ((step, text),) = collapses(rows)
    assert 1500 <= step <= 1500 + 3 * EVERY
    assert 'all pictures get the same prototype' in text and 'centre the targets' in text


def test_less_than_all_is_enough_where_a_task_logs_less():
    def only(rows, *names):
        keys = ('step', 'train/lr', *(f'train/{name}' for name in names))
        return [{key: row[key] for key in keys} for row in rows]

    uniform = course(lambda step: learns(step) * (1 if step < 1800 else 0.002))
    one = course(lambda s: learns(s) if s < 1500 else 0.01, lambda s: 0.0 if s < 1500 else 0.5)
    ((step, text),) = collapses(only(uniform, 'teacher_entropy', 'kl'))
    assert step >= 1800 and 'the targets are uniform' in text
    ((step, text),) = collapses(only(one, 'teacher_entropy', 'used_prototypes'))
    assert step >= 1500 and 'of the prototypes are in use' in text
    # A student that knows sharp targets by heart has a KL near 0 and has not collapsed.
    sharp = [row | {'train/kl': 1e-6, 'train/teacher_entropy': 0.5} for row in uniform[60:]]
    assert collapses(only([*uniform[:60], *sharp], 'teacher_entropy', 'kl')) == []
    for names in (('teacher_entropy', 'kl'), ('teacher_entropy', 'used_prototypes')):
        assert collapses(only(course(learns), *names)) == []


def test_targets_without_deviation_are_told():
    def rows(last):
        deviations = np.concatenate([np.linspace(0.4, 0.9, 50), np.geomspace(0.9, last, 30)])
        return [
            {'step': 30 * (i + 1), 'train/lr': rate(30 * (i + 1)), 'train/target_std': value}
            for i, value in enumerate(deviations)
        ]

    ((step, text),) = collapses(rows(1e-3))
    assert step > 1500 and 'targets are nearly the same for all pictures' in text
    assert collapses(rows(0.3)) == []


def evaluated(step, spread):
    values = (COMMON[:32] + spread * OWN[:, :32]).astype(np.float32)
    scores = {'rankme': rankme(values), 'std': deviation(values), 'cosine': mean_cosine(values)}
    return {'step': step, **{f'test/{name}': value for name, value in scores.items()}}


def test_an_evaluation_tells_of_features_that_are_all_the_same():
    def rows(*spreads):
        found = []
        for i, spread in enumerate(spreads, 1):
            found.append({'step': 299 + 300 * (i - 1), 'train/lr': rate(299 + 300 * (i - 1))})
            found.append({'step': 300 * i, 'train/lr': rate(300 * i)} | evaluated(300 * i, spread))
        return found

    assert collapses(rows(0.1, 0.3, 0.8, 1.0)) == []
    # Nearly parallel in the warm-up, as of a fresh network.
    assert collapses(rows(1e-3, 0.1, 0.3)) == []
    ((step, text),) = collapses(rows(0.3, 0.5, 1e-4, 1e-4, 1e-5))
    assert step == 900 and 'test: the features are nearly the same' in text
    assert 'mean cosine 1.0000' in text


def test_each_onset_is_told_once_and_a_resumed_run_goes_on():
    def own(step):
        return learns(step) * (0.002 if 1500 <= step < 1900 or step >= 2600 else 1)

    rows = course(own)
    onsets = [step for step, _ in collapses(rows)]
    assert len(onsets) == 2 and 1500 <= onsets[0] < 1650 and 2600 <= onsets[1] < 2750
    for cut in (20, 55, 70, 99):
        resumed = Collapse(rows[:cut])
        later = [row['step'] for row in rows[cut:] if resumed.add(row)]
        assert later == [step for step in onsets if step > rows[cut - 1]['step']]
    # What the targets have told is not told of the features again.
    seen = evaluated(1800, 1e-5), evaluated(2200, 0.5)
    both = sorted([*rows, *seen], key=lambda row: row['step'])
    assert [step for step, _ in collapses(both)] == onsets


def test_numbers_that_are_none_and_other_metrics_are_no_collapse():
    rows = [row | {'train/teacher_entropy': np.nan, 'train/kl': np.nan} for row in course(learns)]
    assert collapses(rows) == []
    plain = [{'step': i, 'train/lr': 1.0, 'train/loss': 0.0, 'x/top1': 0.0} for i in range(999)]
    assert collapses(plain) == []


def test_a_report_warns_of_it():
    rows = course(lambda step: learns(step) * (1 if step < 1800 else 0.002))
    (warning,) = history.warnings(rows)
    assert warning.startswith('step 1,8') and 'collapse: the targets' in warning


@pytest.mark.parametrize(
    ('last', 'told'),
    [
        ({'rankme': 40.0, 'std': 0.024, 'cosine': 0.99}, True),  # Of 0.6 before.
        ({'rankme': 40.0, 'std': 0.04, 'cosine': 0.99}, False),
        ({'rankme': 1.2, 'std': 0.9, 'cosine': 0.0}, True),  # A line through the origin.
        ({'rankme': 1.4, 'std': 0.9, 'cosine': 0.0}, False),
    ],
)
def test_features_have_collapsed_beside_what_they_were_or_onto_a_line(last, told):
    first = {'rankme': 40.0, 'std': 0.6, 'cosine': 0.6}
    rows = [{'step': step, 'train/lr': 1.0} for step in (100, 200, 300)]
    rows[1:1] = [{'step': 200, **{f'a/b/{name}': value for name, value in first.items()}}]
    rows.append({'step': 300, **{f'a/b/{name}': value for name, value in last.items()}})
    onsets = collapses(rows)
    assert bool(onsets) == told
    assert not told or (onsets[0][0] == 300 and 'a/b: the features are' in onsets[0][1])
