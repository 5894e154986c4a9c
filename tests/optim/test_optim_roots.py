"""Inverse roots against eigenvalues in float64, over scales, spectra, sizes and exponents."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gate import mostly_slow
from shampoo_reference import inverse_root

from big_vit.optim import roots, shampoo

RIDGE = 1e-6
SCALES = [1e-14, 1e-9, 1e-3, 1.0, 1e6]


def spectra(n):
    i = np.arange(1, n + 1, dtype=float)
    return {
        'flat': np.ones(n),
        'i^-1': 1 / i,
        'i^-2': i**-2,
        'rank 1': 1.0 * (i == 1),
        'rank 16': (i <= 16) / i,
        'zero': np.zeros(n),
    }


def basis(n, seed=0):
    return np.linalg.qr(np.random.RandomState(seed).standard_normal((n, n)))[0]


def with_eigenvalues(values, seed=0):
    vectors = basis(len(values), seed)
    return (vectors * values) @ vectors.T


def batch(n):
    """Every spectrum at every scale, rounded to float32; the zeros last of each scale."""
    made = [scale * with_eigenvalues(values) for scale in SCALES for values in spectra(n).values()]
    return np.stack(made).astype(np.float32)


@functools.partial(jax.jit, static_argnames=('exponent', 'method', 'ridge'))
def root(a, exponent=-0.25, method='newton', ridge=RIDGE):
    ridges = jnp.full(a.shape[0], ridge, a.dtype)
    return roots.inverse_root(a, exponent, ridges, method, ridge)


def relative(found, wanted):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(found - wanted, axis=(1, 2)) / np.linalg.norm(wanted, axis=(1, 2))


def check_accuracy(n, exponent, method, tolerance=0.02):
    a = batch(n)
    found, error = (np.asarray(x) for x in root(jnp.asarray(a), exponent, method))
    zero = ~a.any((1, 2))
    # There is no root of zero; 1 is what is agreed on.
    np.testing.assert_allclose(found[zero], np.broadcast_to(np.eye(n), a[zero].shape), atol=1e-4)
    there = a[~zero].astype(np.float64)
    wanted = [inverse_root(matrix, -1 / exponent, RIDGE) for matrix in there]
    assert relative(found[~zero], wanted).max() < tolerance
    assert error.max() < shampoo.TOLERANCE


@pytest.mark.parametrize('method', roots.METHODS)
@pytest.mark.parametrize('n', mostly_slow([1, 2, 64, 96], 1, 64))
def test_roots_of_every_scale_and_spectrum_are_right(n, method):
    check_accuracy(n, -0.25, method)


# A relative error of 6e-8 in float32 alone is one of 6 % in eigenvalues of 1e-6, so in the inverse.
@pytest.mark.parametrize('method', roots.METHODS)
@pytest.mark.parametrize(
    'p, tolerance',
    mostly_slow([(1, 0.06), (2, 0.02), (3, 0.02), (6, 0.02), (8, 0.02)], (1, 0.06), (3, 0.02)),
)
def test_roots_of_every_whole_p_are_right(p, tolerance, method):
    check_accuracy(24, -1 / p, method, tolerance)


def test_other_exponents_are_right_by_eigenvalues():
    check_accuracy(24, -0.3, 'eigh')


def test_p_is_known_where_it_is_whole():
    assert [roots.root_degree(-1 / p) for p in range(1, 9)] == list(range(1, 9))
    assert roots.root_degree(-0.33333334) == 3
    assert [roots.root_degree(exponent) for exponent in (-0.3, -0.7, -1.5, -2.0)] == [None] * 4


@pytest.mark.parametrize('method', roots.METHODS)
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_one_number_that_is_not_finite_spoils_its_own_matrix_only(bad, method):
    a = batch(24)
    broken = a.copy()
    broken[2, 3, 5] = bad
    (found, error), (other, other_error) = root(a, method=method), root(broken, method=method)
    assert not np.isfinite(other_error[2])
    others = np.arange(len(a)) != 2
    np.testing.assert_array_equal(found[others], other[others])
    np.testing.assert_array_equal(error[others], other_error[others])


@pytest.mark.parametrize('method', roots.METHODS)
def test_scaling_a_matrix_only_scales_its_root(method):
    a = np.stack([with_eigenvalues(values) for values in spectra(64).values()][:5])
    a = a.astype(np.float32)
    well, _ = root(a, method=method)
    # Other factors round the matrix itself, which counts where its condition is high.
    for factor, kept in ((2.0**-40, 5), (2.0**20, 5), (3e-9, 2), (7e5, 2)):
        scaled, _ = root(np.float32(factor) * a, method=method)
        wanted = factor**-0.25 * np.asarray(well, np.float64)
        assert relative(scaled[:kept], wanted[:kept]).max() < 1e-5


# Errors.


@pytest.fixture(scope='module')
def good():
    """(root, matrix as normalised) of one matrix of a high condition."""
    a = jnp.asarray(with_eigenvalues(spectra(64)['i^-2'])[None], jnp.float32)
    scaled, scale = jax.jit(roots.normalised)(a, jnp.full(1, RIDGE, jnp.float32))
    found, error = root(a)
    assert error[0] < 0.02
    return found / scale[:, None, None] ** -0.25, scaled


@pytest.mark.parametrize('factor', [0.8, 1.15])
def test_the_error_tells_of_a_root_of_another_length(good, factor):
    x, a = good
    assert roots.residual(x, a, 4)[0] < 0.02
    assert roots.residual(factor * x, a, 4)[0] > shampoo.TOLERANCE


@pytest.mark.parametrize('at', [0, 31, 63])
def test_the_error_tells_of_one_wrong_direction_along_an_axis(at):
    values = np.float32(spectra(64)['i^-2'])
    x = np.diag(values**-0.25)
    x[at, at] *= 1.15
    assert (
        roots.residual(jnp.asarray(x[None]), jnp.asarray(np.diag(values)[None]), 4)[0]
        > shampoo.TOLERANCE
    )


def test_the_error_tells_of_one_wrong_direction_of_any_kind():
    values, vectors = spectra(256)['i^-1'], basis(256)
    wrong = values**-0.25
    wrong[128] = 0  # A root that is blind along one eigenvector.
    a, x = ((vectors * w) @ vectors.T for w in (values, wrong))
    found = roots.residual(*(jnp.asarray(part[None], jnp.float32) for part in (x, a)), 4)
    assert found[0] > shampoo.TOLERANCE


def test_the_error_tells_of_one_number(good):
    x, a = good
    for bad in (np.nan, np.inf):
        assert roots.residual(x.at[0, 1, 2].set(bad), a, 4)[0] == np.inf
    assert roots.residual(x.at[0, 5, 5].add(0.3 * x[0, 5, 5]), a, 4)[0] > shampoo.TOLERANCE


def test_the_error_is_of_the_root_where_it_does_not_commute(good):
    # Of X = 1 + s, s skew: X^2 A X^2 is not symmetric, and X^4 A is another matrix.
    x, a = (np.asarray(part[0], np.float64) for part in good)
    turned = x + 0.05 * np.abs(x).max() * (np.triu(np.ones_like(x)) - np.tril(np.ones_like(x)))
    for p in (1, 2, 3, 4):
        left = np.linalg.matrix_power(turned, p // 2 if p > 1 else 0)
        right = np.linalg.matrix_power(turned, p - (p // 2 if p > 1 else 0))
        wanted = np.linalg.norm(left @ a @ right - np.eye(len(x)), 2)
        found = roots.residual(*(jnp.asarray(part[None], jnp.float32) for part in (turned, a)), p)
        # An estimate from below.
        assert 0.9 * wanted < found[0] < 1.001 * wanted


def test_a_root_made_with_coarse_products_is_found_bad(monkeypatch, good):
    exact = roots.product

    def coarse(a, b):
        return exact(*(x.astype(jnp.bfloat16).astype(x.dtype) for x in (a, b)))

    _, a = good
    with monkeypatch.context() as patch:
        patch.setattr(roots, 'product', coarse)
        step = jax.jit(functools.partial(roots.newton_step, p=4))
        made = roots.newton_start(a, 4)
        for _ in range(roots.newton_steps(4, RIDGE)):
            made = step(made)
    # The error that the iteration itself goes by says nothing.
    _, x, own = made
    assert own[0] < 0.1
    assert roots.residual(x, a, 4)[0] > shampoo.TOLERANCE


def test_a_matrix_with_a_negative_eigenvalue_is_found_bad():
    values = np.linspace(-0.3, 1, 64)
    a = jnp.asarray(with_eigenvalues(values)[None], jnp.float32)
    for method in roots.METHODS:
        assert not root(a, method=method)[1][0] < shampoo.TOLERANCE


# Newton's iteration.


@pytest.mark.parametrize('ridge', [1e-3, 1e-8])
@pytest.mark.parametrize('p', [1, 4, 8])
def test_newton_takes_as_many_steps_as_the_smallest_eigenvalue_needs(p, ridge):
    values = np.concatenate([[0], np.geomspace(ridge, 1, 15)])
    a = with_eigenvalues(values)
    with jax.enable_x64(True):
        found, error = root(jnp.asarray(a[None]), -1 / p, ridge=ridge)
        assert error[0] < 1e-4
    assert relative(found, inverse_root(a, p, ridge)[None]).max() < 1e-4


def test_the_ridge_of_each_matrix_is_its_own():
    a = with_eigenvalues(spectra(16)['rank 16'])
    ridges = [1e-6, 1e-2, 0.5]
    made = jax.jit(lambda a, ridge: roots.inverse_root(a, -0.25, ridge, 'newton', 1e-6))
    found, error = made(jnp.asarray(np.stack([a] * 3), jnp.float32), jnp.asarray(ridges))
    assert error.max() < 0.02
    wanted = [inverse_root(a, 4, ridge) for ridge in ridges]
    # The largest eigenvalue, which the ridge is relative to, is known to some percent.
    assert relative(found, wanted).max() < 0.01


def test_the_largest_eigenvalue_is_found_to_some_percent():
    for n in (1, 2, 64):
        a = batch(n)
        _, scale = jax.jit(roots.normalised)(a, jnp.zeros(len(a)))
        wanted = np.linalg.eigvalsh(a.astype(np.float64))[:, -1]
        np.testing.assert_allclose(scale, wanted, rtol=0.05)


# What compilers are given.


@pytest.mark.parametrize('method', roots.METHODS)
@pytest.mark.parametrize('p', [1, 3, 4])
def test_every_product_asks_for_full_precision(p, method):
    a = jax.ShapeDtypeStruct((3, 8, 8), jnp.float32)
    text = root.lower(a, -1 / p, method).as_text()
    dots = [line for line in text.splitlines() if 'stablehlo.dot_general' in line]
    assert len(dots) >= 3
    assert all('precision = [HIGHEST, HIGHEST]' in line for line in dots)


def test_eigenvectors_and_orthonormal_bases_are_what_they_say():
    a = batch(64)[:5]
    values, vectors = roots.eigh(jnp.asarray(a / np.abs(a).max((1, 2), keepdims=True)))
    q = roots.orthonormal(jnp.asarray(np.random.RandomState(1).standard_normal((3, 8, 8))))
    np.testing.assert_array_equal(values, np.sort(values))
    for x in (np.asarray(vectors), np.asarray(q)):
        eye = np.broadcast_to(np.eye(x.shape[-1]), x.shape)
        np.testing.assert_allclose(np.swapaxes(x, 1, 2) @ x, eye, atol=1e-4)
