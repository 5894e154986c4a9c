"""Operations of a transform, and the helpers that they share.

An operation works on the columns of a few examples at a time. Its randomness is a function of each
example's key and of the operation's place in the transform, so an example looks the same in any
batch on any host. Arguments are checked when the operation is made.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from big_vit.data import decode
from big_vit.data.normalisation import Normalisation
from big_vit.data.preprocessing import Step

# Returns the k-th random number in [0, 1) of every example, float64 [B].
Draw = Callable[[int], np.ndarray]
Columns = dict[str, Any]
# [H, W, C] of any type, or an encoded file (`decode.Encoded`).
Image = Any
# [B, H, W, C], or a list of B images.
Images = Any

# The longest side that an operation makes; a config allows no larger image.
MOST_SIDE = 1 << 14
# Lengths of tokens, and numbers of classes, whose arrays an example may have.
MOST_TOKENS, MOST_CLASSES = 1 << 20, 1 << 24

# Random numbers reserved for each operation; more than any draws, so that none share a stream.
STREAMS = 64


class Operation(NamedTuple):
    """An operation of a transform.

    Attributes:
      apply: function of (columns, draw) to columns, which must not change its argument.
      random: whether it calls `draw`.
      normalisation: the map of pixel values that it is, or None if it does not rescale them.
      step: what it is to other codebases, or None if they have no such operation.
      carries: whether boxes, masks and classes of pixels fit its pictures: it moves no pixels, or
        moves these as well.
    """

    apply: Callable[[Columns, Draw], Columns]
    random: bool = False
    normalisation: Normalisation | None = None
    step: Step | None = None
    carries: bool = False


class UnfitError(ValueError):
    """An operation cannot take an argument or an example; the message continues its name."""


class BadExampleError(ValueError):
    """An example is damaged; `row` is its position in the batch."""

    def __init__(self, row: int, reason: str):
        super().__init__(reason)
        self.row = row


def need_images(columns: Columns) -> None:
    """Raise UnfitError where examples have no images."""
    if 'image' not in columns:
        raise UnfitError(f'needs images, but these examples have {", ".join(sorted(columns))}')


def on_images(
    function: Callable[[Images, Draw], Images],
    random: bool = False,
    step: Step | None = None,
    carries: bool = False,
) -> Operation:
    """Make an operation from a function of the column 'image', an array [B, H, W, C] or a list."""

    def apply(columns: Columns, draw: Draw) -> Columns:
        need_images(columns)
        return {**columns, 'image': function(columns['image'], draw)}

    return Operation(apply, random, step=step, carries=carries)


def per_image(
    function: Callable[[np.ndarray, np.ndarray], np.ndarray],
    draws: int = 0,
    carries: bool = False,
) -> Operation:
    """Make an operation from a function of one image [H, W, C].

    Args:
      function: of (image, random numbers in [0, 1), float64 [draws]); must not change the image.
      draws: how many random numbers an image needs, at most STREAMS.
      carries: whether no pixel is moved.
    """
    assert draws <= STREAMS

    def apply(images: Images, draw: Draw) -> Images:
        numbers = np.empty((len(images), draws))
        for k in range(draws):
            numbers[:, k] = draw(k)
        return stacked([function(decoded_row(images, i), numbers[i]) for i in range(len(images))])

    return on_images(apply, random=draws > 0, carries=carries)


def decoded_row(images: Images, row: int) -> np.ndarray:
    """Return image `row` as an array [H, W, C], decoding it if necessary.

    Raises:
      BadExampleError: the image cannot be decoded.
    """
    image = images[row]
    if isinstance(image, decode.Encoded):
        try:
            return image.pixels()
        except decode.DecodeError as error:
            raise BadExampleError(row, str(error)) from error
    return image


def decoded(images: Images) -> Images:
    """Decode all images that are still encoded."""
    if isinstance(images, np.ndarray):
        return images
    return stacked([decoded_row(images, i) for i in range(len(images))])


def stacked(images: list[np.ndarray]) -> Images:
    """Stack images of the same shape and type into one array; return others as the list."""
    first = images[0]
    if isinstance(first, np.ndarray) and all(
        isinstance(x, np.ndarray) and x.shape == first.shape and x.dtype == first.dtype
        for x in images
    ):
        return np.stack(images)
    return images


def sizes(images: Images) -> tuple[np.ndarray, np.ndarray]:
    """Return (heights, widths), int64 [B] each, without decoding."""
    if isinstance(images, np.ndarray):
        batch, height, width = images.shape[:3]
        return np.full(batch, height), np.full(batch, width)
    shapes = np.array([image.shape[:2] for image in images], np.int64)
    return shapes[:, 0], shapes[:, 1]


def need_channels(image: np.ndarray, *allowed: int) -> int:
    """Return the number of channels of an image [..., C].

    Raises:
      UnfitError: it is not one of those allowed.
    """
    if image.shape[-1] not in allowed:
        raise UnfitError(f'takes images of {allowed[0]} channels, not {image.shape[-1]}')
    return image.shape[-1]


def need_bytes(image: np.ndarray) -> None:
    """Raise UnfitError unless the image is uint8."""
    if image.dtype != np.uint8:
        raise UnfitError(f'takes images of bytes (uint8), not {image.dtype}')


# Checks of arguments when an operation is made; all raise UnfitError.

Real = float | int


def pair(size: Any) -> tuple[int, int]:
    """Read (height, width) from one number or two."""
    both = (size, size) if isinstance(size, int) else size
    is_pair = isinstance(both, tuple | list) and len(both) == 2
    if not is_pair or not all(type(n) is int and 0 < n <= MOST_SIDE for n in both):
        raise UnfitError(
            f'takes a size such as size, 224 or (224, 192) of at most {MOST_SIDE:,}, not {size!r}'
        )
    return both[0], both[1]


def need_room(row: int, height: int, width: int, frames: int = 1) -> None:
    """Raise BadExampleError if an image or video would have more than `decode.MAX_PIXELS`."""
    if frames * height * width > decode.MAX_PIXELS:
        what = f'{frames} frames of {height}x{width}' if frames > 1 else f'{height}x{width} pixels'
        raise BadExampleError(
            row, f'{what} would be more than the {decode.MAX_PIXELS:,} pixels allowed'
        )


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Check a whole number from `least` to `most`."""
    if type(value) is not int or value < least or (most is not None and value > most):
        limit = f'of at least {least}' if most is None else f'from {least} to {most}'
        raise UnfitError(f'takes a whole number {limit} for {name}, not {value!r}')
    return value


def number(name: str, value: Any, least: Real, most: Real) -> float:
    """Check a number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise UnfitError(f'takes a number from {least:g} to {most:g} for {name}, not {value!r}')
    return float(value)


def span(name: str, value: Any, least: Real, most: Real) -> tuple[float, float]:
    """Check (low, high), two numbers in order from `least` to `most`."""
    is_pair = isinstance(value, tuple | list) and len(value) == 2
    if not is_pair or any(isinstance(v, bool) or not isinstance(v, int | float) for v in value):
        raise UnfitError(f'takes two numbers (low, high) for {name}, not {value!r}')
    low, high = float(value[0]), float(value[1])
    if not least <= low <= high <= most:
        raise UnfitError(f'takes {least:g} <= low <= high <= {most:g} for {name}, not {value!r}')
    return low, high


def choice(name: str, value: Any, *allowed: str) -> str:
    """Check that a value is one of the allowed words."""
    if value not in allowed:
        raise UnfitError(f'takes {" or ".join(map(repr, allowed))} for {name}, not {value!r}')
    return value
