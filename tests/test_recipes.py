"""configs/transfer.py: every recipe builds on a stand-in of its dataset, and one is swept."""

import json
import runpy

import numpy as np
import pytest
from commands import ROOT, error_line, run
from etils import epath
from tiny import MODEL, flags, overrides, png, write_features, write_folder

from big_vit import config, interop, transfer, trees
from big_vit.build.experiment import build_experiment
from big_vit.data import sources
from big_vit.data.sources.splits import split_name
from big_vit.errors import UserError
from big_vit.interop import Weights, fit, layout
from big_vit.sweeps import study, sweep

FILE = 'configs/transfer.py'
RECIPES = runpy.run_path(FILE)
NAMED, VTAB = list(RECIPES['NAMED']), [f'vtab_{name}' for name in RECIPES['VTAB']]
# Examples of each split, as TFDS has them.
SIZES = {
    'caltech101': {'train': 3059, 'test': 6084},
    'cifar10': {'train': 50_000, 'test': 10_000},
    'cifar100': {'train': 50_000, 'test': 10_000},
    'clevr': {'train': 70_000, 'validation': 15_000, 'test': 15_000},
    'diabetic_retinopathy_detection/btgraham-300': {
        'train': 35_126, 'validation': 10_906, 'test': 42_670, 'sample': 10,
    },
    'dmlab': {'train': 65_550, 'validation': 22_628, 'test': 22_735},
    'dsprites': {'train': 737_280},
    'dtd': {'train': 1880, 'validation': 1880, 'test': 1880},
    'eurosat/rgb': {'train': 27_000},
    'imagenet2012': {'train': 1_281_167, 'validation': 50_000},
    'kitti': {'train': 6347, 'validation': 423, 'test': 711},
    'oxford_flowers102': {'train': 1020, 'validation': 1020, 'test': 6149},
    'oxford_iiit_pet': {'train': 3680, 'test': 3669},
    'patch_camelyon': {'train': 262_144, 'validation': 32_768, 'test': 32_768},
    'resisc45': {'train': 31_500},
    'smallnorb': {'train': 24_300, 'test': 24_300},
    'sun397/tfds': {'train': 76_128, 'validation': 10_875, 'test': 21_750},
    'svhn_cropped': {'train': 73_257, 'test': 26_032, 'extra': 531_131},
}  # fmt: skip
CLASSES = {
    'cifar10': 10, 'cifar100': 100, 'imagenet2012': 1000, 'oxford_iiit_pet': 37,
    'oxford_flowers102': 102, 'vtab_caltech101': 102, 'vtab_dtd': 47, 'vtab_svhn': 10,
    'vtab_sun397': 397, 'vtab_patch_camelyon': 2, 'vtab_eurosat': 10, 'vtab_resisc45': 45,
    'vtab_diabetic_retinopathy': 5, 'vtab_clevr_count': 8, 'vtab_clevr_distance': 6,
    'vtab_dmlab': 6, 'vtab_kitti_distance': 4, 'vtab_dsprites_location': 16,
    'vtab_dsprites_orientation': 16, 'vtab_smallnorb_azimuth': 18, 'vtab_smallnorb_elevation': 9,
}  # fmt: skip
# Of VTAB's tests, as published with the 1,000 training examples (arXiv 1910.04867).
TESTS = {
    'vtab_caltech101': 6084, 'vtab_cifar100': 10_000, 'vtab_dtd': 1880,
    'vtab_oxford_flowers102': 6149, 'vtab_oxford_iiit_pet': 3669, 'vtab_svhn': 26_032,
    'vtab_sun397': 21_750, 'vtab_patch_camelyon': 32_768, 'vtab_eurosat': 5400,
    'vtab_resisc45': 6300, 'vtab_diabetic_retinopathy': 42_670, 'vtab_clevr_count': 15_000,
    'vtab_clevr_distance': 15_000, 'vtab_dmlab': 22_735, 'vtab_kitti_distance': 711,
    'vtab_dsprites_location': 73_728, 'vtab_dsprites_orientation': 73_728,
    'vtab_smallnorb_azimuth': 12_150, 'vtab_smallnorb_elevation': 12_150,
}  # fmt: skip


def load(arguments, *more):
    settings = overrides(MODEL, *more)
    return config.load(f'{FILE}:{arguments}', settings, base={'model.variant': 'mu/8'})


def splits(loaded):
    return {'train': loaded.data.split} | {n: loaded.evals[n].split for n in loaded.evals}


