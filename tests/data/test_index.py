"""Indices beside shards: against Python's tarfile and the walk; requests of a store are counted."""

import json
import struct
import tarfile
import zlib

import numpy as np
import pytest
from stores import Store
from tar_sets import fill, held, opened, rows, shard, write

from big_vit import prepare
from big_vit.data import files, network
from big_vit.data.sources import indexing, parquet, sidecars, tar
from big_vit.data.sources.base import Request
from big_vit.distributed import hosts
from big_vit.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('BIG_VIT_CACHE', str(tmp_path / 'cache'))
    # On a busy machine a request may be late, and another would be counted.
    monkeypatch.setattr(network._Lateness, 'may_double', lambda self: False)


def refused(call, message):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert '\n' not in str(error.value)


def same(one, other):
    assert (one.length, one.num_classes, one.class_names) == (
        other.length,
        other.num_classes,
        other.class_names,
    )
    every = np.arange(one.length)[::-1]
    ours, theirs = one.load(every), other.load(every)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert list(ours[name]) == list(theirs[name])
    np.testing.assert_array_equal(one.labels(), other.labels())


quiet = {'say': lambda line: None}


@pytest.mark.parametrize('text_column', [None, 'txt', 'fr.txt'])
def test_a_set_with_an_index_is_the_one_without(tmp_path, text_column):
    path = write(tmp_path / 'set')
    walked = opened(path, text_column=text_column)
    indexing.index(path, **quiet)
    same(opened(path, text_column=text_column), walked)


def test_an_index_says_what_tarfile_finds(tmp_path):
    path = write(tmp_path / 'set', 1)
    indexing.index(path, **quiet)
    file = files.place(f'{path}/train-0000.tar.index', 'x')
    about, arrays = sidecars.unpack(files.read(file), file, path)
    with tarfile.open(f'{path}/train-0000.tar') as archive:
        members = {m.name: (m.offset_data, m.size) for m in archive}
    pictures = [place for name, place in members.items() if name.endswith('.jpg')]
    assert list(zip(arrays['offset'].tolist(), arrays['size'].tolist(), strict=True)) == pictures
    for ending in ('cls', 'txt', 'fr.txt'):
        wanted = [members[f'000{i:04d}.{ending}'] for i in range(7)]
        assert [tuple(place) for place in arrays[f'in {ending}'].tolist()] == wanted
    assert about['counts'] == [7, 0, 0, 0]


def test_opening_is_a_listing_and_the_index(store, monkeypatch):
    monkeypatch.setenv('BIG_VIT_CACHE_GB', '0')
    path = fill(store)
    indexing.index(path, **quiet)
    store.asked.clear()
    source = opened(path)
    assert (source.length, source.num_classes) == (35, 4)
    assert store.counts() == {'isdir': 1, 'list': 1, 'get': 1}
    assert store.bytes_of() == len(store.store['/bucket/set/big_vit.index'].getvalue())
    store.asked.clear()
    loaded = source.load(np.array([8, 9]))
    # The index of the one shard, and each picture with its header.
    assert [path.rpartition('/')[2] for _, path, _ in store.asked] == [
        'train-0001.tar.index',
        'train-0001.tar',
        'train-0001.tar',
    ]
    sizes = [len(dict(rows(1))[f'001{i:04d}']['jpg']) for i in (1, 2)]
    assert store.bytes_of('.tar') == sum(sizes) + 2 * 512
    assert [len(image) for image in loaded['image']] == sizes
    assert loaded['label'].tolist() == [2, 3]


def test_a_range_of_shards_is_one_listing(store):
    fill(store, 12)
    indexing.index('counted://bucket/set', **quiet)
    store.asked.clear()
    source = opened('counted://bucket/set/train-{0002..0010}.tar')
    assert source.length == 9 * 7
    assert store.counts() == {'list': 1, 'get': 1}
    refused(
        lambda: opened('counted://bucket/set/train-{0002..0013}.tar'), r'there is no shard .*0012'
    )


