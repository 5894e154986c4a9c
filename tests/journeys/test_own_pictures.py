"""From a folder of unlabelled pictures to a model that learns from five labelled ones a class."""

import sys

import numpy as np
import pytest
from commands import error_line, run
from PIL import Image, ImageDraw

from big_vit import metrics

pytestmark = pytest.mark.slow
KINDS = ('ellipse', 'rectangle', 'line')
RECIPE = 'configs/unlabelled.py:path={},method={},epochs={}'


def done(*words):
    """The output of a command that a user types."""
    result = run(*words, timeout=1800)
    sys.stdout.write(f'$ big_vit {" ".join(map(str, words))}\n{result.stdout}{result.stderr}')
    assert result.returncode == 0, result.stderr
    return result.stdout


def picture(kind, number):
    """A drawing in some colours, of some size, of which its shape alone tells what it is."""
    rng = np.random.default_rng([KINDS.index(kind), number])
    size = tuple(int(x) for x in rng.integers(60, 160, 2))
    ground, ink = (tuple(int(x) for x in rng.integers(*span, 3)) for span in ((150, 256), (0, 120)))
    image = Image.new('RGB', size, ground)
    draw = ImageDraw.Draw(image)
    corner = [int(x) for x in rng.integers(5, 20, 2)]
    box = [*corner, size[0] - corner[0], size[1] - corner[1]]
    if kind == 'line':
        draw.line(box, fill=ink, width=8)
    else:
        getattr(draw, kind)(box, fill=ink)
    return image


@pytest.fixture
def photos(tmp_path):
    """300 JPEG files of many sizes in one folder, and one that is broken."""
    folder = tmp_path / 'photos'
    folder.mkdir()
    for i in range(300):
        picture(KINDS[i % 3], i).save(folder / f'IMG_{i:04d}.jpg', quality=90)
    (folder / 'IMG_0300.jpg').write_bytes(b'\xff\xd8\xff\xe0 no picture')
    return folder


@pytest.fixture
def labelled(tmp_path):
    """Five examples a class, and others to test on."""
    for split, numbers in (('train', range(1000, 1005)), ('val', range(1010, 1015)),
                           ('test', range(2000, 2040))):  # fmt: skip
        for kind in KINDS:
            folder = tmp_path / 'labelled' / split / kind
            folder.mkdir(parents=True)
            for i in numbers:
                picture(kind, i).save(folder / f'{i}.jpg', quality=90)
    return tmp_path / 'labelled'


@pytest.mark.parametrize('method', ['jepa', 'dino', 'mae', 'ijepa'])
def test_from_unlabelled_pictures_to_few_labels(method, photos, labelled, tmp_path):
    learnt, few = tmp_path / 'runs' / 'learnt', tmp_path / 'runs' / 'few'
    said = done('train', '--config', RECIPE.format(photos, method, 8), '--workdir', learnt)
    rows = [row for row in metrics.read(learnt) if 'train/loss' in row]
    # The cross-entropy to a teacher has that of the teacher's own targets in it, which rises while
    # its centre settles; what is left to learn is the rest.
    learns = 'train/kl' if 'train/kl' in rows[0] else 'train/loss'
    assert rows[-1][learns] < rows[0][learns]
    assert sum(row.get('train/replaced', 0) for row in rows) > 0
    watched = [row for row in metrics.read(learnt) if 'features/rankme' in row]
    assert len(watched) >= 2 and watched[-1]['features/rankme'] > 1.5, said
    done('report', learnt, '--out', tmp_path / 'report.html')
    assert (tmp_path / 'report.html').stat().st_size > 10_000
    done(
        'transfer',
        *('--config', f'configs/transfer.py:own,path={labelled},size=64,folders=true'),
        f'--config.init={learnt}',
        *('--config.total_steps=60', '--config.batch_size=15', '--config.schedule.warmup_steps=10'),
        '--config.transfer.random_features=false',
        *('--workdir', few),
    )
    last = [row for row in metrics.read(few / 'pretrained') if 'test/top1' in row][-1]
    assert last['test/top1'] > 0.45  # A third by chance.


def test_bad_starts_are_one_line(photos, tmp_path):
    wrong = run('train', '--config', RECIPE.format(photos, 'dnio', 1), '--workdir', tmp_path / 'w')
    assert 'jepa' in error_line(wrong)
    nowhere = RECIPE.format(tmp_path / 'nowhere', 'jepa', 1)
    missing = run('train', '--config', nowhere, '--workdir', tmp_path / 'w')
    assert 'nowhere' in error_line(missing)
