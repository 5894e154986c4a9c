"""Several views of an example: made of one, by the same randomness in any batch."""

import cv2
import numpy as np
import pytest
from PIL import Image

from big_vit.build.data import DEVICE_OPERATIONS
from big_vit.data import cache, order, pipeline, transforms
from big_vit.data.sources.base import Source
from big_vit.errors import UserError

SIZE = (16, 16)
TEXT = (
    'decode(3) ; global: rrc(size, scale=(0.3, 1)) | flip_lr ; global: rrc(size) | solarize(p=0.3)'
    ' ; local: 3 * rrc(8, scale=(0.05, 0.3)) | flip_lr'
)


def parse(text, **more):
    return transforms.parse(text, size=SIZE, key='data', device=DEVICE_OPERATIONS, **more)


def pictures(count=12):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (20 + i, 30, 3)).astype(np.uint8) for i in range(count)]


def source_of(count=12):
    files = [cv2.imencode('.png', image[..., ::-1])[1].tobytes() for image in pictures(count)]

    def load(indices):
        columns = {'image': [files[i] for i in indices], 'label': indices.astype(np.int32)}
        return transforms.opened(columns, 3)

    return Source('pictures', 'train', count, count, None, load, in_memory=False)


def first_batch(text, size=12, rows=slice(None), source=None, step=0):
    transform, orders = parse(text), pipeline.Order(batch_size=size, seed=3)
    batches = pipeline.train_batches(
        source or source_of(), transform, orders, start_step=step, rows=rows, num_threads=2
    )
    batch = next(batches)
    batches.close()
    return batch


def test_each_view_is_what_its_operations_make():
    """Without randomness: OpenCV's resize of slices, in the order of the text."""
    nearest = "resize(size, method='nearest')"
    text = f'decode(3) ; global: {nearest} ; global: central_crop(size) | invert'
    batch = first_batch(text + ' ; local: 2 * central_crop(8)')
    assert {n: x.shape for n, x in batch.items()} == {
        'label': (12,),
        'global': (12, 2, *SIZE, 3),
        'local': (12, 2, 8, 8, 3),
    }
    for number, label in enumerate(batch['label']):
        image = pictures()[label]
        top, left = (image.shape[0] - 16) // 2, 7
        crop = image[top : top + 16, left : left + 16]
        alone = first_batch(f'decode(3) | {nearest}')['image'][number]
        np.testing.assert_array_equal(batch['global'][number, 0], alone)
        np.testing.assert_array_equal(batch['global'][number, 1], 255 - crop)
        np.testing.assert_array_equal(batch['local'][number, 0], batch['local'][number, 1])
        top, left = (image.shape[0] - 8) // 2, 11
        np.testing.assert_array_equal(
            batch['local'][number, 0], image[top : top + 8, left : left + 8]
        )


def test_views_are_a_function_of_seed_epoch_and_example():
    whole = first_batch(TEXT)
    parts = [first_batch(TEXT, rows=slice(first, first + 4)) for first in (0, 4, 8)]
    for name, column in whole.items():
        np.testing.assert_array_equal(column, np.concatenate([part[name] for part in parts]))
    # The same from a cache of decoded pictures, and after a batch before.
    source = cache.decoded(source_of(), 1 << 30)
    for _ in range(2):
        again = first_batch(TEXT, source=source)
        np.testing.assert_array_equal(whole['local'], again['local'])
    assert (first_batch(TEXT, step=1)['local'] != whole['local']).any()


def test_a_view_added_at_the_end_moves_no_other():
    before = first_batch(TEXT)
    after = first_batch(f'{TEXT} ; local: rrc(8)')
    np.testing.assert_array_equal(after['global'], before['global'])
    np.testing.assert_array_equal(after['local'][:, :3], before['local'])
    assert after['local'].shape[1] == 4


def test_views_draw_each_for_itself():
    """Windows of equal views are independent: their means are no more alike than by chance."""
    image = np.arange(64 * 64, dtype=np.float32).reshape(64, 64, 1)

    def load(indices):
        return {'image': np.stack([image] * len(indices))}

    source = Source('ramp', 'train', 600, 0, None, load, in_memory=False)
    batch = first_batch('; global: 2 * rrc(size, scale=(0.1, 0.1))', 600, source=source)
    means = batch['global'].mean((2, 3, 4))
    assert abs(np.corrcoef(means.T)[0, 1]) < 0.15
    assert means.std(0).min() > 300


CROPS = "decode(3) ; global: 2 * rrc(32) | flip_lr | resize(size, method='area')"


