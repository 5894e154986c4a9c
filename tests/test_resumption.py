"""A run that goes on with another batch size or length counts by examples."""

import numpy as np
import pytest
from test_train import TINY

from big_vit import checkpoint, config, metrics, train
from big_vit.data import order
from big_vit.errors import UserError

EXAMPLES = 160
BASE = {
    **{key: value for key, value in TINY.items() if key != 'total_steps'},
    'data.split': f'train[:{EXAMPLES}]',
    'evals.test.every_steps': 1000,
    'checkpoint.every_steps': 1000,
}


@pytest.fixture
def seen(monkeypatch):
    """What the loader was asked for, by step: (index, view) of each row."""
    asked, real = {}, order.example_indices

    def example_indices(step, **more):
        index, view = real(step, **more)
        asked[step] = list(zip(index.tolist(), view.tolist(), strict=True))
        return index, view

    monkeypatch.setattr(order, 'example_indices', example_indices)

    def run(workdir, **keys):
        asked.clear()
        start = (checkpoint.steps(workdir) or [0])[-1]
        end = train.run(config.resolve({**BASE, **keys}), workdir, force=True).step
        return [pair for step in range(start, end) for pair in asked[step]]

    return run


@pytest.mark.slow
def test_every_example_comes_exactly_once_an_epoch_whatever_the_batches(seen, tmp_path, capsys):
    workdir = tmp_path / 'w'
    taken = seen(workdir, batch_size=16, total_steps=4)
    taken += seen(workdir, batch_size=32, total_steps=6)
    said = capsys.readouterr().out
    assert 'batch   16 -> 32 examples: goes on at position 64 of the data (0.40 epochs)' in said
    assert checkpoint.read_sidecar(workdir, 6)['position'] == 128
    taken += seen(workdir, batch_size=8, total_steps=10)
    taken += seen(workdir, batch_size=8, total_epochs=2)  # The same batch size again.
    assert 'length  ends at step 30 instead of 10' in capsys.readouterr().out
    assert checkpoint.steps(workdir)[-1] == 4 + 2 + (2 * EXAMPLES - 128) // 8
    assert len(taken) == 2 * EXAMPLES
    for epoch in range(2):
        index, view = zip(*taken[epoch * EXAMPLES : (epoch + 1) * EXAMPLES], strict=True)
        assert sorted(index) == list(range(EXAMPLES)) and set(view) == {epoch}
        wanted = order.shuffled(np.arange(EXAMPLES), length=EXAMPLES, seed=0, epoch=epoch)
        assert list(index) == wanted.tolist()


@pytest.mark.slow
def test_the_rate_is_a_function_of_the_examples_where_the_length_is(seen, tmp_path, capsys):
    workdir, total = tmp_path / 'w', 3 * EXAMPLES
    seen(workdir, batch_size=16, total_epochs=1)
    capsys.readouterr()
    seen(workdir, batch_size=32, total_epochs=3)
    said = capsys.readouterr().out
    assert 'rate    0.000e+00 -> 7.500e-03 at step 10' in said
    assert checkpoint.steps(workdir)[-1] == 10 + (total - EXAMPLES) // 32
    rates = {row['step']: row['train/lr'] for row in metrics.read(workdir) if 'train/lr' in row}
    for step in range(11, 21):
        share = (EXAMPLES + (step - 11) * 32) / total
        assert rates[step] == pytest.approx(0.5e-2 * (1 + np.cos(np.pi * share)), rel=1e-4)
    # Where only the batch changes the rate goes on.
    workdir = tmp_path / 'v'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.runtime, 'stop_signals', stopping_at(5))
        seen(workdir, batch_size=16, total_epochs=2)
    capsys.readouterr()
    seen(workdir, batch_size=8, total_epochs=2)
    said = capsys.readouterr().out
    assert 'rate    goes on at' in said and 'length  ends at step 35 instead of 20' in said
    rates = {row['step']: row['train/lr'] for row in metrics.read(workdir) if 'train/lr' in row}
    assert len(rates) == 35
    for step, rate in rates.items():
        share = ((step - 1) * 16 if step <= 5 else 80 + (step - 6) * 8) / (2 * EXAMPLES)
        assert rate == pytest.approx(0.5e-2 * (1 + np.cos(np.pi * share)), rel=1e-4)


def stopping_at(wanted):
    import contextlib

    @contextlib.contextmanager
    def stop_signals(_):
        yield lambda step: step == wanted

    return stop_signals


@pytest.mark.slow
def test_steps_remain_steps_where_the_length_is_in_steps(seen, tmp_path):
    workdir = tmp_path / 'w'
    seen(workdir, batch_size=16, total_steps=4)
    assert len(seen(workdir, batch_size=8, total_steps=7)) == 3 * 8
    assert checkpoint.steps(workdir)[-1] == 7


@pytest.mark.slow
def test_another_order_and_a_shorter_run_are_said(seen, tmp_path, capsys):
    workdir = tmp_path / 'w'
    seen(workdir, batch_size=16, total_steps=4)
    capsys.readouterr()
    assert seen(workdir, batch_size=16, total_steps=3, seed=1) == []
    said = capsys.readouterr().out
    assert 'in another order from position 64 on' in said and 'may come twice or not' in said
    assert 'step 4 is there already: nothing is left to train' in said


def test_without_force_it_is_refused_and_an_unchanged_run_has_no_new_key(seen, tmp_path):
    workdir = tmp_path / 'w'
    seen(workdir, batch_size=16, total_steps=2)
    assert 'position' not in checkpoint.read_sidecar(workdir, 2)
    with pytest.raises(UserError, match='batch_size: 16 -> 32'):
        train.run(config.resolve({**BASE, 'batch_size': 32, 'total_steps': 3}), workdir)
