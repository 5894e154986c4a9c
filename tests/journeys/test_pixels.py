"""A run that tells classes of pixels, from the command line: scored, asked, drawn and reported."""

import json

import numpy as np
import pytest
from commands import error_line, run
from PIL import Image
from tiny import flags

RUN = {
    'task.name': 'segmentation',
    'model.variant': 'mu/4',
    'model.dtype': 'float32',
    'image_size': 32,
    'batch_size': 16,
    'total_steps': 80,
    'lr': 3e-3,
    'schedule.name': 'constant',
    'data.name': 'segmentation',
    'data.split': 'training',
    'data.transform': 'flip_lr | large_scale_jitter(size, scale=(0.7, 1.5))',
    'evals.val.type': 'segmentation',
    'evals.val.split': 'validation',
    'evals.val.transform': 'resize_short(32, most=64) | pad_to(64)',
    'evals.val.per_class': 'all',
    'evals.val.every_percent': 100,
}


def write(root):
    """Write pictures of a red and a blue square, and their label maps; return those to score."""
    rng, held_out = np.random.default_rng(0), []
    for split, count in (('training', 40), ('validation', 6)):
        for kind in ('images', 'annotations'):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            height, width = rng.integers(36, 80, 2)
            picture = rng.integers(90, 130, (height, width, 3)).astype(np.uint8)
            labels = np.zeros((height, width), np.uint8)
            for label, channel in ((1, 0), (2, 2)):
                y, x = rng.integers(0, height // 2), rng.integers(0, width // 2)
                here = slice(y, y + height // 2), slice(x, x + width // 2)
                picture[here] = 40
                picture[(*here, channel)] = 220
                labels[here] = label
            labels[:3] = 255
            Image.fromarray(picture).save(root / 'images' / split / f'{i:02}.png')
            Image.fromarray(labels).save(root / 'annotations' / split / f'{i:02}.png')
            held_out += [labels] if split == 'validation' else []
    (root / 'classes.txt').write_text('ground\nred\nblue\n')
    return held_out


@pytest.mark.slow
def test_a_run_is_scored_asked_and_reported(tmp_path):
    truth, workdir = write(tmp_path / 'data'), tmp_path / 'run'
    given = flags({**RUN, 'data.path': tmp_path / 'data'})
    trained = run('train', '--config', 'configs/pretrain_fdsl.py', *given,
                  '--config.data.num_classes=None', '--config.evals.test.split=validation',
                  '--config.evals.test.type=segmentation',
                  '--config.evals.test.transform=resize(size)', '--workdir', workdir,
                  timeout=900)  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    scored = [row for row in rows if 'val/miou' in row][-1]
    assert scored['val/miou'] > 0.7 and scored['val/iou/red'] > 0.6

    pictures, maps = tmp_path / 'data' / 'images' / 'validation', tmp_path / 'maps'
    asked = run('predict', workdir, pictures, '--out', maps, '--draw', tmp_path / 'drawn',
                '--transform', RUN['evals.val.transform'], timeout=600)  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.count('ground') == 6
    hits = kept = 0
    for i, labels in enumerate(truth):
        name = f'{i + 1:06}_{i:02}'
        with Image.open(maps / f'{name}.png') as written:
            said = np.asarray(written)
        assert said.shape == labels.shape and said.max() <= 2
        with Image.open(tmp_path / 'drawn' / f'{name}.jpg') as drawn:
            assert drawn.size[::-1] == labels.shape
        hits += (said == labels)[labels != 255].sum()
        kept += (labels != 255).sum()
    assert hits / kept == pytest.approx(scored['val/pixel_accuracy'], abs=0.005)

    refused = run('predict', workdir, pictures, '--out', tmp_path / 'a.csv')
    assert 'label maps are written into a folder' in error_line(refused)
    refused = run(
        'predict', workdir, pictures, '--transform', 'resize_small(40) | central_crop(32)'
    )
    assert 'crops or mirrors it' in error_line(refused)
    report = run('report', workdir, timeout=600)
    assert report.returncode == 0, report.stderr
    page = (workdir / 'report.html').read_text()
    assert 'Worst pictures' in page and 'of its pixels mistaken' in page
