"""Adapt parameters to another model: resized positions and patches, other channels, new heads."""

import math
import sys
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from big_vit import checkpoint, trees
from big_vit.build.model import build_streams
from big_vit.config import Config
from big_vit.data.sources.classes import shown
from big_vit.errors import UserError
from big_vit.models import encoder, positions, tokenizers, vit
from big_vit.models.positions import Grid
from big_vit.models.tokenizers import Stream

CHANNELS = ('mean', 'sum', 'repeat')
VIDEO = ('central', 'inflate')


def is_head(name: str) -> bool:
    """Whether a parameter belongs to a classifier."""
    return name.partition('/')[0] in vit.HEADS


def head_by_name(
    params: dict[str, Any],
    names: Sequence[str] | None,
    wanted: Sequence[str] | None,
    where: str,
) -> dict[str, Any]:
    """Return parameters whose classifiers have their classes in another order.

    What was done is printed, unless that is nothing.

    Args:
      names: of the classes, in order; None if they have none.
      wanted: the same in the order that is wanted. Classifiers of other classes are left out, but
        where one side has no names, classes are the same by number.
      where: the checkpoint, for messages.
    """
    flat = trees.flatten(params)
    heads = [name for name in flat if is_head(name)]
    alike = names is None or wanted is None or len(names) == len(wanted)
    if names == wanted or not heads or not alike:
        return params
    if names is None or wanted is None:
        named = names or wanted or ()
        if all(flat[name].shape[-1] == len(named) for name in heads):
            _say(f'{where}: classes have names on one side only, so the head goes on by number')
        return params
    if sorted(names) != sorted(wanted) or len({*names}) < len(names):
        _say(f'the head of {where} is of {shown(names)}, not of {shown(wanted)}: a new one')
        return trees.unflatten({n: leaf for n, leaf in flat.items() if n not in heads})
    order = [list(names).index(name) for name in wanted]
    _say(f'{where} numbers classes in another way: its head is ordered by name')
    return trees.unflatten(
        {n: np.asarray(leaf)[..., order] if n in heads else leaf for n, leaf in flat.items()}
    )


def _say(line: str) -> None:
    print(f'classes {line}', file=sys.stderr, flush=True)


def adapt(
    params: dict[str, Any],
    old_grid: Grid | None,
    model: Any,
    new_grid: Grid | None,
    abstract_state: dict[str, Any],
    where: str,
    *,
    channels: str | None = None,
    video: str = 'central',
    resize: str = 'aligned',
    keep_head: bool = False,
    is_addition: Callable[[str], bool] = is_head,
    additions: Callable[[list[str]], dict[str, np.ndarray]] | None = None,
) -> dict[str, Any]:
    """Return parameters for `model`: the encoder is kept, and heads start at zero.

    Learned positions are interpolated to the new grid, patch embeddings are resized by FlexiViT's
    method, image patches become tubelets, and scanned and unrolled blocks are converted into each
    other.

    Args:
      params: parameters as returned by `checkpoint.load_params`.
      old_grid: the grid of tokens in their training; None if there is no single grid.
      new_grid: the grid of tokens of the inputs of `model`.
      abstract_state: abstract parameters of `model`.
      where: the checkpoint, for messages.
      channels: how to make a kernel for another number of channels, one of `CHANNELS`; None
        refuses.
      video: how to make tubelets of patches, one of `VIDEO` (ViViT, arXiv 2103.15691).
      resize: how to resize positions, one of `positions.METHODS`.
      keep_head: keep a head of the same shape.
      is_addition: whether a parameter is not of the trunk but of the task.
      additions: initial values of such parameters, of their paths.

    Raises:
      UserError: the architectures differ; the message names the leaves.
    """
    scan = model.encoder.scan
    params = encoder.stack_blocks(params) if scan else encoder.unstack_blocks(params)
    flat, wanted = trees.flatten(params), trees.flatten(abstract_state)
    _new_last_norm(flat, wanted, where)
    name = 'pos_embedding'
    if name in flat and name in wanted and old_grid and new_grid:
        prefix = model.single.posemb_prefix
        front, table = flat[name][:, :prefix], flat[name][:, prefix:]
        table = positions.resize_positions(np.asarray(table), old_grid, new_grid, resize)
        flat[name] = np.concatenate([front, table.astype(front.dtype)], axis=1)
    # A head starts at zero, other parts of the task as in a run of their own: each is taken whole
    # or not at all.
    added = [name for name in wanted if is_addition(name)]
    others = [name for name in added if name not in flat or flat[name].shape != wanted[name].shape]
    for name in added:
        if is_head(name) and (name in others or not keep_head):
            flat[name] = np.zeros(wanted[name].shape, wanted[name].dtype)
    parts = {name.partition('/')[0] for name in others if not is_head(name)}
    replaced = sorted(parts & {name.partition('/')[0] for name in flat})
    if replaced:
        print(
            f'init    {where}: {", ".join(replaced)} is of other sizes than here, and starts anew'
        )
    flat = {n: leaf for n, leaf in flat.items() if n.partition('/')[0] not in parts}
    if parts and additions is not None:
        flat |= additions([name for name in added if name.partition('/')[0] in parts])
    # A model without a head, or with another, has no place for it.
    for name in [name for name in flat if is_head(name) and name not in wanted]:
        del flat[name]
    for name, leaf in wanted.items():
        if name.endswith(('lora_a', 'lora_b')):
            flat[name] = _lora_factor(name, leaf.shape, leaf.dtype)
    name = 'embedding/kernel'
    if name in flat and name in wanted:
        flat[name] = _kernel(flat[name], wanted[name].shape, where, channels, video)
    adapted = trees.unflatten(flat)
    checkpoint.check_params(adapted, abstract_state, where)
    return adapted


