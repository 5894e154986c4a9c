"""Compare small models on few images: `python -m benchmarks.small_data`.

Plain patches, a convolutional stem, a compact convolutional transformer, shifted patches with
locality attention and a hybrid, each with SGD and AdamW, on 4,000 images of Fashion-MNIST. Every
run may spend as many operations as six epochs of the plain ViT. The rate of each model and
optimizer is chosen among four on held-out training images with a quarter of that budget, and run
again with other seeds. A restart continues where it stopped.
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from benchmarks import machine
from benchmarks.optimizer_race import trial
from big_vit import command_line, metrics, runtime, sharding, state, storage, trees
from big_vit import config as config_lib
from big_vit.build.model import build_model
from big_vit.config import Config
from big_vit.errors import UserError
from big_vit.inspection import plots
from big_vit.models import flops
from big_vit.models.placement import unplaced

RESULTS = Path(__file__).parent / 'results'
MODELS = ('vit', 'conv', 'cct', 'spt', 'hybrid')
RATES = {'sgd': (0.03, 0.1, 0.3, 1.0), 'adamw': (7e-4, 2e-3, 6e-3, 2e-2)}
SEEDS = 3
SHAPE = {'image': (28, 28, 1)}
BUDGET = 24_000  # Training images of the plain ViT; other models get as many as cost the same.


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run; a run of the search if `seed` is 0."""

    model: str
    optimizer: str
    rate: float
    seed: int


class Cost(NamedTuple):
    """Parameters of a model, and operations of its forward pass of one image."""

    params: int
    flops: int


def cost_of(config: Config) -> Cost:
    """Return the cost of the model of a config, without opening its data."""
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    model = build_model(config, 10, SHAPE, mesh)
    params = state.abstract_params(model, SHAPE['image'])
    image = jax.ShapeDtypeStruct((1, *SHAPE['image']), jnp.float32)
    operations = flops.count(unplaced(model).apply, {'params': params}, image)
    return Cost(trees.count(params), operations)


