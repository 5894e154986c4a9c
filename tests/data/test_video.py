"""Videos: exactly the frames asked for, from every kind of file, and damage is said."""

import io
import os
import subprocess
import sys

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sequences import copied, number_of, picture, video_file, write_videos

from big_vit.data import dataset, order, pipeline, transforms
from big_vit.data.transforms import operations, video
from big_vit.errors import UserError
from big_vit.models.tokenizers import Patches

COUNT = 40


def apply(line, columns):
    count = len(next(iter(columns.values())))
    return transforms.parse(line, size=(16, 16))(
        columns, order.example_keys(0, 0, np.arange(count))
    )


def numbers(data, frames, stride=1, start=None):
    found = video.read_frames(data, frames, stride, start)
    assert found.dtype == np.uint8
    assert found.shape == (frames, 48, 64, 3)
    return [number_of(frame) for frame in found]


B3 = {'x264-params': 'bframes=3:b-adapt=0'}
OPEN = {'x264-params': 'bframes=8:open-gop=1:b-adapt=0:b-pyramid=normal:ref=8'}
FILES = {
    'H.264, B-frames, one keyframe': dict(g='250', **B3),
    'H.264, B-frames, keyframes': dict(g='7', **B3),
    'H.264, B-frames, a keyframe every other frame': dict(g='2', b_frames=3),
    'H.264, open groups, pyramids of B-frames': dict(g='12', **OPEN),
    'H.264 in MKV': dict(kind='matroska', g='12', **B3),
    'H.264 in AVI, which has no times of showing': dict(kind='avi', g='12', **B3),
    'H.264 in a transport stream': dict(kind='mpegts', g='12', **B3),
    'H.264 in nothing': dict(kind='h264', g='12', **B3),
    'MPEG-4, B-frames': dict(codec='mpeg4', g='12', b_frames=2),
    'MPEG-4 in AVI, B-frames': dict(codec='mpeg4', kind='avi', g='12', b_frames=2),
    'VP9 in WebM': dict(
        codec='libvpx-vp9', kind='webm', g='20', **{'cpu-used': '8', 'threads': '1'}
    ),
    'Motion JPEG': dict(codec='mjpeg', kind='avi', pixels='yuvj420p'),
}


@pytest.mark.parametrize('options', FILES.values(), ids=FILES)
def test_the_right_frames_come(options):
    if options.get('codec', 'libx264') not in av.codecs_available:
        pytest.skip('this FFmpeg was built without the codec')
    data = video_file(range(COUNT), **options)
    assert numbers(data, COUNT) == list(range(COUNT))
    for i in range(COUNT):
        assert numbers(data, 1, 1, (i + 0.5) / COUNT) == [i]
    assert numbers(data, 4, 3) == [15, 18, 21, 24]
    assert numbers(data, 2, 5, 0.999) == [34, 39]
    assert numbers(data, 4, 25, 0.7) == [0, 25, 39, 39]


def test_frames_that_an_edit_list_hides_do_not_count():
    data = copied(video_file(range(COUNT), g='20', **B3), without=7)
    assert numbers(data, 1, 1, 0.0) == [7]
    assert numbers(data, 3, 1) == [22, 23, 24]
    assert numbers(data, 40) == [*range(7, 40), *[39] * 7]


def test_decoding_begins_at_the_keyframe_before(monkeypatch):
    whole = video_file(range(COUNT), g='10', **B3)
    monkeypatch.setattr(video, '_from_first', None)
    for i in range(COUNT):
        assert numbers(whole, 1, 1, (i + 0.5) / COUNT) == [i]
    assert numbers(copied(whole, without=7), 2, 1) == [22, 23]


def test_colours_are_of_the_matrix_that_the_file_names():
    y, u, v = 100, 90, 200
    for space, params, red, blue in (
        (av.video.reformatter.Colorspace.ITU709, 'colormatrix=bt709', 0.2126, 0.0722),
        (av.video.reformatter.Colorspace.ITU601, 'colormatrix=bt470bg', 0.299, 0.114),
    ):
        file = io.BytesIO()
        with av.open(file, 'w', format='mp4') as container:
            stream = container.add_stream('libx264', 10, {'crf': '1', 'x264-params': params})
            stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
            frame = av.VideoFrame(64, 48, 'yuv420p')
            frame.colorspace = stream.codec_context.colorspace = space
            for plane, value in zip(frame.planes, (y, u, v), strict=True):
                plane.update(bytes([value]) * plane.buffer_size)
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
        luma, cb, cr = (y - 16) / 219, (u - 128) / 224, (v - 128) / 224
        r, b = luma + 2 * (1 - red) * cr, luma + 2 * (1 - blue) * cb
        g = (luma - red * r - blue * b) / (1 - red - blue)
        found = video.read_frames(file.getvalue(), 1, 1, None)[0].mean((0, 1))
        np.testing.assert_allclose(found, np.array([r, g, b]) * 255, atol=3)


