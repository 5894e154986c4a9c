"""How the pixels of pictures move, and boxes, masks and classes of pixels with them.

Every resize, crop, mirror and border is a window of the old picture, resized and then mirrored, so
that what belongs to places in a picture moves by one law, whichever operation moved the pixels.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64, Integer, Shaped, UInt8

# The class of a pixel that is of none: it is neither learned nor scored.
IGNORED = 255
# A mask as pycocotools has it: {'size': [height, width], 'counts': bytes}.
Rle = Mapping[str, Any]


class Move(NamedTuple):
    """Where the pixels of a new picture come from.

    Attributes:
      top: of a window of the old picture, in its pixels; like those after it, it may lie beyond it.
      left: of the window.
      height: of the window.
      width: of the window.
      rows: that the window is resized to.
      columns: that the window is resized to.
      mirrored: whether it is then mirrored left to right.
      upturned: whether it is then mirrored top to bottom.
    """

    top: float
    left: float
    height: float
    width: float
    rows: int
    columns: int
    mirrored: bool = False
    upturned: bool = False

    def row_of(self, height: int) -> Int64[np.ndarray, ' rows']:
        """Return the nearest row of the old picture, of this height, for each new one; or -1."""
        return _nearest(float(self.top), float(self.height), self.rows, height, self.upturned)

    def column_of(self, width: int) -> Int64[np.ndarray, ' columns']:
        """Return the nearest column of the old picture, of this width, for each; or -1."""
        return _nearest(float(self.left), float(self.width), self.columns, width, self.mirrored)

    def boxes(
        self, boxes: Float[np.ndarray, 'n 4']
    ) -> tuple[Float32[np.ndarray, 'n 4'], Bool[np.ndarray, ' n']]:
        """Move boxes (x0, y0, x1, y1) in pixels, and clip them to the new picture.

        Returns:
          (boxes, which of them have an area that is left).
        """
        scale = self.columns / self.width, self.rows / self.height
        corners = boxes.astype(np.float64).reshape(-1, 2, 2)
        corners = (corners - (self.left, self.top)) * scale
        size = np.array([self.columns, self.rows])
        for axis, turned in enumerate((self.mirrored, self.upturned)):
            if turned:
                corners[..., axis] = size[axis] - corners[:, ::-1, axis]
        moved = np.clip(corners, 0, size).astype(np.float32)
        sides = moved[:, 1] - moved[:, 0]
        return moved.reshape(-1, 4), np.asarray(sides.min(axis=1) > 0)


def _nearest(
    start: float | int, length: float | int, count: int, side: int, turned: bool
) -> np.ndarray:
    # Between two pixels the first is taken, as OpenCV and Pillow do.
    middle = start + (np.arange(count) + 0.5) * (length / count)
    at = np.ceil(middle - 1e-6).astype(np.int64) - 1
    at[(at < 0) | (at >= side)] = -1
    return at[::-1] if turned else at


class Moves(NamedTuple):
    """A `Move` for each picture of a batch: the same fields, [B] each or one for all."""

    top: Any
    left: Any
    height: Any
    width: Any
    rows: Any
    columns: Any
    mirrored: Any = False
    upturned: Any = False

    def each(self, count: int) -> Iterator[Move]:
        """Yield the move of each of `count` pictures."""
        fields = (np.broadcast_to(field, (count,)).tolist() for field in self)
        yield from map(Move, *fields)


def moved_pixels(values: Shaped[np.ndarray, 'height width'], move: Move, fill: int) -> np.ndarray:
    """Move the classes of pixels, each to the pixels nearest to it; `fill` comes from outside."""
    rows, columns = move.row_of(values.shape[0]), move.column_of(values.shape[1])
    taken = values[rows[:, None], columns[None]]
    taken[rows < 0] = fill
    taken[:, columns < 0] = fill
    return taken


def runs_of(counts: bytes) -> Int64[np.ndarray, ' runs']:
    """Read compressed runs: how many pixels are outside, inside, outside and so on.

    Numbers have five bits a character, the lowest first, and 0x20 where more follow; from the
    fourth on they are what a run differs by from the one before the last.

    Raises:
      ValueError: they are cut off.
    """
    bits = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((bits & 0x20) == 0)
    if (
        not bits.size
        or ends[-1:].tolist() != [bits.size - 1]
        or not ((bits >= 0) & (bits < 64)).all()
    ):
        raise ValueError('its runs cannot be read')
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _MOST_DIGITS:
        raise ValueError('its runs are too long')
    place = np.arange(bits.size) - np.repeat(starts, lengths)
    values = np.add.reduceat((bits & 0x1F) << (5 * place), starts)
    values -= np.where(bits[ends] & 0x10, 1 << (5 * lengths), 0)
    values[1::2], values[2::2] = np.cumsum(values[1::2]), np.cumsum(values[2::2])
    return values


# Five bits each; no mask has more than 2^28 pixels.
_MOST_DIGITS = 7


def decoded_mask(rle: Rle) -> UInt8[np.ndarray, 'height width']:
    """Decode a mask, column by column, to 1 where the object is.

    Raises:
      ValueError: its runs are not of its size.
    """
    height, width = rle['size']
    runs = runs_of(rle['counts'])
    if runs.min() < 0 or runs.sum() != height * width:
        raise ValueError(f'its runs are not of {height * width:,} pixels in all')
    values = np.repeat(np.arange(len(runs), dtype=np.uint8) & 1, runs)
    return values.reshape(width, height).T


class Masks:
    """The masks of the objects in a picture, which are decoded when their pixels are asked for.

    Until then only the rows and columns are kept that the pixels come from, whatever is done.
    """

    def __init__(
        self,
        rles: Sequence[Rle],
        size: tuple[int, int],
        chosen: Integer[np.ndarray, ' n'],
        rows: Int64[np.ndarray, ' rows'] | None = None,
        columns: Int64[np.ndarray, ' columns'] | None = None,
    ):
        """Keep what is needed to make the masks.

        Args:
          rles: of all objects.
          size: (height, width) that these are of.
          chosen: which of them are wanted.
          rows: of these that the wanted rows are, -1 for what is outside.
          columns: likewise.
        """
        self._rles, self._size, self._chosen = rles, size, chosen
        self._rows = np.arange(size[0]) if rows is None else rows
        self._columns = np.arange(size[1]) if columns is None else columns

    def __len__(self) -> int:
        return len(self._chosen)

    def moved(self, move: Move) -> 'Masks':
        """Return the masks that have moved as the picture has."""
        rows, columns = move.row_of(len(self._rows)), move.column_of(len(self._columns))
        rows = np.where(rows < 0, -1, self._rows[rows])
        columns = np.where(columns < 0, -1, self._columns[columns])
        return Masks(self._rles, self._size, self._chosen, rows, columns)

    def of(self, which: Shaped[np.ndarray, ' some']) -> 'Masks':
        """Return some of the masks, by a condition or by number."""
        return Masks(self._rles, self._size, self._chosen[which], self._rows, self._columns)

    def pixels(self) -> UInt8[np.ndarray, 'n height width']:
        """Decode the masks, 1 where an object is.

        Raises:
          ValueError: a mask is damaged.
        """
        masks = np.zeros((len(self), len(self._rows), len(self._columns)), np.uint8)
        for number, own in enumerate(self._chosen.tolist()):
            masks[number] = decoded_mask(self._rles[own])[self._rows[:, None], self._columns[None]]
        masks[:, self._rows < 0] = 0
        masks[:, :, self._columns < 0] = 0
        return masks


# What an example has of the objects in its picture; `box_crowd` and `box_mask` may be missing.
OBJECTS = ('boxes', 'box_label', 'box_crowd', 'box_mask')
# Parts of an example that stand for places in its picture.
PLACED = frozenset((*OBJECTS, 'segmentation'))


def moved(columns: dict[str, Any], moves: Moves) -> dict[str, Any]:
    """Move what belongs to places in pictures, which have moved already; drop boxes that are out.

    Args:
      columns: 'boxes' is a list of float32 [n, 4], 'box_label' of [n], 'box_crowd' of bool [n],
        'box_mask' of `Masks`; 'segmentation' one of [height, width]. Any may be missing.
      moves: of the pictures.
    """
    if not PLACED & columns.keys():
        return columns
    each = list(moves.each(len(columns['image'])))
    result = dict(columns)
    if 'segmentation' in columns:
        pairs = zip(columns['segmentation'], each, strict=True)
        result['segmentation'] = [moved_pixels(values, move, IGNORED) for values, move in pairs]
    if 'box_mask' in columns:
        pairs = zip(columns['box_mask'], each, strict=True)
        result['box_mask'] = [masks.moved(move) for masks, move in pairs]
    if 'boxes' in columns:
        pairs = zip(columns['boxes'], each, strict=True)
        boxes, kept = zip(*(move.boxes(own) for own, move in pairs), strict=True)
        result['boxes'] = list(boxes)
        result = chosen(result, kept)
    return result


def chosen(columns: dict[str, Any], which: Sequence[np.ndarray]) -> dict[str, Any]:
    """Keep some of the objects of each picture."""
    result = dict(columns)
    for name in OBJECTS:
        if name in columns:
            result[name] = [
                own.of(some) if isinstance(own, Masks) else own[some]
                for own, some in zip(columns[name], which, strict=True)
            ]
    return result
