"""The `data`, `mixture` and `evals` sections as datasets that fit the model."""

import functools
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from big_vit import augment, augment_colour
from big_vit.build.model import build_streams, parts_read
from big_vit.build.task import build_task
from big_vit.config import Config
from big_vit.config.registries import SOURCES
from big_vit.data import (
    dataset,
    order,
    pipeline,
    shard_ledger,
    sources,
    transforms,
    windows,
)
from big_vit.data.moves import PLACED
from big_vit.data.sources.base import concatenate, select
from big_vit.data.sources.classes import shown
from big_vit.data.sources.known import Known, has_other_words, known_of
from big_vit.data.sources.media import say_once
from big_vit.data.transforms import text
from big_vit.errors import UserError
from big_vit.evaluators.registry import DEFAULT, EVALUATORS, requirements
from big_vit.models import tokenizers
from big_vit.tasks.batch import TARGETS
from big_vit.tasks.registry import TASKS
from big_vit.tasks.task import Task


class Data(NamedTuple):
    """A source with what makes its examples fit the model.

    `transform` is done on the host, and gives what `example_spec` says. `device` is the rest, as
    (name, function of (batch, rng)); of training data `evaluation_device` is what evaluations do of
    it. `specs` can be opened by other processes, of which training has `workers`; `parts` are their
    sources. `order` says which examples come when; an evaluation has none.
    """

    source: sources.Source
    transform: transforms.Transform
    example_spec: transforms.ExampleSpec
    device: tuple[tuple[str, Any], ...]
    specs: tuple[dataset.Spec, ...]
    skip_bad: bool
    order: pipeline.Order | None = None
    workers: int = 0
    reads: tuple[str, ...] = ('image',)
    evaluation_device: tuple[tuple[str, Any], ...] = ()
    parts: tuple[sources.Source, ...] = ()

    @property
    def ledgers(self) -> dict[str, shard_ledger.Ledger]:
        """The ledgers of the parts that are of shards, by section of the config."""
        assert self.order is not None
        opened = self.order.shards or [None] * len(self.parts)
        ledgers = [shard_ledger.of(*pair) for pair in zip(self.parts, opened, strict=True)]
        keyed = zip((spec.key for spec in self.specs), ledgers, strict=False)
        return {key: ledger for key, ledger in keyed if ledger is not None}

    @property
    def inputs(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """What the model is given: shape and type of each part, without the batch."""
        return {n: p for n, p in self.example_spec.parts.items() if n not in TARGETS}

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, shape in self.shapes.items() if name not in TARGETS}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all parts; of several views also that of an 'image' of the first group."""
        shapes = {name: shape for name, (shape, _) in self.example_spec.parts.items()}
        first = next(iter(self.transform.groups), None)
        return shapes if first is None else {**shapes, 'image': shapes[first][1:]}


DEVICE_OPERATIONS = transforms.DeviceOperations(
    augment.OPERATIONS | augment_colour.OPERATIONS,
    augment.RANDOM.union(augment_colour.OPERATIONS),
)


def _spec(
    section: Config,
    key: str,
    config: Config,
    host: str,
    labelled: bool = True,
    known: Known | None = None,
    least_classes: int = 0,
    ledger: shard_ledger.Ledger | None = None,
) -> Any:
    """The section as plain values.

    Args:
      labelled: whether every example must have a label.
      known: classes that those of the section must meet.
      least_classes: where nothing is known, the number of classes that labels may be of.
    """
    is_whole = section.label_map is None and section.classes is None
    least_classes = known.least_classes if known else least_classes
    # A key that this source does not read stays unread, so that `Config.audit` refuses it.
    settings = tuple((name, section[name]) for name in SOURCES.keys(section.name))
    return dataset.Spec(
        key=key,
        name=section.name,
        split=section.split,
        transform=host,
        image_size=config.image_size,
        seed=config.seed,
        settings=settings,
        labelled=labelled,
        least_classes=least_classes if is_whole else 0,
        known=known,
        num_classes=section.num_classes,
        classes=section.classes,
        label_map=section.label_map,
        cache=section.cache,
        cache_side=section.cache_side if section.cache == 'resized' else 0,
        skip_bad=section.on_error == 'skip',
        ledger=ledger,
    )


@functools.cache
def _say(line: str) -> None:
    """Print what was done to classes, once."""
    if jax.process_index() == 0:
        print(f'classes {line}', file=sys.stderr, flush=True)


def _check_length(section: Config, key: str, source: sources.Source) -> None:
    examples = section.num_examples
    if examples and examples != source.length:
        raise UserError(
            f'config: {key}.num_examples={examples}, but {source.name} {section.split} has '
            f'{source.length}: the dataset is another or not complete'
        )


def _check_fit(found: Data, key: str, labelled: bool = True) -> None:
    """Refuses labels that the loss cannot take, and a part for the devices that fails.

    Args:
      labelled: whether labels are needed.
    """
    classes = found.source.num_classes
    _check_levels(found, key)
    if not labelled:
        _check_device(found, key)
        return
    if 'label' not in found.example_spec.parts:
        has = ', '.join(sorted(found.example_spec.parts))
        raise UserError(f'config: {key} gives {has} but no label')
    _check_device(found, key)
    shape, dtype = found.example_spec.parts['label']
    if shape == (classes,) or (shape == () and np.issubdtype(dtype, np.integer)):
        return
    raise UserError(
        f'config: {key}.transform gives labels of shape {shape} for {classes} classes: write '
        f'onehot({classes}) or multihot({classes})'
    )


# No image is larger once it is normalised; none of 16 bits is so dark that was scaled to them.
_MOST_NORMALISED, _DARKEST = 32, 1 << 14


def _check_levels(found: Data, key: str) -> None:
    """UserError for pixels of which it must be said what is white, judged by the first example."""
    _, dtype = found.example_spec.parts.get('image', ((), np.dtype(np.uint8)))
    peak, device = found.example_spec.peak, [operation for _, operation in found.device]
    operations = [*found.transform.operations, *device]
    if any(operation.states_levels for operation in device) or not peak:
        return
    is_dark = dtype == np.uint16 and peak < _DARKEST
    is_raw = dtype.kind == 'f' and peak > _MOST_NORMALISED
    if is_dark or (is_raw and all(operation.normalisation is None for operation in operations)):
        dark = ', or 65535 if it is so dark' if is_dark else ''
        raise UserError(
            f'config: {key}.transform gives images of {dtype} up to {peak:g}, and nothing says '
            f'what is white: add value_range(-1, 1, in_low=0, in_high=WHITE){dark}'
        )


def _check_device(found: Data, key: str) -> None:
    """UserError where the devices' part cannot be applied to what the host's part gives."""
    if not found.device:
        return
    placed = sorted(PLACED & found.example_spec.parts.keys())
    moving = [name for name, operation in found.device if operation.moves]
    if placed and moving:
        raise UserError(
            f'config: {key}.transform: on the devices {moving[0]} moves pixels and cannot take '
            f'{placed[0]} along: put it before to_device'
        )
    one = {
        name: jax.ShapeDtypeStruct((1, *shape), jax.dtypes.canonicalize_dtype(dtype))
        for name, (shape, dtype) in found.example_spec.parts.items()
    }
    try:
        jax.eval_shape(device_operations(found), one, jax.random.key(0))
    except ValueError as error:
        raise UserError(f'config: {key}.transform: {error}') from error


def train_data(
    config: Config,
    absent: bool = False,
    known: Known | None = None,
    to_train: bool = True,
    ledgers: Mapping[str, shard_ledger.Ledger] | None = None,
) -> Data:
    """The training data: `data`, or the parts of `mixture`.

    Args:
      absent: take the number of examples and classes from the config where it has both,
        without opening anything.
      known: classes of the parameters that are there already, of which labels become numbers.
      to_train: whether examples are trained on; if not, what is known stands for their classes.
      ledgers: shards that a run had which is gone on with, by section.

    Raises:
      UserError: something is missing or does not fit.
    """
    sections = {
        f'mixture.{name}': completed_section(config, 'mixture', name) for name in config.mixture
    }
    counts, whole, task = None, config.data, build_task(config.task)
    if sections:
        weights = {key: section.weight for key, section in sections.items()}
        for key, weight in weights.items():
            if not weight:
                raise UserError(f'config: {key}.weight must be above 0; leave the part out instead')
        counts = order.shares(tuple(weights.values()))
    else:
        sections = {'data': whole}
    for key, section in sections.items():
        if section.name is None:
            raise UserError(f'config: {key}.name must be set, or data.name for all parts')
    transform = transforms.parse(
        whole.transform, size=config.image_size, key='data', device=DEVICE_OPERATIONS
    )
    known = known if task.needs_labels or task.provides & {'boxes', 'pixels'} else None
    specs = tuple(
        _spec(
            section,
            key,
            config,
            transform.host_text,
            task.needs_labels,
            known if to_train else None,
            ledger=(ledgers or {}).get(key),
        )
        for key, section in sections.items()
    )
    declared = [(s.num_examples, s.num_classes) for s in sections.values()]
    if absent and all(examples and classes for examples, classes in declared):
        name = ' + '.join(section.tfds_name or section.name for section in sections.values())
        source = sources.declared(
            name,
            whole.split if not config.mixture else 'mixture',
            sum(examples for examples, _ in declared),
            max(classes for _, classes in declared),
            config.image_size,
            task.reads,
        )
        lengths: tuple[int, ...] = tuple(examples for examples, _ in declared)
        shards: tuple[windows.Shards | int, ...] = ()
        parts: tuple[sources.Source, ...] = ()
        host = transforms.parse(transform.host_text, size=config.image_size, key='data')
    else:
        source, host, parts = dataset.open_mixture(specs, say=_say)
        lengths = tuple(part.length for part in parts)
        shards = _shards(whole, parts, config.seed, tuple(sections), ledgers)
        _check_lost(parts, specs, whole.on_error == 'skip')
        if known and not to_train and has_other_words(source, known):
            names = zip(source.class_names or (), known.names or (), strict=True)
            pairs = shown([f'{ours} is {theirs}' for ours, theirs in names], 3)
            _say(
                f'data: {source.name} and {known.holder} have no name of a class in common: they '
                f'meet by number: {pairs}'
            )
        elif known and not to_train:
            source = replace(source, num_classes=known.num_classes, class_names=known.names)
        if len(specs) == 1:
            _check_length(*next((s, k) for k, s in sections.items()), source)
    _check_views(transform, task)
    taken = tuple(transform.groups) or parts_read(config)
    skip = whole.on_error == 'skip'
    example_spec = transforms.check(host, source, config.image_size, taken, skip)
    for part in task.reads:
        transforms.need_part(host, example_spec, part)
    if config.batch_size % whole.repeats:
        raise UserError(
            f'config: batch_size={config.batch_size} must be a multiple of '
            f'data.repeats={whole.repeats}'
        )
    kept = pipeline.Order(
        batch_size=config.batch_size,
        seed=config.seed,
        shuffle=whole.shuffle is not False,
        repeats=whole.repeats,
        lengths=lengths,
        counts=counts,
        shards=shards,
    )
    found = Data(
        source,
        host,
        example_spec,
        _training_device(transform),
        specs,
        skip,
        kept,
        whole.workers,
        taken,
        _fixed_device(transform),
        parts,
    )
    _check_fit(found, 'data', labelled=task.needs_labels)
    return found


def _check_lost(parts: Sequence[sources.Source], specs: Sequence[dataset.Spec], skip: bool) -> None:
    """UserError for shards that have vanished since the run began, unless they may be skipped."""
    for part, spec in zip(parts, specs, strict=True):
        lost = [] if part.shards is None else [s.name for s in part.shards() if s.is_lost]
        if lost and not skip:
            raise UserError(
                f'{spec.key}: {len(lost):,} of its shards vanished since the run began '
                f"({shard_ledger.listed(lost)}): put them back, or set data.on_error='skip' to go "
                'on without them'
            )


def _shards(
    whole: Config,
    parts: Sequence[sources.Source],
    seed: int,
    keys: Sequence[str] = (),
    ledgers: Mapping[str, shard_ledger.Ledger] | None = None,
) -> tuple[windows.Shards | int, ...]:
    """The shards of each part for an order with locality; none where the order has none.

    Where nothing is said, a run that is gone on with keeps the order that it had.

    Args:
      keys: sections of the parts.
    """
    shuffle = whole.shuffle
    lengths = [part.shard_lengths for part in parts]
    large = any(map(windows.is_large, lengths))
    if ledgers is not None:
        large = any(ledger.window for ledger in ledgers.values())
    if shuffle == 'auto' and large:
        shuffle = 'windows'
    if shuffle != 'windows':
        return ()
    if all(each is None for each in lengths):
        raise UserError(
            f"config: data.shuffle='windows' reads shard by shard, but {parts[0].name} has no "
            'shards: set it to true'
        )
    window, kept = whole.window, [(ledgers or {}).get(key) for key in keys] or [None] * len(parts)
    opened = tuple(
        part.length if each is None else windows.opened(each, window or (before and before.window))
        for part, each, before in zip(parts, lengths, kept, strict=True)
    )
    for part, shards in zip(parts, opened, strict=True):
        _warn_of_sorted(part, shards, seed)
    return opened


# Labels of more examples are not read only to see whether they are sorted.
_MOST_LABELS = 1 << 24


def _warn_of_sorted(part: sources.Source, shards: windows.Shards | int, seed: int) -> None:
    """Say where few classes come at a time, if the labels are at hand."""
    # TFDS has labels in its examples alone, all of which would be read.
    is_known = part.labels is not None and not part.name.startswith('tfds:')
    is_known = is_known and part.length <= _MOST_LABELS
    if isinstance(shards, int) or not is_known or jax.process_index():
        return
    assert part.labels is not None
    if (text := windows.warning(shards, part.labels().__getitem__, seed)) is not None:
        say_once(f'WARNING {part.name}: its {text}')


def _check_views(transform: transforms.Transform, task: Task) -> None:
    """Raise UserError where a transform gives other groups of views than the task reads.

    The first group must be there; a task that needs another says so itself.
    """
    groups = tuple(transform.groups)
    if not task.views and groups:
        raise UserError(
            f'config: data.transform gives views, {", ".join(groups)}, but '
            f'task.name={task.name!r} sees each example once: leave out all from the first ; on'
        )
    if groups[:1] != task.views[:1] or not set(groups) <= set(task.views):
        example = ' ; '.join(f'{name}: 2 * rrc(size) | flip_lr' for name in task.views[:1])
        more = f', and may have {", ".join(task.views[1:])}' if task.views[1:] else ''
        raise UserError(
            f'config: task.name={task.name!r} learns from views named {task.views[0]}, which come '
            f'first{more}; data.transform gives {", ".join(groups) or "none"}: write it as in '
            f"'decode ; {example}'"
        )


def single_view(data: Data) -> Data:
    """The same examples, seen once each as their first view; for looking at, not for training."""
    if not data.transform.views:
        return data
    groups = data.transform.groups
    parts = {n: p for n, p in data.example_spec.parts.items() if n not in groups}
    parts['image'] = data.shapes['image'], data.example_spec.parts[next(iter(groups))][1]
    return data._replace(
        transform=data.transform.seen_once(),
        example_spec=data.example_spec._replace(parts=parts),
        device=data.evaluation_device,
        reads=('image',),
    )


def completed_section(config: Config, kind: str, name: str) -> Config:
    """An evaluation's section, or a mixture's, with what it leaves open taken from `data`.

    What says where a dataset is goes together: a section that names another source inherits
    none of it.
    """
    own, whole = config[kind][name], config.data
    defaults: dict[str, Any] = {'cache': whole.cache, 'cache_side': whole.peek('cache_side')}
    defaults['on_error'] = whole.on_error
    if kind == 'evals':
        of_data = requirements(own.peek('type') or DEFAULT).of_data and _is_of_data(own, whole)
        split = (of_data and whole.peek('split')) or 'test'
        defaults |= {'split': split, 'transform': 'resize(size)', 'type': DEFAULT}
    else:
        defaults['split'] = whole.split
    # Without data of its own, what `data` says is read by the parts of a mixture alone.
    take = whole.__getitem__ if kind == 'mixture' else whole.peek
    if own.name is None or own.name == whole.peek('name'):
        where = {key for source in SOURCES.entries() for key in SOURCES.keys(source)}
        what = ('name', 'num_classes', 'label_map', 'classes')
        defaults.update({part: take(part) for part in (*where, *what)})
        if own.peek('path') not in (None, whole.peek('path')):
            defaults.pop('index')  # It is of the other shards.
    return own.completed(defaults)


def _is_of_data(section: Config, whole: Config) -> bool:
    """Whether an evaluation's section is of the dataset of `data`."""
    pairs = [(section.peek(key), whole.peek(key)) for key in ('name', 'path', 'tfds_name')]
    return all(ours in (None, theirs) for ours, theirs in pairs)


