"""Pictures with boxes from the config to a batch: what is refused, drawn and learned."""

import numpy as np
import pytest
import scenes
from PIL import Image
from scenes import SCENES, Scene, Thing

from big_vit import bench_data, config, metrics, show_data, train
from big_vit.build.data import host_batches, train_data
from big_vit.errors import UserError
from big_vit.inspection import objects

SMALL = {
    'model.width': 16, 'model.depth': 1, 'model.mlp_dim': 16, 'model.num_heads': 1,
    'task.decoder_width': 16, 'task.decoder_depth': 1, 'task.decoder_heads': 1,
    'image_size': 32, 'batch_size': 4, 'log.every_steps': 1, 'data.name': 'coco',
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv('BIG_VIT_CACHE', str(tmp_path_factory.mktemp('cache')))


@pytest.fixture
def root(tmp_path):
    scenes.write_coco(tmp_path / 'set')
    return tmp_path / 'set'


def load(root, transform, **changes):
    changes = {**SMALL, 'data.split': 'train', 'data.transform': transform, **changes}
    spec = f'configs/unlabelled.py:path={root},method=mae,pictures=3,epochs=1'
    return config.load(spec, [(key, str(value)) for key, value in changes.items()])


def test_a_batch_has_arrays_of_objects_and_the_model_is_given_the_picture(root):
    loaded = load(root, 'flip_lr | large_scale_jitter(size) | boxes(6, masks=True)')
    found = train_data(loaded)
    assert set(found.inputs) == set(found.input_shapes) == {'image'}
    assert found.source.class_names == scenes.NAMES
    batch = next(host_batches(found, 0, slice(None)))
    shapes = {name: column.shape for name, column in batch.items() if name != 'replaced'}
    assert shapes == {
        'image': (4, 32, 32, 3), 'label': (4,), 'boxes': (4, 6, 4), 'box_label': (4, 6),
        'box_mask': (4, 6, 8, 8), 'picture_size': (4, 2),
    }  # fmt: skip
    assert bench_data.loader_rates(found, 0.05)['examples'] > 0


def test_pictures_alone_are_read_where_no_boxes_are_asked_for(root):
    found = train_data(load(root, 'rrc(size) | randaug(2, 10)'))
    assert set(found.example_spec.parts) == {'image', 'label'}
    assert found.source.annotations is not None


@pytest.mark.parametrize(
    ('transform', 'changes', 'message'),
    [
        ('resize(size) | boxes(5) | to_device | flip_lr', {}, 'on the devices flip_lr moves'),
        ('resize(size) | randaug(2, 5) | boxes(5)', {}, 'randaug may move pixels'),
        ('resize(size) | boxes(2)', {'data.on_error': 'stop', 'data.split': 'train[2:]'},
         r'c\.png: has 3 objects, more than boxes\(2\)'),
        ('resize(size) | boxes(5)', {'data.cache': 'resized'}, 'keeps no boxes or'),
        ('resize(size) | boxes(5)', {'task.name': 'classification'}, 'none of pictures'),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_a_run(root, transform, changes, message):
    if 'task.name' in changes:
        loaded = config.load(f'configs/own_images.py:path={root}', [('data.name', 'coco')])
    else:
        loaded = load(root, transform, **changes)
    with pytest.raises(UserError, match=message) as error:
        train_data(loaded)
    assert '\n' not in str(error.value)


def test_classes_of_a_mixture_meet_by_name(root, tmp_path):
    content = scenes.coco_json(ids=(9, 5, 1))
    scenes.write_coco(tmp_path / 'other', content=content)
    loaded = load(root, 'resize(size) | boxes(5)', **{
        'mixture.one.path': str(root), 'mixture.one.weight': 1,
        'mixture.two.path': str(tmp_path / 'other'), 'mixture.two.weight': 1,
    })  # fmt: skip
    found = train_data(loaded)
    one, two = (part.annotations(np.arange(3)) for part in found.parts)
    assert [own.labels.tolist() for own in one] == [own.labels.tolist() for own in two]
    assert [own.labels.tolist() for own in found.source.annotations(np.array([3]))] == [[0, 2]]


def test_boxes_masks_and_names_are_drawn(root, tmp_path):
    loaded = load(root, 'resize(size) | boxes(5, masks=True)', **{'data.shuffle': False})
    show_data.draw(loaded, tmp_path / 'x.png', 0, 3)
    with Image.open(tmp_path / 'x.png') as image:
        pixels = np.asarray(image.convert('RGB')).reshape(-1, 3)
    for label in range(3):
        assert (np.abs(pixels - np.array(objects.colour_of(label))).max(1) < 3).sum() > 100
    scene = Scene('a', (48, 96), (Thing(1, (10, 10, 60, 40)), Thing(2, (70, 5, 90, 45))))
    boxes = np.array([thing.box for thing in scene.things], float)
    masks = [thing.mask(scene.size) for thing in scene.things]
    made = objects.drawn(np.zeros((48, 96, 1), np.uint8), boxes, ('a', 'b'), (1, 2), masks)
    assert made.shape == (240, 480, 3)
    assert made[120, 50].tolist() == list(objects.colour_of(1))
    assert made[200, 350].tolist() == list(objects.colour_of(2))
    inside = np.rint(0.45 * np.array(objects.colour_of(1)))
    np.testing.assert_array_equal(made[150, 200], inside)
    assert made[235, 320].tolist() == [0, 0, 0]


def test_drawn_boxes_are_those_of_the_dataset(root):
    """After a transform that changes nothing but the arrays, the drawing is the same."""
    found = train_data(
        load(root, 'pad_to(96) | boxes(5)', image_size=96, **{'data.shuffle': False})
    )
    batch = next(host_batches(found, 0, slice(None)))
    said = found.source.annotations(np.arange(3))
    for row, scene in enumerate(SCENES):
        before = objects.annotated(scene.pixels(), said[row]._replace(masks=None), scenes.NAMES)
        after = objects.transformed(scene.pixels(), batch, row, scenes.NAMES)
        np.testing.assert_array_equal(before, after)


def test_decoded_pictures_are_cached_with_their_objects(root):
    transform = 'flip_lr | pad_to(96) | boxes(6)'
    made = []
    for cache in ('decoded', 'none'):
        found = train_data(load(root, transform, image_size=96, **{'data.cache': cache}))
        batches = host_batches(found, 0, slice(None))
        made.append([next(batches) for _ in range(4)])
        batches.close()
    for one, other in zip(*made, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.slow
def test_another_task_learns_from_pictures_with_boxes(root, tmp_path):
    loaded = load(
        root, 'flip_lr | large_scale_jitter(size) | boxes(6)',
        **{'total_epochs': 6, 'batch_size': 8, 'data.workers': 1, 'data.on_error': 'skip'},
    )  # fmt: skip
    result = train.run(loaded, tmp_path / 'w')
    assert result.step >= 1
    assert np.isfinite(
        [row['train/loss'] for row in metrics.read(tmp_path / 'w') if 'train/loss' in row]
    ).all()
