"""The train step: one function, whatever the mesh, the accumulation and the form of the model."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gate import mostly_slow

from big_vit import augment, checkpoint, sharding, state, steps, trees
from big_vit.evaluators import classification
from big_vit.models import encoder, vit
from big_vit.models.placement import placed
from big_vit.optim import factory, schedules
from big_vit.tasks.batch import normalise, targets
from big_vit.tasks.classification import classification_loss
from big_vit.tasks.task import Aux, Targets

IMAGE, CLASSES, BATCH, STEPS = (8, 8, 3), 10, 32, 10
SIZES = dict(patch_size=(4, 4), width=32, depth=2, mlp_dim=64, num_heads=4, num_classes=CLASSES)
TRANSFORMS = dict(scan=True, dropout=0.0, posemb='learned', dtype=jnp.float32)
SCHEDULE = schedules.make('cosine', peak=3e-3, total_steps=20, warmup_steps=3)


@pytest.fixture(autouse=True, scope='module')
def full_precision():
    with jax.default_matmul_precision('highest'):
        yield


class Run:
    """All that a train step is made of, on one mesh."""

    def __init__(
        self,
        devices=1,
        sizes=(1, 1, 1),
        *,
        accumulation=1,
        ema=0.0,
        seed=0,
        skip_sigmas=0.0,
        mixup=0.0,
        cutmix=0.0,
        prepare=None,
        sequence=False,
        law=None,
        rate=lambda name: 1.0,
        agc=0.0,
        sam_rho=0.0,
        sam_adaptive=False,
        **fields,
    ):
        self.mesh = sharding.make_mesh(*sizes, devices=jax.devices()[:devices])
        constrain = sharding.constrain_batch(self.mesh, sequence)
        self.net = vit.make_vit(constrain=constrain, **(SIZES | TRANSFORMS | fields))
        params = state.abstract_params(self.net, IMAGE)
        self.net = placed(self.net, gather=sharding.gather_weights(self.mesh, params))
        names = list(trees.flatten(params))
        rates = {n: rate(n) for n in names}
        self.optimizer = factory.make(
            law or factory.adamw(0.9, 0.99, 1e-8, 'float32'),
            SCHEDULE,
            decay_factors={n: 0.05 * n.endswith('kernel') for n in names},
            lr_factors=rates,
            clip=1.0,
            agc=agc,
        )
        self.abstract_state = state.abstract(self.net, IMAGE, self.optimizer, bool(ema), self.mesh)
        self.mix = mixer(self.mesh, mixup, cutmix) if mixup else None
        step = steps.update(
            classification_loss(self.net, 0.1),
            self.optimizer,
            SCHEDULE,
            self.mesh,
            prepare=prepare,
            mix=self.mix,
            seed=seed,
            accumulation=accumulation,
            ema=ema,
            skip_sigmas=skip_sigmas,
            frozen=factory.frozen(rates),
            sam_rho=sam_rho,
            sam_adaptive=sam_adaptive,
        )
        self.step = steps.make_train_step(step, self.abstract_state, self.mesh)

    def start(self):
        """Everyone's same parameters, in the form that this model takes."""
        form = encoder.stack_blocks if self.net.encoder.scan else encoder.unstack_blocks
        return state.create(
            self.net, IMAGE, self.optimizer, 0, self.abstract_state, form(parameters())
        )

    def put(self, batch):
        return jax.device_put(batch, sharding.batch_sharding(self.mesh))

    def train(self, count=STEPS):
        """(metrics of each step, last state)"""
        with jax.set_mesh(self.mesh):
            now, rows = self.start(), []
            batches = [self.put(batch_of(i)) for i in range(count)]
            with jax.transfer_guard('disallow'):
                for batch in batches:
                    now, metrics = self.step(now, batch)
                    rows.append(metrics)
                jax.block_until_ready(rows)
            return jax.device_get(rows), now


def mixer(mesh, mixup, cutmix=0.0):
    replicate = sharding.constrain_replicated(mesh)
    return functools.partial(
        augment.mix, mixup=mixup, cutmix=cutmix, num_classes=CLASSES, replicate=replicate
    )


@functools.cache
def parameters():
    """Random parameters of all leaves: a zero head would hide the rest of the gradient at first."""
    abstract_state = state.abstract_params(vit.make_vit(**(SIZES | TRANSFORMS)), IMAGE)
    rng = np.random.default_rng(0)
    return trees.map_with_name(
        lambda name, leaf: np.float32(
            rng.standard_normal(leaf.shape) * 0.1 + name.endswith('scale')
        ),
        abstract_state,
    )


@functools.cache
def batch_of(i):
    rng = np.random.default_rng(100 + i)
    image = rng.integers(0, 256, (BATCH, *IMAGE)).astype(np.uint8)
    # What is bright is of a high class, so that there is something to learn.
    label = (image.mean((1, 2, 3)) > 127).astype(np.int32) * 4 + rng.integers(0, 2, BATCH)
    return {'image': image, 'label': label.astype(np.int32)}


def np_logits(batch):
    image = jnp.asarray(batch['image'] / np.float32(127.5) - 1)
    net = vit.make_vit(**(SIZES | TRANSFORMS))
    return np.asarray(jax.jit(net.apply)({'params': parameters()}, image)[0], np.float64)


def column(rows, name):
    return np.array([float(row[name]) for row in rows])


@pytest.fixture(scope='module')
def single():
    rows, last = Run().train()
    return rows, jax.device_get(last)


# One run, many ways.


