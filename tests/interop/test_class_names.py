"""Names of classes that folders of other codebases and files of labels give."""

import json

import pytest

from big_vit.errors import UserError
from big_vit.interop import class_names

THREE = ('ant', 'bee', 'cow')


@pytest.mark.parametrize(
    ('config', 'wanted'),
    [
        ({'label_names': ['ant', 'bee', 'cow']}, THREE),
        ({'label_names': {'0': 'ant', '2': 'cow'}}, ('ant', '', 'cow')),
        ({'pretrained_cfg': {'label_names': ['ant', 'bee', 'cow']}}, THREE),
        ({'pretrained_cfg': {'labels': ['ant', 'bee', 'cow']}}, THREE),
        ({'label_names': ['ant', 'bee', 'cow'], 'pretrained_cfg': {'label_names': ['x']}}, THREE),
        ({'id2label': {'2': 'cow', '0': 'ant', '1': 'bee'}}, THREE),
        ({'id2label': {'0': 'LABEL_0', '1': 'LABEL_1', '2': 'LABEL_2'}}, None),
        ({}, None),
    ],
)
def test_a_config_names_classes(config, wanted, tmp_path):
    assert class_names.of_config(config, tmp_path, 3).get('class_names') == wanted


def test_descriptions_stand_beside_names(tmp_path):
    config = {'label_names': ['n1', 'n2'], 'label_descriptions': {'n2': 'a tench', 'n9': 'x'}}
    found = class_names.of_config(config, tmp_path, 2)
    assert found == {'class_names': ('n1', 'n2'), 'class_descriptions': ('n1', 'a tench')}


def test_a_file_beside_the_weights_names_what_the_config_does_not(tmp_path):
    (tmp_path / 'labels.txt').write_text('ant\nbee\ncow\n')
    assert class_names.of_config({}, tmp_path, 3) == {'class_names': THREE}
    assert class_names.of_config({}, None, 3) == {}
    assert class_names.of_config({}, tmp_path, 0) == {}


@pytest.mark.parametrize(
    ('name', 'text'),
    [
        ('x.txt', 'ant\nbee\ncow\n'),
        ('x.csv', '\ufeffant\r\nbee \r\ncow'),
        ('x.json', '["ant", "bee", "cow"]'),
        ('x.json', '{"2": "cow", "0": "ant", "1": "bee"}'),
        ('x.json', '{"cow": 2, "ant": 0, "bee": 1}'),
        ('x.json', '{"b": "bee"}'),
    ],
)
def test_a_file_of_labels(name, text, tmp_path):
    (tmp_path / name).write_text(text, encoding='utf-8')
    assert class_names.of_file(tmp_path / name, 3, ('ant', 'b', 'cow')) == THREE


@pytest.mark.parametrize(
    ('name', 'text', 'message'),
    [
        ('x.txt', 'ant\nbee\n', 'names 2 classes (ant, bee), and the head has 3'),
        ('x.json', '["a", "b", "c", "d"]', 'names 4 classes (a, b, c, and 1 more)'),
        ('x.json', '{"7": "pig"}', "names a class 7 ('pig'), and the head has 3"),
        ('x.json', '{"cwo": "cow"}', "classes that the model has not ('cwo', nearest 'cow')"),
        ('x.json', '[1, 2, 3]', 'neither a list of names'),
        ('x.json', '{', 'cannot be read as JSON'),
        ('x.txt', None, 'cannot be read'),
    ],
)
def test_a_file_that_does_not_fit_names_both_sides(name, text, message, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        class_names.of_file(tmp_path / name, 3, THREE)
    assert message in str(error.value) and str(tmp_path / name) in str(error.value)


def test_a_map_from_names_needs_names(tmp_path):
    (tmp_path / 'x.json').write_text(json.dumps({'a': 'b'}))
    with pytest.raises(UserError, match='maps names to names, and the model has none'):
        class_names.of_file(tmp_path / 'x.json', 3)
