"""What the benchmark of the order with locality counts and trains."""

import numpy as np
import pytest

from benchmarks import windows as benchmark
from big_vit.data import windows


def test_shares_of_hosts_are_those_of_their_rows():
    shards, hosts = windows.Shards(np.full(512, 64), 128), 8
    per_row = np.random.default_rng(0).uniform(20e3, 60e3, 512)
    index = np.stack(
        [
            windows.example_indices(step, parts=(shards,), batch_size=128, seed=benchmark.SEED)[0]
            for step in range(shards.length // 128)
        ]
    ).reshape(-1, hosts, 128 // hosts)
    total = per_row.sum() * 64
    ranges = [per_row[index[:, host] // 64].sum() / total * hosts for host in range(hosts)]
    touched = [np.unique(index[:, host] // 64) for host in range(hosts)]
    whole = [per_row[mine].sum() * 64 / total * hosts for mine in touched]
    shares = benchmark.host_shares(shards, hosts)
    assert shares == {'ranges': pytest.approx(max(ranges)), 'whole': pytest.approx(max(whole))}


def test_a_full_shuffle_is_as_diverse_as_draws_from_all():
    case = benchmark.Case(shards=500, rows=200, classes=50, is_sorted=True)
    rows = {row['window']: row for row in benchmark.quality(case)}
    drawn = np.random.default_rng(0).integers(0, case.length, (8, benchmark.BATCH))
    for name, of in (('shards', lambda i: i // case.rows), ('classes', case.labels)):
        wanted = np.mean([windows.effective_number(of(index)) for index in drawn])
        assert rows[None][name] == pytest.approx(wanted, rel=0.02)
    assert rows[8]['warned'] and rows[8]['classes'] < 0.7 * rows[None]['classes']


def test_the_network_learns_what_it_is_shown():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 6000)
    images = (np.eye(10)[labels] + rng.normal(0, 0.15, (6000, 10))).astype(np.float32)
    batches = benchmark.batches_in_order((images, labels), len(labels), seed=0)
    error, loss, _ = benchmark.scores_of(batches, (images, labels), steps=150, seed=0)
    assert error < 0.02 and loss < 0.3
