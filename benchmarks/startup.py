"""Time startup: `python -m benchmarks startup`.

Measures help and imports, and the time from the command line to the end of the first step of
ViT-S/16 at 224 px on eight fake CPU devices: cold, and with the program in JAX's persistent cache.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import machine
from big_vit import metrics
from big_vit.errors import UserError

FILE = Path(__file__).parent / 'results' / 'startup.json'
SHORT = {
    'python -m big_vit.train --help': ['-m', 'big_vit.train', '--help'],
    'python -m big_vit.plan --help': ['-m', 'big_vit.plan', '--help'],
    'import jax': ['-c', 'import jax'],
    'import big_vit.train': ['-c', 'import big_vit.train'],
}
RUN = {
    'total_steps': 2,
    'batch_size': 8,
    'image_size': 224,
    'evals.test.split': 'test[:8]',
    'log.every_steps': 1,
}
DEVICES = 8


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f'benchmarks startup: {arguments}: {done.stderr.strip()[-300:]}')
    return time.perf_counter() - start


def first_step(cache: Path, workdir: Path) -> float:
    """Return seconds from the start of the process until it reports step 1."""
    flags = [f'--config.{key}={value}' for key, value in RUN.items()]
    config = 'configs/pretrain_fdsl.py:variant=S/16'
    command = [sys.executable, '-m', 'big_vit.train', '--config', config, *flags]
    environment = {
        **os.environ,
        'JAX_PLATFORMS': 'cpu',
        'JAX_NUM_CPU_DEVICES': str(DEVICES),
        'JAX_COMPILATION_CACHE_DIR': str(cache),
        'PYTHONUNBUFFERED': '1',
    }
    start = time.perf_counter()
    with subprocess.Popen(
        [*command, '--workdir', str(workdir)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith('train'):
                elapsed = time.perf_counter() - start
                process.communicate()
                return elapsed
    raise UserError(f'benchmarks startup: {"".join(lines)[-300:]}')


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks startup', allow_abbrev=False)
    parser.add_argument('--rounds', type=int, default=5)
    args = parser.parse_args(argv)
    times: dict[str, list[float]] = {name: [] for name in SHORT}
    for _ in range(args.rounds):
        for name, arguments in SHORT.items():
            times[name].append(seconds(arguments))
    for number in range(max(args.rounds // 2, 1)):
        with tempfile.TemporaryDirectory() as folder:
            for kind in ('cold', 'cached'):
                name = f'first step of S/16, {DEVICES} devices, {kind}'
                spent = first_step(Path(folder) / 'cache', Path(folder) / f'{kind}{number}')
                times.setdefault(name, []).append(spent)
    about = machine.about('jax')
    FILE.write_text(json.dumps({'about': about, 'seconds': times}, indent=1) + '\n')
    rows = [
        (name, *(f'{value:.2f}' for value in (statistics.median(all_), min(all_), max(all_))))
        for name, all_ in times.items()
    ]
    print(metrics.table(('what', 'median, s', 'least', 'most'), rows))
