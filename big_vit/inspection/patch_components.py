"""Patch tokens as colours: their first three principal components over a set of pictures.

Patches of one colour mean the same to the model, in all pictures of the set (as in the figures of
DINOv2, arXiv 2304.07193).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from big_vit.inspection import plots
from big_vit.inspection.loaded_model import LoadedModel

# Beyond these quantiles a colour is saturated: a few patches must not take all of the scale.
_QUANTILES = (0.01, 0.99)


class PatchColours(NamedTuple):
    """Pictures and the colours of their patches.

    Attributes:
      pictures: uint8 [height, width, channels] each.
      colours: of each patch.
      shares: of the variance of the tokens, that each of the three components has.
    """

    pictures: list[np.ndarray]
    colours: UInt8[np.ndarray, 'pictures rows columns 3']
    shares: Float[np.ndarray, '3']

    def panels(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return each picture with its colours, enlarged to its size."""
        import cv2

        return [
            (picture, cv2.resize(patches, picture.shape[1::-1], interpolation=cv2.INTER_NEAREST))
            for picture, patches in zip(self.pictures, self.colours, strict=True)
        ]

    def words(self) -> str:
        """Say what share of the variance the colours show."""
        red, green, blue = (f'{share:.0%}' for share in self.shares)
        return f'red {red}, green {green}, blue {blue}'


def components(
    tokens: Float[np.ndarray, 'tokens width'],
) -> tuple[Float[np.ndarray, 'tokens 3'], Float[np.ndarray, '3']]:
    """Project tokens onto their first three principal components.

    Signs are such that the larger values are positive.

    Returns:
      (projections, the share of the variance of each), zeros where there are fewer components.
    """
    wide = tokens.astype(np.float64)
    left, singular, _ = np.linalg.svd(wide - wide.mean(axis=0), full_matrices=False)
    total = np.square(singular).sum()
    found, shares = np.zeros((len(wide), 3)), np.zeros(3)
    count = min(3, len(singular))
    if total:
        found[:, :count] = left[:, :count] * singular[:count]
        shares[:count] = np.square(singular[:count]) / total
    return found * np.where(np.power(found, 3).sum(axis=0) < 0, -1, 1), shares


def foreground(
    first: Float[np.ndarray, 'pictures rows columns'],
) -> Bool[np.ndarray, 'pictures rows columns']:
    """Tell the foreground by the first component: the side of a threshold that borders have least.

    The threshold is Otsu's: it makes the variances within the two sides least.
    """
    values = np.sort(first, axis=None)
    count = np.arange(1, len(values))
    sums = np.cumsum(values)
    below = sums[:-1] / count
    above = (sums[-1] - sums[:-1]) / (len(values) - count)
    between = count * (len(values) - count) * np.square(above - below)
    at = int(np.argmax(between))
    high = first > (values[at] + values[at + 1]) / 2
    border = np.ones(first.shape[1:], bool)
    border[1:-1, 1:-1] = False
    return high if high[:, border].mean() <= high.mean() else ~high


def colours(
    tokens: Float[np.ndarray, 'pictures rows columns width'], only_foreground: bool = False
) -> tuple[UInt8[np.ndarray, 'pictures rows columns 3'], Float[np.ndarray, '3']]:
    """Colour patches by their principal components: red, green, blue from the least to the largest.

    Args:
      only_foreground: leave the background black, and take the components of the rest.

    Returns:
      (colours, share of the variance of each).
    """
    shape, flat = tokens.shape[:3], tokens.reshape(-1, tokens.shape[-1])
    found, shares = components(flat)
    kept = np.ones(len(flat), bool)
    if only_foreground and len(flat) > 1:
        kept = foreground(found[:, 0].reshape(shape)).ravel()
        found, shares = components(flat[kept])
    low, high = np.quantile(found, _QUANTILES, axis=0)
    scaled = np.clip((found - low) / np.maximum(high - low, 1e-12), 0, 1)
    drawn = np.zeros((len(flat), 3), np.uint8)
    drawn[kept] = np.rint(255 * scaled)
    return drawn.reshape(*shape, 3), shares


def of_inputs(
    loaded: LoadedModel,
    pictures: list[np.ndarray],
    inputs: list[np.ndarray],
    only_foreground: bool = False,
) -> PatchColours:
    """Colour the patches of pictures that are given as the model takes them.

    Raises:
      UserError: the model's tokens form no grid of one picture.
    """
    tokens = np.stack([loaded.patch_tokens(image) for image in inputs])
    return PatchColours(pictures, *colours(tokens, only_foreground))


def from_files(
    loaded: LoadedModel, paths: list[str], only_foreground: bool = False
) -> PatchColours:
    """Colour the patches of image files.

    Raises:
      UserError: a file is not an image, or the model does not take images.
    """
    pictures = [loaded.picture(path) for path in paths]
    inputs = [loaded.normalised(picture) for picture in pictures]
    return of_inputs(loaded, pictures, inputs, only_foreground)


def drawn(found: PatchColours) -> plots.Picture:
    """Show pictures above the colours of their patches."""
    panels = found.panels()
    rows = []
    for start in range(0, len(panels), 8):
        above, below = zip(*panels[start : start + 8], strict=True)
        rows += [('', list(above), [''] * len(above)), ('', list(below), [''] * len(below))]
    figure = plots.picture_rows(rows)
    figure.figure.suptitle(f'principal components\n{found.words()}', fontsize=8)
    return figure
