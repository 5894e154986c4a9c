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
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from big_vit import checkpoint, evaluate, metrics, storage, train
from big_vit import config as config_lib
from big_vit.build.evaluations import check_chosen
from big_vit.build.experiment import Experiment, build_experiment
from big_vit.build.task import build_task
from big_vit.config import Config
from big_vit.config.old_names import renamed
from big_vit.data import dataset
from big_vit.distributed import hosts
from big_vit.errors import UserError
from big_vit.evaluators.registry import EVALUATORS, requirements
from big_vit.journal import Diverged
from big_vit.pretrained.standardise import start_params
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


class Recipe(NamedTuple):
    """What a sweep trains.

    Attributes:
      starts: derives the config of each start, without some prefixes of keys, from the whole one.
      make_params: of a start, gives the function that loads the parameters to start from, if any.
      must_test: whether there must be a test; a sweep of `train` may do without.
    """

    starts: Callable[..., dict[str, Config]]
    make_params: Callable[[Config], Callable[[Experiment], Any] | None]
    must_test: bool


class Judges(NamedTuple):
    """The metrics that choose a setting and that score it once, such as val/top1; None for none."""

    validation: str | None
    test: str | None


def check_splits(parts: Experiment, validation: str | None, test: str | None) -> None:
    """Refuse to choose by examples that are trained or tested on, as far as their indices tell.

    Raises:
      UserError: two of the splits have examples in common.
    """
    trained = [('data', spec) for spec in parts.data.specs]
    held_out = {n: (f'evals.{n}', parts.evals[n].specs[0]) for n in (validation, test) if n}
    pairs = [(one, other) for one in held_out.values() for other in trained]
    if validation and test:
        pairs.append((held_out[validation], held_out[test]))
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


def make_params(config: Config, keep_head: bool = False) -> Callable[[Experiment], Any] | None:
    """Return a function that loads the parameters to start from; None to start from random ones."""
    return start_params(config, keep_head)


TRANSFER = Recipe(starts, make_params, must_test=True)
TRAIN = Recipe(
    lambda config, *left_out: {'train': config.without('transfer.', *left_out)},
    functools.partial(make_params, keep_head=True),
    must_test=False,
)


def _train_alone(
    config: Config,
    trial: Trial,
    workdir: epath.Path,
    label: str,
    make_params: Callable[[Config], Callable[[Experiment], Any] | None],
) -> dict[str, float]:
    """Train or resume one trial by `train.run`; return its last metrics, {} where it diverged."""
    trial_config = config.replacing({'lr': trial.lr, 'seed': trial.seed})
    try:
        result = train.run(trial_config, workdir, params=make_params(trial_config), label=label)
    except Diverged as error:
        print(f'WARNING {label} lr {trial.lr:g} seed {trial.seed}: {error}', file=sys.stderr)
        return {}
    if result.stopped:
        raise vmapped_trials.Stopped
    step = scored_step(config, workdir)
    if step == result.step:
        return result.metrics
    rows = [row for row in metrics.read(workdir) if row['step'] <= step]
    return metrics.latest(rows)


def scored_step(config: Config, workdir: epath.Path) -> int:
    """Return the step of a trial that is scored: its best by `checkpoint.best`, or its last."""
    chosen = f'{workdir}@best' if config.checkpoint.peek('best') else workdir
    return checkpoint.locate(chosen)[1]


