"""NumPy archives of google-research: vit_jax and AugReg (before and after Linen), big_vision.

Their names are ours but for the numbers of a block's parts, the place of the position table, and
what a training state puts before them. Where a block is scanned its arrays are stacked.
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
# What comes before the parameters in the file of a whole training state.
PREFIXES = ('params/', 'opt/target/')
_OLD = {
    '/LayerNorm_1/': '/LayerNorm_2/',
    '/MultiHeadDotProductAttention_0/': '/MultiHeadDotProductAttention_1/',
    '/MlpBlock_0/': '/MlpBlock_3/',
}
_GROUP_NORM = re.compile(r'(.*/)?gn\w*/(scale|bias)')
_POSITIONS = 'Transformer/posembed_input/pos_embedding'


def recognises(names: Any) -> str | None:
    """'augreg', 'big_vision' or None."""
    names = list(names)
    if any('MlpBlock_3/' in name or name.endswith(_POSITIONS) for name in names):
        return 'augreg'
    return 'big_vision' if any('Transformer/encoderblock' in name for name in names) else None


def unwrapped(arrays: Arrays, tower: str, where: str) -> tuple[Arrays, dict[str, Any]]:
    """(The parameters of one model, blocks one by one; how they were in the file).

    Args:
      tower: the part of a model of several, as 'img'; '' for all.

    Raises:
      UserError: there is no such part, or there are several and none was asked for.
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
    kept = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
    stacked = any(name.startswith('Transformer/encoderblock/') for name in kept)
    layout = {
        'prefix': prefix,
        'old': any('/MlpBlock_3/' in name for name in kept),
        'posembed_input': _POSITIONS in kept,
        'scan': stacked,
        'gn4': any(_GROUP_NORM.fullmatch(n) and a.ndim == 4 for n, a in kept.items()),
    }
    return (_unstacked(kept) if stacked else kept), layout


def wrapped(arrays: Mapping[str, np.ndarray], layout: Mapping[str, Any]) -> Arrays:
    """The opposite of `unwrapped`."""
    arrays = dict(arrays)
    if layout['scan']:
        arrays = _stacked(arrays)
    return {layout['prefix'] + name: array for name, array in arrays.items()}


def _unstacked(arrays: Arrays) -> Arrays:
    found: Arrays = {}
    for name, array in arrays.items():
        rest = name.removeprefix('Transformer/encoderblock/')
        if rest == name:
            found[name] = array
            continue
        for i, part in enumerate(array):
            found[f'Transformer/encoderblock_{i}/{rest}'] = part
    return found


def _stacked(arrays: Arrays) -> Arrays:
    parts: dict[str, list[np.ndarray]] = {}
    found: Arrays = {}
    for name, array in arrays.items():
        block = re.match(r'Transformer/encoderblock_\d+/', name)
        if block:
            rest = name.removeprefix(block[0])
            parts.setdefault(f'Transformer/encoderblock/{rest}', []).append(array)
        else:
            found[name] = array
    return found | {name: np.stack(each) for name, each in parts.items()}


def settings_of(
    format: str, shapes: Shapes, layout: Mapping[str, Any], given: Mapping[str, Any], where: str
) -> tuple[Settings, dict[str, Any]]:
    """Fields and metadata, which these files do not tell but by their shapes."""
    depth = depth_of(shapes, r'Transformer/encoderblock_(\d+)/', where)
    block = 'Transformer/encoderblock_0'
    attention, mlp = ('_1', '_3') if layout['old'] else ('_0', '_0')
    query = fit.sizes(shapes, f'{block}/MultiHeadDotProductAttention{attention}/query/kernel')
    width, heads, head_dim = query
    *patch, _, _ = fit.sizes(shapes, 'embedding/kernel')
    hybrid = 'conv_root/kernel' in shapes
    units = _units(shapes) if hybrid else None
    settings: Settings = {
        'patch_size': fit.patch_of(patch, units),
        'width': width,
        'depth': depth,
        'mlp_dim': fit.sizes(shapes, f'{block}/MlpBlock{mlp}/Dense_0/kernel')[1],
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
    # In the first layout the class token has a position; in big_vision's it has not.
    prefixes = ((1, 0) if layout['posembed_input'] else (0, 1)) if 'cls' in shapes else (0,)
    tokens = table[1] if table else None
    prefix, size = fit.placed(tokens, prefixes, settings, given.get('image_size'), where)
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
    found = {m.groups() for n in shapes if (m := re.match(r'block(\d+)/unit(\d+)/', n))}
    stages = max((int(stage) for stage, _ in found), default=0)
    return tuple(sum(int(stage) == s + 1 for stage, _ in found) for s in range(stages))


def rules_of(shapes: Shapes, layout: Mapping[str, Any]) -> list[Rule]:
    """The rules for parameters of ours with these shapes."""
    rules = []
    for name, each in shapes.items():
        theirs, shape = name.removeprefix('stem/'), each
        if layout['old'] and name.startswith('Transformer/encoderblock'):
            for ours, old in _OLD.items():
                theirs = theirs.replace(ours, old)
        if name == 'pos_embedding' and layout['posembed_input']:
            theirs = _POSITIONS
        if layout['gn4'] and _GROUP_NORM.fullmatch(name):
            shape = (1, 1, 1, *each)
        rules.append(identity(name, theirs, each, shape))
    return rules


def fitted(format: str, model: Model) -> tuple[Model, dict[str, Any]]:
    """(The model as the format can hold it, how it will be in the file).

    Raises:
      UserError: it cannot hold it.
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
        model = fit.learned(model)
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
