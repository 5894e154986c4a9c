"""A traced JAX program as an ONNX graph of opset 17, which TensorRT, OpenVINO and browsers read.

Constants are computed here and become initialisers, under the path of the parameter that they come
from; a parameter may be laid out otherwise there, as the operators want it. What is broadcast stays
small until an operator needs all of it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from big_vit.errors import UserError

OPSET = 17
# The version of the file format that came with it; older runtimes read no newer one.
IR_VERSION = 8
BATCH = 'batch'
# Primitives that hold a program of their own, and the parameter that is it.
_CALLS = {
    'jit': 'jaxpr',
    'pjit': 'jaxpr',
    'closed_call': 'call_jaxpr',
    'core_call': 'call_jaxpr',
    'custom_jvp_call': 'call_jaxpr',
    'custom_vjp_call': 'call_jaxpr',
    'remat2': 'jaxpr',
    'checkpoint': 'jaxpr',
}

Shape = tuple[Any, ...]


@dataclass(frozen=True)
class Tensor:
    """A value of the graph.

    Attributes:
      full: its shape in the program, where the batch is symbolic.
      shape: that in the graph, which has 1 where the program repeats.
      name: in the graph; None for a constant that no node has asked for.
      value: of a constant, of `shape`.
      origin: the parameter that a constant is made of, or ''.
    """

    full: Shape
    shape: Shape
    dtype: np.dtype
    name: str | None = None
    value: np.ndarray | None = None
    origin: str = ''


def constant(value: Any, origin: str = '') -> Tensor:
    """Make a tensor that is known."""
    value = np.asarray(value)
    return Tensor(value.shape, value.shape, value.dtype, value=value, origin=origin)


Handler = Callable[['Graph', Any, list[Tensor]], list[Tensor]]


@dataclass
class Graph:
    """An ONNX graph in the making.

    Attributes:
      operators: what writes each primitive, by its name.
      functions: what writes whole functions of the model, by theirs; None declines.
      batch_input: an input whose first axis is the batch.
      place: the part of the model that is being written.
      taken: names that are in use.
    """

    operators: Mapping[str, Handler]
    functions: Mapping[str, Callable[['Graph', Any, list[Tensor]], Tensor | None]]
    nodes: list[Any] = field(default_factory=list)
    initialisers: dict[str, np.ndarray] = field(default_factory=dict)
    batch_input: str = ''
    place: str = ''
    taken: set[str] = field(default_factory=set)
    _named: dict[Any, str] = field(default_factory=dict)
    _transposed: dict[str, tuple[Tensor, tuple[int, ...]]] = field(default_factory=dict)
    _batch: Tensor | None = None

    def name(self, tensor: Tensor) -> str:
        """Return the name of a tensor in the graph; constants become initialisers."""
        if tensor.name is not None:
            return tensor.name
        assert tensor.value is not None
        value = tensor.value
        # Numbers that occur often are kept once; arrays are the same if they are one object.
        content = value.tobytes() if value.nbytes <= 64 else id(value)
        key = (tensor.origin, value.dtype.str, value.shape, content)
        if key not in self._named:
            name = self._fresh(tensor.origin or 'constant')
            self._named[key] = name
            self.initialisers[name] = value
        return self._named[key]

    def _fresh(self, stem: str) -> str:
        name, number = stem, 0
        while name in self.taken:
            number += 1
            name = f'{stem}_{number}'
        self.taken.add(name)
        return name

    def emit(
        self,
        kind: str,
        inputs: Sequence[Tensor],
        shape: Shape,
        full: Shape | None = None,
        dtype: Any = None,
        **attributes: Any,
    ) -> Tensor:
        """Add a node, and return its output of this shape."""
        return self.emit_all(kind, inputs, [shape], full, dtype, **attributes)[0]

    def emit_all(
        self,
        kind: str,
        inputs: Sequence[Tensor],
        shapes: Sequence[Shape],
        full: Shape | None = None,
        dtype: Any = None,
        **attributes: Any,
    ) -> list[Tensor]:
        """Add a node, and return its outputs of these shapes."""
        from onnx import helper

        dtype = np.dtype(inputs[0].dtype if dtype is None else dtype)
        label = self._fresh('/'.join(filter(None, (self.place, kind))))
        names = [f'{label}:{i}' if i else f'{label}:out' for i in range(len(shapes))]
        self.nodes.append(
            helper.make_node(kind, [self.name(x) for x in inputs], names, label, **attributes)
        )
        return [
            Tensor(shape if full is None else full, shape, dtype, name)
            for name, shape in zip(names, shapes, strict=True)
        ]

    def reshape(self, x: Tensor, shape: Shape) -> Tensor:
        """Reshape a tensor that is not broadcast, or has the same dimensions but for ones."""
        if x.shape == shape:
            return x
        if x.value is not None:
            value = x.value.reshape(shape)
            return Tensor(shape, shape, x.dtype, value=value, origin=x.origin)
        symbolic = [dim for dim in shape if not isinstance(dim, int)]
        if len(symbolic) > 1:
            raise self.unsupported(f'a reshape to {shape}')
        target = constant(np.array([d if isinstance(d, int) else -1 for d in shape], np.int64))
        return self.emit('Reshape', [x, target], shape, dtype=x.dtype)

    def transpose(self, x: Tensor, order: Sequence[int]) -> Tensor:
        """Permute the axes; what is undone at once is not written."""
        order = tuple(int(axis) for axis in order)
        if order == tuple(range(len(order))):
            return x
        full, shape = (tuple(of[axis] for axis in order) for of in (x.full, x.shape))
        if x.value is not None:
            value = np.ascontiguousarray(x.value.transpose(order))
            return Tensor(full, shape, x.dtype, value=value, origin=x.origin)
        if x.name in self._transposed:
            before, first = self._transposed[x.name]
            return self.transpose(before, [first[axis] for axis in order])
        result = self.emit('Transpose', [x], shape, full, perm=order)
        assert result.name is not None
        self._transposed[result.name] = (x, order)
        return result

    def whole(self, x: Tensor) -> Tensor:
        """Write out what is broadcast."""
        if x.shape == x.full:
            return x
        if x.value is not None and all(isinstance(dim, int) for dim in x.full):
            value = np.ascontiguousarray(np.broadcast_to(x.value, x.full))
            return Tensor(x.full, x.full, x.dtype, value=value, origin=x.origin)
        return self.emit('Expand', [x, self._sizes(x.full)], x.full, dtype=x.dtype)

    def _sizes(self, shape: Shape) -> Tensor:
        """The numbers of a shape, of which the batch is known only when the graph runs."""
        if self._batch is None:
            source = Tensor((), (), np.dtype(np.int64), self.batch_input)
            self._batch = self.emit('Shape', [source], (1,), start=0, end=1, dtype=np.int64)
        parts, known = [], []
        for dim in shape:
            if isinstance(dim, int):
                known.append(dim)
                continue
            if str(dim) != BATCH:
                raise self.unsupported(f'a size of {dim}')
            parts += [constant(np.array(known, np.int64))] if known else []
            parts, known = [*parts, self._batch], []
        parts += [constant(np.array(known, np.int64))] if known else []
        return self.emit('Concat', parts, (len(shape),), axis=0, dtype=np.int64)

    def unsupported(self, what: str) -> UserError:
        """Say what ONNX export does not write, and where the model has it."""
        where = f' of {self.place}' if self.place else ''
        return UserError(
            f'--to onnx: there is no way to write {what}{where}; take --to stablehlo, which holds '
            'any model'
        )

    def run(self, jaxpr: Any, constants: Sequence[Any], inputs: Sequence[Tensor]) -> list[Tensor]:
        """Write a program, and return its results."""
        jaxpr = _without_dead_code(jaxpr)
        known = dict(zip(jaxpr.constvars, map(constant, constants), strict=True))
        known |= dict(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Tensor:
            return constant(atom.val) if isinstance(atom, core.Literal) else known[atom]

        outer = self.place
        for equation in jaxpr.eqns:
            scopes = str(equation.source_info.name_stack).split('/')
            # Scopes of einsum are its equations.
            self.place = '/'.join(s for s in (outer, *scopes) if s and '->' not in s)
            results = self._equation(equation, [read(atom) for atom in equation.invars])
            known.update(zip(equation.outvars, results, strict=True))
        self.place = outer
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: Any, inputs: list[Tensor]) -> list[Tensor]:
        kind, params = equation.primitive.name, equation.params
        if kind in _CALLS:
            inner = params[_CALLS[kind]]
            program, constants = getattr(inner, 'jaxpr', inner), getattr(inner, 'consts', ())
            write = self.functions.get(program.debug_info.func_name)
            if write is not None and (special := write(self, program, inputs)) is not None:
                return [special]
            return self.run(program, constants, inputs)
        folded = self._folded(equation, inputs)
        if folded is not None:
            return folded
        if kind not in self.operators:
            raise self.unsupported(f'the operation {kind!r}')
        return self.operators[kind](self, equation, inputs)

    def _folded(self, equation: Any, inputs: list[Tensor]) -> list[Tensor] | None:
        """Compute what depends on no input; None if it does, or is nothing but repetition."""
        shapes = [out.aval.shape for out in equation.outvars]
        known = all(x.value is not None for x in inputs)
        sizes = [dim for of in (*shapes, *(x.full for x in inputs)) for dim in of]
        if (
            not known
            or equation.primitive.name == 'broadcast_in_dim'
            or not all(isinstance(dim, int) for dim in sizes)
        ):
            return None
        values = [jnp.asarray(np.broadcast_to(_value(x), x.full)) for x in inputs]
        results = equation.primitive.bind(*values, **equation.params)
        results = results if equation.primitive.multiple_results else [results]
        origins = {x.origin for x in inputs if x.origin}
        origin = origins.pop() if len(origins) == 1 else ''
        return [constant(result, origin) for result in results]


def _value(x: Tensor) -> np.ndarray:
    assert x.value is not None
    return x.value


def _without_dead_code(jaxpr: Any) -> Any:
    from jax.interpreters.partial_eval import dce_jaxpr

    return dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)[0]


def broadcast(*shapes: Shape) -> Shape:
    """The common shape of operands of one operator, as NumPy broadcasts them."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]

    def common(dims: Sequence[Any]) -> Any:
        return next((dim for dim in dims if not (isinstance(dim, int) and dim == 1)), 1)

    return tuple(common(dims) for dims in zip(*padded, strict=True))