def evaluation_transform(
    config: Config,
    where: str,
    text: str | None = None,
    skip: Collection[str] = transforms.EXTERNAL,
    default: str | None = None,
) -> transforms.Transform | None:
    """Parse how the first evaluation of the head prepares pictures, or else the first one.

    Args:
      where: whose config it is, for messages.
      text: operations instead of those of an evaluation.
      default: operations where the config has no evaluation; a line says that they are taken.
      skip: names of operations to leave out; elsewhere there may be no tokenizer, which pictures
        do not ask for.

    Returns:
      The transform, with what devices do to pictures; None if no evaluation says it.

    Raises:
      UserError: it cannot be read, or is random.
    """
    sections = [
        (f'evals.{name}', completed_section(config, 'evals', name)) for name in config.evals
    ]
    of_head = [pair for pair in sections if requirements(pair[1].type).output == 'logits']
    key = '--transform'
    if text is None and sections:
        key, section = (of_head or sections)[0]
        key, text = f'{where}: {key}', section.transform
    elif text is None:
        if default is None:
            return None
        key, text = f'{where}: pictures', default
        print(f'note    {where}: has no evaluation: pictures are prepared by {default}; '
              '--transform TEXT says otherwise', file=sys.stderr)  # fmt: skip
    parse = functools.partial(
        transforms.parse, size=config.image_size, device=DEVICE_OPERATIONS, skip=skip
    )
    parsed = parse(text, key=key)
    transforms.require_deterministic(parsed)
    if parsed.device or key == '--transform':
        return parsed
    return replace(parsed, device=_fixed_device(parse(config.data.transform, key='data')))


