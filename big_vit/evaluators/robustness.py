"""Accuracy on corrupted images, made on the devices from bytes, at severities 1 to 5.

Corruptions with a name from ImageNet-C (arXiv 1903.12261) have its formulas and constants; lengths
in pixels, which it gives for images of 224, are scaled to the shorter side. The others are
`box_blur` (a square instead of its disk), `haze` (its fog, with octaves of resized noise instead of
the diamond-square fractal, and constants that grow at each step), `occlusion` and `translation`.
Results are rounded to bytes as in ImageNet-C, but not compressed as JPEG. Corruptions that need
pictures (frost, snow), a codec (jpeg_compression) or random walks of pixels (glass_blur, elastic)
are left out.

Random numbers depend on (seed, corruption, index of the example in its split) alone, so they are
the same for all severities, and on any batch or mesh.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from big_vit import sharding
from big_vit.errors import UserError
from big_vit.evaluators.classification import head_step
from big_vit.evaluators.evaluation import Evaluation, Evaluator, SharedFeatures
from big_vit.evaluators.requirements import requires

# The side of the images that constants in pixels are given for.
_SIDE = 224

Image = Float[Array, 'height width channels']
# (image 0..1, key, severity from 0) -> image, which is clipped to 0..1 afterwards.
Formula = Callable[[Image, Array, Array], Image]


def _names(corruptions: tuple[str, ...] | None, severities: tuple[int, ...]) -> tuple[str, ...]:
    return 'mean', *(corruptions or ()), *(f'severity_{severity}' for severity in severities)


@requires('logits', labels='any', scores=_names)
def robustness(
    evaluation: Evaluation,
    *,
    corruptions: tuple[str, ...] | None = None,
    severities: tuple[int, ...] = (1, 2, 3, 4, 5),
) -> Evaluator:
    """Score the head on corrupted images.

    Args:
      corruptions: names in `FORMULAS`; None for all that the images allow.
      severities: from 1 to 5.

    Raises:
      UserError: the model does not take images of bytes, or a corruption does not fit them.
    """
    key, split = evaluation.key, evaluation.split
    shape, dtype = split.example_spec.parts.get('image', ((), None))
    if split.reads != ('image',) or len(shape) != 3:
        raise UserError(f'config: {key}: robustness is of images, the model takes {split.reads}')
    if dtype != np.uint8:
        raise UserError(
            f'config: {key}: robustness corrupts images of bytes (uint8), these are {dtype}; what '
            'makes floats of them belongs behind to_device'
        )
    names = choose_corruptions(corruptions, shape[-1], key)
    step, corrupt = head_step(evaluation), make_corrupt(evaluation.mesh, evaluation.seed)

    def evaluate(params: Any, shared: SharedFeatures) -> dict[str, float]:
        with jax.transfer_guard('allow'):
            return scores(
                step, params, split.batches(), corrupt, corruptions=names, severities=severities
            )

    return evaluate


def _at(severity: Array, *constants: float | int) -> Array:
    return jnp.asarray(constants, jnp.float32)[severity]


def gaussian_noise(image: Image, key: Array, severity: Array) -> Image:
    """x + c n, with n standard normal for each value."""
    return image + _at(severity, 0.08, 0.12, 0.18, 0.26, 0.38) * jax.random.normal(key, image.shape)


def shot_noise(image: Image, key: Array, severity: Array) -> Image:
    """Poisson(c x) / c, where white is c photons."""
    photons = _at(severity, 60, 25, 12, 5, 3)
    return jax.random.poisson(key, image * photons).astype(jnp.float32) / photons


def impulse_noise(image: Image, key: Array, severity: Array) -> Image:
    """Set a share of the values to 0 or 1, half of it each."""
    half = _at(severity, 0.03, 0.06, 0.09, 0.17, 0.27) / 2
    drawn = jax.random.uniform(key, image.shape)
    return jnp.where(drawn < half, 0.0, jnp.where(drawn > 1 - half, 1.0, image))


def speckle_noise(image: Image, key: Array, severity: Array) -> Image:
    """x + c x n, with n standard normal for each value."""
    c = _at(severity, 0.15, 0.2, 0.35, 0.45, 0.6)
    return image + c * image * jax.random.normal(key, image.shape)


def _mixed(image: Image, tables: Callable[[int], np.ndarray], severity: Array) -> Image:
    """Multiply rows and columns by matrices, `tables(side)` [5, side, side] by severity."""
    height, width, _ = image.shape
    rows, columns = (jnp.asarray(tables(side))[severity] for side in (height, width))
    exact = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    return exact('hi,wj,ijc->hwc', rows, columns, image)


def _kernels(side: int, weight: Callable[[np.ndarray, float], np.ndarray], sizes: np.ndarray):
    """Make the matrices of a blur, [sizes, side, side]; pixels of the edge repeat beyond it."""
    matrices = np.zeros((len(sizes), side, side))
    for matrix, size in zip(matrices, sizes, strict=True):
        away = np.arange(-2 * side, 2 * side + 1)
        weights = weight(away.astype(np.float64), size)
        for row in range(side):
            np.add.at(matrix[row], np.clip(row + away, 0, side - 1), weights / weights.sum())
    return matrices.astype(np.float32)


def gaussian_blur(image: Image, key: Array, severity: Array) -> Image:
    """Gaussians with a deviation of 1, 2, 3, 4, 6 pixels of 224, cut off at four deviations."""
    scale = min(image.shape[:2]) / _SIDE

    def weight(away: np.ndarray, sigma: float) -> np.ndarray:
        bell = np.exp(-0.5 * np.square(away / sigma))
        return np.where(np.abs(away) <= int(4 * sigma + 0.5), bell, 0)

    sizes = np.array([1, 2, 3, 4, 6]) * scale
    return _mixed(image, lambda side: _kernels(side, weight, sizes), severity)


def box_blur(image: Image, key: Array, severity: Array) -> Image:
    """Means over squares that extend 3, 4, 6, 8, 10 pixels of 224, the radii of its defocus blur.

    Pixels on the border count by the share of them that the square covers.
    """
    scale = min(image.shape[:2]) / _SIDE

    def weight(away: np.ndarray, half: float) -> np.ndarray:
        return np.clip(half + 1 - np.abs(away), 0, 1)

    sizes = np.array([3, 4, 6, 8, 10]) * scale
    return _mixed(image, lambda side: _kernels(side, weight, sizes), severity)


def pixelate(image: Image, key: Array, severity: Array) -> Image:
    """Shrink to 0.6, 0.5, 0.4, 0.3, 0.25 of the side by means over areas, and enlarge again."""

    def tables(side: int) -> np.ndarray:
        made = []
        for share in (0.6, 0.5, 0.4, 0.3, 0.25):
            few = max(int(side * share), 1)
            edges = np.arange(few + 1) * side / few
            pixels = np.arange(side)
            covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
            down = np.clip(covered, 0, 1) * few / side
            made.append(down[((pixels + 0.5) * few / side).astype(int)])
        return np.stack(made).astype(np.float32)

    return _mixed(image, tables, severity)


def brightness(image: Image, key: Array, severity: Array) -> Image:
    """Add c to the value of HSV: all channels times (v + c) / v, and black becomes grey."""
    value = image.max(axis=-1, keepdims=True)
    raised = jnp.minimum(value + _at(severity, 0.1, 0.2, 0.3, 0.4, 0.5), 1)
    return jnp.where(value > 0, image * raised / jnp.maximum(value, 1e-6), raised)


def contrast(image: Image, key: Array, severity: Array) -> Image:
    """(x - m) c + m, with the mean m of each channel."""
    mean = image.mean(axis=(0, 1), keepdims=True)
    return (image - mean) * _at(severity, 0.4, 0.3, 0.2, 0.1, 0.05) + mean


def saturate(image: Image, key: Array, severity: Array) -> Image:
    """Multiply the saturation of HSV by c and add d: less colour, then more. Grey counts as red."""
    times, plus = _at(severity, 0.3, 0.1, 2, 5, 20), _at(severity, 0, 0, 0, 0.1, 0.2)
    value = image.max(axis=-1, keepdims=True)
    saturation = (value - image.min(axis=-1, keepdims=True)) / jnp.maximum(value, 1e-6)
    changed = jnp.clip(saturation * times + plus, 0, 1)
    # The distance of each channel below the value, as a share of value times saturation.
    below = (value - image) / jnp.maximum(value * saturation, 1e-6)
    red = jnp.asarray([0.0, 1.0, 1.0]).reshape(1, 1, 3)
    return value * (1 - changed * jnp.where(saturation > 0, below, red))


def haze(image: Image, key: Array, severity: Array) -> Image:
    """(x + c f) m / (m + c), with the largest value m and a smooth random field f from 0 to 1.

    The field sums noise on grids of 2, 4, 8, ... cells, each with half the weight of the last.
    """
    height, width, _ = image.shape
    c = _at(severity, 1.5, 2, 2.5, 3, 3.5)
    field, octave = jnp.zeros((height, width)), 1
    while 2**octave <= min(height, width):
        noise = jax.random.uniform(jax.random.fold_in(key, octave), (2**octave, 2**octave))
        field += jax.image.resize(noise, (height, width), 'linear') / 2**octave
        octave += 1
    field = (field - field.min()) / jnp.maximum(field.max() - field.min(), 1e-6)
    most = image.max()
    return (image + c * field[..., None]) * most / (most + c)


def occlusion(image: Image, key: Array, severity: Array) -> Image:
    """Cover 0.1, 0.2, 0.3, 0.4, 0.5 of the area by a grey box of the image's shape, anywhere."""
    height, width, _ = image.shape
    side = jnp.sqrt(_at(severity, 0.1, 0.2, 0.3, 0.4, 0.5))
    corner = jax.random.uniform(key, (2,))

    def inside(length: int, drawn: Array) -> Array:
        start, pixels = jnp.round(drawn * (1 - side) * length), jnp.arange(length)
        return (pixels >= start) & (pixels < start + jnp.round(side * length))

    box = inside(height, corner[0])[:, None] & inside(width, corner[1])[None]
    return jnp.where(box[..., None], 0.5, image)


