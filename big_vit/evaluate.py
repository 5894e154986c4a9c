"""Evaluate: `python -m big_vit.evaluate --checkpoint W` scores a checkpoint on its config's splits.

Exact on the whole split, on any number of devices.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import jax

from big_vit import build, checkpoint, hosts, metrics, runtime, sharding, state
from big_vit import config as config_lib
from big_vit.errors import UserError
from big_vit.evaluators import classification


def run(
    workdir: Path, step: int, overrides: Sequence[tuple[str, str]] = ()
) -> dict[str, dict[str, float]]:
    """{evaluation: {'loss', 'top1', 'top5', 'count'}} of a checkpoint's (averaged) parameters.

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
    params, _ = checkpoint.load_params(workdir, step, checkpoint.scored_part(sidecar))
    checkpoint.check_params(params, parts.like['params'], f'{workdir}/checkpoints/{step}')
    params = jax.tree.map(sharding.place, params, state.shardings(parts.like)['params'])
    with jax.set_mesh(parts.mesh):
        steps = build.eval_steps(config, parts)
        return {
            name: classification.run(steps[name], params, build.eval_batches(parts, name))
            for name in parts.evals
        }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m big_vit.evaluate',
        description='Score a checkpoint: top-1, top-5 and loss over whole splits.',
        epilog="Keys of the checkpoint's config can be set, as in --config.evals.val.split=test.",
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
    rows = [
        (name, f'{x["top1"]:.2%}', f'{x["top5"]:.2%}', f'{x["loss"]:.4f}', f'{x["count"]:.0f}')
        for name, x in scores.items()
    ]
    print(metrics.table(('evaluation', 'top-1', 'top-5', 'loss', 'examples'), rows))


if __name__ == '__main__':
    runtime.command(main)
