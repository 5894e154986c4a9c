"""Bidirectional rules that map the arrays of a peer to ours.

A rule is a bijection: arrays are only renamed, transposed, reshaped and joined along their first
axis, so a round trip is bit-exact.
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from big_vit import trees
from big_vit.errors import UserError, printable
from big_vit.models.vit import make_vit

T = TypeVar('T')
Arrays = dict[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]

# Names listed in a message per kind of mismatch.
SHOWN = 8

# Arrays that files often hold besides the encoder, and what they are.
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

    Each of `ours` has shape `our_shape`. Reshaped to `middle` and transposed by `axes`, they are
    joined along axis 0 and reshaped to `shape`.
    """

    theirs: str
    shape: tuple[int, ...]
    ours: tuple[str, ...]
    our_shape: tuple[int, ...]
    middle: tuple[int, ...]
    axes: tuple[int, ...]


def shapes_of(settings: Mapping[str, Any], meta: Mapping[str, Any]) -> Shapes:
    """Return names and shapes of the parameters of a ViT, one set per block.

    Args:
      settings: fields of `ViT`.
      meta: `image_size` (height, width) and `channels`.

    Raises:
      UserError: no ViT has these settings.
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
            unstacked = f'Transformer/encoderblock_{i}/{name.removeprefix(stacked)}'
            shapes[unstacked] = tuple(leaf.shape[1:])
    return shapes


def identity(ours: str, theirs: str, our_shape: tuple[int, ...], shape: Sequence[int] = ()) -> Rule:
    """Return a rule that renames an array, and reshapes it if a shape is given."""
    axes = tuple(range(len(our_shape)))
    return Rule(theirs, tuple(shape) or our_shape, (ours,), our_shape, our_shape, axes)


# A row of a table: our module or array, and the peer's name. `{i}` is the number of a block,
# `{leaf}` weight or bias if the row is a module. Several modules or arrays are joined. Arrays in a
# tuple are laid out as PyTorch has them; one that is not in a tuple stays as it is.
Row = tuple[str | tuple[str, ...], str]

_LEAF = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias'}


def torch_rules(
    table: Iterable[Row], shapes: Shapes, flat: Sequence[str] = (), depth: int = 0
) -> list[Rule]:
    """Expand the table of a PyTorch codebase into rules.

    Args:
      table: rows for every array that a peer may have; rows without a counterpart in `shapes` are
        skipped.
      shapes: the result of `shapes_of`.
      flat: their names (as in the table) that lack our leading axes of length one.
      depth: number of blocks.

    Raises:
      UserError: an array of ours has no place in the peer.
    """
    rules: list[Rule] = []
    placed: set[str] = set()
    for row_ours, row_theirs in table:
        for i in range(depth) if '{i}' in row_theirs else (0,):
            joined = (row_ours,) if isinstance(row_ours, str) else row_ours
            modules = tuple(module.format(i=i) for module in joined)
            if '{leaf}' not in row_theirs and not isinstance(row_ours, str):
                present = [module for module in modules if module in shapes]
                name, shape = row_theirs.format(i=i), shapes.get(modules[0], ())
                expanded = [_transposed(modules, name, shape)] if present else []
            else:
                expanded = list(_row(modules, row_theirs, i, shapes, row_theirs in flat))
            for rule in expanded:
                rules.append(rule)
                placed.update(rule.ours)
    unplaced = [name for name in shapes if name not in placed]
    if unplaced:
        raise UserError(f'the other format has no place for {shown(unplaced)}')
    return rules


def _row(
    modules: tuple[str, ...], template: str, i: int, shapes: Shapes, flat: bool
) -> Iterable[Rule]:
    if '{leaf}' not in template:
        if modules[0] in shapes:
            our_shape = shapes[modules[0]]
            shape = tuple(n for n in our_shape if n != 1) if flat else our_shape
            yield identity(modules[0], template.format(i=i), our_shape, shape)
        return
    for leaf, theirs in _LEAF.items():
        names = tuple(f'{module}/{leaf}' for module in modules)
        if names[0] not in shapes:
            continue
        missing = [name for name in names if name not in shapes]
        if missing:
            raise UserError(f'the other format joins {names[0]} with {shown(missing)}, not there')
        yield _transposed(names, template.format(i=i, leaf=theirs), shapes[names[0]])


def _transposed(ours: tuple[str, ...], theirs: str, our_shape: tuple[int, ...]) -> Rule:
    """Return the rule for a PyTorch module.

    Convolutions are OIHW, matrices [out, in], and biases of heads flat.
    """
    size = math.prod(our_shape)
    middle: tuple[int, ...] = (size,)
    axes: tuple[int, ...] = (0,)
    if len(our_shape) == 4:
        middle, axes = our_shape, (3, 2, 0, 1)
    elif ours[0].endswith('/out/kernel'):  # [heads, head_dim, width]: the heads are inputs ...
        middle, axes = (size // our_shape[-1], our_shape[-1]), (1, 0)
    elif ours[0].endswith('/kernel'):  # ... and for q, k, v [width, heads, head_dim] outputs.
        middle, axes = (our_shape[0], size // our_shape[0]), (1, 0)
    first, *rest = (middle[axis] for axis in axes)
    return Rule(theirs, (len(ours) * first, *rest), ours, our_shape, middle, axes)


def to_ours(rules: Sequence[Rule], arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Convert the peer's arrays to ours; `check` them first."""
    params: Arrays = {}
    for rule in rules:
        their_middle = [rule.middle[axis] for axis in rule.axes]
        joined = arrays[rule.theirs].reshape(len(rule.ours) * their_middle[0], *their_middle[1:])
        for name, part in zip(rule.ours, np.split(joined, len(rule.ours)), strict=True):
            inward = np.transpose(part, np.argsort(rule.axes))
            params[name] = np.ascontiguousarray(inward.reshape(rule.our_shape))
    return params


