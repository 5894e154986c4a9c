"""Match pictures with sentences: two streams, one encoder, no labels; runs on a CPU.

    python -m big_vit.train --config configs/contrastive.py --workdir runs/contrastive

Pictures of a coloured shape and their captions (docs/data.md), with CLIP's loss (loss=sigmoid for
SigLIP's). Evaluates zero-shot classification among 36 kinds: all of them, and the six that training
never shows.
"""

from ml_collections import ConfigDict


def get_config(loss: str = 'softmax'):
    words = 'byte_tokens(40)'
    pictures = {
        'prompts': ('a {}', 'a picture of a {}'),
        'transform': "keep('image', 'label')",
        'every_percent': 25,
    }
    return ConfigDict(
        {
            'total_steps': 1500,
            'batch_size': 64,
            'image_size': 32,
            'lr': 2e-3,
            'task': {'name': 'contrastive', 'loss': loss, 'embedding_dim': 32},
            'model': {
                'variant': 'mu/8',
                'width': 64,
                'depth': 2,
                'num_heads': 4,
                'mlp_dim': 128,
                'dtype': 'float32',
                'scan': False,
            },
            'streams': {
                'image': {'tokenizer': 'patches', 'posemb': 'learned'},
                'text': {'tokenizer': 'words', 'posemb': 'learned', 'depth': 1},
            },
            'data': {'name': 'captions', 'transform': words},
            'evals': {
                'all': {'type': 'zero_shot', **pictures},
                'unseen': {'type': 'zero_shot', 'split': 'unseen', **pictures},
                'pairs': {'type': 'matching', 'split': 'test[:1000]', 'transform': words},
            },
            'optim': {'weight_decay': 1e-3},
            'schedule': {'warmup_percent': 10},
        }
    )
