"""LeJEPA of ViT-L/14 on ImageNet-1k without labels (arXiv 2511.08544).

    python -m big_vit.train --config configs/lejepa_l14_i1k.py --workdir gs://BUCKET/lejepa_l14

Views, rate and decay are those that the README of rbalestr-lab/lejepa recommends; it gives neither
the batch size nor the patch (98 pixels are 7 of 14) nor the width of the projector, which are ours.
It reports 79.48 % as the mean of linear probes with all labels on eight other datasets for its
ViT-L of 100 epochs. Nobody has run this config. There is no teacher and no schedule but the rate's;
the loss is of the whole batch, so there is no accumulation.
"""

from ml_collections import ConfigDict

COLOURS = (
    'flip_lr | color_jitter(0.4, 0.4, 0.2, 0.1, p=0.8) | random_grayscale(0.2)'
    ' | gaussian_blur(p=0.5) | solarize(128, p=0.2) | normalize'
)


def get_config(epochs: int = 100):
    views = (
        f'decode(3) ; global: 2 * rrc(size, scale=(0.3, 1)) | to_device | {COLOURS}'
        f' ; local: 6 * rrc(98, scale=(0.05, 0.3)) | to_device | {COLOURS}'
    )
    return ConfigDict(
        {
            'total_epochs': epochs,
            'batch_size': 1024,
            'image_size': 224,
            'lr': 5e-4,
            'task': {
                'name': 'joint_embedding',
                'method': 'lejepa',
                'sigreg_weight': 0.02,
                'sigreg_directions': 1024,
                'projector_width': 2048,
                'projection_dim': 128,
            },
            'model': {
                'variant': 'L/14',
                'pool': 'cls',
                'posemb': 'sincos2d_mae',
                'activation': 'gelu',
                'norm_eps': 1e-6,
                'drop_path': 0.1,
                'remat': 'names',
            },
            'data': {
                'name': 'tfds',
                'tfds_name': 'imagenet2012',
                'split': 'train',
                'num_classes': 1000,
                'num_examples': 1_281_167,
                'transform': views,
            },
            'optim': {'name': 'adamw', 'clip': 0.0, 'weight_decay': 0.05},
            'schedule': {'warmup_percent': 10, 'end': 1e-3},
        }
    )
