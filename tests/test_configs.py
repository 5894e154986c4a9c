"""Every config of configs/ is trained for three steps, evaluated, saved and resumed.

Sizes are made small, datasets stand-ins in the same format under the same name; splits,
transforms, objective, optimizer and schedule are the config's own.
"""

from pathlib import Path

import jax
import pytest
from tiny import MODEL, RUN, overrides, write_folder, write_idx, write_tfds

from big_vit import checkpoint, config, metrics, train, transfer
from big_vit.build.data import completed_section
from big_vit.build.experiment import build_experiment
from big_vit.data import sources
from big_vit.errors import UserError

CONFIGS = sorted(Path('configs').glob('*.py'))
# Of other runs: tests/pretrained/test_mae_trunks.py trains them; of the last see test_teacher.py.
OF_TRUNKS = ('mae_finetune', 'mae_linear', 'dinov2_distilled_i1k')
# tests/tasks/test_segmentation_task.py, test_detection_runs.py and journeys/test_own_boxes.py
# train them.
OF_TRUNKS += ('vit_seg_ade20k', 'detr_r50_coco', 'own_boxes')
PRETRAIN = [path for path in CONFIGS if 'transfer' not in path.name and path.stem not in OF_TRUNKS]
# Of configs/transfer.py every recipe has its test in test_recipes.py.
TRANSFER = [path for path in CONFIGS if 'transfer_' in path.name]


@pytest.fixture(scope='module')
def idx_folder(tmp_path_factory):
    return write_idx(tmp_path_factory.mktemp('idx') / 'data')


@pytest.fixture(scope='module')
def tfds_folder(tmp_path_factory):
    """Of a dataset as a config describes it, but small."""
    folder, there = tmp_path_factory.mktemp('tfds'), set()

    def prepare(data):
        if data.tfds_name not in there:
            there.add(data.tfds_name)
            write_tfds(folder, data.tfds_name, data.num_classes, TFDS_SIZES)
        return folder

    return prepare


TFDS_SIZES = {'train': 200, 'validation': 20}


def length(split, sizes, key):
    return sum(stop - start for _, start, stop in sources.parse_split(split, sizes, key))


@pytest.fixture(scope='module')
def image_folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp('folder') / 'data')


def smoke_overrides(path, idx_folder, tfds_folder, image_folder):
    loaded = config.load(str(path), [], base={'model.variant': 'mu/4'})
    # That of the config may be longer than three steps.
    found = [('schedule.warmup_steps', '2')] if loaded.schedule.peek('warmup_steps') else []
    found += [('task.decoder_depth', '1')] if loaded.task.peek('decoder_depth') else []
    if loaded.task.peek('predictor_depth'):
        found += [('task.predictor_depth', '1'), ('task.predictor_width', '32')]
    if loaded.task.peek('projector_width'):
        found += [('task.projector_width', '32'), ('task.sigreg_directions', '32')]
    if loaded.task.name == 'self_distillation':
        found += [('task.prototypes', '64'), ('task.head_width', '32'), ('task.mask_group', '8')]
    for unit, short in (('steps', 1), ('epochs', 0.08)):
        if loaded.optim.peek(f'freeze_{unit}'):
            held = f'(("dino_head/prototypes/.*", {short}), (".*", 0))'
            found.append((f'optim.freeze_{unit}', held))
    if loaded.schedule.peek('warmup_epochs'):
        found.append(('schedule.warmup_epochs', '0.08'))
    if loaded.data.name == 'idx':
        found += [('data.path', str(idx_folder)), ('data.split', 'train')]
    if loaded.data.name == 'folder':
        found.append(('data.path', str(image_folder)))
        return found + overrides(RUN)
    if loaded.data.name != 'tfds':
        return found + overrides(RUN, evals=tuple(loaded.evals))
    found += [*overrides(RUN), ('data.path', str(tfds_folder(loaded.data)))]
    sections = {'data': loaded.data}
    sections |= {f'evals.{name}': completed_section(loaded, 'evals', name) for name in loaded.evals}
    for key, section in sections.items():
        found.append((f'{key}.num_examples', str(length(section.split, TFDS_SIZES, key))))
    return found


@pytest.mark.parametrize('path', PRETRAIN, ids=lambda path: path.stem)
def test_examples_of_imagenet_are_counted_right(path):
    loaded = config.load(str(path), [])
    sections = [loaded.data, *(completed_section(loaded, 'evals', name) for name in loaded.evals)]
    for section in sections:
        if section.tfds_name == 'imagenet2012':
            sizes = {'train': 1_281_167, 'validation': 50_000}
            assert section.num_examples in (None, length(section.split, sizes, 'data'))


