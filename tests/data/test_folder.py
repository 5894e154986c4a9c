"""Folders beyond the plain ones of test_data_formats.py: what is a split, links, order."""

import io
import os
import random

import fsspec
import numpy as np
import pytest
from PIL import Image

from big_vit.data import files
from big_vit.data.sources import folder
from big_vit.data.sources.base import Request
from big_vit.errors import UserError


def written(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return str(root)


def refused(call, message):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('splits', 'first'),
    [
        (('test', 'train'), 'train'),
        (('Test', 'Train'), 'Train'),
        (('test2017', 'train2017'), 'train2017'),
        (('extra', 'test', 'training'), 'training'),
        (('train', 'train_small', 'val-clean'), 'train'),
        (('dev', 'test'), 'dev'),
    ],
)
def test_classes_are_those_of_the_split_for_training(tmp_path, splits, first):
    for split in splits:
        written(tmp_path / split, 'cat/1.png', *(['ant/1.png'] if split == first else []))
    for split in splits:
        source = folder.folder(Request(split), path=str(tmp_path))
        assert source.class_names == ('ant', 'cat')
        assert source.labels().tolist() == ([0, 1] if split == first else [1])


@pytest.mark.parametrize('other', ['devkit', 'valley', 'trains', 'annotations'])
def test_folders_beside_those_of_splits_are_not_taken_for_classes(tmp_path, other):
    root = written(tmp_path, 'train/a/1.png', 'val/a/1.png', f'{other}/a/1.png')
    refused(
        lambda: folder.folder(Request('train'), path=root),
        rf'has folders of splits \(train\) and others \({other}\): move the others away',
    )


def test_a_class_may_be_called_as_a_split_is(tmp_path):
    # As in CIFAR-100 and COCO.
    root = written(tmp_path, 'train/1.png', 'tractor/1.png')
    assert folder.folder(Request('train'), path=root).class_names == ('tractor', 'train')


def test_a_split_without_folders_is_refused_only_when_it_is_asked_for(tmp_path):
    root = written(tmp_path, 'train/a/1.png', 'test/1.png')
    assert folder.folder(Request('train'), path=root).length == 1
    refused(lambda: folder.folder(Request('test'), path=root), 'test has no folders, one per class')


def test_the_order_is_the_same_wherever_the_files_lie(tmp_path):
    names = ['m.png', 'k/2.png', 'k.png', 'z/1.png', 'b.png', 'k/1/3.png', 'K.png', 'ä b.png']
    root = written(tmp_path / 'set', *(f'a/{name}' for name in names))
    system = fsspec.filesystem('memory')
    for name in names:
        system.pipe(f'/order/a/{name}', f'a/{name}'.encode())
    wanted = ['K.png', 'b.png', 'k/1/3.png', 'k/2.png', 'k.png', 'm.png', 'z/1.png', 'ä b.png']
    for path in (root, 'memory://order'):
        source = folder.folder(Request('train'), path=path)
        loaded = source.load(np.arange(source.length))['image']
        assert loaded == [f'a/{name}'.encode() for name in wanted]


def test_a_link_to_nothing_is_named(tmp_path):
    root = written(tmp_path, 'train/a/1.png')
    (tmp_path / 'train' / 'no-class').symlink_to('/nowhere')
    (tmp_path / 'train' / 'a' / 'notes').symlink_to('/nowhere')
    assert folder.folder(Request('train'), path=root).length == 1
    (tmp_path / 'train' / 'a' / '0.png').symlink_to('/nowhere')
    refused(
        lambda: folder.folder(Request('train'), path=root),
        r'data\.path: cannot read .*/train/a/0\.png: it is a link to nothing',
    )


def test_a_folder_without_files_is_no_class(tmp_path):
    root = written(tmp_path, 'a/1.png', '__MACOSX/._1.png', 'b/1.txt.part')
    refused(
        lambda: folder.folder(Request('train'), path=root),
        r'folders without image files \(b\), which',
    )
    # An evaluation may lack a class, and its folder may be there.
    root = written(tmp_path / 'set', 'train/a/1.png', 'train/b/1.png', 'val/b/1.png', 'val/a/x.md')
    assert folder.folder(Request('val'), path=root).labels().tolist() == [1]


