"""One machine and a folder of photographs: from nothing to a model that others can open.

The pictures are Debian's tuxpaint-stamps-default as they are, with their sounds and drawings, or
made ones where they are not installed.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from commands import run
from PIL import Image, ImageDraw

pytestmark = pytest.mark.slow
STAMPS = Path('/usr/share/tuxpaint/stamps')
KINDS = ('animals', 'food', 'plants', 'vehicles')


def done(*words):
    """The output of a command that a user types."""
    result = run(*words, timeout=900)
    sys.stdout.write(f'$ big_vit {" ".join(map(str, words))}\n{result.stdout}{result.stderr}')
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def photographs(tmp_path):
    """A folder of some kinds of pictures, of unequal sizes."""
    root = tmp_path / 'photos'
    root.mkdir()
    for kind in KINDS:
        if STAMPS.is_dir():
            (root / kind).symlink_to(STAMPS / kind)
            continue
        (root / kind).mkdir()
        for i in range(40):
            image = Image.new('RGB', (90 + 7 * (i % 9), 80 + 5 * (i % 7)), 'white')
            box = (20, 20 + i % 9, 60, 60)
            draw = ImageDraw.Draw(image)
            (draw.ellipse if kind in KINDS[:2] else draw.rectangle)(
                box, fill=('red', 'green')[KINDS.index(kind) % 2]
            )
            image.save(root / kind / f'{i}.png')
            (root / kind / f'{i}_desc_fr.ogg').write_bytes(b'')
    return root


def test_from_a_folder_of_photographs_to_a_model_for_others(photographs, tmp_path):
    first, tuned = tmp_path / 'runs' / 'first', tmp_path / 'runs' / 'tuned'
    recipe = 'configs/own_images.py:path={},size=32,epochs={}'
    small = ['--config.model.variant=mu/8', '--config.model.width=64', '--config.model.depth=2',
             '--config.model.mlp_dim=128', '--config.model.num_heads=2']  # fmt: skip
    # A first try, and a longer run that begins with its parameters.
    done('train', '--config', recipe.format(photographs, 2), '--workdir', first, *small)
    done('train', '--config', recipe.format(photographs, 6), '--workdir', tuned, *small,
         f'--config.init={first}')  # fmt: skip
    scores = json.loads(done('evaluate', '--checkpoint', tuned, '--json'))['test']
    assert 0.25 < scores['top1'] <= 1

    kinds = sorted(kind.resolve() for kind in photographs.iterdir())
    pictures = [path for kind in kinds for path in sorted(kind.rglob('*.png'))[:12]]
    said = done('predict', tuned, *pictures[:3], '--top', '2')
    assert len(said.splitlines()) == 3
    assert all(sum(kind in line.split('  ', 1)[1] for kind in KINDS) == 2
               for line in said.splitlines())  # fmt: skip
    done('predict', tuned, *pictures, '--embed', tmp_path / 'a.parquet')
    rows = pq.read_table(tmp_path / 'a.parquet').to_pydict()
    assert rows['file'] == [str(path) for path in pictures]
    assert np.isfinite(rows['embedding']).all()

    said = done('export', '--checkpoint', tuned, '--to', 'timm', '--out', tmp_path / 'timm')
    assert 'pictures shorter side to 37 (area), middle 32x32' in said
    config = json.loads((tmp_path / 'timm' / 'config.json').read_text())
    assert config['label_names'] == list(KINDS)
    assert config['pretrained_cfg']['crop_pct'] == pytest.approx(32 / 37)
    done('export', '--checkpoint', tuned, '--to', 'hf_siglip', '--out', tmp_path / 'hf')
    config = json.loads((tmp_path / 'hf' / 'config.json').read_text())
    assert config['id2label'] == {str(i): kind for i, kind in enumerate(KINDS)}
    processor = json.loads((tmp_path / 'hf' / 'preprocessor_config.json').read_text())
    assert processor['size'] == {'shortest_edge': 37}
    # What others open answers as the run does.
    table = ['--out', tmp_path / 'x.jsonl']
    answers = []
    for model in (tuned, tmp_path / 'timm', tmp_path / 'hf'):
        done('predict', model, *pictures, *table, '--top', '1')
        lines = (tmp_path / 'x.jsonl').read_text().splitlines()
        answers.append([json.loads(line)['classes'][0] for line in lines])
    assert all(np.mean(np.array(answer) == answers[0]) > 0.9 for answer in answers[1:])

    said = done('explore', tuned)
    assert f'4 classes: {", ".join(KINDS)}' in said
    assert 'resize_small(37) | central_crop(size)' in said
