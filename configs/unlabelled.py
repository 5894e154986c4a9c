"""Learn from your own pictures without labels: a folder, flat or nested, is all that it needs.

    python -m big_vit.train --config configs/unlabelled.py:path=PHOTOS --workdir runs/photos

By default a small model learns on a laptop: 300 pictures take some minutes on two CPU cores. For a
GPU name a model and its pixels: path=PHOTOS,variant=S/16,size=224. Other arguments:

* method: what is learned. jepa is LeJEPA, which learns most from few pictures; mae hides patches
  and predicts their pixels; ijepa predicts what an averaged model makes of hidden blocks, and needs
  many pictures.
* epochs=50, batch=64; large models are trained with 256 and more.

Pictures that cannot be read are skipped and counted. Evaluations need no labels: how many
dimensions of features are used, and whether they collapse. To start from released weights take
their model and add --config.init=FILE, with a tenth of the rate: mae goes on from MAE's files
(variant=B/16,size=224), with their decoder if they have it, and ijepa from I-JEPA's
(variant=H/14,size=224).
"""

from ml_collections import ConfigDict

CHOICES = {'method': ('jepa', 'mae', 'ijepa')}
COLOURS = (
    'flip_lr | color_jitter(0.4, 0.4, 0.2, 0.1, p=0.8) | random_grayscale(0.2)'
    ' | gaussian_blur(p=0.5) | solarize(128, p=0.2)'
)
# Of a laptop's model, and of a model of the papers.
PREDICTORS: dict[str, tuple[dict, dict]] = {
    'mae': (
        {'decoder_width': 96, 'decoder_depth': 2, 'decoder_heads': 3},
        {'decoder_width': 512, 'decoder_depth': 8, 'decoder_heads': 16},
    ),
    'ijepa': (
        {'predictor_width': 96, 'predictor_depth': 3, 'momentum': (0.99, 1.0)},
        {'predictor_width': 384, 'predictor_depth': 6},
    ),
    'jepa': (
        {'projector_width': 512, 'projection_dim': 64, 'sigreg_directions': 256},
        {'projector_width': 2048, 'projection_dim': 128},
    ),
}
TASKS: dict[str, dict] = {
    'mae': {'name': 'masked'},
    'ijepa': {'name': 'joint_embedding', 'method': 'ijepa', 'whole_grid': True},
    'jepa': {'name': 'joint_embedding', 'method': 'lejepa'},
}


def get_config(
    path: str = 'PHOTOS',
    method: str = 'jepa',
    variant: str = '',
    size: int = 64,
    epochs: int = 50,
    batch: int = 64,
):
    patch = int((variant or 'Ti/8').rpartition('/')[2])
    # Local views are three sevenths as large, in whole patches.
    local = max(round(size * 3 / 7 / patch), 1) * patch
    crops = {
        'mae': 'decode(3) | rrc(size, scale=(0.2, 1)) | flip_lr | normalize',
        'ijepa': 'decode(3) | rrc(size, scale=(0.3, 1)) | normalize',
        'jepa': f'decode(3) ; global: 2 * rrc(size, scale=(0.3, 1)) | {COLOURS} | normalize'
        f' ; local: 4 * rrc({local}, scale=(0.05, 0.3)) | {COLOURS} | normalize',
    }
    middle = f'decode(3) | resize_small({round(size * 8 / 7)}) | central_crop(size)'
    model = {'variant': variant} if variant else {'variant': 'Ti/8', 'depth': 6, 'scan': False}
    if method != 'ijepa':
        model |= {'pool': 'cls', 'class_token': True}
    return ConfigDict(
        {
            'total_epochs': epochs,
            'batch_size': batch,
            'image_size': size,
            'lr': 1e-3 * (batch / 256) ** 0.5,
            'task': {**TASKS[method], **PREDICTORS[method][bool(variant)]},
            'model': {
                **model,
                'posemb': 'sincos2d_mae',
                'activation': 'gelu',
                'norm_eps': 1e-6,
            },
            'data': {
                'name': 'folder',
                'path': path,
                'split': 'train',
                'transform': crops[method],
                'on_error': 'skip',
            },
            'evals': {
                'features': {
                    'type': 'representation',
                    'split': 'train',
                    'transform': middle,
                    'every_percent': 20,
                }
            },
            'optim': {'b2': 0.95, 'weight_decay': 0.05},
            'schedule': {'warmup_percent': 10},
        }
    )
