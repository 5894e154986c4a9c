"""Pictures of four sprites, each with a question about one of them."""

import itertools

import numpy as np
from jaxtyping import Int64, UInt8, UInt64

from big_vit.data import order
from big_vit.data.sources.base import Columns, Request, Source
from big_vit.data.sources.sprites import COLOURS, RGB, SHAPES, paint, sprites
from big_vit.data.sources.synthetic import CHUNK_BYTES, check_size, draws, noise, synthetic_source

_ANSWERS = COLOURS[:4]
_PLACES = ('top left', 'top right', 'bottom left', 'bottom right')
_QUESTIONS = (
    'what colour is at the {place}',
    'name the colour of the {place} one',
    'what colour is the {shape}',
    'name the colour of the {shape}',
)
_PERMUTATIONS = np.array(list(itertools.permutations(range(4))))


def pairs(request: Request) -> Source:
    """Generate pictures with a question that neither of them answers alone.

    Each quarter of a picture has a sprite, with four different colours and four different shapes.
    The question names a quarter or a shape, and the label is the colour there. Every picture comes
    with four questions, one for each answer; every question of a group of 16 comes with four
    pictures, one for each answer. So a model that sees only one of them is right on exactly 1/4.

    Args:
      request: the examples to generate, of `train` and `test`.

    Returns:
      A source of columns 'image', uint8 [B, H, W, 3], 'text', B strings of ASCII of less than 48
      characters, and 'label', int32 [B].

    Raises:
      UserError: the size is too small, or no such split.
    """
    size = check_size(request, (16, 16))

    def load(split: int, indices: np.ndarray) -> Columns:
        group, within = np.divmod(indices, 16)
        turn, label = np.divmod(within, 4)
        # No picture has this key.
        keys = order.example_keys(request.seed, 2 + split, group)
        uniform = draws(keys, 0, 2) * len(_PERMUTATIONS)
        base, shapes = (_PERMUTATIONS[draw.astype(np.int64)] for draw in uniform.T)
        colours = (base + turn[:, None]) % 4
        asked = (colours == label[:, None]).argmax(axis=1)
        form = order.uniform(keys, (2 + asked).astype(np.uint64)) * len(_QUESTIONS)
        images = _images(
            order.example_keys(request.seed, split, indices // 4), colours, shapes, size
        )
        return {'image': images, 'text': _texts(form.astype(np.int64), asked, shapes)}

    return synthetic_source(
        'pairs',
        request,
        group=16,
        class_names=_ANSWERS,
        image_shape=(*size, 3),
        chunk=max(1, CHUNK_BYTES // (size[0] * size[1] * 3)),
        load=load,
    )


def quiz(request: Request) -> Source:
    """Generate pictures and questions as `pairs` does, but colours may repeat in a picture.

    The question alone is right on exactly 1/4. The picture alone, without knowing what is asked,
    can at best name its most frequent colour: 17/32 (0.53) on average. That gives a model a slope
    to start on, which `pairs` lacks: there, nothing is learned before both are.

    Args, returns and raises are those of `pairs`.
    """
    size = check_size(request, (16, 16))

    def load(split: int, indices: np.ndarray) -> Columns:
        rows, label = np.arange(len(indices)), indices % 4
        uniform = draws(order.example_keys(request.seed, 4 + split, indices), 0, 7)
        asked = (uniform[:, 4] * 4).astype(np.int64)
        shapes = _PERMUTATIONS[(uniform[:, 5] * len(_PERMUTATIONS)).astype(np.int64)]
        form = (uniform[:, 6] * len(_QUESTIONS)).astype(np.int64)
        colours = (uniform[:, :4] * 4).astype(np.int64)
        # All are turned by as much as makes the one that is asked for the label.
        colours = (colours + (label - colours[rows, asked])[:, None]) % 4
        images = _images(
            order.example_keys(request.seed, 6 + split, indices), colours, shapes, size
        )
        return {'image': images, 'text': _texts(form, asked, shapes)}

    return synthetic_source(
        'quiz',
        request,
        group=4,
        class_names=_ANSWERS,
        image_shape=(*size, 3),
        chunk=max(1, CHUNK_BYTES // (size[0] * size[1] * 3)),
        load=load,
    )


def _texts(
    forms: Int64[np.ndarray, ' b'],
    places: Int64[np.ndarray, ' b'],
    shapes: Int64[np.ndarray, 'b 4'],
) -> list[str]:
    """Write the question of each picture about the sprite at a place."""
    named = shapes[np.arange(len(shapes)), places]
    rows = zip(forms.tolist(), places.tolist(), named.tolist(), strict=True)
    return [
        _QUESTIONS[form].format(place=_PLACES[place], shape=SHAPES[shape])
        for form, place, shape in rows
    ]


def _images(
    keys: UInt64[np.ndarray, ' b'],
    colours: Int64[np.ndarray, 'b 4'],
    shapes: Int64[np.ndarray, 'b 4'],
    size: tuple[int, int],
) -> UInt8[np.ndarray, 'b h w 3']:
    """Draw one sprite in each quarter of an image, somewhere in it."""
    height, width = size[0] // 2, size[1] // 2
    batch = len(keys)
    side = max(5, round(min(height, width) * 0.55))
    uniform = draws(keys, 0, 13)
    image = (noise(keys, size[0] * size[1] * 3) >> 3).reshape(batch, -1, 3)
    image += (48 * uniform[:, 12]).astype(np.uint8)[:, None, None]
    for place in range(4):
        y, x, light = uniform[:, 3 * place : 3 * place + 3].T
        row, column = divmod(place, 2)
        rows = row * height + ((height - side + 1) * y).astype(np.int64)
        columns = column * width + ((width - side + 1) * x).astype(np.int64)
        colour = RGB[colours[:, place]] * (96 + 80 * light)[:, None]
        paint(image, size, rows, columns, sprites(side)[shapes[:, place]], colour)
    return image.reshape(batch, *size, 3)