@pytest.mark.parametrize(
    'run',
    [
        pytest.param(dict(devices=8, sizes=(8, 1, 1)), marks=pytest.mark.slow),
        pytest.param(dict(devices=8, sizes=(1, 8, 1)), marks=pytest.mark.slow),
        pytest.param(dict(devices=8, sizes=(2, 2, 2)), marks=pytest.mark.slow),
        pytest.param(dict(devices=8, sizes=(1, 4, 2)), marks=pytest.mark.slow),
        dict(devices=8, sizes=(2, 2, 2), accumulation=4),
        pytest.param(dict(devices=8, sizes=(2, 2, 2), sequence=True), marks=pytest.mark.slow),
        pytest.param(dict(accumulation=4), marks=pytest.mark.slow),
        pytest.param(dict(scan=False), marks=pytest.mark.slow),
        pytest.param(dict(remat='names'), marks=pytest.mark.slow),
        pytest.param(dict(remat='offload'), marks=pytest.mark.slow),
    ],
    ids=[
        'DP',
        'FSDP',
        '2x2x2',
        'FSDPxTP',
        '2x2x2 accumulated',
        'sequence',
        'accumulated',
        'unrolled',
        'remat',
        'offload',
    ],
)
def test_losses_do_not_depend_on_how_a_step_is_computed(single, run):
    wanted, last = single
    rows, now = Run(**run).train()
    for name in ('loss', 'grad_norm', 'param_norm', 'update_norm'):
        np.testing.assert_allclose(column(rows, name), column(wanted, name), rtol=1e-5)
    np.testing.assert_allclose(column(rows, 'accuracy'), column(wanted, 'accuracy'), atol=1 / 32)
    np.testing.assert_array_equal(column(rows, 'lr'), column(wanted, 'lr'))
    found = encoder.stack_blocks(jax.device_get(now['params']))
    for name, leaf in trees.flatten(found).items():
        # A bias of the keys shifts all scores alike: its gradient is rounding, grown by Adam.
        if name.endswith('key/bias'):
            continue
        np.testing.assert_allclose(
            leaf, trees.flatten(last['params'])[name], rtol=1e-3, atol=1e-4, err_msg=name
        )


def test_the_loss_falls_and_the_first_is_the_right_one(single):
    rows, _ = single
    assert column(rows, 'loss')[-1] < column(rows, 'loss')[0] - 0.1
    batch = batch_of(0)
    wide = np_logits(batch)
    logp = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    target = np.full((BATCH, CLASSES), 0.1 / CLASSES)
    target[np.arange(BATCH), batch['label']] += 0.9
    assert float(rows[0]['loss']) == pytest.approx(-(target * logp).sum(-1).mean(), rel=1e-5)
    assert float(rows[0]['accuracy']) == np.mean(wide.argmax(-1) == batch['label'])


def test_the_reported_norms_and_rate_are_those_of_the_arrays(single):
    rows, last = single
    leaves = jax.tree.leaves(last['params'])
    norm = np.sqrt(sum(np.square(leaf.astype(np.float64)).sum() for leaf in leaves))
    assert float(rows[-1]['param_norm']) == pytest.approx(norm, rel=1e-5)
    np.testing.assert_allclose(column(rows, 'lr')[:4], [0, 1e-3, 2e-3, 3e-3], rtol=1e-6)
    assert float(rows[0]['update_norm']) == 0.0, 'the rate starts at 0'
    assert int(last['step']) == STEPS and int(last['skipped']) == 0


def test_a_step_keeps_shardings_and_shards_what_it_can(accumulating):
    _, now = accumulating.train(2)
    wanted = trees.flatten(accumulating.abstract_state)
    for name, leaf in trees.flatten(now).items():
        assert leaf.sharding.is_equivalent_to(wanted[name].sharding, leaf.ndim), name
        assert leaf.dtype == wanted[name].dtype, name
    kernel = now['params']['Transformer']['encoderblock']['MlpBlock_0']['Dense_0']['kernel']
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 8, 32)}


# What does not change the numbers of a step.


