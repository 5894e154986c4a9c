"""Tokenizers against loops in float64, ragged images against each alone, costs against traces."""

import functools
import itertools
import math

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gate import mostly_slow
from PIL import Image
from sample_models import F32, INPUTS, POOLS, combined, example, model, operations, random_like
from scipy import ndimage

from big_vit import sharding, state, trees
from big_vit.data.transforms import naflex
from big_vit.errors import UserError
from big_vit.models import flops, positions, tokenizers, variants
from big_vit.models.encoder import EncoderConfig
from big_vit.models.placement import placed
from big_vit.models.tokenizers import Stream
from big_vit.models.vit import make_vit
from big_vit.pretrained import adapt

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True, scope='module')
def full_precision():
    with jax.default_matmul_precision('highest'):
        yield


def shapes_of(net, inputs):
    return jax.eval_shape(net.init, jax.random.key(0), inputs)['params']


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


# Each tokenizer alone: what its tokens are before positions, from the first block's input.


class Alone(tokenizers.nn.Module):
    stream: Stream
    width: int = 24

    @tokenizers.nn.compact
    def __call__(self, inputs):
        encoder = EncoderConfig(self.width, depth=1, mlp_dim=1, num_heads=2)
        return tokenizers.tokenize(self, self.stream, encoder, inputs).x


def tokens_of(stream, inputs):
    """(Parameters in float64, tokens of the first example)."""
    net = Alone(stream)
    inputs = {name: jnp.asarray(x) for name, x in inputs.items()}
    params = random_like(shapes_of(net, inputs))
    found = jax.jit(net.apply)({'params': params}, inputs)
    return wide(params), np.asarray(found)[0]


def conv(x, kernel, stride, before, after):
    """[h, w, c] by [kh, kw, c, o] with `before` zeros at the top and left, `after` behind."""
    x = np.pad(x, ((before, after), (before, after), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], (0, 1))
    return np.einsum('rcikl,klio->rco', windows[::stride, ::stride], kernel, optimize=True)


def pool(x, before, after):
    x = np.pad(x, ((before, after), (before, after), (0, 0)), constant_values=-np.inf)
    rows, columns = (n - 3 for n in x.shape[:2])
    return np.array([[x[r : r + 3, c : c + 3].max((0, 1)) for c in range(0, columns + 1, 2)]
                     for r in range(0, rows + 1, 2)])  # fmt: skip


