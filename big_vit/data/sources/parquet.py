"""Parquet and Arrow files with image bytes, as Hugging Face's `datasets` writes them."""

import fnmatch
import functools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from big_vit.data import decode, files
from big_vit.data.sources import annotated, arrow
from big_vit.data.sources.base import Annotation, Columns, Request, Source, locate
from big_vit.data.sources.classes import infer_classes, named_classes
from big_vit.data.sources.splits import cut, training_split
from big_vit.errors import UserError

_ENDINGS = ('.parquet', '.arrow')
_NUMBERED = re.compile(r'(?:(.+?)[-_.])?\d+(?:-of-(?P<total>\d+))?(?:-[0-9a-f]{16})?')
_PART = re.compile(r'part[-_.]\d+.*')  # Written by Spark and Dask, which know no splits.
_GLOB = re.compile(r'[*?[]')
_DECLARED_KINDS = {'Audio': 'audio', 'Video': 'video'}


# Boxes are (x, y, width, height) as in COCO, or two corners.
BOX_FORMATS = ('xywh', 'xyxy')


def parquet(
    request: Request,
    *,
    path: str,
    image_column: str = 'image',
    label_column: str = 'label',
    boxes_column: str | None = None,
    box_format: str = 'xywh',
) -> Source:
    """Open Parquet files, or Arrow files as `Dataset.save_to_disk` leaves them.

    Splits are the first part of file names (train-00000-of-00002.parquet), or the folders
    (train/0000.parquet), or what save_to_disk recorded. Images are bytes, alone or beside a path
    to read where they are missing: one below the folder of the file, or an absolute one on this
    machine. Labels are numbers (with names if `datasets` recorded them), names, or lists of
    these, which make 'label' a list; none are needed where no labels are. Local Arrow files are
    memory-mapped.

    Args:
      request: the examples to open; classes are those that are named, or occur in `train`.
      path: a file, a folder, or a glob of files; local or any URL that fsspec reads.
      image_column: column of images, or of other media.
      label_column: column of labels.
      boxes_column: column of the objects in pictures, whose classes are those of the source where
        pictures need no labels: lists of bbox, category, and area and iscrowd where they are
        there; by default `objects`, where there is one and no column of labels.
      box_format: 'xywh' as in COCO, or 'xyxy' for two corners; in pixels.

    Raises:
      UserError: files are missing or damaged, or a column is missing or of another kind.
    """
    key = request.key
    if box_format not in BOX_FORMATS:
        shown = ' or '.join(map(repr, BOX_FORMATS))
        raise UserError(f'{key}.box_format: takes {shown}, not {box_format!r}')
    root = files.place(path, f'{key}.path')
    splits = shards_of_splits(root, key)
    title = f'parquet:{root.name}'
    label_columns = {label_column: 'label_column'}

    first = training_split(splits)

    def read(name: str, columns: dict[str, str]) -> tuple[Any, list[int], arrow.Labels]:
        shards = splits[name]
        try:
            table, rows = arrow.read_table(shards, {**columns, **label_columns}, key)
            return table, rows, arrow.Labels(table, label_column, str(shards[0]), name)
        except UserError:
            if request.labelled or not columns:
                raise
            table, rows = arrow.read_table(shards, columns, key)
            return table, rows, arrow.Labels.none(len(table))

    def objects_of(name: str) -> tuple[arrow.Objects, Any] | None:
        """Read the objects of a split, and what `datasets` recorded of them."""
        if request.labelled:
            return None
        column, option = (
            boxes_column or 'objects',
            {boxes_column or 'objects': 'boxes_column'},
        )
        try:
            table, _ = arrow.read_table(splits[name], option, key)
        except UserError:
            if boxes_column is not None:
                raise
            return None
        own = arrow.Objects(table, column, str(splits[name][0]), name)
        return own, _features(table.schema).get(column)

    def with_objects(source: Source, own: arrow.Objects, feature: Any) -> Source:
        alone = first in (None, source.split)
        known = own if alone else (objects_of(str(first)) or (own, None))[0]
        return _with_objects(source, own, known, feature, box_format, request, first)

    @functools.cache
    def train_labels() -> arrow.Labels:
        assert first is not None
        return read(first, {})[2]  # Read for its classes only, so without its images.

    def open_split(name: str) -> Source:
        shards = splits[name]
        table, rows, labels = read(name, {image_column: 'image_column'})
        if not len(table):
            raise UserError(f'{shards[0]}: has no rows')
        features = _features(table.schema)
        grouped = table if isinstance(table, arrow.GroupedTable) else None
        try:
            kind, data, paths = arrow.media_column(
                table, image_column, _declared_kind(features.get(image_column))
            )
        except UserError as error:
            raise UserError(f'{shards[0]}: {error}: set {key}.image_column') from None
        names = _class_names(features.get(label_column))
        if names and all(type(value) is int for value in labels.values):
            classes = named_classes(names)  # And the labels are numbers of them.
            plain = classes._replace(names=None)
        else:
            alone = first in (None, name) or not request.labelled
            known = labels if alone else train_labels()
            plain = classes = infer_classes(known.values, request, title)
        numbers = plain.numbers(labels.values, shards[0], name, first or name, key)
        ends = np.cumsum(rows)
        read_row = _reader(data, paths, lambda index: shards[locate(index, ends)[0]])

        def where(index: int) -> str:
            shard, row = locate(index, ends)
            return f'{shards[shard]}, row {row}'

        def load(indices: np.ndarray) -> Columns:
            indices = np.asarray(indices, np.int64)
            values = [read_row(index) for index in indices.tolist()]
            return {kind: values, 'label': labels.numbered(indices, numbers)}

        source = Source(
            name=title,
            split=name,
            length=len(table),
            num_classes=classes.num_classes,
            image_shape=None,
            load=load,
            in_memory=False,
            class_names=classes.names,
            labels=None if labels.ends is not None else lambda: numbers[labels.codes],
            where=where,
            shard_lengths=grouped.lengths if grouped else np.array(rows, np.int64),
            expect=grouped.expect if grouped else None,
        )
        has_labels = label_column in table.schema.names and boxes_column is None
        listed = objects_of(name) if kind == 'image' and not has_labels else None
        return source if listed is None else with_objects(source, *listed)

    return cut(title, splits, open_split, request)


