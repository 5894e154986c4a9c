"""timm's format, and the PyTorch releases that it grew from: MAE, DeiT-III, DINOv2, I-JEPA.

A folder has model.safetensors and config.json; `timm.create_model('local-dir:PATH',
pretrained=True)` reads it. The name of the architecture determines what arrays do not reveal: the
epsilon of the norms, the activation, the number of heads and the pooling. The .pth files of the
releases have no config at all; their settings are known from the papers.
"""

import difflib
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from big_vit.errors import UserError
from big_vit.interop import class_names, fit, pictures
from big_vit.interop.fit import ATTENTION, Model, Settings
from big_vit.interop.layout import Row, Rule, Shapes, depth_of, torch_rules

FORMATS = ('timm', 'mae', 'deit3', 'dinov2', 'ijepa')
_IMAGENET = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
_BLOCK = 'Transformer/encoderblock_{i}'
_MAP = 'MAPHead_0'

# Width and number of heads by the size in an architecture's name.
_SIZES = {
    'tiny': (192, 3), 'xsmall': (256, 4), 'wee': (256, 4), 'little': (320, 5), 'small': (384, 6),
    'medium': (512, 8), 'mediumd': (512, 8), 'betwixt': (640, 10), 'base': (768, 12),
    'so150m2': (832, 13), 'so150m': (896, 14), 'large': (1024, 16),
    'so400m': (1152, 16), 'huge': (1280, 16), 'giant': (1408, 16), 'giantopt': (1536, 16),
    'gigantic': (1664, 16),
}  # fmt: skip
# Those of names that say something else than their size does.
_NAMED_SIZES = (
    (r'vit_base_patch16_gap_224', (768, 16)),
    (r'vit_base_patch\d+_plus_.*', (896, 14)),
    (r'vit_giant_.*_(dinov2|tipsv2)', (1536, 24)),
    (r'vit_huge_plus_.*_dinov3.*', (1280, 20)),
    (r'vit_7b_.*', (4096, 32)),
    (r'test_vit2?', (64, 2)),
    (r'test_vit[34]', (96, 3)),
)
# Heads of the releases, by width.
_RELEASED_HEADS = {
    'mae': {768: 12, 1024: 16, 1280: 16},
    'deit3': {384: 6, 512: 8, 768: 12, 1024: 16, 1280: 16},
    'dinov2': {384: 6, 768: 12, 1024: 16, 1536: 24},
    'ijepa': {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16},
}
# Architectures that big_vit has. Others have blocks that compute something else, some under the
# same names, so that a name with an unknown part is refused.
_PLAIN = re.compile(
    r'test_vit[234]?|(?!eva_giant)(vit|deit3?|flexivit|eva)_'
    r'(?!pwee|dwee|dpwee|dlittle|intern)(?P<size>[a-z0-9]+)'
    r'(_distilled)?(_patch\d+)?(_r_s16_p8|_r26_s32|_r50_s16|_r50_s32)?'
    r'(_plus|_clip|_quickgelu|_siglip|_gap|_map|_reg\d+|_dinov2|_tipsv2|_miil|_36x1|_\d+)*'
)
_DINOV3 = re.compile(r'vit_(?P<size>[a-z0-9]+)(_plus)?_patch\d+_dinov3(_qkvb)?')
# Arguments of models that settings come from, or that arrays show, or that are of training.
_ARGUMENTS = {
    *('img_size', 'patch_size', 'in_chans', 'num_classes', 'global_pool', 'embed_dim', 'depth'),
    *('num_heads', 'mlp_ratio', 'qkv_bias', 'qk_norm', 'proj_bias', 'init_values', 'class_token'),
    *('reg_tokens', 'no_embed_class', 'pos_embed', 'pre_norm', 'fc_norm', 'final_norm'),
    *('pool_include_prefix', 'norm_layer', 'act_layer', 'dynamic_img_size', 'dynamic_img_pad'),
    *('strict_img_size', 'drop_rate', 'pos_drop_rate', 'patch_drop_rate', 'proj_drop_rate'),
    *('attn_drop_rate', 'drop_path_rate', 'weight_init', 'fix_init'),
}
_DINOV3_ARGUMENTS = _ARGUMENTS - {'norm_layer', 'act_layer', 'qk_norm', 'pos_embed', 'pre_norm'} | {
    'num_reg_tokens', 'rope_temperature'}  # fmt: skip