def to_theirs(rules: Sequence[Rule], params: Mapping[str, np.ndarray]) -> Arrays:
    """Convert our arrays to the peer's; names and shapes must match the rules."""
    arrays: Arrays = {}
    for rule in rules:
        parts = [params[name].reshape(rule.middle).transpose(rule.axes) for name in rule.ours]
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
        arrays[rule.theirs] = np.ascontiguousarray(joined.reshape(rule.shape))
    return arrays


def check(rules: Sequence[Rule], arrays: Mapping[str, np.ndarray], where: str) -> None:
    """Compare names and shapes with those that the rules expect.

    Raises:
      UserError: arrays are missing, unexpected or of another shape; lists the first few of each
        kind.
    """
    wanted = {rule.theirs: rule.shape for rule in rules}
    missing = [name for name in wanted if name not in arrays]
    unexpected = [name for name in arrays if name not in wanted]
    misshapen = [
        f'{printable(name)} is {_size(arrays[name].shape)}, not {_size(shape)}'
        for name, shape in wanted.items()
        if name in arrays and tuple(arrays[name].shape) != shape
    ]
    kinds = (('missing', missing), ('unexpected', unexpected), ('of other shape', misshapen))
    parts = [f'{len(names)} {what}: {shown(names)}' for what, names in kinds if names]
    if not parts:
        return
    raise UserError(f'{where}: not the expected arrays; ' + '; '.join(parts) + _advice(unexpected))


def _advice(unexpected: Sequence[str]) -> str:
    """Suggest --drop options for the unexpected arrays that are known extras."""
    hints, left = [], list(unexpected)
    of_mae = any(name.startswith('decoder') for name in unexpected)
    for pattern, what in KNOWN_EXTRAS if of_mae else KNOWN_EXTRAS[1:]:
        matching = [name for name in left if re.fullmatch(pattern, name)]
        if matching:
            left = [name for name in left if name not in matching]
            hints.append(f"--drop '{pattern}' for {what}")
    if hints:
        return '. To leave things out on purpose: ' + ', '.join(hints)
    return ". To leave an array out on purpose, --drop 'REGEX'" if unexpected else ''


def matches(pattern: str, name: str) -> bool:
    """Whether a regex of --drop is that of a whole name; raises UserError if it is no regex."""
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise UserError(f'--drop {pattern!r}: not a regular expression: {error}') from None


def drop(
    arrays: Mapping[str, T], patterns: Sequence[str], where: str
) -> tuple[dict[str, T], tuple[str, ...]]:
    """Remove the arrays (or what stands for them) whose full name matches a regex.

    Returns:
      The remaining arrays, and the names of the dropped ones.

    Raises:
      UserError: a regex does not compile or matches nothing.
    """
    dropped: set[str] = set()
    for pattern in patterns:
        matching = {name for name in arrays if matches(pattern, name)}
        if not matching:
            raise UserError(
                f'--drop {pattern!r} matches nothing in {where}, which has {shown(list(arrays))}'
            )
        dropped |= matching
    kept = {name: array for name, array in arrays.items() if name not in dropped}
    return kept, tuple(sorted(dropped))


def _size(shape: Sequence[int]) -> str:
    return 'x'.join(map(str, shape)) or 'a scalar'


def shown(names: Sequence[str]) -> str:
    """List the first names, with what would control a terminal escaped."""
    more = f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
    return ', '.join(map(printable, names[:SHOWN])) + more


def depth_of(names: Iterable[str], pattern: str, where: str) -> int:
    """Return the number of blocks, given a regex whose group 1 is the number of a block.

    Raises:
      UserError: there are no blocks, or their numbers have gaps.
    """
    numbers = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    if not numbers:
        raise UserError(f'{where}: there are no blocks in it (names like {pattern})')
    if numbers != set(range(len(numbers))):
        lacking = sorted(set(range(max(numbers) + 1)) - numbers)
        raise UserError(f'{where}: of {max(numbers) + 1} blocks these are missing: {lacking[:8]}')
    return len(numbers)
