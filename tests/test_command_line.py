"""Flags: a number out of its range, or none at all, is one line that names the flag."""

import os
import subprocess
import sys

import pytest
from commands import ROOT

from big_vit import command_line
from big_vit.errors import UserError

# Command, what it cannot do without, flag, least, most.
NUMBERS = [
    ('transfer', [], '--seeds', 1, 10_000),
    ('transfer', [], '--at-once', 1, 10**6),
    ('plan', [], '--slices', 1, 4096),
    ('plan', [], '--ops', 0, 10**6),
    ('ledger', [], '--devices', 1, 2**16),
    ('average', ['w'], '--last', 1, 10**6),
    ('show_data', [], '--step', 0, 2**31 - 1),
    ('show_data', [], '--count', 1, 1024),
    ('bench_data', [], '--seconds', 0, 10**6),
]


def value_of(command, others, flag, text):
    parser = getattr(command_line, command)()
    needed = [f'{name}={example}' for name, example in parser.needs.items()]
    args, _ = command_line.parse(parser, [*needed, *others, f'{flag}={text}'])
    return getattr(args, flag.removeprefix('--').replace('-', '_'))


@pytest.mark.parametrize('command, others, flag, least, most', NUMBERS)
def test_numbers_of_flags_have_bounds(command, others, flag, least, most):
    assert value_of(command, others, flag, least) == least
    assert value_of(command, others, flag, most) == most
    wrong = [
        (least - 1, 'at least'),
        (most + 1, 'at most'),
        (10**30, 'at most'),
        (-(10**30), 'at least'),
    ]
    wrong += [(text, 'must be') for text in ('', 'x', 'nan', '1' * 5000, '1,2', '[]')]
    for text, words in wrong:
        with pytest.raises(UserError) as caught:
            value_of(command, others, flag, text)
        assert str(caught.value).startswith(f'{flag} must be ') and words in str(caught.value)
        assert '\n' not in str(caught.value) and len(str(caught.value)) < 200


def test_other_mistakes_are_one_line_too():
    for argv, words in (([], 'required: path'), (['w', '--which', 'x'], '--which: invalid choice')):
        with pytest.raises(UserError, match=words):
            command_line.explore().parse_args(argv)


FASHION = ['--config', 'configs/fashion_mnist.py']


@pytest.mark.parametrize(
    'command, argv, words',
    [
        ('train', [], '--config is missing, for example --config configs/fashion_mnist.py'),
        ('train', FASHION, '--workdir is missing'),
        ('train', [*FASHION, '--workdirs', 'x'], '--workdirs; did you mean --workdir?'),
        ('train', [*FASHION, '--lr=1'], '--lr=1; did you mean --config.lr=1?'),
        ('train', ['--learning-rate', '1'], '--learning-rate; did you mean --config.lr?'),
        ('train', ['--batch_size=8'], 'did you mean --config.batch_size=8?'),
        ('train', ['configs/x.py:a=1'], 'did you mean --config configs/x.py:a=1?'),
        ('transfer', ['--at_once', '2'], 'did you mean --at-once?'),
        ('explore', ['w', '--lr=1'], 'unknown argument --lr=1; see --help'),
        ('plan', ['--config', 'x'], '--topology is missing'),
        ('show_data', FASHION, '--png is missing'),
        ('average', ['w'], '--out is missing'),
        ('export', [], '--out is missing'),
        ('prepare', ['cifar10'], '--data_dir is missing'),
    ],
)
def test_a_missing_or_unknown_flag_says_what_to_type(command, argv, words):
    with pytest.raises(UserError) as caught:
        command_line.parse(getattr(command_line, command)(), argv)
    assert words in str(caught.value)


def test_what_is_explained_needs_no_workdir():
    args, _ = command_line.parse(command_line.train(), [*FASHION, '--explain'])
    assert args.explain and args.workdir is None


# Fails where a command would import JAX before it looks at its flags.
WITHOUT_JAX = """
import runpy, sys
sys.modules['jax'] = None
command, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_module(f'big_vit.{command}', run_name='__main__', alter_sys=True)
except SystemExit as end:
    print('status', end.code, 'config' if 'big_vit.config' in sys.modules else '')
"""


@pytest.mark.parametrize(
    'command, argv, words',
    [
        ('train', ['--workdir', 'w'], '--config is missing'),
        ('transfer', [*FASHION, '--config.learning_rate=1', '--workdir', 'w'], 'did you mean lr?'),
        ('ledger', ['--config', 'fashion_mnist'], 'did you mean configs/fashion_mnist.py?'),
        ('report', [], 'required: run'),
    ],
)
def test_mistakes_are_told_before_jax_is_imported(command, argv, words):
    result = subprocess.run(
        [sys.executable, '-c', WITHOUT_JAX, command, *argv],
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.stdout.split()[:2] == ['status', '2'], result.stderr
    assert result.stderr.startswith('error: ') and words in result.stderr
    assert result.stderr.count('\n') == 1
