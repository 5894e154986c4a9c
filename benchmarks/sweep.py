"""Compare training eight learning rates at once and in turn: `python -m benchmarks.sweep`.

The trials are those of `python -m big_vit.transfer --sweep lr=...`: a small ViT on scikit-learn's
digits, trained completely or only its head. Both ways take turns in one process and include
compiling, loading, evaluating and saving; the persistent compilation cache is off.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks.machine import cpu
from big_vit import config as config_lib
from big_vit import metrics, runtime, train, transfer
from big_vit.config import Config
from big_vit.sweeps import sweep
from big_vit.sweeps.trial_journal import Trial

RESULTS = Path(__file__).parent / 'results'
RATES = tuple(0.003 * 2**i for i in range(8))


def pretrain(workdir: Path) -> None:
    """Train the checkpoint that trials start from; its quality does not affect their time."""
    overrides = [('total_epochs', 'default'), ('total_steps', '20'), ('evals.test.split', 'test')]
    train.run(config_lib.load('configs/pretrain_fdsl.py', overrides), workdir)


def recipe(init: Path, trained: str, steps: int) -> Config:
    overrides = [
        ('init', str(init)),
        ('transfer.train', trained),
        ('total_steps', str(steps)),
        ('data.split', 'train[:20%]'),
        ('evals.val.split', 'train[20%:30%]'),
    ]
    config = transfer.load_config('configs/transfer_digits.py', overrides)
    return sweep.starts(config, 'evals.test.')['pretrained']


def seconds(config: Config, folder: Path, at_once: int | None) -> tuple[float, dict[Trial, Any]]:
    """Return the seconds of all trials, and their scores."""
    jax.clear_caches()
    start = time.perf_counter()
    scores = sweep.train_all(config, (0,), RATES, lambda trial: folder / f'{trial.lr}', '', at_once)
    return time.perf_counter() - start, scores


KINDS = ('head', 'lora', 'all')


def measure(init: Path, trained: str, steps: int, rounds: int, place: Path) -> dict[str, Any]:
    """Measure all trials both ways, and the largest difference of their losses."""
    config = recipe(init, trained, steps)
    times: dict[str, list[float]] = {'at once': [], 'in turn': []}
    difference = 0.0
    for turn in range(rounds):
        results = []
        for way, most in (('at once', None), ('in turn', 1)):
            spent, scores = seconds(config, place / f'{trained}-{turn}-{most}', most)
            times[way].append(spent)
            results.append({trial.lr: row['val/loss'] for trial, row in scores.items()})
        difference = max(difference, *(abs(results[0][rate] - results[1][rate]) for rate in RATES))
    medians = {
        way: statistics.median(seconds_of_rounds) for way, seconds_of_rounds in times.items()
    }
    ratio = medians['in turn'] / medians['at once']
    return {
        'trained': trained,
        'steps': steps,
        'times': times,
        'ratio': ratio,
        'largest difference of losses': difference,
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.sweep', allow_abbrev=False)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--steps', type=int, default=100)
    parser.add_argument('--only', choices=KINDS, help='what is trained; the others stay as stored')
    args = parser.parse_args(argv)
    runtime.start()
    jax.config.update('jax_enable_compilation_cache', False)
    file = RESULTS / 'sweep.json'
    rows = json.loads(file.read_text())['rows'] if file.exists() else {}
    about = {'cpu': f'{os.cpu_count()} x {cpu()}', 'python': platform.python_version()}
    about |= {'jax': jax.__version__, 'trials': len(RATES)}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        pretrain(place / 'init')
        for trained in (args.only,) if args.only else KINDS:
            rows[trained] = measure(place / 'init', trained, args.steps, args.rounds, place)
            file.write_text(json.dumps({'about': about, 'rows': rows}, indent=1) + '\n')
    print(
        metrics.table(
            ('trained', 'steps', 'at once, s', 'in turn, s', 'ratio'),
            [
                (
                    row['trained'],
                    str(row['steps']),
                    *(f'{statistics.median(times):.1f}' for times in row['times'].values()),
                    f'{row["ratio"]:.2f}',
                )
                for row in rows.values()
            ],
        )
    )


if __name__ == '__main__':
    runtime.command(main)