_EPS_1E5 = re.compile(r'.*_clip_')
_QUICK = re.compile(r'.*_clip_quickgelu')
_TANH = re.compile(
    r'vit_(base_patch32|so400m_patch16|giantopt_patch16)_siglip_|vit_large_patch16_siglip_(gap_)?512'
)
# A safe `norm_layer` of a config: our norm, and the epsilon that timm gives it.
_NORMS = {'layernorm': ('layernorm', 1e-6), 'rmsnorm': ('rmsnorm', 1e-6)}
_ACTIVATIONS = {
    'gelu': 'gelu',
    'gelu_tanh': 'gelu_tanh',
    'quick_gelu': 'quick_gelu',
    'relu': 'relu',
    'silu': 'silu',
    'swish': 'silu',
}


@functools.cache
def architectures() -> dict[str, tuple[int, int, int | None]]:
    """Return width, depth and patch size of timm's ViTs that big_vit has; a stem has no patch."""
    rows = map(str.split, Path(__file__).with_name('timm_vits.txt').read_text().splitlines())
    return {
        name: (int(width), int(depth), None if patch == '-' else int(patch))
        for name, width, depth, patch in rows
    }


def check_architecture(name: str, shapes: Shapes, where: str) -> None:
    """Check that a user's name of an architecture is one, and that the arrays can be of it.

    Raises:
      UserError: it is none, with the nearest that there are; or an array has another shape.
    """
    known = architectures()
    plain = name.partition('.')[0]  # Behind it is which of its weights.
    if plain not in known:
        raise unknown_architecture(plain, where)
    width, depth, side = known[plain]
    patch = 'patch_embed.proj.weight'
    shape = fit.required_shape(shapes, patch)
    expected = (width, *(shape[1:2] if side else shape[1:]), *((side, side) if side else ()))
    if shape != expected:
        raise UserError(
            f'{where}: {patch} is {"x".join(map(str, shape))}, and {plain} has '
            f'{"x".join(map(str, expected))}; of one with other sizes say the heads: '
            '--set num_heads=N'
        )
    if depth != (blocks := depth_of(shapes, r'blocks\.(\d+)\.', where)):
        first = min(depth, blocks)
        what = 'there is a' if blocks > depth else 'there is no'
        raise UserError(f'{where}: {what} blocks.{first}, and {plain} has {depth} blocks')


def unknown_architecture(name: str, where: str) -> UserError:
    """Return the error of an architecture that is none here, with the nearest that are."""
    near = difflib.get_close_matches(name, architectures(), n=3)
    hint = f'; did you mean {" or ".join(near)}?' if near else ''
    return UserError(f'{where}: {name} is not a ViT that big_vit has{hint}')


def recognises(names: Any, file: str = '', place: str = '') -> str | None:
    """Return the format of arrays with these names, in a file of this name, at this place of it."""
    names = set(names)
    if 'patch_embed.proj.weight' not in names:
        return None
    # Models with RoPE beside their table have DeiT-III's very arrays: the name of its files tells.
    if 'blocks.0.gamma_1' in names and re.match(r'(?i)deit_?3', file):
        return 'deit3'
    # Its encoder has the arrays of timm's models without class token.
    if re.match(r'(target_)?encoder(\.|$)', place) and 'cls_token' not in names:
        return 'ijepa'
    # That of MAE alone has timm's very arrays.
    if 'decoder_embed.weight' in names or re.match(r'(?i)mae_', file):
        return 'mae'
    if 'register_tokens' in names or {'mask_token', 'blocks.0.ls1.gamma'} <= names:
        return 'dinov2'
    return 'timm'


def block_rows() -> list[Row]:
    """The rows of a plain block."""
    rows = _table('timm', {'mlp': 'mlp', 'tokenizer': 'patches'}, {'distilled': False})
    return [(ours, theirs) for ours, theirs in rows if theirs.startswith('blocks.{i}.')]


