"""Pixel operations: functions of an image and a magnitude, without randomness.

`colour` offers them as operations of a transform; `randaug` and `autoaugment` are policies that
choose among them. Images are RGB bytes and are never modified in place.

Values match Pillow's exactly for brightness, contrast, solarize, posterize, equalize,
autocontrast, luma, JPEG and the nearest warp. Saturation and sharpness differ by at most 1 in
fewer than one value in a thousand: where a blend is a whole number up to the last bits of a
float32, Pillow may truncate it to the one below. The docstrings of hue, blur and the other warps
state how they differ.

Some functions take a `convention`, because published recipes disagree and results must not change:

* 'pillow': luma in Pillow's fixed-point arithmetic and blends in float32, as torchvision and timm
  have them;
* 'opencv': luma by OpenCV's conversion, which is occasionally off by 1, and blends in float64, as
  the TensorFlow variant of RandAugment (`randaug`) has always had them here.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import Float, Int64, UInt8

from big_vit.data.transforms.operations import Real

Image = UInt8[np.ndarray, 'height width 3']
Colour = tuple[int, int, int]
Convention = Literal['pillow', 'opencv']

BLACK: Colour = (0, 0, 0)
# Weights of red, green and blue in luma (ITU-R BT.601), in Pillow's 65536ths; the last one rounds.
_LUMA = np.array([[19595, 38470, 7471, 32768]], np.float32) / 65536


# Values of single pixels.


def invert(image: UInt8[np.ndarray, '*shape']) -> UInt8[np.ndarray, '*shape']:
    """Swap black and white."""
    return 255 - image


def posterize(image: Image, bits: int) -> Image:
    """Keep the highest `bits` bits of every value."""
    return image & np.uint8(256 - (1 << (8 - bits)))


def solarize(image: Image, threshold: int) -> Image:
    """Invert the values from `threshold` on."""
    values = np.arange(256)
    return _look_up(image, np.where(values < threshold, values, 255 - values))


def solarize_add(image: Image, addition: int) -> Image:
    """Brighten the values below 128 by `addition`, to at most 255."""
    values = np.arange(256)
    return _look_up(image, np.where(values < 128, np.minimum(values + addition, 255), values))


def gamma(image: Image, power: Real) -> Image:
    """Raise the values, scaled to 0..1, to a power."""
    return _look_up(image, np.rint(255 * (np.arange(256) / 255) ** power))


def autocontrast(image: Image) -> Image:
    """Stretch each channel to 0..255; a channel of a single value is kept."""
    table = np.tile(np.arange(256, dtype=np.uint8)[:, None], 3)
    for channel, histogram in enumerate(_histograms(image)):
        seen = np.flatnonzero(histogram)
        low, high = int(seen[0]), int(seen[-1])
        if high > low:
            scale = 255.0 / (high - low)
            table[:, channel] = np.clip(np.arange(256) * scale - low * scale, 0, 255)
    return _look_up(image, table)


def equalize(image: Image) -> Image:
    """Flatten the histogram of each channel."""
    table = np.tile(np.arange(256, dtype=np.uint8)[:, None], 3)
    for channel, histogram in enumerate(_histograms(image)):
        step = (histogram.sum() - histogram[np.flatnonzero(histogram)[-1]]) // 255
        if step:
            below = histogram.cumsum() - histogram
            table[:, channel] = np.minimum((below + step // 2) // step, 255)
    return _look_up(image, table)


def _look_up(image: Image, table: np.ndarray) -> Image:
    """Map each value by a table [256], or [256, 3] with a column per channel."""
    import cv2

    return cv2.LUT(image, table.astype(np.uint8).reshape(1, 256, -1))


def _histograms(image: Image) -> Int64[np.ndarray, '3 256']:
    """Count the pixels of each value, by channel."""
    import cv2

    counts = [cv2.calcHist([image], [channel], None, [256], [0, 256]) for channel in range(3)]
    return np.array(counts).reshape(3, 256).astype(np.int64)


# Enhancements, which blend an image with a plainer one: factor 1 keeps the image, factor 0 gives
# the plainer one, larger factors exaggerate (Pillow's ImageEnhance).


def luma(image: Image, convention: Convention = 'pillow') -> UInt8[np.ndarray, 'height width']:
    """Weigh red, green and blue to a grey value, as Pillow's mode L."""
    import cv2

    if convention == 'opencv':
        return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    # Exact, since a float32 has 24 bits and these are products of 8 and 16.
    return cv2.transform(image.astype(np.float32), _LUMA).astype(np.uint8)


