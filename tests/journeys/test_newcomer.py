"""A newcomer: a fresh clone, the lines of its README and no others, up to the first prediction."""

import re
import subprocess
import sys

import pytest
from commands import ROOT, environment
from tiny import MODEL, RUN, flags, write_folder


def shell(line: str, clone, **more) -> str:
    """Run a line as it stands, by the interpreter of the tests."""
    line = re.sub(r'^python ', f'{sys.executable} ', line)
    result = subprocess.run(
        ['bash', '-c', line],
        cwd=clone,
        env={**environment(), 'PYTHONPATH': str(clone), **more},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, f'{line}\n{result.stdout}{result.stderr}'
    return result.stdout


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    """What git has, as it is in this working tree, in a folder with another name."""
    place = tmp_path_factory.mktemp('newcomer') / 'my clone'
    place.mkdir()
    names = subprocess.run(
        ['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, check=True
    ).stdout
    subprocess.run(
        ['rsync', '-a', '--from0', '--files-from=-', f'{ROOT}/', f'{place}/'],
        input=names,
        check=True,
    ) if _has('rsync') else subprocess.run(
        f'tar -c --null -T - | tar -x -C "{place}"', shell=True, cwd=ROOT, input=names, check=True
    )
    write_folder(place / 'PHOTOS')
    return place


def _has(program: str) -> bool:
    return subprocess.run(['which', program], capture_output=True).returncode == 0


def readme_lines(clone) -> list[str]:
    blocks = re.findall(r'```bash\n(.*?)```', (clone / 'README.md').read_text(), flags=re.DOTALL)
    return [line for block in blocks for line in block.replace('\\\n', ' ').splitlines()]


@pytest.mark.slow
def test_from_a_clone_to_the_first_prediction(clone):
    (train,) = (
        line for line in readme_lines(clone) if 'train' in line and line.endswith('/photos')
    )
    small = ' '.join(flags(MODEL, RUN, {'evals.test.split': 'train[:20]'}))
    said = shell(f'{train} {small}', clone)
    assert 'done    step' in said and max(map(len, said.splitlines())) <= 100
    (predict,) = (line for line in readme_lines(clone) if 'big_vit.predict' in line)
    shell(predict, clone)
    rows = (clone / 'runs' / 'photos.csv').read_text().splitlines()
    assert len(rows) == 61  # A header and 60 pictures.
    assert all('class' in row for row in rows[1:])


@pytest.mark.slow
def test_mistakes_on_the_way_name_what_was_meant(clone):
    wrong = [
        ('--config fashion_mnist --workdir w', 'did you mean configs/fashion_mnist.py?'),
        ('--config configs/fashion_mnist.py --workdir w --lr=1', 'did you mean --config.lr=1?'),
        ('--config configs/own_images.py:path=NOWHERE --workdir w', 'NOWHERE'),
        (
            '--config configs/fashion_mnist.py:path=data --workdir w',
            'big_vit.prepare fashion_mnist',
        ),
    ]
    for words, hint in wrong:
        result = subprocess.run(
            [sys.executable, '-m', 'big_vit.train', *words.split()],
            cwd=clone,
            env={**environment(), 'PYTHONPATH': str(clone)},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 2 and hint in result.stderr, result.stderr
        assert result.stderr.count('\n') == 1 and not (clone / 'w').exists()


@pytest.mark.slow
def test_the_demo_is_what_make_would_run(clone):
    shown = subprocess.run(
        ['make', '-n', 'demo'], cwd=clone, capture_output=True, text=True, check=True
    ).stdout
    assert shown.index('pip install') < shown.index('big_vit.train')
