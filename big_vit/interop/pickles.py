"""Tensors of PyTorch's files, taken out of their pickle without running it.

A pickle is a program: it names functions and calls them. Here its opcodes are followed, but no name
is looked up and nothing is called. Containers, numbers, text and tensors come of it; any other
object (`argparse.Namespace`, an optimizer, NumPy scalars, paths) becomes an `Opaque`.
"""

import math
import pickletools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

# A checkpoint has some hundred tensors, of some twenty opcodes each; one with an optimizer thrice.
_MOST_OPCODES = 20_000_000
_DEEPEST = 16  # Of modules in modules, or dictionaries in dictionaries.

_DTYPES: dict[str, Any] = {
    'float32': np.float32, 'float64': np.float64, 'float16': np.float16,
    'bfloat16': ml_dtypes.bfloat16, 'float8_e4m3fn': ml_dtypes.float8_e4m3fn,
    'float8_e5m2': ml_dtypes.float8_e5m2, 'float8_e4m3fnuz': ml_dtypes.float8_e4m3fnuz,
    'float8_e5m2fnuz': ml_dtypes.float8_e5m2fnuz, 'float8_e8m0fnu': ml_dtypes.float8_e8m0fnu,
    'int64': np.int64, 'int32': np.int32, 'int16': np.int16, 'int8': np.int8, 'uint8': np.uint8,
    'uint16': np.uint16, 'uint32': np.uint32, 'uint64': np.uint64, 'bool': np.bool_,
    'complex64': np.complex64, 'complex128': np.complex128,
}  # fmt: skip
_STORAGES = {
    'Float': 'float32', 'Double': 'float64', 'Half': 'float16', 'BFloat16': 'bfloat16',
    'Long': 'int64', 'Int': 'int32', 'Short': 'int16', 'Char': 'int8', 'Byte': 'uint8',
    'Bool': 'bool', 'Untyped': 'uint8', 'ComplexFloat': 'complex64', 'ComplexDouble': 'complex128',
    'QInt8': 'int8', 'QUInt8': 'uint8', 'QInt32': 'int32',
}  # fmt: skip
_DICTS = ('collections.OrderedDict', 'collections.defaultdict', 'builtins.dict', '__builtin__.dict')
_SETS = ('builtins.set', '__builtin__.set', 'builtins.frozenset', '__builtin__.frozenset')


class Storage(NamedTuple):
    """Numbers in the file: their key there, their type (an entry of _DTYPES) and how many."""

    key: str
    dtype: str
    size: int

    @property
    def nbytes(self) -> int:
        return self.size * np.dtype(_DTYPES[self.dtype]).itemsize


class Tensor(NamedTuple):
    """A view of a storage, in elements of its type."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Opaque:
    """A name in a pickle, or what a call of it would have made; never looked up or called."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: Any = None
        self.items: dict[Any, Any] = {}  # Where it is a kind of dictionary.


def load(file: BinaryIO, storages: dict[str, Storage] | None = None) -> Any:
    """Follow one pickle, from the file's position to behind it.

    Args:
      storages: gets the storages that the pickle names, by their keys.

    Raises:
      ValueError, IndexError, KeyError, TypeError, AttributeError: it is damaged.
    """
    with warnings.catch_warnings():
        # Text of old protocols may hold escapes that Python only warns of.
        warnings.simplefilter('ignore', DeprecationWarning)
        return _followed(pickletools.genops(file), {} if storages is None else storages)


def _followed(program: Iterator[Any], storages: dict[str, Storage]) -> Any:
    stack: list[Any] = []
    below: list[list[Any]] = []  # The stacks below each mark.
    memo: dict[int, Any] = {}
    argument: Any
    for count, (opcode, argument, _) in enumerate(program):
        name = opcode.name
        if count > _MOST_OPCODES:
            raise ValueError(f'a pickle of more than {_MOST_OPCODES} opcodes')
        if name == 'STOP':
            break
        if name == 'MARK':
            below.append(stack)
            stack = []
        elif name in _OF_MARK:
            items, stack = stack, below.pop()
            _OF_MARK[name](stack, items)
        elif name in ('PUT', 'BINPUT', 'LONG_BINPUT'):
            memo[argument] = stack[-1]
        elif name == 'MEMOIZE':
            memo[len(memo)] = stack[-1]
        elif name in ('GET', 'BINGET', 'LONG_BINGET'):
            stack.append(memo[argument])
        elif name == 'BINPERSID':
            made = _persistent(stack.pop())
            stack.append(made)
            if isinstance(made, Storage):
                storages[made.key] = made
        elif name in _OF_STACK:
            _OF_STACK[name](stack)
        elif name in ('GLOBAL', 'INST'):
            stack = below.pop() if name == 'INST' else stack
            stack.append(Opaque(argument.replace(' ', '.', 1)))
        elif name in _UNKNOWN:
            raise ValueError(f'opcode {name}, which PyTorch does not write')
        elif opcode.arg is not None and name not in ('PROTO', 'FRAME'):
            stack.append(argument)
    return stack.pop()


