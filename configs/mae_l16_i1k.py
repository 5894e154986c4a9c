"""MAE pretraining of ViT-L/16 on ImageNet-1k without labels (arXiv 2111.06377).

    python -m big_vit.train --config configs/mae_l16_i1k.py:pod=v5e-256 --workdir gs://BUCKET/mae_l16

The recipe of facebookresearch/mae to the letter: masks, positions, targets, decoder, initial
values, decay of tokens, rate by step; crops are averaged where they shrink, and not Pillow's
bicubic. 1,600 epochs are what the authors' files were trained for; `epochs=800` is the paper's
shorter run. What was published with them: 85.9 % fine-tuned (configs/mae_finetune.py:l16), 75.8 %
by a linear probe (configs/mae_linear.py:l16). Nobody has run it here.
"""

from big_vit.recipes import mae_b16_i1k


def get_config(pod: str = '', epochs: int = 1600):
    config = mae_b16_i1k.get_config(pod, epochs)
    config.model.variant = 'L/16'
    return config
