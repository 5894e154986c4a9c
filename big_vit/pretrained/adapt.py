"""Parameters made to fit another model: new positions, new patches, new head."""

import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from big_vit import checkpoint, trees
from big_vit.build.model import build_streams
from big_vit.config import Config
from big_vit.errors import UserError
from big_vit.models import encoder, positions, tokenizers, vit
from big_vit.models.positions import Grid

CHANNELS = ('mean', 'sum', 'repeat')
VIDEO = ('central', 'inflate')


def is_head(name: str) -> bool:
    """Whether a parameter belongs to a classifier."""
    return name.partition('/')[0] in vit.HEADS


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
    """NumPy parameters for `model`: the encoder is kept, heads start at zero.

    Learned positions are interpolated to the new grid of patches, patches to another size by
    FlexiViT's law; stacked (scanned) and unrolled blocks are converted into each other; of an
    image's patches tubelets are made.

    Args:
      params: parameters as `checkpoint.load_params` gives them.
      old_grid: the grid of tokens that they were trained with; None where there is no one grid.
      new_grid: that of the inputs that `model` will see.
      like: abstract parameters of `model`.
      where: the checkpoint, for messages.
      channels: how a kernel for other channels is made, of `CHANNELS`; None refuses.
      video: how tubelets are made of patches, of `VIDEO` (ViViT, arXiv 2103.15691).
      resize: how positions are, of `positions.METHODS`.
      keep_head: keep a head of the same shape.
      is_addition: whether a parameter is not of the trunk but of the task.
      additions: initial values of such parameters, of their paths.

    Raises:
      UserError: names the leaves in which the architectures differ.
    """
    scan = model.encoder.scan
    params = encoder.stack_blocks(params) if scan else encoder.unstack_blocks(params)
    flat, wanted = trees.flatten(params), trees.flatten(abstract_state)
    name = 'pos_embedding'
    if name in flat and name in wanted and old_grid and new_grid:
        prefix = model.single.posemb_prefix
        front, table = flat[name][:, :prefix], flat[name][:, prefix:]
        table = positions.resize_positions(np.asarray(table), old_grid, new_grid, resize)
        flat[name] = np.concatenate([front, table.astype(front.dtype)], axis=1)
    # A head starts at zero, other parts of the task as in a run of their own.
    fresh = []
    for name, leaf in wanted.items():
        same = name in flat and flat[name].shape == leaf.shape
        if not is_addition(name) or (same and (keep_head or not is_head(name))):
            continue
        if is_head(name):
            flat[name] = np.zeros(leaf.shape, leaf.dtype)
        else:
            fresh.append(name)
    if fresh and additions is not None:
        flat |= additions(fresh)
    # A model without a head, or with another, has no place for it.
    for name in [name for name in flat if is_head(name) and name not in wanted]:
        del flat[name]
    for name, leaf in wanted.items():
        if name.endswith(('lora_a', 'lora_b')):
            flat[name] = _correction(name, leaf.shape, leaf.dtype)
    name = 'embedding/kernel'
    if name in flat and name in wanted:
        flat[name] = _kernel(flat[name], wanted[name].shape, where, channels, video)
    adapted = trees.unflatten(flat)
    checkpoint.check_params(adapted, abstract_state, where)
    return adapted


def _correction(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Half of a correction that is zero (LoRA): numbers of its own for each parameter."""
    if name.endswith('lora_b'):
        return np.zeros(shape, dtype)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    # The kernel's own inputs are what is neither the rank nor, if scanned, the block.
    inputs = math.prod(shape[:-1]) // (shape[0] if '/encoderblock/' in name else 1)
    return (rng.standard_normal(shape) * inputs**-0.5).astype(dtype)


def _kernel(
    kernel: np.ndarray, wanted: tuple[int, ...], where: str, channels: str | None, video: str
) -> np.ndarray:
    """A patch embedding [.., height, width, channels, features] for other patches."""
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
    had = kernel.shape[-2]
    if how is None:
        raise UserError(
            f'{where} was trained on images of {had} channel(s), these have {wanted}: '
            f'add {"rgb" if had == 3 else "grayscale"} to data.transform and to the '
            'transform of each of evals, or set init_channels to mean, sum or repeat'
        )
    return channels_of(kernel, wanted, how)


def channels_of(kernel: np.ndarray, wanted: int, how: str) -> np.ndarray:
    """A kernel [..., channels, features] for `wanted` channels.

    'mean': each has the mean of the old ones; 'sum': of them, that a grey image in one channel
    (or spread evenly over more) gives what it gave in all; 'repeat': the old ones in turn, scaled
    so that channels of one value give what they gave.
    """
    had = kernel.shape[-2]
    if how == 'repeat':
        turned = np.take(kernel, np.arange(wanted) % had, axis=-2)
        return (turned * (had / wanted)).astype(kernel.dtype)
    one = kernel.sum(-2, keepdims=True)
    one = one / had if how == 'mean' else one / wanted
    return np.repeat(one, wanted, axis=-2).astype(kernel.dtype)


def tubelet_kernel(kernel: np.ndarray, frames: int, how: str) -> np.ndarray:
    """A kernel [frames, height, width, channels, features] of one for single images.

    'central': the middle frame has it and the others nothing; 'inflate': each has an equal share.
    Of a still, either gives the image's tokens.
    """
    if how == 'inflate':
        return np.repeat(kernel[None] / frames, frames, axis=0).astype(kernel.dtype)
    made = np.zeros((frames, *kernel.shape), kernel.dtype)
    made[frames // 2] = kernel
    return made


def grid_of(config: Config, shapes: dict[str, tuple[int, ...]]) -> Grid | None:
    """How the tokens of the config's one input lie; None where there are several, or no grid."""
    streams = build_streams(config)
    if len(streams) > 1 or streams[0].tokenizer == 'ragged':
        return None
    return tokenizers.grid_of(streams[0], shapes[streams[0].reads])


def saved_grid(saved: Config) -> Grid | None:
    """The same of a checkpoint's config, which says the size of images but not of other inputs."""
    streams = build_streams(saved)
    if len(streams) > 1 or streams[0].reads != 'image':
        return None
    return tokenizers.grid_of(streams[0], (*saved.image_size, 3))
