"""Decoding: Pillow's pixels to the last bit, no more of a file than a window needs, and damage."""

import io
import os
import re
import struct
import subprocess
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from big_vit.data import decode, transforms

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


def turned(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    more = {'WEBP': {'lossless': True}, 'AVIF': {'quality': 100}}.get(kind, {})
    return encoded(picture(20, 30), kind, exif=exif, **more)


KINDS = ['JPEG', 'PNG', 'WEBP', 'TIFF', 'AVIF']


@pytest.mark.parametrize('kind', KINDS)
def test_orientation_is_ignored_in_every_format(kind):
    upright = decode.Encoded(turned(kind, 1)).pixels()
    for orientation in (3, 6):
        for channels in (3, 1, 4):
            found = decode.Encoded(turned(kind, orientation), channels)
            assert found.pixels().shape == found.shape == (20, 30, channels)
        colours = decode.Encoded(turned(kind, orientation)).pixels()
        np.testing.assert_array_equal(colours, upright)


@pytest.mark.parametrize('kind', KINDS)
def test_exif_transpose_is_that_of_pillow(kind):
    transform = transforms.parse('exif_transpose', size=(8, 8))
    for orientation in range(1, 9):
        data = turned(kind, orientation)
        columns = transforms.opened({'image': [data]}, 3)
        found = transforms.finished(transform(columns, np.zeros(1, np.uint64)), transform)['image']
        with Image.open(io.BytesIO(data)) as image:
            wanted = np.asarray(ImageOps.exif_transpose(image))
        np.testing.assert_array_equal(found[0], wanted)


# --- Pixels that are no bytes ----------------------------------------------------------


SHADES = np.linspace(0, 1, 72, dtype=np.float32).reshape(8, 9)
BYTES = np.rint(SHADES * 255)


def tiff(pixels):
    return cv2.imencode('.tiff', pixels)[1].tobytes()


@pytest.mark.parametrize(
    ('data', 'white', 'advice'),
    [
        (tiff(SHADES), (0, 1), 'float32 from 0 to 1,.*decode(3, black=0, white=1)'),
        (tiff(SHADES * 2 - 1), (-1, 1), 'decode(3, black=-1, white=1)'),
        (tiff(SHADES * 1000), (0, 1000), 'decode(3, black=0, white=1000)'),
        (tiff(SHADES.astype(np.float64)), (0, 1), 'float64'),
        (tiff((SHADES * 4095).astype(np.int32)), (0, 4095), 'int32'),
        (tiff(np.repeat(SHADES[..., None], 4, 2)), (0, 1), 'float32'),
        (
            cv2.imencode('.png', (SHADES * 4095).astype(np.uint16))[1].tobytes(),
            (0, 4095),
            'uint16 from 0 to 4095,.*decode(3, white=4095), or white=65535 if it is so dark',
        ),
        (tiff((SHADES * 1023).astype(np.uint16)), (0, 1023), 'white=1023'),
        (encoded((SHADES * 16383).astype(np.uint16)[..., None], 'PNG'), (0, 16383), 'white=16383'),
    ],
)
def test_pixels_whose_white_is_unknown_are_refused_and_scaled_by_what_is_said(data, white, advice):
    with pytest.raises(decode.DecodeError, match=re.escape(advice).replace(re.escape('.*'), '.*')):
        decode.Encoded(data).pixels()
    for channels in (1, 3, 4):
        found = decode.Encoded(data, channels, white).pixels()
        assert found.shape == (8, 9, channels)
        assert found.dtype == np.uint8
        assert np.abs(found[..., 0] - BYTES).max() <= 1
    # As they are, for operations on the devices.
    assert decode.Encoded(data, 0).pixels().dtype != np.uint8


def test_full_sixteen_bits_need_no_word():
    deep = (SHADES * 65535).astype(np.uint16)
    for data in (
        tiff(deep),
        encoded(deep[..., None], 'PNG'),
        tiff(np.repeat(deep[..., None], 3, 2)),
    ):
        np.testing.assert_array_equal(decode.Encoded(data).pixels()[..., 1], deep >> 8)
    assert not decode.Encoded(tiff(deep * 0)).pixels().any()


def test_the_range_of_a_pgm_is_what_its_header_says():
    for most, kind in ((15, '>u1'), (4095, '>u2'), (65535, '>u2')):
        pixels = np.rint(SHADES * most).astype(kind)
        data = f'P5 9 8 {most}\n'.encode() + pixels.tobytes()
        found = decode.Encoded(data).pixels()
        assert np.abs(found[..., 2] - pixels / most * 255).max() <= 1


def test_pixels_that_are_no_numbers_are_damaged():
    with pytest.raises(decode.DecodeError, match='no numbers'):
        decode.Encoded(tiff(SHADES * np.nan), 3, (0, 1)).pixels()


def test_the_operation_that_errors_name_does_what_they_say():
    for text in ('decode(3, black=-1, white=1)', 'decode(white=1, black=-1)'):
        transform = transforms.parse(text, size=(8, 9))
        columns = transforms.opened({'image': [tiff(SHADES * 2 - 1)]}, 3)
        found = transform(columns, np.zeros(1, np.uint64))
        pixels = transforms.finished(found, transform)['image'][0]
        assert pixels.shape == (8, 9, 3)
        assert np.abs(pixels[..., 0] - BYTES).max() <= 1
        # Arrays of floats are scaled as well, bytes never.
        arrays = transform({'image': (SHADES * 2 - 1)[None, ..., None]}, np.zeros(1, np.uint64))
        assert np.abs(arrays['image'][0, ..., 0] - BYTES).max() <= 1
    jpeg = transforms.opened({'image': [encoded(picture(8, 9))]}, 3)
    same = transforms.finished(transform(jpeg, np.zeros(1, np.uint64)), transform)['image'][0]
    np.testing.assert_array_equal(same, pillow(encoded(picture(8, 9)), 'RGB'))


@pytest.mark.parametrize('kind', ['PNG', 'TIFF', 'GIF', 'BMP', 'TGA', 'JPEG2000', 'AVIF', 'ICO'])
def test_every_mode_has_the_colours_of_pillow(kind):
    image, tried = Image.fromarray(picture(16, 16, 4)), 0
    for mode in ('1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'clear'):
        more = {'transparency': 3} if mode == 'clear' else {}
        palette = mode in ('P', 'clear')
        other = image.convert('RGB').quantize(64) if palette else image.convert(mode)
        file = io.BytesIO()
        try:
            other.save(file, kind, **more)
        except (OSError, ValueError, KeyError):
            continue  # No such mode in this format.
        data = file.getvalue()
        for channels, target in ((3, 'RGB'), (1, 'L'), (4, 'RGBA')):
            found = decode.Encoded(data, channels).pixels().astype(int)
            assert np.abs(found - pillow(data, target)).max() <= 1, (mode, channels)
        tried += 1
    assert tried >= 4


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


@pytest.mark.parametrize('kind', JPEGS)
def test_data_behind_the_end_of_a_jpeg_do_no_harm(kind):
    """Phones write a video there, editors their notes."""
    data = encoded(picture(120, 160), **JPEGS[kind])
    for behind in (bytes(5000), b'\0\0\0\x18ftypmp42' + bytes(1 << 16), data):
        found = decode.Encoded(data + behind)
        np.testing.assert_array_equal(found.pixels(), pillow(data, 'RGB'))
        np.testing.assert_array_equal(
            found.window(0, 0, 20, 30, (20, 30)), pillow(data, 'RGB')[:20, :30]
        )
        for share in (0.5, 0.98):
            with pytest.raises(decode.DecodeError, match=r'truncated|damaged'):
                decode.Encoded(data[: int(share * len(data))] + bytes(5000)).pixels()


def test_a_thumbnail_has_an_end_of_its_own():
    thumbnail = encoded(picture(16, 16))
    data = encoded(picture(120, 160), exif=b'Exif\0\0' + thumbnail)
    assert decode.Encoded(data).pixels().shape == (120, 160, 3)
    with pytest.raises(decode.DecodeError, match='truncated'):
        decode.Encoded(data[:-500] + bytes(2000)).window(0, 0, 10, 10, (10, 10))


@pytest.mark.parametrize('start', [b'%!PS-Adobe-3.0 EPSF-3.0\n', b'\xc5\xd0\xd3\xc6'])
def test_no_image_starts_a_program(start, tmp_path, monkeypatch):
    """Pillow hands PostScript to the `gs` that it finds."""
    program, mark = tmp_path / 'gs', tmp_path / 'started'
    program.write_text(f'#!/bin/sh\ntouch {mark}\necho 10.0\n')
    program.chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    subprocess.run(['gs', '--version'], check=True, capture_output=True)
    mark.unlink()
    body = b'%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n'
    if start[0] == 0xC5:  # With a preview, as DOS has it.
        text = b'%!PS-Adobe-3.0 EPSF-3.0\n' + body
        start += (32).to_bytes(4, 'little') + len(text).to_bytes(4, 'little') + bytes(20)
        body = text
    for channels in (0, 1, 3, 4):
        with pytest.raises(decode.DecodeError, match='not an image'):
            decode.Encoded(start + body, channels)
    assert not mark.exists()


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


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(st.data())
def test_odd_files_are_what_pillow_makes_of_them_or_refused(data):
    """Whatever is cut or changed: the pixels of Pillow, or an error, and no other."""
    kinds = ['JPEG', 'PNG', 'WEBP', 'TIFF', 'GIF', 'BMP', 'PPM', 'TGA', 'ICO', 'AVIF', 'JPEG2000']
    kind = data.draw(st.sampled_from(kinds))
    mode = data.draw(st.sampled_from(['L', 'RGB', 'RGBA', 'P', '1', 'CMYK', 'LA', 'I;16']))
    source = Image.fromarray(picture(24, 31, 4, seed=data.draw(st.integers(0, 5))))
    if mode == 'I;16':
        image = Image.fromarray(picture(24, 31, 1)[..., 0].astype(np.uint16) * 257)
    else:
        image = source.convert('RGB').quantize(40) if mode == 'P' else source.convert(mode)
    file = io.BytesIO()
    try:
        image.save(file, kind)
    except (OSError, ValueError, KeyError):
        return
    content = bytearray(file.getvalue())
    damage = data.draw(st.sampled_from(['none', 'cut', 'behind', 'changed']))
    if damage == 'cut':
        content = content[: data.draw(st.integers(0, len(content)))]
    elif damage == 'behind':
        content += data.draw(st.binary(max_size=3000))
    elif damage == 'changed':
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        wanted = pillow(bytes(content), 'RGB').astype(int)
    except Exception:  # Pillow raises anything.
        wanted = None
    known = damage != 'changed' and mode != 'I;16'
    try:
        found = decode.Encoded(bytes(content))
        if found.shape[0] * found.shape[1] > 1 << 20:
            return
        pixels = found.pixels()
        _ = found.orientation
    except decode.DecodeError:
        assert wanted is None or not known
        return
    assert pixels.shape == found.shape
    if known:
        assert wanted is not None
        assert np.abs(pixels - wanted).max() <= 1


def test_pillow_is_opened_in_one_place():
    """Every other place would have to remember the list of formats."""
    package = Path(decode.__file__).parents[1]
    opening = [f for f in package.rglob('*.py') if re.search(r'Image\.open\(', f.read_text())]
    assert opening == [Path(decode.__file__)]
    assert Path(decode.__file__).read_text().count('Image.open(') == 1


def stored_tiff(pixels, sample_format, photometric):
    """Write a big-endian TIFF of one channel by hand; Pillow writes neither of the two tags."""
    height, width = pixels.shape
    data = pixels.astype(pixels.dtype.newbyteorder('>')).tobytes()
    bits = pixels.itemsize * 8
    tags = ((256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8))
    tags += ((277, 1), (278, height), (279, len(data)), (339, sample_format))
    entries = b''.join(struct.pack('>HHII', tag, 4, 1, value) for tag, value in tags)
    start = struct.pack('>2sHI', b'MM', 42, 8 + len(data))
    return start + data + struct.pack('>H', len(tags)) + entries + bytes(4)


def test_a_negative_of_sixteen_bits_is_turned_as_one_of_eight():
    image = np.linspace(0, 65535, 12).astype(np.uint16).reshape(3, 4)
    eight = decode.Encoded(stored_tiff((image >> 8).astype(np.uint8), 1, 0)).pixels()
    np.testing.assert_array_equal(eight, 255 - np.repeat((image >> 8)[..., None], 3, 2))
    for channels in (1, 3, 4):
        deep = decode.Encoded(stored_tiff(image, 1, 0), channels).pixels()
        np.testing.assert_array_equal(deep[..., :3], eight[..., : min(channels, 3)])
    assert (deep[..., 3] == 255).all()
    dark = decode.Encoded(stored_tiff(image >> 4, 1, 0), 3, (0, 4095)).pixels()
    assert np.abs(dark.astype(int) - eight).max() <= 1
    kept = decode.Encoded(stored_tiff(image, 1, 0), 0).pixels()
    np.testing.assert_array_equal(kept[..., 0], image)


def test_signed_bytes_are_not_read_as_unsigned():
    image = np.arange(-100, 140, 20).astype(np.int8).reshape(3, 4)
    with pytest.raises(decode.DecodeError, match=r'are int8 from -100 to 120.*white=120'):
        decode.Encoded(stored_tiff(image, 2, 1)).pixels()
    scaled = decode.Encoded(stored_tiff(image, 2, 1), 1, (-100, 120)).pixels()
    assert (scaled.min(), scaled.max()) == (0, 255)


@pytest.mark.parametrize('channels', [0, 1])
def test_bytes_of_a_pgm_are_scaled_by_its_header_too(channels):
    data = b'P5 3 1 100\n' + bytes([0, 50, 100])
    assert decode.Encoded(data, channels).pixels().ravel().tolist() == [0, 128, 255]
    deep = b'P5 3 1 4095\n' + np.array([0, 2048, 4095], '>u2').tobytes()
    scaled = decode.Encoded(deep, channels, (0, 4095)).pixels()
    assert scaled.ravel().tolist() == [0, 128, 255]


def test_what_opencv_leaves_to_pillow_is_not_told(capfd):
    decode.Encoded(b'P2 2 1 255\n7 8', 0).pixels()
    with pytest.raises(decode.DecodeError, match='of a type of pixels that cannot'):
        decode.Encoded(stored_tiff(np.zeros((2, 2), np.uint8), 7, 9)).pixels()
    assert capfd.readouterr() == ('', '')