def group_norm(x, p, groups):
    y = x.reshape(-1, groups, x.shape[-1] // groups)
    mean, variance = y.mean((0, 2), keepdims=True), y.var((0, 2), keepdims=True)
    y = ((y - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
    return y * p['scale'] + p['bias']


def image(height=16, width=16, channels=3):
    return RNG.uniform(-1, 1, (1, height, width, channels)).astype(np.float32)


def relu(x):
    return np.maximum(x, 0)


def none(**more):
    return Stream(patch_size=(4, 4), posemb='none', **more)


@pytest.mark.parametrize('stride', [(2, 2), (4, 3), (1, 4)])
def test_overlapping_patches(stride):
    x = image(12, 16)
    p, found = tokens_of(none(stride=stride), {'image': x})
    wanted = [
        np.tensordot(x[0, r : r + 4, c : c + 4].astype(np.float64), p['embedding']['kernel'], 3)
        for r in range(0, 9, stride[0])
        for c in range(0, 13, stride[1])
    ]
    np.testing.assert_allclose(found, wanted + p['embedding']['bias'], atol=1e-5)


def test_a_convolutional_stem():
    x = image()
    p, found = tokens_of(none(tokenizer='conv'), {'image': x})
    y = x[0].astype(np.float64)
    for i, features in enumerate((12, 24)):
        y = conv(y, p['stem'][f'conv_{i}']['kernel'], 2, 1, 1)
        assert y.shape[-1] == features
        y = relu(group_norm(y, p['stem'][f'norm_{i}'], math.gcd(features, 8)))
    wanted = y.reshape(16, 24) @ p['embedding']['kernel'][0, 0] + p['embedding']['bias']
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_a_compact_convolutional_tokenizer():
    x = image()
    p, found = tokens_of(none(tokenizer='cct'), {'image': x})
    y = x[0].astype(np.float64)
    for i in range(2):
        y = pool(relu(conv(y, p['stem'][f'conv_{i}']['kernel'], 1, 1, 1)), 1, 1)
    np.testing.assert_allclose(found, y.reshape(16, 24), rtol=1e-5, atol=2e-5)
    assert set(p) == {'stem'} and p['stem']['conv_0']['kernel'].shape == (3, 3, 3, 64)


def test_a_resnet_stem():
    x = image(32, 32)
    stream = Stream(patch_size=(16, 16), posemb='none', tokenizer='resnet', resnet=(1, 2))
    p, found = tokens_of(stream, {'image': x})
    s = p['stem']

    def std(kernel):
        centred = kernel - kernel.mean((0, 1, 2))
        return centred / (kernel.std((0, 1, 2)) + 1e-5)

    # TensorFlow's 'SAME' for a stride of two: seven wide pads (2, 3), three wide (0, 1).
    y = conv(x[0].astype(np.float64), std(s['conv_root']['kernel']), 2, 2, 3)
    y = pool(relu(group_norm(y, s['gn_root'], 32)), 0, 1)
    for block, units in ((1, 1), (2, 2)):
        for u in range(1, units + 1):
            q = s[f'block{block}'][f'unit{u}']
            stride = 2 if block == 2 and u == 1 else 1
            rest = y
            if 'conv_proj' in q:
                rest = group_norm(conv(y, std(q['conv_proj']['kernel']), stride, 0, 0),
                                  q['gn_proj'], 32)  # fmt: skip
            z = relu(group_norm(conv(y, std(q['conv1']['kernel']), 1, 0, 0), q['gn1'], 32))
            pad = (0, 1) if stride == 2 else (1, 1)
            z = relu(group_norm(conv(z, std(q['conv2']['kernel']), stride, *pad), q['gn2'], 32))
            z = group_norm(conv(z, std(q['conv3']['kernel']), 1, 0, 0), q['gn3'], 32)
            y = relu(rest + z)
    assert y.shape == (4, 4, 512)
    kernel = p['embedding']['kernel']
    assert kernel.shape == (2, 2, 512, 24)
    wanted = [np.tensordot(y[r : r + 2, c : c + 2], kernel, 3) for r in (0, 2) for c in (0, 2)] + p[
        'embedding'
    ]['bias']
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-4)


def test_shifted_patches():
    x = image(8, 12)
    p, found = tokens_of(none(tokenizer='spt'), {'image': x})
    y = x[0].astype(np.float64)
    height, width = y.shape[:2]
    copies = [y]
    for down, right in itertools.product((2, -2), repeat=2):
        moved = np.zeros_like(y)
        for r in range(height):
            for c in range(width):
                if 0 <= r - down < height and 0 <= c - right < width:
                    moved[r, c] = y[r - down, c - right]
        copies.append(moved)
    y = np.concatenate(copies, -1)
    wanted = []
    for r in range(0, height, 4):
        for c in range(0, width, 4):
            patch = y[r : r + 4, c : c + 4].reshape(-1)
            patch = (patch - patch.mean()) / np.sqrt(patch.var() + 1e-6)
            q = p['embedding']
            patch = patch * q['norm']['scale'] + q['norm']['bias']
            wanted.append(patch @ q['projection']['kernel'][0, 0] + q['projection']['bias'])
    np.testing.assert_allclose(found, wanted, atol=5e-5)


def test_tubelets():
    x = RNG.uniform(-1, 1, (1, 4, 8, 12, 3)).astype(np.float32)
    p, found = tokens_of(none(tokenizer='tubelets', tubelet=2), {'video': x})
    kernel = p['embedding']['kernel']
    assert kernel.shape == (2, 4, 4, 3, 24)
    wanted = [
        np.tensordot(x[0, t : t + 2, r : r + 4, c : c + 4].astype(np.float64), kernel, 4)
        for t in (0, 2)
        for r in (0, 4)
        for c in (0, 4, 8)
    ]
    np.testing.assert_allclose(found, wanted + p['embedding']['bias'], atol=1e-5)


def test_words_and_their_positions():
    ids = np.array([[3, 0, 6, 3]], np.int32)
    stream = Stream(tokenizer='words', vocab=7, posemb='learned')
    p, found = tokens_of(stream, {'tokens': ids})
    np.testing.assert_allclose(
        found, p['word_embedding'][ids[0]] + p['pos_embedding'][0], atol=1e-6
    )


# Initialisation and parameters from single images.


@pytest.mark.parametrize('how', adapt.VIDEO)
def test_tubelets_made_of_patches_give_a_still_its_image_tokens(how):
    x = image(8, 8)
    p, wanted = tokens_of(none(), {'image': x})
    kernel = adapt.tubelet_kernel(p['embedding']['kernel'].astype(np.float32), 3, how)
    still = jnp.asarray(np.repeat(x[:, None], 6, axis=1))
    net = Alone(none(tokenizer='tubelets', tubelet=3))
    params = {'embedding': {'kernel': kernel, 'bias': np.float32(p['embedding']['bias'])}}
    found = np.asarray(jax.jit(net.apply)({'params': params}, {'video': still}))[0]
    np.testing.assert_allclose(found, np.concatenate([wanted, wanted]), atol=2e-6)
    if how == 'central':
        assert not kernel[[0, 2]].any() and kernel[1].any()


@pytest.mark.parametrize('how, grey', [('mean', 1 / 3), ('sum', 1), ('repeat', None)])
def test_patches_for_other_channels(how, grey):
    kernel = RNG.standard_normal((4, 4, 3, 6))
    one = adapt.channels_of(kernel, 1, how)
    if grey is None:
        np.testing.assert_allclose(one[:, :, 0], 3 * kernel[:, :, 0])
    else:
        np.testing.assert_allclose(one[:, :, 0], kernel.sum(2) * grey)
    if how != 'mean':
        # Of one value in all channels, what comes out is what came out.
        for count in (1, 2, 5):
            x = np.repeat(RNG.standard_normal((4, 4, 1)), max(count, 3), 2)
            found = np.tensordot(x[..., :count], adapt.channels_of(kernel, count, how), 3)
            if how == 'sum' or count % 3 == 0:
                np.testing.assert_allclose(found, np.tensordot(x[..., :3], kernel, 3))


# Positions and patches on another grid, against libraries that do not share code with ours.

SIZES = [(7, 14), (14, 7), (5, 8), (16, 11), (3, 3)]


@pytest.mark.parametrize('old, new', SIZES)
def test_resizes_are_those_of_opencv_pillow_and_scipy(old, new):
    x = RNG.standard_normal((old, 4)).astype(np.float32)
    column = x[:, :1]
    for method, flag in (('bilinear', cv2.INTER_LINEAR), ('bicubic', cv2.INTER_CUBIC)):
        wanted = cv2.resize(np.repeat(column, 4, 1), (4, new), interpolation=flag)[:, :1]
        found = positions.resize_matrix(old, new, method) @ column
        np.testing.assert_allclose(found, wanted, atol=2e-5, err_msg=method)
    wanted = Image.fromarray(np.repeat(column, 4, 1)).resize((4, new), Image.Resampling.BICUBIC)
    found = positions.resize_matrix(old, new, 'bicubic_antialias') @ column
    np.testing.assert_allclose(found, np.asarray(wanted)[:, :1], atol=2e-5)
    wanted = ndimage.zoom(column[:, 0].astype(np.float64), new / old, order=1, mode='nearest')
    found = positions.resize_matrix(old, new, 'aligned') @ column[:, 0]
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize('method', positions.METHODS)
@pytest.mark.parametrize('old, new', SIZES)
def test_resizes_leave_what_is_constant(method, old, new):
    matrix = positions.resize_matrix(old, new, method)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)


def test_positions_of_an_image_are_repeated_over_the_frames_of_a_video():
    table = RNG.standard_normal((1, 6, 4)).astype(np.float32)
    found = positions.resize_positions(table, (2, 3), (4, 2, 3)).reshape(4, 6, 4)
    for frame in found:
        np.testing.assert_array_equal(frame, table[0])


@pytest.mark.parametrize('old, new', [((4, 4), (8, 8)), ((4, 4), (6, 5)), ((3, 4), (12, 4))])
def test_larger_patches_give_the_tokens_of_the_smaller(old, new):
    """What FlexiViT's resize is for: a patch, and the same made larger, have one token."""
    kernel = RNG.standard_normal((*old, 3, 7)).astype(np.float32)
    patch = RNG.standard_normal((*old, 3)).astype(np.float32)
    large = cv2.resize(patch, new[::-1], interpolation=cv2.INTER_LINEAR)
    found = np.tensordot(large, positions.resize_patches(kernel, new), 3)
    np.testing.assert_allclose(found, np.tensordot(patch, kernel, 3), atol=1e-4)


def test_smaller_patches_give_nearly_the_tokens_and_the_same_size_is_the_same():
    kernel = ndimage.gaussian_filter(RNG.standard_normal((8, 8, 3, 7)), (2, 2, 0, 0))
    patch = ndimage.gaussian_filter(RNG.standard_normal((8, 8, 3)), (2, 2, 0))
    small = cv2.resize(patch, (6, 6), interpolation=cv2.INTER_LINEAR)
    found = np.tensordot(small, positions.resize_patches(kernel, (6, 6)), 3)
    wanted = np.tensordot(patch, kernel, 3)
    # The least squares solution, so as near as no plain resize of the kernel is.
    naive = cv2.resize(kernel.reshape(8, 8, -1), (6, 6)).reshape(6, 6, 3, 7) * (64 / 36)
    error = np.abs(found - wanted).max()
    assert error < np.abs(np.tensordot(small, naive, 3) - wanted).max()
    assert positions.resize_patches(kernel, (8, 8)) is kernel


def test_sine_cosine_positions_of_mae_and_of_a_video():
    table = positions.sincos((3, 5), 16, 'sincos2d_mae')[0]
    for token in range(15):
        row, column = divmod(token, 5)
        for k in range(4):
            omega = 1 / 10_000 ** (k / 4)
            wanted = np.sin(column * omega), np.cos(column * omega)
            np.testing.assert_allclose(table[token, [k, 4 + k]], wanted, atol=1e-6)
            wanted = np.sin(row * omega), np.cos(row * omega)
            np.testing.assert_allclose(table[token, [8 + k, 12 + k]], wanted, atol=1e-6)
    clip = positions.sincos((2, 3, 4), 20)[0]
    assert clip.shape == (24, 20) and not clip[:, 18:].any()
    assert len(np.unique(clip.round(5), axis=0)) == 24, 'all places differ'
    at = positions.sincos_at(jnp.asarray(positions.coordinates((3, 5)))[None], 16)
    np.testing.assert_allclose(at, positions.sincos((3, 5), 16), atol=1e-5)


# Ragged images.


def photos(sizes, channels=3):
    return [RNG.integers(0, 256, (4 * r, 4 * c, channels), dtype=np.uint8) for r, c in sizes]


@pytest.mark.parametrize('posemb, pooling', [
    ('learned', 'map'),
    pytest.param('rope', 'gap', marks=pytest.mark.slow),
    pytest.param('sincos2d', 'gap', marks=pytest.mark.slow),
    pytest.param('sincos2d_mae', 'map', marks=pytest.mark.slow),
])  # fmt: skip
def test_packed_images_are_answered_as_each_alone(posemb, pooling):
    sizes = [(2, 3), (4, 4), (1, 7), (3, 3), (5, 2)]
    pictures = photos(sizes)
    parts, where = naflex.pack(pictures, (4, 4), 18)
    assert len(parts['patches']) == 3 and (parts['segment'] > 0).sum() == 48
    fields = dict(posemb=posemb, pool=pooling, depth=2, head_dim=8)
    net = model(tokenizer='ragged', posemb_grid=(4, 4), **fields)
    inputs = {name: jnp.asarray(x) for name, x in parts.items()}
    inputs['patches'] = inputs['patches'].astype(jnp.float32) / 255
    params = random_like(shapes_of(net, inputs))
    logits = np.asarray(jax.jit(net.apply)({'params': params}, inputs)[0])
    for picture, size, (row, place) in zip(pictures, sizes, where, strict=True):
        alone, own = model(**fields), dict(params)
        if posemb == 'learned':
            own['pos_embedding'] = positions.resize_positions(params['pos_embedding'], (4, 4), size)
        one = jnp.asarray(picture[None], jnp.float32) / 255
        wanted = np.asarray(jax.jit(alone.apply)({'params': own}, one)[0])[0]
        np.testing.assert_allclose(logits[row, place], wanted, rtol=1e-5, atol=1e-5)


def test_padding_behind_an_image_changes_nothing():
    net = model(tokenizer='ragged')
    columns = {'image': photos([(2, 3)]), 'label': np.zeros(1, np.int32)}
    parts = naflex.ragged_patches(4, 6).apply(columns, lambda k: np.zeros(1))
    longer = {name: np.zeros((1, 11, *parts[name].shape[2:]), np.int32) for name in naflex.PARTS}
    for name in naflex.PARTS:
        longer[name][:, :6] = parts[name]
    answers, params = [], None
    for one in (parts, longer):
        inputs = {name: jnp.asarray(one[name]) for name in naflex.PARTS}
        inputs['patches'] = inputs['patches'].astype(jnp.float32) / 255
        params = params or random_like(shapes_of(net, inputs))
        answers.append(np.asarray(jax.jit(net.apply)({'params': params}, inputs)[0]))
    assert (parts['segment'] == 1).all() and (longer['segment'][:, 6:] == 0).all()
    np.testing.assert_allclose(answers[0], answers[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('height, width, tokens', [
    (100, 100, 16), (400, 100, 16), (100, 1000, 20), (30, 40, 7), (1, 5000, 9), (64, 48, 12),
])  # fmt: skip
def test_grids_have_the_proportions_of_the_image_and_fit(height, width, tokens):
    rows, columns = naflex.grid_for(height, width, (8, 8), tokens)
    assert 1 <= rows * columns <= tokens
    wanted = math.log(height / width)
    best = min(
        abs(math.log(r / c) - wanted)
        for r in range(1, tokens + 1)
        for c in range(1, tokens // r + 1)
        if r * c > tokens * 0.5
    )
    assert abs(math.log(rows / columns) - wanted) <= best + 0.5
    assert rows * columns > tokens * 0.5


def test_a_row_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match='an image has 12 patches, a row only 10'):
        naflex.pack(photos([(3, 4)]), (4, 4), 10)


# Shapes that do not fit.


@pytest.mark.parametrize('stream, shape, parts', [
    (none(), (30, 32, 3), ('30x32 pixels do not divide into 4x4', 'of 30, 28 or 32 would')),
    (none(), (2, 8, 3), ('of 2, 4 would',)),
    (none(stride=(3, 3)), (12, 10, 3), ('every 3x3', 'of 12, 10 or 13 would')),
    (none(tokenizer='tubelets', tubelet=4), (6, 8, 8, 3), ('6 frames', 'take 4 or 8')),
])  # fmt: skip
def test_what_does_not_divide_says_what_would(stream, shape, parts):
    with pytest.raises(ValueError) as caught:
        tokenizers.grid_of(stream, shape)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize('variant, resnet, patch', [
    ('R50+B/16', (3, 4, 9), (1, 1)),
    pytest.param('R50+L/32', (3, 4, 6, 3), (1, 1), marks=pytest.mark.slow),
    ('R26+S/32', (2, 2, 2, 2), (1, 1)),
    ('R+Ti/32', (), (8, 8)),
    ('R26+B/64x32', (2, 2, 2, 2), (2, 1)),
])  # fmt: skip
def test_hybrids_by_name(variant, resnet, patch):
    fields = variants.parse(variant)
    assert fields['resnet'] == resnet and fields['tokenizer'] == 'resnet'
    net = make_vit(num_classes=10, **fields)
    params = state.abstract_params(net, (64, 64, 3))
    assert params['embedding']['kernel'].shape[:2] == patch


@pytest.mark.parametrize('variant, parts', [
    ('R26+S/16', ('R26 shrinks images by 32',)),
    ('R50+B/24', ('by 32 or 16', 'multiple')),
    ('R77+B/16', ("unknown ResNet 'R77'", 'R, R26, R50')),
])  # fmt: skip
def test_hybrids_that_there_are_not(variant, parts):
    with pytest.raises(UserError) as caught:
        variants.parse(variant)
    for part in parts:
        assert part in str(caught.value)


# Published numbers of parameters (vision_transformer's and timm's tables), millions.
HYBRIDS = {'R26+S/32': 36.43, 'R50+L/32': 328.99, 'R50+B/16': 98.95}


@pytest.mark.parametrize('variant', mostly_slow(HYBRIDS, 'R26+S/32'))
def test_hybrids_have_the_published_number_of_parameters(variant):
    size = 384 if variant == 'R50+B/16' else 224
    net = make_vit(1000, pool='cls', posemb='learned', posemb_prefix=1, **variants.parse(variant))
    found = trees.count(state.abstract_params(net, (size, size, 3)))
    assert found / 1e6 == pytest.approx(HYBRIDS[variant], abs=0.02 if size == 224 else 0.4)


# Every tokenizer with every pooling: costs, gradients, and how it lies on a mesh.


def all_models():
    for name, pooling in itertools.product(INPUTS, POOLS):
        if name == 'ragged' and pooling not in ('gap', 'map'):
            continue
        yield name, pooling


# Every tokenizer, every pooling, every fusion at least once.
OFTEN = [
    *((name, POOLS[i % 2 * 2]) for i, name in enumerate(INPUTS)),
    ('patches', 'cls'),
]


@pytest.mark.parametrize(
    'name, pooling, scan',
    mostly_slow(
        [(*one, False) for one in all_models()] + [(name, 'gap', True) for name in INPUTS],
        *((*one, False) for one in OFTEN),
        ('patches', 'gap', True),
    ),
)
def test_operations_and_tokens_are_those_of_the_trace(name, pooling, scan):
    net, inputs = combined(name, pooling, scan=scan)
    variables = {'params': state.abstract_params(net, inputs)}
    traced = jax.make_jaxpr(net.apply)(variables, example(inputs))
    assert flops.count(net.apply, variables, example(inputs)) == operations(traced) > 0
    _, extra = jax.eval_shape(net.apply, variables, example(inputs))
    shapes = {part: shape for part, (shape, _) in inputs.items()}
    assert extra['tokens'].shape[1] == net.sequence_length(shapes)


SPLIT = 2**9


@pytest.mark.parametrize('size', ['g', pytest.param('B', marks=pytest.mark.slow)])
@pytest.mark.parametrize('name', mostly_slow(INPUTS, 'patches', 'conv', 'words', 'ragged', 'cross'))
def test_no_large_array_lies_whole_on_every_device(name, size):
    width, depth, mlp_dim, heads = variants.SIZES[size]
    fields = {'width': width, 'depth': depth, 'mlp_dim': mlp_dim, 'num_heads': heads}
    # Between them these have all kinds of arrays.
    for pooling in ('gap', 'map') if name == 'ragged' else ('gap', 'cls_gap'):
        net, inputs = combined(name, pooling, scan=True, **fields)
        mesh = sharding.make_mesh(1, 4, 2)
        for path, leaf in trees.flatten(state.abstract_params(net, inputs)).items():
            spec = sharding.spec_for(path, leaf.shape, mesh, 2**16)
            if leaf.size >= 2**20:
                assert any(spec), f'{path} {leaf.shape} is not split'


FAST = {('cross', 'gap')}


@pytest.mark.parametrize(
    'name, pooling',
    [pytest.param(*one, marks=[] if one in FAST else [pytest.mark.slow]) for one in all_models()],
)
def test_gradients_are_finite_and_reach_every_parameter(name, pooling):
    net, inputs = combined(name, pooling, drop_path=0.1, dropout=0.1)
    batch = {
        n: jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, *s)), F32)
        if n in tokenizers.PICTURES
        else jnp.ones((2, *s), d)
        for n, (s, d) in inputs.items()
    }
    if 'tokens' in batch:
        batch['tokens'] = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 9)), jnp.int32)
    params = jax.tree.map(jnp.asarray, random_like(shapes_of(net, batch)))

    def loss(params):
        rngs = {'dropout': jax.random.key(0)}
        logits, _ = net.apply({'params': params}, batch, train=True, rngs=rngs)
        return (logits * jnp.arange(1.0, 6)[None]).sum()

    gradient = jax.jit(jax.grad(loss))(params)
    for path, leaf in trees.flatten(gradient).items():
        assert np.isfinite(leaf).all(), path
        # A bias of keys moves all logits of a query alike, which the softmax does not see.
        if not path.endswith('key/bias'):
            assert np.abs(leaf).max() > 0, path


