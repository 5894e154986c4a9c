"""Reading of remote shards: every byte and request is counted, and faults are injected."""

import concurrent.futures
import os
import struct
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stores import end_reading_ahead
from tar_sets import fill, held, opened

from big_vit.data import blocks, files, network, pipeline, read_ahead, transforms, windows
from big_vit.data.sources import arrow, indexing, parquet, tfrecord
from big_vit.data.sources.base import Request, Source
from big_vit.errors import Unavailable, UserError

BLOCK = 1 << 16
MAY_DOUBLE = network._Lateness.may_double


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('BIG_VIT_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(blocks, 'BLOCK_BYTES', BLOCK)
    monkeypatch.setattr(network, '_FIRST_PAUSE_S', 0.001)
    # On a busy machine a request may be late, and another would be counted.
    monkeypatch.setattr(network._Lateness, 'may_double', lambda self: False)
    blocks._opened.cache_clear()
    yield
    end_reading_ahead()


DATA = np.random.default_rng(0).bytes(10 * BLOCK + 100)


@pytest.fixture
def file(store):
    store.store['/bucket/x'] = held(DATA)
    return files.stored([files.place('counted://bucket/x', 'x')])[0]


def gets(store):
    return [size for operation, _, size in store.asked if operation == 'get']


def traffic(call):
    before = network.TRAFFIC.counts()
    result = call()
    after = network.TRAFFIC.counts()
    return result, {name: after[name] - before[name] for name in after}


def test_small_reads_are_small_until_a_part_of_a_block_was_read(store, file):
    store.asked.clear()
    for number in range(8):  # 8 * 512 bytes are a sixteenth.
        start = number * 512
        assert blocks.read_range(file, start, 512) == DATA[start : start + 512]
    assert gets(store) == [512] * 7 + [BLOCK]
    for start, size in ((0, BLOCK), (100, 7), (BLOCK - 9, 9)):
        assert blocks.read_range(file, start, size) == DATA[start : start + size]
    assert len(gets(store)) == 8
    # Over the edge of a block, the rest comes with its neighbour.
    start = BLOCK - 5000
    assert blocks.read_range(file, start, 10_000) == DATA[start : start + 10_000]
    assert gets(store)[8:] == [BLOCK]
    start = 10 * BLOCK
    assert blocks.read_range(file, start, 100) == DATA[start:]
    assert gets(store)[9:] == [100]


def test_what_is_expected_is_fetched_once_in_large_pieces(store, file):
    store.asked.clear()
    blocks.expect(file, [(0, 10), (BLOCK + 5, 3 * BLOCK)])
    threads = [
        threading.Thread(target=lambda: blocks.read_range(file, 2 * BLOCK, 100)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for start in range(0, 5 * BLOCK - 1000, 1000):
        assert blocks.read_range(file, start, 1000) == DATA[start : start + 1000]
    assert gets(store) == [BLOCK] * 5


def test_processes_of_a_host_fetch_a_block_once(store, file, tmp_path):
    """Two processes, each with a cache of its own in one folder; locks hold between open files."""
    store.faults = lambda operation, path, number: time.sleep(0.05)
    store.asked.clear()
    caches = [blocks._Blocks(tmp_path / 'shared', 1 << 30) for _ in range(2)]
    read = []

    def work(cache):
        for number in range(4):
            read.append(cache.read(file, number * BLOCK, BLOCK) == DATA[number * BLOCK :][:BLOCK])

    threads = [threading.Thread(target=work, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read == [True] * 8
    assert gets(store) == [BLOCK] * 4
    assert sorted(path.name for path in (tmp_path / 'shared').glob('*/*')) == list('0123')


def test_what_was_used_least_lately_is_dropped(store, file, tmp_path, monkeypatch):
    monkeypatch.setenv('BIG_VIT_CACHE_GB', str(4 * BLOCK / 1e9))
    for number in (0, 1, 2, 0, 3, 0, 4, 0, 5, 0):
        blocks.read_range(file, number * BLOCK, BLOCK)
        time.sleep(0.01)
        kept = list((tmp_path / 'cache' / 'blocks').glob('*/*'))
        assert sum(path.stat().st_size for path in kept) <= 4 * BLOCK
    assert sorted(int(path.name) for path in kept) == [0, 4, 5]
    asked = len(gets(store))
    blocks.read_range(file, 0, BLOCK)
    assert len(gets(store)) == asked
    blocks.read_range(file, BLOCK, BLOCK)
    assert len(gets(store)) == asked + 1


def test_room_is_made_beside_files_of_others(store, file, tmp_path, monkeypatch):
    monkeypatch.setenv('BIG_VIT_CACHE_GB', str(3 * BLOCK / 1e9))
    blocks.read_range(file, 0, BLOCK)
    (folder,) = (tmp_path / 'cache' / 'blocks').iterdir()
    for name in ('notes.txt', '.DS_Store', 'x', '7.part'):
        (folder / name).write_bytes(bytes(2 * BLOCK))
        os.utime(folder / name, (0, 0))
    for number in range(1, 6):
        assert blocks.read_range(file, number * BLOCK, BLOCK) == DATA[number * BLOCK :][:BLOCK]
    names = {path.name for path in folder.iterdir()}
    assert {'notes.txt', '.DS_Store', 'x', '7.part', '5'} <= names and '0' not in names


def test_a_changed_file_is_fetched_anew(store, file):
    assert blocks.read_range(file, 0, BLOCK) == DATA[:BLOCK]
    store.store['/bucket/x'] = held(bytes(len(DATA)))
    other = files.stored([file.place])[0]
    assert other.stamp != file.stamp
    assert blocks.read_range(other, 0, BLOCK) == bytes(BLOCK)


def test_a_disk_that_cannot_be_written_is_told_once(store, file, tmp_path, capfd):
    (tmp_path / 'cache').write_text('no folder')
    for number in range(3):
        assert blocks.read_range(file, number * BLOCK, BLOCK) == DATA[number * BLOCK :][:BLOCK]
    assert capfd.readouterr().err.count('are not kept on this disk: make room, or set') == 1


@pytest.mark.parametrize('text', ['much', '-1', 'nan', '1e999'])
def test_a_limit_that_is_none(store, file, monkeypatch, text):
    monkeypatch.setenv('BIG_VIT_CACHE_GB', text)
    with pytest.raises(UserError, match=r'BIG_VIT_CACHE_GB=.*: is not a number of gigabytes'):
        blocks.read_range(file, 0, 10)


# --- Read ahead -------------------------------------------------------------------------


def held_up(store, monkeypatch, wanted):
    """Hold up small requests until so many are under way; returns whether they have been."""
    under_way, lock, have_been = set(), threading.Lock(), threading.Event()
    get = store.cat_file

    def counted(self, path, start=None, end=None, **kwargs):
        if path.endswith(('.tar', '/x')) and end is not None and end - start < BLOCK:
            with lock:
                under_way.add((path, start))
                if len(under_way) >= wanted:
                    have_been.set()
            have_been.wait(10)
        return get(self, path, start, end, **kwargs)

    monkeypatch.setattr(store, 'cat_file', counted)
    return have_been


def test_what_is_read_soon_is_asked_for_at_once_and_kept_until_it_was_read(
    store, file, monkeypatch
):
    monkeypatch.setattr(blocks, '_ENOUGH', 2)  # No block is fetched as well.
    have_been = held_up(store, monkeypatch, read_ahead.IN_FLIGHT)
    store.asked.clear()
    ranges = [(7 * i, 100) for i in range(read_ahead.IN_FLIGHT)]
    blocks.expect_soon(file, ranges)
    blocks.expect_soon(file, ranges[:1])
    for offset, size in [*ranges, ranges[0]]:
        assert blocks.read_range(file, offset, size) == DATA[offset : offset + size]
    assert gets(store) == [100] * read_ahead.IN_FLIGHT
    assert have_been.is_set()
    ahead = blocks._cache().ahead
    assert not ahead._coming and not ahead._bytes


def test_no_more_is_read_ahead_than_memory_is_given(store, file, monkeypatch):
    monkeypatch.setattr(read_ahead, '_MOST_BYTES', 1000)
    monkeypatch.setattr(read_ahead, '_FORGOTTEN', 20)
    store.asked.clear()
    blocks.expect_soon(file, [(7 * i, 100) for i in range(15)])
    ahead = blocks._cache().ahead
    assert [what.offset for what in ahead._coming] == [7 * i for i in range(10)]
    assert blocks.read_range(file, 7 * 12, 100) == DATA[7 * 12 :][:100]
    # What nobody came for gives way at last.
    blocks.expect_soon(file, [(3 * i, 100) for i in range(100, 112)])
    assert 3 * 111 in [what.offset for what in ahead._coming]
    assert ahead._bytes == 100 * len(ahead._coming) <= 1000


def test_who_needs_an_example_does_not_wait_for_its_block(store, file, monkeypatch):
    monkeypatch.setattr(blocks, '_SPARE_BLOCKS', 1)
    blocks._opened.cache_clear()
    come = threading.Event()
    get = store.cat_file

    def slow_blocks(self, path, start=None, end=None, **kwargs):
        assert end is None or end - start < BLOCK or come.wait(30)
        return get(self, path, start, end, **kwargs)

    monkeypatch.setattr(store, 'cat_file', slow_blocks)
    blocks.expect(file, [(0, 3 * BLOCK)])
    size = BLOCK // 4
    ranges = [(number * size, size) for number in range(6)]
    blocks.expect_soon(file, ranges)
    for offset, _ in ranges[:4]:
        assert blocks.read_range(file, offset, size) == DATA[offset : offset + size]
    # As much as a block was spared; the rest comes with the blocks.
    assert sorted(gets(store)) == [size] * 4
    come.set()
    for offset, _ in ranges[4:]:
        assert blocks.read_range(file, offset, size) == DATA[offset : offset + size]
    assert gets(store).count(size) == 4


@pytest.mark.parametrize('shuffle', [True, 'windows'])
def test_a_run_has_many_requests_under_way(store, shuffle, monkeypatch):
    """With one thread of a loader: bytes under way, not threads, are what covers a latency."""
    path = fill(store, 8, count=64)
    indexing.index(path, say=lambda line: None)
    source = opened(path, text_column=None)
    shards = (windows.opened(source.shard_lengths, 4),) if shuffle == 'windows' else ()
    kept = pipeline.Order(batch_size=16, seed=3, shards=shards)
    have_been = held_up(store, monkeypatch, 48)
    transform = transforms.parse("keep('label')", size=(8, 8))
    batches = pipeline.train_batches(source, transform, kept, num_threads=1)
    next(batches)
    batches.close()
    assert have_been.is_set()


# --- Faults ----------------------------------------------------------------------------


def test_requests_that_fail_are_repeated_and_counted(store, file):
    failing = iter([True, True, False, True, False])

    def fault(operation, path, number):
        if next(failing, False):
            raise OSError('503 Slow Down')

    store.asked.clear()
    store.faults = fault
    data, counted = traffic(lambda: blocks.read_range(file, 0, 100) + blocks.read_range(file, 1, 9))
    assert data == DATA[:100] + DATA[1:10]
    assert len(store.asked) == 5
    assert counted == {
        'requests': 2, 'bytes': 109, 'retries': 3, 'doubled': 0, 'hits': 0, 'misses': 2,
    }  # fmt: skip


def test_a_short_answer_is_asked_for_again(store, file):
    cut = iter([50, 99])
    store.faults = lambda operation, path, number: next(cut, None)
    assert blocks.read_range(file, 0, 100) == DATA[:100]
    store.asked.clear()
    with pytest.raises(OSError, match='ends at byte'):
        files.read_range(file.place, len(DATA) - 10, 20)
    assert len(store.asked) == 3


@pytest.mark.parametrize(
    'error', [PermissionError('x'), OSError('Forbidden: x'), FileNotFoundError('x'), TypeError()]
)
def test_what_no_repetition_cures_is_not_repeated(store, file, error):
    def fault(operation, path, number):
        raise error

    store.asked.clear()
    store.faults = fault
    with pytest.raises(type(error)):
        files.read_range(file.place, 0, 10)
    assert len(store.asked) == 1


def test_patience_ends(store, file, monkeypatch):
    monkeypatch.setattr(network, 'PATIENCE_S', 0.05)

    def fault(operation, path, number):
        raise OSError('503')

    store.faults = fault
    began = time.monotonic()
    with pytest.raises(OSError, match='503'):
        files.read_range(file.place, 0, 10)
    assert time.monotonic() - began < 5


def test_a_late_request_is_doubled_and_the_first_answer_counts(store, file, monkeypatch):
    monkeypatch.setattr(network, '_lateness', network._Lateness())
    monkeypatch.setattr(network._Lateness, 'may_double', MAY_DOUBLE)
    for _ in range(40):
        files.read_range(file.place, 0, 100)
    late = iter([2.0])

    def fault(operation, path, number):
        time.sleep(next(late, 0))

    store.faults = fault
    began = time.monotonic()
    data, counted = traffic(lambda: files.read_range(file.place, 7, 100))
    assert data == DATA[7:107]
    assert time.monotonic() - began < 1.5
    assert (counted['doubled'], counted['requests']) == (1, 1)


def test_a_store_that_is_slow_for_all_does_not_get_twice_the_load(store, file, monkeypatch):
    monkeypatch.setattr(network, '_lateness', network._Lateness())
    monkeypatch.setattr(network._Lateness, 'may_double', MAY_DOUBLE)
    for _ in range(20):
        files.read_range(file.place, 0, 100)
    store.faults = lambda operation, path, number: time.sleep(0.03 * (number % 2))
    _, counted = traffic(lambda: [files.read_range(file.place, 0, 100) for _ in range(60)])
    assert counted['doubled'] <= 1 + 80 // 20


# --- A run -----------------------------------------------------------------------------


def fine(operation, path, number):
    if number % 7 == 3 and operation == 'get':
        raise OSError('503 Slow Down')


@pytest.mark.parametrize('faults', [None, pytest.param(fine, marks=pytest.mark.slow)])
def test_an_epoch_with_locality_reads_each_byte_about_once(store, faults, tmp_path):
    path = fill(store, 8, count=64)
    indexing.index(path, say=lambda line: None)
    source = opened(path, text_column=None)
    local = tmp_path / 'local'
    local.mkdir()
    for name, data in store.store.items():
        (local / name.rpartition('/')[2]).write_bytes(data.getvalue())
    total = sum(len(data.getvalue()) for name, data in store.store.items() if name.endswith('.tar'))
    store.asked.clear()
    store.faults = faults
    ours = batches_of_images(source, 8 * 64 // 8)
    read = store.bytes_of('.tar')
    assert 0.5 * total < read < 1.1 * total
    requests = [size for _, path, size in store.asked if path.endswith('.tar') and size]
    assert np.median(requests) == BLOCK
    assert ours == batches_of_images(opened(str(local)), 8 * 64 // 8)


def batches_of_images(source, count):
    shards = windows.opened(source.shard_lengths, 4)
    kept = pipeline.Order(batch_size=8, seed=3, shards=(shards,))

    def loaded(step):
        index, _ = kept.indices(step, source.length)
        if source.expect is not None:
            source.expect(kept.indices(step + 2, source.length)[0])
        return source.load(index)['image']

    return [loaded(step) for step in range(count)]


def parquet_in(store, groups=6, rows=5, picture=40_000):
    random = np.random.default_rng(5)
    pictures = [random.bytes(picture) for _ in range(groups * rows)]
    table = pa.table({'image': pictures, 'label': [i % 3 for i in range(len(pictures))]})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=rows, compression='none')
    data = sink.getvalue().to_pybytes()
    store.store['/bucket/q/train-00000-of-00001.parquet'] = held(data)
    store.asked.clear()
    return pictures, data


def test_parquet_in_a_store_is_read_by_groups(store, monkeypatch):
    pictures, _ = parquet_in(store)
    monkeypatch.setattr(arrow, 'IN_MEMORY_BYTES', 1000)
    source = parquet.parquet(Request('train'), path='counted://bucket/q')
    assert source.shard_lengths.tolist() == [5] * 6
    # The footer, and the labels.
    assert store.bytes_of() < 3 << 16
    store.asked.clear()
    assert source.load(np.array([7, 9]))['image'] == [pictures[7], pictures[9]]
    assert 5 * 40_000 < store.bytes_of() < 5 * 40_000 + (2 << 16)
    store.asked.clear()
    assert source.load(np.array([5, 6, 8]))['label'].tolist() == [2, 0, 2]
    assert not store.asked


def test_all_groups_of_parquet_are_read_once_whatever_fails(store, monkeypatch):
    pictures, data = parquet_in(store)
    monkeypatch.setattr(arrow, 'IN_MEMORY_BYTES', 1000)
    store.faults = fine
    source = parquet.parquet(Request('train'), path='counted://bucket/q')
    store.asked.clear()
    source.expect(np.arange(30))
    order = np.random.default_rng(0).permutation(30)
    assert source.load(order)['image'] == [pictures[i] for i in order]
    assert len(data) * 0.95 < store.bytes_of() < len(data) * 1.5


def records_in(store, counts=(4, 3)):
    random = np.random.default_rng(2)
    records = [[random.bytes(20_000 + i) for i in range(count)] for count in counts]
    for number, part in enumerate(records):
        data = b''.join(
            struct.pack('<Q', len(r))
            + struct.pack('<I', tfrecord.masked_crc(struct.pack('<Q', len(r))))
            + r
            + struct.pack('<I', tfrecord.masked_crc(r))
            for r in part
        )
        store.store[f'/bucket/r/x-train.tfrecord-0000{number}-of-00002'] = held(data)
    places = [files.place(f'counted://bucket/r/x-train.tfrecord-0000{n}-of-00002', 'x')
              for n in range(2)]  # fmt: skip
    return [record for part in records for record in part], places


def test_who_waited_for_a_fetch_that_failed_keeps_what_it_fetches(store, file, tmp_path, capsys):
    # As two processes, which share the folder and nothing else.
    first, second = (blocks._Blocks(tmp_path / 'shared', 1 << 30) for _ in range(2))
    asked, waits = threading.Event(), threading.Event()
    store.asked.clear()

    def fault(operation, path, number):
        if number == 0:
            asked.set()
            waits.wait(10)
            time.sleep(0.1)  # The second comes to the lock.
            raise PermissionError('not now')
        time.sleep(0.1)  # The first has ended.

    store.faults = fault
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        failing = pool.submit(first.read, file, 0, 100, at_once=True)
        assert asked.wait(10)
        waiting = pool.submit(second.read, file, 0, 100, at_once=True)
        waits.set()
        assert waiting.result() == DATA[:100]
        assert isinstance(failing.exception(), PermissionError)
    assert second._limit
    assert [path.name for path in (tmp_path / 'shared').glob('*/*')] == ['0']
    assert 'cannot be written' not in capsys.readouterr().out


def test_a_file_that_is_forgotten_while_it_is_fetched_is_no_full_disk(store, file, capsys):
    store.faults = lambda operation, path, number: blocks.forget(file)
    assert blocks.read_small(file) == DATA
    store.faults = None
    assert blocks.read_small(file) == DATA
    assert 'cannot be written' not in capsys.readouterr().out
    store.asked.clear()
    assert blocks.read_small(file) == DATA
    assert not gets(store)


@pytest.mark.parametrize('has_index', [True, False])
def test_records_in_a_store_are_indexed_when_they_are_needed(store, has_index):
    wanted, places = records_in(store)
    if has_index:
        indexing.index('counted://bucket/r', say=lambda line: None)
    store.asked.clear()
    records = tfrecord.Records(places, [4, 3])
    assert store.bytes_of('-of-00002') == 0
    assert [records.read(i) for i in (5, 4, 6)] == [wanted[i] for i in (5, 4, 6)]
    assert {path for _, path, _ in store.asked if path.endswith('-of-00002')} == {places[1].path}
    assert [records.read(i) for i in range(7)] == wanted


def test_a_record_that_changed_is_noticed(store):
    pytest.importorskip('google_crc32c')
    wanted, places = records_in(store)
    indexing.index('counted://bucket/r', say=lambda line: None)
    records = tfrecord.Records(places, [4, 3])
    data = bytearray(store.store[places[0].path].getvalue())
    data[25_000] ^= 1
    store.store[places[0].path] = held(bytes(data))
    assert records.read(0) == wanted[0]
    with pytest.raises(OSError, match='the record at byte 20,028 has another checksum'):
        records.read(1)


def test_a_record_whose_copy_on_the_disk_is_damaged_is_read_again(store, tmp_path):
    pytest.importorskip('google_crc32c')
    wanted, places = records_in(store)
    records = tfrecord.Records(places, [4, 3])
    records.expect(np.arange(4))
    assert [records.read(i) for i in range(4)] == wanted[:4]
    (copy,) = (tmp_path / 'cache' / 'blocks').glob('*/0')
    data = bytearray(copy.read_bytes())
    data[25_000] ^= 1
    copy.write_bytes(data)
    assert records.read(1) == wanted[1]


def test_a_damaged_record_in_a_store_is_no_outage(store):
    pytest.importorskip('google_crc32c')
    wanted, places = records_in(store)
    indexing.index('counted://bucket/r', say=lambda line: None)
    records = tfrecord.Records(places, [4, 3])
    data = bytearray(store.store[places[0].path].getvalue())
    data[25_000] ^= 1
    store.store[places[0].path] = held(bytes(data))

    def load(indices):
        read = [np.frombuffer(records.read(int(i))[:3], np.uint8) for i in indices]
        return {'image': np.stack(read)[:, None, None], 'label': np.zeros(len(read), np.int32)}

    source = Source(
        *('records', 'train', 7, 1, (1, 1, 3), load),
        in_memory=False,
        where=lambda index: f'{places[0]}, record {index}',
    )
    transform = transforms.parse('', size=(1, 1), key='data')
    index = np.array([1])
    loaded = pipeline.load(source, transform, index, 0, 0, skip_bad=True)
    assert loaded['replaced'].tolist() == [1]
    assert loaded['image'].tobytes() == wanted[2][:3]
    with pytest.raises(UserError, match='another checksum; repair or remove it') as caught:
        pipeline.load(source, transform, index, 0, 0)
    assert caught.value.status == UserError.status


def test_records_that_do_not_add_up(store):
    _, places = records_in(store)
    with pytest.raises(UserError, match=r'3 records, but dataset_info\.json says 5'):
        tfrecord.Records(places, [4, 5]).read(5)
    indexing.index('counted://bucket/r', say=lambda line: None)
    with pytest.raises(UserError, match=r'3 records, but dataset_info\.json says 5'):
        tfrecord.Records(places, [4, 5])


def test_a_store_that_does_not_answer_is_unavailable(store, monkeypatch):
    monkeypatch.setattr(network, 'PATIENCE_S', 0.05)
    path = fill(store, 1, folder='bucket/gone')

    def fault(operation, path, number):
        if operation == 'get':
            raise OSError('503')

    store.faults = fault
    with pytest.raises(UserError, match='cannot read counted') as caught:
        opened(path)
    assert caught.value.status == Unavailable.status
