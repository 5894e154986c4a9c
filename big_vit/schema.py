"""Every key of a config: which values it takes, its default, and what it means."""

import difflib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

UNITS = ('steps', 'epochs', 'examples', 'percent')

OPTIMIZERS = (
    'sgd',
    'adam',
    'adamw',
    'nadamw',
    'adafactor',
    'adafactor_vit',
    'lars',
    'lamb',
    'lion',
    'muon',
    'schedule_free_adamw',
    'shampoo',
    'soap',
)


class Field(NamedTuple):
    """One key of the schema: how its value is checked, its default, what it means.

    The docstring of `check` says which values it takes; docs/config.md is made of it.
    """

    check: Callable[[Any], Any]
    default: Any
    doc: str


def _number(lowest: float = -math.inf, highest: float = math.inf) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError('a number')
        if abs(value) > 1e300:  # Also what 1e999 and inf are.
            raise ValueError('a finite number')
        if not lowest <= value <= highest:
            raise ValueError(f'a number from {lowest:g} to {highest:g}')
        return float(value)

    check.__doc__ = 'number'
    return check


def _below_one(value: Any) -> float:
    """number"""
    number = _number(0, 1)(value)
    if number == 1:
        raise ValueError('a number from 0 to below 1')
    return number


def _positive(value: Any) -> float:
    """number"""
    number = _number(0, 1)(value)
    if number == 0:
        raise ValueError('a number above 0, to 1')
    return number


def _negative(value: Any) -> float:
    """number"""
    number = _number(-1, 0)(value)
    if number == 0:
        raise ValueError('a number below 0, such as -0.25')
    return number


def _int(lowest: float = -math.inf) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError('a whole number')
        if value < lowest:
            raise ValueError(f'a whole number of at least {lowest}')
        return value

    check.__doc__ = 'whole number'
    return check


def _bool(value: Any) -> bool:
    """true, false"""
    if not isinstance(value, bool):
        raise ValueError('true or false')
    return value


def check_text(value: Any) -> str:
    """text"""
    if not isinstance(value, str):
        raise ValueError('a text')
    return value


def _choice(*choices: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.4)
            hint = f' (did you mean {near[0]!r}?)' if near else ''
            raise ValueError('one of ' + ', '.join(map(repr, choices)) + hint)
        return value

    check.__doc__ = ', '.join(choices)
    return check


def _size(value: Any) -> tuple[int, int]:
    """side, or (height, width)"""
    # Bounded, so that a typo cannot ask for terabytes.
    pair = value if isinstance(value, tuple) else (value, value)
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in pair)
    if len(pair) != 2 or not whole or not all(1 <= n <= 16384 for n in pair):
        raise ValueError('pixels from 1 to 16384: one whole number, or (height, width)')
    return pair[0], pair[1]


def _rules(value: Any) -> tuple[tuple[str, float], ...]:
    """pairs of (regex, factor)"""
    try:
        return tuple((check_text(pattern), _number()(factor)) for pattern, factor in value)
    except (TypeError, ValueError):
        raise ValueError("a tuple of (regex on the parameter's path, factor)") from None


def _group_rules(value: Any) -> tuple[tuple[str, str], ...]:
    """pairs of (regex, optimizer)"""
    try:
        pairs = tuple((check_text(pattern), check_text(name)) for pattern, name in value)
    except (TypeError, ValueError):
        raise ValueError("a tuple of (regex on the parameter's path, optimizer)") from None
    try:
        return tuple((pattern, _choice(*OPTIMIZERS)(name)) for pattern, name in pairs)
    except ValueError as error:
        raise ValueError(f'pairs of a regex and {error}') from None


def _durations(key: str, doc: str, units: tuple[str, ...] = UNITS) -> dict[str, Field]:
    return {f'{key}_{unit}': Field(_number(0), None, f'{doc}, in {unit}.') for unit in units}


def _classes(value: Any) -> tuple[str | int, ...]:
    """tuple of names or numbers"""
    choices = value if isinstance(value, tuple) else (value,)
    if not choices or not all(type(c) is int or isinstance(c, str) for c in choices):
        raise ValueError("a tuple of names or numbers of classes, such as ('cat', 'dog')")
    return choices