def _fixed_device(trained: transforms.Transform) -> tuple[tuple[str, Any], ...]:
    """What devices do in training that is not random, of several views to the first.

    An evaluation that says nothing does it too, for the model to see numbers of the same range.
    """
    device = trained.seen_once().device
    return tuple(pair for pair in device if pair[0] not in DEVICE_OPERATIONS.random)


def _training_device(transform: transforms.Transform) -> tuple[tuple[str, Any], ...]:
    """What devices do to a batch, to each view as its own text says."""
    if not any(view.transform.device for view in transform.views):
        return transform.device
    views = [(v.group, v.count, [o for _, o in v.transform.device]) for v in transform.views]
    numbers = [view.statement for view in transform.views]
    return (('views', augment.on_views(views, numbers)),)


# What an evaluation does with an output that a task may not provide.
_USES = {
    'logits': 'needs logits over classes',
    'features': 'needs features',
    'pairs': 'compares two streams',
    'boxes': 'needs boxes of objects',
    'pixels': 'needs classes of pixels',
}


def _check_provided(config: Config, key: str, kind: str) -> None:
    """Raise `UserError` if a type of evaluation needs an output that the task does not provide."""
    task = build_task(config.task)
    output, outputs = requirements(kind).output, task.provides
    if output not in outputs:
        others = [other for other in EVALUATORS if requirements(other).output in outputs]
        providers = [name for name, make in TASKS.items() if output in make().provides]
        free = _free_of_labels(config)
        raise UserError(
            f'config: {key}.type={kind!r} {_USES[output]}, which task.name={task.name!r} does not '
            f'provide: set it to one of {", ".join(map(repr, others))}, or '
            + ' or '.join(f'task.name={name!r}' for name in providers)
            + (
                ''
                if task.needs_labels or not free
                else f'; {" and ".join(map(repr, free))} needs no labels'
            )
        )


