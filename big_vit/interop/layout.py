"""Which array of a peer is which of ours, and how it lies: rules that can be read both ways.

A rule is a bijection: arrays are only renamed, transposed, reshaped, and joined along their first
axis, so what goes through it and back is the same bits.
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from big_vit import trees
from big_vit.errors import UserError
from big_vit.models.vit import make_vit

Arrays = dict[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]

# How many names a message shows of each kind of difference.
SHOWN = 8

# What is often in a file beside the encoder, and why it may be left out.
KNOWN_EXTRAS = (
    (r'(mask_token|.*\.mask_token|decoder.*)', 'the decoder and mask token of MAE'),
    (r'.*mask_token', 'the token that stands for masked patches in pretraining'),
    (r'(.*\.)?pooler\..*', "Hugging Face's pooler, which no classifier uses"),
    (r'(text_model|text|transformer|token_embedding|ln_final)\..*', 'the text tower'),
    (r'(logit_scale|logit_bias|positional_embedding|text_projection|token_embedding.*|attn_mask)',
     'the temperature and text part of a contrastive model'),
    (r'.*position_ids', 'numbers of positions, which are no weights'),
    (r'pre_logits.*', 'the layer between pooling and head'),
    (r'(vision_model\.)?head\..*', "the head, or SigLIP's pooling that its classifier skips"),
    (r'(.*\.)?(classifier|head|head_dist|fc)\..*', 'the head'),
)  # fmt: skip


class Rule(NamedTuple):
    """One array of a peer and the arrays of ours that it is made of.

    Each of `ours` has shape `each`; reshaped to `middle` and transposed by `axes` they are joined
    along axis 0 and reshaped to `shape`.
    """

    theirs: str
    shape: tuple[int, ...]
    ours: tuple[str, ...]
    each: tuple[int, ...]
    middle: tuple[int, ...]
    axes: tuple[int, ...]


def shapes_of(settings: Mapping[str, Any], meta: Mapping[str, Any]) -> Shapes:
    """Names and shapes of the parameters of the ViT with these fields, blocks one by one.

    Args:
      settings: fields of `ViT`.
      meta: `image_size` (height, width) and `channels`.

    Raises:
      UserError: there is no such ViT.
    """
    try:
        fields = tuple(sorted(settings.items()))
        return dict(_shapes(fields, (*meta['image_size'], meta['channels'])))
    except (ValueError, TypeError, ArithmeticError) as error:
        shown = ' '.join(str(error).split())[:300]
        raise UserError(
            f'no ViT has these settings for images of {meta["image_size"]}: {shown}'
        ) from error


@functools.lru_cache(maxsize=32)
def _shapes(fields: tuple[Any, ...], image: tuple[int, ...]) -> Shapes:
    model = make_vit(**{**dict(fields), 'scan': True, 'dtype': jnp.float32})
    example = jax.ShapeDtypeStruct((1, *image), jnp.float32)
    tree = jax.eval_shape(lambda x: model.init(jax.random.key(0), x)['params'], example)
    shapes: Shapes = {}
    stacked = 'Transformer/encoderblock/'
    for name, leaf in trees.flatten(tree).items():
        if not name.startswith(stacked):
            shapes[name] = tuple(leaf.shape)
            continue
        for i in range(leaf.shape[0]):
            one = f'Transformer/encoderblock_{i}/{name.removeprefix(stacked)}'
            shapes[one] = tuple(leaf.shape[1:])
    return shapes


def identity(ours: str, theirs: str, each: tuple[int, ...], shape: Sequence[int] = ()) -> Rule:
    """The same array under another name, and in another shape if one is given."""
    axes = tuple(range(len(each)))
    return Rule(theirs, tuple(shape) or each, (ours,), each, each, axes)


# A table's rows: (our module or array, or several that are joined; the peer's name). `{i}` is the
# number of a block, `{leaf}` stands for weight or bias where the row is of a module.
Row = tuple[str | tuple[str, ...], str]

_LEAF = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias'}


def torch_rules(
    table: Iterable[Row], shapes: Shapes, flat: Sequence[str] = (), depth: int = 0
) -> list[Rule]:
    """The rules of a table for a peer written in PyTorch.

    Args:
      table: for all arrays that a peer may have; rows of what `shapes` lacks are left out.
      shapes: what `shapes_of` gives.
      flat: names of theirs (as in the table) that have no leading axes of length one.
      depth: number of blocks.

    Raises:
      UserError: an array of ours has no place in the peer.
    """
    rules: list[Rule] = []
    placed: set[str] = set()
    for row_ours, row_theirs in table:
        for i in range(depth) if '{i}' in row_theirs else (0,):
            joined = (row_ours,) if isinstance(row_ours, str) else row_ours
            modules = [module.format(i=i) for module in joined]
            for made in _row(modules, row_theirs, i, shapes, row_theirs in flat):
                rules.append(made)
                placed.update(made.ours)
    homeless = [name for name in shapes if name not in placed]
    if homeless:
        raise UserError(f'the other format has no place for {_list(homeless)}')
    return rules


def _row(modules: list[str], template: str, i: int, shapes: Shapes, flat: bool) -> Iterable[Rule]:
    if '{leaf}' not in template:
        if modules[0] in shapes:
            each = shapes[modules[0]]
            shape = tuple(n for n in each if n != 1) if flat else each
            yield identity(modules[0], template.format(i=i), each, shape)
        return
    for leaf, theirs in _LEAF.items():
        names = tuple(f'{module}/{leaf}' for module in modules)
        if names[0] not in shapes:
            continue
        missing = [name for name in names if name not in shapes]
        if missing:
            raise UserError(f'the other format joins {names[0]} with {_list(missing)}, not there')
        yield _transposed(names, template.format(i=i, leaf=theirs), shapes[names[0]])


def _transposed(ours: tuple[str, ...], theirs: str, each: tuple[int, ...]) -> Rule:
    """How PyTorch keeps a kernel: convolutions OIHW, matrices [out, in]; vectors have one axis."""
    size = math.prod(each)
    middle: tuple[int, ...] = (size,)
    axes: tuple[int, ...] = (0,)
    if len(each) == 4:
        middle, axes = each, (3, 2, 0, 1)
    elif ours[0].endswith('/out/kernel'):  # The heads are part of its inputs, ...
        middle, axes = (size // each[-1], each[-1]), (1, 0)
    elif ours[0].endswith('/kernel'):  # ... and of the outputs of queries, keys and values.
        middle, axes = (each[0], size // each[0]), (1, 0)
    first, *rest = (middle[axis] for axis in axes)
    return Rule(theirs, (len(ours) * first, *rest), ours, each, middle, axes)


def to_ours(rules: Sequence[Rule], arrays: Mapping[str, np.ndarray]) -> Arrays:
    """The peer's arrays as ours; `check` them first."""
    params: Arrays = {}
    for rule in rules:
        turned = [rule.middle[axis] for axis in rule.axes]
        joined = arrays[rule.theirs].reshape(len(rule.ours) * turned[0], *turned[1:])
        for name, part in zip(rule.ours, np.split(joined, len(rule.ours)), strict=True):
            inward = np.transpose(part, np.argsort(rule.axes))
            params[name] = np.ascontiguousarray(inward.reshape(rule.each))
    return params


