"""I-JEPA's predictor, which files of facebookresearch/ijepa have beside both encoders.

Ours is what `task.name='joint_embedding'` adds to a trunk with `task.method='ijepa'`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from big_vit.errors import UserError
from big_vit.interop import layout, timm_vit
from big_vit.interop.files import Sections
from big_vit.interop.layout import Arrays, Row
from big_vit.interop.weights import Learnt
from big_vit.models import positions

_OURS, _THEIRS, _TABLE = 'predictor', 'predictor', 'predictor_pos_embed'


def beside(sections: Sections, encoder: str, prefix: str) -> Arrays:
    """The arrays of the predictor in a file; {} without one.

    Args:
      encoder: the section of the encoder.
      prefix: what is in front of the names of all modules.
    """
    place, dot, _ = encoder.rstrip('.').rpartition('.')
    for name in (f'{place}{dot}{_THEIRS}', f'{place}{dot}{_THEIRS}.'):
        if name in sections:
            return {key.removeprefix(prefix): get() for key, get in sections[name].items()}
    return {}


def _rows() -> list[Row]:
    """Its blocks are laid out as the encoder's are."""
    blocks: list[Row] = []
    for ours, theirs in timm_vit.block_rows():
        names = f'{_OURS}/{ours}' if isinstance(ours, str) else tuple(f'{_OURS}/{n}' for n in ours)
        blocks.append((names, theirs.replace('blocks.{i}.', 'predictor_blocks.{i}.')))
    return [
        (f'{_OURS}/embedding', 'predictor_embed.{leaf}'),
        (f'{_OURS}/mask_token', 'mask_token'),
        *blocks,
        (f'{_OURS}/Transformer/encoder_norm', 'predictor_norm.{leaf}'),
        (f'{_OURS}/prediction', 'predictor_proj.{leaf}'),
    ]


def read(
    arrays: Arrays, settings: Mapping[str, Any], meta: Mapping[str, Any], where: str
) -> Learnt:
    """The predictor under our names, and the keys of `task` that describe it.

    Args:
      arrays: as `beside` gives them.
      settings, meta: of the encoder, which has as many heads.

    Raises:
      UserError: arrays are missing, of another shape, or no predictor of ours can be the same.
    """
    where, arrays = f'{where}: its predictor', dict(arrays)
    embedding = arrays.get('predictor_embed.weight', np.zeros((0, 0)))
    width, heads = embedding.shape[0], settings['num_heads']
    if not width or width % heads or not positions.divides(width, 2):
        raise UserError(f'{where} has a width of {width}, which are not {heads} heads')
    depth = layout.depth_of(arrays, r'predictor_blocks\.(\d+)\.', where)
    table = arrays.pop(_TABLE, None)
    grid = tuple(n // p for n, p in zip(meta['image_size'], settings['patch_size'], strict=True))
    fixed = positions.sincos(grid, width, 'sincos2d_mae')
    if table is not None and (table.shape != fixed.shape or np.abs(table - fixed).max() > 1e-2):
        raise UserError(f"{where} has positions of its own, not I-JEPA's fixed ones")
    sizes = {'width': width, 'depth': depth, 'mlp_dim': 4 * width, 'num_heads': heads}
    whole = layout.shapes_of({**settings, **sizes, 'num_classes': 0, 'representation': 0}, meta)
    shapes = {
        f'{_OURS}/embedding/kernel': (settings['width'], width),
        f'{_OURS}/embedding/bias': (width,),
        f'{_OURS}/mask_token': (1, 1, width),
        **{f'{_OURS}/{n}': s for n, s in whole.items() if n.startswith('Transformer/')},
        f'{_OURS}/prediction/kernel': (width, settings['width']),
        f'{_OURS}/prediction/bias': (settings['width'],),
    }
    rules = layout.torch_rules(_rows(), shapes, depth=depth)
    layout.check(rules, arrays, where)
    task = {'method': 'ijepa', 'predictor_width': width, 'predictor_depth': depth}
    return Learnt({'name': 'joint_embedding', **task}, layout.to_ours(rules, arrays))