def test_what_is_there_is_not_made_again(store):
    path = fill(store)
    said = []
    indexing.index(path, say=said.append)
    store.asked.clear()
    indexing.index(path, say=said.append)
    assert store.bytes_of('.tar') == 0
    assert said[2] == 'indexed 5 shards with 35 examples; 5 of them were there'
    # One shard is new, and one is another.
    store.store['/bucket/set/train-0001.tar'] = held(shard(rows(1, count=9)))
    store.store['/bucket/set/train-0009.tar'] = held(shard(rows(9)))
    store.asked.clear()
    indexing.index(path, say=said.append)
    read = {path.rpartition('/')[2] for _, path, size in store.asked if path.endswith('.tar')}
    assert read == {'train-0001.tar', 'train-0009.tar'}
    assert opened(path).length == 35 + 2 + 7


def test_an_index_that_was_stopped_goes_on(store):
    path = fill(store, 6)

    def fault(operation, path, number):
        if path.endswith('train-0004.tar'):
            raise PermissionError('denied')

    store.faults = fault
    refused(lambda: indexing.index(path, **quiet), r'train-0004\.tar: cannot be read')
    written = {name for name in store.store if name.endswith('.tar.index')}
    assert 0 < len(written) < 6
    store.faults = None
    store.asked.clear()
    indexing.index(path, **quiet)
    read = {name for operation, name, _ in store.asked if name.endswith('.tar')}
    assert read == {name for name in store.store if name.endswith('.tar')} - {
        name.removesuffix('.index') for name in written
    }
    assert opened(path).length == 42


def test_hosts_share_the_work_and_the_last_one_joins_it(store):
    path, said = fill(store, 7), []
    assert not indexing.index(path, share=(2, 3), say=said.append)
    assert said[-1] == 'waits   for --share 0/3, 1/3'
    assert not indexing.index(path, share=(0, 3), **quiet)
    assert '/bucket/set/big_vit.index' not in store.store
    assert indexing.index(path, share=(1, 3), **quiet)
    read = [name for operation, name, size in store.asked if name.endswith('.tar') and size]
    assert len(read) == len(set(read)) == 7
    assert not [name for name in store.store if '-of-' in name]
    shared = store.store['/bucket/set/big_vit.index'].getvalue()
    indexing.index(path, **quiet)
    assert store.store['/bucket/set/big_vit.index'].getvalue() == shared
    assert opened(path).length == 49


def test_a_store_that_is_read_only_has_its_index_elsewhere(tmp_path, store):
    path = fill(store)

    def fault(operation, path, number):
        if operation == 'put':
            raise PermissionError('read-only')

    store.faults = fault
    refused(lambda: indexing.index(path, **quiet), 'cannot be written .*--to PLACE')
    indexing.index(path, to=str(tmp_path / 'index'), **quiet)
    assert opened(path, index=str(tmp_path / 'index')).length == 35
    refused(
        lambda: opened(path, index=str(tmp_path)),
        r'data\.index: no big_vit\.index in .*prepare index counted://bucket/set --to ',
    )


def test_an_index_elsewhere_is_of_one_folder(tmp_path):
    for number in range(2):
        write(tmp_path / f'set{number}')
    path = str(tmp_path / 'set{0..1}' / 'train-{0000..0002}.tar')
    assert opened(path).length == 42
    refused(lambda: opened(path, index=str(tmp_path)), r'data\.index: is of .* in 2: make each')


def test_a_copy_of_shards_is_read_by_the_copy_of_their_index(tmp_path):
    path = write(tmp_path / 'set')
    indexing.index(path, **quiet)
    copy = tmp_path / 'copy'
    copy.mkdir()
    for file in (tmp_path / 'set').iterdir():  # Times of change are lost.
        (copy / file.name).write_bytes(file.read_bytes())
    same(opened(str(copy)), opened(path))


