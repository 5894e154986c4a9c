"""Tables beyond the plain ones of test_data_formats.py: cells, lines, several labels, size."""

import csv
import json
import os

import fsspec
import numpy as np
import pytest
from memory import peak_of

from big_vit.data.sources import table
from big_vit.data.sources.base import Request
from big_vit.errors import UserError

FILES = ('0.png', '1.png', 'ä b.png')


@pytest.fixture
def put(tmp_path):
    """Writes a table beside three files; gives its path."""

    def write(name, text):
        for file in FILES:
            (tmp_path / file).write_bytes(file.encode())
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def refused(call, message):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('end', ['\n', '\r\n', '\r'])
@pytest.mark.parametrize('start', ['', '\ufeff'])
def test_cells_as_spreadsheets_write_them(put, tmp_path, end, start):
    rows = [['ä b.png', 'two\nlines, "quoted"'], ['1.png', 'a'], ['0.png', 'a']]
    with (tmp_path / 'csv').open('w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file, lineterminator=end)
        writer.writerows([['image', ' label '], *rows])
    path = put('x.csv', start + (tmp_path / 'csv').read_bytes().decode())
    source = table.table(Request('train'), path=path)
    assert source.class_names == ('a', 'two\nlines, "quoted"')
    loaded = source.load(np.array([0, 2]))
    assert loaded['image'] == ['ä b.png'.encode(), b'0.png']
    assert loaded['label'].tolist() == [1, 0]


def test_ends_of_lines_within_texts_of_json(put):
    rows = [{'image': name, 'label': f'a\u2028{i}\x85b'} for i, name in enumerate(FILES)]
    text = '\r\n\n'.join(json.dumps(row, ensure_ascii=False) for row in rows)
    source = table.table(Request('train'), path=put('x.jsonl', text))
    assert source.class_names == ('a\u20280\x85b', 'a\u20281\x85b', 'a\u20282\x85b')


@pytest.mark.parametrize('separator', ['|', ';', ' | '])
def test_one_row_of_several_labels_makes_lists_of_all_in_all_splits(put, tmp_path, separator):
    put('train.csv', f'image,label\n0.png,c{separator}a{separator}b\n1.png,\n')
    put('test.csv', 'image,label\n1.png,c\n0.png,a\n')
    for split, wanted in (('train', [[2, 0, 1], []]), ('test', [[2], [0]])):
        source = table.table(Request(split), path=str(tmp_path))
        assert [label.tolist() for label in source.load(np.arange(2))['label']] == wanted
        assert (source.class_names, source.labels) == (('a', 'b', 'c'), None)


@pytest.mark.parametrize(
    ('cell', 'labels'),
    [
        ('AT&amp;T', ['AT&amp;T']),
        ('caf&eacute;|&#8364;;x', ['&#8364;', 'caf&eacute;', 'x']),
        ('R&D;x', ['R&D', 'x']),
        ('&amp;', ['&amp;']),
        ('a&amp|x;', ['a&amp', 'x']),
        ('&lt;&gt;', ['&lt;&gt;']),
    ],
)
def test_the_end_of_an_entity_is_no_separator(put, cell, labels):
    source = table.table(Request('train'), path=put('x.csv', f'image,label\n0.png,{cell}\n'))
    assert list(source.class_names) == sorted(labels)
    assert (source.labels is None) == (len(labels) > 1 or cell.endswith('x;'))


def test_a_single_label_is_needed_in_each_row_where_none_has_several(put):
    for text in ('image,label\n0.png,a\n1.png, \n', 'image,label\n0.png,a\n1.png\n'):
        refused(
            lambda text=text: table.table(Request('train'), path=put('x.csv', text)),
            'line 3: has no label',
        )
    text = '{"image": "0.png", "label": "a|b"}\n{"image": "1.png", "label": true}'
    refused(
        lambda: table.table(Request('train'), path=put('x.jsonl', text)), 'must be numbers or names'
    )
    source = table.table(Request('train'), path=put('y.jsonl', text.splitlines()[0]))
    assert source.class_names == ('a|b',)


@pytest.mark.parametrize(
    ('name', 'text', 'message'),
    [
        ('x.csv', 'image,label\n0.png,a, b\n', 'line 2: 3 cells below the 2 of the header'),
        ('x.csv', 'image,label\n"0.png,a\n', 'line 2: unexpected end of data'),
        ('x.csv', 'image,label\n,a\n', "line 2: '' is no path"),
        ('x.csv', 'image,label,split\n0.png,a,train\n1.png,b,\n', 'line 3: the column split says'),
        ('x.csv', 'image,label\ngs://b/0.png,a\n', r'line 2: gs://b/0\.png is a URL'),
        ('x.csv', 'image,label\na/../../0.png,a\n', 'line 2: .* leads out of'),
        ('x.csv', 'image,label\n0.png,99999999999\n', 'label 99999999999 is too large'),
        ('x.csv', 'image,label\n0.png,a\n1.mp4,a\n', 'line 3: all files must be images'),
        ('x.csv', b'image,label\n0.png,a\n1.png,\xff\n', 'not text in UTF-8'),
        ('x.jsonl', '{"image": "0.png", "label": {"a": 1}}', r"line 1: labels .* not \{'a': 1\}"),
        ('x.jsonl', '{"image": "0.png", "label": [["a"]]}', r"line 1: labels .* not \['a'\]"),
        ('x.jsonl', '{"image": "0.png", "label": 1}\n{"image": "1.png", "label": 1.5}', 'line 2'),
        ('x.jsonl', '{"image": "0.png", "label": null}', 'line 1: has no label'),
        ('x.jsonl', '{"image": "0.png", "label": []}', r'no row of .*x\.jsonl has a label'),
        ('x.jsonl', '{"image": 5, "label": 1}', 'line 1: 5 is no path'),
        ('x.jsonl', '[' * 100_000, 'line 1: is not JSON'),
    ],
)
def test_mistakes_are_named_with_their_line(put, name, text, message):
    path = put(name, text)
    refused(lambda: table.table(Request('train'), path=path), message)


def test_two_tables_of_one_split_are_refused(put, tmp_path):
    put('train.csv', 'image,label\n0.png,a\n')
    put('train.jsonl', '{"image": "1.png", "label": "b"}')
    refused(
        lambda: table.table(Request('train'), path=str(tmp_path)),
        'train: train.csv and train.jsonl',
    )


def test_a_link_to_nothing_beside_the_tables_does_no_harm(put, tmp_path):
    put('train.CSV', 'image,label\n0.png,a\n')
    (tmp_path / 'broken.png').symlink_to('/nowhere')
    assert table.table(Request('train'), path=str(tmp_path)).length == 1


def test_absolute_paths_are_for_local_tables(put, tmp_path):
    path = put('x.csv', f'image,label\n{tmp_path}/0.png,7\n')
    source = table.table(Request('train'), path=path)
    assert source.load(np.array([0]))['image'] == [b'0.png']
    assert source.num_classes == 8
    fsspec.filesystem('memory').pipe('/absolute.csv', b'image,label\n/etc/x.png,a\n')
    refused(
        lambda: table.table(Request('train'), path='memory://absolute.csv'),
        r'line 2: /etc/x\.png is absolute',
    )


@pytest.mark.parametrize('home', ['', '/deep/er'])
def test_tables_in_memory_of_fsspec(home):
    system = fsspec.filesystem('memory')
    system.pipe(f'{home}/t.csv', b'image,label,split\na/x y.png,1,train\nb.png,0,val\n')
    system.pipe(f'{home}/a/x y.png', b'first')
    system.pipe(f'{home}/b.png', b'second')
    source = table.table(Request('train+val'), path=f'memory:/{home}/t.csv')
    loaded = source.load(np.array([1, 0, 1]))
    assert loaded['image'] == [b'second', b'first', b'second']
    assert loaded['label'].tolist() == [0, 1, 0]
    assert source.place(1) == f'memory://{home}/b.png (memory://{home}/t.csv, line 3)'


def test_any_of_the_first_the_last_and_some_between_may_be_missing(put):
    rows = ['0.png,a\n'] * 100
    for missing in (0, 99):
        broken = [row if i != missing else 'no.png,a\n' for i, row in enumerate(rows)]
        path = put('x.csv', 'image,label\n' + ''.join(broken))
        refused(
            lambda path=path: table.table(Request('train'), path=path),
            rf'line {missing + 2}: there is no file .*no\.png',
        )


@pytest.mark.slow
def test_a_large_table_is_read_in_a_few_arrays(put):
    count = 50_000
    text = 'image,label\n' + ''.join(f'{i % 2}.png,name{i % 1000:04d}\n' for i in range(count))
    path = put('x.csv', text)
    source, peak = peak_of(lambda: table.table(Request('train'), path=path))
    assert peak < 10e6
    picked = np.array([count - 1, 7])
    assert source.load(picked)['label'].tolist() == [999, 7]


@pytest.mark.parametrize(
    ('name', 'text', 'message'),
    [
        ('x.csv', f'image,label\n{"a" * 300}.jpg,0\n', r'line 2: .a+.\.\.\. has 304 characters'),
        ('x.csv', f'image,label\n{"ä" * 130}.jpg,0\n', 'at most 255 bytes'),
        ('x.jsonl', '{"image": "\\ud800.jpg", "label": 0}\n', r'line 1: .*ud800.* characters that'),
        ('x.jsonl', '{"image": "\\u0000.jpg", "label": 0}\n', 'characters that no name'),
        ('x.csv', f'image,label\n{"d/" * 3000}0.png,0\n', 'there is no file'),
    ],
)
def test_paths_that_no_file_can_have(put, name, text, message):
    refused(lambda: table.table(Request('train'), path=put(name, text)), message)


def test_only_regular_files_are_read(put, tmp_path):
    path = put('x.csv', 'image,label\nzero.jpg,0\nwait.jpg,1\n0,1\n')
    (tmp_path / 'zero.jpg').symlink_to('/dev/zero')
    os.mkfifo(tmp_path / 'wait.jpg')
    (tmp_path / '0').write_bytes(b'no ending')
    source = table.table(Request('train'), path=path)
    for row in (0, 1):
        with pytest.raises(OSError, match='a pipe or a device'):
            source.load(np.array([row]))
    assert source.load(np.array([2]))['image'] == [b'no ending']
    os.mkfifo(tmp_path / 'pipe.csv')
    refused(
        lambda: table.table(Request('train'), path=str(tmp_path / 'pipe.csv')),
        r'cannot read .*pipe\.csv: it is a pipe',
    )


@pytest.mark.parametrize('delimiter', [';', '\t'])
def test_a_csv_with_another_delimiter(put, delimiter):
    text = 'image,label\n0.png,x\n1.png,"a,b"\n'.replace('"a,b"', 'y').replace(',', delimiter)
    assert table.table(Request('train'), path=put('x.csv', text)).class_names == ('x', 'y')


@pytest.mark.parametrize(
    ('name', 'text', 'message'),
    [
        ('x.csv', 'image,label,label\n0.png,a,b\n', "has several columns 'label': rename"),
        ('x.csv', "image,label\n0.png,\"['a', 'b']\"\n", 'is a list as text: separate'),
        ('x.csv', 'image,label\n0.png,nan\n1.png,0\n', "label 'nan' says that there is none"),
        ('x.csv', 'image,label\n0.png,0|0|1\n1.png,1|0|0\n', 'of 0 and 1 for each of 3 classes'),
        (
            'x.jsonl',
            '{"image": "0.png", "label": [1, 0]}\n{"image": "1.png", "label": [0, 1]}\n',
            'lists of 0 and 1 for each of 2 classes are no labels',
        ),
    ],
)
def test_columns_and_cells_that_say_something_else(put, name, text, message):
    refused(lambda: table.table(Request('train'), path=put(name, text)), message)


def test_two_classes_of_each_example_are_no_zeros_and_ones(put):
    text = '{"image": "0.png", "label": [0, 1]}\n{"image": "1.png", "label": [0, 1]}\n'
    source = table.table(Request('train'), path=put('x.jsonl', text))
    assert [label.tolist() for label in source.load(np.arange(2))['label']] == [[0, 1], [0, 1]]


def test_a_split_may_be_zero_and_is_one_in_a_table_that_is_named_after_it(put, tmp_path):
    rows = (
        '{"image": "0.png", "label": "a", "split": 0}\n{"image": "1.png", "label": "a", "split": 1}'
    )
    path = put('x.jsonl', rows)
    assert table.table(Request('0'), path=path).length == 1
    refused(
        lambda: table.table(Request('x'), path=str(tmp_path)),
        r'line 2: its column split says 0 and 1, and its name x: drop the column, or open x\.jsonl',
    )