def _table(format: str, settings: Mapping[str, Any], layout: Mapping[str, Any]) -> list[Row]:
    qkv = tuple(f'{_BLOCK}/{ATTENTION}/{name}' for name in ('query', 'key', 'value'))
    scale = ('gamma_1', 'gamma_2') if format == 'deit3' else ('ls1.gamma', 'ls2.gamma')
    registers = 'dist_token' if layout['distilled'] else 'reg_token'
    if layout.get('dinov3'):
        return _dinov3_table('fc1_x' if settings['mlp'] == 'swiglu' else 'fc1')
    gated, second = ('w12', 'w3') if format == 'dinov2' else ('fc1', 'fc2')
    block = 'blocks.{i}'
    if settings['mlp'] == 'swiglu':
        gate_and_up = tuple(f'{_BLOCK}/MlpBlock_0/{name}' for name in ('Dense_gate', 'Dense_0'))
        mlp: list[Row] = [(gate_and_up, f'{block}.mlp.{gated}.{{leaf}}')]
    else:
        second = 'fc2'
        mlp = [(f'{_BLOCK}/MlpBlock_0/Dense_0', f'{block}.mlp.fc1.{{leaf}}')]
    attention, pool = f'{_BLOCK}/{ATTENTION}', f'{_MAP}/{ATTENTION}'
    return [
        ('embedding', 'patch_embed.proj.{leaf}'),
        *_stem(settings),
        ('cls', 'cls_token'),
        ('registers', 'register_tokens' if format == 'dinov2' else registers),
        ('pos_embedding', 'pos_embed'),
        ('pre_norm', 'norm_pre.{leaf}'),
        (f'{_BLOCK}/LayerNorm_0', f'{block}.norm1.{{leaf}}'),
        (qkv, f'{block}.attn.qkv.{{leaf}}'),
        (f'{attention}/query_norm', f'{block}.attn.q_norm.{{leaf}}'),
        (f'{attention}/key_norm', f'{block}.attn.k_norm.{{leaf}}'),
        (f'{attention}/out', f'{block}.attn.proj.{{leaf}}'),
        (f'{_BLOCK}/LayerScale_0/scale', f'{block}.{scale[0]}'),
        (f'{_BLOCK}/LayerNorm_1', f'{block}.norm2.{{leaf}}'),
        *mlp,
        (f'{_BLOCK}/MlpBlock_0/Dense_1', f'{block}.mlp.{second}.{{leaf}}'),
        (f'{_BLOCK}/LayerScale_1/scale', f'{block}.{scale[1]}'),
        ('Transformer/encoder_norm', 'norm.{leaf}'),
        ('encoder_norm', 'fc_norm.{leaf}'),  # Normalises the pooled vector.
        (f'{_MAP}/probe', 'attn_pool.latent'),
        (f'{pool}/query', 'attn_pool.q.{leaf}'),
        ((f'{pool}/key', f'{pool}/value'), 'attn_pool.kv.{leaf}'),
        (f'{pool}/out', 'attn_pool.proj.{leaf}'),
        (f'{_MAP}/LayerNorm_0', 'attn_pool.norm.{leaf}'),
        (f'{_MAP}/MlpBlock_0/Dense_0', 'attn_pool.mlp.fc1.{leaf}'),
        (f'{_MAP}/MlpBlock_0/Dense_1', 'attn_pool.mlp.fc2.{leaf}'),
        ('head', layout.get('head', 'head') + '.{leaf}'),
        ('head_dist', 'head_dist.{leaf}'),
    ]


def _dinov3_table(first: str) -> list[Row]:
    """DINOv3 as timm has it: keys have no bias, and gated MLPs have their two matrices apart."""
    attention, mlp, block = f'{_BLOCK}/{ATTENTION}', f'{_BLOCK}/MlpBlock_0', 'blocks.{i}'
    kernels = tuple(f'{attention}/{name}/kernel' for name in ('query', 'key', 'value'))
    return [
        ('embedding', 'patch_embed.proj.{leaf}'),
        ('cls', 'cls_token'),
        ('registers', 'reg_token'),
        (f'{_BLOCK}/LayerNorm_0', f'{block}.norm1.{{leaf}}'),
        (kernels, f'{block}.attn.qkv.weight'),
        ((f'{attention}/query/bias',), f'{block}.attn.q_bias'),
        ((f'{attention}/value/bias',), f'{block}.attn.v_bias'),
        (f'{attention}/out', f'{block}.attn.proj.{{leaf}}'),
        (f'{_BLOCK}/LayerScale_0/scale', f'{block}.gamma_1'),
        (f'{_BLOCK}/LayerNorm_1', f'{block}.norm2.{{leaf}}'),
        (f'{mlp}/Dense_gate', f'{block}.mlp.fc1_g.{{leaf}}'),
        (f'{mlp}/Dense_0', f'{block}.mlp.{first}.{{leaf}}'),
        (f'{mlp}/Dense_1', f'{block}.mlp.fc2.{{leaf}}'),
        (f'{_BLOCK}/LayerScale_1/scale', f'{block}.gamma_2'),
        ('Transformer/encoder_norm', 'norm.{leaf}'),
        ('encoder_norm', 'fc_norm.{leaf}'),
        ('head', 'head.{leaf}'),
    ]


