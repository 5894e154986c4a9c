"""Several runs side by side: scores, what their configs differ in, and curves on one page."""

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath

from big_vit import checkpoint, metrics, storage
from big_vit import config as config_lib
from big_vit.inspection import history, html_pages, line_styles
from big_vit.inspection.html_pages import Line

# Lines with fewer points draw faster; of so many runs a chart shows no more anyway.
_MOST_POINTS = 12_000
# Metrics of training that have a chart each, where a run has them.
_TRAINING = ('train/loss', 'train/accuracy', 'train/lr', 'train/grad_norm')


class Run(NamedTuple):
    """One of several runs.

    Attributes:
      name: the shortest end of its path that no other has.
      slot: of its colour and dash, see `line_styles`.
      config: as its sidecar has it.
      rows: of metrics, up to the step.
    """

    name: str
    slot: int
    workdir: epath.Path
    step: int
    config: dict[str, Any]
    parameters: int
    rows: history.Rows


def distinct_names(paths: Sequence[str]) -> list[str]:
    """Shorten different paths to their last parts, as many as tell them apart.

    Of a trial of a sweep, trials/START/NAME, the start is said too.
    """
    parts = [[part for part in path.split('/') if part] for path in paths]
    sizes = [2 if path[-3:-2] == ['trials'] else 1 for path in parts]
    while True:
        names = ['/'.join(path[-size:]) for path, size in zip(parts, sizes, strict=True)]
        again = [
            i for i, name in enumerate(names) if names.count(name) > 1 and sizes[i] < len(parts[i])
        ]
        if not again:
            return names
        for i in again:
            sizes[i] += 1


def open_runs(paths: Sequence[str]) -> list[Run]:
    """Open the runs of workdirs or checkpoints, each once, without their arrays.

    Raises:
      UserError: there is no checkpoint in one of them, or its metrics are damaged.
    """
    places = list(dict.fromkeys(checkpoint.locate(path, 'RUN') for path in paths))
    folders = [os.fspath(storage.absolute(workdir)) for workdir, _ in places]
    # Of a run that is there with several of its checkpoints, the step tells them apart.
    keys = [
        f'{folder}@{step}' if folders.count(folder) > 1 else folder
        for folder, (_, step) in zip(folders, places, strict=True)
    ]
    slots = line_styles.slots(keys)
    runs = []
    for key, name, (workdir, step) in zip(keys, distinct_names(keys), places, strict=True):
        sidecar = checkpoint.read_sidecar(workdir, step)
        rows = [row for row in metrics.read(workdir) if row['step'] <= step]
        count = sum(
            math.prod(leaf['shape'])
            for path, leaf in sidecar['leaves'].items()
            if path.startswith('params/')
        )
        runs.append(Run(name, slots[key], workdir, step, sidecar['config'], count, rows))
    return runs


def results(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Tabulate runs: (header, a row for each), with the last and the best of each headline."""
    scores = [
        {f'{split}/{s.name}': s for split, of in history.scores(run.rows).items() for s in of}
        for run in runs
    ]
    names = list(dict.fromkeys(n for run in runs for n in metrics.headlines(run.rows)))
    header = ['run', 'step', 'parameters', 'train/loss']
    for name in names:
        header += [name, 'best', 'at step']
    body = []
    for run, by_name in zip(runs, scores, strict=True):
        losses = history.series(run.rows, 'train/loss')
        loss = metrics.shown('loss', losses[-1][1]) if losses else '–'
        row = [run.name, f'{run.step:,}', f'{run.parameters:,}', loss]
        for name in names:
            score = by_name.get(name)
            if score is None:
                row += ['–'] * 3
            else:
                row.append(metrics.shown(name, score.last))
                best = metrics.shown(name, score.best), f'{score.best_step:,}'
                row += best if metrics.has_direction(name) else ('–', '–')
        body.append(row)
    return header, body


def differences(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Tabulate the keys whose values are not the same in all runs: (header, a row for each run)."""
    keys = config_lib.differing([run.config for run in runs])
    body = [
        [run.name, *('–' if of[i] is None else _plain(of[i]) for of in keys.values())]
        for i, run in enumerate(runs)
    ]
    return ['run', *keys], body


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f'{value:g}'
    return value if isinstance(value, str) else repr(value)


def curves(runs: Sequence[Run]) -> str:
    """Draw a chart for each headline and loss of the evaluations and for some of training."""
    there = list(dict.fromkeys(name for run in runs for name in history.names(run.rows)))
    headlines = list(dict.fromkeys(n for run in runs for n in metrics.headlines(run.rows)))
    losses = [n for n in there if n.endswith('/loss') and not n.startswith(('train/', 'time/'))]
    names = [n for n in (*_TRAINING, *headlines, *losses) if n in there]
    most = max(60, _MOST_POINTS // len(runs))

    def line(run: Run, name: str) -> Line:
        points = history.series(run.rows, name)
        marked = not name.startswith('train/') and len(runs) <= 10
        return Line(run.name, points, marked=marked, style=line_styles.style(run.slot))

    return html_pages.charts(
        html_pages.chart(
            name,
            [line(run, name) for run in runs if any(name in row for row in run.rows)],
            zero=name in ('train/lr', 'train/grad_norm'),
            legend=False,
            most=most,
        )
        for name in dict.fromkeys(names)
    )


def page(runs: Sequence[Run]) -> str:
    """Return a complete page that compares runs."""
    marks = [line_styles.style(run.slot) for run in runs]
    header, body = results(runs)
    keys, values = differences(runs)
    _, *differ = keys
    said = ', '.join(differ) if len(differ) <= 6 else f'{len(differ)} keys of their configs'
    words = f'They differ in {said}.' if differ else 'Their configs are the same.'
    legend = html_pages.legend([(run.name, mark) for run, mark in zip(runs, marks, strict=True)])
    drawn = curves(runs)
    noted = [(run, history.warnings(run.rows)) for run in runs]
    warnings = [f'{run.name}: {line}' for run, lines in noted for line in lines]
    sections = [
        ('Results', html_pages.table('Results', header, body, marks)),
        (
            'Config differences',
            html_pages.table('Config differences', keys, values, marks) if len(keys) > 1 else '',
        ),
        ('Curves', legend + drawn if drawn else ''),
        ('Warnings', html_pages.notices(warnings)),
        ('Places', html_pages.details('Where the runs are', places(runs))),
    ]
    title = f'{len(runs)} runs'
    lead = html_pages.paragraph(words, 'lead')
    footer = f'Made of {len(runs)} runs.'
    head = f'<h1>{html_pages.text(title)}</h1>\n' + lead
    return html_pages.page(f'{title} – big_vit', head, sections, footer)


def places(runs: Sequence[Run]) -> str:
    """List the checkpoints of runs."""
    return '\n'.join(f'{run.name}: {run.workdir}/checkpoints/{run.step}' for run in runs)


def text(runs: Sequence[Run]) -> str:
    """Return the tables of a comparison as text."""
    header, body = results(runs)
    keys, values = differences(runs)
    differ = metrics.table(keys, values) if len(keys) > 1 else 'their configs are the same'
    return f'{places(runs)}\n\n{metrics.table(header, body)}\n\nconfigs\n-------\n{differ}'