def _with_objects(
    source: Source,
    own: arrow.Objects,
    training: arrow.Objects,
    feature: Any,
    box_format: str,
    request: Request,
    train: str | None,
) -> Source:
    """Give a source of pictures their objects, and the classes of these.

    Args:
      training: objects of the split that the classes are of.
      feature: what `datasets` recorded of the column.
      train: the name of that split.
    """
    names = _class_names(feature) or _first_names(feature)
    if names and all(type(value) is int for value in own.labels.values):
        classes = named_classes(names)
        plain = classes._replace(names=None)
    else:
        plain = classes = infer_classes(training.labels.values, request, source.name)
    numbers = plain.numbers(
        own.labels.values, source.name, source.split, train or source.split, request.key
    )
    labels = numbers[own.labels.codes]
    load = source.load

    def annotation(row: int, data: Any) -> Annotation:
        some = slice(int(own.ends[row - 1]) if row else 0, int(own.ends[row]))
        boxes = own.boxes[some].copy()
        xywh = boxes.copy() if box_format == 'xywh' else None
        if xywh is not None:
            boxes[:, 2:] += boxes[:, :2]
        area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) if own.area is None else own.area[some]
        height, width = decode.Encoded(data).shape[:2]
        crowd = own.crowd[some]
        name = f'row {row}'
        return Annotation(height, width, boxes, labels[some], crowd, area, None, name, row, xywh)

    def annotate(indices: np.ndarray) -> list[Annotation]:
        rows = np.asarray(indices, np.int64)
        return [annotation(*pair) for pair in zip(rows.tolist(), load(rows)['image'], strict=True)]

    def load_all(indices: np.ndarray) -> Columns:
        columns = load(indices)
        pairs = list(zip(np.asarray(indices).tolist(), columns['image'], strict=True))
        found = [annotated.read_of(row, annotation, *pair) for row, pair in enumerate(pairs)]
        none = np.zeros(len(pairs), np.int32)
        checked = annotated.checked_objects(found, classes.num_classes)
        return {**columns, 'label': none, **checked}

    return replace(
        source,
        load=load_all,
        annotations=annotate,
        labels=None,
        num_classes=classes.num_classes,
        class_names=classes.names,
    )