def _stem(settings: Mapping[str, Any]) -> list[Row]:
    if settings['tokenizer'] != 'resnet':
        return []
    units, backbone = settings['resnet'], 'patch_embed.backbone'
    root = f'{backbone}.stem' if units else backbone
    rows: list[Row] = [
        ('stem/conv_root', f'{root}.conv.{{leaf}}'),
        ('stem/gn_root', f'{root}.norm.{{leaf}}'),
    ]
    for stage, count in enumerate(units):
        for unit in range(count):
            ours = f'stem/block{stage + 1}/unit{unit + 1}'
            theirs = f'{backbone}.stages.{stage}.blocks.{unit}'
            for i in (1, 2, 3):
                rows.append((f'{ours}/conv{i}', f'{theirs}.conv{i}.{{leaf}}'))
                rows.append((f'{ours}/gn{i}', f'{theirs}.norm{i}.{{leaf}}'))
            rows.append((f'{ours}/conv_proj', f'{theirs}.downsample.conv.{{leaf}}'))
            rows.append((f'{ours}/gn_proj', f'{theirs}.downsample.norm.{{leaf}}'))
    return rows


def rules_of(
    format: str, settings: Mapping[str, Any], shapes: Shapes, layout: Mapping[str, Any]
) -> list[Rule]:
    """Return the rules that map our parameters of these shapes to the file."""
    rules = torch_rules(_table(format, settings, layout), shapes, depth=settings['depth'])
    trunk = layout.get('trunk', '')
    outer_head = layout.get('head', 'head').startswith('visual.')
    return [
        rule
        if outer_head and rule.theirs.startswith('visual.')
        else rule._replace(theirs=trunk + rule.theirs)
        for rule in rules
    ]


def settings_of(
    format: str, shapes: Shapes, config: Mapping[str, Any], given: Mapping[str, Any], where: str
) -> tuple[Settings, dict[str, Any], dict[str, Any]]:
    """Derive settings, metadata and layout from a config and the shapes.

    Raises:
      UserError: the architecture is not a ViT, or the config contradicts the arrays.
    """
    name = str(config.get('architecture') or '').partition('.')[0]
    args = config.get('model_args') or {}
    cfg = config.get('pretrained_cfg') or {}
    _check_known(format, name, args, shapes, where)
    dinov3 = bool(_DINOV3.fullmatch(name))
    depth = depth_of(shapes, r'blocks\.(\d+)\.', where)
    out, channels, *patch = fit.required_shape(shapes, 'patch_embed.proj.weight')
    stem = _stem_of(shapes)
    settings: Settings = {
        'patch_size': fit.patch_of(patch, stem.get('resnet')),
        'width': out,
        'depth': depth,
        'num_heads': given.get('num_heads')
        or args.get('num_heads')
        or heads_of(format, name, out, 'embed_dim' in args, where),
        'class_token': 'cls_token' in shapes,
        'embedding_bias': 'patch_embed.proj.bias' in shapes,
        'qkv_bias': 'blocks.0.attn.qkv.bias' in shapes,
        'qk_norm': 'blocks.0.attn.q_norm.weight' in shapes,
        'pre_norm': 'norm_pre.weight' in shapes,
        'norm_after_pool': 'fc_norm.weight' in shapes,
        'num_classes': shapes.get('head.weight', (0,))[0],
        **_norm(name, args, where),
        **_mlp(format, shapes),
    }
    settings['activation'] = _activation(name, args, where)
    if settings['norm'] == 'rmsnorm' and 'norm.bias' in shapes:
        raise UserError(f'{where}: its config says rmsnorm, but its norms have biases')
    if any(scale in shapes for scale in ('blocks.0.ls1.gamma', 'blocks.0.gamma_1')):
        settings['layer_scale'] = float(args.get('init_values') or 1e-5)
    registers = next((n for n in ('reg_token', 'register_tokens', 'dist_token') if n in shapes), '')
    settings['registers'] = shapes[registers][1] if registers else 0
    settings |= stem
    if stem:
        root = 'patch_embed.backbone.stem.conv.weight'
        channels = shapes[root if root in shapes else 'patch_embed.backbone.conv.weight'][1]
    settings['pool'] = _pool(name, config, args, shapes, where)
    prefix_tokens = int('cls_token' in shapes) + settings['registers']
    # Our attention pooling attends to all tokens; our mean covers the patches only.
    pools_prefix = bool(args.get('pool_include_prefix'))
    if (
        prefix_tokens
        and settings['pool'] in ('map', 'gap')
        and pools_prefix != (settings['pool'] == 'map')
    ):
        raise UserError(
            f'{where}: its pooling {"looks at" if pools_prefix else "leaves out"} the '
            f'{prefix_tokens} tokens before those of patches, '
            f'and pool={settings["pool"]!r} here does not do the same'
        )
    # DINOv2's table has a row for the class token but none for the registers.
    prefixes = dict.fromkeys((int('cls_token' in shapes), prefix_tokens, 0))
    if format == 'timm' and settings['registers']:
        prefixes = dict.fromkeys((prefix_tokens, 0))
    table = shapes.get('pos_embed')
    prefix, size = fit.prefix_and_image_size(
        table[1] if table else None,
        tuple(prefixes),
        settings,
        given.get('image_size') or _image_size(args, cfg),
        where,
    )
    settings |= {'posemb': 'learned' if table else 'none', 'posemb_prefix': prefix}
    if dinov3:
        theta = float(args.get('rope_temperature') or 100.0)
        bias = 'blocks.0.attn.q_bias' in shapes
        settings |= {'posemb': 'rope', 'rope_theta': theta, 'key_bias': False, 'qkv_bias': bias}
    meta = {'image_size': size, 'channels': channels, **_about(format, name, cfg)}
    layout = {'distilled': registers == 'dist_token', 'dinov3': dinov3}
    return settings, meta, layout


