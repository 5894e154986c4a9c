"""Scores of label maps against scikit-learn, and windows, scales and mirrors against NumPy."""

import functools

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix, jaccard_score, recall_score

from big_vit import sharding
from big_vit.data import transforms
from big_vit.data.sources.base import Source
from big_vit.errors import UserError
from big_vit.evaluators import segmentation, sliding_window
from big_vit.evaluators.evaluation import Evaluation, Split
from big_vit.tasks.batch import normalise

MESHES = {
    1: sharding.make_mesh(1, 1, 1, jax.devices()[:1]),
    8: sharding.make_mesh(2, 2, 2),
}
K = 5
RNG = np.random.default_rng(0)


# Figures.


def test_figures_are_those_of_scikit_learn_without_ignored_pixels_and_absent_classes():
    labels, said = RNG.integers(0, 4, (40, 50)), RNG.integers(0, 4, (40, 50))
    said[labels == 1] = 1
    labels[labels == 2] = 0  # Class 2 is said and never true; class 4 is neither.
    labels[:5] = segmentation.IGNORED
    kept = labels != segmentation.IGNORED
    counts = segmentation.confusion(labels, said, K)
    want = confusion_matrix(labels[kept], said[kept], labels=range(K))
    np.testing.assert_array_equal(counts, want)
    assert counts.dtype == np.int64
    got = segmentation.figures(counts, tuple('abcde'))
    iou = jaccard_score(labels[kept], said[kept], labels=[0, 1, 2, 3], average=None)
    assert got['miou'] == pytest.approx(iou.mean(), abs=1e-15)
    assert got['pixel_accuracy'] == pytest.approx((labels == said)[kept].mean(), abs=1e-15)
    recall = recall_score(labels[kept], said[kept], labels=[0, 1, 3], average='macro')
    assert got['mean_accuracy'] == pytest.approx(recall, abs=1e-15)
    assert [got[f'iou/{name}'] for name in 'abcd'] == pytest.approx(iou.tolist(), abs=1e-15)
    assert 'iou/e' not in got and got['iou/c'] == 0 and 'accuracy/c' not in got


def test_a_label_that_is_no_class_is_refused_and_a_set_without_labels_has_no_figures():
    with pytest.raises(ValueError, match='has the class 7, but there are 5'):
        segmentation.confusion(np.array([[7]]), np.array([[0]]), K)
    got = segmentation.figures(np.zeros((K, K), np.int64))
    assert all(np.isnan(value) for value in got.values())


# Sizes.


