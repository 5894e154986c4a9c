"""The assignment on devices against SciPy's, on matrices that are random, tied and damaged."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from big_vit.tasks import matching

SHAPES = ((1, 1), (1, 7), (3, 5), (6, 6), (4, 20), (12, 16))


@functools.cache
def solver():
    return jax.jit(matching.assign)


def matrices(kind, shape, count, seed):
    rng = np.random.default_rng(seed)
    size = (count, *shape)
    if kind == 'random':  # As those of DETR are: of either sign, some close to each other.
        return rng.normal(size=size) * rng.choice([0.01, 1, 20], size=(count, 1, 1))
    if kind == 'whole numbers':
        return rng.integers(-2, 3, size=size).astype(float)
    if kind == 'low rank':
        return rng.normal(size=(count, shape[0], 1)) + rng.normal(size=(count, 1, shape[1]))
    assert kind == 'equal'
    return np.broadcast_to(rng.normal(size=(count, 1, 1)), size).copy()


def check(cost, real):
    """That each matrix is solved at SciPy's cost by distinct queries."""
    found, unusable = solver()(jnp.asarray(cost, jnp.float32), jnp.asarray(real))
    assert found.dtype == jnp.int32 and int(unusable) == 0
    for matrix, rows, queries in zip(np.float32(cost), real, np.asarray(found), strict=True):
        assert len(set(queries)) == len(queries) and set(queries) <= set(range(matrix.shape[1]))
        wanted = matrix[rows].astype(np.float64)
        best = wanted[linear_sum_assignment(wanted)].sum()
        own = wanted[np.arange(rows.sum()), queries[rows]].sum()
        assert own == pytest.approx(best, abs=1e-5 * max(1, np.abs(wanted).sum()))


def solve_many(count, seed):
    rng, solved = np.random.default_rng(seed), 0
    for shape in SHAPES:
        for kind in ('random', 'whole numbers', 'low rank', 'equal'):
            cost = matrices(kind, shape, count, rng.integers(2**31))
            real = rng.random((count, shape[0])) < rng.random((count, 1))
            check(cost, real)
            solved += count
    return solved


def test_costs_are_those_of_scipy():
    assert solve_many(16, seed=0) == 384


@pytest.mark.slow
def test_ten_thousand_matrices_cost_what_they_cost_in_scipy():
    assert solve_many(420, seed=1) > 10_000


def test_a_single_best_assignment_is_found_query_by_query():
    cost = np.random.default_rng(2).normal(size=(8, 4, 20))
    found, _ = solver()(jnp.asarray(cost, jnp.float32), jnp.ones((8, 4), bool))
    for matrix, queries in zip(cost, np.asarray(found), strict=True):
        rows, columns = linear_sum_assignment(matrix)
        assert rows.tolist() == [0, 1, 2, 3]
        assert queries.tolist() == columns.tolist()


@pytest.mark.parametrize('damage', [np.nan, np.inf, -np.inf])
def test_costs_that_are_not_finite_are_counted_and_avoided(damage):
    rng = np.random.default_rng(3)
    cost = rng.normal(size=(8, 4, 20))
    damaged = rng.random(cost.shape) < 0.3
    damaged[0, 1] = True  # Nothing is left for this one.
    real = np.ones((8, 4), bool)
    real[1, 2:] = False
    found, unusable = solver()(
        jnp.asarray(np.where(damaged, damage, cost), jnp.float32), jnp.asarray(real)
    )
    assert int(unusable) == (damaged & real[..., None]).sum()
    for i, (matrix, queries) in enumerate(zip(cost, np.asarray(found), strict=True)):
        usable = np.where(damaged[i], 1e3, matrix)[real[i]]
        best = linear_sum_assignment(usable)[1]
        taken = queries[real[i]]
        assert len(set(taken)) == len(taken)
        avoided = usable[np.arange(len(taken)), taken]
        assert avoided.sum() == pytest.approx(usable[np.arange(len(best)), best].sum(), abs=1e-2)
        assert (avoided > 900).sum() == (i == 0)


def test_all_costs_that_are_not_finite_still_end():
    found, unusable = solver()(jnp.full((2, 4, 20), jnp.nan), jnp.ones((2, 4), bool))
    assert int(unusable) == 160
    assert all(len(set(queries)) == 4 for queries in np.asarray(found).tolist())


def test_more_objects_than_queries_are_refused():
    with pytest.raises(ValueError, match='3 objects cannot be assigned to 2 queries'):
        matching.assign(jnp.zeros((1, 3, 2)), jnp.ones((1, 3), bool))


def test_costs_are_their_parts():
    rng = np.random.default_rng(4)
    logits, boxes = rng.normal(size=(2, 5, 4)), rng.uniform(0.2, 0.4, size=(2, 5, 4))
    label, objects = np.array([[2, 0, -1], [1, -1, -1]]), rng.uniform(0.2, 0.4, size=(2, 3, 4))
    arrays = (jnp.asarray(x, jnp.float32) for x in (logits, boxes))
    found = matching.costs(*arrays, jnp.asarray(label), jnp.asarray(objects, jnp.float32), 5.0, 2.0)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for b, o, q in np.ndindex(2, 3, 5):
        if label[b, o] < 0:
            continue
        sides = []
        for x, y, w, h in (boxes[b, q], objects[b, o]):
            sides.append((x - w / 2, y - h / 2, x + w / 2, y + h / 2))
        (a0, a1, a2, a3), (b0, b1, b2, b3) = sides
        shared = max(min(a2, b2) - max(a0, b0), 0) * max(min(a3, b3) - max(a1, b1), 0)
        union = (a2 - a0) * (a3 - a1) + (b2 - b0) * (b3 - b1) - shared
        hull = (max(a2, b2) - min(a0, b0)) * (max(a3, b3) - min(a1, b1))
        giou = shared / union - (hull - union) / hull
        distance = np.abs(boxes[b, q] - objects[b, o]).sum()
        wanted = 5 * distance - shares[b, q, label[b, o]] - 2 * giou
        assert found[b, o, q] == pytest.approx(wanted, abs=1e-5)
