"""Hugging Face's formats of vision models.

ViT, DeiT, DINOv2 (with registers), SigLIP's vision tower, DINOv3, ViTMAE and I-JEPA. A folder has
model.safetensors and config.json, which says everything that arrays do not. Names are those of
transformers 4.x, which 5.x still reads and writes, except that 5.x leaves out SigLIP's
`vision_model.`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from big_vit.errors import UserError
from big_vit.interop import class_names, fit, pictures
from big_vit.interop.fit import ATTENTION, Model, Settings
from big_vit.interop.layout import Arrays, Row, Rule, Shapes, torch_rules

# Our format by the model_type of a config. Below: prefixes of an encoder inside a larger model.
TYPES = {
    'vit': 'hf_vit',
    'deit': 'hf_deit',
    'vit_mae': 'hf_mae',
    'ijepa': 'hf_ijepa',
    'dinov2': 'hf_dinov2',
    'dinov2_with_registers': 'hf_dinov2_reg',
    'siglip': 'hf_siglip',
    'siglip_vision_model': 'hf_siglip',
    'dinov3_vit': 'hf_dinov3',
}
FORMATS = tuple(dict.fromkeys(TYPES.values()))
_PREFIXES = {
    'hf_vit': ('vit.',),
    'hf_deit': ('deit.',),
    'hf_mae': ('vit.',),
    'hf_ijepa': ('ijepa.',),
    'hf_dinov2': ('dinov2.',),
    'hf_dinov2_reg': ('dinov2_with_registers.',),
    'hf_siglip': ('vision_model.',),
    'hf_dinov3': ('dinov3_vit.', 'model.'),
}
PREFIXES = tuple(dict.fromkeys(prefix for some in _PREFIXES.values() for prefix in some))
ACTIVATIONS = {
    'gelu': 'gelu',
    'gelu_python': 'gelu',
    'gelu_pytorch_tanh': 'gelu_tanh',
    'gelu_new': 'gelu_tanh',
    'gelu_fast': 'gelu_tanh',
    'quick_gelu': 'quick_gelu',
    'relu': 'relu',
    'silu': 'silu',
    'swish': 'silu',
}
TO_ACTIVATION = {
    'gelu': 'gelu',
    'gelu_tanh': 'gelu_pytorch_tanh',
    'quick_gelu': 'quick_gelu',
    'relu': 'relu',
    'silu': 'silu',
}
# What a filter is called elsewhere, and its number in Pillow.
_RESAMPLE = {'nearest': 0, 'lanczos': 1, 'bilinear': 2, 'bicubic': 3, 'box': 4, 'hamming': 5}
# transformers 5.x renames the parts of a ViT block in memory, and some files have those names.
_NEWER = (
    (r'(^|\.)layers\.(\d+)\.attention\.q_proj\.', r'\1encoder.layer.\2.attention.attention.query.'),
    (r'(^|\.)layers\.(\d+)\.attention\.k_proj\.', r'\1encoder.layer.\2.attention.attention.key.'),
    (r'(^|\.)layers\.(\d+)\.attention\.v_proj\.', r'\1encoder.layer.\2.attention.attention.value.'),
    (r'(^|\.)layers\.(\d+)\.attention\.o_proj\.', r'\1encoder.layer.\2.attention.output.dense.'),
    (r'(^|\.)layers\.(\d+)\.mlp\.fc1\.', r'\1encoder.layer.\2.intermediate.dense.'),
    (r'(^|\.)layers\.(\d+)\.mlp\.fc2\.', r'\1encoder.layer.\2.output.dense.'),
    (r'(^|\.)layers\.(\d+)\.(layernorm_\w+)\.', r'\1encoder.layer.\2.\3.'),
)
_BLOCK = 'Transformer/encoderblock_{i}'
_MAP = 'MAPHead_0'
_QKV = ('query', 'key', 'value')


def recognises(names: Any) -> str | None:
    """Guess the format of a file without a config, so that the error can ask for one."""
    text = '\n'.join(names)
    signs = {
        'hf_siglip': r'encoder\.layers\.0\.self_attn\.q_proj',
        'hf_dinov3': r'(^|\n|\.)layer\.0\.attention\.q_proj',
        'hf_dinov2_reg': r'embeddings\.register_tokens(.|\n)*encoder\.layer\.0\.layer_scale1',
        'hf_dinov2': r'encoder\.layer\.0\.layer_scale1',
        'hf_deit': r'embeddings\.distillation_token',
        'hf_mae': r'decoder\.decoder_embed',
        'hf_vit': r'embeddings\.patch_embeddings\.projection',
    }
    return next((name for name, sign in signs.items() if re.search(sign, text)), None)


def newer_names(format: str, arrays: Iterable[str]) -> dict[str, str]:
    """Map names of transformers 5.x in the file to those of 4.x, where they differ."""
    if format not in ('hf_vit', 'hf_deit', 'hf_mae', 'hf_ijepa'):
        return {}
    renamed = {}
    for name in arrays:
        for pattern, other in _NEWER:
            renamed_to = re.sub(pattern, other, name)
            if renamed_to != name:
                renamed[name] = renamed_to
                break
    return renamed


def _table(format: str, layout: Mapping[str, Any], gated: bool) -> list[Row]:
    if format == 'hf_siglip':
        rows = _siglip(layout)
    elif format == 'hf_dinov3':
        rows = _dinov3()
    elif format in ('hf_dinov2', 'hf_dinov2_reg'):
        rows = _dinov2(gated)
    else:
        rows = _vit()
    prefix = layout['prefix']
    heads: list[Row] = [
        ('head', ('cls_classifier' if layout['teacher'] else 'classifier') + '.{leaf}'),
        ('head_dist', 'distillation_classifier.{leaf}'),
    ]
    return [(ours, prefix + theirs) for ours, theirs in rows] + heads


def block_rows() -> list[Row]:
    """The rows of a plain block."""
    return [(ours, theirs) for ours, theirs in _vit() if theirs.startswith('encoder.layer.{i}.')]


def _vit() -> list[Row]:
    attention, layer = f'{_BLOCK}/{ATTENTION}', 'encoder.layer.{i}'
    return [
        ('embedding', 'embeddings.patch_embeddings.projection.{leaf}'),
        ('cls', 'embeddings.cls_token'),
        ('registers', 'embeddings.distillation_token'),
        ('pos_embedding', 'embeddings.position_embeddings'),
        (f'{_BLOCK}/LayerNorm_0', f'{layer}.layernorm_before.{{leaf}}'),
        *[(f'{attention}/{name}', f'{layer}.attention.attention.{name}.{{leaf}}') for name in _QKV],
        (f'{attention}/out', f'{layer}.attention.output.dense.{{leaf}}'),
        (f'{_BLOCK}/LayerNorm_1', f'{layer}.layernorm_after.{{leaf}}'),
        (f'{_BLOCK}/MlpBlock_0/Dense_0', f'{layer}.intermediate.dense.{{leaf}}'),
        (f'{_BLOCK}/MlpBlock_0/Dense_1', f'{layer}.output.dense.{{leaf}}'),
        ('Transformer/encoder_norm', 'layernorm.{leaf}'),
        ('pre_logits', 'pooler.dense.{leaf}'),
    ]


def _dinov2(gated: bool) -> list[Row]:
    attention, layer = f'{_BLOCK}/{ATTENTION}', 'encoder.layer.{i}'
    gate_and_up = tuple(f'{_BLOCK}/MlpBlock_0/{name}' for name in ('Dense_gate', 'Dense_0'))
    first: Row = (f'{_BLOCK}/MlpBlock_0/Dense_0', f'{layer}.mlp.fc1.{{leaf}}')
    if gated:
        first = gate_and_up, f'{layer}.mlp.weights_in.{{leaf}}'
    return [
        ('embedding', 'embeddings.patch_embeddings.projection.{leaf}'),
        ('cls', 'embeddings.cls_token'),
        ('registers', 'embeddings.register_tokens'),
        ('pos_embedding', 'embeddings.position_embeddings'),
        (f'{_BLOCK}/LayerNorm_0', f'{layer}.norm1.{{leaf}}'),
        *[(f'{attention}/{name}', f'{layer}.attention.attention.{name}.{{leaf}}') for name in _QKV],
        (f'{attention}/out', f'{layer}.attention.output.dense.{{leaf}}'),
        (f'{_BLOCK}/LayerScale_0/scale', f'{layer}.layer_scale1.lambda1'),
        (f'{_BLOCK}/LayerNorm_1', f'{layer}.norm2.{{leaf}}'),
        first,
        (
            f'{_BLOCK}/MlpBlock_0/Dense_1',
            f'{layer}.mlp.{"weights_out" if gated else "fc2"}.{{leaf}}',
        ),
        (f'{_BLOCK}/LayerScale_1/scale', f'{layer}.layer_scale2.lambda1'),
        ('Transformer/encoder_norm', 'layernorm.{leaf}'),
    ]


def _siglip(layout: Mapping[str, Any]) -> list[Row]:
    attention, layer, pool = f'{_BLOCK}/{ATTENTION}', 'encoder.layers.{i}', f'{_MAP}/{ATTENTION}'
    proj = {'query': 'q_proj', 'key': 'k_proj', 'value': 'v_proj'}
    return [
        ('embedding', 'embeddings.patch_embedding.{leaf}'),
        ('pos_embedding', 'embeddings.position_embedding.weight'),
        (f'{_BLOCK}/LayerNorm_0', f'{layer}.layer_norm1.{{leaf}}'),
        *[(f'{attention}/{name}', f'{layer}.self_attn.{proj[name]}.{{leaf}}') for name in _QKV],
        (f'{attention}/out', f'{layer}.self_attn.out_proj.{{leaf}}'),
        (f'{_BLOCK}/LayerNorm_1', f'{layer}.layer_norm2.{{leaf}}'),
        (f'{_BLOCK}/MlpBlock_0/Dense_0', f'{layer}.mlp.fc1.{{leaf}}'),
        (f'{_BLOCK}/MlpBlock_0/Dense_1', f'{layer}.mlp.fc2.{{leaf}}'),
        ('Transformer/encoder_norm', 'post_layernorm.{leaf}'),
        (f'{_MAP}/probe', 'head.probe'),
        (tuple(f'{pool}/{name}' for name in _QKV), 'head.attention.in_proj_{leaf}'),
        (f'{pool}/out', 'head.attention.out_proj.{leaf}'),
        (f'{_MAP}/LayerNorm_0', 'head.layernorm.{leaf}'),
        (f'{_MAP}/MlpBlock_0/Dense_0', 'head.mlp.fc1.{leaf}'),
        (f'{_MAP}/MlpBlock_0/Dense_1', 'head.mlp.fc2.{leaf}'),
    ]


def _dinov3() -> list[Row]:
    attention, layer = f'{_BLOCK}/{ATTENTION}', 'layer.{i}'
    proj = {'query': 'q_proj', 'key': 'k_proj', 'value': 'v_proj', 'out': 'o_proj'}
    dense = {'Dense_gate': 'gate_proj', 'Dense_0': 'up_proj', 'Dense_1': 'down_proj'}
    return [
        ('embedding', 'embeddings.patch_embeddings.{leaf}'),
        ('cls', 'embeddings.cls_token'),
        ('registers', 'embeddings.register_tokens'),
        (f'{_BLOCK}/LayerNorm_0', f'{layer}.norm1.{{leaf}}'),
        *[(f'{attention}/{o}', f'{layer}.attention.{t}.{{leaf}}') for o, t in proj.items()],
        (f'{_BLOCK}/LayerScale_0/scale', f'{layer}.layer_scale1.lambda1'),
        (f'{_BLOCK}/LayerNorm_1', f'{layer}.norm2.{{leaf}}'),
        *[(f'{_BLOCK}/MlpBlock_0/{o}', f'{layer}.mlp.{t}.{{leaf}}') for o, t in dense.items()],
        (f'{_BLOCK}/LayerScale_1/scale', f'{layer}.layer_scale2.lambda1'),
        ('Transformer/encoder_norm', 'norm.{leaf}'),
    ]


def rules_of(
    format: str, settings: Mapping[str, Any], shapes: Shapes, layout: Mapping[str, Any]
) -> list[Rule]:
    """Return the rules that map our parameters of these shapes to the file."""
    table = _table(format, layout, settings['mlp'] == 'swiglu')
    flat = [f'{layout["prefix"]}embeddings.position_embedding.weight']
    return torch_rules(table, shapes, flat, depth=settings['depth'])


def settings_of(
    format: str, shapes: Shapes, config: Mapping[str, Any], given: Mapping[str, Any], where: str
) -> tuple[Settings, dict[str, Any], dict[str, Any]]:
    """Derive settings, metadata and layout from config.json and the shapes.

    Raises:
      UserError: the config is missing, lacks a key, or describes something that big_vit does not
        have.
    """
    if not config:
        raise UserError(
            f'{where}: config.json must be beside it: it says the number of heads, the epsilon of '
            'norms and the activation'
        )
    about = config
    if isinstance(config.get('vision_config'), Mapping):
        config = {**config['vision_config'], **{k: config[k] for k in ('id2label',) if k in config}}
    prefix = next((p for p in _PREFIXES[format] if any(n.startswith(p) for n in shapes)), '')
    layout = {'prefix': prefix, 'teacher': 'cls_classifier.weight' in shapes}
    classifier = 'cls_classifier' if layout['teacher'] else 'classifier'
    size = _pair(_required(config, 'image_size', where))
    defaults = {'hf_siglip': 1e-6, 'hf_dinov2': 1e-6, 'hf_dinov2_reg': 1e-6, 'hf_dinov3': 1e-5}
    defaults['hf_ijepa'] = 1e-6
    activation = config.get('hidden_act', 'gelu_pytorch_tanh' if format == 'hf_siglip' else 'gelu')
    if activation not in ACTIVATIONS:
        raise UserError(f'{where}: hidden_act {activation!r} is not one that big_vit has')
    settings: Settings = {
        'patch_size': _pair(_required(config, 'patch_size', where)),
        'width': _required(config, 'hidden_size', where),
        'depth': _required(config, 'num_hidden_layers', where),
        'num_heads': _required(config, 'num_attention_heads', where),
        'mlp_dim': config.get('intermediate_size'),
        'norm_eps': float(config.get('layer_norm_eps', defaults.get(format, 1e-12))),
        'activation': ACTIVATIONS[activation],
        'qkv_bias': bool(config.get('qkv_bias', True)),
        'posemb': 'learned',
        'class_token': True,
        'posemb_prefix': 1,
        'pool': 'cls',
        'num_classes': shapes.get(f'{classifier}.weight', (0,))[0],
    }
    kind = {
        'hf_vit': _settings_of_vit,
        'hf_mae': _settings_of_vit,
        'hf_ijepa': _settings_of_ijepa,
        'hf_deit': _settings_of_deit,
        'hf_dinov2': _settings_of_dinov2,
        'hf_dinov2_reg': _settings_of_dinov2,
        'hf_siglip': _settings_of_siglip,
        'hf_dinov3': _settings_of_dinov3,
    }[format]
    settings |= kind(settings, shapes, config, prefix)
    meta = {
        'image_size': given.get('image_size') or size,
        'channels': config.get('num_channels', 3),
        'architecture': next(iter(about.get('architectures') or []), None),
        'licence': about.get('license'),
        'multi_label': about.get('problem_type') == 'multi_label_classification' or None,
        'source': about.get('_name_or_path') or None,
    }
    return settings, meta, layout


def about_images(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of images that preprocessor_config.json gives."""
    about: dict[str, Any] = {}
    for theirs, ours in (('image_mean', 'mean'), ('image_std', 'std')):
        if isinstance(config.get(theirs), list):
            about[ours] = tuple(config[theirs])
    named = {number: name for name, number in _RESAMPLE.items()}
    if config.get('resample') in named:
        about['interpolation'] = named[config['resample']]
    size, crop = config.get('size'), config.get('crop_size')
    if not isinstance(size, Mapping):  # Of old, one number: of the shorter side, or of both.
        kind = str(config.get('image_processor_type') or config.get('feature_extractor_type'))
        size = {'shortest_edge' if kind.startswith(('CLIP', 'Bit')) else 'height': size}
    shortest = size.get('shortest_edge')
    height = shortest or size.get('height')
    target: Any = height, shortest or size.get('width') or height
    if not all(isinstance(side, int) and side > 0 for side in target):
        return about
    about['crop_mode'] = 'center' if shortest else 'squash'
    crop = crop if isinstance(crop, Mapping) else {'height': crop, 'width': crop}
    cut: Any = crop.get('height'), crop.get('width')
    if config.get('do_center_crop') and all(isinstance(side, int) and side > 0 for side in cut):
        about['crop_pct'] = pictures.crop_share(cut, target)
    return about