def test_the_old_state_is_given_up_to_the_new_one(plain):
    with jax.set_mesh(plain.mesh):
        old = plain.start()
        new, _ = plain.step(old, plain.put(floats(0)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


@pytest.fixture(scope='module')
def dropping():
    return Run(dropout=0.2, accumulation=4)


def two_losses(run):
    with jax.set_mesh(run.mesh):
        now, same = run.start(), run.put(batch_of(0))
        found = []
        for _ in range(2):
            now, metrics = run.step(now, same)
            found.append(float(metrics['loss']))
    return found


@pytest.mark.slow
def test_dropout_depends_on_the_seed_and_the_step_only(dropping):
    first, again = two_losses(dropping), two_losses(dropping)
    other = two_losses(Run(dropout=0.2, accumulation=4, seed=1))
    assert first == again
    assert first[0] != other[0]
    assert first[0] != first[1], 'the rate of step 0 is 0: only the dropout differs'


@pytest.mark.parametrize('which', mostly_slow(['dropping', 'accumulating'], 'accumulating'))
def test_five_steps_compile_once_and_move_nothing_to_or_from_the_host(request, which):
    run = request.getfixturevalue(which)
    run.train(1)
    compiled = run.step._cache_size()
    _, now = run.train(5)  # Under a transfer guard.
    assert run.step._cache_size() == compiled <= 2, 'bytes, and floats of another test'
    assert int(now['step']) == 5


def test_microbatches_have_dropout_of_their_own(dropping):
    batch = {name: np.repeat(leaf[:1], BATCH, 0) for name, leaf in batch_of(0).items()}
    loss = jax.jit(classification_loss(dropping.net, 0.1))
    rng = jax.random.fold_in(jax.random.key(0), 0)
    micro = jax.tree.map(lambda x: jnp.asarray(x[: BATCH // 4]), batch)
    with jax.set_mesh(dropping.mesh):
        parts = [
            float(loss(parameters(), (), micro, jax.random.fold_in(rng, i), 0)[0]) for i in range(4)
        ]
        _, metrics = dropping.step(dropping.start(), dropping.put(batch))
    assert float(metrics['loss']) == pytest.approx(np.mean(parts), rel=1e-5)
    assert len(set(parts)) == 4


# Mixing.


@pytest.fixture(scope='module')
def mixing_run():
    return Run(mixup=0.5)


@pytest.mark.parametrize(
    'run',
    [
        pytest.param(dict(devices=8, sizes=(8, 1, 1)), marks=pytest.mark.slow),
        pytest.param(dict(devices=8, sizes=(1, 8, 1)), marks=pytest.mark.slow),
        pytest.param(dict(devices=8, sizes=(1, 8, 1), accumulation=4), marks=pytest.mark.slow),
        dict(accumulation=4),
    ],
    ids=['DP', 'FSDP', 'FSDP accumulated', 'accumulated'],
)
@pytest.mark.slow
def test_mixtures_do_not_depend_on_how_a_step_is_computed(mixing_run, run):
    wanted, _ = mixing_run.train()  # Under a transfer guard.
    rows, now = Run(mixup=0.5, **run).train()
    for name in ('loss', 'grad_norm', 'param_norm', 'update_norm'):
        np.testing.assert_allclose(column(rows, name), column(wanted, name), rtol=1e-5)
    assert int(now['step']) == STEPS


def test_mixing_hands_one_row_to_the_next_device_and_agrees_on_nothing():
    mesh = sharding.make_mesh(1, 8, 1)
    where = sharding.batch_sharding(mesh)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), batch_of(0)
    )
    mix = jax.jit(lambda b: mixer(mesh, 0.5)(b, jax.random.key(0)), out_shardings=where)
    text = mix.lower(batch).compile().as_text()
    kinds = 'all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter'
    found = re.findall(rf'= (\w+\[[\d,]*\])\S* ({kinds})(?:-start)?\(', text)
    assert sorted(found) == [
        (f'f32[1,{CLASSES}]', 'collective-permute'),  # The label's probabilities.
        ('u8[1,8,8,3]', 'collective-permute'),
    ]


@pytest.mark.slow
def test_the_first_loss_of_mixtures_is_that_of_numpy(mixing_run, single):
    batch = batch_of(0)
    rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 2**31)
    share = np.asarray(jax.random.beta(rng, 0.5, 0.5, (BATCH,)), np.float64)
    share = np.maximum(share, 1 - share)[:, None]
    label = np.eye(CLASSES)[batch['label']]
    label = share * label + (1 - share) * np.roll(label, 1, 0)
    image = batch['image'].reshape(BATCH, -1) / 127.5 - 1
    image = (share * image + (1 - share) * np.roll(image, 1, 0)).reshape(batch['image'].shape)
    net = vit.make_vit(**(SIZES | TRANSFORMS))
    logits, _ = jax.jit(net.apply)({'params': parameters()}, jnp.asarray(image, jnp.float32))
    wide = np.asarray(logits, np.float64)
    logp = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    wanted = -((0.9 * label + 0.1 / CLASSES) * logp).sum(-1).mean()
    rows, _ = mixing_run.train(1)
    assert float(rows[0]['loss']) == pytest.approx(wanted, rel=1e-5)
    assert float(rows[0]['accuracy']) == np.mean(wide.argmax(-1) == batch['label'])
    assert abs(wanted - float(single[0][0]['loss'])) > 1e-3


@pytest.mark.slow
def test_mixtures_depend_on_the_step(mixing_run):
    first, second = two_losses(mixing_run)
    assert first != second, 'the rate of step 0 is 0: only the shares differ'
    assert two_losses(mixing_run) == [first, second]


# What the devices do to examples before.


def prepared():
    return augment.compose(
        [augment.flip_lr(), augment.value_range(-1, 1), augment.random_erasing(0.5)]
    )


def with_replaced(i):
    return {**batch_of(i), 'replaced': (np.arange(BATCH) % 5 == i).astype(np.uint8)}


def run_of_all(**more):
    return Run(prepare=prepared(), mixup=0.5, cutmix=1.0, **more)


def rows_of(run, batches):
    with jax.set_mesh(run.mesh):
        now, rows = run.start(), []
        for batch in batches:
            now, metrics = run.step(now, run.put(batch))
            rows.append(metrics)
        return jax.device_get(rows)


@pytest.fixture(scope='module')
def all_at_once():
    return rows_of(run_of_all(), [with_replaced(i) for i in range(4)])


@pytest.mark.parametrize(
    'run',
    [
        pytest.param(dict(devices=8, sizes=(8, 1, 1)), marks=pytest.mark.slow),
        pytest.param(dict(devices=8, sizes=(2, 2, 2), accumulation=4), marks=pytest.mark.slow),
        dict(accumulation=4),
    ],
    ids=['DP', '2x2x2 accumulated', 'accumulated'],
)
@pytest.mark.slow
def test_what_devices_do_to_examples_does_not_depend_on_how_a_step_is_computed(all_at_once, run):
    rows = rows_of(run_of_all(**run), [with_replaced(i) for i in range(4)])
    for name in ('loss', 'grad_norm', 'param_norm', 'update_norm'):
        np.testing.assert_allclose(column(rows, name), column(all_at_once, name), rtol=1e-5)
    assert [int(row['replaced']) for row in rows] == [7, 7, 6, 6]


def test_examples_that_stand_in_for_others_are_counted_and_else_like_any():
    run = Run()
    without = rows_of(run, [batch_of(i) for i in range(4)])
    rows = rows_of(run, [with_replaced(i) for i in range(4)])
    assert 'replaced' not in without[0]
    for row, same in zip(rows, without, strict=True):
        assert row.pop('replaced').dtype == np.int32
        assert {n: x.tobytes() for n, x in row.items()} == {n: x.tobytes() for n, x in same.items()}


@pytest.mark.slow
def test_preparing_comes_first_and_has_the_only_new_draws():
    seen = []

    def prepare(batch, rng):
        seen.append({name: x.dtype for name, x in batch.items()})
        return batch

    settings = dict(dropout=0.2, mixup=0.5, accumulation=2)
    plainly = rows_of(Run(**settings), [batch_of(i) for i in range(3)])
    rows = rows_of(Run(prepare=prepare, **settings), [with_replaced(i) for i in range(3)])
    np.testing.assert_array_equal(column(rows, 'loss'), column(plainly, 'loss'))
    assert seen[0] == {'image': jnp.uint8, 'label': jnp.int32}


def test_the_keys_are_those_of_all_runs_so_far():
    """Other numbers would change what a run draws that is resumed, often hardly the loss."""
    keys = {}

    def noting(name):
        def apply(batch, rng):
            keys[name] = jax.random.key_data(rng).tolist()
            return batch

        return apply

    steps.seen(batch_of(0), 5, 7, noting('prepare'), noting('mix'))
    own = jax.random.fold_in(jax.random.key(5), 7)
    assert keys == {
        'prepare': jax.random.key_data(jax.random.fold_in(own, 2**31 + 1)).tolist(),
        'mix': jax.random.key_data(jax.random.fold_in(own, 2**31)).tolist(),
    }


def test_what_the_model_sees_is_what_was_prepared():
    rows = rows_of(Run(prepare=augment.compose([augment.value_range(0, 3)])), [batch_of(0)])
    image = jnp.asarray(batch_of(0)['image'] / 85, jnp.float32)
    net = vit.make_vit(**(SIZES | TRANSFORMS))
    wide = np.asarray(jax.jit(net.apply)({'params': parameters()}, image)[0], np.float64)
    logp = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    target = 0.9 * np.eye(CLASSES)[batch_of(0)['label']] + 0.1 / CLASSES
    assert float(rows[0]['loss']) == pytest.approx(-(target * logp).sum(-1).mean(), rel=1e-5)


@pytest.mark.slow
def test_preparing_depends_on_the_seed_and_the_step():
    def losses(seed):
        run = Run(prepare=augment.compose([augment.flip_lr()]), seed=seed)
        return two_losses(run)

    first, second = losses(0)
    assert first != second, 'the rate of step 0 is 0: only what is turned differs'
    assert losses(0) == [first, second]
    assert losses(1)[0] != first


@pytest.mark.parametrize(
    'sizes', [pytest.param((1, 8, 1), marks=pytest.mark.slow), (2, 2, 2)], ids=str
)
def test_a_step_never_brings_the_images_of_all_devices_together(sizes):
    run = run_of_all(devices=8, sizes=sizes, accumulation=2)
    where = sharding.batch_sharding(run.mesh)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), with_replaced(0)
    )
    with jax.set_mesh(run.mesh):
        text = run.step.lower(run.abstract_state, batch).compile().as_text()
    held = {tuple(map(int, dims.split(','))) for dims in re.findall(r'\[([\d,]+),8,8,3\]', text)}
    own = BATCH // (sizes[0] * sizes[1])
    assert max(int(np.prod(lead)) for lead in held) == own
    kinds = 'all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter'
    travel = re.findall(rf'= \(?\w+\[(\d+),8,8,3\]\S* ({kinds})(?:-start)?\(', text)
    assert travel == [('1', 'collective-permute')]


