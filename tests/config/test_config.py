"""Configs: what a file, its arguments and the overrides say is either understood or refused."""

import argparse
import fractions
import json
import math
import random
import re
import string
from pathlib import Path

import pytest

from big_vit import command_line, config
from big_vit.config import schema
from big_vit.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / 'configs').glob('*.py'))
KEYS = [key.replace('*', 'test') for key in schema.SCHEMA]
# A transfer takes its model from a checkpoint, so its file need not name one.
BASE = {'model.variant': 'mu/1'}
REQUIRED = {
    'total_steps': 100,
    'batch_size': 32,
    'image_size': 16,
    'lr': 1e-3,
    'model.variant': 'mu/8',
    'data.name': 'digits',
}
SOURCE = """
from ml_collections import ConfigDict


def get_config(size: int = 16, fast: bool = False, rate: float = 0.5, name: str = 'digits'):
    return ConfigDict(
        {
            'total_epochs': 2 if fast else 20,
            'batch_size': 32,
            'image_size': size,
            'lr': rate,
            'model': {'variant': 'mu/8', 'depth': 3},
            'data': {'name': name},
            'schedule': {'warmup_percent': 10},
            'evals': {'test': {'split': 'test', 'every_epochs': 1}},
        }
    )
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / 'tiny.py'
    path.write_text(SOURCE)
    return path


def resolved(**changes):
    return config.resolve(REQUIRED | {k.replace('__', '.'): v for k, v in changes.items()})


def refused(call, *parts):
    with pytest.raises(UserError) as caught:
        call()
    for part in parts:
        assert part in str(caught.value), f'{part!r} is not in {caught.value}'


def parsed(*argv):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument('--config')
    parser.add_argument('--workdir')
    parser.add_argument('--force', action='store_true')
    return command_line.parse(parser, list(argv))


# Files and their arguments.


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_every_config_file_loads_with_its_default_arguments(path):
    loaded = config.load(str(path), base=BASE)
    assert loaded.batch_size >= 1 and loaded.lr > 0 and loaded.data.name


def test_a_file_gives_its_values_and_the_schema_the_rest(file):
    loaded = config.load(str(file))
    assert (loaded.total_epochs, loaded.image_size, loaded.lr) == (20, (16, 16), 0.5)
    assert (loaded.model.depth, loaded.evals.test.every_epochs) == (3, 1)
    assert loaded.optim.b2 is None and loaded.total_steps is None
    assert loaded.sets('model.depth') and not loaded.sets('optim.b2')


@pytest.mark.parametrize(
    'arguments, expected',
    [
        ('size=32,fast', {'image_size': (32, 32), 'total_epochs': 2.0}),
        ('32', {'image_size': (32, 32), 'total_epochs': 20.0}),
        ('fast,rate=1e-3', {'total_epochs': 2.0, 'lr': 1e-3}),
        ('fast=False', {'total_epochs': 20.0}),
        ('fast=TRUE', {'total_epochs': 2.0}),
        ('name=fdsl', {'image_size': (16, 16)}),
        ('', {'image_size': (16, 16)}),
    ],
)
def test_arguments_behind_the_colon(file, arguments, expected):
    loaded = config.load(f'{file}:{arguments}')
    assert {key: loaded[key] for key in expected} == expected


@pytest.mark.parametrize(
    'arguments, parts',
    [
        ('siz=32', ("'siz'", 'did you mean size?')),
        ('fats', ()),
        ('colour=red', ("'colour'", 'it takes: size, fast, rate, name')),
        ('size=32,colour', ("'colour'",)),
        ('size=big', ('size must be int', "'big'")),
        ('size=1.5', ('size must be int', "'1.5'")),
        ('rate=fast', ('rate must be float',)),
        ('fast=1', ('fast must be true or false',)),
        ('name=digit', ('data.name', "did you mean 'digits'?")),
    ],
)
def test_wrong_arguments_are_refused(file, arguments, parts):
    refused(lambda: config.load(f'{file}:{arguments}'), *parts)


def test_an_argument_that_get_config_requires_is_asked_for(tmp_path):
    path = tmp_path / 'needy.py'
    path.write_text('def get_config(size: int):\n    return {}\n')
    refused(lambda: config.load(str(path)), 'needy.py', 'size')


def test_a_missing_file_names_the_nearest(file):
    refused(
        lambda: config.load(str(file.with_name('tyni.py'))), 'tyni.py', 'did you mean', str(file)
    )


@pytest.mark.parametrize(
    'text, parts',
    [
        ('x = 1\n', ('defines no get_config',)),
        ('get_config = 3\n', ('defines no get_config',)),
        ('def get_config(:\n', ('line 1',)),
        ('x = 1\nimport no_such_module\n', ('line 2: ModuleNotFoundError',)),
        ('import sys\nsys.exit(0)\n', ('line 2: SystemExit',)),
        ('def get_config():\n    return 1 / 0\n', ('line 2: get_config() fails: ZeroDivision',)),
        ('def get_config():\n    d = {}\n    d["model"] = d\n    return d\n', ('Recursion',)),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, text, parts):
    (tmp_path / 'wrong.txt').write_text(text)
    refused(lambda: config.load(str(tmp_path / 'wrong.txt')), 'ends in .py')
    path = tmp_path / 'wrong.py'
    path.write_text(text)
    refused(lambda: config.load(str(path)), 'wrong.py', *parts)


def test_loading_leaves_no_bytecode_behind(file):
    config.load(str(file))
    assert [path.name for path in file.parent.iterdir()] == ['tiny.py']


def test_an_evaluation_that_takes_everything_from_data_is_not_lost(tmp_path):
    path = tmp_path / 'plain.py'
    path.write_text(SOURCE.replace("{'split': 'test', 'every_epochs': 1}", '{}'))
    assert list(config.load(str(path)).evals) == ['test']


# The command line and its overrides.


def test_overrides_with_an_equals_sign_or_a_space():
    args, overrides = parsed(
        '--config', 'x.py:a=1', '--config.lr=1e-3', '--force', '--config.model.depth', '2',
        '--config.optim.weight_decay_rules', "(('.*', 1.0),)", '--config.data.split=train[:90%]',
    )  # fmt: skip
    assert (args.config, args.force, args.workdir) == ('x.py:a=1', True, None)
    assert overrides == [
        ('lr', '1e-3'),
        ('model.depth', '2'),
        ('optim.weight_decay_rules', "(('.*', 1.0),)"),
        ('data.split', 'train[:90%]'),
    ]


def test_a_value_may_hold_an_equals_sign_and_a_minus():
    _, overrides = parsed('--config.data.path=/a=b', '--config.mesh.fsdp', '-1')
    assert overrides == [('data.path', '/a=b'), ('mesh.fsdp', '-1')]


@pytest.mark.parametrize('argv', [('--config.lr',), ('--config.lr', '--force')])
def test_an_override_without_a_value_is_refused(argv):
    refused(lambda: parsed(*argv), '--config.lr=VALUE')


@pytest.mark.parametrize(
    'word, near', [('--wordir', '--workdir'), ('--forse', '--force'), ('--conf=x.py', '--config')]
)
def test_an_unknown_flag_names_the_nearest(word, near):
    refused(lambda: parsed(word), f'unknown argument {word}', f'did you mean {near}?')


def test_an_unknown_word_points_to_help():
    refused(lambda: parsed('zzzz'), 'unknown argument zzzz', '--help')


def test_overrides_change_the_file_and_are_typed(file):
    loaded = config.load(
        str(file),
        [
            ('lr', '3'),
            ('model.depth', '2'),
            ('model.scan', 'False'),
            ('image_size', '(16, 32)'),
            ('optim.weight_decay_rules', "(('.*/kernel', 1), ('.*', 0))"),
            ('data.split', 'train[:50%]'),
            ('data.path', '7'),
            ('evals.other.split', 'train'),
        ],
    )
    assert loaded.lr == 3.0 and isinstance(loaded.lr, float)
    assert loaded.model.depth == 2 and loaded.model.scan is False
    assert loaded.image_size == (16, 32) and loaded.data.path == '7'
    assert loaded.optim.weight_decay_rules == (('.*/kernel', 1.0), ('.*', 0.0))
    assert list(loaded.evals) == ['test', 'other']


def test_none_takes_a_value_back(file):
    assert config.load(str(file), [('model.depth', 'none')]).model.depth is None
    assert not config.load(str(file), [('model.depth', 'none')]).sets('model.depth')


@pytest.mark.parametrize('unit, value', [('steps', 7), ('examples', 500), ('epochs', 3)])
def test_a_duration_overridden_in_another_unit_replaces_the_files(file, unit, value):
    loaded = config.load(str(file), [(f'total_{unit}', str(value))])
    found = {u: loaded[f'total_{u}'] for u in ('steps', 'epochs', 'examples')}
    assert {u: v for u, v in found.items() if v is not None} == {unit: value}


def test_a_warmup_and_an_evaluation_too_can_change_their_unit(file):
    overrides = [('schedule.warmup_steps', '5'), ('evals.test.every_percent', '50')]
    loaded = config.load(str(file), overrides)
    assert loaded.schedule.warmup_percent is None and loaded.schedule.warmup_steps == 5
    assert loaded.evals.test.every_epochs is None and loaded.evals.test.every_percent == 50


def test_replacing_keeps_an_evaluation_that_sets_nothing(file):
    file.write_text(SOURCE.replace("{'split': 'test', 'every_epochs': 1}", '{}'))
    assert list(config.load(str(file)).replacing({'seed': 3}).evals) == ['test']


def test_default_takes_back_what_the_file_set(file):
    file.write_text(SOURCE.replace("'batch_size'", "'ema': 0.9, 'batch_size'"))
    assert config.load(str(file)).sets('ema')
    loaded = config.load(str(file), [('ema', 'default'), ('model.depth', 'default')])
    assert loaded.ema == 0.0 and not loaded.sets('ema')
    assert loaded.model.depth is None and not loaded.sets('model.depth')
    refused(lambda: config.load(str(file), [('emma', 'default')]), 'emma', 'ema')


@pytest.mark.parametrize(
    'key, text',
    [
        ('total_steps', '7'),
        ('schedule.warmup_steps', '5'),
        ('lr', '0.25'),
    ],
)
def test_override_does_to_a_config_what_load_does_to_a_file(file, key, text):
    changed = config.override(config.load(str(file)), [(key, text)])
    assert changed.to_dict() == config.load(str(file), [(key, text)]).to_dict()


def test_two_units_for_one_duration_are_refused(file):
    refused(lambda: resolved(total_epochs=2), 'total_steps', 'total_epochs', 'both set')
    file.write_text(SOURCE.replace("'batch_size'", "'total_steps': 5, 'batch_size'"))
    refused(lambda: config.load(str(file)), 'total_steps', 'total_epochs', 'both set')


HOSTILE = [
    "__import__('os').system('touch {path}')",
    "open('{path}', 'w')",
    '[c for c in ().__class__.__base__.__subclasses__()]',
    'lambda: 0',
    '(1).__class__',
    '9**9**9',
]


@pytest.mark.parametrize('text', HOSTILE)
@pytest.mark.parametrize('key', ['lr', 'image_size', 'model.depth', 'optim.lr_rules', 'model.scan'])
def test_override_text_is_never_executed(file, tmp_path, key, text):
    target = tmp_path / 'touched'
    refused(lambda: config.load(str(file), [(key, text.format(path=target))]), key)
    assert not target.exists()


@pytest.mark.parametrize(
    'text',
    [
        '{[]: 1}',
        '(' * 500 + ')' * 500,
        '\0',
        '1' * 5000,
        '',
    ],
    ids=lambda text: repr(text)[:12],
)
def test_text_that_python_cannot_parse_is_refused_like_any_other(file, text):
    refused(lambda: config.load(str(file), [('lr', text)]), 'lr must be a number')


# Keys.


@pytest.mark.parametrize(
    'key, near',
    [
        ('model.lr', 'lr'),
        ('optim.lr', 'lr'),
        ('optim.weight_decy', 'optim.weight_decay'),
        ('weight_decay', 'optim.weight_decay'),
        ('variant', 'model.variant'),
        ('model.varient', 'model.variant'),
        ('batchsize', 'batch_size'),
        ('batch-size', 'batch_size'),
        ('total_epoch', 'total_epochs'),
        ('schedule.warmup_epoch', 'schedule.warmup_epochs'),
        ('evals.val.splt', 'evals.val.split'),
        ('model.schedule.warmup_steps', 'schedule.warmup_steps'),
        ('learning_rate', 'lr'),
        ('optim.learning_rate', 'lr'),
        ('batch', 'batch_size'),
        ('epochs', 'total_epochs'),
        ('model', 'model.variant'),
        ('optimizer', 'optim.name'),
        ('Optim.Name', 'optim.name'),
        ('wd', 'optim.weight_decay'),
        ('num_workers', 'data.workers'),
        ('data.num_workers', 'data.workers'),
    ],
)
def test_an_unknown_key_names_the_nearest(file, key, near):
    parts = f'unknown key {key};', f'did you mean {near}?'
    refused(lambda: config.load(str(file), [(key, '1')]), *parts)


def test_a_key_like_no_other_is_refused_without_a_guess(file):
    refused(lambda: config.load(str(file), [('qqqqqqqq', '1')]), 'unknown key qqqqqqqq')


def typo(key, rng):
    """One letter of the key left out, doubled, replaced or swapped; not of a section's name."""
    spots = [i for i, c in enumerate(key) if c.isalpha()]
    for section in ('evals.', 'mixture.'):
        if key.startswith(section):
            spots = [i for i in spots if not len(section) <= i < len(section + 'test.')]
    i = rng.choice(spots)
    letter = rng.choice([c for c in string.ascii_lowercase if c != key[i]])
    changed = rng.choice(['', key[i] * 2, letter, letter + key[i]])
    return key[:i] + changed + key[i + 1 :]


