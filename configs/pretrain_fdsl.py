"""Pretrain on images drawn from formulas; needs neither files nor a network.

    python -m big_vit.train --config configs/pretrain_fdsl.py --workdir runs/fdsl

By default a small model learns 100 classes in two minutes on two CPU cores. For accelerators:
configs/pretrain_fdsl.py:variant=S/16,classes=21000,size=224.
"""

from ml_collections import ConfigDict

CPU_MODEL = {
    'variant': 'mu/4',
    'width': 64,
    'depth': 4,
    'num_heads': 2,
    'mlp_dim': 256,
    'posemb': 'learned',
    'dtype': 'float32',
    'scan': False,  # Unrolled blocks run 1.4 times as fast on a CPU.
}


def get_config(classes: int = 100, size: int = 32, variant: str = ''):
    return ConfigDict(
        {
            'total_steps': 1500,
            'batch_size': 64,
            'image_size': size,
            'lr': 1e-3,
            'model': {'variant': variant, 'posemb': 'learned'} if variant else CPU_MODEL,
            'data': {'name': 'fdsl', 'num_classes': classes},
            'evals': {'test': {'split': 'test[:2000]', 'every_percent': 20}},
            'optim': {'weight_decay': 0.05},
            'schedule': {'warmup_percent': 10},
            'log': {'every_steps': 50},
        }
    )
