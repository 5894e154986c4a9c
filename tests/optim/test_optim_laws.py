"""Each optimizer against its paper, written in NumPy float64 for unrolled layers.

The same parameters are updated unrolled, scanned, and scanned on eight devices: what a law
does to one layer must not depend on how layers are stored.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gate import mostly_slow

from big_vit import sharding, trees
from big_vit.config import schema
from big_vit.models import encoder, vit
from big_vit.optim import clipping, factory, per_layer, schedule_free, schedules

STEPS, CLIP = 5, 20.0
BLOCK = 'Transformer/encoderblock_{}/'


@functools.cache
def shapes(width):
    block = {
        'MultiHeadDotProductAttention_0/query/kernel': (width, 2, width // 2),
        'MultiHeadDotProductAttention_0/query/bias': (2, width // 2),
        'MultiHeadDotProductAttention_0/out/kernel': (2, width // 2, width),
        'MlpBlock_0/Dense_0/kernel': (width, 2 * width),
        'LayerNorm_0/scale': (width,),
    }
    return {
        **{BLOCK.format(i) + name: shape for i in range(2) for name, shape in block.items()},
        'embedding/kernel': (4, 4, 3, width),
        'pos_embedding': (1, 40, width),
        'head/kernel': (width, 10),
        'head/bias': (10,),
    }


def rows(name):
    """Input axes of a kernel in its unrolled form."""
    return {'out': 2, 'embedding': 3}.get(name.split('/')[-2], 1)


def is_kernel(name):
    return name.endswith('kernel')


def decay_of(name):
    return 0.1 if is_kernel(name) else 0.0


FACTORS = {'embedding': 0.125, 'encoderblock_0': 0.25, 'encoderblock_1': 0.5}


def factor_of(name):
    return next((f for part, f in FACTORS.items() if part in name), 1.0)


def draw(seed, width, scale=1.0):
    rng = np.random.default_rng(seed)
    # Layers of different sizes: a norm over all of a stack would show.
    return {
        name: np.float32(rng.standard_normal(shape) * scale * (4 if 'block_1' in name else 1))
        for name, shape in shapes(width).items()
    }


SCHEDULE = schedules.make('cosine', peak=0.02, total_steps=50, warmup_steps=3)


def rate_at(step):
    share = (step - 3) / 47
    return 0.02 * (step / 3 if step < 3 else 0.5 * (1 + math.cos(math.pi * share)))


# The laws: (memory of one parameter, its name, w, g, rate, factor, decay, t) -> new w.


def moment(s, key, value, b):
    s[key] = b * s.get(key, 0.0) + (1 - b) * value
    return s[key]


def adam_direction(s, g, t, b1, b2, eps):
    m = moment(s, 'm', g, b1) / (1 - b1**t)
    return m / (np.sqrt(moment(s, 'v', g * g, b2) / (1 - b2**t)) + eps)


def np_adam(s, name, w, g, rate, factor, decay, t):
    return w - rate * factor * adam_direction(s, g + decay * w, t, 0.9, 0.999, 1e-8)


def np_adamw(s, name, w, g, rate, factor, decay, t):
    return w - rate * factor * (adam_direction(s, g, t, 0.9, 0.999, 1e-8) + decay * w)


def np_nadamw(s, name, w, g, rate, factor, decay, t):
    m, v = moment(s, 'm', g, 0.9), moment(s, 'v', g * g, 0.999)
    ahead = 0.9 * m / (1 - 0.9 ** (t + 1)) + 0.1 * g / (1 - 0.9**t)
    return w - rate * factor * (ahead / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + decay * w)


def np_sgd(s, name, w, g, rate, factor, decay, t):
    s['v'] = 0.9 * s.get('v', 0.0) + g
    return w - rate * factor * (s['v'] + decay * w)


def np_lion(s, name, w, g, rate, factor, decay, t):
    direction = np.sign(0.9 * s.get('m', 0.0) + 0.1 * g)
    moment(s, 'm', g, 0.99)
    return w - rate * factor * (direction + decay * w)


def trusted(w):
    return max(np.linalg.norm(w), 0.01 * math.sqrt(w.size))


def np_lars(s, name, w, g, rate, factor, decay, t):
    local = 1.0
    if not name.endswith(('bias', 'scale')):
        size = trusted(w)
        local = 0.001 * size / (np.linalg.norm(g) + decay * size)
    s['v'] = 0.9 * s.get('v', 0.0) + rate * factor * local * (g + decay * w)
    return w - s['v']


def np_lamb(s, name, w, g, rate, factor, decay, t):
    update = adam_direction(s, g, t, 0.9, 0.999, 1e-6) + decay * w
    if not name.endswith(('bias', 'scale')):
        update = update * trusted(w) / np.linalg.norm(update)
    return w - rate * factor * update


def factored_direction(s, name, g, t, smallest, cap):
    b2 = min(cap, 1 - t**-0.8)
    square = g * g + 1e-30
    if is_kernel(name):
        matrix = square.reshape(math.prod(g.shape[: rows(name)]), -1)
        if min(matrix.shape) >= smallest:
            row, column = moment(s, 'r', matrix.mean(1), b2), moment(s, 'c', matrix.mean(0), b2)
            return g / np.sqrt(np.outer(row, column) / row.mean()).reshape(g.shape)
    return g / np.sqrt(moment(s, 'v', square, b2))


def np_adafactor_vit(s, name, w, g, rate, factor, decay, t):
    m = moment(s, 'm', factored_direction(s, name, g, t, 32, 0.999), 0.9)
    return w - rate * factor * (m + decay * w)


def np_adafactor(s, name, w, g, rate, factor, decay, t):
    update = factored_direction(s, name, g, t, 128, 1.0)
    update = update / max(1.0, np.sqrt(np.mean(update**2)))
    update = update * max(np.sqrt(np.mean(w**2)), 1e-3)
    return w - rate * factor * (update + decay * w)


def newton_schulz(x):
    """Five quintic steps towards the nearest orthogonal matrix (Jordan 2024)."""
    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.T).T
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def np_muon(s, name, w, g, rate, factor, decay, t):
    if not (is_kernel(name) and 'block' in name):
        return np_adamw(s, name, w, g, rate, factor, decay, t)
    m = moment(s, 'm', g, 0.95)
    ahead = 0.95 * m / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
    matrix = ahead.reshape(math.prod(g.shape[: rows(name)]), -1)
    update = 0.2 * math.sqrt(max(matrix.shape)) * newton_schulz(matrix).reshape(g.shape)
    return w - rate * factor * (update + decay * w)


def np_schedule_free_adamw(s, name, w, g, rate, factor, decay, t):
    """`w` is y; s['x'] is what is evaluated."""
    z, x = s.get('z', w), s.get('x', w)
    direction = g / (np.sqrt(moment(s, 'v', g * g, 0.999) / (1 - 0.999**t)) + 1e-8)
    s['z'] = z - rate * factor * (direction + decay * w)
    s['largest'] = max(s.get('largest', 0.0), rate)
    s['weights'] = s.get('weights', 0.0) + s['largest'] ** 2
    share = s['largest'] ** 2 / s['weights']
    s['x'] = (1 - share) * x + share * s['z']
    return 0.1 * s['z'] + 0.9 * s['x']


# Widths at which some matrices are factored, and some not.
REFERENCES = {
    'sgd': (np_sgd, 8),
    'adam': (np_adam, 8),
    'adamw': (np_adamw, 8),
    'nadamw': (np_nadamw, 8),
    'adafactor': (np_adafactor, 128),
    'adafactor_vit': (np_adafactor_vit, 40),
    'lars': (np_lars, 8),
    'lamb': (np_lamb, 8),
    'lion': (np_lion, 8),
    'muon': (np_muon, 8),
    'schedule_free_adamw': (np_schedule_free_adamw, 8),
}
MINE = [name for name in factory.LAWS if name in REFERENCES]
# Those whose update of an entry depends on the rest of its layer.
PER_LAYER = {'adafactor', 'adafactor_vit', 'lars', 'lamb', 'muon'}


def form_of(flat, scanned):
    tree = trees.unflatten(flat)
    return jax.tree.map(jnp.asarray, encoder.stack_blocks(tree) if scanned else tree)


def unrolled(tree):
    return trees.flatten(encoder.unstack_blocks(jax.device_get(tree)))


def make(name, params, clip=CLIP):
    flat = trees.flatten(params)
    both = tuple(FACTORS[f'encoderblock_{i}'] for i in range(2))
    law = factory.LAWS[name](**({'mu_dtype': 'float32'} if name == 'adafactor_vit' else {}))
    return factory.make(
        law,
        SCHEDULE,
        decay_factors={n: decay_of(n) for n in flat},
        lr_factors={n: both if 'encoderblock/' in n else factor_of(n) for n in flat},
        clip=clip,
    )


def updater(optimizer):
    def update(params, state, gradients, step):
        updates, state = optimizer.update(gradients, state, params, step=step)
        return jax.tree.map(jnp.add, params, updates), state

    return jax.jit(update)


def gradients_at(step, width):
    return draw(step, width, scale=0.1 if step % 2 else 2.0)  # Below and above the clip.


@functools.cache
def expected(name):
    """(parameters of each step, memory) by the reference."""
    law, width = REFERENCES[name]
    now = {n: w.astype(np.float64) for n, w in draw(0, width).items()}
    memory, history = {n: {} for n in now}, []
    for t in range(1, STEPS + 1):
        wide = {n: g.astype(np.float64) for n, g in gradients_at(t, width).items()}
        norm = math.sqrt(sum(np.square(g).sum() for g in wide.values()))
        limit = min(1.0, CLIP / norm)
        now = {
            n: law(memory[n], n, w, wide[n] * limit, rate_at(t), factor_of(n), decay_of(n), t)
            for n, w in now.items()
        }
        history.append(now)
    return history, memory


def compare(found, wanted, start, tolerance=2e-5):
    """Relative to how far each parameter has come."""
    assert found.keys() == wanted.keys()
    for n, value in found.items():
        moved = np.abs(wanted[n] - start[n]).max()
        assert moved > 0, n
        limit = tolerance * moved + 4e-7 * np.abs(start[n]).max()
        np.testing.assert_allclose(value, wanted[n], rtol=0, atol=limit * STEPS, err_msg=n)


@pytest.fixture(autouse=True, scope='module')
def full_precision():
    with jax.default_matmul_precision('highest'):
        yield


def test_every_optimizer_of_the_schema_has_a_law():
    for name in factory.LAWS:
        assert {f'optim.{key}' for key in factory.defaults(name)} <= schema.SCHEMA.keys()


# Scanned, a law that is of each entry alone has the same path.
@pytest.mark.parametrize(
    'scanned, name',
    mostly_slow(
        [(scanned, name) for scanned in (False, True) for name in MINE],
        *((name in PER_LAYER, name) for name in MINE),
    ),
)
def test_a_law_is_its_numpy_reference_however_layers_are_stored(name, scanned):
    history, memory = expected(name)
    width = REFERENCES[name][1]
    start = draw(0, width)
    params = form_of(start, scanned)
    optimizer = make(name, params)
    state, update = jax.jit(optimizer.init)(params), updater(optimizer)
    abstract_state = jax.eval_shape(optimizer.init, params)
    for step, wanted in enumerate(history, start=1):
        params, state = update(params, state, form_of(gradients_at(step, width), scanned), step)
        compare(unrolled(params), wanted, start)
        same = jax.tree.map(
            lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), abstract_state, state
        )
        assert jax.tree.all(same), 'a type that changes compiles again'
    assert update._cache_size() == 1
    averaged = schedule_free.evaluation_weights(state, params)
    if name == 'schedule_free_adamw':
        compare(unrolled(averaged), {n: s['x'] for n, s in memory.items()}, start, 1e-4)
    else:
        assert averaged is None


@pytest.mark.parametrize('name', mostly_slow(MINE, 'muon'))
def test_eight_devices_make_the_update_of_one(name):
    """On a mesh where everything that can be is split, from the state that one update leaves."""
    width = REFERENCES[name][1]
    params = form_of(draw(0, width), True)
    optimizer = make(name, params)
    update = updater(optimizer)
    state = jax.jit(optimizer.init)(params)
    mesh = sharding.make_mesh(2, 2, 2)
    where = sharding.shardings_for((params, state), mesh)
    sharding.check_spread((params, state), where, mesh, 0, 0.1)
    spread = jax.jit(update, out_shardings=where)
    here = there = (params, state)
    with jax.set_mesh(mesh):
        there = jax.device_put(there, where)
        gradients = form_of(gradients_at(2, width), True)
        here, there = update(*here, gradients, 2), spread(*there, gradients, 2)
    split = [leaf for leaf in jax.tree.leaves(there) if not leaf.sharding.is_fully_replicated]
    assert len(split) > 5
    for part, other in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_allclose(part, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', MINE)
def test_arrays_of_the_state_follow_their_parameter(name):
    params = form_of(draw(0, REFERENCES[name][1]), True)
    abstract_state = trees.flatten(jax.eval_shape(make(name, params).init, params))
    shape_of = {n: leaf.shape for n, leaf in trees.flatten(params).items()}
    mesh = sharding.make_mesh(1, 8, 1)
    for path, leaf in abstract_state.items():
        own = [n for n in shape_of if path.endswith('/' + n)]
        if leaf.ndim == 0 or path.endswith('ns_coeffs'):
            continue
        (parameter,) = own
        if leaf.shape == shape_of[parameter]:
            wanted = sharding.spec_for(parameter, leaf.shape, mesh)
            assert sharding.spec_for(path, leaf.shape, mesh) == wanted
        else:
            assert math.prod(leaf.shape) <= 2 * 256, 'a vector for each layer'
        if re.search('v_(row|col)/', path):
            assert sharding.spec_for(path, leaf.shape, mesh) == jax.P()


# How many parameters' worth of bytes each keeps, as docs/optimizers.md says.
STATE = {
    'sgd': 1, 'adam': 2, 'adamw': 2, 'nadamw': 2, 'adafactor': 0, 'adafactor_vit': 0.5, 'lars': 1,
    'lamb': 2, 'lion': 1, 'muon': 1, 'schedule_free_adamw': 2,
}  # fmt: skip


@pytest.mark.parametrize('name', MINE)
def test_the_state_is_as_large_as_documented(name):
    net = vit.make_vit(10, (16, 16), 512, 12, 2048, 8)
    params = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))['params']
    rules = dict(
        decay_factors=dict.fromkeys(trees.flatten(params), 0.0),
        lr_factors=dict.fromkeys(trees.flatten(params), 1.0),
    )
    optimizer = factory.make(factory.LAWS[name](), SCHEDULE, **rules)
    size = trees.nbytes(jax.eval_shape(optimizer.init, params)) / trees.nbytes(params)
    assert size == pytest.approx(STATE[name], abs=0.02)


@pytest.mark.slow
def test_the_momentum_of_adafactor_vit_is_bfloat16_and_stays_close():
    width = REFERENCES['adafactor_vit'][1]
    start = draw(0, width)
    params = form_of(start, True)
    rules = dict(
        decay_factors=dict.fromkeys(trees.flatten(params), 0.0),
        lr_factors=dict.fromkeys(trees.flatten(params), 1.0),
    )
    found = []
    for law in (factory.adafactor_vit(), factory.adafactor_vit(mu_dtype='float32')):
        optimizer = factory.make(law, SCHEDULE, **rules)
        now, state, update = params, optimizer.init(params), updater(optimizer)
        for step in range(1, 4):
            now, state = update(now, state, form_of(gradients_at(step, width), True), step)
        found.append(unrolled(now))
    for n, value in found[0].items():
        moved = np.abs(found[1][n] - start[n]).max()
        assert 0 < np.abs(value - found[1][n]).max() < 0.02 * moved, n


# Adaptive clipping.


@pytest.mark.parametrize('scanned', [False, True], ids=['unrolled', 'scanned'])
@pytest.mark.slow
def test_adaptive_clipping_compares_each_unit_with_its_weights(scanned):
    start, gradients = draw(0, 8), draw(1, 8, scale=0.02)
    start['head/kernel'] *= 0
    start[BLOCK.format(0) + 'LayerNorm_0/scale'] *= 0
    clip = clipping.adaptive(0.01)
    found, _ = clip.update(form_of(gradients, scanned), clip.init({}), form_of(start, scanned))
    changed = 0
    for n, value in unrolled(found).items():
        g, w = gradients[n].astype(np.float64), start[n].astype(np.float64)
        if n.startswith('head/'):
            np.testing.assert_array_equal(value, g, err_msg=n)
            continue
        flat = (math.prod(g.shape[: rows(n)]), -1) if is_kernel(n) else (-1, 1)
        g, w = g.reshape(flat), w.reshape(flat)
        limit = 0.01 * np.maximum(np.linalg.norm(w, axis=0), 1e-3)
        norm = np.linalg.norm(g, axis=0)
        wanted = g * np.where(norm > limit, limit / norm, 1.0)
        np.testing.assert_allclose(value.reshape(flat), wanted, rtol=1e-5, atol=1e-9, err_msg=n)
        changed += (norm > limit).sum()
    assert changed > 10


# Rates by layer, and optimizers by group.


def test_layer_decay_is_lowest_at_the_embedding_and_one_at_the_head():
    found = per_layer.decay_factors(0.5, form_of(draw(0, 8), False))
    for n, factor in found.items():
        layer = {'embedding': 0, 'pos_embedding': 0, 'Transformer': 1, 'head': 3}[n.split('/')[0]]
        layer += 'block_1' in n
        assert factor == 0.5 ** (3 - layer), n
    stacked = per_layer.decay_factors(0.5, form_of(draw(0, 8), True))
    for n, factor in stacked.items():
        wanted = (0.25, 0.5) if 'encoderblock/' in n else found[n]
        assert factor == wanted, n


def test_layer_decay_counts_all_layers_and_spares_what_follows_them():
    net = vit.make_vit(10, (4, 4), 8, 12, 16, 2, posemb='learned', pool='map', scan=False)
    params = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))['params']
    found = per_layer.decay_factors(0.75, params)
    assert found['Transformer/encoderblock_11/LayerNorm_0/scale'] == 0.75
    assert found['Transformer/encoderblock_2/LayerNorm_0/scale'] == 0.75**10
    assert found['embedding/kernel'] == found['pos_embedding'] == 0.75**13
    assert found['Transformer/encoder_norm/scale'] == found['head/kernel'] == 1
    assert {factor for n, factor in found.items() if n.startswith('MAPHead_0')} == {1.0}


def test_groups_have_their_own_laws_and_one_clip():
    history = {name: expected(name)[0][0] for name in ('lion', 'lamb')}
    start = draw(0, 8)
    params = form_of(start, True)
    names = list(trees.flatten(params))
    groups = {n: 'lion' if 'query' in n else 'lamb' for n in names}
    laws = {'lion': factory.lion(), 'lamb': factory.lamb()}
    both = (0.25, 0.5)
    optimizer = factory.make(
        factory.grouped(laws, groups),
        SCHEDULE,
        decay_factors={n: decay_of(n) for n in names},
        lr_factors={n: both if 'encoderblock/' in n else factor_of(n) for n in names},
        clip=CLIP,
    )
    state = optimizer.init(params)
    params, _ = updater(optimizer)(params, state, form_of(gradients_at(1, 8), True), 1)
    wanted = {n: history['lion' if 'query' in n else 'lamb'][n] for n in start}
    compare(unrolled(params), wanted, start)
    assert trees.nbytes(state) < trees.nbytes(make('lamb', params).init(params))


@pytest.mark.parametrize('name', mostly_slow(MINE, 'adamw', 'adafactor', 'lamb', 'muon'))
def test_what_is_frozen_keeps_its_bits_and_has_no_state(name):
    width = REFERENCES[name][1]
    start = draw(0, width)
    start['embedding/kernel'][0, 0, 0] = -0.0
    params = form_of(start, True)
    names = list(trees.flatten(params))
    rules = dict(decay_factors={n: decay_of(n) for n in names}, clip=1.0)
    rate = {n: 0.0 if n.startswith('embedding') else 1.0 for n in names}
    law = factory.LAWS[name]()
    still = factory.make(law, SCHEDULE, lr_factors=rate, **rules)
    free = factory.make(law, SCHEDULE, lr_factors=dict.fromkeys(names, 1.0), **rules)
    state, large = still.init(params), jax.eval_shape(free.init, params)
    saved = (trees.nbytes(large) - trees.nbytes(state)) / params['embedding']['kernel'].nbytes
    # At these widths an embedding is not factored for adafactor; muon leaves it to AdamW.
    wanted = {**STATE, 'adafactor': 1, 'muon': 2}[name]
    assert saved == pytest.approx(wanted, rel=0.1)
    gradients = form_of(gradients_at(1, width), True)
    updates, _ = jax.jit(still.update)(gradients, state, params, step=5)
    after = jax.device_get(jax.tree.map(jnp.add, params, updates))
    assert after['embedding']['kernel'].tobytes() == start['embedding/kernel'].tobytes()
    if name == 'schedule_free_adamw':
        average = schedule_free.evaluation_weights(state, params)['embedding']['kernel']
        assert np.asarray(average).tobytes() == start['embedding/kernel'].tobytes()
    # Not even as a part of the norm that is clipped.
    gradients['embedding'] = jax.tree.map(lambda g: g * 1e6, gradients['embedding'])
    again, _ = jax.jit(still.update)(gradients, state, params, step=5)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_rate_of_lars_comes_before_its_momentum():
    """After a rate of 0 what has accumulated still moves, as in the paper."""
    params = form_of(draw(0, 8), True)
    optimizer = make('lars', params, clip=0.0)
    state, update = optimizer.init(params), updater(optimizer)
    gradients = form_of(gradients_at(1, 8), True)
    after, state = update(params, state, gradients, 5)
    last, _ = update(after, state, gradients, 50)
    for a, b, c in zip(*map(jax.tree.leaves, (params, after, last)), strict=True):
        np.testing.assert_allclose(c - b, 0.9 * (b - a), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize('name', ['lars', 'lamb'])
@pytest.mark.slow
def test_a_head_that_starts_at_zero_leaves_it(name):
    """Its norm is 0, and a step as long as the weights would be none."""
    start = draw(0, 8)
    start['head/kernel'] *= 0
    params = form_of(start, True)
    optimizer = make(name, params)
    update, memory, wanted = updater(optimizer), {}, start['head/kernel'].astype(np.float64)
    state = jax.jit(optimizer.init)(params)
    for t in range(1, 4):
        gradients = draw(t, 8, scale=0.1)
        params, state = update(params, state, form_of(gradients, True), t)
        g = gradients['head/kernel'].astype(np.float64)
        law = REFERENCES[name][0]
        wanted = law(memory, 'head/kernel', wanted, g, rate_at(t), 1.0, 0.1, t)
        np.testing.assert_allclose(params['head']['kernel'], wanted, rtol=1e-4, atol=1e-9)
    if name == 'lamb':
        assert np.sqrt(np.mean(wanted**2)) > 1e-4
