"""Formula-driven images: pretraining without a dataset.

A class is a formula, an image is one noisy drawing of it, so that labelled images come in
any number, at any size, from a seed alone. In the manner of VisualAtom (Takashima et al.,
"Visual Atoms: Pre-training Vision Transformers with Sinusoidal Waves", CVPR 2023,
arXiv:2303.01112): concentric orbits, each the sum of two sine waves of the angle. The
formulas, ranges and the drawing are our own; see `_class_parameters`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8, UInt64

from big_vit.data import order
from big_vit.data.sources.base import Columns, Request, Source
from big_vit.data.sources.splits import cut
from big_vit.errors import UserError

# Images of each class.
TRAIN_INSTANCES, TEST_INSTANCES = 1000, 50
_MAX_ORBITS = 6
_MAX_FREQUENCY = 20
_MAX_TILT = 0.25  # radians
# Keys of classes and of instances must not coincide; epochs do not exist here, so their
# slot in the key tells the two apart.
_CLASS, _INSTANCE = 0, 1
# Accumulator of one chunk, small enough to stay in the second-level cache.
CHUNK_BYTES = 1 << 19


def fdsl(request: Request) -> Source:
    """Draw images from formulas.

    Example i of `train` is instance i // num_classes of class i % num_classes, so that any
    prefix is balanced. `test` has 50 more instances of each class, which follow those of `train`.

    Args:
      request: the examples to draw; `num_classes` is the number of formulas, and must be set.

    Raises:
      UserError: `num_classes` is not set, a number is too small, or no such split.
    """
    return drawn('fdsl', render, request)


def drawn(
    name: str,
    draw: Callable[[int, np.ndarray, np.ndarray, tuple[int, int]], np.ndarray],
    request: Request,
) -> Source:
    """Open images that a function draws: any number of classes, in turn.

    Args:
      name: value of `data.name`.
      draw: as `render`.
      request: as of `fdsl`.
    """
    key, num_classes, image_size = request.key, request.num_classes, request.image_size
    if num_classes is None:
        raise UserError(f'config: {key}.num_classes must be set for {key}.name={name!r}')
    for setting, value, least in (
        ('num_classes', num_classes, 1),
        ('image_size', min(image_size), 8),
    ):
        if value < least:
            raise UserError(f'{key}.{setting} is {value}: set {least} or more')
    sizes = {'train': num_classes * TRAIN_INSTANCES, 'test': num_classes * TEST_INSTANCES}

    def open_split(split: str) -> Source:
        first = sizes['train'] if split == 'test' else 0

        def load(indices: np.ndarray) -> Columns:
            indices = first + np.asarray(indices, np.int64)
            classes = indices % num_classes
            images = draw(request.seed, classes, indices, image_size)
            return {'image': images, 'label': classes.astype(np.int32)}

        return Source(
            name=name,
            split=split,
            length=sizes[split],
            num_classes=num_classes,
            image_shape=(*image_size, 1),
            load=load,
            in_memory=True,
            channels=1,
            labels=lambda: (np.arange(sizes[split]) % num_classes).astype(np.int32),
        )

    return cut(name, sizes, open_split, request)


def render(
    seed: int,
    classes: Int64[np.ndarray, ' b'],
    indices: Int64[np.ndarray, ' b'],
    shape: tuple[int, int],
) -> UInt8[np.ndarray, 'b h w 1']:
    """Draw images, each a function of (seed, its class, its index, shape) alone.

    Sines differ in the last bit between kinds of processors, so that a pixel may differ by
    one gray level between them.

    Args:
      seed: of the formulas and of the noise.
      classes: int64 [B], any number from 0.
      indices: int64 [B], distinguish the images of a class.
      shape: (height, width) in pixels.

    Returns:
      uint8 [B, H, W, 1], light lines on black, anti-aliased.
    """
    return render_lines(_thick_lines, seed, classes, indices, shape)


class Lines(NamedTuple):
    """Closed polygons of `vertices` edges.

    Attributes:
      image: number of the image that each polygon belongs to, int64 [polygons].
      y: first end of each edge in pixels, [polygons, vertices].
      x: likewise.
      dy: from there to its other end, [polygons, vertices].
      dx: likewise.
      light: brightness times length of each edge, per point drawn, [polygons, vertices].
      points: number of points to draw on each edge.
    """

    image: np.ndarray
    y: np.ndarray
    x: np.ndarray
    dy: np.ndarray
    dx: np.ndarray
    light: np.ndarray
    points: int


def _class_parameters(seed: int, classes: Int64[np.ndarray, ' b']) -> dict[str, np.ndarray]:
    """Draw the formula of each class, float32 [B] each.

    The radius of orbit k at angle θ is  inner + k·step + λ1·sin(n1·θ + k·twist) +
    λ2·sin(n2·θ + phase), and an image shows the first `orbits` of them, rotated by `turn`.
    """
    keys = order.example_keys(seed, _CLASS, classes)
    draws = [order.uniform(keys, stream).astype(np.float32) for stream in range(9)]
    # Squared: most formulas are smooth, whose shapes survive at few pixels.
    n1 = np.floor(draws[0] ** 2 * (_MAX_FREQUENCY + 1))
    n2 = np.floor(draws[1] ** 2 * (_MAX_FREQUENCY + 1))
    orbits = 1 + np.floor(draws[4] * _MAX_ORBITS)
    inner = 0.25 + 0.45 * draws[5]
    return {
        'n1': n1,
        'n2': n2,
        # High frequencies get low amplitudes: steep waves would smear into a disc.
        'amplitude1': (0.08 + 0.3 * draws[2]) / (1 + n1 / 8),
        'amplitude2': (0.08 + 0.3 * draws[3]) / (1 + n2 / 8),
        'orbits': orbits,
        'inner': inner,
        'step': (1.0 - inner) / np.maximum(orbits - 1, 1),
        'twist': 2 * np.pi * draws[6] / _MAX_ORBITS,
        'phase': 2 * np.pi * draws[7],
        'turn': 2 * np.pi * draws[8],
    }


def _lines(
    seed: int,
    classes: Int64[np.ndarray, ' b'],
    indices: Int64[np.ndarray, ' b'],
    shape: tuple[int, int],
) -> Lines:
    """Compute the orbits of one chunk of images."""
    height, width = shape
    smaller = min(shape)
    formula = {k: v[:, None, None] for k, v in _class_parameters(seed, classes).items()}
    keys = order.example_keys(seed, _INSTANCE, indices)

    def draw(stream: int) -> np.ndarray:
        return order.uniform(keys, stream).astype(np.float32)[:, None, None]

    # Enough vertices for the fastest wave, and enough points between them for the longest
    # orbit to have no gaps: about two points for each pixel of a circle.
    vertices = 96 if smaller <= 64 else 192
    points = max(2, round(smaller * 9 / vertices))
    orbit = np.arange(_MAX_ORBITS, dtype=np.float32)[:, None]
    angle = np.linspace(0, 2 * np.pi, vertices, endpoint=False, dtype=np.float32)
    radius = _radius(formula, orbit, angle) + (0.08 * draw(0)) * _vertex_noise(keys, vertices)
    reach = formula['inner'] + formula['step'] * (formula['orbits'] - 1)
    reach = reach + formula['amplitude1'] + formula['amplitude2']
    scale = 0.34 + 0.12 * draw(1)
    radius *= smaller * scale / reach
    # The orientation of a drawing is part of its class: a model must learn to see it.
    turned = angle + formula['turn'] + _MAX_TILT * (2 * draw(2) - 1)
    # Smaller drawings have more room to move.
    room = smaller * (0.96 - 2 * scale)
    y = radius * np.sin(turned) + (height - 1) / 2 + room * (draw(3) - 0.5)
    x = radius * np.cos(turned) + (width - 1) / 2 + room * (draw(4) - 0.5)
    shown = orbit < formula['orbits']
    brightness = (0.55 + 0.45 * draw(5)) * shown

    # Only the orbits that are shown cost time from here on.
    rows = np.flatnonzero(shown[:, :, 0])
    y, x = (v.reshape(-1, vertices)[rows] for v in (y, x))
    brightness = np.broadcast_to(brightness, shown.shape).reshape(-1, 1)[rows]
    dy, dx = np.roll(y, -1, 1) - y, np.roll(x, -1, 1) - x
    # Light per length of line, not per point: fast parts of a wave are as bright as slow ones.
    light = np.sqrt(dy * dy + dx * dx) * (brightness / points)
    return Lines(rows // _MAX_ORBITS, y, x, dy, dx, light, points)


def _radius(formula: dict[str, np.ndarray], orbit: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Return the radius of each orbit at each angle, [B, orbits, angles]."""
    return (
        formula['inner']
        + orbit * formula['step']
        + formula['amplitude1'] * np.sin(formula['n1'] * angle + orbit * formula['twist'])
        + formula['amplitude2'] * np.sin(formula['n2'] * angle + formula['phase'])
    )


