"""Weights of other codebases: every map there and back bit for bit, and what is refused.

That names and meanings are those of the peers themselves is tested in tests/parity/.
"""

import json
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from big_vit import interop, trees
from big_vit.errors import UserError
from big_vit.interop import Weights, files, fit, google, layout, timm_vit

pytest.importorskip('safetensors')

SMALL = dict(
    num_classes=5, patch_size=(16, 16), width=48, depth=2, mlp_dim=96, num_heads=3, head_dim=None
)
META = {
    'image_size': (32, 48),
    'channels': 3,
    'mean': (0.1, 0.2, 0.3),
    'std': (0.4, 0.5, 0.6),
    'crop_pct': 0.9,
    'interpolation': 'bicubic',
    'licence': 'apache-2.0',
    'source': 'https://example.org/weights',
}
LEARNED = dict(posemb='learned', posemb_prefix=1, pool='cls')
GELU = dict(activation='gelu')
NO_HEAD = dict(num_classes=0)
# format, settings that it can hold as they are
SLOW = pytest.mark.slow
MODELS = {
    'augreg': ('augreg', {**LEARNED, 'representation': 24}),
    'augreg gap': ('augreg', dict(posemb='learned')),
    'augreg hybrid': (
        'augreg',
        {**LEARNED, 'tokenizer': 'resnet', 'resnet': (1, 2), 'patch_size': (8, 8)},
    ),
    'big_vision': ('big_vision', dict(posemb='learned', pool='map')),
    'big_vision sincos': ('big_vision', {}),
    'big_vision tok': ('big_vision', dict(posemb='learned', pool='cls')),
    'timm': ('timm', {**LEARNED, **GELU}),
    'timm map': ('timm', dict(posemb='learned', pool='map', **GELU)),
    'timm fc_norm': (
        'timm',
        dict(posemb='learned', pool='gap', norm_after_pool=True, class_token=True, **GELU),
    ),
    'timm dinov2': (
        'timm',
        dict(posemb='learned', pool='cls', registers=4, layer_scale=1e-5, mlp='swiglu', **GELU),
    ),
    'timm distilled': (
        'timm',
        dict(posemb='learned', posemb_prefix=2, registers=1, pool='cls_dist', **GELU),
    ),
    'timm clip': (
        'timm',
        {
            **LEARNED,
            'pre_norm': True,
            'embedding_bias': False,
            'norm_eps': 1e-5,
            'activation': 'quick_gelu',
        },
    ),
    'timm qk norm': ('timm', {**LEARNED, 'qk_norm': True, 'qkv_bias': False, **GELU}),
    'timm hybrid': (
        'timm',
        {**LEARNED, **GELU, 'tokenizer': 'resnet', 'resnet': (), 'patch_size': (16, 16)},
    ),
    'hf_vit': ('hf_vit', {**LEARNED, **GELU, 'norm_eps': 1e-12}),
    'hf_vit pooler': ('hf_vit', {**LEARNED, **GELU, **NO_HEAD, 'representation': 48}),
    'hf_deit': (
        'hf_deit',
        dict(posemb='learned', posemb_prefix=2, registers=1, pool='cls_dist', **GELU),
    ),
    'hf_mae': ('hf_mae', {**LEARNED, **GELU, **NO_HEAD}),
    'hf_ijepa': ('hf_ijepa', dict(posemb='learned', pool='gap', **GELU)),
    'hf_dinov2': ('hf_dinov2', {**LEARNED, **GELU, 'pool': 'cls_gap', 'layer_scale': 1.0}),
    'hf_dinov2 swiglu': (
        'hf_dinov2',
        {**LEARNED, **GELU, **NO_HEAD, 'layer_scale': 1.0, 'mlp': 'swiglu', 'mlp_dim': 128},
    ),
    'hf_dinov2_reg': (
        'hf_dinov2_reg',
        {**LEARNED, **GELU, **NO_HEAD, 'layer_scale': 1.0, 'registers': 4},
    ),
    'hf_siglip': ('hf_siglip', dict(posemb='learned', pool='map', **NO_HEAD)),
    'hf_siglip classifier': ('hf_siglip', dict(posemb='learned', pool='gap')),
    'hf_dinov3': (
        'hf_dinov3',
        dict(
            posemb='rope', pool='cls', registers=4, layer_scale=1.0, key_bias=False, **NO_HEAD,
            norm_eps=1e-5, **GELU,
        ),
    ),
    'hf_dinov3 gated': (
        'hf_dinov3',
        dict(
            posemb='rope', pool='cls', registers=1, layer_scale=1.0, mlp='swiglu', **NO_HEAD,
            norm_eps=1e-5, activation='silu',
        ),
    ),
    'open_clip': (
        'open_clip',
        {
            **LEARNED,
            'pre_norm': True,
            'embedding_bias': False,
            'norm_eps': 1e-5,
            'activation': 'quick_gelu',
            'head_bias': False,
            'layer_scale': 0.1,
        },
    ),
}  # fmt: skip