def test_views_as_others_are_the_same_crops_in_another_size():
    text = f'{CROPS} ; gram as global: 2 * rrc(32) | flip_lr ; local: rrc(8)'
    batch = first_batch(text)
    assert batch['gram'].shape == (12, 2, 32, 32, 3)
    for number in np.ndindex(12, 2):
        halved = np.asarray(Image.fromarray(batch['gram'][number]).reduce(2), int)
        assert np.abs(halved - batch['global'][number]).max() <= 1
    assert np.abs(batch['global'][:, 0].astype(int) - batch['global'][:, 1]).mean() > 5
    # They move none of the others, and worker processes read the same.
    again = parse(parse(text).host_text)
    assert [number for number, _ in again.every_view] == [0, 1, 0, 1, 2]
    for name, column in first_batch(f'{CROPS} ; local: rrc(8)').items():
        np.testing.assert_array_equal(column, batch[name])


def test_workers_get_a_text_that_says_the_same():
    """Worker processes parse `host_text`; what devices do is left out."""
    text = TEXT + ' | to_device | gaussian_blur(p=0.5) | normalize'
    text = text.replace('solarize(p=0.3)', 'solarize(p=0.3) | normalize').replace(
        'flip_lr ; global', 'flip_lr | normalize ; global'
    )
    transform = parse(text)
    again = transforms.parse(transform.host_text, size=SIZE, key='data')
    assert again.groups == transform.groups == {'global': 2, 'local': 3}
    assert again.views[1].transform.names == ('rrc', 'solarize')
    mean, std = transform.normalisation(3)
    np.testing.assert_allclose((mean, std), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    quoted = parse('decode ; global: rename(image=\'a;b\') ; local: rename(image="c;d")')
    assert quoted.groups == {'global': 1, 'local': 1}


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('decode ; rrc(8)', "cannot read 'rrc(8)': behind a semicolon comes a group of views"),
        ('decode ; image: rrc(8)', "'image' is the name of something else"),
        ('decode ; a: 0 * rrc(8)', 'a group has 1 to 64 views, not 0'),
        ('decode ; a: 65 * rrc(8)', 'a group has 1 to 64 views, not 65'),
        ('decode ; a: ; ', "cannot read ''"),
        ('decode | to_device | flip_lr ; a: rrc(8)', 'flip_lr comes before views'),
        ('decode ; a: rrc(8) | normalize ; b: rrc(8)', 'all views are normalised alike'),
        ('decode ; a: rcr(8)', 'there is no operation'),
        ('decode ; a: rrc(8) ; b as c: rrc(4)', 'b as c: the views of each such statement'),
        ('decode ; a: 2 * rrc(8) ; b as a: rrc(4)', 'as many as those of one of a'),
        ('decode ; a: rrc(8) ; b as a: rrc(4) ; b as a: rrc(4)', 'as many as those of one'),
        ('decode ; a: rrc(8) ; b as a: rrc(4) ; c as b: rrc(4)', 'c as b: '),
        ('decode ; a: rrc(8) ; a: rrc(4)', "views of 'a' are 8x8 and 4x4: give those of another"),
    ],
)
def test_what_cannot_be_is_said(text, message):
    with pytest.raises(UserError) as error:
        first_batch(text)
    assert message in str(error.value)


def test_an_evaluation_has_no_views():
    with pytest.raises(UserError, match='an evaluation sees each example once'):
        transforms.require_deterministic(parse('decode ; global: resize(size)'))


def test_sounds_have_no_views():
    def load(indices):
        return {'audio': np.zeros((len(indices), 10), np.float32)}

    with pytest.raises(UserError, match='views are of pictures, but these examples have audio'):
        first_batch(
            '; a: rrc(8)', source=Source('sounds', 'train', 12, 0, None, load, in_memory=False)
        )


def test_keys_of_views_differ_from_those_of_examples():
    keys = order.example_keys(0, 0, np.arange(1000))
    several = np.concatenate([keys, *(order.view_keys(keys, number) for number in range(10))])
    assert len(set(several.tolist())) == 11_000


def test_a_transform_that_is_seen_once_is_its_first_view():
    first = 'rrc(size) | to_device | solarize(p=0.3)'
    text = f'decode(3) | flip_lr(0.5) ; global: {first} ; local: 2 * rrc(8)'
    once = parse(text).seen_once()
    assert once.views == () and once.host_text == 'decode(3) | flip_lr(0.5) | rrc(size)'
    assert once.names == ('decode', 'flip_lr', 'rrc')
    assert [name for name, _ in once.device] == ['solarize']
    assert once.random_operations == ('flip_lr', 'rrc', 'solarize')
    plain = parse('decode | rrc(size)')
    assert plain.seen_once() is plain
