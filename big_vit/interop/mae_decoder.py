"""MAE's decoder, which some files have beside the encoder.

Those of facebookresearch/mae (`mae_visualize_*`, `*_full`, runs of one's own) and those of
`ViTMAEForPreTraining`. Ours is what `task.name='masked'` adds to a trunk.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from big_vit.errors import UserError
from big_vit.interop import huggingface, layout, timm_vit
from big_vit.interop.layout import Arrays, Row
from big_vit.interop.weights import Learnt
from big_vit.models import positions

_OURS = 'decoder'
# By format: what its arrays are called, one that they cannot be without, its blocks and those of
# the encoder's table, and its table of positions.
_NAMES = {
    'mae': (
        r'mask_token|decoder_.*',
        'decoder_embed.weight',
        ('blocks.{i}.', 'decoder_blocks.{i}.'),
        'decoder_pos_embed',
    ),
    'hf_mae': (
        r'decoder\..*',
        'decoder.decoder_embed.weight',
        ('encoder.layer.{i}.', 'decoder.decoder_layers.{i}.'),
        'decoder.decoder_pos_embed',
    ),
}
# All models of facebookresearch/mae have as many.
_HEADS = 16


def split(format: str, arrays: Arrays) -> tuple[Arrays, Arrays]:
    """The arrays of the encoder, and those of a decoder beside it, if there is one."""
    if format not in _NAMES or _NAMES[format][1] not in arrays:
        return arrays, {}
    beside = {name for name in arrays if re.fullmatch(_NAMES[format][0], name)}
    encoder = {name: array for name, array in arrays.items() if name not in beside}
    return encoder, {_released(name): array for name, array in arrays.items() if name in beside}


def _released(name: str) -> str:
    """The name in transformers 4.x; 5.x has another in memory, and a third in its files."""
    name = re.sub(r'^decoder\.decoder_(encoder\.layer|layers)\.', 'decoder.layers.', name)
    name = huggingface.newer_names('hf_mae', [name]).get(name, name)
    return re.sub(r'^decoder\.(encoder\.layer|layers)\.', 'decoder.decoder_layers.', name)


def _table(format: str) -> list[Row]:
    """Its blocks are laid out as the encoder's are."""
    old, new = _NAMES[format][2]
    rows = timm_vit.block_rows() if format == 'mae' else huggingface.block_rows()
    blocks: list[Row] = []
    for ours, theirs in rows:
        names = f'{_OURS}/{ours}' if isinstance(ours, str) else tuple(f'{_OURS}/{n}' for n in ours)
        blocks.append((names, theirs.replace(old, new)))
    front = 'decoder.' if format == 'hf_mae' else ''
    return [
        (f'{_OURS}/embedding', front + 'decoder_embed.{leaf}'),
        (f'{_OURS}/mask_token', front + 'mask_token'),
        *blocks,
        (f'{_OURS}/Transformer/encoder_norm', front + 'decoder_norm.{leaf}'),
        (f'{_OURS}/prediction', front + 'decoder_pred.{leaf}'),
    ]


def read(
    format: str,
    arrays: Arrays,
    settings: Mapping[str, Any],
    meta: Mapping[str, Any],
    config: Mapping[str, Any],
    where: str,
) -> Learnt:
    """The decoder under our names, and the keys of `task` that describe it.

    Args:
      arrays: as `split` gives them.
      settings, meta: of the encoder.
      config: config.json of Hugging Face, else empty.

    Raises:
      UserError: arrays are missing, of another shape, or no decoder of ours can be the same.
    """
    try:
        return _read(format, dict(arrays), settings, meta, config, where)
    except UserError as error:
        raise UserError(
            f'{error}. To leave out the decoder and mask token of MAE on purpose: '
            f"--drop '{_NAMES[format][0]}'"
        ) from None


def _read(
    format: str,
    arrays: Arrays,
    settings: Mapping[str, Any],
    meta: Mapping[str, Any],
    config: Mapping[str, Any],
    where: str,
) -> Learnt:
    _, sign, (_, block), table = _NAMES[format]
    where = f'{where}: its decoder'
    width = arrays[sign].shape[0]
    heads = config.get('decoder_num_attention_heads', _HEADS)
    if width % heads or not positions.divides(width, 2):
        raise UserError(f'{where} has a width of {width}, which are not {heads} heads')
    depth = layout.depth_of(arrays, re.escape(block).replace(r'\{i\}', r'(\d+)'), where)
    first = '0.mlp.fc1.weight' if format == 'mae' else '0.intermediate.dense.weight'
    hidden = next((x.shape[0] for n, x in arrays.items() if n.endswith(first)), 4 * width)
    if hidden != 4 * width:
        raise UserError(f'{where} has MLPs of {hidden}, and here they are four times its width')
    _check_positions(arrays.pop(table, None), settings, meta, where)
    sizes = {'width': width, 'depth': depth, 'mlp_dim': hidden, 'num_heads': heads}
    whole = layout.shapes_of({**settings, **sizes, 'num_classes': 0, 'representation': 0}, meta)
    blocks = {f'{_OURS}/{n}': s for n, s in whole.items() if n.startswith('Transformer/')}
    rows, columns = settings['patch_size']
    pixels = rows * columns * meta['channels']
    shapes = {
        f'{_OURS}/embedding/kernel': (settings['width'], width),
        f'{_OURS}/embedding/bias': (width,),
        f'{_OURS}/mask_token': (1, 1, width),
        **blocks,
        f'{_OURS}/Transformer/encoder_norm/scale': (width,),
        f'{_OURS}/Transformer/encoder_norm/bias': (width,),
        f'{_OURS}/prediction/kernel': (width, pixels),
        f'{_OURS}/prediction/bias': (pixels,),
    }
    rules = layout.torch_rules(_table(format), shapes, depth=depth)
    layout.check(rules, arrays, where)
    task = {'decoder_width': width, 'decoder_depth': depth, 'decoder_heads': heads}
    if 'norm_pix_loss' in config:
        task['normalise_pixels'] = bool(config['norm_pix_loss'])
    return Learnt({'name': 'masked', **task}, layout.to_ours(rules, arrays))


def _check_positions(
    table: np.ndarray | None, settings: Mapping[str, Any], meta: Mapping[str, Any], where: str
) -> None:
    """Refuses positions other than MAE's fixed ones, which ours has."""
    if table is None:
        return
    grid = tuple(n // p for n, p in zip(meta['image_size'], settings['patch_size'], strict=True))
    fixed = positions.sincos(grid, table.shape[-1], 'sincos2d_mae')
    wanted = np.concatenate([np.zeros_like(fixed[:, :1]), fixed], axis=1)
    if table.shape != wanted.shape or np.abs(table - wanted).max() > 1e-2:
        raise UserError(f"{where} has positions of its own, not MAE's fixed ones")
