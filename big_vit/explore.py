"""Show the contents of any checkpoint: `python -m big_vit.explore PATH`.

    python -m big_vit.explore runs/fashion                     parameters, config and history
    python -m big_vit.explore runs/a runs/b runs/c             scores and configs side by side
    python -m big_vit.explore runs/fashion --compare runs/b    differences from another checkpoint
    python -m big_vit.explore runs/fashion --spectra           norms and spectra of each block
    python -m big_vit.explore runs/fashion --image FILE        attention to an image

With `--png FOLDER` the same is drawn instead. PATH is a workdir, one of its checkpoints/STEP, or a
file or folder with another codebase's weights.
"""

from big_vit import command_line

if __name__ == '__main__':  # Before the slow imports.
    command_line.answer_help(command_line.explore())

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from big_vit import checkpoint, interop, metrics, runtime, storage, trees
from big_vit.build.data import train_data
from big_vit.build.task import build_task
from big_vit.data.sources.classes import shown
from big_vit.errors import UserError, printable
from big_vit.inspection import (
    attention_maps,
    comparison,
    examples,
    loaded_model,
    patch_components,
    plots,
    task_pictures,
    weight_statistics,
)
from big_vit.inspection.loaded_model import LoadedModel
from big_vit.inspection.plots import Picture
from big_vit.sweeps import study


def parameter_table(params: dict[str, Any]) -> str:
    """Return a table of path, shape, type, bytes, mean and deviation of each array, with totals."""
    rows = []
    for name, leaf in trees.flatten(params).items():
        wide = np.asarray(leaf, np.float64)
        shape = 'x'.join(map(str, leaf.shape)) or 'scalar'
        rows.append(
            (name, shape, leaf.dtype, f'{leaf.nbytes:,}', f'{wide.mean():.2e}', f'{wide.std():.2e}')
        )
    header = ('parameter', 'shape', 'dtype', 'bytes', 'mean', 'std')
    total = f'{trees.count(params):,} parameters, {trees.nbytes(params):,} bytes'
    return f'{metrics.table(header, rows)}\n{total}'


