"""Write a report of runs as one HTML file: `python -m big_vit.report RUN...`.

The file needs no network, and its charts are whole without scripts. A transfer's two runs are shown
side by side, and any other runs are compared by their scores, configs and curves. If the dataset is
not available, the report of a run says so and has all the rest.
"""

from big_vit import command_line

if __name__ == '__main__':  # Before the slow imports.
    command_line.answer_help(command_line.report())

import dataclasses
import datetime
import functools
import json
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Container, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from big_vit import (
    checkpoint,
    evaluate,
    ledger,
    metrics,
    predictor,
    runtime,
    sharding,
    storage,
    trees,
)
from big_vit import config as config_lib
from big_vit.build.data import asked_data, completed_section, host_batches, train_data
from big_vit.build.experiment import loss_flops
from big_vit.build.model import build_model, parts_read
from big_vit.build.steps import batch_seen
from big_vit.build.task import build_task
from big_vit.config import Config
from big_vit.config.registries import SOURCES
from big_vit.data import sources
from big_vit.errors import UserError
from big_vit.evaluators.registry import requirements
from big_vit.inspection import (
    attention_maps,
    comparison,
    examples,
    history,
    html_pages,
    line_styles,
    loaded_model,
    mistakes,
    patch_components,
    plots,
    sightings,
    task_pictures,
    weight_statistics,
)
from big_vit.inspection.html_pages import Line
from big_vit.inspection.loaded_model import LoadedModel
from big_vit.sweeps import study

# Eigenvalues of wider kernels take minutes.
MAX_SPECTRUM_WIDTH = 2048
EXAMPLES, VIEWED, ATTENTION_IMAGES, PREDICTED, COLOURED = 24, 6, 4, 6, 8
# Seconds that each evaluation is judged for.
JUDGED_S = 60.0


@dataclasses.dataclass(frozen=True)
class Run:
    """A run with its newest checkpoint and its metrics; `name` is '' if it is the only one."""

    name: str
    workdir: epath.Path
    loaded: LoadedModel
    rows: history.Rows

    @functools.cached_property
    def seen(self) -> tuple[LoadedModel, list[np.ndarray], list[np.ndarray]]:
        """The model, some training images, and what it is given of them; UserError if absent."""
        return examples.training_inputs(self.loaded, COLOURED)


def open_runs(path: str) -> list[Run]:
    """Open the run of a workdir or checkpoint, or the runs of a transfer or a sweep.

    Raises:
      UserError: there are no runs.
    """
    folders = study.run_folders(storage.place(path))
    if not folders:
        return [_open(path, '')]
    alone = len(folders) == 1
    return [_open(str(folder), '' if alone else name) for name, folder in folders.items()]


def is_one_story(path: str) -> bool:
    """Whether a path is one run, or those of a transfer or a sweep, and not any runs."""
    names = study.run_folders(storage.place(path)).keys()
    return len(names) < 2 or names <= study.STARTS.keys()


def _open(path: str, name: str) -> Run:
    workdir, step = checkpoint.locate(path, 'WORKDIR')
    loaded = loaded_model.load(f'{workdir}/checkpoints/{step}')
    rows = [row for row in metrics.read(workdir) if row['step'] <= step]
    return Run(name, workdir, loaded, rows)


def guarded(draw: Callable[[], str], what: str) -> str:
    """Return a part of the page, or a notice that says why it is missing."""
    try:
        return draw()
    except (UserError, OSError) as error:
        return html_pages.notice(f'{what}: {error}')


def titled(run: Run, body: str) -> str:
    """Put the name of the run above its part of the page, if there are several runs."""
    return html_pages.heading(run.name) + body if run.name and body else body


def for_each_run(runs: list[Run], draw: Callable[[Run], str], what: str) -> str:
    return ''.join(titled(run, guarded(functools.partial(draw, run), what)) for run in runs)


# Header.


def when(path: epath.Path) -> str:
    """Return the time at which a file was last written."""
    moment = datetime.datetime.fromtimestamp(path.stat().mtime, datetime.UTC)
    return moment.strftime('%Y-%m-%d %H:%M UTC')


