"""Sounds to spectrograms, which a ViT takes as images (AST, arXiv 2104.01778)."""

import functools
import io

import numpy as np
from jaxtyping import Float32

from big_vit.data.operations import (
    BadExampleError,
    Columns,
    Draw,
    Operation,
    Real,
    UnfitError,
    number,
    whole,
)

# Half an hour: a longer file is no example.
_MOST_SECONDS = 1800
# The power below which a spectrogram is silent, as Kaldi has it: float32's epsilon.
_FLOOR = float(np.finfo(np.float32).eps)


def _read(data: bytes, rate: int) -> np.ndarray:
    """float32 [samples] at `rate`, all channels in one; ValueError where it cannot be read."""
    import soundfile
    from scipy.signal import resample_poly

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.frames > _MOST_SECONDS * file.samplerate:
                raise ValueError(f'{file.frames / file.samplerate:,.0f} seconds of sound')
            samples = file.read(dtype='float32', always_2d=True).mean(axis=1)
            own = file.samplerate
    except soundfile.LibsndfileError as error:
        raise ValueError(f'not a sound ({error})') from error
    if own != rate:
        common = int(np.gcd(own, rate))
        samples = resample_poly(samples, rate // common, own // common).astype(np.float32)
    return samples


def decode_audio(rate, seconds, random_start=False) -> Operation:
    """A sound file to one channel at `rate` Hz, cut or padded to so many seconds.

    The middle is taken, or with `random_start` any part; what is too short has silence behind it.
    WAV, FLAC, OGG and MP3 are read by libsndfile (`pip install soundfile`).
    """
    rate = whole('rate', rate, 100, 1_000_000)
    length = round(rate * number('seconds', seconds, 1e-3, _MOST_SECONDS))

    def apply(columns: Columns, draw: Draw) -> Columns:
        sounds = _need(columns, 'audio')
        out = np.zeros((len(sounds), length), np.float32)
        where = draw(0) if random_start else np.full(len(sounds), 0.5)
        for row, sound in enumerate(sounds):
            try:
                samples = _read(sound, rate) if isinstance(sound, bytes) else sound
            except ValueError as error:
                raise BadExampleError(row, str(error)) from error
            spare = max(0, len(samples) - length)
            start = int(where[row] * (spare + 1)) if random_start else spare // 2
            part = samples[start : start + length]
            out[row, : len(part)] = part
        return {**columns, 'audio': out}

    return Operation(apply, random=bool(random_start))


def _need(columns: Columns, name: str):
    if name not in columns:
        raise UnfitError(f'needs {name!r}, but these examples have {", ".join(sorted(columns))}')
    return columns[name]


@functools.lru_cache(maxsize=8)
def mel_filters(
    bins: int, rate: int, size: int, low: Real, high: Real
) -> Float32[np.ndarray, 'frequencies bins']:
    """Triangles of equal width on the mel scale 1127 ln(1 + f / 700), as Kaldi makes them.

    Args:
      size: of the Fourier transform; there are size / 2 + 1 frequencies.
      low, high: Hz, where the first triangle begins and the last ends.
    """

    ends = 1127 * np.log1p(np.array([low, high], np.float64) / 700)
    edges = np.linspace(ends[0], ends[1], bins + 2)
    at = 1127 * np.log1p(np.arange(size // 2 + 1)[:, None] * rate / size / 700)
    up = (at - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - at) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(up, down)).astype(np.float32)


def log_mel(rate, bins=128, window=0.025, hop=0.01, low=20.0, high=None) -> Operation:
    """Sounds at `rate` Hz to images [bins, frames, 1]: the logarithm of the power by mel band.

    As AST does with Kaldi's filter bank: frames of `window` seconds, each `hop` seconds after the
    one before and none beyond the end; their mean taken away, pre-emphasis 0.97, a Hann window,
    zeros up to a power of two, the power of the Fourier transform, triangles from `low` to `high`
    Hz (half the rate), and the natural logarithm, of at least float32's epsilon. Low bands are at
    the top.
    """
    rate, bins = whole('rate', rate, 100, 1_000_000), whole('bins', bins, 1, 1024)
    width = round(rate * number('window', window, 1e-4, 10))
    step = round(rate * number('hop', hop, 1e-4, 10))
    if width < 2 or step < 1:
        raise UnfitError(f'takes a window and a hop of some samples, not {width} and {step}')
    low = number('low', low, 0, rate / 2)
    high = rate / 2 if high is None else number('high', high, low, rate / 2)
    size = 1 << (width - 1).bit_length()
    hann = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(width) / (width - 1))).astype(np.float32)

    def apply(columns: Columns, draw: Draw) -> Columns:
        sounds = _need(columns, 'audio')
        if not isinstance(sounds, np.ndarray) or sounds.ndim != 2:
            raise UnfitError('needs sounds of one length: put decode_audio(RATE, SECONDS) first')
        if sounds.shape[1] < width:
            raise UnfitError(f'needs sounds of at least {width} samples, not {sounds.shape[1]}')
        frames = np.lib.stride_tricks.sliding_window_view(sounds, width, axis=1)[:, ::step]
        frames = frames - frames.mean(axis=2, keepdims=True, dtype=np.float32)
        before = np.concatenate([frames[..., :1], frames[..., :-1]], axis=2)
        frames = (frames - np.float32(0.97) * before) * hann
        power = np.abs(np.fft.rfft(frames, size, axis=2)).astype(np.float32) ** 2
        bands = power @ mel_filters(bins, rate, size, low, high)
        image = np.log(np.maximum(bands, _FLOOR)).swapaxes(1, 2)[..., None]
        rest = {name: column for name, column in columns.items() if name != 'audio'}
        return {**rest, 'image': np.ascontiguousarray(image, np.float32)}

    return Operation(apply)


