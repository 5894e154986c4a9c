"""Detection beside Hugging Face's DETR, whose numbers are in tests/oracles/detr.npz."""

import functools

import detection_oracle as tiny
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from big_vit import sharding, steps, trees
from big_vit.models.encoder import stack_blocks, unstack_blocks
from big_vit.models.placement import placed
from big_vit.state import from_params
from big_vit.tasks.task import Run


@functools.cache
def start():
    task, model = tiny.task_and_model()
    about, arrays = tiny.oracle()
    params = stack_blocks(trees.unflatten(tiny.parameters()))
    return task, model, params, about, arrays


@pytest.mark.slow
def test_predictions_of_all_blocks_are_those_of_the_reference():
    _, model, params, _, arrays = start()
    batch = tiny.batches(count=1)[0]
    given = {name: jnp.asarray(batch[name]) for name in ('image', 'picture_size')}
    found = jax.jit(model.apply)({'params': params}, given)
    np.testing.assert_allclose(found.logits, arrays['logits'], atol=5e-5)
    np.testing.assert_allclose(found.boxes, arrays['boxes'], atol=5e-5)


@pytest.fixture(scope='module')
def run():
    """A function that trains on some devices in some parts: losses, metrics, parameters."""

    def train(devices, accumulation, count):
        task, model, params, about, _ = start()
        mesh = sharding.make_mesh(devices, 1, 1, jax.devices()[:devices])
        model = placed(model, by_device=sharding.by_device(mesh))
        schedule = optax.constant_schedule(about['lr'])
        optimizer = optax.chain(
            optax.clip_by_global_norm(about['clip']),
            optax.adamw(about['lr'], weight_decay=about['weight_decay']),
        )
        plan = Run(tiny.STEPS, tiny.BATCH)
        step = jax.jit(
            steps.update(
                task.loss(model, plan),
                optax.with_extra_args_support(optimizer),
                schedule,
                mesh,
                accumulation=accumulation,
                targets=task.targets(model, plan),
            )
        )
        place = functools.partial(jax.device_put, device=sharding.batch_sharding(mesh))
        state = from_params(jax.tree.map(jnp.asarray, params), optimizer, False)
        state = jax.device_put(state, sharding.replicated(mesh))
        rows = []
        for batch in tiny.batches(count=count):
            state, metrics = step(state, jax.tree.map(place, batch))
            rows.append(jax.device_get(jax.block_until_ready(metrics)))
        return rows, trees.flatten(unstack_blocks(jax.device_get(state['params'])))

    return functools.cache(train)


@pytest.mark.slow
def test_losses_and_parameters_of_twenty_steps_are_those_of_the_reference(run):
    _, _, _, about, arrays = start()
    rows, params = run(1, 1, tiny.STEPS)
    losses = [row['loss'] for row in rows]
    np.testing.assert_allclose(losses[0], arrays['losses'][0], rtol=1e-5)
    np.testing.assert_allclose(losses, arrays['losses'], rtol=1e-4)
    for ours, theirs in (('class', 'loss_ce'), ('l1', 'loss_bbox'), ('giou', 'loss_giou')):
        assert rows[0][ours] == pytest.approx(about['first'][theirs], rel=1e-5)
    moved = {n: np.abs(arrays[f'after/{n}'] - x).max() for n, x in params.items()}
    # Steps are 1e-3; of a bias of keys the gradient is rounding, which Adam makes as large.
    assert max(x for n, x in moved.items() if not n.endswith('key/bias')) < 1e-4


def test_gradients_are_those_of_the_reference():
    task, model, params, _, arrays = start()
    batch = jax.tree.map(jnp.asarray, tiny.batches(count=1)[0])
    loss = task.loss(model, Run(tiny.STEPS, tiny.BATCH))
    found = jax.jit(jax.grad(lambda p: loss(p, (), batch, None, 0)[0]))(params)
    for name, gradient in trees.flatten(unstack_blocks(jax.device_get(found))).items():
        wanted = arrays[f'gradient/{name}']
        atol = 1e-5 * max(1, np.abs(wanted).max())
        np.testing.assert_allclose(gradient, wanted, atol=atol, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(('devices', 'accumulation'), [(8, 1), (1, 4), (4, 2)])
def test_devices_and_parts_of_a_batch_change_nothing(run, devices, accumulation):
    """Batches have pictures without objects, so that parts of them have very different numbers."""
    rows, params = run(1, 1, 4)
    others, moved = run(devices, accumulation, 4)
    for row, other in zip(rows, others, strict=True):
        for name in ('loss', 'grad_norm', 'class', 'l1', 'giou', 'found'):
            assert other[name] == pytest.approx(row[name], rel=1e-5), name
    for name, leaf in params.items():
        if not name.endswith('key/bias'):
            np.testing.assert_allclose(moved[name], leaf, atol=2e-5, err_msg=name)
