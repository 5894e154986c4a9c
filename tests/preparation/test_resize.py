"""Pictures as they are written: kept to the byte, or smaller, upright, in another format."""

import io

import numpy as np
import pytest
from PIL import Image

from big_vit.data.decode import DecodeError
from big_vit.preparation import resize
from big_vit.preparation.settings import Given, Settings


def settings(**more):
    return Settings(Given('INPUT', 'tar', 'x'), **more)


def smooth(height, width, channels=3):
    y, x = np.mgrid[:height, :width]
    return np.stack([128 + 90 * np.sin((x * (c + 1) + y) / 40) for c in range(channels)], 2).astype(
        np.uint8
    )


def file_of(pixels, kind='JPEG', **more):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **more)
    return buffer.getvalue()


def opened(data):
    with Image.open(io.BytesIO(data)) as image:
        return image.format, image.mode, np.asarray(image)


@pytest.mark.parametrize('more', [{}, {'resize': 60}, {'resize': 100}, {'quality': 10}])
def test_what_needs_no_change_stays_to_the_byte(more):
    data = file_of(smooth(60, 90), quality=80)
    assert resize.fitted(data, '', settings(**more)) == (data, 'jpg')
    assert resize.fitted(data, 'jpeg', settings(**more)) == (data, 'jpeg')


@pytest.mark.parametrize('size', [(120, 180), (180, 120), (121, 363)])
def test_larger_pictures_are_averaged_to_their_shorter_side(size):
    pixels = smooth(*size)
    data, ending = resize.fitted(file_of(pixels, quality=98), '', settings(resize=40))
    kind, mode, found = opened(data)
    scale = 40 / min(size)
    assert (kind, mode, ending) == ('JPEG', 'RGB', 'jpg')
    assert found.shape[:2] == tuple(round(side * scale) for side in size)
    wanted = np.asarray(Image.fromarray(pixels).resize(found.shape[1::-1], Image.Resampling.BOX))
    assert np.abs(found.astype(int) - wanted).mean() < 3


def test_pictures_are_turned_before_their_tag_is_lost():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = file_of(smooth(60, 90), quality=95, exif=exif.tobytes())
    _, _, found = opened(resize.fitted(data, '', settings(encode='png'))[0])
    assert found.shape[:2] == (90, 60)


def test_transparency_stays_in_png_and_is_white_in_jpeg():
    pixels = np.zeros((80, 80, 4), np.uint8)
    pixels[20:60, 20:60] = 200, 10, 10, 255
    data = file_of(pixels, 'PNG')
    small, ending = resize.fitted(data, 'png', settings(resize=40))
    kind, mode, found = opened(small)
    assert (kind, mode, ending) == ('PNG', 'RGBA', 'png')
    assert found[0, 0, 3] == 0 and found[20, 20].tolist() == [200, 10, 10, 255]
    # Colours of what is hidden do not bleed into the edge.
    edge = found[(found[..., 3] > 0) & (found[..., 3] < 255)]
    assert (edge[:, 0] >= 190).all() if len(edge) else True
    jpeg, ending = resize.fitted(data, 'png', settings(encode='jpeg'))
    assert ending == 'jpg' and opened(jpeg)[2][0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(('kind', 'format'), [('jpeg', 'JPEG'), ('png', 'PNG'), ('webp', 'WEBP')])
def test_all_become_what_is_asked_for(kind, format):
    pixels = smooth(50, 70)
    found = opened(resize.fitted(file_of(pixels, 'BMP'), 'bmp', settings(encode=kind))[0])
    assert found[0] == format and np.abs(found[2][..., :3].astype(int) - pixels).mean() < 4
    assert opened(resize.fitted(pixels, '', settings())[0])[0] == 'PNG'  # Pixels lose nothing.


def test_endings_by_bytes():
    pixels = smooth(20, 20)
    kinds = {'JPEG': 'jpg', 'PNG': 'png', 'GIF': 'gif', 'BMP': 'bmp', 'TIFF': 'tif', 'WEBP': 'webp'}
    assert {k: resize.ending_of(file_of(pixels, k)) for k in kinds} == kinds
    # What has no ending that readers know is written as one that has.
    ppm = file_of(pixels, 'PPM')
    assert resize.fitted(ppm, '', settings())[1] == 'jpg'


def test_what_a_format_has_no_room_for_is_refused():
    wide = np.zeros((2, 20_000, 3), np.uint8)
    with pytest.raises(DecodeError, match='webp'):
        resize.encoded(wide, 'webp', 80)
