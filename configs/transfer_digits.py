"""Fine-tune a checkpoint on scikit-learn's digits, by the field's protocol: SGD with momentum.

    python -m big_vit.transfer --config configs/transfer_digits.py \
        --config.init=runs/fdsl --workdir runs/digits
"""

from ml_collections import ConfigDict


def get_config(size: int = 32):
    return ConfigDict(
        {
            'total_steps': 400,
            'batch_size': 64,
            'image_size': size,
            'lr': 0.03,
            'data': {'name': 'digits', 'split': 'train[:20%]', 'transform': 'resize(size)'},
            'evals': {'test': {'split': 'test', 'every_steps': 100}},
            'optim': {'name': 'sgd', 'momentum': 0.9},
            'schedule': {'warmup_percent': 10},
            'log': {'every_steps': 20},
        }
    )