# Updates that are skipped.


@pytest.fixture(scope='module')
def accumulating():
    return Run(8, (1, 4, 2), ema=0.9, accumulation=2)


@pytest.fixture(scope='module')
def plain():
    return Run(ema=0.9)


def poisoned(value):
    batch = batch_of(3)
    image = batch['image'].astype(np.float32) / 127.5 - 1
    image[5, 2, 3, 1] = value
    return {**batch, 'image': image}


def floats(i):
    batch = batch_of(i)
    return {**batch, 'image': batch['image'].astype(np.float32) / 127.5 - 1}


@pytest.mark.parametrize(
    'which, value',
    [
        ('plain', np.nan),
        pytest.param('plain', np.inf, marks=pytest.mark.slow),
        pytest.param('accumulating', -np.inf, marks=pytest.mark.slow),
    ],
)
def test_an_update_that_is_not_finite_is_skipped_and_counted(request, which, value):
    run = request.getfixturevalue(which)
    with jax.set_mesh(run.mesh):
        now, _ = run.step(run.start(), run.put(floats(0)))
        now, _ = run.step(now, run.put(floats(1)))
        before = jax.device_get(now)
        for times in (1, 2):
            now, metrics = run.step(now, run.put(poisoned(value)))
            after = jax.device_get(now)
            for part in ('params', 'opt', 'ema'):
                for name, leaf in trees.flatten(after[part]).items():
                    old = trees.flatten(before[part])[name]
                    assert leaf.tobytes() == old.tobytes(), f'{part}/{name}'
            assert (after['step'], after['skipped'], after['skipped_in_a_row']) == (
                2 + times, times, times,
            )  # fmt: skip
            assert (int(metrics['skipped']), int(metrics['skipped_in_a_row'])) == (times, times)
            assert float(metrics['update_norm']) == 0.0
            assert np.isfinite(metrics['param_norm'])
        now, metrics = run.step(now, run.put(floats(2)))
    after = jax.device_get(now)
    assert (after['step'], after['skipped'], after['skipped_in_a_row']) == (5, 2, 0)
    assert np.isfinite(metrics['loss']) and float(metrics['update_norm']) > 0
    assert float(metrics['lr']) == pytest.approx(float(SCHEDULE(4)))
    for name, leaf in trees.flatten(after['params']).items():
        assert np.isfinite(leaf).all(), name
    moved = [
        np.abs(leaf - trees.flatten(before['params'])[name]).max()
        for name, leaf in trees.flatten(after['params']).items()
    ]
    assert min(moved) > 0


