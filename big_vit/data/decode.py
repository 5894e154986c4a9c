"""Decoding of images; of a JPEG, only the rows that a crop needs.

libjpeg-turbo (simplejpeg) decodes JPEG, OpenCV decodes PNG, WebP and what of TIFF is deeper than
bytes, Pillow the rest. All of them release the interpreter lock. The bytes decide which, not the
name, and only decoders on a list are tried: others start programs (Ghostscript). Pixels come as
they are stored, in any format: orientation tags are ignored, as in TensorFlow, torchvision and
timm.
"""

import functools
import io
import re
import struct
import threading
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer, Shaped

Pixels = Shaped[np.ndarray, 'height width channels']
# The values of black and white.
Levels = tuple[float | int, float | int]

# 16384 x 16384, the largest size that a config can set; larger images are decompression bombs.
MAX_PIXELS = 1 << 28
_JPEG, _PNG = b'\xff\xd8\xff', b'\x89PNG\r\n\x1a\n'
_PNM = (b'P2', b'P3', b'P5', b'P6')
# What Pillow may be asked to read. Its other decoders need a program or a plugin, or make pictures
# of what is none.
_PILLOW = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PPM', 'AVIF', 'JPEG2000', 'ICO', 'TGA')
# Bytes that only formats of `_PILLOW` begin with, to recognize a file without an ending.
_SIGNATURES = re.compile(
    rb'\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|....ftypavi[fs]|\0\0\0\x0cjP  \r\n',
    re.DOTALL,
)
# No pixel of 16 bits is above this if an image has 14 bits or fewer.
_FOURTEEN_BITS = (1 << 14) - 1
# Data left over after a reduced height are no error; anything before them is.
_TRIMMED = re.compile(r'extraneous bytes before marker 0xd[0-79]')


class DecodeError(ValueError):
    """Not an image, damaged, or too large; the message tells which."""


class _Header(NamedTuple):
    """What the beginning of a file tells.

    Attributes:
      decoder: 'turbo', 'opencv' or 'pillow'.
      gray: whether a JPEG has one channel.
      is_deep: whether pixels may be of another type than bytes.
      orientation: of a TIFF, (value of its tag, where it lies in the file).
      zero_is_white: whether a TIFF with deep pixels is stored as a negative.
    """

    height: int
    width: int
    decoder: str
    gray: bool = False
    is_deep: bool = False
    orientation: tuple[int, slice] | None = None
    zero_is_white: bool = False


class Encoded:
    """An encoded image whose header is read and whose pixels are not decoded yet.

    Attributes:
      data: content of the file.
      levels: (black, white), the values that become 0 and 255 where pixels are not bytes.
      shape: (height, width, channels) of `pixels()`; channels is 0 if the file decides.
    """

    __slots__ = ('_header', 'data', 'levels', 'shape')

    def __init__(self, data: bytes, channels: int = 3, levels: Levels | None = None):
        """Read the header.

        Args:
          data: content of a file.
          channels: 1, 3 or 4 (RGBA) bytes a pixel; 0 keeps channels and depth of the file.
          levels: (black, white) of pixels that are not bytes; by default 0 and 65535 for 16 bits.

        Raises:
          DecodeError: unknown format, damaged, or more than MAX_PIXELS.
        """
        self.data, self.levels = data, levels
        self._header = header = _read_header(data)
        height, width = header.height, header.width
        if not 0 < height * width <= MAX_PIXELS:
            raise DecodeError(f'{height}x{width} pixels are more than the {MAX_PIXELS:,} allowed')
        if channels == 0 and data[:3] == _JPEG:
            channels = 1 if header.gray else 3
        self.shape = (height, width, channels)

    @property
    def orientation(self) -> int:
        """How a viewer turns the image, 1 (not at all) to 8: the tag of EXIF, or of a TIFF."""
        if self._header.orientation is not None:
            tag = self._header.orientation[0]
        else:
            try:
                with _pillow_image(self.data) as image:
                    tag = image.getexif().get(0x0112, 1)
            except Exception:  # Pillow raises anything for a damaged tag.
                return 1
        return tag if tag in range(1, 9) else 1

    def pixels(self) -> Pixels:
        """Decode the image into a new array.

        Raises:
          DecodeError: damaged, or its pixels are not bytes and it is not known what is white.
        """
        height, width, channels = self.shape
        header = self._header
        if header.decoder == 'turbo' and channels in (1, 3):
            return _turbo(self.data, height, height, width, channels, 1)[0].copy()
        if header.decoder == 'opencv' and not header.is_deep:
            return _opencv(self.data, channels)
        data = self.data
        if header.orientation is not None:  # Both decoders would turn the image.
            start, stop = header.orientation[1].start, header.orientation[1].stop
            upright = (1).to_bytes(stop - start, 'little' if data[:2] == b'II' else 'big')
            data = data[:start] + upright + data[stop:]
        if header.decoder == 'opencv':
            image = _fitted(_opencv(data, 0), channels, self.levels)
            if header.zero_is_white and image.dtype == np.uint8:  # As Pillow does with bytes.
                image[..., :3] = 255 - image[..., :3]
            return image
        if data[:2] in _PNM and (channels == 0 or self.levels is not None):
            stored = _opencv(data, 0)  # Pillow scales by the largest value that the header names.
            if stored.dtype != np.uint8:
                return _fitted(stored, channels, self.levels)
        return _pillow(data, channels, self.levels)

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
        if self._header.decoder != 'turbo' or channels not in (1, 3):
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


