"""The package: its metadata, the one command, the recipes in it, what a shell completes."""

import json
import re
import runpy
import shutil
import subprocess
import sys

import pytest
import setuptools
import yaml
from commands import ROOT, environment, error_line
from gate import mostly_slow

import big_vit
from big_vit import command_line, completion, config
from big_vit.config import recipes
from big_vit.errors import UserError

# Of `big_vit`'s users; `plan` is for who compiles for TPUs without having any.
USERS = (
    *('tpu', 'cuda', 'cuda12', 'cuda13', 'gcs', 'hub', 'audio', 'video', 'text', 'prepare'),
    *('beam', 's3', 'wandb'),
)
TOOLS = re.compile(r'(pytest|hypothesis|ruff|mypy|libtpu|nbclient|nbformat|ipykernel|beartype)\b')


@pytest.fixture(scope='module')
def setup():
    """What setup.py says."""
    said = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, 'setup', said.update)
        runpy.run_path(str(ROOT / 'setup.py'))
    return said


def test_users_get_what_they_need_and_no_tools(setup):
    extras = setup['extras_require']
    for name in USERS:
        assert extras[name] and not any(map(TOOLS.match, extras[name])), name
    assert not any(map(TOOLS.match, setup['install_requires']))
    assert any(line.startswith('gcsfs') for line in extras['tpu'])
    assert extras['cuda'] == extras['cuda13'] != extras['cuda12']
    assert {'pytest', 'ruff', 'mypy'} <= {re.match(r'\w+', line)[0] for line in extras['dev']}
    lines = (ROOT / 'requirements.txt').read_text().splitlines()
    assert [line for line in lines if not line.startswith('#')] == ['-e .']
    assert "install --quiet --disable-pip-version-check -e '.[dev]'" in (
        (ROOT / 'Makefile').read_text()
    )


def test_the_package_is_the_package_with_its_types_and_recipes(setup):
    packages = setup['packages']
    assert 'big_vit' in packages and all(name.split('.')[0] == 'big_vit' for name in packages)
    files = {
        path.relative_to(ROOT / 'big_vit').as_posix()
        for pattern in setup['package_data']['big_vit']
        for path in (ROOT / 'big_vit').glob(pattern)
    }
    wanted = {f'recipes/{path.name}' for path in (ROOT / 'configs').glob('*.py')}
    assert files == wanted | {'py.typed', 'interop/timm_vits.txt'}


def test_the_version_is_one(setup):
    assert setup['version'] == big_vit.__version__
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert citation['version'] == big_vit.__version__ and citation['cff-version'] == '1.2.0'
    assert citation['license'] == setup['license']
    versions = re.findall(r'^## (\S+)', (ROOT / 'CHANGELOG.md').read_text(), re.MULTILINE)
    assert big_vit.__version__ in versions[:2]  # Above it may be one to come.


def test_the_workflow_runs_the_gate_and_builds_the_wheel():
    (file,) = (ROOT / '.github' / 'workflows').glob('*.yml')
    jobs = yaml.safe_load(file.read_text())['jobs']
    run = {name: [step.get('run', '') for step in job['steps']] for name, job in jobs.items()}
    assert '.ci/run' in run['gate'] and 'python -m build' in run['wheel']
    assert 'make lint\nmake test' in (ROOT / '.ci' / 'run').read_text()


# The one command.


def started(*words, program='big_vit/__main__.py'):
    """The command in a process of its own, with the modules that it has loaded at its end."""
    code = (
        'import atexit, json, runpy, sys\n'
        f'sys.argv = [{program!r}, *sys.argv[1:]]\n'
        'atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.stderr))\n'
        'runpy.run_module("big_vit", run_name="__main__")\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', code, *words],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
        timeout=60,
    )
    *errors, modules = done.stderr.splitlines()
    assert not {'jax', 'numpy', 'flax'} & set(json.loads(modules)), words
    return done.returncode, done.stdout, errors


def test_commands_are_listed_and_found_before_jax_would_be_loaded():
    status, text, _ = started(program='/usr/bin/big-vit')
    listed = re.findall(r'^  (\w+)  +\S', text, re.MULTILINE)
    assert status == 0 and listed == list(command_line.COMMANDS)
    assert text.startswith('usage: big-vit COMMAND') and max(map(len, text.splitlines())) <= 100
    commands = {
        path.stem
        for path in (ROOT / 'big_vit').glob('*.py')
        if 'runtime.command(main)' in path.read_text()
    }
    assert set(listed) == commands
    assert started('--version') == (0, f'big_vit {big_vit.__version__}\n', [])
    status, text, _ = started('show-data', '--help', program='big-vit')
    assert status == 0 and text.startswith('usage: big-vit show_data [-h]')
    status, text, errors = started('trian', '--help')
    assert (status, text) == (2, '')
    assert errors == ["error: there is no command 'trian'; did you mean train?"]


