"""Label maps: the class of each pixel of a picture."""

import io
from typing import Any

import numpy as np
from jaxtyping import Int32

from big_vit.data import decode

# The label of pixels that do not count.
IGNORED = 255


class LabelMapError(ValueError):
    """A label map cannot be read as numbers of classes; the message is one line."""


def read(value: Any) -> Int32[np.ndarray, 'height width']:
    """Return a label map of a source, an array or an encoded file, as numbers of classes.

    Raises:
      LabelMapError: it cannot be read, or its channels differ, so that they are colours.
    """
    if isinstance(value, decode.Encoded):
        value = value.data
    if isinstance(value, bytes):
        from PIL import Image, UnidentifiedImageError

        try:
            # Of a palette the numbers, not the colours.
            value = np.asarray(Image.open(io.BytesIO(value)))
        except (UnidentifiedImageError, OSError) as error:
            raise LabelMapError(f'the label map cannot be decoded: {error}') from error
    value = np.asarray(value)
    if value.ndim == 3 and (value == value[..., :1]).all():
        value = value[..., 0]
    if value.ndim != 2 or value.dtype.kind not in 'iub':
        raise LabelMapError(
            f'the label map is {value.dtype} {list(value.shape)}: it must hold the number of a '
            'class for each pixel, no colours'
        )
    return value.astype(np.int32)


def without_zero(labels: Int32[np.ndarray, '...']) -> Int32[np.ndarray, '...']:
    """Number classes from 0 that are numbered from 1, and ignore pixels of number 0 (ADE20K)."""
    kept = (labels != 0) & (labels != IGNORED)
    return np.where(kept, labels - 1, IGNORED).astype(np.int32)
