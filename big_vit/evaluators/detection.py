"""Average precision and recall of boxes and masks, as pycocotools computes them (COCO)."""

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from big_vit.data.sources import Source
from big_vit.data.sources.base import Annotation
from big_vit.distributed import hosts
from big_vit.errors import UserError
from big_vit.evaluators import sliding_window
from big_vit.evaluators.classification import class_names
from big_vit.evaluators.evaluation import Evaluation, Evaluator, SharedFeatures, Split
from big_vit.evaluators.requirements import requires
from big_vit.evaluators.segmentation import at_size, check_classes, local_rows
from big_vit.tasks.batch import Batch

# In the order of `COCOeval.stats`.
FIGURES = (
    *('AP', 'AP50', 'AP75', 'AP_small', 'AP_medium', 'AP_large'),
    *('AR_1', 'AR_10', 'AR_100', 'AR_small', 'AR_medium', 'AR_large'),
)
# What pycocotools has of an object, and of a detection.
Entry = dict[str, Any]


@requires('boxes', labels='none', scores=lambda **_: FIGURES)
def detection(evaluation: Evaluation, *, per_class: str = 'none') -> Evaluator:
    """Score boxes, and masks where model and data have them, by COCO's twelve figures.

    Figures of masks are named mask/AP and so on. One that nothing can be said of is -1.

    Args:
      per_class: 'all' adds the AP of each class that occurs.

    Raises:
      UserError: the data has no boxes, or other classes than that of training.
    """
    key, split = evaluation.key, evaluation.split
    annotations_of(split.source, key)
    check_classes(split.source, evaluation.training, key)
    detect, names = evaluation.detect, class_names(evaluation.training)
    assert detect is not None

    def rows(params: Any, batch: Batch) -> tuple[dict[str, Array], dict[str, Array]]:
        batch = split.prepare(batch)
        found = detect(params, batch)._asdict()
        masks, mask = found.pop('masks'), batch['mask']
        if masks is None:
            return {**found, 'mask': mask}, {}
        size = sliding_window.picture_sizes(batch)
        return {**found, 'mask': mask}, {'masks': masks, 'mask': mask, 'size': size}

    step = evaluation.compile_rows(('detect', split.device), rows)

    def evaluate(params: Any, shared: SharedFeatures) -> dict[str, float]:
        found = gather(step, params, split, key)
        truth = ground_truth(split.source, found.examples, names)
        listed = names if per_class == 'all' else ()
        figures = score(truth, found.boxes, 'bbox', listed)
        if found.masks is not None and truth.masked:
            masked = score(truth, found.masks, 'segm', listed)
            figures |= {f'mask/{name}': value for name, value in masked.items()}
        return {**figures, 'count': float(len(found.examples))}

    return evaluate


def annotations_of(source: Source, key: str = 'evals') -> Callable[[np.ndarray], list[Annotation]]:
    """Return what gives the objects in the pictures of a source.

    Raises:
      UserError: it has none.
    """
    if source.annotations is None:
        raise UserError(
            f'config: {key}: {source.name} {source.split} has no boxes of objects: name data that '
            'has them, see docs/data.md'
        )
    return source.annotations


class Found:
    """Detections in the pictures of a split, in the order of these, as COCO has results.

    Attributes:
      examples: numbers of the pictures, without those that cannot be read.
      boxes: entries with 'bbox'.
      masks: entries with 'segmentation'; None without.
    """

    def __init__(self) -> None:
        self.examples: list[int] = []
        self.boxes: list[Entry] = []
        self.masks: list[Entry] | None = None


class Truth:
    """Objects of a split as pycocotools has them, and whether they have masks."""

    def __init__(self, dataset: Entry, masked: bool):
        self.dataset, self.masked = dataset, masked

    def coco(self, entries: list[Entry] | None = None) -> Any:
        """Return an index of the objects, or of others in the same pictures."""
        from pycocotools.coco import COCO

        made = COCO()
        made.dataset = self.dataset if entries is None else {**self.dataset, 'annotations': entries}
        made.createIndex()
        return made


