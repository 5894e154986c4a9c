"""Sounds, videos and words: files that are generated here, decoded exactly, through the model."""

import io

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from big_vit.data import dataset, order, pipeline, transforms
from big_vit.data.transforms import audio, operations, text, video
from big_vit.errors import UserError
from big_vit.models.tokenizers import Patches

RATE = 8000


def keys_of(batch):
    return order.example_keys(0, 0, np.arange(batch))


def apply(line, columns, keys=None):
    count = len(next(iter(columns.values())))
    transform = transforms.parse(line, size=(16, 16))
    return transform(columns, keys_of(count) if keys is None else keys)


# --- Sounds ----------------------------------------------------------------------------


def tone(frequency, seconds=1.0, rate=RATE):
    return np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate) * 0.5


def sound(samples, kind='WAV', rate=RATE):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind)
    return file.getvalue()


@pytest.mark.parametrize('kind', ['WAV', 'FLAC'])
def test_sounds_are_cut_and_padded_in_the_middle(kind):
    samples = np.linspace(-0.9, 0.9, 1000)
    files = [sound(samples, kind), sound(samples[:300], kind)]
    found = apply('decode_audio(8000, 0.05)', {'audio': files})['audio']
    assert found.shape == (2, 400)
    np.testing.assert_allclose(found[0], samples[300:700], atol=1e-4)
    np.testing.assert_allclose(found[1, :300], samples[:300], atol=1e-4)
    assert not found[1, 300:].any()


def test_stereo_and_other_rates():
    both = np.stack([tone(440, rate=16000), tone(440, rate=16000) * 0], axis=1)
    found = apply('decode_audio(8000, 1)', {'audio': [sound(both, rate=16000)]})['audio'][0]
    wanted = tone(440) / 2
    assert np.abs(found[100:-100] - wanted[100:-100]).max() < 0.01


def test_random_starts_cover_the_sound():
    ramp = sound(np.linspace(0, 0.9, 4000))
    found = apply('decode_audio(8000, 0.1, random_start=True)', {'audio': [ramp] * 300})['audio']
    starts = found[:, 0] / 0.9
    assert starts.min() < 0.03
    assert 0.77 < starts.max() <= 0.81
    assert len(np.unique(starts)) > 250


def reference(samples, bins, width, step, low, high):
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
                m = mel(k * RATE / size)
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
    found = apply('log_mel(8000, bins=20)', {'audio': sounds})['image']
    assert found.shape == (2, 20, 18, 1)
    for image, samples in zip(found, sounds, strict=True):
        np.testing.assert_allclose(
            image[..., 0], reference(samples, 20, 200, 80, 20, 4000), atol=2e-3
        )


def test_a_tone_is_in_its_band():
    for frequency in (200, 1000, 3000):
        image = apply('log_mel(8000, bins=40)', {'audio': tone(frequency)[None].astype(np.float32)})
        loudest = image['image'][0, :, 20, 0].argmax()
        edges = np.linspace(1127 * np.log1p(20 / 700), 1127 * np.log1p(4000 / 700), 42)
        centre = 700 * np.expm1(edges[loudest + 1] / 1127)
        assert abs(centre - frequency) < 0.12 * frequency + 30


def test_masks_hide_bands():
    image = np.random.default_rng(0).normal(0, 1, (200, 12, 30, 1)).astype(np.float32)
    for line, axis in (('mask_time(9)', 2), ('mask_frequency(5)', 1)):
        found = apply(line, {'image': image})['image']
        other = tuple(a for a in (1, 2, 3) if a != axis)
        hidden = (found == image.mean((1, 2, 3), keepdims=True)).all(other).sum(1)
        assert hidden.max() == int(line.partition('(')[2][:-1])
        assert hidden.min() == 0
        assert ((found == image).all(other).sum(1) + hidden == image.shape[axis]).all()


def test_broken_sounds_are_named():
    with pytest.raises(operations.BadExampleError, match='not a sound') as error:
        apply('decode_audio(8000, 1)', {'audio': [sound(tone(440)), b'RIFFnothing']})
    assert error.value.row == 1


# --- Videos ----------------------------------------------------------------------------


def clip(frames=30, codec='libx264', size=(48, 64), **options):
    """Frame i has the brightness 8 i."""
    file = io.BytesIO()
    with av.open(file, 'w', format='mp4') as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.height, stream.width, stream.pix_fmt = *size, 'yuv420p'
        for i in range(frames):
            picture = np.full((*size, 3), 8 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format='rgb24')))
        container.mux(stream.encode())
    return file.getvalue()


CLIPS = {
    'h264 with B-frames and one keyframe': {'g': '250', 'bf': '3'},
    'h264 with keyframes': {'g': '5'},
}


@pytest.mark.parametrize('options', CLIPS.values(), ids=CLIPS)
def test_the_right_frames_come(options):
    data = clip(**options)

    def numbers(*arguments):
        found = video.read_frames(data, *arguments)
        assert found.dtype == np.uint8
        assert found.shape[1:] == (48, 64, 3)
        return np.rint(found.mean((1, 2, 3)) / 8).astype(int).tolist()

    assert numbers(30, 1, 0.0) == list(range(30))
    assert numbers(4, 3, None) == [10, 13, 16, 19]
    assert numbers(2, 5, 0.999) == [24, 29]
    assert numbers(3, 1, 0.5) == [14, 15, 16]
    assert numbers(4, 20, 0.0) == [0, 20, 29, 29]


