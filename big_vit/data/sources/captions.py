"""Pictures of one coloured shape, each with a caption."""

import numpy as np
from jaxtyping import Int64, UInt8, UInt64

from big_vit.data import order
from big_vit.data.sources.base import Columns, Request, Source
from big_vit.data.sources.sprites import COLOURS, RGB, SHAPES, paint, sprites
from big_vit.data.sources.synthetic import (
    CHUNK_BYTES,
    SPLITS,
    check_size,
    draws,
    noise,
    synthetic_source,
)

_CAPTIONS = (
    'a {colour} {shape}',
    'a picture of a {colour} {shape}',
    'one {shape}, and it is {colour}',
    'here is something {colour}: a {shape}',
)
# Each shape and each colour occurs once among the six pairs that training never shows.
_SEEN = [(c, s) for c in range(6) for s in range(6) if (c + s) % 6]
_UNSEEN = [(c, (6 - c) % 6) for c in range(6)]
_ALL = np.array(_SEEN + _UNSEEN)


def captions(request: Request) -> Source:
    """Generate pictures of one coloured shape, each with a sentence that describes it.

    There are six shapes in six colours, but `train` shows 30 of the 36: every shape and every
    colour, but never a red square, a green diamond and four others. `test` has all 36, `unseen`
    those six alone: a model that is right there has understood the words one by one.

    Args:
      request: the examples to generate, of `train`, `test` and `unseen`.

    Returns:
      A source of columns 'image', uint8 [B, H, W, 3], 'text', B strings of ASCII of less than 48
      characters, and 'label', int32 [B], whose classes are named like 'red circle'.

    Raises:
      UserError: the size is too small, or no such split.
    """
    height, width = check_size(request, (12, 12))
    shown = {'train': (0, len(_SEEN)), 'unseen': (len(_SEEN), len(_UNSEEN))}

    def load(split: int, indices: np.ndarray) -> Columns:
        first, count = shown.get(tuple(SPLITS)[split], (0, len(_ALL)))
        colours, shapes = _ALL[first + indices % count].T
        keys = order.example_keys(request.seed, 8 + split, indices)
        forms = (draws(keys, 4, 1)[:, 0] * len(_CAPTIONS)).astype(np.int64)
        texts = [
            _CAPTIONS[form].format(colour=COLOURS[colour], shape=SHAPES[shape])
            for colour, shape, form in zip(colours, shapes, forms, strict=True)
        ]
        return {'image': _images(keys, colours, shapes, (height, width)), 'text': texts}

    return synthetic_source(
        'captions',
        request,
        group=180,
        class_names=tuple(f'{COLOURS[colour]} {SHAPES[shape]}' for colour, shape in _ALL),
        image_shape=(height, width, 3),
        chunk=max(1, CHUNK_BYTES // (height * width * 3)),
        load=load,
        shown=shown,
    )


def _images(
    keys: UInt64[np.ndarray, ' b'],
    colours: Int64[np.ndarray, ' b'],
    shapes: Int64[np.ndarray, ' b'],
    size: tuple[int, int],
) -> UInt8[np.ndarray, 'b h w 3']:
    """Draw one sprite somewhere in each image."""
    height, width = size
    batch, side = len(keys), max(7, round(min(size) * 0.45))
    y, x, light, ground = draws(keys, 0, 4).T
    image = (noise(keys, height * width * 3) >> 3).reshape(batch, -1, 3)
    image += (48 * ground).astype(np.uint8)[:, None, None]
    rows = ((height - side + 1) * y).astype(np.int64)
    columns = ((width - side + 1) * x).astype(np.int64)
    colour = RGB[colours] * (96 + 80 * light)[:, None]
    paint(image, size, rows, columns, sprites(side)[shapes], colour)
    return image.reshape(batch, height, width, 3)
