"""The same scenes as files of COCO, VOC and YOLO, and the ways in which such files are wrong."""

import contextlib
import copy
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import scenes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from scenes import SCENES

from big_vit.data import pipeline, transforms
from big_vit.data.moves import decoded_mask, runs_of
from big_vit.data.sources import coco, voc, yolo
from big_vit.data.sources.base import Request, concatenate, select
from big_vit.data.sources.classes import relabel, subset
from big_vit.data.sources.known import Known, meet
from big_vit.errors import UserError

REQUEST = Request('train', labelled=False)
SKIP = REQUEST._replace(skip_bad=True)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv('BIG_VIT_CACHE', str(tmp_path_factory.mktemp('cache')))


def open_coco(root, request=REQUEST, **more):
    return coco.coco(request, path=str(root), **more)


def open_voc(root, request=REQUEST, **more):
    return voc.voc(request, path=str(root), **more)


def open_yolo(root, request=REQUEST):
    return yolo.yolo(request, path=str(root))


def load(source, text, rows=3, **more):
    """Load examples as a run does."""
    transform = transforms.parse(text, size=(8, 8))
    opened = replace(source, load=lambda index: transforms.opened(source.load(index), 3))
    return pipeline.load(opened, transform, np.arange(rows), 0, 0, **more)


def refused(call, *words):
    with pytest.raises(UserError) as error:
        call()
    assert '\n' not in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)


# --- The same scenes -------------------------------------------------------------------

FORMS = {
    'coco': (scenes.write_coco, open_coco, {}),
    'coco polygons': (scenes.write_coco, open_coco, {'masks': 'polygons'}),
    'coco boxes': (scenes.write_coco, open_coco, {'masks': 'none'}),
    'voc': (scenes.write_voc, open_voc, {}),
    'yolo': (scenes.write_yolo, open_yolo, {}),
    'yolo polygons': (scenes.write_yolo, open_yolo, {'polygons': True}),
}


@pytest.mark.parametrize('form', FORMS)
def test_scenes_come_back_as_they_were_written(tmp_path, form):
    write, open_source, more = FORMS[form]
    write(tmp_path, **more)
    source = open_source(tmp_path)
    assert (source.class_names, source.num_classes, source.length) == (scenes.NAMES, 3, 3)
    columns, said = source.load(np.arange(3)), source.annotations(np.arange(3))
    assert columns['label'].tolist() == [0, 0, 0]
    for row, scene in enumerate(SCENES):
        pixels = np.asarray(Image.open(io.BytesIO(columns['image'][row])))
        np.testing.assert_array_equal(pixels, scene.pixels())
        boxes = np.array([t.box for t in scene.things], float).reshape(-1, 4)
        labels = [t.label for t in scene.things]
        for own in (columns['boxes'][row], said[row].boxes):
            np.testing.assert_allclose(own, boxes, atol=1e-5)
        assert columns['box_label'][row].tolist() == said[row].labels.tolist() == labels
        assert not columns['box_crowd'][row].any()
        assert (said[row].height, said[row].width) == scene.size
        assert said[row].identity == scene.name
        if form == 'coco':
            masks = columns['box_mask'][row].pixels()
            wanted = np.array([t.mask(scene.size) for t in scene.things]).reshape(-1, *scene.size)
            np.testing.assert_array_equal(masks, wanted)
            assert said[row].area.tolist() == wanted.sum((1, 2)).tolist()
        if 'polygons' in form:
            whole = [t._replace(is_round=False).mask(scene.size) for t in scene.things]
            masks = columns['box_mask'][row].pixels()
            np.testing.assert_array_equal(masks, np.array(whole).reshape(-1, *scene.size))
        assert ('box_mask' in columns) == (form == 'coco' or 'polygons' in form)


def test_both_conventions_of_corners(tmp_path):
    scenes.write_voc(tmp_path / 'from one')
    scenes.write_voc(tmp_path / 'from zero', less=0)
    one = open_voc(tmp_path / 'from one', corners='inclusive')
    zero = open_voc(tmp_path / 'from zero', corners='exclusive')
    for left, right in zip(
        one.annotations(np.arange(3)), zero.annotations(np.arange(3)), strict=True
    ):
        np.testing.assert_array_equal(left.boxes, right.boxes)
    refused(lambda: open_voc(tmp_path / 'from one', corners='both'), 'data.corners', "'exclusive'")


