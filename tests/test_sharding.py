"""Where arrays lie: what the table promises holds for every size, on meshes small and large."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gate import mostly_slow
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from big_vit import sharding, state, trees
from big_vit.errors import UserError
from big_vit.models import variants
from big_vit.models.vit import make_vit

DEVICES = 8


def mesh_of(replica, fsdp, tensor):
    return AbstractMesh((replica, fsdp, tensor), sharding.AXES)


def spec(name, shape, mesh=(1, 4, 2), **more):
    return tuple(sharding.spec_for(name, shape, mesh_of(*mesh), **more))


def ways(axis, mesh):
    axes = axis if isinstance(axis, tuple) else (axis,)
    return math.prod(mesh.shape[a] for a in axes if a is not None)


# Meshes.


@pytest.mark.parametrize(
    'sizes, wanted',
    [
        ((1, -1, 1), (1, 8, 1)),
        ((-1, 1, 1), (8, 1, 1)),
        ((2, -1, 2), (2, 2, 2)),
        ((1, 1, -1), (1, 1, 8)),
        ((2, 4, 1), (2, 4, 1)),
        ((8, -1, 1), (8, 1, 1)),
    ],
)
def test_a_mesh_has_the_sizes_asked_for_and_minus_one_takes_the_rest(sizes, wanted):
    mesh = sharding.make_mesh(*sizes)
    assert mesh.axis_names == ('replica', 'fsdp', 'tensor')
    assert tuple(mesh.shape.values()) == wanted
    assert sorted(d.id for d in mesh.devices.flat) == list(range(DEVICES))


def test_a_mesh_can_use_some_devices_only():
    mesh = sharding.make_mesh(devices=jax.devices()[2:3])
    assert tuple(mesh.shape.values()) == (1, 1, 1)
    assert mesh.devices.item() == jax.devices()[2]


def test_mesh_axes_are_automatic():
    assert set(sharding.make_mesh().axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    'sizes, parts',
    [
        ((1, 3, 1), ('mesh.fsdp=3', '8 devices')),
        ((3, -1, 1), ('mesh.replica=3', '8 devices')),
        ((16, -1, 1), ('mesh.replica=16', '8 devices')),
        ((2, 2, 1), ('does not multiply to the 8 devices',)),
        ((-1, -1, 1), ('at most one may be -1',)),
        ((-1, -1, -1), ('at most one may be -1',)),
        ((0, -1, 1), ('must be positive', 'mesh.replica=0')),
        ((1, 8, 0), ('must be positive', 'mesh.tensor=0')),
        ((1, -8, 1), ('must be positive',)),
    ],
)
def test_sizes_that_make_no_mesh_are_refused(sizes, parts):
    with pytest.raises(UserError) as caught:
        sharding.make_mesh(*sizes)
    for part in ('config: ', *parts):
        assert part in str(caught.value)


# The table.

KERNEL = 'Transformer/encoderblock/MlpBlock_0/Dense_0/kernel'
QUERY = 'Transformer/encoderblock/MultiHeadDotProductAttention_0/query'


@pytest.mark.parametrize(
    'name, shape, wanted',
    [
        (KERNEL, (12, 64, 256), (None, 'fsdp', 'tensor')),
        (KERNEL.replace('block/', 'block_3/'), (64, 256), ('fsdp', 'tensor')),
        (KERNEL.replace('kernel', 'bias'), (12, 256), (None, 'tensor')),
        (KERNEL.replace('0/kernel', '1/kernel'), (12, 256, 64), (None, 'tensor', 'fsdp')),
        (f'{QUERY}/kernel', (12, 64, 4, 16), (None, 'fsdp', 'tensor')),
        (f'{QUERY}/bias', (12, 4, 16), (None, 'tensor')),
        (QUERY.replace('query', 'out/kernel'), (12, 4, 16, 64), (None, 'tensor', None, 'fsdp')),
        ('embedding/kernel', (16, 16, 3, 64), (None, None, None, 'fsdp')),
        ('head/kernel', (64, 1000), ('fsdp', 'tensor')),
        ('head/bias', (1000,), ()),
        ('Transformer/encoder_norm/scale', (64,), ()),
        ('pos_embedding', (1, 196, 64), (None, None, 'fsdp')),
        ('step', (), ()),
    ],
)
def test_parameters_lie_as_the_table_says(name, shape, wanted):
    assert spec(name, shape) == wanted


@pytest.mark.parametrize('prefix', ['opt/1/mu/', 'opt/1/nu/', 'ema/', 'params/'])
def test_what_belongs_to_a_parameter_lies_like_it(prefix):
    assert spec(prefix + KERNEL, (12, 64, 256)) == spec(KERNEL, (12, 64, 256)) != ()


@pytest.mark.parametrize('mesh', [(1, 4, 2), (1, 4, 1)])
@pytest.mark.parametrize('which', ['v_row', 'v_col'])
def test_the_vectors_of_a_factored_moment_are_not_split(which, mesh):
    """They have as many axes as some kernel of theirs, but not its axes: the first are layers."""
    second = KERNEL.replace('0/kernel', '1/kernel')
    assert spec(f'opt/1/{which}/{second}', (12, 256), mesh) == ()
    assert spec(f'opt/1/{which}/{QUERY}/kernel', (12, 16, 64), mesh) == ()


def test_names_must_match_whole_words():
    assert spec('ahead/kernel', (64, 64)) == ()
    assert spec('MyDense_0/kernel', (64, 64)) == ()


@pytest.mark.parametrize(
    'name, shape, mesh, wanted',
    [
        # 3 heads on tensor=2: the axis moves to the head's own dimension.
        (f'{QUERY}/kernel', (12, 64, 3, 16), (1, 4, 2), (None, 'fsdp', None, 'tensor')),
        # Neither heads nor their dimension divide: tensor is dropped, fsdp stays.
        (f'{QUERY}/kernel', (12, 64, 3, 5), (1, 4, 2), (None, 'fsdp')),
        # The width does not divide by fsdp=8, the hidden dimension is not free: dropped.
        (KERNEL, (12, 60, 256), (1, 8, 2), (None, None, 'tensor')),
        # Scanned layers are never split, whatever their number.
        (KERNEL, (16, 60, 255), (1, 8, 2), (None, 'tensor')),
        (KERNEL, (16, 63, 255), (1, 8, 2), ()),
        # ViT-g's width on 256 devices.
        ('embedding/kernel', (14, 14, 3, 1408), (1, 256, 1), ()),
        ('embedding/kernel', (16, 16, 3, 1408), (1, 16, 1), (None, None, None, 'fsdp')),
        ('embedding/kernel', (16, 8, 3, 1401), (1, 8, 1), ('fsdp',)),
    ],
)
def test_an_axis_that_does_not_divide_moves_to_another_dimension_or_goes(name, shape, mesh, wanted):
    assert spec(name, shape, mesh) == wanted


@pytest.mark.parametrize(
    'name, shape, wanted',
    [
        (f'{QUERY}/kernel', (12, 64, 8, 16), (None, None, 'fsdp')),
        # 3 heads on fsdp=8: the inputs are the largest dimension that is left.
        (f'{QUERY}/kernel', (12, 64, 3, 16), (None, 'fsdp')),
        (QUERY.replace('query', 'out/kernel'), (12, 8, 16, 64), (None, 'fsdp')),
        (KERNEL, (12, 64, 256), (None, 'fsdp', 'tensor')),
        (KERNEL.replace('0/kernel', '1/kernel'), (12, 256, 64), (None, 'fsdp')),
    ],
)
def test_without_a_tensor_axis_kernels_lie_as_their_gradients_come(name, shape, wanted):
    assert spec(name, shape, (1, 8, 1)) == wanted


def test_arrays_below_the_smallest_size_are_not_split():
    assert spec(KERNEL, (64, 256), min_shard_size=64 * 256) == ('fsdp', 'tensor')
    assert spec(KERNEL, (64, 256), min_shard_size=64 * 256 + 1) == ()


@pytest.mark.parametrize('size', mostly_slow(variants.SIZES, 'Ti', 'B', 'So400m', '22B'))
def test_every_parameter_of_every_size_divides_on_every_mesh(size):
    fields = variants.parse(f'{size}/14')
    net = make_vit(num_classes=1000, posemb='learned', pool='map', **fields)
    params = trees.flatten(state.abstract_params(net, (224, 224, 3)))
    for sizes in ((1, 256, 1), (1, 64, 4), (4, 8, 8), (1, 1, 16), (1, 96, 3)):
        mesh = mesh_of(*sizes)
        for name, leaf in params.items():
            found = sharding.spec_for(name, leaf.shape, mesh)
            assert len(found) <= leaf.ndim
            used = [axis for axis in found if axis is not None]
            assert len(used) == len(set(used)), f'{name}: an axis is used twice'
            for dimension, axis in zip(leaf.shape, found, strict=False):
                assert dimension % ways(axis, mesh) == 0, f'{name} {leaf.shape} {found}'
            if name.startswith('Transformer/encoderblock/'):
                assert not found or found[0] is None, 'layers are scanned, not split'


@pytest.mark.parametrize('size, share', [('B', 0.02), ('L', 0.02), ('H', 0.02), ('22B', 0.01)])
def test_little_of_a_large_model_is_left_on_every_device(size, share):
    """FSDP over 64 must bring a device near 1/64 of the parameters."""
    net = make_vit(num_classes=1000, **variants.parse(f'{size}/16'))
    params = state.abstract_params(net, (224, 224, 3))
    mesh = mesh_of(1, 64, 1)
    on_device = sum(
        leaf.size / math.prod(ways(axis, mesh) for axis in sharding.spec_for(n, leaf.shape, mesh))
        for n, leaf in trees.flatten(params).items()
    )
    assert 1 / 64 <= on_device / trees.count(params) < 1 / 64 + share


# States on real (fake) devices.


@pytest.fixture(scope='module')
def net():
    return make_vit(num_classes=10, dtype=jnp.float32, **variants.parse('mu/4'))


def abstract(net, mesh, min_shard_size=0):
    return state.abstract(net, (8, 8, 3), optax.adamw(1e-3), True, mesh, min_shard_size)


@pytest.mark.parametrize('sizes', [(1, 8, 1), (2, 2, 2)])
def test_optimizer_state_and_average_follow_their_parameter(net, sizes):
    abstract_state = trees.flatten(abstract(net, sharding.make_mesh(*sizes)))
    params = {
        n.removeprefix('params/'): x for n, x in abstract_state.items() if n.startswith('params/')
    }
    followers = 0
    for name, leaf in abstract_state.items():
        for own, param in params.items():
            if name.endswith('/' + own) and leaf.shape == param.shape:
                assert leaf.sharding == param.sharding, name
                followers += 1
    assert followers == 4 * len(params), 'params, mu, nu and ema'
    assert sum(any(param.sharding.spec) for param in params.values()) >= 6


@pytest.mark.parametrize('sizes, least', [((1, 8, 1), 0), ((2, 2, 2), 0), ((1, 4, 2), 1000)])
def test_device_bytes_are_those_of_the_real_arrays(net, sizes, least):
    abstract_state = abstract(net, sharding.make_mesh(*sizes), least)
    counted = sharding.device_bytes(abstract_state, state.shardings(abstract_state))
    on_device = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(abstract_state):
        real = jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
        for shard in real.addressable_shards:
            on_device[shard.device] += shard.data.nbytes
    assert set(on_device.values()) == {counted}
    assert counted < trees.nbytes(abstract_state)


def test_device_bytes_of_huge_trees_do_not_overflow():
    mesh = sharding.make_mesh()
    leaf = jax.ShapeDtypeStruct((2**24, 2**20), jnp.float32)
    split = NamedSharding(mesh, PartitionSpec('fsdp'))
    assert sharding.device_bytes({'a': leaf}, {'a': split}) == 2**24 * 2**20 * 4 // 8


def test_a_created_state_is_born_where_the_abstract_one_says(net):
    abstract_state = abstract(net, sharding.make_mesh(2, 2, 2))
    made = state.create(net, (8, 8, 3), optax.adamw(1e-3), 0, abstract_state)
    for name, leaf in trees.flatten(made).items():
        wanted = trees.flatten(abstract_state)[name]
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim), name
        assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype), name
    for a, b in zip(jax.tree.leaves(made['params']), jax.tree.leaves(made['ema']), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a is not b


@pytest.mark.parametrize('sizes', [(8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_a_batch_is_split_over_all_but_the_tensor_axis(sizes):
    mesh = sharding.make_mesh(*sizes)
    parts = sizes[0] * sizes[1]
    batch = jax.device_put(np.arange(32).reshape(16, 2), sharding.batch_sharding(mesh))
    rows = {tuple(shard.data[:, 0].tolist()) for shard in batch.addressable_shards}
    size = 16 // parts
    assert rows == {tuple(range(2 * i, 2 * (i + size), 2)) for i in range(0, 16, size)}
    whole = jax.device_put(np.arange(3), sharding.replicated(mesh))
    assert all(shard.data.shape == (3,) for shard in whole.addressable_shards)


@pytest.mark.parametrize(
    'batch, sizes, accumulation',
    [(16, (8, 1, 1), 1), (16, (8, 1, 1), 2), (4, (2, 2, 2), 1), (12, (1, 4, 2), 3)],
)
def test_batches_that_divide_are_taken(batch, sizes, accumulation):
    sharding.check_batch(batch, mesh_of(*sizes), 'batch_size', accumulation)


@pytest.mark.parametrize('batch', [1, 3, 7, 9, 12, 20, 100, 1001])
@pytest.mark.parametrize('sizes, accumulation', [((8, 1, 1), 1), ((2, 2, 2), 2), ((1, 8, 1), 3)])
def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(batch, sizes, accumulation):
    mesh, unit = mesh_of(*sizes), sizes[0] * sizes[1] * accumulation
    if batch % unit == 0:
        batch += 1
    with pytest.raises(UserError, match=rf'config: evals\.x={batch} is not divisible') as caught:
        sharding.check_batch(batch, mesh, 'evals.x', accumulation)
    assert (f'accumulation={accumulation}' in str(caught.value)) == (accumulation > 1)
    near = int(str(caught.value).rpartition('try ')[2])
    sharding.check_batch(near, mesh, 'evals.x', accumulation)
    assert near > 0 and abs(near - batch) < unit


# What stays whole on every device.


def whole_error(shape, mesh, limit=0.1, least=0):
    tree = {'w': jax.ShapeDtypeStruct(shape, jnp.float32)}
    grid = mesh_of(*mesh)
    with pytest.raises(UserError) as caught:
        sharding.check_spread(tree, sharding.shardings_for(tree, grid, least), grid, least, limit)
    return str(caught.value)


def test_a_state_that_fsdp_fails_to_divide_is_refused_with_a_size_that_divides():
    message = whole_error((1408, 6144 + 2), (1, 256, 2))
    assert 'leaves 100% of the state whole on every device' in message
    assert 'w (1408, 6146)' in message
    assert 'try mesh.fsdp=128 and mesh.replica=2' in message
    assert 'mesh.fsdp=1 and mesh.replica=14' in whole_error((700, 1300), (2, 7, 1))


@pytest.mark.parametrize('size', ['S', 'B', 'L', 'H', 'g', 'G', 'e', '22B'])
@pytest.mark.parametrize('mesh', [(1, 64, 1), (2, 128, 1), (1, 64, 4)])
def test_published_sizes_are_spread_on_large_meshes(size, mesh):
    abstract_state = state.abstract_params(
        make_vit(num_classes=1000, **variants.parse(f'{size}/14')), (224, 224, 3)
    )
    grid, least = mesh_of(*mesh), 2**20
    where = sharding.shardings_for(abstract_state, grid, least)
    sharding.check_spread(abstract_state, where, grid, least, 0.1)


def test_small_arrays_and_meshes_without_fsdp_may_stay_whole():
    tree = {'w': jax.ShapeDtypeStruct((700, 110), jnp.float32)}
    for mesh, least in (((1, 4, 1), 77_001), ((4, 1, 1), 0)):
        grid = mesh_of(*mesh)
        sharding.check_spread(tree, sharding.shardings_for(tree, grid, least), grid, least, 0.1)


# Weights brought together for a product.


# Each way to lay out devices and each way to run blocks; test_steps.py has more of both.
@pytest.mark.parametrize(
    'sizes, scan, remat',
    [
        pytest.param((1, 8, 1), False, 'none', marks=pytest.mark.slow),
        pytest.param((2, 4, 1), True, 'full', marks=pytest.mark.slow),
        ((2, 2, 2), True, 'none'),
    ],
)
@pytest.mark.slow
def test_gathered_weights_change_neither_loss_nor_gradients(sizes, scan, remat):
    mesh = sharding.make_mesh(*sizes)
    fields = dict(variants.parse('mu/8'), num_classes=8, depth=2, scan=scan, dtype=jnp.float32)
    image = jax.random.normal(jax.random.key(0), (16, 16, 16, 3))
    plain = make_vit(**fields, pool='map')
    params = plain.init(jax.random.key(1), image[:1])['params']
    params = jax.tree.map(lambda p: p + 0.02, params)  # A head of zeros passes no gradient.

    def gradient(model):
        def loss(params, image):
            return jnp.square(model.apply({'params': params}, image)[0]).mean()

        return jax.jit(jax.value_and_grad(loss))

    model = make_vit(
        **fields, pool='map', remat=remat, gather=sharding.gather_weights(mesh, params)
    )
    where = sharding.shardings_for(params, mesh)
    batch = jax.device_put(image, sharding.batch_sharding(mesh))
    step = gradient(model)
    parts = jax.device_put(params, where)
    have, want = step(parts, batch), gradient(plain)(params, image)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), have, want)
    if sizes[0] == 1:
        assert 'reduce-scatter' in step.lower(parts, batch).compile().as_text()


@pytest.mark.parametrize(
    'name, shape',
    [
        ('MlpBlock_0/Dense_0/kernel', (64, 256)),
        ('MlpBlock_0/Dense_1/kernel', (64, 128)),
        ('MultiHeadDotProductAttention_0/query/kernel', (64, 4, 24)),
        ('MultiHeadDotProductAttention_0/out/kernel', (4, 24, 64)),
    ],
)
def test_kernels_and_their_gradients_stay_split_over_tensor(name, shape):
    """What travels is the part of one of two devices; NumPy says what the gradient is."""
    mesh = sharding.make_mesh(2, 2, 2)
    rng = np.random.default_rng(0)
    inputs = shape[:2] if 'out' in name else shape[:1]
    kernel, x = rng.standard_normal(shape), rng.standard_normal((16, 5, *inputs))
    shapes = trees.unflatten({name: jax.ShapeDtypeStruct(shape, jnp.float32)})
    gather = sharding.gather_weights(mesh, shapes)

    def loss(kernel, x):
        product = lambda x, kernel: jnp.tensordot(x, kernel, len(inputs))  # noqa: E731
        return jnp.square(gather(name, product, x, kernel)).sum()

    where = NamedSharding(mesh, sharding.spec_for(name, shape, mesh))
    assert {'fsdp', 'tensor'} <= set(where.spec)
    with jax.set_mesh(mesh):
        given = jax.device_put(jnp.asarray(kernel, jnp.float32), where)
        rows = jax.device_put(jnp.asarray(x, jnp.float32), sharding.batch_sharding(mesh))
        step = jax.jit(jax.grad(loss), out_shardings=where)
        text, gradient = step.lower(given, rows).compile().as_text(), step(given, rows)
    flat = x.reshape(-1, math.prod(inputs))
    wanted = 2 * flat.T @ flat @ kernel.reshape(flat.shape[1], -1)
    np.testing.assert_allclose(gradient, wanted.reshape(shape), rtol=1e-4, atol=1e-2)
    travels = re.findall(r'= \w+\[([\d,]+)\]\S* all-gather(?:-start)?\(', text)
    sizes = [math.prod(map(int, dims.split(','))) for dims in travels]
    assert sizes == [math.prod(shape) // 2]
    assert 'reduce-scatter' in text


def test_gradients_of_bfloat16_kernels_are_summed_over_fake_devices_too():
    """XLA for CPUs aborts the process if it sums them as they are; NumPy says what they are."""
    mesh = sharding.make_mesh(2, 4, 1, devices=jax.devices()[:8])
    rng = np.random.default_rng(0)
    kernel, x = rng.standard_normal((256, 256)) / 16, rng.standard_normal((16, 256)) / 16
    name = 'Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel'
    shapes = trees.unflatten({name: jax.ShapeDtypeStruct(kernel.shape, jnp.float32)})
    gather = sharding.gather_weights(mesh, shapes)

    def loss(kernel, x):
        y = gather(name, jnp.matmul, x, kernel.astype(jnp.bfloat16))
        return jnp.square(y.astype(jnp.float32)).sum()

    where = NamedSharding(mesh, sharding.spec_for(name, kernel.shape, mesh, 0))
    with jax.set_mesh(mesh):
        given = jax.device_put(jnp.asarray(kernel, jnp.float32), where)
        rows = jax.device_put(jnp.asarray(x, jnp.bfloat16), sharding.batch_sharding(mesh))
        found = jax.jit(jax.grad(loss))(given, rows)
    assert 'fsdp' in str(where.spec)
    wanted = 2 * x.T @ x @ kernel
    assert np.abs(found - wanted).max() < 0.03 * np.abs(wanted).max()
