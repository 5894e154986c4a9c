"""Rows, rates, tables and the targets that metrics go to."""

import json
import math
import sys
import types

import pytest

from big_vit import explore, metrics
from big_vit.errors import UserError


def test_a_resumed_writer_drops_later_rows_and_keeps_the_rest(tmp_path):
    with metrics.Writer(tmp_path, 0) as writer:
        for step in (1, 2, 3):
            writer.write(step, {'train/loss': step / 10, 'time/mfu': 0.5})
    with metrics.Writer(tmp_path, 2) as writer:
        assert writer.latest == {'train/loss': 0.2}
        writer.write(3, {'train/loss': 0.7})
    assert [row['train/loss'] for row in metrics.read(tmp_path)] == [0.1, 0.2, 0.7]


def test_a_row_cut_off_by_a_kill_is_left_out(tmp_path):
    (tmp_path / metrics.FILE).write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "tra')
    assert metrics.read(tmp_path) == [{'step': 1, 'train/loss': 2.0}]
    with metrics.Writer(tmp_path, 5):
        pass
    assert (tmp_path / metrics.FILE).read_text() == '{"step": 1, "train/loss": 2.0}\n'


def test_only_the_active_process_writes(tmp_path):
    with metrics.Writer(tmp_path, 0, active=False) as writer:
        writer.write(1, {'train/loss': 1.0})
        assert writer.latest == {'train/loss': 1.0}
    assert not (tmp_path / metrics.FILE).exists()


def test_wandb_gets_every_row(tmp_path, monkeypatch):
    logged, made = [], {}

    class Run:
        def log(self, values, step):
            logged.append((step, values))

        def finish(self):
            made['finished'] = True

    def init(**arguments):
        made.update(arguments)
        return Run()

    monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=init))
    with metrics.Writer(tmp_path, 0, wandb='vits', config={'lr': 1.0}) as writer:
        writer.write(4, {'train/loss': 1.5})
    assert made['project'] == 'vits' and made['config'] == {'lr': 1.0} and made['finished']
    assert logged == [(4, {'train/loss': 1.5})]


def test_a_missing_wandb_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(UserError, match=r'log\.wandb needs `pip install wandb`'):
        metrics.Writer(tmp_path, 0, wandb='vits')


def test_rates_count_data_and_step_time_only(monkeypatch):
    monkeypatch.setattr(metrics.console, 'host_memory_mb', lambda: 512.0)
    clock = metrics.Clock()
    for _ in range(4):
        clock.add('data', 0.5)
        clock.add('step', 1.5)
        clock.count_step()
    clock.add('eval', 100.0)
    found = clock.window(batch_size=10, flops_per_example=3.0, peak_flops=60.0, steps_left=8)
    assert found == {
        'time/examples_per_s': pytest.approx(40 / 8),
        'time/mfu': pytest.approx(40 / 8 * 3 / 60),
        'time/data_wait': pytest.approx(0.25),
        'time/eta_s': pytest.approx(8 * (8 / 4 + 100 / 4)),  # Evaluations take their time too.
        'time/host_memory_mb': 512.0,
    }
    assert clock.window(batch_size=1, flops_per_example=1, peak_flops=1, steps_left=1) == {}
    assert clock.summary() == '1m48s: data 2%, step 6%, eval 93%'


@pytest.mark.parametrize(
    ('seconds', 'shown'),
    [(0.4, '0s'), (59.4, '59s'), (200, '3m20s'), (7500, '2h05m'), (273600, '3d04h')],
)
def test_durations(seconds, shown):
    assert metrics.duration(seconds) == shown


