"""Planning: the real TPU compiler on a machine without TPUs, and what a plan says."""

import importlib.util
import json
import re
import types

import jax
import pytest
from commands import error_line, run
from gate import mostly_slow
from tiny import MODEL, flags

from big_vit import compiler, config, plan, sharding
from big_vit.errors import UserError
from big_vit.planning import topology

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None, reason="the TPU compiler: pip install -e '.[plan]'"
)
CONFIG = 'configs/pretrain_fdsl.py'
SMALL = flags(MODEL, {'model.scan': 'true', 'model.dtype': 'bfloat16', 'batch_size': '64'})


# Hardware.


@pytest.mark.parametrize(
    'name, matrix_units, width, cores',
    [('v4', 4, 128, 2), ('v5e', 4, 128, 1), ('v5p', 4, 128, 2), ('v6e', 4, 256, 1)],
)
def test_clocks_follow_from_the_peak_rate_and_the_matrix_units(name, matrix_units, width, cores):
    chip = topology.CHIPS[name]
    flops_per_cycle = 2 * width**2 * matrix_units * cores
    assert chip.peak_flops / flops_per_cycle == pytest.approx(chip.clock, rel=0.01)


@needs_compiler
@pytest.mark.parametrize(
    'name, slices, devices, chips, hosts',
    [
        ('v4:2x2x4', 1, 16, 16, 4),
        ('v5e:1x1', 1, 1, 1, 1),
        ('v5e:16x16', 1, 256, 256, 64),
        ('v5e:4x4', 2, 32, 32, 8),
        ('v5p:8x8x8', 1, 512, 512, 128),
        ('v6e:4x8', 1, 32, 32, 8),
        ('tpu7x:2x2x2', 1, 16, 8, 2),
    ],
)
def test_topologies(name, slices, devices, chips, hosts):
    found = topology.load(name, slices)
    assert (len(found.devices), found.chips, found.hosts) == (devices, chips, hosts)
    assert found.devices_per_chip == devices // chips


def test_compiler_options_of_a_chip_unless_the_user_gave_them(monkeypatch):
    (device,) = topology.load('v5e:1x1').devices
    mesh = sharding.make_mesh(1, 1, 1, [device])
    name = 'xla_tpu_scoped_vmem_limit_kib'
    found = compiler.options(mesh)
    assert found == compiler.OPTIONS['TPU v5 lite'] and found[name] == '28672'
    monkeypatch.setenv('LIBTPU_INIT_ARGS', f'--{name}=20000')
    assert compiler.options(mesh) == {n: x for n, x in found.items() if n != name}
    assert compiler.options(sharding.make_mesh(1, 1, 1, jax.devices()[:1])) == {}


@pytest.mark.parametrize('name', ['v5:4x4', 'v5e', 'v5e:4x', 'v5e:0x4', 'gpux:8', 'cpu:0', 'x'])
def test_an_unknown_topology_names_valid_ones(name):
    with pytest.raises(UserError, match=r'there is no .*v5e:4x4.*v5p:4x4x4.*cpu:8'):
        topology.load(name)


def test_a_shape_of_the_wrong_dimensions_names_one_that_is_right():
    with pytest.raises(UserError, match='v5p slices have 3 dimensions, such as v5p:4x4x4'):
        topology.load('v5p:4x4')


@needs_compiler
def test_a_shape_that_no_slice_has():
    with pytest.raises(UserError, match=r"does not accept 'v5e:3x5'.*examples are"):
        topology.load('v5e:3x5')


@pytest.mark.parametrize(
    'found, said', [(None, 'is not installed'), ('0.0.1', '0.0.1 does not go')]
)
def test_a_compiler_that_is_missing_or_wrong_names_the_pip_line(monkeypatch, found, said):
    def version(name):
        if found is None:
            raise topology.importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(topology.importlib.metadata, 'version', version)
    with pytest.raises(UserError, match=said) as caught:
        topology.load('v5e:4x4')
    assert f"pip install 'libtpu=={topology.wanted_libtpu()}'" in str(caught.value)
    assert re.fullmatch(r'0\.0\.\d+\.\*', topology.wanted_libtpu())


