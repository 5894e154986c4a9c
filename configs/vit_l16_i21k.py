"""ViT-L/16 on ImageNet-21k, 300 epochs, with the recipe of AugReg (arXiv 2106.10270).

    python -m big_vit.train --config configs/vit_l16_i21k.py:pod=v5e-256 --workdir gs://BUCKET/l16

`data.tfds_name` is the name of your ImageNet-21k in TensorFlow Datasets.
"""

from ml_collections import ConfigDict

# Found by `python -m big_vit.plan --search`; docs/plans/ has the plans.
PODS = {
    'v5e-256': {'mesh': {'replica': 16, 'fsdp': 16}},
    'v5p-512': {'mesh': {'replica': 32, 'fsdp': 16}},
    'v6e-256': {'mesh': {'replica': 16, 'fsdp': 16}},
}


def get_config(pod: str = ''):
    config = ConfigDict(
        {
            'total_epochs': 300,
            'batch_size': 4096,
            'image_size': 224,
            'lr': 1e-3,
            'mixup': 0.5,
            'model': {'variant': 'L/16', 'scan': False},
            'data': {
                'name': 'tfds',
                'tfds_name': 'imagenet21k',
                'num_classes': 21_843,
                'num_examples': 14_197_087,
                'transform': 'inception_crop(size) | flip_lr | randaug(2, 15)',
            },
            'optim': {'weight_decay': 0.03},
            'schedule': {'warmup_steps': 10_000},
        }
    )
    if pod:
        config.update(PODS[pod])
    return config