# open_clip has no word for a crop.
MODEL_META = {'open_clip': {'crop_pct': 1.0}}


def weights_of(settings, seed=0, dtype=np.float32, **meta):
    """A model of random parameters, all of them."""
    settings = fit.complete({**SMALL, **settings})
    meta = {**META, **meta}
    rng = np.random.default_rng(seed)
    flat = {
        name: rng.normal(size=shape).astype(dtype)
        for name, shape in layout.shapes_of(settings, meta).items()
    }
    return Weights(trees.unflatten(flat), settings, meta)


def same(a, b):
    a, b = trees.flatten(a.params), trees.flatten(b.params)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name])


def stored(path):
    """The arrays of a file that has one model."""
    sections, _ = files.read(path)
    return {name: get() for name, get in sections[''].items()}


def place(folder, to):
    return folder / ('x.npz' if to in google.FORMATS else 'x')


@pytest.mark.parametrize(
    'dtype',
    [pytest.param(np.float32, marks=pytest.mark.slow), ml_dtypes.bfloat16],
    ids=['f32', 'bf16'],
)
@pytest.mark.parametrize('name', MODELS)
def test_what_is_written_is_read_again_bit_for_bit(name, dtype, tmp_path):
    to, settings = MODELS[name]
    mine = weights_of(settings, dtype=dtype, **MODEL_META.get(to, {}))
    path = interop.write(place(tmp_path, to), to, mine)
    again = interop.read(path)
    same(mine, again)
    assert again.settings == mine.settings
    told = {**META, 'interpolation': 'bicubic', **MODEL_META.get(to, {})}
    assert {key: again.meta[key] for key in told} == told
    assert again.meta['format'] == to
    # And what was read is written as the same arrays, with the same names.
    second = interop.write(place(tmp_path / 'second', to), to, again)
    file = 'open_clip_model.safetensors' if to == 'open_clip' else 'model.safetensors'
    one, two = (stored(p if p.suffix == '.npz' else p / file) for p in (path, second))
    assert one.keys() == two.keys()
    for key in one:
        np.testing.assert_array_equal(one[key].view(np.uint8), two[key].view(np.uint8))


def plain(path):
    """Takes away what we wrote of ourselves, as if a peer had written the file."""
    from safetensors.numpy import load_file, save_file

    if path.suffix == '.npz':
        with zipfile.ZipFile(path, 'a') as archive:
            archive.comment = b''
        return path
    file = next(path.glob('*.safetensors'))
    save_file(load_file(file), file, {'format': 'pt'})
    return path


@pytest.mark.parametrize('name', MODELS)
def test_a_peers_config_and_shapes_tell_the_same_as_our_metadata(name, tmp_path):
    to, settings = MODELS[name]
    # An archive has no config, and only of square images do positions tell the size.
    size = {'image_size': (32, 32)} if to in google.FORMATS else {}
    if settings.get('posemb', 'sincos2d') == 'sincos2d':
        size = {'image_size': (224, 224)}
    mine = weights_of(settings, **size, **MODEL_META.get(to, {}))
    path = plain(interop.write(place(tmp_path, to), to, mine))
    drop = ['.*mask_token'] if to in ('hf_dinov2_reg', 'hf_dinov3') else []
    again = interop.read(path, drop=drop)
    same(mine, again)
    scale = {'layer_scale': again.settings['layer_scale']} if settings.get('layer_scale') else {}
    # A gated MLP has silu whatever the field says.
    act = {'activation': 'silu'} if name == 'hf_dinov3 gated' else {}
    if name == 'timm dinov2':
        act = {'activation': again.settings['activation']}
    assert again.settings == {**mine.settings, **scale, **act}
    assert again.meta['image_size'] == mine.meta['image_size']
    if to == 'timm':
        assert {key: again.meta[key] for key in META} == META


