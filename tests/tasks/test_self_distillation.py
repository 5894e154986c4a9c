"""Self-distillation as users run it: meshes, accumulation, resumption, optimizers, bad inputs."""

import re
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run, run_many, start
from gate import mostly_slow
from self_distillation_oracle import numbers
from tiny import SELF_DISTILLATION, flags

from big_vit import checkpoint, config, metrics
from big_vit.build.data import device_operations
from big_vit.build.experiment import abstract_batch, build_experiment, fresh_state, train_batches
from big_vit.build.steps import build_train_step
from big_vit.errors import UserError
from big_vit.tasks import block_masks
from big_vit.tasks.self_distillation import teacher_rate, teacher_temperature

VIEWS = 'decode ; global: 2 * rrc(size) | flip_lr ; local: 3 * rrc(4, scale=(0.05, 0.4)) | flip_lr'
DIGITS = {**SELF_DISTILLATION, 'task.prototypes': 32, 'data.transform': VIEWS}
# All that depends on the whole batch: Sinkhorn, masks of groups, neighbours, two heads.
WHOLE = {'task.centering': 'sinkhorn', 'task.patch_head': 'separate', 'task.gram_weight': 1.0}
MESHES = {
    'accumulation': (1, ['--config.accumulation=2']),
    'data': (8, ['--config.mesh.replica=8', '--config.mesh.fsdp=1']),
    'fsdp': (8, ['--config.mesh.fsdp=8']),
    '2-D': (8, ['--config.mesh.replica=2', '--config.mesh.fsdp=2', '--config.mesh.tensor=2']),
    'both': (4, ['--config.mesh.fsdp=2', '--config.mesh.tensor=2', '--config.accumulation=4']),
}


@pytest.fixture(scope='module')
def spec(tmp_path_factory):
    path = tmp_path_factory.mktemp('config') / 'config.py'
    path.write_text(
        'from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict()\n'
    )
    return path


def options(spec, workdir, *more, **changes):
    settings = {**DIGITS, **changes}
    given = {key: str(value) for key, value in settings.items()}
    return ['--config', spec, *flags(given), *more, '--workdir', workdir]


def learnt(workdir):
    """What was logged, and all arrays at the end."""
    rows = [
        {name: x for name, x in row.items() if name.startswith('train/')}
        for row in metrics.read(workdir)
        if 'train/loss' in row
    ]
    return rows, checkpoint.load_params(workdir, rows and 6)[0]


@pytest.fixture(scope='module')
def one(tmp_path_factory, spec):
    workdir = tmp_path_factory.mktemp('one') / 'w'
    result = run('train', *options(spec, workdir, **WHOLE))
    assert result.returncode == 0, result.stderr
    return learnt(workdir)


def agree(found, wanted):
    for row, other in zip(found[0], wanted[0], strict=True):
        assert row.keys() == other.keys()
        for name, value in other.items():
            assert row[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), found[1], wanted[1]
    )


@pytest.mark.slow
@pytest.mark.parametrize('name', MESHES)
def test_any_mesh_and_accumulation_learn_the_same(tmp_path, spec, one, name):
    devices, more = MESHES[name]
    result = run('train', *options(spec, tmp_path / 'w', *more, **WHOLE), devices=devices)
    assert result.returncode == 0, result.stderr
    agree(learnt(tmp_path / 'w'), one)


@pytest.mark.slow
def test_two_processes_learn_the_same(tmp_path, spec, one):
    run_many('train', *options(spec, tmp_path / 'w', '--config.mesh.fsdp=4', **WHOLE))
    agree(learnt(tmp_path / 'w'), one)


@pytest.mark.slow
def test_kill_9_and_restart_end_bit_identical_with_teacher_and_centres(tmp_path, spec):
    changes = {'total_steps': 60, 'checkpoint.every_steps': 10, 'task.gram_weight': 1.0}
    changes |= {'task.gram_start': 0.2, 'task.gram_every': 0.2}
    leaves = {}
    for name in ('whole', 'killed'):
        given = options(spec, tmp_path / name, **changes)
        if name == 'killed':
            process = start('train', *given)
            until = time.time() + 240
            while time.time() < until and process.poll() is None:
                rows = metrics.read(tmp_path / name)
                if rows and rows[-1]['step'] >= 25:
                    break
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            assert metrics.read(tmp_path / name)[-1]['step'] < 60
        result = run('train', *given)
        assert result.returncode == 0, result.stderr
        saved = checkpoint.read_sidecar(tmp_path / name, 60)['leaves']
        leaves[name] = {path: leaf['hash'] for path, leaf in saved.items()}
    assert leaves['killed'] == leaves['whole']
    kinds = ('ema/dino_head', 'task/centre/dino', 'task/centre/ibot', 'task/gram/mask_token')
    assert all(any(kind in path for path in leaves['whole']) for kind in kinds)


def built(changes):
    settings = config.resolve({**DIGITS, **changes})
    parts = build_experiment(settings)
    return settings, parts, build_train_step(settings, parts)


