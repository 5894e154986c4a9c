"""Compare optimizers on Fashion-MNIST with equal tuning: `python -m benchmarks.optimizer_race`.

Every optimizer gets the same number of learning rates on an equally wide grid, and as many steps of
the same schedule. The rate that is best on held-out training images is run again with other seeds
and scored on the test images. Takes about an hour on two cores; a restart continues where it
stopped.
"""

import argparse
import difflib
import json
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import jax
from etils import epath

from benchmarks import machine
from big_vit import command_line, ledger, metrics, runtime, state, steps, storage
from big_vit import config as config_lib
from big_vit.build.evaluations import build_evaluators
from big_vit.build.experiment import (
    abstract_batch,
    build_experiment,
    eval_batches,
    is_due,
    train_batches,
)
from big_vit.build.steps import build_train_step
from big_vit.config import Config
from big_vit.config.schema import SCHEMA
from big_vit.errors import UserError
from big_vit.evaluators import classification
from big_vit.evaluators.evaluation import BatchMeans
from big_vit.inspection import plots
from big_vit.journal import MAX_SKIPPED_IN_A_ROW

RESULTS = Path(__file__).parent / 'results'
CONFIG = 'configs/fashion_mnist.py'

# name: (config overrides, the learning rate in the middle of its grid).
SETTINGS: dict[str, tuple[dict[str, Any], float]] = {
    'sgd': ({'optim.name': 'sgd', 'optim.momentum': 0}, 0.5),
    'momentum': ({'optim.name': 'sgd', 'optim.momentum': 0.9}, 0.1),
    'adamw': ({'optim.name': 'adamw'}, 2e-3),
    'sam': ({'optim.name': 'adamw', 'optim.sam_rho': 0.05}, 2e-3),
    'schedule_free_adamw': (
        {'optim.name': 'schedule_free_adamw', 'schedule.name': 'constant'},
        5e-3,
    ),
    'adafactor': ({'optim.name': 'adafactor'}, 6e-2),
    'adafactor_vit': ({'optim.name': 'adafactor_vit'}, 3e-3),
    'lion': ({'optim.name': 'lion'}, 6e-4),
    'lars': ({'optim.name': 'lars'}, 2.0),
    'lamb': ({'optim.name': 'lamb'}, 3e-2),
    'muon': ({'optim.name': 'muon'}, 6e-3),
    'soap': (
        {
            'optim.name': 'soap',
            'optim.block': 64,  # With 256, a step takes twice as long on a CPU.
        },
        3e-3,
    ),
    'shampoo': (
        {
            'optim.name': 'shampoo',
            'optim.every': 10,
            'optim.start': 10,
            'optim.block': 256,
        },
        2e-3,
    ),
}
FACTOR = 3.0  # Ratio of neighbouring rates of a grid.
RATES, SEEDS = 5, 3
TARGET = 0.8  # Accuracy on the split `often`.

# Overrides of every trial. No weight decay: one epoch does not overfit, and as the decay is
# multiplied by the rate, it would differ between optimizers.
SHARED: dict[str, Any] = {
    'model.width': 64,
    'model.depth': 2,
    'model.num_heads': 4,
    'model.mlp_dim': 256,
    'batch_size': 128,
    'total_epochs': 1,
    'schedule.warmup_percent': 10,
    'optim.weight_decay': 0,
    'data.split': 'train[:90%]',
    'data.transform': 'resize(size)',
    'evals.val.split': 'train[90%:]',
    'evals.often.split': 'train[98%:]',
    'evals.often.every_steps': 20,
}
QUICK = [('total_steps', '150')]


def grid(centre: float, count: int) -> list[float]:
    """Return ascending rates around a centre; for an even count, one more is below it."""
    return [float(f'{centre * FACTOR ** (i - count // 2):.3g}') for i in range(count)]


def missing(name: str) -> str:
    """Return what the schema lacks for an optimizer of the table; '' if nothing."""
    keys = SETTINGS[name][0]
    if keys['optim.name'] not in ledger.optimizers():
        return f'optim.name={keys["optim.name"]}'
    return ', '.join(key for key in keys if key not in SCHEMA)