def test_a_skipped_update_does_not_advance_the_optimizer_but_the_schedule(plain):
    """The rate of step 0 is 0, so that both runs meet the last batch with equal parameters."""

    def last(*batches):
        now = plain.start()
        for batch in batches:
            now, metrics = plain.step(now, plain.put(batch))
        names = trees.flatten(now['opt']).items()
        counts = [int(leaf) for name, leaf in names if name.endswith('count')]
        return float(metrics['update_norm']), counts

    with jax.set_mesh(plain.mesh):
        without, counts = last(floats(0), floats(1))
        skipping, counts_with = last(floats(0), poisoned(np.nan), floats(1))
    assert counts == counts_with == [2]
    assert skipping == pytest.approx(2 * without, rel=1e-5), 'warmup: rates 1e-3 and 2e-3'


def test_the_average_follows_its_recurrence(plain):
    averages = None
    with jax.set_mesh(plain.mesh):
        now = plain.start()
        averages = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(now['ema']))
        for step in range(12):
            now, _ = plain.step(now, plain.put(floats(step)))
            decay = min(0.9, (1 + step) / (10 + step))
            averages = jax.tree.map(
                lambda a, p, decay=decay: decay * a + (1 - decay) * p,
                averages,
                jax.device_get(now['params']),
            )
            for a, wanted in zip(
                jax.tree.leaves(jax.device_get(now['ema'])), jax.tree.leaves(averages), strict=True
            ):
                np.testing.assert_allclose(a, wanted, rtol=1e-5, atol=1e-6)
    distance = max(
        np.abs(a - p).max()
        for a, p in zip(jax.tree.leaves(now['ema']), jax.tree.leaves(now['params']), strict=True)
    )
    assert distance > 1e-4


# Objectives.


def test_bytes_become_floats_from_minus_one_to_one():
    found = np.asarray(normalise(jnp.arange(256, dtype=jnp.uint8)))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.arange(256) / 127.5 - 1, atol=1e-6)
    assert found[0] == -1 and found[-1] == pytest.approx(1, abs=1e-7)
    assert (np.diff(found) > 0).all()


def test_floats_are_taken_as_they_are():
    x = jnp.array([[-3.0, 0.5]])
    np.testing.assert_array_equal(normalise(x), x)


@pytest.mark.parametrize('smoothing', [0.0, 0.1, 1.0])
def test_label_smoothing_spreads_its_share_over_all_classes(smoothing):
    label = np.array([0, 3, 2], np.int32)
    wanted = np.full((3, 4), smoothing / 4)
    wanted[np.arange(3), label] += 1 - smoothing
    found = targets(jnp.asarray(label), 4, smoothing)
    np.testing.assert_allclose(found, wanted, atol=1e-7)
    mixed = np.array([[0.25, 0.75, 0, 0]], np.float32)
    found = targets(jnp.asarray(mixed), 4, smoothing)
    np.testing.assert_allclose(found, mixed * (1 - smoothing) + smoothing / 4, atol=1e-7)


def fixed(logits):
    """An `apply` that gives these logits whatever the image."""
    return lambda variables, image, **_: (jnp.asarray(logits), {})


def np_sums(logits, label, mask):
    sums = dict.fromkeys(('loss', 'top1', 'top5', 'count'), 0.0)
    for row, own, real in zip(logits.astype(np.float64), label, mask, strict=True):
        if not real:
            continue
        sums['count'] += 1
        sums['loss'] += np.log(np.exp(row - row.max()).sum()) + row.max() - row[own]
        beaten = sum(not row[other] < row[own] for other in range(len(row)) if other != own)
        sums['top1'] += beaten < 1
        sums['top5'] += beaten < 5
    return sums


def evaluate(logits, label, mask):
    batch = {
        'image': jnp.zeros((len(label), *IMAGE)),
        'label': jnp.asarray(label, jnp.int32),
        'mask': jnp.asarray(mask, jnp.float32),
    }
    sums = classification.sums(fixed(np.asarray(logits, np.float32)))
    return {name: float(value) for name, value in sums({}, batch).items()}


@pytest.mark.parametrize('classes', [2, 4, 5, 6, 10])
def test_evaluation_sums_are_those_of_numpy(classes):
    rng = np.random.default_rng(classes)
    logits = rng.integers(-2, 3, (64, classes)).astype(np.float32)  # Full of ties.
    label, mask = rng.integers(0, classes, 64), rng.integers(0, 2, 64)
    found, wanted = evaluate(logits, label, mask), np_sums(logits, label, mask)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert 0 < wanted['top1'] < wanted['top5'] <= wanted['count'] == mask.sum()


def test_padding_counts_nothing_even_when_its_label_is_right():
    logits = np.eye(6, dtype=np.float32) * 9
    found = evaluate(logits, np.arange(6), [1, 1, 0, 0, 0, 0])
    assert (found['count'], found['top1'], found['top5']) == (2, 2, 2)


def test_ties_count_against_the_model():
    found = evaluate(np.zeros((3, 10)), [0, 5, 9], [1, 1, 1])
    assert (found['top1'], found['top5'], found['count']) == (0, 0, 3)


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_logits_that_are_not_finite_never_count_as_hits(value):
    logits = np.full((2, 6), value, np.float32)
    found = evaluate(logits, [0, 5], [1, 1])
    assert (found['top1'], found['top5'], found['count']) == (0, 0, 2)
    own = np.zeros((1, 6), np.float32)
    own[0, 2] = np.nan
    assert evaluate(own, [2], [1])['top1'] == evaluate(own, [2], [1])['top5'] == 0