def train_all(
    config: Config,
    seeds: Sequence[int],
    rates: Sequence[float],
    folder: Callable[[Trial], epath.Path],
    label: str,
    at_once: int | None,
    make_params: Callable[[Config], Callable[[Experiment], Any] | None] = make_params,
) -> dict[Trial, dict[str, float]]:
    """Train every rate with every seed, as many at once as fit in memory.

    Args:
      folder: gives the workdir of a trial.
      at_once: most trials in one program; None for as many as fit.
      make_params: of the `Recipe`.

    Returns:
      The last metrics of each trial.
    """
    many = len(seeds) * len(rates)
    one_by_one = config.optim.peek('name') in vmapped_trials.ONE_BY_ONE
    task = build_task(config.task)
    # What beside parameters a run starts with is of `train`.
    one_by_one |= task.teacher is not None or bool(config.init and task.continues)
    # A trial that chooses a checkpoint may end before the others.
    if one_by_one or config.optim.peek('group_rules') or config.checkpoint.peek('best'):
        at_once = 1
    if many == 1 or at_once == 1:
        return {
            trial: _train_alone(config, trial, folder(trial), label, make_params)
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
        results |= train_all(config, some_seeds, some_rates, folder, label, at_once, make_params)
    return results


def run(
    config: Config,
    workdir: epath.Path,
    swept: Sequence[str] = (),
    seeds: int = 1,
    at_once: int | None = None,
    force: bool = False,
    recipe: Recipe = TRANSFER,
) -> dict[str, dict[str, Any]] | None:
    """Train the missing trials of a sweep, choose a setting for each start, and test it.

    Args:
      swept: texts KEY=VALUE,VALUE.
      seeds: number of seeds of each setting, from the config's seed on.
      at_once: most trials in one program; None for as many as fit in memory.
      force: test again, though the test was scored with another choice.
      recipe: TRANSFER or TRAIN.

    Returns:
      By start {'setting', 'tests', 'mean', 'error', 'count', ...}; None if a signal ended it.

    Raises:
      UserError: anything the user can fix, before anything is trained.
    """
    combinations = settings(config, swept)
    config_lib.check_names(config.evals)
    _check_evals(config, len(combinations), recipe)
    judges, parts = judges_of(config), build_experiment(config)
    _check_judges(config, parts, judges)
    check_splits(parts, *(m and _evaluation(m) for m in judges))
    with owned(workdir):
        wanted = _train_missing(config, workdir, combinations, seeds, at_once, judges, recipe)
        if wanted is None:
            return None
        return _test_chosen(config, workdir, wanted, judges, force)


def _train_missing(
    config: Config,
    workdir: epath.Path,
    combinations: Sequence[dict[str, Any]],
    seeds: int,
    at_once: int | None,
    judges: Judges,
    recipe: Recipe,
) -> list[study.Row] | None:
    """Train the trials that the study lacks; return the rows of all, None if a signal ended it."""
    rows, wanted = study.read(workdir), []
    left_out = [f'evals.{_evaluation(judges.test)}.'] if judges.test else []
    for start, base in recipe.starts(config, *left_out).items():
        for other in _without_rates(combinations):
            setting_config = config_lib.with_values(base, other)
            rates = [one['lr'] for one in combinations if 'lr' in one and {**one, **other} == one]
            trials = _trial_rows(setting_config, start, other, rates, seeds, rows)
            wanted += trials
            missing = [row for row in trials if 'seconds' not in row]
            for group in [[row] for row in missing] if at_once == 1 else _rectangles(missing):
                try:
                    _train(setting_config, workdir, group, judges.validation, at_once, recipe)
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
    recipe: Recipe,
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
        config,
        seeds,
        rates,
        lambda trial: workdir / rows[trial]['workdir'],
        label,
        at_once,
        recipe.make_params,
    )
    names = ['train/loss']
    if validation:
        names += [validation, f'{_evaluation(validation)}/loss']
    for trial, last in results.items():
        values = {name: last.get(name, math.nan) for name in names}
        # JSON has no NaN.
        rows[trial] |= {n: value if math.isfinite(value) else None for n, value in values.items()}
        rows[trial]['seconds'] = (time.perf_counter() - began) / len(group)


def _evaluation(metric: str) -> str:
    return metric.partition('/')[0]


def judges_of(config: Config) -> Judges:
    """Name the metrics that choose and score; of an evaluation alone it is the head's top-1."""
    given = config.transfer.validation, config.transfer.test
    validation, test = (
        (m if '/' in m else f'{m}/top1') if _evaluation(m) in config.evals else None for m in given
    )
    if (
        validation and test and '/' not in config.transfer.test
    ):  # By the same, where nothing is said.
        test = f'{test.partition("/")[0]}/{validation.partition("/")[2]}'
    return Judges(validation, test)


def _check_evals(config: Config, combinations: int, recipe: Recipe) -> None:
    """Raise UserError unless the evaluations that choose and report are there and fit."""
    validation, test = _evaluation(config.transfer.validation), _evaluation(config.transfer.test)
    if test not in config.evals and (recipe.must_test or config.sets('transfer.test')):
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
    if config.switch is not None:
        raise UserError('config: switch goes on with a run of train; a sweep starts from init')
    if validation == test:
        raise UserError('config: transfer.validation and transfer.test must not be the same')
    if config.checkpoint.peek('best') and _evaluation(config.checkpoint.peek('best')) == test:
        raise UserError(
            f'config: checkpoint.best must not choose by evals.{test}, which a sweep scores once'
        )