def _check_known(
    format: str, name: str, args: Mapping[str, Any], shapes: Shapes, where: str
) -> None:
    """Raise UserError for architectures whose arrays could be read and whose answers are others."""
    known = _DINOV3_ARGUMENTS if _DINOV3.fullmatch(name) else _ARGUMENTS
    if 'storage_tokens' in shapes:
        raise UserError(
            f"{where}: DINOv3 as it was released: big_vit reads Hugging Face's folder of it, and "
            "timm's"
        )
    if format != 'timm' and 'pos_embed' not in shapes:
        raise UserError(f'{where}: {format} has positions, and there is no pos_embed in it')
    if format == 'timm' and not name:
        like_deit3 = {'blocks.0.gamma_1', 'pos_embed'} <= shapes.keys()
        also = '; or --format deit3, if it is that' if like_deit3 else ''
        raise UserError(
            f'{where}: arrays do not show what a model of timm computes (heads, epsilon, '
            'activation, pooling, RoPE): config.json must be beside it, or say --architecture '
            f"NAME (of init: init_architecture) with timm's name, as in vit_small_patch16_224{also}"
        )
    if name and not _PLAIN.fullmatch(name) and not _DINOV3.fullmatch(name):
        raise unknown_architecture(name, where)
    unknown = [key for key in args if key not in known]
    if unknown:
        raise UserError(f'{where}: big_vit does not know what {unknown[0]} in model_args does')


def heads_of(format: str, name: str, width: int, other_width: bool, where: str) -> int:
    """The number of heads of a release, or of an architecture where its config says no other.

    Raises:
      UserError: nothing tells.
    """
    if format != 'timm':
        heads = _RELEASED_HEADS[format].get(width)
    else:
        named = (size for pattern, size in _NAMED_SIZES if re.fullmatch(pattern, name))
        match = _DINOV3.fullmatch(name) or _PLAIN.fullmatch(name)
        usual, heads = next(named, _SIZES.get(match['size'] if match else '', (0, None)))
        heads = heads if other_width or usual == width else None
    if heads is None or width % heads:
        raise UserError(
            f'{where}: nothing tells the heads of {name or format} of width {width}: '
            '--set num_heads=N'
        )
    return heads


def _norm(name: str, args: Mapping[str, Any], where: str) -> Settings:
    norm_layer = args.get('norm_layer')
    if norm_layer is not None:
        known = _NORMS.get(str(norm_layer).replace('_', '').lower())
        if known is None:
            raise UserError(f'{where}: norm_layer {norm_layer!r} is not one that big_vit has')
        return {'norm': known[0], 'norm_eps': known[1]}
    norm = 'rmsnorm' if name == 'test_vit4' else 'layernorm'
    coarse = _EPS_1E5.match(name) or _DINOV3.fullmatch(name)
    return {'norm': norm, 'norm_eps': 1e-5 if coarse else 1e-6}


def _activation(name: str, args: Mapping[str, Any], where: str) -> str:
    act_layer = args.get('act_layer')
    if act_layer is not None:
        if act_layer not in _ACTIVATIONS:
            raise UserError(f'{where}: act_layer {act_layer!r} is not one that big_vit has')
        return _ACTIVATIONS[act_layer]
    if _QUICK.match(name):
        return 'quick_gelu'
    return 'gelu_tanh' if _TANH.match(name) else 'gelu'


