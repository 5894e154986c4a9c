"""Hugging Face's detectors: DETR, with the frozen batch norms of its ResNet folded, and YOLOS.

Ours is what `task.name='detection'` makes of a trunk: the trunk is read and written as one of other
formats is, and what finds objects beside it is `Weights.learnt`. Names of arrays are those of files
on the hub; transformers 5.x has others in memory, which are read too.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from big_vit.errors import UserError
from big_vit.interop import class_names, huggingface, layout
from big_vit.interop.fit import ATTENTION, Model, Settings
from big_vit.interop.layout import Arrays, Row, Rule, Shapes
from big_vit.interop.weights import Learnt

TYPES = {'detr': 'hf_detr', 'yolos': 'hf_yolos'}
FORMATS = tuple(TYPES.values())
_EPSILON = 1e-5  # Of frozen batch norms, in all codebases.
_CANVAS = (1344, 1344)  # DETR's pictures are at most 1333 long, whichever side that is.
_RESNETS = {'resnet26': (2, 2, 2, 2), 'resnet50': (3, 4, 6, 3), 'resnet101': (3, 4, 23, 3)}
_BACKBONE = 'model.backbone.conv_encoder.model'
_NEWER = (
    (r'^model\.backbone\.(model\.)?(?!conv_encoder)', f'{_BACKBONE}.'),
    (r'\.o_proj\.', '.out_proj.'),
    (r'(layers\.\d+)\.mlp\.(fc[12])\.', r'\1.\2.'),
)
_BLOCK, _DECODER = 'Transformer/encoderblock_{i}', 'decoder/Transformer/encoderblock_{i}'
_PROJECTIONS = {'query': 'q_proj', 'key': 'k_proj', 'value': 'v_proj', 'out': 'out_proj'}
# What is beside the trunk, by format, and the array that a file of it cannot be without.
_BESIDE = {
    'hf_detr': (
        r'(model\.)?(decoder|query_position_embeddings)\..*|class_labels_classifier\..*'
        r'|bbox_predictor\..*',
        'class_labels_classifier.weight',
    ),
    'hf_yolos': (
        r'(vit\.)?embeddings\.detection_tokens|class_labels_classifier\..*|bbox_predictor\..*',
        'class_labels_classifier.layers.0.weight',
    ),
}
_TOKENS, _TABLE = 'vit.embeddings.detection_tokens', 'vit.embeddings.position_embeddings'


def split(format: str, arrays: Arrays, where: str) -> tuple[Arrays, Arrays]:
    """The arrays of the trunk, and of what finds objects beside it; of other formats nothing is.

    Batch norms are folded: `weight` and `bias` are then the factor and the offset of a channel.

    Raises:
      UserError: it is a model of the same family without boxes, or with masks.
    """
    if format not in FORMATS:
        return arrays, {}
    pattern, sign = _BESIDE[format]
    if sign not in arrays:
        raise UserError(
            f'{where}: there is no {sign} in it: only models for detection can be read of {format}'
        )
    if format == 'hf_detr':
        arrays = _folded({_released(name): array for name, array in arrays.items()}, where)
    else:
        renamed = huggingface.newer_names('hf_vit', arrays)
        arrays = {renamed.get(name, name): array for name, array in arrays.items()}
        if any('mid_position_embeddings' in name for name in arrays):
            raise UserError(
                f'{where}: has positions that are added after each block '
                '(use_mid_position_embeddings), which big_vit has not: yolos-tiny has none'
            )
        queries = arrays[_TOKENS].shape[1]
        table = arrays[_TABLE]
        # A token and its position are one: nothing else tells queries apart.
        arrays |= {_TOKENS: arrays[_TOKENS] + table[:, -queries:], _TABLE: table[:, :-queries]}
    beside = {name for name in arrays if re.fullmatch(pattern, name)}
    trunk = {name: array for name, array in arrays.items() if name not in beside}
    return trunk, {name: array for name, array in arrays.items() if name in beside}


def _released(name: str) -> str:
    """The name that files on the hub have."""
    for pattern, other in _NEWER:
        name = re.sub(pattern, other, name)
    return name


def _folded(arrays: Arrays, where: str) -> Arrays:
    """The arrays with batch norms as a factor and an offset of each channel."""
    folded = {n: x for n, x in arrays.items() if not re.search(r'running_|num_batches', n)}
    for name in (n for n in arrays if n.endswith('.running_var')):
        norm = name.removesuffix('running_var')
        try:
            weight, bias, mean, variance = (
                arrays[norm + part].astype(np.float64)
                for part in ('weight', 'bias', 'running_mean', 'running_var')
            )
        except KeyError as error:
            raise UserError(f'{where}: there is no {error.args[0]} beside {name}') from None
        scale = weight / np.sqrt(variance + _EPSILON)
        folded[f'{norm}weight'] = scale.astype(np.float32)
        folded[f'{norm}bias'] = (bias - mean * scale).astype(np.float32)
    return folded


def _attention_rows(ours: str, theirs: str) -> list[Row]:
    return [(f'{ours}/{o}', f'{theirs}.{t}.{{leaf}}') for o, t in _PROJECTIONS.items()]


def _backbone(layers: Sequence[int]) -> list[Row]:
    rows: list[Row] = [
        ('stem/conv_root/conv', f'{_BACKBONE}.conv1.{{leaf}}'),
        ('stem/conv_root', f'{_BACKBONE}.bn1.{{leaf}}'),
    ]
    for stage, units in enumerate(layers):
        for unit in range(units):
            ours = f'stem/stage{stage + 1}_unit{unit + 1}'
            theirs = f'{_BACKBONE}.layer{stage + 1}.{unit}'
            for i in (1, 2, 3):
                rows.append((f'{ours}/conv{i}/conv', f'{theirs}.conv{i}.{{leaf}}'))
                rows.append((f'{ours}/conv{i}', f'{theirs}.bn{i}.{{leaf}}'))
            rows.append((f'{ours}/shortcut/conv', f'{theirs}.downsample.0.{{leaf}}'))
            rows.append((f'{ours}/shortcut', f'{theirs}.downsample.1.{{leaf}}'))
    return rows


def _trunk_of_detr(layers: Sequence[int]) -> list[Row]:
    layer = 'model.encoder.layers.{i}'
    return [
        *_backbone(layers),
        ('embedding', 'model.input_projection.{leaf}'),
        *_attention_rows(f'{_BLOCK}/{ATTENTION}', f'{layer}.self_attn'),
        (f'{_BLOCK}/LayerNorm_0', f'{layer}.self_attn_layer_norm.{{leaf}}'),
        (f'{_BLOCK}/MlpBlock_0/Dense_0', f'{layer}.fc1.{{leaf}}'),
        (f'{_BLOCK}/MlpBlock_0/Dense_1', f'{layer}.fc2.{{leaf}}'),
        (f'{_BLOCK}/LayerNorm_1', f'{layer}.final_layer_norm.{{leaf}}'),
    ]


def _decoder_of_detr() -> list[Row]:
    layer = 'model.decoder.layers.{i}'
    return [
        ('decoder/queries', 'model.query_position_embeddings.weight'),
        *_attention_rows(f'{_DECODER}/{ATTENTION}', f'{layer}.self_attn'),
        (f'{_DECODER}/LayerNorm_0', f'{layer}.self_attn_layer_norm.{{leaf}}'),
        *_attention_rows(f'{_DECODER}/CrossAttention_0', f'{layer}.encoder_attn'),
        (f'{_DECODER}/LayerNorm_2', f'{layer}.encoder_attn_layer_norm.{{leaf}}'),
        (f'{_DECODER}/MlpBlock_0/Dense_0', f'{layer}.fc1.{{leaf}}'),
        (f'{_DECODER}/MlpBlock_0/Dense_1', f'{layer}.fc2.{{leaf}}'),
        (f'{_DECODER}/LayerNorm_1', f'{layer}.final_layer_norm.{{leaf}}'),
        ('decoder/norm', 'model.decoder.layernorm.{leaf}'),
        ('class_head/Dense_0', 'class_labels_classifier.{leaf}'),
        *_mlp('box_head', 'bbox_predictor'),
    ]


def _mlp(ours: str, theirs: str) -> list[Row]:
    return [(f'{ours}/Dense_{i}', f'{theirs}.layers.{i}.{{leaf}}') for i in range(3)]


def _beside_yolos() -> list[Row]:
    return [
        ('detection_tokens', _TOKENS),
        *_mlp('class_head', 'class_labels_classifier'),
        *_mlp('box_head', 'bbox_predictor'),
    ]


def rules_of(
    format: str, settings: Mapping[str, Any], shapes: Shapes, file_layout: Mapping[str, Any]
) -> list[Rule]:
    """Return the rules that map the trunk's parameters of these shapes to the file."""
    if format == 'hf_yolos':
        return huggingface.rules_of('hf_vit', settings, shapes, file_layout)
    table = _trunk_of_detr(settings['resnet'])
    return layout.torch_rules(table, shapes, depth=settings['depth'])


