"""Studies: the folder of a sweep, the setting that validation chooses, tables and a picture.

STUDY/trials.jsonl    a row for each trial: start, setting, seed, validation scores, workdir
STUDY/test.json       the chosen setting of each start and its test scores, made once
"""

import json
import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from big_vit import storage
from big_vit.config.old_names import RENAMED
from big_vit.errors import UserError
from big_vit.inspection import plots

ROWS, TEST = 'trials.jsonl', 'test.json'
TEST_HEADS = ('start', 'chosen', 'test top-1', '± seeds', '± size', 'loss', 'seeds', 'examples')
STARTS = {
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
_RESULT = {'setting': dict, 'trials': list, 'tests': list}


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


def tested(folder: epath.Path) -> dict[str, dict[str, Any]]:
    """Read the chosen setting and its test scores by start; {} before the test is scored.

    Raises:
      UserError: the file is not a JSON object.
    """
    file = folder / TEST
    if not file.exists():
        return {}
    advice = 'delete it, and the test is scored again'
    results = storage.parse_object(file.read_bytes(), str(file), advice)
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
    """Choose the setting with the highest mean of a metric, and return its rows, one for each seed.

    A trial whose score is not finite counts as worse than any other; of equal settings the one
    tried first wins.
    """

    def score(group: list[Row]) -> float:
        mean = statistics.fmean(row[metric] for row in group)
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
            error_text = f'{error:.2%}' if math.isfinite(error) else '-'
            setting = label(group[0]['setting']) or '-'
            body.append([name, setting, star, f'{mean:.2%}', error_text, str(len(group))])
            name = ''
    return body


def test_lines(results: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Tabulate the test of the chosen settings, a line for each start, with header `TEST_HEADS`."""
    return [
        [
            STARTS[start],
            label(one['setting']) or '-',
            f'{one["mean"]:.2%}',
            '-' if one['error'] is None else f'{one["error"]:.2%}',
            f'{one["sampling_error"]:.2%}',
            f'{one["loss"]:.4f}',
            str(len(one['tests'])),
            f'{one["count"]:.0f}',
        ]
        for start, one in results.items()
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
    figure, axes = plots.canvas(2 if test else 1, 1, 4.6, 3.6)
    axis = axes[0][0]
    rates = all('lr' in row['setting'] for row in rows)
    settings = list(dict.fromkeys(_key(row['setting']) for row in rows))
    for i, (start, name) in enumerate(starts.items()):
        groups = by_setting(rows, start)
        points = []
        for key, group in groups.items():
            mean, error = mean_and_error([row[metric] for row in group])
            x = group[0]['setting']['lr'] if rates else settings.index(key)
            points.append((x, 100 * mean, 100 * error if math.isfinite(error) else 0.0))
        x, mean, error = zip(*sorted(points), strict=True)
        axis.errorbar(
            x, mean, error, fmt='o-' if rates else 'o', ms=4, capsize=3, color=f'C{i}', label=name
        )
    if rates:
        axis.set_xscale('log')
        axis.set_xlabel('learning rate')
    else:
        names = [label(json.loads(key)) for key in settings]
        axis.set_xticks(range(len(names)), names, rotation=30, ha='right', fontsize=7)
    axis.set_ylabel(f'{metric}, %')
    axis.set_title('validation, mean ± standard error')
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8)
    if test:
        axis = axes[0][1]
        for i, result in enumerate(test.values()):
            mean, error = result['mean'], result['error']
            axis.bar(i, 100 * mean, 0.6, color=f'C{i}', alpha=0.75,
                     yerr=100 * error if error is not None else None, capsize=4)  # fmt: skip
            axis.text(i, 0.5, f'{100 * mean:.1f}', ha='center', va='bottom', fontsize=9)
        names = [textwrap.fill(starts[name], 16) for name in test]
        axis.set_xticks(range(len(test)), names, fontsize=8)
        axis.set_title('test, once, of what was chosen')
        axis.grid(axis='y', alpha=0.25)
    for one in axes[0]:
        one.spines[['top', 'right']].set_visible(False)
    figure.savefig(path)
