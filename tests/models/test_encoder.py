"""Options of the encoder, alone and together, against float64 NumPy."""

import functools
import itertools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gate import mostly_slow
from jax.test_util import check_grads
from scipy import special

from big_vit import trees
from big_vit.models import encoder, layers, positions
from big_vit.models.tokenizers import Stream
from big_vit.models.vit import make_vit, settings_of

SMALL = dict(patch_size=(4, 4), width=24, depth=2, mlp_dim=20, num_heads=2, num_classes=5)
IMAGE = (2, 8, 12, 3)
GRID = (2, 3)


@pytest.fixture(autouse=True, scope='module')
def full_precision():
    with jax.default_matmul_precision('highest'):
        yield


def model(**changes):
    return make_vit(**{**SMALL, 'dtype': jnp.float32, 'scan': False, **changes})


def settings(net):
    """All settings of a model by name, for the reference."""
    return SimpleNamespace(**settings_of(net), fusion=net.fusion)


def images(shape=IMAGE, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, shape), jnp.float32)


def random_params(net, inputs, seed=1):
    """Every parameter random, so that none can be left out unseen."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(net.init, jax.random.key(0), inputs)['params']

    def draw(name, leaf):
        value = rng.standard_normal(leaf.shape) * 0.3 + name.endswith(('scale', 'temperature'))
        return value.astype(np.float32)

    return trees.map_with_name(draw, shapes)


def apply(net, params, inputs, **more):
    return jax.device_get(jax.jit(functools.partial(net.apply, **more))({'params': params}, inputs))


# The reference: one example, one head, one token at a time where that is clearer.

ACTIVATIONS = {
    'gelu_tanh': lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    'gelu': lambda x: 0.5 * x * (1 + special.erf(x / np.sqrt(2))),
    'quick_gelu': lambda x: x / (1 + np.exp(-1.702 * x)),
    'relu': lambda x: np.maximum(x, 0),
    'silu': lambda x: x / (1 + np.exp(-x)),
}


def np_norm(x, p, net):
    if net.norm == 'rmsnorm':
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + net.norm_eps) * p['scale']
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + net.norm_eps) * p['scale'] + p['bias']


def np_turn(x, grid, prefix, theta):
    """RoPE as DINOv3 writes it: of each pair (i, i + half), by place and rate."""
    half, axes = x.shape[1] // 2, len(grid)
    each = half // axes
    turned = x.copy()
    for token in range(prefix, len(x)):
        place = np.unravel_index(token - prefix, grid)
        for axis in range(axes):
            centre = 2 * (place[axis] + 0.5) / grid[axis] - 1
            for k in range(each):
                angle = 2 * np.pi * centre / theta ** (k / each)
                a, b = axis * each + k, half + axis * each + k
                sin, cos = np.sin(angle), np.cos(angle)
                turned[token, a] = x[token, a] * cos - x[token, b] * sin
                turned[token, b] = x[token, b] * cos + x[token, a] * sin
    return turned


def np_bias(table, grid, prefix):
    """The relative biases of one head, [tokens, tokens]."""
    rows, columns = grid
    count = prefix + rows * columns
    found = np.zeros((count, count))
    for q in range(count):
        for k in range(count):
            if q < prefix and k < prefix:
                found[q, k] = table[-1]
            elif q < prefix:
                found[q, k] = table[-3]
            elif k < prefix:
                found[q, k] = table[-2]
            else:
                (qr, qc), (kr, kc) = divmod(q - prefix, columns), divmod(k - prefix, columns)
                row = (qr - kr + rows - 1) * (2 * columns - 1) + qc - kc + columns - 1
                found[q, k] = table[row]
    return found


def np_kernel(p):
    """A kernel with its correction, summed rank by rank."""
    kernel = np.array(p['kernel'])
    for i in range(p['lora_a'].shape[-1] if 'lora_a' in p else 0):
        kernel += np.multiply.outer(p['lora_a'][..., i], p['lora_b'][i])
    return kernel


def np_detr_positions(size, canvas, grid, width):
    """DETR's, number by number, of a picture at the top left of a canvas."""
    real = np.array(
        [[r * canvas[0] // grid[0] < size[0] and c * canvas[1] // grid[1] < size[1]
          for c in range(grid[1])] for r in range(grid[0])]
    )  # fmt: skip
    table, half = np.zeros((*grid, width)), width // 2
    for r, c in np.ndindex(grid):
        counts = real[: r + 1, c].sum(), real[r, : c + 1].sum()
        totals = real[:, c].sum(), real[r].sum()
        for axis in range(2):
            place = 2 * np.pi * counts[axis] / (totals[axis] + 1e-6)
            for i in range(half):
                angle = place / 10_000 ** (i // 2 * 2 / half)
                table[r, c, axis * half + i] = np.cos(angle) if i % 2 else np.sin(angle)
    return table.reshape(-1, width), real.reshape(-1)


def np_attention(x, memory, p, net, prefix=0, grid=GRID, mask=None, moved=0):
    to_itself = memory is x
    kernels = {name: np_kernel(p[name]) for name in ('query', 'key', 'value', 'out')}
    width = p['query']['kernel'].shape[2]
    out = np.zeros((len(x), x.shape[1]))
    for h in range(p['query']['kernel'].shape[1]):
        q, k, v = (
            y @ kernels[name][:, h] + (p[name]['bias'][h] if 'bias' in p[name] else 0)
            for name, y in (('query', x + moved), ('key', memory + moved), ('value', memory))
        )
        if net.qk_norm:
            q, k = np_norm(q, p['query_norm'], net), np_norm(k, p['key_norm'], net)
        if net.posemb == 'rope' and to_itself:
            q, k = (np_turn(y, grid, prefix, net.rope_theta) for y in (q, k))
        scores = q @ k.T * (p['temperature'][h] if net.lsa and to_itself else width**-0.5)
        if net.posemb == 'relative' and to_itself:
            scores = scores + np_bias(p['relative'][:, h], grid, prefix)
        if net.lsa and to_itself:
            np.fill_diagonal(scores, -np.inf)
        if mask is not None:
            scores = np.where(mask, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out += (weights / weights.sum(-1, keepdims=True)) @ v @ kernels['out'][h]
    return out + p['out']['bias']


def np_mlp(x, p, net):
    def dense(y, name):
        return y @ p[name]['kernel'] + p[name]['bias']

    if net.mlp == 'swiglu':
        return dense(ACTIVATIONS['silu'](dense(x, 'Dense_gate')) * dense(x, 'Dense_0'), 'Dense_1')
    return dense(ACTIVATIONS[net.activation](dense(x, 'Dense_0')), 'Dense_1')


def np_blocks(x, p, net, depth, prefix=0, mask=None, memory=None, moved=0):
    def before(x, name):
        return x if net.post_norm else np_norm(x, b[name], net)

    def after(x, name):
        return np_norm(x, b[name], net) if net.post_norm else x

    def scaled(y, number):
        return y * b[f'LayerScale_{number}']['scale'] if net.layer_scale else y

    for i in range(depth):
        b = p[f'encoderblock_{i}']
        y = before(x, 'LayerNorm_0')
        attention = b['MultiHeadDotProductAttention_0']
        z = np_attention(y, y, attention, net, prefix, mask=mask, moved=moved)
        x = after(x + scaled(z, 0), 'LayerNorm_0')
        number = 1
        if memory is not None:
            z = np_norm(x, b['LayerNorm_2'], net)
            x = x + scaled(np_attention(z, memory, b['CrossAttention_0'], net), 1)
            number = 2
        y = y if net.parallel else before(x, 'LayerNorm_1')
        x = after(x + scaled(np_mlp(y, b['MlpBlock_0'], net), number), 'LayerNorm_1')
    return x


def wide(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def np_patches(image, p, patch=(4, 4), stride=None):
    (ph, pw), (sh, sw) = patch, stride or patch
    image = np.asarray(image, np.float64)
    height, width = image.shape[:2]
    tokens = [
        np.tensordot(image[r : r + ph, c : c + pw], p['kernel'], 3)
        for r in range(0, height - ph + 1, sh)
        for c in range(0, width - pw + 1, sw)
    ]
    return np.stack(tokens) + p.get('bias', 0)


def np_vit(params, image, net):
    """Logits of one image."""
    net, p = settings(net), wide(params)
    x = np_patches(image, p['embedding'])
    before = [p['cls'][0]] if 'cls' in p else []
    before += [p['registers'][0]] if 'registers' in p else []
    before = np.concatenate(before) if before else np.zeros((0, net.width))
    if net.posemb == 'learned':
        table = p['pos_embedding'][0]
        x = x + table[net.posemb_prefix :]
        before[: net.posemb_prefix] += table[: net.posemb_prefix]
    elif net.posemb.startswith('sincos'):
        table = (
            np_detr_positions(IMAGE[1:3], IMAGE[1:3], GRID, net.width)
            if net.posemb == 'sincos2d_detr'
            else positions.sincos(GRID, net.width, net.posemb)
        )[0]
        x = x + (0 if net.posemb_per_block else table)
    moved = 0
    if net.posemb_per_block:
        moved = np.concatenate([np.zeros_like(before), table])
    x = np.concatenate([before, x])
    if net.pre_norm:
        x = np_norm(x, p['pre_norm'], net)
    prefix, t = len(before), p['Transformer']
    x = np_blocks(x, t, net, net.depth, prefix, moved=moved)
    if not (net.norm_after_pool or net.post_norm):
        x = np_norm(x, t['encoder_norm'], net)
    patches = x[prefix:]
    if net.pool == 'seq':
        scores = (patches @ p['pool']['kernel'])[:, 0]
        weights = np.exp(scores - scores.max())
        pooled = weights / weights.sum() @ patches
    elif net.pool == 'map':
        h = p['MAPHead_0']
        y = np_attention(h['probe'][0], x, h['MultiHeadDotProductAttention_0'], net)
        pooled = (y + np_mlp(np_norm(y, h['LayerNorm_0'], net), h['MlpBlock_0'], net))[0]
    else:
        mean = patches.mean(0)
        pooled = {
            'gap': mean,
            'cls': x[0],
            'cls_gap': np.concatenate([x[0], mean]),
            'cls_dist': x[:2],
        }[net.pool]
    if net.norm_after_pool:
        pooled = np_norm(pooled, p['encoder_norm'], net)
    if net.representation:
        pooled = np.tanh(pooled @ p['pre_logits']['kernel'] + p['pre_logits']['bias'])
    if not net.num_classes:
        return pooled

    def head(y, name):
        return y @ p[name]['kernel'] + p[name].get('bias', 0)

    if net.pool == 'cls_dist':
        return (head(pooled[0], 'head') + head(pooled[1], 'head_dist')) / 2
    return head(pooled, 'head')


OPTIONS = {
    'rmsnorm': dict(norm='rmsnorm', norm_eps=1e-2),
    'eps': dict(norm_eps=0.1),
    'gelu': dict(activation='gelu'),
    'quick_gelu': dict(activation='quick_gelu', pool='map'),
    'relu': dict(activation='relu'),
    'silu': dict(activation='silu'),
    'swiglu': dict(mlp='swiglu', pool='map'),
    'head_dim': dict(head_dim=7),
    'no biases': dict(qkv_bias=False, embedding_bias=False, head_bias=False),
    'no bias of keys': dict(key_bias=False),
    'qk_norm': dict(qk_norm=True, norm_eps=1e-2),
    'layer_scale': dict(layer_scale=0.1),
    'parallel': dict(parallel=True),
    'parallel and scaled': dict(parallel=True, layer_scale=0.1, norm='rmsnorm', qk_norm=True),
    'pre_norm': dict(pre_norm=True, pool='cls'),
    'registers': dict(registers=3, pool='cls'),
    'registers without a class token': dict(registers=2),
    'class token with gap': dict(class_token=True),
    'a position for the class token': dict(
        posemb='learned', posemb_prefix=1, pool='cls', registers=2
    ),
    'distilled': dict(posemb='learned', posemb_prefix=2, pool='cls_dist', registers=1),
    'cls_gap': dict(pool='cls_gap', registers=1),
    'cls_gap normed after': dict(pool='cls_gap', norm_after_pool=True),
    'norm_after_pool': dict(norm_after_pool=True, class_token=True),
    'seq': dict(pool='seq', class_token=True),
    'representation': dict(representation=7, pool='cls'),
    'no head': dict(num_classes=0),
    'rope': dict(posemb='rope', head_dim=8),
    'rope behind a prefix': dict(posemb='rope', rope_theta=7.0, registers=2, pool='cls'),
    'relative': dict(posemb='relative'),
    'relative behind a prefix': dict(posemb='relative', registers=1, pool='cls'),
    'MAE positions': dict(posemb='sincos2d_mae'),
    'no positions': dict(posemb='none'),
    'post_norm': dict(post_norm=True, layer_scale=0.1),
    'DETR': dict(posemb='sincos2d_detr', posemb_per_block=True, post_norm=True, class_token=True),
    'DETR positions': dict(posemb='sincos2d_detr'),
    'positions in each block': dict(posemb_per_block=True),
    'lsa': dict(lsa=True),
    'xla': dict(attention='xla'),
    'lora': dict(lora=3, pool='map'),
}


# A program each; the gate has those that share least with the others.
FAST = (
    'rmsnorm', 'swiglu', 'head_dim', 'no biases', 'parallel and scaled', 'pre_norm', 'seq',
    'distilled', 'DETR', 'rope behind a prefix', 'relative behind a prefix', 'lsa', 'lora',
)  # fmt: skip


@pytest.mark.parametrize(
    'name',
    [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in OPTIONS],
)
def test_options_are_what_their_papers_say(name):
    net = model(depth=1, **OPTIONS[name])
    image = images()
    params = random_params(net, image)
    logits, _ = apply(net, params, image)
    wanted = np.stack([np_vit(params, one, net) for one in image])
    np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-5)
    # Where the plain model has the same parameters, it must answer otherwise.
    kept = {key: vars(settings(net))[key] for key in ('pool', 'posemb', 'registers')}
    plain = model(depth=1, **kept)
    shapes = jax.eval_shape(plain.init, jax.random.key(0), image)['params']
    if jax.tree.map(np.shape, shapes) == jax.tree.map(np.shape, params) and plain != net:
        changed = np.abs(apply(plain, params, image)[0] - logits).max()
        assert changed < 1e-5 if name == 'xla' else changed > 8e-5


@pytest.mark.parametrize(
    'name',
    [
        'rope behind a prefix',
        *mostly_slow(('relative', 'swiglu', 'lsa', 'parallel and scaled')),
    ],
)
def test_options_are_the_same_scanned_and_with_remat(name):
    net = model(**OPTIONS[name])
    image = images()
    params = jax.tree.map(jnp.asarray, random_params(net, image))

    def loss_of(net):
        def loss(params):
            logits = net.apply({'params': params}, image)[0]
            return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array([1, 3])).sum()

        return jax.jit(jax.value_and_grad(loss))

    loss, gradient = loss_of(net)(params)
    scanned = model(**{**OPTIONS[name], 'scan': True, 'remat': 'names'})
    found, other = loss_of(scanned)(encoder.stack_blocks(params))
    np.testing.assert_allclose(found, loss, rtol=1e-6)
    flat, wanted = trees.flatten(encoder.unstack_blocks(other)), trees.flatten(gradient)
    assert flat.keys() == wanted.keys()
    for key in flat:
        np.testing.assert_allclose(flat[key], wanted[key], rtol=2e-4, atol=1e-6, err_msg=key)
        assert np.abs(wanted[key]).max() > 0 or key.endswith(('key/bias', 'relative')), key


# Looking inside.


@pytest.mark.parametrize('scan', [True, False])
def test_what_is_captured_is_what_was_computed(scan):
    net = model(scan=scan, pool='cls', registers=1, lsa=scan)
    image = images()
    params = random_params(net, image)
    plain, extra = apply(net, params, image)
    logits, seen = apply(net, params, image, capture=('blocks', 'attention'))
    np.testing.assert_allclose(logits, plain, rtol=1e-6, atol=1e-6)
    assert extra.keys() == {'tokens', 'pre_logits'}
    assert seen['blocks'].shape == (2, 2, 8, 24) and seen['attention'].shape == (2, 2, 2, 8, 8)
    last = np_norm(seen['blocks'][-1], wide(params)['Transformer']['encoder_norm'], settings(net))
    np.testing.assert_allclose(seen['tokens'], last, atol=2e-5)
    np.testing.assert_allclose(seen['attention'].sum(-1), 1, atol=1e-6)
    own = np.diagonal(seen['attention'], axis1=-2, axis2=-1)
    assert (own == 0).all() == scan, 'locality attention never looks at itself'


def test_captured_attention_is_that_of_the_reference():
    net = model(depth=1, posemb='none')
    image = images()
    params = random_params(net, image)
    _, seen = apply(net, params, image, capture=('attention',))
    p = wide(params)
    b = p['Transformer']['encoderblock_0']
    x = np_norm(np_patches(image[0], p['embedding']), b['LayerNorm_0'], settings(net))
    a = b['MultiHeadDotProductAttention_0']
    q, k = (np.einsum('nd,dhf->hnf', x, a[n]['kernel']) for n in ('query', 'key'))
    q, k = q + a['query']['bias'][:, None], k + a['key']['bias'][:, None]
    scores = np.einsum('hqf,hkf->hqk', q, k) / math.sqrt(12)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(seen['attention'][0, 0], weights, atol=1e-6)


# Dropping branches and patches.


@pytest.mark.parametrize('scan', [True, False])
def test_drop_path_leaves_out_whole_branches_of_the_later_blocks_more(scan):
    """Blocks that add 1 to all tokens: what comes out counts how many were not left out."""
    depth, rate = 3, 0.5
    net = model(
        depth=depth, drop_path=rate, scan=scan, posemb='none', num_classes=0, norm_after_pool=True
    )
    image = images((400, 4, 4, 3))
    params = jax.tree.map(np.zeros_like, random_params(net, image[:1]))
    encoder = params['Transformer']
    blocks = (
        [encoder['encoderblock']] if scan else [encoder[f'encoderblock_{i}'] for i in range(depth)]
    )
    for i, block in enumerate(blocks):
        bias = block['MlpBlock_0']['Dense_1']['bias']
        bias[..., 0] = 10.0 ** np.arange(depth) if scan else 10.0**i
    params = jax.tree.map(jnp.asarray, params)
    out = jax.jit(
        lambda key: net.apply({'params': params}, image, train=True, rngs={'dropout': key},
                              capture=('blocks',))[1]['blocks']
    )(jax.random.key(0))  # fmt: skip
    last = np.asarray(out)[-1, :, 0, 0]
    scales = [10.0**i / (1 - rate * i / (depth - 1)) for i in range(depth)]
    kept = [np.zeros(len(last), bool) for _ in range(depth)]
    for i in reversed(range(depth)):
        kept[i] = last > scales[i] / 2
        last = last - kept[i] * scales[i]
    np.testing.assert_allclose(last, 0, atol=1e-3)
    for i in range(depth):
        wanted = 1 - rate * i / (depth - 1)
        assert kept[i].mean() == pytest.approx(wanted, abs=4 * math.sqrt(0.25 / 400)), i
    assert abs(np.corrcoef(kept[1], kept[2])[0, 1]) < 0.25


def test_drop_path_is_off_in_evaluation():
    net = model(drop_path=0.9)
    image = images()
    params = random_params(net, image)
    np.testing.assert_array_equal(apply(net, params, image)[0], apply(model(), params, image)[0])


@pytest.mark.parametrize('posemb', ['learned', 'rope'])
def test_patch_dropout_is_the_model_of_the_patches_that_are_left(posemb):
    """Every result is that of some four of the six patches, and not always of the same."""
    net = model(patch_dropout=1 / 3, posemb=posemb, head_dim=8)
    image = images()[:1]
    params = random_params(net, image)

    def of(kept):
        """By masking the others out in the reference."""
        p, own = wide(params), settings(net)
        x = np_patches(np.asarray(image[0]), p['embedding'])
        x = x + (p['pos_embedding'][0] if posemb == 'learned' else 0)
        mask = np.zeros((6, 6), bool)
        mask[:, list(kept)] = True
        x = np_blocks(x, p['Transformer'], own, own.depth, mask=mask)
        x = np_norm(x, p['Transformer']['encoder_norm'], own)[list(kept)]
        return x.mean(0) @ p['head']['kernel'] + p['head']['bias']

    params = jax.tree.map(jnp.asarray, params)
    possible = np.stack([of(kept) for kept in itertools.combinations(range(6), 4)])
    step = jax.jit(lambda key: net.apply({'params': params}, image, train=True,
                                         rngs={'dropout': key})[0])  # fmt: skip
    chosen = set()
    for seed in range(12):
        found = np.asarray(step(jax.random.key(seed)))[0]
        distance = np.abs(possible - found).max(1)
        assert distance.min() < 2e-5
        chosen.add(int(distance.argmin()))
    assert len(chosen) > 5


# Several streams.

STREAMS = (
    Stream('look', patch_size=(4, 4), posemb='learned', depth=1),
    Stream('read', tokenizer='words', vocab=7, posemb='learned'),
)


def two(seed=0):
    rng = np.random.default_rng(seed)
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.uint8)
    return {
        'image': images(),
        'tokens': rng.integers(0, 7, (2, 5)).astype(np.int32),
        'text_mask': mask,
    }


