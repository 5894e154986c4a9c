"""All of timm's ViTs and their relatives: each answers as timm's does, or is refused by its name.

Each has one block and little width; the heads, epsilon, activation and pooling are those of its
name.
"""

import importlib.util
import re

import numpy as np
import pytest
from peers import CLOSE, distance, images, ours, peer, randomise, theirs

from big_vit import interop
from big_vit.errors import UserError
from big_vit.interop import timm_vit

MODULES = (
    *('vision_transformer', 'vision_transformer_hybrid', 'vision_transformer_relpos', 'deit'),
    *('vision_transformer_sam', 'eva', 'beit', 'naflexvit', 'cait', 'xcit', 'volo', 'convit'),
)
# What big_vit has no blocks for, or names that it does not tell from such.
OTHER = re.compile(
    r'aimv2.*|.*(_radio_|_rpn_|_xp_|18x2|pwee|dwee|dlittle|_mci_|_resnet\d\d).*|samvit.*|.*relpos.*'
    r'|eva02.*|eva_giant.*|.*_rope_.*|vit_pe_.*|beit.*|naflexvit.*|cait.*|xcit.*|volo.*|convit.*'
    r'|.*lingbot.*|.*sapiens2.*|vit_intern.*'
)
# Their pooling leaves out the tokens before those of patches.
OTHER_POOL = ('test_vit3', 'vit_so150m_patch16_reg4_map_256')


def names():
    if not all(map(importlib.util.find_spec, ('torch', 'timm'))):
        return []
    timm = peer('timm')
    return [
        name
        for name in timm.list_models()
        if timm.model_entrypoint(name).__module__.rpartition('.')[2] in MODULES
    ]


def small(timm, name):
    """(a model with one narrow block, its arguments, the heads and width that its name has)"""
    import torch

    with torch.device('meta'):
        usual = timm.create_model(name, **({} if 'sapiens2' in name else {'depth': 1}))
    heads = getattr(getattr(usual.blocks[0], 'attn', None), 'num_heads', None)
    patch = (
        getattr(usual.patch_embed, 'patch_size', (16, 16)) if hasattr(usual, 'patch_embed') else 16
    )
    side = 2 * (patch[0] if isinstance(patch, tuple) else patch)
    side = 64 if re.search('_r_|_r26_|_r50_', name) else side
    args = {'depth': 1, 'img_size': side, 'num_classes': 5, 'embed_dim': 16 * (heads or 4)}
    return timm.create_model(name, **args), args, heads, usual.embed_dim


@pytest.mark.parametrize('name', names())
def test_an_architecture_answers_as_timms_or_is_refused_by_name(name, tmp_path):
    timm = peer('timm')
    import torch
    from timm.models._hub import save_for_hf

    try:
        model, args, heads, width = small(timm, name)
    except (TypeError, AssertionError, RuntimeError, AttributeError, ValueError, IndexError):
        assert OTHER.fullmatch(name)
        with pytest.raises(UserError, match=f'{name} is not a ViT that big_vit has'):
            timm_vit.settings_of('timm', {}, {'architecture': name}, {}, 'x')
        return
    randomise(model)
    save_for_hf(model, str(tmp_path), model_args=args, safe_serialization=True)
    torch.save({'model': model.state_dict()}, tmp_path / 'w.pth')
    with pytest.raises(UserError, match=r'arrays do not show|none of the known formats'):
        interop.read(tmp_path / 'w.pth')
    if OTHER.fullmatch(name):
        with pytest.raises(UserError, match=f'{name} is not a ViT that big_vit has'):
            interop.read(tmp_path)
        return
    if name in OTHER_POOL:
        with pytest.raises(UserError, match='its pooling leaves out'):
            interop.read(tmp_path)
        return
    weights = interop.read(tmp_path)
    batch = images(args['img_size'])
    wanted = theirs(model, batch)
    away = distance(wanted, ours(weights, batch))
    print(f'{name}: {away:.2g} of {np.abs(wanted).max():.2g}')
    assert away <= CLOSE * max(1.0, np.abs(wanted).max() / 10)
    assert timm_vit.heads_of('timm', name, width, False, 'x') == heads
    with pytest.raises(UserError, match='--set num_heads'):
        timm_vit.heads_of('timm', name, width + 16 * heads, False, 'x')
    told = {'num_heads': heads, 'image_size': weights.meta['image_size']}
    bare = interop.read(tmp_path / 'w.pth', settings=told, architecture=name)
    assert bare.settings == weights.settings


@pytest.mark.slow
def test_the_table_of_architectures_is_that_of_timm():
    timm, found = peer('timm'), {}
    import torch

    for name in names():
        if OTHER.fullmatch(name):
            continue
        with torch.device('meta'):
            model = timm.create_model(name)
        patch = model.patch_embed.proj.weight.shape[-1]
        has_stem = hasattr(model.patch_embed, 'backbone')
        found[name] = (model.embed_dim, len(model.blocks), None if has_stem else patch)
    assert found and timm_vit.architectures() == found
