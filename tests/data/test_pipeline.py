"""Batches: the same on any number of hosts, after any restart, by any path."""

import dataclasses
import functools
import itertools
import threading
import time
import traceback

import jax
import numpy as np
import pytest
from gate import mostly_slow
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from tiny import write_folder

from big_vit.data import dataset, order, pipeline, sources, to_device, transforms
from big_vit.data.sources import digits as digits_source
from big_vit.data.sources.base import Request
from big_vit.data.transforms.operations import BadExampleError
from big_vit.errors import UserError

SIZE = (8, 8)
TEXT = 'random_crop(size, 2) | flip_lr | rgb'


@pytest.fixture(scope='module')
def digits():
    return digits_source.digits(Request('train[:50]'))


@pytest.fixture(scope='module')
def varying():
    """Images whose shape depends on the example, as decoded photographs have."""

    def load(indices):
        images = [np.full((9 + i % 3, 11, 3), i, np.uint8) for i in indices.tolist()]
        return {'image': images, 'label': indices.astype(np.int32)}

    return sources.Source('varying', 'train', 30, 30, None, load, False)


def transform_of(text=TEXT):
    return transforms.parse(text, size=SIZE)


def take(source, count, text=TEXT, **settings):
    settings = {'batch_size': 12, 'seed': 1} | settings
    names = {field.name for field in dataclasses.fields(pipeline.Order)}
    kept = pipeline.Order(**{k: v for k, v in settings.items() if k in names})
    more = {k: v for k, v in settings.items() if k not in names}
    batches = pipeline.train_batches(source, transform_of(text), kept, **more)
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def assert_same(batches, others):
    assert len(batches) == len(others)
    for a, b in zip(batches, others, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


def by_example(source):
    """The same source, loaded in threads instead of by vectorised indexing."""
    return dataclasses.replace(source, in_memory=False)


@pytest.mark.parametrize('shuffle', [True, False])
@pytest.mark.parametrize('batch_size', [12, 7, 64])
def test_both_paths_give_the_same_batches(digits, shuffle, batch_size):
    settings = {'batch_size': batch_size, 'shuffle': shuffle, 'start_step': 3}
    vectorised = take(digits, 8, **settings)
    assert vectorised[0]['image'].shape == (batch_size, 8, 8, 3)
    assert vectorised[0]['image'].dtype == np.uint8
    assert vectorised[0]['label'].dtype == np.int32
    assert_same(vectorised, take(by_example(digits), 8, num_threads=3, **settings))


@pytest.mark.parametrize('path', ['vectorised', 'threads', 'varying'])
def test_resuming_gives_the_rest_of_the_run(digits, varying, path):
    source = {'vectorised': digits, 'threads': by_example(digits), 'varying': varying}[path]
    whole = take(source, 10)
    for start in (1, 4, 9):
        assert_same(whole[start:], take(source, 10 - start, start_step=start))
    assert not np.array_equal(whole[0]['image'], take(source, 1, seed=2)[0]['image'])


@pytest.mark.parametrize('hosts', [2, 4])
@pytest.mark.parametrize('path', ['vectorised', 'threads', 'varying'])
def test_hosts_together_see_the_batches_of_one(digits, varying, path, hosts):
    source = {'vectorised': digits, 'threads': by_example(digits), 'varying': varying}[path]
    whole = take(source, 6)
    n = 12 // hosts
    parts = [take(source, 6, rows=slice(h * n, (h + 1) * n)) for h in range(hosts)]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_same(whole, joined)


def test_epochs_show_each_example_once_augmented_anew(varying):
    batches = take(varying, 10, text='resize_small(8) | central_crop(size)')
    labels = np.concatenate([batch['label'] for batch in batches]).reshape(4, 30)
    for epoch in labels:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(30))
    assert not np.array_equal(labels[0], labels[1])
    # Pixels belong to their labels.
    for batch in batches:
        assert (batch['image'] == batch['label'][:, None, None, None]).all()


def test_augmentation_is_new_each_epoch(digits):
    batches = take(digits, 2, batch_size=50, shuffle=False)
    np.testing.assert_array_equal(batches[0]['label'], batches[1]['label'])
    assert not np.array_equal(batches[0]['image'], batches[1]['image'])


