"""What a run's evaluation does to pictures, and its classes' names, in the configs of peers."""

import json
import math

import cv2
import numpy as np
import pytest
from gate import mostly_slow
from PIL import Image
from test_export import weights_of

from big_vit import explore, export, interop
from big_vit.data import transforms
from big_vit.errors import UserError
from big_vit.inspection import loaded_model
from big_vit.interop import pictures
from big_vit.pretrained.load import read_pretrained

pytest.importorskip('safetensors')

NAMES = ('ant', 'bee', '', 'cow', 'dog')
SIGLIP = dict(pool='gap', activation='gelu_tanh', posemb_prefix=0)
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def run_of(folder, transform, **settings):
    """A workdir whose evaluation has this transform and whose classes have names."""
    weights = weights_of(**settings)
    meta = {**weights.meta, 'class_names': NAMES, 'crop_pct': None, 'mean': None}
    evaluation = [('evals.test.split', 'test'), ('evals.test.transform', transform)]
    workdir, _ = export.to_checkpoint(weights._replace(meta=meta), str(folder), evaluation)
    return workdir


def written(workdir, to, out):
    export.main(['--checkpoint', str(workdir), '--to', to, '--out', str(out)])
    return {file.name: json.loads(file.read_text()) for file in out.glob('*.json')}


WORDS = [
    ('resize_small(37) | central_crop(size)', 32 / 37, 'center', 'bilinear', 37),
    (
        'decode | resize_small(36, "bicubic") | central_crop(32) | normalize',
        8 / 9,
        'center',
        'bicubic',
        36,
    ),
    ('resize(size)', 1.0, 'squash', 'bilinear', None),
    ('rgb | keep("image", "label")', 1.0, 'squash', 'bilinear', None),
    ('resize(40, method="nearest") | central_crop(size)', 0.8, 'squash', 'nearest', 40),
    ('resize_small(32) | onehot(5)', 1.0, 'center', 'bilinear', 32),
]


@pytest.mark.parametrize(
    ('transform', 'crop_pct', 'mode', 'filter', 'size'),
    mostly_slow(WORDS, WORDS[0]),
)  # fmt: skip
def test_the_parsed_transform_is_what_is_written(
    transform, crop_pct, mode, filter, size, tmp_path, capsys
):
    workdir = run_of(tmp_path / 'run', transform)
    config = written(workdir, 'timm', tmp_path / 'timm')['config.json']
    cfg = config['pretrained_cfg']
    assert (cfg['crop_pct'], cfg['crop_mode']) == (pytest.approx(crop_pct), mode)
    assert (cfg['interpolation'], cfg['input_size']) == (filter, [3, 32, 32])
    stats = IMAGENET if 'normalize' in transform else ([0.5] * 3, [0.5] * 3)
    assert (cfg['mean'], cfg['std']) == stats
    assert config['label_names'] == ['ant', 'bee', '2', 'cow', 'dog']
    assert config['num_classes'] == 5
    if size is not None and mode == 'center':
        assert math.floor(32 / cfg['crop_pct']) == size
    said = capsys.readouterr().out
    assert ('smooths pictures that shrink' in said) == (filter == 'bicubic')

    workdir = run_of(tmp_path / 'siglip', transform, **SIGLIP)
    made = written(workdir, 'hf_siglip', tmp_path / 'hf')
    processor, config = made['preprocessor_config.json'], made['config.json']
    assert config['id2label'] == dict(zip('01234', ['ant', 'bee', '2', 'cow', 'dog'], strict=True))
    assert config['label2id'] == {name: int(i) for i, name in config['id2label'].items()}
    assert processor['resample'] == {'bilinear': 2, 'bicubic': 3, 'nearest': 0}[filter]
    assert (processor['image_mean'], processor['image_std']) == stats
    wanted = {'shortest_edge': size} if mode == 'center' else dict.fromkeys(
        ('height', 'width'), size or 32)  # fmt: skip
    assert processor['size'] == wanted
    crops = mode == 'center' or size is not None
    assert processor.get('do_center_crop', False) == crops
    assert processor.get('crop_size') == ({'height': 32, 'width': 32} if crops else None)
    # Without what we record of ourselves, the peer's own words say the same.
    kinds = {'architecture', 'model_type'} & config.keys()
    again = interop.read(tmp_path / 'hf')
    assert kinds and again.meta['class_names'] == tuple(config['id2label'].values())
    assert pictures.scaled(again.meta) == (size or 32,) * 2
    assert pictures.crop_mode(again.meta) == mode


