"""Parser for the text of a transform, 'decode | resize(size) | flip_lr'; nothing is evaluated."""

import ast
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from big_vit.errors import UserError, nearest


class Call(NamedTuple):
    """An operation as written: its name and literal arguments."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    text: str


# Views of an example are many at most, and named as nothing else in a batch.
MOST_VIEWS = 64
_TAKEN = frozenset(
    (
        *('image', 'label', 'mask', 'replaced', 'targets', 'text', 'text_mask', 'example'),
        *('boxes', 'box_label', 'box_crowd', 'box_mask', 'picture_size', 'segmentation'),
    )
)
# What is in quotes, or else a semicolon.
_SEMICOLON = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|(;)""")
_NAME = '[a-z][a-z0-9_]*'
_VIEW = re.compile(
    rf'\s*({_NAME})(?:\s+as\s+({_NAME}))?\s*:\s*(?:(\d{{1,6}})\s*\*)?(.*)', re.DOTALL
)


def statements(text: str) -> list[str]:
    """Split the text of a transform at semicolons that are not in quotes."""
    ends = [match.start() for match in _SEMICOLON.finditer(text) if match[1]]
    starts = [0, *(end + 1 for end in ends)]
    return [text[a:b] for a, b in zip(starts, [*ends, len(text)], strict=True)]


@dataclass(frozen=True)
class ViewText:
    """Views as written: their group, the group that they are drawn as, and their number."""

    group: str
    like: str | None
    count: int
    operations: str


def view(text: str, key: str) -> ViewText:
    """Read 'GROUP as OTHER: COUNT * OPERATIONS', of which 'as OTHER' and the count may be missing.

    Raises:
      UserError: the text has another form, the name is taken, or the count is none.
    """
    match = _VIEW.fullmatch(text)
    if match is None or match[1] in _TAKEN:
        raise UserError(
            f'{key}: cannot read {text.strip()!r}: behind a semicolon comes a group of views, as '
            "in 'local: 8 * rrc(96) | flip_lr'"
            + (f'; {match[1]!r} is the name of something else' if match else '')
        )
    count = int(match[3] or 1)
    if not 1 <= count <= MOST_VIEWS:
        raise UserError(f'{key}: a group has 1 to {MOST_VIEWS} views, not {count}: {text.strip()}')
    return ViewText(match[1], match[2], count, match[4])


def parse(text: str, *, size: tuple[int, int], key: str) -> list[Call]:
    """Parse operations separated by |, which are names with literal arguments.

    Args:
      text: as the user wrote it; empty for no operation.
      size: (height, width), the value of the name `size`.
      key: config key for error messages, such as 'data.transform'.

    Raises:
      UserError: the text has another form.
    """
    if not text.strip():
        return []
    try:
        node = ast.parse(text.strip(), mode='eval').body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(
            f'{key}: cannot read {text!r}: write operations separated by |, such as '
            "'resize(size) | flip_lr'"
        ) from error
    calls = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        calls.append(node.right)
        node = node.left
    return [_call(node, size, key) for node in reversed([*calls, node])]


def _call(node: ast.expr, size: tuple[int, int], key: str) -> Call:
    function = node.func if isinstance(node, ast.Call) else node
    text = ast.unparse(node)
    if not isinstance(function, ast.Name):
        raise UserError(
            f'{key}: cannot read {text!r}: an operation is a name, with arguments in parentheses'
        )

    def argument(value: ast.expr) -> Any:
        if isinstance(value, ast.Name) and value.id == 'size':
            return size
        try:
            return ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
            raise UserError(
                f'{key}: {ast.unparse(value)!r} in {text!r} is neither a number, a text in quotes '
                'nor `size`'
            ) from error

    if not isinstance(node, ast.Call):
        return Call(function.id, (), {}, text)
    if any(pair.arg is None for pair in node.keywords):
        raise UserError(f'{key}: cannot read {text!r}: ** has no place here')
    args = tuple(argument(value) for value in node.args)
    kwargs = {str(pair.arg): argument(pair.value) for pair in node.keywords}
    return Call(function.id, args, kwargs, text)


def make(call: Call, table: Mapping[str, Callable[..., Any]], key: str) -> Any:
    """Call the function that a call names.

    Raises:
      UserError: there is no such function, or it refuses the arguments by a ValueError, whose text
        continues the function's name.
    """
    if call.name not in table:
        near = nearest(call.name, table)
        hint = f'did you mean {near}?' if near else f'there are {", ".join(sorted(table))}'
        raise UserError(f'{key}: there is no operation {call.name!r}: {hint}')
    function = table[call.name]
    signature = inspect.signature(function)
    written = signature.replace(
        parameters=[
            parameter.replace(annotation=inspect.Parameter.empty)
            for parameter in signature.parameters.values()
        ],
        return_annotation=inspect.Signature.empty,
    )
    usage = f'{call.name}{written}'
    try:
        signature.bind(*call.args, **call.kwargs)
    except TypeError as error:
        raise UserError(f'{key}: {call.text!r}: {error}: write it as {usage}') from error
    try:
        return function(*call.args, **call.kwargs)
    except ValueError as error:
        raise UserError(f'{key}: {call.name} {error}: write it as {usage}') from error
