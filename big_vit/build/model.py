"""The `model` and `streams` sections as a Flax module."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from big_vit import sharding
from big_vit.config import Config
from big_vit.errors import UserError
from big_vit.models import positions, tokenizers, variants
from big_vit.models.tokenizers import Stream
from big_vit.models.vit import ViT


def parts_read(config: Config) -> tuple[str, ...]:
    """The parts of a batch that the model takes."""
    return tuple(dict.fromkeys(stream.reads for stream in build_streams(config)))


def is_apart(config: Config) -> bool:
    """Whether two streams are compared, in place of classes learned."""
    return bool(list(config.streams)) and config.model.fusion == 'apart'


def build_streams(config: Config) -> tuple[Stream, ...]:
    """The streams of the config, that which attends to the others first; or the model's one."""
    m, fields = config.model, variants.parse(config.model.variant)
    if not list(config.streams):
        return (_stream(m, 'model', fields),)
    names = sorted(config.streams)
    if m.fusion == 'cross':
        if m.queries not in names:
            raise UserError(
                f'config: model.queries must be one of {", ".join(names)}: the stream that attends '
                "to the others (model.fusion='cross')"
            )
        names.remove(m.queries)
        names = [m.queries, *names]
    if m.fusion == 'apart':  # Features are of the first, which shall be what is seen.
        names.sort(key=lambda name: config.streams[name].tokenizer == 'words')
    if len(names) < 2 and m.fusion == 'cross':
        raise UserError("config: model.fusion='cross' needs two streams")
    return tuple(
        replace(
            _stream(config.streams[name], f'streams.{name}', fields),
            name=name,
            part=config.streams[name].part or '',
            depth=config.streams[name].depth,
        )
        for name in names
    )


def _stream(section: Config, key: str, fields: dict[str, Any]) -> Stream:
    """One input as the section says; what its tokenizer does not use stays unread."""
    tokenizer = fields.get('tokenizer', 'patches')
    if section.tokenizer != 'patches' or tokenizer == 'patches':
        tokenizer = section.tokenizer
    more: dict[str, Any] = {}
    patch = fields['patch_size'] if key == 'model' else section.patch or fields['patch_size']
    if tokenizer == 'resnet':
        more['resnet'] = fields.get('resnet')
        if more['resnet'] is None:
            raise UserError(
                f"config: {key}.tokenizer='resnet' needs a hybrid as model.variant, "
                "such as 'R50+B/16'"
            )
    if tokenizer in ('conv', 'cct'):
        side = patch[0]
        if patch[0] != patch[1] or side < 2 or side & (side - 1):
            raise UserError(
                f'config: {key}.tokenizer={tokenizer!r} halves images several times, so its patch '
                f'must be 2, 4, 8, ...; {"x".join(map(str, patch))} is not'
            )
    if tokenizer == 'patches':
        more['stride'] = section.stride
    if tokenizer == 'tubelets':
        more['tubelet'] = section.tubelet
    if tokenizer == 'words':
        more['vocab'] = section.vocab
    if key == 'model':
        if tokenizer not in ('words', 'cct'):
            more['embedding_bias'] = section.embedding_bias
        if section.posemb == 'learned':
            more['posemb_prefix'] = section.posemb_prefix
            if tokenizer == 'ragged':
                more['posemb_grid'] = section.posemb_grid
        if section.posemb == 'rope':
            more['rope_theta'] = section.rope_theta
    return Stream(tokenizer=tokenizer, patch_size=patch, posemb=section.posemb, **more)


