"""The race of optimizers: its budget is the same for all, and it goes on where it was killed."""

import json
import math
import subprocess
import sys
import time

import pytest
from commands import ROOT, environment, error_line, run_module
from tiny import MODEL, flags, write_idx

from benchmarks import optimizer_race as race
from big_vit import ledger
from big_vit.config.schema import SCHEMA

RUN = {'total_steps': '6', 'batch_size': '16', 'evals.often.every_steps': '2'}


def arguments(*more):
    return [sys.executable, '-m', 'benchmarks.optimizer_race', *map(str, more)]


def run(*more):
    return run_module('benchmarks.optimizer_race', *more)


def test_grids_are_geometric_and_as_wide_for_all():
    assert race.grid(1.0, 5) == [0.111, 0.333, 1.0, 3.0, 9.0]
    for _, centre in race.SETTINGS.values():
        rates = race.grid(centre, race.RATES)
        assert rates[race.RATES // 2] == centre
        assert rates[-1] / rates[0] == pytest.approx(81, rel=0.02)


def test_the_target_is_reached_at_its_first_evaluation():
    curve = [(20, 0.5), (40, 0.81), (60, 0.79), (80, 0.9)]
    assert race.steps_to(0.8, curve) == 40
    assert race.steps_to(0.95, curve) == math.inf


def test_what_the_schema_has_not_is_said():
    for name, (keys, _) in race.SETTINGS.items():
        there = keys['optim.name'] in ledger.optimizers() and set(keys) <= set(SCHEMA)
        assert bool(race.missing(name)) != there
    assert not race.missing('adamw') and not race.missing('momentum')


@pytest.mark.slow
def test_a_race_that_is_killed_goes_on_where_it_was(tmp_path):
    data = write_idx(tmp_path / 'idx')
    args = ['--quick', '--only', 'adamw,momentum', '--workdir', tmp_path / 'race']
    args += flags(MODEL, RUN, {'data.path': data})
    file = tmp_path / 'race' / 'quick' / 'trials.jsonl'

    def lines():
        return file.read_text().splitlines() if file.exists() else []

    first = subprocess.Popen(
        arguments(*args), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL
    )
    until = time.monotonic() + 120
    while len(lines()) < 2 and time.monotonic() < until and first.poll() is None:
        time.sleep(0.05)
    first.kill()
    first.wait()
    kept = lines()
    assert 2 <= len(kept) < 10
    result = run(*args)
    assert result.returncode == 0, result.stderr
    found = lines()
    assert found[: len(kept)] == kept
    rows = [json.loads(text) for text in found]
    # Each optimizer: three rates, and the best again from two seeds.
    trials = {(row['name'], row['rate'], row['seed']) for row in rows}
    assert len(rows) == len(trials) == 10
    assert result.stdout.count(' left, about ') == 10 - len(kept)
    for row in rows:
        assert [number for number, _ in row['curve']] == [2, 4, 6]
        assert ('test' in row) == (row['seed'] > 0)
        words = {'adamw': 2, 'momentum': 1}[row['name']]
        assert abs(row['optimizer_bytes'] - 4 * words * row['params']) <= 4
    written = json.loads((file.parent / 'optimizer_race.json').read_text())
    for one in written['results']:
        own = [row for row in rows if row['name'] == one['name']]
        best = max((row for row in own if not row['seed']), key=lambda row: row['val'])
        assert one['best_rate'] == best['rate'] and len(one['rates']) == 3
        assert sorted(one['tests']) == sorted(row['test'] for row in own if row['seed'])
    assert (file.parent / 'optimizer_race.png').stat().st_size > 10_000
    assert f'| {written["results"][0]["name"]} |' in result.stdout
    again = run(*args)
    assert ' left, about ' not in again.stdout and lines() == found


def test_an_optimizer_that_is_not_in_the_table_is_one_line():
    assert "no 'adam'; did you mean" in error_line(run('--only', 'adam'))
