"""Datasets as the config describes them, opened: source, cache and transform."""

import hashlib
import inspect
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from big_vit.data import cache, files, shard_ledger, transforms
from big_vit.data.moves import OBJECTS
from big_vit.data.sources import records
from big_vit.data.sources.base import Columns, Request, Source, concatenate
from big_vit.data.sources.classes import relabel, shown, subset
from big_vit.data.sources.known import Known, known_of, meet
from big_vit.data.sources.media import say_once
from big_vit.data.sources.registry import SOURCES
from big_vit.data.sources.splits import parse_split, split_name
from big_vit.data.transforms import Transform
from big_vit.errors import UserError

# Decoded images that are cached in memory by default.
AUTO_CACHE_BYTES = 1 << 30
# Limit of `cache='decoded'`; images beyond it are decoded each time.
MOST_CACHE_BYTES = 16 << 30
# From this size on images are worth several threads; smaller ones are loaded as whole batches.
_LARGE_IMAGE = 16 << 10


@dataclass(frozen=True)
class Spec:
    """A dataset as the config describes it, in plain values that other processes can open.

    Attributes:
      key: section of the config, for messages.
      name: of the source, a key of `SOURCES`.
      split: ranges of splits.
      transform: its host part.
      image_size: (height, width) that `size` stands for.
      seed: of generated sources.
      settings: (key, value) of the config keys that this source reads; None is not set.
      labelled, least_classes: as in `Request`.
      skip_bad: whether damaged examples are skipped, and left out of a resized copy.
      known: classes whose numbers the labels become, those of a model; None keeps the dataset's.
      num_classes: as the config key, like the rest.
      ledger: of the shards that the run had when it began, if it is gone on with.
    """

    key: str
    name: str
    split: str
    transform: str
    image_size: tuple[int, int]
    seed: int = 0
    settings: tuple[tuple[str, Any], ...] = ()
    labelled: bool = True
    least_classes: int = 0
    known: Known | None = None
    num_classes: int | None = None
    classes: tuple[str | int, ...] | None = None
    label_map: str | None = None
    cache: str = 'auto'
    cache_side: int = 256
    skip_bad: bool = False
    ledger: shard_ledger.Ledger | None = None


def open_spec(
    spec: Spec, share: int = 1, say: Callable[[str], None] = lambda line: None
) -> tuple[Source, Transform]:
    """Open a dataset and apply the deterministic first part of its transform.

    Images may still be encoded: the first operation that needs pixels decodes what it needs.

    Args:
      spec: the dataset.
      share: number of processes that open it, each of which caches its part in memory.
      say: is called with a line for the user where classes meet those of a model.

    Returns:
      (the source, the rest of the transform).

    Raises:
      UserError: something is missing or does not fit.
    """
    return _transform_first(_meet(open_labels(spec), spec, spec.known, say), spec, share)


def open_labels(spec: Spec) -> Source:
    """Open a dataset as it is stored, with its own classes, or those that the config makes of them.

    Raises:
      UserError: something is missing or does not fit.
    """
    source = shard_ledger.with_lost(_relabelled(_open(spec), spec), spec.ledger)
    return _resized(source, spec) if spec.cache == 'resized' and not is_small(source) else source


def is_small(source: Source) -> bool:
    shape = source.image_shape
    return bool(source.in_memory and shape and math.prod(shape) < _LARGE_IMAGE)


def _meet(source: Source, spec: Spec, known: Known | None, say: Callable[[str], None]) -> Source:
    """Number the classes as those that are known; a label map says the numbers itself."""
    if known is None:
        return source
    source, line = meet(source, known, spec.key, by_number=_says_numbers(spec))
    if line:
        say(line)
    return source


def _says_numbers(spec: Spec) -> bool:
    """Whether numbers of classes are those of a label map; those of `classes` are its places."""
    return spec.label_map is not None and spec.classes is None


