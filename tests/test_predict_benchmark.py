"""The benchmark of predictions: what it compares, and the figures that it makes of it."""

import time

import pytest

from benchmarks import loader, predict


def test_a_ratio_is_of_the_same_round_and_a_rate_a_median():
    passes = {'evaluation': lambda: time.sleep(0.02), 'half': lambda: time.sleep(0.04)}
    results = predict.measure(passes, images=10, rounds=3)
    assert results['evaluation']['ratio'] == 1
    assert results['half']['ratio'] == pytest.approx(0.5, abs=0.2)
    assert 100 < results['half']['images_per_s'] <= 250
    lines = predict.table({'mu/32': results}).splitlines()
    assert lines[2].startswith('| mu/32 | evaluation | ') and lines[2].endswith(' | 1.00 |')


@pytest.mark.slow
def test_all_contenders_pass_over_all_files(tmp_path):
    loader.write_images(tmp_path / 'data', 20, 75, 100)
    passes = predict.contenders(tmp_path / 'data', tmp_path / 'run', 'mu/32', 16, side=32)
    results = predict.measure(passes, images=20, rounds=1)
    assert list(results) == ['evaluation', 'model.answers', 'predict --out', 'predict --embed']
    assert len(list(tmp_path.glob('run/out*/part-00000-of-00001.parquet'))) == 4