def trial(config: Config, final: bool) -> dict[str, Any]:
    """Train once as `train.run` does, without saving anything; return the figures of the row.

    Args:
      final: also score on the test images.
    """
    parts = build_experiment(config)
    step, scorers = build_train_step(config, parts), {}
    for name, evaluator in build_evaluators(config, parts).items():
        assert isinstance(evaluator, BatchMeans)
        sums = evaluator.sums
        scorers[name] = steps.make_eval_step(sums, parts.abstract_state, parts.mesh)
    config.audit()
    costs = ledger.measure(parts.abstract_state)
    with jax.set_mesh(parts.mesh):
        shape, eval_interval = parts.data.inputs, parts.intervals.evals['often']
        train_state = state.create(
            parts.model, shape, parts.optimizer, config.seed, parts.abstract_state
        )
        held_out = {
            name: list(eval_batches(parts, name))
            for name in ('often', 'val', *(['test'] if final else []))
        }

        def accuracy(name: str) -> float:
            scored = train_state.get('ema', train_state['params'])
            return classification.run(scorers[name], scored, held_out[name])['top1']

        accuracy('often')  # Compiles the evaluation, which is not to be timed.
        start = time.perf_counter()
        step = step.lower(train_state, abstract_batch(parts)).compile()
        compiling, seconds, curve, lost, values = time.perf_counter() - start, 0.0, [], False, None
        with train_batches(config, parts, 0) as batches:
            start = time.perf_counter()
            for number in range(1, parts.total_steps + 1):
                batch, before = next(batches), values
                train_state, values = step(train_state, batch)
                if before is not None:  # Keep one step in flight, as in a run.
                    jax.block_until_ready(before)
                if is_due(eval_interval, number, parts.total_steps):
                    jax.block_until_ready(values)
                    seconds += time.perf_counter() - start
                    curve.append((number, accuracy('often')))
                    lost = int(values['skipped_in_a_row']) >= MAX_SKIPPED_IN_A_ROW
                    if lost:
                        break
                    start = time.perf_counter()
        return {
            'val': accuracy('val'),
            **({'test': accuracy('test')} if final else {}),
            'curve': curve,
            'steps': curve[-1][0],
            'lost': lost,  # A run would have stopped here: its updates are not finite.
            'skipped': int(values['skipped']),
            'seconds': seconds,
            'compile_seconds': compiling,
            'params': costs.params.scalars,
            'optimizer_bytes': costs.optimizer_total.nbytes,
            'state_bytes': costs.state.nbytes,
        }


class Race:
    """All trials of the race; finished ones are stored in WORKDIR/trials.jsonl."""

    def __init__(
        self,
        names: list[str],
        workdir: Path,
        rates: int,
        seeds: int,
        overrides: list[tuple[str, str]],
    ):
        self.names, self.rates, self.seeds = names, rates, seeds
        self._overrides, self._file = overrides, epath.Path(workdir) / 'trials.jsonl'
        self._file.parent.mkdir(parents=True, exist_ok=True)
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        self._rows = [json.loads(text) for text in lines]
        self._base = config_lib.load(CONFIG)

    def config(self, name: str, rate: float, seed: int) -> Config:
        changes = {**SHARED, **SETTINGS[name][0], 'lr': rate, 'seed': seed}
        return config_lib.override(self._base.replacing(changes), self._overrides)

    def done(self, name: str, rate: float, seed: int) -> dict[str, Any] | None:
        """Return the row of a trial, if it is finished and its config has not changed."""
        digest = config_lib.digest(self.config(name, rate, seed))
        return next((row for row in self._rows if row['config'] == digest), None)

    def run(self, name: str, rate: float, seed: int) -> dict[str, Any]:
        """Return the row of a trial, running it if necessary; rows are stored atomically."""
        stored = self.done(name, rate, seed)
        if stored:
            return stored
        config = self.config(name, rate, seed)
        about = {'name': name, 'rate': rate, 'seed': seed, 'config': config_lib.digest(config)}
        row = {**about, **trial(config, final=seed > 0)}
        jax.clear_caches()  # Apart from the evaluation, no program is used again.
        self._rows.append(row)
        text = ''.join(json.dumps(one) + '\n' for one in self._rows)
        storage.write_text(self._file, text)
        return row

    def search(self, name: str) -> list[tuple[float, int]]:
        """Return (rate, seed) of the trials of the first round."""
        return [(rate, 0) for rate in grid(SETTINGS[name][1], self.rates)]

    def best(self, name: str) -> dict[str, Any] | None:
        """Return the trial of the first round that is best on validation, once all are done."""
        rows = [self.done(name, *one) for one in self.search(name)]
        return max(rows, key=lambda row: row['val']) if all(rows) else None

    def finals(self, name: str) -> list[tuple[float, int]]:
        best = self.best(name)
        return [(best['rate'], seed) for seed in range(1, self.seeds + 1)] if best else []

    def all(self) -> None:
        """Run what is not done yet, with one line per trial."""
        trials_per_optimizer, left, spent = self.rates + self.seeds, 0, []
        for name in self.names:
            known = [*self.search(name), *self.finals(name)]
            left += trials_per_optimizer - sum(self.done(name, *one) is not None for one in known)
        for name in self.names:
            for part in (self.search, self.finals):
                for rate, seed in part(name):
                    if self.done(name, rate, seed):
                        continue
                    start = time.perf_counter()
                    row = self.run(name, rate, seed)
                    spent.append(time.perf_counter() - start)
                    left -= 1
                    rest = metrics.duration(left * statistics.mean(spent))
                    print(
                        f'{name:<20} lr {rate:<8g} seed {seed}  val {row["val"]:.4f}'
                        + (f'  test {row["test"]:.4f}' if 'test' in row else '')
                        + ('  LOST' if row['lost'] else '')
                        + f'  {row["seconds"]:.1f} s + {spent[-1] - row["seconds"]:.1f} s around it'
                        f'  {left} left, about {rest}',
                        flush=True,
                    )


