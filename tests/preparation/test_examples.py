"""Reading of any source by units: the same examples as the sources themselves have."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from big_vit.errors import UserError
from big_vit.preparation import examples
from big_vit.preparation.settings import Given


def png(level, size=(8, 6)):
    buffer = io.BytesIO()
    Image.new('RGB', size, (level, 0, 0)).save(buffer, 'PNG')
    return buffer.getvalue()


def write_tar(path, members):
    with tarfile.open(path, 'w') as shard:
        for name, data in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            shard.addfile(about, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path):
    for shard in range(2):
        members = {}
        for i in range(3):
            members[f'{shard}{i}.txt'] = f'caption {i}'.encode()
            members[f'{shard}{i}.png'] = png(10 * shard + i)
            members[f'{shard}{i}.json'] = json.dumps({'score': i, 'a': {'b': 'x'}}).encode()
        members[f'{shard}3.txt'] = b'alone'
        write_tar(tmp_path / f'{shard:05d}.tar', members)
    return str(tmp_path)


def given(source, path, **more):
    return Given('INPUT', source, str(path), **more)


def read_all(some):
    return [e for unit in examples.units(some, 0) for e in examples.read(some, unit)]


def test_tar(shards):
    some = given('tar', shards)
    listed = examples.units(some, 7)
    assert [(unit.number, unit.place) for unit in listed] == [
        (7, f'{shards}/00000.tar'),
        (8, f'{shards}/00001.tar'),
    ]
    found = list(examples.read(some, listed[1]))
    assert [(e.row, e.name, e.ending) for e in found] == [
        *((i, f'1{i}', 'png') for i in range(3)),
        (3, '13', ''),
    ]
    assert [e.data for e in found] == [png(10), png(11), png(12), None]
    assert [examples.text_of(some, e) for e in found] == [
        *('caption 0', 'caption 1', 'caption 2', 'alone')
    ]
    assert examples.value_of(found[2], 'score') == 2
    assert examples.value_of(found[2], 'a.b') == 'x' and examples.value_of(found[2], 'b') is None
    assert found[1].where == f'{shards}/00001.tar: 11.png'
    assert [e.row for e in examples.read(some, listed[0], [0, 2])] == [0, 2]


def test_parquet(tmp_path):
    rows = [{'image': {'bytes': png(i), 'path': None}, 'text': f't{i}', 'n': i} for i in range(7)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / 'train-00000.parquet', row_group_size=3)
    some = given('parquet', tmp_path)
    (unit,) = examples.units(some, 0)
    found = list(examples.read(some, unit))
    assert [e.data for e in found] == [png(i) for i in range(7)]
    assert [e.fields for e in found] == [{'text': f't{i}', 'n': i} for i in range(7)]
    assert len({e.name for e in found}) == 7
    some_rows = examples.read(some, unit, [1, 5, 6])
    assert [(e.row, e.fields['n']) for e in some_rows] == [(1, 1), (5, 5), (6, 6)]
    with pytest.raises(UserError, match=r"no column 'picture'.*--image_column"):
        read_all(given('parquet', tmp_path, image_column='picture'))


@pytest.mark.parametrize('kind', ['string', 'binary'])
def test_keys_of_a_json_column_of_parquet(tmp_path, kind):
    texts = ['{"score": 5, "a": {"b": "x"}}', '[1]', '{broken', None]
    columns = {
        'image': [png(i) for i in range(4)],
        'json': pa.array(texts, getattr(pa, kind)()),
        'c': [{'d': i} for i in range(4)],
    }
    pq.write_table(pa.table(columns), tmp_path / 'train-00000.parquet')
    found = read_all(given('parquet', tmp_path))
    for name, wanted in (('score', [5]), ('a.b', ['x']), ('c.d', [0, 1, 2, 3])):
        values = [examples.value_of(example, name) for example in found]
        assert values == wanted + [None] * (4 - len(wanted))


def test_folders_and_arrays(tmp_path):
    for label, name in enumerate(('cat', 'dog')):
        (tmp_path / 'folder' / name).mkdir(parents=True)
        for i in range(2):
            (tmp_path / 'folder' / name / f'{i}.png').write_bytes(png(2 * label + i))
    found = read_all(given('folder', tmp_path / 'folder'))
    assert [(e.name, e.fields['label']) for e in found] == [
        *(('cat/0', 'cat'), ('cat/1', 'cat'), ('dog/0', 'dog'), ('dog/1', 'dog'))
    ]
    assert [e.data for e in found] == [png(i) for i in range(4)]
    images = np.arange(5 * 4 * 4 * 3, dtype=np.uint8).reshape(5, 4, 4, 3)
    np.savez(tmp_path / 'train.npz', image=images, label=np.arange(5) % 3)
    found = read_all(given('arrays', tmp_path / 'train.npz'))
    np.testing.assert_array_equal(np.stack([e.data for e in found]), images)
    assert [e.fields['label'] for e in found] == [0, 1, 2, 0, 1]


def test_what_a_path_is(shards, tmp_path):
    assert examples.source_of(shards, 'INPUT') == 'tar'
    assert examples.source_of(f'{shards}/{{00000..00001}}.tar', 'INPUT') == 'tar'
    (tmp_path / 'pictures' / 'a').mkdir(parents=True)
    assert examples.source_of(str(tmp_path / 'pictures'), 'INPUT') == 'folder'
    (tmp_path / 'pictures' / 'a' / '0.parquet').touch()
    assert examples.source_of(str(tmp_path / 'pictures'), 'INPUT') == 'parquet'
    with pytest.raises(UserError, match=r'INPUT: .*is it there'):
        examples.source_of(str(tmp_path / 'nothing'), 'INPUT')


def test_of_several_splits_one_must_be_named(tmp_path):
    for split in ('train', 'val'):
        write_tar(tmp_path / f'{split}-0.tar', {'a.png': png(1)})
    with pytest.raises(UserError, match='holds train, val: --split train names one'):
        examples.units(given('tar', tmp_path), 0)
    (unit,) = examples.units(given('tar', tmp_path, split='val'), 0)
    assert unit.place.endswith('val-0.tar')
    with pytest.raises(UserError, match="has no split 'test', only train, val"):
        examples.units(given('tar', tmp_path, split='test'), 0)


def test_damage_names_the_shard(tmp_path):
    write_tar(tmp_path / '0.tar', {'a.png': png(1), 'b.png': png(2)})
    data = (tmp_path / '0.tar').read_bytes()
    (tmp_path / '0.tar').write_bytes(data[:1500])
    with pytest.raises(UserError, match=r'0\.tar: (truncated|damaged)'):
        read_all(given('tar', tmp_path))
    (tmp_path / 'p').mkdir()
    (tmp_path / 'p' / '0.parquet').write_bytes(b'PAR1 nothing')
    with pytest.raises(UserError, match=r'0\.parquet: cannot be read'):
        read_all(given('parquet', tmp_path / 'p'))
