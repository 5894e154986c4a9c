"""SOAP against recorded runs of its authors' code, on many devices, with broken gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gate import mostly_slow
from shampoo_reference import Soap, inputs, load

from big_vit import sharding, trees
from big_vit.models.encoder import stack_blocks
from big_vit.models.vit import make_vit
from big_vit.optim import soap

RUNS, _ = load('soap')
WIDE = dict.fromkeys(('mu_dtype', 'stats_dtype', 'root_dtype', 'gather_dtype'), jnp.float64)


@pytest.fixture
def x64():
    old = jax.config.jax_enable_x64
    jax.config.update('jax_enable_x64', True)
    yield
    jax.config.update('jax_enable_x64', old)


def settings(run):
    told = run['arguments']
    stats = told['shampoo_beta'] if told['shampoo_beta'] >= 0 else None
    return (*told['betas'], told['eps'], told['precondition_frequency'], stats)


@pytest.mark.parametrize('name', [name for name in RUNS if name != 'rectangular'])
def test_soap_is_that_of_its_authors(name, x64):
    run = RUNS[name]
    b1, b2, eps, every, b2_stats = settings(run)
    made = soap.scale_by_soap(b1=b1, b2=b2, eps=eps, every=every, b2_stats=b2_stats, **WIDE)
    reference = Soap(run['shape'], b1, b2, eps, every, b2_stats)
    param, grads = inputs(run)
    state, update = made.init({'kernel': jnp.asarray(param)}), jax.jit(made.update)
    for grad in grads:
        found, state = update({'kernel': jnp.asarray(grad)}, state)
        wanted = reference.direction(grad)
        np.testing.assert_allclose(found['kernel'], wanted, rtol=0, atol=1e-10)
    assert update._cache_size() == 1
    assert np.abs(wanted).max() > 0.1


def test_a_block_smaller_than_the_matrix_is_a_matrix_of_its_own(x64):
    rng = np.random.default_rng(0)
    options = dict(every=2, **WIDE)
    made = soap.scale_by_soap(block=8, **options)
    state, update = made.init({'kernel': jnp.zeros((16, 8))}), jax.jit(made.update)
    parts = [Soap((8, 8), 0.95, 0.95, 1e-8, 2) for _ in range(2)]
    for _ in range(6):
        grad = rng.standard_normal((16, 8))
        found, state = update({'kernel': jnp.asarray(grad)}, state)
        wanted = np.concatenate([parts[0].direction(grad[:8]), parts[1].direction(grad[8:])])
        np.testing.assert_allclose(found['kernel'], wanted, atol=1e-9)


# Real trees.

VIT = make_vit(10, (4, 4), 24, 2, 48, 2, scan=False)
OPTIONS = dict(block=24, every=3, groups=1)
STEPS = 8


@pytest.fixture(scope='module')
def params():
    return VIT.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))['params']


def gradients(params, step):
    keys = iter(jax.random.split(jax.random.key(step), len(jax.tree.leaves(params))))
    return jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape) * 1e-3, params)


def follow(made, grads, mesh=None):
    """(updates of all steps, last state)."""
    updates = []
    state = jax.jit(made.init)(grads[0])
    update = jax.jit(made.update)
    for now in grads:
        if mesh is not None:
            now = jax.tree.map(jax.device_put, now, sharding.shardings_for(now, mesh, 0))
        # Several programs in flight on as many fake devices can wait for each other.
        found, state = jax.block_until_ready(update(now, state))
        updates.append(found)
    return updates, state


@pytest.fixture(scope='module')
def plain(params):
    return follow(soap.scale_by_soap(**OPTIONS), [gradients(params, i) for i in range(STEPS)])


def worst(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs)


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
def test_the_mesh_does_not_matter(params, plain, sizes):
    mesh = sharding.make_mesh(*sizes)
    grads = [gradients(params, i) for i in range(STEPS)]
    with jax.set_mesh(mesh):
        found, state = follow(soap.scale_by_soap(mesh=mesh, **OPTIONS), grads, mesh)
    # Where an eigenvalue is nearly zero its eigenvector is rounding's, in the first steps.
    assert worst(found, plain[0]) < 2e-3
    health = [jax.tree.map(int, s.health) for s in (state, plain[1])]
    assert health[0] == health[1] and health[0]['computed'] > 0 and health[0]['refused'] == 0
    for stack in state.stacks.values():
        assert {len(x.sharding.device_set) for x in stack} == {8}
        assert all(x.addressable_shards[0].data.shape[0] * 8 == x.shape[0] for x in stack)


@pytest.mark.slow
def test_scanned_layers_are_the_same_matrices(params, plain):
    grads = [stack_blocks(gradients(params, i)) for i in range(STEPS)]
    found, _ = follow(soap.scale_by_soap(**OPTIONS), grads)
    wanted = [stack_blocks(update) for update in plain[0]]
    assert worst(found, wanted) < 1e-5


@pytest.mark.slow
def test_groups_take_turns_and_meet_again(params):
    options = {**OPTIONS, 'every': 4, 'groups': 2}
    grads = [gradients(params, i) for i in range(6)]
    _, state = follow(soap.scale_by_soap(**options), grads)
    _, before = follow(soap.scale_by_soap(**options), grads[:5])
    # The fifth update, of the sixth gradient, is no multiple of two; the fourth was.
    assert (
        worst(
            [s.left_basis for s in before.stacks.values()],
            [s.left_basis for s in state.stacks.values()],
        )
        == 0
    )
    _, earlier = follow(soap.scale_by_soap(**options), grads[:4])
    for name, stack in before.stacks.items():
        moved = np.abs(np.asarray(stack.left_basis - earlier.stacks[name].left_basis)).max((1, 2))
        assert (moved[0::2] > 0).sum() == 0 or (moved[1::2] > 0).sum() == 0
        assert moved.max() > 0


@pytest.mark.parametrize('value', mostly_slow([np.nan, np.inf, 1e25], 1e25))
def test_a_broken_gradient_is_ignored_where_it_is(params, plain, value):
    grads = [gradients(params, i) for i in range(STEPS)]
    grads[4]['head']['kernel'] = grads[4]['head']['kernel'].at[0, 0].set(value)
    grads[4]['head']['bias'] = grads[4]['head']['bias'].at[0].set(value)
    found, state = follow(soap.scale_by_soap(**OPTIONS), grads)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert int(state.health['ignored']) == 2
    assert not np.asarray(found[4]['head']['kernel']).any()
    for name, update in trees.flatten(found[-1]).items():
        if not name.startswith('head/'):
            np.testing.assert_array_equal(update, trees.flatten(plain[0][-1])[name])


def test_statistics_that_were_lost_start_again(params):
    grads = [gradients(params, i) for i in range(20)]
    made = soap.scale_by_soap(**OPTIONS)
    update = jax.jit(made.update)
    state = jax.jit(made.init)(params)
    for i, now in enumerate(grads):
        if i == 6:
            name, stack = next(iter(state.stacks.items()))
            state.stacks[name] = stack._replace(left=stack.left.at[0].set(jnp.nan))
        found, state = update(now, state)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert int(state.health['restarted']) == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.slow
def test_layers_without_gradient_and_matrices_of_few_entries():
    params = {'a': {'kernel': jnp.zeros((6, 4))}, 'b': {'kernel': jnp.zeros((2, 2))}}
    params |= {'c': {'kernel': jnp.zeros((1, 1))}, 'd': {'kernel': jnp.zeros((1, 7))}}
    rng = np.random.default_rng(0)
    grads = [
        jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), params)
        for _ in range(6)
    ]
    for now in grads:
        now['a']['kernel'] = now['a']['kernel'].at[2:].set(0)
    found, _ = follow(soap.scale_by_soap(every=2), grads)
    for update in found[1:]:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(update))
        assert np.abs(update['a']['kernel'][:2]).min() > 0
        assert np.abs(update['a']['kernel'][2:]).max() < 1e-4


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match='groups: 3 does not divide every=10; try every=12'):
        soap.scale_by_soap(every=10, groups=3)
    with pytest.raises(ValueError, match=r'stats_dtype: .*negative eigenvalues.*float32'):
        soap.scale_by_soap(stats_dtype=jnp.bfloat16)
