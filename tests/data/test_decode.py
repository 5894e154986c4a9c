"""Decoding: Pillow's pixels to the last bit, no more of a file than a window needs, and damage."""

import io
import threading

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from big_vit.data import decode

ImageFile.MAXBLOCK = 1 << 22  # Noise takes more room than Pillow expects.


def picture(height, width, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, channels)).astype(np.float32)
    smooth = cv2.resize(coarse, (width, height)).reshape(height, width, channels)
    return np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)


def encoded(image, kind='JPEG', **more):
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(file, kind, **more)
    return file.getvalue()


def pillow(data, mode):
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image.convert(mode))
    return pixels if pixels.ndim == 3 else pixels[..., None]


JPEGS = {
    '420': {'subsampling': 2},
    '422': {'subsampling': 1},
    '444': {'subsampling': 0},
    'progressive': {'progressive': True},
    'restart': {'restart_marker_rows': 1},
    'poor': {'quality': 20},
}


@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from([*JPEGS, 'grey']),
    height=st.integers(1, 130),
    width=st.integers(1, 150),
    corners=st.tuples(*[st.floats(0, 0.999)] * 4),
)
def test_a_window_of_a_jpeg_has_the_pixels_of_pillow(kind, height, width, corners):
    image = picture(height, width, 1 if kind == 'grey' else 3)
    data = encoded(image, **JPEGS.get(kind, {}))
    found = decode.Encoded(data)
    assert found.shape == (height, width, 3)
    top, left = int(corners[0] * height), int(corners[1] * width)
    tall, across = 1 + int(corners[2] * (height - top)), 1 + int(corners[3] * (width - left))
    window = found.window(top, left, tall, across, (height, width))
    wanted = pillow(data, 'RGB')
    np.testing.assert_array_equal(window, wanted[top : top + tall, left : left + across])
    np.testing.assert_array_equal(found.pixels(), wanted)


def test_grey_is_decoded_as_grey():
    for data in (encoded(picture(40, 50, 1)), encoded(picture(40, 50))):
        found = decode.Encoded(data, 1)
        assert found.shape == (40, 50, 1)
        away = np.abs(found.pixels().astype(int) - pillow(data, 'L'))
        assert away.max() <= 2  # Pillow makes grey of rounded RGB, the file has it as it is.


