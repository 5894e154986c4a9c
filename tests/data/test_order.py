"""The order of the data: a bijection, uniform, and the same however it is cut."""

import itertools

import numpy as np
import pytest
from gate import mostly_slow
from scipy import stats

from big_vit.data import order


@pytest.mark.parametrize('length', [1, 2, 3, 10, 64, 65, 1000, 1797, 60_000])
@pytest.mark.parametrize('seed', [0, 1, -5, 2**63])
def test_shuffled_is_a_bijection(length, seed):
    result = order.shuffled(np.arange(length), length=length, seed=seed, epoch=4)
    assert result.dtype == np.int64
    np.testing.assert_array_equal(np.sort(result), np.arange(length))


@pytest.mark.parametrize('length', [2, 3, 4, 5])
def test_every_permutation_is_equally_likely(length):
    permutations = {p: i for i, p in enumerate(itertools.permutations(range(length)))}
    epochs = np.arange(200 * len(permutations))
    drawn = np.stack(
        [
            order.shuffled(np.full(len(epochs), i), length=length, seed=1, epoch=epochs)
            for i in range(length)
        ],
        axis=1,
    )
    seen = np.bincount([permutations[tuple(p)] for p in drawn], minlength=len(permutations))
    assert stats.chisquare(seen).pvalue > 1e-3


@pytest.mark.parametrize('length', mostly_slow([10, 100, 1000], 1000))
def test_places_are_uniform_over_epochs_and_over_seeds(length):
    epochs = np.arange(200 * length)
    for position in (0, length // 2, length - 1):
        place = np.full(len(epochs), position)
        by_epoch = order.shuffled(place, length=length, seed=3, epoch=epochs)
        assert stats.chisquare(np.bincount(by_epoch, minlength=length)).pvalue > 1e-3
    by_seed = [
        order.shuffled(np.zeros(1, np.int64), length=length, seed=s, epoch=0)[0]
        for s in range(20 * 100)
    ]
    coarse = np.asarray(by_seed) * 10 // length
    assert stats.chisquare(np.bincount(coarse, minlength=10)).pvalue > 1e-3


def test_neighbours_are_independent():
    length = 5000
    a, b = (
        order.shuffled(np.arange(length), length=length, seed=0, epoch=epoch) for epoch in (0, 1)
    )
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.06
    assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.06
    # A random permutation has one fixed point on average.
    assert np.sum(a == b) < 10


def test_shuffled_depends_on_nothing_else():
    positions = np.arange(100)
    whole = order.shuffled(positions, length=777, seed=5, epoch=2)
    alone = [order.shuffled(positions[i : i + 1], length=777, seed=5, epoch=2) for i in positions]
    np.testing.assert_array_equal(whole, np.concatenate(alone))
    as_array = order.shuffled(positions, length=777, seed=5, epoch=np.full(100, 2))
    np.testing.assert_array_equal(whole, as_array)


def test_the_order_is_the_one_of_the_first_release():
    # A change here makes runs resume with other batches than they would have seen.
    result = order.shuffled(np.arange(8), length=1000, seed=0, epoch=0)
    assert result.tolist() == [524, 961, 67, 372, 270, 380, 166, 537]
    draws = order.uniform(order.example_keys(0, 0, np.arange(3)), 1)
    np.testing.assert_array_equal(
        draws, [0.09243864600372742, 0.992924263245783, 0.22842989291133287]
    )


def test_positions_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r'\[0, 10\)'):
        order.shuffled(np.array([10]), length=10, seed=0, epoch=0)


@pytest.mark.parametrize(('length', 'batch_size'), [(10, 4), (7, 16), (1, 3), (100, 100)])
def test_each_example_comes_once_per_epoch(length, batch_size):
    epochs = 3
    steps = -(-length * epochs // batch_size)
    index, epoch = (
        np.concatenate(x)
        for x in zip(
            *(
                order.example_indices(s, length=length, batch_size=batch_size, seed=0)
                for s in range(steps)
            ),
            strict=True,
        )
    )
    assert (np.diff(epoch) >= 0).all()
    for e in range(epochs):
        np.testing.assert_array_equal(np.sort(index[epoch == e]), np.arange(length))


@pytest.mark.parametrize('hosts', [1, 2, 4])
def test_rows_of_all_hosts_are_the_batch(hosts):
    settings = {'length': 50, 'batch_size': 32, 'seed': 9}
    size = 32 // hosts
    parts = [
        order.example_indices(7, rows=slice(h * size, (h + 1) * size), **settings)
        for h in range(hosts)
    ]
    for whole, *cut in zip(order.example_indices(7, **settings), *parts, strict=True):
        np.testing.assert_array_equal(whole, np.concatenate(cut))


def test_unshuffled_is_the_order_of_the_source():
    index, epoch = order.example_indices(1, length=6, batch_size=4, seed=0, shuffle=False)
    assert index.tolist() == [4, 5, 0, 1]
    assert epoch.tolist() == [0, 0, 1, 1]


def test_uniform_is_uniform_and_streams_are_independent():
    keys = order.example_keys(0, 0, np.arange(20_000))
    assert len(np.unique(keys)) == len(keys)
    draws = [order.uniform(keys, stream) for stream in range(6)]
    for draw in draws:
        assert draw.dtype == np.float64
        assert draw.min() >= 0
        assert draw.max() < 1
        assert stats.kstest(draw, 'uniform').pvalue > 1e-3
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 0.04
    streams = np.arange(6, dtype=np.uint64)
    np.testing.assert_array_equal(order.uniform(keys[:, None], streams).T, draws)


def test_keys_differ_by_seed_epoch_and_index():
    index = np.arange(100)
    keys = [order.example_keys(seed, epoch, index) for seed in (0, 1) for epoch in (0, 1)]
    assert len(np.unique(np.concatenate(keys))) == 400
