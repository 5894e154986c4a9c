"""Studies: the folder of a sweep, the setting that validation chooses, tables and a picture.

STUDY/trials.jsonl    a row for each trial: start, setting, seed, validation scores, workdir
STUDY/test.json       the chosen setting of each start and its test scores, made once
"""

import json
import math
import re
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from big_vit import checkpoint, metrics, storage
from big_vit.config.old_names import RENAMED
from big_vit.errors import UserError
from big_vit.inspection import plots

ROWS, TEST = 'trials.jsonl', checkpoint.CHOSEN
STARTS = {
    'train': 'train',
    'pretrained': 'from the checkpoint',
    'control': 'control: same recipe from random',
    'features': 'control: head on random features',
}
Row = dict[str, Any]
# What is in these files beside metrics, which are numbers, or null where there is none.
_ROW = {
    'start': str,
    'setting': dict,
    'config': str,
    'workdir': str,
    'seed': int,
    'lr': float | int,
}
_RESULT = {'setting': dict, 'trials': list, 'tests': list, 'metric': str}


def read(folder: epath.Path) -> list[Row]:
    """Read the rows of a study, former names of swept keys under today's; none without a study.

    Raises:
      UserError: a line is not the JSON of a row.
    """
    file = folder / ROWS
    rows = []
    for number, line in enumerate(file.read_bytes().splitlines() if file.exists() else [], 1):
        where, advice = f'{file}: line {number}', 'delete it, and its trial runs again'
        row = storage.parse_object(line, where, advice)
        if not _fits(row, _ROW):
            raise UserError(f'{where}: is not a row of a trial; {advice}')
        setting = row['setting']
        rows.append({**row, 'setting': {RENAMED.get(k, k): v for k, v in setting.items()}})
    return rows


def run_folders(folder: epath.Path) -> dict[str, epath.Path]:
    """List the runs in a folder by name: those of a transfer, or that a sweep chose, or all.

    Of a sweep they are the first seed of the setting that each start chose; {} for a folder that
    is a run itself, or holds none.
    """
    if results := tested(folder):
        return {start: folder / one['trials'][0] for start, one in results.items()}
    if checkpoint.steps(folder) or not folder.is_dir():
        return {}
    there = (path for path in folder.iterdir() if path.is_dir() and checkpoint.steps(path))

    def place(path: epath.Path) -> tuple[bool, list[tuple[int, str]]]:
        parts = re.findall(r'\d+|\D+', path.name)  # run_9 is before run_10.
        return path.name != 'pretrained', [(int(p), '') if p.isdigit() else (-1, p) for p in parts]

    ordered = sorted(there, key=place)
    return {path.name: path for path in ordered}


def runs_of(paths: Sequence[str]) -> list[str]:
    """Replace each folder that holds runs, as `run_folders` lists them, by these."""
    nested = []
    for path in paths:
        run, _ = checkpoint.without_selector(path)
        folders = run_folders(storage.place(run)).values()
        nested.append([str(folder) for folder in folders] or [path])
    return [path for of_one in nested for path in of_one]


def tested(folder: epath.Path) -> dict[str, dict[str, Any]]:
    """Read the chosen setting and its test scores by start; {} before one is chosen.

    Without a test there are no scores, and another choice may follow.

    Raises:
      UserError: the file is not a JSON object.
    """
    file = folder / TEST
    if not file.exists():
        return {}
    advice = 'delete it, and the test is scored again'
    results = storage.parse_object(file.read_bytes(), str(file), advice)
    # Results of before have no other metric.
    results = {
        start: {**one, 'metric': 'top1'} if isinstance(one, dict) and 'metric' not in one else one
        for start, one in results.items()
    }
    if not all(isinstance(one, dict) and _fits(one, _RESULT) for one in results.values()):
        raise UserError(f'{file}: is not the result of a test; {advice}')
    return results


def _fits(row: Row, kinds: Mapping[str, Any]) -> bool:
    """Whether a row has values of these kinds, and numbers or nothing beside them."""
    return all(isinstance(row.get(name), kind) for name, kind in kinds.items()) and all(
        value is None or isinstance(value, int | float)
        for name, value in row.items()
        if name not in kinds
    )


def write(folder: epath.Path, rows: Sequence[Row]) -> None:
    """Write all rows at once, so that a kill leaves either the old file or the new one."""
    storage.write_text(folder / ROWS, ''.join(json.dumps(row) + '\n' for row in rows))


def label(setting: Mapping[str, Any]) -> str:
    """Format a setting as 'lr=0.01, weight_decay=0.1'."""
    return ', '.join(
        f'{key.rpartition(".")[2]}={f"{value:g}" if isinstance(value, float) else value}'
        for key, value in setting.items()
    )


def _key(setting: Mapping[str, Any]) -> str:
    return json.dumps(setting, sort_keys=True)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, which is NaN for a single value."""
    if len(values) < 2:
        return statistics.fmean(values), math.nan
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def by_setting(rows: Sequence[Row], start: str) -> dict[str, list[Row]]:
    """Group the rows of a start by setting, in the order in which settings were first tried."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row['start'] == start:
            groups.setdefault(_key(row['setting']), []).append(row)
    return groups


