"""From fifty photographs with YOLO labels to a model that finds things and draws them."""

import json
import sys

import cv2
import numpy as np
import pytest
from commands import error_line, run
from PIL import Image, ImageDraw

from benchmarks import picture_sets, scene_pictures
from benchmarks.scene_pictures import SIDE, Things
from big_vit import metrics

pytestmark = pytest.mark.slow
NAMES = ('apple', 'truck')
STAMPS = ('food/fruit/apple_red.png', 'vehicles/garbagetruck.png')
RECIPE = 'configs/own_boxes.py:path={},steps={}'


def done(*words):
    """The output of a command that a user types."""
    result = run(*words, timeout=3600)
    sys.stdout.write(f'$ big_vit {" ".join(map(str, words))}\n{result.stdout}{result.stderr}')
    assert result.returncode == 0, result.stderr
    return result.stdout


def drawn(number):
    """A thing to stand in where there are no stamps."""
    image = Image.new('RGBA', (SIDE, SIDE), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    if number:
        draw.rectangle((0, 20, 95, 75), fill=(240, 200, 20, 255))
        draw.rectangle((12, 30, 80, 44), fill=(30, 30, 40, 255))
    else:
        draw.ellipse((0, 0, 95, 95), fill=(200, 30, 40, 255))
        draw.ellipse((20, 20, 44, 44), fill=(250, 180, 180, 255))
    pixels = np.asarray(image)
    x0, y0, x1, y1 = scene_pictures.box_of(pixels[..., 3] > 0)
    return scene_pictures.fitted(pixels[y0:y1, x0:x1])


def things():
    made = []
    for number, name in enumerate(STAMPS):
        path = picture_sets.STAMPS / name
        made.append((path.exists() and scene_pictures.thing(path)) or drawn(number))
    images, sizes = zip(*made, strict=True)
    return Things(np.stack(images), np.array(sizes), np.arange(len(NAMES)), NAMES)


def photographs():
    """Those that come with scikit-learn, which is always there."""
    from sklearn.datasets import load_sample_images

    return load_sample_images().images


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """Forty photographs to learn from and ten to be scored on, with one to three things."""
    known, folder = things(), tmp_path_factory.mktemp('own') / 'photos'
    for seed, (split, count, side) in enumerate((('train', 40, 'left'), ('val', 10, 'right'))):
        pages = scene_pictures.halves(photographs(), side)
        made = scene_pictures.scenes(known, np.arange(2), pages, count, seed, size=240, most=3)
        scene_pictures.write_yolo(folder, split, made, NAMES, 'jpg')
    return folder


@pytest.fixture(scope='module')
def learnt(photos, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('runs') / 'boxes'
    done('train', '--config', RECIPE.format(photos, 1000), '--workdir', workdir)
    return workdir


def scores(learnt):
    return [row for row in metrics.read(learnt) if 'val/AP50' in row]


@pytest.mark.xfail(
    strict=True, reason='the aim; from nothing, forty pictures came to 0.24 when it was measured'
)
def test_from_nothing_most_things_are_found(learnt):
    assert scores(learnt)[-1]['val/AP50'] > 0.4


def test_from_fifty_photographs_to_boxes_that_are_drawn(photos, learnt, tmp_path):
    rows = scores(learnt)
    assert len(rows) == 5
    # Boxes at any places hardly overlap things by half.
    assert rows[-1]['val/AP50'] > 0.1
    assert {'val/AP/apple', 'val/AP/truck'} <= rows[-1].keys()
    done('report', learnt, '--out', tmp_path / 'report.html')
    report = (tmp_path / 'report.html').read_text()
    assert 'apple' in report and 'data:image/' in report
    pictures = photos / 'images' / 'val'
    drawings, found = tmp_path / 'drawn', tmp_path / 'found.json'
    done('predict', learnt, pictures, '--draw', drawings)
    images = sorted(drawings.iterdir())
    assert len(images) == 10
    plain = cv2.imread(str(pictures / '00000.jpg'))
    assert any(
        (cv2.imread(str(image)).shape, 0) != (plain.shape, 0)
        or np.abs(cv2.imread(str(image)).astype(int) - plain).max() > 60
        for image in images
    )
    done('predict', learnt, pictures, '--out', found)
    objects = json.loads(found.read_text())
    objects = objects if isinstance(objects, list) else objects['annotations']
    assert {'bbox', 'score', 'category_id'} <= objects[0].keys()


def test_bad_starts_are_one_line(photos, tmp_path):
    to = ('--workdir', tmp_path / 'w')
    wrong = run('train', '--config', f'configs/own_boxes.py:path={photos},format=yollo', *to)
    assert 'did you mean yolo?' in error_line(wrong)
    missing = run('train', '--config', RECIPE.format(tmp_path / 'nowhere', 1), *to)
    assert 'nowhere' in error_line(missing)
    few = run('train', '--config', RECIPE.format(photos, 1) + ',queries=1', *to)
    assert 'objects, more than boxes(1)' in error_line(few)
