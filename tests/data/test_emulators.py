"""Data in the emulators of two object stores, through a proxy that loses, delays and refuses."""

import contextlib
import itertools

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from stores import end_reading_ahead
from tar_sets import opened, rows, shard
from tiny import png, write_features

from benchmarks import emulators
from big_vit.data import blocks, dataset, network, pipeline, windows
from big_vit.data.sources import arrow, indexing, parquet
from big_vit.data.sources.base import Request
from big_vit.errors import UserError

pytestmark = [
    pytest.mark.slow,
    # What the clients of the stores leave open when a test ends.
    pytest.mark.filterwarnings('ignore::ResourceWarning'),
    pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning'),
]


@pytest.fixture
def link():
    return emulators.Link()


@pytest.fixture(params=['s3', 'gs'])
def bucket(request, link, monkeypatch, tmp_path):
    lacking = emulators.lacking(request.param)
    if lacking:
        pytest.skip(f'needs {" and ".join(lacking)}')
    with (
        emulators.emulator(request.param) as upstream,
        emulators.proxy(upstream, link) as served,
    ):
        for name, value in emulators.environment(served.port).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv('BIG_VIT_CACHE', str(tmp_path / 'cache'))
        fsspec.get_filesystem_class(request.param).clear_instance_cache()
        monkeypatch.setattr(blocks, 'BLOCK_BYTES', 1 << 16)
        yield f'{request.param}://bucket'
        end_reading_ahead()
    fsspec.get_filesystem_class(request.param).clear_instance_cache()


def put(url, name, data):
    system, path = fsspec.core.url_to_fs(f'{url}/{name}')
    system.pipe_file(path, data)
    system.invalidate_cache()


def images(source, steps):
    shards = windows.opened(source.shard_lengths, 2)
    found = []
    for step in range(steps):
        index, _ = windows.example_indices(step, parts=(shards,), batch_size=8, seed=1)
        if source.expect is not None:
            source.expect(index)
        found += source.load(index)['image']
    return found


def test_tar_shards(bucket, link, tmp_path):
    local = tmp_path / 'local'
    local.mkdir()
    for number in range(4):
        data = shard(rows(number, count=40, picture=6000))
        (local / f'train-{number:04d}.tar').write_bytes(data)
        put(bucket, f'set/train-{number:04d}.tar', data)
    link.fault = emulators.in_turn
    assert indexing.index(f'{bucket}/set', say=lambda line: None)
    before = network.TRAFFIC.counts()
    source = opened(f'{bucket}/set')
    assert source.length == 160
    assert images(source, 20) == images(opened(str(local)), 20)
    assert {'refused', 'lost', 1.0} <= set(link.done)
    after = network.TRAFFIC.counts()
    total = sum(file.stat().st_size for file in local.iterdir())
    assert 0.9 * total < after['bytes'] - before['bytes'] < 1.2 * total + 50_000
    # All of it is on the local disk now.
    link.fault = lambda number: None
    again = network.TRAFFIC.counts()['bytes']
    source.load(np.arange(160))
    assert network.TRAFFIC.counts()['bytes'] == again
    # What is written beside the shards is found by others.
    put(bucket, 'set/train-0002.tar', shard(rows(9, count=3)))
    with pytest.raises(UserError, match=r'is older than 1 of 4 shards, such as train-0002\.tar'):
        opened(f'{bucket}/set')


def test_parquet(bucket, link, monkeypatch):
    random = np.random.default_rng(0)
    pictures = [random.bytes(20_000) for _ in range(40)]
    sink = pa.BufferOutputStream()
    table = pa.table({'image': pictures, 'label': [i % 3 for i in range(40)]})
    pq.write_table(table, sink, row_group_size=8, compression='none')
    put(bucket, 'q/train-00000-of-00001.parquet', sink.getvalue().to_pybytes())
    monkeypatch.setattr(arrow, 'IN_MEMORY_BYTES', 1000)
    link.fault = emulators.in_turn
    source = parquet.parquet(Request('train'), path=f'{bucket}/q')
    assert source.shard_lengths.tolist() == [8] * 5
    order = random.permutation(40)
    assert source.load(order)['image'] == [pictures[i] for i in order]
    assert link.done


PICTURES, ROWS = 96, 12


