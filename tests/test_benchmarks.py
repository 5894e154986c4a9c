"""What the benchmarks of speed measure, and what they say where they cannot."""

import importlib.util
import json
import math
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest
from commands import ROOT, environment, run_module

from benchmarks import baseline, chips, growth, precision, products, startup, step
from big_vit import sharding, state, trees
from big_vit.errors import UserError
from big_vit.models import flops, layers, variants
from big_vit.models.vit import make_vit


def run(*arguments):
    return run_module('benchmarks', *arguments, timeout=120)


def test_help_lists_the_parts_and_a_wrong_one_is_named():
    assert 'growth' in run('--help').stdout
    done = run('speed')
    assert done.returncode == 2
    assert done.stderr == (
        "error: there is no part 'speed'; there are chips, products, step, startup, growth\n"
    )


@pytest.mark.parametrize('part', [chips, growth])
def test_a_wrong_row_is_named(part):
    with pytest.raises(UserError, match="--only: there is no 'x'"):
        part.main(['--only', 'x'])


def test_the_plain_model_is_the_same_model():
    """As many parameters; only what a class token would add is nowhere."""
    fields = variants.parse('S/16')
    plain = baseline.PlainViT(**fields)
    made = jax.eval_shape(plain.init, jax.random.key(0), jax.numpy.zeros((1, 64, 64, 3)))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(made))
    ours = make_vit(num_classes=baseline.CLASSES, **fields)
    assert count == trees.count(state.abstract_params(ours, (64, 64, 3)))


def test_the_plain_step_compiles_for_a_mesh():
    mesh = sharding.make_mesh(2, 1, 1, jax.devices()[:2])
    text = baseline.lower('mu/16', mesh, 4, 32).compile().as_text()
    assert 'all-reduce' in text


@pytest.mark.skipif(importlib.util.find_spec('torch') is not None, reason='torch is installed')
def test_without_peers_it_says_what_to_install():
    with pytest.raises(UserError, match=r'torch and timm must be installed .* pip install torch'):
        step.main([])


@pytest.mark.slow
def test_our_step_trains_and_its_operations_are_counted():
    size = step.Size('mu/4', 16, 4, (('depth', 1),))
    with jax.set_mesh(sharding.make_mesh(1, 2, 1, jax.devices()[:2])):
        once, operations = step.ours(size, 'cpu', 'adamw', scan=False, devices=2)
        losses = [step.wait(once()) for _ in range(3)]
    assert losses[0] == pytest.approx(math.log(1000), rel=1e-3)  # A head of zeros.
    assert losses[2] < losses[0]
    model = make_vit(num_classes=1000, **{**variants.parse('mu/4'), 'depth': 1})
    variables = {'params': state.abstract_params(model, (16, 16, 3))}
    images = jax.ShapeDtypeStruct((4, 16, 16, 3), np.float32)
    assert operations == 3 * flops.count(model.apply, variables, images)


@pytest.mark.slow
def test_a_side_waits_in_its_own_process_and_times_a_round_when_asked():
    side = step.Side('step', '--side', 'big_vit', '--size', '0')
    try:
        assert side.read_message()['flops'] > 1e9
        assert side.round() > 0
        assert side.round() > 0
    finally:
        side.end()


def test_a_side_that_a_machine_cannot_run_is_left_out_and_the_plain_ones_must_run(monkeypatch):
    class Broken:
        def __init__(self, *command, environment=None):
            self.name = command[2]

        def read_message(self):
            if self.name in broken:
                raise UserError('it ended: no such library')
            return {'flops': 5, 'memory': 7}

        def round(self):
            return 0.25

        def end(self):
            pass

    monkeypatch.setattr(step, 'Side', Broken)
    broken = {'big_vit, cudnn', 'timm, compiled in 2 parts'}
    names = ['big_vit', 'timm', *sorted(broken)]
    row = step.measure(step.SIZES['cpu'][0], 0, 2, names)
    assert row['times'] == {'big_vit': [0.25, 0.25], 'timm': [0.25, 0.25]}
    assert row['memory'] == {'big_vit': 7, 'timm': 7}
    assert set(row['left']) == broken
    broken = {'big_vit in 2 parts'}
    with pytest.raises(UserError, match=r'big_vit in 2 parts, mu/4 .*: it ended: no such library'):
        step.measure(step.SIZES['cpu'][0], 0, 2, ['big_vit', *broken])


@pytest.mark.slow
def test_a_side_that_ends_leaves_its_last_words():
    side = step.Side('step', '--side', 'lightning')
    with pytest.raises(UserError, match=r'it ended: .*invalid choice'):
        side.read_message()
    side.end()


def test_rounds_of_several_sides_become_a_table():
    times = {'big_vit': [0.1, 0.1, 0.2], 'timm': [0.3, 0.2, 0.2], 'timm, compiled': [0.4, 0.4, 0.4]}
    memory = {'big_vit': 3 * 2**29, 'timm': 0, 'timm, compiled': 0}
    row = {'name': 'x', 'batch': 10, 'flops': 1e9, 'times': times, 'memory': memory}
    ours, eager, _ = step.table([row], 1e11).splitlines()[2:]
    assert ours == '| x | big_vit | 100.0 | 50.0 to 100.0 | 10.0% | 1.50 | 2.00 |'
    assert eager.endswith('| 1.00 |')


