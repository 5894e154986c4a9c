"""timm's ViTs and hybrids answer as ours do, both ways, through the folders that timm writes."""

import numpy as np
import pytest
from peers import CLOSE, WRONG, distance, export_and_read, images, ours, peer, randomise, theirs

from big_vit import interop, trees

SMALL = dict(img_size=32, embed_dim=48, depth=2, num_heads=3, num_classes=5)
HYBRID = {**SMALL, 'img_size': 64}
# What is tested: (architecture, arguments).
MODELS = {
    'class token': ('vit_small_patch16_224', SMALL),
    'average, fc_norm': ('vit_small_patch16_224', {**SMALL, 'global_pool': 'avg'}),
    'average, norm': ('vit_small_patch16_224', {**SMALL, 'global_pool': 'avg', 'fc_norm': False}),
    'map': (
        'vit_small_patch16_224',
        {**SMALL, 'global_pool': 'map', 'pool_include_prefix': True},
    ),
    'siglip': ('vit_base_patch16_siglip_224', SMALL),
    'siglip tanh': ('vit_base_patch32_siglip_256', {**SMALL, 'img_size': 64}),
    'dinov2 registers': ('vit_small_patch14_reg4_dinov2', {**SMALL, 'img_size': 28}),
    'dinov2': ('vit_small_patch14_dinov2', {**SMALL, 'img_size': 28}),
    'swiglu': ('vit_giant_patch14_reg4_dinov2', {**SMALL, 'img_size': 28}),
    'clip': ('vit_base_patch16_clip_224', SMALL),
    'clip quickgelu': ('vit_base_patch16_clip_quickgelu_224', SMALL),
    'no_embed_class, flexi': ('flexivit_small', {**SMALL, 'img_size': 64}),
    'deit3': ('deit3_small_patch16_224', SMALL),
    'distilled': ('deit_tiny_distilled_patch16_224', SMALL),
    'no qkv bias': ('vit_medium_patch16_gap_240', SMALL),
    'registers, average': ('vit_little_patch16_reg4_gap_256', SMALL),
    'registers with positions': (
        'vit_small_patch16_224',
        {**SMALL, 'reg_tokens': 3, 'qk_norm': True},
    ),
    'rmsnorm': ('vit_small_patch16_224', {**SMALL, 'norm_layer': 'rmsnorm', 'act_layer': 'silu'}),
    'no positions': ('vit_small_patch16_224', {**SMALL, 'pos_embed': 'none'}),
    'not square': (
        'vit_small_patch16_224',
        {**SMALL, 'img_size': (32, 64), 'patch_size': (16, 8), 'mlp_ratio': 2.7},
    ),
    'R26': ('vit_small_r26_s32_224', HYBRID),
    'R50': ('vit_base_r50_s16_224', HYBRID),
    'R': ('vit_tiny_r_s16_p8_224', HYBRID),
}


def saved(name, folder, stem=64.0, **more):
    """(timm's model, what we read of it, images, its answers)"""
    timm = peer('timm')
    from timm.models._hub import save_for_hf

    architecture, args = MODELS[name]
    args = {**args, **more}
    model = randomise(timm.create_model(architecture, **args), stem=stem)
    save_for_hf(model, str(folder), model_args=args, safe_serialization=True)
    weights = interop.read(folder)
    batch = images(args['img_size'])
    return model, weights, batch, theirs(model, batch)


@pytest.mark.parametrize('name', MODELS)
def test_both_answer_the_same_in_both_directions(name, tmp_path):
    model, weights, batch, wanted = saved(name, tmp_path / 'theirs')
    inward = distance(wanted, ours(weights, batch))
    path, again = export_and_read(weights, 'timm', tmp_path / 'ours')
    loaded = peer('timm').create_model(f'local-dir:{path}', pretrained=True).eval()
    outward = distance(wanted, theirs(loaded, batch))
    print(f'timm {name}: in {inward:.2g}, out {outward:.2g}, of {np.abs(wanted).max():.2g}')
    assert inward <= CLOSE
    assert outward <= CLOSE
    for mine, own in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True):
        np.testing.assert_array_equal(mine, own)
    assert again.settings == weights.settings
    for key, array in trees.flatten(weights.params).items():
        np.testing.assert_array_equal(array, trees.flatten(again.params)[key])


@pytest.mark.parametrize('name', ['R26', 'R50'])
def test_how_the_stem_divides_kernels_makes_a_small_difference(name, tmp_path):
    """By deviation + 1e-5, as the code that trained them, or by sqrt(variance + 1e-8), as timm."""
    _, weights, batch, wanted = saved(name, tmp_path, stem=1.0)
    assert distance(wanted, ours(weights, batch)) <= 4 * CLOSE


def test_without_our_metadata_a_folder_of_ours_reads_the_same(tmp_path):
    from safetensors.numpy import load_file, save_file

    for name in ('dinov2 registers', 'clip quickgelu', 'siglip tanh', 'registers with positions'):
        _, weights, _, _ = saved(name, tmp_path / 'theirs')
        path, again = export_and_read(weights, 'timm', tmp_path / name.replace(' ', '_'))
        file = path / 'model.safetensors'
        save_file(load_file(file), file)
        plain = interop.read(path)
        assert plain.settings == {**again.settings, 'layer_scale': plain.settings['layer_scale']}


