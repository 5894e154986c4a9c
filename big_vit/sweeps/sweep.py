"""A sweep: settings and seeds of one recipe, chosen by validation, and scored on the test once.

Trials that differ in learning rate and seed alone are trained together (`trials`), or one after
the other by `train.run`. Killed, it goes on with the trials that are missing.
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
from big_vit.data import dataset
from big_vit.distributed import hosts
from big_vit.errors import UserError
from big_vit.journal import Diverged
from big_vit.pretrained.load import initial_params
from big_vit.sweeps import study, vmapped_trials
from big_vit.sweeps.trial_journal import Trial

# Rules for `optim.lr_rules` by transfer.train; what none of them names is frozen.
TRAINED: dict[str, tuple[str, ...]] = {
    'head': (),
    'attention': ('.*/MultiHeadDotProductAttention_0/.*',),
    'norm': ('.*norm.*', '.*LayerNorm.*'),
    'bias': ('.*bias',),
    'lora': ('.*/lora_[ab]',),
}
HEAD = 'head(_dist)?/.*'


def rules(trained: str) -> tuple[tuple[str, float], ...]:
    """Factors on the rate that freeze all but the head and what is named."""
    return (*((pattern, 1.0) for pattern in (*TRAINED[trained], HEAD)), ('.*', 0.0))


def values(text: str) -> tuple[str, list[str]]:
    """'lr=1e-3,3e-3' as its key and the texts of its values; brackets and quotes hold commas.

    Raises:
      UserError: it is not of that form, or a value comes twice.
    """
    key, equals, rest = text.partition('=')
    found, depth, quote, now = [], 0, '', ''
    for sign in rest:
        if quote:
            quote = '' if sign == quote else quote
        elif sign in '\'"':
            quote = sign
        depth += (sign in '([') - (sign in ')]') if not quote else 0
        if sign == ',' and not depth and not quote:
            found.append(now)
            now = ''
        else:
            now += sign
    found = [word.strip() for word in (*found, now)]
    if not key or not equals or not all(found):
        raise UserError(f'--sweep {text}: write --sweep KEY=VALUE,VALUE, as in lr=1e-3,3e-3,1e-2')
    if len(set(found)) < len(found):
        raise UserError(f'--sweep {text}: a value comes twice')
    return key.strip(), found


def settings(config: Config, swept: Sequence[str]) -> list[dict[str, Any]]:
    """Every combination of the values, each checked by the config.

    Raises:
      UserError: an unknown key, a wrong value, or a key that says what a sweep must not change.
    """
    each: dict[str, list[Any]] = {}
    for text in swept:
        key, words = values(text)
        if key.startswith(('evals.', 'transfer.')) or key in ('seed', 'init'):
            raise UserError(
                f'--sweep {key}: trials could not be compared; '
                + ('--seeds N sets how many seeds' if key == 'seed' else 'leave it to --config')
            )
        if key in each:
            raise UserError(f'--sweep {key} comes twice: write all its values in one')
        each[key] = [
            config_lib.flatten(config_lib.override(config, [(key, word)]).to_dict())[key]
            for word in words
        ]
    return [dict(zip(each, found, strict=True)) for found in itertools.product(*each.values())]


def check_splits(parts: Experiment, validation: str | None, test: str) -> None:
    """Refuses to choose by what is trained on or tested on, as far as places in datasets tell.

    Raises:
      UserError: two of the splits have examples in common.
    """
    train_ = [('data', spec) for spec in parts.data.specs]
    own = {n: (f'evals.{n}', parts.evals[n].specs[0]) for n in (validation, test) if n}
    pairs = [(own[test], one) for one in train_]
    if validation:
        pairs += [(own[validation], one) for one in (*train_, own[test])]
    for (key, spec), (other_key, other) in pairs:
        if count := dataset.in_both(spec, other):
            raise UserError(
                f'config: {key}.split={spec.split!r} and {other_key}.split={other.split!r} have '
                f'{count} examples in common: a sweep chooses and reports on examples that were '
                "held out; cut them apart, as in data.split='train[:90%]' and "
                "evals.val.split='train[90%:]'"
            )


def starts(config: Config, *left_out: str) -> dict[str, Config]:
    """The config of each start, without the keys that begin as `left_out`."""
    plain = config.without('transfer.', *left_out)
    found = {'pretrained': plain}
    if config.transfer.control:
        found['control'] = plain.without('init')
    # With a head alone the first control has random features already.
    if config.transfer.random_features and config.transfer.train != 'head':
        alone = plain.without('init', 'optim.lr_rules', 'optim.layer_decay')
        found['features'] = alone.replacing({'optim.lr_rules': rules('head')})
    return found


def _params(config: Config) -> Callable[[Experiment], Any] | None:
    return initial_params(config, keep_head=False) if config.init else None


class Stopped(Exception):
    """A signal ended a trial, which the same command resumes."""


def _alone(config: Config, trial: Trial, workdir: epath.Path, label: str) -> dict[str, float]:
    """One trial by `train.run`, which resumes it; {} where it diverged."""
    own = config.replacing({'lr': trial.lr, 'seed': trial.seed})
    try:
        ended = train.run(own, workdir, params=_params(own), label=label)
    except Diverged as error:
        print(f'WARNING {label} lr {trial.lr:g} seed {trial.seed}: {error}', file=sys.stderr)
        return {}
    if ended.stopped:
        raise Stopped
    return ended.metrics


def train_all(
    config: Config,
    seeds: Sequence[int],
    rates: Sequence[float],
    folder: Callable[[Trial], epath.Path],
    label: str,
    at_once: int | None,
) -> dict[Trial, dict[str, float]]:
    """Trains rates x seeds, as many at once as fit and are asked for."""
    many = len(seeds) * len(rates)
    one_by_one = config.optim.peek('name') in vmapped_trials.ONE_BY_ONE
    if one_by_one or config.optim.peek('group_rules'):
        at_once = 1
    if many == 1 or at_once == 1:
        return {
            trial: _alone(config, trial, folder(trial), label)
            for trial in (Trial(rate, seed) for seed in seeds for rate in rates)
        }
    if at_once is None or many <= at_once:
        try:
            return vmapped_trials.run(config, seeds, rates, folder, start=_params, label=label)
        except vmapped_trials.DoNotFit:
            at_once = many // 2
    # Rates of a seed share their batches, so seeds are parted first.
    halves: list[tuple[Sequence[int], Sequence[float]]]
    if len(seeds) > 1:
        middle = len(seeds) // 2
        halves = [(seeds[:middle], rates), (seeds[middle:], rates)]
    else:
        middle = len(rates) // 2
        halves = [(seeds, rates[:middle]), (seeds, rates[middle:])]
    found: dict[Trial, dict[str, float]] = {}
    for some_seeds, some_rates in halves:
        found |= train_all(config, some_seeds, some_rates, folder, label, at_once)
    return found


def run(
    config: Config,
    workdir: epath.Path,
    swept: Sequence[str] = (),
    seeds: int = 1,
    at_once: int | None = None,
    force: bool = False,
) -> dict[str, dict[str, Any]] | None:
    """Trains what is missing of a sweep, chooses for each start, and tests what was chosen.

    Args:
      swept: texts KEY=VALUE,VALUE.
      seeds: seeds of each setting, from the config's on.
      at_once: most trials in one program; by default as many as memory allows.
      force: test again, though the test was scored with another choice.

    Returns:
      By start {'setting', 'tests', 'mean', 'error', 'count', ...}; None if a signal ended it.

    Raises:
      UserError: whatever the user can fix, before anything is trained.
    """
    each = settings(config, swept)
    validation: str | None = config.transfer.validation
    test = config.transfer.test
    _check_evals(config, validation, test, len(each))
    if validation not in config.evals:
        validation = None
    check_splits(build_experiment(config), validation, test)
    rows, wanted = study.read(workdir), []
    for start, base in starts(config, f'evals.{test}.').items():
        for other in _others(each):
            own = config_lib.with_values(base, other)
            rates = [one['lr'] for one in each if 'lr' in one and {**one, **other} == one]
            of_this = _trials(own, start, other, rates, seeds, rows)
            wanted += of_this
            missing = [row for row in of_this if 'seconds' not in row]
            for group in [[row] for row in missing] if at_once == 1 else _alike(missing):
                try:
                    _train(own, workdir, group, validation, at_once)
                except Stopped:
                    return None
                rows += group
                hosts.lead(functools.partial(study.write, workdir, rows))
    return _tested(config, workdir, wanted, validation, test, force)


def _others(each: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What settings have beside the rate, each once."""
    found = [{key: value for key, value in one.items() if key != 'lr'} for one in each]
    return [one for i, one in enumerate(found) if one not in found[:i]]