def _reader(
    data: arrow.Column | arrow.GroupedColumn,
    paths: arrow.Column | arrow.GroupedColumn | None,
    shard_of: Callable[[int], files.Place],
) -> Callable[[int], Any]:
    """Return a function that reads the bytes of a row, or the file that its path names."""

    def read(index: int) -> Any:
        value = data[index]
        if value is not None:
            return value
        path = paths[index] if paths is not None else None
        if path and '\0' in path:
            raise OSError('has a path with characters that no name of a file has')
        if not path:
            raise OSError('has neither bytes nor a path')
        shard = shard_of(index)
        if path.startswith('/') and shard.is_local:
            return files.read(shard._replace(path=path))
        if path.startswith('/') or '..' in path.split('/'):
            raise OSError(f'has no bytes, and its path {path} leads out of the folder')
        return files.read(shard._replace(path=shard.path.rpartition('/')[0]) / path)

    return read


# --- What `datasets` recorded about columns --------------------------------------------


def _features(schema: Any) -> dict[str, Any]:
    """Return the features that `datasets` recorded; {} if it did not."""
    try:
        metadata = json.loads((schema.metadata or {}).get(b'huggingface', b'{}'))
        return metadata.get('info', {}).get('features', {}) or {}
    except (ValueError, AttributeError):
        return {}


def _class_names(feature: Any) -> list[str] | None:
    """Return the class names of a column of labels, or of lists of labels."""
    if isinstance(feature, list):  # The lists of older versions.
        return _class_names(feature[0]) if feature else None
    if not isinstance(feature, dict):
        return None
    names = feature.get('names')
    return names if isinstance(names, list) else _class_names(feature.get('feature'))


def _first_names(feature: Any) -> list[str] | None:
    """Return the class names of whichever part of a column of objects has some."""
    if isinstance(feature, list):
        return _first_names(feature[0]) if feature else None
    if not isinstance(feature, dict):
        return None
    inside = feature.get('feature', feature)
    parts = inside.values() if isinstance(inside, dict) else ()
    return next((names for part in parts if (names := _class_names(part))), None)


def _declared_kind(feature: Any) -> str:
    declared = feature.get('_type', '') if isinstance(feature, dict) else ''
    return _DECLARED_KINDS.get(declared, 'image')


# --- Splits ----------------------------------------------------------------------------


def shards_of_splits(root: files.Place, key: str) -> dict[str, list[files.Place]]:
    """Return the files of each split, in order.

    Raises:
      UserError: there is none, or one is missing.
    """
    with files.reading(root, f'{key}.path'):
        if _GLOB.search(root.name) and not files.exists(root):
            parent = root._replace(path=root.path.rpartition('/')[0])
            names = [entry.name for entry in files.entries(parent)]
            splits = _splits_by_name(parent, fnmatch.filter(names, root.name), key)
        elif root.name.endswith(_ENDINGS) and not files.is_folder(root):
            if not files.exists(root):
                raise UserError(f'{key}.path: there is no file {root}')
            splits = {_split_of(root, 'train'): [root]}
        elif not files.is_folder(root):
            raise UserError(f'{key}.path: {root} is neither a folder nor a .parquet or .arrow file')
        elif files.exists(root / 'dataset_dict.json'):
            splits = {name: _saved_files(root / name)[1] for name in _saved_splits(root)}
        elif files.exists(root / 'state.json'):
            splits = dict([_saved_files(root)])
        else:
            splits = _splits_by_name(root, [entry.name for entry in files.walk(root)], key)
            for shards in splits.values():
                _need_all_shards(shards)
    if not any(splits.values()):
        raise UserError(f'{key}.path: no .parquet or .arrow file in {root}')
    return splits