_UNKNOWN = ('EXT1', 'EXT2', 'EXT4', 'PERSID', 'NEXT_BUFFER', 'READONLY_BUFFER')


def _set(target: Any, pairs: list[Any]) -> None:
    target = target.items if isinstance(target, Opaque) else target
    if isinstance(target, dict):
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            # Hashing tuples of tuples takes exponential time, and no such key names a tensor.
            if isinstance(key, str | int):
                target[key] = value


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)


def _dict(items: list[Any]) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    _set(made, items)
    return made


# Opcodes that take all above the last mark, and those that take what is on the stack.
_OF_MARK: dict[str, Callable[[list[Any], list[Any]], None]] = {
    'POP_MARK': lambda stack, items: None,
    'TUPLE': lambda stack, items: stack.append(tuple(items)),
    'LIST': lambda stack, items: stack.append(items),
    'FROZENSET': lambda stack, items: stack.append(items),
    'DICT': lambda stack, items: stack.append(_dict(items)),
    'APPENDS': lambda stack, items: _extend(stack[-1], items),
    'ADDITEMS': lambda stack, items: _extend(stack[-1], items),
    'SETITEMS': lambda stack, items: _set(stack[-1], items),
    'OBJ': lambda stack, items: stack.append(Opaque(items[0].name)),
}


def _call(stack: list[Any], count: int) -> None:
    """Replace a function or class and its arguments by what a call would have made."""
    function, arguments, *_ = [stack.pop() for _ in range(count)][::-1]
    stack.append(_made(function.name, arguments))


def _build(stack: list[Any]) -> None:
    state = stack.pop()
    if isinstance(stack[-1], Opaque):
        stack[-1].state = state


def _append(stack: list[Any]) -> None:
    item = stack.pop()
    _extend(stack[-1], [item])


def _set_one(stack: list[Any]) -> None:
    value, key = stack.pop(), stack.pop()
    _set(stack[-1], [key, value])


def _joined(stack: list[Any], count: int) -> None:
    items = [stack.pop() for _ in range(count)]
    stack.append(tuple(reversed(items)))


def _named(stack: list[Any]) -> None:
    name, module = stack.pop(), stack.pop()
    stack.append(Opaque(f'{module}.{name}'))


_OF_STACK: dict[str, Callable[[list[Any]], None]] = {
    'POP': lambda stack: stack.__delitem__(-1),
    'DUP': lambda stack: stack.append(stack[-1]),
    'NONE': lambda stack: stack.append(None),
    'NEWTRUE': lambda stack: stack.append(True),
    'NEWFALSE': lambda stack: stack.append(False),
    'EMPTY_TUPLE': lambda stack: stack.append(()),
    'EMPTY_LIST': lambda stack: stack.append([]),
    'EMPTY_DICT': lambda stack: stack.append({}),
    'EMPTY_SET': lambda stack: stack.append([]),
    'TUPLE1': lambda stack: _joined(stack, 1),
    'TUPLE2': lambda stack: _joined(stack, 2),
    'TUPLE3': lambda stack: _joined(stack, 3),
    'APPEND': _append,
    'SETITEM': _set_one,
    'STACK_GLOBAL': _named,
    'REDUCE': lambda stack: _call(stack, 2),
    'NEWOBJ': lambda stack: _call(stack, 2),
    'NEWOBJ_EX': lambda stack: _call(stack, 3),
    'BUILD': _build,
}


def _persistent(pid: Any) -> Any:
    """What a persistent id stands for: a storage, or (in old files) a class with its source."""
    if isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == 'storage':
        _, kind, key, _, count, *view = pid
        dtype = _STORAGES.get(kind.name.rpartition('.')[2].removesuffix('Storage'))
        if dtype and isinstance(count, int) and count >= 0 and not any(view):
            return Storage(str(key), dtype, count)
    return Opaque('persistent') if not isinstance(pid, tuple) else Opaque(f'persistent {pid[0]}')