def test_every_one_letter_typo_of_every_key_is_refused_by_name():
    rng, guessed, total = random.Random(0), 0, 0
    for key in KEYS:
        for _ in range(8):
            wrong = typo(key, rng)
            starred = wrong.startswith(('evals.', 'mixture.', 'streams.'))
            # The name in the middle is the user's own.
            last = wrong.rpartition('.')[2] == key.rpartition('.')[2]
            if wrong in KEYS or (starred and (wrong.count('.') != 2 or last)):
                continue
            with pytest.raises(UserError) as caught:
                config.resolve(REQUIRED | {wrong: 1})
            assert f'unknown key {wrong}' in str(caught.value)
            guess = str(caught.value).partition('did you mean ')[2]
            guessed += guess.replace('*', 'test') == f'{key}?'
            total += 1
    assert total > 6 * len(KEYS)
    assert guessed / total > 0.95


# Values.

# What each key refuses; every key of the schema is in one of these groups.
WRONG = {
    'int': ['x', 1.5, True, (1,), float('nan'), float('inf'), -2, 1e30, 2**63],
    'power': ['x', 1.5, True, (1,), 0, -2, 3, 2**17],
    'number': ['x', True, (1,), float('nan'), -1],
    'share': ['x', True, 1.5, -0.1, float('nan')],
    'bool': ['yes', 1, 0, 1.0],
    'str': [1, True, 1.5, (1,)],
    'choice': ['x', 1, True, ('a',), []],
    'size': ['x', 'ab', 0, -1, 16385, 1.5, 28.0, True, (1, 2, 3), (1,), (8, 0), (8, 16385), ()],
    'below one': ['x', True, 1, 1.5, -0.1, float('nan')],
    'positive': ['x', True, 0, 1.5, -0.1, float('nan')],
    'negative': ['x', True, 0, 0.25, -1.5, float('nan')],
    'ints': ['x', 0, -1, 1.5, True, (), (1, 0), (1, 'x'), float('nan')],
    'numbers': ['x', -1, True, (), (1.0, -1.0), ('x',), float('nan')],
    'choices': ['x', 1, True, (), ('x',)],
    'blocks': ['x', 1.5, True, (), (1.5,), ('x',)],
    'texts': [1, 1.5, True, (), ('a', 1), ('a', 'a')],
    'subset': [1.5, True, (), (1.5,), (True,), (None,)],
    'severities': ['x', 0, 6, 1.5, True, (), (1, 6)],
    'groups': ['x', 5, (('.*', 'adam', 1),), (('.*',),), (('.*', 1.0),), (('.*', 'adm'),)],
    'classes': [1.5, True, (), (1.5,), (True,), (None,)],
    'pair': ['x', 0.1, True, (), (0.1,), (0.2, 0.1), (0.1, 'x'), (-0.1, 0.2), (0.1, 0.2, 0.3)],
    'rules': [
        'x',
        5,
        ('.*', 1.0),
        (('.*',),),
        ((1, 1.0),),
        (('.*', 'x'),),
        (('.*', True),),
        (('.*', -1.0),),
        (('.*', float('inf')),),
    ],
}
GROUPS = {
    'seed': 'int', 'batch_size': 'int', 'accumulation': 'int', 'image_size': 'size',
    'lr': 'number', 'init': 'str', 'ema': 'below one', 'task.label_smoothing': 'below one',
    'mixup': 'number', 'cutmix': 'number', 'mix_switch': 'share', 'mix_prob': 'share',
    'task.name': 'choice', 'task.loss': 'choice', 'data.repeats': 'int', 'data.workers': 'int',
    'data.max_error_rate': 'share', 'image_column': 'str', 'label_column': 'str',
    'label_map': 'str', 'classes': 'classes', 'cache': 'choice', 'cache_side': 'int',
    'on_error': 'choice', 'weight': 'number',
    'model.variant': 'str', 'model.width': 'int', 'model.depth': 'int', 'model.mlp_dim': 'int',
    'model.num_heads': 'int', 'model.pool': 'choice', 'model.posemb': 'choice',
    'model.dropout': 'below one', 'model.dtype': 'choice', 'model.scan': 'bool',
    'model.remat': 'choice', 'data.shuffle': 'bool', 'optim.name': 'choice',
    'annotations': 'str', 'corners': 'choice', 'zero_label': 'choice',
    'boxes_column': 'str', 'box_format': 'choice',
    'data.window': 'power', 'index': 'str', 'model.pack': 'bool',
    'optim.b1': 'below one', 'optim.b2': 'below one', 'optim.eps': 'positive',
    'optim.mu_dtype': 'choice', 'optim.momentum': 'below one', 'optim.nesterov': 'bool',
    'optim.clip': 'number', 'optim.agc': 'number', 'optim.sam_rho': 'number',
    'optim.sam_adaptive': 'bool', 'optim.group_rules': 'groups', 'optim.layer_decay': 'share',
    'optim.weight_decay': 'number', 'optim.weight_decay_rules': 'rules', 'optim.lr_rules': 'rules',
    'switch': 'str', 'optim.block': 'int', 'optim.every': 'int', 'optim.start': 'int',
    'optim.groups': 'int', 'optim.sliced': 'bool', 'optim.root': 'choice',
    'optim.ridge': 'positive', 'optim.exponent': 'negative', 'optim.graft': 'choice',
    'optim.stats_dtype': 'choice', 'optim.root_dtype': 'choice', 'optim.gather_dtype': 'choice',
    'schedule.name': 'choice', 'schedule.end': 'share', 'mesh.replica': 'int', 'mesh.fsdp': 'int',
    'mesh.tensor': 'int', 'mesh.min_shard_size': 'int', 'checkpoint.keep_last': 'int',
    'checkpoint.best': 'str', 'early_stopping.patience': 'int',
    'log.tensorboard': 'bool', 'log.wandb': 'str', 'transfer.control': 'bool',
    'name': 'choice', 'split': 'str', 'path': 'str', 'tfds_name': 'str', 'num_classes': 'int',
    'transform': 'str', 'init_channels': 'choice', 'init_video': 'choice',
    'init_resize': 'choice', 'model.head_dim': 'int', 'tokenizer': 'choice', 'stride': 'size',
    'tubelet': 'int', 'vocab': 'int', 'posemb': 'choice', 'model.embedding_bias': 'bool',
    'model.posemb_prefix': 'int', 'model.posemb_grid': 'size', 'model.rope_theta': 'number',
    'model.rope_shift': 'number', 'model.rope_jitter': 'number', 'model.rope_rescale': 'number',
    'model.class_token': 'bool', 'model.registers': 'int', 'model.norm': 'choice',
    'model.norm_eps': 'positive', 'model.pre_norm': 'bool', 'model.norm_after_pool': 'bool',
    'model.activation': 'choice', 'model.mlp': 'choice', 'model.qkv_bias': 'bool',
    'model.key_bias': 'bool', 'model.qk_norm': 'bool', 'model.lsa': 'bool',
    'model.attention': 'choice', 'model.parallel': 'bool', 'model.layer_scale': 'share',
    'model.drop_path': 'below one', 'model.patch_dropout': 'below one',
    'model.representation': 'int', 'model.head_bias': 'bool', 'model.fusion': 'choice',
    'model.queries': 'str', 'model.latents': 'int', 'part': 'str', 'patch': 'size',
    'streams.*.depth': 'int', 'streams.some.depth': 'int', 'model.lora': 'int',
    'transfer.train': 'choice', 'transfer.random_features': 'bool', 'transfer.validation': 'str',
    'transfer.test': 'str', 'transfer.published': 'str', 'type': 'choice', 'train_split': 'str',
    'gallery_split': 'str', 'blocks': 'blocks', 'pool': 'choice', 'calibration': 'bool',
    'per_class': 'choice', 'subset': 'subset', 'skip_unlabelled': 'bool', 'shots': 'ints',
    'seeds': 'int', 'whiten': 'bool', 'bias': 'number', 'l2': 'numbers', 'k': 'ints',
    'metric': 'choice', 'vote': 'choice', 'temperature': 'number', 'held_out': 'below one',
    'iterations': 'int', 'rates': 'numbers', 'last_blocks': 'ints', 'probe_updates': 'int',
    'probe_batch': 'int', 'ranks': 'ints', 'corruptions': 'choices', 'severities': 'severities',
    'scales': 'numbers', 'flips': 'bool',
    'profile': 'int', 'init_tower': 'str', 'init_architecture': 'str', 'text_column': 'str',
    'prompts': 'texts',
    'task.head': 'choice', 'task.query_blocks': 'int', 'task.points': 'int',
    'task.last_blocks': 'int', 'task.dropout': 'below one',
    'task.embedding_dim': 'int', 'task.mask_ratio': 'below one', 'task.decoder_width': 'int',
    'task.decoder_depth': 'int', 'task.decoder_heads': 'int', 'task.normalise_pixels': 'bool',
    'task.queries': 'int', 'task.query_place': 'choice', 'task.class_layers': 'int',
    'task.l1_weight': 'number', 'task.giou_weight': 'number',
    'task.no_object_weight': 'positive',
    'model.posemb_per_block': 'bool', 'model.post_norm': 'bool',
    'task.method': 'choice', 'task.target_blocks': 'int', 'task.target_scale': 'pair',
    'task.target_aspect': 'pair', 'task.context_scale': 'pair', 'task.context_tokens': 'int',
    'task.whole_grid': 'bool', 'task.predictor_width': 'int', 'task.predictor_depth': 'int',
    'task.predictor_heads': 'int', 'task.momentum': 'pair', 'task.projector_width': 'int',
    'task.projection_dim': 'int', 'task.sigreg_weight': 'share',
    'task.sigreg_directions': 'int', 'task.prototypes': 'int', 'task.bottleneck': 'int',
    'task.head_width': 'int', 'task.patch_head': 'choice', 'task.prototype_norm': 'choice',
    'task.centering': 'choice', 'task.teacher_temperature': 'pair',
    'task.temperature_warmup': 'share', 'task.student_temperature': 'positive',
    'task.dino_weight': 'number', 'task.ibot_weight': 'number', 'task.koleo_weight': 'number',
    'task.koleo_group': 'int', 'task.gram_weight': 'number', 'task.gram_start': 'below one',
    'task.gram_every': 'below one', 'task.mask_ratios': 'pair', 'task.mask_probability': 'share',
    'task.mask_group': 'int', 'task.position_offset': 'share', 'task.teacher': 'str',
    'task.mask_law': 'choice', 'task.patch_centre': 'choice',
    'init_standardise': 'bool', 'model.weight_init': 'choice', 'examples': 'int',
    'window': 'pair', 'views': 'str', 'lidar': 'pair', 'optim.rate_in_momentum': 'bool',
    'optim.clip_by': 'choice', 'optim.weight_decay_end': 'number', 'optim.freeze_by': 'choice',
    'schedule.start': 'share',
}  # fmt: skip


