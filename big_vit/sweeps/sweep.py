"""Sweeps: settings and seeds of one recipe, chosen by validation and tested once.

Trials that differ in learning rate and seed alone are trained at once (`vmapped_trials`), or one
after the other by `train.run`. A sweep that was killed goes on with the trials that are missing.
"""

import functools
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from big_vit import checkpoint, evaluate, metrics, storage, train
from big_vit import config as config_lib
from big_vit.build.experiment import Experiment, build_experiment
from big_vit.config import Config
from big_vit.config.old_names import renamed
from big_vit.data import dataset
from big_vit.distributed import hosts
from big_vit.errors import UserError
from big_vit.evaluators.registry import EVALUATORS, requirements
from big_vit.journal import Diverged
from big_vit.pretrained.load import initial_params
from big_vit.sweeps import study, vmapped_trials
from big_vit.sweeps.trial_journal import Trial
from big_vit.workdir import owned

# Patterns of the parameters that are trained beside the head, by transfer.train.
TRAINED: dict[str, tuple[str, ...]] = {
    'head': (),
    'attention': ('.*/MultiHeadDotProductAttention_0/.*',),
    'norm': ('.*norm.*', '.*LayerNorm.*'),
    'bias': ('.*bias',),
    'lora': ('.*/lora_[ab]',),
}
HEAD = 'head(_dist)?/.*'


def rules(trained: str) -> tuple[tuple[str, float], ...]:
    """Build the value of `optim.lr_rules` that trains the head and some parameters, and no others.

    Args:
      trained: a key of TRAINED.
    """
    return (*((pattern, 1.0) for pattern in (*TRAINED[trained], HEAD)), ('.*', 0.0))


def values(text: str) -> tuple[str, list[str]]:
    """Split 'lr=1e-3,3e-3' into its key and its values; commas in brackets or quotes stay.

    Raises:
      UserError: it is not of that form, or a value comes twice.
    """
    key, equals, rest = text.partition('=')
    words, depth, quote, word = [], 0, '', ''
    for char in rest:
        if quote:
            quote = '' if char == quote else quote
        elif char in '\'"':
            quote = char
        depth += (char in '([') - (char in ')]') if not quote else 0
        if char == ',' and not depth and not quote:
            words.append(word)
            word = ''
        else:
            word += char
    words = [word.strip() for word in (*words, word)]
    if not key or not equals or not all(words):
        raise UserError(f'--sweep {text}: write --sweep KEY=VALUE,VALUE, as in lr=1e-3,3e-3,1e-2')
    if len(set(words)) < len(words):
        raise UserError(f'--sweep {text}: a value comes twice')
    return key.strip(), words


def settings(config: Config, swept: Sequence[str]) -> list[dict[str, Any]]:
    """List every combination of swept values, each checked by the config.

    Args:
      swept: texts KEY=VALUE,VALUE.

    Raises:
      UserError: an unknown key, a wrong value, or a key that a sweep must not change.
    """
    by_key: dict[str, list[Any]] = {}
    for text in swept:
        key, words = values(text)
        key, _ = renamed(key, None)
        if key.startswith(('evals.', 'transfer.')) or key in ('seed', 'init'):
            raise UserError(
                f'--sweep {key}: trials could not be compared; '
                + ('--seeds N sets how many seeds' if key == 'seed' else 'leave it to --config')
            )
        if key in by_key:
            raise UserError(f'--sweep {key} comes twice: write all its values in one')
        by_key[key] = [
            config_lib.flatten(config_lib.override(config, [(key, word)]).to_dict())[key]
            for word in words
        ]
    combinations = itertools.product(*by_key.values())
    return [dict(zip(by_key, combination, strict=True)) for combination in combinations]


def check_splits(parts: Experiment, validation: str | None, test: str) -> None:
    """Refuse to choose by examples that are trained or tested on, as far as their indices tell.

    Raises:
      UserError: two of the splits have examples in common.
    """
    trained = [('data', spec) for spec in parts.data.specs]
    held_out = {n: (f'evals.{n}', parts.evals[n].specs[0]) for n in (validation, test) if n}
    pairs = [(held_out[test], one) for one in trained]
    if validation:
        pairs += [(held_out[validation], one) for one in (*trained, held_out[test])]
    for (key, spec), (other_key, other) in pairs:
        if count := dataset.in_both(spec, other):
            raise UserError(
                f'config: {key}.split={spec.split!r} and {other_key}.split={other.split!r} have '
                f'{count} examples in common: a sweep chooses and reports on examples that were '
                "held out; cut them apart, as in data.split='train[:90%]' and "
                "evals.val.split='train[90%:]'"
            )


