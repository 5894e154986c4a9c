"""What self-distillation takes from other runs: a frozen teacher, or where it starts."""

import json
import shutil

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import error_line, run
from gate import mostly_slow
from tiny import SELF_DISTILLATION, flags

from big_vit import checkpoint, config, metrics, sharding, state, trees
from big_vit.build.experiment import build_experiment, fresh_state
from big_vit.errors import UserError
from big_vit.pretrained.load import continued
from big_vit.pretrained.standardise import start_params

VIEWS = 'decode ; global: 2 * rrc(size) | flip_lr ; local: 2 * rrc(4, scale=(0.05, 0.4)) | flip_lr'
STUDENT = {**SELF_DISTILLATION, 'task.prototypes': 24, 'data.transform': VIEWS}
# Wider, deeper, with two heads of other widths, and trained at another size.
TEACHER = {
    'model.width': 48,
    'model.depth': 2,
    'model.num_heads': 4,
    'task.bottleneck': 12,
    'task.patch_head': 'separate',
    'image_size': 16,
}


def saved_run(path, changes, seed=0):
    """A run of the task as it is at a step, with random values: model, average and centre."""
    settings = config.resolve({**STUDENT, **changes})
    parts = build_experiment(settings, to_train=False)
    rng = np.random.default_rng(seed)

    def random(leaf):
        values = (0.1 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)
        return sharding.place(values, leaf.sharding)

    kept = {name: parts.abstract_state[name] for name in ('params', 'ema', 'task', 'step')}
    now = jax.tree.map(random, kept)
    with checkpoint.Manager(path, keep_last=1) as manager:
        manager.save(now, settings.to_dict(), {})
    return jax.device_get(now)


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp('teacher') / 'w'
    return path, saved_run(path, TEACHER)


def test_a_run_starts_with_the_averages_heads_and_centre_of_another(tmp_path, capsys):
    theirs = saved_run(tmp_path, {})
    changes = {'image_size': 16, 'init': str(tmp_path), 'init_resize': 'bicubic'}
    settings = config.resolve({**STUDENT, **changes})
    parts = build_experiment(settings)
    start = start_params(settings, keep_head=True)(parts)
    line = capsys.readouterr().out.strip()
    assert line.endswith(
        'the average of trunk, dino_head, mask_token goes on; positions are resized from 4x4 to 8x8'
    )
    now = continued(settings, parts, fresh_state(parts, 0, start))
    assert capsys.readouterr().out.strip().endswith('/checkpoints/0: its centre goes on')
    flat, wanted = trees.flatten(start), trees.flatten(theirs['ema'])
    positions, old = flat.pop('pos_embedding'), wanted.pop('pos_embedding')
    for name, leaf in flat.items():
        np.testing.assert_array_equal(leaf, wanted[name])
    np.testing.assert_array_equal(positions[:, :1], old[:, :1])
    resized = cv2.resize(old[0, 1:].reshape(4, 4, -1), (8, 8), interpolation=cv2.INTER_CUBIC)
    np.testing.assert_allclose(positions[0, 1:].reshape(8, 8, -1), resized, atol=1e-5)
    for part in ('params', 'ema'):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(now[part]), start)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(now['task']), theirs['task'])


@pytest.mark.slow
def test_a_centre_of_other_heads_stays(tmp_path, capsys):
    saved_run(tmp_path, {})
    settings = config.resolve({**STUDENT, 'init': str(tmp_path), 'task.bottleneck': 10})
    parts = build_experiment(settings)
    start = start_params(settings, keep_head=True)(parts)
    assert 'trunk, mask_token goes on; dino_head starts anew' in capsys.readouterr().out
    now = continued(settings, parts, fresh_state(parts, 0, start))
    assert not np.asarray(now['task']['centre']['dino']).any()


