"""Pictures without labels, as people have them: in any folders, tables and shards, of any kind."""

import contextlib
import functools
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny import write_idx

from big_vit.data import dataset, pipeline
from big_vit.data.sources import arrays, folder, idx, parquet, table, tar
from big_vit.data.sources.base import Request
from big_vit.errors import UserError

ANY = Request('train', labelled=False)
NAMES = ('IMG_1.jpg', 'IMG_2.png', 'b/IMG_3.webp')


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(i=0):
    return encoded(Image.new('RGB', (9 + i, 7), (i, 2 * i, 255 - i)), 'PNG')


def written(root, names=NAMES):
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i) if name[-3:] in ('jpg', 'png', 'ebp') else b'notes')
    return str(root)


def paths(source, root):
    return [source.place(i).removeprefix(f'{root}/') for i in range(source.length)]


def one_class(source):
    columns = source.load(np.arange(source.length))
    assert source.num_classes == 1 and source.class_names is None
    assert np.asarray(columns['label']).tolist() == [0] * source.length
    return columns['image']


# --- Folders ---------------------------------------------------------------------------


def test_a_flat_folder_with_other_files_between_and_folders_below(tmp_path, capfd):
    notes = ['notes.txt', 'IMG_1.json', 'IMG_2.MOV', 'b/deep/er/IMG_4.jpg', 'Thumbs.db']
    root = written(tmp_path, [*NAMES, *notes])
    source = folder.folder(ANY, path=root)
    assert paths(source, root) == ['IMG_1.jpg', 'IMG_2.png', 'b/IMG_3.webp', 'b/deep/er/IMG_4.jpg']
    assert len(one_class(source)) == 4
    assert '3 files left out' in capfd.readouterr().err


@pytest.mark.parametrize(
    'names',
    [
        ('2019/05/1.jpg', '2019/06/2.jpg', '2020/3.jpg', 'empty/notes.txt'),
        ('test/1.jpg', 'holiday/2.jpg', 'train set/3.jpg'),
        ('extra/a/1.jpg', 'others/b/2.jpg', 'raw/notes.txt'),
    ],
)
def test_folders_need_be_neither_classes_nor_splits(tmp_path, names):
    root = written(tmp_path, names)
    source = folder.folder(ANY, path=root)
    assert paths(source, root) == sorted(name for name in names if name.endswith('jpg'))
    with pytest.raises(UserError):
        folder.folder(Request('train'), path=written(tmp_path / 'x', ('test/a/1.jpg', 'b/2.jpg')))


def test_splits_stay_splits_and_may_have_folders_of_their_own(tmp_path):
    root = written(tmp_path, ('train/a/1.jpg', 'train/b/2.jpg', 'test/c/3.jpg'))
    assert paths(folder.folder(ANY, path=root), root) == ['train/a/1.jpg', 'train/b/2.jpg']
    other = folder.folder(ANY._replace(split='test'), path=root)
    assert paths(other, root) == ['test/c/3.jpg'] and other.load(np.arange(1))[
        'label'
    ].tolist() == [0]
    with pytest.raises(UserError, match='c'):
        folder.folder(Request('test'), path=root)


def test_a_flat_folder_of_pictures_that_more_sounds_go_with(tmp_path):
    sounds = [f'{i}_desc_{tongue}.ogg' for i in range(3) for tongue in ('be', 'ca', 'de', 'fr')]
    root = written(tmp_path, [*(f'{i}.png' for i in range(3)), *sounds, 'sub/4.png', 'sub/4.ogg'])
    assert paths(folder.folder(ANY, path=root), root) == ['0.png', '1.png', '2.png', 'sub/4.png']


# --- Tables and shards -----------------------------------------------------------------


@pytest.mark.parametrize('ending', ['csv', 'jsonl'])
def test_a_table_of_paths_alone(tmp_path, ending):
    written(tmp_path, ('0.jpg', '1.jpg', '2.jpg'))
    rows = [{'image': f'{i}.jpg'} for i in (2, 0)]
    text = '\n'.join(['image', *(row['image'] for row in rows)])
    path = tmp_path / f'x.{ending}'
    path.write_text(text if ending == 'csv' else '\n'.join(map(json.dumps, rows)))
    assert one_class(table.table(ANY, path=str(path))) == [png(2), png(0)]
    with pytest.raises(UserError, match="no column 'label'"):
        table.table(Request('train'), path=str(path))


