"""The best score of a run: the first of the best, and the same one after a resume."""

import math

import numpy as np
import pytest

from big_vit import metrics


@pytest.mark.parametrize('metric', ['val/top1', 'val/loss'])
def test_the_best_is_numpys_and_the_count_is_of_what_came_after(metric):
    rng, lower = np.random.default_rng(0), metric.endswith('loss')
    for _ in range(50):
        values = rng.integers(0, 5, rng.integers(1, 12)).astype(float)
        values[rng.random(len(values)) < 0.3] = math.nan
        best = metrics.Best(metric)
        news = [best.add(10 * i, value) for i, value in enumerate(values)]
        known = values[~np.isnan(values)]
        if not known.size:
            assert best.step is None and best.waited == len(values) and not any(news)
            continue
        place = int((np.nanargmin if lower else np.nanargmax)(values))
        assert (best.step, best.value) == (10 * place, values[place])
        assert best.waited == len(values) - 1 - place and news[place]
        assert not any(news[place + 1 :])
        # A resume from any step is the same as no resume.
        rows = [{'step': 10 * i, metric: v} for i, v in enumerate(values)]
        cut = int(rng.integers(len(values)))
        resumed = metrics.Best(metric).add_rows(rows, 10 * cut)
        for row in rows[cut + 1 :]:
            resumed.add(row['step'], row[metric])
        assert (resumed.step, resumed.waited) == (best.step, best.waited)


@pytest.mark.parametrize(
    ('metric', 'lower'),
    [
        *(('val/loss', True), ('val/nll', True), ('val/ece', True), ('a/brier', True)),
        *(('val/top1', False), ('near/20nn', False), ('pairs/back/map', False)),
        *(('seen/rankme', False), ('seen/std', False), ('seen/cosine', True)),
        *(('probe/held_out', False), ('hard/mean', False), ('hard/severity_1', False)),
    ],
)
def test_the_direction_is_that_of_the_metric(metric, lower):
    assert metrics.lower_is_better(metric) == lower and metrics.has_direction(metric)


@pytest.mark.parametrize('metric', ['seen/alpha', 'seen/alpha_r2', 'probe/l2', 'grid/rate'])
def test_what_was_chosen_and_slopes_have_no_best(metric):
    assert not metrics.has_direction(metric) and not metrics.is_share(metric)