def group_of(key):
    if key.rpartition('_')[2] in schema.UNITS:
        return 'number'
    return GROUPS.get(key) or GROUPS.get(key.rpartition('.')[2])


def wrong_values():
    for key in KEYS:
        group = group_of(key)
        if group is None:
            yield pytest.param(key, None, id=f'{key}: no group for this new key')
            continue
        for value in WRONG[group]:
            yield pytest.param(key, value, id=f'{key}={value}')


@pytest.mark.parametrize('key, value', list(wrong_values()))
def test_a_value_of_the_wrong_kind_is_refused_and_says_what_is_wanted(key, value):
    with pytest.raises(UserError) as caught:
        config.resolve(REQUIRED | {key: value})
    message = str(caught.value)
    assert f'config: {key} must be ' in message
    assert 'object' not in message.replace(key, ''), 'that is the text of a Python error'


@pytest.mark.parametrize('value', [float('inf'), 10**400], ids=['inf', '10**400'])
@pytest.mark.parametrize('key', ['lr', 'total_epochs', 'log.every_steps', 'optim.clip'])
def test_numbers_are_finite(key, value):
    values = {k: v for k, v in REQUIRED.items() if not k.startswith('total') or k == key}
    refused(lambda: config.resolve({'total_epochs': 1} | values | {key: value}), key, 'must be')


