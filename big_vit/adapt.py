"""A checkpoint's parameters made to fit another model: new positions, new head."""

from typing import Any

import numpy as np

from big_vit import checkpoint, trees
from big_vit.config import Config
from big_vit.errors import UserError
from big_vit.models import variants, vit


def _grid(image_size: tuple[int, int], patch_size: Any) -> tuple[int, int]:
    return image_size[0] // patch_size[0], image_size[1] // patch_size[1]


def adapt(
    params: dict[str, Any],
    saved: Config,
    model: vit.ViT,
    image_size: tuple[int, int],
    like: dict[str, Any],
    where: str,
) -> dict[str, Any]:
    """NumPy parameters for `model`: the encoder is kept, the head starts at zero.

    Learned positions are interpolated to the new grid of patches; stacked
    (scanned) and unrolled blocks are converted into each other.

    Args:
      params: parameters as `checkpoint.load_params` gives them.
      saved: the config that they were trained with.
      image_size: (height, width) of the images that `model` will see.
      like: abstract parameters of `model`.
      where: the checkpoint, for messages.

    Raises:
      UserError: names the leaves in which the architectures differ.
    """
    params = vit.stack_blocks(params) if model.scan else vit.unstack_blocks(params)
    flat, wanted = trees.flatten(params), trees.flatten(like)
    if 'pos_embedding' in flat and 'pos_embedding' in wanted:
        old = _grid(saved.image_size, variants.parse(saved.model.variant)['patch_size'])
        new = _grid(image_size, model.patch_size)
        flat['pos_embedding'] = vit.resize_positions(flat['pos_embedding'], old, new)
    for name, leaf in wanted.items():
        if name.startswith('head/'):
            flat[name] = np.zeros(leaf.shape, leaf.dtype)
    channels = [tree['embedding/kernel'].shape[2] for tree in (flat, wanted)]
    if channels[0] != channels[1]:
        raise UserError(
            f'{where} was trained on images of {channels[0]} channel(s), these have {channels[1]}: '
            f'add {"rgb" if channels[0] == 3 else "grayscale"} to data.transform and to the '
            'transform of each of evals'
        )
    adapted = trees.unflatten(flat)
    checkpoint.check_params(adapted, like, where)
    return adapted