def _mlp(format: str, shapes: Shapes) -> Settings:
    """Recognise a gated MLP: its first matrix has twice as many rows as the second has inputs."""
    if 'blocks.0.mlp.fc1_g.weight' in shapes:  # Or there are two matrices.
        return {'mlp': 'swiglu', 'mlp_dim': shapes['blocks.0.mlp.fc1_g.weight'][0]}
    first, second = ('w12', 'w3') if 'blocks.0.mlp.w12.weight' in shapes else ('fc1', 'fc2')
    rows = fit.required_shape(shapes, f'blocks.0.mlp.{first}.weight')[0]
    taken = fit.required_shape(shapes, f'blocks.0.mlp.{second}.weight')[1]
    return {'mlp': 'swiglu' if rows == 2 * taken else 'mlp', 'mlp_dim': taken}


def _stem_of(shapes: Shapes) -> Settings:
    if not any(name.startswith('patch_embed.backbone.') for name in shapes):
        return {}
    stage_and_unit = {
        m.groups()
        for name in shapes
        if (m := re.match(r'patch_embed\.backbone\.stages\.(\d+)\.blocks\.(\d+)\.', name))
    }
    stages = max((int(stage) + 1 for stage, _ in stage_and_unit), default=0)
    units = tuple(sum(int(stage) == s for stage, _ in stage_and_unit) for s in range(stages))
    return {'tokenizer': 'resnet', 'resnet': units}


def _pool(
    name: str, config: Mapping[str, Any], args: Mapping[str, Any], shapes: Shapes, where: str
) -> str:
    if 'head_dist.weight' in shapes:
        return 'cls_dist'
    if 'attn_pool.latent' in shapes:
        return 'map'
    pooling = args.get('global_pool') or config.get('global_pool')
    if pooling is None:
        gap = 'fc_norm.weight' in shapes or re.search(r'_gap_|eva_large|_dinov3', name)
        pooling = 'avg' if gap or 'cls_token' not in shapes else 'token'
    pools = {'token': 'cls', 'avg': 'gap'}
    if pooling not in pools:
        raise UserError(
            f'{where}: global_pool {pooling!r} is not one that big_vit has (token, avg, map)'
        )
    return pools[pooling]


def _image_size(args: Mapping[str, Any], cfg: Mapping[str, Any]) -> tuple[int, int] | None:
    size = args.get('img_size')
    if size is not None:
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return int(height), int(width)
    shape = cfg.get('input_size')
    return (int(shape[1]), int(shape[2])) if shape else None


def _about(format: str, name: str, cfg: Mapping[str, Any]) -> dict[str, Any]:
    about: dict[str, Any] = {'architecture': name or None}
    if format == 'timm':
        for key in ('mean', 'std'):
            about[key] = tuple(cfg[key]) if key in cfg else None
        about['crop_pct'] = cfg.get('crop_pct')
        about['crop_mode'] = cfg.get('crop_mode') or ('center' if cfg else None)
        about['interpolation'] = cfg.get('interpolation')
        about['licence'] = cfg.get('license')
        about['source'] = cfg.get('hf_hub_id') or cfg.get('url') or cfg.get('origin_url')
        return about
    licences = {'mae': 'cc-by-nc-4.0', 'deit3': 'apache-2.0', 'dinov2': 'apache-2.0'}
    licences['ijepa'] = 'cc-by-nc-4.0'
    crop = {'mae': 0.875, 'deit3': 1.0, 'dinov2': 1.0, 'ijepa': 0.875}
    source = {'mae': 'mae', 'deit3': 'deit', 'dinov2': 'dinov2', 'ijepa': 'ijepa'}
    return {
        **about,
        **_IMAGENET,
        'crop_pct': crop[format],
        'crop_mode': 'center',
        'interpolation': 'bicubic',
        'licence': licences[format],
        'source': f'https://github.com/facebookresearch/{source[format]}',
    }


