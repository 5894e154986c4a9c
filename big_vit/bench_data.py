"""Benchmark the data loader alone: `python -m big_vit.bench_data --config configs/x.py`.

Measures complete batches as in training, then each operation in a single thread.
"""

from big_vit import command_line

if __name__ == '__main__':  # Before the slow imports.
    command_line.answer_help(command_line.bench_data())

import functools
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from big_vit import config as config_lib
from big_vit import metrics, runtime
from big_vit.build.data import Data, host_batches, train_data
from big_vit.data import network, order, pipeline, transforms, windows
from big_vit.data.transforms import operations

# For `by_operation`: examples in total, and examples per call.
_EXAMPLES, _BATCH = 256, 16


def loader_rates(data: Data, seconds: float) -> dict[str, float]:
    """Measure the loader as training runs it.

    The first batches, which open files and start threads, are not counted.

    Returns:
      examples, seconds, examples_per_s, and, where they can be measured, examples_per_core_s (per
      second of processor time), host_memory_mb, and of a store in the network store_bytes,
      store_requests and the other counts of `network.Traffic`.
    """
    batches = host_batches(data, 0, slice(None))
    try:
        for _ in range(2):
            next(batches)
        network.TRAFFIC.take()
        start, cpu = time.perf_counter(), time.process_time()
        count = 0
        while time.perf_counter() - start < seconds:
            count += len(next(iter(next(batches).values())))  # All parts are equally long.
        elapsed = time.perf_counter() - start
        cpu_seconds = time.process_time() - cpu
    finally:
        batches.close()  # type: ignore[attr-defined]
    result = {'examples': count, 'seconds': elapsed, 'examples_per_s': count / elapsed}
    if not data.workers:  # The processor time of worker processes is not visible here.
        result['examples_per_core_s'] = count / cpu_seconds
    result |= {f'store_{name}': count for name, count in network.TRAFFIC.take().items()}
    memory = metrics.host_memory_mb()
    return result if memory is None else {**result, 'host_memory_mb': memory}


def _draw(keys: Any, first: int, number: int) -> np.ndarray:
    return order.uniform(keys, first + number)


def by_operation(data: Data) -> dict[str, float]:
    """Return microseconds per example for reading and for each operation, in one thread.

    An image is decoded by the first operation that needs its pixels, so that one bears the cost;
    of several views each operation is that of all views of its group.
    """
    source, transform = data.source, data.transform
    spent: dict[str, float] = {}
    assert data.order is not None

    def timed(name: str, function: Callable[..., Any], *args: Any) -> Any:
        began = time.perf_counter()
        result = function(*args)
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - began
        return result

    def operate(columns: Any, of: transforms.Transform, keys: Any, name: str) -> Any:
        for position, (one, operation) in enumerate(zip(of.names, of.operations, strict=True)):
            draw = functools.partial(_draw, keys, position * operations.STREAMS)
            columns = timed(f'{name}{position + 1} {one}', operation.apply, columns, draw)
        return columns

    index, _ = data.order.indices(0, source.length)
    index = np.resize(index, _EXAMPLES)
    for start in range(0, _EXAMPLES, _BATCH):
        rows = index[start : start + _BATCH]
        keys = order.example_keys(data.order.seed, 0, rows)
        columns = operate(timed('read', source.load, rows), transform, keys, '')
        if transform.views:
            columns = {**columns, 'image': timed('decode', operations.decoded, columns['image'])}
        for number, view in enumerate(transform.every_view):
            mine = order.view_keys(keys, number)
            seen = operate({'image': columns['image']}, view.transform, mine, f'{view.group}: ')
            timed('join', transforms.finished, seen, view.transform)
        if not transform.views:
            timed('join', transforms.finished, columns, transform)
    return {name: seconds / _EXAMPLES * 1e6 for name, seconds in spent.items()}


def main(argv: list[str]) -> None:
    args, overrides = command_line.parse(command_line.bench_data(), argv)
    config = config_lib.load(args.config, overrides)
    runtime.start()
    data = train_data(config)
    cost = by_operation(data)
    rates = loader_rates(data, args.seconds)
    if args.json:
        print(json.dumps({**rates, 'microseconds': cost}))
        return
    source = data.source
    print(f'data    {source.name} {source.split}: {source.length:,} examples')
    assert data.order is not None
    if data.order.shards:
        print(f'order   {windows.line(data.order.shards)}')
    total = sum(cost.values())
    rows = [(name, f'{us:,.0f}', f'{us / total:.0%}') for name, us in cost.items()]
    print(f'\n{metrics.table(("one thread", "µs an example", "share"), rows)}\n')
    slowest = max(cost, key=lambda name: cost[name])
    print(f'slowest {slowest}: {cost[slowest]:,.0f} of {total:,.0f} µs')
    workers = data.workers
    how = f'{workers} processes' if workers else f'{pipeline.default_threads()} threads'
    per_core = rates.get('examples_per_core_s')
    print(
        f'loader  {rates["examples_per_s"]:,.0f} examples/s with {how}'
        + (f', {per_core:,.0f} a second of processor time' if per_core else '')
        + (f', {rates["host_memory_mb"]:,.0f} MB' if 'host_memory_mb' in rates else '')
    )
    if 'store_requests' in rates:
        print(store_line(rates))


def store_line(rates: dict[str, float]) -> str:
    """What was asked of a store in the network, as a line."""
    reads = rates['store_hits'] + rates['store_misses']
    return (
        f'store   {rates["store_bytes"] / rates["seconds"] / 1e6:,.1f} MB/s in '
        f'{rates["store_requests"]:,.0f} requests; {rates["store_retries"]:,.0f} failed and were '
        f'sent again, {rates["store_doubled"]:,.0f} were late and sent twice'
        + (f'; {rates["store_hits"] / reads:.0%} of reads from the local disk' if reads else '')
    )


if __name__ == '__main__':
    runtime.command(main)
