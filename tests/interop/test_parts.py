"""The encoder in what trainers wrap it in, numbers that are none, and what names do not tell."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from torch_writer import save

from big_vit import export, interop, trees
from big_vit.errors import UserError
from big_vit.interop import Weights, fit, layout, parts, timm_vit
from big_vit.pretrained import load

pytest.importorskip('safetensors')

NAME = 'vit_small_patch16_224'
SETTINGS = dict(
    num_classes=5, patch_size=(16, 16), width=48, depth=2, mlp_dim=96, num_heads=3,
    posemb='learned', posemb_prefix=1, pool='cls', activation='gelu',
)  # fmt: skip
HEADS = {'num_heads': 3}


def model(seed=0):
    """A ViT of ours, and its arrays as timm names them."""
    settings = fit.complete(SETTINGS)
    rng = np.random.default_rng(seed)
    shapes = layout.shapes_of(settings, {'image_size': (32, 32), 'channels': 3})
    flat = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    rules = timm_vit.rules_of('timm', settings, shapes, {'distilled': False})
    return flat, layout.to_theirs(rules, flat)


def behind(prefix, arrays):
    return {prefix + name: array for name, array in arrays.items()}


def read(spec, **more):
    return interop.read(spec, settings=HEADS, architecture=NAME, **more)


def same(weights, wanted):
    found = trees.flatten(weights.params)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize(
    'prefix',
    ['', 'module.', '_orig_mod.', 'model.', 'net.', 'backbone.', 'encoder.', 'visual.',
     'module._orig_mod.backbone.', 'teacher.model.'],
)  # fmt: skip
@pytest.mark.parametrize('key', [None, 'state_dict', 'model'])
def test_a_prefix_that_all_names_have_is_taken_off_and_told(prefix, key, tmp_path):
    ours, arrays = model()
    tree = behind(prefix, arrays)
    path = save({key: tree, 'epoch': 3} if key else tree, tmp_path / 'w.pth.tar')
    weights = read(path)
    same(weights, ours)
    place = f'{key or ""}.{prefix}'.strip('.')
    assert weights.meta['part'] == (place or None)
    assert not place or f'part {place}' in interop.describe(weights)


@pytest.mark.parametrize(
    ('plain', 'average'),
    [('state_dict', 'state_dict_ema'), ('model', 'model_ema'), ('model', 'ema'),
     ('student', 'teacher'), ('encoder', 'target_encoder'), ('net', 'ema_state_dict')],
)  # fmt: skip
def test_an_average_is_read_and_told_and_the_other_can_be_chosen(plain, average, tmp_path):
    (one, arrays), (other, averaged) = model(0), model(1)
    tree = {plain: behind('module.', arrays), average: averaged}
    path = save(tree, tmp_path / 'w.pth')
    weights = read(path)
    same(weights, other)
    assert weights.meta['part'] == f'{average}, not {plain}.module'
    same(read(f'{path}:{average}'), other)
    chosen = read(f'{path}:{plain}')
    same(chosen, one)
    assert chosen.meta['part'] == f'{plain}.module'
    with pytest.raises(UserError, match=f"no 'other' with an encoder in it; there are .*{plain}"):
        read(f'{path}:other')


def test_what_is_no_average_is_not_taken_for_one(tmp_path):
    (_, arrays), (other, averaged) = model(0), model(1)
    same(read(save({'no_ema': arrays, 'ema': averaged}, tmp_path / 'w.pth')), other)
    for name in ('model_no_ema', 'without_ema', 'model_non_ema_weights'):
        path = save({'model': averaged, name: arrays}, tmp_path / 'w.pth')
        with pytest.raises(UserError, match='several encoders'):
            read(path)


def test_a_projection_head_is_not_left_out_unsaid(tmp_path):
    ours, arrays = model()
    tree = {**behind('backbone.', arrays), 'head.mlp.0.weight': np.ones((2, 2), np.float32)}
    path = save({'teacher': tree, 'student': behind('module.', tree)}, tmp_path / 'dino.pth')
    with pytest.raises(UserError, match=r'beside .*head\.mlp\.0\.weight.*pth:teacher\.backbone'):
        read(path)
    same(read(f'{path}:teacher.backbone'), ours)
    same(read(f'{path}:student.module.backbone'), ours)
    with pytest.raises(UserError, match='not a regular expression'):
        read(path, drop=['('])
    weights = read(path, drop=[r'head\.mlp\..*'])
    same(weights, ours)
    assert weights.meta['dropped'] == ('head.mlp.0.weight',)


def test_of_two_encoders_none_is_guessed(tmp_path):
    (one, base), (other, momentum) = model(0), model(1)
    tree = {**behind('module.base_encoder.', base), **behind('module.momentum_encoder.', momentum)}
    path = save({'state_dict': tree}, tmp_path / 'moco.pth.tar')
    with pytest.raises(UserError, match=r'say which.*state_dict\.module\.base_encoder or .*moment'):
        read(path)
    same(read(f'{path}:base_encoder'), one)
    same(read(f'{path}:momentum_encoder'), other)
    assert interop.load_init(str(tmp_path / 'none.pth:base_encoder')) is None
    with pytest.raises(UserError, match='--architecture NAME'):
        interop.load_init(f'{path}:base_encoder')


def test_safetensors_have_parts_too(tmp_path):
    from safetensors.numpy import save_file

    ours, arrays = model()
    path = tmp_path / 'w.safetensors'
    save_file({**behind('net.', arrays), 'loss.weight': np.ones(2, np.float32)}, path)
    with pytest.raises(UserError, match=r'beside .*loss\.weight'):
        read(path)
    same(read(f'{path}:net'), ours)


def test_an_index_of_files_of_pytorch(tmp_path):
    from safetensors.numpy import load_file

    ours, _ = model()
    mine = Weights(trees.unflatten(ours), fit.complete(SETTINGS), {
        **dict.fromkeys(interop.META), 'image_size': (32, 32), 'channels': 3})  # fmt: skip
    interop.write(tmp_path, 'hf_vit', mine._replace(settings={**mine.settings, 'norm_eps': 1e-12}))
    arrays = load_file(tmp_path / 'model.safetensors')
    (tmp_path / 'model.safetensors').unlink()
    halves = {'a.bin': sorted(arrays)[::2], 'b.bin': sorted(arrays)[1::2]}
    for file, names in halves.items():
        save({name: arrays[name] for name in names}, tmp_path / file)
    table = {name: file for file, names in halves.items() for name in names}
    (tmp_path / 'pytorch_model.bin.index.json').write_text(json.dumps({'weight_map': table}))
    same(interop.read(tmp_path), ours)


def test_an_index_says_which_file_an_array_is_of(tmp_path):
    from safetensors.numpy import save_file

    ours, arrays = model()
    first, rest = dict([*arrays.items()][:3]), dict([*arrays.items()][3:])
    save_file(first, tmp_path / 'a.safetensors')
    save_file({**rest, **{n: x + 1 for n, x in first.items()}}, tmp_path / 'b.safetensors')
    places = {**dict.fromkeys(first, 'a.safetensors'), **dict.fromkeys(rest, 'b.safetensors')}
    index = tmp_path / 'model.safetensors.index.json'
    index.write_text(json.dumps({'weight_map': places}))
    same(read(index), ours)


def test_what_is_missing_is_said_of_its_file(tmp_path):
    arrays = {n: x for n, x in model()[1].items() if n != 'blocks.0.mlp.fc1.weight'}
    with pytest.raises(UserError, match=r'w\.pth: there is no blocks\.0\.mlp\.fc1\.weight'):
        read(save(arrays, tmp_path / 'w.pth'))


def test_a_model_type_that_is_no_text(tmp_path):
    from safetensors.numpy import save_file

    save_file(model()[1], tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text('{"model_type": ["vit"]}')
    with pytest.raises(UserError, match='is not one of vit'):
        interop.read(tmp_path)


def test_places_of_encoders():
    listed = {
        '': ['visual.trunk.patch_embed.proj.weight', 'logit_scale'],
        'a.': ['visual.class_embedding', 'visual.conv1.weight'],
        'b.': ['vision_model.embeddings.class_embedding', 'module.vit.embeddings.patch_embeddings'
               '.projection.weight'],
        'c.': ['x.patch_embed.proj.bias'],
    }  # fmt: skip
    found = [(part.place, part.formats[0]) for part in parts.of(listed)]
    assert found == [('', 'open_clip'), ('a', 'open_clip'), ('b.module', 'hf_vit')]


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_numbers_that_are_none_are_refused_by_name(bad, dtype, tmp_path):
    from safetensors.numpy import save_file

    _, arrays = model()
    arrays['blocks.1.norm2.bias'] = arrays['blocks.1.norm2.bias'].astype(dtype)
    arrays['blocks.1.norm2.bias'][3] = bad
    save_file(arrays, tmp_path / 'w.safetensors')
    for path in (save(arrays, tmp_path / 'w.pth'), tmp_path / 'w.safetensors'):
        with pytest.raises(UserError, match=r'blocks\.1\.norm2\.bias: 1 of its 48 numbers are NaN'):
            read(path)
    # What is dropped may hold anything.
    arrays = {**model()[1], 'extra': np.full(2, bad, dtype)}
    assert read(save(arrays, tmp_path / 'w.pth'), drop=['extra']).meta['dropped'] == ('extra',)


@pytest.mark.parametrize('format', ['augreg', 'big_vision', 'hf_vit', 'timm', 'open_clip'])
def test_numbers_that_are_none_are_refused_in_every_format(format, tmp_path):
    settings = {**SETTINGS, 'activation': 'gelu_tanh', 'num_classes': 0}
    settings['norm_eps'] = {'hf_vit': 1e-12, 'open_clip': 1e-5}.get(format, 1e-6)
    settings = fit.complete(settings)
    meta = {**dict.fromkeys(interop.META), 'image_size': (32, 32), 'channels': 3}
    flat = {n: np.zeros(s, np.float32) for n, s in layout.shapes_of(settings, meta).items()}
    flat['Transformer/encoder_norm/scale'][5] = np.nan
    mine = Weights(trees.unflatten(flat), settings, meta)
    path = interop.write(tmp_path / 'x.npz', format, mine)
    with pytest.raises(UserError, match='1 of its 48 numbers are NaN or infinite'):
        interop.read(path)


def test_a_run_that_diverged_is_no_start(tmp_path):
    ours, _ = model()
    meta = {**dict.fromkeys(interop.META), 'image_size': (32, 32), 'channels': 3}
    weights = Weights(trees.unflatten(ours), fit.complete(SETTINGS), meta)
    fine, _ = export.to_checkpoint(weights, str(tmp_path / 'fine'))
    assert load.read_pretrained(str(fine)).part is None
    ours['head/bias'][2] = np.inf
    workdir, _ = export.to_checkpoint(weights, str(tmp_path / 'run'))
    with pytest.raises(UserError, match=r'checkpoints/0 has NaN or infinite numbers in head/bias'):
        load.read_pretrained(str(workdir))


def test_numbers_beyond_float32_and_integers_are_no_weights(tmp_path):
    _, arrays = model()
    large = {**arrays, 'norm.bias': np.full(48, 1e300)}
    with pytest.raises(UserError, match=r'norm\.bias: 48 of its 48 numbers are beyond float32'):
        read(save(large, tmp_path / 'w.pth'))
    quantised = {**arrays, 'norm.bias': np.ones(48, np.int8)}
    with pytest.raises(UserError, match=r'norm\.bias is of type int8: .*quantised'):
        read(save(quantised, tmp_path / 'w.pth'))


def test_float8_is_refused_in_one_line(tmp_path):
    header = {'patch_embed.proj.weight': {'dtype': 'F8_E4M3', 'shape': [4], 'data_offsets': [0, 4]}}
    text = json.dumps(header).encode()
    (tmp_path / 'w.safetensors').write_bytes(struct.pack('<Q', len(text)) + text + bytes(4))
    with pytest.raises(UserError, match=r'patch_embed\.proj\.weight is of type F8_E4M3'):
        read(tmp_path / 'w.safetensors')


def test_headers_of_safetensors_that_lie(tmp_path):
    def refused(size, header, content=b''):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        length = len(text) if size is None else size
        (tmp_path / 'w.safetensors').write_bytes(struct.pack('<Q', length) + text + content)
        with pytest.raises(UserError, match='cannot be read as safetensors') as error:
            read(tmp_path / 'w.safetensors')
        assert '\n' not in str(error.value)

    entry = {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}
    refused(2**62, {})
    refused(10**9, {'x': entry})
    refused(None, {'x': entry})
    refused(None, {'x': {**entry, 'shape': [2**40, 2**40]}}, bytes(8))
    refused(None, {'x': {**entry, 'data_offsets': [8, 0]}}, bytes(8))
    refused(None, {'x': {**entry, 'dtype': 'F99'}}, bytes(8))
    refused(None, b'[' * 100_000)


def test_control_codes_of_names_are_escaped(tmp_path, capsys):
    _, arrays = model()
    arrays = {**arrays, '\x1b[31mred\x1b[0m\n\u202e': np.ones(2, np.float32)}
    with pytest.raises(UserError) as error:
        read(save(arrays, tmp_path / 'w.pth'))
    assert r'\x1b[31mred\x1b[0m\n\u202e' in str(error.value)
    assert str(error.value).isprintable()


def test_arrays_of_deit3_with_rope_beside_them_are_not_taken_for_it(tmp_path):
    ours, arrays = model()
    arrays |= {f'blocks.{i}.gamma_{k}': np.ones(48, np.float32) for i in (0, 1) for k in (1, 2)}
    with pytest.raises(UserError, match=r'--architecture NAME .*--format deit3'):
        interop.read(save(arrays, tmp_path / 'w.pth'), settings=HEADS)
    found = interop.read(tmp_path / 'w.pth', format='deit3', settings=HEADS)
    assert found.meta['format'] == 'deit3'
    np.testing.assert_array_equal(found.params['cls'], ours['cls'])
    del arrays['pos_embed']
    path = save(arrays, tmp_path / 'w.pth')
    with pytest.raises(UserError, match='deit3 has positions'):
        interop.read(path, format='deit3', settings=HEADS)
    with pytest.raises(UserError, match='rope_224 is not a ViT that big_vit has; did you mean vit'):
        interop.read(path, architecture='vit_small_patch16_rope_224', settings=HEADS)


def test_heads_are_never_guessed(tmp_path):
    _, arrays = model()
    path = save(arrays, tmp_path / 'w.pth')
    differs = r'patch_embed\.proj\.weight is 48x3x16x16, and .*_224 has 384x3x16x16; .* --set num_'
    with pytest.raises(UserError, match=differs):
        interop.read(path, architecture=NAME)
    with pytest.raises(UserError, match=r'heads of vit_small_patch16_224 of width 48: --set num_'):
        timm_vit.heads_of('timm', NAME, 48, False, 'w.pth')
    assert timm_vit.heads_of('timm', 'vit_giant_patch14_dinov2', 1536, False, '') == 24
    assert timm_vit.heads_of('timm', 'vit_giantopt_patch16_siglip_256', 1536, False, '') == 16
    assert timm_vit.heads_of('timm', 'test_vit4', 96, False, '') == 3
    assert timm_vit.heads_of('timm', 'vit_huge_plus_patch16_dinov3', 1280, False, '') == 20
    assert timm_vit.heads_of('dinov2', '', 1536, False, '') == 24


def test_what_a_config_says_and_nothing_here_reads_is_refused(tmp_path):
    from safetensors.numpy import save_file

    _, arrays = model()
    save_file(arrays, tmp_path / 'model.safetensors')
    args = {'embed_dim': 48, 'num_heads': 3, 'img_size': 32, 'rope_type': 'mixed'}
    config = {'architecture': NAME, 'model_args': args}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(UserError, match='rope_type in model_args'):
        interop.read(tmp_path)


def test_which_is_of_checkpoints(tmp_path):
    with pytest.raises(
        UserError, match=r'--which is of --checkpoint; of a file: --from w\.pth:KEY'
    ):
        export.main(['--from', 'w.pth', '--out', str(tmp_path), '--which', 'ema'])
