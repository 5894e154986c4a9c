"""Operations that turn sounds into spectrograms, a ViT's images (AST, arXiv 2104.01778)."""

import functools
import io
import math

import numpy as np
from jaxtyping import Float32

from big_vit.data.normalisation import of_mean_and_std
from big_vit.data.transforms.operations import (
    BadExampleError,
    Columns,
    Draw,
    Images,
    Operation,
    Real,
    UnfitError,
    decoded,
    number,
    on_images,
    stacked,
    whole_number,
)

# A spectrogram has no black and white: its values are what `standardize` is given.
_OWN_SCALE = of_mean_and_std((0,), (1,))._replace(applies_to='nothing')
# Half an hour; no example is longer.
_MOST_SECONDS = 1800
# The highest rate in use; the filter that resamples grows with rates without a common factor.
_MOST_RATE = 384_000
_MOST_NUMBERS = 1 << 28
# Full scale is 1, or 2^15 in files of floats that were never scaled; more is damage.
_LOUDEST = 1 << 16
# Taps of the filter on each side at the lower of the two rates, as SciPy chooses them.
_REACH = 10
# The power below which a spectrogram is silent, float32's epsilon as in Kaldi.
_FLOOR = float(np.finfo(np.float32).eps)


@functools.lru_cache(maxsize=16)
def _low_pass(longer: int) -> Float32[np.ndarray, ' taps']:
    from scipy.signal import firwin

    return firwin(2 * _REACH * longer + 1, 1 / longer, window=('kaiser', 5.0)).astype(np.float32)