@pytest.mark.parametrize('to', [(9, 14), (4, 5), (23, 3)])
def test_resizing_a_part_of_a_canvas_is_that_of_opencv_and_of_pillow(to):
    canvas, of = RNG.standard_normal((1, 12, 10, 2)).astype(np.float32), (7, 8)
    picture = np.ascontiguousarray(canvas[0, : of[0], : of[1]])
    sizes = [jnp.array([pair]) for pair in (to, of)]
    plain = np.asarray(sliding_window.resize(jnp.asarray(canvas), (25, 15), *sizes))[0]
    want = cv2.resize(picture, to[::-1], interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(plain[: to[0], : to[1]], want, atol=1e-5)
    assert not plain[to[0] :].any() and not plain[:, to[1] :].any()
    averaged = sliding_window.resize(jnp.asarray(canvas), (25, 15), *sizes, antialias=True)[0]
    for channel in range(2):
        image = Image.fromarray(picture[..., channel], 'F')
        want = np.asarray(image.resize(to[::-1], Image.Resampling.BILINEAR))
        np.testing.assert_allclose(np.asarray(averaged)[: to[0], : to[1], channel], want, atol=1e-5)


# Windows.

WINDOW, STRIDE = (8, 6), (5, 4)
WEIGHTS = RNG.standard_normal((3, K)).astype(np.float32)


def segment(params, batch):
    """Logits that depend on the pixels of a window and on the place in it."""
    image = normalise(jnp.asarray(batch['image']))
    assert image.shape[1:3] == WINDOW
    place = jnp.sin(jnp.arange(WINDOW[0] // 2)[:, None] + 3 * jnp.arange(WINDOW[1] // 2)[None])
    coarse = image.reshape(len(image), WINDOW[0] // 2, 2, WINDOW[1] // 2, 2, 3).mean((2, 4))
    return 3 * coarse @ params + place[None, :, :, None] * jnp.arange(K).reshape(1, 1, 1, K)


def scored_by_hand(picture, scale=1.0, flip=False):
    """The same of one picture, window by window, in the manner of mmsegmentation."""
    height, width = picture.shape[:2]
    to = round(height * scale), round(width * scale)
    channels = [Image.fromarray(np.ascontiguousarray(picture[..., c]), 'F') for c in range(3)]
    if scale != 1:
        channels = [c.resize(to[::-1], Image.Resampling.BILINEAR) for c in channels]
    x = np.stack([np.asarray(c) for c in channels], -1)
    x = x[:, ::-1] if flip else x
    padded = np.zeros((max(to[0], WINDOW[0]), max(to[1], WINDOW[1]), 3), np.float32)
    padded[: to[0], : to[1]] = x
    total, count = np.zeros((*padded.shape[:2], K)), np.zeros((*padded.shape[:2], 1))
    for i in range(max(to[0] - WINDOW[0] + STRIDE[0] - 1, 0) // STRIDE[0] + 1):
        for j in range(max(to[1] - WINDOW[1] + STRIDE[1] - 1, 0) // STRIDE[1] + 1):
            y = max(min(i * STRIDE[0] + WINDOW[0], to[0]) - WINDOW[0], 0)
            z = max(min(j * STRIDE[1] + WINDOW[1], to[1]) - WINDOW[1], 0)
            part = padded[y : y + WINDOW[0], z : z + WINDOW[1]]
            logits = np.asarray(segment(WEIGHTS, {'image': part[None]}))[0]
            logits = cv2.resize(logits, WINDOW[::-1], interpolation=cv2.INTER_LINEAR)
            total[y : y + WINDOW[0], z : z + WINDOW[1]] += logits
            count[y : y + WINDOW[0], z : z + WINDOW[1]] += 1
    logits = (total / count)[: to[0], : to[1]]
    logits = logits[:, ::-1] if flip else logits
    return cv2.resize(np.ascontiguousarray(logits), (width, height))


SIZES = np.array([[17, 14], [8, 6], [13, 11], [6, 14], [17, 5]])


def canvases():
    images = np.zeros((len(SIZES), 17, 14, 3), np.float32)
    for image, (height, width) in zip(images, SIZES, strict=True):
        image[:height, :width] = RNG.standard_normal((height, width, 3))
    return {'image': images, 'picture_size': SIZES}


def test_windows_of_pictures_of_their_own_sizes_are_those_cut_one_by_one():
    batch = canvases()
    step = jax.jit(functools.partial(sliding_window.scores, segment, window=WINDOW, stride=STRIDE))
    got = np.asarray(step(WEIGHTS, batch))
    for image, logits, (height, width) in zip(batch['image'], got, SIZES, strict=True):
        want = scored_by_hand(image[:height, :width])
        np.testing.assert_allclose(logits[:height, :width], want, atol=1e-4)


def test_scales_and_mirror_images_are_averaged_as_probabilities():
    batch, scales = canvases(), (0.75, 1.0, 1.5)
    step = functools.partial(
        sliding_window.scores, segment, window=WINDOW, stride=STRIDE, scales=scales, flips=True
    )
    got = np.asarray(jax.jit(step)(WEIGHTS, batch))
    for image, found, (height, width) in zip(batch['image'], got, SIZES, strict=True):
        parts = [
            jax.nn.softmax(scored_by_hand(image[:height, :width], scale, flip))
            for scale in scales
            for flip in (False, True)
        ]
        np.testing.assert_allclose(found[:height, :width], np.mean(parts, 0), atol=1e-4)


# Whole evaluations.

CANVAS, BATCH, EXAMPLES = (16, 12), 8, 13
STORED = [(int(h), int(w)) for h, w in RNG.integers(5, 40, (EXAMPLES, 2))]
LABELS = [RNG.choice([0, 1, 2, 3, 4, 255], (h, w, 1)).astype(np.uint8) for h, w in STORED]
PICTURES = RNG.integers(0, 256, (EXAMPLES, *CANVAS, 3)).astype(np.uint8)
PLACED = np.array([(16, 12), (10, 12), (16, 7)] * 5)[:EXAMPLES]


def coarse(params, batch):
    image = normalise(jnp.asarray(batch['image']))
    return image.reshape(len(image), 4, 4, 3, 4, 3).mean((2, 4)) @ params


def evaluation(devices, text='', stored=True, **changes):
    mesh = MESHES[devices]
    where = sharding.batch_sharding(mesh)
    source = Source(
        'made', 'test', EXAMPLES, K, None, len, True,
        class_names=tuple('abcde'), where=lambda row: f'picture {row}',
        label_maps=(lambda index: [LABELS[i][..., 0] for i in index]) if stored else None,
    )  # fmt: skip

    def batches():
        for start in range(0, EXAMPLES, BATCH):
            rows = np.arange(start, start + BATCH)
            real = rows < EXAMPLES
            rows = np.where(real, rows, 0)
            labels = np.stack([cv2.resize(LABELS[i], CANVAS[::-1], interpolation=0) for i in rows])
            batch = {
                'image': PICTURES[rows],
                'segmentation': labels.astype(np.int32),
                'picture_size': PLACED[rows].astype(np.int32),
                'mask': real.astype(np.float32),
            }
            yield {name: jax.device_put(x, where) for name, x in batch.items()}

    spec = transforms.ExampleSpec(
        {'image': ((*CANVAS, 3), np.dtype(np.uint8)), 'segmentation': (CANVAS, np.dtype(int))}, 255
    )
    split = Split(
        source, transforms.parse(text, size=CANVAS), spec, ('image',), 0, (), lambda x: x, batches
    )

    def compile_rows(key, rows):
        places = sharding.replicated(mesh), where
        return jax.jit(rows, out_shardings=places)

    fields = dict.fromkeys(Evaluation._fields)
    fields |= dict(key='evals.x', split=split, training=source, image_size=CANVAS, segment=coarse)
    return Evaluation(**{**fields, 'compile_rows': compile_rows, **changes})


def by_hand(stored=True):
    true, said = [], []
    for i in range(EXAMPLES):
        logits = np.asarray(coarse(jnp.asarray(WEIGHTS), {'image': PICTURES[i : i + 1]}))[0]
        height, width = PLACED[i]
        logits = cv2.resize(logits, CANVAS[::-1])[:height, :width]
        labels = LABELS[i][..., 0]
        if not stored:
            labels = cv2.resize(labels, CANVAS[::-1], interpolation=0)[:height, :width]
        logits = cv2.resize(np.ascontiguousarray(logits), labels.shape[::-1])
        true.append(labels[labels != 255])
        said.append(logits.argmax(-1)[labels != 255])
    return np.concatenate(true), np.concatenate(said)


@pytest.mark.parametrize('devices', [1, 8])
def test_a_split_is_scored_at_the_size_of_its_labels_on_any_number_of_devices(devices):
    evaluator = segmentation.segmentation(evaluation(devices), per_class='all')
    got = evaluator(jnp.asarray(WEIGHTS), {})
    true, said = by_hand()
    assert next(iter(got)) == 'miou' and got['count'] == EXAMPLES
    assert got['miou'] == pytest.approx(jaccard_score(true, said, average='macro'), abs=1e-15)
    assert got['pixel_accuracy'] == pytest.approx((true == said).mean(), abs=1e-15)
    assert got['iou/d'] == pytest.approx(jaccard_score(true == 3, said == 3), abs=1e-15)


@pytest.mark.parametrize('text, stored', [('central_crop(size)', True), ('', False)])
def test_what_was_cropped_is_scored_as_it_was_loaded(text, stored):
    got = segmentation.segmentation(evaluation(1, text, stored))(jnp.asarray(WEIGHTS), {})
    true, said = by_hand(stored=False)
    assert got['miou'] == pytest.approx(jaccard_score(true, said, average='macro'), abs=1e-15)


@pytest.mark.parametrize(
    'changes, settings, message',
    [
        (
            {},
            {'stride': (17, 4)},
            r'stride=\(17, 4\) leaves gaps between windows of 16x12',
        ),
        (
            {'training': Source('other', 'train', 1, 7, None, len, True)},
            {},
            'test has 5 classes, but the model tells 7',
        ),
        (
            {'training': Source('other', 'train', 1, 5, None, len, True, 3, tuple('abxde'))},
            {},
            "the class 'c' where the model has 'x'",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_computed(changes, settings, message):
    with pytest.raises(UserError, match=message):
        segmentation.segmentation(evaluation(1, **changes), **settings)


def test_a_split_without_label_maps_is_refused():
    made = evaluation(1)
    spec = made.split.example_spec
    parts = {'image': spec.parts['image']}
    split = made.split._replace(example_spec=spec._replace(parts=parts))
    with pytest.raises(UserError, match='gives no label map'):
        segmentation.segmentation(made._replace(split=split))
