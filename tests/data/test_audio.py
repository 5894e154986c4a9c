"""Sounds: decoded to the sample, spectrograms by the law of Kaldi, damage is said.

`oracles/fbank.npz` holds three sounds (a chirp, noise, silence and then a tone) at two rates, and
what two others make of them: torchaudio 2.11's compliance.kaldi.fbank as AST calls it (htk_compat,
hanning, no dither, 128 bins), and kaldi_native_fbank 1.23, which is Kaldi's own code (40 bins from
100 to 3500 Hz, frames of 32 ms each 12.5 ms; it refuses 128 bins). Sounds are int16, full scale
2^15.
"""

import struct
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import resample_poly
from sequences import sound_file, tone, write_sounds

from big_vit.data import dataset, order, pipeline, transforms
from big_vit.data.transforms import audio, operations
from big_vit.errors import UserError
from big_vit.models.tokenizers import Patches

ORACLE = Path(__file__).parents[1] / 'oracles' / 'fbank.npz'


def apply(line, columns):
    count = len(next(iter(columns.values())))
    return transforms.parse(line, size=(16, 16))(
        columns, order.example_keys(0, 0, np.arange(count))
    )


def decoded(line, *files):
    return apply(line, {'audio': list(files)})['audio']


# --- Decoding --------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['WAV', 'FLAC'])
def test_the_middle_is_taken_and_silence_put_behind(kind):
    samples = np.linspace(-0.9, 0.9, 1000)
    files = sound_file(samples, kind), sound_file(samples[:300], kind)
    found = decoded('decode_audio(8000, 0.05)', *files)
    assert (found.shape, found.dtype) == ((2, 400), np.float32)
    np.testing.assert_allclose(found[0], samples[300:700], atol=1e-4)
    np.testing.assert_allclose(found[1, :300], samples[:300], atol=1e-4)
    assert not found[1, 300:].any()


@pytest.mark.parametrize('subtype', ['PCM_U8', 'PCM_24', 'FLOAT', 'ULAW', 'MS_ADPCM', 'GSM610'])
def test_the_same_part_of_every_kind_of_wav(subtype):
    file = sound_file(np.random.default_rng(0).normal(0, 0.1, 8000), subtype=subtype)
    whole = audio.read_sound(file, 8000, 10_000, None)
    for start in (0.0, 0.37, 0.93):
        first = int(start * (len(whole) - 699))
        part = audio.read_sound(file, 8000, 700, start)
        np.testing.assert_array_equal(part, whole[first : first + 700])


@pytest.mark.parametrize(('kind', 'least'), [('OGG', 0.99), ('MP3', 0.99)])
def test_lossy_files_come_at_the_right_place(kind, least):
    samples = np.cumsum(np.random.default_rng(0).normal(0, 0.01, 24_000)).clip(-0.9, 0.9)
    file = sound_file(samples, kind, 16_000)
    for start in (0.0, 0.3, 0.9):
        part = audio.read_sound(file, 16_000, 4000, start)
        first = int(start * 20_001)
        assert np.corrcoef(part, samples[first : first + 4000])[0, 1] > least
        assert np.corrcoef(part, samples[first + 20 : first + 4020])[0, 1] < 0.9999