# The eight ways to turn and mirror an image, by the number that EXIF and TIFF have for them.
_TURNS = {
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: image[::-1].swapaxes(0, 1),
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: image[:, ::-1].swapaxes(0, 1),
}


def upright(image: Pixels, orientation: int) -> Pixels:
    """Turn an image as viewers do, by the number that EXIF has for its orientation."""
    return np.ascontiguousarray(_TURNS[orientation](image)) if orientation != 1 else image


def stored_values(data: bytes) -> Integer[np.ndarray, 'height width']:
    """Decode an image of classes: its numbers, of colours those of the palette.

    Raises:
      DecodeError: not an image, damaged, or one of several channels.
    """
    header = _read_header(data)
    if not 0 < header.height * header.width <= MAX_PIXELS:
        raise DecodeError(f'{header.height}x{header.width} pixels are more than {MAX_PIXELS:,}')
    try:
        with _pillow_image(data) as image:
            values = np.asarray(image)
    except Exception as error:  # Pillow raises anything for damaged data.
        raise DecodeError(f'damaged image ({error})') from error
    if values.ndim != 2 or values.dtype.kind not in 'biu':
        raise DecodeError('has colours, and not one number a pixel, which is its class')
    return values.astype(np.int32) if values.dtype.itemsize > 1 else values.astype(np.uint8)


# Colour spaces that libjpeg-turbo converts to gray or RGB, as simplejpeg names them.
_TURBO = ('YCbCr', 'Gray', 'RGB')


def _read_header(data: bytes) -> _Header:
    """Read the beginning of a file; DecodeError."""
    if data[:3] == _JPEG:
        import simplejpeg

        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError as error:
            raise DecodeError(f'damaged JPEG ({error})') from error
        # Pillow's colours are those of other libraries where libjpeg-turbo converts nothing.
        return _Header(height, width, 'turbo' if space in _TURBO else 'opencv', space == 'Gray')
    if data[:8] == _PNG and len(data) > 24:
        width, height = struct.unpack('>II', data[16:24])
        return _Header(height, width, 'opencv', is_deep=data[24] == 16)
    if data[:4] in _TIFF:
        return _tiff_header(data)
    from PIL import UnidentifiedImageError

    try:
        with _pillow_image(data) as image:
            width, height = image.size
            decoder = 'opencv' if image.format == 'WEBP' else 'pillow'
    except UnidentifiedImageError as error:
        start = data[:8].hex(' ') or 'nothing'
        raise DecodeError(f'not an image ({len(data)} bytes that begin with {start})') from error
    except Exception as error:  # Pillow raises anything for a damaged header.
        raise DecodeError(f'damaged image ({error})') from error
    return _Header(height, width, decoder)


@functools.cache
def _formats() -> tuple[str, ...]:
    """List the formats that this build of Pillow reads, of those that are allowed."""
    from PIL import Image

    Image.init()
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Above, `Encoded` refuses.
    return tuple(name for name in _PILLOW if name in Image.OPEN)


def _pillow_image(data: bytes) -> Any:
    """Open an image with Pillow: the only place that does."""
    from PIL import Image

    return Image.open(io.BytesIO(data), formats=_formats())


def is_image(start: bytes) -> bool:
    """Whether bytes are the beginning of an image, by a signature that nothing else has."""
    return _SIGNATURES.match(start) is not None


# --- TIFF ------------------------------------------------------------------------------

# By byte order and 42 or 43 (BigTIFF): types of offsets, counts and values, and bytes of an entry.
_TIFF = {
    b'II*\0': ('<', ('I', 'H', 'I'), 12),
    b'MM\0*': ('>', ('I', 'H', 'I'), 12),
    b'II+\0': ('<', ('Q', 'Q', 'Q'), 20),
    b'MM\0+': ('>', ('Q', 'Q', 'Q'), 20),
}
_WIDTH, _HEIGHT, _BITS, _ORIENTATION, _SAMPLES, _EXTRA = 256, 257, 258, 274, 277, 338
_PHOTOMETRIC, _SAMPLE_FORMAT, _WHITE_IS_ZERO, _SIGNED = 262, 339, 0, 2
_MOST_TAGS = 4096


