"""Optimizers in the train step: SAM, averages of schedule-free learning, frozen parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_steps import SCHEDULE, Run, batch_of, column, floats, parameters, poisoned

from big_vit import steps, trees
from big_vit.models import encoder
from big_vit.optim import factory, sam
from big_vit.tasks.classification import classification_loss


@pytest.fixture(autouse=True, scope='module')
def full_precision():
    with jax.default_matmul_precision('highest'):
        yield


def is_still(name):
    return name.startswith('embedding') or 'query' in name


def unrolled(tree):
    return trees.flatten(encoder.unstack_blocks(jax.device_get(tree)))


# SAM.


def np_ascent(params, grads, rho, adaptive):
    scale = {n: np.abs(w) + 0.01 if adaptive else np.ones_like(w) for n, w in params.items()}
    norm = np.sqrt(sum(np.square(scale[n] * g).sum() for n, g in grads.items()))
    return {n: w + rho * scale[n] ** 2 * grads[n] / norm for n, w in params.items()}


@pytest.mark.parametrize('adaptive', [False, True])
def test_the_ascent_is_that_of_the_papers(adaptive):
    rng = np.random.default_rng(0)
    draw = lambda: {'a': rng.standard_normal((3, 4)), 'b': rng.standard_normal(5) * 9}  # noqa: E731
    params, grads = draw(), draw()
    narrow = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float32))
    found = sam.ascend(narrow(params), narrow(grads), 0.5, adaptive)
    for n, wanted in np_ascent(params, grads, 0.5, adaptive).items():
        np.testing.assert_allclose(found[n], wanted, rtol=1e-5, err_msg=n)
    still = sam.ascend(narrow(params), jax.tree.map(jnp.zeros_like, narrow(grads)), 0.5, adaptive)
    for n, value in still.items():
        np.testing.assert_array_equal(value, np.float32(params[n]))


SAM = dict(law=factory.sgd(0.0), sam_rho=0.3, rate=lambda name: 0.0 if is_still(name) else 1.0)


@pytest.fixture(scope='module')
def sharp():
    return Run(mixup=0.5, **SAM)


@pytest.mark.slow
def test_sam_takes_the_gradient_of_the_same_mixtures_uphill(sharp):
    """Plain SGD of the second gradient, which is that of JAX at the point that NumPy finds."""
    with jax.set_mesh(sharp.mesh):
        now, _ = sharp.step(sharp.start(), sharp.put(batch_of(0)))  # The rate of step 0 is 0.
        now, metrics = sharp.step(now, sharp.put(batch_of(1)))
    after = trees.flatten(jax.device_get(now['params']))
    rng = jax.random.fold_in(jax.random.key(0), 1)
    batch = jax.tree.map(jnp.asarray, batch_of(1))
    mixed = sharp.mix(batch, jax.random.fold_in(rng, steps._MIXING))
    loss_of = classification_loss(sharp.net, 0.1)

    @jax.jit
    def gradient(params, batch, rng):
        return jax.value_and_grad(loss_of, has_aux=True)(params, (), batch, rng, 1)

    def wide(tree):
        flat = trees.flatten(jax.device_get(tree))
        return {n: x.astype(np.float64) * (not is_still(n)) for n, x in flat.items()}

    start = {n: w.astype(np.float64) for n, w in trees.flatten(parameters()).items()}
    (loss, _), first = gradient(parameters(), mixed, rng)
    worst = np_ascent(start, wide(first), 0.3, False)
    distance = np.sqrt(sum(np.square(worst[n] - w).sum() for n, w in start.items()))
    assert distance == pytest.approx(0.3, rel=1e-6)
    narrow = trees.unflatten({n: jnp.asarray(w, jnp.float32) for n, w in worst.items()})
    (higher, _), second = gradient(narrow, mixed, rng)
    second = wide(second)
    norm = np.sqrt(sum(np.square(g).sum() for g in second.values()))
    assert float(metrics['loss']) == pytest.approx(float(loss), rel=1e-5) and higher > loss
    assert float(metrics['grad_norm']) == pytest.approx(norm, rel=1e-4)
    for n, w in start.items():
        if is_still(n):
            assert after[n].tobytes() == trees.flatten(parameters())[n].tobytes(), n
            continue
        step = second[n] * min(1.0, 1.0 / norm) + 0.05 * n.endswith('kernel') * w
        wanted = w - float(SCHEDULE(1)) * step
        np.testing.assert_allclose(after[n], wanted, rtol=1e-5, atol=1e-6, err_msg=n)


@pytest.mark.slow
def test_sam_does_not_depend_on_how_a_step_is_computed(sharp):
    wanted, last = sharp.train(3)
    rows, now = Run(8, (2, 2, 2), mixup=0.5, accumulation=2, **SAM).train(3)
    for name in ('loss', 'grad_norm', 'param_norm', 'update_norm'):
        np.testing.assert_allclose(column(rows, name), column(wanted, name), rtol=1e-5)
    for n, value in unrolled(now['params']).items():
        np.testing.assert_allclose(value, unrolled(last['params'])[n], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_asam_composes_with_the_rest():
    """bfloat16, dropout, Adam, a skipped update; and one compilation."""
    run = Run(sam_rho=1.0, sam_adaptive=True, dropout=0.2, dtype=jnp.bfloat16, skip_sigmas=6.0)
    with jax.set_mesh(run.mesh):
        now = run.start()
        for step in range(3):
            now, metrics = run.step(now, run.put(floats(step)))
            assert np.isfinite(metrics['loss']) and (float(metrics['update_norm']) > 0) == (
                step > 0
            )
        before = jax.device_get(now)
        now, metrics = run.step(now, run.put(poisoned(np.nan)))
    assert int(metrics['skipped']) == 1
    for part in ('params', 'opt'):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(now)[part], before[part])
    assert run.step._cache_size() == 1


# Schedule-free learning.


@pytest.mark.slow
def test_the_average_is_that_of_the_schedule_free_optimizer():
    run = Run(law=factory.schedule_free_adamw(b1=0.8), ema=0.5)
    weights = total = 0.0
    with jax.set_mesh(run.mesh):
        now = run.start()
        x = {n: w.astype(np.float64) for n, w in unrolled(now['params']).items()}
        for step, batch in enumerate([floats(0), floats(1), poisoned(np.nan), floats(2)]):
            now, metrics = run.step(now, run.put(batch))
            averages, z = unrolled(now['ema']), unrolled(now['opt'][1].z)
            y = unrolled(now['params'])
            if step != 2:  # Which is skipped, but counts for the schedule.
                weights = float(SCHEDULE(step)) ** 2
                total += weights
                x = {n: a + (weights / total if total else 0) * (z[n] - a) for n, a in x.items()}
            for n, a in x.items():
                np.testing.assert_allclose(averages[n], a, rtol=1e-4, atol=2e-6, err_msg=n)
                np.testing.assert_allclose(y[n], 0.2 * z[n] + 0.8 * a, rtol=1e-4, atol=2e-6)
    assert int(metrics['skipped']) == 1
    assert run.step._cache_size() == 1
    assert max(np.abs(averages[n] - y[n]).max() for n in y) > 1e-4


# All together: groups, layer decay, frozen parameters, adaptive clipping.


def together(scan):
    def rate(name):
        if is_still(name):
            return 0.0
        if 'encoderblock/' in name:
            return (0.25, 0.5)
        return 0.25 if 'encoderblock_0' in name else 0.5 if 'encoderblock_1' in name else 1.0

    names = list(trees.flatten(encoder.stack_blocks(parameters())))
    names += list(trees.flatten(encoder.unstack_blocks(parameters())))
    groups = {n: 'muon' if 'MlpBlock' in n else 'lamb' for n in names}
    law = factory.grouped({'muon': factory.muon(), 'lamb': factory.lamb()}, groups)
    return Run(law=law, rate=rate, agc=0.1, scan=scan)


@pytest.mark.slow
def test_groups_in_a_real_model_do_not_depend_on_scanning():
    (rows, now), (others, other) = together(True).train(4), together(False).train(4)
    for name in ('loss', 'grad_norm', 'param_norm', 'update_norm'):
        np.testing.assert_allclose(column(rows, name), column(others, name), rtol=1e-4)
    start = unrolled(parameters())
    for n, value in unrolled(now['params']).items():
        if is_still(n):
            assert value.tobytes() == start[n].tobytes(), n
        elif not n.endswith('key/bias'):  # Whose gradient is rounding.
            np.testing.assert_allclose(value, unrolled(other['params'])[n], rtol=1e-3, atol=1e-4)
            assert np.abs(value - start[n]).max() > 0, n


@pytest.mark.slow
def test_the_gradient_of_what_is_frozen_is_not_reported():
    run = Run(rate=lambda name: float(name.startswith('head')), accumulation=2)
    rows, _ = run.train(1)
    loss = classification_loss(run.net, 0.1)
    batch = jax.tree.map(jnp.asarray, batch_of(0))
    gradient = jax.jit(jax.grad(loss, has_aux=True))
    grads, _ = gradient(parameters(), (), batch, jax.random.key(0), 0)
    norm = np.sqrt(sum(np.square(np.float64(g)).sum() for g in grads['head'].values()))
    assert float(rows[0]['grad_norm']) == pytest.approx(norm, rel=1e-5)
