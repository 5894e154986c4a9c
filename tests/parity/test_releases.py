"""The `.pth` files of MAE, DeiT-III and DINOv2: read by torch, answering as timm's models do."""

import numpy as np
import pytest
from peers import CLOSE, distance, images, ours, peer, randomise, theirs

from big_vit import interop, trees
from big_vit.errors import UserError

SIZES = dict(img_size=32, embed_dim=192, depth=2, num_heads=3)


def release(name):
    """(timm's model, the arrays of such a file)"""
    timm = peer('timm')
    import torch

    if name == 'deit3':
        model = randomise(timm.create_model('deit3_small_patch16_224', num_classes=5, **SIZES))
        renamed = {'ls1.gamma': 'gamma_1', 'ls2.gamma': 'gamma_2'}
    elif name == 'mae':
        model = randomise(timm.create_model('vit_base_patch16_224', num_classes=0, **SIZES))
        renamed = {}
    else:
        model = randomise(
            timm.create_model(
                'vit_giant_patch14_reg4_dinov2', num_classes=0, **{**SIZES, 'img_size': 28}
            )
        )
        renamed = {'reg_token': 'register_tokens', 'mlp.fc1': 'mlp.w12', 'mlp.fc2': 'mlp.w3'}
    arrays = dict(model.state_dict())
    for old, new in renamed.items():
        arrays = {key.replace(old, new): array for key, array in arrays.items()}
    if name == 'dinov2':  # There the class token has a row in the table, here it is in the token.
        row = torch.randn(1, 1, 192)
        arrays['cls_token'] = arrays['cls_token'] - row
        arrays['pos_embed'] = torch.cat([row, arrays['pos_embed']], dim=1)
    if name != 'deit3':
        arrays['mask_token'] = torch.zeros(1, 192)
    if name == 'mae':
        arrays['decoder_embed.weight'] = torch.zeros(8, 192)
    return model, arrays


@pytest.mark.parametrize('name', ['deit3', 'mae', 'dinov2'])
@pytest.mark.parametrize('half', [False, True], ids=['float32', 'bfloat16'])
def test_a_release_answers_as_timm_does(name, half, tmp_path):
    model, arrays = release(name)
    import torch

    if half:
        arrays = {key: array.to(torch.bfloat16) for key, array in arrays.items()}
    file = tmp_path / 'weights.pth'
    torch.save({'model': arrays} if name != 'dinov2' else arrays, file)
    weights = interop.read(file, drop=['mask_token|decoder.*'] if name != 'deit3' else [])
    assert weights.meta['format'] == name
    assert weights.meta['image_size'] == ((28, 28) if name == 'dinov2' else (32, 32))
    if half:
        table = trees.flatten(weights.params)['cls']
        wanted = arrays['cls_token'].float().numpy()
        np.testing.assert_array_equal(table.astype(np.float32), wanted)
        return
    batch = images(28 if name == 'dinov2' else 32)
    assert distance(theirs(model, batch), ours(weights, batch)) <= CLOSE


def test_a_file_that_would_run_code_is_refused(tmp_path):
    peer('timm')
    import torch

    class Harmful:
        def __reduce__(self):
            return (print, ('this must not be printed',))

    torch.save({'model': Harmful()}, tmp_path / 'w.pth')
    with pytest.raises(UserError, match=r'weights_only=True.*safetensors'):
        interop.read(tmp_path / 'w.pth')
