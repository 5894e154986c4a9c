"""Sentences of the same words in six orders."""

import itertools

import numpy as np
from jaxtyping import Int64

from big_vit.data import order
from big_vit.data.sources.base import Columns, Request, Source
from big_vit.data.sources.synthetic import SPLITS, TRAIN, synthetic_source

_ANIMALS = (
    'dog', 'cat', 'fox', 'horse', 'goat', 'bear',
    'mouse', 'wolf', 'tiger', 'duck', 'eagle', 'whale',
)  # fmt: skip
_PEOPLE = (
    'girl', 'boy', 'cook', 'pilot', 'nurse', 'king',
    'queen', 'baker', 'farmer', 'singer', 'judge', 'sailor',
)  # fmt: skip
_MACHINES = (
    'robot', 'laptop', 'truck', 'tractor', 'engine', 'drone',
    'printer', 'camera', 'radio', 'clock', 'train', 'pump',
)  # fmt: skip
_VERBS = (
    'shows', 'brings', 'leads', 'sends', 'gives', 'takes',
    'offers', 'lends', 'returns', 'hands', 'sells', 'promises',
)  # fmt: skip
_WHEN = (
    'today', 'tonight', 'now', 'again', 'often', 'later',
    'soon', 'twice', 'daily', 'first', 'here', 'outside',
)  # fmt: skip
_NOUNS = (_ANIMALS, _PEOPLE, _MACHINES)
_BAGS = len(_ANIMALS) * len(_PEOPLE) * len(_MACHINES) * len(_VERBS) * len(_WHEN)
_ORDERS = np.array(list(itertools.permutations(range(3))))


def phrases(request: Request) -> Source:
    """Generate sentences of the same words in six orders.

    An example is 'the dog shows the girl to the robot today': an animal, a person and a machine
    take the three places in any order, which is the label. Every bag of words comes in all six
    orders, one after the other, so that anything that counts words, letters or bytes is right on
    exactly 1/6. No bag of `test` is in `train`.

    Args:
      request: the examples to generate, of `train` and `test`; the seed shuffles the bags.

    Returns:
      A source of columns 'text', B strings of ASCII of less than 64 characters, and 'label',
      int32 [B].

    Raises:
      UserError: no such split.
    """
    first_bag = {SPLITS['train']: 0, SPLITS['test']: TRAIN // len(_ORDERS)}

    def load(split: int, indices: np.ndarray) -> Columns:
        group, label = np.divmod(indices, len(_ORDERS))
        bags = _bags(request.seed, first_bag[split] + group)
        texts = []
        for *nouns, verb, when, a, b, c in np.concatenate([bags, _ORDERS[label]], axis=1).tolist():
            one, two, three = (_NOUNS[kind][nouns[kind]] for kind in (a, b, c))
            texts.append(f'the {one} {_VERBS[verb]} the {two} to the {three} {_WHEN[when]}')
        return {'text': texts}

    return synthetic_source(
        'phrases',
        request,
        group=len(_ORDERS),
        class_names=tuple('-'.join(('animal', 'person', 'machine')[i] for i in o) for o in _ORDERS),
        image_shape=None,
        chunk=1024,
        load=load,
    )


def _bags(seed: int, numbers: Int64[np.ndarray, ' b']) -> Int64[np.ndarray, 'b 5']:
    """Return (animal, person, machine, verb, when) of some bags, no two of which are the same."""
    rest = order.shuffled(numbers, length=_BAGS, seed=seed, epoch=0)
    words = []
    for choices in (*_NOUNS, _VERBS, _WHEN):
        rest, word = np.divmod(rest, len(choices))
        words.append(word)
    return np.stack(words, axis=1)