def steps_of(changes, count):
    """States and metrics of some steps on all devices."""
    settings, parts, step = built(changes)
    with jax.set_mesh(parts.mesh):
        now = fresh_state(parts, 0)
        states, rows = [jax.device_get(now)], []
        with train_batches(settings, parts, 0) as batches:
            for _, batch in zip(range(count), batches, strict=False):
                now, seen = step(now, batch)
                states.append(jax.device_get(now))
                rows.append({name: float(x) for name, x in seen.items()})
    return states, rows


@pytest.mark.slow
@pytest.mark.parametrize(
    'changes',
    [
        {'optim.name': 'shampoo', 'optim.start': 1, 'optim.every': 1},
        {'optim.name': 'soap', 'optim.every': 1},
        {'optim.name': 'muon'},
        {'optim.name': 'lamb'},
        {'optim.sam_rho': 0.05},
        {'model.scan': False, 'model.remat': 'full', 'model.drop_path': 0.2},
        {'model.posemb': 'rope', 'model.posemb_prefix': 0, 'model.registers': 2},
        {'model.pool': 'gap', 'model.posemb': 'sincos2d', 'model.posemb_prefix': 0},
    ],
    ids=str,
)
def test_optimizers_and_models_of_all_kinds_learn(changes):
    states, rows = steps_of({**changes, 'batch_size': 32}, 3)
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    assert rows[-1]['skipped'] == 0 and rows[-1]['update_norm'] > 0
    moved = states[-1]['ema']['dino_head']['prototypes']['kernel']
    assert np.abs(moved - states[0]['ema']['dino_head']['prototypes']['kernel']).max() > 0


@pytest.mark.slow
def test_parts_of_the_loss_sum_to_it_and_gram_begins_when_it_is_due():
    weights = {'dino': 0.7, 'ibot': 1.3, 'koleo': 0.1, 'gram': 2.0}
    changes = {f'task.{name}_weight': weight for name, weight in weights.items()}
    changes |= {'task.gram_start': 0.5, 'mesh.fsdp': 4, 'mesh.replica': 2}
    states, rows = steps_of(changes, 6)
    for row in rows:
        total = sum(weight * row[name] for name, weight in weights.items())
        assert row['loss'] == pytest.approx(total, rel=1e-5)
        assert 0 < row['used_prototypes'] <= 1
        assert 0 <= row['teacher_entropy'] <= row['teacher_entropy_of_mean'] + 1e-5
    assert [row['gram'] > 0 for row in rows] == [False] * 3 + [True] * 3
    # The copy of the third step's teacher, but for the rounding of computing it twice, stays.
    copy = states[3]['task']['gram']
    np.testing.assert_allclose(copy['cls'], states[3]['ema']['cls'], rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, states[6]['task']['gram'], copy)
    assert np.abs(states[6]['ema']['cls'] - states[3]['ema']['cls']).max() > 0


LARGE = 'rrc(16) | to_device | flip_lr'
SMALL = LARGE.replace('to_device', 'resize(size) | to_device')
TWICE = f'decode ; global: {SMALL} ; global: {SMALL}' + 2 * f' ; gram as global: {LARGE}'


def test_the_gram_teacher_sees_the_same_crops_in_twice_the_size():
    changes = {'data.transform': TWICE, 'task.gram_weight': 1.0, 'mesh.fsdp': 8}
    parts = build_experiment(config.resolve({**DIGITS, **changes}))
    with train_batches(config.resolve({**DIGITS, **changes}), parts, 0) as batches:
        batch = jax.device_get(device_operations(parts.data)(next(batches), jax.random.key(0)))
    small, large = (np.asarray(batch[name], np.float64) for name in ('global', 'gram'))
    halved = large.reshape(16, 2, 8, 2, 8, 2, 1).mean((3, 5))
    # Bytes, of which the smaller ones are rounded once more.
    assert np.abs(halved - small).max() <= 1 and np.abs(small[:, 0] - small[:, 1]).mean() > 5


@pytest.mark.slow
def test_heads_of_all_patches_are_work_for_their_centre_alone():
    def flops(centering, centre):
        changes = {'task.centering': centering, 'task.patch_centre': centre}
        return build_experiment(config.resolve({**DIGITS, **changes})).forward_flops

    assert flops('sinkhorn', 'all') == flops('sinkhorn', 'hidden')
    assert flops('centre', 'all') > flops('centre', 'hidden')