def _transform_first(source: Source, spec: Spec, share: int) -> tuple[Source, Transform]:
    """Apply the first part of a transform and cache what it makes; returns the rest too."""
    transform = transforms.parse(spec.transform, size=spec.image_size, key=spec.key)
    if 'boxes' not in transform.names:
        source = _without_boxes(source)
    if is_small(source):
        return source, transform
    before, after = transform.split()
    was_in_memory = source.in_memory
    source = _transformed(source, before)
    if not was_in_memory and spec.cache in ('auto', 'decoded'):
        limit = AUTO_CACHE_BYTES if spec.cache == 'auto' else MOST_CACHE_BYTES
        if spec.cache == 'decoded' or cache.estimate_bytes(source) <= limit:
            source = cache.decoded(source, limit // share)
    # Large images are worth several threads, small ones are faster as whole batches.
    return replace(source, in_memory=False), after


def _without_boxes(source: Source) -> Source:
    """Leave out the objects of pictures, which nothing asks for; evaluations still find them."""
    if source.annotations is None:
        return source

    def load(indices: np.ndarray) -> Columns:
        columns = source.load(indices)
        return {name: column for name, column in columns.items() if name not in OBJECTS}

    return replace(source, load=load)


def open_mixture(
    specs: tuple[Spec, ...], share: int = 1, say: Callable[[str], None] = lambda line: None
) -> tuple[Source, Transform, tuple[Source, ...]]:
    """Open datasets and concatenate them. Their classes are those of the part that has the most.

    Args: as for `open_spec`.

    Returns:
      (the source, the rest of the transform, the source of each part).

    Raises:
      UserError: as `open_spec`, or a part has classes that the others have not.
    """
    stored = [open_labels(spec) for spec in specs]
    known = specs[0].known or _classes_of_mixture(specs, stored)
    opened = [
        _transform_first(_meet(source, spec, known, say), spec, share)
        for source, spec in zip(stored, specs, strict=True)
    ]
    sources, (transform, *_) = (list(part) for part in zip(*opened, strict=True))
    if len(sources) == 1:
        return sources[0], transform, (sources[0],)
    # If one part has done the first operations of the transform, all must.
    if any(source.in_memory for source in sources) and not all(s.in_memory for s in sources):
        transform = next(rest for source, rest in opened if not source.in_memory)
        before, _ = next(rest for source, rest in opened if source.in_memory).split()
        sources = [_transformed(s, before) if s.in_memory else s for s in sources]
    name = ' + '.join(source.name for source in sources)
    return concatenate(sources, name, 'mixture'), transform, tuple(sources)


def _classes_of_mixture(specs: tuple[Spec, ...], sources: list[Source]) -> Known | None:
    """Return the classes of the part with the most; of parts with a label map, of all together."""
    placed = all(source.annotations is not None or source.is_segmented for source in sources)
    if len(specs) == 1 or not (specs[0].labelled or placed):
        return None
    parts = list(zip(sources, specs, strict=True))
    mapped = [source for source, spec in parts if _says_numbers(spec)]
    free = [pair for pair in parts if not _says_numbers(pair[1])]
    named = [pair for pair in free if pair[0].class_names is not None] or free
    count = max(source.num_classes for source in sources)
    if not mapped and all(source.class_names is not None for source, _ in named):
        source, spec = max(named, key=lambda pair: sum(map(bool, pair[0].class_names or ())))
        return known_of(source, spec.key)
    names = [''] * count
    for source in (*(source for source, _ in named), *mapped):
        for number, name in enumerate(source.class_names or ()):
            names[number] = names[number] or name
    return Known(count, tuple(names) if any(names) else None, 'the mixture')


def open_examples(specs: tuple[Spec, ...], share: int = 1) -> tuple[Source, Transform]:
    """Open a mixture in a worker process: the source and the rest of the transform."""
    source, transform, _ = open_mixture(specs, share)
    return source, transform


def in_both(one: Spec, other: Spec) -> int:
    """Count the examples that two splits share, by their places in the dataset.

    Copies of an example at another place, or in another dataset, are not detected.
    """
    if one.name != other.name or _location(one) != _location(other):
        return 0
    names = {split_name(piece) for spec in (one, other) for piece in spec.split.split('+')}
    sizes = {name: _open(replace(one, split=name)).length for name in names}
    ours, theirs = (parse_split(spec.split, sizes, spec.key) for spec in (one, other))
    return sum(
        max(0, min(stop, last) - max(start, first))
        for name, start, stop in ours
        for other_name, first, last in theirs
        if name.casefold() == other_name.casefold()
    )


def _location(spec: Spec) -> dict[str, Any]:
    """Return the settings that say which dataset it is; columns only say what is read of it."""
    return {
        name: value
        for name, value in spec.settings
        if value is not None and not name.endswith('_column')
    }


def _open(spec: Spec) -> Source:
    source = SOURCES[spec.name]
    settings = {name: value for name, value in spec.settings if value is not None}
    for name, parameter in inspect.signature(source).parameters.items():
        is_required = (
            parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
        )
        if is_required and name not in settings:
            raise UserError(
                f'config: {spec.key}.{name} must be set for {spec.key}.name={spec.name!r}'
            )
    request = Request(
        spec.split,
        spec.key,
        spec.num_classes,
        spec.image_size,
        spec.seed,
        spec.labelled,
        spec.least_classes,
        spec.skip_bad,
    )
    return source(request, **settings)


def _relabelled(source: Source, spec: Spec) -> Source:
    """Apply `label_map`, then keep only the examples of `classes`."""
    if spec.label_map is not None:
        key = f'{spec.key}.label_map'
        try:
            mapping = json.loads(files.read(files.place(spec.label_map, key)))
        except (OSError, ValueError) as error:
            raise UserError(f'{key}: cannot read {spec.label_map}: {error}') from error
        if not isinstance(mapping, dict):
            raise UserError(
                f'{key}: {spec.label_map} must hold one JSON object {{"class": number}}'
            )
        source = relabel(source, mapping, key)
    if spec.classes is not None:
        source = subset(source, spec.classes, f'{spec.key}.classes')
    return source


def _transformed(source: Source, transform: Transform) -> Source:
    """Return a source of transformed examples; images stay encoded if no pixels are needed."""

    def load(indices: np.ndarray) -> Columns:
        columns = transforms.opened(source.load(indices), source.channels)
        return transform(columns, np.zeros(len(indices), np.uint64))

    shape = None
    if source.image_shape and source.in_memory:
        images = load(np.zeros(1, np.int64)).get('image')
        shape = images.shape[1:] if isinstance(images, np.ndarray) else None
    return replace(source, load=load, image_shape=shape)


def _resized(source: Source, spec: Spec) -> Source:
    """Open the copy with smaller images on the local disk, after writing it if it is missing.

    Raises:
      UserError: the images have texts or boxes, which the copy cannot store.
    """
    settings = dict(spec.settings)
    if source.annotations is not None or source.is_segmented:
        raise UserError(
            f"config: {spec.key}.cache='resized' keeps no boxes or classes of pixels: set it to "
            "'auto'"
        )
    if settings.pop('text_column', None) is not None:
        raise UserError(
            f"config: {spec.key}.cache='resized' keeps no words (text_column): set it to 'auto'"
        )
    # What belongs to the file is lost in the copy, so that it is used first.
    transform = transforms.parse(spec.transform, size=spec.image_size, key=spec.key)
    first = transform.before(lambda name: name not in transforms.OF_FILES)
    path = files.cache_folder() / 'records' / _mark(source, spec, settings, first)
    source = _transformed(source, first) if first.names else source
    if not path.exists():
        on_error = 'skip' if spec.skip_bad else 'stop'
        records.write_records(source, path, 'train', spec.cache_side, on_error=on_error)
    left_out = json.loads((path / 'train.json').read_text()).get('left_out', 0)
    if left_out and not spec.skip_bad:
        raise UserError(
            f'{path}: is a copy without the {left_out:,} damaged examples of {source.name}: repair '
            f"them and delete it, or set {spec.key}.on_error='skip' as when it was made"
        )
    if left_out:
        say_once(f'{path}: is a copy of {source.name} without its {left_out:,} damaged examples')
    copy = records.records(Request('train', spec.key), path=str(path))
    # Copies of former versions lack names where the number of classes was known.
    names = copy.class_names or source.class_names
    if names != source.class_names:
        raise UserError(
            f'{path}: is a copy of classes {shown(names or ())}, and {source.name} has now '
            f'{shown(source.class_names or ())}: delete it, and it is made again'
        )
    return replace(copy, split=spec.split, class_names=names)


def _mark(source: Source, spec: Spec, settings: dict[str, Any], first: Transform) -> str:
    """Hash what a resized copy is made of; existing copies are found by the order of the values."""
    settings = {name: value for name, value in settings.items() if value is not None}
    take = settings.pop
    made_of = [
        *(spec.name, take('path', None), take('tfds_name', None)),
        *(spec.split, spec.label_map, spec.classes),
        *(take('image_column', None), take('label_column', None)),
        *(source.name, source.length, source.num_classes, spec.cache_side),
        *sorted(settings.items()),
        *([first.host_text] if first.host_text not in ('', 'decode') else []),
    ]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:24]
