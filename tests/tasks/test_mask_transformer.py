"""EoMT: logits of transformers on the same weights, the loss against NumPy and SciPy, and runs."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from big_vit import sharding
from big_vit.errors import UserError
from big_vit.models.placement import placed
from big_vit.models.vit import make_vit
from big_vit.tasks import mask_transformer, segmentation
from big_vit.tasks.task import ExampleShape, Run

ORACLE = Path(__file__).parent.parent / 'oracles' / 'eomt.npz'
K, QUERIES, WIDTH, HEADS, DEPTH, BLOCKS = 5, 6, 32, 2, 4, 2


@pytest.fixture(scope='module')
def theirs():
    with np.load(ORACLE) as file:
        return dict(file)


def model_of(**changes):
    settings = dict(
        patch_size=(8, 8), width=WIDTH, depth=DEPTH, mlp_dim=2 * WIDTH, num_heads=HEADS,
        dtype=jnp.float32, class_token=True, registers=2, posemb='learned', layer_scale=1.0,
        activation='gelu', scan=False, pool='cls',
    )  # fmt: skip
    trunk = make_vit(0, **{**settings, **changes})
    task = segmentation.segmentation(head='mask', queries=QUERIES, query_blocks=BLOCKS, points=40)
    return task.model(trunk, ExampleShape({'image': (32, 32, 3)}, K))


def converted(theirs):
    """Their weights under our names."""

    def dense(name):
        return {'kernel': theirs[f'p/{name}.weight'].T, 'bias': theirs[f'p/{name}.bias']}

    def norm(name):
        return {'scale': theirs[f'p/{name}.weight'], 'bias': theirs[f'p/{name}.bias']}

    def heads(name):
        made, size = dense(name), (HEADS, WIDTH // HEADS)
        return {'kernel': made['kernel'].reshape(WIDTH, *size), 'bias': made['bias'].reshape(size)}

    blocks = {}
    for i in range(DEPTH):
        own = f'layers.{i}'
        out = dense(f'{own}.attention.out_proj')
        blocks[f'encoderblock_{i}'] = {
            'LayerNorm_0': norm(f'{own}.norm1'),
            'LayerNorm_1': norm(f'{own}.norm2'),
            'LayerScale_0': {'scale': theirs[f'p/{own}.layer_scale1.lambda1']},
            'LayerScale_1': {'scale': theirs[f'p/{own}.layer_scale2.lambda1']},
            'MultiHeadDotProductAttention_0': {
                **{
                    name: heads(f'{own}.attention.{name[0]}_proj')
                    for name in ('query', 'key', 'value')
                },
                'out': {
                    'kernel': out['kernel'].reshape(HEADS, WIDTH // HEADS, WIDTH),
                    'bias': out['bias'],
                },
            },
            'MlpBlock_0': {'Dense_0': dense(f'{own}.mlp.fc1'), 'Dense_1': dense(f'{own}.mlp.fc2')},
        }
    scale = 'upscale_block.block.0'
    patches = 'embeddings.patch_embeddings.projection'
    return {
        'cls': theirs['p/embeddings.cls_token'],
        'registers': theirs['p/embeddings.register_tokens'],
        'pos_embedding': theirs['p/embeddings.position_embeddings.weight'][None],
        'embedding': {
            'kernel': theirs[f'p/{patches}.weight'].transpose(2, 3, 1, 0),
            'bias': theirs[f'p/{patches}.bias'],
        },
        'Transformer': {**blocks, 'encoder_norm': norm('layernorm')},
        'decode_head': {
            'query': theirs['p/query.weight'][None],
            'classifier': dense('class_predictor'),
            **{f'mask_layers_{i}': dense(f'mask_head.fc{i + 1}') for i in range(3)},
            'expansions_0': {'kernel': theirs[f'p/{scale}.conv1.weight'].transpose(0, 2, 3, 1)},
            'expansion_bias_0': theirs[f'p/{scale}.conv1.bias'],
            'smoothers_0': {'kernel': theirs[f'p/{scale}.conv2.weight'].transpose(2, 3, 1, 0)},
            'norms_0': norm(f'{scale}.layernorm2d'),
        },
    }


@pytest.mark.parametrize('share', [1, 0])
def test_logits_are_those_of_transformers_with_and_without_masked_attention(share, theirs):
    model, params = model_of(), converted(theirs)
    image = jnp.asarray(theirs['image'].transpose(0, 2, 3, 1))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image))['params']
    want = jax.tree.map(lambda x: x.shape, shapes)
    assert jax.tree.map(np.shape, params) == want
    masking = jnp.ones(BLOCKS) if share else None
    found = jax.jit(lambda p, x: model.apply({'params': p}, x, masking=masking))(params, image)
    assert found.classes.shape[0] == (BLOCKS + 1 if share else 1)
    np.testing.assert_allclose(found.classes[-1], theirs[f'classes_{share}'], atol=5e-5)
    np.testing.assert_allclose(found.masks[-1], theirs[f'masks_{share}'], atol=5e-5)
    assert np.abs(theirs['masks_1'] - theirs['masks_0']).max() > 1e-2


# The loss, in float64.


def bilinear(image, points):
    """Interpolated values with zeros around, point by point."""
    height, width = image.shape
    found = []
    for x, y in points * (width, height) - 0.5:
        value = 0.0
        for row in (int(np.floor(y)), int(np.floor(y)) + 1):
            for column in (int(np.floor(x)), int(np.floor(x)) + 1):
                if 0 <= row < height and 0 <= column < width:
                    value += image[row, column] * (1 - abs(x - column)) * (1 - abs(y - row))
        found.append(value)
    return np.array(found)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def loss_by_hand(classes, masks, labels, points, key, count):
    """The losses of a batch, whose draws are those that the key gives."""
    first, second = jax.random.split(key)
    places = np.asarray(jax.random.uniform(first, (len(labels), points, 2)), np.float64)
    keys, sums = jax.random.split(second, len(labels)), np.zeros(4)
    for b, own in enumerate(labels):
        present = [k for k in range(K) if (own == k).any()]
        order = present + [k for k in range(K) if k not in present]
        probability = np.exp(classes[b]) / np.exp(classes[b]).sum(-1, keepdims=True)
        seen = np.array([bilinear(mask, places[b]) for mask in masks[b]])
        cost = np.zeros((len(present), QUERIES))
        for i, k in enumerate(present):
            wanted = bilinear(own == k, places[b])
            for q in range(QUERIES):
                inside = sigmoid(seen[q])
                entropy = -(wanted * np.log(inside) + (1 - wanted) * np.log(1 - inside)).mean()
                dice = 1 - (2 * (inside * wanted).sum() + 1) / (inside.sum() + wanted.sum() + 1)
                cost[i, q] = 5 * entropy + 5 * dice - 2 * probability[q, k]
        rows, columns = linear_sum_assignment(cost)
        goal, weight = np.full(QUERIES, K), np.full(QUERIES, 0.1)
        goal[columns] = np.array(present)[rows]
        weight[columns] = 1
        sums[0] -= (weight * np.log(probability[np.arange(QUERIES), goal])).sum()
        sums[1] += weight.sum()
        # Points of classes that are not there are drawn too, and count for nothing.
        queries = np.concatenate([columns, np.zeros(len(order) - len(present), int)])
        drawn = mask_transformer.uncertain_points(
            keys[b], jnp.asarray(masks[b][queries], jnp.float32), points
        )
        for i, (k, q) in enumerate(zip(present, columns, strict=True)):
            at = np.asarray(drawn[i], np.float64)
            wanted, inside = bilinear(own == k, at), sigmoid(bilinear(masks[b][q], at))
            sums[2] -= (wanted * np.log(inside) + (1 - wanted) * np.log(1 - inside)).mean()
            sums[3] += 1 - (2 * (inside * wanted).sum() + 1) / (inside.sum() + wanted.sum() + 1)
    return {'class': sums[0] / sums[1], 'mask': sums[2] / count, 'dice': sums[3] / count}


def case(seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, (2, 12, 16)).astype(np.int32)
    labels[0][labels[0] == 2] = 0
    labels[:, :3] = 255
    return rng.normal(0, 1, (2, QUERIES, K + 1)), rng.normal(0, 2, (2, QUERIES, 6, 8)), labels


def test_the_loss_of_a_block_is_that_of_numpy_and_of_scipys_matching():
    (classes, masks, labels), points, key = case(), 16, jax.random.key(5)
    count = sum(len({*np.unique(own)} - {255}) for own in labels)
    whole = mask_transformer.Whole(jnp.array(count), 2)
    given = (jnp.asarray(x, jnp.float32) for x in (classes, masks))
    found = mask_transformer.set_loss(*given, jnp.asarray(labels), points, key, whole)
    want = loss_by_hand(classes, masks, labels, points, key, count)
    assert {name: float(x) for name, x in found.items()} == pytest.approx(want, rel=2e-5)


def test_devices_match_their_own_pictures_alone():
    (classes, masks, labels), key = case(), jax.random.key(5)
    given = (*(jnp.asarray(x, jnp.float32) for x in (classes, masks)), jnp.asarray(labels), 16, key)
    whole = mask_transformer.Whole(jnp.array(5), 2)
    want = mask_transformer.set_loss(*given, whole)
    matchings = []

    def by_device(function):
        matchings.append(function)
        return sharding.by_device(sharding.make_mesh(2, 1, 1, jax.devices()[:2]))(function)

    with_mesh = jax.jit(lambda: mask_transformer.set_loss(*given, whole, by_device))()
    assert {name: float(x) for name, x in with_mesh.items()} == pytest.approx(
        {name: float(x) for name, x in want.items()}, rel=1e-5
    )
    assert len(matchings) == 1
    # A mesh gives the function to the model, and its loss to the matching.
    model = placed(model_of(), by_device=by_device)
    image = jnp.zeros((2, 32, 32, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), image)['params']
    loss = mask_transformer.mask_loss(model, Run(1, 2), 16)
    batch = {'image': image, 'segmentation': jnp.zeros((2, 32, 32), jnp.int32)}
    jax.eval_shape(loss, params, (), batch, key, jnp.int32(0))
    assert len(matchings) > 1


def test_most_points_are_where_a_mask_is_least_certain():
    ramp = jnp.broadcast_to(jnp.linspace(-4, 4, 64)[None], (64, 64))
    points = np.asarray(mask_transformer.uncertain_points(jax.random.key(0), ramp[None], 400))[0]
    assert points.shape == (400, 2) and points.min() >= 0 and points.max() <= 1
    near = np.abs(points[:, 0] - 0.5) < 0.16
    assert near[:300].all() and 0.2 < near[300:].mean() < 0.45


def test_masked_attention_ends_block_after_block():
    times = (0.0, 1 / 6, 1.5 / 6, 1.0)
    shares = [np.asarray(mask_transformer.masking_shares(4, at)) for at in times]
    np.testing.assert_allclose(shares[0], 1)
    np.testing.assert_allclose(shares[1], 1, atol=1e-6)
    np.testing.assert_allclose(shares[2], [0.5**0.9, 1, 1, 1], atol=1e-6)
    np.testing.assert_allclose(shares[3], [0, 0, 0, 0], atol=1e-6)


def test_parts_of_a_batch_sum_to_the_loss_of_the_whole():
    # Bands of classes, each with a query that is sure of it, or draws would decide the matching.
    labels = np.arange(16)[None, None] // np.array([6, 4])[:, None, None] + np.zeros(
        (2, 12, 1), int
    )
    masks = np.stack([4 * (labels[:, ::2, ::2] == k) - 2 for k in range(QUERIES)], axis=1)
    classes = np.broadcast_to(4 * np.eye(QUERIES, K + 1), (2, QUERIES, K + 1))
    noise = np.random.default_rng(0).normal(0, 0.1, masks.shape)
    classes, masks = jnp.asarray(classes, jnp.float32), jnp.asarray(masks + noise, jnp.float32)
    labels = jnp.asarray(labels, jnp.int32)
    targets = mask_transformer.classes_of_batch(model_of(), Run(1, 2))
    step = jnp.int32(0)
    rows = targets.rows((), {'segmentation': labels}, jax.random.key(0), step)
    assert rows['classes'].tolist() == [3, 4]
    whole = mask_transformer.Whole(targets.shared((), rows, step)['classes'], 2)
    each = [
        mask_transformer.set_loss(
            classes[i : i + 1], masks[i : i + 1], labels[i : i + 1], 2000, jax.random.key(i), whole
        )
        for i in range(2)
    ]
    both = mask_transformer.set_loss(classes, masks, labels, 2000, jax.random.key(9), whole)
    # The cross-entropy is exact where the matching is the same, masks up to the points drawn.
    assert float(each[0]['class'] + each[1]['class']) == pytest.approx(
        float(both['class']), rel=1e-5
    )
    for name in ('mask', 'dice'):
        assert float(each[0][name] + each[1][name]) == pytest.approx(float(both[name]), rel=0.05)


def test_scores_of_pixels_are_masks_weighted_by_their_classes(theirs):
    model, params = model_of(), jax.tree.map(jnp.asarray, converted(theirs))
    image = jnp.asarray(theirs['image'].transpose(0, 2, 3, 1))
    scores = np.asarray(mask_transformer.segment(model)(params, {'image': image}))
    assert scores.shape == (2, 32, 32, K)
    raised = np.exp(theirs['classes_0'].astype(np.float64))
    likely = (raised / raised.sum(-1, keepdims=True))[..., :-1]
    import cv2

    for b in range(2):
        masks = np.stack(
            [cv2.resize(mask, (32, 32), interpolation=1) for mask in theirs['masks_0'][b]]
        )
        want = np.einsum('qhw,qk->hwk', sigmoid(masks.astype(np.float64)), likely[b])
        np.testing.assert_allclose(scores[b], want, atol=1e-4)


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'scan': True}, 'set model.scan=false'),
        ({'depth': 1}, 'task.query_blocks=2, but the model has 1 block'),
        ({'posemb': 'relative'}, 'no relative positions'),
        ({'posemb': 'rope', 'rope_shift': 0.1}, 'queries have no place'),
    ],
)
def test_models_that_cannot_take_queries_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        model_of(**changes)


def test_an_option_of_the_other_head_is_refused():
    with pytest.raises(UserError, match='queries is read with'):
        segmentation.segmentation(queries=5)
    with pytest.raises(UserError, match='dropout is read with'):
        segmentation.segmentation(head='mask', dropout=0.1)