def test_plain_console_lines(capsys):
    with metrics.Console(100, 0, label='train') as console:
        row = {'train/loss': 1.0, 'train/accuracy': 0.5, 'train/lr': 1e-3, 'train/skipped': 2.0}
        for loss, accuracy, skipped in (
            (4.0, 0.25, False),
            (2.0, 0.5, False),
            (math.nan, 0.0, True),
        ):
            console.observe(loss=loss, accuracy=accuracy, skipped=skipped)
        times = {'examples_per_s': 1234.5, 'mfu': 0.41, 'data_wait': 0.013, 'eta_s': 70}
        console.training(7, row | {f'time/{name}': value for name, value in times.items()})
        console.evaluation(7, 'test', {'loss': 1.0, 'top1': 0.5, 'count': 3.0})
        times = {'examples_per_s': 1234.5, 'data_wait': 0.009, 'eta_s': 70}
        console.training(8, row | {f'time/{name}': value for name, value in times.items()})
        many = {f'a_metric_of_many_{i}': 0.5 for i in range(9)} | {'of/class': 1.0, 'count': 3.0}
        console.evaluation(8, 'test', many)
    line, scored, calm, long = capsys.readouterr().out.splitlines()
    # Means of the steps since the last line, and how many of them were skipped.
    assert line == (
        'train   7/100  loss 3.0000  acc 0.250  skipped 1  1,234 ex/s  ETA 1m10s  MFU 41%'
    )
    assert scored == 'eval    7/100  test: loss 1.0000  top1 0.5000'
    # What nobody waits for, no device has a peak of, and was told before is left out.
    assert calm == 'train   8/100  loss 1.0000  acc 0.500  1,234 ex/s  ETA 1m10s  lr 0.001'
    assert long == 'eval    8/100  test: a_metric_of_many_0 0.5000  (and 9 more)'
    assert all(len(text) <= 80 for text in (line, scored, calm, long))


def test_tables_align_numbers_to_the_right():
    text = metrics.table(('name', 'n'), [('a', 5), ('long name', 1234)])
    assert text.splitlines() == [
        'name          n',
        '---------  ----',
        'a             5',
        'long name  1234',
    ]


def test_rows_are_valid_json_also_for_values_that_are_not_finite(tmp_path):
    with metrics.Writer(tmp_path, 0) as writer:
        writer.write(1, {'train/loss': float('nan'), 'train/grad_norm': float('inf')})

    def refuse(constant):
        raise AssertionError(f'{constant} is not JSON')

    row = json.loads((tmp_path / metrics.FILE).read_text(), parse_constant=refuse)
    assert row == {'step': 1, 'train/loss': None, 'train/grad_norm': None}
    with metrics.Writer(tmp_path, 1):
        (again,) = metrics.read(tmp_path)
    assert math.isnan(again['train/loss']) and again['step'] == 1
    assert 'nan' in explore.history_table([again])


def test_the_memory_of_the_process_is_what_the_system_says():
    import psutil

    found = metrics.host_memory_mb()
    assert found == pytest.approx(psutil.Process().memory_info().rss / 1e6, rel=0.05)


@pytest.mark.parametrize(
    ('headline', 'values', 'shown'),
    [
        ('accuracy', {'accuracy': 0.5}, 'acc 0.500'),
        ('psnr', {'psnr': 23.456789, 'accuracy': 0.5}, 'psnr 23.46'),
        ('psnr', {'accuracy': 0.5}, ''),
    ],
)
def test_the_console_shows_the_headline_where_a_row_has_it(headline, values, shown, capsys):
    with metrics.Console(9, 0, label='train', headline=headline) as console:
        console.training(3, {f'train/{name}': value for name, value in values.items()})
        console.training(4, {'train/loss': 1.0, 'train/lr': 1e-3})
    with_values, without = capsys.readouterr().out.splitlines()
    assert with_values == f'train 3/9  {shown}'
    assert without == 'train 4/9  loss 1.0000  lr 0.001'


def test_the_history_of_a_task_without_accuracy_has_no_column_of_it():
    rows = [
        {'step': 1, 'train/loss': 2.0, 'train/psnr': 7.25, 'train/lr': 0.1},
        {'step': 2, 'train/loss': 1.0, 'train/psnr': 8.5, 'train/lr': 0.1},
    ]
    shown = explore.history_table(rows).splitlines()
    assert shown[0].split() == ['step', 'train/loss', 'train/lr']
    assert [line.split() for line in shown[2:]] == [['1', '2', '0.1'], ['2', '1', '0.1']]
    shown = explore.history_table([*rows, {'step': 2, 'test/map': 0.75}], headline='psnr')
    assert shown.splitlines()[0].split() == [
        'step', 'test/map', 'train/loss', 'train/psnr', 'train/lr',
    ]  # fmt: skip
    assert shown.splitlines()[-1].split() == ['2', '0.75', '1', '8.5', '0.1']
