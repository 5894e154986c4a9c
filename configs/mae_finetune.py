"""Fine-tune a trunk of MAE on ImageNet-1k as facebookresearch/mae does (arXiv 2111.06377).

    python -m big_vit.transfer --config configs/mae_finetune.py:b16,path=DIR \
        --config.init=CHECKPOINT --workdir runs/mae_finetuned

CHECKPOINT is a run of configs/mae_b16_i1k.py (or l16, h14: the first argument) or one of the
authors' files, such as mae_pretrain_vit_base.pth. Positions become trainable, the mean over
patches gets a norm of its own in place of the trunk's last one, and rates fall with each layer
away from the head. For a dataset of yours: `--config.data.name=folder --config.data.path=...`,
and the same for evals.val.

Unlike there, every example is mixed by a share of its own and not whole batches by one, the head
starts at 0, and crops are averaged where they shrink. Scores are of the split that is reported.
"""

from ml_collections import ConfigDict

# Epochs, rate for 256 examples, decay by layer, drop path, and what was published with these.
SIZES = {
    'b16': (100, 5e-4, 0.65, 0.1, '83.57 % ± 0.08, 4 seeds; 83.6 % in the paper'),
    'l16': (50, 1e-3, 0.75, 0.2, '85.87 % ± 0.07, 4 seeds; 85.9 % in the paper'),
    'h14': (50, 1e-3, 0.75, 0.3, '86.93 %; 86.9 % in the paper'),
}
CHOICES = {'size': tuple(SIZES)}


def get_config(size: str = 'b16', path: str = ''):
    epochs, base, decay, drop_path, published = SIZES[size]
    batch_size = 1024
    lr = base * batch_size / 256
    return ConfigDict(
        {
            'total_epochs': epochs,
            'batch_size': batch_size,
            'image_size': 224,
            'lr': lr,
            'mixup': 0.8,
            'cutmix': 1.0,
            'task': {'label_smoothing': 0.1},
            'model': {
                'class_token': True,
                'pool': 'gap',
                'norm_after_pool': True,
                'posemb': 'learned',
                'posemb_prefix': 1,
                'drop_path': drop_path,
            },
            'data': {
                'name': 'tfds',
                'path': path or None,
                'tfds_name': 'imagenet2012',
                'split': 'train',
                'num_classes': 1000,
                'num_examples': 1_281_167,
                'transform': (
                    'rrc(size) | flip_lr | timm_randaug(2, 9, 0.5) | normalize | '
                    'random_erasing(0.25)'
                ),
            },
            'evals': {
                'val': {
                    'split': 'validation',
                    'num_examples': 50_000,
                    'transform': 'resize_small(256) | central_crop(size)',
                }
            },
            'optim': {
                'name': 'adamw',
                'b1': 0.9,
                'b2': 0.999,
                'clip': 0.0,
                'weight_decay': 0.05,
                'layer_decay': decay,
            },
            'schedule': {'warmup_epochs': 5, 'end': 1e-6 / lr},
            # Each of these costs as much again.
            'transfer': {'control': False, 'random_features': False, 'published': published},
        }
    )