def settings_of(
    format: str, shapes: Shapes, config: Mapping[str, Any], given: Mapping[str, Any], where: str
) -> tuple[Settings, dict[str, Any], dict[str, Any]]:
    """Derive settings, metadata and layout of the trunk from config.json.

    Raises:
      UserError: the config is missing or describes something that big_vit does not have.
    """
    if format == 'hf_yolos':
        settings, meta, file_layout = huggingface.settings_of(
            'hf_vit', shapes, config, given, where
        )
        return {**settings, 'num_classes': 0}, meta, file_layout
    if not config:
        raise UserError(
            f'{where}: config.json must be beside it: it says the number of heads and of blocks'
        )
    activation = config.get('activation_function', 'relu')
    if activation not in huggingface.ACTIVATIONS:
        raise UserError(f'{where}: activation_function {activation!r} is not one that big_vit has')
    if config.get('position_embedding_type', 'sine') != 'sine':
        raise UserError(f"{where}: big_vit has DETR's sine positions only, not its learned ones")
    for side in ('num_attention_heads', 'attention_heads', 'ffn_dim'):
        if config.get(f'encoder_{side}') != config.get(f'decoder_{side}'):
            raise UserError(f'{where}: encoder_{side} and decoder_{side} differ, here they do not')
    settings = {
        'tokenizer': 'frozen_resnet',
        'resnet': _resnet_of(shapes, config, where),
        'patch_size': (32, 32),
        'width': config.get('d_model', 256),
        'depth': config.get('encoder_layers', 6),
        'mlp_dim': config.get('encoder_ffn_dim', 2048),
        'num_heads': config.get('encoder_attention_heads', 8),
        'activation': huggingface.ACTIVATIONS[activation],
        'norm_eps': 1e-5,
        'post_norm': True,
        'posemb': 'sincos2d_detr',
        'posemb_per_block': True,
        'num_classes': 0,
    }
    meta = {
        'image_size': given.get('image_size') or _CANVAS,
        'channels': 3,
        'mean': (0.485, 0.456, 0.406),
        'std': (0.229, 0.224, 0.225),
        'architecture': next(iter(config.get('architectures') or []), None),
        'licence': config.get('license'),
        'source': config.get('_name_or_path') or None,
    }
    return settings, meta, {}


