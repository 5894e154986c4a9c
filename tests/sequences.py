"""Generate small sounds, videos and texts with known frequencies, frames and words."""

import io
import tempfile
from pathlib import Path

import av
import numpy as np
import soundfile

# Vertical bars of a picture, black or white: the binary digits of the number of its frame.
BARS, BAR = 8, 8
HEIGHT, WIDTH = 48, BARS * BAR

SOUNDS = {'high': 1500.0, 'low': 300.0}
VIDEOS = {'backward': -1, 'forward': 1}
TEXTS = {'animals': 'the cat sat on the mat', 'numbers': 'one and two are three'}


def tone(frequency, seconds=1.0, rate=8000):
    """Return float64 [samples] at half of full scale."""
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


def sound_file(samples, kind='WAV', rate=8000, subtype=None):
    """Encode samples [N] or [N, channels] as a sound file."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


def picture(number):
    """Draw uint8 [48, 64, 3] with bars that `number_of` reads."""
    bits = number >> np.arange(BARS) & 1
    row = np.repeat(np.where(bits, 235, 16), BAR).astype(np.uint8)
    return np.broadcast_to(row[None, :, None], (HEIGHT, WIDTH, 3)).copy()


def number_of(frame):
    """Read the number of a picture, robust to what a codec does to it."""
    bars = frame[8:-8].reshape(HEIGHT - 16, BARS, BAR, 3)[:, :, 2:-2].mean((0, 2, 3))
    return int((bars > 128) @ (1 << np.arange(BARS)))


def video_file(numbers, codec='libx264', kind='mp4', pixels='yuv420p', b_frames=None, **options):
    """Encode a video at 10 frames per second whose pictures have these numbers."""
    file = io.BytesIO()
    with av.open(file, 'w', format=kind) as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, pixels
        stream.codec_context.thread_count = 1
        if b_frames is not None:
            stream.codec_context.max_b_frames = b_frames
        for number in numbers:
            frame = av.VideoFrame.from_ndarray(picture(number), format='rgb24')
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def copied(video, *, without=0):
    """Copy the packets of a video into another MP4 with its index in front.

    An edit list hides the first `without` frames, as programs write it that cut without
    re-encoding.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'copy.mp4'
        options = {'movflags': 'faststart', 'avoid_negative_ts': 'disabled'}
        with (
            av.open(io.BytesIO(video)) as old,
            av.open(str(path), 'w', format='mp4', options=options) as new,
        ):
            stream = old.streams.video[0]
            target = new.add_stream_from_template(stream)
            shift = int(without / 10 / stream.time_base)
            for packet in old.demux(stream):
                if packet.pts is not None:
                    packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                    packet.stream = target
                    new.mux(packet)
        return path.read_bytes()


def _write(folder, classes, count, extension, make):
    for name in classes:
        (Path(folder) / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (Path(folder) / name / f'{i:03}.{extension}').write_bytes(make(name, i))


def write_sounds(folder, count=6):
    """Write FOLDER/CLASS/*.wav: `count` tones of 0.3 s at 8 kHz for each of two classes."""
    _write(
        folder,
        SOUNDS,
        count,
        'wav',
        lambda name, i: sound_file(tone(SOUNDS[name] + 10 * i, 0.3)),
    )


def write_videos(folder, count=6):
    """Write FOLDER/CLASS/*.mp4: `count` clips of 12 frames that count up or down, by class."""
    _write(
        folder,
        VIDEOS,
        count,
        'mp4',
        lambda name, i: video_file((range(i, i + 12))[:: VIDEOS[name]], g='6'),
    )


def write_texts(folder, count=6):
    """Write FOLDER/CLASS/*.txt: `count` sentences for each of two classes."""
    _write(folder, TEXTS, count, 'txt', lambda name, i: f'{TEXTS[name]} {i}\n'.encode())