def _several(one: Callable[[Any], Any], what: str) -> Callable[[Any], tuple[Any, ...]]:
    """One value, or a tuple of different ones."""

    def check(value: Any) -> tuple[Any, ...]:
        found = value if isinstance(value, tuple) else (value,)
        if not found:
            raise ValueError(f'{what}, or a tuple of them')
        checked = tuple(one(item) for item in found)
        if len(set(checked)) != len(checked):
            raise ValueError(f'a tuple of different values ({what})')
        return checked

    check.__doc__ = f'{what}, or a tuple of them'
    return check


def _severity(value: Any) -> int:
    """whole number from 1 to 5"""
    number = _int(1)(value)
    if number > 5:
        raise ValueError('a whole number from 1 to 5')
    return number


def _subset(value: Any) -> tuple[str | int, ...] | str:
    """present, or tuple of names or numbers"""
    return 'present' if value == 'present' else _classes(value)


SOURCES = (
    'fdsl',
    'motion',
    'orbit',
    'tones',
    'phrases',
    'pairs',
    'quiz',
    'captions',
    'digits',
    'idx',
    'arrays',
    'folder',
    'table',
    'tar',
    'parquet',
    'tfds',
    'records',
)
# None as a default means "not set": the value is required, inherited or absent.
_SOURCE = {
    'name': Field(_choice(*SOURCES), None, 'Where examples come from; docs/data.md has them.'),
    'split': Field(check_text, 'train', "Splits in TFDS syntax, as in 'train[:90%]+extra'."),
    'path': Field(check_text, None, 'Folder or files, local or gs://; the data_dir for tfds.'),
    'tfds_name': Field(check_text, None, "What TFDS calls the dataset, as in 'cifar10'."),
    'image_column': Field(
        check_text, None, "Column of images (table, parquet, arrays). Own default: 'image'."
    ),
    'label_column': Field(
        check_text,
        None,
        "Column of labels (table, parquet, arrays, tar, tfds). Own default: 'label'; tar 'cls'.",
    ),
    'text_column': Field(
        check_text,
        None,
        "Ending of the members with the words of each image, such as 'txt' (tar).",
    ),
    'num_classes': Field(_int(1), None, "Classes; by default the source's own count."),
    'num_examples': Field(
        _int(1), None, 'Examples the split must have; with num_classes, `plan` needs no data.'
    ),
    'label_map': Field(check_text, None, 'JSON file {"class": number}; null leaves out a class.'),
    'classes': Field(
        _classes, None, 'Only examples of these classes, which become 0, 1, ...; a tuple.'
    ),
    'transform': Field(
        check_text,
        'resize(size)',
        "Operations such as 'resize(size) | flip_lr'; docs/data.md has them.",
    ),
    'cache': Field(
        _choice('auto', 'none', 'decoded', 'resized'),
        'auto',
        'Keep decoded images in memory (auto: if they take at most 1 GiB), or smaller ones on '
        'disk.',
    ),
    'cache_side': Field(_int(8), 256, "Shorter side of the images of cache='resized'."),
    'on_error': Field(
        _choice('stop', 'skip'),
        'stop',
        'At a damaged example end the run, or take the next one and count.',
    ),
}

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
_EVALUATION = {
    'type': Field(
        _choice(*EVALUATORS),
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
        _several(_int(), 'number of a block'),
        None,
        'Blocks whose pooled tokens are the features, -1 is the last (fewshot, knn, '
        'linear_probe, retrieval). Own default: the vector before the head.',
    ),
    'pool': Field(
        _choice('gap', 'cls', 'cls_gap'),
        None,
        'How tokens of `blocks` are pooled: mean, class token, or both. Own default: cls where '
        'there is one.',
    ),
    'calibration': Field(
        _bool, None, 'Also ECE, NLL and Brier score (classification). Own default: false.'
    ),
    'per_class': Field(
        _choice('none', 'mean', 'all'),
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
        _bool,
        None,
        'Do not count examples without a label, as ImageNet-ReaL (classification). Own default: '
        'false.',
    ),
    'shots': Field(
        _several(_int(1), 'whole number'),
        None,
        'Examples of each class (fewshot). Own default: (1, 5, 10, 25).',
    ),
    'seeds': Field(
        _int(1), None, 'How many draws of the shots are averaged (fewshot). Own default: 3.'
    ),
    'whiten': Field(
        _bool,
        None,
        'Standardise features by the shots (fewshot). Own default: true.',
    ),
    'bias': Field(
        _number(0), None, 'Constant feature that is added; 0 is none (fewshot). Own default: 100.'
    ),
    'l2': Field(
        _several(_number(0), 'number'),
        None,
        'Penalty on squared weights; of several linear_probe takes the best on `held_out`. Own '
        'default: fewshot 1024; linear_probe (1e-6, 1e-4, 1e-2, 1).',
    ),
    'k': Field(_several(_int(1), 'whole number'), None, 'Neighbours (knn). Own default: (10, 20).'),
    'metric': Field(_choice('cosine', 'euclidean'), None, 'Nearness (knn). Own default: cosine.'),
    'vote': Field(
        _choice('temperature', 'uniform'),
        None,
        'Weight of neighbours: exp(cosine / temperature), or 1 (knn). Own default: temperature; '
        'uniform for euclidean.',
    ),
    'temperature': Field(_number(1e-3), None, "Of vote='temperature' (knn). Own default: 0.07."),
    'held_out': Field(
        _below_one,
        None,
        'Share of train_split to choose on (linear_probe, linear_grid). Own default: 0.1.',
    ),
    'iterations': Field(
        _int(1), None, 'Most iterations of L-BFGS (linear_probe). Own default: 1000.'
    ),
    'rates': Field(
        _several(_number(0), 'number'),
        None,
        'Learning rates for 256 examples (linear_grid). Own default: 13 from 1e-5 to 0.1.',
    ),
    'prompts': Field(
        _several(check_text, 'sentence with {} for the name of a class'),
        None,
        "Sentences that stand for a class, as 'a photo of a {}' (zero_shot). Own default: '{}'.",
    ),
    'last_blocks': Field(
        _several(_int(1), 'whole number'),
        None,
        'How many last blocks are joined (linear_grid). Own default: (1, 4).',
    ),
    'probe_updates': Field(_int(1), None, 'Updates by SGD (linear_grid). Own default: 12500.'),
    'probe_batch': Field(_int(1), None, 'Examples a step (linear_grid). Own default: 1024.'),
    'ranks': Field(
        _several(_int(1), 'whole number'),
        None,
        'k of the recalls at k (retrieval, matching). Own default: (1, 5, 10).',
    ),
    'corruptions': Field(
        _several(_choice(*CORRUPTIONS), 'one of ' + ', '.join(CORRUPTIONS)),
        None,
        'What is done to images (robustness). Own default: all that the images allow.',
    ),
    'severities': Field(
        _several(_severity, 'whole number from 1 to 5'),
        None,
        'How much of it (robustness). Own default: (1, 2, 3, 4, 5).',
    ),
}

