"""Transfer: fine-tune a checkpoint on a small dataset, beside the same recipe from scratch.

    python -m big_vit.transfer --config configs/transfer_digits.py \\
        --config.init=runs/fdsl --workdir runs/digits

Only parameters come from the checkpoint; the head is new, positions are
resized to the new grid. Training itself is `train.run`, the same path.
"""

import json
import math
import os
from typing import Any

import jax

from big_vit import config as config_lib
from big_vit import explain, hosts, metrics, origin, runtime, storage, train
from big_vit.config import Config
from big_vit.errors import UserError


def load_config(spec: str, overrides: list[tuple[str, str]]) -> Config:
    """The config, whose model is the checkpoint's where file and overrides do not say.

    Raises:
      UserError: config.init is not set, or there is no checkpoint.
    """
    # Where the checkpoint is stands in the config, and the model's default in the checkpoint.
    first = config_lib.load(spec, overrides, base={'model.variant': 'mu/1'})
    if first.init is None:
        raise UserError('config: init must be set to a checkpoint, as in --config.init=runs/fdsl')
    return config_lib.load(spec, overrides, base=origin.model_keys(first.init))


def run(
    config: Config, path: str | os.PathLike[str], *, force: bool = False
) -> dict[str, dict[str, float]] | None:
    """Fine-tunes from the checkpoint and, as a control, from random parameters.

    Both runs are resumable, in WORKDIR/pretrained and WORKDIR/control.

    Returns:
      The last metrics by start ('pretrained', 'control'); None if a signal
      ended it early.
    """
    workdir = storage.place(path)
    starts: dict[str, Any] = {'pretrained': origin.starting(config, keep_head=False)}
    if config.transfer.control:
        starts['control'] = None
    results = {}
    for label, start in starts.items():
        ended = train.run(config, workdir / label, force=force, params=start, label=label)
        if ended.stopped:
            return None
        results[label] = ended.metrics

    text = json.dumps(results, indent=2) + '\n'
    hosts.lead(lambda: storage.write_text(workdir / 'transfer.json', text))
    return results


def _standard_error(found: dict[str, float], name: str) -> float:
    share = found[f'{name}/top1']
    return math.sqrt(share * (1 - share) / found[f'{name}/count'])


# What the table of classification has; other metrics follow in one of their own.
_TABLED = ('top1', 'top5', 'loss', 'count')


def result_table(results: dict[str, dict[str, float]], evals: list[str]) -> str:
    """One row for each start and evaluation; ± is the standard error from the size of the test.

    Seeds add to it: a difference of a few ± from one seed shows nothing. What evaluations of
    other types measure follows, a row for each metric.
    """
    names = {'pretrained': 'from the checkpoint', 'control': 'control: same recipe from random'}
    first = next(iter(results.values()))
    classified = [name for name in evals if {f'{name}/{m}' for m in _TABLED} <= set(first)]
    rows = [
        (
            names[label],
            name,
            f'{found[f"{name}/top1"]:.2%}',
            f'{_standard_error(found, name):.2%}',
            f'{found[f"{name}/top5"]:.2%}',
            f'{found[f"{name}/loss"]:.4f}',
            f'{found[f"{name}/count"]:.0f}',
        )
        for label, found in results.items()
        for name in classified
    ]
    header = ('start', 'evaluation', 'top-1', '±', 'top-5', 'loss', 'examples')
    tabled = {f'{name}/{metric}' for name in classified for metric in _TABLED}
    more = [
        (
            *metric.split('/', 1),
            *(metrics.shown(metric, found[metric]) for found in results.values()),
        )
        for metric in first
        if metric.partition('/')[0] in evals and metric not in tabled
    ]
    texts = [metrics.table(header, rows)] if rows else []
    if more:
        starts = [names[label] for label in results]
        texts.append(metrics.table(('evaluation', 'metric', *starts), more))
    return '\n\n'.join(texts)


def main(argv: list[str]) -> None:
    parser = config_lib.experiment_parser(
        'python -m big_vit.transfer',
        'Fine-tune a checkpoint on a small dataset, with a control from scratch.',
        '--config.init=PATH says which checkpoint: a workdir or a checkpoints/STEP folder.',
    )
    args, overrides = config_lib.parse_command_line(parser, argv)
    spec = config_lib.require_flag(args.config, '--config', 'configs/transfer_digits.py')
    config = load_config(spec, overrides)
    runtime.start()
    if args.explain:
        print(explain.page(config))
        return
    workdir = config_lib.require_flag(args.workdir, '--workdir', 'runs/digits')
    same = {'config': config_lib.digest(config), 'workdir': workdir}
    with hosts.session(args.distributed, same):
        results = run(config, workdir, force=args.force)
        first = jax.process_index() == 0
    if results is not None and first:
        print(f'\n{result_table(results, list(config.evals))}\n')
        print(
            f'done    {workdir}/transfer.json; look inside: '
            f'python -m big_vit.explore {workdir}/pretrained'
        )


if __name__ == '__main__':
    runtime.command(main)
