"""Labels as numbers and names, in every source, and how classes of two sides meet."""

import io
import struct
import tarfile
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from big_vit.data.sources import arrays, classes, digits, folder, idx, orbit, parquet, table, tar
from big_vit.data.sources.base import Request
from big_vit.data.sources.splits import training_split
from big_vit.errors import UserError, printable

NFC, NFD = (unicodedata.normalize(form, 'café') for form in ('NFC', 'NFD'))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('BIG_VIT_CACHE', str(tmp_path / 'cache'))


def png():
    file = io.BytesIO()
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(file, 'PNG')
    return file.getvalue()


def as_table(root, splits):
    root.mkdir()
    for split, labels in splits.items():
        lines = ['image,label', *(f'{i}.png,{label}' for i, label in enumerate(labels))]
        (root / f'{split}.csv').write_text('\n'.join(lines), 'utf-8')
        for i in range(len(labels)):
            (root / f'{i}.png').write_bytes(png())
    return lambda request: table.table(request, path=str(root))


def as_tar(root, splits):
    root.mkdir()
    for split, labels in splits.items():
        with tarfile.open(root / f'{split}.tar', 'w') as shard:
            for i, label in enumerate(labels):
                for name, data in ((f'{i}.png', png()), (f'{i}.cls', str(label).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    shard.addfile(member, io.BytesIO(data))
    return lambda request: tar.tar(request, path=str(root))


def as_parquet(root, splits):
    root.mkdir()
    for split, labels in splits.items():
        columns = {'image': [png()] * len(labels), 'label': [str(label) for label in labels]}
        pq.write_table(pa.table(columns), root / f'{split}.parquet')
    return lambda request: parquet.parquet(request, path=str(root))


FORMATS = [as_table, as_tar, as_parquet]


def opened(make, root, split='test', **request):
    source = make(Request(split, **request))
    loaded = source.load(np.arange(source.length))['label']
    np.testing.assert_array_equal(loaded, source.labels())
    return source.class_names, source.num_classes, source.labels().tolist()


@pytest.mark.parametrize('written', FORMATS)
@pytest.mark.parametrize(
    ('train', 'test', 'wanted'),
    [
        (['0', '1'], ['1.0', '0.0'], (None, 2, [1, 0])),
        (['0.0', '2.0'], ['2', '0', '1'], (None, 3, [2, 0, 1])),
        (['00', '01'], ['1'], (None, 2, [1])),
        ([NFC, 'tea'], ['tea', NFD], ((NFC, 'tea'), 2, [1, 0])),
        ([NFD, NFC, 'tea'], [NFC], ((NFC, 'tea'), 2, [0])),
        (['0', 'A', 'b'], ['A', '0'], (('0', 'A', 'b'), 3, [1, 0])),
        (['1.5', 'b'], ['b'], (('1.5', 'b'), 2, [1])),
        (['AT&amp;T', "d'or"], ["d'or"], (('AT&amp;T', "d'or"), 2, [1])),
    ],
)
def test_labels_of_another_spelling_are_the_same_classes(written, train, test, wanted, tmp_path):
    make = written(tmp_path / 'set', {'train': train, 'test': test})
    assert opened(make, tmp_path) == wanted
    names, _, labels = opened(make, tmp_path, 'train')
    text = [classes.label_name(label) for label in train]
    assert [names[n] for n in labels] == text if names else labels == [float(x) for x in train]


@pytest.mark.parametrize('written', FORMATS)
@pytest.mark.parametrize(
    ('train', 'test', 'message'),
    [
        (['Cat', 'dog'], ['cat'], r"test has classes that train has not \('cat', nearest 'Cat'\)"),
        (['a', 'b'], ['0'], r"test has classes that train has not \('0'; it has a, b\)"),
        (
            ['0', '1'],
            ['1', '5'],
            r"'?5'? of test is not one of the 2 classes of train: set data",
        ),
        (['0', '1'], ['cat'], "label 'cat' of test is not one of the 2 classes of train: see"),
        (['20140703', '20140704'], ['20140703'], r'would make 20,140,705 classes, and only 2 of'),
        (['2014', '2015'], ['2015'], r'give them names, or set data\.num_classes=2016'),
        (['0.5', '1'], ['1'], r"label '0\.5' is a fraction"),
        (['-1', '1'], ['1'], 'label -1 is not one of 2 classes: label from 0'),
    ],
)
def test_other_labels_than_those_of_train_are_refused(written, train, test, message, tmp_path):
    make = written(tmp_path / 'set', {'train': train, 'test': test})
    with pytest.raises(UserError, match=message) as error:
        make(Request('test'))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('written', FORMATS)
def test_a_number_of_classes_is_honoured_and_names_are_kept(written, tmp_path):
    named = written(tmp_path / 'named', {'train': ['a', 'b'], 'test': ['b']})
    assert opened(named, tmp_path, num_classes=3) == (('a', 'b', ''), 3, [1])
    numbered = written(tmp_path / 'numbered', {'train': ['0', '1'], 'test': ['4']})
    assert opened(numbered, tmp_path, num_classes=9) == (None, 9, [4])
    dates = written(tmp_path / 'dates', {'train': ['2014', '2015']})
    assert opened(dates, tmp_path, 'train', num_classes=3000) == (None, 3000, [2014, 2015])
    with pytest.raises(UserError, match=r'data\.num_classes is 1 but .* has 2 classes'):
        named(Request('test', num_classes=1))
    for spoilt in (numbered, dates):
        with pytest.raises(UserError, match=r'data\.num_classes=\d+'):
            spoilt(Request('train', num_classes=1))


def test_every_source_honours_or_refuses_a_number_of_classes():
    for source, count, size in ((digits.digits, 10, (8, 8)), (orbit.orbit, 8, (32, 32))):
        with pytest.raises(UserError, match=rf'num_classes is 2 but \w+ has {count} classes'):
            source(Request('train', num_classes=2, image_size=size))
        assert source(Request('train', num_classes=12, image_size=size)).num_classes == 12


def test_numbers_of_arrays_are_no_dates_either(tmp_path):
    images = np.zeros((2, 4, 4), np.uint8)
    np.savez(tmp_path / 'x.npz', image=images, label=np.array([20140703, 20140704]))
    with pytest.raises(UserError, match='would make 20,140,705 classes'):
        arrays.arrays(Request('train'), path=str(tmp_path / 'x.npz'))
    for name, array in (('images-idx3', images), ('labels-idx1', np.array([0, 4], np.uint8))):
        header = struct.pack(f'>I{array.ndim}I', 0x800 + array.ndim, *array.shape)
        (tmp_path / f't10k-{name}-ubyte').write_bytes(header + array.tobytes())
    # Without a train file, the labels of the test file are all there is.
    assert idx.idx(Request('test'), path=str(tmp_path)).num_classes == 5


def test_folders_of_one_name_in_two_normal_forms_are_one_class(tmp_path):
    for name in (f'train/{NFD}', 'train/zoo', f'test/{NFC}', f'test/{NFD}'):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / 'a.png').write_bytes(png())
    source = folder.folder(Request('test'), path=str(tmp_path))
    assert (source.class_names, source.labels().tolist()) == ((NFC, 'zoo'), [0, 0])


def test_splits_are_one_in_whichever_case(tmp_path):
    rows = ['image,label,Split', '0.png,a,Train', '1.png,b,TRAIN', '2.png,a,train', '3.png,b,test']
    (tmp_path / 'all.csv').write_text('\n'.join(rows))
    for i in range(4):
        (tmp_path / f'{i}.png').write_bytes(png())
    for split, labels in (('train', [0, 1, 0]), ('TRAIN[:2]', [0, 1]), ('Test', [1])):
        source = table.table(Request(split), path=str(tmp_path / 'all.csv'))
        assert source.labels().tolist() == labels
    for name in ('train', 'Train'):
        (tmp_path / 'set' / name / 'a').mkdir(parents=True)
        (tmp_path / 'set' / name / 'a' / 'a.png').write_bytes(png())
    with pytest.raises(UserError, match=r'has splits (Train|train) and (Train|train)'):
        folder.folder(Request('train'), path=str(tmp_path / 'set'))
    assert training_split(['val', 'train2017', 'Training']) == 'Training'
    assert training_split(['training', 'train']) == 'train'
    assert training_split(['val', 'dev']) is None


@pytest.mark.parametrize('written', FORMATS[1:])
def test_splits_without_train_are_joined_by_name(written, tmp_path):
    make = written(tmp_path / 'set', {'val': ['bee', 'cat'], 'dev': ['ant', 'bee', 'cat']})
    source = make(Request('val+dev'))
    names = [source.class_names[n] for n in source.load(np.arange(5))['label']]
    assert names == ['bee', 'cat', 'ant', 'bee', 'cat']


def test_odd_names_are_printed_in_one_line():
    names = ('AT&amp;T', 'a, b', 'two\nlines', ' x', 'z\u200b', 'ok')
    assert classes.shown(names) == r"AT&amp;T, 'a, b', 'two\nlines', ' x', 'z\u200b', ok"
    assert classes.shown(names, 2) == "AT&amp;T, 'a, b', and 4 more"
    assert printable('two\nlines, Ä$') == r'two\nlines, Ä$'


@pytest.mark.parametrize('written', FORMATS)
@pytest.mark.parametrize('name', ['cat ', '\u200fcat', 'cat\u200b', '\ufeffcat', 'cat\xa0'])
def test_what_nobody_sees_at_the_ends_of_a_name_makes_no_class(written, name, tmp_path):
    make = written(tmp_path / 'data', {'train': [name, 'cat', 'dog']})
    source = make(Request('train'))
    assert (source.class_names, source.labels().tolist()) == (('cat', 'dog'), [0, 0, 1])


def test_folders_whose_names_look_alike_are_one_class(tmp_path):
    for name in ('cat', 'cat ', '\u200fdog', 'dog', 'ab\u200dc'):
        (tmp_path / 'data' / name).mkdir(parents=True)
        (tmp_path / 'data' / name / '0.png').write_bytes(png())
    source = folder.folder(Request('train'), path=str(tmp_path / 'data'))
    assert source.class_names == ('ab\u200dc', 'cat', 'dog')
    assert source.labels().tolist() == [0, 1, 1, 2, 2]


@pytest.mark.parametrize('labels', [['', 'x'], [' ', 'x'], ['NaN', '1'], ['<NA>', '0', 'null']])
def test_a_missing_label_is_no_class(labels, tmp_path):
    with pytest.raises(UserError, match='says that there is none: leave out what'):
        as_parquet(tmp_path / 'data', {'train': labels})(Request('train'))


def test_missing_may_be_the_name_of_a_class_beside_others(tmp_path):
    source = as_parquet(tmp_path / 'data', {'train': ['none', 'dog']})(Request('train'))
    assert source.class_names == ('dog', 'none')


def test_columns_of_parquet_that_say_something_else(tmp_path):
    def read(name, columns, names=('image', 'label')):
        arrays_ = [pa.array(column) for column in columns]
        pq.write_table(pa.table(arrays_, names=list(names)), tmp_path / f'{name}.parquet')
        return parquet.parquet(Request(name), path=str(tmp_path / f'{name}.parquet'))

    images = [png()] * 2
    with pytest.raises(UserError, match="has several columns 'label': rename all but one"):
        read('twice', [images, [0, 1], [1, 0]], ('image', 'label', 'label'))
    with pytest.raises(UserError, match='lists of 0 and 1 for each of 3 classes are no labels'):
        read('hot', [images, [[0, 1, 1], [0, 1, 0]]])
    with pytest.raises(UserError, match='lists of 0 and 1 for each of 2 classes are no labels'):
        read('booleans', [images, [[True, False], [False, True]]])
    assert read('several', [images, [[0, 1], [2, 0]]]).num_classes == 3
