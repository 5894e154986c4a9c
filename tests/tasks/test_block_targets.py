"""Multi-block masks: their law against facebookresearch/ijepa's, and what every draw must hold."""

from pathlib import Path

import jax
import numpy as np
import pytest
from gate import mostly_slow

from big_vit.tasks import block_targets
from big_vit.tasks.block_targets import MultiBlock

ORACLE = Path(__file__).parents[1] / 'oracles/ijepa.npz'


def drawn(law, length, steps, batch):
    draw = jax.jit(lambda step: block_targets.draw(law, length, step, jax.random.key(step), batch))
    for step in steps:
        yield jax.device_get(draw(step))


@pytest.mark.parametrize(
    ('grid', 'whole'),
    mostly_slow([(g, w) for g in ((8, 8), (7, 12)) for w in (False, True)], ((7, 12), False)),
)
def test_contexts_are_free_of_targets_and_targets_are_blocks(grid, whole):
    law = MultiBlock(grid, whole_grid=whole)
    length = block_targets.usual_context(law)
    sizes, reached = set(), np.zeros(grid, bool)
    for blocks in drawn(law, length, range(24), 16):
        assert blocks.context.shape == (16, length)
        # In the order of the grid, each once.
        assert (np.diff(blocks.context, axis=1) > 0).all()
        target = blocks.target[..., blocks.real]
        rows, columns = target // grid[1], target % grid[1]
        height, width = (int(np.ptp(x, axis=-1)[0, 0]) + 1 for x in (rows, columns))
        assert height * width == target.shape[-1]
        sizes.add((height, width))
        for example in range(16):
            assert not set(blocks.context[example]) & set(target[example].ravel())
            for r, c in zip(rows[example], columns[example], strict=True):
                assert (np.ptp(r) + 1, np.ptp(c) + 1) == (height, width)
                assert len(set(zip(r, c, strict=True))) == height * width
        used = np.concatenate([target.ravel(), blocks.context.ravel()])
        reached.ravel()[used] = True
    assert sizes <= set(map(tuple, law.target_sizes.tolist())) and len(sizes) > 1
    # The authors' blocks never reach the last row and column.
    assert reached[:-1, :-1].all()
    assert reached[-1].any() == reached[:, -1].any() == whole


@pytest.mark.parametrize('side', [14, 16])
def test_sizes_and_lengths_are_those_of_the_authors(side):
    """Draws of theirs in batches of one, which are not cut."""
    with np.load(ORACLE) as oracle:
        theirs = oracle[f'law{side}/lengths'].astype(float)
        sizes = dict(oracle[f'law{side}/sizes'].tolist())
    law = MultiBlock((side, side))
    ours = block_targets.context_lengths(law).ravel().astype(float)
    # Standard errors of both: lengths of a batch share their sizes, so its mean is one draw.
    means = block_targets.context_lengths(law).mean(1)
    error = np.hypot(theirs.std() / len(theirs) ** 0.5, means.std() / len(means) ** 0.5)
    assert abs(ours.mean() - theirs.mean()) < 4 * error
    assert abs(ours.std() / theirs.std() - 1) < 0.05
    tokens, counts = np.unique(law.target_sizes.prod(1), return_counts=True)
    assert tokens.tolist() == sorted(sizes)
    share = np.array([sizes[n] for n in sorted(sizes)]) / len(theirs)
    np.testing.assert_allclose(counts / counts.sum(), share, atol=4 * (0.25 / len(theirs)) ** 0.5)


@pytest.mark.slow
def test_places_are_those_of_the_authors():
    """How often a token is asked for, and how often it is in a context that is not cut."""
    with np.load(ORACLE) as oracle:
        in_target, in_context = oracle['law14/in_target'], oracle['law14/in_context']
        recorded = len(oracle['law14/lengths'])
    law, batch = MultiBlock((14, 14)), 256
    asked, seen, draws = np.zeros(196), np.zeros(196), 0
    # A length of 1 accepts the first draw. All contexts of 14 x 14 have the same block.
    for blocks in drawn(law, 1, range(40), batch):
        hidden = np.zeros((batch, 196), bool)
        target = blocks.target[..., blocks.real].reshape(batch, -1)
        np.put_along_axis(hidden, target, True, axis=1)
        asked += hidden.sum(0)
        seen += ((~hidden).reshape(-1, 14, 14) & _square(13, 14)).reshape(batch, -1).sum(0)
        draws += batch
    error = 5 * (0.25 / recorded + 0.25 / draws) ** 0.5
    np.testing.assert_allclose(asked / draws, in_target, atol=error)
    np.testing.assert_allclose(seen / draws, in_context, atol=error)


def _square(side, grid):
    inside = np.zeros((grid, grid), bool)
    inside[:side, :side] = True
    return inside[None]


def test_the_usual_context_is_the_mean_of_what_batches_of_128_are_cut_to():
    """Figures of 60 batches of the authors' code: 49 and 69 tokens."""
    assert abs(block_targets.usual_context(MultiBlock((14, 14))) - 49) <= 2
    assert abs(block_targets.usual_context(MultiBlock((16, 16))) - 69) <= 2


def test_sizes_depend_on_the_step_alone_and_places_on_the_key():
    law = MultiBlock((8, 8))

    @jax.jit
    def draw(step, key):
        return block_targets.draw(law, 8, step, jax.random.key(key), 4)

    first, other = draw(3, 0), draw(3, 1)
    np.testing.assert_array_equal(first.real, other.real)
    assert (first.target != other.target).any()
    assert len({int(draw(step, 0).real.sum()) for step in range(8)}) == 2  # 3 x 3 and 4 x 3.


def test_an_example_whose_targets_leave_too_little_draws_again():
    """At the greatest length, all contexts are full and still free of targets."""
    law = MultiBlock((14, 14))
    length = int(np.median(block_targets.context_lengths(law)))
    for blocks in drawn(law, length, range(4), 256):
        target = blocks.target[..., blocks.real].reshape(256, -1)
        assert not (blocks.context[:, :, None] == target[:, None]).any()
