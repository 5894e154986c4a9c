"""Positions and patches of another size, against the functions that the peers do it with."""

import numpy as np
import pytest

from big_vit.models import positions
from tests.parity.peers import peer

SIZES = [((7, 7), (12, 12)), ((14, 14), (9, 9)), ((6, 9), (11, 4)), ((5, 5), (5, 8))]
SEVERAL = pytest.mark.parametrize('old, new', SIZES)


def table(grid, width=24):
    return np.random.default_rng(0).normal(size=(1, grid[0] * grid[1], width)).astype(np.float32)


@SEVERAL
@pytest.mark.parametrize(
    'method, interpolation, antialias',
    [('bicubic_antialias', 'bicubic', True), ('bilinear', 'bilinear', False)],
)
def test_positions_as_timm(old, new, method, interpolation, antialias):
    peer('timm')
    import torch
    from timm.layers import resample_abs_pos_embed

    learned = table(old)
    expected = resample_abs_pos_embed(
        torch.tensor(learned), new, old, 0, interpolation=interpolation, antialias=antialias
    )
    got = positions.resize_positions(learned, old, new, method)
    np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=5e-6)


@SEVERAL
def test_positions_as_torch_with_aligned_corners(old, new):
    """big_vision's law, scipy.ndimage.zoom of order 1, is this one of torch."""
    peer('timm')
    import torch

    learned = table(old)
    grid = torch.tensor(learned).reshape(1, *old, -1).permute(0, 3, 1, 2)
    bigger = torch.nn.functional.interpolate(grid, new, mode='bilinear', align_corners=True)
    expected = bigger.permute(0, 2, 3, 1).reshape(1, new[0] * new[1], -1)
    got = positions.resize_positions(learned, old, new, 'aligned')
    np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=5e-6)


@pytest.mark.parametrize('family', ['ViT', 'Dinov2'])
@pytest.mark.parametrize('old, new', [(s, t) for s, t in SIZES if s[0] == s[1]])
def test_positions_as_hugging_face(family, old, new):
    peer('transformers')
    import torch
    import transformers

    config = getattr(transformers, f'{family}Config')(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8 * old[0],
        patch_size=8,
    )  # fmt: skip
    embeddings = getattr(transformers, f'{family}Model')(config).embeddings
    learned = table(old)
    with torch.no_grad():
        embeddings.position_embeddings[:, 1:] = torch.tensor(learned)
        tokens = torch.zeros(1, 1 + new[0] * new[1], 24)
        expected = embeddings.interpolate_pos_encoding(tokens, 8 * new[0], 8 * new[1])[:, 1:]
    got = positions.resize_positions(learned, old, new, 'bicubic')
    np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    'old, new', [((16, 16), (24, 24)), ((16, 16), (8, 8)), ((14, 14), (16, 16)), ((8, 8), (12, 6))]
)
def test_patches_as_timm(old, new):
    """With the resize of FlexiViT's own code; timm's default is another, bicubic_antialias."""
    peer('timm')
    import torch
    from timm.layers.patch_embed import resample_patch_embed

    kernel = np.random.default_rng(0).normal(size=(*old, 3, 10)).astype(np.float32)
    theirs = torch.tensor(kernel.transpose(3, 2, 0, 1))
    expected = resample_patch_embed(theirs, list(new), 'bilinear', antialias=False).numpy()
    got = positions.resize_patches(kernel, new).transpose(3, 2, 0, 1)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-4 * np.abs(expected).max())
