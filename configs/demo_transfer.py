"""The second half of `make demo`: few labelled digits, from a checkpoint and from scratch.

    python -m big_vit.transfer --config configs/demo_transfer.py \
        --config.init=runs/demo/pretrain --workdir runs/demo/transfer
"""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            'total_steps': 300,
            'batch_size': 64,
            'image_size': 32,
            'lr': 0.03,
            'data': {'name': 'digits', 'split': 'train[:20%]', 'transform': 'resize(size)'},
            'evals': {'test': {'split': 'test', 'every_steps': 100}},
            'optim': {'name': 'sgd', 'momentum': 0.9},
            'schedule': {'warmup_percent': 10},
            'log': {'every_steps': 50},
        }
    )
