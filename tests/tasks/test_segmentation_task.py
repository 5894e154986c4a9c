"""Segmentation: the head and its loss against NumPy, and runs that learn on any mesh."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gate import mostly_slow

from big_vit import config
from big_vit.build.evaluations import build_evaluators
from big_vit.build.experiment import build_experiment, fresh_state, train_batches
from big_vit.build.steps import build_train_step
from big_vit.data.sources import registry
from big_vit.data.sources.base import Source
from big_vit.errors import UserError
from big_vit.models.vit import make_vit
from big_vit.tasks import segmentation
from big_vit.tasks.task import ExampleShape, Run

SIZES = dict(patch_size=(4, 4), width=16, depth=3, mlp_dim=24, num_heads=2, dtype=jnp.float32)
IMAGE, K = (16, 24, 3), 5


def model_of(trunk=(), **options):
    made = make_vit(0, **{**SIZES, **dict(trunk)})
    return segmentation.segmentation(**options).model(made, ExampleShape({'image': IMAGE}, K))


def initialised(model):
    params = model.init(jax.random.key(0), jnp.zeros((1, *IMAGE)))['params']
    rng = np.random.default_rng(0)
    # The head too, which starts at 0.
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(x.dtype), params)


def batch_of(count=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 1, 2, 3, 4, 255], (count, *IMAGE[:2])).astype(np.int32)
    labels[0, :, :20] = 255
    image = rng.integers(0, 256, (count, *IMAGE), dtype=np.uint8)
    return {'image': jnp.asarray(image), 'segmentation': jnp.asarray(labels)}


def standardised(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize(
    'last_blocks, scan', mostly_slow([(1, True), (2, True), (2, False)], (2, True))
)
def test_logits_are_those_of_a_linear_layer_on_the_tokens_of_the_last_blocks(last_blocks, scan):
    model = model_of({'class_token': True, 'registers': 2, 'scan': scan}, last_blocks=last_blocks)
    params, batch = initialised(model), batch_of()
    image = jnp.asarray(batch['image'], jnp.float32) * 2 / 255 - 1
    got = segmentation.segment(model)(params, batch)
    assert got.shape == (3, 4, 6, K)
    _, extra = model.trunk.apply({'params': params}, image, capture=('blocks',))
    trunk, head = (
        jax.tree.map(np.asarray, params[name]) for name in ('Transformer', 'decode_head')
    )
    last = trunk['encoder_norm']
    tokens = [
        standardised(np.asarray(x, np.float64)) * last['scale'] + last['bias']
        for x in extra['blocks'][-last_blocks:]
    ]
    joined = np.concatenate([x[:, 3:] for x in tokens], axis=-1)
    joined = standardised(joined) * head['norm']['scale'] + head['norm']['bias']
    want = joined @ head['classifier']['kernel'] + head['classifier']['bias']
    np.testing.assert_allclose(np.asarray(got).reshape(3, 24, K), want, atol=2e-5)


def test_the_loss_is_the_mean_over_all_pixels_that_count():
    model = model_of()
    params, batch = initialised(model), batch_of()
    value, aux = segmentation.segmentation_loss(model)(params, (), batch, None, 0)
    logits = np.asarray(segmentation.segment(model)(params, batch), np.float64)
    wide = np.stack([cv2.resize(one, IMAGE[1::-1], interpolation=1) for one in logits])
    labels = np.asarray(batch['segmentation'])
    kept = labels != 255
    wide, own = wide[kept], labels[kept]
    error = np.log(np.exp(wide).sum(-1)) - wide[np.arange(len(own)), own]
    assert float(value) == pytest.approx(error.mean(), rel=1e-5)
    accuracy = float(aux.metrics['pixel_accuracy'])
    assert accuracy == pytest.approx((wide.argmax(-1) == own).mean(), abs=1e-6)


def test_pixels_that_do_not_count_have_no_gradient_and_wrong_labels_no_finite_loss():
    model, batch = model_of(), batch_of()
    params, loss = initialised(model), segmentation.segmentation_loss(model)
    nothing = {**batch, 'segmentation': jnp.full_like(batch['segmentation'], 255)}
    value, grads = jax.value_and_grad(lambda p: loss(p, (), nothing, None, 0)[0])(params)
    assert value == 0 and not any(np.asarray(g).any() for g in jax.tree.leaves(grads))
    wrong = {**batch, 'segmentation': batch['segmentation'].at[1, 2, 3].set(K)}
    assert np.isnan(loss(params, (), wrong, None, 0)[0])


def test_dropout_leaves_out_a_feature_of_all_patches():
    head = segmentation.LinearHead(make_vit(0, **SIZES).encoder.style, 16, 0.5)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 7, 16)), jnp.float32)
    params = head.init(jax.random.key(0), x, True)['params']
    params['classifier']['kernel'] = jnp.eye(16)
    keep = {'dropout': jax.random.key(1)}
    dropped = np.asarray(head.apply({'params': params}, x, False, rngs=keep)) == 0
    assert (dropped.all(1) == dropped.any(1)).all() and 0.2 < dropped.mean() < 0.8


# Runs.


def squares(request):
    """Pictures of a grey ground, with a red and a blue square of another class each."""
    rng = np.random.default_rng(len(request.split))
    count, side = 37, request.image_size[0]
    images = rng.integers(90, 130, (count, side, side, 3)).astype(np.uint8)
    labels = np.zeros((count, side, side), np.int32)
    for image, label in zip(images, labels, strict=True):
        for one, channel in ((1, 0), (2, 2)):
            y, x = rng.integers(0, side // 2, 2)
            image[y : y + side // 2, x : x + side // 2] = 40
            image[y : y + side // 2, x : x + side // 2, channel] = 220
            label[y : y + side // 2, x : x + side // 2] = one
        label[: rng.integers(0, side // 4)] = 255

    def load(index):
        return {
            'image': images[index],
            'segmentation': labels[index],
            'label': np.zeros(len(index), np.int32),
        }

    names = ('ground', 'red', 'blue')
    shape = (side, side, 3)
    return Source('squares', request.split, count, 3, shape, load, True, class_names=names)


SETTINGS = {
    'task.name': 'segmentation',
    'model.variant': 'mu/2',
    'model.dtype': 'float32',
    'image_size': 16,
    'batch_size': 16,
    'total_steps': 3,
    'lr': 1e-2,
    'data.name': 'squares',
    'schedule.name': 'constant',
    'evals.val.type': 'segmentation',
    'evals.val.split': 'other',
    'evals.val.transform': '',
    'mesh.replica': 8,
}


@pytest.fixture
def source(monkeypatch):
    monkeypatch.setitem(registry.SOURCES, 'squares', squares)


def trained(changes=()):
    """Losses of a run, and the metrics of its evaluation."""
    settings = config.resolve({**SETTINGS, **dict(changes)})
    parts = build_experiment(settings)
    now, step, losses = fresh_state(parts, 0), build_train_step(settings, parts), []
    with train_batches(settings, parts, 0) as batches:
        for _ in range(parts.total_steps):
            now, found = jax.block_until_ready(step(now, next(batches)))
            losses.append([float(found[name]) for name in ('loss', 'pixel_accuracy', 'grad_norm')])
    evaluators = build_evaluators(settings, parts)
    with jax.transfer_guard('disallow'):  # As in training.
        metrics = {name: run(now['params'], {}) for name, run in evaluators.items()}
    return np.array(losses), metrics


MESHES = {
    'one': {'mesh.replica': 1, 'mesh.tensor': 8},
    'sharded': {'mesh.replica': 2, 'mesh.fsdp': 4, 'mesh.min_shard_size': 0},
    'parts': {'mesh.replica': 4, 'mesh.fsdp': 2, 'accumulation': 2},
}


@pytest.mark.parametrize('mesh', mostly_slow([*MESHES], 'parts'))
def test_meshes_and_accumulation_give_the_same_losses_and_metrics(mesh, source):
    wanted, found = trained()
    losses, metrics = trained(MESHES[mesh])
    np.testing.assert_allclose(losses, wanted, rtol=2e-4)
    assert metrics['val'] == pytest.approx(found['val'], abs=2e-3)
    assert metrics['val']['count'] == 37
    np.testing.assert_allclose(wanted[0, 0], np.log(3), rtol=1e-5)  # The head starts at 0.


@pytest.mark.slow
def test_a_run_learns_and_windows_see_larger_pictures(source):
    larger = {'evals.large.type': 'segmentation', 'evals.large.split': 'other'}
    larger |= {'evals.large.transform': 'resize(24)', 'evals.large.stride': 5}
    larger |= {'evals.large.scales': (0.75, 1.0), 'evals.large.flips': True}
    losses, metrics = trained({'total_steps': 60, **larger})
    assert losses[-1, 1] > 0.9 and losses[-1, 0] < 0.4
    assert metrics['val']['miou'] > 0.75
    assert list(metrics['val']) == ['miou', 'pixel_accuracy', 'mean_accuracy', 'count']


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'task.last_blocks': 3}, 'task.last_blocks=3, but the model has 1 block'),
        ({'model.pool': 'map'}, 'trains no pooling'),
        ({'model.patch_dropout': 0.5}, 'needs all patches'),
        (
            {'data.name': 'digits'},
            'but no segmentation, which the task learns',
        ),
        ({'evals.val.type': 'classification'}, 'needs logits over classes'),
        ({'evals.val.name': 'digits', 'evals.val.split': 'test'}, 'evals.val: digits test'),
    ],
)
def test_what_cannot_be_learned_is_refused_by_its_key(changes, message, source):
    with pytest.raises(UserError, match=message) as caught:
        settings = config.resolve({**SETTINGS, **changes})
        build_evaluators(settings, build_experiment(settings))
    assert '\n' not in str(caught.value)


def test_more_classes_than_label_maps_can_hold_are_refused():
    with pytest.raises(UserError, match='256 classes of pixels, but 255 stands for'):
        segmentation.segmentation().model(make_vit(0, **SIZES), ExampleShape({'image': IMAGE}, 256))


def test_targets_are_those_of_the_whole_batch():
    targets = segmentation.valid_pixels(None, Run(1, 3))
    batch = batch_of()
    step = jnp.int32(0)
    rows = targets.rows((), batch, jax.random.key(0), step)
    counts = (np.asarray(batch['segmentation']) != 255).sum((1, 2))
    np.testing.assert_array_equal(rows['pixels'], counts)
    assert float(targets.shared((), rows, step)['pixels']) == pytest.approx(counts.mean())


def write_ade20k(root):
    """Write a few pictures and label maps as the challenge has them."""
    rng = np.random.default_rng(0)
    for split, count in (('training', 6), ('validation', 3)):
        for kind in ('images', 'annotations'):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            size = rng.integers(30, 60, 2)
            picture = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
            labels = np.full(size, rng.integers(1, 151), np.uint8)
            labels[: size[0] // 2] = rng.integers(0, 151)
            cv2.imwrite(str(root / 'images' / split / f'ADE_{i}.jpg'), picture)
            cv2.imwrite(str(root / 'annotations' / split / f'ADE_{i}.png'), labels)
    rows = ''.join(f'{k}\t0.1\t1\t1\t1\tclass {k}\n' for k in range(1, 151))
    (root / 'objectInfo150.txt').write_text('Idx\tRatio\tTrain\tVal\tStuff\tName\n' + rows)
    return root


@pytest.mark.slow
@pytest.mark.parametrize('head', ['linear', 'mask'])
def test_the_recipe_of_ade20k_trains_and_is_scored_by_windows(head, tmp_path):
    small = {
        'model.width': 16, 'model.depth': 4, 'model.mlp_dim': 16, 'model.num_heads': 2,
        'image_size': 28, 'batch_size': 8, 'total_steps': 2, 'schedule.warmup_steps': 1,
        'data.num_examples': None, 'evals.val.num_examples': None, 'evals.val.stride': 20,
        'evals.val.transform': (
            'resize_short(28, most=56) | pad_to(56) | normalize'
        ),
        'mesh.replica': 8,
    }  # fmt: skip
    if head == 'mask':
        small |= {'task.queries': 9, 'task.query_blocks': 2, 'task.points': 32}
    name = f'configs/vit_seg_ade20k.py:s14,head={head},path={write_ade20k(tmp_path / "data")}'
    settings = config.load(name, [(key, str(value)) for key, value in small.items()])
    parts = build_experiment(settings)
    now, step = fresh_state(parts, 0), build_train_step(settings, parts)
    before = jax.device_get(now['params'])
    with train_batches(settings, parts, 0) as batches:
        for _ in range(2):
            now, found = jax.block_until_ready(step(now, next(batches)))
    assert np.isfinite(float(found['loss'])) and found['skipped'] == 0
    after = jax.device_get(now['params'])
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    trunk_moved = any(jax.tree.leaves({n: x for n, x in moved.items() if n != 'decode_head'}))
    assert any(jax.tree.leaves(moved['decode_head'])) and trunk_moved == (head == 'mask')
    scores = build_evaluators(settings, parts)['val'](now['params'], {})
    assert scores['count'] == 3 and 0 <= scores['miou'] <= 1