def header(runs: list[Run], path: str) -> str:
    first = runs[0]
    name = storage.place(path).name if first.name else first.workdir.name
    if name.isdigit():
        name = first.workdir.name
    settings = first.loaded.settings()
    data = settings.get('data.tfds_name') or settings.get('data.name') or 'a mixture of datasets'
    model = settings.get('model.variant', '')
    assert first.loaded.run is not None
    written = when(first.workdir / 'checkpoints' / str(first.loaded.run[1]))
    kind = f'Runs {" and ".join(run.name for run in runs)}' if first.name else 'A run'
    lead = f'{kind} of ViT-{model} on {data}; last checkpoint of {written}.'
    return (
        f'<h1>{html_pages.text(name)}</h1>\n'
        + html_pages.paragraph(lead, 'lead')
        + ''.join(titled(run, html_pages.facts(facts(run))) for run in runs)
    )


def facts(run: Run) -> list[tuple[str, str]]:
    """Return the headline numbers of a run: step, main scores, parameters, speed."""
    assert run.loaded.run is not None
    step, settings = run.loaded.run[1], run.loaded.settings()
    total = settings.get('total_steps') or 0
    at = f'{step:,} of {total:,.0f}' if total >= step else f'{step:,}'
    pairs = [('Step', at)]
    for split, scores in history.scores(run.rows).items():
        main = next((s for s in scores if s.name == 'top1'), scores[0])
        pairs.append((f'{split} {_word(main.name)}', _shown(main, main.last)))
    pairs = pairs[:4]
    parameters = sum(
        np.asarray(leaf).size for leaf in weight_statistics.unrolled(run.loaded.params).values()
    )
    pairs.append(('Parameters', f'{parameters / 1e6:,.2f} M'))
    for name, what, shape in (
        ('examples_per_s', 'Examples a second', '{:,.0f}'),
        ('mfu', 'MFU', '{:.0%}'),
    ):
        values = _timing(run, name)
        if values:
            pairs.append((what, shape.format(statistics.median(values))))
    return pairs


def _word(name: str) -> str:
    return {'top1': 'top-1', 'top5': 'top-5'}.get(name, name.replace('_', ' '))


def _shown(score: history.Score, value: float) -> str:
    is_share = history.standard_error(score) is not None
    return f'{value:.2%}' if is_share else html_pages.number(value)


def _timing(run: Run, name: str) -> list[float]:
    points = history.series(run.rows, metrics.TIMING + name)
    return [value for _, value in points if math.isfinite(value)]


# Results.


def versus(runs: list[Run], path: str) -> str:
    """Compare the last scores of a transfer's runs, with standard errors."""
    if len(runs) < 2 or study.tested(storage.place(path)):
        return ''
    scores = [
        {
            (split, s.name): s
            for split, scores_of_run in history.scores(run.rows).items()
            for s in scores_of_run
        }
        for run in runs
    ]
    names = {'pretrained': 'from the checkpoint', 'control': 'from random'}
    heads = ['evaluation', 'score', *(names.get(run.name, run.name) for run in runs)]
    if len(runs) == 2:
        heads.append('difference')
    rows = []
    for key in dict.fromkeys(key for scores_of_run in scores for key in scores_of_run):
        cells = [scores_of_run.get(key) for scores_of_run in scores]
        row = [key[0], _word(key[1]), *(_with_error(score) for score in cells)]
        if len(runs) == 2:
            row.append(_difference(*cells))
        rows.append(row)
    there = (storage.place(path) / 'transfer.json').exists()
    return (
        ('' if there else html_pages.notice('transfer.json is not there: not every run has ended'))
        + html_pages.table('Results side by side', heads, rows)
        + html_pages.paragraph(
            '± is the standard error that the size of the test alone gives; seeds add to it, so a '
            'difference of a few ± from one seed shows nothing.',
            'soft',
        )
    )