def _tiff_header(data: bytes) -> _Header:
    """Read the tags of the first image of a TIFF; DecodeError.

    Pillow does not open all that OpenCV reads, and OpenCV does not tell without decoding.
    """
    order, (of_start, of_count, of_value), size = _TIFF[data[:4]]
    tags: dict[int, tuple[int, slice]] = {}
    try:
        (at,) = struct.unpack_from(order + of_start, data, 4 if size == 12 else 8)
        (count,) = struct.unpack_from(order + of_count, data, at)
        at += struct.calcsize(of_count)
        for entry in range(at, at + size * min(count, _MOST_TAGS), size):
            tag, kind, values = struct.unpack_from(f'{order}HH{of_value}', data, entry)
            letter = {1: 'B', 3: 'H', 4: 'I', 16: 'Q'}.get(kind)
            if letter is None or not values:
                continue
            width = struct.calcsize(letter)
            place = entry + 4 + struct.calcsize(of_value)
            if values * width > struct.calcsize(of_value):
                (place,) = struct.unpack_from(order + of_value, data, place)
            (value,) = struct.unpack_from(order + letter, data, place)
            tags[tag] = value, slice(place, place + width)
        width, height = tags[_WIDTH][0], tags[_HEIGHT][0]
    except (struct.error, KeyError, OverflowError) as error:
        raise DecodeError(f'damaged TIFF ({error})') from error
    bits, samples, extra = (tags.get(t, (1,))[0] for t in (_BITS, _SAMPLES, _EXTRA))
    photometric, kind = (tags.get(t, (1,))[0] for t in (_PHOTOMETRIC, _SAMPLE_FORMAT))
    is_deep = bits > 8 or samples > 4 or (samples == 4 and _EXTRA in tags and extra == 0)
    is_deep = is_deep or kind == _SIGNED
    decoder, white = 'opencv' if is_deep else 'pillow', photometric == _WHITE_IS_ZERO
    return _Header(height, width, decoder, False, is_deep, tags.get(_ORIENTATION), white)


# --- JPEG ------------------------------------------------------------------------------


_buffers = threading.local()


def _buffer(size: int) -> np.ndarray:
    """Return reused memory of this thread; new pages would take a tenth of the decoding time."""
    buffer = getattr(_buffers, 'array', None)
    if buffer is None or buffer.size < size:
        buffer = _buffers.array = np.empty(size, np.uint8)
    return buffer[:size]


def _first_scan(data: bytes) -> tuple[int, int | None]:
    """Return where the first scan of a JPEG begins, and its frame's header if it is sequential."""
    at, frame = 2, None
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], (data[at + 2] << 8) | data[at + 3]
        if marker in (0xC0, 0xC1):
            frame = at
        elif marker == 0xDA:
            return at, frame
        at += 2 + length if marker != 0xFF else 1  # Any number of 0xFF may come before a marker.
    return at, None


def _has_end(data: bytes) -> bool:
    """Whether a JPEG has its end marker; phones and editors write videos and notes behind it."""
    # Within scans 0xFF comes before 0 and restart markers only; within headers anything may come.
    return data.endswith(b'\xff\xd9') or data.find(b'\xff\xd9', _first_scan(data)[0]) >= 0


def _sequential_height(data: bytes) -> int | None:
    """Return the offset of the height in a JPEG with one sequential scan; None for others."""
    at, frame = _first_scan(data)
    if frame is None or at + 4 >= len(data) or data[at + 4] != data[frame + 9]:
        return None
    return frame + 5


def _turbo(
    data: bytes, height: int, rows: int, width: int, channels: int, scale: int
) -> tuple[np.ndarray, int]:
    """Decode at least the first `rows` rows, scaled down; return (pixels in `_buffer`, scale).

    A JPEG has no index of its rows, so that all above a crop must be read. The rows below need
    not be: with a smaller height in its header, the decoder stops there.
    """
    import simplejpeg

    if not _has_end(data):
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


# --- Other formats ---------------------------------------------------------------------


@functools.cache
def _quiet_opencv() -> Any:
    """Import OpenCV, which would print several lines for each file that it leaves to Pillow."""
    import cv2

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2