def examples(split, name):
    """Which examples of each split of a dataset are in a split of a recipe, as bits."""
    found = {part: np.zeros(size, bool) for part, size in SIZES[name].items()}
    for part, first, last in sources.parse_split(split, SIZES[name], 'data'):
        found[part][first:last] = True
    return np.concatenate([found[part] for part in sorted(found)])


@pytest.mark.parametrize('dataset', VTAB)
def test_vtab_trains_on_800_chooses_by_200_and_tests_on_what_is_published(dataset):
    loaded = load(dataset)
    name = loaded.data.tfds_name
    found = {k: examples(v, name) for k, v in splits(loaded).items()}
    assert [found[k].sum() for k in ('train', 'val', 'test')] == [800, 200, TESTS[dataset]]
    assert sum(found.values()).max() == 1, 'none comes twice'
    final = load(f'{dataset},final')
    assert list(final.evals) == ['test'] and final.evals['test'].split == loaded.evals.test.split
    np.testing.assert_array_equal(examples(final.data.split, name), found['train'] | found['val'])
    assert (loaded.total_steps, loaded.lr, loaded.schedule.warmup_steps) == (2500, 0.01, 200)
    assert loaded.batch_size == 512 and loaded.image_size == (384, 384)


@pytest.mark.parametrize('dataset', NAMED)
def test_the_other_recipes_hold_out_a_part_of_training(dataset):
    found = {k: examples(v, dataset) for k, v in splits(load(dataset)).items()}
    whole = examples('train', dataset)
    assert sum(found.values()).max() == 1, 'none comes twice'
    np.testing.assert_array_equal(found['train'] | found['val'], whole)
    np.testing.assert_array_equal(examples(load(f'{dataset},final').data.split, dataset), whole)


def features(name):
    """The features of a dataset in TFDS that say what its label is, and an example."""
    from tensorflow_datasets import features as f

    vector = f.Tensor(shape=(3,), dtype=np.float32)
    grey = name in ('dsprites', 'smallnorb')
    size, kind = f.ClassLabel(num_classes=2), f.ClassLabel(num_classes=9)
    columns = {
        'clevr': {'objects': f.Sequence({'size': size, 'pixel_coords': vector})},
        'kitti': {'objects': f.Sequence({'type': kind, 'location': vector})},
        'dsprites': {
            'label_orientation': f.ClassLabel(num_classes=40),
            'label_x_position': f.ClassLabel(num_classes=32),
        },
        'smallnorb': {
            'label_azimuth': f.ClassLabel(num_classes=18),
            'label_elevation': f.ClassLabel(num_classes=9),
        },
    }  # fmt: skip
    known = {**CLASSES, 'vtab_cifar100': 100}
    task = next((k for k, v in RECIPES['VTAB'].items() if v[0] == name), name)
    classes = known.get(name) or known.get(f'vtab_{task}')
    own = columns.get(name) or {'label': f.ClassLabel(num_classes=classes)}

    def example(i, rng):
        image = rng.integers(
            0, 2 if name == 'dsprites' else 256, (20, 16 + i % 2, 1 if grey else 3)
        )
        coords = (0.0, 0.0, 7.0 + i)
        objects = {
            'clevr': [{'size': 0, 'pixel_coords': coords}] * (3 + i % 8),
            'kitti': [{'type': 0, 'location': coords}],
        }
        labels = {key: i % feature.num_classes for key, feature in own.items() if key != 'objects'}
        more = {'objects': objects[name]} if name in objects else labels
        return {'image': png(image.astype(np.uint8)), **more}

    return {'image': f.Image(shape=(None, None, 1 if grey else 3)), **own}, example


@pytest.fixture(scope='module')
def tfds_folder(tmp_path_factory):
    """The stand-ins, each of 30 examples a split."""
    folder, there = tmp_path_factory.mktemp('tfds'), set()

    def prepare(name):
        if name not in there:
            there.add(name)
            columns, example = features(name)
            write_features(folder, name, columns, dict.fromkeys(SIZES[name], 30), example)
        return folder

    return prepare


def small(loaded, tfds_folder):
    """Overrides by which a recipe's splits lie in a stand-in: the same ones, other ranges."""
    found = {'image_size': '16', 'batch_size': '8'}
    ranges = {'train': '[:8]', 'val': '[8:16]', 'test': '[16:]'}
    for name, split in splits(loaded).items():
        key = 'data' if name == 'train' else f'evals.{name}'
        found[f'{key}.split'] = split_name(split) + ranges[name]
    if loaded.data.name == 'tfds':
        found['data.path'] = str(tfds_folder(loaded.data.tfds_name))
    return found


