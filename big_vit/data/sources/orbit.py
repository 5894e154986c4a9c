"""Video clips of sprites that move around an octagon."""

import numpy as np
from jaxtyping import Int64, UInt8, UInt64

from big_vit.data import order
from big_vit.data.sources.base import Columns, Request, Source
from big_vit.data.sources.sprites import SHAPES, sprites
from big_vit.data.sources.synthetic import CHUNK_BYTES, check_size, draws, noise, synthetic_source

DIRECTIONS = ('right', 'down right', 'down', 'down left', 'left', 'up left', 'up', 'up right')
FRAMES = 8
_SPRITES = 2
# (y, x) of one step in each direction; y grows downwards. All eight together are a lap.
_STEPS = np.array([(0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1)])
# Where a sprite is in each frame, since the first, in units of its speed.
_LAP = np.concatenate([[[0, 0]], np.cumsum(_STEPS, axis=0)[:-1]])


def orbit(request: Request) -> Source:
    """Generate clips of sprites that go around an octagon; the label is their first direction.

    All go clockwise, so that their direction turns by an eighth with every frame. The eight
    clips of a group consist of the same frames, each starting with another: all frames without
    their order tell nothing, 1/8. Nor does any one frame, because sprites start anywhere, and
    reappear on the opposite side of where they left the picture.

    Args:
      request: the examples to generate, of `train` and `test`.

    Returns:
      A source of columns 'video', uint8 [B, 8, H, W, 1], and 'label', int32 [B].

    Raises:
      UserError: the size is too small, or no such split.
    """
    height, width = check_size(request, (12, 12))

    def load(split: int, indices: np.ndarray) -> Columns:
        group, label = np.divmod(indices, len(DIRECTIONS))
        # Drawn once for a group and put into another order: the frames of its clips, noise
        # included, are the same bytes.
        clips = _clips(order.example_keys(request.seed, split, group), (height, width))
        when = (np.arange(FRAMES) + label[:, None]) % FRAMES
        return {'video': clips[np.arange(len(clips))[:, None], when]}

    return synthetic_source(
        'orbit',
        request,
        group=len(DIRECTIONS),
        class_names=DIRECTIONS,
        image_shape=(height, width, 1),
        chunk=max(1, CHUNK_BYTES // (FRAMES * height * width)),
        load=load,
    )


def _clips(
    keys: UInt64[np.ndarray, ' b'], size: tuple[int, int]
) -> UInt8[np.ndarray, 'b frames h w 1']:
    """Draw two sprites that move alike over noise, for one lap."""
    height, width = size
    batch = len(keys)
    side = max(3, round(min(height, width) / 5))
    fastest = max(1, min(height, width) // 10)
    uniform = draws(keys, 0, 1 + 3 * _SPRITES)
    light = draws(keys, 16, 1 + _SPRITES)
    # 31 of noise, 63 of background and 80 of each sprite fit in a byte.
    background = (64 * light[:, :1]).astype(np.uint8)
    clips = (noise(keys, FRAMES * height * width) >> 3) + background
    speed = 1 + (fastest * uniform[:, :1]).astype(np.int64)
    for sprite in range(_SPRITES):
        y, x, kind = uniform[:, 1 + 3 * sprite : 4 + 3 * sprite].T
        rows = _track(y, speed, 0, side, height)
        columns = _track(x, speed, 1, side, width)
        at = rows[:, :, :, None] * width + columns[:, :, None, :]
        at += np.arange(batch * FRAMES).reshape(batch, FRAMES, 1, 1) * (height * width)
        masks = sprites(side)[(len(SHAPES) * kind).astype(np.int64)]
        brightness = (48 + 33 * light[:, 1 + sprite]).astype(np.uint8)
        clips.reshape(-1)[at] += (masks * brightness[:, None, None])[:, None]
    return clips.reshape(batch, FRAMES, height, width, 1)


def _track(
    start: np.ndarray, speed: np.ndarray, axis: int, side: int, pixels: int
) -> Int64[np.ndarray, 'b frames side']:
    """Return the rows (or columns) that a sprite covers in each frame, around the edges."""
    first = (pixels * start).astype(np.int64)[:, None] + speed * _LAP[:, axis]
    return (first[:, :, None] + np.arange(side)) % pixels