def test_a_command_is_the_same_as_its_module():
    words = [
        sys.executable,
        '-m',
        'big_vit',
        'train',
        '--config',
        'big_vit:fashon',
        '--workdir',
        'w',
    ]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), cwd=ROOT)
    line = error_line(done)
    assert 'did you mean big_vit:fashion_mnist?' in line


# Recipes.


def test_recipes_are_the_configs_and_take_their_arguments(monkeypatch, tmp_path):
    assert recipes.names() == sorted(path.stem for path in (ROOT / 'configs').glob('*.py'))
    by_path = config.load('configs/pretrain_fdsl.py:classes=7', [('lr', '0.5')])
    monkeypatch.chdir(tmp_path)
    by_name = config.load('big_vit:pretrain_fdsl:classes=7', [('lr', '0.5')])
    assert by_name.to_dict() == by_path.to_dict() != config.load('big_vit:pretrain_fdsl').to_dict()
    assert by_name.lr == 0.5


@pytest.mark.parametrize(
    ('spec', 'words'),
    [
        ('big_vit:fashon_mnist', 'no recipe big_vit:fashon_mnist; did you mean big_vit:fashion_m'),
        ('big_vit:', 'the recipes are big_vit:contrastive, big_vit:detr_r50_coco'),
        ('big_vit:pretrain_fdsl:clases=7', "no argument 'clases'; did you mean classes?"),
        ('fashion_mnist', 'no file fashion_mnist; did you mean big_vit:fashion_mnist'),
        ('configs/vit_b16.py:x=1', 'no file configs/vit_b16.py; did you mean big_vit:vit_b16_i1k'),
        ('nonsense', 'the recipes are big_vit:contrastive'),
        ('elsewhere/my.py', 'no file elsewhere/my.py'),
    ],
)
def test_a_recipe_that_is_none_is_told_with_what_there_is(spec, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(words)):
        config.load(spec)


# Completion.


@pytest.mark.parametrize(
    ('line', 'wanted'),
    [
        ('big-vit tr', ['train', 'transfer']),
        ('big-vit completion ', ['bash', 'fish', 'zsh']),
        ('big-vit train --conf', ['--config', '--config.']),
        ('big-vit train --config big_vit:vit_g', ['big_vit:vit_g14']),
        ('big-vit train --config.init_t', ['--config.init_tower=']),
        ('big-vit train --config x --distributed ', ['auto', 'off', 'on']),
        ('big-vit predict run --t', ['--threshold', '--top', '--transform']),
        ('big-vit predict run ', []),
        ('big-vit explore run --config.lr', []),
        ('big-vit nothing --h', []),
    ],
)
def test_what_is_offered(line, wanted):
    offered = completion.candidates('zsh', line)
    if line.endswith('--conf'):
        assert '--config' in offered and '--config.lr=' in offered
    else:
        assert offered == wanted


# What each shell runs when Tab is pressed, and how it shows what it has.
PRESSED = {
    'bash': 'compopt() {{ :; }}; source <(big-vit completion bash); '
    'COMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}; _big_vit; printf "%s\\n" "${{COMPREPLY[@]}}"',
    'zsh': 'compdef() {{ :; }}; compadd() {{ shift $(( $@[(i)--] )); print -l -- $@; }}; '
    '_files() {{ print FILES; }}; source <(big-vit completion zsh); LBUFFER={line!r}; _big_vit',
    'fish': 'big-vit completion fish | source; complete -C {line!r}',
}


@pytest.mark.parametrize('shell', mostly_slow(PRESSED, 'bash'))
def test_shells_show_what_is_offered(shell, tmp_path):
    if not shutil.which(shell):
        pytest.skip(f'{shell} is not installed')
    command = tmp_path / 'big-vit'
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m big_vit "$@"\n')
    command.chmod(0o755)
    variables = environment()
    variables |= {'PATH': f'{tmp_path}:{variables["PATH"]}', 'HOME': str(tmp_path)}

    def shown(line):
        code = PRESSED[shell].format(line=line)
        done = subprocess.run(
            [shell, '-c', code], capture_output=True, text=True, env=variables, timeout=60
        )
        assert done.returncode == 0 and not done.stderr, done.stderr
        return done.stdout.split()

    assert shown('big-vit tra') == ['train', 'transfer']
    recipe = shown('big-vit train --config big_vit:vit_g')
    # Words of bash end at a colon: what is before it stays.
    assert recipe == (['vit_g14'] if shell == 'bash' else ['big_vit:vit_g14'])
    key, *others = shown('big-vit train --config.init_to')
    assert key == '--config.init_tower=' and not others