def _opencv(data: bytes, channels: int) -> Pixels:
    cv2 = _quiet_opencv()
    flags = {1: cv2.IMREAD_GRAYSCALE, 3: cv2.IMREAD_COLOR_RGB}.get(channels, cv2.IMREAD_UNCHANGED)
    if channels in (1, 3):
        flags |= cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise DecodeError(f'damaged image ({" ".join(str(error).split())})') from error
    if image is None:
        return _pillow(data, channels, None)
    if image.ndim == 2:
        image = image[..., None]
    if channels in (0, 4) and image.shape[2] in (3, 4):
        order = [2, 1, 0, 3][: image.shape[2]]
        image = np.ascontiguousarray(image[..., order])
    return _with_alpha(image) if channels == 4 else image


def _pillow(data: bytes, channels: int, levels: Levels | None) -> Pixels:
    from PIL import UnidentifiedImageError

    try:
        with _pillow_image(data) as image:
            mode = {1: 'L', 3: 'RGB', 4: 'RGBA'}.get(channels) or _own_mode(image)
            is_deep = image.mode.startswith(('I', 'F'))
            pixels = np.array(image if is_deep else image.convert(mode))
    except UnidentifiedImageError as error:  # Its text is an address in memory.
        raise DecodeError('damaged, or of a type of pixels that cannot be read') from error
    except Exception as error:  # Pillow raises anything for damaged data.
        raise DecodeError(f'damaged image ({error})') from error
    if pixels.dtype == np.int32:  # Pillow scales the grey of a PGM to 16 bits.
        pixels = pixels.astype(np.uint16)
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    return _fitted(pixels, channels, levels) if is_deep else pixels


def _own_mode(image: Any) -> str:
    """Return the mode with the channels that an image has; a palette is no channel."""
    if image.mode in ('P', 'PA'):
        return 'RGBA' if image.has_transparency_data else 'RGB'
    return {'1': 'L', 'CMYK': 'RGB', 'YCbCr': 'RGB', 'LAB': 'RGB'}.get(image.mode, image.mode)


def _with_alpha(image: np.ndarray) -> Pixels:
    if image.shape[2] == 4:
        return image
    colour = np.broadcast_to(image[..., :3], (*image.shape[:2], 3))
    opaque = np.full((*image.shape[:2], 1), 255, np.uint8)
    return np.concatenate([colour, opaque], axis=2)


def _fitted(image: np.ndarray, channels: int, levels: Levels | None) -> Pixels:
    """Convert pixels of any type to 1, 3 or 4 bytes; 0 channels only applies `levels`."""
    import cv2

    if levels is not None:
        image = as_bytes(image, levels)
    if channels == 0:
        return image
    if image.dtype != np.uint8:
        image = _by_type(image, channels)
    if channels == 4:
        return _with_alpha(image)
    colours = image[..., :3] if image.shape[2] > 2 else image[..., :1]
    if channels == 3:
        return np.ascontiguousarray(np.broadcast_to(colours, (*image.shape[:2], 3)))
    if colours.shape[2] == 3:
        return cv2.cvtColor(np.ascontiguousarray(colours), cv2.COLOR_RGB2GRAY)[..., None]
    return np.ascontiguousarray(colours)


def _by_type(image: np.ndarray, channels: int) -> Pixels:
    """Convert full 16 bits to bytes; DecodeError for all whose white is not known."""
    low, high = float(image.min()), float(image.max())
    if not np.isfinite([low, high]).all():
        raise DecodeError('some of its pixels are no numbers')
    if image.dtype == np.uint16 and (high > _FOURTEEN_BITS or high == 0):
        return (image >> 8).astype(np.uint8)
    if image.dtype == np.uint16:
        bits = next(bits for bits in (8, 10, 12, 14) if high < 1 << bits)
        wanted = f'decode({channels}, white={(1 << bits) - 1}), or white=65535 if it is so dark'
    else:
        usual = ((0, 1), (-1, 1), (0, 255))
        black, white = next((x for x in usual if x[0] <= low and high <= x[1]), (low, high))
        wanted = f'decode({channels}, black={black:g}, white={white:g})'
    raise DecodeError(
        f'its pixels are {image.dtype} from {low:g} to {high:g}, and nothing says which of them is '
        f'white: begin the transform with {wanted}'
    )


def as_bytes(image: np.ndarray, levels: Levels) -> Pixels:
    """Scale pixels so that black is 0 and white 255, with what is beyond cut off; bytes stay.

    Raises:
      DecodeError: some are not finite.
    """
    if image.dtype == np.uint8:
        return image
    black, white = levels
    scaled = (image.astype(np.float64) - black) * (255 / (white - black))
    if not np.isfinite(scaled).all():
        raise DecodeError('some of its pixels are no numbers')
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)