def swept(path: str) -> str:
    """Show the validation scores of all settings of a sweep and the test scores of the chosen."""
    folder = storage.place(path)
    results, rows = study.tested(folder), study.read(folder)
    if not results:
        return ''
    named = {start: study.STARTS[start] for start in results}
    names = [key for row in rows[:1] for key in row if '/' in key]
    metric = next((name for name in names if not name.startswith('train/')), None)
    body = ''
    if lines := study.test_lines(results):
        body += html_pages.heading('Test, scored once')
        body += html_pages.table('Test, scored once', study.test_heads(results), lines)
    if metric and all(row.get(metric) is not None for row in rows):
        heads = ('start', 'setting', '', metric, '±', 'seeds')
        # The text table leaves repeated starts blank; a row of the page needs its heading.
        lines, start = [], ''
        for line in study.lines(rows, metric, named):
            start = line[0] or start
            lines.append([start, *line[1:]])
        body += html_pages.heading('Validation, * is what it chose')
        body += html_pages.table('Validation, * is what it chose', heads, lines)
    return body + html_pages.paragraph(
        '± seeds is the standard error of the mean over seeds, ± size that which the size of the '
        'test alone gives. What follows shows the first seed of what each start chose.',
        'soft',
    )


def _with_error(score: history.Score | None) -> str:
    if score is None:
        return '–'
    error = history.standard_error(score)
    if error is None:
        return html_pages.number(score.last)
    return f'{score.last:.2%} ± {error:.2%}'


def _difference(a: history.Score | None, b: history.Score | None) -> str:
    if a is None or b is None:
        return '–'
    errors = history.standard_error(a), history.standard_error(b)
    if errors[0] is None or errors[1] is None:
        return f'{a.last - b.last:+.4g}'
    return f'{a.last - b.last:+.2%} ± {math.hypot(errors[0], errors[1]):.2%}'


def evaluations(run: Run) -> str:
    rows = [
        [
            split,
            _word(score.name),
            _with_error(score),
            f'{score.last_step:,}',
            *_best(score),
            '–' if score.examples is None else f'{score.examples:,.0f}',
        ]
        for split, scores in history.scores(run.rows).items()
        for score in scores
    ]
    if not rows:
        return html_pages.paragraph('No evaluation has been made.', 'soft')
    header = ['evaluation', 'score', 'last', 'at step', 'best', 'at step', 'examples']
    return html_pages.table('All evaluations', header, rows)


def _best(score: history.Score) -> tuple[str, str]:
    if not metrics.has_direction(score.name):
        return '–', '–'
    return _shown(score, score.best), f'{score.best_step:,}'


def errors(run: Run) -> str:
    """Show what the head of a run takes for what in each evaluation of its accuracy."""
    assert run.loaded.run is not None and run.loaded.config is not None
    if not list(run.loaded.config.evals):
        return ''
    workdir, step = run.loaded.run
    answered = evaluate.judge(workdir, step, JUDGED_S)
    return ''.join(
        (html_pages.heading(f'{name}, after step {step:,}') if len(answered) > 1 else '')
        + mistakes.section(judged, data)
        for name, (judged, data) in answered.items()
    )


def sights(run: Run) -> str:
    """Show the pictures of each evaluation of boxes or of pixels that are mistaken most."""
    config = run.loaded.config
    assert config is not None and run.loaded.run is not None
    body = ''
    for name in config.evals:
        section = completed_section(config, 'evals', name)
        if requirements(section.type).output not in ('boxes', 'pixels'):
            continue
        model = predictor.load(run.loaded.path, which=run.loaded.part, transform=section.transform)
        keys = ('name', 'split', 'num_classes', 'classes', 'label_map')
        changes = {key: section[key] for key in (*keys, *SOURCES.keys(section.name))}
        source = asked_data(config.replacing({f'data.{k}': x for k, x in changes.items()}))
        body += html_pages.heading(name) + _sights(model, source)
    return body


