"""Keys of `evals` that say what is measured, and how."""

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
)


def _severity(value: Any) -> int:
    """whole number from 1 to 5"""
    level = integer(1)(value)
    if level > 5:
        raise ValueError('a whole number from 1 to 5')
    return level


def _subset(value: Any) -> tuple[str | int, ...] | str:
    """present, or tuple of names or numbers"""
    return 'present' if value == 'present' else classes(value)


EVALUATORS = (
    'classification',
    'fewshot',
    'knn',
    'linear_probe',
    'linear_grid',
    'retrieval',
    'robustness',
    'zero_shot',
    'matching',
)
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
# What an evaluation is of and how it is done. None is the own default of what reads the key, for
# a key that is set must be one that the evaluation's type reads.
EVALUATION = {
    'type': Field(
        choice(*EVALUATORS),
        None,
        'What is measured; docs/evaluators.md has them. Own default: classification.',
    ),
    'train_split': Field(
        check_text,
        None,
        'Labelled split that is learnt from (fewshot, knn, linear_probe, linear_grid). Own '
        "default: that of `data`; 'train' of another source.",
    ),
    'gallery_split': Field(
        check_text, None, 'Split that is searched (retrieval). Own default: as train_split.'
    ),
    'blocks': Field(
        several(integer(), 'number of a block'),
        None,
        'Blocks whose pooled tokens are the features, -1 is the last (fewshot, knn, '
        'linear_probe, retrieval). Own default: the vector before the head.',
    ),
    'pool': Field(
        choice('gap', 'cls', 'cls_gap'),
        None,
        'How tokens of `blocks` are pooled: mean, class token, or both. Own default: cls where '
        'there is one.',
    ),
    'calibration': Field(
        boolean, None, 'Also ECE, NLL and Brier score (classification). Own default: false.'
    ),
    'per_class': Field(
        choice('none', 'mean', 'all'),
        None,
        'Also the mean of the accuracies of the classes, or each too (classification). Own '
        'default: none.',
    ),
    'subset': Field(
        _subset,
        None,
        "Only these classes of the model compete; 'present': those that the split has "
        '(classification).',
    ),
    'skip_unlabelled': Field(
        boolean,
        None,
        'Do not count examples without a label, as ImageNet-ReaL (classification). Own default: '
        'false.',
    ),
    'shots': Field(
        several(integer(1), 'whole number'),
        None,
        'Examples of each class (fewshot). Own default: (1, 5, 10, 25).',
    ),
    'seeds': Field(
        integer(1), None, 'How many draws of the shots are averaged (fewshot). Own default: 3.'
    ),
    'whiten': Field(
        boolean,
        None,
        'Standardise features by the shots (fewshot). Own default: true.',
    ),
    'bias': Field(
        number(0), None, 'Constant feature that is added; 0 is none (fewshot). Own default: 100.'
    ),
    'l2': Field(
        several(number(0), 'number'),
        None,
        'Penalty on squared weights; of several linear_probe takes the best on `held_out`. Own '
        'default: fewshot 1024; linear_probe (1e-6, 1e-4, 1e-2, 1).',
    ),
    'k': Field(
        several(integer(1), 'whole number'), None, 'Neighbours (knn). Own default: (10, 20).'
    ),
    'metric': Field(choice('cosine', 'euclidean'), None, 'Nearness (knn). Own default: cosine.'),
    'vote': Field(
        choice('temperature', 'uniform'),
        None,
        'Weight of neighbours: exp(cosine / temperature), or 1 (knn). Own default: temperature; '
        'uniform for euclidean.',
    ),
    'temperature': Field(number(1e-3), None, "Of vote='temperature' (knn). Own default: 0.07."),
    'held_out': Field(
        below_one,
        None,
        'Share of train_split to choose on (linear_probe, linear_grid). Own default: 0.1.',
    ),
    'iterations': Field(
        integer(1), None, 'Most iterations of L-BFGS (linear_probe). Own default: 1000.'
    ),
    'rates': Field(
        several(number(0), 'number'),
        None,
        'Learning rates for 256 examples (linear_grid). Own default: 13 from 1e-5 to 0.1.',
    ),
    'prompts': Field(
        several(check_text, 'sentence with {} for the name of a class'),
        None,
        "Sentences that stand for a class, as 'a photo of a {}' (zero_shot). Own default: '{}'.",
    ),
    'last_blocks': Field(
        several(integer(1), 'whole number'),
        None,
        'How many last blocks are joined (linear_grid). Own default: (1, 4).',
    ),
    'probe_updates': Field(integer(1), None, 'Updates by SGD (linear_grid). Own default: 12500.'),
    'probe_batch': Field(integer(1), None, 'Examples a step (linear_grid). Own default: 1024.'),
    'ranks': Field(
        several(integer(1), 'whole number'),
        None,
        'k of the recalls at k (retrieval, matching). Own default: (1, 5, 10).',
    ),
    'corruptions': Field(
        several(choice(*CORRUPTIONS), 'one of ' + ', '.join(CORRUPTIONS)),
        None,
        'What is done to images (robustness). Own default: all that the images allow.',
    ),
    'severities': Field(
        several(_severity, 'whole number from 1 to 5'),
        None,
        'How much of it (robustness). Own default: (1, 2, 3, 4, 5).',
    ),
}
