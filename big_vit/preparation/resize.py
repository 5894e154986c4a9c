"""Pictures made smaller and written anew; those that need neither stay as they are, to the byte."""

from typing import Any

import numpy as np

from big_vit.data.decode import DecodeError, Encoded
from big_vit.data.transforms.geometry import resized
from big_vit.preparation import signatures
from big_vit.preparation.settings import Settings

_ENDINGS = {'jpeg': 'jpg', 'png': 'png', 'webp': 'webp'}
_STARTS = (
    (b'\xff\xd8\xff', 'jpg'),
    (b'\x89PNG', 'png'),
    (b'GIF8', 'gif'),
    (b'BM', 'bmp'),
    (b'II*\0', 'tif'),
    (b'MM\0*', 'tif'),
    (b'\0\0\0\x0cjP', 'jp2'),
)


def fitted(data: Any, ending: str, settings: Settings) -> tuple[bytes, str]:
    """Return a picture as it is to be written, and the ending of its file.

    What is written anew is upright, and JPEG where nothing is transparent, else PNG; transparency
    is put over white where JPEG is asked for.

    Args:
      data: content of a file, or pixels.
      ending: of the file; '' if only its bytes tell.

    Raises:
      DecodeError: it cannot be decoded.
    """
    if isinstance(data, bytes) and settings.encode is None:
        shorter = min(Encoded(data).shape[:2]) if settings.resize else 0
        if shorter <= (settings.resize or 0) and (ending := ending or ending_of(data)):
            return data, ending
    pixels = signatures.upright(data)
    shorter = min(pixels.shape[:2])
    if settings.resize and shorter > settings.resize:
        scale = settings.resize / shorter
        height, width = (max(settings.resize, round(side * scale)) for side in pixels.shape[:2])
        pixels = _resized(pixels, (height, width))
    lossless = not isinstance(data, bytes) or pixels.shape[2] == 4
    kind = settings.encode or ('png' if lossless else 'jpeg')
    if kind == 'jpeg':
        pixels = signatures.over(pixels, 255)
    return encoded(pixels, kind, settings.quality), _ENDINGS[kind]


def ending_of(data: bytes) -> str:
    """Return the ending that the bytes of a picture tell, '' if they tell none."""
    for start, ending in _STARTS:
        if data.startswith(start):
            return ending
    if data[:4] == b'RIFF' and data[8:12] == b'WEBP':
        return 'webp'
    return 'avif' if data[4:11] == b'ftypavi' else ''


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Average to a size; colours count by how much of them is seen."""
    if pixels.shape[2] == 3:
        return resized(pixels, size, 'area')
    alpha = pixels[..., 3:].astype(np.float32)
    seen = resized(np.concatenate([pixels[..., :3] * alpha, alpha], axis=2), size, 'area')
    colours = seen[..., :3] / np.maximum(seen[..., 3:], 1e-6)
    return np.rint(np.concatenate([colours, seen[..., 3:]], axis=2)).clip(0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray, kind: str, quality: int) -> bytes:
    """Encode RGB or RGBA pixels as 'jpeg', 'png' or 'webp'.

    Raises:
      DecodeError: the format has no room for so many pixels.
    """
    import cv2

    options = {
        'jpeg': [cv2.IMWRITE_JPEG_QUALITY, quality],
        'webp': [cv2.IMWRITE_WEBP_QUALITY, quality],
        'png': [cv2.IMWRITE_PNG_COMPRESSION, 6],
    }
    order = cv2.COLOR_RGBA2BGRA if pixels.shape[2] == 4 else cv2.COLOR_RGB2BGR
    try:
        done, data = cv2.imencode(
            f'.{_ENDINGS[kind]}', cv2.cvtColor(np.ascontiguousarray(pixels), order), options[kind]
        )
    except cv2.error as error:
        raise DecodeError(f'cannot be written as {kind}') from error
    if not done:
        raise DecodeError(f'{pixels.shape[:2]} pixels cannot be written as {kind}')
    return data.tobytes()
