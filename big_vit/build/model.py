"""The `model` and `streams` sections as the trunk of a model."""

import math
from dataclasses import fields, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from big_vit import sharding
from big_vit.build.task import build_task
from big_vit.config import Config, registries
from big_vit.errors import UserError
from big_vit.models import positions, tokenizers, variants
from big_vit.models.tokenizers import Stream
from big_vit.models.vit import SETTINGS, ViT, make_vit
from big_vit.tasks.task import ExampleShape

_SIZES = ('width', 'depth', 'mlp_dim', 'num_heads')
# Settings of a trunk that neither its sizes nor its inputs decide: keys of `model` of that name.
_SETTINGS = tuple(
    name
    for name in SETTINGS
    if name not in (*_SIZES, 'num_classes', 'dtype', 'gather', 'constrain', 'pack')
    and name not in {field.name for field in fields(Stream)}
)


def parts_read(config: Config) -> tuple[str, ...]:
    """The parts of a batch that the model takes."""
    return tuple(dict.fromkeys(stream.reads for stream in build_streams(config)))


def build_streams(config: Config) -> tuple[Stream, ...]:
    """The named streams of the config, one that attends to the others first; or the one input."""
    m, variant = config.model, variants.parse(config.model.variant)
    if not list(config.streams):
        return (_stream(m, 'model', variant),)
    names = sorted(config.streams)
    if m.fusion == 'cross':
        if m.queries not in names:
            raise UserError(
                f'config: model.queries must be one of {", ".join(names)}: the stream that attends '
                "to the others (model.fusion='cross')"
            )
        names.remove(m.queries)
        names = [m.queries, *names]
        if len(names) < 2:
            raise UserError("config: model.fusion='cross' needs two streams")
    return tuple(
        replace(
            _stream(config.streams[name], f'streams.{name}', variant),
            name=name,
            part=config.streams[name].part or '',
            depth=config.streams[name].depth,
        )
        for name in names
    )


def _stream(section: Config, key: str, variant: dict[str, Any]) -> Stream:
    """One input as the section says; keys that its tokenizer does not take stay unread."""
    tokenizer = variant.get('tokenizer', 'patches')
    if section.tokenizer != 'patches' or tokenizer == 'patches':
        tokenizer = section.tokenizer
    patch = variant['patch_size'] if key == 'model' else section.patch or variant['patch_size']
    taken = set(registries.TOKENIZERS.keys(tokenizer))
    if section.posemb == 'learned':
        taken |= {'posemb_prefix'} | ({'posemb_grid'} if tokenizer == 'ragged' else set())
    if section.posemb in ('learned', 'sincos2d_detr', *positions.LAWS) and tokenizer != 'ragged':
        taken |= {'posemb_per_block'}
    if section.posemb == 'rope':
        taken |= {'rope_theta', 'rope_shift', 'rope_jitter', 'rope_rescale'}
    options = {name: section[name] for name in sorted(taken) if name in section}
    if 'resnet' in taken:
        options['resnet'] = variant.get('resnet')
        if options['resnet'] is None:
            raise UserError(
                f'config: {key}.tokenizer={tokenizer!r} needs a hybrid as model.variant, '
                "such as 'R50+B/16'"
            )
    if tokenizer in ('conv', 'cct'):
        side = patch[0]
        if patch[0] != patch[1] or side < 2 or side & (side - 1):
            raise UserError(
                f'config: {key}.tokenizer={tokenizer!r} halves images several times, so its patch '
                f'must be 2, 4, 8, ...; {"x".join(map(str, patch))} is not'
            )
    return Stream(tokenizer=tokenizer, patch_size=patch, posemb=section.posemb, **options)


