"""Names, colours and differences of several runs."""

import itertools

import pytest

from big_vit import config
from big_vit.inspection import comparison, line_styles


@pytest.mark.parametrize(
    ('paths', 'names'),
    [
        (['/r/a', '/r/b'], ['a', 'b']),
        (['/r/x/run', '/r/y/run', '/r/other'], ['x/run', 'y/run', 'other']),
        (['/p/a/b/run', '/q/a/b/run', '/r/b/run'], ['p/a/b/run', 'q/a/b/run', 'r/b/run']),
        (['gs://one/run', 'gs://two/run'], ['one/run', 'two/run']),
        (['/run', '/a/run'], ['run', 'a/run']),
        (['/r/w@10', '/r/w@20'], ['w@10', 'w@20']),
        (['/s/trials/train/a', '/s/trials/control/b'], ['train/a', 'control/b']),
    ],
)
def test_names_are_the_shortest_ends_that_differ(paths, names):
    assert comparison.distinct_names(paths) == names


def test_a_run_keeps_its_colour_whatever_the_order_and_ten_runs_have_ten():
    keys = [f'/runs/{i}' for i in range(60)]
    for count in (1, 3, 10, 11, 50, 60):
        slots = line_styles.slots(keys[:count])
        assert slots == line_styles.slots(keys[:count][::-1])
        styles = [line_styles.style(slot) for slot in slots.values()]
        assert len(set(styles)) == count
        colours, dashes = zip(*styles, strict=True)
        assert len(set(colours)) == min(count, 10) and set(dashes) <= set(range(-(-count // 10)))
    assert line_styles.style(60) == line_styles.style(0)
    # Alone, or beside one that wants another colour, it is the same.
    alone = {key: line_styles.slots([key])[key] for key in keys}
    for a, b in itertools.combinations(keys[:8], 2):
        if alone[a] != alone[b]:
            assert line_styles.slots([a, b]) == {a: alone[a], b: alone[b]}


def test_only_keys_that_differ_are_shown_and_what_a_version_lacks_is_its_default():
    base = {
        'total_steps': 1, 'batch_size': 2, 'image_size': 8, 'lr': 0.1, 'model.variant': 'mu/4',
        'data.name': 'digits',
    }  # fmt: skip
    one, two = (config.resolve(base | more).to_dict() for more in ({}, {'evals.a.split': 'test'}))
    old = config.resolve(base).to_dict()
    del old['ema'], old['checkpoint']['keep_last']
    three = config.resolve(base | {'lr': 0.2, 'ema': 0.9}).to_dict()
    assert config.differing([one, old]) == {} and config.differing([one]) == {}
    found = config.differing([one, two, three, old])
    assert found['lr'] == [0.1, 0.1, 0.2, 0.1] and found['ema'] == [0.0, 0.0, 0.9, 0.0]
    assert found['evals.a.split'] == [None, 'test', None, None]
    assert {key for key in found if not key.startswith('evals.a.')} == {'lr', 'ema'}
