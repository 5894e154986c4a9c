"""ViT-B/16 on ImageNet-1k, 300 epochs, with the strong augmentation of AugReg (arXiv 2106.10270).

    python -m big_vit.train --config configs/vit_b16_i1k.py:pod=v5e-256 --workdir gs://BUCKET/b16

The dataset is prepared by TensorFlow Datasets as ArrayRecord, see docs/data.md.
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
            # Unrolled blocks take longer to compile but run faster (docs/plans).
            'model': {'variant': 'B/16', 'scan': False},
            'data': {
                'name': 'tfds',
                'tfds_name': 'imagenet2012',
                'split': 'train',
                'num_classes': 1000,
                'num_examples': 1_281_167,
                'transform': 'inception_crop(size) | flip_lr | randaug(2, 15)',
            },
            'evals': {
                'val': {
                    'split': 'validation',
                    'num_examples': 50_000,
                    'transform': 'resize_small(256) | central_crop(size)',
                }
            },
            'optim': {'weight_decay': 0.1},
            'schedule': {'warmup_steps': 10_000},
        }
    )
    if pod:
        config.update(PODS[pod])
    return config