def _sights(model: predictor.Predictor, source: sources.Source) -> str:
    """Judge pictures of a split, the first that come in a minute."""
    began, judged, count = time.monotonic(), list[sightings.Judged](), 0
    asked, names = model.asked(source, skip_bad=True), model.seen_names
    for one in model.see(asked, {}):
        count += 1
        picture = predictor.stored_picture(asked.data.source, one.row)
        at, place = np.array([one.row]), source.place(one.row)
        if one.objects is not None and source.annotations is not None:
            scores, labels = np.asarray(one.objects.scores), np.asarray(one.objects.labels)
            found = sightings.Objects(scores, labels, one.corners())
            (truth,) = source.annotations(at)
            judged.append(sightings.judge_objects(picture, found, truth, names, place))
        elif one.labels is not None and source.label_maps is not None:
            (true,) = source.label_maps(at)
            own = sightings.judge_labels(picture, one.labels, true, place)
            judged += [] if own is None else [own]
        # Pictures that are drawn take memory.
        judged = sorted(judged, key=lambda each: -each.badness)[: sightings.MOST_PICTURES]
        if time.monotonic() - began > JUDGED_S:
            break
    return sightings.section(judged, count, source.length)


# What is drawn of learning without labels: see `metrics.collapse`.
_OF_TARGETS = (
    ('Entropy of the targets, in nats', ('teacher_entropy', 'teacher_entropy_of_mean')),
    ('KL of the student from the teacher', ('kl',)),
    ('Share of the prototypes in use', ('used_prototypes',)),
    ('Standard deviation of the targets', ('target_std',)),
)
_OF_FEATURES = (
    ('Ranks of the features', ('rankme', 'lidar')),
    ('Spread of the features', ('std', 'cosine')),
    ('Decay of the spectrum', ('alpha',)),
)


# Accuracies such as 20nn and 5shot.
_FROZEN = re.compile(r'\d+(nn|shot)')


def curves(runs: list[Run]) -> str:
    """Plot each kind of metric over the steps, with all runs and splits in one chart."""
    # The same in all charts: a run has its colour, a split its dash; of one run a split has both.
    splits: dict[str, int] = {}
    slots = line_styles.slots([str(storage.absolute(run.workdir)) for run in runs])

    def lines(
        wanted: Container[str], by_key: bool = False, of_evaluations: bool = False
    ) -> list[Line]:
        chart_lines = []
        for run in runs:
            for name in history.names(run.rows):
                split, _, key = name.rpartition('/')
                if key not in wanted or name.startswith(metrics.TIMING):
                    continue
                if of_evaluations and split == 'train':
                    continue
                shown = f'{split} {key}' if by_key else split
                number = splits.setdefault(shown, len(splits))
                shown = f'{run.name} {shown}'.strip()
                colour, _ = line_styles.style(slots[str(storage.absolute(run.workdir))])
                style = (colour if run.name else number % 10, number % 6)
                points = history.series(run.rows, name)
                chart_lines.append(Line(shown, points, marked=split != 'train', style=style))
        return chart_lines

    keys = {name.rpartition('/')[2] for run in runs for name in history.names(run.rows)}
    frozen = {*filter(_FROZEN.fullmatch, keys)}
    charts = html_pages.charts(
        [
            html_pages.chart('Loss', lines(('loss',))),
            html_pages.chart('Accuracy', lines(('accuracy', 'top1'))),
            html_pages.chart('Accuracy on frozen features', lines(frozen, True)),
            html_pages.chart('Learning rate', lines(('lr',)), zero=True),
            html_pages.chart('Gradient norm', lines(('grad_norm',)), zero=True),
            *(html_pages.chart(title, lines(keys, True), zero=True) for title, keys in _OF_TARGETS),
            *(
                html_pages.chart(title, lines(keys, True, True), zero=True)
                for title, keys in _OF_FEATURES
            ),
        ]
    )
    none = html_pages.paragraph('There are no metrics yet.', 'soft')
    return html_pages.smoothing() + charts if charts else none


