"""Shampoo under the public packages' names, against their recorded trajectories."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from shampoo_reference import ORACLES, inputs, load

from big_vit import trees
from big_vit.optim import matrices
from big_vit.optim.compat.distributed_shampoo import (
    GraftingType,
    PreconditionerType,
    distributed_shampoo,
)

# What the others do not show already; `make test-all` runs all.
FLOAT64 = {'coupled_decay', 'statistics_every2', 'clip'}
FLOAT32 = {'nesterov'}
HEAD = {'none'}
TREES = {'output'}


def oracles():
    """(package, run, how far of the way gone the parameters may be off) of each recorded run."""
    params = []
    for package, tolerance, quick in (
        ('optax_shampoo_f64', 2e-7, FLOAT64),
        ('precondition', 2e-7, HEAD),
        ('optax_shampoo_f32', 3e-4, FLOAT32),
    ):
        for name in load(package)[0]:
            marks = () if name in quick else pytest.mark.slow
            each = pytest.param(package, name, tolerance, id=f'{package}-{name}', marks=marks)
            params.append(each)
    return params


def imported(told):
    """The optimizer of these arguments, as they were given to the package."""
    graft = GraftingType[told.get('graft_type', 'SGD')]
    sides = PreconditionerType[told.get('precondtioner_type', 'ALL')]
    return distributed_shampoo(**{**told, 'graft_type': graft, 'precondtioner_type': sides})


def follow(optimizer, params, grads):
    """(parameters after each step, last state), under one compilation."""
    state, seen = jax.jit(optimizer.init)(params), []
    # A function of its own, so that nobody else's compilations count.
    update = jax.jit(lambda *args: optimizer.update(*args))
    for grad in grads:
        updates, state = jax.block_until_ready(update(grad, state, params))
        params = optax.apply_updates(params, updates)
        seen.append(params)
    assert update._cache_size() == 1
    return seen, state


@pytest.mark.parametrize(('package', 'name', 'tolerance'), oracles())
def test_trajectories_are_theirs(package, name, tolerance):
    runs, recorded = load(package)
    run, told = runs[name], dict(runs[name]['arguments'])
    if package.startswith('optax_shampoo') and told['decoupled_weight_decay']:
        told['weight_decay'] *= told['learning_rate']  # The older package has the rate twice.
    with jax.enable_x64(run['dtype'] == 'float64'):
        param, grads = inputs(run)
        seen, _ = follow(imported(told), jnp.asarray(param), [jnp.asarray(g) for g in grads])
    moved = np.abs(recorded[name] - param).max()
    np.testing.assert_allclose(np.stack(seen), recorded[name], rtol=0, atol=tolerance * moved)


with np.load(ORACLES / 'precondition_tree.npz') as file:
    TREE_RUNS, TREE = json.loads(str(file['header']))['runs'], dict(file)


def tree_inputs(run):
    shapes = TREE_RUNS['defaults']['shapes']
    random = np.random.RandomState(run['seed'])
    params = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    means = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    grads = [
        {n: run['scale'] * (0.5 * means[n] + random.standard_normal(s)) for n, s in shapes.items()}
        for _ in range(10)
    ]
    params, *grads = ({name: x[name] for name in run['shapes']} for x in (params, *grads))
    return jax.tree.map(jnp.asarray, (params, grads))


def schedule(step):
    return 2.0**-5 * (1 + step) / (4 + step)


@pytest.mark.parametrize(
    'name',
    [pytest.param(n, marks=() if n in TREES else pytest.mark.slow) for n in TREE_RUNS],
)
def test_tree_of_mixed_ranks_is_theirs(name):
    run = TREE_RUNS[name]
    told = dict(run['arguments'])
    if told['learning_rate'] == 'schedule':
        told['learning_rate'] = schedule
    with jax.enable_x64(True):
        params, grads = tree_inputs(run)
        seen, _ = follow(imported(told), params, grads)
    for part, start in params.items():
        recorded = TREE[f'{name}/{part}']
        moved = np.abs(recorded - np.asarray(start)).max()
        np.testing.assert_allclose(seen[-1][part], recorded, rtol=0, atol=5e-8 * moved)


REFUSED = {
    'precision': jax.lax.Precision.DEFAULT,
    'exponent_override': -1,
    'batch_axis_name': 'batch',
    'statistics_partition_spec': PartitionSpec(),
    'preconditioner_partition_spec': PartitionSpec(),
    'num_devices_for_pjit': 8,
    'shard_optimizer_states': True,
    'best_effort_memory_usage_reduction': True,
    'lobpcg_topk_precondition': 1,
    'lobpcg_max_iter': 1,
    'compression_rank': 4,
    'frequent_directions': True,
    'generate_fd_metrics': True,
    'average_grad': True,
    'reset_preconditioner': True,
    'decay_preconditioning_compute_steps': True,
    'end_preconditioning_compute_steps': 100,
    'preconditioning_compute_steps': 0,
    'statistics_compute_steps': 0,
}


@pytest.mark.parametrize(('name', 'value'), list(REFUSED.items()))
def test_what_cannot_be_honoured_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f'^{name}: .+') as error:
        distributed_shampoo(0.1, 128, **{name: value})
    assert '\n' not in str(error.value)


def test_other_errors_say_what_to_do():
    with pytest.raises(ValueError, match='block_size'):
        distributed_shampoo(0.1, 0)
    conv = {'conv': jnp.ones((3, 3, 70, 70))}
    with pytest.raises(ValueError, match=r'conv has .*\(9, 70, 70\).*merge_small_dims_block_size'):
        distributed_shampoo(0.1, 128, merge_small_dims_block_size=64).init(conv)
    with pytest.raises(ValueError, match='best_effort_shape_interpretation=True'):
        distributed_shampoo(0.1, 128, best_effort_shape_interpretation=False).init(conv)
    optimizer = distributed_shampoo(0.1, 128, weight_decay=0.1)
    params = {'bias': jnp.ones(())}
    with pytest.raises(ValueError, match='weight_decay'):
        optimizer.update(params, optimizer.init(params))


def sample(seed=0, steps=4):
    random = np.random.RandomState(seed)
    shapes = {'bias': (10,), 'dense': (20, 12)}

    def tree():
        return {n: jnp.asarray(random.standard_normal(s), jnp.float32) for n, s in shapes.items()}

    return tree(), [tree() for _ in range(steps)]


@pytest.mark.slow
def test_mesh_changes_nothing_but_where_states_lie():
    params, grads = sample()
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ('a', 'b'))
    told = dict(
        merge_small_dims_block_size=12,
        start_preconditioning_step=1,
        graft_type=GraftingType.RMSPROP_NORMALIZED,
    )
    alone, one = follow(distributed_shampoo(0.1, 12, **told), params, grads)
    params, grads = jax.device_put((params, grads), NamedSharding(mesh, PartitionSpec()))
    spread, eight = follow(distributed_shampoo(0.1, 12, **told, mesh=mesh), params, grads)
    for x, y in zip(alone, spread, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), x, y)
    for name in ('computed', 'refused', 'ignored'):
        assert one.health[name] == eight.health[name]
    assert one.health['computed'] > 0
    for x in jax.tree.leaves(eight.stacks):
        assert len(x.addressable_shards) == 8
        assert x.addressable_shards[0].data.shape[0] * 8 == x.shape[0]


def test_gradient_that_is_not_finite_counts_as_zeros():
    params, grads = sample()
    bad = [*grads[:2], {**grads[2], 'dense': grads[2]['dense'].at[3, 4].set(jnp.nan)}, grads[3]]
    none = [*grads[:2], {**grads[2], 'dense': jnp.zeros((20, 12))}, grads[3]]
    optimizer = distributed_shampoo(0.1, 12, start_preconditioning_step=1)
    seen, state = follow(optimizer, params, bad)
    expected, _ = follow(optimizer, params, none)
    jax.tree.map(np.testing.assert_array_equal, seen[-1], expected[-1])
    assert state.health['ignored'] == 1


@pytest.mark.slow
def test_layers_of_a_stack_are_parameters_of_their_own():
    random = np.random.RandomState(1)
    kernels = jnp.asarray(random.standard_normal((5, 2, 8, 6)), jnp.float32)
    told = dict(start_preconditioning_step=1, graft_type=GraftingType.RMSPROP_NORMALIZED)
    optimizer = distributed_shampoo(0.1, 4, **told, matrix=matrices.matrix)

    def scanned(x):
        return trees.unflatten({'encoderblock/Dense_0/kernel': x})

    def unrolled(x):
        return trees.unflatten({f'encoderblock_{i}/Dense_0/kernel': x[i] for i in range(2)})

    one, _ = follow(optimizer, scanned(kernels[0]), [scanned(g) for g in kernels[1:]])
    two, _ = follow(optimizer, unrolled(kernels[0]), [unrolled(g) for g in kernels[1:]])
    stacked = np.stack(jax.tree.leaves(two[-1]))
    np.testing.assert_allclose(jax.tree.leaves(one[-1])[0], stacked, rtol=1e-4, atol=1e-5)


def test_state_is_arrays_of_at_least_float32():
    params = {'kernel': jnp.ones((8, 6), jnp.bfloat16), 'bias': jnp.ones(6, jnp.bfloat16)}
    optimizer = distributed_shampoo(lambda step: 0.1 / (1 + step), 4)
    seen, state = follow(optimizer, params, [params] * 3)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    assert {x.dtype.name for x in jax.tree.leaves(state)} == {'float32', 'int32'}
    assert {x.dtype.name for x in jax.tree.leaves(seen[-1])} == {'bfloat16'}
    assert state.square == ()