BLOCK_NAMES = {
    'timm': 'blocks.0.{norm1,attn.qkv,attn.proj,norm2,mlp.fc1,mlp.fc2}',
    'hf_vit': 'vit.encoder.layer.0.{layernorm_before,attention.attention.query,'
    'attention.attention.key,attention.attention.value,attention.output.dense,layernorm_after,'
    'intermediate.dense,output.dense}',
    'hf_siglip': 'vision_model.encoder.layers.0.{layer_norm1,self_attn.q_proj,self_attn.k_proj,'
    'self_attn.v_proj,self_attn.out_proj,layer_norm2,mlp.fc1,mlp.fc2}',
}


@pytest.mark.parametrize('name', BLOCK_NAMES)
def test_blocks_have_the_names_that_the_peers_have(name, tmp_path):
    path = interop.write(tmp_path / 'x', name, weights_of(MODELS[name][1]))
    arrays = stored(path / 'model.safetensors')
    front, _, parts = BLOCK_NAMES[name].partition('{')
    wanted = {f'{front}{p}.{leaf}' for p in parts[:-1].split(',') for leaf in ('weight', 'bias')}
    assert {key for key in arrays if key.startswith(front)} == wanted


def test_queries_keys_and_values_are_joined_in_this_order(tmp_path):
    mine = weights_of(MODELS['timm'][1])
    path = interop.write(tmp_path / 'x', 'timm', mine)
    joined = stored(path / 'model.safetensors')['blocks.1.attn.qkv.weight']
    attention = mine.params['Transformer']['encoderblock_1']['MultiHeadDotProductAttention_0']
    for i, part in enumerate(('query', 'key', 'value')):
        kernel = attention[part]['kernel'].reshape(48, 48)
        np.testing.assert_array_equal(joined[48 * i : 48 * (i + 1)], kernel.T)


# Archives of google-research in all their forms.


@pytest.mark.parametrize('prefix', ['', 'params/', 'opt/target/', 'params/img/'])
@pytest.mark.parametrize('old', [True, False], ids=['old', 'new'])
@pytest.mark.parametrize('scan', [True, False], ids=['scan', 'unrolled'])
def test_archives_of_every_numbering_and_prefix(prefix, old, scan, tmp_path):
    mine = weights_of({**LEARNED, 'pool': 'cls'}, image_size=(32, 32))
    kept = {'prefix': prefix, 'old': old, 'posembed_input': old, 'scan': scan, 'gn4': False}
    shapes = layout.shapes_of(mine.settings, mine.meta)
    inner = layout.to_theirs(google.rules_of(shapes, kept), trees.flatten(mine.params))
    arrays = google.wrapped(inner, kept)
    assert any('MlpBlock_3' in name for name in arrays) == old
    more = {'opt/step': np.zeros(())} if prefix.startswith('params/') else {}
    more |= {'params/t': np.zeros(1, np.float32)} if 'img' in prefix else {}
    file = tmp_path / 'a.npz'
    np.savez(file, **arrays, **more)
    spec = f'{file}:img' if 'img' in prefix else str(file)
    again = interop.read(spec)
    same(mine, again)
    assert again.settings == mine.settings
    found, seen = google.unwrapped({**arrays, **more}, 'img' if 'img' in prefix else '', 'x')
    back = google.wrapped(found, seen)
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, back[name])


def test_group_norms_of_four_axes_and_bfloat16_as_void(tmp_path):
    _, settings = MODELS['augreg hybrid']
    mine = weights_of(settings, dtype=ml_dtypes.bfloat16, image_size=(32, 32))
    shapes = layout.shapes_of(mine.settings, mine.meta)
    kept = {'prefix': '', 'old': True, 'posembed_input': True, 'scan': False, 'gn4': True}
    arrays = layout.to_theirs(google.rules_of(shapes, kept), trees.flatten(mine.params))
    assert arrays['gn_root/scale'].shape == (1, 1, 1, 64)
    assert 'block2/unit2/conv3/kernel' in arrays
    np.savez(tmp_path / 'a.npz', **{n: a.view('V2') for n, a in arrays.items()})
    again = interop.read(tmp_path / 'a.npz')
    same(mine, again)
    assert again.settings['resnet'] == (1, 2)
    assert again.settings['patch_size'] == (8, 8)


