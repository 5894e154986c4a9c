"""An engineer installs the package where nothing else is, and uses it with the recipes in it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from commands import ROOT

pytestmark = pytest.mark.slow

SMALL = (
    *('--config.model.variant=mu/8', '--config.model.width=32', '--config.model.depth=2'),
    *('--config.model.mlp_dim=64', '--config.model.num_heads=2'),
    *('--config.batch_size=32', '--config.total_steps=20'),
)
DRAW = """
from pathlib import Path
from PIL import Image
from sklearn.datasets import load_digits
Path('pictures').mkdir()
for i, pixels in enumerate(load_digits().images[:5]):
    Image.fromarray((pixels * 15).astype('uint8')).save(f'pictures/{i}.png')
"""
ASK = """
import big_vit
model = big_vit.load('runs/digits/pretrained')
assert '/site-packages/' in big_vit.__file__
print(model.embed(['pictures/0.png']).shape, len(model.predict(['pictures/0.png'], top=3)[0]))
"""


def pip(python, *words, cwd):
    return subprocess.run(
        [python, '-m', 'pip', '--disable-pip-version-check', *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=1800,
    )


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    if pip(
        sys.executable, 'download', '--no-deps', '-d', folder / 'x', 'wheel', cwd=ROOT
    ).returncode:
        pytest.skip('no package index can be reached')
    # Of a copy, as a build leaves files beside what it builds.
    files = subprocess.run(
        ['git', 'ls-files', '-co', '--exclude-standard', '-z'],
        cwd=ROOT, capture_output=True, check=True,
    ).stdout  # fmt: skip
    source = folder / 'source'
    source.mkdir()
    archive = ['tar', '-C', str(ROOT), '--null', '-T', '-', '--ignore-failed-read', '-cf', '-']
    packed = subprocess.run(archive, input=files, capture_output=True, check=True).stdout
    subprocess.run(['tar', '-C', str(source), '-xf', '-'], input=packed, check=True)
    built = pip(sys.executable, 'wheel', '--no-deps', '-w', folder, source, cwd=folder)
    assert built.returncode == 0, built.stdout + built.stderr
    (file,) = folder.glob('big_vit-*.whl')
    return file


def test_the_wheel_has_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (about,) = (name for name in names if name.endswith('METADATA'))
        metadata = archive.read(about).decode()
    tops = {name.partition('/')[0] for name in names}
    assert 'big_vit' in tops and all(t == 'big_vit' or t.endswith('.dist-info') for t in tops)
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / 'big_vit').rglob('*')
        if path.suffix in ('.py', '.txt', '.typed')
    }
    recipes = {f'big_vit/recipes/{path.name}' for path in (ROOT / 'configs').glob('*.py')}
    inside = {name for name in names if name.startswith('big_vit/')}
    assert inside == package | recipes
    assert any(name.endswith('licenses/LICENSE') for name in names)
    always = [
        line for line in metadata.splitlines()
        if line.startswith('Requires-Dist:') and 'extra ==' not in line
    ]  # fmt: skip
    assert always and not any(tool in line for line in always for tool in ('pytest', 'libtpu'))


@pytest.fixture(scope='module')
def place(wheel, tmp_path_factory):
    """An empty folder with an environment in which only the wheel was installed."""
    folder = tmp_path_factory.mktemp('elsewhere')
    subprocess.run([sys.executable, '-m', 'venv', folder / 'env'], check=True)
    python = folder / 'env' / 'bin' / 'python'
    installed = pip(python, 'install', '--quiet', f'{wheel}[hub]', cwd=folder)
    assert installed.returncode == 0, installed.stderr
    assert pip(python, 'check', cwd=folder).returncode == 0
    return folder


def test_an_engineer_trains_transfers_predicts_and_reports(place):
    environment = {
        'PATH': f'{place}/env/bin:{os.defpath}',
        'HOME': str(place),
        'JAX_PLATFORMS': 'cpu',
        'JAX_COMPILATION_CACHE_DIR': os.environ['JAX_COMPILATION_CACHE_DIR'],
    }

    def run(*words):
        done = subprocess.run(
            words, cwd=place, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f'{words}\n{done.stdout}{done.stderr}'
        return done.stdout

    assert run('big-vit', '--version').startswith('big_vit ')
    assert '\n  transfer ' in run('big-vit')
    run(
        *('big-vit', 'train', '--config', 'big_vit:pretrain_fdsl:classes=10', *SMALL),
        *('--config.evals.test.split=test[:64]', '--workdir', 'runs/fdsl'),
    )
    text = run(
        *('big-vit', 'transfer', '--config', 'big_vit:transfer_digits', '--config.init=runs/fdsl'),
        *('--config.total_steps=20', '--workdir', 'runs/digits'),
    )
    assert 'from the checkpoint' in text
    run('python', '-c', DRAW)
    lines = run('big-vit', 'predict', 'runs/digits/pretrained', 'pictures').splitlines()
    assert len(lines) == 5 and all(line.count('%') == 5 for line in lines)
    assert run('python', '-c', ASK).split() == ['(1,', '32)', '3']
    assert 'embedding/kernel' in run('big-vit', 'explore', 'runs/digits/pretrained')
    run('big-vit', 'report', 'runs/digits')
    assert '<html' in Path(place, 'runs', 'digits', 'report.html').read_text()
    assert '359' in run('big-vit', 'evaluate', '--checkpoint', 'runs/digits/pretrained')
    run(
        *('big-vit', 'export', '--checkpoint', 'runs/digits/pretrained', '--to', 'timm'),
        *('--out', 'exported'),
    )
    assert (place / 'exported' / 'model.safetensors').is_file()
