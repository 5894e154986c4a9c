"""The study of small data: budgets in operations, rates chosen on validation, and it goes on."""

import json
import math
from pathlib import Path

import pytest
from commands import error_line, run_module
from gate import mostly_slow

from benchmarks import small_data as study
from benchmarks.small_data import Run

FASHION = Path('/usr/share/datasets/fashion-mnist')


def run(*more):
    return run_module('benchmarks.small_data', *more, timeout=600)


@pytest.mark.parametrize('model', mostly_slow(study.MODELS, 'conv'))
def test_each_model_spends_the_same_operations(model):
    plain = study.config_of(Run('vit', 'adamw', 1e-3, 1), 24_000, [])
    spent = plain.total_steps * plain.batch_size * study.cost_of(plain).flops
    config = study.config_of(Run(model, 'adamw', 1e-3, 1), 24_000, [])
    own = config.total_steps * config.batch_size * study.cost_of(config).flops
    assert own == pytest.approx(spent, rel=0.01)
    tried = study.config_of(Run(model, 'adamw', 1e-3, 0), 24_000, [])
    assert tried.total_steps == pytest.approx(config.total_steps / 4, abs=1)


def test_what_is_trained_on_is_never_validated_or_tested_on():
    config = study.config_of(Run('cct', 'sgd', 0.1, 0), 24_000, [])
    assert config.data.split == 'train[:4000]'
    assert config.evals['val'].split == 'train[57000:59000]'
    assert config.evals['often'].split == 'train[59800:]'
    assert config.evals['test'].split == 'test'


@pytest.mark.slow
def test_the_rate_is_the_best_of_validation_and_none_before_all_are_tried(tmp_path):
    begun = study.Study(tmp_path, 24_000, [])
    searched = begun.search('vit', 'sgd')
    rows = [
        {'config': study.config_lib.digest(begun.config(one)), 'val': val}
        | study.dataclasses.asdict(one)
        for one, val in zip(searched, (0.5, 0.7, 0.6, 0.4), strict=True)
    ]
    (tmp_path / 'runs.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows[:2]))
    assert study.Study(tmp_path, 24_000, []).finals('vit', 'sgd') == []
    (tmp_path / 'runs.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    done = study.Study(tmp_path, 24_000, [])
    assert done.finals('vit', 'sgd') == [Run('vit', 'sgd', 0.1, seed) for seed in (1, 2, 3)]
    # Rows of another config do not count.
    other = study.Study(tmp_path, 24_000, [('model.width', '32')])
    assert other.finals('vit', 'sgd') == []


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.exists(), reason='needs the package dataset-fashion-mnist')
def test_it_makes_a_table_and_a_picture_and_does_nothing_twice(tmp_path):
    args = ['--quick', '--only', 'cct', '--workdir', tmp_path]
    first = run(*args)
    assert first.returncode == 0, first.stderr
    rows = [json.loads(t) for t in (tmp_path / 'quick' / 'runs.jsonl').read_text().splitlines()]
    assert len(rows) == len({(row['optimizer'], row['rate'], row['seed']) for row in rows}) == 14
    written = json.loads((tmp_path / 'quick' / 'small_data.json').read_text())
    for one in written['results']:
        own = [row for row in rows if row['optimizer'] == one['optimizer']]
        best = max((row for row in own if not row['seed']), key=lambda row: row['val'])
        assert one['rate'] == best['rate']
        tests = [row['test'] for row in own if row['seed']]
        assert one['tests'] == tests and one['test'] == pytest.approx(sum(tests) / 3)
        assert math.isfinite(one['spread'])
    assert first.stdout.count('| cct | ') == 2
    assert (tmp_path / 'quick' / 'small_data.png').stat().st_size > 5_000
    again = run(*args)
    # The table alone: nothing ran, and it is the same.
    assert again.stdout == first.stdout[first.stdout.index('| model |') :]


def test_a_model_that_is_not_in_the_study_is_one_line():
    assert "no model 'cnn'; there are vit, conv, cct" in error_line(run('--only', 'cnn'))
