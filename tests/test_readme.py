"""Every command of the README and of `make demo` is run, with overrides that make it small."""

import importlib.util
import re
import shlex
import subprocess
import sys

import pytest
from commands import ROOT, environment, free_port, run, script
from tiny import MODEL, RUN, flags, write_captioned, write_folder, write_idx

README = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'```(\w+)\n(.*?)```', README, flags=re.DOTALL)
SHELL = '\n'.join(text for kind, text in BLOCKS if kind == 'bash').replace('\\\n', ' ')
TWO = next(text for kind, text in BLOCKS if kind == 'bash' and 'JAX_PROCESS_ID' in text)
LINES = [line for line in SHELL.splitlines() if line.strip() and line not in TWO]
COMMANDS = [line for line in LINES if line.startswith('python -m big_vit.')]

# Of each command but those two, which test_plan.py and test_ledger.py run, one is among the others.
SLOW = (
    *('big_vit.plan', 'big_vit.ledger', 'optimizer=shampoo', 'evals.near', '--sweep'),
    *('--workdir runs/photos', 'report runs/photos', 'predict runs/photos', '--workdir runs/more'),
    *('report runs/unlabelled', 'runs/few_labels'),
)

# What the README promises of its examples: arrays of NumPy, and the sidecar of the last step; three
# named classes, and a vector for each picture.
CHECKPOINT = """
import numpy
kernel = params['embedding']['kernel']
assert type(kernel) is numpy.ndarray
print(kernel.ndim, sidecar['step'])
"""
PREDICT = """
((first, *_),) = best
print(len(best[0]), first[0].startswith('class'), features.shape == (1, 32), 0 < first[1] <= 1)
"""


def small(words: list[str], data) -> list[str]:
    command = next(word for word in words if word.startswith('big_vit.')).partition('.')[2]
    more = []
    if command == 'train':
        test = 'train[:20]' if any('own_images' in word for word in words) else 'test[:20]'
        splits = {'evals.test.split': test}
        if any('contrastive' in word for word in words):
            splits = {'evals.all.split': 'test[:20]', 'evals.unseen.split': 'unseen[:20]'}
            splits['evals.pairs.split'] = 'train[:20]'
        if any('unlabelled' in word for word in words):
            splits = {'evals.features.lidar': '(10, 3)'}
        more = flags(MODEL, RUN, splits)
        if any('fashion' in word for word in words):
            more += flags({'data.path': data})
    elif command == 'transfer':
        more = flags(RUN, {'evals.test.split': 'test[:20]'})
        if any(':own' in word for word in words):  # Its warmup is longer than a run of a test.
            more = flags(RUN, {'schedule.warmup_steps': 1})
    elif command == 'evaluate' and any('near' in word for word in words):
        more = flags({'evals.near.split': 'test[:20]', 'evals.near.train_split': 'train[:40]'})
    elif command == 'plan':
        more = flags(MODEL)
    elif command == 'bench_data':
        more = ['--seconds', '0.3']
    for name in ('photos', 'shards'):
        words = [word.replace(name.upper(), str(data.parent / name)) for word in words]
    return [*words, *more]


def check_run(words: list[str], folder, data) -> str:
    words = [word.replace('runs/', f'{folder}/') for word in small(words, data)]
    command, *args = words[words.index('-m') + 1 :]
    result = run(command.removeprefix('big_vit.'), *args, timeout=300)
    assert result.returncode == 0, ' '.join(words) + result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope='module')
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp('readme')
    write_folder(folder / 'photos')
    write_captioned(folder / 'shards')
    return folder / 'runs', write_idx(folder / 'idx')


@pytest.mark.parametrize(
    'line',
    [
        pytest.param(line, marks=[pytest.mark.slow] * any(word in line for word in SLOW))
        for line in COMMANDS
    ],
    ids=lambda line: ' '.join(line.split()[2:5]),
)
def test_the_readme_commands_run_in_their_order(line, places):
    if 'big_vit.plan' in line and importlib.util.find_spec('libtpu') is None:
        pytest.skip('the TPU compiler is not installed')
    check_run(shlex.split(line), *places)


@pytest.mark.parametrize(
    'needs, expected, printed',
    [
        ('fashion', CHECKPOINT, '4 3'),
        pytest.param('photos', PREDICT, '3 True True True', marks=pytest.mark.slow),
    ],
)
def test_the_readme_python_runs(needs, expected, printed, places):
    (text,) = (text for kind, text in BLOCKS if kind == 'python' and f'runs/{needs}' in text)
    assert (places[0] / needs).is_dir(), 'the commands run first'
    picture = next((places[1].parent / 'photos').rglob('*.jpg'))
    text = text.replace('runs/', f'{places[0]}/').replace('PHOTOS/a.jpg', str(picture))
    result = script(text + expected)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.strip() == printed


@pytest.mark.slow
def test_the_two_processes_of_the_readme_make_one_run(places):
    more = ' '.join(flags(MODEL, RUN, {'evals.test.split': 'test[:20]'}))
    text = TWO.replace('python -m', f'{sys.executable} -m').replace(':1234', f':{free_port()}')
    text = text.replace('runs/two', f'{places[0]}/two {more}') + 'wait $!\n'
    result = subprocess.run(
        ['bash', '-e', '-c', text],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert 'process 1 of 2' in result.stdout and 'run     2 x cpu on 2 host(s)' in result.stdout
    assert (places[0] / 'two' / 'checkpoints' / '3').is_dir()


@pytest.mark.slow
def test_the_demo_runs_and_says_where_everything_is(places):
    shown = subprocess.run(
        ['make', '-n', 'demo', 'VENV=/nowhere'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.replace('\\\n', ' ')
    lines = [line for line in shown.splitlines() if ' -m big_vit.' in line and 'echo' not in line]
    assert len(lines) >= 3
    output = [check_run(shlex.split(line), *places) for line in lines]
    assert 'control: same recipe from random' in output[1]
    assert re.search(r'from the checkpoint .* 4  ', output[1])  # So many seeds.
    for path in ('demo/curves.png', 'demo/images.png', 'demo/transfer/report.html'):
        assert (places[0] / path).exists()


def test_the_other_readme_commands_exist():
    rest = [line for line in LINES if line not in COMMANDS]
    continued = {line.strip() for command in COMMANDS for line in command.split('  ')}
    for line in rest:
        if line.startswith('make '):
            target = line.split()[1]
            assert re.search(rf'^{target}:', (ROOT / 'Makefile').read_text(), flags=re.MULTILINE)
        elif line.startswith('pip install -r'):
            assert (ROOT / line.split()[-1]).exists()
        else:
            assert line.strip() in continued, f'no test runs {line!r}'


def test_what_the_readme_links_to_is_there():
    slugs = {
        re.sub(r'[^a-z0-9 -]', '', head.lower()).replace(' ', '-')
        for head in re.findall(r'^#+ (.*)$', README, flags=re.MULTILINE)
    }
    links = re.findall(r'\]\(([^)]+)\)', README)
    assert len(links) > 20
    for link in links:
        path, _, anchor = link.partition('#')
        assert (ROOT / path).exists(), link
        assert path or anchor in slugs, link


def test_the_picture_of_the_readme_is_small():
    (picture,) = re.findall(r'!\[.*?\]\((.*?)\)', README)
    assert 0 < (ROOT / picture).stat().st_size < 200_000
