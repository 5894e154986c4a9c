"""Decoding of images; of a JPEG, only the rows that a crop needs.

libjpeg-turbo (simplejpeg) decodes JPEG, OpenCV decodes PNG, WebP, TIFF and BMP, Pillow the rest.
All of them release the interpreter lock. EXIF orientations are ignored, as in TensorFlow,
torchvision and timm.
"""

import io
import re
import struct
import threading

import numpy as np
from jaxtyping import Shaped

Pixels = Shaped[np.ndarray, 'height width channels']

# 16384 x 16384, the largest size that a config can set; larger images are decompression bombs.
MAX_PIXELS = 1 << 28
_JPEG, _PNG = b'\xff\xd8\xff', b'\x89PNG\r\n\x1a\n'
# Data left over after a reduced height are no error; anything before them is.
_TRIMMED = re.compile(r'extraneous bytes before marker 0xd[0-79]')


class DecodeError(ValueError):
    """Not an image, damaged, or too large; the message tells which."""


class Encoded:
    """An encoded image whose header is read and whose pixels are not decoded yet.

    Attributes:
      data: content of the file.
      shape: (height, width, channels) of `pixels()`; channels is 0 if the file decides.
    """

    __slots__ = ('_jpeg', 'data', 'shape')

    def __init__(self, data: bytes, channels: int = 3):
        """Read the header.

        Args:
          data: content of a file.
          channels: 1, 3 or 4 (RGBA) bytes a pixel; 0 keeps channels and depth of the file.

        Raises:
          DecodeError: unknown format, damaged, or more than MAX_PIXELS.
        """
        self.data = data
        height, width, self._jpeg = _read_header(data)
        if not 0 < height * width <= MAX_PIXELS:
            raise DecodeError(f'{height}x{width} pixels are more than the {MAX_PIXELS:,} allowed')
        if channels == 0 and self._jpeg is not None:
            channels = 1 if self._jpeg == 'Gray' else 3
        self.shape = (height, width, channels)

    def pixels(self) -> Pixels:
        """Decode the image into a new array.

        Raises:
          DecodeError: damaged.
        """
        height, width, channels = self.shape
        if self._jpeg in _TURBO and channels in (1, 3):
            return _turbo(self.data, height, height, width, channels, 1)[0].copy()
        return _opencv(self.data, channels)

    def window(
        self, top: int, left: int, height: int, width: int, least: tuple[int, int]
    ) -> Pixels:
        """Decode a window, at full size or scaled down by 2, 4 or 8, but not below `least` pixels.

        No row of a JPEG below the window is decoded, and scaling happens in the inverse cosine
        transform, which averages. The next call in the same thread may overwrite the result.

        Raises:
          DecodeError: damaged within the window or above it.
        """
        full, across, channels = self.shape
        if self._jpeg not in _TURBO or channels not in (1, 3):
            return self.pixels()[top : top + height, left : left + width]
        # A scaled window begins and ends on integer pixels of the scaled image, so it may be off by
        # less than one of those, of which there are at least `least`.
        scale = 1
        while scale < 8 and height >= 2 * scale * least[0] and width >= 2 * scale * least[1]:
            scale *= 2
        pixels, scale = _turbo(self.data, full, top + height, across, channels, scale)
        if scale == 1:
            return pixels[top : top + height, left : left + width]
        rows = slice(top // scale, max(top // scale + 1, round((top + height) / scale)))
        columns = slice(left // scale, max(left // scale + 1, round((left + width) / scale)))
        return pixels[rows, columns]


# Colour spaces that libjpeg-turbo converts to gray or RGB, as simplejpeg names them.
_TURBO = ('YCbCr', 'Gray', 'RGB')


def _read_header(data: bytes) -> tuple[int, int, str | None]:
    """Return (height, width, colour space of a JPEG); DecodeError."""
    if data[:3] == _JPEG:
        import simplejpeg

        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError as error:
            raise DecodeError(f'damaged JPEG ({error})') from error
        return height, width, space
    if data[:8] == _PNG and len(data) >= 24:
        width, height = struct.unpack('>II', data[16:24])
        return height, width, None
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
    except UnidentifiedImageError as error:
        start = data[:8].hex(' ') or 'nothing'
        raise DecodeError(f'not an image ({len(data)} bytes that begin with {start})') from error
    except Exception as error:  # Pillow raises anything for a damaged header.
        raise DecodeError(f'damaged image ({error})') from error
    return height, width, None


_buffers = threading.local()


def _buffer(size: int) -> np.ndarray:
    """Return reused memory of this thread; new pages would take a tenth of the decoding time."""
    buffer = getattr(_buffers, 'array', None)
    if buffer is None or buffer.size < size:
        buffer = _buffers.array = np.empty(size, np.uint8)
    return buffer[:size]


def _sequential_height(data: bytes) -> int | None:
    """Return the offset of the height in a JPEG with one sequential scan; None for others."""
    at, frame = 2, None
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], (data[at + 2] << 8) | data[at + 3]
        if marker in (0xC0, 0xC1):
            frame = at
        elif marker == 0xDA:
            if frame is None or data[at + 4] != data[frame + 9]:
                return None
            return frame + 5
        at += 2 + length
    return None


def _turbo(
    data: bytes, height: int, rows: int, width: int, channels: int, scale: int
) -> tuple[np.ndarray, int]:
    """Decode at least the first `rows` rows, scaled down; return (pixels in `_buffer`, scale).

    A JPEG has no index of its rows, so that all above a crop must be read. The rows below need
    not be: with a smaller height in its header, the decoder stops there.
    """
    import simplejpeg

    if data[-2:] != b'\xff\xd9' and b'\xff\xd9' not in data[-1024:]:
        raise DecodeError('truncated JPEG (it has no end)')
    # Blocks are up to 16 pixels high, and the colour of the row below affects the last two.
    kept = min(height, -(-(rows + 2) // 16) * 16)
    patched: bytes | bytearray = data
    if kept < height:
        at = _sequential_height(data)
        if at is None:
            kept = height
        else:
            patched = bytearray(data)
            patched[at] = kept >> 8
            patched[at + 1] = kept & 255
    size = -(-kept // scale) * -(-width // scale) * channels
    buffer = _buffer(size)
    least = (-(-kept // scale), -(-width // scale))
    try:
        simplejpeg.decode_jpeg(
            patched,
            'GRAY' if channels == 1 else 'RGB',
            # Exact, as in Pillow and torchvision; the fast ones save 5 % and darken by a level.
            fastdct=False,
            fastupsample=False,
            min_height=least[0] if scale > 1 else 0,
            min_width=least[1] if scale > 1 else 0,
            min_factor=scale,
            buffer=buffer,
            strict=True,
        )
    except ValueError as error:
        # With a reduced height, the decoder has filled the buffer and found more data.
        if kept == height or not _TRIMMED.search(str(error)):
            raise DecodeError(f'damaged JPEG ({error})') from error
    return buffer.reshape(*least, channels), scale


def _opencv(data: bytes, channels: int) -> Pixels:
    import cv2

    flags = {
        0: cv2.IMREAD_UNCHANGED,
        1: cv2.IMREAD_GRAYSCALE,
        3: cv2.IMREAD_COLOR_RGB,
        4: cv2.IMREAD_UNCHANGED,
    }[channels]
    if channels in (1, 3):
        flags |= cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise DecodeError(f'damaged image ({" ".join(str(error).split())})') from error
    if image is None:
        return _pillow(data, channels)
    if image.ndim == 2:
        image = image[..., None]
    if channels in (0, 4) and image.shape[2] in (3, 4):
        order = [2, 1, 0, 3][: image.shape[2]]
        image = np.ascontiguousarray(image[..., order])
    if channels == 4 and image.shape[2] != 4:
        colour = np.broadcast_to(image[..., :3], (*image.shape[:2], 3))
        most = np.iinfo(np.dtype(image.dtype.str)).max
        opaque = np.full((*image.shape[:2], 1), most, image.dtype)
        image = np.concatenate([colour, opaque], axis=2)
    return image


def _pillow(data: bytes, channels: int) -> Pixels:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            mode = {1: 'L', 3: 'RGB', 4: 'RGBA'}.get(channels)
            pixels = np.array(image.convert(mode) if mode else image)
    except Exception as error:  # Pillow raises anything for damaged data.
        raise DecodeError(f'damaged image ({error})') from error
    return pixels if pixels.ndim == 3 else pixels[..., None]