def warnings(run: Run) -> str:
    lines = history.warnings(run.rows)
    damaged = run.workdir / 'damaged'
    names = sorted(path.name for path in damaged.iterdir()) if damaged.is_dir() else []
    if names:
        lines.append(f'damaged checkpoints were set aside: {", ".join(names)}')
    return html_pages.notices(lines) or html_pages.paragraph('None.', 'soft')


# Cost.


def memory(run: Run) -> str:
    """Return bytes by use of everything in the checkpoint, and the operation count."""
    assert run.loaded.sidecar is not None
    leaves = run.loaded.sidecar['leaves']
    params = {name.split('/')[1] for name in leaves if name.startswith('params/')}
    by_use: dict[str, list[int]] = {}
    for name, leaf in leaves.items():
        part, _, rest = name.partition('/')
        use = {'params': 'parameters', 'ema': 'averaged parameters'}.get(part, 'counters')
        if part == 'opt':
            use = f'optimizer: {ledger.purpose(rest, len(leaf["shape"]), params)}'
        count = math.prod(leaf['shape'])
        totals = by_use.setdefault(use, [0, 0, 0])
        totals[0] += 1
        totals[1] += count
        totals[2] += count * jnp.dtype(leaf['dtype']).itemsize
    total = [sum(use[i] for use in by_use.values()) for i in range(3)]
    unit = by_use['parameters'][2]
    largest_first = sorted(by_use.items(), key=lambda item: -item[1][2])
    rows = [
        [use, f'{a:,}', f'{count:,}', ledger.amount(size), f'{size / unit:.2f}']
        for use, (a, count, size) in [*largest_first, ('all', total)]
    ]
    head = ['kept', 'arrays', 'numbers', 'bytes', 'of the parameters']
    return html_pages.table('What the checkpoint keeps', head, rows) + guarded(
        lambda: operations(run), 'Operations cannot be counted'
    )


def operations(run: Run) -> str:
    loaded, config = run.loaded, run.loaded.config
    assert config is not None and loaded.run is not None
    task = build_task(config.task)
    plain = parts_read(config) == ('image',) and not task.reads and not task.views
    if list(config.streams) or not plain:
        train = train_data(config)  # Only the data knows the shapes of other parts.
        parts, classes = train.example_spec.parts, train.source.num_classes
        shapes = train.shapes
    else:
        heads = trees.flatten(loaded.params).get('head/kernel')
        classes = 0 if heads is None else heads.shape[-1]
        image = (*loaded.image_size, loaded.channels)
        parts = {'image': (image, np.dtype(np.uint8)), 'label': ((), np.dtype(np.int32))}
        shapes = {name: shape for name, (shape, _) in parts.items()}
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    model = build_model(config, classes, shapes, mesh)
    forward, targets = loss_flops(task, model, loaded.params, parts, config.batch_size)
    tokens = model.sequence_length(shapes)
    position = (loaded.sidecar or {}).get('position')  # Not all steps had this batch size.
    examples_seen = loaded.run[1] * config.batch_size
    if position is not None:
        examples_seen = position * config.data.repeats
    return html_pages.paragraph(
        f'An example is {tokens:,} tokens and takes {(forward + targets) / 1e9:,.3f} GFLOP '
        'forward; '
        f'{loaded.run[1]:,} steps with {examples_seen:,} examples have taken '
        f'{(3 * forward + targets) * examples_seen:.3g} FLOP. Gradients, while stepping, '
        'are as large as the parameters in float32.',
        'soft',
    )


def times(run: Run) -> str:
    """Plot rates over the steps, with a table of all timings."""
    names = [n for n in history.names(run.rows) if n.startswith(metrics.TIMING)]
    names = [n for n in names if n not in (metrics.RESUMED, metrics.TIMING + 'eta_s')]
    rows = []
    for name in names:
        key = name.removeprefix(metrics.TIMING)
        values = _timing(run, key)
        if values:
            middle = statistics.median(values)
            rows.append(
                [
                    key,
                    *(html_pages.number(v) for v in (values[-1], middle, min(values), max(values))),
                ]
            )
    if not rows:
        return html_pages.paragraph('No timings were written.', 'soft')

    def line(key: str) -> list[Line]:
        return [Line(key, history.series(run.rows, metrics.TIMING + key))]

    return html_pages.charts(
        [
            html_pages.chart('Examples a second', line('examples_per_s'), zero=True),
            html_pages.chart('Share of the peak (MFU)', line('mfu'), zero=True),
            html_pages.chart('Share of time spent waiting for data', line('data_wait'), zero=True),
        ]
    ) + html_pages.table('Timings', ['timing', 'last', 'median', 'least', 'most'], rows)


