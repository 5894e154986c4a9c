"""Inverse roots of positive semi-definite matrices, by products of matrices or by eigenvalues.

Everything is relative to the largest eigenvalue, so scaling a matrix only scales its root.
The error returned is that of the result, |X^p A - 1|: an iteration's own residual stays
small where its products are too coarse, and says nothing.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

METHODS = ('newton', 'eigh')

# Of a power iteration on four vectors, which finds the largest eigenvalue to some percent.
_POWER_STEPS = 20
# Above the largest eigenvalue as estimated; Newton diverges beyond (1 + p) / 2 times it.
_MARGIN = 1.1


def product(a: Float[Array, '*n i j'], b: Float[Array, '*n j k']) -> Float[Array, '*n i k']:
    """In full precision: on TPUs a product's default, one pass of bfloat16, makes roots diverge."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _largest_eigenvalue(a: Float[Array, '*n d d']) -> Float[Array, '*n 1 1']:
    def step(_: Int[Array, ''], v: Array) -> Array:
        v = product(a, v)
        length = jnp.sqrt(jnp.square(v).sum(-2, keepdims=True))
        return v / jnp.where(length > 0, length, 1)

    start = jax.random.normal(jax.random.key(0), (a.shape[-1], 4), a.dtype)
    start = jnp.broadcast_to(start, (*a.shape[:-1], 4))
    v = jax.lax.fori_loop(0, _POWER_STEPS, step, start)
    lengths = jnp.sqrt(jnp.square(product(a, v)).sum(-2, keepdims=True))
    return lengths.max(-1, keepdims=True)


def normalised(
    a: Float[Array, '*n d d'], ridge: Float[Array, '*n']
) -> tuple[Float[Array, '*n d d'], Float[Array, '*n']]:
    """((a + ridge * its largest eigenvalue) / scale, scale): eigenvalues are up to 1.

    The scale of a matrix of zeros is 0.
    """
    a, trace = _of_trace_one(a)
    return _ridged(a, _largest_eigenvalue(a)[..., 0, 0], trace, ridge)


def _of_trace_one(a: Float[Array, '*n d d']) -> tuple[Float[Array, '*n d d'], Float[Array, '*n']]:
    a = (a + jnp.swapaxes(a, -1, -2)) / 2
    trace = jnp.trace(a, axis1=-2, axis2=-1)
    return a / jnp.where(trace > 0, trace, 1)[..., None, None], trace


def _ridged(
    a: Float[Array, '*n d d'],
    largest: Float[Array, '*n'],
    trace: Float[Array, '*n'],
    ridge: Float[Array, '*n'],
) -> tuple[Float[Array, '*n d d'], Float[Array, '*n']]:
    a = a / jnp.where(largest > 0, largest, 1)[..., None, None]
    a = (a + ridge[..., None, None] * _eye(a)) / (1 + ridge)[..., None, None]
    return a, trace * largest * (1 + ridge)


def _eye(a: Float[Array, '*n d d']) -> Float[Array, '*n d d']:
    return jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)


def newton_steps(p: int, ridge: float) -> int:
    """How many steps a matrix of smallest eigenvalue `ridge`, and largest one, takes at most.

    Small eigenvalues grow by (1 + 1/p)^p a step, up to 1; then the number of right digits
    doubles in each of the last six.
    """
    start = ridge * (1 + p) / (2 * _MARGIN)
    return max(math.ceil(math.log(1 / start) / (p * math.log1p(1 / p))), 0) + 6


def newton_start(a: Float[Array, '*n d d'], p: int) -> tuple[Array, Array, Array]:
    """(M, X, error) of the coupled Newton iteration for A^(-1/p), A as of `normalised`.

    X^p A = M throughout, and M tends to 1. Higham 2008, Functions of Matrices, (7.18).
    """
    z = (1 + p) / (2 * _MARGIN)
    m, x = z * a, z ** (1 / p) * _eye(a)
    return m, x, _length(m - _eye(m))


def _length(x: Float[Array, '*n d d']) -> Float[Array, '*n']:
    # A largest entry can grow while all eigenvalues come nearer: 5 % of 4x4 matrices of rank 1.
    length = jnp.sqrt(jnp.square(x).sum((-1, -2)))
    return jnp.where(jnp.isfinite(length), length, jnp.inf)


def newton_step(state: tuple[Array, Array, Array], p: int) -> tuple[Array, Array, Array]:
    """One step; a matrix whose error would grow again stays as it is."""
    m, x, error = state
    t = ((1 + p) * _eye(m) - m) / p
    new = product(_power(t, p), m)
    new = (new + jnp.swapaxes(new, -1, -2)) / 2
    now = _length(new - _eye(new))
    better = now < 1.2 * error
    keep = better[..., None, None]
    return (
        jnp.where(keep, new, m),
        jnp.where(keep, product(x, t), x),
        jnp.where(better, now, error),
    )


