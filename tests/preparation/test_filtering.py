"""The flags of `prepare filter`, and what is said where they make no sense."""

import sys

import pytest

from big_vit import command_line
from big_vit.errors import UserError
from big_vit.preparation import filtering


def settings(*words):
    return filtering.settings_of(command_line.prepare_filter().parse_args(list(words)))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'set').mkdir()
    (tmp_path / 'set' / '0.tar').touch()
    (tmp_path / 'test' / 'val').mkdir(parents=True)
    return tmp_path


def test_flags_as_settings(folder):
    found = settings(
        *(str(folder / 'set'), '--out', 'x', '--near', 'off', '--caption_words', '3:', '--quality'),
        *('80', '--evaluation', f'{folder}/test@val', '--where', 'a=1', '--where', 'b>2'),
    )
    assert found.given.source == 'tar' and found.given.path == str(folder / 'set')
    assert found.near is None and found.caption_words == (3, 10**9) and found.quality == 80
    (evaluation,) = found.evaluations
    assert (evaluation.path, evaluation.split) == (str(folder / 'test'), 'val')
    assert found.where == ('a=1', 'b>2') and found.format == 'tar'
    assert found.reasons[5:7] == ['where a=1', 'where b>2']


def test_the_split_of_an_evaluation_comes_after_the_last_at_sign(folder):
    (folder / 'at@home' / 'a@2x' / 'val').mkdir(parents=True)
    for path in (f'{folder}/at@home', f'{folder}/at@home/a@2x'):
        found = settings(str(folder / 'set'), '--out', 'x', '--evaluation', f'{path}@val')
        assert [(e.path, e.split) for e in found.evaluations] == [(path, 'val')]


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['--near', '0.7'], '--near must lie in 0 to 0.4'),
        (['--near', 'nan'], '--near must lie in 0 to 0.4'),
        (['--near', 'x'], '--near must be a number or off'),
        (['--near', 'off', '--exact', 'off', '--evaluation', 'SET'], '--evaluation: nothing is'),
        (['--caption_chars', '5'], '--caption_chars must be MIN:MAX'),
        (['--caption_chars', '9:5'], '--caption_chars: 9:5 holds no number'),
        (['--where', 'score'], "--where: cannot read 'score'"),
        (['--where', 'score>x'], "--where: 'x' in 'score>x' is not a number"),
        (['--source', 'tarr'], "--source: there is no 'tarr'; did you mean tar?"),
        (['--embeddings', 'SET'], '--embeddings: no .parquet or .npz in'),
        (['--evaluation', 'nowhere'], '--evaluation: nowhere is no folder'),
        (['--min_side', '0'], '--min_side must be at least 1'),
        (['--resize', 'x'], '--resize must be a whole number'),
        (['--encode', 'gif'], 'encode: invalid choice'),
        (['--ressize', '5'], 'did you mean --resize?'),
        (['--config.seed=1'], '--config.seed: `prepare filter` reads no config'),
    ],
)
def test_mistakes_are_one_line(words, message, folder):
    words = [word.replace('SET', str(folder / 'set')) for word in words]
    with pytest.raises(UserError) as error:
        filtering.main([str(folder / 'set'), '--out', str(folder / 'out'), *words])
    assert message in str(error.value) and '\n' not in str(error.value)
    assert not (folder / 'out').exists()


def test_the_output_is_required_and_lies_apart(folder, monkeypatch):
    with pytest.raises(UserError, match='--out is missing'):
        filtering.main([str(folder / 'set')])
    with pytest.raises(UserError, match=r'INPUT: .*is it there'):
        filtering.main([str(folder / 'nothing'), '--out', str(folder / 'out')])


def test_without_beam_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, 'apache_beam', None)
    with pytest.raises(UserError, match=r"needs Apache Beam: pip install 'big_vit\[beam\]'"):
        filtering.main([str(folder / 'set'), '--out', str(folder / 'out')])
    assert not (folder / 'out').exists()


def test_what_comes_after_dashes_is_for_beam():
    assert command_line.before_dashes(['a', '--', '--b', '--', 'c']) == (['a'], ['--b', '--', 'c'])
    assert command_line.before_dashes(['a']) == (['a'], [])
    assert command_line.before_dashes([]) == ([], [])


def test_bounds_and_shares():
    assert filtering._bounds(':7', '--x') == (0, 7)
    assert (filtering._near('0'), filtering._near('0.25')) == (0.0, 0.25)
