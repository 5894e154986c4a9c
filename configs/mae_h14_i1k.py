"""MAE pretraining of ViT-H/14 on ImageNet-1k without labels (arXiv 2111.06377).

    python -m big_vit.train --config configs/mae_h14_i1k.py:pod=v5e-256 --workdir gs://BUCKET/mae_h14

The recipe of facebookresearch/mae to the letter: masks, positions, targets, decoder, initial
values, decay of tokens, rate by step; crops are averaged where they shrink, and not Pillow's
bicubic. 1,600 epochs are what the authors' files were trained for; `epochs=800` is the paper's
shorter run. What was published with them: 86.9 % fine-tuned (configs/mae_finetune.py:h14), 76.6 %
by a linear probe (configs/mae_linear.py:h14). Nobody has run it here.
"""

from ml_collections import ConfigDict

# Found by `python -m big_vit.plan --search`; docs/plans/ has the plans.
PODS = {
    # The decoder's kernels are small: they are split too, or each chip would update all of them.
    'v5e-256': {'mesh': {'replica': 16, 'fsdp': 16, 'min_shard_size': 2**17}},
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
                'variant': 'H/14',
                'class_token': True,
                'pool': 'cls',
                'posemb': 'sincos2d_mae',
                'activation': 'gelu',
                'norm_eps': 1e-6,
                'weight_init': 'mae',
                'scan': True,
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