# What an operation belongs to.


@pytest.mark.parametrize(
    'source, part',
    [
        ('jit(s)/jvp(ViT)/Transformer/while/body/b/MultiHeadDotProductAttention_0/query/dot', 0),
        ('jit(s)/transpose(jvp(ViT))/b/MultiHeadDotProductAttention_0/BTNH,BSNH->BNTS/dot', 1),
        ('jit(s)/jvp(ViT)/Transformer/while/body/b/MlpBlock_0/Dense_1/dot_general', 2),
        ('jit(s)/jvp(ViT)/Transformer/while/body/b/LayerNorm_0/mul', 3),
        ('jit(s)/jvp(ViT)/Transformer/encoder_norm/mul', 3),
        ('jit(s)/jvp(ViT)/embedding/dot_general', 4),
        ('jit(s)/jvp(ViT)/head/dot_general', 5),
        ('jit(s)/jvp(ViT)/Transformer/while/body/dynamic_update_slice', 6),
        ('jit(s)/jvp()/reduce_sum', 7),
        ('jit(s)/mul', 8),
        ('', 8),
    ],
)
def test_parts_of_the_model(source, part):
    assert plan.part_of(source) == plan.PARTS[part][0]


@pytest.mark.parametrize(
    'message, expected',
    [
        (
            'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO '
            'temporaries (49.62G) exceeds available HBM (15.75G).',
            (49.62, 15.75),
        ),
        ('RESOURCE_EXHAUSTED: XLA: Used 33.70G of 15.75G hbm. Exceeded by 17.95G.', (33.7, 15.75)),
        ('RESOURCE_EXHAUSTED: XLA: Used 512.00M of 1.00G hbm.', (0.5, 1)),
        ('RESOURCE_EXHAUSTED: scoped vmem', None),
        ('INTERNAL: Used 1G of 2G hbm', None),
    ],
)
def test_out_of_memory_is_read_from_the_compilers_words(message, expected):
    found = plan.out_of_memory(message)
    assert found == (expected and pytest.approx([n * 2**30 for n in expected]))


# The command.


def planned(*args, devices=1):
    result = run('plan', '--config', CONFIG, *args, '--json', '-', devices=devices)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope='module')
def data_parallel(tmp_path_factory):
    # A program for chips that are not here could not be read again, so none is kept.
    cache = tmp_path_factory.mktemp('cache')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('JAX_COMPILATION_CACHE_DIR', str(cache))
        found = planned('--topology', 'v5e:2x2', '--mesh', 'replica=4', *SMALL)
    assert not list(cache.iterdir())
    return found


@pytest.fixture(scope='module')
def fully_sharded():
    return planned('--topology', 'v5e:2x2', *SMALL, '--config.mesh.min_shard_size=0')


@needs_compiler
@pytest.mark.parametrize('which', mostly_slow(['data_parallel', 'fully_sharded'], 'fully_sharded'))
def test_a_plan_adds_up(request, which):
    found = request.getfixturevalue(which)
    assert (found['chips'], found['hosts'], found['fits']) == (4, 1, True)
    assert sum(found['hbm'].values()) == found['hbm_peak'] < found['hbm_capacity']
    assert sum(found['seconds'].values()) == pytest.approx(found['step_seconds'])
    waiting = sum(c['seconds'] for c in found['collectives'] if not c['overlapped'])
    assert found['seconds']['collectives not overlapped'] == pytest.approx(waiting)
    computing = found['step_seconds'] - waiting
    assert found['cycles'] / 1.5e9 == pytest.approx(computing)
    assert found['examples_per_second'] == pytest.approx(64 / found['step_seconds'])
    assert 0 < found['mfu'] < 1
    assert found['days'] == pytest.approx(1500 * found['step_seconds'] / 86400)
    assert found['chip_hours'] == pytest.approx(found['days'] * 24 * 4)
    assert found['unknown_loops'] == 0
    for part in (
        'MLP',
        'attention core',
        'attention projections',
        'norms',
        'optimizer and metrics',
    ):
        assert found['seconds'][part] > 0, part