NONSENSE = [-1, 0, 1e30, -1e30, 1e300, float('nan'), float('inf'), -float('inf'), 2**63, 10**5000,
            '', 'x', '\0', 'x' * 10_000, [], (), {}, set(), b'x', 1j, None, True, [[]], (None,),
            [{}], ((),), (('.*', -1.0),), (('.*', 1e300),)]  # fmt: skip


@pytest.mark.parametrize('key', KEYS)
def test_any_value_is_accepted_or_refused_by_one_line(key):
    """What is accepted is dumped and read again as it was."""
    for value in NONSENSE:
        given = {
            k: v
            for k, v in REQUIRED.items()
            if key.rpartition('_')[0] != 'total' or k[:6] != 'total_'
        }
        try:
            made = config.resolve(given | {key: value})
        except UserError as error:
            text = str(error)
            assert (text.startswith('config: ') and key in text) or 'must be set' in text, text
            assert '\n' not in text and len(text) < 1200, text
            continue
        dump = json.dumps(made.to_dict(), allow_nan=False)
        assert config.from_json(json.loads(dump)).to_dict() == made.to_dict()


# Every number has bounds, and docs/config.md says which.
BOUNDS = re.compile(
    r'(?:whole )?number (?:from|(?P<above>above)) (?P<low>\S+) '
    r'to (?P<below>below )?(?P<high>[^ ,]+( - 1)?)'
)


