"""A small ViT on your own images: a folder with one sub-folder per class.

    python -m big_vit.train --config configs/own_images.py:path=PHOTOS --workdir runs/photos

Trains on nine tenths of the images and evaluates on the rest. If PHOTOS has class folders inside
folders `train` and `test` (or others), name them: path=PHOTOS,split=train,test=test.
"""

from ml_collections import ConfigDict


def get_config(
    path: str = 'PHOTOS',
    split: str = 'train[:90%]',
    test: str = 'train[90%:]',
    size: int = 64,
    epochs: int = 30,
):
    middle = f'decode | resize_small({round(size * 8 / 7)}) | central_crop(size)'
    return ConfigDict(
        {
            'total_epochs': epochs,
            'batch_size': 64,
            'image_size': size,
            'lr': 1e-3,
            'task': {'label_smoothing': 0.1},
            'model': {'variant': 'Ti/8', 'depth': 6, 'scan': False},
            'data': {
                'name': 'folder',
                'path': path,
                'split': split,
                'transform': 'decode | rrc(size, scale=(0.3, 1)) | flip_lr',
            },
            'evals': {'test': {'split': test, 'transform': middle}},
            'optim': {'weight_decay': 0.05},
            'schedule': {'warmup_percent': 10},
        }
    )
