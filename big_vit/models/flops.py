"""Floating-point operations of matrix products and convolutions, counted in a traced program.

A multiply-add counts as two. What rematerialisation computes again does not count (it is not in
the forward program; arXiv 2204.02311, MFU), nor do norms, activations and the softmax. XLA's own
`cost_analysis` counts a scanned layer once, which is why this exists.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def count(function: Callable[..., Any], *args: Any) -> int:
    """Operations of one call, for arguments that may be `jax.ShapeDtypeStruct`s."""
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    return sum(_operations(equation) for equation in jaxpr.eqns)


def _operations(equation: core.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if params.get('name') == 'chosen':  # A way to index, see `tokenizers.chosen`.
        return 0
    if name == 'dot_general':
        (contracted, _), _ = params['dimension_numbers']
        left = _shape(equation.invars[0])
        inner = math.prod(left[axis] for axis in contracted)
        return 2 * inner * math.prod(_shape(equation.outvars[0]))
    if name == 'conv_general_dilated':
        kernel = _shape(equation.invars[1])
        out_channels = kernel[params['dimension_numbers'].rhs_spec[0]]
        return 2 * math.prod(_shape(equation.outvars[0])) * math.prod(kernel) // out_channels
    if name == 'cond':
        return max(_count(branch.jaxpr) for branch in params['branches'])
    times = params['length'] if name == 'scan' else 1
    return times * sum(_count(jaxpr) for jaxpr in _inner(params))


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _inner(params: dict[str, Any]) -> list[core.Jaxpr]:
    """Programs that an equation calls: bodies of loops, and of functions with own derivatives."""
    found = []
    for name, value in params.items():
        if name in ('jvp_jaxpr_fun', 'fwd_jaxpr_thunk', 'bwd', 'num_consts'):
            continue
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                found.append(item)
    return found
