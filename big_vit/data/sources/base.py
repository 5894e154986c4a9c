"""The `Source` that every format yields, and how sources are selected from and joined."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64

# The parts of a batch of examples by name: arrays [B, ...], or lists of length B where shapes
# differ. Encoded images, videos and sounds are `bytes`.
Columns = dict[str, Any]


class Request(NamedTuple):
    """The examples to open, and the settings that all sources share.

    Attributes:
      split: ranges of splits, see `splits.parse_split`.
      key: section of the config, for error messages.
      num_classes: number of classes; None for the source's count.
      image_size: (height, width) in pixels of generated examples.
      seed: of generated examples.
      labelled: whether every example must have a label; if not, all are of class 0 where the data
        has none.
      least_classes: numbers below this are labels even where the data has none of them, because a
        model has so many classes; only where `num_classes` is not set.
      skip_bad: whether wrong examples are skipped when they come to be loaded, rather than refused
        at once.
    """

    split: str
    key: str = 'data'
    num_classes: int | None = None
    image_size: tuple[int, int] = (0, 0)
    seed: int = 0
    labelled: bool = True
    least_classes: int = 0
    skip_bad: bool = False


class Annotation(NamedTuple):
    """The objects in a picture, as a dataset has them.

    Attributes:
      height: of the picture, in pixels.
      width: of the picture.
      boxes: (x0, y0, x1, y1) in pixels from the top left corner, float64 [n, 4]; x1 - x0 is the
        width. They may reach beyond the picture.
      labels: classes, int32 [n].
      crowd: whether a box is of many objects, or of one too difficult to be scored, bool [n].
      area: in pixels, of the mask where there is one, float64 [n].
      masks: of each object as pycocotools has them, {'size': [height, width], 'counts': bytes}.
      identity: name of the file.
      image_id: number of the picture in the dataset.
      xywh: (x, y, width, height) as COCO writes them, of which `boxes` are rounded sums; None where
        the dataset has corners.
    """

    height: int
    width: int
    boxes: Float64[np.ndarray, 'n 4']
    labels: Int32[np.ndarray, ' n']
    crowd: Bool[np.ndarray, ' n']
    area: Float64[np.ndarray, ' n']
    masks: Sequence[Mapping[str, Any]] | None
    identity: str
    image_id: int
    xywh: Float64[np.ndarray, 'n 4'] | None = None

    def of(self, which: Bool[np.ndarray, ' n']) -> 'Annotation':
        """Return some of the objects."""
        some = np.flatnonzero(which).tolist()
        return self._replace(
            boxes=self.boxes[which],
            labels=self.labels[which],
            crowd=self.crowd[which],
            area=self.area[which],
            masks=None if self.masks is None else tuple(self.masks[k] for k in some),
            xywh=None if self.xywh is None else self.xywh[which],
        )


class Shard(NamedTuple):
    """A shard as a listing shows it.

    Attributes:
      name: of the file.
      size: in bytes.
      stamp: changes with the content: the time of the last change, or what a store has instead.
      is_lost: whether it was there when the run began, and is not there now.
    """

    name: str
    size: int
    stamp: str
    is_lost: bool = False


@dataclass(frozen=True)
class Source:
    """A split of a dataset with random access to its examples.

    Attributes:
      name: of the dataset, for messages.
      split: as the user wrote it.
      length: number of examples.
      num_classes: labels lie in [0, num_classes).
      image_shape: (height, width, channels), or None if it varies.
      load: maps indices, int64 [B] in [0, length), to columns. One of them is 'image' (or 'video',
        'audio', 'text'): an array [B, H, W, C], or a list of B arrays [H, W, C] or of B encoded
        files. 'label' is int32 [B], or a list of B int arrays if examples have several labels.
        Must be thread-safe.
      in_memory: `load` costs about as much as a copy (or is one vectorized computation), so
        whole batches are loaded at once instead of a few rows at a time in threads.
      channels: number of channels that encoded images are decoded to; 0 keeps the file's.
      class_names: one for each class, '' where it has none; None if no class has a name.
      labels: returns the labels of all examples, int32 [length], without reading an image; None
        if that is impossible.
      where: maps an index to the location of that example (file, or shard and offset), for
        messages.
      shard_lengths: number of examples of each shard, int64 [shards], in the order of the
        examples; None if they do not lie in shards, or not in their order.
      expect: is told the indices of examples that `load` will be asked for with their neighbours,
        so that it can fetch them in large pieces, or (`soon`, the second argument) of those that
        come next, so that nobody waits for one after the other; returns at once. None if that
        would be of no use.
      shards: returns the shards, in the same order; None if they are not known.
      annotations: returns the objects in the pictures of these examples, without reading a picture;
        None of a source without boxes. `load` then has 'boxes', 'box_label' and 'box_crowd' and may
        have 'box_mask', as `moves.moved` takes them.
      label_maps: returns the classes of the pixels of these examples as they are stored, integers
        [height, width] where 255 is no class, without reading a picture; None of a source whose
        classes are not those of pixels. `load` then has them as 'segmentation'.
    """

    name: str
    split: str
    length: int
    num_classes: int
    image_shape: tuple[int, int, int] | None
    load: Callable[[np.ndarray], Columns]
    in_memory: bool
    channels: int = 3
    class_names: tuple[str, ...] | None = None
    labels: Callable[[], np.ndarray] | None = None
    where: Callable[[int], str] | None = None
    shard_lengths: Int64[np.ndarray, ' shards'] | None = None
    expect: Callable[..., None] | None = None
    shards: Callable[[], Sequence[Shard]] | None = None
    annotations: Callable[[Int64[np.ndarray, ' n']], list[Annotation]] | None = None
    label_maps: Callable[[Int64[np.ndarray, ' n']], list[np.ndarray]] | None = None

    @property
    def is_segmented(self) -> bool:
        """Whether classes are those of pixels."""
        return self.label_maps is not None

    @property
    def shard_bounds(self) -> Int64[np.ndarray, ' bounds'] | None:
        """Where the shards start, and where the last one ends, int64 [shards + 1]."""
        lengths = self.shard_lengths
        return None if lengths is None else np.concatenate([[0], np.cumsum(lengths)])

    def shard_of(self, indices: Int64[np.ndarray, ' n']) -> Int64[np.ndarray, ' n']:
        """Return the number of the shard of each example."""
        assert self.shard_lengths is not None
        return np.searchsorted(np.cumsum(self.shard_lengths), indices, side='right')

    def place(self, index: int) -> str:
        """Return the location of example `index`, for messages."""
        if self.where is not None:
            return self.where(int(index))
        return f'example {index} of {self.split!r} of {self.name}'


def select(source: Source, length: int, position: Callable[[np.ndarray], np.ndarray]) -> Source:
    """Return the source whose example i is example `position(i)` of another; i is int64 [B]."""
    labels, expect, annotations = source.labels, source.expect, source.annotations
    label_maps = source.label_maps
    return replace(
        source,
        length=length,
        load=lambda indices: source.load(position(np.asarray(indices, np.int64))),
        shard_lengths=None,
        expect=None if expect is None else lambda indices, *soon: expect(position(indices), *soon),
        shards=None,
        labels=None if labels is None else lambda: labels()[position(np.arange(length))],
        where=lambda index: source.place(int(position(np.array([index], np.int64))[0])),
        annotations=None
        if annotations is None
        else lambda indices: annotations(position(np.asarray(indices, np.int64))),
        label_maps=None
        if label_maps is None
        else lambda indices: label_maps(position(np.asarray(indices, np.int64))),
    )


def stand_ins(source: Source, index: int, count: int) -> tuple[list[int], list[int]]:
    """Return the examples that may take the place of one that cannot be read.

    Args:
      count: of examples.

    Returns:
      (the next ones, those at the same place of the next shards, none without shards).
    """
    following = [(index + step) % source.length for step in range(1, count)]
    bounds = source.shard_bounds
    if bounds is None:
        return following, []
    lengths = np.diff(bounds)
    shard = int(source.shard_of(np.array([index]))[0])
    others = (np.arange(shard + 1, shard + len(lengths)) % len(lengths)).tolist()
    others = [other for other in others[: 4 * count] if lengths[other]][:count]
    return following, [
        int(bounds[other] + (index - bounds[shard]) % lengths[other]) for other in others
    ]


def locate(index: int, ends: Sequence[int] | np.ndarray) -> tuple[int, int]:
    """Return (part, index within it) of an index into consecutive parts that end at `ends`."""
    part = int(np.searchsorted(ends, index, side='right'))
    return part, index - (int(ends[part - 1]) if part else 0)


def concatenate(sources: Sequence[Source], name: str, split: str) -> Source:
    """Concatenate sources, whose examples must consist of the same columns."""
    if len(sources) == 1:
        return replace(sources[0], name=name, split=split)
    ends = np.cumsum([source.length for source in sources])
    starts = np.concatenate([[0], ends])
    shapes = {source.image_shape for source in sources}
    names = {source.class_names for source in sources}
    labels = [source.labels for source in sources]
    lengths = [source.shard_lengths for source in sources if source.shard_lengths is not None]
    shards = [source.shards for source in sources if source.shards is not None]
    annotated = [source.annotations for source in sources if source.annotations is not None]
    mapped = [source.label_maps for source in sources if source.label_maps is not None]

    def load(indices: np.ndarray) -> Columns:
        indices = np.asarray(indices, np.int64)
        which = np.searchsorted(ends, indices, side='right')
        if (which == which[0]).all():
            return sources[which[0]].load(indices - starts[which[0]])
        parts = {k: np.flatnonzero(which == k) for k in np.unique(which).tolist()}
        loaded = {k: sources[k].load(indices[rows] - starts[k]) for k, rows in parts.items()}
        common = set.intersection(*(set(columns) for columns in loaded.values()))
        return {
            column: _interleave([(rows, loaded[k][column]) for k, rows in parts.items()])
            for column in sorted(common)
        }

    def expect(indices: np.ndarray, *soon: bool) -> None:
        which = np.searchsorted(ends, indices, side='right')
        for k in np.unique(which).tolist():
            told = sources[k].expect
            if told is not None:
                told(indices[which == k] - starts[k], *soon)

    def where(index: int) -> str:
        part, within = locate(index, ends)
        return sources[part].place(within)

    def annotations(indices: np.ndarray) -> list[Annotation]:
        places = [locate(index, ends) for index in np.asarray(indices).tolist()]
        return [annotated[part](np.array([within]))[0] for part, within in places]

    def label_maps(indices: np.ndarray) -> list[np.ndarray]:
        places = [locate(index, ends) for index in np.asarray(indices).tolist()]
        return [mapped[part](np.array([within]))[0] for part, within in places]

    return Source(
        name=name,
        split=split,
        length=int(ends[-1]),
        num_classes=max(source.num_classes for source in sources),
        image_shape=shapes.pop() if len(shapes) == 1 else None,
        load=load,
        in_memory=all(source.in_memory for source in sources),
        channels=sources[0].channels,
        class_names=names.pop() if len(names) == 1 else None,
        labels=None
        if None in labels
        else lambda: np.concatenate([read() for read in labels if read is not None]),
        where=where,
        expect=expect if any(source.expect for source in sources) else None,
        shard_lengths=np.concatenate(lengths) if len(lengths) == len(sources) else None,
        shards=None
        if len(shards) < len(sources)
        else lambda: [shard for listed in shards for shard in listed()],
        annotations=annotations if len(annotated) == len(sources) else None,
        label_maps=label_maps if len(mapped) == len(sources) else None,
    )


def _interleave(parts: list[tuple[np.ndarray, Any]]) -> Any:
    """Merge (rows, values) into one column that has the values at those rows."""
    total = sum(len(rows) for rows, _ in parts)
    first = parts[0][1]
    shapes = {(v.shape[1:], v.dtype) if isinstance(v, np.ndarray) else None for _, v in parts}
    if len(shapes) == 1 and None not in shapes:
        array = np.empty((total, *first.shape[1:]), first.dtype)
        for rows, values in parts:
            array[rows] = values
        return array
    column: list[Any] = [None] * total
    for rows, values in parts:
        for row, value in zip(rows.tolist(), values, strict=True):
            column[row] = value
    return column


def declared(
    name: str,
    split: str,
    length: int,
    num_classes: int,
    image_size: tuple[int, int],
    annotated: Collection[str] = (),
) -> Source:
    """Return a stand-in of black RGB images, enough to plan a run without the dataset.

    Args:
      annotated: 'boxes', 'segmentation': with no objects, and with pixels of class 0.
    """

    def load(indices: Int64[np.ndarray, ' b']) -> Columns:
        count = len(indices)
        columns: Columns = {'image': np.zeros((count, *image_size, 3), np.uint8)}
        columns['label'] = np.zeros(count, np.int32)
        if 'boxes' in annotated:
            columns['boxes'] = [np.zeros((0, 4), np.float32)] * count
            columns['box_label'] = [np.zeros(0, np.int32)] * count
        if 'segmentation' in annotated:
            columns['segmentation'] = np.zeros((count, *image_size, 1), np.uint8)
        return columns

    return Source(name, split, length, num_classes, (*image_size, 3), load, in_memory=True)


def from_arrays(
    name: str, split: str, images: np.ndarray, labels: np.ndarray, num_classes: int, **more: Any
) -> Source:
    """Return a source of images [N, H, W, C] and labels int32 [N], in memory or memory-mapped."""

    def load(indices: np.ndarray) -> Columns:
        return {'image': images[indices], 'label': labels[indices]}

    height, width, channels = images.shape[1:]
    return Source(
        name=name,
        split=split,
        length=len(images),
        num_classes=num_classes,
        image_shape=(height, width, channels),
        load=load,
        in_memory=True,
        channels=channels,
        labels=lambda: labels,
        **more,
    )
