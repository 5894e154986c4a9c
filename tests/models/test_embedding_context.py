"""Hidden patches and positions of another grid, against DINOv2's interpolation in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gate import mostly_slow
from self_distillation_oracle import numbers

from big_vit.models import positions
from big_vit.models.tokenizers import Cut, EmbeddingContext, chosen, patchify
from big_vit.models.vit import make_vit

SIZES = dict(patch_size=(4, 4), width=16, depth=1, mlp_dim=24, num_heads=2, dtype=jnp.float32)


@pytest.mark.parametrize(('side', 'offset'), [(14, 0.1), (7, 0.0), (7, 0.1)])
def test_positions_are_interpolated_as_in_dinov2(side, offset):
    table = np.random.RandomState(2).standard_normal((1, 1 + side**2, 3))
    with jax.enable_x64(True):
        found = positions.interpolated(jnp.asarray(table[:, 1:]), (side, side), (6, 4), offset)
    np.testing.assert_allclose(found[0], numbers()[f'positions_{side}_{offset}'], atol=1e-12)


def embedded(model, image, context):
    params = model.init(jax.random.key(0), jnp.zeros((1, 16, 24, 3)))['params']
    tokens, _ = model.apply({'params': params}, image, context=context, method='embed')
    return params, tokens.x


@pytest.mark.slow
def test_a_mask_token_comes_before_positions():
    model = make_vit(0, **SIZES, posemb='learned', pool='cls', posemb_prefix=1)
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.standard_normal((2, 16, 24, 3)), jnp.float32)
    hidden = jnp.asarray(rng.random((2, 24)) < 0.5)
    token = jnp.asarray(rng.standard_normal((1, 1, 16)), jnp.float32)
    params, plain = embedded(model, image, EmbeddingContext())
    _, found = embedded(model, image, EmbeddingContext(hidden, token))
    placed = jnp.broadcast_to(token + params['pos_embedding'][:, 1:], plain.shape)
    np.testing.assert_array_equal(found, jnp.where(hidden[..., None], placed, plain))


@pytest.mark.slow
def test_one_table_serves_another_grid_and_learns_from_it():
    model = make_vit(0, **SIZES, posemb='learned', pool='cls', posemb_prefix=1)
    context = EmbeddingContext(table=(4, 6), offset=0.1)
    image = jnp.zeros((2, 8, 12, 3))
    params, found = embedded(model, image, context)
    wanted = positions.interpolated(params['pos_embedding'][:, 1:], (4, 6), (2, 3), 0.1)
    np.testing.assert_allclose(found, jnp.broadcast_to(wanted, found.shape), atol=1e-6)

    def total(params):
        tokens, _ = model.apply({'params': params}, image, context=context, method='embed')
        return tokens.x.sum()

    gradient = jax.grad(total)(params)['pos_embedding']
    # Each of six positions is a weighted mean, whose weights sum to 1, in both pictures.
    assert float(gradient[0, 1:, 0].sum()) == pytest.approx(12, rel=1e-5)
    assert float(jnp.abs(gradient[0, 0]).max()) == 0


@pytest.mark.parametrize(
    ('posemb', 'dtype'),
    mostly_slow(
        [
            ('learned', 'bfloat16'),
            ('rope', 'float32'),
            ('sincos2d', 'float32'),
            ('none', 'float32'),
        ],
        ('learned', 'bfloat16'),
    ),
)
def test_patches_that_were_cut_are_embedded_as_in_the_whole(posemb, dtype):
    model = make_vit(0, **{**SIZES, 'dtype': jnp.dtype(dtype)}, posemb=posemb)
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.standard_normal((2, 16, 24, 3)), jnp.float32)
    place = np.stack([rng.permutation(24)[:7] for _ in range(2)])
    apply = jax.jit(
        lambda params, context: model.apply(
            {'params': params}, image, context=context, method='embed'
        )[0]
    )
    params = model.init(jax.random.key(0), image[:1])['params']
    whole = apply(params, EmbeddingContext())
    pixels = patchify(image.astype(dtype), (4, 4))
    cut = Cut(chosen(pixels, jnp.asarray(place)), jnp.asarray(place))
    np.testing.assert_array_equal(cut.pixels, np.asarray(pixels)[np.arange(2)[:, None], place])
    some = apply(params, EmbeddingContext(cut=cut))
    wanted = np.float32(whole.x)[np.arange(2)[:, None], place]
    rounding = 0.02 if dtype == 'bfloat16' else 1e-6
    np.testing.assert_allclose(np.float32(some.x), wanted, rtol=rounding, atol=rounding)
    if posemb == 'rope':
        for turned, turns in zip(some.rotation, whole.rotation, strict=True):
            np.testing.assert_array_equal(turned, np.asarray(turns)[0][place])
