"""The ledger of memory: against the bytes of real states, closed forms, and at 22 billion."""

import json
import resource
import time

import jax
import jax.numpy as jnp
import pytest
from commands import error_line, run, script
from gate import mostly_slow
from tiny import MODEL, RUN, flags

from big_vit import config, explain, ledger, state, trees
from big_vit.build.experiment import build_experiment
from big_vit.models import variants
from big_vit.models.vit import make_vit
from big_vit.planning import topology

CONFIG = 'configs/pretrain_fdsl.py'
SMALL = {**MODEL, **RUN, 'mesh.min_shard_size': '0', 'mesh.max_replicated': '1'}
MESHES = {
    'data parallel': {'mesh.replica': '8', 'mesh.fsdp': '1'},
    'fully sharded': {'mesh.fsdp': '8'},
    'two axes': {'mesh.replica': '1', 'mesh.fsdp': '4', 'mesh.tensor': '2'},
    'large arrays only': {'mesh.replica': '2', 'mesh.fsdp': '4', 'mesh.min_shard_size': '1000'},
}


def tiny(*more):
    pairs = [pair for part in (SMALL, *more) for pair in part.items()]
    return config.load(CONFIG, pairs)


def bytes_by_device(tree):
    found = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            found[shard.device] = found.get(shard.device, 0) + shard.data.nbytes
    return found


# Every optimizer on two axes, and one on the other meshes too.
@pytest.mark.parametrize(
    'name, mesh',
    mostly_slow(
        [(name, 'two axes') for name in ledger.optimizers()]
        + [('adamw', mesh) for mesh in MESHES if mesh != 'two axes'],
        *((name, 'two axes') for name in ('adafactor', 'shampoo')),
    ),
)
def test_the_figures_are_the_bytes_of_the_real_state(name, mesh):
    settings = tiny(MESHES[mesh], {'ema': '0.9'} if name == 'adamw' else {})
    parts = build_experiment(ledger.with_optimizer(settings, name))
    found = ledger.measure(parts.abstract_state)
    with jax.set_mesh(parts.mesh):
        real = state.create(
            parts.model, parts.data.inputs, parts.optimizer, 0, parts.abstract_state
        )
    said = {'params': found.params, 'ema': found.average, 'opt': found.optimizer_total}
    for part, held in said.items():
        if not held.arrays:
            assert not jax.tree.leaves(real.get(part))
            continue
        assert held.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(real[part]))
        assert held.scalars == trees.count(real[part])
        assert bytes_by_device(real[part]) == dict.fromkeys(jax.devices(), held.on_device)
    everything = bytes_by_device(real)
    assert everything == dict.fromkeys(jax.devices(), found.state.on_device)
    gradients = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), real['params'])
    assert bytes_by_device(gradients) == dict.fromkeys(jax.devices(), found.gradients.on_device)
    assert found.state_and_gradients.on_device == found.state.on_device + found.gradients.on_device


@pytest.mark.parametrize(
    'optim, times, words',
    [
        ({'name': 'sgd', 'momentum': '0'}, 1, 0),
        ({'name': 'sgd'}, 2, 1),
        ({'name': 'sgd', 'mu_dtype': 'bfloat16'}, 1.5, 1),
        ({'name': 'adamw'}, 3, 2),
        ({'name': 'adamw', 'mu_dtype': 'bfloat16'}, 2.5, 2),
    ],
    ids=str,
)
def test_closed_forms(optim, times, words):
    settings = tiny({f'optim.{key}': value for key, value in optim.items()})
    parts = build_experiment(settings, jax.devices()[:1])
    found, m = ledger.measure(parts.abstract_state), 4 * trees.count(parts.abstract_state['params'])
    counters = 4 * (3 + 2 * state.WINDOW)
    rest = found.state.nbytes - times * m - counters
    assert rest in (0, 4), 'at most the count of updates'
    assert found.optimizer_total.scalars - words * m // 4 == rest // 4
    assert found.params.nbytes == found.gradients.nbytes == m


def test_memory_is_told_by_use():
    found = ledger.measure(build_experiment(tiny()).abstract_state)
    m = found.params
    assert found.optimizer == {
        'counters': ledger.Usage(1, 1, 4, 4),
        'first moment': m,
        'second moment': m,
    }


@pytest.mark.parametrize(
    'path, use',
    [
        ('1/mu/Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel', 'first moment'),
        ('1/inner_states/adam/inner_state/0/nu/head/bias', 'adam second moment'),
        ('1/v_row/embedding/kernel', 'second moment by rows'),
        ('1/stacks/768x1024/left_root', 'roots of inputs'),
        ('0/basis/Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel/1', 'basis'),
        ('1/3', 'other'),
    ],
)
def test_uses_are_read_from_paths(path, use):
    params = {'Transformer', 'head', 'embedding'}
    assert ledger.purpose(path, 2, params) == use
    assert ledger.purpose(path, 0, params) == 'counters'


def test_an_optimizer_may_pass_over_what_the_config_sets_for_another():
    settings = tiny({'optim.b1': '0.95', 'optim.momentum': '0.8'})
    for name in ledger.optimizers():
        one = ledger.make_row(settings, jax.devices(), name)
        assert one.ledger is not None and not one.problem, one.problem


