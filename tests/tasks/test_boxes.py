"""Overlap of boxes against their areas counted on a grid, and where there is no area."""

import jax
import jax.numpy as jnp
import numpy as np

from big_vit.tasks.boxes import corners, generalised_iou

CELLS = 16


def on_a_grid(box):
    """Which cells of a fine grid a box (left, top, right, bottom) covers."""
    x0, y0, x1, y1 = (int(side) for side in box)
    covered = np.zeros((CELLS, CELLS), bool)
    covered[y0:y1, x0:x1] = True
    return covered


def test_generalised_iou_is_that_of_areas():
    rng = np.random.default_rng(0)
    sides = np.sort(rng.permuted(np.tile(np.arange(CELLS + 1), (200, 2, 1)), axis=2)[:, :, :2], 2)
    found = sides.transpose(0, 2, 1).reshape(200, 4)  # left, top, right, bottom
    a, b = found[:100], found[100:]
    expected = []
    for one, other in zip(a, b, strict=True):
        first, second = on_a_grid(one), on_a_grid(other)
        hull = on_a_grid([*np.minimum(one[:2], other[:2]), *np.maximum(one[2:], other[2:])])
        union, shared = (first | second).sum(), (first & second).sum()
        expected.append(shared / union - (hull.sum() - union) / hull.sum())
    assert min(expected) < -0.3 < 0.3 < max(expected)

    def as_shares(box):
        box = box / CELLS
        return jnp.asarray(
            np.concatenate([(box[:, :2] + box[:, 2:]) / 2, box[:, 2:] - box[:, :2]], 1)
        )

    np.testing.assert_allclose(corners(as_shares(a)) * CELLS, a, atol=1e-5)
    np.testing.assert_allclose(generalised_iou(as_shares(a), as_shares(b)), expected, atol=1e-6)


def test_boxes_without_area_have_finite_values_and_derivatives():
    point = jnp.array([[0.5, 0.5, 0.0, 0.0]])
    box = jnp.array([[0.5, 0.5, 0.2, 0.2]])
    for pair in ((point, point), (point, box), (box, point), (box, box)):
        value, slope = jax.value_and_grad(lambda a, b: generalised_iou(a, b).sum())(*pair)
        assert np.isfinite(value) and np.isfinite(slope).all()
    assert generalised_iou(box, box)[0] == 1
