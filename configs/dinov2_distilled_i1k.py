"""DINOv2's distillation on ImageNet-1k: a small ViT learns from a large frozen one with its heads.

    python -m big_vit.train --config configs/dinov2_distilled_i1k.py:variant=S/16 \
        --config.task.teacher=gs://BUCKET/dinov2_l16 --workdir gs://BUCKET/dinov2_s16

The teacher is a run of configs/dinov2_l16_i1k.py, or of another config of the same task with as
many prototypes, and is not saved again. As in arXiv 2304.07193 (section 5) the rest is that recipe,
but for the student's patches, of which none is hidden, and its blocks, of which none is left out;
what is kept is an average of the student. Its momentum is that of facebookresearch/dinov3. Patch
losses are of the patches that would have been hidden, as in that code: for all of them, which is
how the paper puts it, set task.mask_probability=1 and task.mask_ratios=(1, 1).

Published are only students of larger teachers and other data (LVD-142M, ViT-g/14: by 20 nearest
neighbours 79.0 % for S/14, 82.1 % for B/14, 83.5 % for L/14). Nobody has run this config.
"""

from big_vit.recipes import dinov2_l16_i1k


def get_config(path: str = '', pod: str = '', blur: str = 'trained', variant: str = 'S/16'):
    config = dinov2_l16_i1k.get_config(path, pod, blur)
    config.model.variant = variant
    config.model.drop_path = 0.0
    config.task.teacher = 'RUN'
    config.task.momentum = (0.994, 1.0)
    return config