def _vertex_noise(keys: UInt64[np.ndarray, ' b'], vertices: int) -> np.ndarray:
    stream = np.arange(8, 8 + _MAX_ORBITS * vertices, dtype=np.uint64)
    noise = order.uniform(keys[:, None], stream).astype(np.float32)
    return noise.reshape(len(keys), _MAX_ORBITS, vertices) - np.float32(0.5)


def _thicken(lines: Lines, shape: tuple[int, int]) -> Lines:
    """Draw lines as parallel strokes, one pixel apart, in images of more than 112 pixels."""
    strokes = max(1, round(min(shape) / 112))
    if strokes == 1:
        return lines
    image, y, x, dy, dx, light, points = lines
    vertices = y.shape[1]
    length = np.sqrt(dy * dy + dx * dx)
    aside = np.arange(strokes, dtype=np.float32)[:, None, None] - (strokes - 1) / 2
    y = (y + aside * dx / (length + 1e-6)).reshape(-1, vertices)
    x = (x - aside * dy / (length + 1e-6)).reshape(-1, vertices)
    dy, dx, light = (np.tile(v, (strokes, 1)) for v in (dy, dx, light))
    return Lines(np.tile(image, strokes), y, x, dy, dx, light, points)


def _thick_lines(
    seed: int,
    classes: Int64[np.ndarray, ' b'],
    indices: Int64[np.ndarray, ' b'],
    shape: tuple[int, int],
) -> Lines:
    return _thicken(_lines(seed, classes, indices, shape), shape)


