"""Operations on channels, labels and other fields of an example."""

from collections.abc import Callable

import numpy as np

from big_vit.data import decode as decode_lib
from big_vit.data.preprocessing import Step
from big_vit.data.transforms import pixels
from big_vit.data.transforms.operations import (
    MOST_CLASSES,
    BadExampleError,
    Columns,
    Draw,
    Images,
    Operation,
    UnfitError,
    decoded,
    need_bytes,
    need_channels,
    number,
    on_images,
    stacked,
    whole_number,
)


def decode(channels=None, black=None, white=None) -> Operation:
    """Decode image files to 1, 3 or 4 (RGBA) channels of bytes; 0 keeps the channels of the file.

    Without a number, the source decides, else 3. The operation that follows does the work, since it
    may need only a part of the image.

    Pixels that are no bytes become bytes so that `black` (0 by default) is 0 and `white` is 255;
    what is beyond is cut off. Without `white`, 16 bits are full range, and other types are refused.
    Arrays keep their channels, and are scaled only if `white` is given.
    """
    if channels not in (None, 0, 1, 3, 4):
        raise UnfitError(f'takes 0, 1, 3 or 4 for channels, not {channels!r}')
    levels = None
    if white is not None:
        levels = number('black', black or 0, -1e9, 1e9), number('white', white, -1e9, 1e9)
    if (white is None and black is not None) or (levels and levels[0] == levels[1]):
        raise UnfitError(f'takes a white that is not black, not {white!r} and {black!r}')

    def apply(images: Images, draw: Draw) -> Images:
        if channels is None and levels is None:
            return images
        if isinstance(images, np.ndarray) and levels is None:
            return images
        made = [_decoding(image, channels, levels, row) for row, image in enumerate(images)]
        return stacked(made) if isinstance(images, np.ndarray) else made

    step: Step | None = 'grey' if channels == 1 else 'keeps'
    return on_images(apply, step=step if levels is None else None, carries=True)


def _decoding(image, channels: int | None, levels: tuple[float, float] | None, row: int):
    try:
        if isinstance(image, decode_lib.Encoded):
            kept = image.shape[2] if channels is None else channels
            return decode_lib.Encoded(image.data, kept, levels)
        return image if levels is None else decode_lib.as_bytes(image, levels)
    except decode_lib.DecodeError as error:
        raise BadExampleError(row, str(error)) from error


def _map_images(images: Images, function: Callable[[np.ndarray], np.ndarray]) -> Images:
    """Apply a function of [..., H, W, C] to all images."""
    images = decoded(images)
    if isinstance(images, np.ndarray):
        return function(images)
    return stacked([function(image) for image in images])


def rgb() -> Operation:
    """Repeat grey as three equal channels; colour images stay as they are."""

    def convert(image: np.ndarray) -> np.ndarray:
        return image if need_channels(image, 1, 3) == 3 else np.repeat(image, 3, axis=-1)

    return on_images(lambda images, draw: _map_images(images, convert), step='keeps', carries=True)


def grayscale() -> Operation:
    """Weigh colours to one channel as in ITU-R BT.601; grey images stay as they are.

    Unlike `pixels.luma` it takes any type, and so does not round as Pillow.
    """

    def convert(image: np.ndarray) -> np.ndarray:
        if need_channels(image, 3, 1) == 1:
            return image
        grey = image @ np.array([0.299, 0.587, 0.114], np.float32)
        if image.dtype != np.float32:
            grey = np.rint(grey)
        return grey.astype(image.dtype)[..., None]

    return on_images(lambda images, draw: _map_images(images, convert), step='grey', carries=True)


