"""Eight learning rates at once against one after the other: `python -m benchmarks.sweep`.

The trials are those of `python -m big_vit.transfer --sweep lr=...`: a small ViT on the digits of
scikit-learn, all of it trained or a head alone. Both ways run in turns in one process, compiling,
loading, evaluating and saving included; the persistent cache of programs is off.
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

from benchmarks.checkpoint import cpu
from big_vit import config as config_lib
from big_vit import metrics, runtime, sweep, train, transfer
from big_vit.config import Config
from big_vit.trials import Trial

RESULTS = Path(__file__).parent / 'results'
RATES = tuple(0.003 * 2**i for i in range(8))


def pretrain(workdir: Path) -> None:
    """What the trials start from; how good it is does not matter to their time."""
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
    """Of all trials, with what they found."""
    jax.clear_caches()
    began = time.perf_counter()
    found = sweep.train_all(config, (0,), RATES, lambda trial: folder / f'{trial.lr}', '', at_once)
    return time.perf_counter() - began, found


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.sweep', allow_abbrev=False)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--steps', type=int, default=100)
    args = parser.parse_args(argv)
    runtime.start()
    jax.config.update('jax_enable_compilation_cache', False)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        pretrain(place / 'init')
        for trained in ('head', 'lora', 'all'):
            config = recipe(place / 'init', trained, args.steps)
            times: dict[str, list[float]] = {'at once': [], 'in turn': []}
            for turn in range(args.rounds):
                results = []
                for way, most in (('at once', None), ('in turn', 1)):
                    folder = place / f'{trained}-{turn}-{most}'
                    spent, found = seconds(config, folder, most)
                    times[way].append(spent)
                    results.append({trial.lr: row['val/loss'] for trial, row in found.items()})
                apart = max(abs(results[0][rate] - results[1][rate]) for rate in RATES)
            middle = {way: statistics.median(every) for way, every in times.items()}
            rows.append({'trained': trained, 'times': times, 'largest difference of losses': apart})
            rows[-1]['ratio'] = middle['in turn'] / middle['at once']
    about = {'cpu': f'{os.cpu_count()} x {cpu()}', 'python': platform.python_version()}
    about |= {'jax': jax.__version__, 'steps': args.steps, 'trials': len(RATES)}
    text = json.dumps({'about': about, 'rows': rows}, indent=1)
    (RESULTS / 'sweep.json').write_text(text + '\n')
    print(
        metrics.table(
            ('trained', 'at once, s', 'in turn, s', 'ratio'),
            [
                (
                    row['trained'],
                    *(f'{statistics.median(row["times"][way]):.1f}' for way in times),
                    f'{row["ratio"]:.2f}',
                )
                for row in rows
            ],
        )
    )


if __name__ == '__main__':
    runtime.command(main)
