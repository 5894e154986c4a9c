"""Class scores of pictures of any size: windows of the model's size, scales, and mirror images.

Arrays have one size for all pictures of a batch, and pictures their own within it, at the top left.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from big_vit.tasks.batch import Batch, normalise
from big_vit.tasks.segmentation import upsample
from big_vit.tasks.task import Segment

Size = tuple[int, int]
PRECISION = jax.lax.Precision.HIGHEST
# Of windows, whose logits are averaged where they overlap, a third overlaps, as in DINOv3.
OVERLAP = 1 / 3


def default_stride(window: Size) -> Size:
    """Return how many pixels (down, across) one window is from the next."""
    return round(window[0] * (1 - OVERLAP)), round(window[1] * (1 - OVERLAP))


def weights(
    outputs: int, inputs: int, to: Array, of: Array, antialias: bool
) -> Float[Array, 'outputs inputs']:
    """Return the matrix that resizes the first `of` of some inputs to the first `to` outputs.

    Bilinear, pixels are squares; torch's `interpolate` without align_corners. Other outputs are 0.

    Args:
      antialias: average where it shrinks, as Pillow does.
    """
    scale = of / to
    support = jnp.maximum(scale, 1.0) if antialias else 1.0
    centre = (jnp.arange(outputs)[:, None] + 0.5) * scale - 0.5
    centre = jnp.clip(centre, 0, of - 1) if not antialias else centre
    place = jnp.arange(inputs)[None]
    near = jnp.maximum(1 - jnp.abs(place - centre) / support, 0)
    near = jnp.where(place < of, near, 0)
    total = near.sum(1, keepdims=True)
    real = jnp.arange(outputs)[:, None] < to
    return jnp.where(real, near / jnp.where(total == 0, 1, total), 0)


def resize(
    x: Float[Array, 'batch rows columns channels'],
    canvas: Size,
    to: Int[Array, 'batch 2'],
    of: Int[Array, 'batch 2'],
    antialias: bool = False,
) -> Float[Array, 'batch height width channels']:
    """Resize pictures of their own sizes `of` to the sizes `to`, on a canvas of zeros."""

    def one(x: Array, to: Array, of: Array) -> Array:
        down = weights(canvas[0], x.shape[0], to[0], of[0], antialias)
        along = weights(canvas[1], x.shape[1], to[1], of[1], antialias)
        x = jnp.einsum('oh,hwc->owc', down, x, precision=PRECISION)
        return jnp.einsum('pw,owc->opc', along, x, precision=PRECISION)

    return jax.vmap(one)(x.astype(jnp.float32), to, of)


def picture_sizes(batch: Batch) -> Int[Array, 'batch 2']:
    """Return height and width of each picture within its canvas."""
    if 'picture_size' in batch:
        # Of an example that stands for none it is 0.
        return jnp.maximum(batch['picture_size'], 1)
    count, height, width, _ = batch['image'].shape
    return jnp.tile(jnp.array([height, width]), (count, 1))


def starts(
    canvas: int, window: int, stride: int, size: Int[Array, ' batch']
) -> list[tuple[Array, Array]]:
    """Return for each window along an axis where it starts, and whether a picture needs it.

    A stride apart; the last one ends where the picture does.
    """
    most = -(-max(canvas - window, 0) // stride) + 1
    needed = -(-jnp.maximum(size - window, 0) // stride) + 1
    last = jnp.maximum(size - window, 0)
    return [(jnp.minimum(k * stride, last), k < needed) for k in range(most)]


def windowed(
    segment: Segment,
    params: Any,
    batch: Batch,
    image: Float[Array, 'batch height width channels'],
    size: Int[Array, 'batch 2'],
    window: Size,
    stride: Size,
) -> Float[Array, 'batch height width classes']:
    """Return the mean of the logits of all windows at each pixel."""
    canvas = (max(image.shape[1], window[0]), max(image.shape[2], window[1]))
    grow = [(0, 0), (0, canvas[0] - image.shape[1]), (0, canvas[1] - image.shape[2]), (0, 0)]
    image = jnp.pad(image, grow)
    sides = zip(canvas, window, stride, (0, 1), strict=True)
    down, along = (starts(c, w, s, size[:, axis]) for c, w, s, axis in sides)
    places = list(itertools.product(down, along))
    top, left, used = (
        jnp.stack(parts)
        for parts in zip(*((y, x, a & b) for (y, a), (x, b) in places), strict=True)
    )

    def cut(image: Array, y: Array, x: Array) -> Array:
        return jax.lax.dynamic_slice(image, (y, x, 0), (*window, image.shape[2]))

    def put(total: Array, part: Array, y: Array, x: Array) -> Array:
        old = jax.lax.dynamic_slice(total, (y, x, 0), part.shape)
        return jax.lax.dynamic_update_slice(total, old + part, (y, x, 0))

    def logits_of(y: Array, x: Array) -> Array:
        part = jax.vmap(cut)(image, y, x)
        return upsample(segment(params, {**batch, 'image': part}), window).astype(jnp.float32)

    if len(places) == 1:
        return logits_of(top[0], left[0])

    def add(total: Array, place: tuple[Array, Array, Array]) -> Array:
        y, x, used = place
        real = used[:, None, None, None]
        logits = jnp.where(real, logits_of(y, x), 0)
        one = jnp.broadcast_to(real, (*logits.shape[:3], 1)).astype(jnp.float32)
        return jax.vmap(put)(total, jnp.concatenate([logits, one], -1), y, x)

    def add_needed(total: Array, place: tuple[Array, Array, Array]) -> tuple[Array, None]:
        # A canvas has room for more windows than most pictures need.
        return jax.lax.cond(place[2].any(), add, lambda total, place: total, total, place), None

    classes = jax.eval_shape(logits_of, top[0], left[0]).shape[-1]
    zeros = jnp.zeros((len(image), *canvas, classes + 1), jnp.float32)
    total, _ = jax.lax.scan(add_needed, zeros, (top, left, used))
    return total[..., :-1] / jnp.maximum(total[..., -1:], 1)


def mirrored(
    x: Float[Array, 'batch height width channels'], width: Int[Array, ' batch']
) -> Float[Array, 'batch height width channels']:
    """Mirror the first `width` columns of each picture; the others stay."""
    column = jnp.arange(x.shape[2])[None]
    column = jnp.where(column < width[:, None], width[:, None] - 1 - column, column)
    return jnp.take_along_axis(x, column[:, None, :, None], axis=2)


def scores(
    segment: Segment,
    params: Any,
    batch: Batch,
    window: Size,
    stride: Size,
    scales: Sequence[float] = (1.0,),
    flips: bool = False,
) -> Float[Array, 'batch rows columns classes']:
    """Return scores of all classes over the canvas.

    They are logits, which may be coarser than the canvas, where each picture is seen once; or else
    the means, over scales and mirror images, of probabilities at each pixel.

    Args:
      segment: of a task; images are given to it as floats.
      window: (height, width) that the model takes.
      stride: from one window to the next; the last one ends where the picture does. Smaller
        pictures are padded with zeros.
      scales: pictures are resized by these factors first.
      flips: see the mirror image of each too.
    """
    image, size = normalise(batch['image']), picture_sizes(batch)
    canvas = image.shape[1], image.shape[2]
    once = tuple(scales) == (1.0,) and not flips
    if once and canvas == window:
        return segment(params, batch)
    total, variants = jnp.float32(0), list(itertools.product(scales, (False, True)[: 1 + flips]))
    for scale, flip in variants:
        to = jnp.maximum(jnp.round(size * scale).astype(size.dtype), 1)
        extent = round(canvas[0] * scale), round(canvas[1] * scale)
        extent = max(extent[0], 1), max(extent[1], 1)
        # The largest picture may round up where the canvas rounds down.
        to = jnp.minimum(to, jnp.array([extent]))
        seen = image if scale == 1 else resize(image, extent, to, size, antialias=True)
        seen = mirrored(seen, to[:, 1]) if flip else seen
        logits = windowed(segment, params, batch, seen, to, window, stride)
        logits = mirrored(logits, to[:, 1]) if flip else logits
        if once:
            return logits[:, : canvas[0], : canvas[1]]
        logits = resize(logits, canvas, size, to)
        total = total + jax.nn.softmax(logits, axis=-1) / len(variants)
    return total