# Of each kind of label, split and transform one; the others are like them.
OFTEN = (
    *('imagenet2012', 'vtab_clevr_count', 'vtab_dsprites_orientation'),
    'vtab_smallnorb_elevation',
)


@pytest.mark.parametrize(
    'dataset',
    [
        pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow)
        for name in (*NAMED, *VTAB)
    ],
)
def test_every_recipe_builds(dataset, tfds_folder):
    loaded = load(f'{dataset},size=16', small(load(dataset), tfds_folder))
    parts = build_experiment(loaded)
    classes = CLASSES.get(dataset) or CLASSES[dataset.removeprefix('vtab_')]
    assert parts.data.source.num_classes == classes
    assert parts.data.shapes['image'][-3:] == (16, 16, 3)
    sweep.check_splits(parts, 'val', 'test')
    assert list(parts.settings) == ['sgd']
    assert (
        parts.settings['sgd'] | {'momentum': 0.9, 'mu_dtype': 'bfloat16'} == parts.settings['sgd']
    )


# Whether images are cut and mirrored, in the words of the guide.
AUGMENT = {'both': (True, True), 'crop': (True, False), 'flip': (False, True), '': (False, False)}


def test_the_guide_has_every_recipe_as_it_is():
    named, vtab = {}, {}
    for line in (ROOT / 'docs' / 'transfer.md').read_text().splitlines():
        name, *cells = (cell.strip().strip('`') for cell in line.strip('|').split('|'))
        if line.startswith('| `') and len(cells) == 5:
            (named if cells[0][0].isdigit() else vtab)[name] = cells
    del vtab['vtab_']  # The head of the table.
    assert set(named) == {*NAMED, 'vtab_NAME', 'own'} and set(vtab) == set(RECIPES['VTAB'])
    for name in NAMED:
        loaded, (steps, rates, crop, parts, published) = load(name), named[name]
        assert steps == f'{loaded.total_steps:,.0f}, {loaded.schedule.warmup_steps:.0f}'
        assert f'{loaded.lr:g}' in rates.split(',') and loaded.data.transform.startswith(crop)
        assert parts == '` / `'.join(splits(loaded)[k] for k in ('train', 'val', 'test'))
        assert loaded.transfer.published.startswith(f'{published} %')
    for name, (dataset, chosen_by, test, augment, _) in vtab.items():
        loaded = load(f'vtab_{name}')
        assert loaded.data.tfds_name == dataset
        assert splits(loaded) == {'train': 'train[:800]', 'val': chosen_by, 'test': test}
        text = loaded.data.transform
        assert AUGMENT[augment] == ('random_crop' in text, 'flip_lr' in text)


def test_other_crops_and_sizes():
    for crop, text in (
        ('inception', 'inception_crop(size) | flip_lr'),
        ('resmall', 'resmall_crop(size, 261) | flip_lr'),
        ('resize', "resize(261, method='bilinear') | random_crop(size) | flip_lr"),
    ):
        loaded = load(f'oxford_iiit_pet,size=224,crop={crop}')
        assert loaded.data.transform == text and loaded.image_size == (224, 224)


@pytest.fixture(scope='module')
def start(tmp_path_factory):
    """Weights as AugReg publishes them, of a model of one narrow block."""
    settings = fit.complete(
        dict(
            num_classes=5, patch_size=(8, 8), width=32, depth=1, mlp_dim=64, num_heads=2,
            head_dim=None, posemb='learned', posemb_prefix=1, pool='cls',
        )
    )  # fmt: skip
    meta, rng = {'image_size': (32, 32), 'channels': 3}, np.random.default_rng(0)
    shapes = layout.shapes_of(settings, meta)
    flat = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    weights = Weights(trees.unflatten(flat), settings, meta)
    return interop.write(tmp_path_factory.mktemp('start') / 'x.npz', 'augreg', weights)


