"""Explore: `python -m big_vit.explore WORKDIR` shows parameters, config and history of a run."""

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from big_vit import adapt, build, checkpoint, metrics, plots, runtime, sharding, trees
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
    headlines = metrics.headlines(rows)
    losses = {name for row in rows for name in row if name.endswith('/loss')}
    columns = [*sorted({*headlines, *losses}), 'train/accuracy', 'train/lr']
    chosen = list(steps.items())
    with_evals = [item for item in chosen if any(name in item[1] for name in headlines)]
    chosen = with_evals if with_evals else chosen
    every = -(-len(chosen) // most) if chosen else 1
    chosen = chosen[::-1][::every][::-1]
    body = [(step, *(f'{row[c]:.4g}' if c in row else '' for c in columns)) for step, row in chosen]
    return metrics.table(('step', *columns), body) if body else 'no metrics yet'


def _batch(config: config_lib.Config, count: int) -> tuple[build.Data, dict[str, np.ndarray]]:
    """The data of a config, and about `count` examples as they are trained on."""
    found = build.train_data(config)
    order = found.order
    assert order is not None
    order = dataclasses.replace(order, batch_size=count // order.repeats * order.repeats)
    batches = pipeline.train_batches(found.source, found.transform, order)
    batch = next(batches)
    batches.close()  # type: ignore[attr-defined]
    return found, batch


def draw_model(
    config: config_lib.Config,
    params: dict[str, Any],
    found: build.Data,
    batch: dict[str, np.ndarray],
    folder: Path,
) -> list[Path]:
    """Writes embedding.png, positions.png and attention.png of what of these a model has."""
    flat, written = trees.flatten(params), []

    def path(name: str) -> Path:
        written.append(folder / name)
        return written[-1]

    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    model = build.model(config, found.source.num_classes, found.shapes, mesh)
    grid = adapt.grid_of(config, found.shapes)
    kernel = flat.get('embedding/kernel')
    if kernel is not None and min(kernel.shape[-4:-2]) > 1:
        plots.embedding(kernel.astype(np.float32), path('embedding.png'))
    if grid is None or len(grid) != 2:
        return written
    rows, columns = grid
    if 'pos_embedding' in flat:
        table = flat['pos_embedding'][0, model.posemb_prefix :].astype(np.float32)
        plots.similarity(table, (rows, columns), path('positions.png'))
    if found.reads == ('image',):
        few = {name: value[:6] for name, value in batch.items()}
        seen = build.seen(config.replacing({'mixup': 0.0, 'cutmix': 0.0}), found, few, 0)
        apply = jax.jit(functools.partial(model.apply, capture=('attention',)))
        _, extra = apply({'params': params}, seen['image'])
        weights = np.asarray(extra['attention'], np.float32)
        images = np.stack(plots.as_bytes(list(few['image'])))
        plots.attention(images, weights, (rows, columns), model.prefix(), path('attention.png'))
    return written


def draw(workdirs: list[Path], step: int, config: config_lib.Config, folder: Path) -> list[Path]:
    """Writes curves.png of all runs, and what the first was trained on and what it looks at."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / 'curves.png']
    names = [path.name if len(workdirs) > 1 else '' for path in workdirs]
    plots.curves(
        {name: metrics.read(path) for name, path in zip(names, workdirs, strict=True)}, written[0]
    )
    found, batch = _batch(config, 50)
    labels = batch['label']
    if 'image' in batch:
        written.append(folder / 'images.png')
        plots.grid(
            np.stack(plots.as_bytes(list(batch['image']))),
            labels if labels.ndim == 1 else labels.argmax(axis=1),
            written[-1],
        )
    params, _ = checkpoint.load_params(workdirs[0], step)
    return written + draw_model(config, params, found, batch, folder)


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
        '--png',
        metavar='FOLDER',
        help='draw curves of the runs, a training batch, and what the model looks at instead',
    )
    args = parser.parse_args(argv)
    found = [checkpoint.locate(path, 'WORKDIR') for path in args.workdir]
    if args.png:
        sidecar = checkpoint.read_sidecar(*found[0])
        config = config_lib.from_json(sidecar['config'])
        paths = draw([workdir for workdir, _ in found], found[0][1], config, Path(args.png))
        print('drew ' + ', '.join(map(str, paths)))
        return
    for workdir, step in found:
        show(workdir, step)


if __name__ == '__main__':
    runtime.command(main)
