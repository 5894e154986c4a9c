"""How well classes of pixels are told: mean IoU and accuracy over a whole split."""

import concurrent.futures
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Int64

from big_vit.data import pipeline
from big_vit.data.moves import IGNORED
from big_vit.data.sources import Source
from big_vit.data.transforms import geometry
from big_vit.distributed import hosts
from big_vit.errors import UserError
from big_vit.evaluators import sliding_window
from big_vit.evaluators.classification import class_names
from big_vit.evaluators.evaluation import Evaluation, Evaluator, SharedFeatures, Split
from big_vit.evaluators.requirements import requires
from big_vit.tasks.batch import Batch

# Sizes that scores are fetched in are multiples of this, for each is compiled.
_STEP = 128
# Operations that move pixels, whose inverse nobody knows; of all others the whole picture is seen.
WHOLE = frozenset({'resize', 'resize_small', 'resize_long', 'resize_short'})
MOVING = geometry.OPERATIONS.keys() - WHOLE

Labels = Int[np.ndarray, 'height width']


@requires('pixels', labels='none', scores=lambda **_: ('miou', 'pixel_accuracy', 'mean_accuracy'))
def segmentation(
    evaluation: Evaluation,
    *,
    stride: tuple[int, int] | None = None,
    scales: tuple[float, ...] = (1.0,),
    flips: bool = False,
    per_class: str = 'none',
) -> Evaluator:
    """Score the classes of pixels: mean IoU, pixel accuracy and mean accuracy of classes.

    Label maps are compared at the size that they are stored in, where nothing was cropped.

    Args:
      stride: pixels (down, across) from one window to the next, of pictures larger than the
        model's images; None for two thirds of these.
      scales, flips: see `sliding_window.scores`.
      per_class: 'all' adds the IoU and the accuracy of each class that occurs.

    Raises:
      UserError: no label maps, other classes than those of training, or a stride that leaves gaps.
    """
    key, split, window = evaluation.key, evaluation.split, evaluation.image_size
    if 'segmentation' not in split.example_spec.parts:
        raise UserError(
            f'config: {key}: {split.source.name} {split.source.split} gives no label map of '
            'pixels: name data that has a column segmentation'
        )
    if split.example_spec.parts['segmentation'][0] != split.example_spec.parts['image'][0][:2]:
        raise UserError(f'config: {key}.transform: images and label maps have other sizes')
    check_classes(split.source, evaluation.training, key)
    stride = stride or sliding_window.default_stride(window)
    if stride[0] > window[0] or stride[1] > window[1]:
        raise UserError(
            f'config: {key}.stride={stride} leaves gaps between windows of '
            f'{window[0]}x{window[1]}: make it smaller'
        )
    segment, classes = evaluation.segment, evaluation.training.num_classes
    assert segment is not None

    def rows(params: Any, batch: Batch) -> tuple[Any, dict[str, Array]]:
        batch = split.prepare(batch)
        scores = sliding_window.scores(segment, params, batch, window, stride, scales, flips)
        size = sliding_window.picture_sizes(batch)
        real = {name: batch[name] for name in ('mask', 'segmentation')}
        return {}, {**real, 'scores': scores, 'size': size}

    step = evaluation.compile_rows(('segment', split.device, stride, scales, flips), rows)
    names = class_names(evaluation.training)

    def evaluate(params: Any, shared: SharedFeatures) -> dict[str, float]:
        canvas = split.example_spec.parts['image'][0][:2]
        counts, total = count_all(step, params, split, classes, (canvas[0], canvas[1]))
        return {**figures(counts, names if per_class == 'all' else ()), 'count': float(total)}

    return evaluate


def check_classes(source: Source, training: Source, key: str) -> None:
    """Raise UserError unless a split has the classes of the training data."""
    ours, theirs = source.class_names, training.class_names
    if source.num_classes != training.num_classes:
        raise UserError(
            f'config: {key}: {source.name} {source.split} has {source.num_classes} classes, but '
            f'the model tells {training.num_classes}'
        )
    if ours and theirs and ours != theirs:
        pair = next(pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1])
        raise UserError(
            f'config: {key}: {source.name} {source.split} has the class {pair[0]!r} where the '
            f'model has {pair[1]!r}: give both the same classes, in the same order'
        )


def confusion(labels: Labels, predicted: Labels, classes: int) -> Int64[np.ndarray, 'true said']:
    """Count the pixels of each true class (row) by predicted class, without ignored pixels.

    Raises:
      ValueError: a label is none of the classes.
    """
    kept = labels != IGNORED
    true = labels[kept].astype(np.int64)
    if true.size and not 0 <= true.min() <= true.max() < classes:
        wrong = int(true.min() if true.min() < 0 else true.max())
        raise ValueError(
            f'the label map has the class {wrong}, but there are {classes} classes, from 0 to '
            f'{classes - 1}, and {IGNORED} for what is ignored'
        )
    pairs = true * classes + predicted[kept]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def figures(
    counts: Int64[np.ndarray, 'true said'], names: tuple[str, ...] = ()
) -> dict[str, float]:
    """Compute the metrics of a confusion matrix.

    Classes that neither occur nor are predicted are left out of the mean IoU, and those that do
    not occur of the mean accuracy.

    Args:
      names: of the classes, to list each; () for the means alone.
    """
    hits, true, said = np.diag(counts).astype(float), counts.sum(1), counts.sum(0)
    union = true + said - np.diag(counts)
    seen, occurs = union > 0, true > 0
    iou, accuracy = hits[seen] / union[seen], hits[occurs] / true[occurs]
    total = int(true.sum())
    found = {
        'miou': float(iou.mean()) if len(iou) else np.nan,
        'pixel_accuracy': float(hits.sum() / total) if total else np.nan,
        'mean_accuracy': float(accuracy.mean()) if len(accuracy) else np.nan,
    }
    for what, values, where in (('iou', iou, seen), ('accuracy', accuracy, occurs)):
        kept = [name for name, here in zip(names, where, strict=False) if here]
        pairs = zip(kept, values, strict=False)
        found |= {f'{what}/{name}': float(value) for name, value in pairs}
    return found