def starts(config: Config, *left_out: str) -> dict[str, Config]:
    """Derive the config of each start: the checkpoint, and its controls.

    Args:
      left_out: prefixes of keys to leave out.
    """
    plain = config.without('transfer.', *left_out)
    configs = {'pretrained': plain}
    if config.transfer.control:
        configs['control'] = plain.without('init')
    # Where only a head is trained, the first control has random features already.
    if config.transfer.random_features and config.transfer.train != 'head':
        head_alone = plain.without('init', 'optim.lr_rules', 'optim.layer_decay')
        configs['features'] = head_alone.replacing({'optim.lr_rules': rules('head')})
    return configs


def make_params(config: Config) -> Callable[[Experiment], Any] | None:
    """Return a function that loads the parameters to start from; None to start from random ones."""
    return initial_params(config, keep_head=False) if config.init else None


def _train_alone(config: Config, trial: Trial, workdir: epath.Path, label: str) -> dict[str, float]:
    """Train or resume one trial by `train.run`; return its last metrics, {} where it diverged."""
    trial_config = config.replacing({'lr': trial.lr, 'seed': trial.seed})
    try:
        result = train.run(trial_config, workdir, params=make_params(trial_config), label=label)
    except Diverged as error:
        print(f'WARNING {label} lr {trial.lr:g} seed {trial.seed}: {error}', file=sys.stderr)
        return {}
    if result.stopped:
        raise vmapped_trials.Stopped
    return result.metrics


def train_all(
    config: Config,
    seeds: Sequence[int],
    rates: Sequence[float],
    folder: Callable[[Trial], epath.Path],
    label: str,
    at_once: int | None,
) -> dict[Trial, dict[str, float]]:
    """Train every rate with every seed, as many at once as fit in memory.

    Args:
      folder: gives the workdir of a trial.
      at_once: most trials in one program; None for as many as fit.

    Returns:
      The last metrics of each trial.
    """
    many = len(seeds) * len(rates)
    one_by_one = config.optim.peek('name') in vmapped_trials.ONE_BY_ONE
    if one_by_one or config.optim.peek('group_rules'):
        at_once = 1
    if many == 1 or at_once == 1:
        return {
            trial: _train_alone(config, trial, folder(trial), label)
            for trial in (Trial(rate, seed) for seed in seeds for rate in rates)
        }
    if at_once is None or many <= at_once:
        try:
            return vmapped_trials.run(config, seeds, rates, folder, start=make_params, label=label)
        except vmapped_trials.DoNotFit:
            at_once = many // 2
    # Rates of a seed share their batches, so seeds are split first.
    halves: list[tuple[Sequence[int], Sequence[float]]]
    if len(seeds) > 1:
        middle = len(seeds) // 2
        halves = [(seeds[:middle], rates), (seeds[middle:], rates)]
    else:
        middle = len(rates) // 2
        halves = [(seeds, rates[:middle]), (seeds, rates[middle:])]
    results: dict[Trial, dict[str, float]] = {}
    for some_seeds, some_rates in halves:
        results |= train_all(config, some_seeds, some_rates, folder, label, at_once)
    return results


def run(
    config: Config,
    workdir: epath.Path,
    swept: Sequence[str] = (),
    seeds: int = 1,
    at_once: int | None = None,
    force: bool = False,
) -> dict[str, dict[str, Any]] | None:
    """Train the missing trials of a sweep, choose a setting for each start, and test it.

    Args:
      swept: texts KEY=VALUE,VALUE.
      seeds: number of seeds of each setting, from the config's seed on.
      at_once: most trials in one program; None for as many as fit in memory.
      force: test again, though the test was scored with another choice.

    Returns:
      By start {'setting', 'tests', 'mean', 'error', 'count', ...}; None if a signal ended it.

    Raises:
      UserError: anything the user can fix, before anything is trained.
    """
    combinations = settings(config, swept)
    config_lib.check_names(config.evals)
    validation: str | None = config.transfer.validation
    test = config.transfer.test
    _check_evals(config, validation, test, len(combinations))
    if validation not in config.evals:
        validation = None
    check_splits(build_experiment(config), validation, test)
    with owned(workdir):
        wanted = _train_missing(config, workdir, combinations, seeds, at_once, validation, test)
        if wanted is None:
            return None
        return _test_chosen(config, workdir, wanted, validation, test, force)


