"""The order with locality: a bijection, the same on any number of hosts, each reading its share."""

import dataclasses
import itertools
import re
import tracemalloc

import numpy as np
import pytest
from gate import mostly_slow
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from big_vit import config as config_lib
from big_vit.build import data as build_data
from big_vit.data import order, pipeline, sources, transforms, windows
from big_vit.data.sources import digits as digits_source
from big_vit.data.sources.base import Request, concatenate
from big_vit.data.sources.classes import subset
from big_vit.data.sources.splits import cut
from big_vit.errors import UserError


@st.composite
def shards(draw):
    lengths = draw(st.lists(st.integers(0, 400), min_size=1, max_size=6).filter(any))
    lanes = 1 << draw(st.integers(0, min(7, sum(lengths).bit_length() - 1)))
    return windows.Shards(np.array(lengths), lanes)


def taken(parts, steps, batch_size, **settings):
    """Return (index, view) of some batches, one after the other."""
    settings = {'seed': 3} | settings
    batches = [
        windows.example_indices(step, parts=parts, batch_size=batch_size, **settings)
        for step in steps
    ]
    return tuple(np.concatenate(column) for column in zip(*batches, strict=True))


@given(shards(), st.integers(0, 2**40), st.integers(0, 5))
def test_each_example_comes_once_an_epoch(source, seed, first):
    positions = np.arange(first * source.length, (first + 2) * source.length)
    index, epoch = windows.indices(positions, source, seed)
    np.testing.assert_array_equal(epoch, np.repeat([first, first + 1], source.length))
    for half in np.split(index, 2):
        np.testing.assert_array_equal(np.sort(half), np.arange(source.length))
    alone = [windows.indices(positions[i : i + 1], source, seed)[0] for i in range(0, 99, 7)]
    np.testing.assert_array_equal(np.concatenate(alone)[: len(index)], index[:99:7][: len(alone)])


