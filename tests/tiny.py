"""Overrides that make any config small, and a small dataset in the format of MNIST."""

import gzip
import struct
from pathlib import Path

import numpy as np

MODEL = {
    'model.width': '32',
    'model.depth': '1',
    'model.mlp_dim': '64',
    'model.num_heads': '2',
}
RUN = {
    'total_steps': '3',
    'batch_size': '16',
    'checkpoint.every_steps': '2',
    'log.every_steps': '1',
}


def overrides(*parts: dict[str, str], evals: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    short = {f'evals.{name}.split': 'test[:20]' for name in evals}
    return [pair for part in (*parts, short) for pair in part.items()]


def flags(*parts: dict[str, str]) -> list[str]:
    return [f'--config.{key}={value}' for part in parts for key, value in part.items()]


def write_idx(folder: Path, examples: int = 64, size: int = 28) -> Path:
    """A folder with the four gzipped files of MNIST: class c is a bright column at 2c + 2."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for prefix in ('train', 't10k'):
        labels = (np.arange(examples) % 10).astype(np.uint8)
        images = rng.integers(0, 60, (examples, size, size), dtype=np.uint8)
        images[np.arange(examples), :, 2 * labels + 2] = 255
        for name, array in (('images-idx3', images), ('labels-idx1', labels)):
            header = struct.pack(f'>I{array.ndim}I', 0x800 + array.ndim, *array.shape)
            path = folder / f'{prefix}-{name}-ubyte.gz'
            path.write_bytes(gzip.compress(header + array.tobytes()))
    return folder