@pytest.mark.parametrize(
    ('batch_size', 'hosts'),
    [(50, 1), (50, 2), (12, 1), (12, 4), (64, 1), (64, 2), (64, 4), (7, 1), (200, 4)],
)
def test_evaluation_counts_every_example_once(digits, batch_size, hosts):
    n = batch_size // hosts
    for source in (digits, by_example(digits)):
        parts = [
            list(
                pipeline.eval_batches(
                    source,
                    transform_of('rgb'),
                    batch_size=batch_size,
                    rows=slice(h * n, (h + 1) * n),
                )
            )
            for h in range(hosts)
        ]
        steps = pipeline.eval_steps(50, batch_size)
        assert {len(part) for part in parts} == {steps}
        whole = {
            name: np.concatenate([part[s][name] for s in range(steps) for part in parts])
            for name in ('image', 'label', 'mask')
        }
        assert whole['image'].dtype == np.uint8
        assert whole['label'].dtype == np.int32
        assert whole['mask'].dtype == np.float32
        np.testing.assert_array_equal(whole['mask'], np.arange(steps * batch_size) < 50)
        reference = digits.load(np.arange(50))
        np.testing.assert_array_equal(whole['label'][:50], reference['label'])
        np.testing.assert_array_equal(whole['image'][:50, ..., 1:2], reference['image'])
        assert not whole['image'][50:].any()
        assert not whole['label'][50:].any()


def test_evaluation_of_varying_shapes(varying):
    batches = list(
        pipeline.eval_batches(varying, transform_of('central_crop(size)'), batch_size=16)
    )
    assert [batch['mask'].sum() for batch in batches] == [16, 14]
    assert batches[0]['image'].shape == (16, 8, 8, 3)


def test_errors_in_threads_arrive_as_they_are():
    def load(indices):
        raise UserError('data.split: example 7 is broken')

    source = sources.Source('broken', 'train', 30, 30, (8, 8, 1), load, False)
    with pytest.raises(UserError, match='example 7 is broken'):
        take(source, 1)
    with pytest.raises(UserError, match='example 7 is broken'):
        list(pipeline.eval_batches(source, transform_of(), batch_size=4))


def loader_threads():
    return [t for t in threading.enumerate() if t.name.startswith('loader')]


def test_threads_end_with_the_batches(digits):
    take(by_example(digits), 2)
    assert not loader_threads()


@pytest.mark.parametrize('threads', [1, 2, 5])
def test_the_number_of_threads_does_not_matter(varying, threads):
    reference = take(varying, 5, batch_size=40, num_threads=3)
    assert_same(reference, take(varying, 5, batch_size=40, num_threads=threads))


def test_threads_work_no_further_ahead_than_a_few_batches():
    loaded = []

    def load(indices):
        loaded.append(len(indices))
        return {'image': np.zeros((len(indices), 8, 8, 1), np.uint8), 'label': indices}

    source = sources.Source('counting', 'train', 100, 100, (8, 8, 1), load, False)
    batches = pipeline.train_batches(source, transform_of(''), pipeline.Order(32, 0), num_threads=2)
    next(batches)
    time.sleep(0.2)
    assert sum(loaded) <= 32 * 4
    batches.close()


# --- Worker processes ------------------------------------------------------------------


def spec_of(**changes):
    values = {
        'key': 'data', 'name': 'fdsl', 'split': 'train[:70]', 'transform': TEXT,
        'image_size': SIZE, 'num_classes': 7, 'seed': 3,
    }  # fmt: skip
    return dataset.Spec(**{**values, **changes})


@pytest.mark.parametrize(
    'cache, workers',
    mostly_slow([('none', 1), ('none', 4), ('auto', 1), ('auto', 4)], ('auto', 1)),
)
def test_worker_processes_give_the_same_batches(workers, cache, tmp_path):
    # Small windows of JPEG files, which are scaled down while they are decoded, or kept whole.
    where = {
        'name': 'folder',
        'settings': (('path', str(write_folder(tmp_path, 70, 7))),),
        'cache': cache,
    }
    specs = (spec_of(split='train', transform='rrc(size) | flip_lr', **where),)
    source, transform = dataset.open_examples(specs)
    settings = {'batch_size': 20, 'seed': 5}
    kept = pipeline.Order(**settings)
    wanted = list(itertools.islice(pipeline.train_batches(source, transform, kept), 4))
    batches = pipeline.train_batches(
        source,
        transform,
        kept,
        start_step=1,
        workers=workers,
        opener=functools.partial(dataset.open_examples, specs, workers),
    )
    try:
        assert_same(wanted[1:], list(itertools.islice(batches, 3)))
    finally:
        batches.close()


# --- Properties ------------------------------------------------------------------------