@functools.cache
def meshes():
    return [sharding.make_mesh(1, 8, 1), sharding.make_mesh(2, 2, 2)]


@pytest.mark.parametrize(
    'name',
    [*(pytest.param(n, marks=pytest.mark.slow) for n in ('cct', 'tubelets', 'conv')), 'cross'],
)
@pytest.mark.slow
def test_a_mesh_changes_no_answer(name):
    net, inputs = combined(name, 'gap', scan=True, width=32, head_dim=16)
    rng = np.random.default_rng(0)
    batch = {
        n: rng.uniform(-1, 1, (8, *s)).astype(F32) if n in tokenizers.PICTURES
        else np.ones((8, *s), d)
        for n, (s, d) in inputs.items()
    }  # fmt: skip
    params = random_like(shapes_of(net, {n: jnp.asarray(x) for n, x in batch.items()}))
    plain = np.asarray(jax.jit(net.apply)({'params': params}, batch)[0])
    for mesh in meshes():
        shapes = jax.eval_shape(lambda: params)
        spread = placed(
            net,
            gather=sharding.gather_weights(mesh, shapes, SPLIT),
            constrain=sharding.constrain_batch(mesh),
        )
        with jax.set_mesh(mesh):
            where = sharding.shardings_for(params, mesh, SPLIT)
            assert any(s.spec != () for s in jax.tree.leaves(where))
            on_mesh = jax.tree.map(jax.device_put, params, where)
            given = jax.device_put(batch, sharding.batch_sharding(mesh))
            found = jax.jit(spread.apply)({'params': on_mesh}, given)[0]
        np.testing.assert_allclose(np.asarray(found), plain, rtol=2e-5, atol=2e-5)