def test_a_single_nan_among_the_others_prevents_a_hit():
    others = np.zeros((1, 6), np.float32)
    others[0, 2], others[0, 4] = 1, np.nan
    assert evaluate(others, [2], [1])['top1'] == 0


def test_an_infinite_logit_of_the_right_class_is_no_hit():
    infinite = np.zeros((1, 6), np.float32)
    infinite[0, 2] = np.inf
    assert evaluate(infinite, [2], [1])['top1'] == 0


def test_the_loss_of_padding_may_be_anything():
    logits = np.zeros((2, 6), np.float32)
    logits[1] = np.nan
    assert evaluate(logits, [0, 0], [1, 0])['loss'] == pytest.approx(np.log(6))


@pytest.mark.parametrize('sizes', [(8, 1, 1), (2, 2, 2)])
def test_the_evaluation_step_sums_over_all_devices(sizes):
    run = Run(8, sizes)
    batch = batch_of(0) | {'mask': np.float32(np.arange(BATCH) % 3 > 0)}
    sums = classification.sums(run.net.apply)
    with jax.set_mesh(run.mesh):
        now = run.start()
        found = steps.make_eval_step(sums, run.abstract_state, run.mesh)(
            now['params'], run.put(batch)
        )
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(now))
    wanted = np_sums(np_logits(batch), batch['label'], batch['mask'])
    assert {n: float(x) for n, x in found.items()} == pytest.approx(wanted, rel=1e-5)


def np_allowed(recent, sigmas, ratio):
    """The largest value that is no spike, by NumPy in float64."""
    known = recent[np.isfinite(recent)].astype(np.float64)
    tail = np.quantile(known, 0.9) - np.median(known)
    centre = max(np.median(known), np.nanmedian(recent[-8:].astype(np.float64)))
    return centre + max(sigmas * tail / 1.2816, (ratio - 1) * abs(centre))


@pytest.mark.parametrize('known', [15, 16, 40, 64])
@pytest.mark.parametrize('loc', [3.0, -3.0])
def test_a_spike_is_six_deviations_above_the_median_of_what_is_known(known, loc):
    rng = np.random.default_rng(known)
    recent = np.full(64, np.nan, np.float32)
    recent[-known:] = rng.normal(loc, 1.5, known)
    bound = np_allowed(recent, 6.0, 2.0)
    for value in (loc, bound - 1e-3, bound + 1e-3, 100.0):
        expected = known >= 16 and value > bound
        assert bool(steps.is_spike(jnp.asarray(recent), jnp.float32(value), 6.0, 2.0)) == expected


def test_what_varies_little_may_double():
    recent = jnp.full(64, 2.0)
    assert not steps.is_spike(recent, jnp.float32(3.99), 6.0, 2.0)
    assert steps.is_spike(recent, jnp.float32(4.01), 6.0, 2.0)


@jax.jit
def spikes_of(values):
    """Which of a sequence of values are spikes to those before, as gradient norms are compared."""

    def step(recent, value):
        found = steps.is_spike(recent, value, 6.0, 4.0)
        return jnp.append(recent[1:], value), found

    return jax.lax.scan(step, jnp.full(64, jnp.nan), values)[1]


def test_long_tails_and_drifts_are_sound_and_outliers_are_caught():
    rng, at = np.random.default_rng(0), np.arange(100, 4000, 100)
    tails = np.exp(rng.normal(0, 0.5, 4000)).astype(np.float32)
    for drift in (1.0, np.exp(-np.arange(4000) / 300), 1 + np.arange(4000) / 50):
        values = (tails * drift).astype(np.float32)
        assert np.asarray(spikes_of(values)).sum() <= 4, 'one in a thousand'
        caught = values.copy()
        caught[at] *= 30
        found = np.asarray(spikes_of(caught))
        assert found[at].mean() > 0.9 and np.delete(found, at).sum() <= 4


@pytest.mark.parametrize('times', [5.0, 1e3, 1e12])
def test_a_lasting_change_is_a_spike_five_times_at_most_and_a_few_in_a_row_are_caught(times):
    values = np.random.default_rng(1).normal(1, 0.05, 400).astype(np.float32)
    values[100:] *= times
    found = np.flatnonzero(np.asarray(spikes_of(values)))
    assert 3 <= len(found) <= 5 and found.tolist() == list(range(100, 100 + len(found)))
    values = np.random.default_rng(1).normal(1, 0.05, 400).astype(np.float32)
    values[100:103] *= times
    assert np.flatnonzero(np.asarray(spikes_of(values))).tolist() == [100, 101, 102]


@pytest.mark.parametrize('which', mostly_slow(['loss', 'grad_norm'], 'loss'))
def test_a_spike_changes_nothing_but_the_counters_and_is_remembered(watching, which):
    run = watching
    with jax.set_mesh(run.mesh):
        _, first = run.step(run.start(), run.put(floats(0)))
        seen = float(first[which])
        now = run.start()
        quiet = np.linspace(0.1, 0.12, state.WINDOW) * seen
        recent = {**jax.device_get(now['recent']), which: quiet.astype(np.float32)}
        where = state.shardings(run.abstract_state)['recent']
        now = {**now, 'recent': jax.tree.map(jax.device_put, recent, where)}
        before = jax.device_get(now)
        now, metrics = run.step(now, run.put(floats(0)))
        after = jax.device_get(now)
        assert (int(metrics['skipped']), int(after['step'])) == (1, 1)
        named = [name for name in ('loss', 'grad_norm') if metrics[f'{name}_spike']]
        assert named == [which]
        for part in ('params', 'opt'):
            assert jax.tree.all(
                jax.tree.map(lambda a, b: np.array_equal(a, b), after[part], before[part])
            )
        assert after['recent'][which][0] == pytest.approx(seen)
        # What lasts is no spike for long: a few at that level are the median of the newest.
        for _ in range(8):
            now, metrics = run.step(now, run.put(floats(0)))
        assert int(metrics['skipped_in_a_row']) == 0
        assert 1 <= int(metrics['skipped']) <= 5