def bounded():
    for key, field in schema.SCHEMA.items():
        says = BOUNDS.fullmatch(field.check.__doc__ or '')
        if says:
            high = says['high'].replace(' ', '')
            base, _, power = high.removesuffix('-1').partition('**')
            high = int(base) ** int(power) - 1 if power else float(high)
            yield key.replace('*', 'test'), float(says['low']), high, says


@pytest.mark.parametrize('key, low, high, says', [pytest.param(*b, id=b[0]) for b in bounded()])
def test_bounds_are_as_documented(key, low, high, says):
    whole = says[0].startswith('whole')
    inside = [low if not says['above'] else (low + high) / 2]
    inside += [high if not says['below'] else (low + high) / 2]
    outside = [low if says['above'] else low - 1, high if says['below'] else high + 1]
    optional = {k: v for k, v in REQUIRED.items() if k != key}
    for value in inside:
        config.resolve(optional | {key: int(value) if whole else value})
    for value in outside:
        refused(
            lambda v=value: config.resolve(optional | {key: v}), f'config: {key} must be', says[0]
        )


def test_no_whole_number_is_without_bounds():
    found = {b[0] for b in bounded()}
    wholes = {key for key in KEYS if group_of(key) == 'int'}
    assert wholes <= found, wholes - found


@pytest.mark.parametrize(
    'key, value',
    [
        ('ema', 1), ('task.label_smoothing', 1), ('model.dropout', 1), ('model.drop_path', 1),
        ('model.patch_dropout', 1), ('task.mask_ratio', 1), ('optim.b1', 1), ('optim.b2', 1.5),
        ('optim.momentum', 1), ('optim.eps', 0), ('optim.eps', -1e-8), ('model.norm_eps', 0),
        ('optim.lr_rules', (('.*', -1.0),)), ('optim.weight_decay_rules', (('.*', -0.1),)),
        ('mixup', -0.1), ('cutmix', 1e9), ('data.workers', 100_000), ('model.registers', 10**6),
        ('model.lora', 1e30), ('batch_size', 1e30), ('seed', 2**63), ('seed', 2**32),
        ('optim.layer_decay', 1.1), ('optim.weight_decay', -1), ('model.width', 10**9),
    ],
)  # fmt: skip
def test_nonsense_is_refused(key, value):
    refused(lambda: resolved(**{key.replace('.', '__'): value}), f'config: {key} must be ')