@pytest.mark.parametrize('change', ['size', 'time'])
def test_an_index_older_than_a_shard_is_refused(tmp_path, change):
    import os

    path = write(tmp_path / 'set')
    indexing.index(path, **quiet)
    file = tmp_path / 'set' / 'train-0001.tar'
    if change == 'size':
        file.write_bytes(shard(rows(1, count=8)))
    os.utime(file, (1, 1))
    refused(
        lambda: opened(path),
        r'big_vit\.index: is older than 1 of 3 shards, such as train-0001\.tar: run `python -m '
        rf'big_vit\.prepare index {path}`$',
    )
    indexing.index(path, **quiet)
    assert opened(path).length == 21 + (change == 'size')


def test_a_shard_that_changed_in_its_place_is_noticed_when_it_is_read(store):
    path = fill(store)
    indexing.index(path, **quiet)
    source = opened(path)
    store.store['/bucket/set/train-0000.tar'] = held(shard(rows(0, picture=2999)))
    assert source.load(np.array([7]))['label'].tolist() == [1]
    refused(
        lambda: source.load(np.array([3])),
        r'train-0000\.tar: no file of 3,093 bytes is at byte .*: run `python -m big_vit\.prepare',
    )


def test_shards_that_the_index_knows_nothing_of(tmp_path):
    path = write(tmp_path / 'set')
    indexing.index(path, **quiet)
    (tmp_path / 'set' / 'train-0007.tar').write_bytes(shard(rows(7)))
    refused(lambda: opened(path), 'says nothing of 1 of 4 shards, such as train-0007.tar: run `')


def test_indices_of_two_times_are_refused(store):
    path = fill(store)
    indexing.index(path, **quiet)
    other = store.store['/bucket/set/train-0001.tar.index'].getvalue()
    source = opened(path)
    store.store['/bucket/set/train-0000.tar.index'] = held(other)
    refused(lambda: source.load(np.array([0])), r'train-0000\.tar\.index: is not of the same time')
    del store.store['/bucket/set/train-0000.tar.index']
    refused(lambda: source.load(np.array([0])), r'train-0000\.tar\.index: is not there: run `')


def reformatted(data):
    return data[:7] + b'2' + data[8:]


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (reformatted, 'is of format 2, and this program reads format 1: run `python -m big_vit'),
        (lambda data: data[:-1], r'is damaged \(its checksum is another\): run `'),
        (lambda data: data[:20] + b'x' + data[21:], r'is damaged \(its checksum is another\)'),
        (lambda data: b'{}', 'is no index of shards: delete it, and run `'),
        (lambda data: b'', 'is no index of shards'),
    ],
)
def test_damaged_indices(tmp_path, damage, message):
    path = write(tmp_path / 'set')
    indexing.index(path, **quiet)
    file = tmp_path / 'set' / 'big_vit.index'
    file.write_bytes(damage(file.read_bytes()))
    refused(lambda: opened(path), rf'big_vit\.index: {message}')
    indexing.index(path, **quiet)
    assert opened(path).length == 21


def test_an_index_cannot_claim_more_than_it_has(tmp_path):
    about = json.dumps({'arrays': [['a', '<u8', [1 << 40]]]}).encode()
    body = about + zlib.compress(bytes(8))
    data = struct.pack('<7scII', b'BVINDEX', b'1', len(about), zlib.crc32(body)) + body
    refused(lambda: sidecars.unpack(data, 'X', 'Y'), r'X: is damaged \(it claims 8,796,')
    huge = np.zeros(1 << 20, np.uint8)
    data = sidecars.pack({}, {'a': huge})
    bomb = data.replace(b'[1048576]', b'[1]      ')
    bomb = bomb[:12] + struct.pack('<I', zlib.crc32(bomb[16:])) + bomb[16:]
    refused(lambda: sidecars.unpack(bomb, 'X', 'Y'), r'X: is damaged \(it has 2 bytes of 1\)')


