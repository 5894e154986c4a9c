"""Generated clips, sounds, sentences and pairs: what tells the label, and what says nothing."""

import itertools
from collections import Counter

import numpy as np
import pytest

from big_vit.data import order, transforms
from big_vit.data.sources import orbit, phrases, questions, tones
from big_vit.data.sources.base import Request
from big_vit.errors import UserError

SOURCES = {
    'orbit': (orbit.orbit, (20, 20)),
    'tones': (tones.tones, (24, 24)),
    'phrases': (phrases.phrases, (0, 0)),
    'pairs': (questions.pairs, (24, 24)),
    'quiz': (questions.quiz, (24, 24)),
}


def make(name, split='train', size=None, seed=0):
    source, usual = SOURCES[name]
    return source(Request(split, image_size=size or usual, seed=seed))


# How many examples balance each other.
GROUP = {'orbit': 8, 'tones': 6, 'phrases': 6, 'pairs': 16, 'quiz': 4}
every_source = pytest.mark.parametrize('name', SOURCES)


def contents(columns):
    """Each example without its label, as something to compare."""
    parts = [v for k, v in sorted(columns.items()) if k != 'label']
    return [
        tuple(x.tobytes() if isinstance(x, np.ndarray) else x for x in row)
        for row in zip(*parts, strict=True)
    ]


def at_chance(right, chance):
    """Whether a share of right answers is within 3 standard errors of chance."""
    error = (chance * (1 - chance) / len(right)) ** 0.5
    assert abs(np.mean(right) - chance) < 3 * error, (np.mean(right), chance, error)


def learned(features, labels, count, neighbours=0):
    """Which answers are right on the last examples, of a classifier fitted to the first `count`.

    It is linear, or goes by the nearest ones.
    """
    from sklearn.linear_model import RidgeClassifier
    from sklearn.neighbors import KNeighborsClassifier

    features = features.reshape(len(features), -1)
    mean, std = features[:count].mean(0), features[:count].std(0) + 1e-6
    features = (features - mean) / std
    model = KNeighborsClassifier(neighbours) if neighbours else RidgeClassifier(10)
    model.fit(features[:count], labels[:count])
    return model.predict(features[count:]) == labels[count:]


def tells_nothing(features, labels, count, chance):
    for neighbours in (0, 9):
        at_chance(learned(features, labels, count, neighbours), chance)


# --- What all have ---------------------------------------------------------------------


@every_source
def test_examples_do_not_depend_on_their_batch(name):
    source = make(name, seed=3)
    index = np.array([source.length - 1, 0, 7, 7, 123_456])
    together = contents(source.load(index))
    assert together[2] == together[3]
    alone = [contents(source.load(np.array([i])))[0] for i in index]
    assert together == alone
    many = source.load(np.arange(2500))
    assert contents(many)[7] == together[2]
    assert {len(column) for column in many.values()} == {2500}
    assert len({contents(make(name, seed=s).load(np.arange(1)))[0] for s in range(4)}) == 4