def test_a_model_of_several_asks_which_one(tmp_path):
    mine = weights_of({}, image_size=(32, 32))
    flat = {f'params/img/{n}': a for n, a in trees.flatten(mine.params).items()}
    flat |= {n.replace('/img/', '/txt/'): a for n, a in flat.items()}
    np.savez(tmp_path / 'a.npz', **flat)
    with pytest.raises(UserError, match=r'several models \(img, txt\).*a\.npz:img'):
        interop.read(tmp_path / 'a.npz')
    with pytest.raises(UserError, match="no 'image' in it; there are img, txt"):
        interop.read(f'{tmp_path}/a.npz:image')
    same(mine, interop.read(f'{tmp_path}/a.npz:img'))


# Names of the PyTorch releases.


@pytest.mark.parametrize(
    ('name', 'settings'),
    [
        ('mae_pretrain_vit_base', {**LEARNED, **NO_HEAD}),
        (
            'mae_finetuned_vit_base',
            dict(posemb='learned', posemb_prefix=1, class_token=True, pool='gap',
                 norm_after_pool=True),
        ),
    ],
)  # fmt: skip
def test_encoders_of_mae_are_known_by_the_name_of_their_file(name, settings, tmp_path):
    from safetensors.numpy import save_file

    mine = weights_of({**settings, **GELU, 'width': 192, 'num_heads': 3}, image_size=(32, 32))
    shapes = layout.shapes_of(mine.settings, mine.meta)
    rules = timm_vit.rules_of('mae', mine.settings, shapes, {'distilled': False})
    arrays = layout.to_theirs(rules, trees.flatten(mine.params))
    assert ('fc_norm.weight' in arrays) == ('finetuned' in name)
    save_file(arrays, tmp_path / f'{name}.safetensors')
    again = interop.read(tmp_path / f'{name}.safetensors', settings={'num_heads': 3})
    same(mine, again)
    assert again.settings == mine.settings and again.learnt is None
    assert again.meta['format'] == 'mae' and again.meta['mean'] == (0.485, 0.456, 0.406)
    save_file(arrays, tmp_path / 'other.safetensors')
    with pytest.raises(UserError, match=r'config\.json must be beside it'):
        interop.read(tmp_path / 'other.safetensors')


@pytest.mark.parametrize('release', ['deit3', 'mae', 'dinov2'])
def test_the_names_of_releases(release, tmp_path):
    settings = {
        'deit3': dict(posemb='learned', pool='cls', layer_scale=1e-5),
        'mae': {**LEARNED, **NO_HEAD},
        'dinov2': {**LEARNED, **NO_HEAD, 'registers': 4, 'layer_scale': 1e-5, 'mlp': 'swiglu'},
    }[release]
    wide = dict(width=192, num_heads=3, **GELU)
    mine = weights_of({**settings, **wide}, image_size=(32, 32))
    shapes = layout.shapes_of(mine.settings, mine.meta)
    kept = {'distilled': False}
    rules = timm_vit.rules_of(release, mine.settings, shapes, kept)
    arrays = layout.to_theirs(rules, trees.flatten(mine.params))
    sign = {'deit3': 'blocks.0.gamma_1', 'mae': 'norm.weight', 'dinov2': 'blocks.0.mlp.w12.weight'}
    assert sign[release] in arrays
    more = {'mask_token': np.zeros((1, 1, 192), np.float32)}
    more |= {'decoder_embed.weight': np.zeros((8, 192), np.float32)} if release == 'mae' else {}
    from safetensors.numpy import save_file

    file = tmp_path / 'deit_3_small.safetensors'
    save_file({**arrays, **(more if release != 'deit3' else {})}, file)
    heads = {'num_heads': 3}
    if release != 'deit3':
        said = 'its decoder has a width of 8.*the decoder and mask token of MAE on purpose: --drop'
        if release != 'mae':
            said = 'unexpected: .*mask_token.*--drop.*stands for masked'
        with pytest.raises(UserError, match=said) as error:
            interop.read(file, settings=heads)
        assert ('MAE' in str(error.value)) == (release == 'mae')
    drop = ['mask_token|decoder.*'] if release != 'deit3' else []
    with pytest.raises(UserError, match=f'heads of {release} of width 192: --set num_heads=N'):
        interop.read(file, drop=drop)
    again = interop.read(file, drop=drop, settings=heads)
    same(mine, again)
    assert again.settings == mine.settings
    assert again.meta['format'] == release
    assert again.meta['licence'] == ('cc-by-nc-4.0' if release == 'mae' else 'apache-2.0')
    with pytest.raises(UserError, match=f'--to {release}: a pickled file is not written'):
        interop.write(tmp_path / 'out', release, mine)


