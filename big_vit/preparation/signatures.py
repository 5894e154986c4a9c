"""What pictures that look alike have in common: hashes of pixels, and signatures of 256 bits.

The signature is the DCT hash of Zauner (2010, "Implementation and benchmarking of perceptual image
hash functions"): of a grey picture of 64x64 pixels, whether each of the 16x16 lowest coefficients
is above their median. It is taken of the picture and of nine windows of 95 % of its sides, so that
one that was cropped meets the window that it was cropped to. The 8x8 lowest, above the median of
their own, are cut into four bands of 16 bits: pictures that share a band of any of their windows
are compared (`duplicates`).

All sums are of whole numbers below 2^53, so signatures are the same on any machine.
"""

import hashlib
import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int8, UInt8, UInt16, UInt64

from big_vit.data.decode import DecodeError, Encoded
from big_vit.data.transforms.geometry import resized

BITS = 256
_SIDE, _LOW, _LOWEST, _BANDS = 64, 16, 8, 4
# The whole of a side, its beginning, middle and end; and (rows, columns) of the windows.
_SPANS = ((0.0, 1.0), (0.0, 0.95), (0.025, 0.975), (0.05, 1.0))
_WINDOWS = ((0, 0), *itertools.product((1, 2, 3), (1, 2, 3)))
_CHUNK = 256
# Below this standard deviation of grey levels, a hash tells of noise and not of a picture.
_LEAST_CONTRAST = 3.0
_HYPERPLANES = 0x9E3779B9


class Signatures(NamedTuple):
    """Signatures of n pictures, in w windows each.

    Attributes:
      bits: BITS of them.
      bands: numbers that near ones share some of.
      colours: mean blue and red chroma of the four quarters, 0 for grey.
      is_there: false for pictures without structure, which look like none.
    """

    bits: UInt64[np.ndarray, 'n w 4']
    bands: UInt16[np.ndarray, 'n w b']
    colours: Int8[np.ndarray, 'n 8']
    is_there: Bool[np.ndarray, ' n']


# --- Pixels ----------------------------------------------------------------------------


def upright(data: bytes | np.ndarray) -> UInt8[np.ndarray, 'h w c']:
    """Decode a picture as a viewer shows it, to RGB, or RGBA where it may be transparent.

    Raises:
      DecodeError: damaged, or no picture.
    """
    if not isinstance(data, bytes):
        return _as_colours(data)
    is_jpeg = data[:2] == b'\xff\xd8'
    encoded = Encoded(data, 3 if is_jpeg else 4)
    pixels = encoded.pixels()
    if not is_jpeg or b'Exif\0' in data[: 1 << 16]:
        pixels = _turned(pixels, encoded.orientation)
    if pixels.shape[2] == 4 and (pixels[..., 3] == 255).all():
        pixels = np.ascontiguousarray(pixels[..., :3])
    return pixels


