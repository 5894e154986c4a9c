"""open_clip's image towers: its own ViT, and timm models inside open_clip (SigLIP).

A folder has open_clip_model.safetensors and open_clip_config.json. Only the image tower is read and
written: the rest of a full model has to be dropped, and a tower alone loads into
`open_clip.create_model(...).visual`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from big_vit.errors import UserError
from big_vit.interop import fit, pictures, timm_vit
from big_vit.interop.fit import ATTENTION, Model, Settings
from big_vit.interop.layout import Row, Rule, Shapes, depth_of, torch_rules

FORMATS = ('open_clip',)
WEIGHTS, CONFIG = 'open_clip_model.safetensors', 'open_clip_config.json'
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_BLOCK = 'Transformer/encoderblock_{i}'
_LAYER = 'transformer.resblocks.{i}'
TRUNK = 'visual.trunk.'


def recognises(names: Any) -> str | None:
    names = set(names)
    native = 'visual.class_embedding' in names or 'class_embedding' in names
    return 'open_clip' if native or any(n.startswith(TRUNK) for n in names) else None


def _table() -> list[Row]:
    attention = f'{_BLOCK}/{ATTENTION}'
    joined = tuple(f'{attention}/{name}' for name in ('query', 'key', 'value'))
    return [
        ('embedding', 'conv1.{leaf}'),
        ('cls', 'class_embedding'),
        ('pos_embedding', 'positional_embedding'),
        ('pre_norm', 'ln_pre.{leaf}'),
        (f'{_BLOCK}/LayerNorm_0', f'{_LAYER}.ln_1.{{leaf}}'),
        (joined, f'{_LAYER}.attn.in_proj_{{leaf}}'),
        (f'{attention}/out', f'{_LAYER}.attn.out_proj.{{leaf}}'),
        (f'{_BLOCK}/LayerScale_0/scale', f'{_LAYER}.ls_1.gamma'),
        (f'{_BLOCK}/LayerNorm_1', f'{_LAYER}.ln_2.{{leaf}}'),
        (f'{_BLOCK}/MlpBlock_0/Dense_0', f'{_LAYER}.mlp.c_fc.{{leaf}}'),
        (f'{_BLOCK}/MlpBlock_0/Dense_1', f'{_LAYER}.mlp.c_proj.{{leaf}}'),
        (f'{_BLOCK}/LayerScale_1/scale', f'{_LAYER}.ls_2.gamma'),
        ('Transformer/encoder_norm', 'ln_post.{leaf}'),
        ('encoder_norm', 'ln_post.{leaf}'),  # Normalises the pooled vector.
        ('head/kernel', 'proj'),
    ]


def rules_of(settings: Mapping[str, Any], shapes: Shapes, layout: Mapping[str, Any]) -> list[Rule]:
    """Return the rules that map our parameters of these shapes to the file."""
    if layout['trunk']:
        return timm_vit.rules_of('timm', settings, shapes, layout)
    prefix = layout['prefix']
    flat = ('class_embedding', 'positional_embedding')
    rules = torch_rules(_table(), shapes, flat, settings['depth'])
    return [rule._replace(theirs=prefix + rule.theirs) for rule in rules]


def settings_of(
    shapes: Shapes, config: Mapping[str, Any], given: Mapping[str, Any], where: str
) -> tuple[Settings, dict[str, Any], dict[str, Any]]:
    """Derive settings, metadata and layout from open_clip_config.json and the shapes.

    Raises:
      UserError: nothing tells the activation, or the model is not a ViT of open_clip.
    """
    model_cfg = config.get('model_cfg') or config
    vision = model_cfg.get('vision_cfg') or {}
    about = config.get('preprocess_cfg') or {}
    images = {
        'mean': tuple(about.get('mean') or _MEAN),
        'std': tuple(about.get('std') or _STD),
        'interpolation': about.get('interpolation') or 'bicubic',
        'crop_pct': 1.0,
        'crop_mode': {'squash': 'squash', 'longest': 'border'}.get(
            str(about.get('resize_mode')), 'center'
        ),
    }
    given = dict(given)
    if vision.get('image_size') and not given.get('image_size'):
        size = vision['image_size']
        given['image_size'] = tuple(size) if isinstance(size, list) else (size, size)
    if any(name.startswith(TRUNK) for name in shapes):
        return _settings_of_trunk(shapes, vision, given, images, where)
    return _settings_of_tower(shapes, model_cfg, vision, given, images, where)


def _settings_of_trunk(
    shapes: Shapes, vision: Mapping[str, Any], given: Any, images: dict[str, Any], where: str
) -> tuple[Settings, dict[str, Any], dict[str, Any]]:
    name = vision.get('timm_model_name')
    if not name:
        raise UserError(
            f'{where}: the timm model behind it is named in {CONFIG} (vision_cfg.timm_model_name), '
            'which must be beside it'
        )
    inner = {n.removeprefix(TRUNK): s for n, s in shapes.items() if n.startswith(TRUNK)}
    pool = {'map': 'map', 'avg': 'avg', 'token': 'token', '': None}.get(
        vision.get('timm_pool', 'avg')
    )
    args = {'global_pool': pool} if pool else {}
    args |= {'img_size': given['image_size']} if given.get('image_size') else {}
    settings, meta, layout = timm_vit.settings_of(
        'timm', inner, {'architecture': name, 'model_args': args}, given, where
    )
    head = 'visual.head.proj'
    settings['num_classes'] = shapes.get(f'{head}.weight', (0,))[0]
    settings['head_bias'] = f'{head}.bias' in shapes or not settings['num_classes']
    return settings, {**meta, **images}, {**layout, 'trunk': TRUNK, 'head': head}


def _settings_of_tower(
    shapes: Shapes, model_cfg: Any, vision: Any, given: Any, images: dict[str, Any], where: str
) -> tuple[Settings, dict[str, Any], dict[str, Any]]:
    if not vision and not {'activation', 'num_heads'} <= given.keys():
        raise UserError(
            f'{where}: {CONFIG} must be beside it, or say --set activation=quick_gelu (OpenAI) or '
            '--set activation=gelu, and --set num_heads=N'
        )
    prefix = 'visual.' if 'visual.class_embedding' in shapes else ''
    inner = {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)}
    width, channels, *patch = fit.required_shape(inner, 'conv1.weight')
    norm, act = vision.get('norm_kwargs') or {}, vision.get('act_kwargs') or {}
    activation = 'quick_gelu' if model_cfg.get('quick_gelu') else 'gelu'
    if act.get('approximate') == 'tanh' and activation == 'gelu':
        activation = 'gelu_tanh'
    if vision.get('attentional_pool') or vision.get('pool_type', 'tok') not in ('tok', 'avg'):
        raise UserError(f'{where}: big_vit has no such pooling as its vision_cfg says')
    settings: Settings = {
        'patch_size': tuple(patch),
        'width': width,
        'depth': depth_of(inner, r'transformer\.resblocks\.(\d+)\.', where),
        'mlp_dim': fit.required_shape(inner, 'transformer.resblocks.0.mlp.c_fc.weight')[0],
        'num_heads': given.get('num_heads') or width // vision.get('head_width', 64),
        'norm_eps': float(norm.get('eps', 1e-5)),
        'activation': activation,
        'embedding_bias': False,
        'class_token': True,
        'posemb': 'learned',
        'pre_norm': 'ln_pre.weight' in inner,
        'pool': 'gap' if vision.get('pool_type') == 'avg' else 'cls',
        'norm_after_pool': bool(vision.get('final_ln_after_pool')),
        'num_classes': inner.get('proj', (0, 0))[1],
        'head_bias': False,
    }
    if 'transformer.resblocks.0.ls_1.gamma' in inner:
        settings['layer_scale'] = float(vision.get('ls_init_value') or 1e-5)
    tokens = fit.required_shape(inner, 'positional_embedding')[0]
    settings['posemb_prefix'], size = fit.prefix_and_image_size(
        tokens, (1,), settings, given.get('image_size'), where
    )
    meta = {'image_size': size, 'channels': channels, 'architecture': None, **images}
    return settings, meta, {'prefix': prefix, 'trunk': ''}


def convert(model: Model, architecture: str | None) -> tuple[Model, dict[str, Any]]:
    """Convert the model to one that open_clip can hold.

    Args:
      architecture: a timm model that computes this one, for a tower that is implemented by timm.

    Returns:
      The converted model, and its layout in the file.

    Raises:
      UserError: open_clip cannot hold it.
    """
    settings = model.settings
    if architecture or 'cls' not in model.params:
        return _convert_trunk(model, architecture or _siglip_name(settings, model.meta))
    fit.require(
        model, 'open_clip', norm=('layernorm',), mlp=('mlp',), parallel=(False,), lsa=(False,),
        qk_norm=(False,), registers=(0,), representation=(0,), pool=('cls', 'gap'), stride=(None,),
        posemb=('learned', 'sincos2d', 'sincos2d_mae', 'none'), tokenizer=('patches',),
        head_dim=(None,), activation=('gelu', 'gelu_tanh', 'quick_gelu'),
    )  # fmt: skip
    if model.meta['channels'] != 3:
        raise UserError(
            f'--to open_clip: images have 3 channels there, not {model.meta["channels"]}'
        )
    model = fit.without_embedding_bias(fit.with_prefix(fit.with_position_table(model), 1))
    if settings['num_classes']:
        model = fit.without_head_bias(model, 'open_clip')
    else:  # A tower always has a projection.
        eye = np.eye(settings['width'], dtype=np.float32)
        model = model.with_params(
            {**model.params, 'head/kernel': eye}, num_classes=settings['width'], head_bias=False
        )
    return fit.with_biases(model), {'prefix': 'visual.', 'trunk': ''}


def _convert_trunk(model: Model, architecture: str) -> tuple[Model, dict[str, Any]]:
    converted, _ = timm_vit.convert('timm', model)
    if converted.settings['num_classes'] and model.settings['head_bias']:
        raise UserError(
            "--to open_clip: its projection has no bias; --drop 'head/.*' leaves it out"
        )
    if model.settings['num_classes']:
        converted = fit.without_head_bias(converted, 'open_clip')
    layout = {
        'distilled': False,
        'trunk': TRUNK,
        'head': 'visual.head.proj',
        'architecture': architecture,
    }
    return converted, layout


_SIGLIP = {
    (768, 12, 12, 3072, 16, 'gelu'): ('vit_base_patch16_siglip_{}', (224, 256, 384, 512)),
    (1024, 24, 16, 4096, 16, 'gelu'): ('vit_large_patch16_siglip_{}', (256, 384)),
    (1024, 24, 16, 4096, 16, 'gelu_tanh'): ('vit_large_patch16_siglip_{}', (512,)),
    (1152, 27, 16, 4304, 14, 'gelu'): ('vit_so400m_patch14_siglip_{}', (224, 378, 384)),
    (1152, 27, 16, 4304, 16, 'gelu_tanh'): ('vit_so400m_patch16_siglip_{}', (256, 384, 512)),
    (768, 12, 12, 3072, 32, 'gelu_tanh'): ('vit_base_patch32_siglip_{}', (256,)),
    (1536, 40, 16, 6144, 16, 'gelu_tanh'): ('vit_giantopt_patch16_siglip_{}', (256, 384)),
}


def _siglip_name(settings: Mapping[str, Any], meta: Mapping[str, Any]) -> str:
    """Return the timm model with these sizes; open_clip builds a trunk from its name."""
    key = tuple(settings[name] for name in ('width', 'depth', 'num_heads', 'mlp_dim'))
    patch = settings['patch_size'][0]
    trunk = _SIGLIP.get((*key, patch, settings['activation']))
    if settings['pool'] != 'map' or trunk is None:
        raise UserError(
            '--to open_clip: without a class token it has SigLIP towers of the published sizes '
            "only (pool='map' and the activation of timm's model of that size), or a timm model "
            'that you name: --architecture NAME'
        )
    name, image_sizes = trunk
    side = meta['image_size'][0]
    return name.format(side if side in image_sizes else image_sizes[0])


def config_of(model: Model, layout: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the JSON files that go beside the weights, by name."""
    settings, meta = model.settings, model.meta
    int_or_pair = lambda pair: pair[0] if pair[0] == pair[1] else list(pair)  # noqa: E731
    vision: dict[str, Any] = {'image_size': int_or_pair(meta['image_size'])}
    quick = settings['activation'] == 'quick_gelu'
    if layout['trunk']:
        pools = {'map': 'map', 'gap': 'avg', 'cls': 'token'}
        vision |= {
            'timm_model_name': layout['architecture'],
            'timm_model_pretrained': False,
            'timm_pool': pools[settings['pool']],
            'timm_proj': 'linear' if settings['num_classes'] else 'none',
        }
        quick = False
    else:
        vision |= {
            'layers': settings['depth'],
            'width': settings['width'],
            'head_width': settings['width'] // settings['num_heads'],
            'mlp_ratio': timm_vit.ratio(settings['mlp_dim'], settings['width']),
            'patch_size': int_or_pair(settings['patch_size']),
            'ls_init_value': settings['layer_scale'] or None,
            'no_ln_pre': not settings['pre_norm'],
            'final_ln_after_pool': settings['norm_after_pool'],
            'pool_type': 'avg' if settings['pool'] == 'gap' else 'tok',
        }
        if settings['norm_eps'] != 1e-5:
            vision['norm_kwargs'] = {'eps': settings['norm_eps']}
        if settings['activation'] == 'gelu_tanh':
            vision['act_kwargs'] = {'approximate': 'tanh'}
    embed = settings['num_classes'] or settings['width']
    tower = {'embed_dim': embed, 'vision_cfg': vision, 'quick_gelu': quick}
    return {CONFIG: {'model_cfg': tower, 'preprocess_cfg': _images_of(meta)}}


def _images_of(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is done to pictures; raises UserError for a crop, which there is no word for."""
    mode, size = pictures.crop_mode(meta), tuple(meta['image_size'])
    interpolation = meta.get('interpolation') or 'bicubic'
    if pictures.scaled(meta) != size or (mode == 'center' and size[0] != size[1]):
        rows, columns = pictures.scaled(meta)
        raise UserError(
            f'--to open_clip: pictures are resized to {rows}x{columns} ({mode}) and their middle '
            f'of {size[0]}x{size[1]} is cut out, and it has no word for that; --transform TEXT '
            f"says what is written instead, as in 'resize_small({min(size)}) | central_crop(size)'"
        )
    if interpolation not in ('bicubic', 'bilinear'):
        raise UserError(
            f'--to open_clip: it resizes by bicubic or bilinear, not by {interpolation}; '
            "--transform TEXT says what is written instead, as in 'resize(size)'"
        )
    return {
        'size': list(size),
        'mean': list(meta.get('mean') or _MEAN),
        'std': list(meta.get('std') or _STD),
        'interpolation': interpolation,
        'resize_mode': {'center': 'shortest', 'squash': 'squash', 'border': 'longest'}[mode],
    }
