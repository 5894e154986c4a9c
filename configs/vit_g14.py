"""ViT-g/14, or with variant=G/14 ViT-G/14, for billions of images (arXiv 2106.04560).

    python -m big_vit.train --config configs/vit_g14.py:pod=v5p-512 --workdir gs://BUCKET/g14
    python -m big_vit.train --config configs/vit_g14.py:variant=G/14,pod=v5p-512 \
        --workdir gs://BUCKET/G14

The papers' dataset is not public: ImageNet-21k stands in for it; set `data.*` to yours.
"""

from ml_collections import ConfigDict

# Found by `python -m big_vit.plan --search`; docs/plans/ has the plans.
PODS = {
    ('g/14', 'v5e-256'): {'mesh': {'replica': 2, 'fsdp': 128}, 'accumulation': 4},
    ('g/14', 'v5p-512'): {'mesh': {'replica': 4, 'fsdp': 128}},
    ('g/14', 'v6e-256'): {'mesh': {'replica': 2, 'fsdp': 128}, 'accumulation': 2},
    ('G/14', 'v5e-256'): {'mesh': {'replica': 2, 'fsdp': 128}, 'accumulation': 8},
    ('G/14', 'v5p-512'): {'mesh': {'replica': 4, 'fsdp': 128}},
    ('G/14', 'v6e-256'): {'mesh': {'replica': 2, 'fsdp': 128}, 'accumulation': 4},
}


def get_config(variant: str = 'g/14', pod: str = ''):
    config = ConfigDict(
        {
            'total_examples': 8_000_000_000,
            'batch_size': 16_384,
            'image_size': 224,
            'lr': 8e-4,
            'model': {'variant': variant, 'pool': 'map'},
            'data': {
                'name': 'tfds',
                'tfds_name': 'imagenet21k',
                'num_classes': 21_843,
                'num_examples': 14_197_087,
                'transform': 'inception_crop(size) | flip_lr',
            },
            'optim': {'b2': 0.95, 'weight_decay': 0.03, 'mu_dtype': 'bfloat16'},
            'schedule': {'warmup_steps': 10_000},
            'checkpoint': {'every_steps': 1000},
        }
    )
    if pod:
        config.update(PODS[variant, pod])
    return config