def columns_of(source, transform, kept, hosts, steps, start=0, threads=None):
    """The batches of all hosts put together."""
    size = kept.batch_size // hosts
    parts = []
    for host in range(hosts):
        batches = pipeline.train_batches(
            source,
            transform,
            kept,
            start_step=start,
            rows=slice(host * size, (host + 1) * size),
            num_threads=threads,
        )
        parts.append(list(itertools.islice(batches, steps)))
        batches.close()
    return [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    weights=st.lists(st.sampled_from([1, 2, 0.5, 0.37]), min_size=3, max_size=3),
    batches=st.integers(1, 5),
    repeats=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**40),
    start=st.integers(0, 50),
    in_memory=st.booleans(),
)
def test_batches_do_not_depend_on_hosts_threads_or_restarts(
    lengths, weights, batches, repeats, seed, start, in_memory
):
    images = np.random.default_rng(0).integers(0, 256, (sum(lengths), 8, 8, 1), np.uint8)

    def load(indices):
        return {'image': images[indices], 'label': indices.astype(np.int32)}

    source = sources.Source('made', 'train', sum(lengths), 200, (8, 8, 1), load, in_memory)
    counts = order.shares(weights[: len(lengths)]) if len(lengths) > 1 else None
    kept = pipeline.Order(4 * batches, seed, True, repeats, tuple(lengths), counts)
    transform = transform_of('random_crop(size, 2) | flip_lr')
    whole = columns_of(source, transform, kept, 1, 4, start=start, threads=1)
    for hosts, threads in ((2, 2), (4, 1)):
        assert_same(whole, columns_of(source, transform, kept, hosts, 4, start, threads))
    assert_same(whole[2:], columns_of(source, transform, kept, 1, 2, start + 2, 3))


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.05, 20), min_size=4, max_size=4),
    batch=st.integers(1, 30),
    seed=st.integers(0, 2**40),
)
def test_every_example_comes_once_in_each_epoch_of_its_part(lengths, weights, batch, seed):
    counts = order.shares(weights[: len(lengths)]) if len(lengths) > 1 else None
    kept = pipeline.Order(batch, seed, lengths=tuple(lengths), counts=counts)
    steps = 3 * sum(lengths) // batch + 1
    found = [kept.indices(step, sum(lengths)) for step in range(steps)]
    index, view = (np.concatenate(parts) for parts in zip(*found, strict=True))
    starts = np.cumsum([0, *lengths])
    for first, last in itertools.pairwise(starts.tolist()):
        own = (index >= first) & (index < last)
        views = view[own]
        assert (np.diff(views) >= 0).all()
        for epoch in range(views.max(initial=-1)):
            seen = np.sort(index[own][views == epoch])
            np.testing.assert_array_equal(seen, np.arange(first, last))
    pairs = set(zip(index.tolist(), view.tolist(), strict=True))
    assert len(pairs) == len(index)


def test_parts_of_a_mixture_come_in_their_shares():
    counts = order.shares((0.7, 0.2, 0.1))
    kept = pipeline.Order(100, 0, lengths=(50, 500, 5000), counts=counts)
    index = np.concatenate([kept.indices(step, 5550)[0] for step in range(50)])
    part = np.searchsorted([50, 550], index, side='right')
    assert np.bincount(part).tolist() == [3500, 1000, 500]
    # Not by turns: rows of a batch, which devices share out, must not belong to parts.
    first = part.reshape(50, 100)[:, 0]
    assert len(set(first.tolist())) > 1
    shuffles = [index[(part == 0)][n : n + 50].tolist() for n in (0, 50)]
    assert shuffles[0] != shuffles[1]


def test_repeated_augmentation_shows_views_of_the_same_examples(digits):
    batches = take(digits, 5, batch_size=20, repeats=2)
    for batch in batches:
        np.testing.assert_array_equal(batch['label'][:10], batch['label'][10:])
        assert not np.array_equal(batch['image'][:10], batch['image'][10:])
    index = np.concatenate(
        [pipeline.Order(20, 1, repeats=2).indices(step, 50)[0][:10] for step in range(5)]
    )
    np.testing.assert_array_equal(np.sort(index), np.arange(50))


# --- Damaged examples ------------------------------------------------------------------


def damaged(bad, length=30):
    def load(indices):
        for row, i in enumerate(indices.tolist()):
            if i in bad:
                raise BadExampleError(row, 'damaged JPEG')
        images = np.broadcast_to(
            indices.astype(np.uint8)[:, None, None, None], (len(indices), 8, 8, 1)
        )
        return {'image': images, 'label': indices.astype(np.int32)}

    return sources.Source(
        'damaged', 'train', length, length, (8, 8, 1), load, False, where=lambda i: f'shard-{i}.tar'
    )


