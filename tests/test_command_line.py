"""Flags: a number out of its range, or none at all, is one line that names the flag."""

import pytest

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
    args, _ = command_line.parse(parser, [*others, f'{flag}={text}'])
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
