"""Transforms, written as a line of text: 'decode | inception_crop(size) | flip_lr'.

The text is parsed, never evaluated (`grammar`), and its operations come from the modules beside
this one. Operations from `to_device` on, or from the first one that only devices have, run inside
the train step, where numbers are floats.

Several views of an example come after semicolons, by the names of the groups that a task reads:
'decode ; global: 2 * rrc(size) | flip_lr ; local: 8 * rrc(96) | flip_lr'. What comes before the
first semicolon is done once. Views of 'other as global: ...' draw the random numbers of those of
global: the same crops in another size, say.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt64

from big_vit.data import decode, normalisation, order, preprocessing
from big_vit.data.moves import OBJECTS, PLACED
from big_vit.data.sources.base import Source, stand_ins
from big_vit.data.transforms import (
    audio,
    autoaugment,
    boxes,
    canvas,
    colour,
    geometry,
    grammar,
    labels_and_fields,
    naflex,
    randaug,
    text,
    video,
)
from big_vit.data.transforms.operations import (
    STREAMS,
    BadExampleError,
    Columns,
    Operation,
    UnfitError,
    decoded,
)
from big_vit.errors import UserError

OPERATIONS: dict[str, Callable[..., Operation]] = {
    name: function
    for module in (
        labels_and_fields,
        geometry,
        canvas,
        boxes,
        colour,
        randaug,
        autoaugment,
        audio,
        video,
        text,
        naflex,
    )
    for name, function in module.OPERATIONS.items()
}
# Number of examples, a damaged one and those after it, of which one must be intact.
TRIED = 17
# Marks where the devices' part begins, needed if its first operation exists on the host too.
BOUNDARY = 'to_device'
# Operations on what only files have, which come before any other.
OF_FILES = frozenset({'decode', 'exif_transpose'})
# Operations that pictures alone do not need: they ask for a file, an optional library, or objects.
EXTERNAL = frozenset({'decode_audio', 'decode_video', 'tokenize', 'boxes'})


class DeviceOperations(NamedTuple):
    """Operations of the devices: constructors by name, and the names of the random ones."""

    table: Mapping[str, Callable[..., Any]]
    random: frozenset[str]


_NOTHING = DeviceOperations({}, frozenset())


@dataclass(frozen=True)
class View:
    """Equal ways to see an example: `count` of them, in a group of views of one size.

    Attributes:
      like: group whose random numbers they draw; None draws their own.
      number, statement: place of the first of those whose numbers they draw, among all views and
        among all statements that draw their own.
    """

    group: str
    count: int
    transform: 'Transform'
    like: str | None
    number: int
    statement: int


@dataclass(frozen=True)
class Transform:
    """A sequence of operations, from `parse`.

    Attributes:
      text: as the user wrote it.
      key: the config key it came from, for messages.
      names: names of the operations on the host.
      operations: the operations themselves.
      host_text: the part of the text that is done on the host.
      device: the devices' part, as (name, operation).
      random_operations: names of all operations that need randomness, on host and devices.
      views: what is done after the operations to make several views of each example.
    """

    text: str
    key: str
    names: tuple[str, ...]
    operations: tuple[Operation, ...]
    host_text: str
    device: tuple[tuple[str, Any], ...]
    random_operations: tuple[str, ...]
    views: tuple[View, ...] = ()

    @property
    def groups(self) -> dict[str, int]:
        """How many views each group has."""
        counts: dict[str, int] = {}
        for view in self.views:
            counts[view.group] = counts.get(view.group, 0) + view.count
        return counts

    @property
    def every_view(self) -> tuple[tuple[int, View], ...]:
        """The views, each as often as it is made, after the number that its randomness has."""
        return tuple((view.number + i, view) for view in self.views for i in range(view.count))

    @property
    def is_random(self) -> bool:
        return bool(self.random_operations)

    def seen_once(self) -> 'Transform':
        """Return the operations that make an example's first view; itself without views."""
        if not self.views:
            return self
        first = self.views[0].transform
        before = [n for n, o in zip(self.names, self.operations, strict=True) if o.random]
        text = grammar.statements(self.host_text)[0].strip()
        return replace(
            self,
            names=self.names + first.names,
            operations=self.operations + first.operations,
            host_text=' | '.join(filter(None, (text, first.host_text))),
            device=first.device,
            random_operations=(*before, *first.random_operations),
            views=(),
        )

    def split(self) -> tuple['Transform', 'Transform']:
        """Split before the first random operation; both parts together draw as the whole does."""
        first = next((i for i, o in enumerate(self.operations) if o.random), len(self.names))
        before = self._first(first)
        # What has been done still says how it normalised.
        done = tuple(
            _unchanged._replace(normalisation=o.normalisation) for o in self.operations[:first]
        )
        return before, replace(self, operations=done + self.operations[first:])

    def before(self, stops: Callable[[str], bool]) -> 'Transform':
        """Return the operations before the first whose name `stops`."""
        names = enumerate(self.names)
        return self._first(next((i for i, name in names if stops(name)), len(self.names)))

    def _first(self, count: int) -> 'Transform':
        before_views = grammar.statements(self.host_text)[0]
        return replace(
            self,
            names=self.names[:count],
            operations=self.operations[:count],
            host_text=' | '.join(before_views.split(' | ')[:count]).strip(),
            device=(),
            random_operations=(),
            views=(),
        )

    def normalisation(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Compute how images are normalised by all operations, on the host and on the devices.

        Args:
          channels: how many numbers to return where all channels are treated alike.

        Returns:
          (mean, std) by which pixels in 0..1 were normalised; (0.5, ...) for both where no
          operation says otherwise. Operations on bytes such as `invert` are not normalisation.
          All views have the same.
        """
        seen = self.seen_once()
        steps = [operation.normalisation for operation in seen.operations]
        steps += [operation.normalisation for _, operation in seen.device]
        return normalisation.mean_and_std(steps, channels)

    def preprocessing(self, size: tuple[int, int], channels: int) -> preprocessing.Preprocessing:
        """Say what all operations, on the host and on the devices, do to a picture.

        Args:
          size: (height, width) that the model takes.
          channels: that the model takes.

        Raises:
          UserError: an operation is random, or none that other codebases have.
        """
        require_deterministic(self)

        def step_of(operation: Any) -> preprocessing.Step | None:
            scales = operation.normalisation
            if scales is not None:
                return None if scales.applies_to == 'nothing' else 'keeps'
            return getattr(operation, 'step', None)

        pairs = [*zip(self.names, self.operations, strict=True), *self.device]
        steps = [(name, step_of(operation)) for name, operation in pairs]
        return preprocessing.of_steps(steps, size, *self.normalisation(channels), self.key)

    def __call__(self, columns: Columns, keys: UInt64[np.ndarray, ' batch']) -> Columns:
        """Transform the columns of some examples, with one key per example.

        Raises:
          UserError: an operation cannot be applied to such examples.
          BadExampleError: one of the examples is damaged.
        """
        place = 0
        for name, operation in zip(self.names, self.operations, strict=True):
            first = place * STREAMS
            # Writing `decode` or not makes no difference to the operations after it.
            place += name != 'decode'

            def draw(k: int, first: int = first) -> np.ndarray:
                return order.uniform(keys, first + k)

            self._check_carries(name, operation, columns)
            try:
                columns = operation.apply(columns, draw)
            except BadExampleError:
                raise
            except UnfitError as error:
                raise UserError(f'{self.key}: {name} {error}') from error
        return self._views(columns, keys) if self.views else columns

    def _check_carries(self, name: str, operation: Operation, columns: Columns) -> None:
        placed = sorted(PLACED & columns.keys())
        if placed and not operation.carries:
            raise UserError(
                f'{self.key}: {name} may move pixels and cannot take {placed[0]} along: leave it '
                'out, or use operations that do, which docs/data.md lists'
            )

    def _views(self, columns: Columns, keys: UInt64[np.ndarray, ' batch']) -> Columns:
        """All views of the images, [B, views, H, W, C] for each group, in place of the images."""
        if 'image' not in columns:
            raise UserError(
                f'{self.key}: views are of pictures, but these examples have '
                f'{", ".join(sorted(columns))}'
            )
        if placed := sorted(PLACED & columns.keys()):
            raise UserError(f'{self.key}: views cannot take {placed[0]} along: leave them out')
        images = {'image': decoded(columns['image'])}
        groups: dict[str, list[np.ndarray]] = {group: [] for group in self.groups}
        # A view's randomness depends on its place alone, so one added at the end moves no other.
        for number, view in self.every_view:
            seen = view.transform(images, order.view_keys(keys, number))
            groups[view.group].append(finished(seen, view.transform)['image'])
        for group, views in groups.items():
            sizes = dict.fromkeys('x'.join(map(str, view.shape[1:3])) for view in views)
            if len({view.shape for view in views}) > 1:
                raise UserError(
                    f'{self.key}: views of {group!r} are {" and ".join(sizes)}: give those of '
                    'another size another name'
                )
        rest = {name: column for name, column in columns.items() if name != 'image'}
        return rest | {group: np.stack(views, axis=1) for group, views in groups.items()}


_unchanged = Operation(lambda columns, draw: columns, carries=True)


def parse(
    text: str,
    *,
    size: tuple[int, int],
    key: str = 'data',
    device: DeviceOperations = _NOTHING,
    skip: Collection[str] = (),
) -> Transform:
    """Parse a transform such as 'resize(size) | flip_lr'; an empty text changes nothing.

    Args:
      text: operations separated by |, each a name with literal arguments; the name `size`
        stands for the configured image size.
      size: (height, width), the value of the name `size`.
      key: prefix of the config key, such as 'data'; or the flag '--transform'.
      device: the operations that the devices have.
      skip: names of operations to leave out, such as `EXTERNAL` where only the images matter.

    Raises:
      UserError: the text has another form, or names an operation that is unknown or does not take
        its arguments.
    """
    key = key if key == '--transform' else f'{key}.transform'
    text_of_all, *texts = grammar.statements(text)
    transform = _parse(text_of_all, size, key, device, skip)
    if not texts:
        return replace(transform, text=text)
    if transform.device:
        raise UserError(
            f'{key}: {transform.device[0][0]} comes before views, which the host makes: put '
            f'{BOUNDARY} and what follows behind the operations of each view'
        )
    read = [grammar.view(text, key) for text in texts]
    views = tuple(
        View(
            view.group,
            view.count,
            _parse(view.operations, size, key, device, skip),
            view.like,
            sum(other.count for other in read[:place] if other.like is None),
            sum(other.like is None for other in read[:place]),
        )
        for view, place in zip(read, _places(read, key), strict=True)
    )
    scales = [view.transform.normalisation(3) for view in views]
    if any(scale != scales[0] for scale in scales):
        raise UserError(f'{key}: all views are normalised alike, but these are not')
    names = [v.group if v.like is None else f'{v.group} as {v.like}' for v in views]
    shown = [
        f'{name}: {v.count} * {v.transform.host_text}' for name, v in zip(names, views, strict=True)
    ]
    random = [name for view in views for name in view.transform.random_operations]
    return replace(
        transform,
        text=text,
        host_text=' ; '.join([transform.host_text, *shown]),
        random_operations=(*transform.random_operations, *random),
        views=views,
    )


def _places(views: list[grammar.ViewText], key: str) -> list[int]:
    """The place of each statement, or of the one whose random numbers it draws.

    Raises:
      UserError: there is no such statement, or it has another number of views.
    """
    places = []
    for place, view in enumerate(views):
        if view.like is not None:
            turn = sum(other.group == view.group for other in views[:place])
            others = [i for i, v in enumerate(views) if v.group == view.like and v.like is None]
            if turn >= len(others) or views[others[turn]].count != view.count:
                raise UserError(
                    f'{key}: {view.group} as {view.like}: the views of each such statement are as '
                    f'many as those of one of {view.like}, in their order'
                )
            place = others[turn]
        places.append(place)
    return places


def _parse(
    text: str,
    size: tuple[int, int],
    key: str,
    device: DeviceOperations,
    skip: Collection[str],
) -> Transform:
    """Parse the operations of one transform without views, or of one view."""
    calls = [c for c in grammar.parse(text, size=size, key=key) if c.name not in skip]
    names: list[str] = []
    operations: list[Operation] = []
    on_device: list[tuple[str, Any]] = []
    random: list[str] = []
    boundary = None
    for position, call in enumerate(calls):
        if call.name == BOUNDARY:
            if boundary is not None or call.args or call.kwargs:
                raise UserError(f'{key}: {BOUNDARY} comes once, before what devices do')
            boundary = BOUNDARY
            continue
        if boundary is None and call.name in device.table and call.name not in OPERATIONS:
            boundary = call.name
        if boundary is not None:
            if call.name in OPERATIONS and call.name not in device.table:
                raise UserError(f'{key}: {call.name} is done on the host: put it before {boundary}')
            on_device.append((call.name, grammar.make(call, device.table, key)))
            random += [call.name] if call.name in device.random else []
            continue
        if call.name == 'decode' and position:
            raise UserError(f'{key}: decode comes first, where it is written at all')
        if call.name == 'exif_transpose' and set(names) - OF_FILES:
            raise UserError(f'{key}: exif_transpose comes before {names[-1]}, which decodes files')
        names.append(call.name)
        operations.append(grammar.make(call, {**device.table, **OPERATIONS}, key))
        random += [call.name] if operations[-1].random else []
    host = ' | '.join(call.text for call in calls[: len(names)])
    return Transform(
        text, key, tuple(names), tuple(operations), host, tuple(on_device), tuple(random)
    )


def require_deterministic(transform: Transform) -> None:
    """Raise UserError if a transform is random, which would make an evaluation irreproducible.

    Several views are random too, or there would be no reason for them.
    """
    if transform.views:
        raise UserError(
            f'{transform.key}: an evaluation sees each example once: leave out the views, '
            f'{", ".join(transform.groups)}'
        )
    if transform.is_random:
        raise UserError(
            f'{transform.key}: {transform.random_operations[0]} is random, which an evaluation '
            'must not be: remove it'
        )


def need_whole(transform: Transform) -> None:
    """Raise UserError where pictures are cropped, mirrored or turned before they are scored.

    What is found in a picture is drawn over it as it is stored, or compared with the boxes of the
    dataset, in shares of the whole picture, wherever it lies on a canvas.
    """
    wanted = np.array([[0.5, 0.5, 1, 1], [0.125, 0.125, 0.25, 0.25]])
    host = transform.before(lambda name: name == 'boxes')
    for height, width in ((600, 800), (800, 600)):
        corners = np.array([[0, 0, width, height], [0, 0, width / 4, height / 4]], np.float32)
        columns: Columns = {'image': np.zeros((1, height, width, 3), np.uint8)}
        columns |= {'boxes': [corners], 'box_label': [np.zeros(2, np.int32)]}
        moved = boxes.boxes(2).apply(host(columns, np.zeros(1, np.uint64)), lambda stream: wanted)
        if not np.allclose(moved['boxes'][0], wanted, atol=1e-3):
            raise UserError(
                f'{transform.key}: what is found has its place in the whole picture, and this '
                'crops or mirrors it: leave that out'
            )


def opened(columns: Columns, channels: int) -> Columns:
    """Wrap encoded images as `decode.Encoded`, reading their headers.

    Raises:
      BadExampleError: a file is not an image.
    """
    images = columns.get('image')
    opened_columns = dict(columns)
    if isinstance(images, list) and any(isinstance(x, bytes) for x in images):
        opened_columns['image'] = _each(images, lambda image: decode.Encoded(image, channels))
    if 'segmentation' in columns:
        opened_columns['segmentation'] = _opened_segmentation(opened_columns)
    return opened_columns


def _each(files: list[Any], read: Callable[[bytes], Any]) -> list[Any]:
    """Read those that are files; BadExampleError."""
    opened_files: list[Any] = []
    for row, file in enumerate(files):
        try:
            opened_files.append(read(file) if isinstance(file, bytes) else file)
        except decode.DecodeError as error:
            raise BadExampleError(row, str(error)) from error
    return opened_files


def _opened_segmentation(columns: Columns) -> list[np.ndarray]:
    """Decode the classes of pixels to integers [height, width] of their pictures' sizes."""
    read = _each(list(columns['segmentation']), decode.stored_values)
    values = [own[..., 0] if own.ndim == 3 else own for own in read]
    for row, (own, image) in enumerate(zip(values, columns['image'], strict=True)):
        if own.shape != tuple(image.shape[:2]):
            shown = ' and '.join(
                'x'.join(map(str, shape[:2])) for shape in (own.shape, image.shape)
            )
            raise BadExampleError(row, f'classes of pixels and picture differ in size ({shown})')
    return values


def finished(columns: Columns, transform: Transform) -> Columns:
    """Decode what is left and stack each column into an array [B, ...].

    Raises:
      UserError: the images differ in shape, or no array can hold a column.
    """
    result = {}
    for name, column in columns.items():
        column = decoded(column) if name == 'image' else column
        if isinstance(column, list):
            try:
                column = np.stack([np.asarray(value) for value in column])
            except ValueError:
                column = None
            if column is None or column.dtype.kind not in 'biuf':
                raise UserError(f'{transform.key}: {_ragged(name, columns[name], transform)}')
        result[name] = column.astype(np.int32) if name == 'segmentation' else column
    return result


def _ragged(name: str, column: Any, transform: Transform) -> str:
    if name == 'label':
        return 'examples have several labels: add multihot(CLASSES) or onehot(CLASSES)'
    if name == 'image':
        shapes = sorted({x.shape for x in column})[:2]
        shown = ' and '.join('x'.join(map(str, shape)) for shape in shapes)
        if {shape[:2] for shape in shapes} == {shapes[0][:2]}:
            return f'images of {shown} come together: add decode(3), rgb or grayscale'
        return f'images of {shown} come together: add resize(size) or a crop'
    if name == 'text':
        return "text has to become numbers: add byte_tokens(LENGTH) or tokenize('FILE', LENGTH)"
    if name == 'audio':
        return 'sounds have to become arrays: add decode_audio(RATE, SECONDS)'
    if name == 'video':
        return 'videos have to become arrays of one shape: add decode_video(FRAMES)'
    if name in OBJECTS:
        return 'pictures have different numbers of objects: add boxes(MOST) as the last operation'
    if name == 'segmentation':
        return 'classes of pixels differ in size: add a crop or pad_to(size)'
    return f"{name!r} is no array of one shape: leave it out with keep('image', 'label')"


def _first_intact(transform: Transform, source: Source, tries: int) -> Columns:
    """Transform the first example that is not damaged; UserError for the first error."""
    first: Exception | None = None
    following, of_others = stand_ins(source, 0, tries) if tries > 1 else ([], [])
    for index in dict.fromkeys((0, *following, *of_others)):
        at = np.array([index], np.int64)
        try:
            columns = transform(source.load(at), order.example_keys(0, 0, at))
            return finished(columns, transform)
        except (BadExampleError, OSError) as error:
            first = first or error
    raise UserError(f'{source.place(0)}: {first}') from first


class ExampleSpec(NamedTuple):
    """Shape and type of every part of a transformed example, and its largest pixel."""

    parts: dict[str, tuple[tuple[int, ...], np.dtype]]
    peak: float = 0.0


# Rank of a part, and the axis of its height, which the width follows.
_SIZED = {'image': (3, 0), 'video': (4, 1)}


def check(
    transform: Transform,
    source: Source,
    size: tuple[int, int] | None,
    reads: tuple[str, ...] = ('image',),
    skip_bad: bool = False,
) -> ExampleSpec:
    """Try a transform on the first example, before a device is touched.

    Args:
      transform: from `parse`.
      source: the examples that it will be applied to.
      size: (height, width) of images and videos that the model needs; None for any.
      reads: names of the parts that the model takes.
      skip_bad: try the next examples where the first are damaged.

    Returns:
      The shapes and types of a transformed example.

    Raises:
      UserError: the result has another size or lacks a part, the transform cannot be applied, or
        the example is damaged.
    """
    columns = _first_intact(transform, source, TRIED if skip_bad else 1)
    example_spec = ExampleSpec(
        {name: (column.shape[1:], column.dtype) for name, column in columns.items()},
        float(np.max(columns['image'], initial=0)) if 'image' in columns else 0.0,
    )
    if transform.views and size is not None:
        first = next(iter(transform.groups))
        _check_size(transform, first, example_spec.parts[first][0][1:], size)
    for part in reads:
        need_part(transform, example_spec, part)
        if part in _SIZED and size is not None:
            _check_size(transform, part, example_spec.parts[part][0], size)
    return example_spec


def need_part(transform: Transform, example_spec: ExampleSpec, part: str) -> None:
    """Raise UserError where transformed examples lack a part."""
    if part not in example_spec.parts:
        has = ', '.join(sorted(example_spec.parts)) or 'nothing'
        raise UserError(f'{transform.key} gives {has} but no {part}, {_NEEDS.get(part, _OTHER)}')


_OTHER = 'which is what the model takes'
_NEEDS = {
    'image': f'{_OTHER}: docs/data.md says what turns sound and video into images',
    'video': f'{_OTHER}: add decode_video(FRAMES)',
    'tokens': f"{_OTHER}: add byte_tokens(LENGTH) or tokenize('FILE', LENGTH)",
    'patches': f'{_OTHER}: add ragged_patches(PATCH, TOKENS)',
    'boxes': 'which the task learns: add boxes(MOST), to data with boxes',
    'box_label': 'which the task learns: add boxes(MOST), to data with boxes',
    'segmentation': 'which the task learns: take data with classes of pixels',
}


def _check_size(
    transform: Transform, part: str, shape: tuple[int, ...], size: tuple[int, int]
) -> None:
    rank, first = _SIZED.get(part, _SIZED['image'])
    if len(shape) != rank or shape[first : first + 2] != tuple(size):
        actual = 'x'.join(map(str, shape[first : first + 2]))
        fix = 'resize_video(size)' if part == 'video' else 'resize(size)'
        raise UserError(
            f'{transform.key} gives {actual} {part}s but image_size is '
            f'{size[0]}x{size[1]}: add {fix}'
        )
