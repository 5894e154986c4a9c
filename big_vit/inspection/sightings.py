"""What a model finds in pictures, in words and drawn: objects with boxes, or classes of pixels."""

import io
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from big_vit.data.moves import IGNORED
from big_vit.data.sources.base import Annotation
from big_vit.inspection import html_pages, objects

# Objects whose score is below are neither named nor drawn, by default.
THRESHOLD = 0.5
# How many pictures a page shows.
MOST_PICTURES = 12


class Objects(NamedTuple):
    """Objects in a picture.

    Attributes:
      corners: (x0, y0, x1, y1) in pixels.
    """

    scores: Float[np.ndarray, ' objects']
    labels: Int[np.ndarray, ' objects']
    corners: Float[np.ndarray, 'objects 4']

    def likely(self, threshold: float) -> 'Objects':
        """Return those of at least a score, the surest first."""
        order = np.argsort(-self.scores, kind='stable')
        order = order[self.scores[order] >= threshold]
        return Objects(*(values[order] for values in self))

    def words(self, names: Sequence[str]) -> str:
        """Name the objects, with their scores and corners in whole pixels."""
        places = np.rint(self.corners).astype(int).tolist()
        rows = zip(self.labels.tolist(), self.scores, places, strict=True)
        found = (
            f'{names[label]} {score:.0%} {x0},{y0}-{x1},{y1}'
            for label, score, (x0, y0, x1, y1) in rows
        )
        return '  '.join(found) or 'nothing'

    def drawn(self, picture: np.ndarray, names: Sequence[str]) -> UInt8[np.ndarray, 'h w 3']:
        """Draw the objects over their picture."""
        labels = self.labels.tolist()
        shown = [f'{names[k]} {x:.0%}' for k, x in zip(labels, self.scores, strict=True)]
        return objects.drawn(picture, self.corners, shown, labels)


def shares(labels: Int[np.ndarray, 'height width'], names: Sequence[str], top: int) -> str:
    """Name the classes of most pixels of a label map, with their shares."""
    counts = np.bincount(labels.ravel(), minlength=len(names))
    best = [k for k in np.argsort(-counts, kind='stable')[:top].tolist() if counts[k]]
    return '  '.join(f'{names[k]} {counts[k] / labels.size:.1%}' for k in best)


def label_png(labels: Int[np.ndarray, 'height width'], classes: int) -> bytes:
    """Encode a label map as a PNG file of numbers of classes, with a palette to look at."""
    from PIL import Image

    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette([value for k in range(classes) for value in objects.colour_of(k)])
    file = io.BytesIO()
    image.save(file, 'PNG')
    return file.getvalue()


def jpeg(picture: UInt8[np.ndarray, 'height width 3']) -> bytes:
    """Encode a picture as a JPEG file."""
    import cv2

    return cv2.imencode('.jpg', picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()


def overlap(
    one: Float[np.ndarray, 'n 4'], other: Float[np.ndarray, 'm 4']
) -> Float[np.ndarray, 'n m']:
    """Return intersection over union of all pairs of boxes (x0, y0, x1, y1)."""
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:], other[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (one, other)]
    union = areas[0][:, None] + areas[1][None] - both
    return both / np.where(union > 0, union, 1)


def mistaken(
    found: Objects, truth: Annotation
) -> tuple[Bool[np.ndarray, ' found'], Bool[np.ndarray, ' true']]:
    """Return which detections are of no object, and which objects are not found.

    The surest detection of an object's class that overlaps it by half finds it. What lies in a
    crowd of its class is no mistake, and crowds need not be found.
    """
    wrong, missed = np.ones(len(found.scores), bool), ~truth.crowd
    overlaps = overlap(found.corners, truth.boxes)
    for k in np.argsort(-found.scores, kind='stable').tolist():
        same = (truth.labels == found.labels[k]) & (overlaps[k] >= 0.5)
        free = np.flatnonzero(same & missed)
        if len(free):
            missed[free[overlaps[k][free].argmax()]] = False
            wrong[k] = False
        elif _in_crowd(found.corners[k], truth, int(found.labels[k])):
            wrong[k] = False
    return wrong, missed


def _in_crowd(corners: np.ndarray, truth: Annotation, label: int) -> bool:
    """Whether half of a box lies in a crowd of its class."""
    for box in truth.boxes[truth.crowd & (truth.labels == label)]:
        high, low = np.minimum(corners[2:], box[2:]), np.maximum(corners[:2], box[:2])
        if 2 * np.clip(high - low, 0, None).prod() >= (corners[2:] - corners[:2]).prod():
            return True
    return False


class Judged(NamedTuple):
    """A picture that was looked at.

    Attributes:
      badness: higher is worse; 0 is right.
      words: what is wrong.
      shown: (title, picture) from left to right.
    """

    badness: float
    words: str
    place: str
    shown: list[tuple[str, np.ndarray]]


def judge_objects(
    picture: np.ndarray, found: Objects, truth: Annotation, names: Sequence[str], place: str
) -> Judged:
    """Compare the likely objects of a picture with those that there are."""
    likely = found.likely(THRESHOLD)
    wrong, missed = mistaken(likely, truth)
    words = f'{missed.sum()} missed, {wrong.sum()} wrong of {len(wrong)}'
    shown = [
        ('there is', objects.annotated(picture, truth, names)),
        ('found', likely.drawn(picture, names)),
    ]
    return Judged(float(missed.sum() + wrong.sum()), words, place, shown)


def judge_labels(
    picture: np.ndarray, labels: np.ndarray, truth: np.ndarray, place: str
) -> Judged | None:
    """Compare a label map with the true one; None where nothing counts."""
    kept = truth != IGNORED
    if not kept.any():
        return None
    share = float((labels != truth)[kept].mean())
    error = np.where(kept & (labels != truth), labels, IGNORED)
    shown = [
        ('picture', picture),
        ('true', objects.coloured(picture, truth)),
        ('said', objects.coloured(picture, labels)),
        ('mistaken pixels', objects.coloured(picture, error)),
    ]
    return Judged(share, f'{share:.1%} of its pixels mistaken', place, shown)


def section(judged: Iterable[Judged], looked_at: int, total: int) -> str:
    """Return a part of a page with the worst pictures, a row for each."""
    worst = sorted((one for one in judged if one.badness), key=lambda one: -one.badness)
    some = f'the first {looked_at:,} of {total:,}' if looked_at < total else f'all {total:,}'
    words = f'Of {some} pictures the worst, each with what is mistaken:'
    body = html_pages.paragraph(words if worst else f'Nothing is mistaken in {some} pictures.')
    for one in worst[:MOST_PICTURES]:
        items: list[Any] = [
            (picture, title, f'{one.place}: {title}') for title, picture in one.shown
        ]
        body += html_pages.paragraph(f'{one.place}: {one.words}', 'soft')
        body += html_pages.pictures(items, 'wide')
    return body
