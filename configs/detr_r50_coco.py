"""DETR with a ResNet-50 on COCO (arXiv 2005.12872): 42.0 box AP published, after 500 epochs.

    python -m big_vit.train --config configs/detr_r50_coco.py:path=/data/coco \\
        --workdir gs://BUCKET/detr

The folder has annotations/instances_{train,val}2017.json and the pictures in train2017 and val2017.
`epochs=300` is the shorter run of the paper (40.6), whose rate falls at 200.

The ResNet starts from weights for ImageNet, with --config.init=FOLDER that transformers wrote:

    config = DetrConfig(num_labels=80)
    config.backbone_config.use_pretrained_backbone = True
    DetrForObjectDetection(config).save_pretrained('FOLDER')

Without it the root and the first stage, which do not move, stay random.

The recipe of facebookresearch/detr, but for these: pictures lie on one canvas of 1344x1344 pixels,
and not on the smallest one of their batch; padding is not attended to, as there. The cross-entropy
is one weighted mean over the batch, not one for each device. Attention weights have no dropout, as
in Hugging Face's. Class numbers have no gaps, so there are 80 of them. Nobody has run it here.
"""

from ml_collections import ConfigDict

SIDES = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)


def get_config(path: str = '', epochs: int = 500):
    return ConfigDict(
        {
            'total_epochs': epochs,
            'batch_size': 64,
            'image_size': 1344,
            'lr': 1e-4,
            'task': {'name': 'detection', 'queries': 100, 'decoder_depth': 6},
            'model': {
                'variant': 'R50+DETR/32',
                'tokenizer': 'frozen_resnet',
                'posemb': 'sincos2d_detr',
                'posemb_per_block': True,
                'post_norm': True,
                'norm_eps': 1e-5,
                'activation': 'relu',
                'weight_init': 'detr',
                'dropout': 0.1,
            },
            'data': {
                'name': 'coco',
                'path': path,
                'split': 'train2017',
                'num_classes': 80,
                'num_examples': 118_287,
                'transform': (
                    f'flip_lr | scaled_crop | resize_short({SIDES}, most=1333) | pad_to(size)'
                    ' | boxes(100) | normalize'
                ),
            },
            'evals': {
                'val': {
                    'type': 'detection',
                    'split': 'val2017',
                    'transform': (
                        'resize_short(800, most=1333) | pad_to(size) | boxes(100) | normalize'
                    ),
                    'every_epochs': 25,
                },
            },
            'optim': {
                'name': 'adamw',
                'clip': 0.1,
                'weight_decay': 1e-4,
                # Everything, biases, norms and queries too.
                'weight_decay_rules': (('.*', 1.0),),
                # Batch norms are frozen, and the first stage is; the rest of the ResNet is slower.
                'lr_rules': (
                    ('stem/.*/(scale|bias)|stem/(conv_root|stage1_).*', 0.0),
                    ('stem/.*', 0.1),
                    ('.*', 1.0),
                ),
            },
            'schedule': {'name': 'step', 'drop_epochs': 200 if epochs < 400 else 400, 'end': 0.1},
        }
    )