@pytest.fixture(scope='module')
def watching():
    return Run(skip_sigmas=6.0)


# A task with a state of its own.

LINEAR, WEIGHT = (16, 8), 0.1


def teacher_loss(params, task_state, batch, rng, step):
    """Squared error of a linear model, drawn to its teacher more with every step."""
    kernel, teacher = params['head']['kernel'], task_state['teacher']['head']['kernel']
    answers = batch['x'] @ kernel
    error = jnp.square(answers - batch['y']).sum(-1).mean() / 2
    distance = jnp.square(kernel - teacher).sum() / 2
    return error + WEIGHT * step * distance, Aux({'distance': distance}, answers.mean(0))


def teacher_state(params):
    return {'teacher': jax.tree.map(jnp.copy, params), 'centre': jnp.zeros(LINEAR[1])}


def move_teacher(params, task_state, carried, step):
    keep = (1 + step) / (3 + step)
    return {
        'teacher': jax.tree.map(
            lambda a, p: keep * a + (1 - keep) * p, task_state['teacher'], params
        ),
        'centre': 0.9 * task_state['centre'] + 0.1 * carried,
    }


def pairs_of(i):
    rng = np.random.default_rng(i)
    x, y = (rng.standard_normal((BATCH, n)).astype(np.float32) for n in LINEAR)
    return {'x': x, 'y': y}


class Teacher:
    """A run of that task on one mesh."""

    def __init__(self, devices=1, sizes=(1, 1, 1), accumulation=1):
        self.mesh = sharding.make_mesh(*sizes, devices=jax.devices()[:devices])
        self.start = {'head': {'kernel': pairs_of(99)['x'][:16, :8]}}
        optimizer = optax.with_extra_args_support(optax.sgd(0.05))
        self.abstract_state = state.abstract(
            None, (), optimizer, False, self.mesh, 0, jax.eval_shape(lambda: self.start),
            teacher_state,
        )  # fmt: skip
        step = steps.update(
            teacher_loss, optimizer, lambda step: jnp.float32(0.05), self.mesh,
            accumulation=accumulation, after_update=move_teacher,
        )  # fmt: skip
        self.step = steps.make_train_step(step, self.abstract_state, self.mesh)
        self.optimizer = optimizer

    def train(self, batches):
        """(state on the host after each step, metrics of each step, last state)"""
        with jax.set_mesh(self.mesh):
            now = state.create(
                None, (), self.optimizer, 0, self.abstract_state, self.start, teacher_state
            )
            states, rows = [jax.device_get(now)], []
            for batch in batches:
                now, metrics = self.step(
                    now, jax.device_put(batch, sharding.batch_sharding(self.mesh))
                )
                states.append(jax.device_get(now))
                rows.append(jax.device_get(metrics))
        return states, rows, now


def np_teacher(start, batches):
    """The same in float64: (kernel, teacher, centre, loss) after each step."""
    kernel = start['head']['kernel'].astype(np.float64)
    teacher, centre = kernel.copy(), np.zeros(LINEAR[1])
    for step, batch in enumerate(batches):
        answers = batch['x'] @ kernel
        miss, away = answers - batch['y'], kernel - teacher
        loss = np.square(miss).sum(1).mean() / 2 + WEIGHT * step * np.square(away).sum() / 2
        kernel = kernel - 0.05 * (batch['x'].T @ miss / BATCH + WEIGHT * step * away)
        teacher = (teacher * (1 + step) + 2 * kernel) / (3 + step)
        centre = 0.9 * centre + 0.1 * answers.mean(0)
        yield kernel, teacher, centre, loss


TEACHERS = {
    'one device': dict(),
    'accumulated': dict(accumulation=4),
    '1x4x2 accumulated': dict(devices=8, sizes=(1, 4, 2), accumulation=2),
}


