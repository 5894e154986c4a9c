"""Datasets prepared by TensorFlow Datasets, read without TensorFlow.

ArrayRecord and Parquet files are read by TFDS itself, TFRecord files through an index of our own.
Images stay encoded: they are decoded by the transform, which may need a part only.
"""

import functools
import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from big_vit.data import files
from big_vit.data.sources import labels as labels_lib
from big_vit.data.sources import tfrecord
from big_vit.data.sources.base import Columns, Source, cut
from big_vit.errors import UserError


def _find_tfds(tfds_name: str, path: str, key: str):
    """The directory of a prepared TFDS dataset, as an etils path; UserError if there is none."""
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
    wanted = re.compile(
        r'\d+\.\d+\.\d+' if version is None else re.escape(version).replace(r'\*', r'\d+')
    )
    try:
        below = list(directory.iterdir()) if directory.is_dir() else []
    except ImportError as error:
        raise UserError(f'{key}.path: {root} needs `pip install gcsfs` ({error})') from error
    versions = [p for p in below if wanted.fullmatch(p.name) and (p / 'dataset_info.json').exists()]
    if versions:
        return max(versions, key=lambda p: [int(n) for n in p.name.split('.')])
    prepare = (
        f'on a machine with network run once `python -m big_vit.prepare {name}'
        f'{f"/{config}" if config else ""} --data_dir DIR`, then set {key}.path=DIR'
    )
    others = sorted(p.name for p in below if not p.name.startswith('.'))
    there = f' (there is {", ".join(others[:8])})' if others else ''
    raise UserError(f'{key}.path: {tfds_name} is not prepared in {root}{there}: {prepare}')


def _has(features: Any, path: str) -> bool:
    """Whether there is a feature; 'objects/location' is a part of a sequence of objects."""
    name, _, part = path.partition('/')
    return name in features and (not part or part in getattr(features[name], 'feature', ()))


def label_columns(features: Any) -> list[str]:
    """What `label_column` may be: features of whole numbers, and labels made of others."""
    plain = []
    for name, feature in features.items():
        one = getattr(feature, 'feature', feature)
        kind = getattr(one, 'np_dtype', None)
        whole = isinstance(kind, type | np.dtype) and np.issubdtype(kind, np.integer)
        if whole and not getattr(one, 'shape', None):
            plain.append(name)
    made = [
        name
        for name, derived in labels_lib.DERIVED.items()
        if all(_has(features, path) for path in derived.needs)
    ]
    return sorted(plain) + made


def _image_name(features: Any, info: Any, tfds_name: str, key: str) -> str:
    """The name of the image (or video) of a dataset."""
    given = (info.supervised_keys or ('image',))[0]
    for name in ('image', given, 'video'):
        if isinstance(name, str) and name in features:
            return name
    raise UserError(
        f"{key}.tfds_name: {tfds_name} has no feature 'image' (only "
        f'{", ".join(sorted(features))}): choose a dataset of labelled images'
    )


def _label_name(features: Any, info: Any, asked: str | None, tfds_name: str, key: str) -> str:
    """The name of the label: of a feature, or of `labels.DERIVED`."""
    there = label_columns(features)
    choices = 'choose a dataset of labelled images'
    if there:
        choices = f'set {key}.label_column to one of {", ".join(there)}'
    if asked is not None:
        if asked in there:
            return asked
        raise UserError(f'{key}.label_column: {tfds_name} has no label {asked!r}: {choices}')
    given = (info.supervised_keys or ('', 'label'))[1]
    for name in ('label', given):
        if isinstance(name, str) and name in features:
            return name
    raise UserError(
        f"{key}.tfds_name: {tfds_name} has no feature 'label' (only "
        f'{", ".join(sorted(features))}): {choices}'
    )


def default_label(info: Any) -> str | None:
    """None where a dataset has a label without being told which, else the first there is."""
    given = (info.supervised_keys or ('', 'label'))[1]
    if 'label' in info.features or (isinstance(given, str) and given in info.features):
        return None
    return next(iter(label_columns(info.features)), None)


