"""What goes by the step beside the rate: weight decay, and parameters that are held at first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gate import mostly_slow

from big_vit import trees
from big_vit.optim import factory

LAYER = 'Transformer/encoderblock/'
SHAPES = {
    'embedding/kernel': (2, 2, 3, 8),
    LAYER + 'LayerNorm_0/scale': (2, 8),
    LAYER + 'MlpBlock_0/Dense_0/kernel': (2, 8, 16),
    'prototypes/kernel': (8, 24),
    'prototypes/scale': (24,),
}
HELD = ('prototypes/kernel', 'prototypes/scale')
START, STEPS = 3, 7
OPTIONS = {'shampoo': dict(every=2, start=2, block=8), 'soap': dict(every=2, block=8)}
LAWS = [name for name in factory.LAWS if name != 'schedule_free_adamw']
FEW = mostly_slow(LAWS, 'adamw', 'lars', 'muon')


def law(name):
    more = {'mu_dtype': 'float32'} if name == 'adafactor_vit' else {}
    return factory.LAWS[name](**OPTIONS.get(name, {}), **more)


def draw(seed):
    rng = np.random.default_rng(seed)
    flat = {n: jnp.asarray(rng.standard_normal(s), jnp.float32) for n, s in SHAPES.items()}
    return trees.unflatten(flat)


def rate(step):
    return 0.01 / (1.0 + step)


def decay(step):
    return jnp.asarray(0.1 + 0.05 * step, jnp.float32)


def make(law, names=tuple(SHAPES), constant=None, **more):
    return factory.make(
        law,
        lambda step: jnp.asarray(rate(step), jnp.float32),
        decay_factors=dict.fromkeys(names, 0.5 if constant is None else 0.5 * constant),
        lr_factors=dict.fromkeys(names, 1.0),
        decay_schedule=decay if constant is None else None,
        **more,
    )


def advance(optimizer, params, state, seed, step):
    updates, state = jax.jit(optimizer.update)(draw_like(params, seed), state, params, step=step)
    return jax.tree.map(jnp.add, params, updates), state


def draw_like(params, seed):
    every = trees.flatten(draw(seed))
    return trees.map_with_name(lambda n, _: every[n], params)


def close(found, wanted):
    found, wanted = trees.flatten(found), trees.flatten(wanted)
    assert found.keys() == wanted.keys()
    for n, x in found.items():
        np.testing.assert_allclose(x, wanted[n], rtol=1e-5, atol=1e-6, err_msg=n)


@pytest.mark.parametrize('name', FEW)
def test_each_step_has_the_weight_decay_of_its_schedule(name):
    """As an optimizer with that constant decay would make it from the same state."""
    scheduled = make(law(name), clip=1.0)
    params, state = draw(0), scheduled.init(draw(0))
    for step in range(4):
        constant = make(law(name), clip=1.0, constant=float(decay(step)))
        wanted, _ = advance(constant, params, state, step + 1, step)
        params, state = advance(scheduled, params, state, step + 1, step)
        close(params, wanted)
    other, _ = advance(make(law(name), clip=1.0, constant=0.1), params, state, 9, 20)
    params, _ = advance(scheduled, params, state, 9, 20)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (params, other)), strict=True))


@pytest.mark.parametrize('name', FEW)
def test_held_by_the_rate_moments_and_counts_run_on(name):
    held = make(law(name), start=dict.fromkeys(HELD, START))
    free = make(law(name))
    params, state = draw(0), held.init(draw(0))
    other, start = free.init(draw(0)), trees.flatten(draw(0))
    for step in range(STEPS):
        # Of the one that holds nothing, what is held is put back.
        wanted, other = advance(free, params, other, step + 1, step)
        params, state = advance(held, params, state, step + 1, step)
        if step < START:
            flat = trees.flatten(params)
            assert all(flat[n].tobytes() == start[n].tobytes() for n in HELD)
            wanted = trees.map_with_name(lambda n, x: start[n] if n in HELD else x, wanted)
        if name != 'lars':  # Its momentum accumulates what the rate has multiplied: nothing here.
            close(params, wanted)
            close(state, other)
    moved = [np.abs(trees.flatten(params)[n] - start[n]).max() for n in HELD]
    assert min(moved) > 0


@pytest.mark.parametrize('name', FEW)
def test_held_by_the_gradient_an_optimizer_begins_when_it_is_let_go(name):
    laws = {'now': law(name), 'later': factory.from_step(law(name), START)}
    groups = {n: 'later' if n in HELD else 'now' for n in SHAPES}
    held = make(factory.grouped(laws, groups))
    params, state = draw(0), held.init(draw(0))
    flat = trees.flatten(params)
    apart = {}
    for first in (0, START):
        names = [n for n in SHAPES if (n in HELD) == bool(first)]
        own = trees.unflatten({n: flat[n] for n in names})
        optimizer = make(law(name), names)
        apart[first] = [optimizer, own, optimizer.init(own)]
    for step in range(STEPS):
        params, state = advance(held, params, state, step + 1, step)
        for first, run in apart.items():
            if step >= first:
                run[1:] = advance(run[0], run[1], run[2], step + 1, step)
        wanted = {**trees.flatten(apart[0][1]), **trees.flatten(apart[START][1])}
        found = trees.flatten(params)
        if step < START:
            assert all(found[n].tobytes() == flat[n].tobytes() for n in HELD)
        close(found, wanted)


@pytest.mark.slow
def test_health_counts_what_is_held_too():
    laws = {'now': law('shampoo'), 'later': factory.from_step(law('shampoo'), START)}
    groups = {n: 'later' if n in HELD else 'now' for n in SHAPES}
    params = draw(0)
    for chosen in (laws['now'], factory.grouped(laws, groups)):
        optimizer = make(chosen)
        now, state = params, optimizer.init(params)
        for step in range(STEPS):
            now, state = advance(optimizer, now, state, step + 1, step)
        found = factory.health(state)
        if chosen is laws['now']:
            whole = found
    # 4 times roots of all at steps 2, 4, 6; then at 2 and 4 of those held for 3 steps.
    assert whole['optim_computed'] > found['optim_computed'] > whole['optim_computed'] // 2