def test_names_of_transformers_5_are_read_too(tmp_path):
    from safetensors.numpy import load_file, save_file

    mine = weights_of(MODELS['hf_vit'][1])
    path = plain(interop.write(tmp_path / 'x', 'hf_vit', mine))
    newer = {
        'encoder.layer.': 'layers.',
        'attention.attention.query': 'attention.q_proj',
        'attention.attention.key': 'attention.k_proj',
        'attention.attention.value': 'attention.v_proj',
        'attention.output.dense': 'attention.o_proj',
        'intermediate.dense': 'mlp.fc1',
        '.output.dense': '.mlp.fc2',
    }
    renamed = {}
    for name, array in load_file(path / 'model.safetensors').items():
        for old, new in newer.items():
            name = name.replace(old, new)
        renamed[name] = array
    save_file(renamed, path / 'model.safetensors')
    assert 'vit.layers.1.mlp.fc2.bias' in renamed
    same(mine, interop.read(path))


# Changes that leave the answers as they are.


def answers(weights, size):
    from big_vit.models.vit import make_vit

    model = make_vit(**weights.settings, scan=False, dtype=jnp.float32)
    images = np.random.default_rng(3).normal(size=(2, *size, 3)).astype(np.float32)
    with jax.default_matmul_precision('highest'):
        params = jax.tree.map(jnp.asarray, weights.params)
        y, _ = jax.jit(model.apply)({'params': params}, jnp.asarray(images))
    return np.asarray(y)


@pytest.mark.parametrize(
    ('to', 'settings'),
    [
        pytest.param(
            *('timm', dict(posemb='sincos2d', pool='cls', head_bias=False, qkv_bias=True)),
            marks=SLOW,
        ),
        pytest.param('timm', dict(posemb='sincos2d_mae', key_bias=False, **GELU), marks=SLOW),
        ('timm', dict(posemb='learned', posemb_prefix=1, registers=2, pool='cls')),
        pytest.param('augreg', dict(posemb='sincos2d', pool='cls'), marks=SLOW),
        pytest.param('big_vision', dict(posemb='learned', posemb_prefix=1, pool='cls'), marks=SLOW),
        ('big_vision', dict(posemb='sincos2d_mae', qkv_bias=False)),
        pytest.param('hf_dinov2', dict(posemb='sincos2d', pool='cls_gap'), marks=SLOW),
        pytest.param('hf_vit', dict(posemb='none', pool='cls', qkv_bias=False), marks=SLOW),
        pytest.param('open_clip', dict(posemb='learned', pool='cls', num_classes=0), marks=SLOW),
        ('hf_siglip', dict(posemb='sincos2d', pool='map', num_classes=0, key_bias=False)),
    ],
)
def test_what_a_peer_has_no_word_for_becomes_what_it_has(to, settings, tmp_path):
    mine = weights_of(settings, **MODEL_META.get(to, {}))
    mine = mine._replace(params=jax.tree.map(lambda x: 0.2 * x, mine.params))
    again = interop.read(interop.write(place(tmp_path, to), to, mine))
    assert again.settings != mine.settings
    before, after = answers(mine, (32, 48)), answers(again, (32, 48))
    np.testing.assert_allclose(before, after, rtol=0, atol=1e-5 * np.abs(before).max())


# What is refused.


