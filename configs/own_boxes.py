"""Find objects in your own pictures: a folder with boxes as COCO, Pascal VOC or YOLO have them.

    python -m big_vit.train --config configs/own_boxes.py:path=PHOTOS --workdir runs/boxes

PHOTOS has a data.yaml (YOLO). For others say format=coco or format=voc; docs/data.md has their
folders. Classes come from the data. By default a small model learns from nothing on a laptop, five
minutes on two CPU cores. That is to see how it goes: after 40 pictures of two things it came to an
AP50 of 0.24 on ten others, with boxes near the things and wrong ones beside. Detectors like this
want many pictures, or pretrained weights and a GPU:

    python -m big_vit.train --config configs/own_boxes.py:path=PHOTOS,start=dinov2 \\
        --config.init=dinov2_vits14_pretrain.pth --workdir runs/boxes

Other arguments:

* start: whose weights --config.init names: own (a run of this package whose model has the settings
  of configs/unlabelled.py, and so learns without labels from the same pictures), mae, dinov2 or
  dinov3. The model gets its settings, and the trunk a tenth of the rate.
* frozen: the trunk stays as it is, and its decoder alone learns; with `start`.
* variant, size: of the model, and pixels of the longer side. By default small for a laptop; with
  the start mae B/16 and 512, dinov2 S/14 and 518, dinov3 S/16 and 512.
* split=train, val=val: what is learned from, and what is scored. Without pictures of their own for
  this: split=train[:80%],val=train[80%:].
* queries=20: at least as many as the most objects in one picture.
* steps=1500, batch=16. Large trunks want fewer pictures at once, and a GPU more steps.
"""

from ml_collections import ConfigDict

from big_vit.recipes.unlabelled import LAPTOP, MODELS

CHOICES = {
    'format': ('yolo', 'coco', 'voc'),
    'start': ('', 'own', 'mae', 'dinov2', 'dinov3'),
}
# Of a model that learns from nothing: a convolutional stem sees edges after few pictures.
SMALL = {'variant': 'mu/16', 'width': 128, 'depth': 4, 'num_heads': 4, 'mlp_dim': 256}
# Variant and pixels of the released weights that are the smallest.
RELEASED = {'mae': ('B/16', 512), 'dinov2': ('S/14', 518), 'dinov3': ('S/16', 512)}
# What the task adds to a trunk.
ADDED = '(decoder|class_head|box_head)/.*'


def model_of(start: str, variant: str) -> dict:
    """Settings of the trunk."""
    if start == 'own':
        named = {'variant': variant} if variant else LAPTOP
        return {**named, **MODELS[''], 'pool': 'cls'}
    if start:
        return {'variant': variant or RELEASED[start][0], **MODELS[start], 'pool': 'cls'}
    named = {'variant': variant} if variant else SMALL
    return {**named, 'scan': False, 'tokenizer': 'conv', 'posemb': 'sincos2d'}


def get_config(
    path: str = 'PHOTOS',
    format: str = 'yolo',
    split: str = 'train',
    val: str = 'val',
    start: str = '',
    frozen: bool = False,
    variant: str = '',
    size: int = 0,
    queries: int = 20,
    steps: int = 1500,
    batch: int = 16,
):
    released = start in RELEASED
    size = size or (RELEASED[start][1] if released else 128)
    return ConfigDict(
        {
            'total_steps': steps,
            'batch_size': batch,
            'image_size': size,
            'lr': 1e-4 if released else 3e-3,
            'task': {
                'name': 'detection',
                'queries': queries,
                'decoder_width': 256 if released else 128,
                'decoder_depth': 6 if released else 3,
                'decoder_heads': 8 if released else 4,
            },
            'model': model_of(start, variant),
            'data': {
                'name': format,
                'path': path,
                'split': split,
                # Each picture at half to one and a half times its size, anywhere on the canvas.
                'transform': (
                    'flip_lr | large_scale_jitter(size, scale=(0.5, 1.5))'
                    ' | color_jitter(0.3, 0.3, 0.2, 0.05, p=0.8)'
                    f' | boxes({queries}) | normalize'
                ),
            },
            'evals': {
                'val': {
                    'type': 'detection',
                    'split': val,
                    'transform': (
                        f'resize_long({size}) | pad_to(size) | boxes({queries}) | normalize'
                    ),
                    'per_class': 'all',
                    'every_percent': 20,
                }
            },
            'optim': {
                'name': 'adamw' if released else 'muon',
                'clip': 0.1 if released else 1.0,
                **({'lr_rules': ((ADDED, 1.0), ('.*', 0.0 if frozen else 0.1))} if start else {}),
            },
            'schedule': {'warmup_percent': 10},
        }
    )