def test_random_starts_cover_the_clip_and_belong_to_the_example():
    data = video_file(range(COUNT), g='5')
    line = 'decode_video(2, 3, random_start=True)'
    found = apply(line, {'video': [data] * 300})['video']
    starts = [number_of(clip[0]) for clip in found]
    assert set(starts) == set(range(COUNT - 3))
    assert [number_of(clip[1]) - 3 for clip in found] == starts
    again = apply(line, {'video': [data] * 5})['video']
    np.testing.assert_array_equal(again, found[:5])


def test_clips_that_are_arrays_are_cut_alike():
    arrays = np.arange(2 * 30, dtype=np.uint8).reshape(2, 30, 1, 1, 1)
    kept = apply('decode_video(4, 3)', {'video': arrays})['video'][..., 0, 0, 0]
    assert kept.tolist() == [[10, 13, 16, 19], [40, 43, 46, 49]]


def test_titles_in_any_encoding_do_no_harm():
    file = io.BytesIO()
    with av.open(file, 'w', format='avi') as container:
        container.metadata['title'] = 'Gruesse'
        stream = container.add_stream('mpeg4', rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(5), format='rgb24')))
        container.mux(stream.encode())
    data = file.getvalue()
    assert b'Gruesse' in data
    assert numbers(data.replace(b'Gruesse', b'Gr\xfc\xdfe  '), 1) == [5]


# --- Damage ----------------------------------------------------------------------------

GOOD = video_file(range(12), g='6', **B3)


def sound_only():
    file = io.BytesIO()
    with av.open(file, 'w', format='matroska') as container:
        stream = container.add_stream('pcm_s16le', rate=8000, layout='mono')
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), 's16', 'mono')
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    return file.getvalue()


DAMAGES = {
    'nothing': (b'', 'not a video, or damaged'),
    'no video': (b'nothing at all', 'not a video, or damaged'),
    'sound': (sound_only(), 'holds no video'),
    'without its index': (GOOD[: len(GOOD) // 2], 'not a video, or damaged'),
    'an unknown code': (
        GOOD.replace(b'avc1', b'zzzz').replace(b'avcC', b'free'),
        'no code of video',
    ),
    'cut off': (copied(GOOD)[:-40], 'it ends too early'),
    'overwritten': (copied(GOOD)[:-900] + bytes(900), 'damaged'),
}


@pytest.mark.parametrize(('data', 'message'), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_said_and_where(data, message):
    with pytest.raises(operations.BadExampleError, match=message) as error:
        apply('decode_video(12)', {'video': [GOOD, data]})
    assert error.value.row == 1


def test_what_is_too_large_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(video.decode, 'MAX_PIXELS', 48 * 64 * 4)
    assert len(video.read_frames(GOOD, 4, 1, None)) == 4
    with pytest.raises(ValueError, match='5 frames of 64x48 are more than the 12,288 pixels'):
        video.read_frames(GOOD, 5, 1, None)
    monkeypatch.setattr(video, '_MOST_FRAMES', 11)
    with pytest.raises(ValueError, match='more than 11 frames'):
        video.read_frames(GOOD, 1, 1, None)


@pytest.mark.skipif(not os.path.isdir('/proc/self/task'), reason='counts threads as Linux does')  # noqa: PTH112
def test_no_thread_is_started(tmp_path):
    (tmp_path / 'clip.mp4').write_bytes(GOOD)
    program = (
        'import os, threading; from big_vit.data.transforms import video\n'
        "count = lambda: len(os.listdir('/proc/self/task'))\n"
        'import av; before, most, going = count(), [0], [True]\n'
        'def watch():\n'
        '    while going[0]: most[0] = max(most[0], count() - 1)\n'
        'watcher = threading.Thread(target=watch); watcher.start()\n'
        f'data = open({str(tmp_path / "clip.mp4")!r}, "rb").read()\n'
        'for _ in range(40): video.read_frames(data, 12, 1, None)\n'
        'going[0] = False; watcher.join(); print(most[0] - before)\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ['0']


# --- Sizes and places ------------------------------------------------------------------


def test_all_frames_are_resized_alike():
    clips = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 12, 3), np.uint8)
    found = apply('resize_video((4, 6))', {'video': clips})['video']
    means = clips.reshape(2, 3, 4, 2, 6, 2, 3).astype(np.float64).mean((3, 5))
    assert np.abs(found - means).max() <= 0.51
    nearest = apply("resize_video((16, 24), 'nearest')", {'video': list(clips)})['video']
    np.testing.assert_array_equal(nearest, clips.repeat(2, 2).repeat(2, 3))


def test_one_window_for_all_frames():
    places = np.stack(np.mgrid[:10, :14], axis=-1).astype(np.uint8)
    clips = np.broadcast_to(places, (1000, 4, 10, 14, 2)).copy()
    middle = apply('crop_video((4, 6))', {'video': clips})['video']
    np.testing.assert_array_equal(middle, clips[:, :, 3:7, 4:10])
    found = apply('crop_video((4, 6), random=True)', {'video': clips})['video']
    corners = found[:, 0, 0, 0].astype(int)
    assert {tuple(corner) for corner in corners.tolist()} == {
        (i, j) for i in range(7) for j in range(9)
    }
    for clip, (top, left) in zip(found, corners, strict=True):
        np.testing.assert_array_equal(
            clip, np.broadcast_to(places[top : top + 4, left : left + 6], (4, 4, 6, 2))
        )


def test_the_middle_frame():
    clips = [np.stack([picture(i) for i in range(n)]) for n in (1, 4, 5)]
    found = apply('middle_frame', {'video': clips})
    assert set(found) == {'image'}
    assert [number_of(image) for image in found['image']] == [0, 2, 2]


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('decode_video(0)', 'takes a whole number from 1 to 4096 for frames'),
        ('decode_video(1, 0)', 'for stride'),
        ('resize_video(0)', 'takes a size'),
        ("resize_video(8, 'best')", 'for method'),
        ('crop_video(8.5)', 'takes a size'),
    ],
)
def test_wrong_arguments_are_refused_at_once(line, message):
    with pytest.raises(UserError, match=message):
        transforms.parse(line, size=(8, 8))


