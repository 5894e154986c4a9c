"""From the sections of a config to the objects that they describe, one function each."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from big_vit import augment, mixing, objectives, sharding, state, steps, trees
from big_vit import config as config_lib
from big_vit.config import Config
from big_vit.data import opening, order, pipeline, sources, text, transforms
from big_vit.errors import UserError
from big_vit.evaluators import classification
from big_vit.models import costs, positions, tokenizers, variants
from big_vit.models.tokenizers import Stream
from big_vit.models.vit import ViT
from big_vit.optim import factory, layers, schedules


class Data(NamedTuple):
    """A source with what makes its examples fit the model.

    `transform` is done on the host, and gives what `looks` says. `device` is the rest, as
    (name, function of (batch, rng)). `specs` can be opened by other processes, of which training
    has `workers`. `order` says which examples come when; an evaluation has none.
    """

    source: sources.Source
    transform: transforms.Transform
    looks: transforms.Looks
    device: tuple[tuple[str, Any], ...]
    specs: tuple[opening.Spec, ...]
    skip_bad: bool
    order: pipeline.Order | None = None
    workers: int = 0
    reads: tuple[str, ...] = ('image',)

    @property
    def inputs(self) -> state.Inputs:
        """What the model is given: shape and type of each part, without the batch."""
        return {n: p for n, p in self.looks.parts.items() if n not in ('label', 'mask')}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (shape, _) in self.looks.parts.items()}


class Experiment(NamedTuple):
    """All that training needs, before anything is computed.

    `references` are the splits that evaluations learn from or search, by the evaluation's name.
    By parameter path: decay and factor on the rate, and `groups`, the optimizer's name;
    by that name `settings`, what it is made with.
    """

    mesh: Mesh
    data: Data
    evals: dict[str, Data]
    references: dict[str, Data]
    model: ViT
    optimizer: optax.GradientTransformationExtraArgs
    schedule: schedules.Schedule
    like: state.State
    total_steps: int
    flops_per_example: int
    decay_factors: dict[str, float]
    lr_factors: dict[str, layers.Factor]
    groups: dict[str, str]
    settings: dict[str, dict[str, Any]]
    batch_size: int
    due: 'Duties'


class Duties(NamedTuple):
    """Every how many steps what is due; 0 is never. `keep_last` is a number of checkpoints."""

    log: int
    save: int
    keep: int
    keep_last: int
    evals: dict[str, int]


def is_due(every: int, step: int, total: int) -> bool:
    """At multiples of `every` and at the end."""
    return bool(every) and (step % every == 0 or step == total)


_DEVICE_OPERATIONS = transforms.DeviceOperations(augment.OPERATIONS, augment.RANDOM)


def _spec(section: Config, key: str, config: Config, classes: int | None, host: str) -> Any:
    """The section as plain values.

    Args:
      classes: those of the model, where it is known already.
    """
    own = section.num_classes
    if own is None and section.label_map is None and section.classes is None:
        own = classes
    # A key that this source does not read stays unread, so that `Config.audit` refuses it.
    used = {name: section[name] for name in opening.KEYS[section.name]}
    return opening.Spec(
        key=key,
        name=section.name,
        split=section.split,
        transform=host,
        image_size=config.image_size,
        seed=config.seed,
        num_classes=own,
        classes=section.classes,
        label_map=section.label_map,
        cache=section.cache,
        cache_side=section.cache_side if section.cache == 'resized' else 0,
        **used,
    )


def reads(config: Config) -> tuple[str, ...]:
    """The parts of a batch that the model takes."""
    return tuple(dict.fromkeys(stream.reads for stream in inputs(config)))


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
    if not labelled:
        _check_device(found, key)
        return
    if 'label' not in found.looks.parts:
        has = ', '.join(sorted(found.looks.parts))
        raise UserError(f'config: {key} gives {has} but no label')
    _check_device(found, key)
    shape, dtype = found.looks.parts['label']
    if shape == (classes,) or (shape == () and np.issubdtype(dtype, np.integer)):
        return
    raise UserError(
        f'config: {key}.transform gives labels of shape {shape} for {classes} classes: write '
        f'onehot({classes}) or multihot({classes})'
    )


def _check_device(found: Data, key: str) -> None:
    """UserError where the devices' part cannot be applied to what the host's part gives."""
    if not found.device:
        return
    one = {
        name: jax.ShapeDtypeStruct((1, *shape), jax.dtypes.canonicalize_dtype(dtype))
        for name, (shape, dtype) in found.looks.parts.items()
    }
    try:
        jax.eval_shape(prepare(found), one, jax.random.key(0))
    except ValueError as error:
        raise UserError(f'config: {key}.transform: {error}') from error


def train_data(config: Config, absent: bool = False) -> Data:
    """The training data: `data`, or the parts of `mixture`.

    Args:
      absent: take the number of examples and classes from the config where it has both,
        without opening anything.

    Raises:
      UserError: something is missing or does not fit.
    """
    sections = {f'mixture.{name}': complete(config, 'mixture', name) for name in config.mixture}
    counts, whole = None, config.data
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
        whole.transform, size=config.image_size, key='data', device=_DEVICE_OPERATIONS
    )
    specs = tuple(
        _spec(section, key, config, None, transform.host_text) for key, section in sections.items()
    )
    known = [(s.num_examples, s.num_classes) for s in sections.values()]
    if absent and all(examples and classes for examples, classes in known):
        name = ' + '.join(section.tfds_name or section.name for section in sections.values())
        source = sources.declared(
            name,
            whole.split if not config.mixture else 'mixture',
            sum(examples for examples, _ in known),
            max(classes for _, classes in known),
            config.image_size,
        )
        lengths: tuple[int, ...] = tuple(examples for examples, _ in known)
        host = transforms.parse(transform.host_text, size=config.image_size, key='data')
    else:
        source, host, lengths = opening.open_mixture(specs)
        if len(specs) == 1:
            _check_length(*next((s, k) for k, s in sections.items()), source)
    taken = reads(config)
    looks = transforms.check(host, source, config.image_size, taken)
    if config.batch_size % whole.repeats:
        raise UserError(
            f'config: batch_size={config.batch_size} must be a multiple of '
            f'data.repeats={whole.repeats}'
        )
    kept = pipeline.Order(
        batch_size=config.batch_size,
        seed=config.seed,
        shuffle=whole.shuffle,
        repeats=whole.repeats,
        lengths=lengths,
        counts=counts,
    )
    skip = whole.on_error == 'skip'
    found = Data(source, host, looks, transform.device, specs, skip, kept, whole.workers, taken)
    _check_fit(found, 'data', labelled=not is_apart(config))
    return found


def complete(config: Config, kind: str, name: str) -> Config:
    """An evaluation's section, or a mixture's, with what it leaves open taken from `data`.

    What says where a dataset is goes together: a section that names another source inherits
    none of it.
    """
    own, whole = config[kind][name], config.data
    defaults: dict[str, Any] = {'cache': whole.cache, 'cache_side': whole.peek('cache_side')}
    defaults['on_error'] = whole.on_error
    if kind == 'evals':
        defaults |= {'split': 'test', 'transform': 'resize(size)', 'type': 'classification'}
    else:
        defaults['split'] = whole.split
    # Without data of its own, what `data` says is read by the parts of a mixture alone.
    take = whole.__getitem__ if kind == 'mixture' else whole.peek
    if own.name is None or own.name == whole.peek('name'):
        where = ('name', 'path', 'tfds_name', 'image_column', 'label_column', 'text_column')
        what = ('num_classes', 'label_map', 'classes')
        defaults.update({part: take(part) for part in (*where, *what)})
    return own.completed(defaults)


# The evaluations that are of the model's own classes; those of features have their own.
OF_THE_HEAD = ('classification', 'robustness')
# Those of streams apart, which learn from no split and search in no other.
OF_PAIRS = ('zero_shot', 'matching')


def eval_data(config: Config, name: str, train: Data) -> Data:
    """The data of an evaluation, checked against that of training.

    Raises:
      UserError: something is missing or does not fit.
    """
    return _held_out(config, name, complete(config, 'evals', name), train)


def reference_data(config: Config, name: str, train: Data) -> Data | None:
    """What an evaluation learns from, or searches: another split of its dataset, seen alike.

    Raises:
      UserError: something is missing or does not fit.
    """
    section = complete(config, 'evals', name)
    if section.type in OF_THE_HEAD + OF_PAIRS:
        return None
    which = 'gallery_split' if section.type == 'retrieval' else 'train_split'
    key, whole = f'evals.{name}', config.data
    same = section.name == whole.peek('name') and section.path == whole.peek('path')
    split = section[which] or (whole.peek('split') if same else 'train')
    try:
        return _held_out(config, name, section.completed({}, split=split), train)
    except UserError as error:
        raise UserError(str(error).replace(f'{key}.split', f'{key}.{which}')) from error


def _held_out(config: Config, name: str, section: Config, train: Data) -> Data:
    """A split of an evaluation."""
    key, of_head = f'evals.{name}', section.type in OF_THE_HEAD
    if section.name is None:
        raise UserError(f'config: {key}.name must be set')
    apart = is_apart(config)
    if of_head and apart:
        raise UserError(
            f"config: {key}.type={section.type!r} is of a head, which model.fusion='apart' has "
            "not: set it to 'zero_shot', 'matching' or one of features, such as 'knn'"
        )
    if section.type in OF_PAIRS and not apart:
        raise UserError(
            f'config: {key}.type={section.type!r} compares two streams, which need '
            "model.fusion='apart'"
        )
    # What is seen of streams apart needs no words of its own; those of prompts are made.
    taken = train.reads
    if apart and section.type != 'matching':
        taken = tuple(s.reads for s in inputs(config) if s.tokenizer != 'words')
    own_world = not of_head and section.name != config.data.peek('name')
    classes = None if own_world else train.source.num_classes
    transform = transforms.parse(
        section.transform, size=config.image_size, key=key, device=_DEVICE_OPERATIONS
    )
    transforms.require_deterministic(transform)
    spec = _spec(section, key, config, classes, transform.host_text)
    source, host = opening.open_spec(spec)
    _check_length(section, key, source)
    looks = transforms.check(host, source, config.image_size, taken)
    _check_same_parts(looks, train, taken, key)
    if of_head and classes is not None and source.num_classes > classes:
        raise UserError(f'config: {key} has {source.num_classes} classes, the model {classes}')
    ours, theirs = train.source.class_names, source.class_names
    # A map says the number of each class itself, and may leave most out.
    if of_head and config.evals[name].label_map is None and ours and theirs and ours != theirs:
        strange = next((b for a, b in zip(ours, theirs, strict=False) if a != b), theirs[-1])
        raise UserError(
            f'config: {key} has other classes than the training data ({strange!r} is not class '
            f'{theirs.index(strange)} there): give both the same label_map or classes'
        )
    # What is not said about numbers is as in training, or the model sees another world.
    fixed = tuple(pair for pair in train.device if pair[0] not in augment.RANDOM)
    skip = section.on_error == 'skip'
    found = Data(source, host, looks, transform.device or fixed, (spec,), skip, reads=taken)
    _check_fit(found, key, labelled=section.type != 'matching')
    if not of_head and section.type != 'matching' and looks.parts['label'][0]:
        raise UserError(
            f'config: {key}.transform gives vectors as labels, {section.type} takes numbers: '
            'leave out onehot or multihot'
        )
    return found


def _check_same_parts(
    looks: transforms.Looks, train: Data, taken: tuple[str, ...], key: str
) -> None:
    """Raises UserError where an evaluation gives the model inputs of other shapes than training."""
    for part in taken:
        found, wanted = looks.parts[part][0], train.looks.parts[part][0]
        if part == 'image' and found[2] != wanted[2]:
            raise UserError(
                f'config: {key}.transform gives images of {found[2]} channel(s), the '
                f'model takes {wanted[2]}: add rgb or grayscale to it'
            )
        if found != wanted:
            shown = ' and '.join('x'.join(map(str, shape)) for shape in (found, wanted))
            raise UserError(
                f'config: {key}.transform gives {part} of another shape than data.transform '
                f'({shown})'
            )


def is_apart(config: Config) -> bool:
    """Whether two streams are compared, in place of classes learned."""
    return bool(list(config.streams)) and config.model.fusion == 'apart'


def inputs(config: Config) -> tuple[Stream, ...]:
    """The streams of the config, that which attends to the others first; or the model's one."""
    m, fields = config.model, variants.parse(config.model.variant)
    if not list(config.streams):
        return (_stream(m, 'model', fields),)
    names = sorted(config.streams)
    if m.fusion == 'cross':
        if m.queries not in names:
            raise UserError(
                f'config: model.queries must be one of {", ".join(names)}: the stream that attends '
                "to the others (model.fusion='cross')"
            )
        names.remove(m.queries)
        names = [m.queries, *names]
    if m.fusion == 'apart':  # Features are of the first, which shall be what is seen.
        names.sort(key=lambda name: config.streams[name].tokenizer == 'words')
    if len(names) < 2 and m.fusion == 'cross':
        raise UserError("config: model.fusion='cross' needs two streams")
    return tuple(
        replace(
            _stream(config.streams[name], f'streams.{name}', fields),
            name=name,
            part=config.streams[name].part or '',
            depth=config.streams[name].depth,
        )
        for name in names
    )


