"""Datasets prepared by TensorFlow Datasets, read without TensorFlow.

Local ArrayRecord and Parquet files are read by TFDS itself, TFRecord files through our own index.
Images stay encoded: they are decoded by the transform, which may need only a part.
"""

import functools
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from big_vit.data import decode, files
from big_vit.data.sources import annotated, array_record, tfrecord
from big_vit.data.sources import labels as labels_lib
from big_vit.data.sources.base import Annotation, Columns, Request, Shard, Source, locate
from big_vit.data.sources.classes import label_name
from big_vit.data.sources.splits import cut
from big_vit.errors import UserError

_FORMATS = ('array_record', 'parquet', 'tfrecord')


class _Image(NamedTuple):
    """The feature that is the image or video, as `Source` describes it."""

    feature: str
    column: str
    shape: tuple[int, int, int] | None
    channels: int
    is_encoded: bool


class _Label(NamedTuple):
    """The feature that is the label, or is derived from others."""

    read: Callable[[Any], Any]
    multilabel: bool
    num_classes: int
    names: tuple[str, ...] | None


class _Objects(NamedTuple):
    """The feature that lists the objects of a picture.

    Attributes:
      names: of their classes.
      crowd: of its parts the one that marks what is not scored, or None.
    """

    num_classes: int
    names: tuple[str, ...] | None
    crowd: str | None


def tfds(
    request: Request,
    *,
    tfds_name: str,
    path: str | None = None,
    label_column: str | None = None,
) -> Source:
    """Open a dataset of images prepared by TensorFlow Datasets, in any of its file formats.

    Nothing is downloaded and TensorFlow is not needed. Where no labels are needed, and the dataset
    has none but a feature `objects` with boxes, its classes are those of the objects.

    Args:
      request: the examples to open; `num_classes` defaults to the number in the dataset.
      tfds_name: name[/config][:version]; the newest version on disk by default.
      path: the data_dir, local or gs://; defaults to $TFDS_DATA_DIR or ~/tensorflow_datasets.
      label_column: name of a feature, or in `labels.DERIVED`; defaults to 'label', or the
        supervised key of the dataset.

    Raises:
      UserError: missing, unreadable, or no set of labelled images.
    """
    key = request.key
    directory = _find_directory(tfds_name, path or '', key)
    builder = _open_builder(directory, key)
    info, features = builder.info, builder.info.features
    image = _image(features, info, tfds_name, key)
    has_label = label_column is not None or _plain_label(features, info) is not None
    objects = None if request.labelled or has_label else _objects(features)
    label = (
        _label(features, info, label_column, tfds_name, request)
        if objects is None
        else _Label(lambda example: 0, False, objects.num_classes, objects.names)
    )

    def open_split(name: str) -> Source:
        split = info.splits[name]
        _need_all_files(split, directory, name)
        shards = [files.place(os.fspath(path), key) for path in split.filepaths]
        read, expect = _reader(builder, name, image, shards)
        ends = np.cumsum(split.shard_lengths)

        def where(index: int) -> str:
            shard, record = locate(index, ends)
            return f'{split.filepaths[shard]}, record {record}'

        def checked(labels: np.ndarray, indices: np.ndarray) -> np.ndarray:
            what = f'{name!r} of {tfds_name}'
            return _check_labels(labels, indices, label.num_classes, what, key)

        def load(indices: np.ndarray) -> Columns:
            examples = _read_examples(read, indices, where)
            values = [label.read(example) for example in examples]
            labels: Any = [np.asarray(value, np.int32) for value in values]
            if not label.multilabel:
                labels = checked(np.array(values, np.int32), indices)
            images: Any = [example[image.feature] for example in examples]
            if not image.is_encoded and image.shape:
                images = np.stack(images)
            columns = {image.column: images, 'label': labels}
            if objects is None:
                return columns
            pairs = zip(examples, indices.tolist(), strict=True)
            own = [
                annotated.read_of(row, _annotation, *pair, image, objects, where)
                for row, pair in enumerate(pairs)
            ]
            return columns | annotated.checked_objects(own, objects.num_classes)

        def annotate(indices: np.ndarray) -> list[Annotation]:
            examples = _read_examples(read, np.asarray(indices), where)
            pairs = zip(examples, np.asarray(indices).tolist(), strict=True)
            return [_annotation(*pair, image, objects, where) for pair in pairs]

        @functools.cache
        def all_labels() -> np.ndarray:
            size, step = split.num_examples, 1000
            chunks = [range(start, min(start + step, size)) for start in range(0, size, step)]
            values = [label.read(example) for chunk in chunks for example in read(list(chunk))]
            return checked(np.array(values, np.int32), np.arange(size))

        return Source(
            name=f'tfds:{tfds_name}',
            split=name,
            length=split.num_examples,
            num_classes=label.num_classes,
            image_shape=image.shape,
            load=load,
            in_memory=False,
            channels=image.channels,
            class_names=label.names,
            labels=None if label.multilabel or objects else all_labels,
            where=where,
            shard_lengths=np.array(split.shard_lengths, np.int64),
            shards=lambda: [
                Shard(file.place.name, file.size, file.stamp) for file in files.stored(shards)
            ],
            expect=expect,
            annotations=annotate if objects else None,
        )

    return cut(f'tfds:{tfds_name}', list(info.splits), open_split, request)