@pytest.mark.parametrize(
    ('to', 'settings', 'message'),
    [
        ('timm', dict(parallel=True), 'no parallel=True'),
        ('timm', dict(posemb='rope'), "no posemb='rope'"),
        ('timm', dict(norm_eps=1e-12), '--set norm_eps=1e-6'),
        ('timm', dict(representation=8), 'no representation=8'),
        ('hf_vit', dict(pool='gap'), "no pool='gap' (it has 'cls'); --to hf_siglip has 'gap'"),
        ('hf_vit', {**LEARNED, 'representation': 8}, '--drop'),
        ('hf_mae', LEARNED, 'no num_classes=5'),
        ('hf_ijepa', dict(pool='cls', num_classes=0), 'no class token'),
        ('hf_dinov2', {**LEARNED, 'pool': 'cls_gap', 'mlp_dim': 100}, 'a multiple of the width'),
        ('hf_dinov2_reg', {**LEARNED, 'pool': 'cls_gap'}, '--to hf_dinov2'),
        ('hf_siglip', dict(pool='cls', num_classes=0), 'no class token'),
        ('hf_dinov3', dict(posemb='learned', pool='cls', num_classes=0), "no posemb='learned'"),
        ('open_clip', {**LEARNED, 'norm': 'rmsnorm'}, "no norm='rmsnorm'"),
        ('open_clip', LEARNED, 'projection has no bias'),
        ('open_clip', dict(pool='map', num_classes=0), '--architecture'),
        ('big_vision', dict(activation='gelu'), "no activation='gelu'"),
        ('augreg', dict(class_token=True), 'no class token'),
        ('pytorch', {}, 'augreg, big_vision, timm'),
    ],
)
def test_a_format_that_cannot_hold_a_model_says_why(to, settings, message, tmp_path):
    with pytest.raises(UserError) as error:
        interop.write(tmp_path / 'x.npz', to, weights_of(settings))
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_head_can_be_dropped_and_half_of_one_cannot(tmp_path):
    mine = weights_of({**LEARNED, **GELU, 'representation': 8})
    path = interop.write(tmp_path / 'x', 'hf_vit', mine, drop=['head/.*'])
    again = interop.read(path)
    assert again.settings['num_classes'] == 0
    assert again.settings['representation'] == 8
    with pytest.raises(UserError, match='head/kernel is left of a part'):
        interop.write(tmp_path / 'x', 'hf_vit', mine, drop=['head/bias'])
    with pytest.raises(UserError, match='cannot be without cls'):
        interop.write(tmp_path / 'x', 'hf_vit', mine, drop=['cls'])


def broken(tmp_path, change):
    from safetensors.numpy import load_file, save_file

    path = plain(interop.write(tmp_path / 'x', 'timm', weights_of(MODELS['timm'][1])))
    arrays = load_file(path / 'model.safetensors')
    change(arrays)
    save_file(arrays, path / 'model.safetensors')
    return path


def test_all_missing_unexpected_and_misshaped_arrays_are_listed(tmp_path):
    def change(arrays):
        del arrays['blocks.1.norm2.bias']
        arrays['norm.weight'] = np.zeros(47, np.float32)
        arrays['pre_logits.fc.weight'] = np.zeros((2, 2), np.float32)

    with pytest.raises(UserError) as error:
        interop.read(broken(tmp_path, change))
    said = str(error.value)
    assert '1 missing: blocks.1.norm2.bias' in said
    assert '1 unexpected: pre_logits.fc.weight' in said
    assert '1 of other shape: norm.weight is 47, not 48' in said
    assert "--drop 'pre_logits.*'" in said


def test_a_message_is_bounded(tmp_path):
    def change(arrays):
        arrays.update({f'extra.{i}': np.zeros(1, np.float32) for i in range(1000)})

    with pytest.raises(UserError, match=r'1000 unexpected: .* and 992 more') as error:
        interop.read(broken(tmp_path, change))
    assert len(str(error.value)) < 1000


def test_what_is_dropped_is_told_and_a_regex_without_effect_is_an_error(tmp_path):
    path = broken(tmp_path, lambda arrays: arrays.update(extra=np.zeros(3, np.float32)))
    assert interop.read(path, drop=['extra']).meta['dropped'] == ('extra',)
    with pytest.raises(UserError, match="--drop 'other' matches nothing"):
        interop.read(path, drop=['other'])
    with pytest.raises(UserError, match='not a regular expression'):
        interop.read(path, drop=['('])


def test_archives_of_objects_are_refused_with_the_safe_alternative(tmp_path):
    harmful = np.array([print], dtype=object)
    np.savez(tmp_path / 'a.npz', x=harmful)
    with pytest.raises(UserError, match=r'holds Python objects.*np.savez'):
        interop.read(tmp_path / 'a.npz')