@every_source
def test_classes_are_balanced_and_listed(name):
    for split, length in (('train', 1_000_000), ('test', 2_000)):
        source = make(name, split)
        assert length - GROUP[name] < source.length <= length
        labels = source.labels()
        assert labels.dtype == np.int32
        counts = np.bincount(labels, minlength=source.num_classes)
        assert counts.min() == counts.max() == source.length // source.num_classes
        assert len(set(source.class_names)) == source.num_classes
        index = np.arange(source.length)[:: source.length // 500]
        loaded = source.load(index)['label']
        assert loaded.dtype == np.int32
        np.testing.assert_array_equal(loaded, labels[index])


@every_source
def test_no_example_comes_twice_nor_in_both_splits(name):
    train, test = make(name), make(name, 'test')
    seen = contents(train.load(np.arange(4000))) + contents(test.load(np.arange(test.length)))
    assert len(set(seen)) == len(seen)


@every_source
def test_parts_of_a_split(name):
    part = make(name, 'train[50%:]')
    start = make(name).length - part.length
    index = np.arange(10)
    assert contents(part.load(index)) == contents(make(name).load(start + index))


@pytest.mark.parametrize(
    ('name', 'split', 'size', 'message'),
    [
        ('orbit', 'train', (8, 8), r'data\.image_size is 8x8: set 12x12 or more'),
        ('tones', 'train', (32, 8), r'image_size is 32x8: set 16x12 or more'),
        ('phrases', 'val', None, r'no split .val., only test, train'),
        ('pairs', 'train', (64, 8), r'image_size is 64x8: set 16x16 or more'),
    ],
)
def test_refuses(name, split, size, message):
    with pytest.raises(UserError, match=message):
        make(name, split, size)


@pytest.mark.parametrize(
    ('name', 'line', 'shapes'),
    [
        ('orbit', '', {'video': (8, 16, 24, 1)}),
        ('orbit', 'middle_frame()', {'image': (16, 24, 1)}),
        ('tones', 'log_mel(8000, bins=16) | standardize(-4.2, 7.0)', {'image': (16, 24, 1)}),
        ('phrases', 'byte_tokens(64)', {'tokens': (64,)}),
        ('pairs', 'byte_tokens(48)', {'image': (16, 24, 3), 'tokens': (48,)}),
    ],
)
def test_transforms_take_them(name, line, shapes):
    source = make(name, size=(16, 24))
    transform = transforms.parse(line, size=(16, 24))
    example_spec = transforms.check(transform, source, (16, 24), tuple(shapes))
    for part, shape in shapes.items():
        assert example_spec.parts[part][0] == shape
    if 'image' in shapes:
        assert source.image_shape == shapes['image'] or 'middle_frame' in line
    assert not transform.is_random


# --- Orbit -----------------------------------------------------------------------------

STEPS = {
    'right': (0, 1),
    'down right': (1, 1),
    'down': (1, 0),
    'down left': (1, -1),
    'left': (0, -1),
    'up left': (-1, -1),
    'up': (-1, 0),
    'up right': (-1, 1),
}


def shifts_between(before, after):
    """How well one frame is another moved by one or two pixels: [B, speed, direction].

    The directions are in the order of the classes.
    """
    centre = [np.float32(x) - np.float32(x).mean((1, 2, 3), keepdims=True) for x in (before, after)]
    return np.stack(
        [
            [
                (np.roll(centre[0], (s * y, s * x), (1, 2)) * centre[1]).mean((1, 2, 3))
                for y, x in STEPS.values()
            ]
            for s in (1, 2)
        ]
    ).transpose(2, 0, 1)


def without_order(clips):
    """How well all pairs of two frames fit, in which their order is lost."""
    total = clips.sum(1, dtype=np.float32)
    # Correlations add up: those of the sum with itself are those of all pairs.
    alone = sum(shifts_between(clips[:, t], clips[:, t]) for t in range(clips.shape[1]))
    return shifts_between(total, total) - alone


@pytest.fixture(scope='module')
def clips():
    source = make('orbit')
    columns = source.load(np.arange(6000))
    assert source.class_names == tuple(STEPS)
    return columns['video'], columns['label']


@pytest.mark.slow
def test_no_frame_alone_tells_the_direction(clips):
    video, label = clips
    for frame in (0, 3, 7):
        tells_nothing(np.float32(video[:, frame]), label, 3000, 1 / 8)


def test_frames_without_order_tell_nothing(clips):
    video, label = clips
    for features in (np.float32(video.mean(1)), without_order(video)):
        tells_nothing(features, label, 3000, 1 / 8)


def test_the_first_two_frames_tell_the_direction(clips):
    video, label = clips
    # Without learning: the direction in which the frames fit best.
    best = shifts_between(video[:, 0], video[:, 1]).max(1).argmax(1)
    assert (best == label).mean() > 0.9


def test_the_same_frames_come_in_each_order():
    video = make('orbit').load(np.arange(800))['video'].reshape(100, 8, 8, 20, 20, 1)
    for label in range(8):
        np.testing.assert_array_equal(video[:, label], np.roll(video[:, 0], -label, axis=1))
    assert len(np.unique(video.reshape(-1, 400), axis=0)) == 100 * 8


def test_sprites_leave_on_one_side_and_come_in_on_the_other():
    video = np.float32(make('orbit').load(np.arange(4000))['video'])
    # No light is lost on the way: a sprite gives about 2, noise moves this by 0.01.
    assert np.ptp(video.mean((0, 2, 3, 4))) < 0.05
    # Over all clips, each row and column of each frame is lit as often as any other.
    lit = (video > np.median(video, axis=(2, 3, 4), keepdims=True) + 32)[..., 0]
    for axis in (2, 3):
        share = lit.mean((0, axis))
        assert share.min() / share.max() > 0.8
        assert 0.02 < share.mean() < 0.2


# --- Tones -----------------------------------------------------------------------------

MEL = 'log_mel(8000, bins=24)'
ORDERS = list(itertools.permutations(range(3)))


def spectrograms(columns):
    keys = order.example_keys(0, 0, np.arange(len(columns['label'])))
    return transforms.parse(MEL, size=(24, 24))(columns, keys)['image'][..., 0]


def test_without_noise_the_orders_have_the_same_frames(monkeypatch):
    monkeypatch.setattr(tones, 'NOISE', 0)
    columns = make('tones', size=(25, 25)).load(np.arange(60))
    assert columns['audio'].dtype == np.float32
    # 25 frames of 25 milliseconds, 10 apart: as log_mel cuts them, here by hand.
    # Adding zero makes -0 to 0.
    for group in (columns['audio'] + 0).reshape(10, 6, 2120):
        cut = [sorted(x[80 * i : 80 * i + 200].tobytes() for i in range(25)) for x in group]
        assert all(one == cut[0] for one in cut[1:])
        assert len({x.tobytes() for x in group}) == 6
    means = spectrograms(columns).mean(2).reshape(10, 6, 24)
    np.testing.assert_allclose(means, means[:, :1].repeat(6, 1), atol=1e-4)
    assert np.ptp(means[:, 0], axis=0).min() > 0.1


@pytest.mark.slow
def test_the_order_of_tones_is_in_time_only():
    source = make('tones')
    columns = source.load(np.arange(6000))
    label, images = columns['label'], spectrograms(columns)
    assert images.shape == (6000, 24, 24)
    blind = np.concatenate(
        [images.mean(2), images.std(2), images.max(2), np.exp(images).mean(2)], axis=1
    )
    tells_nothing(blind, label, 3000, 1 / 6)
    # Any frame chosen without knowing when it was.
    when = (order.uniform(order.example_keys(9, 0, np.arange(6000)), 0) * 24).astype(int)
    tells_nothing(images[np.arange(6000), :, when], label, 3000, 1 / 6)
    # In order: the loudest band of each third.
    pitch = images.reshape(6000, 24, 3, 8).mean(3).argmax(1)
    ranks = pitch.argsort(1).argsort(1)
    found = (ranks[:, None] == np.array(ORDERS)).all(2).argmax(1)
    assert (found == label).mean() > 0.99
    assert source.class_names[0] == 'low-middle-high'
    assert source.class_names[5] == 'high-middle-low'


def test_sounds_are_sounds():
    audio = make('tones').load(np.arange(600))['audio']
    assert np.abs(audio).max(1).min() > 0.2
    assert np.abs(audio).max() < 0.6
    # Where nothing sounds there is noise, and nothing else.
    quiet = audio[:, :120]
    assert np.abs(quiet).max() <= 0.02
    assert quiet.std(1).min() > 0.005
    pitch = spectrograms({'audio': audio, 'label': np.zeros(600)}).mean(2).argmax(1)
    assert len(np.unique(pitch)) >= 10


# --- Phrases ---------------------------------------------------------------------------


def test_every_bag_of_words_comes_once_in_each_order():
    train, test = make('phrases', 'train'), make('phrases', 'test')
    bags = {}
    for source in (train, test):
        # One of each six here, and all six of the last 1,200.
        ones = source.load(np.arange(0, source.length, 6))['text']
        bags[source.split] = {tuple(sorted(text.split())) for text in ones}
        assert len(bags[source.split]) == source.length // 6
        columns = source.load(np.arange(source.length - 1200, source.length))
        found = Counter(
            (tuple(sorted(text.split())), label)
            for text, label in zip(columns['text'], columns['label'].tolist(), strict=True)
        )
        assert set(found.values()) == {1}
        assert len({bag for bag, _ in found}) == 200
        assert len(set(columns['text'])) == 1200
        assert max(map(len, ones)) < 64
        assert all(text.isascii() for text in ones)
    assert not bags['train'] & bags['test']


def test_the_order_of_words_is_all_that_tells():
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    columns = make('phrases', 'train').load(np.arange(6000))
    texts, label = columns['text'], columns['label']
    # Which word is where: the second, fifth and eighth of 'the A shows the B to the C today'.
    places = [' '.join(f'{i}{w}' for i, w in enumerate(text.split())) for text in texts]
    for words, bag in ((texts, True), (places, False)):
        for analyzer in ('word', 'char') if bag else ('word',):
            features = CountVectorizer(analyzer=analyzer).fit_transform(words)
            model = LogisticRegression(C=10, max_iter=200, tol=1e-3)
            model.fit(features[:3000], label[:3000])
            right = model.predict(features[3000:]) == label[3000:]
            if bag:
                # Not about: each bag has one answer and all six labels.
                assert right.sum() * 6 == len(right)
            else:
                assert right.mean() > 0.99


def test_the_label_of_a_phrase_is_its_order():
    source = make('phrases', 'test')
    columns = source.load(np.arange(600))
    kinds: dict[str, set[str]] = {}
    for text, label in zip(columns['text'], columns['label'].tolist(), strict=True):
        the, one, _, *_, two, to, _, three, _ = text.split()
        assert (the, to) == ('the', 'to')
        for word, kind in zip((one, two, three), source.class_names[label].split('-'), strict=True):
            kinds.setdefault(word, set()).add(kind)
    assert all(len(one) == 1 for one in kinds.values())
    assert kinds['dog'] == {'animal'}
    assert kinds['nurse'] == {'person'}
    assert kinds['robot'] == {'machine'}
    assert len(kinds) == 36


# --- Pairs -----------------------------------------------------------------------------


def test_neither_picture_nor_question_tells_the_answer():
    columns = make('pairs').load(np.arange(16 * 200))
    label = columns['label'].tolist()
    pictures = Counter(
        (image.tobytes(), answer) for image, answer in zip(columns['image'], label, strict=True)
    )
    assert set(pictures.values()) == {1}
    assert len({image for image, _ in pictures}) * 4 == len(pictures) == 16 * 200
    for start in range(0, 16 * 200, 16):
        rows = slice(start, start + 16)
        asked = Counter(zip(columns['text'][rows], label[rows], strict=True))
        assert set(asked.values()) == {1}
        assert len({text for text, _ in asked}) == 4


def test_neither_stream_alone_can_be_learned():
    from sklearn.feature_extraction.text import CountVectorizer

    columns = make('pairs').load(np.arange(4800))
    label = columns['label']
    words = CountVectorizer(ngram_range=(1, 2)).fit_transform(columns['text'])
    images = columns['image'].reshape(-1, 12, 2, 12, 2, 3).mean((2, 4))
    for features in (words.toarray().astype(np.float32), images.astype(np.float32)):
        right = learned(features, label, 2400)
        assert right.sum() * 4 == len(right)
    assert max(map(len, columns['text'])) < 48


def shape_of(lit):
    """The shape of what is lit, by how much of its bounding box it fills and where."""
    rows, columns = np.flatnonzero(lit.any(1)), np.flatnonzero(lit.any(0))
    box = lit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    if box.mean() > 0.95:
        return 'square'
    if box[-1].mean() > 0.75 and box[0].mean() < 0.5:
        return 'triangle'
    return 'cross' if box.mean() < 0.68 else 'circle'


def test_of_a_quiz_the_picture_alone_is_right_as_often_as_its_best_guess():
    """Two balls of four colours: the most frequent has 17/32 on average; the question nothing."""
    counts = [max(map(draw.count, range(4))) for draw in itertools.product(range(4), repeat=4)]
    assert np.mean(counts) / 4 == 17 / 32
    columns = make('quiz').load(np.arange(4000))
    label = columns['label']
    quarters = columns['image'].astype(np.float32).reshape(-1, 2, 12, 2, 12, 3)
    lit = np.ptp(quarters, axis=-1) > 62
    bright = (quarters * lit[..., None]).sum((2, 4)) / lit.sum((2, 4))[..., None] > 85
    code = (bright @ np.array([1, 2, 4])).reshape(-1, 4)  # red 1, green 2, blue 4, yellow 3
    colours = np.searchsorted([1, 2, 3, 4], code)
    names = np.array([0, 1, 3, 2])[colours]
    guess = np.array([np.bincount(row, minlength=4).argmax() for row in names])
    at_chance(guess == label, 17 / 32)
    from sklearn.feature_extraction.text import CountVectorizer

    words = CountVectorizer(ngram_range=(1, 2)).fit_transform(columns['text']).toarray()
    tells_nothing(words.astype(np.float32), label, 2000, 1 / 4)


@pytest.mark.parametrize(
    'name, size', [('pairs', (32, 32)), ('pairs', (48, 36)), ('quiz', (32, 32))]
)
def test_both_together_tell_the_answer(name, size):
    source = make(name, 'test', size)
    columns = source.load(np.arange(1000))
    height, width = (v // 2 for v in columns['image'].shape[1:3])
    right, named = [], Counter()
    for image, text, label in zip(
        columns['image'], columns['text'], columns['label'].tolist(), strict=True
    ):
        image = image.astype(np.float32)
        places = {}
        for place in itertools.product(('top', 'bottom'), ('left', 'right')):
            top, left = height * (place[0] == 'bottom'), width * (place[1] == 'right')
            cell = image[top : top + height, left : left + width]
            lit = np.ptp(cell, axis=2) > 62
            colour = {(1, 0, 0): 'red', (0, 1, 0): 'green', (0, 0, 1): 'blue'}.get(
                tuple((cell[lit].mean(0) > 85).astype(int).tolist()), 'yellow'
            )
            places[' '.join(place)] = places[shape_of(lit)] = colour
        wanted = [key for key in places if key in text]
        assert len(wanted) == 1, text
        named[wanted[0]] += 1
        right.append(places[wanted[0]] == source.class_names[label])
    assert np.mean(right) > 0.97
    assert len(named) == 8
    assert min(named.values()) > 60