def _made(name: str, arguments: Any) -> Any:
    """What calling a function or class of this name would have made."""
    if name in _DICTS:
        pairs = arguments[0] if arguments and isinstance(arguments[0], list) else []
        return _dict([part for pair in pairs for part in pair])
    if name in (*_SETS, 'torch.Size'):
        return arguments[0] if arguments and isinstance(arguments[0], list | tuple) else []
    module, _, function = name.rpartition('.')
    if module in ('torch._utils', 'torch._tensor') and function.startswith('_rebuild_'):
        return _tensor(function, arguments) or Opaque(name)
    return Opaque(name)


def _tensor(function: str, arguments: Any) -> Any:
    """The tensor that one of torch's functions makes; None if it is not a plain dense one."""
    if function in ('_rebuild_parameter', '_rebuild_parameter_with_state'):
        return arguments[0] if isinstance(arguments[0], Tensor) else None
    if function == '_rebuild_from_type_v2':
        return _made(arguments[0].name, arguments[2])
    if function not in ('_rebuild_tensor', '_rebuild_tensor_v2', '_rebuild_tensor_v3'):
        return None
    storage, offset, shape, strides, *more = arguments
    if not isinstance(storage, Storage):
        return None
    dtype, marks = storage.dtype, more[2:]
    if function.endswith('_v3'):
        dtype, marks = more[2].name.removeprefix('torch.'), more[3:]
    if any(marks):  # Views whose numbers are the negative or conjugate of those stored.
        return None
    sizes = (offset, *shape, *strides)
    if dtype not in _DTYPES or not all(type(n) is int and n >= 0 for n in sizes):
        return None
    return Tensor(storage, dtype, offset, tuple(shape), tuple(strides))


def dense(tensor: Tensor, raw: bytes) -> np.ndarray:
    """The array of a tensor, as a view of its storage's bytes.

    Raises:
      ValueError: the tensor is not inside of its storage, or repeats parts of it.
    """
    numbers = np.frombuffer(raw, np.dtype(_DTYPES[tensor.dtype]))
    size = math.prod(tensor.shape)
    last = tensor.offset + sum(
        (n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True)
    )
    if (size and (last >= numbers.size or size > numbers.size)) or len(tensor.shape) > 16:
        raise ValueError(f'a tensor of shape {tensor.shape} in {numbers.size} numbers')
    if not size:
        return np.zeros(tensor.shape, numbers.dtype)
    # The stride of an axis of one element says nothing, and may be any number.
    strides = [
        stride * numbers.itemsize * (n > 1)
        for n, stride in zip(tensor.shape, tensor.strides, strict=True)
    ]
    return np.lib.stride_tricks.as_strided(
        numbers[tensor.offset :], tensor.shape, strides, writeable=False
    )


def sections(tree: Any) -> dict[str, dict[str, Any]]:
    """Find the dictionaries of tensors in what a file holds, and the modules.

    Returns:
      Dictionaries by the dotted keys that lead to each; '' is the outermost. Their values are
      tensors, or an Opaque of torch where a tensor is of a kind that is not read.
    """
    tables: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()

    def look(place: str, node: Any, depth: int) -> None:
        if id(node) in seen or depth > _DEEPEST:
            return
        seen.add(id(node))
        if isinstance(node, Opaque) and node.items:
            node = node.items
        if isinstance(node, Opaque) and isinstance(node.state, dict):
            if table := dict(_of_module(node, '', set())):
                tables[place] = table
        elif isinstance(node, dict):
            if table := {key: x for key, x in node.items() if isinstance(key, str) and _counts(x)}:
                tables[place] = table
            for key, value in node.items():
                if isinstance(key, str):
                    look(f'{place}{key}.', value, depth + 1)

    look('', tree, 0)
    return tables


def _counts(value: Any) -> bool:
    of_torch = isinstance(value, Opaque) and value.name.startswith(('torch._utils.', 'torch._ten'))
    return isinstance(value, Tensor) or of_torch


def _of_module(module: Opaque, prefix: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Names and tensors of a pickled module, as its `state_dict` would give them.

    An `nn.Module` has dictionaries of parameters, buffers and modules; TorchScript has all of them
    as attributes.
    """
    if id(module) in seen or len(seen) > 100_000 or prefix.count('.') > _DEEPEST:
        return
    seen.add(id(module))
    state = module.state if isinstance(module.state, dict) else {}
    parts = [state.get(part) for part in ('_parameters', '_buffers', '_modules')]
    tables = [part for part in parts if isinstance(part, dict)] or [state]
    passing = state.get('_non_persistent_buffers_set') or ()
    for table in tables:
        for name, value in table.items():
            if isinstance(value, Opaque) and not _counts(value):
                yield from _of_module(value, f'{prefix}{name}.', seen)
            elif _counts(value) and name not in passing:
                yield f'{prefix}{name}', value
