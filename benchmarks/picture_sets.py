"""Real pictures in the packages of Debian and npm, as small squares over white.

openclipart-png               8,121 drawings in 22 folders
tuxpaint-stamps-default       796 photographs and drawings in folders
dataset-fashion-mnist         70,000 photographs of clothes in 10 classes
emoji-datasource-*            the same emoji in the styles of Google and Twitter (npm)
"""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Int, UInt8

from big_vit.data.decode import DecodeError, Encoded
from big_vit.data.sources import idx
from big_vit.data.sources.base import Request
from big_vit.errors import UserError

CLIPART, STAMPS = Path('/usr/share/openclipart/png'), Path('/usr/share/tuxpaint/stamps')
FASHION = Path('/usr/share/datasets/fashion-mnist')
SIDE, WHITE = 32, 255


class Pictures(NamedTuple):
    """Pictures of one set.

    Attributes:
      labels: number of the top folder, or of the class.
      families: what pictures that are variants of one thing share.
    """

    images: UInt8[np.ndarray, 'pictures side side channels']
    labels: Int[np.ndarray, ' pictures']
    families: tuple[str, ...]


def square(path: Path, side: int = SIDE) -> UInt8[np.ndarray, 'side side 3']:
    """Read a picture over white, padded to a square, averaged to `side` pixels."""
    pixels = Encoded(path.read_bytes(), channels=4).pixels()
    alpha = pixels[..., 3:].astype(np.float32) / 255
    over = pixels[..., :3] * alpha + WHITE * (1 - alpha)
    height, width = over.shape[:2]
    most = max(height, width)
    padded = np.full((most, most, 3), WHITE, np.float32)
    top, left = (most - height) // 2, (most - width) // 2
    padded[top : top + height, left : left + width] = over
    return np.rint(cv2.resize(padded, (side, side), interpolation=cv2.INTER_AREA)).astype(np.uint8)


def family(path: Path) -> str:
    """Return the folder and the name without numbers, which variants of one thing share."""
    words = re.findall('[a-z]+', path.stem.lower())
    return f'{path.parent}/{" ".join(words)}'


def _read(path: Path) -> np.ndarray | None:
    try:
        return square(path)
    except DecodeError:
        return None


def folder(root: Path, package: str, cache: Path) -> Pictures:
    """Read the pictures of a package by their top folders; those that are no pictures are left out.

    Args:
      cache: file in which they are kept, as decoding takes minutes.

    Raises:
      UserError: the package is not installed.
    """
    if cache.exists():
        with np.load(cache, allow_pickle=False) as kept:
            return Pictures(kept['images'], kept['labels'], tuple(kept['families'].tolist()))
    paths = sorted(root.rglob('*.png'))
    if not paths:
        raise UserError(f'{root} has no pictures: apt-get install {package}')
    with ThreadPoolExecutor() as threads:
        images = list(threads.map(_read, paths))
    rows = [
        (image, path.relative_to(root))
        for image, path in zip(images, paths, strict=True)
        if image is not None
    ]
    tops = [path.parts[0] for _, path in rows]
    known = sorted(set(tops))
    read = Pictures(
        np.stack([image for image, _ in rows]),
        np.array([known.index(top) for top in tops], np.int32),
        tuple(family(path) for _, path in rows),
    )
    arrays = {'images': read.images, 'labels': read.labels, 'families': np.array(read.families)}
    partial = cache.with_suffix('.partial.npz')
    np.savez(partial, **arrays)
    partial.replace(cache)
    return read


def clipart(cache: Path) -> Pictures:
    """Read openclipart's drawings."""
    return folder(CLIPART, 'openclipart-png', cache)


def stamps(cache: Path, at_least: int = 30) -> Pictures:
    """Read Tux Paint's stamps of the folders that have so many."""
    read = folder(STAMPS, 'tuxpaint-stamps-default', cache)
    kept = np.flatnonzero(np.bincount(read.labels)[read.labels] >= at_least)
    labels = np.unique(read.labels[kept], return_inverse=True)[1].astype(np.int32)
    return Pictures(read.images[kept], labels, tuple(read.families[row] for row in kept))


def fashion(split: str) -> Pictures:
    """Read Fashion-MNIST's 'train' or 'test', padded to 32 pixels, of one channel.

    Raises:
      UserError: the package is not installed.
    """
    source = idx.idx(Request(split, key='fashion'), path=str(FASHION))
    columns = source.load(np.arange(source.length))
    margin = (SIDE - columns['image'].shape[1]) // 2
    images = np.pad(columns['image'], ((0, 0), (margin,) * 2, (margin,) * 2, (0, 0)))
    return Pictures(images, columns['label'], ())