def _train(
    config: Config,
    workdir: epath.Path,
    group: list[study.Row],
    validation: str | None,
    at_once: int | None,
) -> None:
    """Trains a group of trials and writes into their rows what came out.

    Raises:
      Stopped: a signal ended it.
    """
    began, rows = time.perf_counter(), {Trial(row['lr'], row['seed']): row for row in group}
    seeds, rates = (
        list(dict.fromkeys(column)) for column in zip(*((t.seed, t.lr) for t in rows), strict=True)
    )
    setting = {key: value for key, value in group[0]['setting'].items() if key != 'lr'}
    label = f'{group[0]["start"]} {study.label(setting)}'.strip()
    ended = train_all(
        config, seeds, rates, lambda trial: workdir / rows[trial]['workdir'], label, at_once
    )
    names = ['train/loss', *(f'{validation}/{n}' for n in ('top1', 'loss') if validation)]
    for trial, found in ended.items():
        values = {name: found.get(name, math.nan) for name in names}
        # NaN is no JSON.
        rows[trial] |= {n: value if math.isfinite(value) else None for n, value in values.items()}
        rows[trial]['seconds'] = (time.perf_counter() - began) / len(group)


def _check_evals(config: Config, validation: str | None, test: str, settings_: int) -> None:
    if test not in config.evals:
        raise UserError(
            f'config: transfer.test={test!r} is no evaluation: set evals.{test}.split, or '
            'transfer.test to one of ' + (', '.join(config.evals) or 'none yet')
        )
    if settings_ > 1 and validation not in config.evals:
        raise UserError(
            f'config: a sweep chooses by evals.{validation}, which is not there: hold out a part '
            f"of the training data, as in --config.data.split='train[:90%]' "
            f"--config.evals.{validation}.split='train[90%:]'"
        )
    for name in (validation, test):
        if name in config.evals and config.evals[name].type not in (None, 'classification'):
            raise UserError(
                f'config: evals.{name}.type must be classification: a sweep chooses and reports by '
                'the top-1 of the head; give evaluations of other types another name'
            )
    if config.switch is not None:
        raise UserError('config: switch goes on with a run of train; a transfer starts from init')
    if validation == test:
        raise UserError('config: transfer.validation and transfer.test must not be the same')


