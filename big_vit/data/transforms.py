"""Image transforms, written as a line of text: 'resize(size) | random_crop(size, 2) | flip_lr'.

The text is parsed, never evaluated. Each operation works on a batch, with randomness that
is a function of the key of each example and of the operation's place in the line, so that
an example looks the same in any batch, on any host. Images stay uint8: the step on the
device turns them into floats.
"""

import ast
import difflib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8, UInt64

from big_vit.data import order
from big_vit.data import randaug as randaug_lib
from big_vit.data.sources import Source
from big_vit.errors import UserError

Images = UInt8[np.ndarray, 'batch height width channels']
Transformed = UInt8[np.ndarray, 'batch new_height new_width new_channels']
# Gives the k-th random number in [0, 1) of each example, float64 [B].
Draw = Callable[[int], np.ndarray]
Operation = Callable[[np.ndarray, Draw], np.ndarray]

# More than any operation draws, so that operations never share a stream.
_STREAMS_PER_OPERATION = 64
_INCEPTION_ATTEMPTS = 10


@dataclass(frozen=True)
class Transform:
    """Operations in a row, from `parse`.

    Attributes:
      text: as the user wrote it.
      key: the config key it came from, for messages.
      names: of the operations.
      operations: what they do.
    """

    text: str
    key: str
    names: tuple[str, ...]
    operations: tuple[Operation, ...]

    @property
    def random_operations(self) -> tuple[str, ...]:
        """Names of the operations that need randomness."""
        return tuple(name for name in self.names if name in _RANDOM)

    @property
    def is_random(self) -> bool:
        return bool(self.random_operations)

    def __call__(self, images: Images, keys: UInt64[np.ndarray, ' batch']) -> Transformed:
        """Transforms uint8 [B, H, W, C] with one key per example.

        Raises:
          UserError: an operation cannot be applied to images of this shape.
        """
        for position, (name, operation) in enumerate(zip(self.names, self.operations, strict=True)):
            first = position * _STREAMS_PER_OPERATION

            def draw(k: int, first: int = first) -> np.ndarray:
                return order.uniform(keys, first + k)

            try:
                images = operation(images, draw)
            except _UnfitError as error:
                raise UserError(f'{self.key}: {name} {error}') from error
        return images


class _UnfitError(ValueError):
    """An argument or an image that an operation cannot take; the message follows its name."""


def _pair(size: Any) -> tuple[int, int]:
    """(height, width) from one number or two."""
    pair = (size, size) if isinstance(size, int) else size
    is_pair = isinstance(pair, tuple | list) and len(pair) == 2
    if not is_pair or not all(type(n) is int and n > 0 for n in pair):
        raise _UnfitError(f'takes a size such as size, 224 or (224, 192), not {size!r}')
    return pair[0], pair[1]


def _whole(name: str, value: Any, least: int) -> int:
    if type(value) is not int or value < least:
        raise _UnfitError(f'takes a whole number of at least {least} for {name}, not {value!r}')
    return value