def test_a_damaged_example_stops_and_is_named():
    with pytest.raises(UserError, match=r"^shard-7\.tar: damaged JPEG; .*data\.on_error='skip'"):
        take(damaged({7}), 3, text='')


def test_a_damaged_example_is_replaced_by_the_next_whole_one():
    source = damaged({7, 8, 20})
    batches = take(source, 5, text='', skip_bad=True)
    clean = take(damaged(set()), 5, text='')
    for batch, whole in zip(batches, clean, strict=True):
        wanted = np.where(whole['label'] == 7, 9, whole['label'])
        wanted = np.where(whole['label'] == 8, 9, wanted)
        wanted = np.where(whole['label'] == 20, 21, wanted)
        np.testing.assert_array_equal(batch['label'], wanted)
        np.testing.assert_array_equal(batch['replaced'], wanted != whole['label'])
        np.testing.assert_array_equal(batch['image'][:, 0, 0, 0], wanted)
    assert sum(batch['replaced'].sum() for batch in batches) == 6
    halves = [
        take(source, 5, text='', skip_bad=True, rows=rows) for rows in (slice(6), slice(6, 12))
    ]
    for whole, *parts in zip(batches, *halves, strict=True):
        assert_same([whole], [{k: np.concatenate([p[k] for p in parts]) for k in whole}])


def test_where_nothing_is_whole_a_run_ends():
    with pytest.raises(UserError, match='so are the 16 examples after it'):
        take(damaged(set(range(30))), 1, text='', skip_bad=True)


def test_an_evaluation_leaves_damaged_examples_out():
    batches = list(
        pipeline.eval_batches(damaged({3, 4}), transform_of(''), batch_size=16, skip_bad=True)
    )
    mask = np.concatenate([batch['mask'] for batch in batches])
    np.testing.assert_array_equal(np.flatnonzero(mask), [i for i in range(30) if i not in (3, 4)])
    with pytest.raises(UserError, match=r'shard-3\.tar'):
        list(pipeline.eval_batches(damaged({3, 4}), transform_of(''), batch_size=16))


def test_images_of_two_shapes_end_with_a_hint(varying):
    with pytest.raises(
        UserError, match=r'data\.transform: images of 9x11x3 and 10x11x3 come .* add resize'
    ):
        take(varying, 1, text='')


def test_the_meter_tells_how_fast_the_loader_could_be(digits):
    meter = pipeline.Meter()
    assert meter.rate() is None
    take(by_example(digits), 4, meter=meter, num_threads=2)
    assert meter.threads == 2
    assert meter.rate() > 100
    meter.add(100, 2.0)
    assert meter.rate() == 100.0
    assert meter.rate() == 100.0


