"""Every command and program of docs/guides.md is run, with overrides that make it small."""

import re
import shlex

import pytest
from commands import ROOT, script
from test_readme import check_run
from tiny import write_captioned, write_folder, write_idx

GUIDES = (ROOT / 'docs' / 'guides.md').read_text()
BLOCKS = re.findall(r'```(\w+)\n(.*?)```', GUIDES, flags=re.DOTALL)
COMMANDS = [text.strip().replace('\\\n', ' ') for kind, text in BLOCKS if kind == 'bash']


@pytest.fixture(scope='module')
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp('guides')
    write_folder(folder / 'photos')
    write_captioned(folder / 'shards')
    return folder / 'runs', write_idx(folder / 'idx')


# The others are slow; test_readme.py and test_recipes.py run their like.
@pytest.mark.parametrize(
    'line',
    [
        pytest.param(line, marks=[pytest.mark.slow] * ('pretrain_fdsl' not in line))
        for line in COMMANDS
    ],
    ids=lambda line: ' '.join(line.split()[2:5]),
)
@pytest.mark.slow
def test_the_commands_run_in_their_order(line, places):
    check_run(shlex.split(line), *places)


@pytest.mark.slow
def test_the_task_trains():
    (text,) = (text for kind, text in BLOCKS if kind == 'python')
    result = script(text)
    assert result.returncode == 0, result.stdout + result.stderr
    loss, pairs = map(float, result.stdout.split())
    # Of 64 pictures that are all alike, each is found among 63 others by chance.
    assert 0 < loss < 4.14 and pairs > 0