@pytest.mark.parametrize('which', TEACHERS)
def test_the_state_of_a_task_moves_as_its_recurrence_says(which):
    run, batches = Teacher(**TEACHERS[which]), [pairs_of(i) for i in range(5)]
    states, rows, _ = run.train(batches)
    wanted = list(np_teacher(run.start, batches))
    for now, row, (kernel, teacher, centre, loss) in zip(states[1:], rows, wanted, strict=True):
        np.testing.assert_allclose(now['params']['head']['kernel'], kernel, rtol=1e-5, atol=1e-6)
        found = now['task']['teacher']['head']['kernel']
        np.testing.assert_allclose(found, teacher, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(now['task']['centre'], centre, rtol=1e-5, atol=1e-6)
        assert float(row['loss']) == pytest.approx(loss, rel=1e-5)
    assert np.abs(wanted[-1][0] - wanted[-1][1]).max() > 1e-3
    assert 'distance' in rows[0]


@pytest.mark.parametrize('which', ['one device', '1x4x2 accumulated'])
def test_a_skipped_update_moves_no_state_of_a_task(which):
    bad = pairs_of(7)
    bad['x'][3, 2] = np.nan
    states, rows, _ = Teacher(**TEACHERS[which]).train([pairs_of(0), bad, pairs_of(1)])
    before, after = (trees.flatten(states[i]['task']) for i in (1, 2))
    assert [int(row['skipped_in_a_row']) for row in rows] == [0, 1, 0]
    for name, leaf in after.items():
        assert leaf.tobytes() == before[name].tobytes(), name
    for name, leaf in trees.flatten(states[3]['task']).items():
        assert np.isfinite(leaf).all() and np.abs(leaf - after[name]).max() > 0, name


def test_the_state_of_a_task_is_saved_with_the_rest_and_goes_on_on_any_mesh(tmp_path):
    run = Teacher(**TEACHERS['1x4x2 accumulated'])
    states, _, last = run.train([pairs_of(i) for i in range(3)])
    with checkpoint.Manager(tmp_path, keep_last=1) as manager:
        manager.save(last, {}, {})
    for other in (run, Teacher(8, (8, 1, 1)), Teacher()):
        restored = checkpoint.restore(tmp_path, 3, other.abstract_state)
        found, wanted = trees.flatten(jax.device_get(restored)), trees.flatten(states[-1])
        assert found.keys() == wanted.keys() and 'task/teacher/head/kernel' in found
        for name, leaf in wanted.items():
            assert found[name].tobytes() == leaf.tobytes(), name


def test_a_copy_of_the_parameters_in_the_state_of_a_task_lies_like_them():
    run = Teacher(**TEACHERS['1x4x2 accumulated'])
    _, _, last = run.train([pairs_of(0)])
    kernel, teacher = last['params']['head']['kernel'], last['task']['teacher']['head']['kernel']
    assert teacher.sharding.is_equivalent_to(kernel.sharding, 2)
    assert {shard.data.shape for shard in teacher.addressable_shards} == {(4, 4)}


class Teaching(NamedTuple):
    """A tiny linear task of a teacher with targets, on one mesh."""

    step: Any
    start: Any
    mesh: Any


RATE = 0.25


def teaching(devices=1, sizes=(1, 1, 1), accumulation=1, sam_rho=0.0):
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[:devices])

    def rows(task_state, batch, rng, step):
        return {'out': batch['x'] @ task_state['teacher']['w']}

    def shared(task_state, all_rows, step):
        return all_rows['out'].mean(0) - task_state['centre']

    def loss(params, task_state, batch, rng, step):
        wanted = batch['targets']['out'] - task_state['targets'][None]
        value = jnp.square(batch['x'] @ params['w'] - wanted).sum(-1).mean()
        return value, Aux({}, {'seen': task_state['targets']})

    def after(params, task_state, carried, step):
        return {'centre': task_state['centre'] + 0.1 * carried['seen']}

    def initial(params):
        return {'centre': jnp.zeros(3)}

    optimizer = optax.sgd(0.05)
    wrapped = optax.with_extra_args_support(optimizer)
    abstract = jax.eval_shape(
        lambda: state.from_params({'w': jnp.zeros((4, 3))}, wrapped, True, initial)
    )
    where = sharding.shardings_for(abstract, mesh)
    abstract = jax.tree.map(
        lambda leaf, w: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=w), abstract, where
    )
    step = steps.update(
        loss,
        wrapped,
        lambda step: jnp.float32(0.05),
        mesh,
        accumulation=accumulation,
        sam_rho=sam_rho,
        after_update=after,
        teacher_rate=lambda step: RATE / (1 + step),
        targets=Targets(rows, shared),
    )
    weights = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    begin = jax.jit(
        lambda w: state.from_params({'w': w}, wrapped, True, initial), out_shardings=where
    )
    return Teaching(steps.make_train_step(step, abstract, mesh), lambda: begin(weights), mesh)


def taught(run, batches):
    with jax.set_mesh(run.mesh):
        now, losses = run.start(), []
        for x in batches:
            batch = jax.device_put({'x': x}, sharding.batch_sharding(run.mesh))
            now, metrics = run.step(now, batch)
            losses.append(metrics['loss'])
        return jax.device_get((losses, {n: now[n] for n in ('params', 'ema', 'task')}))


def batches_of_numbers(count=4):
    rng = np.random.default_rng(1)
    return [rng.standard_normal((16, 4)).astype(np.float32) + 1 for _ in range(count)]


def test_a_teacher_and_targets_follow_their_definition():
    """In NumPy float64: targets of the whole batch, the gradient, the teacher, then the centre."""
    w = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32).astype(np.float64)
    teacher, centre, wanted = w.copy(), np.zeros(3), []
    for number, x in enumerate(np.float64(batches_of_numbers())):
        out = x @ teacher
        shift = out.mean(0) - centre
        error = x @ w - (out - shift)
        wanted.append((error**2).sum(-1).mean())
        w = w - 0.05 * 2 * x.T @ error / len(x)
        teacher = teacher + RATE / (1 + number) * (w - teacher)
        centre = centre + 0.1 * shift
    losses, now = taught(teaching(), batches_of_numbers())
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    np.testing.assert_allclose(now['params']['w'], w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(now['ema']['w'], teacher, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(now['task']['centre'], centre, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    'options', [{'accumulation': 4}, {'devices': 8, 'sizes': (2, 4, 1), 'accumulation': 2}]
)
@pytest.mark.parametrize('sam_rho', [0.0, 0.1])
def test_targets_of_the_batch_are_the_same_in_parts_and_on_a_mesh(options, sam_rho):
    wanted = taught(teaching(sam_rho=sam_rho), batches_of_numbers())
    found = taught(teaching(sam_rho=sam_rho, **options), batches_of_numbers())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)


def test_a_skipped_step_moves_neither_teacher_nor_centre():
    batches = batches_of_numbers(2)
    _, before = taught(teaching(), batches[:1])
    _, after = taught(teaching(), [batches[0], batches[1] * np.inf])
    jax.tree.map(np.testing.assert_array_equal, after, before)
