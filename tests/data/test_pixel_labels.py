"""Folders of pictures and label maps: what is read, and what is wrong with them."""

import numpy as np
import pytest
from PIL import Image

from big_vit.data import pipeline, transforms
from big_vit.data.sources import classes
from big_vit.data.sources.base import Request, select
from big_vit.data.sources.pixel_labels import pixel_labels
from big_vit.errors import UserError

RNG = np.random.default_rng(0)
PALETTE = RNG.integers(0, 256, 768).astype(np.uint8).tobytes()


def write(
    root, pictures='images', maps='annotations', splits=('training', 'validation'), ending=''
):
    """Write five pictures a split with label maps of a palette; return the label maps by split."""
    written = {}
    for split in splits:
        for folder in (pictures, maps):
            (root / folder / split / 'deeper').mkdir(parents=True)
        for i in range(5):
            below, size = ('deeper/' if i == 4 else ''), RNG.integers(9, 30, 2)
            labels = RNG.choice([0, 1, 2, 255], size).astype(np.uint8)
            image = Image.fromarray(RNG.integers(0, 256, (*size, 3)).astype(np.uint8))
            image.save(root / pictures / split / f'{below}p{i}.jpg')
            shown = Image.fromarray(labels)
            shown.putpalette(PALETTE)
            shown.save(root / maps / split / f'{below}p{i}{ending}.png')
            written.setdefault(split, []).append((f'{below}p{i}', labels))
    return {split: [labels for _, labels in sorted(own)] for split, own in written.items()}


def request(split='training', **more):
    return Request(split, labelled=False, **more)


@pytest.mark.parametrize(
    'layout',
    [
        {},
        {'pictures': 'img_dir', 'maps': 'ann_dir', 'splits': ('train', 'val')},
        {'pictures': 'JPEGImages', 'maps': 'SegmentationClass', 'splits': ('',)},
        {'pictures': 'leftImg8bit', 'maps': 'gtFine', 'ending': '_gtFine_labelTrainIds'},
    ],
)
def test_label_maps_belong_to_pictures_of_the_same_name_and_are_read_alone(layout, tmp_path):
    written = write(tmp_path, **layout)
    for split, labels in written.items():
        source = pixel_labels(request(split or 'train', num_classes=3), path=str(tmp_path))
        assert source.length == 5 and source.num_classes == 3 and source.class_names is None
        for got, want in zip(source.label_maps(np.arange(5)), labels, strict=True):
            np.testing.assert_array_equal(got, want)
        part = select(source, 2, lambda index: index + 3)
        np.testing.assert_array_equal(part.label_maps(np.array([1]))[0], labels[4])
        columns = source.load(np.array([2, 0]))
        assert columns['label'].tolist() == [0, 0]
        opened = transforms.opened(columns, 3)
        np.testing.assert_array_equal(opened['segmentation'][0], labels[2])
        assert opened['image'][0].shape[:2] == labels[2].shape


def test_pictures_and_label_maps_move_together_and_zero_is_reduced(tmp_path):
    labels = write(tmp_path)['training']
    source = pixel_labels(request(num_classes=2), path=str(tmp_path))
    text = 'decode | reduce_zero_label | flip_lr(1) | pad_to(32)'
    made = pipeline.load(source, transforms.parse(text, size=(32, 32)), np.arange(5), 0, 0)
    assert made['image'].shape == (5, 32, 32, 3) and made['segmentation'].dtype == np.int32
    for i, (height, width) in enumerate(made['picture_size'].tolist()):
        plain = labels[i].astype(int)
        want = np.where((plain == 0) | (plain == 255), 255, plain - 1)[:, ::-1]
        np.testing.assert_array_equal(made['segmentation'][i, :height, :width], want)
        assert (made['segmentation'][i, height:] == 255).all()


def test_names_of_classes_come_from_a_list_or_from_the_table_of_ade20k(tmp_path):
    write(tmp_path)
    (tmp_path / 'objectInfo150.txt').write_text(
        'Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1\t5\t5\t1\twall\n2\t0.1\t5\t5\t1\tbed, cot\n'
    )
    source = pixel_labels(request(), path=str(tmp_path))
    assert source.class_names == ('wall', 'bed') and source.num_classes == 2
    (tmp_path / 'classes.txt').write_text('sky\n\nsea \nsand\n')
    source = pixel_labels(request(), path=str(tmp_path))
    assert source.class_names == ('sky', 'sea', 'sand')


def test_classes_that_are_renumbered_are_so_in_every_pixel(tmp_path):
    labels = write(tmp_path)['training']
    source = pixel_labels(request(num_classes=3), path=str(tmp_path))
    mapped = classes.renumbered(source, np.array([1, -1, 0]), 2, ('a', 'b'), 'data')
    table = np.full(256, 255)
    table[[0, 2]] = [1, 0]
    loaded = transforms.opened(mapped.load(np.arange(5)), 3)['segmentation']
    for got, stored, want in zip(loaded, mapped.label_maps(np.arange(5)), labels, strict=True):
        np.testing.assert_array_equal(got, table[want])
        np.testing.assert_array_equal(stored, table[want])


def broken(root, how):
    if how == 'no folders':
        return {}
    if how == 'labelled':
        return {'labelled': True}
    write(root)
    if how == 'maps without pictures':
        for path in (root / 'annotations' / 'training').glob('p[0-3].png'):
            path.rename(path.with_name(f'x{path.name}'))
    if how == 'unlike':
        (root / 'classes.txt').write_text('a\nb\n')
        return {'num_classes': 3}
    return {'many': {'num_classes': 256}, 'unknown': {}}.get(how, {'num_classes': 3})


@pytest.mark.parametrize(
    'how, message',
    [
        ('no folders', 'has no folder of pictures beside one of label maps'),
        ('labelled', 'has classes of objects, and none of pictures'),
        ('maps without pictures', 'has no label map for 4 of 5 pictures, such as p0.jpg'),
        ('unlike', 'num_classes=3, but .* names 2 classes'),
        ('unknown', 'data.num_classes: nothing says the classes'),
        ('many', 'label maps hold at most 255 classes'),
    ],
)
def test_what_is_wrong_is_one_line(how, message, tmp_path):
    more = broken(tmp_path, how)
    with pytest.raises(UserError, match=message) as caught:
        pixel_labels(Request('training', **{'labelled': False, **more}), path=str(tmp_path))
    assert '\n' not in str(caught.value)


def test_a_picture_of_another_size_than_its_label_map_is_refused_by_name(tmp_path):
    write(tmp_path)
    Image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(tmp_path / 'images/training/p0.jpg')
    source = pixel_labels(request(num_classes=3), path=str(tmp_path))
    parsed = transforms.parse('resize(size)', size=(8, 8))
    with pytest.raises(UserError, match=r'differ in size'):
        transforms.check(parsed, source, (8, 8))
