"""Evaluate: `python -m big_vit.evaluate --checkpoint W` scores a checkpoint on its config's splits.

Exact on the whole split, on any number of devices.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import jax

from big_vit import build, checkpoint, hosts, metrics, runtime, scoring, sharding, state
from big_vit import config as config_lib
from big_vit.errors import UserError

# What is no share, and what of it has digits that matter; the count is one of examples.
LOSSES = ('loss', 'nll', 'brier')
AS_NUMBERS = (*LOSSES, 'count', 'l2', 'iterations', 'rate', 'last_blocks', 'mean_joined')
HEADERS = {'top1': 'top-1', 'top5': 'top-5', 'count': 'examples'}
# Of more metrics each has a line.
MOST_COLUMNS = 10


def run(
    workdir: Path, step: int, overrides: Sequence[tuple[str, str]] = ()
) -> dict[str, dict[str, float]]:
    """{evaluation: {metric: value}} of a checkpoint's (averaged) parameters.

    Args:
      overrides: of the checkpoint's own config, as (dotted key, text).
    """
    sidecar = checkpoint.read_sidecar(workdir, step)
    devices = len(jax.devices())
    saved = config_lib.from_json(sidecar['config'])
    # The mesh is this machine's, and a batch is only how many examples go at a time.
    here = {
        'mesh.replica': 1,
        'mesh.fsdp': -1,
        'mesh.tensor': 1,
        'accumulation': 1,
        'batch_size': math.ceil(saved.batch_size / devices) * devices,
    }
    config = config_lib.override(saved.replacing(here), overrides)
    if not list(config.evals):
        raise UserError(
            "the checkpoint's config has no evals; add one: --config.evals.test.split=test"
        )
    parts = build.experiment(config)
    evaluators = scoring.evaluators(config, parts)
    params, _ = checkpoint.load_params(workdir, step, checkpoint.scored_part(sidecar))
    checkpoint.check_params(params, parts.like['params'], f'{workdir}/checkpoints/{step}')
    params = jax.tree.map(sharding.place, params, state.shardings(parts.like)['params'])
    with jax.set_mesh(parts.mesh):
        shared: scoring.Shared = {}
        return {name: evaluate(params, shared) for name, evaluate in evaluators.items()}


def shown(metric: str, value: float) -> str:
    """A share as per cent, a count as a whole number, and what else there is as it is."""
    last = metric.rpartition('/')[2]
    if last in AS_NUMBERS:
        return f'{value:.4f}' if last in LOSSES else f'{value:g}'
    return f'{value:.2%}'


def tables(scores: dict[str, dict[str, float]]) -> str:
    """Evaluations with the same metrics as rows of one table; those of many metrics each alone."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, found in scores.items():
        alike.setdefault(tuple(found), []).append(name)
    texts = []
    for names_, evaluations in alike.items():
        if len(names_) > MOST_COLUMNS:
            for name in evaluations:
                rows = [(metric, shown(metric, x)) for metric, x in scores[name].items()]
                texts.append(metrics.table((name, ''), rows))
            continue
        # The count comes last, whatever is measured.
        columns = sorted(names_, key=lambda metric: metric == 'count')
        body = [
            (name, *(shown(metric, scores[name][metric]) for metric in columns))
            for name in evaluations
        ]
        header = ('evaluation', *(HEADERS.get(metric, metric) for metric in columns))
        texts.append(metrics.table(header, body))
    return '\n\n'.join(texts)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m big_vit.evaluate',
        description='Score a checkpoint by the evaluations of its config, over whole splits.',
        epilog="Keys of the checkpoint's config can be set, as in --config.evals.val.split=test, "
        'and evaluations added, as in --config.evals.near.type=knn; docs/evaluators.md has them.',
        allow_abbrev=False,
    )
    parser.add_argument('--checkpoint', help='a workdir (its newest), or a checkpoints/STEP folder')
    parser.add_argument('--json', action='store_true', help='print one JSON object')
    config_lib.add_distributed(parser)
    args, overrides = config_lib.parse_command_line(parser, argv)
    path = config_lib.require_flag(args.checkpoint, '--checkpoint', 'runs/first')
    workdir, step = checkpoint.locate(path, '--checkpoint')
    runtime.start()
    same = {'checkpoint': f'{workdir}/checkpoints/{step}', 'overrides': str(overrides)}
    with hosts.session(args.distributed, same):
        scores = run(workdir, step, overrides)
        first = jax.process_index() == 0
    if not first:
        return
    if args.json:
        print(json.dumps({'checkpoint': f'{workdir}/checkpoints/{step}', **scores}))
        return
    print(f'{workdir}/checkpoints/{step}')
    print(tables(scores))


if __name__ == '__main__':
    runtime.command(main)
