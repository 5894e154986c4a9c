"""NumPy archives of google-research: vit_jax and AugReg (before and after Linen), big_vision.

Their names match ours except for the numbering of a block's parts, the place of the position table
and the prefix in a training state. Scanned blocks are stored stacked along axis 0.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from big_vit.errors import UserError
from big_vit.interop import fit
from big_vit.interop.fit import Model, Settings
from big_vit.interop.layout import Arrays, Rule, Shapes, depth_of, identity

FORMATS = ('augreg', 'big_vision')
# Prefixes of the parameters in the file of a full training state.
PREFIXES = ('params/', 'opt/target/')
_OLD = {
    '/LayerNorm_1/': '/LayerNorm_2/',
    '/MultiHeadDotProductAttention_0/': '/MultiHeadDotProductAttention_1/',
    '/MlpBlock_0/': '/MlpBlock_3/',
}
_GROUP_NORM = re.compile(r'(.*/)?gn\w*/(scale|bias)')
_POSITIONS = 'Transformer/posembed_input/pos_embedding'


def recognises(names: Any) -> str | None:
    """Return 'augreg', 'big_vision' or None."""
    names = list(names)
    if any('MlpBlock_3/' in name or name.endswith(_POSITIONS) for name in names):
        return 'augreg'
    return 'big_vision' if any('Transformer/encoderblock' in name for name in names) else None


def unwrapped(arrays: Arrays, tower: str, where: str) -> tuple[Arrays, dict[str, Any]]:
    """Extract the parameters of one model, with one set of arrays per block.

    Args:
      tower: the part of a multi-tower model, such as 'img'; '' for a file with a single model.

    Returns:
      The parameters, and their layout in the file for `wrapped`.

    Raises:
      UserError: there is no such tower, or there are several and none was chosen.
    """
    prefix = next((p for p in PREFIXES if any(name.startswith(p) for name in arrays)), '')
    inner = {n.removeprefix(prefix) for n in arrays if n.startswith(prefix)}
    if tower and not any(name.startswith(f'{tower}/') for name in inner):
        heads = sorted({name.partition('/')[0] for name in inner})
        raise UserError(f'{where}: there is no {tower!r} in it; there are {", ".join(heads[:8])}')
    if not tower:
        inside = {n.partition('/')[0] for n in inner if re.match(r'\w+/Transformer/', n)}
        if inside:
            raise UserError(
                f'{where}: holds several models ({", ".join(sorted(inside))}); say which one: '
                f'{where}:{sorted(inside)[0]}'
            )
    prefix += f'{tower}/' if tower else ''
    params = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
    stacked = any(name.startswith('Transformer/encoderblock/') for name in params)
    layout = {
        'prefix': prefix,
        'old': any('/MlpBlock_3/' in name for name in params),
        'posembed_input': _POSITIONS in params,
        'scan': stacked,
        'gn4': any(_GROUP_NORM.fullmatch(n) and a.ndim == 4 for n, a in params.items()),
    }
    return (_unstacked(params) if stacked else params), layout


def wrapped(arrays: Mapping[str, np.ndarray], layout: Mapping[str, Any]) -> Arrays:
    """Restore the layout in the file; the inverse of `unwrapped`."""
    arrays = dict(arrays)
    if layout['scan']:
        arrays = _stacked(arrays)
    return {layout['prefix'] + name: array for name, array in arrays.items()}


def _unstacked(arrays: Arrays) -> Arrays:
    unstacked: Arrays = {}
    for name, array in arrays.items():
        rest = name.removeprefix('Transformer/encoderblock/')
        if rest == name:
            unstacked[name] = array
            continue
        for i, block_array in enumerate(array):
            unstacked[f'Transformer/encoderblock_{i}/{rest}'] = block_array
    return unstacked


def _stacked(arrays: Arrays) -> Arrays:
    parts: dict[str, list[np.ndarray]] = {}
    stacked: Arrays = {}
    for name, array in arrays.items():
        block = re.match(r'Transformer/encoderblock_\d+/', name)
        if block:
            rest = name.removeprefix(block[0])
            parts.setdefault(f'Transformer/encoderblock/{rest}', []).append(array)
        else:
            stacked[name] = array
    return stacked | {name: np.stack(blocks) for name, blocks in parts.items()}


def settings_of(
    format: str, shapes: Shapes, layout: Mapping[str, Any], given: Mapping[str, Any], where: str
) -> tuple[Settings, dict[str, Any]]:
    """Derive settings and metadata from the shapes, as these files have no config."""
    depth = depth_of(shapes, r'Transformer/encoderblock_(\d+)/', where)
    block = 'Transformer/encoderblock_0'
    attention, mlp = ('_1', '_3') if layout['old'] else ('_0', '_0')
    query = fit.required_shape(
        shapes, f'{block}/MultiHeadDotProductAttention{attention}/query/kernel'
    )
    width, heads, head_dim = query
    *patch, _, _ = fit.required_shape(shapes, 'embedding/kernel')
    hybrid = 'conv_root/kernel' in shapes
    units = _units(shapes) if hybrid else None
    settings: Settings = {
        'patch_size': fit.patch_of(patch, units),
        'width': width,
        'depth': depth,
        'mlp_dim': fit.required_shape(shapes, f'{block}/MlpBlock{mlp}/Dense_0/kernel')[1],
        'num_heads': heads,
        'head_dim': None if heads * head_dim == width else head_dim,
        'embedding_bias': 'embedding/bias' in shapes,
        'class_token': 'cls' in shapes,
        'num_classes': shapes.get('head/kernel', (0, 0))[1],
        'head_bias': 'head/bias' in shapes or 'head/kernel' not in shapes,
        'representation': shapes.get('pre_logits/kernel', (0, 0))[1],
        'activation': 'gelu_tanh',
        'norm_eps': 1e-6,
    }
    if hybrid:
        settings |= {'tokenizer': 'resnet', 'resnet': units}
    settings['pool'] = 'map' if 'MAPHead_0/probe' in shapes else 'cls' if 'cls' in shapes else 'gap'
    table = shapes.get(_POSITIONS) or shapes.get('pos_embedding')
    # AugReg's table has a row for the class token; big_vision adds the token after the positions.
    prefixes = ((1, 0) if layout['posembed_input'] else (0, 1)) if 'cls' in shapes else (0,)
    tokens = table[1] if table else None
    prefix, size = fit.prefix_and_image_size(
        tokens, prefixes, settings, given.get('image_size'), where
    )
    settings |= {'posemb': 'learned' if table else 'sincos2d', 'posemb_prefix': prefix}
    channels = shapes['conv_root/kernel' if hybrid else 'embedding/kernel'][2]
    meta = {
        'image_size': size,
        'channels': channels,
        'mean': (0.5,) * channels,
        'std': (0.5,) * channels,
    }
    return settings, meta


def _units(shapes: Shapes) -> tuple[int, ...]:
    stage_and_unit = {m.groups() for n in shapes if (m := re.match(r'block(\d+)/unit(\d+)/', n))}
    stages = max((int(stage) for stage, _ in stage_and_unit), default=0)
    return tuple(sum(int(stage) == s + 1 for stage, _ in stage_and_unit) for s in range(stages))


def rules_of(shapes: Shapes, layout: Mapping[str, Any]) -> list[Rule]:
    """Return the rules that map our parameters of these shapes to the file."""
    rules = []
    for name, our_shape in shapes.items():
        theirs, their_shape = name.removeprefix('stem/'), our_shape
        if layout['old'] and name.startswith('Transformer/encoderblock'):
            for ours, old in _OLD.items():
                theirs = theirs.replace(ours, old)
        if name == 'pos_embedding' and layout['posembed_input']:
            theirs = _POSITIONS
        if layout['gn4'] and _GROUP_NORM.fullmatch(name):
            their_shape = (1, 1, 1, *our_shape)
        rules.append(identity(name, theirs, our_shape, their_shape))
    return rules


def convert(format: str, model: Model) -> tuple[Model, dict[str, Any]]:
    """Convert the model to one that the format can hold.

    Returns:
      The converted model, and its layout in the file.

    Raises:
      UserError: the format cannot hold it.
    """
    fit.require(
        model, format, norm=('layernorm',), norm_eps=(1e-6,), activation=('gelu_tanh',),
        mlp=('mlp',), parallel=(False,), qk_norm=(False,), layer_scale=(0.0,), registers=(0,),
        pre_norm=(False,), norm_after_pool=(False,), lsa=(False,), stride=(None,),
        posemb=('learned', 'sincos2d', 'sincos2d_mae', 'none'), tokenizer=('patches', 'resnet'),
        pool=('cls', 'gap', 'map'),
    )  # fmt: skip
    has_class = 'cls' in model.params
    if has_class and model.settings['pool'] != 'cls':
        raise UserError(
            f'--to {format}: with pool={model.settings["pool"]!r} it has no class token'
        )
    old = format == 'augreg'
    if old or model.settings['posemb'] != 'sincos2d':
        model = fit.with_position_table(model)
    model = fit.with_prefix(model, int(old and has_class))
    for change in (fit.with_biases, fit.with_embedding_bias, fit.with_head_bias):
        model = change(model)
    layout = {
        'prefix': '' if old else 'params/',
        'old': old,
        'posembed_input': old,
        'scan': False,
        'gn4': False,
    }
    return model, layout
