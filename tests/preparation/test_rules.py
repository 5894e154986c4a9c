"""Rules of single examples."""

import pytest

from big_vit.errors import UserError
from big_vit.preparation import rules
from big_vit.preparation.settings import Given, Settings


def settings(**more):
    return Settings(Given('INPUT', 'tar', 'x'), **more)


@pytest.mark.parametrize(
    ('rule', 'kept', 'left_out'),
    [
        ('score>=5', [5, '5.0', 7.2], [4.99, None, 'much', '', float('nan')]),
        ('score>5', [5.1], [5, None]),
        ('score < -1.5', [-2], [-1.5, 0]),
        ('score<=0', [0, -1], [0.1]),
        ('language=en|de', ['en', ' de '], ['fr', 'EN', None, 'en|de']),
        ('nsfw!=1', [0, '0', 2], [1, '1', 1.0, None]),
        ('ok=true', [True, 'true'], [False, 'True', None]),
        ('class=3', [3, '3', 3.0], ['03', 4]),
        ('a.b=x=y', ['x=y'], ['x']),
    ],
)
def test_rules_of_columns(rule, kept, left_out):
    parsed = rules.parse_where(rule)
    assert [parsed.holds(value) for value in kept] == [True] * len(kept)
    assert [parsed.holds(value) for value in left_out] == [False] * len(left_out)


@pytest.mark.parametrize('rule', ['', 'score', 'score>=', '>=5', 'score~5', 'score>=five'])
def test_rules_that_are_none(rule):
    with pytest.raises(UserError, match='--where'):
        rules.parse_where(rule)


def test_sizes_and_shapes():
    both = settings(min_side=100, max_aspect=2.5)
    sizes = {(100, 250): None, (250, 100): None, (99, 99): 'min_side', (100, 251): 'max_aspect'}
    assert {size: rules.broken_by_shape(*size, both) for size in sizes} == sizes
    assert rules.broken_by_shape(1, 10_000, settings()) is None


def test_captions_and_columns_in_their_order():
    chosen = settings(caption_chars=(5, 10), caption_words=(2, 10**9), where=('a=1', 'b=2'))
    values = {'a': 1, 'b': 3}

    def reason(text, **more):
        return rules.broken_by_text(text, (values | more).get, chosen)

    assert reason('ab cd', b=2) is None
    assert reason('  ab cd\n', b=2) is None
    assert reason('ab c') == reason('abcdefg') == reason(None) == 'caption'
    assert reason('ab cdefghij') == 'caption'
    assert reason('ab cd') == 'where b=2' and reason('ab cd', a=2) == 'where a=1'
