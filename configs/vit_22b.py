"""A ViT with 22 billion parameters (arXiv 2302.05442) in the plain pre-norm form.

    python -m big_vit.train --config configs/vit_22b.py:pod=v5p-4096 --workdir gs://BUCKET/22b

The paper's dataset is not public: ImageNet-21k stands in for it; set `data.*` to yours.
"""

from ml_collections import ConfigDict

# Found by `python -m big_vit.plan --search`; docs/plans/ has the plans.
PODS = {
    'v5e-256': {'mesh': {'replica': 1, 'fsdp': 256}, 'batch_size': 4096},
    'v5p-512': {'mesh': {'replica': 1, 'fsdp': 512}, 'batch_size': 16_384},
    'v6e-256': {'mesh': {'replica': 1, 'fsdp': 256}, 'batch_size': 4096},
    'v5p-4096': {'mesh': {'replica': 8, 'fsdp': 512}, 'model': {'remat': 'none'}},
}


def get_config(pod: str = ''):
    config = ConfigDict(
        {
            'total_examples': 8_000_000_000,
            'batch_size': 65_536,
            'image_size': 224,
            'lr': 1e-3,
            'model': {'variant': '22B/14', 'pool': 'map', 'remat': 'full'},
            'data': {
                'name': 'tfds',
                'tfds_name': 'imagenet21k',
                'num_classes': 21_843,
                'num_examples': 14_197_087,
                'transform': 'inception_crop(size) | flip_lr',
            },
            'optim': {'b2': 0.95, 'weight_decay': 0.03, 'mu_dtype': 'bfloat16'},
            'schedule': {'warmup_steps': 10_000},
            'checkpoint': {'every_steps': 500},
        }
    )
    if pod:
        config.update(PODS[pod])
    return config