@pytest.mark.parametrize('shape', [(90, 140), (141, 70), (64, 64), (33, 50)])
def test_a_picture_prepared_by_the_words_is_the_one_of_the_evaluation(shape):
    """Pillow does what the words say, as torchvision does with a file."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image = cv2.resize(coarse, shape[::-1], interpolation=cv2.INTER_CUBIC)
    text = 'resize_small(37) | central_crop(size) | normalize'
    transform = transforms.parse(text.rpartition(' | ')[0], size=(32, 32), key='x')
    ours = transform({'image': [image]}, np.zeros(1, np.uint64))['image'][0].astype(float)
    words = pictures.words(transform.preprocessing((32, 32), 3), 'x')

    def theirs(share):
        side = math.floor(32 / share)
        short = min(shape)
        size = [int(side * length / short) for length in shape]
        resized = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)
        top, left = (round((length - 32) / 2) for length in size)
        return np.asarray(resized, float)[top : top + 32, left : left + 32]

    # The longer side may be a pixel longer, and the middle half a pixel away.
    right, wrong = (np.abs(theirs(share) - ours).mean() for share in (words['crop_pct'], 1.0))
    assert right < 5 and wrong > 3 * right


WORDLESS = [
    ('resize(24) | pad(4)', 'evals.test.transform has pad'),
    ('resize_long(32)', 'evals.test.transform has resize_long'),
    ('resize(size) | invert', 'evals.test.transform has invert'),
    ('central_crop(size)', 'has central_crop without a resize'),
    ('resize(40) | resize(size)', 'has resize after another'),
    ('resize(size) | grayscale | rgb', 'has grayscale, for a model of 3 channels'),
    ('resize((33, 64)) | central_crop(size)', 'resize both sides by one factor'),
    ('resize(size) | flip_lr(1)', 'evals.test.transform has flip_lr'),
    ('decode(3, white=4095) | resize(size)', 'evals.test.transform has decode'),
]


@pytest.mark.parametrize(
    ('transform', 'named'),
    mostly_slow(WORDLESS, WORDLESS[0]),
)
def test_what_has_no_word_is_refused_by_its_name(transform, named, tmp_path):
    workdir = run_of(tmp_path / 'run', transform)
    with pytest.raises(UserError) as error:
        written(workdir, 'timm', tmp_path / 'out')
    assert named in str(error.value) and '--transform TEXT' in str(error.value)
    assert not (tmp_path / 'out').exists()
    # Formats without a config say nothing of pictures, and so nothing wrong.
    assert export.from_checkpoint(str(workdir), to='big_vision').settings['num_classes'] == 5
    wanted = ['--transform', 'resize(40) | central_crop(size)']
    out = ['--to', 'timm', '--out', str(tmp_path / 'out')]
    export.main(['--checkpoint', str(workdir), *out, *wanted])
    cfg = json.loads((tmp_path / 'out' / 'config.json').read_text())['pretrained_cfg']
    assert (cfg['crop_mode'], cfg['crop_pct']) == ('squash', 0.8)


def test_open_clip_has_no_crop(tmp_path):
    tower = dict(pool='cls', num_classes=0)
    workdir = run_of(tmp_path / 'run', 'resize_small(37) | central_crop(size)', **tower)
    with pytest.raises(UserError, match='--to open_clip: pictures are resized to 37x37'):
        written(workdir, 'open_clip', tmp_path / 'out')
    workdir = run_of(tmp_path / 'other', 'resize(size) | normalize', **tower)
    images = written(workdir, 'open_clip', tmp_path / 'out')['open_clip_config.json']
    images = images['preprocess_cfg']
    assert (images['resize_mode'], images['interpolation']) == ('squash', 'bilinear')
    assert images['mean'] == IMAGENET[0]


@pytest.mark.parametrize(
    ('sizes', 'size', 'patch', 'name'),
    [
        ((192, 12, 768, 3), 224, 16, 'vit_tiny_patch16_224'),
        ((192, 12, 768, 3), 384, 16, 'vit_tiny_patch16_384'),
        ((192, 12, 768, 3), 64, 8, 'vit_tiny_patch16_224'),
        ((384, 12, 1536, 6), 384, 32, 'vit_small_patch32_384'),
        ((1024, 24, 4096, 16), 96, 14, 'vit_large_patch14_224'),
        ((48, 2, 96, 3), 32, 16, 'vit_base_patch16_224'),
    ],
)
def test_the_architecture_is_named_by_its_size(sizes, size, patch, name):
    from big_vit.interop.timm_vit import _architecture

    settings = dict(zip(('width', 'depth', 'mlp_dim', 'num_heads'), sizes, strict=True))
    settings['patch_size'] = (patch, patch)
    assert _architecture('vit_base_patch16_224', settings, (size, size)) == name


# timm's own words, read.


@pytest.mark.parametrize(
    ('cfg', 'text'),
    [
        ({'crop_pct': 0.9, 'crop_mode': 'center'}, 'resize_small(35) | central_crop(size)'),
        ({'crop_pct': 1.0, 'crop_mode': 'center'}, 'resize_small(32) | central_crop(size)'),
        ({'crop_pct': 1.0, 'crop_mode': 'squash'}, 'resize(size)'),
        ({'crop_pct': 0.8, 'crop_mode': 'squash'}, 'resize((40, 40)) | central_crop(size)'),
        ({'crop_pct': None}, 'resize(size)'),
    ],
)
def test_words_become_operations_again(cfg, text):
    meta = {'image_size': (32, 32), 'mean': None, 'std': None, **cfg}
    assert pictures.transform_of(meta) == f'decode | {text}'
    if cfg['crop_pct']:
        parsed = transforms.parse(f'decode | {text}', size=(32, 32), key='x')
        words = pictures.words(parsed.preprocessing((32, 32), 3), 'x')
        assert pictures.scaled({'image_size': (32, 32), **words}) == pictures.scaled(meta)
        assert words['crop_mode'] == cfg['crop_mode']


def test_explore_says_how_pictures_are_prepared_and_what_classes_there_are(tmp_path, capsys):
    workdir = run_of(tmp_path / 'run', 'resize_small(37) | central_crop(size) | normalize')
    explore.show(loaded_model.load(str(workdir)))
    said = capsys.readouterr().out
    assert "5 classes: ant, bee, '', cow, dog" in said or '5 classes: ant, bee, , cow, dog' in said
    assert 'resize_small(37) | central_crop(size) | normalize' in said
    assert 'shorter side to 37 (area), middle 32x32, mean 0.485, 0.456, 0.406' in said
    written(workdir, 'timm', tmp_path / 'timm')
    explore.show(loaded_model.load(str(tmp_path / 'timm')))
    said = capsys.readouterr().out
    assert 'ant, bee' in said and 'center 0.8649, bilinear' in said


def test_names_go_through_a_peer_into_a_workdir_and_out_again(tmp_path):
    workdir = run_of(tmp_path / 'run', 'resize(size)')
    written(workdir, 'timm', tmp_path / 'timm')
    export.main(['--from', str(tmp_path / 'timm'), '--out', str(tmp_path / 'back')])
    names = ('ant', 'bee', '2', 'cow', 'dog')
    assert loaded_model.load(str(tmp_path / 'back')).class_names == names
    assert read_pretrained(str(tmp_path / 'timm')).class_names == names
