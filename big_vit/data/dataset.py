"""From what a config says of a dataset to a source that is ready to be read."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from big_vit.data import cache, files, transforms
from big_vit.data.sources import (
    arrays,
    base,
    fdsl,
    folder,
    parquet,
    prepared,
    records,
    synthetic,
    table,
    tar,
)
from big_vit.data.sources.base import Columns, Source
from big_vit.data.transforms import Transform
from big_vit.errors import UserError

# The keys of the config, beside those that all have, that a source of each name reads.
KEYS = {
    'fdsl': (),
    'motion': (),
    'orbit': (),
    'tones': (),
    'phrases': (),
    'pairs': (),
    'quiz': (),
    'captions': (),
    'digits': (),
    'idx': ('path',),
    'arrays': ('path', 'image_column', 'label_column'),
    'folder': ('path',),
    'table': ('path', 'image_column', 'label_column'),
    'tar': ('path', 'label_column', 'text_column'),
    'parquet': ('path', 'image_column', 'label_column'),
    'tfds': ('path', 'tfds_name', 'label_column'),
    'records': ('path',),
}
# What is kept decoded in memory without being asked for.
AUTO_CACHE_BYTES = 1 << 30
# What `cache='decoded'` keeps at most; more is decoded each time.
MOST_CACHE_BYTES = 16 << 30
# Above this, images cost enough to be worth several threads; below it, whole batches at once.
_LARGE_IMAGE = 16 << 10


@dataclass(frozen=True)
class Spec:
    """A dataset as the config describes it: plain values, so that other processes can open it.

    Attributes:
      key: the section of the config, for messages.
      name: of the format, as `_open` has them.
      transform: the part that is done on the host.
      image_size: (height, width) that `size` stands for.
      seed: of the generated sources.
      the others: as the keys of the config.
    """

    key: str
    name: str
    split: str
    transform: str
    image_size: tuple[int, int]
    seed: int = 0
    path: str | None = None
    tfds_name: str | None = None
    num_classes: int | None = None
    image_column: str | None = None
    label_column: str | None = None
    text_column: str | None = None
    classes: tuple[str | int, ...] | None = None
    label_map: str | None = None
    cache: str = 'auto'
    cache_side: int = 256


def open_spec(spec: Spec, share: int = 1) -> tuple[Source, Transform]:
    """A source of examples to which all that is not random has been done, and what is left.

    Images may still be encoded: the operation that needs pixels decodes what it needs.

    Args:
      share: how many processes open it, each of which keeps its part of what is kept in memory.

    Raises:
      UserError: whatever is missing or does not fit.
    """
    transform = transforms.parse(spec.transform, size=spec.image_size, key=spec.key)
    source = _labelled(_open(spec), spec)
    if source.in_memory and source.image_shape and math.prod(source.image_shape) < _LARGE_IMAGE:
        return source, transform
    if spec.cache == 'resized':
        source = _resized(source, spec)
    before, after = transform.split()
    at_hand = source.in_memory
    source = _transformed(source, before)
    if not at_hand and spec.cache in ('auto', 'decoded'):
        most = AUTO_CACHE_BYTES if spec.cache == 'auto' else MOST_CACHE_BYTES
        if spec.cache == 'decoded' or cache.estimate_bytes(source) <= most:
            source = cache.decoded(source, most // share)
    # Large images are worth several threads, small ones are faster as whole batches.
    return replace(source, in_memory=False), after


def open_mixture(
    specs: tuple[Spec, ...], share: int = 1
) -> tuple[Source, Transform, tuple[int, ...]]:
    """One source after the other, what is left to do to it, and how long each is.

    Raises:
      UserError: as `open_spec`, or the parts have different classes.
    """
    every = [open_spec(spec, share) for spec in specs]
    sources = [source for source, _ in every]
    named = [
        (spec.key, source.class_names)
        for spec, source in zip(specs, sources, strict=True)
        if source.class_names is not None
    ]
    for key, names in named:
        if names != named[0][1]:
            raise UserError(
                f'{key}: its classes are not those of {named[0][0]}: give both a label_map'
            )
    lengths = tuple(source.length for source in sources)
    if len(sources) == 1:
        return (*every[0], lengths)
    # Where one part has done its first operations, all must have.
    if any(source.in_memory for source in sources) and not all(s.in_memory for s in sources):
        before, _ = every[0][1].split()
        sources = [_transformed(s, before) if s.in_memory else s for s in sources]
        every = [pair for pair in every if not pair[0].in_memory]
    name = ' + '.join(source.name for source in sources)
    return base.concatenate(sources, name, 'mixture'), every[0][1], lengths


def in_both(one: Spec, other: Spec) -> int:
    """How many examples two splits have in common, by their places in the dataset.

    Copies of an example under another place, or in another dataset, are not found.
    """
    if (one.name, one.path, one.tfds_name) != (other.name, other.path, other.tfds_name):
        return 0
    names = {base.split_name(part) for spec in (one, other) for part in spec.split.split('+')}
    whole = {name: _open(replace(one, split=name, key=one.key)).length for name in names}
    mine, theirs = (base.parse_split(spec.split, whole, spec.key) for spec in (one, other))
    return sum(
        max(0, min(stop, last) - max(start, first))
        for name, start, stop in mine
        for named, first, last in theirs
        if name == named
    )


def open_examples(specs: tuple[Spec, ...], share: int = 1) -> tuple[Source, Transform]:
    """What a worker process opens for itself."""
    source, transform, _ = open_mixture(specs, share)
    return source, transform


def _open(spec: Spec) -> Source:
    key, split, classes = spec.key, spec.split, spec.num_classes
    columns: dict[str, Any] = {
        name: value
        for name, value in (
            ('image_column', spec.image_column),
            ('label_column', spec.label_column),
            ('text_column', spec.text_column),
        )
        if value is not None
    }
    if spec.name == 'fdsl':
        if classes is None:
            raise UserError(f"config: {key}.num_classes must be set for {key}.name='fdsl'")
        return fdsl.fdsl(split, classes, spec.image_size, spec.seed, key=key)
    if spec.name == 'phrases':
        return synthetic.phrases(split, spec.seed, key=key)
    made: dict[str, Callable[..., Source]] = {
        'motion': synthetic.motion,
        'orbit': synthetic.orbit,
        'tones': synthetic.tones,
        'pairs': synthetic.pairs,
        'quiz': synthetic.quiz,
        'captions': synthetic.captions,
    }
    if spec.name in made:
        return made[spec.name](split, spec.image_size, spec.seed, key=key)
    if spec.name == 'digits':
        return arrays.digits(split, key=key)
    if spec.name == 'tfds':
        if spec.tfds_name is None:
            raise UserError(f"config: {key}.tfds_name must be set for {key}.name='tfds'")
        return prepared.tfds(
            split, spec.tfds_name, spec.path or '', classes, spec.label_column, key=key
        )
    if spec.path is None:
        raise UserError(f'config: {key}.path must be set for {key}.name={spec.name!r}')
    if spec.name == 'records':
        return records.records(split, spec.path, key=key)
    functions: dict[str, Callable[..., Source]] = {
        'idx': arrays.idx,
        'arrays': arrays.arrays,
        'folder': folder.folder,
        'table': table.table,
        'tar': tar.tar,
        'parquet': parquet.parquet,
    }
    return functions[spec.name](split, spec.path, num_classes=classes, key=key, **columns)


def _labelled(source: Source, spec: Spec) -> Source:
    """With the labels of `label_map`, and the examples of `classes`."""
    if spec.label_map is not None:
        at = f'{spec.key}.label_map'
        try:
            mapping = json.loads(files.read(files.place(spec.label_map, at)))
        except (OSError, ValueError) as error:
            raise UserError(f'{at}: cannot read {spec.label_map}: {error}') from error
        if not isinstance(mapping, dict):
            raise UserError(f'{at}: {spec.label_map} must hold one JSON object {{"class": number}}')
        source = base.relabel(source, mapping, at)
    if spec.classes is not None:
        source = base.subset(source, spec.classes, f'{spec.key}.classes')
    return source


def _transformed(source: Source, transform: Transform) -> Source:
    """A source of transformed examples, their images still encoded where nothing needs pixels."""

    def load(indices: np.ndarray) -> Columns:
        columns = transforms.opened(source.load(indices), source.channels)
        return transform(columns, np.zeros(len(indices), np.uint64))

    shape = None
    if source.image_shape and source.in_memory:
        images = load(np.zeros(1, np.int64)).get('image')
        shape = images.shape[1:] if isinstance(images, np.ndarray) else None
    return replace(source, load=load, image_shape=shape)


def _resized(source: Source, spec: Spec) -> Source:
    """The copy of a source with smaller images on this machine's disk, made if need be.

    Raises:
      UserError: of images with words, which such a copy has no place for.
    """
    if spec.text_column is not None:
        raise UserError(
            f"config: {spec.key}.cache='resized' keeps no words (text_column): set it to 'auto'"
        )
    config = [spec.name, spec.path, spec.tfds_name, spec.split, spec.label_map, spec.classes]
    config += [spec.image_column, spec.label_column]
    found = [source.name, source.length, source.num_classes, spec.cache_side]
    made_of = json.dumps([*config, *found])
    mark = hashlib.sha256(made_of.encode()).hexdigest()[:24]
    path = files.cache_folder() / 'records' / mark
    if not path.exists():
        records.write_records(source, path, 'train', spec.cache_side)
    return replace(records.records('train', str(path), key=spec.key), split=spec.split)
