"""How classes of two sides meet."""

import dataclasses

import numpy as np
import pytest

from big_vit.data.sources import classes
from big_vit.data.sources.base import from_arrays
from big_vit.data.sources.known import Known, known_of, meet
from big_vit.errors import UserError


def toy(labels, names=None, count=None):
    """A source of these labels; each picture is its label's name, or number."""
    labels = np.array(labels, np.int32)
    count = count or (len(names) if names else int(labels.max()) + 1)
    images = np.zeros((len(labels), 2, 2, 1), np.uint8)
    return from_arrays('toy', 'test', images, labels, count, class_names=names)


def known(names=None, count=None):
    return Known(count or len(names), names, 'the model')


@pytest.mark.parametrize(
    ('source', 'model', 'wanted', 'line'),
    [
        (toy([0, 1], ('a', 'b')), known(('a', 'b')), [0, 1], ''),
        (toy([0, 0], ('a',)), known(('a', 'b')), [0, 0], ''),
        (toy([0, 1], ('b', 'a')), known(('a', 'b', 'c')), [1, 0], 'b 0 -> 1, a 1 -> 0'),
        (toy([1], ('b', 'a', '')), known(('', 'a', 'b')), [1], 'b 0 -> 2'),
        (toy([2, 0, 1]), known(('0', '1', '10', '2')), [3, 0, 1], '2 2 -> 3'),
        (toy([2, 10]), known(('1', '10', '2')), [2, 1], '10 10 -> 1'),
        (toy([1, 2], ('0', '10', '2')), known(count=12), [10, 2], '10 1 -> 10'),
        (toy([0, 1], ('02', '10')), known(('10', '2')), [1, 0], '02 0 -> 1'),
        (toy([1, 0]), known(('a', 'b', 'c')), [1, 0], 'names in the model and none in toy'),
        (toy([1, 0], ('a', 'b')), known(count=2), [1, 0], 'names in toy and none in the model'),
        (toy([1, 0]), known(count=5), [1, 0], ''),
        # As ImageNet has two classes called crane.
        (toy([0, 2], ('crane', 'ox', 'crane')), known(('crane', 'ox', 'crane')), [0, 2], ''),
    ],
)
def test_classes_meet_by_name(source, model, wanted, line):
    met, said = meet(source, model, 'evals.x')
    assert met.num_classes == model.num_classes
    assert met.labels().tolist() == met.load(np.arange(met.length))['label'].tolist() == wanted
    assert line in said if line else not said
    if model.names:
        assert met.class_names == model.names


@pytest.mark.parametrize(
    ('source', 'model', 'message'),
    [
        (toy([0, 1], ('a', 'x')), known(('a', 'b')), r"has classes that the model has not \('x'"),
        (toy([5]), known(('a', 'b')), r'has label 5, and the model no class for it among its 2'),
        (toy([5]), known(count=5), 'has label 5, and the model no class for it among its 5:'),
        (toy([0]), known(('1', '2')), r'has label 0, .* among its 2 \(1, 2\)'),
        (toy([0], ('1998', '1999')), known(count=2), r"has not \('1998', .*'1999'; it has 0, 1\)"),
        (toy([1], ('x', 'b')), known(('a', 'b')), "'x'"),
        (toy([1], ('ox', 'crane')), known(('crane', 'ox', 'crane')), "'crane', nearest 'crane'"),
    ],
)
def test_classes_that_the_model_has_not_are_refused(source, model, message):
    with pytest.raises(UserError, match=message) as error:
        meet(source, model, 'evals.x')
    assert str(error.value).startswith('config: evals.x: toy test has ')
    assert '\n' not in str(error.value)


def test_several_labels_of_an_example_meet_too():
    lists = [np.array([1, 0]), np.array([], int)]
    source = toy([0, 1], ('b', 'a'))
    source = dataclasses.replace(
        source, labels=None, load=lambda indices: {'label': [lists[i] for i in indices]}
    )
    met, _ = meet(source, known(('a', 'b')), 'evals.x')
    assert [x.tolist() for x in met.load(np.arange(2))['label']] == [[0, 1], []]
    with pytest.raises(UserError, match="'b'"):  # Which labels occur cannot be seen.
        meet(source, known(('a', 'c')), 'evals.x')


def test_a_subset_of_numbers_keeps_them_as_names():
    few = classes.subset(toy([3, 5, 3, 4]), (5, 3), 'data.classes')
    assert (few.class_names, few.labels().tolist()) == (('5', '3'), [1, 0, 1])
    other = classes.subset(toy([3, 5, 3, 4]), (3, 5), 'evals.x.classes')
    met, _ = meet(other, known_of(few, 'the model'), 'evals.x')
    assert met.labels().tolist() == few.labels().tolist()
    # A number is the class that is called so.
    named = toy([0, 1, 2], ('0', '10', '2'))
    assert classes.subset(named, (2,), 'x').class_names == ('2',)
    assert classes.relabel(named, {'2': 1, '0': 0, '10': None}, 'x').class_names == ('0', '2')
    with pytest.raises(UserError, match="says nothing of class '10'"):
        classes.relabel(named, {'0': 0, '2': 1, '1': 0}, 'x')