def render_lines(
    lines_of: Callable[..., Lines],
    seed: int,
    classes: Int64[np.ndarray, ' b'],
    indices: Int64[np.ndarray, ' b'],
    shape: tuple[int, int],
) -> UInt8[np.ndarray, 'b h w 1']:
    """Draw images a few at a time, from what `lines_of(seed, classes, indices, shape)` gives."""
    chunk = max(1, CHUNK_BYTES // (8 * shape[0] * shape[1]))
    images = np.empty((len(indices), *shape, 1), np.uint8)
    for start in range(0, len(indices), chunk):
        part = slice(start, start + chunk)
        lines = lines_of(seed, classes[part], indices[part], shape)
        images[part] = rasterize(lines, len(indices[part]), shape)
    return images


def rasterize(lines: Lines, batch: int, shape: tuple[int, int]) -> UInt8[np.ndarray, 'b h w 1']:
    """Add the points of all lines to images, each spread over the four nearest pixels."""
    height, width = shape
    t = np.arange(lines.points, dtype=np.float32)[:, None, None] / lines.points
    y = np.clip(lines.y + t * lines.dy, 0, height - 1.001)
    x = np.clip(lines.x + t * lines.dx, 0, width - 1.001)
    row, column = y.astype(np.int32), x.astype(np.int32)
    y -= row
    x -= column
    at = row * width + column + (lines.image * (height * width))[:, None].astype(np.int32)
    lower = lines.light * y
    upper = lines.light - lower
    image = np.zeros(batch * height * width)
    for offset, weight in (
        (0, upper - upper * x),
        (1, upper * x),
        (width, lower - lower * x),
        (width + 1, lower * x),
    ):
        part = np.bincount(at.ravel(), weight.ravel(), batch * height * width - offset)
        image[offset:] += part[: len(image) - offset]
    np.minimum(image, 1, out=image)
    image *= 255
    return np.rint(image).astype(np.uint8).reshape(batch, height, width, 1)