@pytest.mark.parametrize('key', ['init', 'switch', 'data.path', 'log.wandb', 'data.label_map'])
def test_an_empty_variable_of_a_shell_is_no_value(file, key):
    refused(lambda: config.load(str(file), [(key, '')]), f'config: {key} is empty')


@pytest.mark.parametrize(
    'body',
    ['return None', 'return []', 'return 3', "return 'x'", "return {'lr': {}}", "return {1: 2}",
     "return {'model': 3}", "return {'evals': 3}", "return {'evals': {'test': 3}}",
     "return {'evals': {'': {'split': 'test'}}}", "return {'lr': 10**5000}"],
)  # fmt: skip
def test_a_file_that_gives_no_config_is_refused(tmp_path, body):
    path = tmp_path / 'odd.py'
    path.write_text(f'def get_config():\n    {body}\n')
    refused(
        lambda: config.load(str(path), [(k, str(v)) for k, v in REQUIRED.items() if k != 'lr']),
        'config: ',
    )


@pytest.mark.parametrize('content', [b'\xff\xfe', b'x = 1\0', b''])
def test_a_file_of_bytes_is_refused(tmp_path, content):
    path = tmp_path / 'odd.py'
    path.write_bytes(content)
    refused(lambda: config.load(str(path)), '--config: ', 'odd.py')


