"""Colours of patches: against scikit-learn's principal components, and what they are to show."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from big_vit.inspection import patch_components

RNG = np.random.default_rng(0)
TOKENS = (RNG.standard_normal((3, 6, 5, 16)) * np.arange(16, 0, -1) + 4).astype(np.float32)


def test_components_are_those_of_scikit_learn_up_to_signs():
    flat = TOKENS.reshape(-1, 16)
    found, shares = patch_components.components(flat)
    theirs = PCA(3).fit(flat.astype(np.float64))
    want = theirs.transform(flat.astype(np.float64))
    np.testing.assert_allclose(np.abs(found), np.abs(want), atol=1e-4)
    np.testing.assert_allclose(shares, theirs.explained_variance_ratio_, rtol=1e-6)
    assert (np.power(found, 3).sum(0) > 0).all()
    again, _ = patch_components.components(flat[::-1])
    np.testing.assert_allclose(again[::-1], found, atol=1e-9)  # Signs are no accident.


def test_few_directions_or_none_are_drawn_too():
    line = RNG.standard_normal((20, 1)) * np.ones(16)
    found, shares = patch_components.components(line)
    np.testing.assert_allclose(shares, [1, 0, 0], atol=1e-12)
    assert np.abs(found[:, 1:]).max() < 1e-9
    same, shares = patch_components.colours(np.ones((2, 3, 3, 16)))
    assert same.shape == (2, 3, 3, 3) and not same.any() and not shares.any()
    two, _ = patch_components.components(RNG.standard_normal((9, 2)))
    assert two.shape == (9, 3) and not two[:, 2].any()


def things(side=9):
    """Two pictures of things of two parts in the middle before a common ground."""
    ground, left, right = RNG.standard_normal((3, 16)) * 5
    tokens = np.tile(ground, (2, side, side, 1))
    mask = np.zeros((2, side, side), bool)
    mask[0, 2:6, 2:7] = mask[1, 4:8, 1:6] = True
    tokens[0, 2:6, 2:4], tokens[0, 2:6, 4:7] = left, right
    tokens[1, 4:8, 1:3], tokens[1, 4:8, 3:6] = left, right
    return tokens + 0.1 * RNG.standard_normal(tokens.shape), mask


@pytest.mark.parametrize('sign', [1, -1])
def test_the_foreground_is_what_borders_have_least_of(sign):
    tokens, mask = things()
    first = patch_components.components(tokens.reshape(-1, 16))[0][:, 0].reshape(mask.shape)
    np.testing.assert_array_equal(patch_components.foreground(sign * first), mask)


def test_equal_parts_have_equal_colours_in_all_pictures_and_the_ground_is_black():
    tokens, mask = things()
    drawn, shares = patch_components.colours(tokens, only_foreground=True)
    assert not drawn[~mask].any() and shares[0] > 0.9
    red = drawn[..., 0].astype(int)
    left, right = red[0, 2:6, 2:4], red[0, 2:6, 4:7]
    assert abs(left.mean() - red[1, 4:8, 1:3].mean()) < 20
    assert abs(left.mean() - right.mean()) > 150
    whole, _ = patch_components.colours(tokens)
    assert whole[~mask].any() and whole.dtype == np.uint8
    assert whole.max() == 255 and whole.min() == 0


def test_panels_are_of_the_pictures_size():
    pictures = [np.zeros((12, 10, 3), np.uint8)] * 3
    found = patch_components.PatchColours(pictures, *patch_components.colours(TOKENS))
    for (picture, patches), colours in zip(found.panels(), found.colours, strict=True):
        assert patches.shape == picture.shape
        np.testing.assert_array_equal(patches[::2, ::2], colours)
        np.testing.assert_array_equal(patches[1::2, 1::2], colours)
    assert found.words().startswith('red ') and 'blue' in found.words()