def _class_names(label: Any) -> tuple[str, ...] | None:
    names = getattr(label, 'names', None)
    # Where a dataset gives no names, TFDS numbers them.
    return tuple(names) if names and list(names) != [str(i) for i in range(len(names))] else None


def tfds(
    split: str,
    tfds_name: str,
    path: str = '',
    num_classes: int | None = None,
    label_column: str | None = None,
    key: str = 'data',
) -> Source:
    """A classification dataset prepared by TensorFlow Datasets, in files of any of its formats.

    Nothing is downloaded and TensorFlow is not needed.

    Args:
      split: of the splits of the dataset, see `base.parse_split`.
      tfds_name: name[/config][:version]; the newest version on disk when none is given.
      path: the data directory, local or gs://; empty for $TFDS_DATA_DIR or
        ~/tensorflow_datasets.
      num_classes: None for the number in the dataset.
      label_column: name of a feature, or of `labels.DERIVED`; None for 'label', or what the
        dataset names as its label.
      key: prefix of the config keys in messages.

    Raises:
      UserError: not found, not readable, or not a set of labelled images.
    """
    directory = _find_tfds(tfds_name, path, key)
    try:
        import tensorflow_datasets
        from google.protobuf.json_format import ParseError
    except ImportError as error:
        raise UserError(
            f'{key}.name: tfds needs `pip install tensorflow-datasets importlib_resources '
            f'array_record` ({error})'
        ) from error
    try:
        builder: Any = tensorflow_datasets.builder_from_directory(directory)
    except (ParseError, FileNotFoundError, KeyError, ValueError) as error:
        reason = ' '.join(str(error).split())
        raise UserError(
            f'{directory}/dataset_info.json or features.json: cannot be read ({reason}): prepare '
            'the dataset again'
        ) from error
    info, features = builder.info, builder.info.features
    file_format = info.file_format.value if info.file_format else 'unnamed'
    if file_format not in ('array_record', 'parquet', 'tfrecord'):
        raise UserError(
            f'{key}.path: {directory} holds {file_format} files, which cannot be read '
            'at random: prepare it again with --format array_record'
        )
    image_name = _image_name(features, info, tfds_name, key)
    label_name = _label_name(features, info, label_column, tfds_name, key)
    image = features[image_name]
    column = 'video' if image_name == 'video' or len(image.shape or ()) == 4 else 'image'
    if image.np_dtype not in (np.uint8, np.uint16, np.float32):
        raise UserError(
            f'{key}.tfds_name: the images of {tfds_name} are {image.np_dtype}, not '
            'uint8, uint16 or float32: choose another dataset'
        )
    if len(image.shape) != (4 if column == 'video' else 3):
        raise UserError(
            f'{key}.tfds_name: the images of {tfds_name} have shape {image.shape}, not height, '
            'width and channels: choose another dataset'
        )
    derived = None if label_name in features else labels_lib.DERIVED[label_name]
    label: Any = None if derived else features[label_name]
    several = hasattr(label, 'feature')
    one = label.feature if several else label
    if not derived and not np.issubdtype(one.np_dtype, np.integer):
        raise UserError(
            f'{key}.tfds_name: labels of {tfds_name} ({label_name}) are {one.np_dtype}, not whole '
            'numbers: choose another dataset'
        )
    found_classes = derived.classes if derived else getattr(one, 'num_classes', None)
    classes = num_classes if num_classes is not None else found_classes
    if classes is None:
        raise UserError(
            f'{key}.num_classes: {tfds_name} does not say how many classes it has: set it'
        )
    if found_classes and classes < found_classes:
        raise UserError(
            f'{key}.num_classes is {classes} but {tfds_name} has {found_classes} classes: '
            'set at least that'
        )
    encoded = column == 'image' and isinstance(image, tensorflow_datasets.features.Image)
    skip = {image_name: tensorflow_datasets.decode.SkipDecoding()} if encoded else None
    names = _class_names(one) if classes == found_classes else None
    shape = image.shape if column == 'image' and None not in image.shape else None
    channels = image.shape[2] if column == 'image' and image.shape[2] else 3
    if image.np_dtype != np.uint8:
        channels = 0  # Decoded to bytes, 16 bits would be lost.

    def whole(name: str) -> Source:
        paths = info.splits[name].filepaths
        lengths = info.splits[name].shard_lengths
        present = {p.name for p in directory.iterdir()}
        missing = [p.name for p in paths if p.name not in present]
        if missing:
            raise UserError(
                f'{directory / missing[0]}: missing, as are {len(missing)} of the {len(paths)} '
                f'files of {name} in all: copy the dataset again'
            )
        if file_format == 'tfrecord':
            shards = [files.place(os.fspath(p), key) for p in paths]
            read = _tfrecords(shards, lengths, features, skip)
        else:
            read = builder.as_data_source(name, decoders=skip).__getitems__
        ends = np.cumsum(lengths)
        label_of = derived.of if derived else lambda example: example[label_name]

        def where(index: int) -> str:
            shard = int(np.searchsorted(ends, index, side='right'))
            before = int(ends[shard - 1]) if shard else 0
            return f'{paths[shard]}, record {index - before}'

        def check(labels: np.ndarray, indices: Any) -> np.ndarray:
            wrong = np.flatnonzero((labels < 0) | (labels >= classes))
            if wrong.size:
                # Some datasets publish a split without labels, and write -1.
                raise UserError(
                    f'{key}.split: example {indices[wrong[0]]} of {name!r} of {tfds_name} has '
                    f'label {labels[wrong[0]]}, not one of {classes} classes: choose another split'
                )
            return labels

        def load(indices: np.ndarray) -> Columns:
            try:
                examples = read([int(i) for i in indices])
            except RuntimeError as error:  # What array_record makes of a damaged file.
                reason = ' '.join(str(error).split())[:200]
                raise UserError(
                    f'{where(int(indices[0]))}, or another of {len(indices)} records: damaged '
                    f'({reason}): copy the dataset again'
                ) from error
            every = [label_of(example) for example in examples]
            if several:
                label: Any = [np.asarray(x, np.int32) for x in every]
            else:
                label = check(np.array(every, np.int32), indices)
            images: Any = [example[image_name] for example in examples]
            if not encoded and shape:
                images = np.stack(images)
            return {column: images, 'label': label}

        @functools.cache
        def labels() -> np.ndarray:
            size, step = info.splits[name].num_examples, 1000
            parts = [
                [label_of(example) for example in read(list(range(i, min(i + step, size))))]
                for i in range(0, size, step)
            ]
            flat = np.array([value for part in parts for value in part], np.int32)
            return check(flat, np.arange(size))

        return Source(
            name=f'tfds:{tfds_name}',
            split=name,
            length=info.splits[name].num_examples,
            num_classes=classes,
            image_shape=shape,
            load=load,
            in_memory=False,
            channels=channels,
            class_names=names,
            labels=None if several else labels,
            where=where,
        )

    return cut(f'tfds:{tfds_name}', list(info.splits), whole, split, key)


def _tfrecords(
    shards: list[files.Place], lengths: list[int], features: Any, skip: Any
) -> Callable[[list[int]], list[dict[str, Any]]]:
    """What reads examples of TFRecord files by their numbers; UserError where some are missing."""
    index = tfrecord.indexed(shards)
    for place, found, wanted in zip(
        shards, np.bincount(index['shard'], minlength=len(shards)), lengths, strict=True
    ):
        if found != wanted:
            raise UserError(
                f'{place}: {found} records, but dataset_info.json says {wanted}: copy the '
                'dataset again'
            )
    shard, offset, size = index['shard'], index['offset'], index['size']

    def read(indices: list[int]) -> list[dict[str, Any]]:
        return [
            features.deserialize_example_np(
                files.read_range(shards[shard[i]], int(offset[i]), int(size[i])), decoders=skip
            )
            for i in indices
        ]

    return read
