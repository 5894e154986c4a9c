"""Learn from your own pictures without labels: a folder, flat or nested, is all that it needs.

    python -m big_vit.train --config configs/unlabelled.py:path=PHOTOS --workdir runs/photos

By default a small model learns on a laptop: 300 pictures take some minutes on two CPU cores. For a
GPU name a model and its pixels: path=PHOTOS,variant=S/16,size=224. Other arguments:

* method: what is learned. jepa is LeJEPA, which has no teacher; dino learns from an average of
  itself; both learn most from few pictures. mae hides patches and predicts their pixels. ijepa
  predicts what an averaged model makes of hidden blocks, and needs many pictures.
* pictures=1000: about how many there are. dino's prototypes, temperature and momentum follow it, as
  in lightly-train.
* epochs=50, batch=64; large models are trained with 256 and more.
* start: whose weights --config.init names, of the model `variant`: mae, dinov2, dinov3 or ijepa.
  The model gets its settings, and the rate a tenth. MAE's decoder and I-JEPA's predictor go on
  where the file has them and the method is theirs.

Pictures that cannot be read are skipped and counted. Evaluations need no labels: how many
dimensions of features are used, and whether they collapse.
"""

from ml_collections import ConfigDict

CHOICES = {
    'method': ('jepa', 'dino', 'mae', 'ijepa'),
    'start': ('', 'mae', 'dinov2', 'dinov3', 'ijepa'),
}
COLOURS = 'flip_lr | color_jitter(0.4, 0.4, 0.2, 0.1, p=0.8) | random_grayscale(0.2)'
# Tasks, with sizes of a laptop's model and of a model of the papers.
TASKS: dict[str, tuple[dict, dict, dict]] = {
    'mae': (
        {'name': 'masked'},
        {'decoder_width': 96, 'decoder_depth': 2, 'decoder_heads': 3},
        {'decoder_width': 512, 'decoder_depth': 8, 'decoder_heads': 16},
    ),
    'ijepa': (
        {'name': 'joint_embedding', 'method': 'ijepa', 'whole_grid': True},
        {'predictor_width': 96, 'predictor_depth': 3},
        {'predictor_width': 384, 'predictor_depth': 6},
    ),
    'jepa': (
        {'name': 'joint_embedding', 'method': 'lejepa'},
        {'projector_width': 512, 'projection_dim': 64, 'sigreg_directions': 256},
        {'projector_width': 2048, 'projection_dim': 128},
    ),
    'dino': (
        {
            'name': 'self_distillation',
            'patch_head': 'none',
            'prototype_norm': 'fixed',
            'koleo_weight': 0.0,
        },
        {'head_width': 512, 'bottleneck': 128},
        {'head_width': 2048, 'bottleneck': 256},
    ),
}
LAPTOP = {'variant': 'Ti/8', 'depth': 6, 'scan': False}
# Prototypes for fewer pictures than these.
PROTOTYPES = ((2e4, 1024), (5e4, 2048), (1e5, 4096), (2e5, 16_384), (5e5, 32_768), (1e12, 65_536))
FIXED = {'posemb': 'sincos2d_mae', 'activation': 'gelu', 'norm_eps': 1e-6}
LEARNED = {'posemb': 'learned', 'activation': 'gelu', 'norm_eps': 1e-6}
MODELS: dict[str, dict] = {
    '': FIXED,
    'mae': FIXED,
    'ijepa': FIXED,
    'dinov2': {**LEARNED, 'posemb_prefix': 1, 'layer_scale': 1e-5},
    'dinov3': {
        'posemb': 'rope',
        'activation': 'gelu',
        'norm_eps': 1e-5,
        'key_bias': False,
        'registers': 4,
        'layer_scale': 1e-5,
    },
}


def from_average(pictures: int) -> dict:
    """Settings of a teacher that follow the number of pictures."""
    share = min(max((pictures - 2e4) / (1.28e6 - 2e4), 0.0), 1.0)
    return {
        'prototypes': next(count for most, count in PROTOTYPES if pictures < most),
        'teacher_temperature': (0.02 + 0.02 * share, 0.02 + 0.05 * share),
        'momentum': (0.99 + 0.006 * share, 1.0),
    }


def views(method: str, size: int, patch: int) -> str:
    """What is made of a picture."""
    # Local views are three sevenths as large, in whole patches.
    local = max(round(size * 3 / 7 / patch), 1) * patch
    if method == 'mae':
        return 'decode(3) | rrc(size, scale=(0.2, 1)) | flip_lr | normalize'
    if method == 'ijepa':
        return 'decode(3) | rrc(size, scale=(0.3, 1)) | normalize'
    if method == 'jepa':
        more = f'{COLOURS} | gaussian_blur(p=0.5) | solarize(128, p=0.2) | normalize'
        return (
            f'decode(3) ; global: 2 * rrc(size, scale=(0.3, 1)) | {more}'
            f' ; local: 4 * rrc({local}, scale=(0.05, 0.3)) | {more}'
        )
    crop = f'rrc(size, scale=(0.14, 1)) | {COLOURS}'
    return (
        f'decode(3) ; global: {crop} | gaussian_blur(p=1.0) | normalize'
        f' ; global: {crop} | gaussian_blur(p=0.1) | solarize(128, p=0.2) | normalize'
        f' ; local: 4 * rrc({local}, scale=(0.05, 0.14)) | {COLOURS} | gaussian_blur(p=0.5)'
        ' | normalize'
    )


def get_config(
    path: str = 'PHOTOS',
    method: str = 'jepa',
    variant: str = '',
    size: int = 64,
    pictures: int = 1000,
    epochs: int = 50,
    batch: int = 64,
    start: str = '',
):
    task, small, large = TASKS[method]
    task = {**task, **(large if variant else small)}
    if method in ('dino', 'ijepa'):
        by_number = from_average(pictures)
        task |= by_number if method == 'dino' else {'momentum': by_number['momentum']}
    model: dict = {'variant': variant} if variant else {**LAPTOP}
    pool = {'pool': 'gap'} if method == 'ijepa' or start == 'ijepa' else {'pool': 'cls'}
    config = ConfigDict(
        {
            'total_epochs': epochs,
            'batch_size': batch,
            'image_size': size,
            'lr': 1e-3 * (batch / 256) ** 0.5 / (10 if start else 1),
            'task': task,
            'model': {**model, **MODELS[start], **pool},
            'data': {
                'name': 'folder',
                'path': path,
                'split': 'train',
                'transform': views(method, size, int(str(model['variant']).rpartition('/')[2])),
                'on_error': 'skip',
            },
            'evals': {
                'features': {
                    'type': 'representation',
                    'split': 'train',
                    'transform': f'decode(3) | resize_small({round(size * 8 / 7)})'
                    ' | central_crop(size)',
                    'every_percent': 20,
                }
            },
            'optim': {'b2': 0.95, 'weight_decay': 0.05},
            'schedule': {'warmup_percent': 10},
        }
    )
    if method == 'dino':
        config.optim.clip = 3.0
        config.optim.freeze_percent = (('dino_head/prototypes/.*', 2), ('.*', 0))
    return config