def test_labels_of_another_column_are_refused(tmp_path):
    path = write(tmp_path / 'set')
    indexing.index(path, **quiet)
    refused(
        lambda: opened(path, label_column='kind'),
        r'big_vit\.index: has the labels of cls, and data\.label_column is kind: run `python -m '
        rf'big_vit\.prepare index {path} --label_column kind`$',
    )
    assert opened(path, label_column='kind', labelled=False).length == 21


def test_samples_without_labels_or_words(tmp_path):
    folder = tmp_path / 'set'
    write(folder, 1)
    (folder / 'train-0001.tar').write_bytes(shard([('a', {'jpg': b'x', 'json': b'{"a": 1}'})]))
    indexing.index(str(folder), **quiet)
    refused(lambda: opened(str(folder)), r'train-0001\.tar: a sample has no \.cls, as 1 of all')
    refused(
        lambda: opened(str(folder), text_column='txt'),
        r'have no \.txt \(they have \.cls, \.fr\.txt, \.jpg, \.json, \.txt\)',
    )
    assert opened(str(folder), labelled=False).labels().tolist() == [0, 1, 2, 3, 0, 1, 2, 0]


def test_empty_shards_and_nothing_but_empty_shards(tmp_path):
    folder, said = tmp_path / 'set', []
    write(folder, 2)
    (folder / 'train-0005.tar').write_bytes(shard([]))
    indexing.index(str(folder), say=said.append)
    assert said[-1] == 'note    1 shards hold no examples'
    assert opened(str(folder)).length == 14
    for number in range(2):
        (folder / f'train-{number:04d}.tar').write_bytes(shard([('README', {'md': b'x'})]))
    indexing.index(str(folder), **quiet)
    refused(lambda: opened(str(folder)), 'no sample with an image, video, sound or text in')


def test_a_shard_named_twice(store):
    refused(
        lambda: opened('counted://bucket/x-{1..11}{1..11}.tar'),
        r'data\.path: .* names .*x-111\.tar twice: name each shard once',
    )
    fill(store)
    listed = [{'url': f'{place}/train-0000.tar', 'nsamples': 7} for place in 'ab']
    content = json.dumps({'wids_version': 1, 'shardlist': listed}).encode()
    store.store['/bucket/set/index.json'] = held(content)
    refused(
        lambda: opened('counted://bucket/set', labelled=False),
        r'index\.json: names shard train-0000\.tar twice: run `',
    )


def test_splits_have_classes_of_their_own(tmp_path):
    folder = tmp_path / 'set'
    write(folder, 2)
    (folder / 'val-0000.tar').write_bytes(shard([('v', {'jpg': b'x', 'cls': b'1'})]))
    walked = [opened(str(folder), split=split) for split in ('train', 'val')]
    indexing.index(str(folder), **quiet)
    for split, wanted in zip(('train', 'val'), walked, strict=True):
        same(opened(str(folder), split=split), wanted)
    # What was indexed earlier stays in the index.
    (folder / 'val-0001.tar').write_bytes(shard([('w', {'jpg': b'x', 'cls': b'2'})]))
    indexing.index(f'{folder}/val-*.tar', **quiet)
    assert [opened(str(folder), split=s).length for s in ('train', 'val')] == [14, 2]


# --- What others wrote -----------------------------------------------------------------


def test_counts_of_webdataset_and_wids(store):
    path = fill(store)
    sizes = {f'train-{n:04d}.tar': 7 for n in range(5)}
    wids = {'wids_version': 1, 'shardlist': [
        {'url': f'somewhere/{name}', 'nsamples': count} for name, count in sizes.items()
    ]}  # fmt: skip
    walked = opened(path, labelled=False)
    for name, content in (('sizes.json', sizes), ('index.json', wids)):
        store.store[f'/bucket/set/{name}'] = held(json.dumps(content).encode())
        store.asked.clear()
        source = opened(path, labelled=False)
        assert (source.length, source.num_classes, set(source.labels())) == (35, 1, {0})
        every = np.arange(35)
        assert source.load(every)['image'] == walked.load(every)['image']
        numbered = tar.tar(Request('train', num_classes=5), path=path)
        np.testing.assert_array_equal(numbered.labels(), walked.labels())
        del store.store[f'/bucket/set/{name}']


