"""The ViT against float64 NumPy, its other forms against itself, its costs against papers."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gate import mostly_slow
from jax.test_util import check_grads
from scipy import ndimage

from big_vit import trees
from big_vit.errors import UserError
from big_vit.models import encoder, flops, layers, positions, variants, vit

SMALL = dict(patch_size=(4, 4), width=16, depth=2, mlp_dim=24, num_heads=2, num_classes=5)
IMAGE = (2, 8, 12, 3)


@pytest.fixture(autouse=True, scope='module')
def full_precision():
    with jax.default_matmul_precision('highest'):
        yield


def model(**changes):
    return vit.make_vit(**{**SMALL, 'dtype': jnp.float32, **changes})


def settings(net):
    return SimpleNamespace(**vit.settings_of(net))


def images(shape=IMAGE, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def shapes(net, image_shape):
    one = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(net.init, jax.random.key(0), one)['params']


def random_params(net, image_shape=IMAGE[1:], seed=1):
    """Every parameter random, biases and norms too, so that none can be left out unseen."""
    rng = np.random.default_rng(seed)

    def draw(name, leaf):
        value = rng.standard_normal(leaf.shape) * 0.3 + name.endswith('scale')
        return value.astype(np.float32)

    return trees.map_with_name(draw, shapes(net, image_shape))


@functools.cache
def jitted(net, train=False):
    return jax.jit(functools.partial(net.apply, train=train))


def logits_of(net, params, image):
    return np.asarray(jitted(net)({'params': params}, image)[0])


# An independent implementation, in float64, one example and one head at a time.


def np_norm(x, p):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * p['scale'] + p['bias']


def np_attention(x, memory, p):
    heads = []
    for h in range(p['query']['kernel'].shape[1]):
        q, k, v = (
            y @ p[name]['kernel'][:, h] + p[name]['bias'][h]
            for name, y in (('query', x), ('key', memory), ('value', memory))
        )
        scores = q @ k.T / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append((weights / weights.sum(-1, keepdims=True)) @ v @ p['out']['kernel'][h])
    return sum(heads) + p['out']['bias']


def np_mlp(x, p):
    x = x @ p['Dense_0']['kernel'] + p['Dense_0']['bias']
    x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return x @ p['Dense_1']['kernel'] + p['Dense_1']['bias']


def np_sincos(rows, columns, width):
    quarter = width // 4
    table = np.zeros((rows, columns, width))
    for r in range(rows):
        for c in range(columns):
            for i in range(quarter):
                omega = 1 / 10_000 ** (i / (quarter - 1))
                table[r, c, i] = np.sin(c * omega)
                table[r, c, quarter + i] = np.cos(c * omega)
                table[r, c, 2 * quarter + i] = np.sin(r * omega)
                table[r, c, 3 * quarter + i] = np.cos(r * omega)
    return table.reshape(rows * columns, width)


def np_vit(params, image, net):
    """Logits, pooled vector and tokens of one image."""
    net = settings(net)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    (ph, pw), kernel = net.patch_size, p['embedding']['kernel']
    rows, columns = image.shape[0] // ph, image.shape[1] // pw
    tokens = []
    for r in range(rows):
        for c in range(columns):
            patch = image[r * ph : (r + 1) * ph, c * pw : (c + 1) * pw].astype(np.float64)
            tokens.append(np.tensordot(patch, kernel, 3) + p['embedding']['bias'])
    learned = net.posemb == 'learned'
    x = np.stack(tokens)
    x = x + (p['pos_embedding'][0] if learned else np_sincos(rows, columns, net.width))
    if net.pool == 'cls':
        x = np.concatenate([p['cls'][0], x])
    for i in range(net.depth):
        b = p['Transformer'][f'encoderblock_{i}']
        y = np_norm(x, b['LayerNorm_0'])
        x = x + np_attention(y, y, b['MultiHeadDotProductAttention_0'])
        x = x + np_mlp(np_norm(x, b['LayerNorm_1']), b['MlpBlock_0'])
    x = np_norm(x, p['Transformer']['encoder_norm'])
    if net.pool == 'gap':
        pooled = x.mean(0)
    elif net.pool == 'cls':
        pooled = x[0]
    else:
        h = p['MAPHead_0']
        y = np_attention(h['probe'][0], x, h['MultiHeadDotProductAttention_0'])
        pooled = (y + np_mlp(np_norm(y, h['LayerNorm_0']), h['MlpBlock_0']))[0]
    return pooled @ p['head']['kernel'] + p['head']['bias'], pooled, x


WIDE, GREY, MANY = ((8, 12, 3), (4, 4)), ((6, 6, 1), (2, 3)), ((4, 8, 5), (4, 2))


@pytest.mark.parametrize(
    'pool, posemb, image_shape, patch',
    [
        ('gap', 'sincos2d', *WIDE),
        ('gap', 'learned', *GREY),
        ('gap', 'sincos2d', *MANY),
        ('cls', 'sincos2d', *GREY),
        ('cls', 'learned', *MANY),
        ('map', 'sincos2d', *MANY),
        ('map', 'learned', *WIDE),
    ],
)
def test_forward_pass_is_that_of_the_paper(pool, posemb, image_shape, patch):
    net = model(pool=pool, posemb=posemb, patch_size=patch, scan=False)
    params, image = random_params(net, image_shape), images((2, *image_shape))
    logits, extra = jax.device_get(jitted(net)({'params': params}, image))
    for i in range(len(image)):
        wanted, pooled, tokens = np_vit(params, image[i], net)
        np.testing.assert_allclose(logits[i], wanted, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(extra['pre_logits'][i], pooled, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(extra['tokens'][i], tokens, rtol=1e-5, atol=1e-5)


def test_images_that_do_not_divide_into_patches_are_refused():
    with pytest.raises(ValueError, match='8x9 pixels do not divide into 4x4'):
        shapes(model(), (8, 9, 3))
    with pytest.raises(ValueError, match='divisible by 4'):
        positions.sincos((2, 2), 18)


def test_sincos_positions_tell_all_places_apart():
    table = positions.sincos((14, 20), 64)[0].astype(np.float64)
    distance = np.square(table[:, None] - table[None]).sum(-1) + 9 * np.eye(len(table))
    assert distance.min() > 0.1
    np.testing.assert_allclose(np.square(table).sum(-1), 32, rtol=1e-6)


# The same function in other forms.


@functools.cache
def loss_and_gradient(net):
    def loss(params, image):
        logits = net.apply({'params': params}, image)[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array([1, 3])).mean()

    return jax.jit(jax.value_and_grad(loss))


@pytest.fixture(scope='module')
def unrolled():
    net = model(scan=False)
    params = random_params(net)
    return params, jax.device_get(loss_and_gradient(net)(params, images()))


def assert_close(tree, other, **tolerance):
    flat, wanted = trees.flatten(tree), trees.flatten(other)
    assert flat.keys() == wanted.keys()
    for name in flat:
        np.testing.assert_allclose(flat[name], wanted[name], err_msg=name, **tolerance)


@pytest.mark.parametrize(
    'scan, remat',
    mostly_slow(
        [(True, 'none'), (True, 'names'), (True, 'full'), (False, 'names'), (False, 'full')],
        (True, 'names'),
        (False, 'full'),
    ),
)
def test_scan_and_remat_change_neither_loss_nor_gradients(unrolled, scan, remat):
    params, (loss, gradient) = unrolled
    used = encoder.stack_blocks(params) if scan else params
    found, found_gradient = jax.device_get(
        loss_and_gradient(model(scan=scan, remat=remat))(used, images())
    )
    np.testing.assert_allclose(found, loss, rtol=1e-6)
    assert_close(encoder.unstack_blocks(found_gradient), gradient, rtol=1e-4, atol=1e-6)


def saved_residuals(remat, scan):
    net = model(remat=remat, scan=scan)
    params = shapes(net, IMAGE[1:])
    image = jax.ShapeDtypeStruct(IMAGE, jnp.float32)
    _, residuals = jax.eval_shape(
        lambda p, x: jax.vjp(lambda p: net.apply({'params': p}, x)[0].sum(), p), params, image
    )
    return sum(leaf.size for leaf in jax.tree.leaves(residuals))


@pytest.mark.parametrize('scan', [True, False])
def test_remat_keeps_less_for_the_backward_pass(scan):
    none, names, full = (saved_residuals(remat, scan) for remat in ('none', 'names', 'full'))
    assert full < names < none


@pytest.mark.parametrize('depth', [1, 2, 11])
def test_stacking_blocks_is_undone_by_unstacking(depth):
    net = model(scan=False, depth=depth)
    params = random_params(net)
    stacked = encoder.stack_blocks(params)
    abstract_state = shapes(model(scan=True, depth=depth), IMAGE[1:])
    assert jax.tree.map(np.shape, stacked) == jax.tree.map(np.shape, abstract_state)
    block = stacked['Transformer']['encoderblock']['MlpBlock_0']['Dense_0']['kernel']
    for i in range(depth):
        own = params['Transformer'][f'encoderblock_{i}']['MlpBlock_0']['Dense_0']['kernel']
        np.testing.assert_array_equal(block[i], own)
    assert_close(encoder.unstack_blocks(stacked), params, rtol=0)


def test_what_is_stacked_or_unstacked_already_stays():
    params = random_params(model(scan=False))
    stacked = encoder.stack_blocks(params)
    assert encoder.stack_blocks(stacked) is stacked
    assert encoder.unstack_blocks(params) is params


def test_patches_are_permuted_with_their_positions():
    """Without positions a gap-pooled encoder cannot tell the order of its patches."""
    net = model(posemb='learned', scan=False)
    params, image = random_params(net), images()
    params['pos_embedding'] = np.zeros_like(params['pos_embedding'])
    moved = image[:, [4, 5, 6, 7, 0, 1, 2, 3]]
    np.testing.assert_allclose(
        logits_of(net, params, moved), logits_of(net, params, image), rtol=1e-5, atol=1e-5
    )
    params = random_params(net)
    assert np.abs(logits_of(net, params, moved) - logits_of(net, params, image)).max() > 1e-2


# Initialisation, dropout, precision.


@pytest.fixture(scope='module')
def initial():
    net = model(width=64, mlp_dim=128, num_heads=4, depth=2, posemb='learned', pool='map')
    return net, jax.jit(net.init)(jax.random.key(0), images())['params']


@pytest.mark.slow
def test_the_first_loss_is_the_logarithm_of_the_number_of_classes(initial):
    net, params = initial
    logits = logits_of(net, params, images())
    assert not logits.any()
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array([0, 4])).mean()
    assert float(loss) == pytest.approx(np.log(5), rel=1e-7)


def test_initial_parameters_follow_their_fans(initial):
    _, params = initial
    flat = {name: np.asarray(leaf) for name, leaf in trees.flatten(params).items()}
    block = 'Transformer/encoderblock/'
    for name, variance in {
        'embedding/kernel': 1 / 48,
        'pos_embedding': 1 / 64,
        block + 'MultiHeadDotProductAttention_0/query/kernel': 2 / (64 + 64),
        block + 'MultiHeadDotProductAttention_0/out/kernel': 2 / (64 + 64),
        block + 'MlpBlock_0/Dense_0/kernel': 2 / (64 + 128),
        'MAPHead_0/MlpBlock_0/Dense_1/kernel': 2 / (64 + 128),
    }.items():
        assert flat[name].var() == pytest.approx(variance, rel=0.15), name
        assert abs(flat[name].mean()) < 0.15 * np.sqrt(variance), name
    for name, leaf in flat.items():
        assert leaf.dtype == np.float32
        if name.endswith('scale'):
            assert (leaf == 1).all(), name
        if name.endswith('bias'):
            assert np.abs(leaf).max() < 1e-5, name
    layers_ = flat[block + 'MlpBlock_0/Dense_0/kernel']
    assert np.abs(layers_[0] - layers_[1]).max() > 0.1, 'scanned layers must start different'


@pytest.mark.parametrize('scan, remat', [(True, 'none'), (False, 'names')])
def test_dropout_depends_on_its_key_and_is_off_in_evaluation(scan, remat):
    plain, net = model(scan=scan), model(dropout=0.3, scan=scan, remat=remat)
    params, image = random_params(net), images()
    off = logits_of(net, params, image)
    np.testing.assert_allclose(off, logits_of(plain, params, image), rtol=1e-6, atol=1e-6)

    def on(seed):
        rngs = {'dropout': jax.random.key(seed)}
        return np.asarray(jitted(net, train=True)({'params': params}, image, rngs=rngs)[0])

    np.testing.assert_array_equal(on(0), on(0))
    assert np.abs(on(0) - on(1)).max() > 1e-2
    assert np.abs(on(0) - off).max() > 1e-2


def test_scanned_layers_drop_different_units():
    """Two layers that each add their own mask of ones: one shared mask would give 0 or 2 only."""
    net = model(dropout=0.5, posemb='learned', width=64)
    params = jax.tree.map(np.zeros_like, random_params(net))
    weights = params['Transformer']
    weights['encoderblock']['MlpBlock_0']['Dense_1']['bias'] += 1
    x = jnp.zeros((2, 6, 64))
    style = layers.Style(dropout=0.5)
    block = encoder.Encoder(dataclasses.replace(net.encoder, style=style))
    weights['encoder_norm']['scale'] += 1
    apply = jax.jit(block.apply, static_argnums=2)
    y, _ = apply({'params': weights}, x, False, rngs={'dropout': jax.random.key(0)})
    for row in np.asarray(y).reshape(-1, 64):
        assert len(np.unique(row.round(4))) == 3, 'none, one or both of two layers'


@pytest.mark.slow
def test_dropout_preserves_the_mean():
    net = layers.Mlp(256, layers.Style(dropout=0.25))
    x = jnp.asarray(images((1, 1, 8)))
    params = net.init(jax.random.key(0), x)
    keys = jax.random.split(jax.random.key(1), 2000)
    some = jax.jit(jax.vmap(lambda k: net.apply(params, x, False, rngs={'dropout': k})))(keys)
    wanted, error = net.apply(params, x), np.asarray(some).std(0) / np.sqrt(len(keys))
    assert (np.abs(np.asarray(some).mean(0) - wanted) < 5 * error).all()


@pytest.mark.parametrize('pool', ['gap', 'map'])
def test_bfloat16_computes_close_to_float32_and_keeps_parameters(pool):
    net = model(dtype=jnp.bfloat16, pool=pool)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes(net, IMAGE[1:]))} == {'float32'}
    params, image = random_params(net), images()
    logits, extra = jitted(net)({'params': params}, image)
    assert logits.dtype == extra['pre_logits'].dtype == jnp.float32
    assert extra['tokens'].dtype == jnp.bfloat16
    wanted = logits_of(model(pool=pool), params, image)
    error = np.abs(np.asarray(logits) - wanted).max()
    assert 1e-5 < error < 0.05 * np.abs(wanted).max() + 0.05


# Derivatives that are written out.


def plain_norm(x, scale, bias):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + 1e-6) * scale[None, None] + bias[None, None]


def plain_attention(query, key, value):
    weights = jnp.einsum('bqhd,bkhd->bhqk', query, key) / query.shape[-1] ** 0.5
    return jnp.einsum('bhqk,bkhd->bqhd', jax.nn.softmax(weights), value)


def plain_gelu(x):
    return 0.5 * x * (1 + jnp.tanh((2 / jnp.pi) ** 0.5 * (x + 0.044715 * x**3)))


def norm(x, scale, bias):
    return layers.layer_norm(x, scale, bias, 1e-6, x.dtype)


def plain_product(x, kernel):
    return jnp.einsum('btc,chd->bthd', x, kernel)


def plain_product_of_heads(x, kernel):
    return jnp.einsum('bthd,hdc->btc', x, kernel)


HEADS = ((2, 5, 3, 8), (2, 7, 3, 8), (2, 7, 3, 8))
WRITTEN_OUT = {
    'norm': (norm, plain_norm, ((2, 5, 16), (16,), (16,))),
    'attention': (layers.attend, plain_attention, HEADS),
    'gelu': (layers.gelu, plain_gelu, ((4, 33),)),
    'product': (lambda x, k: layers.multiply(x, k, 1), plain_product, ((2, 5, 6), (6, 3, 4))),
    'product_of_heads': (
        lambda x, k: layers.multiply(x, k, 2),
        plain_product_of_heads,
        ((2, 5, 3, 4), (3, 4, 6)),
    ),
}


def drawn(shapes, scale=2.0):
    keys = jax.random.split(jax.random.key(3), len(shapes) + 1)
    return [scale * jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=False)]


def pulled(f, args):
    """The value and the gradients under one fixed cotangent."""
    value, back = jax.vjp(f, *args)
    g = jax.random.normal(jax.random.key(4), value.shape)
    return [value, *back(g.astype(value.dtype))]


@pytest.mark.parametrize('name', WRITTEN_OUT)
def test_derivatives_are_those_of_the_plain_formula(name):
    f, plain, shapes = WRITTEN_OUT[name]
    for have, want in zip(pulled(f, drawn(shapes)), pulled(plain, drawn(shapes)), strict=True):
        np.testing.assert_allclose(have, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize('name', WRITTEN_OUT)
def test_derivatives_are_those_of_finite_differences(name):
    f, _, shapes = WRITTEN_OUT[name]
    check_grads(jax.jit(f), drawn(shapes, 1.0), order=1, modes=['rev'], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize('platform', ['cpu', 'tpu', 'cuda'])
def test_the_gradient_of_a_kernel_is_made_turned_but_on_cpus(platform):
    def loss(kernel, x):
        return layers.multiply(x, kernel, 1).sum()

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((6, 3, 4), (2, 5, 6))]
    lowered = jax.jit(jax.grad(loss)).trace(*shapes).lower(lowering_platforms=(platform,))
    assert ('stablehlo.transpose' in lowered.as_text()) == (platform != 'cpu')


@pytest.mark.parametrize('name', WRITTEN_OUT)
def test_bfloat16_is_as_close_to_float32_as_its_inputs_are(name):
    """Errors relative to the norm of each result; rounding the inputs once gives 0.002."""
    f, plain, shapes = WRITTEN_OUT[name]
    args = [x.astype(jnp.bfloat16) for x in drawn(shapes)]
    exact = pulled(plain, [x.astype(jnp.float32) for x in args])
    for have, want in zip(pulled(f, args), exact, strict=True):
        error = jnp.linalg.norm((have.astype(jnp.float32) - want).ravel())
        assert error < 0.008 * jnp.linalg.norm(want.ravel())


def test_attention_to_logits_in_the_hundreds_is_finite_and_exact():
    query, key, value = drawn(HEADS, 30.0)
    have = pulled(layers.attend, (query, key, value))
    want = pulled(plain_attention, (query, key, value))
    for a, b in zip(have, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    'dtype, mean, atol', [('float32', 300, 1e-4), ('bfloat16', 10, 1e-4), ('bfloat16', 300, 1e-2)]
)
def test_norm_statistics_are_in_float32_whatever_the_input(dtype, mean, atol):
    """Where bfloat16 lies 2 apart, as at 300, its statistics may err by less than that does."""
    x = np.random.default_rng(0).normal(mean, 1, (64, 512)).astype(dtype)
    p = {'scale': np.ones(512, np.float32), 'bias': np.zeros(512, np.float32)}
    found = layers.LayerNorm().apply({'params': p}, jnp.asarray(x))
    np.testing.assert_allclose(found, np_norm(x.astype(np.float64), p), atol=atol)


def test_norm_of_equal_features_is_the_bias():
    """In one pass their variance comes out as rounding, which may be negative."""
    x = jnp.full((4, 768), 1e3, jnp.bfloat16)
    scale, bias = jnp.ones(768), jnp.full(768, 0.5)
    found = layers.layer_norm(x, scale, bias, 1e-6, jnp.float32)
    np.testing.assert_allclose(found, 0.5, atol=0.1)


# The cost of a model.


def counted(net, image_shape):
    """Parameters, and operations of one image."""
    params = shapes(net, image_shape)
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return trees.count(params), flops.count(net.apply, {'params': params}, image)


def closed_form(net, image_shape):
    """The same two numbers by hand, for learned positions of the patches."""
    s = settings(net)
    w, m, inner = s.width, s.mlp_dim, s.patch_size[0] * s.patch_size[1] * image_shape[2]
    patches = image_shape[0] * image_shape[1] // (s.patch_size[0] * s.patch_size[1])
    tokens = patches + (s.pool == 'cls')
    mlp, norm, head = 2 * w * m + m + w, 2 * w, w * s.num_classes + s.num_classes
    attention = 4 * (w * w + w)
    params = inner * w + w + patches * w + s.depth * (attention + mlp + 2 * norm) + norm + head
    products = tokens * (4 * w * w + 2 * w * m) + 2 * tokens * tokens * w
    multiplied = patches * inner * w + s.depth * products + w * s.num_classes
    if s.pool == 'cls':
        params += w
    if s.pool == 'map':
        params += w + attention + mlp + norm
        multiplied += 2 * w * w + 2 * tokens * w * w + 2 * tokens * w + 2 * w * m
    return params, 2 * multiplied


@pytest.mark.parametrize('size', mostly_slow(variants.SIZES, 'mu', 'B', 'So400m', '22B'))
def test_parameters_and_operations_of_every_size_are_those_of_the_closed_form(size):
    net = vit.make_vit(num_classes=10, posemb='learned', **variants.parse(f'{size}/16x8'))
    assert counted(net, (32, 48, 3)) == closed_form(net, (32, 48, 3))


@pytest.mark.parametrize('pool', ['gap', 'cls', 'map'])
@pytest.mark.parametrize('scan', [True, False])
@pytest.mark.parametrize('remat', ['none', 'names', 'full'])
def test_the_closed_form_holds_for_every_pool_and_form_of_the_blocks(pool, scan, remat):
    net = model(pool=pool, posemb='learned', scan=scan, remat=remat)
    assert counted(net, IMAGE[1:]) == closed_form(net, IMAGE[1:])


# Published gigaFLOPs with a multiply-add as two: DeiT and timm for cls; arXiv 2106.04560 for map.
FLOPS = {
    ('Ti/16', 'cls'): 2 * 1.26,
    ('S/16', 'cls'): 2 * 4.6,
    ('B/16', 'cls'): 2 * 17.58,
    ('L/16', 'cls'): 2 * 61.6,
    ('H/14', 'cls'): 2 * 167.4,
    ('g/14', 'map'): 533.1,
    ('G/14', 'map'): 965.3,
}
# Millions of parameters, DeiT and ViT papers and timm: learned positions, 1000 classes.
PARAMS = {
    ('Ti/16', 'cls'): 5.7,
    ('S/16', 'cls'): 22.05,
    ('B/16', 'cls'): 86.57,
    ('B/32', 'cls'): 88.2,
    ('L/16', 'cls'): 304.3,
    ('H/14', 'cls'): 632.0,
}


def published(variant, **more):
    return counted(vit.make_vit(1000, **variants.parse(variant), **more), (224, 224, 3))


@pytest.mark.parametrize('variant, pool', FLOPS)
def test_forward_flops_are_the_published_ones(variant, pool):
    _, operations = published(variant, pool=pool)
    assert operations / 1e9 == pytest.approx(FLOPS[variant, pool], rel=0.01)


@pytest.mark.parametrize('variant, pool', PARAMS)
def test_parameters_are_the_published_ones(variant, pool):
    count, _ = published(variant, pool=pool, posemb='learned', posemb_prefix=1)
    assert count / 1e6 == pytest.approx(PARAMS[variant, pool], rel=0.005)


def test_a_variant_names_sizes_and_patch():
    assert variants.parse('B/16x8') == {
        'width': 768,
        'depth': 12,
        'mlp_dim': 3072,
        'num_heads': 12,
        'patch_size': (16, 8),
    }
    assert variants.parse('g-opt/14')['patch_size'] == (14, 14)


@pytest.mark.parametrize('size', variants.SIZES)
def test_heads_divide_the_width_of_every_size(size):
    width, _, _, heads = variants.SIZES[size]
    assert width % heads == 0 and width % 4 == 0


@pytest.mark.parametrize(
    'text, parts',
    [
        ('B', ("must look like 'S/16'", "'B'")),
        ('B16', ("must look like 'S/16'",)),
        ('B/', ('must look like',)),
        ('B/16/', ('must look like',)),
        ('B/16x', ('must look like',)),
        ('B/-16', ('must look like',)),
        ('B/1.5', ('must look like',)),
        ('', ('must look like',)),
        ('b/16', ("unknown size 'b'", '22B')),
        ('So400/14', ("unknown size 'So400'", 'did you mean So400m?')),
        ('QQ/16', ("unknown size 'QQ'", 'the sizes are mu, Ti')),
        ('B/0', ('at least one pixel',)),
        ('B/16x0', ('at least one pixel',)),
    ],
)
def test_what_is_no_variant_is_refused(text, parts):
    with pytest.raises(UserError) as caught:
        variants.parse(text)
    for part in ('config: model.variant', *parts):
        assert part in str(caught.value)


# Positions on another grid.


def table_of(rows, columns, width=3, seed=0):
    table = np.random.default_rng(seed).standard_normal((1, rows * columns, width))
    return table.astype(np.float32)


@pytest.mark.parametrize('grid', [(1, 1), (3, 5), (7, 7)])
def test_the_same_grid_leaves_positions_as_they_are(grid):
    np.testing.assert_array_equal(
        positions.resize_positions(table_of(*grid), grid, grid), table_of(*grid)
    )


GRIDS = [((3, 5), (6, 10)), ((7, 7), (4, 9)), ((14, 14), (24, 24)), ((2, 3), (13, 2))]


@pytest.mark.parametrize('old, new', GRIDS)
def test_corners_stay_and_shapes_are_right(old, new):
    table = table_of(*old)
    found = positions.resize_positions(table, old, new)
    assert found.shape == (1, new[0] * new[1], 3) and found.dtype == np.float32
    before, after = table.reshape(*old, 3), found.reshape(*new, 3)
    for r in (0, -1):
        for c in (0, -1):
            np.testing.assert_array_equal(after[r, c], before[r, c])


@pytest.mark.parametrize('old, new', GRIDS)
def test_a_plane_stays_a_plane(old, new):
    def plane(rows, columns):
        y, x = np.meshgrid(np.linspace(0, 1, rows), np.linspace(0, 1, columns), indexing='ij')
        return np.stack([2 * y - 3 * x + 1, x], -1).reshape(1, -1, 2).astype(np.float32)

    found = positions.resize_positions(plane(*old), old, new)
    np.testing.assert_allclose(found, plane(*new), atol=1e-6)


@pytest.mark.parametrize('old, new', GRIDS)
def test_positions_are_those_of_scipy(old, new):
    grid = table_of(*old).reshape(*old, 3)
    factors = (new[0] / old[0], new[1] / old[1], 1)
    wanted = ndimage.zoom(grid.astype(np.float64), factors, order=1, mode='nearest')
    found = positions.resize_positions(table_of(*old), old, new).reshape(*new, 3)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.slow
def test_to_a_grid_of_one_row_and_back_from_one():
    table = table_of(1, 4)
    tall = positions.resize_positions(table, (1, 4), (3, 4)).reshape(3, 4, 3)
    np.testing.assert_array_equal(tall, np.broadcast_to(table.reshape(1, 4, 3), (3, 4, 3)))
    flat = positions.resize_positions(tall.reshape(1, 12, 3), (3, 4), (1, 4))
    np.testing.assert_array_equal(flat, table)