def _as_colours(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4):
        raise DecodeError(f'pixels are {pixels.dtype} {pixels.shape}, not bytes of grey or colours')
    return np.repeat(pixels, 3, 2) if pixels.shape[2] == 1 else pixels


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn stored pixels as the tag of EXIF says."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def over(pixels: np.ndarray, background: int) -> UInt8[np.ndarray, 'h w 3']:
    """Put a picture with transparency over a grey."""
    if pixels.shape[2] == 3:
        return pixels
    alpha = pixels[..., 3:].astype(np.uint16)
    mixed = pixels[..., :3] * alpha + background * (255 - alpha)
    return ((mixed + 127) // 255).astype(np.uint8)


def pixel_hash(pixels: np.ndarray) -> bytes:
    """Hash what is seen: 16 bytes of the size and the pixels; hidden colours do not count."""
    if pixels.shape[2] == 4:
        pixels = np.where(pixels[..., 3:] == 0, np.uint8(0), pixels)
    size = np.array(pixels.shape, '<u4').tobytes()
    return hashlib.blake2b(size + pixels.tobytes(), digest_size=16).digest()


def thumbnail(pixels: np.ndarray) -> UInt8[np.ndarray, '64 64 3']:
    """Shrink a picture to what its signature is made of, over grey where it is transparent."""
    return resized(over(pixels, 128), (_SIDE, _SIDE), 'area')


# --- Signatures ------------------------------------------------------------------------


def _bases() -> Float64[np.ndarray, '64 64']:
    """Return the 16 lowest cosines over each span, as whole numbers, one below the other."""
    points = np.arange(_SIDE) + 0.5
    cosines = np.cos(np.pi * np.arange(_LOW)[:, None] * points / _SIDE)
    bases = []
    for first, last in _SPANS:
        at = np.clip((first + points / _SIDE * (last - first)) * _SIDE - 0.5, 0, _SIDE - 1)
        left = np.floor(at).astype(int)
        right, part = np.minimum(left + 1, _SIDE - 1), at - left
        resampled = np.zeros((_SIDE, _SIDE))
        np.add.at(resampled, (np.arange(_SIDE), left), 1 - part)
        np.add.at(resampled, (np.arange(_SIDE), right), part)
        bases.append(cosines @ resampled)
    return np.rint(np.concatenate(bases) * 4096)


_BASES = _bases()


def _coefficients(grey: UInt8[np.ndarray, 'n 64 64']) -> Float64[np.ndarray, 'n 10 16 16']:
    both = _BASES @ grey.astype(np.float64) @ _BASES.T
    spans = both.reshape(len(grey), len(_SPANS), _LOW, len(_SPANS), _LOW)
    return np.stack([spans[:, rows, :, columns] for rows, columns in _WINDOWS], axis=1)


def _above_median(values: np.ndarray) -> Bool[np.ndarray, '...']:
    return values > np.median(values, axis=-1, keepdims=True)


def _words(bits: Bool[np.ndarray, '... k'], kind: str) -> np.ndarray:
    """Pack bits to whole numbers of a type, the first bit lowest."""
    return np.packbits(bits, axis=-1, bitorder='little').view(kind)


def of_coefficients(values: Float64[np.ndarray, 'n w 16 16']) -> tuple[np.ndarray, np.ndarray]:
    """Return (bits, bands) of DCT coefficients."""
    count = values.shape[:2]
    bits = _words(_above_median(values.reshape(*count, -1)), '<u8')
    lowest = _above_median(values[..., :_LOWEST, :_LOWEST].reshape(*count, -1))
    # Every fourth bit, so that each band has coarse and fine ones.
    bands = [_words(lowest[..., band::_BANDS], '<u2')[..., 0] for band in range(_BANDS)]
    return bits, np.stack(bands, axis=-1)


def of_thumbnails(thumbnails: UInt8[np.ndarray, 'n 64 64 3'], mirrored: bool = False) -> Signatures:
    """Make the signatures of pictures; `mirrored` adds those of their mirror images."""
    import cv2

    parts = []
    for start in range(0, len(thumbnails), _CHUNK):
        some = thumbnails[start : start + _CHUNK]
        rows = np.ascontiguousarray(some).reshape(-1, _SIDE, 3)
        grey = cv2.cvtColor(rows, cv2.COLOR_RGB2GRAY).reshape(-1, _SIDE, _SIDE)
        colours = cv2.cvtColor(rows, cv2.COLOR_RGB2YCrCb).reshape(-1, 2, 32, 2, 32, 3)[..., 1:]
        means = np.rint(colours.mean((2, 4))).reshape(-1, 8) - 128
        values = _coefficients(grey)
        if mirrored:
            values = np.concatenate([values, values * (-1.0) ** np.arange(_LOW)], axis=1)
        is_there = grey.std((1, 2)) >= _LEAST_CONTRAST
        parts.append(Signatures(*of_coefficients(values), means.astype(np.int8), is_there))
    if not parts:
        windows = len(_WINDOWS) * (2 if mirrored else 1)
        return Signatures(
            np.zeros((0, windows, 4), np.uint64),
            np.zeros((0, windows, _BANDS), np.uint16),
            np.zeros((0, 8), np.int8),
            np.zeros(0, bool),
        )
    return Signatures(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def of_vectors(vectors: Float64[np.ndarray, 'n width']) -> Signatures:
    """Make signatures of feature vectors: on which side of 256 random hyperplanes each lies.

    The share of bits in which two differ is about the angle between them over pi (Charikar, 2002,
    "Similarity estimation techniques from rounding algorithms").
    """
    count, width = vectors.shape
    planes = np.random.default_rng(_HYPERPLANES).standard_normal((width, BITS))
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    # Rounded to whole numbers, so that sums do not depend on their order.
    units = np.rint(vectors / np.maximum(lengths, 1e-30) * 2**20)
    bits = _words(((units @ np.rint(planes * 2**16)) > 0)[:, None], '<u8')
    is_there = np.isfinite(lengths[:, 0]) & (lengths[:, 0] > 0)
    return Signatures(bits, bits.view('<u2'), np.zeros((count, 8), np.int8), is_there)


def distance(one: UInt64[np.ndarray, '... 4'], other: UInt64[np.ndarray, '... 4']) -> np.ndarray:
    """Return in how many of BITS signatures differ, uint16."""
    return np.bitwise_count(one ^ other).sum(-1, dtype=np.uint16)