# Data and attention.


def data(run: Run) -> str:
    """Show a training batch as the model receives it."""
    assert run.loaded.config is not None
    config = run.loaded.config
    train, batch = examples.batch(config, min(EXAMPLES, config.batch_size))
    source, labelled = train.source, build_task(config.task).needs_labels
    words = f'{source.name} {source.split}: {source.length:,} examples'
    has_classes = labelled or build_task(config.task).reads
    words += (
        f' of {source.num_classes:,} classes. ' if has_classes else ', learned without labels. '
    )
    if build_task(config.task).views:
        return html_pages.paragraph(words) + views(config)
    if 'image' not in batch:
        parts = ', '.join(f'{n} {list(x.shape[1:])} {x.dtype}' for n, x in batch.items())
        return html_pages.paragraph(f'{words}Examples are no pictures: {parts}.')
    model_inputs = batch_seen(config, train, batch, 0)
    shown = plots.as_bytes([np.asarray(image, np.float32) for image in model_inputs['image']])
    titles, words_of = [''] * len(shown), [f'Training example {i + 1}' for i in range(len(shown))]
    if labelled:
        titles = [examples.title(train, np.asarray(label)) for label in model_inputs['label']]
        words_of = [f'Training example of class {title}' for title in titles]
    mixed = ', mixed among themselves' if config.mixup or config.cutmix else ''
    return html_pages.paragraph(
        f'{words}The first of the run, after all that is done to them{mixed}.'
    ) + html_pages.pictures(zip(shown, titles, words_of, strict=True))


def views(config: Config) -> str:
    """Show the views of a few training examples as the model receives them, a row for each."""
    data = train_data(config.replacing({'data.cache': 'none'}))
    assert data.order is not None
    few = data._replace(order=dataclasses.replace(data.order, batch_size=VIEWED, repeats=1))
    batches = host_batches(few, 0, slice(None))
    seen = {name: np.asarray(x) for name, x in batch_seen(config, few, next(batches), 0).items()}
    batches.close()  # type: ignore[attr-defined]
    by_view = examples.views(few, seen)
    rows = ''
    for i in range(VIEWED):
        pictures = plots.as_bytes([view[i].astype(np.float32) for view in by_view.values()])
        rows += html_pages.pictures(
            [
                (picture, name, f'Training example {i + 1}: {name}')
                for picture, name in zip(pictures, by_view, strict=True)
            ],
            columns=len(by_view),
        )
    words = 'The first of the run as the model sees them, a row for the views of each.'
    return html_pages.paragraph(words, 'soft') + rows


def attention(run: Run) -> str:
    """Show the model's attention to some training images."""
    loaded, images, inputs = run.seen
    few = slice(ATTENTION_IMAGES)
    maps = attention_maps.of_inputs(loaded, images[few], inputs[few])
    rows = ''.join(
        html_pages.pictures(
            [
                (picture, title, f'Training image {i + 1}: {title}' + _map(title))
                for title, picture in image_maps.panels()
            ],
            columns=len(image_maps.panels()),
        )
        for i, image_maps in enumerate(maps)
    )
    distances = np.mean([image_maps.distances for image_maps in maps], axis=0)
    heads = [(i + 1, float(value)) for i, block in enumerate(distances) for value in block]
    mean = [(i + 1, float(block.mean())) for i, block in enumerate(distances)]
    chart = html_pages.chart(
        'How far heads look, in pixels',
        [Line('a head', heads, marked=True, joined=False), Line('mean of the heads', mean)],
        below='block',
        zero=True,
    )
    words = (
        'Each map is stretched from its least (dark) to its largest share (yellow): what the class '
        'token, or all patches on average, attend to in a block, the mean of its heads; and the '
        'rollout of attention through all blocks (arXiv 2005.00928).'
    )
    return html_pages.paragraph(words, 'soft') + rows + html_pages.charts([chart])


