"""Average: `python -m big_vit.average RUN RUN --out MEAN` mixes the weights of checkpoints.

Of several runs from one start it is a model soup (arXiv 2203.05482); of a checkpoint and what was
fine-tuned from it, WiSE-FT (arXiv 2109.01903); of the last checkpoints of one run, an average
over the end of its training.
"""

from big_vit import command_line

if __name__ == '__main__':  # Before the imports that take their time.
    command_line.answer_help(command_line.average())

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from big_vit import checkpoint, runtime, trees
from big_vit import config as config_lib
from big_vit.errors import UserError
from big_vit.models.encoder import merge_lora, unstack_blocks

HEADS = ('head/', 'head_dist/')


def average(
    every: Sequence[dict[str, Any]], weights: Sequence[float], names: Sequence[str]
) -> dict[str, Any]:
    """The weighted mean of parameters, in float32; a head that not all have is the last one's.

    Args:
      every: parameters, scanned or not.
      weights: one for each, whose sum is 1.
      names: of the checkpoints, for messages.

    Raises:
      UserError: they are of different architectures.
    """
    flats = [trees.flatten(unstack_blocks(merge_lora(params))) for params in every]
    last, found = flats[-1], {}
    for name, leaf in last.items():
        shapes = [flat[name].shape if name in flat else None for flat in flats]
        if len(set(shapes)) > 1:
            if name.startswith(HEADS):
                found[name] = np.asarray(leaf, np.float32)
                continue
            i = next(i for i, shape in enumerate(shapes) if shape != leaf.shape)
            has = _size(shapes[i]) if name in flats[i] else 'not there'
            raise UserError(
                f'{names[i]} and {names[-1]} are of different architectures: {name} is {has} in '
                f'the first and {_size(leaf.shape)} in the second'
            )
        total = np.zeros(leaf.shape, np.float64)
        for flat, weight in zip(flats, weights, strict=True):
            total += weight * np.asarray(flat[name], np.float64)
        found[name] = total.astype(np.float32)
    for flat, path in zip(flats, names, strict=True):
        more = [n for n in flat if n not in last and not n.startswith(HEADS)]
        if more:
            raise UserError(
                f'{path} and {names[-1]} are of different architectures: only the first has '
                f'{", ".join(more[:4])}'
            )
    return trees.unflatten(found)


def _size(shape: Sequence[int] | None) -> str:
    return 'x'.join(map(str, shape or ())) or 'one number'


def parse_weights(text: str | None, count: int) -> list[float]:
    """Weights as numbers; without any all are equal.

    Raises:
      UserError: not one number for each checkpoint, or their sum is not 1.
    """
    if text is None:
        return [1 / count] * count
    try:
        found = [float(word) for word in text.split(',')]
    except ValueError:
        raise UserError(f'--weights {text}: write numbers, as in --weights 0.3,0.7') from None
    if len(found) != count:
        raise UserError(f'--weights {text}: {count} checkpoints need as many numbers')
    if not math.isclose(sum(found), 1, abs_tol=1e-6):
        raise UserError(f'--weights {text}: their sum is {sum(found):g}, not 1')
    return found


def run(paths: Sequence[str], weights: Sequence[float], out: str) -> tuple[Path, int]:
    """Writes a workdir with the mean as its only checkpoint, and gives it with its step.

    The config is that of the last one, so that `evaluate`, `export` and `init` work on it.
    """
    every, sidecar = [], {}
    for path in paths:
        source, step = checkpoint.locate(path, 'CHECKPOINT')
        sidecar = checkpoint.read_sidecar(source, step)
        every.append(checkpoint.load_params(source, step, checkpoint.scored_part(sidecar))[0])
    mean = average(every, weights, paths)
    config = config_lib.from_json(sidecar['config']).without('model.lora', 'ema')
    config = config.replacing({'model.scan': False})
    return Path(checkpoint.save_params(out, mean, step, config.to_dict())), step


def main(argv: list[str]) -> None:
    args = command_line.average().parse_args(argv)
    out = command_line.require_flag(args.out, '--out', 'runs/mean')
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
    print(f'score    python -m big_vit.evaluate --checkpoint {workdir}')


if __name__ == '__main__':
    runtime.command(main)
