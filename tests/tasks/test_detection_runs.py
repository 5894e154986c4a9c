"""Detection from the command line: the recipe of DETR on COCO's files, and what stops before it."""

import numpy as np
import pytest
from commands import run
from scenes import write_coco
from tiny import flags

from big_vit import checkpoint, config, metrics
from big_vit.build.experiment import build_experiment
from big_vit.errors import UserError

TRANSFORM = 'resize_long(64) | pad_to(size) | boxes(8) | normalize'
SMALL = {
    'image_size': 64,
    'batch_size': 2,
    'total_steps': 2,
    'schedule.drop_steps': 1,
    'log.every_steps': 1,
    'model.variant': 'R26+mu/32',
    'model.dtype': 'float32',
    'task.queries': 8,
    'task.decoder_depth': 1,
    'data.split': 'train',
    'data.transform': TRANSFORM,
    'data.num_classes': None,
    'data.num_examples': None,
    'evals.val.split': 'train',
    'evals.val.transform': TRANSFORM,
    'evals.val.every_steps': 2,
}
RECIPE = 'configs/detr_r50_coco.py'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('coco')
    write_coco(root)
    return root


def settings(folder, **changes):
    wanted = {**SMALL, 'batch_size': 8, **changes}  # As many as there are devices here.
    found = [(key, str(value)) for key, value in wanted.items()]
    return config.load(f'{RECIPE}:path={folder}', found)


@pytest.mark.slow
def test_the_recipe_trains_is_evaluated_and_holds_what_does_not_move(folder, tmp_path):
    more = ['--config', f'{RECIPE}:path={folder}', *flags(SMALL)]
    result = run('train', *more, '--workdir', tmp_path / 'run', timeout=1200)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = metrics.read(tmp_path / 'run')
    losses = [row['train/loss'] for row in rows if 'train/loss' in row]
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert all(row['train/unusable'] == 0 for row in rows if 'train/unusable' in row)
    scored = [row['val/AP'] for row in rows if 'val/AP' in row]
    assert len(scored) == 1 and -1 <= scored[0] <= 1
    params, _ = checkpoint.load_params(tmp_path / 'run', 2, 'params')
    np.testing.assert_array_equal(params['stem']['conv_root']['scale'], 1)
    assert {'stem', 'embedding', 'Transformer', 'decoder', 'class_head', 'box_head'} == set(params)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'task.queries': 4}, r'up to 8 boxes.*task\.queries=4 .*lower boxes\(8\)'),
        ({'data.transform': 'resize_long(64) | pad_to(size) | normalize'}, r'boxes'),
        ({'model.variant': 'mu/32'}, r"tokenizer='frozen_resnet' needs a hybrid"),
        ({'model.parallel': True}, r'model\.post_norm has no place'),
    ],
)
def test_what_does_not_fit_stops_a_run_before_it(changes, message, folder):
    with pytest.raises(UserError, match=message):
        build_experiment(settings(folder, **changes))
