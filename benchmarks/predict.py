"""Benchmark predictions beside an evaluation: `python -m benchmarks.predict`.

One model, and the same JPEG files of 500x375 pixels, in one process: each contender passes over all
files, taking turns with the others in every round, after a pass that compiles. Medians of pictures
per second, and of their ratios to the evaluation of the same round, are printed. `mu/32` is so
small that decoding decides, `Ti/16` so large that computing does.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from benchmarks import loader
from benchmarks.machine import cpu
from big_vit import config as config_lib
from big_vit import predict, predictor, runtime, train
from big_vit.build.evaluations import build_evaluators
from big_vit.build.experiment import build_experiment, fresh_state

RESULTS = Path(__file__).parent / 'results' / 'predict.json'
SIZE = 224


def contenders(
    folder: Path, workdir: Path, variant: str, batch_size: int, side: int = SIZE
) -> dict[str, Callable[[], Any]]:
    """Train a model for a step; return what passes once over all files, by contender."""
    operations = f'decode | resize_small({side * 8 // 7}) | central_crop(size) | normalize()'
    settings = {
        'total_steps': 1,
        'batch_size': batch_size,
        'image_size': side,
        'model.variant': variant,
        'model.dtype': 'float32',
        'data.name': 'folder',
        'data.path': str(folder),
        'lr': 1e-3,
        'data.cache': 'none',
        'data.transform': operations,
        'evals.test.split': 'train',
        'evals.test.transform': operations,
    }
    config = config_lib.resolve(settings)
    parts = build_experiment(config)
    params = fresh_state(parts, 0)['params']
    evaluator = build_evaluators(config, parts)['test']
    train.run(config, workdir)
    model = predictor.load(workdir, batch_size=batch_size)
    asked = model.asked(loader.files_of(folder), skip_bad=True)
    passes = itertools.count()

    def evaluation() -> None:
        with jax.set_mesh(parts.mesh):
            evaluator(params, {})

    def write(flag: str, tabulate: Callable[..., Any]) -> None:
        out = workdir / f'out{next(passes)}'
        predict.write(asked, out, flag, {'rows': 1 << 14}, tabulate)

    return {
        'evaluation': evaluation,
        'model.answers': lambda: list(model.answers(asked, {})),
        'predict --out': lambda: write('--out', partial(predict.classes_of, model, top=5)),
        'predict --embed': lambda: write('--embed', partial(predict.features_of, model)),
    }


def measure(
    passes: dict[str, Callable[[], Any]], images: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Time the contenders in turn; return medians by contender.

    Returns:
      {contender: {'images_per_s', 'ratio'}}; the ratio is to the first contender in each round.
    """
    for once in passes.values():  # Compiles.
        once()
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    names = list(passes)
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            began = time.perf_counter()
            passes[name]()
            seconds[name].append(time.perf_counter() - began)
    first = seconds[names[0]]
    return {
        name: {
            'images_per_s': images / statistics.median(taken),
            'ratio': statistics.median(a / b for a, b in zip(first, taken, strict=True)),
        }
        for name, taken in seconds.items()
    }


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = ['| model | contender | images/s | of the evaluation |', '|---|---|---|---|']
    for variant, rows in results.items():
        for name, row in rows.items():
            rate, ratio = row['images_per_s'], row['ratio']
            lines.append(f'| {variant} | {name} | {rate:,.0f} | {ratio:.2f} |')
    return '\n'.join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.predict', description=__doc__)
    parser.add_argument('--images', type=int, default=512, help='files (512)')
    parser.add_argument('--rounds', type=int, default=5, help='passes of each contender (5)')
    parser.add_argument('--variants', default='mu/32,Ti/16', help='models (mu/32,Ti/16)')
    args = parser.parse_args(argv)
    runtime.start()
    results = {}
    with tempfile.TemporaryDirectory() as place:
        about = loader.write_images(Path(place) / 'data', args.images, 375, 500)
        for variant in args.variants.split(','):
            workdir = Path(place) / variant.replace('/', '_')
            passes = contenders(Path(place) / 'data', workdir, variant, batch_size=64)
            results[variant] = measure(passes, args.images, args.rounds)
    print(table(results))
    kept = {'cpu': cpu(), 'cores': os.cpu_count(), 'load': os.getloadavg()[0], **about}
    RESULTS.write_text(json.dumps({**kept, 'rounds': args.rounds, 'results': results}, indent=1))


if __name__ == '__main__':
    runtime.command(main)
