"""Schedules against closed forms."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vit.config import schema
from big_vit.errors import UserError
from big_vit.optim import schedules

PEAK, TOTAL, WARMUP, TIMESCALE = 3e-3, 50, 10, 8
NAMES = ['cosine', 'linear', 'constant', 'rsqrt']
ORACLE = Path(__file__).parents[1] / 'oracles/self_supervised.npz'


def closed_form(name, step, warmup=WARMUP, end=0.0, cooldown=0):
    share = min(max(step - warmup, 0) / max(TOTAL - warmup, 1), 1.0)
    after = {
        'cosine': PEAK * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * share))),
        'linear': PEAK * (1 + (end - 1) * share),
        'constant': PEAK,
        'rsqrt': PEAK * math.sqrt(TIMESCALE / (TIMESCALE + max(step - warmup, 0))),
    }[name]
    rate = PEAK * step / warmup if step < warmup else after
    return rate * min(max(TOTAL - step, 0) / cooldown, 1.0) if cooldown else rate


def make(name, **more):
    return schedules.make(name, peak=PEAK, total_steps=TOTAL, timescale=TIMESCALE, **more)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('warmup', [0, 1, 10, 50])
@pytest.mark.parametrize('end', [0.0, 0.1])
def test_schedules_are_their_closed_forms(name, warmup, end):
    made = make(name, warmup_steps=warmup, end=end)
    found = jax.vmap(made)(jnp.arange(TOTAL + 11))
    wanted = [closed_form(name, step, warmup, end) for step in range(TOTAL + 11)]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize('name', ['constant', 'rsqrt'])
@pytest.mark.parametrize('warmup, cooldown', [(0, 1), (10, 15), (10, 40), (0, 50)])
def test_a_cooldown_ends_at_zero(name, warmup, cooldown):
    made = make(name, warmup_steps=warmup, cooldown_steps=cooldown)
    found = np.asarray(jax.vmap(made)(jnp.arange(TOTAL + 11)))
    wanted = [closed_form(name, step, warmup, 0.0, cooldown) for step in range(TOTAL + 11)]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-9)
    assert found[TOTAL - 1] > 0 and not found[TOTAL:].any()


def test_rsqrt_is_half_at_three_timescales_and_forgets_the_length_of_the_run():
    found = [
        float(schedules.make('rsqrt', peak=1.0, total_steps=n, warmup_steps=5, timescale=100)(305))
        for n in (400, 4000)
    ]
    assert found == pytest.approx([0.5, 0.5], rel=1e-6)


@pytest.mark.parametrize('name', NAMES)
def test_a_schedule_takes_a_plain_number_and_gives_float32(name):
    made = schedules.make(name, peak=1.0, total_steps=10, warmup_steps=2)
    assert made(1).dtype == jnp.float32 and made(1).shape == ()
    assert float(made(0)) == 0.0 and float(made(1)) == 0.5 and float(made(2)) == 1.0
    assert float(made(jnp.asarray(1, jnp.int32))) == 0.5


def test_steps_of_a_long_run_do_not_lose_precision():
    total = 10_000_000
    made = schedules.make('linear', peak=1.0, total_steps=total)
    assert float(made(total // 4)) == pytest.approx(0.75, rel=1e-5)
    cooling = schedules.make('constant', peak=1.0, total_steps=total, cooldown_steps=total // 2)
    assert float(cooling(total * 3 // 4)) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize('warmup', [0, 10])
def test_a_step_falls_once(warmup):
    made = make('step', warmup_steps=warmup, end=0.1, drop_steps=40)
    wanted = [
        PEAK * min(1, t / warmup if warmup else 1) * (0.1 if t >= 40 else 1) for t in range(50)
    ]
    np.testing.assert_allclose([made(t) for t in range(50)], wanted, rtol=1e-6)


@pytest.mark.parametrize('more', [{'drop_steps': 0}, {'drop_steps': 50}, {'end': 0.0}])
def test_a_step_that_never_falls_or_trains_nothing_is_refused(more):
    with pytest.raises(UserError, match=r'set schedule\.drop_\* between warmup and end'):
        make('step', **{'drop_steps': 40, 'end': 0.1, **more})


def test_a_warmup_longer_than_the_training_is_refused():
    with pytest.raises(UserError, match=r'schedule\.warmup_\* comes to 11 steps.* 10 '):
        schedules.make('cosine', peak=1.0, total_steps=10, warmup_steps=11)


def test_a_cooldown_that_would_begin_in_the_warmup_is_refused():
    with pytest.raises(UserError, match=r'warmup_\* and cooldown_\* come to 11 steps.* 10 '):
        schedules.make('constant', peak=1.0, total_steps=10, warmup_steps=5, cooldown_steps=6)


def test_a_timescale_of_zero_is_refused():
    with pytest.raises(UserError, match=r'schedule\.timescale_\* must be above 0'):
        schedules.make('rsqrt', peak=1.0, total_steps=10, timescale=0)


def linspace_cosine(kind, peak, end, total, warmup, start=0.0):
    """The schedules of public code, as arrays in float64."""
    steps = np.arange(total, dtype=np.float64)
    if kind == 'cosine_dino':
        after = np.arange(total - warmup) / (total - warmup)
        first = np.linspace(start, peak, warmup)
    elif kind == 'cosine_dinov3':
        after = np.linspace(0, 1, total - warmup)
        first = np.linspace(start, peak, warmup, endpoint=False)
    elif kind == 'constant_dinov3':
        rise = start + (peak - start) * (1 - np.cos(np.linspace(0, np.pi, warmup))) / 2
        return np.concatenate([rise, np.full(total - warmup, peak)])
    else:
        after = (steps[warmup:] + 1 - warmup) / (total - warmup)
        first = start + (peak - start) * (steps[:warmup] + 1) / max(warmup, 1)
    return np.concatenate([first, end + (peak - end) * (1 + np.cos(np.pi * after)) / 2])


@pytest.mark.parametrize('name', [*schedules.COSINES, schedules.RISING])
@pytest.mark.parametrize('total, warmup', [(200, 0), (200, 1), (200, 30), (200, 198), (5, 5)])
@pytest.mark.parametrize('start, end', [(0.0, 0.0), (0.2, 1e-3)])
def test_schedules_of_public_code_are_exact_in_float32(name, total, warmup, start, end):
    made = schedules.make(
        name, peak=PEAK, total_steps=total, warmup_steps=warmup, start=start, end=end
    )
    found = np.asarray(jax.jit(jax.vmap(made))(jnp.arange(total)), np.float64)
    wanted = linspace_cosine(name, PEAK, end * PEAK, total, warmup, start * PEAK)
    np.testing.assert_allclose(found, wanted, rtol=1e-7, atol=1e-19)
    last = PEAK if name == schedules.RISING else end * PEAK
    assert float(made(total)) == float(made(10 * total)) == np.float32(last)


RECORDED = {
    'dino/lr': ('cosine_dino', dict(peak=2e-3, end=1e-6, warmup_steps=30)),
    'dinov2/lr': ('cosine_dino', dict(peak=4e-3, end=1e-6, warmup_steps=30)),
    'dinov3/lr': ('cosine_dinov3', dict(peak=2e-4, end=1e-6, start=1e-6, warmup_steps=30)),
    'dinov3/constant': ('constant', dict(peak=4e-4, warmup_steps=30)),
    'dinov3/rising': ('constant_dinov3', dict(peak=5e-5, warmup_steps=40)),
    'ijepa/lr': ('cosine_ijepa', dict(peak=1e-3, end=1e-6, start=2e-4, warmup_steps=30)),
    'mae/lr': ('cosine', dict(peak=2.4e-3, warmup_steps=30)),
    'mae_finetune/lr': ('cosine', dict(peak=1e-3, end=1e-6, warmup_steps=30)),
}


@pytest.mark.parametrize('which', RECORDED)
def test_recipes_have_the_rates_of_their_own_code(which):
    name, settings = RECORDED[which]
    shares = {key: settings[key] / settings['peak'] for key in ('start', 'end') if key in settings}
    made = schedules.make(name, total_steps=200, **{**settings, **shares})
    with np.load(ORACLE) as file:
        wanted = file[f'schedule/{which}']
    found = np.asarray(jax.jit(jax.vmap(made))(jnp.arange(len(wanted))), np.float64)
    # Those of optax, which earlier runs have had, are as exact as float32 is at the peak.
    error = 1e-7 * settings['peak'] if name in ('cosine', 'constant') else 1e-18
    np.testing.assert_allclose(found, wanted, rtol=1e-7, atol=error)


@pytest.mark.parametrize(
    'which, name, end',
    [
        ('dino/wd', 'cosine_dino', 0.4),
        ('dino/wd', 'cosine', 0.4),
        ('dino/wd', 'constant', 0.4),
        ('dinov2/wd', 'cosine_dino', 0.2),
        ('dinov3/wd', 'cosine_dinov3', 0.2),
        ('ijepa/wd', 'cosine_ijepa', 0.4),
    ],
)
def test_the_weight_decay_counts_steps_as_the_rate_does(which, name, end):
    with np.load(ORACLE) as file:
        wanted = file[f'schedule/{which}']
    made = schedules.weight_decay(name, 0.04, end, 200)
    found = np.asarray(jax.jit(jax.vmap(made))(jnp.arange(len(wanted))), np.float64)
    np.testing.assert_allclose(found, wanted, rtol=1e-7)
    assert float(made(200)) == np.float32(end)


def test_steps_above_two_to_the_24_are_told_apart():
    total = 2**30
    made = jax.jit(schedules.make('cosine_dino', peak=1.0, total_steps=total))
    for left in (1, 3, 2**20 + 1):
        wanted = math.sin(math.pi / 2 * left / total) ** 2
        assert float(made(jnp.int32(total - left))) == pytest.approx(wanted, rel=1e-7)


def test_the_config_knows_all_schedules():
    for name in schedules.NAMES:
        assert schema.SCHEMA['schedule.name'].check(name) == name
    assert schema.SCHEMA['schedule.name'].check.__doc__ == ', '.join(schedules.NAMES)