def over(background=255) -> Operation:
    """Put RGBA bytes, as `decode(4)` gives, over a colour, one value or three; RGB remains."""
    values = background if isinstance(background, tuple | list) else (background,) * 3
    if len(values) != 3:
        raise UnfitError(f'takes one value or three for background, not {background!r}')
    colour = np.array([whole_number('background', value, 0, 255) for value in values], np.int32)

    def convert(image: np.ndarray) -> np.ndarray:
        need_bytes(image)
        need_channels(image, 4)
        alpha = image[..., 3:].astype(np.int32)
        shape = (1,) * (image.ndim - 1) + (3,)
        blended = image[..., :3] * alpha + colour.reshape(shape) * (255 - alpha)
        return ((blended + 127) // 255).astype(np.uint8)

    return on_images(lambda images, draw: _map_images(images, convert), carries=True)


def invert() -> Operation:
    """Swap black and white."""

    def convert(image: np.ndarray) -> np.ndarray:
        need_bytes(image)
        return pixels.invert(image)

    return on_images(lambda images, draw: _map_images(images, convert), carries=True)


def channels(*numbers) -> Operation:
    """Pick channels of an image in the given order, as in channels(3, 2, 1)."""
    if not numbers:
        raise UnfitError('takes the numbers of channels, such as 3, 2, 1')
    chosen = [whole_number('a channel', n, 0) for n in numbers]

    def convert(image: np.ndarray) -> np.ndarray:
        if max(chosen) >= image.shape[-1]:
            raise UnfitError(f'takes channels below {image.shape[-1]}, not {max(chosen)}')
        return image[..., chosen]

    return on_images(lambda images, draw: _map_images(images, convert), carries=True)


def _labels(columns: Columns, name: str, num_classes: int) -> list[np.ndarray]:
    if name not in columns:
        raise UnfitError(f'needs {name!r}, but these examples have {", ".join(sorted(columns))}')
    labels = [np.atleast_1d(label) for label in columns[name]]
    for row, label in enumerate(labels):
        if label.size and not (label.min() >= 0 and label.max() < num_classes):
            raise BadExampleError(
                row,
                f'label {label.max() if label.min() >= 0 else label.min()} is not one of '
                f'{num_classes} classes',
            )
    return labels


def onehot(num_classes, key='label') -> Operation:
    """Turn a label into probabilities, float32 [num_classes]; several labels share them equally."""
    num_classes = whole_number('num_classes', num_classes, 1, MOST_CLASSES)

    def apply(columns: Columns, draw: Draw) -> Columns:
        labels = _labels(columns, key, num_classes)
        out = np.zeros((len(labels), num_classes), np.float32)
        for row, label in enumerate(labels):
            if not label.size:
                raise BadExampleError(row, 'has no label: use multihot')
            out[row, label] = 1 / len(np.unique(label))
        return {**columns, key: out}

    return Operation(apply, step='keeps', carries=True)


def multihot(num_classes, key='label') -> Operation:
    """Turn labels into float32 [num_classes], 1 for each that is there (for loss='sigmoid')."""
    num_classes = whole_number('num_classes', num_classes, 1, MOST_CLASSES)

    def apply(columns: Columns, draw: Draw) -> Columns:
        labels = _labels(columns, key, num_classes)
        out = np.zeros((len(labels), num_classes), np.float32)
        for row, label in enumerate(labels):
            out[row, label] = 1
        return {**columns, key: out}

    return Operation(apply, step='keeps', carries=True)


def keep(*names) -> Operation:
    """Keep only the named parts of an example."""
    if not names or not all(isinstance(name, str) for name in names):
        raise UnfitError("takes names of parts, such as 'image', 'label'")

    def apply(columns: Columns, draw: Draw) -> Columns:
        for name in names:
            _need(columns, name)
        return {name: columns[name] for name in names}

    return Operation(apply, step='keeps', carries=True)


def rename(**names) -> Operation:
    """Rename parts: rename(fine_label='label') calls fine_label label."""
    if not names or not all(isinstance(name, str) for name in names.values()):
        raise UnfitError("takes old='new', such as fine_label='label'")

    def apply(columns: Columns, draw: Draw) -> Columns:
        for name in names:
            _need(columns, name)
        kept = {name: column for name, column in columns.items() if name not in names}
        return {**kept, **{new: columns[old] for old, new in names.items()}}

    step: Step | None = None if 'image' in {*names, *names.values()} else 'keeps'
    return Operation(apply, step=step, carries=True)


def _need(columns: Columns, name: str) -> None:
    if name not in columns:
        raise UnfitError(f'needs {name!r}, but these examples have {", ".join(sorted(columns))}')


OPERATIONS = {
    operation.__name__: operation
    for operation in (
        decode,
        rgb,
        grayscale,
        invert,
        over,
        channels,
        onehot,
        multihot,
        keep,
        rename,
    )
}