def np_streams(params, inputs, row, net):
    # Without positions of its one input: streams have theirs.
    net, p = SimpleNamespace(**vars(settings(net)), posemb='none'), wide(params)
    see, read = p['look'], p['read']
    x = np_patches(inputs['image'][row], see['embedding']) + see['pos_embedding'][0]
    x = np_blocks(x + see['kind'][0], see['Transformer'], net, 1)
    x = np_norm(x, see['Transformer']['encoder_norm'], net)
    words = read['word_embedding'][inputs['tokens'][row]] + read['pos_embedding'][0]
    words = (words + read['kind'][0])[inputs['text_mask'][row] > 0]
    t = p['Transformer']
    if net.fusion == 'cross':
        x = np_blocks(x, t, net, net.depth, memory=words)
    elif net.fusion == 'concat':
        x = np_blocks(np.concatenate([x, words]), t, net, net.depth)
    else:
        every = np_norm(np.concatenate([x, words]), p['LayerNorm_1'], net)
        latents = p['latents'][0]
        query = np_norm(latents, p['LayerNorm_0'], net)
        x = latents + np_attention(query, every, p['CrossAttention_0'], net)
        x = np_blocks(x, t, net, net.depth)
    x = np_norm(x, t['encoder_norm'], net)
    return x.mean(0) @ p['head']['kernel'] + p['head']['bias']