def steps_to(target: float, curve: list[tuple[int, float]]) -> float:
    """Return the step of the first evaluation at or above the target; inf if there is none."""
    return next((number for number, accuracy in curve if accuracy >= target), math.inf)


def result(race: Race, name: str) -> dict[str, Any] | None:
    """Summarise the trials of an optimizer; None while some are missing."""
    best = race.best(name)
    finals = [race.done(name, *one) for one in race.finals(name)]
    if best is None or not all(finals):
        return None
    search = [race.done(name, *one) for one in race.search(name)]
    rates, tests = [row['rate'] for row in search], [row['test'] for row in finals]
    reached = [steps_to(TARGET, row['curve']) for row in finals]
    step = statistics.mean(row['seconds'] / row['steps'] for row in finals)
    steps = statistics.mean(reached)
    return {
        'name': name,
        'settings': SETTINGS[name][0],
        'rates': {row['rate']: row['val'] for row in search},
        'best_rate': best['rate'],
        'edge': {rates[0]: 'lowest', rates[-1]: 'highest'}.get(best['rate'], ''),
        'lost': [row['rate'] for row in search if row['lost']],
        'tests': tests,
        'test': statistics.mean(tests),
        'test_error': statistics.stdev(tests) / len(tests) ** 0.5 if len(tests) > 1 else math.nan,
        'reached': sum(map(math.isfinite, reached)),
        'steps_to_target': steps if math.isfinite(steps) else None,
        'seconds_to_target': steps * step if math.isfinite(steps) else None,
        'step_seconds': step,
        'seconds': statistics.mean(row['seconds'] for row in finals),
        'compile_seconds': statistics.mean(row['compile_seconds'] for row in finals),
        'optimizer_bytes_per_parameter': best['optimizer_bytes'] / best['params'],
        'state_bytes_per_parameter': best['state_bytes'] / best['params'],
        'curve': [
            (points[0][0], statistics.mean(accuracy for _, accuracy in points))
            for points in zip(*(row['curve'] for row in finals), strict=False)
        ],
    }


