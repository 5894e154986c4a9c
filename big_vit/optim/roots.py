"""Inverse roots of batches of PSD matrices, by matrix products (Newton) or eigendecomposition.

Everything is relative to the largest eigenvalue, so scaling a matrix only scales its root. The
error reported is that of the result, |X^p A - 1|. An iteration's own residual |M - 1| is useless
as a check: it stays small even when coarse products have ruined X.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

METHODS = ('newton', 'eigh')

# Power iteration on four random vectors; finds the largest eigenvalue to a few percent.
_POWER_STEPS = 20
# Safety factor on that estimate: Newton diverges beyond (1 + p) / 2 times the true value.
_MARGIN = 1.1


def product(a: Float[Array, '*n i j'], b: Float[Array, '*n j k']) -> Float[Array, '*n i k']:
    """Matrix product in full float32; TPUs' default single bfloat16 pass makes roots diverge."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _largest_eigenvalue(a: Float[Array, '*n d d']) -> Float[Array, '*n 1 1']:
    """Estimates the largest eigenvalue (of the largest magnitude) by power iteration."""

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
    """Adds the ridge and rescales: ((a + ridge * largest eigenvalue) / scale, scale).

    Eigenvalues of the result are at most 1 (up to the estimate); a zero matrix has scale 0.
    """
    a, trace = _with_unit_trace(a)
    return _add_ridge(a, _largest_eigenvalue(a)[..., 0, 0], trace, ridge)


def _with_unit_trace(
    a: Float[Array, '*n d d'],
) -> tuple[Float[Array, '*n d d'], Float[Array, '*n']]:
    """Symmetrizes and divides by the trace, so that tiny or huge gradients stay in range."""
    a = (a + jnp.swapaxes(a, -1, -2)) / 2
    trace = jnp.trace(a, axis1=-2, axis2=-1)
    return a / jnp.where(trace > 0, trace, 1)[..., None, None], trace


