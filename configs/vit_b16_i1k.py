"""ViT-B/16 on ImageNet-1k."""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        {
            'total_epochs': 300,
            'batch_size': 4096,
            'image_size': 224,
            'lr': 1e-3,
            'model': {'variant': 'B/16'},
            'data': {
                'name': 'tfds',
                'tfds_name': 'imagenet2012',
                'split': 'train',
                'num_classes': 1000,
                'num_examples': 1281167,
                'transform': 'resize(size)',
            },
            'optim': {'weight_decay': 0.1},
            'schedule': {'warmup_steps': 10000},
        }
    )
