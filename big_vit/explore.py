"""Explore: `python -m big_vit.explore WORKDIR` shows parameters, config and history of a run."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from big_vit import build, checkpoint, metrics, plots, runtime, trees
from big_vit import config as config_lib
from big_vit.data import pipeline


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


def history_table(rows: list[dict[str, Any]], most: int = 20) -> str:
    """Training loss and rate and every evaluation over the steps, at most `most` rows."""
    steps: dict[int, dict[str, float]] = {}
    for row in rows:
        steps.setdefault(row['step'], {}).update(row)
    evaluated = sorted({n for row in rows for n in row if n.endswith(('/top1', '/loss'))})
    columns = [*evaluated, 'train/accuracy', 'train/lr']
    chosen = list(steps.items())
    with_evals = [item for item in chosen if any(n.endswith('/top1') for n in item[1])]
    chosen = with_evals if with_evals else chosen
    every = -(-len(chosen) // most) if chosen else 1
    chosen = chosen[::-1][::every][::-1]
    body = [(step, *(f'{row[c]:.4g}' if c in row else '' for c in columns)) for step, row in chosen]
    return metrics.table(('step', *columns), body) if body else 'no metrics yet'


def draw(workdirs: list[Path], config: config_lib.Config, folder: Path) -> list[Path]:
    """Writes curves.png of all runs, and images.png with a batch as the first was trained on it."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / 'curves.png', folder / 'images.png']
    names = [path.name if len(workdirs) > 1 else '' for path in workdirs]
    plots.curves(
        {name: metrics.read(path) for name, path in zip(names, workdirs, strict=True)}, written[0]
    )
    found = build.train_data(config)
    order = found.order
    assert order is not None
    order = dataclasses.replace(order, batch_size=50 // order.repeats * order.repeats)
    batches = pipeline.train_batches(found.source, found.transform, order)
    batch = next(batches)
    batches.close()  # type: ignore[attr-defined]
    labels = batch['label']
    plots.grid(
        np.stack(plots.as_bytes(list(batch['image']))),
        labels if labels.ndim == 1 else labels.argmax(axis=1),
        written[1],
    )
    return written


def show(workdir: Path, step: int) -> None:
    """Prints the parameter table, the config and the history."""
    params, sidecar = checkpoint.load_params(workdir, step)
    config = config_lib.from_json(sidecar['config'])
    print(f'{workdir}/checkpoints/{step}')
    print(', '.join(f'{name} {version}' for name, version in sidecar['versions'].items()))
    print(f'\n{parameter_table(params)}\n\nconfig\n------')
    for key, value in config_lib.flatten(config.to_dict()).items():
        if config.sets(key):
            print(f'{key} = {value!r}')
    print(f'\n{history_table(metrics.read(workdir))}')


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m big_vit.explore',
        description='Show the parameters, the config and the history of a run.',
        allow_abbrev=False,
    )
    parser.add_argument(
        'workdir', nargs='+', help='a workdir (its newest), or a checkpoints/STEP folder'
    )
    parser.add_argument(
        '--png', metavar='FOLDER', help='draw curves of the runs and a training batch instead'
    )
    args = parser.parse_args(argv)
    found = [checkpoint.locate(path, 'WORKDIR') for path in args.workdir]
    if args.png:
        sidecar = checkpoint.read_sidecar(*found[0])
        config = config_lib.from_json(sidecar['config'])
        paths = draw([workdir for workdir, _ in found], config, Path(args.png))
        print('drew ' + ', '.join(map(str, paths)))
        return
    for workdir, step in found:
        show(workdir, step)


if __name__ == '__main__':
    runtime.command(main)
