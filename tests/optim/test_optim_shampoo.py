"""Shampoo against NumPy and Meta's, on any mesh, and with numbers that are not finite."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gate import mostly_slow
from shampoo_reference import Shampoo, due, inputs, load

from big_vit import sharding, trees
from big_vit.models.encoder import stack_blocks
from big_vit.optim import blocks, matrices, roots, shampoo

FLOAT64 = dict.fromkeys(('mu_dtype', 'stats_dtype', 'root_dtype', 'gather_dtype'), np.float64)
EXACT = dict(FLOAT64, root='eigh', ridge=0.0)

GRAFTS = {'Adam': 'adam', 'SGD': 'sgd', 'none': 'none'}
# A graft without bias correction, and one with a b2 of its own, are not among the options.
NOT_OURS = ('rms', 'other_graft_beta2')
META, META_PARAMS = load('meta')


def where(mesh, state):
    """Blocks over all devices, the rest whole on each."""
    everywhere = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
    rest = jax.tree.map(lambda _: sharding.replicated(mesh), state)
    return rest._replace(stacks=jax.tree.map(lambda _: everywhere, state.stacks))


def directions(tx, grads, mesh=None):
    """([updates of each step], last state); jitted once, with the state where it stays."""
    init, update = jax.jit(tx.init), jax.jit(tx.update)
    if mesh is not None:
        places = where(mesh, jax.eval_shape(tx.init, grads[0]))
        init = jax.jit(tx.init, out_shardings=places)
        update = jax.jit(tx.update, out_shardings=(sharding.shardings_for(grads[0], mesh), places))
    state, found = jax.block_until_ready(init(grads[0])), []
    for g in grads:
        u, state = update(g, state)
        # Programs in flight on several CPU devices of one process wait for each other for ever.
        jax.block_until_ready(state)
        found.append(jax.device_get(u))
    assert update._cache_size() == 1
    return found, state


def draw(shape, steps=8, seed=0):
    random = np.random.RandomState(seed)
    mean, scales = random.standard_normal(shape), 1 / (1 + np.arange(shape[-1]) % 4)
    return (0.5 * mean + random.standard_normal((steps, *shape))) * scales


def one_matrix(grads, **options):
    """Directions for a single kernel."""
    tx = shampoo.scale_by_shampoo(**options)
    found, _ = directions(tx, [{'a': {'kernel': jnp.asarray(g)}} for g in grads])
    return np.stack([np.asarray(u['a']['kernel']) for u in found])


def reference(grads, **options):
    optimizer = Shampoo(grads[0].shape, **options)
    return np.stack([optimizer.direction(g) for g in grads])


# Against NumPy and recorded trajectories.


@pytest.mark.parametrize(
    'options',
    [
        dict(start=1, every=1),
        dict(start=3, every=3, nesterov=True),
        dict(start=4, every=3, graft='sgd'),
        dict(start=2, every=5, graft='none', b1=0.8),
        dict(start=1, every=2, exponent=-0.5, eps=1e-3),
        dict(start=2, every=2, exponent=-0.3, b1=0.0),
    ],
    ids=str,
)
@pytest.mark.parametrize('shape', [(5, 7), pytest.param((7, 5), marks=pytest.mark.slow)])
def test_a_matrix_moves_as_in_numpy(shape, options):
    grads = draw(shape)
    # At first the larger factor has no full rank, and without a ridge no root.
    if options['start'] == 1:
        grads = draw((5, 5))
    told = {name: None if value == 'none' else value for name, value in options.items()}
    with jax.enable_x64(True):
        found = one_matrix(grads, **EXACT, **options)
    np.testing.assert_allclose(found, reference(grads, **told), rtol=0, atol=1e-10)


# The ridge is relative to an eigenvalue known to some percent; Newton stops at its own error.
@pytest.mark.parametrize('root', roots.METHODS)
@pytest.mark.parametrize(
    'ridge, tolerance', mostly_slow([(1e-10, 1e-2), (1e-6, 1e-2), (1e-2, 1e-2)], (1e-6, 1e-2))
)
def test_a_matrix_with_a_ridge_moves_as_in_numpy(root, ridge, tolerance):
    grads = draw((5, 7))
    options = dict(start=1, every=2, ridge=ridge)
    with jax.enable_x64(True):
        found = one_matrix(grads, **FLOAT64, **options, root=root)
    wanted = reference(grads, **options)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize(
    'name',
    mostly_slow(
        [name for name in META if name not in NOT_OURS],
        *('none', 'start5_every2', 'graft_epsilon', 'half_power', 'single'),
    ),
)
def test_shampoo_is_metas(name):
    run, told = META[name], META[name]['arguments']
    (b1, b2), b3 = told['betas'], told['beta3']
    param, grads = inputs(run)
    with jax.enable_x64(True):
        found = one_matrix(
            grads,
            **EXACT,
            b1=b1,
            b2=b2,
            eps=told['grafting_epsilon'],
            nesterov=b3 == b1**2,
            block=told['max_preconditioner_dim'],
            every=told['precondition_frequency'],
            start=told['start_preconditioning_step'],
            exponent=-told['inverse_exponent'],
            graft=GRAFTS[told['grafting']],
        )
    for direction, wanted in zip(found, META_PARAMS[name], strict=True):
        param = param - told['lr'] * (direction + told['weight_decay'] * param)
        np.testing.assert_allclose(param, wanted, rtol=0, atol=1e-7)


def test_only_these_recorded_runs_are_left_out():
    left = {n for n, r in META.items() if r['arguments']['grafting'] not in GRAFTS}
    left |= {n for n, r in META.items() if r['arguments']['grafting_beta2'] != 0.95}
    assert set(NOT_OURS) <= set(META) and left >= set(NOT_OURS)


# When roots are computed.


@functools.cache
def computed(steps=13, **options):
    """(roots computed so far after each step, the left root after each), of one matrix."""
    tx = shampoo.scale_by_shampoo(**options)
    grads = draw((4, 6), steps).astype(np.float32)
    update, state, counts, found = jax.jit(tx.update), tx.init({'a': {'kernel': grads[0]}}), [], []
    for g in grads:
        _, state = update({'a': {'kernel': g}}, state)
        counts.append(int(state.health['computed']))
        (stack,) = state.stacks.values()
        found.append(np.asarray(stack.left_root[0]))
    return counts, found


@pytest.mark.parametrize('start, every', mostly_slow([(1, 1), (3, 3), (5, 4)], (5, 4)))
def test_roots_are_computed_at_start_and_then_at_multiples(start, every):
    counts, found = computed(start=start, every=every)
    steps = [step for step in range(1, 14) if due(step, start, every)]
    assert counts == [2 * sum(at <= step for at in steps) for step in range(1, 14)]
    before = [np.eye(4), *found]
    changed = [s for s in range(1, 14) if not np.array_equal(before[s - 1], before[s])]
    assert changed == steps


def test_groups_are_computed_one_after_the_other():
    # Two blocks of a stack, one in each of two groups: all at the start, then 0 and 1 in turn.
    tx = shampoo.scale_by_shampoo(start=3, every=4, groups=2, block=4)
    grads = draw((4, 8), 10).astype(np.float32)
    update, state, changed, last = jax.jit(tx.update), tx.init({'a': {'kernel': grads[0]}}), [], 0
    for g in grads:
        _, state = update({'a': {'kernel': g}}, state)
        now = np.asarray(state.stacks['4x4'].left_root)
        different = now != last if np.ndim(last) else np.zeros_like(now, bool)
        changed.append(tuple(np.flatnonzero(different.any((1, 2)))))
        last = now
    assert changed == [(), (), (0, 1), (0,), (), (1,), (), (0,), (), (1,)]


@pytest.mark.slow
def test_sliced_roots_come_at_multiples_and_are_those_of_their_first_step():
    grads = draw((4, 6), 1).astype(np.float32).repeat(8, 0)  # Then statistics do not change.
    options = dict(ridge=1e-4, exponent=-0.25)
    whole = one_matrix(grads, start=3, every=3, **options)
    sliced = one_matrix(grads, start=1, every=3, sliced=True, **options)
    np.testing.assert_allclose(sliced, whole, rtol=1e-3, atol=1e-3 * np.abs(whole).max())
    counts, _ = computed(start=1, every=3, sliced=True)
    assert counts == [2 * (step // 3) for step in range(1, 14)]


# Any mesh, any form of the tree.


LAYER = {
    'MultiHeadDotProductAttention_0/query/kernel': (16, 2, 8),
    'MultiHeadDotProductAttention_0/out/kernel': (2, 8, 16),
    'MlpBlock_0/Dense_0/kernel': (16, 24),
    'MlpBlock_0/Dense_1/kernel': (24, 16),
    'MlpBlock_0/Dense_0/bias': (24,),
}
REST = {'embedding/kernel': (2, 2, 3, 16), 'head/kernel': (16, 10), 'head/bias': (10,)}
OPTIONS = dict(block=16, start=2, every=2, ridge=1e-4)
MESHES = {'data': (8, 1, 1), 'fsdp': (1, 8, 1), 'all': (2, 2, 2)}


def tree_of_layers(steps=5, seed=0, layers=2):
    shapes = {
        f'Transformer/encoderblock_{i}/{n}': s for i in range(layers) for n, s in LAYER.items()
    }
    shapes |= REST
    drawn = [
        draw(shape, steps, seed + i).astype(np.float32) for i, shape in enumerate(shapes.values())
    ]
    return [
        trees.unflatten({n: x[i] for n, x in zip(shapes, drawn, strict=True)}) for i in range(steps)
    ]


def on(mesh, grads):
    return jax.tree.map(sharding.place, grads, sharding.shardings_for(grads, mesh))


def same(found, wanted, tolerance=2e-4):
    for one, other in zip(found, wanted, strict=True):
        assert jax.tree.structure(one) == jax.tree.structure(other)
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(np.abs(y).max(), 1e-30))


@functools.cache
def alone(**options):
    return directions(shampoo.scale_by_shampoo(**OPTIONS, **options), tree_of_layers())


@pytest.mark.parametrize('name', mostly_slow(MESHES, 'all'))
def test_the_mesh_does_not_matter(name):
    mesh = sharding.make_mesh(*MESHES[name])
    grads = [on(mesh, g) for g in tree_of_layers()]
    found, state = directions(shampoo.scale_by_shampoo(mesh, **OPTIONS), grads, mesh)
    wanted, other = alone()
    same(found, wanted)
    assert {n: int(x) for n, x in state.health.items() if n != 'error'} == {
        n: int(x) for n, x in other.health.items() if n != 'error'
    }
    # Each device has an eighth of what belongs to blocks.
    for x in jax.tree.leaves(state.stacks):
        assert x.addressable_shards[0].data.size * 8 == x.size


@pytest.mark.parametrize(
    'options', [dict(groups=2), pytest.param(dict(sliced=True), marks=pytest.mark.slow)], ids=str
)
@pytest.mark.slow
def test_the_number_of_devices_does_not_matter_to_staggered_roots(options):
    mesh = sharding.make_mesh(8, 1, 1)
    grads = [on(mesh, g) for g in tree_of_layers()]
    found, _ = directions(shampoo.scale_by_shampoo(mesh, **OPTIONS, **options), grads, mesh)
    same(found, alone(**options)[0])


def test_scanned_layers_do_not_matter():
    found, _ = directions(
        shampoo.scale_by_shampoo(**OPTIONS), [stack_blocks(g) for g in tree_of_layers()]
    )
    same(found, [stack_blocks(u) for u in alone()[0]], tolerance=1e-5)


@pytest.mark.slow
def test_a_transposed_matrix_moves_transposed():
    grads = draw((24, 40)).astype(np.float32)
    one = one_matrix(grads, **OPTIONS)
    other = one_matrix(np.swapaxes(grads, 1, 2), **OPTIONS)
    np.testing.assert_allclose(np.swapaxes(other, 1, 2), one, rtol=0, atol=2e-4 * np.abs(one).max())


def test_permuted_blocks_move_permuted():
    grads = draw((32, 16)).astype(np.float32)
    one, other = (one_matrix(g, **OPTIONS) for g in (grads, np.roll(grads, 16, 1)))
    np.testing.assert_allclose(np.roll(one, 16, 1), other, rtol=0, atol=1e-5 * np.abs(one).max())


def test_a_rotated_matrix_moves_rotated_by_the_length_of_the_gradient():
    # Adam's length, taken number by number, is not the same in other coordinates.
    random = np.random.RandomState(1)
    left, right = (np.linalg.qr(random.standard_normal((n, n)))[0] for n in (5, 5))
    grads = draw((5, 5))
    with jax.enable_x64(True):
        options = dict(EXACT, start=2, every=2, graft='sgd')
        one, other = (one_matrix(g, **options) for g in (grads, left @ grads @ right))
    np.testing.assert_allclose(left @ one @ right, other, rtol=0, atol=1e-9)


# What is compiled for eight devices.


@pytest.fixture(scope='module')
def compiled():
    """(compiled update with donated state, abstract state) of data-parallel gradients."""
    mesh = sharding.make_mesh(8, 1, 1)
    tx = shampoo.scale_by_shampoo(mesh, **OPTIONS)
    grads = jax.device_put(tree_of_layers(1)[0], sharding.replicated(mesh))
    places = where(mesh, jax.eval_shape(tx.init, grads))
    state = jax.jit(tx.init, out_shardings=places)(grads)
    return jax.jit(tx.update, donate_argnums=1).lower(grads, state).compile(), state


def test_directions_travel_once_and_statistics_never(compiled):
    text, state = compiled[0].as_text(), compiled[1]
    gathers = re.findall(r'= (.*?) all-gather(?:-start)?\(', text)
    assert 1 <= len(gathers) <= 3
    for word in ('collective-permute', 'all-to-all'):
        assert not re.search(rf' {word}(-start)?\(', text)
    # One for each stack, of the shape of its directions: those of statistics stay.
    wanted = [','.join(map(str, stack.mu.shape)) for stack in state.stacks.values()]
    assert len(gathers) == len(wanted)
    for shape in wanted:
        assert any(f'[{shape}]' in found for found in gathers)


def test_roots_are_computed_in_a_conditional_only(compiled):
    text = compiled[0].as_text()
    always = text[text.index('\nENTRY ') :]
    # Every step runs no loop of products; those of roots are in other computations.
    assert ' conditional(' in always and ' while(' not in always
    assert ' while(' in text


def test_the_state_is_updated_in_place(compiled):
    executable, state = compiled
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    # The old `error` is not read, so that one number has no place to be written to.
    assert executable.memory_analysis().alias_size_in_bytes >= held - 4


# Failures.


def blocks_of(update):
    return {name: np.asarray(x) for name, x in trees.flatten(update).items()}


@functools.cache
def updater():
    tx = shampoo.scale_by_shampoo(block=16, start=2, every=3, ridge=1e-4, b2=0.9)
    return tx, jax.jit(tx.update)


@functools.cache
def many(steps=20):
    return tree_of_layers(steps, layers=1)


FAULTY = 'Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel'


def faulted(gradient=None, state_fault=None, at=5):
    """([updates], state) of 20 steps, with a fault in the gradients or the state at one of them."""
    tx, update = updater()
    state, found = tx.init(many()[0]), []
    for step, g in enumerate(many()):
        flat = dict(trees.flatten(g))
        if gradient and (at is None or step == at):
            flat[FAULTY] = gradient(flat[FAULTY].copy())
        if state_fault and step == at:
            state = state_fault(state)
        u, state = update(trees.unflatten(flat), state)
        found.append(blocks_of(u))
    return found, state


@functools.cache
def healthy():
    return faulted()


def check_contained(found, touched=(FAULTY,)):
    for one, other in zip(found, healthy()[0], strict=True):
        assert all(np.isfinite(x).all() for x in one.values())
        for name in set(one) - set(touched):
            np.testing.assert_array_equal(one[name], other[name])


def with_number(number):
    def fault(g):
        g[2, 3] = number
        return g

    return fault


@pytest.mark.parametrize('number', [np.nan, np.inf, 1e25])
def test_a_gradient_that_is_not_finite_is_left_out(number):
    found, state = faulted(with_number(np.float32(number)))
    check_contained(found)
    # Of the two blocks of 16 x 12 only that of the number is left out.
    assert int(state.health['ignored']) == 1
    assert not found[5][FAULTY][:, :12].any() and found[5][FAULTY][:, 12:].all()
    for one, other in zip(found, healthy()[0], strict=True):
        np.testing.assert_array_equal(one[FAULTY][:, 12:], other[FAULTY][:, 12:])


def test_a_matrix_whose_gradients_are_never_finite_does_not_move():
    found, state = faulted(lambda g: np.full_like(g, 1e25), at=None)
    check_contained(found)
    assert int(state.health['ignored']) == 2 * 20
    assert not any(u[FAULTY].any() for u in found)


def test_a_frozen_matrix_does_not_move():
    found, state = faulted(np.zeros_like, at=None)
    check_contained(found)
    assert not any(u[FAULTY].any() for u in found)
    assert int(state.health['refused']) == int(state.health['ignored']) == 0


def test_a_step_of_zeros_is_survived():
    check_contained(faulted(np.zeros_like)[0])


def test_gradients_of_rank_one_are_survived():
    found, state = faulted(lambda g: np.ones_like(g), at=None)
    check_contained(found)
    assert int(state.health['refused']) == 0


def place_of_fault():
    """(stack, block) of the first block of the faulty matrix."""
    plan = blocks.plan({n: x.shape for n, x in trees.flatten(many()[0]).items()}, 16)
    return plan.cuts[FAULTY].stack, plan.cuts[FAULTY].first


def in_stack(field, change):
    def fault(state):
        name, index = place_of_fault()
        stack = state.stacks[name]
        new = stack._replace(**{field: change(getattr(stack, field), index)})
        return state._replace(stacks={**state.stacks, name: new})

    return fault


@pytest.mark.parametrize('side', shampoo.SIDES)
def test_statistics_that_are_not_finite_start_again(side):
    found, state = faulted(None, in_stack(side, lambda x, i: x.at[i, 1, 2].set(jnp.nan)))
    check_contained(found)
    assert int(state.health['restarted']) == 1


@pytest.mark.parametrize('side', shampoo.SIDES)
def test_a_root_that_is_not_finite_is_not_used_and_replaced(side):
    found, state = faulted(
        None, in_stack(f'{side}_root', lambda x, i: x.at[i, 1, 2].set(jnp.nan)), at=6
    )
    check_contained(found)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_refused_roots_keep_the_old_one_then_take_more_ridge_then_start_again():
    name, index = place_of_fault()
    tx, update = updater()
    state, told = tx.init(many()[0]), []
    for step, g in enumerate(many()):
        if 3 <= step < 12:  # The roots of steps 6, 9 and 12.
            # An eigenvalue as negative as the largest is positive: no ridge below 1 mends it.
            bad = jnp.eye(state.stacks[name].left.shape[-1]).at[0, 0].set(-1.0)
            state = in_stack('left', lambda x, i, bad=bad: x.at[i].set(100 * bad))(state)
        before = np.asarray(state.stacks[name].left_root[index])
        _, state = update(g, state)
        kept = np.array_equal(before, state.stacks[name].left_root[index])
        told.append((int(state.stacks[name].failures[index, 0]), kept))
    assert [told[step - 1] for step in (3, 6, 9, 12, 15)] == [
        (0, False),
        (1, True),
        (2, True),
        (0, False),  # Started again.
        (0, False),
    ]
    assert int(state.health['refused']) == 3 and int(state.health['restarted']) == 1


# Types.


def close(one, other):
    return (one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other)


@pytest.mark.parametrize(
    'name', mostly_slow(['mu_dtype', 'root_dtype', 'gather_dtype'], 'gather_dtype')
)
@pytest.mark.slow
def test_sixteen_bits_change_little(name):
    mesh = sharding.make_mesh(8, 1, 1) if name == 'gather_dtype' else None
    tx = shampoo.scale_by_shampoo(mesh, **OPTIONS, **{name: jnp.bfloat16})
    grads = tree_of_layers()
    found, _ = directions(tx, [on(mesh, g) for g in grads] if mesh else grads, mesh)
    for path, x in blocks_of(found[-1]).items():
        other = blocks_of(alone()[0][-1])[path]
        assert x.dtype == np.float32 and close(x, other) > 0.999
        np.testing.assert_allclose(np.linalg.norm(x), np.linalg.norm(other), rtol=0.01)


@pytest.mark.slow
def test_gradients_of_sixteen_bits_get_directions_of_sixteen():
    grads = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), g) for g in tree_of_layers()]
    found, state = directions(shampoo.scale_by_shampoo(**OPTIONS), grads)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(state.stacks)} == {
        np.dtype('float32'),
        np.dtype('int32'),
    }


@pytest.mark.parametrize(
    'option, options',
    [
        ('exponent', dict(exponent=-0.3)),
        ('stats_dtype', dict(stats_dtype=jnp.bfloat16)),
        ('groups', dict(every=20, groups=3)),
        ('sliced', dict(sliced=True, groups=2, every=20)),
        ('sliced', dict(sliced=True, root='eigh')),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(option, options):
    with pytest.raises(ValueError, match=f'^{option}: '):
        shampoo.scale_by_shampoo(**options)
    assert [name for name, _ in shampoo.check(shampoo.Options(**options))] == [option]
    assert shampoo.check(shampoo.Options()) == []


# Among optax's own.


def test_a_tree_without_matrices_is_adams():
    grads = [{'a': {'bias': jnp.asarray(g)}} for g in draw((5,)).astype(np.float32)]
    found, _ = directions(shampoo.scale_by_shampoo(), grads)
    wanted, _ = directions(optax.scale_by_adam(b2=0.95), grads)
    same(found, wanted, tolerance=1e-5)
    mesh = sharding.make_mesh(8, 1, 1)
    with_mesh, _ = directions(shampoo.scale_by_shampoo(mesh), [on(mesh, g) for g in grads], mesh)
    same(with_mesh, wanted, tolerance=1e-5)


def test_it_is_adam_before_start():
    grads = tree_of_layers()
    options = {**OPTIONS, 'start': 100}
    found, state = directions(shampoo.scale_by_shampoo(**options), grads)
    same(found, directions(optax.scale_by_adam(b2=0.95), grads)[0], tolerance=1e-5)
    assert int(state.health['computed']) == 0


@pytest.mark.slow
def test_it_works_in_a_chain_a_mask_a_partition_and_with_hyperparameters():
    grads = [{'a': {'kernel': k, 'bias': b}} for k, b in zip(draw((4, 6)), draw((6,)), strict=True)]
    grads = jax.tree.map(np.float32, grads)
    base = shampoo.scale_by_shampoo(**OPTIONS)
    wanted, _ = directions(base, grads)
    kernels = trees.map_with_name(lambda name, _: name.endswith('kernel'), grads[0])
    labels = jax.tree.map(lambda k: 'matrix' if k else 'rest', kernels)
    composed = {
        'chain': optax.inject_hyperparams(
            lambda rate: optax.chain(optax.identity(), base, optax.scale(rate))
        )(rate=1.0),
        'mask': optax.masked(base, kernels),
        'partition': optax.partition({'matrix': base, 'rest': optax.sgd(1.0)}, labels),
    }
    for name, tx in composed.items():
        found, _ = directions(tx, grads)
        for one, other in zip(found, wanted, strict=True):
            one, other = blocks_of(one), blocks_of(other)
            for path in one:
                if path.endswith('kernel') or name == 'chain':
                    np.testing.assert_allclose(one[path], other[path], rtol=0, atol=1e-4)


def test_a_function_says_what_is_a_matrix():
    def hidden(name, ndim):
        return matrices.matrix(name, ndim) if matrices.is_hidden(name, ndim) else None

    grads = tree_of_layers(4)
    found, state = directions(shampoo.scale_by_shampoo(matrix=hidden, **OPTIONS), grads)
    adam, _ = directions(optax.scale_by_adam(b2=0.95), grads)
    rest = {'embedding/kernel', 'head/kernel', 'head/bias'}
    assert rest <= set(trees.flatten(state.mu))
    for name in rest:
        wanted = blocks_of(adam[-1])[name]
        np.testing.assert_allclose(blocks_of(found[-1])[name], wanted, rtol=0, atol=1e-4)