def _stream(section: Config, key: str, fields: dict[str, Any]) -> Stream:
    """One input as the section says; what its tokenizer does not use stays unread."""
    tokenizer = fields.get('tokenizer', 'patches')
    if section.tokenizer != 'patches' or tokenizer == 'patches':
        tokenizer = section.tokenizer
    more: dict[str, Any] = {}
    patch = fields['patch_size'] if key == 'model' else section.patch or fields['patch_size']
    if tokenizer == 'resnet':
        more['resnet'] = fields.get('resnet')
        if more['resnet'] is None:
            raise UserError(
                f"config: {key}.tokenizer='resnet' needs a hybrid as model.variant, "
                "such as 'R50+B/16'"
            )
    if tokenizer in ('conv', 'cct'):
        side = patch[0]
        if patch[0] != patch[1] or side < 2 or side & (side - 1):
            raise UserError(
                f'config: {key}.tokenizer={tokenizer!r} halves images several times, so its patch '
                f'must be 2, 4, 8, ...; {"x".join(map(str, patch))} is not'
            )
    if tokenizer == 'patches':
        more['stride'] = section.stride
    if tokenizer == 'tubelets':
        more['tubelet'] = section.tubelet
    if tokenizer == 'words':
        more['vocab'] = section.vocab
    if key == 'model':
        if tokenizer not in ('words', 'cct'):
            more['embedding_bias'] = section.embedding_bias
        if section.posemb == 'learned':
            more['posemb_prefix'] = section.posemb_prefix
            if tokenizer == 'ragged':
                more['posemb_grid'] = section.posemb_grid
        if section.posemb == 'rope':
            more['rope_theta'] = section.rope_theta
    return Stream(tokenizer=tokenizer, patch_size=patch, posemb=section.posemb, **more)


