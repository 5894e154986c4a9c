"""Small coloured shapes to draw into generated images."""

import functools

import numpy as np
from jaxtyping import Float64, Int64, UInt8

SHAPES = ('square', 'circle', 'cross', 'triangle', 'ring', 'diamond')
COLOURS = ('red', 'green', 'blue', 'yellow', 'magenta', 'cyan')
RGB = np.array([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)], np.float32)


@functools.lru_cache(maxsize=16)
def sprites(side: int) -> UInt8[np.ndarray, 'shapes {side} {side}']:
    """Return masks of 0 and 1 in the order of `SHAPES`; a shared, read-only array."""
    at = (np.arange(side) - (side - 1) / 2) / (side / 2)
    y, x = at[:, None], at[None, :]
    far = np.hypot(y, x)
    masks = np.stack(
        np.broadcast_arrays(
            np.maximum(np.abs(y), np.abs(x)) < 0.85,
            far < 1,
            np.minimum(np.abs(y), np.abs(x)) < 0.34,
            np.abs(x) < (y + 1.1) / 2,
            (far < 1.05) & (far > 0.5),
            np.abs(y) + np.abs(x) < 1.05,
        )
    ).astype(np.uint8)
    masks.setflags(write=False)
    return masks


def paint(
    image: UInt8[np.ndarray, 'b pixels 3'],
    size: tuple[int, int],
    rows: Int64[np.ndarray, ' b'],
    columns: Int64[np.ndarray, ' b'],
    masks: UInt8[np.ndarray, 'b side side'],
    colours: Float64[np.ndarray, 'b 3'],
) -> None:
    """Add a sprite of one colour to each image, with its top left corner at (row, column)."""
    inside = np.arange(masks.shape[1])
    at = (rows[:, None] + inside)[:, :, None] * size[1] + (columns[:, None] + inside)[:, None]
    at += np.arange(len(image))[:, None, None] * (size[0] * size[1])
    image.reshape(-1, 3)[at] += masks[..., None] * colours.astype(np.uint8)[:, None, None]
