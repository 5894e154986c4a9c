"""Pictures with the boxes, masks and classes of what is in them drawn over them."""

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Integer, UInt8

from big_vit.data.moves import IGNORED, Masks
from big_vit.data.sources.base import Annotation
from big_vit.errors import printable

# Longest side of a drawn picture: lines and letters have a size of their own.
_SIDE = 480
_LETTERS = 14


def colour_of(label: int) -> tuple[int, int, int]:
    """Return a strong colour for a class, unlike those of the classes beside it."""
    hue = (0.02 + 0.61803 * label) % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, 0.95 - 0.25 * (label % 3 == 2))
    return round(255 * red), round(255 * green), round(255 * blue)


def corners(shares: Float[np.ndarray, 'n 4'], size: tuple[int, int]) -> Float[np.ndarray, 'n 4']:
    """Return boxes (centre x, centre y, width, height) in shares as (x0, y0, x1, y1) in pixels.

    Args:
      size: height and width of the picture.
    """
    shares = shares.astype(np.float64)
    low, high = shares[:, :2] - shares[:, 2:] / 2, shares[:, :2] + shares[:, 2:] / 2
    height, width = size
    return np.concatenate([low, high], axis=1) * [width, height, width, height]


def drawn(
    picture: UInt8[np.ndarray, 'height width channels'],
    boxes: Float[np.ndarray, 'n 4'],
    names: Sequence[str],
    labels: Sequence[int],
    masks: Sequence[np.ndarray] | None = None,
    dashed: Sequence[bool] = (),
) -> UInt8[np.ndarray, 'rows columns 3']:
    """Draw boxes with the names of their classes, and masks, over a picture.

    Args:
      picture: of any size; the drawing has a longer side of 480 pixels.
      boxes: (x0, y0, x1, y1) in pixels of the picture.
      names: what is written at each box.
      labels: classes, which the colours are of.
      masks: of the objects, [h, w] of any resolution, over the picture as a whole.
      dashed: which boxes have thin, pale lines: those of crowds.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = picture.shape[:2]
    scale = _SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = _resized(_as_rgb(picture), size)
    for label, mask in zip(labels, masks or (), strict=False):
        shown = _resized(np.asarray(mask, np.uint8) * 255, size)[..., None] > 127
        image = np.where(shown, _blended(image, colour_of(label)), image)
    canvas = Image.fromarray(image.astype(np.uint8))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(_LETTERS)
    crowds = [*dashed, *[False] * len(boxes)]
    # Small boxes come last, or large ones would hide their names.
    order = sorted(range(len(boxes)), key=lambda k: -float(np.prod(boxes[k, 2:] - boxes[k, :2])))
    for k in order:
        place = np.rint(boxes[k] * scale).tolist()
        pen.rectangle(place, outline=colour_of(labels[k]), width=1 if crowds[k] else 3)
    for k in order:
        _write(pen, font, printable(names[k]), np.rint(boxes[k] * scale).tolist(), labels[k], size)
    return np.asarray(canvas)


def _write(
    pen: Any, font: Any, text: str, box: list[float], label: int, size: tuple[int, int]
) -> None:
    """Write a name on its colour, above its box or where there is room."""
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    wide, tall = right - left + 6, bottom - top + 4
    x = min(max(box[0], 0), max(0, size[0] - wide))
    y = box[1] - tall if box[1] >= tall else min(box[1], size[1] - tall)
    colour = colour_of(label)
    bright = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] > 140
    pen.rectangle((x, y, x + wide, y + tall), fill=colour)
    pen.text((x + 3 - left, y + 2 - top), text, fill='black' if bright else 'white', font=font)


def _as_rgb(picture: np.ndarray) -> np.ndarray:
    return np.repeat(picture[..., :1], 3, axis=2) if picture.shape[2] < 3 else picture[..., :3]


def _resized(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR))


def _blended(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return np.rint(0.55 * picture + 0.45 * np.array(colour))


def annotated(
    picture: UInt8[np.ndarray, 'height width channels'],
    own: Annotation,
    class_names: Sequence[str] | None,
) -> UInt8[np.ndarray, 'rows columns 3']:
    """Draw the objects of a picture as its dataset has them, over the picture as it is stored."""
    labels = own.labels.tolist()
    masks = None
    if own.masks is not None:
        stored = Masks(own.masks, (own.height, own.width), np.arange(len(labels)))
        masks = list(stored.pixels())
    names = [_name(label, class_names) for label in labels]
    return drawn(picture, own.boxes, names, labels, masks, own.crowd.tolist())


def transformed(
    picture: UInt8[np.ndarray, 'height width channels'],
    batch: dict[str, np.ndarray],
    row: int,
    class_names: Sequence[str] | None,
) -> UInt8[np.ndarray, 'rows columns 3']:
    """Draw the objects of an example of a batch, as `boxes` gives them, over its picture."""
    real = np.asarray(batch['box_label'][row]) >= 0
    labels = np.asarray(batch['box_label'][row])[real].tolist()
    height, width = np.asarray(batch['picture_size'][row]).tolist()
    boxes = corners(np.asarray(batch['boxes'][row])[real], (height, width))
    masks = list(np.asarray(batch['box_mask'][row])[real]) if 'box_mask' in batch else None
    return drawn(picture, boxes, [_name(label, class_names) for label in labels], labels, masks)


def coloured(
    picture: UInt8[np.ndarray, 'height width channels'],
    classes: Integer[np.ndarray, 'height width'],
) -> UInt8[np.ndarray, 'height width 3']:
    """Lay the colours of classes over the pixels that are of them; ignored ones stay."""
    image = _as_rgb(picture).astype(np.float64)
    for label in np.unique(classes).tolist():
        if label != IGNORED:
            here = (classes == label)[..., None]
            image = np.where(here, _blended(image, colour_of(label)), image)
    return image.astype(np.uint8)


def _name(label: int, class_names: Sequence[str] | None) -> str:
    return class_names[label] if class_names and class_names[label] else str(label)