def model(config: Config, num_classes: int, shapes: dict[str, tuple[int, ...]], mesh: Mesh) -> ViT:
    """The ViT of the config, for inputs of these shapes.

    Raises:
      UserError: sizes that do not fit together.
    """
    m, streams = config.model, inputs(config)
    fields: dict[str, Any] = variants.parse(m.variant)
    for name in ('width', 'depth', 'mlp_dim', 'num_heads'):
        value = m[name]
        fields[name] = fields[name] if value is None else value
    width, heads = fields['width'], fields['num_heads']
    if m.head_dim is None and width % heads:
        raise UserError(
            f'config: model.width={width} is not divisible by model.num_heads={heads}; '
            'or set model.head_dim'
        )
    for stream in streams:
        _check_stream(config, stream, shapes, width, m.head_dim or width // heads)
    device = mesh.devices.flat[0]
    if m.remat == 'offload' and device in jax.local_devices():
        kinds = {memory.kind for memory in device.addressable_memories()}
        if 'pinned_host' not in kinds:
            raise UserError(
                f"config: model.remat='offload' needs a host memory that {device.device_kind} has "
                f"not ({', '.join(sorted(kinds))}); use 'names' or 'full'"
            )
    if m.attention == 'cudnn' and (device.platform != 'gpu' or m.dtype != 'bfloat16'):
        raise UserError(
            "config: model.attention='cudnn' needs an NVIDIA GPU and model.dtype='bfloat16'; "
            "use 'fused' or 'xla'"
        )
    if list(config.streams):
        fields |= {'streams': streams, 'fusion': m.fusion, 'posemb': 'none'}
        if m.fusion == 'latents':
            fields['latents'] = m.latents
        if m.fusion == 'apart':
            fields |= {'shared': m.shared, **_LOGITS[config.loss]}
            num_classes = 0
    else:
        (only,) = streams
        fields |= {name: getattr(only, name) for name in _STREAM_FIELDS}
    vit = ViT(
        num_classes=num_classes,
        dtype=jnp.dtype(m.dtype),
        constrain=sharding.constrain_batch(mesh, config.mesh.sequence),
        **{name: m[name] for name in _MODEL_FIELDS},
        **fields,
    )
    _check_prefix(vit)
    if vit.fusion == 'apart':
        _check_apart(vit)
    return vit


# How logits of pairs start: as CLIP's and as SigLIP's.
_LOGITS: dict[str, dict[str, Any]] = {
    'softmax': {'logit_scale': 1 / 0.07},
    'sigmoid': {'logit_scale': 10.0, 'logit_bias': -10.0},
}


# Fields of the one `Stream` that a `ViT` has under the same name.
_STREAM_FIELDS = (
    'tokenizer',
    'patch_size',
    'stride',
    'tubelet',
    'vocab',
    'resnet',
    'embedding_bias',
    'posemb',
    'posemb_prefix',
    'posemb_grid',
    'rope_theta',
)
# Keys of `model` that a `ViT` has under the same name, whatever the input is.
_MODEL_FIELDS = (
    'pool',
    'dropout',
    'scan',
    'remat',
    'class_token',
    'registers',
    'patch_dropout',
    'pre_norm',
    'norm',
    'norm_eps',
    'activation',
    'mlp',
    'head_dim',
    'qkv_bias',
    'key_bias',
    'qk_norm',
    'lsa',
    'lora',
    'attention',
    'parallel',
    'layer_scale',
    'drop_path',
    'norm_after_pool',
    'representation',
    'head_bias',
)


def _check_stream(
    config: Config, stream: Stream, shapes: dict[str, tuple[int, ...]], width: int, head: int
) -> None:
    """Raises UserError unless the stream's input divides into tokens and these have positions."""
    key = f'streams.{stream.name}' if stream.name else 'model'
    if stream.tokenizer == 'ragged':
        area, numbers = math.prod(stream.patch_size), shapes['patches'][-1]
        if numbers % area or numbers // area > 4:
            raise UserError(
                f'config: data.transform cuts patches of {numbers} numbers, which are no '
                f'{"x".join(map(str, stream.patch_size))} pixels (model.variant) of 1 to 4 channels'
            )
    try:
        grid = tokenizers.grid_of(stream, shapes[stream.reads])
    except ValueError as error:
        size, patch = ('x'.join(map(str, pair)) for pair in (config.image_size, stream.patch_size))
        raise UserError(
            f'config: image_size {size} is not divisible by the {patch} patch of '
            f'model.variant={config.model.variant!r} ({error})'
            if 'pixels' in str(error) and stream.stride is None
            else f'config: {key}: {error}'
        ) from error
    axes = 2 if stream.tokenizer == 'ragged' else len(grid)
    if stream.posemb in positions.LAWS and not positions.divides(width, axes):
        raise UserError(
            f'config: model.width={width} must be divisible by {2 * axes} for '
            f'{key}.posemb={stream.posemb!r}'
        )
    if stream.posemb == 'rope' and head % (2 * axes):
        raise UserError(
            f'config: the width of a head, {head}, must be divisible by {2 * axes} for '
            f"{key}.posemb='rope': set model.num_heads or model.head_dim"
        )
    if stream.posemb == 'relative' and (stream.tokenizer == 'ragged' or config.model.patch_dropout):
        raise UserError(
            f"config: {key}.posemb='relative' needs all tokens of a grid: not ragged images, and "
            'no model.patch_dropout'
        )


def _check_prefix(vit: ViT) -> None:
    ragged = not vit.streams and vit.tokenizer == 'ragged'
    if ragged and (vit.prefix() or vit.pool not in ('gap', 'map')):
        raise UserError(
            "config: model.tokenizer='ragged' has neither class token nor registers: set "
            "model.pool to 'gap' or 'map'"
        )
    if vit.posemb_prefix > vit.prefix():
        raise UserError(
            f'config: model.posemb_prefix={vit.posemb_prefix}, but the model has {vit.prefix()} '
            'prefix token(s): model.class_token and model.registers'
        )
    if vit.pool == 'cls_dist' and not vit.registers:
        raise UserError("config: model.pool='cls_dist' needs model.registers=1, its second token")


_NOT_APART = (
    'class_token',
    'registers',
    'pre_norm',
    'patch_dropout',
    'norm_after_pool',
    'representation',
)


def _check_apart(vit: ViT) -> None:
    """Raises UserError where streams that stay apart cannot have what is asked for."""
    if len(vit.streams) != 2:
        raise UserError(
            f"config: model.fusion='apart' compares two streams, and there are {len(vit.streams)}"
        )
    if vit.pool not in ('gap', 'map'):
        raise UserError(
            f"config: model.pool={vit.pool!r}, but of streams apart only 'gap' and 'map' are made"
        )
    for name in _NOT_APART:
        if getattr(vit, name):
            raise UserError(f"config: model.{name} is not of model.fusion='apart': remove it")


class Optimizer(NamedTuple):
    """An optimizer, and by parameter path what it does."""

    transform: optax.GradientTransformationExtraArgs
    decay: dict[str, float]
    rate: dict[str, layers.Factor]
    group: dict[str, str]
    settings: dict[str, dict[str, Any]]  # By the optimizers' names, with their own defaults.


def optimizer(config: Config, shapes: Any, schedule: schedules.Schedule, mesh: Mesh) -> Optimizer:
    """The optimizer of the config, for parameters of these shapes.

    Raises:
      UserError: rules that fit no parameter, or choices that exclude each other.
    """
    o, names = config.optim, list(trees.flatten(shapes))
    if o.group_rules is None:
        group = dict.fromkeys(names, o.name)
    else:
        group = trees.match_rules(o.group_rules, names, 'config: optim.group_rules')
    settings = {}
    for name in dict.fromkeys(group.values()):
        own = factory.defaults(name)
        given = {key: o[key] for key in own}
        settings[name] = {key: own[key] if given[key] is None else given[key] for key in own}
    if 'schedule_free_adamw' in settings:
        _check_schedule_free(config, settings)
    laws = {name: factory.LAWS[name](**keys) for name, keys in settings.items()}
    law = next(iter(laws.values())) if len(laws) == 1 else factory.grouped(laws, group)
    rate: dict[str, Any] = trees.match_rules(o.lr_rules, names, 'config: optim.lr_rules')
    if o.layer_decay != 1:
        for name, factor in layers.decay_factors(o.layer_decay, shapes).items():
            each = tuple(rate[name] * f for f in np.atleast_1d(factor).tolist())
            rate[name] = each if isinstance(factor, tuple) else each[0]
    if o.weight_decay:
        factors = trees.match_rules(o.weight_decay_rules, names, 'config: optim.weight_decay_rules')
        decay = {name: o.weight_decay * factor for name, factor in factors.items()}
    else:
        decay = dict.fromkeys(names, 0.0)
    made = factory.make(
        law,
        schedule,
        decay_factors=decay,
        lr_factors=rate,
        clip=o.clip,
        agc=o.agc,
        mesh=mesh,
    )
    return Optimizer(made, decay, rate, group, settings)


def _check_schedule_free(config: Config, settings: dict[str, Any]) -> None:
    if len(settings) > 1:
        raise UserError(
            'config: optim.group_rules: schedule_free_adamw averages all parameters, so it cannot '
            'be one of several optimizers'
        )
    if settings['schedule_free_adamw']['b1'] == 0:
        raise UserError('config: optim.b1 must be above 0 for schedule_free_adamw')
    if config.ema:
        raise UserError(
            'config: ema must be 0 for schedule_free_adamw: what is evaluated is its own average'
        )
    if config.schedule.name != 'constant':
        raise UserError(
            "config: schedule.name must be 'constant' for schedule_free_adamw (a warmup may be "
            f'set), got {config.schedule.name!r}'
        )


def rate_schedule(
    config: Config, source: sources.Source, total: int, peak: float | None = None
) -> schedules.Schedule:
    """The learning rate by step, up to `lr` or another peak."""
    section = config.schedule
    more: dict[str, Any] = {}
    if section.name in ('cosine', 'linear'):
        more['end'] = section.end
    else:
        more['cooldown_steps'] = in_steps(section, 'cooldown', config, source, total) or 0
    if section.name == 'rsqrt':
        timescale = in_steps(section, 'timescale', config, source, total)
        more['timescale'] = 10_000 if timescale is None else timescale
    warmup = in_steps(section, 'warmup', config, source, total) or 0
    return schedules.make(
        section.name,
        peak=config.lr if peak is None else peak,
        total_steps=total,
        warmup_steps=warmup,
        **more,
    )


def experiment(config: Config, devices: list[jax.Device] | None = None) -> Experiment:
    """Everything that the config describes; reads every key that it uses, computes nothing.

    Args:
      devices: of a machine that is not there, to plan for: then datasets need not be here
        either, and evaluations are left out. By default the devices of this run.

    Raises:
      UserError: parts that do not exist or do not fit together.
    """
    m, planning = config.mesh, devices is not None
    mesh = sharding.make_mesh(m.replica, m.fsdp, m.tensor, devices)
    sharding.check_batch(config.batch_size, mesh, 'batch_size', config.accumulation)
    train = train_data(config, absent=planning)
    classes = train.source.num_classes
    held_out, references = {}, {}
    for name in () if planning else config.evals:
        held_out[name] = eval_data(config, name, train)
        reference = reference_data(config, name, train)
        if reference is not None:
            references[name] = reference
    vit = model(config, classes, train.shapes, mesh)
    if classes < 2 and config.loss == 'softmax' and vit.fusion != 'apart':
        named = f' ({train.source.class_names[0]})' if train.source.class_names else ''
        raise UserError(
            f'config: data: {train.source.name} {train.source.split} has one class{named}, so '
            'there is nothing to tell apart: add a second one'
        )
    total = in_steps(config, 'total', config, train.source)
    if not total:
        raise UserError('config: total_steps, total_epochs or total_examples must be above 0')
    schedule = rate_schedule(config, train.source, total)
    shapes = state.abstract_params(vit, train.inputs)
    vit = vit.clone(gather=sharding.gather_weights(mesh, shapes, m.min_shard_size))
    made = optimizer(config, shapes, schedule, mesh)
    averaged = bool(config.ema) or 'schedule_free_adamw' in made.settings
    like = state.abstract(
        vit, train.inputs, made.transform, averaged, mesh, m.min_shard_size, shapes
    )
    sharding.check_spread(like, state.shardings(like), mesh, m.min_shard_size, m.max_replicated)
    return Experiment(
        mesh=mesh,
        data=train,
        evals=held_out,
        references=references,
        model=vit,
        optimizer=made.transform,
        schedule=schedule,
        like=like,
        total_steps=total,
        flops_per_example=training_flops(costs.cost(vit, train.shapes).flops, shapes, made.rate),
        decay_factors=made.decay,
        lr_factors=made.rate,
        groups=made.group,
        settings=made.settings,
        batch_size=config.batch_size,
        due=_duties(config, train.source, total),
    )


def training_flops(forward: int, shapes: Any, rates: dict[str, layers.Factor]) -> int:
    """Operations of a training step for one example: three times the forward pass, less the frozen.

    Back through the model go the gradients of activations, unless the head alone is trained, and
    those of the parameters that are. Where lower blocks are frozen and upper ones are not, the
    former count as passed, so it is an upper bound there.
    """
    still, flat = factory.frozen(rates), trees.flatten(shapes)
    moving = {name: leaf for name, leaf in flat.items() if name not in still}
    through = any(not name.startswith(('head/', 'head_dist/')) for name in moving)
    share = trees.count(list(moving.values())) / trees.count(shapes)
    return round(forward * (1 + through + share))


def in_steps(
    section: Config, name: str, config: Config, source: sources.Source, total: int | None = None
) -> int | None:
    """A duration of the config in steps, None where it is not set."""
    return config_lib.steps(
        section, name, batch_size=config.batch_size, examples=source.length, total=total
    )


def _duties(config: Config, source: sources.Source, total: int) -> Duties:
    """When not set: log at each 1 %, save at each 10 %, evaluate at each 10 % of the run."""

    def every(section: Config, name: str, otherwise: int) -> int:
        steps = in_steps(section, name, config, source, total)
        return otherwise if steps is None else steps

    tenth = max(1, total // 10)
    return Duties(
        log=every(config.log, 'every', max(1, total // 100)),
        save=every(config.checkpoint, 'every', tenth),
        keep=every(config.checkpoint, 'keep_every', 0),
        keep_last=config.checkpoint.keep_last,
        evals={name: every(config.evals[name], 'every', tenth) for name in config.evals},
    )


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
        opener=functools.partial(opening.open_examples, found.specs, found.workers),
        meter=meter,
    )


def train_batches(config: Config, parts: Experiment, start_step: int) -> pipeline.DeviceBatches:
    """The batches from `start_step` on, as global arrays, one ahead of the step."""
    where = sharding.batch_sharding(parts.mesh)
    rows, meter = pipeline.local_rows(where, config.batch_size), pipeline.Meter()
    batches = host_batches(parts.data, start_step, rows, meter)
    return pipeline.to_device(batches, where, batch_size=config.batch_size, meter=meter)


def example_indices(parts: Experiment, step: int) -> list[int]:
    """Which examples the batch of this step holds (of a 0-based step)."""
    assert parts.data.order is not None
    index, _ = parts.data.order.indices(step, parts.data.source.length)
    return index.tolist()


def abstract_batch(parts: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    """What a training batch looks like, without loading one."""
    where = sharding.batch_sharding(parts.mesh)
    looks = dict(parts.data.looks.parts)
    if parts.data.skip_bad:
        looks['replaced'] = (), np.dtype(np.uint8)
    return {
        name: jax.ShapeDtypeStruct(
            (parts.batch_size, *shape), jax.dtypes.canonicalize_dtype(dtype), sharding=where
        )
        for name, (shape, dtype) in looks.items()
    }


def eval_batches(parts: Experiment, name: str) -> Iterator[dict[str, jax.Array]]:
    """Every example of an evaluation once, as global arrays, padded with a mask."""
    return all_batches(parts, parts.evals[name])


def all_batches(parts: Experiment, found: Data) -> Iterator[dict[str, jax.Array]]:
    """Every example of a split once, as global arrays, padded with a mask."""
    where, size = sharding.batch_sharding(parts.mesh), parts.batch_size
    batches = pipeline.eval_batches(
        found.source,
        found.transform,
        batch_size=size,
        rows=pipeline.local_rows(where, size),
        skip_bad=found.skip_bad,
    )
    with pipeline.to_device(batches, where, batch_size=size) as on_device:
        yield from on_device


def text_data(config: Config, train: Data, texts: list[str], key: str) -> Data:
    """Sentences as the words of a training example, made by the same operations.

    Raises:
      UserError: training makes no words of text.
    """
    size, host = config.image_size, train.transform.host_text
    whole = transforms.parse(host, size=size, key='data')
    pairs = zip(whole.names, whole.operations, strict=True)
    chosen = [pair for pair in pairs if pair[0] in text.OPERATIONS]
    if not chosen:
        raise UserError(
            f'config: {key} needs sentences as numbers, but data.transform makes none of text: add '
            "byte_tokens(LENGTH) or tokenize('FILE', LENGTH) to it"
        )
    names, operations = zip(*chosen, strict=True)
    made = replace(whole, names=names, operations=operations, device=(), random_operations=())

    def load(indices: np.ndarray) -> dict[str, Any]:
        return {'text': [texts[i] for i in indices], 'label': indices.astype(np.int32)}

    source = sources.Source(key, '', len(texts), len(texts), None, load, in_memory=True)
    reads = tuple(part for part in train.reads if part not in tokenizers.PICTURES)
    looks = transforms.check(made, source, size, reads)
    spec = opening.Spec(key='', name='prompts', split='', transform=host, image_size=size)
    return Data(
        source, made, looks, (), (replace(spec, classes=tuple(texts)),), skip_bad=False, reads=reads
    )


def prepare(found: Data) -> Any:
    """What the devices do to a batch before anything else, (batch, rng) -> batch; or None."""
    return augment.compose([function for _, function in found.device]) if found.device else None


def mix(config: Config, found: Data, mesh: Mesh) -> Any:
    """What mixes the examples of a batch, (batch, rng) -> batch; or None."""
    if not config.mixup and not config.cutmix:
        return None
    if found.reads != ('image',):
        raise UserError(
            f'config: mixup and cutmix mix images, but the model takes {", ".join(found.reads)}: '
            'set both to 0'
        )
    more = {'switch': config.mix_switch} if config.mixup and config.cutmix else {}
    return functools.partial(
        mixing.mix,
        mixup=config.mixup,
        cutmix=config.cutmix,
        prob=config.mix_prob,
        num_classes=found.source.num_classes,
        replicate=sharding.constrain_replicated(mesh),
        **more,
    )


def train_step(config: Config, parts: Experiment) -> Any:
    """The one train step, for training, transfer, planning and benchmarks."""
    step = update(config, parts, parts.optimizer, parts.schedule, config.seed)
    return steps.make_train_step(step, parts.like, parts.mesh)


def objective(config: Config, model: ViT) -> objectives.Loss:
    """What is trained: classes, or which examples of two streams belong together."""
    if model.fusion != 'apart':
        return objectives.classification(model.apply, config.label_smoothing, config.loss)
    return objectives.contrastive(model.apply, config.loss, words_of(model))


def words_of(model: ViT) -> str | None:
    """The part of a batch that a stream of words reads; None without one."""
    return next((s.reads for s in model.streams if s.tokenizer == 'words'), None)


def update(
    config: Config,
    parts: Experiment,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: schedules.Schedule,
    seed: int | jax.Array,
) -> Callable[[state.State, Any], tuple[state.State, steps.Metrics]]:
    """The same, not jitted, with another rate or seed than the config's, which may be traced."""
    return steps.update(
        objective(config, parts.model),
        optimizer,
        schedule,
        parts.mesh,
        prepare=prepare(parts.data),
        mix=mix(config, parts.data, parts.mesh),
        seed=seed,
        accumulation=config.accumulation,
        ema=config.ema,
        skip_sigmas=config.skip_sigmas,
        frozen=factory.frozen(parts.lr_factors),
        sam_rho=config.optim.sam_rho,
        sam_adaptive=bool(config.optim.sam_rho) and config.optim.sam_adaptive,
    )


def seen(config: Config, found: Data, batch: dict[str, Any], step: int) -> dict[str, Any]:
    """A batch as the model sees it at a step, on one device."""
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    arrays = {name: jnp.asarray(column) for name, column in batch.items()}
    made = functools.partial(
        steps.seen, prepare=prepare(found), mix=mix(config, found, mesh), seed=config.seed
    )
    result = jax.jit(made)(arrays, step=step)
    return {
        n: objectives.normalise(x) if n in tokenizers.PICTURES else x for n, x in result.items()
    }


def eval_steps(config: Config, parts: Experiment) -> dict[str, Any]:
    """The jitted step of each evaluation of the head; those that prepare images alike share one."""
    made: dict[Any, Any] = {}
    steps_ = {}
    for name, found in parts.evals.items():
        section = complete(config, 'evals', name)
        if section.type not in OF_THE_HEAD:
            continue
        options = head_options(config, parts, name) if section.type == 'classification' else {}
        key = found.device, tuple(options.items())
        if key not in made:
            sums = eval_sums(config, parts, found, **options)
            made[key] = steps.make_eval_step(sums, parts.like, parts.mesh)
        steps_[name] = made[key]
    return steps_


def head_options(config: Config, parts: Experiment, name: str) -> dict[str, Any]:
    """What else is asked of a classification, as arguments of `classification.sums`."""
    section, key = config.evals[name], f'evals.{name}'
    options: dict[str, Any] = {}
    if section.calibration:
        if config.loss != 'softmax':
            raise UserError(
                f"config: {key}.calibration is of probabilities over classes: set loss='softmax'"
            )
        options['calibration'] = True
    if section.per_class not in (None, 'none'):
        options['per_class'] = True
    if section.skip_unlabelled:
        options['skip_unlabelled'] = True
    if section.subset is not None:
        options['subset'] = subset_of(section.subset, parts.evals[name], parts.data, key)
    return options


def subset_of(chosen: Any, found: Data, train: Data, key: str) -> tuple[int, ...]:
    """Numbers of the classes that compete, in ascending order."""
    if chosen == 'present':
        if found.source.labels is None:
            raise UserError(
                f"config: {key}.subset='present': the labels of {found.source.name} cannot be "
                'listed; name the classes in a tuple'
            )
        return tuple(np.unique(found.source.labels()).tolist())
    names, classes = train.source.class_names, train.source.num_classes
    numbers = []
    for one in chosen:
        number = names.index(one) if names and one in names else one
        if not isinstance(number, int) or not 0 <= number < classes:
            known = ', '.join(names[:12]) if names else f'0 to {classes - 1}'
            raise UserError(f'config: {key}.subset: the model has no class {one!r}; it has {known}')
        numbers.append(number)
    if len(set(numbers)) != len(numbers):
        raise UserError(f'config: {key}.subset names a class twice')
    return tuple(sorted(numbers))


def prepare_eval(found: Data) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What the devices do to a batch of an evaluation before the model sees it."""
    apply, key = prepare(found), jax.random.key(0)  # Nothing that an evaluation does draws.
    return (lambda batch: apply(batch, key)) if apply else lambda batch: batch


def eval_sums(config: Config, parts: Experiment, found: Data, **options: Any) -> Any:
    """What an evaluation step of the head computes, not jitted."""
    return classification.sums(parts.model.apply, prepare_eval(found), config.loss, **options)


def log_targets(config: Config) -> dict[str, Any]:
    """Where metrics go beside JSONL, as arguments of `metrics.Writer`."""
    return {'tensorboard': config.log.tensorboard, 'wandb': config.log.wandb}