@pytest.mark.filterwarnings('ignore:__array__ implementation:DeprecationWarning')
def test_what_a_file_of_coco_says_is_what_pycocotools_reads(tmp_path):
    content = scenes.coco_json()
    things = content['annotations']
    things[0]['bbox'] = [10.35, 20.1, 39.9, 19.77]
    things[0]['segmentation'] = [[10.35, 20.1, 50.2, 22, 33, 39.87], [60, 1, 70, 3.5, 65, 9.25]]
    compressed = coco_mask.encode(np.asfortranarray(SCENES[2].things[1].mask((64, 64))))
    things[3]['segmentation'] = {'size': [64, 64], 'counts': compressed['counts'].decode()}
    things[4]['iscrowd'] = 1
    file = scenes.write_coco(tmp_path, content=content)
    source = open_coco(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = COCO(str(file))
    for row, own in enumerate(source.annotations(np.arange(3))):
        assert theirs.imgs[own.image_id]['file_name'] == own.identity == SCENES[row].name
        entries = theirs.loadAnns(theirs.getAnnIds(imgIds=own.image_id))
        assert own.xywh.tolist() == [entry['bbox'] for entry in entries]
        assert own.area.tolist() == [entry['area'] for entry in entries]
        assert own.crowd.tolist() == [entry['iscrowd'] for entry in entries]
        names = [theirs.cats[entry['category_id']]['name'] for entry in entries]
        assert [source.class_names[label] for label in own.labels] == names
        pixels = source.load(np.array([row]))['box_mask'][0].pixels()
        for k, entry in enumerate(entries):
            np.testing.assert_array_equal(coco_mask.decode(own.masks[k]), theirs.annToMask(entry))
            np.testing.assert_array_equal(pixels[k], theirs.annToMask(entry))


def test_objects_that_are_crowds_or_difficult(tmp_path):
    things = (SCENES[0].things[0], SCENES[0].things[1]._replace(crowd=True))
    marked = (SCENES[0]._replace(things=things), *SCENES[1:])
    scenes.write_coco(tmp_path / 'coco', marked)
    scenes.write_voc(tmp_path / 'voc', marked)
    for source in (open_coco(tmp_path / 'coco'), open_voc(tmp_path / 'voc')):
        assert source.load(np.array([0]))['box_crowd'][0].tolist() == [False, True]
        assert source.annotations(np.array([0]))[0].crowd.tolist() == [False, True]


def test_boxes_that_reach_over_the_edge_are_clipped_and_scored_as_they_are(tmp_path):
    content = scenes.coco_json()
    content['annotations'][0]['bbox'] = [-0.5, 20, 81.5, 40.75]
    scenes.write_coco(tmp_path, content=content)
    source = open_coco(tmp_path)
    assert source.load(np.array([0]))['boxes'][0][0].tolist() == [0, 20, 80, 60]
    assert source.annotations(np.array([0]))[0].boxes[0].tolist() == [-0.5, 20, 81, 60.75]


# --- Layouts, splits, classes ----------------------------------------------------------


def test_layouts_of_coco(tmp_path):
    for split in ('train2017', 'val2017'):
        scenes.write_coco(tmp_path / 'tree', split=split)
        scenes.write_pictures(tmp_path / 'export' / split)
        text = json.dumps(scenes.coco_json())
        (tmp_path / 'export' / split / '_annotations.coco.json').write_text(text)
    (tmp_path / 'tree/annotations/captions_val2017.json').write_text('{}')
    pattern = {'annotations': str(tmp_path / 'tree/annotations/instances_*.json')}
    val = REQUEST._replace(split='val2017[:2]')
    one = {'annotations': str(tmp_path / 'tree/annotations/instances_val2017.json')}
    for root, more in (
        ('tree', {}),
        ('export', {}),
        ('tree/*', pattern),
        ('tree/val2017', one),
    ):
        source = open_coco(tmp_path / root, val, **more)
        assert source.length == 2
        assert source.load(np.array([0]))['boxes'][0].shape == (2, 4)
    refused(lambda: open_coco(tmp_path / 'tree'), "no split 'train', only train2017, val2017")
    # A file that names no split is `train`, so that training and test are never one by accident.
    refused(
        lambda: open_coco(tmp_path / 'tree/val2017', REQUEST._replace(split='test'), **one),
        "no split 'test', only val2017",
    )


def test_layouts_of_yolo(tmp_path):
    scenes.write_yolo(tmp_path)
    listed = '\n'.join(f'./images/train/{scene.name}' for scene in SCENES)
    (tmp_path / 'list.txt').write_text(listed + '\n')
    for text in (
        'train: [images/train]\nnames: [cat, no, lamp]',
        'path: /nowhere\ntrain: ../images/train\nval:\ntest: null\n'
        'names: {5: x, 0: cat, 1: no, 2: y}',
        'train: list.txt\nnames: [cat, no, lamp]',
    ):
        (tmp_path / 'data.yaml').write_text(text)
        source = open_yolo(tmp_path / 'data.yaml')
        assert source.length == 3 and source.class_names[:2] == ('cat', 'no')
        assert source.annotations(np.array([0]))[0].labels.tolist() == [0, 2]
    refused(lambda: open_yolo(tmp_path, REQUEST._replace(split='val')), "no split 'val'")


def test_voc_without_lists_and_with_pictures_of_another_ending(tmp_path):
    scenes.write_voc(tmp_path)
    for file in (tmp_path / 'ImageSets/Main').iterdir():
        file.unlink()
    xml = tmp_path / 'Annotations/a.xml'
    xml.write_text(xml.read_text().replace('a.png', 'elsewhere.jpg').replace('>80<', '>0<'))
    source = open_voc(tmp_path)
    own = source.annotations(np.array([0]))[0]
    assert (source.length, own.identity, own.width) == (3, 'a.png', 80)
    refused(lambda: open_voc(tmp_path / 'JPEGImages'), 'no folder Annotations')


def test_annotations_follow_their_examples(tmp_path):
    scenes.write_coco(tmp_path)
    source = open_coco(tmp_path)
    turned = select(source, 3, lambda index: 2 - index)
    both = concatenate([source, turned], 'both', 'train')
    names = [own.identity for own in both.annotations(np.array([0, 3, 5]))]
    assert names == ['a.png', 'c.png', 'a.png']
    part = open_coco(tmp_path, REQUEST._replace(split='train[2:]'))
    assert part.annotations(np.array([0]))[0].identity == 'c.png'


def test_classes_of_objects_meet_and_are_left_out_by_name(tmp_path):
    scenes.write_coco(tmp_path)
    source = open_coco(tmp_path)
    met, line = meet(source, Known(4, ('bird', 'lamp', 'dog', 'cat'), 'the model'), 'data')
    assert 'cat 0 -> 3' in line
    chosen = subset(source, ('lamp', 'cat'), 'data.classes')
    merged = relabel(source, {'cat': 0, 'dog': None, 'lamp': 0}, 'data.label_map')
    wanted = ((met, [3, 1], [2, 2, 3]), (chosen, [1, 0], [1]), (merged, [0, 0], [0]))
    for changed, first, last in wanted:
        columns, said = changed.load(np.arange(3)), changed.annotations(np.arange(3))
        assert columns['box_label'][0].tolist() == said[0].labels.tolist() == first
        assert columns['box_label'][2].tolist() == said[2].labels.tolist() == last
        assert len(columns['boxes'][2]) == len(columns['box_mask'][2]) == len(said[2].masks)
        assert changed.length == 3
    np.testing.assert_array_equal(chosen.load(np.array([2]))['boxes'][0], [[30, 20, 61, 50]])
    with pytest.raises(UserError, match='has not'):
        meet(source, Known(1, ('dog',), 'the model'), 'data')


def test_pictures_have_no_classes_of_their_own(tmp_path):
    scenes.write_coco(tmp_path)
    refused(lambda: open_coco(tmp_path, Request('train')), "data.name='coco'", 'none of pictures')


# --- Orientation -----------------------------------------------------------------------


@pytest.mark.parametrize('orientation', range(1, 9))
def test_boxes_are_of_the_picture_that_comes_with_them(tmp_path, orientation):
    """YOLO's are of what viewers show, COCO's of what the size in its file is of."""
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 255, (24, 40, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    scene = scenes.Scene('a.png', (40, 24) if orientation > 4 else (24, 40), (SCENES[2].things[1],))
    scenes.write_yolo(tmp_path / 'yolo', (scene,))
    content = scenes.coco_json((scene,))
    scenes.write_coco(tmp_path / 'coco', (scene,), content=content)
    for file in ('yolo/images/train', 'coco/train'):
        Image.fromarray(stored).save(tmp_path / file / 'a.png', exif=exif)
    shown = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / 'coco/train/a.png')))
    for source, wanted in (
        (open_yolo(tmp_path / 'yolo'), shown),
        (open_coco(tmp_path / 'coco'), shown if orientation > 4 else stored),
    ):
        columns = transforms.opened(source.load(np.array([0])), 3)
        image = columns['image'][0]
        pixels = image if isinstance(image, np.ndarray) else image.pixels()
        np.testing.assert_array_equal(pixels, wanted)
        np.testing.assert_allclose(columns['boxes'][0], [[3, 4, 10, 9]], atol=1e-5)
        own = source.annotations(np.array([0]))[0]
        assert (own.height, own.width) == wanted.shape[:2]


