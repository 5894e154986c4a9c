"""Trees by path: flattening loses nothing, and rules mean exactly what they say."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vit import trees
from big_vit.errors import UserError

TREE = {
    'embedding': {'kernel': np.zeros((2, 3), np.float32), 'bias': np.zeros(3, np.float16)},
    'Transformer': {'block': {'scale': np.zeros((4, 5), np.int8)}, 'norm': np.zeros((), np.int64)},
}
NAMES = ['a/kernel', 'a/bias', 'b/kernel', 'b/bias']


def refused(rules, *parts, names=NAMES):
    with pytest.raises(UserError) as caught:
        trees.match_rules(rules, names, 'config: optim.lr_rules')
    for part in ('config: optim.lr_rules', *parts):
        assert part in str(caught.value)


def test_flatten_names_leaves_by_path():
    assert set(trees.flatten(TREE)) == {
        'embedding/kernel',
        'embedding/bias',
        'Transformer/block/scale',
        'Transformer/norm',
    }
    assert trees.flatten(TREE)['Transformer/block/scale'] is TREE['Transformer']['block']['scale']


def test_unflatten_undoes_flatten():
    again = trees.unflatten(trees.flatten(TREE))
    assert jax.tree.structure(again) == jax.tree.structure(TREE)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(TREE), strict=True))


def test_flatten_is_in_the_order_of_the_leaves():
    for name_leaf, leaf in zip(trees.flatten(TREE).values(), jax.tree.leaves(TREE), strict=True):
        assert name_leaf is leaf


def test_names_reach_through_tuples_and_namedtuples():
    state = collections.namedtuple('State', 'count mu')(1, {'head': {'kernel': 2}})
    assert trees.flatten({'opt': (state, [3])}) == {
        'opt/0/count': 1,
        'opt/0/mu/head/kernel': 2,
        'opt/1/0': 3,
    }


def test_map_with_name_keeps_the_structure_and_passes_further_trees():
    mapped = trees.map_with_name(lambda name, a, b: (name, a + b), {'x': {'y': 1}}, {'x': {'y': 2}})
    assert mapped == {'x': {'y': ('x/y', 3)}}


def test_counts_and_bytes():
    assert trees.count(TREE) == 6 + 3 + 20 + 1
    assert trees.nbytes(TREE) == 6 * 4 + 3 * 2 + 20 + 8
    assert trees.count({}) == trees.nbytes({}) == 0


def test_counts_need_shapes_only_and_do_not_overflow():
    huge = {'a': jax.ShapeDtypeStruct((2**20, 2**20), jnp.bfloat16)}
    assert trees.count(huge) == 2**40
    assert trees.nbytes(huge) == 2**41


def test_the_first_rule_that_matches_wins():
    rules = [('a/.*', 1), ('.*/kernel', 2), ('.*', 3)]
    assert trees.match_rules(rules, NAMES, 'k') == {
        'a/kernel': 1,
        'a/bias': 1,
        'b/kernel': 2,
        'b/bias': 3,
    }


def test_a_rule_matches_whole_names_only():
    refused([('kernel', 1), ('.*', 0)], "'kernel'", 'it matches no parameter')
    refused([('a', 1), ('.*', 0)], "'a'", 'it matches no parameter')


def test_a_rule_that_matches_nothing_is_refused():
    refused([('.*/scale', 1), ('.*', 0)], "'.*/scale'", 'it matches no parameter')


def test_a_rule_that_earlier_ones_cover_is_refused():
    refused([('.*', 0), ('.*/kernel', 1)], "'.*/kernel'", 'earlier rules match all it would')
    refused([('a/.*', 0), ('b/.*', 0), ('.*/kernel', 1)], "'.*/kernel'", 'earlier')


def test_a_name_without_a_rule_is_refused():
    refused([('.*/kernel', 1)], 'no rule matches a/bias', "('.*', value)")
    refused([], 'no rule matches a/kernel')


@pytest.mark.parametrize('pattern', ['(', '*', '[a', 'a{2,1}', '(?P<n>a)(?P<n>b)'])
def test_what_is_no_regular_expression_is_refused(pattern):
    refused([(pattern, 1), ('.*', 0)], repr(pattern), 'not a regular expression')


def test_values_are_passed_through_untouched():
    value = object()
    assert trees.match_rules([('.*', value)], ['x'], 'k')['x'] is value
