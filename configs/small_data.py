"""Small models with and without convolutions on few Fashion-MNIST images, for a laptop's CPU.

    python -m big_vit.train --config configs/small_data.py:model=cct --workdir runs/cct

model is vit, conv, cct, spt or hybrid; optimizer is any name of docs/optimizers.md, with its
learning rate set by --config.lr. model=best is a wider compact transformer on all 60,000 images:
93.2 % in 42 minutes on two cores.
"""

from ml_collections import ConfigDict

PLAIN = {
    'variant': 'mu/4',
    'width': 64,
    'depth': 4,
    'num_heads': 4,
    'mlp_dim': 128,
    'posemb': 'learned',
    'dtype': 'float32',
    'scan': False,
}
CROP = 'random_crop(size, 2) | flip_lr'
MODELS: dict[str, dict] = {
    'vit': {},
    'conv': {'tokenizer': 'conv', 'depth': 3},  # One block less for the stem, as in its paper.
    'cct': {'tokenizer': 'cct', 'pool': 'seq', 'depth': 2},
    'spt': {'tokenizer': 'spt', 'lsa': True},
    'hybrid': {'variant': 'R+mu/4'},
}


def get_config(
    path: str = '/usr/share/datasets/fashion-mnist',
    model: str = 'vit',
    optimizer: str = 'adamw',
    examples: int = 4000,
):
    if model == 'best':
        return best(path)
    return ConfigDict(
        {
            'total_epochs': 10,
            'batch_size': 50,
            'image_size': 28,
            'lr': 2e-3 if optimizer == 'adamw' else 0.1,
            'model': {**PLAIN, **MODELS[model]},
            'data': {
                'name': 'idx',
                'path': path,
                'split': f'train[:{examples}]',
                'transform': CROP,
            },
            'evals': {'test': {'split': 'test', 'every_epochs': 10}},
            'optim': {'name': optimizer, 'weight_decay': 0.05 if optimizer == 'adamw' else 1e-3},
            'schedule': {'warmup_percent': 10},
        }
    )


def best(path: str) -> ConfigDict:
    """Return the config of a wider compact transformer on all images."""
    return ConfigDict(
        {
            'total_epochs': 14,
            'batch_size': 128,
            'image_size': 28,
            'lr': 0.01,
            'model': {**PLAIN, **MODELS['cct'], 'width': 128, 'mlp_dim': 256},
            'data': {'name': 'idx', 'path': path, 'split': 'train', 'transform': CROP},
            'evals': {'test': {'split': 'test', 'every_epochs': 2}},
            'optim': {'name': 'muon', 'weight_decay': 0.05},
            'schedule': {'warmup_percent': 5},
            'task': {'label_smoothing': 0.1},
            'ema': 0.998,
        }
    )