def at_size(
    scores: Float[np.ndarray, 'rows columns channels'],
    canvas: tuple[int, int] | None,
    picture: tuple[int, int],
    size: tuple[int, int],
) -> Float[np.ndarray, 'height width channels']:
    """Return scores of a picture in its own size, resized bilinearly by way of the canvas.

    Args:
      scores: over the canvas, at any resolution; or of its first pixels.
      canvas: height and width of the canvas; None where each score is of a pixel of it.
      picture: height and width of the picture within the canvas.
      size: height and width of what is returned.
    """
    import cv2

    def resized(x: np.ndarray, to: tuple[int, int]) -> np.ndarray:
        if x.shape[:2] == to:
            return x
        # OpenCV takes no more channels at a time than this.
        parts = [np.ascontiguousarray(x[..., k : k + 128]) for k in range(0, x.shape[2], 128)]
        made = [cv2.resize(part, to[::-1], interpolation=cv2.INTER_LINEAR) for part in parts]
        return np.concatenate([one.reshape(*to, -1) for one in made], axis=2)

    scores = scores.astype(np.float32)
    seen = (scores if canvas is None else resized(scores, canvas))[: picture[0], : picture[1]]
    return resized(seen, size)


def local_rows(tree: dict[str, jax.Array]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number and values of the rows of a batch that are this host's; one host has each."""
    parts: dict[int, dict[str, Any]] = {}
    for name, array in tree.items():
        for start, data in _local_shards(array):
            for row, value in enumerate(jax.device_get(data), start):
                parts.setdefault(row, {})[name] = value
    yield from sorted(parts.items())


def _local_shards(array: jax.Array) -> Iterator[tuple[int, jax.Array]]:
    """Yield the first row and the data of the shards that are this host's alone."""
    for shard in array.addressable_shards:
        if not shard.replica_id:
            yield shard.index[0].start or 0, shard.data


def _fetched(
    scores: jax.Array, sizes: dict[int, tuple[int, int]]
) -> Iterator[tuple[int, Float[np.ndarray, 'rows columns classes']]]:
    """Yield number and scores of the rows with given sizes, of pixels up to there and a few more.

    A canvas may be far larger than most pictures on it, and scores are large.
    """
    for start, data in _local_shards(scores):
        for row in range(start, start + len(data)):
            if row in sizes:
                pairs = zip(sizes[row], data.shape[1:3], strict=True)
                ends = (min(-(-int(side) // _STEP) * _STEP, most) for side, most in pairs)
                limits = (row - start + 1, *ends, data.shape[3])
                with jax.transfer_guard('allow'):
                    cut = jax.lax.slice(data, (row - start, 0, 0, 0), limits)
                yield row, jax.device_get(cut)[0]


def count_all(
    step: Callable[[Any, Batch], Any],
    params: Any,
    split: Split,
    classes: int,
    canvas: tuple[int, int],
) -> tuple[Int64[np.ndarray, 'true said'], int]:
    """Return the confusion matrix of a split over all hosts, and how many pictures it is of."""
    counts, total = np.zeros((classes, classes), np.int64), 0

    def count_row(example: int, row: dict[str, Any], scores: np.ndarray, fine: bool) -> np.ndarray:
        rows, columns = map(int, row['size'])
        try:
            labels = stored_labels(split, example)
            if labels is None:
                labels = row['segmentation'][:rows, :columns]
            height, width = labels.shape
            over = None if fine else canvas
            said = at_size(scores, over, (rows, columns), (height, width)).argmax(-1)
            return confusion(labels, said, classes)
        except ValueError as error:
            raise UserError(f'{split.source.place(example)}: {error}') from None

    with concurrent.futures.ThreadPoolExecutor(pipeline.default_threads()) as pool:
        waiting: list[tuple[int, Any]] = []

        def fetch() -> None:
            nonlocal counts, total
            first, outputs = waiting.pop(0)
            scores = outputs.pop('scores')
            fine = scores.shape[1:3] == canvas
            kept = {at: row for at, row in local_rows(outputs) if row['mask'] > 0}
            whole = scores.shape[1], scores.shape[2]
            sizes = {
                at: (int(row['size'][0]), int(row['size'][1])) if fine else whole
                for at, row in kept.items()
            }
            tasks = [
                pool.submit(count_row, first + at, kept[at], own, fine)
                for at, own in _fetched(scores, sizes)
            ]
            for task in tasks:
                counts, total = counts + task.result(), total + 1

        start = 0
        for batch in split.batches():
            waiting.append((start, step(params, batch)[1]))
            start += len(batch['mask'])
            if len(waiting) > 1:  # Scores are large: one batch waits while another is counted.
                fetch()
        while waiting:
            fetch()
    parts = hosts.gather([total, counts.tolist()])
    matrices = np.array([matrix for _, matrix in parts], np.int64)
    return matrices.sum(0), sum(pictures for pictures, _ in parts)


def stored_labels(split: Split, example: int) -> Labels | None:
    """Return the label map of an example as it is stored.

    None if the source has none at hand, or if the transform moves pixels.
    """
    stored = split.source.label_maps
    if stored is None or MOVING.intersection(split.transform.names):
        return None
    (labels,) = stored(np.array([example], np.int64))
    return np.asarray(labels, np.int32)