def grayscale(image: Image, convention: Convention = 'pillow') -> Image:
    """Replace all three channels by luma."""
    import cv2

    return cv2.cvtColor(luma(image, convention), cv2.COLOR_GRAY2RGB)


def brightness(image: Image, factor: Real, convention: Convention = 'pillow') -> Image:
    """Blend with black."""
    return _blend_with_value(image, 0, factor, convention)


def contrast(image: Image, factor: Real, convention: Convention = 'pillow') -> Image:
    """Blend with the mean luma of the image."""
    import cv2

    mean = int(cv2.mean(luma(image, convention))[0] + 0.5)
    return _blend_with_value(image, mean, factor, convention)


def saturation(image: Image, factor: Real, convention: Convention = 'pillow') -> Image:
    """Blend with the grayscale image."""
    return _blend(grayscale(image, convention), image, factor)


def sharpness(image: Image, factor: Real) -> Image:
    """Blend with a smoothed image; the outermost pixels stay."""
    import cv2

    kernel = np.ones((3, 3), np.float32)
    kernel[1, 1] = 5
    smooth = image.copy()
    if min(image.shape[:2]) > 2:
        smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, kernel / 13)[1:-1, 1:-1]
    return _blend(smooth, image, factor)


ENHANCEMENTS: dict[str, Callable[[Image, Real], Image]] = {
    'brightness': brightness,
    'contrast': contrast,
    'saturation': saturation,
    'sharpness': sharpness,
}


def _blend(plain: Image, image: Image, factor: Real) -> Image:
    """Compute plain + factor * (image - plain), truncated to whole numbers of 0..255."""
    import cv2

    # addWeighted rounds to the nearest: 0.4999 less truncates, and 1e-4 allows for its rounding.
    return cv2.addWeighted(image, factor, plain, 1 - factor, -0.4999)


def _blend_with_value(image: Image, value: int, factor: Real, convention: Convention) -> Image:
    """Blend with an image of one value, which a table does."""
    if convention == 'opencv':
        table = np.floor(value + factor * (np.arange(256) - value) + 1e-4)
    else:
        difference = np.arange(256, dtype=np.float32) - np.float32(value)
        table = value + np.float32(factor) * difference
    return _look_up(image, np.clip(table, 0, 255))


# Hue, blur and compression.


def shift_hue(image: Image, shift: Real) -> Image:
    """Turn the hue by `shift` of a full circle, to one of 256 hues.

    Hue and saturation are rounded to bytes on the way, as in Pillow and so in torchvision. That
    moves colours by up to 10 levels, and by 0.2 on average in a photograph; Pillow's as much.
    """
    import cv2

    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(shift * 256) % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def gaussian_blur(image: Image, sigma: Real, size: int | None = None) -> Image:
    """Blur with a Gaussian of standard deviation `sigma` pixels, mirroring at the border.

    Its kernel is `size` pixels long, by default as long as it adds anything.

    Values are rounded once, whereas `cv2.GaussianBlur` of bytes has weights of 8 bits.
    """
    import cv2

    # Beyond four deviations a pixel adds less than a thirtieth of a level.
    size = size or 2 * max(1, int(np.ceil(4 * sigma))) + 1
    kernel = cv2.getGaussianKernel(size, sigma, cv2.CV_32F)
    return cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)


