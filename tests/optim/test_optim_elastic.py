"""Shampoo and SOAP saved on eight devices go on on four and on one, and after another optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import MODEL, overrides

from big_vit import checkpoint, config, metrics, sharding, state, train, trees
from big_vit.build.experiment import build_experiment
from big_vit.errors import UserError
from big_vit.models.vit import make_vit
from big_vit.optim import blocks, shampoo, soap

VIT = make_vit(10, (4, 4), 24, 2, 48, 2, scan=True)
IMAGE = (8, 8, 3)
OPTIONS = {
    'shampoo': (shampoo.scale_by_shampoo, dict(block=24, every=4, start=3, groups=2)),
    'sliced': (shampoo.scale_by_shampoo, dict(block=24, every=4, start=3, sliced=True)),
    'soap': (soap.scale_by_soap, dict(block=24, every=4, groups=2)),
}


def on(devices, name):
    mesh = sharding.make_mesh(1, devices, 1, jax.devices()[:devices])
    make, options = OPTIONS[name]
    made = make(mesh=mesh, **options)
    return mesh, made, state.abstract(VIT, IMAGE, made, False, mesh, 0)


def gradients(params, step):
    names = trees.flatten(params)
    rng = np.random.default_rng(step)
    found = {n: rng.standard_normal(x.shape).astype(np.float32) for n, x in names.items()}
    return trees.unflatten(found)


def follow(mesh, made, now, start, stop):
    """The state after the steps; the parameters move by the direction itself."""

    @jax.jit
    def update(now, grads):
        direction, opt = made.update(grads, now['opt'])
        params = jax.tree.map(lambda p, u: p - 0.01 * u, now['params'], direction)
        return {**now, 'params': params, 'opt': opt, 'step': now['step'] + 1}

    with jax.set_mesh(mesh):
        where = state.shardings(now)['params']
        for i in range(start, stop):
            grads = jax.tree.map(jax.device_put, gradients(now['params'], i), where)
            now = jax.block_until_ready(update(now, grads))
    return now


@pytest.mark.slow
@pytest.mark.parametrize('name', OPTIONS)
def test_a_run_goes_on_on_fewer_devices_from_between_two_refreshes(name, tmp_path):
    mesh, made, abstract_state = on(8, name)
    with jax.set_mesh(mesh):
        now = state.create(VIT, IMAGE, made, 0, abstract_state)
    now = follow(mesh, made, now, 0, 6)
    with checkpoint.Manager(tmp_path, 1) as manager:
        manager.save(now, {}, {})
    wanted = follow(mesh, made, now, 6, 11)
    for devices in (8, 4, 1):
        mesh, made, abstract_state = on(devices, name)
        with jax.set_mesh(mesh):
            again = checkpoint.restore(tmp_path, 6, abstract_state)
        for stack in again['opt'].stacks.values():
            assert stack.mu.sharding.shard_shape(stack.mu.shape)[0] * devices == stack.mu.shape[0]
        found = follow(mesh, made, again, 6, 11)
        for path, leaf in trees.flatten(wanted['params']).items():
            other = trees.flatten(found['params'])[path]
            if devices == 8:
                np.testing.assert_array_equal(other, leaf, err_msg=path)
            np.testing.assert_allclose(other, leaf, atol=2e-5, err_msg=path)
        assert int(found['opt'].health['refused']) == int(wanted['opt'].health['refused'])


@pytest.mark.slow
def test_other_groups_go_on_from_the_same_checkpoint(tmp_path):
    mesh, made, abstract_state = on(8, 'shampoo')
    with jax.set_mesh(mesh):
        now = follow(mesh, made, state.create(VIT, IMAGE, made, 0, abstract_state), 0, 5)
    with checkpoint.Manager(tmp_path, 1) as manager:
        manager.save(now, {}, {})
    one = shampoo.scale_by_shampoo(mesh=mesh, block=24, every=4, start=3, groups=1)
    abstract_state = state.abstract(VIT, IMAGE, one, False, mesh, 0)
    with jax.set_mesh(mesh):
        again = checkpoint.restore(tmp_path, 5, abstract_state)
    for name, stack in again['opt'].stacks.items():
        before = now['opt'].stacks[name]
        assert stack.mu.shape[0] < before.mu.shape[0]
        length = stack.mu.shape[0]
        np.testing.assert_array_equal(stack.left, before.left[:length])
        assert not np.asarray(before.left[length:]).any()


def test_another_size_of_blocks_is_refused_by_name(tmp_path):
    mesh, made, abstract_state = on(8, 'shampoo')
    with jax.set_mesh(mesh):
        now = state.create(VIT, IMAGE, made, 0, abstract_state)
    with checkpoint.Manager(tmp_path, 1) as manager:
        manager.save(now, {}, {})
    other = shampoo.scale_by_shampoo(mesh=mesh, block=12, every=4, start=3, groups=2)
    abstract_state = state.abstract(VIT, IMAGE, other, False, mesh, 0)
    with pytest.raises(UserError, match=r'stacks/24x24/\w+ is only in the checkpoint'):
        checkpoint.restore(tmp_path, 0, abstract_state)


# From another optimizer.

BASE = {
    **MODEL,
    'total_steps': '6',
    'batch_size': '16',
    'checkpoint.every_steps': '3',
    'log.every_steps': '1',
    'skip_sigmas': '0',
}
SHAMPOO = {
    'optim.name': 'shampoo',
    'optim.b2': '0.999',  # As AdamW's.
    'optim.start': '2',
    'optim.every': '2',
    'optim.block': '32',
}


def load(*parts):
    return config.load('configs/pretrain_fdsl.py', overrides(BASE, *parts, evals=('test',)))


@pytest.fixture(scope='module')
def of_adamw(tmp_path_factory):
    path = tmp_path_factory.mktemp('adamw') / 'w'
    train.run(load(), path)
    return path


def losses(path):
    return {row['step']: row['train/loss'] for row in metrics.read(path) if 'train/loss' in row}


@pytest.mark.slow
def test_shampoo_goes_on_from_adamw(of_adamw, tmp_path):
    settings = load(SHAMPOO, {'switch': str(of_adamw / 'checkpoints' / '3')})
    assert train.run(settings, tmp_path / 'w').step == 6
    found, before = losses(tmp_path / 'w'), losses(of_adamw)
    assert sorted(found) == [4, 5, 6]
    # The first step is of the same parameters and the same batch.
    assert found[4] == pytest.approx(before[4], rel=1e-5)
    # So is the second: until `start` the direction is that of Adam, with its moments.
    assert found[5] == pytest.approx(before[5], rel=1e-4)
    assert found[6] != pytest.approx(before[6], rel=1e-6)
    rows = [row for row in metrics.read(tmp_path / 'w') if 'train/optim_computed' in row]
    assert rows[0]['train/optim_computed'] == 0 < rows[-1]['train/optim_computed']


@pytest.mark.slow
def test_the_moments_that_are_handed_over_are_those_of_the_checkpoint(of_adamw, tmp_path):
    from big_vit.pretrained import switch_optimizer

    settings = load(SHAMPOO, {'switch': str(of_adamw / 'checkpoints' / '3')})
    parts = build_experiment(settings)
    with jax.set_mesh(parts.mesh):
        new = switch_optimizer.state_of(settings.switch, settings, parts)
    old = checkpoint.restore(of_adamw, 3, build_experiment(load()).abstract_state)
    before = trees.flatten(old['opt'])
    mu = {n.partition('/mu/')[2]: x for n, x in before.items() if '/mu/' in n}
    opt = next(x for x in new['opt'] if isinstance(x, blocks.State))
    shapes = {n: x.shape for n, x in mu.items()}
    plan = blocks.plan(shapes, 32)
    found = blocks.join(plan, {n: stack.mu for n, stack in opt.stacks.items()}, mu)
    found |= trees.flatten(opt.mu)
    assert found.keys() == mu.keys()
    for name, leaf in mu.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)
    assert int(opt.step) == 3 and int(opt.age) == 0 and int(new['step']) == 3
    assert jax.tree.map(jnp.shape, new['params']) == jax.tree.map(jnp.shape, old['params'])


@pytest.mark.parametrize(
    'changes, message',
    [
        pytest.param({'optim.name': 'muon'}, '', marks=pytest.mark.slow),
        ({'optim.name': 'lion'}, 'config: switch: lion takes over no moments; adam'),
        (
            {'optim.freeze_steps': "(('head/.*', 4), ('.*', 0))", 'optim.freeze_by': 'gradient'},
            "config: switch: with optim.freeze_by='gradient' .*remove optim.freeze_",
        ),
        ({**SHAMPOO, 'total_steps': '3'}, 'is at step 3, and this run has 3: set total_steps'),
        ({**SHAMPOO, 'model.width': '64'}, 'holds another architecture: '),
        ({**SHAMPOO, 'optim.groups': '3'}, r'optim.groups: 3 does not divide every=2; try every=3'),
        ({**SHAMPOO, 'optim.stats_dtype': 'bfloat16'}, 'optim.stats_dtype: .*take float32'),
        ({**SHAMPOO, 'optim.exponent': '-0.3'}, "optim.exponent: .*take root='eigh'"),
        ({**SHAMPOO, 'optim.exponent': '0.25'}, 'optim.exponent must be a number'),
        ({**SHAMPOO, 'optim.b2': '1'}, 'optim.b2 must be a number from 0 to below 1'),
    ],
)
def test_what_does_not_go_together_is_one_line(of_adamw, tmp_path, changes, message):
    source = {'switch': str(of_adamw / 'checkpoints' / '3')}
    if not message:
        assert train.run(load(source, changes), tmp_path / 'w').step == 6
        return
    with pytest.raises(UserError, match=message):
        train.run(load(source, changes), tmp_path / 'w')


@pytest.mark.slow
def test_sgd_has_no_moments_to_hand_over(tmp_path):
    train.run(load({'optim.name': 'sgd', 'total_steps': '2'}), tmp_path / 'sgd')
    with pytest.raises(UserError, match=r'switch: .*has not both moments of every parameter'):
        train.run(load(SHAMPOO, {'switch': str(tmp_path / 'sgd')}), tmp_path / 'w')
