"""Changes that let a peer hold a model without changing what the model computes.

For example, fixed positions become a table, the position of the class token is added to the token,
and biases that a peer always has become zeros. Anything that cannot be expressed this way is an
error.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from big_vit.errors import UserError
from big_vit.interop.layout import Arrays, Shapes
from big_vit.models import positions, stems
from big_vit.models.vit import RUNTIME_SETTINGS, SETTINGS, make_vit, settings_of

Settings = dict[str, Any]

# Other codebases have no such inputs.
_OTHER_INPUTS = ('tubelet', 'vocab', 'posemb_grid')
# Settings that weights decide; the rest (dropout, scan, remat, ...) is the user's choice.
FIELDS = tuple(name for name in SETTINGS if name not in (*RUNTIME_SETTINGS, *_OTHER_INPUTS))
_PLAIN = make_vit(0, (16, 16), 768, 12, 3072, 12)
_DEFAULTS = {name: value for name, value in settings_of(_PLAIN).items() if name in FIELDS}
OF_CLASS_TOKEN = ('cls', 'cls_gap', 'cls_dist')
ATTENTION = 'MultiHeadDotProductAttention_0'


class Model(NamedTuple):
    """Flat parameters with the settings and metadata that give them meaning."""

    params: Arrays
    settings: Settings
    meta: dict[str, Any]

    def with_params(self, params: Mapping[str, np.ndarray], **settings: Any) -> 'Model':
        return self._replace(params=dict(params), settings={**self.settings, **settings})


def complete(settings: Mapping[str, Any]) -> Settings:
    """Fill in the model's defaults for the FIELDS that are not given.

    Raises:
      UserError: a field is unknown.
    """
    unknown = [name for name in settings if name not in FIELDS]
    if unknown:
        raise UserError(f'{unknown[0]} is not a setting of a model; these are: {", ".join(FIELDS)}')
    return {**_DEFAULTS, **settings}


def patch_of(kernel: Sequence[int], resnet: tuple[int, ...] | None) -> tuple[int, int]:
    """Return the patch size in pixels: that of the kernel times the stride of a ResNet stem."""
    stem_stride = 1 if resnet is None else stems.resnet_stride(resnet)
    return kernel[0] * stem_stride, kernel[1] * stem_stride


def kernel_of(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Return the size of the embedding kernel; the inverse of `patch_of`."""
    hybrid = settings['tokenizer'] == 'resnet'
    stem_stride = stems.resnet_stride(settings['resnet']) if hybrid else 1
    return settings['patch_size'][0] // stem_stride, settings['patch_size'][1] // stem_stride


def grid_of(model: Model) -> tuple[int, int]:
    patch = model.settings['patch_size']
    height, width = model.settings['stride'] or patch
    rows, columns = model.meta['image_size']
    return (rows - patch[0]) // height + 1, (columns - patch[1]) // width + 1


