"""Which parameters are matrices, along which axes, and which axes only stack layers.

Shampoo, SOAP, Muon and factored second moments treat a kernel as a matrix of inputs by
outputs; LARS and LAMB need to know which leading axes hold several layers. The names are
those of the models; a kernel of another name is taken as flax writes it, outputs last.
"""

import re
from typing import NamedTuple

# (regex that the end of a path must match, number of input axes, number of output axes).
RULES: tuple[tuple[str, int, int], ...] = (
    (r'(query|key|value)/kernel', 1, 2),
    (r'out/kernel', 2, 1),
    (r'embedding/kernel', 3, 1),
)

# Not hidden: what meets the data or the labels (arXiv 2502.16982 keeps these on AdamW).
_OUTSIDE = re.compile(r'(^|/)(embedding|head|head_dist|pool)/')
_SCANNED = re.compile(r'(^|/)encoderblock/')


class Matrix(NamedTuple):
    """How an array of axes [stack..., inputs..., outputs...] is a stack of matrices."""

    stack: int
    inputs: int
    outputs: int


def stacked_axes(name: str) -> int:
    """Leading axes that hold one entry for each scanned layer."""
    return 1 if _SCANNED.search(name) else 0


def matrix(name: str, ndim: int) -> Matrix | None:
    """The matrix that a parameter is; None for biases, norms, tokens and positions."""
    stack = stacked_axes(name)
    if not re.search(r'(^|/)kernel$', name):
        return None
    for pattern, inputs, outputs in RULES:
        if re.search(f'(^|/)({pattern})$', name) and ndim == stack + inputs + outputs:
            return Matrix(stack, inputs, outputs)
    return Matrix(stack, ndim - stack - 1, 1) if ndim - stack >= 2 else None


def is_hidden(name: str, ndim: int) -> bool:
    """Whether it is a matrix between features: neither patch embedding nor classifier."""
    return matrix(name, ndim) is not None and not _OUTSIDE.search(name)