def test_a_row_that_does_not_fit_has_no_ratio_and_rows_come_in_the_order_of_the_list():
    fits = {'fits': True, 'cycles': 5_000_000, 'step_seconds': 0.01, 'mfu': 0.5, 'hbm_peak': 2**30}
    row = {**chips.Row('B/16', 'v5e:4x4', 64)._asdict(), 'big_vit': {**fits, 'problem': ''}}
    whole = {**row, 'plain': {**fits, 'cycles': 10_000_000, 'problem': ''}}
    too_much = {**row, 'plain': {**fits, 'fits': False, 'problem': 'needs 20.0 GiB'}}
    names = [row.name for row in chips.ROWS[:3]]
    rows = dict(zip(names, (whole, too_much, row), strict=True))
    first, second = chips.table(dict(reversed(rows.items()))).splitlines()[2:]
    assert '| 10.0 | 5.0 | 0.50 |' in first
    assert '| needs 20.0 GiB | 5.0 | - |' in second


def test_sides_that_were_made_for_other_settings_do_not_count():
    row = chips.Row('B/16', 'v5e:4x4', 64)
    all_ = {'rows': {row.name: {**row._asdict(), 'plain': 1, 'big_vit': 2}}}
    assert chips.stored_sides(row, all_) == {'plain': 1, 'big_vit': 2}
    assert chips.stored_sides(row._replace(accumulation=2), all_) == {}
    assert chips.stored_sides(row._replace(variant='L/16'), all_) == {}


def test_the_stored_rows_are_those_that_are_compared():
    all_ = chips.stored()
    made = [row.name for row in chips.ROWS if chips.stored_sides(row, all_)]
    assert sorted(made) == sorted(all_['rows'])


def test_chips_of_a_topology():
    assert growth.chip_count('v5p:16x16x16') == 4096


def test_a_command_that_fails_is_told():
    with pytest.raises(UserError, match='ModuleNotFoundError'):
        startup.seconds(['-c', 'import nothing_of_this_name'])


def test_growth_has_a_row_for_each_point_that_is_there_also_if_it_does_not_fit():
    fits = {'fits': True, 'cycles': 5_000_000, 'step_seconds': 0.01, 'hbm_peak': 2**30, 'mfu': 0.5}
    fits |= {'examples_per_second': 16_000, 'moved': 3e6, 'waiting': 0.001}
    points = {
        json.dumps({**growth.SHARED, 'batch': 8}): fits,
        json.dumps({**growth.SHARED, 'batch': 128}): {**fits, 'fits': False, 'step_seconds': 0.0},
    }
    first, last = growth.table('batch', points).splitlines()[2:]
    assert first == '| 8 images | 5.0 | 10.00 | 1,000 | 1.00 | 3 | 10.0% | 50.0% |'
    assert last.startswith('| 128 images | does not fit |') and last.count('|') == first.count('|')


def test_growth_over_fake_devices_is_told_beside_one():
    found = {'batch': 64, 'seconds': {'1': [0.1, 0.2, 0.1], '2': [0.2, 0.2, 0.4]}}
    one, two = growth.table_of_devices(found).splitlines()[2:]
    assert one == '| 1 | 640 | 320 to 640 | 1.00 |'
    assert two == '| 2 | 320 | 160 to 320 | 0.50 |'


def test_norms_in_two_passes_are_what_the_model_computes_where_that_is_asked():
    x = jax.random.normal(jax.random.key(0), (3, 16))
    layer = layers.LayerNorm()
    params = layer.init(jax.random.key(1), x)
    seen = []

    def norm(*args):
        seen.append(args)
        return precision.two_passes(*args)

    with mock.patch.object(layers, 'layer_norm', norm):
        found = layer.apply(params, x)
    assert len(seen) == 1
    np.testing.assert_allclose(found, layer.apply(params, x), atol=1e-6)


def test_the_products_of_a_block_are_three_times_those_of_its_forward_pass():
    tokens, width, hidden = 6, 10, 40
    found = products.shapes(tokens, width, hidden)
    assert set(found) == set(products.COUNTS)
    counted = sum(products.COUNTS[name] * math.prod(shape) for name, shape in found.items())
    assert counted == 3 * tokens * (4 * width**2 + 2 * width * hidden)
    # One that is infinitely quick leaves the time of the others; equal shares stay what they are.
    assert products.of_block(dict.fromkeys(found, 0.4), found) == pytest.approx(0.4)
    some = {name: 0.5 if 'kernel' in name else math.inf for name in found}
    assert products.of_block(some, found) == pytest.approx(1.5)  # A third of the work at a half.


# In a process of its own: the cache of programs cannot be left out once it was used.
SHARES = """
import jax
from benchmarks import products
from big_vit.planning import topology

jax.config.update('jax_enable_compilation_cache', False)
place = topology.load('v5e:1x1')
for shape, transposed in (((2048, 1024, 128), False), ((2048, 8192, 2048), True)):
    taken = products.cycles(shape, transposed, place.devices[0])
    print('share', products.share_of_peak(shape, taken, place.chip))
"""


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='no libtpu')
@pytest.mark.slow
def test_a_product_that_fills_a_chip_is_near_its_peak_and_a_thin_one_is_not():
    command = [sys.executable, '-c', SHARES]
    text = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    thin, full = (
        float(line.split()[1]) for line in text.stdout.splitlines() if line[:5] == 'share'
    )
    assert 0 < thin < 0.6
    assert 0.8 < full <= 1


def test_the_name_of_a_side_says_its_parts_and_devices():
    assert step.parse_side('timm, compiled') == ('timm, compiled', 1, 1)
    assert step.parse_side('timm, compiled in 2 parts') == ('timm, compiled', 2, 1)
    assert step.parse_side(step.ON_TWO) == ('big_vit', 2, 2)