def jpeg(image: Image, quality: int) -> Image:
    """Compress to JPEG and decode again, with chroma at half size as Pillow saves it."""
    import cv2
    import simplejpeg

    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    # simplejpeg would encode with a coarser transform below quality 96.
    _, data = cv2.imencode('.jpg', bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return simplejpeg.decode_jpeg(data, fastdct=False, fastupsample=False)


# Geometry that keeps the size.

# How a warp samples the image:
# * 'nearest': Pillow's nearest pixel, with pixel centres at halves;
# * 'bilinear', 'bicubic': OpenCV's, three to five times as fast as Pillow's, with centres at
#   halves. They differ from Pillow: a pixel at the image's border is blended with the fill;
#   bilinear is off by at most 1, as it rounds where Pillow truncates (before OpenCV 5 by up to 4,
#   as positions are 32nds of a pixel); the bicubic kernel is a little sharper (Keys's a is -0.75,
#   not -0.5), by 1 level on average in a photograph and by up to 10 at an edge;
# * 'nearest_tensorflow': OpenCV's nearest pixel, with centres at whole numbers as in TensorFlow.
#   Where two pixels are equally near, it takes another one than Pillow.
Method = Literal['nearest', 'bilinear', 'bicubic', 'nearest_tensorflow']


def warp(image: Image, matrix: Float[np.ndarray, '2 3'], method: Method, fill: Colour) -> Image:
    """Move the pixel at matrix @ (x, y, 1) to each (x, y).

    Args:
      matrix: from positions in the new image to positions in the old one.
      fill: colour of what lies outside of the old image.
    """
    size = image.shape[1::-1]
    if method == 'nearest':
        from PIL import Image as pillow

        warped = pillow.fromarray(image).transform(
            size,
            pillow.Transform.AFFINE,
            matrix.ravel().tolist(),
            pillow.Resampling.NEAREST,
            fillcolor=fill,
        )
        return np.array(warped)
    import cv2

    kernel = {'bilinear': cv2.INTER_LINEAR, 'bicubic': cv2.INTER_CUBIC}.get(
        method, cv2.INTER_NEAREST
    )
    if method != 'nearest_tensorflow':
        matrix = matrix.copy()
        matrix[:, 2] += matrix[:, :2].sum(axis=1) / 2 - 0.5
    return cv2.warpAffine(
        image, matrix, size, flags=kernel | cv2.WARP_INVERSE_MAP, borderValue=fill
    )


def rotation(degrees: Real, centre: tuple[Real, Real]) -> Float[np.ndarray, '2 3']:
    """Make the matrix that turns counter-clockwise about a point (x, y)."""
    angle = np.deg2rad(degrees)
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.array([[cos, -sin, 0], [sin, cos, 0]])
    matrix[:, 2] = centre - matrix[:, :2] @ centre
    return matrix


def rotate(image: Image, degrees: Real, method: Method, fill: Colour) -> Image:
    """Turn counter-clockwise about the centre of the image."""
    first = 1 if method == 'nearest_tensorflow' else 0  # The centres of the corner pixels.
    height, width = image.shape[:2]
    matrix = rotation(degrees, ((width - first) / 2, (height - first) / 2))
    return warp(image, matrix, method, fill)


def shear_x(image: Image, share: Real, method: Method, fill: Colour) -> Image:
    """Move each row to the left by `share` of its distance to the top."""
    return warp(image, np.array([[1.0, share, 0.0], [0.0, 1.0, 0.0]]), method, fill)


def shear_y(image: Image, share: Real, method: Method, fill: Colour) -> Image:
    """Move each column up by `share` of its distance to the left."""
    return warp(image, np.array([[1.0, 0.0, 0.0], [share, 1.0, 0.0]]), method, fill)


def translate_x(image: Image, distance: Real, method: Method, fill: Colour) -> Image:
    """Move the image to the left by `distance` pixels."""
    return warp(image, np.array([[1.0, 0.0, distance], [0.0, 1.0, 0.0]]), method, fill)


def translate_y(image: Image, distance: Real, method: Method, fill: Colour) -> Image:
    """Move the image up by `distance` pixels."""
    return warp(image, np.array([[1.0, 0.0, 0.0], [0.0, 1.0, distance]]), method, fill)


def cutout(image: Image, reach: tuple[int, int], position: np.ndarray, fill: Colour) -> Image:
    """Paint a rectangle of one colour, which may extend beyond the border.

    Args:
      reach: (down, across), pixels from the centre of the rectangle to its sides.
      position: [2], row and column of its centre as fractions of the image, in [0, 1).
    """
    rectangle = []
    for length, distance, fraction in zip(image.shape[:2], reach, position, strict=True):
        centre = int(fraction * length)
        rectangle.append(slice(max(0, centre - distance), centre + distance))
    image = image.copy()
    image[*rectangle] = fill
    return image
