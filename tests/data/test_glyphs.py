"""Invented letters: what defines a drawing, what a class shares, and that classes can be told."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from big_vit.data.sources import fdsl, glyphs
from big_vit.data.sources.base import Request
from big_vit.errors import UserError


def test_a_drawing_is_a_function_of_seed_class_and_index_alone():
    classes, indices = np.arange(30) % 7, np.arange(30)
    images = glyphs.render(3, classes, indices, (24, 32))
    assert images.shape == (30, 24, 32, 1) and images.dtype == np.uint8
    some = np.array([29, 4, 11])
    np.testing.assert_array_equal(glyphs.render(3, classes[some], some, (24, 32)), images[some])
    assert (glyphs.render(4, classes, indices, (24, 32)) != images).any((1, 2, 3)).all()


@pytest.mark.parametrize('shape', [(8, 8), (32, 32), (64, 48), (150, 150)])
def test_every_drawing_has_ink_inside_and_black_around(shape):
    images = glyphs.render(0, np.arange(200), np.arange(200), shape)[..., 0]
    inked = (images > 60).mean((1, 2))
    assert inked.min() > 0.01 and inked.max() < 0.6
    if min(shape) > 8:
        assert images.max((1, 2)).min() > 150


def test_strokes_are_as_wide_as_the_pen_and_without_gaps():
    # One long stroke: the ink divided by the length is its width, between the bounds of the pen.
    y = np.full((1, 3, 25), 31.5)
    x = np.linspace(10, 54, 25)[None, None].repeat(3, 1)
    shown = np.array([[True, False, False]])
    for width in (0.06 * 64, 0.15 * 64):
        lines = glyphs._pen(y, x, shown, np.array([width]), 64)
        image = fdsl.rasterize(lines, 1, (64, 64))[0, :, :, 0] / 255
        assert (image[:, 14:50].sum(0) >= 0.8 * width).all()
        assert (image[:, 14:50].sum(0) <= 1.2 * width + 1.5).all()


def test_the_drawings_of_a_class_are_told_from_those_of_others():
    classes = np.repeat(np.arange(10), 40)
    images = glyphs.render(0, classes, np.arange(400), (16, 16)).reshape(400, -1) / 255
    train = np.arange(400) % 4 != 0
    model = LogisticRegression(max_iter=300).fit(images[train], classes[train])
    score = model.score(images[~train], classes[~train])
    assert 0.6 < score < 1.0  # Chance is 0.1.


def test_it_is_a_source_like_the_formulas():
    source = glyphs.glyphs(Request('test', num_classes=5, image_size=(16, 16)))
    assert (source.name, source.length, source.num_classes) == ('glyphs', 250, 5)
    np.testing.assert_array_equal(source.load(np.arange(7))['label'], np.arange(7) % 5)
    with pytest.raises(UserError, match=r"num_classes must be set for data\.name='glyphs'"):
        glyphs.glyphs(Request('test', image_size=(16, 16)))