def test_what_training_would_refuse_has_its_figures_and_the_reason():
    settings = config.load('configs/vit_g14.py', [('mesh.fsdp', '-1'), ('mesh.replica', '1')])
    one = ledger.make_row(settings, topology.load('cpu:8').devices[:3], 'sgd')
    assert one.ledger is None and 'batch_size' in one.problem
    settings = tiny({'mesh.max_replicated': '0', 'model.width': '516', 'model.mlp_dim': '1036'})
    one = ledger.make_row(settings, jax.devices(), 'sgd')
    assert one.ledger is not None and 'mesh.max_replicated=0' in one.problem


def test_training_starts_with_the_ledger_in_one_line():
    settings = tiny(MESHES['fully sharded'], {'ema': '0.9'})
    parts = build_experiment(settings)
    lines = explain.summary(settings, parts)
    (said,) = [text for text in lines if text.startswith('state ')]
    found = ledger.measure(parts.abstract_state)
    assert f'params {found.params.on_device / 1e6:.2f} MB + ' in said
    assert f'adamw {found.optimizer_total.on_device / 1e6:.2f} MB (2.00×) on a device' in said
    assert f'{found.state.nbytes / 1e6:.2f} MB in all' in said
    assert 'average' in said and 'gradients' in said and len(said) < 160
    alone = ledger.line(found, 'adamw', 1)
    assert 'in all' not in alone


# The command.


def told(*args):
    result = run('ledger', *args, '--json', '-')
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
def test_22_billion_parameters_take_seconds_and_no_memory():
    code = """
import resource, sys
import jax
from big_vit import ledger
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ledger.main(sys.argv[1:])
print('grown', (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 1024  # Kilobytes.
    began = time.monotonic()
    args = ('--config', 'configs/vit_22b.py', '--devices', '512', '--optimizers', 'adamw,sgd')
    result = script(code, *args)
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - began < 60
    assert int(result.stdout.rpartition('grown')[2]) < 500  # Of the 223 GB it tells of.
    net = make_vit(21_843, pool='map', **variants.parse('22B/14'))
    count = trees.count(state.abstract_params(net, (224, 224, 3)))
    assert f'1× = {4 * count:,} bytes' in result.stdout


@pytest.mark.slow
def test_variants_by_optimizers_say_what_fits():
    args = ('--config', 'configs/vit_22b.py', '--config.optim.mu_dtype=float32')
    found = told(*args, '--devices', '8', '--variants', 'B/16,22B/14')
    rows = {(row['variant'], row['optimizer']): row for row in found['rows']}
    assert set(rows) == {(v, o) for v in ('B/16', '22B/14') for o in ledger.optimizers()}
    assert rows['B/16', 'adamw']['state_in_m'] == pytest.approx(3, abs=1e-5)
    assert {row['fits'] for row in found['rows']} == {None}
    assert rows['22B/14', 'adamw']['state_and_gradients']['on_device'] > 40e9


@pytest.mark.slow
def test_a_topology_says_what_fits_a_chip():
    pytest.importorskip('libtpu', reason="the TPU compiler: pip install -e '.[plan]'")
    args = ('--config', 'configs/vit_22b.py', '--topology', 'v5e:4x4', '--optimizers', 'adamw')
    found = told(*args, '--variants', 'L/16,22B/14')
    assert [row['fits'] for row in found['rows']] == [True, False]
    assert found['hbm_of_a_device'] == 15.75 * 2**30
    result = run('ledger', *args, '--variants', 'L/16,22B/14')
    assert ' fits' in result.stdout and ' NO' in result.stdout


def test_the_page_has_the_table_of_all_optimizers():
    result = run('ledger', '--config', CONFIG, *flags(SMALL))
    assert result.returncode == 0, result.stderr
    assert 'optimizer: second moment' in result.stdout and 'state, ×' in result.stdout
    for name in ledger.optimizers():
        assert f'\n{name} ' in result.stdout


@pytest.mark.parametrize(
    'args, said',
    [
        (['--optimizers', 'sdg'], "did you mean 'sgd'?"),
        (['--variants', 'So400/16'], 'did you mean So400m?'),
        (['--variants', 'B16'], 'must look like'),
        (['--topology', 'v5:4x4'], "there is no 'v5:4x4'"),
        (['--topology', 'cpu:8', '--devices', '8'], 'give one'),
        (['--devices', '0'], '--devices must be at least 1'),
        (['--devices', '3'], 'not divisible by 3 devices'),
        (['--config.mesh.fsdp=3'], 'does not multiply to the 1 devices'),
        (['--variants', 'B/5'], 'not divisible by the 5x5 patch'),
        (['--json', 'nowhere/x.json'], '--json: there is no folder nowhere'),
    ],
)
def test_mistakes_are_one_line(args, said):
    assert said in error_line(run('ledger', '--config', CONFIG, *args))


def test_a_missing_config_is_one_line():
    assert '--config is missing' in error_line(run('ledger'))
