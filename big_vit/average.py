"""Average: `python -m big_vit.average RUN RUN --out MEAN` mixes the weights of checkpoints.

Applied to several runs from one start this is a model soup (arXiv 2203.05482); to a checkpoint
and a fine-tuned descendant, WiSE-FT (arXiv 2109.01903); to the last checkpoints of one run, an
average over the end of training.
"""

from big_vit import command_line

if __name__ == '__main__':  # Before the slow imports.
    command_line.answer_help(command_line.average())

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from big_vit import checkpoint, interop, runtime, trees
from big_vit import config as config_lib
from big_vit.errors import UserError
from big_vit.models.encoder import merge_lora, unstack_blocks
from big_vit.pretrained.adapt import head_by_name

HEADS = ('head/', 'head_dist/')


def average(
    models: Sequence[dict[str, Any]], weights: Sequence[float], names: Sequence[str]
) -> dict[str, Any]:
    """Averages parameters, in float32; heads that differ in shape are taken from the last.

    Args:
      models: parameters of each model, scanned or not.
      weights: one per model; they sum to 1.
      names: names of the checkpoints, for messages.

    Raises:
      UserError: the models are of different architectures.
    """
    flats = [trees.flatten(unstack_blocks(merge_lora(params))) for params in models]
    last, mean = flats[-1], {}
    for name, leaf in last.items():
        shapes = [flat[name].shape if name in flat else None for flat in flats]
        if len(set(shapes)) > 1:
            if name.startswith(HEADS):
                mean[name] = np.asarray(leaf, np.float32)
                continue
            i = next(i for i, shape in enumerate(shapes) if shape != leaf.shape)
            actual = _size(shapes[i]) if name in flats[i] else 'not there'
            raise UserError(
                f'{names[i]} and {names[-1]} are of different architectures: {name} is {actual} in '
                f'the first and {_size(leaf.shape)} in the second'
            )
        total = np.zeros(leaf.shape, np.float64)
        for flat, weight in zip(flats, weights, strict=True):
            total += weight * np.asarray(flat[name], np.float64)
        mean[name] = total.astype(np.float32)
    for flat, path in zip(flats, names, strict=True):
        extra = [n for n in flat if n not in last and not n.startswith(HEADS)]
        if extra:
            raise UserError(
                f'{path} and {names[-1]} are of different architectures: only the first has '
                f'{", ".join(extra[:4])}'
            )
    return trees.unflatten(mean)


def _size(shape: Sequence[int] | None) -> str:
    return 'x'.join(map(str, shape or ())) or 'one number'


def parse_weights(text: str | None, count: int) -> list[float]:
    """Parses comma-separated weights; None gives equal ones.

    Raises:
      UserError: not one number per checkpoint, or their sum is not 1.
    """
    if text is None:
        return [1 / count] * count
    try:
        weights = [float(word) for word in text.split(',')]
    except ValueError:
        raise UserError(f'--weights {text}: write numbers, as in --weights 0.3,0.7') from None
    if len(weights) != count:
        raise UserError(f'--weights {text}: {count} checkpoints need as many numbers')
    if not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise UserError(f'--weights {text}: their sum is {sum(weights):g}, not 1')
    return weights


def run(paths: Sequence[str], weights: Sequence[float], out: str) -> tuple[Path, int]:
    """Writes a workdir with the mean as its only checkpoint; returns (workdir, step).

    It gets the config of the last checkpoint, so that `evaluate`, `export` and `init` accept it.
    """
    models, names, sidecar = [], [], {}
    for path in paths:
        if interop.load_init(path) is not None:
            raise UserError(
                f'CHECKPOINT: {path} is weights of another codebase; make a workdir of it first: '
                f'python -m big_vit.export --from {path} --out RUN'
            )
        source, step = checkpoint.locate(path, 'CHECKPOINT')
        sidecar = checkpoint.read_sidecar(source, step)
        models.append(checkpoint.load_params(source, step, checkpoint.scored_part(sidecar))[0])
        names.append(checkpoint.class_names(sidecar))
    models = [
        head_by_name(params, own, names[-1], path)
        for params, own, path in zip(models, names, paths, strict=True)
    ]
    mean = average(models, weights, paths)
    config = config_lib.from_json(sidecar['config']).without('model.lora', 'ema')
    config = config.replacing({'model.scan': False})
    return Path(checkpoint.save_params(out, mean, step, config.to_dict(), names[-1])), step


def main(argv: list[str]) -> None:
    args, _ = command_line.parse(command_line.average(), argv)
    out = args.out
    paths = args.checkpoint
    if args.last is not None:
        if len(paths) > 1 or args.weights:
            raise UserError('--last N is of one run, whose checkpoints have equal weights')
        workdir, _ = checkpoint.locate(paths[0], 'CHECKPOINT')
        steps = checkpoint.steps(workdir)
        if not 2 <= args.last <= len(steps):
            raise UserError(
                f'--last {args.last}: {workdir} has {len(steps)} checkpoint(s), and two are the '
                'least to average; checkpoint.keep_last says how many a run keeps'
            )
        paths = [f'{workdir}/checkpoints/{step}' for step in steps[-args.last :]]
    if len(paths) < 2:
        raise UserError('give two checkpoints or more, or one run with --last N')
    weights = parse_weights(args.weights, len(paths))
    workdir, step = run(paths, weights, out)
    for path, weight in zip(paths, weights, strict=True):
        print(f'{weight:7.3f}  {path}')
    print(f'wrote    {workdir}/checkpoints/{step}')
    print(f'score    python -m big_vit.evaluate {workdir}')


if __name__ == '__main__':
    runtime.command(main)
