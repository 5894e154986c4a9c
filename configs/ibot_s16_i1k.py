"""iBOT ViT-S/16 on ImageNet-1k, without labels (arXiv 2111.07832).

    python -m big_vit.train --config configs/ibot_s16_i1k.py:path=DIR --workdir runs/ibot_s16

DIR is as for configs/vit_s16_i1k.py. The authors' repository gives for it (800 epochs, batch 1024)
75.2 % by 20 nearest neighbours, 77.9 % by a linear probe of the frozen features and 82.3 %
fine-tuned. They have not been reproduced here. Differences: weights start as those of this
codebase; temperatures rise by step and not by epoch. Masks and the centre of patches are by its own
laws; `task.mask_law=exact` has masks of DINOv3's, with which heads do a third of the work.
"""

from ml_collections import ConfigDict

COLOURS = 'to_device | flip_lr | color_jitter(0.4, 0.4, 0.2, 0.1, p=0.8) | random_grayscale(0.2)'
GLOBAL = f"rrc(size, scale=(0.25, 1), method='bicubic') | {COLOURS}"
LOCAL = f"rrc(96, scale=(0.05, 0.25), method='bicubic') | {COLOURS}"
VIEWS = ' ; '.join(
    [
        'decode(3)',
        f'global: {GLOBAL} | gaussian_blur(p=1.0) | normalize',
        f'global: {GLOBAL} | gaussian_blur(p=0.1) | solarize(p=0.2) | normalize',
        f'local: 10 * {LOCAL} | gaussian_blur(p=0.5) | normalize',
    ]
)
EVAL = {'transform': 'resize_small(256) | central_crop(size)'}


def get_config(path: str = ''):
    batch_size = 1024
    lr = 5e-4 * batch_size / 256
    return ConfigDict(
        {
            'total_epochs': 800,
            'batch_size': batch_size,
            'image_size': 224,
            'lr': lr,
            'skip_sigmas': 0,
            'task': {
                'name': 'self_distillation',
                'prototypes': 8192,
                'patch_head': 'shared',
                'koleo_weight': 0.0,
                'teacher_temperature': (0.04, 0.07),
                'temperature_warmup': 30 / 800,
                'momentum': (0.996, 1.0),
                'mask_law': 'ibot',
                'patch_centre': 'all',
            },
            'model': {
                'variant': 'S/16',
                'pool': 'cls',
                'posemb': 'learned',
                'posemb_prefix': 1,
                'activation': 'gelu',
                'drop_path': 0.1,
                'scan': False,
            },
            'data': {
                'name': 'tfds',
                'tfds_name': 'imagenet2012',
                'path': path,
                'split': 'train',
                'num_classes': 1000,
                'num_examples': 1_281_167,
                'transform': VIEWS,
            },
            'evals': {
                'knn': {
                    'type': 'knn',
                    'split': 'validation',
                    'num_examples': 50_000,
                    'train_split': 'train[:10%]',
                    'every_epochs': 10,
                    **EVAL,
                },
            },
            'optim': {
                'name': 'adamw',
                'weight_decay': 0.04,
                'weight_decay_end': 0.4,
                'weight_decay_rules': (
                    ('.*prototypes/.*', 1.0),
                    ('.*(bias|scale)', 0.0),
                    ('.*', 1.0),
                ),
                'clip': 3.0,
                'clip_by': 'tensor',
                'freeze_epochs': (('dino_head/prototypes/.*', 1), ('.*', 0)),
                'freeze_by': 'gradient',
            },
            'schedule': {'name': 'cosine_dino', 'warmup_epochs': 10, 'end': 1e-6 / lr},
        }
    )
