"""Fine-tune on few labelled digits with the usual protocol: SGD with momentum, cosine.

    python -m big_vit.transfer --config configs/transfer_digits.py \
        --config.init=runs/fdsl --workdir runs/digits

`train[:20%]` is 288 digits; the test set is 359 digits by other writers. `make demo` takes
transfer_digits.py:split=train[:100], ten digits of each kind.
"""

from ml_collections import ConfigDict


def get_config(size: int = 32, split: str = 'train[:20%]'):
    augment = 'resize(size) | random_crop(size, 3)'
    return ConfigDict(
        {
            'total_steps': 300,
            'batch_size': 64,
            'image_size': size,
            'lr': 0.1,
            'data': {'name': 'digits', 'split': split, 'transform': augment},
            'evals': {'test': {'split': 'test', 'every_steps': 100}},
            'optim': {'name': 'sgd'},
            'schedule': {'warmup_percent': 10},
            'log': {'every_steps': 50},
        }
    )