def test_extensions_that_were_seen_are_those_of_files(tmp_path):
    root = written(tmp_path, 'v1.0/README', 'v1.0/x.y/scan.tar.gz')
    refused(
        lambda: folder.folder(Request('train'), path=root),
        r'\(2 files left out \(1 without an ending, 1 \.gz\), such as v1\.0/x\.y/scan\.tar\.gz\)',
    )


def test_a_part_of_a_sorted_folder_has_all_classes(tmp_path):
    root = written(tmp_path, *(f'class{i // 40}/{i:03d}.png' for i in range(200)))
    parts = [folder.folder(Request(f'train[fold={k}/4]'), path=root) for k in range(4)]
    names = [name for part in parts for name in part.load(np.arange(part.length))['image']]
    assert len(set(names)) == 200
    for part in parts:
        assert set(part.labels()) == set(range(5))
        images = part.load(np.arange(part.length))['image']
        told = [part.place(i).encode().endswith(image) for i, image in enumerate(images)]
        assert all(told)


# --- What is left out ------------------------------------------------------------------


def opened(root, split='train', **more):
    return folder.folder(Request(split, **more), path=str(root))


def png():
    file = io.BytesIO()
    Image.new('RGB', (4, 4)).save(file, 'PNG')
    return file.getvalue()


def paths(source, root):
    return [source.place(i).removeprefix(f'{root}/') for i in range(source.length)]


def test_names_that_downloads_and_cameras_give_are_known(tmp_path):
    names = [
        '1.jpe',
        '2.JFIF',
        '3.avif',
        '4.jp2',
        '5.pgm',
        '6.pbm',
        '7.tga',
        '8.ico',
        '9.jpg_large',
    ]
    names += ['a.jpg ', 'b.png.', 'c.jpeg?w=640', 'd.jpg:orig']
    root = written(tmp_path, *(f'a/{name}' for name in names))
    (tmp_path / 'a' / 'hash').write_bytes(png())
    source = opened(root)
    assert paths(source, root) == sorted([*(f'a/{name}' for name in names), 'a/hash'])


def test_what_is_left_out_is_counted_and_named(tmp_path, capfd):
    pictures = [f'{c}/{i}.jpg' for c in 'ab' for i in range(6)]
    notes = ['a/README', 'a/a_boxes.txt', 'a/0.json', 'b/note.md']
    root = written(tmp_path, *pictures, *notes, 'a/x.heic', 'a/y.heic', 'b/0.MOV')
    assert paths(opened(root), root) == pictures
    assert opened(root).labels().tolist() == [0] * 6 + [1] * 6
    told = capfd.readouterr().err.splitlines()
    assert told == [
        f'data    {root}: 7 files left out (2 .heic, 1 .txt, 1 .mov, 1 .json, '
        '1 without an ending, 1 .md), such as a/x.heic'
    ]


def test_a_large_share_left_out_is_refused(tmp_path):
    root = written(tmp_path, *(f'a/{i}.jpg' for i in range(5)), *(f'a/x{i}.heic' for i in range(3)))
    refused(
        lambda: opened(root),
        r'has 5 image files, and 3 files left out \(3 \.heic\), such as a/x0\.heic, which cannot',
    )


@pytest.mark.parametrize('ending', ['MOV', 'txt', 'xml', 'CR2', 'json'])
def test_a_companion_of_each_picture_is_no_loss(tmp_path, ending):
    root = written(tmp_path, *(f'a/{i}.{end}' for i in range(5) for end in (ending, 'jpg')))
    assert paths(opened(root), root) == [f'a/{i}.jpg' for i in range(5)]


