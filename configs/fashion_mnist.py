"""A small ViT trained from scratch on Fashion-MNIST with a laptop's CPU.

    python -m big_vit.train --config configs/fashion_mnist.py --workdir runs/fashion

`data.path` is the folder of the four IDX files; its default is where Debian's package
dataset-fashion-mnist puts them. --config configs/fashion_mnist.py:optimizer=shampoo (or soap, muon,
...) trains with another optimizer; set its learning rate with --config.lr.
"""

from ml_collections import ConfigDict

# Settings that a run of a few thousand steps needs, in place of defaults for long runs.
SMALL = {'shampoo': {'every': 10, 'start': 10, 'block': 256}}


def get_config(path: str = '/usr/share/datasets/fashion-mnist', optimizer: str = 'adamw'):
    return ConfigDict(
        {
            'total_epochs': 8,
            'batch_size': 60,
            'image_size': 28,
            'lr': 1.5e-3,
            'model': {
                'variant': 'mu/7',
                'width': 96,
                'depth': 4,
                'num_heads': 3,
                'mlp_dim': 384,
                'posemb': 'learned',
                'dtype': 'float32',
                'scan': False,  # Unrolled blocks run 1.4 times as fast on a CPU.
            },
            'data': {
                'name': 'idx',
                'path': path,
                'transform': 'random_crop(size, 1)',
            },
            'evals': {'test': {'split': 'test', 'every_epochs': 1}},
            'optim': {'name': optimizer, 'weight_decay': 0.05, **SMALL.get(optimizer, {})},
            'schedule': {'warmup_percent': 5},
            'log': {'every_steps': 200},
        }
    )