def build_trunk(config: Config, shapes: dict[str, tuple[int, ...]], mesh: Mesh) -> ViT:
    """The ViT of the config without a head, for inputs of these shapes.

    Raises:
      UserError: sizes that do not fit together.
    """
    m, streams = config.model, build_streams(config)
    variant: dict[str, Any] = variants.parse(m.variant)
    sizes = {name: variant[name] if m[name] is None else m[name] for name in _SIZES}
    width, heads = sizes['width'], sizes['num_heads']
    if m.head_dim is None and width % heads:
        raise UserError(
            f'config: model.width={width} is not divisible by model.num_heads={heads}; '
            'or set model.head_dim'
        )
    for stream in streams:
        if stream.reads not in shapes:  # Of two towers one may be asked alone.
            continue
        _check_stream(config, stream, shapes, width, m.head_dim or width // heads)
    if m.post_norm and m.parallel:
        raise UserError(
            'config: model.post_norm has no place in blocks of model.parallel=True: leave one out'
        )
    _check_device(m, mesh)
    trunk = make_vit(
        0,
        streams[0].patch_size,
        **sizes,
        dtype=jnp.dtype(m.dtype),
        constrain=sharding.constrain_batch(mesh, config.mesh.sequence),
        pack=mesh.shape['replica'] * mesh.shape['fsdp'] if m.pack else 0,
        **{name: m[name] for name in _SETTINGS},
    )
    if streams[0].name:
        fusion = m.fusion
        latents = m.latents if fusion == 'latents' else 0
        trunk = trunk.clone(streams=streams, fusion=fusion, latents=latents)
    else:
        trunk = trunk.clone(streams=streams)
    _check_prefix(trunk)
    return trunk


def build_model(
    config: Config, num_classes: int, shapes: dict[str, tuple[int, ...]], mesh: Mesh
) -> Any:
    """The module of the config's task, for inputs of these shapes.

    Raises:
      UserError: sizes that do not fit together, or with the task.
    """
    trunk = build_trunk(config, shapes, mesh)
    return build_task(config.task).model(trunk, ExampleShape(shapes, num_classes))


def build_scored_model(
    config: Config, num_classes: int, shapes: dict[str, tuple[int, ...]], mesh: Mesh
) -> Any:
    """What evaluations, exports and inspections apply: the task's model without its additions.

    Inputs are those of an evaluation, which sees an example once where training sees views of it.

    Raises:
      UserError: as `build_model`.
    """
    task = build_task(config.task)
    if task.views:
        return build_trunk(config, shapes, mesh)
    return task.trunk(build_model(config, num_classes, shapes, mesh))


def _check_device(section: Config, mesh: Mesh) -> None:
    """Raises UserError where the devices lack something that the `model` section asks for."""
    device = mesh.devices.flat[0]
    if section.remat == 'offload' and device in jax.local_devices():
        kinds = {memory.kind for memory in device.addressable_memories()}
        if 'pinned_host' not in kinds:
            raise UserError(
                f"config: model.remat='offload' needs a host memory that {device.device_kind} has "
                f"not ({', '.join(sorted(kinds))}); use 'names' or 'full'"
            )
    if section.attention == 'cudnn' and (device.platform != 'gpu' or section.dtype != 'bfloat16'):
        raise UserError(
            "config: model.attention='cudnn' needs an NVIDIA GPU and model.dtype='bfloat16'; "
            "use 'fused' or 'xla'"
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
    if stream.posemb == 'sincos2d_detr' and (axes != 2 or stream.tokenizer == 'ragged'):
        raise UserError(
            f"config: {key}.posemb='sincos2d_detr' is of images of one grid: take 'sincos2d'"
        )
    fixed = (*positions.LAWS, 'sincos2d_detr')
    if stream.posemb in fixed and not positions.divides(width, axes):
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


def _check_prefix(trunk: ViT) -> None:
    """Raises UserError where the input or the pool needs other prefix tokens."""
    stream, head, prefix = trunk.single, trunk.head, trunk.prefix_tokens
    if (
        stream is not None
        and stream.tokenizer == 'ragged'
        and (prefix or head.pool not in ('gap', 'map'))
    ):
        raise UserError(
            "config: model.tokenizer='ragged' has neither class token nor registers: set "
            "model.pool to 'gap' or 'map'"
        )
    if stream is not None and stream.posemb_prefix > prefix:
        raise UserError(
            f'config: model.posemb_prefix={stream.posemb_prefix}, but the model has {prefix} '
            'prefix token(s): model.class_token and model.registers'
        )
    if head.pool == 'cls_dist' and not trunk.prefix.registers:
        raise UserError("config: model.pool='cls_dist' needs model.registers=1, its second token")
