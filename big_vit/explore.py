"""Explore: `python -m big_vit.explore PATH` shows what is in any checkpoint.

    python -m big_vit.explore runs/fashion                     parameters, config and history
    python -m big_vit.explore runs/fashion --compare runs/b    how another one differs
    python -m big_vit.explore runs/fashion --spectra           norms and spectra, block by block
    python -m big_vit.explore runs/fashion --image FILE        what it looks at

With `--png FOLDER` the same is drawn. PATH is a workdir, one of its checkpoints/STEP, or a file
or folder of another codebase's weights.
"""

from big_vit import command_line

if __name__ == '__main__':  # Before the imports that take their time.
    command_line.answer_help(command_line.explore())

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from big_vit import interop, metrics, runtime, trees
from big_vit.build.data import train_data
from big_vit.errors import UserError
from big_vit.inspection import attention_maps, examples, loaded_model, plots, weight_statistics
from big_vit.inspection.loaded_model import LoadedModel
from big_vit.inspection.plots import Picture


def parameter_table(params: dict[str, Any]) -> str:
    """Path, shape, type, bytes, mean and standard deviation of each array, and the totals."""
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
    every = -(-len(chosen) // max_rows) if chosen else 1
    chosen = chosen[::-1][::every][::-1]
    body = [(step, *(f'{row[c]:.4g}' if c in row else '' for c in columns)) for step, row in chosen]
    return metrics.table(('step', *columns), body) if body else 'no metrics yet'


def comparison_table(found: weight_statistics.Comparison) -> str:
    """A line for each array of both, what has no counterpart, and the whole."""
    rows = [
        (name, f'{each.relative:.3e}', f'{each.cosine:.6f}', f'{each.largest:.3e}')
        for name, each in found.both.items()
    ]
    rows.append(('all of these', *_shown(found.overall)))
    lines = [metrics.table(('parameter', 'relative change', 'cosine', 'largest'), rows)]
    lines += [f'only in the first    {name}' for name in found.only_first]
    lines += [f'only in the second   {name}' for name in found.only_second]
    for name, shapes in found.other_shape.items():
        first, second = ('x'.join(map(str, shape)) for shape in shapes)
        lines.append(f'of another shape     {name}: {first} and {second}')
    return '\n'.join(lines)


def _shown(each: weight_statistics.Difference) -> tuple[str, str, str]:
    return f'{each.relative:.3e}', f'{each.cosine:.6f}', f'{each.largest:.3e}'


def spectra_table(params: dict[str, Any]) -> str:
    """For each kernel of each block its size, its largest singular value and its stable rank.

    Raises:
      UserError: there are no blocks.
    """
    sizes, values = weight_statistics.sizes(params), _spectra(params)
    rows = []
    for part, each in values.items():
        ranks = weight_statistics.stable_rank(each)
        for block in range(len(each)):
            rows.append(
                (
                    part,
                    block + 1,
                    f'{sizes[part][block]:.4f}',
                    f'{each[block, 0]:.3f}',
                    f'{each[block, len(each[block]) // 2]:.3f}',
                    f'{ranks[block]:.1f}',
                    each.shape[1],
                )
            )
    header = ('kernel', 'block', 'rms', 'largest', 'median', 'stable rank', 'of')
    return metrics.table(header, rows)


def _spectra(params: dict[str, Any]) -> dict[str, np.ndarray]:
    found = weight_statistics.spectra(params)
    if not found:
        raise UserError('--spectra: these parameters have no blocks of a transformer')
    return found


def look_table(found: attention_maps.Look) -> str:
    """The mean attention distance of each head, and where the rollout ends."""
    values = found.distances
    rows = [
        (block + 1, f'{each.mean():.1f}', *(f'{value:.1f}' for value in each))
        for block, each in enumerate(values)
    ]
    header = ('block', 'mean', *(f'head {i + 1}' for i in range(values.shape[1])))
    share, top = found.rollout, []
    for at in np.argsort(-share, axis=None, kind='stable')[:5]:
        row, column = np.unravel_index(at, share.shape)
        top.append(f'row {row + 1} column {column + 1} ({share[row, column]:.1%})')
    rows_, columns = share.shape
    return (
        f'mean attention distance in pixels\n{metrics.table(header, rows)}\n'
        f'rollout over {rows_}x{columns} patches, most at: {", ".join(top)}'
    )


def images(found: LoadedModel, count: int = 50) -> Picture | None:
    """A grid of training images with their labels; None where a batch has no images.

    Raises:
      UserError: the data is not here.
    """
    assert found.config is not None
    _, batch = examples.batch(found.config, count)
    labels = batch['label'] if batch['label'].ndim == 1 else batch['label'].argmax(axis=1)
    pictures = examples.pictures(batch)
    return plots.grid(np.stack(pictures), list(map(str, labels))) if pictures else None


def embedding(found: LoadedModel) -> Picture | None:
    """The principal components of the patch embedding; None where patches are no pictures."""
    kernel = found.embedding()
    return None if kernel is None else plots.components(kernel)


def positions(found: LoadedModel) -> Picture | None:
    """How alike learned positions are; None where there are none."""
    table = found.positions()
    if table is None:
        return None
    return plots.similarity(weight_statistics.position_similarity(table, found.grid))


def attention(seen: list[attention_maps.Look]) -> Picture:
    """Images beside what some blocks look at, and the rollout."""
    return plots.attention([one.titled() for one in seen])


def norms(params: dict[str, Any]) -> Picture:
    """The size and the stable rank of the kernels, block by block."""
    ranks = {part: weight_statistics.stable_rank(each) for part, each in _spectra(params).items()}
    return plots.lines({'root mean square': weight_statistics.sizes(params), 'stable rank': ranks})


def as_trained(found: LoadedModel) -> LoadedModel:
    """The same, with the size of its images from the data where that is here.

    Spectrograms have another than the config says.
    """
    try:
        shape = train_data(found.config).shapes.get('image') if found.config else None
    except UserError:
        return found
    return dataclasses.replace(found, shape=shape)


def overview(found: list[LoadedModel]) -> dict[str, Callable[[], Picture | None]]:
    """What can be drawn of some checkpoints, and of the first of them; by the name of the file."""
    first = as_trained(found[0])
    runs = {
        (each.run[0].name if len(found) > 1 else ''): metrics.read(each.run[0])
        for each in found
        if each.run is not None
    }
    drawn: dict[str, Callable[[], Picture | None]] = {}
    if any(runs.values()):
        drawn['curves'] = lambda: plots.curves(runs)
    if first.config is not None:
        drawn['images'] = lambda: images(first)
    drawn |= {'embedding': lambda: embedding(first), 'positions': lambda: positions(first)}
    if first.config is not None:
        drawn['attention'] = lambda: attention(attention_maps.of_training(first))
    return drawn


def save(drawn: dict[str, Callable[[], Picture | None]], folder: Path) -> list[Path]:
    """Writes FOLDER/NAME.png of what can be drawn, and tells why the rest cannot.

    Raises:
      UserError: nothing can, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'--png {folder}: {error.strerror}; name a folder') from None
    written, problems = [], []
    for name, draw in drawn.items():
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


def show(found: LoadedModel) -> None:
    """Prints the parameter table and, of one of ours, the config and the history."""
    print(found.where)
    if found.weights is not None:
        print(f'{interop.describe(found.weights)}\n\n{parameter_table(found.params)}')
        return
    assert found.run is not None and found.sidecar is not None
    versions = found.sidecar['versions'].items()
    print(', '.join(f'{name} {version}' for name, version in versions))
    averaged = ' (averaged ones)' if found.which == 'ema' else ''
    print(f'\nparameters{averaged}\n{parameter_table(found.params)}\n\nconfig\n------')
    for key, value in found.settings().items():
        print(f'{key} = {value!r}')
    print(f'\n{history_table(metrics.read(found.run[0]))}')


def main(argv: list[str]) -> None:
    args, _ = command_line.parse(command_line.explore(), argv)
    asked = [flag for flag in ('compare', 'spectra', 'image') if getattr(args, flag)]
    if asked and len(args.path) > 1:
        raise UserError(f'--{asked[0]} looks at one checkpoint; there are {len(args.path)}')
    runtime.start()
    found = [loaded_model.load(path, args.which) for path in args.path]
    first = found[0]
    texts: list[Callable[[], str]] = []
    drawn: dict[str, Callable[[], Picture | None]] = {}
    if args.compare:
        other = loaded_model.load(args.compare, args.which)
        compared = weight_statistics.compare(first.params, other.params, (first.where, other.where))
        texts.append(lambda: f'{first.where}\n{other.where}\n{comparison_table(compared)}')
        drawn['comparison'] = lambda: plots.comparison(compared)
    if args.spectra:
        texts.append(lambda: f'{first.where}\n{spectra_table(first.params)}')
        drawn['spectra'] = lambda: plots.spectra(_spectra(first.params))
        drawn['norms'] = lambda: norms(first.params)
    if args.image:
        seen = attention_maps.of_file(first, args.image)
        texts.append(lambda: f'{first.where}: {args.image}\n{look_table(seen)}')
        drawn['attention'] = lambda: attention([seen])
        drawn['distances'] = lambda: plots.distances(seen.distances)
    if args.png:
        written = save(drawn or overview(found), Path(args.png))
        print('drew ' + ', '.join(map(str, written)))
    elif texts:
        print('\n\n'.join(text() for text in texts))
    else:
        for each in found:
            show(each)


if __name__ == '__main__':
    runtime.command(main)