def image_ids(annotations: Sequence[Annotation]) -> list[int]:
    """Return the numbers of pictures; where two have the same, as of several files, new ones."""
    ids = [int(one.image_id) for one in annotations]
    return ids if len(set(ids)) == len(ids) else list(range(1, len(ids) + 1))


def ground_truth(source: Source, examples: Sequence[int], names: Sequence[str]) -> Truth:
    """Return what the annotations of some examples say, as COCO's files do.

    Numbers of objects begin at 1, since pycocotools takes a match with number 0 for none.
    Categories are the classes, of which the first has number 1.
    """
    annotations = annotations_of(source)(np.array(examples, np.int64))
    objects: list[Entry] = []
    for image, one in zip(image_ids(annotations), annotations, strict=True):
        for k in range(len(one.labels)):
            entry: Entry = {
                'id': len(objects) + 1,
                'image_id': image,
                'category_id': int(one.labels[k]) + 1,
                'bbox': xywh(one)[k].tolist(),
                'area': float(one.area[k]),
                'iscrowd': int(one.crowd[k]),
            }
            if one.masks is not None:
                entry['segmentation'] = dict(one.masks[k])
            objects.append(entry)
    images = [
        {'id': image, 'file_name': one.identity, 'height': one.height, 'width': one.width}
        for image, one in zip(image_ids(annotations), annotations, strict=True)
    ]
    categories = [{'id': k + 1, 'name': name} for k, name in enumerate(names)]
    dataset = {'images': images, 'annotations': objects, 'categories': categories}
    return Truth(dataset, bool(objects) and all('segmentation' in entry for entry in objects))


def xywh(annotation: Annotation) -> Float[np.ndarray, 'n 4']:
    """Return boxes as (x, y, width, height), the numbers of the file where it has such."""
    if annotation.xywh is not None:
        return annotation.xywh
    x0, y0, x1, y1 = annotation.boxes.reshape(-1, 4).T
    return np.stack([x0, y0, x1 - x0, y1 - y0], axis=1)


def results(
    scores: Float[np.ndarray, ' objects'],
    labels: Int[np.ndarray, ' objects'],
    boxes: Float[np.ndarray, 'objects 4'],
    size: tuple[int, int],
    image: int,
    category: Callable[[int], int] = lambda label: label + 1,
) -> list[Entry]:
    """Return the detections of a picture as entries of COCO's files of results.

    Args:
      boxes: (centre x, centre y, width, height) as shares of the picture.
      size: height and width of the picture.
      image: its number.
      category: the number of the category of a class.
    """
    shares = boxes.astype(np.float64)
    corners = shares[:, :2] - shares[:, 2:] / 2
    scale = np.array([size[1], size[0]], np.float64)
    placed = np.concatenate([corners * scale, shares[:, 2:] * scale], axis=1)
    return [
        {'image_id': image, 'category_id': category(label), 'bbox': box, 'score': score}
        for label, box, score in zip(labels.tolist(), placed.tolist(), scores.tolist(), strict=True)
    ]


def mask_counts(
    masks: Float[np.ndarray, 'objects rows columns'],
    canvas: tuple[int, int],
    picture: tuple[int, int],
    size: tuple[int, int],
) -> list[str]:
    """Return compressed run lengths of masks over a picture in its own size, from their logits.

    Args: as for `segmentation.at_size`.
    """
    from pycocotools import mask as coco_mask

    here = at_size(np.moveaxis(masks, 0, -1), canvas, picture, size) > 0
    runs = coco_mask.encode(np.asfortranarray(here.astype(np.uint8)))
    return [one['counts'].decode('ascii') for one in runs]