def choose(rows: Sequence[Row], start: str, metric: str) -> list[Row]:
    """Choose the setting with the best mean of a metric, and return its rows, one for each seed.

    A trial whose score is not finite counts as worse than any other; of equal settings the one
    tried first wins.
    """

    sign = -1 if metrics.lower_is_better(metric) else 1

    def score(group: list[Row]) -> float:
        mean = sign * statistics.fmean(row[metric] for row in group)
        return mean if math.isfinite(mean) else -math.inf

    groups = by_setting(rows, start).values()
    return max(groups, key=score) if len(groups) > 1 else next(iter(groups))


def lines(rows: Sequence[Row], metric: str, starts: Mapping[str, str]) -> list[list[str]]:
    """Tabulate mean and standard error over seeds by start and setting; * marks the chosen one."""
    body: list[list[str]] = []
    for start, name in starts.items():
        groups = by_setting(rows, start)
        chosen = choose(rows, start, metric)
        for group in groups.values():
            mean, error = mean_and_error([row[metric] for row in group])
            star = '*' if group is chosen or group == chosen else ''
            error_text = metrics.shown(metric, error) if math.isfinite(error) else '-'
            setting = label(group[0]['setting']) or '-'
            body.append(
                [name, setting, star, metrics.shown(metric, mean), error_text, str(len(group))]
            )
            name = ''
    return body


def test_heads(results: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the header of `test_lines`."""
    metric = next(iter(results.values()))['metric']
    shown = f'test {"top-1" if metric == "top1" else metric}'
    return 'start', 'chosen', shown, '± seeds', '± size', 'loss', 'seeds', 'examples'


def test_lines(results: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Tabulate the test of the chosen settings, a line for each start that was tested."""

    def cell(one: Mapping[str, Any], name: str, metric: str) -> str:
        return '-' if one.get(name) is None else metrics.shown(metric, one[name])

    return [
        [
            STARTS[start],
            label(one['setting']) or '-',
            *(cell(one, name, one['metric']) for name in ('mean', 'error', 'sampling_error')),
            cell(one, 'loss', 'loss'),
            str(len(one['tests'])),
            cell(one, 'count', 'count'),
        ]
        for start, one in results.items()
        if one['tests']
    ]


def draw(
    rows: Sequence[Row], metric: str, test: Mapping[str, Any], starts: Mapping[str, str], path: Path
) -> None:
    """Draw validation by setting, a line for each start, and a bar for each chosen setting's test.

    Args:
      metric: the metric of validation.
      test: as `tested` reads it.
      starts: names of the starts in the picture.
    """
    test = {start: one for start, one in test.items() if one['tests']}
    figure, axes = plots.canvas(2 if test else 1, 1, 4.6, 3.6)
    axis, scale = axes[0][0], 100 if metrics.is_share(metric) else 1
    rates = all('lr' in row['setting'] for row in rows)
    settings = list(dict.fromkeys(_key(row['setting']) for row in rows))
    for i, (start, name) in enumerate(starts.items()):
        groups = by_setting(rows, start)
        points = []
        for key, group in groups.items():
            mean, error = mean_and_error([row[metric] for row in group])
            x = group[0]['setting']['lr'] if rates else settings.index(key)
            points.append((x, scale * mean, scale * error if math.isfinite(error) else 0.0))
        x, mean, error = zip(*sorted(points), strict=True)
        axis.errorbar(
            x, mean, error, fmt='o-' if rates else 'o', ms=4, capsize=3, color=f'C{i}', label=name
        )
    if rates and all(row['lr'] > 0 for row in rows):
        axis.set_xscale('log')
        tried = sorted({row['lr'] for row in rows})
        axis.minorticks_off()
        axis.set_xticks(tried, [f'{rate:g}' for rate in tried], fontsize=8)
        axis.set_xlabel('learning rate')
    else:
        names = [label(json.loads(key)) for key in settings]
        axis.set_xticks(range(len(names)), names, rotation=30, ha='right', fontsize=7)
    axis.set_ylabel(f'{metric}, %' if scale == 100 else metric)
    axis.set_title('validation, mean ± standard error')
    axis.grid(alpha=0.25)
    if len(starts) > 1:
        axis.legend(frameon=False, fontsize=8)
    if test:
        axis = axes[0][1]
        for i, result in enumerate(test.values()):
            mean, error = result['mean'], result['error']
            axis.bar(i, scale * mean, 0.6, color=f'C{i}', alpha=0.75,
                     yerr=scale * error if error is not None else None, capsize=4)  # fmt: skip
            shown = f'{scale * mean:.1f}' if scale == 100 else f'{mean:.3g}'
            axis.text(i, 0, shown, ha='center', va='bottom', fontsize=9)
        names = [textwrap.fill(starts[name], 16) for name in test]
        axis.set_xticks(range(len(test)), names, fontsize=8)
        axis.set_xlim(-1, len(test))
        axis.set_title('test, once, of what was chosen')
        axis.grid(axis='y', alpha=0.25)
    for one in axes[0]:
        one.spines[['top', 'right']].set_visible(False)
    figure.savefig(path)
