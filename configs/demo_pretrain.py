"""The first half of `make demo`: a small ViT learns formula-driven images in two minutes.

python -m big_vit.train --config configs/demo_pretrain.py --workdir runs/demo/pretrain
"""

from ml_collections import ConfigDict


def get_config(classes: int = 100):
    return ConfigDict(
        {
            'total_steps': 1500,
            'batch_size': 64,
            'image_size': 32,
            'lr': 1e-3,
            'model': {
                'variant': 'mu/4',
                'width': 64,
                'depth': 4,
                'num_heads': 2,
                'mlp_dim': 256,
                'posemb': 'learned',
                'dtype': 'float32',
                'scan': False,  # Unrolled blocks run 1.4 times as fast on a CPU.
            },
            'data': {'name': 'fdsl', 'num_classes': classes},
            'evals': {'test': {'split': 'test[:2000]', 'every_steps': 500}},
            'optim': {'weight_decay': 0.05},
            'schedule': {'warmup_percent': 10},
            'log': {'every_steps': 50},
        }
    )