def eval_data(config: Config, name: str, train: Data, reference: Data | None = None) -> Data:
    """Open the split of an evaluation, checked against the training data.

    Args:
      reference: what `reference_data` gives.

    Raises:
      UserError: something is missing or does not fit.
    """
    return _held_out(config, name, completed_section(config, 'evals', name), train, reference)


def reference_data(config: Config, name: str, train: Data) -> Data | None:
    """Open the split that an evaluation learns from or searches, with the evaluation's transform.

    Raises:
      UserError: something is missing or does not fit.
    """
    section = completed_section(config, 'evals', name)
    which = requirements(section.type).reference
    if which is None:
        return None
    key, whole = f'evals.{name}', config.data
    same = section.name == whole.peek('name') and section.path == whole.peek('path')
    split = section[which] or (whole.peek('split') if same else 'train')
    try:
        return _held_out(config, name, section.completed({}, split=split), train)
    except UserError as error:
        raise UserError(str(error).replace(f'{key}.split', f'{key}.{which}')) from error


def _held_out(
    config: Config, name: str, section: Config, train: Data, reference: Data | None = None
) -> Data:
    """Open a split of an evaluation."""
    key, needs = f'evals.{name}', requirements(section.type)
    if section.name is None:
        raise UserError(f'config: {key}.name must be set')
    _check_provided(config, key, section.type)
    of_head = needs.output in ('logits', 'boxes', 'pixels')
    taken = parts_read(config)
    if 'pairs' in build_task(config.task).provides and not needs.all_streams:
        taken = tuple(s.reads for s in build_streams(config) if s.tokenizer != 'words')
    # Features may be of any classes, if the training data has others or none.
    own_world = not of_head and (
        section.name != config.data.peek('name') or not train.specs[0].labelled
    )
    classes = 0 if own_world else train.source.num_classes
    transform = transforms.parse(
        section.transform, size=config.image_size, key=key, device=DEVICE_OPERATIONS
    )
    transforms.require_deterministic(transform)
    if needs.output == 'boxes':
        transforms.need_whole(transform)
    labelled = needs.labels != 'none'
    known = known_of(train.source, 'the model') if of_head else None
    if reference is not None:
        known = known_of(reference.source, f'{key}.{needs.reference}')
        # What is searched for need not be there.
        known = replace(known, may_grow=needs.reference == 'gallery_split')
    spec = _spec(section, key, config, transform.host_text, labelled, known, classes)
    lines: list[str] = []
    try:
        source, host = dataset.open_spec(spec, say=lines.append)
    except UserError as error:
        raise _without_labels(spec, config, key, section.type, error) from error
    for line in lines:
        _say(line)
    # Evaluations share the features of equal splits.
    spec = replace(spec, known=known if lines else None, least_classes=0)
    _check_length(section, key, source)
    skip = section.on_error == 'skip'
    # Windows slide over pictures of any size.
    size = None if needs.output == 'pixels' else config.image_size
    example_spec = transforms.check(host, source, size, taken, skip)
    _check_same_parts(example_spec, train, taken, key, size is None)
    _check_same_range(example_spec, transform, train, key)
    device = transform.device or train.evaluation_device
    found = Data(source, host, example_spec, device, (spec,), skip, reads=taken)
    _check_fit(found, key, labelled=labelled)
    if needs.labels == 'numbers' and example_spec.parts['label'][0]:
        raise UserError(
            f'config: {key}.transform gives vectors as labels, {section.type} takes numbers: '
            'leave out onehot or multihot'
        )
    return found


