"""Linear segmentation of ADE20K on a frozen trunk, as DINOv2 makes it (arXiv 2304.07193).

    python -m big_vit.train --config configs/vit_seg_ade20k.py:s14,path=DIR \
        --config.init=CHECKPOINT --workdir runs/ade20k

DIR is ADEChallengeData2016 of the challenge's own archive, with `images`, `annotations` and
`objectInfo150.txt`.
CHECKPOINT is a run that learned without labels, or a released file: `dinov2_vits14_pretrain.pth`
for s14, `dinov2_vitb14_pretrain.pth` for b14, `dinov2_vitl14_pretrain.pth` for l14. Published with
these: 44.3, 47.3 and 47.7 % mean IoU (one scale); they have not been reproduced here. What differs:

* Where theirs has a BatchNorm before the linear layer there is a LayerNorm, which needs no
  statistics of a batch, so that a picture is learned from and scored alike on any mesh.
* Pictures are 518 pixels, 37 patches of 14, where theirs are 512, which are padded to 518.
* Random sizes come from `large_scale_jitter` of half to twice the canvas, by the longer side;
  theirs take the shorter one. Colours are jittered by `color_jitter`, without their random order.

`multiscale=true` scores six scales with mirror images, as their `+ms` does, which takes the last
four blocks.

`head=mask` learns a mask transformer in place of the linear layer, and the trunk with it (EoMT,
arXiv 2503.19108; published 58.4 % for DINOv2 L/14). There all of the last blocks that see queries
learn at the full rate, here the decay by layers begins at the last one; the rate falls on a line,
theirs by a power of 0.9; and trunk and heads are warmed up together.
"""

from ml_collections import ConfigDict

# Variant, and the published mean IoU of the linear head.
SIZES = {'s14': ('S/14', '44.3 %'), 'b14': ('B/14', '47.3 %'), 'l14': ('L/14', '47.7 %')}
CHOICES = {'size': tuple(SIZES), 'head': ('linear', 'mask')}
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


HEADS: dict[str, dict] = {
    'linear': {
        'lr': 1e-3,
        'optim': {
            'weight_decay': 1e-4,
            # The trunk is frozen.
            'lr_rules': (('decode_head/.*', 1.0), ('.*', 0.0)),
        },
    },
    'mask': {'lr': 1e-4, 'optim': {'weight_decay': 0.05, 'layer_decay': 0.8}},
}


def get_config(size: str = 's14', path: str = '', multiscale: bool = False, head: str = 'linear'):
    variant, published = SIZES[size]
    crop, steps, own = 518, 40_000, HEADS[head]
    task: dict = {'name': 'segmentation', 'head': head}
    if head == 'linear':
        task['last_blocks'] = 4 if multiscale else 1
    seen = {'scales': SCALES, 'flips': True} if multiscale else {}
    return ConfigDict(
        {
            'total_steps': steps,
            'batch_size': 16,
            'image_size': crop,
            'lr': own['lr'],
            'task': task,
            'model': {
                'variant': variant,
                'class_token': True,
                'pool': 'cls',
                'posemb': 'learned',
                'posemb_prefix': 1,
                'activation': 'gelu',
                'layer_scale': 1e-5,
                'dtype': 'float32',
                'scan': head == 'linear',
            },
            'data': {
                'name': 'segmentation',
                'path': path or None,
                'split': 'training',
                'num_examples': 20_210,
                'num_classes': 150,
                'transform': (
                    'flip_lr | large_scale_jitter(size, scale=(0.5, 2.0)) | '
                    'color_jitter(0.125, 0.5, 0.5, 0.07) | normalize'
                ),
            },
            'evals': {
                'val': {
                    'type': 'segmentation',
                    'split': 'validation',
                    'num_examples': 2_000,
                    'transform': (f'resize_short({crop}, most=1400) | pad_to(1400) | normalize'),
                    'stride': 341,
                    'every_percent': 25,
                    **seen,
                }
            },
            'optim': {
                'name': 'adamw',
                'b1': 0.9,
                'b2': 0.999,
                'clip': 0.0,
                **own['optim'],
            },
            # Linearly to 0, with a warm-up from a millionth.
            'schedule': {'name': 'linear', 'warmup_steps': 1_500},
            'transfer': {'published': published if head == 'linear' else None},
        }
    )