@pytest.mark.slow
def test_prototypes_and_logits_are_never_whole_on_a_device():
    count, width = 352, 24
    changes = {'task.prototypes': count, 'task.bottleneck': width, 'batch_size': 32}
    changes |= {'mesh.fsdp': 4, 'mesh.tensor': 2, 'mesh.min_shard_size': 0}
    changes |= {'task.centering': 'sinkhorn'}
    _, parts, step = built(changes)
    with jax.set_mesh(parts.mesh):
        text = step.lower(parts.abstract_state, abstract_batch(parts)).compile().as_text()
    kinds = 'all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter'
    travel = re.findall(rf'= \(?\w+\[([\d,]+)\]\S* ({kinds})(?:-start)?\(', text)
    shapes = {(tuple(map(int, dims.split(','))), kind) for dims, kind in travel}
    # Of its half of the prototypes a device is sent those of the others in its column, and no
    # logits: where there are rows by prototypes, there are no collectives.
    assert ((width, count // 2), 'all-gather') in shapes
    assert not [s for s, _ in shapes if count in s]
    assert not [s for s, _ in shapes if len(s) > 1 and count // 2 in s and width not in s]


@pytest.mark.parametrize('group', mostly_slow([4, 2], 4))
def test_slots_hold_all_masked_patches_and_nothing_else(group):
    rng = np.random.default_rng(0)
    counts = block_masks.masked_counts(4 * 2, 16, 0.5, (0.1, 0.5))
    drawn = block_masks.shuffled_counts(jax.random.key(0), counts, 3)
    masks = block_masks.block_masks(jax.random.key(1), drawn.reshape(-1), (4, 4))
    masks = masks.reshape(12, 2, 16)[:: 4 // group]  # As a microbatch has them.
    room = block_masks.slots(counts, group, 2)
    assert room == {4: 6, 2: 11}[group]
    index, weight = block_masks.select(masks, group, room)
    x = jnp.asarray(rng.standard_normal((len(masks), 2, 16, 3)), jnp.float32)
    found = np.asarray(block_masks.selected(x, index)).reshape(-1, 3)
    weight, masks, x = (np.asarray(a) for a in (weight.reshape(-1), masks, x))
    np.testing.assert_array_equal(np.sort(found[weight > 0], 0), np.sort(x[masks], 0))
    # Each view that has some counts once.
    assert weight.sum() == pytest.approx((masks.sum(-1) > 0).sum(), rel=1e-5)
    pairs = {tuple(row): w for row, w in zip(found, weight, strict=True) if w > 0}
    for example, view, patch in np.argwhere(masks):
        row = tuple(x[example, view, patch])
        assert pairs[row] == pytest.approx(1 / masks[example, view].sum())


def test_momentum_and_temperature_are_those_of_the_references():
    wanted = numbers()
    for name, pair, total in (('v2', (0.992, 1.0), 25), ('v1', (0.996, 1.0), 25)):
        found = [1 - float(teacher_rate(i, total, pair)) for i in range(total)]
        np.testing.assert_allclose(found, wanted[f'momentum_{name}'], atol=1e-7)
    # The reference's warm-up has ten steps.
    found = [float(teacher_temperature(i, 25, (0.04, 0.07), 0.4)) for i in range(25)]
    np.testing.assert_allclose(found, wanted['temperature_v2'], atol=1e-8)
    # Near the end, where float32 has no numbers between the momentum and 1.
    assert float(teacher_rate(999_999, 1_000_000, (0.999, 1.0))) == pytest.approx(2.47e-15, rel=0.1)


BAD = [
    ({'data.transform': VIEWS.replace('rrc(4', 'rrc(5')}, "views of 'local': 5x5 pixels do not"),
    ({'data.transform': VIEWS.replace('rrc(4', 'rrc(12')}, 'views of local, 12x12, are larger'),
    ({'data.transform': 'decode ; global: rrc(size)'}, 'gives one view'),
    ({'data.transform': 'rrc(size)'}, 'learns from views named global'),
    ({'batch_size': 8, 'task.centering': 'sinkhorn', 'task.prototypes': 4096}, 'uniform targets'),
    ({'batch_size': 24, 'task.mask_group': 16}, 'set task.mask_group=12'),
    ({'batch_size': 24, 'task.koleo_group': 16}, 'set task.koleo_group=12'),
    ({'task.mask_ratios': (0.0, 0.01)}, "or task.patch_head='none'"),
    ({'model.posemb': 'relative', 'model.posemb_prefix': 0}, "model.posemb='relative'"),
    ({'model.pool': 'cls_dist', 'model.registers': 1}, 'set model.pool'),
    ({'model.patch_dropout': 0.5}, 'no model.patch_dropout'),
    ({'ema': 0.9}, 'its teacher'),
    ({'task.teacher_temperature': (0.0, 0.07)}, 'task.teacher_temperature must be'),
    ({'task.momentum': (1.0, 0.9)}, 'task.momentum must be'),
    ({'mixup': 0.2}, 'set both to 0'),
    ({'optim.name': 'schedule_free_adamw'}, 'average'),
    ({'data.transform': TWICE}, 'set it, or leave them out'),
    (
        {'data.transform': TWICE.rpartition(' ; ')[0], 'task.gram_weight': 1.0},
        '1 views of gram and 2 of global',
    ),
    ({'task.teacher': 'runs/none', 'task.gram_weight': 1.0}, 'remove one of them'),
    ({'task.teacher': 'runs/none'}, 'config: task.teacher: runs/none: no such folder'),
]


@pytest.mark.parametrize(('changes', 'words'), mostly_slow(BAD, *BAD[:2], *BAD[4:7]))
def test_bad_input_is_one_line(changes, words):
    with pytest.raises(UserError, match='config: ') as error:
        built({'mesh.fsdp': 8, **changes})
    assert words in str(error.value) and '\n' not in str(error.value)
