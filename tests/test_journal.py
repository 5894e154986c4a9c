"""When a run is given up: its last updates were skipped, or its losses left where they began."""

from types import SimpleNamespace

import numpy as np
import pytest

from big_vit import config, metrics, train
from big_vit.data import pipeline
from big_vit.journal import Course, Damage, Diverged, RunJournal


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


def nothing(*_, **__):
    return {}


def watched(said):
    """A journal that keeps what it says in a list, and nothing else."""
    parts = SimpleNamespace(
        total_steps=5000, batch_size=8, flops_per_example=1.0, task=SimpleNamespace(headline='loss')
    )
    console = SimpleNamespace(say=said.append, training=nothing, evaluation=nothing)
    return RunJournal(
        config=None, parts=parts, peak_flops=None, damage=Damage(1.0), clock=metrics.Clock(),
        writer=SimpleNamespace(write=nothing), console=console,
        manager=SimpleNamespace(timings=nothing), meter=pipeline.Meter(),
    )  # fmt: skip


def test_a_collapse_is_said_once_in_a_line_beside_the_rows():
    said = []
    journal = watched(said)
    for step in range(100, 4000, 100):
        entropy = 3.0 if step < 2000 else 6.0
        values = {'lr': 1.0, 'teacher_entropy': entropy, 'teacher_entropy_of_mean': 6.0}
        journal.write(step, {name: np.float32(value) for name, value in values.items()})
    (line,) = said
    assert line.startswith('WARNING step 2200: collapse: the targets no longer depend on')
    said.clear()
    journal = watched(said)
    for step, std in ((100, 0.5), (200, 0.5), (300, 1e-4), (400, 1e-4)):
        journal.write(step, {'lr': np.float32(1.0)})
        journal.write_scores(step, 'seen', {'rankme': 9.0, 'std': std, 'cosine': 1 - std})
    (line,) = said
    assert line.startswith('WARNING step 300: collapse: seen: the features are nearly the same')


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