def write_set(folder, kind):
    """Write the same pictures in shards or groups of twelve; returns the keys of `data`."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (PICTURES, 10, 8, 3), dtype=np.uint8)
    files = [png(image).getvalue() for image in images]
    folder.mkdir()
    if kind == 'tar':
        for start in range(0, PICTURES, ROWS):
            members = [
                (f'{i:04d}', {'png': files[i], 'cls': str(i % 3).encode()})
                for i in range(start, start + ROWS)
            ]
            (folder / f'train-{start:04d}.tar').write_bytes(shard(members))
        return {'name': 'tar'}
    if kind == 'parquet':
        table = pa.table({'image': files, 'label': [i % 3 for i in range(PICTURES)]})
        pq.write_table(table, folder / 'train-00000-of-00001.parquet', row_group_size=ROWS)
        return {'name': 'parquet'}
    write_features(
        folder,
        'tiny',
        {
            'image': tfds.features.Image(shape=(10, 8, 3)),
            'label': tfds.features.ClassLabel(names=[*'abc']),
        },
        {'train': PICTURES},
        lambda i, _: {'image': png(images[i]), 'label': i % 3},
        num_shards=PICTURES // ROWS,
    )
    return {'name': 'tfds', 'tfds_name': 'tiny'}


def batches_of(path, settings, shuffle, steps=16):
    settings = {**settings, 'path': path}
    spec = dataset.Spec(
        key='data',
        name=settings.pop('name'),
        split='train',
        transform='decode | inception_crop(size) | flip_lr',
        image_size=(8, 8),
        settings=tuple(sorted(settings.items())),
        num_classes=3,
    )
    source, transform = dataset.open_examples((spec,))
    shards = (windows.opened(source.shard_lengths),) if shuffle == 'windows' else ()
    order = pipeline.Order(batch_size=16, seed=5, shards=shards)
    batches = pipeline.train_batches(source, transform, order, num_threads=2)
    with contextlib.closing(batches):
        return list(itertools.islice(batches, steps))


@pytest.mark.parametrize('kind', ['tar', 'parquet', 'array_record'])
def test_batches_are_those_of_local_files(bucket, link, tmp_path, monkeypatch, kind):
    """Bit for bit, in both orders, over more than two epochs, whatever the store does."""
    # Fits of patience are as long as those of real stores; here they would only take time.
    monkeypatch.setattr(network, '_FIRST_PAUSE_S', 0.05)
    folder = tmp_path / 'set'
    settings = write_set(folder, kind)
    monkeypatch.setattr(arrow, 'IN_MEMORY_BYTES', 1000)
    for file in folder.rglob('*'):
        if file.is_file():
            put(bucket, f'set/{file.relative_to(folder)}', file.read_bytes())
    link.fault = emulators.in_turn
    for shuffle in (True, 'windows'):
        ours = batches_of(f'{bucket}/set', settings, shuffle)
        wanted = batches_of(str(folder), settings, shuffle)
        for one, other in zip(ours, wanted, strict=True):
            assert one.keys() == other.keys() >= {'image', 'label'}
            for name in one:
                np.testing.assert_array_equal(one[name], other[name])
        assert len({batch['image'].tobytes() for batch in ours}) == len(ours)
    assert link.done


def test_buckets_that_are_not_there(bucket):
    for name in ('set', 'set/train-{0000..0003}.tar', 'set/*.tar'):
        path = f'{bucket}-of-nobody/{name}'
        with pytest.raises(UserError, match=r'data\.path: ') as caught:
            opened(path)
        assert '\n' not in str(caught.value)
        assert caught.value.status == 2


def test_what_is_not_allowed_is_told(bucket, monkeypatch):
    put(bucket, 'set/train-0000.tar', shard(rows(0)))
    monkeypatch.setattr(emulators.Proxy, 'answer', refuse)
    for verb in ('GET', 'HEAD', 'POST'):
        monkeypatch.setattr(emulators.Proxy, f'do_{verb}', refuse)
    fsspec.get_filesystem_class(bucket.partition(':')[0]).clear_instance_cache()
    with pytest.raises(UserError, match=r'data\.path: cannot read .*: give this machine access'):
        opened(f'{bucket}/set')


def refuse(self):
    self.rfile.read(int(self.headers.get('Content-Length') or 0))
    body = b'' if self.command == 'HEAD' else (
        b'<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>no</Message></Error>'
    )  # fmt: skip
    self.send_response(403)
    self.send_header('Content-Type', 'application/xml')
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    self.wfile.write(body)