@pytest.mark.parametrize('scale', [2, 4, 8])
def test_a_small_target_is_scaled_in_the_transform(scale):
    image = picture(240, 320)
    found = decode.Encoded(encoded(image, quality=95))
    window = found.window(0, 0, 240, 320, (240 // scale, 320 // scale))
    assert window.shape == (240 // scale, 320 // scale, 3)
    wanted = pillow(found.data, 'RGB').reshape(240 // scale, scale, 320 // scale, scale, 3)
    assert np.abs(window - wanted.mean((1, 3))).mean() < 3
    # One pixel more than a half, and it stays whole.
    assert found.window(0, 0, 240, 320, (121, 100)).shape == (240, 320, 3)


def test_scaled_windows_lie_where_they_should():
    # Rows and columns as values: the mean of a window says where it is.
    y, x = np.mgrid[:256, :256].astype(np.uint8)
    found = decode.Encoded(encoded(np.stack([y, x, y], -1), quality=98, subsampling=0))
    for top, left in ((0, 0), (31, 77), (100, 3)):
        window = found.window(top, left, 128, 144, (16, 16)).astype(float)
        assert abs(window[..., 0].mean() - (top + 63.5)) < 5
        assert abs(window[..., 1].mean() - (left + 71.5)) < 5


@pytest.mark.parametrize('kind', ['PNG', 'WEBP', 'BMP', 'TIFF', 'GIF', 'PPM'])
def test_other_formats(kind):
    more = {'lossless': True} if kind == 'WEBP' else {}
    data = encoded(picture(30, 41), kind, **more)
    found = decode.Encoded(data)
    np.testing.assert_array_equal(found.pixels(), pillow(data, 'RGB'))
    np.testing.assert_array_equal(
        found.window(3, 5, 20, 30, (4, 4)), pillow(data, 'RGB')[3:23, 5:35]
    )


def test_sixteen_bits_alpha_palettes_and_many_channels():
    deep = np.random.default_rng(0).integers(0, 65536, (9, 11), np.uint16)
    data = cv2.imencode('.png', deep)[1].tobytes()
    np.testing.assert_array_equal(decode.Encoded(data, 0).pixels()[..., 0], deep)
    assert decode.Encoded(data, 3).pixels().dtype == np.uint8
    clear = picture(12, 13, 4)
    data = encoded(clear, 'PNG')
    np.testing.assert_array_equal(decode.Encoded(data, 4).pixels(), clear)
    np.testing.assert_array_equal(decode.Encoded(data, 0).pixels(), clear)
    np.testing.assert_array_equal(decode.Encoded(data, 3).pixels(), clear[..., :3])
    assert decode.Encoded(encoded(picture(12, 13)), 4).pixels()[..., 3].min() == 255
    file = io.BytesIO()
    Image.fromarray(picture(20, 20)).quantize(16).save(file, 'PNG')
    np.testing.assert_array_equal(
        decode.Encoded(file.getvalue()).pixels(), pillow(file.getvalue(), 'RGB')
    )


def test_a_cmyk_jpeg_becomes_rgb():
    file = io.BytesIO()
    Image.fromarray(picture(32, 32)).convert('CMYK').save(file, 'JPEG', quality=95)
    found = decode.Encoded(file.getvalue()).pixels()
    assert found.shape == (32, 32, 3)
    assert np.abs(found.astype(int) - picture(32, 32)).mean() < 6


def test_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture(20, 30), exif=exif.tobytes())
    assert decode.Encoded(data).pixels().shape == (20, 30, 3)
    assert decode.Encoded(data, 1).pixels().shape == (20, 30, 1)


# --- Damage ----------------------------------------------------------------------------


@pytest.mark.parametrize('share', [0.02, 0.3, 0.9, 0.999])
def test_a_truncated_jpeg_is_damaged(share):
    data = encoded(picture(120, 160))
    with pytest.raises(decode.DecodeError, match=r'damaged|truncated'):
        decode.Encoded(data[: int(share * len(data))]).window(0, 0, 20, 20, (20, 20))


@pytest.mark.parametrize('kind', ['PNG', 'WEBP', 'TIFF'])
def test_other_truncated_files_are_damaged(kind):
    data = encoded(picture(64, 64), kind)
    with pytest.raises(decode.DecodeError):
        decode.Encoded(data[: len(data) // 2]).pixels()


def test_a_jpeg_with_damage_inside_is_damaged():
    data = bytearray(encoded(picture(120, 160)))
    data[len(data) // 2 : len(data) // 2 + 40] = b'\xff\xd9' * 20
    found = decode.Encoded(bytes(data))
    with pytest.raises(decode.DecodeError, match='damaged JPEG'):
        found.pixels()
    with pytest.raises(decode.DecodeError, match='damaged JPEG'):
        found.window(0, 0, 100, 160, (200, 200))


@pytest.mark.parametrize('data', [b'', b'abc', b'<html>not found</html>', b'\xff\xd8\xff\xe0'])
def test_what_is_no_image_is_said_to_be_none(data):
    with pytest.raises(decode.DecodeError, match=r'not an image|damaged'):
        decode.Encoded(data)


def test_bombs_are_refused_before_they_are_decoded():
    head = encoded(np.zeros((8, 8, 3), np.uint8), 'PNG')
    bomb = head[:16] + (60_000).to_bytes(4, 'big') * 2 + head[24:]
    with pytest.raises(decode.DecodeError, match='60000x60000 pixels are more than'):
        decode.Encoded(bomb)
    flat = bytearray(encoded(picture(16, 16)))
    at = flat.index(b'\xff\xc0')
    flat[at + 5 : at + 9] = (30_000).to_bytes(2, 'big') * 2
    with pytest.raises(decode.DecodeError, match='30000x30000 pixels'):
        decode.Encoded(bytes(flat))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_bytes_there_are_nothing_else_is_raised(data):
    kind = data.draw(st.sampled_from(['JPEG', 'PNG']))
    file = bytearray(encoded(picture(24, 31), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = decode.Encoded(bytes(file))
        if found.shape[0] * found.shape[1] < 1 << 20:
            window = found.window(0, 0, min(10, found.shape[0]), min(9, found.shape[1]), (8, 8))
            assert window.ndim == 3
    except decode.DecodeError:
        pass


def test_threads_do_not_share_memory():
    files = [encoded(picture(90, 120, seed=i)) for i in range(4)]
    wanted = [pillow(file, 'RGB') for file in files]
    wrong = []

    def work(number):
        for _ in range(30):
            window = decode.Encoded(files[number]).window(5, 5, 80, 100, (80, 100))
            if not np.array_equal(window, wanted[number][5:85, 5:105]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