def standardize(mean, std) -> Operation:
    """Floats minus `mean`, divided by `std`: a spectrogram as numbers about 0."""
    mean, std = number('mean', mean, -1e9, 1e9), number('std', std, 1e-9, 1e9)

    def apply(columns: Columns, draw: Draw) -> Columns:
        image = np.asarray(_need(columns, 'image'), np.float32)
        return {**columns, 'image': (image - np.float32(mean)) / np.float32(std)}

    return Operation(apply)


def _mask(axis: int, width: object, count: object) -> Operation:
    """Bands along an axis set to the mean of their image."""
    widest, bands = whole('width', width, 1), whole('count', count, 1, 16)

    def apply(columns: Columns, draw: Draw) -> Columns:
        images = _need(columns, 'image')
        if not isinstance(images, np.ndarray):
            raise UnfitError('needs spectrograms of one size: put log_mel first')
        images = images.copy()
        side = images.shape[axis]
        if widest > side:
            raise UnfitError(f'takes at most the {side} that the images have for width')
        means = images.mean(axis=(1, 2, 3))
        for band in range(bands):
            spans = (draw(2 * band) * (widest + 1)).astype(np.int64)
            starts = (draw(2 * band + 1) * (side - spans + 1)).astype(np.int64)
            for row, (start, span) in enumerate(zip(starts.tolist(), spans.tolist(), strict=True)):
                part = images[row].swapaxes(0, axis - 1)[start : start + span]
                part[...] = means[row]
        return {**columns, 'image': images}

    return Operation(apply, random=True)


def mask_time(width, count=1) -> Operation:
    """`count` bands of up to `width` frames set to the mean (SpecAugment, arXiv 1904.08779)."""
    return _mask(2, width, count)


def mask_frequency(width, count=1) -> Operation:
    """`count` bands of up to `width` mel bins set to the mean (SpecAugment, arXiv 1904.08779)."""
    return _mask(1, width, count)


OPERATIONS = {
    operation.__name__: operation
    for operation in (decode_audio, log_mel, standardize, mask_time, mask_frequency)
}