def to_theirs(rules: Sequence[Rule], params: Mapping[str, np.ndarray]) -> Arrays:
    """Our arrays as the peer's, whose names and shapes the rules must fit."""
    arrays: Arrays = {}
    for rule in rules:
        parts = [params[name].reshape(rule.middle).transpose(rule.axes) for name in rule.ours]
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
        arrays[rule.theirs] = np.ascontiguousarray(joined.reshape(rule.shape))
    return arrays


def check(rules: Sequence[Rule], arrays: Mapping[str, np.ndarray], where: str) -> None:
    """Compares names and shapes with what the rules ask for.

    Raises:
      UserError: with all (of each kind the first few) missing, unexpected and mis-shaped arrays.
    """
    wanted = {rule.theirs: rule.shape for rule in rules}
    missing = [name for name in wanted if name not in arrays]
    unexpected = [name for name in arrays if name not in wanted]
    other = [
        f'{name} is {_size(arrays[name].shape)}, not {_size(shape)}'
        for name, shape in wanted.items()
        if name in arrays and tuple(arrays[name].shape) != shape
    ]
    kinds = (('missing', missing), ('unexpected', unexpected), ('of other shape', other))
    parts = [f'{len(found)} {what}: {_list(found)}' for what, found in kinds if found]
    if not parts:
        return
    raise UserError(f'{where}: not the expected arrays; ' + '; '.join(parts) + _advice(unexpected))


def _advice(unexpected: Sequence[str]) -> str:
    """Which --drop to give, where what is unexpected is something known."""
    hints, left = [], list(unexpected)
    for pattern, what in KNOWN_EXTRAS:
        found = [name for name in left if re.fullmatch(pattern, name)]
        if found:
            left = [name for name in left if name not in found]
            hints.append(f"--drop '{pattern}' for {what}")
    if hints:
        return '. To leave things out on purpose: ' + ', '.join(hints)
    return ". To leave an array out on purpose, --drop 'REGEX'" if unexpected else ''


def drop(
    arrays: Mapping[str, np.ndarray], patterns: Sequence[str], where: str
) -> tuple[Arrays, tuple[str, ...]]:
    """(The arrays that no regex fully matches, the names of the rest).

    Raises:
      UserError: a regex does not compile, or matches nothing.
    """
    dropped: set[str] = set()
    for pattern in patterns:
        try:
            found = {name for name in arrays if re.fullmatch(pattern, name)}
        except re.error as error:
            raise UserError(f'--drop {pattern!r}: not a regular expression: {error}') from None
        if not found:
            raise UserError(
                f'--drop {pattern!r} matches nothing in {where}, which has {_list(list(arrays))}'
            )
        dropped |= found
    kept = {name: array for name, array in arrays.items() if name not in dropped}
    return kept, tuple(sorted(dropped))


def _size(shape: Sequence[int]) -> str:
    return 'x'.join(map(str, shape)) or 'a scalar'


def _list(names: Sequence[str]) -> str:
    more = f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
    return ', '.join(names[:SHOWN]) + more


def depth_of(names: Iterable[str], pattern: str, where: str) -> int:
    """The number of blocks, from names in which a regex finds the block's number as group 1.

    Raises:
      UserError: there is none, or one is left out.
    """
    numbers = {int(found[1]) for name in names if (found := re.match(pattern, name))}
    if not numbers:
        raise UserError(f'{where}: there are no blocks in it (names like {pattern})')
    if numbers != set(range(len(numbers))):
        lacking = sorted(set(range(max(numbers) + 1)) - numbers)
        raise UserError(f'{where}: of {max(numbers) + 1} blocks these are missing: {lacking[:8]}')
    return len(numbers)