@needs_compiler
@pytest.mark.slow
def test_memory_is_that_of_the_mesh(data_parallel, fully_sharded):
    params = data_parallel['params']
    assert data_parallel['hbm']['parameters'] == 4 * params
    # Two moments, and a few counters and the window of recent losses.
    assert 0 <= data_parallel['hbm']['optimizer'] - 8 * params < 2048
    assert data_parallel['hbm']['batch'] == 64 // 4 * (32 * 32 * 1 + 4)
    assert fully_sharded['hbm']['parameters'] < 0.45 * data_parallel['hbm']['parameters']


def kinds(found):
    return {c['kind'] for c in found['collectives']}


@needs_compiler
@pytest.mark.slow
def test_collectives_of_data_parallel_and_fully_sharded_steps(data_parallel, fully_sharded):
    # Gradients are added up over the chips and nothing else travels.
    assert kinds(data_parallel) == {'all-reduce'}
    reduced = sum(c['bytes'] for c in data_parallel['collectives'])
    assert 2 * data_parallel['params'] <= reduced <= 4.2 * data_parallel['params']
    # Each kernel is brought together once: four of attention, two of the MLP, embedding, head;
    # and so are the positions.
    assert kinds(fully_sharded) == {'all-gather', 'all-reduce', 'reduce-scatter'}
    gathers = [c for c in fully_sharded['collectives'] if c['kind'] == 'all-gather']
    assert sum(c['count'] for c in gathers) == 9


@needs_compiler
@pytest.mark.slow
def test_the_estimate_grows_with_the_layers():
    """Layers are scanned: only the rounds of their loops tell how many there are."""
    args = ('--topology', 'v5e:2x2', *SMALL)
    few, many = (planned(*args, f'--config.model.depth={n}')['cycles'] for n in (8, 32))
    assert 2.5 < many / few < 5


@needs_compiler
@pytest.mark.slow
def test_a_step_that_does_not_fit_is_an_answer():
    args = ('--topology', 'v5e:2x2', '--config.batch_size=65536', '--config.model.width=1024')
    result = run('plan', '--config', f'{CONFIG}:size=64', *SMALL, *args, '--config.model.depth=6')
    assert result.returncode == 0, result.stderr
    assert re.search(r'DOES NOT FIT: needs [\d.]+ GiB of 15\.75', result.stdout)
    assert '--config.model.remat=names' in result.stdout and '--search' in result.stdout
    assert 'Traceback' not in result.stdout + result.stderr


@pytest.mark.parametrize(
    'remat, more',
    [('none', 'names'), ('names', 'full'), ('full', None), ('offload', None)],
)
def test_advice_goes_up_by_one_kind_of_rematerialization(remat, more):
    settings = {
        'remat': remat,
        'mesh': {'replica': 1, 'fsdp': 4, 'tensor': 1},
        'slices': 1,
        'batch_per_device': 8,
        'accumulation': 2,
    }
    said = plan.advice(types.SimpleNamespace(settings=settings)).split(', ')
    first = [f'--config.model.remat={more}'] if more else []
    assert said == [*first, '--config.accumulation=4', 'a larger topology', '--search']


@needs_compiler
@pytest.mark.slow
def test_search_prints_what_it_tries_and_the_fastest():
    result = run('plan', '--config', CONFIG, '--topology', 'v5e:2x2', *SMALL, '--search')
    assert result.returncode == 0, result.stderr
    tried = re.findall(r'mesh (\S+)  batch.*?([\d,]+) ex/s', result.stdout)
    assert len(tried) >= 2
    best = max(float(speed.replace(',', '')) for _, speed in tried)
    shown = re.search(r'([\d,]+) examples/s', result.stdout.partition('\nfastest\n')[2])
    assert float(shown[1].replace(',', '')) == best


