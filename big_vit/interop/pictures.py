"""What is done to a picture before the model sees it, as metadata in timm's words.

A picture is resized so that its shorter side ('center'), or each side ('squash'), is that of the
model divided by `crop_pct`, rounded down, and its middle is cut out.
"""

import math
from collections.abc import Mapping
from typing import Any

from big_vit.data.preprocessing import Preprocessing
from big_vit.errors import UserError

# OpenCV's area widens as the picture shrinks. Of what peers have, bilinear is near it, and the same
# where the picture grows.
_INTERPOLATION = {
    'area': 'bilinear',
    'bilinear': 'bilinear',
    'bicubic': 'bicubic',
    'nearest': 'nearest',
}


def words(preprocessing: Preprocessing, key: str) -> dict[str, Any]:
    """Return the metadata of a preprocessing: crop_pct, crop_mode, interpolation, mean, std.

    Raises:
      UserError: there are no such words for it.
    """
    resize, size = preprocessing.resize, preprocessing.size
    target = (resize.size,) * 2 if isinstance(resize.size, int) else resize.size
    mode = 'center' if isinstance(resize.size, int) else 'squash'
    crop_pct = crop_share(size, target)
    if crop_pct is None or (mode == 'center' and size[0] != size[1]):
        raise UserError(f'{key}: {preprocessing}: other codebases resize both sides by one factor')
    return {
        'crop_pct': crop_pct,
        'crop_mode': mode,
        'interpolation': _INTERPOLATION[resize.method],
        'mean': preprocessing.mean,
        'std': preprocessing.std,
    }


def crop_share(size: tuple[int, int], target: tuple[int, int]) -> float | None:
    """Return a crop_pct by which images of this size are cut from some of the size `target`."""
    lowest = max(side / (whole + 1) for side, whole in zip(size, target, strict=True))
    highest = min(side / whole for side, whole in zip(size, target, strict=True))
    for share in (highest, (lowest + highest) / 2):
        if scaled({'image_size': size, 'crop_pct': share}) == target:
            return share
    return None


def remarks(preprocessing: Preprocessing) -> list[str]:
    """Say what a peer's config has no place for, a line each."""
    lines = []
    if preprocessing.is_turned:
        lines.append(
            'files with an orientation tag are turned when they are opened: '
            'PIL.ImageOps.exif_transpose'
        )
    if len(preprocessing.mean) == 1:
        lines.append("pictures are opened in grey, as Pillow's convert('L') makes them")
    if preprocessing.resize.method in ('bilinear', 'bicubic'):
        lines.append(
            f'{preprocessing.resize.method} smooths pictures that shrink there, and does not here; '
            "method='area' does"
        )
    return lines


def crop_mode(meta: Mapping[str, Any]) -> str:
    """Return 'center', 'squash' or 'border'; not said, the first for a crop to a square."""
    height, width = meta['image_size']
    crops = height == width and (meta.get('crop_pct') or 1) < 1
    return meta.get('crop_mode') or ('center' if crops else 'squash')


def scaled(meta: Mapping[str, Any]) -> tuple[int, int]:
    """Return the (height, width) to which pictures are resized before the crop, as timm does."""
    height, width = meta['image_size']
    crop_pct = meta.get('crop_pct') or 1.0
    return math.floor(height / crop_pct), math.floor(width / crop_pct)


def transform_of(meta: Mapping[str, Any]) -> str:
    """Write the operations of an evaluation, with the normalisation of the images."""
    size, target = tuple(meta['image_size']), scaled(meta)
    mode = crop_mode(meta)
    if mode == 'squash':
        parts = ['resize(size)'] if target == size else [f'resize({target})', 'central_crop(size)']
    elif mode == 'border':  # Padding to a square is none of our operations.
        parts = [f'resize_long({max(target)})']
    elif target[0] == target[1]:
        parts = [f'resize_small({target[0]})', 'central_crop(size)']
    else:  # timm fits the crop into the picture by either side, which no operation of ours does.
        parts = ['resize(size)']
    mean, std = meta.get('mean'), meta.get('std')
    if mean and std and {*mean, *std} != {0.5}:
        parts.append(f'normalize({tuple(mean)}, {tuple(std)})')
    return ' | '.join(['decode', *parts])
