"""Invented letters: pretraining for handwriting, signs and symbols without a dataset.

A class is one to three joined or separate strokes, each a cubic Bézier curve with random control
points; an image is the class in another hand: control points moved, then tilted, sheared, scaled
and shifted, with a pen of another width. Drawn by `fdsl`'s rasteriser, and balanced like it.
"""

import numpy as np
from jaxtyping import Int64, UInt8

from big_vit.data import order
from big_vit.data.sources.base import Request, Source
from big_vit.data.sources.fdsl import Lines, drawn, render_lines

_STROKES, _VERTICES = 3, 24
# How far a control point moves between two drawings of a class, of a letter's half width.
_JITTER = 0.12
_MAX_TILT, _MAX_SHEAR = 0.2, 0.25
# Width of the pen, of the image's side.
_PEN = (0.05, 0.16)
# Keys of classes and of instances, as in `fdsl`, whose formulas they must not repeat.
_CLASS, _INSTANCE = 2, 3


def glyphs(request: Request) -> Source:
    """Draw invented letters.

    Example i of `train` is drawing i // num_classes of class i % num_classes; `test` has more
    drawings of the same classes.

    Args:
      request: the examples to draw; `num_classes` is the number of letters, and must be set.

    Raises:
      UserError: `num_classes` is not set, a number is too small, or no such split.
    """
    return drawn('glyphs', render, request)


def render(
    seed: int,
    classes: Int64[np.ndarray, ' b'],
    indices: Int64[np.ndarray, ' b'],
    shape: tuple[int, int],
) -> UInt8[np.ndarray, 'b h w 1']:
    """Draw images, each a function of (seed, its class, its index, shape) alone.

    Args:
      seed: of the letters and of the hands.
      classes: int64 [B], any number from 0.
      indices: int64 [B], distinguish the images of a class.
      shape: (height, width) in pixels.

    Returns:
      uint8 [B, H, W, 1], light strokes on black, anti-aliased.
    """
    return render_lines(_lines, seed, classes, indices, shape)


def _letters(seed: int, classes: Int64[np.ndarray, ' b']) -> tuple[np.ndarray, np.ndarray]:
    """Draw the control points of each class, [B, strokes, 4, 2], and which strokes it has."""
    keys = order.example_keys(seed, _CLASS, classes)
    streams = np.arange(2 + _STROKES + 8 * _STROKES, dtype=np.uint64)
    draws = order.uniform(keys[:, None], streams).astype(np.float32)
    shown = np.arange(_STROKES) < 1 + np.floor(draws[:, :1] * _STROKES)
    points = 2 * draws[:, 2 + _STROKES :].reshape(-1, _STROKES, 4, 2) - 1
    # Most strokes begin where the last one ended, and turn smoothly there.
    joined = draws[:, 2 : 2 + _STROKES] < 0.7
    for stroke in range(1, _STROKES):
        on = joined[:, stroke, None]
        end, before = points[:, stroke - 1, 3], points[:, stroke - 1, 2]
        points[:, stroke, 1] = np.where(on, 2 * end - before, points[:, stroke, 1])
        points[:, stroke, 0] = np.where(on, end, points[:, stroke, 0])
    return points, shown


def _lines(
    seed: int,
    classes: Int64[np.ndarray, ' b'],
    indices: Int64[np.ndarray, ' b'],
    shape: tuple[int, int],
) -> Lines:
    """Compute the strokes of one chunk of images."""
    points, shown = _letters(seed, classes)
    keys = order.example_keys(seed, _INSTANCE, indices)
    hand = order.uniform(keys[:, None], np.arange(8, dtype=np.uint64)).astype(np.float32)
    streams = np.arange(8, 8 + 8 * _STROKES, dtype=np.uint64)
    moved = order.uniform(keys[:, None], streams).astype(np.float32).reshape(points.shape)
    # The end of a stroke and the start of the one that it joins move together.
    touching = np.all(points[:, 1:, 0] == points[:, :-1, 3], -1, keepdims=True)
    moved[:, 1:, 0] = np.where(touching, moved[:, :-1, 3], moved[:, 1:, 0])
    points = points + _JITTER * (2 * moved - 1)

    t = np.linspace(0, 1, _VERTICES + 1, dtype=np.float32)[:, None]
    bezier = np.concatenate([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], 1)
    curve = np.einsum('vc,bscd->bsvd', bezier, points)
    curve = _fitted(curve, shown)
    tilt, shear = _MAX_TILT * (2 * hand[:, 0] - 1), _MAX_SHEAR * (2 * hand[:, 1] - 1)
    y, x = curve[..., 0], curve[..., 1]
    sine, cosine, lean = (
        f(v)[:, None, None] for f, v in ((np.sin, tilt), (np.cos, tilt), (np.asarray, shear))
    )
    x = x + lean * y
    y, x = cosine * y + sine * x, cosine * x - sine * y
    smaller = min(shape)
    half = smaller * (0.26 + 0.14 * hand[:, 2:4])[..., None, None]  # Height and width apart.
    room = smaller * 0.1
    y = y * half[:, 0] + (shape[0] - 1) / 2 + room * (2 * hand[:, 4] - 1)[:, None, None]
    x = x * half[:, 1] + (shape[1] - 1) / 2 + room * (2 * hand[:, 5] - 1)[:, None, None]
    return _pen(y, x, shown, smaller * (_PEN[0] + (_PEN[1] - _PEN[0]) * hand[:, 6]), smaller)


def _fitted(curve: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """Centre the strokes that are shown, [B, strokes, vertices, 2], and scale them to [-1, 1]."""
    mask = shown[:, :, None, None]
    low = np.where(mask, curve, np.inf).min((1, 2), keepdims=True)
    high = np.where(mask, curve, -np.inf).max((1, 2), keepdims=True)
    # The longer side fills the box, the other at most twice as much as it would by itself.
    side = np.maximum(high - low, (high - low).max(-1, keepdims=True) / 2)
    return (2 * curve - (high + low)) / side


def _pen(y: np.ndarray, x: np.ndarray, shown: np.ndarray, width: np.ndarray, smaller: int) -> Lines:
    """Draw each stroke as parallel lines, about a pixel apart, over the width of the pen."""
    count = max(1, round(smaller * _PEN[1]))
    aside = (np.arange(count, dtype=np.float32) - (count - 1) / 2) / max(1, count - 1)
    image, stroke = np.nonzero(shown)
    y, x = y[image, stroke], x[image, stroke]
    dy, dx = np.diff(y, axis=1), np.diff(x, axis=1)
    length = np.sqrt(dy * dy + dx * dx)
    offset = (width[image][:, None] * aside)[:, :, None]  # [strokes, lines, 1]
    unit = 1 / (length + 1e-6)
    y = y[:, None, :-1] + offset * (dx * unit)[:, None]
    x = x[:, None, :-1] - offset * (dy * unit)[:, None]
    points = max(2, round(smaller * 4 / _VERTICES))
    # Lines closer than a pixel share the light of one; a third more fills what lies between.
    share = 1.3 * np.minimum(1, width[image] / count)[:, None, None]
    light = np.broadcast_to((length / points)[:, None] * share, y.shape)

    def flat(values: np.ndarray) -> np.ndarray:
        return np.broadcast_to(values, y.shape).reshape(-1, _VERTICES)

    return Lines(
        np.repeat(image, count),
        flat(y),
        flat(x),
        flat(dy[:, None]),
        flat(dx[:, None]),
        flat(light),
        points,
    )