# Their parts are also those of the smaller ones, or test_readme, test_inputs and
# test_contrastive train from them.
SLOW = (
    'contrastive',
    'fashion_mnist',
    'mae_b16_i1k',
    'mae_l16_i1k',
    'mae_h14_i1k',
    'own_images',
    'pretrain_fdsl',
    'sequences',
    'small_data',
    'vit_s16_i1k',
    'vit_b16_i1k',
    'vit_l16_i21k',
    'vit_h14',
    'vit_g14',
    'vit_22b',
    'dino_s16_i1k',
    'dinov2_l16_i1k',
    'ibot_s16_i1k',
    'ijepa_b16_i1k',
    'ijepa_h14_i1k',
    'lejepa_l14_i1k',
    'lejepa_s8_imagenette',
    'unlabelled',
)


@pytest.mark.parametrize(
    'path',
    [
        pytest.param(p, id=p.stem, marks=pytest.mark.slow if p.stem in SLOW else ())
        for p in PRETRAIN
    ],
)
def test_pretrain(path, idx_folder, tfds_folder, image_folder, tmp_path):
    model = {**MODEL, 'model.num_heads': '4'}
    settings = smoke_overrides(path, idx_folder, tfds_folder, image_folder) + overrides(model)
    first = [*settings, ('total_steps', '2')]
    assert train.run(config.load(str(path), first), tmp_path / 'w').step == 2
    whole = config.load(str(path), settings)
    assert train.run(whole, tmp_path / 'w', force=True).step == 3
    assert checkpoint.steps(tmp_path / 'w')[-1] == 3
    rows = metrics.read(tmp_path / 'w')
    assert [row['step'] for row in rows if 'train/loss' in row] == [1, 2, 3]
    for name in whole.evals:
        assert [row for row in rows if row['step'] == 3 and f'{name}/count' in row]


def test_the_shampoo_of_algoperf_is_what_s16_asks_for():
    loaded = config.load('configs/vit_s16_i1k.py:optimizer=shampoo', [('model.scan', 'true')])
    parts = build_experiment(loaded, jax.devices())
    assert list(parts.settings) == ['shampoo'] and parts.total_steps == 112_000
    made = parts.settings['shampoo']
    assert (made['b1'], made['b2'], made['every'], made['start']) == (0.97466, 0.97492, 100, 100)
    assert made['nesterov'] and made['block'] == 1024 and made['graft'] == 'adam'
    # The peak of the rate is at 5 %, and the decay is on all parameters.
    assert float(parts.schedule(5600)) == pytest.approx(1.438e-3)
    assert set(parts.decay_factors.values()) == {1.97e-4}
    with pytest.raises(UserError, match='must be adamw or shampoo, not lion'):
        config.load('configs/vit_s16_i1k.py:optimizer=lion', [])


@pytest.mark.parametrize('name', ['shampoo', 'soap', 'muon'])
def test_the_small_config_takes_any_optimizer(name, idx_folder):
    settings = [('data.path', str(idx_folder)), ('batch_size', '16')]
    loaded = config.load(f'configs/fashion_mnist.py:optimizer={name}', settings)
    assert list(build_experiment(loaded).settings) == [name]


@pytest.fixture(scope='module')
def start_point(tmp_path_factory):
    path = tmp_path_factory.mktemp('start') / 'w'
    settings = overrides(MODEL, RUN, {'data.num_classes': '10'}, evals=('test',))
    train.run(config.load('configs/pretrain_fdsl.py', settings), path)
    return path


@pytest.mark.parametrize(
    'path',
    [
        # That of the digits is run by test_readme.
        pytest.param(p, id=p.stem, marks=pytest.mark.slow if p.stem == 'transfer_digits' else ())
        for p in TRANSFER
    ],
)
def test_transfer(path, start_point, idx_folder, tfds_folder, image_folder, tmp_path):
    settings = [
        *smoke_overrides(path, idx_folder, tfds_folder, image_folder),
        ('init', str(start_point)),
    ]
    results = transfer.run(transfer.load_config(str(path), settings), tmp_path / 'w')
    assert results is not None
    for found in results.values():
        assert 0 <= found['test/top1'] <= 1 and found['test/count'] == 20
