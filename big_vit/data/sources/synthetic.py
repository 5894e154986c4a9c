"""Examples whose answer lies in time, in the order of words, or in two streams at once.

A model that does not look there sits at chance: one frame of a clip, the spectrum of a sound
over all its time, the words of a sentence without their order, and a picture without its question
say nothing of the label. Each function says what exactly is at chance, and why. Everything is a
function of (seed, split, index).
"""

import functools
import itertools
from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt8, UInt64

from big_vit.data import order
from big_vit.data.sources.base import Columns, Source, cut
from big_vit.errors import UserError

_TRAIN, _TEST = 1_000_000, 2_000
_SPLITS = {'train': 0, 'test': 1, 'unseen': 2}
# Of the pixels of one chunk, so that what is computed on them stays in the caches.
_CHUNK_BYTES = 1 << 18
# The draws of the noise come behind all others of the same key.
_NOISE = 64


def _noise(keys: UInt64[np.ndarray, ' b'], count: int) -> UInt8[np.ndarray, 'b {count}']:
    """Bytes at random, `count` for each key."""
    words = -(-count // 6)
    stream = np.arange(_NOISE, _NOISE + words, dtype=np.uint64)
    # Six bytes of each number: a hash for every byte would be most of the work.
    drawn = (order.uniform(keys[:, None], stream) * 2.0**48).astype('<i8').view(np.uint8)
    drawn = drawn.reshape(len(keys), words, 8)[:, :, :6]
    return drawn.reshape(len(keys), words * 6)[:, :count]


def _draws(keys: UInt64[np.ndarray, ' b'], first: int, count: int) -> np.ndarray:
    """Numbers in [0, 1), float64 [B, count], those of streams `first`, `first` + 1, ..."""
    return order.uniform(keys[:, None], np.arange(first, first + count, dtype=np.uint64))


def _source(
    name: str,
    group: int,
    split: str,
    key: str,
    class_names: tuple[str, ...],
    image_shape: tuple[int, int, int] | None,
    chunk: int,
    load: Callable[[int, np.ndarray], Columns],
    shown: dict[str, tuple[int, int]] | None = None,
) -> Source:
    """The ranges of `split` of a source made of groups of examples that balance each other.

    Args:
      group: how many examples such a group has; example i is of group i // group.
      class_names: in order; example i is of class i % len(class_names).
      image_shape: of what the model will see, or None.
      chunk: how many examples are computed at once.
      load: (number of the split, int64 [B]) -> columns without the label.
      shown: splits with examples of only some classes, as (the first, how many).
    """
    shown = shown or {}
    sizes = {'train': _TRAIN // group * group, 'test': _TEST // group * group}
    sizes |= {part: sizes['test'] for part in shown if part != 'train'}

    def whole(part: str) -> Source:
        first, classes = shown.get(part, (0, len(class_names)))

        def columns(indices: np.ndarray) -> Columns:
            indices = np.asarray(indices, np.int64)
            parts = [
                load(_SPLITS[part], indices[start : start + chunk])
                for start in range(0, max(1, len(indices)), chunk)
            ]
            found: Columns = {}
            for column, values in parts[0].items():
                every = [one[column] for one in parts]
                found[column] = (
                    np.concatenate(every)
                    if isinstance(values, np.ndarray)
                    else list(itertools.chain.from_iterable(every))
                )
            return {**found, 'label': (first + indices % classes).astype(np.int32)}

        return Source(
            name=name,
            split=part,
            length=sizes[part],
            num_classes=len(class_names),
            image_shape=image_shape,
            load=columns,
            in_memory=True,
            channels=image_shape[2] if image_shape else 3,
            class_names=class_names,
            labels=lambda: (first + np.arange(sizes[part]) % classes).astype(np.int32),
        )

    return cut(name, sizes, whole, split, key)


def _size(image_size: int | tuple[int, int], least: tuple[int, int], key: str) -> tuple[int, int]:
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size[0] < least[0] or size[1] < least[1]:
        raise UserError(
            f'{key}.image_size is {size[0]}x{size[1]}: set {least[0]}x{least[1]} or more'
        )
    return size


# --- Sprites ---------------------------------------------------------------------------

_SHAPES = ('square', 'circle', 'cross', 'triangle', 'ring', 'diamond')


@functools.lru_cache(maxsize=16)
def _sprites(side: int) -> UInt8[np.ndarray, 'shapes {side} {side}']:
    """The shapes as 0 and 1, in the order of their names; one array for all."""
    at = (np.arange(side) - (side - 1) / 2) / (side / 2)
    y, x = at[:, None], at[None, :]
    far = np.hypot(y, x)
    shapes = np.stack(
        np.broadcast_arrays(
            np.maximum(np.abs(y), np.abs(x)) < 0.85,
            far < 1,
            np.minimum(np.abs(y), np.abs(x)) < 0.34,
            np.abs(x) < (y + 1.1) / 2,
            (far < 1.05) & (far > 0.5),
            np.abs(y) + np.abs(x) < 1.05,
        )
    ).astype(np.uint8)
    shapes.setflags(write=False)
    return shapes


# --- Motion ----------------------------------------------------------------------------

_DIRECTIONS = ('right', 'down right', 'down', 'down left', 'left', 'up left', 'up', 'up right')
# (y, x) of one step; y grows downwards. Each is the opposite of the fourth after it, and all
# eight one after the other lead back to where they began.
_STEPS = np.array([(0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1)])
_MOVING = 2


def _clips(
    keys: UInt64[np.ndarray, ' b'],
    moves: Int64[np.ndarray, 'b frames 2'],
    shape: tuple[int, int, int],
) -> UInt8[np.ndarray, 'b frames h w c']:
    """Two sprites that move alike over noise, leaving on one side and coming in on the other.

    Args:
      moves: (y, x) since the first frame in units of the speed, which is drawn here.
      shape: of a frame.
    """
    height, width, channels = shape
    batch, frames = moves.shape[:2]
    side = max(3, round(min(height, width) / 5))
    fastest = max(1, min(height, width) // 10)
    draws = _draws(keys, 0, 1 + 3 * _MOVING)
    colours = _draws(keys, 16, (1 + _MOVING) * channels).reshape(batch, 1, 1 + _MOVING, channels)
    grain = _noise(keys, frames * height * width) >> 3
    # 31 of noise, 63 of background and 80 of each sprite are within a byte.
    clip = np.empty((*grain.shape, channels), np.uint8)
    for channel in range(channels):
        clip[:, :, channel] = grain + (64 * colours[:, :, 0, channel]).astype(np.uint8)
    speed = 1 + (fastest * draws[:, :1]).astype(np.int64)
    inside = np.arange(side)
    for sprite in range(_MOVING):
        y, x, kind = draws[:, 1 + 3 * sprite : 4 + 3 * sprite].T
        rows = (height * y).astype(np.int64)[:, None] + speed * moves[:, :, 0]
        columns = (width * x).astype(np.int64)[:, None] + speed * moves[:, :, 1]
        rows = (rows[:, :, None] + inside) % height
        columns = (columns[:, :, None] + inside) % width
        at = rows[:, :, :, None] * width + columns[:, :, None, :]
        at += np.arange(batch * frames).reshape(batch, frames, 1, 1) * (height * width)
        mask = _sprites(side)[(len(_SHAPES) * kind).astype(np.int64)]
        light = (48 + 33 * colours[:, 0, 1 + sprite]).astype(np.uint8)
        for channel in range(channels):
            flat = clip.reshape(-1, channels)[:, channel]
            flat[at] += (mask * light[:, channel, None, None])[:, None]
    return clip.reshape(batch, frames, height, width, channels)


def _moving(
    name: str,
    turning: bool,
    split: str,
    image_size: int | tuple[int, int],
    seed: int,
    frames: int,
    channels: int,
    key: str,
) -> Source:
    height, width = _size(image_size, (12, 12), key)
    if channels not in (1, 3):
        raise UserError(f'{key}.channels is {channels}: set 1 or 3')
    if frames < 2 or (turning and frames % 8):
        least = 'a multiple of 8, so that all eight places are seen' if turning else '2 or more'
        raise UserError(f'{key}.frames is {frames}: set {least}')
    time = np.arange(frames)
    if turning:
        lap = np.concatenate([[[0, 0]], np.cumsum(_STEPS, axis=0)[:-1]])
        paths = lap[time % 8][None]
    else:
        paths = time[:, None] * _STEPS[:4, None]

    def load(part: int, indices: np.ndarray) -> Columns:
        group, label = np.divmod(indices, 8)
        if turning:
            keys = order.example_keys(seed, part, group)
            found = paths[np.zeros_like(label)]
            # Who begins elsewhere on the lap begins in another direction.
            when = (time + label[:, None]) % frames
        else:
            keys = order.example_keys(seed, part, 4 * group + label % 4)
            found = paths[label % 4]
            when = np.where(label[:, None] < 4, time, time[::-1])
        # What is drawn once for a group is only put into another order: the frames of its
        # clips, noise included, are the same bytes.
        clips = _clips(keys, found, (height, width, channels))
        return {'video': clips[np.arange(len(clips))[:, None], when]}

    chunk = max(1, _CHUNK_BYTES // (frames * height * width))
    shape = (height, width, channels)
    return _source(name, 8, split, key, _DIRECTIONS, shape, chunk, load)


def motion(
    split: str,
    image_size: int | tuple[int, int],
    seed: int = 0,
    frames: int = 8,
    channels: int = 1,
    key: str = 'data',
) -> Source:
    """A source of clips of sprites that move in one of eight directions.

    Where a sprite is in any one frame is uniform over the picture, whatever its direction, since
    it comes in again where it left: one frame gives 1/8. All frames without their order give the
    axis but not the sign, since the clip of the opposite direction holds the same frames: 1/2 of
    the eight, and chance where only two opposite directions are asked for
    (`classes=('right', 'left')`).

    Args:
      split: of `train` and `test`, see `parse_split`.
      image_size: pixels, one number or (height, width).
      seed: of everything.
      frames: of each clip.
      channels: 1 or 3.
      key: prefix of the config keys in messages.

    Returns:
      Columns 'video' uint8 [B, frames, H, W, channels] and 'label' int32 [B].

    Raises:
      UserError: a number that cannot be, or no such split.
    """
    return _moving('motion', False, split, image_size, seed, frames, channels, key)


def orbit(
    split: str,
    image_size: int | tuple[int, int],
    seed: int = 0,
    frames: int = 8,
    channels: int = 1,
    key: str = 'data',
) -> Source:
    """A source of clips of sprites that go around an octagon; the label is where they set out to.

    All go clockwise, so that their direction turns by an eighth with every frame. The eight
    clips of a group hold the same frames, each beginning with another: all frames without their
    order say nothing, 1/8. Nor does any one frame, as in `motion`.

    Args:
      frames: of each clip, a multiple of 8.
      the others: as of `motion`, as are the columns.

    Raises:
      UserError: a number that cannot be, or no such split.
    """
    return _moving('orbit', True, split, image_size, seed, frames, channels, key)


# --- Tones -----------------------------------------------------------------------------

RATE = 8000
# Of log_mel's defaults, 0.025 and 0.01 seconds, in samples.
_WINDOW, _HOP = 200, 80
# In mel, as log_mel has it: 250 and 3,400 Hz, and how far apart two pitches are at least.
_LOWEST, _HIGHEST = 1127 * np.log1p(np.array([250, 3400]) / 700)
_APART = 0.15 * (_HIGHEST - _LOWEST)
# A period of a sine, looked up: integer phases make no two processors differ by rounding.
_SINE_BITS = 12
_ORDERS = np.array(list(itertools.permutations(range(3))))


@functools.lru_cache(maxsize=1)
def _sine() -> Float32[np.ndarray, ' period']:
    period = np.arange(1 << _SINE_BITS) * (2 * np.pi / (1 << _SINE_BITS))
    return np.sin(period).astype(np.float32)


def _sounds(
    keys: UInt64[np.ndarray, ' b'], label: Int64[np.ndarray, ' b'], slot: int
) -> Float32[np.ndarray, 'b 3 {slot*80-120}']:
    """Three tones, in the order of the label; a tone is the same wherever it comes.

    Args:
      slot: frames of the spectrogram for each tone.
    """
    draws = _draws(keys, 0, 9).reshape(len(keys), 3, 3)
    pitch = np.sort(draws[:, 0], axis=1) * (_HIGHEST - _LOWEST - 2 * _APART)
    pitch += _LOWEST + _APART * np.arange(3)
    hertz = 700 * np.expm1(pitch / 1127)
    step = (hertz / RATE * 2.0**32).astype(np.uint32)
    begin = (draws[:, 1] * 2.0**32).astype(np.uint32)
    loud = (0.2 + 0.3 * draws[:, 2]).astype(np.float32)
    # From low, middle, high to first, second, third.
    at = np.arange(len(keys))[:, None], _ORDERS[label]
    step, begin, loud = step[at][..., None], begin[at][..., None], loud[at][..., None]
    time = np.arange(slot * _HOP - (_WINDOW - _HOP), dtype=np.uint32)
    # Five milliseconds up and down: a click would be heard at all pitches.
    edge = np.minimum(1, (np.minimum(time, time[::-1]) + 1) / 40).astype(np.float32)
    phase = begin + step * time
    return _sine()[phase >> np.uint32(32 - _SINE_BITS)] * loud * edge


def tones(
    split: str,
    image_size: int | tuple[int, int],
    seed: int = 0,
    noise: float | int = 0.02,
    key: str = 'data',
) -> Source:
    """A source of sounds at 8,000 Hz of three tones, low, middle and high, in one of six orders.

    They are as long as `log_mel(8000, bins=HEIGHT)` needs for an image of this size. None of its
    frames hears two tones, and a tone fills the same number of frames in the same way wherever it
    comes: the frames without their order, so also the mean over time, are distributed alike for
    all six labels (without noise, they are the same numbers): 1/6. That is of frames: the Fourier
    transform of a whole sound, or frames of another length, may tell more.

    Args:
      split: of `train` and `test`, see `parse_split`.
      image_size: (height, width) of the spectrogram, one number if equal.
      seed: of everything.
      noise: amplitude of the white noise at its loudest; a tone has 0.2 to 0.5.
      key: prefix of the config keys in messages.

    Returns:
      Columns 'audio' float32 [B, 200 + 80 (width - 1)] and 'label' int32 [B].

    Raises:
      UserError: a size that is too small, noise that is negative, or no such split.
    """
    height, width = _size(image_size, (16, 12), key)
    if not 0 <= noise <= 0.5:
        raise UserError(f'{key}.noise is {noise}: set a number from 0 to 0.5')
    slot = width // 3
    length = _WINDOW + (width - 1) * _HOP

    def load(part: int, indices: np.ndarray) -> Columns:
        group, label = np.divmod(indices, 6)
        keys = order.example_keys(seed, part, indices)
        level = np.float32(noise / 127.5) * (0.5 + 0.5 * _draws(keys, 0, 1)).astype(np.float32)
        sound = (_noise(keys, length) - np.float32(127.5)) * level
        slots = sound[:, : 3 * slot * _HOP].reshape(len(indices), 3, slot * _HOP)
        # The frame before a slot reaches so far into it.
        slots[:, :, _WINDOW - _HOP :] += _sounds(
            # Another key than that of any example.
            order.example_keys(seed, 2 + part, group),
            label,
            slot,
        )
        return {'audio': sound}

    names = tuple('-'.join(('low', 'middle', 'high')[i] for i in one) for one in _ORDERS)
    chunk = max(1, _CHUNK_BYTES // length)
    return _source('tones', 6, split, key, names, (height, width, 1), chunk, load)


# --- Phrases ---------------------------------------------------------------------------

_ANIMALS = (
    'dog',
    'cat',
    'fox',
    'horse',
    'goat',
    'bear',
    'mouse',
    'wolf',
    'tiger',
    'duck',
    'eagle',
    'whale',
)
_PEOPLE = (
    'girl',
    'boy',
    'cook',
    'pilot',
    'nurse',
    'king',
    'queen',
    'baker',
    'farmer',
    'singer',
    'judge',
    'sailor',
)
_MACHINES = (
    'robot',
    'laptop',
    'truck',
    'tractor',
    'engine',
    'drone',
    'printer',
    'camera',
    'radio',
    'clock',
    'train',
    'pump',
)
_VERBS = (
    'shows',
    'brings',
    'leads',
    'sends',
    'gives',
    'takes',
    'offers',
    'lends',
    'returns',
    'hands',
    'sells',
    'promises',
)
_WHEN = (
    'today',
    'tonight',
    'now',
    'again',
    'often',
    'later',
    'soon',
    'twice',
    'daily',
    'first',
    'here',
    'outside',
)
_KINDS = (_ANIMALS, _PEOPLE, _MACHINES)
_BAGS = len(_ANIMALS) * len(_PEOPLE) * len(_MACHINES) * len(_VERBS) * len(_WHEN)


def _bags(seed: int, numbers: Int64[np.ndarray, ' b']) -> Int64[np.ndarray, 'b 5']:
    """(animal, person, machine, verb, when) of some bags, no two the same."""
    rest = order.shuffled(numbers, length=_BAGS, seed=seed, epoch=0)
    words = []
    for table in (*_KINDS, _VERBS, _WHEN):
        rest, word = np.divmod(rest, len(table))
        words.append(word)
    return np.stack(words, axis=1)


def phrases(split: str, seed: int = 0, key: str = 'data') -> Source:
    """A source of sentences of the same words in six orders, such as

    'the dog shows the girl to the robot today'. An animal, a person and a machine take the three
    places in any order, which is the label. Every bag of words comes in all six orders, one after
    the other, so that whatever counts words, letters or bytes is right on exactly 1/6. The bags
    of `test` are none of those of `train`.

    Args:
      split: of `train` and `test`, see `parse_split`.
      seed: of the order of the bags.
      key: prefix of the config keys in messages.

    Returns:
      Columns 'text', B strings of ASCII of less than 64 characters, and 'label' int32 [B].

    Raises:
      UserError: no such split.
    """
    first = {0: 0, 1: _TRAIN // 6}

    def load(part: int, indices: np.ndarray) -> Columns:
        group, label = np.divmod(indices, 6)
        texts = []
        rows = np.concatenate([_bags(seed, first[part] + group), _ORDERS[label]], axis=1)
        for *nouns, verb, when, a, b, c in rows.tolist():
            one, two, three = (_KINDS[k][nouns[k]] for k in (a, b, c))
            texts.append(f'the {one} {_VERBS[verb]} the {two} to the {three} {_WHEN[when]}')
        return {'text': texts}

    names = tuple('-'.join(('animal', 'person', 'machine')[i] for i in one) for one in _ORDERS)
    return _source('phrases', 6, split, key, names, None, 1024, load)


# --- Pairs -----------------------------------------------------------------------------

_COLOURS = ('red', 'green', 'blue', 'yellow')
_RGB = np.array([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)], np.float32)
_PLACES = ('top left', 'top right', 'bottom left', 'bottom right')
_QUESTIONS = (
    'what colour is at the {place}',
    'name the colour of the {place} one',
    'what colour is the {shape}',
    'name the colour of the {shape}',
)
_PERMUTATIONS = np.array(list(itertools.permutations(range(4))))


def _paint(
    image: UInt8[np.ndarray, 'b pixels 3'],
    size: tuple[int, int],
    rows: Int64[np.ndarray, ' b'],
    columns: Int64[np.ndarray, ' b'],
    sprites: UInt8[np.ndarray, 'b side side'],
    colours: Float64[np.ndarray, 'b 3'],
) -> None:
    """Adds a sprite to each image, of its colour, with its first corner at this row and column."""
    inside = np.arange(sprites.shape[1])
    at = (rows[:, None] + inside)[:, :, None] * size[1] + (columns[:, None] + inside)[:, None]
    at += np.arange(len(image))[:, None, None] * (size[0] * size[1])
    image.reshape(-1, 3)[at] += sprites[..., None] * colours.astype(np.uint8)[:, None, None]


def _squares(
    keys: UInt64[np.ndarray, ' b'],
    colours: Int64[np.ndarray, 'b 4'],
    shapes: Int64[np.ndarray, 'b 4'],
    size: tuple[int, int],
) -> UInt8[np.ndarray, 'b h w 3']:
    """One sprite in each quarter of an image, somewhere in it, of these colours and shapes."""
    height, width = size[0] // 2, size[1] // 2
    batch = len(keys)
    side = max(5, round(min(height, width) * 0.55))
    draws = _draws(keys, 0, 13)
    image = (_noise(keys, size[0] * size[1] * 3) >> 3).reshape(batch, -1, 3)
    image += (48 * draws[:, 12]).astype(np.uint8)[:, None, None]
    for place in range(4):
        y, x, light = draws[:, 3 * place : 3 * place + 3].T
        row, column = divmod(place, 2)
        rows = row * height + ((height - side + 1) * y).astype(np.int64)
        columns = column * width + ((width - side + 1) * x).astype(np.int64)
        colour = _RGB[colours[:, place]] * (96 + 80 * light)[:, None]
        _paint(image, size, rows, columns, _sprites(side)[shapes[:, place]], colour)
    return image.reshape(batch, *size, 3)


def pairs(
    split: str, image_size: int | tuple[int, int], seed: int = 0, key: str = 'data'
) -> Source:
    """A source of pictures with a question, answered by neither of them alone.

    Each quarter of a picture has a sprite of another of four colours and another of four shapes.
    The question names a quarter or a shape, and the label is the colour there. Every picture comes
    with four questions, one for each answer; every question of a group of 16 comes with four
    pictures, one for each answer. So whatever sees only one of them is right on exactly 1/4.

    Args:
      split: of `train` and `test`, see `parse_split`.
      image_size: pixels, one number or (height, width).
      seed: of everything.
      key: prefix of the config keys in messages.

    Returns:
      Columns 'image' uint8 [B, H, W, 3], 'text', B strings of ASCII of less than 48 characters,
      and 'label' int32 [B].

    Raises:
      UserError: a size that is too small, or no such split.
    """
    height, width = _size(image_size, (16, 16), key)

    def load(part: int, indices: np.ndarray) -> Columns:
        group, within = np.divmod(indices, 16)
        turn, label = np.divmod(within, 4)
        # Another key than that of any picture.
        keys = order.example_keys(seed, 2 + part, group)
        draws = _draws(keys, 0, 2) * len(_PERMUTATIONS)
        base, shapes = (_PERMUTATIONS[draw.astype(np.int64)] for draw in draws.T)
        colours = (base + turn[:, None]) % 4
        asked = (colours == label[:, None]).argmax(axis=1)
        form = order.uniform(keys, (2 + asked).astype(np.uint64)) * len(_QUESTIONS)
        images = _squares(
            order.example_keys(seed, part, indices // 4), colours, shapes, (height, width)
        )
        named = shapes[np.arange(len(indices)), asked]
        texts = [
            _QUESTIONS[question].format(place=_PLACES[place], shape=_SHAPES[shape])
            for question, place, shape in zip(
                form.astype(np.int64).tolist(), asked.tolist(), named.tolist(), strict=True
            )
        ]
        return {'image': images, 'text': texts}

    chunk = max(1, _CHUNK_BYTES // (height * width * 3))
    return _source('pairs', 16, split, key, _COLOURS, (height, width, 3), chunk, load)


def quiz(split: str, image_size: int | tuple[int, int], seed: int = 0, key: str = 'data') -> Source:
    """The pictures and questions of `pairs`, but colours may come more than once in a picture.

    The question alone is right on exactly 1/4. The picture alone, which does not know what is
    asked, can at best name its most frequent colour: 17/32 (0.53) on average. That is a slope for
    a model to begin on, which `pairs` has not: there, nothing is learned before both are.

    Args, returns and raises are those of `pairs`.
    """
    height, width = _size(image_size, (16, 16), key)

    def load(part: int, indices: np.ndarray) -> Columns:
        rows, label = np.arange(len(indices)), indices % 4
        draws = _draws(order.example_keys(seed, 4 + part, indices), 0, 7)
        asked = (draws[:, 4] * 4).astype(np.int64)
        shapes = _PERMUTATIONS[(draws[:, 5] * len(_PERMUTATIONS)).astype(np.int64)]
        form = (draws[:, 6] * len(_QUESTIONS)).astype(np.int64)
        colours = (draws[:, :4] * 4).astype(np.int64)
        # All turned by as much as makes the one that is asked for the label.
        colours = (colours + (label - colours[rows, asked])[:, None]) % 4
        images = _squares(
            order.example_keys(seed, 6 + part, indices), colours, shapes, (height, width)
        )
        named = shapes[rows, asked]
        texts = [
            _QUESTIONS[question].format(place=_PLACES[place], shape=_SHAPES[shape])
            for question, place, shape in zip(
                form.tolist(), asked.tolist(), named.tolist(), strict=True
            )
        ]
        return {'image': images, 'text': texts}

    chunk = max(1, _CHUNK_BYTES // (height * width * 3))
    return _source('quiz', 4, split, key, _COLOURS, (height, width, 3), chunk, load)


# --- Captions --------------------------------------------------------------------------

_HUES = ('red', 'green', 'blue', 'yellow', 'magenta', 'cyan')
_HUES_RGB = np.concatenate([_RGB, np.array([(1, 0, 1), (0, 1, 1)], np.float32)])
_CAPTIONS = (
    'a {hue} {shape}',
    'a picture of a {hue} {shape}',
    'one {shape}, and it is {hue}',
    'here is something {hue}: a {shape}',
)
# Each shape and each hue once among the six pairs that training never shows.
_SEEN = [(h, s) for h in range(6) for s in range(6) if (h + s) % 6]
_UNSEEN = [(h, (6 - h) % 6) for h in range(6)]
_BOTH = np.array(_SEEN + _UNSEEN)


def captions(
    split: str, image_size: int | tuple[int, int], seed: int = 0, key: str = 'data'
) -> Source:
    """A source of pictures of one coloured shape, each with a sentence that says what it is.

    There are six shapes in six colours, but `train` shows 30 of the 36: every shape and every
    colour, never a red square, a green diamond and four others. `test` has all 36, `unseen` those
    six alone: what is right there has understood the words one by one.

    Args:
      split: of `train`, `test` and `unseen`, see `parse_split`.
      image_size: pixels, one number or (height, width).
      seed: of everything.
      key: prefix of the config keys in messages.

    Returns:
      Columns 'image' uint8 [B, H, W, 3], 'text', B strings of ASCII of less than 48 characters,
      and 'label' int32 [B], whose classes are named as in 'red circle'.

    Raises:
      UserError: a size that is too small, or no such split.
    """
    height, width = _size(image_size, (12, 12), key)
    names = tuple(f'{_HUES[hue]} {_SHAPES[shape]}' for hue, shape in _BOTH)
    shown = {'train': (0, len(_SEEN)), 'unseen': (len(_SEEN), len(_UNSEEN))}

    def load(part: int, indices: np.ndarray) -> Columns:
        first, count = shown.get(tuple(_SPLITS)[part], (0, len(_BOTH)))
        hues, shapes = _BOTH[first + indices % count].T
        keys = order.example_keys(seed, 8 + part, indices)
        batch, side = len(keys), max(7, round(min(height, width) * 0.45))
        y, x, light, ground, form = _draws(keys, 0, 5).T
        image = (_noise(keys, height * width * 3) >> 3).reshape(batch, -1, 3)
        image += (48 * ground).astype(np.uint8)[:, None, None]
        rows, columns = (
            ((pixels - side + 1) * at).astype(np.int64) for pixels, at in ((height, y), (width, x))
        )
        colour = _HUES_RGB[hues] * (96 + 80 * light)[:, None]
        _paint(image, (height, width), rows, columns, _sprites(side)[shapes], colour)
        texts = [
            _CAPTIONS[int(form * len(_CAPTIONS))].format(hue=_HUES[hue], shape=_SHAPES[shape])
            for hue, shape, form in zip(hues, shapes, form, strict=True)
        ]
        return {'image': image.reshape(batch, height, width, 3), 'text': texts}

    chunk = max(1, _CHUNK_BYTES // (height * width * 3))
    shape = height, width, 3
    return _source('captions', 180, split, key, names, shape, chunk, load, shown)