def test_counts_open_a_set_by_one_shard(store, capfd):
    path = fill(store)
    content = json.dumps({f'train-{n:04d}.tar': 7 for n in range(5)}).encode()
    store.store['/bucket/set/sizes.json'] = held(content)
    source = opened(path, labelled=False)
    assert source.length == 35
    read = {path for operation, path, size in store.asked if path.endswith('.tar')}
    assert read == {'/bucket/set/train-0000.tar'}
    source.load(np.array([30]))
    assert {path for _, path, _ in store.asked if path.endswith('.tar')} == read | {
        '/bucket/set/train-0004.tar'
    }
    assert 'has no index' not in capfd.readouterr().err


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ({'train-0000.tar': 7}, 'says nothing of 4 of 5 shards, such as train-0001.tar: run `'),
        ({f'train-{n:04d}.tar': 8 for n in range(5)}, 'has 7 samples, and .*sizes.json says 8: ru'),
        ({f'train-{n:04d}.tar': 0 for n in range(5)}, 'says that there are no samples'),
        ({f'train-{n:04d}.tar': -1 for n in range(5)}, 'a number of samples is none'),
    ],
)
def test_counts_that_do_not_add_up(store, content, message):
    path = fill(store)
    store.store['/bucket/set/sizes.json'] = held(json.dumps(content).encode())
    refused(lambda: opened(path, labelled=False).load(np.array([0])), message)


def test_counts_of_samples_of_several_kinds_are_refused(store):
    """webdataset counts all samples of a shard; a text alone would be read as a picture."""
    path = fill(store)
    texts = [(f'x{i}', {'txt': b'words', 'cls': b'1'}) for i in range(2)]
    name = '/bucket/set/train-0003.tar'
    store.store[name] = held(shard([*rows(3, count=5), *texts]), name)
    sizes = {f'train-{number:04d}.tar': 7 for number in range(5)}
    store.store['/bucket/set/sizes.json'] = held(json.dumps(sizes).encode())
    source = opened(path, labelled=False)
    assert source.load(np.array([0, 20]))['label'].tolist() == [0, 0]
    refused(
        lambda: source.load(np.array([21])),
        r'train-0003\.tar: 2 of its 7 samples are no image, and .*sizes\.json counts them: run `',
    )


def test_without_an_index_shards_are_walked_and_that_is_told(store, capfd):
    path = fill(store, 4, folder='bucket/other')
    assert opened(path).length == 28
    assert (
        'counted:///bucket/other: has no index, so all 4 shards (0.0 GB) are read through once: '
        '`python -m big_vit.prepare index counted:///bucket/other` avoids that'
    ) in capfd.readouterr().err


def test_many_hosts_do_not_each_read_all_of_a_store(store, monkeypatch):
    path = fill(store, 3, folder='bucket/huge')
    monkeypatch.setattr(hosts, 'count', lambda: 64)
    assert opened(path).length == 21  # So little they may.
    monkeypatch.setattr(sidecars, '_MUCH', 10_000)
    fill(store, 4, folder='bucket/huge')
    refused(
        lambda: opened(path),
        r'each of 64 hosts would read all 4 shards \(.* GB\): run `python -m big_vit\.prepare '
        r'index counted:///bucket/huge` once$',
    )
    assert store.bytes_of('.tar') == 0
    indexing.index(path, **quiet)
    assert opened(path).length == 28


