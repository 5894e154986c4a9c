"""MAE pretraining of ViT-B/16 on ImageNet-1k without labels (arXiv 2111.06377).

    python -m big_vit.train --config configs/mae_b16_i1k.py:pod=v5e-256 --workdir gs://BUCKET/mae_b16

The recipe of facebookresearch/mae to the letter: masks, positions, targets, decoder, initial
values, decay of tokens, rate by step; crops are averaged where they shrink, and not Pillow's
bicubic. 1,600 epochs are what the authors' files were trained for; `epochs=800` is the paper's
shorter run. What was published with them: 83.6 % fine-tuned (configs/mae_finetune.py:b16), 68.0 %
by a linear probe (configs/mae_linear.py:b16). Nobody has run it here.
"""

from ml_collections import ConfigDict

# docs/plans/ has the plans of B/16 and H/14.
PODS = {
    # The decoder's kernels are small: they are split too, or each chip would update all of them.
    # Two images of 50 visible tokens fill a tile.
    'v5e-256': {
        'mesh': {'replica': 16, 'fsdp': 16, 'min_shard_size': 2**17},
        'model': {'pack': True},
    },
}


def get_config(pod: str = '', epochs: int = 1600):
    batch_size = 4096
    config = ConfigDict(
        {
            'total_epochs': epochs,
            'batch_size': batch_size,
            'image_size': 224,
            'lr': 1.5e-4 * batch_size / 256,
            'task': {
                'name': 'masked',
                'mask_ratio': 0.75,
                'decoder_width': 512,
                'decoder_depth': 8,
                'decoder_heads': 16,
                'normalise_pixels': True,
            },
            'model': {
                'variant': 'B/16',
                'class_token': True,
                'pool': 'cls',
                'posemb': 'sincos2d_mae',
                'activation': 'gelu',
                'norm_eps': 1e-6,
                'weight_init': 'mae',
                'scan': False,
            },
            'data': {
                'name': 'tfds',
                'tfds_name': 'imagenet2012',
                'split': 'train',
                'num_classes': 1000,
                'num_examples': 1_281_167,
                'transform': 'rrc(size, scale=(0.2, 1)) | flip_lr | normalize',
            },
            'optim': {
                'name': 'adamw',
                'b1': 0.9,
                'b2': 0.95,
                'clip': 0.0,
                'weight_decay': 0.05,
                # The class token and the mask token too, as by the authors' rule: they have axes.
                'weight_decay_rules': (('.*/kernel|cls|decoder/mask_token', 1.0), ('.*', 0.0)),
            },
            'schedule': {'warmup_epochs': 40},
        }
    )
    if pod:
        config.update(PODS[pod])
    return config
