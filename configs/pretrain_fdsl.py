"""Pretrain on formula-driven images: needs no file, no network.

python -m big_vit.train --config configs/pretrain_fdsl.py --workdir runs/fdsl
"""

from ml_collections import ConfigDict


def get_config(classes: int = 1000, size: int = 32):
    return ConfigDict(
        {
            'total_steps': 1000,
            'batch_size': 128,
            'image_size': size,
            'lr': 1e-3,
            'model': {
                'variant': 'mu/8',
                'width': 96,
                'depth': 4,
                'num_heads': 3,
                'mlp_dim': 384,
                'dtype': 'float32',
            },
            'data': {'name': 'fdsl', 'num_classes': classes},
            'evals': {'test': {'split': 'test[:1000]'}},
            'optim': {'weight_decay': 0.05},
            'schedule': {'warmup_percent': 10},
        }
    )