def build_model(
    config: Config, num_classes: int, shapes: dict[str, tuple[int, ...]], mesh: Mesh
) -> ViT:
    """The ViT of the config, for inputs of these shapes.

    Raises:
      UserError: sizes that do not fit together.
    """
    m, streams = config.model, build_streams(config)
    fields: dict[str, Any] = variants.parse(m.variant)
    for name in ('width', 'depth', 'mlp_dim', 'num_heads'):
        value = m[name]
        fields[name] = fields[name] if value is None else value
    width, heads = fields['width'], fields['num_heads']
    if m.head_dim is None and width % heads:
        raise UserError(
            f'config: model.width={width} is not divisible by model.num_heads={heads}; '
            'or set model.head_dim'
        )
    for stream in streams:
        _check_stream(config, stream, shapes, width, m.head_dim or width // heads)
    device = mesh.devices.flat[0]
    if m.remat == 'offload' and device in jax.local_devices():
        kinds = {memory.kind for memory in device.addressable_memories()}
        if 'pinned_host' not in kinds:
            raise UserError(
                f"config: model.remat='offload' needs a host memory that {device.device_kind} has "
                f"not ({', '.join(sorted(kinds))}); use 'names' or 'full'"
            )
    if m.attention == 'cudnn' and (device.platform != 'gpu' or m.dtype != 'bfloat16'):
        raise UserError(
            "config: model.attention='cudnn' needs an NVIDIA GPU and model.dtype='bfloat16'; "
            "use 'fused' or 'xla'"
        )
    if list(config.streams):
        fields |= {'streams': streams, 'fusion': m.fusion, 'posemb': 'none'}
        if m.fusion == 'latents':
            fields['latents'] = m.latents
        if m.fusion == 'apart':
            fields |= {'shared': m.shared, **_LOGITS[config.loss]}
            num_classes = 0
    else:
        (only,) = streams
        fields |= {name: getattr(only, name) for name in _STREAM_FIELDS}
    vit = ViT(
        num_classes=num_classes,
        dtype=jnp.dtype(m.dtype),
        constrain=sharding.constrain_batch(mesh, config.mesh.sequence),
        **{name: m[name] for name in _MODEL_FIELDS},
        **fields,
    )
    _check_prefix(vit)
    if vit.fusion == 'apart':
        _check_apart(vit)
    return vit


# How logits of pairs start: as CLIP's and as SigLIP's.
_LOGITS: dict[str, dict[str, Any]] = {
    'softmax': {'logit_scale': 1 / 0.07},
    'sigmoid': {'logit_scale': 10.0, 'logit_bias': -10.0},
}


# Fields of the one `Stream` that a `ViT` has under the same name.
_STREAM_FIELDS = (
    'tokenizer',
    'patch_size',
    'stride',
    'tubelet',
    'vocab',
    'resnet',
    'embedding_bias',
    'posemb',
    'posemb_prefix',
    'posemb_grid',
    'rope_theta',
)


# Keys of `model` that a `ViT` has under the same name, whatever the input is.
_MODEL_FIELDS = (
    'pool',
    'dropout',
    'scan',
    'remat',
    'class_token',
    'registers',
    'patch_dropout',
    'pre_norm',
    'norm',
    'norm_eps',
    'activation',
    'mlp',
    'head_dim',
    'qkv_bias',
    'key_bias',
    'qk_norm',
    'lsa',
    'lora',
    'attention',
    'parallel',
    'layer_scale',
    'drop_path',
    'norm_after_pool',
    'representation',
    'head_bias',
)


def _check_stream(
    config: Config, stream: Stream, shapes: dict[str, tuple[int, ...]], width: int, head: int
) -> None:
    """Raises UserError unless the stream's input divides into tokens and these have positions."""
    key = f'streams.{stream.name}' if stream.name else 'model'
    if stream.tokenizer == 'ragged':
        area, numbers = math.prod(stream.patch_size), shapes['patches'][-1]
        if numbers % area or numbers // area > 4:
            raise UserError(
                f'config: data.transform cuts patches of {numbers} numbers, which are no '
                f'{"x".join(map(str, stream.patch_size))} pixels (model.variant) of 1 to 4 channels'
            )
    try:
        grid = tokenizers.grid_of(stream, shapes[stream.reads])
    except ValueError as error:
        size, patch = ('x'.join(map(str, pair)) for pair in (config.image_size, stream.patch_size))
        raise UserError(
            f'config: image_size {size} is not divisible by the {patch} patch of '
            f'model.variant={config.model.variant!r} ({error})'
            if 'pixels' in str(error) and stream.stride is None
            else f'config: {key}: {error}'
        ) from error
    axes = 2 if stream.tokenizer == 'ragged' else len(grid)
    if stream.posemb in positions.LAWS and not positions.divides(width, axes):
        raise UserError(
            f'config: model.width={width} must be divisible by {2 * axes} for '
            f'{key}.posemb={stream.posemb!r}'
        )
    if stream.posemb == 'rope' and head % (2 * axes):
        raise UserError(
            f'config: the width of a head, {head}, must be divisible by {2 * axes} for '
            f"{key}.posemb='rope': set model.num_heads or model.head_dim"
        )
    if stream.posemb == 'relative' and (stream.tokenizer == 'ragged' or config.model.patch_dropout):
        raise UserError(
            f"config: {key}.posemb='relative' needs all tokens of a grid: not ragged images, and "
            'no model.patch_dropout'
        )


def _check_prefix(vit: ViT) -> None:
    ragged = not vit.streams and vit.tokenizer == 'ragged'
    if ragged and (vit.prefix() or vit.pool not in ('gap', 'map')):
        raise UserError(
            "config: model.tokenizer='ragged' has neither class token nor registers: set "
            "model.pool to 'gap' or 'map'"
        )
    if vit.posemb_prefix > vit.prefix():
        raise UserError(
            f'config: model.posemb_prefix={vit.posemb_prefix}, but the model has {vit.prefix()} '
            'prefix token(s): model.class_token and model.registers'
        )
    if vit.pool == 'cls_dist' and not vit.registers:
        raise UserError("config: model.pool='cls_dist' needs model.registers=1, its second token")


_NOT_APART = (
    'class_token',
    'registers',
    'pre_norm',
    'patch_dropout',
    'norm_after_pool',
    'representation',
)


def _check_apart(vit: ViT) -> None:
    """Raises UserError where streams that stay apart cannot have what is asked for."""
    if len(vit.streams) != 2:
        raise UserError(
            f"config: model.fusion='apart' compares two streams, and there are {len(vit.streams)}"
        )
    if vit.pool not in ('gap', 'map'):
        raise UserError(
            f"config: model.pool={vit.pool!r}, but of streams apart only 'gap' and 'map' are made"
        )
    for name in _NOT_APART:
        if getattr(vit, name):
            raise UserError(f"config: model.{name} is not of model.fusion='apart': remove it")


def words_of(model: ViT) -> str | None:
    """The part of a batch that a stream of words reads; None without one."""
    return next((s.reads for s in model.streams if s.tokenizer == 'words'), None)
