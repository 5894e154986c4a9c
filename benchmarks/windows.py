"""What the order with locality costs and keeps: `python -m benchmarks.windows`.

Computed from the order alone, without data. First how many shards and classes a batch has, and how
many classes are among the examples that are held, beside a full shuffle, for sets of the shape of
LAION-400M and of ImageNet-21k, also where their examples are sorted by class: exponentials of
entropies, which are the numbers of equally frequent ones that would be as diverse. Then, for a
billion rows in 100,000 shards, the time to compute a batch and the share of bytes that hosts read.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from big_vit import metrics, runtime
from big_vit.data import order, windows

RESULTS = Path(__file__).parent / 'results' / 'windows.json'
BATCH, SEED = 4096, 0
WINDOWS = (8, 64, 256, 1024)
HOSTS = (1, 8, 1024)


class Case(NamedTuple):
    """A set of examples in shards of one length, of classes at random or one after the other."""

    shards: int
    rows: int
    classes: int
    is_sorted: bool

    @property
    def length(self) -> int:
        return self.shards * self.rows

    def labels(self, index: np.ndarray) -> np.ndarray:
        if self.is_sorted:
            return index * self.classes // self.length
        return (order.example_keys(1, 0, index) % np.uint64(self.classes)).astype(np.int64)


# LAION has no classes; a thousand stand for its subjects.
CASES = {
    'LAION-400M': Case(40_000, 10_000, 1_000, is_sorted=False),
    'LAION-400M, sorted': Case(40_000, 10_000, 1_000, is_sorted=True),
    'ImageNet-21k': Case(1_000, 13_153, 21_841, is_sorted=False),
    'ImageNet-21k, sorted': Case(1_000, 13_153, 21_841, is_sorted=True),
}


def numbers(case: Case, batch_of: Callable[[int], np.ndarray]) -> dict[str, float]:
    """Measure effective numbers of shards and classes in batches, from anywhere in an epoch."""
    steps = np.linspace(0, case.length // BATCH - 1, 9).astype(int).tolist()
    batches = [batch_of(step) for step in steps]
    return {
        'shards': statistics.mean(windows.effective_number(b // case.rows) for b in batches),
        'classes': statistics.mean(windows.effective_number(case.labels(b)) for b in batches),
    }


def quality(case: Case) -> list[dict[str, Any]]:
    """Measure a set in each window, and shuffled as a whole."""

    def shuffled(step: int) -> np.ndarray:
        return order.example_indices(step, length=case.length, batch_size=BATCH, seed=SEED)[0]

    rows: list[dict[str, Any]] = []
    for lanes in WINDOWS:
        shards = windows.Shards(np.full(case.shards, case.rows), lanes)

        def windowed(step: int, shards: windows.Shards = shards) -> np.ndarray:
            return windows.example_indices(step, parts=(shards,), batch_size=BATCH, seed=SEED)[0]

        seen, there = windows.classes_at_a_time(shards, case.labels, SEED)
        warned = windows.warning(shards, case.labels, SEED) is not None
        rows.append({'window': lanes, **numbers(case, windowed), 'held': seen, 'warned': warned})
    return [*rows, {'window': None, **numbers(case, shuffled), 'held': there}]


def speed(shards: windows.Shards) -> dict[str, float]:
    """Measure the processor time of a batch, the first of its epoch, and of those that follow."""

    def seconds(step: int) -> float:
        began = time.process_time()
        windows.example_indices(step, parts=(shards,), batch_size=BATCH, seed=SEED)
        return time.process_time() - began

    first = [seconds(epoch * (shards.length // BATCH) + 1000) for epoch in range(1, 40)]
    following = [seconds(10_000 + step) for step in range(200)]
    return {
        'first_of_an_epoch_ms': 1e3 * statistics.median(first),
        'first_of_an_epoch_least_ms': 1e3 * min(first),
        'following_ms': 1e3 * statistics.median(following),
        'process_mb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def host_shares(shards: windows.Shards, hosts: int) -> dict[str, float]:
    """Count the bytes that hosts read in an epoch, times the number of hosts over all bytes.

    Bytes of an example differ from shard to shard. `ranges` reads what is needed of each shard in
    one piece, `whole` reads every shard that is touched from its start to its end.
    """
    now = windows._epoch(shards, SEED, 0)
    per_row = np.random.default_rng(0).uniform(20e3, 60e3, len(shards.lengths))
    starts = now.ends - shards.lengths  # All shards are of one length.
    total = float((per_row * shards.lengths).sum())
    shares: dict[str, list[float]] = {'ranges': [], 'whole': []}
    for lanes in np.arange(shards.lanes).reshape(hosts, -1):
        touched, needed = set(), 0.0
        for start, size in zip(now.starts[lanes], now.sizes[lanes], strict=True):
            first, last = np.searchsorted(now.ends, (start, start + size - 1), side='right')
            held = np.arange(first, last + 1)
            rows = np.minimum(now.ends[held], start + size) - np.maximum(starts[held], start)
            needed += float((rows * per_row[held]).sum())
            touched |= set(held.tolist())
        everything = np.array(sorted(touched))
        shares['ranges'].append(needed / total * hosts)
        shares['whole'].append(float((per_row * shards.lengths)[everything].sum()) / total * hosts)
    return {name: max(values) for name, values in shares.items()}


def table(results: dict[str, Any]) -> str:
    """Format the table of docs/data.md."""
    rows = [
        (
            name if row is rows_of[0] else '',
            f'{row["window"]:,}' if row['window'] else 'all',
            f'{row["window"] * windows.WINDOW:,}' if row['window'] else '',
            *(f'{row[key]:,.0f}' for key in ('shards', 'classes', 'held')),
            'yes' if row.get('warned') else '',
        )
        for name, rows_of in results['quality'].items()
        for row in rows_of
    ]
    head = (
        'set',
        'window',
        'examples held',
        'shards of a batch',
        'its classes',
        'classes held',
        'warned',
    )
    lines = [head, tuple('---' for _ in head), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.windows', description=__doc__)
    parser.parse_args(argv)
    billion = windows.Shards(np.full(100_000, 10_000), windows.MOST_LANES)
    results = {
        'batch_size': BATCH,
        'quality': {name: quality(case) for name, case in CASES.items()},
        'billion': speed(billion),
        'hosts': {str(hosts): host_shares(billion, hosts) for hosts in HOSTS},
    }
    RESULTS.write_text(json.dumps(results, indent=2) + '\n')
    print(table(results))
    print()
    rows = [(name, f'{value:,.2f}') for name, value in results['billion'].items()]
    print(metrics.table(('a billion rows in 100,000 shards', ''), rows))
    print()
    shares = [(h, f'{x["ranges"]:.4f}', f'{x["whole"]:.4f}') for h, x in results['hosts'].items()]
    print(metrics.table(('hosts', 'bytes x hosts / all, ranges', 'whole shards'), shares))


if __name__ == '__main__':
    runtime.command(main)