def config_of(run: Run, budget: int, overrides: list[tuple[str, str]]) -> Config:
    """Return the config of a run, with the number of steps that its budget allows."""
    plain = config_lib.load('configs/small_data.py:model=vit', [])
    spec = f'configs/small_data.py:model={run.model},optimizer={run.optimizer}'
    base = config_lib.load(spec, overrides)
    examples = budget * cost_of(plain).flops / cost_of(base).flops
    if not run.seed:
        examples /= 4
    steps = max(round(examples / base.batch_size), 4)
    return base.replacing(
        {
            'total_epochs': None,
            'total_steps': steps,
            'lr': run.rate,
            'seed': run.seed,
            'evals.test.every_epochs': None,
            'evals.test.every_steps': steps,
            'evals.often.split': 'train[59800:]',
            'evals.often.every_steps': -(-steps // 4),
            'evals.val.split': 'train[57000:59000]',
        }
    )


class Study:
    """All runs of the study; finished ones are stored in WORKDIR/runs.jsonl."""

    def __init__(
        self,
        workdir: Path,
        budget: int,
        overrides: list[tuple[str, str]],
        models: tuple[str, ...] = MODELS,
    ):
        self.budget, self.overrides, self.models = budget, overrides, models
        self._file = epath.Path(workdir) / 'runs.jsonl'
        self._file.parent.mkdir(parents=True, exist_ok=True)
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        self._rows = [json.loads(text) for text in lines]

    def config(self, run: Run) -> Config:
        return config_of(run, self.budget, self.overrides)

    def done(self, run: Run) -> dict[str, Any] | None:
        """Return the row of a run, if it is finished and its config has not changed."""
        digest = config_lib.digest(self.config(run))
        return next((row for row in self._rows if row['config'] == digest), None)

    def search(self, model: str, optimizer: str) -> list[Run]:
        return [Run(model, optimizer, rate, 0) for rate in RATES[optimizer]]

    def finals(self, model: str, optimizer: str) -> list[Run]:
        """Return the final runs at the best rate on validation; [] until the search is done."""
        tried = self.search(model, optimizer)
        rows = [row for row in map(self.done, tried) if row is not None]
        if len(rows) < len(tried):
            return []
        best = max(rows, key=lambda row: row['val'])
        return [Run(model, optimizer, best['rate'], seed) for seed in range(1, SEEDS + 1)]

    def all(self) -> None:
        """Run what is not done yet, with one line per run; searches first, then seed by seed."""
        pairs = [(model, optimizer) for model in self.models for optimizer in RATES]
        for model, optimizer in pairs:
            for run in self.search(model, optimizer):
                self._run_if_missing(run)
        for seed in range(SEEDS):
            for model, optimizer in pairs:
                self._run_if_missing(self.finals(model, optimizer)[seed])

    def _run_if_missing(self, run: Run) -> None:
        if self.done(run):
            return
        config, start = self.config(run), time.perf_counter()
        cost = cost_of(config)
        about = {**dataclasses.asdict(run), 'config': config_lib.digest(config)}
        about |= {'params': cost.params, 'flops': cost.flops}
        about['examples'] = config.total_steps * config.batch_size
        row = {**about, **trial(config, final=run.seed > 0)}
        jax.clear_caches()
        self._rows.append(row)
        storage.write_text(self._file, ''.join(json.dumps(one) + '\n' for one in self._rows))
        print(
            f'{run.model:<7} {run.optimizer:<6} lr {run.rate:<7g} seed {run.seed}  '
            f'val {row["val"]:.4f}' + (f'  test {row["test"]:.4f}' if 'test' in row else '') +
            f'  {metrics.duration(time.perf_counter() - start)}',
            flush=True,
        )  # fmt: skip

    def results(self) -> list[dict[str, Any]]:
        """Summarise each model and optimizer over the seeds that are done."""
        summaries = []
        for model in self.models:
            for optimizer in RATES:
                rows = [row for run in self.finals(model, optimizer) if (row := self.done(run))]
                if not rows:
                    continue
                tests, tried = [row['test'] for row in rows], self.search(model, optimizer)
                searched = {run.rate: row['val'] for run in tried if (row := self.done(run))}
                spread = statistics.stdev(tests) if len(tests) > 1 else float('nan')
                summaries.append(
                    {
                        'model': model,
                        'optimizer': optimizer,
                        'rate': rows[0]['rate'],
                        'searched': searched,
                        'tests': tests,
                        'test': statistics.mean(tests),
                        'spread': spread,
                        'params': rows[0]['params'],
                        'mflop': rows[0]['flops'] / 1e6,
                        'examples': rows[0]['examples'],
                        'seconds': statistics.mean(row['seconds'] for row in rows),
                    }
                )
        return summaries


def table(results: list[dict[str, Any]]) -> str:
    """Format the results as Markdown, one line per model and optimizer."""
    header = (
        'model | optimizer | test accuracy, % (seeds) | rate | parameters | MFLOP an image | '
        'images seen | seconds'
    )
    lines = [f'| {header} |', '|' + '---|' * (header.count('|') + 1)]
    for result in results:
        cells = [
            result['model'],
            result['optimizer'],
            f'{100 * result["test"]:.2f} ± {100 * result["spread"]:.2f} ({len(result["tests"])})',
            f'{result["rate"]:g}',
            f'{result["params"]:,}',
            f'{result["mflop"]:.1f}',
            f'{result["examples"]:,.0f}',
            f'{result["seconds"]:.0f}',
        ]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Plot a bar per model and optimizer, and a dot per seed."""
    figure, axes = plots.canvas(1, 1, 7.2, 4.0)
    axis = axes[0][0]
    models = list(dict.fromkeys(result['model'] for result in results))
    for i, optimizer in enumerate(RATES):
        for result in (result for result in results if result['optimizer'] == optimizer):
            position = models.index(result['model']) + (i - 0.5) * 0.38
            label = optimizer if result['model'] == models[0] else None
            axis.bar(position, 100 * result['test'], 0.36, color=f'C{i}', alpha=0.75, label=label)
            dots = [100 * test for test in result['tests']]
            axis.plot([position] * len(dots), dots, 'k.', ms=4)
    low = min(test for result in results for test in result['tests'])
    axis.set_ylim(100 * low - 5, None)
    axis.set_xticks(range(len(models)), models)
    axis.set_ylabel('test accuracy, %')
    axis.set_title('4,000 images of Fashion-MNIST, equal operations; dots are seeds')
    axis.legend(frameon=False)
    axis.grid(axis='y', alpha=0.25)
    axis.spines[['top', 'right']].set_visible(False)
    figure.savefig(path)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m benchmarks.small_data',
        epilog='Keys of all runs can be set: --config.data.path=FOLDER.',
        allow_abbrev=False,
    )
    parser.add_argument('--workdir', default='runs/small_data', help='where runs are kept')
    parser.add_argument('--quick', action='store_true', help='a 50th of the budget: a try')
    parser.add_argument('--only', metavar='MODEL,...', help=f'of {", ".join(MODELS)}')
    parser.add_argument('--report', action='store_true', help='only of what is done already')
    args, overrides = command_line.parse(parser, argv)
    runtime.start()
    workdir = Path(args.workdir) / ('quick' if args.quick else '')
    models = tuple(args.only.split(',')) if args.only else MODELS
    for model in models:
        if model not in MODELS:
            raise UserError(f'--only: no model {model!r}; there are {", ".join(MODELS)}')
    study = Study(workdir, BUDGET // 50 if args.quick else BUDGET, overrides, models)
    if not args.report:
        study.all()
    results = study.results()
    # A partial study must not replace the published results.
    part = args.quick or args.report or args.only or overrides
    folder = workdir if part else RESULTS
    about = machine.about('jax', 'flax', 'optax', 'numpy')
    text = json.dumps({'about': about, 'results': results}, indent=1)
    (folder / 'small_data.json').write_text(text + '\n')
    (folder / 'small_data.md').write_text(table(results) + '\n')
    draw(results, folder / 'small_data.png')
    print(table(results))


if __name__ == '__main__':
    runtime.command(main)