def test_texts_alone_and_videos_with_thumbnails_stay_what_they_are(tmp_path):
    root = written(tmp_path / 'words', 'a/1.txt', 'a/2.txt')
    assert 'text' in opened(root).load(np.arange(2))
    root = written(tmp_path / 'clips', *(f'a/{i}.mp4' for i in range(5)), 'a/0.jpg')
    assert list(opened(root).load(np.arange(5))) == ['video', 'label']


def test_sounds_that_outnumber_the_pictures_they_go_with_are_left_out(tmp_path, capfd):
    # As Debian's tuxpaint-stamps-default has them.
    tongues = [f'_desc_{tongue}' for tongue in ('be', 'ca', 'pt_BR')]
    names = [f'{c}/{i}{end}' for c in 'ab' for i in range(3) for end in ('.png', '.ogg', '.txt')]
    names += [f'{c}/{i}{tongue}.ogg' for c in 'ab' for i in range(3) for tongue in tongues]
    drawn = ['a/heart.svg', *(f'a/heart{tongue}.ogg' for tongue in tongues)]
    root = written(tmp_path / 'stamps', *names, *drawn, 'c/0.png')
    assert paths(opened(root), root) == sorted(
        name for name in (*names, 'c/0.png') if '.png' in name
    )
    assert 'such as a/heart.svg' in capfd.readouterr().err
    both = [name for name in names if 'png' in name or 'ogg' in name]
    root = written(tmp_path / 'both', *both)  # Each class has sounds, and more of them.
    assert len(opened(root).labels()) == 6 and 'image' in opened(root).load(np.arange(2))
    # Sounds that go with no picture are a dataset of two kinds.
    root = written(tmp_path / 'mixed', *(f'a/x{i}.ogg' for i in range(9)), 'a/1.png', 'b/2.png')
    refused(lambda: opened(root), 'holds image and audio files')


def test_thumbnails_of_systems_are_no_pictures(tmp_path):
    clutter = ['@eaDir/1.png/THUMB_M.jpg', '__MACOSX/._1.png', '__MACOSX/1.png']
    clutter += ['.ipynb_checkpoints/1-checkpoint.png', '._1.png', 'Thumbs.db', '#recycle/2.png']
    root = written(tmp_path, 'a/1.png', *clutter, *(f'a/{name}' for name in clutter))
    assert paths(opened(root), root) == ['a/1.png']
    system = fsspec.filesystem('memory')
    for name in ('1.png', *clutter):
        system.pipe(f'/clutter/a/{name}', b'')
    assert opened('memory://clutter').length == 1


# --- Links -----------------------------------------------------------------------------


def test_a_link_to_another_class_is_refused(tmp_path):
    root = written(tmp_path / 'set', 'a/1.png', 'b/1.png', 'b/deep/2.png')
    elsewhere = written(tmp_path / 'pool', '3.png')
    for target in ('b', 'b/deep'):
        for name in ('a/link', 'c'):
            (tmp_path / 'set' / name).symlink_to(tmp_path / 'set' / target)
            refused(lambda: opened(root), f'/{name}: is a link to .*/{target}, whose files would')
            (tmp_path / 'set' / name).unlink()
    # One to what contains it has nothing new, and one to elsewhere is why there are links.
    (tmp_path / 'set' / 'a' / 'up').symlink_to(tmp_path / 'set')
    (tmp_path / 'set' / 'a' / 'pool').symlink_to(elsewhere)
    assert paths(opened(root), root) == ['a/1.png', 'a/pool/3.png', 'b/1.png', 'b/deep/2.png']


def test_a_dataset_and_its_splits_may_be_links(tmp_path):
    written(tmp_path / 'set', 'train/a/1.png', 'test/a/2.png')
    (tmp_path / 'set' / 'val').symlink_to(tmp_path / 'set' / 'test')
    written(tmp_path / 'flat', '1.png')
    for name in ('set', 'flat'):
        (tmp_path / f'link-{name}').symlink_to(tmp_path / name)
    assert opened(tmp_path / 'link-set').length == 1
    assert opened(tmp_path / 'link-set', 'val').place(0).endswith('val/a/2.png')
    assert opened(tmp_path / 'link-flat', labelled=False).length == 1