def test_a_table_with_labels_here_and_there(tmp_path):
    written(tmp_path, ('0.jpg', '1.jpg'))
    path = tmp_path / 'x.csv'
    path.write_text('image,label\n0.jpg,cat\n1.jpg,\n')
    assert len(one_class(table.table(ANY, path=str(path)))) == 2
    with pytest.raises(UserError, match='has no label'):
        table.table(Request('train'), path=str(path))
    path.write_text('image,label\n0.jpg,cat\n1.jpg,dog\n')  # All of them: they stay.
    assert table.table(ANY, path=str(path)).class_names == ('cat', 'dog')


@pytest.mark.parametrize('labels', [None, ['a', None, 'b'], [[{'x': 1}]] * 3])
def test_parquet_without_labels_or_with_what_is_none(tmp_path, labels):
    columns = {'image': [png(i) for i in range(3)]} | ({} if labels is None else {'label': labels})
    pq.write_table(pa.table(columns), tmp_path / 'train-00000-of-00001.parquet')
    source = parquet.parquet(ANY, path=str(tmp_path))
    assert one_class(source) == [png(i) for i in range(3)]
    with pytest.raises(UserError, match='label'):
        parquet.parquet(Request('train'), path=str(tmp_path))
    with pytest.raises(UserError, match='picture'):
        parquet.parquet(ANY, path=str(tmp_path), image_column='picture')


def test_parquet_keeps_the_labels_that_it_has(tmp_path):
    columns = {'image': [png(0), png(1)], 'label': ['b', 'a']}
    pq.write_table(pa.table(columns), tmp_path / 'train.parquet')
    source = parquet.parquet(ANY, path=str(tmp_path))
    assert source.class_names == ('a', 'b') and source.labels().tolist() == [1, 0]


def test_shards_of_pictures_alone(tmp_path):
    with tarfile.open(tmp_path / 'x-000.tar', 'w') as archive:
        for i in range(3):
            member = tarfile.TarInfo(f'{i}.png')
            member.size = len(png(i))
            archive.addfile(member, io.BytesIO(png(i)))
    source = tar.tar(ANY, path=str(tmp_path))
    assert one_class(source) == [png(i) for i in range(3)]


def test_arrays_of_pictures_alone(tmp_path):
    images = np.arange(3 * 8 * 8, dtype=np.uint8).reshape(3, 8, 8, 1)
    np.savez(tmp_path / 'one.npz', image=images)
    np.savez(tmp_path / 'two.npz', x_train=images, x_test=images[:2], y_test=np.array([0, 1]))
    for name in ('one', 'two'):
        path = str(tmp_path / f'{name}.npz')
        np.testing.assert_array_equal(one_class(arrays.arrays(ANY, path=path)), images)
        with pytest.raises(UserError):
            arrays.arrays(Request('train'), path=path)
    labelled = arrays.arrays(Request('test'), path=str(tmp_path / 'two.npz'))
    assert labelled.load(np.arange(2))['label'].tolist() == [0, 1]


def test_idx_files_of_pictures_alone(tmp_path):
    root = write_idx(tmp_path, examples=4)
    whole = idx.idx(Request('train'), path=str(root)).load(np.arange(4))['image']
    (root / 'train-labels-idx1-ubyte.gz').unlink()
    np.testing.assert_array_equal(one_class(idx.idx(ANY, path=str(root))), whole)
    with pytest.raises(UserError, match='no train labels'):
        idx.idx(Request('train'), path=str(root))


# --- Kinds of pictures -----------------------------------------------------------------


def gradient(mode='RGB', size=(40, 30)):
    ramp = np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3)
    return Image.fromarray(ramp.astype(np.uint8)).convert(mode)


KINDS = {
    'grey.jpg': lambda: encoded(gradient('L'), 'JPEG'),
    'cmyk.jpg': lambda: encoded(gradient('CMYK'), 'JPEG'),
    'progressive.jpg': lambda: encoded(gradient(), 'JPEG', progressive=True),
    'alpha.png': lambda: encoded(gradient('RGBA'), 'PNG'),
    'grey-alpha.png': lambda: encoded(gradient('LA'), 'PNG'),
    'palette.png': lambda: encoded(gradient('P'), 'PNG'),
    'one-bit.png': lambda: encoded(gradient('1'), 'PNG'),
    'deep.png': lambda: encoded(
        Image.fromarray((np.arange(1200, dtype=np.uint16) * 54).reshape(30, 40)), 'PNG'
    ),
    'tiny.png': lambda: encoded(gradient(size=(1, 1)), 'PNG'),
    'thin.jpg': lambda: encoded(gradient(size=(500, 2)), 'JPEG'),
    'large.jpg': lambda: encoded(gradient(size=(3000, 1500)), 'JPEG', quality=30),
    'moving.gif': lambda: encoded(
        gradient('P'), 'GIF', save_all=True, append_images=[gradient('P')]
    ),
    'x.webp': lambda: encoded(gradient(), 'WEBP'),
    'x.tif': lambda: encoded(gradient(), 'TIFF'),
    'x.bmp': lambda: encoded(gradient(), 'BMP'),
}
BROKEN = {
    'cut.jpg': lambda: encoded(gradient(), 'JPEG')[:200],
    'cut.png': lambda: encoded(gradient(), 'PNG')[:90],
    'empty.jpg': lambda: b'',
    'page.png': lambda: b'<!doctype html><title>404</title>',
}