def _resnet_of(shapes: Shapes, config: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """The units of each stage; UserError for a backbone that is none of ours."""
    if config.get('dilation'):
        raise UserError(f'{where}: its last stage is dilated (DC5), which big_vit has not')
    stages: dict[int, int] = {}
    for name in shapes:
        if match := re.match(rf'{re.escape(_BACKBONE)}\.layer(\d)\.(\d+)\.conv3\.weight', name):
            stages[int(match[1])] = max(stages.get(int(match[1]), 0), int(match[2]) + 1)
    units = tuple(stages[i] for i in sorted(stages))
    if units not in _RESNETS.values():
        known = ', '.join(_RESNETS)
        raise UserError(f"{where}: its backbone is none of timm's {known}, with bottleneck units")
    return units


def read(
    format: str, arrays: Arrays, settings: Mapping[str, Any], config: Mapping[str, Any], where: str
) -> Learnt:
    """What finds objects, under our names, and the keys of `task` that describe it.

    Args:
      arrays: as `split` gives them.
      settings: of the trunk.

    Raises:
      UserError: arrays are missing or of another shape.
    """
    where = f'{where}: what finds objects'
    task: dict[str, Any] = {'name': 'detection'}
    for ours, theirs in _COEFFICIENTS.items():
        if theirs in config:
            task[ours] = float(config[theirs])
    if format == 'hf_yolos':
        task |= {'query_place': 'trunk', 'class_layers': 3, 'queries': arrays[_TOKENS].shape[1]}
        last, depth = 'class_labels_classifier.layers.2.weight', 0
    else:
        queries = layout_shape(arrays, 'model.query_position_embeddings.weight', where)[0]
        depth = layout.depth_of(arrays, r'model\.decoder\.layers\.(\d+)\.', where)
        task |= {'queries': queries, 'decoder_depth': depth}
        last = 'class_labels_classifier.weight'
    classes = layout_shape(arrays, last, where)[0] - 1
    shapes = shapes_beside(settings, task, classes)
    rules = _rules_beside(format, shapes, depth)
    layout.check(rules, arrays, where)
    return Learnt(task, layout.to_ours(rules, arrays))


# Weights of losses by their keys here and in config.json.
_COEFFICIENTS = {
    'l1_weight': 'bbox_loss_coefficient',
    'giou_weight': 'giou_loss_coefficient',
    'no_object_weight': 'eos_coefficient',
}
# Here they are those of the matching too.
_COSTS = {'l1_weight': 'bbox_cost', 'giou_weight': 'giou_cost'}


def layout_shape(arrays: Arrays, name: str, where: str) -> tuple[int, ...]:
    """The shape of a required array.

    Raises:
      UserError: it is missing.
    """
    if name not in arrays:
        raise UserError(f'{where}: there is no {name} in it')
    return arrays[name].shape


def classes_of(learnt: Learnt | None) -> int:
    """How many classes of objects it tells apart; 0 for what finds none."""
    if learnt is None or learnt.task.get('name') != 'detection':
        return 0
    last = learnt.task.get('class_layers', 1) - 1
    return int(learnt.params[f'class_head/Dense_{last}/bias'].shape[0]) - 1


def _rules_beside(format: str, shapes: Shapes, depth: int) -> list[Rule]:
    table = _decoder_of_detr() if format == 'hf_detr' else _beside_yolos()
    flat = ['model.query_position_embeddings.weight']
    return layout.torch_rules(table, shapes, flat, depth=depth)


def shapes_beside(settings: Mapping[str, Any], task: Mapping[str, Any], classes: int) -> Shapes:
    """Shapes of what a detector adds to a trunk, one set for each block of its decoder."""
    width = settings['width']
    layers = {'class_head': (task.get('class_layers', 1), classes + 1), 'box_head': (3, 4)}
    shapes: Shapes = {}
    for name, (count, outputs) in layers.items():
        for i in range(count):
            out = outputs if i == count - 1 else width
            shapes[f'{name}/Dense_{i}/kernel'] = width, out
            shapes[f'{name}/Dense_{i}/bias'] = (out,)
    if task.get('query_place') == 'trunk':
        return {**shapes, 'detection_tokens': (1, task['queries'], width)}
    heads, hidden = settings['num_heads'], settings['mlp_dim']
    head = width // heads
    shapes['decoder/queries'] = (1, task['queries'], width)
    norms = ['decoder/norm']
    for i in range(task['decoder_depth']):
        block = _DECODER.format(i=i)
        norms += [f'{block}/LayerNorm_{n}' for n in range(3)]
        for attention in (ATTENTION, 'CrossAttention_0'):
            for part in ('query', 'key', 'value'):
                shapes[f'{block}/{attention}/{part}/kernel'] = (width, heads, head)
                shapes[f'{block}/{attention}/{part}/bias'] = (heads, head)
            shapes[f'{block}/{attention}/out/kernel'] = (heads, head, width)
            shapes[f'{block}/{attention}/out/bias'] = (width,)
        for dense, (rows, columns) in {
            'Dense_0': (width, hidden),
            'Dense_1': (hidden, width),
        }.items():
            shapes[f'{block}/MlpBlock_0/{dense}/kernel'] = (rows, columns)
            shapes[f'{block}/MlpBlock_0/{dense}/bias'] = (columns,)
    for name in norms:
        shapes |= {f'{name}/scale': (width,), f'{name}/bias': (width,)}
    return shapes


def convert(format: str, model: Model, learnt: Learnt | None) -> tuple[Model, dict[str, Any]]:
    """Check that transformers can hold a detector.

    Returns:
      The trunk as it is written, and its layout in the file.

    Raises:
      UserError: it cannot.
    """
    if not classes_of(learnt):
        raise UserError(f"--to {format}: it is of models of task.name='detection' only")
    assert learnt is not None
    task, settings = learnt.task, model.settings
    place, layers = task.get('query_place', 'decoder'), task.get('class_layers', 1)
    if format == 'hf_yolos':
        if place != 'trunk' or layers != 3:
            raise UserError(
                f'--to {format}: its queries are in the trunk and its head of classes has 3 layers '
                "(task.query_place='trunk', task.class_layers=3); --to hf_detr has a decoder"
            )
        written, file_layout = huggingface.convert('hf_vit', model)
        return written, {**file_layout, 'prefix': 'vit.'}
    width = learnt.params['decoder/queries'].shape[-1] if place == 'decoder' else 0
    wanted = {
        'tokenizer': 'frozen_resnet',
        'posemb': 'sincos2d_detr',
        'posemb_per_block': True,
        'post_norm': True,
        'norm': 'layernorm',
        'norm_eps': 1e-5,
        'layer_scale': 0.0,
        'mlp': 'mlp',
        'head_dim': None,
        'qkv_bias': True,
        'key_bias': True,
        'registers': 0,
        'class_token': False,
        'pool': 'gap',
    }
    other = [f'model.{n}={settings[n]!r}' for n, value in wanted.items() if settings[n] != value]
    if width != settings['width'] or layers != 1:
        other.append('task: a decoder as wide as the trunk and class_layers=1')
    heads = task.get('decoder_heads')
    if heads not in (None, settings['num_heads']):
        other.append(f'task.decoder_heads={heads}')
    if settings['resnet'] not in _RESNETS.values():
        other.append(f'a ResNet of {settings["resnet"]} units')
    if other:
        raise UserError(f'--to hf_detr: transformers has DETR alone, and not {", ".join(other)}')
    return model, {}


def arrays_of(
    format: str, arrays: Arrays, settings: Mapping[str, Any], learnt: Learnt
) -> tuple[Arrays, Arrays]:
    """All arrays of a file, given those of the trunk; and those that mean nothing."""
    rules = _rules_beside(
        format,
        {name: array.shape for name, array in learnt.params.items()},
        learnt.task.get('decoder_depth', 6),
    )
    arrays = {**arrays, **layout.to_theirs(rules, dict(learnt.params))}
    if format == 'hf_yolos':
        table, queries = arrays[_TABLE], arrays[_TOKENS]
        # As it is read, a query's position is part of its token.
        return arrays | {_TABLE: np.concatenate([table, np.zeros_like(queries)], axis=1)}, {}
    constants: Arrays = {}
    for name in [n for n in arrays if re.fullmatch(r'.*(\.bn\d|downsample\.1)\.weight', n)]:
        norm = name.removesuffix('weight')
        constants[f'{norm}running_mean'] = np.zeros_like(arrays[name])
        constants[f'{norm}running_var'] = np.full_like(arrays[name], 1 - _EPSILON)
    return arrays, constants


def config_of(
    format: str, model: Model, file_layout: Mapping[str, Any], learnt: Learnt
) -> dict[str, dict[str, Any]]:
    """Return the JSON files that go beside the weights, by name."""
    settings, task, meta = model.settings, learnt.task, model.meta
    classes = classes_of(learnt)
    names = class_names.complete(meta, classes) or [f'LABEL_{i}' for i in range(classes)]
    config: dict[str, Any] = {}
    for ours, theirs in (*_COEFFICIENTS.items(), *_COSTS.items()):
        value = task.get(ours)
        # Theirs takes whole numbers alone for all but one; they are read in training only.
        if value is not None and (value == int(value) or theirs == 'eos_coefficient'):
            config[theirs] = float(value) if theirs == 'eos_coefficient' else int(value)
    config['id2label'] = {str(i): name for i, name in enumerate(names)}
    config['label2id'] = {name: names.index(name) for name in names}
    if format == 'hf_yolos':
        files = huggingface.config_of('hf_vit', model, file_layout)
        own = files['config.json'] | config
        size = list(meta['image_size'])
        own |= {'architectures': ['YolosForObjectDetection'], 'model_type': 'yolos'}
        own |= {
            'image_size': size,
            'num_detection_tokens': learnt.params['detection_tokens'].shape[1],
        }
        own['use_mid_position_embeddings'] = False
        processor: dict[str, Any] = {'image_processor_type': 'YolosImageProcessor'}
    else:
        backbone = next(name for name, units in _RESNETS.items() if units == settings['resnet'])
        own = config | {
            'architectures': ['DetrForObjectDetection'],
            'model_type': 'detr',
            'dtype': 'float32',
            'd_model': settings['width'],
            'num_queries': learnt.params['decoder/queries'].shape[1],
            'activation_function': huggingface.TO_ACTIVATION[settings['activation']],
            'backbone_config': {
                'model_type': 'timm_backbone',
                'backbone': backbone,
                'features_only': True,
                'out_indices': [1, 2, 3, 4],
                'num_channels': 3,
                'use_pretrained_backbone': False,
            },
        }
        depths = {'encoder': settings['depth'], 'decoder': task.get('decoder_depth', 6)}
        for part, depth in depths.items():
            own[f'{part}_layers'] = depth
            own[f'{part}_ffn_dim'] = settings['mlp_dim']
            own[f'{part}_attention_heads'] = settings['num_heads']
        processor = {'image_processor_type': 'DetrImageProcessor'}
    short, long = min(meta['image_size']), max(meta['image_size'])
    edges = {'shortest_edge': min(short, 800), 'longest_edge': min(long, 1333)}
    processor |= {'size': edges, 'do_pad': True}
    mean, std = meta.get('mean'), meta.get('std')
    if mean and std:
        processor |= {'image_mean': list(mean), 'image_std': list(std)}
    return {'config.json': own, 'preprocessor_config.json': processor}
