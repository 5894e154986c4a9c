"""I-JEPA of ViT-B/16 on ImageNet-1k without labels (arXiv 2301.08243).

    python -m big_vit.train --config configs/ijepa_b16_i1k.py --workdir gs://BUCKET/ijepa_b16

The rate, decay and momentum of facebookresearch/ijepa's recipes for larger models, with its default
predictor of 6 blocks; it has none for this size. Contexts have one length, that which batches of
128 are cut to there on average, and initial values are those of all models here. A linear probe
reaches 72.9 % after 600 epochs as reported in the paper, which was not checked here. Nobody has run
this config.
"""

from big_vit.recipes import ijepa_h14_i1k


def get_config(epochs: int = 600):
    config = ijepa_h14_i1k.get_config(epochs)
    config.task.predictor_depth = 6
    config.model.variant = 'B/16'
    config.model.remat = 'none'
    return config