def _read_examples(
    read: Callable[[list[int]], list[dict[str, Any]]],
    indices: np.ndarray,
    where: Callable[[int], str],
) -> list[dict[str, Any]]:
    try:
        return read([int(i) for i in indices])
    except RuntimeError as error:  # Raised by array_record for a damaged file.
        reason = ' '.join(str(error).split())[:200]
        raise UserError(
            f'{where(int(indices[0]))}, or another of {len(indices)} records: damaged '
            f'({reason}): copy the dataset again'
        ) from error


def _check_labels(
    labels: np.ndarray, indices: np.ndarray, num_classes: int, what: str, key: str
) -> np.ndarray:
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        # Some datasets publish a split without labels, and write -1.
        raise UserError(
            f'{key}.split: example {indices[wrong[0]]} of {what} has label {labels[wrong[0]]}, '
            f'not one of {num_classes} classes: choose another split'
        )
    return labels


# --- Files -----------------------------------------------------------------------------


def _find_directory(tfds_name: str, path: str, key: str) -> Any:
    """Return the directory of a prepared dataset as an etils path; UserError if there is none."""
    from etils import epath

    match = re.fullmatch(r'(\w+)(?:/([\w.-]+))?(?::([\d.*]+))?', tfds_name)
    if not match:
        raise UserError(
            f'{key}.tfds_name: cannot read {tfds_name!r}: write name, name/config or '
            'name/config:1.0.0'
        )
    name, config, version = match.groups()
    root = epath.Path(path or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets')
    root = root.expanduser()
    directory = root / name / config if config else root / name
    pattern = re.compile(
        r'\d+\.\d+\.\d+' if version is None else re.escape(version).replace(r'\*', r'\d+')
    )
    try:
        below = list(directory.iterdir()) if directory.is_dir() else []
    except ImportError as error:
        raise UserError(f'{key}.path: {root} needs `pip install gcsfs` ({error})') from error
    versions = [
        p for p in below if pattern.fullmatch(p.name) and (p / 'dataset_info.json').exists()
    ]
    if versions:
        return max(versions, key=lambda p: [int(n) for n in p.name.split('.')])
    prepare = (
        f'on a machine with network run once `python -m big_vit.prepare {name}'
        f'{f"/{config}" if config else ""} --data_dir DIR`, then set {key}.path=DIR'
    )
    others = sorted(p.name for p in below if not p.name.startswith('.'))
    there = f' (there is {", ".join(others[:8])})' if others else ''
    raise UserError(f'{key}.path: {tfds_name} is not prepared in {root}{there}: {prepare}')


def _open_builder(directory: Any, key: str) -> Any:
    """Return the TFDS builder of a directory, after a check that its files can be read."""
    try:
        import tensorflow_datasets
        from google.protobuf.json_format import ParseError
    except ImportError as error:
        raise UserError(
            f'{key}.name: tfds needs `pip install tensorflow-datasets importlib_resources '
            f'array_record` ({error})'
        ) from error
    try:
        builder = tensorflow_datasets.builder_from_directory(directory)
    except (ParseError, FileNotFoundError, KeyError, ValueError) as error:
        reason = ' '.join(str(error).split())
        raise UserError(
            f'{directory}/dataset_info.json or features.json: cannot be read ({reason}): prepare '
            'the dataset again'
        ) from error
    if _format(builder.info) not in _FORMATS:
        raise UserError(
            f'{key}.path: {directory} holds {_format(builder.info)} files, which cannot be read '
            'at random: prepare it again with --format array_record'
        )
    return builder


def _format(info: Any) -> str:
    return info.file_format.value if info.file_format else 'unnamed'


def _need_all_files(split: Any, directory: Any, name: str) -> None:
    present = {p.name for p in directory.iterdir()}
    missing = [p.name for p in split.filepaths if p.name not in present]
    if missing:
        raise UserError(
            f'{directory / missing[0]}: missing, as are {len(missing)} of the '
            f'{len(split.filepaths)} files of {name} in all: copy the dataset again'
        )


def _reader(
    builder: Any, name: str, image: _Image, shards: list[files.Place]
) -> tuple[Callable[[list[int]], list[dict[str, Any]]], Callable[[np.ndarray], None] | None]:
    """Return a function that reads the examples of a split, and one that is told of them before.

    Raises:
      UserError: a TFRecord file has another number of records than expected.
    """
    import tensorflow_datasets

    skip = None
    if image.is_encoded:
        skip = {image.feature: tensorflow_datasets.decode.SkipDecoding()}
    info = builder.info
    is_stored = _format(info) == 'array_record' and not shards[0].is_local
    if _format(info) != 'tfrecord' and not is_stored:
        return builder.as_data_source(name, decoders=skip).__getitems__, None
    decode = info.features.deserialize_example_np
    kind = array_record.Records if is_stored else tfrecord.Records
    records = kind(shards, list(info.splits[name].shard_lengths))
    return lambda rows: [decode(records.read(i), decoders=skip) for i in rows], records.expect


# --- Features --------------------------------------------------------------------------


def _image(features: Any, info: Any, tfds_name: str, key: str) -> _Image:
    """Find and check the image (or video) of a dataset."""
    import tensorflow_datasets

    name = _image_name(features, info, tfds_name, key)
    feature = features[name]
    is_video = name == 'video' or len(feature.shape or ()) == 4
    if feature.np_dtype not in (np.uint8, np.uint16, np.float32):
        raise UserError(
            f'{key}.tfds_name: the images of {tfds_name} are {feature.np_dtype}, not '
            'uint8, uint16 or float32: choose another dataset'
        )
    if len(feature.shape) != (4 if is_video else 3):
        raise UserError(
            f'{key}.tfds_name: the images of {tfds_name} have shape {feature.shape}, not height, '
            'width and channels: choose another dataset'
        )
    channels = feature.shape[2] if not is_video and feature.shape[2] else 3
    return _Image(
        feature=name,
        column='video' if is_video else 'image',
        shape=feature.shape if not is_video and None not in feature.shape else None,
        # Decoded to bytes, 16 bits would be lost.
        channels=channels if feature.np_dtype == np.uint8 else 0,
        # TFDS stores floats as PNGs of their bytes, which it must put together itself.
        is_encoded=not is_video
        and isinstance(feature, tensorflow_datasets.features.Image)
        and feature.np_dtype != np.float32,
    )


def _image_name(features: Any, info: Any, tfds_name: str, key: str) -> str:
    supervised = (info.supervised_keys or ('image',))[0]
    for name in ('image', supervised, 'video'):
        if isinstance(name, str) and name in features:
            return name
    raise UserError(
        f"{key}.tfds_name: {tfds_name} has no feature 'image' (only "
        f'{", ".join(sorted(features))}): choose a dataset of labelled images'
    )


def _label(
    features: Any, info: Any, label_column: str | None, tfds_name: str, request: Request
) -> _Label:
    """Find and check the label of a dataset."""
    key = request.key
    name = _label_name(features, info, label_column, tfds_name, key)
    derived = None if name in features else labels_lib.DERIVED[name]
    feature: Any = None if derived else features[name]
    multilabel = hasattr(feature, 'feature')
    element = feature.feature if multilabel else feature
    if not derived and not np.issubdtype(element.np_dtype, np.integer):
        raise UserError(
            f'{key}.tfds_name: labels of {tfds_name} ({name}) are {element.np_dtype}, not whole '
            'numbers: choose another dataset'
        )
    known = derived.classes if derived else getattr(element, 'num_classes', None)
    count = known or request.num_classes or request.least_classes
    if not count:
        raise UserError(
            f'{key}.num_classes: {tfds_name} does not say how many classes it has: set it'
        )
    read = derived.of if derived else lambda example: example[name]
    return _Label(read, multilabel, count, _class_names(element))


def _label_name(
    features: Any, info: Any, label_column: str | None, tfds_name: str, key: str
) -> str:
    """Return the name of the label: a feature, or one of `labels.DERIVED`."""
    known = label_columns(features)
    choices = 'choose a dataset of labelled images'
    if known:
        choices = f'set {key}.label_column to one of {", ".join(known)}'
    if label_column is not None:
        if label_column in known:
            return label_column
        raise UserError(f'{key}.label_column: {tfds_name} has no label {label_column!r}: {choices}')
    name = _plain_label(features, info)
    if name is not None:
        return name
    raise UserError(
        f"{key}.tfds_name: {tfds_name} has no feature 'label' (only "
        f'{", ".join(sorted(features))}): {choices}'
    )


def _plain_label(features: Any, info: Any) -> str | None:
    """Return the feature that is the label where nothing is said; None if there is none."""
    names = ('label', _supervised_label(info))
    return next((name for name in names if isinstance(name, str) and name in features), None)


def _supervised_label(info: Any) -> Any:
    return (info.supervised_keys or ('', 'label'))[1]


def default_label(info: Any) -> str | None:
    """Return the `label_column` to suggest: None if the dataset has a label, else the first."""
    supervised = _supervised_label(info)
    if 'label' in info.features or (isinstance(supervised, str) and supervised in info.features):
        return None
    return next(iter(label_columns(info.features)), None)


def label_columns(features: Any) -> list[str]:
    """List what `label_column` may be: integer features, and labels derived from others."""
    plain = []
    for name, feature in features.items():
        element = getattr(feature, 'feature', feature)
        dtype = getattr(element, 'np_dtype', None)
        is_integer = isinstance(dtype, type | np.dtype) and np.issubdtype(dtype, np.integer)
        if is_integer and not getattr(element, 'shape', None):
            plain.append(name)
    derived = [
        name
        for name, label in labels_lib.DERIVED.items()
        if all(_has(features, path) for path in label.needs)
    ]
    return sorted(plain) + derived


def _objects(features: Any) -> _Objects | None:
    """Find the objects of the pictures; None where a dataset has none with boxes and classes."""
    if not (_has(features, 'objects/bbox') and _has(features, 'objects/label')):
        return None
    parts = features['objects'].feature
    crowd = next((name for name in ('is_crowd', 'is_difficult') if name in parts), None)
    count = getattr(parts['label'], 'num_classes', None)
    return _Objects(count, _class_names(parts['label']), crowd) if count else None


def _annotation(
    example: dict[str, Any],
    index: int,
    image: _Image,
    objects: _Objects | None,
    where: Callable[[int], str],
) -> Annotation:
    """Read the objects of a picture, whose boxes are (top, left, bottom, right) in shares of it."""
    assert objects is not None
    stored = example[image.feature]
    shape = decode.Encoded(stored).shape if image.is_encoded else np.shape(stored)
    own = example['objects']
    height, width = shape[:2]
    shares = np.asarray(own['bbox'], np.float64).reshape(-1, 4)
    boxes = shares[:, [1, 0, 3, 2]] * [width, height, width, height]
    sides = boxes[:, 2:] - boxes[:, :2]
    crowd = own[objects.crowd] if objects.crowd else np.zeros(len(boxes))
    name, number = example.get('image/filename'), example.get('image/id', index)
    return Annotation(
        height,
        width,
        boxes,
        np.asarray(own['label'], np.int32).reshape(-1),
        np.asarray(crowd, bool).reshape(-1),
        np.asarray(own.get('area', np.prod(sides, axis=1)), np.float64).reshape(-1),
        None,
        name.decode() if isinstance(name, bytes) else str(name or where(index)),
        int(number) if np.issubdtype(np.asarray(number).dtype, np.integer) else index,
    )


def _has(features: Any, path: str) -> bool:
    """Whether a feature exists; 'objects/location' is a field of a sequence of objects."""
    name, _, field = path.partition('/')
    return name in features and (not field or field in getattr(features[name], 'feature', ()))


def _class_names(label: Any) -> tuple[str, ...] | None:
    names = getattr(label, 'names', None)
    # TFDS numbers classes without names.
    numbered = names and list(names) == [str(i) for i in range(len(names))]
    return tuple(map(label_name, names)) if names and not numbered else None
