"""From the keys of a config to an optimizer: which are read, what is refused."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vit import config, sharding, trees
from big_vit.build.optimizer import Length, build_optimizer, rate_schedule
from big_vit.errors import UserError
from big_vit.models import vit
from big_vit.optim import factory

BASE = {
    'total_steps': 1000,
    'batch_size': 8,
    'image_size': 8,
    'lr': 1e-3,
    'model.variant': 'mu/4',
    'data.name': 'digits',
}
OWN = ('b1', 'b2', 'eps', 'mu_dtype', 'momentum', 'nesterov')
SOURCE = SimpleNamespace(length=80)


@functools.cache
def shapes(scan=True):
    net = vit.make_vit(10, (4, 4), 16, 3, 32, 2, posemb='learned', scan=scan)
    return jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))['params']


def resolved(**keys):
    return config.resolve(BASE | {key.replace('__', '.'): value for key, value in keys.items()})


def optimizer(settings, scan=True):
    made = rate_schedule(settings, SOURCE, 1000)
    return build_optimizer(settings, shapes(scan), made, sharding.make_mesh(), Length(SOURCE, 1000))


def needs(name):
    return {'schedule__name': 'constant'} if name == 'schedule_free_adamw' else {}


@pytest.mark.parametrize('name', factory.LAWS)
def test_an_optimizer_reads_its_own_keys_and_has_its_own_defaults(name):
    plain = optimizer(resolved(optim__name=name, **needs(name)))
    assert plain.settings == {name: factory.defaults(name)}
    other = {'b1': 0.5, 'b2': 0.6, 'eps': 1e-3, 'momentum': 0.7, 'nesterov': True}
    other['mu_dtype'] = 'float32' if name == 'adafactor_vit' else 'bfloat16'
    for key in OWN:
        given = resolved(optim__name=name, **{f'optim__{key}': other[key]}, **needs(name))
        found = optimizer(given).settings[name]
        read = f'optim.{key}' in given._reads
        assert read == (key in factory.defaults(name)) == (key in found)
        assert found == {**factory.defaults(name), **({key: other[key]} if read else {})}


def test_the_defaults_are_those_of_the_papers():
    found = {name: factory.defaults(name) for name in factory.LAWS}
    assert (found['lion']['b1'], found['lion']['b2']) == (0.9, 0.99)
    assert (found['lamb']['b2'], found['lamb']['eps']) == (0.999, 1e-6)
    assert found['muon']['momentum'] == 0.95 and found['lars']['momentum'] == 0.9
    assert found['adafactor_vit'] == {'b1': 0.9, 'b2': 0.999, 'mu_dtype': 'bfloat16'}


@pytest.mark.parametrize(
    'keys, message',
    [
        ({'optim.name': 'lam'}, r"optim\.name must be .*did you mean 'lamb'"),
        ({'optim.name': 'adafactor_vitt'}, "did you mean 'adafactor_vit'"),
        ({'optim.name': 'adamW'}, r"did you mean 'adamw'"),
        ({'optim.name': 'SGD'}, "did you mean 'sgd'"),
        ({'optim.b1': 1.0}, r'optim\.b1 must be a number from 0 to below 1, got 1'),
        ({'optim.b2': 1.5}, r'optim\.b2 must be a number from 0 to below 1'),
        ({'optim.momentum': -0.1}, r'optim\.momentum must be a number from 0 to below 1'),
        ({'optim.layer_decay': 1.1}, r'optim\.layer_decay must be a number from 0 to 1'),
        ({'optim.group_rules': (('.*', 'muonn'),)}, "optim.group_rules must be .* mean 'muon'"),
        ({'optim.group_rules': (('.*kernel', 'muon'),)}, r'optim\.group_rules: no rule matches'),
        (
            {'optim.group_rules': (('nothing', 'muon'), ('.*', 'lion'))},
            r"optim\.group_rules: rule 'nothing' has no effect: it matches no parameter",
        ),
        (
            {'optim.group_rules': (('.*kernel', 'schedule_free_adamw'), ('.*', 'lion'))},
            r'optim\.group_rules: schedule_free_adamw averages all parameters',
        ),
        ({'optim.name': 'schedule_free_adamw'}, r"schedule\.name must be 'constant'.*'cosine'"),
        (
            {'optim.name': 'schedule_free_adamw', 'schedule.name': 'constant', 'ema': 0.9},
            'ema must be 0 for schedule_free_adamw: what is evaluated is its own average',
        ),
        (
            {'optim.name': 'schedule_free_adamw', 'schedule.name': 'constant', 'optim.b1': 0},
            r'optim\.b1 must be above 0 for schedule_free_adamw',
        ),
        (
            {
                'optim.name': 'schedule_free_adamw',
                'schedule.name': 'constant',
                'optim.weight_decay_end': 0.1,
            },
            r'optim\.weight_decay_end is a schedule, which schedule_free_adamw does without',
        ),
        (
            {
                'optim.name': 'schedule_free_adamw',
                'schedule.name': 'constant',
                'optim.freeze_epochs': (('.*', 1),),
            },
            r'optim\.freeze_epochs is a schedule, which schedule_free_adamw does without',
        ),
        ({'optim.clip_by': 'layer'}, r"optim\.clip_by must be one of 'global', 'module', 'tensor'"),
        (
            {'optim.weight_decay_end': -0.1},
            r'optim\.weight_decay_end must be a number of at least 0',
        ),
        (
            {'optim.freeze_steps': (('head/.*', -1), ('.*', 0))},
            r'optim\.freeze_steps must be .*duration of at least 0',
        ),
        ({'optim.freeze_steps': (('head/.*', 1),)}, r'optim\.freeze_steps: no rule matches'),
        (
            {'optim.freeze_steps': (('heads/.*', 1), ('.*', 0))},
            r"optim\.freeze_steps: rule 'heads/\.\*' has no effect: it matches no parameter",
        ),
        (
            {'optim.freeze_percent': (('head/.*', 100), ('.*', 0))},
            r'optim\.freeze_percent holds head/bias for 1000 steps, and the run has 1000: shorten',
        ),
        (
            {'optim.freeze_percent': (('.*', 1),), 'optim.freeze_steps': (('.*', 1),)},
            r'optim\.freeze_\w+ and optim\.freeze_\w+ are both set; set one',
        ),
        (
            {'schedule.name': 'cosine_dino', 'schedule.warmup_percent': 120},
            r'schedule\.warmup_\* comes to 1200 steps',
        ),
        (
            {'schedule.name': 'rsqrt', 'schedule.timescale_steps': 0},
            r'schedule\.timescale_\* must be above 0',
        ),
        (
            {'schedule.name': 'constant', 'schedule.cooldown_percent': 120},
            r'warmup_\* and cooldown_\* come to 1200 steps',
        ),
    ],
)
def test_mistakes_name_the_key_and_what_it_takes(keys, message):
    with pytest.raises(UserError, match=message) as caught:
        optimizer(config.resolve(BASE | keys))
    assert str(caught.value).startswith('config: ') and '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'keys, unread',
    [
        ({'schedule.name': 'rsqrt', 'schedule.end': 0.1}, 'schedule.end'),
        ({'schedule.name': 'constant', 'schedule.end': 0.1}, 'schedule.end'),
        ({'schedule.cooldown_steps': 10}, 'schedule.cooldown_steps'),
        ({'schedule.name': 'linear', 'schedule.timescale_epochs': 1}, 'schedule.timescale_epochs'),
        ({'schedule.name': 'constant', 'schedule.timescale_steps': 9}, 'schedule.timescale_steps'),
        ({'schedule.name': 'constant_dinov3', 'schedule.end': 0.1}, 'schedule.end'),
        ({'schedule.name': 'cosine_dino', 'schedule.cooldown_steps': 9}, 'schedule.cooldown_steps'),
        ({'optim.clip': 0, 'optim.clip_by': 'tensor'}, 'optim.clip_by'),
        ({'optim.freeze_by': 'gradient'}, 'optim.freeze_by'),
        ({'optim.name': 'lion', 'optim.eps': 1e-6}, 'optim.eps'),
        ({'optim.name': 'adafactor', 'optim.b1': 0.9}, 'optim.b1'),
        (
            {'optim.name': 'lion', 'optim.group_rules': (('.*', 'adam'),)},
            'optim.name',
        ),
    ],
)
def test_what_goes_with_another_choice_stays_unread(keys, unread):
    settings = config.resolve(BASE | keys)
    optimizer(settings)
    assert unread not in settings._reads


def test_durations_of_the_schedule_may_be_in_any_unit():
    wanted = resolved(
        schedule__name='rsqrt',
        schedule__timescale_steps=200,
        schedule__cooldown_steps=100,
        schedule__warmup_steps=50,
    )
    same = resolved(
        schedule__name='rsqrt',
        schedule__timescale_epochs=20,
        schedule__cooldown_percent=10,
        schedule__warmup_examples=400,
    )
    a, b = (rate_schedule(one, SOURCE, 1000) for one in (wanted, same))
    for step in (0, 20, 50, 250, 950, 999):
        assert float(a(step)) == float(b(step))
    assert float(a(250)) == pytest.approx(1e-3 * 0.5**0.5, rel=1e-5)
    default = rate_schedule(resolved(schedule__name='rsqrt'), SOURCE, 1000)
    assert float(default(900)) == pytest.approx(1e-3 * (10_000 / 10_900) ** 0.5, rel=1e-5)


@pytest.mark.parametrize('scan', [True, False])
def test_rates_are_the_product_of_rules_and_layers(scan):
    settings = resolved(
        optim__layer_decay=0.5,
        optim__lr_rules=(('head/.*', 3.0), ('.*bias', 0.0), ('.*', 2.0)),
        optim__group_rules=(('.*kernel', 'muon'), ('.*', 'lion')),
    )
    made = optimizer(settings, scan)
    assert made.rate['head/kernel'] == 3 and made.rate['head/bias'] == 3
    assert made.rate['embedding/kernel'] == 2 * 0.5**4 and made.rate['embedding/bias'] == 0
    block = 'Transformer/encoderblock{}/LayerNorm_0/'
    if scan:
        assert made.rate[block.format('') + 'scale'] == (0.25, 0.5, 1.0)
        assert made.rate[block.format('') + 'bias'] == (0, 0, 0)
    else:
        assert made.rate[block.format('_1') + 'scale'] == 0.5
    still = factory.frozen(made.rate)
    assert still == {n for n in made.rate if n.endswith('bias') and not n.startswith('head')}
    assert set(made.settings) == {'muon', 'lion'}
    assert all((made.group[n] == 'muon') == n.endswith('kernel') for n in made.group)
    state = trees.flatten(jax.eval_shape(made.transform.init, shapes(scan)))
    assert not any(path.endswith(n) for path in state for n in still)
    assert not np.any([re.search(r'/nu/.*LayerNorm', path) for path in state])


@pytest.mark.parametrize(
    'keys, count',
    [
        ({'freeze_steps': 30}, 30),
        ({'freeze_epochs': 2}, 20),
        ({'freeze_examples': 88}, 11),
        ({'freeze_percent': 1.5}, 15),
    ],
)
def test_parameters_are_held_for_a_duration_in_any_unit(keys, count):
    ((key, duration),) = keys.items()
    given = {f'optim__{key}': (('head/.*', duration), ('.*', 0))}
    found = optimizer(resolved(**given)).start
    assert found == {'head/kernel': count, 'head/bias': count}


def test_after_a_change_of_batch_size_examples_count():
    """A run of 100 epochs of 80 examples: 100 steps of 16, then the rest of 8."""
    keys = {
        'optim__weight_decay': 0.04,
        'optim__weight_decay_end': 0.4,
        'optim__freeze_epochs': (('head/.*', 30), ('.*', 0)),
    }
    settings = resolved(**keys, total_steps=None, total_epochs=100)
    length = Length(SOURCE, 900, ahead=100)
    made = rate_schedule(settings, SOURCE, 900, ahead=100)
    mesh = sharding.make_mesh()
    late = build_optimizer(settings, shapes(), made, mesh, length)
    whole = build_optimizer(settings, shapes(), made, mesh, Length(SOURCE, 1000))
    assert late.start == {'head/kernel': 200, 'head/bias': 200}
    assert whole.start == {'head/kernel': 300, 'head/bias': 300}
    for step in (100, 500, 899):
        assert float(late.decay_schedule(step)) == float(whole.decay_schedule(step + 100))


def test_a_decay_may_begin_at_zero_and_by_default_is_no_schedule():
    assert optimizer(resolved(optim__weight_decay=0.1)).decay_schedule is None
    made = optimizer(resolved(optim__weight_decay_end=0.4))
    assert float(made.decay_schedule(0)) == 0 and made.decay['head/kernel'] == 1
    assert float(made.decay_schedule(500)) == pytest.approx(0.2)
