"""When a run is given up: its last updates were skipped, or its losses left where they began."""

import numpy as np
import pytest

from big_vit import config, train
from big_vit.journal import Course, Diverged


def verdicts(losses, skipped=None, total=None):
    """(step, reason) of the first reason to stop; None if there is none."""
    course = Course(total or len(losses) + 1)
    skipped = [False] * len(losses) if skipped is None else skipped
    for step, (loss, skip) in enumerate(zip(losses, skipped, strict=True), 1):
        if reason := course.add(step, loss, skip):
            return step, reason
    return None


def test_a_sound_run_goes_on():
    rng = np.random.default_rng(0)
    falling = 7 * np.exp(-np.arange(3000) / 500) * rng.lognormal(0, 0.5, 3000)
    assert verdicts(falling, rng.random(3000) < 0.2) is None
    assert verdicts(np.full(500, 9.9) * 1e-3) is None
    assert verdicts(np.concatenate([np.full(50, 2.3), np.full(9, 1e9), np.full(50, 2.3)])) is None


@pytest.mark.parametrize('level, first', [(24.0, 2.3), (1e12, 2.3), (11.0, 0.01)])
def test_losses_that_stay_ten_times_above_the_first_end_a_run(level, first):
    step, reason = verdicts([first] * 10 + [level] * 60)
    assert step in (20, 21, 22) and 'the training has diverged; lower lr' in reason
    assert verdicts([first] * 10 + [0.9 * 10 * max(1, first)] * 60) is None
    assert verdicts([first] * 10 + [float('nan')] * 60) is None, 'those were skipped'


def test_a_run_that_skips_most_updates_ends():
    skips = [i % 5 != 0 for i in range(40)]
    step, reason = verdicts([2.3] * 40, skips)
    assert sum(skips[:step]) == 20 and f'20 of the last {step} updates' in reason
    assert verdicts([2.3] * 400, [i % 2 == 1 for i in range(400)]) is None
    # What was skipped long ago is forgiven.
    assert verdicts([2.3] * 400, [3 < i < 20 for i in range(400)]) is None


def test_the_last_step_decides_about_a_short_run():
    assert verdicts([2.3] * 6, [False, True, True, True, True, False], total=6)[0] == 6
    assert verdicts([2.3] * 6, [False, True, True, True, True, False], total=7) is None
    assert verdicts([2.3, 2.3, 2.3, 1e9, 1e9, 1e9, 1e9, 1e9, 1e9], total=9)[0] == 9


def test_a_run_that_explodes_at_once_ends_too():
    assert verdicts([2.3, 2e3, 2e5, 4e5, 6e5] + [1e6] * 40)[0] == 20


@pytest.mark.parametrize('total, lr', [(40, 1e6), pytest.param(30, 100.0, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_run_at_an_absurd_rate_does_not_end_as_if_all_were_well(tmp_path, total, lr):
    absurd = config.resolve(
        {
            'total_steps': total,
            'batch_size': 16,
            'image_size': 8,
            'lr': lr,
            'model.variant': 'mu/4',
            'data.name': 'digits',
        }
    )
    with pytest.raises(Diverged, match='lower lr'):
        train.run(absurd, tmp_path / 'w')