@pytest.mark.parametrize(
    'dump',
    [[], None, 'x', 3, {'lr': []}, {'model': []}, {'evals': 3}, {'evals': {'a': None}},
     {'evals': []}, {'': {'': 1}}, {'model': {'depth': {'x': 1}}}, {'lr': {}}],
)  # fmt: skip
def test_a_dump_of_another_kind_is_refused(dump):
    refused(lambda: config.from_json(dump), 'config: ')
    if not isinstance(dump, dict):
        refused(lambda: config.difference(dump, {}), 'config: a dump must be an object')


@pytest.mark.parametrize('value, pair', [(1, (1, 1)), (16384, (16384, 16384)), ((8, 24), (8, 24))])
def test_sizes_are_one_number_or_two(value, pair):
    assert resolved(image_size=value).image_size == pair
    assert resolved(image_size=list(pair)).image_size == pair


def test_whole_floats_are_whole_numbers():
    assert resolved(batch_size=1e3).batch_size == 1000
    assert isinstance(resolved(batch_size=1e3).batch_size, int)


@pytest.mark.parametrize('key', REQUIRED)
def test_a_missing_required_key_is_asked_for_with_an_example(key):
    values = {k: v for k, v in REQUIRED.items() if k != key}
    example = 'total_epochs' if key == 'total_steps' else key
    refused(lambda: config.resolve(values), key, 'must be set', f'--config.{example}=')


def test_names_of_evaluations_are_plain_words():
    refused(lambda: config.resolve(REQUIRED | {'evals.a-b.split': 'test'}), 'evals.a-b')


def test_schema_defaults_pass_their_own_checks():
    for key, field in schema.SCHEMA.items():
        assert field.doc.endswith('.')
        if field.default is not None:
            assert field.check(field.default) == field.default, key


# A config as an object.


def test_a_config_is_frozen():
    whole = resolved()
    for act in (
        lambda: setattr(whole, 'lr', 1.0),
        lambda: setattr(whole.model, 'depth', 1),
        lambda: setattr(whole, 'new', 1),
    ):
        with pytest.raises(TypeError, match='frozen'):
            act()
    with pytest.raises((TypeError, AttributeError)):
        del whole.lr
    with pytest.raises(TypeError):
        whole['lr'] = 1.0
    assert whole.lr == 1e-3


def test_a_key_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r'model\.colour'):
        _ = resolved().model.colour
    assert 'colour' not in resolved().model and 'depth' in resolved().model


def test_replacing_gives_a_checked_copy():
    whole = resolved()
    copy = whole.replacing({'lr': 2, 'model.depth': 4})
    assert (copy.lr, copy.model.depth, copy.batch_size) == (2.0, 4, 32)
    assert whole.lr == 1e-3 and whole.model.depth is None
    refused(lambda: whole.replacing({'lr': 'x'}), 'lr')


def read_all(section, skip=()):
    for name in section:
        value = section.peek(name)
        if isinstance(value, dict):
            read_all(section[name], skip)
        elif name not in skip:
            _ = section[name]


def test_audit_names_each_key_that_was_set_but_never_read():
    whole = resolved(optim__momentum=0.5, optim__b1=0.8)
    read_all(whole, skip=('momentum',))
    refused(whole.audit, 'optim.momentum is set', 'never reads it')
    whole = resolved(optim__momentum=0.5, optim__b1=0.8)
    read_all(whole, skip=('momentum', 'b1'))
    refused(whole.audit, 'optim.b1, optim.momentum are set')


