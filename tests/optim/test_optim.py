"""Optimizers against float64 NumPy: clipping, decay, rates and the oldest of the laws."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vit.optim import factory, schedules

PEAK, TOTAL = 3e-3, 50


def rate_at(step):
    """Of SCHEDULE: cosine to 0 after a warmup of 3."""
    share = (step - 3) / (TOTAL - 3)
    return 10 * PEAK * (step / 3 if step < 3 else 0.5 * (1 + math.cos(math.pi * share)))


NAMES = ('a/kernel', 'a/bias', 'b/kernel', 'frozen/kernel')
SHAPES = dict(zip(NAMES, [(3, 4), (4,), (2, 3, 2), (5, 2)], strict=True))
LR = dict(zip(NAMES, [1.0, 1.0, 0.25, 0.0], strict=True))
DECAY = dict(zip(NAMES, [0.1, 0.0, 0.05, 0.1], strict=True))
STEPS = 12


def nested(flat):
    tree = {}
    for name, leaf in flat.items():
        first, last = name.split('/')
        tree.setdefault(first, {})[last] = jnp.asarray(leaf, jnp.float32)
    return tree


def flat_of(tree):
    return {
        f'{first}/{last}': np.asarray(leaf)
        for first, inner in tree.items()
        for last, leaf in inner.items()
    }


def draw(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {n: np.float32(rng.standard_normal(s) * scale) for n, s in SHAPES.items()}


def clipped(gradients, clip):
    # What is frozen does not count.
    norm = math.sqrt(sum(np.square(g).sum() for n, g in gradients.items() if LR[n]))
    factor = clip / norm if clip and norm > clip else 1.0
    return {n: g * factor for n, g in gradients.items()}


class Adam:
    """arXiv 1412.6980 with the decay of arXiv 1711.05101."""

    def __init__(self, b1, b2, eps):
        self.b1, self.b2, self.eps, self.t = b1, b2, eps, 0
        self.m = {n: np.zeros(s) for n, s in SHAPES.items()}
        self.v = {n: np.zeros(s) for n, s in SHAPES.items()}

    def direction(self, gradients):
        self.t += 1
        result = {}
        for n, g in gradients.items():
            self.m[n] = self.b1 * self.m[n] + (1 - self.b1) * g
            self.v[n] = self.b2 * self.v[n] + (1 - self.b2) * g**2
            m, v = self.m[n] / (1 - self.b1**self.t), self.v[n] / (1 - self.b2**self.t)
            result[n] = m / (np.sqrt(v) + self.eps)
        return result


class Sgd:
    """Heavy ball, or Nesterov's form as in Sutskever et al. 2013."""

    def __init__(self, momentum, nesterov):
        self.momentum, self.nesterov = momentum, nesterov
        self.v = {n: np.zeros(s) for n, s in SHAPES.items()}

    def direction(self, gradients):
        result = {}
        for n, g in gradients.items():
            self.v[n] = self.momentum * self.v[n] + g
            result[n] = g + self.momentum * self.v[n] if self.nesterov else self.v[n]
        return result


SCHEDULE = schedules.make('cosine', peak=PEAK * 10, total_steps=TOTAL, warmup_steps=3)


def make(law, clip, decay=DECAY):
    return factory.make(law, SCHEDULE, decay_factors=decay, lr_factors=LR, clip=clip)


def moving(state):
    """The states of the chain for all parameters that are not frozen."""
    return state[0].inner_states['moving'].inner_state


def updater(optimizer):
    def update(params, state, gradients, step):
        updates, state = optimizer.update(gradients, state, params, step=step)
        return jax.tree.map(jnp.add, params, updates), state

    return jax.jit(update)


