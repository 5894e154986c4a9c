"""Schedules against closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vit.errors import UserError
from big_vit.optim import schedules

PEAK, TOTAL, WARMUP, TIMESCALE = 3e-3, 50, 10, 8
NAMES = ['cosine', 'linear', 'constant', 'rsqrt']


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


def test_a_warmup_longer_than_the_training_is_refused():
    with pytest.raises(UserError, match=r'schedule\.warmup_\* comes to 11 steps.* 10 '):
        schedules.make('cosine', peak=1.0, total_steps=10, warmup_steps=11)


def test_a_cooldown_that_would_begin_in_the_warmup_is_refused():
    with pytest.raises(UserError, match=r'warmup_\* and cooldown_\* come to 11 steps.* 10 '):
        schedules.make('constant', peak=1.0, total_steps=10, warmup_steps=5, cooldown_steps=6)


def test_a_timescale_of_zero_is_refused():
    with pytest.raises(UserError, match=r'schedule\.timescale_\* must be above 0'):
        schedules.make('rsqrt', peak=1.0, total_steps=10, timescale=0)