def _without_labels(
    spec: dataset.Spec, config: Config, key: str, kind: str, error: UserError
) -> UserError:
    """Return the error of an evaluation whose dataset opens if no labels are needed, or `error`."""
    if not spec.labelled or build_task(config.task).needs_labels:
        return error
    plain = replace(spec, labelled=False, num_classes=None, classes=None, label_map=None)
    try:
        dataset.open_labels(replace(plain, known=None, cache='none'))
    except UserError:
        return error
    free = ' or '.join(map(repr, _free_of_labels(config)))
    said = str(error).removeprefix('config: ')
    return UserError(
        f'config: {key}.type={kind!r} needs labels, which are not there ({said}): set {key}.name '
        f'and {key}.path to a labelled dataset, or {key}.type={free}, which needs none'
    )


def _free_of_labels(config: Config) -> list[str]:
    """List the types of evaluations that need no labels, of those that the task allows."""
    outputs = build_task(config.task).provides
    every = {name: requirements(name) for name in EVALUATORS}
    return [n for n, needs in every.items() if needs.labels == 'none' and needs.output in outputs]


def _check_same_parts(
    example_spec: transforms.ExampleSpec,
    train: Data,
    taken: tuple[str, ...],
    key: str,
    any_size: bool = False,
) -> None:
    """Raises UserError where an evaluation gives the model inputs of other shapes than training."""
    for part in taken:
        found, wanted = example_spec.parts[part][0], train.shapes[part]
        if part == 'image' and found[2] != wanted[2]:
            raise UserError(
                f'config: {key}.transform gives images of {found[2]} channel(s), the '
                f'model takes {wanted[2]}: add rgb or grayscale to it'
            )
        if found != wanted and not (any_size and part == 'image'):
            shown = ' and '.join('x'.join(map(str, shape)) for shape in (found, wanted))
            raise UserError(
                f'config: {key}.transform gives {part} of another shape than data.transform '
                f'({shown})'
            )