def gather(
    step: Callable[[Any, Batch], tuple[dict[str, Array], dict[str, Array]]],
    params: Any,
    split: Split,
    key: str,
) -> Found:
    """Find the objects in all pictures of a split; every host gets those of all.

    Raises:
      UserError: a score or a box is not finite.
    """
    canvas, annotations = split.example_spec.parts['image'][0][:2], annotations_of(split.source)
    kept: dict[int, dict[str, np.ndarray]] = {}
    local: dict[int, list[str]] = {}
    waiting: list[tuple[int, Any]] = []
    has_masks = False

    def size_of(example: int) -> tuple[int, int]:
        (one,) = annotations(np.array([example], np.int64))
        return one.height, one.width

    def fetch() -> None:
        nonlocal has_masks
        start, (everywhere, here) = waiting.pop(0)
        columns = jax.device_get(everywhere)
        real: Bool[np.ndarray, ' batch'] = columns.pop('mask') > 0
        for row in np.flatnonzero(real).tolist():
            kept[start + row] = {name: column[row] for name, column in columns.items()}
        has_masks = bool(here)
        for row, one in local_rows(here):
            if one['mask'] > 0:
                rows, width = map(int, one['size'])
                sizes = (canvas[0], canvas[1]), (rows, width), size_of(start + row)
                local[start + row] = mask_counts(one['masks'], *sizes)

    start = 0
    for batch in split.batches():
        waiting.append((start, step(params, batch)))
        start += len(batch['mask'])
        if len(waiting) > 2:
            fetch()
    while waiting:
        fetch()
    if not all(np.isfinite(x).all() for row in kept.values() for x in row.values()):
        raise UserError(f'config: {key}: the model makes boxes that are not finite')
    if has_masks:
        # JSON has no numbers as keys.
        parts = hosts.gather([[example, counts] for example, counts in local.items()])
        local = {example: counts for part in parts for example, counts in part}
    return _entries(split.source, kept, local if has_masks else None)


def _entries(
    source: Source, kept: dict[int, dict[str, np.ndarray]], masks: dict[int, list[str]] | None
) -> Found:
    """Turn arrays by example into entries of COCO, in the order of the examples."""
    found = Found()
    found.examples = sorted(kept)
    found.masks = None if masks is None else []
    annotations = annotations_of(source)(np.array(found.examples, np.int64))
    pairs = zip(found.examples, image_ids(annotations), annotations, strict=True)
    for example, image, one in pairs:
        row, size = kept[example], (one.height, one.width)
        entries = results(row['scores'], row['labels'], row['boxes'], size, image)
        found.boxes += entries
        if masks is not None and found.masks is not None:
            # With a box pycocotools would take its area for that of the mask.
            found.masks += [
                {**{name: x for name, x in entry.items() if name != 'bbox'}, 'segmentation': mask}
                for entry, mask in zip(
                    entries,
                    ({'size': list(size), 'counts': counts} for counts in masks[example]),
                    strict=True,
                )
            ]
    return found


def score(
    truth: Truth, found: list[Entry], kind: str, names: Sequence[str] = ()
) -> dict[str, float]:
    """Compute COCO's twelve figures by pycocotools.

    Args:
      kind: 'bbox' or 'segm'.
      names: of the classes, for the AP of each that occurs; () for none.
    """
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        objects = truth.coco()
        # It cannot load an empty list, and adds what it computes to the entries it is given.
        loaded = objects.loadRes([dict(entry) for entry in found]) if found else truth.coco([])
        judge = COCOeval(objects, loaded, kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    figures = dict(zip(FIGURES, judge.stats.tolist(), strict=True))
    # [thresholds, recalls, classes, areas, most detections]; of classes without an object -1.
    precision = judge.eval['precision'][:, :, :, 0, -1]
    for name, values in zip(names, np.moveaxis(precision, 2, 0), strict=False):
        if (values > -1).any():
            figures[f'AP/{name}'] = float(values[values > -1].mean())
    return figures