@pytest.mark.slow
def test_a_recipe_is_swept_by_the_command(start, tfds_folder, tmp_path):
    short = {'total_steps': '2', 'schedule.warmup_steps': '1', 'init': str(start)}
    short |= small(load('vtab_kitti_distance'), tfds_folder)
    short |= {'transfer.control': 'false', 'transfer.random_features': 'false'}
    result = run(
        *('transfer', '--config', f'{FILE}:vtab_kitti_distance,size=16', *flags(short)),
        *('--workdir', tmp_path / 'w', '--sweep', 'lr=0.01,0.03'),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert 'published   78.29 %' in result.stdout
    tested = json.loads((tmp_path / 'w' / 'test.json').read_text())
    assert tested['pretrained']['count'] == 14 and 0 <= tested['pretrained']['mean'] <= 1


@pytest.mark.slow
def test_the_final_training_of_vtab_has_seeds_and_no_validation(start, tfds_folder, tmp_path):
    short = {'total_steps': '2', 'schedule.warmup_steps': '1', 'init': str(start)}
    short |= small(load('vtab_clevr_count,final'), tfds_folder)
    short |= {'data.split': 'train[:8]+train[8:12]'}
    short |= {'transfer.control': 'false', 'transfer.random_features': 'false'}
    command = ('transfer', '--config', f'{FILE}:vtab_clevr_count,size=16,final', *flags(short))
    result = run(*command, '--workdir', tmp_path / 'w', '--seeds', '2')
    assert result.returncode == 0, result.stdout + result.stderr
    tested = json.loads((tmp_path / 'w' / 'test.json').read_text())
    assert len(tested['pretrained']['tests']) == 2
    assert not any('val/top1' in row for row in study.read(epath.Path(tmp_path / 'w')))
    # Of several settings none can be chosen.
    result = run(*command, '--workdir', tmp_path / 'x', '--sweep', 'lr=0.01,0.03')
    assert 'a sweep chooses by evals.val, which is not there' in error_line(result)


def test_own_images_with_folders_of_their_own_or_without(tmp_path):
    more = {'image_size': '16', 'batch_size': '8'}
    found = {}
    for kind, names in (('', None), (',folders', ('train', 'val', 'test'))):
        folder = write_folder(tmp_path / f'photos{kind[1:]}', examples=20, splits=names)
        parts = build_experiment(load(f'own,path={folder},size=16{kind}', more))
        sweep.check_splits(parts, 'val', 'test')
        found[kind] = [
            s.source.length for s in (parts.data, parts.evals['val'], parts.evals['test'])
        ]
    assert found == {'': [16, 2, 2], ',folders': [20, 20, 20]}


def test_folders_of_splits_that_nothing_reads_are_named(tmp_path):
    folder = write_folder(tmp_path / 'photos', examples=6, splits=('train', 'val', 'test'))
    assert transfer.unread_splits(load(f'own,path={folder}')) == ['test', 'val']
    assert transfer.unread_splits(load(f'own,path={folder},folders')) == []
    plain = write_folder(tmp_path / 'plain', examples=6)
    assert transfer.unread_splits(load(f'own,path={plain}')) == []


def problem(arguments, *more):
    with pytest.raises(UserError) as caught:
        build_experiment(load(arguments, {'image_size': '16', 'batch_size': '8'}, *more))
    (line,) = str(caught.value).splitlines()
    return line


def test_what_is_wrong_is_said_in_a_line_with_the_fix(tmp_path):
    with pytest.raises(
        UserError, match=r"there is no dataset 'vtab_clevr'; did you mean vtab_clev"
    ):
        load('vtab_clevr')
    with pytest.raises(
        UserError, match=r"there is no dataset 'zzzz'; there are cifar10, cifar100, "
    ):
        load('zzzz')
    with pytest.raises(UserError, match=r"there is no crop 'center'; there are inception, resmall"):
        load('cifar10,crop=center')
    line = problem(f'vtab_sun397,path={tmp_path}')
    assert 'sun397/tfds is not prepared in' in line
    assert '`python -m big_vit.prepare sun397/tfds --data_dir DIR`, then set data.path=DIR' in line
    assert problem('own').startswith("config: data.path must be set for data.name='folder'")
    one = write_folder(tmp_path / 'one', examples=20, classes=1)
    assert 'has one class (class0)' in problem(f'own,path={one},size=16')
    few = write_folder(tmp_path / 'few', examples=5, classes=2)
    line = problem(f'own,path={few},size=16')
    assert line.startswith("evals.val.split: 'train[80%:90%]' holds no example") and 'wider' in line
    for name in ('train', 'test'):
        write_folder(tmp_path / 'half' / name)
    (tmp_path / 'half' / 'val').mkdir()
    assert 'val has no folders, one per class' in problem(
        f'own,path={tmp_path}/half,size=16,folders'
    )


@pytest.mark.slow
def test_the_command_says_so_in_one_line(start, tmp_path):
    result = run(
        *('transfer', '--config', f'{FILE}:dtd', f'--config.init={start}'),
        *('--workdir', tmp_path / 'w'),
    )
    assert "there is no dataset 'dtd'; did you mean vtab_dtd?" in error_line(result)