def convert(format: str, model: Model) -> tuple[Model, dict[str, Any]]:
    """Convert the model to one that timm can hold.

    Returns:
      The converted model, and its layout in the file.

    Raises:
      UserError: timm cannot hold it.
    """
    if format != 'timm':
        raise UserError(
            f'--to {format}: a pickled file is not written; --to timm has the same names'
        )
    fit.require(
        model, format, norm=('layernorm', 'rmsnorm'), parallel=(False,), lsa=(False,),
        representation=(0,), stride=(None,), pool=('cls', 'gap', 'map', 'cls_dist'),
        posemb=('learned', 'sincos2d', 'sincos2d_mae', 'none'), tokenizer=('patches', 'resnet'),
    )  # fmt: skip
    settings = model.settings
    heads, width = settings['num_heads'], settings['width']
    if settings['head_dim'] not in (None, width // heads):
        raise UserError(f'--to timm: heads of {settings["head_dim"]} for {heads} of {width}')
    if settings['mlp'] == 'swiglu' and settings['pool'] == 'map':
        raise UserError('--to timm: its attention pooling has no gated MLP, this model has one')
    distilled = settings['pool'] == 'cls_dist'
    if distilled and settings['registers'] != 1:
        raise UserError('--to timm: a distilled model has one register, the distillation token')
    if settings['posemb'] != 'none':
        model = fit.with_position_table(model)
    prefix_tokens = int('cls' in model.params) + settings['registers']
    if distilled:
        model = fit.with_prefix(model, 2)
    elif model.settings['posemb_prefix'] not in (0, prefix_tokens):
        # timm's table has rows for all tokens before the patches, or for none.
        model = fit.with_prefix(model, 0)
    if settings['pre_norm']:
        model = fit.without_embedding_bias(model)
    else:
        model = fit.with_embedding_bias(model)
    if settings['qkv_bias'] or settings['pool'] == 'map':
        model = fit.with_biases(model)
    model = fit.with_head_bias(model)
    layout = {'distilled': distilled}
    _base_architecture(model.settings, distilled)
    return model, layout


def _base_architecture(settings: Mapping[str, Any], distilled: bool) -> tuple[str, dict[str, Any]]:
    """Choose a timm architecture that computes the same as these settings.

    A config can set neither the epsilon nor a gated MLP, so the name of the architecture has to.

    Returns:
      The architecture, and the model arguments that it needs in addition.

    Raises:
      UserError: no architecture does.
    """
    eps, gated = settings['norm_eps'], settings['mlp'] == 'swiglu'
    hybrid = {(): 'vit_tiny_r_s16_p8_224', (2, 2, 2, 2): 'vit_small_r26_s32_224',
              (3, 4, 9): 'vit_base_r50_s16_224', (3, 4, 6, 3): 'vit_large_r50_s32_224'}  # fmt: skip
    fits_eps = eps == 1e-6
    name = 'vit_base_patch16_224'
    if settings['tokenizer'] == 'resnet':
        if settings['resnet'] not in hybrid:
            raise UserError(f'--to timm: it has no ResNet stem of {settings["resnet"]} units')
        name = hybrid[settings['resnet']]
        if gated or distilled:
            raise UserError('--to timm: its hybrids have neither a gated MLP nor a second head')
    elif distilled:
        name = 'deit_base_distilled_patch16_224'
    elif gated:
        name = 'vit_giant_patch14_reg4_dinov2'
    elif eps == 1e-5 and settings['norm'] == 'layernorm':
        name, fits_eps = 'vit_base_patch16_clip_224', True
    if gated and distilled:
        raise UserError('--to timm: its distilled models have no gated MLP')
    if not fits_eps:
        raise UserError(
            f'--to timm: its config cannot say norm_eps={eps:g} for this model; '
            '--set norm_eps=1e-6 accepts the small difference'
        )
    return name, {'norm_layer': 'rmsnorm'} if settings['norm'] == 'rmsnorm' else {}


# Depth and hidden width of the MLP of models that are named by their size.
_PUBLISHED = {
    'tiny': (12, 768), 'small': (12, 1536), 'base': (12, 3072), 'large': (24, 4096),
    'huge': (32, 5120), 'giant': (40, 6144), 'gigantic': (48, 8192),
}  # fmt: skip
# Patches and image sizes for which timm has a name, the first one for any other.
_NAMED = {
    'vit_base_patch16_224': {
        'tiny': ('patch16_224', 'patch16_384'),
        'small': ('patch16_224', 'patch16_384', 'patch32_224', 'patch32_384', 'patch8_224'),
        'base': ('patch16_224', 'patch16_384', 'patch32_224', 'patch32_384', 'patch8_224'),
        'large': ('patch16_224', 'patch16_384', 'patch32_224', 'patch32_384', 'patch14_224'),
        'huge': ('patch14_224',),
        'giant': ('patch14_224',),
        'gigantic': ('patch14_224',),
    },
    'vit_base_patch16_clip_224': {
        'base': ('patch16_clip_224', 'patch16_clip_384', 'patch32_clip_224', 'patch32_clip_256',
                 'patch32_clip_384', 'patch32_clip_448'),
        'large': ('patch14_clip_224', 'patch14_clip_336'),
        'huge': ('patch14_clip_224', 'patch14_clip_336', 'patch14_clip_378'),
        'giant': ('patch14_clip_224',),
        'gigantic': ('patch14_clip_224', 'patch14_clip_378'),
    },
    'deit_base_distilled_patch16_224': {
        'tiny': ('distilled_patch16_224',),
        'small': ('distilled_patch16_224',),
        'base': ('distilled_patch16_224', 'distilled_patch16_384'),
    },
}  # fmt: skip


def _architecture(base: str, settings: Mapping[str, Any], image_size: tuple[int, int]) -> str:
    """Return timm's name for a model of these sizes; of other sizes, `base`, with arguments."""
    shape = tuple(settings[name] for name in ('width', 'num_heads', 'depth', 'mlp_dim'))
    for size, named in _NAMED.get(base, {}).items():
        if (*_SIZES[size], *_PUBLISHED[size]) == shape:
            sides = settings['patch_size'][0], image_size[0]
            exact = [n for n in named if tuple(map(int, re.findall(r'\d+', n))) == sides]
            same_patch = [n for n in named if int(re.findall(r'\d+', n)[0]) == sides[0]]
            return f'{base.partition("_")[0]}_{size}_{[*exact, *same_patch, *named][0]}'
    return base


def config_of(model: Model, layout: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the JSON files that go beside the weights, by name."""
    settings, meta = model.settings, model.meta
    base, extra_args = _base_architecture(settings, layout['distilled'])
    name = _architecture(base, settings, meta['image_size'])
    gated = settings['mlp'] == 'swiglu'
    prefix_tokens = int('cls' in model.params) + settings['registers']
    pools = {'cls': 'token', 'gap': 'avg', 'map': 'map', 'cls_dist': 'token'}
    args: dict[str, Any] = {
        'img_size': list(meta['image_size']),
        'patch_size': _int_or_pair(fit.kernel_of(settings)),
        'in_chans': meta['channels'],
        'embed_dim': settings['width'],
        'depth': settings['depth'],
        'num_heads': settings['num_heads'],
        'mlp_ratio': ratio(settings['mlp_dim'] * (2 if gated else 1), settings['width']),
        'qkv_bias': settings['qkv_bias'],
        'qk_norm': settings['qk_norm'],
        'init_values': settings['layer_scale'],
        'class_token': 'cls' in model.params,
        'reg_tokens': 0 if layout['distilled'] else settings['registers'],
        'no_embed_class': settings['posemb_prefix'] != prefix_tokens,
        'pos_embed': 'learn' if settings['posemb'] == 'learned' else 'none',
        'pre_norm': settings['pre_norm'],
        'fc_norm': settings['norm_after_pool'],
        'global_pool': pools[settings['pool']],
        'pool_include_prefix': settings['pool'] == 'map' and prefix_tokens > 0,
        **extra_args,
    }
    if not gated:
        args['act_layer'] = settings['activation']
    if layout['distilled']:
        for key in ('class_token', 'reg_tokens', 'no_embed_class', 'pool_include_prefix'):
            del args[key]
    height, width = meta['image_size']
    pretrained = {
        'tag': 'big_vit',
        'custom_load': False,
        'input_size': [meta['channels'], height, width],
        'fixed_input_size': True,
        'interpolation': meta.get('interpolation') or 'bicubic',
        'crop_pct': meta.get('crop_pct') or 1.0,
        'crop_mode': pictures.crop_mode(meta),
        'mean': list(meta.get('mean') or (0.5,) * meta['channels']),
        'std': list(meta.get('std') or (0.5,) * meta['channels']),
        'num_classes': settings['num_classes'],
        'pool_size': None,
        'first_conv': _first_conv(settings),
        'classifier': ['head', 'head_dist'] if layout['distilled'] else 'head',
        'license': meta.get('licence'),
        'origin_url': meta.get('source'),
    }
    config = {
        'architecture': name,
        'num_classes': settings['num_classes'],
        'num_features': settings['width'],
        'global_pool': args['global_pool'],
        'model_args': args,
        'pretrained_cfg': pretrained,
    }
    names = class_names.complete(meta, settings['num_classes'])
    if names:
        config['label_names'] = names
        if texts := meta.get('class_descriptions'):
            config['label_descriptions'] = dict(zip(names, texts, strict=True))
    return {'config.json': config}


def _first_conv(settings: Mapping[str, Any]) -> str:
    if settings['tokenizer'] != 'resnet':
        return 'patch_embed.proj'
    return f'patch_embed.backbone.{"stem." if settings["resnet"] else ""}conv'


def _int_or_pair(pair: Sequence[int]) -> int | list[int]:
    return pair[0] if pair[0] == pair[1] else list(pair)


def ratio(hidden: int, width: int) -> float:
    """Return a ratio r such that int(width * r), as peers compute it, equals `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width