BAD = [
    ({'task.prototypes': 25}, {}, 'but task.teacher has 24: set task.prototypes=24'),
    ({'image_size': 12, 'model.variant': 'mu/4'}, {}, "or task.patch_head='none'"),
    ({}, {'task.patch_head': 'none'}, "has learnt nothing of patches: set task.patch_head='none'"),
    (
        {'task.patch_head': 'none'},
        {'model.variant': 'mu/16', 'image_size': 32, 'task.patch_head': 'none'},
        '8x8 pixels do not divide into 16x16 patches',
    ),
]


@pytest.mark.parametrize(('changes', 'of_teacher', 'words'), mostly_slow(BAD, BAD[0]))
def test_a_teacher_that_does_not_fit_is_one_line(tmp_path, teacher, changes, of_teacher, words):
    path, _ = teacher
    if of_teacher:
        path = tmp_path / 'w'
        views = VIEWS.replace('rrc(4', 'rrc(16') if 'image_size' in of_teacher else VIEWS
        saved_run(path, {**TEACHER, 'data.transform': views, **of_teacher})
    with pytest.raises(UserError, match='config: ') as error:
        build_experiment(config.resolve({**STUDENT, 'task.teacher': str(path), **changes}))
    assert words in str(error.value) and '\n' not in str(error.value)


def test_a_teacher_of_another_task_is_refused(tmp_path):
    flat = {key: x for key, x in STUDENT.items() if not key.startswith('task.')}
    plain = config.resolve({**flat, 'data.transform': 'decode'})
    with checkpoint.Manager(tmp_path, keep_last=1) as manager:
        leaf = jnp.zeros((), jnp.int32)
        manager.save({'params': {'cls': leaf}, 'step': leaf}, plain.to_dict(), {})
    with pytest.raises(UserError, match="learnt task 'classification', so it has no heads"):
        build_experiment(config.resolve({**STUDENT, 'task.teacher': str(tmp_path)}))


def options(spec, workdir, *more, **changes):
    given = {key: str(value) for key, value in {**STUDENT, **changes}.items()}
    return ['--config', spec, *flags(given), *more, '--workdir', workdir]


@pytest.fixture(scope='module')
def spec(tmp_path_factory):
    path = tmp_path_factory.mktemp('config') / 'config.py'
    path.write_text(
        'from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict()\n'
    )
    return path


@pytest.fixture(scope='module')
def whole(tmp_path_factory, spec, teacher):
    workdir = tmp_path_factory.mktemp('whole') / 'w'
    kept = {'checkpoint.every_steps': 3, 'checkpoint.keep_last': 2}
    kept |= {'evals.knn.type': 'knn', 'evals.knn.split': 'test[:32]'}
    given = options(spec, workdir, **{'task.teacher': str(teacher[0])}, **kept)
    result = run('train', *given)
    assert result.returncode == 0, result.stderr
    assert 'teacher ViT-mu/2 of' in result.stdout
    return workdir, given


def hashes(workdir):
    leaves = checkpoint.read_sidecar(workdir, 6)['leaves']
    return {name: leaf['hash'] for name, leaf in leaves.items()}


@pytest.mark.slow
def test_a_student_resumes_bit_exactly_and_never_saves_its_teacher(tmp_path, whole):
    shutil.copytree(whole[0], tmp_path / 'w')
    checkpoint.remove_after(tmp_path / 'w', 3)
    result = run('train', *whole[1][:-1], tmp_path / 'w')
    assert result.returncode == 0, result.stderr
    assert 'resume  from step 3' in result.stdout
    assert hashes(tmp_path / 'w') == hashes(whole[0])
    assert {name.partition('/')[0] for name in hashes(whole[0])} == {
        *('params', 'ema', 'opt', 'task', 'step', 'recent', 'skipped', 'skipped_in_a_row')
    }
    # What is kept is an average of the student.
    average, _ = checkpoint.load_params(whole[0], 6, 'ema')
    assert average['dino_head']['mlp_2']['kernel'].shape == (16, 8)
    assert 'mask_token' not in average