@pytest.mark.parametrize('name', ['a.npz', 'a.safetensors', 'a.txt'])
def test_damaged_and_strange_files(name, tmp_path):
    with pytest.raises(UserError, match='no such file'):
        interop.read(tmp_path / name)
    for content in (b'', b'\xff' * 100, b'PK\x03\x04' + b'\0' * 50):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=r'cannot be read|not a kind of file'):
            interop.read(tmp_path / name)


@pytest.mark.parametrize('content', ['[]', '{', '{"model_type": "bert"}', '{"model_type": "vit"}'])
def test_strange_configs(content, tmp_path):
    path = plain(interop.write(tmp_path / 'x', 'hf_vit', weights_of(MODELS['hf_vit'][1])))
    (path / 'config.json').write_text(content)
    with pytest.raises(UserError, match=r'config.json|model_type'):
        interop.read(path)


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('num_hidden_layers', 10**9),
        ('num_hidden_layers', -1),
        ('hidden_size', '48'),
        ('hidden_size', 10**12),
        ('num_attention_heads', 7),
        ('num_attention_heads', 0),
        ('patch_size', [0, 0]),
        ('image_size', [[1]]),
        ('hidden_act', 'mish'),
        ('layer_norm_eps', 'small'),
    ],
)
def test_impossible_configs_are_the_users_to_repair(key, value, tmp_path):
    path = plain(interop.write(tmp_path / 'x', 'hf_vit', weights_of(MODELS['hf_vit'][1])))
    config = json.loads((path / 'config.json').read_text())
    (path / 'config.json').write_text(json.dumps({**config, key: value}))
    with pytest.raises(UserError):
        interop.read(path)


def test_damaged_metadata_of_ours(tmp_path):
    from safetensors.numpy import load_file, save_file

    path = interop.write(tmp_path / 'x', 'timm', weights_of(MODELS['timm'][1]))
    file = path / 'model.safetensors'
    for text in ('{', '{"format": "timm"}', '{"format": "timm", "settings": 1, "meta": 2}'):
        save_file(load_file(file), file, {'big_vit': text})
        with pytest.raises(UserError, match='metadata'):
            interop.read(path)


def test_parts_of_a_large_model_lie_beside_their_index(tmp_path):
    from safetensors.numpy import load_file, save_file

    mine = weights_of(MODELS['hf_vit'][1])
    path = plain(interop.write(tmp_path / 'x', 'hf_vit', mine))
    arrays = load_file(path / 'model.safetensors')
    (path / 'model.safetensors').unlink()
    names = sorted(arrays)
    parts = {'a.safetensors': names[::2], 'b.safetensors': names[1::2]}
    for part, chosen in parts.items():
        save_file({name: arrays[name] for name in chosen}, path / part)
    index = {'weight_map': {name: part for part, chosen in parts.items() for name in chosen}}
    (path / 'model.safetensors.index.json').write_text(json.dumps(index))
    same(mine, interop.read(path))
    for elsewhere in ('../x/a.safetensors', '/etc/passwd', 'sub/a.safetensors', '..'):
        index['weight_map'][names[0]] = elsewhere
        (path / 'model.safetensors.index.json').write_text(json.dumps(index))
        with pytest.raises(
            UserError, match=r'not the name of a \.safetensors or \.bin file beside'
        ):
            interop.read(path)


def test_positions_that_fit_no_square_ask_for_the_size(tmp_path):
    mine = weights_of(MODELS['augreg'][1], image_size=(32, 80))
    path = plain(interop.write(tmp_path / 'x.npz', 'augreg', mine))
    with pytest.raises(UserError, match='--set image_size=HEIGHT,WIDTH'):
        interop.read(path)
    again = interop.read(path, settings={'image_size': (32, 80)})
    same(mine, again)
    assert again.meta['image_size'] == (32, 80)


def test_unknown_settings_and_formats(tmp_path):
    path = interop.write(tmp_path / 'x', 'timm', weights_of(MODELS['timm'][1]))
    with pytest.raises(UserError, match='wdith is not a setting'):
        interop.read(path, settings={'wdith': 3})
    with pytest.raises(UserError, match=r"format 'onnx' is not one of"):
        interop.read(path, format='onnx')
    with pytest.raises(UserError, match="there is no 'img' with an encoder in it"):
        interop.read(f'{path}/model.safetensors:img')


