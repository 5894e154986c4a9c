"""Primitives of JAX, and functions of our layers, as operators of ONNX.

A handler gets the graph, the equation and its inputs, and returns the outputs. Operators that NumPy
would broadcast take inputs as they are; others need them whole.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jax.extend import core
from jax.lax import GatherScatterMode

from big_vit.deployment.graph import Graph, Handler, Tensor, broadcast, constant, size


def _elementwise(graph: Graph, kind: str, *inputs: Tensor, dtype: Any = None) -> Tensor:
    shape = broadcast(*(x.shape for x in inputs))
    full = broadcast(*(x.full for x in inputs))
    return graph.emit(kind, inputs, shape, full, dtype)


def _plain(kind: str, dtype: Any = None) -> Handler:
    def write(graph: Graph, equation: Any, inputs: list[Tensor]) -> list[Tensor]:
        return [_elementwise(graph, kind, *inputs, dtype=dtype)]

    return write


def _number(x: Tensor, value: float) -> Tensor:
    return constant(np.array(value, x.dtype))


def _composed(build: Callable[[Graph, Tensor], Tensor]) -> Handler:
    return lambda graph, equation, inputs: [build(graph, inputs[0])]


def _rsqrt(graph: Graph, x: Tensor) -> Tensor:
    return _elementwise(graph, 'Reciprocal', _elementwise(graph, 'Sqrt', x))


def _square(graph: Graph, x: Tensor) -> Tensor:
    return _elementwise(graph, 'Mul', x, x)


def _erfc(graph: Graph, x: Tensor) -> Tensor:
    return _elementwise(graph, 'Sub', _number(x, 1), _elementwise(graph, 'Erf', x))


def _integer_pow(graph: Graph, equation: Any, inputs: list[Tensor]) -> list[Tensor]:
    x, power = inputs[0], equation.params['y']
    if not 1 <= power <= 4:
        return [_elementwise(graph, 'Pow', x, _number(x, power))]
    result = x
    for _ in range(power - 1):
        result = _elementwise(graph, 'Mul', result, x)
    return [result]


def _ne(graph: Graph, equation: Any, inputs: list[Tensor]) -> list[Tensor]:
    equal = _elementwise(graph, 'Equal', *inputs, dtype=bool)
    return [_elementwise(graph, 'Not', equal)]


def _select(graph: Graph, equation: Any, inputs: list[Tensor]) -> list[Tensor]:
    if len(inputs) != 3 or inputs[0].dtype != bool:
        raise graph.unsupported('a selection among more than two')
    which, otherwise, then = inputs
    return [_elementwise(graph, 'Where', which, then, otherwise, dtype=then.dtype)]


def _clamp(graph: Graph, equation: Any, inputs: list[Tensor]) -> list[Tensor]:
    low, x, high = inputs
    return [_elementwise(graph, 'Min', _elementwise(graph, 'Max', x, low), high)]


def _same(graph: Graph, equation: Any, inputs: list[Tensor]) -> list[Tensor]:
    return inputs


def _cast(graph: Graph, x: Tensor, dtype: Any) -> Tensor:
    from onnx import helper

    if x.dtype == dtype:
        return x
    to = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return graph.emit('Cast', [x], x.shape, x.full, dtype, to=to)


def _convert(graph: Graph, equation: Any, inputs: list[Tensor]) -> list[Tensor]:
    return [_cast(graph, inputs[0], equation.params['new_dtype'])]


def _reshape(graph: Graph, equation: Any, inputs: list[Tensor]) -> list[Tensor]:
    return [graph.reshape(graph.whole(inputs[0]), equation.outvars[0].aval.shape)]


def _transpose(graph: Graph, equation: Any, inputs: list[Tensor]) -> list[Tensor]:
    return [graph.transpose(inputs[0], equation.params['permutation'])]


def _broadcast_in_dim(graph: Graph, equation: Any, inputs: list[Tensor]) -> list[Tensor]:
    """Ones where the operand repeats; operators broadcast them, and others expand them."""
    x, full = inputs[0], equation.outvars[0].aval.shape
    shape = [1] * len(full)
    for axis, dim in zip(equation.params['broadcast_dimensions'], x.shape, strict=True):
        shape[axis] = dim
    y = graph.reshape(x, tuple(shape))
    return [Tensor(full, tuple(shape), y.dtype, y.name, y.value, y.origin)]


def _concatenate(graph: Graph, equation: Any, inputs: list[Tensor]) -> list[Tensor]:
    shape, axis = equation.outvars[0].aval.shape, equation.params['dimension']
    return [graph.emit('Concat', [graph.whole(x) for x in inputs], shape, axis=axis)]


def _pad(graph: Graph, equation: Any, inputs: list[Tensor]) -> list[Tensor]:
    x, value = inputs
    low, high, between = zip(*equation.params['padding_config'], strict=True)
    if min(*low, *high) < 0 or any(between):
        raise graph.unsupported('a padding that cuts or spreads')
    widths = constant(np.array([*low, *high], np.int64))
    shape = equation.outvars[0].aval.shape
    return [graph.emit('Pad', [graph.whole(x), widths, value], shape, mode='constant')]


def _cut(
    graph: Graph, x: Tensor, starts: list[int], shape: list[Any], steps: list[int] | None = None
) -> Tensor:
    """The part of a tensor from `starts` on, of this shape."""
    x = graph.whole(x)
    steps = steps or [1] * len(starts)
    axes = [i for i, dim in enumerate(shape) if starts[i] or steps[i] > 1 or dim != x.shape[i]]
    if not axes:
        return x
    ends = [starts[i] + (shape[i] - 1) * steps[i] + 1 for i in axes]
    numbers = ([starts[i] for i in axes], ends, axes, [steps[i] for i in axes])
    parts = [constant(np.array(n, np.int64)) for n in numbers]
    return graph.emit('Slice', [x, *parts], tuple(shape), dtype=x.dtype)


def _slice(graph: Graph, equation: Any, inputs: list[Tensor]) -> list[Tensor]:
    params, shape = equation.params, list(equation.outvars[0].aval.shape)
    steps = params['strides']
    return [_cut(graph, inputs[0], list(params['start_indices']), shape, steps and list(steps))]


def _split(graph: Graph, equation: Any, inputs: list[Tensor]) -> list[Tensor]:
    shapes = [out.aval.shape for out in equation.outvars]
    sizes = constant(np.array(equation.params['sizes'], np.int64))
    x = graph.whole(inputs[0])
    return graph.emit_all('Split', [x, sizes], shapes, axis=equation.params['axis'])


def _gather(graph: Graph, equation: Any, inputs: list[Tensor]) -> list[Tensor]:
    """A window at a known place, or rows of a table."""
    x, index = inputs
    params, numbers = equation.params, equation.params['dimension_numbers']
    sizes, shape = list(params['slice_sizes']), equation.outvars[0].aval.shape
    if index.value is not None and len(index.full) == 1:
        starts = [0] * len(sizes)
        for axis, start in zip(numbers.start_index_map, index.value.tolist(), strict=True):
            starts[axis] = start
            if not 0 <= start <= x.full[axis] - sizes[axis]:
                raise graph.unsupported('a window beyond the border')
        return [graph.reshape(_cut(graph, x, starts, sizes), shape)]
    rows = (
        numbers.start_index_map == numbers.collapsed_slice_dims == (0,)
        and sizes == [1, *x.full[1:]]
        and numbers.offset_dims == tuple(range(len(index.full) - 1, len(shape)))
        and params['mode'] in (GatherScatterMode.CLIP, GatherScatterMode.PROMISE_IN_BOUNDS)
    )
    if not rows:
        raise graph.unsupported("an operation 'gather' other than rows of a table")
    which = graph.reshape(graph.whole(index), index.full[:-1])
    which = _elementwise(graph, 'Max', which, _number(which, 0))
    which = _elementwise(graph, 'Min', which, _number(which, x.full[0] - 1))
    return [graph.emit('Gather', [graph.whole(x), which], shape, axis=0)]


def _reduce(kind: str) -> Handler:
    def write(graph: Graph, equation: Any, inputs: list[Tensor]) -> list[Tensor]:
        shape = equation.outvars[0].aval.shape
        axes = [int(axis) for axis in equation.params['axes']]
        x = graph.whole(inputs[0])
        if kind == 'ReduceSum':
            wanted = [x, constant(np.array(axes, np.int64))]
            return [graph.emit(kind, wanted, shape, keepdims=0)]
        if x.dtype != bool:
            return [graph.emit(kind, [x], shape, axes=axes, keepdims=0)]
        numbers = graph.emit(kind, [_cast(graph, x, np.int32)], shape, axes=axes, keepdims=0)
        return [_cast(graph, numbers, bool)]

    return write


def _dot_general(graph: Graph, equation: Any, inputs: list[Tensor]) -> list[Tensor]:
    """A matrix product: axes that are kept first, those that are summed inside."""
    (left_sum, right_sum), (left_batch, right_batch) = equation.params['dimension_numbers']
    left, right = (graph.whole(x) for x in inputs)
    if len(left_sum) > 1:  # Any order will do, and one of them may be as the axes lie.
        order = sorted(range(len(left_sum)), key=lambda i: left_sum[i])
        left_sum, right_sum = ([axes[i] for i in order] for axes in (left_sum, right_sum))
    left_free = [i for i in range(len(left.full)) if i not in (*left_sum, *left_batch)]
    right_free = [i for i in range(len(right.full)) if i not in (*right_sum, *right_batch)]
    left = graph.transpose(left, (*left_batch, *left_free, *left_sum))
    right = graph.transpose(right, (*right_batch, *right_sum, *right_free))
    count = len(left_batch)
    batch, inner = left.shape[:count], size(right.shape[count : count + len(right_sum)])
    rows = left.shape[count : count + len(left_free)]
    columns = right.shape[count + len(right_sum) :]
    # Without a batch, any number of rows may be beside each other.
    lead = (*batch, size(rows)) if count or not rows else rows
    left = graph.reshape(left, (*lead, inner))
    right = graph.reshape(right, (*batch, inner, size(columns)))
    product = graph.emit('MatMul', [left, right], (*lead, size(columns)))
    return [graph.reshape(product, (*batch, *rows, *columns))]


def _convolution(graph: Graph, equation: Any, inputs: list[Tensor]) -> list[Tensor]:
    params, numbers = equation.params, equation.params['dimension_numbers']
    if set(params['lhs_dilation']) != {1} or params['batch_group_count'] != 1:
        raise graph.unsupported('a transposed convolution')
    x, kernel = (graph.whole(tensor) for tensor in inputs)
    full = equation.outvars[0].aval.shape
    result = graph.emit(
        'Conv',
        [graph.transpose(x, numbers.lhs_spec), graph.transpose(kernel, numbers.rhs_spec)],
        tuple(full[axis] for axis in numbers.out_spec),
        strides=list(params['window_strides']),
        pads=_pads(params['padding']),
        dilations=list(params['rhs_dilation']),
        group=params['feature_group_count'],
    )
    return [graph.transpose(result, np.argsort(numbers.out_spec).tolist())]


def _pads(padding: Any) -> list[int]:
    low, high = zip(*padding, strict=True)
    return [int(n) for n in (*low, *high)]


def _max_pool(graph: Graph, equation: Any, inputs: list[Tensor]) -> list[Tensor]:
    params, full = equation.params, equation.outvars[0].aval.shape
    window, last = params['window_dimensions'], len(full) - 1
    plain = {*params['base_dilation'], *params['window_dilation']} == {1}
    if not plain or window[0] != 1 or window[last] != 1 or any(map(any, params['padding'][::last])):
        raise graph.unsupported('a pooling over examples or channels')
    to, inside = (0, last, *range(1, last)), slice(1, last)
    result = graph.emit(
        'MaxPool',
        [graph.transpose(graph.whole(inputs[0]), to)],
        tuple(full[axis] for axis in to),
        kernel_shape=list(window[inside]),
        strides=list(params['window_strides'][inside]),
        pads=_pads(params['padding'][inside]),
    )
    return [graph.transpose(result, np.argsort(to).tolist())]


OPERATORS: dict[str, Handler] = {
    **{
        name: _plain(kind)
        for name, kind in {
            'abs': 'Abs', 'add': 'Add', 'add_any': 'Add', 'and': 'And', 'ceil': 'Ceil',
            'cos': 'Cos', 'div': 'Div', 'erf': 'Erf', 'exp': 'Exp', 'floor': 'Floor', 'log': 'Log',
            'logistic': 'Sigmoid', 'max': 'Max', 'min': 'Min', 'mul': 'Mul', 'neg': 'Neg',
            'not': 'Not', 'or': 'Or', 'pow': 'Pow', 'sign': 'Sign', 'sin': 'Sin', 'sqrt': 'Sqrt',
            'sub': 'Sub', 'tanh': 'Tanh', 'xor': 'Xor',
        }.items()
    },
    **{
        name: _plain(kind, bool)
        for name, kind in {
            'eq': 'Equal', 'ge': 'GreaterOrEqual', 'gt': 'Greater', 'le': 'LessOrEqual',
            'lt': 'Less',
        }.items()
    },
    **dict.fromkeys(('copy', 'copy_p', 'name', 'optimization_barrier', 'stop_gradient'), _same),
    'broadcast_in_dim': _broadcast_in_dim,
    'clamp': _clamp,
    'concatenate': _concatenate,
    'conv_general_dilated': _convolution,
    'convert_element_type': _convert,
    'dot_general': _dot_general,
    'erfc': _composed(_erfc),
    'gather': _gather,
    'integer_pow': _integer_pow,
    'ne': _ne,
    'pad': _pad,
    'reduce_and': _reduce('ReduceMin'),
    'reduce_max': _reduce('ReduceMax'),
    'reduce_min': _reduce('ReduceMin'),
    'reduce_or': _reduce('ReduceMax'),
    'reduce_sum': _reduce('ReduceSum'),
    'reduce_window_max': _max_pool,
    'reshape': _reshape,
    'rsqrt': _composed(_rsqrt),
    'select_n': _select,
    'slice': _slice,
    'split': _split,
    'square': _composed(_square),
    'squeeze': _reshape,
    'transpose': _transpose,
}  # fmt: skip


def _layer_norm(graph: Graph, program: Any, inputs: list[Tensor]) -> Tensor | None:
    """`layers.layer_norm`; its epsilon is the number that is added before the root."""
    sums = {out: eqn for eqn in program.eqns for out in eqn.outvars if eqn.primitive.name == 'add'}
    roots = [eqn.invars[0] for eqn in program.eqns if eqn.primitive.name == 'rsqrt']
    if len(roots) != 1 or roots[0] not in sums:
        return None
    numbers = [atom.val for atom in sums[roots[0]].invars if isinstance(atom, core.Literal)]
    if len(numbers) != 1 or len(inputs) != 3:
        return None
    x = graph.whole(inputs[0])
    return graph.emit(
        'LayerNormalization', [x, *inputs[1:]], x.shape, axis=-1, epsilon=float(numbers[0])
    )


def _attend(graph: Graph, program: Any, inputs: list[Tensor]) -> Tensor:
    """`layers.attend`: [batch, tokens, heads, features] each."""
    query, key, value = (graph.whole(x) for x in inputs)
    features = query.shape[-1]
    query = _elementwise(graph, 'Mul', query, _number(query, features**-0.5))
    query, value = (graph.transpose(x, (0, 2, 1, 3)) for x in (query, value))
    key = graph.transpose(key, (0, 2, 3, 1))
    batch = broadcast(query.shape[:2], key.shape[:2])
    square = (*batch, query.shape[2], key.shape[3])
    logits = graph.emit('MatMul', [query, key], square)
    weights = graph.emit('Softmax', [logits], square, axis=-1)
    mixed = graph.emit('MatMul', [weights, value], (*batch, query.shape[2], value.shape[3]))
    return graph.transpose(mixed, (0, 2, 1, 3))


def _relu(graph: Graph, program: Any, inputs: list[Tensor]) -> Tensor:
    return _elementwise(graph, 'Relu', inputs[0])


FUNCTIONS: dict[str, Callable[[Graph, Any, list[Tensor]], Tensor | None]] = {
    'attend': _attend,
    'layer_norm': _layer_norm,
    'relu': _relu,
}