@given(shards(), st.integers(1, 3), st.integers(1, 90), st.integers(30, 300))
def test_batches_of_any_sizes_go_through_epochs(source, repeats, before, after):
    """Batches of one size, and of another from some step on, as of a run that is gone on with."""
    taken_before, switch = before * repeats, 3
    steps = -(-2 * source.length // after)
    shift = switch * before
    settings = {'repeats': repeats}
    index, view = (
        np.concatenate(pair)
        for pair in zip(
            taken((source,), range(switch), taken_before, **settings),
            taken((source,), range(steps), after * repeats, shift=shift, **settings),
            strict=True,
        )
    )
    for number in range((shift + steps * after) // source.length * repeats):
        np.testing.assert_array_equal(np.sort(index[view == number]), np.arange(source.length))


@pytest.mark.parametrize('batch_size', mostly_slow([256, 192, 1024], 256))
def test_a_host_reads_its_share_of_the_bytes_and_whole_shards(batch_size):
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 180, 3000)
    source, hosts = windows.Shards(lengths, 256), 8
    sizes = rng.integers(1, 200, source.length)
    # The first whole epoch: it begins in the middle of a batch.
    steps = range(source.length // batch_size, 2 * source.length // batch_size + 1)
    index, epoch = taken((source,), steps, batch_size)
    index, epoch = (column.reshape(len(steps), hosts, -1) for column in (index, epoch))
    shard_of = np.repeat(np.arange(len(lengths)), lengths)
    bytes_of = np.bincount(shard_of, sizes)
    for host in range(hosts):
        mine = index[:, host][epoch[:, host] == 1]
        share = bytes_of[np.unique(shard_of[mine])].sum() / bytes_of.sum()
        # It reads all of every shard that it touches, and yet little that it does not need.
        assert 0.98 / hosts < share < 1.06 / hosts


@pytest.mark.parametrize('hosts', [1, 8, 1024])
def test_hosts_agree_on_a_billion_rows(hosts):
    """Each host asks for its rows alone; of 100,000 shards it reads its share."""
    source, batch = windows.Shards(np.full(100_000, 10_000), 1024), 2048
    steps = [0, 12_345, 488_281, 10**12]
    read = set()
    for step in steps:
        whole = windows.example_indices(step, parts=(source,), batch_size=batch, seed=1)
        for host in range(0, hosts, max(1, hosts // 8)):
            rows = np.arange(batch).reshape(hosts, -1)[host]
            part = windows.example_indices(
                step, parts=(source,), batch_size=batch, seed=1, rows=rows
            )
            for column, mine in zip(whole, part, strict=True):
                np.testing.assert_array_equal(column[rows], mine)
    # All of one epoch of one host, by its positions: those of its lanes.
    lanes = np.arange(1024).reshape(hosts, -1)[hosts // 2]
    now = windows._epoch(source, 1, 0)
    for lane in lanes.tolist():
        stretch = now.starts[lane], now.starts[lane] + now.sizes[lane] - 1
        first, last = np.searchsorted(now.ends, stretch, side='right')
        read |= set(range(first, last + 1))
    assert 1 / hosts <= len(read) / 100_000 < 1.02 / hosts
    # And these are the lanes that its rows come from, in the sequence of shards of that epoch.
    place = _sequence(source, 1, 0)
    for step in (0, 1, 99_999, 488_280):
        rows = np.arange(batch).reshape(hosts, -1)[hosts // 2]
        index, _ = windows.example_indices(
            step, parts=(source,), batch_size=batch, seed=1, rows=rows
        )
        assert set(place[index // 10_000].tolist()) <= read


def _sequence(source, seed, epoch):
    """Return the place of each shard in the sequence of an epoch, of shards of one length."""
    now = windows._epoch(source, seed, epoch)
    first = now.moves + now.ends - source.lengths[0]  # Of each place, the first example's index.
    place = np.empty(len(first), np.int64)
    place[first // source.lengths[0]] = np.arange(len(first))
    return place


def test_a_batch_of_a_billion_rows_needs_little_memory():
    source = windows.Shards(np.full(100_000, 10_000), 1024)
    tracemalloc.start()
    for step in (0, 10**7, 10**9):
        windows.example_indices(step, parts=(source,), batch_size=4096, seed=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32e6


def test_the_order_is_the_one_of_the_first_release():
    # A change here makes runs resume with other batches than they would have seen.
    source = windows.Shards(np.array([300, 0, 1000, 700, 41]), 4)
    index, view = taken((source,), [0, 300], 8, seed=5)
    assert index[:8].tolist() == [1500, 1493, 244, 298, 805, 786, 1049, 1073]
    assert index[8:].tolist() == [1713, 1615, 520, 541, 749, 705, 2019, 255]
    assert view.tolist() == [0] * 8 + [1] * 8


def test_a_batch_is_of_all_shards_that_are_open():
    source = windows.Shards(np.full(4096, 1000), 64)
    index, _ = windows.example_indices(777, parts=(source,), batch_size=256, seed=0)
    counts = np.bincount(index // 1000, minlength=4096)
    assert 64 <= (counts > 0).sum() <= 2 * 64  # A lane may go on with its next shard.
    assert counts.max() <= 4
    later, _ = windows.example_indices(778, parts=(source,), batch_size=256, seed=0)
    assert len(set((index // 1000).tolist()) & set((later // 1000).tolist())) > 60


def test_lanes_need_new_examples_at_different_times():
    source = windows.Shards(np.full(2048, 1000), 256)
    index, _ = taken((source,), range(256), 256, seed=2)
    index = index.reshape(256, 256)
    # Which 256 neighbours a lane is at changes about once in 256 steps, and evenly over them.
    moved = np.abs(np.diff(index, axis=0)) > 256
    by_step = np.add.reduceat(moved.sum(1), np.arange(0, 255, 16))
    assert by_step.max() < 4 * max(1, by_step.mean())


def test_a_mixture_takes_each_part_in_its_order():
    parts = (windows.Shards(np.full(300, 100), 64), 5_000, windows.Shards(np.full(40, 250), 32))
    lengths = np.array([30_000, 5_000, 10_000])
    counts = order.shares((3, 1, 1))
    steps, batch, hosts = 120, 512, 4
    index, view = taken(parts, range(steps), batch, counts=counts)
    starts = np.cumsum(lengths) - lengths
    for start, length in zip(starts, lengths, strict=True):
        mine = (index >= start) & (index < start + length)
        for epoch in range(view[mine].max()):
            seen = index[mine & (view == epoch)] - start
            np.testing.assert_array_equal(np.sort(seen), np.arange(length))
    first = index.reshape(steps, hosts, -1)
    is_first = (view == 0).reshape(steps, hosts, -1)
    for host in range(hosts):
        mine = first[:, host][is_first[:, host]]
        mine = mine[mine < 30_000] // 100
        assert len(np.unique(mine)) < 1.2 * 300 / hosts


@pytest.mark.parametrize('repeats', [2, 3])
def test_views_of_an_example_are_of_one_host_and_no_neighbours(repeats):
    source, batch = windows.Shards(np.full(64, 500), 64), 96 * repeats
    index, view = windows.example_indices(
        5, parts=(source,), batch_size=batch, seed=0, repeats=repeats
    )
    assert (index[1:] != index[:-1]).all()
    by_host = index.reshape(12, -1)
    for mine in by_host:
        _, times = np.unique(mine, return_counts=True)
        assert (times == repeats).all()
    assert (np.bincount(view) == 96).all()


def test_permutations_of_several_lengths_are_bijections():
    lengths = np.array([1, 2, 15, 16, 17, 63, 64, 65, 255, 256])
    length = np.repeat(lengths, lengths)
    place = np.concatenate([np.arange(n) for n in lengths])
    key = order.keys_of(1, 2, length)
    result = order.permuted(place, length, key)
    for n in lengths.tolist():
        np.testing.assert_array_equal(np.sort(result[length == n]), np.arange(n))
        alone = order.permuted(np.arange(n), n, key[length == n])
        np.testing.assert_array_equal(result[length == n], alone)


# --- Sources ---------------------------------------------------------------------------


@pytest.fixture(scope='module')
def digits():
    source = digits_source.digits(Request('train[:1000]'))
    lengths = np.array([100, 300, 0, 250, 350])
    return dataclasses.replace(source, shard_lengths=lengths, in_memory=False)


def test_parts_of_a_split_are_of_parts_of_its_shards(digits):
    whole = dataclasses.replace(digits, split='train')
    part = cut('digits', ['train'], lambda _: whole, Request('train[50:700]'))
    assert part.shard_lengths.tolist() == [50, 300, 0, 250, 50]
    halves = cut('digits', ['train'], lambda _: whole, Request('train[fold!=1/2]+train[990:]'))
    assert halves.shard_lengths.tolist() == [100, 300, 0, 100, 0, 0, 0, 0, 0, 10]
    chosen = subset(whole, (3, 5), 'data.classes')
    labels = np.split(whole.labels(), np.cumsum(whole.shard_lengths)[:-1])
    assert chosen.shard_lengths.tolist() == [np.isin(part, (3, 5)).sum() for part in labels]
    without = dataclasses.replace(digits, shard_lengths=None)
    assert concatenate([whole, without], 'both', 'mixture').shard_lengths is None


def take(source, count, start=0, rows=slice(None), **settings):
    transform = transforms.parse('random_crop(size, 2) | flip_lr | rgb', size=(8, 8))
    kept = pipeline.Order(48, 1, shards=(windows.opened(source.shard_lengths, 4),))
    batches = pipeline.train_batches(
        source, transform, kept, start_step=start, rows=rows, **settings
    )
    result = list(itertools.islice(batches, count))
    batches.close()
    return result


def test_batches_are_the_same_after_a_restart_and_on_other_hosts(digits):
    whole = take(digits, 30)
    index = np.concatenate(
        [
            windows.example_indices(
                s, parts=(windows.opened(digits.shard_lengths, 4),), batch_size=48, seed=1
            )[0]
            for s in range(30)
        ]
    )
    labels = np.concatenate([batch['label'] for batch in whole])
    np.testing.assert_array_equal(labels, digits.labels()[index])
    for start, hosts in ((7, 1), (11, 2), (23, 4)):
        rows = np.arange(48).reshape(hosts, -1)
        parts = [take(digits, 30 - start, start, rows[h], num_threads=3) for h in range(hosts)]
        for step, batch in enumerate(whole[start:]):
            for name, column in batch.items():
                again = np.concatenate([part[step][name] for part in parts])
                np.testing.assert_array_equal(column, again)


def source_of(*lengths):
    shard_lengths = np.array(lengths) if lengths else None
    length = sum(lengths) or 500
    return sources.Source(
        'many', 'train', length, 1, None, dict, False, shard_lengths=shard_lengths
    )


def chosen(sources_, **keys):
    overrides = [(f'data.{name}', str(value).lower()) for name, value in keys.items()]
    config = config_lib.load('configs/fashion_mnist.py', overrides)
    return build_data._shards(config.data, sources_, 0)


def test_large_sets_are_read_in_windows_unless_the_config_says_no():
    large, small = source_of(*[100_000] * 100), source_of(*[100] * 200)
    (shards,) = chosen([large])
    assert (shards.lanes, shards.length) == (64, 10_000_000)
    for settings in ({'shuffle': True}, {'shuffle': False}):
        assert chosen([large], **settings) == ()
    assert chosen([small]) == chosen([source_of()]) == chosen([source_of(*[10**7] * 63)]) == ()
    shards, rest = chosen([large, source_of()], window=16)
    assert (shards.lanes, rest) == (16, 500)
    (shards,) = chosen([small], shuffle='windows')
    assert shards.lanes == 128


def test_windows_that_cannot_be_are_refused():
    with pytest.raises(UserError, match='many has no shards: set it to true'):
        chosen([source_of()], shuffle='windows')
    with pytest.raises(UserError, match=r'data\.window=1024 is more than the 300 examples'):
        chosen([source_of(100, 200)], shuffle='windows', window=1024)
    with pytest.raises(UserError, match=r'data\.window.*a power of two up to 65536'):
        chosen([source_of(100, 200)], window=100)


def test_shards_sorted_by_class_are_noticed():
    lengths, classes = np.full(200, 600), 10
    by_class = np.arange(120_000) * classes // 120_000
    shards = windows.Shards(lengths, 4)
    seen, there = windows.classes_at_a_time(shards, by_class.__getitem__, 0)
    assert there == pytest.approx(10, rel=0.01)
    assert 1 < seen <= 4.5  # Four shards, and of some the next one.
    text = windows.warning(shards, by_class.__getitem__, 0)
    advised = int(re.search(r'data\.window=(\d+),', text)[1])
    assert windows.warning(windows.Shards(lengths, advised), by_class.__getitem__, 0) is None
    assert windows.warning(windows.Shards(lengths, advised // 2), by_class.__getitem__, 0)
    mixed = np.random.default_rng(0).permutation(by_class)
    assert windows.warning(shards, mixed.__getitem__, 0) is None


@pytest.mark.parametrize('lanes', [1, 4])
def test_the_window_that_is_advised_is_enough(lanes):
    lengths = np.full(4000, 500)

    def label_of(index):
        return index * 1000 // 2_000_000

    advised = re.search(
        r'data\.window=(\d+)', windows.warning(windows.Shards(lengths, lanes), label_of, 0)
    )
    enough = windows.Shards(lengths, int(advised[1]))
    assert windows.warning(enough, label_of, 0) is None


def test_effective_numbers_are_exponentials_of_entropies():
    values = np.random.default_rng(0).integers(0, 50, 1000) ** 2
    counts = np.unique(values, return_counts=True)[1]
    assert windows.effective_number(values) == pytest.approx(np.exp(stats.entropy(counts)))


def test_a_run_is_warned_of_sorted_shards(capfd):
    labels = np.repeat(np.arange(10), 3000)
    sorted_ = dataclasses.replace(source_of(*[300] * 100), name='by class', labels=lambda: labels)
    chosen([sorted_], shuffle='windows', window=4)
    error = capfd.readouterr().err
    assert error.startswith(
        'data    WARNING by class: its shards are sorted by class: with 4 of 100'
    )
    assert error.count('\n') == 1
    chosen([sorted_], shuffle='windows', window=64)
    chosen([sorted_], shuffle=True)
    chosen([dataclasses.replace(sorted_, name='tfds:all')], shuffle='windows', window=4)
    assert capfd.readouterr().err == ''