def test_audit_passes_when_all_that_was_set_was_read():
    whole = resolved(optim__momentum=0.5)
    read_all(whole, skip=('b2', 'clip'))
    whole.audit()
    _ = whole.optim.momentum


def test_looking_without_reading_does_not_satisfy_the_audit():
    whole = resolved(optim__momentum=0.5)
    read_all(whole, skip=('momentum',))
    whole.optim.peek('momentum'), whole.to_dict(), whole.sets('optim.momentum')
    config.digest(whole), whole.replacing({'lr': 1}).optim.momentum
    refused(whole.audit, 'optim.momentum')


def test_completed_fills_only_what_is_open_and_counts_reads():
    whole = resolved(evals__test__split='val')
    section = whole.evals.test.completed({'split': 'test', 'name': 'idx'})
    assert (section.split, section.name, section.path) == ('val', 'idx', None)
    read_all(whole, skip=('split',))
    whole.audit()


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_a_dump_makes_the_same_config_again(path):
    overrides = [('evals.more.every_steps', '3'), ('image_size', '(32, 64)')]
    loaded = config.load(str(path), overrides, base=BASE)
    dump = loaded.to_dict()
    again = config.from_json(json.loads(json.dumps(dump)))
    assert again.to_dict() == dump
    assert config.digest(again) == config.digest(loaded)
    assert config.difference(dump, again.to_dict()) == []
    flat = config.flatten(again.to_dict())
    assert flat['image_size'] == [32, 64] and again.image_size == (32, 64)


def test_a_dump_with_a_key_of_another_version_is_refused():
    dump = resolved().to_dict()
    dump['model']['colour'] = 'red'
    refused(lambda: config.from_json(dump), 'model.colour')


def test_difference_has_a_line_for_each_change():
    old, new = resolved().to_dict(), resolved(lr=0.5, evals__test__split='test').to_dict()
    lines = config.difference(old, new)
    assert 'lr: 0.001 -> 0.5' in lines
    assert "evals.test.split: None -> 'test'" in lines
    assert len(lines) == 2


def test_digest_tells_configs_apart():
    assert config.digest(resolved()) == config.digest(resolved())
    others = [resolved(lr=2e-3), resolved(seed=1), resolved(model__scan=False)]
    assert len({config.digest(c) for c in [resolved(), *others]}) == 4


# Durations.


def steps_of(unit, value, *, total=None, batch_size=32, examples=1000):
    changes = {k: v for k, v in REQUIRED.items() if k != 'total_steps'}
    where = config.resolve(changes | {'total_steps': 1, f'checkpoint.every_{unit}': value})
    return config.steps(
        where.checkpoint, 'every', batch_size=batch_size, examples=examples, total=total
    )


@pytest.mark.parametrize(
    'unit, value, wanted',
    [
        ('steps', 7, 7),
        ('steps', 0, 0),
        ('epochs', 1, 31),  # 31.25: a step that would pass the end of the epoch is not taken.
        ('epochs', 4, 125),
        ('epochs', 0.0001, 1),
        ('epochs', 0, 0),
        ('examples', 64, 2),
        ('examples', 63, 1),
        ('examples', 5, 1),
        ('percent', 10, 25),
        ('percent', 0.1, 1),
        ('percent', 100, 250),
        ('percent', 0.5, 1),
    ],
)
def test_durations_in_steps(unit, value, wanted):
    assert steps_of(unit, value, total=250) == wanted


def test_a_duration_that_is_not_set_is_none():
    assert config.steps(resolved().checkpoint, 'every', batch_size=1, examples=1) is None


def test_exact_products_lose_no_step_to_rounding():
    rng = random.Random(1)
    for _ in range(150):
        batch, steps = rng.randint(1, 8192), rng.randint(1, 1_000_000)
        assert steps_of('examples', steps * batch, batch_size=batch) == steps
        tenths = rng.randint(1, 3000)
        exact = fractions.Fraction(tenths, 10) * steps / 100
        want = max(1, math.floor(exact))
        assert steps_of('percent', tenths / 10, total=steps) == want, (tenths, steps)
        exact = fractions.Fraction(tenths, 10) * 1_281_167 / batch
        found = steps_of('epochs', tenths / 10, batch_size=batch, examples=1_281_167)
        assert found == max(1, math.floor(exact)), (tenths, batch)


@pytest.mark.parametrize('name', ['train', 'time', 'step', 'checkpoint'])
def test_evaluations_have_no_names_of_other_metrics(name):
    spec, taken = 'configs/pretrain_fdsl.py', f"evals.{name}: '{name}' is the name of"
    with pytest.raises(UserError, match=taken):
        config.load(spec, [(f'evals.{name}.split', 'test')])
    with pytest.raises(UserError, match=taken):
        config.override(config.load(spec), [(f'evals.{name}.split', 'test')])
    # What was trained before goes on loading, and takes other evaluations.
    plain = config.load(spec)
    saved = config.from_json(plain.replacing({f'evals.{name}.split': 'test'}).to_dict())
    assert name in config.override(saved, [('evals.other.split', 'test')]).evals
