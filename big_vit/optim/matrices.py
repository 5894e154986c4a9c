"""Matrix views of parameters: which axes are inputs and outputs, which only stack layers.

Shampoo, SOAP, Muon and factored second moments treat a kernel as a matrix of inputs by outputs;
LARS and LAMB need to know which leading axes stack layers. Parameter names are those of the
models; any other kernel is assumed to follow Flax, with outputs last.
"""

import re
from typing import NamedTuple

# (regex that the end of a path must match, number of input axes, number of output axes).
RULES: tuple[tuple[str, int, int], ...] = (
    (r'(query|key|value)/kernel', 1, 2),
    (r'out/kernel', 2, 1),
    (r'embedding/kernel', 3, 1),
)

# Not hidden: parameters next to the data, the labels, or what stands for labels (kept on AdamW by
# arXiv 2502.16982).
_OUTSIDE = re.compile(r'(^|/)(embedding|head|head_dist|pool|prototypes)/')
_SCANNED = re.compile(r'(^|/)encoderblock/')


class Matrix(NamedTuple):
    """Number of [stack..., inputs..., outputs...] axes of an array that is a stack of matrices."""

    stack: int
    inputs: int
    outputs: int


def stacked_axes(name: str) -> int:
    """Number of leading axes that index scanned layers."""
    return 1 if _SCANNED.search(name) else 0


def matrix(name: str, ndim: int) -> Matrix | None:
    """Matrix view of a parameter; None for biases, norms, tokens and positions."""
    stack = stacked_axes(name)
    if not re.search(r'(^|/)kernel$', name):
        return None
    for pattern, inputs, outputs in RULES:
        if re.search(f'(^|/)({pattern})$', name) and ndim == stack + inputs + outputs:
            return Matrix(stack, inputs, outputs)
    return Matrix(stack, ndim - stack - 1, 1) if ndim - stack >= 2 else None


def is_hidden(name: str, ndim: int) -> bool:
    """Whether a parameter is a matrix between features: neither patch embedding nor classifier."""
    return matrix(name, ndim) is not None and not _OUTSIDE.search(name)
