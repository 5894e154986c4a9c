"""ViT-S/16 on ImageNet-1k, 90 epochs: "Better plain ViT baselines" (arXiv 2205.01580).

    python -m big_vit.train --config configs/vit_s16_i1k.py:path=DIR --workdir runs/s16

DIR is the data_dir of TensorFlow Datasets, with imagenet2012 as ArrayRecord (docs/data.md); it may
be gs://. The published top-1 on the validation split is 76.5 % (80 % with
--config.total_epochs=300). It has not been reproduced here: the figure was published for
big_vision, from which this config differs as follows:

* the head is linear; theirs has a hidden layer, which the paper calls not significantly better;
* it computes in bfloat16; theirs multiplies in bfloat16 (as TPUs do) between float32 activations;
* it mixes with a share per example, theirs with one per batch; and its randaug has the corrections
  that docs/data.md names.

With --config configs/vit_s16_i1k.py:path=DIR,optimizer=shampoo it is trained with Shampoo instead,
using the settings below.
"""

from ml_collections import ConfigDict

EVAL = {'transform': 'resize_small(256) | central_crop(size)', 'every_steps': 2500}


# The settings with which Distributed Shampoo won AlgoPerf 0.5 on its ViT-S/16: the second of five,
# and the one that reached the target in all studies (mlcommons/submissions_algorithms, 2024), in
# 81,700 steps of the 112,000 scheduled, where the baseline took 153,800 of 186,666. Decay is
# multiplied by the rate in both codebases. Here the ridge is relative and roots are computed by
# matrix products, and this config has not been run yet.
SHAMPOO = {
    'total_steps': 112_000,
    'lr': 1.438e-3,
    'task': {'label_smoothing': 0.2},
    'optim': {
        'name': 'shampoo',
        'b1': 0.97466,
        'b2': 0.97492,
        'nesterov': True,
        'weight_decay': 1.97e-4,
        'weight_decay_rules': (('.*', 1.0),),
        'block': 1024,
        'every': 100,
        'start': 100,
        'groups': 4,  # Theirs updates all at once: the same roots, at other steps.
        'clip': 0,
    },
    'schedule': {'name': 'cosine', 'warmup_percent': 5},
}


def get_config(path: str = '', optimizer: str = 'adamw'):
    config = ConfigDict(
        {
            'total_epochs': 90,
            'batch_size': 1024,
            'image_size': 224,
            'lr': 1e-3,
            'mixup': 0.2,
            'skip_sigmas': 0,  # Theirs skips no update.
            # Unrolled blocks take longer to compile but run faster (docs/plans).
            'model': {'variant': 'S/16', 'pool': 'gap', 'posemb': 'sincos2d', 'scan': False},
            'data': {
                'name': 'tfds',
                'tfds_name': 'imagenet2012',
                'path': path,
                'split': 'train[:99%]',
                'num_classes': 1000,
                'num_examples': 1_268_355,
                'transform': 'inception_crop(size) | flip_lr | randaug(2, 10)',
            },
            'evals': {
                'val': {'split': 'validation', 'num_examples': 50_000, **EVAL},
                # For choices, so that the validation split stays untouched.
                'held_out': {'split': 'train[99%:]', 'num_examples': 12_812, **EVAL},
            },
            # Theirs is 1e-4 and not multiplied by the rate, whose peak is 1e-3: that makes 0.1
            # here.
            'optim': {'weight_decay': 0.1, 'mu_dtype': 'bfloat16', 'clip': 1.0},
            'schedule': {'name': 'cosine', 'warmup_steps': 10_000},
            'checkpoint': {'every_steps': 1000},
            'log': {'every_steps': 50},
        }
    )
    if optimizer == 'shampoo':
        for name in ('total_epochs', 'optim', 'schedule'):
            del config[name]
        config.update(SHAMPOO)
    elif optimizer != 'adamw':
        raise ValueError(f'optimizer must be adamw or shampoo, not {optimizer}')
    return config