@pytest.mark.slow
def test_a_student_goes_on_with_the_same_teacher_alone(tmp_path, teacher, whole):
    other = tmp_path / 'w'
    saved_run(other, TEACHER, seed=1)
    workdir, given = whole
    again = [arg.replace(str(teacher[0]), str(other)) for arg in map(str, given)]
    assert 'has other parameters than the teacher' in error_line(run('train', *again, '--force'))
    assert json.loads((workdir / 'teacher.json').read_text())['checkpoint'].startswith(
        str(teacher[0])
    )
    # Scores need no teacher.
    teacher[0].rename(tmp_path / 'away')
    try:
        found = run('evaluate', workdir)
        assert found.returncode == 0, found.stderr
        assert 'knn' in found.stdout
        assert 'no such folder' in error_line(run('train', *given, '--config.total_steps=8'))
    finally:
        (tmp_path / 'away').rename(teacher[0])


@pytest.mark.slow
def test_a_teacher_is_spread_over_the_mesh_and_the_losses_are_the_same(tmp_path, whole):
    given = [*whole[1][:-1], tmp_path / 'w']
    mesh = ['--config.mesh.replica=2', '--config.mesh.fsdp=2', '--config.mesh.tensor=2']
    mesh += ['--config.mesh.min_shard_size=0', '--config.accumulation=2']
    result = run('train', *given, *mesh, devices=8)
    assert result.returncode == 0, result.stderr
    rows = [
        [row['train/loss'] for row in metrics.read(path) if 'train/loss' in row]
        for path in (whole[0], tmp_path / 'w')
    ]
    np.testing.assert_allclose(*rows, rtol=1e-4)


@pytest.mark.slow
def test_the_abstract_state_counts_the_teacher_and_a_checkpoint_does_not(teacher):
    changes = {'task.teacher': str(teacher[0]), 'mesh.min_shard_size': 0}
    parts = build_experiment(config.resolve({**STUDENT, **changes}))
    shapes = {n: x.shape for n, x in trees.flatten(parts.abstract_state['teacher']).items()}
    assert shapes == {n: x.shape for n, x in trees.flatten(teacher[1]['params']).items()}
    kernel = parts.abstract_state['teacher']['dino_head']['prototypes']['kernel']
    assert kernel.sharding.shard_shape(kernel.shape) != kernel.shape
    assert 'teacher' not in state.to_save(parts.abstract_state)
    # The teacher's forward pass counts: it is larger than the student's own would be.
    own = build_experiment(config.resolve(STUDENT))
    assert parts.forward_flops > 1.2 * own.forward_flops


def flat(spec):
    return config.flatten(config.load(spec).to_dict())


def test_the_recipes_of_other_runs_differ_from_the_first_phase_in_what_they_say():
    recipe = 'configs/dinov2_l16_i1k.py'
    first, high = flat(recipe), flat(f'{recipe}:phase=high')
    lengths = [(x['total_steps'], x['schedule.warmup_steps']) for x in (first, high)]
    assert lengths == [(125_000, 12_500), (10_000, 1000)]
    held = [x['optim.freeze_steps'][0][1] / x['total_steps'] for x in (first, high)]
    assert held[0] == held[1] == 0.01
    # The lowest rate is the same, the highest that of the square root.
    for found in (first, high):
        assert found['lr'] * found['schedule.end'] == pytest.approx(1e-6)
    assert high['lr'] == pytest.approx(1.51e-5 * 2**0.5)
    # Trunk, heads and views are as they were.
    same = [key for key in first if key.startswith(('task.', 'model.', 'data.'))]
    assert {key for key in same if first[key] != high[key]} == {'model.drop_path', 'model.remat'}
    assert (high['image_size'], high['init_resize']) == ([416, 416], 'bicubic')
    student = flat('configs/dinov2_distilled_i1k.py:variant=B/16')
    assert {key for key in first if first[key] != student[key]} == {
        *('model.variant', 'model.drop_path', 'task.teacher', 'task.momentum')
    }
