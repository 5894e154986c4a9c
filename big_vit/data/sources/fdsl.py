"""Formula-driven images: pretraining without a dataset.

A class is a formula, an image is one noisy drawing of it, so that labelled images come in
any number, at any size, from a seed alone. In the manner of VisualAtom (Takashima et al.,
"Visual Atoms: Pre-training Vision Transformers with Sinusoidal Waves", CVPR 2023,
arXiv:2303.01112): concentric orbits, each the sum of two sine waves of the angle. Here the
formulas, ranges and the drawing are our own; see `_class_parameters`.
"""

import numpy as np
from jaxtyping import Int64, UInt8

from big_vit.data import order
from big_vit.data.sources.base import Source, cut
from big_vit.errors import UserError

_TEST_INSTANCES = 50
_MAX_ORBITS = 6
_MAX_FREQUENCY = 20
_MAX_TILT = 0.25  # radians
# Keys of classes and of instances must not coincide; epochs do not exist here, so their
# slot in the key tells the two apart.
_CLASS, _INSTANCE = 0, 1
# Of the accumulator of one chunk, so that it stays in the second-level cache.
_CHUNK_BYTES = 1 << 19


def _class_parameters(seed: int, classes: Int64[np.ndarray, ' b']) -> dict[str, np.ndarray]:
    """The formula of each class, float32 [B] each.

    The radius of orbit k at angle θ is  inner + k·step + λ1·sin(n1·θ + k·twist) +
    λ2·sin(n2·θ + phase), of which an image shows the first `orbits`, turned by `turn`.
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


def _draw(
    seed: int,
    classes: Int64[np.ndarray, ' b'],
    indices: Int64[np.ndarray, ' b'],
    shape: tuple[int, int],
) -> UInt8[np.ndarray, 'b h w 1']:
    """One chunk of images; see `render`."""
    height, width = shape
    smaller = min(shape)
    batch = len(indices)
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
    # The waves do not depend on the instance, only on the orbit through its phase.
    radius = (
        formula['inner']
        + orbit * formula['step']
        + formula['amplitude1'] * np.sin(formula['n1'] * angle + orbit * formula['twist'])
        + formula['amplitude2'] * np.sin(formula['n2'] * angle + formula['phase'])
    )
    vertex = np.arange(8, 8 + _MAX_ORBITS * vertices, dtype=np.uint64)
    noise = order.uniform(keys[:, None], vertex).astype(np.float32)
    noise = noise.reshape(batch, _MAX_ORBITS, vertices) - np.float32(0.5)
    radius += (0.08 * draw(0)) * noise
    reach = formula['inner'] + formula['step'] * (formula['orbits'] - 1)
    reach = reach + formula['amplitude1'] + formula['amplitude2']
    scale = 0.34 + 0.12 * draw(1)
    radius *= smaller * scale / reach
    # Which way up a drawing is belongs to its class: a model must learn to see it.
    turned = angle + formula['turn'] + _MAX_TILT * (2 * draw(2) - 1)
    # Smaller drawings have more room to move about in.
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
    length = np.sqrt(dy * dy + dx * dx)
    # Large images need lines wider than a pixel: parallel strokes, one pixel apart.
    strokes = max(1, round(smaller / 112))
    if strokes > 1:
        aside = np.arange(strokes, dtype=np.float32)[:, None, None] - (strokes - 1) / 2
        y = (y + aside * dx / (length + 1e-6)).reshape(-1, vertices)
        x = (x - aside * dy / (length + 1e-6)).reshape(-1, vertices)
        dy, dx, length, brightness = (
            np.tile(v, (strokes, 1)) for v in (dy, dx, length, brightness)
        )
        rows = np.tile(rows, strokes)
    # Light per length of line, not per point: fast parts of a wave are as bright as slow ones.
    light = length * (brightness / points)
    t = np.arange(points, dtype=np.float32)[:, None, None] / points
    y = np.clip(y + t * dy, 0, height - 1.001)
    x = np.clip(x + t * dx, 0, width - 1.001)
    row, column = y.astype(np.int32), x.astype(np.int32)
    y -= row
    x -= column
    at = row * width + column + (rows // _MAX_ORBITS * (height * width))[:, None].astype(np.int32)
    lower = light * y
    upper = light - lower
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


def render(
    seed: int,
    classes: Int64[np.ndarray, ' b'],
    indices: Int64[np.ndarray, ' b'],
    shape: tuple[int, int],
) -> UInt8[np.ndarray, 'b h w 1']:
    """Draws images, each a function of (seed, its class, its index, shape) alone.

    Sines differ in the last bit between kinds of processor, so that a pixel may differ by
    one grey level from one kind to another.

    Args:
      seed: of the formulas and of the noise.
      classes: int64 [B], any number from 0.
      indices: int64 [B], tells the images of a class apart.
      shape: (height, width) in pixels.

    Returns:
      uint8 [B, H, W, 1], light lines on black, anti-aliased.
    """
    chunk = max(1, _CHUNK_BYTES // (8 * shape[0] * shape[1]))
    images = np.empty((len(indices), *shape, 1), np.uint8)
    for start in range(0, len(indices), chunk):
        part = slice(start, start + chunk)
        images[part] = _draw(seed, classes[part], indices[part], shape)
    return images


def fdsl(
    split: str,
    num_classes: int,
    image_size: int | tuple[int, int],
    seed: int = 0,
    instances: int = 1000,
    key: str = 'data',
) -> Source:
    """A source of formula-driven images.

    Example i of `train` is instance i // num_classes of class i % num_classes, so that any
    prefix is balanced. `test` has 50 more instances of each class, those after the ones of
    `train`.

    Args:
      split: of `train` and `test`, see `parse_split`.
      num_classes: how many formulas.
      image_size: pixels, one number or (height, width).
      seed: of the formulas and of the noise.
      instances: of each class in `train`.
      key: prefix of the config keys in messages.

    Raises:
      UserError: a number that is not positive, or no such split.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    for name, value, least in (
        ('num_classes', num_classes, 1),
        ('instances', instances, 1),
        ('image_size', min(height, width), 8),
    ):
        if value < least:
            raise UserError(f'{key}.{name} is {value}: set {least} or more')
    sizes = {'train': num_classes * instances, 'test': num_classes * _TEST_INSTANCES}

    def whole(name: str) -> Source:
        first = sizes['train'] if name == 'test' else 0

        def load(indices: np.ndarray) -> dict:
            indices = first + np.asarray(indices, np.int64)
            classes = indices % num_classes
            images = render(seed, classes, indices, (height, width))
            return {'image': images, 'label': classes.astype(np.int32)}

        return Source(
            name='fdsl',
            split=name,
            length=sizes[name],
            num_classes=num_classes,
            image_shape=(height, width, 1),
            load=load,
            in_memory=True,
            channels=1,
            labels=lambda: (np.arange(sizes[name]) % num_classes).astype(np.int32),
        )

    return cut('fdsl', sizes, whole, split, key)