def _add_ridge(
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
    """Upper bound on Newton steps for eigenvalues between `ridge` and 1.

    Small eigenvalues grow by (1 + 1/p)^p per step, up to 1; after that the number of correct
    digits doubles, for which six steps are enough in float32.
    """
    start = ridge * (1 + p) / (2 * _MARGIN)
    return max(math.ceil(math.log(1 / start) / (p * math.log1p(1 / p))), 0) + 6


def newton_start(a: Float[Array, '*n d d'], p: int) -> tuple[Array, Array, Array]:
    """Initial (M, X, error) of the coupled Newton iteration for A^(-1/p), A as of `normalised`.

    X^p A = M throughout, and M converges to 1 (Higham 2008, Functions of Matrices, (7.18)).
    """
    z = (1 + p) / (2 * _MARGIN)
    m, x = z * a, z ** (1 / p) * _eye(a)
    return m, x, _frobenius_norm(m - _eye(m))


def _frobenius_norm(x: Float[Array, '*n d d']) -> Float[Array, '*n']:
    # Frobenius norm: the largest entry can grow while all eigenvalues improve (seen for 5 % of
    # random 4x4 matrices of rank 1), which would stop the iteration early.
    length = jnp.sqrt(jnp.square(x).sum((-1, -2)))
    return jnp.where(jnp.isfinite(length), length, jnp.inf)


def newton_step(state: tuple[Array, Array, Array], p: int) -> tuple[Array, Array, Array]:
    """Does one Newton step; a matrix whose error would grow again is left as it is."""
    # The coupled iteration gains rounding errors once converged. 1.2 allows the slight growth
    # that occurs on the way there.
    m, x, error = state
    t = ((1 + p) * _eye(m) - m) / p
    new = product(_power(t, p), m)
    new = (new + jnp.swapaxes(new, -1, -2)) / 2
    new_error = _frobenius_norm(new - _eye(new))
    better = new_error < 1.2 * error
    keep = better[..., None, None]
    return (
        jnp.where(keep, new, m),
        jnp.where(keep, product(x, t), x),
        jnp.where(better, new_error, error),
    )


def _power(t: Float[Array, '*n d d'], p: int) -> Float[Array, '*n d d']:
    """Raises to the power p >= 1 by repeated squaring."""
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
    """Norm of X^(p/2) A X^(p/2) - 1, estimated; infinite where anything is not finite.

    It is 0 exactly where X^p A = 1, whether or not X and A commute. Multiplying from one side
    only, float32 rounding alone gives up to 1 at a condition number of 1e6. The spectral norm is
    used because the largest entry hardly shows a single wrong eigenvalue.
    """
    left = _power(x, p // 2) if p > 1 else _eye(x)
    right = product(left, x) if p % 2 else left
    return _spectral_norm(product(left, product(a, right)) - _eye(a))


def _spectral_norm(x: Float[Array, '*n d d']) -> Float[Array, '*n']:
    finite = jnp.isfinite(x).all((-1, -2))
    x = jnp.where(finite[..., None, None], x, 0)
    squared = _largest_eigenvalue(product(jnp.swapaxes(x, -1, -2), x))[..., 0, 0]
    return jnp.where(finite, jnp.sqrt(squared), jnp.inf)


def rescaled(
    x: Float[Array, '*n d d'], scale: Float[Array, '*n'], exponent: float
) -> Float[Array, '*n d d']:
    """Root of a matrix from the root of its `normalised` form; 1 for a zero matrix."""
    nonzero = scale > 0
    factor = jnp.where(nonzero, scale, 1) ** exponent
    usable = nonzero | ~jnp.isfinite(scale)
    return jnp.where(usable[..., None, None], x * factor[..., None, None], _eye(x))


def _map_matrices(function: Any) -> Any:
    """Maps a matrix decomposition over a batch, one matrix at a time on CPUs.

    Batched decompositions that several devices of one process run at the same time wait for each
    other's threads forever (jaxlib 0.10).
    """

    def all_at_once(a: Array) -> Any:
        return function(a)

    def one_at_a_time(a: Array) -> Any:
        return jax.lax.map(function, a)

    return lambda a: jax.lax.platform_dependent(a, cpu=one_at_a_time, default=all_at_once)


def eigh(a: Float[Array, 'n d d']) -> tuple[Float[Array, 'n d'], Float[Array, 'n d d']]:
    """(eigenvalues, eigenvectors) of each matrix, ascending."""
    return _map_matrices(lambda a: tuple(jnp.linalg.eigh(a)))(a)


def orthonormal(a: Float[Array, 'n d d']) -> Float[Array, 'n d d']:
    """Q factor of the QR decomposition of each matrix."""
    return _map_matrices(lambda a: jnp.linalg.qr(a)[0])(a)


def inverse_root(
    a: Float[Array, '*n d d'],
    exponent: float,
    ridge: Float[Array, '*n'],
    method: str = 'newton',
    least_ridge: float = 1e-6,
) -> tuple[Float[Array, '*n d d'], Float[Array, '*n']]:
    """Computes (a + ridge * largest eigenvalue)^exponent for each matrix.

    Args:
      a: symmetric positive semi-definite matrices.
      exponent: below 0; for 'newton' of the form -1/p with an integer p.
      ridge: per matrix, relative to its largest eigenvalue.
      method: 'newton' uses matrix products only, which accelerators are fast at; 'eigh' takes
        any exponent.
      least_ridge: lower bound on `ridge`; it determines the number of Newton steps.

    Returns:
      (roots, errors). The error is the `residual`, or that of the decomposition where
      p = -1 / exponent is not an integer. It is not finite for a matrix that is not finite.
    """
    p = root_degree(exponent)
    if method == 'newton':
        assert p is not None
        scaled, scale = normalised(a, ridge)
        state = newton_start(scaled, p)
        steps = newton_steps(p, least_ridge)
        x = jax.lax.fori_loop(0, steps, lambda _, s: newton_step(s, p), state)[1]
    else:
        a, trace = _with_unit_trace(a)
        w, v = eigh(a)
        scaled, scale = _add_ridge(a, w[..., -1], trace, ridge)
        # Rounding makes zero eigenvalues slightly negative.
        w = jnp.maximum(w, 0) / jnp.where(w[..., -1:] > 0, w[..., -1:], 1)
        w = (w + ridge[..., None]) / (1 + ridge[..., None])
        x = product(v * (w**exponent)[..., None, :], jnp.swapaxes(v, -1, -2))
        if p is None:
            reconstructed = product(v * w[..., None, :], jnp.swapaxes(v, -1, -2))
            return rescaled(x, scale, exponent), _spectral_norm(reconstructed - scaled)
    return rescaled(x, scale, exponent), residual(x, scaled, p)


def root_degree(exponent: float) -> int | None:
    """The integer p of an exponent -1/p, or None if there is none."""
    p = round(-1 / exponent)
    return p if p >= 1 and math.isclose(-1 / p, exponent, rel_tol=1e-6) else None
