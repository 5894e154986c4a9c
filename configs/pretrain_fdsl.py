"""Pretrain on images drawn from formulas; needs neither files nor a network.

    python -m big_vit.train --config configs/pretrain_fdsl.py --workdir runs/fdsl

By default a small model learns 100 classes in three minutes on two CPU cores. For accelerators:
configs/pretrain_fdsl.py:variant=S/16,classes=21000,size=224. Before handwriting and symbols
configs/pretrain_fdsl.py:source=glyphs, invented letters; with patch=8 a step costs a quarter.
"""

from ml_collections import ConfigDict

CPU_MODEL = {
    'width': 64,
    'depth': 4,
    'num_heads': 2,
    'mlp_dim': 256,
    'posemb': 'learned',
    'dtype': 'float32',
    'scan': False,  # Unrolled blocks run 1.4 times as fast on a CPU.
}


CHOICES = {'source': ('fdsl', 'glyphs')}


def get_config(
    classes: int = 100, size: int = 32, variant: str = '', source: str = 'fdsl', patch: int = 4
):
    small = {**CPU_MODEL, 'variant': f'mu/{patch}'}
    return ConfigDict(
        {
            'total_steps': 1500,
            'batch_size': 64,
            'image_size': size,
            'lr': 1e-3,
            'model': {'variant': variant, 'posemb': 'learned'} if variant else small,
            'data': {'name': source, 'num_classes': classes},
            'evals': {'test': {'split': f'test[:{min(2000, 50 * classes)}]', 'every_percent': 20}},
            'optim': {'weight_decay': 0.05},
            'schedule': {'warmup_percent': 10},
            'log': {'every_steps': 50},
        }
    )