@needs_compiler
@pytest.mark.parametrize(
    'speeds, expected',
    [
        ({1: 9.0, 2: 9.5, 4: 9.2}, [1, 2, 4]),
        ({1: 9.0, 2: 8.0}, [1, 2]),
        ({1: 0.0, 2: 0.0, 4: 9.0}, [1, 1, 1, 2, 2, 2, 4]),  # 0: it does not fit.
    ],
)
def test_a_search_takes_smaller_parts_as_long_as_they_are_faster(monkeypatch, speeds, expected):
    def made(tried, place):
        speed = speeds[tried.accumulation]
        return types.SimpleNamespace(
            fits=speed > 0, examples_per_second=speed, settings=tried.accumulation
        )

    monkeypatch.setattr(plan, 'make', made)
    monkeypatch.setattr(plan, 'meshes', lambda *_: [{'replica': 1, 'fsdp': 4, 'tensor': 1}])
    small = [word.removeprefix('--config.').partition('=')[::2] for word in SMALL]
    loaded = config.load(CONFIG, [*small, ('batch_size', '64')])
    tried = list(plan.search(loaded, topology.load('v5e:2x2'), []))
    assert [one.settings for one in tried] == expected


def test_a_dry_run_on_fake_cpus_tells_memory_and_collectives():
    found = planned('--topology', 'cpu:8', *SMALL, '--mesh', 'fsdp=8')
    assert (found['chips'], found['cycles'], found['hbm_capacity']) == (8, 0, None)
    assert found['hbm_peak'] > found['hbm']['parameters'] > 0
    assert 'all-reduce' in kinds(found)


@pytest.mark.slow
def test_data_that_is_not_here_is_planned_from_its_figures(tmp_path):
    figures = flags(
        {
            'data.name': 'tfds',
            'data.tfds_name': 'imagenet2012',
            'data.path': str(tmp_path),
            'data.num_classes': '1000',
            'data.num_examples': '1281167',
        }
    )
    found = planned('--topology', 'cpu:1', *SMALL, *figures, '--config.total_steps=7')
    assert found['steps'] == 7
    missing = [flag for flag in figures if 'num_examples' not in flag]
    result = run('plan', '--config', CONFIG, '--topology', 'cpu:1', *SMALL, *missing)
    assert 'imagenet2012' in error_line(result)


@pytest.mark.parametrize(
    'args, said',
    [
        (['--topology', 'v5e:16'], 'v5e slices have 2 dimensions'),
        (['--topology', 'cpu:8', '--slices', '2'], '--slices: cpu:8 has no slices'),
        (['--topology', 'cpu:8', '--slices', '0'], '--slices must be at least 1'),
        (['--topology', 'cpu:8', '--mesh', 'fsdp=3'], 'does not multiply to the 8 devices'),
        (['--topology', 'cpu:8', '--mesh', 'data=8'], "--mesh: cannot read 'data=8'"),
        (['--topology', 'cpu:8', '--config.batch_size=60'], 'not divisible by 8 devices'),
        (['--topology', 'cpu:8', '--search'], 'no time estimates for cpu:8'),
        (['--topology', 'cpu:8', '--search', '--per-device', 'x'], '--per-device: cannot read'),
        (['--topology', 'cpu:8', '--json', 'nowhere/x.json'], '--json: there is no folder nowhere'),
        ([], '--topology is missing'),
    ],
)
def test_mistakes_are_one_line(args, said):
    assert said in error_line(run('plan', '--config', CONFIG, *args))


@needs_compiler
@pytest.mark.slow
def test_slices_need_copies_on_each():
    args = ('--topology', 'v5e:2x2', '--slices', '2', *SMALL)
    line = error_line(run('plan', '--config', CONFIG, *args, '--mesh', 'fsdp=8'))
    assert 'mesh.replica=1 is not a multiple of the 2 slices' in line
    found = planned(*args, '--mesh', 'replica=2,fsdp=4', '--config.mesh.min_shard_size=0')
    assert (found['chips'], found['settings']['slices']) == (8, 2)
    between = [c for c in found['collectives'] if c['over'] == 'network']
    assert {c['kind'] for c in between} == {'all-reduce'} and between[0]['devices'] == 2