def _check_same_range(
    example_spec: transforms.ExampleSpec,
    transform: transforms.Transform,
    train: Data,
    key: str,
) -> None:
    """UserError for floats where training has bytes, or the other way, and nothing scales them."""
    trained = next(iter(train.transform.groups), 'image')
    ours = example_spec.parts['image'][1] if 'image' in example_spec.parts else None
    theirs = train.example_spec.parts[trained][1] if trained in train.example_spec.parts else None
    operations = [*transform.operations, *(operation for _, operation in transform.device)]
    if not ours or not theirs or (ours.kind == 'f') == (theirs.kind == 'f'):
        return
    if all(operation.normalisation is None for operation in operations):
        raise UserError(
            f'config: {key}.transform gives images of {ours}, data.transform of {theirs}: say what '
            'is black and white in them, as in value_range(-1, 1, in_low=0, in_high=1)'
        )


def sampled(found: Data, count: int) -> Data:
    """Keep at most `count` examples of a split, spread evenly."""
    length = found.source.length
    if count >= length:
        return found
    return found._replace(source=select(found.source, count, lambda index: index * length // count))


def views_data(
    config: Config, found: Data, key: str, pictures: int, views: int, text: str | None
) -> Data | None:
    """Random views of some examples of a split, those of one example in turn.

    Labels become the numbers of rows, whatever the examples have.

    Args:
      found: the split.
      key: section of the evaluation.
      pictures: most examples, spread evenly.
      views: of each.
      text: the transform; None for that of training.

    Returns:
      The views; None if there are fewer than two examples, or the transform is that of training,
      and is not random or of other data.

    Raises:
      UserError: the transform is not random, or does not make what the model takes.
    """
    pictures = min(pictures, found.source.length)
    transform = _of_a_view(config, key, text)
    if text is not None and not transform.is_random:
        raise UserError(f'config: {key}.transform: is not random: LiDAR compares views')
    is_other = text is None and found.specs[0].name != config.data.peek('name')
    if pictures < 2 or is_other or not transform.is_random:
        return None
    # Few examples, loaded anew for each view: there is nothing to keep.
    cache = 'resized' if found.specs[0].cache == 'resized' else 'none'
    spec = replace(found.specs[0], transform=transform.host_text, cache=cache)
    source, host = dataset.open_spec(spec)
    example_spec = transforms.check(host, source, config.image_size, found.reads, found.skip_bad)
    _check_same_parts(example_spec, found, found.reads, key)
    _check_same_range(example_spec, transform, found, key)
    device = transform.device
    if all(operation.normalisation is None for _, operation in device):
        device += found.device
    length = source.length
    chosen = select(source, pictures * views, lambda row: row // views * length // pictures)

    def load(rows: np.ndarray) -> dict[str, Any]:
        return {**chosen.load(rows), 'label': np.asarray(rows, np.int32)}

    return found._replace(
        source=replace(chosen, load=load, labels=None),
        transform=host,
        example_spec=example_spec,
        device=device,
    )


# Operations that turn labels into vectors of classes.
_OF_LABELS = frozenset({'onehot', 'multihot'})


def _of_a_view(config: Config, key: str, text: str | None) -> transforms.Transform:
    """Parse the transform of a view; without a text that of training, or of its first view."""
    parsed = transforms.parse(
        config.data.transform if text is None else text,
        size=config.image_size,
        key='data' if text is None else key,
        device=DEVICE_OPERATIONS,
        skip=_OF_LABELS,
    )
    return parsed.seen_once()


def host_batches(
    found: Data, start_step: int, rows: Any, meter: pipeline.Meter | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """The training batches from `start_step` on as NumPy arrays, of these rows."""
    assert found.order is not None
    return pipeline.train_batches(
        found.source,
        found.transform,
        found.order,
        start_step=start_step,
        rows=rows,
        skip_bad=found.skip_bad,
        workers=found.workers,
        opener=functools.partial(dataset.open_examples, found.specs, found.workers),
        meter=meter,
    )


def asked_data(config: Config) -> sources.Source:
    """Open what `data` says, or the parts of `mixture` one after the other, as it is stored.

    No example needs a label, and nothing is cached: each is read once.

    Raises:
      UserError: something is missing or does not fit.
    """
    named = {
        f'mixture.{name}': completed_section(config, 'mixture', name) for name in config.mixture
    }
    opened = []
    for key, section in (named or {'data': config.data}).items():
        if section.name is None:
            raise UserError(f'config: {key}.name must be set')
        spec = _spec(section, key, config, '', labelled=False)
        source = dataset.open_labels(replace(spec, cache='none'))
        opened.append(replace(source, in_memory=dataset.is_small(source)))
    name = ' + '.join(source.name for source in opened)
    return concatenate(opened, name, opened[0].split if len(opened) == 1 else 'mixture')


def fitting_data(
    source: sources.Source,
    transform: transforms.Transform,
    size: tuple[int, int] | None,
    reads: tuple[str, ...],
    device: tuple[tuple[str, Any], ...] = (),
) -> Data:
    """Check a source without labels, by its first example, and what prepares it for a model.

    Args:
      size: (height, width) of images; None for any.
      reads: the parts of a batch that the model takes.
      device: the devices' part, where the transform has none.

    Raises:
      UserError: the example does not become what the model takes.
    """
    example_spec = transforms.check(transform, source, size, reads)
    host = replace(transform, device=())
    found = Data(source, host, example_spec, transform.device or device, (), True, reads=reads)
    _check_fit(found, transform.key.removesuffix('.transform'), labelled=False)
    return found


def text_data(config: Config, texts: list[str], key: str) -> Data:
    """Sentences as the words of a training example, made by the same operations.

    Raises:
      UserError: training makes no words of text.
    """
    size = config.image_size
    whole = transforms.parse(config.data.transform, size=size, key='data', device=DEVICE_OPERATIONS)
    pairs = zip(whole.names, whole.operations, strict=True)
    chosen = [pair for pair in pairs if pair[0] in text.OPERATIONS]
    if not chosen:
        raise UserError(
            f'config: {key} needs sentences as numbers, but data.transform makes none of text: add '
            "byte_tokens(LENGTH) or tokenize('FILE', LENGTH) to it"
        )
    names, operations = zip(*chosen, strict=True)
    made = replace(
        whole, names=names, operations=operations, device=(), random_operations=(), views=()
    )

    def load(indices: np.ndarray) -> dict[str, Any]:
        return {'text': [texts[i] for i in indices], 'label': indices.astype(np.int32)}

    source = sources.Source(key, '', len(texts), len(texts), None, load, in_memory=True)
    reads = tuple(part for part in parts_read(config) if part not in tokenizers.PICTURES)
    example_spec = transforms.check(made, source, size, reads)
    spec = dataset.Spec(
        key='', name='prompts', split='', transform=whole.host_text, image_size=size
    )
    return Data(
        source,
        made,
        example_spec,
        (),
        (replace(spec, classes=tuple(texts)),),
        skip_bad=False,
        reads=reads,
    )


def device_operations(found: Data) -> Any:
    """What the devices do to a batch before anything else, (batch, rng) -> batch; or None."""
    return augment.compose([function for _, function in found.device]) if found.device else None


def eval_device_operations(found: Data) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What the devices do to a batch of an evaluation before the model sees it."""
    apply, key = (
        device_operations(found),
        jax.random.key(0),
    )  # Nothing that an evaluation does draws.
    return (lambda batch: apply(batch, key)) if apply else lambda batch: batch