@pytest.mark.parametrize(
    ('line', 'columns', 'message'),
    [
        ('decode_video(1)', {'image': [b'']}, "needs 'video', but these examples have image"),
        ('middle_frame', {'video': [GOOD]}, 'put decode_video'),
        ('decode_video(1) | crop_video(49)', {'video': [GOOD]}, 'cannot cut 49x49 from 48x64'),
    ],
)
def test_what_does_not_fit_is_refused(line, columns, message):
    with pytest.raises(UserError, match=message):
        apply(line, columns)


def test_a_missing_or_old_library_is_said_at_once(monkeypatch):
    monkeypatch.setattr(av, '__version__', '16.1.0')
    with pytest.raises(UserError, match=r"needs `pip install 'av>=17'`, not 16\.1\.0"):
        transforms.parse('decode_video(1)', size=(8, 8))
    monkeypatch.setitem(sys.modules, 'av', None)
    with pytest.raises(UserError, match=r"decode_video needs `pip install 'av>=17'` \("):
        transforms.parse('decode_video(1)', size=(8, 8))


# --- From files through the model ------------------------------------------------------


def test_a_folder_of_videos_is_a_dataset_of_images(tmp_path):
    write_videos(tmp_path, count=3)
    spec = dataset.Spec(
        key='data',
        name='folder',
        split='train',
        transform='decode_video(5, 2) | middle_frame | inception_crop(size, min_area=0.99)',
        image_size=(48, 64),
        settings=(('path', str(tmp_path)),),
    )
    source, rest = dataset.open_examples((spec,))
    assert source.class_names == ('backward', 'forward')
    assert transforms.check(rest, source, (48, 64)).parts['image'][0] == (48, 64, 3)
    batches = pipeline.train_batches(source, rest, pipeline.Order(6, 0))
    batch = next(batches)
    batches.close()
    # Of frames 1, 3, 5, 7, 9 the third; backwards that is number 11 - 5 + i.
    seen = sorted(
        (int(label), number_of(image))
        for label, image in zip(batch['label'], batch['image'], strict=True)
    )
    assert seen == [(0, 6), (0, 7), (0, 8), (1, 5), (1, 6), (1, 7)]


def test_frames_go_through_the_patches_of_the_model():
    clips = apply('decode_video(4, 2) | resize_video((16, 32))', {'video': [GOOD, GOOD]})['video']
    images = jnp.asarray(clips.reshape(8, 16, 32, 3) / 127.5 - 1, jnp.float32)
    module = Patches(width=12, patch_size=(16, 16))
    tokens = np.asarray(module.apply(module.init(jax.random.key(0), images), images))
    assert tokens.shape == (8, 1, 2, 12)
    assert np.isfinite(tokens).all()
    assert np.abs(tokens[0] - tokens[1]).max() > 0.1
    np.testing.assert_array_equal(tokens[:4], tokens[4:])