def _check_judges(config: Config, parts: Experiment, judges: Judges) -> None:
    """Raise UserError unless the evaluations measure what chooses and scores."""
    fitting = [kind for kind in EVALUATORS if requirements(kind).head_top1]
    for key, metric in judges._asdict().items():
        name, given = _evaluation(metric or ''), config.transfer.peek(key)
        if metric is None:
            continue
        if metric == f'{given}/top1' and config.evals[name].type not in (None, *fitting):
            raise UserError(
                f'config: evals.{name}.type must be {" or ".join(fitting)}: a sweep chooses and '
                'reports by the top-1 of the head; or name another metric, as in '
                f"transfer.{key}='{name}/METRIC'"
            )
        check_chosen(config, parts, f'transfer.{key}', metric)


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
    judges: Judges,
    force: bool,
) -> dict[str, dict[str, Any]]:
    """Score the setting that validation chooses on the test split, unless that was done before."""
    file, validation = workdir / study.TEST, judges.validation
    before = study.tested(workdir)
    results: dict[str, dict[str, Any]] = {}
    for start in dict.fromkeys(row['start'] for row in rows):
        scored = [{**row, **_nan_for_none(row)} for row in rows if row['start'] == start]
        chosen = study.choose(scored, start, validation) if validation else scored
        if not all(checkpoint.steps(workdir / row['workdir']) for row in chosen):
            print(f'WARNING {start}: every setting diverged with some seed: lower the rates',
                  file=sys.stderr)  # fmt: skip
            continue
        trials, old = [row['workdir'] for row in chosen], before.get(start)
        if old and old['tests'] and old['trials'] != trials and not force:
            raise UserError(
                f'{file}: the test split was scored with another choice for {start} '
                f'({study.label(old["setting"]) or "no setting"}, {len(old["trials"])} seed(s)): '
                'choosing again would select on the test; use another --workdir, or --force'
            )
        if old and old['trials'] == trials and (old['tests'] or not judges.test):
            results[start] = old
            continue
        results[start] = {
            'setting': chosen[0]['setting'],
            'trials': trials,
            **_tests(config, workdir, trials, judges.test),
        }
    if not results:
        raise UserError('--sweep: every trial diverged: lower the rates')
    text = json.dumps(results, indent=1) + '\n'
    hosts.lead(lambda: storage.write_text(file, text))
    return results


def _tests(
    config: Config, workdir: epath.Path, trials: Sequence[str], metric: str | None
) -> dict[str, Any]:
    """Score trials on the test split; {'metric', 'tests', 'mean', 'error', ...}."""
    if metric is None:
        return {'metric': '', 'tests': []}
    test, _, name = metric.partition('/')
    scores = [_test_scores(config, workdir / path, test) for path in trials]
    tests = [one[name] for one in scores]
    (mean, error), count = study.mean_and_error(tests), scores[0]['count']
    # Even one seed has this error, from the size of the test split.
    sampling = math.sqrt(mean * (1 - mean) / count) if name.startswith('top') else None
    losses = [one['loss'] for one in scores if 'loss' in one]
    return {
        'metric': name,
        'tests': tests,
        'mean': mean,
        'error': error if math.isfinite(error) else None,
        'sampling_error': sampling,
        'loss': float(np.mean(losses)) if losses else None,
        'count': count,
    }


def _nan_for_none(row: study.Row) -> study.Row:
    return {k: math.nan for k, v in row.items() if v is None}


def _test_scores(config: Config, workdir: epath.Path, test: str) -> dict[str, float]:
    """Score a trial on the test split."""
    flat = config_lib.flatten(config.to_dict())
    overrides = [
        (key, value if isinstance(value, str) else repr(value))
        for key, value in flat.items()
        if key.startswith(f'evals.{test}.') and value is not None
    ]
    return evaluate.run(Path(workdir), scored_step(config, workdir), overrides)[test]


def report(rows: Sequence[study.Row], results: Mapping[str, Any], config: Config) -> str:
    """Tabulate validation and test."""
    names = {start: study.STARTS[start] for start in results}
    tables = []
    validation = judges_of(config).validation
    if validation and all(validation in row for row in rows):
        header = ('start', 'setting', '', validation, '±', 'seeds')
        scored = [{**row, **_nan_for_none(row)} for row in rows]
        tables.append(metrics.table(header, study.lines(scored, validation, names)))
    if lines := study.test_lines(results):
        tables.append(metrics.table(study.test_heads(results), lines))
    else:
        tables.append('nothing was tested: the config has no evals.test')
    return '\n\n'.join(tables)


def draw(config: Config, workdir: epath.Path, results: Mapping[str, Any]) -> Path | None:
    """Draw WORKDIR/sweep.png, if the workdir is a local folder and all trials were validated."""
    rows, metric = study.read(workdir), judges_of(config).validation
    if not metric or not storage.is_local(workdir) or not all(metric in row for row in rows):
        return None
    path = Path(workdir) / 'sweep.png'
    scored = [{**row, **_nan_for_none(row)} for row in rows]
    study.draw(scored, metric, results, {s: study.STARTS[s] for s in results}, path)
    return path


def show(config: Config, workdir: epath.Path, results: Mapping[str, Any]) -> None:
    """Print the tables of a sweep and draw its picture."""
    print(f'\n{report(study.read(workdir), results, config)}\n')
    if config.transfer.published:
        print(f'published   {config.transfer.published}')
    if picture := draw(config, workdir, results):
        print(f'drew    {picture}')
    chosen = next(iter(results.values()))['trials'][0]
    look = f'look inside: python -m big_vit.explore {workdir}/{chosen}'
    print(f'done    {workdir}/{study.TEST}; {look}')
