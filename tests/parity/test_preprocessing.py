"""Models leave with names and preprocessing: peers score picture files as our evaluation does."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from commands import run
from PIL import Image

import big_vit
from big_vit import evaluate
from tests.parity.peers import peer

SIZES = [(60, 90), (101, 75), (64, 64), (48, 131)]
SETTINGS = {
    'total_steps': 150,
    'batch_size': 16,
    'image_size': 32,
    'lr': 3e-3,
    'model.variant': 'mu/8',
    'model.width': 48,
    'model.mlp_dim': 96,
    'model.num_heads': 3,
    'model.depth': 2,
    'model.dtype': 'float32',
    'data.name': 'folder',
    'data.transform': 'rrc(size, scale=(0.5, 1)) | normalize()',
    'evals.test.split': 'train',
    'evals.test.transform': 'resize_small(37) | central_crop(size) | normalize()',
}


def write_pictures(folder, count=36):
    """PNG files of unequal sizes: discs, and pictures whose left or upper half is dark."""
    rng = np.random.default_rng(0)
    for i in range(count):
        height, width = SIZES[i // 3 % 4]
        back, front = (rng.integers(low, low + 90, 3).tolist() for low in (150, 0))
        image = np.full((height, width, 3), back, np.uint8)
        y, x = 2 * height // 5, 2 * width // 5  # No edge of a patch, where a pixel would count.
        name = ('disc', 'left', 'top')[i % 3]
        if name == 'disc':
            cv2.circle(image, (x, y), int(min(height, width) * rng.uniform(0.2, 0.35)), front, -1)
        else:
            image[: y if name == 'top' else height, : x if name == 'left' else width] = front
        path = folder / name / f'{i:02d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode('.png', image)[1].tobytes())
    return folder


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    from big_vit import config, train

    root = tmp_path_factory.mktemp('pictures')
    data = write_pictures(root / 'data')
    heads = {'cls': {'model.activation': 'gelu', 'model.posemb': 'learned', 'model.pool': 'cls',
                     'model.norm_eps': 1e-12}, 'gap': {}}  # fmt: skip
    for name, settings in heads.items():
        made = config.resolve({**SETTINGS, **settings, 'data.path': str(data)})
        train.run(made, root / name)
    return root, data


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def by_timm(folder, images):
    timm = peer('timm')
    import torch

    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        logits = model(torch.stack([transform(image) for image in images])).numpy()
    return logits, model.pretrained_cfg['label_names']


def by_transformers(folder, images):
    transformers = peer('transformers')
    import torch

    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(**processor(images, return_tensors='pt')).logits.numpy()
    names = [model.config.id2label[i] for i in range(logits.shape[1])]
    assert model.config.label2id == {name: i for i, name in enumerate(names)}
    return logits, names


@pytest.mark.parametrize(
    ('to', 'head', 'answers'),
    [('timm', 'gap', by_timm), ('hf_vit', 'cls', by_transformers),
     ('hf_siglip', 'gap', by_transformers)],
)  # fmt: skip
def test_files_score_at_the_peer_what_they_score_here(to, head, answers, trained, tmp_path):
    root, data = trained
    peer('timm' if to == 'timm' else 'transformers')
    out = tmp_path / 'out'
    result = run('export', '--checkpoint', root / head, '--to', to, '--out', out)
    assert result.returncode == 0, result.stderr
    paths = sorted(map(str, data.rglob('*.png')))
    model = big_vit.load(root / head)
    ours = np.log(model(paths))
    images = [Image.open(path).convert('RGB') for path in paths]
    logits, names = answers(out, images)
    assert list(model.class_names) == list(names) == ['disc', 'left', 'top']
    theirs = log_softmax(logits)
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))
    right = [names[i] == Path(path).parent.name
             for i, path in zip(theirs.argmax(-1), paths, strict=True)]  # fmt: skip
    scored = evaluate.run(root / head, SETTINGS['total_steps'])['test']
    assert np.mean(right) == pytest.approx(scored['top1']) and scored['top1'] > 0.8
    print(to, scored['top1'], np.abs(theirs - ours).mean(), np.abs(theirs - ours).max())
    near = np.abs(theirs - ours).mean()
    assert near < 0.1
    # Prepared otherwise, it answers otherwise.
    _spoil(out)
    assert np.abs(log_softmax(answers(out, images)[0]) - ours).mean() > 1.5 * near


def _spoil(folder):
    """Write what was written before: no crop, and each side squashed."""
    for name in ('config.json', 'preprocessor_config.json'):
        if (file := folder / name).exists():
            config = json.loads(file.read_text())
            if 'pretrained_cfg' in config:
                config['pretrained_cfg'] |= {'crop_pct': 1.0, 'crop_mode': 'squash'}
            if 'size' in config:
                config |= {'size': {'height': 32, 'width': 32}, 'do_center_crop': False}
            file.write_text(json.dumps(config))


def test_every_architecture_that_is_written_is_one_of_timm():
    timm = peer('timm')
    from big_vit.interop import timm_vit

    for base, sizes in timm_vit._NAMED.items():
        for size, named in sizes.items():
            for variant in named:
                name = f'{base.partition("_")[0]}_{size}_{variant}'
                assert timm.is_model(name), name
                if size in ('tiny', 'small', 'base'):  # Others take gigabytes.
                    model = timm.create_model(name)
                    depth, hidden = timm_vit._PUBLISHED[size]
                    block = model.blocks[0]
                    assert (len(model.blocks), block.mlp.fc1.out_features) == (depth, hidden)
                    width, heads = timm_vit._SIZES[size]
                    assert (model.embed_dim, block.attn.num_heads) == (width, heads)
