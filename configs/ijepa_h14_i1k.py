"""I-JEPA of ViT-H/14 on ImageNet-1k without labels (arXiv 2301.08243).

    python -m big_vit.train --config configs/ijepa_h14_i1k.py --workdir gs://BUCKET/ijepa_h14

The recipe of facebookresearch/ijepa (`in1k_vith14_ep300`): masks, predictor, loss, rate, decay and
momentum by step. Not the same: contexts have one length, that which batches of 128 are cut to there
on average, and initial values are those of all models here. A linear probe of it reaches 79.3 % as
reported in the paper, which was not checked here. Nobody has run this config.
"""

from ml_collections import ConfigDict


def get_config(epochs: int = 300):
    return ConfigDict(
        {
            'total_epochs': epochs,
            'batch_size': 2048,
            'image_size': 224,
            'lr': 1e-3,
            'task': {
                'name': 'joint_embedding',
                'method': 'ijepa',
                'predictor_width': 384,
                'predictor_depth': 12,
                'momentum': (0.996, 1.0),
            },
            'model': {
                'variant': 'H/14',
                'pool': 'gap',
                'posemb': 'sincos2d_mae',
                'activation': 'gelu',
                'norm_eps': 1e-6,
                'remat': 'names',
            },
            'data': {
                'name': 'tfds',
                'tfds_name': 'imagenet2012',
                'split': 'train',
                'num_classes': 1000,
                'num_examples': 1_281_167,
                'transform': 'rrc(size, scale=(0.3, 1)) | normalize',
            },
            'optim': {
                'name': 'adamw',
                'b1': 0.9,
                'b2': 0.999,
                'clip': 0.0,
                'weight_decay': 0.04,
                'weight_decay_end': 0.4,
                # The mask token too, as by the authors' rule: it has axes.
                'weight_decay_rules': (('.*/(bias|scale)', 0.0), ('.*', 1.0)),
            },
            'schedule': {
                'name': 'cosine_ijepa',
                'warmup_epochs': 40,
                'start': 0.2,
                'end': 1e-3,
            },
        }
    )