def test_a_setting_can_be_corrected(tmp_path):
    path = interop.write(tmp_path / 'x', 'timm', weights_of(MODELS['timm'][1]))
    assert interop.read(path, settings={'norm_eps': 1e-5}).settings['norm_eps'] == 1e-5


def test_init_takes_files_and_folders_from_elsewhere_only(tmp_path):
    mine = weights_of(MODELS['timm'][1], dtype=ml_dtypes.bfloat16)
    path = interop.write(tmp_path / 'x', 'timm', mine)
    found = interop.load_init(str(path))
    assert found is not None
    assert {leaf.dtype for leaf in trees.flatten(found.params).values()} == {np.dtype(np.float32)}
    assert interop.load_init(str(tmp_path)) is None
    assert interop.load_init('gs://bucket/run') is None
    assert interop.load_init(str(tmp_path / 'runs')) is None


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    mine = weights_of(MODELS['augreg'][1])
    path = interop.write(tmp_path / 'x.npz', 'augreg', mine)
    before = path.read_bytes()

    def full(file, **_):
        file.write(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(np, 'savez', full)
    with pytest.raises(UserError, match='cannot be written: No space left'):
        interop.write(path, 'augreg', mine)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ['x.npz']


@pytest.mark.parametrize(
    'name',
    [
        'vit_base_patch16_rpn_224',
        'resnet50',
        'vit_base_mci_224',
        'vit_small_patch16_18x2_224',
        'vit_base_patch16_rope_ape_224',
        'vit_pe_spatial_base_patch16_512',
        'eva_giant_patch14_224',
        'vit_small_patch16_lingbot',
    ],
)
def test_architectures_that_compute_something_else(name, tmp_path):
    path = plain(interop.write(tmp_path / 'x', 'timm', weights_of(MODELS['timm'][1])))
    config = json.loads((path / 'config.json').read_text())
    (path / 'config.json').write_text(json.dumps({**config, 'architecture': name}))
    with pytest.raises(UserError, match=f'{name} is not a ViT that big_vit has'):
        interop.read(path)


def test_names_of_timm_tell_epsilon_activation_heads_and_pooling():
    def told(name, **shapes):
        found = {
            'patch_embed.proj.weight': (768, 3, 16, 16),
            'blocks.0.mlp.fc1.weight': (3072, 768),
            'blocks.0.mlp.fc2.weight': (768, 3072),
            'pos_embed': (1, 197, 768),
            'cls_token': (1, 1, 768),
            **shapes,
        }
        settings, _, _ = timm_vit.settings_of('timm', found, {'architecture': name}, {}, 'x')
        return tuple(settings[key] for key in ('norm_eps', 'activation', 'num_heads', 'pool'))

    assert told('vit_base_patch16_224.augreg_in21k') == (1e-6, 'gelu', 12, 'cls')
    assert told('vit_base_patch16_clip_224.openai') == (1e-5, 'gelu', 12, 'cls')
    assert told('vit_base_patch16_clip_quickgelu_224') == (1e-5, 'quick_gelu', 12, 'cls')
    assert told('vit_huge_patch14_224', **{'patch_embed.proj.weight': (1280, 3, 14, 14)})[2] == 16


def test_a_bare_file_asks_for_what_it_does_not_tell(tmp_path):
    timm = plain(interop.write(tmp_path / 'timm', 'timm', weights_of(MODELS['timm'][1])))
    tower = weights_of(MODELS['open_clip'][1], crop_pct=1.0)
    clip = plain(interop.write(tmp_path / 'clip', 'open_clip', tower))
    hf = plain(interop.write(tmp_path / 'hf', 'hf_vit', weights_of(MODELS['hf_vit'][1])))
    for folder, config, message in (
        (timm, 'config.json', 'say --architecture NAME'),
        (clip, 'open_clip_config.json', '--set activation=quick_gelu'),
        (hf, 'config.json', 'config.json must be beside it'),
    ):
        (folder / config).unlink()
        with pytest.raises(UserError) as error:
            interop.read(folder)
        assert message in str(error.value)
        with pytest.raises(UserError, match=r'python -m big_vit\.export --from'):
            interop.load_init(str(folder))