@pytest.mark.parametrize('clip', [0.0, 1.0, 1e4])
@pytest.mark.parametrize('decay', [DECAY, dict.fromkeys(NAMES, 0.0)], ids=['decay', 'no-decay'])
@pytest.mark.parametrize(
    'law, reference',
    [
        (
            factory.adamw(0.9, 0.98, 1e-6, 'float32'),
            functools.partial(Adam, 0.9, 0.98, 1e-6),
        ),
        (factory.sgd(0.0, False, 'float32'), functools.partial(Sgd, 0.0, False)),
        (factory.sgd(0.9, False, 'float32'), functools.partial(Sgd, 0.9, False)),
        (factory.sgd(0.9, True, 'float32'), functools.partial(Sgd, 0.9, True)),
    ],
    ids=['adamw', 'sgd', 'momentum', 'nesterov'],
)
def test_optimizers_are_their_numpy_references(law, reference, decay, clip):
    optimizer, wanted, reference = make(law, clip, decay=decay), draw(0), reference()
    start = draw(0)
    params = nested(start)
    state, update = optimizer.init(params), updater(optimizer)
    wanted = {n: p.astype(np.float64) for n, p in start.items()}
    for step in range(STEPS):
        gradients = draw(step + 1, scale=2.0 if step % 2 else 0.05)  # Above and below the clip.
        params, state = update(params, state, nested(gradients), step)
        rate = rate_at(step)
        wide = {n: g.astype(np.float64) for n, g in gradients.items()}
        for n, d in reference.direction(clipped(wide, clip)).items():
            wanted[n] = wanted[n] - rate * LR[n] * (d + decay[n] * wanted[n])
        for n, found in flat_of(params).items():
            np.testing.assert_allclose(found, wanted[n], rtol=2e-5, atol=2e-6, err_msg=n)
    assert np.abs(wanted['a/kernel'] - start['a/kernel']).max() > 0.01
    np.testing.assert_array_equal(flat_of(params)['frozen/kernel'], start['frozen/kernel'])


def test_decay_is_multiplied_by_the_rate_and_not_by_the_gradient():
    optimizer = make(factory.adamw(0.9, 0.999, 1e-8, 'float32'), 1.0)
    start = draw(0)
    params = nested(start)
    zeros = jax.tree.map(jnp.zeros_like, params)
    params, _ = updater(optimizer)(params, optimizer.init(params), zeros, 20)
    rate = rate_at(20)
    for n, found in flat_of(params).items():
        wanted = start[n] * (1 - rate * DECAY[n] * LR[n])
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    np.testing.assert_array_equal(flat_of(params)['a/bias'], start['a/bias'])


def test_the_rate_follows_the_step_argument_and_not_the_number_of_updates():
    optimizer = make(factory.sgd(0.0, False, 'float32'), 0.0, decay=dict.fromkeys(NAMES, 0.0))
    start, gradients = draw(0), draw(1)
    params = nested(start)
    state, update = optimizer.init(params), updater(optimizer)
    for step in (40, 0, 7, 7):
        after, state = update(params, state, nested(gradients), step)
        rate = rate_at(step)
        wanted = start['a/kernel'] - rate * gradients['a/kernel']
        np.testing.assert_allclose(flat_of(after)['a/kernel'], wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    'make_law, moments',
    [
        (lambda dtype: factory.adamw(0.9, 0.99, 1e-8, dtype), ('mu', 'nu')),
        (lambda dtype: factory.sgd(0.9, False, dtype), ('trace',)),
        (lambda dtype: factory.sgd(0.9, True, dtype), ('trace',)),
    ],
    ids=['adamw', 'momentum', 'nesterov'],
)
def test_the_first_moment_may_be_bfloat16_and_stays_close(make_law, moments):
    results = {}
    for dtype in ('float32', 'bfloat16'):
        optimizer = make(make_law(dtype), 1.0)
        params = nested(draw(0))
        state, update = optimizer.init(params), updater(optimizer)
        types = [leaf.dtype for leaf in jax.tree.leaves(state)]
        for step in range(1, 6):
            params, state = update(params, state, nested(draw(step)), step + 5)
        assert types == [leaf.dtype for leaf in jax.tree.leaves(state)], 'types must not change'
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
        found = {
            part: {leaf.dtype.name for leaf in jax.tree.leaves(getattr(moving(state)[1], part))}
            for part in moments
        }
        first, *rest = moments
        assert found[first] == {dtype}
        assert all(found[part] == {'float32'} for part in rest)
        results[dtype] = flat_of(params)['a/kernel']
    error = np.abs(results['float32'] - results['bfloat16']).max()
    moved = np.abs(results['float32'] - draw(0)['a/kernel']).max()
    assert 0 < error < 0.02 * moved


def test_optimizer_state_is_initialised_without_values():
    optimizer = make(factory.adamw(0.9, 0.99, 1e-8, 'float32'), 1.0)
    abstract_state = jax.eval_shape(optimizer.init, nested(draw(0)))
    sizes = sum(leaf.size for leaf in jax.tree.leaves(abstract_state))
    assert sizes == 2 * sum(math.prod(s) for n, s in SHAPES.items() if LR[n]) + 1
