"""The stages of a ViT: one after the other they are the model, and tokens are chosen as a whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gate import mostly_slow
from sample_models import INPUTS, combined, random_like

from big_vit import state
from big_vit.models import tokenizers, variants, vit
from big_vit.models.tokenizers import Tokens

CASES = {
    'gap': ('patches', 'gap', {}),
    'class token': ('patches', 'cls', {}),
    'attention': ('patches', 'map', {'scan': True}),
    'two heads': ('overlapping', 'cls_dist', {}),
    'norm and representation': ('conv', 'cls_gap', {}),
    'rotation behind a prefix': ('patches', 'cls', {'posemb': 'rope', 'head_dim': 8}),
    'relative': ('patches', 'cls', {'posemb': 'relative'}),
    'words': ('words', 'map', {}),
    'several images in a row': ('ragged', 'map', {}),
    'several streams': ('cross', 'gap', {'posemb': 'none'}),
    'latents': ('latents', 'seq', {}),
    'bfloat16': ('patches', 'gap', {'dtype': jnp.bfloat16, 'scan': True, 'remat': 'full'}),
    'no classes': ('patches', 'gap', {'num_classes': 0}),
}


def batch_for(inputs, size=2):
    rng = np.random.default_rng(0)
    made = {}
    for name, (shape, dtype) in inputs.items():
        if name in tokenizers.PICTURES:
            made[name] = rng.uniform(-1, 1, (size, *shape)).astype(np.float32)
        else:
            made[name] = rng.integers(0, 3, (size, *shape)).astype(dtype)
    if 'segment' in made:
        made['grid'] = np.full_like(made['grid'], 3)
        made['images'] = np.zeros((size, 2), np.int32)
    return jax.tree.map(jnp.asarray, made)


def chained(net, inputs, train):
    """The model, said stage by stage."""
    tokens, context = net.embed(inputs, train=train)
    x, _ = net.encode(tokens, context, train=train)
    images = inputs['images'].shape[1] if 'images' in inputs else 0
    pooled = net.pool(x, tokens, images)
    return net.classify(pooled), {'tokens': x, 'pre_logits': pooled}


@pytest.mark.parametrize(
    'case, train',
    mostly_slow(
        [(case, train) for case in CASES for train in (False, True)],
        *((case, False) for case in ('gap', 'class token', 'two heads', 'relative', 'latents')),
        *(('several streams', True), ('bfloat16', False), ('no classes', False)),
    ),
)
def test_the_stages_chained_are_the_model_to_the_bit(case, train):
    name, pooling, more = CASES[case]
    net, inputs = combined(name, pooling, **more, **({'dropout': 0.3} if train else {}))
    batch = batch_for(inputs)
    params = random_like(state.abstract_params(net, inputs))
    rngs = {'dropout': jax.random.key(5)} if train else {}

    def apply(method):
        call = jax.jit(lambda p, b: net.apply({'params': p}, b, method=method, rngs=rngs))
        return jax.device_get(call(params, batch))

    whole = apply(lambda net, b: net(b, train=train))
    staged = apply(lambda net, b: chained(net, b, train))
    assert jax.tree.structure(whole) == jax.tree.structure(staged)
    jax.tree.map(np.testing.assert_array_equal, whole, staged)
    assert np.isfinite(whole[0]).all() and np.abs(whole[0]).max() > 0


@pytest.mark.slow
def test_each_stage_needs_its_own_parameters_only():
    """The last two stages need no encoder, and encoding needs no head."""
    net, inputs = combined('patches', 'cls_gap')
    batch = batch_for(inputs)
    params = jax.tree.map(jnp.asarray, random_like(state.abstract_params(net, inputs)))
    logits, extra = net.apply({'params': params}, batch)
    head = {'head': params['head'], 'pre_logits': params['pre_logits']}
    alone = net.apply({'params': head}, extra['pre_logits'], method=net.classify)
    np.testing.assert_array_equal(alone, logits)
    body = {name: leaf for name, leaf in params.items() if name not in head}
    tokens, context = net.apply({'params': body}, batch, method=net.embed)
    x, _ = net.apply({'params': body}, tokens, context, method=net.encode)
    np.testing.assert_array_equal(x, extra['tokens'])


# Some of the tokens.


def all_of(batch=3, length=7, shared=False):
    """Tokens whose values tell their example and their place; positions may be of all alike."""
    rng = np.random.default_rng(2)
    tables = [rng.random((1 if shared else batch, length, 4)).astype(np.float32) for _ in range(3)]
    return Tokens(
        rng.random((batch, length, 5)).astype(np.float32),
        (1, length),
        rng.random((batch, length)) < 0.5,
        rng.integers(0, 4, (batch, length)).astype(np.int32),
        (tables[0], tables[1]),
        tables[2],
    )


@pytest.mark.parametrize('shared', [False, True])
def test_chosen_tokens_keep_their_mask_segment_and_rotation(shared):
    tokens = all_of(shared=shared)
    index = np.array([[3, 0, 6], [1, 1, 2], [6, 5, 4]])
    found = vit.select_tokens(jax.tree.map(jnp.asarray, tokens), jnp.asarray(index))
    for row, places in enumerate(index):
        table = 0 if shared else row
        for column, place in enumerate(places):
            np.testing.assert_array_equal(found.x[row, column], tokens.x[row, place])
            assert found.mask[row, column] == tokens.mask[row, place]
            assert found.segment[row, column] == tokens.segment[row, place]
            kept = (*found.rotation, found.places), (*tokens.rotation, tokens.places)
            for mine, whole in zip(*kept, strict=True):
                np.testing.assert_array_equal(mine[row, column], whole[table, place])
    assert found.grid is None
    assert found.x.shape == (3, 3, 5) and found.rotation[0].shape == (3, 3, 4)


def test_what_tokens_have_not_is_not_made_up():
    plain = Tokens(jnp.ones((2, 4, 3)), (2, 2))
    assert vit.select_tokens(plain, jnp.array([[0, 1], [2, 3]]))[1:] == (None,) * 6


@pytest.mark.parametrize('rate, kept', [(0.0, 7), (0.3, 5), (0.5, 4), (0.99, 1)])
def test_dropped_tokens_leave_a_subset_in_its_order(rate, kept):
    tokens = all_of()
    drop = jax.jit(vit.drop_tokens, static_argnums=2)
    given = jax.tree.map(jnp.asarray, tokens._replace(grid=None))
    chosen = set()
    for seed in range(8):
        found = drop(given, jax.random.key(seed), rate)
        assert found.x.shape[1] == kept
        for row in range(3):
            places = [
                int(np.flatnonzero((tokens.x[row] == x).all(-1))[0])
                for x in np.asarray(found.x[row])
            ]
            assert places == sorted(set(places))
            np.testing.assert_array_equal(found.mask[row], tokens.mask[row, places])
            np.testing.assert_array_equal(found.segment[row], tokens.segment[row, places])
            for mine, whole in zip(found.rotation, tokens.rotation, strict=True):
                np.testing.assert_array_equal(mine[row], whole[row, places])
            chosen.add(tuple(places))
    assert len(chosen) > 3 or kept == 7


# Flat settings.


def given_settings():
    for name, pooling, more in CASES.values():
        fields, _ = INPUTS[name]
        if 'streams' in fields:
            continue
        net, _ = combined(name, pooling, **more)
        yield net
    for variant in ('B/16', 'R50+L/32'):
        yield vit.make_vit(7, **variants.parse(variant))


@pytest.mark.parametrize('net', list(given_settings()), ids=lambda net: net.single.tokenizer)
def test_settings_of_a_model_make_it_again(net):
    settings = vit.settings_of(net)
    assert set(settings) == set(vit.SETTINGS)
    again = vit.make_vit(**settings)
    assert again == net and vit.settings_of(again) == settings


def test_settings_that_are_given_come_back():
    given = dict(
        num_classes=3, patch_size=(2, 4), width=8, depth=1, mlp_dim=5, num_heads=2, pool='map',
        mlp='swiglu', registers=2, posemb='rope', rope_theta=7.0, layer_scale=0.1, lora=2,
        representation=6, stride=(1, 2), dtype=jnp.float32,
    )  # fmt: skip
    settings = vit.settings_of(vit.make_vit(**given))
    assert given.items() <= settings.items()
    assert settings['class_token'] is False and settings['norm'] == 'layernorm'


def test_an_unknown_setting_is_named():
    with pytest.raises(TypeError, match=r'gated is not a setting of a ViT; these are .*\bmlp\b'):
        vit.make_vit(3, (4, 4), 8, 1, 8, 2, gated=True)
