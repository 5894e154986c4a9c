"""Check that faster numerics do not change training: `python -m benchmarks.precision`.

The same model is trained on the same batches of Fashion-MNIST from the same seeds: in float32; in
bfloat16 as implemented (one-pass norm statistics, hand-written derivatives); and in bfloat16 with
two-pass norms and automatic differentiation. Loss curves must agree within the spread of seeds.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from big_vit import config as config_lib
from big_vit import metrics, runtime, state
from big_vit.build.evaluations import build_evaluators
from big_vit.build.experiment import build_experiment, train_batches
from big_vit.build.steps import build_train_step
from big_vit.models import layers

FILE = Path(__file__).parent / 'results' / 'precision.json'
KINDS = ('float32', 'bfloat16', 'bfloat16, norms in two passes')
SEEDS, LAST = 3, 50
CHANGES: dict[str, Any] = {
    'model.width': 64,
    'model.depth': 2,
    'model.num_heads': 4,
    'model.mlp_dim': 256,
    'batch_size': 128,
    'total_epochs': None,
    'schedule.warmup_percent': 10,
    'evals.test.every_epochs': None,
    'evals.test.every_steps': 10_000,
}


def two_passes(x: Any, scale: Any, bias: Any, epsilon: float, dtype: Any) -> Any:
    """Compute layer normalisation by its definition, in float32."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    unit = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)
    lead = (1,) * (x.ndim - 1)
    return (unit * scale.reshape(*lead, -1) + bias.reshape(*lead, -1)).astype(dtype)


def curve(kind: str, seed: int, steps: int) -> dict[str, Any]:
    """Return the loss of each step, and the final accuracy on the test images."""
    changes = {**CHANGES, 'seed': seed, 'total_steps': steps, 'model.dtype': kind.partition(',')[0]}
    config = config_lib.load('configs/fashion_mnist.py', []).replacing(changes)
    norm = two_passes if 'two passes' in kind else layers.layer_norm
    with mock.patch.object(layers, 'layer_norm', norm):
        parts = build_experiment(config)
        with jax.set_mesh(parts.mesh):
            step, evaluators = build_train_step(config, parts), build_evaluators(config, parts)
            train_state = state.create(
                parts.model, parts.data.inputs, parts.optimizer, seed, parts.abstract_state
            )
            losses = []
            with train_batches(config, parts, 0) as batches:
                for _ in range(steps):
                    train_state, values = step(train_state, next(batches))
                    losses.append(float(values['loss']))
            top1 = evaluators['test'](train_state['params'], {})['top1']
    jax.clear_caches()
    return {'losses': losses, 'top1': top1}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.precision', allow_abbrev=False)
    parser.add_argument('--steps', type=int, default=300)
    args = parser.parse_args(argv)
    curves = {
        kind: [curve(kind, seed, args.steps) for seed in range(1, SEEDS + 1)] for kind in KINDS
    }
    FILE.write_text(json.dumps({'steps': args.steps, 'curves': curves}) + '\n')
    rows = []
    exact = np.array([run['losses'] for run in curves['float32']])
    for kind, runs in curves.items():
        losses = np.array([run['losses'] for run in runs])
        last = losses[:, -LAST:].mean(1)
        difference = np.abs((losses - exact)[:, -LAST:].mean(1))
        rows.append(
            (
                kind,
                f'{last.mean():.4f} ± {last.std(ddof=1):.4f}',
                f'{difference.mean():.4f}',
                f'{statistics.mean(run["top1"] for run in runs):.2%}',
            )
        )
    header = ('computed in', f'loss of the last {LAST} steps', 'apart from float32', 'test')
    print(metrics.table(header, rows))


if __name__ == '__main__':
    runtime.command(main)