@pytest.mark.parametrize('kind', ['WAV', 'FLAC', 'OGG'])
@pytest.mark.parametrize(('own', 'rate'), [(44_100, 16_000), (8000, 22_050), (16_000, 16_000)])
def test_a_part_is_what_resampling_the_whole_gives_there(kind, own, rate):
    samples = np.random.default_rng(1).normal(0, 0.1, (own, 2))
    file = sound_file(samples, kind, own)
    whole = audio.read_sound(file, own, own, 0.0)
    if kind != 'OGG':
        np.testing.assert_allclose(whole, samples.mean(1), atol=1e-4)
    wanted = resample_poly(whole.astype(np.float64), rate // 50, own // 50)
    for start in (0.0, 0.123, 0.5, 0.9999):
        part = audio.read_sound(file, rate, 900, start)
        first = int(start * (len(wanted) - 900 + 1))
        np.testing.assert_allclose(part, wanted[first : first + 900], atol=2e-6)
    np.testing.assert_allclose(audio.read_sound(file, rate, 10**6, None), wanted, atol=2e-6)


def test_channels_are_averaged_and_tones_keep_their_pitch():
    both = np.stack([tone(440, rate=16_000), np.zeros(16_000)], axis=1)
    found = decoded('decode_audio(8000, 1)', sound_file(both, rate=16_000))[0]
    assert np.abs(found - tone(440) / 2)[100:-100].max() < 0.01


def test_random_starts_cover_the_sound_and_belong_to_the_example():
    ramp = sound_file(np.linspace(0, 0.9, 4000))
    line = 'decode_audio(8000, 0.1, random_start=True)'
    found = decoded(line, *[ramp] * 300)
    starts = found[:, 0] / 0.9
    assert starts.min() < 0.03
    assert 0.77 < starts.max() <= 0.81
    assert len(np.unique(starts)) > 250
    np.testing.assert_array_equal(decoded(line, *[ramp] * 7), found[:7])
    assert transforms.parse(line, size=(8, 8)).is_random
    assert not transforms.parse('decode_audio(8000, 0.1)', size=(8, 8)).is_random


def test_a_long_file_takes_the_memory_of_its_part():
    file = sound_file(np.zeros(8000 * 600, np.int16), 'FLAC')
    tracemalloc.start()
    decoded('decode_audio(8000, 1)', file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


WAV = sound_file(tone(440))
NOISE = np.random.default_rng(0).normal(0, 0.1, 16_000)


def changed(data, at, new):
    return data[:at] + new + data[at + len(new) :]


def floats(values):
    return sound_file(np.asarray(values, np.float32), subtype='FLOAT')


DAMAGES = {
    'nothing': (b'', 'not a sound, or damaged'),
    'no sound': (b'RIFFnothing', 'not a sound, or damaged'),
    'no samples': (sound_file(np.zeros(0)), 'a sound of no sample'),
    'short WAV': (WAV[:-4000], r'it ends at byte 12044 of 16044'),
    'short FLAC': (sound_file(NOISE, 'FLAC')[:-2000], 'damaged'),
    'short OGG': (sound_file(NOISE, 'OGG')[:-2000], r'it ends at byte \d+ of \d+'),
    'short MP3': (sound_file(NOISE, 'MP3')[:-2000], 'it ends before sample 16,000 of 16,000'),
    'not a number': (floats([0, np.nan] * 4000), 'numbers that no sound has'),
    'infinite': (floats([0, np.inf] * 4000), 'numbers that no sound has'),
    'far too loud': (floats([0, 1e20] * 4000), 'numbers that no sound has'),
    'absurd rate': (changed(WAV, 24, struct.pack('<I', 2**31 - 1)), 'at most 384,000 are read'),
    'too long': (sound_file(np.zeros(180_100, np.int16), rate=100), '1,801 seconds'),
}


@pytest.mark.filterwarnings('ignore::RuntimeWarning')
@pytest.mark.parametrize(('data', 'message'), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_said_and_where(data, message):
    with pytest.raises(operations.BadExampleError, match=message) as error:
        decoded('decode_audio(8000, 2)', WAV, data)
    assert error.value.row == 1


def test_a_size_that_a_pipe_did_not_know_is_no_damage():
    for size in (0xFFFFFFFF, 0x7FFFFFFF, len(WAV)):
        found = decoded('decode_audio(8000, 1)', changed(WAV, 4, struct.pack('<I', size)))
        np.testing.assert_allclose(found[0], tone(440), atol=1e-4)


# --- Spectrograms ----------------------------------------------------------------------


def reference(samples, rate, bins, width, step, low, high):
    """The log-mel spectrogram in float64, by loops, from the definition."""
    size = 1
    while size < width:
        size *= 2
    window = [0.5 - 0.5 * np.cos(2 * np.pi * n / (width - 1)) for n in range(width)]
    mel = lambda f: 1127 * np.log(1 + f / 700)  # noqa: E731
    edges = np.linspace(mel(low), mel(high), bins + 2)
    columns = []
    for start in range(0, len(samples) - width + 1, step):
        frame = np.array(samples[start : start + width], np.float64)
        frame -= frame.mean()
        frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        spectrum = np.fft.fft(frame * window, size)
        power = np.abs(spectrum[: size // 2 + 1]) ** 2
        column = []
        for b in range(bins):
            total = 0.0
            for k, p in enumerate(power):
                m = mel(k * rate / size)
                if edges[b] < m < edges[b + 2]:
                    up = (m - edges[b]) / (edges[b + 1] - edges[b])
                    down = (edges[b + 2] - m) / (edges[b + 2] - edges[b + 1])
                    total += p * min(up, down)
            column.append(np.log(max(total, 1.1920929e-07)))
        columns.append(column)
    return np.array(columns).T


def test_log_mel_is_the_definition():
    rng = np.random.default_rng(0)
    sounds = np.stack([tone(700, 0.2), rng.normal(0, 0.1, 1600)]).astype(np.float32)
    for line, law in (
        ('log_mel(8000, bins=20)', (20, 200, 80, 20, 4000)),
        ('log_mel(8000, 12, 0.03, 0.02, 0, 3000)', (12, 240, 160, 0, 3000)),
    ):
        found = apply(line, {'audio': sounds})
        assert set(found) == {'image'}
        for image, samples in zip(found['image'], sounds, strict=True):
            np.testing.assert_allclose(image[..., 0], reference(samples, 8000, *law), atol=2e-3)


@pytest.mark.parametrize(
    ('line', 'sounds', 'other'),
    [
        ('log_mel(16000)', 'ast', 'torchaudio'),
        ('log_mel(8000, 40, 0.032, 0.0125, 100, 3500)', 'narrow', 'torchaudio'),
        ('log_mel(8000, 40, 0.032, 0.0125, 100, 3500)', 'narrow', 'kaldi'),
    ],
)
def test_log_mel_is_that_of_others(line, sounds, other):
    with np.load(ORACLE, allow_pickle=False) as kept:
        samples = kept[f'{sounds}_sound'].astype(np.float32) / 2**15
        wanted = kept[f'{sounds}_{other}']
    image = apply(line, {'audio': samples})['image'][..., 0]
    assert image.shape == wanted.shape
    # Both are float32, and the logarithm of nearly nothing is not well known.
    np.testing.assert_allclose(image, wanted, atol=0.01)
    assert np.abs(image - wanted).mean() < 2e-4


def test_a_tone_is_in_its_band():
    for frequency in (200, 1000, 3000):
        image = apply('log_mel(8000, bins=40)', {'audio': tone(frequency)[None].astype(np.float32)})
        loudest = image['image'][0, :, 20, 0].argmax()
        edges = np.linspace(1127 * np.log1p(20 / 700), 1127 * np.log1p(4000 / 700), 42)
        centre = 700 * np.expm1(edges[loudest + 1] / 1127)
        assert abs(centre - frequency) < 0.12 * frequency + 30


def test_standardize():
    image = np.random.default_rng(0).normal(-4, 4, (3, 5, 6, 1))
    for images in (image, image.astype(np.float32), list(image), [image[0], image[1, :3]]):
        found = apply('standardize(-4.2677393, 9.1379948)', {'image': images})['image']
        for one, was in zip(found, images, strict=True):
            assert one.dtype == np.float32
            wanted = (was.astype(np.float64) + 4.2677393) / (2 * 4.5689974)
            np.testing.assert_allclose(one, wanted, atol=1e-6)


def test_masks_hide_bands():
    image = np.random.default_rng(0).normal(0, 1, (200, 12, 30, 1)).astype(np.float32)
    before = image.copy()
    for line, axis in (('mask_time(9)', 2), ('mask_frequency(5)', 1)):
        found = apply(line, {'image': image})['image']
        other = tuple(a for a in (1, 2, 3) if a != axis)
        hidden = (found == image.mean((1, 2, 3), keepdims=True)).all(other)
        assert hidden.sum(1).max() == int(line.partition('(')[2][:-1])
        assert hidden.sum(1).min() == 0
        assert ((found == image).all(other) | hidden).all()
        # One band, and every place is hidden at times.
        assert (np.abs(np.diff(hidden.astype(int), axis=1)).sum(1) <= 2).all()
        assert hidden.any(0).all()
    twice = apply('mask_time(9, count=2)', {'image': image})['image']
    hidden = (twice == image.mean((1, 2, 3), keepdims=True)).all((1, 3))
    assert (np.abs(np.diff(hidden.astype(int), axis=1)).sum(1) > 2).any()
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('decode_audio(0, 1)', 'decode_audio takes a whole number from 100 to 384000 for rate'),
        ('decode_audio(8000, 1801)', 'takes a number from 0.001 to 1800 for seconds'),
        ('decode_audio(100, 0.001)', '0.001 at 100 Hz are no sample'),
        ('log_mel(8000, 0)', 'for bins'),
        ('log_mel(8000, window=0.0001)', 'takes a window and a hop of some samples'),
        ('log_mel(8000, low=3000, high=2000)', 'takes a low below high'),
        ('log_mel(8000, low=4000)', 'takes a low below high, not 4000 and 4000 Hz'),
        ('standardize(0, 0)', 'for std'),
        ('mask_time(0)', 'for width'),
    ],
)
def test_wrong_arguments_are_refused_at_once(line, message):
    with pytest.raises(UserError, match=message):
        transforms.parse(line, size=(8, 8))


@pytest.mark.parametrize(
    ('line', 'columns', 'message'),
    [
        ('decode_audio(8000, 1)', {'image': [b'']}, "needs 'audio', but these examples have image"),
        ('decode_audio(8000, 1) | decode_audio(8000, 1)', {'audio': [WAV]}, 'and comes once'),
        ('log_mel(8000)', {'audio': [WAV]}, 'needs sounds of one length: put decode_audio'),
        ('log_mel(8000)', {'audio': np.zeros((1, 9), np.float32)}, 'at least 200 samples, not 9'),
        ('mask_time(9)', {'image': np.zeros((1, 8, 8, 1), np.float32)}, 'takes at most the 8'),
    ],
)
def test_what_does_not_fit_is_refused(line, columns, message):
    with pytest.raises(UserError, match=message):
        apply(line, columns)


def test_a_missing_library_is_said_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, 'soundfile', None)
    with pytest.raises(UserError, match='decode_audio needs `pip install soundfile`'):
        transforms.parse('decode_audio(8000, 1)', size=(8, 8))


# --- From files through the model ------------------------------------------------------


def test_a_folder_of_sounds_is_a_dataset_of_images(tmp_path):
    write_sounds(tmp_path)
    spec = dataset.Spec(
        key='data',
        name='folder',
        split='train',
        transform='decode_audio(8000, 0.2) | log_mel(8000, 16) | mask_time(3) | resize(size)',
        image_size=(16, 16),
        settings=(('path', str(tmp_path)),),
    )
    source, rest = dataset.open_examples((spec,))
    assert transforms.check(rest, source, (16, 16)).parts['image'][0] == (16, 16, 1)
    batches = pipeline.train_batches(source, rest, pipeline.Order(12, 0))
    batch = next(batches)
    batches.close()
    assert batch['image'].dtype == np.float32
    # High tones are further down in the picture.
    lines = batch['image'][..., 0].mean(2).argmax(1)
    assert lines[batch['label'] == 0].min() > lines[batch['label'] == 1].max()


def test_spectrograms_go_through_the_patches_of_the_model():
    sounds = [sound_file(tone(f, 0.5)) for f in (300, 900)]
    line = 'decode_audio(8000, 0.335) | log_mel(8000, 32) | standardize(-6, 4)'
    images = apply(line, {'audio': sounds})['image']
    assert images.shape == (2, 32, 32, 1)
    module = Patches(width=12, patch_size=(16, 16))
    params = module.init(jax.random.key(0), jnp.asarray(images))
    tokens = np.asarray(module.apply(params, jnp.asarray(images)))
    assert tokens.shape == (2, 2, 2, 12)
    assert np.isfinite(tokens).all()
    assert np.abs(tokens[0] - tokens[1]).max() > 0.1
