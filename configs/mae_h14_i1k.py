"""MAE pretraining of ViT-H/14 on ImageNet-1k without labels (arXiv 2111.06377).

    python -m big_vit.train --config configs/mae_h14_i1k.py:pod=v5e-256 --workdir gs://BUCKET/mae_h14

The recipe of facebookresearch/mae to the letter: masks, positions, targets, decoder, initial
values, decay of tokens, rate by step; crops are averaged where they shrink, and not Pillow's
bicubic. 1,600 epochs are what the authors' files were trained for; `epochs=800` is the paper's
shorter run. What was published with them: 86.9 % fine-tuned (configs/mae_finetune.py:h14), 76.6 %
by a linear probe (configs/mae_linear.py:h14). Nobody has run it here.
"""

from big_vit.recipes import mae_b16_i1k


def get_config(pod: str = '', epochs: int = 1600):
    config = mae_b16_i1k.get_config(pod, epochs)
    config.model.variant = 'H/14'
    config.model.scan = True  # 32 unrolled blocks take long to compile.
    return config