SCHEMA: dict[str, Field] = {
    'seed': Field(_int(0), 0, 'Decides parameters, data order, augmentation and dropout.'),
    **_durations('total', 'Length of training', UNITS[:3]),
    'batch_size': Field(_int(1), None, 'Examples a step, over all devices.'),
    'accumulation': Field(_int(1), 1, 'Microbatches that a step is computed in.'),
    'image_size': Field(_size, None, 'Pixels: a side, or (height, width).'),
    'lr': Field(_number(0), None, 'Peak learning rate.'),
    'init': Field(check_text, None, 'Workdir or checkpoint whose parameters to start from.'),
    'init_tower': Field(
        check_text,
        None,
        'Of an `init` with streams apart: the stream that goes on, as a model of one input.',
    ),
    'init_channels': Field(
        _choice('mean', 'sum', 'repeat'),
        None,
        'How to make patches of `init` for images of other channels; without it that is refused.',
    ),
    'init_video': Field(
        _choice('central', 'inflate'), 'central', 'How to make tubelets of the patches of `init`.'
    ),
    'init_resize': Field(
        _choice('aligned', 'bilinear', 'bicubic', 'bicubic_antialias'),
        'aligned',
        "How to resize the learned positions of `init`: big_vision's way, between centres, "
        "Hugging Face's or timm's.",
    ),
    'switch': Field(
        check_text,
        None,
        'Workdir or checkpoint to go on from with another optimizer: step, parameters, moments.',
    ),
    'ema': Field(_number(0, 1), 0.0, 'Decay of the moving average of parameters; 0 is off.'),
    'skip_sigmas': Field(
        _number(0),
        6.0,
        'Skip updates whose loss or gradient norm is so many standard deviations above the '
        'last 128; 0 is off.',
    ),
    'label_smoothing': Field(_number(0, 1), 0.0, 'Share of the target spread over all classes.'),
    'loss': Field(
        _choice('softmax', 'sigmoid'),
        'softmax',
        "Cross-entropy over classes, or of each class; of streams 'apart' over the pairs of a "
        "batch (CLIP's), or of each pair (SigLIP's).",
    ),
    'mixup': Field(
        _number(0), 0.0, 'Blend pairs of examples, with shares of Beta(mixup, mixup); 0 is off.'
    ),
    'cutmix': Field(
        _number(0),
        0.0,
        'Paste a box of one example into another, with areas of Beta(cutmix, cutmix); 0 is off.',
    ),
    'mix_switch': Field(_number(0, 1), 0.5, 'Share of cutmix among mixtures, where both are on.'),
    'mix_prob': Field(_number(0, 1), 1.0, 'Share of examples that are mixed at all.'),
    'model.variant': Field(check_text, None, "Size and patch, as in 'S/16' or 'B/16x8'."),
    'model.width': Field(_int(1), None, "Overrides the variant's width."),
    'model.depth': Field(_int(1), None, "Overrides the variant's number of blocks."),
    'model.mlp_dim': Field(_int(1), None, "Overrides the variant's hidden width of the MLP."),
    'model.num_heads': Field(_int(1), None, "Overrides the variant's number of heads."),
    'model.head_dim': Field(_int(1), None, 'Width of one head; by default width / num_heads.'),
    'model.tokenizer': Field(
        _choice('patches', 'conv', 'resnet', 'cct', 'spt', 'tubelets', 'words', 'ragged'),
        'patches',
        'How inputs become tokens; docs/models.md has them. A hybrid such as R50+B/16 has resnet.',
    ),
    'model.stride': Field(_size, None, 'Pixels from one patch to the next, if they overlap.'),
    'model.tubelet': Field(_int(1), 2, 'Frames of a tubelet.'),
    'model.vocab': Field(_int(1), 259, 'Words; 259 is what byte_tokens gives.'),
    'model.embedding_bias': Field(_bool, True, 'Whether the patch projection has a bias.'),
    'model.posemb': Field(
        _choice('sincos2d', 'sincos2d_mae', 'learned', 'rope', 'relative', 'none'),
        'sincos2d',
        'Position embeddings.',
    ),
    'model.posemb_prefix': Field(
        _int(0), 0, 'Prefix tokens (class, registers) with a learned position of their own.'
    ),
    'model.posemb_grid': Field(_size, (16, 16), "Rows and columns of the table of 'ragged'."),
    'model.rope_theta': Field(_number(1), 100.0, 'Ratio of the fastest to the slowest rate.'),
    'model.class_token': Field(_bool, False, 'A class token though pool does not need it.'),
    'model.registers': Field(_int(0), 0, 'Learned tokens that nothing is read from.'),
    'model.pool': Field(
        _choice('gap', 'cls', 'map', 'seq', 'cls_gap', 'cls_dist'),
        'gap',
        'How tokens become one vector.',
    ),
    'model.norm': Field(_choice('layernorm', 'rmsnorm'), 'layernorm', 'Kind of norm.'),
    'model.norm_eps': Field(_number(0, 1), 1e-6, 'Added to the variance that a norm divides by.'),
    'model.pre_norm': Field(_bool, False, 'A norm before the first block (CLIP).'),
    'model.norm_after_pool': Field(_bool, False, 'The last norm after pooling, not before.'),
    'model.activation': Field(
        _choice('gelu_tanh', 'gelu', 'quick_gelu', 'relu', 'silu'),
        'gelu_tanh',
        'Of the MLP; gelu is with the error function.',
    ),
    'model.mlp': Field(_choice('mlp', 'swiglu'), 'mlp', 'Two dense layers, or three with a gate.'),
    'model.qkv_bias': Field(_bool, True, 'Whether queries, keys and values have a bias.'),
    'model.key_bias': Field(_bool, True, 'Whether keys have one, where the others do.'),
    'model.qk_norm': Field(_bool, False, 'Normalise queries and keys of each head.'),
    'model.lsa': Field(_bool, False, 'Attend to all but oneself, at a learned temperature.'),
    'model.lora': Field(
        _int(0), 0, "Rank of trained corrections of attention's kernels; 0 has none."
    ),
    'model.attention': Field(
        _choice('fused', 'xla', 'cudnn'), 'fused', 'Which implementation computes attention.'
    ),
    'model.parallel': Field(_bool, False, 'Attention and MLP side by side (ViT-22B).'),
    'model.layer_scale': Field(
        _number(0, 1), 0.0, 'What learned factors on the branches begin with; 0 has none.'
    ),
    'model.drop_path': Field(
        _below_one, 0.0, 'Rate at which the last block is left out; earlier ones less.'
    ),
    'model.patch_dropout': Field(_below_one, 0.0, 'Share of tokens left out in training.'),
    'model.representation': Field(
        _int(0), 0, 'Width of a dense layer with tanh before the head; 0 has none.'
    ),
    'model.head_bias': Field(_bool, True, 'Whether the head has a bias.'),
    'model.fusion': Field(
        _choice('concat', 'cross', 'latents', 'apart'),
        'concat',
        'How several streams meet: in one sequence, by cross-attention, in latents, or only in '
        'what is made of each (apart: contrastive learning).',
    ),
    'model.queries': Field(check_text, None, "The stream that attends to the others ('cross')."),
    'model.latents': Field(_int(1), 64, "Learned vectors that attend to all ('latents')."),
    'model.shared': Field(
        _int(1), 512, "Numbers of the vectors that two streams are compared by ('apart')."
    ),
    'streams.*.tokenizer': Field(
        _choice('patches', 'conv', 'resnet', 'cct', 'spt', 'tubelets', 'words'),
        'patches',
        'As model.tokenizer, of one of several inputs.',
    ),
    'streams.*.part': Field(
        check_text, None, 'Part of a batch that it reads; by default what the tokenizer takes.'
    ),
    'streams.*.patch': Field(_size, None, "Pixels of its patches; by default the variant's."),
    'streams.*.stride': Field(_size, None, 'Pixels from one patch to the next, if they overlap.'),
    'streams.*.tubelet': Field(_int(1), 2, 'Frames of a tubelet.'),
    'streams.*.vocab': Field(_int(1), 259, 'Words; 259 is what byte_tokens gives.'),
    'streams.*.posemb': Field(
        _choice('sincos2d', 'sincos2d_mae', 'learned', 'rope', 'none'),
        'sincos2d',
        'Position embeddings.',
    ),
    'streams.*.depth': Field(_int(0), 0, 'Blocks of its own before it meets the others.'),
    'model.dropout': Field(_number(0, 1), 0.0, 'Dropout rate of the residual branches.'),
    'model.dtype': Field(_choice('bfloat16', 'float32'), 'bfloat16', 'Type to compute in.'),
    'model.scan': Field(_bool, True, 'Compile one block and scan it, or unroll all.'),
    'model.remat': Field(
        _choice('none', 'names', 'full', 'offload'), 'none', 'What the backward pass recomputes.'
    ),
    **{f'data.{name}': field for name, field in _SOURCE.items()},
    'data.shuffle': Field(_bool, True, 'Reshuffle each epoch, or keep the order of the source.'),
    'data.repeats': Field(_int(1), 1, 'Views of each example in a batch (repeated augmentation).'),
    'data.workers': Field(
        _int(0), 0, 'Processes that load and transform; 0 uses threads of this one.'
    ),
    'data.max_error_rate': Field(
        _number(0, 1), 0.01, "Share of damaged examples at which on_error='skip' ends the run."
    ),
    # What a part of a mixture or an evaluation does not say, it takes from `data`.
    **{
        f'mixture.*.{name}': field._replace(default=None)
        for name, field in _SOURCE.items()
        if name != 'transform'
    },
    'mixture.*.weight': Field(
        _number(0), 1.0, 'How often examples of this part come, relative to the others.'
    ),
    **{f'evals.*.{name}': field._replace(default=None) for name, field in _SOURCE.items()},
    **{f'evals.*.{name}': field for name, field in _EVALUATION.items()},
    **_durations('evals.*.every', 'Evaluate this often, and at the end'),
    'optim.name': Field(_choice(*OPTIMIZERS), 'adamw', 'The optimizer; see docs/optimizers.md.'),
    'optim.group_rules': Field(
        _group_rules, None, 'Optimizers by parameter, in place of `name`; the first match wins.'
    ),
    # None: each optimizer has its own default, those of `factory.LAWS`.
    'optim.b1': Field(
        _below_one,
        None,
        'Decay of the first moment; for schedule_free_adamw, share of the average where the '
        'gradient is taken. Own default: 0.9; soap 0.95.',
    ),
    'optim.b2': Field(
        _below_one,
        None,
        'Decay of the second moment (adafactor_vit: its limit; lion: of the momentum). '
        'Own default: 0.999; lion 0.99; shampoo and soap 0.95.',
    ),
    'optim.eps': Field(
        _number(0), None, 'Added to the root of the second moment. Own default: 1e-8; lamb 1e-6.'
    ),
    'optim.mu_dtype': Field(
        _choice('float32', 'bfloat16'),
        None,
        'Type the first moment or momentum is kept in. Own default: float32; adafactor_vit '
        'bfloat16.',
    ),
    'optim.momentum': Field(
        _below_one, None, 'Momentum (sgd, lars, muon). Own default: 0.9; muon 0.95.'
    ),
    'optim.nesterov': Field(
        _bool, None, 'Nesterov momentum (sgd, lars, shampoo). Own default: false.'
    ),
    'optim.block': Field(
        _int(2), None, 'Largest side of a block (shampoo, soap). Own default: 1024.'
    ),
    'optim.every': Field(
        _int(1), None, 'Steps between two roots or bases. Own default: shampoo 20; soap 10.'
    ),
    'optim.start': Field(
        _int(1), None, 'First step with roots, before it Adam (shampoo). Own default: 100.'
    ),
    'optim.groups': Field(
        _int(1),
        None,
        'Parts whose roots or bases take turns, so that no step has all of them (shampoo, '
        'soap). Own default: 1.',
    ),
    'optim.sliced': Field(
        _bool,
        None,
        'Spread the iterations of all roots over `every` steps (shampoo). Own default: false.',
    ),
    'optim.root': Field(
        _choice('newton', 'eigh'),
        None,
        'How roots are made; eigh takes any exponent (shampoo). Own default: newton.',
    ),
    'optim.ridge': Field(
        _positive,
        None,
        'Added to statistics, relative to their largest eigenvalue (shampoo). Own default: 1e-6.',
    ),
    'optim.exponent': Field(
        _negative, None, 'Power of the statistics on each side (shampoo). Own default: -0.25.'
    ),
    'optim.graft': Field(
        _choice('adam', 'sgd', 'none'),
        None,
        'Whose length the update of a block has (shampoo). Own default: adam.',
    ),
    'optim.stats_dtype': Field(
        _choice('float32', 'bfloat16'),
        None,
        'Type of the statistics; roots need float32 (shampoo, soap). Own default: float32.',
    ),
    'optim.root_dtype': Field(
        _choice('float32', 'bfloat16'),
        None,
        'Type the roots or bases are kept in (shampoo, soap). Own default: float32.',
    ),
    'optim.gather_dtype': Field(
        _choice('float32', 'bfloat16'),
        None,
        'Type in which updates travel between devices (shampoo, soap). Own default: float32.',
    ),
    'optim.clip': Field(_number(0), 1.0, 'Largest global norm of the gradient; 0 is off.'),
    'optim.agc': Field(
        _number(0),
        0.0,
        "Largest norm of a unit's gradient as a share of its weights', before `clip`; 0 is off.",
    ),
    'optim.sam_rho': Field(
        _number(0), 0.0, 'Take the gradient so far uphill (SAM): two a step; 0 is off.'
    ),
    'optim.sam_adaptive': Field(
        _bool, False, 'Measure the distance of SAM relative to each weight (ASAM).'
    ),
    'optim.weight_decay': Field(
        _number(0), 0.0, 'Decoupled decay, multiplied by the rate; L2 for adam and lars.'
    ),
    'optim.weight_decay_rules': Field(
        _rules, (('.*/kernel', 1.0), ('.*', 0.0)), 'Factors on the decay; the first match wins.'
    ),
    'optim.lr_rules': Field(
        _rules, (('.*', 1.0),), 'Factors on the rate; the first match wins, 0 freezes.'
    ),
    'optim.layer_decay': Field(
        _number(0, 1), 1.0, 'Factor on the rate for each layer further from the head; 1 is off.'
    ),
    'schedule.name': Field(
        _choice('cosine', 'linear', 'constant', 'rsqrt'),
        'cosine',
        'How the rate moves after the warmup.',
    ),
    **_durations('schedule.warmup', 'Linear warmup from 0'),
    'schedule.end': Field(
        _number(0, 1), 0.0, 'The last rate, as a share of the peak (cosine, linear).'
    ),
    **_durations('schedule.cooldown', 'Linear fall to 0 at the end (constant, rsqrt)'),
    **_durations(
        'schedule.timescale',
        'The rate is peak x sqrt(timescale / (timescale + t)) at t after the warmup, by default '
        'with 10,000 steps (rsqrt)',
    ),
    'mesh.replica': Field(_int(-1), 1, 'Devices that hold copies; -1 takes the rest.'),
    'mesh.fsdp': Field(_int(-1), -1, 'Devices that parameters are sharded over.'),
    'mesh.tensor': Field(_int(-1), 1, 'Devices that heads and MLPs are split over.'),
    'mesh.sequence': Field(
        _bool, False, 'Split tokens over tensor between blocks: less memory, more time.'
    ),
    'mesh.min_shard_size': Field(
        _int(0), 2**20, 'Arrays of fewer scalars stay replicated on every device.'
    ),
    'mesh.max_replicated': Field(
        _number(0, 1), 0.1, 'Largest share of the state in arrays that fsdp fails to divide.'
    ),
    **_durations('checkpoint.every', 'Save this often, and at the end'),
    'checkpoint.keep_last': Field(_int(1), 2, 'How many of the newest checkpoints stay.'),
    **_durations('checkpoint.keep_every', 'Never delete the checkpoints at multiples of this'),
    'profile': Field(
        _int(0), 0, 'Trace so many steps into WORKDIR/trace, from the tenth of this start on.'
    ),
    **_durations('log.every', 'Write training metrics this often'),
    'log.tensorboard': Field(_bool, False, 'Also write TensorBoard event files.'),
    'log.wandb': Field(check_text, None, 'Also log to this Weights & Biases project.'),
    'transfer.train': Field(
        _choice('all', 'head', 'attention', 'norm', 'bias', 'lora'),
        'all',
        'What is trained beside the head; the rest is frozen. docs/transfer.md has them.',
    ),
    'transfer.control': Field(_bool, True, 'Also train the same recipe from random parameters.'),
    'transfer.random_features': Field(
        _bool, True, 'Also train a head alone on random, frozen features.'
    ),
    'transfer.validation': Field(check_text, 'val', 'Evaluation by which a sweep chooses.'),
    'transfer.test': Field(check_text, 'test', 'Evaluation that a sweep scores once, at its end.'),
    'transfer.published': Field(
        check_text, None, 'What others report for this recipe, printed beside the result.'
    ),
}
REQUIRED = {  # One of each group must be set; the message names the first.
    'total_epochs': ('total_steps', 'total_epochs', 'total_examples'),
    'batch_size': ('batch_size',),
    'image_size': ('image_size',),
    'lr': ('lr',),
    'model.variant': ('model.variant',),
    'data.name': ('data.name',),
}