def batches(path, text, skip=True, epochs=1, workers=0):
    """(names of the files, batches of all of them, the meter)."""
    spec = dataset.Spec(
        key='data',
        name='folder',
        split='train',
        transform=text,
        image_size=(16, 16),
        settings=(('path', str(path)),),
        labelled=False,
        cache='none',
    )
    source, transform = dataset.open_spec(spec)
    order, meter = pipeline.Order(source.length, seed=0, shuffle=False), pipeline.Meter()
    opener = functools.partial(dataset.open_examples, (spec,), workers)
    found = pipeline.train_batches(
        source, transform, order, skip_bad=skip, meter=meter, workers=workers, opener=opener
    )
    with contextlib.closing(found):
        return paths(source, path), [next(found) for _ in range(epochs)], meter


@pytest.mark.parametrize('text', ['resize(size)', 'inception_crop(size) | flip_lr'])
def test_pictures_of_all_kinds_become_what_the_model_takes(tmp_path, text):
    for name, make in KINDS.items():
        (tmp_path / name).write_bytes(make())
    names, (batch,), meter = batches(tmp_path, text)
    assert batch['image'].shape == (len(KINDS), 16, 16, 3) and batch['image'].dtype == np.uint8
    assert not batch['replaced'].any() and not meter.damaged
    if text == 'resize(size)':
        # All that have all of the ramp show it, one way or another.
        want = np.asarray(gradient().resize((16, 16), Image.Resampling.BILINEAR), float).mean(2)
        for name in set(KINDS) - {'tiny.png', 'one-bit.png', 'thin.jpg'}:
            seen = batch['image'][names.index(name)].astype(float).mean(2)
            assert np.corrcoef(seen.ravel(), want.ravel())[0, 1] > 0.99, name


@pytest.mark.parametrize('workers', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_broken_pictures_are_replaced_and_counted(tmp_path, workers):
    good = ['alpha.png', 'grey.jpg', 'x.bmp', 'x.webp', 'palette.png', 'cmyk.jpg']
    for name, make in (KINDS | BROKEN).items():
        if name in (*good, *BROKEN):
            (tmp_path / name).write_bytes(make())
    names, found, meter = batches(tmp_path, 'resize(size)', epochs=2, workers=workers)
    for batch in found:
        assert {names[i] for i in np.flatnonzero(batch['replaced'])} == set(BROKEN)
    assert {names[i] for i in meter.damaged} == set(BROKEN)
    if not workers:
        with pytest.raises(UserError, match=r"cut\.jpg: .*set data\.on_error='skip'"):
            batches(tmp_path, 'resize(size)', skip=False)


def test_a_resized_copy_is_made_without_the_broken_ones_and_counts_them(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv('BIG_VIT_CACHE', str(tmp_path / 'cache'))
    for name, make in (KINDS | BROKEN).items():
        if name in ('x.bmp', 'x.webp', *BROKEN):
            path = tmp_path / 'photos' / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(make())

    def opened(skip):
        spec = dataset.Spec(
            'data', 'folder', 'train', 'resize(size)', (8, 8), labelled=False, cache='resized',
            settings=(('path', str(tmp_path / 'photos')),), cache_side=20, skip_bad=skip,
        )  # fmt: skip
        return dataset.open_spec(spec)[0]

    with pytest.raises(UserError, match=r'cut\.jpg'):
        opened(False)
    assert opened(True).length == 2
    said = capfd.readouterr().err
    assert 'is a copy of folder:photos without its 4 damaged examples' in said
    with pytest.raises(UserError, match=r"without the 4 damaged .* set data\.on_error='skip'"):
        opened(False)
