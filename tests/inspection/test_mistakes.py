"""The part of a report that shows mistakes: its numbers are scikit-learn's, its names are text."""

import base64
import re

import cv2
import numpy as np
import pytest
from sklearn.metrics import confusion_matrix
from test_report import Page

from big_vit.build.data import Data
from big_vit.data import transforms
from big_vit.data.sources.base import from_arrays
from big_vit.evaluators.confusion import Judged
from big_vit.inspection import html_pages, mistakes

NAMES = ('<script>alert(1)</script>', 'cat & "dog"', "o'boat", '日本語')


def shown(classes, examples=60, seen=None):
    """A page of random answers, and what it was made of."""
    rng = np.random.default_rng(classes)
    names = (NAMES + tuple(f'class {i}' for i in range(classes)))[:classes]
    images = rng.integers(0, 256, (examples, 8, 8, 3), dtype=np.uint8)
    labels = rng.integers(0, classes, examples).astype(np.int32)
    predicted = np.where(rng.random(examples) < 0.5, labels, rng.integers(0, classes, examples))
    losses, likely = rng.random((2, examples))
    rows = rng.permutation(examples)
    seen = seen or examples
    judged = Judged(rows, labels[rows], predicted[rows], losses[rows], likely[rows], names, seen)
    source = from_arrays('photos', 'test', images, labels, classes)
    transform = transforms.parse('', size=(8, 8))
    spec = transforms.check(transform, source, (8, 8))
    data = Data(source, transform, spec, (), (), skip_bad=False)
    body = mistakes.section(judged, data)
    text = html_pages.page('a', '<h1>a</h1>', [('Mistakes', body)], 'b')
    return Page(text), text, judged, images


def test_a_few_classes_are_a_matrix_of_scikit_learns_numbers():
    page, text, judged, _ = shown(4)
    wanted = confusion_matrix(judged.labels, judged.predicted, labels=range(4))
    cells = re.findall(r'<td[^>]*style="--share:([\d.]+)">(\d*)</td>', text)
    counts = np.array([int(count or 0) for _, count in cells]).reshape(4, 4)
    np.testing.assert_array_equal(counts, wanted)
    shares = np.array([float(share) for share, _ in cells]).reshape(4, 4)
    np.testing.assert_allclose(shares, wanted / wanted.sum(1, keepdims=True), atol=5e-4)
    assert all(name in page.text for name in NAMES)
    assert '<script>alert' not in text and '日本語' in text
    wrong = 60 - np.trace(wanted)
    assert f'{wrong} of 60 examples are mistaken' in page.text


def test_many_classes_are_the_confused_pairs_and_the_worst():
    page, text, _, _ = shown(300, examples=600)
    assert '"--share:' not in text
    assert 'Most confused: 20 of ' in page.text and 'The 20 worst of ' in page.text
    assert len(page.tags['tr']) == 2 * 21
    assert len(text) < 200_000


def test_the_worst_errors_are_their_pictures_in_order():
    page, _, judged, images = shown(4)
    wrong = np.flatnonzero(judged.labels != judged.predicted)
    order = wrong[np.argsort(-judged.losses[wrong])][: mistakes.MOST_PICTURES]
    assert len(page.tags['img']) == len(order) > 3
    for place, image in zip(order, page.tags['img'], strict=True):
        encoded = base64.b64decode(image['src'].partition('base64,')[2])
        pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        np.testing.assert_array_equal(pixels, images[judged.rows[place]])
        true, other = (NAMES[k[place]] for k in (judged.labels, judged.predicted))
        assert image['alt'].startswith(f'{true}, taken for {other}: ')


@pytest.mark.parametrize('seen', [60, 30])
def test_what_was_not_judged_is_said(seen):
    page, *_ = shown(4, seen=seen)
    assert ('drawn from 60, as many as a minute allowed' in page.text) == (seen < 60)