@pytest.mark.parametrize('fusion', mostly_slow(['concat', 'cross', 'latents'], 'concat', 'cross'))
def test_streams_meet_as_the_reference_says_and_padding_does_not_count(fusion):
    net = model(streams=STREAMS, fusion=fusion, latents=3)
    inputs = two()
    params = random_params(net, inputs)
    logits, _ = apply(net, params, inputs)
    for row in range(2):
        wanted = np_streams(params, inputs, row, net)
        np.testing.assert_allclose(logits[row], wanted, rtol=2e-5, atol=2e-5)
    other = {**inputs, 'tokens': np.where(inputs['text_mask'] > 0, inputs['tokens'], 6)}
    np.testing.assert_allclose(apply(net, params, other)[0], logits, atol=1e-6)


@pytest.mark.parametrize(
    'fusion', ['cross', *(pytest.param(n, marks=pytest.mark.slow) for n in ('concat', 'latents'))]
)
def test_streams_are_the_same_scanned(fusion):
    inputs = two()
    nets = [model(streams=STREAMS, fusion=fusion, latents=3, scan=s) for s in (False, True)]
    params = random_params(nets[0], inputs)
    stacked = encoder.stack_blocks(params)
    wanted = jax.eval_shape(nets[1].init, jax.random.key(0), inputs)['params']
    assert jax.tree.map(np.shape, stacked) == jax.tree.map(np.shape, wanted)
    found = apply(nets[1], stacked, inputs)[0]
    np.testing.assert_allclose(found, apply(nets[0], params, inputs)[0], rtol=1e-5, atol=1e-5)
    back = trees.flatten(encoder.unstack_blocks(stacked))
    assert back.keys() == trees.flatten(params).keys()