def predictions(run: Run) -> str:
    """Show what the run's task makes of some training images; '' if it makes nothing of them."""
    loaded, _, inputs = run.seen
    rows = task_pictures.of_inputs(loaded, inputs[:PREDICTED])
    words = 'Training images, and what the task makes of them; grey is what the model does not see.'
    return (html_pages.paragraph(words, 'soft') if rows else '') + ''.join(
        html_pages.pictures(
            [(picture, title, f'Training image {i + 1}: {title}') for title, picture in row],
            columns=len(row),
        )
        for i, row in enumerate(rows)
    )


def patches(run: Run) -> str:
    """Show the principal components of the patch tokens of some training images as colours."""
    found = patch_components.of_inputs(*run.seen)
    words = (
        'The first three principal components of the last patch tokens over these pictures, as '
        f'red, green and blue ({found.words()} of the variance): patches of one colour are alike '
        'to the model, in any picture.'
    )
    shown = [
        (one, '', f'Training image {i + 1}{what}')
        for i, pair in enumerate(found.panels())
        for one, what in zip(pair, ('', ', components of its patches'), strict=True)
    ]
    return html_pages.paragraph(words, 'soft') + html_pages.pictures(shown, columns=8)


def _map(title: str) -> str:
    return '' if title == 'image' else ', map of attention'


def weights(run: Run) -> str:
    """Plot sizes and stable ranks of the kernels; show the patch embedding and the positions."""
    params = run.loaded.params
    charts = [_by_block('Root mean square of kernels', weight_statistics.sizes(params))]
    widest = max((min(m[0].shape) for m in weight_statistics.matrices(params).values()), default=0)
    if widest <= MAX_SPECTRUM_WIDTH:
        ranks = {
            p: weight_statistics.stable_rank(v)
            for p, v in weight_statistics.spectra(params).items()
        }
        charts.append(_by_block('Stable rank of kernels', ranks))
    return (
        html_pages.charts(charts)
        + guarded(lambda: embedding(run.loaded), 'The patch embedding cannot be drawn')
        + guarded(lambda: positions(run.loaded), 'Positions cannot be drawn')
    )


def _by_block(title: str, values: dict[str, np.ndarray]) -> str:
    lines = [
        Line(part, [(i + 1, float(v)) for i, v in enumerate(row)]) for part, row in values.items()
    ]
    return html_pages.chart(title, lines, below='block', zero=True)


def embedding(loaded: LoadedModel) -> str:
    kernel = loaded.embedding()
    if kernel is None:
        return ''
    components = plots.stretched(weight_statistics.components(kernel))
    return (
        html_pages.heading('Patch embedding')
        + html_pages.paragraph('Its principal components, the largest first.', 'soft')
        + html_pages.pictures(
            ((picture, '', f'Component {i + 1}') for i, picture in enumerate(components)), 'small'
        )
    )


def positions(loaded: LoadedModel) -> str:
    table = loaded.positions()
    if table is None:
        return ''
    cosine = weight_statistics.position_similarity(table, loaded.grid)
    rows, columns = (plots.some_of(n, 5) for n in cosine.shape[:2])
    return (
        html_pages.heading('Positions')
        + html_pages.paragraph(
            'The cosine of some positions with all: red is alike, blue is opposite.', 'soft'
        )
        + html_pages.pictures(
            (
                (
                    plots.signed(cosine[row, column]),
                    '',
                    f'Cosine of the position in row {row + 1}, column {column + 1} with all',
                )
                for row in rows
                for column in columns
            ),
            'small',
            len(columns),
        )
    )


# Config and versions.