def batch_mesh(count):
    if jax.device_count() < count:
        pytest.skip(f'needs {count} devices')
    devices = np.array(jax.devices()[:count])
    return Mesh(devices.reshape(2, count // 2), ('replica', 'fsdp'))


def batch_sharding(count=4):
    return NamedSharding(batch_mesh(count), PartitionSpec(('replica', 'fsdp')))


def test_local_rows():
    def rows(sharding, batch_size):
        return to_device.local_rows(sharding, batch_size).tolist()

    assert rows(SingleDeviceSharding(jax.devices()[0]), 6) == list(range(6))
    assert rows(batch_sharding(), 16) == list(range(16))
    replicated = NamedSharding(batch_mesh(4), PartitionSpec(None))
    assert rows(replicated, 16) == list(range(16))
    with pytest.raises(UserError, match='batch_size=6 cannot be split over 4 devices'):
        rows(batch_sharding(), 6)


class PartOfAMachine(jax.sharding.Sharding):
    """A sharding of which this process holds some devices."""

    def __init__(self, parts):
        self.parts = parts

    def addressable_devices_indices_map(self, global_shape):
        del global_shape
        return {i: (part,) for i, part in enumerate(self.parts)}


def test_local_rows_of_one_host_of_many():
    middle = PartOfAMachine([slice(8, 12), slice(4, 8), slice(4, 8)])
    assert to_device.local_rows(middle, 16).tolist() == list(range(4, 12))
    last = PartOfAMachine([slice(12, None)])
    assert to_device.local_rows(last, 16).tolist() == [12, 13, 14, 15]
    apart = PartOfAMachine([slice(0, 2), slice(8, 10)])
    assert to_device.local_rows(apart, 16).tolist() == [0, 1, 8, 9]


@pytest.mark.parametrize('in_memory', [True, False])
def test_rows_that_are_not_neighbours(digits, in_memory):
    source = dataclasses.replace(digits, in_memory=in_memory)
    whole, rows = take(source, 3), np.array([0, 1, 6, 7, 10])
    for batch, expected in zip(take(source, 3, rows=rows), whole, strict=True):
        assert np.array_equal(batch['image'], expected['image'][rows])
        assert np.array_equal(batch['label'], expected['label'][rows])
    images = [
        pipeline.eval_batches(source, transform_of('resize(size)'), batch_size=12, rows=part)
        for part in (rows, np.setdiff1d(np.arange(12), rows))
    ]
    real = [sum(batch['mask'].sum() for batch in batches) for batches in images]
    assert sum(real) == source.length


def device_threads():
    return [t for t in threading.enumerate() if t.name == 'to_device']


def test_to_device_gives_global_arrays(digits):
    sharding = batch_sharding()
    expected = take(digits, 5)
    with (
        jax.transfer_guard('disallow'),
        to_device.to_device(iter(expected), sharding, batch_size=12) as batches,
    ):
        arrays = list(batches)
    for array in arrays:
        assert array['image'].sharding == sharding
        assert array['label'].sharding == sharding
    assert_same(expected, [jax.device_get(a) for a in arrays])
    assert not device_threads()
    assert list(batches) == []


def test_to_device_under_a_guard_of_the_whole_process(digits):
    # With several processes 'disallow' refuses this transfer too; with one, only this does.
    name = 'jax_transfer_guard_host_to_device'
    before = getattr(jax.config, name)
    jax.config.update(name, 'disallow_explicit')
    try:
        batches = take(digits, 1)
        with to_device.to_device(batches, batch_sharding(), batch_size=12) as moved:
            assert_same(batches, [jax.device_get(batch) for batch in moved])
    finally:
        jax.config.update(name, before)


def test_to_device_works_ahead_and_no_further():
    started = []

    def endless():
        for i in itertools.count():
            started.append(i)
            yield {'x': np.full(4, i, np.int32)}

    for prefetch in (1, 3):
        started.clear()
        with to_device.to_device(
            endless(), batch_sharding(), batch_size=4, prefetch=prefetch
        ) as batches:
            assert next(batches)['x'][0] == 0
            deadline = time.time() + 10
            while len(started) < prefetch + 2 and time.time() < deadline:
                time.sleep(0.01)
            time.sleep(0.1)
            # One was taken, `prefetch` wait, and one is in the hands of the thread.
            assert len(started) == prefetch + 2
        assert not device_threads()


def test_to_device_passes_errors_on():
    def breaks_here():
        yield {'x': np.zeros(4, np.int32)}
        raise UserError('data.path: gone')

    batches = to_device.to_device(breaks_here(), batch_sharding(), batch_size=4)
    next(batches)
    with pytest.raises(UserError, match='gone') as error:
        next(batches)
    assert 'breaks_here' in ''.join(traceback.format_tb(error.value.__traceback__))
    assert not device_threads()
    with pytest.raises(StopIteration):
        next(batches)


def test_to_device_passes_errors_of_closing_on():
    class Broken:
        def __iter__(self):
            return self

        def __next__(self):
            raise StopIteration

        def close(self):
            raise OSError('cannot close')

    with (
        to_device.to_device(Broken(), batch_sharding(), batch_size=4) as batches,
        pytest.raises(OSError, match='cannot close'),
    ):
        next(batches)


def test_to_device_closes_early(digits):
    closed = []

    def endless():
        try:
            yield from pipeline.train_batches(
                by_example(digits), transform_of(), pipeline.Order(4, 0)
            )
        finally:
            closed.append(True)

    batches = to_device.to_device(endless(), batch_sharding(), batch_size=4)
    next(batches)
    batches.close()
    batches.close()
    assert closed == [True]
    assert not device_threads()
    assert not loader_threads()
    unused = to_device.to_device(endless(), batch_sharding(), batch_size=4)
    unused.close()
    assert not device_threads()


def test_a_step_can_be_fed_without_any_other_transfer(digits):
    step = jax.jit(lambda total, batch: total + batch['label'].sum())
    total = jax.device_put(np.int32(0), NamedSharding(batch_mesh(4), PartitionSpec()))
    source = pipeline.train_batches(digits, transform_of(), pipeline.Order(12, 0))
    with (
        jax.transfer_guard('disallow'),
        to_device.to_device(source, batch_sharding(), batch_size=12) as batches,
    ):
        for _ in range(3):
            total = step(total, next(batches))
    assert int(total) == sum(int(b['label'].sum()) for b in take(digits, 3, seed=0))
