"""Files of MAE, DeiT-III and DINOv2, as torch writes them, answer as timm's models do."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from peers import CLOSE, distance, images, ours, peer, randomise, theirs

from big_vit import interop, trees
from big_vit.errors import UserError
from big_vit.models import positions

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
    file = tmp_path / 'deit_3_small.pth'
    more = {'args': argparse.Namespace(out=Path('x')), 'best': np.float64(3)}
    torch.save({'model': arrays, **more} if name != 'dinov2' else arrays, file)
    drop = ['mask_token|decoder.*'] if name != 'deit3' else []
    weights = interop.read(file, drop=drop, settings={'num_heads': 3})
    assert weights.meta['format'] == name
    assert weights.meta['image_size'] == ((28, 28) if name == 'dinov2' else (32, 32))
    if half:
        table = trees.flatten(weights.params)['cls']
        wanted = arrays['cls_token'].float().numpy()
        np.testing.assert_array_equal(table.astype(np.float32), wanted)
        return
    batch = images(28 if name == 'dinov2' else 32)
    assert distance(theirs(model, batch), ours(weights, batch)) <= CLOSE


def predictor_of(model, torch):
    """Arrays of I-JEPA's predictor of 48 features, whose block is that of a model of timm."""
    renamed = {'blocks.': 'predictor_blocks.', 'norm.': 'predictor_norm.'}
    arrays = {
        f'module.{new}{key.removeprefix(old)}': array
        for key, array in model.state_dict().items()
        for old, new in renamed.items()
        if key.startswith(old)
    }
    table = positions.sincos((2, 2), 48, 'sincos2d_mae')
    shapes = {'predictor_embed': (48, 192), 'predictor_proj': (192, 48)}
    for name, shape in shapes.items():
        arrays[f'module.{name}.weight'] = torch.randn(shape)
        arrays[f'module.{name}.bias'] = torch.randn(shape[0])
    more = {'mask_token': torch.randn(1, 1, 48), 'predictor_pos_embed': torch.from_numpy(table)}
    return arrays | {f'module.{name}': array for name, array in more.items()}


@pytest.mark.parametrize('part', ['', ':encoder'])
def test_a_file_of_ijepa_answers_by_its_averaged_encoder(part, tmp_path):
    timm = peer('timm')
    import torch

    more = {**SIZES, 'class_token': False, 'global_pool': 'avg', 'fc_norm': False}
    averaged, online = (
        randomise(timm.create_model('vit_base_patch16_224', num_classes=0, **more), seed)
        for seed in (0, 1)
    )
    encoders = {'encoder': online, 'target_encoder': averaged}
    stored = {
        name: {f'module.{key}': array for key, array in model.state_dict().items()}
        for name, model in encoders.items()
    }
    small = {**more, 'embed_dim': 48, 'depth': 1}
    predictor = randomise(timm.create_model('vit_base_patch16_224', num_classes=0, **small), 2)
    stored['predictor'] = predictor_of(predictor, torch)
    file = tmp_path / 'IN1K-vit.h.14-300e.pth.tar'
    torch.save({**stored, 'opt': {'state': {}}, 'epoch': 300, 'lr': 1e-3}, file)
    weights = interop.read(f'{file}{part}')
    assert weights.meta['format'] == 'ijepa' and weights.settings['num_heads'] == 3
    assert weights.settings['pool'] == 'gap' and not weights.settings['class_token']
    assert weights.meta['part'].startswith('encoder' if part else 'target_encoder')
    task = {'name': 'joint_embedding', 'method': 'ijepa'}
    assert weights.learnt.task == {**task, 'predictor_width': 48, 'predictor_depth': 1}
    kernel = weights.learnt.params['predictor/embedding/kernel']
    stored_kernel = stored['predictor']['module.predictor_embed.weight']
    np.testing.assert_array_equal(kernel, stored_kernel.numpy().T)
    wanted = theirs(online if part else averaged, images(32))
    assert distance(wanted, ours(weights, images(32))) <= CLOSE


def test_nothing_in_a_file_is_run(tmp_path):
    peer('timm')
    import torch

    class Harmful:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / 'mark'),))

    torch.save({'model': Harmful()}, tmp_path / 'w.pth')
    with pytest.raises(UserError, match='no tensors of PyTorch by name'):
        interop.read(tmp_path / 'w.pth')
    model, arrays = release('deit3')
    torch.save({'model': arrays, 'args': Harmful()}, tmp_path / 'deit3.pth')
    weights = interop.read(tmp_path / 'deit3.pth', settings={'num_heads': 3})
    assert distance(theirs(model, images(32)), ours(weights, images(32))) <= CLOSE
    assert not (tmp_path / 'mark').exists()


FILES = ['zip', 'legacy', 'protocol 5', 'parameters', 'module', 'script', 'compiled']


@pytest.mark.parametrize('kind', FILES)
def test_files_of_torch_in_every_form_have_what_torch_reads(kind, tmp_path):
    timm = peer('timm')
    import torch

    name, file = 'vit_small_patch16_224', tmp_path / 'model_best.pth.tar'
    model = randomise(timm.create_model(name, num_classes=5, **{**SIZES, 'embed_dim': 48}))
    saved = {'epoch': 3, 'arch': name, 'state_dict': model.state_dict()}
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 3, 32, 32)).sum().backward()
    optimizer.step()
    saved['optimizer'] = optimizer.state_dict()
    if kind == 'parameters':
        saved['state_dict'] = dict(model.named_parameters())
    elif kind == 'compiled':
        saved['state_dict'] = {f'module._orig_mod.{n}': x for n, x in model.state_dict().items()}
    more = {'_use_new_zipfile_serialization': False} if kind == 'legacy' else {}
    if kind == 'module':
        torch.save(model, file)
    elif kind == 'script':
        torch.jit.trace(model, torch.zeros(1, 3, 32, 32)).save(str(file))
    else:
        torch.save(saved, file, pickle_protocol=5 if kind == 'protocol 5' else 2, **more)
    weights = interop.read(file, settings={'num_heads': 3}, architecture=name)
    assert distance(theirs(model.eval(), images(32)), ours(weights, images(32))) <= CLOSE


@pytest.mark.parametrize('kind', ['sparse', 'qtensor'])
def test_the_advice_for_what_is_not_dense_makes_safetensors(kind, tmp_path):
    timm = peer('timm')
    import torch

    model = randomise(timm.create_model('vit_small_patch16_224', num_classes=5, **SIZES))
    token = model.cls_token.detach()
    with torch.no_grad():
        token.copy_((token * 1000).round() / 1000)
    changed = torch.quantize_per_tensor(token, 0.001, 0, torch.qint32)
    changed = token.to_sparse() if kind == 'sparse' else changed
    arrays = {**model.state_dict(), 'cls_token': changed}
    file = tmp_path / "it's.pth"
    torch.save({'state_dict': arrays, 'args': argparse.Namespace()}, file)
    told = {'settings': {'num_heads': 3}, 'architecture': 'vit_small_patch16_224'}
    with pytest.raises(UserError, match=f'cls_token is made by .*_rebuild_{kind}') as error:
        interop.read(file, **told)
    command = str(error.value).partition('convert it once: ')[2]
    env = {**os.environ, 'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}'}
    subprocess.run(command, shell=True, check=True, cwd=tmp_path, env=env)
    weights = interop.read(tmp_path / 'model.safetensors', **told)
    assert distance(theirs(model, images(32)), ours(weights, images(32))) <= CLOSE