def history_table(
    rows: list[dict[str, Any]], max_rows: int = 20, headline: str = 'accuracy'
) -> str:
    """Tabulate losses, every evaluation, a headline of training and the rate over the steps.

    Metrics that no row has get no column.

    Args:
      rows: rows of `metrics.read`.
      max_rows: rows of the table; of more steps it has every n-th.
      headline: the metric of training steps that stands beside the loss.
    """
    steps: dict[int, dict[str, float]] = {}
    for row in rows:
        steps.setdefault(row['step'], {}).update(row)
    headlines = metrics.headlines(rows)
    losses = {name for row in rows for name in row if name.endswith('/loss')}
    last = [name for name in (f'train/{headline}', 'train/lr') if any(name in row for row in rows)]
    columns = [*sorted({*headlines, *losses} - {*last}), *last]
    chosen = list(steps.items())
    with_evals = [item for item in chosen if any(name in item[1] for name in headlines)]
    chosen = with_evals if with_evals else chosen
    stride = -(-len(chosen) // max_rows) if chosen else 1
    chosen = chosen[::-1][::stride][::-1]
    body = [(step, *(f'{row[c]:.4g}' if c in row else '' for c in columns)) for step, row in chosen]
    return metrics.table(('step', *columns), body) if body else 'no metrics yet'


def comparison_table(comparison: weight_statistics.Comparison) -> str:
    """Return a table of the differences per array and overall, then the unmatched arrays."""
    rows = [
        (
            name,
            f'{difference.relative:.3e}',
            f'{difference.cosine:.6f}',
            f'{difference.largest:.3e}',
        )
        for name, difference in comparison.both.items()
    ]
    rows.append(('all of these', *_difference_cells(comparison.overall)))
    lines = [metrics.table(('parameter', 'relative change', 'cosine', 'largest'), rows)]
    lines += [f'only in the first    {name}' for name in comparison.only_first]
    lines += [f'only in the second   {name}' for name in comparison.only_second]
    for name, shapes in comparison.other_shape.items():
        first, second = ('x'.join(map(str, shape)) for shape in shapes)
        lines.append(f'of another shape     {name}: {first} and {second}')
    return '\n'.join(lines)


def _difference_cells(difference: weight_statistics.Difference) -> tuple[str, str, str]:
    return f'{difference.relative:.3e}', f'{difference.cosine:.6f}', f'{difference.largest:.3e}'


def spectra_table(params: dict[str, Any]) -> str:
    """Return a table of root mean square, singular values and stable rank of each kernel.

    Raises:
      UserError: there are no blocks.
    """
    sizes, values = weight_statistics.sizes(params), _spectra(params)
    rows = []
    for part, part_values in values.items():
        ranks = weight_statistics.stable_rank(part_values)
        for block in range(len(part_values)):
            rows.append(
                (
                    part,
                    block + 1,
                    f'{sizes[part][block]:.4f}',
                    f'{part_values[block, 0]:.3f}',
                    f'{part_values[block, len(part_values[block]) // 2]:.3f}',
                    f'{ranks[block]:.1f}',
                    part_values.shape[1],
                )
            )
    header = ('kernel', 'block', 'rms', 'largest', 'median', 'stable rank', 'of')
    return metrics.table(header, rows)


def _spectra(params: dict[str, Any]) -> dict[str, np.ndarray]:
    by_kind = weight_statistics.spectra(params)
    if not by_kind:
        raise UserError('--spectra: these parameters have no blocks of a transformer')
    return by_kind


def attention_table(maps: attention_maps.AttentionMaps) -> str:
    """Return a table of mean attention distances per head, and the rollout's top patches."""
    values = maps.distances
    rows = [
        (block + 1, f'{each.mean():.1f}', *(f'{value:.1f}' for value in each))
        for block, each in enumerate(values)
    ]
    header = ('block', 'mean', *(f'head {i + 1}' for i in range(values.shape[1])))
    share, top = maps.rollout, []
    for at in np.argsort(-share, axis=None, kind='stable')[:5]:
        row, column = np.unravel_index(at, share.shape)
        top.append(f'row {row + 1} column {column + 1} ({share[row, column]:.1%})')
    patch_rows, columns = share.shape
    return (
        f'mean attention distance in pixels\n{metrics.table(header, rows)}\n'
        f'rollout over {patch_rows}x{columns} patches, most at: {", ".join(top)}'
    )


def _attention_text(
    loaded: LoadedModel, path: str, maps: Callable[[str], attention_maps.AttentionMaps]
) -> str:
    return f'{loaded.path}: {path}\n{attention_table(maps(path))}'


def images(loaded: LoadedModel, count: int = 50) -> Picture | None:
    """Show training images, with their labels if these are learned; None without images.

    Raises:
      UserError: the data is not available here.
    """
    assert loaded.config is not None
    _, batch = examples.batch(loaded.config, count)
    pictures, titles = examples.pictures(batch), [''] * len(next(iter(batch.values())))
    if build_task(loaded.config.task).needs_labels:
        label = batch['label']
        titles = list(map(str, label if label.ndim == 1 else label.argmax(axis=1)))
    return plots.grid(np.stack(pictures), titles) if pictures else None


def embedding(loaded: LoadedModel) -> Picture | None:
    """Show the principal components of the patch embedding; None if patches are not pictures."""
    kernel = loaded.embedding()
    return None if kernel is None else plots.components(kernel)


def positions(loaded: LoadedModel) -> Picture | None:
    """Show the similarity of the learned positions; None if there are none."""
    table = loaded.positions()
    if table is None:
        return None
    return plots.similarity(weight_statistics.position_similarity(table, loaded.grid))


def attention(maps: list[attention_maps.AttentionMaps]) -> Picture:
    """Show images with the attention of some blocks and the rollout."""
    return plots.attention([image_maps.panels() for image_maps in maps])


def predictions(rows: task_pictures.Rows) -> Picture | None:
    """Show images with what the task makes of them; None if that is nothing."""
    titled = [('', [p for _, p in row], [title for title, _ in row]) for row in rows]
    return plots.picture_rows(titled) if rows else None


def norms(params: dict[str, Any]) -> Picture:
    """Plot root mean square and stable rank of the kernels over the blocks."""
    ranks = {part: weight_statistics.stable_rank(each) for part, each in _spectra(params).items()}
    return plots.lines({'root mean square': weight_statistics.sizes(params), 'stable rank': ranks})


def as_trained(loaded: LoadedModel) -> LoadedModel:
    """Take the image size from the data, if it is available here.

    Spectrograms have another size than the config's image_size.
    """
    try:
        image_shape = train_data(loaded.config).shapes.get('image') if loaded.config else None
    except UserError:
        return loaded
    return dataclasses.replace(loaded, image_shape=image_shape)


def overview(
    loaded: list[LoadedModel], only_foreground: bool = False
) -> dict[str, Callable[[], Picture | None]]:
    """Return what can be drawn of some checkpoints and of the first in detail, by file name.

    Args:
      only_foreground: leave the background of patches out.
    """
    first = as_trained(loaded[0])
    drawings: dict[str, Callable[[], Picture | None]] = {}
    if paths := [one.path for one in loaded if one.run is not None]:
        runs = comparison.open_runs(paths)
        names = [run.name if len(loaded) > 1 else '' for run in runs]
        named = {name: run.rows for name, run in zip(names, runs, strict=True)}
        slots = {name: run.slot for name, run in zip(names, runs, strict=True)}
        if any(named.values()):
            drawings['curves'] = lambda: plots.curves(named, slots)
    if first.config is not None:
        drawings['images'] = lambda: images(first)
    drawings |= {'embedding': lambda: embedding(first), 'positions': lambda: positions(first)}
    if first.config is not None:
        seen = functools.cache(lambda: examples.training_inputs(first, 8))
        drawings['attention'] = lambda: attention(
            attention_maps.of_inputs(seen()[0], *(images[:6] for images in seen()[1:]))
        )
        drawings['patches'] = lambda: patch_components.drawn(
            patch_components.of_inputs(*seen(), only_foreground)
        )
        drawings['predictions'] = lambda: predictions(
            task_pictures.of_inputs(seen()[0], seen()[2][:6])
        )
    return drawings


def save(drawings: dict[str, Callable[[], Picture | None]], folder: Path) -> list[Path]:
    """Write FOLDER/NAME.png for each drawing that succeeds, and warn about the others.

    Raises:
      UserError: none succeeds, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'--png {folder}: {error.strerror}; name a folder') from None
    written, problems = [], []
    for name, draw in drawings.items():
        try:
            picture = draw()
        except UserError as error:
            problems.append(f'{name}.png is left out: {error}')
            continue
        if picture is not None:
            written.append(folder / f'{name}.png')
            picture.save(written[-1])
    if problems and not written:
        raise UserError('; '.join(problems))
    for problem in problems:
        print(f'WARNING: {problem}', file=sys.stderr)
    return written


def _preparation(loaded: LoadedModel) -> str:
    """Say how the evaluation prepares pictures: its operations, and what they come to."""
    try:
        prepared = loaded.preparation()
    except UserError as error:  # Made by an earlier version, or for other inputs.
        return f'pictures: {error}'
    lines = [f'pictures: {prepared.text or "as they are"}']
    with contextlib.suppress(UserError):  # There are no other words for it.
        lines.append(f'          {prepared.preprocessing(loaded.image_size, loaded.channels)}')
    return '\n'.join(map(printable, lines))


def show(loaded: LoadedModel) -> None:
    """Print the parameter table and, for a checkpoint of ours, the config and the history."""
    print(loaded.path)
    if loaded.foreign_weights is not None:
        print(f'{interop.describe(loaded.foreign_weights)}\n\n{parameter_table(loaded.params)}')
        return
    assert loaded.run is not None and loaded.sidecar is not None
    versions = loaded.sidecar['versions'].items()
    print(', '.join(f'{name} {version}' for name, version in versions))
    averaged = ' (averaged ones)' if loaded.part == 'ema' else ''
    if (names := checkpoint.class_names(loaded.sidecar)) is not None:
        print(printable(f'{len(names)} classes: {shown(names, 10)}'))
    print(_preparation(loaded))
    print(f'\nparameters{averaged}\n{parameter_table(loaded.params)}\n\nconfig\n------')
    for key, value in loaded.settings().items():
        print(f'{key} = {value!r}')
    history = history_table(metrics.read(loaded.run[0]), headline=loaded.headline)
    print(f'\n{history}')


def main(argv: list[str]) -> None:
    args, _ = command_line.parse(command_line.explore(), argv)
    single_only = [flag for flag in ('compare', 'spectra', 'image') if getattr(args, flag)]
    if single_only and len(args.path) > 1:
        raise UserError(f'--{single_only[0]} looks at one checkpoint; there are {len(args.path)}')
    if args.foreground and not args.png:
        raise UserError('--foreground is of the pictures of --png FOLDER: add it')
    runtime.start()
    paths = study.runs_of(args.path) if len(args.path) > 1 or args.html else args.path
    if args.html:
        page = comparison.page(comparison.open_runs(paths))
        storage.write_text(storage.place(args.html), page)
        print(f'wrote   {args.html} ({len(page.encode()) / 1e6:.1f} MB)')
        return
    if len(paths) > 1 and not args.png and not any(map(interop.load_init, paths)):
        print(comparison.text(comparison.open_runs(paths)))
        return
    loaded = [loaded_model.load(path, args.which) for path in paths]
    first = loaded[0]
    texts: list[Callable[[], str]] = []
    drawings: dict[str, Callable[[], Picture | None]] = {}
    if args.compare:
        other = loaded_model.load(args.compare, args.which)
        compared = weight_statistics.compare(first.params, other.params, (first.path, other.path))
        texts.append(lambda: f'{first.path}\n{other.path}\n{comparison_table(compared)}')
        drawings['comparison'] = lambda: plots.comparison(compared)
    if args.spectra:
        texts.append(lambda: f'{first.path}\n{spectra_table(first.params)}')
        drawings['spectra'] = lambda: plots.spectra(_spectra(first.params))
        drawings['norms'] = lambda: norms(first.params)
    if args.image:
        maps = functools.cache(lambda path: attention_maps.from_file(first, path))
        texts += [functools.partial(_attention_text, first, path, maps) for path in args.image]
        drawings['attention'] = lambda: attention([*map(maps, args.image)])
        drawings['distances'] = lambda: plots.distances(
            np.mean([maps(path).distances for path in args.image], axis=0)
        )
        drawings['patches'] = lambda: patch_components.drawn(
            patch_components.from_files(first, args.image, args.foreground)
        )
        drawings['predictions'] = lambda: predictions(task_pictures.from_files(first, args.image))
    if args.png:
        written = save(drawings or overview(loaded, args.foreground), Path(args.png))
        print('drew ' + ', '.join(map(str, written)))
    elif texts:
        print('\n\n'.join(text() for text in texts))
    else:
        for checkpoint in loaded:
            show(checkpoint)


if __name__ == '__main__':
    runtime.command(main)