def _trials(
    config: Config,
    start: str,
    other: Mapping[str, Any],
    rates: Sequence[float],
    seeds: int,
    rows: Sequence[study.Row],
) -> list[study.Row]:
    """A row for each rate and seed: that of the study where it is done already.

    Args:
      rates: none where the rate is not swept, but the config's.
    """
    found, first = [], config.peek('seed')
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
            found.append(done[0] if done else fresh)
    return found


def _file_name(text: str) -> str:
    return ''.join(c if c.isalnum() or c in '=.-' else '_' for c in text.replace(', ', '-'))[:80]


def _alike(rows: Sequence[study.Row]) -> list[list[study.Row]]:
    """Groups that are a whole product of seeds and rates: seeds that miss the same rates."""
    by_seed: dict[int, list[study.Row]] = {}
    for row in rows:
        by_seed.setdefault(row['seed'], []).append(row)
    groups: dict[tuple[float, ...], list[study.Row]] = {}
    for own in by_seed.values():
        groups.setdefault(tuple(row['lr'] for row in own), []).extend(own)
    return list(groups.values())


def _tested(
    config: Config,
    workdir: epath.Path,
    rows: Sequence[study.Row],
    validation: str | None,
    test: str,
    force: bool,
) -> dict[str, dict[str, Any]]:
    """Scores what validation chooses on the test split, or gives the scores that there are."""
    file = workdir / study.TEST
    before = study.tested(workdir)
    results: dict[str, dict[str, Any]] = {}
    for start in dict.fromkeys(row['start'] for row in rows):
        scored = [{**row, **_finite(row)} for row in rows if row['start'] == start]
        chosen = study.choose(scored, start, f'{validation}/top1') if validation else scored
        if not all(checkpoint.steps(workdir / row['workdir']) for row in chosen):
            print(f'WARNING {start}: every setting diverged with some seed: lower the rates',
                  file=sys.stderr)  # fmt: skip
            continue
        trials_ = [row['workdir'] for row in chosen]
        if start in before and before[start]['trials'] != trials_ and not force:
            old = before[start]
            raise UserError(
                f'{file}: the test split was scored with another choice for {start} '
                f'({study.label(old["setting"]) or "no setting"}, {len(old["trials"])} seed(s)): '
                'choosing again would select on the test; use another --workdir, or --force'
            )
        if start in before and before[start]['trials'] == trials_:
            results[start] = before[start]
            continue
        found = [_score(config, workdir / path, test) for path in trials_]
        tests = [one['top1'] for one in found]
        mean, error = study.mean_and_error(tests)
        # One seed still has the error of the size of the test split.
        share, count = mean, found[0]['count']
        sampling = math.sqrt(share * (1 - share) / count)
        results[start] = {
            'setting': chosen[0]['setting'],
            'trials': trials_,
            'tests': tests,
            'mean': mean,
            'error': error if math.isfinite(error) else None,
            'sampling_error': sampling,
            'loss': float(np.mean([one['loss'] for one in found])),
            'count': count,
        }
    if not results:
        raise UserError('--sweep: every trial diverged: lower the rates')
    text = json.dumps(results, indent=1) + '\n'
    hosts.lead(lambda: storage.write_text(file, text))
    return results