def _required(config: Mapping[str, Any], key: str, where: str) -> Any:
    if config.get(key) is None:
        raise UserError(f'{where}: its config.json has no {key}')
    return config[key]


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1])) if isinstance(value, list | tuple) else (value, value)


def _settings_of_vit(settings: Settings, shapes: Shapes, config: Any, prefix: str) -> Settings:
    pooler = shapes.get(f'{prefix}pooler.dense.weight', (0,))[0]
    if pooler and config.get('pooler_act', 'tanh') != 'tanh':
        raise UserError(f'config.json: pooler_act {config["pooler_act"]!r} is not one big_vit has')
    return {'representation': pooler}


def _settings_of_ijepa(settings: Settings, shapes: Shapes, config: Any, prefix: str) -> Settings:
    more = {'class_token': False, 'posemb_prefix': 0, 'pool': 'gap'}
    return {**_settings_of_vit(settings, shapes, config, prefix), **more}


def _settings_of_deit(settings: Settings, shapes: Shapes, config: Any, prefix: str) -> Settings:
    pool = 'cls_dist' if 'distillation_classifier.weight' in shapes else 'cls'
    more = {'registers': 1, 'posemb_prefix': 2, 'pool': pool}
    return {**_settings_of_vit(settings, shapes, config, prefix), **more}