def _split_of(file: files.Place, folder: str) -> str:
    """Return the split that a file belongs to, by its name or that of its folder."""
    stem = file.name.rpartition('.')[0]
    match = _NUMBERED.fullmatch(stem)
    word = (match[1] or '') if match else stem
    if _PART.fullmatch(stem):
        word = ''
    names = [name for name in (word, folder) if name not in ('', 'data', 'dataset')]
    return names[0] if names else 'train'


def _splits_by_name(root: files.Place, names: list[str], key: str) -> dict[str, list[files.Place]]:
    splits: dict[str, list[files.Place]] = {}
    folders: dict[str, str] = {}
    for path in names:
        folder, _, name = path.rpartition('/')
        if not name.endswith(_ENDINGS) or name.startswith('cache-'):
            continue
        split = _split_of(root / path, folder.rpartition('/')[2] or 'train')
        splits.setdefault(split, []).append(root / path)
        if folders.setdefault(split, folder) != folder:
            raise UserError(
                f'{key}.path: files of {split} are in {root / folders[split]} and in '
                f'{root / folder}, which may be other data: set it to one of the two'
            )
    for split, shards in splits.items():
        if len({arrow.is_parquet(shard) for shard in shards}) > 1:
            raise UserError(
                f'{key}.path: {root} has both .parquet and .arrow files of {split}: keep one kind'
            )
    return splits


def _need_all_shards(shards: list[files.Place]) -> None:
    """Check that there are as many files as their names say; UserError."""
    totals = []
    for shard in shards:
        match = _NUMBERED.fullmatch(shard.name.rpartition('.')[0])
        if match and match['total']:
            totals.append(int(match['total']))
    for total in set(totals):
        if totals.count(total) != total:
            raise UserError(
                f'{shards[0]}: is one of {total} by its name, but there are '
                f'{totals.count(total)}: copy what is missing, or remove what is older'
            )


def _saved_splits(root: files.Place) -> list[str]:
    """Return the splits that `DatasetDict.save_to_disk` wrote."""
    names = _read_json(root / 'dataset_dict.json').get('splits')
    if not isinstance(names, list) or not all(
        isinstance(name, str) and '/' not in name for name in names
    ):
        raise UserError(f'{root}/dataset_dict.json: lists no splits: copy it again')
    for name in names:
        if not files.exists(root / name / 'state.json'):
            raise UserError(f'{root}/dataset_dict.json: there is no {root}/{name}: copy it too')
    return names


def _saved_files(folder: files.Place) -> tuple[str, list[files.Place]]:
    """Return (split, files) that `Dataset.save_to_disk` wrote; others in the folder are older."""
    state = _read_json(folder / 'state.json')
    try:
        names = [str(part['filename']) for part in state['_data_files']]
    except (KeyError, TypeError) as error:
        raise UserError(f'{folder}/state.json: lists no files: copy it again') from error
    for name in names:
        if '/' in name or not files.exists(folder / name):
            raise UserError(f'{folder}/state.json: there is no file {folder}/{name}: copy it too')
    return state.get('_split') or 'train', [folder / name for name in names]


def _read_json(file: files.Place) -> dict[str, Any]:
    try:
        content = json.loads(files.read(file))
    except (ValueError, OSError) as error:
        raise UserError(f'{file}: cannot be read ({error}): copy it again') from error
    if not isinstance(content, dict):
        raise UserError(f'{file}: holds no JSON object: copy it again')
    return content
