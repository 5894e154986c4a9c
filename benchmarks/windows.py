"""What the order with locality costs and keeps: `python -m benchmarks.windows`.

Computed from the order alone, without data. First how many shards and classes a batch has, and how
many classes are among the examples that are held, beside a full shuffle, for sets of the shape of
LAION-400M and of ImageNet-21k, also where their examples are sorted by class: exponentials of
entropies, which are the numbers of equally frequent ones that would be as diverse. Then, for a
billion rows in 100,000 shards, the time to compute a batch and the share of bytes that hosts read.

With --train FOLDER (of Fashion-MNIST's IDX files) a small network learns from 500 shards of 120 in
either order instead, also where the shards are sorted by class, with five seeds each.
"""

import argparse
import itertools
import json
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from big_vit import metrics, runtime
from big_vit.data import order, windows
from big_vit.data.sources import idx
from big_vit.data.sources.base import Request

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
    per_row = per_row[(now.moves + starts) // shards.lengths]  # In the order of the epoch.
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


# --- Training --------------------------------------------------------------------------

TRAINED = Path(__file__).parent / 'results' / 'windows_training.json'
SHARDS, ROWS, EPOCHS, WIDTH, RATE, SEEDS = 500, 120, 3, 128, 0.1, 5
# (whether examples are sorted by class, the window; None for a full shuffle).
ORDERS = ((False, None), (False, 256), (False, 16), (True, 256), (True, 32), (True, 4))


def images_and_labels(folder: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    source = idx.idx(Request(split), path=folder)
    columns = source.load(np.arange(source.length))
    return columns['image'].reshape(source.length, -1).astype(np.float32) / 255, columns['label']


def scores_of(
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    test: tuple[np.ndarray, np.ndarray],
    steps: int,
    seed: int,
) -> tuple[float, float, list[np.ndarray]]:
    """Train a network with one hidden layer by SGD; return its test error, loss and parameters.

    Args:
      batches: of images, float32 [batch, pixels] of 0 to 1, and labels.
    """
    rng = np.random.default_rng(seed)
    shapes = ((test[0].shape[1], WIDTH), (WIDTH,), (WIDTH, 10), (10,))
    params = [rng.normal(0, shape[0] ** -0.5, shape) * (len(shape) > 1) for shape in shapes]
    params = [param.astype(np.float32) for param in params]
    moments = [np.zeros_like(param) for param in params]

    def forward(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        hidden = np.maximum(x @ params[0] + params[1], 0)
        logits = hidden @ params[2] + params[3]
        logits -= logits.max(1, keepdims=True)
        return hidden, logits - np.log(np.exp(logits).sum(1, keepdims=True))

    for step, (x, labels) in enumerate(itertools.islice(batches, steps)):
        rate = RATE / 2 * (1 + np.cos(np.pi * step / steps))
        hidden, logs = forward(x)
        to_logits = (np.exp(logs) - np.eye(10, dtype=np.float32)[labels]) / len(labels)
        to_hidden = (to_logits @ params[2].T) * (hidden > 0)
        gradients = (x.T @ to_hidden, to_hidden.sum(0), hidden.T @ to_logits, to_logits.sum(0))
        for param, moment, gradient in zip(params, moments, gradients, strict=True):
            moment *= 0.9
            moment += gradient
            param -= np.float32(rate) * moment
    logs = forward(test[0])[1]
    loss = -logs[np.arange(len(logs)), test[1]].mean()
    return float((logs.argmax(1) != test[1]).mean()), float(loss), params


def batches_in_order(
    train: tuple[np.ndarray, np.ndarray], shards: windows.Shards | int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield batches of arrays forever."""
    for step in itertools.count():
        index, _ = windows.example_indices(step, parts=(shards,), batch_size=ROWS, seed=seed)
        yield train[0][index], train[1][index]


def training(folder: str) -> list[dict[str, Any]]:
    """Measure test errors after training in each order."""
    (images, labels), test = (images_and_labels(folder, split) for split in ('train', 'test'))
    by_class, rows = np.argsort(labels, kind='stable'), []
    mixed = np.random.default_rng(0).permutation(len(labels))
    for is_sorted, lanes in ORDERS:
        stored = by_class if is_sorted else mixed
        shards = windows.Shards(np.full(SHARDS, ROWS), lanes) if lanes else SHARDS * ROWS
        train = images[stored], labels[stored]
        steps = EPOCHS * len(images) // ROWS
        scores = [
            scores_of(batches_in_order(train, shards, seed), test, steps, seed)[:2]
            for seed in range(SEEDS)
        ]
        errors, losses = np.array(scores).T
        warned = not isinstance(shards, int) and windows.warning(shards, train[1].__getitem__, 0)
        rows.append(
            {
                'sorted': is_sorted,
                'window': lanes,
                'error': errors.mean(),
                'error_std': errors.std(ddof=1),
                'loss': losses.mean(),
                'loss_std': losses.std(ddof=1),
                'warned': bool(warned),
            }
        )
        print(rows[-1], flush=True)
    return rows


def training_table(rows: list[dict[str, Any]]) -> str:
    """Format the other table of docs/data.md."""
    head = ('shards', 'window', 'test error', 'test loss', 'warned')
    body = [
        (
            'sorted by class' if row['sorted'] else 'at random',
            f'{row["window"] or "all"}',
            f'{100 * row["error"]:.2f} ± {100 * row["error_std"]:.2f} %',
            f'{row["loss"]:.3f} ± {row["loss_std"]:.3f}',
            'yes' if row['warned'] else '',
        )
        for row in rows
    ]
    return markdown([head, *body])


def markdown(rows: list[tuple[str, ...]]) -> str:
    lines = [rows[0], tuple('---' for _ in rows[0]), *rows[1:]]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


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
    return markdown([head, *rows])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.windows', description=__doc__)
    parser.add_argument('--train', metavar='FOLDER', help="of Fashion-MNIST's IDX files")
    args = parser.parse_args(argv)
    if args.train:
        rows = training(args.train)
        TRAINED.write_text(json.dumps(rows, indent=2) + '\n')
        print(training_table(rows))
        return
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
    times = [(name, f'{value:,.2f}') for name, value in results['billion'].items()]
    print(metrics.table(('a billion rows in 100,000 shards', ''), times))
    print()
    shares = [(h, f'{x["ranges"]:.4f}', f'{x["whole"]:.4f}') for h, x in results['hosts'].items()]
    print(metrics.table(('hosts', 'bytes x hosts / all, ranges', 'whole shards'), shares))


if __name__ == '__main__':
    runtime.command(main)