@pytest.mark.parametrize(
    'wrong',
    [{'norm_eps': 1e-5}, {'activation': 'gelu_tanh'}, {'norm_after_pool': True}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_wrong_setting_shows(wrong, tmp_path):
    _, weights, batch, wanted = saved('class token', tmp_path)
    if 'norm_after_pool' in wrong:  # Mean, then norm, is another thing than norm, then mean.
        _, weights, batch, wanted = saved('average, norm', tmp_path)
        inner = dict(weights.params)
        inner['Transformer'] = dict(inner['Transformer'])
        inner['encoder_norm'] = inner['Transformer'].pop('encoder_norm')
        weights = weights._replace(params=inner)
    assert distance(wanted, ours(weights, batch, **wrong)) > WRONG


def swapped(weights, one, other):
    flat = trees.flatten(weights.params)
    names = {one: other, other: one}
    changed = {
        name: flat['/'.join(names.get(part, part) for part in name.split('/'))] for name in flat
    }
    return weights._replace(params=trees.unflatten(changed))


@pytest.mark.parametrize('pair', [('query', 'key'), ('key', 'value'), ('query', 'value')])
def test_another_order_of_queries_keys_and_values_shows(pair, tmp_path):
    _, weights, batch, wanted = saved('dinov2 registers', tmp_path)
    assert distance(wanted, ours(swapped(weights, *pair), batch)) > WRONG


def test_the_order_of_class_token_registers_and_positions_shows(tmp_path):
    _, weights, batch, wanted = saved('registers with positions', tmp_path / 'a')
    flat = trees.flatten(weights.params)
    table = flat['pos_embedding']
    rolled = np.concatenate([table[:, 4:], table[:, :4]], axis=1)  # Patches first.
    for params in ({'pos_embedding': rolled}, {'registers': flat['registers'][:, ::-1]}):
        wrong = weights._replace(params=trees.unflatten({**flat, **params}))
        assert distance(wanted, ours(wrong, batch)) > WRONG
    # A class token that has a position, taken for one that has none.
    _, weights, batch, wanted = saved('class token', tmp_path / 'b')
    flat = trees.flatten(weights.params)
    less = {**flat, 'pos_embedding': flat['pos_embedding'][:, :-1]}
    wrong = weights._replace(params=trees.unflatten(less))
    assert distance(wanted, ours(wrong, batch, posemb_prefix=0)) > WRONG


@pytest.mark.parametrize('law', ['sincos2d', 'sincos2d_mae'])
@pytest.mark.parametrize('prefix', [0, 1])
def test_what_timm_cannot_say_becomes_what_it_can(law, prefix, tmp_path):
    """Fixed positions, a head without bias, positions of some tokens before the patches."""
    _, weights, batch, _ = saved('dinov2 registers', tmp_path / 'theirs')
    flat = trees.flatten(weights.params)
    del flat['head/bias']
    settings = {**weights.settings, 'head_bias': False, 'posemb': law, 'posemb_prefix': prefix}
    table = flat.pop('pos_embedding')
    if prefix:
        more = np.random.default_rng(0).normal(size=(1, 1, 48)).astype(np.float32)
        flat['pos_embedding'] = np.concatenate([more, table], axis=1)
        settings['posemb'] = 'learned'
    mine = weights._replace(params=trees.unflatten(flat), settings=settings)
    path = interop.write(tmp_path / 'ours', 'timm', mine)
    loaded = peer('timm').create_model(f'local-dir:{path}', pretrained=True).eval()
    assert distance(ours(mine, batch), theirs(loaded, batch)) <= CLOSE


@pytest.mark.parametrize('old', [True, False], ids=['augreg', 'big_vision'])
@pytest.mark.parametrize('hybrid', [True, False], ids=['R26', 'plain'])
def test_timm_reads_the_archives_that_we_write(old, hybrid, tmp_path):
    """timm loads those of google-research itself, which checks our names against its."""
    timm = peer('timm')
    name = 'vit_small_r26_s32_224' if hybrid else 'vit_small_patch16_224'
    size = 64 if hybrid else 32
    args = {**SMALL, 'img_size': size, 'act_layer': 'gelu_tanh'}
    from timm.models._hub import save_for_hf

    model = randomise(timm.create_model(name, **args))
    save_for_hf(model, str(tmp_path / 'theirs'), model_args=args, safe_serialization=True)
    weights = interop.read(tmp_path / 'theirs')
    batch = images(size)
    file = interop.write(tmp_path / 'x.npz', 'augreg' if old else 'big_vision', weights)
    if old:
        loaded = timm.create_model(name, checkpoint_path='', **args)
        loaded.load_pretrained(str(file))
        assert distance(theirs(model, batch), theirs(loaded.eval(), batch)) <= CLOSE
    again = interop.read(file)
    assert distance(theirs(model, batch), ours(again, batch)) <= CLOSE


@pytest.mark.parametrize('name', ['vit_small_patch16_dinov3', 'vit_small_plus_patch16_dinov3_qkvb'])
@pytest.mark.parametrize('pool', ['token', 'avg'])
def test_dinov3_of_timm(name, pool, tmp_path):
    """It has RoPE, biases of queries and values only, and a gated MLP of two matrices."""
    timm = peer('timm')
    from timm.models._hub import save_for_hf

    args = dict(img_size=64, embed_dim=48, depth=2, num_heads=3, num_classes=5, global_pool=pool)
    model = randomise(timm.create_model(name, **args))
    save_for_hf(model, str(tmp_path), model_args=args, safe_serialization=True)
    weights = interop.read(tmp_path)
    batch = images((64, 64))
    wanted = theirs(model, batch)
    assert distance(wanted, ours(weights, batch)) <= CLOSE
    assert distance(wanted, ours(weights, batch, rope_theta=1e4)) > WRONG
    assert distance(wanted, ours(weights, batch, norm_eps=1e-6)) > WRONG
