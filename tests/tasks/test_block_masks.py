"""Block masks: exact numbers, and the laws of DINOv3's and iBOT's generators by 4,000 masks."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gate import mostly_slow
from scipy import stats
from self_distillation_oracle import numbers

from big_vit.tasks.block_masks import (
    block_masks,
    independent_targets,
    masked_counts,
    shuffled_counts,
)

DRAWN = 4000


@pytest.mark.parametrize(
    ('count', 'grid'),
    mostly_slow([(20, (14, 14)), (59, (14, 14)), (98, (14, 14)), (30, (8, 10))], 30),
)
def test_masks_have_the_law_of_the_reference(count, grid):
    draw = jax.jit(lambda key: block_masks(key, jnp.full(DRAWN, count), grid))
    masks = np.asarray(draw(jax.random.key(0))).reshape(DRAWN, *grid)
    assert (masks.sum((1, 2)) == count).all()
    wanted = numbers()
    # Where, within five standard errors of the difference at the least certain place.
    error = (2 * 0.25 / DRAWN) ** 0.5
    assert np.abs(masks.mean(0) - wanted[f'mask_{count}_map']).max() < 5 * error
    # And in what shapes: the border between masked and visible patches.
    border = (masks[:, 1:] != masks[:, :-1]).sum((1, 2))
    border = border + (masks[:, :, 1:] != masks[:, :, :-1]).sum((1, 2))
    mean, deviation = wanted[f'mask_{count}_edges']
    assert abs(border.mean() - mean) < 5 * deviation * (2 / DRAWN) ** 0.5
    assert border.std() == pytest.approx(deviation, rel=0.08)


@pytest.mark.parametrize(
    ('views', 'patches', 'probability', 'ratios'),
    [
        (64, 196, 0.5, (0.1, 0.5)),
        (16, 196, 0.5, (0.1, 0.5)),
        (12, 256, 0.5, (0.1, 0.5)),
        (10, 36, 0.7, (0.2, 0.6)),
        (32, 1024, 0.5, (0.1, 0.5)),
    ],
)
def test_numbers_of_a_group_are_those_of_the_reference(views, patches, probability, ratios):
    counts = masked_counts(views, patches, probability, ratios)
    wanted = numbers()[f'counts_{views}_{patches}']
    # The reference has its ratios in float32: a whole number may be the one below.
    masked = counts[: len(wanted)][::-1]
    assert ((masked - wanted >= 0) & (masked - wanted <= 1)).all()
    assert (masked != wanted).sum() <= 2
    assert (counts[len(wanted) :] == 0).all() and len(counts) == views


def test_each_group_has_all_numbers_and_each_view_its_own():
    counts = masked_counts(6, 24, 0.5, (0.1, 0.5))
    assert counts.tolist() == [12, 8, 5, 0, 0, 0]
    drawn = shuffled_counts(jax.random.key(1), counts, 50)
    np.testing.assert_array_equal(np.sort(drawn, axis=1), np.broadcast_to(np.sort(counts), (50, 6)))
    assert len({tuple(row) for row in drawn.tolist()}) > 20
    masks = block_masks(jax.random.key(2), drawn.reshape(-1), (4, 6))
    np.testing.assert_array_equal(masks.sum(1), drawn.reshape(-1))


@pytest.mark.parametrize('count', [0, 1, 3, 4, 5])
def test_small_numbers_on_a_small_grid(count):
    masks = block_masks(jax.random.key(0), jnp.full(64, count), (2, 3))
    np.testing.assert_array_equal(masks.sum(1), count)


@pytest.mark.parametrize(('grid',), mostly_slow([((14, 14),), ((8, 10),)], ((8, 10),)))
def test_masks_of_each_view_by_itself_have_the_law_of_ibot(grid):
    """Ratios of 0 or 0.1 to 0.5, half and half; blocks until these, and none to fill up."""
    count, mask = jax.random.split(jax.random.key(4))
    targets = independent_targets(count, DRAWN, grid[0] * grid[1], 0.5, (0.1, 0.5))
    masks = np.asarray(jax.jit(lambda key: block_masks(key, targets, grid, exact=False))(mask))
    masks = masks.reshape(DRAWN, *grid)
    with np.load(Path(__file__).parents[1] / 'oracles' / 'ibot_masks.npz') as file:
        name = 'x'.join(map(str, grid))
        wanted, counts = file[f'{name}_map'], file[f'{name}_counts']
        mean, deviation = file[f'{name}_edges']
    assert np.abs(masks.mean(0) - wanted).max() < 5 * (2 * 0.25 / DRAWN) ** 0.5
    found = masks.sum((1, 2))
    assert (found <= np.asarray(targets) + 1e-3).all() and (found < np.floor(targets)).any()
    assert stats.ks_2samp(found, counts).pvalue > 1e-3
    assert stats.ks_2samp(found[found > 0], counts[counts > 0]).pvalue > 1e-3
    border = (masks[:, 1:] != masks[:, :-1]).sum((1, 2))
    border = border + (masks[:, :, 1:] != masks[:, :, :-1]).sum((1, 2))
    assert abs(border.mean() - mean) < 5 * deviation * (2 / DRAWN) ** 0.5
    assert border.std() == pytest.approx(deviation, rel=0.08)