# Derivatives that are written out.


def test_the_derivative_of_the_rms_norm_is_that_of_the_formula():
    keys = jax.random.split(jax.random.key(0), 3)
    x, scale = jax.random.normal(keys[0], (2, 5, 16)), jax.random.normal(keys[1], (16,))
    g = jax.random.normal(keys[2], x.shape)

    def plain(x, scale):
        root = jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-3)
        return x / root * scale[None, None]

    def ours(x, scale):
        return layers.rms_norm(x, scale, 1e-3, jnp.float32)

    value, back = jax.vjp(ours, x, scale)
    wanted, plain_back = jax.vjp(plain, x, scale)
    for a, b in zip((value, *back(g)), (wanted, *plain_back(g)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    check_grads(jax.jit(ours), (x, scale), order=1, modes=['rev'], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.slow
def test_merged_corrections_answer_the_same_in_a_plain_model(scan):
    net, plain = model(depth=2, lora=2, scan=scan), model(depth=2, scan=scan)
    image = images()
    params = random_params(net, image)
    wanted, _ = apply(net, params, image)
    merged = encoder.merge_lora(params)
    shapes = jax.eval_shape(plain.init, jax.random.key(0), image)['params']
    assert jax.tree.map(np.shape, merged) == jax.tree.map(np.shape, shapes)
    np.testing.assert_allclose(apply(plain, merged, image)[0], wanted, rtol=1e-5, atol=1e-5)
    dropped = {n: x for n, x in trees.flatten(params).items() if '/lora_' not in n}
    assert np.abs(apply(plain, trees.unflatten(dropped), image)[0] - wanted).max() > 1e-2


@pytest.mark.parametrize(
    'changes',
    mostly_slow(
        [
            {'posemb': 'rope', 'class_token': True, 'drop_path': 0.5},
            {'scan': True, 'remat': 'names'},
            {'qk_norm': True, 'parallel': True, 'posemb': 'learned', 'registers': 2},
        ],
        {'posemb': 'rope', 'class_token': True, 'drop_path': 0.5},
    ),
)
def test_sequences_side_by_side_are_as_by_themselves(changes):
    """Values and gradients of six images, whose sequences lie in rows of several."""
    x = images((6, 8, 12, 3))
    nets = [model(**changes, pack=pack) for pack in (0, 1)]
    params = random_params(nets[0], x)

    def loss(params, net):
        out, _ = net.apply({'params': params}, x, train=True, rngs={'dropout': jax.random.key(4)})
        return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)), out

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    ((_, alone), wanted), ((_, packed), found) = (step(params, net) for net in nets)
    np.testing.assert_allclose(packed, alone, rtol=2e-5, atol=2e-5)
    for (name, a), b in zip(trees.flatten(found).items(), jax.tree.leaves(wanted), strict=True):
        # Biases of keys have no gradient but what rounding makes.
        scale = np.inf if name.endswith(('key/bias', 'key_norm/bias')) else np.abs(b).max()
        np.testing.assert_allclose(a / scale, b / scale, atol=3e-5, err_msg=name)
    tokens = nets[0].sequence_length({'image': x.shape[1:]})
    rows = f'[1,{6 * tokens},24]'
    assert 6 * tokens <= 128 and rows in str(jax.make_jaxpr(lambda p: loss(p, nets[1]))(params))


@pytest.mark.parametrize('scan', [False, True])
def test_outputs_that_are_not_wanted_are_left_out(scan):
    config = encoder.EncoderConfig(width=8, depth=2, mlp_dim=12, num_heads=2, scan=scan)
    whole, first = encoder.Encoder(config), encoder.Encoder(config, outputs=3)
    x = images((2, 7, 8))
    params = random_params(first, x)
    # The same parameters, whatever is wanted.
    assert trees.flatten(params).keys() == trees.flatten(random_params(whole, x)).keys()
    wanted, _ = apply(whole, params, x)
    found, _ = apply(first, params, x)
    np.testing.assert_allclose(found, wanted[:, :3], rtol=1e-5, atol=1e-5)