def test_videos_become_images():
    clips = [clip(g='5'), clip(20, g='5')]
    found = apply('decode_video(5, 2) | resize_video((24, 32)) | crop_video(16)', {'video': clips})
    assert found['video'].shape == (2, 5, 16, 16, 3)
    whole = apply('decode_video(5, 2) | middle_frame | resize(size)', {'video': clips})
    assert whole['image'].shape == (2, 16, 16, 3)
    middle = np.rint(whole['image'].mean((1, 2, 3)) / 8).astype(int).tolist()
    assert middle == [14, 9]
    starts = apply('decode_video(1, 1, random_start=True)', {'video': clips[:1] * 40})['video']
    assert len(set(np.rint(starts.mean((1, 2, 3, 4)) / 8).tolist())) > 15
    arrays = np.arange(2 * 30, dtype=np.uint8).reshape(2, 30, 1, 1, 1)
    kept = apply('decode_video(4, 3)', {'video': arrays})['video'][..., 0, 0, 0]
    assert kept.tolist() == [[10, 13, 16, 19], [40, 43, 46, 49]]


def test_broken_videos_are_named():
    good = clip(10)
    for data, message in ((b'nothing', 'not a video'), (good[: len(good) // 2], 'video|damaged')):
        with pytest.raises(operations.BadExampleError, match=message) as error:
            apply('decode_video(2)', {'video': [good, data]})
        assert error.value.row == 1


# --- Words -----------------------------------------------------------------------------


def test_bytes_are_tokens():
    found = apply('lower | byte_tokens(6)', {'text': ['AB', 'grün', '']})
    wanted = [
        [ord('a') + 3, ord('b') + 3, 1, 0, 0, 0],
        [*(byte + 3 for byte in 'grün'.encode()), 1],
        [1, 0, 0, 0, 0, 0],
    ]
    assert found['tokens'].tolist() == wanted
    assert found['text_mask'].sum(1).tolist() == [3, 6, 1]
    assert 'text' not in found


def test_a_tokenizer_of_hugging_face(tmp_path):
    words = ['the cat sat on the mat', 'a dog sat on a log', 'the dog ate the cat']
    made = Tokenizer(models.WordPiece(unk_token='[UNK]'))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(
        words, trainers.WordPieceTrainer(vocab_size=60, special_tokens=['[PAD]', '[UNK]'])
    )
    made.enable_padding(pad_id=7)
    made.save(str(tmp_path / 'tokenizer.json'))
    found = apply(f'tokenize({str(tmp_path / "tokenizer.json")!r}, 5)', {'text': words})
    made.no_padding()
    for row, mask, line in zip(found['tokens'], found['text_mask'], words, strict=True):
        ids = made.encode(line).ids[:5]
        assert row.tolist() == ids + [7] * (5 - len(ids))
        assert mask.sum() == len(ids)
    with pytest.raises(UserError, match=r"tokenize cannot read '/no/such\.json'"):
        transforms.parse("tokenize('/no/such.json', 5)", size=(8, 8))


# --- Through the model and from files ---------------------------------------------------


def tokens_of(images, patch):
    module = Patches(width=12, patch_size=patch)
    params = module.init(jax.random.key(0), jnp.asarray(images, jnp.float32))
    return np.asarray(module.apply(params, jnp.asarray(images, jnp.float32)))


def test_spectrograms_and_frames_go_through_the_patches_of_the_model():
    sounds = [sound(tone(f, 0.5)) for f in (300, 900)]
    found = apply(
        'decode_audio(8000, 0.41) | log_mel(8000, 32) | standardize(-6, 4)', {'audio': sounds}
    )
    assert found['image'].shape == (2, 32, 39, 1)
    tokens = tokens_of(found['image'][:, :, :32], (16, 16))
    assert tokens.shape == (2, 2, 2, 12)
    assert np.isfinite(tokens).all()
    assert not np.allclose(tokens[0], tokens[1])
    frames = apply('decode_video(4)', {'video': [clip(8)] * 2})['video']
    tokens = tokens_of(frames.reshape(8, *frames.shape[2:]) / 255, (16, 16))
    assert tokens.shape == (8, 3, 4, 12)
    assert np.isfinite(tokens).all()


def test_a_folder_of_sounds_is_a_dataset_of_images(tmp_path):
    for i in range(12):
        path = tmp_path / ['high', 'low'][i % 2] / f'{i}.wav'
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(sound(tone([1500, 300][i % 2] + 10 * i, 0.3)))
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


def test_what_is_no_image_yet_is_said_with_what_to_do(tmp_path):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / '1.wav').write_bytes(sound(tone(300)))

    def check(line):
        spec = dataset.Spec(
            'data', 'folder', 'train', line, (16, 16), settings=(('path', str(tmp_path)),)
        )
        source, rest = dataset.open_examples((spec,))
        return transforms.check(rest, source, (16, 16))

    for line, message in (
        ('', r'sounds have to become arrays: add decode_audio\(RATE, SECONDS\)'),
        ('log_mel(8000)', r'log_mel needs sounds of one length: put decode_audio'),
        ('decode_audio(8000, 0.1)', 'gives audio, label but no image'),
        ('resize(size)', 'resize needs images, but these examples have audio, label'),
    ):
        with pytest.raises(UserError, match=message):
            check(line)


def test_nothing_is_left_out():
    tested = {
        'decode_audio', 'log_mel', 'standardize', 'mask_time', 'mask_frequency', 'decode_video',
        'resize_video', 'crop_video', 'middle_frame', 'lower', 'byte_tokens', 'tokenize',
    }  # fmt: skip
    assert tested == set(audio.OPERATIONS) | set(video.OPERATIONS) | set(text.OPERATIONS)