def settings(run: Run) -> str:
    assert run.loaded.sidecar is not None
    rows = [[key, _plain(value)] for key, value in run.loaded.settings().items()]
    return html_pages.table('What the config sets', ['key', 'value'], rows) + html_pages.details(
        'The whole config', json.dumps(run.loaded.sidecar['config'], indent=2)
    )


def _plain(value: Any) -> str:
    is_integer = isinstance(value, float) and value.is_integer()
    return f'{value:,.0f}' if is_integer else value if isinstance(value, str) else repr(value)


def changes(runs: list[Run]) -> str:
    """Show the config of the first run, and how the others differ from it."""
    body = settings(runs[0])
    for run in runs[1:]:
        first, other = (r.loaded.sidecar['config'] for r in (runs[0], run) if r.loaded.sidecar)
        lines = config_lib.difference(first, other)
        text = f'{run.name} differs: ' + '; '.join(lines) if lines else f'{run.name} has the same.'
        body += html_pages.paragraph(text)
    return body


def versions(run: Run) -> str:
    sidecar: dict[str, Any] = run.loaded.sidecar or {}
    rows = [*map(list, sidecar['versions'].items())]
    rows.append(['hash of the contents', sidecar['content_hash'][:16]])
    return html_pages.table('Versions', ['of', 'is'], rows)


def document(path: str) -> str:
    """Return the complete page.

    Raises:
      UserError: there is no run, or its metrics are damaged.
    """
    runs = open_runs(path)
    gone = 'The training data cannot be read here'
    sections = [
        ('Transfer', versus(runs, path)),
        ('Sweep', guarded(lambda: swept(path), 'Sweep')),
        ('Curves', curves(runs)),
        ('Evaluations', for_each_run(runs, evaluations, 'Evaluations')),
        ('Mistakes', for_each_run(runs, errors, 'Mistakes cannot be shown')),
        ('Worst pictures', for_each_run(runs, sights, 'Pictures cannot be shown')),
        ('Warnings', for_each_run(runs, warnings, 'Warnings')),
        ('Training data', guarded(lambda: data(runs[0]), gone)),
        ('Predictions', for_each_run(runs, predictions, 'Predictions cannot be shown')),
        ('Attention', for_each_run(runs, attention, 'Attention cannot be shown')),
        ('Patches', for_each_run(runs, patches, 'Patches cannot be shown')),
        ('Weights', for_each_run(runs, weights, 'Weights')),
        ('Memory and operations', guarded(lambda: memory(runs[0]), 'Memory')),
        ('Time', for_each_run(runs, times, 'Time')),
        ('Config', changes(runs)),
        ('Versions', versions(runs[0])),
    ]
    where = ', '.join(run.loaded.path for run in runs)
    name = storage.place(path).name
    return html_pages.page(f'{name} – big_vit', header(runs, path), sections, f'Made of {where}')


def place_of(paths: Sequence[str]) -> str:
    """Return where a report goes: into the folder of its run, or into that around all of its runs.

    Raises:
      UserError: there is none around them.
    """
    homes = []
    for path in paths:
        folder = storage.place(checkpoint.without_selector(path)[0])
        is_step = folder.parent.name == 'checkpoints' and folder.name.isdecimal()
        homes.append(folder.parent.parent if is_step else folder)
    if len(set(homes)) == 1:
        return f'{homes[0]}/report.html'
    around = os.path.commonpath([str(storage.absolute(home).parent) for home in homes])
    if not all(map(storage.is_local, homes)) or around == '/':
        raise UserError('--out is missing: say where the report goes, as --out report.html')
    return f'{around}/report.html'


def main(argv: list[str]) -> None:
    args, _ = command_line.parse(command_line.report(), argv)
    runtime.start()
    if len(args.run) == 1 and is_one_story(args.run[0]):
        text = document(args.run[0])
    else:
        text = comparison.page(comparison.open_runs(study.runs_of(args.run)))
    out = storage.place(args.out or place_of(args.run))
    storage.write_text(out, text)
    print(f'wrote   {out} ({len(text.encode()) / 1e6:.1f} MB)')


if __name__ == '__main__':
    runtime.command(main)