def test_the_command(tmp_path, capsys):
    path = write(tmp_path / 'set')
    prepare.main(['index', path, '--workers', '1'])
    out = capsys.readouterr().out
    assert out == f'indexed 3 shards with 21 examples\nwrote   {path}/big_vit.index: 3 shards\n'
    refused(lambda: prepare.main(['index', path, '--share', '3/3']), '--share must be I/N')
    refused(lambda: prepare.main(['index', str(tmp_path)]), 'PATH: no .tar file in')


def test_files_that_have_an_index_of_their_own(tmp_path):
    (tmp_path / 'train-0.parquet').touch()
    refused(lambda: indexing.index(str(tmp_path)), r'train-0\.parquet needs no index: the end of')


@pytest.mark.slow
def test_processes_write_the_same_index(tmp_path):
    path = write(tmp_path / 'set', 9)
    indexing.index(path, workers=1, **quiet)
    one = {file.name: file.read_bytes() for file in (tmp_path / 'set').glob('*.index')}
    for name in one:
        (tmp_path / 'set' / name).unlink()
    indexing.index(path, workers=2, **quiet)
    assert {file.name: file.read_bytes() for file in (tmp_path / 'set').glob('*.index')} == one
    assert len(one) == 10


# --- A large set -----------------------------------------------------------------------


def generated(shards, samples):
    """A manifest of so many shards of so many samples, and the listing of their folder."""
    rows = [
        sidecars.Row(
            f'train-{n:06d}.tar', 1 << 30, sidecars.stamp_number(str(n)), (samples, 0, 0, 0),
            (0, 0, 0, 0), 300_000, zlib.crc32(str(n).encode()), 'train',
        )
        for n in range(shards)
    ]  # fmt: skip
    facts = {'values': [0], 'left': {}, 'endings': {'txt': [shards * samples, 0, 0, 0]}}
    return sidecars.pack_manifest(rows, {'train': facts}, 'counted:///big', 'tar', 'cls')


@pytest.mark.slow
def test_a_billion_examples_are_opened_in_seconds(store, monkeypatch):
    import resource
    import time

    data = generated(100_000, 10_000)
    store.store['/big/big_vit.index'] = held(data)
    names = [f'/big/train-{n:06d}.tar' for n in range(100_000)]
    listing = [
        {'name': name, 'type': 'file', 'size': 1 << 30, 'etag': str(n)}
        for n, name in enumerate(names)
    ]
    monkeypatch.setattr(Store, 'ls', lambda self, path, detail=True: listing)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()  # Other programs are not waited for.
    source = opened('counted://big', text_column='txt')
    seconds = time.process_time() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    print(f'opened in {seconds:.1f} s and {grown:.0f} MB; index of {len(data) / 1e6:.1f} MB')
    assert source.length == 1_000_000_000
    assert seconds < 20 and grown < 1000
    assert len(data) < 4e6


@pytest.mark.parametrize(
    ('error', 'message', 'status'),
    [
        (PermissionError('AccessDenied'), r'\(AccessDenied\): give this machine access: gs://', 2),
        (OSError('NoSuchBucket: x'), r'\(NoSuchBucket: x\): see whether the name of the bu', 2),
        (OSError('PermanentRedirect'), 'in another region: set AWS_DEFAULT_REGION to it', 2),
        (OSError('503 Slow Down'), r'cannot read counted:///bucket/set \(503 Slow Down\)$', 75),
    ],
)
def test_a_store_that_refuses(store, monkeypatch, error, message, status):
    monkeypatch.setattr(network, 'PATIENCE_S', 0.05)
    fill(store)

    def fault(operation, path, number):
        raise error

    store.faults = fault
    for source in (opened, lambda path: parquet.parquet(Request('train'), path=path)):
        with pytest.raises(UserError, match=message) as caught:
            source('counted://bucket/set')
        assert str(caught.value).startswith('data.path: cannot read counted:///bucket/set (')
        assert '\n' not in str(caught.value)
        assert caught.value.status == status
