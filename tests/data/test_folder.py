"""Folders beyond the plain ones of test_data_formats.py: what is a split, links, order."""

import fsspec
import numpy as np
import pytest

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
