"""Signatures beside those of imagehash, and what they do not depend on."""

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from big_vit.data.decode import DecodeError
from big_vit.preparation import signatures

ORACLE = np.load(Path(__file__).parent.parent / 'oracles' / 'imagehash.npz')
GREY, COLOUR = ORACLE['grey'], ORACLE['colour']


def unpacked(words):
    return np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder='little')


def lowest(bands):
    """The 64 bits that four bands are made of."""
    bits = unpacked(bands[..., None])
    return bits.swapaxes(-1, -2).reshape(*bands.shape[:-1], 64)


def as_thumbnails(grey):
    return np.repeat(grey[..., None], 3, axis=3)


def file_of(pixels, kind='PNG', **more):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **more)
    return buffer.getvalue()


def test_of_small_grey_pictures_all_bits_are_those_of_imagehash():
    found = signatures.of_thumbnails(as_thumbnails(GREY))
    assert (unpacked(found.bits[:, 0]) == ORACLE['grey_256'].reshape(-1, 256)).all()
    assert (lowest(found.bands[:, 0]) == ORACLE['grey_64'].reshape(-1, 64)).all()
    assert found.is_there.all()


def test_of_other_pictures_they_differ_by_how_a_picture_is_shrunk_alone():
    found = signatures.of_thumbnails(np.stack([signatures.thumbnail(p) for p in COLOUR]))
    wrong = (unpacked(found.bits[:, 0]) != ORACLE['colour_256'].reshape(-1, 256)).sum(1)
    assert wrong.max() <= 12 and wrong.mean() <= 8  # Of 256; unrelated ones differ in 128.
    coarse = (lowest(found.bands[:, 0]) != ORACLE['colour_64'].reshape(-1, 64)).sum(1)
    assert coarse.max() <= 2


def test_mirrored_signatures_are_those_of_mirror_images():
    both = signatures.of_thumbnails(as_thumbnails(GREY), mirrored=True)
    mirrored = signatures.of_thumbnails(as_thumbnails(GREY[:, :, ::-1]))
    assert both.bits.shape[1] == 20
    assert signatures.distance(both.bits[:, 10], mirrored.bits[:, 0]).max() <= 2
    windows = signatures.distance(both.bits[:, 10:, None], mirrored.bits[:, None])
    assert windows.min(2).max() <= 2  # The windows of a mirror image are mirrored windows.


@pytest.mark.parametrize('top', [0, 0.025, 0.05])
@pytest.mark.parametrize('left', [0, 0.025, 0.05])
def test_a_crop_meets_its_window_and_nothing_else(top, left):
    large = [cv2.resize(p, (960, 640), interpolation=cv2.INTER_CUBIC) for p in COLOUR]
    crops = [p[round(640 * top) :, round(960 * left) :][: 640 - 32, : 960 - 48] for p in large]
    of_large, of_crops = (
        signatures.of_thumbnails(np.stack([signatures.thumbnail(p) for p in some]))
        for some in (large, crops)
    )
    least = signatures.distance(of_large.bits[:, None], of_crops.bits[None, :, :1]).min(2)
    assert np.diag(least).max() <= 0.06 * 256
    assert least[~np.eye(len(large), dtype=bool)].min() > 0.3 * 256
    shared = (of_large.bands[:, :, None] == of_crops.bands[:, None]).any((1, 2, 3))
    assert shared.all()


def test_signatures_of_one_picture_do_not_depend_on_the_others():
    whole = signatures.of_thumbnails(as_thumbnails(np.tile(GREY, (40, 1, 1))))
    alone = signatures.of_thumbnails(as_thumbnails(GREY[3:4]))
    assert (whole.bits[3::8] == alone.bits).all() and (whole.bands[3::8] == alone.bands).all()


def test_a_picture_of_one_level_has_no_signature():
    flat = np.full((1, 64, 64, 3), 200, np.uint8)
    flat[0, ::2] += 3
    assert not signatures.of_thumbnails(flat).is_there[0]
    assert signatures.of_thumbnails(np.zeros((0, 64, 64, 3), np.uint8)).bits.shape == (0, 10, 4)


def test_vectors_differ_in_the_share_of_bits_that_their_angle_says():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((60, 48))
    vectors[1:30] = vectors[0] + rng.uniform(0, 1, (29, 1)) * vectors[1:30]
    found = signatures.of_vectors(np.concatenate([vectors, np.zeros((1, 48))]))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    angles = np.arccos(np.clip(unit @ unit[0], -1, 1)) / np.pi
    shares = signatures.distance(found.bits[:60, 0], found.bits[:1, 0]) / 256
    assert np.abs(shares - angles).max() < 0.13  # Four standard deviations.
    assert np.abs(shares - angles).mean() < 0.03
    assert found.is_there[:60].all() and not found.is_there[60]
    assert found.bands.shape == (61, 1, 16)


# Pixels.


@pytest.mark.parametrize('tag', range(1, 9))
def test_pictures_are_turned_as_pillow_turns_them(tag):
    exif = Image.Exif()
    exif[0x0112] = tag
    data = file_of(COLOUR[0], 'JPEG', quality=95, exif=exif.tobytes())
    with Image.open(io.BytesIO(data)) as image:
        wanted = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(signatures.upright(data), wanted)


def test_equal_pixels_have_one_hash_whatever_the_file():
    png, bmp = (signatures.upright(file_of(COLOUR[0], kind)) for kind in ('PNG', 'BMP'))
    grey = signatures.upright(file_of(GREY[0]))
    assert signatures.pixel_hash(png) == signatures.pixel_hash(bmp)
    assert signatures.pixel_hash(grey) == signatures.pixel_hash(np.repeat(GREY[0][..., None], 3, 2))
    other = png.copy()
    other[3, 4, 1] ^= 1
    turned = png.swapaxes(0, 1)
    hashes = [signatures.pixel_hash(np.ascontiguousarray(p)) for p in (png, other, turned)]
    assert len(set(hashes)) == 3


def test_what_transparency_hides_counts_for_nothing():
    clear = np.zeros((40, 40, 4), np.uint8)
    hidden = clear.copy()
    hidden[..., :3] = 90
    shape = clear.copy()
    shape[10:20, 10:30] = 0, 0, 0, 255
    files = [signatures.upright(file_of(p)) for p in (clear, hidden, shape)]
    hashes = [signatures.pixel_hash(p) for p in files]
    assert hashes[0] == hashes[1] != hashes[2]
    # A black shape on nothing is a shape, where RGB alone would be black all over.
    assert signatures.thumbnail(files[2]).std() > 30
    opaque = np.concatenate([COLOUR[0], np.full((*COLOUR[0].shape[:2], 1), 255, np.uint8)], 2)
    assert signatures.upright(file_of(opaque)).shape[2] == 3


def test_what_is_no_picture_is_refused():
    with pytest.raises(DecodeError, match='not an image'):
        signatures.upright(b'not a picture')
    with pytest.raises(DecodeError, match='float32'):
        signatures.upright(np.zeros((4, 4, 3), np.float32))