def _resize_one(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, C] to uint8 [*size, C]: areas are averaged where it shrinks (which is what
    keeps it from aliasing), and interpolated linearly where it grows."""
    import cv2

    channels = image.shape[2]
    shrunk = (min(image.shape[0], size[0]), min(image.shape[1], size[1]))
    for target, how in ((shrunk, cv2.INTER_AREA), (size, cv2.INTER_LINEAR)):
        if image.shape[:2] != target:
            image = cv2.resize(image, target[::-1], interpolation=how)
    return image.reshape(*size, channels)


def _resize_all(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if images.shape[1:3] == size:
        return images
    out = np.empty((len(images), *size, images.shape[3]), np.uint8)
    for i, image in enumerate(images):
        out[i] = _resize_one(image, size)
    return out


def resize(size) -> Operation:
    """To exactly this size, whatever that does to the proportions."""
    size = _pair(size)
    return lambda images, draw: _resize_all(images, size)


def resize_small(n) -> Operation:
    """The shorter side to n, keeping the proportions."""
    n = _whole('n', n, 1)

    def apply(images: np.ndarray, draw: Draw) -> np.ndarray:
        height, width = images.shape[1:3]
        scale = n / min(height, width)
        return _resize_all(images, (max(n, round(height * scale)), max(n, round(width * scale))))

    return apply


def _check_holds(images: np.ndarray, size: tuple[int, int]) -> tuple[int, int]:
    """How far a window of this size can move; _UnfitError when it does not fit."""
    height, width = images.shape[1:3]
    if height < size[0] or width < size[1]:
        raise _UnfitError(
            f'cannot cut {size[0]}x{size[1]} from {height}x{width} images: put resize or '
            'resize_small before it'
        )
    return height - size[0], width - size[1]


def central_crop(size) -> Operation:
    """The middle of the image."""
    size = _pair(size)

    def apply(images: np.ndarray, draw: Draw) -> np.ndarray:
        top, left = (slack // 2 for slack in _check_holds(images, size))
        return images[:, top : top + size[0], left : left + size[1]]

    return apply


def _pad_all(images: np.ndarray, n: int) -> np.ndarray:
    batch, height, width, channels = images.shape
    out = np.zeros((batch, height + 2 * n, width + 2 * n, channels), np.uint8)
    out[:, n : n + height, n : n + width] = images
    return out


def pad(n) -> Operation:
    """n black pixels on each side."""
    n = _whole('n', n, 0)
    return lambda images, draw: _pad_all(images, n)


def random_crop(size, pad=0) -> Operation:
    """A window anywhere in the image, after `pad` black pixels on each side."""
    size = _pair(size)
    pad = _whole('pad', pad, 0)

    def apply(images: np.ndarray, draw: Draw) -> np.ndarray:
        images = _pad_all(images, pad) if pad else images
        down, right = _check_holds(images, size)
        tops = (draw(0) * (down + 1)).astype(np.int64).tolist()
        lefts = (draw(1) * (right + 1)).astype(np.int64).tolist()
        out = np.empty((len(images), *size, images.shape[3]), np.uint8)
        for i, (top, left) in enumerate(zip(tops, lefts, strict=True)):
            out[i] = images[i, top : top + size[0], left : left + size[1]]
        return out

    return apply


def inception_crop(size, min_area=0.05) -> Operation:
    """A window of random area and proportions, resized (Szegedy et al., arXiv:1409.4842).

    Area is uniform in [min_area, 1] of the image, width / height log-uniform in [3/4, 4/3];
    of ten draws the first that fits is taken, else the largest central window that has
    allowed proportions.
    """
    size = _pair(size)
    if isinstance(min_area, bool) or not isinstance(min_area, int | float) or not 0 < min_area <= 1:
        raise _UnfitError(f'takes a fraction in (0, 1] for min_area, not {min_area!r}')

    def apply(images: np.ndarray, draw: Draw) -> np.ndarray:
        batch, height, width, channels = images.shape
        log_aspect = math.log(4 / 3)
        clamped = min(max(width / height, 3 / 4), 4 / 3)
        heights = np.full(batch, max(1, round(min(height, width / clamped))))
        widths = np.full(batch, max(1, round(min(width, height * clamped))))
        tops, lefts = (height - heights) // 2, (width - widths) // 2
        pending = np.ones(batch, bool)
        for attempt in range(_INCEPTION_ATTEMPTS):
            first = 4 * attempt
            area = height * width * (min_area + (1 - min_area) * draw(first))
            aspect = np.exp(log_aspect * (2 * draw(first + 1) - 1))
            h = np.maximum(1, np.rint(np.sqrt(area / aspect))).astype(np.int64)
            w = np.maximum(1, np.rint(np.sqrt(area * aspect))).astype(np.int64)
            take = pending & (h <= height) & (w <= width)
            top = (draw(first + 2) * (height - h + 1)).astype(np.int64)
            left = (draw(first + 3) * (width - w + 1)).astype(np.int64)
            for chosen, value in ((heights, h), (widths, w), (tops, top), (lefts, left)):
                chosen[take] = value[take]
            pending &= ~take
            if not pending.any():
                break
        out = np.empty((batch, *size, channels), np.uint8)
        for i in range(batch):
            window = images[i, tops[i] : tops[i] + heights[i], lefts[i] : lefts[i] + widths[i]]
            out[i] = _resize_one(window, size)
        return out

    return apply


def flip_lr() -> Operation:
    """Mirrored left to right, half of the time."""

    def apply(images: np.ndarray, draw: Draw) -> np.ndarray:
        mirrored = (draw(0) < 0.5)[:, None, None, None]
        return np.where(mirrored, images[:, :, ::-1], images)

    return apply


def _need_channels(images: np.ndarray, *allowed: int) -> int:
    if images.shape[3] not in allowed:
        raise _UnfitError(f'takes images of {allowed[0]} channels, not {images.shape[3]}')
    return images.shape[3]


def rgb() -> Operation:
    """Grey to three equal channels; colour images stay as they are."""
    return lambda images, draw: (
        images if _need_channels(images, 1, 3) == 3 else np.repeat(images, 3, axis=3)
    )


def grayscale() -> Operation:
    """Colour to one channel, weighted as in ITU-R BT.601; grey images stay as they are."""

    def apply(images: np.ndarray, draw: Draw) -> np.ndarray:
        if _need_channels(images, 3, 1) == 1:
            return images
        weights = np.array([0.299, 0.587, 0.114], np.float32)
        return np.rint(images @ weights).astype(np.uint8)[..., None]

    return apply


def invert() -> Operation:
    """Black to white and back."""
    return lambda images, draw: 255 - images


def randaug(layers, magnitude) -> Operation:
    """RandAugment: `layers` operations in a row, each drawn from the sixteen of data/randaug.py."""
    layers = _whole('layers', layers, 1)
    if layers * randaug_lib.DRAWS > _STREAMS_PER_OPERATION:
        most = _STREAMS_PER_OPERATION // randaug_lib.DRAWS
        raise _UnfitError(f'takes at most {most} layers, not {layers}')
    if isinstance(magnitude, bool) or not isinstance(magnitude, int | float):
        raise _UnfitError(f'takes a number for magnitude, not {magnitude!r}')
    if not 0 <= magnitude <= 30:
        raise _UnfitError(f'takes a magnitude from 0 to 30, not {magnitude!r}')

    def apply(images: np.ndarray, draw: Draw) -> np.ndarray:
        _need_channels(images, 3)
        draws = np.stack([draw(k) for k in range(layers * randaug_lib.DRAWS)], axis=-1)
        draws = draws.reshape(len(images), layers, randaug_lib.DRAWS)
        out = np.empty(images.shape, np.uint8)
        for i, image in enumerate(images):
            image = np.ascontiguousarray(image)
            for layer in draws[i]:
                image = randaug_lib.apply(image, float(magnitude), layer)
            out[i] = image
        return out

    return apply


_OPERATIONS: dict[str, Callable[..., Operation]] = {
    operation.__name__: operation
    for operation in (
        resize,
        resize_small,
        central_crop,
        random_crop,
        inception_crop,
        flip_lr,
        pad,
        rgb,
        grayscale,
        invert,
        randaug,
    )
}
_RANDOM = frozenset({'random_crop', 'inception_crop', 'flip_lr', 'randaug'})


def parse(text: str, *, size: tuple[int, int], key: str = 'data') -> Transform:
    """Reads a transform such as 'resize(size) | flip_lr'; an empty text changes nothing.

    Args:
      text: operations separated by |, each a name with literal arguments; the name `size`
        stands for the configured image size.
      size: (height, width) that `size` stands for.
      key: prefix of the config key, such as 'data'.

    Raises:
      UserError: not of that form, no such operation, or arguments that it does not take.
    """
    key = f'{key}.transform'
    if not text.strip():
        return Transform(text, key, (), ())
    try:
        node = ast.parse(text.strip(), mode='eval').body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(
            f'{key}: cannot read {text!r}: write operations separated by |, such as '
            "'resize(size) | flip_lr'"
        ) from error
    calls = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        calls.append(node.right)
        node = node.left
    names, operations = [], []
    for call in reversed([*calls, node]):
        name, operation = _parse_operation(call, size, key)
        names.append(name)
        operations.append(operation)
    return Transform(text, key, tuple(names), tuple(operations))


def _parse_operation(node: ast.expr, size: tuple[int, int], key: str) -> tuple[str, Operation]:
    function = node.func if isinstance(node, ast.Call) else node
    if not isinstance(function, ast.Name):
        raise UserError(
            f'{key}: cannot read {ast.unparse(node)!r}: an operation is a name, with arguments in '
            'parentheses'
        )
    name = function.id
    if name not in _OPERATIONS:
        near = difflib.get_close_matches(name, _OPERATIONS, n=1)
        hint = f'did you mean {near[0]}?' if near else f'there are {", ".join(_OPERATIONS)}'
        raise UserError(f'{key}: there is no operation {name!r}: {hint}')
    signature = inspect.signature(_OPERATIONS[name])
    usage = f'{name}{str(signature).split(" ->")[0]}'

    def argument(value: ast.expr):
        if isinstance(value, ast.Name) and value.id == 'size':
            return size
        try:
            return ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
            raise UserError(
                f'{key}: {ast.unparse(value)!r} in {ast.unparse(node)!r} is neither a number nor '
                f'`size`: write it as {usage}'
            ) from error

    args, kwargs = [], {}
    if isinstance(node, ast.Call):
        args = [argument(value) for value in node.args]
        kwargs = {str(pair.arg): argument(pair.value) for pair in node.keywords}
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UserError(f'{key}: {ast.unparse(node)!r}: {error}: write it as {usage}') from error
    try:
        return name, _OPERATIONS[name](*args, **kwargs)
    except _UnfitError as error:
        raise UserError(f'{key}: {name} {error}: write it as {usage}') from error


def check(
    transform: Transform, source: Source, size: tuple[int, int], *, train: bool
) -> tuple[int, int, int]:
    """Tries a transform on the first example, before a device is touched.

    Args:
      transform: from `parse`.
      source: what it will be applied to.
      size: (height, width) that the model needs.
      train: False refuses random operations, which would make an evaluation irreproducible.

    Returns:
      (height, width, channels) of the images that it gives.

    Raises:
      UserError: another size comes out, it cannot be applied, or it is random and must not be.
    """
    if transform.is_random and not train:
        raise UserError(
            f'{transform.key}: {transform.random_operations[0]} is random, which an evaluation '
            'must not be: remove it'
        )
    image = np.asarray(source.load(np.zeros(1, np.int64))['image'][0])
    keys = order.example_keys(0, 0, np.zeros(1, np.int64))
    height, width, channels = transform(image[None], keys).shape[1:]
    if (height, width) != tuple(size):
        raise UserError(
            f'{transform.key} gives {height}x{width} images but image_size is '
            f'{size[0]}x{size[1]}: add resize(size)'
        )
    return height, width, channels
