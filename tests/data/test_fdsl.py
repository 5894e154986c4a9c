"""Formula-driven images: pure functions of (seed, index), and classes that can be told apart."""

import numpy as np
import pytest

from big_vit.data.sources import fdsl
from big_vit.data.sources.base import Request
from big_vit.errors import UserError


def test_examples_do_not_depend_on_their_batch():
    source = fdsl.fdsl(Request('train', num_classes=50, image_size=(24, 24), seed=3))
    index = np.array([49_999, 0, 7, 7, 12_345])
    together = source.load(index)
    assert together['image'].shape == (5, 24, 24, 1)
    assert together['image'].dtype == np.uint8
    assert together['label'].dtype == np.int32
    np.testing.assert_array_equal(together['label'], index % 50)
    for i, one in enumerate(index):
        np.testing.assert_array_equal(
            source.load(np.array([one]))['image'][0], together['image'][i]
        )
    many = source.load(np.arange(300))['image']
    np.testing.assert_array_equal(many[7], together['image'][2])


def test_every_image_shows_something_within_the_frame():
    images = fdsl.fdsl(Request('train', num_classes=21_000, image_size=(32, 32))).load(
        np.arange(2000)
    )['image']
    light = (images > 100).mean((1, 2, 3))
    assert light.min() > 0.005
    assert light.max() < 0.8
    border = np.concatenate([images[:, [0, -1]].ravel(), images[:, :, [0, -1]].ravel()])
    assert (border > 100).mean() < 0.01
    assert len({image.tobytes() for image in images}) == 2000


def test_seed_class_and_instance_all_matter():
    index = np.arange(4)
    base = fdsl.fdsl(Request('train', num_classes=2, image_size=(16, 16), seed=0)).load(index)[
        'image'
    ]
    assert len({image.tobytes() for image in base}) == 4
    assert not np.array_equal(
        base,
        fdsl.fdsl(Request('train', num_classes=2, image_size=(16, 16), seed=1)).load(index)[
            'image'
        ],
    )


def test_splits_are_disjoint_and_balanced(monkeypatch):
    def opened(split):
        return fdsl.fdsl(Request(split, num_classes=4, image_size=(16, 16)))

    monkeypatch.setattr(fdsl, 'TRAIN_INSTANCES', 60)
    longer = opened('train').load(np.arange(40, 240))
    monkeypatch.setattr(fdsl, 'TRAIN_INSTANCES', 10)
    train, test = opened('train'), opened('test')
    assert (train.length, test.length) == (40, 200)
    seen = {
        image.tobytes() for source in (train, test) for image in source.load(np.arange(40))['image']
    }
    assert len(seen) == 80
    np.testing.assert_array_equal(test.load(np.arange(200))['image'], longer['image'])
    part = opened('train[25%:50%]').load(np.arange(10))
    np.testing.assert_array_equal(part['image'], train.load(np.arange(10, 20))['image'])
    for source in (train, test):
        labels = source.load(np.arange(source.length))['label']
        assert len(np.unique(np.bincount(labels, minlength=4))) == 1


def test_any_number_of_classes_and_any_shape():
    source = fdsl.fdsl(Request('train', num_classes=1, image_size=(20, 40)))
    assert source.load(np.arange(3))['image'].shape == (3, 20, 40, 1)
    many = fdsl.fdsl(Request('test', num_classes=100_000, image_size=(16, 16)))
    assert many.load(np.array([many.length - 1]))['label'][0] == 99_999
    assert (
        fdsl.fdsl(Request('train', num_classes=2, image_size=(150, 150)))
        .load(np.arange(2))['image']
        .max()
        > 100
    )


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'num_classes': 0}, r'data\.num_classes is 0'),
        ({'num_classes': None}, r"config: data\.num_classes must be set for data\.name='fdsl'"),
        ({'image_size': (32, 4)}, r'data\.image_size is 4'),
        ({'split': 'val'}, r'no split .val., only test, train'),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(UserError, match=message):
        fdsl.fdsl(Request('train', num_classes=5, image_size=(32, 32))._replace(**settings))


def test_a_plain_classifier_can_tell_classes_apart():
    from sklearn.neighbors import KNeighborsClassifier

    classes = 20
    train = fdsl.fdsl(Request('train', num_classes=classes, image_size=(32, 32))).load(
        np.arange(classes * 60)
    )
    test = fdsl.fdsl(Request('test', num_classes=classes, image_size=(32, 32))).load(
        np.arange(classes * 15)
    )

    def spectrum(images: np.ndarray) -> np.ndarray:
        """Something that shifts do not change, since the drawings are moved about."""
        power = np.abs(np.fft.rfft2(images[..., 0].astype(np.float32)))
        power = np.log1p(power).reshape(len(images), -1)
        return power - power.mean(1, keepdims=True)

    model = KNeighborsClassifier(5).fit(spectrum(train['image']), train['label'])
    accuracy = model.score(spectrum(test['image']), test['label'])
    # Chance is 0.05.
    assert accuracy > 0.45, accuracy
