"""ViT-H/14 on ImageNet-21k, 90 epochs, following the ViT paper (arXiv 2010.11929, table 3).

    python -m big_vit.train --config configs/vit_h14.py:pod=v5p-512 --workdir gs://BUCKET/h14

`data.tfds_name` is the name of your ImageNet-21k in TensorFlow Datasets.
"""

from ml_collections import ConfigDict

# Found by `python -m big_vit.plan --search`; docs/plans/ has the plans.
PODS = {
    'v5e-256': {'mesh': {'replica': 8, 'fsdp': 32}},
    'v5p-512': {'mesh': {'replica': 16, 'fsdp': 32}},
    'v6e-256': {'mesh': {'replica': 8, 'fsdp': 32}},
}


def get_config(pod: str = ''):
    config = ConfigDict(
        {
            'total_epochs': 90,
            'batch_size': 4096,
            'image_size': 224,
            'lr': 1e-3,
            'model': {'variant': 'H/14'},
            'data': {
                'name': 'tfds',
                'tfds_name': 'imagenet21k',
                'num_classes': 21_843,
                'num_examples': 14_197_087,
                'transform': 'inception_crop(size) | flip_lr',
            },
            'optim': {'weight_decay': 0.03, 'mu_dtype': 'bfloat16'},
            'schedule': {'name': 'linear', 'warmup_steps': 10_000},
        }
    )
    if pod:
        config.update(PODS[pod])
    return config
