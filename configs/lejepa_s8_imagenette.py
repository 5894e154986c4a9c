"""LeJEPA of ViT-S/8 on Imagenette without labels, the example of the authors (arXiv 2511.08544).

    python -m big_vit.train --config configs/lejepa_s8_imagenette.py --workdir runs/lejepa_s8

MINIMAL.md of rbalestr-lab/lejepa: four views of 128 pixels, 9,469 pictures, 800 epochs, for which
it reports 90.7 % by a linear probe that is trained beside the model. Not the same: the projector
reads the class token and not 512 features of a layer in between, and biases and scales are not
decayed. One GPU is enough. Nobody has run this config.
"""

from ml_collections import ConfigDict

VIEW = (
    'rrc(size, scale=(0.08, 1)) | to_device | color_jitter(0.8, 0.8, 0.8, 0.2, p=0.8)'
    ' | random_grayscale(0.2) | gaussian_blur(p=0.5, kernel=7) | solarize(128, p=0.2) | flip_lr'
    ' | normalize'
)


def get_config(epochs: int = 800):
    return ConfigDict(
        {
            'total_epochs': epochs,
            'batch_size': 256,
            'image_size': 128,
            'lr': 2e-3,
            'task': {
                'name': 'joint_embedding',
                'method': 'lejepa',
                'sigreg_weight': 0.02,
                'sigreg_directions': 256,
                'projector_width': 2048,
                'projection_dim': 16,
            },
            'model': {
                'variant': 'S/8',
                'pool': 'cls',
                'posemb': 'sincos2d_mae',
                'activation': 'gelu',
                'norm_eps': 1e-6,
                'drop_path': 0.1,
            },
            'data': {
                'name': 'tfds',
                'tfds_name': 'imagenette/160px-v2',
                'split': 'train',
                'num_classes': 10,
                'num_examples': 9469,
                'transform': f'decode(3) ; global: 4 * {VIEW}',
            },
            'optim': {'name': 'adamw', 'clip': 0.0, 'weight_decay': 0.05},
            'schedule': {'warmup_percent': 0.125, 'start': 0.01, 'end': 0.5},
        }
    )
