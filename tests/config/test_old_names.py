"""Former names of keys: they mean today's, in a file, a flag and a dump, and say so once."""

import json

import pytest

from big_vit import config
from big_vit.config import old_names
from big_vit.errors import UserError
from big_vit.sweeps import sweep

BASE = {
    'total_steps': 100,
    'batch_size': 32,
    'image_size': 16,
    'lr': 1e-3,
    'model.variant': 'mu/8',
    'data.name': 'digits',
}
# (former key, its value, today's key, its value)
FORMER = [
    ('loss', 'sigmoid', 'task.loss', 'sigmoid'),
    ('label_smoothing', 0.2, 'task.label_smoothing', 0.2),
    ('model.shared', 7, 'task.embedding_dim', 7),
    ('model.fusion', 'apart', 'task.name', 'contrastive'),
]
former = pytest.mark.parametrize('old, old_value, new, new_value', FORMER)


@pytest.fixture(autouse=True)
def nothing_noted(monkeypatch):
    monkeypatch.setattr(old_names, '_noted', set())


def dump_of(**changes):
    return config.resolve(BASE | changes).to_dict()


def as_it_was(**changes):
    """A dump as it was written before: the former keys with their defaults, and no task."""
    flat = config.flatten(dump_of())
    flat = {key: value for key, value in flat.items() if not key.startswith('task.')}
    flat |= {'loss': 'softmax', 'label_smoothing': 0.0, 'model.shared': 512} | changes
    return json.loads(json.dumps(nested(flat)))


def nested(flat):
    tree: dict = {}
    for key, value in flat.items():
        *sections, name = key.split('.')
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return tree


def write(path, **changes):
    """A config file that sets these keys."""
    tree = nested(BASE | changes)
    path.write_text(
        'from ml_collections import ConfigDict\n\n\n'
        f'def get_config():\n    return ConfigDict({tree!r})\n'
    )
    return str(path)


def assert_noted_once(capsys, old, new):
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith('note ') and not captured.out
    assert old in lines[0] and f'is {new}' in lines[0]


def test_every_former_name_is_tested():
    assert {key for key, *_ in FORMER} == {*old_names.RENAMED, *(key for key, _ in old_names.MOVED)}


@former
def test_in_a_file(tmp_path, capsys, old, old_value, new, new_value):
    path = write(tmp_path / 'former.py', **{old: old_value})
    for _ in range(2):
        loaded = config.load(path)
        flat = config.flatten(loaded.to_dict())
        assert flat[new] == new_value and loaded.sets(new)
        assert flat == config.flatten(dump_of(**{new: new_value}))
    assert_noted_once(capsys, old, new)


@former
def test_on_the_command_line(tmp_path, capsys, old, old_value, new, new_value):
    path = write(tmp_path / 'today.py')
    loaded = config.load(path, [(old, str(old_value))])
    assert config.flatten(loaded.to_dict())[new] == new_value
    loaded = config.override(config.load(path), [(old, str(old_value))])
    assert config.flatten(loaded.to_dict())[new] == new_value
    assert_noted_once(capsys, old, new)


@pytest.mark.parametrize('old, new', old_names.RENAMED.items())
def test_a_flag_takes_back_what_the_file_set_under_either_name(tmp_path, old, new):
    value = next(value for key, value, *_ in FORMER if key == old)
    for name in (old, new):
        path = write(tmp_path / 'today.py', **{name: value})
        loaded = config.load(path, [(old, 'default')])
        assert not loaded.sets(new) and config.flatten(loaded.to_dict())[new] is None


@pytest.mark.parametrize('old, wrong', [('loss', 'x'), ('label_smoothing', 2), ('model.shared', 0)])
def test_a_wrong_value_is_refused_by_the_name_of_today(old, wrong):
    with pytest.raises(UserError, match=rf'{old_names.RENAMED[old]} must be'):
        config.resolve(BASE | {old: wrong})


def test_other_ways_to_fuse_are_as_ever(capsys):
    assert config.resolve(BASE | {'model.fusion': 'cross'}).model.fusion == 'cross'
    assert config.resolve(BASE).task.name == 'classification'
    assert capsys.readouterr().err == ''


@former
def test_in_a_dump(old, old_value, new, new_value):
    loaded = config.from_json(as_it_was(**{old: old_value}))
    assert config.flatten(loaded.to_dict()) == config.flatten(dump_of(**{new: new_value}))
    assert config.digest(loaded) == config.digest(config.resolve(BASE | {new: new_value}))


def test_a_dump_of_defaults_sets_no_key_of_a_task(capsys):
    loaded = config.from_json(as_it_was())
    assert loaded.to_dict() == dump_of()
    assert not any(loaded.sets(f'task.{name}') for name in loaded.task)
    assert capsys.readouterr().err == '', 'the user has written none of these names'


def test_a_run_of_before_at_its_defaults_is_not_changed():
    assert config.difference(as_it_was(), dump_of()) == []


@former
def test_a_run_of_before_goes_on_with_the_config_of_today(old, old_value, new, new_value):
    before = as_it_was(**{old: old_value})
    assert config.difference(before, dump_of(**{new: new_value})) == []
    (line,) = config.difference(before, dump_of())
    assert line.startswith(f'{new}: ')


def test_a_default_that_today_is_written_down_is_no_change():
    stated = {'task.loss': 'softmax', 'task.label_smoothing': 0.0, 'task.embedding_dim': 512}
    assert config.difference(as_it_was(), dump_of(**stated)) == []
    assert config.difference(dump_of(), dump_of(**stated)) == []
    assert config.difference(dump_of(), dump_of(**{'task.loss': 'sigmoid'})) == [
        "task.loss: None -> 'sigmoid'"
    ]


# As the version before the tasks computed them.
DIGESTS = {
    'configs/transfer_digits.py': '1a41b4ab743d25cb',
    'configs/contrastive.py': '968f7a961138c16b',
    'configs/contrastive.py:loss=sigmoid': 'f729cdf96847a4a9',
    'configs/own_images.py:path=x': 'e2d327e2b0dfb8f5',
    'configs/sequences.py': '873e278f94beebac',
}


@pytest.mark.parametrize('spec', DIGESTS)
def test_sweeps_that_were_begun_under_former_names_are_recognised(spec):
    settings = config.load(spec, [('model.variant', 'mu/4')])
    assert config.digest(settings) == DIGESTS[spec]
    changed = config.load(spec, [('model.variant', 'mu/4'), ('seed', '1')])
    assert config.digest(changed) != DIGESTS[spec]


def test_digests_tell_tasks_apart():
    # What no former config could say is in the digest too.
    base = [('model.variant', 'mu/4'), ('task.name', 'masked')]
    digests = {
        config.digest(config.load('configs/pretrain_fdsl.py', more))
        for more in ([], base, [*base, ('task.mask_ratio', '0.5')])
    }
    assert len(digests) == 3


def test_a_sweep_over_a_former_name():
    settings = config.load('configs/transfer_digits.py', [('model.variant', 'mu/4')])
    assert sweep.settings(settings, ['label_smoothing=0,0.1']) == [
        {'task.label_smoothing': 0.0},
        {'task.label_smoothing': 0.1},
    ]