def test_a_pipe_is_not_read(tmp_path):
    root = written(tmp_path, 'a/1.png')
    os.mkfifo(tmp_path / 'a' / '2.png')
    refused(lambda: opened(root), r'a/2\.png: it is a pipe or a device')
    (tmp_path / 'a' / '2.png').unlink()
    source = opened(root)
    (tmp_path / 'a' / '1.png').unlink()
    (tmp_path / 'a' / '1.png').symlink_to('/dev/zero')
    with pytest.raises(OSError, match='a pipe or a device'):
        source.load(np.arange(1))


# --- Folders within folders ------------------------------------------------------------


def test_doubled_folders_of_splits(tmp_path):
    for split in ('seg_train', 'seg_test'):
        written(tmp_path / split / split, 'a/1.png', 'b/1.png')
    source = opened(tmp_path)
    assert (source.class_names, source.length) == (('a', 'b'), 2)
    assert opened(tmp_path, 'test').place(0).endswith('seg_test/seg_test/a/1.png')
    assert folder.split_folders(files.place(str(tmp_path), 'data.path')) == ['test', 'train']
    written(tmp_path / 'seg_pred' / 'seg_pred', '1.png')
    refused(lambda: opened(tmp_path), r'splits \(seg_test\) and others \(seg_pred\)')
    written(tmp_path / 'flat', 'train/train/1.png', 'test/test/1.png')
    assert opened(tmp_path / 'flat', labelled=False).length == 1


def test_classes_with_splits_in_their_names(tmp_path):
    root = written(tmp_path, 'bullet_train/1.png', 'steam_train/1.png', 'wine_test/1.png')
    assert opened(root).class_names == ('bullet_train', 'steam_train', 'wine_test')


def test_a_folder_around_all_classes_is_no_class(tmp_path):
    root = written(tmp_path, 'Pets/cat/1.png', 'Pets/dog/1.png')
    refused(lambda: opened(root), 'holds one folder, Pets, .*: set data.path=.*/Pets')
    assert opened(root, labelled=False).length == 2


@pytest.mark.slow
def test_trees_at_random_give_each_picture_once(tmp_path):
    rng = random.Random(0)
    endings = ['.jpg', '.PNG', '.jpe', '.jpg_large', '.txt', '.json', '.heic', '', '.jpg ', '.mov']
    places = ['', 'deep/', '@eaDir/', '.hidden/', '__MACOSX/', 'a.b/']
    for number in range(300):
        root, wanted, strange = tmp_path / str(number), set(), 0
        for name in 'abc':
            written(root, f'{name}/first.png')
            wanted.add(f'{name}/first.png')
        for i in range(rng.randrange(30)):
            place, ending = rng.choice(places), rng.choice(endings)
            path = f'{rng.choice("abc")}/{place}{i}{ending}'
            written(root, path)
            if place in ('', 'deep/', 'a.b/'):
                if ending.lower().startswith(('.jp', '.pn')):
                    wanted.add(path)
                strange += ending in ('.heic', '.mov')
        try:
            source = opened(root)
        except UserError as error:
            assert 'left out' in str(error) or 'files (' in str(error)
            assert strange > len(wanted) / 3
            continue
        assert sorted(paths(source, root)) == sorted(wanted)
        assert [source.class_names[c] for c in source.labels()] == [
            path[0] for path in paths(source, root)
        ]


def test_splits_within_classes_are_not_merged(tmp_path):
    names = [f'{name}/{split}/1.png' for name in ('cup', 'jug') for split in ('train', 'test')]
    root = written(tmp_path / 'turned', *names)
    refused(lambda: opened(root), r'splits within folders of classes \(cup/test\): move them')
    # Folders of one class alone may be called so, or one folder of each.
    opened(written(tmp_path / 'one', *names[:2], 'jug/1.png'))
    opened(written(tmp_path / 'each', 'cup/train/1.png', 'jug/train/1.png'))