def table(results: list[dict[str, Any]]) -> str:
    """Format the results as Markdown, the best on top."""
    header = (
        'optimizer | rate | test accuracy, % | '
        f'steps to {TARGET:.0%} | seconds to {TARGET:.0%} | ms a step | seconds in all | '
        'compiling, s | bytes of its own a parameter | note'
    )
    lines = [f'| {header} |', '|' + '---|' * (header.count('|') + 1)]
    for entry in sorted(results, key=lambda r: -r['test']):
        seeds, reached, steps = (
            len(entry['tests']),
            entry['reached'],
            entry['steps_to_target'],
        )
        note = [f'best at the {entry["edge"]} rate tried'] if entry['edge'] else []
        if entry['lost']:
            note.append(f'lost at {", ".join(f"{rate:g}" for rate in entry["lost"])}')
        cells = [
            entry['name'],
            f'{entry["best_rate"]:g}',
            f'{entry["test"]:.2%} ± {entry["test_error"]:.2%}'.replace('%', ''),
            f'{steps:.0f}' if steps else f'{reached} of {seeds} reached it',
            f'{entry["seconds_to_target"]:.1f}' if steps else '-',
            f'{entry["step_seconds"] * 1e3:.1f}',
            f'{entry["seconds"]:.1f}',
            f'{entry["compile_seconds"]:.1f}',
            f'{entry["optimizer_bytes_per_parameter"]:.2f}',
            '; '.join(note),
        ]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Plot accuracy by step at the best rate, and by rate."""
    figure, axes = plots.canvas(2, 1, 6.4, 4.8)
    by_step, by_rate = axes[0]
    ordered = sorted(results, key=lambda r: -r['test'])
    for i, entry in enumerate(ordered):
        # There are ten colours; later lines are dashed.
        style = {'color': f'C{i % 10}', 'ls': '-' if i < 10 else '--', 'lw': 1.4}
        by_step.plot(*zip(*entry['curve'], strict=True), label=entry['name'], **style)
        rates = sorted(entry['rates'])
        by_rate.plot(rates, [entry['rates'][r] for r in rates], marker='o', ms=3, **style)
        by_rate.plot([entry['best_rate']], [entry['rates'][entry['best_rate']]], 'k*', ms=6)
    top = max(accuracy for entry in results for _, accuracy in entry['curve'])
    by_step.axhline(TARGET, color='k', lw=0.7, ls=':')
    by_step.set_title('held-out accuracy by step, at the best rate')
    by_step.set_xlabel('step')
    by_rate.set_title('held-out accuracy by peak learning rate')
    by_rate.set_xscale('log')
    by_rate.set_xlabel('learning rate')
    for axis in axes[0]:
        # Accuracies far below, or at chance, would squeeze all others into a line.
        axis.set_ylim(max(0.0, min(top, TARGET) - 0.3), min(1.0, max(top, TARGET) + 0.02))
        axis.grid(alpha=0.25)
        axis.spines[['top', 'right']].set_visible(False)
    by_step.legend(frameon=False, fontsize=8, ncols=2, loc='lower right')
    figure.savefig(path)


def report(race: Race, folder: Path) -> None:
    """Print the table, and write it to a folder with all figures and plots."""
    by_name = {name: result(race, name) for name in race.names}
    results = [one for one in by_name.values() if one]
    if not results:
        return
    config = race.config('adamw', SETTINGS['adamw'][1], 0)
    about = {
        **machine.about('jax', 'flax', 'optax', 'numpy'),
        'load at the end': [round(value, 2) for value in os.getloadavg()],
        'rates': race.rates,
        'factor between rates': FACTOR,
        'seeds': race.seeds,
        'target': TARGET,
        'config of adamw': config_lib.flatten(config.to_dict()),
    }
    text = json.dumps({'about': about, 'results': results}, indent=1)
    (folder / 'optimizer_race.json').write_text(text + '\n')
    (folder / 'optimizer_race.md').write_text(table(results) + '\n')
    draw(results, folder / 'optimizer_race.png')
    print(table(results))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m benchmarks.optimizer_race',
        epilog='Keys of all trials can be set: --config.total_steps=400.',
        allow_abbrev=False,
    )
    parser.add_argument('--only', default='', help='some of ' + ','.join(SETTINGS))
    parser.add_argument('--workdir', default='runs/race', help='where finished trials are kept')
    parser.add_argument('--quick', action='store_true', help='150 steps, 3 rates, 2 seeds: a try')
    args, overrides = command_line.parse(parser, argv)
    names = [name for name in args.only.split(',') if name] or list(SETTINGS)
    for name in names:
        if name not in SETTINGS:
            near = difflib.get_close_matches(name, SETTINGS, n=1)
            hint = f'did you mean {near[0]}? ' if near else ''
            raise UserError(f'--only: no {name!r}; {hint}there are {", ".join(SETTINGS)}')
        if missing(name):
            print(f'skip    {name}: the schema has no {missing(name)}', flush=True)
    names = [name for name in names if not missing(name)]
    runtime.start()
    workdir = Path(args.workdir) / ('quick' if args.quick else '')
    rates, seeds = (3, 2) if args.quick else (RATES, SEEDS)
    race = Race(names, workdir, rates, seeds, [*(QUICK if args.quick else []), *overrides])
    race.all()
    # A partial race must not replace the published results.
    report(race, workdir if args.quick or overrides or args.only else RESULTS)


if __name__ == '__main__':
    runtime.command(main)