# --- What is wrong ---------------------------------------------------------------------


def changed(**values):
    """Change the third annotation, which is of c.png."""
    return lambda content: content['annotations'][2].update(values)


def of(part, number, **values):
    return lambda content: content[part][number].update(values)


RUNS = {'size': [64, 64], 'counts': [4096]}
WRONG_OBJECTS = {
    'outside': (changed(bbox=[64, 3, 5, 5]), 'annotation 3: box (64, 3, 69, 8) is outside'),
    'above': (changed(bbox=[3, -9, 5, 5]), 'is outside of its picture of 64x64'),
    'no width': (changed(bbox=[3, 3, 0, 5]), 'has no area'),
    'corners': (changed(bbox=[30, 30, -10, 5]), 'corners in the wrong order'),
    'text': (changed(bbox=['1', 2, 3, 4]), 'no list of four numbers'),
    'three numbers': (changed(bbox=[1, 2, 3]), 'no list of four numbers'),
    'infinite': (changed(bbox=[1, 2, float('inf'), 4]), 'numbers that are none'),
    'category': (changed(category_id=4), 'there is no category 4'),
    'a list as category': (changed(category_id=[3]), 'there is no category [3]'),
    'crowd': (changed(iscrowd=2), 'iscrowd is 2'),
    'area': (changed(area='x'), "area is 'x'"),
    'ids': (changed(id=2), 'annotation 2: another annotation has this id'),
    'mask of another size': (
        changed(segmentation={'size': [64, 32], 'counts': [2048]}),
        'mask is of 32x64 pixels, its picture of 64x64',
    ),
    'runs': (changed(segmentation={**RUNS, 'counts': [4000]}), 'runs of 4,000 pixels in all'),
    'negative runs': (changed(segmentation={**RUNS, 'counts': [-1, 4097]}), 'no whole numbers'),
    'short polygon': (changed(segmentation=[[1, 2, 3, 4]]), 'three or more pairs'),
    'odd polygon': (changed(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), 'three or more pairs'),
    'no polygon': (changed(segmentation=[['a'] * 6]), 'what are no numbers'),
    'no mask': (changed(segmentation='x'), 'neither polygons nor runs'),
    'no size': (of('images', 2, width=0), 'picture 102: its height and width are 64 and 0'),
    'name leads out': (of('images', 2, file_name='../c.png'), '../c.png leads out of the folder'),
    'absolute name': (of('images', 2, file_name='/etc/c.png'), 'leads out of the folder'),
    'no name': (of('images', 2, file_name=None), 'None is no name of a file'),
    'not there': (of('images', 2, file_name='d.png'), 'there is no file'),
}  # fmt: skip