def prefix_and_image_size(
    tokens: int | None, prefixes: Sequence[int], settings: Mapping[str, Any], given: Any, where: str
) -> tuple[int, tuple[int, int]]:
    """Derive the prefix rows and the image size from the length of a position table.

    Args:
      tokens: rows of the position table; None if there is no table.
      prefixes: possible numbers of rows before those of the patches, most likely first.
      given: the image size (height, width) if known.

    Returns:
      The number of prefix rows, and the image size (height, width).

    Raises:
      UserError: the patches fit neither the given image size nor any square grid.
    """
    height, width = settings['patch_size']
    if tokens is None:
        return 0, given or (224 // height * height, 224 // width * width)
    for prefix in prefixes:
        patches = tokens - prefix
        if given and (given[0] // height) * (given[1] // width) == patches:
            return prefix, given
        side = math.isqrt(max(patches, 0))
        if not given and side and side * side == patches:
            return prefix, (side * height, side * width)
    size = f'images of {given[0]}x{given[1]}' if given else 'any square image'
    raise UserError(
        f'{where}: its {tokens} positions do not fit patches of {height}x{width} of {size}; say '
        'which: --set image_size=HEIGHT,WIDTH'
    )


def required_shape(shapes: Shapes, kernel: str) -> tuple[int, ...]:
    """Return the shape of a required array.

    Raises:
      UserError: the array is missing.
    """
    if kernel not in shapes:
        raise UserError(f'there is no {kernel} in it, so this is not a ViT of that format')
    return shapes[kernel]


def require(model: Model, to: str, **allowed: Any) -> None:
    """Check settings against the values that a format supports.

    Raises:
      UserError: names the unsupported settings and what would help.
    """
    # What no ViT of another codebase has.
    allowed = {'post_norm': (False,), 'posemb_per_block': (False,), **allowed}
    unsupported = [
        f'{name}={model.settings[name]!r} (it has {" or ".join(map(repr, values))})'
        for name, values in allowed.items()
        if model.settings[name] not in values
    ]
    if not unsupported:
        return
    hints = {
        'num_classes': "--drop 'head.*' leaves the head out",
        'representation': "--drop 'pre_logits.*' leaves that layer out, which changes the model",
        'activation': '--set activation=... accepts what that changes',
        'norm_eps': '--set norm_eps=... accepts what that changes',
    }
    if to.startswith('hf_') and model.settings['pool'] == 'gap' and model.settings['num_classes']:
        hints['pool'] = "--to hf_siglip has 'gap'"
    named = [name for name, values in allowed.items() if model.settings[name] not in values]
    advice = ''.join(f'; {hints[name]}' for name in named if name in hints)
    raise UserError(f'--to {to}: it has no {"; no ".join(unsupported)}{advice}')


def with_position_table(model: Model) -> Model:
    """Replace fixed positions, or none, by a learned table with the same values."""
    settings, kind = model.settings, model.settings['posemb']
    if kind == 'learned':
        return model
    if kind not in (*positions.LAWS, 'none'):
        raise UserError(f'positions of kind {kind!r} cannot be written as a table')
    grid, width = grid_of(model), settings['width']
    if kind == 'none':
        table = np.zeros((1, grid[0] * grid[1], width), np.float32)
    else:
        table = positions.sincos(grid, width, kind)
    return model.with_params(
        {**model.params, 'pos_embedding': table}, posemb='learned', posemb_prefix=0
    )


def with_prefix(model: Model, count: int) -> Model:
    """Give the learned table exactly `count` rows for the tokens before the patches.

    Surplus rows are added to their tokens, which is what the encoder would do with them; missing
    rows become zeros.
    """
    settings = model.settings
    old_count = settings['posemb_prefix']
    if settings['posemb'] != 'learned' or old_count == count:
        return model
    params = dict(model.params)
    table = params['pos_embedding']
    if old_count < count:
        zeros = np.zeros((1, count - old_count, table.shape[2]), table.dtype)
        table = np.concatenate([table[:, :old_count], zeros, table[:, old_count:]], axis=1)
    else:
        tokens = ['cls'] if 'cls' in params else []
        tokens += ['registers'] if 'registers' in params else []
        start = 0
        for name in tokens:
            size = params[name].shape[1]
            # Only the rows that the shorter table has no room for.
            rows = np.arange(start, min(start + size, old_count))
            rows = rows[rows >= count]
            token = params[name].copy()
            token[:, rows - start] += table[:, rows]
            params[name] = token
            start += size
        table = np.concatenate([table[:, :count], table[:, old_count:]], axis=1)
    return model.with_params({**params, 'pos_embedding': table}, posemb_prefix=count)


def with_biases(model: Model) -> Model:
    """Add zero biases where queries, keys and values have none."""
    settings, params = model.settings, dict(model.params)
    if settings['qkv_bias'] and settings['key_bias']:
        return model
    for name, kernel in model.params.items():
        part = name.rpartition('/')[0]
        if part.endswith(tuple(f'{ATTENTION}/{which}' for which in ('query', 'key', 'value'))):
            params.setdefault(f'{part}/bias', np.zeros(kernel.shape[1:], np.float32))
    return model.with_params(params, qkv_bias=True, key_bias=True)


def with_embedding_bias(model: Model) -> Model:
    settings = model.settings
    if settings['embedding_bias']:
        return model
    zeros = np.zeros(settings['width'], np.float32)
    return model.with_params({**model.params, 'embedding/bias': zeros}, embedding_bias=True)


def without_embedding_bias(model: Model) -> Model:
    """Move the bias of the patch embedding into the positions of the patches."""
    if not model.settings['embedding_bias']:
        return model
    params, prefix = dict(model.params), model.settings['posemb_prefix']
    bias = params.pop('embedding/bias')
    if bias.any():
        table = params['pos_embedding'].copy()
        table[:, prefix:] += bias
        params['pos_embedding'] = table
    return model.with_params(params, embedding_bias=False)


def with_layer_scale(model: Model) -> Model:
    """Add LayerScale factors of one where there is no LayerScale."""
    settings = model.settings
    if settings['layer_scale']:
        return model
    params = dict(model.params)
    for i in range(settings['depth']):
        for which in (0, 1):
            name = f'Transformer/encoderblock_{i}/LayerScale_{which}/scale'
            params[name] = np.ones(settings['width'], np.float32)
    return model.with_params(params, layer_scale=1.0)


def with_head_bias(model: Model) -> Model:
    settings = model.settings
    if settings['head_bias'] or not settings['num_classes']:
        return model.with_params(model.params, head_bias=True)
    params = dict(model.params)
    for name in ('head', 'head_dist'):
        if f'{name}/kernel' in params:
            params[f'{name}/bias'] = np.zeros(settings['num_classes'], np.float32)
    return model.with_params(params, head_bias=True)


def without_head_bias(model: Model, to: str) -> Model:
    """Remove a zero bias from the head; raises UserError if the bias is not zero."""
    if not model.settings['head_bias'] or not model.settings['num_classes']:
        return model.with_params(model.params, head_bias=False)
    params = dict(model.params)
    if params.pop('head/bias').any():
        raise UserError(
            f"--to {to}: its projection has no bias, and this head has one; --drop 'head/.*' "
            'leaves the head out'
        )
    return model.with_params(params, head_bias=False)


def without_dropped(model: Model, dropped: Sequence[str]) -> Model:
    """Update the settings after parts behind the encoder were dropped.

    Raises:
      UserError: the model cannot work without a dropped parameter, or only half of a part was
        dropped.
    """
    settings: Settings = {}
    for name in dropped:
        part = name.partition('/')[0]
        if part in ('head', 'head_dist'):
            settings['num_classes'] = 0
        elif part == 'pre_logits':
            settings['representation'] = 0
        else:
            raise UserError(
                f'--drop: a model cannot be without {name}; its head and pre_logits can'
            )
    halves = [name for name in model.params if name.partition('/')[0] in {
        n.partition('/')[0] for n in dropped}]  # fmt: skip
    if halves:
        raise UserError(f'--drop: {halves[0]} is left of a part of which the rest is dropped')
    return model._replace(settings={**model.settings, **settings})
