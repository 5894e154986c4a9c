"""Linear probe of a trunk of MAE on ImageNet-1k as facebookresearch/mae makes it.

    python -m big_vit.transfer --config configs/mae_linear.py:b16,path=DIR \
        --config.init=CHECKPOINT --workdir runs/mae_linear

CHECKPOINT is a run of configs/mae_b16_i1k.py (or l16, h14: the first argument) or one of the
authors' files, such as mae_pretrain_vit_base.pth. The class token after the last norm is
classified.

There a BatchNorm without scale and offset stands before the head. Its statistics are estimates,
batch by batch, of the mean and deviation of frozen features, which do not change; so here they
are measured once, over the first images of training, and folded into the trunk's last norm
(`init_standardise`): the same model in training and in evaluation, on any mesh, and any codebase
can load it. What is not the same is the noise of a batch's statistics, 0.8 % of a deviation at
16,384 examples. The head starts at 0, and LARS takes its weights as N(0, 0.01) where they are
smaller, with which it starts there. Crops are `rrc`, which retries where theirs clamps, averaged
where they shrink.
"""

from ml_collections import ConfigDict

# Epochs, and what was published with them: in the paper, and by the authors' code in PyTorch.
SIZES = {
    'b16': (90, '68.0 % in the paper, 67.8 % by the code'),
    'l16': (50, '75.8 % in the paper, 76.0 % by the code'),
    'h14': (50, '76.6 % in the paper, 77.2 % by the code'),
}
CHOICES = {'size': tuple(SIZES)}


def get_config(size: str = 'b16', path: str = ''):
    epochs, published = SIZES[size]
    batch_size = 16_384
    return ConfigDict(
        {
            'total_epochs': epochs,
            'batch_size': batch_size,
            'image_size': 224,
            'lr': 0.1 * batch_size / 256,
            'init_standardise': True,
            'model': {'pool': 'cls'},
            'data': {
                'name': 'tfds',
                'path': path or None,
                'tfds_name': 'imagenet2012',
                'split': 'train',
                'num_classes': 1000,
                'num_examples': 1_281_167,
                'transform': 'rrc(size) | flip_lr | normalize',
            },
            'evals': {
                'val': {
                    'split': 'validation',
                    'num_examples': 50_000,
                    'transform': 'resize_small(256) | central_crop(size)',
                }
            },
            'optim': {
                'name': 'lars',
                'momentum': 0.9,
                'rate_in_momentum': False,
                'clip': 0.0,
            },
            'schedule': {'warmup_epochs': 10},
            'transfer': {
                'train': 'head',
                'control': False,
                'random_features': False,
                'published': published,
            },
        }
    )