@pytest.mark.parametrize('name', WRONG_OBJECTS)
def test_a_wrong_entry_is_refused_or_its_picture_skipped(tmp_path, name):
    change, text = WRONG_OBJECTS[name]
    content = copy.deepcopy(scenes.coco_json())
    change(content)
    scenes.write_coco(tmp_path, content=content)
    refused(lambda: open_coco(tmp_path), 'instances_train.json, ', text, "on_error='skip'")
    source = open_coco(tmp_path, SKIP)
    loaded = load(source, 'resize(8) | boxes(5)', skip_bad=True)
    assert loaded['replaced'].tolist() == [0, 0, 1]
    np.testing.assert_array_equal(loaded['boxes'][2], loaded['boxes'][0])
    assert len(source.annotations(np.array([2]))[0].boxes) == 0


WRONG_FILES = {
    'no JSON': ('{"images": [', 'cannot be read as JSON'),
    'a list': ('[]', "has no list 'images'"),
    'empty': ('{"images": [], "annotations": [], "categories": []}', "'images' is empty"),
    'no annotations': (lambda c: c.update(annotations=[]), "its list 'annotations' is empty"),
    'no categories': (lambda c: c.pop('categories'), "has no list 'categories'"),
    'pictures': (of('images', 1, id=100), 'two pictures have the id 100'),
    'categories': (of('categories', 1, id=90), 'two categories have the id 90'),
    'stray': (changed(image_id=7), 'annotation 3: there is no picture 7'),
    'other pictures': (
        lambda c: [own.update(file_name=f'x/{own["file_name"]}') for own in c['images']],
        'none of the 3 pictures is in',
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', WRONG_FILES)
def test_a_file_of_coco_that_is_wrong_as_a_whole(tmp_path, name):
    change, text = WRONG_FILES[name]
    content = copy.deepcopy(scenes.coco_json())
    file = scenes.write_coco(tmp_path)
    if callable(change):
        change(content)
        file.write_text(json.dumps(content))
    else:
        file.write_text(change)
    refused(lambda: open_coco(tmp_path), text)


def test_a_picture_of_another_size_than_its_boxes(tmp_path):
    scenes.write_coco(tmp_path)
    Image.new('RGB', (10, 20)).save(tmp_path / 'train/a.png')
    refused(
        lambda: load(open_coco(tmp_path), 'resize(8) | boxes(5)'),
        'a.png: is 10x20 pixels, and its boxes are of a picture of 80x60',
    )


def test_runs_that_are_damaged_name_their_picture(tmp_path):
    content = scenes.coco_json()
    for counts in ('0' * 50 + 'o' * 50, '', 'é', '1Y', '0' * 50, 'oooooooo0'):
        content['annotations'][2]['segmentation'] = {'size': [64, 64], 'counts': counts}
        scenes.write_coco(tmp_path, content=content)
        refused(lambda: open_coco(tmp_path), 'annotation 3: mask')


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]>'
WRONG_XML = {
    'no XML': (lambda text: text[:-5], 'cannot be read'),
    'entities': (lambda text: BOMB + text, 'declares entities'),
    'root': (lambda text: text.replace('annotation>', 'notes>'), "root is 'notes'"),
    'no box': (lambda text: text.replace('bndbox', 'box'), 'object 1 has no bndbox'),
    'no number': (lambda text: text.replace('>40<', '>forty<'), "ymax 'forty', which is no number"),
    'corners': (lambda text: text.replace('>40<', '>12<'), 'corners in the wrong order'),
    'outside': (
        lambda text: text.replace('>11<', '>111<').replace('>50.0<', '>120<'),
        'object 1 (cat): box (110, 20, 120, 40) is outside of its picture of 80x60',
    ),
    'no file': (None, 'there is no picture'),
}  # fmt: skip


@pytest.mark.parametrize('name', WRONG_XML)
def test_an_xml_file_that_is_wrong(tmp_path, name):
    change, text = WRONG_XML[name]
    scenes.write_voc(tmp_path)
    xml = tmp_path / 'Annotations/a.xml'
    if change is None:
        (tmp_path / 'JPEGImages/a.png').unlink()
    else:
        xml.write_text(change(xml.read_text()))
    refused(lambda: open_voc(tmp_path), 'Annotations/a.xml: ', text)
    if name == 'entities':
        xml.write_text(change(xml.read_text()), encoding='utf-16')
        refused(lambda: open_voc(tmp_path), 'declares entities')
    with pytest.raises(UserError):  # The lamp of a.xml is nowhere else, but c.xml is read.
        open_voc(tmp_path, SKIP._replace(split='test'))
    source = open_voc(tmp_path, SKIP)
    with pytest.raises(ValueError, match=r'a\.xml'):
        source.load(np.array([0]))
    assert len(source.load(np.array([2]))['boxes'][0]) == 3


WRONG_ROWS = {
    'class': ('3 0.5 0.5 0.1 0.1', 'there is no class 3 among 3 names'),
    'fraction': ('0.5 0.5 0.5 0.1 0.1', 'there is no class 0.5'),
    'columns': ('0 0.5 0.5 0.1', 'has 4 numbers, not 5'),
    'six': ('0 0.5 0.5 0.1 0.1 0.9', 'has 6 numbers, not 5'),
    'pixels': ('0 20 30 10 10', 'has numbers beyond 0 to 1'),
    'no area': ('0 0.5 0.5 0 0.1', 'box (0.5, 0.45, 0.5, 0.55) has no area'),
    'word': ('cat 0.5 0.5 0.1 0.1', "'cat 0.5 0.5 0.1 0.1' has what is no number"),
    'nan': ('0 nan 0.5 0.1 0.1', 'has numbers that are none'),
    'mixed': ('0 .1 .1 .2 .1 .2 .2\n0 0.5 0.5 0.1 0.1', 'has 4 coordinates, and other rows are'),
}  # fmt: skip


@pytest.mark.parametrize('name', WRONG_ROWS)
def test_a_row_of_yolo_that_is_wrong(tmp_path, name):
    row, text = WRONG_ROWS[name]
    scenes.write_yolo(tmp_path)
    (tmp_path / 'labels/train/a.txt').write_text(f'{row}\n')
    number = row.count('\n') + 1
    refused(lambda: open_yolo(tmp_path), f'labels/train/a.txt, line {number}: {text}')
    with pytest.raises(ValueError, match='line'):
        open_yolo(tmp_path, SKIP).load(np.array([0]))


WRONG_YAML = {
    'no YAML': ('names: [a', 'cannot be read as YAML'),
    'aliases': ('a: &a [x, x]\nnames: [*a, *a]', 'has aliases'),
    'tags': ('names: !!python/object:os.system [a]\ntrain: images', 'no folder or list'),
    'no names': ('train: images/train', 'names must list the classes'),
    'keys': ('names: {a: 1}', 'whole numbers from 0'),
    'no split': ('names: [a, b, c]', 'has none of train, val, test'),
    'no folder': ('names: [a, b, c]\ntrain: pictures', 'there is no folder or list of pictures'),
    'no labels': ('names: [a, b, c]\ntrain: labels', 'no picture in'),
}  # fmt: skip


@pytest.mark.parametrize('name', WRONG_YAML)
def test_a_data_yaml_that_is_wrong(tmp_path, name):
    scenes.write_yolo(tmp_path)
    text, message = WRONG_YAML[name]
    (tmp_path / 'data.yaml').write_text(text)
    if name == 'tags':
        assert yolo._read_yaml.__name__  # A tag is not made an object: the list of names remains.
        (tmp_path / 'data.yaml').write_text(text.replace('train: images', 'train: nowhere'))
    refused(lambda: open_yolo(tmp_path), 'data.yaml', message)


def test_rows_that_come_twice_count_once_and_pictures_that_are_gone_are_wrong(tmp_path):
    scenes.write_yolo(tmp_path)
    file = tmp_path / 'labels/train/a.txt'
    file.write_text(file.read_text() * 2)
    assert len(open_yolo(tmp_path).annotations(np.array([0]))[0].boxes) == 2
    (tmp_path / 'list.txt').write_text('images/train/a.png\nimages/train/z.png\n')
    (tmp_path / 'data.yaml').write_text('names: [a, b, c]\ntrain: list.txt\n')
    refused(lambda: open_yolo(tmp_path), 'there is no picture', 'z.png')
    (tmp_path / 'list.txt').write_text('images/../../../etc/passwd.png\n')
    refused(lambda: open_yolo(tmp_path), 'list.txt, line 1', 'leads out')


def test_examples_of_an_evaluation_say_which_they_are(tmp_path):
    scenes.write_coco(tmp_path)
    source = open_coco(tmp_path)
    transform = transforms.parse('resize(8) | boxes(5)', size=(8, 8))
    opened = replace(source, load=lambda index: transforms.opened(source.load(index), 3))
    batches = list(pipeline.eval_batches(opened, transform, batch_size=2))
    assert [batch['example'].tolist() for batch in batches] == [[0, 1], [2, 0]]
    assert [batch['mask'].tolist() for batch in batches] == [[1, 1], [1, 0]]
    assert batches[0]['example'].dtype == np.int32


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    share=st.floats(0, 1),
    seed=st.integers(0, 9),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.filterwarnings('ignore:__array__ implementation:DeprecationWarning')
def test_masks_are_decoded_as_pycocotools_does(shape, share, seed):
    large = (40 * shape[0], 30 * shape[1])
    mask = (np.random.default_rng(seed).random(shape) < share).astype(np.uint8)
    for whole in (mask, np.kron(mask, np.ones((40, 30), np.uint8))):
        rle = coco_mask.encode(np.asfortranarray(whole))
        np.testing.assert_array_equal(decoded_mask(rle), whole)
        assert runs_of(rle['counts']).tolist() == scenes.uncompressed(whole)
    assert whole.shape == large