def _settings_of_dinov2(settings: Settings, shapes: Shapes, config: Any, prefix: str) -> Settings:
    hidden = int(settings['width'] * config.get('mlp_ratio', 4))
    gated = bool(config.get('use_swiglu_ffn', False))
    registers = shapes.get(f'{prefix}embeddings.register_tokens', (1, 0))[1]
    return {
        'mlp': 'swiglu' if gated else 'mlp',
        'mlp_dim': (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden,
        'layer_scale': float(config.get('layerscale_value', 1.0)) or 1.0,
        'registers': registers,
        'pool': 'cls_gap' if settings['num_classes'] else 'cls',
    }


def _settings_of_siglip(settings: Settings, shapes: Shapes, config: Any, prefix: str) -> Settings:
    more = {'class_token': False, 'posemb_prefix': 0, 'mlp_dim': settings['mlp_dim'] or 3072}
    # SiglipForImageClassification averages the patches even if the file has a pooling head.
    pooled = f'{prefix}head.probe' in shapes and not settings['num_classes']
    return {**more, 'pool': 'map' if pooled else 'gap'}


def _settings_of_dinov3(settings: Settings, shapes: Shapes, config: Any, prefix: str) -> Settings:
    if not all(config.get(key, True) for key in ('proj_bias', 'mlp_bias')):
        raise UserError('config.json: big_vit has no DINOv3 without proj_bias and mlp_bias')
    gated = bool(config.get('use_gated_mlp'))
    if gated and settings['activation'] != 'silu':
        raise UserError('config.json: big_vit gates MLPs with silu only, not with its hidden_act')
    qv_bias = {bool(config.get(key, True)) for key in ('query_bias', 'value_bias')}
    if len(qv_bias) > 1:
        raise UserError('config.json: big_vit has no DINOv3 with only one of query and value_bias')
    return {
        'posemb': 'rope',
        'posemb_prefix': 0,
        'rope_theta': float(config.get('rope_theta', 100.0)),
        'mlp': 'swiglu' if gated else 'mlp',
        'qkv_bias': qv_bias.pop(),
        'key_bias': bool(config.get('key_bias', False)),
        'layer_scale': float(config.get('layerscale_value', 1.0)) or 1.0,
        'registers': shapes.get(f'{prefix}embeddings.register_tokens', (1, 0))[1],
    }


_COMMON: dict[str, tuple[Any, ...]] = dict(
    norm=('layernorm',), parallel=(False,), lsa=(False,), qk_norm=(False,), pre_norm=(False,),
    norm_after_pool=(False,), tokenizer=('patches',), stride=(None,), head_dim=(None,),
)  # fmt: skip
_TABLES = ('learned', 'sincos2d', 'sincos2d_mae', 'none')


def convert(format: str, model: Model) -> tuple[Model, dict[str, Any]]:
    """Convert the model to one that transformers can hold.

    Returns:
      The converted model, and its layout in the file.

    Raises:
      UserError: transformers cannot hold it.
    """
    changes: list[Callable[[Model], Model]] = []
    settings = model.settings
    classes = settings['num_classes']
    allowed = dict(_COMMON)
    if format == 'hf_siglip':
        pool = ('gap',) if classes else ('map',)
        allowed |= dict(posemb=_TABLES, pool=pool, registers=(0,), layer_scale=(0.0,),
                        mlp=('mlp',), representation=(0,))  # fmt: skip
        if 'cls' in model.params:
            raise UserError('--to hf_siglip: it has no class token, this model has one')
        changes = [fit.with_position_table, fit.with_biases]
    elif format == 'hf_dinov3':
        allowed |= dict(posemb=('rope',), pool=('cls',), num_classes=(0,), representation=(0,))
        changes = [fit.with_layer_scale]
    else:
        dinov2 = format in ('hf_dinov2', 'hf_dinov2_reg')
        registers: tuple[Any, ...] = (0,)
        pools: tuple[str, ...] = ('cls',)
        if dinov2:
            pools = ('cls_gap',) if classes else ('cls', 'cls_gap')
            allowed |= dict(representation=(0,))
            registers = tuple(range(1, 1000)) if format == 'hf_dinov2_reg' else (0,)
        else:
            allowed |= dict(mlp=('mlp',), layer_scale=(0.0,))
        if format == 'hf_deit':
            registers, pools = (1,), ('cls', 'cls_dist')
        if format == 'hf_ijepa':
            pools = ('gap',)
            if 'cls' in model.params:
                raise UserError('--to hf_ijepa: it has no class token, this model has one')
        if classes and settings['representation']:
            raise UserError(
                f'--to {format}: a classifier of theirs has no layer between pooling and head '
                "(pre_logits); --drop 'pre_logits/.*' changes the model, --drop 'head/.*' keeps it"
            )
        if format == 'hf_mae':
            allowed |= dict(num_classes=(0,), representation=(0,))
        if format == 'hf_dinov2_reg' and not settings['registers']:
            raise UserError('--to hf_dinov2_reg: this model has no registers; --to hf_dinov2')
        allowed |= dict(posemb=_TABLES, pool=pools, registers=registers)
        count = {'hf_deit': 2, 'hf_ijepa': 0}.get(format, 1)
        changes = [fit.with_position_table, lambda m: fit.with_prefix(m, count)]
        changes += [fit.with_layer_scale] if dinov2 else []
        changes += [fit.with_biases] if settings['qkv_bias'] else []
    fit.require(model, format, **allowed)
    for change in (*changes, fit.with_embedding_bias, fit.with_head_bias):
        model = change(model)
    prefix = ''
    if format == 'hf_siglip' or classes:
        prefix = _PREFIXES[format][0]
    return model, {'prefix': prefix, 'teacher': settings['pool'] == 'cls_dist'}


def constants(format: str, model: Model, layout: Mapping[str, Any]) -> Arrays:
    """Return arrays that a peer requires but that do not affect its output, such as mask tokens."""
    width, arrays = model.settings['width'], {}
    if format == 'hf_dinov3':
        arrays['embeddings.mask_token'] = np.zeros((1, 1, width), np.float32)
        if not model.settings['registers']:
            arrays['embeddings.register_tokens'] = np.zeros((1, 0, width), np.float32)
    if format == 'hf_dinov2_reg':
        arrays['embeddings.mask_token'] = np.zeros((1, width), np.float32)
    return {layout['prefix'] + name: array for name, array in arrays.items()}


def config_of(format: str, model: Model, layout: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the JSON files that go beside the weights, by name.

    Raises:
      UserError: the config has no way to express a setting.
    """
    settings, meta = model.settings, model.meta
    int_or_pair = lambda pair: pair[0] if pair[0] == pair[1] else list(pair)  # noqa: E731
    classes = settings['num_classes']
    config: dict[str, Any] = {
        'architectures': [_class_of(format, settings)],
        'model_type': next(kind for kind, name in TYPES.items() if name == format),
        'dtype': 'float32',
        'hidden_size': settings['width'],
        'num_hidden_layers': settings['depth'],
        'num_attention_heads': settings['num_heads'],
        'image_size': int_or_pair(meta['image_size']),
        'patch_size': int_or_pair(settings['patch_size']),
        'num_channels': meta['channels'],
        'hidden_act': TO_ACTIVATION[settings['activation']],
        'layer_norm_eps': settings['norm_eps'],
    }
    if format in ('hf_dinov2', 'hf_dinov2_reg'):
        gated = settings['mlp'] == 'swiglu'
        ratio = _mlp_ratio(settings['mlp_dim'], settings['width'], gated)
        config |= {'mlp_ratio': ratio, 'use_swiglu_ffn': gated}
        config |= {'layerscale_value': settings['layer_scale'], 'qkv_bias': settings['qkv_bias']}
        if format == 'hf_dinov2':
            config['use_mask_token'] = False
        else:
            config['num_register_tokens'] = settings['registers']
    else:
        config['intermediate_size'] = settings['mlp_dim']
    if format in ('hf_vit', 'hf_deit', 'hf_mae', 'hf_ijepa'):
        config['qkv_bias'] = settings['qkv_bias']
        if settings['representation']:
            config |= {'pooler_act': 'tanh', 'pooler_output_size': settings['representation']}
    if format == 'hf_dinov3':
        config |= {
            'rope_theta': settings['rope_theta'],
            'use_gated_mlp': settings['mlp'] == 'swiglu',
            **({'hidden_act': 'silu'} if settings['mlp'] == 'swiglu' else {}),
            'query_bias': settings['qkv_bias'],
            'value_bias': settings['qkv_bias'],
            'key_bias': settings['qkv_bias'] and settings['key_bias'],
            'proj_bias': True,
            'mlp_bias': True,
            'layerscale_value': settings['layer_scale'],
            'num_register_tokens': settings['registers'],
        }
    if format == 'hf_siglip':
        config['vision_use_head'] = settings['pool'] == 'map'
        config['model_type'] = 'siglip_vision_model'
        if classes:
            config = {
                'architectures': config.pop('architectures'),
                'model_type': 'siglip',
                'vision_config': config,
            }
    if classes:
        names = class_names.complete(meta, classes) or [f'LABEL_{i}' for i in range(classes)]
        config['id2label'] = {str(i): name for i, name in enumerate(names)}
        # Of classes with one name, the first.
        config['label2id'] = {name: names.index(name) for name in names}
        if meta.get('multi_label'):
            config['problem_type'] = 'multi_label_classification'
    files = {'config.json': config}
    if meta.get('mean') and meta.get('std'):
        files['preprocessor_config.json'] = _processor(meta)
    return files


def _processor(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of an image processor; ViT's own has neither a crop nor a shorter side."""
    height, width = meta['image_size']
    rows, columns = pictures.scaled(meta)
    mode = pictures.crop_mode(meta)
    if mode == 'border' or (mode == 'center' and rows != columns):
        raise UserError(
            f'preprocessor_config.json: transformers has no resize of mode {mode!r} to '
            f'{rows}x{columns}; --transform TEXT says what is written instead'
        )
    crops = mode == 'center' or (rows, columns) != (height, width)
    square: dict[str, int] = {'height': rows, 'width': columns}
    crop = {'do_center_crop': True, 'crop_size': {'height': height, 'width': width}}
    return {
        'image_processor_type': 'CLIPImageProcessor' if crops else 'ViTImageProcessor',
        'do_convert_rgb': meta['channels'] == 3,
        'do_resize': True,
        'size': {'shortest_edge': rows} if mode == 'center' else square,
        'resample': _RESAMPLE.get(str(meta.get('interpolation')), 3),
        **(crop if crops else {}),
        'do_rescale': True,
        'rescale_factor': 1 / 255,
        'do_normalize': True,
        'image_mean': list(meta['mean']),
        'image_std': list(meta['std']),
    }


def _class_of(format: str, settings: Mapping[str, Any]) -> str:
    names = {
        'hf_vit': ('ViTModel', 'ViTForImageClassification'),
        'hf_deit': ('DeiTModel', 'DeiTForImageClassification'),
        'hf_mae': ('ViTMAEModel', ''),
        'hf_ijepa': ('IJepaModel', 'IJepaForImageClassification'),
        'hf_dinov2': ('Dinov2Model', 'Dinov2ForImageClassification'),
        'hf_dinov2_reg': ('Dinov2WithRegistersModel', 'Dinov2WithRegistersForImageClassification'),
        'hf_siglip': ('SiglipVisionModel', 'SiglipForImageClassification'),
        'hf_dinov3': ('DINOv3ViTModel', ''),
    }
    if settings['pool'] == 'cls_dist':
        return 'DeiTForImageClassificationWithTeacher'
    return names[format][bool(settings['num_classes'])]


def _mlp_ratio(hidden: int, width: int, gated: bool) -> int:
    """Return the integer ratio from which transformers computes this hidden width.

    A gated MLP has 2/3 of the nominal hidden width, rounded up to a multiple of 8.

    Raises:
      UserError: there is none.
    """
    for ratio in range(1, 65):
        computed = width * ratio
        if gated:
            computed = (int(computed * 2 / 3) + 7) // 8 * 8
        if computed == hidden:
            return ratio
    rule = 'round(2/3 of a multiple of the width) up to 8' if gated else 'a multiple of the width'
    raise UserError(
        f'--to hf_dinov2: mlp_dim={hidden} must be {rule} ({width}), it can say no other'
    )
