"""Sounds of three tones in one of six orders."""

import functools
import itertools

import numpy as np
from jaxtyping import Float32, Int64, UInt64

from big_vit.data import order
from big_vit.data.sources.base import Columns, Request, Source
from big_vit.data.sources.synthetic import CHUNK_BYTES, check_size, draws, noise, synthetic_source

RATE = 8000
# Amplitude of the white noise at its loudest; a tone has 0.2 to 0.5.
NOISE = 0.02
# Defaults of log_mel, 0.025 and 0.01 seconds, in samples.
_WINDOW, _HOP = 200, 80
# In mel, as in log_mel: 250 and 3,400 Hz, and the least distance between two pitches.
_LOWEST, _HIGHEST = 1127 * np.log1p(np.array([250, 3400]) / 700)
_APART = 0.15 * (_HIGHEST - _LOWEST)
# A period of a sine, looked up: with integer phases, no two processors round differently.
_SINE_BITS = 12
_ORDERS = np.array(list(itertools.permutations(range(3))))


def tones(request: Request) -> Source:
    """Generate sounds at 8,000 Hz of three tones, low, middle and high, in one of six orders.

    They are as long as `log_mel(8000, bins=HEIGHT)` needs for an image of this size. None of its
    frames contains two tones, and a tone fills the same number of frames in the same way wherever
    it comes: the frames without their order, and so their mean over time, are distributed alike
    for all six labels (without noise, they are the same numbers): 1/6. This holds for these
    frames: the Fourier transform of a complete sound, or frames of another length, may tell more.

    Args:
      request: the examples to generate, of `train` and `test`; the image is the spectrogram.

    Returns:
      A source of columns 'audio', float32 [B, 200 + 80 (width - 1)], and 'label', int32 [B].

    Raises:
      UserError: the size is too small, or no such split.
    """
    height, width = check_size(request, (16, 12))
    slot = width // 3
    length = _WINDOW + (width - 1) * _HOP

    def load(split: int, indices: np.ndarray) -> Columns:
        group, label = np.divmod(indices, len(_ORDERS))
        keys = order.example_keys(request.seed, split, indices)
        level = np.float32(NOISE / 127.5) * (0.5 + 0.5 * draws(keys, 0, 1)).astype(np.float32)
        sound = (noise(keys, length) - np.float32(127.5)) * level
        slots = sound[:, : 3 * slot * _HOP].reshape(len(indices), 3, slot * _HOP)
        # No example has this key.
        tone_keys = order.example_keys(request.seed, 2 + split, group)
        # The last frame before a slot reaches that far into it.
        slots[:, :, _WINDOW - _HOP :] += _three_tones(tone_keys, label, slot)
        return {'audio': sound}

    return synthetic_source(
        'tones',
        request,
        group=len(_ORDERS),
        class_names=tuple('-'.join(('low', 'middle', 'high')[i] for i in o) for o in _ORDERS),
        image_shape=(height, width, 1),
        chunk=max(1, CHUNK_BYTES // length),
        load=load,
    )


@functools.lru_cache(maxsize=1)
def _sine() -> Float32[np.ndarray, ' period']:
    period = np.arange(1 << _SINE_BITS) * (2 * np.pi / (1 << _SINE_BITS))
    return np.sin(period).astype(np.float32)


def _three_tones(
    keys: UInt64[np.ndarray, ' b'], label: Int64[np.ndarray, ' b'], slot: int
) -> Float32[np.ndarray, 'b 3 {slot*80-120}']:
    """Generate three tones in the order of the label; a tone is the same wherever it comes.

    Args:
      slot: frames of the spectrogram for each tone.
    """
    uniform = draws(keys, 0, 9).reshape(len(keys), 3, 3)
    pitch = np.sort(uniform[:, 0], axis=1) * (_HIGHEST - _LOWEST - 2 * _APART)
    pitch += _LOWEST + _APART * np.arange(3)
    hertz = 700 * np.expm1(pitch / 1127)
    step = (hertz / RATE * 2.0**32).astype(np.uint32)
    begin = (uniform[:, 1] * 2.0**32).astype(np.uint32)
    loud = (0.2 + 0.3 * uniform[:, 2]).astype(np.float32)
    # From low, middle, high to first, second, third.
    at = np.arange(len(keys))[:, None], _ORDERS[label]
    step, begin, loud = step[at][..., None], begin[at][..., None], loud[at][..., None]
    time = np.arange(slot * _HOP - (_WINDOW - _HOP), dtype=np.uint32)
    # Five milliseconds of fading in and out: a click would be heard at all pitches.
    fade = np.minimum(1, (np.minimum(time, time[::-1]) + 1) / 40).astype(np.float32)
    phase = begin + step * time
    return _sine()[phase >> np.uint32(32 - _SINE_BITS)] * loud * fade