def translation(image: Image, key: Array, severity: Array) -> Image:
    """Move by 0.05, 0.1, 0.15, 0.2, 0.25 of the shorter side in any direction; fill with black."""
    height, width, _ = image.shape
    angle = 2 * np.pi * jax.random.uniform(key)
    far = _at(severity, 0.05, 0.1, 0.15, 0.2, 0.25) * min(height, width)

    def moved(length: int, by: Array) -> tuple[Array, Array]:
        at = jnp.arange(length) - jnp.round(by).astype(jnp.int32)
        return jnp.clip(at, 0, length - 1), (at >= 0) & (at < length)

    rows, real_rows = moved(height, far * jnp.sin(angle))
    columns, real_columns = moved(width, far * jnp.cos(angle))
    real = real_rows[:, None] & real_columns[None]
    return jnp.where(real[..., None], image[rows][:, columns], 0)


FORMULAS: dict[str, Formula] = {
    function.__name__: function
    for function in (
        gaussian_noise,
        shot_noise,
        impulse_noise,
        speckle_noise,
        gaussian_blur,
        box_blur,
        pixelate,
        brightness,
        contrast,
        saturate,
        haze,
        occlusion,
        translation,
    )
}
_NEEDS_COLOURS = ('saturate',)


def choose_corruptions(names: tuple[str, ...] | None, channels: int, key: str) -> tuple[str, ...]:
    """Return the corruptions asked for, or all that images with so many channels allow.

    Raises:
      UserError: a corruption needs colours that the images do not have.
    """
    wrong = [name for name in names or () if name in _NEEDS_COLOURS and channels != 3]
    if wrong:
        raise UserError(
            f'config: {key}.corruptions: {wrong[0]} is of three channels, the images have '
            f'{channels}: leave it out'
        )
    return names or tuple(n for n in FORMULAS if channels == 3 or n not in _NEEDS_COLOURS)


