"""A small ViT on Fashion-MNIST from random parameters, for a laptop's CPU.

    python -m big_vit.train --config configs/fashion_mnist.py --workdir runs/fashion

Where the four IDX files lie is `data.path`; Debian's package
dataset-fashion-mnist puts them where the default says. With
--config configs/fashion_mnist.py:optimizer=shampoo (or soap, muon, ...) another optimizer
trains it; its rate is --config.lr.
"""

from ml_collections import ConfigDict

# What is not the same for a run of some thousand steps as for a long one.
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