def _new_last_norm(flat: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    """A norm of the pooled vector, where the parameters have one of each token, starts anew.

    So MAE and its heirs are fine-tuned. The other way round there is nothing to go on with.
    """
    old, new = 'Transformer/encoder_norm/', 'encoder_norm/'
    missing = [n for n in wanted if n.startswith(new) and n not in flat]
    left = [n for n in flat if n.startswith(old) and n not in wanted]
    if not missing or not left:
        return
    for name in left:
        del flat[name]
    for name in missing:
        start = np.ones if name.endswith('/scale') else np.zeros
        flat[name] = start(wanted[name].shape, wanted[name].dtype)
    print(f'init    {where}: its last norm is left out, that of the pooled vector starts anew')


def with_positions(
    params: dict[str, Any], old: Stream, grid: Grid | None, new: Stream, width: int, where: str
) -> dict[str, Any]:
    """Parameters with learned positions in place of fixed ones of equal values, or without them.

    Args:
      old, new: the stream of the parameters, and that of the model that they are for.
      grid: of the tokens, in the training of the parameters.
      width: of the tokens.

    Raises:
      UserError: learned positions are not those that are fixed here.
    """
    if grid is None or old.posemb == new.posemb:
        return params
    table, rest = params.get('pos_embedding'), {**params}
    if new.posemb == 'learned' and old.posemb in positions.LAWS:
        fixed = positions.sincos(grid, width, old.posemb)
        rest['pos_embedding'] = np.pad(fixed, ((0, 0), (new.posemb_prefix, 0), (0, 0)))
    if new.posemb in positions.LAWS and table is not None:
        front, of_patches = np.split(np.asarray(table), [old.posemb_prefix], axis=1)
        fixed = positions.sincos(grid, width, new.posemb)
        # Files hold them rounded, some in bfloat16.
        if of_patches.shape != fixed.shape or np.abs(of_patches - fixed).max() > 5e-3:
            raise UserError(
                f'{where} has learned positions, and model.posemb={new.posemb!r} has fixed ones: '
                f"set model.posemb='learned' and model.posemb_prefix={old.posemb_prefix}"
            )
        if np.abs(front).max(initial=0) > 5e-3:
            rest = _rows_into_tokens(rest, front)
        del rest['pos_embedding']
    return rest


def _rows_into_tokens(params: dict[str, Any], rows: np.ndarray) -> dict[str, Any]:
    """Adds the positions of prefix tokens to the tokens, which are learned too."""
    start = 0
    for name in ('cls', 'registers'):
        if name in params:
            count = np.shape(params[name])[1]
            own = rows[:, start : start + count]
            padded = np.pad(own, ((0, 0), (0, count - own.shape[1]), (0, 0)))
            params = {**params, name: params[name] + padded}
            start += count
    return params


def _lora_factor(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Initialise one LoRA factor: `lora_b` is zero, `lora_a` random but the same for a given name.

    crc32 rather than hash(), which differs between processes.
    """
    if name.endswith('lora_b'):
        return np.zeros(shape, dtype)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    # Fan-in of the kernel: every axis except the rank and, if scanned, the block.
    inputs = math.prod(shape[:-1]) // (shape[0] if '/encoderblock/' in name else 1)
    return (rng.standard_normal(shape) * inputs**-0.5).astype(dtype)


def _kernel(
    kernel: np.ndarray, wanted: tuple[int, ...], where: str, channels: str | None, video: str
) -> np.ndarray:
    """Fit the kernel [.., height, width, channels, features] of a patch embedding to `wanted`."""
    kernel = np.asarray(kernel)
    if kernel.shape[-2] != wanted[-2]:
        kernel = _other_channels(kernel, wanted[-2], where, channels)
    if kernel.ndim == 4 and len(wanted) in (4, 5) and kernel.shape[-1] == wanted[-1]:
        rows, columns = wanted[-4], wanted[-3]
        kernel = positions.resize_patches(kernel, (rows, columns))
    if kernel.ndim == 4 and len(wanted) == 5:
        kernel = tubelet_kernel(kernel, wanted[0], video)
    return kernel


def _other_channels(kernel: np.ndarray, wanted: int, where: str, how: str | None) -> np.ndarray:
    old_channels = kernel.shape[-2]
    if how is None:
        raise UserError(
            f'{where} was trained on images of {old_channels} channel(s), these have {wanted}: '
            f'add {"rgb" if old_channels == 3 else "grayscale"} to data.transform and to the '
            'transform of each of evals, or set init_channels to mean, sum or repeat'
        )
    return channels_of(kernel, wanted, how)


def channels_of(kernel: np.ndarray, wanted: int, how: str) -> np.ndarray:
    """Convert a kernel [..., channels, features] to `wanted` channels.

    Args:
      how: 'mean' gives every channel the mean of the old ones. 'sum' divides their sum evenly, so
        that a grey image gives the same output in any number of channels. 'repeat' cycles through
        the old channels, scaled so that an image with equal channels gives the same output.
    """
    old_channels = kernel.shape[-2]
    if how == 'repeat':
        cycled = np.take(kernel, np.arange(wanted) % old_channels, axis=-2)
        return (cycled * (old_channels / wanted)).astype(kernel.dtype)
    shared = kernel.sum(-2, keepdims=True)
    shared = shared / old_channels if how == 'mean' else shared / wanted
    return np.repeat(shared, wanted, axis=-2).astype(kernel.dtype)


def tubelet_kernel(kernel: np.ndarray, frames: int, how: str) -> np.ndarray:
    """Inflate the kernel of an image patch to one of [frames, height, width, channels, features].

    Both give a still video the tokens of the image.

    Args:
      how: 'central' puts the kernel at the middle frame and zeros elsewhere; 'inflate' gives every
        frame an equal share.
    """
    if how == 'inflate':
        return np.repeat(kernel[None] / frames, frames, axis=0).astype(kernel.dtype)
    tubelet = np.zeros((frames, *kernel.shape), kernel.dtype)
    tubelet[frames // 2] = kernel
    return tubelet


def grid_of(config: Config, shapes: dict[str, tuple[int, ...]]) -> Grid | None:
    """Return the token grid of the config's only input; None for several inputs or no grid."""
    streams = build_streams(config)
    if len(streams) > 1 or streams[0].tokenizer == 'ragged':
        return None
    return tokenizers.grid_of(streams[0], shapes[streams[0].reads])


def saved_grid(saved: Config) -> Grid | None:
    """Return the token grid of a checkpoint's config; None for inputs other than one image."""
    streams = build_streams(saved)
    if len(streams) > 1 or streams[0].reads != 'image':
        return None
    return tokenizers.grid_of(streams[0], (*saved.image_size, 3))