def _train_missing(
    config: Config,
    workdir: epath.Path,
    combinations: Sequence[dict[str, Any]],
    seeds: int,
    at_once: int | None,
    validation: str | None,
    test: str,
) -> list[study.Row] | None:
    """Train the trials that the study lacks; return the rows of all, None if a signal ended it."""
    rows, wanted = study.read(workdir), []
    for start, base in starts(config, f'evals.{test}.').items():
        for other in _without_rates(combinations):
            setting_config = config_lib.with_values(base, other)
            rates = [one['lr'] for one in combinations if 'lr' in one and {**one, **other} == one]
            trials = _trial_rows(setting_config, start, other, rates, seeds, rows)
            wanted += trials
            missing = [row for row in trials if 'seconds' not in row]
            for group in [[row] for row in missing] if at_once == 1 else _rectangles(missing):
                try:
                    _train(setting_config, workdir, group, validation, at_once)
                except vmapped_trials.Stopped:
                    return None
                rows += group
                hosts.lead(functools.partial(study.write, workdir, rows))
    return wanted


def _without_rates(combinations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """List the settings without their learning rate, each once."""
    others = [{key: value for key, value in one.items() if key != 'lr'} for one in combinations]
    return [one for i, one in enumerate(others) if one not in others[:i]]


def _train(
    config: Config,
    workdir: epath.Path,
    group: list[study.Row],
    validation: str | None,
    at_once: int | None,
) -> None:
    """Train a group of trials and add their last metrics to their rows.

    Raises:
      vmapped_trials.Stopped: a signal ended it.
    """
    began, rows = time.perf_counter(), {Trial(row['lr'], row['seed']): row for row in group}
    seeds, rates = (
        list(dict.fromkeys(column)) for column in zip(*((t.seed, t.lr) for t in rows), strict=True)
    )
    setting = {key: value for key, value in group[0]['setting'].items() if key != 'lr'}
    label = f'{group[0]["start"]} {study.label(setting)}'.strip()
    results = train_all(
        config, seeds, rates, lambda trial: workdir / rows[trial]['workdir'], label, at_once
    )
    names = ['train/loss', *(f'{validation}/{n}' for n in ('top1', 'loss') if validation)]
    for trial, last in results.items():
        values = {name: last.get(name, math.nan) for name in names}
        # JSON has no NaN.
        rows[trial] |= {n: value if math.isfinite(value) else None for n, value in values.items()}
        rows[trial]['seconds'] = (time.perf_counter() - began) / len(group)


def _check_evals(config: Config, validation: str | None, test: str, combinations: int) -> None:
    """Raise UserError unless the evaluations that choose and report are there and fit."""
    if test not in config.evals:
        raise UserError(
            f'config: transfer.test={test!r} is no evaluation: set evals.{test}.split, or '
            'transfer.test to one of ' + (', '.join(config.evals) or 'none yet')
        )
    if combinations > 1 and validation not in config.evals:
        raise UserError(
            f'config: a sweep chooses by evals.{validation}, which is not there: hold out a part '
            f"of the training data, as in --config.data.split='train[:90%]' "
            f"--config.evals.{validation}.split='train[90%:]'"
        )
    fitting = [kind for kind in EVALUATORS if requirements(kind).head_top1]
    for name in (validation, test):
        if name in config.evals and config.evals[name].type not in (None, *fitting):
            raise UserError(
                f'config: evals.{name}.type must be {" or ".join(fitting)}: a sweep chooses and '
                'reports by the top-1 of the head; give evaluations of other types another name'
            )
    if config.switch is not None:
        raise UserError('config: switch goes on with a run of train; a transfer starts from init')
    if validation == test:
        raise UserError('config: transfer.validation and transfer.test must not be the same')


def _trial_rows(
    config: Config,
    start: str,
    other: Mapping[str, Any],
    rates: Sequence[float],
    seeds: int,
    rows: Sequence[study.Row],
) -> list[study.Row]:
    """Make a row for each rate and seed, or take it from the study where that trial is done.

    Args:
      other: values of the setting without the rate.
      rates: empty where the rate is not swept, but the config's.
      rows: rows of the study.
    """
    trials, first = [], config.peek('seed')
    for seed in range(first, first + seeds):
        for rate in rates or [config.peek('lr')]:
            setting = {'lr': rate, **other} if rates else dict(other)
            digest = config_lib.digest(config.replacing({'lr': rate, 'seed': seed}))
            done = [r for r in rows if (r['start'], r['config']) == (start, digest)]
            name = f'{study.label(setting)}, seed={seed}'.removeprefix(', ')
            fresh = {
                'start': start,
                'setting': setting,
                'lr': rate,
                'seed': seed,
                'config': digest,
                'workdir': f'trials/{start}/{_file_name(name)}-{digest[:6]}',
            }
            trials.append(done[0] if done else fresh)
    return trials


def _file_name(text: str) -> str:
    return ''.join(c if c.isalnum() or c in '=.-' else '_' for c in text.replace(', ', '-'))[:80]


def _rectangles(rows: Sequence[study.Row]) -> list[list[study.Row]]:
    """Group rows so that in each group every seed has the same rates."""
    by_seed: dict[int, list[study.Row]] = {}
    for row in rows:
        by_seed.setdefault(row['seed'], []).append(row)
    groups: dict[tuple[float, ...], list[study.Row]] = {}
    for seed_rows in by_seed.values():
        groups.setdefault(tuple(row['lr'] for row in seed_rows), []).extend(seed_rows)
    return list(groups.values())


def _test_chosen(
    config: Config,
    workdir: epath.Path,
    rows: Sequence[study.Row],
    validation: str | None,
    test: str,
    force: bool,
) -> dict[str, dict[str, Any]]:
    """Score the setting that validation chooses on the test split, unless that was done before."""
    file = workdir / study.TEST
    before = study.tested(workdir)
    results: dict[str, dict[str, Any]] = {}
    for start in dict.fromkeys(row['start'] for row in rows):
        scored = [{**row, **_nan_for_none(row)} for row in rows if row['start'] == start]
        chosen = study.choose(scored, start, f'{validation}/top1') if validation else scored
        if not all(checkpoint.steps(workdir / row['workdir']) for row in chosen):
            print(f'WARNING {start}: every setting diverged with some seed: lower the rates',
                  file=sys.stderr)  # fmt: skip
            continue
        trials = [row['workdir'] for row in chosen]
        if start in before and before[start]['trials'] != trials and not force:
            old = before[start]
            raise UserError(
                f'{file}: the test split was scored with another choice for {start} '
                f'({study.label(old["setting"]) or "no setting"}, {len(old["trials"])} seed(s)): '
                'choosing again would select on the test; use another --workdir, or --force'
            )
        if start in before and before[start]['trials'] == trials:
            results[start] = before[start]
            continue
        scores = [_test_scores(config, workdir / path, test) for path in trials]
        tests = [one['top1'] for one in scores]
        mean, error = study.mean_and_error(tests)
        count = scores[0]['count']
        # Even one seed has this error, from the size of the test split.
        sampling = math.sqrt(mean * (1 - mean) / count)
        results[start] = {
            'setting': chosen[0]['setting'],
            'trials': trials,
            'tests': tests,
            'mean': mean,
            'error': error if math.isfinite(error) else None,
            'sampling_error': sampling,
            'loss': float(np.mean([one['loss'] for one in scores])),
            'count': count,
        }
    if not results:
        raise UserError('--sweep: every trial diverged: lower the rates')
    text = json.dumps(results, indent=1) + '\n'
    hosts.lead(lambda: storage.write_text(file, text))
    return results


def _nan_for_none(row: study.Row) -> study.Row:
    return {k: math.nan for k, v in row.items() if v is None}


def _test_scores(config: Config, workdir: epath.Path, test: str) -> dict[str, float]:
    """Score a trial's last state on the test split."""
    flat = config_lib.flatten(config.to_dict())
    overrides = [
        (key, value if isinstance(value, str) else repr(value))
        for key, value in flat.items()
        if key.startswith(f'evals.{test}.') and value is not None
    ]
    return evaluate.run(Path(workdir), checkpoint.steps(workdir)[-1], overrides)[test]


def report(rows: Sequence[study.Row], results: Mapping[str, Any], config: Config) -> str:
    """Tabulate validation and test."""
    names = {start: study.STARTS[start] for start in results}
    tables = []
    validation = f'{config.transfer.validation}/top1'
    if all(validation in row for row in rows):
        header = ('start', 'setting', '', validation, '±', 'seeds')
        tables.append(metrics.table(header, study.lines(rows, validation, names)))
    tables.append(metrics.table(study.TEST_HEADS, study.test_lines(results)))
    return '\n\n'.join(tables)


def draw(config: Config, workdir: epath.Path, results: Mapping[str, Any]) -> Path | None:
    """Draw WORKDIR/sweep.png, if the workdir is a local folder and all trials were validated."""
    rows, metric = study.read(workdir), f'{config.transfer.validation}/top1'
    if not storage.is_local(workdir) or not all(metric in row for row in rows):
        return None
    path = Path(workdir) / 'sweep.png'
    study.draw(rows, metric, results, {start: study.STARTS[start] for start in results}, path)
    return path
