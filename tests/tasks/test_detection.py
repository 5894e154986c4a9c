"""Detection: padding, queries in the trunk, what is refused, and what evaluations are told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vit.errors import UserError
from big_vit.models.vit import make_vit
from big_vit.tasks.detection import detection
from big_vit.tasks.task import ExampleShape, Run

CANVAS = (16, 24)


def made(trunk=None, image=(*CANVAS, 3), boxes=3, classes=2, **options):
    settings = dict(patch_size=(8, 8), width=16, depth=1, mlp_dim=24, num_heads=2)
    trunk = make_vit(0, **{**settings, 'dtype': jnp.float32, **(trunk or {})})
    task = detection(**{'queries': 4, 'decoder_depth': 1, **options})
    return task, task.model(trunk, ExampleShape({'image': image, 'boxes': (boxes, 4)}, classes))


def drawn(model, image):
    """Parameters none of which is zero."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)['params']
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), shapes)


@pytest.mark.slow
@pytest.mark.parametrize('place', ['decoder', 'trunk'])
def test_padding_changes_nothing(place):
    """What lies beyond a picture is not seen, and where it ends tokens end."""
    trunk = dict(posemb='sincos2d_detr', posemb_per_block=True, post_norm=True)
    _, model = made(trunk, query_place=place)
    rng = np.random.default_rng(1)
    image = jnp.asarray(rng.normal(size=(1, *CANVAS, 3)), jnp.float32)
    size = jnp.array([[8, 13]])
    params = drawn(model, image)
    answer = jax.jit(model.apply)
    given = {'image': image, 'picture_size': size}
    # The second column of patches is part of the picture, whose right edge it crosses.
    cut = image.at[:, :, 13:].set(0)[:, :8, :16]
    wanted = answer({'params': params}, {'image': cut, 'picture_size': size})
    found = answer({'params': params}, given)
    np.testing.assert_allclose(found.logits, wanted.logits, atol=2e-6)
    np.testing.assert_allclose(found.boxes, wanted.boxes, atol=2e-6)
    assert np.abs(found.logits - answer({'params': params}, image).logits).max() > 1e-3


@pytest.mark.slow
def test_detections_are_the_last_block_s_best_classes():
    task, model = made(decoder_depth=2, classes=3)
    image = jnp.asarray(np.random.default_rng(2).normal(size=(2, *CANVAS, 3)), jnp.float32)
    params = drawn(model, image)
    predicted = jax.jit(model.apply)({'params': params}, image)
    assert predicted.logits.shape == (2, 2, 4, 4)
    found = jax.jit(task.detect(model))(params, {'image': image})
    weights = np.exp(np.float64(predicted.logits[-1]))
    shares = (weights / weights.sum(-1, keepdims=True))[..., :-1]  # The last is no object.
    np.testing.assert_allclose(found.scores, shares.max(-1), rtol=1e-5)
    np.testing.assert_array_equal(found.labels, shares.argmax(-1))
    np.testing.assert_array_equal(found.boxes, predicted.boxes[-1])


@pytest.mark.slow
def test_a_batch_without_objects_has_a_loss_of_classes_alone():
    task, model = made()
    image = jnp.asarray(np.random.default_rng(3).normal(size=(2, *CANVAS, 3)), jnp.float32)
    batch = {'image': image, 'boxes': jnp.zeros((2, 3, 4)), 'box_label': jnp.full((2, 3), -1)}
    params = drawn(model, image)
    loss = jax.jit(lambda batch: task.loss(model, Run(1, 2))(params, (), batch, None, 0))
    value, aux = loss(batch)
    logits = np.float64(jax.jit(model.apply)({'params': params}, image).logits[-1])
    nothing = np.log(np.exp(logits).sum(-1)) - logits[..., -1]
    assert float(value) == pytest.approx(nothing.mean(), rel=1e-5)
    assert float(aux.metrics['l1']) == float(aux.metrics['giou']) == 0


def test_targets_are_the_objects_of_the_whole_batch():
    task, model = made()
    label = jnp.array([[0, 1, -1], [-1, -1, -1], [1, -1, -1]])
    targets = task.targets(model, Run(1, 3))
    rows = targets.rows((), {'box_label': label}, jax.random.key(0), jnp.int32(0))
    assert rows['objects'].tolist() == [2, 0, 1]
    assert int(targets.shared((), rows, jnp.int32(0))['objects']) == 3


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(boxes=5), r'up to 5 boxes.*task\.queries=4.*lower boxes\(5\)'),
        (dict(decoder_heads=3), r'decoder_width=16 must be divisible by 4 and by .*heads=3'),
        (dict(trunk=dict(pool='map')), r"model\.pool to 'gap'"),
        (dict(trunk=dict(patch_dropout=0.5)), r'patch_dropout'),
        (dict(trunk=dict(posemb='relative'), query_place='trunk'), r"query_place='decoder'"),
        (
            dict(trunk=dict(posemb='rope', rope_shift=0.1), query_place='trunk'),
            r'model\.rope_shift',
        ),
        (dict(trunk=dict(tokenizer='words', vocab=9)), r'finds objects in images'),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        made(**options)


@pytest.mark.slow
def test_queries_of_the_trunk_are_behind_its_tokens():
    """They see the patches and these see them, whatever their positions are."""
    _, model = made(dict(posemb='rope', pool='cls', registers=1), query_place='trunk')
    assert model.sequence_length({'image': (*CANVAS, 3)}) == 2 + 6 + 4
    image = jnp.asarray(np.random.default_rng(4).normal(size=(1, *CANVAS, 3)), jnp.float32)
    params = drawn(model, image)
    answer = jax.jit(model.apply)
    found = answer({'params': params}, image)
    assert found.logits.shape == (1, 1, 4, 3)
    order = jnp.array([2, 0, 3, 1])
    swapped = {**params, 'detection_tokens': params['detection_tokens'][:, order]}
    other = answer({'params': swapped}, image)
    np.testing.assert_allclose(other.logits, found.logits[:, :, order], atol=1e-5)
