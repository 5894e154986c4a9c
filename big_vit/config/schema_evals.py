"""Keys of `evals` that say what is measured, and how."""

from collections.abc import Callable
from typing import Any

from big_vit.config.fields import (
    Field,
    below_one,
    boolean,
    check_text,
    choice,
    classes,
    integer,
    number,
    several,
    size,
)
from big_vit.config.registries import EVALUATORS


def _subset(value: Any) -> tuple[str | int, ...] | str:
    """present, or tuple of names or numbers"""
    return 'present' if value == 'present' else classes(value)


def _two(lowest: int, what: str, ordered: bool = False) -> Callable[[Any], tuple[int, int]]:
    """Makes a check for two whole numbers, in order where they are a range."""
    check_item = integer(lowest, 10**6)

    def check(value: Any) -> tuple[int, int]:
        pair = value if isinstance(value, tuple) and len(value) == 2 else ()
        try:
            first, second = map(check_item, pair)
        except ValueError:
            raise ValueError(f'two whole numbers from {lowest}, {what}') from None
        if ordered and first >= second:
            raise ValueError(f'two whole numbers in order, {what}')
        return first, second

    check.__doc__ = what
    return check


CORRUPTIONS = (
    'gaussian_noise',
    'shot_noise',
    'impulse_noise',
    'speckle_noise',
    'gaussian_blur',
    'box_blur',
    'pixelate',
    'brightness',
    'contrast',
    'saturate',
    'haze',
    'occlusion',
    'translation',
)
# None as a default: each evaluator has its own, in its signature in `evaluators/`. A key may be set
# if the type of the evaluation reads it.
EVALUATION = {
    'type': Field(
        EVALUATORS.name,
        None,
        "What is measured, by default 'classification'; see docs/evaluators.md.",
    ),
    'train_split': Field(
        check_text,
        None,
        "Labelled split that is learned from; by default that of `data`, or 'train' of another "
        'source.',
    ),
    'gallery_split': Field(
        check_text, None, 'Split that is searched; the default is that of `train_split`.'
    ),
    'blocks': Field(
        several(integer(-1024, 1023), 'number of a block'),
        None,
        'Blocks whose pooled tokens are the features, -1 is the last; by default the features are '
        'the vector before the head.',
    ),
    'pool': Field(
        choice('gap', 'cls', 'cls_gap'),
        None,
        'How tokens of `blocks` are pooled: mean, class token, or both; by default cls if there '
        'is one.',
    ),
    'calibration': Field(boolean, None, 'Also ECE, NLL and Brier score.'),
    'per_class': Field(
        choice('none', 'mean', 'all'),
        None,
        'Also the mean of the accuracies of the classes, or each of them too; of boxes and of '
        'pixels the mean is always there.',
    ),
    'subset': Field(
        _subset,
        None,
        "Only these classes of the model compete; 'present': those that the split has.",
    ),
    'skip_unlabelled': Field(
        boolean, None, 'Do not count examples without a label, as ImageNet-ReaL.'
    ),
    'shots': Field(several(integer(1), 'whole number from 1'), None, 'Examples of each class.'),
    'seeds': Field(integer(1, 1000), None, 'How many draws of the shots are averaged.'),
    'whiten': Field(boolean, None, 'Standardise features by the shots.'),
    'bias': Field(number(0, 1e6), None, 'Constant feature that is added; 0 is none.'),
    'l2': Field(
        several(number(0), 'number'),
        None,
        'Penalty on squared weights; of several, linear_probe takes the best on `held_out`.',
    ),
    'k': Field(several(integer(1), 'whole number from 1'), None, 'Neighbours.'),
    'metric': Field(choice('cosine', 'euclidean'), None, 'Nearness.'),
    'vote': Field(
        choice('temperature', 'uniform'),
        None,
        'Weight of neighbours: exp(cosine / temperature), or 1; by default the former for '
        'cosines, the latter for euclidean.',
    ),
    'temperature': Field(number(1e-3, 1e6), None, "Of vote='temperature', by default 0.07."),
    'held_out': Field(below_one, None, 'Share of train_split to choose on.'),
    'iterations': Field(integer(1, 10**6), None, 'Most iterations of L-BFGS.'),
    'rates': Field(several(number(0), 'number'), None, 'Learning rates for 256 examples.'),
    'prompts': Field(
        several(check_text, 'sentence with {} for the name of a class'),
        None,
        "Sentences that stand for a class, as 'a photo of a {}'.",
    ),
    'last_blocks': Field(
        several(integer(1), 'whole number from 1'),
        None,
        'How many last blocks are joined; by default 1 and 4, or all if there are fewer.',
    ),
    'probe_updates': Field(integer(1), None, 'Updates by SGD.'),
    'probe_batch': Field(integer(1, 2**24), None, 'Examples a step.'),
    'ranks': Field(several(integer(1), 'whole number from 1'), None, 'k of the recalls at k.'),
    'corruptions': Field(
        several(choice(*CORRUPTIONS), 'one of ' + ', '.join(CORRUPTIONS)),
        None,
        'What is done to images; by default all that the images allow.',
    ),
    'severities': Field(
        several(integer(1, 5), 'whole number from 1 to 5'), None, 'How much of it.'
    ),
    'stride': Field(
        size,
        None,
        'Pixels from one window to the next, of pictures larger than the images of the model; by '
        'default two thirds of these.',
    ),
    'scales': Field(
        several(number(0.05, 16), 'number'),
        None,
        'Factors by which pictures are resized, whose probabilities are averaged.',
    ),
    'flips': Field(boolean, None, 'Also see the mirror image of each picture.'),
    'examples': Field(
        integer(2), None, 'Most examples, spread evenly over the split; those of LiDAR are apart.'
    ),
    'window': Field(
        _two(1, '(first, last)', ordered=True),
        None,
        'Eigenvalues of which alpha is the slope; by default from the fifth to the middle one.',
    ),
    'views': Field(
        check_text,
        None,
        'Random transform of the views for LiDAR; by default `data.transform`, and no LiDAR if '
        'that is not random.',
    ),
    'lidar': Field(
        _two(2, '(pictures, views)'), None, 'Most pictures for LiDAR, and views of each.'
    ),
}