def size(shape: Shape) -> Any:
    return math.prod(shape) if shape else 1


def make_model(
    function: Callable[..., dict[str, jax.Array]],
    params: Mapping[str, np.ndarray],
    inputs: Mapping[str, tuple[Shape, np.dtype]],
    outputs: Sequence[str],
    metadata: Mapping[str, str],
    tensor: Callable[[np.ndarray, str], Any] | None = None,
) -> Any:
    """Write a function of (parameters by path, inputs by name) as an ONNX model.

    Args:
      function: returns `outputs` by name, each with the batch first.
      inputs: shape without the batch, and type.
      metadata: texts to put into the file.
      tensor: makes the entry of an initialiser, of (value, name); by default one that holds it.

    Raises:
      UserError: an operation of it cannot be written.
    """
    from onnx import helper, numpy_helper

    from big_vit import __version__
    from big_vit.deployment import operators

    (batch,) = jax.export.symbolic_shape(BATCH)
    arrays = {name: jax.ShapeDtypeStruct((batch, *s), d) for name, (s, d) in inputs.items()}
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in params.items()}
    closed = jax.make_jaxpr(function)(shapes, arrays)
    first, taken = next(iter(inputs)), {*inputs, *outputs}
    graph = Graph(operators.OPERATORS, operators.FUNCTIONS, batch_input=first, taken=taken)
    # JAX orders dictionaries by their keys.
    given = [constant(params[name], name) for name in sorted(params)]
    given += [Tensor(arrays[n].shape, arrays[n].shape, arrays[n].dtype, n) for n in sorted(arrays)]
    values = graph.run(closed.jaxpr, closed.consts, given)
    results = dict(zip(sorted(outputs), values, strict=True))
    for name, result in results.items():
        source = graph.name(graph.whole(result))
        graph.nodes.append(helper.make_node('Identity', [source], [name], f'output/{name}'))

    nodes, used = _needed(graph.nodes, outputs)
    initialisers = [
        (tensor or numpy_helper.from_array)(value, name)
        for name, value in graph.initialisers.items()
        if name in used
    ]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            'big_vit',
            [_declared(name, array.dtype, array.shape) for name, array in arrays.items()],
            [_declared(name, results[name].dtype, results[name].full) for name in outputs],
            initialisers,
        ),
        producer_name='big_vit',
        producer_version=__version__,
        opset_imports=[helper.make_opsetid('', OPSET)],
        ir_version=IR_VERSION,
    )
    helper.set_model_props(model, dict(metadata))
    return model


def _declared(name: str, dtype: Any, shape: Shape) -> Any:
    from onnx import helper

    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    sizes = [dim if isinstance(dim, int) else str(dim) for dim in shape]
    return helper.make_tensor_value_info(name, kind, sizes)


def _needed(nodes: Sequence[Any], outputs: Sequence[str]) -> tuple[list[Any], set[str]]:
    """Return the nodes that outputs depend on, in their order, and the names that they read."""
    names, kept = set(outputs), []
    for node in reversed(nodes):
        if names.intersection(node.output):
            names.update(node.input)
            kept.append(node)
    return kept[::-1], names