def _power(t: Float[Array, '*n d d'], p: int) -> Float[Array, '*n d d']:
    result = None
    while p:
        if p % 2:
            result = t if result is None else product(result, t)
        p //= 2
        if p:
            t = product(t, t)
    assert result is not None
    return result


def residual(x: Float[Array, '*n d d'], a: Float[Array, '*n d d'], p: int) -> Float[Array, '*n']:
    """The norm of X^(p/2) A X^(p/2) - 1, infinite where anything is not finite.

    It is 0 just where X^p A = 1, whether X and A commute or not. Multiplied from one side,
    the rounding of float32 alone gives up to 1 at a condition of 1e6. The norm is that of
    matrices (a largest entry does not see one eigenvalue of many that is wrong), estimated.
    """
    left = _power(x, p // 2) if p > 1 else _eye(x)
    right = product(left, x) if p % 2 else left
    return _norm(product(left, product(a, right)) - _eye(a))


def _norm(x: Float[Array, '*n d d']) -> Float[Array, '*n']:
    finite = jnp.isfinite(x).all((-1, -2))
    x = jnp.where(finite[..., None, None], x, 0)
    squared = _largest_eigenvalue(product(jnp.swapaxes(x, -1, -2), x))[..., 0, 0]
    return jnp.where(finite, jnp.sqrt(squared), jnp.inf)


def rescaled(
    x: Float[Array, '*n d d'], scale: Float[Array, '*n'], exponent: float
) -> Float[Array, '*n d d']:
    """The root of a matrix from that of its `normalised` form; 1 for a matrix of zeros."""
    there = scale > 0
    factor = jnp.where(there, scale, 1) ** exponent
    usable = there | ~jnp.isfinite(scale)
    return jnp.where(usable[..., None, None], x * factor[..., None, None], _eye(x))


def _one_by_one(function: Any) -> Any:
    """A decomposition of a batch of matrices.

    On CPUs one after the other: batches that several devices of a process work on at once
    wait for each other's threads for ever (jaxlib 0.10).
    """

    def all_at_once(a: Array) -> Any:
        return function(a)

    def each(a: Array) -> Any:
        return jax.lax.map(function, a)

    return lambda a: jax.lax.platform_dependent(a, cpu=each, default=all_at_once)


def eigh(a: Float[Array, 'n d d']) -> tuple[Float[Array, 'n d'], Float[Array, 'n d d']]:
    """(eigenvalues, eigenvectors) of each matrix, ascending."""
    return _one_by_one(lambda a: tuple(jnp.linalg.eigh(a)))(a)


def orthonormal(a: Float[Array, 'n d d']) -> Float[Array, 'n d d']:
    """Q of the QR decomposition of each matrix."""
    return _one_by_one(lambda a: jnp.linalg.qr(a)[0])(a)


def inverse_root(
    a: Float[Array, '*n d d'],
    exponent: float,
    ridge: Float[Array, '*n'],
    method: str = 'newton',
    least_ridge: float = 1e-6,
) -> tuple[Float[Array, '*n d d'], Float[Array, '*n']]:
    """((a + ridge * largest eigenvalue)^exponent, its error), for each matrix.

    Args:
      exponent: below 0; for 'newton' -1 divided by a whole number.
      ridge: for each matrix, relative to its largest eigenvalue.
      method: 'newton' only multiplies matrices, what accelerators are fast at; 'eigh'
        takes any exponent.
      least_ridge: the smallest that `ridge` can be, which decides the number of steps.

    Returns:
      Roots, and the `residual`, or, where p = -1 / exponent is not whole, the error of the
      decomposition. The error of a matrix that is not finite is not finite.
    """
    p = whole(exponent)
    if method == 'newton':
        assert p is not None
        scaled, scale = normalised(a, ridge)
        state = newton_start(scaled, p)
        steps = newton_steps(p, least_ridge)
        x = jax.lax.fori_loop(0, steps, lambda _, s: newton_step(s, p), state)[1]
    else:
        a, trace = _of_trace_one(a)
        w, v = eigh(a)
        scaled, scale = _ridged(a, w[..., -1], trace, ridge)
        w = jnp.maximum(w, 0) / jnp.where(w[..., -1:] > 0, w[..., -1:], 1)
        w = (w + ridge[..., None]) / (1 + ridge[..., None])
        x = product(v * (w**exponent)[..., None, :], jnp.swapaxes(v, -1, -2))
        if p is None:
            again = product(v * w[..., None, :], jnp.swapaxes(v, -1, -2))
            return rescaled(x, scale, exponent), _norm(again - scaled)
    return rescaled(x, scale, exponent), residual(x, scaled, p)


def whole(exponent: float) -> int | None:
    """p of an exponent -1/p with p whole, else None."""
    p = round(-1 / exponent)
    return p if p >= 1 and math.isclose(-1 / p, exponent, rel_tol=1e-6) else None