def read_sound(
    data: bytes, rate: int, length: int, start: float | None
) -> Float32[np.ndarray, ' samples']:
    """Read a part of a sound file at `rate` Hz, averaging its channels.

    Only that part is kept in memory, and only it is decoded from WAV and FLAC. Sounds are resampled
    by SciPy's polyphase filter (a Kaiser window of 5).

    Args:
      data: the file.
      rate: samples per second to return.
      length: samples to return; a shorter sound is returned in full.
      start: position among the possible beginnings, in [0, 1); None for the middle.

    Raises:
      ValueError: it cannot be read, is too long, or ends before it should.
    """
    import soundfile
    from scipy.signal import resample_poly

    if (wanted := _size(data)) > len(data):
        raise ValueError(f'damaged sound: it ends at byte {len(data)} of {wanted}')
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            file_rate, total = file.samplerate, file.frames
            if not 0 < file_rate <= _MOST_RATE:
                raise ValueError(f'a sound of {file_rate:,} Hz: at most {_MOST_RATE:,} are read')
            if total > _MOST_SECONDS * file_rate or total * file.channels > _MOST_NUMBERS:
                raise ValueError(
                    f'{total / file_rate:,.0f} seconds of sound in {file.channels} channels are '
                    'too long'
                )
            if not total:
                raise ValueError('a sound of no sample')
            common = math.gcd(file_rate, rate)
            up, down = rate // common, file_rate // common
            spare = max(0, -(-total * up // down) - length)
            first = spare // 2 if start is None else int(start * (spare + 1))
            # With a beginning at a multiple of `down` and the reach of the filter on each side, a
            # part is resampled to the same values as within the whole sound.
            margin = _REACH * max(up, down) // up + 1 if file_rate != rate else 0
            begin = max(0, first * down // up - margin) // down * down
            end = min(total, (first + length) * down // up + 1 + margin)
            # In compressed sounds other than FLAC, libsndfile seeks inexactly or not at all.
            if file.subtype.startswith(('PCM', 'FLOAT')):
                file.seek(begin)
            else:
                _skip(file, begin)
            samples = file.read(end - begin, dtype='float32', always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f'not a sound, or damaged ({error})') from error
    if len(samples) < end - begin:
        raise ValueError(f'damaged sound: it ends before sample {end:,} of {total:,}')
    if not (np.abs(samples) <= _LOUDEST).all():
        raise ValueError('damaged sound: it has numbers that no sound has')
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    if file_rate != rate:
        mono = resample_poly(mono, up, down, window=_low_pass(max(up, down)))
    offset = first - begin * up // down
    return mono[offset : offset + length].astype(np.float32)


def _size(data: bytes) -> int:
    """Return the length that a WAV or OGG file declares, which libsndfile ignores; 0 for others."""
    if (data[:4], data[8:12]) == (b'RIFF', b'WAVE'):
        size = int.from_bytes(data[4:8], 'little')
        # Some writers count the eight bytes before it too; writers to pipes do not know it.
        return size + 8 if len(data) < size < 0x7FF0_0000 else 0
    if data[:4] == b'OggS':
        page = data.rfind(b'OggS')
        lengths = data[page + 27 :][: data[page + 26]] if page + 26 < len(data) else b''
        return page + 27 + len(lengths) + sum(lengths)
    return 0


def _skip(file, samples: int) -> None:
    """Read past some samples."""
    while samples > 0:
        read = len(file.read(min(samples, 1 << 18), dtype='float32'))
        samples = samples - read if read else 0


def decode_audio(rate, seconds, random_start=False) -> Operation:
    """Decode sound files to one channel at `rate` Hz: float32 [B, rate * seconds], full scale 1.

    The middle is taken, or any part with `random_start`; shorter sounds are padded with silence.
    libsndfile (`pip install soundfile`) reads WAV, FLAC, OGG and MP3.
    """
    rate = whole_number('rate', rate, 100, _MOST_RATE)
    length = round(rate * number('seconds', seconds, 1e-3, _MOST_SECONDS))
    if length > _MOST_NUMBERS:
        raise UnfitError(f'takes fewer seconds: {seconds:g} at {rate} Hz are {length:,} samples')
    if length < 1:
        raise UnfitError(f'takes more seconds: {seconds:g} at {rate} Hz are no sample')
    try:
        import soundfile  # noqa: F401  Now, not at the first example.
    except (ImportError, OSError) as error:  # OSError: libsndfile itself is missing.
        raise UnfitError(f'needs `pip install soundfile` ({error})') from error

    def apply(columns: Columns, draw: Draw) -> Columns:
        sounds = _need(columns)
        out = np.zeros((len(sounds), length), np.float32)
        where = draw(0) if random_start else None
        for row, sound in enumerate(sounds):
            if not isinstance(sound, bytes):
                raise UnfitError('takes sound files, and comes once')
            try:
                start = None if where is None else float(where[row])
                part = read_sound(sound, rate, length, start)
            except ValueError as error:
                raise BadExampleError(row, str(error)) from error
            out[row, : len(part)] = part
        return {**columns, 'audio': out}

    return Operation(apply, random=bool(random_start))


def _need(columns: Columns):
    if 'audio' not in columns:
        raise UnfitError(f"needs 'audio', but these examples have {', '.join(sorted(columns))}")
    return columns['audio']


@functools.lru_cache(maxsize=8)
def mel_filters(
    bins: int, rate: int, size: int, low: Real, high: Real
) -> Float32[np.ndarray, 'frequencies bins']:
    """Make triangles of equal width on the mel scale 1127 ln(1 + f / 700), as Kaldi does.

    Args:
      size: length of the Fourier transform, which has size / 2 + 1 frequencies.
      low: frequency in Hz where the first triangle begins.
      high: frequency in Hz where the last one ends.

    Returns:
      Weights of the power at each frequency; a shared, read-only array.
    """
    ends = 1127 * np.log1p(np.array([low, high], np.float64) / 700)
    edges = np.linspace(ends[0], ends[1], bins + 2)
    at = 1127 * np.log1p(np.arange(size // 2 + 1)[:, None] * rate / size / 700)
    up = (at - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - at) / (edges[2:] - edges[1:-1])
    filters = np.maximum(0, np.minimum(up, down)).astype(np.float32)
    filters.setflags(write=False)
    return filters


def log_mel(rate, bins=128, window=0.025, hop=0.01, low=20.0, high=None) -> Operation:
    """Turn sounds at `rate` Hz into images [bins, frames, 1] of log power by mel band.

    Follows AST with Kaldi's filter bank: frames of `window` seconds every `hop` seconds, none
    beyond the end; their mean subtracted, pre-emphasis 0.97, a Hann window, zeros up to a power of
    two, the power of the Fourier transform, triangles from `low` to `high` Hz (half the rate by
    default), and the natural logarithm of at least float32's epsilon. Low bands are at the top.
    """
    rate, bins = whole_number('rate', rate, 100, 1_000_000), whole_number('bins', bins, 1, 1024)
    width = round(rate * number('window', window, 1e-4, 10))
    step = round(rate * number('hop', hop, 1e-4, 10))
    if width < 2 or step < 1:
        raise UnfitError(f'takes a window and a hop of some samples, not {width} and {step}')
    low = number('low', low, 0, rate / 2)
    high = rate / 2 if high is None else number('high', high, 0, rate / 2)
    if low >= high:
        raise UnfitError(f'takes a low below high, not {low:g} and {high:g} Hz')
    size = 1 << (width - 1).bit_length()
    if size * bins > _MOST_NUMBERS:
        raise UnfitError(f'takes a shorter window or fewer bins: {size:,} frequencies are too many')
    hann = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(width) / (width - 1))).astype(np.float32)

    def spectrogram(sound: np.ndarray) -> np.ndarray:
        frames = np.lib.stride_tricks.sliding_window_view(sound, width)[::step]
        frames = frames - frames.mean(axis=1, keepdims=True)
        before = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
        frames = (frames - np.float32(0.97) * before) * hann
        spectrum = np.fft.rfft(frames, size, axis=1)
        power = np.square(spectrum.real) + np.square(spectrum.imag)
        bands = mel_filters(bins, rate, size, low, high).T @ power.T
        return np.log(np.maximum(bands, np.float32(_FLOOR)))[..., None]

    def apply(columns: Columns, draw: Draw) -> Columns:
        sounds = _need(columns)
        if not isinstance(sounds, np.ndarray) or sounds.ndim != 2:
            raise UnfitError('needs sounds of one length: put decode_audio(RATE, SECONDS) first')
        if sounds.shape[1] < width:
            raise UnfitError(f'needs sounds of at least {width} samples, not {sounds.shape[1]}')
        if (sounds.shape[1] - width) // step * size > _MOST_NUMBERS:
            raise UnfitError(f'takes shorter sounds or a longer hop, not {sounds.shape[1]} samples')
        rest = {name: column for name, column in columns.items() if name != 'audio'}
        # One at a time, as the frames of a batch exceed a processor's caches.
        return {**rest, 'image': np.stack([spectrogram(sound) for sound in sounds])}

    return Operation(apply, normalisation=_OWN_SCALE)


def standardize(mean, std) -> Operation:
    """Subtract `mean` and divide by `std`, so that a spectrogram's values are about 0.

    AST divides by twice the standard deviation: standardize(-4.2677393, 9.1379948) on AudioSet.
    """
    mean, std = number('mean', mean, -1e9, 1e9), number('std', std, 1e-9, 1e9)

    def standardized(image: np.ndarray) -> np.ndarray:
        return (image.astype(np.float32, copy=False) - np.float32(mean)) / np.float32(std)

    def apply(images: Images, draw: Draw) -> Images:
        images = decoded(images)
        if isinstance(images, np.ndarray):
            return standardized(images)
        return stacked([standardized(image) for image in images])

    return on_images(apply)._replace(normalisation=of_mean_and_std((mean,), (std,)))


def _mask(axis: int, width: object, count: object) -> Operation:
    """Set bands along an axis to the mean of their image."""
    widest, bands = whole_number('width', width, 1), whole_number('count', count, 1, 16)

    def apply(images: Images, draw: Draw) -> Images:
        if not isinstance(images, np.ndarray):
            raise UnfitError('needs spectrograms of one size: put log_mel first')
        side = images.shape[axis]
        if widest > side:
            raise UnfitError(f'takes at most the {side} that the images have for width')
        images, means = images.copy(), images.mean(axis=(1, 2, 3))
        for band in range(bands):
            spans = (draw(2 * band) * (widest + 1)).astype(np.int64)
            starts = (draw(2 * band + 1) * (side - spans + 1)).astype(np.int64)
            for row, (start, span) in enumerate(zip(starts.tolist(), spans.tolist(), strict=True)):
                images[row].swapaxes(0, axis - 1)[start : start + span] = means[row]
        return images

    return on_images(apply, random=True)


def mask_time(width, count=1) -> Operation:
    """Set `count` bands of up to `width` frames to the mean (SpecAugment, arXiv 1904.08779)."""
    return _mask(2, width, count)


def mask_frequency(width, count=1) -> Operation:
    """Set `count` bands of up to `width` mel bins to the mean (SpecAugment, arXiv 1904.08779)."""
    return _mask(1, width, count)


OPERATIONS = {
    operation.__name__: operation
    for operation in (decode_audio, log_mel, standardize, mask_time, mask_frequency)
}