def corrupted(
    name: str,
    images: UInt8[Array, 'batch height width channels'],
    index: Int[Array, ' batch'],
    severity: Int[Array, ''],
    seed: int,
) -> UInt8[Array, 'batch height width channels']:
    """Corrupt images and round them to bytes.

    Args:
      index: of each image in its split.
      severity: from 1 to 5.
    """
    key = jax.random.fold_in(jax.random.key(seed), list(FORMULAS).index(name))

    def corrupt_one(image: Array, place: Array) -> Array:
        formula, draw = FORMULAS[name], jax.random.fold_in(key, place)
        made = formula(image.astype(jnp.float32) / 255, draw, severity - 1)
        return jnp.round(jnp.clip(made, 0, 1) * 255).astype(jnp.uint8)

    return jax.vmap(corrupt_one)(images, index)


def make_corrupt(mesh: Mesh, seed: int) -> Callable[..., Array]:
    """Jit `corrupted` as a function of (images, index, severity, name=...)."""
    split = sharding.batch_sharding(mesh)

    def corrupt(images: Array, index: Array, severity: Array, *, name: str) -> Array:
        return corrupted(name, images, index, severity, seed)

    return jax.jit(corrupt, static_argnames='name', out_shardings=split)


def scores(
    eval_step: Callable[[Any, Any], dict[str, jax.Array]],
    params: Any,
    batches: Iterable[dict[str, Any]],
    corrupt: Callable[..., Array],
    *,
    corruptions: tuple[str, ...],
    severities: tuple[int, ...],
) -> dict[str, float]:
    """Compute {'mean', 'gaussian_noise', ..., 'severity_1', ..., 'count'}: top-1 of the head.

    A corruption is averaged over severities, a severity over corruptions, and 'mean' over both.

    Args:
      eval_step: `classification.sums`, jitted.
      batches: with images of bytes.
      corrupt: from `make_corrupt`.
    """
    right = np.zeros((len(corruptions), len(severities)))
    count, start = 0.0, 0
    for batch in batches:
        size = len(batch['image'])
        index = sharding.place(
            np.arange(start, start + size, dtype=np.int32), batch['mask'].sharding
        )
        start += size
        outputs = []
        for name in corruptions:
            for severity in severities:
                images = corrupt(batch['image'], index, np.int32(severity), name=name)
                outputs.append(eval_step(params, {**batch, 'image': images}))
                if len(outputs) > 2:  # So that no more than a few corrupted batches wait.
                    jax.block_until_ready(outputs[-3])
        sums = jax.device_get([{k: output[k] for k in ('top1', 'count')} for output in outputs])
        right += np.array([output['top1'] for output in sums], np.float64).reshape(right.shape)
        count += float(sums[0]['count'])
    share = right / count
    return {
        'mean': float(share.mean()),
        **{name: float(row.mean()) for name, row in zip(corruptions, share, strict=True)},
        **{f'severity_{s}': float(c.mean()) for s, c in zip(severities, share.T, strict=True)},
        'count': count,
    }