def _finite(row: study.Row) -> study.Row:
    return {k: math.nan for k, v in row.items() if v is None}


def _score(config: Config, workdir: epath.Path, test: str) -> dict[str, float]:
    """The test scores of a trial's last state."""
    flat = config_lib.flatten(config.to_dict())
    own = [
        (key, value if isinstance(value, str) else repr(value))
        for key, value in flat.items()
        if key.startswith(f'evals.{test}.') and value is not None
    ]
    return evaluate.run(Path(workdir), checkpoint.steps(workdir)[-1], own)[test]


def report(rows: Sequence[study.Row], results: Mapping[str, Any], config: Config) -> str:
    """The table of validation, and that of the test."""
    named = {start: study.STARTS[start] for start in results}
    parts = []
    validation = f'{config.transfer.validation}/top1'
    if all(validation in row for row in rows):
        heads = ('start', 'setting', '', validation, '±', 'seeds')
        parts.append(metrics.table(heads, study.lines(rows, validation, named)))
    parts.append(metrics.table(study.TEST_HEADS, study.test_lines(results)))
    return '\n\n'.join(parts)


def draw(config: Config, workdir: epath.Path, results: Mapping[str, Any]) -> Path | None:
    """Writes WORKDIR/sweep.png, where that is a local folder and there is something to compare."""
    rows, metric = study.read(workdir), f'{config.transfer.validation}/top1'
    if not storage.is_local(workdir) or not all(metric in row for row in rows):
        return None
    path = Path(workdir) / 'sweep.png'
    study.draw(rows, metric, results, {start: study.STARTS[start] for start in results}, path)
    return path
