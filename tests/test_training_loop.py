"""The training loop: what is due at a step, and the order in which it is done."""

import jax
import numpy as np
import pytest

from big_vit import journal, metrics, training_loop
from big_vit.build.experiment import Intervals
from big_vit.data.sources import declared
from big_vit.errors import UserError

INTERVALS = Intervals(log=2, save=3, keep=0, keep_last=1, evals={'val': 4, 'test': 0, 'near': 2})


@pytest.mark.parametrize(
    ('step', 'log', 'evaluations', 'save'),
    [
        (1, False, (), False),
        (2, True, ('near',), False),
        (3, False, (), True),
        (4, True, ('val', 'near'), False),
        (5, True, ('val', 'near'), True),  # The last step, but for what is never due.
    ],
)
def test_duties_are_functions_of_the_step(step, log, evaluations, save):
    assert training_loop.duties(INTERVALS, step, 5) == (log, evaluations, save)


class Recorder:
    """A journal that notes the calls."""

    def __init__(self, best=(), over=None):
        self.clock, self.events = metrics.Clock(), []
        self.best, self.over = best, over
        self.console = metrics.Console(5, 0, label='', active=False)

    def check(self, step, values):
        assert values['loss'].is_ready()  # No wait for the devices.
        self.events.append(f'check {step}')

    def write(self, step, values):
        self.events.append(f'write {step} {int(jax.device_get(values["loss"]))}')

    def write_scores(self, step, evaluation, scores):
        self.events.append(f'scores {step} {evaluation} {scores}')

    def verdict(self, step):
        self.events.append(f'verdict {step}')
        return step in self.best, step == self.over

    def save(self, state):
        self.events.append(f'save {int(jax.device_get(state))}')


def looped(start, stop=lambda step: False, **more):
    """The events of a loop to step 5 whose state is the number of updates, and its outcome."""
    recorder = Recorder(**more)
    update = jax.jit(lambda state, batch: (state + 1, {'loss': state + 1}))

    def batches():
        for number in range(start, 6):
            recorder.events.append(f'batch {number}')
            yield jax.device_put(np.int32(number))

    def train_step(state, batch):
        recorder.events.append('step')
        return update(state, batch)

    outcome = training_loop.run(
        jax.device_put(np.int32(start)),
        start,
        5,
        INTERVALS,
        recorder,
        evaluate=lambda name, state, shared: int(jax.device_get(state)),
        batches=batches(),
        train_step=train_step,
        stop=stop,
    )
    return recorder.events, outcome


def test_the_order_is_evaluate_save_batch_step_write():
    events, outcome = looped(2)
    assert events == [
        'batch 2', 'step',
        'check 3', 'save 3', 'batch 3', 'step',
        'check 4', 'write 4 4', 'scores 4 val 4', 'scores 4 near 4', 'verdict 4', 'batch 4',
        'step',
        'check 5', 'write 5 5', 'scores 5 val 5', 'scores 5 near 5', 'verdict 5',
        'save 5',
    ]  # fmt: skip
    assert int(outcome.state) == 5 and not outcome.stopped


def test_a_step_is_in_flight_while_the_one_before_is_written():
    events, _ = looped(0)
    assert events[:6] == ['batch 0', 'step', 'batch 1', 'step', 'check 1', 'check 2']


@pytest.mark.parametrize(('at', 'stopped'), [(1, True), (5, False)])
def test_a_stop_saves_at_its_step_and_draws_no_batch_more(at, stopped):
    asked = []
    events, outcome = looped(0, lambda step: asked.append(step) or step == at)
    assert asked == list(range(1, at + 1))  # Hosts count the calls: at each step once.
    assert events[-1] == f'save {at}' and f'batch {at}' not in events
    assert outcome.stopped == stopped and int(outcome.state) == at


def test_the_best_is_saved_and_what_is_over_ends_and_is_no_stop():
    events, outcome = looped(0, best=(2,), over=4)
    assert [event for event in events if event.startswith('save')] == ['save 2', 'save 3', 'save 4']
    assert int(outcome.state) == 4 and not outcome.stopped and 'batch 4' not in events


def test_a_finished_run_does_nothing():
    events, outcome = looped(5)
    assert not events and not outcome.stopped


def test_a_transfer_that_nobody_asked_for_is_refused():
    with pytest.raises(Exception, match='Disallowed host-to-device transfer'):
        training_loop.run(
            jax.device_put(np.int32(0)),
            0,
            5,
            INTERVALS,
            Recorder(),
            evaluate=lambda name, state, shared: None,
            batches=iter([np.int32(0)]),
            train_step=jax.jit(lambda state, batch: (state + batch, {})),
        )


def test_damage_ends_a_run_once_a_rate_can_be_told(monkeypatch):
    monkeypatch.setattr(journal, 'MIN_EXAMPLES_FOR_RATE', 30)
    damage = journal.Damage(0.1)
    damage.add(10, 20)
    with pytest.raises(UserError, match=r'11 of the last 40 examples .*max_error_rate=0\.1'):
        damage.add(1, 20)


def test_damage_is_told_at_the_end_in_a_line():
    damage, source = journal.Damage(1.0), declared('photos', 'train', 9, 1, (8, 8))
    assert damage.line(set(), source) is None
    damage.add(2, 20)
    damage.add(1, 20)
    assert damage.line({7, 3}, source) == (
        'data    3 of 40 examples were damaged, and replaced by the next ones '
        "(2 different, such as example 3 of 'train' of photos)"
    )
